r"""Linear measurements of images, y = H x_0 + sigma_y n with n ~ N(0, I), and their singular value decompositions.

H = U s V^T with V orthogonal and one singular value s_i >= 0 per pixel value: in the basis V a measurement is one
noisy look at each coordinate on its own (Kawar et al. 2022, Section 3.2),

    (U^T y)_i = s_i (V^T x_0)_i + sigma_y n_i

and where s_i = 0 there is none. No matrix of the size of an image is ever made, because each V is a product of small
orthogonal matrices or a Fourier transform:

    operator      H                                        V^T                                    s
    Identity      x                                        x                                      1
    Mask          m * x                                    x                                      m
    Downsample    means of f x f blocks                    cosine transform of each block         1/f first, else 0
    Blur          convolution, boundary "reflect"          cosine transform of the image          |k̂|
                  convolution, boundary "circular"         Hartley transform of the image         |k̂|
    Grey          weighted sum of the channels             w / |w| and what is orthogonal to it   |w|, else 0

k̂ is the transform of the kernel. The reflecting boundary repeats the border pixel, (d c b a | a b c d | d c b a),
`mode="reflect"` of scipy.ndimage, for which the cosine transform of type II is the basis of symmetric kernels
(Strang 1999). Convolution on a torus has complex Fourier eigenvectors; for a real V their real and imaginary parts
are added, which is the Hartley transform (Bracewell 1983), and U carries the phases of k̂.

Coordinates V^T x have the shape of the image, and so has U^T y, with zeros where s = 0.

    symbol    code                      shape            meaning
    x_0       image                     (B, C, H, W)     image, here usually in [-1, 1]
    y         measurement               see each class   what was measured
    V^T x     to_spectral(x)            (B, C, H, W)     coordinates of an image
    U^T y     spectral_measurement(y)   (B, C, H, W)     coordinates of a measurement
    s         singular_values(shape)    broadcastable    how much of each coordinate is seen

Sources: Kawar, Elad, Ermon, Song 2022, "Denoising Diffusion Restoration Models", arXiv:2201.11793; Strang 1999, "The
Discrete Cosine Transform", SIAM Review 41; Bracewell 1983, "Discrete Hartley transform", J. Opt. Soc. Am. 73.
"""

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import scipy.fft
import torch
from scipy.signal import windows

from annealers.schedulers.gaussian_path import working_dtype

__all__ = ["Blur", "Downsample", "Grey", "Identity", "Mask", "MeasurementOperator"]

BOUNDARIES = ("reflect", "circular")
GREY_WEIGHTS = {
    "mean": (1 / 3, 1 / 3, 1 / 3),
    "luma": (0.299, 0.587, 0.114),  # ITU-R BT.601, as PIL converts to "L"
}
GAUSSIAN_RADIUS = 4.0  # in standard deviations, as scipy.ndimage truncates


class MeasurementOperator(ABC):
    """A linear measurement of images (B, C, H, W) by its singular value decomposition.

    All methods compute in float32 or better and return the dtype of their argument. Shapes that do not fit raise a
    ValueError.

    Attributes:
        tolerance: Singular values up to this fraction of the largest are not inverted, as the `rcond` of
            `numpy.linalg.pinv`: what a measurement without noise says of such a coordinate is rounding.
        is_pixelwise: Whether the coordinates are the pixels themselves.
    """

    tolerance: float = 0.0
    is_pixelwise: bool = False

    @abstractmethod
    def measurement_shape(self, image_shape: Sequence[int]) -> torch.Size:
        """The shape of y for images (B, C, H, W)."""

    @abstractmethod
    def image_shape(self, measurement_shape: Sequence[int]) -> torch.Size:
        """The shape (B, C, H, W) of the images that are measured as y of this shape."""

    @abstractmethod
    def singular_values(self, image_shape: Sequence[int]) -> torch.Tensor:
        """s, at least 0, float64, broadcastable to images (B, C, H, W)."""

    @abstractmethod
    def measure(self, image: torch.Tensor) -> torch.Tensor:
        """H x, without noise, of shape `measurement_shape`."""

    @abstractmethod
    def to_spectral(self, image: torch.Tensor) -> torch.Tensor:
        """V^T x, (B, C, H, W): an orthogonal change of coordinates."""

    @abstractmethod
    def from_spectral(self, coordinates: torch.Tensor) -> torch.Tensor:
        """V c, (B, C, H, W), the inverse of `to_spectral`."""

    @abstractmethod
    def spectral_measurement(self, measurement: torch.Tensor) -> torch.Tensor:
        """U^T y, (B, C, H, W), zero where s = 0."""

    def is_measured(self, image_shape: Sequence[int]) -> torch.Tensor:
        """Whether a coordinate can be had from a measurement without noise; see `tolerance`."""
        s = self.singular_values(image_shape)
        return s > self.tolerance * s.max()

    def adjoint(self, measurement: torch.Tensor) -> torch.Tensor:
        """H^T y = V s U^T y, (B, C, H, W)."""
        return self._back(measurement, self.singular_values(self.image_shape(measurement.shape)))

    def pseudo_inverse(self, measurement: torch.Tensor) -> torch.Tensor:
        """H^+ y, (B, C, H, W): the smallest image of those that fit y best."""
        shape = self.image_shape(measurement.shape)
        return self._back(measurement, torch.where(self.is_measured(shape), 1 / self.singular_values(shape), 0.0))

    def _back(self, measurement: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        coordinates = self.spectral_measurement(measurement.to(working_dtype(measurement)))
        return self.from_spectral(weights.to(coordinates) * coordinates).to(measurement.dtype)


class Identity(MeasurementOperator):
    """H x = x: with noise, the task is to denoise. y has the shape of the image."""

    is_pixelwise = True

    def measurement_shape(self, image_shape: Sequence[int]) -> torch.Size:
        return _image_shape(image_shape)

    def image_shape(self, measurement_shape: Sequence[int]) -> torch.Size:
        return _image_shape(measurement_shape)

    def singular_values(self, image_shape: Sequence[int]) -> torch.Tensor:
        _image_shape(image_shape)
        return torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def measure(self, image: torch.Tensor) -> torch.Tensor:
        return _checked(image)

    def to_spectral(self, image: torch.Tensor) -> torch.Tensor:
        return _checked(image)

    def from_spectral(self, coordinates: torch.Tensor) -> torch.Tensor:
        return _checked(coordinates)

    def spectral_measurement(self, measurement: torch.Tensor) -> torch.Tensor:
        return _checked(measurement)


class Mask(MeasurementOperator):
    """Some pixels are seen and the others are to be filled in. y has the shape of the image, and is 0 elsewhere.

    Args:
        mask: m, true or 1 where a pixel is seen; of any shape that broadcasts to the images: (H, W) for all, (C, H,
            W), (B, 1, H, W) for one mask per image. Beware: in the inpainting pipelines of Diffusers 1 is to be filled
            in.

    Raises:
        ValueError: If the mask has values besides 0 and 1.

    Example:
        >>> import torch
        >>> left_half = torch.arange(4) < 2
        >>> Mask(left_half).measure(torch.ones(1, 1, 1, 4))
        tensor([[[[1., 1., 0., 0.]]]])
    """

    is_pixelwise = True

    def __init__(self, mask: torch.Tensor | np.ndarray) -> None:
        mask = torch.as_tensor(mask)
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"a mask has the values 0 and 1, got {mask.unique().tolist()[:8]}")
        self.mask = mask.bool()

    def measurement_shape(self, image_shape: Sequence[int]) -> torch.Size:
        shape = _image_shape(image_shape)
        try:
            fits = torch.broadcast_shapes(self.mask.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"a mask of shape {tuple(self.mask.shape)} does not fit images of shape {tuple(shape)}")
        return shape

    def image_shape(self, measurement_shape: Sequence[int]) -> torch.Size:
        return self.measurement_shape(measurement_shape)

    def singular_values(self, image_shape: Sequence[int]) -> torch.Tensor:
        self.measurement_shape(image_shape)
        return self.mask.double()

    def measure(self, image: torch.Tensor) -> torch.Tensor:
        self.measurement_shape(_checked(image).shape)
        return torch.where(self.mask.to(image.device), image, 0.0)  # whatever the rest is, NaN among it

    def to_spectral(self, image: torch.Tensor) -> torch.Tensor:
        self.measurement_shape(_checked(image).shape)
        return image

    def from_spectral(self, coordinates: torch.Tensor) -> torch.Tensor:
        return self.to_spectral(coordinates)

    def spectral_measurement(self, measurement: torch.Tensor) -> torch.Tensor:
        return self.measure(measurement)


class Downsample(MeasurementOperator):
    """Means of blocks of f x f pixels: the task is super-resolution. y is (B, C, H / f, W / f).

    The first coordinate of a block's cosine transform is f times its mean; the other f^2 - 1 are not seen.

    Args:
        factor: f, at least 1.

    Example:
        >>> import torch
        >>> Downsample(2).measure(torch.tensor([[[[1.0, 3.0, 0.0, 0.0], [1.0, 3.0, 0.0, 4.0]]]]))
        tensor([[[[2., 1.]]]])
    """

    def __init__(self, factor: int) -> None:
        if isinstance(factor, bool) or operator.index(factor) < 1:
            raise ValueError(f"factor must be a positive integer, got {factor!r}")
        self.factor = operator.index(factor)

    def measurement_shape(self, image_shape: Sequence[int]) -> torch.Size:
        B, C, H, W = _image_shape(image_shape)
        f = self.factor
        if H % f or W % f:
            raise ValueError(f"factor={f} must divide the height and width of images, got {tuple(image_shape)}")
        return torch.Size((B, C, H // f, W // f))

    def image_shape(self, measurement_shape: Sequence[int]) -> torch.Size:
        B, C, H, W = _image_shape(measurement_shape)
        return torch.Size((B, C, H * self.factor, W * self.factor))

    def singular_values(self, image_shape: Sequence[int]) -> torch.Tensor:
        means = torch.full((1, 1, *self.measurement_shape(image_shape)[2:]), 1 / self.factor, dtype=torch.float64)
        return self._at_first_of_blocks(means)

    def measure(self, image: torch.Tensor) -> torch.Tensor:
        return self._blocks(image).mean(dim=(-3, -1)).to(image.dtype)

    def to_spectral(self, image: torch.Tensor) -> torch.Tensor:
        blocks = self._blocks(image)
        transform = _cosine_transform(self.factor, blocks.dtype, blocks.device)
        return torch.einsum("bchiwj,ki,lj->bchkwl", blocks, transform, transform).reshape(image.shape).to(image.dtype)

    def from_spectral(self, coordinates: torch.Tensor) -> torch.Tensor:
        blocks = self._blocks(coordinates)
        transform = _cosine_transform(self.factor, blocks.dtype, blocks.device)
        image = torch.einsum("bchkwl,ki,lj->bchiwj", blocks, transform, transform)
        return image.reshape(coordinates.shape).to(coordinates.dtype)

    def spectral_measurement(self, measurement: torch.Tensor) -> torch.Tensor:
        return self._at_first_of_blocks(_checked(measurement))

    def _blocks(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, H / f, f, W / f, f), in the working dtype."""
        B, C, H, W = self.measurement_shape(_checked(image).shape)
        return image.to(working_dtype(image)).reshape(B, C, H, self.factor, W, self.factor)

    def _at_first_of_blocks(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, H / f, W / f) -> (B, C, H, W): each value at the upper left of its block, and zeros."""
        image = values.new_zeros(self.image_shape(values.shape))
        image[..., :: self.factor, :: self.factor] = values
        return image


class Blur(MeasurementOperator):
    """Convolution of every channel with one kernel: the task is to deblur. y has the shape of the image.

    Args:
        kernel: k, of odd size, (n,) for k k^T or (n, m). With the boundary "reflect" it must be symmetric in each
            axis.
        boundary: "reflect", which repeats the border pixel, or "circular".
        tolerance: See `MeasurementOperator`. Without it noise-free deblurring would amplify the rounding of y
            1 / min(s) times.

    Raises:
        ValueError: If the kernel has an even side or another number of axes, is not finite or not symmetric where it
            must be, or the boundary is unknown.

    Example:
        >>> import torch
        >>> Blur([0.25, 0.5, 0.25]).measure(torch.tensor([[[[1.0, 1.0, 4.0, 1.0]]]]))
        tensor([[[[1.0000, 1.7500, 2.5000, 1.7500]]]])
    """

    def __init__(
        self, kernel: torch.Tensor | np.ndarray | Sequence, boundary: str = "reflect", tolerance: float = 1e-3
    ) -> None:
        kernel = torch.as_tensor(kernel, dtype=torch.float64).cpu()
        if kernel.ndim == 1:
            kernel = torch.outer(kernel, kernel)
        if kernel.ndim != 2 or not all(side % 2 for side in kernel.shape):
            raise ValueError(f"a kernel has shape (n,) or (n, m) with odd sides, got {tuple(kernel.shape)}")
        if not kernel.isfinite().all():
            raise ValueError(f"a kernel must be finite, got {kernel.tolist()}")
        if boundary not in BOUNDARIES:
            raise ValueError(f"boundary must be one of {BOUNDARIES}, got {boundary!r}")
        if boundary == "reflect" and not all(torch.allclose(kernel, kernel.flip(axis)) for axis in (0, 1)):
            raise ValueError("with boundary='reflect' the kernel must be symmetric in each axis; use 'circular'")
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must lie in 0 .. 1, without 1, got {tolerance}")
        self.kernel, self.boundary, self.tolerance = kernel, boundary, tolerance

    @classmethod
    def gaussian(cls, sigma: float, boundary: str = "reflect", tolerance: float = 1e-3) -> "Blur":
        """A Gaussian of standard deviation `sigma` in pixels, cut off at four of them and scaled to sum to one."""
        if not 0 < sigma < np.inf:
            raise ValueError(f"sigma must be positive, got {sigma}")
        kernel = windows.gaussian(2 * int(GAUSSIAN_RADIUS * sigma + 0.5) + 1, sigma)
        return cls(kernel / kernel.sum(), boundary, tolerance)

    def measurement_shape(self, image_shape: Sequence[int]) -> torch.Size:
        return _image_shape(image_shape)

    def image_shape(self, measurement_shape: Sequence[int]) -> torch.Size:
        return _image_shape(measurement_shape)

    def singular_values(self, image_shape: Sequence[int]) -> torch.Tensor:
        return self._spectrum(*_image_shape(image_shape)[2:]).abs()

    def measure(self, image: torch.Tensor) -> torch.Tensor:
        x = _checked(image).to(working_dtype(image))
        spectrum = self._spectrum(*x.shape[2:]).to(x.device)
        if self.boundary == "circular":
            return _filtered(x, spectrum).to(image.dtype)
        return self.from_spectral(self.to_spectral(x) * spectrum.to(x.dtype)).to(image.dtype)

    def to_spectral(self, image: torch.Tensor) -> torch.Tensor:
        x = _checked(image).to(working_dtype(image))
        if self.boundary == "circular":
            transformed = torch.fft.fft2(x, norm="ortho")
            return (transformed.real - transformed.imag).to(image.dtype)  # sum of x (cos + sin)
        rows, columns = (_cosine_transform(side, x.dtype, x.device) for side in x.shape[2:])
        return (rows @ x @ columns.T).to(image.dtype)

    def from_spectral(self, coordinates: torch.Tensor) -> torch.Tensor:
        if self.boundary == "circular":
            return self.to_spectral(coordinates)  # the Hartley transform is its own inverse
        c = _checked(coordinates).to(working_dtype(coordinates))
        rows, columns = (_cosine_transform(side, c.dtype, c.device) for side in c.shape[2:])
        return (rows.T @ c @ columns).to(coordinates.dtype)

    def spectral_measurement(self, measurement: torch.Tensor) -> torch.Tensor:
        y = _checked(measurement).to(working_dtype(measurement))
        phase = torch.sgn(self._spectrum(*y.shape[2:])).to(y.device)  # 0 where the spectrum is
        if self.boundary == "circular":
            return self.to_spectral(_filtered(y, phase.conj())).to(measurement.dtype)
        return (self.to_spectral(y) * phase.to(y.dtype)).to(measurement.dtype)

    def _spectrum(self, H: int, W: int) -> torch.Tensor:
        """k̂, (H, W): complex128 of a circular convolution, float64 of a reflecting one."""
        rows, columns = (torch.arange(side) - side // 2 for side in self.kernel.shape)  # offsets from the centre
        if self.boundary == "circular":
            wrapped = torch.zeros(H, W, dtype=torch.float64)
            wrapped.index_put_(((rows % H)[:, None], (columns % W)[None, :]), self.kernel, accumulate=True)
            return torch.fft.fft2(wrapped)
        waves_h, waves_w = (
            torch.cos(torch.pi / side * torch.outer(torch.arange(side, dtype=torch.float64), offsets))
            for side, offsets in ((H, rows), (W, columns))
        )
        return waves_h @ self.kernel @ waves_w.T


class Grey(MeasurementOperator):
    """One weighted sum of the channels: the task is to colour. y is (B, 1, H, W).

    Args:
        weights: "mean", "luma" (0.299, 0.587, 0.114 for RGB, as PIL converts), or w itself, (C,). Weights that sum to
            one keep the range [-1, 1].

    Raises:
        ValueError: If the name is unknown, or the weights are all zero or not finite.

    Example:
        >>> import torch
        >>> Grey("mean").measure(torch.tensor([1.0, 2.0, 6.0]).reshape(1, 3, 1, 1)).item()
        3.0
    """

    def __init__(self, weights: str | Sequence[float] | torch.Tensor = "luma") -> None:
        if isinstance(weights, str):
            if weights not in GREY_WEIGHTS:
                raise ValueError(f"weights must be one of {list(GREY_WEIGHTS)} or one number each, got {weights!r}")
            weights = GREY_WEIGHTS[weights]
        w = torch.as_tensor(weights, dtype=torch.float64).cpu()
        if w.ndim != 1 or not w.isfinite().all() or not w.any():
            raise ValueError(f"weights must be finite numbers (C,), not all zero, got {w.tolist()}")
        self.weights = w
        basis = torch.linalg.svd(w[None], full_matrices=True).Vh  # (C, C); its rows from the second on are free
        self.basis = torch.cat([w[None] / w.norm(), basis[1:]])  # V^T

    def measurement_shape(self, image_shape: Sequence[int]) -> torch.Size:
        B, C, H, W = _image_shape(image_shape)
        if len(self.weights) != C:
            raise ValueError(f"{len(self.weights)} weights need as many channels, got images of {tuple(image_shape)}")
        return torch.Size((B, 1, H, W))

    def image_shape(self, measurement_shape: Sequence[int]) -> torch.Size:
        B, C, H, W = _image_shape(measurement_shape)
        if C != 1:
            raise ValueError(f"a grey image has the shape (B, 1, H, W), got {tuple(measurement_shape)}")
        return torch.Size((B, len(self.weights), H, W))

    def singular_values(self, image_shape: Sequence[int]) -> torch.Tensor:
        self.measurement_shape(image_shape)
        s = torch.zeros(1, len(self.weights), 1, 1, dtype=torch.float64)
        s[:, 0] = self.weights.norm()
        return s

    def measure(self, image: torch.Tensor) -> torch.Tensor:
        return self._mixed(image, self.weights[None])

    def to_spectral(self, image: torch.Tensor) -> torch.Tensor:
        return self._mixed(image, self.basis)

    def from_spectral(self, coordinates: torch.Tensor) -> torch.Tensor:
        return self._mixed(coordinates, self.basis.T)

    def spectral_measurement(self, measurement: torch.Tensor) -> torch.Tensor:
        coordinates = measurement.new_zeros(self.image_shape(_checked(measurement).shape))
        coordinates[:, :1] = measurement
        return coordinates

    def _mixed(self, image: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        self.measurement_shape(_checked(image).shape)
        matrix = matrix.to(image.device, working_dtype(image))
        return torch.einsum("kc,bchw->bkhw", matrix, image.to(matrix.dtype)).to(image.dtype)


@functools.lru_cache(maxsize=16)
def _cosine_transform(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The orthogonal cosine transform of type II as a matrix, (size, size); its first row is constant."""
    return torch.from_numpy(scipy.fft.dct(np.eye(size), norm="ortho", axis=0)).to(device, dtype)


def _filtered(image: torch.Tensor, spectrum: torch.Tensor) -> torch.Tensor:
    """Circular convolution, in the working dtype, with the real kernel of this spectrum, (H, W)."""
    transformed = torch.fft.fft2(image)
    return torch.fft.ifft2(transformed * spectrum.to(transformed.dtype)).real


def _image_shape(shape: Sequence[int]) -> torch.Size:
    if len(shape) != 4:
        raise ValueError(f"need a shape (B, C, H, W), got {tuple(shape)}")
    return torch.Size(shape)


def _checked(image: torch.Tensor) -> torch.Tensor:
    """The tensor itself, if it can be images."""
    working_dtype(image)  # refuses integers
    _image_shape(image.shape)
    return image
