"""Properties of guidance with one scale for predictions and another for corrections.

Oracle: the sampling loop written out, which calls the exact networks of both classes itself and combines them with the
scale that is due, on the same noise. Which call is which follows from the layout: a call that stays on its level
corrects, one that leaves it predicts.
"""

import doctest
import math

import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.callbacks import MultiPipelineCallbacks
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from tiny_pipelines import SIDE, stable_diffusion, stable_diffusion_xl

from annealers import DDPMAncestralScheduler, GuidedDiffusionPipeline, PredictorCorrectorScheduler
from annealers.exact import ConditionalExactModel, Gaussian, path_point
from annealers.pipelines import CorrectorGuidanceCallback

NULL, CLASS = Gaussian(-0.5, variance=0.5), Gaussian(0.4, variance=0.1)
LAYOUTS = [
    ({}, "P CP CP CP"),
    ({"corrector_steps": 2}, "P CCP CCP CCP"),
    ({"corrector_steps": 2, "corrector_range": (0.0, 0.6)}, "P PPP CCP CCP"),
    ({"layout": "full"}, "CP CP CP CP"),
    ({"predictor": "none", "corrector_steps": 2}, "CC CC CC CC P"),
]
ON_ALL_LAYOUTS = pytest.mark.parametrize(
    ("settings", "calls"), [(settings, calls.replace(" ", "")) for settings, calls in LAYOUTS]
)


class Network(ModelMixin, ConfigMixin):
    """The exact network of two classes, the second of which is the null class."""

    @register_to_config
    def __init__(self, in_channels=1, sample_size=4, num_class_embeds=2):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.exact = None  # needs the scheduler
        self.batches = []

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.batches.append(len(sample))
        return self.exact(sample, timestep, class_labels, return_dict=False)


def scheduler_of(**settings):
    return PredictorCorrectorScheduler(
        **{"clip_sample": False, "timestep_spacing": "trailing", "snr": 0.3, "num_train_timesteps": 100, **settings}
    )


def pipeline_of(scheduler):
    network = Network()
    network.exact = ConditionalExactModel([CLASS, NULL], scheduler)
    pipeline = GuidedDiffusionPipeline(network, scheduler, null_label=1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def by_hand(scheduler, scales, x, generator, steps=4):
    """The loop, with a scale for each call."""
    scheduler.set_timesteps(steps)
    for t, w in zip(scheduler.timesteps, scales, strict=True):
        point = path_point(scheduler, t)
        unconditional, conditional = (law.noise(x, *point) for law in (NULL, CLASS))
        eps = unconditional + w * (conditional - unconditional)
        x = scheduler.step(eps, t, x, generator=generator).prev_sample
    return x


def guided_sample(pipeline, callback, x, first=None, **more):
    return pipeline(
        class_labels=[0] * len(x),
        latents=x,
        guidance_scale=callback.guidance_scale if first is None else first,
        num_inference_steps=4,
        callback_on_step_end=callback,
        output_type="latent",
        **more,
    ).images


# ---- our pipeline ---------------------------------------------------------------------------------------------------


@ON_ALL_LAYOUTS
@pytest.mark.parametrize(("predictor", "corrector"), [(1.0, 5.0), (3.0, 1.0), (0.5, 0.0), (2.0, 2.0), (0.0, -1.5)])
@pytest.mark.filterwarnings("ignore:.*times the noise variance")
def test_predictions_and_corrections_are_guided_by_their_own_scale(settings, calls, predictor, corrector):
    x = torch.randn(3, 1, 4, 4, generator=seeded(), dtype=torch.float64)
    scales = [corrector if call == "C" else predictor for call in calls]
    expected = by_hand(scheduler_of(**settings), scales, x, seeded(1))
    callback = CorrectorGuidanceCallback(predictor, corrector)
    pipeline = pipeline_of(scheduler_of(**settings))
    first = corrector if calls[0] == "C" else None
    for _ in range(2):  # a second run is like the first
        pipeline.unet.batches.clear()
        result = guided_sample(pipeline, callback, x, first, generator=seeded(1))
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
        assert pipeline.unet.batches[1:] == [3 if w in (0, 1) else 6 for w in scales[1:]]


def test_equal_scales_are_guidance_without_callback():
    x = torch.randn(2, 1, 4, 4, generator=seeded(), dtype=torch.float64)
    pipeline = pipeline_of(scheduler_of())
    arguments = {"class_labels": 0, "latents": x, "num_inference_steps": 4, "output_type": "latent"}
    plain = pipeline(guidance_scale=3.0, generator=seeded(1), **arguments | {"class_labels": [0, 0]}).images
    both = guided_sample(pipeline, CorrectorGuidanceCallback(3.0, 3.0), x, generator=seeded(1))
    assert torch.equal(plain, both)


def test_it_goes_together_with_another_callback():
    seen = []

    class Watching(CorrectorGuidanceCallback):
        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            seen.append(pipeline.guidance_scale)
            return callback_kwargs

    x = torch.randn(2, 1, 4, 4, generator=seeded(), dtype=torch.float64)
    callback = CorrectorGuidanceCallback(2.0, 4.0)
    callbacks = MultiPipelineCallbacks([callback, Watching(0, 0)])
    callbacks.guidance_scale = callback.guidance_scale
    guided_sample(pipeline_of(scheduler_of()), callbacks, x)
    assert seen == [4.0, 2.0] * 3 + [2.0]


# ---- pipelines of Diffusers -----------------------------------------------------------------------------------------


def latent_scheduler_of(pipeline, **settings):
    return PredictorCorrectorScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", snr=0.3, **settings
    )


def with_exact_classes(pipeline):
    """Puts exact networks in, the first half of a doubled batch of the null class; returns the list of its calls."""
    calls = []

    def forward(sample, timestep, *_, return_dict=True, **__):
        point = path_point(pipeline.scheduler, timestep)
        calls.append((len(sample), pipeline.guidance_scale))
        halves = sample.chunk(2) if len(sample) == 4 else (sample[:0], sample)
        output = torch.cat([law.noise(half, *point) for law, half in zip((NULL, CLASS), halves, strict=True)])
        return DecoderOutput(sample=output) if return_dict else (output,)

    pipeline.unet.forward = forward
    pipeline.set_progress_bar_config(disable=True)
    return calls


def sampled(pipeline, x, **arguments):
    arguments = {"num_inference_steps": 4, "num_images_per_prompt": 2, "output_type": "latent", **arguments}
    return pipeline("a cat", latents=x, height=SIDE, width=SIDE, generator=seeded(1), **arguments).images


@pytest.fixture(scope="module", params=[stable_diffusion, stable_diffusion_xl], ids=["SD", "SDXL"])
def of_diffusers(request):
    pipeline = request.param()
    return pipeline, pipeline.scheduler, with_exact_classes(pipeline)


@pytest.fixture
def theirs(of_diffusers):
    pipeline, pipeline.scheduler, calls = of_diffusers
    calls.clear()
    return pipeline, calls


@ON_ALL_LAYOUTS
@pytest.mark.filterwarnings("ignore:.*times the noise variance")
def test_a_pipeline_of_diffusers_is_guided_by_both_scales(theirs, settings, calls):
    pipeline, made = theirs
    pipeline.scheduler = latent_scheduler_of(pipeline, **settings)
    x = torch.randn(2, 4, SIDE, SIDE, generator=seeded())
    callback = CorrectorGuidanceCallback(predictor=1.0, corrector=4.0)
    first = 4.0 if calls[0] == "C" else callback.guidance_scale
    result = sampled(pipeline, x, guidance_scale=first, callback_on_step_end=callback)
    scales = [4.0 if call == "C" else 1.0 for call in calls]
    assert [w for _, w in made] == pytest.approx(scales, rel=1e-15)
    assert {size for size, _ in made} == {4}  # never without the unconditional half
    expected = by_hand(pipeline.scheduler, scales, x, seeded(1))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_a_scale_of_one_is_the_conditional_prediction_though_the_batch_is_doubled(theirs):
    pipeline, made = theirs
    pipeline.scheduler = latent_scheduler_of(pipeline)
    x = torch.randn(2, 4, SIDE, SIDE, generator=seeded())
    conditional = sampled(pipeline, x, guidance_scale=1.0)
    assert {size for size, _ in made} == {2}
    callback = CorrectorGuidanceCallback(1.0, 1.0)
    assert callback.guidance_scale > 1 and callback.guidance_scale == pytest.approx(1, rel=1e-15)
    made.clear()
    both = sampled(pipeline, x, guidance_scale=callback.guidance_scale, callback_on_step_end=callback)
    assert {size for size, _ in made} == {4}
    torch.testing.assert_close(both, conditional, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("predictor", "corrector"), [(0.9, 3.0), (3.0, 0.9), (0.0, 0.0)])
def test_a_pipeline_of_diffusers_refuses_a_scale_below_one(theirs, predictor, corrector):
    pipeline, made = theirs
    pipeline.scheduler = latent_scheduler_of(pipeline)
    callback = CorrectorGuidanceCallback(predictor, corrector)
    x = torch.zeros(2, 4, SIDE, SIDE)
    with pytest.raises(ValueError, match=f"has no guidance below 1, got scales of {predictor} .* and {corrector}"):
        sampled(pipeline, x, guidance_scale=callback.guidance_scale, callback_on_step_end=callback)
    assert len(made) == 1


# ---- refused --------------------------------------------------------------------------------------------------------


def test_a_schedule_without_corrections_is_refused(theirs):
    pipeline, _ = theirs
    pipeline.scheduler = latent_scheduler_of(pipeline, corrector_steps=0)
    callback = CorrectorGuidanceCallback(2.0, 3.0)
    x = torch.zeros(2, 4, SIDE, SIDE)
    with pytest.raises(ValueError, match="no correction to guide: corrector_steps=0"):
        sampled(pipeline, x, guidance_scale=callback.guidance_scale, callback_on_step_end=callback)


def test_a_first_call_with_another_scale_is_refused(theirs):
    callback, x = CorrectorGuidanceCallback(1.0, 3.0), torch.zeros(2, 4, SIDE, SIDE)
    pipeline, _ = theirs
    pipeline.scheduler = latent_scheduler_of(pipeline)
    for scale in (7.5, 1.0):  # the second would leave the unconditional half out
        with pytest.raises(ValueError, match=f"first network call was guided by {scale}.*callback.guidance_scale"):
            sampled(pipeline, x, guidance_scale=scale, callback_on_step_end=callback)
    ours, x = pipeline_of(scheduler_of()), torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="first network call was guided by 7.5, not by one of"):
        guided_sample(ours, callback, x, 7.5)
    assert guided_sample(ours, callback, x, 1.0).isfinite().all()  # which leaves nothing out here


@pytest.mark.parametrize(
    "scheduler", [DDPMAncestralScheduler(clip_sample=False), DDIMScheduler()], ids=["ancestral", "ddim"]
)
def test_a_scheduler_without_corrections_is_refused_by_name(scheduler):
    x = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"needs a PredictorCorrectorScheduler, got {type(scheduler).__name__}"):
        guided_sample(pipeline_of(scheduler), CorrectorGuidanceCallback(2.0, 3.0), x)


def test_the_scale_for_the_pipeline_is_that_of_predictions():
    assert CorrectorGuidanceCallback(2.5, 4.0).guidance_scale == 2.5
    assert CorrectorGuidanceCallback(0.5, 4.0).guidance_scale == 0.5
    assert CorrectorGuidanceCallback(1.0, 4.0).guidance_scale == math.nextafter(1, 2)


def test_the_example_of_the_docstring_runs():
    [example] = doctest.DocTestFinder().find(CorrectorGuidanceCallback, "CorrectorGuidanceCallback", module=False)[:1]
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
