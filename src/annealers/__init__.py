"""annealers extends Hugging Face Diffusers with samplers, generative models and training scripts.

Names are imported on first use (PEP 562), so that `import annealers` costs nothing. The mixins are among them because
Diffusers resolves the `["annealers", "ClassName"]` entries of a saved `model_index.json` as attributes of this module,
and asks it for the base class as well.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
    from transformers import PreTrainedTokenizer

    from annealers import exact
    from annealers.hub import export
    from annealers.models import (
        AutoencoderModel,
        CodeFormerModel,
        CodeTransformerModel,
        GANDiscriminator,
        GANGenerator,
        HierarchicalVAEModel,
        NoisyClassifierModel,
        PixelCNNModel,
        PointScoreModel,
        ScoreUNetModel,
        VAEModel,
        VQVAEModel,
    )
    from annealers.models.open_clip_text import OpenCLIPTextModel
    from annealers.open_clip_tokenizer import OpenCLIPTokenizer
    from annealers.pipelines import (
        AnnealersPipeline,
        CodeFormerPipeline,
        CorrectorGuidanceCallback,
        DenoisingAutoencoderPipeline,
        GANPipeline,
        GuidedDiffusionPipeline,
        PixelCNNPipeline,
        RestorationPipeline,
        VAEPipeline,
        VQVAEPriorPipeline,
    )
    from annealers.schedulers import (
        AnnealedLangevinScheduler,
        ColdDiffusionScheduler,
        DDPMAncestralScheduler,
        ModifiedEulerMaruyamaScheduler,
        PredictorCorrectorScheduler,
    )
    from annealers.score_sde import load_score_sde_ve

__version__ = "0.1.0"

__all__ = [
    "AnnealedLangevinScheduler",
    "AnnealersPipeline",
    "AutoencoderModel",
    "CodeFormerModel",
    "CodeFormerPipeline",
    "CodeTransformerModel",
    "ColdDiffusionScheduler",
    "ConfigMixin",
    "CorrectorGuidanceCallback",
    "DDPMAncestralScheduler",
    "DenoisingAutoencoderPipeline",
    "DiffusionPipeline",
    "GANDiscriminator",
    "GANGenerator",
    "GANPipeline",
    "GuidedDiffusionPipeline",
    "HierarchicalVAEModel",
    "ModelMixin",
    "ModifiedEulerMaruyamaScheduler",
    "NoisyClassifierModel",
    "OpenCLIPTextModel",
    "OpenCLIPTokenizer",
    "PixelCNNModel",
    "PixelCNNPipeline",
    "PointScoreModel",
    "PreTrainedTokenizer",
    "PredictorCorrectorScheduler",
    "RestorationPipeline",
    "SchedulerMixin",
    "ScoreUNetModel",
    "VAEModel",
    "VAEPipeline",
    "VQVAEModel",
    "VQVAEPriorPipeline",
    "exact",
    "export",
    "load_score_sde_ve",
]

_HOMES = {
    "ConfigMixin": "diffusers",
    "DiffusionPipeline": "diffusers",
    "ModelMixin": "diffusers",
    "PreTrainedTokenizer": "transformers",
    "SchedulerMixin": "diffusers",
    "AnnealedLangevinScheduler": "annealers.schedulers",
    "ColdDiffusionScheduler": "annealers.schedulers",
    "DDPMAncestralScheduler": "annealers.schedulers",
    "ModifiedEulerMaruyamaScheduler": "annealers.schedulers",
    "PredictorCorrectorScheduler": "annealers.schedulers",
    "AutoencoderModel": "annealers.models",
    "CodeFormerModel": "annealers.models",
    "CodeTransformerModel": "annealers.models",
    "GANDiscriminator": "annealers.models",
    "GANGenerator": "annealers.models",
    "HierarchicalVAEModel": "annealers.models",
    "NoisyClassifierModel": "annealers.models",
    "OpenCLIPTextModel": "annealers.models.open_clip_text",  # not by annealers.models: open_clip is slow to import
    "OpenCLIPTokenizer": "annealers.open_clip_tokenizer",
    "PixelCNNModel": "annealers.models",
    "PointScoreModel": "annealers.models",
    "ScoreUNetModel": "annealers.models",
    "VAEModel": "annealers.models",
    "VQVAEModel": "annealers.models",
    "AnnealersPipeline": "annealers.pipelines",
    "CodeFormerPipeline": "annealers.pipelines",
    "CorrectorGuidanceCallback": "annealers.pipelines",
    "DenoisingAutoencoderPipeline": "annealers.pipelines",
    "GANPipeline": "annealers.pipelines",
    "GuidedDiffusionPipeline": "annealers.pipelines",
    "PixelCNNPipeline": "annealers.pipelines",
    "RestorationPipeline": "annealers.pipelines",
    "VAEPipeline": "annealers.pipelines",
    "VQVAEPriorPipeline": "annealers.pipelines",
    "export": "annealers.hub",
    "load_score_sde_ve": "annealers.score_sde",
}


def __getattr__(name: str) -> Any:
    if name == "exact":
        return import_module("annealers.exact")
    if name not in _HOMES:
        raise AttributeError(f"module 'annealers' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
