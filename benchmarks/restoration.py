"""Restoration with a trained network that was trained for none: four tasks, every method, pictures and a table.

    python training/train_ddpm.py && python benchmarks/restoration.py runs/ddpm/pipeline --out benchmarks/results

Held-out images are measured; for each, every method draws several images from what it takes for p(x_0 | y). A good
posterior sampler shows in three numbers:

    PSNR of the mean   of the mean of the draws, against the truth: 10 log10(4 / mean squared error), in dB
    misfit             root mean square of H x - y of a draw, over the values measured; sigma_y is right
    error / spread     root of E|truth - mean of K draws|^2 / ((1 + 1/K) E|draw - its mean|^2): 1 if the truth is like
                       another draw, more if the draws are too sure of themselves

beside linear answers: H^+ y, the same about the mean image, and the best linear estimate, which is the posterior mean
of a Gaussian with the mean and the covariance of the training images.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.logging import tqdm

from annealers import DDPMAncestralScheduler, RestorationPipeline
from annealers.calibration import calibrate_spacing
from annealers.data import DataConfig, ImageRows, load_data, to_model_space
from annealers.figures import enlarge, image_grid, to_pil
from annealers.measurements import Blur, Downsample, Mask, MeasurementOperator
from annealers.metrics import mean_and_standard_error

STATISTICS_IMAGES, CALIBRATION_IMAGES, CALIBRATION_TIMESTEPS = 1000, 100, range(0, 1000, 37)
SMALLEST_VARIANCE = 1e-3  # of pixels that are always black
RESAMPLING = {"resamples": 5, "jump_length": 5}
CALIBRATED = {"uncertainty": "calibrated"}
METHODS: dict[str, dict[str, Any]] = {
    "spectral, S = 1": {"data_variance": 1.0},
    "spectral, S of each coordinate": {"data_variance": "of each coordinate"},
    "spectral": CALIBRATED,
    "spectral, 5 resamples": CALIBRATED | RESAMPLING,
    "covariance, 1 iteration": CALIBRATED | {"method": "covariance", "iterations": 1},
    "covariance": CALIBRATED | {"method": "covariance"},
    "ddrm": {"method": "ddrm"},
    "replacement": CALIBRATED | {"method": "replacement"},
    "replacement, 5 resamples": CALIBRATED | {"method": "replacement"} | RESAMPLING,
}
PICTURED = ("covariance", 4, 2)  # method, images of each task, draws of each image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", help="folder of the trained pipeline")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--dataset", default="digits", help="what it was trained on")
    parser.add_argument("--images", type=int, default=32, help="held-out images")
    parser.add_argument("--draws", type=int, default=4, help="of each image and method, K")
    parser.add_argument("--num-inference-steps", type=int, default=25)
    options = parser.parse_args()

    pipeline = RestorationPipeline.from_pretrained(options.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    data = load_data(DataConfig(dataset=options.dataset, resolution=pipeline.unet.config.sample_size))
    train, truth = some_images(data.train, STATISTICS_IMAGES), some_images(data.validation, options.images)
    pipeline.scheduler = calibrated_scheduler(pipeline, train[:CALIBRATION_IMAGES])

    records, pictures = [], []
    for task, (operator, noise_level) in tasks(truth.shape).items():
        noise = torch.randn(operator.measurement_shape(truth.shape), generator=torch.Generator().manual_seed(1))
        y = operator.measure(truth) + noise_level * noise
        for name, estimate in linear_estimates(operator, noise_level, y, train).items():
            records.append({"task": task, "method": name} | scores(estimate[:, None], truth, operator, y))
        for name, settings in tqdm(METHODS.items(), desc=task):
            if settings.get("method") == "replacement" and not isinstance(operator, Mask):
                continue
            settings = {"data_variance": train.var(dim=0).mean().item()} | settings
            if settings["data_variance"] == "of each coordinate":
                settings["data_variance"] = operator.to_spectral(train).var(dim=0).clamp(min=SMALLEST_VARIANCE)
            draws = pipeline(
                y.repeat_interleave(options.draws, dim=0),
                operator,
                noise_level=noise_level,
                data_mean=train.mean(dim=0),
                num_inference_steps=options.num_inference_steps,
                generator=torch.Generator().manual_seed(2),
                output_type="latent",
                **settings,
            ).images.unflatten(0, (-1, options.draws))
            record = {"task": task, "method": name, "calls": pipeline.num_timesteps}
            records.append(record | scores(draws, truth, operator, y))
            if name == PICTURED[0]:
                pictures.append(picture(operator, y, draws, truth))

    results = {
        "settings": {
            "images": len(truth),
            "draws of each": options.draws,
            "num_inference_steps": options.num_inference_steps,
            "torch": torch.__version__,
        },
        "records": records,
    }
    stem = options.out / f"restoration_{data.name}"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(records))
    image_grid(pictures, columns=2, padding=12).save(stem.with_suffix(".png"))
    print(table(records))


def tasks(shape: torch.Size) -> dict[str, tuple[MeasurementOperator, float]]:
    """H and sigma_y of each task, for images of this shape."""
    H, W = shape[2:]
    window = torch.ones(H, W)
    window[H // 4 : H - H // 4, W // 4 : W - W // 4] = 0
    return {
        "the middle is missing": (Mask(window), 0.0),
        "the right half is missing": (Mask(torch.arange(W).expand(H, W) < W // 2), 0.0),
        "half the resolution": (Downsample(2), 0.0),
        "blurred by 1 pixel, noise 0.1": (Blur.gaussian(1.0), 0.1),
    }


def some_images(rows: ImageRows, count: int) -> torch.Tensor:
    """A fixed choice of at most `count` images, (n, C, H, W), in [-1, 1]."""
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
    return to_model_space(torch.stack([rows[i]["image"] for i in chosen.tolist()]))


def calibrated_scheduler(pipeline: RestorationPipeline, images: torch.Tensor) -> DDPMAncestralScheduler:
    """The path of the pipeline, with the denoising error of its network when asked for no class; keeps all noise."""
    scheduler = DDPMAncestralScheduler.from_config(pipeline.scheduler.config, last_step_noise=True)
    labels = {} if pipeline.null_label is None else {"class_labels": torch.full((len(images),), pipeline.null_label)}
    generator = torch.Generator().manual_seed(3)
    calibrate_spacing(scheduler, pipeline.unet, images, CALIBRATION_TIMESTEPS, generator, **labels)
    return scheduler


def linear_estimates(
    operator: MeasurementOperator, noise_level: float, y: torch.Tensor, train: torch.Tensor
) -> dict[str, torch.Tensor]:
    """x of y, each (n, C, H, W)."""
    mean = train.mean(dim=0, keepdim=True)
    residual = y - operator.measure(mean)
    units = torch.eye(mean.numel()).reshape(-1, *mean.shape[1:])
    H, C = operator.measure(units).flatten(1).T.double(), train.flatten(1).T.double().cov()
    seen = H @ C @ H.T + noise_level**2 * torch.eye(len(H))
    gain = C @ H.T @ torch.linalg.pinv(seen, rtol=1e-8, hermitian=True)
    best = (residual.flatten(1).double() @ gain.T).float().reshape(-1, *mean.shape[1:])
    return {
        "H⁺ y": operator.pseudo_inverse(y),
        "H⁺ y about the mean image": mean + operator.pseudo_inverse(residual),
        "best linear": mean + best,
    }


def scores(
    draws: torch.Tensor, truth: torch.Tensor, operator: MeasurementOperator, y: torch.Tensor
) -> dict[str, float | list[float]]:
    """What the docstring of this module explains, of draws (n, K, C, H, W), as (mean, standard error over images)."""
    K, mean = draws.shape[1], draws.mean(dim=1)
    error = (mean - truth).square().flatten(1).mean(dim=1)
    single = (draws[:, 0] - truth).square().flatten(1).mean(dim=1)
    measured = operator.measure(torch.ones_like(truth)) != 0  # a mask leaves out what it does not see
    misfit = (operator.measure(draws[:, 0]) - y).square() * measured
    misfit = (misfit.flatten(1).sum(dim=1) / measured.flatten(1).sum(dim=1)).sqrt()
    result = {
        "psnr_of_mean": mean_and_standard_error(10 * torch.log10(4 / error)),
        "psnr_of_draw": mean_and_standard_error(10 * torch.log10(4 / single)),
        "misfit": mean_and_standard_error(misfit),
    }
    if K > 1:
        spread = draws.var(dim=1).flatten(1).mean(dim=1)
        result["error_over_spread"] = (error.mean() / ((1 + 1 / K) * spread.mean())).sqrt().item()
    return result


def picture(operator: MeasurementOperator, y: torch.Tensor, draws: torch.Tensor, truth: torch.Tensor) -> Any:
    """Rows: what was measured, draws, their mean, the truth. Columns: images."""
    _, count, shown = PICTURED
    scale = truth.shape[-1] // y.shape[-1]
    rows = [
        y.repeat_interleave(scale, -1).repeat_interleave(scale, -2),
        *draws.unbind(1)[:shown],
        draws.mean(1),
        truth,
    ]
    images = to_pil(torch.cat([row[:count] for row in rows]))
    return image_grid([enlarge(image, 64 // truth.shape[-1]) for image in images], count, padding=2)


def table(records: list[dict[str, Any]]) -> str:
    """The records in Markdown, one table per task."""
    lines = []
    for task in dict.fromkeys(record["task"] for record in records):
        lines += ["", f"**{task[0].upper()}{task[1:]}**", ""]
        lines += ["| method | PSNR of the mean | of one draw | misfit | error / spread | network calls |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for record in records:
            if record["task"] == task:
                psnr, single, misfit = (
                    "{:.{digits}f} ± {:.{digits}f}".format(*record[name], digits=digits)
                    for name, digits in (("psnr_of_mean", 1), ("psnr_of_draw", 1), ("misfit", 3))
                )
                ratio = f"{record['error_over_spread']:.2f}" if "error_over_spread" in record else "—"
                single, calls = (single, record["calls"]) if "calls" in record else ("—", "—")
                lines.append(f"| {record['method']} | {psnr} | {single} | {misfit} | {ratio} | {calls} |")
    return "\n".join(lines[1:]) + "\n"


if __name__ == "__main__":
    main()
