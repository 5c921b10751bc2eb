"""What a classifier of noisy images does to a diffusion model that is not asked for a class: accuracy and diversity.

    python training/train_ddpm.py && python training/train_classifier.py
    python benchmarks/classifier_guidance.py runs/classifier/pipeline --out benchmarks/results

The network of digits draws from its null class, and the classifier alone leads it to a class, with a growing weight. A
support vector machine that has seen only clean training digits reads the samples. The Fréchet distance is that of the
Gaussians fitted to the 64 pixels, in [-1, 1], of the samples of all classes and of the held-out split. Diversity is
the variance of the samples within their class, summed over the pixels, over that of the training digits.

All rows are drawn from the same noise, half of it in each of two seeds, which are also reported apart.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import diffusers
import matplotlib.pyplot as plt
import torch
from digits_quality import grey_values, pixels
from sklearn.svm import SVC

from annealers import GuidedDiffusionPipeline
from annealers.data import load_digits_split, to_images
from annealers.metrics import frechet_distance

SEEDS = (0, 1)
CLASSIFIER_SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
# (name, guidance_scale, classifier_scale)
ROWS = [(f"classifier, w = {w:g}", 0.0, w) for w in CLASSIFIER_SCALES]
ROWS += [("the network's own condition", 1.0, 0.0), ("both, the classifier with w = 1", 1.0, 1.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", help="folder of the pipeline with its classifier")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=250, help="for each seed, a tenth of each class")
    options = parser.parse_args()

    digits = load_digits_split()
    reader = SVC(gamma=0.001).fit(grey_values(digits.train_images), digits.train_labels)
    train, held_out = pixels(digits.train_images), pixels(digits.test_images)
    train_diversity = within_class_variance(train, digits.train_labels)

    pipeline = GuidedDiffusionPipeline.from_pretrained(options.pipeline)
    pipeline.set_progress_bar_config(desc="sampling")
    labels = torch.arange(options.samples) % 10
    records, shown = [], {}
    for name, guidance_scale, classifier_scale in ROWS:
        started = time.perf_counter()
        drawn = [
            to_images(
                pipeline(
                    class_labels=labels,
                    guidance_scale=guidance_scale,
                    classifier_scale=classifier_scale,
                    num_inference_steps=options.num_inference_steps,
                    generator=torch.Generator().manual_seed(seed),
                    output_type="latent",
                ).images
            )
            for seed in SEEDS
        ]
        shown[name] = drawn[0][:20]
        both, both_labels = torch.cat(drawn), labels.repeat(len(SEEDS))
        confirmed = [reader.score(grey_values(images), labels) for images in drawn]
        records.append(
            {
                "name": name,
                "guidance_scale": guidance_scale,
                "classifier_scale": classifier_scale,
                "requested_label_confirmed": sum(confirmed) / len(SEEDS),
                "requested_label_confirmed_by_seed": confirmed,
                "frechet_distance": frechet_distance(pixels(both), held_out),
                "frechet_distance_by_seed": [frechet_distance(pixels(images), held_out) for images in drawn],
                "diversity": within_class_variance(pixels(both), both_labels) / train_diversity,
                "seconds": time.perf_counter() - started,
            }
        )
        print(json.dumps(records[-1]))

    results = {
        "settings": {
            "samples": len(SEEDS) * options.samples,
            "num_inference_steps": options.num_inference_steps,
            "scheduler": type(pipeline.scheduler).__name__,
            "frechet_distance_train_to_test": frechet_distance(train, held_out),
            "svc_accuracy_on_held_out_digits": reader.score(grey_values(digits.test_images), digits.test_labels),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "records": records,
    }
    (options.out / "classifier_guidance.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.out / "classifier_guidance.md").write_text(table(results))
    save_picture(shown, options.out / "classifier_guidance.png")


def within_class_variance(features: torch.Tensor, labels: torch.Tensor) -> float:
    """The mean over the classes of the variance in the class, summed over the features, (N, D)."""
    return torch.stack([features[labels == label].double().var(dim=0).sum() for label in range(10)]).mean().item()


def table(results: dict[str, Any]) -> str:
    settings = results["settings"]
    floor = settings["frechet_distance_train_to_test"]
    lines = [
        "# A classifier leads a diffusion model of digits",
        "",
        "Made by `python benchmarks/classifier_guidance.py runs/classifier/pipeline --out benchmarks/results`, which",
        f"says what is measured. {settings['samples']} samples a row in two seeds, by {settings['scheduler']} with",
        f"{settings['num_inference_steps']} steps. Distances are multiples of that of training to held-out digits,",
        f"{floor:.4f}. The reader is right about {settings['svc_accuracy_on_held_out_digits']:.1%} of these.",
        f"torch {settings['torch']}, diffusers {settings['diffusers']}.",
        "",
        "| led by | requested digit confirmed | (seeds) | Fréchet distance | (seeds) | diversity |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for record in results["records"]:
        confirmed = " / ".join(f"{share:.1%}" for share in record["requested_label_confirmed_by_seed"])
        distances = " / ".join(f"{distance / floor:.2f}" for distance in record["frechet_distance_by_seed"])
        lines.append(
            f"| {record['name']} | {record['requested_label_confirmed']:.1%} | {confirmed} "
            f"| {record['frechet_distance'] / floor:.2f} | {distances} | {record['diversity']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def save_picture(shown: dict[str, torch.Tensor], path: Path) -> None:
    """A row of two samples of each digit for each way to lead, all from the same noise."""
    figure, axes = plt.subplots(len(shown), 1, figsize=(9, 0.38 * len(shown)), layout="constrained")
    for axis, (name, images) in zip(axes, shown.items(), strict=True):
        ordered = torch.stack([images[[digit, digit + 10]] for digit in range(10)]).flatten(0, 1)  # (20, 1, 8, 8)
        spaced = torch.nn.functional.pad(ordered, (0, 1), value=255)  # a white column after each
        axis.imshow(torch.cat(list(spaced[:, 0]), dim=1), cmap="grey", vmin=0, vmax=255)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
