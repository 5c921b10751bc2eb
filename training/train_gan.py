r"""Trains a generative adversarial network: of images, of classes of them, or of what captions say.

    python training/train_gan.py                                     # handwritten digits, on a CPU, in minutes
    accelerate launch training/train_gan.py --dataset FOLDER_OR_NAME --arch resnet --loss hinge
    python training/train_gan.py --dataset FOLDER_OR_NAME --caption_column text --text_encoder FOLDER_OR_ID

A generator G makes images of noise z, and a discriminator D, or critic, tells them from those of the data:

    D    L_D(D(x, y), D(G(z, y), y)) + lambda (|grad D(x_a, y)| - 1)^2 + gamma / 2 |grad D(x, y)|^2      k steps
    G    L_G(D(G(z, y), y))                                                                            one step

with y the class, or the caption as a frozen text encoder sees it, or nothing. Of captions D is asked besides whether
they fit: it also sees x with the caption of another image (GAN-CLS), but for --no_matching. The losses are

    --loss non_saturating, minimax, least_squares, hinge       by themselves, or with --r1 gamma
    --loss wasserstein                                         with --gradient_penalty 10, --weight_clip 0.01 or
                                                               --discriminator_norm spectral, and more critic steps

Recipes: DCGAN, `--arch dcgan --generator_norm batch --discriminator_norm batch --learning_rate 2e-4`; WGAN-GP,
`--loss wasserstein --gradient_penalty 10 --discriminator_norm none --discriminator_steps 5 --adam_beta1 0
--adam_beta2 0.9 --learning_rate 1e-4`; SNGAN, `--arch resnet --loss hinge --discriminator_norm spectral
--discriminator_steps 5 --adam_beta1 0 --adam_beta2 0.9 --learning_rate 2e-4`.

What is saved is a `GANPipeline` with the averaged generator, and the discriminator beside it. In validation as many
images are drawn as there are held out, with their classes or captions, and the two sets are compared in the features
of `--feature_network`, a pipeline of `training/train_classifier.py`: the distances are comparable between runs with
the same network and number of images, not with published ones in Inception features.

Sources: Radford, Metz & Chintala 2016, "DCGAN", arXiv:1511.06434; Miyato et al. 2018, "SNGAN", arXiv:1802.05957;
Gulrajani et al. 2017, "WGAN-GP", arXiv:1704.00028; losses, see `annealers.gan_losses`; players, see
`annealers.training.gan_objectives`; the loop, see `annealers.game`.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import nn

from annealers import GANDiscriminator, GANGenerator, GANPipeline
from annealers.configuration import option, parse_config
from annealers.data import ImageData, PointRows, validation_batches
from annealers.feature_metrics import (
    COLLAPSED,
    Features,
    class_diversity,
    classifier_features,
    diversity,
    features_of,
    kernel_distance,
    pixel_features,
)
from annealers.figures import labelled, sample_grid
from annealers.game import GameConfig, GameRun, GameTask
from annealers.gan_losses import GANLoss, clip_weights_
from annealers.metrics import frechet_distance
from annealers.randomness import PositionalRandomness
from annealers.run import Batch, gathered_images, my_share
from annealers.training.adversary import feature_network
from annealers.training.captions import Captions, OtherCaptions, load_text_encoder
from annealers.training.gan_objectives import DiscriminatorObjective, GeneratorObjective, check_no_penalty

FEWEST_OF_A_CLASS = 10  # held-out images whose spread is measured: that of fewer is too uncertain to warn by
ROUNDING = 1e-5  # relative difference up to which features in single precision count as those of the same image


@dataclass
class GANConfig(GameConfig):
    """Options of a GAN; the defaults train one of 8 x 8 digits on a CPU."""

    output_dir: str = option("runs/gan", "Folder of the run: pipeline, discriminator, samples, metrics, checkpoints.")
    max_steps: int = option(3000, "Optimizer steps of the generator.")
    batch_size: int = option(64, "Images per optimizer step, over all processes and accumulation steps.")
    learning_rate: float = option(1e-3, "Peak learning rate of AdamW, of both players if no other is given.")
    ema_decay: float = option(0.995, "Decay of the exponential moving average of the generator's weights.")

    loss: GANLoss = option("non_saturating", "What both players minimise.")
    gradient_penalty: float = option(0.0, "lambda, weight of (|grad D| - 1)^2 between real and generated images.")
    r1: float = option(0.0, "gamma, twice the weight of |grad D|^2 at real images.")
    weight_clip: float = option(0.0, "Largest weight of the discriminator, which is clipped after each step; 0: none.")

    arch: Literal["dcgan", "resnet"] = option("dcgan", "Architecture of both players.")
    latent_dim: int = option(32, "Length of z.")
    generator_channels: list[int] = option([32, 64], "Channels of the generator's levels, from the largest maps.")
    generator_norm: Literal["batch", "group", "none"] = option("batch", "The generator's normalisation.")
    discriminator_channels: list[int] = option([32, 64], "Channels of the discriminator's levels.")
    discriminator_norm: Literal["none", "batch", "group", "spectral"] = option("spectral", "Its normalisation.")
    norm_groups: int = option(8, "Groups of a normalisation by groups.")

    class_conditional: bool = option(True, "Condition on the labels, if the data has any and there are no captions.")
    text_encoder: str | None = option(
        None,
        "Folder or Hub id of a pipeline with the text_encoder and tokenizer that captions are seen with, or "
        "'hf-hub:...' of a model of open_clip.",
    )
    matching: bool = option(
        True, "Let the discriminator also judge whether captions fit their images (GAN-CLS).", of="text_encoder"
    )

    feature_network: str | None = option(
        None,
        "Folder or Hub id of a pipeline of train_classifier.py, in whose features samples are compared with data.",
    )
    sample_columns: int = option(10, "Samples per row of the pictures: per class or caption, if conditional.")
    sample_captions: int = option(8, "Held-out captions in the pictures.", of="text_encoder")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gradient_penalty", "r1", "weight_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        for name in ("latent_dim", "sample_columns", "sample_captions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self._check_critic()
        if (self.text_encoder is None) != (self.caption_column is None):
            raise ValueError(
                "captions need both --caption_column and --text_encoder, got "
                f"{self.caption_column!r} and {self.text_encoder!r}"
            )

    def _check_critic(self) -> None:
        """Raises ValueError if what keeps the discriminator smooth is missing, or contradicts itself."""
        spectral = self.discriminator_norm == "spectral"
        if self.loss == "wasserstein" and not (self.gradient_penalty > 0 or self.weight_clip > 0 or spectral):
            raise ValueError(
                "a Wasserstein critic without bounded slope has a loss without bound: give --gradient_penalty 10, "
                "--weight_clip 0.01 or --discriminator_norm spectral"
            )
        if self.discriminator_norm == "batch":
            check_no_penalty(self.gradient_penalty, self.r1)
        for one, other, why in (
            ("gradient_penalty", "r1", "one wants slopes of 1 and the other of 0"),
            ("gradient_penalty", "weight_clip", "each bounds the slope in place of the other"),
        ):
            if getattr(self, one) > 0 and getattr(self, other) > 0:
                raise ValueError(
                    f"choose one of {one} and {other}, as {why}, got {getattr(self, one)} and {getattr(self, other)}"
                )
        if self.weight_clip > 0 and spectral:
            raise ValueError(
                f"weight_clip={self.weight_clip} has no effect on weights that discriminator_norm='spectral' divides "
                "by their norm: choose --discriminator_norm group, none or batch"
            )


class HeldOut(NamedTuple):
    """Held-out images that samples are compared with, the same on every process.

    Args:
        features: (n, D).
        labels: (n,), or None.
        captions: n of them, or None.
    """

    features: torch.Tensor
    labels: torch.Tensor | None
    captions: list[str] | None

    @property
    def spread_known(self) -> bool:
        """Whether the images are not all alike, without which diversity has no unit."""
        return differ(self.features)

    @property
    def of_measured_classes(self) -> torch.Tensor:
        """Which images are of a class whose spread is measured, (n,): there are enough of it, and not all alike."""
        measured = torch.zeros(len(self.features), dtype=torch.bool)
        for label in [] if self.labels is None else self.labels.unique():
            of_class = self.labels == label
            if of_class.sum() >= FEWEST_OF_A_CLASS and differ(self.features[of_class]):
                measured |= of_class
        return measured


def differ(features: torch.Tensor) -> bool:
    """Whether rows of features, (n, D), differ by more than rounding."""
    return bool((features - features[0]).abs().max() > ROUNDING * features.abs().max())


class GANTask(GameTask):
    """A GAN whose generator becomes a `GANPipeline`."""

    config: GANConfig
    tags = ("gan",)

    def __init__(self, config: GANConfig, data: ImageData, randomness: PositionalRandomness) -> None:
        super().__init__(config, data, randomness)
        if isinstance(data.train, PointRows):
            raise ValueError(f"this GAN is of images, got the points of {config.dataset!r}")
        self.captions: Captions | None = None
        self.other_captions: OtherCaptions | None = None
        if config.text_encoder is not None:
            self.captions = Captions(*load_text_encoder(config.text_encoder))
            self.other_captions = OtherCaptions(data, randomness) if config.matching else None
            self.pipeline_tag = "text-to-image"
        self.id2label = data.id2label if config.class_conditional and self.captions is None else None
        self.classifier = None
        if config.feature_network is not None:
            if data.validation is None:
                raise ValueError(
                    f"--feature_network {config.feature_network!r} compares samples with held-out images, of which "
                    f"{data.name!r} has none: give --validation_split or --holdout, or leave the network out"
                )
            self.classifier = feature_network(config.feature_network, data.channels)
        self.known_held_out: HeldOut | None = None

    # ---- the players ------------------------------------------------------------------------------------------------

    @property
    def condition(self) -> dict[str, int | None]:
        """What both networks are told of y."""
        return {
            "num_class_embeds": None if self.id2label is None else len(self.id2label),
            "text_embed_dim": None if self.captions is None else self.captions.width,
        }

    def build(self) -> GeneratorObjective:
        config, data = self.config, self.data
        network = GANGenerator(
            sample_size=data.resolution,
            out_channels=data.channels,
            latent_dim=config.latent_dim,
            arch=config.arch,
            block_out_channels=tuple(config.generator_channels),
            norm=config.generator_norm,
            norm_num_groups=config.norm_groups,
            **self.condition,
        )
        return GeneratorObjective(network, config.loss)

    def build_discriminator(self) -> DiscriminatorObjective:
        config, data = self.config, self.data
        network = GANDiscriminator(
            in_channels=data.channels,
            arch=config.arch,
            block_out_channels=tuple(config.discriminator_channels),
            norm=config.discriminator_norm,
            norm_num_groups=config.norm_groups,
            sample_size=data.resolution,
            **self.condition,
        )
        return DiscriminatorObjective(network, config.loss, config.gradient_penalty, config.r1)

    def after_discriminator_step(self, network: nn.Module) -> None:
        if self.config.weight_clip > 0:
            clip_weights_(network, self.config.weight_clip)

    # ---- what is drawn ----------------------------------------------------------------------------------------------

    def draws(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Noise and conditions of the generator's step, as functions of (seed, position)."""
        return {
            "latents": self.latents("latents", batch["first_position"], len(batch["images"])),
            **self.conditions(batch.get("labels"), batch.get("captions")),
        }

    def discriminator_draws(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The same with images, and other noise."""
        first, count = batch["first_position"], len(batch["images"])
        draws = {
            "images": batch["images"],
            "latents": self.latents("discriminator's latents", first, count),
            **self.conditions(batch.get("labels"), batch.get("captions")),
        }
        if self.captions is not None and self.other_captions is not None:
            others = self.other_captions.draw(batch["captions"], first)
            draws["mismatched_embeds"] = self.captions.embeddings(others)
        if self.config.gradient_penalty > 0:
            draws["alpha"] = self.randomness.uniform("between images", first, count).float()
        return draws

    def latents(self, stream: str, first: int, count: int) -> torch.Tensor:
        """z of positions from `first` on, (count, latent_dim)."""
        return self.randomness.normal(stream, first, count, (self.config.latent_dim,))

    def conditions(self, labels: torch.Tensor | None, captions: list[str] | None) -> dict[str, torch.Tensor]:
        """y as both players take it."""
        if self.captions is not None:
            return {"text_embeds": self.captions.embeddings(captions)}
        return {} if self.id2label is None else {"class_labels": labels}

    def my_samples(
        self,
        network: GANGenerator,
        stream: str,
        conditions: dict[str, torch.Tensor],
        count: int,
        accelerator: Accelerator,
    ) -> torch.Tensor:
        """This process's share of `count` images, (b, C, H, W): the same images for any number of processes."""
        mine = my_share(count, accelerator)
        images = []
        for first in range(mine.start, mine.stop, self.config.batch_size):
            last = min(first + self.config.batch_size, mine.stop)
            latents = self.latents(stream, first, last - first).to(accelerator.device)
            condition = {name: value[first:last].to(accelerator.device) for name, value in conditions.items()}
            drawn = network(latents, condition.get("class_labels"), condition.get("text_embeds"))
            images.append(drawn.sample.float())
        return torch.cat(images)

    # ---- validation -------------------------------------------------------------------------------------------------

    def before_first_step(self, objective: nn.Module, accelerator: Accelerator) -> None:
        """Measures the held-out images, so that what is wrong with them is said before any training."""
        if self.data.validation is not None:
            self.held_out(accelerator)

    def validate(self, objective: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """How far samples are from held-out images, and whether they are all alike."""
        held_out = self.held_out(accelerator)
        count = len(held_out.features)
        conditions = self.conditions(held_out.labels, held_out.captions)
        network = accelerator.unwrap_model(objective).network
        images = self.my_samples(network, "samples of validation", conditions, count, accelerator)
        mine = features_of(images, self.features).to(accelerator.device)
        features = gathered_images(mine, count, accelerator)
        values = self.spread(features, held_out, accelerator)
        if self.classifier is not None:
            name = f"classifier_features_n{count}"
            values[f"frechet_distance_{name}"] = frechet_distance(features, held_out.features)
            values[f"kernel_distance_{name}"] = kernel_distance(features, held_out.features)
        return {**values, "images": count}

    @property
    def features(self) -> Features:
        """Those of the classifier, or the pixels without one."""
        return pixel_features if self.classifier is None else classifier_features(self.classifier)

    def held_out(self, accelerator: Accelerator) -> HeldOut:
        """The held-out images, whose features are measured once, by all processes together.

        Raises:
            ValueError: If there are fewer than two, or a feature is not finite.
        """
        if self.known_held_out is not None:
            return self.known_held_out
        if self.classifier is None:
            accelerator.print(
                "no --feature_network: samples are not compared with held-out images, only their diversity is measured"
            )
        else:
            self.classifier.to(accelerator.device)
        config, mine = self.config, []
        for batch in validation_batches(
            self.data,
            config.batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            max_samples=config.validation_samples,
            num_workers=config.num_workers,
        ):
            features = features_of(batch["images"], self.features)
            mine.append((batch["first_position"], features, batch.get("labels"), batch.get("captions")))
        parts = sorted(gather_object(mine), key=lambda part: part[0])
        count = sum(len(part[1]) for part in parts)
        if count < 2:
            raise ValueError(
                f"need at least 2 held-out images to compare samples with, got {count} of {self.data.name!r}: choose "
                "--validation_split, --holdout or --validation_samples for more, or --holdout 0 for no validation"
            )
        _, features, labels, captions = zip(*parts, strict=True)
        if not all(part.isfinite().all() for part in features):
            raise ValueError(f"the classifier in {config.feature_network!r} has features that are not finite")
        self.known_held_out = HeldOut(
            torch.cat(features),
            None if self.id2label is None else torch.cat(labels),
            None if self.captions is None else [caption for part in captions for caption in part],
        )
        if not self.known_held_out.spread_known:
            accelerator.print(
                f"the {count} held-out images of {self.data.name!r} are all alike: diversity, which is a multiple of "
                "theirs, is not measured"
            )
        return self.known_held_out

    def spread(self, features: torch.Tensor, held_out: HeldOut, accelerator: Accelerator) -> dict[str, float]:
        """Diversity of the samples as a multiple of that of the held-out images, and a warning if there is little.

        A generator of classes may draw one image of each: where there are enough images of some class, the diversity
        of the class that has the least is measured too. Where held-out images are all alike, there is no such number.
        """
        if not held_out.spread_known:
            return {}
        name = "pixels" if self.classifier is None else "classifier_features"
        values = {f"diversity_{name}": diversity(features, held_out.features)}
        labels, measured = held_out.labels, held_out.of_measured_classes
        if labels is not None and measured.any():
            of_measured = (features[measured], labels[measured], held_out.features[measured], labels[measured])
            values[f"diversity_{name}_least_of_a_class"] = min(class_diversity(*of_measured).values())
        least = min(values, key=lambda measure: values[measure])
        if values[least] < COLLAPSED:
            accelerator.print(
                f"warning: the generator draws nearly the same image again and again: {least} is {values[least]:.3f}, "
                f"where held-out images have 1 and copies of two images {COLLAPSED}"
            )
        return values

    # ---- what is saved and drawn ------------------------------------------------------------------------------------

    def pipeline(self, objective: GeneratorObjective) -> GANPipeline:
        parts = {}
        if self.captions is not None:
            parts = {"text_encoder": self.captions.text_encoder, "tokenizer": self.captions.tokenizer}
        return GANPipeline(objective.network, id2label=self.id2label, **parts)

    def example(self) -> str:
        if self.captions is not None:
            return f"images = pipeline(prompt={self.shown_captions()[0]!r}).images"
        if self.id2label is None:
            return "images = pipeline(batch_size=4).images"
        return f"images = pipeline(class_labels={list(self.id2label.values())[:4]}).images"

    def shown_captions(self) -> list[str]:
        """Different captions of held-out images, or of those of training if there are none."""
        captions = self.shown_batch(self.config.sample_captions)["captions"]
        return list(dict.fromkeys(captions))

    def picture(self, objective: nn.Module, accelerator: Accelerator) -> Image.Image:
        """Samples of the same noise each time: a row for each class or caption, or a square without."""
        columns, captions = self.config.sample_columns, None
        if self.captions is not None:
            captions = self.shown_captions()
        rows = columns if self.id2label is None else len(self.id2label)
        rows = rows if captions is None else len(captions)
        labels = torch.arange(rows).repeat_interleave(columns)
        prompts = None if captions is None else [captions[i] for i in labels]
        network = accelerator.unwrap_model(objective).network
        conditions = self.conditions(labels, prompts)
        images = self.my_samples(network, "pictures", conditions, rows * columns, accelerator)
        grid = sample_grid(gathered_images(images, rows * columns, accelerator), columns)
        return grid if captions is None else labelled(grid, row_names=captions)


def main(arguments: list[str] | None = None) -> None:
    GameRun(parse_config(GANConfig, arguments, __doc__.splitlines()[0]), GANTask).train()


if __name__ == "__main__":
    main()
