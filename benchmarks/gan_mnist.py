"""The losses of a GAN on the same digits: one small DCGAN, one budget, one table.

    python training/train_ddpm.py --dataset DATA/mnist --num-train-timesteps 20 --beta-schedule linear \\
        --num-inference-steps 2 --block-out-channels 8 8 --norm-groups 4 --sample-columns 1 --max-steps 1 \\
        --output-dir runs/gan_mnist/noise
    python training/train_classifier.py --dataset DATA/mnist --pipeline runs/gan_mnist/noise/pipeline \\
        --block-out-channels 8 32 64 --attention-levels 2 --norm-groups 4 --max-steps 600 --mixed-precision bf16 \\
        --classifier-scale 0 --num-inference-steps 2 --output-dir runs/gan_mnist/classifier
    python benchmarks/gan_mnist.py --dataset DATA/mnist --classifier runs/gan_mnist/classifier/pipeline \\
        --runs runs/gan_mnist --out benchmarks/results

The first command only says which noise the classifier is to know, little: alpha_bar falls to .82. Then each loss
trains the same class-conditional generator, and the same discriminator but for its normalisation, for the same number
of steps of both players, by `training/train_gan.py`, with several seeds. A finished run is not trained again.

From the averaged generator of each run as many images are drawn as there are test images, with their classes. In the
64 features that the last layer of the classifier reads of clean images, the two sets are compared:

    Fréchet      distance of the normal laws fitted to them; of two sets of real images it is not zero either
    kernel       unbiased squared maximum mean discrepancy with the cubic kernel; of two real sets it is around zero
    diversity    mean over the classes of the mean squared distance of two samples, over that of two test images; far
                 above 1 where samples are of any class, whichever was asked for
    read         share of the samples that the classifier reads as the class that was asked for

The numbers compare these rows, not with published ones in the features of an Inception network.
"""

import argparse
import json
import resource
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.utils.logging import disable_progress_bar

from annealers import GANPipeline, GuidedDiffusionPipeline, NoisyClassifierModel
from annealers.configuration import config_to_dict, parse_config
from annealers.data import DataConfig, ImageRows, load_data, to_model_space
from annealers.feature_metrics import class_diversity, classifier_features, features_of, kernel_distance
from annealers.figures import labelled, sample_grid
from annealers.metrics import frechet_distance, mean_and_standard_error
from annealers.training.train_gan import GANConfig

TRAIN_GAN = Path(__file__).parents[1] / "training" / "train_gan.py"
COMMON = [
    *("--arch", "dcgan", "--generator_channels", "32", "64", "--discriminator_channels", "32", "64"),
    *("--latent_dim", "64", "--generator_norm", "batch", "--batch_size", "64", "--learning_rate", "5e-4"),
    *("--ema_decay", "0.99", "--mixed_precision", "bf16", "--validation_samples", "256", "--report_to", "none"),
    *("--validate_every", "0", "--sample_every", "0", "--checkpoint_every", "250", "--keep_checkpoints", "1"),
]
GROUPS = ["--discriminator_norm", "group"]
LOSSES = {
    "minimax": ["--loss", "minimax", *GROUPS],
    "non-saturating": ["--loss", "non_saturating", *GROUPS],
    "least squares": ["--loss", "least_squares", *GROUPS],
    "Wasserstein, clipping": ["--loss", "wasserstein", *GROUPS, "--weight_clip", "0.01"],
    "Wasserstein, gradient penalty": ["--loss", "wasserstein", *GROUPS, "--gradient_penalty", "10"],
    "hinge, spectral norm": ["--loss", "hinge", "--discriminator_norm", "spectral"],
    "non-saturating, R1": ["--loss", "non_saturating", *GROUPS, "--r1", "1"],
}
PICTURED_OF_A_CLASS = 2
SCORES = ("frechet", "kernel", "diversity", "read")


class Real(NamedTuple):
    """Test images and what the classifier sees in them: images (n, C, H, W), labels (n,), features (n, D)."""

    images: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="as of the training scripts")
    parser.add_argument("--classifier", required=True, help="pipeline of training/train_classifier.py")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), metavar="LOSS", help="which rows")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each loss, at least 2")
    parser.add_argument("--steps", type=int, default=500, help="of both players")
    parser.add_argument("--samples", type=int, default=10_000, help="images of each set, at most")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"a standard error takes at least 2 seeds, got {options.seeds}")
    options.out.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()

    runs = {(loss, seed): trained(loss, seed, options) for seed in range(options.seeds) for loss in options.losses}

    data = load_data(DataConfig(dataset=options.dataset))
    classifier = GuidedDiffusionPipeline.from_pretrained(options.classifier).classifier
    features = classifier_features(classifier)
    images, labels = some_images(data.validation, options.samples)
    real = Real(images, labels, features_of(images, features))
    others, _ = some_images(data.train, 2 * len(images))
    halves = features_of(others, features).split(len(images))

    records, shown = [], {}
    for (loss, seed), run in runs.items():
        record = {"loss": loss, "seed": seed, **run}
        if "failed" not in run:
            drawn, seconds = samples(folder_of(loss, seed, options), real.labels, seed)
            record |= {"sampling_seconds": seconds} | scores(drawn, classifier, real)
            if loss not in shown:
                shown[loss] = pictured(drawn, real.labels)
        records.append(record)
        print(json.dumps(record), flush=True)

    right = read(classifier, real.features, real.labels)
    results = {
        "settings": {
            "command": f"python benchmarks/gan_mnist.py --dataset DATA/{data.name} --classifier "
            f"runs/gan_mnist/classifier/pipeline --runs runs/gan_mnist --out benchmarks/results --losses "
            f"{shlex.join(options.losses)} --seeds {options.seeds} --steps {options.steps} "
            f"--samples {options.samples}",
            "options": COMMON,
            "options_of_losses": {loss: LOSSES[loss] for loss in options.losses},
            "dataset": data.name,
            "samples": len(images),
            "features": real.features.shape[1],
            "classifier_accuracy": right,
            "steps": options.steps,
            "hardware": f"CPU, {torch.get_num_threads()} thread(s)",
            "versions": {package: version(package) for package in ("annealers", "torch", "diffusers")},
        },
        "real": {
            "train_to_test": distances(halves[0], real.features),
            "train_to_train": distances(*halves),
        },
        "records": records,
    }
    stem = options.out / "gan_mnist"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(results))
    rows = [*shown.values(), pictured(real.images, real.labels)]
    grid = sample_grid(torch.cat(rows), PICTURED_OF_A_CLASS * len(real.labels.unique()))
    labelled(grid, row_names=[*shown, "test images"]).save(stem.with_suffix(".png"))
    print(table(results))


# ---- training -------------------------------------------------------------------------------------------------------


def folder_of(loss: str, seed: int, options: argparse.Namespace) -> Path:
    return options.runs / f"{loss.replace(', ', '-').replace(' ', '-')}-{seed}"


def trained(loss: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains a run, or goes on with one that was stopped; the processor's seconds, or why it failed.

    Raises:
        ValueError: If there is a run of other options.
    """
    folder = folder_of(loss, seed, options)
    wanted = [*COMMON, *LOSSES[loss], "--dataset", options.dataset, "--seed", seed, "--max_steps", options.steps]
    command = [*map(str, wanted), "--output_dir", str(folder)]
    record, spent = folder / "run.json", folder / "processor.json"
    if not (folder / "pipeline").is_dir():
        if (folder / "checkpoints").is_dir():
            command += ["--resume", "latest"]
        before = processor_seconds()
        done = subprocess.run([sys.executable, TRAIN_GAN, *command], capture_output=True, text=True)
        if done.returncode != 0:
            return {"failed": done.stderr.strip().splitlines()[-1]}
        earlier = json.loads(spent.read_text())["seconds"] if spent.exists() else 0.0
        spent.write_text(json.dumps({"seconds": earlier + processor_seconds() - before}))
    found = json.loads(record.read_text())["config"]
    expected = config_to_dict(parse_config(GANConfig, command))
    differing = [name for name in expected.keys() - {"resume"} if found.get(name) != expected[name]]
    if differing:
        raise ValueError(f"{folder} is a run with other {', '.join(differing)}: remove it to train it again")
    return {"processor_seconds": json.loads(spent.read_text())["seconds"]}


def processor_seconds() -> float:
    """Of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# ---- scores ---------------------------------------------------------------------------------------------------------


def some_images(rows: ImageRows, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A fixed choice of at most `count` images, (n, C, H, W) in [-1, 1], and their labels, (n,)."""
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count].tolist()
    items = [rows[i] for i in chosen]
    return to_model_space(torch.stack([item["image"] for item in items])), torch.tensor([i["label"] for i in items])


def samples(folder: Path, labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, float]:
    """Images of these classes, (n, C, H, W) in [-1, 1], as a picture of 256 levels has them, and seconds it took."""
    pipeline = GANPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    started = time.process_time()
    images = pipeline(class_labels=labels, generator=torch.Generator().manual_seed(seed), output_type="latent").images
    seconds = time.process_time() - started
    return ((images + 1) * 127.5).round() / 127.5 - 1, seconds


def scores(images: torch.Tensor, classifier: NoisyClassifierModel, real: Real) -> dict[str, float]:
    """What the docstring of this module explains."""
    features = features_of(images, classifier_features(classifier))
    spread = class_diversity(features, real.labels, real.features, real.labels)
    return {
        **distances(features, real.features),
        "diversity": sum(spread.values()) / len(spread),
        "read": read(classifier, features, real.labels),
    }


def distances(features: torch.Tensor, others: torch.Tensor) -> dict[str, float]:
    return {"frechet": frechet_distance(features, others), "kernel": kernel_distance(features, others)}


@torch.no_grad()
def read(classifier: NoisyClassifierModel, features: torch.Tensor, labels: torch.Tensor) -> float:
    return (classifier.head(features).argmax(dim=1) == labels).double().mean().item()


def pictured(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The first images of each class."""
    return torch.cat([images[labels == label][:PICTURED_OF_A_CLASS] for label in labels.unique()])


# ---- the table ------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    settings, real, records = results["settings"], results["real"], results["records"]
    speeds = [settings["samples"] / record["sampling_seconds"] for record in records if "failed" not in record]
    seeds = len({record["seed"] for record in records})
    lines = [
        f"# The losses of a GAN on {settings['dataset']}",
        "",
        f"`{settings['command']}`, see [gan_mnist.py](../gan_mnist.py): {settings['samples']:,} samples of each run "
        f"against as many test images, in {settings['features']} features of a classifier that reads "
        f"{settings['classifier_accuracy']:.1%} of the test images. {settings['steps']:,} steps of both players, "
        f"mean and standard error over {seeds} seeds. {settings['hardware']}; "
        + (
            f"a generator draws {min(speeds):,.0f} to {max(speeds):,.0f} images per second of processor time. "
            if speeds
            else ""
        )
        + ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
        + ".",
        "",
        "| loss | Fréchet | kernel | diversity | read as asked, % | processor, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for loss in dict.fromkeys(record["loss"] for record in records):
        rows = [record for record in records if record["loss"] == loss]
        good = [record for record in rows if "failed" not in record]
        failed = "" if len(good) == len(rows) else f", {len(rows) - len(good)} of {len(rows)} runs failed"
        if len(good) < 2:
            lines.append(f"| {loss}{failed} | — | — | — | — | — |")
            continue
        seconds = sum(record["processor_seconds"] for record in good) / len(good)
        columns = zip(SCORES, (1, 1, 1, 100), (1, 1, 2, 1), strict=True)
        cells = [with_error([scale * record[name] for record in good], digits) for name, scale, digits in columns]
        lines.append(f"| {loss}{failed} | {' | '.join(cells)} | {seconds:.0f} |")
    for name, words in (("train_to_test", "training against test"), ("train_to_train", "training against training")):
        lines.append(f"| *{words} images* | *{real[name]['frechet']:.2f}* | *{real[name]['kernel']:.3f}* | | | |")
    return "\n".join(lines) + "\n"


def with_error(values: list[float], digits: int) -> str:
    mean, error = mean_and_standard_error(torch.tensor(values))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


if __name__ == "__main__":
    main()
