"""The table of likelihoods of all families of models on held-out images, in nats and bits per dimension.

    python benchmarks/image_likelihood.py --name mnist --dataset DATA/mnist --binarize dynamic \
        VAE=runs/vae/pipeline "ladder VAE=runs/ladder/pipeline" "gated PixelCNN=runs/pixel_cnn/pipeline"
    python benchmarks/image_likelihood.py --name cifar10 --dataset DATA/cifar10 VQ-VAE=runs/prior/pipeline \
        VAE=runs/vae/pipeline PixelCNN=runs/pixel_cnn/pipeline DDPM=runs/evaluation.json

Each argument is NAME=FOLDER of a pipeline, or NAME=FILE.json that `training/evaluate.py` wrote of a diffusion model.
What a number is of -log p(x):

    exact                       an autoregressive model of the pixels
    ELBO                        above it, one draw of the latents per image
    IW-k                        above it, of k draws (Burda et al. 2016), on the first --iw-images of the images
    two-stage                   above it, codes and the image given the codes: -log p(x | z_q(s)) - log p(s)
    two-stage, uniform codes    the same with -log p(s) = n log K, which needs no prior
    VLB, ODE                    see annealers.likelihood

A density is dequantised, so that all are of images of the same levels, on the same images, binarised alike.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.logging import disable_progress_bar
from tqdm.auto import tqdm

from annealers import AnnealersPipeline, PixelCNNPipeline, VAEPipeline, VQVAEPriorPipeline
from annealers.data import DataConfig, binarized_batch, load_data, validation_batches
from annealers.metrics import mean_and_standard_error
from annealers.models.pixel_likelihood import levels_to_values, values_to_levels
from annealers.randomness import PositionalRandomness

Nats = dict[str, torch.Tensor]  # of each kind, (B,)

PUBLISHED = {  # (model, kind, value, of which images, source); nats of MNIST, bits per dimension of CIFAR-10
    "mnist": [
        ("VAE, 1 layer, 50 latents", "IW-5000", 86.76, "dynamic", "arXiv:1509.00519, Table 1"),
        ("IWAE, k = 50, 1 layer", "IW-5000", 84.78, "dynamic", "arXiv:1509.00519, Table 1"),
        ("ladder VAE, 3 layers", "ELBO", 82.14, "static", "github.com/addtt/ladder-vae-pytorch"),
        ("ladder VAE, 3 layers", "IW-1000", 79.24, "static", "github.com/addtt/ladder-vae-pytorch"),
        ("NVAE without flow", "IW-1000", 78.01, "dynamic", "arXiv:2007.03898, Table 1"),
        ("PixelCNN, 7 layers", "exact", 81.30, "static", "arXiv:1601.06759, Table 4"),
        ("Diagonal BiLSTM, 7 layers", "exact", 79.20, "static", "arXiv:1601.06759, Table 4"),
    ],
    "cifar10": [
        ("uniform", "exact", 8.00, "", "arXiv:1606.05328, Table 1"),
        ("convolutional VAE", "bound", 4.51, "", "arXiv:1711.00937, Sec. 4.1"),
        (
            "VQ-VAE, 8 x 8 x 10 codes",
            "two-stage",
            4.67,
            "",
            "arXiv:1711.00937, Sec. 4.1; its law of pixels is not given",
        ),
        ("ladder VAE, 3 layers", "ELBO", 3.59, "", "github.com/addtt/ladder-vae-pytorch"),
        ("NVAE", "bound", 2.91, "", "arXiv:2007.03898, Table 1"),
        ("PixelCNN", "exact", 3.14, "", "arXiv:1601.06759, Table 5"),
        ("gated PixelCNN", "exact", 3.03, "", "arXiv:1606.05328, Table 1"),
        ("PixelCNN++", "exact", 2.92, "", "arXiv:1701.05517, Table 1"),
        ("diffusion, 2015", "VLB", 5.40, "", "arXiv:2006.11239, Table 1"),
        ("DDPM, L_simple", "VLB", 3.75, "", "arXiv:2006.11239, Table 1"),
        ("improved DDPM", "VLB", 2.94, "", "arXiv:2102.09672"),
        ("VDM", "VLB", 2.65, "", "arXiv:2107.00630, Table 1"),
    ],
}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    disable_progress_bar()
    data = load_data(DataConfig(dataset=options.dataset))
    shape = (data.channels, data.resolution, data.resolution)
    rows = []
    for entry in options.models:
        name, _, source = entry.partition("=")
        rows += of_file(name, Path(source)) if source.endswith(".json") else of_folder(name, source, data, options)
    levels = {row["levels"] for row in rows}
    if len(levels) != 1:
        raise SystemExit(f"bits of images of different levels do not compare: {sorted(levels)}")

    record = {
        "dataset": data.name,
        "binarize": options.binarize,
        "shape": shape,
        "levels": levels.pop(),
        "hardware": f"{torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or 'CPU'}, "
        f"{torch.get_num_threads()} threads",
        "versions": {package: version(package) for package in ("annealers", "torch", "diffusers")},
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    page = as_page(record, options)
    (options.out / f"{options.name}_likelihood.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / f"{options.name}_likelihood.md").write_text(page)
    print(page)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="NAME=FOLDER of a pipeline, or NAME=FILE of training/evaluate.py")
    parser.add_argument("--name", required=True, help="of the files that are written, NAME_likelihood.json and .md")
    parser.add_argument("--dataset", required=True, help="as of the training scripts")
    parser.add_argument("--binarize", choices=("none", "static", "dynamic"), default="none")
    parser.add_argument("--images", type=int, default=None, help="held-out images, all if unset")
    parser.add_argument("--iw-samples", type=int, default=100, help="k of IW-k; 0 leaves it out")
    parser.add_argument("--iw-images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="a sentence below the table")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    if not all("=" in entry for entry in options.models):
        parser.error(f"need NAME=FOLDER for each model, got {options.models}")
    return options


# ---- one model ------------------------------------------------------------------------------------------------------


def of_folder(name: str, folder: str, data: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind of number that there is of this pipeline."""
    pipeline = AnnealersPipeline.from_pretrained(folder)
    measure, model, levels = measure_of(pipeline, options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline.to(device)
    conditional = model.config.get("num_class_embeds") is not None
    started, values, seen = time.perf_counter(), {}, 0
    batches = validation_batches(data, options.batch_size, max_samples=options.images)
    for batch in tqdm(batches, name):
        labels = batch["labels"].to(device) if conditional else None
        images = images_of(batch, levels, options).to(device)
        with torch.no_grad():
            for kind, nats in measure(images, labels, batch["rows"].tolist(), seen).items():
                values.setdefault(kind, []).append(nats.double().cpu())
        seen += len(images)
    size = data.channels * data.resolution**2
    return [
        {
            "model": name,
            "class": type(model).__name__,
            "kind": kind,
            "levels": levels,
            "given_class": conditional and "uniform codes" not in kind,
            "parameters": sum(p.numel() for p in pipeline_parameters(pipeline)),
            **statistics(torch.cat(parts), size),
            "training": training_of(folder),
            "seconds": time.perf_counter() - started,
        }
        for kind, parts in values.items()
    ]


def measure_of(pipeline: Any, options: argparse.Namespace) -> tuple[Callable[..., Nats], Any, int]:
    """What computes the nats of a batch, the model that knows of classes, and the number of levels it is of."""
    if isinstance(pipeline, PixelCNNPipeline):
        model = pipeline.pixel_cnn
        K = model.config.num_embeddings
        return lambda x, y, rows, seen: {"exact": model(values_to_levels(x, K), y).nll}, model, K
    if isinstance(pipeline, VAEPipeline):
        return VAEMeasure(pipeline.vae, options), pipeline.vae, pipeline.vae.likelihood.num_levels
    if isinstance(pipeline, VQVAEPriorPipeline) and pipeline.prior is not None:
        measure = TwoStageMeasure(pipeline, options)
        return measure, pipeline.prior, pipeline.vqvae.likelihood.num_levels
    raise SystemExit(
        f"there is no likelihood of a {type(pipeline).__name__} here; of a diffusion model give the file that "
        "training/evaluate.py --bits-per-dim writes, and train a prior of a VQ-VAE with training/train_prior.py"
    )


class VAEMeasure:
    """-ELBO and, of the first images, -IW-k."""

    def __init__(self, vae: Any, options: argparse.Namespace) -> None:
        self.vae, self.options = vae, options
        self.randomness = PositionalRandomness(options.seed)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor | None, rows: list[int], seen: int) -> Nats:
        x, constant = dequantised(images, self.vae.likelihood, rows, self.randomness)
        output = self.vae(x, labels, generator=self.generators(rows, 0))
        nats = {"ELBO": output.nll + output.kl + constant}
        count, k = min(self.options.iw_images - seen, len(x)), self.options.iw_samples
        if count > 0 and k > 0:
            told = None if labels is None else labels[:count]
            generators = self.generators(rows[:count], 1)
            log_prob = self.vae.log_prob(x[:count], k, class_labels=told, generator=generators)
            nats[f"IW-{k}"] = constant - log_prob
        return nats

    def generators(self, rows: list[int], purpose: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(self.randomness.step_seed(row, purpose)) for row in rows]


class TwoStageMeasure:
    """The bound of a VQ-VAE with its prior, and with codes that are all equally likely."""

    def __init__(self, pipeline: VQVAEPriorPipeline, options: argparse.Namespace) -> None:
        self.vqvae, self.prior = pipeline.vqvae, pipeline.prior
        self.randomness = PositionalRandomness(options.seed)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor | None, rows: list[int], seen: int) -> Nats:
        x, constant = dequantised(images, self.vqvae.likelihood, rows, self.randomness)
        output = self.vqvae(x)
        codes = output.indices.unsqueeze(1)  # (B, 1, h, w)
        first = output.nll + constant
        uniform = codes[0].numel() * math.log(self.vqvae.config.num_vq_embeddings)
        return {"two-stage": first + self.prior(codes, labels).nll, "two-stage, uniform codes": first + uniform}


def dequantised(
    images: torch.Tensor, likelihood: Any, rows: list[int], randomness: PositionalRandomness
) -> tuple[torch.Tensor, float]:
    """Images as a law wants them, and what makes its nats those of images of levels."""
    if likelihood.nats_per_value == 0:
        return images, 0.0
    shape = tuple(images.shape[1:])
    u = torch.cat([randomness.uniform("dequantisation", row, 1, shape) for row in rows]).to(images)
    return images + (2 * u - 1) / (likelihood.num_levels - 1), likelihood.nats_per_value * math.prod(shape)


def images_of(batch: dict[str, Any], levels: int, options: argparse.Namespace) -> torch.Tensor:
    """The images of a batch on the grid of levels, the same of every model."""
    images = binarized_batch(batch, options.binarize, PositionalRandomness(options.seed), "validation")
    if (levels == 2) != (options.binarize != "none"):
        raise SystemExit(f"a model of {levels} levels and --binarize {options.binarize} do not go together")
    return levels_to_values(values_to_levels(images, levels), levels)


def statistics(nats: torch.Tensor, size: int) -> dict[str, float]:
    """Mean and standard error over the images, in nats and in bits per value."""
    mean, error = mean_and_standard_error(nats)
    bits = 1 / (size * math.log(2))
    return {
        "nats": mean,
        "nats_error": error,
        "bits_per_dim": mean * bits,
        "bits_per_dim_error": error * bits,
        "images": len(nats),
    }


def pipeline_parameters(pipeline: Any) -> Iterator[torch.nn.Parameter]:
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            yield from component.parameters()


def training_of(folder: str) -> dict[str, Any] | None:
    """What run.json beside a pipeline tells of its training."""
    path = Path(folder).parent / "run.json"
    if not path.is_file():
        return None
    run = json.loads(path.read_text())
    kept = ("command", "step", "seconds", "hardware", "mixed_precision")
    return {name: run[name] for name in kept} | {"batch_size": run["config"]["batch_size"]}


def of_file(name: str, path: Path) -> list[dict[str, Any]]:
    """The rows of a diffusion model that training/evaluate.py has written, which are of 256 levels."""
    evaluation = json.loads(path.read_text())
    size = evaluation["channels"] * evaluation["resolution"] ** 2
    rows = []
    for result in evaluation["results"]:
        nats = torch.tensor(result["values"], dtype=torch.float64) * size * math.log(2)
        steps = f"{result['steps']} steps" if result["likelihood"] == "vlb" else f"tolerance {result['tolerance']:g}"
        rows.append(
            {
                "model": f"{name}, {steps}",
                "class": "diffusion",
                "kind": result["likelihood"].upper(),
                "levels": 256,
                "given_class": evaluation["config"]["class_labels"] == "data",
                "parameters": None,
                **statistics(nats, size),
                "training": training_of(evaluation["pipeline"]),
                "seconds": evaluation["seconds"],
            }
        )
    return rows


# ---- the page -------------------------------------------------------------------------------------------------------


def as_page(record: dict[str, Any], options: argparse.Namespace) -> str:
    channels, height, width = record["shape"]
    size = channels * height * width
    binarised = f", {record['binarize']}ally binarised" if record["binarize"] != "none" else ""
    lines = [
        f"# -log p of held-out images of {record['dataset']}, {channels} x {height} x {width} values of "
        f"{record['levels']} levels{binarised}",
        "",
        "| model | number | nats | bits/dim | images | weights | training |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        weights = "" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f} M"
        given = ", given the class" if row["given_class"] else ""
        lines.append(
            f"| {row['model']} | {row['kind']}{given} | {row['nats']:.2f} ± {row['nats_error']:.2f} | "
            f"{row['bits_per_dim']:.3f} ± {row['bits_per_dim_error']:.3f} | {row['images']:,} | {weights} | "
            f"{training_in_words(row['training'])} |"
        )
    for model, kind, value, of, source in PUBLISHED.get(options.name, []):
        nats = value if options.name == "mnist" else value * size * math.log(2)
        bits = nats / size / math.log(2)
        lines.append(f"| *{model}* | {kind}{', ' + of if of else ''} | {nats:.2f} | {bits:.3f} | | | *{source}* |")
    lines += ["", "± is the standard error over the images. Rows in italics are published numbers."]
    if options.note:
        lines.append(options.note)
    return "\n".join(lines) + "\n"


def training_in_words(training: dict[str, Any] | None) -> str:
    if training is None:
        return ""
    return (
        f"{training['step']:,} steps of {training['batch_size']}, {training['seconds'] / 60:.0f} min, "
        f"{training['hardware']}"
    )


if __name__ == "__main__":
    main()
