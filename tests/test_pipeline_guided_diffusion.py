r"""Properties of GuidedDiffusionPipeline, with networks that know the answer.

`GaussianNetwork` predicts the noise of Gaussian data, one law N(m_k, s_k^2) per class. On the path
x_t = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1 its answer is

    E[eps | x_t] = sigma (x_t - alpha m) / (alpha^2 s^2 + sigma^2)

so the images must have the mean m and the standard deviation s. If all laws share s, guidance with weight w between
the classes u and c is exactly the network of N(m_u + w (m_c - m_u), s^2).
"""

import copy
import doctest
import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, DDPMScheduler, ModelMixin, UNet2DModel
from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import register_to_config

from annealers import DDPMAncestralScheduler, GuidedDiffusionPipeline
from annealers.pipelines import AnnealersPipeline

NO_CLIP = {"clip_sample": False}


class GaussianNetwork(ModelMixin, ConfigMixin):
    """The exact noise prediction; `labels` records what each call was asked."""

    @register_to_config
    def __init__(self, means=(0.0,), stds=(1.0,), sample_size=8, in_channels=1, num_class_embeds=None, variance=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        # 1000 rows of log(sigma / alpha); between the rows Diffusers' interpolating samplers are linear in it
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        self.log_ratio = ((1 - alpha_bar) / alpha_bar).log() / 2
        self.labels = []

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.labels.append(None if class_labels is None else class_labels.tolist())
        assert class_labels is None or len(class_labels) == len(sample)
        row = torch.as_tensor(timestep).double()
        below = row.floor().long().clamp(max=998)
        ratio = torch.lerp(self.log_ratio[below], self.log_ratio[below + 1], row - below).exp()
        alpha, sigma = 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()

        k = torch.zeros(len(sample), dtype=torch.long) if class_labels is None else class_labels
        m, s = (torch.tensor(law, dtype=torch.float64)[k].view(-1, 1, 1, 1) for law in self.law)
        eps = sigma * (sample - alpha * m) / (alpha**2 * s**2 + sigma**2)
        if self.config.variance is not None:  # the second half tells which class was asked
            variance = torch.tensor(self.config.variance, dtype=torch.float64)[k].view(-1, 1, 1, 1)
            eps = torch.cat([eps, variance.expand_as(eps)], dim=1)
        return (eps.to(self.weight.dtype),)

    @property
    def law(self):
        return self.config.means, self.config.stds


def pipeline_of(means, stds=None, scheduler=None, null=True, **network):
    """A pipeline around the exact network: one law is unconditional, of several the last is the null class."""
    classes = len(means) if len(means) > 1 else None
    network = GaussianNetwork(tuple(means), tuple(stds or [0.4] * len(means)), num_class_embeds=classes, **network)
    scheduler = scheduler or DDIMScheduler(**NO_CLIP)
    pipeline = GuidedDiffusionPipeline(network, scheduler, null_label=classes - 1 if classes and null else None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seed(number=0):
    return torch.Generator().manual_seed(number)


def states(pipeline, **arguments):
    """The final states in [-1, 1], before they become images."""
    return pipeline(output_type="latent", **arguments).images


@pytest.fixture(scope="module")
def small_unet():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    size = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "add_attention": False}
    return UNet2DModel(8, 1, 1, num_class_embeds=4, **size, **blocks).eval()


@pytest.fixture
def small_pipeline(small_unet):
    pipeline = GuidedDiffusionPipeline(small_unet, DDIMScheduler(), {0: "cat", 1: "dog", 2: "emu"}, null_label=3)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- guidance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [-1.0, 0.0, 0.5, 1.0, 3.0])
def test_guidance_extrapolates_the_mean_from_the_null_class_through_the_condition(w):
    m_c, m_u = 0.5, -0.25
    guided = states(pipeline_of([m_c, m_u]), class_labels=[0] * 3, guidance_scale=w, generator=seed())
    alone = states(pipeline_of([m_u + w * (m_c - m_u)]), batch_size=3, generator=seed())
    torch.testing.assert_close(guided, alone, rtol=0, atol=1e-12)


def test_each_image_is_guided_by_its_own_label():
    pipeline = pipeline_of([0.5, -0.5, 0.1])
    both = states(pipeline, class_labels=[1, 0], guidance_scale=2.0, generator=[seed(1), seed(2)])
    for i, label in enumerate([1, 0]):
        alone = states(pipeline, class_labels=label, guidance_scale=2.0, generator=seed(i + 1))
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("w", "asked"), [(1.0, [0, 1]), (0.0, [2, 2]), (2.0, [2, 2, 0, 1]), (-1.0, [2, 2, 0, 1]), (0.5, [2, 2, 0, 1])]
)
def test_one_call_per_step_asks_only_what_the_weight_needs(w, asked):
    pipeline = pipeline_of([0.5, -0.5, 0.1])
    pipeline(class_labels=[0, 1], guidance_scale=w, num_inference_steps=3)
    assert [sorted(labels) for labels in pipeline.unet.labels] == [sorted(asked)] * 3


def test_without_labels_the_null_class_is_drawn():
    pipeline = pipeline_of([0.5, -0.5, 0.1])
    pipeline(batch_size=2, num_inference_steps=1)
    assert pipeline.unet.labels == [[2, 2]]


@pytest.mark.parametrize("w", [0.0, 1.0])
def test_an_unconditional_network_gets_no_labels(w):
    pipeline = pipeline_of([0.5])
    pipeline(batch_size=2, num_inference_steps=2, guidance_scale=w)
    assert pipeline.unet.labels == [None, None]


class Recorder(DDPMScheduler):
    """Keeps what `step` is given."""

    def step(self, model_output, *args, **kwargs):
        self.seen = model_output.clone()
        return super().step(model_output, *args, **kwargs)


@pytest.mark.parametrize(("w", "variance"), [(0.0, -0.7), (1.0, 0.2), (3.0, 0.2)])
def test_the_learned_variance_is_that_of_the_condition_and_is_never_extrapolated(w, variance):
    network = {"variance": (0.2, -0.7)}
    scheduler = Recorder(variance_type="learned_range", **NO_CLIP)
    pipeline = pipeline_of([0.5, -0.25], scheduler=scheduler, **network)
    given = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=seed())
    pipeline(class_labels=[0, 0], guidance_scale=w, timesteps=[999], latents=given)
    prediction, variances = scheduler.seen.chunk(2, dim=1)
    torch.testing.assert_close(variances, torch.full_like(given, variance))
    expected = pipeline_of([-0.25 + w * 0.75]).unet(given, 999)[0]
    torch.testing.assert_close(prediction, expected)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(**NO_CLIP), DDIMScheduler(**NO_CLIP)])
@pytest.mark.parametrize("w", [1.0, 3.0])
def test_a_scheduler_with_its_own_variance_gets_the_prediction_only(scheduler, w):
    arguments = {"class_labels": [0, 0], "guidance_scale": w, "num_inference_steps": 4}
    with_variance = pipeline_of([0.5, -0.25], scheduler=scheduler, variance=(0.2, -0.7))
    without = pipeline_of([0.5, -0.25], scheduler=scheduler)
    torch.testing.assert_close(
        states(with_variance, generator=seed(), **arguments), states(without, generator=seed(), **arguments)
    )


def test_channels_that_a_scheduler_would_broadcast_are_refused():
    needs_variance = pipeline_of([0.5], scheduler=DDPMScheduler(variance_type="learned"))
    with pytest.raises(ValueError, match="1 channels for 1 input channels.*'learned' needs 2"):
        needs_variance(num_inference_steps=1)
    three = pipeline_of([0.5], in_channels=1)
    three.unet.forward = lambda sample, *_, **__: (sample.repeat(1, 3, 1, 1),)
    with pytest.raises(ValueError, match="3 channels for 1 input channels.*needs 1 or 2"):
        three(num_inference_steps=1)


# ---- schedulers -----------------------------------------------------------------------------------------------------

SAMPLERS = {
    "DDPMScheduler": (250, NO_CLIP),
    "DDIMScheduler": (50, NO_CLIP),
    "PNDMScheduler": (50, {}),
    "EulerDiscreteScheduler": (50, {"timestep_spacing": "leading"}),
    "EulerAncestralDiscreteScheduler": (250, {"timestep_spacing": "leading"}),
    "HeunDiscreteScheduler": (50, {"timestep_spacing": "leading"}),
    "KDPM2DiscreteScheduler": (50, {"timestep_spacing": "leading"}),
    "KDPM2AncestralDiscreteScheduler": (50, {"timestep_spacing": "leading"}),
    "DPMSolverMultistepScheduler": (50, {}),
    "DPMSolverSinglestepScheduler": (50, {}),
    "DEISMultistepScheduler": (50, {}),
    "UniPCMultistepScheduler": (50, {}),
    "LMSDiscreteScheduler": (50, {"timestep_spacing": "leading"}),
    "DDPMAncestralScheduler": (250, NO_CLIP),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_any_scheduler_draws_the_law_that_the_network_knows(name):
    # 2 x 64 x 64 values: standard errors 0.0044 of the mean and 0.0031 of the deviation; the rest is step size.
    # Without init_noise_sigma or scale_model_input the sigma-space samplers are off by 0.3 and more.
    steps, config = SAMPLERS[name]
    cls = getattr(diffusers, name, None) or DDPMAncestralScheduler
    scheduler = cls(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", **config)
    pipeline = pipeline_of([0.3], [0.4], scheduler, sample_size=64)
    drawn = states(pipeline, batch_size=2, num_inference_steps=steps, generator=seed())
    assert drawn.mean().item() == pytest.approx(0.3, abs=0.03)
    assert drawn.std().item() == pytest.approx(0.4, abs=0.03)
    assert len(pipeline.unet.labels) == pipeline.num_timesteps == len(scheduler.timesteps)


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "DDPMAncestralScheduler"])
def test_with_a_generator_each_an_image_does_not_depend_on_its_neighbours(name):
    scheduler = (getattr(diffusers, name, None) or DDPMAncestralScheduler)()
    pipeline = pipeline_of([0.3, -0.3, 0.0], scheduler=scheduler)
    arguments = {"num_inference_steps": 5, "guidance_scale": 2.0}
    many = states(pipeline, class_labels=[0, 1, 0], generator=[seed(i) for i in range(3)], **arguments)
    alone = states(pipeline, class_labels=[1], generator=[seed(1)], **arguments)
    torch.testing.assert_close(many[1:2], alone, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("scheduler", "arguments", "levels"),
    [
        ("DDPMScheduler", {"num_inference_steps": 6}, 6),
        ("PNDMScheduler", {"num_inference_steps": 6}, 6),
        ("HeunDiscreteScheduler", {"num_inference_steps": 6}, 6),
        ("KDPM2DiscreteScheduler", {"num_inference_steps": 6}, 6),
        ("DDPMScheduler", {"timesteps": [900, 500, 100]}, 3),
        ("HeunDiscreteScheduler", {"timesteps": [900, 500, 100]}, 3),
    ],
)
def test_the_progress_bar_counts_noise_levels_and_completes(scheduler, arguments, levels):
    class Bar:
        ticks = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            Bar.ticks += 1

    pipeline = pipeline_of([0.3], scheduler=getattr(diffusers, scheduler)())
    totals = []
    pipeline.progress_bar = lambda total: totals.append(total) or Bar()
    pipeline(**arguments)
    assert totals == [levels] == [Bar.ticks]


def test_explicit_timesteps_are_the_ones_used():
    trajectory = pipeline_of([0.3], scheduler=DDPMScheduler())(timesteps=[900, 500, 100], return_trajectory=True)[1]
    assert trajectory.timesteps.tolist() == [900, 500, 100]
    with pytest.raises(ValueError, match="DDIMScheduler.set_timesteps takes no timesteps"):
        pipeline_of([0.3])(timesteps=[900, 500, 100])


def test_eta_reaches_the_schedulers_that_have_it():
    def ends(eta, number):
        return states(pipeline_of([0.3]), eta=eta, generator=seed(number), num_inference_steps=5, latents=noise)

    noise = torch.randn(1, 1, 8, 8, generator=seed(7), dtype=torch.float64)
    assert torch.equal(ends(0.0, 1), ends(0.0, 2))
    assert torch.equal(ends(1.0, 1), ends(1.0, 1)) and not torch.equal(ends(1.0, 1), ends(1.0, 2))


def test_a_given_sample_is_unit_noise_and_is_scaled_like_drawn_noise():
    pipeline = pipeline_of([0.3], scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading"))
    noise = torch.randn(2, 1, 8, 8, generator=seed(), dtype=torch.float64)
    torch.testing.assert_close(states(pipeline, latents=noise), states(pipeline, batch_size=2, generator=seed()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_network_is_sampled_in_float32_from_the_same_noise(small_unet, small_pipeline, dtype):
    arguments = {"class_labels": 0, "guidance_scale": 2.0, "num_inference_steps": 2, "return_trajectory": True}
    full = small_pipeline(generator=seed(), **arguments).trajectory.samples
    small_pipeline.unet = copy.deepcopy(small_unet).to(dtype)
    half = small_pipeline(generator=seed(), **arguments).trajectory.samples
    assert half.dtype == torch.float32 and torch.equal(half[0], full[0])
    torch.testing.assert_close(half, full, rtol=0, atol=0.1)


# ---- output ---------------------------------------------------------------------------------------------------------


def test_the_trajectory_runs_from_the_noise_to_the_image_with_the_prediction_of_each_step():
    pipeline = pipeline_of([0.3])
    noise = torch.randn(2, 1, 8, 8, generator=seed(), dtype=torch.float64)
    images, trajectory = pipeline(latents=noise, num_inference_steps=5, output_type="pt", return_trajectory=True)[:2]
    assert trajectory.samples.shape == (6, 2, 1, 8, 8) and trajectory.predictions.shape == (5, 2, 1, 8, 8)
    torch.testing.assert_close(trajectory.samples[0], noise)
    torch.testing.assert_close((trajectory.samples[-1] / 2 + 0.5).clamp(0, 1), images)
    # x̂_0 of DDIM is the posterior mean, (alpha s^2 x_t + sigma^2 m) / (alpha^2 s^2 + sigma^2)
    alpha_bar = pipeline.scheduler.alphas_cumprod.double()[trajectory.timesteps].view(-1, 1, 1, 1, 1)
    posterior_mean = alpha_bar.sqrt() * 0.16 * trajectory.samples[:-1] + (1 - alpha_bar) * 0.3
    posterior_mean = posterior_mean / (alpha_bar * 0.16 + 1 - alpha_bar)
    torch.testing.assert_close(trajectory.predictions, posterior_mean, rtol=0, atol=1e-4)  # float32 tables


def test_a_scheduler_without_predictions_leaves_them_out():
    scheduler = diffusers.DPMSolverMultistepScheduler()
    trajectory = pipeline_of([0.3], scheduler=scheduler)(num_inference_steps=3, return_trajectory=True).trajectory
    assert trajectory.predictions is None and trajectory.samples.shape == (4, 1, 1, 8, 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_three_output_types_are_one_image_in_zero_to_one(channels):
    pipeline = pipeline_of([0.3], in_channels=channels)
    pil, array, tensor = (
        pipeline(batch_size=2, num_inference_steps=3, generator=seed(), output_type=kind).images
        for kind in ("pil", "np", "pt")
    )
    assert tensor.shape == (2, channels, 8, 8) and tensor.min() >= 0 and tensor.max() <= 1
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert [image.mode for image in pil] == [{1: "L", 3: "RGB"}[channels]] * 2
    np.testing.assert_allclose(np.asarray(pil[1]).reshape(8, 8, channels) / 255, array[1], atol=0.5 / 255 + 1e-6)


def test_tuples_hold_the_same_as_the_output():
    pipeline = pipeline_of([0.3])
    assert len(pipeline(num_inference_steps=1, return_dict=False)) == 1
    images, trajectory = pipeline(num_inference_steps=1, return_dict=False, return_trajectory=True)
    assert len(images) == 1 and trajectory.samples.shape[0] == 2


@pytest.mark.parametrize("size", [8, (4, 6)])
def test_the_size_is_that_of_the_network(size):
    pipeline = pipeline_of([0.3], sample_size=size, in_channels=2)
    assert states(pipeline, num_inference_steps=1).shape[1:] == (2, *np.broadcast_to(size, 2))


# ---- callbacks ------------------------------------------------------------------------------------------------------


def test_a_callback_is_called_after_every_entry_and_its_tensors_are_gone_on_with():
    calls = []

    def callback(pipeline, i, t, tensors):
        calls.append((i, int(t), set(tensors), pipeline.num_timesteps, pipeline.guidance_scale))
        return {"latents": torch.full_like(tensors["latents"], 0.5)}

    pipeline = pipeline_of([0.3], scheduler=diffusers.HeunDiscreteScheduler(timestep_spacing="leading"))
    end = states(pipeline, num_inference_steps=3, callback_on_step_end=callback)
    schedule = pipeline.scheduler.timesteps.tolist()
    assert calls == [(i, int(t), {"latents"}, 5, 1.0) for i, t in enumerate(schedule)]
    assert torch.equal(end, torch.full_like(end, 0.5))


def test_a_callback_may_change_labels_and_guidance_for_the_steps_to_come():
    def callback(pipeline, i, t, tensors):
        pipeline._guidance_scale = 1.0
        return {"class_labels": tensors["class_labels"] * 0}

    pipeline = pipeline_of([0.5, -0.5, 0.1])
    pipeline(
        class_labels=1,
        guidance_scale=2.0,
        num_inference_steps=2,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["class_labels"],
    )
    assert pipeline.unet.labels == [[2, 1], [0]]


def test_an_interrupt_stops_the_network_and_the_next_run_starts_afresh():
    def callback(pipeline, i, t, tensors):
        pipeline._interrupt = i == 1
        return tensors

    pipeline = pipeline_of([0.3])
    stopped = pipeline(num_inference_steps=5, callback_on_step_end=callback, return_trajectory=True).trajectory
    assert len(pipeline.unet.labels) == 2 and len(stopped.samples) == 3 and len(stopped.timesteps) == 2
    pipeline(num_inference_steps=5)
    assert len(pipeline.unet.labels) == 7


def test_a_callback_object_names_its_own_tensors():
    class Doubling(PipelineCallback):
        tensor_inputs = ["latents", "class_labels"]

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            assert set(callback_kwargs) == {"latents", "class_labels"}
            return {"latents": 2 * callback_kwargs["latents"]}

    pipeline = pipeline_of([0.3])
    once = states(pipeline, num_inference_steps=1, generator=seed())
    twice = states(pipeline, num_inference_steps=1, generator=seed(), callback_on_step_end=Doubling())
    torch.testing.assert_close(twice, 2 * once)


# ---- labels, sizes and errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        ("emu", [2]),
        (1, [1]),
        (["dog", 0, "dog"], [1, 0, 1]),
        (torch.tensor([2, 0]), [2, 0]),
        (torch.tensor(2), [2]),
        (np.array([0, 1]), [0, 1]),
        ([np.int64(1), torch.tensor(2)], [1, 2]),
    ],
)
def test_labels_are_given_by_id_or_name(small_pipeline, labels, ids):
    assert small_pipeline.label_ids(labels) == ids
    assert len(small_pipeline(class_labels=labels, num_inference_steps=1).images) == len(ids)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("owl", r"'owl' is not one of \['cat', 'dog', 'emu'\]"),
        (["dog", "Dog"], "'Dog' is not one of"),
        (3, "3 is the null label"),
        (4, "4 is not one of the 3 classes"),
        ([-1], "-1 is not one of the 3 classes"),
        (torch.tensor([0.5]), "an integer or a name, got 0.5"),
    ],
)
def test_a_label_that_is_no_class_is_refused_by_name(small_pipeline, labels, message):
    with pytest.raises(ValueError, match=message):
        small_pipeline(class_labels=labels)


def test_a_name_of_two_classes_is_refused(small_unet):
    pipeline = GuidedDiffusionPipeline(small_unet, DDIMScheduler(), {0: "crane", 1: "crane"})
    with pytest.raises(ValueError, match=r"'crane' stands for the classes \[0, 1\]"):
        pipeline.label_ids("crane")


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({}, 1),
        ({"batch_size": 3}, 3),
        ({"class_labels": 0, "batch_size": 3}, 3),
        ({"class_labels": "dog", "generator": [seed(0), seed(1)]}, 2),
        ({"class_labels": [0, 1], "batch_size": 2, "latents": torch.zeros(2, 1, 8, 8)}, 2),
    ],
)
def test_the_batch_size_follows_from_what_has_a_length(small_pipeline, arguments, size):
    assert len(small_pipeline(num_inference_steps=1, **arguments).images) == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [0, 1], "batch_size": 3}, "{'batch_size': 3, 'class_labels': 2}"),
        ({"generator": [seed()], "latents": torch.zeros(2, 1, 8, 8)}, "{'generator': 1, 'latents': 2}"),
        ({"batch_size": 0}, "{'batch_size': 0}"),
        ({"class_labels": []}, "{'class_labels': 0}"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"\(B, 1, H, W\), got \(2, 3, 8, 8\)"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 needs class_labels"),
        ({"guidance_scale": float("nan")}, "guidance scales must be finite, got nan and 0.0"),
        ({"classifier_scale": float("inf")}, "guidance scales must be finite, got 1.0 and inf"),
        ({"output_type": "jpeg"}, "got 'jpeg'"),
        ({"callback_on_step_end_tensor_inputs": ["latents", "sample"]}, r"got \['sample'\]"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(small_pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        small_pipeline(num_inference_steps=1, **arguments)


@pytest.mark.parametrize("arguments", [{}, {"class_labels": 0, "guidance_scale": 2.0}, {"guidance_scale": 0.0}])
def test_a_network_without_null_class_needs_a_label_and_no_guidance(arguments):
    pipeline = pipeline_of([0.3, 0.1], null=False)
    pipeline(class_labels=1, num_inference_steps=1)
    with pytest.raises(ValueError, match="has no null label"):
        pipeline(num_inference_steps=1, **arguments)


def test_an_unconditional_network_has_no_classes_and_no_guidance():
    with pytest.raises(ValueError, match="the network has no classes"):
        pipeline_of([0.3])(class_labels=1)
    with pytest.raises(ValueError, match="guidance_scale=2.0 needs class_labels"):
        pipeline_of([0.3])(guidance_scale=2.0)


def test_a_picture_with_other_than_one_or_three_channels_is_refused_before_sampling():
    pipeline = pipeline_of([0.3], in_channels=2)
    with pytest.raises(ValueError, match="1 or 3 channels, this network has 2"):
        pipeline()
    assert pipeline.unet.labels == []


def test_a_network_without_a_size_needs_the_initial_noise():
    pipeline = pipeline_of([0.3], sample_size=None)
    with pytest.raises(ValueError, match="sample_size is None"):
        pipeline()
    assert pipeline(latents=torch.zeros(1, 1, 4, 6), num_inference_steps=1).images[0].size == (6, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"id2label": {4: "fox"}}, r"id2label names \[4\].*num_class_embeds=4"),
        ({"null_label": 4}, "null_label=4 is not below unet.config.num_class_embeds=4"),
    ],
)
def test_names_and_null_label_must_be_classes_of_the_network(small_unet, arguments, message):
    with pytest.raises(ValueError, match=message):
        GuidedDiffusionPipeline(small_unet, DDIMScheduler(), **arguments)


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [DDPMAncestralScheduler(variance_type="fixed_large"), DDPMScheduler()])
@pytest.mark.parametrize("loader", [GuidedDiffusionPipeline, AnnealersPipeline])
def test_a_saved_pipeline_comes_back_whole(small_pipeline, tmp_path, scheduler, loader):
    small_pipeline.scheduler = scheduler
    small_pipeline.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is GuidedDiffusionPipeline and type(loaded.scheduler) is type(scheduler)
    assert json.loads(loaded.scheduler.to_json_string()) == json.loads(scheduler.to_json_string())
    assert loaded.id2label == {0: "cat", 1: "dog", 2: "emu"} and loaded.null_label == 3
    assert loaded.name_or_path == str(tmp_path)
    arguments = {"class_labels": ["emu", "cat"], "guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "pt"}
    first, second = (p(generator=seed(), **arguments).images for p in (small_pipeline, loaded))
    assert torch.equal(first, second)


def test_the_index_names_our_classes_by_the_package_alone(small_pipeline, tmp_path):
    assert {cls.__module__ for cls in (AnnealersPipeline, GuidedDiffusionPipeline)} == {"annealers"}
    small_pipeline.scheduler = DDPMAncestralScheduler()
    small_pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "GuidedDiffusionPipeline"
    assert index["scheduler"] == ["annealers", "DDPMAncestralScheduler"]
    assert index["id2label"] == {"0": "cat", "1": "dog", "2": "emu"}


def test_a_component_passed_by_name_replaces_the_saved_one(small_pipeline, tmp_path):
    small_pipeline.scheduler = DDPMAncestralScheduler()
    small_pipeline.save_pretrained(tmp_path)
    scheduler = DDIMScheduler()
    assert GuidedDiffusionPipeline.from_pretrained(tmp_path, scheduler=scheduler).scheduler is scheduler


def test_a_pipeline_of_diffusers_with_the_same_components_loads_as_ours(small_unet, tmp_path):
    diffusers.DDPMPipeline(small_unet, DDPMScheduler()).save_pretrained(tmp_path)
    assert type(GuidedDiffusionPipeline.from_pretrained(tmp_path)) is GuidedDiffusionPipeline
    assert type(AnnealersPipeline.from_pretrained(tmp_path)) is diffusers.DDPMPipeline


@pytest.mark.parametrize(
    ("class_name", "components"),
    [
        ("DiTPipeline", ["scheduler", "transformer"]),
        ("LDMPipeline", ["scheduler", "unet", "vqvae"]),
        ("DenoiserPipeline", ["unet"]),
    ],
)
def test_another_kind_of_pipeline_is_refused_by_its_class(tmp_path, class_name, components):
    index = {"_class_name": class_name} | {component: ["diffusers", "Anything"] for component in components}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    listed = ", ".join(map(repr, components))
    with pytest.raises(ValueError, match=f"holds a {class_name} with the components .{listed}"):
        GuidedDiffusionPipeline.from_pretrained(tmp_path)


def test_an_unknown_class_is_refused_by_name(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(
        ValueError, match="neither annealers nor diffusers has a pipeline class named 'NoSuchPipeline'"
    ):
        AnnealersPipeline.from_pretrained(tmp_path)


def test_what_is_no_saved_pipeline_is_refused_with_what_is_there(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(FileNotFoundError, match="no model_index.json, it holds checkpoint-5"):
        GuidedDiffusionPipeline.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder on this machine nor a Hub id"):
        GuidedDiffusionPipeline.from_pretrained(tmp_path / "absent")


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(GuidedDiffusionPipeline.__doc__, {}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
