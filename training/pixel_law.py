"""What the scripts that learn a law of images share: which law, and what images it is of.

A Bernoulli law is of binarised images. A Gaussian one is a density, and the images have n levels: they are spread out,
x + (u - 1/2) 2 / (n - 1) with u uniform on [0, 1), so that its bound becomes one of -log P(x).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from annealers.configuration import RunConfig, option
from annealers.data import Binarization, binarized_batch
from annealers.models.pixel_likelihood import check_binary, levels_to_values, values_to_levels
from annealers.randomness import PositionalRandomness
from annealers.run import Batch


@dataclass
class PixelLawConfig(RunConfig):
    """Options of the law of the pixels."""

    likelihood: Literal["bernoulli", "gaussian", "discretized_logistic", "discretized_mix_logistic"] = option(
        "gaussian", "Law of the pixels."
    )
    binarize: Binarization = option("none", "Black or white pixels, drawn once or anew each time, for 'bernoulli'.")
    num_levels: int | None = option(None, "Values of a grey pixel; unset: 17 of the digits, else 256.")
    sigma: float = option(
        0.5,
        "Standard deviation of 'gaussian', of images in [-1, 1]; that at first if it is learnt.",
        of=("likelihood", "gaussian"),
    )
    learn_sigma: bool = option(True, "Learn it.", of=("likelihood", "gaussian"))
    num_mixtures: int = option(
        10, "Components of 'discretized_mix_logistic'.", of=("likelihood", "discretized_mix_logistic")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.binarize != "none" and self.likelihood != "bernoulli":
            raise ValueError(f"binarised images have the likelihood 'bernoulli', got {self.likelihood!r}")
        if self.num_levels is not None and self.num_levels < 2:
            raise ValueError(f"num_levels must be at least 2, got {self.num_levels}")

    @property
    def levels(self) -> int:
        """Values of a pixel. The digits are stored as bytes, but have 17 of them."""
        if self.num_levels is not None:
            return self.num_levels
        return 17 if self.dataset == "digits" else 256

    @property
    def law(self) -> dict[str, Any]:
        """The options as the models take them."""
        return {
            "likelihood": self.likelihood,
            "num_levels": self.levels,
            "sigma": self.sigma,
            "learn_sigma": self.learn_sigma,
            "num_mixtures": self.num_mixtures,
        }


def levelled_images(
    batch: Batch, config: PixelLawConfig, randomness: PositionalRandomness, split: str
) -> torch.Tensor:
    """The images of a batch, binarised, or with their values on the grid of levels; (B, C, H, W)."""
    images = binarized_batch(batch, config.binarize, randomness, split)
    if config.likelihood == "bernoulli":
        check_binary(images)  # a compiled network does not
        return images
    return levels_to_values(values_to_levels(images, config.levels), config.levels)


def spread_images(
    images: torch.Tensor, first_position: int, config: PixelLawConfig, randomness: PositionalRandomness, split: str
) -> torch.Tensor:
    """Images with levels as the law wants them: for a density each value is moved within its interval."""
    if config.likelihood != "gaussian":
        return images
    uniform = randomness.uniform(f"dequantisation of {split}", first_position, len(images), tuple(images.shape[1:]))
    return images + (uniform.to(images) - 0.5) * 2 / (config.levels - 1)
