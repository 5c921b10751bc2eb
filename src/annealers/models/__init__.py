"""Networks that Diffusers lacks."""

from annealers.models.autoencoder import AutoencoderModel, AutoencoderOutput
from annealers.models.code_former import CodeFormerModel, CodeFormerOutput
from annealers.models.code_transformer import CodeTransformerModel
from annealers.models.gan_discriminator import GANDiscriminator, GANDiscriminatorOutput
from annealers.models.gan_generator import GANGenerator, GANGeneratorOutput
from annealers.models.hierarchical_vae import HierarchicalVAEModel, HierarchicalVAEOutput
from annealers.models.noisy_classifier import NoisyClassifierModel, NoisyClassifierOutput
from annealers.models.pixel_cnn import PixelCNNModel
from annealers.models.point_score import PointScoreModel
from annealers.models.score_unet import ScoreUNetModel
from annealers.models.vae import VAEModel, VAEOutput
from annealers.models.vqvae import VQVAEEncoderOutput, VQVAEModel, VQVAEOutput

__all__ = [
    "AutoencoderModel",
    "AutoencoderOutput",
    "CodeFormerModel",
    "CodeFormerOutput",
    "CodeTransformerModel",
    "GANDiscriminator",
    "GANDiscriminatorOutput",
    "GANGenerator",
    "GANGeneratorOutput",
    "HierarchicalVAEModel",
    "HierarchicalVAEOutput",
    "NoisyClassifierModel",
    "NoisyClassifierOutput",
    "PixelCNNModel",
    "PointScoreModel",
    "ScoreUNetModel",
    "VAEModel",
    "VAEOutput",
    "VQVAEEncoderOutput",
    "VQVAEModel",
    "VQVAEOutput",
]
