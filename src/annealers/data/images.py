"""One stored row as an image of 256 levels, its label and its caption; and the range in which networks see it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from annealers.data.config import DataError

CENTER = (0.5, 0.5)

# ---- model space ----------------------------------------------------------------------------------------------------


def to_model_space(images: torch.Tensor) -> torch.Tensor:
    """Levels 0 ... 255, uint8 (B, *), as float32 in [-1, 1]: x = level / 127.5 - 1."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_images(x: torch.Tensor) -> torch.Tensor:
    """The nearest levels of x in [-1, 1] (B, *), uint8; what lies outside is clamped. Inverse of `to_model_space`."""
    return ((x.to(torch.float32) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---- one row --------------------------------------------------------------------------------------------------------


class Columns(NamedTuple):
    image: str
    label: str | None
    caption: str | None


@dataclass(frozen=True)
class RowReader:
    """Turns a stored row into {"image": uint8 (C, H, W), "row": int} and, if asked, "label": int and "caption": str.

    Args:
        split: Name of the split, for messages.
        columns: Where to look.
        channels, resolution: Of the images that come out.
        may_resize: Whether images of another size are cropped and resized, or refused.
        may_lose_colour: Whether colour images may become grey, or are refused.
        label_names: The name of each stored label value of this split.
        label_ids: The id of each name that training knows.
    """

    split: str
    columns: Columns
    channels: int
    resolution: int
    may_resize: bool
    may_lose_colour: bool
    label_names: dict[Any, str]
    label_ids: dict[str, int]

    def read(self, number: int, row: dict[str, Any], centering: tuple[float, float] = CENTER) -> dict[str, Any]:
        """Decode row `number`; `centering` (x, y) in [0, 1] says where the square of a longer image lies."""
        item = {"image": self._image(number, row[self.columns.image], centering), "row": number}
        if self.columns.label is not None:
            item["label"] = self.label_id(number, row[self.columns.label])
        if self.columns.caption is not None:
            item["caption"] = self._caption(number, row[self.columns.caption])
        return item

    def label_id(self, number: int, stored: Any) -> int:
        """The id of a stored label, or an error that names it."""
        name = self.label_names.get(stored)
        if name in self.label_ids:
            return self.label_ids[name]
        known = list(self.label_ids)
        raise DataError(
            f"label {(stored if name is None else name)!r} in row {number} of split {self.split!r} "
            f"(column {self.columns.label!r}) is not one of the {len(known)} training labels: "
            f"{', '.join(known[:20])}{', ...' if len(known) > 20 else ''}"
        )

    def _caption(self, number: int, stored: Any) -> str:
        if isinstance(stored, str):
            return stored
        raise DataError(
            f"caption in row {number} of split {self.split!r} (column {self.columns.caption!r}) is {stored!r}, "
            "not a text"
        )

    def _image(self, number: int, stored: Any, centering: tuple[float, float]) -> torch.Tensor:
        with naming_the_image(number, self.split, self.columns.image, stored):
            planes = image_planes(stored)
            width, height = planes[0].size
            if not self.may_resize and not width == height == self.resolution:
                raise ValueError(
                    f"it is {width}x{height} (width x height) where the first training image is "
                    f"{self.resolution}x{self.resolution}: set --resolution to crop and resize"
                )
            return _fitted(self._with_channels(planes), self.resolution, centering)

    def _with_channels(self, planes: list[Any]) -> list[Any]:
        """Grey to RGB for free, RGB to grey if asked for, anything else refused."""
        channels = channel_count(planes)
        if channels == self.channels:
            return planes
        if (channels, self.channels) == (1, 3):
            return [planes[0].convert("RGB")]
        if (channels, self.channels) == (3, 1) and self.may_lose_colour:
            return [planes[0].convert("L")]
        hint = ": set --channels to 1 or 3" if (channels, self.channels) == (3, 1) else ""
        raise ValueError(f"it has {channels} channels, and {self.channels} were expected{hint}")


@contextmanager
def naming_the_image(number: int, split: str, column: str, stored: Any) -> Iterator[None]:
    """Say of any error which image caused it."""
    try:
        yield
    except Exception as error:
        path = stored.get("path") if isinstance(stored, dict) else None
        where = f"column {column!r}" + (f", file {path!r}" if path else "")
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise DataError(f"cannot use the image in row {number} of split {split!r} ({where}): {reason}") from error


def image_planes(stored: Any) -> list[Any]:
    """The stored image as 8-bit PIL images: one, grey or RGB, or one grey image per channel of an n-channel array."""
    if stored is None:
        raise ValueError("it is missing")
    if isinstance(stored, dict):
        import datasets

        return [_eight_bit(datasets.Image().decode_example(stored))]
    return _array_planes(np.asarray(stored))


def _eight_bit(image: Any) -> Any:
    """Any 8-bit mode of PIL as L or RGB; what is transparent shows white."""
    from PIL import Image

    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"):
        raise ValueError(f"mode {image.mode!r} is not supported: store 8-bit images, or float arrays in [0, 1]")
    target = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(target)


def _array_planes(array: np.ndarray) -> list[Any]:
    from PIL import Image

    if array.ndim not in (2, 3) or array.dtype == object or array.size == 0:
        raise ValueError(f"its array has shape {array.shape}, not (H, W) or (H, W, C)")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0.0 and array.max() <= 1.0):  # also refuses NaN
            raise ValueError(f"floats must lie in [0, 1], got {array.min():g} to {array.max():g}")
        array = np.round(array * 255.0)
    elif not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"an array of {array.dtype} is neither uint8 levels nor floats in [0, 1]")
    elif array.min() < 0 or array.max() > 255:
        raise ValueError(f"integers are levels 0 to 255, got {array.min()} to {array.max()}")
    levels = array.astype(np.uint8).reshape(*array.shape[:2], -1)  # (H, W, C)
    if levels.shape[2] == 3:
        return [Image.fromarray(levels)]
    return [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(levels, 2, 0)]


def channel_count(planes: list[Any]) -> int:
    return sum(len(plane.getbands()) for plane in planes)


def _fitted(planes: list[Any], resolution: int, centering: tuple[float, float]) -> torch.Tensor:
    """The largest square at `centering`, resized (bicubic, antialiased), uint8 (C, H, W)."""
    from PIL import Image, ImageOps

    size = (resolution, resolution)
    if planes[0].size != size:
        planes = [ImageOps.fit(plane, size, method=Image.Resampling.BICUBIC, centering=centering) for plane in planes]
    levels = np.concatenate([np.atleast_3d(np.asarray(plane)) for plane in planes], axis=2)  # (H, W, C)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(levels, 2, 0)))
