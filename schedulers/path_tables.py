r"""Ways to fill the table (alpha_t, sigma_t) of a Gaussian path, and to space the levels that a sampler visits on it.

    beta schedules      alpha_t^2 = prod_{i <= t} (1 - beta_i), sigma_t^2 = 1 - alpha_t^2    Ho et al. 2020, Eq. 4
    geometric ladder    s_t = sigma_min (sigma_max / sigma_min)^(t / (T - 1)),               Song & Ermon 2019, Sec. 3
                        alpha_t = 1 / sqrt(1 + s_t^2), sigma_t = s_t / sqrt(1 + s_t^2)
    sub-VP              a_t = exp(-B_t / 2), s_t = 1 - exp(-B_t), B_t = int beta,            Song et al. 2021, Eq. 29
                        alpha_t = a_t / sqrt(a_t^2 + s_t^2), sigma_t = s_t / sqrt(a_t^2 + s_t^2)
    flow                alpha_t = 1 - t / T, sigma_t = t / T                                 Lipman et al. 2022, Eq. 22

The sub-VP process has less noise than the variance-preserving one of the same B, s_t = 1 - a_t^2 where that has
sqrt(1 - a_t^2), so its variance is a_t^2 + s_t^2 < 1; like the ladder, it is kept in the coordinates where it is 1.

The levels of a flow path are continuous. They are spaced evenly in sigma and then shifted towards the noise, because a
larger image keeps its content at more noise (Esser et al. 2024, Eq. 23),

    sigma <- shift sigma / (1 + (shift - 1) sigma),

or, "dynamically", with shift = exp(mu) or mu, which the pipeline computes from the size of the image.

Sources: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239; Song & Ermon 2019,
"Generative Modeling by Estimating Gradients of the Data Distribution", arXiv:1907.05600; Song, Sohl-Dickstein,
Kingma, Kumar, Ermon, Poole 2021, "Score-Based Generative Modeling through Stochastic Differential Equations",
arXiv:2011.13456; Lipman, Chen, Ben-Hamu,
Nickel, Le 2022, "Flow Matching for Generative Modeling", arXiv:2210.02747; Esser et al. 2024, "Scaling Rectified Flow
Transformers for High-Resolution Image Synthesis", arXiv:2403.03206; Karras, Aittala, Aila, Laine 2022, "Elucidating
the Design Space of Diffusion-Based Generative Models", arXiv:2206.00364; Lin, Liu, Li, Yang 2023, "Common Diffusion
Noise Schedules and Sample Steps are Flawed", arXiv:2305.08891.
"""

import math
from typing import Any

import numpy as np
import torch

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "geometric", "sub_vp")
TABLES_OF_LEVELS = ("geometric", "sub_vp")  # given as signal and noise, not as products of 1 - beta
TIME_SHIFT_TYPES = ("exponential", "linear")
KARRAS_RHO = 7.0  # Karras et al. 2022, Table 1
MAX_BETA = 0.999  # Nichol & Dhariwal 2021, arXiv:2102.09672, Sec. 3.2

# ---- the table ------------------------------------------------------------------------------------------------------


def path_table(config: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(alpha_t, sigma_t), float64, and beta_t, float32, each (T,), as the config of a scheduler asks for."""
    schedule, T = config.beta_schedule, config.num_train_timesteps
    if isinstance(T, bool) or not isinstance(T, int) or T < 1:
        raise ValueError(f"num_train_timesteps must be a positive integer, got {T!r}")
    if config.prediction_type == "flow_prediction":
        sigmas = torch.arange(1, T + 1, dtype=torch.float64) / T
        return 1 - sigmas, sigmas, one_step_betas((1 - sigmas) ** 2 / ((1 - sigmas) ** 2 + sigmas**2))
    if config.trained_betas is None and schedule not in BETA_SCHEDULES:
        raise ValueError(f"beta_schedule must be one of {BETA_SCHEDULES}, got {schedule!r}")
    if config.trained_betas is None and schedule in TABLES_OF_LEVELS:
        if config.rescale_betas_zero_snr:
            end = "sigma_max" if schedule == "geometric" else "beta_end"
            raise ValueError(
                f"rescale_betas_zero_snr is for products of betas; a {schedule} path ends where {end} says"
            )
        if schedule == "geometric":
            alphas, sigmas = geometric_ladder(config.sigma_min, config.sigma_max, T)
        else:
            alphas, sigmas = sub_vp_table(config.beta_start, config.beta_end, T)
        return alphas, sigmas, one_step_betas(alphas**2)

    if config.trained_betas is not None:
        betas = torch.tensor(np.asarray(config.trained_betas), dtype=torch.float32)
    else:
        betas = beta_table(schedule, config.beta_start, config.beta_end, T)
    if betas.ndim != 1 or len(betas) == 0 or not ((betas > 0) & (betas <= 1)).all():
        raise ValueError(f"betas must be a list of numbers in (0, 1], got {betas}")
    alphas_cumprod = (1 - betas).cumprod(0)
    if config.rescale_betas_zero_snr:
        alphas_cumprod = rescale_to_zero_terminal_snr(alphas_cumprod)
        betas = one_step_betas(alphas_cumprod)
    if not (torch.cat([torch.ones_like(betas[:1]), alphas_cumprod]).diff() < 0).all():
        raise ValueError(
            "each timestep must lose signal, but in float32 the product of 1 - beta stays where it is: betas from "
            f"{betas.min().item()} to {betas.max().item()} over {len(betas)} timesteps"
        )
    alphas_cumprod = alphas_cumprod.double()
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), betas


def one_step_betas(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """beta_t = 1 - alpha_t^2 / alpha_{t-1}^2, (T,), float32."""
    return (1 - alphas_cumprod / torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])).float()


def beta_table(schedule: str, beta_start: float, beta_end: float, T: int) -> torch.Tensor:
    """beta_t, (T,), named as in Diffusers and, like there, float32: the path that its networks are trained on."""
    if schedule == "linear":  # Ho et al. 2020, Sec. 4
        return torch.linspace(beta_start, beta_end, T, dtype=torch.float32)
    if schedule == "scaled_linear":  # latent diffusion: linear in sqrt(beta)
        return torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float32) ** 2
    if schedule == "sigmoid":  # GeoDiff
        return torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float32)) * (beta_end - beta_start) + beta_start
    # squaredcos_cap_v2: Nichol & Dhariwal 2021, arXiv:2102.09672, Eq. 17
    t = torch.arange(T + 1, dtype=torch.float64) / T
    alphas_cumprod = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=MAX_BETA).float()


def geometric_ladder(sigma_min: float | None, sigma_max: float | None, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A variance-exploding ladder, sigma_min .. sigma_max in units of the data, in variance-preserving coordinates."""
    if sigma_min is None or sigma_max is None or not 0 < sigma_min < sigma_max:
        raise ValueError(
            "beta_schedule='geometric' needs 0 < sigma_min < sigma_max, for instance 0.01 and 50 (CIFAR-10 in Song "
            f"& Ermon 2020, arXiv:2006.09011), got sigma_min={sigma_min} and sigma_max={sigma_max}"
        )
    exponent = torch.linspace(0, 1, T, dtype=torch.float64)
    levels = sigma_min * (sigma_max / sigma_min) ** exponent
    return variance_preserving(torch.ones_like(levels), levels)


def sub_vp_table(beta_start: float, beta_end: float, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sub-VP process in variance-preserving coordinates (Song et al. 2021, App. B, Eq. 29).

    Its time runs from 0 to 1 while beta(time) grows linearly from T beta_start to T beta_end, and timestep t is at
    (t + 1) / T. In float64, because at the first levels 1 - exp(-B) would have few digits left.
    """
    if not (0 < beta_start <= 1 and 0 < beta_end <= 1):
        raise ValueError(f"beta_start and beta_end must lie in (0, 1], got {beta_start} and {beta_end}")
    n = torch.arange(1, T + 1, dtype=torch.float64)
    integral = beta_start * n + (beta_end - beta_start) * n**2 / (2 * T)
    alphas, sigmas = variance_preserving((-integral / 2).exp(), -torch.expm1(-integral))
    if alphas[-1] == 0:
        raise ValueError(f"{T} timesteps of beta up to {max(beta_start, beta_end)} leave no signal in float64")
    return alphas, sigmas


def variance_preserving(signal: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha, sigma) of the same process, divided by its deviation on data of variance 1."""
    deviation = (signal**2 + noise**2).sqrt()
    return signal / deviation, noise / deviation


def rescale_to_zero_terminal_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Shifts and scales alpha_t so that the last is 0 and the first is unchanged (Lin et al. 2023, Algorithm 1)."""
    alphas = alphas_cumprod.sqrt()
    first, last = alphas[0], alphas[-1]
    return ((alphas - last) * first / (first - last)) ** 2


# ---- the spacing of levels ------------------------------------------------------------------------------------------


def spaced_timesteps(spacing: str, N: int, T: int, steps_offset: int) -> np.ndarray:
    """N of T train timesteps, decreasing, spaced as Lin et al. 2023, Table 2, names it; not rounded yet."""
    if spacing == "leading":
        return np.arange(N)[::-1] * (T // N) + steps_offset
    if spacing == "linspace":
        return np.linspace(0, T - 1, N)[::-1] if N > 1 else np.array([T - 1])
    return np.arange(T, 0, -T / N)[:N].round() - 1  # trailing; rounds as in Diffusers; arange may overshoot


def karras_ratios(largest: float, smallest: float, N: int) -> np.ndarray:
    """N noise-to-signal ratios, even in their seventh root (Karras et al. 2022, Eq. 5)."""
    return np.linspace(largest ** (1 / KARRAS_RHO), smallest ** (1 / KARRAS_RHO), N) ** KARRAS_RHO


def spaced_flow_sigmas(spacing: str, N: int, smallest: float) -> np.ndarray:
    """N noise levels of a flow path from 1 down, before they are shifted.

    "trailing" steps evenly to the data, as the Flux pipeline asks for; the others end on the smallest level first, as
    `FlowMatchEulerDiscreteScheduler` does. A flow starts at pure noise, so there is no "leading" of its own.
    """
    return np.linspace(1, 1 / N if spacing == "trailing" else smallest, N)


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Moves flow levels towards the noise (Esser et al. 2024, Eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def stretched_to_terminal(sigmas: np.ndarray, terminal: float) -> np.ndarray:
    """Stretches flow levels so that the last of them is `terminal`, and pure noise stays pure noise."""
    if sigmas[-1] >= 1:  # the only level
        return sigmas
    return 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])


def strictly_decreasing(timesteps: np.ndarray, T: int) -> np.ndarray:
    """A strictly decreasing schedule within 0 .. T - 1: levels that coincide move up, those that overshoot down."""
    N = len(timesteps)
    timesteps = np.maximum(timesteps, np.arange(N)[::-1])
    for i in reversed(range(N - 1)):
        timesteps[i] = max(timesteps[i], timesteps[i + 1] + 1)
    return np.minimum(timesteps, T - 1 - np.arange(N))
