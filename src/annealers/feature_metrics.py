r"""Distances between sets of images in the features of a network, and how diverse a set is.

Features are any function of images in [-1, 1], (B, C, H, W) -> (B, D): the pixels, a classifier of this library, or
any other network, so that quality can be measured on data for which ImageNet's features mean little. Numbers in
different features cannot be compared; what is published as FID and KID is in the features of one Inception network.

With the cubic kernel k(x, y) = (x . y / D + 1)^3, the kernel distance is the unbiased estimate of the squared maximum
mean discrepancy between the laws of x and y (Gretton et al., Lemma 6; Binkowski et al., Sec. 4, "KID"),

    d = sum_{i != j} k(x_i, x_j) / (m (m - 1)) + sum_{i != j} k(y_i, y_j) / (n (n - 1))
        - 2 sum_{i, j} k(x_i, y_j) / (m n).

Its mean is the same for any number of samples, where that of the Fréchet distance (`annealers.metrics`) falls with it.
Around zero it is therefore of either sign. The whole sets are used, where Binkowski et al. average over small subsets:
the mean is the same and the variance smaller.

Diversity is the mean squared distance of two different samples as a multiple of that of real images. It takes no
pairs: over all pairs of N rows with the unbiased covariance C,

    1/(N (N - 1)) sum_{i, j} |x_i - x_j|^2 = 2 tr C.

    symbol    code              shape
    x, y      a, b              (m, D), (n, D)   features of the two sets
    D                           number of features

Sources: Binkowski, Sutherland, Arbel & Gretton 2018, "Demystifying MMD GANs", arXiv:1801.01401; Gretton, Borgwardt,
Rasch, Schölkopf & Smola 2012, "A Kernel Two-Sample Test", Journal of Machine Learning Research 13.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.utils.logging import tqdm

from annealers.models.noisy_classifier import NoisyClassifierModel

Features = Callable[[torch.Tensor], torch.Tensor]
"""Images in [-1, 1], (B, C, H, W) -> features, (B, D), in which an image's row does not depend on the others."""

COLLAPSED = 0.5
"""Diversity below which a generator is said to have collapsed.

Copies of m independent real images have an expected diversity of 1 - 1/m, whatever the features: half is that of two
images. Samples of a generator that works are above .8, and the estimate from n samples with D' independent features of
equal scale errs by about sqrt(2 / ((n - 1) D')): .15 for ten samples and ten features.
"""

BLOCK = 512  # rows of a and of b in one block of the kernel: 2 MiB in float64, which stay in the cache


def pixel_features(images: torch.Tensor) -> torch.Tensor:
    """The pixels themselves, (B, C, H, W) -> (B, C H W)."""
    return images.flatten(1)


def classifier_features(classifier: NoisyClassifierModel) -> Features:
    """What the last linear layer of a classifier reads of images without noise, (B, block_out_channels[-1]).

    It is the pooled output of the middle block at timestep 0, after the last normalisation and activation. The
    classifier is frozen and put into evaluation mode. Autocast is off, so that mixed precision does not move the
    numbers; the features are on the classifier's device, in float32.

    Example:
        >>> import torch
        >>> from annealers import NoisyClassifierModel
        >>> from annealers.feature_metrics import classifier_features
        >>> features = classifier_features(NoisyClassifierModel(sample_size=8, in_channels=1))
        >>> features(torch.rand(3, 1, 8, 8) * 2 - 1).shape
        torch.Size([3, 64])
    """
    classifier.requires_grad_(False).eval()

    def features(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(classifier.device.type, enabled=False):
            return classifier.features(images.to(classifier.device, classifier.dtype), 0).float()

    return features


@torch.no_grad()
def features_of(
    images: torch.Tensor, features: Features, batch_size: int = 256, progress: bool = False
) -> torch.Tensor:
    """Features of many images, a batch at a time.

    Args:
        images: (N, C, H, W) in [-1, 1], N >= 1.
        features: Which.
        batch_size: Images per call.
        progress: Show a bar.

    Returns:
        (N, D), float32, on the CPU.

    Raises:
        ValueError: If there is no image, or `features` does not return one row for each.

    Example:
        >>> import torch
        >>> from annealers.feature_metrics import features_of, kernel_distance, pixel_features
        >>> images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        >>> rows = features_of(images, pixel_features)
        >>> rows.shape, round(kernel_distance(rows[:10], rows[10:] + 1), 1)
        (torch.Size([20, 64]), 7.0)
    """
    if len(images) < 1 or batch_size < 1:
        raise ValueError(f"need images and batch_size >= 1, got {len(images)} images and batch_size {batch_size}")
    rows = []
    for batch in tqdm(images.split(batch_size), desc="features", disable=not progress):
        row = features(batch)
        if row.ndim != 2 or len(row) != len(batch):
            raise ValueError(f"features must be ({len(batch)}, D) for {len(batch)} images, got {tuple(row.shape)}")
        rows.append(row.float().cpu())
    return torch.cat(rows)


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of two sets of features, by the cubic kernel, in float64.

    Args:
        a: (m, D), at least two rows.
        b: (n, D), at least two rows.

    Raises:
        ValueError: If a shape does not fit, a set has fewer than two rows, or a feature is not finite.
    """
    _check_sets(a, b, ("a", "b"))
    a, b = a.double(), b.double()
    within = sum(_kernel_sum(x, x, diagonal=False) / (len(x) * (len(x) - 1)) for x in (a, b))
    return within - 2 * _kernel_sum(a, b) / (len(a) * len(b))


def diversity(samples: torch.Tensor, real: torch.Tensor) -> float:
    """Mean squared distance of two different samples over that of two real images; 1 for samples of the real law.

    The measure looks at the spread alone. It says when a generator draws always the same (see `COLLAPSED`), not when
    it draws what is wrong, nor when a few of many modes are missing.

    Args:
        samples: Features, (N, D), at least two rows.
        real: Features, (M, D), at least two rows.

    Raises:
        ValueError: If a shape does not fit, a set has fewer than two rows, a feature is not finite, or the real
            images are all the same.
    """
    _check_sets(samples, real, ("samples", "real"))
    spread = _variance(real)
    if spread == 0:
        raise ValueError(f"the {len(real)} real images are all the same, so diversity is not defined")
    return _variance(samples) / spread


def class_diversity(
    samples: torch.Tensor, labels: torch.Tensor, real: torch.Tensor, real_labels: torch.Tensor
) -> dict[int, float]:
    """`diversity` within each class: a conditional generator may collapse in one and not in the others.

    Args:
        samples: Features, (N, D).
        labels: Their classes, (N,), integer.
        real: Features, (M, D).
        real_labels: Their classes, (M,), integer.

    Returns:
        Diversity of each class of which both sets have two rows.

    Raises:
        ValueError: If the labels do not fit the features, no class has two rows in both sets, or as in `diversity`.
    """
    for name, rows, classes in (("labels", samples, labels), ("real_labels", real, real_labels)):
        if classes.shape != rows.shape[:1]:
            raise ValueError(f"{name} must be ({len(rows)},), got {tuple(classes.shape)}")
    result = {}
    for label in sorted(set(labels.tolist()) & set(real_labels.tolist())):
        of_class = samples[labels == label], real[real_labels == label]
        if min(map(len, of_class)) >= 2:
            result[label] = diversity(*of_class)
    if not result:
        raise ValueError(f"no class has two rows in both sets, of {len(samples)} samples and {len(real)} real images")
    return result


def _kernel_sum(x: torch.Tensor, y: torch.Tensor, diagonal: bool = True) -> float:
    """Sum of k(x_i, y_j) over all i and j, or over i != j; never more than a block of the matrix is held."""
    total = 0.0
    for rows in x.split(BLOCK):
        for columns in y.split(BLOCK):
            total += _kernel(rows @ columns.T, x.shape[1]).sum().item()
    if not diagonal:
        total -= _kernel((x * y).sum(dim=1), x.shape[1]).sum().item()
    return total


def _kernel(products: torch.Tensor, dimensions: int) -> torch.Tensor:
    """(x . y / D + 1)^3 of inner products x . y."""
    return (products / dimensions + 1) ** 3


def _variance(features: torch.Tensor) -> float:
    """tr C, the sum of the unbiased variances of all features."""
    return features.double().var(dim=0).sum().item()


def _check_sets(a: torch.Tensor, b: torch.Tensor, names: tuple[str, str]) -> None:
    for name, features in zip(names, (a, b), strict=True):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name} must have shape (N, D) with N >= 2, got {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"the sets have {a.shape[1]} and {b.shape[1]} features")
