r"""Denoising: what a diffusion model says about the clean data, and what happens when its answer is denoised again.

Of x_t = alpha x_0 + sigma eps the best guess of x_0 in the mean square is its conditional mean, and Tweedie's formula
(Robbins 1956; Efron 2011) finds that in the score s = grad log p_t alone, whatever the law of the data:

    E[x_0 | x_t] = (x_t + sigma^2 s(x_t)) / alpha

Every prediction type is this mean in other words, so every diffusion model is a family of denoising autoencoders, one
per noise level (Vincent 2011). At the level varsigma = sigma / alpha, in the coordinates of the data,

    DAE(x) = E[x_0 | x_0 + varsigma eps = x] = x + varsigma^2 grad log p_varsigma(x)

and a step that goes a part eta of the way is gradient ascent on the log-density of the noisy data,

    x <- (1 - eta) x + eta DAE(x) = x + eta varsigma^2 grad log p_varsigma(x).

Near a fixed point x* its error is multiplied by (1 - eta) I + eta J, J = dDAE / dx, and J = Cov[x_0 | x*] / varsigma^2
by Tweedie's formula of second order: x* is an attractor where J is smaller than 1, and the smaller, the faster.

**Stored data** x_1 .. x_N (`exact.FiniteData`): DAE(x) = sum_i P(x_i | x) x_i. With little noise there is a clear
winner and each x_i is an attractor, J near 0; with much noise all are as likely, and the only one is near the mean.

**Linear** (`LinearDenoisingAutoencoder`): of all affine maps the best, for data with mean m and covariance C, is

    DAE(x) = m + C (C + varsigma^2 I)^-1 (x - m) = m + V diag(l / (l + varsigma^2)) V^T (x - m),    C = V diag(l) V^T,

and without noise, kept to k directions, m + V V^T (x - m): the projection on the principal subspace. J is 1 along it,
so all of the subspace stays where it is, and no stored point attracts. Attractors need a DAE that is not linear.

Sources: Robbins 1956, "An Empirical Bayes Approach to Statistics", Proc. 3rd Berkeley Symp.; Efron 2011, "Tweedie's
Formula and Selection Bias", J. Amer. Statist. Assoc. 106; Vincent 2011, "A Connection Between Score Matching and
Denoising Autoencoders", Neural Computation 23; Alain & Bengio 2014, "What Regularized Auto-Encoders Learn from the
Data-Generating Distribution", arXiv:1211.4246; Baldi & Hornik 1989, "Neural Networks and Principal Component Analysis:
Learning from Examples Without Local Minima", Neural Networks 2.

    symbol      code          shape              meaning
    x_t         sample        (B, *)             state on the path of the scheduler
    x           x             (B, *)             noisy data, in the coordinates of the data
    varsigma    noise_level   ()                 standard deviation of the noise, in units of the data
    eta         step_size     ()                 part of the way to DAE(x), 0 < eta <= 1
    m, V, l     mean, directions, variances      (*,), (D, k), (k,)    of the data; D = number of coordinates
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin

from annealers.attractors import attraction_rate, iterative_denoising
from annealers.calibration import first_channels
from annealers.exact import PREDICTION_TYPES, path_point, prediction_type_of
from annealers.schedulers.gaussian_path import working_dtype

__all__ = [
    "DenoisingAutoencoder",
    "LinearDenoisingAutoencoder",
    "attraction_rate",
    "denoise",
    "iterative_denoising",
]

# ---- the denoiser in a diffusion model ------------------------------------------------------------------------------


def denoise(
    model: Callable[..., Any],
    scheduler: ConfigMixin,
    sample: torch.Tensor,
    timestep: int | float | torch.Tensor,
    **model_kwargs: Any,
) -> torch.Tensor:
    """The network's E[x_0 | x_t], unclipped, whatever it predicts.

    Args:
        model: The network, `model(sample, timestep, **model_kwargs)`, which returns a tensor, a tuple that begins with
            one, or an object with one as `sample`. A second half of its channels, a learned variance, is not used.
        scheduler: One of this package or of Diffusers; says which path the network is trained on and what it predicts,
            see `exact.path_point`.
        sample: x_t as the network sees it, (B, *). For those of Diffusers that step in variance-exploding coordinates
            that is what `scale_model_input` returns.
        timestep: Train timestep, a number, () or (B,).
        model_kwargs: Passed on to the network, `class_labels` for example.

    Returns:
        (B, *), in the dtype of `sample`; half precision is computed in float32.

    Raises:
        ValueError: If the scheduler does not say what is predicted, the timestep is not on its path or there has no
            signal to find with this prediction type, or the shape of the output does not fit.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> from annealers import exact
        >>> scheduler = DDPMScheduler()
        >>> network = exact.Gaussian(0.0, variance=1.0).as_model(scheduler)  # E[x_0 | x_t] = alpha x_t
        >>> denoise(network, scheduler, torch.ones(1, 1, 2, 2), 0).mean()
        tensor(0.9999)
    """
    dtype = working_dtype(sample)
    axes = (-1,) + (1,) * (sample.ndim - 1)
    timesteps = torch.as_tensor(timestep)
    if timesteps.numel() not in (1, len(sample)):
        raise ValueError(f"need one timestep or one per sample, {len(sample)}, got {timesteps.numel()}")
    alpha, sigma = (c.to(sample.device, dtype).reshape(axes) for c in path_point(scheduler, timesteps))
    output = first_channels(model(sample, timestep, **model_kwargs), sample).to(dtype)
    return _original(prediction_type_of(scheduler), output, sample.to(dtype), alpha, sigma).to(sample.dtype)


class DenoisingAutoencoder:
    """The denoising autoencoder that a diffusion model is at one noise level: x -> E[x_0 | x_0 + varsigma eps = x].

    It takes and returns noisy and clean data in the coordinates of the data, without the scale of the path. That of an
    exact law is `lambda x: law.denoise(x, sigma=noise_level)`.

    Args:
        model, scheduler: The network and its path, as in `denoise`.
        noise_level: varsigma, the standard deviation of the noise in units of the data. The path is a table, and the
            nearest of its levels in log varsigma is taken; on a flow path it is met exactly.
        model_kwargs: Passed on to the network.

    Attributes:
        timestep: The train timestep at which the network is asked.
        noise_level: varsigma of that timestep.

    Raises:
        ValueError: If the noise level is not positive or beyond the ends of the path.

    Example:
        >>> from annealers import DDPMAncestralScheduler, exact
        >>> scheduler = DDPMAncestralScheduler()
        >>> dae = DenoisingAutoencoder(exact.Gaussian(0.0, variance=1.0).as_model(scheduler), scheduler, 1.0)
        >>> dae.timestep, round(dae.noise_level, 3)
        (258, 1.0)
        >>> dae(torch.ones(1, 1, 2, 2)).mean()  # half of it is noise
        tensor(0.5002)
    """

    def __init__(
        self, model: Callable[..., Any], scheduler: ConfigMixin, noise_level: float, **model_kwargs: Any
    ) -> None:
        self._model, self._scheduler, self._model_kwargs = model, scheduler, model_kwargs
        self.timestep = _timestep_of(scheduler, noise_level)
        alpha, sigma = path_point(scheduler, self.timestep)
        self._alpha, self.noise_level = float(alpha), float(sigma / alpha)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """DAE(x), (B, *), in the dtype of `x`."""
        x_t = (self._alpha * x.to(working_dtype(x))).to(x.dtype)
        return denoise(self._model, self._scheduler, x_t, self.timestep, **self._model_kwargs)


def _original(
    prediction_type: str | None,
    output: torch.Tensor,
    x_t: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
) -> torch.Tensor:
    """x_0 out of a prediction, solved with x_t = alpha x_0 + sigma eps, on any path."""
    if prediction_type in ("epsilon", "score") and not (alpha > 0).all():
        raise ValueError(f"a timestep without signal (alpha = 0) does not determine x_0 from {prediction_type!r}")
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":  # of alpha eps - sigma x_0
        return (alpha * x_t - sigma * output) / (alpha**2 + sigma**2)
    if prediction_type == "score":  # Tweedie's formula
        return (x_t + sigma**2 * output) / alpha
    if prediction_type == "flow_prediction":  # of eps - x_0
        return (x_t - sigma * output) / (alpha + sigma)
    raise ValueError(f"the scheduler's prediction_type must be one of {PREDICTION_TYPES}, got {prediction_type!r}")


def _timestep_of(scheduler: ConfigMixin, noise_level: float) -> int | float:
    """The train timestep whose sigma / alpha is nearest in logarithm to a noise level within the path."""
    if not 0 < noise_level < math.inf:
        raise ValueError(f"noise_level must be positive and finite, got {noise_level}")
    T = scheduler.config["num_train_timesteps"]
    if prediction_type_of(scheduler) == "flow_prediction":  # sigma = t / T = varsigma (1 - sigma)
        return T * noise_level / (1 + noise_level)
    alpha, sigma = path_point(scheduler, torch.arange(T))
    levels = (sigma / alpha).log()
    with_signal = levels[alpha > 0]
    low, high = float(with_signal.min().exp()), float(with_signal.max().exp())
    if not low * (1 - 1e-6) <= noise_level <= high * (1 + 1e-6):  # the ends themselves may be given rounded
        raise ValueError(f"noise_level must lie on the path, {low:.4g} .. {high:.4g}, got {noise_level}")
    return int((levels - math.log(noise_level)).abs().argmin())


# ---- the linear case ------------------------------------------------------------------------------------------------


class LinearDenoisingAutoencoder:
    """The best affine denoiser of data with a mean and covariance, x -> m + V diag(l / (l + varsigma^2)) V^T (x - m).

    For Gaussian data it is the best denoiser of all. With fewer directions than coordinates it is the best of that
    rank, and at varsigma = 0 the projection on the subspace of the largest variances, m + V V^T (x - m).

    Args:
        mean: m, (*event), floating point.
        directions: V, (D, k), orthonormal columns over the flattened event, D >= k >= 0.
        variances: l, (k,), not negative. A direction with variance 0 is known to be the mean, and projected away.
        noise_level: varsigma >= 0, in units of the data.

    Attributes:
        mean, directions, variances, noise_level: As given; the tensors in float64.
        gains: l / (l + varsigma^2), (k,): the eigenvalues of the slope of the map.

    Raises:
        ValueError: If a shape or value does not fit.

    Example:
        >>> dae = LinearDenoisingAutoencoder.from_data(torch.tensor([[0.0, 2.0], [1.0, 2.0], [5.0, 2.0]]), rank=1)
        >>> dae(torch.tensor([[1.5, 7.0]]))  # onto the line through the data, and no nearer to any of the points
        tensor([[1.5000, 2.0000]])
    """

    def __init__(
        self, mean: torch.Tensor, directions: torch.Tensor, variances: torch.Tensor, noise_level: float = 0.0
    ) -> None:
        if not mean.is_floating_point():
            raise ValueError(f"mean must be a floating-point tensor, got {mean.dtype}")
        D, k = mean.numel(), len(variances)
        if directions.shape != (D, k) or variances.ndim != 1:
            raise ValueError(
                f"need directions (D, k) and variances (k,) with D = {D} coordinates of the mean, got "
                f"{tuple(directions.shape)} and {tuple(variances.shape)}"
            )
        if not 0 <= noise_level < math.inf:
            raise ValueError(f"noise_level must not be negative, got {noise_level}")
        if (variances < 0).any():
            raise ValueError(f"variances must not be negative, got {float(variances.min())}")
        self.noise_level = float(noise_level)
        self.mean, self.directions, self.variances = (
            values.to(mean.device, torch.float64) for values in (mean, directions, variances)
        )
        overlap = self.directions.T @ self.directions - torch.eye(k, dtype=torch.float64, device=mean.device)
        if overlap.numel() and overlap.abs().max() > 1e-4:
            raise ValueError(f"directions must be orthonormal, got V^T V off by {float(overlap.abs().max()):.3g}")
        total = self.variances + self.noise_level**2
        self.gains = torch.where(self.variances > 0, self.variances / total, 0.0)

    @classmethod
    def from_data(
        cls, points: torch.Tensor, rank: int | None = None, noise_level: float = 0.0
    ) -> LinearDenoisingAutoencoder:
        """Fits it to data, by a singular value decomposition; l are variances over the points, with 1 / N.

        Args:
            points: (N, *event), floating point.
            rank: k, the number of directions of largest variance to keep, up to min(N, D); None for all.
            noise_level: varsigma >= 0.
        """
        if not points.is_floating_point() or points.ndim < 2 or len(points) == 0:
            raise ValueError(
                f"points must be floating-point and of shape (N, *event), N >= 1, got {points.dtype} of shape "
                f"{tuple(points.shape)}"
            )
        rows = points.reshape(len(points), -1).to(torch.float64)  # (N, D)
        mean = rows.mean(dim=0)
        _, singular_values, transposed = torch.linalg.svd(rows - mean, full_matrices=False)
        variances = _without_rounding(singular_values, max(rows.shape)) ** 2 / len(rows)
        kept = _checked_rank(rank, len(variances))
        return cls(mean.reshape(points.shape[1:]), transposed[:kept].T, variances[:kept], noise_level)

    @classmethod
    def from_covariance(
        cls, mean: torch.Tensor, covariance: torch.Tensor, rank: int | None = None, noise_level: float = 0.0
    ) -> LinearDenoisingAutoencoder:
        """Takes it from the moments of a law: its mean, (*event), and covariance, (D, D)."""
        D = mean.numel()
        if covariance.shape != (D, D):
            raise ValueError(f"covariance must have shape {(D, D)}, got {tuple(covariance.shape)}")
        variances, directions = torch.linalg.eigh(covariance.to(torch.float64))
        variances, directions = _without_rounding(variances.flip(0), D), directions.flip(1)  # the largest first
        kept = _checked_rank(rank, D)
        return cls(mean, directions[:, :kept], variances[:kept], noise_level)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """DAE(x), (*batch, *event), in the dtype of `x`."""
        event = self.mean.shape
        if x.shape[x.ndim - len(event) :] != event or x.ndim < len(event):
            raise ValueError(f"x must have shape (*batch, *{tuple(event)}), got {tuple(x.shape)}")
        directions, mean = self.directions.to(x.device), self.mean.to(x.device)
        residual = (x.to(torch.float64) - mean).reshape(-1, mean.numel())  # (N, D)
        kept = (residual @ directions * self.gains.to(x.device)) @ directions.T
        return (mean + kept.reshape(x.shape)).to(x.dtype)


def _checked_rank(rank: int | None, largest: int) -> int:
    if rank is None:
        return largest
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= largest:
        raise ValueError(f"rank must be an integer in 0 .. {largest}, got {rank!r}")
    return rank


def _without_rounding(values: torch.Tensor, size: int) -> torch.Tensor:
    """Values with rounding of a decomposition set to zero: without noise it would be as good as any direction."""
    return torch.where(values > size * torch.finfo(values.dtype).eps * values.abs().max(), values, 0.0)
