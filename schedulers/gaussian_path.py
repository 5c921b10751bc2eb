r"""Gaussian paths: the part that every scheduler of this library shares.

A diffusion process is a table of signal and noise coefficients, one row per train timestep t = 0 .. T - 1,

    x_t = alpha_t x_0 + sigma_t eps,        eps ~ N(0, I),

and the data itself is the row (1, 0). Whatever else distinguishes two processes is how the table is filled:

    beta schedules      alpha_t^2 = prod_{i <= t} (1 - beta_i), sigma_t^2 = 1 - alpha_t^2     Ho et al. 2020, Eq. 4
    geometric ladder    s_t = sigma_min (sigma_max / sigma_min)^(t / (T - 1)),                Song & Ermon 2019, Sec. 3
                        alpha_t = 1 / sqrt(1 + s_t^2), sigma_t = s_t / sqrt(1 + s_t^2)

The ladder of a variance-exploding process, y_t = x_0 + s_t eps, is kept in the variance-preserving coordinates
x_t = y_t / sqrt(1 + s_t^2). So each process starts from unit noise and feeds the network its state unscaled, and a
sampling loop that ignores `init_noise_sigma` and `scale_model_input` is still right.

Between two levels s < t the path is Gaussian too (Kingma et al. 2021, Eqs. 20-25, 30-32):

    q(x_t | x_s)      = N(a x_s, v I),      a = alpha_t / alpha_s,   v = sigma_t^2 - a^2 sigma_s^2
    q(x_s | x_t, x_0) = N(a sigma_s^2 / sigma_t^2 x_t + alpha_s v / sigma_t^2 x_0, v sigma_s^2 / sigma_t^2 I)

For adjacent levels of a beta schedule v is beta_t and the last variance is the beta-tilde of Ho et al. 2020, Eq. 7.
When steps are skipped, s is the level that is skipped to.

    symbol    code                shape   meaning
    x_0       original_samples    (B, *)  data
    x_t       sample              (B, *)  state
    eps       noise               (B, *)  standard normal noise
    alpha_t   alpha               (), (B,)  signal coefficient
    sigma_t   sigma               (), (B,)  noise coefficient

Sources: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239; Song & Ermon 2019,
"Generative Modeling by Estimating Gradients of the Data Distribution", arXiv:1907.05600; Kingma, Salimans, Poole, Ho
2021, "Variational Diffusion Models", arXiv:2107.00630; Karras, Aittala, Aila, Laine 2022, "Elucidating the Design
Space of Diffusion-Based Generative Models", arXiv:2206.00364; Lin, Liu, Li, Yang 2023, "Common Diffusion Noise
Schedules and Sample Steps are Flawed", arXiv:2305.08891.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "geometric")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing", "karras")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "score")
KARRAS_RHO = 7.0  # Karras et al. 2022, Table 1
MAX_BETA = 0.999  # Nichol & Dhariwal 2021, arXiv:2102.09672, Sec. 3.2

Coefficient = TypeVar("Coefficient", float, torch.Tensor)


@dataclass
class GaussianPathSchedulerOutput(BaseOutput):
    """What `step` returns.

    Args:
        prev_sample: State on the next, less noisy, level. (B, *), dtype of `sample`.
        pred_original_sample: The prediction of x_0 that the step used, after clipping. (B, *), dtype of `sample`.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class Transition(NamedTuple):
    """The law q(x_s | x_t, x_0) = N(sample_weight x_t + original_weight x_0, posterior_variance I)."""

    sample_weight: float | torch.Tensor
    original_weight: float | torch.Tensor
    posterior_variance: float | torch.Tensor
    forward_variance: float | torch.Tensor  # v, the variance of q(x_t | x_s)


def transition(alpha_t: Coefficient, sigma_t: Coefficient, alpha_s: Coefficient, sigma_s: Coefficient) -> Transition:
    """The Gaussian law between two levels s < t, from floats or from tensors that broadcast (Kingma et al. 2021)."""
    a = alpha_t / alpha_s
    v = sigma_t**2 - a**2 * sigma_s**2
    return Transition(a * sigma_s**2 / sigma_t**2, alpha_s * v / sigma_t**2, v * sigma_s**2 / sigma_t**2, v)


class GaussianPathScheduler(SchedulerMixin, ConfigMixin):
    """Base of the schedulers that walk a Gaussian path; it holds the table, the schedule and the conversions.

    A subclass registers its own full `__init__` (Diffusers saves nothing else), calls `_build_path` in it and adds
    `step`. Nothing here is overridden.

    Attributes:
        betas, alphas, alphas_cumprod: The table as Diffusers names it, float32, (T,).
        timesteps: The schedule, int64, (N,), decreasing; the whole training chain until `set_timesteps` is called.
        init_noise_sigma: 1, on every path.
        order: Entries of `timesteps` per noise level.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1
    init_noise_sigma = 1.0

    # ---- the table of the path --------------------------------------------------------------------------------------

    def _build_path(self) -> None:
        """Fills the table (alpha_t, sigma_t) from the config and lays out the whole chain as the first schedule."""
        config = self.config
        if config.timestep_spacing not in TIMESTEP_SPACINGS:
            raise ValueError(f"timestep_spacing must be one of {TIMESTEP_SPACINGS}, got {config.timestep_spacing!r}")
        if config.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {config.prediction_type!r}")

        alphas, sigmas, self.betas = path_table(config)
        self._num_levels = len(alphas)
        # The data, (1, 0), is the row after the last, where Python's index -1 finds it.
        self._alphas = torch.cat([alphas, torch.ones(1, dtype=torch.float64)])
        self._sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

        self.alphas_cumprod = (alphas**2).float()
        self.alphas = 1 - self.betas

        self.num_inference_steps: int | None = None
        self._set_schedule(np.arange(self._num_levels)[::-1], device=None)

    def __len__(self) -> int:
        return self._num_levels

    def signal_and_noise(
        self, timesteps: int | torch.Tensor, dtype: torch.dtype = torch.float64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Looks up (alpha_t, sigma_t).

        Args:
            timesteps: Train timesteps, 0 .. T - 1, integers of any shape; -1 is the data, (1, 0).
            dtype: Type of the coefficients.

        Returns:
            alpha and sigma, each of the shape and on the device of `timesteps`.

        Raises:
            ValueError: For timesteps that are not integers or, where that can be read without waiting for a device,
                not on the path.
        """
        timesteps = torch.as_tensor(timesteps)
        if timesteps.is_floating_point() or timesteps.is_complex():
            raise ValueError(f"timesteps must be integers, got {timesteps.dtype}")
        if timesteps.device.type == "cpu" and timesteps.numel() > 0:
            low, high = int(timesteps.min()), int(timesteps.max())
            if low < -1 or high >= self._num_levels:
                raise ValueError(f"timesteps must lie in 0 .. {self._num_levels - 1}, got {low} .. {high}")
        key = (timesteps.device, dtype)
        if key not in self._tables:  # moved to a device once, so that training does not wait for a copy at every step
            self._tables[key] = (self._alphas.to(dtype).to(key[0]), self._sigmas.to(dtype).to(key[0]))
        alphas, sigmas = self._tables[key]
        rows = timesteps.long().reshape(-1)  # a 0-d index would be read on the host
        return alphas[rows].reshape(timesteps.shape), sigmas[rows].reshape(timesteps.shape)

    # ---- the schedule: which levels are visited ---------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | torch.Tensor | None = None,
    ) -> None:
        """Chooses the levels to visit.

        Args:
            num_inference_steps: Number of levels N, spaced as `config.timestep_spacing` says.
            device: Device of `self.timesteps`.
            timesteps: The levels themselves, strictly decreasing train timesteps, instead of a number.

        Raises:
            ValueError: If not exactly one of the two is given, N is not in 1 .. T, or the timesteps are not strictly
                decreasing within 0 .. T - 1.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                "give exactly one of num_inference_steps and timesteps, "
                f"got num_inference_steps={num_inference_steps} and timesteps={timesteps}"
            )
        if timesteps is None:
            schedule = self._spaced_timesteps(num_inference_steps)
        else:
            schedule = self._checked_timesteps(timesteps)
        self._check_terminal_snr(int(schedule[0]))
        self.num_inference_steps = len(schedule)
        self._set_schedule(schedule, device)

    def _set_schedule(self, schedule: np.ndarray, device: str | torch.device | None) -> None:
        self._schedule: list[int] = [int(t) for t in schedule]
        self.timesteps = torch.from_numpy(schedule.astype(np.int64)).to(device)
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _spaced_timesteps(self, N: int) -> np.ndarray:
        T = self._num_levels
        if isinstance(N, bool) or not isinstance(N, (int, np.integer)) or not 1 <= N <= T:
            raise ValueError(f"num_inference_steps must be an integer in 1 .. {T} (the train timesteps), got {N!r}")
        spacing = self.config.timestep_spacing
        if spacing == "leading":
            timesteps = np.arange(N)[::-1] * (T // N) + self.config.steps_offset
        elif spacing == "linspace":
            timesteps = np.linspace(0, T - 1, N)[::-1] if N > 1 else np.array([T - 1])
        elif spacing == "trailing":
            timesteps = np.arange(T, 0, -T / N)[:N].round() - 1  # rounds as in Diffusers; arange may overshoot
        else:
            timesteps = self._karras_timesteps(N)
        return strictly_decreasing(timesteps.round().astype(np.int64), T)

    def _karras_timesteps(self, N: int) -> np.ndarray:
        """The train timesteps whose noise-to-signal ratios lie nearest to Karras et al. 2022, Eq. 5."""
        self._check_terminal_snr(self._num_levels - 1, needed_by="timestep_spacing='karras', which spaces log SNR,")
        ratio = (self._sigmas[:-1] / self._alphas[:-1]).numpy()  # (T,), increasing
        ramp = np.linspace(0, 1, N)
        largest, smallest = ratio[-1] ** (1 / KARRAS_RHO), ratio[0] ** (1 / KARRAS_RHO)
        wanted = (largest + ramp * (smallest - largest)) ** KARRAS_RHO
        return np.interp(np.log(wanted), np.log(ratio), np.arange(self._num_levels))

    def _checked_timesteps(self, timesteps: Sequence[int] | torch.Tensor) -> np.ndarray:
        values = np.asarray(timesteps.cpu() if isinstance(timesteps, torch.Tensor) else timesteps)
        T = self._num_levels
        if values.ndim != 1 or len(values) == 0 or not np.array_equal(values, values.astype(np.int64)):
            raise ValueError(f"timesteps must be a non-empty list of integers, got {timesteps}")
        if values.max() >= T or values.min() < 0:
            raise ValueError(f"timesteps must lie in 0 .. {T - 1}, got {values.min()} .. {values.max()}")
        if (np.diff(values) >= 0).any():
            raise ValueError(f"timesteps must be strictly decreasing, got {values.tolist()}")
        return values.astype(np.int64)

    def _check_terminal_snr(self, timestep: int, needed_by: str | None = None) -> None:
        if self._alphas[timestep] > 0:
            return
        if needed_by is None and self.config.prediction_type in ("epsilon", "score"):
            needed_by = f"prediction_type={self.config.prediction_type!r}, unlike 'v_prediction' and 'sample',"
        if needed_by is not None:
            raise ValueError(f"timestep {timestep} has no signal (alpha = 0), and {needed_by} needs some")

    # ---- the position in the schedule -------------------------------------------------------------------------------

    @property
    def step_index(self) -> int | None:
        """Position in `timesteps` of the next `step`; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Position of the first `step` as set by a pipeline; None if it is to be read off the first timestep."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._begin_index = begin_index

    def _position(self, timestep: int | float | torch.Tensor) -> int:
        """Position of this call in `timesteps`, without waiting for a device.

        The `t` of `for t in scheduler.timesteps` is a view into that tensor, and its offset is its position. Any other
        timestep is matched with the entry that is due, and by value if it is not that one.
        """
        if isinstance(timestep, torch.Tensor):
            if timestep.numel() != 1:
                raise ValueError(f"step takes one timestep for the whole batch, got {timestep.numel()}")
            if timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr():
                return timestep.storage_offset() - self.timesteps.storage_offset()
        due = self._begin_index if self._step_index is None else self._step_index
        if due is not None and isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu":
            if due >= len(self._schedule):
                raise ValueError(f"all {len(self._schedule)} steps are taken; call set_timesteps to start again")
            return due
        value = timestep.item() if isinstance(timestep, torch.Tensor) else timestep
        if due is not None and due < len(self._schedule) and self._schedule[due] == value:
            return due
        if value not in self._schedule:
            raise ValueError(
                f"timestep {value} is not one of the {len(self._schedule)} of the schedule, "
                f"{self._schedule[0]} .. {self._schedule[-1]}; see set_timesteps"
            )
        return self._schedule.index(value)

    def _levels(self, position: int) -> tuple[int, int]:
        """Train timesteps of a step: the level it leaves and the one it goes to, -1 for the data."""
        return self._schedule[position], (self._schedule + [-1])[position + 1]

    def _coefficients(self, timestep: int) -> tuple[float, float]:
        """(alpha_t, sigma_t) as Python floats, which scale a tensor on any device without a copy."""
        return float(self._alphas[timestep]), float(self._sigmas[timestep])

    # ---- forward: data to noise -------------------------------------------------------------------------------------

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample`: the network sees the state as it is."""
        return sample

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        """Draws x_t = alpha_t x_0 + sigma_t eps for any train timesteps, (), (1,) or (B,). Returns (B, *)."""
        alpha, sigma = self._aligned(original_samples, timesteps)
        noisy = alpha * original_samples.to(alpha.dtype) + sigma * noise.to(alpha.dtype)
        return noisy.to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor) -> torch.Tensor:
        """Computes v = alpha_t eps - sigma_t x_0, where x_0 is `sample` (Salimans & Ho 2022, arXiv:2202.00512)."""
        alpha, sigma = self._aligned(sample, timesteps)
        return (alpha * noise.to(alpha.dtype) - sigma * sample.to(alpha.dtype)).to(sample.dtype)

    def training_target(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        """What a network of this `prediction_type` should have returned for x_t. Returns (B, *)."""
        prediction_type = self.config.prediction_type
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return original_samples
        if prediction_type == "v_prediction":
            return self.get_velocity(original_samples, noise, timesteps)
        _, sigma = self._aligned(noise, timesteps)
        return (-noise.to(sigma.dtype) / sigma).to(noise.dtype)  # the score of q(x_t | x_0)

    def posterior(
        self,
        original_samples: torch.Tensor,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        previous_timesteps: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of q(x_s | x_t, x_0), Ho et al. 2020, Eqs. 6-7.

        Args:
            original_samples: x_0, (B, *).
            sample: x_t, (B, *).
            timesteps: t, (B,).
            previous_timesteps: s, (B,); None for t - 1. -1 is the data, where the variance is 0.

        Returns:
            The mean, (B, *), and the variance, (B, 1, ..).
        """
        law = self._transition(sample, timesteps, previous_timesteps)
        return law.sample_weight * sample + law.original_weight * original_samples, law.posterior_variance

    def _transition(
        self, sample: torch.Tensor, timesteps: torch.Tensor, previous_timesteps: torch.Tensor | None
    ) -> Transition:
        s = timesteps - 1 if previous_timesteps is None else previous_timesteps
        return transition(*self._aligned(sample, timesteps), *self._aligned(sample, s))

    def _aligned(self, sample: torch.Tensor, timesteps: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha_t, sigma_t) with the axes of `sample`, (B, 1, ..), in its working precision and on its device."""
        timesteps = torch.as_tensor(timesteps, device=sample.device)
        if timesteps.numel() not in (1, len(sample)):
            raise ValueError(f"need one timestep or one per sample, {len(sample)}, got {timesteps.numel()}")
        alpha, sigma = self.signal_and_noise(timesteps, dtype=working_dtype(sample))
        shape = (-1,) + (1,) * (sample.ndim - 1)
        return alpha.reshape(shape), sigma.reshape(shape)

    # ---- from the output of the network to x_0 ----------------------------------------------------------------------

    def original_sample(
        self, model_output: torch.Tensor, sample: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        """The prediction of x_0, unclipped, at any train timesteps, () or (B,). Returns (B, *)."""
        alpha, sigma = self._aligned(sample, timesteps)
        return self._original_sample(model_output.to(alpha.dtype), sample.to(alpha.dtype), alpha, sigma)

    def _original_sample(
        self, model_output: torch.Tensor, sample: torch.Tensor, alpha: Coefficient, sigma: Coefficient
    ) -> torch.Tensor:
        prediction_type = self.config.prediction_type
        if prediction_type == "epsilon":
            return (sample - sigma * model_output) / alpha
        if prediction_type == "sample":
            return model_output
        if prediction_type == "v_prediction":  # Salimans & Ho 2022, App. D, where alpha^2 + sigma^2 = 1
            return alpha * sample - sigma * model_output
        return (sample + sigma**2 * model_output) / alpha  # Tweedie's formula

    def _restrict(self, original_sample: torch.Tensor) -> torch.Tensor:
        """Dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, Sec. 2.3), or clipping to a fixed range."""
        config = self.config
        if config.thresholding:
            magnitudes = original_sample.abs().reshape(len(original_sample), -1)
            limit = torch.quantile(magnitudes, config.dynamic_thresholding_ratio, dim=1)
            limit = limit.clamp(1.0, max(1.0, config.sample_max_value))
            limit = limit.reshape((-1,) + (1,) * (original_sample.ndim - 1))
            return original_sample.clamp(-limit, limit) / limit
        if config.clip_sample:
            return original_sample.clamp(-config.clip_sample_range, config.clip_sample_range)
        return original_sample


def working_dtype(sample: torch.Tensor) -> torch.dtype:
    """Half precision is computed in float32; float32 and float64 as they are."""
    if not sample.is_floating_point():
        raise ValueError(f"samples must be floating-point tensors, got {sample.dtype}")
    return torch.promote_types(sample.dtype, torch.float32)


def standard_normal(
    sample: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None, dtype: torch.dtype
) -> torch.Tensor:
    """Draws noise of the shape of `sample`, (B, *); a list of generators gives each sample its own."""
    if isinstance(generator, list) and len(generator) not in (1, len(sample)):
        raise ValueError(f"need one generator or one per sample, {len(sample)}, got {len(generator)}")
    return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=dtype)


# ---- ways to fill the table -----------------------------------------------------------------------------------------


def path_table(config: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(alpha_t, sigma_t), float64, and beta_t, float32, each (T,), as the config of a scheduler asks for."""
    schedule, T = config.beta_schedule, config.num_train_timesteps
    if isinstance(T, bool) or not isinstance(T, int) or T < 1:
        raise ValueError(f"num_train_timesteps must be a positive integer, got {T!r}")
    if config.trained_betas is None and schedule not in BETA_SCHEDULES:
        raise ValueError(f"beta_schedule must be one of {BETA_SCHEDULES}, got {schedule!r}")
    if config.trained_betas is None and schedule == "geometric":
        if config.rescale_betas_zero_snr:
            raise ValueError(
                "rescale_betas_zero_snr is for beta schedules; a geometric ladder ends where sigma_max says"
            )
        alphas, sigmas = geometric_ladder(config.sigma_min, config.sigma_max, T)
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
    norm = (1 + levels**2).sqrt()
    return 1 / norm, levels / norm


def rescale_to_zero_terminal_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Shifts and scales alpha_t so that the last is 0 and the first is unchanged (Lin et al. 2023, Algorithm 1)."""
    alphas = alphas_cumprod.sqrt()
    first, last = alphas[0], alphas[-1]
    return ((alphas - last) * first / (first - last)) ** 2


def strictly_decreasing(timesteps: np.ndarray, T: int) -> np.ndarray:
    """A strictly decreasing schedule within 0 .. T - 1: levels that coincide move up, those that overshoot down."""
    N = len(timesteps)
    timesteps = np.maximum(timesteps, np.arange(N)[::-1])
    for i in reversed(range(N - 1)):
        timesteps[i] = max(timesteps[i], timesteps[i + 1] + 1)
    return np.minimum(timesteps, T - 1 - np.arange(N))
