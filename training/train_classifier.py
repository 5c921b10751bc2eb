"""Trains a classifier of noisy images, which guides a diffusion model to a class without retraining it.

    python training/train_ddpm.py && python training/train_classifier.py     # handwritten digits, on a CPU, in minutes
    accelerate launch training/train_classifier.py --pipeline FOLDER_OR_ID --dataset FOLDER_OR_NAME

The diffusion model, conditional or not, comes as a pipeline, from which the noise is taken: for an image x_0 of class
y, a timestep t drawn evenly and noise eps, the classifier sees x_t = alpha_t x_0 + sigma_t eps as the model would, and
learns

    L = -log p(y | x_t)         with label smoothing s, a share s of each label is spread evenly over all classes

What it then adds to the score of the model is grad_x log p(y | x_t); see `annealers.pipelines.classifier_guidance`.
What is saved is that pipeline with the classifier in it. Source: Dhariwal & Nichol 2021, "Diffusion Models Beat GANs
on Image Synthesis", arXiv:2105.05233, Sec. 4; label smoothing, Szegedy et al. 2016, arXiv:1512.00567, Sec. 7.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import SchedulerMixin
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from annealers import GuidedDiffusionPipeline, NoisyClassifierModel
from annealers.configuration import option, parse_config
from annealers.data import ImageData, validation_batches
from annealers.exact import path_point, prediction_type_of
from annealers.figures import sample_grid
from annealers.randomness import PositionalRandomness
from annealers.run import Batch, Run, Task, Terms, gathered_images, my_share
from annealers.training.image_task import NetworkConfig

STRATA = 8  # of the timesteps in validation; two to a quarter


@dataclass
class ClassifierConfig(NetworkConfig):
    """Options of a classifier of noisy images; the defaults train one of 8 x 8 digits on a CPU."""

    output_dir: str = option("runs/classifier", "Folder of the run: pipeline, samples, metrics, checkpoints.")
    pipeline: str = option("runs/ddpm/pipeline", "Folder or Hub id of the diffusion model that is to be guided.")
    max_steps: int = option(600, "Optimizer steps.")
    weight_decay: float = option(0.05, "AdamW's weight decay.")

    pooling: Literal["attention", "average"] = option("attention", "How the pixels become one vector.")
    label_smoothing: float = option(0.0, "Share of each label that is spread over all classes.")

    num_inference_steps: int = option(50, "Sampling steps of the pictures.")
    classifier_scale: float = option(2.0, "Guidance scale of the pictures; 0 ignores the classifier.")
    sample_columns: int = option(10, "Samples of each class in the pictures.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.sample_columns < 1:
            raise ValueError(f"sample_columns must be at least 1, got {self.sample_columns}")


class ClassifierObjective(nn.Module):
    """The cross-entropy of a classifier of noisy images, one number per image."""

    def __init__(self, network: NoisyClassifierModel, scheduler: SchedulerMixin, label_smoothing: float) -> None:
        super().__init__()
        self.network, self.scheduler, self.label_smoothing = network, scheduler, label_smoothing

    def forward(
        self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor
    ) -> Terms:
        """Classifies images in [-1, 1], (B, C, H, W), noised to timesteps (B,); returns terms of shape (B,)."""
        alpha, sigma = (c.to(images.dtype).view(-1, 1, 1, 1) for c in path_point(self.scheduler, timesteps))
        logits = self.network(alpha * images + sigma * noise, timesteps).logits.float()
        loss = cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == labels).float()}


class ClassifierTask(Task):
    """A classifier that becomes a component of the pipeline it guides."""

    config: ClassifierConfig
    tags = ("classifier-guidance",)

    def __init__(self, config: ClassifierConfig, data: ImageData, randomness: PositionalRandomness) -> None:
        super().__init__(config, data, randomness)
        if data.id2label is None:
            raise ValueError(f"a classifier needs labels, and {data.name} has none; see --label_column")
        self.id2label = data.id2label
        self.diffusion = GuidedDiffusionPipeline.from_pretrained(config.pipeline)
        check_match(data, self.diffusion)

    def build(self) -> ClassifierObjective:
        config, data = self.config, self.data
        network = NoisyClassifierModel(
            sample_size=data.resolution,
            in_channels=data.channels,
            num_classes=len(self.id2label),
            block_out_channels=tuple(config.block_out_channels),
            down_block_types=config.down_block_types,
            layers_per_block=config.layers_per_block,
            pooling=config.pooling,
            dropout=config.dropout,
            norm_num_groups=config.norm_groups,
            id2label=self.id2label,
        )
        return ClassifierObjective(network, self.diffusion.scheduler, config.label_smoothing)

    def draws(self, batch: Batch) -> dict[str, Any]:
        images, first, count = batch["images"], batch["first_position"], len(batch["images"])
        return {
            "images": images,
            "noise": self.randomness.normal("noise", first, count, images.shape[1:]),
            "timesteps": self.timesteps(self.randomness.uniform("timestep", first, count)),
            "labels": batch["labels"],
        }

    def timesteps(self, share: torch.Tensor) -> torch.Tensor:
        """The train timesteps at a share 0 <= u < 1 of the path, (B,): integers 0 .. T - 1, or of a flow 0 .. T."""
        scheduler = self.diffusion.scheduler
        timesteps = scheduler.config.num_train_timesteps * share
        return timesteps.float() if prediction_type_of(scheduler) == "flow_prediction" else timesteps.long()

    # ---- validation -------------------------------------------------------------------------------------------------

    def validate(self, objective: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Held-out accuracy and cross-entropy by quarter of the timesteps, from the least noise to the most.

        Each image is seen at one timestep in each of eight equal strata.
        """
        classifier, device = accelerator.unwrap_model(objective), accelerator.device
        sums = torch.zeros(4, 2, dtype=torch.float64)  # (quarter, [cross-entropy, accuracy])
        images = 0
        for batch in validation_batches(
            self.data,
            self.config.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            max_samples=self.config.validation_samples,
            num_workers=self.config.num_workers,
        ):
            first, count = batch["first_position"], len(batch["images"])
            images += count
            for stratum in range(STRATA):
                name = f"validation {stratum}"
                share = (stratum + self.randomness.uniform(name, first, count)) / STRATA
                noise = self.randomness.normal(name, first, count, batch["images"].shape[1:])
                seen = (batch["images"], noise, self.timesteps(share), batch["labels"])
                terms = classifier(*(tensor.to(device) for tensor in seen))
                values = torch.stack([terms["loss"].sum(), terms["accuracy"].sum()])
                sums[stratum * 4 // STRATA] += values.double().cpu()
        totals = torch.cat([sums.flatten(), torch.tensor([float(images)], dtype=torch.float64)])
        *totals, n = accelerator.reduce(totals.to(device), reduction="sum").tolist()
        means = torch.tensor(totals).reshape(4, 2) / (n * STRATA / 4)
        return {
            **{f"accuracy_quarter_{i + 1}": means[i, 1].item() for i in range(4)},
            **{f"cross_entropy_quarter_{i + 1}": means[i, 0].item() for i in range(4)},
            "accuracy": means[:, 1].mean().item(),
            "cross_entropy": means[:, 0].mean().item(),
            "images": n,
        }

    # ---- samples ----------------------------------------------------------------------------------------------------

    def pipeline(self, objective: ClassifierObjective) -> GuidedDiffusionPipeline:
        return GuidedDiffusionPipeline(
            self.diffusion.unet,
            self.diffusion.scheduler,
            id2label=self.id2label,
            null_label=self.diffusion.null_label,
            classifier=objective.network,
        )

    @property
    def guidance_scale(self) -> float:
        """The network is asked for all data, if it can be, so that the classifier alone makes the class."""
        needs_label = self.diffusion.unet.config.get("num_class_embeds") and self.diffusion.null_label is None
        return 1.0 if needs_label else 0.0

    @property
    def draws_classes(self) -> bool:
        """Whether the pictures have any, since a pipeline that could not heed them refuses labels."""
        return self.guidance_scale != 0 or self.config.classifier_scale != 0

    def example(self) -> str:
        if not self.draws_classes:
            return "images = pipeline(batch_size=4).images"
        scales = f"guidance_scale={self.guidance_scale}, classifier_scale={self.config.classifier_scale}"
        return f"images = pipeline(class_labels={list(self.id2label.values())[:4]}, {scales}).images"

    def picture(self, objective: nn.Module, accelerator: Accelerator) -> Image.Image:
        """A row of guided samples for each class; each image has a generator of its own."""
        columns = self.config.sample_columns
        count = len(self.id2label) * columns
        mine = my_share(count, accelerator)
        pipeline = self.pipeline(accelerator.unwrap_model(objective)).to(accelerator.device)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            batch_size=len(mine),
            class_labels=[i // columns for i in mine] if self.draws_classes else None,
            guidance_scale=self.guidance_scale,
            classifier_scale=self.config.classifier_scale,
            num_inference_steps=self.config.num_inference_steps,
            generator=[torch.Generator().manual_seed(self.randomness.step_seed(i, 0)) for i in mine],
            output_type="latent",
        ).images
        return sample_grid(gathered_images(images, count, accelerator), columns)


def check_match(data: ImageData, diffusion: GuidedDiffusionPipeline) -> None:
    """Raises ValueError unless the diffusion model is of such images, and of these classes if it knows any."""
    network, names = diffusion.unet.config, data.id2label or {}
    if diffusion.vae is not None:
        raise ValueError("the diffusion model draws latents, of which this script trains no classifier")
    for name, ours, theirs in (
        ("channels", data.channels, network.in_channels),
        ("resolution", data.resolution, network.sample_size),
    ):
        sides = theirs if isinstance(theirs, (list, tuple)) else [theirs]  # a side for each axis, or one for both
        if theirs is not None and any(side != ours for side in sides):
            raise ValueError(f"the images of {data.name} have {name} {ours}, those of the diffusion model {theirs}")
    num_embeds = network.get("num_class_embeds")
    if num_embeds is None:
        return
    classes = num_embeds - (diffusion.null_label is not None)
    if classes != len(names) or (diffusion.id2label is not None and diffusion.id2label != names):
        raise ValueError(
            f"the classes of {data.name}, {names}, are not the {classes} of the diffusion model, {diffusion.id2label}"
        )


def main(arguments: list[str] | None = None) -> None:
    Run(parse_config(ClassifierConfig, arguments, __doc__.splitlines()[0]), ClassifierTask).train()


if __name__ == "__main__":
    main()
