r"""Cold diffusion: undoes any degradation, step by step, with a network that restores.

A network guesses the image behind a degraded one, x̂_0 = R(x_t, t). From there to a less degraded x_s, s < t, there
are two ways (Bansal et al. 2022, Algorithms 1 and 2),

    naive       x_s = D(x̂_0, s)
    improved    x_s = x_t - D(x̂_0, t) + D(x̂_0, s)

With a perfect network both are exact. With another, "naive" has the error D(x̂_0, s) - D(x_0, s), which is that of the
network whatever the step; for a linear D "improved" has only D(x̂_0 - x_0, s) - D(x̂_0 - x_0, t), which vanishes with
the step. If D(x_0, t) = x_0 + t e with an e that does not depend on x_0, it has none at all.

Gaussian noise is the degradation whose noise z is estimated, z = (x_t - alpha_t x̂_0) / sigma_t, so D(x̂_0, t) is x_t,
both ways are alpha_s x̂_0 + sigma_s z, and that is DDIM without noise (Song et al. 2020, Eq. 12, eta = 0).

A fully degraded image takes the place of the noise that other samplers start from: hand it to a pipeline as
`latents=`, and it is restored. To draw new images start from `terminal_sample`: a normal law, which `fit_terminal`
takes from data, of the few coordinates that a fully degraded image has, plus a little noise, because images of exactly
one colour would all become one image (Sec. 5.2). `GuidedDiffusionPipeline` does so if it is given no latents; the
pipelines of Diffusers draw unit noise, which is no degraded image, unless the degradation is "noise".

    symbol    code             shape      meaning
    x_0       original_sample  (B, *)     image
    x̂_0       model_output     (B, *)     the network's guess of it
    x_t       sample           (B, *)     degraded image
    D         degradation                 see `degradations`

Sources: Bansal, Borgnia, Chu, Li, Kazemi, Huang, Goldblum, Geiping, Goldstein 2022, "Cold Diffusion: Inverting
Arbitrary Image Transforms Without Noise", arXiv:2208.09392; Song, Meng, Ermon 2020, "Denoising Diffusion Implicit
Models", arXiv:2010.02502.
"""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from annealers.schedulers.degradations import Blurring, Downsampling, Fading, ImageDegradation, Noising
from annealers.schedulers.gaussian_path import (
    PREDICTION_TYPES,
    GaussianPathSchedulerOutput,
    chosen_settings,
    standard_normal,
    working_dtype,
)
from annealers.schedulers.path_tables import spaced_timesteps, strictly_decreasing
from annealers.schedulers.scheduling_ddpm_ancestral import DDPMAncestralScheduler

DEGRADATIONS = ("blur", "downsample", "mask", "noise")
SAMPLERS = ("improved", "naive")
SPACINGS = ("leading", "linspace", "trailing")
MOST_TERMINAL_COORDINATES = 1024  # their covariance is kept in the config
ORIGINAL = -1  # the timestep of the image itself


class ColdDiffusionScheduler(SchedulerMixin, ConfigMixin):
    """Restores degraded images. The arguments that Diffusers has keep its names and, but for two, its defaults.

    What the network restores is used as it is, and nothing is clipped.

    Args:
        num_train_timesteps: Number of timesteps T that the network was trained on.
        degradation: "blur", "downsample", "mask" or "noise".
        sampler: "improved" or "naive".
        blur_sigma_min, blur_sigma_max: Width of the blur at t = 0 and t = T - 1, in pixels.
        downsample_factor: Side of the largest blocks of "downsample", a power of two that divides the image.
        mask_sigma_min, mask_sigma_max: Width of the first and the last Gaussian of the mask, in pixels.
        mask_center: (row, column) of the centre of the mask in pixels; None is the middle of the image.
        terminal_noise: Standard deviation of the noise that `terminal_sample` adds.
        terminal_shape, terminal_mean, terminal_factor: The law of fully degraded images; written by `fit_terminal`.
        prediction_type: What the network returns. None is "sample" (x_0), which every degradation but "noise" needs,
            and "epsilon" for that one, which takes all types that `DDPMAncestralScheduler` does, but not the flow.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr, sigma_min, sigma_max: The path of
            "noise", as in `DDPMAncestralScheduler`.
        timestep_spacing: "trailing", "linspace" or "leading". The first two begin at T - 1, as a fully degraded image
            does; "leading", the default of Diffusers, does not.
        steps_offset: Added to the timesteps of "leading" spacing.

    Attributes:
        degradation: D, called as `degradation(original_samples, timesteps)`; see `degradations`.
        timesteps: The timestep of each network call, decreasing, int64; all of them until `set_timesteps` is called.
        init_noise_sigma: 1.

    Example:
        >>> import torch
        >>> from annealers import ColdDiffusionScheduler
        >>> scheduler = ColdDiffusionScheduler(num_train_timesteps=4, degradation="downsample", downsample_factor=4)
        >>> scheduler.set_timesteps(2)
        >>> scheduler.timesteps.tolist()
        [3, 1]
        >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> scheduler.add_noise(image, None, torch.tensor([3])).unique().tolist()
        [7.5]
    """

    __module__ = "annealers"  # the name that model_index.json records

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        degradation: str = "blur",
        sampler: str = "improved",
        blur_sigma_min: float = 0.5,  # both are the CIFAR-10 values of Rissanen et al. 2022, arXiv:2206.13397
        blur_sigma_max: float = 24.0,
        downsample_factor: int = 8,
        mask_sigma_min: float = 0.1,  # both are the MNIST values of Bansal et al. 2022, for 50 timesteps
        mask_sigma_max: float = 5.0,
        mask_center: tuple[float, float] | list[float] | None = None,
        terminal_noise: float = 0.002,  # Bansal et al. 2022, Sec. 5.2
        terminal_shape: list[int] | None = None,
        terminal_mean: list[float] | None = None,
        terminal_factor: list[list[float]] | None = None,
        prediction_type: str | None = None,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "trailing",
        steps_offset: int = 0,
    ) -> None:
        for name, value, choices in (
            ("degradation", degradation, DEGRADATIONS),
            ("sampler", sampler, SAMPLERS),
            ("timestep_spacing", timestep_spacing, SPACINGS),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        if not 0 <= terminal_noise < np.inf:
            raise ValueError(f"terminal_noise must not be negative, got {terminal_noise}")
        if prediction_type is None:
            prediction_type = "epsilon" if degradation == "noise" else "sample"
            self.register_to_config(prediction_type=prediction_type)
        allowed = [name for name in PREDICTION_TYPES if name != "flow_prediction"] if degradation == "noise" else []
        if prediction_type not in (allowed or ["sample"]):
            raise ValueError(
                f"prediction_type must be one of {allowed or ['sample']} for the degradation {degradation!r}, got "
                f"{prediction_type!r}"
            )
        self._keep_settings()
        self.degradation = self._built_degradation()
        self.num_inference_steps: int | None = None
        self._set_schedule(np.arange(num_train_timesteps)[::-1].copy(), device=None)

    def _keep_settings(self) -> None:
        """Lets `from_config` keep what was fitted or given by position, which Diffusers takes for defaults."""
        chosen = chosen_settings(self)
        if chosen:  # a config that was loaded has no list of defaults, and gets none
            still = [name for name in self.config["_use_default_values"] if name not in chosen]
            self.register_to_config(_use_default_values=still)

    def _built_degradation(self) -> ImageDegradation | Noising:
        config = self.config
        T = config.num_train_timesteps
        if config.degradation == "blur":
            return Blurring(T, config.blur_sigma_min, config.blur_sigma_max)
        if config.degradation == "downsample":
            return Downsampling(T, config.downsample_factor)
        if config.degradation == "mask":
            return Fading(T, config.mask_sigma_min, config.mask_sigma_max, config.mask_center)
        path = DDPMAncestralScheduler(
            num_train_timesteps=T,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule=config.beta_schedule,
            trained_betas=config.trained_betas,
            rescale_betas_zero_snr=config.rescale_betas_zero_snr,
            sigma_min=config.sigma_min,
            sigma_max=config.sigma_max,
            prediction_type=config.prediction_type,
        )
        return Noising(path)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ---- the schedule: which timesteps are visited ------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | torch.Tensor | None = None,
    ) -> None:
        """Chooses the timesteps to visit.

        Args:
            num_inference_steps: How many, N in 1 .. T, spaced as `config.timestep_spacing` says.
            device: Device of `self.timesteps`.
            timesteps: Themselves instead, integers, strictly decreasing; the first says how much the images that are
                to be restored are degraded.

        Raises:
            ValueError: If not exactly one of the two is given, or it is out of range.
        """
        T = len(self)
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"give exactly one of num_inference_steps and timesteps, got {num_inference_steps} and {timesteps}"
            )
        if timesteps is not None:
            schedule = np.asarray(timesteps.cpu() if isinstance(timesteps, torch.Tensor) else timesteps)
            if schedule.ndim != 1 or len(schedule) == 0 or not np.array_equal(schedule, schedule.astype(np.int64)):
                raise ValueError(f"timesteps must be a non-empty list of integers, got {timesteps}")
            if not 0 <= schedule.min() <= schedule.max() < T or (np.diff(schedule) >= 0).any():
                raise ValueError(f"timesteps must decrease strictly within {T - 1} .. 0, got {schedule.tolist()}")
            schedule = schedule.astype(np.int64)
        else:
            N = num_inference_steps
            if isinstance(N, bool) or not isinstance(N, (int, np.integer)) or not 1 <= N <= T:
                raise ValueError(f"num_inference_steps must be an integer in 1 .. {T}, got {N!r}")
            spaced = spaced_timesteps(self.config.timestep_spacing, int(N), T, self.config.steps_offset)
            schedule = strictly_decreasing(spaced.round().astype(np.int64), T)
        if isinstance(self.degradation, Noising):
            self.degradation.path.set_timesteps(timesteps=schedule)  # which refuses to divide by a signal that is 0
        self.num_inference_steps = len(schedule)
        self._set_schedule(schedule, device)

    def _set_schedule(self, schedule: np.ndarray, device: str | torch.device | None) -> None:
        self._visited: list[int] = schedule.tolist()
        self.timesteps = torch.tensor(self._visited, dtype=torch.int64, device=device)
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """Position in `timesteps` of the next `step`; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Position of the first `step` as set by a pipeline."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._begin_index = begin_index

    def _position(self, timestep: int | torch.Tensor) -> int:
        """Position of `timestep` in `timesteps`; the `t` of `for t in scheduler.timesteps` says it by its address."""
        if isinstance(timestep, torch.Tensor):
            if timestep.numel() != 1:
                raise ValueError(f"step takes one timestep for the whole batch, got {timestep.numel()}")
            if timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr():
                return timestep.storage_offset()
        value = timestep.item() if isinstance(timestep, torch.Tensor) else timestep
        if value not in self._visited:
            raise ValueError(
                f"timestep {value} is not one of the {len(self._visited)} of the schedule, {self._visited[0]} .. "
                f"{self._visited[-1]}; see set_timesteps"
            )
        return self._visited.index(value)

    # ---- forward: image to degraded image ---------------------------------------------------------------------------

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample`: the network sees the state as it is."""
        return sample

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor | None, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        """Computes D(x_0, t), by the name that training loops call.

        Args:
            original_samples: x_0, (B, C, H, W).
            noise: Of the shape of x_0 for "noise"; otherwise nothing is drawn, and it may be None.
            timesteps: Integers -1 .. T - 1, one or one per image, (B,).

        Returns:
            x_t, (B, C, H, W), in the dtype of `original_samples`.
        """
        return self.degradation(original_samples, timesteps, noise)

    # ---- reverse: degraded image to image ---------------------------------------------------------------------------

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> GaussianPathSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Takes one step, from `timestep` to the next of the schedule, and at the end to the image.

        Args:
            model_output: Output of the network at (`sample`, `timestep`), (B, *).
            timestep: The entry of `timesteps` that the sample is on.
            sample: x_t, (B, *).
            generator: Not used, since nothing is drawn; loops of Diffusers pass one.
            return_dict: Whether to return a `GaussianPathSchedulerOutput` rather than a tuple.

        Returns:
            x_s and x̂_0, both (B, *), in the dtype of `sample`.

        Raises:
            ValueError: If the output's shape does not fit, the timestep is not in the schedule, or there is none yet.
        """
        if self.num_inference_steps is None:
            raise ValueError("step needs a schedule: call set_timesteps first")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"the model output must have the shape of the sample, {tuple(sample.shape)}, "
                f"got {tuple(model_output.shape)}"
            )
        position = self._position(timestep)
        t, s = [*self._visited, ORIGINAL][position : position + 2]

        D, dtype = self.degradation, working_dtype(sample)
        x_t = sample.to(dtype)
        x_0 = self._original_sample(model_output.to(dtype), x_t, position)
        z = D.noise(x_t, x_0, t)
        x_s = D(x_0, s, z)
        if self.config.sampler == "improved":
            x_s = x_t - D(x_0, t, z) + x_s

        self._step_index = position + 1
        x_s, x_0 = x_s.to(sample.dtype), x_0.to(sample.dtype)
        return GaussianPathSchedulerOutput(x_s, x_0) if return_dict else (x_s, x_0)

    def _original_sample(self, model_output: torch.Tensor, x_t: torch.Tensor, position: int) -> torch.Tensor:
        if isinstance(self.degradation, Noising):
            return self.degradation.path.original_sample(model_output, x_t, self.timesteps[position])
        return model_output

    # ---- the start: a law of fully degraded images ------------------------------------------------------------------

    def fit_terminal(self, images: torch.Tensor) -> None:
        """Fits the normal law of what is left of images at T - 1, and keeps it in the config.

        Args:
            images: x_0, (N, C, H, W), at least two.

        Raises:
            ValueError: For too few images or some that are not finite, or if the last timestep leaves more than 1,024
                coordinates of an image.
        """
        if isinstance(self.degradation, Noising):
            return  # unit noise, whatever the images
        if images.ndim != 4 or len(images) < 2:
            raise ValueError(f"need at least two images (N, C, H, W), got {tuple(images.shape)}")
        if not images.is_floating_point() or not images.isfinite().all():
            raise ValueError(f"need images of finite numbers in [-1, 1], got {images.dtype} or a value that is not")
        degraded = self.degradation(images.double(), len(self) - 1)
        coordinates = self.degradation.terminal_coordinates(degraded)  # (N, n)
        n = coordinates.shape[1]
        if n > MOST_TERMINAL_COORDINATES:
            raise ValueError(
                f"the last timestep leaves {n} coordinates of an image of shape {tuple(images.shape[1:])}, more than "
                f"{MOST_TERMINAL_COORDINATES}: degrade more, or start from degraded images"
            )
        mean = coordinates.mean(dim=0)
        # a factor F with F^T F = covariance, (min(N, n), n)
        factor = torch.linalg.qr((coordinates - mean) / (len(images) - 1) ** 0.5, mode="r").R
        self.register_to_config(
            terminal_shape=list(images.shape[1:]), terminal_mean=mean.tolist(), terminal_factor=factor.tolist()
        )
        self._keep_settings()

    def terminal_sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | list[torch.Generator] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Draws fully degraded images, to be handed to a pipeline as `latents`.

        Args:
            shape: (B, C, H, W), of the images that the law was fitted to.
            generator: Source of the noise; a list gives each image its own.
            device, dtype: Of the images.

        Raises:
            ValueError: If no law was fitted, or one of images of another shape.
        """
        shape = tuple(shape)
        image = torch.empty(shape, device=device, dtype=dtype)
        noise = standard_normal(image, generator, working_dtype(image))
        if isinstance(self.degradation, Noising):
            return noise.to(dtype)
        if self.config.terminal_shape is None:
            raise ValueError("no law of fully degraded images is known: call fit_terminal with some images first")
        if list(shape[1:]) != list(self.config.terminal_shape):
            raise ValueError(f"the law is of images of shape {self.config.terminal_shape}, got {list(shape[1:])}")
        mean = noise.new_tensor(self.config.terminal_mean)
        factor = noise.new_tensor(self.config.terminal_factor).reshape(len(self.config.terminal_factor), len(mean))
        z = standard_normal(noise.new_empty(shape[0], len(factor)), generator, noise.dtype)
        image = self.degradation.terminal_image(mean + z @ factor, shape)
        return (image + self.config.terminal_noise * noise).to(dtype)
