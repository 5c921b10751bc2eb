"""Which data set to train on, and the one kind of error that is made of it."""

from dataclasses import dataclass, field
from typing import Any, Literal


class DataError(ValueError):
    """The data or its description is wrong; the message is one sentence for the person who started the run."""


class Help(str):
    """The help text of an option, which also says of what: parsers take a field's metadata for their own arguments."""

    of: tuple[Any, ...]


def option(default: Any, description: str, of: str | tuple[Any, ...] = ()) -> Any:
    """A field with its help text.

    Args:
        default, description: Of the option.
        of: What it is an option of, and without what it would do nothing: another option that has to be set, or
            another's name and the values of it that make use of this one. `RunConfig` refuses it otherwise.
    """
    text = Help(description)
    text.of = (of,) if isinstance(of, str) else of
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class DataConfig:
    """Which data set, which of its columns, and how its images are prepared."""

    dataset: str = option(
        "digits",
        "'digits' (8x8, embedded), 'toy:ring' (or another toy of the plane), a name on the Hub, or a folder (parquet, "
        "arrow, images).",
    )
    dataset_config: str | None = option(None, "Configuration of a data set on the Hub.")
    train_split: str = option("train", "Split to train on.")
    validation_split: str | None = option(None, "Unset: 'validation' or 'test', else rows held out of training.")
    holdout: float = option(0.05, "Share of the rows held out if there is no validation split; 0: no validation.")
    image_column: str | None = option(None, "Unset: the only column of images.")
    label_column: str | None = option(None, "Unset: 'label' or the only column of classes; 'none': unconditional.")
    caption_column: str | None = option(None, "Unset: no captions.")
    resolution: int | None = option(None, "Side of the square images; unset: that of the data, which must agree.")
    channels: int | None = option(None, "Channels of the images; unset: those of the first image.")
    crop: Literal["center", "random"] = option("center", "Which square of a longer training image to take.")
    flip: bool = option(False, "Mirror half of the training images, at random.")
    streaming: bool = option(False, "Read the rows in sequence and store none.")
    shuffle_buffer: int = option(1000, "Rows that are shuffled at a time in streaming; 1: the stream's own order.")
    num_workers: int = option(0, "Worker processes that decode; in streaming, threads of one worker process.")
    max_train_samples: int | None = option(None, "Train on that many rows: a fixed choice; of a stream the first.")

    def __post_init__(self) -> None:
        if not 0.0 <= self.holdout < 1.0:
            raise DataError(f"need 0 <= holdout < 1, got {self.holdout}")
        for name in ("resolution", "channels", "shuffle_buffer", "max_train_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"need {name} >= 1, got {value}")
        if self.num_workers < 0:
            raise DataError(f"need num_workers >= 0, got {self.num_workers}")


def cause_of(error: BaseException) -> str:
    """The reason: the library wraps it in "an error occurred"."""
    from datasets.exceptions import DatasetGenerationError

    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
