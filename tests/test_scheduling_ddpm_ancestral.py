r"""Properties of the DDPM ancestral step, checked on laws that are known exactly and against Diffusers' DDPMScheduler.

A step is x_s = mean(x_t) + std z. Two steps with known noise z give its mean and standard deviation without sampling
error, and for Gaussian data N(m, S) they are affine and constant, so that the law of N steps is a recursion of a mean
and a variance. In closed form, with the marginal variance V_t = alpha_t^2 S + sigma_t^2 and the forward variance v,

    E[x_s | x_t] = alpha_s m + a V_s / V_t (x_t - alpha_t m)          Var[x_s | x_t] = v V_s / V_t
"""

import copy
import doctest
import inspect
import json
import logging
import math
import pickle

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils.dummy_torch_and_torchsde_objects import DPMSolverSDEScheduler as NeedsTorchsde

from annealers import (
    AnnealedLangevinScheduler,
    DDPMAncestralScheduler,
    ModifiedEulerMaruyamaScheduler,
    PredictorCorrectorScheduler,
)
from annealers.calibration import calibrate_spacing
from annealers.exact import Gaussian, GaussianMixture
from annealers.schedulers import GaussianPathScheduler, GaussianPathSchedulerOutput

LADDER = {"beta_schedule": "geometric", "sigma_min": 0.02, "sigma_max": 40.0}
PATHS = [{"beta_schedule": name} for name in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")] + [LADDER]
FLOW = {"prediction_type": "flow_prediction"}
SPACINGS = ["leading", "linspace", "trailing", "karras", "geometric"]
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction", "score"]
VARIANCE_TYPES = ["fixed_small", "fixed_large", "learned", "learned_range", "optimal", "posterior"]
SHAPES = [(3,), (3, 4), (3, 2, 5), (3, 2, 4, 4), (3, 2, 3, 4, 4)]  # the first axis is the batch
M, S = 0.7, 0.25  # mean and variance of the Gaussian data
GAUSSIAN = Gaussian(M, variance=S)
MIXTURE = GaussianMixture([0.3, 0.7], [-1.0, 0.8], [0.04, 0.09])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def is_learned(scheduler):
    return scheduler.config.variance_type in ("learned", "learned_range", "posterior")


def build(law=GAUSSIAN, **config):
    """A scheduler without clipping; "optimal" gets the exact statistic of `law`."""
    scheduler = DDPMAncestralScheduler(**{"clip_sample": False, **config})
    if scheduler.config.variance_type == "optimal" and scheduler.config.mean_squared_noise is None:
        statistic = mean_squared_noise(law, scheduler)
        scheduler = DDPMAncestralScheduler.from_config(scheduler.config, mean_squared_noise=statistic)
    return scheduler


def mean_squared_noise(law, scheduler):
    """E[eps-hat^2] at every train timestep: in closed form, or as an integral over x_t."""
    alpha, sigma = scheduler.signal_and_noise(torch.from_numpy(scheduler.train_timesteps))
    if law is GAUSSIAN:
        return (sigma**2 / (alpha**2 * S + sigma**2)).tolist()
    x = torch.linspace(-10, 10, 8001, dtype=torch.float64)
    return [
        float((law.log_prob(x, a, s).exp() * law.noise(x, a, s) ** 2).sum() * 0.0025)
        for a, s in zip(alpha, sigma, strict=True)
    ]


def predict(law, scheduler, x, t):
    """What the best network outputs, with zeros for the variance values of a learned variance."""
    output = law.prediction(scheduler.config.prediction_type, x, *scheduler.signal_and_noise(t))
    return torch.cat([output, torch.zeros_like(output)], dim=1) if is_learned(scheduler) else output


def law_of_step(scheduler, output, t, x):
    """Mean and standard deviation of a step, read off two of them whose noise is known."""
    z = [draw(*x.shape, seed=seed) for seed in (1, 2)]
    y = [scheduler.step(output, t, x, generator=seeded(seed)).prev_sample for seed in (1, 2)]
    std = (y[0] - y[1]) / (z[0] - z[1])
    return y[0] - std * z[0], std


def pairs(scheduler):
    """The steps (t, s) of the schedule; s = -1 is the data."""
    timesteps = scheduler.timesteps.tolist()
    return list(zip(timesteps, timesteps[1:] + [-1], strict=True))


def point(scheduler, t):
    return (1.0, 0.0) if t < 0 else tuple(float(c) for c in scheduler.signal_and_noise(t))


def forward_variance(scheduler, t, s):
    """v of q(x_t | x_s) from the log signal-to-noise ratios (Kingma et al. 2021)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = point(scheduler, t), point(scheduler, s)
    if s < 0 or alpha_t == 0:
        return sigma_t**2
    return -(sigma_t**2) * math.expm1(2 * math.log(alpha_t * sigma_s / (sigma_t * alpha_s)))


def posterior_variance(scheduler, t, s):
    """beta-tilde: precisions add up, 1 / beta-tilde = 1 / sigma_s^2 + a^2 / v."""
    (alpha_t, _), (alpha_s, sigma_s) = point(scheduler, t), point(scheduler, s)
    if s < 0:
        return 0.0
    return 1 / (1 / sigma_s**2 + (alpha_t / alpha_s) ** 2 / forward_variance(scheduler, t, s))


def marginal_variance(scheduler, t):
    alpha, sigma = point(scheduler, t)
    return alpha**2 * S + sigma**2


def sampled_law(scheduler):
    """Mean and variance of what is sampled with the exact Gaussian model, from the exact law of the first level."""
    start = scheduler.timesteps[0].item()
    mean, variance = point(scheduler, start)[0] * M, marginal_variance(scheduler, start)
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t in scheduler.timesteps:
        (offset, end), std = law_of_step(scheduler, predict(GAUSSIAN, scheduler, x, t), t, x)
        slope = float(end - offset)
        mean, variance = float(offset) + slope * mean, slope**2 * variance + float(std[0]) ** 2
    return mean, variance


# ---- equal to Diffusers on shared noise -----------------------------------------------------------------------------


def trajectories(ours, theirs, steps, output, dtype=torch.float64):
    """Pairs of states of both schedulers; each is fed its own state and both the same noise."""
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    x, y = (draw(2, 3, 4, 4).to(dtype) for _ in range(2))
    mine, other = seeded(5), seeded(5)
    for t in ours.timesteps:
        x = ours.step(output(x), t, x, generator=mine).prev_sample
        y = theirs.step(output(y), t, y, generator=other).prev_sample
        yield x, y


def in_float64(theirs):
    """Diffusers' scheduler with the table of its networks, computing in double precision."""
    theirs.alphas_cumprod, theirs.one = theirs.alphas_cumprod.double(), theirs.one.double()
    return theirs


def largest_difference(states):
    """Relative to the largest entry of the state, which clipping keeps near 1."""
    return max(float((x - y).abs().max()) / max(1.0, float(y.abs().max())) for x, y in states)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("steps", "bar"), [(1, 1e-6), (4, 1e-6), (10, 1e-6), (16, 1e-6), (20, 1e-6), (50, 2e-6)])
def test_trailing_fixed_small_epsilon_is_diffusers_as_it_is(steps, bar, dtype, clip):
    # at 50 steps the float32 rounding of their 1 - alpha_t^2 / alpha_s^2 shows; the next test has it without
    config = {"timestep_spacing": "trailing", "clip_sample": clip}
    ours, theirs = DDPMAncestralScheduler(**config), DDPMScheduler(**config)
    assert largest_difference(trajectories(ours, theirs, steps, lambda x: 0.9 * x, dtype)) <= bar


@pytest.mark.parametrize("steps", [20, 50, 500])
def test_in_single_precision_ours_is_diffusers_in_double_precision_to_1e_6(steps):
    config = {"timestep_spacing": "trailing"}
    ours, theirs = DDPMAncestralScheduler(**config), in_float64(DDPMScheduler(**config))
    assert largest_difference(trajectories(ours, theirs, steps, torch.sin, torch.float32)) <= 1e-6


@pytest.mark.parametrize(
    ("spacing", "schedule", "steps"),
    [
        *[(spacing, "linear", steps) for spacing in ("trailing", "leading", "linspace") for steps in (3, 50)],
        ("trailing", "linear", 1000),
        ("leading", "squaredcos_cap_v2", 20),
        ("trailing", "sigmoid", 20),
    ],
)
def test_fixed_small_is_diffusers_to_1e_10_in_double_precision(spacing, schedule, steps):
    config = {"timestep_spacing": spacing, "beta_schedule": schedule}
    states = trajectories(DDPMAncestralScheduler(**config), in_float64(DDPMScheduler(**config)), steps, torch.sin)
    # theirs has noise of standard deviation 1e-10 in a last step that is not at timestep 0
    assert max(float((x - y).abs().max()) for x, y in states) < 1e-9


@pytest.mark.parametrize(
    "config",
    [
        {"prediction_type": "sample"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "clip_sample": False},
        {"clip_sample_range": 0.3},
        {"thresholding": True, "sample_max_value": 1.5},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 100.0},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "prediction_type": "v_prediction"},
        {"variance_type": "fixed_small_log"},
        {"variance_type": "fixed_large"},
        {"steps_offset": 1},
        {"trained_betas": np.linspace(0.001, 0.2, 40).tolist()},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1},
    ],
)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_every_shared_option_is_that_of_diffusers(config, spacing):
    ours = DDPMAncestralScheduler(timestep_spacing=spacing, **config)
    config = config | ({"num_train_timesteps": 40} if "trained_betas" in config else {})
    theirs = in_float64(DDPMScheduler(timestep_spacing=spacing, **config))
    states = list(trajectories(ours, theirs, 20, lambda x: torch.sin(2 * x)))
    for x, y in states[:-1]:  # fixed_large of theirs keeps the noise of a last step that is not at timestep 0
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_learned_range_is_that_of_diffusers():
    config = {"variance_type": "learned_range", "timestep_spacing": "trailing"}
    ours, theirs = DDPMAncestralScheduler(**config), in_float64(DDPMScheduler(**config))
    states = trajectories(ours, theirs, 20, lambda x: torch.cat([torch.sin(2 * x), torch.cos(x)], dim=1))
    for x, y in list(states)[:-1]:  # theirs keeps noise in the last step
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [5, 20])
def test_fixed_small_is_ddim_with_eta_one(steps):
    config = {"timestep_spacing": "trailing", "clip_sample": False}
    ours, theirs = DDPMAncestralScheduler(**config), DDIMScheduler(**config)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.final_alpha_cumprod = theirs.final_alpha_cumprod.double()
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    x, y, mine, other = draw(2, 3), draw(2, 3), seeded(5), seeded(5)
    for t in ours.timesteps:
        x = ours.step(torch.sin(x), t, x, generator=mine).prev_sample
        y = theirs.step(torch.sin(y), t, y, eta=1.0, generator=other).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_fixed_small_is_the_ancestral_euler_step_in_variance_exploding_coordinates():
    ours = DDPMAncestralScheduler(timestep_spacing="trailing", clip_sample=False)
    theirs = EulerAncestralDiscreteScheduler(timestep_spacing="trailing", beta_start=1e-4, beta_end=0.02)
    ours.set_timesteps(20)
    theirs.set_timesteps(20)
    x, mine, other = draw(2, 3), seeded(5), seeded(5)
    y = x / point(ours, 999)[0]
    for t, (_, s) in zip(theirs.timesteps, pairs(ours), strict=True):
        theirs.scale_model_input(y, t)
        y = theirs.step(torch.sin(x), t, y, generator=other).prev_sample
        x = ours.step(torch.sin(x), int(t), x, generator=mine).prev_sample
        torch.testing.assert_close(x, y.double() * point(ours, s)[0], rtol=2e-5, atol=2e-5)


# ---- the mean -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "prediction_type"),
    [(path, "epsilon") for path in PATHS] + [(PATHS[0], prediction_type) for prediction_type in PREDICTION_TYPES[1:]],
)
def test_with_the_exact_score_the_mean_is_the_exact_posterior_mean_of_a_mixture(path, prediction_type):
    scheduler = build(timestep_spacing="karras", prediction_type=prediction_type, **path)
    scheduler.set_timesteps(9)
    x_s = torch.linspace(-12, 12, 48001, dtype=torch.float64)  # spacing 5e-4, and the narrowest density is 0.02 wide
    for t, s in pairs(scheduler):
        (alpha_t, _), (alpha_s, sigma_s) = point(scheduler, t), point(scheduler, s)
        x_t = torch.tensor([-2.0, -0.4, 0.0, 0.3, 1.1], dtype=torch.float64)[:, None]
        mean, _ = law_of_step(scheduler, predict(MIXTURE, scheduler, x_t, t), t, x_t)
        forward = -((x_t - alpha_t / alpha_s * x_s) ** 2) / (2 * forward_variance(scheduler, t, s))
        weight = (forward + MIXTURE.log_prob(x_s, alpha_s, sigma_s)).softmax(-1)  # p(x_s | x_t) on the grid
        torch.testing.assert_close(mean[:, 0], weight @ x_s, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("last_step_noise", [False, True])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_equivalent_outputs_of_the_four_prediction_types_give_the_same_step(
    prediction_type, variance_type, last_step_noise
):
    config = {"variance_type": variance_type, "last_step_noise": last_step_noise, "clip_sample": True}
    scheduler = build(prediction_type=prediction_type, **config)
    reference = build(prediction_type="epsilon", **config)
    scheduler.set_timesteps(7)
    reference.set_timesteps(7)
    x = draw(2, 2, 5)
    for t in reference.timesteps:
        steps = [
            each.step(predict(MIXTURE, each, x, t), int(t), x, generator=seeded(3)) for each in (scheduler, reference)
        ]
        torch.testing.assert_close(steps[0].prev_sample, steps[1].prev_sample, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(steps[0].pred_original_sample, steps[1].pred_original_sample, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("N", [1, 2, 9, 50])
def test_the_step_of_a_geometric_ladder_is_the_variance_exploding_ancestral_step(N):
    scheduler = build(**LADDER, timestep_spacing="karras", num_train_timesteps=50)
    scheduler.set_timesteps(N)
    for t, s in pairs(scheduler):
        (alpha, sigma), (next_alpha, next_sigma) = point(scheduler, t), point(scheduler, s)
        level, next_level = sigma / alpha, next_sigma / next_alpha
        y, z = level * draw(5, 1, seed=7), draw(5, 1, seed=3)
        score = MIXTURE.score(y, 1.0, level)  # of y = x_0 + level eps
        gap = level**2 - next_level**2
        expected = y + gap * score + math.sqrt(next_level**2 * gap / level**2) * z
        x = alpha * y
        result = scheduler.step(predict(MIXTURE, scheduler, x, t), t, x, generator=seeded(3)).prev_sample
        torch.testing.assert_close(result / next_alpha, expected, rtol=1e-9, atol=1e-9)


def test_pure_noise_is_stepped_from_with_v_prediction():
    scheduler = build(
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        variance_type="fixed_large",
    )
    scheduler.set_timesteps(4)
    (t, s), x = pairs(scheduler)[0], draw(5, 1)
    (alpha_t, sigma_t), (alpha_s, _) = point(scheduler, t), point(scheduler, s)
    assert (alpha_t, sigma_t) == (0, 1)
    output = predict(GAUSSIAN, scheduler, x, t)
    torch.testing.assert_close(output, torch.full_like(x, -M))  # nothing is known but the mean of the data
    mean, std = law_of_step(scheduler, output, t, x)
    torch.testing.assert_close(mean, torch.full_like(x, alpha_s * M))
    torch.testing.assert_close(std, torch.ones_like(x))
    scheduler = build(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing", last_step_noise=True
    )
    scheduler.set_timesteps(300)
    mean, variance = sampled_law(scheduler)
    assert mean == pytest.approx(M, rel=1e-9)
    assert variance == pytest.approx(S, rel=0.05)


# ---- the variance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("path", PATHS)
def test_each_fixed_variance_is_its_closed_form(path, spacing):
    for variance_type, expected in [
        ("fixed_small", posterior_variance),
        ("fixed_small_log", posterior_variance),
        (None, posterior_variance),
        ("fixed_large", forward_variance),
        ("fixed_large_log", forward_variance),
    ]:
        scheduler = build(variance_type=variance_type, timestep_spacing=spacing, last_step_noise=True, **path)
        scheduler.set_timesteps(6)
        for t, s in pairs(scheduler):
            _, std = law_of_step(scheduler, torch.sin(draw(3, 2)), t, draw(3, 2))
            torch.testing.assert_close(std**2, torch.full_like(std, expected(scheduler, t, s)), rtol=1e-8, atol=1e-20)


@pytest.mark.parametrize("last_step_noise", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_learned_variance_is_the_exponential_of_the_second_half_of_the_channels(path, last_step_noise):
    scheduler = build(variance_type="learned", last_step_noise=last_step_noise, **path)
    scheduler.set_timesteps(4)
    x, log_variance = draw(3, 2, 5), draw(3, 2, 5, seed=1)
    for t, s in pairs(scheduler):
        _, std = law_of_step(scheduler, torch.cat([torch.sin(x), log_variance], dim=1), t, x)
        expected = log_variance.exp().sqrt() if s >= 0 or last_step_noise else torch.zeros_like(x)
        torch.testing.assert_close(std, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_learned_range_interpolates_the_logarithms_of_the_two_fixed_variances(path):
    scheduler = build(variance_type="learned_range", last_step_noise=True, **path)
    scheduler.set_timesteps(4)
    steps = pairs(scheduler)
    x, values = draw(3, 1, 2), torch.tensor([[[-1.0, 0.0]], [[1.0, 0.5]], [[-0.5, 1.5]]], dtype=torch.float64)
    for t, s in steps:
        _, std = law_of_step(scheduler, torch.cat([torch.sin(x), values], dim=1), t, x)
        small = posterior_variance(scheduler, *((t, s) if s >= 0 else steps[-2]))  # beta-tilde of the data is 0
        large = forward_variance(scheduler, t, s)
        expected = small ** ((1 - values) / 2) * large ** ((1 + values) / 2)
        torch.testing.assert_close(std**2, expected, rtol=1e-8, atol=0)


def test_learned_range_of_a_single_step_has_one_variance():
    scheduler = build(variance_type="learned_range", last_step_noise=True, timestep_spacing="trailing")
    scheduler.set_timesteps(1)
    x = draw(3, 1)
    _, std = law_of_step(scheduler, torch.cat([torch.sin(x), draw(3, 1, seed=1)], dim=1), 999, x)
    torch.testing.assert_close(std**2, torch.full_like(x, point(scheduler, 999)[1] ** 2))


@pytest.mark.parametrize("path", PATHS)
def test_optimal_variance_is_the_exact_reverse_variance_of_gaussian_data(path):
    scheduler = build(variance_type="optimal", last_step_noise=True, timestep_spacing="karras", **path)
    scheduler.set_timesteps(6)
    x = draw(4, 1)
    for t, s in pairs(scheduler):
        _, std = law_of_step(scheduler, predict(GAUSSIAN, scheduler, x, t), t, x)
        exact = forward_variance(scheduler, t, s) * marginal_variance(scheduler, s) / marginal_variance(scheduler, t)
        torch.testing.assert_close(std**2, torch.full_like(std, exact), rtol=1e-8, atol=0)


def test_optimal_variance_is_the_average_reverse_variance_of_a_mixture():
    # Bao et al. 2022: the best isotropic variance is E Var[x_s | x_t] / d, here by integration over x_s and x_t
    scheduler = build(
        MIXTURE, variance_type="optimal", last_step_noise=True, timestep_spacing="karras", num_train_timesteps=40
    )
    scheduler.set_timesteps(6)
    x_t, x_s = (torch.linspace(-8, 8, n, dtype=torch.float64) for n in (801, 3201))
    for t, s in pairs(scheduler):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = point(scheduler, t), point(scheduler, s)
        forward = -((x_t[:, None] - alpha_t / alpha_s * x_s) ** 2) / (2 * forward_variance(scheduler, t, s))
        weight = (forward + MIXTURE.log_prob(x_s, alpha_s, sigma_s)).softmax(-1)
        reverse_variance = weight @ x_s**2 - (weight @ x_s) ** 2
        exact = float((MIXTURE.log_prob(x_t, alpha_t, sigma_t).exp() * reverse_variance).sum() * 0.02)
        _, std = law_of_step(scheduler, torch.zeros(1, 1), t, draw(1, 1))
        assert float(std) ** 2 == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("path", PATHS)
def test_optimal_variance_with_the_last_noise_samples_gaussian_data_exactly_in_any_number_of_steps(
    path, prediction_type
):
    config = {"timestep_spacing": "linspace", "prediction_type": prediction_type, "last_step_noise": True, **path}
    scheduler = build(variance_type="optimal", **config)
    for N in (1, 2, 3, 10):
        scheduler.set_timesteps(N)
        mean, variance = sampled_law(scheduler)
        assert mean == pytest.approx(M, rel=1e-9)
        assert variance == pytest.approx(S, rel=1e-8)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "optimal"])
@pytest.mark.parametrize("last_step_noise", [False, True])
@pytest.mark.parametrize("N", [1, 2, 3, 10, 40])
def test_the_sampled_variance_of_gaussian_data_is_the_closed_recursion(variance_type, last_step_noise, N):
    scheduler = build(
        variance_type=variance_type,
        last_step_noise=last_step_noise,
        timestep_spacing="trailing",
        beta_schedule="squaredcos_cap_v2",
    )
    scheduler.set_timesteps(N)
    expected = marginal_variance(scheduler, 999)
    for t, s in pairs(scheduler):
        V_t, V_s, v = (*(marginal_variance(scheduler, i) for i in (t, s)), forward_variance(scheduler, t, s))
        slope = point(scheduler, t)[0] / point(scheduler, s)[0] * V_s / V_t
        small = posterior_variance(scheduler, t, s)
        noise = {"fixed_small": small, "fixed_large": v, "optimal": v * V_s / V_t}[variance_type]
        expected = slope**2 * expected + (noise if s >= 0 or last_step_noise else 0)
    mean, variance = sampled_law(scheduler)
    assert mean == pytest.approx(M, rel=1e-9)  # E1: whatever the variance, the mean is right
    assert variance == pytest.approx(expected, rel=1e-8)
    if variance_type == "fixed_small":
        assert variance < S  # it would be right for data at one point
    if variance_type == "fixed_large" and last_step_noise:
        assert variance > S  # it would be right for data N(0, 1)
    if variance_type == "optimal" and not last_step_noise:
        t = scheduler.timesteps[-1].item()
        missing = point(scheduler, t)[1] ** 2 * S / marginal_variance(scheduler, t)
        assert variance == pytest.approx(S - missing, rel=1e-8)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_the_error_of_a_fixed_variance_is_of_first_order_in_the_step(variance_type):
    scheduler = build(variance_type=variance_type, timestep_spacing="trailing", last_step_noise=True, **LADDER)
    errors = []
    for N in (60, 120, 240):
        scheduler.set_timesteps(N)
        errors.append(abs(math.sqrt(sampled_law(scheduler)[1]) - math.sqrt(S)))
    for order in np.log2(np.divide(errors[:-1], errors[1:])):
        assert order == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_the_last_step_is_noise_free_under_every_spacing(spacing, variance_type):
    scheduler = build(variance_type=variance_type, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(5)
    x = draw(3, 2)
    for t, s in pairs(scheduler):
        steps = [scheduler.step(predict(GAUSSIAN, scheduler, x, t), t, x, generator=seeded(i)) for i in (1, 2)]
        assert torch.equal(steps[0].prev_sample, steps[1].prev_sample) == (s < 0)
    torch.testing.assert_close(steps[0].prev_sample, steps[0].pred_original_sample)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance_type", ["fixed_large", "learned", "learned_range", "optimal"])
def test_the_last_step_keeps_its_noise_if_it_is_asked_to(spacing, variance_type):
    scheduler = build(variance_type=variance_type, timestep_spacing=spacing, last_step_noise=True)
    scheduler.set_timesteps(5)
    x, t = draw(3, 2), scheduler.timesteps[-1]
    output = predict(GAUSSIAN, scheduler, x, t)
    steps = [scheduler.step(output, t, x, generator=seeded(i)).prev_sample for i in (1, 2)]
    assert not torch.equal(*steps)
    for each in steps:  # and it is the noise of the first C channels
        assert each.shape == x.shape


# ---- the statistic of the optimal variance --------------------------------------------------------------------------


class Network(torch.nn.Module):
    """The exact Gaussian model as pipelines' networks are called; it counts its calls."""

    def __init__(self, scheduler, returns_tensor):
        super().__init__()
        self.scheduler, self.returns_tensor, self.timesteps = scheduler, returns_tensor, []

    def forward(self, sample, timestep, shift=0.0):
        self.timesteps.append(timestep)
        output = predict(GAUSSIAN, self.scheduler, sample, timestep) + shift
        return output if self.returns_tensor else UNet2DOutput(output)


def standardised(n, seed):
    """Numbers of mean 0 and variance 1, exactly."""
    values = draw(n, 1, seed=seed)
    return (values - values.mean()) / values.std(correction=0)


def gaussian_data(n):
    return (M + math.sqrt(S) * draw(n, 4)).float()


@pytest.mark.parametrize("returns_tensor", [True, False])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_calibration_measures_the_mean_square_of_the_predicted_noise(prediction_type, returns_tensor):
    scheduler = build(num_train_timesteps=12, prediction_type=prediction_type, variance_type="fixed_small")
    model, data = Network(scheduler, returns_tensor), gaussian_data(5000)
    result = scheduler.calibrate_variance(model, data, generator=seeded(0))
    assert result == list(scheduler.config.mean_squared_noise)
    assert [int(t) for t in model.timesteps] == list(range(12))
    assert all(t.shape == () and not t.is_floating_point() for t in model.timesteps)
    generator = seeded(0)
    for t, measured in enumerate(result):
        alpha, sigma = point(scheduler, t)
        noise = torch.randn(data.shape, generator=generator)
        V = marginal_variance(scheduler, t)
        noise_hat = (sigma * (alpha * data + sigma * noise - alpha * M) / V).double()
        on_this_noise = noise_hat.square().mean() / noise.double().square().mean()  # the denominator is 1 on average
        if on_this_noise > 0.5:  # and E(eps - eps-hat)^2 is what is missing to 1
            on_this_noise = 1 - (noise.double() - noise_hat).square().mean()
        assert measured == pytest.approx(float(on_this_noise), rel=1e-4)
        exact = sigma**2 / V
        standard_error = exact * math.sqrt(4 * (1 - exact) / data.numel())  # eps-hat is correlated with eps by sqrt(m)
        assert abs(measured - exact) < 4 * standard_error
        assert abs(measured - 1) > 4 * standard_error  # which data at one point would have, V = sigma^2


def test_calibration_at_a_few_timesteps_interpolates_between_them():
    scheduler = build(num_train_timesteps=11)
    model = Network(scheduler, True)
    values = scheduler.calibrate_variance(model, gaussian_data(8), timesteps=[10, 0, 5, 5], generator=seeded(0))
    assert [int(t) for t in model.timesteps] == [0, 5, 10]
    assert len(values) == 11

    def data_variance(t):
        # of the Gaussian data whose statistic this is, which is 1 / (1 + S SNR)
        alpha, sigma = point(scheduler, t)
        return (1 / values[t] - 1) * (sigma / alpha) ** 2

    assert data_variance(2) == pytest.approx(data_variance(0) + 2 / 5 * (data_variance(5) - data_variance(0)))
    assert data_variance(9) == pytest.approx(data_variance(5) + 4 / 5 * (data_variance(10) - data_variance(5)))


@pytest.mark.parametrize("path", [*PATHS, FLOW])
def test_a_calibration_of_exact_gaussian_data_at_two_timesteps_is_right_at_all(path):
    scheduler = build(num_train_timesteps=12, **path)
    low, high = scheduler.train_timesteps[[1, 8]].tolist()
    data = M + math.sqrt(S) * standardised(4000, seed=1)

    def model(x, t):
        return predict(GAUSSIAN, scheduler, x, t)

    values = np.array(scheduler.calibrate_variance(model, data, [low, high], generator=seeded(3)))
    exact = np.array(mean_squared_noise(GAUSSIAN, scheduler))
    np.testing.assert_allclose(values, exact, rtol=0.1)
    np.testing.assert_allclose(1 - values, 1 - exact, rtol=0.1, atol=1e-15)  # also where it is small


def test_calibration_is_precise_where_hardly_any_signal_is_left():
    # on a flow path 1 - E||eps-hat||^2 / d is S / T^2 one timestep before pure noise, and the noise is not exactly 1
    scheduler = build(variance_type="optimal", mean_squared_noise=[0.5] * 1000, last_step_noise=True, **FLOW)
    data = M + math.sqrt(S) * standardised(4000, seed=1)
    scheduler.calibrate_variance(
        lambda x, t: predict(GAUSSIAN, scheduler, x, t), data, [1000, 950, 500, 5], generator=seeded(3)
    )
    scheduler.set_timesteps(10)
    (t, s), x = pairs(scheduler)[0], draw(4, 1)
    assert t == 1000
    _, std = law_of_step(scheduler, predict(GAUSSIAN, scheduler, x, t), t, x)
    torch.testing.assert_close(std**2, torch.full_like(std, marginal_variance(scheduler, s)), rtol=0.01, atol=0)


def test_calibrated_variance_and_placement_together_sample_gaussian_data_exactly():
    # the first jump of optimal levels begins at pure noise, where the signal to measure by is a few times 1e-5
    data = M + math.sqrt(S) * draw(256, 64)
    scheduler = build(variance_type="optimal", mean_squared_noise=[0.5] * 1000, last_step_noise=True)

    def model(x, t):
        return predict(GAUSSIAN, scheduler, x, t)

    calibrate_spacing(scheduler, model, data, timesteps=range(0, 1000, 111), generator=seeded(2))
    scheduler.calibrate_variance(model, data, range(0, 1000, 50), generator=seeded(3))
    scheduler = DDPMAncestralScheduler.from_config(scheduler.config, timestep_spacing="optimal")
    scheduler.set_timesteps(10)
    variance = 1.0
    for t, _ in pairs(scheduler):
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        mean, std = law_of_step(scheduler, predict(GAUSSIAN, scheduler, x, t), t, x)
        variance = float(mean[1] - mean[0]) ** 2 * variance + float(std.flatten()[0]) ** 2
    assert variance == pytest.approx(S, rel=0.02)


def test_a_calibration_that_cannot_be_is_refused():
    scheduler, data = build(num_train_timesteps=12), gaussian_data(4)
    model = Network(scheduler, True)
    for timesteps in ([-1], [12], []):
        with pytest.raises(ValueError, match=r"timesteps must be train timesteps, 0 \.\. 11, got"):
            scheduler.calibrate_variance(model, data, timesteps)
    for nothing in (data[:0], [data]):
        with pytest.raises(ValueError, match="must be one batch of data"):
            scheduler.calibrate_variance(model, nothing, [3])
    with pytest.raises(ValueError, match="not finite"):
        scheduler.calibrate_variance(model, data * math.nan, [3])


@pytest.mark.parametrize("steps", [1, 2])
def test_learned_variance_keeps_its_last_noise_after_corrections_too(steps):
    settings = {"variance_type": "learned_range", "last_step_noise": True, "clip_sample": False}
    scheduler = PredictorCorrectorScheduler(**settings, corrector_steps=steps)
    plain = DDPMAncestralScheduler(**settings)
    x = draw(2, 3)
    output = torch.cat([torch.sin(x), torch.cos(x)], dim=1)
    for each in (scheduler, plain):
        each.set_timesteps(5)
    ends = [each.step(output, each.timesteps[-1], x, generator=seeded(1)).prev_sample for each in (scheduler, plain)]
    torch.testing.assert_close(*ends)


def test_calibration_passes_conditions_on_and_draws_each_sample_from_its_own_generator():
    scheduler = build(num_train_timesteps=6)
    model, data = Network(scheduler, True), gaussian_data(2)
    plain = scheduler.calibrate_variance(model, data, [3], [seeded(0), seeded(1)])
    again = scheduler.calibrate_variance(model, data, [3], [seeded(0), seeded(1)])
    assert plain == again
    assert plain != scheduler.calibrate_variance(model, data, [3], [seeded(0), seeded(2)])
    assert plain != scheduler.calibrate_variance(model, data, [3], [seeded(0), seeded(1)], shift=0.5)


def test_calibration_records_no_gradient_and_takes_half_precision():
    scheduler, recorded = build(num_train_timesteps=6), []
    layer = torch.nn.Linear(4, 4, dtype=torch.bfloat16)

    def model(x, t):
        recorded.append(torch.is_grad_enabled())
        return layer(x)

    values = scheduler.calibrate_variance(model, gaussian_data(3).bfloat16(), generator=seeded(0))
    assert all(isinstance(value, float) and math.isfinite(value) for value in values)
    assert recorded == [False] * 6


def test_the_statistic_survives_saving_and_every_copy(tmp_path):
    scheduler = DDPMAncestralScheduler(num_train_timesteps=12, clip_sample=False, variance_type="optimal")
    values = scheduler.calibrate_variance(Network(scheduler, True), gaussian_data(100), generator=seeded(0))
    scheduler.save_pretrained(tmp_path)
    copies = [
        DDPMAncestralScheduler.from_pretrained(tmp_path),
        DDPMAncestralScheduler.from_config(scheduler.config),
        DDPMAncestralScheduler.from_config(scheduler.config, timestep_spacing="trailing"),
        DDPMAncestralScheduler.from_config(DDPMAncestralScheduler.from_pretrained(tmp_path).config),
        DDPMAncestralScheduler.from_config(
            DDIMScheduler.from_config(scheduler.config).config, variance_type="optimal"
        ),
    ]
    for each in copies:
        assert each.config.mean_squared_noise == values
        assert each.config.variance_type == "optimal"
        assert each.config.num_train_timesteps == 12
    assert copies[2].config.timestep_spacing == "trailing"
    assert copies[1].config.timestep_spacing == "leading"  # other defaults stay defaults


def test_optimal_without_a_statistic_says_how_to_get_one():
    scheduler = DDPMAncestralScheduler(variance_type="optimal")
    with pytest.raises(ValueError, match="call calibrate_variance first"):
        scheduler.step(torch.zeros(1, 2), 999, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="call calibrate_variance first"):
        scheduler.reverse_law(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([9]))


@pytest.mark.parametrize("path", [{"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, FLOW])
@pytest.mark.parametrize("N", [1, 2, 5])
def test_optimal_variance_is_exact_from_pure_noise_on(N, path):
    # where there is no signal the statistic is 1 whatever the data; the nearest level with signal knows more
    scheduler = build(variance_type="optimal", last_step_noise=True, timestep_spacing="trailing", **path)
    scheduler.set_timesteps(N)
    assert point(scheduler, scheduler.timesteps[0]) == (0, 1)
    mean, variance = sampled_law(scheduler)
    assert mean == pytest.approx(M, rel=1e-6)
    assert variance == pytest.approx(S, rel=1e-6)


def test_calibration_on_pure_noise_needs_a_prediction_that_tells_the_data():
    epsilon = DDPMAncestralScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="timestep 999 has no signal .* prediction_type='epsilon'"):
        epsilon.calibrate_variance(lambda x, t: x, torch.zeros(2, 3), timesteps=[999])


def test_a_chain_of_pure_noise_alone_has_an_optimal_variance_of_what_it_knows():
    scheduler = build(variance_type="optimal", num_train_timesteps=1, mean_squared_noise=[1.0], **FLOW)
    scheduler = DDPMAncestralScheduler.from_config(scheduler.config, last_step_noise=True)
    _, std = law_of_step(scheduler, draw(2, 3), 1.0, draw(2, 3))
    assert (std == 0).all()


# ---- the variance of each coordinate, from the network --------------------------------------------------------------


COORDINATES = Gaussian(torch.tensor([0.3, -0.5, 1.0]), variance=torch.tensor([0.04, 0.5, 2.0]))


def with_certainty(law, scheduler, x, t):
    """The best network's two heads: its prediction and alpha^2 / sigma^2 Var[x_0 | x_t] of each coordinate."""
    alpha, sigma = point(scheduler, t)
    values = (alpha / sigma) ** 2 * law.posterior_variance(x, alpha, sigma)
    return torch.cat([predict_one(law, scheduler, x, t), values], dim=1)


def predict_one(law, scheduler, x, t):
    return law.prediction(scheduler.config.prediction_type, x, *point(scheduler, t))


@pytest.mark.parametrize("path", [*PATHS, {"prediction_type": "v_prediction"}, FLOW])
def test_posterior_variance_is_the_exact_reverse_variance_of_each_coordinate(path):
    scheduler = build(variance_type="posterior", last_step_noise=True, timestep_spacing="karras", **path)
    scheduler.set_timesteps(7)
    x, data_variance = draw(4, 3), torch.tensor([0.04, 0.5, 2.0], dtype=torch.float64)
    for t, s in pairs(scheduler):
        output = with_certainty(COORDINATES, scheduler, x, t)
        mean, std = law_of_step(scheduler, output, t, x)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = point(scheduler, t), point(scheduler, s)
        V_t, V_s = alpha_t**2 * data_variance + sigma_t**2, alpha_s**2 * data_variance + sigma_s**2
        slope, data_mean = alpha_t / alpha_s * V_s / V_t, torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64)
        expected = alpha_s * data_mean + slope * (x - alpha_t * data_mean)
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-6)
        exact = forward_variance(scheduler, t, s) * V_s / V_t
        torch.testing.assert_close(std**2, exact.expand(4, 3), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("path", [*PATHS, FLOW])
def test_posterior_variance_is_the_exact_reverse_variance_of_each_state_of_a_mixture(path):
    scheduler = build(variance_type="posterior", last_step_noise=True, num_train_timesteps=40, **path)
    timesteps = [float(t) for t in scheduler.train_timesteps[[35, 20, 4]]]
    scheduler.set_timesteps(timesteps=timesteps)
    x_s = torch.linspace(-12, 12, 48001, dtype=torch.float64)
    x_t = torch.tensor([-2.0, -0.4, 0.0, 0.3, 1.1], dtype=torch.float64)[:, None]
    for t, s in pairs(scheduler):
        (alpha_t, _), (alpha_s, sigma_s) = point(scheduler, t), point(scheduler, s)
        if s < 0:
            exact = MIXTURE.posterior_variance(x_t, *point(scheduler, t))[:, 0]
        else:
            forward = -((x_t - alpha_t / alpha_s * x_s) ** 2) / (2 * forward_variance(scheduler, t, s))
            weight = (forward + MIXTURE.log_prob(x_s, alpha_s, sigma_s)).softmax(-1)
            exact = weight @ x_s**2 - (weight @ x_s) ** 2
        output = with_certainty(MIXTURE, scheduler, x_t, t)
        _, std = law_of_step(scheduler, output, t, x_t)
        torch.testing.assert_close(std[:, 0] ** 2, exact, rtol=1e-6, atol=1e-9)


def test_negative_values_of_a_posterior_head_are_no_uncertainty():
    scheduler = build(variance_type="posterior")
    scheduler.set_timesteps(5)
    t, s = pairs(scheduler)[2]
    x = draw(2, 2)
    values = torch.tensor([[-0.5, 0.0], [1.0, 1.0]], dtype=torch.float64)
    _, std = law_of_step(scheduler, torch.cat([x, values], dim=1), t, x)
    small = posterior_variance(scheduler, t, s)
    (alpha_t, sigma_t), (alpha_s, _) = point(scheduler, t), point(scheduler, s)
    all_of_it = (alpha_s * forward_variance(scheduler, t, s) / (sigma_t * alpha_t)) ** 2
    expected = torch.tensor([[small] * 2, [small + all_of_it] * 2], dtype=torch.float64)
    torch.testing.assert_close(std**2, expected)


@pytest.mark.parametrize("path", [{"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, FLOW])
def test_a_posterior_head_says_nothing_about_pure_noise_and_the_error_dies_out(path):
    scheduler = build(variance_type="posterior", last_step_noise=True, timestep_spacing="trailing", **path)
    scheduler.set_timesteps(20)
    (t, s), x = pairs(scheduler)[0], draw(4, 1)
    _, std = law_of_step(scheduler, with_certainty(GAUSSIAN, scheduler, x, t), t, x)
    torch.testing.assert_close(std**2, torch.full_like(x, posterior_variance(scheduler, t, s)))
    law = scheduler.reverse_law(with_certainty(GAUSSIAN, scheduler, x, t), x, *(torch.full((4,), i) for i in (t, s)))
    torch.testing.assert_close(law[1].exp(), torch.full_like(x, posterior_variance(scheduler, t, s)))
    mean, variance = 0.0, 1.0
    probes = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t in scheduler.timesteps:
        (offset, end), std = law_of_step(scheduler, with_certainty(GAUSSIAN, scheduler, probes, t), t, probes)
        slope = float(end - offset)
        mean, variance = float(offset) + slope * mean, slope**2 * variance + float(std[0]) ** 2
    assert mean == pytest.approx(M, rel=1e-6)
    assert variance == pytest.approx(S, rel=1e-4)


def test_a_network_that_explains_more_than_all_noise_leaves_no_negative_variance():
    scheduler = DDPMAncestralScheduler(variance_type="optimal", mean_squared_noise=[1.2] * 1000, clip_sample=False)
    scheduler.set_timesteps(5)
    t, s = pairs(scheduler)[1]
    _, std = law_of_step(scheduler, draw(2, 3), t, draw(2, 3))
    torch.testing.assert_close(std**2, torch.full_like(std, posterior_variance(scheduler, t, s)))
    _, log_variance, _ = scheduler.reverse_law(draw(2, 3), draw(2, 3), torch.tensor([t, t]), torch.tensor([s, s]))
    torch.testing.assert_close(log_variance.exp(), torch.full((2, 1), posterior_variance(scheduler, t, s)).double())


# ---- flow-matching models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"timestep_spacing": "karras"}, {"shift_terminal": 0.05}])
def test_on_a_flow_path_the_mean_is_the_exact_posterior_mean_of_a_mixture(config):
    scheduler = build(**FLOW, **config)
    scheduler.set_timesteps(9)
    x_s = torch.linspace(-12, 12, 96001, dtype=torch.float64)
    x_t = torch.tensor([-2.0, -0.4, 0.0, 0.3, 1.1], dtype=torch.float64)[:, None]
    for t, s in pairs(scheduler):
        (alpha_t, _), (alpha_s, sigma_s) = point(scheduler, t), point(scheduler, s)
        mean, _ = law_of_step(scheduler, predict(MIXTURE, scheduler, x_t, t), t, x_t)
        forward = -((x_t - alpha_t / alpha_s * x_s) ** 2) / (2 * forward_variance(scheduler, t, s))
        weight = (forward + MIXTURE.log_prob(x_s, alpha_s, sigma_s)).softmax(-1)
        torch.testing.assert_close(mean[:, 0], weight @ x_s, rtol=2e-6, atol=2e-6)  # times are float32


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "optimal", "posterior", "learned_range"])
def test_the_first_step_of_a_flow_draws_from_the_data_as_seen_in_pure_noise(variance_type):
    scheduler = build(variance_type=variance_type, shift=3.0, **FLOW)
    scheduler.set_timesteps(10)
    (t, s), x = pairs(scheduler)[0], draw(5, 1)
    (alpha_s, sigma_s), output = point(scheduler, s), predict(GAUSSIAN, scheduler, x, t)
    assert point(scheduler, t) == (0, 1)
    mean, std = law_of_step(scheduler, output, t, x)
    torch.testing.assert_close(mean, torch.full_like(x, alpha_s * M))  # E[x_s] whatever x_t is
    expected = {
        "fixed_small": sigma_s**2,
        "fixed_large": 1.0,
        "optimal": alpha_s**2 * S + sigma_s**2,
        "posterior": sigma_s**2,  # the head says nothing about pure noise
        "learned_range": sigma_s,  # the geometric mean of the first two
    }[variance_type]
    torch.testing.assert_close(std**2, torch.full_like(x, expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_optimal_variance_samples_gaussian_data_exactly_on_a_flow_path(spacing, shift):
    scheduler = build(variance_type="optimal", last_step_noise=True, timestep_spacing=spacing, shift=shift, **FLOW)
    for N in (1, 2, 3, 10):  # with times between the train timesteps, where the statistic is interpolated
        scheduler.set_timesteps(N)
        mean, variance = sampled_law(scheduler)
        assert mean == pytest.approx(M, rel=1e-6)
        assert variance == pytest.approx(S, rel=1e-6)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_on_a_flow_path_the_variance_is_the_closed_recursion_and_its_error_of_first_order(variance_type):
    scheduler, errors = build(variance_type=variance_type, timestep_spacing="trailing", **FLOW), []
    for N in (100, 200, 400):
        scheduler.set_timesteps(N)
        expected = 1.0
        for t, s in pairs(scheduler):
            V_t, V_s = marginal_variance(scheduler, t), marginal_variance(scheduler, s)
            slope = point(scheduler, t)[0] / point(scheduler, s)[0] * V_s / V_t
            noise = {"fixed_small": posterior_variance, "fixed_large": forward_variance}[variance_type]
            expected = slope**2 * expected + (noise(scheduler, t, s) if s >= 0 else 0.0)
        mean, variance = sampled_law(scheduler)
        assert mean == pytest.approx(M, rel=1e-6)
        assert variance == pytest.approx(expected, rel=1e-6)
        errors.append(abs(variance - S))
    assert errors[-1] < 0.02
    for order in np.log2(np.divide(errors[:-1], errors[1:])):
        assert order == pytest.approx(1, abs=0.1)


def test_a_flow_and_a_variance_preserving_path_of_equal_ratios_take_the_same_steps():
    # x on the flow path is x / sqrt(alpha^2 + sigma^2) on the other, and the laws between levels go along
    flow, ladder = build(**FLOW), build(beta_schedule="geometric", sigma_min=0.01, sigma_max=30.0)
    ladder.set_timesteps(8)
    ratios = [point(ladder, t)[1] / point(ladder, t)[0] for t, _ in pairs(ladder)]
    flow.set_timesteps(timesteps=[1000 * r / (1 + r) for r in ratios])
    for (t, s), (u, _) in zip(pairs(flow), pairs(ladder), strict=True):
        here, there = (math.hypot(*point(flow, each)) for each in (t, s))
        x = draw(4, 2)
        one = flow.step(predict(MIXTURE, flow, here * x, t), t, here * x, generator=seeded(1))
        other = ladder.step(predict(MIXTURE, ladder, x, u), u, x, generator=seeded(1))
        torch.testing.assert_close(one.pred_original_sample, other.pred_original_sample, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.prev_sample / there, other.prev_sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_the_reverse_law_on_a_flow_path_is_that_of_the_step(variance_type):
    scheduler = build(variance_type=variance_type, last_step_noise=True, shift=3.0, **FLOW)
    scheduler.set_timesteps(6)
    steps, x = pairs(scheduler), draw(3, 2, 5)
    for t, s in steps if variance_type != "fixed_small" else steps[:-1]:
        output = predict(GAUSSIAN, scheduler, x, t)
        if is_learned(scheduler):
            output[:, 2:] = draw(3, 2, 5, seed=4)
        mean, std = law_of_step(scheduler, output, t, x)
        levels = (torch.full((3,), max(i, 0), dtype=torch.float64) for i in (t, s))
        law_mean, log_variance, x_0 = scheduler.reverse_law(output, x, *levels)
        torch.testing.assert_close(law_mean, mean, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close((log_variance / 2).exp().expand(x.shape), std, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(x_0, GAUSSIAN.denoise(x, *point(scheduler, t)), rtol=1e-8, atol=1e-8)


def test_between_two_train_timesteps_the_reverse_law_and_the_step_read_the_same_statistic():
    statistic = [0.9, 0.2, 0.7, 0.4, 1.0]
    scheduler = build(
        variance_type="optimal", num_train_timesteps=5, mean_squared_noise=statistic, last_step_noise=True, **FLOW
    )
    scheduler.set_timesteps(timesteps=[4.5, 3.25, 1.75, 0.5])
    x = draw(2, 3)
    for t, s in pairs(scheduler):
        _, std = law_of_step(scheduler, x, t, x)
        levels = (torch.full((2,), max(i, 0), dtype=torch.float64) for i in (t, s))
        _, log_variance, _ = scheduler.reverse_law(x, x, *levels)
        torch.testing.assert_close((log_variance / 2).exp().expand(x.shape), std)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_a_step_of_a_flow_keeps_the_dtype_and_is_finite_from_pure_noise_to_the_data(variance_type, dtype):
    scheduler = build(variance_type=variance_type, shift=3.0, last_step_noise=True, **FLOW)
    scheduler.set_timesteps(6)
    x = draw(2, 2, 3).to(dtype)
    for t in scheduler.timesteps:
        output = draw(2, 4 if is_learned(scheduler) else 2, 3, seed=1).to(dtype)
        result = scheduler.step(output, t, x, generator=seeded(1))
        upcast = torch.promote_types(dtype, torch.float32)
        wide = scheduler.step(output.to(upcast), t, x.to(upcast), generator=seeded(1))
        for name in ("prev_sample", "pred_original_sample"):
            assert result[name].dtype is dtype
            assert torch.equal(result[name], wide[name].to(dtype))
        x = result.prev_sample
        assert x.isfinite().all()


# ---- the law of the model, for likelihoods --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "prediction_type", "shape"),
    [
        *[(PATHS[0], prediction_type, (3, 2, 5)) for prediction_type in PREDICTION_TYPES],
        *[(LADDER, "epsilon", shape) for shape in SHAPES[1:]],
    ],
)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_the_reverse_law_is_the_law_of_the_step(path, variance_type, prediction_type, shape):
    scheduler = build(variance_type=variance_type, prediction_type=prediction_type, last_step_noise=True, **path)
    scheduler.set_timesteps(5)
    x = draw(*shape)
    steps = pairs(scheduler)
    for t, s in steps if variance_type != "fixed_small" else steps[:-1]:  # whose last step has no variance
        output = predict(GAUSSIAN, scheduler, x, t)
        if is_learned(scheduler):
            output[:, shape[1] :] = draw(*shape, seed=4)
        mean, std = law_of_step(scheduler, output, t, x)
        full = (torch.full((3,), i) for i in (t, s))
        law_mean, log_variance, x_0 = scheduler.reverse_law(output, x, *full)
        torch.testing.assert_close(law_mean, mean, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close((log_variance / 2).exp().expand(shape), std, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(x_0, GAUSSIAN.denoise(x, *point(scheduler, t)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_at_the_data_the_smallest_variance_is_that_of_the_step_before(variance_type):
    scheduler = build(variance_type=variance_type)
    output = torch.full((2, 2), -1.0, dtype=torch.float64)[:, : 2 if is_learned(scheduler) else 1]
    x, zero, data = draw(2, 1), torch.tensor([0, 0]), torch.tensor([-1, -1])
    whole_chain = math.log(posterior_variance(scheduler, 1, 0))
    for steps in (1000, 5):
        scheduler.set_timesteps(steps)
        # a schedule for sampling does not change the bound of the trained chain
        torch.testing.assert_close(scheduler.reverse_law(output, x, zero)[1], torch.full_like(x, whole_chain))
    before_the_last = math.log(posterior_variance(scheduler, *pairs(scheduler)[-2]))
    torch.testing.assert_close(scheduler.reverse_law(output, x, zero, data)[1], torch.full_like(x, before_the_last))


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES[:4])
def test_the_reverse_law_of_a_chain_of_one_level_has_the_variance_of_its_only_step(variance_type):
    scheduler = build(variance_type=variance_type, num_train_timesteps=1)
    x = draw(2, 1)
    _, log_variance, _ = scheduler.reverse_law(predict(GAUSSIAN, scheduler, x, 0), x, torch.zeros(2).long())
    expected = 0.0 if variance_type == "learned" else math.log(1e-4)
    torch.testing.assert_close(log_variance, torch.full_like(x, expected), rtol=1e-3, atol=0)


def test_the_reverse_law_takes_each_sample_at_its_own_levels_and_clips_nothing():
    scheduler = build(clip_sample=True, variance_type="fixed_large")
    output, x = 5 * draw(4, 2), draw(4, 2, seed=1)
    t, s = torch.tensor([999, 700, 1, 0]), torch.tensor([998, 100, 0, -1])
    mean, log_variance, x_0 = scheduler.reverse_law(output, x, t, s)
    assert x_0.abs().max() > 1
    for i in range(4):
        a, b = point(scheduler, int(t[i])), point(scheduler, int(s[i]))
        v = forward_variance(scheduler, int(t[i]), int(s[i]))
        torch.testing.assert_close(x_0[i], (x[i] - a[1] * output[i]) / a[0])
        expected = a[0] / b[0] * b[1] ** 2 / a[1] ** 2 * x[i] + b[0] * v / a[1] ** 2 * x_0[i]
        torch.testing.assert_close(mean[i], expected)
        assert float(log_variance[i]) == pytest.approx(math.log(v), rel=1e-9)
    without_s = scheduler.reverse_law(output, x, t)
    torch.testing.assert_close(without_s, scheduler.reverse_law(output, x, t, t - 1), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_the_reverse_law_of_low_precision_is_computed_in_float32(variance_type, dtype):
    scheduler = build(variance_type=variance_type)
    x, t = draw(8, 1).to(dtype), torch.tensor([0, 1, 5, 20, 100, 500, 998, 999])
    output = draw(8, 2 if is_learned(scheduler) else 1, seed=1).to(dtype)
    results = scheduler.reverse_law(output, x, t)
    exact = scheduler.reverse_law(output.double(), x.double(), t)
    for result, expected in zip(results, exact, strict=True):
        assert result.dtype is torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=2e-4, atol=2e-4)


# ---- what a step keeps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("restriction", [{"clip_sample": False}, {"clip_sample": True}, {"thresholding": True}])
def test_a_step_is_elementwise_for_any_shape(shape, restriction):
    scheduler = build(**restriction)
    scheduler.set_timesteps(5)
    x, t = draw(*shape), scheduler.timesteps[2]
    result = scheduler.step(0.1 * x, t, x, generator=seeded(1))
    flat = scheduler.step(0.1 * x.reshape(3, -1), t, x.reshape(3, -1), generator=seeded(1))
    assert torch.equal(result.prev_sample, flat.prev_sample.reshape(shape))
    assert torch.equal(result.pred_original_sample, flat.pred_original_sample.reshape(shape))


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("restriction", [{"clip_sample": False}, {"clip_sample": True}, {"thresholding": True}])
def test_a_sample_does_not_depend_on_its_neighbours(restriction, variance_type):
    scheduler = build(variance_type=variance_type, **restriction)
    scheduler.set_timesteps(5)
    start = draw(4, 2, 3)

    def sample(rows):
        generators, x = [seeded(i) for i in rows], start[rows]
        for t in scheduler.timesteps:
            output = torch.cat([torch.sin(3 * x), torch.cos(x)], dim=1)[:, : 4 if is_learned(scheduler) else 2]
            x = scheduler.step(output, t, x, generator=generators).prev_sample
        return x

    together = sample([0, 1, 2, 3])
    for i in range(4):
        assert torch.equal(sample([i]), together[i : i + 1])
    assert torch.equal(sample([2, 0]), together[[2, 0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("restriction", [{"clip_sample": True}, {"thresholding": True}])
def test_a_step_keeps_the_dtype_and_computes_in_float32_at_least(dtype, variance_type, restriction):
    scheduler = build(variance_type=variance_type, **restriction)
    scheduler.set_timesteps(5)
    x = draw(2, 2, 3).to(dtype)
    output = draw(2, 4 if is_learned(scheduler) else 2, 3, seed=1).to(dtype)
    working = torch.promote_types(dtype, torch.float32)
    for t in scheduler.timesteps:
        result = scheduler.step(output, t, x, generator=seeded(1))
        upcast = scheduler.step(output.to(working), t, x.to(working), generator=seeded(1))
        for name in ("prev_sample", "pred_original_sample"):
            assert result[name].dtype is dtype
            assert torch.equal(result[name], upcast[name].to(dtype))


def test_the_tuple_holds_the_fields_of_the_output():
    scheduler = build(clip_sample=True)
    x = draw(2, 3)
    output = scheduler.step(torch.sin(x), 999, x, generator=seeded(1))
    assert isinstance(output, GaussianPathSchedulerOutput)
    pair = scheduler.step(torch.sin(x), 999, x, generator=seeded(1), return_dict=False)
    assert isinstance(pair, tuple)
    assert len(pair) == 2
    assert torch.equal(pair[0], output.prev_sample)
    assert torch.equal(pair[1], output.pred_original_sample)
    alpha, sigma = point(scheduler, 999)
    torch.testing.assert_close(pair[1], ((x - sigma * torch.sin(x)) / alpha).clamp(-1, 1))


def test_a_step_leaves_its_inputs_alone_and_is_differentiable():
    scheduler = build()
    x, output = draw(2, 3), draw(2, 3, seed=1).requires_grad_()
    before = x.clone(), output.detach().clone()
    scheduler.step(output, 500, x, generator=seeded(1)).prev_sample.sum().backward()
    assert torch.equal(x, before[0])
    assert torch.equal(output.detach(), before[1])
    assert (output.grad != 0).all()


def test_without_a_generator_the_noise_is_that_of_the_global_one():
    scheduler, x = build(), draw(2, 3)
    torch.manual_seed(7)
    first = scheduler.step(x, 500, x).prev_sample
    second = scheduler.step(x, 500, x).prev_sample
    torch.manual_seed(7)
    assert torch.equal(scheduler.step(x, 500, x).prev_sample, first)
    assert not torch.equal(first, second)


def test_dynamic_thresholding_scales_by_the_quantile_between_one_and_its_largest_value():
    x_0 = torch.tensor([[0.1, -0.5, 0.9], [0.5, -3.0, 2.0], [-8.0, 30.0, 20.0]], dtype=torch.float64)
    scheduler = build(
        thresholding=True, dynamic_thresholding_ratio=0.5, sample_max_value=10.0, prediction_type="sample"
    )
    result = scheduler.step(x_0, 500, x_0).pred_original_sample
    # medians of |x_0|: 0.5, which becomes 1; 2; 20, which becomes 10
    expected = torch.tensor([[0.1, -0.5, 0.9], [0.25, -1.0, 1.0], [-0.8, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (
            {},
            {"model_output": (2, 4)},
            r"sample of shape \(2, 3\) need a model output of shape \(2, 3\), got \(2, 4\)",
        ),
        ({}, {"model_output": (2, 6)}, r"variance_type='fixed_small'.* got \(2, 6\)"),
        ({}, {"model_output": (1, 3)}, r"got \(1, 3\)"),
        ({"variance_type": "learned"}, {"model_output": (2, 3)}, r"model output of shape \(2, 6\), got \(2, 3\)"),
        ({"variance_type": "learned_range"}, {"model_output": (2, 3)}, r"shape \(2, 6\), got \(2, 3\)"),
        ({"variance_type": "learned"}, {"sample": (2,)}, r"needs a channel axis, got a sample of shape \(2,\)"),
        ({}, {"generator": [seeded(0)] * 3}, r"one per sample, 2, got 3"),
        ({}, {"timestep": 1000}, r"timestep 1000 is not one of the 1000"),
    ],
)
def test_arguments_of_a_step_that_do_not_fit_are_refused(config, arguments, message):
    arguments = {"model_output": (2, 3), "timestep": 500, "sample": (2, 3)} | arguments
    arguments |= {name: torch.zeros(arguments[name]) for name in ("model_output", "sample")}
    with pytest.raises(ValueError, match=message):
        DDPMAncestralScheduler(**config).step(**arguments)


def test_a_sample_of_integers_is_refused():
    with pytest.raises(ValueError, match="floating-point tensors, got torch.int64"):
        DDPMAncestralScheduler().step(torch.zeros(1, 2), 5, torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"variance_type": "other"}, "variance_type must be one of .* got 'other'"),
        ({"mean_squared_noise": [0.5] * 3}, "one value per train timestep, 1000, got 3"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        DDPMAncestralScheduler(**config)


# ---- nothing waits for a device -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("restriction", [{"clip_sample": True}, {"thresholding": True}])
def test_a_step_reads_no_value_of_a_device(variance_type, prediction_type, restriction):
    # tensors on the meta device have no values: reading one raises
    scheduler = build(
        variance_type=variance_type, prediction_type=prediction_type, last_step_noise=True, **restriction
    )
    scheduler.set_timesteps(4, device="meta")
    x = torch.empty(2, 3, 5, device="meta")
    output = torch.empty(2, 6 if is_learned(scheduler) else 3, 5, device="meta")
    for i, t in enumerate(scheduler.timesteps):
        assert t.device.type == "meta"
        assert scheduler.step(output, t, x).prev_sample.device.type == "meta"
        assert scheduler.step_index == i + 1
    with pytest.raises(RuntimeError):
        int(t)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", [lambda t: t, lambda t: t.clone()])
def test_a_run_on_a_gpu_never_waits_for_it(form):
    scheduler = build()
    scheduler.set_timesteps(10, device="cuda")
    scheduler.set_begin_index(0)
    x, timesteps = torch.randn(2, 3, 8, 8, device="cuda"), torch.zeros(2, dtype=torch.long, device="cuda")
    scheduler.add_noise(x, x, timesteps)  # moves the table once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in scheduler.timesteps:
            x = scheduler.step(torch.sin(x), form(t), x).prev_sample
            scheduler.add_noise(x, x, t)
            scheduler.add_noise(x, x, timesteps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert scheduler.step_index == 10


# ---- saved, loaded, and in the place of the schedulers of Diffusers -------------------------------------------------

OURS_ALONE = {
    *("sigma_min", "sigma_max", "last_step_noise", "mean_squared_noise", "denoising_error"),
    *("shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal"),
}
COMPATIBLE = [
    each
    for each in sorted(DDPMAncestralScheduler().compatibles, key=lambda each: each.__name__)  # they are a set
    if each is not NeedsTorchsde and each.__module__ != "annealers"
]
SHARED = {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.03, "beta_schedule": "scaled_linear"}


class Messages(logging.Handler):
    """Collects what Diffusers logs at level INFO and above."""

    def __init__(self):
        super().__init__()
        self.texts, self.logger = [], logging.getLogger("diffusers")

    def __enter__(self):
        self.level_before = self.logger.level
        self.logger.addHandler(self)
        self.logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *_):
        self.logger.removeHandler(self)
        self.logger.setLevel(self.level_before)

    def emit(self, record):
        if "was not found in config" not in record.getMessage():  # a note on defaults, of every scheduler of theirs
            self.texts.append(record.getMessage())


def settings(scheduler):
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def test_the_name_that_a_saved_pipeline_records_is_public():
    assert DDPMAncestralScheduler.__module__ == "annealers"
    assert issubclass(DDPMAncestralScheduler, GaussianPathScheduler)


def test_shared_settings_have_the_names_and_defaults_of_diffusers_and_none_is_passed_on_unnamed():
    ours = inspect.signature(DDPMAncestralScheduler.__init__).parameters
    theirs = inspect.signature(DDPMScheduler.__init__).parameters
    assert set(theirs) <= set(ours)
    assert set(ours) - set(theirs) == OURS_ALONE
    assert all(ours[name].default == theirs[name].default for name in theirs)
    assert all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in ours.values())
    assert list(inspect.signature(DDPMAncestralScheduler.step).parameters) == list(
        inspect.signature(DDPMScheduler.step).parameters
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"variance_type": "fixed_large", "timestep_spacing": "karras", "clip_sample_range": 2.0},
        {"prediction_type": "score", "num_train_timesteps": 30, **LADDER},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "last_step_noise": True},
        {"trained_betas": np.linspace(0.01, 0.3, 20)},
        {"trained_betas": [0.1, 0.2, 0.3], "variance_type": "optimal", "mean_squared_noise": [0.2, 0.6, 0.9]},
    ],
)
def test_a_saved_scheduler_takes_the_same_steps(config, tmp_path):
    scheduler = DDPMAncestralScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    json.loads((tmp_path / "scheduler_config.json").read_text())
    with Messages() as messages:
        loaded = DDPMAncestralScheduler.from_pretrained(tmp_path)
    assert messages.texts == []
    assert {name: np.asarray(value).tolist() for name, value in settings(scheduler).items()} == settings(loaded)
    assert torch.equal(loaded.betas, scheduler.betas)
    x = draw(2, 3)
    for each in (scheduler, loaded):
        each.set_timesteps(3)
    for t in scheduler.timesteps:
        steps = [each.step(torch.sin(x), int(t), x, generator=seeded(2)).prev_sample for each in (scheduler, loaded)]
        assert torch.equal(*steps)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_a_copy_goes_on_where_the_original_stands(duplicate):
    scheduler, x = build(), draw(2, 3)
    scheduler.set_timesteps(4)
    scheduler.step(torch.sin(x), scheduler.timesteps[0], x)
    copied = duplicate(scheduler)
    assert (copied.step_index, copied.timesteps.tolist()) == (1, scheduler.timesteps.tolist())
    for timesteps in (scheduler.timesteps, copied.timesteps):
        steps = [each.step(torch.sin(x), timesteps[1], x, generator=seeded(2)) for each in (scheduler, copied)]
        assert torch.equal(steps[0].prev_sample, steps[1].prev_sample)


@pytest.mark.parametrize("theirs", COMPATIBLE, ids=lambda each: each.__name__)
def test_ours_takes_the_place_of_each_scheduler_of_diffusers_and_gives_it_back_unchanged(theirs, tmp_path):
    names = inspect.signature(theirs.__init__).parameters
    before = theirs(**{name: value for name, value in SHARED.items() if name in names})
    with Messages() as messages:
        ours = DDPMAncestralScheduler.from_config(before.config)
        after = theirs.from_config(ours.config)
    before.save_pretrained(tmp_path)
    with messages:
        loaded = DDPMAncestralScheduler.from_pretrained(tmp_path)
    assert messages.texts == []
    assert settings(after) == settings(before)
    for name, value in SHARED.items():
        if name in names:
            assert ours.config[name] == loaded.config[name] == value
    ours.set_timesteps(4)
    assert ours.step(torch.zeros(1, 2), ours.timesteps[0], torch.zeros(1, 2)).prev_sample.isfinite().all()


@pytest.mark.parametrize("theirs", COMPATIBLE, ids=lambda each: each.__name__)
def test_ours_comes_back_unchanged_from_each_scheduler_of_diffusers(theirs):
    config = {"last_step_noise": True, "variance_type": "fixed_large", "clip_sample_range": 3.0, "steps_offset": 1}
    before = DDPMAncestralScheduler(**SHARED, **config)
    after = DDPMAncestralScheduler.from_config(theirs.from_config(before.config).config)
    assert {name: after.config[name] for name in settings(before)} == settings(before)


def test_sixteen_schedulers_of_diffusers_and_our_other_three_are_compatible():
    compatibles = DDPMAncestralScheduler().compatibles
    others = [AnnealedLangevinScheduler, ModifiedEulerMaruyamaScheduler, PredictorCorrectorScheduler]
    assert sorted(each.__name__ for each in compatibles if each.__module__ == "annealers") == sorted(
        each.__name__ for each in others
    )
    assert sum(each.__module__.startswith("diffusers") for each in compatibles) == 16
    assert {FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler} < set(COMPATIBLE)


OURS = [
    lambda: AnnealedLangevinScheduler(steps_per_level=7, step_size=0.1),
    lambda: DDPMAncestralScheduler(variance_type="fixed_large", last_step_noise=True),
    lambda: ModifiedEulerMaruyamaScheduler(step_schedule="cosine", step_ratio=50.0),
    lambda: PredictorCorrectorScheduler(predictor="ddim", snr=0.2, corrector_range=(0.1, 0.9)),
]


@pytest.mark.parametrize("theirs", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_karras_levels_stay_karras_levels_and_the_way_back_is_lossless(theirs):
    before = theirs(use_karras_sigmas=True)
    ours = DDPMAncestralScheduler.from_config(before.config)
    again = PredictorCorrectorScheduler.from_config(ours.config)
    assert ours.config.timestep_spacing == again.config.timestep_spacing == "karras"
    assert settings(theirs.from_config(again.config)) == settings(before)
    chosen = DDPMAncestralScheduler.from_config(before.config, timestep_spacing="trailing")
    assert chosen.config.timestep_spacing == "trailing"


@pytest.mark.parametrize("first", OURS)
def test_what_is_loaded_is_what_was_saved(first, tmp_path):
    scheduler = first()
    scheduler.save_pretrained(tmp_path)
    said = {name: value for name, value in as_saved(scheduler).items() if name != "_use_default_values"}
    loaded = type(scheduler).from_pretrained(tmp_path)
    assert "_use_default_values" not in loaded.config
    assert as_saved(loaded) == said


@pytest.mark.parametrize("second", OURS)
@pytest.mark.parametrize("first", OURS)
def test_our_own_schedulers_take_each_others_place_in_silence_and_come_back_unchanged(first, second):
    scheduler, between = first(), type(second())
    with Messages() as messages:
        back = type(scheduler).from_config(between.from_config(scheduler.config).config)
    assert messages.texts == []
    own = inspect.signature(type(scheduler).__init__).parameters.keys() - {"self"}
    assert {name: back.config[name] for name in own} == {name: scheduler.config[name] for name in own}


def as_saved(scheduler):
    """Its config as another process reads it."""
    return json.loads(scheduler.to_json_string())


def as_it_is(scheduler):
    return scheduler.config


STABLE_DIFFUSION_3 = FlowMatchEulerDiscreteScheduler(shift=3.0)
FLUX = FlowMatchEulerDiscreteScheduler(
    shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256
)
LTX = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, time_shift_type="linear")
WAN = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
SHIFTS = ["shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal"]


@pytest.mark.parametrize("read", [as_it_is, as_saved])
@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (FlowMatchEulerDiscreteScheduler(), [1.0, False, "exponential", None]),
        (STABLE_DIFFUSION_3, [3.0, False, "exponential", None]),
        (FLUX, [3.0, True, "exponential", None]),
        (LTX, [1.0, True, "linear", 0.1]),
        (FlowMatchHeunDiscreteScheduler(shift=2.0), [2.0, False, "exponential", None]),
        (WAN, [5.0, False, "exponential", None]),
        (DPMSolverMultistepScheduler(**FLOW, use_flow_sigmas=True, flow_shift=7.0), [7.0, False, "exponential", None]),
    ],
)
def test_the_config_of_a_flow_matching_scheduler_gives_a_flow_path_and_back_again(theirs, expected, read, tmp_path):
    with Messages() as messages:
        ours = DDPMAncestralScheduler.from_config(read(theirs))
        after = type(theirs).from_config(ours.config)
    assert messages.texts == []
    assert settings(after) == settings(theirs)
    again = DDPMAncestralScheduler.from_config(ours.config)
    ours.save_pretrained(tmp_path)
    loaded = DDPMAncestralScheduler.from_pretrained(tmp_path)
    for each in (ours, again, loaded):
        assert each.config.prediction_type == "flow_prediction"
        assert each.config.clip_sample is False
        assert [each.config[name] for name in SHIFTS] == expected
        each.set_timesteps(sigmas=np.linspace(1, 0.1, 10), mu=1.1)
        assert torch.equal(each.timesteps, ours.timesteps)
        x = 5 * draw(2, 3)
        assert torch.equal(each.step(x, 1000.0, x).pred_original_sample, x - x)  # of a flow, and not clipped


@pytest.mark.parametrize("read", [as_it_is, as_saved])
@pytest.mark.parametrize(
    ("theirs", "clips"),
    [
        (DDPMScheduler(), True),
        (DDPMScheduler(clip_sample=False), False),
        (DDIMScheduler(), True),
        (DDIMScheduler(clip_sample=False), False),
        (diffusers.HeunDiscreteScheduler(), False),  # whose own default it is
        (diffusers.HeunDiscreteScheduler(clip_sample=True), True),
        (diffusers.EulerDiscreteScheduler(), False),
        (diffusers.PNDMScheduler(), False),
        (DPMSolverMultistepScheduler(), False),
        (WAN, False),
        (STABLE_DIFFUSION_3, False),
    ],
)
def test_ours_clips_if_and_only_if_the_scheduler_in_its_place_does(theirs, clips, read):
    ours = DDPMAncestralScheduler.from_config(read(theirs))
    assert ours.config.clip_sample is clips
    assert DDPMAncestralScheduler.from_config(ours.config).config.clip_sample is clips
    assert DDPMAncestralScheduler.from_config(as_saved(ours)).config.clip_sample is clips
    assert DDPMAncestralScheduler.from_config(read(theirs), clip_sample=not clips).config.clip_sample is not clips


@pytest.mark.parametrize("read", [as_it_is, as_saved])
def test_a_multistep_solver_on_flow_levels_is_replaced_with_levels_that_are_even_to_the_data(read):
    # it ignores its `timestep_spacing` then, which says "linspace"
    first = DDPMAncestralScheduler.from_config(read(WAN))
    for each in (first, DDPMAncestralScheduler.from_config(read(first))):
        each.set_timesteps(5)
        flow = DDPMAncestralScheduler(shift=5.0, timestep_spacing="trailing", **FLOW)
        flow.set_timesteps(5)
        assert torch.equal(each.timesteps, flow.timesteps)
    said = DDPMAncestralScheduler.from_config(read(WAN), timestep_spacing="karras")
    for each in (said, DDPMAncestralScheduler.from_config(read(said))):
        assert each.config.timestep_spacing == "karras"


def test_what_a_caller_says_is_kept_by_every_other_scheduler():
    ours = DDPMAncestralScheduler.from_config(diffusers.EulerDiscreteScheduler().config, clip_sample=True)
    assert DDIMScheduler.from_config(ours.config).config.clip_sample is True
    back = DDPMAncestralScheduler.from_config(diffusers.EulerDiscreteScheduler.from_config(ours.config).config)
    assert back.config.clip_sample is True
    ours = DDPMAncestralScheduler.from_config(STABLE_DIFFUSION_3.config, shift=7.0, prediction_type="epsilon")
    assert (ours.config.shift, ours.config.prediction_type) == (7.0, "epsilon")
    assert FlowMatchEulerDiscreteScheduler.from_config(ours.config).config.shift == 7.0


@pytest.mark.parametrize("config", [{}, {"clip_sample": False}, FLOW, {"prediction_type": "v_prediction"}])
@pytest.mark.parametrize(
    "theirs", [diffusers.EulerDiscreteScheduler, diffusers.UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler]
)
def test_our_own_defaults_survive_a_scheduler_that_has_no_such_setting(theirs, config):
    before = DDPMAncestralScheduler(**config)
    after = DDPMAncestralScheduler.from_config(theirs.from_config(before.config).config)
    assert (
        settings(after).items() >= {name: before.config[name] for name in ("clip_sample", "prediction_type")}.items()
    )


def test_unused_settings_are_returned_as_in_diffusers():
    config = dict(DDPMScheduler().config)
    scheduler, unused = DDPMAncestralScheduler.from_config(config, return_unused_kwargs=True, other=3)
    assert isinstance(scheduler, DDPMAncestralScheduler)
    assert unused["other"] == 3
    assert not {"clip_sample", "prediction_type", "shift"} & set(unused)


def test_reading_a_config_leaves_it_as_it_is():
    config = as_saved(STABLE_DIFFUSION_3)
    before = dict(config)
    DDPMAncestralScheduler.from_config(config)
    assert config == before


def test_a_network_that_counts_its_time_from_the_noise_is_refused():
    with pytest.raises(ValueError, match="invert_sigmas=True"):
        DDPMAncestralScheduler.from_config(FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config)


def test_the_config_of_a_multistep_solver_means_no_learned_variance():
    solver = DPMSolverMultistepScheduler()
    assert solver.config.variance_type is None
    config = {name: value for name, value in solver.config.items() if name != "_use_default_values"}  # as if saved
    scheduler = DDPMAncestralScheduler.from_config(config)
    assert scheduler.config.variance_type is None
    scheduler.set_timesteps(4)
    t, s = pairs(scheduler)[0]
    _, std = law_of_step(scheduler, draw(2, 3), t, draw(2, 3))
    torch.testing.assert_close(std**2, torch.full_like(std, posterior_variance(scheduler, t, s)))


def test_an_unused_ladder_of_another_scheduler_is_no_ladder():
    config = {**diffusers.EulerDiscreteScheduler().config}
    config.pop("_use_default_values")
    assert config["sigma_min"] is None
    assert DDPMAncestralScheduler.from_config(config).config.sigma_min is None


def test_settings_that_a_pipeline_rewrites_later_are_obeyed():
    # StableDiffusionPipeline replaces the config of its scheduler in place
    scheduler = DDPMAncestralScheduler()
    scheduler._internal_dict = diffusers.configuration_utils.FrozenDict(
        {**scheduler.config, "steps_offset": 1, "clip_sample": False}
    )
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[-1] == 1
    x = 3 * draw(2, 3)
    assert scheduler.step(torch.zeros_like(x), 901, x).pred_original_sample.abs().max() > 1


def test_an_attribute_is_not_taken_for_a_setting():
    scheduler = DDPMAncestralScheduler()
    scheduler.dummy_attribute = 5
    with Messages() as messages:
        assert scheduler.dummy_attribute == 5
        assert callable(scheduler.save_pretrained)
    assert messages.texts == []
    with pytest.raises(AttributeError, match="'DDPMAncestralScheduler' object has no attribute 'does_not_exist'"):
        _ = scheduler.does_not_exist


def test_the_example_of_the_docstring_runs():
    [example] = doctest.DocTestFinder().find(DDPMAncestralScheduler, "DDPMAncestralScheduler", module=False)[:1]
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


def test_settings_given_without_their_names_are_passed_on_too():
    scheduler = DDPMAncestralScheduler(2, 0.001, 0.02, "linear", np.array([0.1, 0.2]))
    for other in (DDIMScheduler, DDPMAncestralScheduler):
        config = other.from_config(scheduler.config).config
        assert (config.num_train_timesteps, config.beta_start) == (2, 0.001)
        assert np.array_equal(config.trained_betas, [0.1, 0.2])
