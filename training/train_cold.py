"""Trains a network that restores degraded images: cold diffusion, which needs no noise.

    python training/train_cold.py --degradation downsample             # handwritten digits, on a CPU, in minutes
    accelerate launch training/train_cold.py --dataset FOLDER_OR_NAME  # your images, on what `accelerate config` says

For an image x_0 and a timestep t, the network R sees the blurred, downsampled or masked x_t = D(x_0, t), and learns to
return the image (Bansal et al. 2022, arXiv:2208.09392, Sec. 3.1),

    loss = |R(x_t, t) - x_0|_1 / d,    or the squared error.

Held-out images are restored from the end of each quarter of the timesteps: by one call of the network, and step by
step with the two samplers of the paper.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from PIL import Image
from torch import nn

from annealers import ColdDiffusionScheduler, GuidedDiffusionPipeline
from annealers.configuration import option, parse_config
from annealers.data import validation_batches
from annealers.figures import sample_grid
from annealers.losses import mean_flat
from annealers.run import Batch, Run, Terms, gathered_images, my_share
from annealers.schedulers.path_tables import spaced_timesteps
from annealers.timestep_sampling import TimestepSampler
from annealers.training.image_task import ImageConfig, ImageTask

WAYS = ("direct", "naive", "improved")
IMAGES_OF_TERMINAL_LAW = 1000


@dataclass
class ColdConfig(ImageConfig):
    """Options of a restoring network; the defaults train 8 x 8 digits on a CPU."""

    output_dir: str = option("runs/cold", "Folder of the run: pipeline, samples, metrics, checkpoints.")
    max_steps: int = option(1000, "Optimizer steps.")
    validation_samples: int = option(128, "Held-out images per validation; each is restored eight times.")
    class_conditional: bool = option(False, "Condition on the labels, if the data has any.")
    sample_columns: int = option(10, "Images in the pictures.")

    num_train_timesteps: int = option(50, "Timesteps of the degradation.")
    degradation: Literal["blur", "downsample", "mask"] = option("blur", "What is done to the images.")
    blur_sigma_min: float = option(0.5, "Width of the least blur, in pixels.", of=("degradation", "blur"))
    blur_sigma_max: float | None = option(
        None, "Width of the strongest blur; unset, the side of the images.", of=("degradation", "blur")
    )
    downsample_factor: int | None = option(
        None, "Side of the largest blocks; unset, that of the images.", of=("degradation", "downsample")
    )
    mask_sigma_min: float = option(
        0.1, "Width of the first Gaussian of the mask, in pixels.", of=("degradation", "mask")
    )
    mask_sigma_max: float | None = option(
        None, "Width of the last; unset, half the side of the images.", of=("degradation", "mask")
    )
    loss: Literal["l1", "l2"] = option("l1", "Mean absolute or squared error.")


class RestorationObjective(nn.Module):
    """The loss of a restoring network, one number per image."""

    def __init__(
        self,
        network: UNet2DModel,
        scheduler: ColdDiffusionScheduler,
        config: ColdConfig,
        timestep_sampler: TimestepSampler,
    ) -> None:
        super().__init__()
        self.network, self.scheduler, self.config = network, scheduler, config
        self.timestep_sampler = timestep_sampler  # what it has learnt is part of the checkpoint

    def forward(
        self,
        images: torch.Tensor,
        timesteps: torch.Tensor,
        timestep_weights: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> Terms:
        """The loss of images in [-1, 1], (B, C, H, W), at timesteps (B,) with weights (B,); returns terms (B,)."""
        x_t = self.scheduler.add_noise(images, None, timesteps)
        error = self.network(x_t, timesteps, class_labels=class_labels).sample.float() - images
        return {"loss": timestep_weights * mean_flat(error.abs() if self.config.loss == "l1" else error**2)}


class ColdTask(ImageTask):
    """A UNet that restores."""

    config: ColdConfig
    tags = ("cold-diffusion",)

    def build(self) -> RestorationObjective:
        config, side = self.config, self.data.resolution
        network = self.unet(self.data.channels)
        scheduler = ColdDiffusionScheduler(
            num_train_timesteps=config.num_train_timesteps,
            degradation=config.degradation,
            blur_sigma_min=config.blur_sigma_min,
            blur_sigma_max=float(side) if config.blur_sigma_max is None else config.blur_sigma_max,
            downsample_factor=side if config.downsample_factor is None else config.downsample_factor,
            mask_sigma_min=config.mask_sigma_min,
            mask_sigma_max=side / 2 if config.mask_sigma_max is None else config.mask_sigma_max,
        )
        scheduler.fit_terminal(self.training_images)
        return RestorationObjective(network, scheduler, config, self.timestep_sampler)

    @property
    def num_train_timesteps(self) -> int:
        return self.config.num_train_timesteps

    @cached_property
    def training_images(self) -> torch.Tensor:
        """A fixed choice of them, for the law of fully degraded images; (N, C, H, W)."""
        data = replace(self.data, validation=self.data.train)
        batches = validation_batches(data, self.config.batch_size, max_samples=IMAGES_OF_TERMINAL_LAW)
        return torch.cat([batch["images"] for batch in batches])

    def draws(self, batch: Batch) -> dict[str, Any]:
        draws = {"images": batch["images"], **self.timestep_draws(batch)}
        if self.null_label is not None:
            draws["class_labels"] = self.training_labels(batch)
        return draws

    # ---- restoration ------------------------------------------------------------------------------------------------

    def restorations(
        self, restoration: RestorationObjective, images: torch.Tensor, labels: torch.Tensor | None, start: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Images degraded to the timestep `start`, and what becomes of them each way, all (B, C, H, W)."""
        scheduler = restoration.scheduler
        x_t = scheduler.add_noise(images, None, start)
        t = torch.tensor(start, device=x_t.device)
        restored = {"direct": restoration.network(x_t, t, class_labels=labels).sample}
        # as many steps as a whole run takes on this part of the timesteps
        steps = -(-self.config.num_inference_steps * (start + 1) // self.config.num_train_timesteps)
        timesteps = spaced_timesteps("trailing", min(steps, start + 1), start + 1, steps_offset=0).astype(int)
        for sampler in ("naive", "improved"):
            pipeline = GuidedDiffusionPipeline(
                restoration.network,
                ColdDiffusionScheduler.from_config(scheduler.config, sampler=sampler),
                null_label=self.null_label,
            )
            pipeline.set_progress_bar_config(disable=True)
            run = pipeline(latents=x_t, class_labels=labels, timesteps=timesteps.tolist(), output_type="latent")
            restored[sampler] = run.images
        return x_t, restored

    def start(self, quarter: int) -> int:
        """The last timestep of quarter 1, 2, 3 or 4."""
        return -(-quarter * self.config.num_train_timesteps // 4) - 1

    def validate(self, objective: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Mean absolute error of held-out images restored from the end of each quarter of the timesteps."""
        restoration = accelerator.unwrap_model(objective)
        sums = torch.zeros(4, len(WAYS), dtype=torch.float64)
        n = 0
        for images, labels, _ in self.held_out(accelerator):
            n += len(images)
            for quarter in range(4):
                _, restored = self.restorations(restoration, images, labels, self.start(quarter + 1))
                for way, name in enumerate(WAYS):
                    sums[quarter, way] += mean_flat((restored[name] - images).abs()).double().sum().cpu()
        totals = torch.cat([sums.flatten(), torch.tensor([float(n)]).double()]).to(accelerator.device)
        *sums, n = accelerator.reduce(totals, reduction="sum").tolist()
        names = [f"{way}_error_quarter_{quarter + 1}" for quarter in range(4) for way in WAYS]
        return {**{name: total / n for name, total in zip(names, sums, strict=True)}, "images": n}

    # ---- pictures ---------------------------------------------------------------------------------------------------

    def example(self) -> str:
        steps = min(self.config.num_inference_steps, self.config.num_train_timesteps)
        return f"images = pipeline(batch_size=4, num_inference_steps={steps}).images"

    def picture(self, objective: nn.Module, accelerator: Accelerator) -> Image.Image:
        """Images three quarters degraded, restored directly, naively and by the improved way, and as they were."""
        restoration, columns = accelerator.unwrap_model(objective), self.config.sample_columns
        batch = self.shown_batch(columns)
        mine = list(my_share(len(batch["images"]), accelerator))
        images = batch["images"][mine].to(accelerator.device)
        labels = None if self.null_label is None else batch["labels"][mine].to(accelerator.device)
        x_t, restored = self.restorations(restoration, images, labels, self.start(3))
        column = torch.cat([x_t, *(restored[way] for way in WAYS), images], dim=-2)  # (B, C, 5 H, W)
        column = gathered_images(column, len(batch["images"]), accelerator)
        return sample_grid(torch.cat(column.chunk(len(WAYS) + 2, dim=-2)), len(column))


def main(arguments: list[str] | None = None) -> None:
    Run(parse_config(ColdConfig, arguments, __doc__.splitlines()[0]), ColdTask).train()


if __name__ == "__main__":
    main()
