r"""Laws to sample from, with exact networks for them, and measures of how well that went.

In one dimension, W1, the mean distance between the sorted samples and the quantiles of the law, in 1/1000:

    spikes    4 normal laws of standard deviation .01     fine scale: where is the noise that a last step leaves?
    modes     3 of .1
    smooth    2 of .35

In more, samples belong to the nearest mode, and the ratios of their variance to the right one are 1 at best; the
"variance error" is the root mean square of the logarithms of two of them.

In two dimensions, a ring of 8 ellipses, each along its own direction: the variance along the ellipses ("wide") and
across ("narrow"). Beside it, W2 over 64 projections, whose quantiles are known too, as a multiple of that of exact
samples ("floor"); most of that comes from how many samples each mode happens to get.

In 192 dimensions, 6 modes, each with variance in 8 directions of its own ("within") and standard deviation .05 in the
others ("off the manifold"). Beside it, the total variation of the weights of the modes.

All laws lie within about [-1, 1] per coordinate, like images. Standard errors are over groups of samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDPMScheduler
from scipy.special import ndtr

from annealers import exact
from annealers.metrics import mean_and_standard_error

PATH = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
}
GROUPS = 8  # of samples, for standard errors


@dataclass
class Target:
    """A law and its measures.

    Args:
        name: Name in results.
        noise: `noise(x, alpha, sigma)`, the exact E[eps | x_t].
        draw: `draw(count, generator)`, exact samples, (count, D), float64; on the line quantiles, which are not drawn.
        measure: Samples (n, D) to numbers, among them `error`, the one that tables are sorted by.
        unit: What `error` is.
        samples: How many samples to measure on.
        dimension: D.
    """

    name: str
    noise: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    draw: Callable[[int, torch.Generator], torch.Tensor]
    measure: Callable[[torch.Tensor], dict[str, float]]
    unit: str
    samples: int
    dimension: int


class ExactNetwork:
    """The best network that training on the law could give, and how often it was called.

    Every scheduler gets the same one, and tells it a timestep. A timestep between two train timesteps stands for the
    noise-to-signal ratio that is as far between theirs on a logarithmic scale, which is how Diffusers makes it. Some
    multistep schedulers of Diffusers round the timestep of a Karras level, and not the level; they bear the
    consequence here, as they do with a trained network.
    """

    def __init__(self, target: Target) -> None:
        alphas_cumprod = DDPMScheduler(**PATH).alphas_cumprod.double().numpy()
        self._log_ratios = 0.5 * np.log((1 - alphas_cumprod) / alphas_cumprod)
        self._noise = target.noise
        self.calls = 0

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        log_ratio = np.interp(float(timestep), np.arange(len(self._log_ratios)), self._log_ratios)
        ratio = math.exp(log_ratio)
        alpha = 1 / math.sqrt(1 + ratio**2)
        return self._noise(sample, alpha, alpha * ratio)


# ---- one dimension --------------------------------------------------------------------------------------------------

LINE_LAWS = {  # weights, means, standard deviation
    "spikes": ([0.10, 0.25, 0.40, 0.25], [-0.90, -0.20, 0.30, 0.85], 0.01),
    "modes": ([0.30, 0.50, 0.20], [-0.80, 0.10, 0.70], 0.10),
    "smooth": ([0.60, 0.40], [-0.40, 0.50], 0.35),
}


def line(name: str, samples: int) -> Target:
    weights, means, deviation = LINE_LAWS[name]
    law = exact.GaussianMixture(
        weights, torch.tensor(means, dtype=torch.float64)[:, None], [deviation**2] * len(means)
    )
    quantiles = mixture_quantiles(
        np.array(weights), np.array(means), np.full(len(means), deviation), midpoints(samples)
    )

    def draw(count: int, generator: torch.Generator) -> torch.Tensor:
        points = midpoints(count)
        return torch.from_numpy(mixture_quantiles(*map(np.array, (weights, means, [deviation] * len(means))), points))[
            :, None
        ]

    def measure(x: torch.Tensor) -> dict[str, float]:
        return {"error": 1000 * float(np.abs(np.sort(x[:, 0].numpy()) - quantiles).mean())}

    return Target(name, law.noise, draw, measure, "W1 x 1000", samples, 1)


def midpoints(count: int) -> np.ndarray:
    return (np.arange(count) + 0.5) / count


def mixture_quantiles(
    weights: np.ndarray, means: np.ndarray, deviations: np.ndarray, probabilities: np.ndarray
) -> np.ndarray:
    """Quantiles of a mixture of normal laws on the line, by bisection to 1e-13."""
    low = np.full(len(probabilities), (means - 12 * deviations).min())
    high = np.full(len(probabilities), (means + 12 * deviations).max())
    for _ in range(50):
        middle = (low + high) / 2
        below = ndtr((middle[:, None] - means) / deviations) @ weights < probabilities
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


# ---- two dimensions -------------------------------------------------------------------------------------------------

RING_MODES, RING_RADIUS = 8, 0.8
RING_DEVIATIONS = (0.08, 0.015)
PROJECTIONS = 64


def ring(samples: int) -> Target:
    angles = 2 * math.pi * torch.arange(RING_MODES, dtype=torch.float64) / RING_MODES
    means = RING_RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)
    tilts = 3 * angles + 0.4  # no two neighbours alike, none along an axis
    axes = torch.stack([torch.stack([tilts.cos(), -tilts.sin()], 1), torch.stack([tilts.sin(), tilts.cos()], 1)], 1)
    variances = torch.tensor(RING_DEVIATIONS, dtype=torch.float64) ** 2
    covariances = axes * variances @ axes.mT
    law = exact.GaussianMixture([1.0] * RING_MODES, means, covariances)

    turns = math.pi * midpoints(PROJECTIONS)
    directions = np.stack([np.cos(turns), np.sin(turns)])  # (2, P)
    group = samples // GROUPS
    deviations = np.sqrt(np.einsum("ip,kij,jp->pk", directions, covariances.numpy(), directions))
    weights = np.full(RING_MODES, 1 / RING_MODES)
    quantiles = np.stack(
        [
            mixture_quantiles(weights, means.numpy() @ directions[:, p], deviations[p], midpoints(group))
            for p in range(PROJECTIONS)
        ],
        axis=1,
    )  # (group, P)

    def sliced_distance(x: torch.Tensor) -> float:
        return float(np.sqrt(((np.sort(x.numpy() @ directions, axis=0) - quantiles) ** 2).mean()))

    exact_groups = law.sample(16 * group, generator=torch.Generator().manual_seed(1)).split(group)
    floor = float(np.mean([sliced_distance(x) for x in exact_groups]))

    def measure_group(x: torch.Tensor) -> dict[str, float]:
        mode = torch.cdist(x, means).argmin(1)
        along_axes = torch.einsum("nij,ni->nj", axes[mode], x - means[mode])
        wide, narrow = ((along_axes**2).mean(0) / variances).tolist()
        return {
            "error": variance_error(wide, narrow),
            "wide variance ratio": wide,
            "narrow variance ratio": narrow,
            "sliced W2 / floor": sliced_distance(x) / floor,
        }

    def draw(count: int, generator: torch.Generator) -> torch.Tensor:
        return law.sample(count, generator=generator)

    return Target("ring", law.noise, draw, in_groups(measure_group), "variance error", samples, 2)


# ---- many dimensions ------------------------------------------------------------------------------------------------

DIMENSION, MODES, RANK, OFF_DEVIATION = 192, 6, 8, 0.05


class LowRankMixture:
    """A mixture of normal laws with variance in a few directions each, and one small variance in all the others.

    `exact.GaussianMixture` knows the same law; this one never forms a D x D matrix, and is thirty times faster.
    """

    def __init__(
        self, weights: torch.Tensor, means: torch.Tensor, axes: torch.Tensor, variances: torch.Tensor
    ) -> None:
        self.weights, self.means = weights, means  # (K,), (K, D)
        self.axes, self.variances = axes, variances  # (K, D, R) orthonormal, (K, R)
        self.off_variance = OFF_DEVIATION**2

    def noise(self, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        off = alpha**2 * self.off_variance + sigma**2
        along = alpha**2 * self.variances + sigma**2  # (K, R)
        offsets = torch.einsum("kd,kdr->kr", self.means, self.axes)
        coordinates = torch.einsum("nd,kdr->knr", x, self.axes) - alpha * offsets[:, None]  # (K, N, R)
        squares = (
            (x**2).sum(1) - 2 * alpha * self.means @ x.T + (alpha**2 * (self.means**2).sum(1))[:, None]
        )  # (K, N): |x - alpha m|^2
        gain = 1 / off - 1 / along[:, None]  # (K, 1, R)
        log_joint = (
            self.weights.log()[:, None]
            - 0.5 * (squares / off - (gain * coordinates**2).sum(2))
            - 0.5 * along.log().sum(1, keepdim=True)
        )
        responsibilities = log_joint.softmax(0)  # (K, N)
        score = (alpha * responsibilities.T @ self.means - x) / off
        score += torch.einsum("knr,kdr->nd", responsibilities[..., None] * gain * coordinates, self.axes)
        return -sigma * score

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        mode = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        along = torch.randn(count, RANK, generator=generator, dtype=torch.float64) * self.variances[mode].sqrt()
        off = torch.randn(count, DIMENSION, generator=generator, dtype=torch.float64)
        axes = self.axes[mode]  # (N, D, R)
        off = off - torch.einsum("ndr,nr->nd", axes, torch.einsum("nd,ndr->nr", off, axes))
        return self.means[mode] + torch.einsum("ndr,nr->nd", axes, along) + OFF_DEVIATION * off


def low_rank(samples: int) -> Target:
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.25, 0.20, 0.20, 0.15, 0.12, 0.08], dtype=torch.float64)
    means = 0.4 * torch.randn(MODES, DIMENSION, generator=generator, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(MODES, DIMENSION, RANK, generator=generator, dtype=torch.float64)).Q
    variances = torch.linspace(1.5, 0.5, RANK, dtype=torch.float64).square().expand(MODES, RANK)
    law = LowRankMixture(weights, means, axes, variances)

    def measure_group(x: torch.Tensor) -> dict[str, float]:
        mode = torch.cdist(x, means).argmin(1)
        residual = x - means[mode]
        along = torch.einsum("nd,ndr->nr", residual, axes[mode])
        within = float((along**2 / variances[mode]).mean())
        off = float(((residual**2).sum(1) - (along**2).sum(1)).mean()) / ((DIMENSION - RANK) * OFF_DEVIATION**2)
        frequencies = torch.bincount(mode, minlength=MODES) / len(x)
        return {
            "error": variance_error(within, off),
            "within variance ratio": within,
            "off-manifold variance ratio": off,
            "mode total variation": float((frequencies - weights).abs().sum()) / 2,
        }

    return Target("low rank", law.noise, law.draw, in_groups(measure_group), "variance error", samples, DIMENSION)


def variance_error(*ratios: float) -> float:
    return math.sqrt(sum(math.log(ratio) ** 2 for ratio in ratios) / len(ratios))


def in_groups(measure_group: Callable[[torch.Tensor], dict[str, float]]) -> Callable[[torch.Tensor], dict[str, float]]:
    """The mean of each number over groups of samples, and beside it its standard error."""

    def measure(x: torch.Tensor) -> dict[str, float]:
        groups = [measure_group(group) for group in x.split(len(x) // GROUPS)]
        numbers = {}
        for key in groups[0]:
            numbers[key], numbers[f"{key}, standard error"] = mean_and_standard_error(
                torch.tensor([group[key] for group in groups])
            )
        return numbers

    return measure


TARGETS = {
    "spikes": lambda samples=16384: line("spikes", samples),
    "modes": lambda samples=16384: line("modes", samples),
    "smooth": lambda samples=16384: line("smooth", samples),
    "ring": lambda samples=8000: ring(samples),
    "low rank": lambda samples=2000: low_rank(samples),
}
