r"""DDPM ancestral sampling: walks the reverse chain one Gaussian step at a time.

From level t to the next level s of the schedule, with the network's x̂_0 at x_t (Ho et al. 2020, Eqs. 6-7),

    x_s = (a sigma_s^2 / sigma_t^2) x_t + (alpha_s v / sigma_t^2) x̂_0 + sqrt(variance) z,
    a = alpha_t / alpha_s,      v = sigma_t^2 - a^2 sigma_s^2      (v is beta_t when no level is skipped)

With the exact x̂_0 = E[x_0 | x_t] the mean is the exact E[x_s | x_t] for any data; only the variance is a choice, see
the table in `reverse_variance`.

The last step, to the data, is noise-free under every spacing unless `last_step_noise` is set. Keeping its noise is
what makes `optimal` exact for an isotropic Gaussian at any number of steps.

Source: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239.
"""

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config

from annealers.schedulers.gaussian_path import (
    GaussianPathSchedulerOutput,
    standard_normal,
    transition,
    working_dtype,
)
from annealers.schedulers.reverse_variance import VARIANCE_TYPES, ReverseVariance, learned_log_variance


class DDPMAncestralScheduler(ReverseVariance):
    """Samples the reverse chain of a Gaussian path. The arguments that Diffusers has keep its names and defaults.

    Args:
        num_train_timesteps: Number of levels T that the network was trained on.
        beta_start, beta_end: Ends of the beta schedule, in the units of a chain of `num_train_timesteps`.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2" (cosine), "sigmoid"; "geometric", the
            variance-exploding ladder from `sigma_min` to `sigma_max`; or "sub_vp", the sub-VP process of linear beta.
        trained_betas: The betas themselves, (T,), instead of a schedule.
        variance_type: Variance of a step, see the table in `reverse_variance`; "fixed_small", "fixed_large",
            "learned", "learned_range", "posterior" or "optimal", which needs `calibrate_variance` once.
        clip_sample: Whether x̂_0 is clipped to +-`clip_sample_range`. Right for pixels, wrong for latents.
        prediction_type: What the network returns: "epsilon", "sample" (x_0), "v_prediction", "score", or, on the flow
            path x_t = (1 - t) x_0 + t eps, which replaces the beta schedule, "flow_prediction" (eps - x_0).
        thresholding: Whether x̂_0 is thresholded dynamically, instead of clipped.
        dynamic_thresholding_ratio: The quantile of |x̂_0| that becomes the threshold.
        clip_sample_range: Largest magnitude of x̂_0 with `clip_sample`.
        sample_max_value: Largest dynamic threshold.
        timestep_spacing: "leading", "linspace", "trailing", named as in Lin et al. 2023, arXiv:2305.08891, Table 2,
            "karras" and "geometric": the train timesteps nearest to even steps of (sigma / alpha)^(1/7) and of its
            logarithm, or "optimal", the best for the bound, which needs `denoising_error`.
        steps_offset: Added to the timesteps of "leading" spacing.
        rescale_betas_zero_snr: Whether the last level is made pure noise.
        sigma_min, sigma_max: Ends of the geometric ladder, in units of the data.
        last_step_noise: Whether the step to the data keeps its noise.
        mean_squared_noise: E||eps-hat||^2 / d at each train timestep, (T,); written by `calibrate_variance`.
        denoising_error: E|x_0 - x̂_0|^2 / d at each train timestep, (T,), for "optimal" spacing.
        shift, use_dynamic_shifting, time_shift_type, shift_terminal: How the levels of a flow path are shifted towards
            the noise, as in `FlowMatchEulerDiscreteScheduler`.

    Example:
        >>> from annealers import DDPMAncestralScheduler
        >>> scheduler = DDPMAncestralScheduler(timestep_spacing="trailing")
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.tolist()
        [999, 749, 499, 249]
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
        variance_type: str | None = "fixed_small",
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
        last_step_noise: bool = False,
        mean_squared_noise: list[float] | None = None,
        denoising_error: list[float] | None = None,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
    ) -> None:
        if variance_type not in VARIANCE_TYPES:
            raise ValueError(f"variance_type must be one of {list(VARIANCE_TYPES)}, got {variance_type!r}")
        self._build_path()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> GaussianPathSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Takes one step, from the level of `timestep` to the next of the schedule.

        Args:
            model_output: Output of the network at (`sample`, `timestep`), (B, *); with learned variance (B, 2C, *).
            timestep: The entry of `timesteps` that the sample is on.
            sample: x_t, (B, *).
            generator: Source of the noise; a list gives each sample its own.
            return_dict: Whether to return a `GaussianPathSchedulerOutput` rather than a tuple.

        Returns:
            x_s and x̂_0, both (B, *), in the dtype of `sample`.

        Raises:
            ValueError: If the output's shape does not fit, the timestep is not in the schedule, or the variance is
                "optimal" and not calibrated.
        """
        position = self._position(timestep)
        t, s = self._schedule[position]
        self._check_terminal_snr(t)
        law = transition(t.alpha, t.sigma, s.alpha, s.sigma)

        dtype = working_dtype(sample)
        x_t = sample.to(dtype)
        prediction, variance_values = self._split(model_output.to(dtype), sample)
        x_0 = self._restrict(self._original_sample(prediction, x_t, t.alpha, t.sigma))

        x_s = law.mean(x_t, x_0)
        if s.sigma > 0 or self.config.last_step_noise:
            noise = standard_normal(sample, generator, dtype)
            x_s = x_s + self._standard_deviation(t, s, law, variance_values) * noise

        self._step_index = position + 1
        x_s, x_0 = x_s.to(sample.dtype), x_0.to(sample.dtype)
        return GaussianPathSchedulerOutput(x_s, x_0) if return_dict else (x_s, x_0)

    def reverse_law(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        previous_timesteps: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The model's p(x_s | x_t), for likelihoods: nothing is clipped, and the step to the data has a variance.

        That variance is, for "fixed_small" and the lower end of "learned_range", the one of the step before it, as in
        Nichol & Dhariwal 2021, because beta-tilde itself is 0: the step before it in `timesteps` or, if
        `previous_timesteps` is None, in the whole chain.

        Args:
            model_output: Output of the network, (B, *) or (B, 2C, *).
            sample: x_t, (B, *).
            timesteps: t, (B,).
            previous_timesteps: s, (B,); None for t - 1, -1 for the data.

        Returns:
            The mean, (B, *), the log-variance, broadcastable to it, and x̂_0, (B, *).
        """
        dtype = working_dtype(sample)
        x_t = sample.to(dtype)
        prediction, variance_values = self._split(model_output.to(dtype), sample)
        x_0 = self.original_sample(prediction, x_t, timesteps)
        law = self._transition(x_t, timesteps, previous_timesteps)
        mean = law.mean(x_t, x_0)

        first = [self._level(timestep) for timestep in self.train_timesteps[1::-1]]
        chain = first if previous_timesteps is None else self._visited_levels()
        floor = torch.where(law.posterior_variance > 0, law.posterior_variance, self._variance_before_the_last(chain))
        kind = VARIANCE_TYPES[self.config.variance_type]
        if kind in ("optimal", "posterior"):
            variance = law.posterior_variance + self._uncertainty(x_t, timesteps, law, variance_values)
            return mean, variance.log(), x_0
        if kind == "fixed_small":
            return mean, floor.log(), x_0
        if kind == "fixed_large":
            return mean, law.forward_variance.log(), x_0
        return mean, learned_log_variance(kind, variance_values, floor.log(), law.forward_variance.log()), x_0
