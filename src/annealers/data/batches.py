"""Batches whose content is a function of (seed, position).

Training walks one endless sequence of positions p = 0, 1, 2, ... Of a data set with n rows, position p shows

    row(p) = permutation_{seed, e}[p mod n],    e = p // n    (the epoch)

and in optimizer step k, micro-batch m of A, process r of P reads the b = G / (A P) positions from

    k G + (m P + r) b

on, G being the images per optimizer step. Crops and flips are functions of (seed, position) as well. So one process,
P processes, accumulation, any number of workers, and a run that was stopped and resumed all see the same images in the
same steps.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from annealers.data.config import DataConfig, DataError
from annealers.data.images import CENTER, to_model_space
from annealers.data.rows import ImageData, ImageRows, ImageStream, PointRows, fixed_choice
from annealers.randomness import PositionalRandomness


@dataclass(frozen=True)
class PositionBatches:
    """The positions that one process reads, a contiguous range per micro-batch: a `batch_sampler` for a DataLoader.

    Args:
        length: Rows in the data set, n; None of a stream, where `rows` cannot be asked.
        seed: Of the permutations.
        batch_size: Images per optimizer step over all processes and micro-batches, G.
        process_index, num_processes: r and P.
        accumulation: Micro-batches per optimizer step, A.
        first_step, last_step: Optimizer steps first_step ... last_step - 1 are yielded, A ranges each.

    Raises:
        DataError: If `batch_size` is not a multiple of num_processes * accumulation, or an index is out of range.
    """

    length: int | None
    seed: int
    batch_size: int
    process_index: int = 0
    num_processes: int = 1
    accumulation: int = 1
    first_step: int = 0
    last_step: int = 1

    def __post_init__(self) -> None:
        shares = self.num_processes * self.accumulation
        if min(self.batch_size, self.num_processes, self.accumulation) < 1 or self.batch_size % shares:
            raise DataError(
                "need a batch_size that is a multiple of num_processes * accumulation, got "
                f"batch_size={self.batch_size}, num_processes={self.num_processes}, accumulation={self.accumulation}"
            )
        if not 0 <= self.process_index < self.num_processes:
            raise DataError(f"need 0 <= process_index < {self.num_processes}, got {self.process_index}")
        if not 0 <= self.first_step <= self.last_step:
            raise DataError(f"need 0 <= first_step <= last_step, got {self.first_step} and {self.last_step}")

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[range]:
        size = self.batch_size // (self.num_processes * self.accumulation)
        for step in range(self.first_step, self.last_step):
            for micro_batch in range(self.accumulation):
                start = step * self.batch_size + (micro_batch * self.num_processes + self.process_index) * size
                yield range(start, start + size)

    def rows(self, positions: int | Sequence[int] | torch.Tensor) -> torch.Tensor:
        """row(p) of each position, int64: an index into the training rows."""
        if self.length is None:
            raise DataError("the rows of a stream are known only when it is read")
        p = torch.as_tensor(positions if isinstance(positions, (int, torch.Tensor)) else list(positions))
        rows = torch.empty_like(p, dtype=torch.int64)
        epochs = p // self.length
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            rows[here] = _permutation(self.seed, epoch, self.length)[p[here] % self.length]
        return rows


@lru_cache(maxsize=2)  # a batch lies in one epoch or in two
def _permutation(seed: int, epoch: int, length: int) -> torch.Tensor:
    return PositionalRandomness(seed).permutation("rows", epoch, length)


@dataclass(frozen=True)
class _Augmentation:
    """Crops and flips as functions of (seed, position)."""

    seed: int = 0
    random_crop: bool = False
    random_flip: bool = False

    def centerings(self, positions: range) -> list[tuple[float, float]]:
        if not self.random_crop:
            return [CENTER] * len(positions)
        uniform = PositionalRandomness(self.seed).uniform("crop", positions.start, len(positions), (2,))
        return [(x, y) for x, y in uniform.tolist()]

    def flips(self, positions: range) -> torch.Tensor:
        if not self.random_flip:
            return torch.zeros(len(positions), dtype=torch.bool)
        return PositionalRandomness(self.seed).uniform("flip", positions.start, len(positions)) < 0.5


def _batch(items: list[dict[str, Any]], positions: range, flips: torch.Tensor) -> dict[str, Any]:
    images = torch.stack([item["image"] for item in items])  # (b, C, H, W)
    images[flips] = images[flips].flip(-1)
    batch: dict[str, Any] = {
        "images": images if images.is_floating_point() else to_model_space(images),
        "positions": torch.arange(positions.start, positions.stop),
        "first_position": positions.start,
        "rows": torch.tensor([item["row"] for item in items]),
    }
    if "label" in items[0]:
        batch["labels"] = torch.tensor([item["label"] for item in items])
    if "caption" in items[0]:
        batch["captions"] = [item["caption"] for item in items]
    return batch


@dataclass(eq=False)
class _PositionedRows(Dataset):
    """Whole batches by their positions. An error travels as a value: a worker would bury it in its traceback."""

    rows: ImageRows | PointRows
    order: Callable[[range], Any]
    augmentation: _Augmentation

    def __getitems__(self, positions: range) -> dict[str, Any] | DataError:
        try:
            items = self.rows.read(
                [int(index) for index in self.order(positions)], self.augmentation.centerings(positions)
            )
        except DataError as error:
            return error
        return _batch(items, positions, self.augmentation.flips(positions))


@dataclass(eq=False)
class _PositionedStream(IterableDataset):
    """Whole batches of a stream, each decoded from the rows at its positions; the others are skipped undecoded.

    Args:
        stream: The rows.
        batches: Increasing ranges of positions.
        augmentation: Crops and flips.
        seed: Of the shuffle buffer.
        endless: Whether the stream starts again at its end, or ends with a last smaller batch.
        threads: That decode.
    """

    stream: ImageStream
    batches: Iterable[range]
    augmentation: _Augmentation
    seed: int
    endless: bool
    threads: int

    def __iter__(self) -> Iterator[dict[str, Any] | DataError]:
        batches = iter(self.batches)
        wanted = next(batches, None)
        if wanted is None:
            return
        taken: list[tuple[int, dict[str, Any]]] = []
        with ThreadPoolExecutor(max(1, self.threads)) as pool:
            try:
                for position, number, row in self._rows_from(wanted.start):
                    if position >= wanted.start:
                        taken.append((number, row))
                    if len(taken) == len(wanted):
                        yield self._read(taken, wanted, pool)
                        taken, wanted = [], next(batches, None)
                        if wanted is None:
                            return
                if taken:
                    yield self._read(taken, range(wanted.start, wanted.start + len(taken)), pool)
            except DataError as error:
                yield error

    def _read(
        self, taken: list[tuple[int, dict[str, Any]]], positions: range, pool: ThreadPoolExecutor
    ) -> dict[str, Any]:
        numbers, rows = zip(*taken, strict=True)
        items = list(pool.map(self.stream.reader.read, numbers, rows, self.augmentation.centerings(positions)))
        return _batch(items, positions, self.augmentation.flips(positions))

    def _rows_from(self, first: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """(position, row number, row) in order of positions, at least all from `first` on."""
        position = 0
        while True:
            start = position
            rows = _shuffled(self.stream.stored_rows(), self.stream.shuffle_buffer, self._draws_from(start))
            for number, row in rows:
                yield position, number, row
                position += 1
            if not self.endless:
                return
            length = position - start
            if length == 0:
                raise DataError(f"the stream of split {self.stream.reader.split!r} has 0 rows")
            position += max(0, first - position) // length * length  # the length is known now: no need to read on

    def _draws_from(self, position: int) -> Iterator[float]:
        for block in count(position, 1024):
            yield from PositionalRandomness(self.seed).uniform("shuffle buffer", block, 1024).tolist()


def _shuffled(rows: Iterator[Any], size: int, draws: Iterator[float]) -> Iterator[Any]:
    """Each draw picks the row that leaves the buffer next, and the next row of the stream takes its place."""
    buffer: list[Any] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        chosen = int(next(draws) * size)
        yield buffer[chosen]
        buffer[chosen] = row
    while buffer:
        yield buffer.pop(int(next(draws) * len(buffer)))


# ---- loaders --------------------------------------------------------------------------------------------------------


def train_batches(
    data: ImageData,
    config: DataConfig,
    seed: int,
    batch_size: int,
    accumulation: int = 1,
    process_index: int = 0,
    num_processes: int = 1,
    first_step: int = 0,
    last_step: int = 1,
) -> Iterator[dict[str, Any]]:
    """The micro-batches of one process, `accumulation` per optimizer step, from `first_step` to before `last_step`.

    Of a stream, every process reads all rows in sequence and decodes only its own; the order is the stream's own,
    passed through a buffer of `config.shuffle_buffer` rows that is a function of (seed, position). The limit of this:
    each process pays the reading (not the decoding) of all rows, rows are shuffled only as far as the buffer reaches,
    and resuming at a step reads again, without decoding, what came before it (at most one pass over the stream, plus
    the begun one). In exchange the batches are exactly those of an uninterrupted run on one process.

    Args:
        data: From `load_data(config)`.
        config: Gives crop, flip and num_workers.
        seed: Of order, crops and flips.
        batch_size: Images per optimizer step over all processes and micro-batches, G.
        accumulation, process_index, num_processes, first_step, last_step: See `PositionBatches`.

    Returns:
        Iterator of dicts: images float32 (b, C, H, W) in [-1, 1], or points as they are, labels int64 (b,) unless
        unconditional, captions list[str] if asked for, positions int64 (b,) and first_position of this contiguous
        block, and rows int64 (b,), the numbers of the rows in the stored split.

    Raises:
        DataError: If the batch size does not divide; while iterating, if a row cannot be read.
    """
    length = None if isinstance(data.train, ImageStream) else len(data.train)
    batches = PositionBatches(
        length, seed, batch_size, process_index, num_processes, accumulation, first_step, last_step
    )
    augmentation = _Augmentation(seed, random_crop=config.crop == "random", random_flip=config.flip)
    if isinstance(data.train, ImageStream):
        stream = _PositionedStream(data.train, batches, augmentation, seed, endless=True, threads=config.num_workers)
        return _loaded(stream, None, config.num_workers)
    return _loaded(_PositionedRows(data.train, batches.rows, augmentation), batches, config.num_workers)


def validation_batches(
    data: ImageData,
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    max_samples: int | None = None,
    num_workers: int = 0,
) -> Iterator[dict[str, Any]]:
    """This process's share of the validation rows, each once over all processes, without crops or flips at random.

    Batch j = 0, 1, ... holds positions [j B, (j + 1) B), the last one what is left, and process r reads the batches
    with j mod P = r: the batches are the same for every P, but one process may have one batch more than another, so
    sums must be reduced after the loop and not within it.

    Args:
        data: From `load_data`.
        batch_size: Images per batch, B.
        process_index, num_processes: r and P.
        max_samples: At most that many rows: a fixed random choice, of a stream the first ones. None: all.
        num_workers: As in `DataConfig`.

    Returns:
        Iterator of dicts as of `train_batches`; positions count the validation rows that are used.

    Raises:
        DataError: If there are no validation rows; while iterating, if a row cannot be read.
    """
    if data.validation is None:
        raise DataError(f"{data.name!r} was loaded without validation rows")
    if isinstance(data.validation, ImageStream):
        batches = _ValidationBatches(max_samples, batch_size, process_index, num_processes)
        stream = _PositionedStream(data.validation, batches, _Augmentation(), 0, endless=False, threads=num_workers)
        return _loaded(stream, None, num_workers)
    rows = data.validation
    if max_samples is not None:
        rows = rows.chosen(fixed_choice(len(rows), max_samples))
    batches = _ValidationBatches(len(rows), batch_size, process_index, num_processes)
    return _loaded(_PositionedRows(rows, list, _Augmentation()), batches, num_workers)


@dataclass(frozen=True)
class _ValidationBatches:
    """Every num_processes-th range of `batch_size` positions below `length`, or without end if it is None."""

    length: int | None
    batch_size: int
    process_index: int
    num_processes: int

    def __iter__(self) -> Iterator[range]:
        for start in count(self.process_index * self.batch_size, self.num_processes * self.batch_size):
            if self.length is not None and start >= self.length:
                return
            stop = start + self.batch_size
            yield range(start, stop if self.length is None else min(stop, self.length))


def _loaded(source: Dataset, batches: Any, num_workers: int) -> Iterator[dict[str, Any]]:
    """The whole batches of `source`: rows at the positions of `batches`, or a stream (None) by itself."""
    loader = DataLoader(
        source,
        batch_sampler=batches,
        batch_size=1 if batches is not None else None,  # 1 is what DataLoader wants to see beside a batch_sampler
        num_workers=num_workers if batches is not None else min(1, num_workers),  # several would split the stream
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # otherwise the loader draws its base seed from the global generator
    )
    return _checked(loader)


def _unchanged(batch: Any) -> Any:
    return batch


def _checked(batches: Iterable[dict[str, Any] | DataError]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch
