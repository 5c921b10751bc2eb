"""Images, labels and captions for every training script, in an order that is a function of (seed, position).

    config.py     which data set                     loading.py    opens it and finds its columns
    digits.py     the embedded one                   rows.py       its rows, with random access or as a stream
    toys.py       laws of the plane, drawn         binarization.py    black and white ones of grey ones
    images.py     one row as an image                batches.py    which rows a process sees in which step

Rows are decoded when they are needed, in the workers of the loader; only the digits are held in memory as a whole.
"""

from annealers.data.batches import PositionBatches, train_batches, validation_batches
from annealers.data.binarization import Binarization, binarize, binarized_batch
from annealers.data.config import DataConfig, DataError
from annealers.data.digits import DigitsSplit, load_digits_split
from annealers.data.images import to_images, to_model_space
from annealers.data.loading import load_data
from annealers.data.rows import ImageData, ImageRows, ImageStream, PointRows
from annealers.data.toys import TOYS, toy_law

__all__ = [
    "TOYS",
    "Binarization",
    "DataConfig",
    "DataError",
    "DigitsSplit",
    "ImageData",
    "ImageRows",
    "ImageStream",
    "PointRows",
    "PositionBatches",
    "binarize",
    "binarized_batch",
    "load_data",
    "load_digits_split",
    "to_images",
    "to_model_space",
    "toy_law",
    "train_batches",
    "validation_batches",
]
