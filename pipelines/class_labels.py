"""Class labels as the pipelines take them, and the batch size that they and other arguments agree on."""

import operator
from collections.abc import Mapping, Sequence

import numpy as np
import torch

ClassLabels = int | str | Sequence[int | str] | torch.Tensor | np.ndarray


def integer_names(id2label: Mapping[int, str] | Mapping[str, str] | None, num_classes: int | None) -> dict | None:
    """The name of each class id; JSON has made every id a string.

    Raises:
        ValueError: If a name is of no class of the network, which has `num_classes`, None being none.
    """
    if id2label is None:
        return None
    names = with_integer_ids(id2label)
    if not all(0 <= label < (num_classes or 0) for label in names):
        raise ValueError(f"id2label names the classes {sorted(names)}, but the network has {num_classes or 0}")
    return names


def with_integer_ids(id2label: Mapping[int, str] | Mapping[str, str]) -> dict[int, str]:
    """JSON makes every key a string."""
    return {int(label): name for label, name in id2label.items()}


def label_ids(
    class_labels: ClassLabels,
    id2label: dict[int, str] | None,
    num_classes: int | None,
    null_label: int | None = None,
    whose: str = "network",
) -> list[int]:
    """Class ids of one or several labels, each an id or a name.

    Args:
        class_labels: As given.
        id2label: Name of each class id.
        num_classes: Number of ids; None of a network without classes.
        null_label: The id that stands for no class, which cannot be asked for.
        whose: What has these classes, for the message of an error.

    Raises:
        ValueError: If there are no classes, or a label is not one of them.
    """
    if num_classes is None:
        raise ValueError(f"got class_labels={class_labels!r}, but the {whose} has no classes (num_class_embeds=None)")
    if isinstance(class_labels, (torch.Tensor, np.ndarray)):
        class_labels = class_labels.tolist()
    if isinstance(class_labels, str) or not isinstance(class_labels, Sequence):
        class_labels = [class_labels]
    ids = [_label_id(label, id2label or {}) for label in class_labels]
    for label in ids:
        if label == null_label:
            raise ValueError(f"class label {label} is the null label: leave class_labels out, or set guidance_scale=0")
        if not 0 <= label < num_classes:
            classes = num_classes - (null_label is not None)
            raise ValueError(f"class label {label} is not one of the {classes} classes of the {whose}")
    return ids


def label_tensor(
    class_labels: ClassLabels | None,
    id2label: dict[int, str] | None,
    num_classes: int | None,
    batch_size: int,
    device: torch.device | str,
) -> torch.Tensor | None:
    """Class ids (B,) of one label for all or one each; None of a network without classes if there are no labels.

    Raises:
        ValueError: As `label_ids`, or if a network with classes is given no label.
    """
    if class_labels is None:
        if num_classes is not None:
            raise ValueError(f"the network has {num_classes} classes: say which to draw, class_labels=")
        return None
    return torch.tensor(label_ids(class_labels, id2label, num_classes), device=device).reshape(-1).expand(batch_size)


def common_batch_size(
    class_labels: ClassLabels | None = None, batch_size: int | None = None, **lengths: int | None
) -> int:
    """B, which every argument that has a length must agree on; 1 if none has.

    Args:
        class_labels: As given; one label for all has no length.
        batch_size: As given.
        **lengths: The length that each other argument has, or None.

    Raises:
        ValueError: If they disagree, or one is not positive.
    """
    of_labels = None if is_single(class_labels) else len(class_labels)
    stated = {"batch_size": batch_size, "class_labels": of_labels, **lengths}
    stated = {name: size for name, size in stated.items() if size is not None}
    if len(set(stated.values())) > 1 or not all(size > 0 for size in stated.values()):
        raise ValueError(f"need one positive batch size, got {stated}")
    return next(iter(stated.values()), 1)


def is_single(class_labels: ClassLabels | None) -> bool:
    """Whether one label, or none, stands for the whole batch."""
    if isinstance(class_labels, (torch.Tensor, np.ndarray)):
        return class_labels.ndim == 0
    return isinstance(class_labels, str) or not isinstance(class_labels, Sequence)


def _label_id(label: int | str, id2label: dict[int, str]) -> int:
    if isinstance(label, str):
        ids = [i for i, name in id2label.items() if name == label]
        if len(ids) != 1:
            problem = f"stands for the classes {ids}" if ids else f"is not one of {list(id2label.values())}"
            raise ValueError(f"class label {label!r} {problem}")
        return ids[0]
    try:
        return operator.index(label)
    except TypeError as error:
        raise ValueError(f"a class label is an integer or a name, got {label!r}") from error
