r"""Which noise levels and steps to choose for a data set, before anything is trained.

    suggest_sigma_max     max_ij |x_i - x_j|, so that at the top of the ladder each image can    Technique 1
                          turn into each other
    suggest_num_levels    L levels of common ratio gamma = s_{i-1} / s_i, so that neighbours     Technique 2
                          share a part C of their noise,
                              Phi(sqrt(2 D) (gamma - 1) + 3 gamma) - Phi(sqrt(2 D) (gamma - 1) - 3 gamma) = C
    suggest_step_size     the e whose K Langevin steps bring pure noise of the level before      Technique 4
                          nearest to the variance of this one: with c = 2 e / (1 - (1 - e)^2),
                              (1 - e)^{2 K} (gamma^2 - c) + c  nearest to 1

The second rule: in D dimensions noise of deviation s has a norm of sqrt(D) s +- s / sqrt(2), nearly normal, and C is
the share of the noise of one level that lies within three deviations of that of the next. The paper asks for C near
0.5. Its four published ladders have 5.9 % more levels than C = 0.5 gives; C = 0.5667 gives all four back. In D <= 4
dimensions all levels overlap and the rule says nothing.

The rules take the units of the data as they come. Published ladders are for pixels in [0, 1]; ours lie in [-1, 1],
where both ends are twice as large, and the number of levels and e are the same.

Source: Song & Ermon 2020, "Improved Techniques for Training Score-Based Generative Models", arXiv:2006.09011.

    symbol    code               meaning
    s_1, s_L  sigma_max, _min    largest and smallest level, in units of the data
    D         dimension          values in an image
    gamma     ratio              of neighbouring levels, > 1
    e         step size          in units of the variance of the noise of a level, as of `AnnealedLangevinScheduler`
    K         steps_per_level    Langevin steps on a level
"""

import math

import torch
from scipy.optimize import minimize_scalar, root_scalar
from scipy.stats import norm

BLOCK = 500  # rows whose distances are held at a time
LOWEST_DIMENSION = 5  # sqrt(2 D) > 3: below, levels grow wider faster than apart
LARGEST_RATIO = 1e6
SMALLEST_STEP = 1e-8


def suggest_sigma_max(images: torch.Tensor, max_samples: int = 2000, seed: int = 0) -> float:
    """The largest distance between two images, in the units of the data (Technique 1).

    Args:
        images: The data, (N, *), floating point; N >= 2.
        max_samples: Of more rows than this a random choice of that many is compared, which gives a lower bound: on
            CIFAR-10 2 x 48 with 2,000 of the 50,000 images, where the paper has 2 x 50 in these units.
        seed: Of that choice.

    Raises:
        ValueError: For integers instead of floats, values that are not finite, or fewer than two rows to compare.
    """
    if not images.is_floating_point():
        raise ValueError(f"images must be floating-point values as the network sees them, got {images.dtype}")
    if min(len(images), max_samples) < 2:
        raise ValueError(f"need two images to compare, got {len(images)} with max_samples={max_samples}")
    if len(images) > max_samples:
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:max_samples]
        images = images[chosen.to(images.device)]
    rows = images.flatten(1)
    if not rows.isfinite().all():
        raise ValueError("images must be finite, got values that are not")
    mean = rows.mean(0, dtype=torch.float64)  # distances are computed by way of norms, which are smallest about it
    blocks = rows.split(BLOCK)  # in float64 only while they are compared: large images fill gigabytes
    pairs = ((a, b) for i, a in enumerate(blocks) for b in blocks[: i + 1])
    return max(torch.cdist(a.double() - mean, b.double() - mean).max().item() for a, b in pairs)


def suggest_num_levels(sigma_min: float, sigma_max: float, dimension: int, overlap: float = 0.5) -> int:
    """The number of levels of a geometric ladder whose neighbours overlap as much as wanted (Technique 2).

    Args:
        sigma_min, sigma_max: Ends of the ladder.
        dimension: D, values in an image.
        overlap: C; 0.5 in the paper, 0.5667 in its experiments.

    Raises:
        ValueError: If the ends are not 0 < sigma_min < sigma_max, D < 5, or C does not lie in 0 .. 0.997.
    """
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    ratio = level_ratio(dimension, overlap)
    return 1 + max(1, round(math.log(sigma_max / sigma_min) / math.log(ratio)))


def level_ratio(dimension: int, overlap: float = 0.5) -> float:
    """gamma, the ratio of neighbouring levels that overlap as much as wanted (Technique 2)."""
    if dimension < LOWEST_DIMENSION:
        raise ValueError(
            f"in fewer than {LOWEST_DIMENSION} dimensions the noise of any two levels overlaps, so the rule gives no "
            f"number of levels; got dimension={dimension}"
        )
    largest = level_overlap(1.0, dimension)
    if not 0 < overlap < largest:
        raise ValueError(f"overlap must lie in 0 .. {largest:.4f}, that of a level with itself, got {overlap}")
    bracket = (1.0, LARGEST_RATIO)
    return root_scalar(lambda ratio: level_overlap(ratio, dimension) - overlap, bracket=bracket, xtol=1e-12).root


def level_overlap(ratio: float, dimension: int) -> float:
    """The share of the noise of one level that could be of the next one, gamma times smaller (Technique 2)."""
    apart = math.sqrt(2 * dimension) * (ratio - 1)
    return float(norm.cdf(apart + 3 * ratio) - norm.cdf(apart - 3 * ratio))


def suggest_step_size(ratio: float, steps_per_level: int, whole_ladder: bool = False) -> float:
    """The step size e of annealed Langevin dynamics that changes the variance of pure noise least (Technique 4).

    The variance is never too small: too short a step leaves noise of the level before, too long a one adds its own.
    The paper looks at a single level, on which the chain arrives with the right variance. What is left over on each
    level is passed on to the next, so down a whole ladder a longer step is better, the more so the fewer the steps: on
    the CIFAR-10 ladder of the paper (232 levels, K = 5) its e = 0.062 ends with 1.13 times the noise, 0.11 with 1.10.

    Args:
        ratio: gamma of the ladder, (sigma_max / sigma_min)^(1 / (L - 1)).
        steps_per_level: K.
        whole_ladder: Whether the variance that many levels come to is made right, instead of that of the first.

    Returns:
        e, in 0 .. 1; the step size of the paper is e sigma_min^2.

    Raises:
        ValueError: If the ratio is not above 1 or K not a positive integer.
    """
    if not 1 < ratio < math.inf:
        raise ValueError(f"ratio must be above 1, got {ratio}")
    if isinstance(steps_per_level, bool) or not isinstance(steps_per_level, int) or steps_per_level < 1:
        raise ValueError(f"steps_per_level must be a positive integer, got {steps_per_level!r}")

    def variance(log_step: float) -> float:
        e = math.exp(log_step)
        kept, stationary = (1 - e) ** (2 * steps_per_level), 2 / (2 - e)  # 2 e / (1 - (1 - e)^2)
        if whole_ladder:  # V = kept (gamma^2 V - stationary) + stationary
            return (1 - kept) * stationary / (1 - kept * ratio**2)
        return kept * (ratio**2 - stationary) + stationary

    shortest = 1 - ratio ** (-1 / steps_per_level)  # below, the noise of all levels before adds up
    bounds = (math.log(shortest * (1 + 1e-6) if whole_ladder else SMALLEST_STEP), 0.0)
    return math.exp(minimize_scalar(variance, bounds=bounds, method="bounded", options={"xatol": 1e-9}).x)
