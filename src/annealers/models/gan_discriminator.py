r"""The discriminator of a generative adversarial network: a number for each image, or patch of it, high if it is real.

    patch     convolutions 4 x 4 that halve the image, each with a norm (not the first) and leaky ReLU; then a
              convolution 3 x 3 to one logit for each pixel that is left
    dcgan     the same, and then a convolution as large as what is left, to one logit
    resnet    residual blocks, each of which but the last halves the image, and ReLU; the sum over the pixels that are
              left; a linear layer to one logit

Given a class y or the embedding t of a text, what is seen is projected on what was said of it,

    D(x, c) = psi(x) + <v_c, h(x)>,     v_c = V[y] + U t,

h being the features, summed over the pixels (each by itself in a patch discriminator), and psi the logit above.

The logits are unbounded; no sigmoid follows. With a norm of the batch what is said of an image depends on the others,
so that a penalty on the gradient of each image's own logit is of no use; otherwise it does not.
With `norm="spectral"` the weights, V and U too, are divided by their largest singular value, which a power iteration
in each forward pass in training mode follows: so their weights follow more closely in a training step of several
micro-batches, the one thing in which it differs from a step in one. (`annealers.game` has it iterate once a step.)

Sources: Isola, Zhu, Zhou & Efros 2017, "Image-to-Image Translation with Conditional Adversarial Networks",
arXiv:1611.07004, Sec. 3.2.2 and App. 6.1.2 (patch; their last two convolutions are 4 x 4, which images of 8 x 8 are
too small for); Radford, Metz & Chintala 2016, "Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks", arXiv:1511.06434, Sec. 3; Miyato et al. 2018, "Spectral Normalization for Generative Adversarial
Networks", arXiv:1802.05957, App. B.4; Miyato & Koyama 2018, "cGANs with Projection Discriminator", arXiv:1802.05637,
Eq. 9 and Fig. 14 (128 x 128: `block_out_channels=(64, 128, 256, 512, 1024, 1024)`).

    symbol    code            shape             meaning
    x         sample          (B, C, H, W)      images in [-1, 1]
    y         class_labels    (B,)              class ids
    t         text_embeds     (B, D)            embeddings of texts
    h         features        (B, N, h, w)      N being the last of block_out_channels; before they are summed
    D         logits          (B, 1)            high for real; (B, 1, h, w) of patches
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn

from annealers.models.gan_blocks import (
    DownResidualBlock,
    check_choice,
    check_condition_sizes,
    check_conditions,
    check_groups,
    condition_sum,
    feature_norm,
    normally_initialized,
    smallest_side,
    weights_normalized,
)

ARCHITECTURES = ("patch", "dcgan", "resnet")
NORMS = ("none", "batch", "group", "spectral")
SLOPE = 0.2  # of the leaky ReLU, Radford et al. 2016, Sec. 4, and Isola et al. 2017, App. 6.1


@dataclass
class GANDiscriminatorOutput(BaseOutput):
    """What the discriminator returns.

    Args:
        logits: (B, 1), or (B, 1, h, w), one for each patch.
        features: What they are made of, (B, last of block_out_channels, h, w).
    """

    logits: torch.Tensor
    features: torch.Tensor


class GANDiscriminator(ModelMixin, ConfigMixin):
    """Tells real images from generated ones.

    Args:
        in_channels: C.
        arch: "patch", "dcgan" or "resnet".
        block_out_channels: Channels of each level, from the image on; each halves it, the last of a "resnet" does not.
        norm: "none", "batch", "group" or "spectral".
        norm_num_groups: Groups of the group normalisation.
        sample_size: Side of the images, H = W, which has to be told but to a "patch", that takes any: a multiple, two
            or more, of 2 to the number of times that it is halved.
        num_class_embeds: Number of classes, or None for a discriminator without.
        text_embed_dim: D, or None for a discriminator without texts.

    Raises:
        ValueError: If an option is unknown, the groups do not divide the channels, or the levels not the image.

    Example:
        >>> from annealers import GANDiscriminator
        >>> GANDiscriminator(in_channels=1, block_out_channels=(16, 32))(torch.randn(3, 1, 8, 8)).logits.shape
        torch.Size([3, 1, 2, 2])
        >>> discriminator = GANDiscriminator(1, "resnet", (16, 32), "spectral", sample_size=28, num_class_embeds=10)
        >>> discriminator(torch.randn(3, 1, 28, 28), class_labels=torch.tensor([0, 4, 9])).logits.shape
        torch.Size([3, 1])
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
        sample_size: int | None = None,
        num_class_embeds: int | None = None,
        text_embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("arch", arch, ARCHITECTURES)
        check_choice("norm", norm, NORMS)
        check_condition_sizes(num_class_embeds, text_embed_dim)
        block_out_channels = tuple(block_out_channels)  # a saved config has a list
        normalized = block_out_channels if arch == "resnet" else block_out_channels[1:]
        check_groups(norm, norm_num_groups, normalized, block_out_channels)
        side = _side_of_features(arch, block_out_channels, sample_size)
        last = block_out_channels[-1]
        head: nn.Linear | nn.Conv2d
        if arch == "resnet":
            self.trunk = _residual_blocks(in_channels, block_out_channels, norm, norm_num_groups)
            head = nn.Linear(last, 1)
        else:
            self.trunk = _strided_convolutions(in_channels, block_out_channels, norm, norm_num_groups)
            head = nn.Conv2d(last, 1, kernel_size=3, padding=1) if side is None else nn.Conv2d(last, 1, side)
        self.head = weights_normalized(normally_initialized(head), norm)
        self.of_class = self.of_text = None
        if num_class_embeds is not None:
            self.of_class = weights_normalized(normally_initialized(nn.Embedding(num_class_embeds, last)), norm)
        if text_embed_dim is not None:
            text_projection = nn.Linear(text_embed_dim, last, bias=False)
            self.of_text = weights_normalized(normally_initialized(text_projection), norm)

    def forward(
        self,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> GANDiscriminatorOutput | tuple[torch.Tensor, torch.Tensor]:
        """Judges images in [-1, 1].

        Args:
            sample: x, (B, C, H, W), as large as `sample_size`; for a "patch" with sides of at least 2 to the number of
                levels.
            class_labels: y, (B,), exactly if the discriminator has classes.
            text_embeds: t, (B, D), exactly if it has texts.
            return_dict: Return a `GANDiscriminatorOutput` rather than a tuple.

        Raises:
            ValueError: If a shape does not fit, a condition is missing, or the discriminator has no such condition.
        """
        config = self.config
        self._check_images(sample)
        check_conditions(
            class_labels,
            config.num_class_embeds,
            text_embeds,
            config.text_embed_dim,
            len(sample),
            text_name="text_embeds",
        )
        features = self.trunk(sample)  # (B, N, h, w)
        seen = features if config.arch == "patch" else features.sum(dim=(2, 3), keepdim=True)  # h(x)
        logits = self.head(seen.flatten(1) if config.arch == "resnet" else features)  # psi(x)
        said = condition_sum(self.of_class, class_labels, self.of_text, text_embeds)  # v_c, (B, N)
        if config.arch != "patch":
            logits = logits.flatten(1)  # (B, 1)
        if said is not None:
            logits = logits + (seen * said[:, :, None, None]).sum(dim=1, keepdim=True).view_as(logits)
        return GANDiscriminatorOutput(logits, features) if return_dict else (logits, features)

    def _check_images(self, sample: torch.Tensor) -> None:
        config = self.config
        if config.arch == "patch":
            smallest = 2 ** len(config.block_out_channels)
            sides, fits = f"H, W) with H and W >= {smallest}", min(sample.shape[2:], default=0) >= smallest
        else:
            sides = f"{config.sample_size}, {config.sample_size})"
            fits = tuple(sample.shape[2:]) == (config.sample_size, config.sample_size)
        if sample.ndim != 4 or sample.shape[1] != config.in_channels or not fits:
            raise ValueError(f"sample must be (B, {config.in_channels}, {sides}, got {tuple(sample.shape)}")


def _side_of_features(arch: str, block_out_channels: tuple[int, ...], sample_size: int | None) -> int | None:
    """Side of the map that the logit is made of; None for patches, of which there may be any number."""
    levels, fewest = len(block_out_channels), 2 if arch == "resnet" else 1
    if levels < fewest:
        raise ValueError(f"a {arch} needs at least {fewest} of block_out_channels, got {block_out_channels}")
    if arch == "patch":
        return None
    if sample_size is None:
        raise ValueError(f"a {arch} needs sample_size, the side of its images, got None")
    return smallest_side(sample_size, levels - 1 if arch == "resnet" else levels)


def _strided_convolutions(
    in_channels: int, block_out_channels: tuple[int, ...], norm: str, norm_num_groups: int
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for level, (before, channels) in enumerate(pairwise((in_channels, *block_out_channels))):
        normalized = norm in ("batch", "group") and level > 0
        # a norm of the batch takes a bias out again
        convolution = nn.Conv2d(
            before, channels, kernel_size=4, stride=2, padding=1, bias=not (normalized and norm == "batch")
        )
        layers.append(weights_normalized(normally_initialized(convolution), norm))
        if normalized:
            layers.append(feature_norm(norm, channels, norm_num_groups))
        layers.append(nn.LeakyReLU(SLOPE))
    return nn.Sequential(*layers)


def _residual_blocks(
    in_channels: int, block_out_channels: tuple[int, ...], norm: str, norm_num_groups: int
) -> nn.Sequential:
    last = len(block_out_channels) - 1
    blocks = [
        DownResidualBlock(before, channels, norm, norm_num_groups, down=level < last, of_pixels=level == 0)
        for level, (before, channels) in enumerate(pairwise((in_channels, *block_out_channels)))
    ]
    return nn.Sequential(*blocks, nn.ReLU())
