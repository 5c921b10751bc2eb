r"""Degradations: an image x_0 loses information step by step, x_t = D(x_0, t), down to t = T - 1.

    blur         x_t = C^T (exp(-lambda sigma_t^2 / 2) C x_0)              the heat equation with insulated borders:
                 sigma_t = sigma_min (sigma_max / sigma_min)^(t / (T - 1))    a Gaussian of width sigma_t, reflected
    downsample   x_t = (1 - w) P_k x_0 + w P_(k+1) x_0                     P_k: means over blocks of 2^k x 2^k pixels
                 k + w = (t + 1) / T log2(factor)
    mask         x_t = x_0 prod_(i <= t) (1 - exp(-r^2 / (2 s_i^2)))       r: distance of a pixel to the centre
                 s_i = s_min + (s_max - s_min) i / (T - 1)
    noise        x_t = alpha_t x_0 + sigma_t z                             the Gaussian path of `gaussian_path`

C is the discrete cosine transform and lambda = pi^2 (m^2 / H^2 + n^2 / W^2) the eigenvalue of its mode (m, n). A blur
followed by a blur is a blur, of width sqrt(sigma^2 + sigma'^2), exactly. With T = log2(factor) each timestep of
"downsample" halves the image, as in the paper; with more it fades from one size to the next.

The first three are functions of x_0 alone, linear ones: nothing is drawn, and t = -1 is the identity. "noise" has the
noise z beside x_0, which is estimated from a state and a guess of its x_0.

What x_(T-1) can still be has few coordinates, those that at least 1/255 of is left: the lowest modes, the coarse
pixels, or the pixels that the mask spares. A law of them is a law of fully degraded images.

    symbol    code                shape          meaning
    x_0       original_samples    (B, C, H, W)   image
    x_t       sample              (B, C, H, W)   degraded image
    t         timesteps           (), (B,)       how much, -1 .. T - 1
    sigma_t   sigma_min, _max     ()             width of the blur in pixels
    s_i       sigma_min, _max     ()             width of the mask's i-th Gaussian in pixels

Sources: Bansal et al. 2022, "Cold Diffusion: Inverting Arbitrary Image Transforms Without Noise", arXiv:2208.09392,
Sec. 4 (downsampling, mask); Rissanen, Heinonen, Solin 2022, "Generative Modelling With Inverse Heat Dissipation",
arXiv:2206.13397 (blur).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch.nn.functional import avg_pool2d

from annealers.schedulers.gaussian_path import GaussianPathScheduler, working_dtype

LEAST_SHARE = 1 / 255  # of a coordinate in [-1, 1], half a level of an 8-bit image


class Degradation(ABC):
    """D(x_0, t) for t = 0 .. T - 1, and for t = -1 the identity.

    Args:
        num_train_timesteps: T.
    """

    def __init__(self, num_train_timesteps: int) -> None:
        T = num_train_timesteps
        if isinstance(T, bool) or not isinstance(T, int) or T < 1:
            raise ValueError(f"num_train_timesteps must be a positive integer, got {T!r}")
        self.num_train_timesteps = T

    @abstractmethod
    def __call__(
        self, original_samples: torch.Tensor, timesteps: int | torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Degrades images.

        Args:
            original_samples: x_0, (B, C, H, W).
            timesteps: Integers -1 .. T - 1, one for all or one per image, (B,).
            noise: z, (B, C, H, W); only "noise" looks at it.

        Returns:
            x_t, (B, C, H, W), dtype of `original_samples`; half precision is computed in float32.

        Raises:
            ValueError: For a shape or, where that can be read without waiting for a device, timesteps out of range.
        """

    def noise(self, sample: torch.Tensor, original_samples: torch.Tensor, timestep: int) -> torch.Tensor | None:
        """The z with which D(x_0, t) is x_t, (B, C, H, W); None where there is none to choose."""
        return None

    def _checked_timesteps(self, sample: torch.Tensor, timesteps: int | torch.Tensor) -> int | torch.Tensor:
        """An index into tables of T + 1 rows, of which the last is t = -1: an integer, or a tensor (1,) or (B,)."""
        T = self.num_train_timesteps
        if not isinstance(timesteps, torch.Tensor):
            if isinstance(timesteps, bool) or int(timesteps) != timesteps or not -1 <= timesteps < T:
                raise ValueError(f"timesteps must be integers in -1 .. {T - 1}, got {timesteps!r}")
            return int(timesteps)
        if timesteps.is_floating_point() or timesteps.is_complex() or timesteps.dtype is torch.bool:
            raise ValueError(f"timesteps must be integers, got {timesteps.dtype}")
        if timesteps.numel() not in (1, len(sample)):
            raise ValueError(f"need one timestep or one per sample, {len(sample)}, got {timesteps.numel()}")
        if timesteps.device.type == "cpu" and timesteps.numel() > 0:
            low, high = timesteps.min().item(), timesteps.max().item()
            if not -1 <= low <= high < T:
                raise ValueError(f"timesteps must lie in -1 .. {T - 1}, got {low} .. {high}")
        return timesteps.to(sample.device, torch.int64).reshape(-1)


class ImageDegradation(Degradation):
    """A linear degradation of images by itself; a subclass adds `_degraded` and the coordinates of the last state."""

    def __init__(self, num_train_timesteps: int) -> None:
        super().__init__(num_train_timesteps)
        self._tables: dict[tuple, torch.Tensor] = {}

    def __call__(
        self, original_samples: torch.Tensor, timesteps: int | torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        if original_samples.ndim != 4:
            raise ValueError(f"need images of shape (B, C, H, W), got {tuple(original_samples.shape)}")
        t = self._checked_timesteps(original_samples, timesteps)
        x_0 = original_samples.to(working_dtype(original_samples))
        with torch.autocast(x_0.device.type, enabled=False):  # of a training step, for the network alone
            x_t = self._degraded(x_0, t)
        return x_t.to(original_samples.dtype)

    @abstractmethod
    def _degraded(self, x_0: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """x_t in the working precision, for checked arguments."""

    @abstractmethod
    def terminal_coordinates(self, sample: torch.Tensor) -> torch.Tensor:
        """What is left of x_(T-1), (B, C, H, W) -> (B, n)."""

    @abstractmethod
    def terminal_image(self, coordinates: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """The x_(T-1) of `shape` = (B, C, H, W) with these coordinates, (B, n)."""

    def _table(self, name: str, like: torch.Tensor, build: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """`build(H, W)` in the precision and on the device of `like`, made once for each size of image."""
        H, W = like.shape[-2:]
        key = (name, H, W, like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = build(H, W).to(like.dtype).to(like.device)
        return self._tables[key]


class Blurring(ImageDegradation):
    """Blurs: heat flows from pixel to pixel, and none leaves the image.

    Args:
        num_train_timesteps: T.
        sigma_min, sigma_max: Width of the Gaussian at t = 0 and t = T - 1, in pixels.
    """

    def __init__(self, num_train_timesteps: int, sigma_min: float, sigma_max: float) -> None:
        super().__init__(num_train_timesteps)
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got sigma_min={sigma_min} and sigma_max={sigma_max}")
        sigmas = sigma_min * (sigma_max / sigma_min) ** _even(num_train_timesteps)
        self.sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])  # (T + 1,)

    def _degraded(self, x_0: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        if isinstance(t, int) and t == -1:
            return x_0  # exactly, without two transforms
        rows = self._table("gains of rows", x_0, lambda H, W: self._gains(H))[t]  # (H,) or (B, H)
        columns = self._table("gains of columns", x_0, lambda H, W: self._gains(W))[t]
        gains = rows[..., :, None] * columns[..., None, :]  # (H, W) or (B, H, W)
        x_t = self._image(gains.unsqueeze(-3) * self._modes(x_0))
        if isinstance(t, int):
            return x_t
        return torch.where((t == -1).reshape(-1, 1, 1, 1), x_0, x_t)

    def _gains(self, size: int) -> torch.Tensor:
        """How much of each mode of one axis is left at each timestep, (T + 1, size)."""
        eigenvalues = (math.pi * torch.arange(size, dtype=torch.float64) / size) ** 2
        return torch.exp(-eigenvalues * self.sigmas[:, None] ** 2 / 2)

    def _transforms(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._table("transform of rows", like, lambda H, W: cosine_transform(H))
        return rows, self._table("transform of columns", like, lambda H, W: cosine_transform(W))

    def _modes(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = self._transforms(x)
        return rows @ x @ columns.T

    def _image(self, modes: torch.Tensor) -> torch.Tensor:
        rows, columns = self._transforms(modes)
        return rows.T @ modes @ columns

    def _left(self, H: int, W: int) -> torch.Tensor:
        """The modes that something is left of at T - 1, bool (H, W)."""
        return self._gains(H)[-2][:, None] * self._gains(W)[-2] >= LEAST_SHARE

    def terminal_coordinates(self, sample: torch.Tensor) -> torch.Tensor:
        left = self._left(*sample.shape[-2:]).to(sample.device)
        return self._modes(sample.to(working_dtype(sample)))[..., left].flatten(1)

    def terminal_image(self, coordinates: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
        modes = coordinates.new_zeros(shape)
        left = self._left(*shape[-2:]).to(coordinates.device)
        modes[..., left] = coordinates.reshape(*shape[:2], -1)
        return self._image(modes)


class Downsampling(ImageDegradation):
    """Replaces blocks of pixels by their means, blocks of 2 x 2, 4 x 4, .. up to `factor` x `factor`.

    Args:
        num_train_timesteps: T.
        factor: Side of the blocks at t = T - 1, a power of two that divides the sides of the images.
    """

    def __init__(self, num_train_timesteps: int, factor: int) -> None:
        super().__init__(num_train_timesteps)
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 2 or factor & (factor - 1):
            raise ValueError(f"factor must be a power of two, at least 2, got {factor!r}")
        self.factor = factor
        self.halvings = factor.bit_length() - 1
        t = torch.arange(num_train_timesteps, dtype=torch.float64)
        progress = (t + 1) / num_train_timesteps * self.halvings  # k + w
        self.progress = torch.cat([progress, torch.zeros(1, dtype=torch.float64)])  # (T + 1,)

    def _degraded(self, x_0: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        self._check_sides(*x_0.shape[-2:])
        weights = self._table("weights", x_0, lambda H, W: self._weights())[t].reshape(-1, self.halvings + 1)
        weights = weights[:, :, None, None, None]  # (B or 1, K + 1, 1, 1, 1)
        x_t = weights[:, 0] * x_0
        for k in range(1, self.halvings + 1):
            x_t = x_t + weights[:, k] * _enlarged(avg_pool2d(x_0, 2**k), 2**k)
        return x_t

    def _weights(self) -> torch.Tensor:
        """The share of P_0 .. P_K at each timestep, (T + 1, K + 1): 1 - w of k, w of k + 1."""
        k = torch.arange(self.halvings + 1, dtype=torch.float64)
        return (1 - (self.progress[:, None] - k).abs()).clamp(min=0)

    def _check_sides(self, H: int, W: int) -> None:
        if H % self.factor or W % self.factor:
            raise ValueError(f"blocks of {self.factor} x {self.factor} do not tile images of {H} x {W} pixels")

    def terminal_coordinates(self, sample: torch.Tensor) -> torch.Tensor:
        self._check_sides(*sample.shape[-2:])
        return avg_pool2d(sample.to(working_dtype(sample)), self.factor).flatten(1)

    def terminal_image(self, coordinates: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
        B, C, H, W = shape
        self._check_sides(H, W)
        return _enlarged(coordinates.reshape(B, C, H // self.factor, W // self.factor), self.factor)


class Fading(ImageDegradation):
    """Fades images to grey, the zero of [-1, 1], from a centre outwards.

    Args:
        num_train_timesteps: T.
        sigma_min, sigma_max: Width of the Gaussian of t = 0 and t = T - 1, in pixels; its complement is what the mask
            is multiplied by there.
        center: (row, column) of the centre in pixels; None is the middle of the image.
    """

    def __init__(
        self,
        num_train_timesteps: int,
        sigma_min: float,
        sigma_max: float,
        center: tuple[float, float] | list[float] | None = None,
    ) -> None:
        super().__init__(num_train_timesteps)
        if not 0 < sigma_min <= sigma_max < math.inf:
            raise ValueError(f"need 0 < sigma_min <= sigma_max, got sigma_min={sigma_min} and sigma_max={sigma_max}")
        if center is not None and (len(center) != 2 or not all(math.isfinite(place) for place in center)):
            raise ValueError(f"center must be (row, column), got {center}")
        self.sigmas = sigma_min + (sigma_max - sigma_min) * _even(num_train_timesteps)  # (T,)
        self.center = center

    def _degraded(self, x_0: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        return self._table("masks", x_0, self._masks)[t].unsqueeze(-3) * x_0  # (1, H, W) or (B, 1, H, W)

    def _masks(self, H: int, W: int) -> torch.Tensor:
        """The mask of each timestep, (T + 1, H, W)."""
        row, column = ((H - 1) / 2, (W - 1) / 2) if self.center is None else self.center
        rows = torch.arange(H, dtype=torch.float64)[:, None] - row
        columns = torch.arange(W, dtype=torch.float64) - column
        variances = self.sigmas[:, None, None] ** 2
        factors = 1 - torch.exp(-(rows**2 + columns**2) / (2 * variances))  # (T, H, W)
        return torch.cat([factors.cumprod(dim=0), torch.ones(1, H, W, dtype=torch.float64)])

    def _left(self, H: int, W: int) -> torch.Tensor:
        """The pixels that something is left of at T - 1, bool (H, W)."""
        return self._masks(H, W)[-2] >= LEAST_SHARE

    def terminal_coordinates(self, sample: torch.Tensor) -> torch.Tensor:
        left = self._left(*sample.shape[-2:]).to(sample.device)
        return sample.to(working_dtype(sample))[..., left].flatten(1)

    def terminal_image(self, coordinates: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
        image = coordinates.new_zeros(shape)
        left = self._left(*shape[-2:]).to(coordinates.device)
        image[..., left] = coordinates.reshape(*shape[:2], -1)
        return image


class Noising(Degradation):
    """Adds noise along a Gaussian path; the only degradation that has more to it than x_0, and any shape (B, *).

    Args:
        path: The scheduler that holds the path.
    """

    def __init__(self, path: GaussianPathScheduler) -> None:
        super().__init__(len(path))
        self.path = path

    def __call__(
        self, original_samples: torch.Tensor, timesteps: int | torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        if noise is None:
            raise ValueError("the degradation 'noise' needs noise of the shape of the images, got None")
        t = self._checked_timesteps(original_samples, timesteps)
        if isinstance(t, torch.Tensor):
            return self.path.add_noise(original_samples, noise, t)
        alpha, sigma = self.path.signal_and_noise(t)  # numbers on the host, so that a step does not wait for a device
        dtype = working_dtype(original_samples)
        return (float(alpha) * original_samples.to(dtype) + float(sigma) * noise.to(dtype)).to(original_samples.dtype)

    def noise(self, sample: torch.Tensor, original_samples: torch.Tensor, timestep: int) -> torch.Tensor:
        """z = (x_t - alpha_t x_0) / sigma_t (Song et al. 2020, arXiv:2010.02502, Eq. 12)."""
        alpha, sigma = self.path.signal_and_noise(timestep)
        return (sample - float(alpha) * original_samples) / float(sigma)


def cosine_transform(size: int) -> torch.Tensor:
    """The orthonormal discrete cosine transform of type II, float64 (size, size); its transpose inverts it."""
    mode = torch.arange(size, dtype=torch.float64)[:, None]
    place = torch.arange(size, dtype=torch.float64) + 0.5
    transform = (2 / size) ** 0.5 * torch.cos(math.pi * mode * place / size)
    transform[0] /= 2**0.5
    return transform


def _even(T: int) -> torch.Tensor:
    """T even numbers from 0 to 1, float64; if there is one timestep, it degrades fully."""
    return torch.linspace(0, 1, T, dtype=torch.float64) if T > 1 else torch.ones(1, dtype=torch.float64)


def _enlarged(images: torch.Tensor, factor: int) -> torch.Tensor:
    """Repeats each pixel `factor` times in both directions, (B, C, H, W) -> (B, C, factor H, factor W)."""
    return images.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
