"""Trains a denoising diffusion model, unconditional or conditional on class labels.

    python training/train_ddpm.py                                    # handwritten digits, on a CPU, in minutes
    accelerate launch training/train_ddpm.py --dataset FOLDER_OR_NAME  # your images, on what `accelerate config` says

For an image x_0, a timestep t and noise eps, the network sees x_t = alpha_t x_0 + sigma_t eps and its label, or the
null class with probability `condition_dropout`, and learns to predict eps, x_0 or v = alpha_t eps - sigma_t x_0:

    L_simple = w_t ||prediction - target||^2 / d      Ho et al. 2020, arXiv:2006.11239, Eq. 14
    w_t      = 1, or min-SNR                          Hang et al. 2023, arXiv:2303.09556
    L_hybrid = L_simple + 0.001 L_vlb                 Nichol & Dhariwal 2021, arXiv:2102.09672, with learned variance
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from PIL import Image
from torch import nn

from annealers import DDPMAncestralScheduler, GuidedDiffusionPipeline
from annealers.configuration import RunConfig, option, parse_config
from annealers.data import validation_batches
from annealers.figures import enlarge, image_grid, to_pil
from annealers.losses import hybrid_loss, min_snr_weight, prior_bound_term, simple_loss, variational_bound_term
from annealers.run import Batch, Run, Task, Terms, gathered_images, my_share

NORM_GROUPS = 32  # of UNet2DModel
SMALLEST_PICTURE = 48  # pixels; smaller images are enlarged to be seen


@dataclass
class DDPMConfig(RunConfig):
    """Options of a denoising diffusion model; the defaults train 8 x 8 digits on a CPU."""

    output_dir: str = option("runs/ddpm", "Folder of the run: pipeline, samples, metrics, checkpoints.")
    max_steps: int = option(1500, "Optimizer steps.")
    batch_size: int = option(64, "Images per optimizer step, over all processes and accumulation steps.")
    learning_rate: float = option(2e-3, "Peak learning rate of AdamW.")
    lr_warmup_steps: int = option(50, "Optimizer steps of linear warm-up.")
    ema_decay: float = option(0.995, "Decay of the exponential moving average of the weights.")

    block_out_channels: list[int] = option([32, 64], "Channels of each resolution level of the UNet.")
    attention_levels: list[int] = option([1], "Levels with self-attention, 0 being the full resolution.")
    layers_per_block: int = option(1, "Residual blocks per level.")
    dropout: float = option(0.0, "Dropout in the residual blocks.")

    class_conditional: bool = option(True, "Condition on the labels, if the data has any.")
    condition_dropout: float = option(0.1, "Share of images whose label is replaced by the null class.")

    num_train_timesteps: int = option(1000, "Noise levels.")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = option(
        "squaredcos_cap_v2", "Noise schedule."
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = option(
        "v_prediction", "What the network predicts."
    )
    min_snr_gamma: float | None = option(None, "Gamma of min-SNR weighting; unset, L_simple.")
    learned_variance: bool = option(False, "Learn the reverse variance with the hybrid loss.")
    vlb_weight: float = option(0.001, "Weight of the variational bound in the hybrid loss.")

    num_inference_steps: int = option(50, "Sampling steps of the pictures.")
    guidance_scale: float = option(1.0, "Guidance scale of the pictures; 1 is plain conditional sampling.")
    sample_columns: int = option(10, "Samples per row of the pictures: per class, if conditional.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"condition_dropout must lie in [0, 1], got {self.condition_dropout}")
        if not all(channels > 0 and channels % NORM_GROUPS == 0 for channels in self.block_out_channels):
            raise ValueError(
                f"block_out_channels must be multiples of {NORM_GROUPS}, the groups of the UNet's normalisation, "
                f"got {self.block_out_channels}"
            )
        if not all(0 <= level < len(self.block_out_channels) for level in self.attention_levels):
            raise ValueError(
                f"attention_levels must lie in 0 .. {len(self.block_out_channels) - 1}, got {self.attention_levels}"
            )


class DenoisingObjective(nn.Module):
    """The loss of a denoising network, one number per image."""

    def __init__(self, network: UNet2DModel, scheduler: DDPMAncestralScheduler, config: DDPMConfig) -> None:
        super().__init__()
        self.network, self.scheduler, self.config = network, scheduler, config

    def forward(
        self,
        images: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> Terms:
        """Computes the loss of images in [-1, 1], (B, C, H, W), at timesteps (B,); returns terms of shape (B,)."""
        scheduler, config = self.scheduler, self.config
        x_t = scheduler.add_noise(images, noise, timesteps)
        output = self.network(x_t, timesteps, class_labels=class_labels).sample
        prediction = output[:, : images.shape[1]]

        simple = simple_loss(prediction, scheduler.training_target(images, noise, timesteps))
        if config.min_snr_gamma is not None:
            alpha, sigma = scheduler.signal_and_noise(timesteps, dtype=torch.float32)
            simple = simple * min_snr_weight((alpha / sigma) ** 2, config.min_snr_gamma, config.prediction_type)
        if not config.learned_variance:
            return {"loss": simple}
        bound = hybrid_loss(scheduler, output, images, x_t, timesteps)
        return {"loss": simple + config.vlb_weight * bound, "simple": simple, "bound": bound}


class DDPMTask(Task):
    """A UNet that denoises."""

    config: DDPMConfig
    tags = ("ddpm",)

    @property
    def id2label(self) -> dict[int, str] | None:
        return self.data.id2label if self.config.class_conditional else None

    @property
    def null_label(self) -> int | None:
        """The class that stands for no class, after the data's own."""
        return None if self.id2label is None else len(self.id2label)

    def build(self) -> DenoisingObjective:
        config, data = self.config, self.data
        levels = len(config.block_out_channels)
        if data.resolution % 2 ** (levels - 1) != 0:
            raise ValueError(
                f"{levels} resolution levels halve the image {levels - 1} times, which {data.resolution} pixels do "
                f"not allow; choose --resolution as a multiple of {2 ** (levels - 1)} or fewer --block-out-channels"
            )
        kinds = ["Attn" if level in config.attention_levels else "" for level in range(levels)]
        network = UNet2DModel(
            sample_size=data.resolution,
            in_channels=data.channels,
            out_channels=data.channels * (2 if config.learned_variance else 1),
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
            dropout=config.dropout,
            num_class_embeds=None if self.null_label is None else self.null_label + 1,
        )
        scheduler = DDPMAncestralScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_schedule=config.beta_schedule,
            prediction_type=config.prediction_type,
            variance_type="learned_range" if config.learned_variance else "fixed_small",
            timestep_spacing="trailing",
        )
        return DenoisingObjective(network, scheduler, config)

    def draws(self, batch: Batch) -> dict[str, Any]:
        images, first, T = batch["images"], batch["first_position"], self.config.num_train_timesteps
        count = len(images)
        draws = {
            "images": images,
            "noise": self.randomness.normal("noise", first, count, images.shape[1:]),
            "timesteps": self.randomness.integers("timestep", first, count, high=T),
        }
        if self.null_label is not None:
            dropped = self.randomness.uniform("condition dropout", first, count) < self.config.condition_dropout
            draws["class_labels"] = batch["labels"].masked_fill(dropped, self.null_label)
        return draws

    # ---- validation -------------------------------------------------------------------------------------------------

    def validate(self, objective: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Held-out loss by quarter of the timesteps, and the variational bound in bits/dim.

        Each image is seen at t = 0, whose term of the bound is unlike the others, and at one timestep in each of eight
        equal strata of 1 .. T - 1, which estimate the sum of the others.
        """
        denoising, device = objective_of(objective, accelerator), accelerator.device
        network, scheduler = denoising.network, denoising.scheduler
        T, strata = self.config.num_train_timesteps, 8
        sums = torch.zeros(4, 2, dtype=torch.float64)  # (quarter, [loss, count])
        bounds: list[torch.Tensor] = []
        for batch in validation_batches(
            self.data,
            self.config.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            max_samples=self.config.validation_samples,
            num_workers=self.config.num_workers,
        ):
            images, first, count = batch["images"].to(device), batch["first_position"], len(batch["images"])
            labels = None if self.null_label is None else batch["labels"].to(device)
            bound = prior_bound_term(scheduler, images)
            for stratum in range(-1, strata):
                name = f"validation {stratum}"
                offset = (stratum + self.randomness.uniform(name, first, count)) / strata
                timesteps = (1 + offset * (T - 1)).long() if stratum >= 0 else torch.zeros(count, dtype=torch.long)
                quarter, timesteps = timesteps * 4 // T, timesteps.to(device)
                noise = self.randomness.normal(name, first, count, images.shape[1:]).to(device)
                x_t = scheduler.add_noise(images, noise, timesteps)
                output = network(x_t, timesteps, class_labels=labels).sample
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
        return {
            **{f"loss_quarter_{i + 1}": (losses[i, 0] / losses[i, 1]).item() for i in range(4)},
            "loss": (losses[:, 0].sum() / losses[:, 1].sum()).item(),
            "vlb_bits_per_dim": mean,
            "vlb_bits_per_dim_standard_error": max(squares / n - mean**2, 0) ** 0.5 / n**0.5,
            "images": n,
        }

    # ---- samples ----------------------------------------------------------------------------------------------------

    def pipeline(self, objective: DenoisingObjective) -> GuidedDiffusionPipeline:
        return GuidedDiffusionPipeline(
            objective.network, objective.scheduler, id2label=self.id2label, null_label=self.null_label
        )

    def example(self) -> str:
        if self.id2label is None:
            return "images = pipeline(batch_size=4).images"
        return f"images = pipeline(class_labels={list(self.id2label.values())[:4]}).images"

    def picture(self, objective: nn.Module, accelerator: Accelerator) -> Image.Image:
        """A row of samples for each class, or a square without classes; each image has a generator of its own."""
        columns = self.config.sample_columns
        rows = columns if self.id2label is None else len(self.id2label)
        mine = my_share(rows * columns, accelerator)
        pipeline = self.pipeline(objective_of(objective, accelerator))
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            batch_size=len(mine),
            class_labels=None if self.id2label is None else [i // columns for i in mine],
            guidance_scale=self.config.guidance_scale if self.id2label is not None else 1.0,
            num_inference_steps=self.config.num_inference_steps,
            generator=[torch.Generator().manual_seed(self.randomness.step_seed(i, 0)) for i in mine],
            output_type="pt",
        ).images
        images = gathered_images(images, rows * columns, accelerator)
        if self.data.channels not in (1, 3):  # no colours: the channels beside each other
            images = torch.cat(images.split(1, dim=1), dim=-1)
        pictures = to_pil(images * 2 - 1)
        scale = -(-SMALLEST_PICTURE // self.data.resolution)
        return image_grid([enlarge(picture, scale) for picture in pictures], columns, padding=2)


def objective_of(objective: nn.Module, accelerator: Accelerator) -> DenoisingObjective:
    return accelerator.unwrap_model(objective)


def main(arguments: list[str] | None = None) -> None:
    Run(parse_config(DDPMConfig, arguments, __doc__.splitlines()[0]), DDPMTask).train()


if __name__ == "__main__":
    main()
