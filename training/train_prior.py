"""Trains an autoregressive model: of the pixels of images, or of the codes that a VQ-VAE makes of them.

    python training/train_prior.py                                          # handwritten digits, on a CPU, in minutes
    python training/train_prior.py --dataset FOLDER_OR_NAME --binarize dynamic --no_class_conditional
    python training/train_vqvae.py && python training/train_prior.py --vqvae runs/vqvae/pipeline

An image is a row of D values x_i, of a code a row of n values s_i, all of them one of K levels or code numbers, and

    L = -1/D sum_i log p(x_i | x_1 .. x_{i-1}, y)      or      -1/n sum_i log p(s_i | s_1 .. s_{i-1}, y)       in nats

Of pixels this is the likelihood itself, and bits per dimension are exact: L / ln 2. With a VQ-VAE they are a bound, as
any codes s of an image x make one,

    -log p(x) <= -log p(x | z_q(s)) - log p(s),

which is also given for the prior that it has to beat, of which all codes are equally likely: -log p(s) = n log K. The
VQ-VAE stays as it is; codes are made where the images are, of all those of a step at once.

What is saved is a `PixelCNNPipeline` or, with a VQ-VAE, a `VQVAEPriorPipeline` that holds both. Sources: van den Oord,
Kalchbrenner & Kavukcuoglu 2016, "Pixel Recurrent Neural Networks", arXiv:1601.06759; van den Oord, Vinyals &
Kavukcuoglu 2017, "Neural Discrete Representation Learning", arXiv:1711.00937.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from PIL import Image
from torch import nn

from annealers import CodeTransformerModel, PixelCNNModel, PixelCNNPipeline, VQVAEPriorPipeline
from annealers.configuration import RunConfig, option, parse_config
from annealers.data import Binarization, ImageData, binarized_batch
from annealers.figures import sample_grid
from annealers.models.pixel_likelihood import bits_per_dim, levels_to_values, values_to_levels
from annealers.randomness import PositionalRandomness
from annealers.run import Batch, Run, Task, Terms, gathered_images, held_out_means, my_share
from annealers.training.pixel_law import PixelLawConfig, levelled_images, spread_images


@dataclass
class PriorConfig(RunConfig):
    """Options of an autoregressive model; the defaults train one of the pixels of 8 x 8 digits on a CPU."""

    output_dir: str = option("runs/prior", "Folder of the run: pipeline, samples, metrics, checkpoints.")
    vqvae: str | None = option(
        None, "Folder or Hub id of a pipeline with the VQ-VAE whose codes to model; unset: the pixels."
    )

    max_steps: int = option(600, "Optimizer steps.")
    batch_size: int = option(64, "Images per optimizer step, over all processes and accumulation steps.")
    learning_rate: float = option(2e-3, "Peak learning rate of AdamW.")
    lr_warmup_steps: int = option(50, "Optimizer steps of linear warm-up.")
    ema_decay: float = option(0.995, "Decay of the exponential moving average of the weights.")

    binarize: Binarization = option("none", "Make grey images black and white: one draw per row, or one per look.")
    num_levels: int | None = option(None, "K of pixels; unset: 2 of binarised images, 17 of the digits, else 256.")
    class_conditional: bool = option(True, "Condition on the labels, if the data has any.")

    model: Literal["pixel_cnn", "code_transformer"] = option("pixel_cnn", "Architecture; of pixels a pixel_cnn.")
    hidden_size: int = option(32, "Channels of the network.")
    num_layers: int = option(6, "Layers of the network.")
    dropout: float = option(0.2, "Dropout in each layer.")
    layer_type: Literal["gated", "masked", "row_lstm"] = option(
        "gated", "Layers of a pixel_cnn.", of=("model", "pixel_cnn")
    )
    kernel_size: int = option(
        5, "Side of the window of each layer of a pixel_cnn but the first.", of=("model", "pixel_cnn")
    )
    first_kernel_size: int = option(
        7, "Side of the window of the first layer of a pixel_cnn.", of=("model", "pixel_cnn")
    )
    output: Literal["categorical", "mix_logistic"] = option(
        "categorical", "Law of a value that a pixel_cnn gives.", of=("model", "pixel_cnn")
    )
    num_mixtures: int = option(10, "Components of a mix_logistic output.", of=("output", "mix_logistic"))
    num_heads: int = option(4, "Attention heads of a code_transformer.", of=("model", "code_transformer"))
    mlp_ratio: float = option(
        4.0,
        "Width of the inner layer of a code_transformer, by that of the network.",
        of=("model", "code_transformer"),
    )

    temperature: float = option(1.0, "Temperature of the pictures.")
    sample_columns: int = option(10, "Samples per row of the pictures: per class, if conditional.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_levels is not None and self.num_levels < 2:
            raise ValueError(f"num_levels must be at least 2, got {self.num_levels}")
        if self.binarize != "none" and self.num_levels not in (None, 2):
            raise ValueError(f"binarised images have 2 levels, got num_levels={self.num_levels}")
        if self.vqvae is None and self.model != "pixel_cnn":
            raise ValueError(f"model={self.model!r} is of codes: name the VQ-VAE that makes them, --vqvae")
        if self.vqvae is not None and self.num_levels is not None:
            raise ValueError(f"num_levels={self.num_levels} is of pixels; codes have the number that the VQ-VAE has")
        if self.vqvae is not None and self.output != "categorical":
            raise ValueError(f"output={self.output!r} is of levels, which have an order; codes need categorical")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"need a finite temperature > 0, got {self.temperature}")
        if self.sample_columns < 1:
            raise ValueError(f"sample_columns must be at least 1, got {self.sample_columns}")


class PixelObjective(nn.Module):
    """-log p of the levels of images in [-1, 1], one number per image."""

    def __init__(self, network: ModelMixin, num_levels: int) -> None:
        super().__init__()
        self.network, self.num_levels = network, num_levels

    def forward(self, images: torch.Tensor, class_labels: torch.Tensor | None = None) -> Terms:
        """Terms (B,) of images (B, C, H, W): the loss in nats per value, and of the whole image."""
        nats = self.network(values_to_levels(images, self.num_levels), class_labels).nll
        values = images[0].numel()
        return {"loss": nats / values, "nats": nats, "bits_per_dim": nats / (values * math.log(2))}


class CodeObjective(nn.Module):
    """-log p of the codes that a frozen VQ-VAE makes of images, one number per image."""

    def __init__(self, network: ModelMixin, vqvae: ModelMixin) -> None:
        super().__init__()
        self.network, self.vqvae = network, vqvae.requires_grad_(False)

    def train(self, mode: bool = True) -> "CodeObjective":
        """The VQ-VAE stays in evaluation mode."""
        super().train(mode)
        self.vqvae.eval()
        return self

    def forward(self, images: torch.Tensor, class_labels: torch.Tensor | None = None) -> Terms:
        """Terms (B,) of images (B, C, H, W) in [-1, 1]: the loss in nats per code, and of all codes of an image."""
        # In full precision: rounding would make other codes than those that are decoded and evaluated.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            codes = self.vqvae.encode(images).indices.unsqueeze(1)  # (B, 1, h, w)
        nats = self.network(codes, class_labels).nll
        return {"loss": nats / codes[0].numel(), "code_nats": nats}

    def two_stage(self, images: torch.Tensor, class_labels: torch.Tensor | None = None) -> Terms:
        """The bound on -log p(x), in nats (B,) and per value in bits, its two parts, and the bound of equal codes."""
        first = self.vqvae(images)
        codes = first.indices.unsqueeze(1)  # (B, 1, h, w)
        code_nats = self.network(codes, class_labels).nll
        likelihood, shape = self.vqvae.likelihood, tuple(images.shape[1:])
        image_nats = first.nll + likelihood.nats_per_value * math.prod(shape)
        uniform_nats = codes[0].numel() * math.log(self.vqvae.config.num_vq_embeddings)
        return {
            "nats": image_nats + code_nats,
            "image_nats": image_nats,
            "code_nats": code_nats,
            "bits_per_dim": bits_per_dim(first.nll + code_nats, likelihood, shape),
            "bits_per_dim_uniform_prior": bits_per_dim(first.nll + uniform_nats, likelihood, shape),
        }


class PriorTask(Task):
    """What pixels and codes share."""

    config: PriorConfig
    tags = ("autoregressive",)

    @property
    def id2label(self) -> dict[int, str] | None:
        return self.data.id2label if self.config.class_conditional else None

    def network(self, num_embeddings: int, in_channels: int, sample_size: int | tuple[int, int]) -> ModelMixin:
        """The model as the options describe it, with random weights."""
        config = self.config
        shared: dict[str, Any] = {
            "num_embeddings": num_embeddings,
            "in_channels": in_channels,
            "sample_size": sample_size,
            "num_layers": config.num_layers,
            "dropout": config.dropout,
            "num_class_embeds": None if self.id2label is None else len(self.id2label),
        }
        if config.model == "code_transformer":
            return CodeTransformerModel(
                hidden_size=config.hidden_size, num_heads=config.num_heads, mlp_ratio=config.mlp_ratio, **shared
            )
        return PixelCNNModel(
            channels=config.hidden_size,
            kernel_size=config.kernel_size,
            first_kernel_size=config.first_kernel_size,
            layer_type=config.layer_type,
            output=config.output,
            num_mixtures=config.num_mixtures,
            **shared,
        )

    def draws(self, batch: Batch) -> dict[str, Any]:
        return {"images": self.images(batch, "train"), "class_labels": self.labels(batch)}

    def images(self, batch: Batch, split: str) -> torch.Tensor:
        """The images of a batch as the model is to see them."""
        return binarized_batch(batch, self.config.binarize, self.randomness, split)

    def labels(self, batch: Batch) -> torch.Tensor | None:
        return None if self.id2label is None else batch["labels"]

    def parameter_groups(self, objective: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(objective.network.parameters())}]

    def seen(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images and labels of a batch for validation."""
        labels = self.labels(batch)
        return self.images(batch, "validation").to(device), None if labels is None else labels.to(device)

    # ---- samples ----------------------------------------------------------------------------------------------------

    def example(self) -> str:
        if self.id2label is None:
            return "images = pipeline(batch_size=4).images"
        return f"images = pipeline(class_labels={list(self.id2label.values())[:4]}).images"

    def generators(self, mine: range) -> list[torch.Generator]:
        """One for each of this process's samples, so that they do not depend on the processes."""
        return [torch.Generator().manual_seed(self.randomness.step_seed(i, 0)) for i in mine]

    def samples(self, objective: nn.Module, accelerator: Accelerator) -> torch.Tensor:
        """Samples in [-1, 1], a row for each class, or a square without classes, (rows * columns, C, H, W)."""
        columns = self.config.sample_columns
        count = columns * (columns if self.id2label is None else len(self.id2label))
        mine = my_share(count, accelerator)
        pipeline = self.pipeline(accelerator.unwrap_model(objective)).to(accelerator.device)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            batch_size=len(mine),
            class_labels=None if self.id2label is None else [i // columns for i in mine],
            temperature=self.config.temperature,
            generator=self.generators(mine),
            output_type="latent",
        ).images
        return gathered_images(images, count, accelerator)


class PixelTask(PriorTask):
    """An autoregressive model of pixels."""

    @property
    def num_levels(self) -> int:
        """K. The digits are stored as bytes, but have 17 values."""
        if self.config.num_levels is not None:
            return self.config.num_levels
        if self.config.binarize != "none":
            return 2
        return 17 if self.config.dataset == "digits" else 256

    def build(self) -> PixelObjective:
        network = self.network(self.num_levels, self.data.channels, self.data.resolution)
        return PixelObjective(network, self.num_levels)

    def validate(self, objective: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Exact -log p of the held-out images, in nats and in bits per value."""
        model = accelerator.unwrap_model(objective)

        def terms(batch: Batch) -> Terms:
            terms = model(*self.seen(batch, accelerator.device))
            return {name: terms[name] for name in ("nats", "bits_per_dim")}

        return held_out_means(self.data, self.config, accelerator, terms)

    def pipeline(self, objective: PixelObjective) -> PixelCNNPipeline:
        return PixelCNNPipeline(objective.network, id2label=self.id2label)

    def picture(self, objective: nn.Module, accelerator: Accelerator) -> Image.Image:
        """Samples; below them, if images are held out, a row of those, of their upper halves, and of completions."""
        images = [self.samples(objective, accelerator)]
        if self.data.validation is not None:
            images += self.completions(objective, accelerator)
        return sample_grid(torch.cat(images), self.config.sample_columns)

    def completions(self, objective: nn.Module, accelerator: Accelerator) -> list[torch.Tensor]:
        """Held-out images, the same with the lower half black, and what the model makes of that, in [-1, 1]."""
        batch = self.shown_batch(self.config.sample_columns)
        originals, labels = self.seen(batch, accelerator.device)  # all of them, on every process
        known = torch.arange(self.data.resolution, device=accelerator.device) < self.data.resolution // 2
        known = known.unsqueeze(1).expand(-1, self.data.resolution)  # (H, W)
        mine = my_share(len(originals), accelerator)
        labels = None if labels is None else labels[mine.start : mine.stop]
        codes = accelerator.unwrap_model(objective).network.generate(
            len(mine),
            class_labels=labels,
            generator=self.generators(mine),
            temperature=self.config.temperature,
            prompt=values_to_levels(originals[mine.start : mine.stop], self.num_levels),
            known=known,
        )
        completed = gathered_images(levels_to_values(codes, self.num_levels), len(originals), accelerator)
        originals = originals.cpu()
        return [originals, originals.masked_fill(~known.cpu(), -1), completed]


class CodeTask(PriorTask):
    """An autoregressive model of the codes of a VQ-VAE."""

    tags = ("autoregressive", "vq-vae")

    def __init__(self, config: PriorConfig, data: ImageData, randomness: PositionalRandomness) -> None:
        super().__init__(config, data, randomness)
        self.vqvae = VQVAEPriorPipeline.from_pretrained(config.vqvae).vqvae
        check_match(data, self.vqvae)
        first_stage = self.vqvae.config
        self.law = PixelLawConfig(
            binarize=config.binarize, likelihood=first_stage.likelihood, num_levels=first_stage.num_levels
        )

    def build(self) -> CodeObjective:
        network = self.network(self.vqvae.config.num_vq_embeddings, 1, tuple(self.vqvae.latent_size))
        return CodeObjective(network, self.vqvae)

    def images(self, batch: Batch, split: str) -> torch.Tensor:
        """Images as the VQ-VAE was trained on: binarised, on its levels, or for a density at random places around."""
        images = levelled_images(batch, self.law, self.randomness, split)
        return spread_images(images, batch["first_position"], self.law, self.randomness, split)

    def validate(self, objective: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """The two-stage bound of the held-out images and its parts, in nats and in bits per value."""
        model = accelerator.unwrap_model(objective)
        return held_out_means(
            self.data,
            self.config,
            accelerator,
            lambda batch: model.two_stage(*self.seen(batch, accelerator.device)),
        )

    def pipeline(self, objective: CodeObjective) -> VQVAEPriorPipeline:
        return VQVAEPriorPipeline(objective.vqvae, objective.network, id2label=self.id2label)

    def picture(self, objective: nn.Module, accelerator: Accelerator) -> Image.Image:
        """Samples; below them, if images are held out, a row of those and of their reconstructions."""
        images = [self.samples(objective, accelerator).clamp(-1, 1)]
        if self.data.validation is not None:
            batch = self.shown_batch(self.config.sample_columns)
            originals, _ = self.seen(batch, accelerator.device)
            pipeline = self.pipeline(accelerator.unwrap_model(objective)).to(accelerator.device)
            images += [originals.cpu(), pipeline.reconstruct(originals, output_type="latent").images.cpu()]
        return sample_grid(torch.cat(images), self.config.sample_columns)


def check_match(data: ImageData, vqvae: ModelMixin) -> None:
    """Raises ValueError unless the VQ-VAE is of such images."""
    size = vqvae.config.sample_size
    for name, ours, theirs in (
        ("channels", data.channels, [vqvae.config.in_channels]),
        ("resolution", data.resolution, [size] if isinstance(size, int) else list(size)),
    ):
        if any(value != ours for value in theirs):
            raise ValueError(f"the images of {data.name} have {name} {ours}, those of the VQ-VAE {theirs}")


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(PriorConfig, arguments, __doc__.splitlines()[0])
    Run(config, PixelTask if config.vqvae is None else CodeTask).train()


if __name__ == "__main__":
    main()
