"""Samplers on one family of Gaussian paths; each file is one algorithm."""

if __name__ != "annealers.schedulers":
    raise ImportError("import annealers.schedulers; `schedulers` would be a second copy of its classes")

from annealers.schedulers.gaussian_path import GaussianPathScheduler, GaussianPathSchedulerOutput
from annealers.schedulers.scheduling_annealed_langevin import AnnealedLangevinScheduler
from annealers.schedulers.scheduling_cold_diffusion import ColdDiffusionScheduler
from annealers.schedulers.scheduling_ddpm_ancestral import DDPMAncestralScheduler
from annealers.schedulers.scheduling_modified_euler_maruyama import ModifiedEulerMaruyamaScheduler
from annealers.schedulers.scheduling_predictor_corrector import PredictorCorrectorScheduler

__all__ = [
    "AnnealedLangevinScheduler",
    "ColdDiffusionScheduler",
    "DDPMAncestralScheduler",
    "GaussianPathScheduler",
    "GaussianPathSchedulerOutput",
    "ModifiedEulerMaruyamaScheduler",
    "PredictorCorrectorScheduler",
]
