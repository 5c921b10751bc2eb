"""How good a model of digits is, as the commands of the README train it: label accuracy and pixel Fréchet distance.

    python training/train_ddpm.py && python benchmarks/digits_quality.py runs/ddpm/pipeline
    python training/train_gan.py && python benchmarks/digits_quality.py runs/gan/pipeline

A support vector machine trained on the training split, and tested on the held-out split, reads 1,000 samples, 100 of
each class. The Fréchet distance is that of the Gaussians fitted to the 64 pixels, in [-1, 1], of the samples and of
the held-out split; the distance from the training split to the held-out split is the floor that sampling noise leaves.
"""

import argparse
import json
import time

import torch
from diffusers import DiffusionPipeline
from sklearn.svm import SVC

import annealers
from annealers.data import load_digits_split, to_images, to_model_space
from annealers.metrics import frechet_distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", help="folder of the trained pipeline")
    parser.add_argument("--num-inference-steps", type=int, default=50, help="of a diffusion model")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="of a diffusion model")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    digits = load_digits_split()
    reader = SVC(gamma=0.001).fit(grey_values(digits.train_images), digits.train_labels)
    held_out_accuracy = reader.score(grey_values(digits.test_images), digits.test_labels)

    kind = DiffusionPipeline.load_config(options.pipeline)["_class_name"]
    pipeline = getattr(annealers, kind).from_pretrained(options.pipeline)
    sampling = {}
    if isinstance(pipeline, annealers.GuidedDiffusionPipeline):
        sampling = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
    labels = torch.arange(options.samples) % 10
    started = time.perf_counter()
    images = pipeline(
        class_labels=labels,
        **sampling,
        generator=torch.Generator().manual_seed(options.seed),
        output_type="pt",
    ).images
    seconds = time.perf_counter() - started
    images = to_images(images * 2 - 1)

    held_out = pixels(digits.test_images)
    floor = frechet_distance(pixels(digits.train_images), held_out)
    distance = frechet_distance(pixels(images), held_out)
    result = {
        "pipeline": options.pipeline,
        "samples": options.samples,
        **sampling,
        "seed": options.seed,
        "svc_accuracy_on_held_out_digits": held_out_accuracy,
        "requested_label_confirmed": reader.score(grey_values(images), labels),
        "frechet_distance_samples_to_test": distance,
        "frechet_distance_train_to_test": floor,
        "ratio": distance / floor,
        "sampling_seconds": seconds,
    }
    print(json.dumps(result, indent=2))


def grey_values(images: torch.Tensor) -> torch.Tensor:
    """The 0 .. 16 scale of the data set, for which the classifier's gamma of 0.001 is the usual one; (N, 64)."""
    return images.flatten(1) * (16 / 255)


def pixels(images: torch.Tensor) -> torch.Tensor:
    return to_model_space(images).flatten(1)


if __name__ == "__main__":
    main()
