"""How a codebook is used, with and without restarts of unused codes: VQ-VAEs that differ in nothing else.

    python benchmarks/codebook.py --dataset path/to/cifar10 --runs runs/codebook --out benchmarks/results

Images of 32 x 32 become 8 x 8 codes, 64 of them, out of K = 512. Both codebooks start with the centres of k-means of
the latents of the untrained encoder. Of each network, on all test images:

    used          codes that are chosen at least once
    perplexity    exp of the entropy of how often each is chosen: K if all are alike
    PSNR          of an image and its reconstruction, 10 log10(4 / mean squared error), averaged over images, in dB
    bits/dim      -log2 p(x | codes) / 3072, and with log2 K bits for each code a bound of -log2 p(x) / 3072

A run that is there already is not trained again, but must be of as many steps; one that was stopped goes on.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from annealers.training.train_vqvae import main as train

VARIANTS = {
    "restart": ["--restart_threshold", "0.1"],
    "no restart": ["--restart_threshold", "0"],
    "no restart, random start": ["--restart_threshold", "0", "--kmeans_vectors", "0"],
}
K = 512
ARCHITECTURE = [
    *("--block_out_channels", "16", "32", "64", "--latent_channels", "32", "--num_vq_embeddings", str(K)),
    *("--likelihood", "gaussian", "--batch_size", "64", "--kmeans_vectors", "16384"),
]
COLUMNS = {
    "used_codes": ("used", "{:.0f}"),
    "perplexity": ("perplexity", "{:.0f}"),
    "psnr": ("PSNR", "{:.2f}"),
    "bits_per_dim_given_codes": ("bits/dim given codes", "{:.3f}"),
    "bits_per_dim_uniform_prior": ("with a uniform prior", "{:.3f}"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="folder or Hub id of CIFAR-10")
    parser.add_argument("--runs", type=Path, default=Path("runs/codebook"), help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of 64 images")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["restart", "no restart"])
    options = parser.parse_args()

    rows = {}
    for name in options.variants:
        folder = options.runs / name.replace(",", "").replace(" ", "-")
        if not (folder / "run.json").is_file():
            train([*arguments(options, folder), *VARIANTS[name]])
        rows[name] = result(folder, options.steps)
    write(rows, options)


def arguments(options: argparse.Namespace, folder: Path) -> list[str]:
    return [
        *("--dataset", options.dataset, "--output_dir", str(folder), *ARCHITECTURE),
        *("--max_steps", str(options.steps), "--validation_samples", str(options.images), "--resume", "latest"),
        *("--validate_every", "0", "--sample_every", "0", "--checkpoint_every", "200", "--report_to", "none"),
    ]


def result(folder: Path, steps: int) -> dict[str, float | str]:
    """The last validation of a run of so many steps, and what it was trained on."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (last,) = [entry for entry in entries if "validation/psnr" in entry][-1:]
    record = json.loads((folder / "run.json").read_text())
    if record["step"] != steps:
        raise ValueError(f"the run in {folder} is of {record['step']} steps and not of {steps}: choose another folder")
    values = {name.removeprefix("validation/"): value for name, value in last.items()}
    about = {"seconds": record["seconds"], "hardware": record["hardware"], "command": record["command"]}
    return values | about | {"samples": str(folder / "samples.png")}


def write(rows: dict[str, dict], options: argparse.Namespace) -> None:
    """codebook.json, codebook.md and codebook.png."""
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "codebook.json").write_text(json.dumps({"steps": options.steps, "runs": rows}, indent=2) + "\n")
    names = [column for column, _ in COLUMNS.values()]
    lines = [f"| {K} codes, {options.steps} steps | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for name, row in rows.items():
        cells = [form.format(row[key]) for key, (_, form) in COLUMNS.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    (options.out / "codebook.md").write_text("\n".join(lines) + "\n")
    pictures = [Image.open(row["samples"]) for row in rows.values()]
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    sheet.save(options.out / "codebook.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
