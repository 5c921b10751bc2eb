r"""Losses and likelihood terms of diffusion models: pure functions, one number per sample.

    simple_loss               L_simple = ||prediction - target||^2 / d                Ho et al. 2020, Eq. 14
    min_snr_weight            its weight, by prediction type                          Hang et al. 2023, Sec. 3.4
    normal_kl                 KL of two normal laws, the parts of the bound
    variational_bound_term    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)),
                              L_0 = -log p(x_0 | x_1) with the 8-bit decoder          Ho et al. 2020, Eqs. 5, 13
    divergence_term, decoder_term    these two, for steps of which it is known that they are of one kind
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

import numpy as np
import torch


class ReverseChain(Protocol):
    """The part of a scheduler that the bound needs; every scheduler on a Gaussian path has it."""

    def __len__(self) -> int: ...

    @property
    def train_timesteps(self) -> np.ndarray: ...

    def signal_and_noise(self, timesteps: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]: ...

    def posterior(
        self,
        original_samples: torch.Tensor,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        previous_timesteps: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def reverse_law(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        previous_timesteps: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


def mean_flat(values: torch.Tensor) -> torch.Tensor:
    """Means over all axes but the first, (B, *) -> (B,), in at least float32."""
    return _at_least_float32(values).reshape(len(values), math.prod(values.shape[1:])).mean(dim=1)


def simple_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L_simple, (B, *) and (B, *) -> (B,); half precision is compared in float32."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction and target differ in shape: {tuple(prediction.shape)} and {tuple(target.shape)}")
    return mean_flat((_at_least_float32(prediction) - _at_least_float32(target)) ** 2)


def min_snr_weight(snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Weight of `simple_loss` that makes it min(snr, gamma) ||x_0 - x̂_0||^2 / d, the same for every prediction type.

    Where alpha^2 + sigma^2 = 1, the squared error of each prediction is that of x_0 times

        sample  1        epsilon  snr        v_prediction  snr + 1        score  snr / sigma^2 = snr (snr + 1)

    so "score" has the weight of "epsilon" times sigma^2; min(snr, gamma) / snr has the limit 1 at snr = 0.

    Args:
        snr: alpha_t^2 / sigma_t^2, (B,), >= 0.
        gamma: Largest weight of the error in x_0, > 0; 5 in the paper.
        prediction_type: What the network predicts.

    Returns:
        One weight per sample, (B,).

    Raises:
        ValueError: If gamma is not positive or the prediction type is unknown.
    """
    if not gamma > 0:
        raise ValueError(f"need gamma > 0, got {gamma}")
    if prediction_type == "sample":
        return snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return gamma / snr.clamp(min=gamma)
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    if prediction_type == "score":
        return gamma / snr.clamp(min=gamma) / (snr + 1)
    raise ValueError(
        f"prediction_type must be 'sample', 'epsilon', 'v_prediction' or 'score', got {prediction_type!r}"
    )


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
    x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor, bins: int = 256
) -> torch.Tensor:
    """Log-probability in nats of the bin of x under N(mean, scale^2), elementwise (Ho et al. 2020, Eq. 13).

    Each of the `bins` values on [-1, 1] owns the interval of width 2 / (bins - 1) around it, and the outer two reach
    to infinity. The difference of the two distribution functions Phi is taken in logarithms and in the lower tail,

        log(Phi(b) - Phi(a)) = log Phi(b) + log(1 - exp(log Phi(a) - log Phi(b))),

    so that it neither vanishes nor loses its gradient far from the mean.

    Args:
        x: Values on the grid of bins, (B, *).
        mean, log_scale: Of the Gaussian, broadcastable to x.
        bins: Number of values, 256 for 8-bit images.

    Returns:
        One logarithm per value, (B, *), in at least float32.
    """
    x, mean, log_scale = _at_least_float32(x), _at_least_float32(mean), _at_least_float32(log_scale)
    half_width = 1 / (bins - 1)
    upper = (x - mean + half_width) * (-log_scale).exp()
    lower = (x - mean - half_width) * (-log_scale).exp()
    below, above = _log_normal_cdf(upper), _log_normal_cdf(-lower)  # the outer bins

    mirrored = upper + lower > 0  # P(lower < z < upper) = P(-upper < z < -lower)
    a, b = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
    log_b = _log_normal_cdf(b)
    # the clamp keeps log 0 away where the scale is so large that both ends round to the same number
    gap = (_log_normal_cdf(a) - log_b).clamp(max=-torch.finfo(log_b.dtype).tiny)
    inside = log_b + torch.log(-torch.expm1(gap))
    return torch.where(x < -1 + half_width, below, torch.where(x > 1 - half_width, above, inside))


def variational_bound_term(
    scheduler: ReverseChain,
    model_output: torch.Tensor,
    original_samples: torch.Tensor,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    previous_timesteps: torch.Tensor | None = None,
) -> torch.Tensor:
    """The divergence of a step t -> s, or of a step to the data its negative log-likelihood, in bits per dimension.

    Args:
        scheduler: Of the training chain or, with `previous_timesteps`, with its schedule set.
        model_output: Output of the network at (`sample`, `timesteps`), (B, *) or with learned variance (B, 2C, *).
        original_samples: x_0, 8-bit images scaled to [-1, 1], (B, *).
        sample: x_t, (B, *).
        timesteps: t, (B,).
        previous_timesteps: s, (B,); None for t - 1. The data is the number before the first train timestep.

    Returns:
        One term per sample, (B,).
    """
    s = timesteps - 1 if previous_timesteps is None else previous_timesteps
    mean, log_variance, _ = scheduler.reverse_law(model_output, sample, timesteps, previous_timesteps)
    # To the data the posterior is a point: the divergence is infinite there, with a finite gradient, and not used.
    divergence = _divergence(scheduler, mean, log_variance, original_samples, sample, timesteps, s)
    to_the_data = s <= int(scheduler.train_timesteps[0]) - 1  # on a flow path there are levels between
    return torch.where(to_the_data, _decoder(mean, log_variance, original_samples), divergence)


def divergence_term(
    scheduler: ReverseChain,
    model_output: torch.Tensor,
    original_samples: torch.Tensor,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    previous_timesteps: torch.Tensor,
) -> torch.Tensor:
    """`variational_bound_term` of steps that do not lead to the data, at a fraction of its cost."""
    mean, log_variance, _ = scheduler.reverse_law(model_output, sample, timesteps, previous_timesteps)
    return _divergence(scheduler, mean, log_variance, original_samples, sample, timesteps, previous_timesteps)


def decoder_term(
    scheduler: ReverseChain,
    model_output: torch.Tensor,
    original_samples: torch.Tensor,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
    previous_timesteps: torch.Tensor,
) -> torch.Tensor:
    """`variational_bound_term` of steps that lead to the data."""
    mean, log_variance, _ = scheduler.reverse_law(model_output, sample, timesteps, previous_timesteps)
    return _decoder(mean, log_variance, original_samples)


def _divergence(
    scheduler: ReverseChain,
    mean: torch.Tensor,
    log_variance: torch.Tensor,
    x_0: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    s: torch.Tensor,
) -> torch.Tensor:
    true_mean, true_variance = scheduler.posterior(x_0, x_t, t, s)
    return mean_flat(normal_kl(true_mean, true_variance.log(), mean, log_variance)) / math.log(2)


def _decoder(mean: torch.Tensor, log_variance: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
    return -mean_flat(discretized_gaussian_log_likelihood(x_0, mean, 0.5 * log_variance)) / math.log(2)


def prior_bound_term(
    scheduler: ReverseChain, original_samples: torch.Tensor, timestep: int | float | None = None
) -> torch.Tensor:
    """L_T in bits per dimension: what the last level, or that of a timestep, tells of x_0, (B, *) -> (B,)."""
    x_0 = _at_least_float32(original_samples)
    last = scheduler.train_timesteps[-1].item() if timestep is None else timestep
    alpha, sigma = scheduler.signal_and_noise(torch.tensor(last, device=x_0.device), dtype=x_0.dtype)
    zero = torch.zeros_like(sigma)
    return mean_flat(normal_kl(alpha * x_0, 2 * sigma.log(), zero, zero)) / math.log(2)


def hybrid_loss(
    scheduler: ReverseChain,
    model_output: torch.Tensor,
    original_samples: torch.Tensor,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """The bound's part of L_hybrid = L_simple + 0.001 L_vlb: T L_{t-1}, which estimates L_vlb without bias.

    The mean is detached, so that the bound trains the variance alone (Nichol & Dhariwal 2021, Sec. 3.1). The arguments
    are those of `variational_bound_term`, with a learned variance and timesteps drawn uniformly from 0 .. T - 1.
    """
    prediction, variance_values = model_output.chunk(2, dim=1)
    frozen = torch.cat([prediction.detach(), variance_values], dim=1)
    return len(scheduler) * variational_bound_term(scheduler, frozen, original_samples, sample, timesteps)


def _log_normal_cdf(z: torch.Tensor) -> torch.Tensor:
    """log Phi(z), by the scaled complementary error function where z is low.

    `torch.special.log_ndtr` has the same values, but wrong gradients there: in float32, PyTorch 2.15, 956 for the true
    1000 at z = -1000, and 0.4 for 100,000 at z = -100,000.
    """
    is_low = z < -1
    low, high = torch.where(is_low, z, -1.0), torch.where(is_low, 0.0, z)  # each branch where it is finite
    log_low = torch.log(torch.special.erfcx(-low / math.sqrt(2)) / 2) - low**2 / 2
    return torch.where(is_low, log_low, torch.log1p(-torch.special.erfc(high / math.sqrt(2)) / 2))


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
