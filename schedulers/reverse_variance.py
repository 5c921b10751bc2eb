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
    posterior       beta-tilde + c^2 (sigma_t / alpha_t)^2 f      f = alpha_t^2 / sigma_t^2 Var[x_0 | x_t], at least 0,
                                                                  of each coordinate of this state, as a network that
                                                                  is wrapped by `PosteriorVarianceModel` returns it

Where there is no signal (alpha_t = 0) neither statistic says anything about the data: `optimal` goes on with what the
nearest level with signal says, and `posterior` does without the second term, an error that later steps forget.

Sources: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239; Nichol & Dhariwal 2021,
"Improved Denoising Diffusion Probabilistic Models", arXiv:2102.09672; Bao, Li, Zhu, Zhang 2022, "Analytic-DPM",
arXiv:2201.06503.
"""

import math
from collections.abc import Callable, Iterable, Sequence

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

    _calibration: tuple[list[float], np.ndarray] | None = None

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
            data_variance = float(np.interp(t.timestep, self.train_timesteps, self._calibrated_data_variance()))
            unknown = data_variance * t.sigma**2 / (t.alpha**2 * data_variance + t.sigma**2)
            return (law.posterior_variance + law.original_weight**2 * unknown) ** 0.5
        if kind == "posterior":
            ratio = t.sigma / t.alpha if t.alpha > 0 else 0.0  # the values say nothing where there is no signal
            return (law.posterior_variance + (law.original_weight * ratio) ** 2 * variance_values.clamp(min=0)).sqrt()
        if s.sigma > 0:
            floor = law.posterior_variance
        else:
            floor = self._variance_before_the_last(self._visited_levels())
        log_variance = learned_log_variance(kind, variance_values, math.log(floor), math.log(law.forward_variance))
        return (0.5 * log_variance).exp()

    def _visited_levels(self) -> list[Level]:
        return list(dict.fromkeys(visit.here for visit in self._schedule))

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

        Where it is near 1, by 1 - SNR E|x_0 - x̂_0|^2 / d: the same for an exact network, far more precise where there
        is hardly any signal, and for an imperfect one what is best with its mean (Bao et al. 2022, arXiv:2206.07309).

        Args:
            model: The network, `model(sample, timestep, **model_kwargs)`; it returns a tensor or has it as `.sample`.
            original_samples: Data x_0 in the network's range, (B, *); a few hundred are enough.
            timesteps: Train timesteps to measure at; values between are interpolated. None for all T: one call each.
            generator: Source of the noise.

        Returns:
            The statistic, one value per train timestep.
        """
        measured = sorted({int(t) for t in (self.train_timesteps if timesteps is None else timesteps)})
        first, last = self.train_timesteps[[0, -1]]
        if not measured or not first <= measured[0] <= measured[-1] <= last:
            raise ValueError(f"timesteps must be train timesteps, {first} .. {last}, got {measured}")
        if not isinstance(original_samples, torch.Tensor) or len(original_samples) == 0:
            raise ValueError("original_samples must be one batch of data, a tensor of shape (B, *) with B >= 1")
        statistic = []
        for t in tqdm(measured, desc="calibrating the reverse variance"):
            level = self._level(t)
            self._check_terminal_snr(level)
            noise = standard_normal(original_samples, generator, working_dtype(original_samples))
            x_t = self.add_noise(original_samples, noise, t)
            output = model(x_t, torch.tensor(t, device=x_t.device), **model_kwargs)
            prediction, _ = self._split(output if isinstance(output, torch.Tensor) else output.sample, x_t)
            x_0 = self.original_sample(prediction, x_t, t)
            noise_hat = (x_t - level.alpha * x_0) / level.sigma
            by_noise = ((noise_hat**2).mean() / (noise**2).mean()).item()
            error = ((original_samples.to(x_0.dtype) - x_0) ** 2).mean().item()
            by_error = 1 - (level.alpha / level.sigma) ** 2 * error
            statistic.append(by_noise if by_noise < 0.5 else by_error)  # the precise one; they cross at a half
        if not np.isfinite(statistic).all():
            raise ValueError("the network or the data is not finite: nothing can be measured with it")
        data_variance = np.interp(self.train_timesteps, measured, self._data_variance(measured, statistic))
        alphas, sigmas = self._alphas[:-1].numpy(), self._sigmas[:-1].numpy()
        values = (sigmas**2 / (alphas**2 * data_variance + sigmas**2)).tolist()
        self.register_to_config(mean_squared_noise=values)
        self._mark_as_default(["mean_squared_noise"], marked=False)
        return values

    def _calibrated_data_variance(self) -> np.ndarray:
        """The variance S below, made once of the statistic in the config, which a pipeline may replace."""
        statistic = self.config.mean_squared_noise
        if statistic is None:
            raise ValueError("variance_type='optimal' needs a measured E||eps-hat||^2: call calibrate_variance first")
        if self._calibration is None or self._calibration[0] is not statistic:
            self._calibration = (statistic, self._data_variance(self.train_timesteps, statistic))
        return self._calibration[1]

    def _data_variance(self, timesteps: Sequence[int] | np.ndarray, mean_squared_noise: Sequence[float]) -> np.ndarray:
        """The variance S of isotropic Gaussian data with this E||eps-hat||^2 / d = sigma^2 / (alpha^2 S + sigma^2).

        Other data have another S on each level, but one that varies little from level to level, unlike the statistic.
        So S is what is interpolated, and what goes on unchanged to where there is no signal to measure it by.
        """
        rows = np.asarray(timesteps) - int(self._is_flow)
        alphas, sigmas = self._alphas.numpy()[rows], self._sigmas.numpy()[rows]
        statistic = np.clip(mean_squared_noise, 1e-12, 1.0)
        has_signal = alphas > 0
        if not has_signal.any():
            return np.zeros(len(rows))
        ratios = sigmas[has_signal] / alphas[has_signal]
        variance = ratios**2 * (1 - statistic[has_signal]) / statistic[has_signal]
        return np.interp(rows, rows[has_signal], variance)

    def _uncertainty(
        self, sample: torch.Tensor, timesteps: torch.Tensor, law: Transition, variance_values: torch.Tensor | None
    ) -> torch.Tensor:
        """The part of a reverse variance that comes from not knowing x_0, broadcastable to `sample`."""
        alpha, sigma = self._aligned(sample, timesteps)
        if variance_values is not None:
            ratio = torch.where(alpha > 0, sigma / alpha, 0.0)
            return (law.original_weight * ratio) ** 2 * variance_values.clamp(min=0)
        data_variance = torch.tensor(self._calibrated_data_variance(), dtype=sample.dtype, device=sample.device)
        rows = torch.as_tensor(timesteps, device=sample.device).to(sample.dtype) - int(self._is_flow)
        rows = rows.clamp(0, len(self) - 1).reshape(-1)
        below = rows.floor().long()
        above = (below + 1).clamp(max=len(self) - 1)
        data_variance = torch.lerp(data_variance[below], data_variance[above], rows - below).reshape(alpha.shape)
        return law.original_weight**2 * data_variance * sigma**2 / (alpha**2 * data_variance + sigma**2)


def learned_log_variance(
    kind: str, values: torch.Tensor, log_small: float | torch.Tensor, log_large: float | torch.Tensor
) -> torch.Tensor:
    """The log-variance that a network's second half of channels stands for (Nichol & Dhariwal 2021, Eq. 15)."""
    if kind == "learned":
        return values
    fraction = (values + 1) / 2
    return fraction * log_large + (1 - fraction) * log_small
