r"""Classifier guidance with exact laws: w = 1 is the law of the class, and w > 1 is what the formula says.

The data is a mixture of three classes, each itself a mixture. Everything about it is known: the prediction for all
data, that for each class, and p(y | x_t). By Bayes' rule grad log p(y | x_t) = s(x | y) - s(x), so guidance of the
first by the third with weight w must be the classifier-free guidance of the first two with the same weight.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    ModelMixin,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from saved_pipelines import guided_pipeline
from torch import nn

from annealers import DDPMAncestralScheduler, GuidedDiffusionPipeline, NoisyClassifierModel, exact
from annealers.hub import export
from annealers.pipelines import AnnealersPipeline
from annealers.pipelines.classifier_guidance import classifier_guidance, coefficients_at, log_likelihood_gradient

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
NO_CLIP = {"clip_sample": False}
LEADING = {"timestep_spacing": "leading"}  # whole timesteps, which an exact law needs

SCHEDULERS = {
    **{
        f"ours {kind}": (DDPMAncestralScheduler, {"prediction_type": kind, **NO_CLIP})
        for kind in ("epsilon", "sample", "v_prediction", "score", "flow_prediction")
    },
    "ours cosine": (
        DDPMAncestralScheduler,
        {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", **NO_CLIP},
    ),
    **{
        f"ddim {kind}": (DDIMScheduler, {"prediction_type": kind, **NO_CLIP})
        for kind in ("epsilon", "sample", "v_prediction")
    },
    **{
        f"euler {kind}": (EulerDiscreteScheduler, {"prediction_type": kind, **LEADING})
        for kind in ("epsilon", "v_prediction")
    },
    "heun": (HeunDiscreteScheduler, LEADING),
    "flow": (FlowMatchEulerDiscreteScheduler, {}),
}


def scheduler_of(name):
    scheduler_class, config = SCHEDULERS[name]
    return scheduler_class(**config)


def class_law(number):
    """Weights, means and covariances of two bumps on images of 2 x 2."""
    generator = torch.Generator().manual_seed(number)
    means = torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64) * 0.7
    roots = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64) * 0.2
    return [0.4, 0.6], means, roots @ roots.mT + 0.02 * torch.eye(4, dtype=torch.float64)


PARTS = [class_law(number) for number in range(3)]
CLASSES = [exact.GaussianMixture(*part) for part in PARTS]
ALL_DATA = exact.GaussianMixture(
    torch.cat(
        [w * torch.tensor(weights, dtype=torch.float64) for w, (weights, _, _) in zip(WEIGHTS, PARTS, strict=True)]
    ),
    torch.cat([means for _, means, _ in PARTS]),
    torch.cat([covariances for _, _, covariances in PARTS]),
)


class LawNetwork(ModelMixin, ConfigMixin):
    """Exact predictions in the place of a UNet; with several laws the label says which. `asked` records the labels."""

    @register_to_config
    def __init__(self, sample_size=2, in_channels=1, num_class_embeds=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.asked = []

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.asked.append(None if class_labels is None else class_labels.tolist())
        labels = () if class_labels is None else (class_labels,)
        return self.model(sample, timestep, *labels, return_dict=False)


class RecordedClassifier(nn.Module):
    """A classifier that keeps what it was asked."""

    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, classifier):
        super().__init__()
        self.classifier, self.config, self.seen = classifier, classifier.config, []

    def forward(self, sample, timestep, return_dict=True):
        self.seen.append((sample.detach().clone(), float(timestep)))
        return self.classifier(sample, timestep, return_dict=return_dict)


def network_of(laws, scheduler):
    """One law is that of an unconditional network."""
    network = LawNetwork(num_class_embeds=len(laws) if len(laws) > 1 else None)
    model = exact.ConditionalExactModel(laws, scheduler) if len(laws) > 1 else exact.ExactModel(laws[0], scheduler)
    network.model = model
    return network


def pipeline_of(laws, scheduler, classifier=True):
    """All data and the exact classifier; with a list of classes before all data, a conditional network."""
    network = network_of(laws, scheduler)
    exact_classifier = RecordedClassifier(exact.ExactClassifier(CLASSES, WEIGHTS, scheduler)) if classifier else None
    null_label = len(laws) - 1 if len(laws) > 1 else None
    pipeline = GuidedDiffusionPipeline(network, scheduler, null_label=null_label, classifier=exact_classifier)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seed(number=0):
    return torch.Generator().manual_seed(number)


def states(pipeline, **arguments):
    """The final states, and those on the way."""
    output = pipeline(output_type="latent", return_trajectory=True, **arguments)
    return output.trajectory.samples


# ---- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_with_weight_one_every_prediction_is_that_of_the_law_of_the_class(name):
    scheduler = scheduler_of(name)
    T = scheduler.config.num_train_timesteps
    labels = torch.tensor([0, 1, 2, 1, 0])
    conditional = exact.ConditionalExactModel(CLASSES, scheduler)
    for t in (1, 10, 100, 500, 900, T - 1):
        t = torch.tensor(t)
        x = exact.Gaussian(torch.zeros(1, 2, 2, dtype=torch.float64), variance=1.5).sample(5, generator=seed(int(t)))
        guided = exact.ExactModel(ALL_DATA, scheduler)(x, t).sample + classifier_guidance(
            exact.ExactClassifier(CLASSES, WEIGHTS, scheduler), scheduler, x, t, labels
        )
        torch.testing.assert_close(guided, conditional(x, t, labels).sample, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if "flow" not in name])
@pytest.mark.parametrize("w", [1.0, 3.0, -1.0])
def test_a_run_guided_by_the_exact_classifier_is_the_run_of_classifier_free_guidance(name, w):
    arguments = {"class_labels": [0, 1, 2], "num_inference_steps": 10}
    led = states(pipeline_of([ALL_DATA], scheduler_of(name)), classifier_scale=w, generator=seed(), **arguments)
    free = pipeline_of([*CLASSES, ALL_DATA], scheduler_of(name), classifier=False)
    torch.testing.assert_close(
        led, states(free, guidance_scale=w, generator=seed(), **arguments), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", ["ours epsilon", "euler v_prediction"])
def test_the_two_kinds_of_guidance_add_up(name):
    arguments = {"class_labels": [0, 1, 2], "num_inference_steps": 10}
    laws = [*CLASSES, ALL_DATA]
    both = states(
        pipeline_of(laws, scheduler_of(name)), guidance_scale=1.5, classifier_scale=0.75, generator=seed(), **arguments
    )
    free = states(pipeline_of(laws, scheduler_of(name)), guidance_scale=2.25, generator=seed(), **arguments)
    torch.testing.assert_close(both, free, rtol=1e-9, atol=1e-9)


def test_samples_of_an_unconditional_network_have_the_law_of_the_class():
    # 16 images of 16 x 16 independent pixels: standard errors .0047 and .0033; all data would have deviation .58
    pixels, scheduler = torch.ones(1, 16, 16, dtype=torch.float64), DDPMAncestralScheduler(**NO_CLIP)
    laws = [exact.Gaussian(m * pixels, variance=0.09) for m in (0.5, -0.5)]
    both = exact.GaussianMixture([0.5, 0.5], torch.stack([0.5 * pixels, -0.5 * pixels]), [0.09, 0.09])
    network = network_of([both], scheduler)
    classifier = exact.ExactClassifier(laws, None, scheduler)
    pipeline = GuidedDiffusionPipeline(network, scheduler, classifier=classifier)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(16, 1, 16, 16, generator=seed(), dtype=torch.float64)
    arguments = {"class_labels": 1, "latents": noise, "num_inference_steps": 250, "output_type": "latent"}
    drawn = pipeline(classifier_scale=1.0, generator=seed(1), **arguments).images
    assert drawn.mean().item() == pytest.approx(-0.5, abs=0.02)
    assert drawn.std().item() == pytest.approx(0.3, abs=0.02)


def test_the_gradient_of_two_normal_classes_is_that_of_a_logistic_function():
    """log p(y | x) = -log(1 + exp(-y k x)) with k = 2 alpha m / (alpha^2 s^2 + sigma^2), y = 1 or -1."""
    m, s, scheduler = 0.8, 0.3, DDIMScheduler()
    laws = [exact.Gaussian(torch.full((1, 1, 1), mean, dtype=torch.float64), variance=s**2) for mean in (m, -m)]
    classifier = exact.ExactClassifier(laws, [3.0, 3.0], scheduler)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    alpha_bar = scheduler.alphas_cumprod[300].double()
    k = 2 * alpha_bar.sqrt() * m / (alpha_bar * s**2 + 1 - alpha_bar)
    for label, y in ((0, 1.0), (1, -1.0)):
        gradient = log_likelihood_gradient(classifier, x, torch.tensor(300), torch.full((9,), label))
        torch.testing.assert_close(gradient, y * k * torch.sigmoid(-y * k * x), rtol=1e-10, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences_for_a_network_too():
    torch.manual_seed(0)
    classifier = small_classifier().double()
    x, t, labels = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor(400), torch.tensor([2, 0])
    direction, h = torch.randn_like(x), 1e-5
    with torch.no_grad():
        values = [classifier(x + sign * h * direction, t).logits.log_softmax(1)[[0, 1], labels] for sign in (1, -1)]
    slope = (log_likelihood_gradient(classifier, x, t, labels) * direction).sum((1, 2, 3))
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * h), rtol=1e-6, atol=1e-8)
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_what_the_classifier_adds_can_be_differentiated_again():
    """The Jacobian of the guided noise is that of the noise of the class, of which a posterior covariance is made."""
    pipeline = pipeline_of([ALL_DATA], DDIMScheduler())
    pipeline._guidance_scale, pipeline._classifier_scale = 1.0, 1.0
    t, label = torch.tensor(300), torch.tensor([1])
    alpha, sigma = coefficients_at(pipeline.scheduler, t)
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64, generator=seed())
    led, asked = (
        torch.autograd.functional.jacobian(function, x)
        for function in (
            lambda x: pipeline.guided_prediction(x, t, label, None),
            lambda x: CLASSES[1].noise(x, alpha, sigma),
        )
    )
    torch.testing.assert_close(led, asked, rtol=1e-8, atol=1e-10)


def test_the_gradient_of_a_network_with_attention_can_be_differentiated_again():
    torch.manual_seed(0)
    classifier = small_classifier().double()
    x, t, labels = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor(400), torch.tensor([2, 0])
    direction, h = torch.randn_like(x), 1e-5
    ahead, behind = (log_likelihood_gradient(classifier, x + sign * h * direction, t, labels) for sign in (1, -1))
    x.requires_grad_()
    slope = (log_likelihood_gradient(classifier, x, t, labels) * direction).sum()
    (product,) = torch.autograd.grad(slope, x)  # of the Hessian, which is symmetric, and the direction
    torch.testing.assert_close(product, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-8)


# ---- where there is no signal, and between the rows of a table ------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        DDPMAncestralScheduler(prediction_type="flow_prediction", **NO_CLIP),
        DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, **NO_CLIP),
    ],
    ids=["flow of diffusers", "flow of a solver", "our flow", "zero terminal snr"],
)
def test_without_signal_guidance_is_its_limit(scheduler):
    """At alpha = 0 the best x_0 given the class is its mean, whatever x_t; the flow is x_t minus that."""
    flow = "rescale_betas_zero_snr" not in scheduler.config or not scheduler.config.rescale_betas_zero_snr
    t = torch.tensor(1000.0 if flow else 999)
    assert coefficients_at(scheduler, t)[0] == 0
    classifier = exact.ExactClassifier(CLASSES, WEIGHTS, scheduler)
    x, labels = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=seed()), torch.tensor([0, 1, 2])
    guidance = classifier_guidance(classifier, scheduler, x, t, labels)
    all_mean = sum(w * law.denoise(x[:1], 0.0, 1.0)[0] for w, law in zip(WEIGHTS, CLASSES, strict=True))
    of_class = torch.stack([law.denoise(x[:1], 0.0, 1.0)[0] for law in CLASSES])
    torch.testing.assert_close(guidance, -(of_class - all_mean), rtol=0, atol=0.01)


@pytest.mark.parametrize("name", ["flow", "ours flow_prediction"])
def test_a_guided_run_of_a_flow_is_that_of_the_law_of_the_class(name):
    """But for the first step, whose limit is read at another timestep: it is 1 / 1000 off."""
    arguments = {"class_labels": [0, 1, 2], "num_inference_steps": 10, "generator": seed()}
    led = states(pipeline_of([ALL_DATA], scheduler_of(name)), classifier_scale=1.0, **arguments)
    arguments["generator"] = seed()
    asked = states(pipeline_of([*CLASSES, ALL_DATA], scheduler_of(name), classifier=False), **arguments)
    torch.testing.assert_close(led, asked, rtol=0, atol=0.01)


@pytest.mark.parametrize("scheduler_class", [EulerDiscreteScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler])
@pytest.mark.parametrize("config", [{}, {"use_karras_sigmas": True}], ids=["linspace", "karras"])
def test_between_timesteps_the_path_is_that_of_the_sampler(scheduler_class, config):
    scheduler = scheduler_class(beta_schedule="scaled_linear", **config)
    scheduler.set_timesteps(17)
    assert (scheduler.timesteps != scheduler.timesteps.round()).any()
    for t in scheduler.timesteps:
        alpha, sigma = coefficients_at(scheduler, t)
        seen = scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), t)
        assert alpha.item() == pytest.approx(seen.item(), rel=5e-3)
        assert (alpha**2 + sigma**2).item() == pytest.approx(1, rel=1e-3)
        scheduler.step(torch.zeros(1, dtype=torch.float64), t, torch.zeros(1, dtype=torch.float64))


def test_a_sampler_that_keeps_the_unscaled_state_shows_the_classifier_the_scaled_one():
    scheduler = EulerDiscreteScheduler(**LEADING)
    pipeline = pipeline_of([ALL_DATA], scheduler)
    run = states(pipeline, class_labels=[0, 1], classifier_scale=2.0, num_inference_steps=4, generator=seed())
    for state, s, (seen, _) in zip(run, scheduler.sigmas, pipeline.classifier.seen, strict=False):
        torch.testing.assert_close(seen, state / (s.double() ** 2 + 1).sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EDMEulerScheduler(), "EDMEulerScheduler does not say which alpha and sigma"),
        (DDIMScheduler(prediction_type="raw"), "knows predictions of score, epsilon.*got 'raw'"),
    ],
)
def test_a_path_or_prediction_that_is_not_known_is_refused_by_name(scheduler, message):
    classifier = exact.ExactClassifier(CLASSES, WEIGHTS, DDIMScheduler())
    with pytest.raises(ValueError, match=message):
        classifier_guidance(classifier, scheduler, torch.zeros(1, 1, 2, 2), torch.tensor(5), torch.tensor([0]))


# ---- what is called, and with what ----------------------------------------------------------------------------------


def test_weight_zero_never_asks_the_classifier_and_changes_no_bit():
    arguments = {"class_labels": [0, 1], "guidance_scale": 2.0, "num_inference_steps": 5}
    laws = [*CLASSES, ALL_DATA]
    pipeline = pipeline_of(laws, scheduler_of("ours v_prediction"))
    with_classifier = states(pipeline, classifier_scale=0.0, generator=seed(), **arguments)
    without = states(
        pipeline_of(laws, scheduler_of("ours v_prediction"), classifier=False), generator=seed(), **arguments
    )
    assert pipeline.classifier.seen == [] and torch.equal(with_classifier, without)


def test_the_classifier_is_asked_once_a_step_at_the_timestep_of_the_network():
    pipeline = pipeline_of([ALL_DATA], scheduler_of("heun"))
    pipeline(class_labels=0, classifier_scale=1.0, num_inference_steps=3, output_type="latent")
    assert [t for _, t in pipeline.classifier.seen] == pipeline.scheduler.timesteps.tolist()


def test_an_unconditional_network_is_asked_for_no_class():
    pipeline = pipeline_of([ALL_DATA], scheduler_of("ours epsilon"))
    for w in (0.0, 1.0):
        pipeline(class_labels=[0, 2], classifier_scale=1.0, guidance_scale=w, num_inference_steps=2)
    assert pipeline.unet.asked == [None] * 4


def test_a_conditional_network_can_be_asked_for_all_data_and_led_by_the_classifier_alone():
    arguments = {"class_labels": [0, 2], "classifier_scale": 1.0, "num_inference_steps": 5}
    pipeline = pipeline_of([*CLASSES, ALL_DATA], scheduler_of("ours epsilon"))
    led = states(pipeline, guidance_scale=0.0, generator=seed(), **arguments)
    assert pipeline.unet.asked == [[3, 3]] * 5
    alone = states(pipeline_of([ALL_DATA], scheduler_of("ours epsilon")), generator=seed(), **arguments)
    torch.testing.assert_close(led, alone, rtol=0, atol=1e-12)


def test_no_image_depends_on_its_neighbours():
    pipeline = pipeline_of([ALL_DATA], scheduler_of("ours epsilon"))
    arguments = {"classifier_scale": 2.0, "num_inference_steps": 5}
    both = states(pipeline, class_labels=[0, 2], generator=[seed(1), seed(2)], **arguments)
    alone = states(pipeline, class_labels=[2], generator=[seed(2)], **arguments)
    torch.testing.assert_close(both[:, 1:], alone, rtol=0, atol=1e-12)


class Recorder(DDPMScheduler):
    """Keeps what `step` is given."""

    def step(self, model_output, *args, **kwargs):
        self.seen = model_output.clone()
        return super().step(model_output, *args, **kwargs)


@pytest.mark.parametrize(("variance_type", "channels"), [("learned_range", 2), ("fixed_small", 1)])
def test_a_learned_variance_is_left_as_it_is(variance_type, channels):
    scheduler = Recorder(variance_type=variance_type, **NO_CLIP)
    pipeline = pipeline_of([ALL_DATA], scheduler)
    predict = pipeline.unet.model.forward
    pipeline.unet.model.forward = lambda x, t, **_: (torch.cat([predict(x, t).sample, torch.full_like(x, 0.3)], 1),)
    noise = torch.randn(1, 1, 2, 2, dtype=torch.float64, generator=seed())
    pipeline(class_labels=1, classifier_scale=3.0, timesteps=[500], latents=noise, output_type="latent")
    assert scheduler.seen.shape[1] == channels
    law, (alpha, sigma) = CLASSES[1], coefficients_at(scheduler, torch.tensor(500))
    eps = ALL_DATA.noise(noise, alpha, sigma)
    torch.testing.assert_close(scheduler.seen[:, :1], eps + 3 * (law.noise(noise, alpha, sigma) - eps))
    assert torch.equal(scheduler.seen[:, 1:], torch.full_like(scheduler.seen[:, 1:], 0.3))


def test_a_callback_may_change_the_labels_and_the_weight_for_the_steps_to_come():
    def callback(pipeline, i, t, tensors):
        scales.append(pipeline.classifier_scale)
        pipeline._classifier_scale = 0.0
        return tensors

    scales, pipeline = [], pipeline_of([ALL_DATA], scheduler_of("ours epsilon"))
    pipeline(class_labels=0, classifier_scale=2.0, num_inference_steps=3, callback_on_step_end=callback)
    assert len(pipeline.classifier.seen) == 1 and scales == [2.0, 0.0, 0.0]


def test_sampling_in_inference_mode_is_guided_as_well():
    arguments = {"class_labels": [0, 2], "classifier_scale": 2.0, "num_inference_steps": 3}
    expected = states(pipeline_of([ALL_DATA], scheduler_of("ours epsilon")), generator=seed(), **arguments)
    pipeline = small_pipeline()
    with torch.inference_mode():
        led = states(pipeline_of([ALL_DATA], scheduler_of("ours epsilon")), generator=seed(), **arguments)
        pipeline(**arguments)
    assert torch.equal(led, expected)


# ---- networks in single and half precision --------------------------------------------------------------------------


def small_classifier(**options):
    torch.manual_seed(1)
    shape = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8}
    return NoisyClassifierModel(8, 1, **{"num_classes": 3, **shape, **options}).eval()


def small_pipeline(**options):
    """The small class-conditional pipeline that the tests save and load, with a classifier of its three classes."""
    pipeline = guided_pipeline()
    pipeline.classifier = small_classifier(**options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_classifier_leads_a_run_in_float32(dtype):
    arguments = {"class_labels": ["dog", "emu"], "classifier_scale": 3.0, "num_inference_steps": 3}
    pipeline = small_pipeline()
    full, unguided = (states(pipeline, generator=seed(), **arguments | {"classifier_scale": w}) for w in (3.0, 0.0))
    pipeline.classifier.to(dtype)
    half = states(pipeline, generator=seed(), **arguments)
    assert half.dtype == torch.float32
    difference = (full - unguided).abs().max()
    assert (half - full).abs().max() < 0.05 * difference


def test_the_guidance_of_a_half_precision_state_is_computed_in_float32():
    classifier, scheduler = exact.ExactClassifier(CLASSES, WEIGHTS, DDIMScheduler()), DDIMScheduler()
    x, t, labels = torch.randn(3, 1, 2, 2, generator=seed()).half(), torch.tensor(20), torch.tensor([0, 1, 2])
    half = classifier_guidance(classifier, scheduler, x, t, labels)
    full = classifier_guidance(classifier, scheduler, x.double(), t, labels)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half, full.half(), rtol=1e-3, atol=0)


# ---- labels and errors ----------------------------------------------------------------------------------------------


def test_names_are_those_of_the_pipeline_or_else_of_the_classifier():
    pipeline = pipeline_of([ALL_DATA], scheduler_of("ours epsilon"))
    with pytest.raises(ValueError, match="'dog' is not one of"):
        pipeline.label_ids("dog")
    pipeline.classifier.config = {"num_classes": 3, "id2label": {"0": "cat", "1": "dog"}}
    pipeline.classifier.config = type(exact.ExactClassifier(CLASSES, None, DDIMScheduler()).config)(
        pipeline.classifier.config
    )
    assert pipeline.label_ids(["dog", 2]) == [1, 2]
    pipeline.id2label = {0: "eins"}
    assert pipeline.label_ids("eins") == [0]
    with pytest.raises(ValueError, match=r"name classes differently, as \(ours, its\): {0: \('eins', 'cat'\)}"):
        pipeline(class_labels="eins", classifier_scale=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classifier_scale": 1.0}, "classifier_scale=1.0 needs class_labels"),
        ({"class_labels": 3, "classifier_scale": 1.0}, "3 is not one of the 3 classes of the classifier"),
        ({"class_labels": 0}, "class_labels=0 mean nothing here: the network has no classes"),
        (
            {"class_labels": 0, "classifier_scale": 1.0, "guidance_scale": 2.0},
            "guidance_scale=2.0 needs a network with classes",
        ),
    ],
)
def test_what_an_unconditional_network_with_a_classifier_cannot_do_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline_of([ALL_DATA], scheduler_of("ours epsilon"))(**arguments)


def test_a_scale_without_a_classifier_is_refused():
    pipeline = pipeline_of([*CLASSES, ALL_DATA], scheduler_of("ours epsilon"), classifier=False)
    with pytest.raises(ValueError, match="classifier_scale=2.0 needs a classifier, and this pipeline has none"):
        pipeline(class_labels=0, classifier_scale=2.0)


def test_a_class_that_only_the_network_knows_is_refused_when_the_classifier_is_asked():
    pipeline = small_pipeline(num_classes=2)
    pipeline(class_labels=2, num_inference_steps=1)
    with pytest.raises(ValueError, match="label 2 is not one of the 2 classes of the classifier"):
        pipeline(class_labels=["dog", "emu"], classifier_scale=1.0)


def test_names_must_be_classes_of_the_classifier_where_the_network_has_none():
    network, scheduler = network_of([ALL_DATA], DDIMScheduler()), DDIMScheduler()
    classifier = small_classifier()
    pipeline = GuidedDiffusionPipeline(network, scheduler, {"0": "cat", "2": "emu"}, classifier=classifier)
    assert pipeline.label_ids(["emu", "cat", 1]) == [2, 0, 1]
    with pytest.raises(ValueError, match=r"id2label names \[3\], but classifier.config.num_classes=3"):
        GuidedDiffusionPipeline(network, scheduler, {3: "fox"}, classifier=classifier)


# ---- folders --------------------------------------------------------------------------------------------------------

ARGUMENTS = {"class_labels": ["emu", "cat"], "classifier_scale": 2.0, "num_inference_steps": 3, "output_type": "pt"}


def test_a_pipeline_can_be_loaded_without_the_classifier_it_was_saved_with(tmp_path):
    scheduler = DDPMAncestralScheduler()
    unet = guided_pipeline().unet
    unconditional = type(unet)(**{**unet.config, "num_class_embeds": None}).eval()
    names = {0: "cat", 1: "dog", 2: "emu"}
    GuidedDiffusionPipeline(unconditional, scheduler, names, classifier=small_classifier()).save_pretrained(tmp_path)
    pipeline = GuidedDiffusionPipeline.from_pretrained(tmp_path, classifier=None)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.classifier is None and len(pipeline(batch_size=2, num_inference_steps=1).images) == 2
    with pytest.raises(ValueError, match="needs a classifier, and this pipeline has none"):
        pipeline(class_labels="dog", classifier_scale=1.0)
    pipeline.classifier = small_classifier()
    assert pipeline.label_ids("dog") == [1]


@pytest.mark.parametrize("loader", [GuidedDiffusionPipeline, AnnealersPipeline])
def test_a_saved_pipeline_comes_back_with_its_classifier(tmp_path, loader):
    pipeline = small_pipeline(id2label={0: "cat", 1: "dog", 2: "emu"})
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["classifier"] == ["annealers", "NoisyClassifierModel"]
    loaded = loader.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.classifier) is NoisyClassifierModel
    assert torch.equal(loaded(generator=seed(), **ARGUMENTS).images, pipeline(generator=seed(), **ARGUMENTS).images)


def test_a_pipeline_without_classifier_says_so_and_loads_whether_or_not_it_does(tmp_path):
    guided_pipeline().save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    index = json.loads(file.read_text())
    assert index.pop("classifier") == [None, None]
    assert GuidedDiffusionPipeline.from_pretrained(tmp_path).classifier is None
    file.write_text(json.dumps(index))  # as it was saved before there were classifiers
    assert GuidedDiffusionPipeline.from_pretrained(tmp_path).classifier is None
    classifier = small_classifier()
    assert GuidedDiffusionPipeline.from_pretrained(tmp_path, classifier=classifier).classifier is classifier


def test_a_pipeline_exported_with_its_classifier_draws_the_same_where_annealers_is_not_installed(tmp_path):
    pipeline = small_pipeline()
    export(pipeline, tmp_path / "exported")
    index = json.loads((tmp_path / "exported" / "model_index.json").read_text())
    stem, class_name = index["classifier"]
    assert class_name == "NoisyClassifierModel" and (tmp_path / "exported" / "classifier" / f"{stem}.py").is_file()
    script = (
        "import load_without_annealers, sys, torch\n"
        "pipeline = load_without_annealers.DiffusionPipeline.from_pretrained('exported', trust_remote_code=True)\n"
        f"images = pipeline(generator=torch.Generator().manual_seed(0), **{ARGUMENTS}).images\n"
        "torch.save(images, 'images.pt')\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'annealers']\n"
    )
    support = Path(__file__).parent / "support"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(support)
    child = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert torch.equal(torch.load(tmp_path / "images.pt"), pipeline(generator=seed(), **ARGUMENTS).images)


# ---- the exact classifier -------------------------------------------------------------------------------------------


def test_the_exact_classifier_knows_how_probable_each_class_is():
    scheduler = DDIMScheduler()
    classifier = exact.ExactClassifier(CLASSES, 10 * WEIGHTS, scheduler)
    x, t = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=seed()), torch.tensor([0, 200, 400, 999])
    probabilities = classifier(x, t).logits.softmax(1)
    alpha_bar = scheduler.alphas_cumprod[t].double()
    for i in range(4):
        alpha, sigma = alpha_bar[i].sqrt(), (1 - alpha_bar[i]).sqrt()
        joint = []
        for w, (weights, means, covariances) in zip(WEIGHTS, PARTS, strict=True):
            bumps = torch.distributions.MultivariateNormal(
                alpha * means.flatten(1), alpha**2 * covariances + sigma**2 * torch.eye(4, dtype=torch.float64)
            )
            joint.append(w * (torch.tensor(weights, dtype=torch.float64) * bumps.log_prob(x[i].flatten()).exp()).sum())
        joint = torch.stack(joint)
        torch.testing.assert_close(probabilities[i], joint / joint.sum(), rtol=1e-9, atol=1e-14)


def test_the_exact_classifier_of_alike_classes_knows_nothing_but_how_frequent_they_are():
    classifier = exact.ExactClassifier([CLASSES[0]] * 3, WEIGHTS, DDIMScheduler())
    x = torch.randn(4, 1, 2, 2, generator=seed())
    logits = classifier(x, 10, return_dict=False)[0]
    assert logits.dtype == torch.float32 and logits.shape == (4, 3)
    torch.testing.assert_close(logits.softmax(1), WEIGHTS.float().expand(4, 3), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("laws", "weights", "message"),
    [
        (CLASSES[:1], None, "two laws or more.*got 1"),
        ([CLASSES[0], exact.Gaussian(0.0, variance=1.0)], None, "one event shape, got 2"),
        (CLASSES, [0.5, 0.5], r"weights must have shape \(3,\)"),
    ],
)
def test_an_exact_classifier_that_makes_no_sense_is_refused(laws, weights, message):
    with pytest.raises(ValueError, match=message):
        exact.ExactClassifier(laws, weights, DDIMScheduler())
