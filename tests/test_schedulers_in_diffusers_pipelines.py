r"""Our schedulers in the unmodified pipelines of Diffusers, whose network is replaced by an exact Gaussian law.

What a pipeline then returns is Gaussian, and a recursion over the levels that it visits gives its mean and variance in
closed form. With V_t = alpha_t^2 S + sigma_t^2, a = alpha_t / alpha_s and v = sigma_t^2 - a^2 sigma_s^2, a step makes

    mean      <-  alpha_s m + a V_s / V_t (mean - alpha_t m)
    variance  <-  (a V_s / V_t)^2 variance + noise           noise: v V_s / V_t is exact, v sigma_s^2 / sigma_t^2 small

so the only error is that of a finite sample, and four standard errors are allowed.
"""

import functools
import inspect
import json
import math

import diffusers.pipelines.pipeline_utils
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_pipelines import (
    LAW,
    MEAN,
    PIPELINES,
    SIDE,
    STD,
    TEXT,
    TO_THE_RIGHT,
    data,
    exact_network,
    from_image,
    from_text,
    inpainted,
    stable_diffusion,
)

from annealers import DDPMAncestralScheduler

BATCH, STEPS = 32, 12
CASES = pytest.mark.parametrize("case", PIPELINES, ids=lambda case: case.name)
BY_NAME = {case.name: case for case in PIPELINES}
TEXT_TO_IMAGE = BY_NAME["StableDiffusionPipeline"]


@functools.cache
def built(case):
    """The pipeline, once for the whole file, and the config of the scheduler it came with."""
    pipeline = case.build()
    return pipeline, pipeline.scheduler.config


def with_our_scheduler(case, **settings):
    pipeline, config = built(case)
    pipeline.scheduler = DDPMAncestralScheduler.from_config(config, **settings)
    return pipeline


def variance_at(scheduler, t):
    alpha, sigma = (float(c) for c in scheduler.signal_and_noise(t))
    return alpha, sigma, alpha**2 * STD**2 + sigma**2


def with_exact_scheduler(case, **settings):
    """With the one whose law is right after any number of steps."""
    scheduler = with_our_scheduler(case, **settings).scheduler
    statistic = [variance_at(scheduler, t)[1] ** 2 / variance_at(scheduler, t)[2] for t in range(len(scheduler))]
    exact = {"variance_type": "optimal", "last_step_noise": True, "mean_squared_noise": statistic}
    return with_our_scheduler(case, **exact, **settings)


def sampled_law(scheduler, timesteps, from_noise):
    """Mean and standard deviation of the recursion in the module's docstring."""
    alpha, _, V = variance_at(scheduler, timesteps[0])
    mean, variance = (0.0, 1.0) if from_noise else (alpha * MEAN, V)
    for t, s in zip(timesteps, timesteps[1:] + [-1], strict=True):
        (alpha_t, sigma_t, V_t), (alpha_s, sigma_s, V_s) = variance_at(scheduler, t), variance_at(scheduler, s)
        a = alpha_t / alpha_s
        v = sigma_t**2 - a**2 * sigma_s**2
        noise = v * V_s / V_t if scheduler.config.variance_type == "optimal" else v * sigma_s**2 / sigma_t**2
        mean = alpha_s * MEAN + a * V_s / V_t * (mean - alpha_t * MEAN)
        variance = (a * V_s / V_t) ** 2 * variance + noise
    return mean, math.sqrt(variance)


def assert_law(samples, mean, std):
    standard_error = std / math.sqrt(samples.numel())
    assert float(samples.double().mean()) == pytest.approx(mean, abs=4 * standard_error)
    assert float(samples.double().std()) == pytest.approx(std, abs=4 * standard_error / math.sqrt(2))


def visited(scheduler, strength=1.0):
    timesteps = scheduler.timesteps.tolist()
    return timesteps[len(timesteps) - int(len(timesteps) * strength) :]


# ---- the law of what is sampled -------------------------------------------------------------------------------------


@CASES
def test_the_output_has_the_mean_and_standard_deviation_of_the_data(case):
    pipeline = with_exact_scheduler(case, timestep_spacing="trailing")
    with exact_network(pipeline, LAW):
        samples = case.sample(pipeline, STEPS, BATCH)
    assert_law(samples, MEAN, STD)


@CASES
@pytest.mark.parametrize("spacing", ["leading", "karras"])
def test_the_output_has_the_known_deficit_of_the_small_variance(case, spacing):
    pipeline = with_our_scheduler(case, timestep_spacing=spacing)
    with exact_network(pipeline, LAW):
        samples = case.sample(pipeline, STEPS, BATCH)
    mean, std = sampled_law(pipeline.scheduler, visited(pipeline.scheduler, case.strength), case.strength == 1)
    assert_law(samples, mean, std)
    assert abs(std - STD) > 10 * STD / math.sqrt(2 * samples.numel())  # which the other test would have noticed


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "geometric", "sigma_min": 0.01, "sigma_max": 30.0, "timestep_spacing": "karras"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"prediction_type": "sample", "timestep_spacing": "linspace"},
        {"prediction_type": "score", "timestep_spacing": "trailing"},
    ],
)
def test_every_path_and_prediction_type_starts_from_the_noise_of_the_pipeline(config):
    pipeline = with_our_scheduler(TEXT_TO_IMAGE, **config)
    with exact_network(pipeline, LAW):
        samples = TEXT_TO_IMAGE.sample(pipeline, STEPS, BATCH)
    assert_law(samples, *sampled_law(pipeline.scheduler, visited(pipeline.scheduler), True))


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
def test_inpainting_keeps_what_is_not_masked(strength):
    pipeline = with_exact_scheduler(BY_NAME["StableDiffusionInpaintPipeline, 4 channels"])
    with exact_network(pipeline, LAW):
        generator = torch.Generator().manual_seed(0)
        result = inpainted(pipeline, BATCH, num_inference_steps=STEPS, generator=generator, strength=strength)
    left = slice(None, SIDE // 2)
    assert torch.equal(result[..., left], data(BATCH)[..., left])
    assert_law(result[..., TO_THE_RIGHT], MEAN, STD)


# ---- which levels are visited ---------------------------------------------------------------------------------------


@CASES
def test_the_network_is_called_at_each_level_where_the_scheduler_believes_to_be(case):
    pipeline = with_our_scheduler(case)
    for _ in range(2):  # the second run finds the scheduler where the first one left it
        with exact_network(pipeline, LAW) as calls:
            case.sample(pipeline, STEPS, 1)
        timesteps = pipeline.scheduler.timesteps.tolist()
        expected = visited(pipeline.scheduler, case.strength)
        assert [call.timestep for call in calls] == expected
        first = timesteps.index(expected[0])
        assert calls[0].position in (first, None)
        assert [call.position for call in calls[1:]] == list(range(first + 1, STEPS))
        assert pipeline.scheduler.step_index == STEPS


@pytest.mark.parametrize(("strength", "evaluations"), [(0.3, 6), (0.5, 10), (1.0, 20)])
@pytest.mark.parametrize("name", [name for name in BY_NAME if "Img2Img" in name or "Inpaint" in name])
def test_strength_says_how_many_of_the_steps_are_taken(name, strength, evaluations):
    pipeline = with_our_scheduler(BY_NAME[name])
    with exact_network(pipeline, LAW) as calls:
        BY_NAME[name].sample(pipeline, 20, 1, strength=strength)
    assert [call.timestep for call in calls] == pipeline.scheduler.timesteps.tolist()[-evaluations:]


@CASES
def test_progress_and_callbacks_count_the_steps(case, monkeypatch):
    pipeline = with_our_scheduler(case)
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
        case.sample(pipeline, STEPS, 1, **({"callback_on_step_end": callback} if has_callback else {}))
    expected = visited(pipeline.scheduler, case.strength)
    assert [(bar.n, bar.total) for bar in bars] == [(len(expected), len(expected))]
    if has_callback:
        assert called == list(enumerate(expected))
        assert pipeline.num_timesteps == len(expected)


def test_explicit_timesteps_go_through_the_pipeline():
    pipeline = with_exact_scheduler(TEXT_TO_IMAGE)
    timesteps = [999, 600, 300, 60, 5]
    with exact_network(pipeline, LAW) as calls:
        samples = TEXT_TO_IMAGE.sample(pipeline, None, BATCH, timesteps=timesteps)
    assert [call.timestep for call in calls] == timesteps
    assert_law(samples, MEAN, STD)


def test_a_refiner_takes_over_where_the_base_stops():
    base, refiner = (with_exact_scheduler(BY_NAME[f"StableDiffusionXL{kind}Pipeline"]) for kind in ("", "Img2Img"))
    with exact_network(base, LAW) as base_calls, exact_network(refiner, LAW) as refiner_calls:
        latents = BY_NAME["StableDiffusionXLPipeline"].sample(base, STEPS, BATCH, denoising_end=0.6)
        refiner.set_progress_bar_config(disable=True)
        more = {"num_images_per_prompt": BATCH, "num_inference_steps": STEPS, "denoising_start": 0.6}
        samples = refiner(**TEXT, image=latents, generator=torch.Generator().manual_seed(1), **more).images
    assert [call.timestep for call in base_calls + refiner_calls] == base.scheduler.timesteps.tolist()
    assert 0 < len(refiner_calls) < STEPS
    assert_law(samples, MEAN, STD)


def test_a_single_step_of_pixart_returns_the_predicted_image():
    # that pipeline then takes the second entry of the tuple
    case = BY_NAME["PixArtAlphaPipeline"]
    pipeline = with_our_scheduler(case, timestep_spacing="trailing", last_step_noise=True, variance_type="fixed_large")
    with exact_network(pipeline, LAW):
        samples = case.sample(pipeline, 1, BATCH)
    alpha, _, V = variance_at(pipeline.scheduler, 999)
    gain = alpha * STD**2 / V  # of E[x_0 | x_t] in x_t - alpha m, with x_t standard normal
    assert_law(samples, MEAN - gain * alpha * MEAN, gain)


def test_image_to_image_from_one_step_of_noise_is_the_image_to_within_that_noise():
    pipeline = with_our_scheduler(BY_NAME["StableDiffusionImg2ImgPipeline"])
    with exact_network(pipeline, LAW):
        result = from_image(pipeline, 4, num_inference_steps=100, strength=0.011)
    _, sigma, V = variance_at(pipeline.scheduler, 1)
    error = result - data(4)
    assert float(error.std()) == pytest.approx(sigma * STD / math.sqrt(V), rel=0.05)  # of E[x_0 | x_t] about x_0


# ---- noise and seeds ------------------------------------------------------------------------------------------------


@CASES
def test_the_same_seed_gives_the_same_samples_and_another_gives_others(case):
    pipeline = with_our_scheduler(case)
    with exact_network(pipeline, LAW):
        first, again, other = (case.sample(pipeline, 4, 2, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    images = first.transpose(1, 2)[0] if first.ndim == 5 else first  # the frames of a video
    assert not torch.equal(images[0], images[1])


def test_a_list_of_generators_gives_each_image_its_own_noise():
    pipeline = with_our_scheduler(TEXT_TO_IMAGE)

    def images(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return from_text(pipeline, len(seeds), num_inference_steps=5, generator=generators)

    with exact_network(pipeline, LAW):
        together = images([3, 1, 4])
        for i, seed in enumerate([3, 1, 4]):
            torch.testing.assert_close(images([seed]), together[i : i + 1], rtol=0, atol=1e-6)


# ---- as a part of a pipeline ----------------------------------------------------------------------------------------


def test_a_saved_pipeline_comes_back_with_our_scheduler_and_makes_the_same_image(tmp_path):
    torch.manual_seed(0)
    pipeline = stable_diffusion()
    pipeline.scheduler = DDPMAncestralScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="karras", variance_type="fixed_large", last_step_noise=True
    )
    assert pipeline.config.scheduler == ("annealers", "DDPMAncestralScheduler")
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "annealers",
        "DDPMAncestralScheduler",
    ]
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is DDPMAncestralScheduler
    images = []
    for each in (pipeline, loaded):  # with their own, random network
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 3, "height": SIDE, "width": SIDE, "output_type": "pt"}
        images.append(each("a cat", generator=generator, **call).images)
    assert images[0].isfinite().all()
    assert torch.equal(*images)


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


def test_free_init_noises_at_the_last_train_timestep_and_starts_again():
    case = BY_NAME["AnimateDiffPipeline"]
    pipeline = with_our_scheduler(case)
    pipeline.enable_free_init(num_iters=2)
    try:
        with exact_network(pipeline, LAW) as calls:
            frames = case.sample(pipeline, 5, 8)
    finally:
        pipeline.disable_free_init()
    assert [call.timestep for call in calls] == 2 * pipeline.scheduler.timesteps.tolist()
    assert frames.isfinite().all()
