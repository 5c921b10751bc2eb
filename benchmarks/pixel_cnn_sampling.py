"""Processor time of the sampler of `PixelCNNModel` that keeps what earlier pixels gave, and of the naive one.

    python benchmarks/pixel_cnn_sampling.py --out benchmarks/results

Both draw 64 images of 28 x 28 binary pixels with the same generator on one thread of a CPU, the naive one by a call of
the network on all images for each of the 784 pixels. Whether the images are the same is written down.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from annealers import PixelCNNModel

IMAGES, SIZE = 64, 28
NETWORKS: dict[str, dict[str, Any]] = {
    "gated": {"channels": 16, "num_layers": 5, "kernel_size": 5},
    "masked": {"channels": 16, "num_layers": 5, "kernel_size": 5},
    "row_lstm": {"channels": 16, "num_layers": 3, "kernel_size": 3},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {layer_type: compare(layer_type, network) for layer_type, network in NETWORKS.items()}
    settings = {"images": IMAGES, "size": SIZE, "threads": 1, "torch": torch.__version__, "networks": NETWORKS}
    file = options.out / "pixel_cnn_sampling.json"
    file.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    print("| layers | seconds, cached | seconds, naive | ratio | images that are the same |")
    print("| --- | --- | --- | --- | --- |")
    for layer_type, row in results.items():
        print(
            f"| {layer_type} | {row['cached seconds']:.2f} | {row['naive seconds']:.1f} | {row['ratio']:.0f} | "
            f"{row['same images']} of {IMAGES} |"
        )


def compare(layer_type: str, network: dict[str, Any]) -> dict[str, Any]:
    """Seconds of both samplers, their ratio, and how many images are the same."""
    torch.manual_seed(0)
    model = PixelCNNModel(num_embeddings=2, in_channels=1, sample_size=SIZE, layer_type=layer_type, **network).eval()
    cached_seconds, cached = timed(model, use_cache=True)
    naive_seconds, naive = timed(model, use_cache=False)
    return {
        "cached seconds": cached_seconds,
        "naive seconds": naive_seconds,
        "ratio": naive_seconds / cached_seconds,
        "same images": int((naive == cached).flatten(1).all(dim=1).sum()),
    }


def timed(model: PixelCNNModel, use_cache: bool) -> tuple[float, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    started = time.thread_time()
    images = model.generate(IMAGES, generator=generator, use_cache=use_cache)
    return time.thread_time() - started, images


if __name__ == "__main__":
    main()
