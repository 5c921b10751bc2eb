r"""Settings of our schedulers that pipelines are run with, and the law that each of them makes of Gaussian data.

With the exact network of a Gaussian every step is affine in the state and in its noise, so a whole run is

    x_end = c + A x_start + sum_k B_k z_k,        mean c + A E[x_start],    variance A^2 Var[x_start] + sum_k B_k^2

`sampled_law` reads c, A and every B_k off one run of the scheduler by itself, on a batch whose first sample sees no
noise at all, whose second starts at 1, and of which each other one sees a single z_k = 1. No pipeline is involved:
that a pipeline's samples have this law shows that it led the scheduler through the right steps.
"""

import copy
import math
from dataclasses import dataclass, field
from unittest import mock

import torch
from diffusers import SchedulerMixin

from annealers import (
    AnnealedLangevinScheduler,
    DDPMAncestralScheduler,
    ModifiedEulerMaruyamaScheduler,
    PredictorCorrectorScheduler,
)
from annealers.exact import Law, path_point
from annealers.schedulers import gaussian_path


@dataclass(frozen=True)
class Setting:
    """A scheduler, and levels enough to sample well.

    Args:
        name: What is special.
        scheduler: Its class.
        config: Its settings.
        steps: Number of levels with which it is right.
        tolerance: How far from the standard deviation of the data that is, relative to it.
        order: Network calls per level.
        is_exact: Whether the variance is the one measured on the data, with which the law is right at any `steps`.
    """

    name: str
    scheduler: type
    config: dict = field(hash=False)
    steps: int
    tolerance: float
    order: int = 1
    is_exact: bool = False

    def make(self, config, variance: float | None = None, **more):
        """The scheduler from the config of a pipeline's; the variance is that of the data, for exact settings."""
        scheduler = self.scheduler.from_config(config, **self.config, **more)
        if not self.is_exact:
            return scheduler
        points = [scheduler.signal_and_noise(int(t)) for t in scheduler.train_timesteps]
        statistic = [float(sigma**2 / (alpha**2 * variance + sigma**2)) for alpha, sigma in points]
        return self.scheduler.from_config(config, **self.config, **more, mean_squared_noise=statistic)


KARRAS = {"timestep_spacing": "karras"}
EXACT = {"variance_type": "optimal", "last_step_noise": True, "timestep_spacing": "trailing"}
MATTHEWS = {"corrector": "leimkuhler_matthews", "corrector_steps": 2, "snr": 0.4}
SECOND_ORDER = {"predictor": "probability_flow", "solver_order": 2}

ALD, MEM, PC = AnnealedLangevinScheduler, ModifiedEulerMaruyamaScheduler, PredictorCorrectorScheduler
SETTINGS = [
    Setting("ancestral, exact", DDPMAncestralScheduler, EXACT, 8, 1e-6, is_exact=True),
    Setting("ancestral", DDPMAncestralScheduler, KARRAS, 60, 0.2),
    Setting("modified Euler-Maruyama", MEM, KARRAS, 60, 0.2),
    Setting("Euler-Maruyama", MEM, {**KARRAS, "variance": "euler_maruyama"}, 60, 0.2),
    Setting("annealed Langevin", ALD, {"steps_per_level": 6, "step_size": 0.3}, 20, 0.25, order=6),
    Setting("predictor-corrector", PC, KARRAS, 40, 0.2, order=2),
    Setting("predictor-corrector, exact", PC, {**EXACT, **MATTHEWS}, 8, 1e-6, order=3, is_exact=True),
    Setting("predictor-corrector, full", PC, {**KARRAS, **SECOND_ORDER, "layout": "full"}, 12, 0.1, order=2),
    Setting("on some levels", PC, {**KARRAS, **SECOND_ORDER, "corrector_range": (0.1, 0.6)}, 12, 0.1, order=2),
]


def sampled_law(
    scheduler: SchedulerMixin,
    law: Law,
    mean: float,
    variance: float,
    start: int = 0,
    from_noise: bool = True,
    **schedule: object,
) -> tuple[float, float]:
    """Mean and standard deviation of what the scheduler makes of a law with this mean and variance, by itself.

    Args:
        scheduler: The scheduler; its state stays as it is.
        law: The law of the data.
        mean, variance: Its moments.
        start: Position in `timesteps` to start at.
        from_noise: Whether from unit noise or from noised data.
        schedule: Arguments of `set_timesteps`.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(**schedule)
    scheduler.set_begin_index(start)
    timesteps = scheduler.timesteps[start:]
    most_draws = 2 * len(timesteps) + 1  # a correction draws twice at most
    x = torch.zeros(2 + most_draws, 1, dtype=torch.float64)
    x[1] = 1
    drawn = iter(range(2, 2 + most_draws))

    def one_unit(shape, **_):
        noise = torch.zeros(shape, dtype=torch.float64)
        noise[next(drawn)] = 1
        return noise

    with mock.patch.object(gaussian_path, "randn_tensor", one_unit):
        for t in timesteps:
            output = law.prediction(scheduler.config.prediction_type, x, *path_point(scheduler, t))
            x = scheduler.step(output, t, x).prev_sample
    constant, gain, noises = x[0].item(), (x[1] - x[0]).item(), x[2:] - x[0]
    alpha, sigma = (float(c) for c in scheduler.signal_and_noise(timesteps[0]))
    at_start = (0.0, 1.0) if from_noise else (alpha * mean, alpha**2 * variance + sigma**2)
    return constant + gain * at_start[0], math.sqrt(gain**2 * at_start[1] + (noises**2).sum().item())


def assert_law(samples: torch.Tensor, mean: float, std: float) -> None:
    """To within four standard errors of a finite sample."""
    standard_error = std / math.sqrt(samples.numel())
    assert abs(samples.double().mean().item() - mean) < 4 * standard_error
    assert abs(samples.double().std().item() - std) < 4 * standard_error / math.sqrt(2)
