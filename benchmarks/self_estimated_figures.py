"""Samplers that measure the variance of their own steps: how good they are, and where they fail.

    python benchmarks/self_estimated_figures.py --out benchmarks/results

Makes the figures of docs/self_estimated_variance.md and the record of the numbers in them, self_estimated.json. All
networks are exact but for the errors that are put in on purpose, and all samplers are the schedulers themselves:

    variance     the ratio of the variance of the samples to the right one, on two mixtures of normal laws
    distance     W1 on the line, on the laws and levels of `sampler_quality`
    limits       where it fails: levels that end far from the data, states between modes, a network that errs,
                 guidance, latents with channels of different scale, very few calls

Levels are those of "karras" spacing, of a process whose noise-to-signal ratio goes from 0.02 to 50.
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import diffusers
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from matplotlib.axes import Axes
from sampler_noise import OrderedNoise
from sampler_targets import OFF_DEVIATION, PATH, ExactNetwork, LowRankMixture, line, midpoints
from scipy.special import ndtri

from annealers import PredictorCorrectorScheduler, exact
from annealers.schedulers.gaussian_path import Level
from annealers.schedulers.secant import Innovation, measured_slopes

Network = Callable[[torch.Tensor, float, float], torch.Tensor]  # (x, alpha, sigma) to the predicted noise
Results = dict[str, Any]

SEED = 0
CALLS = (6, 10, 20, 30, 50)
LINE_CALLS = (10, 20, 50, 100)
SAMPLES = 2000
LINE_SAMPLES = 8192
RATIOS = np.geomspace(0.02, 50, 1000)  # sigma / alpha of the train timesteps


def ladder() -> dict[str, Any]:
    """The path as a config that every scheduler understands."""
    alphas_cumprod = 1 / (1 + RATIOS**2)
    kept = alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]])
    return {
        "num_train_timesteps": len(RATIOS),
        "trained_betas": (1 - kept).tolist(),
        "prediction_type": "epsilon",
        "clip_sample": False,
    }


# ---- the samplers ---------------------------------------------------------------------------------------------------


def ours(**settings: Any) -> Callable[[dict[str, Any], str], SchedulerMixin]:
    return lambda path, spacing: PredictorCorrectorScheduler(
        **path, **{"corrector_steps": 0, "last_step_noise": True, **settings}, timestep_spacing=spacing
    )


def solver(scheduler: type[SchedulerMixin], **settings: Any) -> Callable[[dict[str, Any], str], SchedulerMixin]:
    """A multistep solver of Diffusers; one that never clips does not know the setting."""

    def build(path: dict[str, Any], spacing: str) -> SchedulerMixin:
        path = {name: value for name, value in path.items() if name != "clip_sample"}
        spaced = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
        return scheduler(**path, **settings, **spaced, final_sigmas_type="zero")

    return build


CORRECTED = {"corrector_steps": 1, "snr": 0.3}
SECANT, SECANT_HALF, TWO_M, TWO_M_SDE, SMALL = "secant", "secant, η = .5", "DPM++ 2M", "DPM++ 2M SDE", "DDPM small"
SAMPLERS = {
    SMALL: ours(last_step_noise=False),
    TWO_M_SDE: solver(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
    TWO_M: solver(DPMSolverMultistepScheduler, algorithm_type="dpmsolver++"),
    "UniPC": solver(UniPCMultistepScheduler),
    "corrector, isotropic": ours(variance_type="self_estimated_isotropic", **CORRECTED),
    "corrector, directional": ours(variance_type="self_estimated", **CORRECTED),
    "innovation, directional": ours(variance_type="self_estimated"),
    SECANT: ours(predictor="secant"),
    SECANT_HALF: ours(predictor="secant", eta=0.5),
    "secant, η = 0": ours(predictor="secant", eta=0.0),
}
STYLES = dict(
    zip(
        SAMPLERS,
        ("#999999", "#8c564b", "#111111", "#7f7fff", "#9ecae1", "#3182bd", "#31a354", "#d62728", "#ff7f0e", "#e377c2"),
        strict=True,
    )
)
IN_MANY_DIMENSIONS = [name for name in SAMPLERS if name not in ("UniPC", "secant, η = 0")]
ON_THE_LINE = [SMALL, TWO_M_SDE, TWO_M, "UniPC", "corrector, isotropic", SECANT, SECANT_HALF]


def sampled(network: Network, name: str, calls: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Samples in as many levels as fit into `calls`."""
    scheduler = SAMPLERS[name](ladder(), "karras")
    scheduler.set_timesteps(levels_in(scheduler, calls))
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        ratio = RATIOS[int(t)]
        alpha = 1 / math.sqrt(1 + ratio**2)
        x = scheduler.step(network(x, alpha, alpha * ratio), t, x, generator=generator).prev_sample
    return x


def levels_in(scheduler: SchedulerMixin, calls: int) -> int:
    return calls // 2 + 1 if scheduler.order == 2 and calls % 2 else calls // scheduler.order


# ---- laws -----------------------------------------------------------------------------------------------------------


class Manifolds:
    """6 modes in 192 dimensions, each with variance in 8 directions and standard deviation .05 in the others."""

    dimension, rank, modes = 192, 8, 6

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        shape = self.modes, self.dimension
        self.means = 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.axes = torch.linalg.qr(torch.randn(*shape, self.rank, generator=generator, dtype=torch.float64)).Q
        variances = torch.linspace(0.25, 0.6, self.rank, dtype=torch.float64) ** 2 + OFF_DEVIATION**2
        self.variances = variances.expand(self.modes, self.rank)
        weights = torch.rand(self.modes, generator=generator, dtype=torch.float64) + 0.5
        self.noise = LowRankMixture(weights / weights.sum(), self.means, self.axes, self.variances).noise

    def measure(self, x: torch.Tensor) -> dict[str, float]:
        mode = torch.cdist(x, self.means).argmin(1)
        residual = x - self.means[mode]
        along = torch.einsum("nd,ndr->nr", residual, self.axes[mode])
        off = ((residual**2).sum(1) - (along**2).sum(1)).mean() / (self.dimension - self.rank)
        return {
            "within": float((along**2 / self.variances[mode]).mean()),
            "off": float(off) / OFF_DEVIATION**2,
        }


class Blobs:
    """8 modes in 64 dimensions, with standard deviation .2 in all directions."""

    dimension, deviation = 64, 0.2

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.means = 0.5 * torch.randn(8, self.dimension, generator=generator, dtype=torch.float64)
        self.noise = exact.GaussianMixture([1.0] * 8, self.means, [self.deviation**2] * 8).noise

    def measure(self, x: torch.Tensor) -> dict[str, float]:
        residual = x - self.means[torch.cdist(x, self.means).argmin(1)]
        return {"all": float((residual**2).mean()) / self.deviation**2}


def measured(law: Manifolds | Blobs, network: Network, name: str, calls: int) -> dict[str, float]:
    return law.measure(sampled(network, name, calls, (SAMPLES, law.dimension)))


# ---- variance and distance ------------------------------------------------------------------------------------------


def variances(names: Iterable[str], all_calls: Iterable[int]) -> Results:
    """The ratios of each sampler at each number of calls."""
    laws = {"rank 8 in 192": Manifolds(), "8 blobs in 64": Blobs()}
    return {
        target: {name: {str(calls): measured(law, law.noise, name, calls) for calls in all_calls} for name in names}
        for target, law in laws.items()
    }


def distance(name: str, builder: Callable[[dict[str, Any], str], SchedulerMixin], spacing: str, calls: int) -> float:
    """W1 x 1000 to the law of this name on the line."""
    target = line(name, LINE_SAMPLES)
    scheduler, network, noise = builder(PATH, spacing), ExactNetwork(target), OrderedNoise(SEED)
    scheduler.set_timesteps(levels_in(scheduler, calls))
    x = torch.from_numpy(ndtri(midpoints(LINE_SAMPLES)))[:, None] * scheduler.init_noise_sigma
    with noise.in_schedulers():
        for t in scheduler.timesteps:
            noise.particles_are_at(x)
            x = scheduler.step(network(x, t), t, x).prev_sample.double()
    return target.measure(x)["error"]


def distances() -> Results:
    return {
        law: {
            name: {str(calls): distance(law, SAMPLERS[name], "karras", calls) for calls in LINE_CALLS}
            for name in ON_THE_LINE
        }
        for law in ("spikes", "modes", "smooth")
    }


# ---- where it fails -------------------------------------------------------------------------------------------------


def far_from_the_data() -> Results:
    """W1 x 1000 on levels that end at a noise-to-signal ratio above the scale of the data."""
    kinds = {
        SECANT: ours(predictor="secant"),
        "secant, no noise in the last step": ours(predictor="secant", last_step_noise=False),
        TWO_M: SAMPLERS[TWO_M],
    }
    return {
        name: {str(calls): distance("spikes", builder, "trailing", calls) for calls in LINE_CALLS}
        for name, builder in kinds.items()
    }


def between_modes() -> Results:
    """The right variance of x_0 between two modes, in units of the noise, and the one that is measured there."""
    noise_level, step = 0.6, 0.15
    law = exact.GaussianMixture([0.5, 0.5], torch.tensor([[-1.0], [1.0]], dtype=torch.float64), [0.04, 0.04])
    y = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    level = Level(0, 1.0, noise_level)
    before, after = (law.denoise(state, 1.0, noise_level) for state in (y - step, y))
    past = Innovation(level, level, before, y - step, 0.0, None, 0.0)
    slope = measured_slopes(after - before, y - past.expected, past).average
    right = law.posterior_variance(y, 1.0, noise_level) / noise_level**2
    return {"state": y[:, 0].tolist(), "right": right[:, 0].tolist(), "measured": slope[:, 0].tolist()}


def with_network_errors() -> Results:
    """Variance ratios at 20 calls with a smooth error in the predicted noise that is no gradient."""
    law = Manifolds()
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(law.dimension, law.dimension, generator=generator, dtype=torch.float64)
    mixing = mixing / law.dimension**0.5

    def network_with(size: float) -> Network:
        def network(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
            wave = torch.sin(x / math.sqrt(sigma**2 + 0.3 * alpha**2) @ mixing)
            return law.noise(x, alpha, sigma) - size * alpha * 2**0.5 * wave

        return network

    names = (TWO_M, "corrector, directional", SECANT, SECANT_HALF)
    return {
        name: {str(size): measured(law, network_with(size), name, 20) for size in (0.0, 0.05, 0.1, 0.2)}
        for name in names
    }


def with_guidance() -> Results:
    """Variance at 50 calls of the guided field of p(x|c) = N(0, 1) and p(x) = N(0, 2), 16 coordinates alike."""

    def guided(scale: float) -> Network:
        def network(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
            unconditional, conditional = (sigma * x / (alpha**2 * v + sigma**2) for v in (2.0, 1.0))
            return unconditional + scale * (conditional - unconditional)

        return network

    names = (SMALL, TWO_M, SECANT, SECANT_HALF)
    scales = (1.0, 1.5, 2.0, 3.0, 5.0)
    sampler_results = {
        name: {str(w): float(sampled(guided(w), name, 50, (SAMPLES, 16)).var()) for w in scales} for name in names
    }
    limits = {
        "limit of DDPM": {str(w): (2 - 2 ** (2 - 2 * w)) / (2 * w - 1) for w in scales},
        "limit of the probability flow": {str(w): 2 ** (1 - w) for w in scales},
    }
    return sampler_results | limits


def with_channels() -> Results:
    """Variance ratio at 20 calls of normal channels of four scales, 16 coordinates each."""
    deviations = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)
    variance = deviations.repeat_interleave(16) ** 2
    law = exact.Gaussian(torch.zeros(64, dtype=torch.float64), variance=variance)
    ratios = {}
    for name in (TWO_M_SDE, TWO_M, "corrector, directional", SECANT, SECANT_HALF):
        x = sampled(law.noise, name, 20, (SAMPLES, 64))
        per_channel = (x**2 / variance).reshape(SAMPLES, 4, 16).mean((0, 2))
        ratios[name] = dict(zip(map(str, deviations.tolist()), per_channel.tolist(), strict=True))
    return ratios


def limits() -> Results:
    return {
        "far from the data": far_from_the_data(),
        "between modes": between_modes(),
        "network error": with_network_errors(),
        "guidance": with_guidance(),
        "channels": with_channels(),
        "few calls": variances((TWO_M, SECANT, SECANT_HALF), (4, 5, 6, 8, 10))["rank 8 in 192"],
    }


# ---- figures --------------------------------------------------------------------------------------------------------


def draw_curves(axis: Axes, curves: dict[str, dict[str, Any]], key: str | None = None, **style: Any) -> None:
    """One line per sampler, over calls or whatever the keys count."""
    for name, points in curves.items():
        values = [point if key is None else point[key] for point in points.values()]
        emphasis = {"linewidth": 2.2} if name.startswith("secant") else {"linewidth": 1.2}
        colour = {"color": STYLES[name]} if name in STYLES else {"color": "#555555", "linestyle": ":"}
        axis.plot(
            [float(x) for x in points], values, marker="o", markersize=3, label=name, **colour, **emphasis, **style
        )


def decorate(axis: Axes, title: str, xlabel: str, ylabel: str, logarithmic: str = "") -> None:
    for direction in logarithmic:
        getattr(axis, f"set_{direction}scale")("log")
    if "x" in logarithmic:
        ticks = sorted({float(x) for drawn in axis.lines for x in drawn.get_xdata()})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.xaxis.minorticks_off()
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.25)


def draw_variances(results: Results, file: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.8), sharey=True)
    panels = (
        ("rank 8 in 192", "within", "rank 8 in d = 192: within the modes"),
        ("rank 8 in 192", "off", "the same: off the manifold"),
        ("8 blobs in 64", "all", "8 isotropic modes in d = 64"),
    )
    for axis, (target, key, title) in zip(axes, panels, strict=True):
        axis.axhspan(0.95, 1.05, color="#dddddd", zorder=0)
        draw_curves(axis, results[target], key)
        decorate(axis, title, "network calls", "variance / right variance", "x")
        axis.set_ylim(0.2, 1.5)
    finish(figure, axes[0], file)


def draw_distances(results: Results, file: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.8))
    for axis, (law, curves) in zip(axes, results.items(), strict=True):
        draw_curves(axis, curves)
        decorate(axis, law, "network calls", "W1 x 1000", "xy")
    finish(figure, axes[0], file)


def draw_limits(results: Results, file: Path) -> None:
    figure, ((far, between, error), (guidance, channels, few)) = plt.subplots(2, 3, figsize=(14, 8.4))
    draw_curves(far, results["far from the data"])
    decorate(far, "levels that end far from the data (spikes)", "network calls", "W1 x 1000", "xy")
    states = results["between modes"]
    between.plot(states["state"], states["right"], color="#111111", label="right")
    between.plot(states["state"], states["measured"], color=STYLES[SECANT], label="measured")
    decorate(between, "between two modes", "state", "variance of x_0 / noise variance")
    for key, style in (("within", "-"), ("off", "--")):
        draw_curves(error, results["network error"], key, linestyle=style)
    decorate(error, "a network that errs (— within, -- off)", "error of the predicted noise", "variance ratio")
    error.set_xticks([float(size) for size in results["network error"][TWO_M]])
    draw_curves(guidance, results["guidance"])
    decorate(guidance, "guidance: p(x|c) = N(0, 1), p(x) = N(0, 2)", "guidance scale", "variance", "y")
    draw_curves(channels, results["channels"])
    decorate(channels, "channels of different scale", "standard deviation of the channel", "variance ratio", "x")
    for key, style in (("within", "-"), ("off", "--")):
        draw_curves(few, results["few calls"], key, linestyle=style)
    decorate(few, "very few calls (— within, -- off)", "network calls", "variance ratio")
    few.set_ylim(0, 2)  # the solver leaves 18 times the right variance at 4 calls
    for axis in (far, between, guidance, channels):
        axis.legend(fontsize=7)
    for axis in (error, few):
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(handles[: len(handles) // 2], labels[: len(labels) // 2], fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def finish(figure: Any, axis: Axes, file: Path) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncol=4, fontsize=9, frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return float(f"{values:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of self_estimated.json and the figures")
    parser.add_argument("--only", choices=["variance", "distance", "limits"], help="measure and draw one of them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="diffusers")

    parts = {
        "variance": (lambda: variances(IN_MANY_DIMENSIONS, CALLS), draw_variances),
        "distance": (distances, draw_distances),
        "limits": (limits, draw_limits),
    }
    file = options.out / "self_estimated.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    for name, (measure, draw) in parts.items():
        if options.only in (None, name):
            started = time.perf_counter()
            record[name] = rounded(measure())
            draw(record[name], options.out / f"self_estimated_{name}.png")
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
