"""annealers extends Hugging Face Diffusers with samplers, generative models and training scripts.

Names are imported on first use (PEP 562), so that `import annealers` costs nothing. The mixins are among them because
Diffusers resolves the `["annealers", "ClassName"]` entries of a saved `model_index.json` as attributes of this module,
and asks it for the base class as well.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin

    from annealers import exact
    from annealers.hub import export
    from annealers.models import (
        AutoencoderModel,
        CodeFormerModel,
        CodeTransformerModel,
        GANDiscriminator,
        HierarchicalVAEModel,
        NoisyClassifierModel,
        PixelCNNModel,
        PointScoreModel,
        ScoreUNetModel,
        VAEModel,
        VQVAEModel,
    )
    from annealers.pipelines import (
        AnnealersPipeline,
        CodeFormerPipeline,
        CorrectorGuidanceCallback,
        DenoisingAutoencoderPipeline,
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
    "GuidedDiffusionPipeline",
    "HierarchicalVAEModel",
    "ModelMixin",
    "ModifiedEulerMaruyamaScheduler",
    "NoisyClassifierModel",
    "PixelCNNModel",
    "PixelCNNPipeline",
    "PointScoreModel",
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
    "HierarchicalVAEModel": "annealers.models",
    "NoisyClassifierModel": "annealers.models",
    "PixelCNNModel": "annealers.models",
    "PointScoreModel": "annealers.models",
    "ScoreUNetModel": "annealers.models",
    "VAEModel": "annealers.models",
    "VQVAEModel": "annealers.models",
    "AnnealersPipeline": "annealers.pipelines",
    "CodeFormerPipeline": "annealers.pipelines",
    "CorrectorGuidanceCallback": "annealers.pipelines",
    "DenoisingAutoencoderPipeline": "annealers.pipelines",
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
