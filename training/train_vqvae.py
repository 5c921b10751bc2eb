r"""Trains a VQ-VAE, which turns an image into a small picture of codes and back, or with an adversary a VQ-GAN.

    python training/train_vqvae.py                                   # handwritten digits, on a CPU, in minutes
    accelerate launch training/train_vqvae.py --dataset FOLDER_OR_NAME --num_vq_embeddings 512

For an image x with V values, its latents z_e, the codebook vectors e nearest to them and what is decoded, x^,

    L = -log p(x | e) / V + beta ||z_e - sg[e]||^2           the second averaged over positions
        + ||sg[z_e] - e||^2                                  if the codebook is learnt by gradient
        + f d(x, x^)                                         if there is a network to compare features in
        + w lambda L_generator(x^)  and  L_discriminator     if there is an adversary, from its first step on

The codebook starts as the centres of k-means of the latents of training images, and then is a moving average over
optimizer steps. The weight beta is the only one that matters to it: the codebook itself sees no other term.

What is saved is a pipeline without a prior, which reconstructs images; `training/train_prior.py` adds the prior.

Sources: see `annealers.models.vqvae`, `annealers.models.vector_quantizer`, `annealers.feature_loss` and
`annealers.adversarial`. VQ-GAN, Esser et al. 2021, arXiv:2012.09841, has |x - x^| for the first term.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from annealers import GANDiscriminator, VQVAEModel, VQVAEPriorPipeline
from annealers.configuration import option, parse_config
from annealers.data import ImageData, PointRows, train_batches
from annealers.feature_loss import FeatureLoss
from annealers.figures import sample_grid
from annealers.metrics import psnr
from annealers.models.pixel_likelihood import bits_per_dim
from annealers.models.vector_quantizer import perplexity
from annealers.models.vqvae import code_counts
from annealers.randomness import PositionalRandomness
from annealers.run import Batch, Run, Terms, gathered_images, held_out_means, my_share
from annealers.training.adversary import AdversarialObjective, AdversarialTask, AdversaryConfig
from annealers.training.pixel_law import PixelLawConfig, levelled_images, spread_images

KMEANS_ITERATIONS = 30


@dataclass
class VQVAEConfig(AdversaryConfig, PixelLawConfig):
    """Options of a VQ-VAE; the defaults train one of 8 x 8 digits on a CPU."""

    output_dir: str = option("runs/vqvae", "Folder of the run: pipeline, samples, metrics, checkpoints.")
    max_steps: int = option(1000, "Optimizer steps.")
    batch_size: int = option(64, "Images per optimizer step, over all processes and accumulation steps.")
    learning_rate: float = option(2e-3, "Peak learning rate of AdamW.")
    lr_warmup_steps: int = option(50, "Optimizer steps of linear warm-up.")
    ema_decay: float = option(0.995, "Decay of the exponential moving average of the weights.")

    block_out_channels: list[int] = option([32, 64], "Channels of each resolution level; all but the last halve.")
    layers_per_block: int = option(1, "Residual blocks per level of the encoder; the decoder has one more.")
    norm_groups: int = option(8, "Groups of the normalisation.")
    attention: bool = option(False, "Self-attention at the lowest resolution.")
    latent_channels: int = option(16, "Length of the codebook vectors.")
    num_vq_embeddings: int = option(64, "Codebook vectors, K.")

    sigma: float = option(
        0.2,
        "Standard deviation of 'gaussian', of images in [-1, 1]; that at first if it is learnt.",
        of=("likelihood", "gaussian"),
    )

    codebook: Literal["average", "gradient"] = option("average", "Moving average over the steps, or by gradient.")
    codebook_decay: float = option(0.99, "Of the moving average.", of=("codebook", "average"))
    restart_threshold: float = option(
        0.1,
        "Codes used less often per optimizer step become a latent of it; 0 restarts none; of 'average'.",
        of=("codebook", "average"),
    )
    kmeans_vectors: int = option(8192, "Latents whose k-means centres the codebook starts with; 0: at random.")
    beta: float = option(0.25, "Weight of the commitment.")

    sample_columns: int = option(10, "Images in the pictures.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kmeans_vectors", "beta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.sample_columns < 1:
            raise ValueError(f"sample_columns must be at least 1, got {self.sample_columns}")
        if 0 < self.kmeans_vectors < self.num_vq_embeddings:
            raise ValueError(
                f"k-means finds no more centres than there are latents: need kmeans_vectors >= num_vq_embeddings = "
                f"{self.num_vq_embeddings}, or 0, got {self.kmeans_vectors}"
            )

    @property
    def quantizer(self) -> dict[str, Any]:
        """The options of the codebook as the model takes them."""
        if self.codebook == "gradient":
            return {"decay": None, "restart_threshold": 0.0}
        return {"decay": self.codebook_decay, "restart_threshold": self.restart_threshold}


class VQVAEObjective(AdversarialObjective):
    """The losses of both players, each of which reaches the weights of its own alone."""

    def __init__(
        self,
        network: VQVAEModel,
        feature_loss: FeatureLoss | None = None,
        feature_weight: float = 1.0,
        discriminator: GANDiscriminator | None = None,
    ) -> None:
        super().__init__(feature_loss, feature_weight, discriminator)
        self.network = network

    def forward(
        self,
        images: torch.Tensor,
        seen: torch.Tensor,
        restart_priority: torch.Tensor,
        adversarial_weight: float = 0.0,
    ) -> Terms:
        """Terms of shape (B,).

        Args:
            images: With levels, (B, C, H, W); what features and the discriminator compare.
            seen: The same, spread out if the law is a density.
            restart_priority: Random numbers, (B, h, w).
            adversarial_weight: w in this step; 0 before the adversary's first.
        """
        output = self.network(seen, restart_priority)
        terms = {"nll": output.nll, "commitment": output.commitment}
        reconstruction = self.with_features(output.nll / images[0].numel(), images, output.sample, terms)
        loss = reconstruction + self.network.config.beta * output.commitment
        if self.network.config.decay is None:
            loss, terms["codebook"] = loss + output.codebook, output.codebook
        last_layer = self.network.decoder.conv_out.weight
        loss = loss + self.game(images, output.sample, reconstruction, last_layer, adversarial_weight, terms)
        return {"loss": loss, **terms}


class VQVAETask(AdversarialTask):
    """A VQ-VAE that becomes a `VQVAEPriorPipeline` without a prior."""

    config: VQVAEConfig
    pipeline_tag = "image-to-image"
    tags = ("vq-vae",)

    def __init__(self, config: VQVAEConfig, data: ImageData, randomness: PositionalRandomness) -> None:
        super().__init__(config, data, randomness)
        if isinstance(data.train, PointRows):
            raise ValueError(f"an autoencoder is of images, got the points of {config.dataset!r}")

    def build(self) -> VQVAEObjective:
        """A new objective. The first one is that which is trained, and whose codebook moves after each step."""
        config, data = self.config, self.data
        network = VQVAEModel(
            in_channels=data.channels,
            sample_size=data.resolution,
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_groups,
            mid_block_add_attention=config.attention,
            latent_channels=config.latent_channels,
            num_vq_embeddings=config.num_vq_embeddings,
            beta=config.beta,
            **config.quantizer,
            **config.law,
        )
        discriminator = self.make_discriminator(norm_num_groups=config.norm_groups)
        objective = VQVAEObjective(network, self.make_feature_loss(), config.feature_weight, discriminator)
        self.trained = self.trained or objective
        return objective

    def parameter_groups(self, objective: nn.Module) -> list[dict[str, Any]]:
        autoencoder = {"params": list(objective.network.parameters())}
        if objective.discriminator is None:
            return [autoencoder]
        return [autoencoder | {"name": "autoencoder"}, *self.discriminator_group(objective)]

    def draws(self, batch: Batch) -> dict[str, Any]:
        config, first, count = self.config, batch["first_position"], len(batch["images"])
        images = levelled_images(batch, config, self.randomness, "train")
        priority = self.randomness.uniform("restart", first, count, self.trained.network.latent_size)
        return {
            "images": images,
            "seen": spread_images(images, first, config, self.randomness, "train"),
            "restart_priority": priority.float(),
            **self.adversarial_draws(batch),
        }

    # ---- the codebook -----------------------------------------------------------------------------------------------

    def before_first_step(self, objective: nn.Module, accelerator: Accelerator) -> None:
        """Starts the codebook with the centres of the latents, which the main process finds for all."""
        config, network = self.config, accelerator.unwrap_model(objective).network
        if config.kmeans_vectors == 0:
            return
        codebook = network.quantize.embedding.weight.detach().clone()
        if accelerator.is_main_process:
            latents = self.first_latents(network, accelerator.device)
            codebook = kmeans_centres(latents, config.num_vq_embeddings, config.seed).to(codebook)
        network.quantize.set_codebook(broadcast(codebook))

    @torch.no_grad()
    def first_latents(self, network: VQVAEModel, device: torch.device) -> torch.Tensor:
        """Latents of the images that training begins with, (kmeans_vectors, D)."""
        config = self.config
        per_image = math.prod(network.latent_size)
        steps = -(-config.kmeans_vectors // (per_image * config.batch_size))
        latents = []
        for batch in train_batches(self.data, config, seed=config.seed, batch_size=config.batch_size, last_step=steps):
            images = levelled_images(batch, config, self.randomness, "train")
            latents.append(network.encode(images.to(device)).latents.movedim(1, -1).flatten(0, -2))
        return torch.cat(latents)[: config.kmeans_vectors]

    def after_step(self, step: int, terms: list[Terms], accelerator: Accelerator) -> None:
        super().after_step(step, terms, accelerator)
        self.trained.network.update_codebook()

    # ---- validation -------------------------------------------------------------------------------------------------

    def validate(self, objective: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """How well held-out images are reconstructed, and how the codes are used, over all of them.

        The bits per dimension given the codes do not count the codes; those with a uniform prior count log2 K for
        each, which a learnt prior lowers.
        """
        network = accelerator.unwrap_model(objective).network
        values, counts = self.measure(network, accelerator)
        bits_of_codes = math.prod(network.latent_size) * math.log2(self.config.num_vq_embeddings)
        values_per_image = self.data.channels * self.data.resolution**2
        values["bits_per_dim_uniform_prior"] = values["bits_per_dim_given_codes"] + bits_of_codes / values_per_image
        values |= {"perplexity": perplexity(counts).item(), "used_codes": int((counts > 0).sum())}
        if self.config.likelihood == "gaussian":
            values["sigma"] = network.likelihood.log_sigma.exp().item()
        return values

    def measure(self, network: VQVAEModel, accelerator: Accelerator) -> tuple[dict[str, float], torch.Tensor]:
        """Means over the held-out images, or over training images if none are, and the counts of their codes, (K,)."""
        counts = torch.zeros(self.config.num_vq_embeddings, dtype=torch.long, device=accelerator.device)

        def terms_of(batch: Batch) -> Terms:
            images = levelled_images(batch, self.config, self.randomness, "validation")
            seen = spread_images(images, batch["first_position"], self.config, self.randomness, "validation")
            output = network(seen.to(accelerator.device))
            counts.add_(code_counts(output.indices, len(counts)))
            return {
                "bits_per_dim_given_codes": bits_per_dim(output.nll, network.likelihood, tuple(images.shape[1:])),
                "commitment": output.commitment,
                "psnr": psnr(output.sample, images.to(accelerator.device)),
            }

        values = held_out_means(self.shown_data, self.config, accelerator, terms_of)
        return values, accelerator.reduce(counts, reduction="sum").cpu()

    # ---- what is saved and drawn ------------------------------------------------------------------------------------

    def pipeline(self, objective: VQVAEObjective) -> VQVAEPriorPipeline:
        return VQVAEPriorPipeline(objective.network)

    def example(self) -> str:
        shape = (1, self.data.channels, self.data.resolution, self.data.resolution)
        return (
            f"batch = torch.zeros{shape}  # images in [-1, 1]\n"
            "images = pipeline.reconstruct(batch).images\n"
            "codes = pipeline.vqvae.encode(batch).indices"
        )

    def picture(self, objective: nn.Module, accelerator: Accelerator) -> Image.Image:
        """Held-out images above their reconstructions, and below how often each code is used."""
        network = accelerator.unwrap_model(objective).network
        _, counts = self.measure(network, accelerator)
        batch = self.shown_batch(self.config.sample_columns)
        images = levelled_images(batch, self.config, self.randomness, "validation")
        mine = list(my_share(len(images), accelerator))
        decoded = network.decode_indices(network.encode(images[mine].to(accelerator.device)).indices).sample
        rows = torch.cat([images, gathered_images(decoded, len(images), accelerator)])
        grid = sample_grid(rows, len(images)).convert("RGB")
        chart = usage_chart(counts, grid.width)
        picture = Image.new("RGB", (grid.width, grid.height + chart.height), "white")
        picture.paste(grid, (0, 0))
        picture.paste(chart, (0, grid.height))
        return picture


def kmeans_centres(vectors: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Centres of k-means, begun by k-means++: (N, D) -> (count, D), float32 on the CPU."""
    from sklearn.cluster import KMeans

    kmeans = KMeans(count, init="k-means++", n_init=1, max_iter=KMEANS_ITERATIONS, random_state=seed % 2**32)
    return torch.from_numpy(kmeans.fit(vectors.float().cpu().numpy()).cluster_centers_).float()


def usage_chart(counts: torch.Tensor, width: int) -> Image.Image:
    """How often codes are chosen, from the most frequent to the least, in units of an even use."""
    use = counts.sort(descending=True).values.double() * len(counts) / counts.sum()
    figure = Figure(figsize=(width / 100, 1.6), dpi=100, layout="constrained")
    panel = figure.subplots()
    panel.bar(np.arange(1, len(use) + 1), use.numpy(), width=1.0, color="#0072b2")
    panel.axhline(1, color="#e69f00", linewidth=1)
    panel.set_xlim(0.5, len(use) + 0.5)
    panel.set_title(
        f"{int((counts > 0).sum())} of {len(counts)} codes used, perplexity {perplexity(counts):.0f}", fontsize=8
    )
    panel.tick_params(labelsize=7)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def main(arguments: list[str] | None = None) -> None:
    Run(parse_config(VQVAEConfig, arguments, __doc__.splitlines()[0]), VQVAETask).train()


if __name__ == "__main__":
    main()
