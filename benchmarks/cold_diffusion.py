"""Cold diffusion on digits: what one call of a restoring network gives, and what the two samplers make of it.

    for kind in blur downsample mask; do
        python training/train_cold.py --degradation $kind --max-steps 400 --output-dir runs/cold_$kind
    done
    python benchmarks/cold_diffusion.py runs/cold_{blur,downsample,mask}/pipeline --out benchmarks/results

Held-out digits are degraded half way (t = T / 2 - 1) and fully (t = T - 1) and restored by one call of the network,
and by the naive and the improved sampler, which visit every timestep, and the improved one with five. Given are the
peak signal-to-noise ratio to the truth, in decibels with the standard error of its mean, and the Fréchet distance of
the Gaussians fitted to the 64 pixels, in [-1, 1], of restored and true digits. The distance from as many training
digits to the same held-out ones is what sampling noise leaves.

Drawn are as many digits from the normal law of fully degraded images, with the noise of the paper and without.
"""

import argparse
import json
from pathlib import Path

import diffusers
import matplotlib.pyplot as plt
import torch

from annealers import ColdDiffusionScheduler, GuidedDiffusionPipeline
from annealers.data import load_digits_split, to_model_space
from annealers.figures import image_grid, to_pil
from annealers.metrics import frechet_distance, mean_and_standard_error

FEW_STEPS = 5
COLUMNS = 7  # of the picture
WAYS = ("degraded", "direct", "naive", "improved", f"improved, {FEW_STEPS} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipelines", nargs="+", help="folders of trained pipelines")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    options = parser.parse_args()

    digits = load_digits_split()
    truth = to_model_space(digits.test_images)
    chosen = torch.randperm(len(digits.train_images), generator=torch.Generator().manual_seed(0))[: len(truth)]
    results = {
        "images": len(truth),
        "floor: distance of as many training images": distance(to_model_space(digits.train_images[chosen]), truth),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "restored": [],
        "drawn": [],
    }
    pictures: dict[str, dict[str, torch.Tensor]] = {}  # by degradation, rows of images by name
    for folder in options.pipelines:
        pipeline = GuidedDiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        T, name = len(pipeline.scheduler), pipeline.scheduler.config.degradation
        rows = pictures[name] = {}
        for start in (T // 2 - 1, T - 1):
            restored = restorations(pipeline, truth, start)
            results["restored"] += [
                {"degradation": name, "timestep": start, "way": way, **quality(images, truth)}
                for way, images in restored.items()
            ]
            rows |= {f"{way}, t = {start}": restored[way][:COLUMNS] for way in WAYS[:4]}
            print(f"{name} from {start}: done", flush=True)
        rows["truth"] = truth[:COLUMNS]
        for noise in sorted({0.0, pipeline.scheduler.config.terminal_noise}):
            images = drawn(pipeline, truth.shape, noise)
            row = {"degradation": name, "terminal_noise": noise, "distance": distance(images, truth)}
            results["drawn"].append(row | {"spread": spread(images), "spread of the truth": spread(truth)})
        rows["drawn"] = images[:COLUMNS]
    (options.out / "cold_diffusion.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "cold_diffusion.md").write_text(tables(results))
    draw(pictures, options.out / "cold_diffusion.png")
    print(tables(results))


def restorations(pipeline: GuidedDiffusionPipeline, truth: torch.Tensor, start: int) -> dict[str, torch.Tensor]:
    """The degraded images and what becomes of them each way, all (N, C, H, W), by the names of `WAYS`."""
    scheduler = pipeline.scheduler
    x_t = scheduler.add_noise(truth, None, start)
    every = list(range(start, -1, -1))
    few = torch.linspace(start, (start + 1) // FEW_STEPS - 1, FEW_STEPS).round().long().tolist()
    with torch.no_grad():
        direct = pipeline.unet(x_t, torch.tensor(start)).sample
    naive = run(pipeline, x_t, every, ColdDiffusionScheduler.from_config(scheduler.config, sampler="naive"))
    images = [x_t, direct, naive, run(pipeline, x_t, every, scheduler), run(pipeline, x_t, few, scheduler)]
    return dict(zip(WAYS, images, strict=True))


def run(
    pipeline: GuidedDiffusionPipeline, x_t: torch.Tensor, timesteps: list[int], scheduler: ColdDiffusionScheduler
) -> torch.Tensor:
    sampler = GuidedDiffusionPipeline(pipeline.unet, scheduler)
    sampler.set_progress_bar_config(disable=True)
    return sampler(latents=x_t, timesteps=timesteps, output_type="latent").images


def drawn(pipeline: GuidedDiffusionPipeline, shape: torch.Size, noise: float) -> torch.Tensor:
    scheduler = ColdDiffusionScheduler.from_config(pipeline.scheduler.config, terminal_noise=noise)
    latents = scheduler.terminal_sample(shape, torch.Generator().manual_seed(0))
    return run(pipeline, latents, list(range(len(scheduler)))[::-1], scheduler)


def quality(images: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    squared = (images.clamp(-1, 1) - truth).square().mean((1, 2, 3)).double()
    mean, standard_error = mean_and_standard_error(10 * torch.log10(4 / squared))
    return {"psnr": mean, "psnr_standard_error": standard_error, "distance": distance(images, truth)}


def distance(images: torch.Tensor, truth: torch.Tensor) -> float:
    return frechet_distance(images.clamp(-1, 1).flatten(1), truth.flatten(1))


def spread(images: torch.Tensor) -> float:
    """Standard deviation of a pixel over the images, mean over the pixels."""
    return images.clamp(-1, 1).std(dim=0).mean().item()


def draw(pictures: dict[str, dict[str, torch.Tensor]], file: Path) -> None:
    """The degradations beside each other, with the names of the rows at the left."""
    figure, panels = plt.subplots(1, len(pictures), figsize=(1 + 3.2 * len(pictures), 4.6), squeeze=False)
    for panel, (degradation, rows) in zip(panels[0], pictures.items(), strict=True):
        grid = image_grid(to_pil(torch.cat(list(rows.values()))), COLUMNS, padding=1)
        panel.imshow(grid, cmap="gray", interpolation="nearest")
        height = (grid.height + 1) / len(rows)
        panel.set_yticks([(i + 0.5) * height for i in range(len(rows))], rows if panel is panels[0][0] else [])
        panel.set_xticks([])
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.set_title(degradation)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def tables(results: dict) -> str:
    floor = results["floor: distance of as many training images"]
    lines = [
        "# Cold diffusion on digits\n",
        f"Made by `python benchmarks/cold_diffusion.py`, which says what is measured, on {results['images']} held-out",
        f"digits; as many training digits are at a distance of {floor:.3f}. torch {results['torch']}, diffusers "
        f"{results['diffusers']}.\n",
        "PSNR in dB (more is better) / pixel Fréchet distance (less is better).\n",
        f"| degradation | from t = | {' | '.join(WAYS)} |",
        f"| --- | --- |{' --- |' * len(WAYS)}",
    ]
    rows: dict[tuple[str, int], list[str]] = {}
    for row in results["restored"]:
        cell = f"{row['psnr']:.2f} ± {row['psnr_standard_error']:.2f} / {row['distance']:.3f}"
        rows.setdefault((row["degradation"], row["timestep"]), []).append(cell)
    lines += [f"| {name} | {start} | {' | '.join(cells)} |" for (name, start), cells in rows.items()]
    lines += [
        "\nDrawn from the normal law of fully degraded digits, improved sampler:\n",
        "| degradation | noise at the start | distance | spread of a pixel (the truth's) |",
        "| --- | --- | --- | --- |",
    ]
    for row in results["drawn"]:
        spreads = f"{row['spread']:.3f} ({row['spread of the truth']:.3f})"
        lines.append(f"| {row['degradation']} | {row['terminal_noise']} | {row['distance']:.3f} | {spreads} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
