r"""The error of a learnt score at every noise level, by denoising, implicit and sliced score matching.

    python benchmarks/score_toys.py --out benchmarks/results

Each loss trains the same network from the same weights on the same noisy points of a mixture in the plane, whose score
s* is known. Measured at levels s of the ladder, on fresh points,

    error        E||s_theta - s*||^2 / E||s*||^2
    difference   E||s_theta - s_dsm||^2 / E||s*||^2     between a loss and denoising score matching

and written as a table, a figure and their record.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging
from matplotlib.figure import Figure

from annealers import GuidedDiffusionPipeline
from annealers.data import toy_law
from annealers.training import train_score

LOSSES = {
    "dsm": ("denoising", ["--loss", "dsm"]),
    "ism": ("implicit, exact divergence", ["--loss", "ism", "--probes", "0"]),
    "ism_probes": ("implicit, one random direction", ["--loss", "ism", "--probes", "1"]),
    "sliced": ("sliced, one random direction", ["--loss", "sliced", "--probes", "1"]),
}
COLOURS = {"dsm": "#0072b2", "ism": "#e69f00", "ism_probes": "#009e73", "sliced": "#cc79a7"}
LEVELS, POINTS = 61, 4000
IN_TABLE = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", default="ring")
    parser.add_argument("--max-steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        pipelines, seconds = {}, {}
        for name, (_, arguments) in LOSSES.items():
            started = time.process_time()
            pipelines[name] = trained(Path(folder) / name, arguments, options)
            seconds[name] = time.process_time() - started
    result = {
        "toy": options.toy,
        "max_steps": options.max_steps,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "processor_seconds": seconds,
        **measured(pipelines, f"toy:{options.toy}"),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "score_toys.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "score_toys.md").write_text(table(result))
    figure(result).savefig(options.out / "score_toys.png", dpi=100)
    print(table(result))


def trained(folder: Path, arguments: list[str], options: argparse.Namespace) -> GuidedDiffusionPipeline:
    common = [
        *("--dataset", f"toy:{options.toy}", "--max_steps", str(options.max_steps), "--seed", str(options.seed)),
        *("--batch_size", str(options.batch_size), "--output_dir", str(folder), "--report_to", "none"),
        *("--sample_every", "0", "--validate_every", "0", "--checkpoint_every", "0", "--num_inference_steps", "2"),
    ]
    train_score.main([*common, *arguments])
    return GuidedDiffusionPipeline.from_pretrained(folder / "pipeline")


@torch.no_grad()
def measured(pipelines: dict[str, GuidedDiffusionPipeline], dataset: str) -> dict:
    """Errors of each loss and their differences from denoising, one number per level."""
    law, scheduler = toy_law(dataset), pipelines["dsm"].scheduler
    timesteps = torch.linspace(0, len(scheduler) - 1, LEVELS).round().long()
    alphas, sigmas = scheduler.signal_and_noise(timesteps)
    errors = {name: [] for name in pipelines}
    differences = {name: [] for name in pipelines if name != "dsm"}
    for t, alpha, sigma in zip(timesteps.tolist(), alphas.tolist(), sigmas.tolist(), strict=True):
        x_t = law.sample(POINTS, alpha, sigma, generator=torch.Generator().manual_seed(t))
        exact = law.noise(x_t, alpha, sigma)  # -sigma s*, as of the networks: the factor cancels
        scale = exact.square().mean()
        answers = {name: pipeline.unet(x_t, t).sample for name, pipeline in pipelines.items()}
        for name, answer in answers.items():
            errors[name].append(((answer - exact).square().mean() / scale).item())
            if name != "dsm":
                differences[name].append(((answer - answers["dsm"]).square().mean() / scale).item())
    return {"noise_levels": (sigmas / alphas).tolist(), "errors": errors, "differences_from_dsm": differences}


def table(result: dict) -> str:
    levels = np.array(result["noise_levels"])
    columns = [int(np.abs(np.log(levels / wanted)).argmin()) for wanted in IN_TABLE]
    lines = [
        f"Relative squared error of the learnt score on `toy:{result['toy']}` after {result['max_steps']:,} steps of "
        f"{result['batch_size']} points, in percent, by noise level s.",
        "",
        "| loss | " + " | ".join(f"s = {levels[i]:.2g}" for i in columns) + " | all levels | processor s |",
        "| --- |" + " --- |" * (len(columns) + 2),
    ]
    for name, (label, _) in LOSSES.items():
        errors = np.array(result["errors"][name])
        cells = [f"{100 * errors[i]:.2g}" for i in columns] + [f"{100 * errors.mean():.2g}"]
        lines.append(f"| {label} | {' | '.join(cells)} | {result['processor_seconds'][name]:.0f} |")
    for name, values in result["differences_from_dsm"].items():
        cells = [f"{100 * values[i]:.2g}" for i in columns] + [f"{100 * np.mean(values):.2g}"]
        lines.append(f"| *{LOSSES[name][0]}, to denoising* | {' | '.join(cells)} | |")
    return "\n".join(lines) + "\n"


def figure(result: dict) -> Figure:
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    levels = result["noise_levels"]
    for name, (label, _) in LOSSES.items():
        left.loglog(levels, result["errors"][name], color=COLOURS[name], label=label)
        if name != "dsm":
            right.loglog(levels, result["differences_from_dsm"][name], color=COLOURS[name], label=label)
    left.set_title("error of the learnt score", fontsize=11)
    left.set_ylabel("E‖s − s*‖² / E‖s*‖²")
    right.set_title("difference from denoising score matching", fontsize=11)
    for panel in (left, right):
        panel.set_xlabel("noise level s, in units of the data")
        panel.grid(True, which="major", color="#dddddd", linewidth=0.6)
        panel.legend(fontsize=8, frameon=False)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
