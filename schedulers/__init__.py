"""Samplers on one family of Gaussian paths; each file is one algorithm."""

if __name__ != "annealers.schedulers":
    raise ImportError("import annealers.schedulers; `schedulers` would be a second copy of its classes")

from annealers.schedulers.gaussian_path import GaussianPathScheduler, GaussianPathSchedulerOutput
from annealers.schedulers.scheduling_ddpm_ancestral import DDPMAncestralScheduler

__all__ = ["DDPMAncestralScheduler", "GaussianPathScheduler", "GaussianPathSchedulerOutput"]
