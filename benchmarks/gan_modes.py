r"""Mode coverage: how much of a ring of 8 and of a grid of 25 Gaussians a GAN with each loss covers.

    python benchmarks/gan_modes.py --out benchmarks/results

Generator and discriminator are perceptrons with three hidden layers of 64, ReLU and leaky ReLU, initialised as PyTorch
does; 8 normal latents; 20,000 points of the law, `annealers.data.toys`, in batches of 128. All have the same number of
generator steps and the same learning rate. It falls linearly to 0, so that the last generator is no chance moment of
an oscillation. The optimizer's other numbers, discriminator steps per generator step and weights of penalties are
those of the papers, `RECIPES`. No loss was tuned.

    good            share of samples within three deviations of a mode; of the law itself 1 - exp(-9/2) = .989
    covered         modes within three deviations of which lies at least a quarter of their due, 1/8 or 1/25 of all
    unevenness      total variation distance of the shares of the modes, each sample counted for the nearest, to even

Each is of 10,000 samples of the last generator, and the mean over seeds with its standard deviation.

Also drawn is what the generator's losses and their gradients are as functions of the logit. The page on both is
docs/gan_losses.md.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.nn.functional import leaky_relu
from torch.optim.lr_scheduler import LinearLR

from annealers.data.toys import TOYS
from annealers.gan_losses import (
    GAN_LOSSES,
    GANLoss,
    clip_weights_,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    r1_penalty,
)

LAWS = ("ring", "grid")
DEVIATION = {"ring": 0.1, "grid": 0.05}
ANGLES, MARKS = torch.arange(8).double() * (torch.pi / 4), 0.7 * torch.arange(-2, 3).double()
CENTRES = {
    "ring": 2**0.5 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1),  # (K, 2)
    "grid": torch.cartesian_prod(MARKS, MARKS),
}
POINTS = 20_000
WIDTH, LATENTS, BATCH = 64, 8, 128
LEARNING_RATE = 1e-3  # at the start
SAMPLES = 10_000


@dataclass(frozen=True)
class Recipe:
    """How one loss is trained."""

    kind: GANLoss
    discriminator_steps: int = 1
    betas: tuple[float, float] | None = (0.5, 0.999)  # of Adam; None: RMSprop
    gradient_penalty: float = 0.0
    r1: float = 0.0
    clip: float | None = None


RECIPES = {
    "minimax": Recipe("minimax"),  # these four as DCGAN, Radford et al. 2016, Sec. 4
    "non-saturating": Recipe("non_saturating"),
    "least squares": Recipe("least_squares"),
    "hinge": Recipe("hinge"),
    "Wasserstein, clipping": Recipe("wasserstein", 5, betas=None, clip=0.01),  # Arjovsky et al. 2017, Alg. 1
    "Wasserstein, gradient penalty": Recipe("wasserstein", 5, (0.0, 0.9), gradient_penalty=10.0),  # Gulrajani, Alg. 1
    "non-saturating, R1": Recipe("non_saturating", betas=(0.0, 0.99), r1=10.0),  # Mescheder et al. 2018
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of gan_modes.json, .md, .png and gan_losses.png"
    )
    parser.add_argument("--losses", nargs="+", default=list(RECIPES), choices=list(RECIPES), help="which of them")
    parser.add_argument("--laws", nargs="+", default=list(LAWS), choices=LAWS, help="of which data")
    parser.add_argument("--steps", type=int, default=3000, help="generator steps")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, for the deviations; 2 or more")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"a deviation needs 2 seeds or more, got {options.seeds}")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)

    started, records, clouds = time.process_time(), [], {}
    for law in options.laws:
        exact = [data(law, torch.Generator().manual_seed(seed), SAMPLES) for seed in range(options.seeds)]
        records.append({"law": law, "loss": EXACT, **summary([measures(x, law) for x in exact])})
        clouds[law, EXACT] = exact[0]
        for loss in options.losses:
            begun = time.process_time()
            samples = Game(RECIPES[loss], law, options.seeds).play(options.steps)
            seconds = (time.process_time() - begun) / options.seeds
            measured = [measures(x, law) for x in samples]
            records.append({"law": law, "loss": loss, **summary(measured), "cpu_seconds": round(seconds, 1)})
            clouds[law, loss] = samples[0]
            print(f"{law}, {loss}: {measured}, {seconds:.0f} s of processor time each", flush=True)
    vanishing = {kind: gradients_ahead(kind) for kind in GAN_LOSSES}

    record = {
        "command": "python " + shlex.join(["benchmarks/gan_modes.py", *sys.argv[1:]]),
        "hardware": f"one thread of {os.cpu_count()} CPU cores ({platform.machine()})",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "cpu_seconds": round(time.process_time() - started),
        "settings": {name: getattr(options, name) for name in ("steps", "seeds")}
        | {"width": WIDTH, "latents": LATENTS, "batch": BATCH, "learning_rate": LEARNING_RATE, "samples": SAMPLES},
        "recipes": {loss: asdict(RECIPES[loss]) for loss in options.losses},
        "records": records,
        "gradient_norm_of_the_generator": {"discriminator_steps": list(AHEAD), **vanishing},
    }
    (options.out / "gan_modes.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "gan_modes.md").write_text(table(record))
    draw_losses(vanishing, options.out)
    draw_samples(records, clouds, options.out)


# ---- the game -------------------------------------------------------------------------------------------------------


class Game:
    """One generator and one discriminator for each seed, which learn side by side and independently of each other."""

    def __init__(self, recipe: Recipe, law: str, seeds: int) -> None:
        self.recipe = recipe
        self.generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        self.points = torch.stack([data(law, generator, POINTS) for generator in self.generators])  # (S, POINTS, 2)
        self.G = Perceptrons(LATENTS, 2, slope=0.0, generators=self.generators)
        self.D = Perceptrons(2, 1, slope=0.2, generators=self.generators)
        self.of_G, self.of_D = (optimizer(network, recipe) for network in (self.G, self.D))

    def play(self, steps: int) -> torch.Tensor:
        """Samples of the generators after so many of their steps, (S, SAMPLES, 2)."""
        falling = [LinearLR(optimizer, 1.0, 0.0, total_iters=steps) for optimizer in (self.of_G, self.of_D)]
        for _ in range(steps):
            for _ in range(self.recipe.discriminator_steps):
                self.discriminator_step()
            self.generator_step()
            for schedule in falling:
                schedule.step()
        with torch.no_grad():
            return self.G(self.latents(SAMPLES)).unflatten(0, (-1, SAMPLES))

    def discriminator_step(self) -> None:
        recipe, D = self.recipe, self.D
        index = self.each(lambda generator: torch.randint(POINTS, (BATCH,), generator=generator))
        real = self.points.flatten(0, 1)[(index + POINTS * torch.arange(len(index))[:, None]).flatten()]
        with torch.no_grad():
            fake = self.G(self.latents())
        loss = discriminator_loss(recipe.kind, D(real), D(fake))
        if recipe.gradient_penalty:
            alpha = self.each(lambda generator: torch.rand(BATCH, generator=generator)).flatten()
            loss = loss + recipe.gradient_penalty * gradient_penalty(D, real, fake, alpha)
        if recipe.r1:
            loss = loss + recipe.r1 * r1_penalty(D, real)
        self.of_D.zero_grad()
        (loss.sum() / BATCH).backward()  # of each seed the mean
        self.of_D.step()
        if recipe.clip is not None:
            clip_weights_(D, recipe.clip)

    def generator_step(self) -> None:
        self.D.requires_grad_(False)
        loss = generator_loss(self.recipe.kind, self.D(self.G(self.latents()))).sum() / BATCH
        self.of_G.zero_grad()
        loss.backward()
        self.of_G.step()
        self.D.requires_grad_(True)

    def latents(self, count: int = BATCH) -> torch.Tensor:
        """(S * count, LATENTS)."""
        return self.each(lambda generator: torch.randn(count, LATENTS, generator=generator)).flatten(0, 1)

    def each(self, draw: Callable[[torch.Generator], torch.Tensor]) -> torch.Tensor:
        """What is drawn for each seed, (S, *)."""
        return torch.stack([draw(generator) for generator in self.generators])


class Perceptrons(nn.Module):
    """A network for each seed, with three hidden layers, (S * n, inputs) -> (S * n, outputs)."""

    def __init__(self, inputs: int, outputs: int, slope: float, generators: list[torch.Generator]) -> None:
        super().__init__()
        self.slope, widths = slope, [inputs, WIDTH, WIDTH, WIDTH, outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in zip(widths[:-1], widths[1:], strict=True):  # uniform, as those of nn.Linear are
            for parameters, shape in ((self.weights, (i, o)), (self.biases, (1, o))):
                draws = [2 * torch.rand(shape, generator=generator) - 1 for generator in generators]
                parameters.append(nn.Parameter(torch.stack(draws) / i**0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(len(self.weights[0]), -1, x.shape[-1])  # (S, n, inputs)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = leaky_relu(torch.baddbmm(bias, x, weight), self.slope)
        return torch.baddbmm(self.biases[-1], x, self.weights[-1]).flatten(0, 1)


def optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.betas is None:
        return torch.optim.RMSprop(network.parameters(), LEARNING_RATE)
    return torch.optim.Adam(network.parameters(), LEARNING_RATE, recipe.betas, fused=True)


def data(law: str, generator: torch.Generator, count: int) -> torch.Tensor:
    """Points of a law, (count, 2)."""
    return TOYS[law]().sample(count, generator=generator).flatten(1)


AHEAD = (0, 10, 20, 50, 100, 200, 500, 1000, 2000)


def gradients_ahead(kind: GANLoss) -> list[float]:
    """Norms of the gradient of a new generator on the ring, after `AHEAD` steps of the discriminator alone."""
    game, norms = Game(Recipe(kind), "ring", seeds=1), []
    probe = game.latents(4096)
    for step in range(AHEAD[-1] + 1):
        if step in AHEAD:
            loss = generator_loss(kind, game.D(game.G(probe))).mean()
            gradients = torch.autograd.grad(loss, list(game.G.parameters()))
            norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
        game.discriminator_step()
    return norms


# ---- measures -------------------------------------------------------------------------------------------------------


def measures(x: torch.Tensor, law: str) -> dict[str, float]:
    """Of samples (n, 2)."""
    centres = CENTRES[law]
    distance, nearest = torch.cdist(x.double(), centres).min(dim=1)
    good = distance <= 3 * DEVIATION[law]
    K = len(centres)
    shares = torch.bincount(nearest, minlength=K) / len(x)
    covered = torch.bincount(nearest[good], minlength=K) / len(x) >= 1 / (4 * K)
    return {
        "covered": int(covered.sum()),
        "good": round(float(good.double().mean()), 4),
        "unevenness": round(float((shares - 1 / K).abs().sum() / 2), 4),
    }


def summary(seeds: list[dict[str, float]]) -> dict[str, Any]:
    """What was measured for each seed, and of each measure the mean and standard deviation over them."""
    values = {name: [measured[name] for measured in seeds] for name in seeds[0]}
    return {"seeds": values} | {name: [float(np.mean(v)), float(np.std(v, ddof=1))] for name, v in values.items()}


# ---- table and figures ----------------------------------------------------------------------------------------------

EXACT = "the law itself"


def table(record: dict[str, Any]) -> str:
    settings = record["settings"]
    lines = [
        "# Mode coverage",
        "",
        f"{settings['steps']:,} generator steps; mean of {settings['seeds']} seeds ± their standard deviation. "
        f"`{record['command']}`, {record['hardware']}, torch {record['versions']['torch']}.",
        "",
        "| law | loss | modes covered | good samples | unevenness | processor seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["records"]:
        covered = "{:.1f} ± {:.1f}".format(*row["covered"]) + f" of {len(CENTRES[row['law']])}"
        others = " | ".join("{:.3f} ± {:.3f}".format(*row[name]) for name in ("good", "unevenness"))
        lines.append(f"| {row['law']} | {row['loss']} | {covered} | {others} | {row.get('cpu_seconds', '—')} |")
    return "\n".join(lines) + "\n"


COLOURS = {
    "minimax": "#c0504d",
    "non_saturating": "#1f6f8b",
    "least_squares": "#b8860b",
    "wasserstein": "#9a9a9a",
    "hinge": "#444444",
}
NAMES = {
    "minimax": "minimax, log(1 − D)",
    "non_saturating": "non-saturating, −log D",
    "least_squares": "least squares",
    "wasserstein": "Wasserstein",
    "hinge": "hinge",
}


def draw_losses(vanishing: dict[str, list[float]], out: Path) -> None:
    """The generator's losses, their slopes, and what is left of the gradient where the discriminator is ahead."""
    figure, axes = plt.subplots(1, 3, figsize=(12.6, 3.6), layout="constrained")
    logits = torch.linspace(-10, 10, 401, dtype=torch.float64)[:, None].requires_grad_()
    for kind, norms in vanishing.items():
        loss = generator_loss(kind, logits)
        (slope,) = torch.autograd.grad(loss.sum(), logits)
        style = {"color": COLOURS[kind], "label": NAMES[kind], "lw": 1.8, "ls": "--" if kind == "hinge" else "-"}
        axes[0].plot(logits.detach(), loss.detach(), **style)
        axes[1].plot(logits.detach(), slope.abs(), **style)
        axes[2].plot([max(step, 5) for step in AHEAD], norms, marker="o", ms=3, **style)
    axes[0].set(title="Loss of the generator", xlabel="logit of a generated sample", ylim=(-11, 11))
    axes[1].set(title="Size of its slope", xlabel="logit of a generated sample", yscale="log", ylim=(1e-4, 20))
    axes[2].set(title="Its gradient for the weights, only D learns", xlabel="steps of D", xscale="log", yscale="log")
    axes[2].set_xticks([5, 10, 100, 1000], ["0", "10", "100", "1,000"])
    axes[2].minorticks_off()
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes[:2]:
        probability = axis.secondary_xaxis(-0.22)
        probability.set_xticks([-9.21, -4.6, 0, 4.6, 9.21], ["1e-4", ".01", "D = .5", ".99", ".9999"], fontsize=8)
    for axis in axes:
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.savefig(out / "gan_losses.png", dpi=110)
    plt.close(figure)


def draw_samples(records: list[dict[str, Any]], clouds: dict[tuple[str, str], torch.Tensor], out: Path) -> None:
    """Samples of the law and of the generator of seed 0 with each loss, a row for each law."""
    laws, losses = (list(dict.fromkeys(key[i] for key in clouds)) for i in (0, 1))
    size = (1.75 * len(losses), 2.2 * len(laws))
    figure, axes = plt.subplots(len(laws), len(losses), figsize=size, squeeze=False, layout="constrained")
    for law, row in zip(laws, axes, strict=True):
        for loss, axis in zip(losses, row, strict=True):
            x = clouds[law, loss][:2000]
            axis.scatter(*CENTRES[law].T, s=60, facecolors="none", edgecolors="#d0d0d0", linewidths=0.6)
            axis.scatter(*x.T, s=1.5, color="#444444" if loss == EXACT else "#1f6f8b", alpha=0.5, linewidths=0)
            axis.set(xlim=(-2.1, 2.1), ylim=(-2.1, 2.1), aspect="equal", xticks=[], yticks=[])
            axis.set_title(loss.replace(", ", ",\n"), fontsize=8)
            (measured,) = (r["seeds"] for r in records if (r["law"], r["loss"]) == (law, loss))
            axis.set_xlabel(f"{measured['covered'][0]} modes, {measured['good'][0]:.0%} good", fontsize=8)
    figure.savefig(out / "gan_modes.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
