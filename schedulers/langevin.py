r"""Langevin dynamics on one noise level: the step, its step sizes, and what its discretisation does to the law.

At a fixed level with score s = -eps-hat / sigma, a step of size delta is

    x <- x + delta s + sqrt(2 delta) z,        z ~ N(0, I)

The score's slope is at most 1 / sigma^2, so it contracts for delta <= sigma^2 whatever the data. For data of variance
v on this level the stationary variance is v / (1 - delta / (2 v)): too large by delta / 2 to first order.

Annealing. On pure noise (s = -x / sigma^2) and with delta = e sigma^2, K steps take the variance from V sigma^2 to

    V <- (1 - e)^{2K} (V - c) + c,        c = 2 e / (1 - (1 - e)^2),

and the move to the next level, which keeps the signal, multiplies it by (ratio_i / ratio_{i+1})^2 in units of the new
sigma^2, ratio = sigma / alpha. The levels must be close and the steps many enough for V to stay near 1: Song & Ermon
2020 choose them so that it does (their criterion is one level of this recursion, from V = 1).

Sources: Song & Ermon 2020, "Improved Techniques for Training Score-Based Generative Models", arXiv:2006.09011;
Roberts & Tweedie 1996, "Exponential convergence of Langevin distributions and their discrete approximations",
Bernoulli 2.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch

from annealers.schedulers.gaussian_path import DATA, Level, Visit

LARGEST_END_VARIANCE = 1.2


def langevin_step(
    x: torch.Tensor, eps: torch.Tensor, sigma: float, step_size: float | torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """x + delta s + sqrt(2 delta) z; `step_size` is delta, () or (B, 1, ..)."""
    return x - (step_size / sigma) * eps + (2 * step_size) ** 0.5 * noise


def signal_kept(here: Level, there: Level) -> float:
    """The factor that moves a state to another level with its signal unchanged; a state that has none keeps its noise.

    Without signal (alpha = 0) the state is noise alone, and what is there to keep is that it is.
    """
    return there.alpha / here.alpha if here.alpha > 0 else there.sigma / here.sigma


def langevin_visits(levels: Sequence[Level], steps_per_level: int, denoise: bool) -> list[Visit]:
    """The network calls of K Langevin steps on each level, the last of which moves on, and of a closing denoising."""
    visits = []
    for here, there in zip(levels, [*levels[1:], levels[-1] if denoise else DATA], strict=True):
        visits += [Visit(here, here)] * (steps_per_level - 1) + [Visit(here, there)]
    return [*visits, Visit(levels[-1], DATA)] if denoise else visits


def end_variance(levels: Sequence[Level], step_size: float, steps_per_level: int) -> float:
    """Variance of annealed Langevin on pure noise after the last level, in units of its sigma^2; 1 is right.

    Args:
        levels: Levels from the noise to the data.
        step_size: e, in units of sigma^2 of each level.
        steps_per_level: K.
    """
    kept = (1 - step_size) ** (2 * steps_per_level)
    stationary = 2 * step_size / (1 - (1 - step_size) ** 2)
    variance = 1.0 / levels[0].sigma ** 2  # the chain starts from unit noise
    for here, there in zip(levels, [*levels[1:], None], strict=True):
        variance = kept * (variance - stationary) + stationary
        if there is not None and here.alpha > 0:
            variance *= ((here.sigma / here.alpha) / (there.sigma / there.alpha)) ** 2
    return variance


def warn_of_end_variance(levels: Sequence[Level], step_size: float, steps_per_level: int, factor: float = 1.0) -> None:
    """Warns of settings that end with too much noise, and says which would not; for a caller's `set_timesteps`.

    Args:
        levels, step_size, steps_per_level: As in `end_variance`.
        factor: The step size over the number that the user set, in which the advice is given.
    """
    variance = end_variance(levels, step_size, steps_per_level)
    if variance <= LARGEST_END_VARIANCE:
        return
    enough_step, enough = sufficient_settings(levels, LARGEST_END_VARIANCE)
    warnings.warn(
        f"{len(levels)} levels with {steps_per_level} Langevin steps of size {step_size / factor:.4g} end with "
        f"{variance:.3g} times the noise variance of the last level; {enough} of size {enough_step / factor:.3g} "
        f"would stay below {LARGEST_END_VARIANCE}",
        stacklevel=5,  # who called set_timesteps
    )


def sufficient_settings(levels: Sequence[Level], limit: float) -> tuple[float, int]:
    """The step size e and the smallest number of steps per level with which `end_variance` stays below a limit."""
    sizes = np.geomspace(0.01, 0.3, 30).round(3)  # three digits, so that the advice holds as it is printed
    candidates = [(e, _sufficient_steps(levels, e, limit)) for e in sizes]
    return min(((float(e), K) for e, K in candidates if K is not None), key=lambda setting: setting[1])


def _sufficient_steps(levels: Sequence[Level], step_size: float, limit: float) -> int | None:
    """By bisection: more steps bring the variance nearer to the stationary one; None if that is above the limit."""
    low, high = 0, 1
    while end_variance(levels, step_size, high) > limit:
        low, high = high, 2 * high
        if high > 2**20:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if end_variance(levels, step_size, middle) > limit else (low, middle)
    return high
