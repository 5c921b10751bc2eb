"""Pipelines: a network, a scheduler and the loop between them."""

if __name__ != "annealers.pipelines":
    raise ImportError("import annealers.pipelines; `pipelines` would be a second copy of its classes")

from annealers.pipelines.annealers_pipeline import AnnealersPipeline
from annealers.pipelines.corrector_guidance import CorrectorGuidanceCallback
from annealers.pipelines.pipeline_code_former import CodeFormerPipeline
from annealers.pipelines.pipeline_denoising_autoencoder import DenoisingAutoencoderPipeline
from annealers.pipelines.pipeline_gan import GANPipeline, GANPipelineOutput
from annealers.pipelines.pipeline_guided_diffusion import (
    GuidedDiffusionPipeline,
    GuidedDiffusionPipelineOutput,
    Trajectory,
)
from annealers.pipelines.pipeline_pixel_cnn import PixelCNNPipeline
from annealers.pipelines.pipeline_restoration import RestorationPipeline
from annealers.pipelines.pipeline_vae import VAEPipeline, VAEPipelineOutput
from annealers.pipelines.pipeline_vqvae_prior import VQVAEPriorPipeline

__all__ = [
    "AnnealersPipeline",
    "CodeFormerPipeline",
    "CorrectorGuidanceCallback",
    "DenoisingAutoencoderPipeline",
    "GANPipeline",
    "GANPipelineOutput",
    "GuidedDiffusionPipeline",
    "GuidedDiffusionPipelineOutput",
    "PixelCNNPipeline",
    "RestorationPipeline",
    "Trajectory",
    "VAEPipeline",
    "VAEPipelineOutput",
    "VQVAEPriorPipeline",
]
