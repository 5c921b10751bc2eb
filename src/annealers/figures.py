"""Pictures of samples: grids, the strip of a sampling trajectory, and the same as an animation. Only PIL is needed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from diffusers.image_processor import VaeImageProcessor

if TYPE_CHECKING:
    from annealers.pipelines import Trajectory

LABEL_HEIGHT = 14  # pixels, for a 10-pixel font
SMALLEST_PICTURE = 48  # pixels; smaller samples are enlarged to be seen


def image_grid(images: Sequence[PIL.Image.Image], columns: int, padding: int = 0) -> PIL.Image.Image:
    """Lays images of one size out row by row; the last row may be short.

    Args:
        images: At least one image; all of one size and mode.
        columns: Images per row.
        padding: White pixels between neighbours.

    Raises:
        ValueError: If there is no image, or the sizes or modes differ.
    """
    if len({(image.size, image.mode) for image in images}) != 1:
        raise ValueError(f"need images of one size and mode, got {[(image.size, image.mode) for image in images]}")
    if columns < 1:
        raise ValueError(f"need columns >= 1, got {columns}")
    columns, rows = min(columns, len(images)), math.ceil(len(images) / columns)
    width, height = (side + padding for side in images[0].size)
    grid = PIL.Image.new(images[0].mode, (columns * width - padding, rows * height - padding), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid


def enlarge(image: PIL.Image.Image, scale: int) -> PIL.Image.Image:
    """Repeats every pixel `scale` times in both directions, so that an 8 x 8 digit can be seen."""
    return image.resize((image.width * scale, image.height * scale), PIL.Image.Resampling.NEAREST)


def save_grid(
    images: Sequence[PIL.Image.Image], path: str | os.PathLike, columns: int, scale: int = 1, padding: int = 0
) -> None:
    """Writes `image_grid` of the enlarged images; the format is that of the extension of `path`."""
    image_grid([enlarge(image, scale) for image in images], columns, padding).save(path)


def sample_grid(samples: torch.Tensor, columns: int) -> PIL.Image.Image:
    """Shows samples row by row, each at least `SMALLEST_PICTURE` pixels high, two white pixels apart.

    Args:
        samples: (N, C, H, W) in [-1, 1], N >= 1; values outside are clipped. Where C channels are no colours, neither
            1 nor 3, they stand beside each other as grey images.
        columns: Samples per row.
    """
    if samples.shape[1] not in (1, 3):
        samples = torch.cat(samples.split(1, dim=1), dim=-1)
    scale = math.ceil(SMALLEST_PICTURE / samples.shape[-2])
    return image_grid([enlarge(picture, scale) for picture in to_pil(samples)], columns, padding=2)


def labelled(
    grid: PIL.Image.Image, column_names: Sequence[str] = (), row_names: Sequence[str] = ()
) -> PIL.Image.Image:
    """Writes names above the columns and to the left of the rows of a grid, in white margins as large as they need.

    Args:
        grid: Of columns of one width, and rows of one height.
        column_names: One for each column, from the left; none leaves out the margin.
        row_names: One for each row, from above.
    """
    font = PIL.ImageFont.load_default(10)
    left = max((math.ceil(font.getlength(name)) + 6 for name in row_names), default=0)
    top = LABEL_HEIGHT if column_names else 0
    picture = PIL.Image.new(grid.mode, (left + grid.width, top + grid.height), "white")
    picture.paste(grid, (left, top))
    draw = PIL.ImageDraw.Draw(picture)
    for i, name in enumerate(column_names):
        x = left + (i + 0.5) * grid.width / len(column_names)
        draw.text((x, top / 2), name, fill="black", anchor="mm", font=font)
    for i, name in enumerate(row_names):
        y = top + (i + 0.5) * grid.height / len(row_names)
        draw.text((left / 2, y), name, fill="black", anchor="mm", font=font)
    return picture


def figure_of_pictures(
    pictures: list[PIL.Image.Image] | np.ndarray | torch.Tensor,
    columns: int,
    scale: int = 1,
    padding: int = 2,
    column_names: Sequence[str] = (),
    row_names: Sequence[str] = (),
    originals: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None = None,
) -> PIL.Image.Image:
    """Lays out the pictures that a pipeline returned, row by row, each below the one that it is made of, if any.

    Args:
        pictures: As a pipeline returns them; a figure can be made of a list of PIL images.
        columns: Pictures per row.
        scale: Enlargement of each.
        padding: White pixels between neighbours.
        column_names, row_names: See `labelled`.
        originals: What each picture was made of, as a list too.

    Raises:
        ValueError: If the pictures are no list.
    """
    if not isinstance(pictures, list):
        raise ValueError(f"a figure is made of PIL images, output_type='pil', got a {type(pictures).__name__}")
    columns = min(columns, len(pictures))
    if originals is not None:
        white = [PIL.Image.new(pictures[0].mode, pictures[0].size, "white")] * (-len(pictures) % columns)
        above, below = [*originals, *white], [*pictures, *white]
        rows = range(0, len(below), columns)
        pictures = [picture for i in rows for of in (above, below) for picture in of[i : i + columns]]
    grid = image_grid([enlarge(picture, scale) for picture in pictures], columns, padding)
    return labelled(grid, column_names, row_names)


def to_pil(samples: torch.Tensor) -> list[PIL.Image.Image]:
    """PIL images of (B, C, H, W) in [-1, 1], C = 1 or 3; values outside are clipped, as those of x_t are."""
    if samples.shape[1] not in (1, 3):
        raise ValueError(f"a PIL image has 1 or 3 channels, got samples of shape {tuple(samples.shape)}")
    return VaeImageProcessor().postprocess(samples, output_type="pil")


def trajectory_strip(
    trajectory: Trajectory,
    count: int = 8,
    scale: int = 1,
    labels: bool = False,
    index: int = 0,
    padding: int = 0,
) -> PIL.Image.Image:
    """Shows how one image came about: x_t above, and below it the x̂_0 that the step at x_t predicted.

    The columns are `count` evenly spaced moments, the first the initial noise and the last the image, whose prediction
    is itself. A scheduler that returns no x̂_0 leaves one row.

    Args:
        trajectory: Of `GuidedDiffusionPipeline(..., return_trajectory=True)`.
        count: Number of columns; fewer if there were fewer steps.
        scale: Enlargement of each image.
        labels: Write the train timestep above each column.
        index: Which image of the batch.
        padding: White pixels between neighbours.
    """
    samples = trajectory.samples[:, index]  # (N + 1, C, H, W)
    moments = _moments(len(samples), count)
    rows = [samples[moments]]
    if trajectory.predictions is not None:
        rows.append(torch.cat([trajectory.predictions[:, index], samples[-1:]])[moments])
    images = [enlarge(image, scale) for image in to_pil(torch.cat(rows))]
    strip = image_grid(images, len(moments), padding)
    if not labels:
        return strip
    names = [f"t={t:g}" for t in trajectory.timesteps.tolist()] + ["x_0"]
    return labelled(strip, column_names=[names[moment] for moment in moments])


def save_trajectory_gif(
    trajectory: Trajectory,
    path: str | os.PathLike,
    columns: int = 8,
    scale: int = 1,
    count: int = 50,
    seconds: float = 3.0,
    hold: float = 1.0,
) -> None:
    """Writes the grid of all x_t of the batch as an endless animation.

    Args:
        trajectory: Of `GuidedDiffusionPipeline(..., return_trajectory=True)`.
        path: File to write, ending in .gif.
        columns: Images per row of the grid.
        scale: Enlargement of each image.
        count: Number of evenly spaced frames; fewer if there were fewer steps.
        seconds: Time from noise to image.
        hold: Extra seconds on the image.
    """
    frames = [
        image_grid([enlarge(image, scale) for image in to_pil(samples)], columns)
        for samples in trajectory.samples[_moments(len(trajectory.samples), count)]
    ]
    durations = [round(1000 * seconds / len(frames))] * len(frames)
    durations[-1] += round(1000 * hold)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _moments(length: int, count: int) -> list[int]:
    """At most `count` different, evenly spaced indices below `length`, the first and the last among them."""
    if count < 2:
        raise ValueError(f"need count >= 2, the noise and the image, got {count}")
    return torch.linspace(0, length - 1, min(count, length)).round().long().tolist()
