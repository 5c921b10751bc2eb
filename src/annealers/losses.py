r"""Losses and likelihood terms of diffusion models: pure functions, one number per sample.

    simple_loss               L_simple = ||prediction - target||^2 / d                Ho et al. 2020, Eq. 14
    min_snr_weight            its weight, by prediction type                          Hang et al. 2023, Sec. 3.4
    variational_bound_term    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)),
                              L_0 = -log p(x_0 | x_1) with the 8-bit decoder          Ho et al. 2020, Eqs. 5, 13
    prior_bound_term          L_T = KL(q(x_T | x_0) || N(0, I))                       Ho et al. 2020, Eq. 5
    hybrid_loss               T L_{t-1} with the mean detached                        Nichol & Dhariwal 2021, Sec. 3.1

The terms of the bound are in bits per dimension: nats / (d ln 2), d being the number of values in a sample. They add
up, L_T + sum_t L_{t-1}, to an upper bound on -log2 p(x_0) / d for images of 256 levels scaled to [-1, 1].

Sources: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239; Nichol & Dhariwal 2021,
"Improved Denoising Diffusion Probabilistic Models", arXiv:2102.09672; Hang et al. 2023, "Efficient Diffusion Training
via Min-SNR Weighting Strategy", arXiv:2303.09556.
"""

import math
from typing import Protocol

import torch

LEVELS = 256


class ReverseChain(Protocol):
    """The part of a scheduler that the bound needs; every scheduler on a Gaussian path has it."""

    def __len__(self) -> int: ...

    def signal_and_noise(self, timesteps: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]: ...

    def posterior(
        self, original_samples: torch.Tensor, sample: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def reverse_law(
        self, model_output: torch.Tensor, sample: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


def mean_flat(values: torch.Tensor) -> torch.Tensor:
    """Means over all axes but the first, (B, *) -> (B,), in at least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32)).reshape(len(values), -1).mean(dim=1)


def simple_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L_simple, (B, *) and (B, *) -> (B,)."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction and target differ in shape: {tuple(prediction.shape)} and {tuple(target.shape)}")
    working = torch.promote_types(prediction.dtype, torch.float32)
    return mean_flat((prediction.to(working) - target.to(working)) ** 2)


def min_snr_weight(snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Weight of `simple_loss` that makes it min(snr, gamma) ||x_0 - x̂_0||^2 / d, the same for every prediction type.

    Args:
        snr: alpha_t^2 / sigma_t^2, (B,); may be 0 except for "score".
        gamma: Largest weight of the error in x_0; 5 in the paper.
        prediction_type: What the network predicts; the error of each is that of x_0 times a factor:
            eps: alpha^2 / sigma^2, v: 1 / sigma^2 = snr + 1, score: alpha^2 / sigma^4 = snr (snr + 1), where
            alpha^2 + sigma^2 = 1.
    """
    capped = snr.clamp(max=gamma)
    if prediction_type == "sample":
        return capped
    if prediction_type == "epsilon":  # min(snr, gamma) / snr, with its limit 1 at snr = 0
        return gamma / snr.clamp(min=gamma)
    if prediction_type == "v_prediction":
        return capped / (snr + 1)
    if prediction_type == "score":
        return capped / (snr * (snr + 1))
    raise ValueError(f"no min-SNR weight for prediction_type={prediction_type!r}")


def normal_kl(
    mean_1: torch.Tensor, log_variance_1: torch.Tensor, mean_2: torch.Tensor, log_variance_2: torch.Tensor
) -> torch.Tensor:
    """KL(N(mean_1, variance_1) || N(mean_2, variance_2)) in nats, elementwise."""
    return 0.5 * (
        log_variance_2
        - log_variance_1
        + (log_variance_1 - log_variance_2).exp()
        + (mean_1 - mean_2) ** 2 * (-log_variance_2).exp()
        - 1
    )


def discretized_gaussian_log_likelihood(
    x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor, levels: int = LEVELS
) -> torch.Tensor:
    """Log-probability in nats of the level of x under N(mean, scale^2), elementwise (Ho et al. 2020, Eq. 13).

    Each of the `levels` values on [-1, 1] owns the interval of width 2 / (levels - 1) around it, and the outer two
    reach to infinity. The difference of the two distribution functions is taken on the side where both are small, in
    logarithms, so that it neither vanishes nor loses its gradient far from the mean.

    Args:
        x: Images scaled to [-1, 1], (B, *).
        mean, log_scale: Of the Gaussian, broadcastable to x.
        levels: Number of grey levels.
    """
    half_width = 1 / (levels - 1)
    inverse_scale = (-log_scale).exp()
    upper = (x - mean + half_width) * inverse_scale
    lower = (x - mean - half_width) * inverse_scale
    # P(lower < z < upper) = P(-upper < z < -lower): take the one whose ends are negative, or nearer to it.
    flip = upper + lower > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    lowest, highest = x <= -1 + half_width, x >= 1 - half_width
    log_upper = torch.special.log_ndtr(upper)
    # log(e^a - e^b) = a + log(1 - e^(b - a))
    gap = (torch.special.log_ndtr(lower) - log_upper).clamp(max=-torch.finfo(x.dtype).tiny)
    inside = log_upper + torch.log(-torch.expm1(gap))
    below = torch.special.log_ndtr((x - mean + half_width) * inverse_scale)
    above = torch.special.log_ndtr(-(x - mean - half_width) * inverse_scale)
    return torch.where(lowest, below, torch.where(highest, above, inside))


def variational_bound_term(
    scheduler: ReverseChain,
    model_output: torch.Tensor,
    original_samples: torch.Tensor,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """L_{t-1}, or L_0 at t = 0, in bits per dimension.

    Args:
        scheduler: Of the training chain.
        model_output: Output of the network at (`sample`, `timesteps`), (B, *) or with learned variance (B, 2C, *).
        original_samples: x_0, 8-bit images scaled to [-1, 1], (B, *).
        sample: x_t, (B, *).
        timesteps: t, (B,).

    Returns:
        One term per sample, (B,).
    """
    mean, log_variance, _ = scheduler.reverse_law(model_output, sample, timesteps)
    true_mean, true_variance = scheduler.posterior(original_samples, sample, timesteps)
    to_the_data = timesteps == 0
    # At t = 0 the posterior is a point; its variance is replaced, for the term is not used there.
    true_variance = torch.where(true_variance > 0, true_variance, torch.ones_like(true_variance))
    divergence = mean_flat(normal_kl(true_mean, true_variance.log(), mean, log_variance))
    decoder = -mean_flat(discretized_gaussian_log_likelihood(original_samples, mean, 0.5 * log_variance))
    return torch.where(to_the_data, decoder, divergence) / math.log(2)


def prior_bound_term(scheduler: ReverseChain, original_samples: torch.Tensor) -> torch.Tensor:
    """L_T in bits per dimension: what the last level still tells of x_0, (B,)."""
    last = torch.full((len(original_samples),), len(scheduler) - 1, device=original_samples.device)
    alpha, sigma = scheduler.signal_and_noise(last, dtype=original_samples.dtype)
    shape = (-1,) + (1,) * (original_samples.ndim - 1)
    zero = torch.zeros((), dtype=original_samples.dtype, device=original_samples.device)
    divergence = normal_kl(alpha.reshape(shape) * original_samples, 2 * sigma.log().reshape(shape), zero, zero)
    return mean_flat(divergence) / math.log(2)


def hybrid_loss(
    scheduler: ReverseChain,
    model_output: torch.Tensor,
    original_samples: torch.Tensor,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """The bound's part of L_hybrid = L_simple + 0.001 L_vlb: an unbiased estimate T L_{t-1} of L_vlb, (B,).

    The mean is detached, so that the bound trains the variance alone (Nichol & Dhariwal 2021, Sec. 3.1).
    """
    prediction, variance_values = model_output.chunk(2, dim=1)
    frozen = torch.cat([prediction.detach(), variance_values], dim=1)
    return len(scheduler) * variational_bound_term(scheduler, frozen, original_samples, sample, timesteps)
