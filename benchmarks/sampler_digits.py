"""Quality of samples of a trained network against network calls: annealers beside Diffusers.

    python training/train_ddpm.py && python benchmarks/sampler_digits.py runs/ddpm/pipeline --out benchmarks/results

The candidates of `sampler_candidates` that are marked for it draw the same number of images of each class from the
same initial noise. The Fréchet distance is that of the Gaussians fitted to the pixels, in [-1, 1], of the samples and
of the held-out split; also for other data, `--dataset`, because no network that reads them comes with this library.
Distances are biased upwards alike for all, and the floor is that of as many training images. Standard errors are those
of the jackknife over 20 groups of samples, and leave out that all share their noise, which helps comparisons.

Calls are counted. Clipping is that of the pipeline's scheduler where a scheduler knows how; some of Diffusers do not.
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from sampler_candidates import Candidate, candidates
from sampler_quality import set_most_levels
from sampler_tables import write_network_table

from annealers import DDPMAncestralScheduler, GuidedDiffusionPipeline
from annealers.data import DataConfig, ImageRows, load_data, to_images, to_model_space
from annealers.metrics import frechet_distance

PATH_SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "clip_sample",
)
GROUPS = 20  # of the jackknife
HELD_OUT_IMAGES = 2000  # at most
CALIBRATION_IMAGES, CALIBRATION_TIMESTEPS = 100, range(0, 1000, 37)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", help="folder of the trained pipeline")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--dataset", default="digits", help="what it was trained on")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--budgets", type=int, nargs="+", default=[10, 20, 50], help="network calls")
    parser.add_argument("--match", default="", help="measure only candidates with this in their name")
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")

    pipeline = GuidedDiffusionPipeline.from_pretrained(options.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    data = load_data(DataConfig(dataset=options.dataset, resolution=pipeline.unet.config.sample_size))
    train, train_labels = some_images(data.train, options.samples)
    held_out = to_model_space(some_images(data.validation, HELD_OUT_IMAGES)[0]).flatten(1)
    path = {name: pipeline.scheduler.config[name] for name in PATH_SETTINGS}
    statistic = mean_squared_noise(pipeline, path, train, train_labels)

    file = options.out / f"samplers_{data.name}.json"
    results = json.loads(file.read_text()) if file.exists() else {"records": []}
    results["settings"] = {
        "path": path,
        "samples": options.samples,
        "held-out images": len(held_out),
        "floor: distance of as many training images": frechet_distance(to_model_space(train).flatten(1), held_out),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    started = time.perf_counter()
    for candidate in candidates():
        for spacing in candidate.network_spacings if options.match in candidate.name else ():
            for budget in options.budgets:
                record = measured(pipeline, path, statistic, candidate, spacing, budget, options.samples, held_out)
                key = ("candidate", "spacing", "budget")
                results["records"] = [r for r in results["records"] if any(r[k] != record[k] for k in key)] + [record]
            file.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{time.perf_counter() - started:5.0f} s  {candidate.name}, {spacing}", flush=True)
    write_network_table(results, data.name, options.out)


def some_images(rows: ImageRows, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (n, C, H, W) and labels (n,) of a fixed choice of at most `count` rows."""
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
    items = [rows[i] for i in chosen.tolist()]
    return torch.stack([item["image"] for item in items]), torch.tensor([item["label"] for item in items])


def mean_squared_noise(
    pipeline: GuidedDiffusionPipeline, path: dict[str, Any], images: torch.Tensor, labels: torch.Tensor
) -> list[float]:
    """E||eps-hat||^2 / D of the network on training images, which the optimal variance needs."""
    return DDPMAncestralScheduler(**path).calibrate_variance(
        pipeline.unet,
        to_model_space(images[:CALIBRATION_IMAGES]),
        timesteps=CALIBRATION_TIMESTEPS,
        generator=torch.Generator().manual_seed(1),
        class_labels=labels[:CALIBRATION_IMAGES],
    )


def measured(
    pipeline: GuidedDiffusionPipeline,
    path: dict[str, Any],
    statistic: list[float],
    candidate: Candidate,
    spacing: str,
    budget: int,
    samples: int,
    held_out: torch.Tensor,
) -> dict[str, Any]:
    """A record: who, how, and either the distance or what went wrong."""
    record = {
        "candidate": candidate.name,
        "family": candidate.family,
        "stochastic": candidate.stochastic,
        "spacing": spacing,
        "budget": budget,
        "samples": samples,
        "unit": "pixel Fréchet distance",
    }
    try:
        images, calls = sampled(pipeline, path, statistic, candidate, spacing, budget, samples)
    except Exception as error:  # one that cannot run on this path is a result, and the others go on
        return record | {"failed": f"{type(error).__name__}: {error}"}
    if not images.isfinite().all():
        return record | {"calls": calls, "failed": "not finite"}
    pixels = to_model_space(to_images(images * 2 - 1)).flatten(1)
    distance, standard_error = jackknifed_distance(pixels, held_out)
    return record | {"calls": calls, "error": distance, "error, standard error": standard_error}


def sampled(
    pipeline: GuidedDiffusionPipeline,
    path: dict[str, Any],
    statistic: list[float],
    candidate: Candidate,
    spacing: str,
    budget: int,
    samples: int,
) -> tuple[torch.Tensor, int]:
    """Images in [0, 1], (N, C, H, W), and how many network calls they took."""
    scheduler = candidate.build(path, spacing)
    if scheduler.config.get("variance_type") == "optimal":
        scheduler = scheduler.from_config(scheduler.config, mean_squared_noise=statistic)
    levels = set_most_levels(scheduler, budget)
    pipeline.scheduler = scheduler
    unet = pipeline.unet
    generator = torch.Generator().manual_seed(0)
    size = unet.config.sample_size
    noise = torch.randn(samples, unet.config.in_channels, size, size, generator=generator)
    calls = []
    counter = unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        images = pipeline(
            class_labels=torch.arange(samples) % len(pipeline.id2label),
            num_inference_steps=levels,
            latents=noise,
            generator=generator,
            eta=candidate.step_options.get("eta", 0.0),
            output_type="pt",
        ).images
    finally:
        counter.remove()
    return images, len(calls)


def jackknifed_distance(pixels: torch.Tensor, held_out: torch.Tensor) -> tuple[float, float]:
    """The Fréchet distance, and its standard error by leaving out one group of samples at a time."""
    group = torch.arange(len(pixels)) * GROUPS // len(pixels)
    without_one = torch.tensor([frechet_distance(pixels[group != g], held_out) for g in range(GROUPS)])
    spread = (without_one - without_one.mean()).square().sum() * (GROUPS - 1) / GROUPS
    return frechet_distance(pixels, held_out), float(spread.sqrt())


if __name__ == "__main__":
    main()
