r"""Properties of predictor-corrector sampling: its layout, its parts, published code, and laws that are known exactly.

Oracles. Without corrections the sampler is the scheduler of its predictor, ours or Diffusers'. In the coordinates
y = x / alpha of a variance-exploding process the whole sampler is a few lines, written here from Song et al. 2021,
Algorithms 1-5 and App. G, and it is fed the same noise. For Gaussian data with the exact network a run is affine in
its start and in every noise it draws; the coefficients are solved for from a batch whose noises are known, so that a
variance is a sum of squares without sampling error. One Langevin step of size delta takes the variance V on a level
where the data have v to

    (1 - delta / v)^2 V + 2 delta         with the fixed point v / (1 - delta / (2 v))
"""

import copy
import doctest
import inspect
import json
import math
import pickle

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from annealers import (
    AnnealedLangevinScheduler,
    DDPMAncestralScheduler,
    ModifiedEulerMaruyamaScheduler,
    PredictorCorrectorScheduler,
)
from annealers.exact import Gaussian, GaussianMixture
from annealers.schedulers import GaussianPathSchedulerOutput

# what a few annealed levels end with is said by a warning, and one test is about it
pytestmark = pytest.mark.filterwarnings("ignore:.*times the noise variance")

LADDER = {"beta_schedule": "geometric", "sigma_min": 0.02, "sigma_max": 40.0}
FLOW = {"prediction_type": "flow_prediction"}
PATHS = [{}, LADDER, FLOW]
PATH_NAMES = ["chain", "ladder", "flow"]
ON_ALL_PATHS = pytest.mark.parametrize("path", PATHS, ids=PATH_NAMES)
SHORT = {"num_train_timesteps": 40}  # for what is built many times
PREDICTORS = [
    {"predictor": "ddpm"},
    {"predictor": "ddim", "eta": 0.5},
    {"predictor": "euler_maruyama"},
    {"predictor": "modified_euler_maruyama"},
    {"predictor": "reverse_diffusion"},
    {"predictor": "probability_flow"},
    {"predictor": "probability_flow", "solver_order": 2},
    {"predictor": "none"},
]
WITH_ALL_PREDICTORS = pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda p: "-".join(map(str, p.values())))
CORRECTORS = ["langevin", "leimkuhler_matthews"]
RULES = ["sigma", "norm", "batch_norm", "reversal"]
SHAPES = [(3,), (3, 4), (3, 2, 5), (3, 2, 4, 4), (3, 2, 3, 4, 4)]  # the first axis is the batch
M, S = 0.7, 0.25  # mean and variance of the Gaussian data
GAUSSIAN = Gaussian(M, variance=S)
MIXTURE = GaussianMixture([0.3, 0.7], [-1.0, 0.8], [0.04, 0.09])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def build(**config):
    return PredictorCorrectorScheduler(**{"clip_sample": False, "timestep_spacing": "trailing", **config})


def ready(steps, **config):
    scheduler = build(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def point(scheduler, t):
    return tuple(float(c) for c in scheduler.signal_and_noise(t))


def marginal_variance(scheduler, t):
    alpha, sigma = point(scheduler, t)
    return alpha**2 * S + sigma**2


def exact_statistic(**config):
    """E[eps-hat^2] of the Gaussian data at every train timestep."""
    scheduler = build(**config)
    alpha, sigma = scheduler.signal_and_noise(torch.from_numpy(scheduler.train_timesteps))
    return (sigma**2 / (alpha**2 * S + sigma**2)).tolist()


def exact_predictor(**config):
    """The settings with which a prediction step is exact for the Gaussian data."""
    return {
        "predictor": "ddpm",
        "variance_type": "optimal",
        "last_step_noise": True,
        "mean_squared_noise": exact_statistic(**config),
    }


def exact_network(law, scheduler):
    return lambda x, t: law.prediction(scheduler.config.prediction_type, x, *scheduler.signal_and_noise(t))


def gaussian_network(scheduler, mean=M, variance=S):
    """The exact network of Gaussian data in closed form: eps-hat = sigma (x - alpha m) / V."""

    def network(x, t):
        alpha, sigma = (float(c) for c in scheduler.signal_and_noise(t))
        x_hat = (x - alpha * mean) / (alpha**2 * variance + sigma**2)
        eps, x_0 = sigma * x_hat, mean + alpha * variance * x_hat
        return eps - x_0 if scheduler.config.prediction_type == "flow_prediction" else eps

    return network


def bounded(x, t):
    """A network that is no exact one, for what holds for any."""
    return torch.sin(2 * x)


def run(scheduler, x, generator=None, network=None, timesteps=None):
    """The states of a run, the start among them."""
    network = network or bounded
    states = [x]
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
        states.append(x)
    return states


def distinct(scheduler):
    return list(dict.fromkeys(scheduler.timesteps.tolist()))


# ---- the layout -----------------------------------------------------------------------------------------------------


@ON_ALL_PATHS
@pytest.mark.parametrize("corrector_steps", [0, 1, 3])
@pytest.mark.parametrize("N", [1, 2, 5])
def test_each_level_after_the_first_is_called_at_once_more_than_it_is_corrected(N, corrector_steps, path):
    scheduler = ready(N, corrector_steps=corrector_steps, **SHORT, **path)
    levels, timesteps, order = distinct(scheduler), scheduler.timesteps.tolist(), scheduler.order
    assert order == corrector_steps + 1 and len(levels) == N
    assert timesteps == levels[:1] + [t for t in levels[1:] for _ in range(order)]
    assert len(timesteps) == N * order - corrector_steps
    assert timesteps[::order] == levels  # where a pipeline that starts in the middle looks for its level


@ON_ALL_PATHS
@pytest.mark.parametrize("corrector_steps", [1, 3])
def test_the_full_layout_corrects_the_first_level_too(corrector_steps, path):
    scheduler = ready(4, corrector_steps=corrector_steps, layout="full", **SHORT, **path)
    order = corrector_steps + 1
    assert scheduler.timesteps.tolist() == [t for t in distinct(scheduler) for _ in range(order)]
    assert scheduler.order == order and len(scheduler.timesteps) == 4 * order


@ON_ALL_PATHS
@pytest.mark.parametrize("layout", ["heun", "full"])
@pytest.mark.parametrize("corrector_steps", [1, 3])
def test_without_predictor_there_are_only_corrections_and_one_closing_call(corrector_steps, layout, path):
    scheduler = ready(4, predictor="none", corrector_steps=corrector_steps, layout=layout, **SHORT, **path)
    levels = distinct(scheduler)
    assert scheduler.timesteps.tolist() == [t for t in levels for _ in range(corrector_steps)] + levels[-1:]
    assert scheduler.order == corrector_steps and len(scheduler.timesteps) == 4 * corrector_steps + 1


@pytest.mark.parametrize(
    ("layout", "calls"),
    [("heun", "P CCP CCP CCP"), ("full", "CCP CCP CCP CCP")],
)
def test_corrections_stay_on_a_level_and_the_prediction_leaves_it(layout, calls):
    scheduler = ready(4, corrector_steps=2, layout=layout, snr=0.3)
    states = run(scheduler, draw(3, 2), seeded(0), network=lambda x, t: torch.zeros_like(x))
    timesteps = scheduler.timesteps.tolist() + [-1]
    made = ""
    for i, (before, after) in enumerate(zip(states, states[1:], strict=False)):
        made += "C" if timesteps[i] == timesteps[i + 1] else "P"
        assert not torch.equal(before, after)
    assert made == calls.replace(" ", "")


def test_whether_a_correction_is_due_is_known_before_each_call():
    scheduler = ready(3, corrector_steps=2)
    assert not scheduler.is_correction_due
    network, x, due = bounded, draw(2, 3), []
    for t in scheduler.timesteps:
        due.append(scheduler.is_correction_due)
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert due == [False, True, True, False, True, True, False]
    assert not scheduler.is_correction_due  # nothing is
    scheduler.set_timesteps(3)
    scheduler.set_begin_index(1)
    assert scheduler.is_correction_due


@pytest.mark.parametrize(
    ("settings", "due"),
    [
        ({"layout": "full"}, "CCP CCP CCP"),
        ({"predictor": "none"}, "CC CC CC P"),
        ({"predictor": "none", "corrector_steps": 1}, "C C C P"),
        ({"corrector_range": (0.5, 1.0)}, "P CCP PPP"),
        ({"corrector_steps": 0}, "P P P"),
    ],
)
def test_every_correction_is_announced(settings, due):
    scheduler = ready(3, **{"corrector_steps": 2, **SHORT, **settings})
    x, network, announced = draw(2, 3), bounded, ""
    for t in scheduler.timesteps:
        announced += "C" if scheduler.is_correction_due else "P"
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert announced == due.replace(" ", "")


# ---- levels that are not corrected ----------------------------------------------------------------------------------


def in_range(scheduler, t, corrector_range):
    low, high = corrector_range
    largest = scheduler.train_timesteps[-1]
    return low * largest <= t <= high * largest


@ON_ALL_PATHS
@pytest.mark.parametrize("layout", ["heun", "full"])
@pytest.mark.parametrize("corrector_range", [(0.0, 0.5), (0.5, 1.0), (0.3, 0.65), (0.0, 0.0), (0.01, 0.02)])
def test_levels_outside_of_the_range_become_prediction_steps(corrector_range, layout, path):
    for corrector_steps in (1, 2):
        settings = {"corrector_steps": corrector_steps, "layout": layout, "num_train_timesteps": 200, **path}
        scheduler = ready(8, corrector_range=corrector_range, **settings)
        everywhere, order = ready(8, **settings), scheduler.order
        levels, timesteps = distinct(everywhere), scheduler.timesteps.tolist()
        assert len(timesteps) == len(everywhere.timesteps)  # no call is lost
        assert timesteps[::order] == levels  # where a pipeline that starts in the middle looks for its level
        assert (np.diff(distinct(scheduler)) < 0).all() and timesteps[-1] >= (0 if path is not FLOW else 1e-3)
        largest = scheduler.train_timesteps[-1]
        for k, level in enumerate(levels):
            inside = corrector_range[0] * largest <= level <= corrector_range[1] * largest
            has_corrections = inside and (k > 0 or layout == "full")
            assert timesteps.count(level) == (order if has_corrections else 1)
        assert set(timesteps.count(t) for t in timesteps) <= {1, order}


@ON_ALL_PATHS
@pytest.mark.parametrize("layout", ["heun", "full"])
def test_levels_that_are_not_corrected_are_divided_evenly(layout, path):
    scheduler = build(corrector_range=(0.0, 0.0), corrector_steps=3, layout=layout, **path)
    scheduler.set_timesteps(timesteps=[800, 400, 200])
    end = 0 if path is FLOW else -1
    expected = [800, 700, 600, 500, 400, 350, 300, 250, 200]
    expected += [200 + (end - 200) * i / 4 for i in range(1, 4)] if layout == "full" else []
    np.testing.assert_allclose(scheduler.timesteps.numpy(), expected, atol=0 if path is FLOW else 0.5)


@pytest.mark.parametrize("layout", ["heun", "full"])
def test_steps_are_divided_between_corrected_levels_too(layout):
    scheduler = build(corrector_range=(0.3, 0.65), corrector_steps=1, layout=layout)
    scheduler.set_timesteps(timesteps=[900, 700, 600, 500, 200, 100])
    expected = {
        "heun": [900, 800, 700, 600, 600, 500, 500, 350, 200, 150, 100],
        "full": [900, 800, 700, 650, 600, 600, 500, 500, 200, 150, 100, 50],
    }
    np.testing.assert_allclose(scheduler.timesteps.numpy(), expected[layout], atol=0.5)


@pytest.mark.parametrize("kind", ["euler", "ddpm"])
def test_with_an_empty_range_the_sampler_is_the_predictor_on_the_finer_levels(kind):
    predictor = {"euler": {"predictor": "euler_maruyama"}, "ddpm": {"predictor": "ddpm"}}[kind]
    scheduler = ready(6, corrector_steps=2, corrector_range=(0.0, 0.0), **predictor)
    alone = build(corrector_steps=0, **predictor)
    assert len(set(scheduler.timesteps.tolist())) == len(scheduler.timesteps)
    alone.set_timesteps(timesteps=scheduler.timesteps)
    x = draw(3, 2)
    assert torch.equal(run(scheduler, x, seeded(3))[-1], run(alone, x, seeded(3))[-1])


def test_prediction_steps_without_room_between_the_levels_are_refused():
    for layout in ("heun", "full"):
        settings = {"corrector_steps": 3, "corrector_range": (0.5, 1.0), "num_train_timesteps": 100, "layout": layout}
        scheduler = ready(25, **settings)  # just room
        assert (np.diff(distinct(scheduler)) < 0).all()
        with pytest.raises(ValueError, match=r"outside of corrector_range=\(0.5, 1.0\).*4 steps.*use fewer levels"):
            scheduler.set_timesteps(40)
    build(corrector_steps=3, corrector_range=(0.5, 1.0), **FLOW).set_timesteps(500)  # continuous: there is room


@pytest.mark.parametrize(
    ("layout", "levels", "expected", "too_many"),
    [
        ("heun", [20, 18, 14], [20, 19, 18, 16, 14], [20, 19]),
        ("heun", [5, 3, 1], [5, 4, 3, 2, 1], [5, 4, 2]),
        ("full", [3, 1], [3, 2, 1, 0], [2, 1]),
        ("full", [9, 7, 0], [9, 8, 7, 4, 1, 0], [1, 0]),  # below 0 there is none: what has no room moves up
    ],
)
def test_prediction_steps_may_take_every_train_timestep_between_the_levels_and_no_other(
    layout, levels, expected, too_many
):
    scheduler = build(corrector_steps=1, corrector_range=(1.0, 1.0), layout=layout)
    scheduler.set_timesteps(timesteps=levels)
    assert scheduler.timesteps.tolist() == expected
    with pytest.raises(ValueError, match="outside of corrector_range"):
        scheduler.set_timesteps(timesteps=too_many)


# ---- without corrections: the predictor alone -----------------------------------------------------------------------


def outputs(variance_type):
    two_headed = variance_type in ("learned", "learned_range", "posterior")
    return lambda x, t: torch.cat([torch.sin(2 * x), torch.cos(x)], dim=1) if two_headed else torch.sin(2 * x)


VARIANCE_TYPES = [None, "fixed_small", "fixed_large", "learned", "learned_range", "optimal", "posterior"]


@ON_ALL_PATHS
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES + ["fixed_small_log", "fixed_large_log"])
def test_ddpm_alone_is_the_ancestral_scheduler_bit_for_bit(variance_type, path):
    for clip, dtype in ((True, torch.float32), (False, torch.float64)):
        config = {"variance_type": variance_type, "last_step_noise": clip, "clip_sample": clip, **path}
        if variance_type == "optimal":
            config |= {"mean_squared_noise": exact_statistic(**path)}
        ours = build(corrector_steps=0, **config)
        theirs = DDPMAncestralScheduler(timestep_spacing="trailing", **config)
        ours.set_timesteps(timesteps=[900, 700, 300, 200, 10])
        theirs.set_timesteps(timesteps=[900, 700, 300, 200, 10])
        start = draw(2, 3, 4).to(dtype)
        pairs = (run(each, start, seeded(5), outputs(variance_type)) for each in (ours, theirs))
        assert all(torch.equal(x, y) for x, y in zip(*pairs, strict=True))


@ON_ALL_PATHS
@pytest.mark.parametrize("variance", ["modified_euler_maruyama", "euler_maruyama"])
def test_euler_maruyama_alone_is_its_scheduler_bit_for_bit(variance, path):
    ours = ready(7, corrector_steps=0, predictor=variance, **path)
    theirs = ModifiedEulerMaruyamaScheduler(
        variance=variance, step_schedule="path", clip_sample=False, timestep_spacing="trailing", **path
    )
    theirs.set_timesteps(7)
    start = draw(2, 3)
    pairs = (run(each, start, seeded(5)) for each in (ours, theirs))
    assert all(torch.equal(x, y) for x, y in zip(*pairs, strict=True))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_alone_is_that_of_diffusers(eta, clip):
    ours = ready(20, corrector_steps=0, predictor="ddim", eta=eta, clip_sample=clip)
    theirs = DDIMScheduler(timestep_spacing="trailing", clip_sample=clip)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.final_alpha_cumprod = theirs.final_alpha_cumprod.double()
    theirs.set_timesteps(20)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    x = y = draw(2, 3)
    mine, other = seeded(5), seeded(5)
    for t in ours.timesteps:
        x = ours.step(torch.sin(x), t, x, generator=mine).prev_sample
        y = theirs.step(torch.sin(y), t, y, eta=eta, use_clipped_model_output=True, generator=other).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver_order", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 8, 30])
def test_the_probability_flow_is_the_multistep_solver_of_diffusers_on_the_same_levels(steps, solver_order):
    theirs = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=solver_order,
        solver_type="midpoint",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        beta_start=1e-4,
        beta_end=0.02,
    )
    theirs.set_timesteps(steps)
    ours = build(corrector_steps=0, predictor="probability_flow", solver_order=solver_order)
    ours.set_timesteps(timesteps=theirs.timesteps)
    x = y = draw(2, 3)
    for t in ours.timesteps:
        x = ours.step(torch.sin(x), t, x).prev_sample
        y = theirs.step(torch.sin(y), t, y).prev_sample
        torch.testing.assert_close(x, y.double(), rtol=2e-5, atol=2e-5)  # theirs steps in float32


@pytest.mark.parametrize("path", PATHS[:2], ids=PATH_NAMES[:2])
def test_reverse_diffusion_is_the_forward_chain_reversed(path):
    # Song et al. 2021, Eqs. 46-47, with the beta of the levels that are stepped between
    scheduler = ready(6, corrector_steps=0, predictor="reverse_diffusion", **path)
    timesteps = scheduler.timesteps.tolist()
    x, z, network = draw(4, 1), draw(4, 1, seed=3), exact_network(MIXTURE, scheduler)
    for t, s in zip(timesteps, timesteps[1:] + [-1], strict=True):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = point(scheduler, t), point(scheduler, s)
        score = MIXTURE.score(x, alpha_t, sigma_t)
        noise = z if s >= 0 else 0
        if path is LADDER:  # in y = x / alpha
            gap = (sigma_t / alpha_t) ** 2 - (sigma_s / alpha_s) ** 2
            expected = alpha_s * (x / alpha_t + gap * alpha_t * score + math.sqrt(gap) * noise)
        else:
            beta = 1 - (alpha_t / alpha_s) ** 2
            expected = (2 - math.sqrt(1 - beta)) * x + beta * score + math.sqrt(beta) * noise
        result = scheduler.step(network(x, t), t, x, generator=seeded(3)).prev_sample
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@ON_ALL_PATHS
@pytest.mark.parametrize(("corrector_steps", "spacing"), [(1, "trailing"), (4, "geometric")])
def test_without_predictor_it_is_annealed_langevin_with_twice_the_squared_ratio(spacing, corrector_steps, path):
    r, config = 0.4, {"timestep_spacing": spacing, **path}
    ours = ready(6, predictor="none", corrector_steps=corrector_steps, snr=r, **config)
    theirs = AnnealedLangevinScheduler(
        levels="path", clip_sample=False, steps_per_level=corrector_steps, step_size=2 * r**2, **config
    )
    theirs.set_timesteps(6)
    assert torch.equal(ours.timesteps, theirs.timesteps) and ours.order == theirs.order
    start = draw(2, 3)
    pairs = (run(each, start, seeded(5)) for each in (ours, theirs))
    for x, y in zip(*pairs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_a_ladder_that_is_too_coarse_without_predictor_is_warned_of_as_there():
    config = {"clip_sample": False, "levels": "path", "steps_per_level": 2, "step_size": 2 * 0.4**2, **LADDER}
    theirs = AnnealedLangevinScheduler(**config)
    ours = build(predictor="none", corrector_steps=2, snr=0.4, timestep_spacing="leading", **LADDER)
    messages = []
    for each in (ours, theirs):
        with pytest.warns(UserWarning, match="times the noise variance") as caught:
            each.set_timesteps(6)
        messages.append(str(caught[0].message))
    variance = [message.split(" times the noise")[0].split()[-1] for message in messages]
    assert variance[0] == variance[1] and float(variance[0]) > 1.2


# ---- parity with published code -------------------------------------------------------------------------------------


def variance_exploding_pc(ratios, y, noise, predictor, step_size, corrector_steps):
    """Algorithm 1 of Song et al. 2021 in the order of their code: on each level correct, then predict.

    `ratios` are the noise levels from the largest to the smallest; the data are the level 0 after them. `noise(y)`
    draws, `step_size(score, z, level)` is Eq. (2 (r |z| / |s|)^2) of Algorithms 4 and 5 or another rule.
    """
    eta = predictor.get("eta", 1.0)
    past = None
    for level, below in zip(ratios, [*ratios[1:], 0.0], strict=True):
        for _ in range(corrector_steps):
            score, z = MIXTURE.score(y, 1.0, level), noise(y)
            size = step_size(score, z, level)
            y = y + size * score + (2 * size) ** 0.5 * z
        score, gap = MIXTURE.score(y, 1.0, level), level**2 - below**2
        denoised = y + level**2 * score
        if predictor["predictor"] == "reverse_diffusion":
            y, std = y + gap * score, math.sqrt(gap)
        elif predictor["predictor"] == "ddpm":
            y, std = y + gap * score, math.sqrt(below**2 * gap / level**2)
        elif predictor["predictor"] == "ddim":
            std = eta * math.sqrt(below**2 * gap / level**2)
            y = denoised - math.sqrt(below**2 - std**2) * level * score
        else:  # along straight lines from the denoised, extrapolated in log noise
            std, direction = 0.0, denoised
            if past is not None and below > 0 and predictor.get("solver_order") == 2:
                slope = (denoised - past[1]) / math.log(past[0] / level)
                direction = denoised + slope * math.log(level / below) / 2
            y = direction + below / level * (y - direction)
            past = (level, denoised)
        if below > 0 and std > 0:  # the last output is the mean
            y = y + std * noise(y)
    return y


def rule_of(name, r):
    def size(score, z, level):
        if name == "sigma":
            return 2 * (r * level) ** 2
        norms = [values.reshape(len(values), -1).norm(dim=1) for values in (z, score)]
        if name == "batch_norm":
            norms = [each.mean() for each in norms]
        size = 2 * (r * norms[0] / norms[1]) ** 2
        if name == "norm":
            size = size.clamp(max=level**2)
        return size.reshape((-1,) + (1,) * (z.ndim - 1))

    return size


@ON_ALL_PATHS
@pytest.mark.parametrize("rule", ["sigma", "norm", "batch_norm"])
@pytest.mark.parametrize(
    "predictor",
    [
        {"predictor": "reverse_diffusion"},
        {"predictor": "ddpm"},
        {"predictor": "ddim", "eta": 0.0},
        {"predictor": "ddim", "eta": 0.6},
        {"predictor": "probability_flow"},
        {"predictor": "probability_flow", "solver_order": 2},
    ],
    ids=lambda p: "-".join(map(str, p.values())),
)
def test_it_is_the_published_sampler_in_variance_exploding_coordinates(predictor, rule, path):
    if predictor["predictor"] == "reverse_diffusion" and path is not LADDER:
        path = LADDER | {"timestep_spacing": "linspace"}  # elsewhere it discretises another process
    r, steps = 0.16, 2
    scheduler = build(corrector_steps=steps, snr=r, step_size_rule=rule, layout="full", **predictor, **path)
    scheduler.set_timesteps(timesteps=[995, 800, 500, 499, 250, 100, 3, 1])
    points = [point(scheduler, t) for t in distinct(scheduler)]
    x = draw(3, 2, 4)
    mine, other = seeded(7), seeded(7)
    expected = variance_exploding_pc(
        [sigma / alpha for alpha, sigma in points],
        x / points[0][0],
        lambda y: torch.randn(y.shape, generator=other, dtype=y.dtype),
        predictor,
        rule_of(rule, r),
        steps,
    )
    result = run(scheduler, x, mine, exact_network(MIXTURE, scheduler))[-1]
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(mine.get_state(), other.get_state())  # neither has drawn more


def test_the_published_sampler_on_its_own_ladder_starts_from_its_largest_noise():
    # Song et al. 2021 for CIFAR-10: 0.01 to 50, r = 0.16, one correction; their start is sigma_max times noise
    settings = {"beta_schedule": "geometric", "sigma_min": 0.01, "sigma_max": 50.0, "num_train_timesteps": 40}
    scheduler = ready(
        40, predictor="reverse_diffusion", layout="full", step_size_rule="batch_norm", snr=0.16, **settings
    )
    ratios = np.geomspace(50.0, 0.01, 40)
    z = draw(4, 3, 8, 8)
    mine, other = seeded(7), seeded(7)
    expected = variance_exploding_pc(
        ratios.tolist(),
        50.0 * z,
        lambda y: torch.randn(y.shape, generator=other, dtype=y.dtype),
        {"predictor": "reverse_diffusion"},
        rule_of("batch_norm", 0.16),
        1,
    )
    x = z * 50.0 / math.hypot(1, 50.0)
    result = run(scheduler, x, mine, exact_network(MIXTURE, scheduler))[-1]
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_the_predictor_between_skipped_levels_is_that_of_a_chain_with_its_betas_derived_anew(variance_type):
    # guided-diffusion: beta = 1 - alpha_bar / last alpha_bar over the levels that are used (Nichol & Dhariwal 2021)
    used = [0, 13, 14, 200, 201, 650, 999]
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32)
    alphas_cumprod = (1 - betas).cumprod(0).double().numpy()[used]
    previous = np.append(1.0, alphas_cumprod[:-1])
    betas = 1 - alphas_cumprod / previous
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    clipped = np.append(posterior_variance[1], posterior_variance[1:])
    on_x_0 = betas * np.sqrt(previous) / (1 - alphas_cumprod)
    on_x_t = (1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod)

    scheduler = build(corrector_steps=0, clip_sample=True, variance_type=variance_type)
    scheduler.set_timesteps(timesteps=used[::-1])
    network = outputs(variance_type)
    x = y = draw(2, 3, 4)
    mine, other = seeded(5), seeded(5)
    for i, t in reversed(list(enumerate(used))):
        x = scheduler.step(network(x, t), t, x, generator=mine).prev_sample
        output = network(y, t)
        eps, values = output[:, :3], output[:, 3:]
        x_0 = ((y - math.sqrt(1 - alphas_cumprod[i]) * eps) / math.sqrt(alphas_cumprod[i])).clamp(-1, 1)
        mean = on_x_0[i] * x_0 + on_x_t[i] * y
        log_variance = {
            "fixed_small": math.log(clipped[i]),
            "fixed_large": math.log(np.append(posterior_variance[1], betas[1:])[i]),
            "learned_range": (values + 1) / 2 * math.log(betas[i]) + (1 - values) / 2 * math.log(clipped[i]),
        }[variance_type]
        y = mean
        if i > 0:
            y = mean + torch.as_tensor(log_variance / 2, dtype=y.dtype).exp() * torch.randn(
                y.shape, generator=other, dtype=y.dtype
            )
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


# ---- exact laws of whole runs ---------------------------------------------------------------------------------------


def coefficients(scheduler, network, draws=None):
    """Each state of a run is offset + slope start + sum_k c_k z_k; (states, 2 + draws), in this order.

    The batch has more samples than there are unknowns, and the residual of the fit says whether the run is affine.
    """
    draws = 2 * len(scheduler.timesteps) if draws is None else draws
    B = draws + 40
    start, generator = draw(B, seed=9), seeded(1)
    noises = [torch.randn(B, generator=generator, dtype=torch.float64) for _ in range(draws)]
    known = torch.stack([torch.ones(B, dtype=torch.float64), start, *noises], dim=1)
    states = torch.stack(run(scheduler, start, seeded(1), network), dim=1)
    solution = torch.linalg.lstsq(known, states).solution
    torch.testing.assert_close(known @ solution, states, rtol=1e-9, atol=1e-9)
    return solution.T


def laws(scheduler, start_mean=None, start_variance=None, network=None, draws=None):
    """Mean and variance of each state of a run, from the exact law of the first level unless another is given."""
    first = scheduler.timesteps[0].item()
    if start_variance is None:
        start_mean, start_variance = point(scheduler, first)[0] * M, marginal_variance(scheduler, first)
    solution = coefficients(scheduler, network or gaussian_network(scheduler), draws)
    means = solution[:, 0] + solution[:, 1] * start_mean
    variances = solution[:, 1] ** 2 * start_variance + (solution[:, 2:] ** 2).sum(1)
    return means.tolist(), variances.tolist()


@ON_ALL_PATHS
@pytest.mark.parametrize("r", [0.1, 0.4, math.sqrt(0.5)])
def test_langevin_goes_to_its_own_stationary_law_and_as_fast_as_it_must(path, r):
    t, steps = 600, 40
    scheduler = build(corrector_steps=steps, snr=r, layout="full", **path)
    scheduler.set_timesteps(timesteps=[t])
    (alpha, sigma), v = point(scheduler, t), marginal_variance(scheduler, t)
    delta = 2 * (r * sigma) ** 2
    stationary, kept = v / (1 - delta / (2 * v)), (1 - delta / v) ** 2
    means, variances = laws(scheduler, start_mean=3.0, start_variance=0.1)
    for k in range(steps + 1):
        assert variances[k] == pytest.approx(stationary + kept**k * (0.1 - stationary), rel=1e-10)
        assert means[k] == pytest.approx(alpha * M + (1 - delta / v) ** k * (3.0 - alpha * M), rel=1e-10)
    assert stationary - v == pytest.approx(delta / 2, rel=delta / v)


@ON_ALL_PATHS
@pytest.mark.parametrize("corrector_steps", [1, 2, 5])
@pytest.mark.parametrize("r", [0.16, 0.4])
def test_leimkuhler_matthews_after_an_exact_prediction_is_exact_on_every_level(path, r, corrector_steps):
    scheduler = build(
        corrector="leimkuhler_matthews", corrector_steps=corrector_steps, snr=r, **exact_predictor(**path), **path
    )
    scheduler.set_timesteps(timesteps=[980, 800, 500, 200, 50])
    means, variances = laws(scheduler)
    for t, mean, variance in zip([*scheduler.timesteps.tolist(), None], means, variances, strict=True):
        alpha, v = (1.0, S) if t is None else (point(scheduler, t)[0], marginal_variance(scheduler, t))
        assert mean == pytest.approx(alpha * M, rel=1e-8)
        assert variance == pytest.approx(v, rel=1e-8)
    # the plain step adds delta^2 / v each time
    plain = PredictorCorrectorScheduler.from_config(scheduler.config, corrector="langevin")
    plain.set_timesteps(timesteps=[980, 800, 500, 200, 50])
    t = 800
    excess = laws(plain)[1][2] - marginal_variance(plain, t)
    assert excess == pytest.approx((2 * (r * point(plain, t)[1]) ** 2) ** 2 / marginal_variance(plain, t), rel=1e-6)


@pytest.mark.parametrize(
    ("predictor", "levels"),
    [
        ({"predictor": "probability_flow"}, [900, 600, 300]),
        ({"predictor": "ddim", "eta": 0.1}, [900, 600, 300]),
        ({"predictor": "ddim", "eta": 0.3}, [900, 600, 300]),
        ({"predictor": "ddpm"}, [900, 890, 880, 870]),
        ({"predictor": "ddpm"}, [900, 600, 300]),
        ({"predictor": "euler_maruyama"}, [900, 895, 300]),
    ],
)
@ON_ALL_PATHS
@pytest.mark.parametrize("corrector_steps", [1, 3])
def test_the_bias_of_leimkuhler_matthews_is_of_second_order_and_comes_from_the_noise_that_lacks(
    path, predictor, levels, corrector_steps
):
    r = 0.35
    scheduler = build(corrector="leimkuhler_matthews", corrector_steps=corrector_steps, snr=r, **predictor, **path)
    scheduler.set_timesteps(timesteps=levels)
    solution = coefficients(scheduler, gaussian_network(scheduler), draws=len(levels) * (corrector_steps + 2))
    variances = (
        solution[:, 1] ** 2 * marginal_variance(scheduler, levels[0]) + (solution[:, 2:] ** 2).sum(1)
    ).tolist()
    entry = 1
    for t in levels[1:]:
        v, sigma = marginal_variance(scheduler, t), point(scheduler, t)[1]
        delta, predicted = 2 * (r * sigma) ** 2, variances[entry]
        # the noise of the prediction is the last draw that the state depends on; a deterministic one has none
        newest = int(solution[entry].abs().gt(1e-9).nonzero().max())
        is_noisy = newest >= 2 and abs(float(solution[entry - 1, newest])) < 1e-9
        deviation = abs(float(solution[entry, newest])) if is_noisy else 0.0
        share = min(1.0, deviation / math.sqrt(delta / 2))
        for k in range(1, corrector_steps + 1):
            kept = (1 - delta / v) ** (2 * k)
            lacking = (1 - delta / v) ** (2 * k - 2) * delta**2 / v * (1 - share)
            assert variances[entry + k] == pytest.approx(v + kept * (predicted - v) + lacking, rel=1e-8)
        entry += corrector_steps + 1


@pytest.mark.parametrize("corrector_steps", [1, 3])
def test_annealed_leimkuhler_matthews_keeps_its_noise_from_level_to_level(corrector_steps):
    # on one level any variance is kept; the move to the next scales the noise with the state that contains it
    scheduler = build(
        predictor="none", corrector="leimkuhler_matthews", corrector_steps=corrector_steps, snr=0.3, **LADDER
    )
    scheduler.set_timesteps(timesteps=[700, 690, 680, 670])
    levels = distinct(scheduler)
    _, variances = laws(scheduler)
    variance = marginal_variance(scheduler, 700)
    contained = 0.0  # none is known to be in the start
    for i, t in enumerate(levels):
        (alpha, sigma), v = point(scheduler, t), marginal_variance(scheduler, t)
        delta = 2 * (0.3 * sigma) ** 2
        share = min(1.0, contained / math.sqrt(delta / 2))
        variance = v + (1 - delta / v) ** 2 * (variance - v) + delta**2 / v * (1 - share)
        for _ in range(corrector_steps - 1):
            variance = v + (1 - delta / v) ** 2 * (variance - v)
        if i + 1 < len(levels):
            grows = point(scheduler, levels[i + 1])[0] / alpha
            variance, contained = grows**2 * variance, grows * math.sqrt(delta / 2)
            assert variances[(i + 1) * corrector_steps] == pytest.approx(variance, rel=1e-8)


@ON_ALL_PATHS
@pytest.mark.parametrize("predictor", PREDICTORS[:-1], ids=lambda p: "-".join(map(str, p.values())))
def test_a_corrector_without_step_leaves_the_predictor_alone(predictor, path):
    levels = [900, 600, 250]
    alone = build(corrector_steps=0, **predictor, **path)
    alone.set_timesteps(timesteps=levels)
    expected = [draw(4, 3)]
    for i, t in zip((0, 3, 6), alone.timesteps, strict=True):
        expected.append(alone.step(bounded(expected[-1], t), t, expected[-1], generator=seeded(i)).prev_sample)
    for rule, corrector in zip(RULES[:3], ["langevin", "leimkuhler_matthews", "leimkuhler_matthews"], strict=True):
        scheduler = build(snr=0.0, corrector_steps=2, step_size_rule=rule, corrector=corrector, **predictor, **path)
        scheduler.set_timesteps(timesteps=levels)
        x = expected[0]
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(bounded(x, t), t, x, generator=seeded(i)).prev_sample
            assert torch.equal(x, expected[1 + i // 3])


@pytest.mark.parametrize("corrector", CORRECTORS)
def test_the_law_goes_to_that_of_the_predictor_as_the_steps_go_to_zero(corrector):
    levels = [900, 600, 250]
    alone = build(corrector_steps=0, predictor="ddim", eta=0.7)
    alone.set_timesteps(timesteps=levels)
    expected = laws(alone)[1][-1]
    differences = []
    for r in (0.02, 0.01, 0.005):
        scheduler = build(snr=r, corrector=corrector, predictor="ddim", eta=0.7)
        scheduler.set_timesteps(timesteps=levels)
        differences.append(abs(laws(scheduler)[1][-1] - expected))
    assert differences[0] < 1e-3
    for ratio in np.divide(differences[:-1], differences[1:]):
        assert ratio == pytest.approx(4, abs=0.2)  # delta is quadratic in r


def refined(path, halvings):
    """Levels from one fixed level to another, each time with half the steps in between."""
    if path is FLOW:
        return np.linspace(900, 100, 15 * 2**halvings + 1).tolist(), FLOW
    T = 121
    betas = {"beta_start": 1e-4 * 1000 / T, "beta_end": 0.02 * 1000 / T}
    config = {"num_train_timesteps": T, **(LADDER if path is LADDER else betas)}
    return list(range(120, -1 if path is LADDER else 29, -(2 ** (3 - halvings)))), config


@ON_ALL_PATHS
@pytest.mark.parametrize(
    ("predictor", "order"),
    [
        ({"predictor": "ddpm"}, 1),
        ({"predictor": "ddpm", "variance_type": "fixed_large"}, 1),
        ({"predictor": "ddim", "eta": 0.0}, 1),
        ({"predictor": "ddim", "eta": 1.0}, 1),
        ({"predictor": "euler_maruyama"}, 1),
        ({"predictor": "modified_euler_maruyama"}, 1),
        ({"predictor": "reverse_diffusion"}, 1),
        ({"predictor": "probability_flow"}, 1),
        ({"predictor": "probability_flow", "solver_order": 2}, 2),
    ],
)
def test_the_variance_converges_in_the_order_of_the_predictor(predictor, order, path):
    errors = []
    for halvings in (1, 2, 3):
        levels, config = refined(path, halvings)
        scheduler = build(corrector_steps=0, **predictor, **config)
        scheduler.set_timesteps(timesteps=levels)
        _, variances = laws(scheduler, draws=len(levels))
        errors.append(abs(variances[-2] - marginal_variance(scheduler, levels[-1])))  # before the step to the data
    measured = np.log2(np.divide(errors[:-1], errors[1:]))
    assert measured[-1] == pytest.approx(order, abs=0.1)
    assert errors[0] < 0.3


# ---- guidance as prediction and correction --------------------------------------------------------------------------


def guided_variance(predict, correct, N, **settings):
    """The sampled variance for p(x | c) = N(0, 1) and p(x) = N(0, 2), on N levels of the flow from pure noise."""
    scheduler = build(**FLOW, **settings)
    scheduler.set_timesteps(timesteps=np.linspace(1000, 1000 / N, N).tolist())
    unconditional, conditional = gaussian_network(scheduler, 0.0, 2.0), gaussian_network(scheduler, 0.0, 1.0)

    def network(x, t):
        w = correct if scheduler.is_correction_due else predict
        return (1 - w) * unconditional(x, t) + w * conditional(x, t)

    _, variances = laws(scheduler, start_mean=0.0, start_variance=1.0, network=network)
    return variances[-1]


W = 3.0
GUIDED_FLOW, GUIDED_DDPM = 2 ** (1 - W), (2 - 2 ** (2 - 2 * W)) / (2 * W - 1)


@pytest.mark.parametrize(
    ("scales", "settings", "limit"),
    [
        ((W, W), {"predictor": "ddim", "corrector_steps": 0}, GUIDED_FLOW),
        ((W, W), {"predictor": "ddpm", "corrector_steps": 0}, GUIDED_DDPM),
        ((1.0, 2 * W - 1), {"predictor": "ddim", "step_size_rule": "reversal"}, GUIDED_DDPM),
        ((1.0, 2 * W - 1), {"predictor": "ddim", "step_size_rule": "reversal", "corrector_steps": 2}, GUIDED_DDPM),
    ],
    ids=["ddim", "ddpm", "one correction", "two corrections"],
)
def test_a_conditional_flow_with_guided_corrections_is_guided_ancestral_sampling(scales, settings, limit):
    # Bradley & Nakkiran 2024, Theorem 3 and its closed forms: Langevin at 2 w - 1 makes of the flow at 1 DDPM at w
    errors = [guided_variance(*scales, N, **settings) - limit for N in (40, 80, 160)]
    assert abs(errors[-1]) < 0.02 < abs(GUIDED_DDPM - GUIDED_FLOW)
    for order in np.log2(np.divide(errors[:-1], errors[1:])):
        assert order == pytest.approx(1, abs=0.15)


@ON_ALL_PATHS
@pytest.mark.parametrize("corrector_steps", [1, 3])
def test_the_reversal_rule_adds_as_much_noise_as_the_ancestral_step_that_leads_to_the_level(path, corrector_steps):
    scheduler = build(predictor="ddim", step_size_rule="reversal", corrector_steps=corrector_steps, **path)
    scheduler.set_timesteps(timesteps=[900, 600, 250])
    network = gaussian_network(scheduler)
    x = torch.zeros(3, dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps.tolist()):
        steps = [copy.deepcopy(scheduler).step(network(x, t), t, x, generator=seeded(s)) for s in (1, 2)]
        gap = steps[0].prev_sample - steps[1].prev_sample
        std = float((gap / (draw(3, seed=1) - draw(3, seed=2)))[0])
        if i in (0, corrector_steps + 1, 2 * corrector_steps + 2):
            assert std == 0
        else:
            before = 900 if t == 600 else 600
            (alpha_t, sigma_t), (alpha_s, sigma_s) = point(scheduler, before), point(scheduler, t)
            ancestral = 1 / (1 / sigma_s**2 + 1 / ((sigma_t * alpha_s / alpha_t) ** 2 - sigma_s**2))
            assert std**2 * corrector_steps == pytest.approx(ancestral, rel=1e-9)
        scheduler.step(network(x, t), t, x)


@pytest.mark.parametrize("settings", [{}, {"predictor": "none"}])
@pytest.mark.parametrize("corrector", CORRECTORS)
def test_on_the_first_level_to_which_no_step_leads_the_reversal_rule_does_nothing(corrector, settings):
    scheduler = ready(2, step_size_rule="reversal", layout="full", corrector_steps=3, corrector=corrector, **settings)
    x = draw(2, 3)
    states = run(scheduler, x, seeded(0))
    assert torch.equal(states[1], x) and torch.equal(states[2], x)
    assert states[-1].isfinite().all()


# ---- the size of a correction ---------------------------------------------------------------------------------------


def corrected(rule, x, eps, z_seed=1, r=0.3, t=600, corrector="langevin", **path):
    """A state after one correction on the level t."""
    scheduler = build(
        step_size_rule=rule, snr=r, layout="full", prediction_type="epsilon", corrector=corrector, **path
    )
    scheduler.set_timesteps(timesteps=[900, t])
    scheduler.set_begin_index(2)
    return scheduler.step(eps, t, x, generator=seeded(z_seed)).prev_sample


def test_a_norm_is_of_one_sample_a_batch_norm_of_all_and_the_noise_level_of_none():
    x, eps = draw(4, 2, 3), draw(4, 2, 3, seed=2)
    louder = eps.clone()
    louder[3] *= 3
    changed = {rule: (corrected(rule, x, eps) - corrected(rule, x, louder))[:3].abs().max() for rule in RULES}
    assert changed["sigma"] == changed["norm"] == changed["reversal"] == 0
    assert changed["batch_norm"] > 1e-3
    own = {rule: corrected(rule, x, eps)[3] - corrected(rule, x, louder)[3] for rule in ("sigma", "norm")}
    sigma, z = point(build(), 600)[1], draw(4, 2, 3, seed=1)
    torch.testing.assert_close(own["sigma"], 2 * (0.3 * sigma) ** 2 / sigma * 2 * eps[3])
    for scale, network in ((1, eps), (3, louder)):  # Song et al. 2021, Algorithm 4
        score = -network[3] / sigma
        size = 2 * (0.3 * z[3].norm() / score.norm()) ** 2
        expected = x[3] + size * score + (2 * size).sqrt() * z[3]
        torch.testing.assert_close(corrected("norm", x, network)[3], expected, msg=str(scale))


def test_a_batch_of_one_has_the_same_step_by_both_norms():
    x, eps = draw(1, 2, 3), draw(1, 2, 3, seed=2)
    assert torch.equal(corrected("norm", x, eps), corrected("batch_norm", x, eps))


@pytest.mark.parametrize(
    ("rule", "scale"), [("norm", 0.0), ("norm", 1e-30), ("norm", 1e-3), ("norm", 0.15), ("batch_norm", 0.0)]
)
def test_a_step_by_norms_is_the_noise_variance_where_it_would_be_more(rule, scale):
    x, eps = draw(4, 2, 3), scale * draw(4, 2, 3, seed=2).sign()
    sigma, z = point(build(), 600)[1], draw(4, 2, 3, seed=1)
    torch.testing.assert_close(corrected(rule, x, eps), x - sigma * eps + math.sqrt(2) * sigma * z)


COMBINATIONS = [
    {"corrector": "langevin", "step_size_rule": "sigma"},
    {"corrector": "leimkuhler_matthews", "step_size_rule": "sigma", "layout": "full"},
    {"corrector": "langevin", "step_size_rule": "norm", "layout": "full"},
    {"corrector": "leimkuhler_matthews", "step_size_rule": "norm"},
    {"corrector": "langevin", "step_size_rule": "batch_norm", "layout": "full"},
    {"corrector": "leimkuhler_matthews", "step_size_rule": "batch_norm", "layout": "full"},
    {"corrector": "langevin", "step_size_rule": "reversal", "layout": "full"},
    {"corrector": "leimkuhler_matthews", "step_size_rule": "reversal", "layout": "full"},
]


@WITH_ALL_PREDICTORS
def test_a_score_of_zero_makes_no_nan(predictor):
    for settings in COMBINATIONS:
        for r in (0.0, 0.16):
            scheduler = ready(3, corrector_steps=2, snr=r, **SHORT, **settings, **predictor)
            states = run(scheduler, draw(2, 3), seeded(0), network=lambda x, t: torch.zeros_like(x))
            assert torch.stack(states).isfinite().all()


@pytest.mark.parametrize("r", [math.sqrt(0.5) + 1e-9, 1.0, -0.1, math.nan])
def test_a_ratio_outside_of_the_stable_range_is_refused(r):
    with pytest.raises(ValueError, match=r"snr must lie in 0 .. sqrt\(1/2\) = 0.7071.*stable for any data, got"):
        build(snr=r)
    build(snr=math.sqrt(0.5))


# ---- a flow path from its first level, which has no signal ----------------------------------------------------------


@pytest.mark.parametrize(
    ("predictor", "kept", "std"),
    [
        ({"predictor": "ddpm"}, 0.0, 1.0),
        ({"predictor": "ddim", "eta": 0.0}, 1.0, 0.0),
        ({"predictor": "ddim", "eta": 0.6}, 0.8, 0.6),
        ({"predictor": "ddim", "eta": 1.0}, 0.0, 1.0),
        ({"predictor": "euler_maruyama"}, 0.0, 1.0),
        ({"predictor": "modified_euler_maruyama"}, 0.0, 1.0),
        ({"predictor": "reverse_diffusion"}, 0.0, 1.0),
        ({"predictor": "probability_flow"}, 1.0, 0.0),
        ({"predictor": "probability_flow", "solver_order": 2}, 1.0, 0.0),
    ],
)
def test_from_pure_noise_the_first_step_adds_the_mean_of_the_data(predictor, kept, std):
    # x_s = alpha_s m + sigma_s (kept x + std z): nothing is known of x_0 but its mean
    scheduler = build(**predictor, **FLOW)
    scheduler.set_timesteps(timesteps=[1000, 700, 300])
    x, z = draw(5), draw(5, seed=3)
    step = scheduler.step(gaussian_network(scheduler)(x, 1000.0), 1000.0, x, generator=seeded(3))
    torch.testing.assert_close(step.pred_original_sample, torch.full_like(x, M))
    torch.testing.assert_close(step.prev_sample, 0.3 * M + 0.7 * (kept * x + std * z), rtol=1e-9, atol=1e-9)


@WITH_ALL_PREDICTORS
def test_a_run_from_pure_noise_has_finite_states(predictor):
    for path in (FLOW, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}):
        for settings in COMBINATIONS:
            scheduler = ready(4, corrector_steps=2, **SHORT, **settings, **predictor, **path)
            assert point(scheduler, scheduler.timesteps[0].item())[0] == 0
            assert torch.stack(run(scheduler, draw(3, 2), seeded(0))).isfinite().all()


@pytest.mark.parametrize("predictor", PREDICTORS[:-1])
def test_a_flow_ends_on_the_data_from_pure_noise(predictor):
    scheduler = ready(100, corrector_steps=1, snr=0.1, **predictor, **FLOW)
    means, variances = laws(scheduler, start_mean=0.0, start_variance=1.0, draws=200)
    assert means[-1] == pytest.approx(M, rel=0.02)
    assert variances[-1] == pytest.approx(S, rel=0.1)


def test_an_exact_prediction_from_pure_noise_is_exact_to_the_end():
    scheduler = ready(4, corrector="leimkuhler_matthews", corrector_steps=2, **exact_predictor(**FLOW), **FLOW)
    means, variances = laws(scheduler, start_mean=0.0, start_variance=1.0)
    assert means[-1] == pytest.approx(M, rel=1e-8)
    assert variances[-1] == pytest.approx(S, rel=1e-6)


def test_a_network_of_noise_cannot_start_where_there_is_no_signal():
    scheduler = PredictorCorrectorScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="timestep 999 has no signal .* prediction_type='epsilon'"):
        scheduler.set_timesteps(3)


# ---- the last step --------------------------------------------------------------------------------------------------


@WITH_ALL_PREDICTORS
@ON_ALL_PATHS
def test_the_last_step_is_noise_free_and_a_point_of_data_is_hit(predictor, path):
    scheduler = ready(5, **SHORT, **predictor, **path)
    law = Gaussian(M, variance=0.0)
    states = run(scheduler, draw(3, 2), seeded(0), exact_network(law, scheduler))
    t, x = scheduler.timesteps[-1], states[-2]
    steps = [scheduler.step(torch.sin(x), t, x, generator=seeded(i)) for i in (1, 2)]
    assert torch.equal(steps[0].prev_sample, steps[1].prev_sample)
    if predictor["predictor"] in ("ddpm", "ddim", "probability_flow", "none"):
        torch.testing.assert_close(states[-1], torch.full((3, 2), M).double())
        torch.testing.assert_close(steps[0].prev_sample, steps[0].pred_original_sample)


def test_the_last_step_of_ddpm_keeps_its_noise_if_it_is_asked_to():
    scheduler = ready(5, variance_type="fixed_large", last_step_noise=True)
    t, x = scheduler.timesteps[-1], draw(3, 2)
    steps = [scheduler.step(torch.sin(x), t, x, generator=seeded(i)).prev_sample for i in (1, 2)]
    noise = point(scheduler, int(t))[1] * (draw(3, 2, seed=1) - draw(3, 2, seed=2))
    torch.testing.assert_close(steps[0] - steps[1], noise)


# ---- a variance that the sampler measures ---------------------------------------------------------------------------

MEASURED = [
    {"predictor": "secant", "corrector_steps": 0},
    {"predictor": "secant", "corrector_steps": 0, "eta": 0.4, "last_step_noise": True},
    {"variance_type": "self_estimated", "corrector_steps": 0},
    {"variance_type": "self_estimated", "corrector_steps": 2, "last_step_noise": True},
    {"variance_type": "self_estimated_isotropic", "corrector_steps": 2, "corrector": "leimkuhler_matthews"},
    {"variance_type": "self_estimated_isotropic", "corrector_steps": 1, "layout": "full", "step_size_rule": "norm"},
]
WITH_ALL_MEASURED = pytest.mark.parametrize("settings", MEASURED, ids=lambda each: "-".join(map(str, each.values())))


@ON_ALL_PATHS
@pytest.mark.parametrize(
    ("corrector_steps", "corrector", "coordinates"),
    [(0, "langevin", 3), (0, "langevin", 20), (2, "langevin", 3), (1, "leimkuhler_matthews", 3)],
)
def test_the_measured_variance_of_gaussian_data_is_the_exact_one(corrector_steps, corrector, coordinates, path):
    # the change of x-hat_0 between two calls is then its slope times the change of the state: nothing is estimated
    settings = {"corrector_steps": corrector_steps, "corrector": corrector, "snr": 0.3, "layout": "full", **path}
    measured = build(variance_type="self_estimated_isotropic", last_step_noise=True, **settings)
    exact = build(**exact_predictor(**path), **settings)
    for each in (measured, exact):
        each.set_timesteps(timesteps=[950, 800, 500, 200, 50])
    x, mine, other = draw(4, coordinates), seeded(1), seeded(1)
    states = run(measured, x, mine, gaussian_network(measured))
    if corrector_steps > 0:
        theirs = run(exact, x, other, gaussian_network(exact))
    else:  # the first call has none before it: its step has the small variance
        small = build(**settings)
        small.set_timesteps(timesteps=[950, 800])
        first = run(small, x, other, gaussian_network(small), small.timesteps[:1])
        theirs = first + run(exact, first[-1], other, gaussian_network(exact), exact.timesteps[1:])[1:]
    torch.testing.assert_close(torch.stack(states), torch.stack(theirs), rtol=1e-7, atol=1e-7)


@WITH_ALL_MEASURED
def test_what_is_measured_is_of_one_sample_alone(settings):
    start, scheduler = draw(4, 2, 6), ready(4, **SHORT, **settings)
    samples = {
        rows: run(scheduler, start[list(rows)], [seeded(i) for i in rows])[-1]
        for rows in ((0, 1, 2, 3), (0,), (3,), (2, 0))
    }
    together = samples.pop((0, 1, 2, 3))
    assert together.isfinite().all()
    for rows, sample in samples.items():
        torch.testing.assert_close(sample, together[list(rows)], rtol=1e-12, atol=1e-12)


@WITH_ALL_MEASURED
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_measured_step_keeps_the_dtype_and_computes_in_float32_at_least(settings, dtype):
    working = torch.promote_types(dtype, torch.float32)
    low, high = (ready(3, **SHORT, **settings) for _ in range(2))
    for shape in SHAPES:
        x, output = draw(*shape).to(dtype), draw(*shape, seed=1).to(dtype)
        for t in low.timesteps:
            result = low.step(output, t, x, generator=seeded(1)).prev_sample
            upcast = high.step(output.to(working), t.clone(), x.to(working), generator=seeded(1)).prev_sample
            assert result.dtype is dtype and result.isfinite().all()
            assert torch.equal(result, upcast.to(dtype))


@WITH_ALL_MEASURED
def test_a_measured_step_reads_no_value_of_a_device(settings):
    scheduler = build(**SHORT, **settings)
    scheduler.set_timesteps(3, device="meta")
    x = torch.empty(2, 3, 5, device="meta")
    for t in scheduler.timesteps:
        x = scheduler.step(torch.empty(2, 3, 5, device="meta"), t, x).prev_sample
        assert x.device.type == "meta"


@WITH_ALL_MEASURED
@pytest.mark.parametrize("network", [bounded, lambda x, t: torch.zeros_like(x), lambda x, t: -3 * x, lambda x, t: x])
def test_a_measurement_of_any_network_leaves_finite_states(settings, network):
    for path in ({}, FLOW, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}):
        scheduler = ready(5, **SHORT, **settings, **path)
        for shape in ((2,), (2, 12)):
            states = run(scheduler, draw(*shape), seeded(0), network)
            assert torch.stack(states).isfinite().all()


@WITH_ALL_MEASURED
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_what_was_measured_is_forgotten_before_the_next_run_and_goes_with_a_copy(settings, stop):
    scheduler, fresh = (ready(5, **SHORT, **settings) for _ in range(2))
    x = run(scheduler, 3 + draw(2, 3, seed=8), seeded(9), timesteps=scheduler.timesteps[:stop])[-1]
    copied = copy.deepcopy(scheduler)
    ends = [run(each, x, seeded(6), timesteps=each.timesteps[stop:])[-1] for each in (scheduler, copied)]
    assert torch.equal(*ends)
    run(scheduler, 3 + draw(2, 3, seed=8), seeded(9), timesteps=scheduler.timesteps[:stop])  # without set_timesteps
    for begin in (0, 2 * scheduler.order):
        pairs = [run(each, x, seeded(5), timesteps=each.timesteps[begin:]) for each in (scheduler, fresh)]
        assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
        scheduler.set_timesteps(5)


# ---- what is remembered between the calls ---------------------------------------------------------------------------

REMEMBERING = [
    {"predictor": "probability_flow", "solver_order": 2},
    {"predictor": "ddpm", "corrector": "leimkuhler_matthews"},
    {"predictor": "none", "corrector": "leimkuhler_matthews"},
]
WITH_MEMORY = pytest.mark.parametrize("settings", REMEMBERING, ids=["multistep", "carried noise", "annealed"])


@WITH_MEMORY
@pytest.mark.parametrize("stop", [1, 3, 4, 6])
@pytest.mark.parametrize("again", [True, False])
def test_a_run_after_an_interrupted_one_is_like_the_first(settings, stop, again):
    scheduler, fresh = (
        ready(5, corrector_steps=2, **SHORT, **settings),
        ready(5, corrector_steps=2, **SHORT, **settings),
    )
    run(scheduler, 3 + draw(2, 3, seed=8), seeded(9), timesteps=scheduler.timesteps[:stop])
    if again:
        scheduler.set_timesteps(5)
    x = draw(2, 3)
    pairs = (run(each, x, seeded(5)) for each in (scheduler, fresh))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


@WITH_MEMORY
def test_a_run_that_starts_in_the_middle_remembers_nothing(settings):
    scheduler, fresh = (
        ready(5, corrector_steps=2, **SHORT, **settings),
        ready(5, corrector_steps=2, **SHORT, **settings),
    )
    run(scheduler, draw(2, 3, seed=8), seeded(9))
    scheduler.set_timesteps(5)
    x, start = draw(2, 3), 2 * scheduler.order
    pairs = []
    for each in (scheduler, fresh):
        each.set_begin_index(start)
        pairs.append(run(each, x, seeded(5), timesteps=each.timesteps[start:]))
        assert each.step_index == len(each.timesteps)
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


def test_the_first_step_of_the_second_order_flow_is_of_first_order_wherever_it_starts():
    first, second = (ready(5, predictor="probability_flow", solver_order=order) for order in (1, 2))
    x, start = draw(2, 3), 2 * first.order
    one, other = (run(each, x, seeded(5), timesteps=each.timesteps[start:]) for each in (first, second))
    assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])
    assert not torch.allclose(one[3], other[3], atol=1e-4)


@WITH_MEMORY
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_copy_goes_on_where_the_original_stands(settings, duplicate, stop):
    scheduler = ready(4, corrector_steps=2, **SHORT, **settings)
    x = run(scheduler, draw(2, 3), seeded(5), timesteps=scheduler.timesteps[:stop])[-1]
    copied = duplicate(scheduler)
    ends = [run(each, x, seeded(6), timesteps=each.timesteps[stop:])[-1] for each in (scheduler, copied)]
    assert torch.equal(*ends)


@pytest.mark.parametrize("corrector_steps", [1, 2])
def test_a_timestep_as_a_plain_number_is_the_entry_that_is_due(corrector_steps):
    by_view, by_number = (ready(4, corrector_steps=corrector_steps, **SHORT) for _ in range(2))
    x = draw(2, 3)
    expected = run(by_view, x, seeded(5))
    states = run(by_number, x, seeded(5), timesteps=by_number.timesteps.tolist())
    assert all(torch.equal(a, b) for a, b in zip(expected, states, strict=True))


def test_noised_data_enter_at_the_prediction_of_their_level():
    scheduler = ready(4, corrector_steps=2)
    x, level = draw(2, 3), distinct(scheduler)[2]
    steps = [scheduler.step(torch.sin(x), level, x, generator=seeded(1)).prev_sample]
    assert scheduler.step_index == 2 * scheduler.order + 1
    alone = build(corrector_steps=0)
    alone.set_timesteps(timesteps=distinct(scheduler))
    steps.append(alone.step(torch.sin(x), level, x, generator=seeded(1)).prev_sample)
    assert torch.equal(*steps)


def test_before_set_timesteps_the_whole_chain_is_shown_and_a_step_is_refused():
    scheduler = build(num_train_timesteps=12, corrector_steps=2)
    assert scheduler.timesteps.tolist() == [11] + [t for t in range(10, -1, -1) for _ in range(3)]
    part = build(num_train_timesteps=12, corrector_steps=2, corrector_range=(0.0, 0.3))
    assert part.timesteps.tolist() == list(range(11, 3, -1)) + [t for t in range(3, -1, -1) for _ in range(3)]
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(draw(2, 3), 11, draw(2, 3))


# ---- what a step keeps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda each: "-".join(each.values()))
def test_a_run_is_elementwise_for_any_shape(settings):
    scheduler = ready(3, corrector_steps=2, **SHORT, **settings)
    for shape in SHAPES:
        x = draw(*shape)
        whole = run(scheduler, x, seeded(1))[-1]
        flat = run(scheduler, x.reshape(3, -1), seeded(1))[-1]
        assert whole.shape == shape
        torch.testing.assert_close(whole, flat.reshape(shape), rtol=1e-12, atol=1e-12)


@WITH_ALL_PREDICTORS
def test_a_sample_does_not_depend_on_its_neighbours(predictor):
    start = draw(4, 2, 3)
    for settings in COMBINATIONS:
        if settings["step_size_rule"] == "batch_norm":
            continue
        scheduler = ready(3, corrector_steps=2, **SHORT, **settings, **predictor)
        samples = {
            rows: run(scheduler, start[list(rows)], [seeded(i) for i in rows])[-1]
            for rows in ((0, 1, 2, 3), (0,), (3,), (2, 0))
        }
        together = samples.pop((0, 1, 2, 3))
        assert all(torch.equal(sample, together[list(rows)]) for rows, sample in samples.items())


@WITH_ALL_PREDICTORS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_step_keeps_the_dtype_and_computes_in_float32_at_least(dtype, predictor):
    working = torch.promote_types(dtype, torch.float32)
    x, output = draw(2, 2, 3).to(dtype), draw(2, 2, 3, seed=1).to(dtype)
    for settings, restriction in zip(COMBINATIONS, ({"clip_sample": True}, {"thresholding": True}) * 4, strict=True):
        low, high = (ready(2, **SHORT, **settings, **restriction, **predictor) for _ in range(2))
        for t in low.timesteps:
            result = low.step(output, t, x, generator=seeded(1))
            upcast = high.step(output.to(working), t.clone(), x.to(working), generator=seeded(1))
            for name in ("prev_sample", "pred_original_sample"):
                assert result[name].dtype is dtype
                assert torch.equal(result[name], upcast[name].to(dtype))


def test_the_tuple_holds_the_fields_of_the_output():
    scheduler = ready(3, clip_sample=True)
    x = draw(2, 3)
    for i, t in enumerate(scheduler.timesteps):
        other = copy.deepcopy(scheduler)
        output = scheduler.step(torch.sin(x), t, x, generator=seeded(i))
        pair = other.step(torch.sin(x), int(t), x, generator=seeded(i), return_dict=False)
        assert isinstance(output, GaussianPathSchedulerOutput) and isinstance(pair, tuple)
        assert torch.equal(pair[0], output.prev_sample) and torch.equal(pair[1], output.pred_original_sample)
        alpha, sigma = point(scheduler, int(t))
        torch.testing.assert_close(pair[1], ((x - sigma * torch.sin(x)) / alpha).clamp(-1, 1))


def test_a_correction_uses_the_noise_that_belongs_to_the_clipped_original():
    scheduler = ready(3, clip_sample=True, layout="full", snr=0.3)
    x, eps, t = 3 * draw(4, 2), draw(4, 2, seed=1), int(scheduler.timesteps[0])
    alpha, sigma = point(scheduler, t)
    clipped = ((x - sigma * eps) / alpha).clamp(-1, 1)
    score = (alpha * clipped - x) / sigma**2
    size = 2 * (0.3 * sigma) ** 2
    result = scheduler.step(eps, t, x, generator=seeded(1)).prev_sample
    torch.testing.assert_close(result, x + size * score + math.sqrt(2 * size) * draw(4, 2, seed=1))


def test_the_channels_of_a_learned_variance_have_no_part_in_a_correction():
    learned, fixed = ready(3, variance_type="learned_range", layout="full"), ready(3, layout="full")
    x, eps, t = draw(2, 3, 4), draw(2, 3, 4, seed=1), int(learned.timesteps[0])
    two_heads = torch.cat([eps, draw(2, 3, 4, seed=2)], dim=1)
    assert torch.equal(
        learned.step(two_heads, t, x, generator=seeded(1)).prev_sample,
        fixed.step(eps, t, x, generator=seeded(1)).prev_sample,
    )


def test_a_run_leaves_its_inputs_alone_and_is_differentiable():
    for corrector, rule in zip(CORRECTORS * 2, RULES, strict=True):
        scheduler = ready(3, corrector=corrector, step_size_rule=rule, **SHORT)
        start = draw(2, 3).requires_grad_()
        before = start.detach().clone()
        run(scheduler, start, seeded(1), lambda x, t: torch.sin(x))[-1].sum().backward()
        assert torch.equal(start.detach(), before)
        assert start.grad.isfinite().all() and (start.grad != 0).all()


@WITH_ALL_PREDICTORS
def test_a_step_reads_no_value_of_a_device(predictor):
    # tensors on the meta device have no values: reading one raises
    for settings in COMBINATIONS:
        scheduler = build(corrector_steps=2, **SHORT, **settings, **predictor)
        scheduler.set_timesteps(2, device="meta")
        x = torch.empty(2, 3, 5, device="meta")
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(torch.empty(2, 3, 5, device="meta"), t, x).prev_sample
            assert x.device.type == "meta" and scheduler.step_index == i + 1


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"predictor": "heun"}, r"predictor must be one of \('ddpm'.* got 'heun'"),
        ({"corrector": "mala"}, r"corrector must be one of .*'langevin', 'leimkuhler_matthews'.* got 'mala'"),
        ({"step_size_rule": "snr"}, r"step_size_rule must be one of .*'batch_norm', 'reversal'.* got 'snr'"),
        ({"layout": "flat"}, r"layout must be one of .*'heun', 'full'.* got 'flat'"),
        ({"solver_order": 3}, r"solver_order must be one of \(1, 2\), got 3"),
        ({"solver_order": 0}, r"solver_order must be one of \(1, 2\), got 0"),
        ({"variance_type": "huge"}, "variance_type must be one of .* got 'huge'"),
        ({"corrector_steps": -1}, r"corrector_steps must be an integer >= 0 with predictor='ddpm', got -1"),
        ({"corrector_steps": 1.0}, r"corrector_steps must be an integer >= 0 .* got 1.0"),
        ({"corrector_steps": True}, r"corrector_steps must be an integer >= 0 .* got True"),
        (
            {"corrector_steps": 0, "predictor": "none"},
            r"corrector_steps must be an integer >= 1 with predictor='none', got 0",
        ),
        (
            {"predictor": "secant"},
            "predictor='secant' reads its own last step .* set corrector_steps=0, got 1",
        ),
        (
            {"predictor": "ddim", "variance_type": "self_estimated"},
            "variance_type='self_estimated' is for predictor='ddpm', got predictor='ddim'",
        ),
        ({"eta": 1.01}, "eta must lie in 0 .. 1, got 1.01"),
        ({"eta": -0.1}, "eta must lie in 0 .. 1, got -0.1"),
        ({"eta": math.nan}, "eta must lie in 0 .. 1, got nan"),
        ({"corrector_range": (0.6, 0.4)}, r"corrector_range must be \(low, high\) .* got \(0.6, 0.4\)"),
        ({"corrector_range": (-0.1, 0.4)}, r"corrector_range must be \(low, high\)"),
        ({"corrector_range": (0.1, 1.4)}, r"corrector_range must be \(low, high\)"),
        ({"corrector_range": (0.1, 0.2, 0.3)}, r"corrector_range must be \(low, high\)"),
        ({"mean_squared_noise": [0.5] * 3}, "one value per train timestep, 1000, got 3"),
        ({"timestep_spacing": "even"}, "timestep_spacing must be one of"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        PredictorCorrectorScheduler(**config)


@pytest.mark.parametrize("predictor", ["ddpm", "probability_flow", "none"])
def test_an_output_that_would_only_be_broadcast_is_refused(predictor):
    scheduler = ready(2, predictor=predictor, layout="full", **SHORT)
    x = torch.zeros(2, 3)
    for t in scheduler.timesteps:
        for shape in ((2, 4), (2, 6), (1, 3), (3,), (2, 1), (), (2, 3, 1), (1, 2, 3)):
            before = scheduler.step_index
            with pytest.raises(ValueError, match=r"\(2, 3\).*got \("):
                scheduler.step(torch.zeros(shape), t, x)
            assert scheduler.step_index == before
        x = scheduler.step(torch.zeros(2, 3), t, x).prev_sample


def test_a_learned_variance_needs_twice_the_channels_at_corrections_too():
    scheduler = ready(2, variance_type="learned_range", layout="full")
    for t in scheduler.timesteps:
        for shape in ((2, 3), (2, 12), (1, 6), (2, 6, 1)):
            with pytest.raises(ValueError, match=r"model output of shape \(2, 6\), got"):
                scheduler.step(torch.zeros(shape), t, torch.zeros(2, 3))
        scheduler.step(torch.zeros(2, 6), t, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timestep": 500}, r"timestep 500 is not one of the 3 of the schedule, 999 .. 499; see set_timesteps"),
        ({"timestep": torch.tensor([999, 499])}, "one timestep for the whole batch, got 2"),
        ({"generator": [seeded(0)] * 3}, "one per sample, 2, got 3"),
        ({"sample": torch.zeros(2, 3, dtype=torch.long)}, "floating-point tensors, got torch.int64"),
    ],
)
def test_arguments_of_a_step_that_do_not_fit_are_refused(arguments, message):
    arguments = {"model_output": torch.zeros(2, 3), "timestep": 999, "sample": torch.zeros(2, 3)} | arguments
    with pytest.raises(ValueError, match=message):
        ready(2).step(**arguments)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True])
def test_a_number_of_levels_that_cannot_be_is_refused(steps):
    with pytest.raises(ValueError, match="num_inference_steps must be an integer in 1 .. 1000"):
        build().set_timesteps(steps)


def test_levels_that_do_not_decrease_are_refused():
    with pytest.raises(ValueError, match="timesteps must be strictly decreasing"):
        build().set_timesteps(timesteps=[999, 500, 500])


def test_optimal_without_a_statistic_says_how_to_get_one():
    scheduler = ready(2, variance_type="optimal")
    with pytest.raises(ValueError, match="call calibrate_variance first"):
        scheduler.step(torch.zeros(1, 2), 999, torch.zeros(1, 2))


# ---- saved, loaded, and in the place of the schedulers of Diffusers -------------------------------------------------


def settings_of(scheduler):
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def test_shared_settings_have_the_names_and_defaults_of_diffusers():
    ours = inspect.signature(PredictorCorrectorScheduler.__init__).parameters
    theirs = inspect.signature(DDPMScheduler.__init__).parameters
    assert set(theirs) <= set(ours)
    assert all(ours[name].default == theirs[name].default for name in theirs)
    assert all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in ours.values())
    assert PredictorCorrectorScheduler.__module__ == "annealers"
    parameters = [inspect.signature(each.step).parameters for each in (PredictorCorrectorScheduler, DDPMScheduler)]
    assert list(parameters[0]) == list(parameters[1])


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"predictor": "probability_flow", "solver_order": 2, "corrector_steps": 3, "snr": 0.4, "layout": "full"},
        {"corrector": "leimkuhler_matthews", "step_size_rule": "norm", "corrector_range": (0.2, 0.8), **LADDER},
        {"predictor": "none", "corrector_steps": 2, **FLOW},
        {"predictor": "ddim", "eta": 0.3, "step_size_rule": "reversal", "corrector_range": [0.1, 0.5]},
        {"variance_type": "optimal", "mean_squared_noise": [0.2, 0.6, 0.9], "trained_betas": [0.1, 0.2, 0.3]},
        *MEASURED,
    ],
)
def test_a_saved_scheduler_takes_the_same_steps(config, tmp_path):
    scheduler = build(**config)
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    loaded = PredictorCorrectorScheduler.from_pretrained(tmp_path)
    assert saved["_class_name"] == "PredictorCorrectorScheduler"
    assert json.loads(loaded.to_json_string()) == json.loads(scheduler.to_json_string())
    x = draw(2, 3)
    ends = []
    for each in (scheduler, loaded):
        each.set_timesteps(3)
        ends.append(run(each, x, seeded(2), lambda x, t: torch.sin(x))[-1])
    assert scheduler.order == loaded.order and torch.equal(*ends)


@pytest.mark.parametrize(
    "theirs",
    [
        diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
        diffusers.DDPMScheduler(variance_type="fixed_large", prediction_type="v_prediction"),
        diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", steps_offset=1),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
        diffusers.DPMSolverMultistepScheduler(solver_order=2, use_karras_sigmas=True),
        DDPMAncestralScheduler(variance_type="fixed_large", last_step_noise=True),
    ],
    ids=lambda each: type(each).__name__,
)
def test_it_takes_the_place_of_other_schedulers_and_gives_it_back_unchanged(theirs):
    ours = PredictorCorrectorScheduler.from_config(theirs.config)
    assert settings_of(type(theirs).from_config(ours.config)) == settings_of(theirs)
    ours = PredictorCorrectorScheduler.from_config(theirs.config, corrector_steps=2, snr=0.3)
    assert ours.config.corrector_steps == 2 and ours.order == 3 and ours.config.snr == 0.3
    for name in ("beta_start", "beta_end", "num_train_timesteps", "shift", "steps_offset"):
        if name in theirs.config:
            assert ours.config[name] == theirs.config[name]
    is_flow = isinstance(theirs, diffusers.FlowMatchEulerDiscreteScheduler)
    assert (ours.config.prediction_type == "flow_prediction") == is_flow
    assert ours.config.clip_sample is theirs.config.get("clip_sample", False)
    ours.set_timesteps(4)
    assert run(ours, draw(2, 3), seeded(0))[-1].isfinite().all()


def test_a_scheduler_that_has_been_elsewhere_keeps_its_own_settings():
    config = {"predictor": "ddim", "eta": 0.4, "corrector_steps": 2, "snr": 0.33, "layout": "full"}
    config |= {"corrector": "leimkuhler_matthews", "step_size_rule": "norm", "corrector_range": [0.1, 0.9]}
    before = build(**config)
    after = PredictorCorrectorScheduler.from_config(DDIMScheduler.from_config(before.config).config)
    assert {name: after.config[name] for name in settings_of(before)} == settings_of(before)


def test_the_example_of_the_docstring_runs():
    [example] = doctest.DocTestFinder().find(PredictorCorrectorScheduler, "PredictorCorrectorScheduler", module=False)[
        :1
    ]
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
