r"""Properties of annealed Langevin dynamics, checked against the published algorithms and on laws known exactly.

Oracles: the algorithms of NCSN and NCSNv2 in the coordinates of their variance-exploding ladder, written out here and
run on the same noise; and Gaussian data, for which a step is affine, so that two steps with known noise make the law
of a whole run a recursion of a mean and a variance, to compare with closed forms.
"""

import copy
import doctest
import inspect
import json
import logging
import math
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from annealers.exact import Gaussian, GaussianMixture
from annealers.schedulers import AnnealedLangevinScheduler, DDPMAncestralScheduler
from annealers.schedulers.gaussian_path import Level
from annealers.schedulers.langevin import end_variance

pytestmark = pytest.mark.filterwarnings("ignore:.* times the noise variance of the last level")

LADDER = {"beta_schedule": "geometric", "sigma_min": 0.02, "sigma_max": 40.0}
FLOW = {"prediction_type": "flow_prediction"}
FLOW_FROM_NOISE = {**FLOW, "levels": "path", "timestep_spacing": "trailing"}  # its first level has no signal
PATHS = [{}, {"beta_schedule": "squaredcos_cap_v2"}, LADDER, FLOW]
SPACINGS = ["leading", "linspace", "trailing", "karras"]
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction", "score"]
CONVENTIONS = {"ncsnv2": 1.0, "ncsn": 0.5}
RULES_OF_LEVELS = ["geometric", "path"]
RESTRICTIONS = [{"clip_sample": False}, {"clip_sample": True}, {"thresholding": True}]
SHAPES = [(3,), (3, 4), (3, 2, 5), (3, 2, 4, 4), (3, 2, 3, 4, 4)]  # the first axis is the batch
# the configs of the two papers for CIFAR-10; their step size eps is e sigma_min^2
NCSN = {"sigma_min": 0.01, "sigma_max": 1.0, "L": 10, "K": 100, "step_lr": 2e-5}
NCSNV2 = {"sigma_min": 0.01, "sigma_max": 50.0, "L": 232, "K": 5, "step_lr": 6.2e-6}
M, S = 0.7, 0.25  # mean and variance of the Gaussian data
GAUSSIAN = Gaussian(M, variance=S)
POINT = Gaussian(0.0, variance=0.0)  # on which x_t is pure noise
MIXTURE = GaussianMixture([0.3, 0.7], [-1.0, 0.8], [0.04, 0.09])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def build(N=None, **config):
    """A scheduler without clipping, with N levels."""
    scheduler = AnnealedLangevinScheduler(**{"clip_sample": False, **config})
    if N is not None:
        scheduler.set_timesteps(N)
    return scheduler


def published(settings, **config):
    """The scheduler with the settings of a paper; its L levels are the train timesteps."""
    ladder = {name: settings[name] for name in ("sigma_min", "sigma_max")}
    step_size = settings["step_lr"] / settings["sigma_min"] ** 2
    return build(
        settings["L"],
        num_train_timesteps=settings["L"],
        beta_schedule="geometric",
        steps_per_level=settings["K"],
        step_size=step_size,
        **ladder,
        **config,
    )


def point(scheduler, t):
    return tuple(float(c) for c in scheduler.signal_and_noise(t))


def predict(law, scheduler, x, t):
    return law.prediction(scheduler.config.prediction_type, x, *point(scheduler, t))


def levels_of(scheduler):
    """The levels that are visited, each once."""
    return [Level(t, *point(scheduler, t)) for t in dict.fromkeys(scheduler.timesteps.tolist())]


def sample(scheduler, law, x, seed=5, **kwargs):
    generator = seeded(seed)
    for t in scheduler.timesteps:
        x = scheduler.step(predict(law, scheduler, x, t), t, x, generator=generator, **kwargs).prev_sample
    return x


def law_of_step(scheduler, law, t, x):
    """Mean and standard deviation of a step, read off two of them whose noise is known."""
    output = predict(law, scheduler, x, t)
    z = [draw(*x.shape, seed=seed) for seed in (1, 2)]
    y = [scheduler.step(output, t, x, generator=seeded(seed)).prev_sample for seed in (1, 2)]
    std = (y[0] - y[1]) / (z[0] - z[1])
    return y[0] - std * z[0], std


def sampled_law(scheduler, law, mean=0.0, variance=1.0):
    """Mean and variance of the samples of a law of one coordinate, from those of the start."""
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for t in scheduler.timesteps:
        (offset, end), std = law_of_step(scheduler, law, t, x)
        slope = float(end - offset)
        mean, variance = float(offset) + slope * mean, slope**2 * variance + float(std[0]) ** 2
    return mean, variance


# ---- the published algorithms ---------------------------------------------------------------------------------------


def ladder_of(settings):
    return np.exp(np.linspace(np.log(settings["sigma_max"]), np.log(settings["sigma_min"]), settings["L"]))


def ncsnv2(y, settings, noise):
    """Song & Ermon 2020, Algorithm 1, with the denoising step of their code."""
    sigmas = ladder_of(settings)
    for sigma in sigmas:
        step_size = settings["step_lr"] * (sigma / sigmas[-1]) ** 2
        for _ in range(settings["K"]):
            y = y + step_size * MIXTURE.score(y, 1.0, sigma) + math.sqrt(2 * step_size) * noise(y)
    return y + sigmas[-1] ** 2 * MIXTURE.score(y, 1.0, sigmas[-1])


def ncsn(y, settings, noise):
    """Song & Ermon 2019, Algorithm 1."""
    sigmas = ladder_of(settings)
    for sigma in sigmas:
        step_size = settings["step_lr"] * (sigma / sigmas[-1]) ** 2
        for _ in range(settings["K"]):
            y = y + step_size / 2 * MIXTURE.score(y, 1.0, sigma) + math.sqrt(step_size) * noise(y)
    return y


@pytest.mark.parametrize(
    ("algorithm", "settings", "config"),
    [
        (ncsnv2, NCSNV2, {"prediction_type": "score"}),
        (ncsnv2, NCSNV2 | {"L": 20}, {"prediction_type": "epsilon"}),
        (
            ncsnv2,
            NCSN | {"K": 10},
            {"prediction_type": "score"},
        ),  # the code of the first paper takes the full step too
        (ncsn, NCSN, {"prediction_type": "score", "step_convention": "ncsn", "denoise": False}),
        (ncsn, NCSNV2 | {"L": 20}, {"prediction_type": "epsilon", "step_convention": "ncsn", "denoise": False}),
    ],
)
def test_samples_are_those_of_the_published_algorithm_on_the_same_noise(algorithm, settings, config):
    scheduler = published(settings, **config)
    x, generator = draw(8), seeded(5)
    y = x * math.sqrt(1 + settings["sigma_max"] ** 2)  # the coordinates of the ladder, y = x / alpha
    expected = algorithm(y, settings, lambda y: torch.randn(y.shape, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(sample(scheduler, MIXTURE, x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_on_every_path_it_is_the_algorithm_in_variance_exploding_coordinates(path, convention, denoise):
    scheduler = build(
        7, **path, steps_per_level=3, step_size=0.3, step_convention=convention, denoise=denoise, clip_sample=False
    )
    levels, x, generator = levels_of(scheduler), draw(6), seeded(5)
    y = x / levels[0].alpha
    for level in levels:
        ratio = level.sigma / level.alpha
        delta = CONVENTIONS[convention] * 0.3 * ratio**2
        for _ in range(3):
            z = torch.randn(6, generator=generator, dtype=torch.float64)
            y = y + delta * MIXTURE.score(y, 1.0, ratio) + math.sqrt(2 * delta) * z
    if denoise:
        y = y + ratio**2 * MIXTURE.score(y, 1.0, ratio)
    torch.testing.assert_close(sample(scheduler, MIXTURE, x), y, rtol=1e-9, atol=1e-9)


# ---- the laws of the samples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "of_its_levels", "of_one_level"), [(NCSN, 1.1111, 1.111), (NCSNV2, 1.1283, 1.0555)]
)
def test_the_published_settings_end_with_a_little_too_much_noise(settings, of_its_levels, of_one_level):
    scheduler = published(settings, denoise=False)
    levels, K, e = levels_of(scheduler), settings["K"], scheduler.config.step_size
    _, variance = sampled_law(scheduler, POINT)
    relative = variance / settings["sigma_min"] ** 2
    assert relative == pytest.approx(end_variance(levels, e, K), rel=1e-9)
    assert relative == pytest.approx(of_its_levels, abs=1e-4)
    # Song & Ermon 2020, Prop. 4, is one level of it, from the right variance on the level before
    ratio = levels[0].sigma / levels[0].alpha / (levels[1].sigma / levels[1].alpha)
    assert end_variance([Level(0, 1.0, 1 / ratio)], e, K) == pytest.approx(of_one_level, abs=3e-4)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(("N", "K", "e"), [(1, 1, 0.5), (8, 1, 0.1), (8, 4, 0.4), (30, 2, 1.0)])
@pytest.mark.parametrize("path", [*PATHS, FLOW_FROM_NOISE, {"levels": "path", "timestep_spacing": "karras"}])
def test_the_end_variance_is_what_the_steps_make_of_pure_noise(path, N, K, e, convention):
    scheduler = build(N, **path, steps_per_level=K, step_size=e, step_convention=convention)
    levels = levels_of(scheduler)
    expected = end_variance(levels, CONVENTIONS[convention] * e, K) * levels[-1].sigma ** 2
    mean, variance, x = 0.0, 1.0, torch.tensor([0.0, 1.0], dtype=torch.float64)
    for t in scheduler.timesteps[:-1]:  # up to the denoising
        (offset, end), std = law_of_step(scheduler, POINT, t, x)
        variance = float(end - offset) ** 2 * variance + float(std[0]) ** 2
    assert mean == pytest.approx(0)
    assert variance == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("convention", "e"), [("ncsnv2", 0.3), ("ncsnv2", 0.05), ("ncsn", 0.6)])
@pytest.mark.parametrize(("path", "t"), [({}, 300), ({}, 900), (LADDER, 400), (FLOW, 250.5)])
def test_many_steps_on_a_level_converge_to_its_stationary_law(path, t, convention, e):
    scheduler = build(**path, steps_per_level=80, step_size=e, step_convention=convention, denoise=False)
    scheduler.set_timesteps(timesteps=[t])
    alpha, sigma = point(scheduler, t)
    v, delta = alpha**2 * S + sigma**2, CONVENTIONS[convention] * e * sigma**2
    mean, variance = sampled_law(scheduler, GAUSSIAN, mean=3.0, variance=9.0)
    left = (1 - delta / v) ** 80
    assert mean == pytest.approx(M + left * (3 / alpha - M), rel=1e-9)  # in the coordinates of the data
    stationary = v / (1 - delta / (2 * v))
    assert variance * alpha**2 == pytest.approx(stationary + left**2 * (9 - stationary), rel=1e-9)


@pytest.mark.parametrize(
    ("noise_per_level", "closed_form"),
    [
        # as much noise as the reversed process has, and half its drift: dV / dq = V / q - 1
        (0.5, lambda start, end: end * (1 + math.log(start / end))),
        # its drift, and twice its noise: dV / dq = 2 V / q - 2
        (1.0, lambda start, end: 2 * end - end**2 / start),
    ],
)
def test_a_single_step_per_level_is_not_the_time_reversal(noise_per_level, closed_form):
    sigma_min, sigma_max, errors = 0.01, 5.0, []
    for N in (200, 400, 800):
        ratio = (sigma_max / sigma_min) ** (1 / (N - 1))
        scheduler = build(
            N,
            num_train_timesteps=N,
            beta_schedule="geometric",
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            steps_per_level=1,
            step_size=noise_per_level * (1 - ratio**-2),  # of the gap between two levels
            denoise=False,
        )
        alpha, sigma = point(scheduler, N - 1)
        mean, variance = sampled_law(scheduler, GAUSSIAN, alpha * M, alpha**2 * S + sigma**2)
        assert mean == pytest.approx(M, rel=1e-9)
        errors.append(variance - closed_form(S + sigma_max**2, S + sigma_min**2))
    assert 0 < errors[-1] < 0.02
    assert np.log2(np.divide(errors[:-1], errors[1:])) == pytest.approx([1, 1], abs=0.1)
    assert closed_form(S + sigma_max**2, S) == pytest.approx(1.404 if noise_per_level == 0.5 else 0.4975, abs=1e-3)


# ---- the network calls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize("path", [*PATHS, FLOW_FROM_NOISE])
def test_each_level_is_visited_by_its_steps_and_the_last_once_more_for_the_denoising(path, K, denoise):
    scheduler = build(4, **path, steps_per_level=K, denoise=denoise)
    distinct = scheduler.timesteps[::K][:4]
    assert (distinct.diff() < 0).all()
    expected = distinct.repeat_interleave(K).tolist() + distinct[-1:].tolist() * denoise
    assert scheduler.timesteps.tolist() == expected
    assert scheduler.order == K
    assert scheduler.num_inference_steps == 4
    if "prediction_type" in path:
        assert len(scheduler.sigmas) == len(scheduler.timesteps) + 1


def test_a_new_scheduler_walks_the_whole_chain_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = AnnealedLangevinScheduler(num_train_timesteps=6, steps_per_level=2)
    assert scheduler.timesteps.tolist() == [5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("path", PATHS)
def test_the_closing_call_denoises_the_state_that_is_still_on_the_last_level(path):
    scheduler = build(4, **path, steps_per_level=2, step_size=0.3)
    x, t = draw(5), scheduler.timesteps[-1]
    alpha, sigma = point(scheduler, t)
    before, last = scheduler.timesteps[-2], scheduler.timesteps[-1]
    step = scheduler.step(predict(MIXTURE, scheduler, x, t), before, x, generator=seeded(1)).prev_sample
    langevin = x + 0.3 * sigma**2 * MIXTURE.score(x, alpha, sigma) + math.sqrt(0.6) * sigma * draw(5, seed=1)
    torch.testing.assert_close(step, langevin, rtol=1e-9, atol=1e-9)
    results = [scheduler.step(predict(MIXTURE, scheduler, x, t), last, x, generator=seeded(i)) for i in (1, 2)]
    for result in results:  # noise-free
        torch.testing.assert_close(result.prev_sample, MIXTURE.denoise(x, alpha, sigma), rtol=1e-9, atol=1e-9)
        assert torch.equal(result.prev_sample, result.pred_original_sample)


@pytest.mark.parametrize("path", PATHS)
def test_without_denoising_the_last_state_keeps_its_noise_in_the_units_of_the_data(path):
    scheduler = build(4, **path, steps_per_level=2, step_size=0.3, denoise=False)
    x, t = draw(5), scheduler.timesteps[-1]
    alpha, sigma = point(scheduler, t)
    mean, std = law_of_step(scheduler, MIXTURE, t, x)
    expected = (x + 0.3 * sigma**2 * MIXTURE.score(x, alpha, sigma)) / alpha
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(std, torch.full_like(x, math.sqrt(0.6) * sigma / alpha))


def test_a_run_that_starts_in_the_middle_starts_with_the_first_step_on_its_level():
    scheduler, x = build(5, steps_per_level=3), draw(2)
    for level in range(5):  # by value, as after slicing the timesteps in img2img
        fresh = copy.deepcopy(scheduler)
        timesteps = scheduler.timesteps[level * 3 :].tolist()
        for i, t in enumerate(timesteps):
            fresh.step(x, t, x)
            assert fresh.step_index == level * 3 + i + 1
        assert fresh.step_index == 16


def test_the_signal_is_kept_only_in_the_last_step_on_a_level():
    scheduler, x = build(3, steps_per_level=2, step_size=0.062), torch.zeros(2, dtype=torch.float64)
    alphas = [point(scheduler, t)[0] for t in scheduler.timesteps.tolist()]
    for i, t in enumerate(scheduler.timesteps[:-1]):
        sigma, z = point(scheduler, t)[1], draw(2, seed=1)
        moved = scheduler.step(x, t, x, generator=seeded(1)).prev_sample / (math.sqrt(0.124) * sigma * z)
        torch.testing.assert_close(moved, torch.full_like(x, alphas[i + 1] / alphas[i]))


def test_a_level_without_signal_is_left_with_its_noise_and_tells_the_mean_of_the_data():
    scheduler = build(4, **FLOW_FROM_NOISE, steps_per_level=2, step_size=0.3)
    x, (first, second) = draw(5), scheduler.timesteps[:2]
    assert point(scheduler, first) == (0, 1)
    langevin = 0.7 * x + math.sqrt(0.6) * draw(5, seed=1)
    output = predict(GAUSSIAN, scheduler, x, first)
    for t, scale in [(first, 1.0), (second, 0.75)]:  # the next level has sigma = 0.75
        result = scheduler.step(output, t, x, generator=seeded(1))
        torch.testing.assert_close(result.prev_sample, scale * langevin)
        torch.testing.assert_close(result.pred_original_sample, torch.full_like(x, M))


def test_a_flow_path_is_sampled_from_pure_noise_down_to_the_data():
    errors = []
    for K in (4, 16):
        scheduler = build(20, **FLOW_FROM_NOISE, steps_per_level=K, step_size=0.1, denoise=False)
        mean, variance = sampled_law(scheduler, GAUSSIAN)
        errors.append((abs(mean - M), variance - S))
    assert errors[1][0] < errors[0][0] / 2 < 0.05
    assert 0 < errors[1][1] < errors[0][1] / 2


# ---- the levels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 2, 9])
@pytest.mark.parametrize("path", PATHS)
def test_geometric_levels_are_even_in_the_logarithm_of_the_noise_to_signal_ratio(path, N):
    scheduler = build(N, **path)
    table = torch.arange(1000) + ("prediction_type" in path)
    alphas, sigmas = scheduler.signal_and_noise(table)
    ratios = (sigmas / alphas)[alphas > 0].log().numpy()  # of every train timestep, increasing
    levels = np.array([math.log(level.sigma / level.alpha) for level in levels_of(scheduler)])
    wanted = np.linspace(ratios[-1], ratios[0], N)
    if "prediction_type" in path:  # whose levels are continuous, but float32
        np.testing.assert_allclose(levels, wanted, rtol=0, atol=1e-4)
        return
    for level, value in zip(levels, wanted, strict=True):
        # some train timestep between the neighbours of the value is taken
        assert ratios[np.searchsorted(ratios, value - 1e-9) - 1 if value > ratios[0] else 0] - 1e-9 <= level
        assert level <= ratios[min(np.searchsorted(ratios, value + 1e-9), len(ratios) - 1)] + 1e-9


@pytest.mark.parametrize("path", [*PATHS, FLOW_FROM_NOISE])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_path_levels_are_those_of_the_spacing(spacing, path):
    config = {**path, "timestep_spacing": spacing}
    config.pop("levels", None)
    ancestral = DDPMAncestralScheduler(**config)
    ancestral.set_timesteps(7)
    scheduler = build(7, **config, levels="path", steps_per_level=3, denoise=False)
    assert torch.equal(scheduler.timesteps[::3], ancestral.timesteps)


@pytest.mark.parametrize("levels", RULES_OF_LEVELS)
def test_explicit_timesteps_are_the_levels(levels):
    scheduler = build(levels=levels, steps_per_level=2)
    scheduler.set_timesteps(timesteps=[900, 500, 7])
    assert scheduler.timesteps.tolist() == [900, 900, 500, 500, 7, 7, 7]


def test_explicit_sigmas_are_the_levels():
    scheduler = build(**FLOW, steps_per_level=2)
    scheduler.set_timesteps(sigmas=[0.9, 0.5])
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([900.0] * 2 + [500.0] * 3))


# ---- the warning ----------------------------------------------------------------------------------------------------


def warnings_of(scheduler, N):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler.set_timesteps(N)
    return [each for each in caught if each.category is UserWarning]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("path", [*PATHS, FLOW_FROM_NOISE, {**LADDER, "sigma_max": 50.0, "sigma_min": 0.01}])
def test_it_warns_if_and_only_if_the_end_variance_is_above_1_2_and_its_advice_is_enough(path, convention):
    seen = set()
    for N in (1, 2, 7, 14, 15, 40, 100, 232, 600):
        scheduler = build(**path, step_convention=convention, steps_per_level=8, step_size=0.2)
        caught = warnings_of(scheduler, N)
        variance = end_variance(levels_of(scheduler), 0.2 * CONVENTIONS[convention], 8)
        assert len(caught) == (variance > 1.2)
        seen.add(len(caught))
        for each in caught:
            text = str(each.message)
            assert f"{N} levels with 8 Langevin steps of size 0.2 end with {variance:.3g} times" in text
            assert each.filename == __file__  # where the levels are set, not where the library is
            K, e = re.search(r"; (\d+) of size ([\d.]+) would stay below 1.2", text).groups()
            advised = {"steps_per_level": int(K), "step_size": float(e)}
            assert warnings_of(AnnealedLangevinScheduler.from_config(scheduler.config, **advised), N) == []
            assert end_variance(levels_of(scheduler), float(e) * CONVENTIONS[convention], int(K)) <= 1.2
    assert seen == {0, 1}


def test_the_settings_of_the_papers_do_not_warn():
    for settings in (NCSN, NCSNV2):
        scheduler = published(settings)
        assert warnings_of(scheduler, settings["L"]) == []
        assert len(scheduler.timesteps) == settings["L"] * settings["K"] + 1


def test_explicit_levels_are_warned_of_too():
    with pytest.warns(UserWarning, match="2 levels with 10 Langevin steps of size 0.2 end with"):
        build().set_timesteps(timesteps=[999, 0])


@pytest.mark.parametrize("path", [*PATHS, FLOW_FROM_NOISE])
@pytest.mark.parametrize("levels", [20, 50, 300])
def test_the_defaults_are_enough_for_twenty_levels_or_more(levels, path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AnnealedLangevinScheduler(**path).set_timesteps(levels)


# ---- what a step keeps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restriction", RESTRICTIONS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES[1:])
def test_equivalent_outputs_of_the_prediction_types_give_the_same_step(prediction_type, restriction):
    scheduler = build(4, prediction_type=prediction_type, **restriction)
    reference = build(4, **restriction)
    x = draw(2, 2, 5)
    for t in reference.timesteps.tolist():
        steps = [each.step(predict(MIXTURE, each, x, t), t, x, generator=seeded(3)) for each in (scheduler, reference)]
        torch.testing.assert_close(steps[0].prev_sample, steps[1].prev_sample, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(steps[0].pred_original_sample, steps[1].pred_original_sample, rtol=1e-9, atol=1e-9)


def test_clipping_moves_the_state_as_if_the_clipped_data_had_been_predicted():
    clipping, plain = build(4, clip_sample=True, clip_sample_range=0.3), build(4, prediction_type="sample")
    x = draw(4)
    for t in clipping.timesteps.tolist():
        alpha, sigma = point(clipping, t)
        x_0 = ((x - sigma * torch.sin(x)) / alpha).clamp(-0.3, 0.3)
        result = clipping.step(torch.sin(x), t, x, generator=seeded(1))
        expected = plain.step(x_0, t, x, generator=seeded(1))
        torch.testing.assert_close(result.pred_original_sample, x_0)
        torch.testing.assert_close(result.prev_sample, expected.prev_sample)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("restriction", RESTRICTIONS)
def test_a_step_is_elementwise_for_any_shape(shape, restriction):
    scheduler, x = build(3, steps_per_level=2, **restriction), draw(*shape)
    for t in scheduler.timesteps[-3:]:
        result = scheduler.step(0.1 * x, t, x, generator=seeded(1))
        flat = scheduler.step(0.1 * x.reshape(3, -1), t, x.reshape(3, -1), generator=seeded(1))
        assert torch.equal(result.prev_sample, flat.prev_sample.reshape(shape))
        assert torch.equal(result.pred_original_sample, flat.pred_original_sample.reshape(shape))


@pytest.mark.parametrize("restriction", RESTRICTIONS)
def test_a_sample_does_not_depend_on_its_neighbours(restriction):
    scheduler, start = build(5, steps_per_level=2, denoise=False, **restriction), draw(4, 2, 3)

    def samples(rows):
        generators, x = [seeded(i) for i in rows], start[rows]
        for t in scheduler.timesteps:
            x = scheduler.step(torch.sin(3 * x), t, x, generator=generators).prev_sample
        return x

    together = samples([0, 1, 2, 3])
    for i in range(4):
        assert torch.equal(samples([i]), together[i : i + 1])
    assert torch.equal(samples([2, 0]), together[[2, 0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("config", [*RESTRICTIONS, LADDER, FLOW, {"denoise": False}])
def test_a_step_keeps_the_dtype_and_computes_in_float32_at_least(dtype, config):
    scheduler = build(3, steps_per_level=2, **config)
    x, output = draw(2, 2, 3).to(dtype), draw(2, 2, 3, seed=1).to(dtype)
    working = torch.promote_types(dtype, torch.float32)
    for t in scheduler.timesteps:
        result = scheduler.step(output, t, x, generator=seeded(1))
        upcast = scheduler.step(output.to(working), t, x.to(working), generator=seeded(1))
        for name in ("prev_sample", "pred_original_sample"):
            assert result[name].dtype is dtype
            assert torch.equal(result[name], upcast[name].to(dtype))


@pytest.mark.parametrize("path", [*PATHS, FLOW_FROM_NOISE])
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


@pytest.mark.parametrize("path", [*PATHS, FLOW_FROM_NOISE])
def test_a_step_reads_no_value_of_a_device(path):
    # tensors on the meta device have no values: reading one raises
    scheduler = build(**path, steps_per_level=2)
    scheduler.set_timesteps(4, device="meta")
    x = torch.empty(2, 3, 5, device="meta")
    for i, t in enumerate(scheduler.timesteps):
        assert scheduler.step(x, t, x).prev_sample.device.type == "meta"
        assert scheduler.step_index == i + 1


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"steps_per_level": 0}, "steps_per_level must be a positive integer, got 0"),
        ({"steps_per_level": -2}, "steps_per_level must be a positive integer, got -2"),
        ({"steps_per_level": 2.0}, "steps_per_level must be a positive integer, got 2.0"),
        ({"steps_per_level": True}, "steps_per_level must be a positive integer, got True"),
        ({"step_size": 0.0}, r"must be in \(0, 1\] sigma\^2, .* got step_size=0.0"),
        ({"step_size": -0.1}, "got step_size=-0.1"),
        ({"step_size": 1.01}, "got step_size=1.01 with step_convention='ncsnv2'"),
        ({"step_size": 2.01, "step_convention": "ncsn"}, "got step_size=2.01 with step_convention='ncsn'"),
        ({"step_size": math.nan}, "got step_size=nan"),
        ({"step_convention": "other"}, r"step_convention must be one of \['ncsnv2', 'ncsn'\], got 'other'"),
        ({"levels": "other"}, r"levels must be one of \('geometric', 'path'\), got 'other'"),
        ({"timestep_spacing": "other"}, "timestep_spacing must be one of .* got 'other'"),
        ({"prediction_type": "other"}, "prediction_type must be one of .* got 'other'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        AnnealedLangevinScheduler(**config)


def test_the_largest_steps_that_cannot_diverge_are_accepted():
    for config in ({"step_size": 1.0}, {"step_size": 2.0, "step_convention": "ncsn"}):
        assert sampled_law(build(3, **config, steps_per_level=1), POINT)[1] == pytest.approx(0, abs=1e-30)


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
        ({"timestep": 998}, "timestep 998 is not one of the 51 "),
        ({"timestep": -1}, "timestep -1 is not one of the 51 "),
    ],
)
def test_arguments_of_a_step_that_do_not_fit_are_refused(arguments, message):
    arguments = {"model_output": (2, 3), "timestep": 999, "sample": (2, 3)} | arguments
    arguments |= {name: torch.zeros(arguments[name]) for name in ("model_output", "sample")}
    with pytest.raises(ValueError, match=message):
        build(5).step(**arguments)


@pytest.mark.parametrize("levels", RULES_OF_LEVELS)
@pytest.mark.parametrize("N", [0, -1, 1001, 2.5, True, "4"])
def test_a_number_of_levels_that_cannot_be_visited_is_refused(levels, N):
    with pytest.raises(ValueError, match=r"num_inference_steps must be an integer in 1 \.\. 1000"):
        build(levels=levels).set_timesteps(N)


@pytest.mark.parametrize("timesteps", [[], [5, 5], [3, 7], [1000], [-1], [7.5]])
def test_timesteps_that_cannot_be_walked_are_refused(timesteps):
    with pytest.raises(ValueError, match="timesteps must "):
        build().set_timesteps(timesteps=timesteps)


def test_geometric_levels_of_a_path_that_ends_in_pure_noise_are_refused():
    with pytest.raises(ValueError, match="timestep 999 has no signal"):
        build(5, rescale_betas_zero_snr=True, prediction_type="v_prediction")


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


def settings_of(scheduler):
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def test_the_name_that_a_saved_pipeline_records_is_public():
    assert AnnealedLangevinScheduler.__module__ == "annealers"


def test_shared_settings_have_the_names_and_defaults_of_diffusers_and_none_is_passed_on_unnamed():
    ours = inspect.signature(AnnealedLangevinScheduler.__init__).parameters
    theirs = inspect.signature(DDPMScheduler.__init__).parameters
    assert set(theirs) - set(ours) == {"variance_type"}  # which Langevin steps do not have
    assert all(ours[name].default == theirs[name].default for name in theirs if name in ours)
    assert all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in ours.values())
    assert list(inspect.signature(AnnealedLangevinScheduler.step).parameters) == list(
        inspect.signature(DDPMScheduler.step).parameters
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"steps_per_level": 2, "step_size": 0.3, "step_convention": "ncsn", "levels": "path", "denoise": False},
        {"prediction_type": "score", "num_train_timesteps": 30, **LADDER},
        {**FLOW_FROM_NOISE, "shift": 3.0, "clip_sample": False},
        {"trained_betas": np.linspace(0.01, 0.3, 20), "thresholding": True},
    ],
)
def test_a_saved_scheduler_takes_the_same_steps(config, tmp_path):
    scheduler = AnnealedLangevinScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    json.loads((tmp_path / "scheduler_config.json").read_text())
    with Messages() as messages:
        loaded = AnnealedLangevinScheduler.from_pretrained(tmp_path)
    assert messages.texts == []
    assert {name: np.asarray(value).tolist() for name, value in settings_of(scheduler).items()} == settings_of(loaded)
    x = draw(2, 3)
    for each in (scheduler, loaded):
        each.set_timesteps(4)
    assert torch.equal(scheduler.timesteps, loaded.timesteps)
    assert scheduler.order == loaded.order
    for t in scheduler.timesteps.tolist():
        steps = [each.step(torch.sin(x), t, x, generator=seeded(2)).prev_sample for each in (scheduler, loaded)]
        assert torch.equal(*steps)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_a_copy_goes_on_where_the_original_stands(duplicate):
    scheduler, x = build(4, steps_per_level=3), draw(2, 3)
    for t in scheduler.timesteps[:2]:
        scheduler.step(torch.sin(x), t, x)
    copied = duplicate(scheduler)
    assert (copied.step_index, copied.order, copied.timesteps.tolist()) == (2, 3, scheduler.timesteps.tolist())
    steps = [each.step(torch.sin(x), each.timesteps[2], x, generator=seeded(2)) for each in (scheduler, copied)]
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
        ours = AnnealedLangevinScheduler.from_config(before.config)
        after = theirs.from_config(ours.config)
    assert messages.texts == []
    assert settings_of(after) == settings_of(before)
    for name, value in shared.items():
        if name in names:
            assert ours.config[name] == value
    ours.set_timesteps(4)
    assert ours.step(torch.zeros(1, 2), ours.timesteps[0], torch.zeros(1, 2)).prev_sample.isfinite().all()


@pytest.mark.parametrize("theirs", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler])
def test_it_comes_back_unchanged_from_a_scheduler_of_diffusers(theirs):
    config = {"steps_per_level": 3, "step_size": 0.5, "step_convention": "ncsn", "levels": "path", "denoise": False}
    before = AnnealedLangevinScheduler(**config)
    after = AnnealedLangevinScheduler.from_config(theirs.from_config(before.config).config)
    assert {name: after.config[name] for name in settings_of(before)} == settings_of(before)
    assert after.order == 3


def test_the_example_of_the_docstring_runs():
    finder = doctest.DocTestFinder()
    [example] = finder.find(AnnealedLangevinScheduler, "AnnealedLangevinScheduler", module=False)[:1]
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
