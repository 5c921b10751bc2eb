r"""Trains a variational autoencoder, with one latent or a hierarchy of them, and measures it on held-out images.

    python training/train_vae.py                                     # handwritten digits, on a CPU, in minutes
    accelerate launch training/train_vae.py --dataset FOLDER_OR_NAME --model hierarchical --latent-channels 32 8 4

For an image x, or one given its class, and noise eps, z = mu(x) + sigma(x) eps,

    L = -log p(x | z) + beta_k KL(q(z | x) || p(z))      in nats, sums over the values of the image and of the latent

beta_k grows in a line to beta over the first K optimizer steps, if that is asked for. With free bits the divergence of
each layer of a hierarchy counts as at least lambda. Neither is in what is reported, -log p(x | z) + KL, the bound
-ELBO of -log p(x), nor in the importance-weighted bound.

A Bernoulli likelihood is of binarised images. A Gaussian one is a density, and the images have n levels: they are
spread out, x + (u - 1/2) 2 / (n - 1) with u uniform on [0, 1), and the bound of the density becomes one of -log P(x).

Sources: see `annealers.models.vae` and `annealers.models.hierarchical_vae`; beta, Higgins et al. 2017, "beta-VAE"; its
growth, Bowman et al. 2016, arXiv:1511.06349, Sec. 3.1.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import nn

from annealers import HierarchicalVAEModel, VAEModel, VAEPipeline
from annealers.collapse import LatentUse
from annealers.configuration import option, parse_config
from annealers.data import ImageData, ImageStream, PointRows, train_batches
from annealers.figures import sample_grid
from annealers.models.hierarchical_vae import HierarchicalVAEOutput, free_bits
from annealers.models.pixel_likelihood import bits_per_dim
from annealers.models.vae import VAEOutput
from annealers.randomness import PositionalRandomness
from annealers.run import Batch, Run, Task, Terms, gathered_images, held_out_means, my_share
from annealers.training.pixel_law import PixelLawConfig, levelled_images, spread_images

IMAGES_FOR_SCALE = 10_000  # of the training data, that the scale of the latents is measured on

Network = VAEModel | HierarchicalVAEModel


@dataclass
class VAEConfig(PixelLawConfig):
    """Options of a variational autoencoder; the defaults train one of 8 x 8 digits on a CPU."""

    output_dir: str = option("runs/vae", "Folder of the run: pipeline, samples, metrics, checkpoints.")
    max_steps: int = option(1000, "Optimizer steps.")
    batch_size: int = option(64, "Images per optimizer step, over all processes and accumulation steps.")
    learning_rate: float = option(2e-3, "Peak learning rate of AdamW.")
    lr_warmup_steps: int = option(50, "Optimizer steps of linear warm-up.")
    ema_decay: float = option(0.995, "Decay of the exponential moving average of the weights.")

    model: Literal["vae", "hierarchical"] = option("vae", "One latent, or a ladder of them.")
    latent_channels: list[int] = option([16], "Channels of the latent, or of each layer of a hierarchy from the top.")
    latent_levels: list[int] = option(
        [],
        "Resolution level of each layer of a hierarchy, 0 being the full one; unset: even from the last to 0.",
        of=("model", "hierarchical"),
    )
    flat_latent: bool = option(True, "Whether the latent, or the top one, is a vector rather than a map.")
    block_out_channels: list[int] = option([16, 32], "Channels of each resolution level.")
    layers_per_block: int = option(1, "Residual blocks per level of the encoder; the decoder has one more.")
    norm_groups: int = option(8, "Groups of the normalisation.")
    attention: bool = option(True, "Self-attention at the lowest resolution.")
    class_conditional: bool = option(True, "Condition on the labels, if the data has any.")

    likelihood: Literal["bernoulli", "gaussian", "discretized_logistic", "discretized_mix_logistic"] = option(
        "discretized_logistic", "Law of the pixels."
    )

    beta: float = option(1.0, "Weight of the divergence of the posterior from the prior.")
    kl_warmup_steps: int = option(300, "Optimizer steps over which it grows from 0.")
    free_bits: float = option(0.0, "Nats of each layer's divergence that cost nothing.")

    importance_samples: int = option(20, "k of the importance-weighted bound in validation; 0: none.")
    importance_images: int = option(100, "Held-out images for it.", of="importance_samples")
    sample_columns: int = option(10, "Images per row of the pictures: per class, if conditional.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "kl_warmup_steps", "free_bits", "importance_samples"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("importance_images", "sample_columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.model == "vae" and (len(self.latent_channels) != 1 or self.latent_levels or self.free_bits > 0):
            raise ValueError(
                "several latent_channels, latent_levels and free_bits are of model='hierarchical', got "
                f"{self.latent_channels}, {self.latent_levels} and {self.free_bits} with 'vae'"
            )

    @property
    def layer_levels(self) -> tuple[int, ...]:
        """`latent_levels`, or what stands for them."""
        last, layers = len(self.block_out_channels) - 1, len(self.latent_channels)
        even = (round(last * (1 - i / max(layers - 1, 1))) for i in range(layers))
        return tuple(self.latent_levels) or tuple(even)


class VAEObjective(nn.Module):
    """The loss of each image and its parts."""

    def __init__(self, network: Network, minimum_nats: float) -> None:
        super().__init__()
        self.network, self.minimum_nats = network, minimum_nats

    def forward(
        self,
        images: torch.Tensor,
        noise: torch.Tensor,
        kl_weight: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> Terms:
        """Of images in [-1, 1], (B, C, H, W), with noise (B, *noise_shape) and beta_k, (B,); returns terms (B,)."""
        output = self.network(images, class_labels=labels, noise=noise)
        terms = parts(self.network, output, images)
        charged = free_bits(layers_of(output), self.minimum_nats)
        return {"loss": output.nll + kl_weight * charged, **terms}


def layers_of(output: VAEOutput | HierarchicalVAEOutput) -> torch.Tensor:
    """KL of each layer, (L, B)."""
    return output.kl_per_layer if isinstance(output, HierarchicalVAEOutput) else output.kl[None]


def parts(network: Network, output: VAEOutput | HierarchicalVAEOutput, images: torch.Tensor) -> Terms:
    """Without beta and free bits, (B,) each: the two terms in nats, that of each layer, and their sum as a bound."""
    layers = layers_of(output)
    each = {f"kl_{i}": kl for i, kl in enumerate(layers)} if len(layers) > 1 else {}
    return {"nll": output.nll, "kl": output.kl, **each, **bounds("elbo", network, output.nll + output.kl, images)}


def bounds(kind: str, network: Network, density_nats: torch.Tensor, images: torch.Tensor) -> Terms:
    """An upper bound of -log P(x) of images with discrete values, from that of what the model is of, in both units."""
    bits = bits_per_dim(density_nats, network.likelihood, tuple(images.shape[1:]))
    return {f"{kind}_nats": bits * math.prod(images.shape[1:]) * math.log(2), f"{kind}_bits_per_dim": bits}


class VAETask(Task):
    """A variational autoencoder that becomes a `VAEPipeline`."""

    config: VAEConfig
    tags = ("vae",)

    def __init__(self, config: VAEConfig, data: ImageData, randomness: PositionalRandomness) -> None:
        super().__init__(config, data, randomness)
        if isinstance(data.train, PointRows):
            raise ValueError(f"an autoencoder is of images, got the points of {config.dataset!r}")
        self.id2label = data.id2label if config.class_conditional else None
        with torch.device("meta"):  # the shape alone
            self.noise_shape = self.build().network.noise_shape
        self.scaling_factor: float | None = None

    def build(self) -> VAEObjective:
        config, data = self.config, self.data
        shared = {
            "in_channels": data.channels,
            "sample_size": data.resolution,
            "block_out_channels": tuple(config.block_out_channels),
            "layers_per_block": config.layers_per_block,
            "norm_num_groups": config.norm_groups,
            "mid_block_add_attention": config.attention,
            "flat_latent": config.flat_latent,
            "num_class_embeds": None if self.id2label is None else len(self.id2label),
            **config.law,
        }
        if config.model == "hierarchical":
            channels, levels = tuple(config.latent_channels), config.layer_levels
            network = HierarchicalVAEModel(latent_channels=channels, latent_levels=levels, **shared)
        else:
            network = VAEModel(latent_channels=config.latent_channels[0], **shared)
        return VAEObjective(network, config.free_bits)

    # ---- what is drawn ----------------------------------------------------------------------------------------------

    def seen(self, batch: Batch, split: str) -> dict[str, torch.Tensor]:
        """Images, noise and labels of a batch, as functions of (seed, position)."""
        config, first, count = self.config, batch["first_position"], len(batch["images"])
        images = levelled_images(batch, config, self.randomness, split)
        drawn = {
            "images": spread_images(images, first, config, self.randomness, split),
            "noise": self.randomness.normal(f"noise of {split}", first, count, self.noise_shape),
        }
        return drawn if self.id2label is None else drawn | {"labels": batch["labels"]}

    def draws(self, batch: Batch) -> dict[str, torch.Tensor]:
        step = batch["positions"] // self.config.batch_size
        share = ((step + 1) / max(self.config.kl_warmup_steps, 1)).clamp(max=1)
        return self.seen(batch, "train") | {"kl_weight": self.config.beta * share}

    # ---- validation -------------------------------------------------------------------------------------------------

    def validate(self, objective: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """The bounds on held-out images, and how many units of the latents say something of an image."""
        network, use = accelerator.unwrap_model(objective).network, LatentUse()

        def terms_of(batch: Batch) -> Terms:
            seen = on_device(self.seen(batch, "validation"), accelerator)
            output = network(seen["images"], class_labels=seen.get("labels"), noise=seen["noise"])
            use.update(output.latent_dist, getattr(output, "prior_dist", None))
            return parts(network, output, seen["images"])

        values = held_out_means(self.data, self.config, accelerator, terms_of)
        layers = sum(gather_object([use]), start=LatentUse()).layers()
        values["active_units"] = sum(layer.active_units for layer in layers)
        if len(layers) > 1:
            values |= {f"active_units_{i}": layer.active_units for i, layer in enumerate(layers)}
        if self.config.likelihood == "gaussian":
            values["sigma"] = network.likelihood.log_sigma.exp().item()
        return values | self.importance_weighted(network, accelerator)

    def importance_weighted(self, network: Network, accelerator: Accelerator) -> dict[str, float]:
        """The tighter bound, on fewer images."""
        k = self.config.importance_samples
        if k == 0:
            return {}

        def terms_of(batch: Batch) -> Terms:
            seen = on_device(self.seen(batch, "validation"), accelerator)
            generators = [self.generator("importance samples", i) for i in batch["positions"].tolist()]
            nats = -network.log_prob(seen["images"], k, class_labels=seen.get("labels"), generator=generators)
            return bounds(f"iw_{k}", network, nats, seen["images"])

        fewer = dataclasses.replace(self.config, validation_samples=self.config.importance_images)
        values = held_out_means(self.data, fewer, accelerator, terms_of)
        return values | {f"iw_{k}_images": values.pop("images")}

    def generator(self, stream: str, position: int) -> torch.Generator:
        """One for each image, the same on any number of processes."""
        return torch.Generator().manual_seed(int(self.randomness.integers(stream, position, 1, 2**53)))

    # ---- the latents of the training images -------------------------------------------------------------------------

    def before_saving(self, objective: nn.Module, accelerator: Accelerator) -> None:
        """1 / std(z), one number for all processes, which latents are multiplied by (Rombach et al. 2022, App. G)."""
        network = accelerator.unwrap_model(objective).network
        if isinstance(network, HierarchicalVAEModel):  # latent diffusion models are of one latent
            return
        sums = torch.zeros(3, dtype=torch.float64)  # how many values of z there are, their sum and that of the squares
        for batch in self.first_images(accelerator):
            seen = on_device(self.seen(batch, "train"), accelerator)
            posterior = network.encode(seen["images"], seen.get("labels")).latent_dist
            z = (posterior.mean + posterior.std * seen["noise"]).double().cpu()
            z = z[batch["positions"] < self.count_for_scale]
            sums += torch.stack([torch.tensor(z.numel()), z.sum(), z.square().sum()])
        n, total, squares = accelerator.reduce(sums.to(accelerator.device), reduction="sum").tolist()
        self.scaling_factor = 1 / math.sqrt(squares / n - (total / n) ** 2)

    @property
    def count_for_scale(self) -> int:
        """How many images: each once, if there are fewer than wanted."""
        rows = self.data.train
        return IMAGES_FOR_SCALE if isinstance(rows, ImageStream) else min(IMAGES_FOR_SCALE, len(rows))

    def first_images(self, accelerator: Accelerator) -> Iterator[Batch]:
        """This process's share of the batches that training begins with, each row at most once."""
        return train_batches(
            self.data,
            self.config,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            last_step=-(-self.count_for_scale // self.config.batch_size),
        )

    def pipeline(self, objective: VAEObjective) -> VAEPipeline:
        if self.scaling_factor is not None:
            objective.network.register_to_config(scaling_factor=self.scaling_factor)
        return VAEPipeline(objective.network, id2label=self.id2label)

    def example(self) -> str:
        if self.id2label is None:
            return "images = pipeline(batch_size=4).images"
        return f"images = pipeline(class_labels={list(self.id2label.values())[:4]}).images"

    # ---- pictures ---------------------------------------------------------------------------------------------------

    def picture(self, objective: nn.Module, accelerator: Accelerator) -> Image.Image:
        """Held-out images above E[x | mu(x)], samples of the prior, and the whole of it if it has two dimensions."""
        pipeline = self.pipeline(accelerator.unwrap_model(objective)).to(accelerator.device)
        pipeline.set_progress_bar_config(disable=True)
        blocks = [self.reconstructions(pipeline, accelerator), self.samples(pipeline, accelerator)]
        if math.prod(self.noise_shape) == 2:
            label = None if self.id2label is None else 0
            manifold = pipeline.manifold(self.config.sample_columns, class_labels=label, output_type="latent").images
            blocks.append(manifold.cpu())
        white = torch.ones(self.config.sample_columns, *blocks[0].shape[1:])
        images = torch.cat([blocks[0], *(rows for block in blocks[1:] for rows in (white, block))])
        return sample_grid(images, self.config.sample_columns)

    def reconstructions(self, pipeline: VAEPipeline, accelerator: Accelerator) -> torch.Tensor:
        """A row of images and one of what becomes of them, white where there are no more."""
        columns = self.config.sample_columns
        batch = self.shown_batch(columns)
        seen, count = self.seen(batch, "validation"), len(batch["images"])
        mine = list(my_share(count, accelerator))
        images = pipeline.reconstruct(
            seen["images"][mine],
            class_labels=None if self.id2label is None else seen["labels"][mine].tolist(),
            output_type="latent",
        ).images
        white = torch.ones(columns - count, *seen["images"].shape[1:])
        return torch.cat([seen["images"], white, gathered_images(images, count, accelerator), white])

    def samples(self, pipeline: VAEPipeline, accelerator: Accelerator) -> torch.Tensor:
        """E[x | z] of z from the prior, a row for each class or a square without classes."""
        columns = self.config.sample_columns
        count = columns * (columns if self.id2label is None else len(self.id2label))
        mine = my_share(count, accelerator)
        images = pipeline(
            batch_size=len(mine),
            class_labels=None if self.id2label is None else [i // columns for i in mine],
            generator=[self.generator("samples", i) for i in mine],
            output_type="latent",
        ).images
        return gathered_images(images, count, accelerator)


def on_device(draws: dict[str, torch.Tensor], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    return {name: value.to(accelerator.device) for name, value in draws.items()}


def main(arguments: list[str] | None = None) -> None:
    Run(parse_config(VAEConfig, arguments, __doc__.splitlines()[0]), VAETask).train()


if __name__ == "__main__":
    main()
