"""Black-and-white images of grey ones: each pixel is white with a probability that is its brightness.

    static     one draw for each row of the data, the same in every epoch, run and split of positions
    dynamic    a new draw whenever an image is seen

Source: Salakhutdinov & Murray 2008, "On the Quantitative Analysis of Deep Belief Networks",
doi:10.1145/1390156.1390266 (dynamic). The static MNIST of the literature is one fixed draw; ours is another one of the
same law, so numbers compare up to that draw.
"""

from typing import Any, Literal

import torch

from annealers.randomness import PositionalRandomness

Binarization = Literal["none", "static", "dynamic"]
STATIC_SEED = 0  # one for all runs, or it would not be static


def binarize(images: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """-1 or 1: white where u < (x + 1) / 2, with u uniform on [0, 1) of the shape of the images, in [-1, 1]."""
    dtype = torch.promote_types(images.dtype, torch.float32)
    below_one = 1 - torch.finfo(dtype).eps / 2
    u = uniform.to(images.device, dtype).clamp(max=below_one)  # what rounds to 1 would make a white pixel black
    return torch.where(u < (images.to(dtype) + 1) / 2, 1.0, -1.0).to(images)


def binarized_batch(
    batch: dict[str, Any], kind: Binarization, randomness: PositionalRandomness, split: str = "train"
) -> torch.Tensor:
    """The images of a batch, binarised as a function of (row), if static, or of (seed, position).

    Args:
        batch: Of `train_batches` or `validation_batches`.
        kind: "none" leaves them as they are.
        randomness: Of the run; not used if static.
        split: Name of the split, so that its draws are its own; validation has the same draws each time.
    """
    images = batch["images"]
    shape = tuple(images.shape[1:])
    if kind == "none":
        return images
    if kind == "static":
        fixed, name = PositionalRandomness(STATIC_SEED), f"static binarisation of {split}"
        uniform = torch.cat([fixed.uniform(name, row, 1, shape) for row in batch["rows"].tolist()])
    else:
        uniform = randomness.uniform(f"binarisation of {split}", batch["first_position"], len(images), shape)
    return binarize(images, uniform)
