r"""One reverse step t -> s of each predictor, as the mean and the variance of x_s given x_t, eps-hat and x̂_0.

    predictor            mean                                                variance
    ddpm                 a sigma_s^2 / sigma_t^2 x_t + alpha_s v / sigma_t^2 x̂_0   a choice   Ho et al. 2020, Eqs. 6-7
    ddim                 alpha_s x̂_0 + sqrt(sigma_s^2 - eta^2 beta~) eps-hat   eta^2 beta~    Song et al. 2020, Eq. 12
    reverse_diffusion    (2 - sqrt(a_1)) u + b_1 s                             b_1            Song et al. 2021, App. E
    euler_maruyama       u + gamma (u + 2 s)                                   2 gamma
    modified ..          the same                                              2 gamma tau_s / tau_t
    probability_flow     see there                                             0              Lu et al. 2022

with a = alpha_t / alpha_s, v = sigma_t^2 - a^2 sigma_s^2 and beta~ = v sigma_s^2 / sigma_t^2, for any path.

The last three discretise an SDE, so they depend on its coordinates u. A beta schedule and a flow path are taken as an
Ornstein-Uhlenbeck chain, dU = -U dtau + sqrt(2) dB, in u = x / sqrt(alpha^2 + sigma^2). A geometric ladder is taken as
Brownian motion, dU = sqrt(2) dB, in u = x / alpha, and its drift has no term u. With the noise-to-signal ratio
r = sigma / alpha the clock, whose difference is gamma = tau_t - tau_s, is

    tau = 1/2 log(1 + r^2)   Ornstein-Uhlenbeck        tau = r^2 / 2   Brownian

and a_1 = e^{-2 gamma}, b_1 = 1 - a_1 for the first, or a_1 = 1, b_1 = 2 gamma for the second. Where there is no signal
(alpha_t = 0) the clock of the chain is infinite and no Euler step starts there: that one step is exact, `ddpm`.

Sources: Ho, Jain, Abbeel 2020, arXiv:2006.11239; Song, Meng, Ermon 2020, "Denoising Diffusion Implicit Models",
arXiv:2010.02502; Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole 2021, "Score-Based Generative Modeling through
Stochastic Differential Equations", arXiv:2011.13456; Durham & Gallant 2002, "Numerical Techniques for Maximum
Likelihood Estimation of Continuous-Time Diffusion Processes", J. Business & Economic Statistics 20.

    symbol    code       shape    meaning
    x_t       x_t        (B, *)   state
    eps-hat   eps        (B, *)   prediction of the noise; the score is s = -eps-hat / sigma in the coordinates of x
    x̂_0       x_0        (B, *)   prediction of the data
    tau       clock      ()       time of the SDE, 0 at the data
"""

import math
from typing import NamedTuple

import torch

from annealers.schedulers.gaussian_path import Level, noise_ratio, transition


class ReverseStep(NamedTuple):
    """The law N(mean, variance I) of x_s."""

    mean: torch.Tensor
    variance: float


def ddpm(x_t: torch.Tensor, x_0: torch.Tensor, t: Level, s: Level) -> ReverseStep:
    """The posterior q(x_s | x_t, x̂_0); its mean is the exact E[x_s | x_t] for any data if x̂_0 = E[x_0 | x_t]."""
    law = transition(t.alpha, t.sigma, s.alpha, s.sigma)
    return ReverseStep(law.mean(x_t, x_0), law.posterior_variance)


def ddim(eps: torch.Tensor, x_0: torch.Tensor, t: Level, s: Level, eta: float) -> ReverseStep:
    """Non-Markovian sampling: eta = 0 is the probability flow's first-order exponential step, eta = 1 is `ddpm`."""
    variance = eta**2 * transition(t.alpha, t.sigma, s.alpha, s.sigma).posterior_variance
    return ReverseStep(s.alpha * x_0 + math.sqrt(max(s.sigma**2 - variance, 0.0)) * eps, variance)


def euler_maruyama(x_t: torch.Tensor, eps: torch.Tensor, t: Level, s: Level, is_brownian: bool) -> ReverseStep:
    """Euler-Maruyama for the reversed SDE (De Bortoli et al. 2021, arXiv:2106.01357, Sec. 2.1)."""
    scale_t, scale_s = coordinate_scale(t, is_brownian), coordinate_scale(s, is_brownian)
    gamma = clock(t, is_brownian) - clock(s, is_brownian)
    drift = 0.0 if is_brownian else gamma
    # in u = x / scale the score is -scale eps-hat / sigma
    mean = (1 + drift) / scale_t * x_t - 2 * gamma * scale_t / t.sigma * eps
    return ReverseStep(scale_s * mean, scale_s**2 * 2 * gamma)


def modified_euler_maruyama(
    x_t: torch.Tensor, eps: torch.Tensor, t: Level, s: Level, is_brownian: bool
) -> ReverseStep:
    """Euler-Maruyama with the variance of the bridge to the data: less noise near its end (Durham & Gallant 2002)."""
    step = euler_maruyama(x_t, eps, t, s, is_brownian)
    return ReverseStep(step.mean, step.variance * clock(s, is_brownian) / clock(t, is_brownian))


def reverse_diffusion(x_t: torch.Tensor, eps: torch.Tensor, t: Level, s: Level, is_brownian: bool) -> ReverseStep:
    """The reversed SDE discretised as its forward chain is (Song et al. 2021, Eqs. 46-47)."""
    scale_t, scale_s = coordinate_scale(t, is_brownian), coordinate_scale(s, is_brownian)
    if is_brownian:
        signal, noise = 1.0, 2 * (clock(t, True) - clock(s, True))
    else:
        ratio = (t.alpha / scale_t) / (s.alpha / scale_s)  # e^{-gamma}, and 0 where there is no signal
        signal, noise = 2 - ratio, 1 - ratio**2
    mean = signal / scale_t * x_t - noise * scale_t / t.sigma * eps
    return ReverseStep(scale_s * mean, scale_s**2 * noise)


def clock(level: Level, is_brownian: bool) -> float:
    """tau of a level."""
    if level.alpha == 0:
        return math.inf
    ratio = level.sigma / level.alpha
    return 0.5 * ratio**2 if is_brownian else 0.5 * math.log1p(ratio**2)


def coordinate_scale(level: Level, is_brownian: bool) -> float:
    """x = scale u, with u the coordinates in which the SDE is discretised."""
    return level.alpha if is_brownian else math.hypot(level.alpha, level.sigma)


def probability_flow(
    x_t: torch.Tensor,
    x_0: torch.Tensor,
    t: Level,
    s: Level,
    past: Level | None = None,
    past_x_0: torch.Tensor | None = None,
) -> torch.Tensor:
    """The exponential step of the probability flow, deterministic; x_s.

    With the log-SNR half-steps h = log(alpha_s / sigma_s) - log(alpha_t / sigma_t), and h' that of the step before,

        x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^{-h}) (x̂_0 + h / (2 h') (x̂_0 - x̂_0'))

    is of second order where a past x̂_0' is known and of first order, `ddim`, without one, as in the step to the data
    (Lu et al. 2022, arXiv:2211.01095, Algorithm 2).
    """
    decay = noise_ratio(t, s)  # e^{-h}
    if past is not None and s.sigma > 0 and past.alpha > 0:
        h, past_h = -math.log(decay), -math.log(noise_ratio(past, t))
        x_0 = x_0 + h / (2 * past_h) * (x_0 - past_x_0)
    return s.sigma / t.sigma * x_t + s.alpha * (1 - decay) * x_0
