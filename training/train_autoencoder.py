"""Trains an autoencoder: denoising, or with --noise_std 0 a plain one.

    python training/train_autoencoder.py                                       # handwritten digits, on a CPU
    accelerate launch training/train_autoencoder.py --dataset FOLDER_OR_NAME   # your images, on your machines

The encoder sees the image with noise, and the decoder is to return it without (Vincent et al. 2008),

    loss = |x - D(E(x + sigma eps))|^2,    summed over the values of an image

What is saved is a pipeline that walks from images or from noise to the manifold of the data; its `autoencoder` has
`encode` and `decode`. `examples/few_labels.py` makes a classifier of the encoder.
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from annealers import AutoencoderModel, DenoisingAutoencoderPipeline
from annealers.configuration import RunConfig, option, parse_config
from annealers.figures import sample_grid
from annealers.losses import mean_flat
from annealers.run import Batch, Run, Task, Terms, gathered_images, held_out_means, my_share

MOMENTS = (0.0, 0.1, 0.3, 1.0)  # of the walk in the pictures, as parts of its steps


@dataclass
class AutoencoderConfig(RunConfig):
    """Options of an autoencoder; the defaults train one of 8 x 8 digits on a CPU."""

    output_dir: str = option("runs/autoencoder", "Folder of the run: pipeline, samples, metrics, checkpoints.")
    max_steps: int = option(1200, "Optimizer steps.")
    batch_size: int = option(64, "Images per optimizer step, over all processes and accumulation steps.")
    learning_rate: float = option(2e-3, "Peak learning rate of AdamW.")
    lr_warmup_steps: int = option(50, "Optimizer steps of linear warm-up.")
    ema_decay: float = option(0.995, "Decay of the exponential moving average of the weights.")

    noise_std: float = option(0.5, "Noise on the images that the encoder sees, in units of [-1, 1]; 0 adds none.")
    latent_channels: int = option(32, "Channels of the latent.")
    flat_latent: bool = option(True, "Make the latent a vector; else it keeps the places of the last level.")
    block_out_channels: list[int] = option([16, 32], "Channels of each resolution level.")
    layers_per_block: int = option(1, "Residual blocks per level.")
    norm_groups: int = option(8, "Groups of the normalisation.")
    attention: bool = option(True, "Self-attention at the lowest resolution.")

    num_inference_steps: int = option(40, "Steps of the walk in the pictures.")
    step_size: float = option(0.25, "Part of the way that each of them goes.")
    sample_columns: int = option(10, "Images in the pictures.")

    def __post_init__(self) -> None:
        super().__post_init__()
        channels = self.block_out_channels
        if self.norm_groups < 1 or not all(count > 0 and count % self.norm_groups == 0 for count in channels):
            raise ValueError(
                f"block_out_channels must be multiples of norm_groups, got {channels} and {self.norm_groups}"
            )
        if self.sample_columns < 1:
            raise ValueError(f"sample_columns must be at least 1, got {self.sample_columns}")


class AutoencoderObjective(nn.Module):
    """The loss of an autoencoder, one number per image."""

    def __init__(self, network: AutoencoderModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> Terms:
        """Of images in [-1, 1], (B, C, H, W), and standard normal noise for a denoising one; returns terms (B,)."""
        loss = self.network(images, noise).loss
        return {"loss": loss, "mean_squared_error": loss.detach() / images[0].numel()}


class AutoencoderTask(Task):
    """An autoencoder and its walk."""

    config: AutoencoderConfig
    tags = ("autoencoder",)

    def build(self) -> AutoencoderObjective:
        config, data = self.config, self.data
        network = AutoencoderModel(
            in_channels=data.channels,
            out_channels=data.channels,
            sample_size=data.resolution,
            latent_channels=config.latent_channels,
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_groups,
            mid_block_add_attention=config.attention,
            flat_latent=config.flat_latent,
            noise_std=config.noise_std,
        )
        return AutoencoderObjective(network)

    def draws(self, batch: Batch) -> dict[str, Any]:
        return {"images": batch["images"], **self.noise_of(batch, "noise")}

    def noise_of(self, batch: Batch, stream: str) -> dict[str, torch.Tensor]:
        """Noise for a batch of images, if it is a denoising autoencoder."""
        if self.config.noise_std == 0:
            return {}
        images = batch["images"]
        return {"noise": self.randomness.normal(stream, batch["first_position"], len(images), images.shape[1:])}

    # ---- validation -------------------------------------------------------------------------------------------------

    def validate(self, objective: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Held-out errors: the loss, the mean squared error of a value, and that of images without noise."""
        autoencoder, device = accelerator.unwrap_model(objective), accelerator.device

        def terms_of(batch: Batch) -> Terms:
            images = batch["images"].to(device)
            noise = {name: noise.to(device) for name, noise in self.noise_of(batch, "validation").items()}
            clean_error = mean_flat((autoencoder.network.denoise(images) - images) ** 2)
            return {**autoencoder(images, **noise), "mean_squared_error_without_noise": clean_error}

        return held_out_means(self.data, self.config, accelerator, terms_of)

    # ---- pictures ---------------------------------------------------------------------------------------------------

    def pipeline(self, objective: AutoencoderObjective) -> DenoisingAutoencoderPipeline:
        return DenoisingAutoencoderPipeline(objective.network)

    def example(self) -> str:
        steps, step_size = self.config.num_inference_steps, self.config.step_size
        return f"images = pipeline(batch_size=4, num_inference_steps={steps}, step_size={step_size}).images"

    def picture(self, objective: nn.Module, accelerator: Accelerator) -> Image.Image:
        """Held-out images, with noise, and what is made of them; below, four moments of walks from noise."""
        columns, sigma = self.config.sample_columns, self.config.noise_std
        batch = self.shown_batch(columns)
        mine = list(my_share(len(batch["images"]), accelerator))
        pipeline = self.pipeline(accelerator.unwrap_model(objective)).to(accelerator.device)
        pipeline.set_progress_bar_config(disable=True)

        images = batch["images"][mine].to(accelerator.device)
        rows = [images]
        if sigma > 0:
            rows.append(images + sigma * self.noise_of(batch, "picture")["noise"][mine].to(images))
        rows.append(pipeline.autoencoder.denoise(rows[-1]))
        if sigma > 0:
            rows += self.walk(pipeline, mine)
        column = gathered_images(torch.cat(rows, dim=-2), len(batch["images"]), accelerator)
        return sample_grid(torch.cat(column.chunk(len(rows), dim=-2)), len(column))

    def walk(self, pipeline: DenoisingAutoencoderPipeline, positions: list[int]) -> list[torch.Tensor]:
        """States of walks from noise at the `MOMENTS`, each (B, C, H, W); each image has a generator of its own."""
        steps = self.config.num_inference_steps
        trajectory = pipeline(
            num_inference_steps=steps,
            step_size=self.config.step_size,
            generator=[torch.Generator().manual_seed(self.randomness.step_seed(i, 0)) for i in positions],
            output_type="latent",
            return_trajectory=True,
        ).trajectory
        return [trajectory.samples[round(moment * steps)].to(pipeline.device) for moment in MOMENTS]


def main(arguments: list[str] | None = None) -> None:
    Run(parse_config(AutoencoderConfig, arguments, __doc__.splitlines()[0]), AutoencoderTask).train()


if __name__ == "__main__":
    main()
