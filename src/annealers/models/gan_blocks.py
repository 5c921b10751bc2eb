r"""What the two players of a generative adversarial network are built of: norms, conditions, residual blocks.

A condition c, a class y or the embedding t of a text or both, acts on a map of features by scale and shift after the
norm of that,

    (1 + s(c)) * norm(x) + b(c),     (s, b)(c) = E[y] + W t,

of which E and W start at 0, so that at first there is no condition. Norms are of the batch, of groups of channels of
an image, or none; a spectral norm is not of features but of weights, which it divides by their largest singular value.

    residual block    up      norm, ReLU, double, convolution, norm, ReLU, convolution; beside it double and 1 x 1
                      down    norm, ReLU, convolution, norm, ReLU, convolution, halve; beside it halve and 1 x 1

Sources: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", arXiv:1802.05957, App. B.4
(residual blocks); Miyato & Koyama 2018, "cGANs with Projection Discriminator", arXiv:1802.05637, Fig. 13 and 14
(conditional norms); Radford, Metz & Chintala 2016, arXiv:1511.06434, Sec. 4 (weights of deviation 0.02).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, relu
from torch.nn.utils.parametrizations import spectral_norm

from annealers.models.autoregressive import check_class_labels

Layer = nn.Linear | nn.Embedding | nn.Conv2d | nn.ConvTranspose2d

INITIAL_DEVIATION = 0.02  # of weights, Radford et al. 2016, Sec. 4, and Isola et al. 2017, App. 6.2


# ---- weights and norms ----------------------------------------------------------------------------------------------


def normally_initialized(layer: Layer) -> Layer:
    """A layer with weights of N(0, 0.02^2) and without bias at first, as of DCGAN and pix2pix."""
    nn.init.normal_(layer.weight, std=INITIAL_DEVIATION)
    return _without_bias_at_first(layer)


def uniformly_initialized(layer: Layer, gain: float = 1.0) -> Layer:
    """A layer with weights of Glorot & Bengio's uniform law and without bias at first, as of Miyato et al."""
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    return _without_bias_at_first(layer)


def _without_bias_at_first(layer: Layer) -> Layer:
    if not isinstance(layer, nn.Embedding) and layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def weights_normalized(layer: nn.Module, norm: str) -> nn.Module:
    """The layer, its weights divided by their largest singular value if `norm` is "spectral"."""
    return spectral_norm(layer) if norm == "spectral" else layer


def feature_norm(norm: str, channels: int, norm_num_groups: int) -> nn.Module:
    """The norm of a map of features; nothing for a norm of weights or none."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(norm_num_groups, channels) if norm == "group" else nn.Identity()


class ConditionalNorm(nn.Module):
    """(1 + s(c)) * norm(x) + b(c), or the norm alone if there is neither class nor text.

    Args:
        norm: "batch", "group" or "none".
        channels: C.
        norm_num_groups: Groups of the group normalisation.
        num_class_embeds: Number of classes, or None.
        text_embed_dim: Length of t, or None.
    """

    def __init__(
        self, norm: str, channels: int, norm_num_groups: int, num_class_embeds: int | None, text_embed_dim: int | None
    ) -> None:
        super().__init__()
        self.norm = feature_norm(norm, channels, norm_num_groups)
        self.of_class = self.of_text = None
        if num_class_embeds is not None:
            self.of_class = nn.Embedding(num_class_embeds, 2 * channels)
            nn.init.zeros_(self.of_class.weight)
        if text_embed_dim is not None:
            self.of_text = nn.Linear(text_embed_dim, 2 * channels, bias=False)
            nn.init.zeros_(self.of_text.weight)

    def forward(
        self, x: torch.Tensor, class_labels: torch.Tensor | None, text_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        x = self.norm(x)
        modulation = condition_sum(self.of_class, class_labels, self.of_text, text_embeds)
        if modulation is None:
            return x
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1)
        return x * (1 + scale) + shift


# ---- conditions -----------------------------------------------------------------------------------------------------


def condition_sum(
    of_class: nn.Module | None,
    class_labels: torch.Tensor | None,
    of_text: nn.Module | None,
    text_embeds: torch.Tensor | None,
) -> torch.Tensor | None:
    """E[y] + W t, (B, n), of the layers that there are; None if there is none."""
    terms = []
    if of_class is not None:
        terms.append(of_class(class_labels))
    if of_text is not None:
        terms.append(of_text(text_embeds))
    return sum(terms[1:], terms[0]) if terms else None


def check_condition_sizes(num_class_embeds: int | None, text_embed_dim: int | None) -> None:
    """Raises ValueError unless there are classes, or None, and texts have some length, or None."""
    for name, number in (("num_class_embeds", num_class_embeds), ("text_embed_dim", text_embed_dim)):
        if number is not None and number < 1:
            raise ValueError(f"need {name} >= 1, or None for no such condition, got {number}")


def check_conditions(
    class_labels: torch.Tensor | None,
    num_class_embeds: int | None,
    text_embeds: torch.Tensor | None,
    text_embed_dim: int | None,
    batch_size: int,
    text_name: str,
) -> None:
    """Raises ValueError unless there is a label, and a text, for each image exactly if the model has that condition.

    Args:
        class_labels: Class ids, (B,), or None.
        num_class_embeds: Number of classes, or None.
        text_embeds: t, (B, D), or None.
        text_embed_dim: D, or None.
        batch_size: B.
        text_name: What the caller calls t.
    """
    check_class_labels(class_labels, num_class_embeds, batch_size)
    if text_embed_dim is None:
        if text_embeds is not None:
            raise ValueError(f"got {text_name}, but the model knows no texts (text_embed_dim=None)")
        return
    if text_embeds is None:
        raise ValueError(f"the model needs {text_name} ({batch_size}, {text_embed_dim}), got None")
    if tuple(text_embeds.shape) != (batch_size, text_embed_dim):
        raise ValueError(f"{text_name} must be ({batch_size}, {text_embed_dim}), got {tuple(text_embeds.shape)}")


# ---- options --------------------------------------------------------------------------------------------------------


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless the value of an option is among its choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_groups(
    norm: str, norm_num_groups: int, channels: tuple[int, ...], block_out_channels: tuple[int, ...]
) -> None:
    """Raises ValueError if a group norm of any of the `channels` does not come out even."""
    if norm == "group" and (norm_num_groups < 1 or any(number % norm_num_groups != 0 for number in channels)):
        raise ValueError(
            f"norm_num_groups must divide block_out_channels, got {norm_num_groups} for {tuple(block_out_channels)}"
        )


def smallest_side(sample_size: int, halvings: int) -> int:
    """sample_size / 2^halvings, the side of the smallest map of features.

    Raises:
        ValueError: If that is not a whole number of at least 2.
    """
    if not isinstance(sample_size, int):
        raise ValueError(f"sample_size must be the side of square images, an int, got {sample_size!r}")
    factor = 2**halvings
    if sample_size % factor != 0 or sample_size < 2 * factor:
        raise ValueError(
            f"between the images and the smallest maps of features the side is doubled or halved {halvings} times, "
            f"which sample_size={sample_size} does not allow: need one of "
            f"{2 * factor}, {3 * factor}, {4 * factor} .., or fewer block_out_channels"
        )
    return sample_size // factor


# ---- residual blocks ------------------------------------------------------------------------------------------------


class UpResidualBlock(nn.Module):
    """A residual block of the generator, which makes a map of features twice as large.

    Without bias where the norm is of the batch: that takes out whatever is constant in a channel, here or later on.

    Args:
        in_channels, out_channels: Before and after.
        conditional_norm: Makes the norm of a number of channels.
        bias: Of the convolutions.
    """

    def __init__(
        self, in_channels: int, out_channels: int, conditional_norm: Callable[[int], ConditionalNorm], bias: bool
    ) -> None:
        super().__init__()
        self.norm1 = conditional_norm(in_channels)
        self.conv1 = _residual_convolution(in_channels, out_channels, bias)
        self.norm2 = conditional_norm(out_channels)
        self.conv2 = _residual_convolution(out_channels, out_channels, bias)
        self.shortcut = uniformly_initialized(nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=bias))

    def forward(
        self, x: torch.Tensor, class_labels: torch.Tensor | None, text_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        h = self.conv1(_twice_as_large(relu(self.norm1(x, class_labels, text_embeds))))
        h = self.conv2(relu(self.norm2(h, class_labels, text_embeds)))
        return h + _twice_as_large(self.shortcut(x))  # (B, out_channels, 2 H, 2 W)


class DownResidualBlock(nn.Module):
    """A residual block of the discriminator, which halves a map of features or leaves its size.

    Args:
        in_channels, out_channels: Before and after.
        norm: "none", "batch", "group" or "spectral".
        norm_num_groups: Groups of the group normalisation.
        down: Whether it halves the map.
        of_pixels: Whether it is the first: its input are images, which are neither normalised nor cut off at 0.
    """

    def __init__(
        self, in_channels: int, out_channels: int, norm: str, norm_num_groups: int, down: bool, of_pixels: bool = False
    ) -> None:
        super().__init__()
        self.down, self.of_pixels = down, of_pixels
        kind = "none" if of_pixels else norm
        self.norm1 = feature_norm(kind, in_channels, norm_num_groups)
        self.conv1 = weights_normalized(_residual_convolution(in_channels, out_channels, kind != "batch"), norm)
        self.norm2 = feature_norm(kind, out_channels, norm_num_groups)
        self.conv2 = weights_normalized(_residual_convolution(out_channels, out_channels, True), norm)
        self.shortcut = None
        if down or in_channels != out_channels:
            shortcut = uniformly_initialized(nn.Conv2d(in_channels, out_channels, kernel_size=1))
            self.shortcut = weights_normalized(shortcut, norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x if self.of_pixels else relu(self.norm1(x))
        h = self.conv2(relu(self.norm2(self.conv1(h))))
        if self.down:
            h, x = avg_pool2d(h, 2), avg_pool2d(x, 2)  # (B, C, H / 2, W / 2)
        return h + (x if self.shortcut is None else self.shortcut(x))


def _residual_convolution(in_channels: int, out_channels: int, bias: bool) -> Layer:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)
    return uniformly_initialized(convolution, gain=math.sqrt(2))


def _twice_as_large(x: torch.Tensor) -> torch.Tensor:
    return interpolate(x, scale_factor=2)  # each pixel four times
