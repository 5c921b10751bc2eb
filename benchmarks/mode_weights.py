r"""Mode weights: what Langevin dynamics makes of two far modes of unequal weight, with and without annealing.

    python benchmarks/mode_weights.py --out benchmarks/results

The toy of Song & Ermon 2019 ("Generative Modeling by Estimating Gradients of the Data Distribution", arXiv:1907.05600,
Sec. 3.2.2): 0.8 of the data is N((5, 5), I), 0.2 is N((-5, -5), I). Between the modes the score does not know the
weights, so a chain of plain Langevin dynamics stays with the mode it starts near. All scores are exact, so nothing of
what is measured comes from learning them, and everybody gets the same number of score calls:

    plain       x <- x + delta s + sqrt(2 delta) z on the score of the data, delta = 0.05, from a uniform law on
                [-8, 8]^2, as in the paper's code; and with variations of the step and the start
    annealed    AnnealedLangevinScheduler with its default steps through its own timesteps, on a ladder from 0.1 up to
                the largest distance in the data; and with the levels and steps of the paper's code
    reverse     the DDPM chain on the same ladder, one call per level, for comparison; also from where it should start

Measured are the share of the larger mode, the total variation distance to the law on 20 intervals of equal probability
along the line through the modes, and the mean square of the distance to the nearer mode, per coordinate: its variance,
1, if all is well. Each number is the mean over seeds, with its standard error. Exact samples have a total variation,
too, because they are finitely many.
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import SchedulerMixin
from scipy.optimize import brentq
from scipy.stats import norm

from annealers import AnnealedLangevinScheduler, DDPMAncestralScheduler, exact
from annealers.data.toys import two_modes
from annealers.noise_ladder import suggest_sigma_max
from annealers.schedulers.langevin import langevin_step

LAW = two_modes()
CENTRES = torch.tensor([[5.0, 5.0], [-5.0, -5.0]], dtype=torch.float64)
# the same data as noise on two points, so that the levels of the paper's code, deviations of a mode, are levels here
TWO_POINTS = exact.FiniteData(CENTRES.reshape(2, 2, 1, 1), torch.tensor([0.8, 0.2]))
INTERVALS = 20
HALF_SIDE = 8.0  # of the square of the plain start
SIGMA_MIN = 0.1
SHOWN_CALLS = 1000

Sampler = Callable[[int, int, torch.Generator], tuple[torch.Tensor, int]]  # (calls, chains) to (n, 2), calls made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of mode_weights.json, .md and .png")
    parser.add_argument("--calls", type=int, nargs="+", default=[100, 300, 1000, 3000], help="score calls per chain")
    parser.add_argument("--chains", type=int, default=4096, help="chains per seed")
    parser.add_argument("--seeds", type=int, default=8, help="how many seeds, for the standard errors; 2 or more")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # of few levels, that they end with too much noise: this is measured here
    warnings.filterwarnings("ignore", message=".* times the noise variance of the last level")

    started = time.perf_counter()
    records, clouds = [], {}
    for name, sampler in samplers().items():
        for calls in options.calls:
            seeds = [sampler(calls, options.chains, torch.Generator().manual_seed(s)) for s in range(options.seeds)]
            records.append({"sampler": name, "calls": seeds[0][1], "budget": calls, **summary(x for x, _ in seeds)})
            clouds[name, calls] = seeds[0][0]
        print(f"{name}: {time.perf_counter() - started:.0f} s since the start", flush=True)

    options.out.mkdir(parents=True, exist_ok=True)
    settings = {"chains": options.chains, "seeds": options.seeds, "sigma_min": SIGMA_MIN, "sigma_max": sigma_max()}
    file = options.out / "mode_weights.json"
    file.write_text(json.dumps({"settings": settings, "records": records}, indent=1) + "\n")
    (options.out / "mode_weights.md").write_text(table(records, settings))
    shown = min(options.calls, key=lambda calls: abs(calls - SHOWN_CALLS))
    draw(records, {name: cloud for (name, calls), cloud in clouds.items() if calls == shown}, shown, options.out)


# ---- samplers -------------------------------------------------------------------------------------------------------

EXACT, PLAIN, ANNEALED = "exact samples", "plain Langevin", "annealed Langevin"
PAPER = "annealed Langevin, levels and steps of the paper's code"
REVERSE = "DDPM chain on the same ladder"


def samplers() -> dict[str, Sampler]:
    return {
        EXACT: lambda calls, chains, generator: (LAW.sample(chains, generator=generator).flatten(1).double(), 0),
        PLAIN: plain(),
        f"{PLAIN}, ten times the step": plain(step_size=0.5),
        f"{PLAIN}, from the noise that annealing starts from": plain(start=from_noise),
        ANNEALED: through(on_ladder, LAW),
        PAPER: through(of_the_paper, TWO_POINTS, start=from_square),
        REVERSE: through(reverse_chain, LAW),
        f"{REVERSE}, from the exact law at its top": through(reverse_chain, LAW, start=from_top),
    }


def from_square(chains: int, generator: torch.Generator) -> torch.Tensor:
    """The uniform law on the square, in the coordinates of the data."""
    return HALF_SIDE * (2 * torch.rand(chains, 2, 1, 1, generator=generator, dtype=torch.float64) - 1)


def from_noise(chains: int, generator: torch.Generator) -> torch.Tensor:
    """N(0, 1 + sigma_max^2), unit noise in the coordinates of the ladder."""
    scale = math.sqrt(1 + sigma_max() ** 2)
    return scale * torch.randn(chains, 2, 1, 1, generator=generator, dtype=torch.float64)


def from_top(chains: int, generator: torch.Generator) -> torch.Tensor:
    """The law of the data with the noise of the highest level, whose mean is that of the data and not 0."""
    return LAW.sample(chains, 1.0, sigma_max(), generator).double()


def plain(step_size: float = 0.05, start: Callable[[int, torch.Generator], torch.Tensor] = from_square) -> Sampler:
    """Langevin dynamics on the score of the data itself."""

    def sample(calls: int, chains: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        x = start(chains, generator)
        for _ in range(calls):
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x = langevin_step(x, -LAW.score(x), 1.0, step_size, noise)
        return x.flatten(1), calls

    return sample


def through(
    build: Callable[[int], SchedulerMixin],
    law: exact.Law,
    start: Callable[[int, torch.Generator], torch.Tensor] = from_noise,
) -> Sampler:
    """A scheduler through its own timesteps, with the exact network of the law."""

    def sample(calls: int, chains: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        scheduler = build(calls)
        network = law.as_model(scheduler)
        alpha, _ = scheduler.signal_and_noise(scheduler.timesteps[0])
        x = start(chains, generator) * alpha  # the coordinates of a ladder
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x, generator=generator).prev_sample
        return x.flatten(1), len(scheduler.timesteps)

    return sample


def sigma_max() -> float:
    """The largest distance between two of 2,000 points."""
    return suggest_sigma_max(LAW.sample(2000, generator=torch.Generator().manual_seed(0)))


def ladder(levels: int, sigma_min: float = SIGMA_MIN, top: float | None = None) -> dict[str, Any]:
    return {
        "num_train_timesteps": levels,
        "beta_schedule": "geometric",
        "sigma_min": sigma_min,
        "sigma_max": sigma_max() if top is None else top,
        "clip_sample": False,
    }


def on_ladder(calls: int) -> SchedulerMixin:
    """As many levels as fit, of ten default steps each, and the denoising call."""
    levels = (calls - 1) // 10
    scheduler = AnnealedLangevinScheduler(**ladder(levels))
    scheduler.set_timesteps(levels)
    return scheduler


def of_the_paper(calls: int) -> SchedulerMixin:
    """Ten levels from 20 to 1, the deviation of the modes, in steps of 0.1; 100 on each level in the paper's code."""
    scheduler = AnnealedLangevinScheduler(
        **ladder(10, sigma_min=1.0, top=20.0),
        steps_per_level=calls // 10,
        step_size=0.1,
        step_convention="ncsn",
        denoise=False,
    )
    scheduler.set_timesteps(10)
    return scheduler


def reverse_chain(calls: int) -> SchedulerMixin:
    scheduler = DDPMAncestralScheduler(**ladder(calls))
    scheduler.set_timesteps(calls)
    return scheduler


# ---- measures -------------------------------------------------------------------------------------------------------


def summary(seeds: Any) -> dict[str, list[float]]:
    """Mean and standard error over the seeds of each measure."""
    measured = [measures(x) for x in seeds]
    return {
        name: [
            float(np.mean([m[name] for m in measured])),
            float(np.std([m[name] for m in measured], ddof=1) / math.sqrt(len(measured))),
        ]
        for name in measured[0]
    }


def measures(x: torch.Tensor) -> dict[str, float]:
    distances = torch.cdist(x, CENTRES)  # (n, 2)
    along = x.sum(dim=1) / math.sqrt(2)
    counts = torch.bincount(torch.bucketize(along, boundaries()), minlength=INTERVALS)
    return {
        "share": float((distances.argmin(dim=1) == 0).double().mean()),
        "total_variation": float((counts / len(x) - 1 / INTERVALS).abs().sum() / 2),
        "variance": float((distances.amin(dim=1) ** 2).mean() / 2),
    }


def boundaries() -> torch.Tensor:
    """Quantiles of the law along the line through the modes."""

    def cdf(u: float) -> float:
        return 0.8 * norm.cdf(u - 5 * math.sqrt(2)) + 0.2 * norm.cdf(u + 5 * math.sqrt(2))

    levels = np.arange(1, INTERVALS) / INTERVALS
    return torch.tensor([brentq(lambda u, q=q: cdf(u) - q, -30, 30) for q in levels], dtype=torch.float64)


# ---- table and figure -----------------------------------------------------------------------------------------------


def table(records: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    lines = [
        "# Mode weights",
        "",
        f"Two modes of weight 0.8 and 0.2, exact scores; means over {settings['seeds']} seeds of "
        f"{settings['chains']:,} chains and their standard errors. Ladder from {settings['sigma_max']:.1f} down to "
        f"{settings['sigma_min']}.",
        "",
        "| sampler | calls | share of the larger mode | total variation | variance of a mode |",
        "| --- | --- | --- | --- | --- |",
    ]
    seen_exact = False
    for record in records:
        if record["sampler"] == EXACT and seen_exact:
            continue
        seen_exact = seen_exact or record["sampler"] == EXACT
        numbers = ("{:.3f} ± {:.3f}".format(*record[name]) for name in ("share", "total_variation", "variance"))
        lines.append(f"| {record['sampler']} | {record['calls'] or '—'} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


COLOURS = {PLAIN: "#c0504d", ANNEALED: "#1f6f8b", REVERSE: "#8a8a8a", PAPER: "#7fb2c4"}


def draw(records: list[dict[str, Any]], clouds: dict[str, torch.Tensor], calls: int, out: Path) -> None:
    """Samples of the data, plain and annealed, and the share of the larger mode against the number of calls."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10})
    figure, axes = plt.subplots(1, 4, figsize=(13.2, 3.5), layout="constrained", width_ratios=[1, 1, 1, 1.25])
    shares = {r["sampler"]: r["share"] for r in records if r["budget"] == calls}
    titles = {EXACT: "The data", PLAIN: f"Plain Langevin, {calls:,} calls", ANNEALED: f"Annealed, {calls:,} calls"}
    for axis, (name, title) in zip(axes, titles.items(), strict=False):
        x = clouds[name][:1500]
        colour = "#444444" if name == EXACT else COLOURS[name]
        axis.scatter(*x.T, s=3, color=colour, alpha=0.5, linewidths=0)
        axis.set(title=title, xlim=(-10, 10), ylim=(-10, 10), aspect="equal", xticks=[], yticks=[])
        for centre, share in ((5, shares[name][0]), (-5, 1 - shares[name][0])):
            axis.text(centre, centre - 4.4 if centre > 0 else centre + 4.4, f"{share:.1%}", ha="center", va="center")
    names = [name for name in COLOURS if any(r["sampler"] == name for r in records)]
    for name in names:
        rows = [r for r in records if r["sampler"] == name]
        means, errors = zip(*(r["share"] for r in rows), strict=True)
        label = {PAPER: "annealed, as in the paper's code", REVERSE: "DDPM chain, same ladder"}.get(name, name)
        axes[3].errorbar(
            [r["calls"] for r in rows], means, errors, label=label, color=COLOURS[name], marker="o", ms=4, capsize=2
        )
    axes[3].axhline(0.8, color="#444444", lw=0.8, ls="--")
    axes[3].set(
        xscale="log",
        ylim=(0.45, 0.85),
        xlabel="score calls per chain",
        title="Share of the larger mode (0.8 is right)",
    )
    axes[3].set_xticks(budgets := sorted({r["budget"] for r in records}), [f"{calls:,}" for calls in budgets])
    axes[3].minorticks_off()
    axes[3].legend(loc="center", bbox_to_anchor=(0.6, 0.4), frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes[3].spines[side].set_visible(False)
    figure.savefig(out / "mode_weights.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
