"""What an autoencoder that is trained with an adversary needs, VQ-VAE or CodeFormer: options, losses, its player.

The two players are two groups of parameters of one objective, and each loss reaches its own player alone; see
`annealers.adversarial`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn

from annealers import GANDiscriminator, NoisyClassifierModel
from annealers.adversarial import AdaptiveWeight, frozen
from annealers.checkpoint import whole_folder
from annealers.configuration import RunConfig, option
from annealers.feature_loss import FeatureLoss
from annealers.gan_losses import discriminator_loss, generator_loss
from annealers.run import Batch, Task, Terms


@dataclass
class AdversaryConfig(RunConfig):
    """Options of the losses that see an image as a whole: those of features and of an adversary."""

    feature_network: str | None = option(None, "Folder or Hub id of a pipeline of train_classifier.py.")
    feature_weight: float = option(1.0, "Weight of the distance of images in its features.", of="feature_network")

    adversarial_weight: float = option(0.0, "w, the weight of the adversary on top of the adaptive one; 0: none.")
    adversarial_start: int = option(0, "Optimizer step from which on there is an adversary.", of="adversarial_weight")
    discriminator_channels: list[int] = option(
        [32, 64], "Channels of its levels, each of which halves the image.", of="adversarial_weight"
    )
    discriminator_norm: Literal["none", "group", "spectral"] = option(
        "group", "Its normalisation.", of="adversarial_weight"
    )
    discriminator_learning_rate: float = option(2e-3, "Its peak learning rate.", of="adversarial_weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("feature_weight", "adversarial_weight", "adversarial_start"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.compile and self.adversarial_weight > 0:
            raise ValueError(
                "the adaptive weight needs several gradients of one graph: no --compile with an adversary"
            )


class AdversarialObjective(nn.Module):
    """An objective with features and an adversary, or without.

    Args:
        feature_loss: What compares features; None for nothing.
        feature_weight: Its weight.
        discriminator: The adversary; None for none.
    """

    def __init__(
        self,
        feature_loss: FeatureLoss | None = None,
        feature_weight: float = 1.0,
        discriminator: GANDiscriminator | None = None,
    ) -> None:
        super().__init__()
        self.feature_loss, self.feature_weight = feature_loss, feature_weight
        self.discriminator = discriminator
        self.adaptive_weight = None if discriminator is None else AdaptiveWeight()

    def with_features(
        self, loss: torch.Tensor, images: torch.Tensor, reconstructed: torch.Tensor, terms: Terms
    ) -> torch.Tensor:
        """A loss (B,) and the distance in features, which is noted among the terms."""
        if self.feature_loss is None:
            return loss
        terms["features"] = self.feature_loss(reconstructed, images)
        return loss + self.feature_weight * terms["features"]

    def game(
        self,
        images: torch.Tensor,
        reconstructed: torch.Tensor,
        reconstruction: torch.Tensor,
        last_layer: torch.Tensor,
        adversarial_weight: float,
        terms: Terms,
    ) -> torch.Tensor | float:
        """What the adversary adds to the loss, (B,), 0 without one; its parts are noted among the terms.

        Args:
            images, reconstructed: (B, C, H, W).
            reconstruction: L_rec, (B,).
            last_layer: The weight at which the adaptive weight compares the gradients of both losses.
            adversarial_weight: w in this step; 0 before the adversary's first.
            terms: To note in.
        """
        if self.discriminator is None:
            return 0.0
        generator = generator_loss("hinge", frozen(self.discriminator, reconstructed).logits)
        real, fake = (self.discriminator(x).logits for x in (images, reconstructed.detach()))
        discriminator = discriminator_loss("hinge", real, fake)
        self.adaptive_weight.observe(reconstruction.mean(), generator.mean(), last_layer)
        balance = self.adaptive_weight.value.clone()  # it is written to before the next step, maybe before backward
        terms |= {"generator": generator, "discriminator": discriminator, "adaptive_weight": balance.expand(len(real))}
        return adversarial_weight * balance * generator + (adversarial_weight > 0) * discriminator


class AdversarialTask(Task):
    """A task whose first objective is that which is trained: what is averaged over steps is in it."""

    config: AdversaryConfig
    trained: AdversarialObjective | None = None

    def make_feature_loss(self) -> FeatureLoss | None:
        name = self.config.feature_network
        return None if name is None else FeatureLoss(feature_network(name, self.data.channels))

    def make_discriminator(self, **architecture: Any) -> GANDiscriminator | None:
        """The adversary as the options describe it, if there is one; `architecture` is passed on to it."""
        config = self.config
        if config.adversarial_weight == 0:
            return None
        return GANDiscriminator(
            in_channels=self.data.channels,
            block_out_channels=tuple(config.discriminator_channels),
            norm=config.discriminator_norm,
            **architecture,
        )

    def discriminator_group(self, objective: AdversarialObjective) -> list[dict[str, Any]]:
        """The group of parameters of the adversary, or none."""
        if objective.discriminator is None:
            return []
        parameters = list(objective.discriminator.parameters())
        return [{"name": "discriminator", "params": parameters, "lr": self.config.discriminator_learning_rate}]

    def adversarial_draws(self, batch: Batch) -> dict[str, float]:
        """w in the step of a batch, if there is an adversary."""
        config = self.config
        if config.adversarial_weight == 0:
            return {}
        begun = batch["first_position"] // config.batch_size >= config.adversarial_start
        return {"adversarial_weight": config.adversarial_weight if begun else 0.0}

    def after_step(self, step: int, terms: list[Terms], accelerator: Accelerator) -> None:
        if self.trained.adaptive_weight is not None:
            self.trained.adaptive_weight.update(len(terms) * accelerator.num_processes)

    def before_saving(self, objective: nn.Module, accelerator: Accelerator) -> None:
        """The discriminator is kept beside the pipeline, which has no use for it."""
        discriminator = accelerator.unwrap_model(objective).discriminator
        if discriminator is not None and accelerator.is_main_process:
            with whole_folder(Path(self.config.output_dir) / "discriminator") as unfinished:
                discriminator.save_pretrained(unfinished)


def feature_network(name: str, channels: int) -> NoisyClassifierModel:
    """The classifier in a pipeline.

    Raises:
        OSError: If there is none.
        ValueError: If it is of images with another number of channels.
    """
    try:
        classifier = NoisyClassifierModel.from_pretrained(name, subfolder="classifier")
    except OSError as error:
        raise OSError(f"found no classifier in {name!r}: name the pipeline of a run of train_classifier.py") from error
    if classifier.config.in_channels != channels:
        raise ValueError(
            f"the images have {channels} channels, those of the classifier in {name!r} {classifier.config.in_channels}"
        )
    return classifier
