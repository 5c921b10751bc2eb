r"""Annealed Langevin dynamics.

Walks down a ladder of noise levels i and takes K Langevin steps on each, with step sizes in proportion to its noise,

    ncsnv2    x <- x + a_i s + sqrt(2 a_i) z,    a_i = e sigma_i^2    Song & Ermon 2020, Algorithm 1; default
    ncsn      x <- x + a_i / 2 s + sqrt(a_i) z,  a_i = e sigma_i^2    Song & Ermon 2019, Algorithm 1

so the same e is half the step in the second. Both papers give eps = e sigma_L^2 for their smallest level sigma_L: the
CIFAR-10 values are 6.2e-6 (e = 0.062, sigma_L = 0.01, K = 5, 232 levels from 50) and 2e-5 (e = 0.2, K = 100, 10 levels
from 1). The second paper's own code, like all of the first's, takes the full step.

From one level to the next the signal is kept, x <- (alpha_{i+1} / alpha_i) x: nothing happens in the coordinates y =
x / alpha of a variance-exploding ladder. After the last level one more call of the network gives the mean of the data,
x_0 = (x + sigma_L^2 s) / alpha_L (Tweedie's formula; Jolicoeur-Martineau et al. 2020).

With K = 1 this is not the time reversal of the noising process: a reverse step has as much drift per noise again as a
Langevin step, which only holds the law where it is. It needs close levels or many steps, see `langevin.end_variance`.

    symbol     code              shape    meaning
    x          sample            (B, *)   state
    s          -eps-hat / sigma  (B, *)   score
    K          steps_per_level   ()       Langevin steps on each level
    e          step_size         ()       step size over the variance of the noise of the level

Sources: Song & Ermon 2019, "Generative Modeling by Estimating Gradients of the Data Distribution", arXiv:1907.05600;
Song & Ermon 2020, "Improved Techniques for Training Score-Based Generative Models", arXiv:2006.09011;
Jolicoeur-Martineau, Piché-Taillefer, Tachet des Combes, Mitliagkas 2020, "Adversarial score matching and improved
sampling for image generation", arXiv:2009.05475, Sec. 3.1.
"""

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config

from annealers.schedulers.gaussian_path import (
    DATA,
    GaussianPathScheduler,
    GaussianPathSchedulerOutput,
    Level,
    Visit,
    standard_normal,
    working_dtype,
)
from annealers.schedulers.langevin import langevin_step, langevin_visits, signal_kept, warn_of_end_variance

STEP_CONVENTIONS = {"ncsnv2": 1.0, "ncsn": 0.5}  # delta / a_i, the step of x + delta s + sqrt(2 delta) z
LEVELS = ("geometric", "path")


class AnnealedLangevinScheduler(GaussianPathScheduler):
    """Samples by Langevin steps on a ladder of noise levels. What Diffusers has keeps its names and defaults.

    `timesteps` repeats each level K times and closes with one more entry for the denoising, N K + 1 in all.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr, sigma_min,
            sigma_max, prediction_type: The path and the network, as in `DDPMAncestralScheduler`.
        steps_per_level: K, >= 1. With the default step size the default is enough for 20 levels or more on any path;
            NCSNv2's 5 steps of 0.062 are for its 232 evenly spaced ones.
        step_size: e, in 0 .. 1: the step size in units of the noise variance of each level.
        step_convention: "ncsnv2" or "ncsn": whether e counts the full step or half of it enters the drift.
        levels: "geometric" spaces the levels evenly in log sigma / alpha, from end to end of the path; "path" as
            `timestep_spacing` says.
        denoise: Whether the last network call denoises.
        clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: How x̂_0 is kept in
            range, as in `DDPMAncestralScheduler`.
        timestep_spacing, steps_offset, denoising_error, shift, use_dynamic_shifting, time_shift_type, shift_terminal:
            The levels of "path", as in `DDPMAncestralScheduler`.

    Example:
        >>> from annealers import AnnealedLangevinScheduler
        >>> scheduler = AnnealedLangevinScheduler(10, beta_schedule="geometric", sigma_min=0.01, sigma_max=1.0,
        ...                                       steps_per_level=100, step_size=0.2)
        >>> scheduler.set_timesteps(10)
        >>> len(scheduler.timesteps), scheduler.order
        (1001, 100)
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
        steps_per_level: int = 10,
        step_size: float = 0.2,  # Song & Ermon 2019: 2e-5 / 0.01^2
        step_convention: str = "ncsnv2",
        levels: str = "geometric",
        denoise: bool = True,
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
        if isinstance(steps_per_level, bool) or not isinstance(steps_per_level, int) or steps_per_level < 1:
            raise ValueError(f"steps_per_level must be a positive integer, got {steps_per_level!r}")
        if step_convention not in STEP_CONVENTIONS:
            raise ValueError(f"step_convention must be one of {list(STEP_CONVENTIONS)}, got {step_convention!r}")
        if not 0 < step_size * STEP_CONVENTIONS[step_convention] <= 1:
            raise ValueError(
                f"the Langevin step must be in (0, 1] sigma^2, or it may diverge; got step_size={step_size} with "
                f"step_convention={step_convention!r}"
            )
        if levels not in LEVELS:
            raise ValueError(f"levels must be one of {LEVELS}, got {levels!r}")
        self._entries_per_level = self.order = steps_per_level
        self._build_path()

    # ---- the levels and the network calls on them -------------------------------------------------------------------

    def _spaced_timesteps(self, N: int, mu: float | None = None) -> np.ndarray:
        if self.config.levels == "path":
            return super()._spaced_timesteps(N, mu)
        ends = self._extreme_ratios(needed_by="levels='geometric', unlike 'path',")
        return self._timesteps_of_ratios(np.geomspace(*ends, self._checked_count(N)))

    def _visits(self, levels: list[Level]) -> list[Visit]:
        if self.num_inference_steps is not None:
            factor = STEP_CONVENTIONS[self.config.step_convention]
            warn_of_end_variance(levels, self._relative_step_size, self.config.steps_per_level, factor)
        return langevin_visits(levels, self.config.steps_per_level, self.config.denoise)

    @property
    def _relative_step_size(self) -> float:
        """delta / sigma_i^2."""
        return self.config.step_size * STEP_CONVENTIONS[self.config.step_convention]

    # ---- reverse: noise to data -------------------------------------------------------------------------------------

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> GaussianPathSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Takes one Langevin step on the level of `timestep` and, if it is the last there, moves to the next level.

        Args:
            model_output: Output of the network at (`sample`, `timestep`), (B, *).
            timestep: The entry of `timesteps` that the sample is on.
            sample: x, (B, *).
            generator: Source of the noise; a list gives each sample its own.
            return_dict: Whether to return a `GaussianPathSchedulerOutput` rather than a tuple.

        Returns:
            The next x, which is x̂_0 after the closing step, and x̂_0, both (B, *), in the dtype of `sample`.

        Raises:
            ValueError: If the output's shape does not fit, the timestep is not in the schedule, or there is none yet.
        """
        self._check_ready()
        position = self._position(timestep)
        here, there = self._schedule[position]
        self._check_shape(model_output, sample)

        dtype = working_dtype(sample)
        x = sample.to(dtype)
        eps, x_0 = self._noise_and_original(model_output.to(dtype), x, here)
        if self.config.denoise and there == DATA:
            x = x_0
        else:
            noise = standard_normal(sample, generator, dtype)
            x = langevin_step(x, eps, here.sigma, self._relative_step_size * here.sigma**2, noise)
            x = x * signal_kept(here, there)

        self._step_index = position + 1
        x, x_0 = x.to(sample.dtype), x_0.to(sample.dtype)
        return GaussianPathSchedulerOutput(x, x_0) if return_dict else (x, x_0)
