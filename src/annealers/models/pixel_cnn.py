r"""PixelCNN and PixelRNN: the exact law of images of integer codes, pixel after pixel.

    log p(x | y) = sum_i log p(x_i | x_1 .. x_{i-1}, y),

x_i in raster order. Codes are grey levels, colours, or indices of a codebook; what they condition on, y, is a class, a
map of features, or both. Two laws of a pixel:

    categorical     a table of K probabilities for each channel, which knows the channels before it in the same pixel
    mix_logistic    a mixture of logistic laws on the grid of K levels for all channels of a pixel at once

Codes have no order to a categorical law, and are embedded; levels have one, and enter as numbers in [-1, 1], with a
channel of ones beside them that tells an image from the zeros around it.

Sources: van den Oord, Kalchbrenner & Kavukcuoglu 2016, "Pixel Recurrent Neural Networks", arXiv:1601.06759; van den
Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders", arXiv:1606.05328; Salimans et al. 2017,
"PixelCNN++", arXiv:1701.05517, Sec. 2.1, 2.2 (mixture of logistics for whole pixels). The bodies are in
`pixel_cnn_trunks`, the sampler that does no work twice in `pixel_cnn_cache`.

    symbol    code            shape                meaning
    x         sample          (B, C, H, W)         codes 0 .. K - 1
    y         class_labels    (B,)                 class ids
    y         condition       (B, Y, H, W)         features, of which every pixel sees those around it
    l         logits          (B, K, C, H, W)      of each value given those before it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn.functional import cross_entropy, relu

from annealers.models.autoregressive import (
    AutoregressiveOutput,
    categorical_quantile,
    check_class_labels,
    check_codes,
    check_network,
    check_sampling,
    given_pixels,
    image_uniforms,
    in_evaluation_mode,
    sharpened,
)
from annealers.models.masked_convolution import MaskedConv2d
from annealers.models.pixel_cnn_cache import GatedCache, MaskedCache
from annealers.models.pixel_cnn_trunks import GatedTrunk, MaskedTrunk
from annealers.models.pixel_likelihood import (
    SMALLEST_LOG_SCALE,
    DiscretizedMixLogisticLikelihood,
    Generators,
    at_least_float32,
    levels_to_values,
    values_to_levels,
)

LAYER_TYPES = ("gated", "masked", "row_lstm")
OUTPUTS = ("categorical", "mix_logistic")


class PixelCNNModel(ModelMixin, ConfigMixin):
    """An autoregressive model of images of integer codes.

    Args:
        num_embeddings: K, the number of values of a code.
        in_channels: C.
        sample_size: Side of the images it generates, or (H, W); `forward` takes any size.
        channels: Of the hidden layers; a multiple of C for a categorical law.
        num_layers: Number of layers, the one that reads the image among them.
        kernel_size: Width of the window of each layer but the first, odd.
        first_kernel_size: Width of the window on the image, odd.
        layer_type: "gated", "masked" or "row_lstm".
        output: "categorical" or "mix_logistic".
        num_mixtures: Components of each pixel's law, if it is a mixture.
        num_class_embeds: Number of classes, or None for a model that knows none.
        condition_channels: Y, or None for a model without a condition map.
        dropout: Inside the layers, in training.

    Raises:
        ValueError: If an option is out of range or unknown, or C does not divide `channels`.

    Example:
        >>> from annealers import PixelCNNModel
        >>> model = PixelCNNModel(num_embeddings=2, in_channels=1, sample_size=8, channels=16, num_layers=3)
        >>> images = model.generate(batch_size=4, generator=torch.Generator().manual_seed(0))
        >>> images.shape, model(images).nll.shape
        (torch.Size([4, 1, 8, 8]), torch.Size([4]))
    """

    __module__ = "annealers"  # its public name

    _supports_gradient_checkpointing = True
    # Weights are read outside of the forward pass of the convolution that holds them, by masks and by the sampler,
    # where no hook of Diffusers brings them to their type or device.
    _skip_layerwise_casting_patterns = ["trunk", "_out"]
    _supports_group_offloading = False

    @register_to_config
    def __init__(
        self,
        num_embeddings: int = 256,
        in_channels: int = 1,
        sample_size: int | tuple[int, int] = 28,
        channels: int = 32,
        num_layers: int = 8,
        kernel_size: int = 5,
        first_kernel_size: int = 7,
        layer_type: Literal["gated", "masked", "row_lstm"] = "gated",
        output: Literal["categorical", "mix_logistic"] = "categorical",
        num_mixtures: int = 10,
        num_class_embeds: int | None = None,
        condition_channels: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_options(num_embeddings, in_channels, num_layers, kernel_size, first_kernel_size, layer_type, output)
        check_network(num_class_embeds, sample_size, dropout)
        if condition_channels is not None and condition_channels < 1:
            raise ValueError(f"need condition_channels >= 1, or None for no condition, got {condition_channels}")
        groups = in_channels if output == "categorical" else 1  # what knows of each other inside a pixel, in order
        if channels < 1 or channels % groups != 0:
            raise ValueError(f"channels must be a multiple of in_channels={in_channels}, got {channels}")

        self.likelihood, self.embedding = None, None
        if output == "categorical":
            embedding_dim = min(num_embeddings, channels)  # beyond K, the linear layer after it would gain nothing
            self.embedding = nn.Embedding(in_channels * num_embeddings, embedding_dim)  # a table for each channel
            embedded_channels, parameter_channels = in_channels * embedding_dim, in_channels * num_embeddings
        else:
            self.likelihood = DiscretizedMixLogisticLikelihood(in_channels, num_embeddings, num_mixtures)
            embedded_channels, parameter_channels = in_channels + 1, self.likelihood.parameter_channels

        self.class_embedding, self.condition_in = None, None
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, channels)
        if condition_channels is not None:
            self.condition_in = nn.Conv2d(condition_channels, channels, kernel_size=3, padding=1)

        shared = {
            "in_channels": embedded_channels,
            "channels": channels,
            "num_layers": num_layers,
            "first_kernel_size": first_kernel_size,
            "kernel_size": kernel_size,
            "groups": groups,
            "dropout": dropout,
            "conditional": num_class_embeds is not None or condition_channels is not None,
        }
        if layer_type == "gated":
            self.trunk = GatedTrunk(**shared)
        else:
            self.trunk = MaskedTrunk(**shared, recurrent=layer_type == "row_lstm")
        self.hidden_out = MaskedConv2d(channels, channels, groups=groups)
        self.conv_out = MaskedConv2d(channels, parameter_channels, groups=groups)

    # ---- the likelihood ---------------------------------------------------------------------------------------------

    def forward(
        self,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> AutoregressiveOutput | tuple[torch.Tensor, torch.Tensor]:
        """The law of every value given those before it, and -log p(x).

        Args:
            sample: Codes, (B, C, H, W), integers 0 .. K - 1.
            class_labels: Class ids, (B,), exactly if the model has classes.
            condition: (B, condition_channels, H, W), exactly if the model has them.
            return_dict: Return an `AutoregressiveOutput` rather than a tuple.

        Returns:
            Logits (B, K, C, H, W), or for "mix_logistic" the parameters (B, P, H, W) of its likelihood; and nats (B,);
            both in at least float32.

        Raises:
            ValueError: If a shape, type or value does not fit.
        """
        check_codes(sample, self.config.num_embeddings, self.config.in_channels)
        context = self.context(class_labels, condition, len(sample), tuple(sample.shape[2:]))
        logits = self.logits_of(self.trunk(self.embed(sample), context))
        with torch.autocast(logits.device.type, enabled=False):
            if self.likelihood is None:
                nll = cross_entropy(logits, sample.long(), reduction="none").flatten(1).sum(dim=1)
            else:
                values = levels_to_values(sample, self.config.num_embeddings, logits.dtype)
                nll = -self.likelihood.log_prob(logits, values)
        return AutoregressiveOutput(logits, nll) if return_dict else (logits, nll)

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """What the layers read of codes (B, C, H, W): (B, E, H, W), the channels of the image in order."""
        K = self.config.num_embeddings
        if self.embedding is None:
            values = levels_to_values(codes, K, self.dtype)
            return torch.cat([values, torch.ones_like(values[:, :1])], dim=1)
        offsets = K * torch.arange(self.config.in_channels, device=codes.device)
        embedded = self.embedding(codes.long() + offsets[:, None, None])  # (B, C, H, W, E)
        return embedded.movedim(-1, 2).flatten(1, 2)

    def context(
        self,
        class_labels: torch.Tensor | None,
        condition: torch.Tensor | None,
        batch_size: int,
        size: tuple[int, int],
    ) -> torch.Tensor | None:
        """What every layer is told of class and condition, (B, channels, H, W), or of a class (B, channels, 1, 1)."""
        check_class_labels(class_labels, self.config.num_class_embeds, batch_size)
        expected = None
        if self.config.condition_channels is not None:
            expected = (batch_size, self.config.condition_channels, *size)
        if (None if condition is None else tuple(condition.shape)) != expected:
            got = None if condition is None else tuple(condition.shape)
            raise ValueError(f"condition must be {expected}, got {got}")
        of_class = of_condition = None
        if class_labels is not None and self.class_embedding is not None:
            of_class = self.class_embedding(class_labels.to(self.device, torch.long))[:, :, None, None]
        if condition is not None and self.condition_in is not None:
            of_condition = self.condition_in(condition.to(self.device, self.dtype))
        if of_class is None or of_condition is None:
            return of_condition if of_class is None else of_class
        return of_class + of_condition

    def logits_of(self, features: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) -> logits (B, K, C, H, W) or parameters (B, P, H, W), in at least float32.

        Under autocast the last layer is left out of it: bfloat16 has no room for the means of 256 levels.
        """
        hidden = relu(self.hidden_out(relu(features)))
        with torch.autocast(hidden.device.type, enabled=False):
            parameters = at_least_float32(self.conv_out(hidden.to(self.conv_out.weight.dtype)))
        if self.likelihood is not None:
            return parameters
        return parameters.unflatten(1, (self.config.in_channels, self.config.num_embeddings)).transpose(1, 2)

    # ---- sampling ---------------------------------------------------------------------------------------------------

    @apply_forward_hook
    @torch.no_grad()
    def generate(
        self,
        batch_size: int,
        class_labels: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        generator: Generators | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        prompt: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
        use_cache: bool = True,
        progress_bar: Callable[[range], Iterable[int]] | None = None,
    ) -> torch.Tensor:
        """Draws images, pixel after pixel, as the network in evaluation mode says.

        Args:
            batch_size: B.
            class_labels: Class ids, (B,), exactly if the model has classes.
            condition: (B, condition_channels, H, W), exactly if the model has them.
            generator: One for the batch, or a list with one per image; with a list no image depends on the others.
            temperature: T, p^(1/T) for a categorical law. For a mixture of logistics it divides the logits of the
                components and multiplies their scales.
            top_k: Draw from the k likeliest values only; for a categorical law.
            prompt: Codes of given pixels, (B, C, H, W), for completion.
            known: Which pixels are given, True there, (B, 1, H, W) or (H, W). The others are drawn one after another
                given all before them: given pixels further on do not act back on them.
            use_cache: Keep what earlier pixels gave. False calls the network on the whole image for every value: the
                same images, up to draws that rounding decides, much later.
            progress_bar: Wraps the range of rows, such as `tqdm` or `DiffusionPipeline.progress_bar`.

        Returns:
            Codes, (B, C, H, W), int64.

        Raises:
            ValueError: If a shape, type or value does not fit.
        """
        C, K, categorical = self.config.in_channels, self.config.num_embeddings, self.likelihood is None
        check_sampling(temperature, top_k, K)
        if top_k is not None and not categorical:
            raise ValueError(f"top_k is of categorical models, this one has output='mix_logistic', got top_k={top_k}")
        size = self.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        codes, known = given_pixels(prompt, known, batch_size, (C, height, width), K, self.device)
        context = self.context(class_labels, condition, batch_size, (height, width))
        numbers = C if categorical else 1 + C  # of those that a pixel is drawn with
        uniform = image_uniforms(batch_size, (numbers, height, width), generator, self.device, self.dtype)
        cache = self._cache(context, batch_size, (height, width)) if use_cache else None

        with in_evaluation_mode(self):
            for row in range(height) if progress_bar is None else progress_bar(range(height)):
                if cache is not None:
                    cache.start_row()
                for column in range(width):
                    pixel, keep = codes[:, :, row, column], known[:, :, row, column]
                    for step in range(C if categorical else 1):
                        if cache is None:
                            features = self.trunk(self.embed(codes), context)[:, :, row, column]
                        else:
                            cache.write(column, self.embed(pixel[:, :, None, None]).flatten(1))
                            features = cache.read(column)
                        law = self.logits_of(features[:, :, None, None])[..., 0, 0]
                        drawn = self._drawn(law, step, uniform[:, :, row, column], temperature, top_k)
                        place = pixel[:, step : step + 1] if categorical else pixel
                        place.copy_(torch.where(keep, place, drawn))
                    if cache is not None:
                        cache.write(column, self.embed(pixel[:, :, None, None]).flatten(1))
        return codes

    def _cache(self, context: torch.Tensor | None, batch_size: int, size: tuple[int, int]) -> GatedCache | MaskedCache:
        like = torch.empty(batch_size, 1, *size, device=self.device, dtype=self.dtype)
        if isinstance(self.trunk, GatedTrunk):
            return GatedCache(self.trunk, context, like)
        return MaskedCache(self.trunk, context, like)

    def _drawn(
        self, law: torch.Tensor, step: int, uniform: torch.Tensor, temperature: float, top_k: int | None
    ) -> torch.Tensor:
        """What a step gives: of logits (B, K, C) the channel of that number, (B, 1); else the whole pixel, (B, C)."""
        if self.likelihood is not None:
            return mixture_quantile(self.likelihood, law, uniform, temperature)
        return categorical_quantile(sharpened(law[..., step], temperature, top_k), uniform[:, step]).unsqueeze(1)


def mixture_quantile(
    likelihood: DiscretizedMixLogisticLikelihood, parameters: torch.Tensor, uniform: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Levels of one pixel, drawn by the inverse of cumulative laws: of the component, then of each channel in turn.

    Args:
        likelihood: The law.
        parameters: (B, P).
        uniform: One number for the component and one for each channel, (B, 1 + C).
        temperature: T; the scales are T times as large, the logits 1 / T.

    Returns:
        (B, C), int64.
    """
    components = (part[..., 0, 0] for part in likelihood.components(parameters[:, :, None, None]))
    logits, mean, log_scale, coefficients = components  # (B, M), (B, M, C) twice, (B, M, C, C)
    component = categorical_quantile(sharpened(logits, temperature), uniform[:, 0])
    images = torch.arange(len(logits), device=logits.device)
    mean, coefficients = mean[images, component], coefficients[images, component]  # (B, C), (B, C, C)
    scale = temperature * log_scale[images, component].clamp(min=SMALLEST_LOG_SCALE).exp()
    centred = scale * torch.logit(uniform[:, 1:].to(mean))
    levels, values = torch.empty_like(mean, dtype=torch.long), torch.zeros_like(mean)
    for c in range(likelihood.channels):
        x = mean[:, c] + (coefficients[:, c] * values).sum(dim=1) + centred[:, c]
        levels[:, c] = values_to_levels(x, likelihood.num_levels)
        values[:, c] = levels_to_values(levels[:, c], likelihood.num_levels, values.dtype)
    return levels


def _check_options(
    num_embeddings: int,
    in_channels: int,
    num_layers: int,
    kernel_size: int,
    first_kernel_size: int,
    layer_type: str,
    output: str,
) -> None:
    if num_embeddings < 2 or in_channels < 1 or num_layers < 1:
        raise ValueError(
            f"need num_embeddings >= 2, in_channels >= 1 and num_layers >= 1, got {num_embeddings}, {in_channels} and "
            f"{num_layers}"
        )
    if kernel_size < 3 or kernel_size % 2 == 0 or first_kernel_size < 3 or first_kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size and first_kernel_size must be odd and >= 3, got {kernel_size} and {first_kernel_size}"
        )
    if layer_type not in LAYER_TYPES:
        raise ValueError(f"layer_type must be one of {LAYER_TYPES}, got {layer_type!r}")
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {OUTPUTS}, got {output!r}")
