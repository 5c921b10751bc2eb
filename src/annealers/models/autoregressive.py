"""What autoregressive models of images share: their output, how a value is drawn from logits, and completion.

An image of integer codes x in {0 .. K - 1} is a sequence, row by row, in a row from left to right, in a pixel from the
first channel to the last, and

    log p(x) = sum_i log p(x_i | x_1 .. x_{i-1}).

A value is drawn by the inverse of its cumulative law: x_i is the first k with p(0) + .. + p(k) > u, with u uniform on
(0, 1). The numbers u of a whole image are drawn first and belong to their places, so that an image is a function of
its own generator alone: not of its batch mates, nor of what is computed for them, nor of which pixels are given.

    symbol    code        shape           meaning
    x         codes       (B, C, H, W)    integers 0 .. K - 1
    l         logits      (B, K)          log p(x_i | x_1 .. x_{i-1}) up to a constant of each row
    T         temperature ()              p^(1/T), normalised
    u         uniform     (B,)            where in the cumulative law
    known     known       (B, 1, H, W)    which pixels are given, in all their channels
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput
from torch import nn

from annealers.models.pixel_likelihood import Generators, at_least_float32, uniform_like


@dataclass
class AutoregressiveOutput(BaseOutput):
    """What `forward` of an autoregressive model returns.

    Args:
        logits: (B, K, C, H, W) in float32, each place's given what comes before it; of a model with another law, the
            parameters of that, (B, P, H, W).
        nll: -log p(x) in nats, (B,), in float32.
    """

    logits: torch.Tensor
    nll: torch.Tensor


def check_codes(codes: torch.Tensor, num_embeddings: int, channels: int, name: str = "sample") -> None:
    """Raises ValueError unless `codes` are images (B, C, H, W) of integers 0 .. K - 1."""
    if codes.ndim != 4 or codes.shape[1] != channels:
        raise ValueError(f"{name} must be (B, {channels}, H, W), got {tuple(codes.shape)}")
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers 0 .. {num_embeddings - 1}, got {codes.dtype}")
    if torch.compiler.is_compiling() or codes.numel() == 0:
        return
    lowest, highest = codes.min().item(), codes.max().item()
    if lowest < 0 or highest >= num_embeddings:
        raise ValueError(f"{name} must hold integers 0 .. {num_embeddings - 1}, got {lowest} .. {highest}")


def check_class_labels(class_labels: torch.Tensor | None, num_class_embeds: int | None, batch_size: int) -> None:
    """Raises ValueError unless there is one integer label per image exactly if the model has classes.

    Args:
        class_labels: Class ids, (B,), or None. Their values are looked at on a CPU alone: elsewhere that would wait
            for all that the device has to do before.
        num_class_embeds: Number of classes, or None for a model without.
        batch_size: B.
    """
    if num_class_embeds is None:
        if class_labels is not None:
            raise ValueError("got class_labels, but the model has no classes (num_class_embeds=None)")
        return
    if class_labels is None:
        raise ValueError(f"the model has {num_class_embeds} classes and needs class_labels ({batch_size},), got None")
    if not isinstance(class_labels, torch.Tensor) or class_labels.is_floating_point():
        kind = class_labels.dtype if isinstance(class_labels, torch.Tensor) else type(class_labels).__name__
        raise ValueError(f"class_labels must be a tensor of integers ({batch_size},), got {kind}")
    if class_labels.shape != (batch_size,):
        raise ValueError(f"class_labels must be ({batch_size},), got {tuple(class_labels.shape)}")
    if torch.compiler.is_compiling() or batch_size == 0 or class_labels.device.type != "cpu":
        return
    lowest, highest = class_labels.min().item(), class_labels.max().item()
    if lowest < 0 or highest >= num_class_embeds:
        raise ValueError(f"class_labels must be 0 .. {num_class_embeds - 1}, got {lowest} .. {highest}")


def check_network(num_class_embeds: int | None, sample_size: int | tuple[int, int], dropout: float) -> None:
    """Raises ValueError unless there are classes or None, an image has pixels, and dropout is in [0, 1)."""
    if num_class_embeds is not None and num_class_embeds < 1:
        raise ValueError(f"need num_class_embeds >= 1, or None for no classes, got {num_class_embeds}")
    sides = [sample_size] if isinstance(sample_size, int) else list(sample_size)
    if min(sides) < 1 or len(sides) > 2:
        raise ValueError(f"sample_size must be a positive number or (height, width), got {sample_size}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")


def check_sampling(temperature: float, top_k: int | None, num_embeddings: int) -> None:
    """Raises ValueError unless temperature > 0 and top_k is None or in 1 .. K."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"need a finite temperature > 0, got {temperature}")
    if top_k is not None and not 1 <= top_k <= num_embeddings:
        raise ValueError(f"need top_k in 1 .. {num_embeddings}, or None for all, got {top_k}")


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout; then as before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def sharpened(logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None) -> torch.Tensor:
    """l / T where l is among the `top_k` largest of its row, -inf elsewhere.

    Args:
        logits: (B, K).
        temperature: T; below 1 the likely becomes likelier.
        top_k: How many values may be drawn, None for all; of equal logits at the limit all may.

    Returns:
        (B, K) in at least float32.
    """
    logits = at_least_float32(logits) / temperature
    if top_k is None:
        return logits
    smallest = logits.topk(top_k, dim=1).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def categorical_quantile(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first k with p(0) + .. + p(k) > u, which is drawn from p if u is uniform; never one of probability 0.

    Args:
        logits: (B, K), finite or -inf, one of each row finite.
        uniform: u in (0, 1), (B,).

    Returns:
        (B,), int64.

    Raises:
        ValueError: If a row has no probabilities, because of NaN, of inf, or of -inf alone.
    """
    dtype = torch.promote_types(at_least_float32(logits).dtype, uniform.dtype)  # in less, u may be rounded to 1
    p = logits.to(dtype).softmax(dim=1)
    cumulative = torch.where(p > 0, p.cumsum(dim=1), 0)
    total = cumulative.amax(dim=1, keepdim=True)  # 1 but for rounding
    if not (total > 0).all():
        raise ValueError("the network gives no probabilities: its logits are NaN, inf, or all -inf")
    # argmax: of the first. A search would need sums in order, which those that are added in parallel need not be.
    return (cumulative > uniform.to(p).unsqueeze(1) * total).int().argmax(dim=1)


def image_uniforms(
    batch_size: int,
    shape: tuple[int, ...],
    generator: Generators | None,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The numbers u that a batch of images is drawn with, (B, *shape), in at least float32.

    Args:
        batch_size: B.
        shape: Of the numbers of one image.
        generator: One for the batch, or a list with one per image; with a list no image depends on the others.
        device: Where they are wanted; they are drawn where the generator lives.
        dtype: Of the model.

    Raises:
        ValueError: If a list of generators is not B long.
    """
    return uniform_like(torch.empty(batch_size, *shape, device=device, dtype=dtype), generator)


def given_pixels(
    prompt: torch.Tensor | None,
    known: torch.Tensor | None,
    batch_size: int,
    shape: tuple[int, int, int],
    num_embeddings: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes to begin with and which of them stay as they are.

    Args:
        prompt: Codes, (B, C, H, W); what they are at pixels that are not known has no effect. None for no pixels.
        known: True at given pixels, (B, 1, H, W), (1, 1, H, W) or (H, W).
        batch_size: B.
        shape: (C, H, W).
        num_embeddings: K.
        device: Where both are wanted.

    Returns:
        Codes (B, C, H, W), int64, 0 where unknown, and the mask (B, 1, H, W), bool.

    Raises:
        ValueError: If there is one of `prompt` and `known` without the other, or a shape, type or value does not fit.
    """
    channels, height, width = shape
    if (prompt is None) != (known is None):
        missing = "prompt" if prompt is None else "known"
        raise ValueError(f"prompt (the codes) and known (the mask of given pixels) go together, {missing} is missing")
    if prompt is None or known is None:
        codes = torch.zeros(batch_size, *shape, dtype=torch.long, device=device)
        return codes, torch.zeros(batch_size, 1, height, width, dtype=torch.bool, device=device)
    if prompt.shape != (batch_size, *shape):
        raise ValueError(f"prompt must be {(batch_size, *shape)}, got {tuple(prompt.shape)}")
    allowed = [(batch_size, 1, height, width), (1, 1, height, width), (height, width)]
    if known.dtype != torch.bool or tuple(known.shape) not in allowed:
        raise ValueError(f"known must be a bool mask of one of the shapes {allowed}, got {known.dtype} {known.shape}")
    known = known.to(device).expand(batch_size, 1, height, width)
    codes = torch.where(known, prompt.to(device), 0)
    check_codes(codes, num_embeddings, channels, name="prompt")
    return codes.long(), known
