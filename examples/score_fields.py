r"""Pictures of score matching in the plane: fields, paths, what goes wrong without smoothing, and attractors.

    python examples/score_fields.py --output-dir runs/score_fields

In about a minute on a CPU it trains three small networks and writes four figures and the numbers in them:

    score_fields_learnt.png        a score learnt by denoising score matching beside the exact one, at three levels
    score_fields_paths.png         Langevin dynamics on exact scores, plain and annealed, on two far modes
    score_fields_unsmoothed.png    a score learnt without noise is wrong where there are no data; annealing mends it
    score_fields_attractors.png    where denoising again and again ends, for stored points and for a linear denoiser
    score_fields.json              the numbers

The laws are mixtures, so all exact scores are closed forms. What is seen is explained on docs/score_matching.md.
"""

import argparse
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import PIL.Image
import torch
from diffusers.utils.logging import tqdm
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from torch import nn

from annealers import AnnealedLangevinScheduler, PointScoreModel, exact
from annealers.data.toys import moons, two_modes
from annealers.denoising import DenoisingAutoencoder, LinearDenoisingAutoencoder, attraction_rate, iterative_denoising
from annealers.schedulers.langevin import langevin_step
from annealers.score_matching import denoising_score_matching, implicit_score_matching, score_weight

Field = Callable[[torch.Tensor], torch.Tensor]  # (N, 2, 1, 1) -> (N, 2, 1, 1)

INK, BLUE, RED, GOLD, GREY = "#2b2b2b", "#1f6f8b", "#c0504d", "#d9a441", "#9a9a9a"
DENSITY = matplotlib.colors.LinearSegmentedColormap.from_list("density", ["#ffffff", "#cfe3ec", "#7fb2c4"])
NOISE = matplotlib.colors.LinearSegmentedColormap.from_list("noise", ["#173f4f", BLUE, "#7fb2c4", "#e2c48d", GOLD])
ERROR = matplotlib.colors.LinearSegmentedColormap.from_list("error", ["#ffffff", "#f0d3c9", RED])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000, help="training steps of each network")
    parser.add_argument("--chains", type=int, default=2000, help="Langevin chains of which shares are counted")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    options.output_dir.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.edgecolor": GREY, "axes.linewidth": 0.6})
    figures = {
        "learnt": lambda: learnt_scores(options.steps, options.seed),
        "paths": lambda: langevin_paths(options.chains, options.seed),
        "unsmoothed": lambda: without_smoothing(options.steps, options.chains, options.seed),
        "attractors": attractors,
    }
    numbers: dict[str, Any] = {}
    for name, make in figures.items():
        figure, numbers[name] = make()
        save(figure, options.output_dir / f"score_fields_{name}.png")
        print(f"{name}: {json.dumps(numbers[name])}", flush=True)
    (options.output_dir / "score_fields.json").write_text(json.dumps(numbers, indent=1) + "\n")


# ---- a learnt score beside the exact one ----------------------------------------------------------------------------

SHOWN_LEVELS = (1.0, 0.3, 0.1)
TRAINING_POINTS, BATCH = 50_000, 256


def learnt_scores(steps: int, seed: int) -> tuple[plt.Figure, dict[str, Any]]:
    law, scheduler = moons(), ladder(levels=100, sigma_min=0.05, sigma_max=5.0)
    network = trained_by_denoising(law, scheduler, steps, seed)
    levels = [0.05 * 100 ** (i / 19) for i in range(20)]
    errors = [relative_error(law, network, scheduler, level, seed) for level in levels]

    figure = plt.figure(figsize=(13, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=[1, 1, 1, 1.05])
    for column, level in enumerate(SHOWN_LEVELS):
        field = SmoothedScore(network, scheduler, level)
        rows = (("exact", lambda y, s=field.noise_level: law.score(y, 1.0, s)), ("learnt", field))
        for row, (name, score) in enumerate(rows):
            axis = plane(figure.add_subplot(grid[row, column]), 2.8)
            draw_density(axis, law, 2.8, field.noise_level)
            draw_field(axis, score, 2.8, INK if row == 0 else RED)
            axis.set_title(f"{name} score, σ = {field.noise_level:.2g}")
    axis = figure.add_subplot(grid[:, 3])
    axis.loglog(levels, errors, color=RED, marker="o", ms=4)
    axis.set(xlabel="noise level σ", title="relative error of the learnt score (RMS)")
    axis.set_ylim(min(0.02, 0.8 * min(errors)), max(1.0, 1.2 * max(errors)))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3, which="both", lw=0.4)
    return figure, {f"{level:.3f}": error for level, error in zip(levels, errors, strict=True)}


def ladder(levels: int, sigma_min: float, sigma_max: float, **settings: Any) -> AnnealedLangevinScheduler:
    return AnnealedLangevinScheduler(
        levels,
        beta_schedule="geometric",
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        clip_sample=False,
        **settings,
    )


def trained_by_denoising(
    law: exact.Law, scheduler: AnnealedLangevinScheduler, steps: int, seed: int
) -> PointScoreModel:
    """A network of all noise levels: denoising score matching, weighted with sigma^2."""
    torch.manual_seed(seed)
    network = PointScoreModel(hidden=128, layers=3, num_train_timesteps=len(scheduler))
    generator = torch.Generator().manual_seed(seed)
    points = training_points(law)
    optimizer, schedule = adam(network, steps)
    for _ in tqdm(range(steps), desc="denoising score matching"):
        x_0 = points[torch.randint(len(points), (BATCH,), generator=generator)]
        noise = torch.randn(x_0.shape, generator=generator)
        t = torch.randint(len(scheduler), (BATCH,), generator=generator)
        _, sigma = scheduler.signal_and_noise(t, torch.float32)
        score = -network(scheduler.add_noise(x_0, noise, t), t).sample / sigma[:, None, None, None]
        weight = score_weight("sigma_squared", scheduler, t)
        (weight * denoising_score_matching(score, noise, sigma)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return network.eval()


def training_points(law: exact.Law) -> torch.Tensor:
    return law.sample(TRAINING_POINTS, generator=torch.Generator().manual_seed(0)).float()


def adam(network: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


class SmoothedScore:
    """The learnt score of data with noise, grad log p_sigma(y) = (DAE(y) - y) / sigma^2."""

    def __init__(self, network: nn.Module, scheduler: AnnealedLangevinScheduler, level: float) -> None:
        self.dae = DenoisingAutoencoder(network, scheduler, level)
        self.noise_level = self.dae.noise_level

    @torch.no_grad()
    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        return (self.dae(y) - y) / self.noise_level**2


def relative_error(
    law: exact.Law, network: nn.Module, scheduler: AnnealedLangevinScheduler, level: float, seed: int
) -> float:
    """Root of E|s-hat - s|^2 / E|s|^2 over the noisy data."""
    field = SmoothedScore(network, scheduler, level)
    y = law.sample(4000, 1.0, field.noise_level, generator=torch.Generator().manual_seed(seed + 1)).float()
    return relative_difference(field, lambda x: law.score(x, 1.0, field.noise_level), y)


# ---- Langevin paths -------------------------------------------------------------------------------------------------

SHOWN_PATHS, EXTENT = 14, 13.0
PATH_LEVELS, STEPS_PER_LEVEL = 60, 10


def langevin_paths(chains: int, seed: int) -> tuple[plt.Figure, dict[str, Any]]:
    law = two_modes()
    scheduler = ladder(PATH_LEVELS, sigma_min=0.1, sigma_max=20.0, steps_per_level=STEPS_PER_LEVEL)
    scheduler.set_timesteps(PATH_LEVELS)
    generator = torch.Generator().manual_seed(seed)
    start = 8 * (2 * torch.rand(chains, 2, 1, 1, generator=generator, dtype=torch.float64) - 1)
    plain = plain_langevin(law.score, start, 0.05, len(scheduler.timesteps), generator)
    annealed = annealed_langevin(law.as_model(scheduler), scheduler, start, generator)
    shares = {
        name: float((states[-1].sum(dim=1) > 0).double().mean())
        for name, states in (("plain", plain), ("annealed", annealed))
    }

    figure, axes = plt.subplots(2, 2, figsize=(10.5, 8.6), layout="constrained", height_ratios=[1.55, 1])
    noise_levels = [ratio(scheduler, t) for t in scheduler.timesteps] + [ratio(scheduler, scheduler.timesteps[-1])]
    calls = len(scheduler.timesteps)
    for column, (name, states) in enumerate((("plain", plain), ("annealed", annealed))):
        axis = plane(axes[0, column], EXTENT)
        draw_density(axis, law, EXTENT)
        for chain in range(SHOWN_PATHS):
            path = states[:, chain]
            if name == "plain":
                axis.plot(*path.T, color=RED, lw=0.5, alpha=0.55)
            else:
                dots = axis.scatter(*path.T, c=noise_levels, cmap=NOISE, norm=LogNorm(0.1, 20), s=2.5, linewidths=0)
            axis.plot(*path[-1], "o", color=INK, ms=3.5, zorder=3)
        share = shares[name]
        axis.set_title(f"{name} Langevin: {share:.0%} of the chains end in the larger mode")
        along = states.sum(dim=2) / math.sqrt(2)  # (calls + 1, chains)
        draw_evolution(axes[1, column], along, 2 * EXTENT)
        axes[1, column].set(xlabel="score call", title=f"all {chains:,} chains, along the line through the modes")
        axes[1, column].axhline(5 * math.sqrt(2), color=INK, lw=0.6, ls=":")
        axes[1, column].axhline(-5 * math.sqrt(2), color=INK, lw=0.6, ls=":")
    figure.colorbar(dots, ax=axes[0, 1], shrink=0.7, label="noise level σ")
    return figure, {"calls": calls, "share of the larger mode": shares, "right": 0.8}


def plain_langevin(
    score: Field, start: torch.Tensor, step_size: float, steps: int, generator: torch.Generator
) -> torch.Tensor:
    """All states in the plane, (steps + 1, N, 2)."""
    states = [start]
    for _ in range(steps):
        noise = torch.randn(start.shape, generator=generator, dtype=start.dtype)
        states.append(langevin_step(states[-1], -score(states[-1]), 1.0, step_size, noise))
    return torch.stack(states).flatten(2)


@torch.no_grad()
def annealed_langevin(
    network: nn.Module, scheduler: AnnealedLangevinScheduler, start: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """All states, (calls + 1, N, 2), in the coordinates of the data: those of the ladder over alpha."""
    states, x = [], start * scheduler.signal_and_noise(scheduler.timesteps[0])[0]
    for t in scheduler.timesteps:
        states.append(x / scheduler.signal_and_noise(t)[0])
        x = scheduler.step(network(x, t).sample, t, x, generator=generator).prev_sample
    return torch.stack([*states, x]).flatten(2)


def ratio(scheduler: AnnealedLangevinScheduler, t: torch.Tensor) -> float:
    alpha, sigma = scheduler.signal_and_noise(t)
    return float(sigma / alpha)


def draw_evolution(axis: Axes, along: torch.Tensor, extent: float) -> None:
    """How many chains are where, against time."""
    bins = torch.linspace(-extent, extent, 81, dtype=along.dtype)
    counts = (
        torch.stack([torch.histogram(row, bins).hist for row in along], dim=1) / along.shape[1]
    )  # (bins, calls + 1)
    axis.imshow(
        counts.sqrt().clamp(max=float(counts[:, -1].sqrt().max())),
        origin="lower",
        aspect="auto",
        cmap=DENSITY,
        extent=(0, len(along) - 1, -extent, extent),
    )


# ---- a score learnt without noise -----------------------------------------------------------------------------------

GAP_SIDE = 3.0
GAP_WEIGHTS, GAP_DEVIATION = torch.tensor([0.45, 0.3, 0.15, 0.1]), 0.1
GAP_CENTRES = torch.tensor([[1.8, 1.4], [-1.6, 1.7], [-1.3, -1.7], [1.7, -1.5]])


def separated_modes() -> exact.GaussianMixture:
    """Four modes of unequal weight with nothing between them."""
    return exact.GaussianMixture(GAP_WEIGHTS, GAP_CENTRES.reshape(4, 2, 1, 1), [GAP_DEVIATION**2] * 4)


def without_smoothing(steps: int, chains: int, seed: int) -> tuple[plt.Figure, dict[str, Any]]:
    law = separated_modes()
    plain_field = trained_without_noise(law, steps, seed)
    scheduler = ladder(40, sigma_min=0.03, sigma_max=5.0, steps_per_level=20)
    network = trained_by_denoising(law, scheduler, steps, seed)
    scheduler.set_timesteps(40)

    generator = torch.Generator().manual_seed(seed + 2)
    start = GAP_SIDE * (2 * torch.rand(chains, 2, 1, 1, generator=generator) - 1)
    stuck = plain_langevin(plain_field, start, 0.2 * GAP_DEVIATION**2, len(scheduler.timesteps), generator)[-1]
    mended = annealed_langevin(network, scheduler, start, generator)[-1]

    at_data = law.sample(2000, generator=generator).float()
    numbers = {
        "relative error where the data are": relative_difference(plain_field, law.score, at_data),
        "relative error where they are not": relative_difference(plain_field, law.score, far_from(law, start)),
        "share of chains farther than 3 deviations from any mode": {},
        "total variation of the mode weights": {},
    }
    for name, end in (("without noise", stuck), ("annealed", mended)):
        distances = torch.cdist(end, GAP_CENTRES)
        shares = torch.bincount(distances.argmin(dim=1), minlength=4) / len(end)
        numbers["share of chains farther than 3 deviations from any mode"][name] = float(
            (distances.amin(dim=1) > 3 * GAP_DEVIATION).double().mean()
        )
        numbers["total variation of the mode weights"][name] = float((shares - GAP_WEIGHTS).abs().sum() / 2)

    figure, axes = plt.subplots(1, 4, figsize=(14.4, 4.0), layout="constrained")
    for axis in axes:
        plane(axis, GAP_SIDE)
    draw_density(axes[0], law, GAP_SIDE)
    draw_field(axes[0], law.score, GAP_SIDE, INK)
    axes[0].set_title("exact score of the data")
    image = draw_error(axes[1], plain_field, law.score, GAP_SIDE)
    draw_field(axes[1], plain_field, GAP_SIDE, INK)
    axes[1].set_title("learnt without noise; red: error")
    figure.colorbar(image, ax=axes[1], shrink=0.7, ticks=[0, 0.5, 1], label="relative error")
    for axis, end, name in ((axes[2], stuck, "without noise"), (axes[3], mended, "annealed")):
        draw_density(axis, law, GAP_SIDE)
        axis.scatter(*end.T[:, :1500], s=3, color=RED if name == "without noise" else BLUE, alpha=0.6, linewidths=0)
        variation = numbers["total variation of the mode weights"][name]
        axis.set_title(f"chains, {name}: weights off by {variation:.2f}")
    return figure, numbers


def trained_without_noise(law: exact.Law, steps: int, seed: int) -> Field:
    """Implicit score matching on the data as they are, with the exact divergence."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(2, 128), nn.Softplus(), nn.Linear(128, 128), nn.Softplus(), nn.Linear(128, 2))

    def field(x: torch.Tensor) -> torch.Tensor:
        return network(x.flatten(1)).reshape(x.shape)

    generator = torch.Generator().manual_seed(seed)
    points = training_points(law)
    optimizer, schedule = adam(network, steps)
    for _ in tqdm(range(steps), desc="implicit score matching"):
        x = points[torch.randint(len(points), (BATCH,), generator=generator)]
        implicit_score_matching(field, x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return torch.no_grad()(field)


def relative_difference(field: Field, right: Field, x: torch.Tensor) -> float:
    """Root of the mean square of the error over that of the right field."""
    return float(((field(x) - right(x)) ** 2).mean().sqrt() / (right(x) ** 2).mean().sqrt())


def far_from(law: exact.Law, x: torch.Tensor) -> torch.Tensor:
    """The points whose density is below e^-12 of the highest: 5 deviations from a mode and more."""
    log_density = law.log_prob(x)
    return x[log_density < law.log_prob(law.sample(1000, generator=torch.Generator().manual_seed(0))).max() - 12]


def draw_error(axis: Axes, field: Field, right: Field, extent: float) -> Any:
    """The length of the error over that of the right field, or over 1 / deviation where that field vanishes."""
    points = mesh(extent, 120)
    error, length = (field(points) - right(points)).flatten(1).norm(dim=1), right(points).flatten(1).norm(dim=1)
    relative = (error / length.clamp(min=1 / GAP_DEVIATION)).reshape(120, 120)
    return axis.imshow(relative, origin="lower", extent=(-extent, extent) * 2, cmap=ERROR, vmin=0, vmax=1)


# ---- attractors of denoising ----------------------------------------------------------------------------------------

STORED = torch.tensor([[-1.7, 1.3], [-0.4, 1.9], [1.6, 1.2], [1.9, -0.6], [0.3, -0.2], [-1.4, -0.9], [-0.3, -1.8]])
ATTRACTOR_LEVELS = (0.3, 0.75, 2.0)
BASINS = ListedColormap(["#cfe3ec", "#f3e3c3", "#ecd3ce", "#d9e6d2", "#e3dcec", "#e6e6e6", "#d3e8e6"])


def attractors() -> tuple[plt.Figure, dict[str, Any]]:
    law = exact.FiniteData(STORED.double())
    denoisers: dict[str, Any] = {
        f"σ = {level:g}": lambda x, s=level: law.denoise(x, 1.0, s) for level in ATTRACTOR_LEVELS
    }
    linear = LinearDenoisingAutoencoder.from_data(STORED.double(), rank=1)
    figure, axes = plt.subplots(1, 4, figsize=(14.4, 4.0), layout="constrained")
    numbers: dict[str, Any] = {"stored points": len(STORED), "attractors": {}, "slowest rate at an attractor": {}}
    for axis, (name, denoiser) in zip(axes, denoisers.items(), strict=False):
        ends, found = basins(denoiser)
        numbers["attractors"][name] = found.tolist()
        numbers["slowest rate at an attractor"][name] = float(attraction_rate(denoiser, found).max())
        plane(axis, GAP_SIDE)
        axis.imshow(
            ends.reshape(80, 80) % BASINS.N,
            origin="lower",
            extent=(-GAP_SIDE, GAP_SIDE) * 2,
            cmap=BASINS,
            vmin=0,
            vmax=BASINS.N - 1,
            interpolation="nearest",
        )
        draw_denoising(axis, denoiser)
        axis.plot(*found.T, "*", color=RED, ms=11, mec="white", mew=0.6, zorder=4)
        plural = "s" if len(found) > 1 else ""
        axis.set_title(f"{len(STORED)} stored points, {name}: {len(found)} attractor{plural}")
    axis = plane(axes[3], GAP_SIDE)
    direction, centre = linear.directions[:, 0], linear.mean
    line = torch.stack([centre - 5 * direction, centre + 5 * direction])
    axis.plot(*line.T, color=RED, lw=1.4, zorder=1)
    draw_denoising(axis, linear)
    axis.set_title("linear, m + VVᵀ(x − m): a line of fixed points")
    numbers["linear"] = {
        "rate at the stored points": float(attraction_rate(linear, STORED.double()).mean()),
        "stored points that stay": int(((linear(STORED.double()) - STORED).norm(dim=1) < 1e-6).sum()),
        "largest distance of an end from the line": float(distance_from_line(linear)),
    }
    return figure, numbers


def basins(denoiser: Field) -> tuple[torch.Tensor, torch.Tensor]:
    """For each point of a mesh the number of the attractor where it ends, and the attractors, (A, 2)."""
    ends = iterative_denoising(denoiser, mesh(GAP_SIDE, 80).flatten(1).double(), 1.0, 200)
    found, index, counts = ends.round(decimals=2).unique(dim=0, return_inverse=True, return_counts=True)
    kept = counts > 10  # a few points on a border have not left it
    position = torch.cdist(ends, ends[torch.stack([(index == i).nonzero()[0, 0] for i in kept.nonzero()[:, 0]])])
    return position.argmin(dim=1), torch.stack([ends[index == i][0] for i in kept.nonzero()[:, 0]])


def distance_from_line(linear: LinearDenoisingAutoencoder) -> torch.Tensor:
    ends = iterative_denoising(linear, mesh(GAP_SIDE, 20).flatten(1).double(), 0.5, 60)
    across = torch.stack([-linear.directions[1, 0], linear.directions[0, 0]])
    return ((ends - linear.mean) @ across).abs().max()


def draw_denoising(axis: Axes, denoiser: Field) -> None:
    """Arrows half the way from x to DAE(x), the stored points, and paths of small steps."""
    x = mesh(GAP_SIDE * 0.93, 11).flatten(1).double()
    way = 0.5 * (denoiser(x) - x)
    axis.quiver(*x.T, *way.T, angles="xy", scale_units="xy", scale=1, width=0.0028, headwidth=5, color=INK, alpha=0.55)
    starts = torch.tensor([[-2.6, 2.6], [2.5, 2.4], [2.6, -2.3], [-2.6, -2.5], [0.9, 0.6]], dtype=torch.float64)
    paths = iterative_denoising(denoiser, starts, 0.08, 200, return_trajectory=True)
    axis.plot(*paths.permute(2, 0, 1), color=BLUE, lw=1.6, zorder=3)
    axis.plot(*starts.T, "o", color=BLUE, ms=3.5, zorder=3)
    axis.plot(*STORED.T, "o", mfc="white", mec=INK, ms=6, zorder=3.5)


# ---- drawing --------------------------------------------------------------------------------------------------------


def mesh(extent: float, side: int) -> torch.Tensor:
    """Points of a square, row by row from below, (side^2, 2, 1, 1)."""
    marks = torch.linspace(-extent, extent, side)
    return torch.cartesian_prod(marks, marks).flip(1).reshape(-1, 2, 1, 1)


def save(figure: plt.Figure, path: Path) -> None:
    """With 256 colours, half the size."""
    with io.BytesIO() as file:
        figure.savefig(file, dpi=100)
        PIL.Image.open(file).convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE).save(path, optimize=True)
    plt.close(figure)


def plane(axis: Axes, extent: float) -> Axes:
    axis.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", xticks=[], yticks=[])
    return axis


def draw_density(axis: Axes, law: exact.Law, extent: float, noise_level: float = 0.0) -> None:
    """The root of the density, so that thin parts show."""
    density = law.log_prob(mesh(extent, 150), 1.0, noise_level).exp().sqrt().reshape(150, 150)
    axis.imshow(density, origin="lower", extent=(-extent, extent) * 2, cmap=DENSITY, interpolation="bilinear")


def draw_field(axis: Axes, field: Field, extent: float, colour: str) -> None:
    """Arrows whose length grows as the root of the field's, so that small ones show beside large ones."""
    points = mesh(extent * 0.93, 17)
    arrows = field(points).flatten(1)
    length = arrows.norm(dim=1, keepdim=True)
    arrows = arrows / length.clamp(min=1e-12) * (length / length.max()).sqrt()
    axis.quiver(
        *points.flatten(1).T,
        *arrows.T,
        angles="xy",
        scale_units="xy",
        scale=17 / (2.2 * extent),
        width=0.0035,
        color=colour,
    )


if __name__ == "__main__":
    main()
