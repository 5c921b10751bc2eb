r"""A transformer over the codes of an image: a law of them, or a reading of them from features.

Causal, it is the second stage of a VQ-VAE. The codes s_1 .. s_N of an image, row by row, are drawn in
that order,

    p(s | y) = prod_i p(s_i | s_1 .. s_{i-1}, y),       p(s_i | ..) = softmax(head(h_i)),

    h = blocks(start(y), e(s_1), .., e(s_{N-1}))        + row and column of the place that each is to predict

where a place attends to itself and those before it, and a block is x + attention(norm(x)), then x + mlp(norm(x)). For
drawing, the keys and values of the places before are kept, so that a code costs one column of the network and not all.

Bidirectional (`causal=False`), it reads all codes at once from features at the same places, each of which attends to
all: the lookup of CodeFormer.

Sources: Radford, Wu, Child, Luan, Amodei & Sutskever 2019, "Language Models are Unsupervised Multitask Learners",
Sec. 2.3 (blocks and initialisation); Esser, Rombach & Ommer 2021, "Taming Transformers for High-Resolution Image
Synthesis", arXiv:2012.09841, Sec. 3.2 (codes in raster order); Zhou, Chan, Li & Loy 2022, "Towards Robust Blind Face
Restoration with Codebook Lookup Transformer", arXiv:2206.11253, Sec. 3.2 (lookup). Positions are sums of a learnt row
and a learnt column rather than one vector for each place.

    symbol    code           shape              meaning
    s         sample         (B, C, h, w)       codes 0 .. K - 1; N = C h w of them, C = 1 for those of a VQ-VAE
    y         class_labels   (B,)               each class has a start of its own
    h         hidden         (B, N, hidden)     what the network says at each place
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

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
from annealers.models.pixel_likelihood import Generators, at_least_float32

INITIAL_STD = 0.02  # GPT-2's


class KeyValueCache:
    """Keys and values of the places so far, in one layer.

    Args:
        shape: (B, heads, N, channels of a head) when all are there.
        like: A tensor of their device and type.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: torch.Tensor) -> None:
        self.keys, self.values, self.length = like.new_empty(shape), like.new_empty(shape), 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All so far, with those of the next place."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = keys, values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        channels: Of each place.
        num_heads: Heads of the attention.
        mlp_channels: Of the inner layer.
        dropout: Of the attention's weights and of what is added.
        causal: Whether a place attends to itself and those before it only.
    """

    def __init__(self, channels: int, num_heads: int, mlp_channels: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.dropout_share, self.causal = num_heads, dropout, causal
        self.norm_attention = nn.LayerNorm(channels)
        self.queries_keys_values = nn.Linear(channels, 3 * channels)
        self.attention_out = nn.Linear(channels, channels)
        self.norm_mlp = nn.LayerNorm(channels)
        self.mlp_in = nn.Linear(channels, mlp_channels)
        self.activation = nn.GELU(approximate="tanh")
        self.mlp_out = nn.Linear(mlp_channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
        """(B, N, channels); with a cache, one place (B, 1, channels) after those in it."""
        x = x + self.dropout(self.attention(self.norm_attention(x), cache))
        return x + self.dropout(self.mlp_out(self.activation(self.mlp_in(self.norm_mlp(x)))))

    def attention(self, x: torch.Tensor, cache: KeyValueCache | None) -> torch.Tensor:
        heads = self.queries_keys_values(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = heads.unbind()  # (B, heads, N, d) each
        if cache is not None:
            keys, values = cache.append(keys, values)
        attended = scaled_dot_product_attention(
            queries,
            keys,
            values,
            dropout_p=self.dropout_share if self.training else 0.0,
            is_causal=self.causal and cache is None,  # nothing in the cache comes after the place that asks
        )
        return self.attention_out(attended.transpose(1, 2).flatten(2))


class CodeTransformerModel(ModelMixin, ConfigMixin):
    """A law of the codes of an image, or a reading of them from features.

    Args:
        num_embeddings: K, the number of codes.
        in_channels: C, the codes at each place; 1 for those of a VQ-VAE.
        sample_size: (h, w) of the codes, or one number for both.
        hidden_size: Channels of the network.
        num_layers: Blocks.
        num_heads: Attention heads, which divide `hidden_size`.
        mlp_ratio: Width of the inner layer of a block, by `hidden_size`.
        dropout: Dropout of the embeddings, the attention weights and what a block adds.
        num_class_embeds: Number of classes; None for a law without.
        causal: Whether it is a law of codes; if not, it reads them from features.
        feature_channels: Channels of features at each place: of a law, those it is conditioned on, and None if it is
            not; of a reading, those it is of.

    Raises:
        ValueError: If an argument is out of range, or a reading is told classes or no `feature_channels`.

    Example:
        >>> from annealers import CodeTransformerModel
        >>> prior = CodeTransformerModel(num_embeddings=16, sample_size=(2, 3), hidden_size=32, num_class_embeds=10)
        >>> codes = prior.generate(4, class_labels=torch.tensor([3, 3, 8, 8]), temperature=0.9, top_k=8)
        >>> codes.shape, prior(codes, class_labels=torch.tensor([3, 3, 8, 8])).nll.shape
        (torch.Size([4, 1, 2, 3]), torch.Size([4]))
    """

    __module__ = "annealers"  # its public name

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["row_embedding", "column_embedding", "channel_embedding"]  # added, not called

    @register_to_config
    def __init__(
        self,
        num_embeddings: int = 512,
        in_channels: int = 1,
        sample_size: int | tuple[int, int] = 8,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
        causal: bool = True,
        feature_channels: int | None = None,
    ) -> None:
        super().__init__()
        _check_transformer(num_embeddings, in_channels, hidden_size, num_layers, num_heads, mlp_ratio)
        check_network(num_class_embeds, sample_size, dropout)
        if feature_channels is not None and feature_channels < 1:
            raise ValueError(f"need feature_channels >= 1, or None for no features, got {feature_channels}")
        if not causal and (num_class_embeds is not None or feature_channels is None or in_channels != 1):
            raise ValueError(
                "with causal=False codes are read from features: need feature_channels, no classes and in_channels=1, "
                f"got feature_channels={feature_channels}, num_class_embeds={num_class_embeds} and "
                f"in_channels={in_channels}"
            )
        self.gradient_checkpointing = False
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        self.code_shape = (in_channels, height, width)
        if causal:
            self.start = nn.Embedding(num_class_embeds or 1, hidden_size)
            self.code_embedding = nn.Embedding(num_embeddings, hidden_size)
        if feature_channels is not None:
            self.feature_projection = nn.Linear(feature_channels, hidden_size)
        self.row_embedding = nn.Embedding(height, hidden_size)
        self.column_embedding = nn.Embedding(width, hidden_size)
        self.channel_embedding = nn.Embedding(in_channels, hidden_size) if in_channels > 1 else None
        self.embedding_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden_size, num_heads, round(mlp_ratio * hidden_size), dropout, causal)
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, num_embeddings, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Small weights, and smaller those that end a residual branch, of which there are two in each block."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INITIAL_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for last in (block.attention_out, block.mlp_out):
                nn.init.normal_(last.weight, std=INITIAL_STD / math.sqrt(2 * len(self.blocks)))

    # ---- likelihood -------------------------------------------------------------------------------------------------

    def forward(
        self,
        sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> AutoregressiveOutput | tuple[torch.Tensor, torch.Tensor]:
        """-log p(s | y) of codes, and the logits of each given those before it.

        Args:
            sample: s, integers (B, C, h, w).
            class_labels: y, (B,), of a model with classes.
            condition: Features (B, feature_channels, h, w), of a model with `feature_channels`.
            return_dict: Return an `AutoregressiveOutput` rather than a tuple.

        Raises:
            ValueError: If a shape or value does not fit, or the model is no law of codes.
        """
        self._check_causal()
        check_codes(sample, self.config.num_embeddings, self.config.in_channels)
        if sample.shape[1:] != self.code_shape:
            expected = ", ".join(map(str, self.code_shape))
            raise ValueError(f"sample must be (B, {expected}), got {tuple(sample.shape)}")
        check_class_labels(class_labels, self.config.num_class_embeds, len(sample))

        codes = to_sequence(sample.long())  # (B, N)
        tokens = torch.cat([self._start(len(sample), class_labels), self.code_embedding(codes[:, :-1])], dim=1)
        hidden = self._blocks(tokens + self._places(len(sample), condition))
        logits = at_least_float32(self.head(hidden)).mT.unflatten(2, (*self.code_shape[1:], -1)).movedim(4, 2)
        nll = cross_entropy(logits, sample.long(), reduction="none").flatten(1).sum(dim=1)  # (B,)
        return AutoregressiveOutput(logits=logits, nll=nll) if return_dict else (logits, nll)

    @apply_forward_hook
    def forward_features(self, features: torch.Tensor) -> torch.Tensor:
        """Logits, in at least float32, of the codes of features, (B, feature_channels, h, w) -> (B, K, h, w).

        Raises:
            ValueError: If the shape does not fit, or the model is a law of codes.
        """
        if self.config.causal:
            raise ValueError("this is a law of codes (causal=True): only one with causal=False reads features")
        hidden = self._blocks(self._places(len(features), features))  # (B, N, hidden)
        return at_least_float32(self.head(hidden)).mT.unflatten(2, self.code_shape[1:])

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
        """Draws codes, one after the other, as the network in evaluation mode says.

        Args:
            batch_size: B.
            class_labels, condition: As of `forward`.
            generator: One for the batch, or a list with one per image; with a list no image depends on the others.
            temperature: T > 0 of p^(1/T).
            top_k: Draw among the k likeliest codes only; None among all.
            prompt: Codes (B, C, h, w) of which those at `known` places stay.
            known: True where they do, (B, 1, h, w), (1, 1, h, w) or (h, w). What comes later has no effect on the
                codes before it.
            use_cache: Keep keys and values; the codes are the same without, after far more work.
            progress_bar: Wraps the range of rows, such as `tqdm` or `DiffusionPipeline.progress_bar`.

        Returns:
            s, (B, C, h, w), int64.

        Raises:
            ValueError: If an argument does not fit.
        """
        self._check_causal()
        check_class_labels(class_labels, self.config.num_class_embeds, batch_size)
        check_sampling(temperature, top_k, self.config.num_embeddings)
        device, K = self.device, self.config.num_embeddings
        given, kept = given_pixels(prompt, known, batch_size, self.code_shape, K, device)
        codes, kept = to_sequence(given), to_sequence(kept.expand_as(given))  # (B, N)
        uniform = to_sequence(image_uniforms(batch_size, self.code_shape, generator, device, self.dtype))
        start = self._start(batch_size, class_labels)  # (B, 1, hidden)
        places = self._places(batch_size, condition)  # (B or 1, N, hidden)
        caches = self._caches(batch_size, start) if use_cache else None

        with in_evaluation_mode(self):
            rows = range(self.code_shape[1])
            in_row = codes.shape[1] // len(rows)
            for row in rows if progress_bar is None else progress_bar(rows):
                for i in range(row * in_row, (row + 1) * in_row):
                    if caches is None:  # all places up to this one
                        tokens = torch.cat([start, self.code_embedding(codes[:, :i])], dim=1)
                        hidden = self._blocks(tokens + places[:, : i + 1])
                    else:
                        token = start if i == 0 else self.code_embedding(codes[:, i - 1 : i])
                        hidden = self._blocks(token + places[:, i : i + 1], caches)
                    logits = self.head(hidden[:, -1])  # (B, K)
                    drawn = categorical_quantile(sharpened(logits, temperature, top_k), uniform[:, i])
                    codes[:, i] = torch.where(kept[:, i], codes[:, i], drawn)
        return from_sequence(codes, self.code_shape)

    def _caches(self, batch_size: int, like: torch.Tensor) -> list[KeyValueCache]:
        heads, places = self.config.num_heads, math.prod(self.code_shape)
        shape = (batch_size, heads, places, self.config.hidden_size // heads)
        return [KeyValueCache(shape, like) for _ in self.blocks]

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _start(self, batch_size: int, class_labels: torch.Tensor | None) -> torch.Tensor:
        """What stands before the first code, (B, 1, hidden)."""
        if class_labels is None:
            class_labels = torch.zeros(batch_size, dtype=torch.long, device=self.device)
        return self.start(class_labels.to(self.device, torch.long)).unsqueeze(1)

    def _places(self, batch_size: int, features: torch.Tensor | None) -> torch.Tensor:
        """Positions, and features if there are any, of all places, (B or 1, N, hidden)."""
        C, height, width = self.code_shape
        places = self.row_embedding.weight.unsqueeze(1) + self.column_embedding.weight  # (h, w, hidden)
        channel = 0 if self.channel_embedding is None else self.channel_embedding.weight
        places = (places.unsqueeze(2) + channel).flatten(0, 2).unsqueeze(0)  # (1, N, hidden)
        expected = self.config.feature_channels
        if (features is None) != (expected is None):
            given = "None" if features is None else tuple(features.shape)
            raise ValueError(f"a model with feature_channels={expected} got features {given}")
        if features is None:
            return places
        if features.shape != (batch_size, expected, height, width):
            raise ValueError(f"features must be {(batch_size, expected, height, width)}, got {tuple(features.shape)}")
        projected = self.feature_projection(features.to(places.dtype).flatten(2).mT)  # (B, h w, hidden)
        return places + projected.repeat_interleave(C, dim=1)

    def _blocks(self, x: torch.Tensor, caches: list[KeyValueCache] | None = None) -> torch.Tensor:
        """h, (B, N, hidden)."""
        x = self.embedding_dropout(x)
        for i, block in enumerate(self.blocks):
            if caches is not None:
                x = block(x, caches[i])
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        return self.norm_out(x)

    def _check_causal(self) -> None:
        if not self.config.causal:
            raise ValueError("with causal=False codes are read by forward_features: this is no law of codes")


def to_sequence(values: torch.Tensor) -> torch.Tensor:
    """Row by row, in a row from left to right, the channels of a place beside each other: (B, C, h, w) -> (B, N)."""
    return values.movedim(1, -1).flatten(1)


def from_sequence(values: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """(B, N) -> (B, C, h, w), of shape (C, h, w)."""
    channels, height, width = shape
    return values.unflatten(1, (height, width, channels)).movedim(-1, 1)


def _check_transformer(
    num_embeddings: int, in_channels: int, hidden_size: int, num_layers: int, num_heads: int, mlp_ratio: float
) -> None:
    if num_embeddings < 2 or min(in_channels, num_layers, num_heads) < 1:
        raise ValueError(
            f"need num_embeddings >= 2 and in_channels, num_layers, num_heads >= 1, got {num_embeddings}, "
            f"{in_channels}, {num_layers}, {num_heads}"
        )
    if hidden_size < 1 or hidden_size % num_heads != 0:
        raise ValueError(f"num_heads must divide hidden_size, got {num_heads} and {hidden_size}")
    if round(mlp_ratio * hidden_size) < 1:
        raise ValueError(f"need mlp_ratio > 0, got {mlp_ratio}")
