r"""A classifier of noisy images: log p(y | x_t), the class of the data point that was noised to x_t.

It is the half of a UNet that goes down, told the timestep, with a head in the place of the half that goes up. Its
gradient with respect to x_t leads a diffusion model to a class; see `annealers.pipelines.classifier_guidance`.

Source: Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", arXiv:2105.05233, Sec. 4.3: their
classifier is the downsampling trunk of the UNet with an attention pool at the last level, where the mean of the pixels
asks the pixels and itself. Theirs has a learnt position for each pixel besides; without, images may have any size.

    symbol    code        shape           meaning
    x_t       sample      (B, C, H, W)    alpha_t x_0 + sigma_t eps
    t         timestep    () or (B,)      train timestep
    y         logits      (B, K)          log p(y | x_t) up to a constant of each row
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from diffusers.utils import BaseOutput
from torch import nn

POOLINGS = ("attention", "average")


@dataclass
class NoisyClassifierOutput(BaseOutput):
    """What the classifier returns.

    Args:
        logits: (B, K), in the dtype of the weights.
    """

    logits: torch.Tensor


class NoisyClassifierModel(ModelMixin, ConfigMixin):
    """A convolutional classifier that is told how noisy its input is.

    Args:
        sample_size: Side of the images it is trained on, H = W; a record, since it takes images of any size.
        in_channels: C.
        num_classes: K.
        block_out_channels: Channels of each resolution level; each level but the last ends by halving the image.
        down_block_types: "DownBlock2D" or, with self-attention, "AttnDownBlock2D", for each level.
        layers_per_block: Residual blocks per level.
        attention_head_dim: Channels of each attention head, which divide those of every level with attention and of
            the last level.
        pooling: How pixels become one vector: "attention" or "average".
        norm_num_groups: Groups of the group normalisation; in a group of one channel it removes what the timestep puts
            in.
        dropout: Dropout of the residual blocks.
        id2label: Name of each class id, for people; None if the classes have none.

    Raises:
        ValueError: If the levels do not fit each other, there are fewer than two classes, a name is of no class, or a
            pooling is unknown.

    Example:
        >>> from annealers import NoisyClassifierModel
        >>> model = NoisyClassifierModel(sample_size=8, in_channels=1, num_classes=10, block_out_channels=(32, 64))
        >>> model(torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999])).logits.shape
        torch.Size([3, 10])
    """

    __module__ = "annealers"  # its public name

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        num_classes: int = 2,
        block_out_channels: tuple[int, ...] = (32, 64),
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D"),
        layers_per_block: int = 1,
        attention_head_dim: int = 8,
        pooling: str = "attention",
        norm_num_groups: int = 8,
        dropout: float = 0.0,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        if layers_per_block < 1 or attention_head_dim < 1:
            raise ValueError(
                f"need layers_per_block and attention_head_dim >= 1, got {layers_per_block} and {attention_head_dim}"
            )
        _check_architecture(num_classes, block_out_channels, down_block_types, attention_head_dim, pooling, id2label)
        first, last = block_out_channels[0], block_out_channels[-1]
        shared = {
            "temb_channels": 4 * first,
            "resnet_eps": 1e-5,
            "resnet_act_fn": "silu",
            "resnet_groups": norm_num_groups,
            "attention_head_dim": attention_head_dim,
            "dropout": dropout,
        }
        self.time_projection = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, 4 * first)
        self.conv_in = nn.Conv2d(in_channels, first, kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList(
            get_down_block(
                kind,
                num_layers=layers_per_block,
                in_channels=before,
                out_channels=channels,
                add_downsample=level < len(block_out_channels) - 1,
                downsample_padding=1,
                **shared,
            )
            for level, (kind, before, channels) in enumerate(
                zip(down_block_types, (first, *block_out_channels[:-1]), block_out_channels, strict=True)
            )
        )
        self.mid_block = UNetMidBlock2D(in_channels=last, **shared)
        self.norm_out = nn.GroupNorm(norm_num_groups, last)
        self.activation = nn.SiLU()
        self.pool = None
        if pooling == "attention":
            self.pool = Attention(last, heads=last // attention_head_dim, dim_head=attention_head_dim, bias=True)
        self.head = nn.Linear(last, num_classes)

    @property
    def id2label(self) -> dict[int, str] | None:
        """Name of each class id; a saved config keeps the ids as strings."""
        names = self.config.id2label
        return None if names is None else {int(label): name for label, name in names.items()}

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float, return_dict: bool = True
    ) -> NoisyClassifierOutput | tuple[torch.Tensor]:
        """Classifies noisy images.

        Args:
            sample: x_t, (B, C, H, W).
            timestep: Train timestep, a number, () or (B,).
            return_dict: Return a `NoisyClassifierOutput` rather than a tuple.

        Raises:
            ValueError: If the shapes do not fit the network or each other.
        """
        logits = self.head(self.features(sample, timestep))
        return NoisyClassifierOutput(logits) if return_dict else (logits,)

    def features(self, sample: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        """What the head reads, (B, block_out_channels[-1]); arguments and errors are those of `forward`."""
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ValueError(f"sample must be (B, {self.config.in_channels}, H, W), got {tuple(sample.shape)}")
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        if len(timesteps) not in (1, len(sample)):
            raise ValueError(f"need one timestep or one per sample, {len(sample)}, got {len(timesteps)}")
        embedding = self.time_projection(timesteps.expand(len(sample))).to(self.dtype)
        embedding = self.time_embedding(embedding)  # (B, 4 * block_out_channels[0])

        x = self.conv_in(sample)
        for block in self.down_blocks:
            x, _ = block(x, embedding)
        x = self.mid_block(x, embedding)
        pixels = self.activation(self.norm_out(x)).flatten(2).mT  # (B, pixels, last)
        pooled = pixels.mean(dim=1, keepdim=True)  # (B, 1, last)
        if self.pool is not None:
            pooled = self.pool(pooled, torch.cat([pooled, pixels], dim=1))
        return pooled.squeeze(1)


def _check_architecture(
    num_classes: int,
    block_out_channels: tuple[int, ...],
    down_block_types: tuple[str, ...],
    attention_head_dim: int,
    pooling: str,
    id2label: dict[int, str] | dict[str, str] | None,
) -> None:
    if num_classes < 2:
        raise ValueError(f"need num_classes >= 2, got {num_classes}")
    if len(block_out_channels) != len(down_block_types) or not block_out_channels:
        raise ValueError(
            f"need one of down_block_types for each of block_out_channels, at least one, got {down_block_types} for "
            f"{block_out_channels}"
        )
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {POOLINGS}, got {pooling!r}")
    levels = zip(block_out_channels, down_block_types, strict=True)
    attending = [channels for channels, kind in levels if "Attn" in kind] + [block_out_channels[-1]]
    if any(channels % attention_head_dim != 0 for channels in attending):
        raise ValueError(
            f"attention_head_dim must divide the channels of the levels with attention and of the last, {attending}, "
            f"got {attention_head_dim}"
        )
    if id2label is not None and not all(0 <= int(label) < num_classes for label in id2label):
        raise ValueError(f"id2label names {sorted(map(int, id2label))}, but there are {num_classes} classes")
