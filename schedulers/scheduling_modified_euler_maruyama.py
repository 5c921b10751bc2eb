r"""Modified Euler-Maruyama: the reversed Ornstein-Uhlenbeck chain with less noise near the data.

With step sizes gamma_1 .. gamma_N, counted from the data, and tau_k = gamma_1 + .. + gamma_k, from level k to k - 1,

    x_{k-1} = x_k + gamma_k (x_k + 2 s(x_k, tau_k)) + sqrt(variance) z,    s = -eps-hat / sigma_k

    modified_euler_maruyama    2 gamma_k tau_{k-1} / tau_k     0 at k = 1: the last step is noise-free
    euler_maruyama             2 gamma_k                       for comparison; its last step is noise-free too

The first factor is that of the Brownian bridge which the reversed process is on its way to the data (Durham & Gallant
2002; as a sampler, De Bortoli et al. 2021). On a geometric ladder, whose process is a Brownian motion, the step is the
exact ancestral one. On a beta schedule the variance is beta-tilde (1 + gamma tau_{k-1} / 3 + ..), to first order the
small variance of ancestral sampling. Each step has weak order 1.

The step sizes come from the levels that are visited. They may be chosen by their own rule, growing away from the data
from gamma_1 = g to gamma_N = R g, with u = (k - 1) / (N - 1):

    linear    g (1 + (R - 1) u)                       cosine    g (1 + (R - 1) (1 - cos(pi u)) / 2)
    tanh      g (1 + (R - 1) (1 + tanh(3 (2 u - 1)) / tanh(3)) / 2)

with g such that tau_N is that of the last train timestep; each level is then the nearest train timestep. The network
is asked at the level that the state is on. (Slides often write s at the level that the step goes to, and the linear
rule with its largest step next to the data; trained networks know neither.)

    symbol     code                shape    meaning
    x_k        sample              (B, *)   state
    gamma_k    step sizes          (N,)     steps of the chain's clock
    tau        clock               ()       1/2 log(1 + sigma^2 / alpha^2); sigma^2 / (2 alpha^2) on a geometric ladder
    R          step_ratio          ()       gamma_N / gamma_1

Sources: Durham & Gallant 2002, "Numerical Techniques for Maximum Likelihood Estimation of Continuous-Time Diffusion
Processes", J. Business & Economic Statistics 20; De Bortoli, Thornton, Heng, Doucet 2021, "Diffusion
Schrödinger Bridge with Applications to Score-Based Generative Modeling", arXiv:2106.01357.
"""

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config

from annealers.schedulers.gaussian_path import (
    GaussianPathScheduler,
    GaussianPathSchedulerOutput,
    standard_normal,
    working_dtype,
)
from annealers.schedulers.reverse_steps import clock, ddpm, euler_maruyama, modified_euler_maruyama

VARIANCES = {"modified_euler_maruyama": modified_euler_maruyama, "euler_maruyama": euler_maruyama}
STEP_SCHEDULES = ("path", "linear", "cosine", "tanh")


class ModifiedEulerMaruyamaScheduler(GaussianPathScheduler):
    """Samples the reversed Ornstein-Uhlenbeck chain. The arguments that Diffusers has keep its names and defaults.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr, sigma_min,
            sigma_max, prediction_type: The path and the network, as in `DDPMAncestralScheduler`.
        variance: "modified_euler_maruyama" or "euler_maruyama".
        step_schedule: "path" visits the levels that `timestep_spacing` says; "linear", "cosine" and "tanh" choose the
            step sizes by the rules at the top of this file.
        step_ratio: R, the largest step size over the smallest, >= 1. Default: that of the linear beta schedule.
        clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: How x̂_0 is kept in
            range, as in `DDPMAncestralScheduler`.
        timestep_spacing, steps_offset, denoising_error, shift, use_dynamic_shifting, time_shift_type, shift_terminal:
            The levels, as in `DDPMAncestralScheduler`.

    Example:
        >>> from annealers import ModifiedEulerMaruyamaScheduler
        >>> scheduler = ModifiedEulerMaruyamaScheduler(step_schedule="linear")
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.tolist()
        [999, 707, 409, 45]
    """

    __module__ = "annealers"  # the name that model_index.json records

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance: str = "modified_euler_maruyama",
        step_schedule: str = "path",
        step_ratio: float = 200.0,  # 0.02 / 0.0001, Ho et al. 2020
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        denoising_error: list[float] | None = None,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
    ) -> None:
        if variance not in VARIANCES:
            raise ValueError(f"variance must be one of {list(VARIANCES)}, got {variance!r}")
        if step_schedule not in STEP_SCHEDULES:
            raise ValueError(f"step_schedule must be one of {STEP_SCHEDULES}, got {step_schedule!r}")
        if not 1 <= step_ratio < np.inf:
            raise ValueError(
                f"step_ratio, the largest step size over the smallest, must be finite and >= 1, got {step_ratio}"
            )
        self._build_path()

    def _spaced_timesteps(self, N: int, mu: float | None = None) -> np.ndarray:
        """The levels of `timestep_spacing`, or those to which N step sizes of the chosen rule lead."""
        if self.config.step_schedule == "path":
            return super()._spaced_timesteps(N, mu)
        last = self._level(self.train_timesteps[-1])
        needed_by = f"step_schedule={self.config.step_schedule!r}, whose step sizes add up to its clock,"
        self._check_terminal_snr(last, needed_by)
        sizes = step_sizes(self.config.step_schedule, self._checked_count(N), self.config.step_ratio)
        clocks = clock(last, self._is_brownian) * np.cumsum(sizes)  # tau_1 .. tau_N
        ratios = np.sqrt(2 * clocks) if self._is_brownian else np.sqrt(np.expm1(2 * clocks))
        return self._timesteps_of_ratios(ratios[::-1])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> GaussianPathSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Takes one step, from the level of `timestep` to the next of the schedule.

        Args:
            model_output: Output of the network at (`sample`, `timestep`), (B, *).
            timestep: The entry of `timesteps` that the sample is on.
            sample: x_k, (B, *).
            generator: Source of the noise; a list gives each sample its own.
            return_dict: Whether to return a `GaussianPathSchedulerOutput` rather than a tuple.

        Returns:
            x_{k-1} and x̂_0, both (B, *), in the dtype of `sample`.

        Raises:
            ValueError: If the output's shape does not fit, the timestep is not in the schedule, or there is none yet.
        """
        self._check_ready()
        position = self._position(timestep)
        t, s = self._schedule[position]
        self._check_shape(model_output, sample)

        dtype = working_dtype(sample)
        x_t = sample.to(dtype)
        eps, x_0 = self._noise_and_original(model_output.to(dtype), x_t, t)
        if t.alpha == 0:
            mean, variance = ddpm(x_t, x_0, t, s)
        else:
            mean, variance = VARIANCES[self.config.variance](x_t, eps, t, s, self._is_brownian)
        x_s = mean
        if s.sigma > 0:
            x_s = mean + variance**0.5 * standard_normal(sample, generator, dtype)

        self._step_index = position + 1
        x_s, x_0 = x_s.to(sample.dtype), x_0.to(sample.dtype)
        return GaussianPathSchedulerOutput(x_s, x_0) if return_dict else (x_s, x_0)


def step_sizes(schedule: str, N: int, ratio: float) -> np.ndarray:
    """gamma_1 .. gamma_N, increasing from the data to the noise, with sum 1, (N,)."""
    u = np.linspace(0, 1, N)
    growth = {
        "linear": u,
        "cosine": (1 - np.cos(np.pi * u)) / 2,
        "tanh": (1 + np.tanh(3 * (2 * u - 1)) / np.tanh(3)) / 2,
    }[schedule]
    sizes = 1 + (ratio - 1) * growth
    return sizes / sizes.sum()
