r"""Score matching: losses that fit a vector field s to the score grad log p, one number per sample.

    denoising    ||s(x_t) + eps / sigma||^2                       at x_t = alpha x_0 + sigma eps     Vincent 2011
    implicit     1/2 ||s(x)||^2 + div s(x)                                                           Hyvarinen 2005
    sliced       1/2 (v^T s(x))^2 + v^T (grad s(x)) v             for random v                       Song et al. 2019
    sliced, VR   1/2 ||s(x)||^2 + v^T (grad s(x)) v               the same with less variance        Song et al. 2019

All are divided by d, the number of values in a sample. The last three do not need to know how x was made; at x = x_t,
for any s that does not grow too fast, integration by parts gives

    E||s(x_t) + eps / sigma||^2 = E[||s||^2 + 2 div s] + d / sigma^2,

that is, denoising = 2 implicit + 1 / sigma^2 in these units, and the sliced losses have the expectation of the
implicit one if E[v v^T] = I. So the score of x_t minimises each of them. With div s estimated by probes, the implicit
loss is the sliced one with less variance, term by term.

**Weights.** Over all levels the denoising loss is weighted by lambda_t. The error of a prediction of the noise or of
the data is that of the score times a number,

    ||eps - eps-hat||^2 = sigma^2 ||s + eps / sigma||^2,
    ||x_0 - x̂_0||^2     = sigma^4 / alpha^2 ||s + eps / sigma||^2,

and with SNR = alpha^2 / sigma^2 the weights of the three are

    kind             lambda_t, of the score             of eps            of x_0
    sigma_squared    sigma^2                            1                 SNR               Song & Ermon 2019
    min_snr          sigma^2 min(1, gamma / SNR)        min(1, gamma/SNR) min(SNR, gamma)   Hang et al. 2023
    likelihood       sigma^2 (SNR' / SNR - 1)           SNR' / SNR - 1    SNR' - SNR        Kingma et al. 2021
    simple           1 on what the network predicts: of eps, that is sigma_squared          Ho et al. 2020, Eq. 14

where SNR' is that of the level before, t - 1. Half the likelihood-weighted error is the divergence
KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of a step with the variance of the former, in nats. So T times its mean
over uniform t is the sum of them all, the part of the variational bound that depends on the network. It is the
discrete form of g(t)^2 (Song et al. 2021), since g^2 dt = -sigma^2 d log SNR: SNR' / SNR - 1 is -d log SNR to first
order, and the sum is a bound for this chain, where g(t)^2 / T would need many steps to be one.

The first level has no level before it, its SNR' is infinite, and its term of the bound is no divergence but the
decoder, -log p(x_0 | x_t). That g^2 is finite there does not help: it belongs to the integral below that level,
which is not the decoder either and, for data with a density, diverges. A Gaussian decoder N(x̂_0, v) has the error
||x_0 - x̂_0||^2 / 2v, so the weight is 1 / v of x_0, with the v that `DDPMAncestralScheduler.reverse_law` takes for
"fixed_small": that of the step before. For 8-bit data the decoder of the bound is that Gaussian in bins, and this
weight is what is left of it where the bins are narrow.

In the coordinates of a variance-exploding process, y_t = x_0 + s_t eps, the table is the same with sigma = s_t and
the score of y_t, and so are the weighted losses. At a level without signal SNR is 0, and weights that divide by it are
infinite.

    symbol   code        shape      meaning
    s        score       (B, *)     network's score at x_t
    eps      noise       (B, *)     standard normal noise
    sigma    sigma       (), (B,)   noise coefficient of the path
    v        directions  (K, B, *)  random directions

Sources: Hyvarinen 2005, "Estimation of Non-Normalized Statistical Models by Score Matching", JMLR 6; Vincent 2011, "A
Connection Between Score Matching and Denoising Autoencoders", doi:10.1162/NECO_a_00142; Song, Garg, Shi, Ermon 2019,
"Sliced Score Matching", arXiv:1905.07088, Sec. 3; Song & Ermon 2019, "Generative Modeling by Estimating
Gradients of the Data Distribution", arXiv:1907.05600, Sec. 3.2; Song, Durkan, Murray, Ermon 2021, "Maximum Likelihood
Training of Score-Based Diffusion Models", arXiv:2101.09258; Kingma, Salimans, Poole, Ho 2021, "Variational Diffusion
Models", arXiv:2107.00630; Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy",
arXiv:2303.09556.
"""

from typing import Literal, get_args

import torch

from annealers.divergence import VectorField, divergence
from annealers.losses import mean_flat
from annealers.schedulers.gaussian_path import GaussianPathScheduler, transition, working_dtype

Weighting = Literal["simple", "sigma_squared", "min_snr", "likelihood"]

# ---- losses ---------------------------------------------------------------------------------------------------------


def denoising_score_matching(score: torch.Tensor, noise: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
    """||s + eps / sigma||^2 / d.

    Args:
        score: s(x_t), (B, *).
        noise: eps, (B, *).
        sigma: Of x_t = alpha x_0 + sigma eps, > 0, () or (B,).

    Returns:
        One loss per sample, (B,); half precision is compared in float32.

    Raises:
        ValueError: If the shapes differ, or sigma is not one number or one per sample.
    """
    if score.shape != noise.shape:
        raise ValueError(f"score and noise differ in shape: {tuple(score.shape)} and {tuple(noise.shape)}")
    dtype = torch.promote_types(working_dtype(score), working_dtype(noise))
    scale = torch.as_tensor(sigma, dtype=dtype, device=score.device)
    if scale.shape not in ((), score.shape[:1]):
        raise ValueError(f"sigma must be one number or one per sample, {len(score)}, got {tuple(scale.shape)}")
    scale = scale.reshape((-1,) + (1,) * (score.ndim - 1))
    return mean_flat((score.to(dtype) + noise.to(dtype) / scale) ** 2)


def implicit_score_matching(
    score_function: VectorField, x: torch.Tensor, probes: torch.Tensor | None = None
) -> torch.Tensor:
    """(1/2 ||s||^2 + div s) / d, which needs no noise and no knowledge of how x was made.

    Args:
        score_function: s, (B, *) -> (B, *), in which no sample depends on another.
        x: Samples of the law whose score is sought, (B, *).
        probes: To estimate the divergence, (K, B, *), see `annealers.divergence.draw_probes`; None computes it with d
            backward passes.

    Returns:
        One loss per sample, (B,), which may be negative; the gradient that trains s costs another backward pass
        through those of the divergence.
    """
    score, div = divergence(score_function, x, probes)
    return 0.5 * mean_flat(score.to(working_dtype(score)) ** 2) + div / _size(x)


def sliced_score_matching(
    score_function: VectorField, x: torch.Tensor, directions: torch.Tensor, variance_reduced: bool = True
) -> torch.Tensor:
    """(1/2 (v^T s)^2 + v^T (grad s) v) / d, the mean over directions v.

    Args:
        score_function: s, (B, *) -> (B, *), in which no sample depends on another.
        x: Samples of the law whose score is sought, (B, *).
        directions: v with E[v v^T] = I, (K, B, *), see `annealers.divergence.draw_probes`.
        variance_reduced: Whether to put ||s||^2 for (v^T s)^2, which is its mean over v.

    Returns:
        One loss per sample, (B,), which may be negative.
    """
    if variance_reduced:
        return implicit_score_matching(score_function, x, directions)
    score, curvature = divergence(score_function, x, directions)
    products = directions.to(working_dtype(x)) * score  # (K, B, *)
    projections = products.reshape(*products.shape[:2], _size(x)).sum(dim=2)
    return (0.5 * (projections**2).mean(dim=0) + curvature) / _size(x)


def _size(x: torch.Tensor) -> int:
    """d, the number of values in a sample."""
    return x.shape[1:].numel()


# ---- weights --------------------------------------------------------------------------------------------------------


def score_weight(
    kind: Weighting,
    scheduler: GaussianPathScheduler,
    timesteps: torch.Tensor,
    gamma: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """lambda_t, the weight of `denoising_score_matching`; see the table above.

    Args:
        kind: "sigma_squared", "min_snr", "likelihood", or "simple", which makes it
            `simple_loss(prediction, target)` of the scheduler's prediction type.
        scheduler: Of the training chain.
        timesteps: Train timesteps, (B,).
        gamma: Largest weight of the error in x_0, of "min_snr"; 5 in the paper.
        dtype: Of the weights.

    Returns:
        One weight per sample, (B,). Without signal (alpha = 0) some are infinite, or too large for float32.

    Raises:
        ValueError: If the kind is unknown, or gamma is missing, not positive, or given to another kind.
    """
    _, sigma, snr = _noise_and_snr(scheduler, timesteps)
    return (_weight_of_data(kind, scheduler, timesteps, gamma) * sigma**2 / snr).to(dtype)


def prediction_weight(
    kind: Weighting,
    scheduler: GaussianPathScheduler,
    timesteps: torch.Tensor,
    gamma: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weight of `simple_loss(prediction, target)` that makes it the score's error times lambda_t.

    `target` is the `training_target` of the scheduler's prediction type. Arguments, result and errors are those of
    `score_weight`.
    """
    weight = _weight_of_data(kind, scheduler, timesteps, gamma)
    return (weight / _weight_of_data("simple", scheduler, timesteps)).to(dtype)


def _weight_of_data(
    kind: Weighting, scheduler: GaussianPathScheduler, timesteps: torch.Tensor, gamma: float | None = None
) -> torch.Tensor:
    """The weight of ||x_0 - x̂_0||^2, which is the one that stays finite without signal, (B,)."""
    if kind not in get_args(Weighting):
        raise ValueError(f"the weighting must be one of {get_args(Weighting)}, got {kind!r}")
    if (kind == "min_snr") != (gamma is not None) or (gamma is not None and not gamma > 0):
        raise ValueError(f"need a gamma > 0 for 'min_snr' and none for others, got gamma={gamma} for {kind!r}")
    _, sigma, snr = _noise_and_snr(scheduler, timesteps)
    if kind == "sigma_squared":
        return snr
    if kind == "min_snr":
        return snr.clamp(max=gamma)
    if kind == "likelihood":
        _, _, snr_before = _noise_and_snr(scheduler, timesteps - 1)
        is_first = timesteps == int(scheduler.train_timesteps[0])
        return torch.where(is_first, 1 / _decoder_variance(scheduler), snr_before - snr)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return snr
    if prediction_type == "sample":
        return torch.ones_like(snr)
    if prediction_type == "score":
        return snr / sigma**2
    return 1 / sigma**2  # v and the flow: x_0 = alpha x_t - sigma v, x_0 = x_t - sigma u


def _decoder_variance(scheduler: GaussianPathScheduler) -> float:
    """The posterior variance of the second level's step to the first; of a chain of one level, its own."""
    alphas, sigmas = scheduler.signal_and_noise(torch.as_tensor(scheduler.train_timesteps[:2]))
    if len(sigmas) == 1:
        return float(sigmas[0] ** 2)
    return float(transition(alphas[1], sigmas[1], alphas[0], sigmas[0]).posterior_variance)


def _noise_and_snr(
    scheduler: GaussianPathScheduler, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """alpha, sigma and SNR; without signal SNR is the smallest number instead of 0, so that ratios have their limit.

    In float64 where there is, because the likelihood weight is a small difference.
    """
    dtype = torch.float32 if timesteps.device.type == "mps" else torch.float64
    alpha, sigma = scheduler.signal_and_noise(timesteps, dtype=dtype)
    return alpha, sigma, ((alpha / sigma) ** 2).clamp(min=torch.finfo(dtype).tiny)
