r"""DDPM ancestral sampling: walks the reverse chain one Gaussian step at a time.

From level t to the next level s of the schedule, with the network's x̂_0 at x_t (Ho et al. 2020, Eqs. 6-7),

    x_s = (a sigma_s^2 / sigma_t^2) x_t + (alpha_s v / sigma_t^2) x̂_0 + sqrt(variance) z,
    a = alpha_t / alpha_s,      v = sigma_t^2 - a^2 sigma_s^2      (v is beta_t when no level is skipped)

With the exact x̂_0 = E[x_0 | x_t] the mean is the exact E[x_s | x_t] for any data; only the variance is a choice:

    fixed_small     v sigma_s^2 / sigma_t^2                       beta-tilde, right for data at one point
    fixed_large     v                                             right for data that is N(0, I)
    learned         exp(f)                                        f: second half of the network's channels
    learned_range   exp((f+1)/2 log v + (1-f)/2 log beta-tilde)   Nichol & Dhariwal 2021, Eq. 15
    optimal         beta-tilde + (alpha_s v / sigma_t^2)^2 (sigma_t / alpha_t)^2 (1 - E||eps-hat||^2 / d)
                                                                  Bao et al. 2022, Theorem 1: the best isotropic one

The last step, to the data, is noise-free under every spacing unless `last_step_noise` is set. Keeping its noise is
what makes `optimal` exact for an isotropic Gaussian at any number of steps.

Sources: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239; Nichol & Dhariwal 2021,
"Improved Denoising Diffusion Probabilistic Models", arXiv:2102.09672; Bao, Li, Zhu, Zhang 2022, "Analytic-DPM",
arXiv:2201.06503.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.logging import tqdm

from annealers.schedulers.gaussian_path import (
    GaussianPathScheduler,
    GaussianPathSchedulerOutput,
    Transition,
    standard_normal,
    transition,
    working_dtype,
)

# The two names that end in _log are Diffusers' for the same variances, stored as logarithms; None is what a multistep
# solver's config says of a network without learned variance.
VARIANCE_TYPES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    None: "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned": "learned",
    "learned_range": "learned_range",
    "optimal": "optimal",
}


class DDPMAncestralScheduler(GaussianPathScheduler):
    """Samples the reverse chain of a Gaussian path. The arguments that Diffusers has keep its names and defaults.

    Args:
        num_train_timesteps: Number of levels T that the network was trained on.
        beta_start, beta_end: Ends of the beta schedule, in the units of a chain of `num_train_timesteps`.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2" (cosine), "sigmoid", or "geometric": the
            variance-exploding ladder from `sigma_min` to `sigma_max`.
        trained_betas: The betas themselves, (T,), instead of a schedule.
        variance_type: Variance of a step, see the table at the top of this file; "fixed_small", "fixed_large",
            "learned", "learned_range" or "optimal", which needs `calibrate_variance` once.
        clip_sample: Whether x̂_0 is clipped to +-`clip_sample_range`. Right for pixels, wrong for latents.
        prediction_type: What the network returns: "epsilon", "sample" (x_0), "v_prediction" or "score".
        thresholding: Whether x̂_0 is thresholded dynamically, instead of clipped.
        dynamic_thresholding_ratio: The quantile of |x̂_0| that becomes the threshold.
        clip_sample_range: Largest magnitude of x̂_0 with `clip_sample`.
        sample_max_value: Largest dynamic threshold.
        timestep_spacing: "leading", "linspace", "trailing", named as in Lin et al. 2023, arXiv:2305.08891, Table 2,
            or "karras": the train timesteps nearest to even steps of (sigma / alpha)^(1/7).
        steps_offset: Added to the timesteps of "leading" spacing.
        rescale_betas_zero_snr: Whether the last level is made pure noise.
        sigma_min, sigma_max: Ends of the geometric ladder, in units of the data.
        last_step_noise: Whether the step to the data keeps its noise.
        mean_squared_noise: E||eps-hat||^2 / d at each train timestep, (T,); written by `calibrate_variance`.

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
    ) -> None:
        if variance_type not in VARIANCE_TYPES:
            raise ValueError(f"variance_type must be one of {list(VARIANCE_TYPES)}, got {variance_type!r}")
        self._build_path()
        if mean_squared_noise is not None and len(mean_squared_noise) != len(self):
            raise ValueError(
                f"mean_squared_noise needs one value per train timestep, {len(self)}, got {len(mean_squared_noise)}"
            )

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
        t, s = self._levels(position)
        self._check_terminal_snr(t)
        alpha_t, sigma_t = self._coefficients(t)
        law = transition(alpha_t, sigma_t, *self._coefficients(s))

        dtype = working_dtype(sample)
        x_t = sample.to(dtype)
        prediction, variance_values = self._split(model_output.to(dtype), sample)
        x_0 = self._restrict(self._original_sample(prediction, x_t, alpha_t, sigma_t))

        x_s = law.sample_weight * x_t + law.original_weight * x_0
        if s >= 0 or self.config.last_step_noise:
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
        mean = law.sample_weight * x_t + law.original_weight * x_0

        chain = [1, 0][-len(self) :] if previous_timesteps is None else self._schedule
        floor = torch.where(law.posterior_variance > 0, law.posterior_variance, self._variance_before_the_last(chain))
        kind = VARIANCE_TYPES[self.config.variance_type]
        if kind == "optimal":
            variance = law.posterior_variance + self._uncertainty(x_t, timesteps, law)
            return mean, variance.log(), x_0
        if kind == "fixed_small":
            return mean, floor.log(), x_0
        if kind == "fixed_large":
            return mean, law.forward_variance.log(), x_0
        return mean, learned_log_variance(kind, variance_values, floor.log(), law.forward_variance.log()), x_0

    # ---- the variance of a step -------------------------------------------------------------------------------------

    def _standard_deviation(
        self, t: int, s: int, law: Transition, variance_values: torch.Tensor | None
    ) -> float | torch.Tensor:
        kind = VARIANCE_TYPES[self.config.variance_type]
        if kind == "fixed_small":
            return law.posterior_variance**0.5
        if kind == "fixed_large":
            return law.forward_variance**0.5
        if kind == "optimal":
            self._check_terminal_snr(t, needed_by="variance_type='optimal'")
            alpha_t, sigma_t = self._coefficients(t)
            unexplained = max(0.0, 1 - self._mean_squared_noise()[t])
            return (law.posterior_variance + (law.original_weight * sigma_t / alpha_t) ** 2 * unexplained) ** 0.5
        floor = law.posterior_variance if s >= 0 else self._variance_before_the_last(self._schedule)
        log_variance = learned_log_variance(kind, variance_values, math.log(floor), math.log(law.forward_variance))
        return (0.5 * log_variance).exp()

    def _variance_before_the_last(self, schedule: list[int]) -> float:
        """beta-tilde of the step before the last one; of a schedule of one step, its forward variance."""
        if len(schedule) == 1:
            return self._coefficients(schedule[0])[1] ** 2
        t, s = schedule[-2:]
        return transition(*self._coefficients(t), *self._coefficients(s)).posterior_variance

    def _split(self, model_output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The prediction and, with learned variance, the values that make it."""
        expected = list(sample.shape)
        if self.config.variance_type in ("learned", "learned_range"):
            if sample.ndim < 2:
                raise ValueError(f"learned variance needs a channel axis, got a sample of shape {tuple(sample.shape)}")
            expected[1] *= 2
        if list(model_output.shape) != expected:
            raise ValueError(
                f"variance_type={self.config.variance_type!r} and a sample of shape {tuple(sample.shape)} need a "
                f"model output of shape {tuple(expected)}, got {tuple(model_output.shape)}"
            )
        if expected == list(sample.shape):
            return model_output, None
        prediction, variance_values = model_output.chunk(2, dim=1)
        return prediction, variance_values

    # ---- the optimal variance ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate_variance(
        self,
        model: Callable[..., object],
        original_samples: torch.Tensor,
        timesteps: Iterable[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **model_kwargs: object,
    ) -> list[float]:
        """Measures E||eps-hat||^2 / d and stores it in the config, where `save_pretrained` keeps it.

        Args:
            model: The network, `model(sample, timestep, **model_kwargs)`; it returns a tensor or has it as `.sample`.
            original_samples: Data x_0 in the network's range, (B, *); a few hundred are enough.
            timesteps: Train timesteps to measure at; values between are interpolated. None for all T: one call each.
            generator: Source of the noise.

        Returns:
            The statistic, one value per train timestep.
        """
        measured = sorted({int(t) for t in (range(len(self)) if timesteps is None else timesteps)})
        statistic = []
        for t in tqdm(measured, desc="calibrating the reverse variance"):
            self._check_terminal_snr(t)
            noise = standard_normal(original_samples, generator, working_dtype(original_samples))
            x_t = self.add_noise(original_samples, noise, t)
            output = model(x_t, torch.tensor(t, device=x_t.device), **model_kwargs)
            prediction, _ = self._split(output if isinstance(output, torch.Tensor) else output.sample, x_t)
            alpha, sigma = self._coefficients(t)
            x_0 = self.original_sample(prediction, x_t, t)
            statistic.append((((x_t - alpha * x_0) / sigma) ** 2).mean().item())
        values = np.interp(np.arange(len(self)), measured, statistic).tolist()
        # Diffusers' from_config drops what it believes to be a default
        defaults = [name for name in self.config.get("_use_default_values", []) if name != "mean_squared_noise"]
        self.register_to_config(mean_squared_noise=values, _use_default_values=defaults)
        return values

    def _mean_squared_noise(self) -> list[float]:
        if self.config.mean_squared_noise is None:
            raise ValueError("variance_type='optimal' needs a measured E||eps-hat||^2: call calibrate_variance first")
        return self.config.mean_squared_noise

    def _uncertainty(self, sample: torch.Tensor, timesteps: torch.Tensor, law: Transition) -> torch.Tensor:
        """The part of the optimal variance that comes from not knowing x_0, (B, 1, ..)."""
        alpha, sigma = self._aligned(sample, timesteps)
        statistic = torch.tensor(self._mean_squared_noise(), dtype=sample.dtype, device=sample.device)
        rows = torch.as_tensor(timesteps, device=sample.device).reshape(-1)
        return (law.original_weight * sigma / alpha) ** 2 * (1 - statistic[rows].reshape(alpha.shape)).clamp(min=0)


def learned_log_variance(
    kind: str, values: torch.Tensor, log_small: float | torch.Tensor, log_large: float | torch.Tensor
) -> torch.Tensor:
    """The log-variance that a network's second half of channels stands for (Nichol & Dhariwal 2021, Eq. 15)."""
    if kind == "learned":
        return values
    fraction = (values + 1) / 2
    return fraction * log_large + (1 - fraction) * log_small
