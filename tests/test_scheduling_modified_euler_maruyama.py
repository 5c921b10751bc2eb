r"""Properties of the modified Euler-Maruyama sampler, checked on laws that are known exactly.

Oracles: the reversed Ornstein-Uhlenbeck chain in its own clock, tau_t = -1/2 sum_{i <= t} log(1 - beta_i), written out
here; ancestral sampling, with which it must agree on a ladder; and Gaussian data N(M, S), for which a step is affine:
two steps with known noise give its mean and standard deviation without sampling error.
"""

import copy
import doctest
import inspect
import json
import logging
import math
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from annealers.exact import Gaussian, GaussianMixture
from annealers.schedulers import DDPMAncestralScheduler, ModifiedEulerMaruyamaScheduler
from annealers.schedulers.scheduling_modified_euler_maruyama import step_sizes

LADDER = {"beta_schedule": "geometric", "sigma_min": 0.02, "sigma_max": 40.0}
FLOW = {"prediction_type": "flow_prediction", "timestep_spacing": "trailing"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
BETA_SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
PATHS = [*[{"beta_schedule": name} for name in BETA_SCHEDULES], LADDER, ZERO_SNR, FLOW]
SPACINGS = ["leading", "linspace", "trailing", "karras", "geometric"]
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction", "score"]
VARIANCES = ["modified_euler_maruyama", "euler_maruyama"]
RULES = ["linear", "cosine", "tanh"]
RESTRICTIONS = [{"clip_sample": False}, {"clip_sample": True}, {"thresholding": True}]
SHAPES = [(3,), (3, 4), (3, 2, 5), (3, 2, 4, 4), (3, 2, 3, 4, 4)]  # the first axis is the batch
M, S = 0.7, 0.25  # mean and variance of the Gaussian data
GAUSSIAN = Gaussian(M, variance=S)
MIXTURE = GaussianMixture([0.3, 0.7], [-1.0, 0.8], [0.04, 0.09])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def build(N=None, **config):
    """A scheduler without clipping, with N levels."""
    scheduler = ModifiedEulerMaruyamaScheduler(**{"clip_sample": False, **config})
    if N is not None:
        scheduler.set_timesteps(N)
    return scheduler


def predict(law, scheduler, x, t):
    point = scheduler.signal_and_noise(float(t) if scheduler.config.prediction_type == "flow_prediction" else int(t))
    return law.prediction(scheduler.config.prediction_type, x, *point)


def law_of_step(scheduler, output, t, x):
    """Mean and standard deviation of a step, read off two of them whose noise is known."""
    z = [draw(*x.shape, seed=seed) for seed in (1, 2)]
    y = [scheduler.step(output, t, x, generator=seeded(seed)).prev_sample for seed in (1, 2)]
    std = (y[0] - y[1]) / (z[0] - z[1])
    return y[0] - std * z[0], std


def pairs(scheduler):
    """The steps (t, s) of the schedule; None is the data."""
    timesteps = scheduler.timesteps.tolist()
    return list(zip(timesteps, timesteps[1:] + [None], strict=True))


def point(scheduler, t):
    """(alpha, sigma) of a timestep or the data."""
    if t is None:
        return 1.0, 0.0
    return tuple(float(c) for c in scheduler.signal_and_noise(t))


def tau(scheduler, t):
    """The clock of the chain, from the signal that is left, e^{-2 tau}, when the noise fills up the rest."""
    alpha, sigma = point(scheduler, t)
    return -0.5 * math.log(alpha**2 / (alpha**2 + sigma**2))


def step_sizes_of(scheduler):
    """gamma_1 .. gamma_N of the schedule that is set, counted from the data."""
    clocks = np.array([tau(scheduler, t) for t in scheduler.timesteps.tolist()[::-1]])
    return np.diff(clocks, prepend=0.0)


# ---- the step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_on_a_beta_schedule_a_step_is_that_of_the_reversed_ornstein_uhlenbeck_chain(beta_schedule, variance):
    scheduler = build(5, beta_schedule=beta_schedule, variance=variance, timestep_spacing="karras")
    x = draw(6)
    for t, s in pairs(scheduler):
        gamma, score = tau(scheduler, t) - tau(scheduler, s), MIXTURE.score(x, *point(scheduler, t))
        mean, std = law_of_step(scheduler, predict(MIXTURE, scheduler, x, t), t, x)
        torch.testing.assert_close(mean, x + gamma * (x + 2 * score), rtol=1e-6, atol=1e-6)
        share = tau(scheduler, s) / tau(scheduler, t) if variance == "modified_euler_maruyama" else s is not None
        torch.testing.assert_close(std**2, torch.full_like(x, 2 * gamma * share), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("N", [1, 2, 9, 50])
def test_on_a_geometric_ladder_it_is_ancestral_sampling(N):
    config = {**LADDER, "timestep_spacing": "karras", "num_train_timesteps": 50, "clip_sample": False}
    ours, ancestral = ModifiedEulerMaruyamaScheduler(**config), DDPMAncestralScheduler(**config)
    for each in (ours, ancestral):
        each.set_timesteps(N)
    x = draw(5)
    for t in ours.timesteps:
        output = predict(MIXTURE, ours, x, t)
        steps = [each.step(output, int(t), x, generator=seeded(3)).prev_sample for each in (ours, ancestral)]
        torch.testing.assert_close(*steps, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("N", [1, 9])
def test_on_a_geometric_ladder_the_variance_is_exactly_the_ancestral_one(N):
    scheduler = build(N, **LADDER, timestep_spacing="karras")
    for t, s in pairs(scheduler):
        (alpha, sigma), (next_alpha, next_sigma) = point(scheduler, t), point(scheduler, s)
        level, next_level = sigma / alpha, next_sigma / next_alpha
        # the clock of Brownian motion is level^2 / 2, and the step is taken in y = x / alpha
        brownian_bridge = next_level**2 * (level**2 - next_level**2) / level**2
        _, std = law_of_step(scheduler, torch.zeros(1), t, draw(1))
        assert float(std) / next_alpha == pytest.approx(math.sqrt(brownian_bridge), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_on_a_beta_schedule_the_variance_is_the_ancestral_one_up_to_the_step(beta_schedule):
    scheduler = build(12, beta_schedule=beta_schedule, timestep_spacing="karras")
    for t, s in pairs(scheduler)[:-1]:
        tau_t, tau_s = tau(scheduler, t), tau(scheduler, s)
        gamma = tau_t - tau_s
        ancestral = -math.expm1(-2 * gamma) * math.expm1(-2 * tau_s) / math.expm1(-2 * tau_t)
        _, std = law_of_step(scheduler, torch.zeros(1), t, draw(1))
        ratio = float(std) ** 2 / ancestral
        expected = gamma * tau_s / tau_t * (1 / math.tanh(gamma) + 1 / math.tanh(tau_s))
        assert ratio == pytest.approx(expected, rel=1e-6)
        assert ratio >= 1 - 1e-9
        assert ratio <= 1 + gamma + gamma**2


@pytest.mark.parametrize("config", [{}, {"beta_schedule": "geometric", "sigma_min": 0.01, "sigma_max": 5.0}])
def test_on_a_flow_path_a_step_is_that_of_the_chain_in_its_own_coordinates(config):
    scheduler = build(5, **FLOW, **config)  # and no ladder, though the config names one
    x = draw(6)
    for t, s in pairs(scheduler)[1:]:
        (alpha, sigma), (next_alpha, next_sigma) = point(scheduler, t), point(scheduler, s)
        scale, next_scale = math.hypot(alpha, sigma), math.hypot(next_alpha, next_sigma)
        gamma = tau(scheduler, t) - tau(scheduler, s)
        u = x / scale
        score_of_u = scale * MIXTURE.score(x, alpha, sigma)
        mean, std = law_of_step(scheduler, predict(MIXTURE, scheduler, x, t), t, x)
        torch.testing.assert_close(mean / next_scale, u + gamma * (u + 2 * score_of_u), rtol=1e-9, atol=1e-9)
        variance = 2 * gamma * tau(scheduler, s) / tau(scheduler, t)
        torch.testing.assert_close(std**2, torch.full_like(x, next_scale**2 * variance), rtol=1e-9, atol=1e-12)


def test_trained_betas_are_a_chain_whatever_the_name_of_the_schedule():
    betas = np.linspace(0.01, 0.3, 20).tolist()
    steps = []
    for config in ({}, {"beta_schedule": "geometric"}):
        scheduler = build(4, trained_betas=betas, **config)
        steps.append(scheduler.step(torch.ones(1, 2), 10, draw(1, 2), generator=seeded(0)).prev_sample)
    assert torch.equal(*steps)


@pytest.mark.parametrize("path", PATHS)
def test_plain_euler_maruyama_differs_in_the_variance_only(path):
    modified, plain = (build(5, variance=variance, **path) for variance in VARIANCES)
    x = draw(4)
    for i, (t, s) in enumerate(pairs(modified)):
        laws = [law_of_step(each, predict(MIXTURE, each, x, t), t, x) for each in (modified, plain)]
        torch.testing.assert_close(laws[0][0], laws[1][0], rtol=1e-10, atol=1e-10)
        if s is None or point(modified, t)[0] == 0:
            torch.testing.assert_close(laws[0][1], laws[1][1])
        else:
            assert (laws[0][1] < laws[1][1]).all(), i


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("path", [ZERO_SNR, FLOW])
def test_the_first_step_from_pure_noise_is_exact(path, variance):
    scheduler = build(4, variance=variance, **path)
    (t, s), x = pairs(scheduler)[0], draw(5)
    alpha, sigma = point(scheduler, s)
    assert point(scheduler, t) == (0, 1)
    mean, std = law_of_step(scheduler, predict(GAUSSIAN, scheduler, x, t), t, x)
    torch.testing.assert_close(mean, torch.full_like(x, alpha * M))  # nothing is known but the mean of the data
    torch.testing.assert_close(std, torch.full_like(x, sigma))


@pytest.mark.parametrize("N", [1, 2, 7])
@pytest.mark.parametrize(
    "config",
    [
        *[{"timestep_spacing": spacing, "steps_offset": 1} for spacing in SPACINGS],
        *[{"step_schedule": rule} for rule in RULES],
        *[path for path in PATHS if path.get("beta_schedule") != "linear"],
    ],
)
@pytest.mark.parametrize("variance", VARIANCES)
def test_the_last_step_is_noise_free_and_ends_at_the_data(variance, config, N):
    scheduler = build(N, variance=variance, **config)
    x = draw(3)
    for t, s in pairs(scheduler):
        output = predict(GAUSSIAN, scheduler, x, t)
        steps = [scheduler.step(output, t, x, generator=seeded(i)).prev_sample for i in (1, 2)]
        assert torch.equal(*steps) == (s is None)
    alpha, sigma = point(scheduler, t)
    if alpha == 0 or config == LADDER:
        expected = GAUSSIAN.denoise(x, alpha, sigma)
    else:
        scale, gamma = math.hypot(alpha, sigma), tau(scheduler, t)  # all of the clock that is left
        expected = x / scale + gamma * (x / scale + 2 * scale * GAUSSIAN.score(x, alpha, sigma))
    torch.testing.assert_close(steps[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_error_for_gaussian_data_is_of_first_order_in_the_step(variance):
    errors = []
    for N in (200, 400, 800):
        scheduler = build(N, variance=variance, **FLOW)
        m, V = 0.0, 1.0  # mean and variance of the pure noise that it starts from
        x = torch.tensor([0.0, 1.0], dtype=torch.float64)
        for t in scheduler.timesteps:
            (offset, end), std = law_of_step(scheduler, predict(GAUSSIAN, scheduler, x, t), t, x)
            slope = float(end - offset)
            m, V = float(offset) + slope * m, slope**2 * V + float(std[0]) ** 2
        errors.append((abs(m - M), abs(math.sqrt(V) - math.sqrt(S))))
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders, 1, atol=0.1)


# ---- the step sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 20.0, 200.0])
@pytest.mark.parametrize("N", [2, 3, 9, 50])
@pytest.mark.parametrize("rule", RULES)
def test_step_sizes_grow_from_the_data_by_the_ratio_and_add_up_to_one(rule, N, ratio):
    sizes = step_sizes(rule, N, ratio)
    assert sizes.shape == (N,)
    assert sizes.sum() == pytest.approx(1, rel=1e-12)
    assert sizes[-1] / sizes[0] == pytest.approx(ratio, rel=1e-12)
    assert (np.diff(sizes) > 0).all() if ratio > 1 else np.allclose(sizes, 1 / N)


def test_the_rules_differ_in_how_the_step_sizes_grow():
    # the share of the growth after a quarter, half and three quarters of the steps
    shares = {rule: (step_sizes(rule, 5, 11.0) / step_sizes(rule, 5, 11.0)[0] - 1)[1:4] / 10 for rule in RULES}
    np.testing.assert_allclose(shares["linear"], [0.25, 0.5, 0.75])
    np.testing.assert_allclose(shares["cosine"], [0.5 - 0.5**1.5, 0.5, 0.5 + 0.5**1.5])
    e = math.exp(3)  # tanh(1.5) / tanh(3) = (e - 1) / (e + 1) * (e^2 + 1) / (e^2 - 1)
    steep = (e - 1) / (e + 1) * (e**2 + 1) / (e**2 - 1)
    np.testing.assert_allclose(shares["tanh"], [(1 - steep) / 2, 0.5, (1 + steep) / 2])


@pytest.mark.parametrize("rule", RULES)
def test_a_single_step_takes_the_whole_clock(rule):
    assert step_sizes(rule, 1, 200.0).tolist() == [1.0]
    assert build(1, step_schedule=rule).timesteps.tolist() == [999]


@pytest.mark.parametrize("ratio", [1.0, 20.0])
@pytest.mark.parametrize("N", [2, 6])
@pytest.mark.parametrize("rule", RULES)
def test_on_a_fine_beta_schedule_the_levels_have_the_step_sizes_of_the_rule(rule, N, ratio):
    scheduler = build(N, step_schedule=rule, step_ratio=ratio, num_train_timesteps=10_000, beta_end=0.002)
    gammas = step_sizes_of(scheduler)
    assert gammas.sum() == pytest.approx(tau(scheduler, 9_999), rel=1e-12)  # it starts at the last train timestep
    np.testing.assert_allclose(gammas / gammas.sum(), step_sizes(rule, N, ratio), atol=3e-4)  # a train step is 2e-4
    assert gammas[-1] / gammas[0] == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize("rule", RULES)
def test_on_a_fine_ladder_the_levels_have_the_step_sizes_of_the_rule_in_its_own_clock(rule):
    scheduler = build(6, **{**LADDER, "num_train_timesteps": 20_000}, step_schedule=rule, step_ratio=20.0)
    levels = [sigma / alpha for alpha, sigma in (point(scheduler, t) for t in scheduler.timesteps.tolist())]
    gammas = np.diff(np.array(levels[::-1]) ** 2 / 2, prepend=0.0)
    assert levels[0] == pytest.approx(40)
    np.testing.assert_allclose(gammas / gammas.sum(), step_sizes(rule, 6, 20.0), rtol=5e-3)


@pytest.mark.parametrize("rule", ["path", *RULES])
def test_steps_grow_away_from_the_data(rule):
    gammas = step_sizes_of(build(10, step_schedule=rule, timestep_spacing="trailing"))
    assert (np.diff(gammas) > 0).all()


@pytest.mark.parametrize("N", [1, 37, 1000])
@pytest.mark.parametrize("rule", RULES)
def test_any_number_of_steps_is_a_strictly_decreasing_schedule(rule, N):
    timesteps = build(N, step_schedule=rule).timesteps
    assert len(timesteps) == N
    assert (timesteps.diff() < 0).all()
    assert timesteps[0] == 999


@pytest.mark.parametrize("rule", RULES)
def test_the_rules_overrule_the_spacing_but_not_explicit_timesteps(rule):
    assert torch.equal(
        build(5, step_schedule=rule).timesteps, build(5, step_schedule=rule, timestep_spacing="karras").timesteps
    )
    scheduler = build(step_schedule=rule)
    scheduler.set_timesteps(timesteps=[900, 500, 7])
    assert scheduler.timesteps.tolist() == [900, 500, 7]


def test_explicit_timesteps_are_stepped_between():
    scheduler, x = build(), draw(4)
    scheduler.set_timesteps(timesteps=[900, 500, 7])
    gamma = tau(scheduler, 900) - tau(scheduler, 500)
    _, std = law_of_step(scheduler, torch.sin(x), 900, x)
    variance = 2 * gamma * tau(scheduler, 500) / tau(scheduler, 900)
    torch.testing.assert_close(std**2, torch.full_like(x, variance), rtol=1e-6, atol=0)


def test_the_path_schedule_visits_the_levels_of_the_spacing():
    for spacing in SPACINGS:
        ancestral = DDPMAncestralScheduler(timestep_spacing=spacing)
        ancestral.set_timesteps(7)
        assert torch.equal(build(7, timestep_spacing=spacing).timesteps, ancestral.timesteps)


# ---- what a step keeps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restriction", RESTRICTIONS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES[1:])
def test_equivalent_outputs_of_the_prediction_types_give_the_same_step(prediction_type, restriction):
    scheduler = build(7, prediction_type=prediction_type, **restriction)
    reference = build(7, **restriction)
    x = draw(2, 2, 5)
    for t in reference.timesteps:
        steps = [
            each.step(predict(MIXTURE, each, x, t), int(t), x, generator=seeded(3)) for each in (scheduler, reference)
        ]
        torch.testing.assert_close(steps[0].prev_sample, steps[1].prev_sample, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(steps[0].pred_original_sample, steps[1].pred_original_sample, rtol=1e-9, atol=1e-9)


def test_clipping_moves_the_state_as_if_the_clipped_data_had_been_predicted():
    clipping, plain = build(5, clip_sample=True, clip_sample_range=0.3), build(5, prediction_type="sample")
    x = draw(4)
    for t in clipping.timesteps:
        alpha, sigma = point(clipping, int(t))
        x_0 = ((x - sigma * torch.sin(x)) / alpha).clamp(-0.3, 0.3)
        result = clipping.step(torch.sin(x), t, x, generator=seeded(1))
        expected = plain.step(x_0, int(t), x, generator=seeded(1))
        torch.testing.assert_close(result.pred_original_sample, x_0)
        torch.testing.assert_close(result.prev_sample, expected.prev_sample)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("restriction", RESTRICTIONS)
def test_a_step_is_elementwise_for_any_shape(shape, restriction):
    scheduler = build(5, **restriction)
    x, t = draw(*shape), scheduler.timesteps[2]
    result = scheduler.step(0.1 * x, t, x, generator=seeded(1))
    flat = scheduler.step(0.1 * x.reshape(3, -1), t, x.reshape(3, -1), generator=seeded(1))
    assert torch.equal(result.prev_sample, flat.prev_sample.reshape(shape))
    assert torch.equal(result.pred_original_sample, flat.pred_original_sample.reshape(shape))


@pytest.mark.parametrize("restriction", RESTRICTIONS)
def test_a_sample_does_not_depend_on_its_neighbours(restriction):
    scheduler, start = build(5, **restriction), draw(4, 2, 3)

    def sample(rows):
        generators, x = [seeded(i) for i in rows], start[rows]
        for t in scheduler.timesteps:
            x = scheduler.step(torch.sin(3 * x), t, x, generator=generators).prev_sample
        return x

    together = sample([0, 1, 2, 3])
    for i in range(4):
        assert torch.equal(sample([i]), together[i : i + 1])
    assert torch.equal(sample([2, 0]), together[[2, 0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("config", [*RESTRICTIONS, LADDER, FLOW])
def test_a_step_keeps_the_dtype_and_computes_in_float32_at_least(dtype, config):
    scheduler = build(5, **config)
    x, output = draw(2, 2, 3).to(dtype), draw(2, 2, 3, seed=1).to(dtype)
    working = torch.promote_types(dtype, torch.float32)
    for t in scheduler.timesteps:
        result = scheduler.step(output, t, x, generator=seeded(1))
        upcast = scheduler.step(output.to(working), t, x.to(working), generator=seeded(1))
        for name in ("prev_sample", "pred_original_sample"):
            assert result[name].dtype is dtype
            assert torch.equal(result[name], upcast[name].to(dtype))


@pytest.mark.parametrize("path", PATHS)
def test_zeros_from_the_network_make_no_nan(path):
    scheduler, x = build(20, **path), draw(2, 3).float()
    for t in scheduler.timesteps:
        result = scheduler.step(torch.zeros_like(x), t, x, generator=seeded(1))
        x = result.prev_sample
        assert x.isfinite().all()
        assert result.pred_original_sample.isfinite().all()


def test_the_tuple_holds_the_fields_of_the_output():
    scheduler, x = build(), draw(2, 3)
    scheduler.set_timesteps(timesteps=[500, 100])
    output = scheduler.step(torch.sin(x), 500, x, generator=seeded(1))
    pair = scheduler.step(torch.sin(x), 500, x, generator=seeded(1), return_dict=False)
    assert isinstance(pair, tuple)
    assert len(pair) == 2
    assert torch.equal(pair[0], output.prev_sample)
    assert torch.equal(pair[1], output.pred_original_sample)


def test_a_step_leaves_its_inputs_alone_and_is_differentiable():
    scheduler, x, output = build(), draw(2, 3), draw(2, 3, seed=1).requires_grad_()
    before = x.clone(), output.detach().clone()
    scheduler.set_timesteps(timesteps=[500, 100])
    scheduler.step(output, 500, x, generator=seeded(1)).prev_sample.sum().backward()
    assert torch.equal(x, before[0])
    assert torch.equal(output.detach(), before[1])
    assert (output.grad != 0).all()


@pytest.mark.parametrize("path", [{}, LADDER, FLOW])
def test_a_step_reads_no_value_of_a_device(path):
    # tensors on the meta device have no values: reading one raises
    scheduler = build(**path)
    scheduler.set_timesteps(4, device="meta")
    x = torch.empty(2, 3, 5, device="meta")
    for i, t in enumerate(scheduler.timesteps):
        assert scheduler.step(x, t, x).prev_sample.device.type == "meta"
        assert scheduler.step_index == i + 1


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"variance": "other"}, r"variance must be one of \['modified_euler_maruyama', .*\], got 'other'"),
        ({"step_schedule": "quadratic"}, r"step_schedule must be one of \('path', .*\), got 'quadratic'"),
        ({"step_ratio": 0.5}, "must be finite and >= 1, got 0.5"),
        ({"step_ratio": math.nan}, "must be finite and >= 1, got nan"),
        ({"step_ratio": math.inf}, "must be finite and >= 1, got inf"),
        ({"timestep_spacing": "other"}, "timestep_spacing must be one of .* got 'other'"),
        ({"prediction_type": "other"}, "prediction_type must be one of .* got 'other'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ModifiedEulerMaruyamaScheduler(**config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_output": (2, 4)}, r"shape of the sample, \(2, 3\), got \(2, 4\)"),
        ({"model_output": (1, 3)}, r"got \(1, 3\)"),  # these would broadcast
        ({"model_output": (2, 1)}, r"got \(2, 1\)"),
        ({"model_output": (3,)}, r"got \(3,\)"),
        ({"model_output": ()}, r"got \(\)"),
        ({"model_output": (2, 2, 3)}, r"got \(2, 2, 3\)"),
        ({"generator": [seeded(0)] * 3}, "one per sample, 2, got 3"),
        ({"timestep": 501}, "timestep 501 is not one of the 5 "),
        ({"timestep": -1}, "timestep -1 is not one of the 5 "),
    ],
)
def test_arguments_of_a_step_that_do_not_fit_are_refused(arguments, message):
    arguments = {"model_output": (2, 3), "timestep": 600, "sample": (2, 3)} | arguments
    arguments |= {name: torch.zeros(arguments[name]) for name in ("model_output", "sample")}
    with pytest.raises(ValueError, match=message):
        build(5).step(**arguments)


@pytest.mark.parametrize("rule", ["path", *RULES])
@pytest.mark.parametrize("N", [0, -1, 1001, 2.5, True, "4"])
def test_a_number_of_steps_that_cannot_be_taken_is_refused(rule, N):
    with pytest.raises(ValueError, match=r"num_inference_steps must be an integer in 1 \.\. 1000"):
        build(step_schedule=rule).set_timesteps(N)


@pytest.mark.parametrize("timesteps", [[], [5, 5], [3, 7], [1000], [-1], [7.5]])
def test_timesteps_that_cannot_be_walked_are_refused(timesteps):
    with pytest.raises(ValueError, match="timesteps must "):
        build().set_timesteps(timesteps=timesteps)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("path", "timestep"), [(ZERO_SNR, 999), (FLOW, 1000)])
def test_the_rules_are_refused_where_the_clock_is_infinite(path, timestep, rule):
    with pytest.raises(ValueError, match=rf"timestep {timestep}.* has no signal .* step_schedule='{rule}', .* needs"):
        build(5, step_schedule=rule, **path)


@pytest.mark.parametrize("prediction_type", ["epsilon", "score"])
def test_pure_noise_is_refused_where_the_prediction_cannot_tell_the_data(prediction_type):
    scheduler = build(rescale_betas_zero_snr=True, prediction_type=prediction_type)
    with pytest.raises(ValueError, match=f"timestep 999 has no signal .* prediction_type='{prediction_type}'"):
        scheduler.set_timesteps(timesteps=[999, 500])


def test_a_step_without_a_schedule_is_refused():
    scheduler = build()
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(torch.zeros(1, 2), 999, torch.zeros(1, 2))


# ---- saved, loaded, and in the place of the schedulers of Diffusers -------------------------------------------------


class Messages(logging.Handler):
    """Collects the warnings of Diffusers."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def __enter__(self):
        logging.getLogger("diffusers").addHandler(self)
        return self

    def __exit__(self, *_):
        logging.getLogger("diffusers").removeHandler(self)

    def emit(self, record):
        self.texts.append(record.getMessage())


def settings(scheduler):
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def test_the_name_that_a_saved_pipeline_records_is_public():
    assert ModifiedEulerMaruyamaScheduler.__module__ == "annealers"


def test_shared_settings_have_the_names_and_defaults_of_diffusers_and_none_is_passed_on_unnamed():
    ours = inspect.signature(ModifiedEulerMaruyamaScheduler.__init__).parameters
    theirs = inspect.signature(DDPMScheduler.__init__).parameters
    assert set(theirs) - set(ours) == {"variance_type"}  # whose choice this scheduler does not have
    assert all(ours[name].default == theirs[name].default for name in theirs if name in ours)
    assert all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in ours.values())
    assert list(inspect.signature(ModifiedEulerMaruyamaScheduler.step).parameters) == list(
        inspect.signature(DDPMScheduler.step).parameters
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"variance": "euler_maruyama", "step_schedule": "tanh", "step_ratio": 7.0, "clip_sample": False},
        {"prediction_type": "score", "num_train_timesteps": 30, **LADDER, "step_schedule": "linear"},
        {**ZERO_SNR, "clip_sample_range": 2.0},
        {**FLOW, "shift": 3.0},
        {"trained_betas": np.linspace(0.01, 0.3, 20), "thresholding": True},
    ],
)
def test_a_saved_scheduler_takes_the_same_steps(config, tmp_path):
    scheduler = ModifiedEulerMaruyamaScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    json.loads((tmp_path / "scheduler_config.json").read_text())
    with Messages() as messages:
        loaded = ModifiedEulerMaruyamaScheduler.from_pretrained(tmp_path)
    assert messages.texts == []
    assert {name: np.asarray(value).tolist() for name, value in settings(scheduler).items()} == settings(loaded)
    x = draw(2, 3)
    for each in (scheduler, loaded):
        each.set_timesteps(4)
    assert torch.equal(scheduler.timesteps, loaded.timesteps)
    for t in scheduler.timesteps.tolist():
        steps = [each.step(torch.sin(x), t, x, generator=seeded(2)).prev_sample for each in (scheduler, loaded)]
        assert torch.equal(*steps)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_a_copy_goes_on_where_the_original_stands(duplicate):
    scheduler, x = build(4, step_schedule="linear"), draw(2, 3)
    scheduler.step(torch.sin(x), scheduler.timesteps[0], x)
    copied = duplicate(scheduler)
    assert (copied.step_index, copied.timesteps.tolist()) == (1, scheduler.timesteps.tolist())
    steps = [each.step(torch.sin(x), each.timesteps[1], x, generator=seeded(2)) for each in (scheduler, copied)]
    assert torch.equal(steps[0].prev_sample, steps[1].prev_sample)


@pytest.mark.parametrize(
    "theirs", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler]
)
def test_it_takes_the_place_of_a_scheduler_of_diffusers_and_gives_it_back_unchanged(theirs):
    shared = {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.03, "beta_schedule": "scaled_linear"}
    shared |= {"shift": 3.0}
    names = inspect.signature(theirs.__init__).parameters
    before = theirs(**{name: value for name, value in shared.items() if name in names})
    with Messages() as messages:
        ours = ModifiedEulerMaruyamaScheduler.from_config(before.config)
        after = theirs.from_config(ours.config)
    assert messages.texts == []
    assert settings(after) == settings(before)
    for name, value in shared.items():
        if name in names:
            assert ours.config[name] == value
    ours.set_timesteps(4)
    assert ours.step(torch.zeros(1, 2), ours.timesteps[0], torch.zeros(1, 2)).prev_sample.isfinite().all()


@pytest.mark.parametrize("theirs", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler])
def test_it_comes_back_unchanged_from_a_scheduler_of_diffusers(theirs):
    config = {"variance": "euler_maruyama", "step_schedule": "tanh", "step_ratio": 7.0, "beta_end": 0.03}
    before = ModifiedEulerMaruyamaScheduler(**config)
    after = ModifiedEulerMaruyamaScheduler.from_config(theirs.from_config(before.config).config)
    assert {name: after.config[name] for name in settings(before)} == settings(before)


def test_the_example_of_the_docstring_runs():
    finder = doctest.DocTestFinder()
    [example] = finder.find(ModifiedEulerMaruyamaScheduler, "ModifiedEulerMaruyamaScheduler", module=False)[:1]
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
