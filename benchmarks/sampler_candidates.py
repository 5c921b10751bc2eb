"""The samplers that the `sampler_*` measurements compare: those of annealers and those of Diffusers.

A candidate is built on any path, with one of its spacings: "trailing" (even train timesteps from the last one down) or
"karras" (even steps of the seventh root of the noise-to-signal ratio). Every scheme is measured on each spacing it
has, because the best spacing of one is not that of another. The single-step solver has "linspace" for "trailing".

Left out: DPMSolverSDEScheduler, which draws its noise through torchsde; LCM and TCD, made for distilled networks; and
EDM's own schedulers, whose path is not a beta schedule.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
from diffusers import SchedulerMixin

import annealers

OURS, THEIRS = "annealers", "diffusers"
TRAILING, BOTH = ("trailing",), ("trailing", "karras")


@dataclass(frozen=True)
class Candidate:
    """A sampler to be measured.

    Args:
        name: Its name in tables and figures.
        build: `build(path, spacing)` makes the scheduler; `path` is the config of the beta schedule and prediction.
        family: OURS or THEIRS.
        stochastic: Whether its steps draw noise.
        spacings: Those that it has.
        network_spacings: Those that it is run with on a trained network too, where a call is expensive.
        step_options: More arguments of `step`, as DDIM's eta.
    """

    name: str
    build: Callable[[dict[str, Any], str], SchedulerMixin]
    family: str
    stochastic: bool
    spacings: tuple[str, ...] = BOTH
    network_spacings: tuple[str, ...] = ()
    step_options: dict[str, Any] = field(default_factory=dict)


def candidates() -> list[Candidate]:
    ancestral, euler_maruyama = "DDPMAncestralScheduler", "ModifiedEulerMaruyamaScheduler"
    corrected, langevin = "PredictorCorrectorScheduler", "AnnealedLangevinScheduler"
    optimal = {"variance_type": "optimal"}
    optimal_to_last = {"variance_type": "optimal", "last_step_noise": True}
    flow = {"predictor": "probability_flow", "solver_order": 2}
    uncorrected = {"corrector_steps": 0}
    secant = {"predictor": "secant", **uncorrected}
    to_last = {"last_step_noise": True}
    self_estimated = {"variance_type": "self_estimated"}
    zero = {"final_sigmas_type": "zero"}
    multistep = "DPMSolverMultistepScheduler"
    return [
        _ours("DDPM small", ancestral, network_spacings=TRAILING),
        _ours("DDPM large", ancestral, {"variance_type": "fixed_large"}),
        _ours("DDPM optimal", ancestral, optimal, network_spacings=TRAILING),
        _ours("DDPM optimal, noise to the last", ancestral, optimal_to_last),
        _ours("MEM", euler_maruyama, network_spacings=TRAILING),
        _ours("EM", euler_maruyama, {"variance": "euler_maruyama"}),
        _ours("PC DDPM small", corrected, {"snr": 0.3}, network_spacings=TRAILING),
        _ours("PC DDPM optimal, noise to the last", corrected, {"snr": 0.3, **optimal_to_last}),
        _ours("PC DDIM", corrected, {"snr": 0.3, "predictor": "ddim"}, network_spacings=TRAILING),
        _ours("PC flow, second order", corrected, {"snr": 0.3, **flow}),
        _ours("Flow, second order", corrected, {**flow, **uncorrected}, stochastic=False, network_spacings=TRAILING),
        _ours("PC self-estimated", corrected, {"snr": 0.3, **self_estimated}, network_spacings=TRAILING),
        _ours("PC self-estimated, noise to the last", corrected, {"snr": 0.3, **self_estimated, **to_last}),
        _ours("Self-estimated, noise to the last", corrected, {**self_estimated, **to_last, **uncorrected}),
        _ours("Secant eta=0, noise to the last", corrected, {**secant, **to_last, "eta": 0.0}),
        _ours("Secant eta=0.5, noise to the last", corrected, {**secant, **to_last, "eta": 0.5}),
        _ours("Secant eta=1, noise to the last", corrected, {**secant, **to_last, "eta": 1.0}),
        _ours("Secant eta=0.5", corrected, {**secant, "eta": 0.5}, network_spacings=TRAILING),
        _ours("Secant eta=1", corrected, {**secant, "eta": 1.0}, network_spacings=TRAILING),
        _ours("ALD 1 x 0.5", langevin, {"levels": "path", "steps_per_level": 1, "step_size": 0.5}),
        _ours("ALD 5 x 0.2", langevin, {"levels": "path", "steps_per_level": 5, "step_size": 0.2}),
        _theirs("DDPMScheduler small", "DDPMScheduler", stochastic=True, spacings=TRAILING),
        _theirs(
            "DDPMScheduler large",
            "DDPMScheduler",
            {"variance_type": "fixed_large"},
            stochastic=True,
            spacings=TRAILING,
        ),
        _theirs("DDIM", "DDIMScheduler", spacings=TRAILING, network_spacings=TRAILING),
        _theirs("DDIM eta=1", "DDIMScheduler", stochastic=True, spacings=TRAILING, step_options={"eta": 1.0}),
        _theirs("Euler", "EulerDiscreteScheduler", zero),
        _theirs(
            "Euler ancestral",
            "EulerAncestralDiscreteScheduler",
            stochastic=True,
            spacings=TRAILING,
            network_spacings=TRAILING,
        ),
        _theirs("Heun", "HeunDiscreteScheduler", network_spacings=TRAILING),
        _theirs("KDPM2", "KDPM2DiscreteScheduler"),
        _theirs("KDPM2 ancestral", "KDPM2AncestralDiscreteScheduler", stochastic=True),
        _theirs("LMS", "LMSDiscreteScheduler", network_spacings=TRAILING),
        _theirs("PNDM", "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}, spacings=TRAILING),
        _theirs("DPM++ 2M", multistep, {"algorithm_type": "dpmsolver++", **zero}, network_spacings=TRAILING),
        _theirs("DPM++ 3M", multistep, {"algorithm_type": "dpmsolver++", "solver_order": 3, **zero}),
        _theirs(
            "DPM++ 2M SDE",
            multistep,
            {"algorithm_type": "sde-dpmsolver++", **zero},
            stochastic=True,
            network_spacings=TRAILING,
        ),
        _theirs(
            "DPM++ 2S",
            "DPMSolverSinglestepScheduler",
            {"algorithm_type": "dpmsolver++", **zero},
            spacings=("linspace", "karras"),
        ),
        _theirs("UniPC", "UniPCMultistepScheduler", zero, network_spacings=TRAILING),
        _theirs("DEIS", "DEISMultistepScheduler", network_spacings=TRAILING),
        _theirs("SA-Solver", "SASolverScheduler", stochastic=True, network_spacings=TRAILING),
    ]


def _ours(
    name: str, class_name: str, settings: dict[str, Any] | None = None, stochastic: bool = True, **more: Any
) -> Candidate:
    build = partial(_build_ours, getattr(annealers, class_name), settings or {})
    return Candidate(name, build, OURS, stochastic, **more)


def _build_ours(
    scheduler_class: type[SchedulerMixin], settings: dict[str, Any], path: dict[str, Any], spacing: str
) -> SchedulerMixin:
    return scheduler_class(**path, **settings, timestep_spacing=spacing)


def _theirs(
    name: str, class_name: str, settings: dict[str, Any] | None = None, stochastic: bool = False, **more: Any
) -> Candidate:
    build = partial(_build_theirs, getattr(diffusers, class_name), settings or {})
    return Candidate(name, build, THEIRS, stochastic, **more)


def _build_theirs(
    scheduler_class: type[SchedulerMixin], settings: dict[str, Any], path: dict[str, Any], spacing: str
) -> SchedulerMixin:
    known = inspect.signature(scheduler_class.__init__).parameters
    spaced = {"use_karras_sigmas": True} if spacing == "karras" else {}
    if "timestep_spacing" in known:
        # Karras levels end where the others do in some of them, and only "linspace" reaches the first train timestep
        spaced["timestep_spacing"] = "linspace" if spacing == "karras" else spacing
    # one without `clip_sample` never clips
    return scheduler_class(**{name: value for name, value in path.items() if name in known}, **settings, **spaced)
