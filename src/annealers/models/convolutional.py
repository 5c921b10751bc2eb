"""The encoder and decoder that the autoencoders share: Diffusers' own, with an optional flat latent, and their inputs.

A spatial latent has the size (C_z, H / f, W / f), f = 2^(levels - 1). A flat one is a vector, kept as (C_z, 1, 1);
so distributions, schedulers and pipelines treat both alike. A linear layer leads from the last feature map to it, and
another one back.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import nn

from annealers.models.autoregressive import check_class_labels

Size = int | tuple[int, int]


def reduction_factor(block_out_channels: tuple[int, ...]) -> int:
    """f: how many pixels of the image there are to one of the feature map, along each side."""
    return 2 ** (len(block_out_channels) - 1)


def feature_size(sample_size: Size, block_out_channels: tuple[int, ...]) -> tuple[int, int]:
    """(H / f, W / f).

    Raises:
        ValueError: If f does not divide the sides: the decoder would return another size.
    """
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    factor = reduction_factor(block_out_channels)
    if height % factor != 0 or width % factor != 0:
        raise ValueError(
            f"{len(block_out_channels)} levels halve the image {len(block_out_channels) - 1} times, which "
            f"{height} x {width} pixels do not allow: need sides that are multiples of {factor}, or fewer "
            "block_out_channels"
        )
    return height // factor, width // factor


def check_images(
    x: torch.Tensor,
    channels: int,
    sample_size: Size,
    block_out_channels: tuple[int, ...],
    only_this_size: bool,
) -> None:
    """Raises ValueError unless x are images (B, C, H, W) of real numbers, of a size that the model takes.

    Args:
        x: Images in [-1, 1].
        channels: C.
        sample_size: Size of the training images.
        block_out_channels: Of the levels, which have to divide any other size.
        only_this_size: Whether there may be no other.
    """
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
    sides = (height, width) if only_this_size else ("H", "W")
    if x.ndim != 4 or x.shape[1] != channels or (only_this_size and tuple(x.shape[2:]) != sides):
        raise ValueError(f"images must be (B, {channels}, {sides[0]}, {sides[1]}), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"images must be of real numbers in [-1, 1], got {x.dtype}")
    feature_size(tuple(x.shape[2:]), block_out_channels)  # raises


def with_class_planes(
    x: torch.Tensor, class_labels: torch.Tensor | None, class_embedding: nn.Embedding | None
) -> torch.Tensor:
    """An image or a latent (B, C, H, W), and beside it constant planes of its class if the model has classes.

    Raises:
        ValueError: Unless there is a label for each image exactly if the model has classes.
    """
    check_class_labels(class_labels, None if class_embedding is None else class_embedding.num_embeddings, len(x))
    if class_embedding is None:
        return x
    planes = class_embedding(class_labels).to(x.dtype)[:, :, None, None]
    return torch.cat([x, planes.expand(-1, -1, *x.shape[2:])], dim=1)


class ConvolutionalEncoder(nn.Module):
    """Images (B, C, H, W) to (B, out_channels, h, w), or (B, out_channels, 1, 1) if flat.

    Args:
        in_channels: C.
        out_channels: Channels of what is returned, both halves of it if it is a mean and a log-variance.
        sample_size: Of the images; only a flat latent needs to know.
        block_out_channels: Channels of each resolution level; each level but the last ends by halving the image.
        layers_per_block: Residual blocks per level.
        norm_num_groups: Groups of the normalisation.
        mid_block_add_attention: Self-attention at the lowest resolution.
        flat: Whether the latent is a vector.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        sample_size: Size,
        block_out_channels: tuple[int, ...],
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        mid_block_add_attention: bool = True,
        flat: bool = False,
    ) -> None:
        super().__init__()
        height, width = feature_size(sample_size, block_out_channels)
        last = block_out_channels[-1]
        self.trunk = Encoder(
            in_channels,
            last if flat else out_channels,
            down_block_types=("DownEncoderBlock2D",) * len(block_out_channels),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            double_z=False,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.to_flat = nn.Linear(last * height * width, out_channels) if flat else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trunk(x)
        return x if self.to_flat is None else self.to_flat(x.flatten(1))[:, :, None, None]


class ConvolutionalDecoder(nn.Module):
    """Latents (B, in_channels, h, w), or (B, in_channels, 1, 1) if flat, to (B, out_channels, H, W).

    Args:
        in_channels: Channels of the latent.
        out_channels: Channels of what is returned.
        sample_size, block_out_channels, layers_per_block, norm_num_groups, mid_block_add_attention, flat: As of the
            encoder; a level of the decoder has one residual block more.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        sample_size: Size,
        block_out_channels: tuple[int, ...],
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        mid_block_add_attention: bool = True,
        flat: bool = False,
    ) -> None:
        super().__init__()
        self.feature_shape = (block_out_channels[-1], *feature_size(sample_size, block_out_channels))
        features, height, width = self.feature_shape
        self.from_flat = nn.Linear(in_channels, features * height * width) if flat else None
        self.trunk = Decoder(
            features if flat else in_channels,
            out_channels,
            up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=mid_block_add_attention,
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if self.from_flat is not None:
            z = self.from_flat(z.flatten(1)).unflatten(1, self.feature_shape)
        return self.trunk(z)
