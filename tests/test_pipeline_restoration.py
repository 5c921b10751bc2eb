r"""Properties of RestorationPipeline, with networks that know the answer.

For Gaussian data and a linear measurement everything is linear: the result is an affine map of the noise that was
drawn. `law_of_result` reads this map off one run, a batch in which each sample meets one unit of noise and nothing
else, and so has mean and covariance of the result without Monte Carlo. The truth is the posterior

    gain = C H^T (H C H^T + sigma_y^2 I)^+,    mean = m + gain (y - H m),    covariance = C - gain H C
"""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from saved_pipelines import guided_pipeline

import annealers.pipelines.pipeline_restoration as pipeline_restoration
from annealers import (
    DDPMAncestralScheduler,
    GuidedDiffusionPipeline,
    ModifiedEulerMaruyamaScheduler,
    NoisyClassifierModel,
    PredictorCorrectorScheduler,
    RestorationPipeline,
)
from annealers.calibration import PosteriorVarianceModel
from annealers.exact import Gaussian
from annealers.hub import export
from annealers.measurements import Blur, Downsample, Grey, Identity, Mask
from annealers.restoration import DDRM, Belief, SpectralMeasurement, conjugate_gradients, resampled_levels
from annealers.schedulers.gaussian_path import DATA

S = 0.4
CHECKS = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 0], [0, 1, 0, 0]])
OPERATORS = {
    "identity": (Identity(), (1, 3, 3)),
    "mask": (Mask(CHECKS), (1, 4, 4)),
    "downsample": (Downsample(2), (1, 4, 4)),
    "blur": (Blur.gaussian(0.7), (1, 3, 4)),
    "circular blur": (Blur([[0.0, 0.1, 0.5], [0.1, 0.1, 0.0], [0.0, 0.2, 0.0]], "circular"), (1, 3, 4)),
    "grey": (Grey(), (3, 2, 2)),
}
every_operator = pytest.mark.parametrize(("operator", "shape"), OPERATORS.values(), ids=list(OPERATORS))
KEEPS_NOISE = {"clip_sample": False, "last_step_noise": True}
PATHS = {
    "linear": KEEPS_NOISE | {"timestep_spacing": "trailing"},
    "far from pure noise": KEEPS_NOISE | {"num_train_timesteps": 200, "timestep_spacing": "linspace"},
    "cosine, v": KEEPS_NOISE | {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "zero SNR": KEEPS_NOISE
    | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "variance exploding": KEEPS_NOISE
    | {"beta_schedule": "geometric", "sigma_min": 0.1, "sigma_max": 20.0, "prediction_type": "score"},
    "flow": KEEPS_NOISE | {"prediction_type": "flow_prediction", "timestep_spacing": "trailing"},
}


class Output(NamedTuple):
    sample: torch.Tensor


class ExactNetwork(ModelMixin, ConfigMixin):
    """The network of one law, or of one law per class; `calls` records the timesteps it was asked at."""

    @register_to_config
    def __init__(self, in_channels=1, sample_size=4, num_class_embeds=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.calls, self.models = [], []

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.calls.append(float(timestep))
        outputs = torch.stack([model(sample, timestep).sample for model in self.models])
        labels = torch.zeros(len(sample), dtype=torch.long) if class_labels is None else class_labels
        return (outputs[labels, torch.arange(len(sample))].to(self.weight.dtype),)


def pipeline_of(laws, scheduler=None, shape=(1, 4, 4), null_label=None):
    laws = laws if isinstance(laws, list) else [laws]
    scheduler = scheduler or DDPMAncestralScheduler(**PATHS["linear"])
    classes = len(laws) if len(laws) > 1 else None
    network = ExactNetwork(in_channels=shape[0], sample_size=shape[1:], num_class_embeds=classes)
    network.models = [law.as_model(scheduler) for law in laws]
    pipeline = RestorationPipeline(network, scheduler, null_label=null_label)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seed(number=0):
    return torch.Generator().manual_seed(number)


def drawn(*shape, number=0):
    return torch.randn(*shape, generator=seed(number), dtype=torch.float64)


def isotropic(shape, variance=S):
    return Gaussian(drawn(*shape, number=7) / 2, variance=variance)


def correlated(shape, number=3):
    """A law whose coordinates all depend on each other."""
    root = drawn(math.prod(shape), math.prod(shape), number=number) / math.prod(shape) ** 0.5
    covariance = 0.8 * root @ root.T + 0.05 * torch.eye(len(root), dtype=torch.float64)
    return Gaussian(drawn(*shape, number=7) / 2, covariance=covariance), covariance


def columns(images):
    return images.flatten(1).T


def matrix(operator, shape):
    return columns(operator.measure(torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)))


def posterior(mean, covariance, operator, y, noise_level):
    """Mean and covariance of p(x_0 | y), for Gaussian data with one m and C."""
    H, m = matrix(operator, mean.shape), mean.flatten()
    seen = H @ covariance @ H.T + noise_level**2 * torch.eye(len(H), dtype=torch.float64)
    gain = covariance @ H.T @ torch.linalg.pinv(seen, rtol=1e-10)
    return m + gain @ (y.flatten() - H @ m), covariance - gain @ H @ covariance


def law_of_result(pipeline, monkeypatch, y, operator, **arguments):
    """Mean (d,) and covariance (d, d) of the result, which is affine in all noise that is drawn."""
    d = math.prod(operator.image_shape(y.shape)[1:])

    def run(noise, batch_size):
        monkeypatch.setattr(pipeline_restoration, "standard_normal", noise)
        return pipeline(y, operator, batch_size=batch_size, output_type="latent", **arguments).images.flatten(1)

    draws = []
    run(lambda sample, *_: draws.append(0) or torch.zeros_like(sample), 1)
    turn = iter(range(len(draws)))

    def unit_noise(sample, *_):
        noise = torch.zeros_like(sample).flatten(1)
        first = 1 + next(turn) * d
        noise[first : first + d] = torch.eye(d, dtype=noise.dtype)
        return noise.reshape(sample.shape)

    results = run(unit_noise, 1 + len(draws) * d)
    assert next(turn, None) is None
    deviations = results[1:] - results[0]
    return results[0], deviations.T @ deviations


def assert_is_the_posterior(result, truth, atol=1e-9):
    for value, expected in zip(result, truth, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=atol)


def measured(operator, shape, noise_level=0.0, batch=1):
    """A draw of y for an image that is not the mean."""
    y = operator.measure(drawn(batch, *shape, number=5))
    return y + noise_level * operator.measure(drawn(batch, *shape, number=6))


# ---- "spectral": the exact posterior --------------------------------------------------------------------------------


@every_operator
@pytest.mark.parametrize("noise_level", [0.0, 0.3])
@pytest.mark.parametrize(("method", "steps"), [("spectral", 1), ("spectral", 4), ("covariance", 3)])
def test_with_isotropic_gaussian_data_the_result_is_the_posterior(
    monkeypatch, operator, shape, noise_level, method, steps
):
    law, y = isotropic(shape), measured(operator, shape, noise_level)
    arguments = {
        "noise_level": noise_level,
        "num_inference_steps": steps,
        "data_variance": S,
        "data_mean": law_mean(law),
    }
    arguments |= {"method": method, "iterations": 1}  # one is enough: the preconditioner is the system
    result = law_of_result(pipeline_of(law, shape=shape), monkeypatch, y, operator, **arguments)
    covariance = S * torch.eye(math.prod(shape), dtype=torch.float64)
    assert_is_the_posterior(result, posterior(law_mean(law), covariance, operator, y, noise_level))


def law_mean(law):
    return law._mean.reshape(law.event_shape)


@pytest.mark.parametrize("path", PATHS)
def test_the_posterior_is_that_on_every_path(monkeypatch, path):
    operator, shape = OPERATORS["downsample"]
    scheduler, law, y = DDPMAncestralScheduler(**PATHS[path]), isotropic(shape), measured(operator, shape)
    arguments = {"noise_level": 0.2, "num_inference_steps": 3, "data_variance": S, "data_mean": law_mean(law)}
    result = law_of_result(pipeline_of(law, scheduler, shape), monkeypatch, y, operator, **arguments)
    covariance = S * torch.eye(math.prod(shape), dtype=torch.float64)
    assert_is_the_posterior(result, posterior(law_mean(law), covariance, operator, y, 0.2))


@pytest.mark.parametrize("name", ["mask", "downsample", "blur", "circular blur"])
@pytest.mark.parametrize("noise_level", [0.0, 0.3])
def test_data_with_a_variance_for_each_coordinate_have_the_exact_posterior(monkeypatch, name, noise_level):
    operator, shape = OPERATORS[name]
    variances = torch.linspace(0.05, 1.5, math.prod(shape), dtype=torch.float64).reshape(shape)
    V = columns(operator.from_spectral(torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)))
    covariance = V @ torch.diag(variances.flatten()) @ V.T
    law, y = Gaussian(drawn(*shape), covariance=covariance), measured(operator, shape)
    arguments = {"noise_level": noise_level, "data_variance": variances, "data_mean": law_mean(law)}
    result = law_of_result(pipeline_of(law, shape=shape), monkeypatch, y, operator, num_inference_steps=3, **arguments)
    assert_is_the_posterior(result, posterior(law_mean(law), covariance, operator, y, noise_level))


@pytest.mark.parametrize("path", ["zero SNR", "flow"])
def test_a_measured_denoising_error_serves_as_the_variance(monkeypatch, path):
    # both paths start without signal, so that data_variance, which is wrong here, has nothing to say
    operator, shape = OPERATORS["downsample"]
    scheduler = DDPMAncestralScheduler(**PATHS[path])
    alpha, sigma = scheduler.signal_and_noise(torch.from_numpy(scheduler.train_timesteps))
    error = (S * sigma**2 / (alpha**2 * S + sigma**2)).tolist()
    scheduler = DDPMAncestralScheduler(**PATHS[path], denoising_error=error)
    law, y = isotropic(shape), measured(operator, shape)
    arguments = {"noise_level": 0.2, "uncertainty": "calibrated", "data_variance": 9.0, "num_inference_steps": 4}
    result = law_of_result(pipeline_of(law, scheduler, shape), monkeypatch, y, operator, **arguments)
    covariance = S * torch.eye(math.prod(shape), dtype=torch.float64)
    assert_is_the_posterior(result, posterior(law_mean(law), covariance, operator, y, 0.2))


@pytest.mark.parametrize("name", ["identity", "mask"])
def test_a_network_that_knows_the_variance_of_each_pixel_is_believed(monkeypatch, name):
    operator, shape = OPERATORS[name]
    variances = torch.linspace(0.05, 1.5, math.prod(shape), dtype=torch.float64).reshape(shape)
    law, y = isotropic(shape, variances), measured(operator, shape)
    pipeline = pipeline_of(law, DDPMAncestralScheduler(variance_type="posterior", **PATHS["zero SNR"]), shape)
    pipeline.unet.models = [PosteriorVarianceModel(pipeline.unet.models[0], pipeline.scheduler)]
    pipeline.scheduler.set_timesteps(4)
    timesteps = [990, *pipeline.scheduler.timesteps[1:].tolist()]  # at 999 there is no signal to learn from
    arguments = {"noise_level": 0.2, "uncertainty": "network", "timesteps": timesteps}
    arguments |= {"data_variance": variances, "data_mean": law_mean(law)}
    result = law_of_result(pipeline, monkeypatch, y, operator, **arguments)
    assert_is_the_posterior(result, posterior(law_mean(law), torch.diag(variances.flatten()), operator, y, 0.2))


def test_where_coordinates_mix_pixels_a_network_is_believed_on_average(monkeypatch):
    operator, shape = OPERATORS["downsample"]
    law, y = isotropic(shape), measured(operator, shape)
    scheduler = DDPMAncestralScheduler(variance_type="posterior", **PATHS["linear"])
    pipeline = pipeline_of(law, scheduler, shape)
    swing = torch.linspace(0, 2, math.prod(shape), dtype=torch.float64).reshape(shape)  # of mean one

    def doubtful(sample, timestep):
        output = model(sample, timestep).sample
        return Output(torch.cat([output[:, :1], output[:, 1:] * swing], dim=1))

    model = PosteriorVarianceModel(pipeline.unet.models[0], scheduler)
    pipeline.unet.models = [doubtful]
    arguments = {"noise_level": 0.2, "uncertainty": "network", "data_variance": S, "data_mean": law_mean(law)}
    result = law_of_result(pipeline, monkeypatch, y, operator, num_inference_steps=3, **arguments)
    covariance = S * torch.eye(math.prod(shape), dtype=torch.float64)
    assert_is_the_posterior(result, posterior(law_mean(law), covariance, operator, y, 0.2))


def test_a_negative_estimate_of_a_variance_counts_as_none():
    operator, y = Downsample(2), drawn(2, 1, 2, 2)
    pipeline = pipeline_of(isotropic((1, 4, 4)), DDPMAncestralScheduler(variance_type="posterior", **PATHS["linear"]))
    exact, images = pipeline.unet.models[0], []
    for value in (-1.0, 0.0):
        pipeline.unet.models = [
            lambda x, t, value=value: Output(torch.cat([exact(x, t).sample, torch.full_like(x, value)], dim=1))
        ]
        arguments = {"noise_level": 0.2, "uncertainty": "network", "num_inference_steps": 3, "output_type": "latent"}
        images.append(pipeline(y, operator, generator=seed(), **arguments).images)
    assert torch.equal(*images) and images[0].isfinite().all()


@every_operator
def test_without_noise_at_the_end_the_result_lacks_the_variance_of_the_last_step(monkeypatch, operator, shape):
    law, y, noise_level = isotropic(shape), measured(operator, shape), 0.3
    scheduler = DDPMAncestralScheduler(clip_sample=False, timestep_spacing="trailing")
    arguments = {"noise_level": noise_level, "data_variance": S, "data_mean": law_mean(law)}
    result = law_of_result(
        pipeline_of(law, scheduler, shape), monkeypatch, y, operator, timesteps=[900, 300], **arguments
    )
    mean, covariance = posterior(
        law_mean(law), S * torch.eye(math.prod(shape), dtype=torch.float64), operator, y, noise_level
    )
    alpha, sigma = scheduler.signal_and_noise(300)
    H, identity = matrix(operator, shape), torch.eye(math.prod(shape), dtype=torch.float64)
    precision = (1 / S + alpha**2 / sigma**2) * identity + H.T @ H / noise_level**2  # of x_0 given x_t and y
    assert_is_the_posterior(result, (mean, covariance - torch.linalg.inv(precision)))


@pytest.mark.parametrize("method", ["spectral", "replacement"])
def test_resampling_brings_correlated_pixels_closer_to_the_posterior(monkeypatch, method):
    shape, operator = (1, 2, 2), Mask(torch.tensor([[1, 0], [0, 1]]))
    law, covariance = correlated(shape)
    y = measured(operator, shape)
    arguments = {"method": method, "data_mean": law_mean(law), "num_inference_steps": 30, "jump_length": 3}
    arguments["data_variance"] = covariance.trace().item() / 4
    pipeline = pipeline_of(law, shape=shape)
    true_mean, _ = posterior(law_mean(law), covariance, operator, y, 0.0)
    errors = []
    for resamples in (1, 2, 4, 8):
        mean, _ = law_of_result(pipeline, monkeypatch, y, operator, resamples=resamples, **arguments)
        errors.append((mean - true_mean).norm().item())
    assert all(later < 0.85 * earlier for earlier, later in zip(errors, errors[1:], strict=False)), errors


# ---- "covariance" ---------------------------------------------------------------------------------------------------

FROM_PURE_NOISE = KEEPS_NOISE | {"beta_schedule": "geometric", "sigma_min": 0.05, "sigma_max": 1e5}


@every_operator
@pytest.mark.parametrize("noise_level", [0.0, 0.3])
def test_with_any_gaussian_data_the_mean_is_that_of_the_posterior(monkeypatch, operator, shape, noise_level):
    (law, covariance), y = correlated(shape), measured(operator, shape, noise_level)
    pipeline = pipeline_of(law, DDPMAncestralScheduler(timestep_spacing="geometric", **FROM_PURE_NOISE), shape)
    arguments = {"method": "covariance", "iterations": 30, "noise_level": noise_level, "num_inference_steps": 3}
    mean, _ = law_of_result(pipeline, monkeypatch, y, operator, **arguments)
    true_mean, _ = posterior(law_mean(law), covariance, operator, y, noise_level)
    torch.testing.assert_close(mean, true_mean, rtol=0, atol=1e-7)


@pytest.mark.parametrize("noise_level", [0.0, 0.3])
def test_with_any_gaussian_data_the_covariance_becomes_that_of_the_posterior_with_order_one(monkeypatch, noise_level):
    shape, operator = (1, 1, 2), Mask(torch.tensor([1, 0]))
    (law, covariance), y = correlated(shape), measured(operator, shape)
    pipeline = pipeline_of(law, DDPMAncestralScheduler(timestep_spacing="geometric", **FROM_PURE_NOISE), shape)
    _, true_spread = posterior(law_mean(law), covariance, operator, y, noise_level)
    arguments = {"method": "covariance", "iterations": 1, "noise_level": noise_level, "data_variance": 0.5}
    errors = []
    for steps in (30, 60, 120):
        _, spread = law_of_result(pipeline, monkeypatch, y, operator, num_inference_steps=steps, **arguments)
        errors.append((spread - true_spread).norm().item())
    orders = [math.log2(earlier / later) for earlier, later in zip(errors, errors[1:], strict=False)]
    assert orders == pytest.approx([1, 1], abs=0.15), errors


def test_more_iterations_of_conjugate_gradients_bring_the_mean_closer(monkeypatch):
    operator, shape = OPERATORS["mask"]
    (law, covariance), y = correlated(shape), measured(operator, shape, 0.1)
    pipeline = pipeline_of(law, DDPMAncestralScheduler(timestep_spacing="geometric", **FROM_PURE_NOISE), shape)
    true_mean, _ = posterior(law_mean(law), covariance, operator, y, 0.1)
    errors = []
    for iterations in (1, 2, 4, 8):
        arguments = {"method": "covariance", "iterations": iterations, "noise_level": 0.1, "num_inference_steps": 5}
        mean, _ = law_of_result(pipeline, monkeypatch, y, operator, **arguments)
        errors.append((mean - true_mean).norm().item())
    assert sorted(errors, reverse=True) == errors and errors[2] < 0.2 * errors[0], errors
    assert errors[3] < 1e-8  # eight pixels are measured


def test_pixels_whose_variance_a_network_estimates_as_none_are_no_obstacle():
    pipeline = pipeline_of(
        correlated((1, 4, 4))[0], DDPMAncestralScheduler(variance_type="posterior", **PATHS["linear"])
    )
    exact = pipeline.unet.models[0]
    certain = (torch.arange(16).reshape(1, 1, 4, 4) % 3 == 0).double()

    def doubtful(sample, timestep):
        return Output(torch.cat([exact(sample, timestep).sample, (1 - certain).expand_as(sample)], dim=1))

    pipeline.unet.models = [doubtful]
    y, operator = drawn(2, 1, 4, 4), Mask(CHECKS)
    arguments = {"method": "covariance", "uncertainty": "network", "num_inference_steps": 3, "output_type": "latent"}
    images = pipeline(y, operator, generator=seed(), **arguments).images
    assert images.isfinite().all()
    torch.testing.assert_close(operator.measure(images), operator.measure(y))


def test_conjugate_gradients_solve_each_system_and_stop_where_there_is_none():
    root = drawn(3, 5, 5)
    systems, right = root @ root.transpose(1, 2) + 0.1 * torch.eye(5), drawn(3, 5, number=1)
    systems[1] = -systems[1]  # not what a covariance is
    right[2] = 0
    scale = systems.diagonal(dim1=1, dim2=2).abs()
    w = conjugate_gradients(lambda v: (systems @ v[..., None])[..., 0], right, scale, iterations=20)
    torch.testing.assert_close(w[0], torch.linalg.solve(systems[0], right[0]))
    assert torch.equal(w[1:], torch.zeros(2, 5, dtype=torch.float64))


def test_conjugate_gradients_keep_what_they_had_before_a_direction_without_curvature():
    # from 0 along (1, 1) by 2, and then along (6, 12), which diag(2, -1) curves downwards
    system, one = torch.tensor([[2.0, -1.0]]), torch.ones(1, 2)
    for iterations in (1, 2, 3, 9):
        w = conjugate_gradients(lambda v: system * v, one, one, iterations)
        assert torch.equal(w, torch.full((1, 2), 2.0))


def test_the_covariance_of_a_clipped_prediction_is_that_of_the_unclipped_one():
    law, shape = Gaussian(torch.full((1, 4, 4), 3.0, dtype=torch.float64), variance=S), (1, 4, 4)
    pipeline = pipeline_of(law, DDPMAncestralScheduler(clip_sample=True), shape)
    y = torch.full((1, 1, 2, 2), 2.0, dtype=torch.float64)
    arguments = {"method": "covariance", "noise_level": 0.5, "data_variance": S, "timesteps": [500]}
    image = pipeline(y, Downsample(2), output_type="latent", iterations=1, **arguments).images
    alpha, sigma = pipeline.scheduler.signal_and_noise(500)
    variance = S * sigma**2 / (alpha**2 * S + sigma**2)
    expected = 1 + (y - 1) * variance / 4 / (variance / 4 + 0.25) * torch.ones(1, 1, 4, 4)[..., :2, :2]
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(image, 2), expected)


def test_where_nothing_is_measured_sampling_is_ancestral_with_the_optimal_variance():
    scheduler = DDPMAncestralScheduler(**PATHS["linear"])
    _, sigma = scheduler.signal_and_noise(torch.arange(1000))
    scheduler = DDPMAncestralScheduler(
        **PATHS["linear"],
        variance_type="optimal",
        mean_squared_noise=(sigma**2).tolist(),  # of data with variance 1
    )
    law, _ = correlated((1, 4, 4))
    arguments = {"num_inference_steps": 6, "output_type": "latent"}
    restoring = pipeline_of(law, scheduler)
    drawing = GuidedDiffusionPipeline(restoring.unet, scheduler)
    drawing.set_progress_bar_config(disable=True)
    expected = drawing(batch_size=3, generator=seed(), **arguments).images
    nothing = torch.full((3, 1, 4, 4), torch.nan)
    for method in ("spectral", "replacement"):
        images = restoring(nothing, Mask(torch.zeros(4, 4)), method=method, resamples=1, generator=seed(), **arguments)
        torch.testing.assert_close(images.images, expected)


@pytest.mark.parametrize("method", ["spectral", "covariance", "ddrm"])
@every_operator
def test_an_exact_measurement_is_met_exactly(operator, shape, method):
    law, _ = correlated(shape)
    y = measured(operator, shape, batch=2)
    pipeline = pipeline_of(law, DDPMAncestralScheduler(clip_sample=True), shape)  # clipping is no obstacle
    images = pipeline(y, operator, method=method, num_inference_steps=3, iterations=1, output_type="latent").images
    torch.testing.assert_close(operator.measure(images), y)


# ---- "replacement" --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resampling", [{"resamples": 1}, {"resamples": 3, "jump_length": 2}])
@pytest.mark.parametrize("path", ["linear", "flow", "far from pure noise"])
def test_replacement_of_independent_pixels_gives_the_posterior(monkeypatch, path, resampling):
    shape, operator = (1, 3, 3), Mask(CHECKS[:3, :3])
    variances = torch.linspace(0.05, 1.5, 9, dtype=torch.float64).reshape(shape)
    law, y = isotropic(shape, variances), measured(operator, shape)
    pipeline = pipeline_of(law, DDPMAncestralScheduler(**PATHS[path]), shape)
    arguments = {"data_variance": variances, "data_mean": law_mean(law), "num_inference_steps": 4}
    result = law_of_result(pipeline, monkeypatch, y, operator, method="replacement", **arguments, **resampling)
    assert_is_the_posterior(result, posterior(law_mean(law), torch.diag(variances.flatten()), operator, y, 0.0))


def test_the_walk_goes_back_at_each_jump_length_counted_from_the_last_level():
    walk = resampled_levels
    assert walk(5, jump_length=2, resamples=2) == [0, 1, 0, 1, 2, 3, 2, 3, 4]
    assert walk(4, jump_length=1, resamples=3) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert walk(4, jump_length=2, resamples=2) == [0, 1, 2, 1, 2, 3]
    assert walk(3, jump_length=9, resamples=1) == [0, 1, 2]
    paper = walk(250, jump_length=10, resamples=10)  # RePaint's setting
    assert len(paper) == 250 + 24 * 9 * 10
    assert set(np.diff(paper)) == {1, -9}
    assert paper[-1] == 249 and sorted(set(paper)) == list(range(250))
    with pytest.raises(ValueError, match="jump_length=5 needs more levels than that, got 5"):
        walk(5, jump_length=5, resamples=2)


def test_known_pixels_are_at_the_noise_of_their_level(monkeypatch):
    shape, operator = (1, 4, 4), Mask(CHECKS)
    law, y = isotropic(shape), measured(operator, shape)
    pipeline = pipeline_of(law, shape=shape)
    zeros = lambda sample, *_: torch.zeros_like(sample)  # noqa: E731
    monkeypatch.setattr(pipeline_restoration, "standard_normal", zeros)
    run = {"method": "replacement", "resamples": 1, "num_inference_steps": 3, "return_trajectory": True}
    trajectory = pipeline(y, operator, **run).trajectory
    alpha, _ = pipeline.scheduler.signal_and_noise(torch.tensor([*trajectory.timesteps.tolist(), -1]))
    known = trajectory.samples[:, 0, 0, CHECKS == 1]
    torch.testing.assert_close(known, alpha[:, None] * y[0, 0, CHECKS == 1])


# ---- "ddrm" ---------------------------------------------------------------------------------------------------------


@every_operator
@pytest.mark.parametrize("noise_level", [0.0, 0.05, 0.6])
@pytest.mark.parametrize(("eta", "eta_b"), [(0.85, 1.0), (0.0, 0.5), (1.0, 0.0)])
def test_a_ddrm_state_is_the_noisy_truth_if_the_network_knows_it(operator, shape, noise_level, eta, eta_b):
    # Kawar et al. 2022, Proposition 3.1: with x̂_0 = x_0, and over the draws of y, x_t is N(alpha_t x_0, sigma_t^2 I)
    d, m = math.prod(shape), math.prod(operator.measurement_shape((1, *shape))[1:])
    scheduler = DDPMAncestralScheduler(**PATHS["linear"])
    levels = [scheduler._level(t) for t in (999, 700, 300, 100, 10)] + [DATA]
    x_0, clean = drawn(1, *shape), operator.measure(drawn(1, *shape))
    batch = 1 + m + d * len(levels)
    noises = torch.zeros(len(levels) + 1, batch, max(m, d), dtype=torch.float64)
    noises[0, 1 : 1 + m, :m] = torch.eye(m)
    for k in range(len(levels)):
        noises[k + 1, 1 + m + k * d : 1 + m + (k + 1) * d, :d] = torch.eye(d)
    y = clean + noise_level * noises[0, :, :m].reshape(batch, *clean.shape[1:])
    z = noises[1:, :, :d].reshape(-1, batch, *shape)

    ddrm = DDRM(SpectralMeasurement(operator, y, noise_level), eta, eta_b)
    # the paper's x_T knows x_0 where nothing is measured, the sampler's has mean zero there
    unmeasured = x_0 - operator.pseudo_inverse(operator.measure(x_0))
    state = ddrm.start(z[0], levels[0]) + levels[0].alpha * unmeasured
    for k, (t, u) in enumerate(zip(levels, levels[1:], strict=False)):
        state, _ = ddrm.step(state, Belief(x_0.expand(batch, *shape), 0.0, None), t, u, z[k + 1])
        deviations = (state[1:] - state[0]).flatten(1)
        torch.testing.assert_close(state[:1], u.alpha * x_0, rtol=0, atol=1e-10)
        torch.testing.assert_close(
            deviations.T @ deviations, u.sigma**2 * torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-10
        )


def test_ddrm_starts_from_the_measurement_where_it_is_better_than_the_noise():
    operator, shape = OPERATORS["grey"]
    level = DDPMAncestralScheduler(**PATHS["linear"])._level(999)
    y = torch.full((1, 1, 2, 2), 2.0, dtype=torch.float64)
    zero, unit = torch.zeros(1, *shape, dtype=torch.float64), torch.ones(1, *shape, dtype=torch.float64)
    for noise_level, is_better in ((0.5, True), (1e4, False)):
        ddrm = DDRM(SpectralMeasurement(operator, y, noise_level))
        mean = ddrm.start(zero, level)
        expected = level.alpha * operator.pseudo_inverse(y) if is_better else zero
        torch.testing.assert_close(mean, expected)
        first = operator.to_spectral(ddrm.start(operator.from_spectral(unit), level) - mean)[0, :, 0, 0]
        tau = noise_level / Grey().weights.norm().item()
        variance = level.sigma**2 - (level.alpha * tau) ** 2 * is_better
        torch.testing.assert_close(first**2, torch.tensor([variance, level.sigma**2, level.sigma**2]).double())


# ---- one batch, many measurements -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spectral", "covariance", "replacement", "ddrm"])
def test_an_image_does_not_depend_on_its_neighbours_or_on_their_masks(method):
    masks = torch.stack([CHECKS, 1 - CHECKS, torch.ones(4, 4)])[:, None]
    y = drawn(3, 1, 4, 4)
    law, _ = correlated((1, 4, 4))
    pipeline = pipeline_of(law)
    arguments = {"method": method, "num_inference_steps": 4, "jump_length": 2, "resamples": 2, "output_type": "latent"}
    many = pipeline(y, Mask(masks), generator=[seed(i) for i in range(3)], **arguments).images
    for i in range(3):
        alone = pipeline(y[i : i + 1], Mask(masks[i]), generator=[seed(i)], **arguments).images
        torch.testing.assert_close(many[i : i + 1], alone, rtol=0, atol=1e-12)


def test_one_measurement_serves_a_batch_as_if_it_were_repeated():
    operator, y = Downsample(2), drawn(1, 1, 2, 2)
    pipeline = pipeline_of(correlated((1, 4, 4))[0])
    arguments = {"num_inference_steps": 2, "output_type": "latent", "generator": [seed(1), seed(2)]}
    expected = pipeline(y.repeat(2, 1, 1, 1), operator, **arguments).images
    arguments["generator"] = [seed(1), seed(2)]
    torch.testing.assert_close(pipeline(y, operator, **arguments).images, expected)
    assert len(pipeline(y, operator, batch_size=3, num_inference_steps=1).images) == 3


@pytest.mark.parametrize("w", [1.0, 2.5])
def test_classes_and_guidance_are_those_of_the_guided_pipeline(monkeypatch, w):
    # with one variance for all classes, guidance between two Gaussians is the Gaussian with the extrapolated mean
    operator, shape = OPERATORS["downsample"]
    asked, null = isotropic(shape), Gaussian(drawn(*shape, number=8), variance=S)
    mean = law_mean(null) + w * (law_mean(asked) - law_mean(null))
    y = measured(operator, shape)
    pipeline = pipeline_of([asked, null], shape=shape, null_label=1)
    arguments = {"class_labels": 0, "guidance_scale": w, "noise_level": 0.2, "num_inference_steps": 3}
    arguments |= {"data_variance": S, "data_mean": mean}
    result = law_of_result(pipeline, monkeypatch, y, operator, **arguments)
    covariance = S * torch.eye(math.prod(shape), dtype=torch.float64)
    assert_is_the_posterior(result, posterior(mean, covariance, operator, y, 0.2))


# ---- the run --------------------------------------------------------------------------------------------------------


def test_a_sampler_that_repeats_its_levels_is_walked_once():
    scheduler = PredictorCorrectorScheduler(clip_sample=False, corrector_steps=2)
    pipeline = pipeline_of(isotropic((1, 4, 4)), scheduler)
    pipeline(drawn(1, 1, 2, 2), Downsample(2), num_inference_steps=5)
    assert pipeline.unet.calls == sorted(set(scheduler.timesteps.tolist()), reverse=True)
    assert len(pipeline.unet.calls) == pipeline.num_timesteps == 5


@pytest.mark.parametrize("scheduler", [ModifiedEulerMaruyamaScheduler, PredictorCorrectorScheduler])
def test_the_steps_are_those_of_the_method_whatever_the_scheduler(scheduler):
    y, arguments = drawn(1, 1, 2, 2), {"timesteps": [900, 500, 100], "output_type": "latent"}
    images = [
        pipeline_of(isotropic((1, 4, 4)), cls(clip_sample=False))(
            y, Downsample(2), generator=seed(), **arguments
        ).images
        for cls in (scheduler, DDPMAncestralScheduler)
    ]
    torch.testing.assert_close(*images)


def test_predictions_are_restricted_as_the_scheduler_says():
    law = Gaussian(torch.full((1, 4, 4), 3.0, dtype=torch.float64), variance=1e-6)
    images = {}
    for clip in (True, False):
        pipeline = pipeline_of(law, DDPMAncestralScheduler(clip_sample=clip))
        nothing = torch.zeros(1, 1, 4, 4)
        images[clip] = pipeline(nothing, Mask(torch.zeros(4, 4)), num_inference_steps=2, output_type="latent").images
    torch.testing.assert_close(images[True], torch.ones_like(images[True]), rtol=0, atol=1e-9)
    torch.testing.assert_close(images[False], torch.full_like(images[True], 3.0), rtol=0, atol=0.05)


def test_the_trajectory_holds_states_and_corrected_predictions():
    operator, y = Mask(CHECKS), drawn(2, 1, 4, 4)
    pipeline = pipeline_of(isotropic((1, 4, 4)))
    arguments = {"num_inference_steps": 5, "output_type": "pt", "return_trajectory": True, "method": "replacement"}
    images, trajectory = pipeline(y, operator, jump_length=2, resamples=2, return_dict=False, **arguments)
    assert trajectory.timesteps.tolist() == [999, 799, 999, 799, 599, 399, 599, 399, 199]
    assert trajectory.samples.shape == (10, 2, 1, 4, 4) and trajectory.predictions.shape == (9, 2, 1, 4, 4)
    torch.testing.assert_close((trajectory.samples[-1] / 2 + 0.5).clamp(0, 1), images)
    for prediction in trajectory.predictions:
        torch.testing.assert_close(operator.measure(prediction), operator.measure(y))
    spectral = pipeline(y, operator, num_inference_steps=5, return_trajectory=True).trajectory
    assert spectral.timesteps.tolist() == [999, 799, 599, 399, 199]
    torch.testing.assert_close(operator.measure(spectral.predictions[0]), operator.measure(y))
    assert len(pipeline(y, operator, num_inference_steps=1, return_dict=False)) == 1


def test_given_noise_is_the_noise_that_would_be_drawn():
    y, noise = drawn(2, 1, 2, 2), drawn(2, 1, 4, 4)
    pipeline = pipeline_of(isotropic((1, 4, 4)), DDPMAncestralScheduler(clip_sample=False))
    arguments = {"num_inference_steps": 1, "output_type": "latent"}
    given = pipeline(y, Downsample(2), latents=noise, **arguments).images
    torch.testing.assert_close(pipeline(y, Downsample(2), generator=seed(), **arguments).images, given)


def test_a_callback_is_called_after_every_network_call_and_is_gone_on_with():
    calls = []

    def callback(pipeline, i, t, tensors):
        calls.append((i, int(t), set(tensors)))
        pipeline._interrupt = i == 2
        return {"latents": torch.full_like(tensors["latents"], 0.5)}

    pipeline = pipeline_of(isotropic((1, 4, 4)))
    arguments = {"num_inference_steps": 5, "callback_on_step_end": callback, "return_trajectory": True}
    output = pipeline(drawn(1, 1, 2, 2), Downsample(2), output_type="latent", **arguments)
    assert calls == [(i, t, {"latents"}) for i, t in enumerate((999, 799, 599))]
    assert torch.equal(output.images, torch.full_like(output.images, 0.5))
    assert len(output.trajectory.samples) == 4 and output.trajectory.timesteps.tolist() == [999, 799, 599]


def test_the_progress_bar_counts_network_calls():
    class Bar:
        ticks = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            Bar.ticks += 1

    pipeline = pipeline_of(isotropic((1, 4, 4)))
    totals = []
    pipeline.progress_bar = lambda total: totals.append(total) or Bar()
    run = {"method": "replacement", "jump_length": 2, "resamples": 2, "num_inference_steps": 5}
    pipeline(drawn(1, 1, 4, 4), Mask(CHECKS), **run)
    assert totals == [9] == [Bar.ticks] == [len(pipeline.unet.calls)] == [pipeline.num_timesteps]


@pytest.fixture(scope="module")
def small_unet():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    size = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "add_attention": False}
    return UNet2DModel(8, 3, 3, num_class_embeds=4, **size, **blocks).eval()


def test_the_folder_of_a_guided_pipeline_restores_and_a_diffusers_scheduler_is_swapped(small_unet, tmp_path):
    names = {0: "cat", 1: "dog", 2: "emu"}
    GuidedDiffusionPipeline(small_unet, DDPMScheduler(), names, null_label=3).save_pretrained(tmp_path)
    pipeline = RestorationPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, RestorationPipeline) and pipeline.id2label == names
    grey = drawn(2, 1, 8, 8).float()
    with pytest.raises(
        ValueError, match="restoration needs a scheduler of annealers .*got DDPMScheduler.*from_config"
    ):
        pipeline(grey, Grey())
    pipeline.scheduler = DDPMAncestralScheduler.from_config(pipeline.scheduler.config)
    images = pipeline(grey, Grey(), class_labels=["cat", "emu"], guidance_scale=2.0, num_inference_steps=2).images
    assert [image.mode for image in images] == ["RGB"] * 2
    pipeline.save_pretrained(tmp_path / "again")
    assert type(RestorationPipeline.from_pretrained(tmp_path / "again")) is RestorationPipeline


@pytest.mark.parametrize("method", ["spectral", "covariance", "replacement", "ddrm"])
def test_inference_mode_changes_nothing(small_unet, method):
    pipeline = RestorationPipeline(small_unet, DDPMAncestralScheduler(), null_label=3)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"method": method, "class_labels": [0, 1], "num_inference_steps": 2, "output_type": "latent"}
    expected = pipeline(drawn(2, 3, 8, 8).float(), Mask(torch.eye(8)), generator=seed(), **arguments).images
    with torch.inference_mode():
        y = drawn(2, 3, 8, 8).float()
        images = pipeline(y, Mask(torch.eye(8)), generator=seed(), latents=None, **arguments).images
    assert torch.equal(images, expected)


@pytest.mark.parametrize("method", ["spectral", "covariance"])
def test_a_classifier_and_a_measurement_are_heeded_together(tmp_path, method):
    """Saved by the guided pipeline, with the attention that a classifier has."""
    pipeline = guided_pipeline()
    torch.manual_seed(1)
    pipeline.classifier = NoisyClassifierModel(8, 1, 3, (8, 16), norm_num_groups=4).eval()
    pipeline.save_pretrained(tmp_path)
    loaded = RestorationPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    y, operator = drawn(2, 1, 4, 4).float(), Downsample(2)
    arguments = {"method": method, "class_labels": ["dog", "emu"], "num_inference_steps": 3, "output_type": "latent"}
    plain, led = (loaded(y, operator, classifier_scale=w, generator=seed(), **arguments).images for w in (0.0, 20.0))
    assert (plain - led).abs().max() > 1e-3
    for images in (plain, led):
        torch.testing.assert_close(operator.measure(images), y, rtol=0, atol=1e-5)


def test_a_pipeline_exported_with_its_code_restores_where_annealers_is_not_installed(tmp_path):
    guided = guided_pipeline()
    pipeline = RestorationPipeline(**guided.components, id2label=guided.id2label, null_label=guided.null_label)
    pipeline.set_progress_bar_config(disable=True)
    export(pipeline, tmp_path / "exported")
    script = (
        "import load_without_annealers, sys, torch\n"
        "pipeline = load_without_annealers.DiffusionPipeline.from_pretrained('exported', trust_remote_code=True)\n"
        "code = type(pipeline)._check_settings.__globals__\n"  # the operators come in the same file
        "y, operator = torch.ones(1, 1, 8, 8), code['Mask'](torch.eye(8))\n"
        "generator = torch.Generator().manual_seed(0)\n"
        "arguments = {'method': 'replacement', 'generator': generator, 'num_inference_steps': 2}\n"
        "torch.save(pipeline(y, operator, output_type='latent', **arguments).images, 'images.pt')\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'annealers']\n"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent / "support")
    child = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    arguments = {"method": "replacement", "generator": seed(), "num_inference_steps": 2, "output_type": "latent"}
    expected = pipeline(torch.ones(1, 1, 8, 8), Mask(torch.eye(8)), **arguments).images
    torch.testing.assert_close(torch.load(tmp_path / "images.pt"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["spectral", "covariance", "ddrm"])
def test_a_half_precision_network_is_sampled_in_float32(small_unet, method, dtype):
    pipeline = RestorationPipeline(small_unet, DDPMAncestralScheduler(), null_label=3)
    pipeline.set_progress_bar_config(disable=True)
    y = drawn(1, 3, 4, 4).float()
    arguments = {"noise_level": 0.1, "method": method, "num_inference_steps": 2, "output_type": "latent"}
    full = pipeline(y, Downsample(2), generator=seed(), **arguments).images
    try:
        pipeline.unet = small_unet.to(dtype)
        half = pipeline(y.to(dtype), Downsample(2), generator=seed(), **arguments).images
    finally:
        small_unet.to(torch.float32)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0, atol=0.1)


def test_a_learned_variance_is_left_out_and_the_size_is_that_of_the_measurement():
    pipeline = pipeline_of(Gaussian(0.3, variance=S), DDPMAncestralScheduler(clip_sample=False))
    arguments = {"num_inference_steps": 3, "output_type": "latent"}
    y = drawn(1, 1, 3, 4)
    expected = pipeline(y, Downsample(2), generator=seed(), **arguments).images
    assert expected.shape == (1, 1, 6, 8)
    exact = pipeline.unet.models[0]
    pipeline.unet.models = [lambda x, t: Output(torch.cat([exact(x, t).sample, torch.full_like(x, 9.0)], dim=1))]
    pipeline.scheduler.register_to_config(variance_type="learned_range")
    assert torch.equal(pipeline(y, Downsample(2), generator=seed(), **arguments).images, expected)


# ---- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "magic"}, "method must be one of .*got 'magic'"),
        ({"uncertainty": "none"}, "uncertainty must be one of .*got 'none'"),
        ({"uncertainty": "calibrated"}, "'calibrated' needs the measured denoising error.*calibrate_spacing"),
        ({"uncertainty": "network"}, "'network' needs .*variance_type='posterior', got variance_type='fixed_small'"),
        ({"noise_level": -0.1}, "noise_level must be at least 0, got -0.1"),
        ({"noise_level": math.inf}, "noise_level must be at least 0, got inf"),
        ({"data_variance": 0.0}, "data_variance must be positive and finite, got 0.0"),
        ({"data_variance": math.inf}, "data_variance must be positive and finite, got inf"),
        ({"data_mean": math.nan}, "data_mean must be finite, got nan"),
        ({"measurement": torch.zeros(1, 1, 4, 4, dtype=torch.uint8)}, "floating-point tensor .*got torch.uint8"),
        ({"measurement": [[0.0]]}, "floating-point tensor .*got list"),
        ({"measurement": torch.zeros(0, 1, 4, 4)}, "need one positive batch size"),
        ({"measurement": torch.full((1, 1, 4, 4), math.nan)}, "values that are not finite"),
        ({"data_variance": torch.tensor([1.0, -1.0])}, "data_variance must be positive"),
        ({"method": "replacement", "noise_level": 0.1}, "known pixels as exact, got noise_level=0.1"),
        ({"method": "replacement", "operator": Identity()}, "needs a Mask, got a Identity"),
        ({"method": "replacement", "jump_length": 0}, "jump_length and resamples >= 1, got 0 and 1"),
        ({"method": "replacement", "resamples": 0}, "jump_length and resamples >= 1, got 10 and 0"),
        ({"method": "covariance", "iterations": 0}, "need iterations >= 1, got 0"),
        ({"method": "ddrm", "eta": 1.5}, "eta and eta_b in 0 .. 1, got 1.5 and 1.0"),
        ({"method": "ddrm", "eta_b": -0.5}, "eta and eta_b in 0 .. 1, got 0.85 and -0.5"),
        ({"batch_size": 3, "generator": [seed(), seed()]}, "need one positive batch size"),
        ({"measurement": torch.zeros(2, 1, 4, 4), "generator": [seed()] * 3}, "need one positive batch size"),
        ({"measurement": torch.zeros(2, 1, 4, 4), "batch_size": 3}, "2 measurements .*batch_size=3"),
        ({"measurement": torch.zeros(1, 1, 4, 5)}, r"mask of shape \(4, 4\) does not fit"),
        ({"measurement": torch.zeros(1, 3, 4, 4)}, r"of images \(1, 3, 4, 4\), the network's have C = 1"),
        ({"latents": torch.zeros(1, 1, 4, 5)}, r"latents must have the shape \(1, 1, 4, 4\), got \(1, 1, 4, 5\)"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback tensors must be of"),
        ({"output_type": "gif"}, "output_type must be one of"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    pipeline = pipeline_of(isotropic((1, 4, 4)))
    with pytest.raises(ValueError, match=message):
        pipeline(**({"measurement": torch.zeros(1, 1, 4, 4), "operator": Mask(CHECKS)} | arguments))
    assert pipeline.unet.calls == []


def test_a_jacobian_needs_some_signal():
    pipeline = pipeline_of(isotropic((1, 4, 4)), DDPMAncestralScheduler(**PATHS["zero SNR"]))
    with pytest.raises(ValueError, match="timestep 999 has no signal .*'covariance'.* needs some"):
        pipeline(torch.zeros(1, 1, 4, 4), Identity(), method="covariance", num_inference_steps=2)
