"""Trains a restorer of bad images, CodeFormer, on images that it makes bad itself.

    python training/train_vqvae.py && python training/train_codeformer.py    # handwritten digits, on a CPU, in minutes
    accelerate launch training/train_codeformer.py --vqvae FOLDER_OR_ID --dataset FOLDER_OR_NAME

The VQ-VAE knows good images. Each training image x_h is blurred, downsampled, noised and compressed to x_l, by
parameters drawn for it from the ranges of the options (`annealers.image_degradations`), and from x_l are learnt

    stage II     the codes of x_h:        token_weight CE(s_hat, s) + distance_weight ||Z_l - sg(Z_c)||^2
    stage III    what x_l adds to them:   the same, and of x_hat at fidelity weight 1
                                          |x_hat - x_h|_1 / V                   V: values of an image
                                          + f d(x_hat, x_h)                     if there is a network for features
                                          + w lambda L_generator(x_hat), L_discriminator    if there is an adversary

as `annealers.models.code_former`, `feature_loss` and `adversarial` have them. The image's losses reach the feature
transformation alone, and nothing else reaches that, so stage III needs no stage II before it: `--stage 3`, the default
here, trains both at once. The stages of the paper, one after the other, are

    python training/train_codeformer.py --stage 2 --output_dir runs/stage2
    python training/train_codeformer.py --stage 3 --stage2 runs/stage2/pipeline

The degradations by default suit images of 8 x 8 pixels; for 32 x 32 take `--blur_sigma 0.2 1.5 --downsampling 1 4`.
Source: Zhou et al. 2022, arXiv:2206.11253, Sec. 3 and 4.1.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from annealers import CodeFormerModel, CodeFormerPipeline, GANDiscriminator, VQVAEPriorPipeline
from annealers.configuration import option, parse_config
from annealers.data import ImageData
from annealers.feature_loss import FeatureLoss
from annealers.figures import sample_grid
from annealers.image_degradations import DegradationRanges, degrade
from annealers.losses import mean_flat
from annealers.metrics import psnr
from annealers.randomness import PositionalRandomness
from annealers.run import Batch, Run, Terms, gathered_images, held_out_means, my_share
from annealers.training.adversary import AdversarialObjective, AdversarialTask, AdversaryConfig

FIDELITY_WEIGHTS = (0.0, 0.5, 1.0)  # of validation and pictures
TRAINING_WEIGHT = 1.0  # of stage III; Zhou et al. 2022, Sec. 3.3


@dataclass
class CodeFormerConfig(AdversaryConfig):
    """Options of a restorer; the defaults train one of 8 x 8 digits on a CPU."""

    output_dir: str = option("runs/codeformer", "Folder of the run: pipeline, samples, metrics, checkpoints.")
    vqvae: str = option("runs/vqvae/pipeline", "Folder or Hub id of the pipeline with the VQ-VAE of good images.")
    stage: Literal[2, 3] = option(3, "2: learn the codes; 3: the codes and what the bad image adds to them.")
    stage2: str | None = option(
        None, "Pipeline of a run with --stage 2 that --stage 3 goes on from, with its VQ-VAE and its transformer."
    )

    max_steps: int = option(1000, "Optimizer steps.")
    batch_size: int = option(64, "Images per optimizer step, over all processes and accumulation steps.")
    learning_rate: float = option(1e-3, "Peak learning rate of AdamW.")
    lr_warmup_steps: int = option(50, "Optimizer steps of linear warm-up.")
    ema_decay: float = option(0.995, "Decay of the exponential moving average of the weights.")

    hidden_size: int = option(64, "Channels of the transformer.")
    num_layers: int = option(2, "Layers of the transformer.")
    num_heads: int = option(4, "Attention heads of the transformer.")
    dropout: float = option(0.1, "Dropout of the transformer.")

    token_weight: float = option(0.5, "Weight of the cross-entropy of the codes.")  # Zhou et al. 2022, Sec. 3.2
    distance_weight: float = option(1.0, "Weight of the squared distance of the latents to the codes' vectors.")

    feature_network: str | None = option(None, "Folder or Hub id of a pipeline of train_classifier.py; of stage 3.")
    adversarial_weight: float = option(
        0.0, "w, the weight of the adversary on top of the adaptive one, 0.8 in the paper; 0: none; of stage 3."
    )
    discriminator_learning_rate: float = option(1e-3, "Its peak learning rate.", of="adversarial_weight")

    blur_sigma: list[float] = option([0.0, 0.8], "Range of the blur's width, in pixels.")
    downsampling: list[float] = option([1.0, 2.0], "Range of the factor of downsampling.")
    noise_level: list[float] = option([0.0, 20.0], "Range of the noise, in levels of 0 .. 255.")
    jpeg_quality: list[int] = option([30, 90], "Range of the quality of compression, 1 .. 100.")

    sample_columns: int = option(10, "Images in the pictures.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("token_weight", "distance_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.sample_columns < 1:
            raise ValueError(f"sample_columns must be at least 1, got {self.sample_columns}")
        if self.stage == 2 and (self.stage2 or self.feature_network or self.adversarial_weight > 0):
            raise ValueError(
                "stage 2 has no image to compare and nothing to go on from: stage2, feature_network and "
                f"adversarial_weight are of stage 3, got {self.stage2}, {self.feature_network} and "
                f"{self.adversarial_weight}"
            )
        self.ranges()  # raises for a range that makes no sense

    def ranges(self) -> DegradationRanges:
        return DegradationRanges(
            tuple(self.blur_sigma), tuple(self.downsampling), tuple(self.noise_level), tuple(self.jpeg_quality)
        )


class CodeFormerObjective(AdversarialObjective):
    """The losses of a restorer and of its adversary, one number per image."""

    def __init__(
        self,
        network: CodeFormerModel,
        config: CodeFormerConfig,
        feature_loss: FeatureLoss | None = None,
        discriminator: GANDiscriminator | None = None,
    ) -> None:
        super().__init__(feature_loss, config.feature_weight, discriminator)
        self.network, self.config = network, config

    def forward(self, images: torch.Tensor, degraded: torch.Tensor, adversarial_weight: float = 0.0) -> Terms:
        """Compares what becomes of bad images with the good ones, (B, C, H, W) in [-1, 1]; returns terms (B,).

        Args:
            images: x_h.
            degraded: x_l.
            adversarial_weight: w in this step; 0 before the adversary's first.
        """
        config, is_stage_3 = self.config, self.config.stage == 3
        output = self.network(degraded, images, fidelity_weight=TRAINING_WEIGHT if is_stage_3 else None)
        terms = {name: output[name] for name in ("token", "distance", "accuracy")}
        loss = config.token_weight * output.token + config.distance_weight * output.distance
        if is_stage_3:
            loss = loss + self.image_loss(images, output.sample.float(), adversarial_weight, terms)
        return {"loss": loss, **terms}

    def image_loss(
        self, images: torch.Tensor, restored: torch.Tensor, adversarial_weight: float, terms: Terms
    ) -> torch.Tensor:
        """What stage III adds, (B,); its parts are noted among the terms."""
        terms["error"] = mean_flat((restored - images).abs())
        loss = self.with_features(terms["error"], images, restored, terms)
        return loss + self.game(images, restored, loss, self.network.last_layer, adversarial_weight, terms)


class CodeFormerTask(AdversarialTask):
    """A restorer, whose VQ-VAE is there already."""

    config: CodeFormerConfig
    pipeline_tag = "image-to-image"
    tags = ("image-restoration", "codeformer")

    def __init__(self, config: CodeFormerConfig, data: ImageData, randomness: PositionalRandomness) -> None:
        super().__init__(config, data, randomness)
        self.ranges = config.ranges()
        if config.stage2 is None:
            self.vqvae = VQVAEPriorPipeline.from_pretrained(config.vqvae).vqvae
        else:
            self.earlier = CodeFormerPipeline.from_pretrained(config.stage2).code_former
            self.vqvae = self.earlier.vqvae
        check_match(data, self.vqvae.config)

    def build(self) -> CodeFormerObjective:
        """A new objective. The first one is that which is trained, and whose adaptive weight moves after each step."""
        config = self.config
        if config.stage2 is not None:
            network = CodeFormerModel.from_config(self.earlier.config)
            network.load_state_dict(self.earlier.state_dict())
        else:
            network = CodeFormerModel(
                vqvae_config=self.vqvae.config,
                hidden_size=config.hidden_size,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                dropout=config.dropout,
            )
            network.load_vqvae(self.vqvae)
        network.fusions.requires_grad_(config.stage == 3)
        objective = CodeFormerObjective(network, config, self.make_feature_loss(), self.make_discriminator())
        self.trained = self.trained or objective
        return objective

    def parameter_groups(self, objective: CodeFormerObjective) -> list[dict[str, Any]]:
        """Codes and feature transformation learn from different losses, so each is clipped on its own."""
        network = objective.network
        codes = (network.encoder, network.quant_conv, network.transformer)
        groups = [{"name": "codes", "params": [p for part in codes for p in part.parameters()]}]
        if self.config.stage == 3:
            groups.append({"name": "fusion", "params": list(network.fusions.parameters())})
        return [*groups, *self.discriminator_group(objective)]

    def draws(self, batch: Batch) -> dict[str, Any]:
        degraded = self.degraded("training", batch)
        return {"images": batch["images"], "degraded": degraded, **self.adversarial_draws(batch)}

    def degraded(self, stream: str, batch: Batch) -> torch.Tensor:
        """The bad images of a batch of good ones, as (seed, position) decides; (B, C, H, W)."""
        images, first, count = batch["images"], batch["first_position"], len(batch["images"])
        shares = self.randomness.uniform(f"degradation, {stream}", first, count, (4,))
        noise = self.randomness.normal(f"noise of the degradation, {stream}", first, count, images.shape[1:])
        return degrade(images, self.ranges.parameters(shares), noise)

    # ---- validation -------------------------------------------------------------------------------------------------

    def validate(self, objective: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Held-out accuracy of the codes, and the PSNR in dB of the bad images and of what is made of them.

        Beside the fidelity weights: "vqvae" is what the VQ-VAE itself makes of the bad images, "nearest" what becomes
        of the codes whose vectors are nearest to Z_l, and "codes" decodes those of the good images.
        """
        network, device = accelerator.unwrap_model(objective).network, accelerator.device

        def terms_of(batch: Batch) -> Terms:
            images, degraded = batch["images"].to(device), self.degraded("validation", batch).to(device)
            output = network(degraded, images, fidelity_weight=None)
            latents, features = network.encode(degraded)
            nearest = network.vqvae.quantize.indices(latents)
            restored = {
                "degraded": degraded,
                "vqvae": network.decode(network.codes(degraded), features, 0.0),
                "nearest": network.decode(nearest, features, 0.0),
                "codes": network.decode(network.codes(images), features, 0.0),
                **{f"w_{w:g}": network.decode(output.indices, features, w) for w in FIDELITY_WEIGHTS},
            }
            return {
                **{name: output[name] for name in ("token", "distance", "accuracy", "nearest_accuracy")},
                **{f"psnr_{name}": psnr(image, images) for name, image in restored.items()},
            }

        return held_out_means(self.data, self.config, accelerator, terms_of)

    # ---- what is saved and drawn ------------------------------------------------------------------------------------

    def pipeline(self, objective: CodeFormerObjective) -> CodeFormerPipeline:
        return CodeFormerPipeline(objective.network)

    def example(self) -> str:
        return 'from PIL import Image\n\nimages = pipeline(Image.open("bad.png"), fidelity_weight=0.5).images'

    def picture(self, objective: nn.Module, accelerator: Accelerator) -> Image.Image:
        """A row of bad images, one for each fidelity weight, and the good ones."""
        network, columns = accelerator.unwrap_model(objective).network, self.config.sample_columns
        batch = self.shown_batch(columns)
        degraded = self.degraded("validation", batch)
        mine = list(my_share(len(degraded), accelerator))
        images, degraded = (x[mine].to(accelerator.device) for x in (batch["images"], degraded))
        restored = [network(degraded, fidelity_weight=w).sample for w in FIDELITY_WEIGHTS]
        column = torch.cat([degraded, *restored, images], dim=-2)  # (B, C, 5 H, W)
        column = gathered_images(column, len(batch["images"]), accelerator)
        return sample_grid(torch.cat(column.chunk(len(FIDELITY_WEIGHTS) + 2, dim=-2)), len(column))


def check_match(data: ImageData, vqvae: Any) -> None:
    """Raises ValueError unless the VQ-VAE is of such images."""
    sizes = vqvae.sample_size if isinstance(vqvae.sample_size, (tuple, list)) else (vqvae.sample_size,) * 2
    if data.channels != vqvae.in_channels or any(side != data.resolution for side in sizes):
        raise ValueError(
            f"the images of {data.name} have {data.channels} channels and {data.resolution} pixels a side, those of "
            f"the VQ-VAE {vqvae.in_channels} and {' x '.join(map(str, sizes))}"
        )


def main(arguments: list[str] | None = None) -> None:
    Run(parse_config(CodeFormerConfig, arguments, __doc__.splitlines()[0]), CodeFormerTask).train()


if __name__ == "__main__":
    main()
