r"""Laws of the plane whose score is known exactly, as data sets: `--dataset toy:ring`.

Each is a mixture of Gaussians, so that what a network has learnt can be compared with the truth at any noise level. A
point of the plane is an image of one pixel with two channels, (2, 1, 1), and its values are floats as they are drawn:
nothing is rounded to 8 bits or scaled to [-1, 1].

    two_modes    weights 0.8 and 0.2 at (5, 5) and (-5, -5), unit covariance    Song & Ermon 2019, Sec. 3.2.2
    ring         eight Gaussians of deviation 0.1 on a circle of radius sqrt 2
    grid         twenty-five Gaussians of deviation 0.05 on a 5 x 5 grid, 0.7 apart
    moons        two half circles that reach into each other, 32 Gaussians of deviation 0.08 on each
    spiral       one and a half turns of r proportional to the angle, 64 Gaussians of deviation 0.08

The coordinates of all but the first have mean 0 and variance 1, roughly, as beta schedules want them. Those of the
first have mean 3 and variance 17, so a ladder for it has to reach higher, see `noise_ladder.suggest_sigma_max`. The
centres on a curve lie less than two deviations apart, which makes it smooth.

Source of the first: Song & Ermon 2019, "Generative Modeling by Estimating Gradients of the Data Distribution",
arXiv:1907.05600.
"""

import math
from collections.abc import Callable

import torch

from annealers.data.config import DataConfig, DataError
from annealers.data.rows import ImageData, PointRows, fixed_choice
from annealers.exact import GaussianMixture

TOY = "toy:"  # prefix of the names
TRAIN_POINTS, VALIDATION_POINTS = 20_000, 2_000
UNUSED_OPTIONS = (  # those of DataConfig that say something about images or stored tables
    "dataset_config",
    "train_split",
    "validation_split",
    "image_column",
    "label_column",
    "caption_column",
    "resolution",
    "channels",
    "crop",
    "flip",
    "streaming",
)


def two_modes() -> GaussianMixture:
    """Two far modes of unequal weight, Song & Ermon 2019."""
    return _mixture([0.8, 0.2], [[5.0, 5.0], [-5.0, -5.0]], deviation=1.0)


def ring() -> GaussianMixture:
    """Eight Gaussians on a circle."""
    angles = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
    return _mixture(torch.ones(8), math.sqrt(2) * _directions(angles), deviation=0.1)


def grid() -> GaussianMixture:
    """Twenty-five Gaussians on a square grid."""
    marks = 0.7 * torch.arange(-2, 3, dtype=torch.float64)
    return _mixture(torch.ones(25), torch.cartesian_prod(marks, marks), deviation=0.05)


def moons() -> GaussianMixture:
    """Two half circles, the second turned round and shifted so that each ends inside the other."""
    angles = torch.linspace(0, math.pi, 32, dtype=torch.float64)
    upper = _directions(angles)
    lower = torch.tensor([1.0, 0.5], dtype=torch.float64) - upper
    arcs = torch.cat([upper, lower]) - torch.tensor([0.5, 0.25], dtype=torch.float64)  # centred
    return _mixture(torch.ones(64), 1.5 * arcs, deviation=0.08)


def spiral() -> GaussianMixture:
    """One and a half turns of Archimedes' spiral, with centres evenly along it."""
    angles = 3 * math.pi * torch.linspace(0.05, 1, 64, dtype=torch.float64).sqrt()  # the length grows as the square
    return _mixture(torch.ones(64), 2.0 * (angles / angles.max())[:, None] * _directions(angles), deviation=0.08)


TOYS: dict[str, Callable[[], GaussianMixture]] = {
    "two_modes": two_modes,
    "ring": ring,
    "grid": grid,
    "moons": moons,
    "spiral": spiral,
}


def toy_law(dataset: str) -> GaussianMixture | None:
    """The law that a `dataset` such as "toy:ring" names, with events (2, 1, 1); None if it names no toy.

    Raises:
        DataError: If there is no such toy.
    """
    return _law(dataset) if dataset.startswith(TOY) else None


def _law(dataset: str) -> GaussianMixture:
    name = dataset.removeprefix(TOY)
    if name not in TOYS:
        raise DataError(f"there is no toy {name!r}; there are {', '.join(TOY + name for name in TOYS)}")
    return TOYS[name]()


def load_toy(config: DataConfig) -> ImageData:
    """The points of a toy, always the same: 20,000 to train on and 2,000 to validate on, without labels.

    Raises:
        DataError: If there is no such toy, or an option is set that makes sense for images only.
    """
    law = _law(config.dataset)
    defaults = DataConfig()
    for name in UNUSED_OPTIONS:
        value = getattr(config, name)
        if value != getattr(defaults, name) and (name, value) != ("label_column", "none"):
            raise DataError(f"{config.dataset} is drawn and not stored: leave --{name} out, got {value!r}")
    points = law.sample(TRAIN_POINTS + VALIDATION_POINTS, generator=torch.Generator().manual_seed(0)).float()
    train, validation = (PointRows.of(split) for split in points.split([TRAIN_POINTS, VALIDATION_POINTS]))
    if config.max_train_samples is not None:
        train = train.chosen(fixed_choice(len(train), config.max_train_samples))
    return ImageData(
        name=config.dataset,
        hub_id=None,
        train=train,
        validation=validation,
        channels=2,
        resolution=1,
        id2label=None,
    )


def _mixture(weights: torch.Tensor | list, means: torch.Tensor | list, deviation: float) -> GaussianMixture:
    """A mixture of isotropic Gaussians at `means`, (K, 2), as a law of events (2, 1, 1) of float32."""
    means = torch.as_tensor(means, dtype=torch.float32).reshape(-1, 2, 1, 1)
    return GaussianMixture(weights, means, torch.full((len(means),), deviation**2, dtype=torch.float64))


def _directions(angles: torch.Tensor) -> torch.Tensor:
    """(cos, sin) of each angle, (K, 2)."""
    return torch.stack([angles.cos(), angles.sin()], dim=-1)
