r"""Properties of the reverse steps, checked against their papers' formulas and on laws that are known exactly.

Oracles: the equations of the papers in their own symbols (beta_t, alpha-bar_t, the levels of a variance-exploding
ladder, the velocity of a flow), Bayes' rule with precisions that add up, and Gaussian data N(M, S), for which each
step is affine: its action on x = 0 and x = 1 makes the law of N steps a recursion without sampling error.
"""

import math
from itertools import pairwise

import pytest
import torch

from annealers.exact import Gaussian, GaussianMixture
from annealers.schedulers.gaussian_path import DATA, Level
from annealers.schedulers.reverse_steps import (
    clock,
    coordinate_scale,
    ddim,
    ddpm,
    euler_maruyama,
    modified_euler_maruyama,
    reverse_diffusion,
)

M, S = 0.7, 0.25  # mean and variance of the Gaussian data
GAUSSIAN = Gaussian(M, variance=S)
MIXTURE = GaussianMixture([0.3, 0.7], [-1.0, 0.8], [0.04, 0.09])
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHAS_CUMPROD = (1 - BETAS).cumprod(0)
PAIRS = [(1, 0), (40, 39), (999, 998), (600, 200), (999, 0)]  # train timesteps t -> s of a beta schedule
VE_PAIRS = [(50.0, 49.0), (50.0, 0.01), (1.0, 0.5), (0.02, 0.01)]  # levels of a variance-exploding ladder
FLOW_PAIRS = [(0.999, 0.9), (0.5, 0.25), (0.02, 0.001)]
PREDICTORS = {
    "ddpm": lambda x, eps, x_0, t, s, brownian: ddpm(x, x_0, t, s),
    "ddim": lambda x, eps, x_0, t, s, brownian: ddim(eps, x_0, t, s, eta=0.0),
    "ddim, eta = 0.6": lambda x, eps, x_0, t, s, brownian: ddim(eps, x_0, t, s, eta=0.6),
    "reverse_diffusion": lambda x, eps, x_0, t, s, brownian: reverse_diffusion(x, eps, t, s, brownian),
    "euler_maruyama": lambda x, eps, x_0, t, s, brownian: euler_maruyama(x, eps, t, s, brownian),
    "modified_euler_maruyama": lambda x, eps, x_0, t, s, brownian: modified_euler_maruyama(x, eps, t, s, brownian),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_schedule(t):
    """A level of the beta schedule."""
    alphas_cumprod = float(ALPHAS_CUMPROD[t])
    return Level(t, math.sqrt(alphas_cumprod), math.sqrt(1 - alphas_cumprod))


def on_ladder(level):
    """A level of a variance-exploding ladder, in variance-preserving coordinates."""
    norm = math.sqrt(1 + level**2)
    return Level(0, 1 / norm, level / norm)


def on_flow(time):
    return Level(time, 1 - time, time)


def state(t, eps, seed=1):
    """(x_t, x_0) that go with eps."""
    x_0 = draw(*eps.shape, seed=seed)
    return t.alpha * x_0 + t.sigma * eps, x_0


def assert_law(step, mean, variance):
    torch.testing.assert_close(step.mean, mean, rtol=1e-10, atol=1e-10)
    assert step.variance == pytest.approx(variance, rel=1e-10, abs=1e-300)


# ---- the formulas of the papers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_on_a_beta_schedule_ddpm_is_the_posterior_of_ho_et_al(t, s):
    abar_t, abar_s = float(ALPHAS_CUMPROD[t]), float(ALPHAS_CUMPROD[s])
    beta = float(BETAS[t]) if s == t - 1 else 1 - abar_t / abar_s
    eps = draw(5)
    x, x_0 = state(on_schedule(t), eps)
    variance = (1 - abar_s) / (1 - abar_t) * beta  # Eq. 7
    step = ddpm(x, x_0, on_schedule(t), on_schedule(s))
    x_0_weight, x_weight = abar_s**0.5 * beta / (1 - abar_t), (1 - beta) ** 0.5 * (1 - abar_s) / (1 - abar_t)
    assert_law(step, x_0_weight * x_0 + x_weight * x, variance)
    assert_law(step, (x - beta / (1 - abar_t) ** 0.5 * eps) / (1 - beta) ** 0.5, variance)  # Eq. 11


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_on_a_beta_schedule_ddim_is_equation_12_of_song_et_al(t, s, eta):
    abar_t, abar_s = float(ALPHAS_CUMPROD[t]), float(ALPHAS_CUMPROD[s])
    eps = draw(5)
    x, x_0 = state(on_schedule(t), eps)
    sigma = eta * ((1 - abar_s) / (1 - abar_t)) ** 0.5 * (1 - abar_t / abar_s) ** 0.5  # Eq. 16
    mean = abar_s**0.5 * (x - (1 - abar_t) ** 0.5 * eps) / abar_t**0.5 + (1 - abar_s - sigma**2) ** 0.5 * eps
    assert_law(ddim(eps, x_0, on_schedule(t), on_schedule(s), eta), mean, sigma**2)


@pytest.mark.parametrize(("t", "s"), PAIRS[:3])
def test_between_neighbours_of_a_beta_schedule_reverse_diffusion_is_that_of_score_sde(t, s):
    beta, eps = float(BETAS[t]), draw(5)
    x, _ = state(on_schedule(t), eps)
    score = -eps / (1 - float(ALPHAS_CUMPROD[t])) ** 0.5
    mean = (2 - (1 - beta) ** 0.5) * x + beta * score  # Song et al. 2021, Eq. 46
    assert_law(reverse_diffusion(x, eps, on_schedule(t), on_schedule(s), False), mean, beta)


def test_reverse_diffusion_over_skipped_timesteps_has_their_joint_beta():
    (t, s), eps = (600, 200), draw(5)
    beta = 1 - float((1 - BETAS[s + 1 : t + 1]).prod())
    x, _ = state(on_schedule(t), eps)
    mean = (2 - (1 - beta) ** 0.5) * x - beta / (1 - float(ALPHAS_CUMPROD[t])) ** 0.5 * eps
    assert_law(reverse_diffusion(x, eps, on_schedule(t), on_schedule(s), False), mean, beta)


@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_on_a_beta_schedule_the_euler_steps_are_those_of_the_ornstein_uhlenbeck_process(t, s):
    # dX = -X dtau + sqrt(2) dB has e^{-2 tau} = alpha-bar, and its reversal the drift X + 2 s
    gammas = -0.5 * (1 - BETAS).log()
    gamma, eps = float(gammas[s + 1 : t + 1].sum()), draw(5)
    x, _ = state(on_schedule(t), eps)
    mean = x + gamma * (x + 2 * -eps / (1 - float(ALPHAS_CUMPROD[t])) ** 0.5)
    assert_law(euler_maruyama(x, eps, on_schedule(t), on_schedule(s), False), mean, 2 * gamma)
    of_the_bridge = 2 * gamma * float(gammas[: s + 1].sum() / gammas[: t + 1].sum())  # Durham & Gallant 2002
    step = modified_euler_maruyama(x, eps, on_schedule(t), on_schedule(s), False)
    assert_law(step, mean, of_the_bridge)


@pytest.mark.parametrize(("level", "next_level"), VE_PAIRS)
def test_on_a_ladder_each_step_is_its_variance_exploding_form_in_y(level, next_level):
    t, s, eps = on_ladder(level), on_ladder(next_level), draw(5)
    x, x_0 = state(t, eps)
    y, gap = x / t.alpha, level**2 - next_level**2
    denoising = y + gap * (-eps / level)
    ancestral = next_level**2 * gap / level**2  # Song et al. 2021, App. F
    up = 0.6 * math.sqrt(ancestral)  # DDIM with eta in the form of ancestral Euler samplers: down, then up
    down = math.sqrt(next_level**2 - up**2)
    expected = {
        "ddpm": (denoising, ancestral),
        "ddim": (y + (next_level - level) * eps, 0.0),  # Euler for dy = eps d level
        "ddim, eta = 0.6": (y + (down - level) * eps, up**2),
        "reverse_diffusion": (denoising, gap),  # Eq. 47
        "euler_maruyama": (denoising, gap),
        "modified_euler_maruyama": (denoising, ancestral),
    }
    for name, (mean, variance) in expected.items():
        step = PREDICTORS[name](x, eps, x_0, t, s, True)
        torch.testing.assert_close(step.mean / s.alpha, mean, rtol=1e-9, atol=1e-9)
        assert step.variance / s.alpha**2 == pytest.approx(variance, rel=1e-9), name


@pytest.mark.parametrize(("time", "next_time"), FLOW_PAIRS)
def test_on_a_flow_path_ddpm_is_bayes_rule_and_ddim_the_euler_step_of_the_velocity(time, next_time):
    t, s, eps = on_flow(time), on_flow(next_time), draw(5)
    x, x_0 = state(t, eps)
    a = (1 - time) / (1 - next_time)
    v = time**2 - (a * next_time) ** 2
    precision = a**2 / v + 1 / next_time**2
    mean = (a / v * x + (1 - next_time) / next_time**2 * x_0) / precision
    assert_law(ddpm(x, x_0, t, s), mean, 1 / precision)
    assert_law(ddim(eps, x_0, t, s, eta=0.0), x + (next_time - time) * (eps - x_0), 0.0)


@pytest.mark.parametrize("brownian", [False, True])
@pytest.mark.parametrize("name", PREDICTORS)
def test_a_step_does_not_depend_on_the_scale_of_the_coordinates(name, brownian):
    # x -> c_t x makes the path another one of the same signal-to-noise ratios: a flow a beta schedule, for instance
    t, s, eps, scale_t, scale_s = on_flow(0.6), on_flow(0.4), draw(5), 3.0, 0.2
    x, x_0 = state(t, eps)
    step = PREDICTORS[name](x, eps, x_0, t, s, brownian)
    scaled_t = Level(0, scale_t * t.alpha, scale_t * t.sigma)
    scaled_s = Level(0, scale_s * s.alpha, scale_s * s.sigma)
    scaled = PREDICTORS[name](scale_t * x, eps, x_0, scaled_t, scaled_s, brownian)
    assert_law(scaled, scale_s * step.mean, scale_s**2 * step.variance)


# ---- how the steps relate -------------------------------------------------------------------------------------------

LEVELS = {
    "beta schedule": ([on_schedule(t) for t in (999, 500, 20, 0)], False),
    "ladder": ([on_ladder(level) for level in (50.0, 4.0, 0.3, 0.01)], True),
    "flow": ([on_flow(time) for time in (1.0, 0.8, 0.3, 0.01)], False),
}


@pytest.mark.parametrize("path", LEVELS)
def test_ddim_with_eta_one_is_ddpm(path):
    for t, s in pairwise(LEVELS[path][0] + [DATA]):
        eps = draw(5)
        x, x_0 = state(t, eps)
        step = ddpm(x, x_0, t, s)
        assert_law(ddim(eps, x_0, t, s, eta=1.0), step.mean, step.variance)


def test_ddim_with_more_noise_than_the_level_has_keeps_none_of_the_predicted():
    t, s = on_schedule(500), on_schedule(490)
    eps = draw(5)
    _, x_0 = state(t, eps)
    eta = 1.5 * s.sigma / math.sqrt(ddpm(eps, x_0, t, s).variance)
    assert_law(ddim(eps, x_0, t, s, eta), s.alpha * x_0, (1.5 * s.sigma) ** 2)


@pytest.mark.parametrize(("level", "next_level"), VE_PAIRS)
def test_on_a_ladder_the_modified_variance_is_the_ancestral_one(level, next_level):
    t, s, x = on_ladder(level), on_ladder(next_level), draw(5)
    modified = modified_euler_maruyama(x, x, t, s, True).variance
    assert modified == pytest.approx(ddpm(x, x, t, s).variance, rel=1e-12)


@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_on_a_beta_schedule_the_modified_variance_over_the_ancestral_one_is_its_closed_form(t, s):
    x = draw(5)
    tau, tau_s = (-0.5 * math.log(float(ALPHAS_CUMPROD[i])) for i in (t, s))
    gamma = tau - tau_s
    modified = modified_euler_maruyama(x, x, on_schedule(t), on_schedule(s), False).variance
    ratio = modified / ddpm(x, x, on_schedule(t), on_schedule(s)).variance
    assert ratio == pytest.approx(gamma * tau_s / tau * (1 / math.tanh(gamma) + 1 / math.tanh(tau_s)), rel=1e-10)
    assert 1 <= ratio <= 1 + gamma + gamma**2


@pytest.mark.parametrize("brownian", [False, True])
def test_the_modified_step_is_the_plain_one_with_less_noise(brownian):
    t, s, x, eps = on_flow(0.6), on_flow(0.4), draw(5), draw(5, seed=1)
    plain, modified = (step(x, eps, t, s, brownian) for step in (euler_maruyama, modified_euler_maruyama))
    assert torch.equal(plain.mean, modified.mean)
    assert modified.variance < plain.variance


@pytest.mark.parametrize("brownian", [False, True])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "ddim, eta = 0.6", "modified_euler_maruyama"])
def test_the_noise_vanishes_in_the_step_to_the_data(name, brownian):
    t, eps = on_flow(0.3), draw(5)
    x, x_0 = state(t, eps)
    assert PREDICTORS[name](x, eps, x_0, t, DATA, brownian).variance == 0


@pytest.mark.parametrize("name", PREDICTORS)
def test_the_mean_of_the_step_to_the_data_is_the_denoised_state_where_the_scheme_is_exact(name):
    t, eps = on_ladder(0.3), draw(5)
    x, x_0 = state(t, eps)
    torch.testing.assert_close(PREDICTORS[name](x, eps, x_0, t, DATA, True).mean, x_0)  # Tweedie, on a ladder for all
    if name.startswith("dd"):
        torch.testing.assert_close(PREDICTORS[name](x, eps, x_0, t, DATA, False).mean, x_0)


def test_the_clock_is_that_of_the_process():
    assert clock(DATA, False) == clock(DATA, True) == 0
    for t in (0, 300, 999):
        assert clock(on_schedule(t), False) == pytest.approx(-0.5 * float((1 - BETAS[: t + 1]).log().sum()))
    for level in (0.01, 50.0):
        assert clock(on_ladder(level), True) == pytest.approx(level**2 / 2)
        assert coordinate_scale(on_ladder(level), True) == pytest.approx((1 + level**2) ** -0.5)
        assert coordinate_scale(on_ladder(level), False) == pytest.approx(1)
    assert coordinate_scale(on_flow(0.5), False) == pytest.approx(0.5**0.5)
    assert clock(on_flow(1.0), False) == clock(on_flow(1.0), True) == math.inf


def test_from_pure_noise_ddpm_and_ddim_and_reverse_diffusion_can_start():
    t, s, eps = on_flow(1.0), on_flow(0.7), draw(5)
    _, x_0 = state(t, eps)
    assert_law(ddpm(eps, x_0, t, s), 0.3 * x_0, 0.7**2)  # the state tells nothing: the law of x_s given x_0
    assert_law(ddim(eps, x_0, t, s, eta=0.0), 0.3 * x_0 + 0.7 * eps, 0.0)
    scale = math.hypot(0.3, 0.7)
    assert_law(reverse_diffusion(eps, eps, t, s, False), scale * (2 * eps - eps), scale**2)  # beta = 1


# ---- exact laws -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LEVELS)
def test_with_the_exact_prediction_the_mean_of_ddpm_is_the_posterior_mean_of_a_mixture(path):
    x_s = torch.linspace(-8, 8, 32001, dtype=torch.float64)
    x_t = torch.tensor([-1.2, -0.3, 0.0, 0.4, 0.9], dtype=torch.float64)
    for t, s in pairwise(LEVELS[path][0]):
        a = t.alpha / s.alpha
        forward = -((x_t[:, None] - a * x_s) ** 2) / (2 * (t.sigma**2 - (a * s.sigma) ** 2))
        weight = (forward + MIXTURE.log_prob(x_s, s.alpha, s.sigma)).softmax(-1)
        mean = ddpm(x_t, MIXTURE.denoise(x_t, t.alpha, t.sigma), t, s).mean
        torch.testing.assert_close(mean, weight @ x_s, rtol=1e-7, atol=1e-7)


def refined(path, N):
    """N steps along a path between two levels at which nothing is singular."""
    u = torch.linspace(0, 1, N + 1, dtype=torch.float64)
    if path == "beta schedule":  # beta(t) = 0.1 + 19.9 t, Song et al. 2021, from t = 1 to 0.02
        time = 1 - 0.98 * u
        return [
            Level(0, math.exp(-0.5 * b), math.sqrt(-math.expm1(-b))) for b in (0.1 * time + 9.95 * time**2).tolist()
        ]
    if path == "ladder":
        return [on_ladder(level) for level in (20 * 400**-u).tolist()]
    return [on_flow(time) for time in (0.98 - 0.96 * u).tolist()]


def errors_of_mean_and_deviation(name, levels, brownian):
    """Of what N steps make of the exact law of the first level, at the last."""
    first, last = levels[0], levels[-1]
    mean, variance = first.alpha * M, first.alpha**2 * S + first.sigma**2
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for t, s in pairwise(levels):
        slope = t.sigma / (t.alpha**2 * S + t.sigma**2)
        eps = slope * (x - t.alpha * M)
        step = PREDICTORS[name](x, eps, (x - t.sigma * eps) / t.alpha, t, s, brownian)
        offset, end = step.mean.tolist()
        mean, variance = offset + (end - offset) * mean, (end - offset) ** 2 * variance + step.variance
    exact = last.alpha**2 * S + last.sigma**2
    return abs(mean - last.alpha * M), abs(math.sqrt(variance) - math.sqrt(exact))


@pytest.mark.parametrize("path", ["beta schedule", "ladder", "flow"])
@pytest.mark.parametrize("name", PREDICTORS)
def test_the_weak_order_is_one(name, path):
    errors = [errors_of_mean_and_deviation(name, refined(path, N), path == "ladder") for N in (100, 200, 400)]
    exact_mean = name.startswith("dd") or path == "ladder"
    for kind, (coarse, medium, fine) in enumerate(zip(*errors, strict=True)):
        if kind == 0 and exact_mean:  # for Gaussian data
            assert max(coarse, medium, fine) < 1e-12
            continue
        assert coarse > 1e-5  # there is an error to halve
        orders = [math.log2(coarse / medium), math.log2(medium / fine)]
        assert orders == pytest.approx([1, 1], abs=0.1)
