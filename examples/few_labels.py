r"""What an autoencoder that has seen no label is worth to a classifier that has seen few.

    python examples/few_labels.py --out runs/few_labels

It trains a denoising autoencoder on all 1,442 training digits without their labels, and then, for 5, 10, 20 and 50
labels of each digit, drawn eight times anew, four classifiers, which it asks for the 355 test digits:

    pixels          logistic regression on the pixels: what needs no encoder
    from scratch    encoder and linear layer, all weights random at first, all trained
    linear probe    logistic regression on the latents; the encoder of the autoencoder is not touched
    fine-tuned      encoder and linear layer, all trained, which at first are the encoder of the autoencoder and the
                    linear probe (Kumar et al. 2022, arXiv:2202.10054)

All four of a draw see the same labels, so their differences are more certain than the accuracies. It takes one core of
a CPU four to six minutes, and writes

    few_labels.png     accuracy over the number of labels, with standard errors over the draws
    few_labels.json    the table

What is chosen (the learning rates, the regression's penalty) is chosen with `--choose`: on draws of their own, by the
accuracy on the training digits whose label was not drawn. The test digits choose nothing.
"""

import argparse
import copy
import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from diffusers.utils.logging import tqdm
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn.functional import cross_entropy

from annealers import AutoencoderModel, DenoisingAutoencoderPipeline
from annealers.data import load_digits_split, to_model_space
from annealers.training import train_autoencoder

BLUE, RED, GOLD, GREY = "#1f6f8b", "#c0504d", "#d9a441", "#9a9a9a"
COLOURS = {"pixels": GREY, "from scratch": RED, "linear probe": GOLD, "fine-tuned": BLUE}
NUM_CLASSES = 10
BATCH_SIZE = 64

# the best by `--choose --labels 10 --steps 100`
LEARNING_RATES = {"from scratch": 1e-3, "fine-tuned": 1e-3}
PENALTIES = {"pixels": 10.0, "linear probe": 1.0}  # the C of scikit-learn, the inverse of a penalty
CANDIDATES = {"learning rate": (1e-4, 3e-4, 1e-3, 3e-3), "penalty": (0.01, 0.1, 1.0, 10.0)}
FIRST_SEED_OF_CHOICE = 1000  # of the draws of labels; those of the table count from 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/few_labels"), help="Folder of what is written.")
    parser.add_argument("--pipeline", help="Of training/train_autoencoder.py on digits; by default one is trained.")
    parser.add_argument("--labels", type=int, nargs="+", default=[5, 10, 20, 50], help="Labels of each digit.")
    parser.add_argument("--draws", type=int, default=8, help="How often they are drawn.")
    parser.add_argument("--steps", type=int, default=200, help="Steps of training a classifier.")
    parser.add_argument("--choose", action="store_true", help="Print what settings are best, on draws of their own.")
    arguments = parser.parse_args()
    if arguments.draws < 2:
        parser.error(f"a standard error needs --draws of 2 or more, got {arguments.draws}")

    digits = load_digits_split()
    train = Labelled(to_model_space(digits.train_images), digits.train_labels)
    test = Labelled(to_model_space(digits.test_images), digits.test_labels)
    fewest = int(torch.bincount(train.labels).min())
    if not 1 <= min(arguments.labels) <= max(arguments.labels) < fewest:
        parser.error(f"--labels must lie in 1 .. {fewest - 1}, got {arguments.labels}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.pipeline is None:
        train_autoencoder.main(["--output_dir", str(arguments.out / "autoencoder"), "--report_to", "none"])
        arguments.pipeline = str(arguments.out / "autoencoder" / "pipeline")
    autoencoder = DenoisingAutoencoderPipeline.from_pretrained(arguments.pipeline).autoencoder.eval()

    if arguments.choose:
        print(json.dumps(choices(autoencoder, train, arguments.labels, arguments.steps), indent=2))
        return
    table = accuracies(autoencoder, train, test, arguments.labels, arguments.draws, arguments.steps)
    (arguments.out / "few_labels.json").write_text(json.dumps(summary(table, arguments), indent=2) + "\n")
    draw(table, len(train.labels)).savefig(arguments.out / "few_labels.png", dpi=110)


# ---- the classifiers ------------------------------------------------------------------------------------------------


class Labelled(NamedTuple):
    """Images (N, C, H, W) in [-1, 1] and their labels (N,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def at(self, rows: torch.Tensor) -> "Labelled":
        return Labelled(self.images[rows], self.labels[rows])


class EncoderClassifier(nn.Module):
    """The encoder of an autoencoder and a linear layer: logits of the digits, (B, C, H, W) -> (B, K).

    Between them stand the mean and deviation that the latents of the unlabelled images have at first, so that the
    linear layer sees latents of one size from random and from trained weights.
    """

    def __init__(self, autoencoder: AutoencoderModel, unlabelled: torch.Tensor) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(autoencoder.encoder)
        with torch.no_grad():
            latents = self.encoder(unlabelled).flatten(1)
        self.register_buffer("mean", latents.mean(dim=0))
        self.register_buffer("deviation", latents.std(dim=0))
        self.head = nn.Linear(latents.shape[1], NUM_CLASSES)
        nn.init.zeros_(self.head.weight)  # of what the encoder does not know yet it says nothing
        nn.init.zeros_(self.head.bias)

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        return (self.encoder(images).flatten(1) - self.mean) / self.deviation

    @torch.no_grad()
    def fit_head(self, labelled: Labelled, penalty: float) -> None:
        """Makes the linear layer the logistic regression on the latents."""
        model = regression(self.latents(labelled.images), labelled.labels, penalty)
        self.head.weight.copy_(torch.from_numpy(model.coef_))
        self.head.bias.copy_(torch.from_numpy(model.intercept_))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.latents(images))


def trained(
    classifier: EncoderClassifier, labelled: Labelled, rate: float, steps: int, seed: int
) -> EncoderClassifier:
    """The classifier with all of its weights trained on labelled images."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    for _ in range(steps):
        batch = labelled.at(torch.randperm(len(labelled.labels), generator=generator)[:BATCH_SIZE])
        cross_entropy(classifier(batch.images), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return classifier


def regression(features: torch.Tensor, labels: torch.Tensor, penalty: float) -> LogisticRegression:
    return LogisticRegression(C=penalty, max_iter=5000).fit(features.numpy(), labels.numpy())


def accuracy_of(
    name: str,
    autoencoder: AutoencoderModel,
    unlabelled: torch.Tensor,
    labelled: Labelled,
    asked: Labelled,
    setting: float,
    steps: int,
    seed: int,
) -> float:
    """The share of right answers of one classifier; `setting` is its learning rate or penalty."""
    if name == "pixels":
        model = regression(labelled.images.flatten(1), labelled.labels, setting)
        return float(model.score(asked.images.flatten(1).numpy(), asked.labels.numpy()))
    if name == "from scratch":
        torch.manual_seed(seed)
        autoencoder = AutoencoderModel.from_config(autoencoder.config)
    classifier = EncoderClassifier(autoencoder, unlabelled)
    if name != "from scratch":
        classifier.fit_head(labelled, setting if name == "linear probe" else PENALTIES["linear probe"])
    if name != "linear probe":
        classifier = trained(classifier, labelled, setting, steps, seed)
    with torch.no_grad():
        return float((classifier(asked.images).argmax(dim=1) == asked.labels).double().mean())


def drawn_rows(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Rows of `count` labels of each digit, (10 count,)."""
    generator = torch.Generator().manual_seed(seed)
    rows = [(labels == digit).nonzero()[:, 0] for digit in range(NUM_CLASSES)]
    return torch.cat([of_digit[torch.randperm(len(of_digit), generator=generator)[:count]] for of_digit in rows])


# ---- the table ------------------------------------------------------------------------------------------------------

Table = dict[str, dict[int, list[float]]]  # classifier -> labels of each digit -> accuracy in each draw


def accuracies(
    autoencoder: AutoencoderModel, train: Labelled, test: Labelled, counts: list[int], draws: int, steps: int
) -> Table:
    settings = {**LEARNING_RATES, **PENALTIES}
    table: Table = {name: {count: [] for count in counts} for name in COLOURS}
    with tqdm(total=len(COLOURS) * len(counts) * draws, desc="classifiers") as progress:
        for count in counts:
            for seed in range(draws):
                labelled = train.at(drawn_rows(train.labels, count, seed))
                for name in COLOURS:
                    accuracy = accuracy_of(
                        name, autoencoder, train.images, labelled, test, settings[name], steps, seed
                    )
                    table[name][count].append(accuracy)
                    progress.update()
    return table


def choices(autoencoder: AutoencoderModel, train: Labelled, counts: list[int], steps: int) -> dict[str, Any]:
    """Mean accuracy of each setting on the training digits without a label, over three draws of each size."""
    found: dict[str, Any] = {}
    for name in COLOURS:
        candidates = CANDIDATES["learning rate" if name in LEARNING_RATES else "penalty"]
        sums = dict.fromkeys(candidates, 0.0)
        for count in tqdm(counts, desc=name):
            for seed in range(FIRST_SEED_OF_CHOICE, FIRST_SEED_OF_CHOICE + 3):
                rows = drawn_rows(train.labels, count, seed)
                others = torch.ones(len(train.labels), dtype=torch.bool).index_fill(0, rows, False)
                for setting in candidates:
                    sums[setting] += accuracy_of(
                        name, autoencoder, train.images, train.at(rows), train.at(others), setting, steps, seed
                    ) / (3 * len(counts))
        found[name] = {"accuracies": sums, "best": max(candidates, key=sums.__getitem__)}
    return found


def with_error(values: list[float]) -> list[float]:
    """Mean and its standard error."""
    return [mean(values), stdev(values) / math.sqrt(len(values))]


def summary(table: Table, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is written: means with standard errors over the draws, also of the gains over training from scratch."""

    def gains(name: str, count: int) -> list[float]:
        return [a - b for a, b in zip(table[name][count], table["from scratch"][count], strict=True)]

    return {
        "labels of each digit": arguments.labels,
        "draws": arguments.draws,
        "steps": arguments.steps,
        "settings": {**LEARNING_RATES, **PENALTIES},
        "accuracy": {
            name: {count: with_error(values) for count, values in row.items()} for name, row in table.items()
        },
        "gain over training from scratch": {
            name: {count: with_error(gains(name, count)) for count in arguments.labels}
            for name in COLOURS
            if name != "from scratch"
        },
        "accuracies": table,
    }


def draw(table: Table, unlabelled: int) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, row in table.items():
        means, errors = zip(*(with_error(values) for values in row.values()), strict=True)
        axis.errorbar(list(row), means, errors, color=COLOURS[name], marker="o", ms=5, lw=1.8, capsize=3, label=name)
    axis.set(xscale="log", xlabel="labels of each digit", ylabel="accuracy on test digits")
    axis.set_xticks(list(table["pixels"]), [str(count) for count in table["pixels"]])
    axis.minorticks_off()
    axis.grid(alpha=0.3, lw=0.6)
    axis.set_title(f"An encoder trained on {unlabelled:,} digits without labels", fontsize=11)
    axis.legend(frameon=False, loc="lower right")
    return figure


if __name__ == "__main__":
    main()
