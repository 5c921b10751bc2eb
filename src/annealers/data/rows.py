"""Many rows: with random access, as a stream, or drawn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from annealers.data.config import DataError, cause_of
from annealers.data.images import CENTER, RowReader
from annealers.randomness import PositionalRandomness


@dataclass(eq=False)
class ImageRows(Dataset):
    """Chosen rows of a `datasets` table; `rows[i]` decodes one, and its "row" is the number in the stored split."""

    table: Any
    reader: RowReader
    row_numbers: np.ndarray
    decoded: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.row_numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read([index], [CENTER])[0]

    def read(self, indices: Sequence[int], centerings: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
        """The items at `indices`, each cropped at its (x, y) of `centerings`."""
        if self.decoded is not None:
            return [self.decoded[index] for index in indices]
        numbers = self.row_numbers[list(indices)].tolist()
        columns = self.table[numbers]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return list(map(self.reader.read, numbers, rows, centerings))

    def chosen(self, indices: np.ndarray) -> "ImageRows":
        """The rows at `indices` only."""
        decoded = None if self.decoded is None else [self.decoded[index] for index in indices]
        return ImageRows(self.table, self.reader, self.row_numbers[indices], decoded)

    def in_memory(self) -> "ImageRows":
        """The same rows decoded once, for a data set as small as the digits, whose square images need no crop."""
        return replace(self, decoded=self.read(range(len(self)), [CENTER] * len(self)))


@dataclass(eq=False)
class ImageStream(IterableDataset):
    """The rows of a streamed split in the stream's own order; iterating decodes them."""

    table: Any
    reader: RowReader
    shuffle_buffer: int

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in self.stored_rows():
            yield self.reader.read(number, row)

    def stored_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row number, undecoded row) of one pass."""
        rows = iter(self.table)
        for number in count():
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise DataError(
                    f"cannot read row {number} of split {self.reader.split!r} from the stream: {cause_of(error)}"
                ) from error
            yield number, row


@dataclass(eq=False)
class PointRows(Dataset):
    """Points that were drawn and not stored: float events in the units of the data, none of them an 8-bit image.

    Args:
        points: (N, C, H, W), float32.
        row_numbers: Of each point in the split.
    """

    points: torch.Tensor
    row_numbers: np.ndarray

    @classmethod
    def of(cls, points: torch.Tensor) -> "PointRows":
        """All of the points."""
        return cls(points, np.arange(len(points)))

    def __len__(self) -> int:
        return len(self.row_numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read([index], [CENTER])[0]

    def read(self, indices: Sequence[int], centerings: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
        """The items at `indices`; a point has no borders to crop."""
        return [{"image": self.points[row], "row": int(row)} for row in self.row_numbers[list(indices)]]

    def chosen(self, indices: np.ndarray) -> "PointRows":
        """The rows at `indices` only."""
        return PointRows(self.points, self.row_numbers[indices])


Images = ImageRows | ImageStream | PointRows


@dataclass
class ImageData:
    """A data set ready for training.

    Args:
        name: For cards and logs; of a folder its last part.
        hub_id: Name on the Hub, None if it did not come from there.
        train: `ImageRows`, `ImageStream` when streaming, or `PointRows` of a toy.
        validation: The same, or None if there is neither a split nor a holdout.
        channels, resolution: Of every image, (channels, resolution, resolution).
        id2label: The name of each label id 0 ... K - 1, None if unconditional.
    """

    name: str
    hub_id: str | None
    train: Images
    validation: Images | None
    channels: int
    resolution: int
    id2label: dict[int, str] | None


def fixed_choice(length: int, size: int) -> np.ndarray:
    """At most `size` of the indices below `length`, in order.

    A random choice, because rows are often stored by class; the same for every seed, so that runs are comparable.
    """
    return np.sort(PositionalRandomness(0).permutation("fixed choice of rows", 0, length).numpy()[:size])
