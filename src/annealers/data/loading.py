"""Opens a data set, digits, a toy, a folder or a name on the Hub; finds and checks its columns before training."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from annealers.data.config import DataConfig, DataError, cause_of
from annealers.data.digits import digits_tables
from annealers.data.images import Columns, RowReader, channel_count, image_planes, naming_the_image
from annealers.data.rows import ImageData, ImageRows, ImageStream, fixed_choice
from annealers.data.toys import TOY, load_toy


def load_data(config: DataConfig) -> ImageData:
    """Open a data set and find out its columns, labels, channels and size; no row but the first is decoded.

    Args:
        config: What to load. `streaming` reads rows in sequence and stores none, so it needs a validation split
            (or `holdout=0`) and labels that are a `ClassLabel`.

    Raises:
        DataError: If there is no such data set, split or column, no row, a label that training does not know, or a
            first image from which the size cannot be taken.
    """
    if config.dataset.startswith(TOY):
        return load_toy(config)
    folder = None if config.dataset == "digits" else _folder(config.dataset)
    tables = _open_tables(config, folder)
    table = _split(tables, config.train_split, config)
    columns = _find_columns(table.features, config)
    label_names = _label_names(table, columns.label, config)
    channels, size = _first_image(_prepared(table, columns), columns, config)
    reader = RowReader(
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
            train = train.chosen(fixed_choice(len(train), config.max_train_samples))
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
        return digits_tables()
    try:
        if folder is not None and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return _saved_tables(folder, config.streaming)
        return _built_tables(str(folder or config.dataset), config)
    except DataError:
        raise
    except Exception as error:
        hint = "" if folder else "; offline, --dataset takes a folder, 'digits' or a toy"
        raise DataError(f"cannot open the data set {config.dataset!r}: {cause_of(error)}{hint}") from error


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


def _split(tables: dict[str, Any], name: str, config: DataConfig) -> Any:
    if name not in tables:
        raise DataError(f"{config.dataset!r} has no split {name!r}; it has {', '.join(tables)}")
    if not config.streaming and len(tables[name]) == 0:
        raise DataError(f"the split {name!r} of {config.dataset!r} has 0 rows")
    if tables[name].features is None:
        raise DataError(f"the stream {config.dataset!r} does not declare its columns: load it without --streaming")
    return tables[name]


def _find_columns(features: Any, config: DataConfig) -> Columns:
    label = None if config.label_column == "none" else config.label_column
    _require_columns(features, (config.image_column, label, config.caption_column), repr(config.dataset))
    if config.label_column is None:
        label = _label_column(features, config)
    return Columns(_image_column(features, config), label, config.caption_column)


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


def _prepared(table: Any, columns: Columns) -> Any:
    """Only the columns that are used, images as undecoded bytes or paths, arrays as NumPy arrays."""
    import datasets

    table = table.select_columns(list(dict.fromkeys(filter(None, columns))))
    if isinstance(table.features[columns.image], datasets.Image):
        return table.cast_column(columns.image, datasets.Image(decode=False))
    if isinstance(table, datasets.Dataset):
        return table.with_format("numpy", columns=[columns.image], output_all_columns=True)
    return table


def _first_image(table: Any, columns: Columns, config: DataConfig) -> tuple[int, int]:
    """(channels, size) of the first training image, which must be square if no resolution is given."""
    try:
        stored = next(iter(table))[columns.image]
    except StopIteration:
        raise DataError(f"the split {config.train_split!r} of {config.dataset!r} has 0 rows") from None
    except Exception as error:
        raise DataError(f"cannot read the first row of {config.dataset!r}: {cause_of(error)}") from error
    with naming_the_image(0, config.train_split, columns.image, stored):
        planes = image_planes(stored)
        width, height = planes[0].size
        if config.resolution is None and width != height:
            raise ValueError(f"it is {width}x{height} (width x height), not square: set --resolution")
    return channel_count(planes), height


def _images(table: Any, reader: RowReader, config: DataConfig) -> ImageRows | ImageStream:
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


def _validation(tables: dict[str, Any], train_reader: RowReader, config: DataConfig) -> ImageRows | ImageStream | None:
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
    held = fixed_choice(len(rows), max(1, round(config.holdout * len(rows))))
    if len(held) == len(rows):
        raise DataError(
            f"holdout={config.holdout} leaves none of the {len(rows)} rows of {config.dataset!r} to train on"
        )
    return rows.chosen(np.setdiff1d(np.arange(len(rows)), held)), rows.chosen(held)
