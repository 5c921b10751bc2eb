r"""Gaussian paths: the part that every scheduler of this library shares.

A diffusion process is a table of signal and noise coefficients, one row per train timestep t = 0 .. T - 1,

    x_t = alpha_t x_0 + sigma_t eps,        eps ~ N(0, I),

and the data itself is the row (1, 0). Whatever else distinguishes two processes is how the table is filled, see
`path_tables`: beta schedules, a geometric ladder, or the flow path alpha_t = 1 - t / T, sigma_t = t / T, whose
timesteps 0 < t <= T are continuous.

The ladder of a variance-exploding process, y_t = x_0 + s_t eps, is kept in the variance-preserving coordinates
x_t = y_t / sqrt(1 + s_t^2). So each process starts from unit noise and feeds the network its state unscaled, and a
sampling loop that ignores `init_noise_sigma` and `scale_model_input` is still right. A flow path starts from unit
noise anyway and stays as it is.

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

Sources: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239; Kingma, Salimans, Poole,
Ho 2021, "Variational Diffusion Models", arXiv:2107.00630; Lipman, Chen, Ben-Hamu, Nickel, Le 2022, "Flow Matching for
Generative Modeling", arXiv:2210.02747.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from annealers.schedulers.path_tables import (
    TIME_SHIFT_TYPES,
    karras_ratios,
    path_table,
    shifted,
    spaced_flow_sigmas,
    spaced_timesteps,
    stretched_to_terminal,
    strictly_decreasing,
)
from annealers.schedulers.step_placement import optimal_timesteps

TIMESTEP_SPACINGS = ("leading", "linspace", "trailing", "karras", "geometric", "optimal")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "score", "flow_prediction")
FLOW_SCHEDULERS = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
TOLD_SIGMA = ["EDMEulerScheduler"]  # whose networks are, instead of a timestep; see `_meant_settings`
MEANT_BY_ABSENCE = ("clip_sample", "prediction_type")  # what a config without them means, see `from_config`

Coefficient = TypeVar("Coefficient", float, torch.Tensor)


class Level(NamedTuple):
    """A point of the path, x_t = alpha x_0 + sigma eps, and the timestep by which the network knows it."""

    timestep: int | float
    alpha: float
    sigma: float


DATA = Level(-1, 1.0, 0.0)


class Visit(NamedTuple):
    """One network call: at a state on level `here`; its `step` leads to level `there`, which may be the same."""

    here: Level
    there: Level


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

    def mean(self, x_t: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
        """E[x_s | x_t, x_0], (B, *)."""
        return self.sample_weight * x_t + self.original_weight * x_0


def transition(alpha_t: Coefficient, sigma_t: Coefficient, alpha_s: Coefficient, sigma_s: Coefficient) -> Transition:
    """The Gaussian law between two levels s < t, from floats or from tensors that broadcast (Kingma et al. 2021)."""
    a = alpha_t / alpha_s
    v = sigma_t**2 - a**2 * sigma_s**2
    return Transition(a * sigma_s**2 / sigma_t**2, alpha_s * v / sigma_t**2, v * sigma_s**2 / sigma_t**2, v)


def noise_ratio(start: Level, end: Level) -> float:
    """(sigma / alpha at the end) / (sigma / alpha at the start), and 0 if the start has no signal."""
    return (end.sigma * start.alpha) / (end.alpha * start.sigma)


class GaussianPathScheduler(SchedulerMixin, ConfigMixin):
    """Base of the schedulers that walk a Gaussian path; it holds the table, the schedule and the conversions.

    A subclass registers its own full `__init__` (Diffusers saves nothing else), calls `_build_path` in it and adds
    `step`. One that calls the network several times on a level has its own `_visits`, one that places its levels by
    another rule has its own `_spaced_timesteps`; nothing else is overridden.

    Attributes:
        betas, alphas, alphas_cumprod: The table as Diffusers names it, float32, (T,).
        timesteps: The timestep of each network call, not increasing, int64, or float32 on a flow path; the whole
            training chain until `set_timesteps` is called.
        init_noise_sigma: 1, on every path.
        order: Entries of `timesteps` per noise level, or 1 if the levels were given as such: pipelines of Diffusers
            then take every entry for a level, and count and slice them accordingly.
    """

    _compatibles = [
        *(scheduler.name for scheduler in KarrasDiffusionSchedulers if scheduler.name not in TOLD_SIGMA),
        *FLOW_SCHEDULERS,
    ]
    order = 1
    init_noise_sigma = 1.0
    _entries_per_level = 1

    # ---- the table of the path --------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in Diffusers, for configs that leave to their class what ours need to be told.

        A config without `clip_sample` is of a scheduler that never clips. One with a `shift` and no `prediction_type`
        is of a flow-matching scheduler; multistep solvers call the shift `flow_shift`, and "karras" spacing
        `use_karras_sigmas`. What is read off a config like this is not passed on to the next scheduler as if the
        config had said it, so the way back is lossless.
        """
        if not isinstance(config, Mapping):
            return super().from_config(config, return_unused_kwargs, **kwargs)
        meant = {name: value for name, value in _meant_settings(config).items() if name not in kwargs}
        result = super().from_config(config, return_unused_kwargs, **meant, **kwargs)
        scheduler = result[0] if return_unused_kwargs else result
        defaults = config.get("_use_default_values", [])
        said = {name for name in meant if name in config and name not in defaults and config[name] == meant[name]}
        scheduler._mark_as_default(meant.keys() - said)
        return result

    @classmethod
    def _get_compatibles(cls) -> list[type[SchedulerMixin]]:
        """Those of Diffusers and, as it finds only its own by name, the others on Gaussian paths."""
        return super()._get_compatibles() + [other for other in _leaves(GaussianPathScheduler) if other is not cls]

    def _mark_as_default(self, names: Iterable[str], marked: bool = True) -> None:
        """Lists settings as defaults, which the `from_config` of another class drops, or as chosen, which it keeps."""
        before = set(self.config.get("_use_default_values", []))
        after = before | set(names) if marked else before - set(names)
        if after != before:  # a config that was loaded has no such list, and gets none
            self.register_to_config(_use_default_values=sorted(after))

    @property
    def _is_flow(self) -> bool:
        return self.config.prediction_type == "flow_prediction"

    @property
    def _is_brownian(self) -> bool:
        """Whether the process is a Brownian motion, that of the geometric ladder, not an Ornstein-Uhlenbeck chain."""
        return self.config.beta_schedule == "geometric" and self.config.trained_betas is None and not self._is_flow

    def _build_path(self) -> None:
        """Fills the table (alpha_t, sigma_t) from the config and lays out the whole chain as the first schedule."""
        config = self.config
        if config.timestep_spacing not in TIMESTEP_SPACINGS:
            raise ValueError(f"timestep_spacing must be one of {TIMESTEP_SPACINGS}, got {config.timestep_spacing!r}")
        if config.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {config.prediction_type!r}")
        if config.time_shift_type not in TIME_SHIFT_TYPES:
            raise ValueError(f"time_shift_type must be one of {TIME_SHIFT_TYPES}, got {config.time_shift_type!r}")
        if not 0 < config.shift < np.inf:
            raise ValueError(f"shift must be positive, got {config.shift}")
        if config.shift_terminal is not None and not 0 <= config.shift_terminal < 1:
            raise ValueError(f"shift_terminal must lie in 0 .. 1, without 1, got {config.shift_terminal}")
        if not config.clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be positive, got {config.clip_sample_range}")
        if not 0 < config.dynamic_thresholding_ratio <= 1:
            raise ValueError(f"dynamic_thresholding_ratio must lie in 0 .. 1, got {config.dynamic_thresholding_ratio}")

        alphas, sigmas, self.betas = path_table(config)
        self._num_levels = len(alphas)
        for name in ("mean_squared_noise", "denoising_error"):
            if config.get(name) is not None and len(config[name]) != len(self):
                raise ValueError(f"{name} needs one value per train timestep, {len(self)}, got {len(config[name])}")
            if config.get(name) is not None and not np.isfinite(config[name]).all():
                raise ValueError(f"{name} must be finite at each train timestep")
        # The data, (1, 0), is the row after the last, where Python's index -1 finds it.
        self._alphas = torch.cat([alphas, torch.ones(1, dtype=torch.float64)])
        self._sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

        self.alphas_cumprod = (alphas**2).float()
        self.alphas = 1 - self.betas

        # so that no other class drops what ours would misread, or what was chosen, but not by its name
        self._mark_as_default([*MEANT_BY_ABSENCE, *chosen_settings(self)], marked=False)
        self.num_inference_steps: int | None = None
        self._set_schedule(self.train_timesteps[::-1], device=None)

    def __len__(self) -> int:
        return self._num_levels

    @property
    def train_timesteps(self) -> np.ndarray:
        """The timesteps of the rows of the table: 0 .. T - 1, and 1 .. T on a flow path, where 0 is the data."""
        return np.arange(self._num_levels) + self._is_flow

    def signal_and_noise(
        self, timesteps: int | float | torch.Tensor, dtype: torch.dtype = torch.float64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Looks up (alpha_t, sigma_t).

        Args:
            timesteps: Train timesteps of any shape: integers 0 .. T - 1, where -1 is the data, (1, 0); on a flow path
                numbers 0 .. T, where 0 is.
            dtype: Type of the coefficients.

        Returns:
            alpha and sigma, each of the shape and on the device of `timesteps`.

        Raises:
            ValueError: For timesteps that are not integers though the path is a table or, where that can be read
                without waiting for a device, not on the path.
        """
        timesteps = torch.as_tensor(timesteps)
        if timesteps.is_complex() or (timesteps.is_floating_point() and not self._is_flow):
            raise ValueError(f"timesteps must be integers, got {timesteps.dtype}")
        lowest, highest = (0, self._num_levels) if self._is_flow else (-1, self._num_levels - 1)
        if timesteps.device.type == "cpu" and timesteps.numel() > 0:
            low, high = timesteps.min().item(), timesteps.max().item()
            if not lowest <= low <= high <= highest:
                raise ValueError(f"timesteps must lie in {max(lowest, 0)} .. {highest}, got {low} .. {high}")
        if self._is_flow:
            sigmas = timesteps.to(torch.promote_types(dtype, torch.float32)) / self._num_levels
            return (1 - sigmas).to(dtype), sigmas.to(dtype)
        key = (timesteps.device, dtype)
        if key not in self._tables:  # moved to a device once, so that training does not wait for a copy at every step
            self._tables[key] = (self._alphas.to(dtype).to(key[0]), self._sigmas.to(dtype).to(key[0]))
        alphas, sigmas = self._tables[key]
        rows = timesteps.long().reshape(-1)  # a 0-d index would be read on the host
        return alphas[rows].reshape(timesteps.shape), sigmas[rows].reshape(timesteps.shape)

    def _level(self, timestep: int | float) -> Level:
        """The level of a train timestep, with coefficients that scale a tensor on any device without a copy."""
        if self._is_flow:
            sigma = float(timestep) / self._num_levels
            return Level(float(timestep), 1 - sigma, sigma)
        return Level(int(timestep), float(self._alphas[int(timestep)]), float(self._sigmas[int(timestep)]))

    # ---- the schedule: which levels are visited ---------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        sigmas: Sequence[float] | np.ndarray | torch.Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Chooses the levels to visit.

        Args:
            num_inference_steps: Number of levels N, spaced as `config.timestep_spacing` says.
            device: Device of `self.timesteps`.
            timesteps: The levels themselves, strictly decreasing train timesteps, instead of a number.
            sigmas: The levels as strictly decreasing noise levels, in the units of Diffusers: sigma_t / alpha_t,
                rounded to the nearest train timesteps; on a flow path sigma_t, to be shifted as the config says.
            mu: Shift of the levels of a flow path for this size of image, with `config.use_dynamic_shifting`.

        Raises:
            ValueError: If not exactly one of the three is given, N is not in 1 .. T, the levels are not strictly
                decreasing or not on the path, or `mu` is missing or has no use.
        """
        given = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas}
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(f"give exactly one of {', '.join(given)}, got {given}")
        if mu is not None and not self._is_flow:
            raise ValueError(f"mu shifts the levels of a flow path, and this one has mu={mu} but no flow_prediction")
        if timesteps is not None:
            schedule = self._checked_timesteps(timesteps)
        elif num_inference_steps is not None:
            schedule = self._spaced_timesteps(num_inference_steps, mu)
        elif self._is_flow:
            schedule = self._shifted_timesteps(_decreasing_positive("sigmas", sigmas), mu)
        else:
            schedule = self._timesteps_of_ratios(_decreasing_positive("sigmas", sigmas))
        self._check_terminal_snr(self._level(schedule[0]))
        self.num_inference_steps = len(schedule)
        self._set_schedule(schedule, device)
        # Pipelines take the length of `timesteps` for the number of levels if they gave the levels themselves
        self.order = self._entries_per_level if num_inference_steps is not None else 1

    def _set_schedule(self, schedule: np.ndarray, device: str | torch.device | None) -> None:
        if self._is_flow:  # each level is the one that the network is told, in float32
            schedule = schedule.astype(np.float32)
        levels = [self._level(timestep) for timestep in schedule]
        self._schedule: list[Visit] = self._visits(levels)
        timesteps = [visit.here.timestep for visit in self._schedule]
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32 if self._is_flow else torch.int64, device=device)
        if self._is_flow:
            self.sigmas = torch.tensor([visit.here.sigma for visit in self._schedule] + [0.0])  # as Diffusers has it
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _visits(self, levels: list[Level]) -> list[Visit]:
        """The network calls on a schedule of levels: one per level, unless a subclass makes more of them."""
        return [Visit(here, there) for here, there in zip(levels, [*levels[1:], DATA], strict=True)]

    def _checked_count(self, N: Any) -> int:
        T = self._num_levels
        if isinstance(N, bool) or not isinstance(N, (int, np.integer)) or not 1 <= N <= T:
            raise ValueError(f"num_inference_steps must be an integer in 1 .. {T} (the train timesteps), got {N!r}")
        return int(N)

    def _spaced_timesteps(self, N: int, mu: float | None = None) -> np.ndarray:
        """N levels, spaced as `config.timestep_spacing` says."""
        N, T, spacing = self._checked_count(N), self._num_levels, self.config.timestep_spacing
        if spacing == "geometric":
            return self._timesteps_of_ratios(np.geomspace(*self._extreme_ratios(), N))
        if spacing == "karras":
            return self._timesteps_of_ratios(karras_ratios(*self._extreme_ratios(), N))
        if spacing == "optimal":
            return optimal_timesteps(self._alphas[:-1], self._sigmas[:-1], self._denoising_error(), N) + self._is_flow
        if self._is_flow:
            return self._shifted_timesteps(spaced_flow_sigmas(spacing, N, self._smallest_flow_sigma()), mu)
        timesteps = spaced_timesteps(spacing, N, T, self.config.steps_offset)
        return strictly_decreasing(timesteps.round().astype(np.int64), T)

    def _extreme_ratios(self, needed_by: str | None = None) -> tuple[float, float]:
        """The largest and the smallest noise-to-signal ratio of the table, where there is signal."""
        if not self._is_flow:
            needed_by = needed_by or f"timestep_spacing={self.config.timestep_spacing!r}, which spaces log SNR,"
            self._check_terminal_snr(self._level(self._num_levels - 1), needed_by)
        ratios = self._ratios()
        return float(ratios[-1]), float(ratios[0])

    def _ratios(self) -> np.ndarray:
        """The noise-to-signal ratios of the table, increasing, of the levels that have signal."""
        has_signal = self._alphas[:-1] > 0
        return (self._sigmas[:-1][has_signal] / self._alphas[:-1][has_signal]).numpy()

    def _timesteps_of_ratios(self, wanted: np.ndarray) -> np.ndarray:
        """The train timesteps whose noise-to-signal ratios are nearest, in the logarithm; exact on a flow path."""
        if self._is_flow:
            return wanted / (1 + wanted) * self._num_levels
        ratios = self._ratios()
        nearest = np.interp(np.log(wanted), np.log(ratios), np.arange(len(ratios)))
        return strictly_decreasing(nearest.round().astype(np.int64), self._num_levels)

    def _denoising_error(self) -> np.ndarray:
        if self.config.denoising_error is None:
            raise ValueError(
                "timestep_spacing='optimal' needs the measured denoising error of the network: call "
                "annealers.calibration.calibrate_spacing first"
            )
        return np.asarray(self.config.denoising_error)

    def _smallest_flow_sigma(self) -> float:
        """As in `FlowMatchEulerDiscreteScheduler`, which shifts this one and then all, so this one twice."""
        smallest = 1 / self._num_levels
        return smallest if self.config.use_dynamic_shifting else float(shifted(np.array(smallest), self.config.shift))

    def _shifted_timesteps(self, sigmas: np.ndarray, mu: float | None) -> np.ndarray:
        """The timesteps of the levels of a flow path, after they are shifted as the config says."""
        config = self.config
        if config.use_dynamic_shifting and mu is None:
            raise ValueError("use_dynamic_shifting=True needs mu, the shift for the size of the image, got None")
        if sigmas[0] > 1 + 1e-6:
            raise ValueError(f"sigmas of a flow path must lie in 0 .. 1, got {sigmas[0]}")
        shift = config.shift
        if config.use_dynamic_shifting:
            shift = float(np.exp(mu)) if config.time_shift_type == "exponential" else mu
            if not 0 < shift < np.inf:
                raise ValueError(f"mu must give a positive shift, got mu={mu}, which shifts by {shift}")
        sigmas = shifted(sigmas, shift)
        if config.shift_terminal:
            sigmas = stretched_to_terminal(sigmas, config.shift_terminal)
        return np.minimum(sigmas, 1.0) * self._num_levels

    def _checked_timesteps(self, timesteps: Sequence[float] | torch.Tensor) -> np.ndarray:
        values = np.asarray(timesteps.cpu() if isinstance(timesteps, torch.Tensor) else timesteps)
        T = self._num_levels
        kind = "numbers" if self._is_flow else "integers"
        if values.ndim != 1 or len(values) == 0 or not (self._is_flow or np.array_equal(values, values.astype(int))):
            raise ValueError(f"timesteps must be a non-empty list of {kind}, got {timesteps}")
        low, high = (0, T) if self._is_flow else (0, T - 1)
        values = values.astype(np.float32 if self._is_flow else np.int64)  # as the network is told them
        if not low <= values.min() <= values.max() <= high or (self._is_flow and values.min() == 0):
            raise ValueError(f"timesteps must lie in {low} .. {high}, got {values.min()} .. {values.max()}")
        if (np.diff(values) >= 0).any():
            raise ValueError(f"timesteps must be strictly decreasing, got {values.tolist()}")
        return values

    def _check_terminal_snr(self, level: Level, needed_by: str | None = None) -> None:
        if level.alpha > 0:
            return
        if needed_by is None and self.config.prediction_type in ("epsilon", "score"):
            needed_by = f"prediction_type={self.config.prediction_type!r}, unlike 'v_prediction' and 'sample',"
        if needed_by is not None:
            raise ValueError(f"timestep {level.timestep} has no signal (alpha = 0), and {needed_by} needs some")

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
        timestep is matched with the entry that is due. If it is not that one, sampling starts anew at its level: at an
        entry that begins one, see `order`.
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
        if due is not None and due < len(self._schedule) and self._schedule[due].here.timestep == value:
            return due
        matches = [i for i, visit in enumerate(self._schedule) if visit.here.timestep == value]
        if not matches:
            raise ValueError(
                f"timestep {value} is not one of the {len(self._schedule)} of the schedule, "
                f"{self._schedule[0].here.timestep} .. {self._schedule[-1].here.timestep}; see set_timesteps"
            )
        return next((i for i in matches if i % self._entries_per_level == 0), matches[0])

    # ---- forward: data to noise -------------------------------------------------------------------------------------

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample`: the network sees the state as it is."""
        return sample

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | float | torch.Tensor
    ) -> torch.Tensor:
        """Draws x_t = alpha_t x_0 + sigma_t eps for any train timesteps, (), (1,) or (B,). Returns (B, *)."""
        alpha, sigma = self._aligned(original_samples, timesteps)
        noisy = alpha * original_samples.to(alpha.dtype) + sigma * noise.to(alpha.dtype)
        return noisy.to(original_samples.dtype)

    def scale_noise(
        self, sample: torch.Tensor, timestep: int | float | torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """`add_noise` by the name and in the order that flow-matching pipelines use."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(
        self, sample: torch.Tensor, noise: torch.Tensor, timesteps: int | float | torch.Tensor
    ) -> torch.Tensor:
        """Computes v = alpha_t eps - sigma_t x_0, where x_0 is `sample` (Salimans & Ho 2022, arXiv:2202.00512)."""
        alpha, sigma = self._aligned(sample, timesteps)
        return (alpha * noise.to(alpha.dtype) - sigma * sample.to(alpha.dtype)).to(sample.dtype)

    def training_target(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | float | torch.Tensor
    ) -> torch.Tensor:
        """What a network of this `prediction_type` should have returned for x_t. Returns (B, *)."""
        prediction_type = self.config.prediction_type
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return original_samples
        if prediction_type == "v_prediction":
            return self.get_velocity(original_samples, noise, timesteps)
        if prediction_type == "flow_prediction":
            return noise - original_samples
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
        return law.mean(sample, original_samples), law.posterior_variance

    def _transition(
        self, sample: torch.Tensor, timesteps: torch.Tensor, previous_timesteps: torch.Tensor | None
    ) -> Transition:
        s = timesteps - 1 if previous_timesteps is None else previous_timesteps
        return transition(*self._aligned(sample, timesteps), *self._aligned(sample, s))

    def _aligned(
        self, sample: torch.Tensor, timesteps: int | float | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha_t, sigma_t) with the axes of `sample`, (B, 1, ..), in its working precision and on its device."""
        timesteps = torch.as_tensor(timesteps, device=sample.device)
        if timesteps.numel() not in (1, len(sample)):
            raise ValueError(f"need one timestep or one per sample, {len(sample)}, got {timesteps.numel()}")
        alpha, sigma = self.signal_and_noise(timesteps, dtype=working_dtype(sample))
        shape = (-1,) + (1,) * (sample.ndim - 1)
        return alpha.reshape(shape), sigma.reshape(shape)

    # ---- from the output of the network to x_0 ----------------------------------------------------------------------

    def original_sample(
        self, model_output: torch.Tensor, sample: torch.Tensor, timesteps: int | float | torch.Tensor
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
        if prediction_type == "flow_prediction":  # of eps - x_0, where alpha + sigma = 1
            return sample - sigma * model_output
        return (sample + sigma**2 * model_output) / alpha  # Tweedie's formula

    def _noise_and_original(
        self, model_output: torch.Tensor, sample: torch.Tensor, level: Level
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The predictions of eps and x_0 at a state of the working precision, consistent with each other, restricted.

        Without signal (alpha = 0) the state is the noise. Where nothing restricts x_0, eps is not computed by way of
        it, because that loses digits close to the data.
        """
        alpha, sigma = level.alpha, level.sigma
        x_0 = self._original_sample(model_output, sample, alpha, sigma)
        if self.config.thresholding or self.config.clip_sample:
            x_0 = self._restrict(x_0)
            return (sample - alpha * x_0) / sigma, x_0
        prediction_type = self.config.prediction_type
        if prediction_type == "epsilon":
            return model_output, x_0
        if prediction_type == "v_prediction":
            return sigma * sample + alpha * model_output, x_0
        if prediction_type == "flow_prediction":
            return sample + alpha * model_output, x_0
        if prediction_type == "score":
            return -sigma * model_output, x_0
        return (sample - alpha * x_0) / sigma, x_0

    def _check_ready(self) -> None:
        if self.num_inference_steps is None:
            raise ValueError("step needs a schedule: call set_timesteps first, with a number of levels or the levels")

    def _check_shape(self, model_output: torch.Tensor, sample: torch.Tensor) -> None:
        if model_output.shape != sample.shape:
            raise ValueError(
                f"the model output must have the shape of the sample, {tuple(sample.shape)}, "
                f"got {tuple(model_output.shape)}"
            )

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


def chosen_settings(scheduler: ConfigMixin) -> list[str]:
    """Settings that Diffusers lists as defaults, and drops, though they are none: given by position, or measured."""
    parameters = inspect.signature(type(scheduler).__init__).parameters
    listed = scheduler.config.get("_use_default_values", [])
    return [name for name in listed if np.any(scheduler.config[name] != parameters[name].default)]


def _leaves(base: type) -> list[type]:
    return [leaf for child in base.__subclasses__() for leaf in (_leaves(child) or [child])]


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


def _meant_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are read off a config, whether it says them or not."""
    if config.get("degradation", "noise") != "noise":
        raise ValueError(f"degradation={config['degradation']!r} is of a process without noise: no Gaussian path")
    if "sigma_max" in config and not {"beta_schedule", "trained_betas", "shift"} & config.keys():
        raise ValueError(
            f"a config with sigma_max={config['sigma_max']} and neither a beta_schedule, trained_betas nor a shift is "
            "of a network that is told sigma, not a timestep; annealers.load_score_sde_ve brings score networks here"
        )
    if config.get("invert_sigmas"):
        raise ValueError(
            "invert_sigmas=True is of a network that counts its time from the noise, which no scheduler here does"
        )
    meant = {
        "clip_sample": config.get("clip_sample", False),
        "prediction_type": config.get("prediction_type", "flow_prediction" if "shift" in config else "epsilon"),
        "shift": config.get("shift", config.get("flow_shift", 1.0)),
    }
    # multistep solvers say their spacing so, or space a flow evenly to the data
    spacing = "karras" if config.get("use_karras_sigmas") else "trailing" if config.get("use_flow_sigmas") else None
    if spacing is not None:  # with a `shift` the config is ours
        meant["timestep_spacing"] = config.get("timestep_spacing", spacing) if "shift" in config else spacing
    return meant


def _decreasing_positive(name: str, values: Sequence[float] | np.ndarray | torch.Tensor) -> np.ndarray:
    values = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not (values > 0).all() or (np.diff(values) >= 0).any():
        raise ValueError(f"{name} must be positive and strictly decreasing, got {values.tolist()}")
    return values
