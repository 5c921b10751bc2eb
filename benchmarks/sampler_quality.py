"""Quality of samples against network calls, on laws whose best network is known: annealers beside Diffusers.

    python benchmarks/sampler_quality.py --out benchmarks/results

Measured are all of `sampler_candidates`, on the laws and with the measures of `sampler_targets`, at 10, 20, 50 and 100
calls of the network. Everybody gets the same network: that of the linear beta schedule, 1e-4 .. 0.02 in 1000
timesteps, which predicts the noise exactly. Calls are counted, not computed: a scheduler that calls it several times
on a level gets as many levels as fit. On the line there is no Monte-Carlo noise to speak of, see `sampler_noise`; how
much is left is measured too. Elsewhere all candidates start from the same noise, and standard errors are given.

Results go to samplers.json, from which samplers.md and a figure for each law are made. What is already in there stays,
unless it is measured again, so that one sampler can be measured alone, `--match SA-Solver`, and the tables and figures
be made again alone, `--targets` with nothing after it.
"""

import argparse
import inspect
import json
import platform
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin
from sampler_candidates import Candidate, candidates
from sampler_noise import OrderedNoise
from sampler_tables import write_figures, write_tables
from sampler_targets import PATH, TARGETS, ExactNetwork, Target, midpoints
from scipy.special import ndtri

import annealers
from annealers import DDPMAncestralScheduler, exact

BUDGETS = (10, 20, 50, 100)
LARGE_ERROR = 3  # W1 x 1000 up to which the noise that is left may show
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of samplers.json, samplers.md and figures")
    parser.add_argument("--targets", nargs="*", choices=[*TARGETS, "checks"], default=[*TARGETS, "checks"])
    parser.add_argument("--match", default="", help="measure only candidates with this in their name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")

    file = options.out / "samplers.json"
    results = json.loads(file.read_text()) if file.exists() else {"records": [], "checks": {}}
    results["settings"] = settings()
    started = time.perf_counter()
    for name in options.targets:
        if name == "checks":
            results["checks"] = harness_checks()
        else:
            measure_all(TARGETS[name](), options.match, results["records"])
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - started:.0f} s since the start", flush=True)
    write_tables(results, options.out / "samplers.md")
    write_figures(results, options.out)


def measure_all(target: Target, match: str, records: list[dict[str, Any]]) -> None:
    """Measures the candidates with `match` in their name, on all their spacings, at every number of calls."""
    for candidate in candidates():
        if match in candidate.name:
            for spacing in candidate.spacings:
                for budget in BUDGETS:
                    merge(records, measured(target, candidate, spacing, budget))


# ---- one measurement ------------------------------------------------------------------------------------------------


def measured(target: Target, candidate: Candidate, spacing: str, budget: int, seed: int = SEED) -> dict[str, Any]:
    """A record: who, how, and either the numbers or what went wrong."""
    record = {
        "target": target.name,
        "unit": target.unit,
        "samples": target.samples,
        "candidate": candidate.name,
        "family": candidate.family,
        "stochastic": candidate.stochastic,
        "spacing": spacing,
        "budget": budget,
    }
    try:
        x, calls = sampled(target, candidate, spacing, budget, seed)
    except Exception as error:  # one that cannot run on this path is a result, and the others go on
        return record | {"failed": f"{type(error).__name__}: {error}"}
    if not x.isfinite().all():
        return record | {"calls": calls, "failed": "not finite"}
    return record | {"calls": calls} | target.measure(x)


def sampled(target: Target, candidate: Candidate, spacing: str, budget: int, seed: int) -> tuple[torch.Tensor, int]:
    """Samples (n, D), and how many network calls they took."""
    scheduler = candidate.build(PATH, spacing)
    if scheduler.config.get("variance_type") == "optimal":
        scheduler = scheduler.from_config(scheduler.config, mean_squared_noise=mean_squared_noise(target))
    levels = set_most_levels(scheduler, budget)
    if levels == 0:
        raise ValueError(f"no schedule fits {budget} calls")

    network = ExactNetwork(target)
    generator = torch.Generator().manual_seed(seed)
    accepted = inspect.signature(scheduler.step).parameters
    options = {"generator": generator, **candidate.step_options} if "generator" in accepted else candidate.step_options
    on_the_line = target.dimension == 1
    if on_the_line:
        x = torch.from_numpy(ndtri(midpoints(target.samples)))[:, None]
    else:
        x = torch.randn(target.samples, target.dimension, generator=generator, dtype=torch.float64)
    noise = OrderedNoise(seed)
    x = x * scheduler.init_noise_sigma
    with noise.in_schedulers() if on_the_line else nullcontext():
        for t in scheduler.timesteps:
            if on_the_line:
                noise.particles_are_at(x)
            prediction = network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(prediction, t, x, **options).prev_sample
    return x.double(), network.calls


def set_most_levels(scheduler: SchedulerMixin, budget: int) -> int:
    """Sets the longest schedule of at most `budget` calls, and returns its number of levels."""
    for levels in range(budget, 0, -1):
        scheduler.set_timesteps(levels)
        if len(scheduler.timesteps) <= budget:
            return levels
    return 0


STATISTICS: dict[tuple[str, int], list[float]] = {}


def mean_squared_noise(target: Target) -> list[float]:
    """E||eps-hat||^2 / D of the exact network, measured once for each law."""
    key = (target.name, target.samples)
    if key not in STATISTICS:
        scheduler = DDPMAncestralScheduler(**PATH)
        data = target.draw(2000, torch.Generator().manual_seed(SEED + 1))
        noise = OrderedNoise(SEED)
        noise.particles_are_at(data)
        noise_of = noise.in_schedulers if target.dimension == 1 else nullcontext
        network = ExactNetwork(target)

        def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            noise.particles_are_at(data)  # the next level draws anew
            return network(x, t)

        with noise_of():
            STATISTICS[key] = scheduler.calibrate_variance(
                model, data, timesteps=range(1000), generator=torch.Generator().manual_seed(SEED)
            )
    return STATISTICS[key]


def merge(records: list[dict[str, Any]], new: dict[str, Any]) -> None:
    """Puts the new record in the place of the same measurement, if there was one."""
    key = ("target", "candidate", "spacing", "budget")
    records[:] = [old for old in records if any(old[k] != new[k] for k in key)] + [new]


# ---- how sure the line is -------------------------------------------------------------------------------------------


def harness_checks() -> dict[str, Any]:
    """What exact samples score, and how much results on the line move when the particles are twice as many."""
    pairs = []
    for name in ("spikes", "modes", "smooth"):
        few, many = TARGETS[name](), TARGETS[name](2 * TARGETS[name]().samples)
        for candidate in candidates():
            if candidate.stochastic:
                pair = [measured(target, candidate, candidate.spacings[-1], 50) for target in (few, many)]
                if all("error" in record for record in pair):
                    pairs.append((pair[0]["error"], pair[1]["error"], f"{candidate.name}, {name}"))
    relative = [(abs(many / few - 1), who) for few, many, who in pairs if few > LARGE_ERROR]
    absolute = [(abs(many - few), who) for few, many, who in pairs if few <= LARGE_ERROR]
    return {
        "an exact sampler on N(0, 0.35^2), W1 x 1000": {
            f"{levels} calls": exact_sampler_error(levels) for levels in BUDGETS
        },
        f"twice the particles, 50 calls, W1 x 1000 above {LARGE_ERROR}, relative change": {
            "median": float(np.median([change for change, _ in relative])),
            "largest": list(max(relative)),
        },
        f"twice the particles, 50 calls, W1 x 1000 up to {LARGE_ERROR}, absolute change": {
            "median": float(np.median([change for change, _ in absolute])),
            "largest": list(max(absolute)),
        },
        "exact samples, ring": exact_samples_score("ring"),
        "exact samples, low rank": exact_samples_score("low rank"),
    }


def exact_samples_score(name: str) -> dict[str, float]:
    target = TARGETS[name]()
    return target.measure(target.draw(target.samples, torch.Generator().manual_seed(SEED + 2)))


def exact_sampler_error(levels: int) -> float:
    """W1 x 1000 of a sampler that is exact at any number of steps: the optimal variance on a normal law."""
    deviation, samples = 0.35, 16384
    law = exact.Gaussian(torch.zeros(1, dtype=torch.float64), variance=deviation**2)
    scheduler = DDPMAncestralScheduler(**PATH, variance_type="optimal", last_step_noise=True)
    alpha, sigma = scheduler.signal_and_noise(torch.arange(1000))
    statistic = sigma**2 / (alpha**2 * deviation**2 + sigma**2)
    scheduler = scheduler.from_config(scheduler.config, mean_squared_noise=statistic.tolist())
    scheduler.set_timesteps(levels)
    model, noise = law.as_model(scheduler), OrderedNoise(SEED)
    quantiles = torch.from_numpy(ndtri(midpoints(samples)))
    x = quantiles[:, None]
    with noise.in_schedulers():
        for t in scheduler.timesteps:
            noise.particles_are_at(x)
            x = scheduler.step(model(x, t).sample, t, x).prev_sample
    return 1000 * float((x[:, 0].sort().values - deviation * quantiles).abs().mean())


def settings() -> dict[str, Any]:
    return {
        "path": PATH,
        "seed": SEED,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "annealers": annealers.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
