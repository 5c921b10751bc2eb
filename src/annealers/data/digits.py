"""The embedded data set: handwritten digits, offline."""

from typing import Any, NamedTuple

import numpy as np
import torch


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


def digits_tables() -> dict[str, Any]:
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
