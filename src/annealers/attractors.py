"""Denoising again and again, and the points where that ends; `annealers.denoising` tells what the formulas mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.utils.logging import tqdm

__all__ = ["attraction_rate", "iterative_denoising"]

Denoiser = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def iterative_denoising(
    denoiser: Denoiser,
    x: torch.Tensor,
    step_size: float,
    num_steps: int,
    return_trajectory: bool = False,
    progress_bar: Callable[[range], Iterable[int]] | None = None,
) -> torch.Tensor:
    """Repeats x <- (1 - eta) x + eta DAE(x): gradient ascent on the log-density of the noisy data.

    It ends on an attractor of the denoiser: a mode of the noisy data. It draws no noise, so it is no sampler.

    Args:
        denoiser: DAE, (B, *) -> (B, *).
        x: Where to start, (B, *).
        step_size: eta, in (0, 1]; 1 puts DAE(x) in the place of x.
        num_steps: How often, >= 0.
        return_trajectory: Whether to return all states, the first among them.
        progress_bar: What shows the progress of the steps that it iterates over, such as that of a pipeline; None for
            one of Diffusers.

    Returns:
        The last state, (B, *), or (num_steps + 1, B, *), in the dtype of `x`; half precision is summed in float32.

    Raises:
        ValueError: If the step size or number of steps is out of range, or the denoiser changes the shape.

    Example:
        >>> from annealers import exact
        >>> stored = exact.FiniteData(torch.tensor([[-1.0], [1.0]]))
        >>> iterative_denoising(lambda x: stored.denoise(x, sigma=0.3), torch.tensor([[0.2]]), 0.5, 40)
        tensor([[1.]])
    """
    if not 0 < step_size <= 1:
        raise ValueError(f"step_size must be in (0, 1], a part of the way to DAE(x), got {step_size}")
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 0:
        raise ValueError(f"num_steps must be an integer >= 0, got {num_steps!r}")
    state = x.to(torch.promote_types(x.dtype, torch.float32))
    states = [x]
    steps = range(num_steps)
    for _ in tqdm(steps, desc="denoising") if progress_bar is None else progress_bar(steps):
        denoised = denoiser(state.to(x.dtype))
        if denoised.shape != x.shape:
            raise ValueError(f"the denoiser must keep the shape {tuple(x.shape)}, got {tuple(denoised.shape)}")
        state = (1 - step_size) * state + step_size * denoised.to(state.dtype)
        if return_trajectory:
            states.append(state.to(x.dtype))
    return torch.stack(states) if return_trajectory else state.to(x.dtype)


def attraction_rate(denoiser: Denoiser, x: torch.Tensor, step_size: float = 1.0) -> torch.Tensor:
    """By how much a step of `iterative_denoising` multiplies a small error, in the direction where that is largest.

    At a fixed point x, the spectral radius of (1 - eta) I + eta dDAE/dx: below 1 the point attracts, and errors die
    out at that rate; at 1 some direction stays put; above 1 the point repels. It costs one backward pass per
    coordinate and the eigenvalues of a (D, D) matrix per sample.

    Args:
        denoiser: DAE, (B, *) -> (B, *), differentiable, in which no sample depends on another.
        x: Where, (B, *).
        step_size: eta, in (0, 1].

    Returns:
        (B,), half precision in float32.

    Raises:
        ValueError: If the step size is out of range.
        RuntimeError: If the output does not depend on x for autograd.
    """
    if not 0 < step_size <= 1:
        raise ValueError(f"step_size must be in (0, 1], a part of the way to DAE(x), got {step_size}")
    B, D = len(x), x[0].numel()
    by_output: Any = torch.autograd.functional.jacobian(lambda state: denoiser(state).sum(dim=0), x, strict=True)
    slope = by_output.reshape(D, B, D).transpose(0, 1)  # (B, D, D), from (*, B, *)
    slope = slope.to(torch.promote_types(x.dtype, torch.float32))
    step = (1 - step_size) * torch.eye(D, dtype=slope.dtype, device=x.device) + step_size * slope
    return torch.linalg.eigvals(step).abs().amax(dim=-1)
