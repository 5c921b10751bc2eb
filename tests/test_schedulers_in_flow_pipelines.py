"""Our schedulers in unmodified flow-matching pipelines: Stable Diffusion 3, Flux and Wan, with an exact velocity.

What a pipeline returns has the law that the scheduler makes by itself of the levels that the pipeline asks for, see
`scheduler_settings`; with enough levels that is the law of the Gaussian data. The levels are those of Diffusers' own
schedulers. Flux gives its levels as `sigmas`, to be shifted by the `mu` that it computes from the size of the image;
the others give a number of levels.
"""

import functools

import diffusers.pipelines.pipeline_utils
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline, WanPipeline
from scheduler_settings import Setting, assert_law, sampled_law
from tiny_flow_pipelines import FLOW_PIPELINES, LAW, MEAN, NO_TEXT_ENCODERS, STD
from tiny_pipelines import Recorded, exact_network

from annealers import (
    AnnealedLangevinScheduler,
    DDPMAncestralScheduler,
    ModifiedEulerMaruyamaScheduler,
    PredictorCorrectorScheduler,
)

BATCH, STEPS = 16, 6
BY_NAME = {case.name: case for case in FLOW_PIPELINES}
CASES = pytest.mark.parametrize("case", FLOW_PIPELINES, ids=lambda case: case.name)
FROM_DATA = [name for name in BY_NAME if "Img2Img" in name]
MU = 0.5 + (1.15 - 0.5) * (64 - 256) / (4096 - 256)  # of 8 x 8 tokens, as Flux computes it

ALD, MEM, PC = AnnealedLangevinScheduler, ModifiedEulerMaruyamaScheduler, PredictorCorrectorScheduler
KARRAS = {"timestep_spacing": "karras"}
SECOND_ORDER = {"predictor": "probability_flow", "solver_order": 2}
MATTHEWS = {"predictor": "ddim", "corrector": "leimkuhler_matthews", "corrector_steps": 2, "snr": 0.4}
SETTINGS = [
    Setting("ancestral", DDPMAncestralScheduler, {}, 60, 0.15),
    Setting("modified Euler-Maruyama", MEM, {}, 60, 0.15),
    Setting("Euler-Maruyama", MEM, {"variance": "euler_maruyama"}, 60, 0.15),
    Setting("annealed Langevin", ALD, {"steps_per_level": 8, "step_size": 0.3}, 20, 0.25, order=8),
    Setting("predictor-corrector", PC, {}, 40, 0.15, order=2),
    Setting("predictor-corrector, Leimkuhler-Matthews", PC, MATTHEWS, 20, 0.15, order=3),
    Setting("predictor-corrector, full layout", PC, {**KARRAS, **SECOND_ORDER, "layout": "full"}, 30, 0.1, order=2),
    Setting("on some levels", PC, {**KARRAS, **SECOND_ORDER, "corrector_range": (0.1, 0.6)}, 12, 0.1, order=2),
    Setting("no corrector", PC, {"predictor": "reverse_diffusion", "corrector_steps": 0}, 60, 0.15),
]
ALL_SETTINGS = pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
FEW_LEVELS = pytest.mark.filterwarnings("ignore:.*times the noise variance of the last level:UserWarning")


@functools.cache
def built(case):
    """The pipeline, once for the whole file, and the scheduler it came with."""
    pipeline = case.build()
    return pipeline, pipeline.scheduler


def with_setting(case, setting, **more):
    pipeline, original = built(case)
    pipeline.scheduler = setting.make(original.config, **more)
    return pipeline


def gives_its_levels(case):
    return "Flux" in case.name


def schedule(case, steps):
    """How the pipeline asks for so many levels."""
    if gives_its_levels(case):
        return {"sigmas": np.linspace(1, 1 / steps, steps), "mu": MU}
    return {"num_inference_steps": steps}


def start_of(case, scheduler, steps, strength):
    """The entry at which a pipeline starts; one that gave the levels counts entries."""
    count = len(scheduler.timesteps) if gives_its_levels(case) else steps
    return int(count - count * strength) * scheduler.order


def law_by_itself(case, scheduler, steps, strength=None):
    strength = case.strength if strength is None else strength
    start = start_of(case, scheduler, steps, strength)
    return sampled_law(scheduler, LAW, MEAN, STD**2, start, strength == 1, **schedule(case, steps))


def timesteps_of(calls, per_step=1):
    """What the network was told; Wan calls it twice a step, for guidance."""
    timesteps = [call.timestep for call in calls]
    assert timesteps[::per_step] == timesteps[per_step - 1 :: per_step]
    return timesteps[::per_step]


def calls_per_step(case):
    return 2 if case.name == "WanPipeline" else 1


# ---- the law of what is sampled -------------------------------------------------------------------------------------


@CASES
@ALL_SETTINGS
def test_the_output_has_the_law_of_the_scheduler_which_is_near_that_of_the_data(case, setting):
    pipeline = with_setting(case, setting)
    with exact_network(pipeline, LAW):
        samples = case.sample(pipeline, setting.steps, BATCH)
    mean, std = law_by_itself(case, pipeline.scheduler, setting.steps)
    assert_law(samples, mean, std)
    assert mean == pytest.approx(MEAN, abs=0.02 * STD)
    assert std == pytest.approx(STD, rel=setting.tolerance)


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", FROM_DATA)
@ALL_SETTINGS
@FEW_LEVELS
def test_the_law_is_right_from_data_noised_to_any_strength(setting, name, strength):
    case = BY_NAME[name]
    pipeline = with_setting(case, setting)
    with exact_network(pipeline, LAW) as calls:
        samples = case.sample(pipeline, 10, BATCH, strength=strength)
    start = start_of(case, pipeline.scheduler, 10, strength)
    assert timesteps_of(calls) == pytest.approx(pipeline.scheduler.timesteps[start:].tolist(), rel=1e-6)
    assert calls[0].position == start
    # at strength 1, too, the pipeline noises the data, to the first level, which is pure noise
    assert_law(samples, *law_by_itself(case, pipeline.scheduler, 10, strength))


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", FROM_DATA)
@ALL_SETTINGS
@FEW_LEVELS
def test_data_is_noised_to_the_level_that_sampling_starts_from(setting, name, strength):
    pipeline = with_setting(BY_NAME[name], setting)
    recorded = Recorded(LAW, [])
    with exact_network(pipeline, recorded):
        BY_NAME[name].sample(pipeline, 10, 8, strength=strength)
    state, alpha, sigma = recorded.seen[0]
    state = state[:8]  # the rest is a copy, for guidance
    assert_law(state, alpha * MEAN, (alpha**2 * STD**2 + sigma**2) ** 0.5)


@pytest.mark.parametrize("variance_type", ["self_estimated", "self_estimated_isotropic"])
@CASES
def test_a_variance_measured_on_the_way_makes_the_law_that_of_the_data(case, variance_type):
    setting = Setting("", PC, {"variance_type": variance_type, "last_step_noise": True, "snr": 0.3}, 12, 0.05, order=2)
    pipeline = with_setting(case, setting)
    with exact_network(pipeline, LAW):
        samples = case.sample(pipeline, setting.steps, BATCH)
    assert float(samples.mean()) == pytest.approx(MEAN, abs=0.03 * STD)
    assert float(samples.std()) == pytest.approx(STD, rel=setting.tolerance)


# ---- which levels are visited ---------------------------------------------------------------------------------------


@CASES
@ALL_SETTINGS
@FEW_LEVELS
def test_the_network_is_called_at_each_entry_where_the_scheduler_believes_to_be(case, setting):
    pipeline = with_setting(case, setting)
    for _ in range(2):  # the second run finds the scheduler where the first one left it
        with exact_network(pipeline, LAW) as calls:
            case.sample(pipeline, STEPS, 1)
        scheduler = pipeline.scheduler
        first, entries = start_of(case, scheduler, STEPS, case.strength), len(scheduler.timesteps)
        assert timesteps_of(calls, calls_per_step(case)) == pytest.approx(
            scheduler.timesteps[first:].tolist(), rel=1e-6
        )
        positions = [call.position for call in calls][:: calls_per_step(case)]
        assert positions[0] in (first, None)
        assert positions[1:] == list(range(first + 1, entries))
        assert scheduler.step_index == entries


@CASES
@pytest.mark.parametrize("setting", SETTINGS[:3] + SETTINGS[4:6], ids=lambda setting: setting.name)
def test_the_levels_are_those_of_the_scheduler_of_the_pipeline(case, setting):
    pipeline, original = built(case)
    visited = []
    for pipeline.scheduler in (original, setting.make(original.config)):
        with exact_network(pipeline, LAW) as calls:
            case.sample(pipeline, STEPS, 1, **({} if case.strength == 1 else {"strength": 1.0}))
        visited.append(list(dict.fromkeys(call.timestep for call in calls)))
    # Wan's own scheduler rounds its timesteps down to integers, and goes 1 / 1000 less far towards the data
    tolerance = 4.0 if case.name == "WanPipeline" else 1e-3
    assert visited[1] == pytest.approx(visited[0], abs=tolerance)


@CASES
@ALL_SETTINGS
@FEW_LEVELS
def test_a_copy_by_its_config_visits_the_same_levels(case, setting):
    first = setting.make(built(case)[1].config)
    copy = setting.scheduler.from_config(first.config)
    for scheduler in (first, copy):
        scheduler.set_timesteps(**schedule(case, STEPS))
    assert torch.equal(first.timesteps, copy.timesteps)


@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "WanPipeline"])
@ALL_SETTINGS
@FEW_LEVELS
def test_explicit_sigmas_and_mu_go_through_the_pipeline(name, setting):
    case = BY_NAME[name]
    config = dict(built(case)[1].config) | {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    pipeline = with_setting(case, setting)
    pipeline.scheduler = setting.make(config)
    sigmas = [0.999, 0.8, 0.5, 0.2]
    more = {} if gives_its_levels(case) else {"mu": MU + 1}
    with exact_network(pipeline, LAW) as calls:
        case.sample(pipeline, None if not gives_its_levels(case) else 4, 1, sigmas=sigmas, **more)
    reference = FlowMatchEulerDiscreteScheduler.from_config(config)
    reference.set_timesteps(sigmas=sigmas, mu=MU + 1 if more else MU)
    assert {round(call.timestep, 2) for call in calls} <= {round(t, 2) for t in pipeline.scheduler.timesteps.tolist()}
    if "corrector_range" not in setting.config:  # which has levels in between
        levels = list(dict.fromkeys(pipeline.scheduler.timesteps.tolist()))
        assert levels == pytest.approx(reference.timesteps.tolist(), abs=1e-3)


# ---- as a part of a pipeline ----------------------------------------------------------------------------------------


@CASES
@ALL_SETTINGS
@FEW_LEVELS
def test_progress_and_callbacks_count_the_steps(case, setting, monkeypatch):
    pipeline = with_setting(case, setting)
    bars, called = [], []

    class Bar(diffusers.pipelines.pipeline_utils.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": False, "file": open("/dev/null", "w")})  # noqa: SIM115
            bars.append(self)

    def callback(pipeline, step, timestep, tensors):
        called.append((step, float(timestep)))
        return {}

    monkeypatch.setattr(diffusers.pipelines.pipeline_utils, "tqdm", Bar)
    with exact_network(pipeline, LAW):
        case.sample(pipeline, STEPS, 1, callback_on_step_end=callback)
    scheduler = pipeline.scheduler
    expected = scheduler.timesteps[start_of(case, scheduler, STEPS, case.strength) :].tolist()
    assert called == list(enumerate(expected))
    assert pipeline.num_timesteps == len(expected)
    levels = len(expected) if gives_its_levels(case) else int(STEPS * case.strength)
    has_closing_call = scheduler.order > 1 and len(expected) == levels * scheduler.order + 1
    assert [(bar.n, bar.total) for bar in bars] == [(levels + has_closing_call, levels)]


@CASES
@ALL_SETTINGS
@FEW_LEVELS
def test_the_same_seed_gives_the_same_samples_and_another_gives_others(case, setting):
    pipeline = with_setting(case, setting)
    with exact_network(pipeline, LAW):
        first, again, other = (case.sample(pipeline, 4, 2, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("pipeline_class", [StableDiffusion3Pipeline, FluxPipeline, WanPipeline])
@pytest.mark.parametrize("setting", SETTINGS[1:2] + SETTINGS[3:5], ids=lambda setting: setting.name)
@FEW_LEVELS
def test_a_saved_pipeline_comes_back_with_our_scheduler_and_makes_the_same_image(pipeline_class, setting, tmp_path):
    case = BY_NAME[pipeline_class.__name__]
    torch.manual_seed(0)
    pipeline = with_setting(case, setting)
    pipeline.save_pretrained(tmp_path)
    without = {name: None for name in NO_TEXT_ENCODERS if name in pipeline.components}
    loaded = pipeline_class.from_pretrained(tmp_path, **without)
    assert type(loaded.scheduler) is setting.scheduler
    images = [case.sample(each, 3, 1, output_type="pt") for each in (pipeline, loaded)]  # of their own, random network
    assert images[0].isfinite().all()
    torch.testing.assert_close(*images, rtol=0, atol=1e-6)


@CASES
@ALL_SETTINGS
def test_a_scheduler_of_diffusers_gets_its_own_settings_back(case, setting):
    original = built(case)[1]
    there_and_back = type(original).from_config(setting.make(original.config).config).config
    names = [name for name in original.config if not name.startswith("_") and name not in setting.config]
    assert [there_and_back[name] for name in names] == [original.config[name] for name in names]
