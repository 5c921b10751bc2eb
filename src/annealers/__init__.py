"""annealers extends Hugging Face Diffusers with samplers, generative models and training scripts.

The names below are imported eagerly and the mixins are exposed, because Diffusers resolves the `["annealers", "ClassName"]`
entries of a saved `model_index.json` only through modules that are already imported.
"""

from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin

from annealers import exact
from annealers.pipelines import GuidedDiffusionPipeline
from annealers.schedulers import DDPMAncestralScheduler

__version__ = "0.1.0"

__all__ = [
    "ConfigMixin",
    "DDPMAncestralScheduler",
    "DiffusionPipeline",
    "GuidedDiffusionPipeline",
    "ModelMixin",
    "SchedulerMixin",
    "exact",
]
