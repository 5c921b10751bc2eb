"""How variational autoencoders and their hierarchies use their latents, on held-out images.

    python benchmarks/latent_use.py vae=runs/mnist/vae/pipeline ladder=runs/mnist/ladder/pipeline \
        --dataset path/to/mnist --binarize dynamic --name mnist --out benchmarks/results

Each pipeline is a folder or a Hub id of a `VAEPipeline`. By layer, from the top down: the divergence of the posterior
from the prior in nats, and how many units are active, that is, move with the image. Of the top layer, I(x; z_1) in
nats, an estimate that cannot exceed the logarithm of how many images it is taken over. See `annealers.collapse`.
"""

import argparse
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from image_likelihood import dequantised, images_of
from tqdm.auto import tqdm

from annealers import AnnealersPipeline, VAEPipeline
from annealers.collapse import LatentUse, mutual_information
from annealers.data import DataConfig, load_data, validation_batches
from annealers.randomness import PositionalRandomness

INFORMATION_IMAGES = 2000  # that I(x; z_1) is taken over, at most


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipelines", nargs="+", type=named_folder, metavar="NAME=FOLDER")
    parser.add_argument("--dataset", required=True, help="folder or Hub id of the images")
    parser.add_argument("--binarize", choices=["none", "static", "dynamic"], default="none", help="see annealers.data")
    parser.add_argument("--images", type=int, default=2000, help="held-out images, at most; a fixed choice")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the binarisation and the latents")
    parser.add_argument("--name", required=True, help="of the results: NAME_latents.json and NAME_latents.md")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    options = parser.parse_args(arguments)

    record = {
        "dataset": Path(options.dataset).name,
        "binarization": options.binarize,
        "versions": {name: version(name) for name in ("annealers", "torch", "diffusers")},
        "models": {name: measured(name, folder, options) for name, folder in options.pipelines},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.name}_latents.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / f"{options.name}_latents.md").write_text(page(record))
    print(page(record))


def named_folder(argument: str) -> tuple[str, str]:
    name, separator, folder = argument.partition("=")
    if not (name and separator and folder):
        raise argparse.ArgumentTypeError(f"need NAME=FOLDER, got {argument!r}")
    return name, folder


@torch.no_grad()
def measured(name: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    pipeline = AnnealersPipeline.from_pretrained(folder)
    if not isinstance(pipeline, VAEPipeline):
        raise SystemExit(f"{folder!r} is a {type(pipeline).__name__}, and only a VAEPipeline has such latents")
    model, randomness = pipeline.vae.eval(), PositionalRandomness(options.seed)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    data, use, top = load_data(DataConfig(dataset=options.dataset)), LatentUse(), []
    batches = validation_batches(data, options.batch_size, max_samples=options.images)
    for batch in tqdm(batches, desc=name, leave=False):
        images = images_of(batch, model.likelihood.num_levels, options)
        images, _ = dequantised(images, model.likelihood, batch["rows"].tolist(), randomness)
        noise = randomness.normal("latents", batch["first_position"], len(images), model.noise_shape)
        output = model(
            images.to(model.device),
            class_labels=None if model.config.num_class_embeds is None else batch["labels"].to(model.device),
            noise=noise.to(model.device),
        )
        use.update(output.latent_dist, getattr(output, "prior_dist", None))
        posteriors, latents = output.latent_dist, output.latents
        first, z = (posteriors[0], latents[0]) if isinstance(posteriors, tuple) else (posteriors, latents)
        top.append((first.mean.cpu(), first.logvar.cpu(), z.cpu()))
    mean, logvar, z = (torch.cat(parts)[:INFORMATION_IMAGES] for parts in zip(*top, strict=True))
    layers = use.layers()
    return {
        "images": use.images,
        "kl_per_layer": [layer.kl for layer in layers],
        "active_units": [layer.active_units for layer in layers],
        "units": [layer.units for layer in layers],
        "mutual_information_of_the_top": mutual_information(mean, logvar, z).item(),
        "images_of_mutual_information": len(mean),
    }


def page(record: dict[str, Any]) -> str:
    binarized = "" if record["binarization"] == "none" else f", {record['binarization']} binarisation"
    lines = [
        f"# Latents on {record['dataset']}{binarized}",
        "",
        "Of held-out images. Layers from the top down.",
        "",
        "| model | images | KL, nats | active units | I(x; z of the top), nats |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, use in record["models"].items():
        divergences = " + ".join(f"{kl:.2f}" for kl in use["kl_per_layer"])
        if len(use["kl_per_layer"]) > 1:
            divergences += f" = {sum(use['kl_per_layer']):.2f}"
        active = ", ".join(f"{a} of {n}" for a, n in zip(use["active_units"], use["units"], strict=True))
        count = use["images_of_mutual_information"]
        shared = f"{use['mutual_information_of_the_top']:.2f}, at most log {count:,} = {math.log(count):.2f}"
        lines.append(f"| {name} | {use['images']:,} | {divergences} | {active} | {shared} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
