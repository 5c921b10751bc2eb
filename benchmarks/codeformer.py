"""CodeFormer: what the fidelity weight trades, and which codes are found by a transformer and by nearest neighbours.

    python training/train_vqvae.py && python training/train_codeformer.py
    python benchmarks/codeformer.py runs/codeformer --out benchmarks/results

Held-out images are made bad, at five severities: all parameters of the degradation at the same share of the ranges
that the restorer was trained on, 0 being the mildest, and once with parameters drawn evenly, as in training. Of each
way to restore them:

    right codes    share of the codes that are those of the good image
    PSNR           against the good image, 10 log10(4 / mean squared error), in dB
    Fréchet        distance of normal laws fitted to the pixels of restored and of good images, of the same number; of
                   two halves of the good images, it is not zero either
    read           share of the images whose label a classifier of good images reads (a support-vector machine, trained
                   on the training images)

PSNR rewards blur, the Fréchet distance punishes it: fidelity and quality. The ways are

    bad image      as it is
    VQ-VAE         the nearest vectors to what the encoder of good images says
    nearest        the nearest vectors to what the encoder of bad images says, which stage II has trained
    w = 0 .. 1     the codes that the transformer predicts, and what the bad image adds to them
    right codes    those of the good image: no lookup can do better
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.svm import SVC

from annealers import CodeFormerModel, CodeFormerPipeline
from annealers.data import DataConfig, ImageRows, load_data, to_model_space
from annealers.figures import enlarge, image_grid, to_pil
from annealers.image_degradations import DegradationParameters, DegradationRanges, degrade
from annealers.metrics import frechet_distance, mean_and_standard_error, psnr

SEVERITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRAINING_IMAGES = 2000  # for the classifier
PICTURED = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run of training/train_codeformer.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--images", type=int, default=355, help="held-out images")
    options = parser.parse_args()

    network = CodeFormerPipeline.from_pretrained(options.run / "pipeline").code_former
    record = json.loads((options.run / "run.json").read_text())
    trained = record["config"]
    options_of_data = {field.name: trained[field.name] for field in fields(DataConfig)} | {"streaming": False}
    data = load_data(DataConfig(**options_of_data))  # so that the same images are held out
    if data.id2label is None or data.validation is None:
        raise ValueError(f"need held-out images with labels, by which restored ones are read; {data.name} has none")
    options.out.mkdir(parents=True, exist_ok=True)
    good, labels = some_images(data.validation, options.images)
    examples, classes = some_images(data.train, TRAINING_IMAGES)
    reader = SVC().fit(examples.flatten(1).numpy(), classes.numpy())
    ranges = DegradationRanges(
        *(tuple(trained[name]) for name in ("blur_sigma", "downsampling", "noise_level", "jpeg_quality"))
    )
    noise = torch.randn(good.shape, generator=torch.Generator().manual_seed(1))

    records, shown = [], {}
    drawn = ranges.parameters(
        torch.rand(len(good), 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    )
    for severity in (*SEVERITIES, None):
        bad = degrade(good, drawn if severity is None else at_severity(ranges, severity, len(good)), noise)
        for way, (images, codes) in ways(network, good, bad).items():
            records.append({"severity": severity, "way": way} | scores(images, codes, network, good, labels, reader))
            if severity is None:
                shown[way] = images[:PICTURED]
    half = len(good) // 2
    results = {
        "settings": {
            "images": len(good),
            "frechet_of_halves": frechet_distance(good[:half].flatten(1), good[half : 2 * half].flatten(1)),
            "read_of_good": (torch.from_numpy(reader.predict(good.flatten(1).numpy())) == labels)
            .double()
            .mean()
            .item(),
            "steps": record["step"],
            "training_seconds": record["seconds"],
            "hardware": record["hardware"],
            "torch": torch.__version__,
        },
        "records": records,
    }
    stem = options.out / "codeformer"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(results))
    figure(records, shown, good[:PICTURED]).savefig(stem.with_suffix(".png"), dpi=110)
    print(table(results))


def some_images(rows: ImageRows, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A fixed choice of at most `count` images, (n, C, H, W) in [-1, 1], and their labels, (n,)."""
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count].tolist()
    items = [rows[i] for i in chosen]
    return to_model_space(torch.stack([item["image"] for item in items])), torch.tensor([i["label"] for i in items])


def at_severity(ranges: DegradationRanges, severity: float, count: int) -> DegradationParameters:
    """All parameters at that share of their ranges; of the quality, from its upper end."""
    shares = torch.tensor([severity, severity, severity, 1 - severity], dtype=torch.float64).clamp(max=1 - 1e-9)
    return ranges.parameters(shares.expand(count, 4))


@torch.no_grad()
def ways(
    network: CodeFormerModel, good: torch.Tensor, bad: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Images of each way to restore, (B, C, H, W), and their codes, (B, h, w)."""
    latents, features = network.encode(bad)
    predicted = network.transformer.forward_features(latents).argmax(dim=1)
    lookups = {
        "VQ-VAE": network.codes(bad),
        "nearest": network.vqvae.quantize.indices(latents),
        "right codes": network.codes(good),
    }
    return {
        "bad image": (bad, None),
        **{name: (network.decode(codes, features, 0.0), codes) for name, codes in lookups.items()},
        **{f"w = {w:g}": (network.decode(predicted, features, w), predicted) for w in WEIGHTS},
    }


def scores(
    images: torch.Tensor,
    codes: torch.Tensor | None,
    network: CodeFormerModel,
    good: torch.Tensor,
    labels: torch.Tensor,
    reader: SVC,
) -> dict[str, Any]:
    """What the docstring of this module explains; (mean, standard error over images) where there is one."""
    images = images.clamp(-1, 1)
    read = torch.from_numpy(reader.predict(images.flatten(1).numpy())) == labels
    result = {
        "psnr": mean_and_standard_error(psnr(images, good)),
        "frechet": frechet_distance(images.flatten(1), good.flatten(1)),
        "read": mean_and_standard_error(read.double()),
    }
    if codes is not None:
        right = (codes == network.codes(good)).double().flatten(1).mean(dim=1)
        result["right_codes"] = mean_and_standard_error(right)
    return result


def figure(records: list[dict[str, Any]], shown: dict[str, torch.Tensor], good: torch.Tensor) -> Figure:
    """Restored images above; below, codes and PSNR against the severity, and what the weight trades."""
    rows = ("bad image", "VQ-VAE", "w = 0", "w = 0.5", "w = 1", "right codes")
    canvas = Figure(figsize=(11, 8.5), layout="constrained")
    FigureCanvasAgg(canvas)
    above, below = canvas.subfigures(2, 1, height_ratios=(1.2, 1))
    panel = above.subplots()
    pictures = to_pil(torch.cat([*(shown[way] for way in rows), good]))
    grid = image_grid([enlarge(picture, max(1, 32 // picture.width)) for picture in pictures], len(good), padding=2)
    panel.imshow(grid, cmap="gray", vmin=0, vmax=255)
    step = grid.height / (len(rows) + 1)
    panel.set_yticks([(i + 0.5) * step for i in range(len(rows) + 1)], [*rows, "good image"])
    panel.set_xticks([])

    panels = below.subplots(1, 3)
    for way, colour in (("VQ-VAE", "#d55e00"), ("nearest", "#e69f00"), ("w = 0", "#0072b2")):
        label = "transformer" if way == "w = 0" else way
        for panel, name in zip(panels, ("right_codes", "psnr"), strict=False):
            values = [record[name][0] for record in records if record["way"] == way and record["severity"] is not None]
            panel.plot(SEVERITIES, values, "o-", color=colour, label=label)
    values = {way: [r["psnr"][0] for r in records if r["way"] == way and r["severity"] is not None] for way in rows}
    panels[1].plot(SEVERITIES, values["bad image"], "--", color="grey", label="bad image")
    panels[1].plot(SEVERITIES, values["w = 1"], "o-", color="#009e73", label="w = 1")
    panels[0].set(xlabel="severity of the degradation", ylabel="share of right codes")
    panels[1].set(xlabel="severity of the degradation", ylabel="PSNR, dB")
    panels[0].legend(fontsize=8)
    panels[1].legend(fontsize=8)

    drawn = {record["way"]: record for record in records if record["severity"] is None}
    panels[2].plot(WEIGHTS, [drawn[f"w = {w:g}"]["psnr"][0] for w in WEIGHTS], "o-", color="#0072b2")
    panels[2].set(xlabel="fidelity weight w")
    panels[2].set_ylabel("PSNR, dB", color="#0072b2")
    other = panels[2].twinx()
    other.plot(WEIGHTS, [drawn[f"w = {w:g}"]["frechet"] for w in WEIGHTS], "s--", color="#d55e00")
    other.set_ylabel("Fréchet distance of pixels", color="#d55e00")
    return canvas


def table(results: dict[str, Any]) -> str:
    """The records in Markdown: parameters as drawn, then right codes and PSNR by severity."""
    records, settings = results["records"], results["settings"]
    drawn = [record for record in records if record["severity"] is None]
    lines = [
        f"{settings['images']} held-out images, degraded as in training; of the good ones "
        f"{100 * settings['read_of_good']:.1f} % are read, and the Fréchet distance of two halves of them is "
        f"{settings['frechet_of_halves']:.2f}.",
        "",
        "| way | right codes, % | PSNR, dB | Fréchet | read, % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for record in drawn:
        lines.append(
            f"| {record['way']} | {percent(record.get('right_codes'))} | {record['psnr'][0]:.2f} ± "
            f"{record['psnr'][1]:.2f} | {record['frechet']:.2f} | {percent(record['read'])} |"
        )
    lookups = ("VQ-VAE", "nearest", "w = 0")
    for name, title, shown, show in (
        ("right_codes", "Right codes, %", lookups, percent),
        ("psnr", "PSNR, dB", ("bad image", *lookups, "w = 0.5", "w = 1"), "{0[0]:.2f} ± {0[1]:.2f}".format),
        ("read", "Read, %", ("bad image", *lookups, "w = 0.5", "w = 1"), percent),
    ):
        lines += ["", f"**{title}**, by severity", ""]
        lines += ["| way | " + " | ".join(f"{severity:g}" for severity in SEVERITIES) + " |"]
        lines += ["| --- " * (len(SEVERITIES) + 1) + "|"]
        for way in shown:
            row = [r[name] for r in records if r["way"] == way and r["severity"] is not None]
            lines.append(f"| {way} | " + " | ".join(map(show, row)) + " |")
    return "\n".join(lines) + "\n"


def percent(value: tuple[float, float] | None) -> str:
    return "—" if value is None else f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"


if __name__ == "__main__":
    main()
