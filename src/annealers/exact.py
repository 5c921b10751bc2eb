r"""Laws whose score and ideal denoiser are known exactly: the oracle of tests, documentation and benchmarks.

Along a Gaussian path x_t = alpha x_0 + sigma eps, with x_0 from a law and eps standard normal, every law here knows

    score                s(x) = grad log p_t(x)
    noise                E[eps | x_t] = -sigma s
    denoise              E[x_0 | x_t] = (x_t + sigma^2 s) / alpha                       (Tweedie's formula)
    posterior variance   Cov[x_0 | x_t] = (sigma^2 / alpha) d E[x_0 | x_t] / d x_t      (its second order)

**Gaussian.** x_0 ~ N(m, C) makes (x_0, x_t) jointly Gaussian with Cov[x_0, x_t] = alpha C, and conditioning gives,
with S = alpha^2 C + sigma^2 I,

    x_t ~ N(alpha m, S)                         s = -S^-1 (x_t - alpha m)
    E[x_0 | x_t] = m + alpha C S^-1 (x_t - alpha m)
    Cov[x_0 | x_t] = C - alpha^2 C S^-1 C = sigma^2 C S^-1

With C = U diag(l) U^T, taken apart once, S = U diag(alpha^2 l + sigma^2) U^T: another (alpha, sigma) costs only
rotations.

**Mixture** of Gaussians k with weights w_k. Each component travels alone, and r_k = w_k p_k(x_t) / sum_j w_j p_j(x_t)
is the probability that x_t came from it:

    log p_t = logsumexp_k (log w_k + log p_k)       s = sum_k r_k s_k       D = E[x_0 | x_t] = sum_k r_k D_k
    Var[x_0 | x_t] = sum_k r_k (V_k + (D_k - D)^2)

**Finite data** x_1 .. x_N: the mixture of point masses. Its D is the ideal denoising autoencoder,

    DAE(x_t) = sum_i P(x_i | x_t) x_i,    P(x_i | x_t) proportional to w_i exp(-|x_t - alpha x_i|^2 / (2 sigma^2))

Sources: Efron 2011, "Tweedie's Formula and Selection Bias", J. Amer. Statist. Assoc. 106; Meng et al. 2021,
"Estimating High Order Gradients of the Data Distribution by Denoising", arXiv:2111.04726 (second order); Karras et al.
2022, "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv:2206.00364, Equation 57 (finite data).

    symbol      code     shape              meaning
    x_t         x        (*batch, *event)   state; D = number of coordinates of an event
    alpha       alpha    prefix of batch    signal coefficient
    sigma       sigma    prefix of batch    noise coefficient, in units of the data
    m, C, l, U                              mean, covariance, eigenvalues and eigenvectors of the data
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

__all__ = [
    "ConditionalExactModel",
    "ExactClassifier",
    "ExactClassifierOutput",
    "ExactModel",
    "ExactModelOutput",
    "FiniteData",
    "Gaussian",
    "GaussianMixture",
    "Law",
    "path_point",
    "prediction_type_of",
]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "score", "flow_prediction")

Coefficient = float | torch.Tensor  # one value for all, or one per sample
Values = float | torch.Tensor | Sequence  # a number, a tensor, or nested lists of numbers


class Law(ABC):
    """The law of the data x_0, and with it of x_t = alpha x_0 + sigma eps at every point (alpha, sigma) of a path.

    All methods take `x` of shape (*batch, *event), where `batch` may be empty, and alpha and sigma as numbers or
    tensors whose axes line up with the first axes of `batch`, so (B,) is one value per sample. They compute in float64
    on the device of `x` and return its dtype. The path point defaults to the data itself, (1, 0). Values and shapes
    that do not fit raise a ValueError.

    A subclass says what it knows as the underscored methods, which see float64 rows: x (N, D), alpha and sigma (N, 1).

    Attributes:
        event_shape: Shape of one draw.
        dtype: Type of the samples: that of the tensors the law was made from, torch's default for plain numbers.
        device: Where the law keeps its tensors. `x` elsewhere is served too, at the price of copying them there.
    """

    event_shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    # ---- what a law knows ------------------------------------------------------------------------------------------

    @abstractmethod
    def _draw(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        """Draws x_0, (count, D), float64."""

    @abstractmethod
    def _log_density(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """log p_t, (N,)."""

    @abstractmethod
    def _score(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """grad log p_t, (N, D)."""

    @abstractmethod
    def _posterior_mean(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_t], (N, D), also where alpha = 0 and Tweedie's formula says 0 / 0."""

    @abstractmethod
    def _posterior_variance(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The diagonal of Cov[x_0 | x_t], (N, D)."""

    # ---- what follows ----------------------------------------------------------------------------------------------

    def sample(
        self,
        shape: int | Sequence[int],
        alpha: Coefficient = 1.0,
        sigma: Coefficient = 0.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Draws x_t = alpha x_0 + sigma eps.

        A generator in the same state gives the same x_0 and eps at every path point.

        Args:
            shape: Batch shape, or the number of draws.
            alpha: Signal coefficient.
            sigma: Noise coefficient.
            generator: Source of the randomness; one on the CPU serves a law on any device.

        Returns:
            (*shape, *event), in the law's dtype and on its device.

        Raises:
            ValueError: If alpha or sigma does not fit `shape` or is no path point.
        """
        batch = torch.Size([shape] if isinstance(shape, int) else shape)
        alpha, sigma = _aligned_path_point(alpha, sigma, batch, self.device)
        x_0 = self._draw(batch.numel(), generator)  # (N, D)
        eps = randn_tensor(x_0.shape, generator=generator, device=self.device, dtype=x_0.dtype)
        return (alpha * x_0 + sigma * eps).reshape(batch + self.event_shape).to(self.dtype)

    def log_prob(self, x: torch.Tensor, alpha: Coefficient = 1.0, sigma: Coefficient = 0.0) -> torch.Tensor:
        """log p_t(x) in nats, of shape `batch`."""
        batch = self._batch_shape(x)
        return self._log_density(*self._rows(x, alpha, sigma)).reshape(batch).to(x.dtype)

    def score(self, x: torch.Tensor, alpha: Coefficient = 1.0, sigma: Coefficient = 0.0) -> torch.Tensor:
        """grad_x log p_t(x), of the shape of `x`, in units of 1 / data."""
        return self._score(*self._rows(x, alpha, sigma)).reshape(x.shape).to(x.dtype)

    def noise(self, x: torch.Tensor, alpha: Coefficient = 1.0, sigma: Coefficient = 0.0) -> torch.Tensor:
        """E[eps | x_t = x] = -sigma s, of the shape of `x`: what an ideal epsilon-network predicts."""
        rows, alpha, sigma = self._rows(x, alpha, sigma)
        return (-sigma * self._score(rows, alpha, sigma)).reshape(x.shape).to(x.dtype)

    def denoise(self, x: torch.Tensor, alpha: Coefficient = 1.0, sigma: Coefficient = 0.0) -> torch.Tensor:
        """E[x_0 | x_t = x], of the shape of `x`; at alpha = 0 the mean of the data."""
        return self._posterior_mean(*self._rows(x, alpha, sigma)).reshape(x.shape).to(x.dtype)

    def posterior_variance(self, x: torch.Tensor, alpha: Coefficient = 1.0, sigma: Coefficient = 0.0) -> torch.Tensor:
        """The variance of each coordinate of x_0 given x_t = x, of the shape of `x`, in units of the data squared."""
        return self._posterior_variance(*self._rows(x, alpha, sigma)).reshape(x.shape).to(x.dtype)

    def velocity(self, x: torch.Tensor, alpha: Coefficient = 1.0, sigma: Coefficient = 0.0) -> torch.Tensor:
        """E[alpha eps - sigma x_0 | x_t = x], of the shape of `x`: the v of "v_prediction"."""
        rows, alpha, sigma = self._rows(x, alpha, sigma)
        noise = -sigma * self._score(rows, alpha, sigma)
        return (alpha * noise - sigma * self._posterior_mean(rows, alpha, sigma)).reshape(x.shape).to(x.dtype)

    def flow(self, x: torch.Tensor, alpha: Coefficient = 1.0, sigma: Coefficient = 0.0) -> torch.Tensor:
        """E[eps - x_0 | x_t = x], of the shape of `x`: the velocity of flow matching, where alpha = 1 - sigma."""
        rows, alpha, sigma = self._rows(x, alpha, sigma)
        noise = -sigma * self._score(rows, alpha, sigma)
        return (noise - self._posterior_mean(rows, alpha, sigma)).reshape(x.shape).to(x.dtype)

    def prediction(
        self, prediction_type: str, x: torch.Tensor, alpha: Coefficient = 1.0, sigma: Coefficient = 0.0
    ) -> torch.Tensor:
        """What an ideal network of this prediction type outputs at x_t = x."""
        predict = {
            "epsilon": self.noise,
            "sample": self.denoise,
            "v_prediction": self.velocity,
            "score": self.score,
            "flow_prediction": self.flow,
        }[_checked_prediction_type(prediction_type)]
        return predict(x, alpha, sigma)

    def as_model(self, scheduler: ConfigMixin, prediction_type: str | None = None) -> ExactModel:
        """A drop-in network for `scheduler` that predicts exactly; see `ExactModel`."""
        return ExactModel(self, scheduler, prediction_type)

    def _batch_shape(self, x: torch.Tensor) -> torch.Size:
        split = x.ndim - len(self.event_shape)
        if split < 0 or x.shape[split:] != self.event_shape:
            raise ValueError(f"x must have shape (*batch, *{tuple(self.event_shape)}), got {tuple(x.shape)}")
        return x.shape[:split]

    def _rows(
        self, x: torch.Tensor, alpha: Coefficient, sigma: Coefficient
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, alpha and sigma as float64 rows: (N, D), (N, 1), (N, 1)."""
        if not x.is_floating_point():
            raise ValueError(f"x must be a floating-point tensor, got {x.dtype}")
        batch = self._batch_shape(x)
        rows = x.to(torch.float64).reshape(batch.numel(), self.event_shape.numel())
        return rows, *_aligned_path_point(alpha, sigma, batch, x.device)


class Gaussian(Law):
    """The normal law N(mean, C) with C diagonal or full.

    Args:
        mean: m, a number or a tensor of the event's shape. A number makes the event a single coordinate, shape (), so
            the law acts on every pixel of images of any shape.
        variance: Diagonal of C, a number or a tensor that broadcasts to the mean; zeros make a point mass.
        covariance: C over the flattened event, (D, D), symmetric and positive semi-definite. Give this or `variance`.

    Raises:
        ValueError: If not exactly one of variance and covariance is given, or a value or shape does not fit. Asking
            for the density or score where x_t is singular (a zero variance at sigma = 0) raises too.

    Example:
        >>> law = Gaussian(1.0, variance=0.25)
        >>> law.denoise(torch.tensor([1.0, 2.0]), alpha=1.0, sigma=0.5)  # half way from the mean: signal = noise
        tensor([1.0000, 1.5000])
    """

    def __init__(
        self, mean: Values, variance: Values | None = None, covariance: torch.Tensor | Sequence | None = None
    ) -> None:
        self.dtype = _dtype_of(mean, torch.get_default_dtype())
        mean = _finite("mean", mean)
        self.event_shape, self.device = mean.shape, mean.device
        self._mean = mean.reshape(-1)  # (D,)
        self._eigenvalues: torch.Tensor  # (D,)
        self._eigenvectors: torch.Tensor | None  # (D, D), columns; None where C is diagonal
        if variance is not None and covariance is None:
            self._eigenvalues, self._eigenvectors = _diagonal(variance, mean), None
        elif covariance is not None and variance is None:
            self._eigenvalues, self._eigenvectors = _eigendecomposition(covariance, mean)
        else:
            given = "neither" if variance is None else "both"
            raise ValueError(f"give exactly one of variance and covariance, got {given}")

    def _draw(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        z = randn_tensor((count, len(self._mean)), generator=generator, device=self.device, dtype=torch.float64)
        return self._mean + self._from_eigenbasis(self._eigenvalues.sqrt() * z)

    def _log_density(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        variance = self._positive_variance(alpha, sigma)  # (N, D)
        residual = self._residual(x, alpha)
        return -0.5 * (residual**2 / variance + (2 * math.pi * variance).log()).sum(-1)

    def _score(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self._from_eigenbasis(-self._residual(x, alpha) / self._positive_variance(alpha, sigma))

    def _posterior_mean(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        variance = self._variance(alpha, sigma)
        # a direction without variance tells nothing: there the data is its mean
        gain = torch.where(variance > 0, alpha * self._eigenvalues.to(x) / variance, 0.0)
        return self._mean.to(x) + self._from_eigenbasis(gain * self._residual(x, alpha))

    def _posterior_variance(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        variance, prior = self._variance(alpha, sigma), self._eigenvalues.to(x)
        posterior = torch.where(variance > 0, sigma**2 * prior / variance, prior)
        return posterior if self._eigenvectors is None else posterior @ self._eigenvectors.to(x).T ** 2

    def _variance(self, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Eigenvalues of S = alpha^2 C + sigma^2 I, (N, D)."""
        return alpha**2 * self._eigenvalues.to(alpha) + sigma**2

    def _positive_variance(self, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        variance = self._variance(alpha, sigma)
        if (variance <= 0).any():
            raise ValueError(
                "x_t has no density where alpha^2 C + sigma^2 I is singular: need sigma > 0, or alpha != 0 and a "
                f"positive-definite C; got a smallest variance of {float(variance.min())} at the smallest "
                f"sigma = {float(sigma.min())} and smallest eigenvalue of C = {float(self._eigenvalues.min())}"
            )
        return variance

    def _residual(self, x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        """U^T (x_t - alpha m), (N, D)."""
        residual = x - alpha * self._mean.to(x)
        return residual if self._eigenvectors is None else residual @ self._eigenvectors.to(x)

    def _from_eigenbasis(self, coordinates: torch.Tensor) -> torch.Tensor:
        return coordinates if self._eigenvectors is None else coordinates @ self._eigenvectors.to(coordinates).T


class GaussianMixture(Law):
    """A mixture of K normal laws with full covariances.

    Args:
        weights: w_k, (K,), not negative; scaled to sum to one.
        means: (K, *event).
        covariances: C_k over the flattened event, (K, D, D); or, for components without correlations, one variance per
            coordinate (K, *event) or per component (K,).

    Raises:
        ValueError: If a value or shape does not fit.

    Example:
        >>> law = GaussianMixture(weights=[0.5, 0.5], means=[-1.0, 1.0], covariances=[0.01, 0.01])
        >>> law.denoise(torch.tensor([0.0, 0.9]), alpha=1.0, sigma=0.2)
        tensor([0.0000, 0.9800])
    """

    def __init__(
        self, weights: torch.Tensor | Sequence, means: torch.Tensor | Sequence, covariances: torch.Tensor | Sequence
    ) -> None:
        self.dtype = _dtype_of(means, torch.get_default_dtype())
        means, covariances = (
            values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.float64)
            for values in (means, covariances)
        )
        if means.ndim == 0 or len(means) == 0:
            raise ValueError(f"means must have shape (K, *event) with K >= 1, got {tuple(means.shape)}")
        self.event_shape, self.device = means.shape[1:], means.device
        self._log_weights = _normalised_weights(weights, len(means), means.device).log()  # (K,)
        D = self.event_shape.numel()
        if covariances.shape not in ((len(means),), means.shape, (len(means), D, D)):
            raise ValueError(
                f"covariances must have shape {(len(means), D, D)}, {tuple(means.shape)} or {(len(means),)} "
                f"for means of shape {tuple(means.shape)}, got {tuple(covariances.shape)}"
            )
        is_full = covariances.shape == (len(means), D, D)
        self._components = [
            Gaussian(mean, covariance=covariance) if is_full else Gaussian(mean, variance=covariance)
            for mean, covariance in zip(means, covariances, strict=True)
        ]

    def _draw(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        component = _draw_index(self._log_weights.exp(), count, generator)  # (count,)
        x_0 = torch.empty(count, self.event_shape.numel(), dtype=torch.float64, device=self.device)
        for k, law in enumerate(self._components):
            chosen = component == k
            x_0[chosen] = law._draw(int(chosen.sum()), generator)
        return x_0

    def _log_density(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self._log_joint(x, alpha, sigma).logsumexp(0)

    def _score(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        scores = torch.stack([law._score(x, alpha, sigma) for law in self._components])  # (K, N, D)
        return (self._responsibilities(x, alpha, sigma) * scores).sum(0)

    def _posterior_mean(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        means = torch.stack([law._posterior_mean(x, alpha, sigma) for law in self._components])  # (K, N, D)
        return (self._responsibilities(x, alpha, sigma) * means).sum(0)

    def _posterior_variance(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        responsibilities = self._responsibilities(x, alpha, sigma)
        means = torch.stack([law._posterior_mean(x, alpha, sigma) for law in self._components])  # (K, N, D)
        variances = torch.stack([law._posterior_variance(x, alpha, sigma) for law in self._components])
        mean = (responsibilities * means).sum(0)
        return (responsibilities * (variances + (means - mean) ** 2)).sum(0)

    def _log_joint(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """log w_k + log p_k, (K, N)."""
        log_densities = torch.stack([law._log_density(x, alpha, sigma) for law in self._components])
        return self._log_weights.to(x)[:, None] + log_densities

    def _responsibilities(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """r_k, (K, N, 1)."""
        return self._log_joint(x, alpha, sigma).softmax(0)[..., None]


class FiniteData(Law):
    """The empirical law of N points; `denoise` is the ideal denoising autoencoder.

    The points pass by in blocks, in float64, under a running log-sum-exp, so the largest tensors made have shapes
    (rows of x, block_size) and (block_size, D). Squared distances are expanded into an inner product about the data's
    mean, ten times faster than subtracting coordinate by coordinate; P(x_i | x_t) then carries a relative error of
    about 1e-16 |x_i - mean|^2 / sigma^2, below that of rounding `x` to float32 down to sigma = 1e-8.

    Args:
        points: (N, *event), floating point; kept as given, not copied.
        weights: w_i, (N,), not negative, scaled to sum to one. None = all equal.
        block_size: Points per block. Changes speed and memory, not the result.

    Raises:
        ValueError: If a value or shape does not fit. Everything but `sample` needs sigma > 0 and raises at sigma = 0,
            where the law has no density.

    Example:
        >>> law = FiniteData(torch.tensor([[0.0, 0.0], [4.0, 2.0]]))
        >>> law.denoise(torch.tensor([[2.5, 1.0], [2.0, 1.0]]), alpha=1.0, sigma=0.1)  # nearest point; a tie
        tensor([[4., 2.],
                [2., 1.]])
    """

    def __init__(
        self, points: torch.Tensor, weights: torch.Tensor | Sequence | None = None, block_size: int = 1024
    ) -> None:
        if not points.is_floating_point():
            raise ValueError(f"points must be a floating-point tensor, got {points.dtype}")
        if points.ndim == 0 or len(points) == 0:
            raise ValueError(f"points must have shape (N, *event) with N >= 1, got {tuple(points.shape)}")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.event_shape, self.dtype, self.device = points.shape[1:], points.dtype, points.device
        points = points.reshape(len(points), -1)  # (N, D)
        weights = torch.ones(len(points)) if weights is None else weights
        weights = _normalised_weights(weights, len(points), self.device)
        if (weights == 0).any():  # a block of such points only would make exp(-inf + inf) in the running log-sum-exp
            points, weights = points[weights > 0], weights[weights > 0]
        self._points, self._log_weights = points, weights.log()
        self._block_size = block_size
        self._centre = torch.zeros(points.shape[1], dtype=torch.float64, device=self.device)  # (D,)
        for block in points.split(block_size):  # the mean of all at once would first copy all to float64
            self._centre += block.to(torch.float64).sum(0) / len(points)
        if not torch.isfinite(self._centre).all():
            raise ValueError(f"points must be finite, got coordinates whose mean is {float(self._centre.sum())}")

    def _draw(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        return self._points[_draw_index(self._log_weights.exp(), count, generator)].to(torch.float64)

    def _log_density(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self._density_and_moments(x, alpha, sigma, order=0)[0]

    def _score(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (alpha * self._posterior_mean(x, alpha, sigma) - x) / sigma**2

    def _posterior_mean(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        _, (first,) = self._density_and_moments(x, alpha, sigma, order=1)
        return self._centre.to(x) + first

    def _posterior_variance(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        _, (first, second) = self._density_and_moments(x, alpha, sigma, order=2)
        return (second - first**2).clamp_min(0)  # near a single point the difference is rounding of either sign

    def _density_and_moments(
        self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, order: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """log p_t, (N,), and E[(x_0 - centre)^k | x_t], k = 1 .. order, each (N, D), in one pass over the points."""
        if (sigma <= 0).any():
            raise ValueError(f"finite data has a density only at sigma > 0, got sigma = {float(sigma.min())}")
        x = x - alpha * self._centre.to(x)
        peak = x.new_full((len(x), 1), -torch.inf)  # largest logit so far; sums are in units of its exponential
        total = x.new_zeros(len(x), 1)
        sums = [torch.zeros_like(x) for _ in range(order)]
        for points, log_weights in self._blocks(x):
            inner = alpha * (x @ points.T)  # (N, block)
            squared_distance = (x**2).sum(-1, keepdim=True) - 2 * inner + alpha**2 * (points**2).sum(-1)
            logits = log_weights - squared_distance / (2 * sigma**2)
            new_peak = torch.maximum(peak, logits.amax(-1, keepdim=True)).detach()  # no result depends on it
            shrink, likelihood = (peak - new_peak).exp(), (logits - new_peak).exp()
            total = shrink * total + likelihood.sum(-1, keepdim=True)
            sums = [shrink * s + likelihood @ points**k for k, s in enumerate(sums, start=1)]
            peak = new_peak
        log_normaliser = 0.5 * x.shape[1] * (2 * math.pi * sigma**2).log()
        return (peak + total.log() - log_normaliser).squeeze(-1), [s / total for s in sums]

    def _blocks(self, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Centred points (block, D) and their log weights (block,), in the dtype and on the device of `x`."""
        centre = self._centre.to(x)
        for points, log_weights in zip(
            self._points.split(self._block_size), self._log_weights.split(self._block_size), strict=True
        ):
            yield points.to(x) - centre, log_weights.to(x)


# ---- a law as a network --------------------------------------------------------------------------------------------


@dataclass
class ExactModelOutput(BaseOutput):
    """Output of an exact model.

    Args:
        sample: The prediction, (B, *event), in the dtype and on the device of the model's input.
    """

    sample: torch.Tensor


class ExactModel(nn.Module):
    """A law in the place of a trained network: `model(sample, timestep)` predicts what the best network would.

    Args:
        law: The law of the data.
        scheduler: Says which (alpha, sigma) a timestep stands for; see `path_point`.
        prediction_type: "epsilon", "sample", "v_prediction", "score" or "flow_prediction". None = the scheduler's own.

    Raises:
        ValueError: If the prediction type is none of these.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> model = Gaussian(0.0, variance=1.0).as_model(DDPMScheduler())
        >>> model(torch.ones(1, 3, 8, 8), 999).sample.mean()  # standard normal data stays so: eps = sigma x
        tensor(1.0000)
    """

    def __init__(self, law: Law, scheduler: ConfigMixin, prediction_type: str | None = None) -> None:
        super().__init__()
        self.law = law
        self.scheduler = scheduler
        self.prediction_type = _checked_prediction_type(prediction_type or prediction_type_of(scheduler))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: int | float | torch.Tensor,
        *args: object,
        return_dict: bool = True,
        **kwargs: object,
    ) -> ExactModelOutput | tuple[torch.Tensor]:
        """Predicts at `sample`; whatever else a pipeline hands its network (conditions, say) is accepted and ignored.

        Args:
            sample: x_t, (B, *event).
            timestep: Train timestep, a number, () or (B,).
            args: Ignored, so that the law can stand in for a conditional network.
            return_dict: Whether to return an `ExactModelOutput` instead of a tuple.
            kwargs: Ignored.
        """
        alpha, sigma = path_point(self.scheduler, timestep)
        output = self.law.prediction(self.prediction_type, sample, alpha, sigma)
        return ExactModelOutput(output) if return_dict else (output,)


class ConditionalExactModel(nn.Module):
    """One law per class in the place of a class-conditional network, the oracle of classifier-free guidance.

    Args:
        laws: The law of each class, by its label; for guidance the last may be the null class, the law of all data.
        scheduler: Says which (alpha, sigma) a timestep stands for; see `path_point`.
        prediction_type: "epsilon", "sample", "v_prediction", "score" or "flow_prediction". None = the scheduler's own.

    Raises:
        ValueError: If there is no law, their event shapes differ, or the prediction type is unknown.
    """

    def __init__(self, laws: Sequence[Law], scheduler: ConfigMixin, prediction_type: str | None = None) -> None:
        super().__init__()
        event_shapes = {tuple(law.event_shape) for law in laws}
        if len(event_shapes) != 1:
            raise ValueError(f"need at least one law, and all of one event shape, got event shapes {event_shapes}")
        self.laws = list(laws)
        self.scheduler = scheduler
        self.prediction_type = _checked_prediction_type(prediction_type or prediction_type_of(scheduler))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: int | float | torch.Tensor,
        class_labels: torch.Tensor,
        *args: object,
        return_dict: bool = True,
        **kwargs: object,
    ) -> ExactModelOutput | tuple[torch.Tensor]:
        """Predicts each sample under the law of its own label.

        Args:
            sample: x_t, (B, *event).
            timestep: Train timestep, a number, () or (B,).
            class_labels: Labels, (B,), integers.
            args: Ignored.
            return_dict: Whether to return an `ExactModelOutput` instead of a tuple.
            kwargs: Ignored.

        Raises:
            ValueError: If the labels are not one integer per sample or name no law.
        """
        self._check_labels(class_labels, len(sample))
        alpha, sigma = path_point(self.scheduler, timestep)
        alpha, sigma = _aligned_path_point(alpha, sigma, sample.shape[:1], sample.device)  # (B, 1)
        output = torch.empty_like(sample)
        for label, law in enumerate(self.laws):
            chosen = (class_labels == label).to(sample.device)
            output[chosen] = law.prediction(self.prediction_type, sample[chosen], alpha[chosen, 0], sigma[chosen, 0])
        return ExactModelOutput(output) if return_dict else (output,)

    def _check_labels(self, class_labels: torch.Tensor, batch_size: int) -> None:
        if class_labels.is_floating_point() or class_labels.shape != (batch_size,):
            raise ValueError(
                f"class_labels must be integers of shape {(batch_size,)}, "
                f"got {class_labels.dtype} of shape {tuple(class_labels.shape)}"
            )
        if ((class_labels < 0) | (class_labels >= len(self.laws))).any():
            raise ValueError(f"class_labels must lie in 0 .. {len(self.laws) - 1}, got {class_labels.tolist()}")


@dataclass
class ExactClassifierOutput(BaseOutput):
    """Output of an exact classifier.

    Args:
        logits: log w_k + log p_k(x_t), (B, K), in the dtype of its input.
    """

    logits: torch.Tensor


class ExactClassifier(nn.Module):
    """The classifier p(y | x_t) that K classes of known laws have, the oracle of classifier guidance.

    By Bayes' rule p(y = k | x_t) is w_k p_k(x_t) / sum_j w_j p_j(x_t). It takes the place of a `NoisyClassifierModel`.

    Args:
        laws: The law of each class, by its label.
        weights: w_k, how frequent each class is, (K,); scaled to sum to one. None = all alike.
        scheduler: Says which (alpha, sigma) a timestep stands for; see `path_point`.

    Raises:
        ValueError: If there are fewer than two laws, their event shapes differ, or a weight does not fit.
    """

    dtype = torch.float64  # that of the laws' arithmetic, as a network says that of its weights

    def __init__(self, laws: Sequence[Law], weights: torch.Tensor | Sequence | None, scheduler: ConfigMixin) -> None:
        super().__init__()
        event_shapes = {tuple(law.event_shape) for law in laws}
        if len(laws) < 2 or len(event_shapes) != 1:
            raise ValueError(
                f"need two laws or more, all of one event shape, got {len(laws)} with event shapes {event_shapes}"
            )
        self.laws = list(laws)
        self.log_weights = _normalised_weights(
            [1.0] * len(laws) if weights is None else weights, len(laws), laws[0].device
        ).log()
        self.scheduler = scheduler
        self.config = FrozenDict(num_classes=len(laws), id2label=None)

    @property
    def device(self) -> torch.device:
        """Where the laws keep their tensors; a pipeline asks."""
        return self.log_weights.device

    def forward(
        self, sample: torch.Tensor, timestep: int | float | torch.Tensor, return_dict: bool = True
    ) -> ExactClassifierOutput | tuple[torch.Tensor]:
        """Classifies x_t, (B, *event), at a train timestep, a number, () or (B,); differentiable in x_t."""
        alpha, sigma = path_point(self.scheduler, timestep)
        log_densities = torch.stack([law.log_prob(sample, alpha, sigma) for law in self.laws], dim=1)  # (B, K)
        logits = log_densities + self.log_weights.to(log_densities)
        return ExactClassifierOutput(logits) if return_dict else (logits,)


def path_point(scheduler: ConfigMixin, timestep: int | float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Looks up (alpha, sigma) of a train timestep.

    A scheduler with `signal_and_noise` (those of this package) is asked; any other is read through its
    `alphas_cumprod`, alpha = sqrt(alpha_bar) and sigma = sqrt(1 - alpha_bar). That also holds for those of Diffusers
    that step in variance-exploding coordinates: their `scale_model_input` hands the network variance-preserving ones.
    A flow-matching scheduler, which predicts the flow or has no prediction type but a `shift`, is at sigma = t / T.

    Args:
        scheduler: The scheduler.
        timestep: Train timestep, a number or a tensor of any shape; floats must be whole numbers but for flows.

    Returns:
        alpha and sigma, float64, each of the shape and on the device of `timestep`.

    Raises:
        ValueError: If the timestep is fractional or off the table, or the scheduler has neither attribute.
    """
    timesteps = torch.as_tensor(timestep)
    if _is_flow(scheduler):
        sigma = timesteps.double() / scheduler.config.num_train_timesteps
        if ((sigma < 0) | (sigma > 1)).any():
            raise ValueError(f"timestep must lie in 0 .. {scheduler.config.num_train_timesteps}, got {timestep}")
        return 1 - sigma, sigma
    if timesteps.is_floating_point() and not torch.equal(timesteps, timesteps.round()):
        raise ValueError(f"timestep must be whole, because the path is a table over train timesteps, got {timestep}")
    timesteps = timesteps.long()
    signal_and_noise = getattr(scheduler, "signal_and_noise", None)
    if signal_and_noise is not None:
        return signal_and_noise(timesteps)
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None:
        raise ValueError(f"need a scheduler with signal_and_noise or alphas_cumprod, got {type(scheduler).__name__}")
    if ((timesteps < 0) | (timesteps >= len(alphas_cumprod))).any():
        raise ValueError(f"timestep must lie in 0 .. {len(alphas_cumprod) - 1}, got {timestep}")
    alpha_bar = alphas_cumprod.to(timesteps.device, torch.float64)[timesteps]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def prediction_type_of(scheduler: ConfigMixin) -> str | None:
    """What the network of a scheduler predicts, or None if the config does not say; see `path_point` for flows."""
    return "flow_prediction" if _is_flow(scheduler) else scheduler.config.get("prediction_type")


def _is_flow(scheduler: ConfigMixin) -> bool:
    prediction_type = scheduler.config.get("prediction_type")
    return prediction_type == "flow_prediction" or (prediction_type is None and "shift" in scheduler.config)


# ---- checked inputs ------------------------------------------------------------------------------------------------


def _checked_prediction_type(prediction_type: str | None) -> str:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
    return prediction_type


def _aligned_path_point(
    alpha: Coefficient, sigma: Coefficient, batch: torch.Size, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma spread over the batch from its first axis on, (N, 1) each."""
    aligned = []
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        value = _finite(name, value).to(device)
        if value.ndim > len(batch) or any(n not in (1, b) for n, b in zip(value.shape, batch, strict=False)):
            raise ValueError(
                f"{name} must line up with the first axes of the batch shape {tuple(batch)}, got {tuple(value.shape)}"
            )
        value = value.reshape(value.shape + (1,) * (len(batch) - value.ndim))
        aligned.append(value.expand(batch).reshape(batch.numel(), 1))
    if (aligned[1] < 0).any():
        raise ValueError(f"sigma must not be negative, got {float(aligned[1].min())}")
    return aligned[0], aligned[1]


def _finite(name: str, values: Values) -> torch.Tensor:
    """The values in float64."""
    tensor = torch.as_tensor(values, dtype=torch.float64)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} must be finite, got {tensor[~torch.isfinite(tensor)].flatten()[:5].tolist()} in it")
    return tensor


def _dtype_of(values: Values, otherwise: torch.dtype) -> torch.dtype:
    return values.dtype if isinstance(values, torch.Tensor) and values.is_floating_point() else otherwise


def _normalised_weights(weights: torch.Tensor | Sequence, count: int, device: torch.device) -> torch.Tensor:
    """Probabilities in proportion to the weights, (count,), float64."""
    weights = _finite("weights", weights).to(device)
    if weights.shape != (count,):
        raise ValueError(f"weights must have shape {(count,)}, one per component or point, got {tuple(weights.shape)}")
    if (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(
            "weights must not be negative and have a positive sum, "
            f"got smallest {float(weights.min())} and sum {float(weights.sum())}"
        )
    return weights / weights.sum()


def _draw_index(probabilities: torch.Tensor, count: int, generator: torch.Generator | None) -> torch.Tensor:
    """Indices in proportion to the probabilities, (count,); drawn where the generator lives."""
    where = probabilities.device if generator is None else generator.device
    if count == 0:
        return torch.empty(0, dtype=torch.long, device=probabilities.device)
    index = torch.multinomial(probabilities.to(where), count, replacement=True, generator=generator)
    return index.to(probabilities.device)


def _diagonal(variance: Values, mean: torch.Tensor) -> torch.Tensor:
    """The variance of every coordinate, (D,)."""
    variance = _finite("variance", variance).to(mean.device)
    if variance.ndim > mean.ndim or any(
        n not in (1, d) for n, d in zip(reversed(variance.shape), reversed(mean.shape), strict=False)
    ):
        raise ValueError(
            f"variance must broadcast to the mean's shape {tuple(mean.shape)}, got {tuple(variance.shape)}"
        )
    if (variance < 0).any():
        raise ValueError(f"variance must not be negative, got {float(variance.min())}")
    return variance.expand(mean.shape).reshape(-1)


def _eigendecomposition(covariance: torch.Tensor | Sequence, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (D,) and eigenvectors (D, D) of a covariance, valid up to the rounding of its own dtype."""
    given_precision = torch.finfo(_dtype_of(covariance, torch.float64)).eps
    covariance = _finite("covariance", covariance).to(mean.device)
    D = mean.numel()
    if covariance.shape != (D, D):
        raise ValueError(
            f"covariance must have shape {(D, D)} for a mean of shape {tuple(mean.shape)}, "
            f"got {tuple(covariance.shape)}"
        )
    scale = 8 * D * covariance.abs().max()
    asymmetry = (covariance - covariance.T).abs().max()
    if asymmetry > scale * given_precision:
        raise ValueError(f"covariance must be symmetric, got mirrored entries that differ by {float(asymmetry)}")
    eigenvalues, eigenvectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    if eigenvalues.min() < -scale * given_precision:
        raise ValueError(f"covariance must be positive semi-definite, got eigenvalue {float(eigenvalues.min())}")
    # a singular law must not grow a density out of the rounding of its own decomposition
    return torch.where(eigenvalues > scale * torch.finfo(torch.float64).eps, eigenvalues, 0.0), eigenvectors
