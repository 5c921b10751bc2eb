r"""Our schedulers in the unmodified pipelines of Diffusers, whose network is replaced by an exact Gaussian law.

What a pipeline then returns is Gaussian. Its mean and variance are those that the scheduler makes by itself, see
`scheduler_settings`, and for each setting they are also held against those of the data. For ancestral sampling a
recursion over the levels gives them in closed form. With V_t = alpha_t^2 S + sigma_t^2, a = alpha_t / alpha_s and
v = sigma_t^2 - a^2 sigma_s^2, a step makes

    mean      <-  alpha_s m + a V_s / V_t (mean - alpha_t m)
    variance  <-  (a V_s / V_t)^2 variance + noise           noise: v V_s / V_t is exact, v sigma_s^2 / sigma_t^2 small

The only error left is that of a finite sample, and four standard errors are allowed.

A scheduler with several network calls per level repeats the level in `timesteps` and says how often in `order`. Where
Diffusers then goes wrong, which no scheduler can help, the tests say how, and fail when that is repaired: a refiner
repeats an entry if `order` is 2, and bars count wrong, see `progress`.
"""

import functools
import inspect
import json
import math
import warnings

import diffusers.pipelines.pipeline_utils
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from scheduler_settings import EXACT, KARRAS, SETTINGS, Setting, assert_law, sampled_law
from tiny_pipelines import (
    LAW,
    MEAN,
    PIPELINES,
    SIDE,
    STD,
    TEXT,
    TO_THE_RIGHT,
    Recorded,
    data,
    exact_network,
    from_image,
    from_text,
    inpainted,
    stable_diffusion,
)

from annealers import (
    AnnealedLangevinScheduler,
    DDPMAncestralScheduler,
    ModifiedEulerMaruyamaScheduler,
    PredictorCorrectorScheduler,
)

BATCH, STEPS = 32, 12
CASES = pytest.mark.parametrize("case", PIPELINES, ids=lambda case: case.name)
ALL_SETTINGS = pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
BY_NAME = {case.name: case for case in PIPELINES}
TEXT_TO_IMAGE = BY_NAME["StableDiffusionPipeline"]
FROM_DATA = [name for name in BY_NAME if "Img2Img" in name or "Inpaint" in name]

# How the network calls can be laid out: enough to be led through the loops, too few to sample well.
ON_SOME_LEVELS = {"timestep_spacing": "trailing", "corrector_steps": 2, "corrector_range": (0.3, 0.7)}
ALD, PC = AnnealedLangevinScheduler, PredictorCorrectorScheduler
LAYOUTS = [
    Setting("one call", ModifiedEulerMaruyamaScheduler, {}, 5, math.inf),
    Setting("Langevin, 1 + closing call", ALD, {"steps_per_level": 1}, 5, math.inf, order=1),
    Setting("Langevin, 3 + closing call", ALD, {"steps_per_level": 3}, 5, math.inf, order=3),
    Setting("Langevin, 2", ALD, {"steps_per_level": 2, "denoise": False}, 5, math.inf, order=2),
    Setting("no corrector", PC, {"corrector_steps": 0}, 5, math.inf, order=1),
    Setting("1 + 1", PC, {}, 5, math.inf, order=2),
    Setting("2 + 1", PC, {"corrector_steps": 2}, 5, math.inf, order=3),
    Setting("1 + 1, full", PC, {"layout": "full"}, 5, math.inf, order=2),
    Setting("2 + 1, on some levels", PC, ON_SOME_LEVELS, 5, math.inf, order=3),
    Setting("corrections only", PC, {"predictor": "none", "corrector_steps": 2}, 5, math.inf, order=2),
]
ALL_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
FEW_LEVELS = pytest.mark.filterwarnings("ignore:.*times the noise variance of the last level:UserWarning")


@functools.cache
def built(case):
    """The pipeline, once for the whole file, and the config of the scheduler it came with."""
    pipeline = case.build()
    return pipeline, pipeline.scheduler.config


def with_setting(case, setting, **more):
    pipeline, config = built(case)
    pipeline.scheduler = setting.make(config, STD**2, **more)
    assert pipeline.scheduler.order == setting.order
    return pipeline


def with_our_scheduler(case, **settings):
    return with_setting(case, Setting("", DDPMAncestralScheduler, settings, STEPS, math.inf))


def with_exact_scheduler(case, **settings):
    """With the one whose law is right after any number of steps."""
    return with_setting(case, Setting("", DDPMAncestralScheduler, {**EXACT, **settings}, STEPS, 0, is_exact=True))


def law_by_itself(scheduler, steps, strength=1.0):
    start = (steps - int(steps * strength)) * scheduler.order
    law = (LAW, MEAN, STD**2)
    return sampled_law(scheduler, *law, start=start, from_noise=strength == 1, num_inference_steps=steps)


def law_in_closed_form(scheduler, timesteps, from_noise):
    """Mean and standard deviation of the recursion in the module's docstring."""
    points = [tuple(float(c) for c in scheduler.signal_and_noise(t)) for t in [*timesteps, -1]]
    (alpha, sigma), *_ = points
    mean, variance = (0.0, 1.0) if from_noise else (alpha * MEAN, alpha**2 * STD**2 + sigma**2)
    for (alpha_t, sigma_t), (alpha_s, sigma_s) in zip(points[:-1], points[1:], strict=True):
        V_t, V_s = alpha_t**2 * STD**2 + sigma_t**2, alpha_s**2 * STD**2 + sigma_s**2
        a = alpha_t / alpha_s
        v = sigma_t**2 - a**2 * sigma_s**2
        noise = v * V_s / V_t if scheduler.config.variance_type == "optimal" else v * sigma_s**2 / sigma_t**2
        mean = alpha_s * MEAN + a * V_s / V_t * (mean - alpha_t * MEAN)
        variance = (a * V_s / V_t) ** 2 * variance + noise
    return mean, math.sqrt(variance)


def levels_of(scheduler):
    return list(dict.fromkeys(scheduler.timesteps.tolist()))


def visited(scheduler, steps, strength=1.0):
    """The entries of `timesteps` from the level on that the strength leads to, out of so many."""
    return scheduler.timesteps.tolist()[(steps - int(steps * strength)) * scheduler.order :]


# ---- the law of what is sampled -------------------------------------------------------------------------------------


@CASES
@ALL_SETTINGS
def test_the_output_has_the_law_of_the_scheduler_which_is_near_that_of_the_data(case, setting):
    pipeline = with_setting(case, setting)
    with exact_network(pipeline, LAW), warnings.catch_warnings():
        warnings.simplefilter("error")  # such as those of too few levels
        samples = case.sample(pipeline, setting.steps, BATCH // 2)
    mean, std = law_by_itself(pipeline.scheduler, setting.steps, case.strength)
    assert_law(samples, mean, std)
    assert mean == pytest.approx(MEAN, abs=0.02 * STD)
    assert std == pytest.approx(STD, rel=setting.tolerance)


@CASES
@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        ({"predictor": "secant", "corrector_steps": 0}, 0.06),
        ({"variance_type": "self_estimated_isotropic", "snr": 0.3}, 0.06),
        ({"variance_type": "self_estimated", "snr": 0.3}, 0.12),  # along one direction, half of it masked
    ],
    ids=["secant", "isotropic", "directional"],
)
def test_a_variance_measured_on_the_way_makes_the_law_that_of_the_data(case, config, tolerance):
    pipeline, original = built(case)
    pipeline.scheduler = PC.from_config(original, **KARRAS, **config, last_step_noise=True)
    with exact_network(pipeline, LAW):
        samples = case.sample(pipeline, STEPS, BATCH // 2)
    assert float(samples.mean()) == pytest.approx(MEAN, abs=0.04 * STD)
    assert float(samples.std()) == pytest.approx(STD, rel=tolerance)  # as measured on some 10^3 coordinates


@CASES
def test_the_output_has_the_known_deficit_of_the_small_variance(case):
    pipeline = with_our_scheduler(case, timestep_spacing="leading")
    with exact_network(pipeline, LAW):
        samples = case.sample(pipeline, STEPS, BATCH)
    mean, std = law_in_closed_form(
        pipeline.scheduler, visited(pipeline.scheduler, STEPS, case.strength), case.strength == 1
    )
    assert_law(samples, mean, std)
    assert abs(std - STD) > 10 * STD / math.sqrt(2 * samples.numel())  # which the other test would have noticed


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("settings", [{}, EXACT], ids=["small", "exact"])
def test_the_law_read_off_an_ancestral_run_is_the_one_in_closed_form(settings, strength):
    scheduler = (with_exact_scheduler if settings else with_our_scheduler)(TEXT_TO_IMAGE).scheduler
    scheduler.set_timesteps(STEPS)
    expected = law_in_closed_form(scheduler, visited(scheduler, STEPS, strength), strength == 1)
    assert law_by_itself(scheduler, STEPS, strength) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", FROM_DATA)
@ALL_SETTINGS
def test_the_law_is_right_from_data_noised_to_any_strength(setting, name, strength):
    pipeline = with_setting(BY_NAME[name], setting)
    steps = 6 * setting.steps // 10 if setting.tolerance < 0.25 else setting.steps
    with exact_network(pipeline, LAW):
        samples = BY_NAME[name].sample(pipeline, steps, 8, strength=strength)
    assert_law(samples, *law_by_itself(pipeline.scheduler, steps, strength))


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", FROM_DATA)
@ALL_LAYOUTS
@FEW_LEVELS
def test_data_is_noised_to_the_level_that_sampling_starts_from(layout, name, strength):
    pipeline = with_setting(BY_NAME[name], layout)
    recorded = Recorded(LAW, [])
    with exact_network(pipeline, recorded):
        BY_NAME[name].sample(pipeline, 10, 8, strength=strength)
    state, alpha, sigma = recorded.seen[0]
    state = state[:8]  # the rest is a copy, for guidance
    if "Inpaint" in name and strength == 1:
        assert_law(state, 0.0, 1.0)  # inpainting starts from noise then
    else:
        assert_law(state, alpha * MEAN, math.hypot(alpha * STD, sigma))


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "geometric", "sigma_min": 0.01, "sigma_max": 30.0, "timestep_spacing": "karras"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"prediction_type": "sample", "timestep_spacing": "linspace"},
        {"prediction_type": "score", "timestep_spacing": "trailing"},
    ],
    ids=["geometric", "v from pure noise", "sample", "score"],
)
@pytest.mark.parametrize("scheduler", [DDPMAncestralScheduler, ModifiedEulerMaruyamaScheduler, ALD, PC])
@FEW_LEVELS
def test_every_path_and_prediction_type_starts_from_the_noise_of_the_pipeline(scheduler, config):
    if scheduler is ALD:
        config = {**config, "levels": "path"}
    pipeline, original = built(TEXT_TO_IMAGE)
    pipeline.scheduler = scheduler.from_config(original, **config)
    with exact_network(pipeline, LAW):
        samples = TEXT_TO_IMAGE.sample(pipeline, STEPS, BATCH)
    assert_law(samples, *law_by_itself(pipeline.scheduler, STEPS))
    if scheduler is DDPMAncestralScheduler:
        assert_law(samples, *law_in_closed_form(pipeline.scheduler, pipeline.scheduler.timesteps.tolist(), True))


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
@ALL_LAYOUTS
@FEW_LEVELS
def test_inpainting_keeps_what_is_not_masked(layout, strength):
    pipeline = with_setting(BY_NAME["StableDiffusionInpaintPipeline, 4 channels"], layout)
    with exact_network(pipeline, LAW):
        generator = torch.Generator().manual_seed(0)
        result = inpainted(pipeline, 4, num_inference_steps=STEPS, generator=generator, strength=strength)
    left = slice(None, SIDE // 2)
    assert torch.equal(result[..., left], data(4)[..., left])
    assert_law(result[..., TO_THE_RIGHT], *law_by_itself(pipeline.scheduler, STEPS, strength))


# ---- which levels are visited ---------------------------------------------------------------------------------------


@CASES
@ALL_LAYOUTS
@FEW_LEVELS
def test_the_network_is_called_at_each_entry_where_the_scheduler_believes_to_be(case, layout):
    pipeline = with_setting(case, layout)
    for _ in range(2):  # the second run finds the scheduler where the first one left it
        with exact_network(pipeline, LAW) as calls:
            case.sample(pipeline, layout.steps, 1)
        entries = len(pipeline.scheduler.timesteps)
        expected = visited(pipeline.scheduler, layout.steps, case.strength)
        first = entries - len(expected)
        assert [call.timestep for call in calls] == expected
        assert calls[0].position in (first, None)
        assert [call.position for call in calls[1:]] == list(range(first + 1, entries))
        assert pipeline.scheduler.step_index == entries


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", FROM_DATA)
@ALL_LAYOUTS
@FEW_LEVELS
def test_strength_says_at_which_of_the_levels_sampling_starts(layout, name, strength):
    pipeline = with_setting(BY_NAME[name], layout)
    with exact_network(pipeline, LAW) as calls:
        BY_NAME[name].sample(pipeline, 10, 1, strength=strength)
    level = -int(10 * strength)
    if layout.scheduler is AnnealedLangevinScheduler:
        assert list(dict.fromkeys(call.timestep for call in calls)) == levels_of(pipeline.scheduler)[level:]
    else:  # there may be other levels in between
        one_call = DDPMAncestralScheduler.from_config(pipeline.scheduler.config)
        one_call.set_timesteps(10)
        assert calls[0].timestep == one_call.timesteps[level]
        assert [call.timestep for call in calls] == visited(pipeline.scheduler, 10, strength)


@CASES
@ALL_LAYOUTS
@FEW_LEVELS
def test_progress_and_callbacks_count_the_steps(case, layout, monkeypatch):
    pipeline = with_setting(case, layout)
    bars, called = [], []

    class Bar(diffusers.pipelines.pipeline_utils.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": False, "file": open("/dev/null", "w")})  # noqa: SIM115
            bars.append(self)

    def callback(pipeline, step, timestep, tensors):
        called.append((step, int(timestep)))
        return {}

    monkeypatch.setattr(diffusers.pipelines.pipeline_utils, "tqdm", Bar)
    has_callback = "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters
    with exact_network(pipeline, LAW):
        case.sample(pipeline, layout.steps, 1, **({"callback_on_step_end": callback} if has_callback else {}))
    expected = visited(pipeline.scheduler, layout.steps, case.strength)
    assert [(bar.n, bar.total) for bar in bars] == [progress(case, layout, len(expected))]
    if has_callback:
        assert called == list(enumerate(expected))
        assert pipeline.num_timesteps == len(expected)


def progress(case, layout, entries):
    """Where the bar ends, and where it should."""
    levels = int(layout.steps * case.strength)
    has_closing_call = layout.order > 1 and entries == levels * layout.order + 1
    ticks = levels + has_closing_call
    if case.name in ("DiTPipeline", "LDMTextToImagePipeline", "DDPMPipeline"):
        return entries, entries  # they show a bar over `timesteps`
    if case.name == "AnimateDiffPipeline":
        return ticks, entries  # counts levels out of entries
    return ticks, levels


@pytest.mark.parametrize("kind", ["timesteps", "sigmas"])
@ALL_LAYOUTS
@FEW_LEVELS
def test_explicit_levels_go_through_the_pipeline(layout, kind):
    pipeline = with_setting(TEXT_TO_IMAGE, layout)
    timesteps = [999, 600, 400, 200, 50]
    alphas, sigmas = pipeline.scheduler.signal_and_noise(torch.tensor(timesteps))
    levels = {"timesteps": timesteps, "sigmas": (sigmas / alphas).tolist()}[kind]
    with exact_network(pipeline, LAW) as calls:
        samples = TEXT_TO_IMAGE.sample(pipeline, None, BATCH, **{kind: levels})
    assert [call.timestep for call in calls] == pipeline.scheduler.timesteps.tolist()
    if "corrector_range" not in layout.config:
        assert levels_of(pipeline.scheduler) == timesteps
    assert_law(samples, *sampled_law(pipeline.scheduler, LAW, MEAN, STD**2, **{kind: levels}))


@pytest.mark.parametrize("name", FROM_DATA)
@ALL_LAYOUTS
@FEW_LEVELS
def test_strength_is_right_with_explicit_levels(layout, name):
    # then Diffusers counts entries, not levels, which is why `order` is 1
    pipeline = with_setting(BY_NAME[name], layout)
    timesteps = list(range(950, 0, -100))
    with exact_network(pipeline, LAW) as calls:
        samples = BY_NAME[name].sample(pipeline, 10, 8, timesteps=timesteps, strength=0.5)
    entries = pipeline.scheduler.timesteps.tolist()
    start = len(entries) - len(entries) // 2
    assert [call.timestep for call in calls] == entries[start:]
    assert calls[0].timestep in (350, 450, 550)  # half of the entries, which begins within a level
    assert_law(samples, *sampled_law(pipeline.scheduler, LAW, MEAN, STD**2, start, False, timesteps=timesteps))
    with exact_network(pipeline, LAW) as calls:  # and back to a number of levels
        BY_NAME[name].sample(pipeline, 10, 1, strength=0.5)
    assert pipeline.scheduler.order == layout.order
    assert [call.timestep for call in calls] == visited(pipeline.scheduler, 10, 0.5)


def base_and_refiner(setting, steps, batch):
    """Samples of a refiner that takes over from a base, and the calls of the two."""
    base, refiner = (with_setting(BY_NAME[f"StableDiffusionXL{kind}Pipeline"], setting) for kind in ("", "Img2Img"))
    with exact_network(base, LAW) as base_calls, exact_network(refiner, LAW) as refiner_calls:
        latents = BY_NAME["StableDiffusionXLPipeline"].sample(base, steps, batch, denoising_end=0.6)
        refiner.set_progress_bar_config(disable=True)
        more = {"num_images_per_prompt": batch, "num_inference_steps": steps, "denoising_start": 0.6}
        samples = refiner(**TEXT, image=latents, generator=torch.Generator().manual_seed(1), **more).images
    return samples, [[call.timestep for call in calls] for calls in (base_calls, refiner_calls)]


@pytest.mark.parametrize("setting", SETTINGS + LAYOUTS, ids=lambda setting: setting.name)
@FEW_LEVELS
def test_a_refiner_takes_over_where_the_base_stops(setting):
    samples, (base, refiner) = base_and_refiner(setting, setting.steps, BATCH // 2)
    scheduler = built(BY_NAME["StableDiffusionXLPipeline"])[0].scheduler
    entries = scheduler.timesteps.tolist()
    assert base == [t for t in entries if t >= 400]
    assert 0 < len(base) < len(entries)
    if scheduler.order == 2 and (len(entries) - len(base)) % 2 == 0:
        # Diffusers means its own Heun scheduler, and does this to it as well
        assert refiner == entries[len(base) - 1 :]
    else:
        assert refiner == entries[len(base) :]
        assert_law(samples, *law_by_itself(scheduler, setting.steps))


def test_a_single_step_of_pixart_returns_the_predicted_image():
    # that pipeline then takes the second entry of the tuple
    case = BY_NAME["PixArtAlphaPipeline"]
    pipeline = with_our_scheduler(case, timestep_spacing="trailing", last_step_noise=True, variance_type="fixed_large")
    with exact_network(pipeline, LAW):
        samples = case.sample(pipeline, 1, BATCH)
    alpha, sigma = (float(c) for c in pipeline.scheduler.signal_and_noise(999))
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)  # of E[x_0 | x_t] in x_t - alpha m, x_t standard normal
    assert_law(samples, MEAN - gain * alpha * MEAN, gain)


def test_image_to_image_from_one_step_of_noise_is_the_image_to_within_that_noise():
    pipeline = with_our_scheduler(BY_NAME["StableDiffusionImg2ImgPipeline"])
    with exact_network(pipeline, LAW):
        result = from_image(pipeline, 4, num_inference_steps=100, strength=0.011)
    alpha, sigma = (float(c) for c in pipeline.scheduler.signal_and_noise(1))
    error = result - data(4)
    expected = sigma * STD / math.hypot(alpha * STD, sigma)  # of E[x_0 | x_t] about x_0
    assert float(error.std()) == pytest.approx(expected, rel=0.05)


# ---- noise and seeds ------------------------------------------------------------------------------------------------


@CASES
@pytest.mark.parametrize("setting", [LAYOUTS[0], LAYOUTS[2], LAYOUTS[6]], ids=lambda setting: setting.name)
@FEW_LEVELS
def test_the_same_seed_gives_the_same_samples_and_another_gives_others(case, setting):
    pipeline = with_setting(case, setting)
    with exact_network(pipeline, LAW):
        first, again, other = (case.sample(pipeline, 4, 2, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    images = first.transpose(1, 2)[0] if first.ndim == 5 else first  # the frames of a video
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("setting", SETTINGS + LAYOUTS, ids=lambda setting: setting.name)
@FEW_LEVELS
def test_a_list_of_generators_gives_each_image_its_own_noise(setting):
    pipeline = with_setting(TEXT_TO_IMAGE, setting)

    def images(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return from_text(pipeline, len(seeds), num_inference_steps=5, generator=generators)

    with exact_network(pipeline, LAW):
        together = images([3, 1, 4])
        for i, seed in enumerate([3, 1, 4]):
            torch.testing.assert_close(images([seed]), together[i : i + 1], rtol=0, atol=1e-5)


# ---- as a part of a pipeline ----------------------------------------------------------------------------------------


@ALL_SETTINGS
@FEW_LEVELS
def test_a_saved_pipeline_comes_back_with_our_scheduler_and_makes_the_same_image(setting, tmp_path):
    torch.manual_seed(0)
    pipeline = stable_diffusion()
    pipeline.scheduler = setting.make(pipeline.scheduler.config, STD**2)
    entry = ["annealers", setting.scheduler.__name__]
    assert list(pipeline.config.scheduler) == entry
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == entry
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is setting.scheduler
    images = []
    for each in (pipeline, loaded):  # with their own, random network
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 10, "height": SIDE, "width": SIDE, "output_type": "pt"}
        images.append(each("a cat", generator=generator, **call).images)
    assert images[0].isfinite().all()
    assert torch.equal(*images)


@ALL_SETTINGS
def test_a_scheduler_of_diffusers_gets_its_own_settings_back(setting):
    _, config = built(TEXT_TO_IMAGE)
    there_and_back = DDIMScheduler.from_config(setting.make(config, STD**2).config).config
    names = [name for name in config if not name.startswith("_") and name not in setting.config]
    assert [there_and_back[name] for name in names] == [config[name] for name in names]


def test_settings_that_the_pipeline_corrects_in_its_constructor_are_obeyed():
    with pytest.warns(FutureWarning, match="steps_offset|clip_sample"):
        pipeline = StableDiffusionPipeline(
            **{**built(TEXT_TO_IMAGE)[0].components, "scheduler": DDPMAncestralScheduler()},
            requires_safety_checker=False,
        )
    assert pipeline.scheduler.config.clip_sample is False
    assert pipeline.scheduler.config.steps_offset == 1
    with exact_network(pipeline, LAW) as calls:
        TEXT_TO_IMAGE.sample(pipeline, 10, 1)
    assert [call.timestep for call in calls] == list(range(901, 0, -100))


@ALL_LAYOUTS
@FEW_LEVELS
def test_free_init_noises_at_the_last_train_timestep_and_starts_again(layout):
    case = BY_NAME["AnimateDiffPipeline"]
    pipeline = with_setting(case, layout)
    pipeline.enable_free_init(num_iters=2)
    try:
        with exact_network(pipeline, LAW) as calls:
            frames = case.sample(pipeline, 5, 8)
    finally:
        pipeline.disable_free_init()
    assert [call.timestep for call in calls] == 2 * pipeline.scheduler.timesteps.tolist()
    assert frames.isfinite().all()


@ALL_SETTINGS
def test_a_run_after_one_that_was_interrupted_is_as_if_there_had_been_none(setting):
    def stop_at_the_seventh(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 6
        return {}

    with exact_network(with_setting(TEXT_TO_IMAGE, setting), LAW):
        expected = TEXT_TO_IMAGE.sample(built(TEXT_TO_IMAGE)[0], setting.steps, 2)
    pipeline = with_setting(TEXT_TO_IMAGE, setting)
    with exact_network(pipeline, LAW) as calls:
        TEXT_TO_IMAGE.sample(pipeline, setting.steps, 2, seed=7, callback_on_step_end=stop_at_the_seventh)
        assert len(calls) == 7
        assert torch.equal(TEXT_TO_IMAGE.sample(pipeline, setting.steps, 2), expected)
