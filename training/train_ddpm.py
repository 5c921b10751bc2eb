"""Trains a denoising diffusion model, unconditional or conditional on class labels.

    python training/train_ddpm.py                                    # handwritten digits, on a CPU, in minutes
    accelerate launch training/train_ddpm.py --dataset FOLDER_OR_NAME  # your images, on what `accelerate config` says
    python training/train_ddpm.py --vae FOLDER_OR_ID                 # in the latents of an autoencoder

For an image x_0, a timestep t and noise eps, the network sees x_t = alpha_t x_0 + sigma_t eps and its label, or the
null class with probability `condition_dropout`, and learns to predict eps, x_0 or v = alpha_t eps - sigma_t x_0:

    L_simple = w_t ||prediction - target||^2 / d      Ho et al. 2020, arXiv:2006.11239, Eq. 14
    w_t      = 1, min-SNR, or another                 Hang et al. 2023, arXiv:2303.09556; `annealers.score_matching`
    L_hybrid = L_simple + 0.001 L_vlb                 Nichol & Dhariwal 2021, arXiv:2102.09672, with learned variance
    L_vlb    = the variational bound alone, for which timesteps are best drawn by their losses     Sec. 3.3 of the same

With an autoencoder, x_0 are its scaled latents, drawn anew from its posterior each time if it has one; see Rombach et
al. 2022, arXiv:2112.10752, Sec. 3.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import ModelMixin, UNet2DModel
from torch import nn

from annealers import DDPMAncestralScheduler
from annealers.configuration import option, parse_config
from annealers.losses import hybrid_loss, prior_bound_term, simple_loss, variational_bound_term
from annealers.run import Batch, Run, Terms
from annealers.score_matching import prediction_weight
from annealers.timestep_sampling import TimestepSampler
from annealers.training.first_stage import FirstStage
from annealers.training.image_task import ImageConfig, ImageTask, check_steps


@dataclass
class DDPMConfig(ImageConfig):
    """Options of a denoising diffusion model; the defaults train 8 x 8 digits on a CPU."""

    output_dir: str = option("runs/ddpm", "Folder of the run: pipeline, samples, metrics, checkpoints.")
    num_train_timesteps: int = option(1000, "Noise levels.")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = option(
        "squaredcos_cap_v2", "Noise schedule."
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = option(
        "v_prediction", "What the network predicts."
    )
    loss: Literal["simple", "vlb"] = option("simple", "L_simple, or the variational bound alone.")
    weighting: Literal["simple", "sigma_squared", "likelihood"] = option(
        "simple", "Weight of L_simple: 1 for what is predicted, 1 for the noise, or that of the bound."
    )
    min_snr_gamma: float | None = option(None, "Gamma of min-SNR, another weighting of L_simple.")
    learned_variance: bool = option(False, "Learn the reverse variance; L_simple becomes the hybrid loss.")
    vlb_weight: float = option(0.001, "Weight of the variational bound in the hybrid loss.", of="learned_variance")
    vae: str | None = option(
        None, "Pipeline with an autoencoder, a folder or a name on the Hub: train on its latents."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.num_inference_steps, self.num_train_timesteps)
        if self.vae is not None and (self.learned_variance or self.loss == "vlb"):
            raise ValueError("the variational bound is one of 8-bit images: it cannot be trained on latents, --vae")
        weights = [f"--weighting {self.weighting}"] if self.weighting != "simple" else []
        weights += [f"--min-snr-gamma {self.min_snr_gamma}"] if self.min_snr_gamma is not None else []
        weights += ["--loss vlb"] if self.loss == "vlb" else []
        if len(weights) > 1:
            raise ValueError(f"the loss has one weight, got {' and '.join(weights)}")


class DenoisingObjective(nn.Module):
    """The loss of a denoising network, one number per image."""

    def __init__(
        self,
        network: UNet2DModel,
        scheduler: DDPMAncestralScheduler,
        config: DDPMConfig,
        timestep_sampler: TimestepSampler,
        first_stage: FirstStage | None = None,
    ) -> None:
        super().__init__()
        self.network, self.scheduler, self.config, self.first_stage = network, scheduler, config, first_stage
        self.timestep_sampler = timestep_sampler  # what it has learnt is part of the checkpoint

    def forward(
        self,
        images: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        timestep_weights: torch.Tensor | None = None,
        posterior_noise: torch.Tensor | None = None,
        image_labels: torch.Tensor | None = None,
    ) -> Terms:
        """The loss of images in [-1, 1], (B, C, H, W), at timesteps (B,) with weights (B,); returns terms (B,).

        With a first stage, `posterior_noise` draws their latents, and `image_labels` are those without null labels.
        """
        if self.first_stage is not None:
            images = self.first_stage.latents(images, image_labels, posterior_noise)
        terms = self._terms(images, noise, timesteps, class_labels)
        if timestep_weights is None:
            return terms
        return {name: timestep_weights * term for name, term in terms.items()}

    def _terms(
        self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None
    ) -> Terms:
        scheduler, config = self.scheduler, self.config
        x_t = scheduler.add_noise(images, noise, timesteps)
        output = self.network(x_t, timesteps, class_labels=class_labels).sample
        prediction = output[:, : images.shape[1]]

        if config.loss == "vlb":  # T times a term at uniform t estimates their sum
            return {"loss": len(scheduler) * variational_bound_term(scheduler, output, images, x_t, timesteps)}
        simple = simple_loss(prediction, scheduler.training_target(images, noise, timesteps))
        if config.min_snr_gamma is not None:
            simple = simple * prediction_weight("min_snr", scheduler, timesteps, config.min_snr_gamma)
        elif config.weighting != "simple":
            simple = simple * prediction_weight(config.weighting, scheduler, timesteps)
        if not config.learned_variance:
            return {"loss": simple}
        bound = hybrid_loss(scheduler, output, images, x_t, timesteps)
        return {"loss": simple + config.vlb_weight * bound, "simple": simple, "bound": bound}


class DDPMTask(ImageTask):
    """A UNet that denoises."""

    config: DDPMConfig
    tags = ("ddpm",)

    @cached_property
    def first_stage(self) -> FirstStage | None:
        """What makes latents of images, if the network is to draw latents."""
        config = self.config
        return None if config.vae is None else FirstStage(config.vae, self.data, config.class_conditional)

    @property
    def vae(self) -> ModelMixin | None:
        return None if self.first_stage is None else self.first_stage.vae

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return super().sample_shape if self.first_stage is None else self.first_stage.latent_shape

    @property
    def num_train_timesteps(self) -> int:
        return self.config.num_train_timesteps

    def build(self) -> DenoisingObjective:
        config = self.config
        network = self.unet(out_channels=self.sample_shape[0] * (2 if config.learned_variance else 1))
        scheduler = DDPMAncestralScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_schedule=config.beta_schedule,
            prediction_type=config.prediction_type,
            variance_type="learned_range" if config.learned_variance else "fixed_small",
            timestep_spacing="trailing",
            clip_sample=self.first_stage is None,
        )
        return DenoisingObjective(network, scheduler, config, self.timestep_sampler, self.first_stage)

    def draws(self, batch: Batch) -> dict[str, Any]:
        images, first, count = batch["images"], batch["first_position"], len(batch["images"])
        draws = {
            "images": images,
            "noise": self.randomness.normal("noise", first, count, self.sample_shape),
            **self.timestep_draws(batch),
        }
        if self.first_stage is not None:
            draws["posterior_noise"] = self.randomness.normal("posterior", first, count, self.sample_shape)
            if self.first_stage.takes_labels:
                draws["image_labels"] = batch["labels"]
        if self.null_label is not None:
            draws["class_labels"] = self.training_labels(batch)
        return draws

    # ---- validation -------------------------------------------------------------------------------------------------

    def validate(self, objective: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Held-out loss by quarter of the timesteps, and of images the variational bound in bits/dim.

        Each image is seen at t = 0, whose term of the bound is unlike the others, and at one timestep in each of eight
        equal strata of 1 .. T - 1, which estimate the sum of the others. Latents, the means of their posteriors, have
        no such bound.
        """
        denoising, device = accelerator.unwrap_model(objective), accelerator.device
        network, scheduler = denoising.network, denoising.scheduler
        T, strata = self.config.num_train_timesteps, 8
        first_stage = self.first_stage
        of_images = first_stage is None
        sums = torch.zeros(4, 2, dtype=torch.float64)  # (quarter, [loss, count])
        bounds: list[torch.Tensor] = []
        for images, labels, first in self.held_out(accelerator):
            count = len(images)
            if first_stage is not None:
                images = first_stage.latents(images, labels, noise=None)
            bound = prior_bound_term(scheduler, images) if of_images else torch.zeros(count)
            for stratum in range(-1 if of_images else 0, strata):
                name = f"validation {stratum}"
                offset = (stratum + self.randomness.uniform(name, first, count)) / strata
                timesteps = (1 + offset * (T - 1)).long() if stratum >= 0 else torch.zeros(count, dtype=torch.long)
                quarter, timesteps = timesteps * 4 // T, timesteps.to(device)
                noise = self.randomness.normal(name, first, count, images.shape[1:]).to(device)
                x_t = scheduler.add_noise(images, noise, timesteps)
                output = network(x_t, timesteps, class_labels=labels).sample
                if of_images:
                    weight = 1 if stratum < 0 else (T - 1) / strata
                    bound = bound + weight * variational_bound_term(scheduler, output, images, x_t, timesteps)
                if stratum >= 0:
                    target = scheduler.training_target(images, noise, timesteps)
                    loss = simple_loss(output[:, : images.shape[1]], target).double().cpu()
                    sums.index_add_(0, quarter, torch.stack([loss, torch.ones_like(loss)], dim=1))
            bounds.append(bound.double().cpu())
        bound = torch.cat(bounds) if bounds else torch.zeros(0, dtype=torch.float64)
        moments = torch.stack([bound.sum(), bound.square().sum(), torch.tensor(float(len(bound))).double()])
        totals = accelerator.reduce(torch.cat([sums.flatten(), moments]).to(device), reduction="sum").cpu()
        losses, (total, squares, n) = totals[:-3].reshape(4, 2), totals[-3:].tolist()
        mean = total / n
        values = {f"loss_quarter_{i + 1}": (losses[i, 0] / losses[i, 1]).item() for i in range(4)}
        values["loss"] = (losses[:, 0].sum() / losses[:, 1].sum()).item()
        if of_images:
            values["vlb_bits_per_dim"] = mean
            values["vlb_bits_per_dim_standard_error"] = max(squares / n - mean**2, 0) ** 0.5 / n**0.5
        return values | {"images": n}


def main(arguments: list[str] | None = None) -> None:
    Run(parse_config(DDPMConfig, arguments, __doc__.splitlines()[0]), DDPMTask).train()


if __name__ == "__main__":
    main()
