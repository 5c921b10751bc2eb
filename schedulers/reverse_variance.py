r"""The variance of an ancestral step, for every scheduler that takes one.

From level t to s, with a = alpha_t / alpha_s, v = sigma_t^2 - a^2 sigma_s^2, c = alpha_s v / sigma_t^2 and
beta-tilde = v sigma_s^2 / sigma_t^2, the exact reverse covariance for any data is beta-tilde I + c^2 Cov[x_0 | x_t].
In its place stands

    fixed_small     beta-tilde                                    right for data at one point
    fixed_large     v                                             right for data that is N(0, I)
    learned         exp(f)                                        f: second half of the network's channels
    learned_range   exp((f+1)/2 log v + (1-f)/2 log beta-tilde)   Nichol & Dhariwal 2021, Eq. 15
    optimal         beta-tilde + c^2 (sigma_t / alpha_t)^2 (1 - E||eps-hat||^2 / d)
                                                                  Bao et al. 2022, Theorem 1: the best isotropic one
    posterior       beta-tilde + c^2 (sigma_t / alpha_t)^2 f      f = alpha_t^2 / sigma_t^2 Var[x_0 | x_t], in 0 .. 1,
                                                                  of each coordinate of this state, as a network that
                                                                  is wrapped by `PosteriorVarianceModel` returns it

Sources: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239; Nichol & Dhariwal 2021,
"Improved Denoising Diffusion Probabilistic Models", arXiv:2102.09672; Bao, Li, Zhu, Zhang 2022, "Analytic-DPM",
arXiv:2201.06503.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from diffusers.utils.logging import tqdm

from annealers.schedulers.gaussian_path import (
    GaussianPathScheduler,
    Level,
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
    "posterior": "posterior",
}
TWO_HEADED = ("learned", "learned_range", "posterior")  # the second half of the channels is about the variance


class ReverseVariance(GaussianPathScheduler):
    """The variance of a step t -> s as `config.variance_type` says, for ancestral schedulers to inherit."""

    # ---- the variance of a step -------------------------------------------------------------------------------------

    def _standard_deviation(
        self, t: Level, s: Level, law: Transition, variance_values: torch.Tensor | None
    ) -> float | torch.Tensor:
        kind = VARIANCE_TYPES[self.config.variance_type]
        if kind == "fixed_small":
            return law.posterior_variance**0.5
        if kind == "fixed_large":
            return law.forward_variance**0.5
        if kind == "optimal":
            self._check_terminal_snr(t, needed_by="variance_type='optimal'")
            mean_squared_noise = np.interp(t.timestep, self.train_timesteps, self._mean_squared_noise())
            unexplained = max(0.0, 1 - float(mean_squared_noise))
            return (law.posterior_variance + (law.original_weight * t.sigma / t.alpha) ** 2 * unexplained) ** 0.5
        if kind == "posterior":
            self._check_terminal_snr(t, needed_by="variance_type='posterior'")
            uncertainty = (law.original_weight * t.sigma / t.alpha) ** 2 * variance_values.clamp(0, 1)
            return (law.posterior_variance + uncertainty).sqrt()
        if s.sigma > 0:
            floor = law.posterior_variance
        else:
            floor = self._variance_before_the_last([visit.here for visit in self._schedule])
        log_variance = learned_log_variance(kind, variance_values, math.log(floor), math.log(law.forward_variance))
        return (0.5 * log_variance).exp()

    def _variance_before_the_last(self, levels: list[Level]) -> float:
        """beta-tilde of the step before the last one; of a schedule of one step, its forward variance."""
        if len(levels) == 1:
            return levels[0].sigma ** 2
        t, s = levels[-2:]
        return transition(t.alpha, t.sigma, s.alpha, s.sigma).posterior_variance

    def _split(self, model_output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The prediction and, with learned variance, the values that make it."""
        expected = list(sample.shape)
        if self.config.variance_type in TWO_HEADED:
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
        measured = sorted({int(t) for t in (self.train_timesteps if timesteps is None else timesteps)})
        statistic = []
        for t in tqdm(measured, desc="calibrating the reverse variance"):
            level = self._level(t)
            self._check_terminal_snr(level)
            noise = standard_normal(original_samples, generator, working_dtype(original_samples))
            x_t = self.add_noise(original_samples, noise, t)
            output = model(x_t, torch.tensor(t, device=x_t.device), **model_kwargs)
            prediction, _ = self._split(output if isinstance(output, torch.Tensor) else output.sample, x_t)
            x_0 = self.original_sample(prediction, x_t, t)
            statistic.append((((x_t - level.alpha * x_0) / level.sigma) ** 2).mean().item())
        values = np.interp(self.train_timesteps, measured, statistic).tolist()
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
        rows = (torch.as_tensor(timesteps, device=sample.device) - int(self._is_flow)).long().reshape(-1)
        return (law.original_weight * sigma / alpha) ** 2 * (1 - statistic[rows].reshape(alpha.shape)).clamp(min=0)


def learned_log_variance(
    kind: str, values: torch.Tensor, log_small: float | torch.Tensor, log_large: float | torch.Tensor
) -> torch.Tensor:
    """The log-variance that a network's second half of channels stands for (Nichol & Dhariwal 2021, Eq. 15)."""
    if kind == "learned":
        return values
    fraction = (values + 1) / 2
    return fraction * log_large + (1 - fraction) * log_small
