r"""Trains a score network by score matching, on images or on points of the plane.

    python training/train_score.py                                        # handwritten digits, on a CPU, in minutes
    python training/train_score.py --dataset toy:ring --loss ism          # points, whose exact score is known
    accelerate launch training/train_score.py --dataset FOLDER_OR_NAME    # your images

At x_t = alpha_t x_0 + sigma_t eps the network predicts eps, and the score is s = -eps-hat / sigma_t. It is matched by

    dsm       J_t = ||s + eps / sigma_t||^2 / d                            Vincent 2011; Song & Ermon 2019, Eq. 5
    ism       J_t = (||s||^2 + 2 div s) / d + 1 / sigma_t^2                Hyvarinen 2005
    sliced    the same with (v^T s)^2 for ||s||^2 and v^T J v for div s    Song, Garg, Shi, Ermon 2019, Eq. 8

which have the same mean, so the same minimiser and the same scale. The loss is w_t J_t with the weight sigma_t^2, by
which that of dsm is ||eps-hat - eps||^2 / d, or with one of the others of `score_weight`.

The noise levels are those of one of the processes of Song et al. 2021:

    ve        y = x_0 + s_t eps, with s_t from sigma_min to sigma_max
    vp        alpha_t^2 + sigma_t^2 = 1, with beta(t) from 0.1 to 20
    sub_vp    the same alpha_t, and sigma_t = 1 - alpha_t^2

all kept in coordinates of the second, by which the state of the others is divided by its deviation on unit data.

Sources: Hyvarinen 2005, "Estimation of Non-Normalized Statistical Models by Score Matching", JMLR 6; Vincent 2011, "A
Connection Between Score Matching and Denoising Autoencoders", doi:10.1162/NECO_a_00142; Song & Ermon 2019, "Generative
Modeling by Estimating Gradients of the Data Distribution", arXiv:1907.05600; Song, Garg, Shi, Ermon 2019, "Sliced
Score Matching", arXiv:1905.07088; Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential
Equations", arXiv:2011.13456.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from diffusers import ModelMixin
from PIL import Image
from torch import nn

from annealers import PointScoreModel, PredictorCorrectorScheduler, ScoreUNetModel
from annealers.configuration import option, parse_config
from annealers.data import toy_law, train_batches
from annealers.exact import GaussianMixture
from annealers.losses import mean_flat, simple_loss
from annealers.noise_ladder import suggest_sigma_max
from annealers.run import Batch, Run, Terms
from annealers.score_matching import (
    denoising_score_matching,
    implicit_score_matching,
    score_weight,
    sliced_score_matching,
)
from annealers.timestep_sampling import TimestepSampler
from annealers.training.image_task import ImageConfig, ImageTask, check_steps
from annealers.training.point_picture import point_picture

SIGMA_MAX_SAMPLES = 1000  # whose distances are compared
PICTURED_POINTS = 500


@dataclass
class ScoreConfig(ImageConfig):
    """Options of a score network; the defaults train 8 x 8 digits on a CPU."""

    output_dir: str = option("runs/score", "Folder of the run: pipeline, samples, metrics, checkpoints.")

    process: Literal["ve", "vp", "sub_vp"] = option("ve", "Noising process.")
    num_train_timesteps: int = option(1000, "Noise levels.")
    sigma_min: float = option(0.01, "Smallest level of 've', in units of the data.", of=("process", "ve"))
    sigma_max: float | None = option(None, "Largest level of 've'; unset, the largest distance in the data.")
    conditioning: Literal["positional", "fourier"] = option(
        "positional", "What the UNet sees: x_t and sinusoids of t, or y and Fourier features of log s_t ('ve' only)."
    )

    loss: Literal["dsm", "ism", "sliced"] = option("dsm", "Denoising, implicit or sliced score matching.")
    probes: int | None = option(
        None, "Random directions per image of 'ism' and 'sliced'; 0 is the exact divergence, unset 1, or 0 on points."
    )
    probe_kind: Literal["rademacher", "gaussian"] = option(
        "rademacher", "Law of the random directions.", of=("loss", "ism", "sliced")
    )
    weighting: Literal["sigma_squared", "likelihood", "min_snr"] = option("sigma_squared", "Weight of a level.")
    min_snr_gamma: float = option(
        5.0, "Largest weight of the error in x_0 with 'min_snr'.", of=("weighting", "min_snr")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.num_inference_steps, self.num_train_timesteps)
        if self.process != "ve" and self.sigma_max is not None:
            raise ValueError(f"sigma_max={self.sigma_max} is of the process 've', not of {self.process!r}")
        if self.conditioning == "fourier" and self.process != "ve":
            raise ValueError(f"conditioning='fourier' is for the levels of 've', and the process is {self.process!r}")
        if self.conditioning == "fourier" and self.is_toy:
            raise ValueError(f"conditioning='fourier' is for a UNet on images, and the data set is {self.dataset!r}")
        if self.probes is not None and (self.loss == "dsm" or self.probes < (self.loss == "sliced")):
            raise ValueError(f"probes are for 'ism' (at least 0) and 'sliced' (at least 1), got {self.probes}")
        if self.compile and self.loss != "dsm":
            raise ValueError(f"loss={self.loss!r} needs second derivatives, which compiled networks do not have")

    @property
    def is_toy(self) -> bool:
        return toy_law(self.dataset) is not None

    @property
    def num_probes(self) -> int:
        """Random directions per image, none for dsm and for the exact divergence."""
        if self.probes is not None or self.loss == "dsm":
            return self.probes or 0
        return 0 if self.loss == "ism" and self.is_toy else 1


class ScoreObjective(nn.Module):
    """The loss of a network that predicts the noise, one number per image."""

    def __init__(
        self,
        network: ModelMixin,
        scheduler: PredictorCorrectorScheduler,
        timestep_sampler: TimestepSampler,
        config: ScoreConfig,
    ) -> None:
        super().__init__()
        self.network, self.scheduler, self.config = network, scheduler, config
        self.timestep_sampler = timestep_sampler  # what it learns is part of the checkpoint

    def forward(
        self,
        images: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        timestep_weights: torch.Tensor,
        probes: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
    ) -> Terms:
        """Computes the loss of images (B, *) at timesteps (B,), with probes (B, K, *); returns terms of shape (B,)."""
        scheduler, config = self.scheduler, self.config
        _, sigma = scheduler.signal_and_noise(timesteps, dtype=torch.float32)
        x_t = scheduler.add_noise(images, noise, timesteps)

        def score(x: torch.Tensor) -> torch.Tensor:
            eps = self.network(x, timesteps, class_labels=class_labels).sample
            return -eps.float() / sigma.reshape(-1, 1, 1, 1)

        if config.loss == "dsm":
            mismatch = denoising_score_matching(score(x_t), noise, sigma)
        else:
            directions = None if probes is None else probes.transpose(0, 1)  # (K, B, *)
            if config.loss == "ism":
                implicit = implicit_score_matching(score, x_t, directions)
            else:
                implicit = sliced_score_matching(score, x_t, directions, variance_reduced=False)
            mismatch = 2 * implicit + 1 / sigma**2
        gamma = config.min_snr_gamma if config.weighting == "min_snr" else None
        weight = timestep_weights * score_weight(config.weighting, scheduler, timesteps, gamma)
        return {"loss": weight * mismatch}


class ScoreTask(ImageTask):
    """A network that knows the score at every noise level."""

    config: ScoreConfig
    tags = ("score-matching",)

    @property
    def num_train_timesteps(self) -> int:
        return self.config.num_train_timesteps

    @cached_property
    def law(self) -> GaussianMixture | None:
        """The law of the data, where it is known."""
        return toy_law(self.config.dataset)

    # ---- what is trained --------------------------------------------------------------------------------------------

    def build(self) -> ScoreObjective:
        return ScoreObjective(self.new_network(), self.new_scheduler(), self.timestep_sampler, self.config)

    def new_network(self) -> ModelMixin:
        config, data = self.config, self.data
        if self.law is not None:
            return PointScoreModel(
                in_channels=data.channels,
                sample_size=data.resolution,
                num_train_timesteps=config.num_train_timesteps,
            )
        if config.conditioning == "positional":
            return self.unet(data.channels)
        unet = self.unet(data.channels, time_embedding_type="fourier")
        return ScoreUNetModel.from_unet(unet, config.sigma_min, self.sigma_max, config.num_train_timesteps)

    def new_scheduler(self) -> PredictorCorrectorScheduler:
        config, T = self.config, self.config.num_train_timesteps
        if config.process == "ve":
            path = {"beta_schedule": "geometric", "sigma_min": config.sigma_min, "sigma_max": self.sigma_max}
        else:
            schedule = {"vp": "linear", "sub_vp": "sub_vp"}[config.process]
            path = {"beta_schedule": schedule, "beta_start": 0.1 / T, "beta_end": 20 / T}
        return PredictorCorrectorScheduler(
            num_train_timesteps=T,
            **path,
            predictor="secant",
            corrector_steps=0,
            clip_sample=self.law is None,
            timestep_spacing="karras",
        )

    @cached_property
    def sigma_max(self) -> float:
        """The largest level of the ladder: at which any two images can turn into each other."""
        if self.config.sigma_max is not None:
            return self.config.sigma_max
        (batch,) = train_batches(self.data, self.config, seed=0, batch_size=SIGMA_MAX_SAMPLES)
        sigma_max = suggest_sigma_max(batch["images"])
        PartialState().print(f"sigma_max={sigma_max:.4g}, the largest distance of {SIGMA_MAX_SAMPLES} training images")
        return sigma_max

    def draws(self, batch: Batch) -> dict[str, Any]:
        images, first = batch["images"], batch["first_position"]
        count, config = len(images), self.config
        draws = {
            "images": images,
            "noise": self.randomness.normal("noise", first, count, images.shape[1:]),
            **self.timestep_draws(batch),
        }
        if config.num_probes > 0:
            shape = (config.num_probes, *images.shape[1:])
            probes = self.randomness.normal("probes", first, count, shape)
            draws["probes"] = probes if config.probe_kind == "gaussian" else torch.where(probes < 0, -1.0, 1.0)
        if self.null_label is not None:
            draws["class_labels"] = self.training_labels(batch)
        return draws

    # ---- validation -------------------------------------------------------------------------------------------------

    def validate(self, objective: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Held-out ||eps-hat - eps||^2 / d by quarter of the timesteps, whatever the training loss.

        Each image is seen at one timestep in each of eight equal strata. Where the law is known, the error of the
        score is too, sum sigma_t^2 ||s - s*||^2 / sum sigma_t^2 ||s*||^2.
        """
        trained, device = accelerator.unwrap_model(objective), accelerator.device
        T, strata = self.num_train_timesteps, 8
        sums = torch.zeros(4, 4, dtype=torch.float64)  # (quarter, [count, loss, error, exact])
        for images, labels, first in self.held_out(accelerator):
            for stratum in range(strata):
                name, count = f"validation {stratum}", len(images)
                offset = (stratum + self.randomness.uniform(name, first, count)) / strata
                timesteps = (offset * T).long()
                noise = self.randomness.normal(name, first, count, images.shape[1:]).to(device)
                x_t = trained.scheduler.add_noise(images, noise, timesteps)
                prediction = trained.network(x_t, timesteps.to(device), class_labels=labels).sample
                terms = [torch.ones(count), simple_loss(prediction, noise), torch.zeros(count), torch.zeros(count)]
                if self.law is not None:
                    exact = self.law.noise(x_t, *trained.scheduler.signal_and_noise(timesteps.to(device)))
                    terms[2:] = simple_loss(prediction, exact), mean_flat(exact**2)
                sums.index_add_(0, timesteps * 4 // T, torch.stack([term.double().cpu() for term in terms], dim=1))
        count, loss, error, exact = accelerator.reduce(sums.to(device), reduction="sum").cpu().T
        values = {f"loss_quarter_{i + 1}": (loss[i] / count[i]).item() for i in range(4)}
        values["loss"] = (loss.sum() / count.sum()).item()
        if self.law is not None:
            values |= {f"score_error_quarter_{i + 1}": (error[i] / exact[i]).item() for i in range(4)}
            values["score_error"] = (error.sum() / exact.sum()).item()
        return values | {"images": count.sum().item() / strata}

    # ---- samples ----------------------------------------------------------------------------------------------------

    def picture(self, objective: nn.Module, accelerator: Accelerator) -> Image.Image:
        """Samples: images as of every image task, points beside the fields of the learnt and of the exact score."""
        if self.law is None:
            return super().picture(objective, accelerator)
        points = self.samples(objective, 1, PICTURED_POINTS, accelerator)
        trained = accelerator.unwrap_model(objective)
        return point_picture(points, self.law, trained.network, trained.scheduler)


def main(arguments: list[str] | None = None) -> None:
    Run(parse_config(ScoreConfig, arguments, __doc__.splitlines()[0]), ScoreTask).train()


if __name__ == "__main__":
    main()
