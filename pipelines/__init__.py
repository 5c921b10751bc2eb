"""Pipelines: a network, a scheduler and the loop between them."""

if __name__ != "annealers.pipelines":
    raise ImportError("import annealers.pipelines: this folder is its source, and `pipelines` would be a second copy of its classes")

from annealers.pipelines.pipeline_guided_diffusion import GuidedDiffusionPipeline, GuidedDiffusionPipelineOutput

__all__ = ["GuidedDiffusionPipeline", "GuidedDiffusionPipelineOutput"]
