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
    from annealers.models import NoisyClassifierModel, PointScoreModel, ScoreUNetModel
    from annealers.pipelines import (
        AnnealersPipeline,
        CorrectorGuidanceCallback,
        GuidedDiffusionPipeline,
        RestorationPipeline,
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
    "ColdDiffusionScheduler",
    "ConfigMixin",
    "CorrectorGuidanceCallback",
    "DDPMAncestralScheduler",
    "DiffusionPipeline",
    "GuidedDiffusionPipeline",
    "ModelMixin",
    "ModifiedEulerMaruyamaScheduler",
    "NoisyClassifierModel",
    "PointScoreModel",
    "PredictorCorrectorScheduler",
    "RestorationPipeline",
    "SchedulerMixin",
    "ScoreUNetModel",
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
    "NoisyClassifierModel": "annealers.models",
    "PointScoreModel": "annealers.models",
    "ScoreUNetModel": "annealers.models",
    "AnnealersPipeline": "annealers.pipelines",
    "CorrectorGuidanceCallback": "annealers.pipelines",
    "GuidedDiffusionPipeline": "annealers.pipelines",
    "RestorationPipeline": "annealers.pipelines",
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
