"""Processor time of one `step` of each scheduler of annealers, as a multiple of that of Diffusers' DDPMScheduler.

    python benchmarks/sampler_step_time.py --out benchmarks/results

The network is left out. Each round times one whole schedule of every scheduler, in turn, so that whatever else the
machine does meets all of them alike; what counts is the processor time of the one thread. The ratio is to
DDPMScheduler of the same round, and its median and quartiles are given. The large sample is a batch of four latents of
Stable Diffusion, the tiny one shows what a step costs by itself.
"""

import argparse
import inspect
import json
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from sampler_candidates import OURS, candidates
from sampler_targets import PATH

SHAPES = {"4 x 4 x 64 x 64": (4, 4, 64, 64), "1 x 1 x 8 x 8": (1, 1, 8, 8)}
LEVELS, ROUNDS = 20, 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)

    schedulers: dict[str, SchedulerMixin] = {"DDPMScheduler of Diffusers": DDPMScheduler(**PATH)}
    for candidate in candidates():
        if candidate.family == OURS:
            schedulers[candidate.name] = with_statistic(candidate.build(PATH, "trailing"))
    results = {shape: ratios(schedulers, torch.randn(size)) for shape, size in SHAPES.items()}
    settings = {
        "levels": LEVELS,
        "rounds": ROUNDS,
        "threads": 1,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    file = options.out / "samplers_step_time.json"
    file.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    for shape, rows in results.items():
        print(f"\n| {shape} | median ratio | quartiles | microseconds |\n| --- | --- | --- | --- |")
        for name, row in rows.items():
            low, high = row["quartiles"]
            print(f"| {name} | {row['median ratio']:.2f} | {low:.2f} .. {high:.2f} | {row['microseconds']:.0f} |")


def with_statistic(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The optimal variance needs E||eps-hat||^2 / D; what it is does not change the time."""
    if scheduler.config.get("variance_type") != "optimal":
        return scheduler
    return scheduler.from_config(scheduler.config, mean_squared_noise=[0.9] * len(scheduler))


def ratios(schedulers: dict[str, SchedulerMixin], sample: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Median and quartiles of the time per step over that of the first scheduler, and the median time itself."""
    seconds: dict[str, list[float]] = {name: [] for name in schedulers}
    for _ in range(ROUNDS + 1):
        for name, scheduler in schedulers.items():
            seconds[name].append(seconds_per_step(scheduler, sample))
    first = np.array(next(iter(seconds.values())))[1:]  # the first round warms up
    rows = {}
    for name, times in seconds.items():
        ratio = np.array(times)[1:] / first
        rows[name] = {
            "median ratio": float(np.median(ratio)),
            "quartiles": np.quantile(ratio, [0.25, 0.75]).tolist(),
            "microseconds": 1e6 * float(np.median(times[1:])),
        }
    return rows


def seconds_per_step(scheduler: SchedulerMixin, sample: torch.Tensor) -> float:
    scheduler.set_timesteps(LEVELS)
    generator = torch.Generator().manual_seed(0)
    accepted = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in accepted else {}
    model_output = 0.1 * sample  # whatever the network says, the arithmetic is the same
    started = time.thread_time()
    for t in scheduler.timesteps:
        sample = scheduler.step(model_output, t, sample, **options).prev_sample
    return (time.thread_time() - started) / len(scheduler.timesteps)


if __name__ == "__main__":
    main()
