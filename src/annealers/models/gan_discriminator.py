r"""The discriminator of a generative adversarial network: a number for each image, or patch of it, high if it is real.

    patch    convolutions 4 x 4 that halve the image, each with normalisation (not the first) and leaky ReLU; then a
             convolution 3 x 3 to one logit for each pixel that is left

The logits are unbounded; no sigmoid follows. There is no batch normalisation, so what is said of an image does not
depend on the others. With `norm="spectral"` the weights are divided by their largest singular value, which a power
iteration in each forward pass in training mode follows: so their weights follow more closely in a training step of
several micro-batches, the one thing in which it differs from a step in one.

Sources: Isola, Zhu, Zhou & Efros 2017, "Image-to-Image Translation with Conditional Adversarial Networks",
arXiv:1611.07004, Sec. 3.2.2 and App. 6.1.2 (their last two convolutions are 4 x 4, which images of 8 x 8 are too small
for, and their normalisation is of the batch); Miyato et al. 2018, "Spectral Normalization for Generative Adversarial
Networks", arXiv:1802.05957.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

ARCHITECTURES = ("patch",)
NORMS = ("none", "group", "spectral")
SLOPE = 0.2  # of the leaky ReLU, Isola et al. 2017, App. 6.1
INITIAL_DEVIATION = 0.02  # of the weights, likewise, App. 6.2


@dataclass
class GANDiscriminatorOutput(BaseOutput):
    """What the discriminator returns.

    Args:
        logits: (B, 1, h, w), one for each patch.
        features: What they are made of, (B, last of block_out_channels, h, w).
    """

    logits: torch.Tensor
    features: torch.Tensor


class GANDiscriminator(ModelMixin, ConfigMixin):
    """Tells real images from generated ones.

    Args:
        in_channels: C.
        arch: "patch".
        block_out_channels: Channels of each level; each halves the image.
        norm: "none", "group" or "spectral".
        norm_num_groups: Groups of the group normalisation.

    Raises:
        ValueError: If an option is unknown, or the groups do not divide the channels.

    Example:
        >>> from annealers import GANDiscriminator
        >>> GANDiscriminator(in_channels=1, block_out_channels=(16, 32))(torch.randn(3, 1, 8, 8)).logits.shape
        torch.Size([3, 1, 2, 2])
    """

    __module__ = "annealers"  # its public name

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        arch: str = "patch",
        block_out_channels: tuple[int, ...] = (64, 128, 256),
        norm: str = "group",
        norm_num_groups: int = 8,
    ) -> None:
        super().__init__()
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch must be one of {ARCHITECTURES}, got {arch!r}")
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
        if not block_out_channels:
            raise ValueError("need at least one level in block_out_channels")
        if norm == "group" and any(channels % norm_num_groups != 0 for channels in block_out_channels[1:]):
            raise ValueError(
                f"norm_num_groups must divide block_out_channels, got {norm_num_groups} for {block_out_channels}"
            )
        layers: list[nn.Module] = []
        for level, channels in enumerate(block_out_channels):
            before = in_channels if level == 0 else block_out_channels[level - 1]
            convolution = nn.Conv2d(before, channels, kernel_size=4, stride=2, padding=1)
            layers.append(_initialized(convolution, norm))
            if norm == "group" and level > 0:
                layers.append(nn.GroupNorm(norm_num_groups, channels))
            layers.append(nn.LeakyReLU(SLOPE))
        self.trunk = nn.Sequential(*layers)
        self.head = _initialized(nn.Conv2d(block_out_channels[-1], 1, kernel_size=3, padding=1), norm)

    def forward(
        self, sample: torch.Tensor, return_dict: bool = True
    ) -> GANDiscriminatorOutput | tuple[torch.Tensor, torch.Tensor]:
        """Judges images in [-1, 1].

        Args:
            sample: (B, C, H, W), with sides of at least 2 to the number of levels.
            return_dict: Return a `GANDiscriminatorOutput` rather than a tuple.

        Raises:
            ValueError: If the shape does not fit.
        """
        smallest = 2 ** len(self.config.block_out_channels)
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels or min(sample.shape[2:]) < smallest:
            raise ValueError(
                f"sample must be (B, {self.config.in_channels}, H, W) with H and W >= {smallest}, got "
                f"{tuple(sample.shape)}"
            )
        features = self.trunk(sample)
        logits = self.head(features)
        return GANDiscriminatorOutput(logits, features) if return_dict else (logits, features)


def _initialized(convolution: nn.Conv2d, norm: str) -> nn.Module:
    nn.init.normal_(convolution.weight, std=INITIAL_DEVIATION)
    nn.init.zeros_(convolution.bias)
    return spectral_norm(convolution) if norm == "spectral" else convolution
