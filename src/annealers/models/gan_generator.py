r"""The generator of a generative adversarial network: noise to images, x = G(z), z ~ N(0, I), given a class or a text.

    dcgan     z to channels of a small map, then transposed convolutions 4 x 4 that double it, each but the last with a
              norm and ReLU; no pooling, no layer between that sees the whole map
    resnet    z to channels of a small map, then residual blocks that double it, and a norm, ReLU and convolution

and tanh. Classes and texts scale and shift what is normalised; see `annealers.models.gan_blocks`.

With `norm="batch"`, as the papers have it, a picture depends in training on those that are made beside it; afterwards
it does not. With "group" or "none" it never does.

Sources: Radford, Metz & Chintala 2016, "Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks", arXiv:1511.06434, Sec. 3 and Fig. 1; Miyato et al. 2018, "Spectral Normalization for Generative
Adversarial Networks", arXiv:1802.05957, App. B.4; Miyato & Koyama 2018, "cGANs with Projection Discriminator",
arXiv:1802.05637, Fig. 14 (128 x 128: `block_out_channels=(64, 128, 256, 512, 1024, 1024)`).

    symbol    code                     shape           meaning
    z         latents                  (B, Z)          noise
    y         class_labels             (B,)            class ids
    t         encoder_hidden_states    (B, D)          embedding of a text; of (B, L, D) the mean over the tokens
    x         sample                   (B, C, H, W)    images in [-1, 1]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn.functional import relu

from annealers.models.gan_blocks import (
    ConditionalNorm,
    UpResidualBlock,
    check_choice,
    check_condition_sizes,
    check_conditions,
    check_groups,
    normally_initialized,
    smallest_side,
    uniformly_initialized,
)

GENERATOR_ARCHITECTURES = ("dcgan", "resnet")
GENERATOR_NORMS = ("batch", "group", "none")


@dataclass
class GANGeneratorOutput(BaseOutput):
    """What the generator returns.

    Args:
        sample: Images in [-1, 1], (B, C, H, W).
    """

    sample: torch.Tensor


class GANGenerator(ModelMixin, ConfigMixin):
    """Makes images of noise.

    Args:
        sample_size: Side of the images, H = W; a multiple, two or more, of 2 to the number of times that it is
            doubled: once for each of `block_out_channels` of a "dcgan", once less for a "resnet". With the three by
            default that is 16, 24, 32 .. and 8, 12, 16 .. .
        out_channels: C.
        latent_dim: Z.
        arch: "dcgan" or "resnet".
        block_out_channels: Channels from the large maps to the small, as those of Diffusers' decoders: the last is of
            the map that the noise becomes. The first of a "resnet" is of maps as large as the image, of a "dcgan" half
            as large. A discriminator of the same architecture takes the same.
        norm: "batch", "group" or "none".
        norm_num_groups: Groups of the group normalisation.
        num_class_embeds: Number of classes, or None for a generator without.
        text_embed_dim: D, or None for a generator without texts.

    Raises:
        ValueError: If an option is unknown, the groups do not divide the channels, or the levels not the image.

    Example:
        >>> from annealers import GANGenerator
        >>> generator = GANGenerator(sample_size=28, out_channels=1, block_out_channels=(32, 64), num_class_embeds=10)
        >>> generator(torch.randn(3, 128), class_labels=torch.tensor([0, 4, 9])).sample.shape
        torch.Size([3, 1, 28, 28])
    """

    __module__ = "annealers"  # its public name

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        out_channels: int = 3,
        latent_dim: int = 128,
        arch: str = "dcgan",
        block_out_channels: tuple[int, ...] = (64, 128, 256),
        norm: str = "batch",
        norm_num_groups: int = 8,
        num_class_embeds: int | None = None,
        text_embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("arch", arch, GENERATOR_ARCHITECTURES)
        check_choice("norm", norm, GENERATOR_NORMS)
        check_condition_sizes(num_class_embeds, text_embed_dim)
        check_groups(norm, norm_num_groups, block_out_channels, block_out_channels)
        conditional_norm = partial(
            ConditionalNorm,
            norm,
            norm_num_groups=norm_num_groups,
            num_class_embeds=num_class_embeds,
            text_embed_dim=text_embed_dim,
        )
        block_out_channels = tuple(block_out_channels)  # a saved config has a list
        self.trunk = (UpConvolutions if arch == "dcgan" else UpResidualBlocks)(
            latent_dim, out_channels, sample_size, block_out_channels, conditional_norm, bias=norm != "batch"
        )

    def forward(
        self,
        latents: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> GANGeneratorOutput | tuple[torch.Tensor]:
        """Makes images.

        Args:
            latents: z, (B, Z).
            class_labels: y, (B,), exactly if the generator has classes.
            encoder_hidden_states: t, (B, D), or (B, L, D) of which the mean is taken, exactly if it has texts.
            return_dict: Return a `GANGeneratorOutput` rather than a tuple.

        Raises:
            ValueError: If a shape does not fit, a condition is missing, or the generator has no such condition.
        """
        config = self.config
        if latents.ndim != 2 or latents.shape[1] != config.latent_dim:
            raise ValueError(f"latents must be (B, {config.latent_dim}), got {tuple(latents.shape)}")
        text_embeds = encoder_hidden_states
        if text_embeds is not None and text_embeds.ndim == 3:
            text_embeds = text_embeds.mean(dim=1)  # (B, D)
        check_conditions(
            class_labels,
            config.num_class_embeds,
            text_embeds,
            config.text_embed_dim,
            len(latents),
            text_name="encoder_hidden_states",
        )
        sample = torch.tanh(self.trunk(latents, class_labels, text_embeds))
        return GANGeneratorOutput(sample) if return_dict else (sample,)


class UpConvolutions(nn.Module):
    """The generator of DCGAN without its tanh.

    A bias in front of a norm of the batch would be taken out again, so there is none.
    """

    def __init__(
        self,
        latent_dim: int,
        out_channels: int,
        sample_size: int,
        block_out_channels: tuple[int, ...],
        conditional_norm: Callable[[int], ConditionalNorm],
        bias: bool,
    ) -> None:
        super().__init__()
        if not block_out_channels:
            raise ValueError(f"a dcgan needs at least 1 of block_out_channels, got {block_out_channels}")
        side = smallest_side(sample_size, len(block_out_channels))
        first, *others = reversed(block_out_channels)
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent_dim, first, kernel_size=side, bias=bias)]
        for before, channels in pairwise((first, *others)):
            layers.append(nn.ConvTranspose2d(before, channels, kernel_size=4, stride=2, padding=1, bias=bias))
        self.convolutions = nn.ModuleList(normally_initialized(layer) for layer in layers)
        self.norms = nn.ModuleList(conditional_norm(channels) for channels in (first, *others))
        last = nn.ConvTranspose2d(block_out_channels[0], out_channels, kernel_size=4, stride=2, padding=1)
        self.conv_out = normally_initialized(last)

    def forward(
        self, latents: torch.Tensor, class_labels: torch.Tensor | None, text_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        x = latents[:, :, None, None]  # (B, Z, 1, 1)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = relu(norm(convolution(x), class_labels, text_embeds))
        return self.conv_out(x)


class UpResidualBlocks(nn.Module):
    """The generator of Miyato et al. without its tanh."""

    def __init__(
        self,
        latent_dim: int,
        out_channels: int,
        sample_size: int,
        block_out_channels: tuple[int, ...],
        conditional_norm: Callable[[int], ConditionalNorm],
        bias: bool,
    ) -> None:
        super().__init__()
        if len(block_out_channels) < 2:
            raise ValueError(f"a resnet needs at least 2 of block_out_channels, got {block_out_channels}")
        side = smallest_side(sample_size, len(block_out_channels) - 1)
        self.map_shape = (block_out_channels[-1], side, side)
        self.linear_in = uniformly_initialized(nn.Linear(latent_dim, math.prod(self.map_shape)))
        self.blocks = nn.ModuleList(
            UpResidualBlock(before, channels, conditional_norm, bias)
            for before, channels in pairwise(reversed(block_out_channels))
        )
        self.norm_out = conditional_norm(block_out_channels[0])
        self.conv_out = uniformly_initialized(nn.Conv2d(block_out_channels[0], out_channels, kernel_size=3, padding=1))

    def forward(
        self, latents: torch.Tensor, class_labels: torch.Tensor | None, text_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        x = self.linear_in(latents).unflatten(1, self.map_shape)  # (B, C, side, side)
        for block in self.blocks:
            x = block(x, class_labels, text_embeds)
        return self.conv_out(relu(self.norm_out(x, class_labels, text_embeds)))
