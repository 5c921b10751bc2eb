r"""Blind degradations: what a bad photograph has been through, with parameters that a restorer is not told.

    x_l = resize( JPEG_q( resize(x_h * k_sigma, 1 / r) + (delta / 127.5) n ), r )            Zhou et al. 2022, Sec. 4.1

that is blur, downsampling, noise and compression, and enlarging back to the size it had. The parameters of each image
are drawn evenly from ranges; those of the paper are for faces of 512 x 512 pixels.

    symbol    code            shape           unit                   paper's range
    x_h       images          (B, C, H, W)    in [-1, 1]
    sigma     blur_sigma      (B,)            pixels                 1 .. 15
    r         downsampling    (B,)            pixels to a pixel      1 .. 30
    delta     noise_level     (B,)            levels of 0 .. 255     0 .. 20
    q         jpeg_quality    (B,)            1 .. 100, integers     30 .. 90
    n         noise           (B, C, H, W)    standard normal

Everything is a function of these numbers and nothing is drawn here, so that a training run can draw them as functions
of (seed, position). The blur is the one of cold diffusion, heat that does not leave the image: exact for any width,
and the identity for sigma = 0. Images are resized by a triangular filter as wide as the coarser pixels, and compressed
by Pillow, with colours at half the resolution.

Source: Zhou, Chan, Li, Loy 2022, "Towards Robust Blind Face Restoration with Codebook Lookup Transformer",
arXiv:2206.11253. For degradations that are the same for all images and known, see `annealers.measurements`; for those
that a diffusion model undoes step by step, `annealers.schedulers.degradations`.
"""

import io
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from annealers.schedulers.degradations import cosine_transform

Range = tuple[float, float]

HALF_RANGE = 127.5  # levels of an 8-bit image to a unit of [-1, 1]


class DegradationParameters(NamedTuple):
    """What each image of a batch goes through, (B,) each; see the table of this module."""

    blur_sigma: torch.Tensor
    downsampling: torch.Tensor
    noise_level: torch.Tensor
    jpeg_quality: torch.Tensor


@dataclass(frozen=True)
class DegradationRanges:
    """From where the parameters are drawn; the defaults are the paper's, for images of 512 x 512 pixels.

    Args:
        blur_sigma: sigma, in pixels, at least 0.
        downsampling: r, at least 1.
        noise_level: delta, in levels of an 8-bit image, at least 0.
        jpeg_quality: q, integers in 1 .. 100, both ends included.

    Raises:
        ValueError: If a range is empty or goes beyond these bounds.

    Example:
        >>> import torch
        >>> ranges = DegradationRanges(blur_sigma=(0.0, 1.0), downsampling=(1.0, 2.0))
        >>> images = torch.zeros(2, 1, 8, 8)
        >>> degraded = degrade(images, ranges.parameters(torch.rand(2, 4)), torch.randn(2, 1, 8, 8))
        >>> degraded.shape
        torch.Size([2, 1, 8, 8])
    """

    blur_sigma: Range = (1.0, 15.0)
    downsampling: Range = (1.0, 30.0)
    noise_level: Range = (0.0, 20.0)
    jpeg_quality: tuple[int, int] = (30, 90)

    def __post_init__(self) -> None:
        for name, least, most in (
            ("blur_sigma", 0, math.inf),
            ("downsampling", 1, math.inf),
            ("noise_level", 0, math.inf),
            ("jpeg_quality", 1, 100),
        ):
            limits = getattr(self, name)
            if len(limits) != 2 or not least <= limits[0] <= limits[1] <= most or not math.isfinite(limits[1]):
                raise ValueError(f"{name} must be a range (low, high) inside {least} .. {most}, got {limits}")
        if any(quality != int(quality) for quality in self.jpeg_quality):
            raise ValueError(f"jpeg_quality must be integers, got {self.jpeg_quality}")

    def parameters(self, shares: torch.Tensor) -> DegradationParameters:
        """The parameters at shares 0 <= u < 1 of each range, (B, 4), in the order of the fields."""
        if shares.ndim != 2 or shares.shape[1] != 4:
            raise ValueError(f"shares must be (B, 4), got {tuple(shares.shape)}")
        sigma, r, delta, q = shares.unbind(dim=1)
        lowest, highest = self.jpeg_quality
        return DegradationParameters(
            _between(self.blur_sigma, sigma),
            _between(self.downsampling, r),
            _between(self.noise_level, delta),
            lowest + (q * (highest - lowest + 1)).long(),
        )


def degrade(images: torch.Tensor, parameters: DegradationParameters, noise: torch.Tensor) -> torch.Tensor:
    """x_l of x_h, each image by its own parameters.

    Args:
        images: x_h in [-1, 1], (B, C, H, W).
        parameters: Of each image.
        noise: n, (B, C, H, W); of a smaller image the first rows and columns are used.

    Returns:
        x_l in [-1, 1], (B, C, H, W), in the dtype and on the device of the images.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    if noise.shape != images.shape or any(len(values) != len(images) for values in parameters):
        raise ValueError(
            f"need noise of the shape of the images, {tuple(images.shape)}, and parameters for each of them, got "
            f"{tuple(noise.shape)} and {[len(values) for values in parameters]}"
        )
    blurred = blur(images.float(), parameters.blur_sigma)
    degraded = []
    for i, image in enumerate(blurred.unsqueeze(1)):  # (1, C, H, W): their sizes are about to differ
        H, W = image.shape[-2:]
        h, w = (max(1, round(side / float(parameters.downsampling[i]))) for side in (H, W))
        small = resize(image, (h, w))
        grain = noise[i, :, :h, :w].to(small)
        compressed = jpeg(small + parameters.noise_level[i] / HALF_RANGE * grain, parameters.jpeg_quality[i])
        degraded.append(resize(compressed, (H, W)))
    return torch.cat(degraded).to(images.dtype)


def blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Convolves each image (B, C, H, W) with a Gaussian of its own width sigma (B,), reflected at the borders."""
    rows, columns = (cosine_transform(side).to(images) for side in images.shape[-2:])
    gains = _gains(len(rows), sigma)[:, :, None] * _gains(len(columns), sigma)[:, None, :]  # (B, H, W)
    return rows.T @ (gains.unsqueeze(1).to(images) * (rows @ images @ columns.T)) @ columns


def resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Images (B, C, H, W) in another size (h, w), by a triangular filter as wide as the coarser of the pixels."""
    return images if images.shape[-2:] == size else interpolate(images, size, mode="bilinear", antialias=True)


def jpeg(images: torch.Tensor, quality: int | torch.Tensor) -> torch.Tensor:
    """Compresses images in [-1, 1], (B, C, H, W), and reads them again; what lies outside is clipped.

    Three channels are red, green and blue; of any other number each is an image on its own.

    Args:
        images: Of any size and device.
        quality: q in 1 .. 100.
    """
    B, C, H, W = images.shape
    levels = ((images.clamp(-1, 1) + 1) * HALF_RANGE).round().to("cpu", torch.uint8)
    if C == 3:
        pictures = levels.permute(0, 2, 3, 1)  # (B, H, W, 3)
    else:
        pictures = levels.reshape(B * C, H, W)
    compressed = np.stack([_compressed(picture.numpy(), int(quality)) for picture in pictures])
    values = torch.from_numpy(compressed).to(images) / HALF_RANGE - 1
    return values.permute(0, 3, 1, 2) if C == 3 else values.reshape(B, C, H, W)


def _compressed(levels: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _gains(size: int, sigma: torch.Tensor) -> torch.Tensor:
    """How much of each mode of an axis the blur leaves, exp(-sigma^2 (pi m / size)^2 / 2), float64 (B, size)."""
    frequencies = math.pi * torch.arange(size, dtype=torch.float64, device=sigma.device) / size
    return torch.exp(-((sigma.double()[:, None] * frequencies) ** 2) / 2)


def _between(limits: Range, share: torch.Tensor) -> torch.Tensor:
    low, high = limits
    return low + (high - low) * share
