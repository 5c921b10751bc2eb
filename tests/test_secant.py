r"""Properties of the secant step: what it measures, its coefficient, and the variance that it keeps.

Oracles, in the coordinates y = x / alpha with noise levels s = sigma / alpha. For Gaussian data N(m, C) the change of
x̂_0 is a matrix times the innovation,

    x̂_0 = m + L (y - m)    with    L = C (C + s^2 I)^-1        E[y | y_p] = x̂_0(y_p) + (s / s_p)^2 (y_p - x̂_0(y_p))

and for C = S I a step is linear in the last two states and its noise, y' = p y_p + q y + w z. The three numbers are
read off the scheduler; then the variance of a run is a recursion of 2 x 2 covariances, without sampling error. Along
the probability flow the state of such data is just scaled, y = kappa y_p with kappa^2 = (S + s^2) / (S + s_p^2), so a
second call with that state leaves one coefficient that keeps the variance exact:

    c R (1 - kappa) = kappa' - (R + (1 - R) s' / s)         R = S / (S + s^2)
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from annealers import DDPMAncestralScheduler, PredictorCorrectorScheduler
from annealers.exact import Gaussian, GaussianMixture
from annealers.schedulers import gaussian_path, scheduling_predictor_corrector
from annealers.schedulers.gaussian_path import Level
from annealers.schedulers.secant import (
    Innovation,
    Slopes,
    contraction,
    measured_slopes,
    missing_variance,
    secant_coefficient,
)

LADDER = {"beta_schedule": "geometric", "sigma_min": 0.02, "sigma_max": 50.0}
FLOW = {"prediction_type": "flow_prediction"}
ON_ALL_PATHS = pytest.mark.parametrize("path", [{}, LADDER, FLOW], ids=["chain", "ladder", "flow"])
WITH_ALL_ETA = pytest.mark.parametrize("eta", [0.0, 0.1, 0.5, 1.0])
MIXTURE = GaussianMixture([0.3, 0.7], [-1.0, 0.8], [0.04, 0.09])
LEVEL = Level(10, 0.8, 0.6)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def build(**config):
    settings = {"predictor": "secant", "corrector_steps": 0, "clip_sample": False, "timestep_spacing": "karras"}
    return PredictorCorrectorScheduler(**{**settings, **config})


def ready(steps, **config):
    scheduler = build(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def exact_network(law, scheduler):
    return lambda x, t: law.prediction(scheduler.config.prediction_type, x, *scheduler.signal_and_noise(t))


def run(scheduler, x, generator=None, law=MIXTURE):
    """The states of a run, the start among them."""
    network, states = exact_network(law, scheduler), [x]
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
        states.append(x)
    return states


def level_of(scheduler, t):
    """alpha and s = sigma / alpha."""
    alpha, sigma = (float(c) for c in scheduler.signal_and_noise(t))
    return alpha, sigma / alpha if alpha > 0 else math.inf


def recorded_slopes(monkeypatch):
    """What the scheduler measures from now on: (D, u, slopes) of each call."""
    records = []

    def spy(change, innovation, past, *more):
        slopes = measured_slopes(change, innovation, past, *more)
        records.append((change, innovation, slopes))
        return slopes

    monkeypatch.setattr(scheduling_predictor_corrector, "measured_slopes", spy)
    return records


def correlated(d, seed=0):
    """A mean and a full covariance with eigenvalues of very different size."""
    turn = torch.linalg.qr(draw(d, d, seed=seed)).Q
    return draw(d, seed=seed + 1), turn * torch.logspace(0.5, -3, d, dtype=torch.float64) @ turn.T


# ---- what is measured -----------------------------------------------------------------------------------------------


@ON_ALL_PATHS
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("d", [2, 5, 12])
def test_the_change_of_x_0_is_a_matrix_times_the_innovation_for_gaussian_data(d, eta, path, monkeypatch):
    mean, covariance = correlated(d)
    law, scheduler, records = Gaussian(mean, covariance=covariance), ready(6, eta=eta, **path), []
    records = recorded_slopes(monkeypatch)
    states = run(scheduler, draw(7, d, seed=3), seeded(0), law)
    assert len(records) == 5
    for i, (change, innovation, _) in enumerate(records):
        (alpha_p, s_p), (alpha, s) = (level_of(scheduler, t) for t in scheduler.timesteps[i : i + 2])
        y = states[i + 1] / alpha
        if alpha_p == 0:  # pure noise says nothing
            expected = mean.expand(7, d)
        else:
            y_p = states[i] / alpha_p
            x_0 = law.denoise(y_p, 1.0, s_p)
            expected = x_0 + (s / s_p) ** 2 * (y_p - x_0)
        torch.testing.assert_close(innovation, y - expected, rtol=1e-6, atol=1e-9)
        slope = covariance @ torch.linalg.inv(covariance + s**2 * torch.eye(d, dtype=torch.float64))
        torch.testing.assert_close(change, innovation @ slope, rtol=1e-6, atol=1e-8)


@ON_ALL_PATHS
@WITH_ALL_ETA
@pytest.mark.parametrize("d", [1, 2, 9, 64])
def test_all_slopes_are_the_same_number_where_all_directions_are_alike(d, eta, path, monkeypatch):
    S, records = 0.25, recorded_slopes(monkeypatch)
    scheduler = ready(8, eta=eta, **path)
    run(scheduler, draw(3, d), seeded(1), Gaussian(torch.full((d,), 0.4, dtype=torch.float64), variance=S))
    for t, (_, _, slopes) in zip(scheduler.timesteps[1:], records, strict=True):
        expected = torch.full((3, 1), S / (S + level_of(scheduler, t)[1] ** 2), dtype=torch.float64)
        for slope in slopes:
            torch.testing.assert_close(slope, expected, rtol=1e-3, atol=2e-6)


def past_with(noise=None, deviation=0.0):
    zeros = torch.zeros(1, 1, dtype=torch.float64)
    return Innovation(LEVEL, LEVEL, zeros, zeros, 0.5, noise, deviation)


def test_slopes_without_noise_are_quotients_of_moments():
    eigenvalues = torch.tensor([0.9, 0.5, 0.2, 0.05], dtype=torch.float64)
    u = draw(5, 4)
    weights = u**2 / (u**2).sum(1, keepdim=True)
    first, second = ((weights * eigenvalues**k).sum(1, keepdim=True) for k in (1, 2))
    slopes = measured_slopes(eigenvalues * u, u, past_with())
    torch.testing.assert_close(slopes.average, first)
    torch.testing.assert_close(slopes.along_innovation, second / first)
    grown = second / first * (second / first**2).sqrt()  # Cauchy-Schwarz: it does grow
    torch.testing.assert_close(slopes.along_change, grown.clamp(max=1))
    assert (slopes.along_change > slopes.along_innovation).all()


def sign_vectors(d):
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=d)), dtype=torch.float64)


def test_where_all_of_the_innovation_is_noise_the_average_slope_is_that_of_all_directions():
    eigenvalues = torch.linspace(0.02, 0.98, 10, dtype=torch.float64)
    turn = torch.linalg.qr(draw(10, 10)).Q
    z = sign_vectors(10)
    u = 0.3 * z
    average = measured_slopes(u @ (turn * eigenvalues @ turn.T), u, past_with(z, 0.3)).average
    torch.testing.assert_close(average.mean(), eigenvalues.mean())
    assert float(average.std()) > 0.01  # of one sample it is an estimate


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_the_noise_shows_directions_that_the_rest_of_the_innovation_does_not_have(share):
    d = 12
    eigenvalues = torch.tensor([1.0] * 3 + [0.0] * 9, dtype=torch.float64)
    z = sign_vectors(d)
    rest = torch.tensor([1.0] * 3 + [0.0] * 9, dtype=torch.float64) * (d / 3 * (1 - share)) ** 0.5
    u = rest + share**0.5 * z  # per coordinate, share of its square is noise
    average = measured_slopes(eigenvalues * u, u, past_with(z, share**0.5)).average.mean()
    blind = measured_slopes(eigenvalues * u, u, past_with()).average.mean()
    right = eigenvalues.mean()
    assert abs(average - right) < 0.3 * abs(blind - right)


def test_the_slope_along_the_change_is_never_below_that_along_the_innovation():
    eigenvalues = torch.tensor([0.1] * 6 + [0.9] * 6, dtype=torch.float64)
    z = sign_vectors(12)
    u = 5 * torch.tensor([1.0] * 6 + [0.0] * 6, dtype=torch.float64) + 0.5 * z  # goes where the slope is small
    slopes = measured_slopes(eigenvalues * u, u, past_with(z, 0.5))
    is_above = slopes.average > slopes.along_innovation
    assert is_above.any()
    assert torch.equal(slopes.along_change[is_above], slopes.along_innovation[is_above])
    assert (slopes.along_change >= slopes.along_innovation).all()


def test_noise_that_is_too_small_to_tell_from_chance_does_not_count():
    eigenvalues, u, z = torch.linspace(0.1, 0.9, 64, dtype=torch.float64), draw(6, 64), draw(6, 64, seed=1)
    without = measured_slopes(eigenvalues * u, u, past_with()).average
    for deviation in (1e-3, 1e-9, 1e-150):
        slope = measured_slopes(eigenvalues * (u + deviation * z), u + deviation * z, past_with(z, deviation)).average
        torch.testing.assert_close(slope, without, rtol=0, atol=max(deviation * 10, 1e-12))


def test_slopes_lie_in_their_range_whatever_the_network_says():
    for scale in (0.0, 1e-200, 1e-12, 1.0, 1e12, 1e100):
        for other in (0.0, 1e-200, 1.0, 1e100):
            change, innovation, z = (draw(4, 9, seed=i) for i in range(3))
            for past in (past_with(), past_with(z, 1e-30), past_with(z, 1.0)):
                for sign in (-1, 1):
                    slopes = measured_slopes(sign * scale * change, other * innovation, past)
                    for slope in slopes:
                        assert slope.isfinite().all() and (slope >= 0).all() and (slope <= 1).all()


def test_a_slope_below_zero_counts_as_none():
    u = draw(3, 9)
    slopes = measured_slopes(-0.4 * u, u, past_with())
    assert (slopes.average == 0).all()
    assert (slopes.along_innovation > 0.999).all()  # so the step takes little of a change that it cannot explain


# ---- the coefficient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("r", "r_p"), [(0.5, 0.5), (0.9, 0.8), (0.2, 0.6), (0.7, 0.1)])
@pytest.mark.parametrize("R", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_along_the_probability_flow_the_coefficient_keeps_the_variance_exact(R, r, r_p):
    S = R / (1 - R)  # with s = 1
    kappa = math.sqrt((S + 1) / (S + r_p**-2))
    kappa_next = math.sqrt((S + r**2) / (S + 1))
    expected = (kappa_next - R - (1 - R) * r) / (R * (1 - kappa))
    c = secant_coefficient(torch.tensor(R, dtype=torch.float64), r, r_p, r_p)
    assert float(c) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("r", "r_p"), [(0.5, 0.5), (0.9, 0.8), (0.2, 0.6)])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("R", [0.01, 0.3, 0.7, 0.99])
def test_the_coefficient_gives_the_variance_of_the_next_level_for_the_covariance_it_assumes(R, eta, r, r_p):
    """The variance of y' = K y + c R u + noise, from Cov[y, y_p] alone."""
    S, s_p, s_next = R / (1 - R), 1 / r_p, r
    noise, noise_p = eta**2 * s_next**2 * (1 - r**2), eta**2 * (1 - r_p**2)
    b, b_p = math.sqrt(s_next**2 - noise), math.sqrt(1 - noise_p) / s_p
    V, V_p = S + 1, S + s_p**2
    R_p = S / V_p
    covariance = math.sqrt(R_p + (1 - R_p) * b_p**2) * V_p  # of y and y_p
    expectation = R_p + (1 - R_p) * r_p**2  # E[y | y_p] / y_p
    with_u = V - expectation * covariance
    of_u = V - 2 * expectation * covariance + expectation**2 * V_p
    c = float(secant_coefficient(torch.tensor(R, dtype=torch.float64), b, b_p, r_p))
    K = R + (1 - R) * b
    variance = K**2 * V + 2 * K * c * R * with_u + (c * R) ** 2 * of_u + noise
    assert c > 0 and variance == pytest.approx(S + s_next**2, rel=1e-10)


@pytest.mark.parametrize("R", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [(1.0, 1.0), (1.0, 2.0), (2.0, 1.0)])
def test_for_small_steps_it_is_the_coefficient_of_the_multistep_solver(steps, eta, R):
    def relative_error(scale):
        h, h_p = steps[0] * scale, steps[1] * scale  # of log s
        r, r_p = math.exp(-h), math.exp(-h_p)
        b, b_p = (math.sqrt(q**2 - eta**2 * q**2 * (1 - q**2)) for q in (r, r_p))
        multistep = (1 - b) * h / (2 * h_p)  # Lu et al. 2022, Algorithm 2
        return float(secant_coefficient(torch.tensor(R, dtype=torch.float64), b, b_p, r_p)) / multistep - 1

    assert abs(relative_error(1e-3)) < 0.01
    assert relative_error(1e-3) == pytest.approx(relative_error(2e-3) / 2, rel=0.05)


def test_the_coefficient_falls_as_the_slope_rises_between_its_limits():
    slopes = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
    for r, r_p in ((0.5, 0.5), (0.9, 0.8), (0.2, 0.6)):
        for eta in (0.0, 0.5, 1.0):
            b, b_p = (math.sqrt(q**2 - eta**2 * q**2 * (1 - q**2)) for q in (r, r_p))
            assert (secant_coefficient(slopes, b, b_p, r_p).diff() < 0).all()
        low, high = secant_coefficient(torch.tensor([1e-9, 1 - 1e-7], dtype=torch.float64), r, r_p, r_p).tolist()
        assert low == pytest.approx((1 - r) ** 2 / (2 * r * (1 - r_p)), rel=1e-5)  # eta = 0: 2 c K X = k^2
        assert high == pytest.approx((1 - r) ** 2 * r_p**2 / (1 - r_p**2), rel=1e-5)


# ---- what is missing ------------------------------------------------------------------------------------------------


def all_slopes(average, along_innovation, along_change):
    return Slopes(*(torch.tensor([[v]], dtype=torch.float64) for v in (average, along_innovation, along_change)))


STEPS = (0.4, 0.35, 0.5)  # b, b_p, r_p


@pytest.mark.parametrize("R", [0.01, 0.5, 0.99])
def test_nothing_is_missing_where_all_directions_are_alike(R):
    slopes = all_slopes(R, R, R)
    c = secant_coefficient(slopes.along_change, *STEPS)
    assert 0 <= float(missing_variance(slopes, c, 2.0, *STEPS)) < 1e-12


def test_the_remainder_fills_the_trace_of_the_covariance_of_two_kinds_of_directions():
    """A share f of directions of slope R, and the others of slope 0: trace k^2 s^2 f R, of which c D gives a part."""
    f, R, s = 0.25, 0.6, 1.7
    b, b_p, r_p = 0.3, 0.25, 0.5  # eta between 0 and 1, so that the noise is its own
    S, V, V_p = R / (1 - R) * s**2, s**2 / (1 - R), R / (1 - R) * s**2 + (s / r_p) ** 2
    R_p = S / V_p
    covariance = math.sqrt(R_p + (1 - R_p) * b_p**2) * V_p
    expectation = R_p + (1 - R_p) * r_p**2
    with_u, of_u = V - expectation * covariance, V - 2 * expectation * covariance + expectation**2 * V_p
    slopes = all_slopes(f * R, R, math.sqrt(R))
    c = float(secant_coefficient(slopes.along_change, b, b_p, r_p))
    given = f * (2 * (R + (1 - R) * b) * c * R * with_u + (c * R) ** 2 * of_u)
    trace = f * (1 - b) ** 2 * s**2 * R
    missing = float(missing_variance(slopes, torch.tensor([[c]], dtype=torch.float64), s, b, b_p, r_p))
    assert 0 < missing == pytest.approx(trace - given, rel=1e-10)


@WITH_ALL_ETA
def test_what_is_missing_is_never_negative_nor_more_than_all(eta):
    grid = [1e-6, 0.1, 0.4, 0.8, 1 - 1e-6]
    for r, r_p, (average, along, far) in itertools.product((0.2, 0.9), (0.3, 0.8), itertools.product(grid, repeat=3)):
        b, b_p = (math.sqrt(q**2 - eta**2 * q**2 * (1 - q**2)) for q in (r, r_p))
        slopes = all_slopes(average, along, far)
        c = secant_coefficient(slopes.along_change, b, b_p, r_p)
        missing = float(missing_variance(slopes, c, 1.5, b, b_p, r_p))
        assert 0 <= missing <= average * (1.5 * (1 - b)) ** 2


def test_known_and_unknown_directions_leave_a_trace_that_noise_fills():
    """With slopes 0 and 1 only, l_2 = l_3 = 1: c is that of R -> 1, and l_1 the share of unknown directions."""
    u, z = draw(4, 32), draw(4, 32, seed=1)
    eigenvalues = torch.tensor([1.0] * 8 + [0.0] * 24, dtype=torch.float64)
    slopes = measured_slopes(eigenvalues * u, u, past_with(z, 1.0))
    assert (slopes.along_innovation > 1 - 1e-5).all() and (slopes.along_change > 1 - 1e-5).all()


@ON_ALL_PATHS
def test_the_contraction_and_the_noise_add_up_to_the_next_level(path):
    scheduler = build(**path)
    levels = [scheduler._level(t) for t in (900, 500, 20)]
    for here, there in itertools.pairwise(levels):
        s, s_next = here.sigma / here.alpha, there.sigma / there.alpha
        for eta in (0.0, 0.3, 1.0):
            b, variance = contraction(here, there, eta)
            assert b**2 * s**2 + variance == pytest.approx(s_next**2)
        assert b == pytest.approx((s_next / s) ** 2)  # the ancestral step
        assert contraction(here, there, 0.0)[0] == pytest.approx(s_next / s)


@ON_ALL_PATHS
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_a_step_adds_the_measured_change_and_what_is_missing_to_the_first_order_step(eta, path, monkeypatch):
    law, scheduler = Gaussian(correlated(12)[0], covariance=correlated(12)[1]), ready(5, eta=eta, **path)
    (_, s_p), (alpha, s), (alpha_next, s_next) = (level_of(scheduler, t) for t in scheduler.timesteps[:3])
    network, z, states = exact_network(law, scheduler), draw(4, 12, seed=5), []
    for noise in (0.0, 1.0):
        draws = iter([z, torch.full_like(z, noise)] if eta > 0 else [torch.full_like(z, noise)])
        monkeypatch.setattr(scheduling_predictor_corrector, "standard_normal", lambda *_, of=draws: next(of))
        x = draw(4, 12, seed=6)
        steps = [x]
        for t in scheduler.timesteps[:2]:
            x = scheduler.step(network(x, t), t, x).prev_sample
            steps.append(x)
        states.append(steps)

    y = states[0][1] / alpha
    x_0, first = law.denoise(y, 1.0, s), states[0][0] / level_of(scheduler, scheduler.timesteps[0])[0]
    x_0_p = law.denoise(first, 1.0, s_p)
    D, u = x_0 - x_0_p, y - x_0_p - (s / s_p) ** 2 * (first - x_0_p)
    w = eta * s * math.sqrt(1 - (s / s_p) ** 2)
    Du, DD, uu, zz = ((a * b).sum(1, keepdim=True) for a, b in ((D, u), (D, D), (u, u), (z, z)))
    unexplained = ((D - Du / uu * u) * z).sum(1, keepdim=True)
    l_1 = Du / uu + 12 * w * unexplained / (12 * w**2 * zz + uu)
    l_2 = DD / Du
    slopes = Slopes(l_1, l_2, l_2 * (l_2 / l_1).clamp(min=1).sqrt())
    b, b_p = (math.sqrt(v**2 - eta**2 * v**2 * (1 - v**2 / V**2)) / V for v, V in ((s_next, s), (s, s_p)))
    c = secant_coefficient(slopes.along_change, b, b_p, s / s_p)
    torch.testing.assert_close(states[0][2] / alpha_next, x_0 + b * (y - x_0) + c * D, rtol=1e-6, atol=1e-9)
    variance = ((states[1][2] - states[0][2]) / alpha_next) ** 2
    expected = eta**2 * s_next**2 * (1 - s_next**2 / s**2) + missing_variance(slopes, c, s, b, b_p, s / s_p)
    torch.testing.assert_close(variance, expected.expand_as(variance), rtol=1e-6, atol=1e-9)
    assert (expected > 0).all() and (l_2 > l_1).any()


# ---- the variance of a run ------------------------------------------------------------------------------------------


def probed(scheduler, i, law, states, seeds):
    """Where the steps from entry i on lead whose states are given, (B,) each, with one seed per sample and step."""
    network = exact_network(law, scheduler)
    for t, x in zip(scheduler.timesteps[i : i + len(states)], states, strict=True):
        x = torch.tensor(x, dtype=torch.float64)[:, None]
        x = scheduler.step(network(x, t), t, x, generator=[seeded(seed) for seed in seeds]).prev_sample
    return x[:, 0].tolist()


def variance_ratios(scheduler, S):
    """Variance of the state on each level over the right one, from a start that has the right one."""
    law = Gaussian(torch.zeros(1, dtype=torch.float64), variance=S)
    points = [scheduler.signal_and_noise(t) for t in scheduler.timesteps] + [(1.0, 0.0)]
    right = [float(alpha) ** 2 * S + float(sigma) ** 2 for alpha, sigma in points]
    z, other_z = (float(torch.randn(1, 1, generator=seeded(seed), dtype=torch.float64)) for seed in (0, 1))

    def coefficients(now, other_noise, *rest):
        w = (now - other_noise) / (z - other_z)
        return *(value - w * z for value in (now, *rest)), w

    q, _, w = coefficients(*probed(scheduler, 0, law, [(1.0, 1.0, 2.0)], (0, 1, 0)))
    covariance = np.array([[1, q], [q, q**2 + w**2 / right[0]]]) * right[0]  # of the last two states
    ratios = [covariance[1, 1] / right[1]]
    for i in range(len(right) - 2):
        pairs = [(0.0, 0.0, 1.0, 1.0), (1.0, 1.0, 0.0, 2.0)]
        q, p, mixed, w = coefficients(*probed(scheduler, i, law, pairs, (0, 1, 0, 0)))
        assert mixed == pytest.approx(p + 2 * q, rel=1e-6, abs=1e-9)  # it is linear
        weights = np.array([p, q])
        cross, variance = weights @ covariance[:, 1], weights @ covariance @ weights + w**2
        covariance = np.array([[covariance[1, 1], cross], [cross, variance]])
        ratios.append(variance / right[i + 2])
    return ratios


@ON_ALL_PATHS
@pytest.mark.parametrize("S", [0.03**2, 0.25, 9.0])
def test_without_noise_a_run_keeps_the_exact_variance_from_an_exact_pair_of_states_on(S, path):
    scheduler = ready(7, eta=0.0, timestep_spacing="karras", **path)
    law = Gaussian(torch.zeros(3, dtype=torch.float64), variance=S)
    network, start = exact_network(law, scheduler), draw(2, 3)

    def exact_state(t):
        alpha, sigma = (float(c) for c in scheduler.signal_and_noise(t))
        return math.sqrt(alpha**2 * S + sigma**2) * start

    times = scheduler.timesteps
    scheduler.step(network(exact_state(times[0]), times[0]), times[0], exact_state(times[0]))
    x = exact_state(times[1])
    for t, t_next in itertools.pairwise(times[1:]):
        x = scheduler.step(network(x, t), t, x).prev_sample
        torch.testing.assert_close(x, exact_state(t_next), rtol=2e-4, atol=0)


@pytest.mark.parametrize("deviation", [0.03, 0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(("N", "eta", "bound"), [(10, 0.0, 0.002), (10, 1.0, 0.01), (20, 1.0, 0.01), (50, 1.0, 0.002)])
def test_the_variance_of_a_gaussian_is_nearly_right_in_few_steps(N, eta, bound, deviation):
    ratio = variance_ratios(ready(N, eta=eta, last_step_noise=True, **LADDER), deviation**2)[-1]
    assert abs(ratio - 1) < bound


def test_with_the_noise_of_the_ancestral_step_it_is_not_exact():
    assert variance_ratios(ready(10, last_step_noise=True, **LADDER), 0.25)[-1] > 1.004


@ON_ALL_PATHS
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_law_of_a_gaussian_is_approached_at_second_order(eta, path):
    def error(N):
        times = np.linspace(960, 240, N + 1)  # all end on the same level; the step to the data is not part of it
        scheduler = build(eta=eta, **path)
        scheduler.set_timesteps(timesteps=times if path is FLOW else times.astype(int))
        return abs(variance_ratios(scheduler, 0.25)[-2] - 1)

    assert math.log2(error(20) / error(40)) > 1.9


def test_the_last_step_noise_is_the_variance_that_is_left_of_the_data():
    S = 0.25
    law = Gaussian(torch.zeros(4, dtype=torch.float64), variance=S)
    with_noise, without = (ready(6, last_step_noise=kept) for kept in (True, False))
    x = draw(5, 4)
    states = run(with_noise, x, seeded(0), law)
    final = run(without, x, seeded(0), law)[-1]
    generator = seeded(0)
    z = [torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(6)][-1]
    alpha, sigma = with_noise.signal_and_noise(with_noise.timesteps[-1])
    left = law.posterior_variance(states[-2], float(alpha), float(sigma))
    torch.testing.assert_close(states[-1] - final, left.sqrt() * z, rtol=1e-4, atol=0)
    torch.testing.assert_close(final, law.denoise(states[-2], float(alpha), float(sigma)))


# ---- what stands in the way -----------------------------------------------------------------------------------------


@ON_ALL_PATHS
@WITH_ALL_ETA
@pytest.mark.parametrize("kind", ["zero", "constant", "expanding", "noise"])
def test_no_network_makes_it_fail(kind, eta, path):
    scheduler = ready(7, eta=eta, last_step_noise=True, **path)
    outputs = {
        "zero": lambda x: torch.zeros_like(x),
        "constant": lambda x: torch.ones_like(x),
        "expanding": lambda x: -3 * x,
        "noise": lambda x: torch.randn_like(x) * 100,
    }
    for shape in ((2, 1), (2, 3, 8, 8)):
        x = draw(*shape)
        for t in scheduler.timesteps:
            x = scheduler.step(outputs[kind](x), t, x, generator=seeded(0)).prev_sample
            assert x.isfinite().all()


@ON_ALL_PATHS
@WITH_ALL_ETA
def test_a_network_that_knows_the_data_gets_the_ancestral_step(eta, path):
    """x̂_0 does not change: D = 0, nothing is measured, and the step is that of DDIM with this eta."""
    x, kept = draw(3, 2, 4, 4), {"clip_sample": False, "timestep_spacing": "karras", **path}
    secant = ready(6, eta=eta, last_step_noise=True, **path)
    plain = PredictorCorrectorScheduler(predictor="ddim", eta=eta, corrector_steps=0, **kept)
    plain.set_timesteps(6)
    law = Gaussian(0.3, variance=0.0)
    for a, b in zip(run(secant, x, seeded(0), law), run(plain, x, seeded(0), law), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_run_from_pure_noise_starts_from_the_mean_of_the_data():
    scheduler = ready(4, eta=0.0, timestep_spacing="trailing", **FLOW)
    assert scheduler.timesteps[0] == 1000
    x = draw(3, 2)
    states = run(scheduler, x, law=Gaussian(torch.tensor([0.5, -1.0], dtype=torch.float64), variance=0.04))
    sigma = float(scheduler.timesteps[1]) / 1000
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    torch.testing.assert_close(states[1], (1 - sigma) * mean + sigma * x)


# ---- state and settings ---------------------------------------------------------------------------------------------


@WITH_ALL_ETA
@ON_ALL_PATHS
def test_a_sample_does_not_depend_on_its_batch(path, eta):
    scheduler = ready(6, eta=eta, last_step_noise=True, **path)
    x = draw(4, 3, 4, 4)
    together = run(scheduler, x, [seeded(i) for i in range(4)])[-1]
    for i in range(4):
        scheduler.set_timesteps(6)
        torch.testing.assert_close(run(scheduler, x[i : i + 1], [seeded(i)])[-1], together[i : i + 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 5), (3, 2, 4, 4), (3, 2, 3, 4, 4)])
def test_dtype_and_shape_are_kept(shape, dtype):
    scheduler = ready(5, last_step_noise=True)
    final = run(scheduler, draw(*shape).to(dtype), seeded(0))[-1]
    assert final.dtype == dtype and final.shape == shape and final.isfinite().all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_nothing_is_remembered_of_the_run_before(eta):
    x = draw(3, 5)
    fresh = run(ready(6, eta=eta), x, seeded(0))[-1]
    scheduler = ready(6, eta=eta)
    run(scheduler, draw(3, 5, seed=8), seeded(4))
    scheduler.set_timesteps(6)
    torch.testing.assert_close(run(scheduler, x, seeded(0))[-1], fresh, rtol=0, atol=0)
    network = exact_network(MIXTURE, scheduler)
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps[:3]:  # a run that is given up
        scheduler.step(network(x, t), t, x, generator=seeded(4))
    torch.testing.assert_close(run(scheduler, x, seeded(0))[-1], fresh, rtol=0, atol=0)


def test_a_start_in_the_middle_takes_a_first_order_step():
    scheduler, begin = ready(8, eta=0.0), 4
    network, x = exact_network(MIXTURE, scheduler), draw(3, 5)
    run(scheduler, x)  # to have something to forget
    scheduler.set_begin_index(begin)
    t, t_next = scheduler.timesteps[begin : begin + 2]
    after = scheduler.step(network(x, t), t, x).prev_sample
    alpha, sigma = (float(c) for c in scheduler.signal_and_noise(t_next))
    eps = network(x, t)
    torch.testing.assert_close(
        after, alpha * MIXTURE.denoise(x, *map(float, scheduler.signal_and_noise(t))) + sigma * eps
    )


def test_the_ancestral_noise_is_the_default():
    x = draw(3, 5)
    torch.testing.assert_close(run(ready(5), x, seeded(0))[-1], run(ready(5, eta=1.0), x, seeded(0))[-1])
    assert not torch.allclose(run(ready(5), x, seeded(0))[-1], run(ready(5, eta=0.5), x, seeded(0))[-1])


def test_settings_are_saved(tmp_path):
    scheduler = ready(5, eta=0.5, last_step_noise=True)
    scheduler.save_pretrained(tmp_path)
    loaded = PredictorCorrectorScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(5)
    x = draw(2, 3)
    assert torch.equal(run(loaded, x, seeded(0))[-1], run(scheduler, x, seeded(0))[-1])


@pytest.mark.parametrize("M", [1, 3])
def test_corrections_are_refused(M):
    with pytest.raises(ValueError, match="corrector_steps=0, got"):
        build(corrector_steps=M)


def test_it_calls_the_network_once_on_each_level():
    scheduler = ready(9)
    assert len(scheduler.timesteps) == len(set(scheduler.timesteps.tolist())) == 9 and scheduler.order == 1


# ---- quality --------------------------------------------------------------------------------------------------------


def evenly_spread_noise(monkeypatch):
    """Normal noise for particles on the line that fills the unit square of (rank, quantile): no Monte-Carlo error."""
    at = {}

    def noise_for(shape, **_):
        x = at["x"]
        ranks = x[:, 0].argsort().argsort().double()
        at["draws"] = at.get("draws", 0) + 1
        shift = (at["draws"] * math.sqrt(2)) % 1
        points = (ranks * (math.sqrt(5) - 1) / 2 + shift).frac().clamp(1e-12, 1 - 1e-12)
        return torch.from_numpy(ndtri(points.numpy()))[:, None]

    monkeypatch.setattr(gaussian_path, "randn_tensor", noise_for)
    return at


def distance_to_the_law(scheduler, law, quantiles, at):
    scheduler.set_timesteps(20)
    network, n = exact_network(law, scheduler), len(quantiles)
    x = torch.from_numpy(ndtri((np.arange(n) + 0.5) / n))[:, None]
    for t in scheduler.timesteps:
        at["x"] = x
        x = scheduler.step(network(x, t), t, x).prev_sample
    return float((x[:, 0].sort().values - quantiles).abs().mean())


def quantiles_of(weights, means, deviation, n):
    points, grid = (np.arange(n) + 0.5) / n, np.linspace(-3, 3, 200_001)
    erf = torch.erf(torch.from_numpy((grid[:, None] - means) / deviation / math.sqrt(2))).numpy()
    return torch.from_numpy(np.interp(points, (0.5 + 0.5 * erf) @ weights, grid))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_at_equal_calls_it_is_much_nearer_to_the_law_than_first_order_steps(eta, monkeypatch):
    weights, means, deviation = np.array([0.3, 0.5, 0.2]), np.array([-0.8, 0.1, 0.7]), 0.1
    law = GaussianMixture(weights.tolist(), torch.from_numpy(means)[:, None], [deviation**2] * 3)
    at, quantiles = evenly_spread_noise(monkeypatch), quantiles_of(weights, means, deviation, 2048)
    kept = {"clip_sample": False, "timestep_spacing": "karras", **LADDER}
    secant = distance_to_the_law(build(eta=eta, last_step_noise=True, **kept), law, quantiles, at)
    small = distance_to_the_law(DDPMAncestralScheduler(**kept), law, quantiles, at)
    others = [
        distance_to_the_law(PredictorCorrectorScheduler(corrector_steps=0, **settings, **kept), law, quantiles, at)
        for settings in (
            {"predictor": "ddim"},
            {"predictor": "modified_euler_maruyama"},
            {"variance_type": "self_estimated_isotropic", "last_step_noise": True},
        )
    ]
    assert 5 * secant < small and 1.5 * secant < min(others), (secant, small, others)


# ---- channels of different scale ------------------------------------------------------------------------------------

CHANNEL_STDS = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)


def channel_variances(steps=10, batch=32, side=16, **settings):
    """Variance of each channel of the samples over the right one, for channels that are each N(0, std^2 I)."""
    variance = (CHANNEL_STDS**2)[:, None, None].expand(4, side, side)
    law = Gaussian(torch.zeros(4, side, side, dtype=torch.float64), variance=variance)
    scheduler = PredictorCorrectorScheduler(
        clip_sample=False, timestep_spacing="karras", last_step_noise=True, corrector_steps=0, **settings
    )
    scheduler.set_timesteps(steps)
    model, generator = law.as_model(scheduler), torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, side, side, dtype=torch.float64, generator=generator)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample, t, x, generator=generator).prev_sample
    return x.var(dim=(0, 2, 3)) / CHANNEL_STDS**2


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_measured_per_channel_every_channel_keeps_its_own_variance(eta):
    standard_error = (2 / (32 * 16 * 16)) ** 0.5
    per_channel = channel_variances(predictor="secant", eta=eta, slopes_per="channel")
    assert (
        per_channel - 1
    ).abs().max() < 0.02 + 4 * standard_error  # 2 %: what eta > 0 leaves, and its noisier slopes
    per_sample = channel_variances(predictor="secant", eta=eta)
    assert (per_sample - 1).abs().max() > 0.5  # which is why


def test_one_channel_is_measured_as_the_whole_sample():
    z = torch.randn(3, 1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = torch.randn(3, 1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    past = past_with(z, 0.7)
    for whole, each in zip(
        measured_slopes(0.3 * u + 0.1 * z, u, past), measured_slopes(0.3 * u + 0.1 * z, u, past, True), strict=True
    ):
        torch.testing.assert_close(whole, each)


def test_a_channel_does_not_depend_on_the_others():
    z, u = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    change = 0.3 * u + 0.1 * z
    together = measured_slopes(change, u, past_with(z, 0.7), True)
    alone = measured_slopes(change[:, 2:3], u[:, 2:3], past_with(z[:, 2:3], 0.7), True)
    for of_all, of_one in zip(together, alone, strict=True):
        torch.testing.assert_close(of_all[:, 2:3], of_one)


def test_samples_without_channels_cannot_be_measured_per_channel():
    x = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"shape \(B, C, ..\), got \(3, 4\)"):
        measured_slopes(x, x, past_with(x, 1.0), True)
    with pytest.raises(ValueError, match="slopes_per must be one of .* got 'band'"):
        PredictorCorrectorScheduler(slopes_per="band")
