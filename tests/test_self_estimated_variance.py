r"""Properties of an ancestral step whose covariance is measured by the sampler's own last two network calls.

Oracles. For Gaussian data N(m, C), in the coordinates y = x / alpha with noise level s, E[x_0 | y] has the slope
L = C (C + s^2 I)^-1, and the exact covariance of an ancestral step to level s', in units of the data, is

    beta~ I + k^2 s^2 L         beta~ = s'^2 (1 - s'^2 / s^2)       k = 1 - s'^2 / s^2

A Langevin step from m, where the score is zero, moves the state by its noise alone. If that is given as each of the
2^d vectors of signs in turn, whose second moment is I exactly, the mean over them of what the next step draws is an
expectation without sampling error:

    isotropic      beta~ I + k^2 s^2 (tr L / d) I
    directional    beta~ I + k^2 s^2 (L^2 + (tr L - tr L^2) / d I)
"""

import itertools

import pytest
import torch

from annealers import DDPMAncestralScheduler, PredictorCorrectorScheduler
from annealers.exact import Gaussian, GaussianMixture
from annealers.schedulers import scheduling_predictor_corrector
from annealers.schedulers.gaussian_path import Level
from annealers.schedulers.secant import Innovation
from annealers.schedulers.self_estimated_variance import SELF_ESTIMATED, spread_of_original

LADDER = {"beta_schedule": "geometric", "sigma_min": 0.02, "sigma_max": 50.0}
FLOW = {"prediction_type": "flow_prediction"}
ON_ALL_PATHS = pytest.mark.parametrize("path", [{}, LADDER, FLOW], ids=["chain", "ladder", "flow"])
OF_BOTH_KINDS = pytest.mark.parametrize("kind", SELF_ESTIMATED)
MIXTURE = GaussianMixture([0.3, 0.7], [-1.0, 0.8], [0.04, 0.09])
LEVEL = Level(10, 0.8, 0.6)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def build(kind="self_estimated", **config):
    settings = {"variance_type": kind, "clip_sample": False, "timestep_spacing": "karras", "snr": 0.3}
    return PredictorCorrectorScheduler(**{**settings, **config})


def ready(steps, kind="self_estimated", **config):
    scheduler = build(kind, **config)
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


def point(scheduler, t):
    return tuple(float(c) for c in scheduler.signal_and_noise(t))


def law_of(eigenvalues, turn_seed=0):
    """A Gaussian with these variances along directions of its own, and the directions."""
    eigenvalues = torch.tensor(eigenvalues, dtype=torch.float64)
    turn = torch.linalg.qr(draw(len(eigenvalues), len(eigenvalues), seed=turn_seed)).Q
    return Gaussian(torch.zeros_like(eigenvalues), covariance=turn * eigenvalues @ turn.T), turn


def slope_of(eigenvalues, turn, s):
    eigenvalues = torch.tensor(eigenvalues, dtype=torch.float64)
    return turn * (eigenvalues / (eigenvalues + s**2)) @ turn.T


def sign_vectors(d):
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=d)), dtype=torch.float64)


# ---- the covariance of a step ---------------------------------------------------------------------------------------


def parts_of_the_next_step(scheduler, law, monkeypatch, entry=1, noise=None):
    """From the data's mean, a correction by each vector of signs, and then what the prediction adds to its mean.

    Returns:
        Directions a, (2^d, d), deviations, (2^d, 1), and noise levels s, s' and alpha' of the step.
    """
    noise = sign_vectors(law.event_shape[0]) if noise is None else noise
    network = exact_network(law, scheduler)
    correction, prediction = scheduler.timesteps[entry : entry + 2]
    assert correction == prediction
    later = scheduler.timesteps[entry + 2] if entry + 2 < len(scheduler.timesteps) else None
    ends = []
    for sign, normal in ((0.3, 0.0), (-2.0, 0.0), (0.7, 1.0)):  # of the first only the sign counts
        draws = iter([noise, torch.full((len(noise), 1), sign).double(), torch.full_like(noise, normal)])
        if scheduler.config.variance_type == "self_estimated_isotropic":
            draws = iter([noise, torch.full_like(noise, normal)])
        monkeypatch.setattr(scheduling_predictor_corrector, "standard_normal", lambda *_, of=draws: next(of))
        x = torch.zeros_like(noise)
        for t in (correction, prediction):
            x = scheduler.step(network(x, t), t, x).prev_sample
        ends.append(x)
    plus, minus, noisy = ends
    (alpha, sigma), (alpha_next, sigma_next) = point(scheduler, prediction), (1.0, 0.0)
    if later is not None:
        alpha_next, sigma_next = point(scheduler, later)
    s, s_next = sigma / alpha, sigma_next / alpha_next
    mean = (plus + minus) / 2
    r = s_next**2 / s**2
    y = 2 * scheduler.config.snr * s * noise
    expected = r * y + (1 - r) * law.denoise(y, 1.0, s)  # the posterior mean of y'
    torch.testing.assert_close(mean / alpha_next, expected, rtol=1e-6, atol=1e-9)
    return (plus - minus) / 2 / alpha_next, (noisy - plus)[:, :1] / alpha_next, s, s_next


def mean_covariance(directions, deviations):
    """E[a a^T + deviation^2 I]."""
    d = directions.shape[1]
    return directions.T @ directions / len(directions) + (deviations**2).mean() * torch.eye(d, dtype=torch.float64)


def coefficients(s, s_next):
    """beta~ and k^2 s^2."""
    return s_next**2 * (1 - s_next**2 / s**2), (1 - s_next**2 / s**2) ** 2 * s**2


EIGENVALUES = [4.0, 1.0, 0.3, 0.05, 1e-3, 0.7, 0.2, 2.0, 0.02, 0.1]


@ON_ALL_PATHS
@pytest.mark.parametrize("d", [1, 3, 10])
def test_the_expected_covariance_is_that_of_two_moments_of_the_slope(d, path, monkeypatch):
    law, turn = law_of(EIGENVALUES[:d])
    for entry in (1, 3, 5, 7):
        scheduler = ready(6, **path)
        directions, deviations, s, s_next = parts_of_the_next_step(scheduler, law, monkeypatch, entry)
        beta, weight = coefficients(s, s_next)
        L = slope_of(EIGENVALUES[:d], turn, s)
        rest = (L.trace() - (L @ L).trace()) / d
        expected = weight * L @ L + (beta + weight * rest) * torch.eye(d, dtype=torch.float64)
        torch.testing.assert_close(mean_covariance(directions, deviations), expected, rtol=1e-6, atol=1e-9 * s_next)


@ON_ALL_PATHS
@pytest.mark.parametrize("d", [1, 3, 10])
def test_the_isotropic_kind_spreads_the_mean_slope_over_all_directions(d, path, monkeypatch):
    law, turn = law_of(EIGENVALUES[:d])
    for entry in (1, 5):
        scheduler = ready(6, "self_estimated_isotropic", **path)
        directions, deviations, s, s_next = parts_of_the_next_step(scheduler, law, monkeypatch, entry)
        beta, weight = coefficients(s, s_next)
        assert directions.abs().max() < 1e-9
        expected = beta + weight * float(slope_of(EIGENVALUES[:d], turn, s).trace()) / d
        assert float((deviations**2).mean()) == pytest.approx(expected, rel=1e-6)


@ON_ALL_PATHS
@pytest.mark.parametrize("eigenvalues", [[1e8, 0.0, 0.0, 0.0, 1e8, 0.0], [0.2] * 6], ids=["known or not", "alike"])
def test_it_is_exact_where_directions_are_known_or_not_and_where_all_are_alike(eigenvalues, path, monkeypatch):
    law, turn = law_of(eigenvalues)
    directions, deviations, s, s_next = parts_of_the_next_step(ready(6, **path), law, monkeypatch, 5)
    beta, weight = coefficients(s, s_next)
    exact = beta * torch.eye(6, dtype=torch.float64) + weight * slope_of(eigenvalues, turn, s)
    covariance = mean_covariance(directions, deviations)
    torch.testing.assert_close(covariance, exact, rtol=1e-5, atol=1e-6 * float(exact.max()))


def test_in_between_it_errs_by_the_product_of_known_and_unknown_about_its_mean(monkeypatch):
    law, turn = law_of(EIGENVALUES)
    directions, deviations, s, s_next = parts_of_the_next_step(ready(6, **LADDER), law, monkeypatch, 7)
    beta, weight = coefficients(s, s_next)
    slopes = torch.tensor([e / (e + s**2) for e in EIGENVALUES], dtype=torch.float64)
    measured = torch.diag(turn.T @ mean_covariance(directions, deviations) @ turn)
    lacking = slopes * (1 - slopes)
    torch.testing.assert_close((beta + weight * slopes - measured) / weight, lacking - lacking.mean())
    assert (lacking - lacking.mean()).abs().max() <= 0.25


def test_the_step_to_the_data_draws_from_what_is_left_of_it_if_its_noise_is_kept(monkeypatch):
    law, turn = law_of(EIGENVALUES[:6])
    entry = 2 * 5 - 1
    directions, deviations, s, _ = parts_of_the_next_step(ready(6, last_step_noise=True), law, monkeypatch, entry)
    L = slope_of(EIGENVALUES[:6], turn, s)
    expected = s**2 * (L @ L + (L - L @ L).trace() / 6 * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(mean_covariance(directions, deviations), expected, rtol=1e-6, atol=1e-12)
    monkeypatch.undo()
    scheduler = ready(6)
    states = run(scheduler, draw(4, 6), seeded(0), law)
    alpha, sigma = point(scheduler, scheduler.timesteps[-1])
    torch.testing.assert_close(states[-1], law.denoise(states[-2], alpha, sigma), rtol=1e-6, atol=1e-9)


@ON_ALL_PATHS
def test_both_kinds_have_the_same_trace_of_every_sample(path, monkeypatch):
    law, _ = law_of(EIGENVALUES)
    traces = []
    for kind in SELF_ESTIMATED:
        noise = draw(9, 10, seed=2)
        directions, deviations, _, _ = parts_of_the_next_step(ready(6, kind, **path), law, monkeypatch, 5, noise)
        traces.append((directions**2).sum(1) + 10 * deviations[:, 0] ** 2)
    torch.testing.assert_close(traces[0], traces[1])
    assert float(traces[0].std()) > 0


# ---- what is measured -----------------------------------------------------------------------------------------------


@ON_ALL_PATHS
@OF_BOTH_KINDS
@pytest.mark.parametrize("corrector", ["langevin", "leimkuhler_matthews"])
@pytest.mark.parametrize("corrector_steps", [0, 1, 2])
def test_the_change_of_x_0_is_a_matrix_times_the_way_that_the_state_went(
    corrector_steps, corrector, kind, path, monkeypatch
):
    law, turn = law_of(EIGENVALUES[:4])
    scheduler, seen = ready(5, kind, corrector_steps=corrector_steps, corrector=corrector, **path), []

    def spy(x_0, y, past, *more):
        seen.append((x_0 - past.original, y - past.expected, past))
        return spread_of_original(x_0, y, past, *more)

    monkeypatch.setattr(scheduling_predictor_corrector, "spread_of_original", spy)
    run(scheduler, draw(7, 4), seeded(0), law)
    assert len(seen) == 3  # not at the first level, which nothing leads to, nor in the last step, which has no noise
    levels = list(dict.fromkeys(scheduler.timesteps.tolist()))
    for t, t_before, (change, way, past) in zip(levels[1:], levels, seen, strict=False):
        (alpha, sigma), (alpha_before, sigma_before) = point(scheduler, t), point(scheduler, t_before)
        torch.testing.assert_close(change, way @ slope_of(EIGENVALUES[:4], turn, sigma / alpha), rtol=1e-5, atol=1e-8)
        if corrector_steps:
            moved = (2 if corrector == "langevin" else 1) * 2 * (0.3 * sigma / alpha) ** 2
            drift = 2 * 0.3**2 * (past.original - past.expected)
            torch.testing.assert_close(way, drift + past.deviation * past.noise, rtol=1e-5, atol=1e-8)
        else:  # what x_0, if it were known, and if it were not at all, would have had it go
            moved = (sigma_before / alpha_before) ** 2 - (sigma / alpha) ** 2
        assert past.moved == pytest.approx(moved)


@ON_ALL_PATHS
@pytest.mark.parametrize("corrector_steps", [0, 1])
def test_the_isotropic_kind_is_the_calibrated_variance_without_calibration_for_an_isotropic_gaussian(
    corrector_steps, path
):
    S, d = 0.25, 12
    law = Gaussian(torch.zeros(d, dtype=torch.float64), variance=S)
    plain = build("optimal", corrector_steps=corrector_steps, last_step_noise=True, **path)
    alpha, sigma = plain.signal_and_noise(torch.from_numpy(plain.train_timesteps))
    statistic = (sigma**2 / (alpha**2 * S + sigma**2)).tolist()
    settings = {"corrector_steps": corrector_steps, "last_step_noise": True, **path}
    calibrated = ready(6, "optimal", mean_squared_noise=statistic, **settings)
    measured = ready(6, "self_estimated_isotropic", **settings)
    network, x, compared = exact_network(law, measured), draw(3, d), 0
    for i, t in enumerate(measured.timesteps):
        ends = [s.step(network(x, t), t, x, generator=seeded(i)).prev_sample for s in (measured, calibrated)]
        if i > 0:  # at the first nothing is measured yet
            torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)
            compared += 1
        x = ends[1]
    assert compared == len(measured.timesteps) - 1


@pytest.mark.parametrize("d", [2, 12])
def test_more_than_the_trace_is_never_given_to_one_direction(d):
    """A network whose slope is no covariance: |L z|^2 may exceed z.L z."""
    zeros, z = torch.zeros(6, d, dtype=torch.float64), draw(6, d)
    for slope in (3.0, 1.0, 0.4):
        past = Innovation(LEVEL, LEVEL, zeros, zeros, 0.0, z, 1.0, 1.0)
        turned = z.roll(1, dims=1) * 5 + slope * z  # most of it across z
        direction, rest = spread_of_original(turned, z, past, False)
        none, trace = spread_of_original(turned, z, past, True)
        assert none is None and (trace <= 1).all() and (rest >= 0).all()
        torch.testing.assert_close((direction**2).sum(1, keepdim=True) / d + rest, trace)
        assert (rest < 1e-9).all()


def test_directions_that_shrink_have_no_variance():
    past = Innovation(LEVEL, LEVEL, torch.zeros(2, 9), torch.zeros(2, 9), 0.0, draw(2, 9), 1.0, 1.0)
    direction, rest = spread_of_original(-0.5 * past.noise, past.noise, past, False)
    assert (direction == 0).all() and (rest == 0).all()


@ON_ALL_PATHS
@OF_BOTH_KINDS
def test_corrections_are_what_they_are_without_it(kind, path):
    x, plain = draw(4, 5), ready(4, "fixed_small", **path)
    measured = ready(4, kind, **path)
    network = exact_network(MIXTURE, plain)
    for i, t in enumerate(plain.timesteps):
        ends = [s.step(network(x, t), t, x, generator=seeded(i)).prev_sample for s in (plain, measured)]
        assert torch.equal(*ends) == (i % 2 == 1 or i in (0, len(plain.timesteps) - 1))
        x = ends[0]


# ---- what stands in the way -----------------------------------------------------------------------------------------


@ON_ALL_PATHS
@OF_BOTH_KINDS
@pytest.mark.parametrize("corrector_steps", [0, 1, 2])
@pytest.mark.parametrize("rule", ["sigma", "norm"])
@pytest.mark.parametrize("output", ["zero", "constant", "expanding", "noise"])
def test_no_network_makes_it_fail(output, rule, corrector_steps, kind, path):
    scheduler = ready(5, kind, corrector_steps=corrector_steps, step_size_rule=rule, last_step_noise=True, **path)
    network = {
        "zero": torch.zeros_like,
        "constant": torch.ones_like,
        "expanding": lambda x: -3 * x,
        "noise": lambda x: 100 * torch.randn(x.shape, generator=seeded(0), dtype=x.dtype),
    }[output]
    for shape in ((2, 1), (2, 3, 4, 4)):
        x = draw(*shape)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x), t, x, generator=seeded(0)).prev_sample
            assert x.isfinite().all()


@ON_ALL_PATHS
@OF_BOTH_KINDS
@pytest.mark.parametrize("corrector_steps", [0, 1])
def test_data_that_is_known_gets_the_small_variance(corrector_steps, kind, path, monkeypatch):
    monkeypatch.setattr(scheduling_predictor_corrector, "standard_normal", lambda x, *_: 0.7 * torch.ones_like(x))
    x, law = draw(3, 2, 4, 4), Gaussian(0.3, variance=0.0)
    measured, plain = (ready(6, k, corrector_steps=corrector_steps, **path) for k in (kind, "fixed_small"))
    for a, b in zip(run(measured, x, law=law), run(plain, x, law=law), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_run_from_pure_noise_starts_with_the_small_variance():
    scheduler = ready(4, timestep_spacing="trailing", **FLOW)
    plain = ready(4, "fixed_small", timestep_spacing="trailing", **FLOW)
    assert scheduler.timesteps[0] == 1000
    x = draw(3, 2)
    states = run(scheduler, x, seeded(0))
    assert torch.equal(states[1], run(plain, x, seeded(0))[1])
    assert all(state.isfinite().all() for state in states)


# ---- state and settings ---------------------------------------------------------------------------------------------


@ON_ALL_PATHS
@OF_BOTH_KINDS
@pytest.mark.parametrize("corrector_steps", [0, 1])
@pytest.mark.parametrize("corrector", ["langevin", "leimkuhler_matthews"])
def test_a_sample_does_not_depend_on_its_batch(corrector, corrector_steps, kind, path):
    scheduler = ready(5, kind, corrector_steps=corrector_steps, corrector=corrector, last_step_noise=True, **path)
    x = draw(3, 3, 4, 4)
    together = run(scheduler, x, [seeded(i) for i in range(3)])[-1]
    for i in range(3):
        torch.testing.assert_close(run(scheduler, x[i : i + 1], [seeded(i)])[-1], together[i : i + 1])


@OF_BOTH_KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 5), (3, 2, 4, 4), (3, 2, 3, 4, 4)])
def test_dtype_and_shape_are_kept(shape, dtype, kind):
    final = run(ready(4, kind, last_step_noise=True), draw(*shape).to(dtype), seeded(0))[-1]
    assert final.dtype == dtype and final.shape == shape and final.isfinite().all()


@OF_BOTH_KINDS
@pytest.mark.parametrize("corrector_steps", [0, 1])
def test_nothing_is_remembered_of_the_run_before(corrector_steps, kind):
    x = draw(3, 5)
    fresh = run(ready(5, kind, corrector_steps=corrector_steps), x, seeded(0))[-1]
    scheduler = ready(5, kind, corrector_steps=corrector_steps)
    run(scheduler, draw(3, 5, seed=8), seeded(4))
    assert torch.equal(run(scheduler, x, seeded(0))[-1], fresh)
    scheduler.set_timesteps(5)
    assert torch.equal(run(scheduler, x, seeded(0))[-1], fresh)
    network = exact_network(MIXTURE, scheduler)
    for t in scheduler.timesteps[:4]:  # a run that is given up
        scheduler.step(network(x, t), t, x, generator=seeded(4))
    assert torch.equal(run(scheduler, x, seeded(0))[-1], fresh)


@OF_BOTH_KINDS
def test_a_start_in_the_middle_starts_with_the_small_variance(kind):
    measured, plain, x = ready(6, kind), ready(6, "fixed_small"), draw(3, 5)
    run(measured, x, seeded(1))  # to have something to forget
    begin = 2 * measured.order
    t = measured.timesteps[begin]
    assert t == measured.timesteps[begin - 1] != measured.timesteps[begin + 1]  # the last call on its level
    network, ends = exact_network(MIXTURE, measured), []
    for scheduler in (measured, plain):
        scheduler.set_begin_index(begin)
        ends.append(scheduler.step(network(x, t), t, x, generator=seeded(0)).prev_sample)
    assert torch.equal(*ends)


def test_settings_are_saved(tmp_path):
    scheduler = ready(5, "self_estimated", last_step_noise=True)
    scheduler.save_pretrained(tmp_path)
    loaded = PredictorCorrectorScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(5)
    x = draw(2, 3)
    assert loaded.config.variance_type == "self_estimated"
    assert torch.equal(run(loaded, x, seeded(0))[-1], run(scheduler, x, seeded(0))[-1])


@OF_BOTH_KINDS
@pytest.mark.parametrize("predictor", ["ddim", "probability_flow", "euler_maruyama", "none"])
def test_it_is_for_the_ancestral_step_only(predictor, kind):
    with pytest.raises(ValueError, match="is for predictor='ddpm', got predictor="):
        build(kind, predictor=predictor)


@OF_BOTH_KINDS
def test_other_schedulers_do_not_know_it(kind):
    with pytest.raises(ValueError, match="variance_type must be one of"):
        DDPMAncestralScheduler(variance_type=kind)


# ---- quality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrector_steps", [0, 1])
def test_a_manifold_in_many_dimensions_keeps_its_variance(corrector_steps):
    """The variance off the manifold over the right one: of 400 x 60 coordinates, so its standard error is 1 %."""
    variance = torch.tensor([1.0] * 4 + [0.05**2] * 60, dtype=torch.float64)
    law, x = Gaussian(torch.zeros(64, dtype=torch.float64), variance=variance), draw(400, 64)
    levels = 11 if corrector_steps else 20  # 21 and 20 network calls
    off = {}
    for kind, kept in (("fixed_small", False), ("self_estimated", True)):
        scheduler = ready(levels, kind, corrector_steps=corrector_steps, last_step_noise=kept, **LADDER)
        off[kind] = float((run(scheduler, x, seeded(0), law)[-1][:, 4:] ** 2).mean()) / 0.05**2
    assert off["fixed_small"] < 0.75
    assert off["self_estimated"] == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("is_isotropic", [False, True])
def test_measured_per_channel_no_channel_lends_its_variance_to_another(is_isotropic):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 2, 8, 8, dtype=torch.float64, generator=generator)
    slopes = torch.tensor([1.0, 0.0], dtype=torch.float64)[None, :, None, None]  # one known, one unknown channel
    past = Innovation(LEVEL, LEVEL, torch.zeros_like(z), torch.zeros_like(z), 0.0, z, 1.0, 1.0)
    direction, rest = spread_of_original(slopes * z, z, past, is_isotropic, True)
    assert rest.shape == (200, 2, 1, 1)
    variance = rest.expand(z.shape) if direction is None else rest + direction**2
    torch.testing.assert_close(variance[:, 1], torch.zeros_like(variance[:, 1]))
    standard_error = (2 / variance[:, 0].numel()) ** 0.5
    assert abs(variance[:, 0].mean() - 1) < 4 * standard_error
