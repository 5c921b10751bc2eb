r"""Ordinary differential equations with an error control of its own for every sample of a batch.

Library solvers take one step size for a batch, so that the solution of a sample depends on its neighbours. Here each
sample has its own time, step size and acceptance, and leaves the batch when it has arrived:

    k_1 .. k_7      the stages of the pair of Dormand & Prince 1980 of orders 5(4), tableau from SciPy's `RK45`
    error           max_i |e_i| / (atol + rtol max(|y_i|, |y_i'|)),        accepted if <= 1
    next step       h * min(10, max(0.2, 0.9 error^(-1/5)))                Hairer, Norsett, Wanner 1993, Sec. II.4

Sources: Dormand & Prince 1980, "A family of embedded Runge-Kutta formulae", J. Comput. Appl. Math. 6; Hairer,
Norsett, Wanner 1993, "Solving Ordinary Differential Equations I", Springer.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from diffusers.utils.logging import tqdm
from scipy.integrate import RK45

FIRST_STEP = 0.01  # of the interval; the error control soon finds its own
SMALLEST_STEP = 1e-10  # of the interval
SAFETY, SMALLEST_FACTOR, LARGEST_FACTOR = 0.9, 0.2, 10.0
STAGES = 7

# function(time (b,), state (b, n), rows (b,)) -> derivative (b, n), for the samples `rows` of the batch
Derivative = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Solution(NamedTuple):
    """The states at the end, (B, n), and how often the derivative of each sample was computed, (B,)."""

    state: torch.Tensor
    calls: torch.Tensor


@torch.no_grad()
def solve_each(
    derivative: Derivative,
    state: torch.Tensor,
    start: float,
    end: float,
    relative_tolerance: float = 1e-5,
    absolute_tolerance: float = 1e-5,
    max_steps: int = 10_000,
) -> Solution:
    """Integrates dy/dt = f(t, y) from `start` to `end`, each sample with its own steps.

    Args:
        derivative: f(t, y, rows), where rows (b,) says which samples of the batch the b rows of t and y are.
        state: y at the start, (B, n), float32 or float64.
        start, end: The interval, in either direction.
        relative_tolerance, absolute_tolerance: Largest error of a step in each coordinate.
        max_steps: Steps per sample, rejected ones included.

    Raises:
        ValueError: If the tolerances are not positive or the interval is empty.
        RuntimeError: If a sample does not arrive, because its derivative is not finite or too rough.
    """
    if not (relative_tolerance > 0 and absolute_tolerance > 0):
        raise ValueError(f"tolerances must be positive, got {relative_tolerance} and {absolute_tolerance}")
    if start == end:
        raise ValueError(f"the interval is empty: start = end = {start}")
    result, calls = state.clone(), torch.zeros(len(state), dtype=torch.int64, device=state.device)
    rows = torch.arange(len(state), device=state.device)
    time = torch.full((len(state),), start, dtype=torch.float64, device=state.device)
    step = torch.full_like(time, FIRST_STEP * (end - start))
    slope = derivative(time, state, rows)
    calls += 1
    shown = 0  # a disabled bar does not count
    with tqdm(total=100, desc="integrating", unit="%") as progress:
        for _ in range(max_steps):
            arrives = (time + step - end) * np.sign(end - start) >= 0
            step = torch.where(arrives, end - time, step)
            candidate, error, new_slope = _dormand_prince(derivative, time, state, rows, step, slope)
            calls[rows] += STAGES - 1
            scale = absolute_tolerance + relative_tolerance * torch.maximum(state.abs(), candidate.abs())
            ratio = (error.abs() / scale).amax(dim=1).double().nan_to_num(nan=torch.inf)  # (b,)

            accepted = ratio <= 1
            time = torch.where(accepted, torch.where(arrives, end, time + step), time)
            state = torch.where(accepted[:, None], candidate, state)
            slope = torch.where(accepted[:, None], new_slope, slope)
            step = step * (SAFETY * ratio.clamp(min=1e-10) ** -0.2).clamp(SMALLEST_FACTOR, LARGEST_FACTOR)

            done = accepted & arrives
            result[rows[done]] = state[done]
            rows, time, state, step, slope = (values[~done] for values in (rows, time, state, step, slope))
            slowest = 1.0 if len(rows) == 0 else ((time - start) / (end - start)).min().item()
            progress.update(int(100 * slowest) - shown)
            shown = int(100 * slowest)
            if len(rows) == 0:
                return Solution(result, calls)
            if step.abs().min() < SMALLEST_STEP * abs(end - start):
                break
    worst = step.abs().argmin()
    raise RuntimeError(
        f"{len(rows)} of {len(result)} samples did not arrive in {max_steps} steps of at least {SMALLEST_STEP:g} of "
        f"the interval: sample {rows[worst].item()} stands at {time[worst].item():.6g} of {start:.6g} .. {end:.6g}; "
        "its derivative is not finite, or too rough for these tolerances"
    )


def _dormand_prince(
    derivative: Derivative,
    time: torch.Tensor,
    state: torch.Tensor,
    rows: torch.Tensor,
    step: torch.Tensor,
    slope: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The state after a step, its error estimate, and the derivative there: (b, n) each."""
    h = step[:, None].to(state.dtype)  # (b, 1)
    slopes = [slope]
    for stage in range(1, STAGES - 1):
        weighted = sum(float(a) * k for a, k in zip(RK45.A[stage], slopes, strict=False))
        slopes.append(derivative(time + float(RK45.C[stage]) * step, state + h * weighted, rows))
    after = state + h * sum(float(b) * k for b, k in zip(RK45.B, slopes, strict=True))
    slopes.append(derivative(time + step, after, rows))
    error = h * sum(float(e) * k for e, k in zip(RK45.E, slopes, strict=True))
    return after, error, slopes[-1]
