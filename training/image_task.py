"""What the scripts that train a UNet on images share: its options, labels, validation batches, pipeline, pictures."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from accelerate import Accelerator
from diffusers import ModelMixin, UNet2DModel
from PIL import Image
from torch import nn

from annealers import GuidedDiffusionPipeline
from annealers.configuration import RunConfig, option
from annealers.data import validation_batches
from annealers.figures import sample_grid
from annealers.run import Batch, Task, Terms, gathered_images, in_order_of_positions, my_share
from annealers.timestep_sampling import TimestepSampler, TimestepSampling, make_timestep_sampler


@dataclass
class NetworkConfig(RunConfig):
    """Options of a network made of the blocks of a UNet; the defaults train on 8 x 8 digits on a CPU."""

    batch_size: int = option(64, "Images per optimizer step, over all processes and accumulation steps.")
    learning_rate: float = option(2e-3, "Peak learning rate of AdamW.")
    lr_warmup_steps: int = option(50, "Optimizer steps of linear warm-up.")
    ema_decay: float = option(0.995, "Decay of the exponential moving average of the weights.")

    block_out_channels: list[int] = option([32, 64], "Channels of each resolution level of the UNet.")
    attention_levels: list[int] = option([1], "Levels with self-attention, 0 being the full resolution.")
    layers_per_block: int = option(1, "Residual blocks per level.")
    norm_groups: int = option(
        8, "Groups of the normalisation; in a group of one channel it removes what timestep and class put in."
    )
    dropout: float = option(0.0, "Dropout in the residual blocks.")

    def __post_init__(self) -> None:
        super().__post_init__()
        channels, levels = self.block_out_channels, len(self.block_out_channels)
        if self.norm_groups < 1 or not all(count > 0 and count % self.norm_groups == 0 for count in channels):
            raise ValueError(
                f"block_out_channels must be multiples of norm_groups, got {channels} and {self.norm_groups}"
            )
        if not all(0 <= level < levels for level in self.attention_levels):
            raise ValueError(f"attention_levels must lie in 0 .. {levels - 1}, got {self.attention_levels}")

    @property
    def down_block_types(self) -> tuple[str, ...]:
        """Diffusers' names of the blocks, from the full resolution down."""
        levels = range(len(self.block_out_channels))
        return tuple(f"{'Attn' * (level in self.attention_levels)}DownBlock2D" for level in levels)


@dataclass
class ImageConfig(NetworkConfig):
    """Options of a UNet on images; the defaults train 8 x 8 digits on a CPU."""

    max_steps: int = option(1500, "Optimizer steps.")

    class_conditional: bool = option(True, "Condition on the labels, if the data has any.")
    condition_dropout: float = option(0.1, "Share of images whose label is replaced by the null class.")

    timestep_sampling: TimestepSampling = option(
        "uniform", "How timesteps are drawn: uniformly, one in each stratum of a step, or by their recent losses."
    )

    num_inference_steps: int = option(50, "Sampling steps of the pictures.")
    guidance_scale: float = option(1.0, "Guidance scale of the pictures; 1 is plain conditional sampling.")
    sample_columns: int = option(10, "Samples per row of the pictures: per class, if conditional.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"condition_dropout must lie in [0, 1], got {self.condition_dropout}")
        if self.sample_columns < 1:
            raise ValueError(f"sample_columns must be at least 1, got {self.sample_columns}")


def check_steps(num_inference_steps: int, num_train_timesteps: int) -> None:
    """Raises ValueError if the pictures ask for more sampling steps than there are noise levels."""
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps must lie in 1 .. {num_train_timesteps} (num_train_timesteps), "
            f"got {num_inference_steps}"
        )


class ImageTask(Task):
    """A task whose objective has `.network`, called as a `UNet2DModel` is, and the `.scheduler` to sample with."""

    config: ImageConfig

    @property
    def id2label(self) -> dict[int, str] | None:
        return self.data.id2label if self.config.class_conditional else None

    @property
    def null_label(self) -> int | None:
        """The class that stands for no class, after the data's own."""
        return None if self.id2label is None else len(self.id2label)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network sees: of the images, unless a task says otherwise."""
        return self.data.channels, self.data.resolution, self.data.resolution

    @property
    def vae(self) -> ModelMixin | None:
        """What decodes images from what the network draws, if that is latents."""
        return None

    def unet(self, out_channels: int, **architecture: object) -> UNet2DModel:
        """A UNet as the options describe it, with random weights; `architecture` is passed on to it."""
        config, (channels, height, width) = self.config, self.sample_shape
        levels = len(config.block_out_channels)
        if height % 2 ** (levels - 1) != 0 or width % 2 ** (levels - 1) != 0:
            sides = f"{height} pixels" if self.vae is None else f"latents of {height} x {width}"
            raise ValueError(
                f"{levels} resolution levels halve the image {levels - 1} times, which {sides} do "
                f"not allow; choose --resolution as a multiple of {2 ** (levels - 1)} or fewer --block-out-channels"
            )
        return UNet2DModel(
            sample_size=height if height == width else (height, width),
            in_channels=channels,
            out_channels=out_channels,
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            down_block_types=config.down_block_types,
            up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(config.down_block_types)),
            dropout=config.dropout,
            norm_num_groups=config.norm_groups,
            num_class_embeds=None if self.null_label is None else self.null_label + 1,
            **architecture,
        )

    def training_labels(self, batch: Batch) -> torch.Tensor:
        """The labels of a batch, (B,), some of them replaced by the null class, as (seed, position) decides."""
        first, count = batch["first_position"], len(batch["images"])
        dropped = self.randomness.uniform("condition dropout", first, count) < self.config.condition_dropout
        return batch["labels"].masked_fill(dropped, self.null_label)

    # ---- timesteps --------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def num_train_timesteps(self) -> int:
        """T; timesteps are drawn from 0 .. T - 1."""

    @cached_property
    def timestep_sampler(self) -> TimestepSampler:
        """To be a submodule of the objective, so that what it has learnt is part of the checkpoint."""
        return make_timestep_sampler(self.config.timestep_sampling, self.num_train_timesteps, self.randomness)

    def timestep_draws(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Timesteps of a batch and the weights of their losses, (B,) each."""
        first, count = batch["first_position"], len(batch["images"])
        timesteps, weights = self.timestep_sampler.draw(first, count, self.config.batch_size)
        return {"timesteps": timesteps, "timestep_weights": weights}

    def after_step(self, step: int, terms: list[Terms], accelerator: Accelerator) -> None:
        if self.timestep_sampler.learns:
            losses = in_order_of_positions([term["loss"] for term in terms], accelerator)
            self.timestep_sampler.observe_step(step * self.config.batch_size, losses)

    # ---- validation -------------------------------------------------------------------------------------------------

    def held_out(self, accelerator: Accelerator) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, int]]:
        """This process's batches for validation, on its device: images, their labels, and the first position."""
        for batch in validation_batches(
            self.data,
            self.config.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            max_samples=self.config.validation_samples,
            num_workers=self.config.num_workers,
        ):
            labels = None if self.null_label is None else batch["labels"].to(accelerator.device)
            yield batch["images"].to(accelerator.device), labels, batch["first_position"]

    # ---- samples ----------------------------------------------------------------------------------------------------

    def pipeline(self, objective: nn.Module) -> GuidedDiffusionPipeline:
        return GuidedDiffusionPipeline(
            objective.network, objective.scheduler, id2label=self.id2label, null_label=self.null_label, vae=self.vae
        )

    def example(self) -> str:
        if self.id2label is None:
            return "images = pipeline(batch_size=4).images"
        return f"images = pipeline(class_labels={list(self.id2label.values())[:4]}).images"

    def samples(self, objective: nn.Module, rows: int, columns: int, accelerator: Accelerator) -> torch.Tensor:
        """Samples, (rows * columns, C, H, W), with classes a row for each; each sample has a generator of its own."""
        mine = my_share(rows * columns, accelerator)
        pipeline = self.pipeline(accelerator.unwrap_model(objective))
        pipeline.set_progress_bar_config(disable=True)
        class_labels = None if self.id2label is None else [i // columns for i in mine]
        images = pipeline(
            batch_size=len(mine),
            class_labels=class_labels,
            guidance_scale=self.config.guidance_scale if self.id2label is not None else 1.0,
            num_inference_steps=self.config.num_inference_steps,
            generator=[torch.Generator().manual_seed(self.randomness.step_seed(i, 0)) for i in mine],
            output_type="latent",
        ).images
        if self.vae is not None:
            images = pipeline.decode_latents(images, class_labels)
        return gathered_images(images, rows * columns, accelerator)

    def picture(self, objective: nn.Module, accelerator: Accelerator) -> Image.Image:
        """A row of samples for each class, or a square without classes."""
        columns = self.config.sample_columns
        rows = columns if self.id2label is None else len(self.id2label)
        return sample_grid(self.samples(objective, rows, columns, accelerator), columns)
