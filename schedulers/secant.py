r"""The secant step: a reverse step whose second-order term and variance are measured by the sampler's own last step.

In the coordinates y = x / alpha with noise level s = sigma / alpha, a first-order step t -> s' with a share eta of the
ancestral noise is

    y' = m + b n + noise of variance eta^2 beta~,    m = x̂_0,  n = y - m,  beta~ = s'^2 (1 - s'^2 / s^2),
                                                     b = sqrt(s'^2 - eta^2 beta~) / s

It treats x_0 as known: what is missing is the variance k^2 Cov[x_0 | y], k = 1 - b. By Tweedie's second-order formula
Cov[x_0 | y] = s^2 L with L = d m / d y; its eigenvalues lie in 0 .. 1 but between modes, where they are held to 1.
One Jacobian-vector product of the network with a known vector is at hand for nothing: the step p -> t before went to a
state y that is u = y - E[y | y_p] away from where it was expected, and x̂_0 is a martingale of the reverse chain, so
its change

    D = m - m_p = L u        exactly for Gaussian data, and with a secant slope of m for any other.

**Second-order term.** The step adds c D. For Gaussian data with L = R I the states y, y_p have variances V =
s^2 / (1 - R) and V_p, and with r_p = s / s_p, L_p = r_p^2 R / (1 - R + r_p^2 R) and Cov[y, y_p] = k_p V_p, the step
keeps Var[y'] exact if

    Cov[y, u] / V = 1 - k_p =: X,     Var[u] / V = 1 - 2 k_p + L_p + (1 - L_p) r_p^2 =: U,     K = R + (1 - R) b,
    c^2 R U + 2 c K X = (1 - R) k^2      =>      c = q / (K X + sqrt(K^2 X^2 + R U q)),     q = (1 - R) k^2

k_p^2 = L_p + (1 - L_p) b_p^2 is exact for eta = 0 and an approximation otherwise. So c D is what a multistep solver
extrapolates, with a coefficient that is measured rather than assumed. For small steps it is that of DPM-Solver++(2M),
whatever R. For large ones it falls with R: with eta = 0 and noise levels that halve, from twice that at R -> 0, where
x̂_0 hardly depends on the state, to a third of it at R -> 1.

**Isotropic remainder.** One direction cannot carry the covariance of all. Moments of the spectrum of L are seen:

    l_1 = tr L / d        = l_u + d w (D - l_u u).z / (d w^2 |z|^2 + |u|^2)     with l_u = D.u / |u|^2: see below
    l_2 = tr L^2 / tr L   = |D|^2 / D.u
    l_3 = tr L^3 / tr L^2 ~ l_2 max(1, l_2 / l_1)^(1/2), at most 1: the mean slope along D. These ratios grow, and
                            stop at 1; this is half way between no growth and growth as before

so R = l_3 gives c, and isotropic noise fills the trace of k^2 s^2 L up with what c D does not give on average,

    l_1 s^2 (k^2 - (2 c K X + c^2 l_2 U) / (1 - l_2))_+        with K, X and U at R = l_2.

All moments agree if L = R I, where the step is exact, and l_2 = l_3 = 1 if every direction is known or unknown.

l_u is the mean slope in the directions that u happens to have. That of all is D.z / (w |z|^2), by the isotropic noise
w z in u (Stein's identity), but its error is that of the rest of u over w. Two things keep that small. Only what l_u
does not explain, D - l_u u, is measured along z; so there is no error if L = R I. And |u|^2 in the denominator takes
the correction back where w |z| is below |u| / sqrt(d), where it could not be told from chance.

**The last step** goes to m, or to a draw from N(m, l_1 s^2 I) if its noise is kept.

Nothing here costs a network call. Everything is a function of one sample alone. Where its channels differ in scale, as
those of latents may, the same is done for each channel by itself: L is then taken to have no blocks between channels.

Source: this library; docs/self_estimated_variance.md has the derivation, figures and where it fails. It rests on Stein
1981, "Estimation of the Mean of a Multivariate Normal Distribution", Ann. Statist. 9; Efron 2011, "Tweedie's Formula
and Selection Bias", J. Amer. Statist. Assoc. 106; and, as a multistep method, Lu et al. 2022, arXiv:2211.01095.

    symbol     code         shape         meaning
    y, m, D    y, m, D      (B, *)        state, x̂_0, change of x̂_0; in units of the data
    s, s'      noise        ()            noise levels sigma / alpha here and where the step goes
    l_1 .. R   slope ..     (B, 1, ..)    mean slopes of x̂_0, 0 .. 1; (B, C, 1, ..) per channel
"""

import math
from typing import NamedTuple

import torch

from annealers.schedulers.gaussian_path import Level, noise_ratio

NARROW = 1e-6  # slopes are kept this far from 0 and 1, where the formulas divide by them


class Innovation(NamedTuple):
    """What a step leaves behind for the next: what was expected of it, and the isotropic noise that it drew.

    Everything is in the coordinates y = x / alpha of the level that the step went to.
    """

    start: Level
    level: Level
    original: torch.Tensor  # x̂_0 at the start
    expected: torch.Tensor  # E[y | y at the start]
    contraction: float  # b of the step
    noise: torch.Tensor | None
    deviation: torch.Tensor | float
    moved: float | torch.Tensor = 0.0  # variance per coordinate that an exact step would have moved the state by


class Slopes(NamedTuple):
    """Mean slopes of x̂_0, (B, 1, ..), float64: of all coordinates, along the innovation, and along its image."""

    average: torch.Tensor
    along_innovation: torch.Tensor
    along_change: torch.Tensor


def measured_slopes(
    change: torch.Tensor, innovation: torch.Tensor, past: Innovation, per_channel: bool = False
) -> Slopes:
    """l_1, l_2 and l_3 from D = L u, of each sample, or of each of its channels, (B, C, 1, ..)."""
    inner = channel_inner if per_channel else sample_inner
    Du, DD, uu = (inner(a, b) for a, b in ((change, innovation), (change, change), (innovation, innovation)))
    tiny = torch.finfo(Du.dtype).tiny
    average = Du / uu.clamp(min=tiny)
    if past.noise is not None:
        d, z, w = change.numel() // Du.numel(), past.noise, past.deviation
        unexplained = inner(change, z) - average * inner(innovation, z)
        average = average + d * w * unexplained / (d * w**2 * inner(z, z) + uu).clamp(min=tiny)
    along_innovation = (DD / Du.clamp(min=tiny)).clamp(NARROW, 1 - NARROW)
    average = average.clamp(0, 1)
    growth = along_innovation / average.clamp(min=NARROW)
    along_change = (along_innovation * growth.clamp(min=1).sqrt()).clamp(NARROW, 1 - NARROW)
    return Slopes(average, along_innovation, along_change)


def contraction(here: Level, there: Level, eta: float) -> tuple[float, float]:
    """b of the step, and the variance eta^2 beta~ of its noise, in units of the data."""
    ratio = noise_ratio(here, there)
    end = there.sigma / there.alpha
    variance = eta**2 * end**2 * (1 - ratio**2)
    return math.sqrt(max(end**2 - variance, 0.0)) * (here.alpha / here.sigma), variance


def moments(
    slope: torch.Tensor, step_contraction: float, past_contraction: float, past_ratio: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K, X and U for Gaussian data with L = slope I."""
    past_slope = past_ratio**2 * slope / (1 - slope + past_ratio**2 * slope)
    k_p = (past_slope + (1 - past_slope) * past_contraction**2).sqrt()
    shrinkage = past_slope + (1 - past_slope) * past_ratio**2
    return slope + (1 - slope) * step_contraction, 1 - k_p, (1 - 2 * k_p + shrinkage).clamp(min=0)


def secant_coefficient(
    slope: torch.Tensor, step_contraction: float, past_contraction: float, past_ratio: float
) -> torch.Tensor:
    """c, the root of c^2 R U + 2 c K X = (1 - R) k^2."""
    K, X, U = moments(slope, step_contraction, past_contraction, past_ratio)
    q = (1 - slope) * (1 - step_contraction) ** 2
    return q / (K * X + (K**2 * X**2 + slope * U * q).sqrt()).clamp(min=NARROW**2)


def missing_variance(
    slopes: Slopes, c: torch.Tensor, noise: float, step_contraction: float, past_contraction: float, past_ratio: float
) -> torch.Tensor:
    """Variance of the isotropic remainder, (B, 1, ..), in units of the data squared."""
    K, X, U = moments(slopes.along_innovation, step_contraction, past_contraction, past_ratio)
    carried = (2 * c * K * X + c**2 * slopes.along_innovation * U) / (1 - slopes.along_innovation)
    return slopes.average * noise**2 * ((1 - step_contraction) ** 2 - carried).clamp(min=0)


def sample_inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner product of each sample, (B, 1, ..), as float64 so that the few numbers made from it lose nothing more."""
    products = torch.linalg.vecdot(a.reshape(len(a), -1), b.reshape(len(b), -1))
    return _wide(products).reshape((-1,) + (1,) * (a.ndim - 1))


def channel_inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner product of each channel of each sample, (B, C, 1, ..), as float64."""
    if a.ndim < 3:
        raise ValueError(f"slopes per channel need samples of shape (B, C, ..), got {tuple(a.shape)}")
    products = torch.linalg.vecdot(a.flatten(2), b.flatten(2))
    return _wide(products).reshape(products.shape + (1,) * (a.ndim - 2))


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)  # which that device has not
