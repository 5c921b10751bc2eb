"""Pipelines: a network, a scheduler and the loop between them."""

if __name__ != "annealers.pipelines":
    raise ImportError("import annealers.pipelines; `pipelines` would be a second copy of its classes")

from annealers.pipelines.annealers_pipeline import AnnealersPipeline
from annealers.pipelines.corrector_guidance import CorrectorGuidanceCallback
from annealers.pipelines.pipeline_guided_diffusion import (
    GuidedDiffusionPipeline,
    GuidedDiffusionPipelineOutput,
    Trajectory,
)
from annealers.pipelines.pipeline_restoration import RestorationPipeline

__all__ = [
    "AnnealersPipeline",
    "CorrectorGuidanceCallback",
    "GuidedDiffusionPipeline",
    "GuidedDiffusionPipelineOutput",
    "RestorationPipeline",
    "Trajectory",
]
