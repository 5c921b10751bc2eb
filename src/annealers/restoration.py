r"""Restoration without retraining: the steps of a sampler that is told a measurement y = H x_0 + sigma_y n.

A diffusion model knows p(x_0 | x_t). What is wanted is a draw from p(x_0 | y), by a chain from level t to the next
level u. Given x_0, neither x_t nor x_u says anything about y, so the chain that is wanted has the transition

    p(x_u | x_t, y)  =  integral of q(x_u | x_t, x_0) p(x_0 | x_t, y) dx_0
    p(x_0 | x_t, y)  proportional to  p(x_0 | x_t) p(y | x_0)

**spectral.** With H = U s V^T every coordinate i of V^T x_0 is measured on its own, as b_i = (U^T y)_i, see
`measurements`. Taking p(x_0 | x_t) for the Gaussian N(x̂_0, r_t^2 I), as PiGDM does (Song et al. 2023), everything is
in closed form, coordinate by coordinate, without a gradient of the network:

    k_i  = r^2 s_i / (sigma_y^2 + r^2 s_i^2)                                           the gain
    m_i  = x̂_i + k_i (b_i - s_i x̂_i)                                                   E[x_0 | x_t, y]
    v_i  = r^2 sigma_y^2 / (sigma_y^2 + r^2 s_i^2)                                     Var[x_0 | x_t, y]
    x_u  = A x_t + C m + sqrt(beta-tilde + C^2 v) z                                    A, C of q(x_u | x_t, x_0)

Where s_i = 0 this is the ancestral step of variance "optimal" (Bao et al. 2022). Where sigma_y = 0 < s_i it sets
m_i = b_i / s_i with v_i = 0; the means of such steps are those of DDNM (Wang et al. 2023).

Each step is the exact p(x_u | x_t, y) if p(x_0 | x_t) is that Gaussian, and then so is their composition, with any
number of steps. The start is x_T ~ p(x_T | y), the same formula with x_0 ~ N(m, S I) in the place of p(x_0 | x_t) and
(A, C, beta-tilde) = (0, alpha_T, sigma_T^2); the last step, u = data, has A = beta-tilde = 0 and C = 1, and must keep
its noise, sqrt(v) z. So for data that are N(m, S I), with r_t^2 = S sigma^2 / (alpha^2 S + sigma^2), the law of the
result is the posterior N(m + k (b - s m), v) with S in the place of r^2: nothing is approximate. It holds as well if S
differs between the coordinates of V. For other data it is an approximation that more steps do not cure: a measured
coordinate says nothing, within a step, about those that are not, for all that they are correlated given x_t.

**covariance.** They are by Cov[x_0 | x_t] = sigma_t^2 / alpha_t J, with the Jacobian J of x̂_0 (Tweedie's formula of
second order, see `calibration`), and a product with it is one backward pass. Conditioning with all of it,

    m  = x̂_0 + Cov H^T w,      (H Cov H^T + sigma_y^2 I) w = y - H x̂_0

where w is found by conjugate gradients (Peng et al. 2024), preconditioned by r^2 H H^T + sigma_y^2 I, whose inverse is
all that PiGDM uses. The noise of the step stays that of "spectral". For any Gaussian data the mean of the result is
then the posterior mean, with any number of steps; its covariance is exact for N(m, S I), and for others it becomes so
as steps grow, because what a step adds by not knowing x_0 is of second order in its length. Both are so from pure
noise: the start is drawn as if the data were N(m, S I), an error in proportion to alpha_T that no step takes back.

**replacement** (Lugmayr et al. 2022, "RePaint", Algorithm 1), for masks and sigma_y = 0. An unconditional step gives
the unknown pixels, and the known ones are y at the noise of the next level:

    x_u  = alpha_u y + sigma_u z                                                       where m = 1
           A x_t + C x̂_0 + sqrt(beta-tilde + C^2 r^2) z                                elsewhere

The law is the posterior if pixels are independent. If not, a step never sees the known pixels of its own level next to
the unknown ones.

**Resampling** lets it, and serves every method: on every `jump_length`-th level the chain goes back by `jump_length`
levels, with fresh noise, `resamples` - 1 times, and each time what was measured has another chance to reach the rest
(RePaint, Section 4.2; DDNM calls it time travel).

**ddrm** (Kawar et al. 2022, Sections 3.2 and 3.3), with y_i = b_i / s_i, noise tau_i = sigma_y / s_i, and in the
coordinates x_t / alpha_t, where the noise is sigma = sigma_t / alpha_t:

    x̂_i + sqrt(1 - eta^2) sigma_u eps-hat_i        + eta sigma_u z                     where s_i = 0
    x̂_i + sqrt(1 - eta^2) sigma_u (y_i - x̂_i) / tau_i + eta sigma_u z                  where sigma_u < tau_i
    (1 - eta_b) x̂_i + eta_b y_i   + sqrt(sigma_u^2 - eta_b^2 tau_i^2) z                elsewhere

Its theorem is about the training of the network, not about the result: if x̂_0 were x_0 then x_u would be
N(alpha_u x_0, sigma_u^2 I) over the draws of y. The last step returns x̂_0 where the measurement has noise. The result
is not the posterior, for no prior and no number of steps.

    symbol   code              shape           meaning
    x_t      sample            (B, C, H, W)    state on level t
    x̂_0      denoised          (B, C, H, W)    the network's E[x_0 | x_t]
    b        values            (B, C, H, W)    U^T y
    s        singular_values   broadcastable   of H
    sigma_y  noise_level       ()              standard deviation of the noise of y, in units of the image
    r^2      variance          broadcastable   Var[x_0 | x_t] of a coordinate, in units of the image squared
    Cov      covariance        a function      v -> Cov[x_0 | x_t] v, for v of (B, C, H, W)
    z        noise             (B, C, H, W)    standard normal

Sources: Kawar, Elad, Ermon, Song 2022, "Denoising Diffusion Restoration Models", arXiv:2201.11793; Lugmayr et al.
2022, "RePaint: Inpainting using Denoising Diffusion Probabilistic Models", arXiv:2201.09865; Song, Vahdat, Mardani,
Kautz 2023, "Pseudoinverse-Guided Diffusion Models for Inverse Problems", ICLR; Wang, Yu, Zhang 2023, "Zero-Shot Image
Restoration Using Denoising Diffusion Null-Space Model", arXiv:2212.00490; Peng et al. 2024, "Improving Diffusion
Models for Inverse Problems Using Optimal Posterior Covariance", arXiv:2402.02149; Bao et al. 2022, "Analytic-DPM",
arXiv:2201.06503.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch

from annealers.measurements import Mask, MeasurementOperator
from annealers.schedulers.gaussian_path import Level, transition


class SpectralMeasurement:
    """What a measurement says about each coordinate of V^T x_0.

    Args:
        operator: H.
        measurement: y, (B, *), on the device and in the dtype of the states.
        noise_level: sigma_y, at least 0.

    Attributes:
        values: b = U^T y, (B, C, H, W).
        singular_values: s, broadcastable to it.
        is_measured: Where a measurement without noise fixes the coordinate.

    Raises:
        ValueError: If shapes do not fit, or what was measured is not finite.
    """

    def __init__(self, operator: MeasurementOperator, measurement: torch.Tensor, noise_level: float) -> None:
        self.operator, self.noise_level = operator, noise_level
        self.values = operator.spectral_measurement(measurement)
        if not self.values.isfinite().all():
            raise ValueError("the measurement has values that are not finite, where the operator sees them")
        shape, device = self.values.shape, measurement.device
        self.singular_values = operator.singular_values(shape).to(device, measurement.dtype)
        self.is_measured = operator.is_measured(shape).to(device)

    def condition(
        self, mean: torch.Tensor, variance: float | torch.Tensor
    ) -> tuple[torch.Tensor, float | torch.Tensor]:
        """Mean and variance of c ~ N(mean, variance), given b = s c + sigma_y n; all (B, C, H, W) or broadcastable."""
        s, noise = self.singular_values, self.noise_level**2
        variance = variance if isinstance(variance, torch.Tensor) else mean.new_full((), variance)
        if self.noise_level == 0:
            gain = torch.where(self.is_measured, 1 / s, 0.0)
            remaining = torch.where(self.is_measured, 0.0, variance)
        else:
            total = noise + variance * s**2
            gain, remaining = variance * s / total, variance * noise / total
        return mean + gain * (self.values - s * mean), remaining

    def condition_jointly(self, belief: "Belief", iterations: int) -> torch.Tensor:
        """The mean of x ~ N(belief.mean, Cov), given b = s V^T x + sigma_y n, in coordinates, (B, C, H, W)."""
        V_T, V, s, mean = self.operator.to_spectral, self.operator.from_spectral, self.singular_values, belief.mean
        used = self.is_measured if self.noise_level == 0 else s > 0

        def covariance_with_measured(w: torch.Tensor) -> torch.Tensor:  # V^T Cov H^T U w
            return V_T(belief.covariance(V(s * w)))

        def system(w: torch.Tensor) -> torch.Tensor:
            return torch.where(used, s * covariance_with_measured(w) + self.noise_level**2 * w, 0.0)

        residual = torch.where(used, self.values - s * V_T(mean), 0.0)
        scale = belief.variance * s**2 + self.noise_level**2
        scale = torch.where(used & (scale > 0), scale, 1.0)  # an estimated variance may be 0
        w = conjugate_gradients(system, residual, scale, iterations)
        mean = V_T(mean) + covariance_with_measured(w)
        return self.condition(mean, 1.0)[0] if self.noise_level == 0 else mean  # what the iterations left open


def conjugate_gradients(
    system: Callable[[torch.Tensor], torch.Tensor], right: torch.Tensor, scale: torch.Tensor, iterations: int
) -> torch.Tensor:
    """Solves system(w) = right for each sample of the batch on its own; all (B, *).

    Args:
        system: A symmetric, positive semi-definite linear map of each sample.
        right: The right-hand sides.
        scale: What the system roughly multiplies by, positive, for Jacobi preconditioning.
        iterations: Products with the system. A sample stops for good where its direction has no positive curvature:
            it is solved, or its system is not what it should be, as a network's Jacobian may be.
    """
    axes = tuple(range(1, right.ndim))
    w, residual = torch.zeros_like(right), right
    direction = scaled = residual / scale
    remaining = (residual * scaled).sum(axes, keepdim=True)
    for _ in range(iterations):
        product = system(direction)
        curvature = (direction * product).sum(axes, keepdim=True)
        step = torch.where(curvature > 0, remaining / curvature, 0.0)
        w = w + step * direction
        residual = residual - step * product
        scaled = residual / scale
        before, remaining = remaining, (residual * scaled).sum(axes, keepdim=True)
        direction = torch.where(step > 0, scaled + remaining / before * direction, 0.0)
    return w


class Belief(NamedTuple):
    """What the network knows about x_0 at x_t."""

    mean: torch.Tensor  # x̂_0, (B, C, H, W)
    variance: float | torch.Tensor  # r^2, broadcastable to the coordinates
    covariance: Callable[[torch.Tensor], torch.Tensor]  # its product with an image


class Prior(NamedTuple):
    """The law of the data before anything is seen, N(m, S): S of each coordinate of V^T x."""

    mean: torch.Tensor  # (B, C, H, W), of the pixels
    variance: float | torch.Tensor  # broadcastable to (B, C, H, W), of the coordinates


def resampled_levels(num_levels: int, jump_length: int, resamples: int) -> list[int]:
    """RePaint's walk: on arrival at every j-th level, counted from the last one, back by j levels.

    Args:
        num_levels: N.
        jump_length: j.
        resamples: How often each stretch of j levels is walked; 1 is the plain chain.

    Returns:
        The level of each network call, 0 .. N - 1, the noisiest first. Where one is not the successor of the one
        before, the chain goes back to it.

    Raises:
        ValueError: If a number is not positive, or there are not more levels than the chain is to go back.
    """
    if jump_length < 1 or resamples < 1:
        raise ValueError(f"need jump_length and resamples >= 1, got {jump_length} and {resamples}")
    if resamples > 1 and jump_length >= num_levels:
        raise ValueError(f"jump_length={jump_length} needs more levels than that, got {num_levels}")
    walk = []
    for level in range(num_levels):
        if level >= jump_length and (num_levels - 1 - level) % jump_length == 0:
            walk += list(range(level - jump_length, level)) * (resamples - 1)
        walk.append(level)
    return walk


def noisy_posterior(measurement: SpectralMeasurement, prior: Prior, noise: torch.Tensor, level: Level) -> torch.Tensor:
    """Draws from p(x_t | y) where x_0 has the law of the prior, from standard normal noise; all (B, C, H, W)."""
    V_T, V = measurement.operator.to_spectral, measurement.operator.from_spectral
    mean, variance = measurement.condition(V_T(prior.mean), prior.variance)
    return V(level.alpha * mean + (level.alpha**2 * variance + level.sigma**2) ** 0.5 * V_T(noise))


class RestorationMethod(ABC):
    """How a chain is told of the measurement."""

    @abstractmethod
    def start(self, noise: torch.Tensor, level: Level) -> torch.Tensor:
        """Draws x_T on the first level, from standard normal noise; all (B, C, H, W)."""

    @abstractmethod
    def step(
        self, sample: torch.Tensor, belief: Belief, t: Level, u: Level, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Goes from level t to u.

        Args:
            sample: x_t, (B, C, H, W).
            belief: What the network says there.
            t, u: The levels.
            noise: Standard normal, or zeros for the mean, (B, C, H, W).

        Returns:
            x_u, and x̂_0 as the measurement corrects it. Both (B, C, H, W).
        """


class SpectralPosterior(RestorationMethod):
    """Conditions the Gaussian p(x_0 | x_t) on the measurement.

    Args:
        measurement: What is known.
        prior: The law of the data, for the start.
        iterations: Of conjugate gradients, at least 1, for "covariance" in the docstring of this module; None for
            "spectral".

    Raises:
        ValueError: If the number of iterations is not positive.
    """

    def __init__(self, measurement: SpectralMeasurement, prior: Prior, iterations: int | None = None) -> None:
        if iterations is not None and iterations < 1:
            raise ValueError(f"need iterations >= 1, got {iterations}")
        self.measurement, self.prior, self.iterations = measurement, prior, iterations
        self.operator = measurement.operator

    def start(self, noise: torch.Tensor, level: Level) -> torch.Tensor:
        return noisy_posterior(self.measurement, self.prior, noise, level)

    def step(
        self, sample: torch.Tensor, belief: Belief, t: Level, u: Level, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        law = transition(t.alpha, t.sigma, u.alpha, u.sigma)
        mean, variance = self.measurement.condition(self.operator.to_spectral(belief.mean), belief.variance)
        if self.iterations is not None:
            mean = self.measurement.condition_jointly(belief, self.iterations)
        deviation = (law.posterior_variance + law.original_weight**2 * variance) ** 0.5
        corrected = self.operator.from_spectral(mean)
        return law.mean(sample, corrected) + self.operator.from_spectral(deviation * noise), corrected


class Replacement(RestorationMethod):
    """Replaces the known pixels on each level; "replacement" in the docstring of this module.

    Args:
        measurement: Of a `Mask`, without noise.
        prior: The law of the data, for the start.

    Raises:
        ValueError: If the operator is no mask, or the measurement has noise.
    """

    def __init__(self, measurement: SpectralMeasurement, prior: Prior) -> None:
        if not isinstance(measurement.operator, Mask):
            raise ValueError(f"replacement is of pixels: it needs a Mask, got a {type(measurement.operator).__name__}")
        if measurement.noise_level != 0:
            raise ValueError(f"replacement takes known pixels as exact, got noise_level={measurement.noise_level}")
        self.measurement, self.prior = measurement, prior

    def start(self, noise: torch.Tensor, level: Level) -> torch.Tensor:
        return noisy_posterior(self.measurement, self.prior, noise, level)

    def step(
        self, sample: torch.Tensor, belief: Belief, t: Level, u: Level, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        known, y = self.measurement.is_measured, self.measurement.values
        law = transition(t.alpha, t.sigma, u.alpha, u.sigma)
        deviation = (law.posterior_variance + law.original_weight**2 * belief.variance) ** 0.5
        unknown = law.mean(sample, belief.mean) + deviation * noise
        return torch.where(known, u.alpha * y + u.sigma * noise, unknown), torch.where(known, y, belief.mean)


class DDRM(RestorationMethod):
    """The update of Kawar et al. 2022; "ddrm" in the docstring of this module.

    Args:
        measurement: What is known.
        eta: Share of fresh noise in what is not measured, or too noisily; 0 .. 1.
        eta_b: Share of the measurement where it is better than the state; 0 .. 1.

    Raises:
        ValueError: If a share is not in 0 .. 1.
    """

    def __init__(self, measurement: SpectralMeasurement, eta: float = 0.85, eta_b: float = 1.0) -> None:
        if not (0 <= eta <= 1 and 0 <= eta_b <= 1):
            raise ValueError(f"need eta and eta_b in 0 .. 1, got {eta} and {eta_b}")
        self.operator, self.eta, self.eta_b = measurement.operator, eta, eta_b
        s, is_measured = measurement.singular_values, measurement.is_measured
        inverse = torch.where(is_measured, 1 / s, 0.0)
        self.measured = inverse * measurement.values  # y_i
        self.measured_noise = torch.where(is_measured, measurement.noise_level * inverse, torch.inf)  # tau_i

    def start(self, noise: torch.Tensor, level: Level) -> torch.Tensor:
        spread = level.alpha * self.measured_noise
        is_better = spread <= level.sigma
        mean = torch.where(is_better, level.alpha * self.measured, 0.0)
        deviation = (level.sigma**2 - torch.where(is_better, spread, 0.0) ** 2).sqrt()
        return self.operator.from_spectral(mean + deviation * self.operator.to_spectral(noise))

    def step(
        self, sample: torch.Tensor, belief: Belief, t: Level, u: Level, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sigma, tau, y = u.sigma / u.alpha, self.measured_noise, self.measured
        x_0 = self.operator.to_spectral(belief.mean)
        eps = self.operator.to_spectral((sample - t.alpha * belief.mean) / t.sigma)
        towards = torch.where(tau.isinf(), eps, (y - x_0) / tau)  # where tau = 0 it is not used
        is_better = tau <= sigma
        blend = (1 - self.eta_b) * x_0 + self.eta_b * y
        mean = torch.where(is_better, blend, x_0 + (1 - self.eta**2) ** 0.5 * sigma * towards)
        left = sigma**2 - self.eta_b**2 * torch.where(is_better, tau, 0.0) ** 2
        deviation = torch.where(is_better, left.sqrt(), self.eta * sigma)
        return u.alpha * self.operator.from_spectral(mean + deviation * noise), belief.mean
