"""Images, labels and captions for every training script, in an order that is a function of (seed, position).

Training walks one endless sequence of positions p = 0, 1, 2, ... Of a data set with n rows, position p shows

    row(p) = permutation_{seed, e}[p mod n],    e = p // n    (the epoch)

and in optimizer step k, micro-batch m of A, process r of P reads the b = G / (A P) positions from

    k G + (m P + r) b

on, G being the images per optimizer step. Crops and flips are functions of (seed, position) as well. So one process,
P processes, accumulation, any number of workers, and a run that was stopped and resumed all see the same images in the
same steps.

Rows are decoded when they are needed, in the workers of the loader; only the digits are held in memory as a whole.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from annealers.randomness import PositionalRandomness

CENTER = (0.5, 0.5)


class DataError(ValueError):
    """The data or its description is wrong; the message is one sentence for the person who started the run."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class DataConfig:
    """Which data set, which of its columns, and how its images are prepared."""

    dataset: str = _option(
        "digits", "'digits' (8x8, embedded), a name on the Hub, or a folder (parquet, arrow, images)."
    )
    dataset_config: str | None = _option(None, "Configuration of a data set on the Hub.")
    train_split: str = _option("train", "Split to train on.")
    validation_split: str | None = _option(None, "Unset: 'validation' or 'test', else rows held out of training.")
    holdout: float = _option(0.05, "Share of the rows held out if there is no validation split; 0: no validation.")
    image_column: str | None = _option(None, "Unset: the only column of images.")
    label_column: str | None = _option(None, "Unset: 'label' or the only column of classes; 'none': unconditional.")
    caption_column: str | None = _option(None, "Unset: no captions.")
    resolution: int | None = _option(None, "Side of the square images; unset: that of the data, which must agree.")
    channels: int | None = _option(None, "Channels of the images; unset: those of the first image.")
    crop: Literal["center", "random"] = _option("center", "Which square of a longer training image to take.")
    flip: bool = _option(False, "Mirror half of the training images, at random.")
    streaming: bool = _option(False, "Read the rows in sequence and store none.")
    shuffle_buffer: int = _option(1000, "Rows that are shuffled at a time in streaming; 1: the stream's own order.")
    num_workers: int = _option(0, "Worker processes that decode; in streaming, threads of one worker process.")
    max_train_samples: int | None = _option(None, "Train on that many rows: a fixed choice; of a stream the first.")

    def __post_init__(self) -> None:
        if not 0.0 <= self.holdout < 1.0:
            raise DataError(f"need 0 <= holdout < 1, got {self.holdout}")
        for name in ("resolution", "channels", "shuffle_buffer", "max_train_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"need {name} >= 1, got {value}")
        if self.num_workers < 0:
            raise DataError(f"need num_workers >= 0, got {self.num_workers}")


# -- model space ------------------------------------------------------------------------------------------------------


def to_model_space(images: torch.Tensor) -> torch.Tensor:
    """Levels 0 ... 255, uint8 (B, *), as float32 in [-1, 1]: x = level / 127.5 - 1."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_images(x: torch.Tensor) -> torch.Tensor:
    """The nearest levels of x in [-1, 1] (B, *), uint8; what lies outside is clamped. Inverse of `to_model_space`."""
    return ((x.to(torch.float32) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


# -- the embedded data set --------------------------------------------------------------------------------------------


class DigitsSplit(NamedTuple):
    """Images uint8 (N, 1, 8, 8) and labels int64 (N,), the digits themselves."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_digits_split() -> DigitsSplit:
    """The 1,797 handwritten digits embedded in scikit-learn, 8x8 grey, always split in the same way.

    Every fifth image of each digit is a test image (355 of them), whatever the seed of a run. The 17 grey values
    v = 0 ... 16 of the data become the levels round(255 v / 16).

    Source: Alpaydin & Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI repository, doi:10.24432/C50P49.
    """
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = torch.from_numpy(np.round(digits.images * 255.0 / 16.0).astype(np.uint8))[:, None]  # (N, 1, 8, 8)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    occurrence = torch.zeros_like(labels)  # the how-manieth image of its digit
    for digit in range(10):
        occurrence[labels == digit] = torch.arange(int((labels == digit).sum()))
    test = occurrence % 5 == 4
    return DigitsSplit(images[~test], labels[~test], images[test], labels[test])


def _digits_tables() -> dict[str, Any]:
    import datasets

    split = load_digits_split()
    features = datasets.Features(
        {
            "image": datasets.Array2D(shape=(8, 8), dtype="uint8"),
            "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)]),
        }
    )

    def table(images: torch.Tensor, labels: torch.Tensor) -> Any:
        columns = {"image": list(images[:, 0].numpy()), "label": labels.tolist()}
        return datasets.Dataset.from_dict(columns, features=features)

    return {
        "train": table(split.train_images, split.train_labels),
        "test": table(split.test_images, split.test_labels),
    }


# -- one row: image, label and caption --------------------------------------------------------------------------------


class _Columns(NamedTuple):
    image: str
    label: str | None
    caption: str | None


@dataclass(frozen=True)
class _RowReader:
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
    columns: _Columns
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
        with _naming_the_image(number, self.split, self.columns.image, stored):
            planes = _planes(stored)
            width, height = planes[0].size
            if not self.may_resize and not width == height == self.resolution:
                raise ValueError(
                    f"it is {width}x{height} (width x height) where the first training image is "
                    f"{self.resolution}x{self.resolution}: set --resolution to crop and resize"
                )
            return _fitted(self._with_channels(planes), self.resolution, centering)

    def _with_channels(self, planes: list[Any]) -> list[Any]:
        """Grey to RGB for free, RGB to grey if asked for, anything else refused."""
        channels = _channels(planes)
        if channels == self.channels:
            return planes
        if (channels, self.channels) == (1, 3):
            return [planes[0].convert("RGB")]
        if (channels, self.channels) == (3, 1) and self.may_lose_colour:
            return [planes[0].convert("L")]
        hint = ": set --channels to 1 or 3" if (channels, self.channels) == (3, 1) else ""
        raise ValueError(f"it has {channels} channels, and {self.channels} were expected{hint}")


@contextmanager
def _naming_the_image(number: int, split: str, column: str, stored: Any) -> Iterator[None]:
    """Say of any error which image caused it."""
    try:
        yield
    except Exception as error:
        path = stored.get("path") if isinstance(stored, dict) else None
        where = f"column {column!r}" + (f", file {path!r}" if path else "")
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise DataError(f"cannot use the image in row {number} of split {split!r} ({where}): {reason}") from error


def _planes(stored: Any) -> list[Any]:
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


def _channels(planes: list[Any]) -> int:
    return sum(len(plane.getbands()) for plane in planes)


def _fitted(planes: list[Any], resolution: int, centering: tuple[float, float]) -> torch.Tensor:
    """The largest square at `centering`, resized (bicubic, antialiased), uint8 (C, H, W)."""
    from PIL import Image, ImageOps

    size = (resolution, resolution)
    if planes[0].size != size:
        planes = [ImageOps.fit(plane, size, method=Image.Resampling.BICUBIC, centering=centering) for plane in planes]
    levels = np.concatenate([np.atleast_3d(np.asarray(plane)) for plane in planes], axis=2)  # (H, W, C)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(levels, 2, 0)))


# -- many rows: random access and streams -----------------------------------------------------------------------------


@dataclass(eq=False)
class ImageRows(Dataset):
    """Chosen rows of a `datasets` table; `rows[i]` decodes one, and its "row" is the number in the stored split."""

    table: Any
    reader: _RowReader
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
    reader: _RowReader
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
                    f"cannot read row {number} of split {self.reader.split!r} from the stream: {_cause(error)}"
                ) from error
            yield number, row


Images = ImageRows | ImageStream


@dataclass
class ImageData:
    """A data set ready for training.

    Args:
        name: For cards and logs; of a folder its last part.
        hub_id: Name on the Hub, None if it did not come from there.
        train: `ImageRows`, or `ImageStream` when streaming.
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


# -- opening a data set -----------------------------------------------------------------------------------------------


def load_data(config: DataConfig) -> ImageData:
    """Open a data set and find out its columns, labels, channels and size; no row but the first is decoded.

    Args:
        config: What to load. `streaming` reads rows in sequence and stores none, so it needs a validation split
            (or `holdout=0`) and labels that are a `ClassLabel`.

    Raises:
        DataError: If there is no such data set, split or column, no row, a label that training does not know, or a
            first image from which the size cannot be taken.
    """
    folder = None if config.dataset == "digits" else _folder(config.dataset)
    tables = _open_tables(config, folder)
    table = _split(tables, config.train_split, config)
    columns = _find_columns(table.features, config)
    label_names = _label_names(table, columns.label, config)
    channels, size = _first_image(_prepared(table, columns), columns, config)
    reader = _RowReader(
        split=config.train_split,
        columns=columns,
        channels=config.channels or channels,
        resolution=config.resolution or size,
        may_resize=config.resolution is not None,
        may_lose_colour=config.channels is not None,
        label_names=label_names,
        label_ids={name: label_id for label_id, name in enumerate(label_names.values())},
    )
    train = _images(table, reader, config)
    validation = _validation(tables, reader, config)
    if isinstance(train, ImageRows) and not isinstance(validation, ImageStream):
        if validation is None and config.holdout > 0.0:
            train, validation = _held_out(train, config)
        if config.max_train_samples is not None:
            train = train.chosen(_fixed_choice(len(train), config.max_train_samples))
        if config.dataset == "digits":
            train, validation = train.in_memory(), validation.in_memory() if validation else None
    return ImageData(
        name=config.dataset if folder is None else folder.resolve().name,
        hub_id=None if config.dataset == "digits" or folder is not None else config.dataset,
        train=train,
        validation=validation,
        channels=reader.channels,
        resolution=reader.resolution,
        id2label=None if columns.label is None else dict(enumerate(label_names.values())),
    )


def _folder(dataset: str) -> Path | None:
    """The folder that `dataset` names, None if it can only be a name on the Hub."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        if not any(path.iterdir()):
            raise DataError(f"the folder {dataset!r} is empty")
        return path
    if path.is_file():
        raise DataError(f"{dataset!r} is a file: give the folder that holds it")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", dataset):
        raise DataError(f"the folder {dataset!r} does not exist")
    return None


def _open_tables(config: DataConfig, folder: Path | None) -> dict[str, Any]:
    """All splits by name, as tables or streams of the `datasets` library."""
    if config.dataset == "digits":
        if config.streaming:
            raise DataError("the digits are embedded and cannot be streamed: leave --streaming out")
        return _digits_tables()
    try:
        if folder is not None and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return _saved_tables(folder, config.streaming)
        return _built_tables(str(folder or config.dataset), config)
    except DataError:
        raise
    except Exception as error:
        hint = "" if folder else "; offline, --dataset takes a folder or 'digits'"
        raise DataError(f"cannot open the data set {config.dataset!r}: {_cause(error)}{hint}") from error


def _saved_tables(folder: Path, streaming: bool) -> dict[str, Any]:
    """What `save_to_disk` wrote; a single table is the split "train"."""
    import datasets

    for state in sorted(folder.rglob("state.json")):
        if not any(state.parent.glob("*.arrow")):  # the library fails on it with an IndexError
            raise DataError(f"the saved table {str(state.parent)!r} has 0 rows")
    saved: Any = datasets.load_from_disk(str(folder))
    tables = {"train": saved} if isinstance(saved, datasets.Dataset) else dict(saved)
    return {name: table.to_iterable_dataset() if streaming else table for name, table in tables.items()}


def _built_tables(source: str, config: DataConfig) -> dict[str, Any]:
    """What `load_dataset` would give, with the splits that have no rows, on which it fails."""
    import datasets

    builder: Any = datasets.load_dataset_builder(source, config.dataset_config)
    if config.streaming:
        return dict(builder.as_streaming_dataset())
    builder.download_and_prepare()
    return {
        name: builder.as_dataset(split=name) if split.num_examples else datasets.Dataset.from_dict({})
        for name, split in builder.info.splits.items()
    }


def _cause(error: BaseException) -> str:
    """The reason: the library wraps it in "an error occurred"."""
    from datasets.exceptions import DatasetGenerationError

    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _split(tables: dict[str, Any], name: str, config: DataConfig) -> Any:
    if name not in tables:
        raise DataError(f"{config.dataset!r} has no split {name!r}; it has {', '.join(tables)}")
    if not config.streaming and len(tables[name]) == 0:
        raise DataError(f"the split {name!r} of {config.dataset!r} has 0 rows")
    if tables[name].features is None:
        raise DataError(f"the stream {config.dataset!r} does not declare its columns: load it without --streaming")
    return tables[name]


def _find_columns(features: Any, config: DataConfig) -> _Columns:
    label = None if config.label_column == "none" else config.label_column
    _require_columns(features, (config.image_column, label, config.caption_column), repr(config.dataset))
    if config.label_column is None:
        label = _label_column(features, config)
    return _Columns(_image_column(features, config), label, config.caption_column)


def _require_columns(features: Any, columns: Iterable[str | None], where: str) -> None:
    for column in columns:
        if column is not None and column not in features:
            raise DataError(f"there is no column {column!r} in {where}; its columns are {', '.join(features)}")


def _image_column(features: Any, config: DataConfig) -> str:
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    arrays = [name for name, feature in features.items() if _is_array(feature)]
    if config.image_column is None:
        candidates = images or arrays
        if len(candidates) == 1:
            return candidates[0]
        raise DataError(
            f"{config.dataset!r} has {len(candidates)} columns of images among its columns {', '.join(features)}: "
            "choose one with --image_column"
        )
    if config.image_column in images + arrays:
        return config.image_column
    raise DataError(
        f"column {config.image_column!r} of {config.dataset!r} holds {features[config.image_column]}, "
        "neither images nor arrays of numbers"
    )


def _is_array(feature: Any) -> bool:
    """Whether the values are arrays of 2 or 3 dimensions."""
    import datasets

    dimensions = 0
    while isinstance(feature, (datasets.List, datasets.LargeList)):
        feature, dimensions = feature.feature, dimensions + 1
    nested = dimensions in (2, 3) and isinstance(feature, datasets.Value)
    return nested or isinstance(feature, (datasets.Array2D, datasets.Array3D))


def _label_column(features: Any, config: DataConfig) -> str | None:
    import datasets

    if "label" in features:
        return "label"
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(classes) > 1:
        raise DataError(
            f"{config.dataset!r} has several columns of classes, {', '.join(classes)}: "
            "choose one with --label_column, or none"
        )
    return classes[0] if classes else None


def _label_names(table: Any, column: str | None, config: DataConfig) -> dict[Any, str]:
    """The name of each stored label value, in the order of the ids: classes by number, other values sorted."""
    import datasets

    if column is None:
        return {}
    feature = table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return dict(enumerate(feature.names))
    kind = feature.dtype if isinstance(feature, datasets.Value) else ""
    if not re.fullmatch(r"u?int\d+|(large_)?string|bool", kind):
        raise DataError(
            f"label column {column!r} of {config.dataset!r} holds {feature}, not classes: "
            "choose another with --label_column, or none"
        )
    if config.streaming:
        raise DataError(
            f"label column {column!r} of the stream {config.dataset!r} holds {feature} and not a ClassLabel, so its "
            "values are unknown before the last row: set --label_column none, or load it without --streaming"
        )
    return {value: str(value) for value in sorted(value for value in table.unique(column) if value is not None)}


def _prepared(table: Any, columns: _Columns) -> Any:
    """Only the columns that are used, images as undecoded bytes or paths, arrays as NumPy arrays."""
    import datasets

    table = table.select_columns(list(dict.fromkeys(filter(None, columns))))
    if isinstance(table.features[columns.image], datasets.Image):
        return table.cast_column(columns.image, datasets.Image(decode=False))
    if isinstance(table, datasets.Dataset):
        return table.with_format("numpy", columns=[columns.image], output_all_columns=True)
    return table


def _first_image(table: Any, columns: _Columns, config: DataConfig) -> tuple[int, int]:
    """(channels, size) of the first training image, which must be square if no resolution is given."""
    try:
        stored = next(iter(table))[columns.image]
    except StopIteration:
        raise DataError(f"the split {config.train_split!r} of {config.dataset!r} has 0 rows") from None
    except Exception as error:
        raise DataError(f"cannot read the first row of {config.dataset!r}: {_cause(error)}") from error
    with _naming_the_image(0, config.train_split, columns.image, stored):
        planes = _planes(stored)
        width, height = planes[0].size
        if config.resolution is None and width != height:
            raise ValueError(f"it is {width}x{height} (width x height), not square: set --resolution")
    return _channels(planes), height


def _images(table: Any, reader: _RowReader, config: DataConfig) -> Images:
    """A split with its labels checked, or of a stream as far as it may be read."""
    table = _prepared(table, reader.columns)
    if config.streaming:
        if reader.split != config.train_split:
            return ImageStream(table, reader, shuffle_buffer=1)
        limited = table if config.max_train_samples is None else table.take(config.max_train_samples)
        return ImageStream(limited, reader, config.shuffle_buffer)
    label = reader.columns.label
    for value in [] if label is None else table.unique(label):
        if reader.label_names.get(value) not in reader.label_ids:  # found now, not in the middle of a run
            reader.label_id(list(table[label]).index(value), value)
    return ImageRows(table, reader, np.arange(len(table)))


def _validation(tables: dict[str, Any], train_reader: _RowReader, config: DataConfig) -> Images | None:
    """The validation split, its label values matched to the training ids by name; None if there is none."""
    own = [name for name in ("validation", "test") if name in tables and name != config.train_split]
    split = config.validation_split or next(iter(own), None)
    if split is not None:
        table = _split(tables, split, config)
        _require_columns(table.features, train_reader.columns, f"split {split!r} of {config.dataset!r}")
        names = _label_names(table, train_reader.columns.label, config)
        return _images(table, replace(train_reader, split=split, label_names=names), config)
    if config.streaming and config.holdout > 0.0:
        raise DataError(
            f"the stream {config.dataset!r} has no split to validate on (it has {', '.join(tables)}), and rows of a "
            "stream cannot be held out: set --validation_split, or --holdout 0 to train without validation"
        )
    return None


def _held_out(rows: ImageRows, config: DataConfig) -> tuple[ImageRows, ImageRows]:
    held = _fixed_choice(len(rows), max(1, round(config.holdout * len(rows))))
    if len(held) == len(rows):
        raise DataError(
            f"holdout={config.holdout} leaves none of the {len(rows)} rows of {config.dataset!r} to train on"
        )
    return rows.chosen(np.setdiff1d(np.arange(len(rows)), held)), rows.chosen(held)


def _fixed_choice(length: int, size: int) -> np.ndarray:
    """At most `size` of the indices below `length`, in order.

    A random choice, because rows are often stored by class; the same for every seed, so that runs are comparable.
    """
    return np.sort(PositionalRandomness(0).permutation("fixed choice of rows", 0, length).numpy()[:size])


# -- the order of training --------------------------------------------------------------------------------------------


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
        "images": to_model_space(images),
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

    rows: ImageRows
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


# -- loaders ----------------------------------------------------------------------------------------------------------


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
        Iterator of dicts: images float32 (b, C, H, W) in [-1, 1], labels int64 (b,) unless unconditional, captions
        list[str] if asked for, positions int64 (b,) and first_position of this contiguous block, and rows int64 (b,),
        the numbers of the rows in the stored split.

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
        rows = rows.chosen(_fixed_choice(len(rows), max_samples))
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
