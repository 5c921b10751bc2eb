r"""Properties of the calibration: the measured error of a network, the bound of a schedule, the variance at a state.

Oracles, with V = alpha^2 S + sigma^2 for Gaussian data N(M, S):

    E|x_0 - x̂_0|^2 = sigma^2 S / V for the exact network, and for one whose x̂_0 or eps-hat is scaled by k more by
                     (1 - k)^2 E|x̂_0|^2 or (1 - k)^2 sigma^2 / alpha^2 E|eps-hat|^2, because the error of the exact
                     network is orthogonal to its prediction
    q(x_s | x_t, x_0)  as the product of the two normal densities of x_s, and its divergence by torch.distributions
    sum of the divergences with the exact reverse variance = I(x_0; x_first) - I(x_0; x_last), whatever the schedule
    Lambda = alpha^2 C (alpha^2 C + sigma^2 I)^-1 for data N(M, C), hence Cov[x_0 | x_t] = sigma^2 / alpha^2 Lambda
    two steps of a scheduler with known noise: its mean and standard deviation without sampling error
"""

import copy
import doctest
import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch.distributions import Normal, kl_divergence

from annealers import AnnealedLangevinScheduler, DDPMAncestralScheduler, GuidedDiffusionPipeline, calibration
from annealers.calibration import (
    PosteriorVarianceModel,
    bound_of_schedule,
    calibrate_spacing,
    denoising_error,
    posterior_variance,
)
from annealers.exact import Gaussian, GaussianMixture

T = 40
LINEAR = {"num_train_timesteps": T, "beta_end": 0.2}
COSINE = {"num_train_timesteps": T, "beta_schedule": "squaredcos_cap_v2"}
LADDER = {"num_train_timesteps": T, "beta_schedule": "geometric", "sigma_min": 0.02, "sigma_max": 40.0}
FLOW = {"num_train_timesteps": T, "prediction_type": "flow_prediction"}
ZERO_SNR = {**LINEAR, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
PATHS = [LINEAR, COSINE, LADDER, FLOW, ZERO_SNR]
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction", "score"]
EVERY_PREDICTION = [{**LINEAR, "prediction_type": name} for name in PREDICTION_TYPES]
M, S = 0.7, 0.25  # mean and variance of the Gaussian data
GAUSSIAN = Gaussian(M, variance=S)
MIXTURE = GaussianMixture([0.3, 0.7], [-1.0, 0.8], [0.04, 0.09])
MEANS, VARIANCES = [0.7, -1.0, 0.2, 0.0], [0.25, 1.5, 0.01, 4.0]  # of four coordinates that are independent
DIAGONAL = Gaussian(torch.tensor(MEANS, dtype=torch.float64), variance=VARIANCES)
FACTOR = torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
COVARIANCE = FACTOR @ FACTOR.T / 4 + 0.1 * torch.eye(4, dtype=torch.float64)
CORRELATED = Gaussian(torch.tensor(MEANS, dtype=torch.float64), covariance=COVARIANCE)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def build(config, **more):
    return DDPMAncestralScheduler(**{"clip_sample": False, **config, **more})


def table(scheduler):
    """alpha and sigma of the train timesteps, (T,) each."""
    alpha, sigma = scheduler.signal_and_noise(torch.as_tensor(scheduler.train_timesteps))
    return alpha.numpy(), sigma.numpy()


def exact_error(scheduler):
    alpha, sigma = table(scheduler)
    return sigma**2 * S / (alpha**2 * S + sigma**2)


def with_error(config, error=None, **more):
    """A scheduler that knows the error of the exact network of Gaussian data, or the one given."""
    scheduler = build(config, **more)
    error = exact_error(scheduler) if error is None else error
    return DDPMAncestralScheduler.from_config(scheduler.config, denoising_error=list(error))


def scaled(model, factor):
    return lambda x, t: factor * model(x, t).sample


def knowing(data, error):
    """A network whose x̂_0 is off by a known amount: its squared error is error(t), one number or one per sample."""

    def model(x, t):
        e = torch.as_tensor(error(int(t)), dtype=data.dtype)
        return data + e.sqrt().reshape(-1, *[1] * (data.ndim - 1))

    return model


# ---- the error of a network -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", PATHS + EVERY_PREDICTION)
def test_the_error_of_the_exact_network_is_the_posterior_variance_of_gaussian_data(config):
    scheduler = build(config)
    data = M + math.sqrt(S) * draw(2000, 3)
    measured = denoising_error(GAUSSIAN.as_model(scheduler), scheduler, data, generator=seeded(1))
    noise, exact = draw(2000, 3, seed=1), exact_error(scheduler)
    for row, (alpha, sigma) in enumerate(zip(*table(scheduler), strict=True)):
        V = alpha**2 * S + sigma**2
        on_this_noise = ((sigma**2 * (data - M) - alpha * sigma * S * noise) / V) ** 2  # x_0 - x̂_0, by hand
        assert measured.mean[row] == pytest.approx(float(on_this_noise.mean()), rel=1e-6)
    standard_error = exact * math.sqrt(2 / data.numel())
    np.testing.assert_allclose(measured.standard_error, standard_error, rtol=0.15)
    assert (np.abs(measured.mean - exact) < 4 * standard_error).all()


@pytest.mark.parametrize("config", [LINEAR, LADDER, FLOW])
def test_the_error_of_the_exact_network_is_the_average_posterior_variance_of_a_mixture(config):
    scheduler = build(config)
    data = MIXTURE.sample(4000, generator=seeded(0)).double()[:, None]
    measured = denoising_error(MIXTURE.as_model(scheduler), scheduler, data, generator=seeded(1))
    x = torch.linspace(-12, 12, 12001, dtype=torch.float64)
    exact = np.array(
        [
            float((MIXTURE.log_prob(x, a, s).exp() * MIXTURE.posterior_variance(x, a, s)).sum() * 0.002)
            for a, s in zip(*table(scheduler), strict=True)
        ]
    )
    assert (np.abs(measured.mean - exact) < 4 * measured.standard_error).all()
    assert (measured.standard_error < 0.15 * exact).all()


def test_a_scaled_denoiser_has_its_larger_error():
    scheduler = build(LINEAR, prediction_type="sample")
    data, factor = M + math.sqrt(S) * draw(4000, 3), 0.8
    model = scaled(GAUSSIAN.as_model(scheduler), factor)
    measured = denoising_error(model, scheduler, data, generator=seeded(1))
    alpha, sigma = table(scheduler)
    mean_square = M**2 + (alpha * S) ** 2 / (alpha**2 * S + sigma**2)
    expected = exact_error(scheduler) + (1 - factor) ** 2 * mean_square
    assert (np.abs(measured.mean - expected) < 4 * measured.standard_error).all()
    assert (np.abs(measured.mean - exact_error(scheduler)) > 4 * measured.standard_error).all()


def test_a_scaled_noise_prediction_has_its_larger_error():
    scheduler = build(LINEAR)
    data, factor = M + math.sqrt(S) * draw(4000, 3), 0.5
    model = scaled(GAUSSIAN.as_model(scheduler), factor)
    measured = denoising_error(model, scheduler, data, generator=seeded(1))
    alpha, sigma = table(scheduler)
    mean_square = sigma**2 / (alpha**2 * S + sigma**2)
    expected = exact_error(scheduler) + ((1 - factor) * sigma / alpha) ** 2 * mean_square
    assert (np.abs(measured.mean - expected) < 4 * measured.standard_error).all()
    assert (np.abs(measured.mean - exact_error(scheduler)) > 4 * measured.standard_error)[5:].all()


@pytest.mark.parametrize("config", PATHS)
@pytest.mark.parametrize("law", ["gaussian", "constant", "inverse"])
def test_between_measured_timesteps_the_inverse_of_the_error_is_linear_in_the_snr(config, law):
    scheduler = build(config, prediction_type=config.get("prediction_type", "sample"))
    alpha, sigma = table(scheduler)
    snr = alpha**2 / sigma**2
    curve = {"gaussian": 1 / (1 / S + snr), "constant": 0.3 + 0 * snr, "inverse": 0.1 / (snr + 1e-3)}[law]
    first, data = scheduler.train_timesteps[0], draw(2, 3)
    asked = []

    def model(x, t):
        """Off by the error of the curve, whatever the prediction type."""
        asked.append(int(t))
        a, s = (float(c) for c in scheduler.signal_and_noise(int(t)))
        x_0 = data + math.sqrt(curve[int(t) - first])
        if scheduler.config.prediction_type == "sample":
            return x_0
        return (a * x - x_0) / s if scheduler.config.prediction_type == "v_prediction" else (x - x_0) / s

    measured = denoising_error(model, scheduler, data, timesteps=[20, 7, 20])
    assert asked == [first, 7, 20, first + T - 1]
    np.testing.assert_allclose(measured.mean, curve, rtol=1e-6)
    np.testing.assert_allclose(measured.standard_error, 0, atol=1e-6)


def test_between_measured_timesteps_the_standard_error_is_linear_in_the_timestep():
    scheduler, data = build(LINEAR, prediction_type="sample"), draw(3, 2)
    model = knowing(data, lambda t: [1.0, 2.0, 3.0 + 3 * (t == 20)])
    measured = denoising_error(model, scheduler, data, timesteps=[20])
    ends, middle = 1 / math.sqrt(3), math.sqrt(7) / math.sqrt(3)  # unbiased variances 1 and 7, of three samples
    expected = np.interp(np.arange(T), [0, 20, T - 1], [ends, middle, ends])
    np.testing.assert_allclose(measured.standard_error, expected, rtol=1e-6)
    assert measured.mean[0] == pytest.approx(2) and measured.mean[20] == pytest.approx(3)


def test_data_known_exactly_has_no_error():
    scheduler, data = build(LINEAR, prediction_type="sample"), draw(3, 2)
    with np.errstate(divide="raise", invalid="raise"):
        measured = denoising_error(knowing(data, lambda t: 0.3 * (t > 20)), scheduler, data, timesteps=[20, 21])
    np.testing.assert_allclose(measured.mean, 0.3 * (np.arange(T) > 20), rtol=1e-9, atol=1e-25)


def test_batches_of_any_size_and_kind_count_every_sample_once():
    scheduler, data = build(LINEAR), draw(9, 2, 4, 4)
    data[-1] *= 3
    whole, pieces, lazy = (
        denoising_error(lambda x, t: x, scheduler, batches, timesteps=[3], generator=seeded(0))
        for batches in (data, [data[:4], data[4:]], iter([data[:4], data[4:]]))
    )
    for name in ("mean", "standard_error"):
        np.testing.assert_allclose(getattr(pieces, name), getattr(whole, name), rtol=1e-12)
        np.testing.assert_allclose(getattr(lazy, name), getattr(whole, name), rtol=1e-12)


def test_a_sample_meets_the_same_noise_at_every_timestep_and_its_own_if_it_has_a_generator():
    scheduler, data, states = build(LINEAR), draw(2, 3), []
    denoising_error(lambda x, t: states.append(x) or x, scheduler, data, [7], generator=[seeded(1), seeded(2)])
    noise = torch.cat([draw(1, 3, seed=1), draw(1, 3, seed=2)])
    for x, t in zip(states, [0, 7, T - 1], strict=True):
        torch.testing.assert_close(x, scheduler.add_noise(data, noise, t))


def test_the_network_is_called_without_gradients_with_its_conditions_and_a_whole_timestep():
    calls, scheduler = [], build(LINEAR)

    def model(x, t, class_labels):
        calls.append((torch.is_grad_enabled(), t.shape, t.is_floating_point(), class_labels))
        return UNet2DOutput(x)

    denoising_error(model, scheduler, draw(2, 3), [7], class_labels="cat")
    assert calls == [(False, (), False, "cat")] * 3


def test_of_a_learned_variance_nothing_is_used():
    scheduler, data = build(LINEAR), draw(3, 2, 4)
    one, two = (
        denoising_error(model, scheduler, data, [7], generator=seeded(0))
        for model in (lambda x, t: x, lambda x, t: torch.cat([x, 100 + x], dim=1))
    )
    np.testing.assert_array_equal(one.mean, two.mean)


def test_low_precision_is_compared_in_single_precision():
    scheduler, data = build(LINEAR), draw(4, 3)
    low, high = (
        denoising_error(lambda x, t: x / 2, scheduler, data.to(dtype), [7], generator=seeded(0))
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert low.mean.dtype == np.float64 and np.isfinite(low.mean).all()
    assert (low.mean[1:7] > 0).all()
    noise = torch.randn(4, 3, generator=seeded(0))
    x = scheduler.add_noise(data.bfloat16(), noise, 7)
    x_0 = scheduler.original_sample(x / 2, x, 7)
    assert x_0.dtype == torch.float32
    assert low.mean[7] == pytest.approx(float(((x_0 - data.bfloat16().float()) ** 2).mean()), rel=1e-6)
    assert low.mean[7] != high.mean[7]


def test_the_progress_bar_counts_the_calls(capsys):
    scheduler = build(LINEAR)
    denoising_error(lambda x, t: x, scheduler, [draw(2, 3), draw(2, 3)], [7])
    assert "6/6" in capsys.readouterr().err
    denoising_error(lambda x, t: x, scheduler, iter([draw(2, 3)]), [7])
    assert "3it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "batches", "timesteps", "message"),
    [
        (LINEAR, draw(1, 3), [7], "at least two samples, got 1"),
        (LINEAR, [], [7], "at least two samples, got 0"),
        (LINEAR, draw(2, 3), [T], rf"must lie in 0 .. {T - 1}, got 0 .. {T}"),
        (LINEAR, draw(2, 3), [-1], rf"must lie in 0 .. {T - 1}, got -1 .. {T - 1}"),
        (FLOW, draw(2, 3), [0], rf"must lie in 1 .. {T}, got 0 .. {T}"),
        ({**ZERO_SNR, "prediction_type": "epsilon"}, draw(2, 3), [7], f"timestep {T - 1} has no signal"),
        (LINEAR, draw(2, 3, 4), [7], r"must have the shape of the sample, \(2, 3, 4\), .* got \(2, 3\)"),
    ],
)
def test_data_and_timesteps_that_do_not_fit_are_refused(config, batches, timesteps, message):
    scheduler = build(config)
    with pytest.raises(ValueError, match=message):
        denoising_error(lambda x, t: x if x.ndim == 2 else x[:, :, 0], scheduler, batches, timesteps)


# ---- the placement of steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", PATHS)
def test_the_measured_error_survives_saving_and_every_copy_and_places_steps(config, tmp_path):
    scheduler = build(config)
    data = (M + math.sqrt(S) * draw(200, 4)).float()
    measured = calibrate_spacing(scheduler, GAUSSIAN.as_model(scheduler), data, [3, 9], generator=seeded(0))
    again = denoising_error(GAUSSIAN.as_model(scheduler), scheduler, data, [3, 9], generator=seeded(0))
    np.testing.assert_array_equal(measured.mean, again.mean)
    np.testing.assert_array_equal(measured.standard_error, again.standard_error)
    scheduler.register_to_config(timestep_spacing="optimal")
    scheduler.save_pretrained(tmp_path)
    optimal = {"timestep_spacing": "optimal"}
    copies = [
        scheduler,
        DDPMAncestralScheduler.from_pretrained(tmp_path),
        DDPMAncestralScheduler.from_config(scheduler.config, **optimal),
    ]
    if config is not LADDER:  # which Diffusers has not
        theirs = DDIMScheduler.from_config(scheduler.config)
        copies.append(DDPMAncestralScheduler.from_config(theirs.config, **optimal))
    first = scheduler.train_timesteps[0]
    for each in copies:
        assert each.config.denoising_error == measured.mean.tolist()
        levels = each._spaced_timesteps(6)
        assert len(levels) == 6 and levels[0] == first + T - 1 and levels[-1] == first
        np.testing.assert_array_equal(levels, scheduler._spaced_timesteps(6))
    other_class = AnnealedLangevinScheduler.from_config(scheduler.config)
    assert other_class.config.denoising_error == measured.mean.tolist()


@pytest.mark.parametrize("config", [{**LINEAR, "num_train_timesteps": 9}, {**FLOW, "num_train_timesteps": 9}])
@pytest.mark.parametrize("N", [2, 4, 8, 9])
def test_no_schedule_of_as_many_steps_has_a_lower_bound_than_the_optimal_one(config, N):
    error = [0.02, 0.05, 0.05, 0.2, 0.21, 0.4, 0.5, 0.52, 0.9]
    scheduler = with_error(config, error, timestep_spacing="optimal")
    scheduler.set_timesteps(N)
    everywhere = scheduler.train_timesteps
    bounds = [
        bound_of_schedule(scheduler, [everywhere[0], *inner, everywhere[-1]])
        for inner in itertools.combinations(everywhere[1:-1], N - 2)
    ]
    assert bound_of_schedule(scheduler) == pytest.approx(min(bounds), rel=1e-12)
    assert len(bounds) == 1 or min(bounds) < 0.999 * max(bounds)


@pytest.mark.parametrize("config", [{}, LADDER, FLOW])
@pytest.mark.parametrize("N", [5, 10, 20])
def test_the_optimal_spacing_has_a_lower_bound_than_the_others_on_a_mixture(config, N):
    scheduler = build(config)
    data = MIXTURE.sample(500, generator=seeded(0)).double()[:, None]
    calibrate_spacing(scheduler, MIXTURE.as_model(scheduler), data, range(1, 36, 5), generator=seeded(1))
    bounds = {}
    for spacing in ("optimal", "trailing", "linspace", "karras"):
        scheduler.register_to_config(timestep_spacing=spacing)
        scheduler.set_timesteps(N)
        bounds[spacing] = bound_of_schedule(scheduler)
    assert all(bounds["optimal"] < 0.98 * bounds[other] for other in ("trailing", "linspace", "karras")), bounds


@pytest.mark.parametrize("config", [LINEAR, COSINE, LADDER, FLOW, ZERO_SNR])
@pytest.mark.parametrize("variance_type", ["fixed_small", "optimal"])
def test_the_bound_is_the_sum_of_the_divergences_of_the_steps(config, variance_type):
    scheduler = with_error(config)
    alpha, sigma = table(scheduler)
    rows, nats = [T - 1, 30, 29, 12, 3, 0], 0.0
    for t, s in itertools.pairwise(rows):
        a = alpha[t] / alpha[s]
        v = sigma[t] ** 2 - (a * sigma[s]) ** 2
        # the product of N(x_s; alpha_s x_0, sigma_s^2) and of N(x_t; a x_s, v) as a density of x_s
        variance = 1 / (1 / sigma[s] ** 2 + a**2 / v)
        weight = variance * alpha[s] / sigma[s] ** 2
        off = weight**2 * exact_error(scheduler)[t]  # E of the squared distance of the two means
        of_the_model = variance if variance_type == "fixed_small" else variance + off
        q = Normal(torch.tensor(0.0, dtype=torch.float64), math.sqrt(variance))
        p = Normal(torch.tensor(math.sqrt(off), dtype=torch.float64), math.sqrt(of_the_model))
        nats += float(kl_divergence(q, p))
    bound = bound_of_schedule(scheduler, scheduler.train_timesteps[rows], variance_type)
    assert bound == pytest.approx(nats / math.log(2), rel=1e-9)


@pytest.mark.parametrize("config", [LINEAR, LADDER, FLOW])
@pytest.mark.parametrize("N", [1, 3, 17])
def test_with_the_exact_variance_of_gaussian_data_every_schedule_has_the_bound_of_the_information_gained(config, N):
    scheduler = with_error(config, timestep_spacing="linspace")
    scheduler.set_timesteps(N)
    alpha, sigma = table(scheduler)
    information = 0.5 * np.log2(1 + S * alpha**2 / sigma**2)  # of a level about the data, in bits
    bound = bound_of_schedule(scheduler, variance_type="optimal")
    assert bound == pytest.approx(information[0] - information[-1], rel=1e-9)
    assert bound_of_schedule(scheduler) > bound


def test_a_schedule_is_continued_to_the_ends_in_any_order_and_form():
    scheduler = with_error(LINEAR)
    expected = bound_of_schedule(scheduler, [T - 1, 20, 10, 0])
    for same in ([20, 10], [10, 20], torch.tensor([20, 10]), np.array([20, 10, 10]), [0, 20, 10, T - 1]):
        assert bound_of_schedule(scheduler, same) == expected
    assert bound_of_schedule(scheduler, [20]) > expected
    langevin = AnnealedLangevinScheduler.from_config(scheduler.config, steps_per_level=8)  # visits on each level
    with pytest.warns(UserWarning, match="times the noise variance"):  # which three levels are too few for
        langevin.set_timesteps(timesteps=[T - 1, 20, 10])
    assert bound_of_schedule(langevin) == pytest.approx(expected, rel=1e-12)


def test_a_flow_may_stop_between_train_timesteps():
    scheduler = with_error(FLOW)
    t = np.array([33.3, 12.25])
    snr = (1 - t / T) ** 2 / (t / T) ** 2
    levels = [0.0, *snr, (1 - 1 / T) ** 2 * T**2]
    nats = sum((levels[i + 1] - levels[i]) / (1 / S + levels[i]) / 2 for i in range(3))
    assert bound_of_schedule(scheduler, list(t)) == pytest.approx(nats / math.log(2), rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variance_type": "learned"}, "must be 'fixed_small' or 'optimal', got 'learned'"),
        ({"timesteps": [T, 3]}, rf"must lie in 0 .. {T - 1}, got 3 .. {T}"),
        ({"timesteps": [3, -1]}, rf"must lie in 0 .. {T - 1}, got -1 .. 3"),
    ],
)
def test_a_schedule_without_a_bound_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bound_of_schedule(with_error(LINEAR), **arguments)
    with pytest.raises(ValueError, match="call calibrate_spacing first"):
        bound_of_schedule(build(LINEAR), [3])


# ---- the variance of each coordinate at one state -------------------------------------------------------------------


def states(n=3):
    return draw(n, 4, seed=3)


def exact_lambda(law, scheduler, x, t):
    """alpha^2 / sigma^2 Var[x_0 | x_t]; 0 where there is no signal."""
    alpha, sigma = scheduler.signal_and_noise(torch.as_tensor(t))
    ratio = (alpha / sigma).reshape(-1, 1)
    return ratio**2 * law.posterior_variance(x, alpha, sigma)


@pytest.mark.parametrize("method", ["jvp", "finite_difference"])
@pytest.mark.parametrize("config", PATHS + EVERY_PREDICTION)
def test_one_probe_is_exact_for_independent_coordinates(config, method):
    scheduler = build(config)
    model, x = DIAGONAL.as_model(scheduler), states()
    for t in (scheduler.train_timesteps[0], 20, scheduler.train_timesteps[-1]):
        estimate = posterior_variance(model, scheduler, x, t, method=method)
        torch.testing.assert_close(estimate, exact_lambda(DIAGONAL, scheduler, x, t), rtol=1e-8, atol=1e-9)
    each_its_own = torch.tensor([5, 11, 30])
    estimate = posterior_variance(model, scheduler, x, each_its_own, method=method)
    torch.testing.assert_close(estimate, exact_lambda(DIAGONAL, scheduler, x, each_its_own), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("method", "tolerance"), [("jvp", 1e-10), ("finite_difference", 0.01)])
def test_one_probe_knows_how_uncertain_each_state_of_a_mixture_is(method, tolerance):
    scheduler = build(LINEAR)
    x = torch.linspace(-1.5, 1.5, 13, dtype=torch.float64)[:, None]
    for t in (2, 8, 20):
        exact = exact_lambda(MIXTURE, scheduler, x[:, 0], t).reshape(-1, 1)
        estimate = posterior_variance(MIXTURE.as_model(scheduler), scheduler, x, t, method=method)
        torch.testing.assert_close(estimate, exact, rtol=0, atol=tolerance * float(exact.max()))
        assert exact.max() > 1.5 * exact.min()


def lambda_matrix(scheduler, t):
    alpha, sigma = (float(c) for c in scheduler.signal_and_noise(t))
    V = alpha**2 * COVARIANCE + sigma**2 * torch.eye(4, dtype=torch.float64)
    return alpha**2 * COVARIANCE @ torch.linalg.inv(V)


@pytest.mark.parametrize("method", ["jvp", "finite_difference"])
def test_a_probe_is_the_product_of_random_signs_with_lambda_times_them(method):
    scheduler = build(LINEAR)
    model, L, generator = CORRELATED.as_model(scheduler), lambda_matrix(scheduler, 10), seeded(7)
    estimate = posterior_variance(model, scheduler, states(), 10, probes=3, generator=seeded(7), method=method)
    signs = [torch.randn(3, 4, generator=generator, dtype=torch.float64).sign() for _ in range(3)]
    torch.testing.assert_close(estimate, sum(u * (u @ L) for u in signs) / 3, rtol=1e-8, atol=1e-9)


def test_the_estimate_is_unbiased_with_the_variance_of_the_other_entries():
    scheduler, B = build(LINEAR), 20000
    L = lambda_matrix(scheduler, 10)
    x = states(1).expand(B, 4)
    estimate = posterior_variance(CORRELATED.as_model(scheduler), scheduler, x, 10, generator=seeded(0))
    variance = (L**2).sum(dim=1) - L.diagonal() ** 2
    standard_error = (variance / B).sqrt()
    assert ((estimate.mean(dim=0) - L.diagonal()).abs() < 4 * standard_error).all()
    assert ((L.sum(dim=1) - L.diagonal()).abs() > 10 * standard_error).all()  # what signs all alike would add
    torch.testing.assert_close(estimate.var(dim=0), variance, rtol=0.05, atol=0)


def test_a_generator_per_sample_gives_each_its_own_signs():
    scheduler, x = build(LINEAR), states(2)
    model = CORRELATED.as_model(scheduler)
    both = posterior_variance(model, scheduler, x, 10, generator=[seeded(1), seeded(2)])
    for i in range(2):
        alone = posterior_variance(model, scheduler, x[i : i + 1], 10, generator=seeded(i + 1))
        torch.testing.assert_close(both[i : i + 1], alone)


def default_signs(scheduler, shape, t, probes=1):
    """The default probes, up to the sign of the first coordinate: all of x̂_0 hangs on that one."""

    alpha, sigma = (float(c) for c in scheduler.signal_and_noise(t))

    def model(x, _):
        x_0 = x.flatten(1)[:, :1].expand(len(x), x[0].numel()).reshape(x.shape)
        return x_0 if scheduler.config.prediction_type == "sample" else (x - x_0) / sigma

    return posterior_variance(model, scheduler, torch.zeros(shape, dtype=torch.float64), t, probes) / alpha


def test_without_a_generator_the_signs_are_balanced_and_unrelated():
    scheduler = build(LINEAR, prediction_type="sample")
    shape = (1, 3, 50, 50)
    n = math.prod(shape)
    first = {t: default_signs(scheduler, shape, t) for t in (10, 11, 12)}
    second = 2 * default_signs(scheduler, shape, 10, probes=2) - first[10]
    for u in (*first.values(), second):
        torch.testing.assert_close(u.abs(), torch.ones_like(u))
        for lag in (0, 1, 2, 50):
            other = u.flatten().roll(lag) if lag else 1.0
            assert abs((u.flatten() * other).mean()) < 4 / math.sqrt(n)
    for u, w in itertools.combinations([*first.values(), second], 2):
        assert abs((u * w).mean()) < 4 / math.sqrt(n)


def test_levels_of_a_flow_between_the_same_train_timesteps_have_signs_of_their_own():
    scheduler = build(FLOW)
    u, w = (default_signs(scheduler, (1, 10000), t) for t in (10.25, 10.5))
    assert abs((u * w).mean()) < 0.04


def test_the_signs_come_from_the_published_generator():
    """SplitMix64 started from 0, and twice from 1234567, as its author's code prints them."""
    golden_gamma = -0x61C8864680B583EB
    words = torch.tensor([0, 1234567, 1234567 + golden_gamma])
    published = [0xE220A8397B1DCDAF, 6457827717110365317, 3203168211198807973]
    assert [word % 2**64 for word in calibration._mixed(words).tolist()] == published


def test_without_a_generator_the_estimate_is_a_function_of_state_and_timestep_alone():
    scheduler, x = build(FLOW), states(4)
    model, t = CORRELATED.as_model(scheduler), torch.tensor([3.5, 10.0, 10.25, 30.0])
    batch = posterior_variance(model, scheduler, x, t, probes=2)
    for i in range(4):
        alone = posterior_variance(model, scheduler, x[i : i + 1], t[i], probes=2)
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(batch[1:2] * 0 + 1, batch[1:2])


def test_many_default_probes_average_to_the_diagonal():
    scheduler, probes = build(LINEAR), 400
    L = lambda_matrix(scheduler, 10)
    estimate = posterior_variance(CORRELATED.as_model(scheduler), scheduler, states(1), 10, probes)[0]
    standard_error = (((L**2).sum(dim=1) - L.diagonal() ** 2) / probes).sqrt()
    assert ((estimate - L.diagonal()).abs() < 4 * standard_error).all()


def tiny_unet(**config):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        **config,
    ).eval()


def test_a_unet_with_attention_is_differentiated():
    scheduler, unet = build(LINEAR), tiny_unet().double()
    x, t = draw(2, 2, 8, 8), torch.tensor(10)
    estimate = posterior_variance(unet, scheduler, x, t, generator=seeded(4))
    assert not estimate.requires_grad
    u = draw(2, 2, 8, 8, seed=4).sign()
    alpha, sigma = (float(c) for c in scheduler.signal_and_noise(10))
    with torch.no_grad():
        slope = (unet(x + 1e-5 * u, t).sample - unet(x - 1e-5 * u, t).sample) / 2e-5
    torch.testing.assert_close(estimate, u * (u - sigma * slope), rtol=1e-6, atol=1e-7)
    assert slope.abs().max() > 0.01
    by_difference = posterior_variance(unet, scheduler, x, t, generator=seeded(4), method="finite_difference")
    torch.testing.assert_close(by_difference, estimate, rtol=0, atol=0.02 * float(slope.abs().max()))


def test_a_network_without_forward_derivatives_is_refused_and_told_what_to_use():
    scheduler, x = build(LINEAR), draw(2, 2, 4, 4).float()

    def model(x, _):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0]

    with pytest.raises(NotImplementedError, match="no forward derivative: use method='finite_difference'"):
        posterior_variance(model, scheduler, x, 10)
    assert posterior_variance(model, scheduler, x, 10, method="finite_difference").isfinite().all()


def test_low_precision_gives_an_estimate_in_single_precision():
    scheduler = build(LINEAR)
    x = states().bfloat16()
    estimate = posterior_variance(DIAGONAL.as_model(scheduler), scheduler, x, 10)
    assert estimate.dtype == torch.float32
    torch.testing.assert_close(
        estimate, exact_lambda(DIAGONAL, scheduler, x.double(), 10).float(), rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": 0}, "probes must be a positive integer, got 0"),
        ({"probes": True}, "probes must be a positive integer, got True"),
        ({"probes": 1.0}, "probes must be a positive integer, got 1.0"),
        ({"method": "vjp"}, "method must be one of .*, got 'vjp'"),
    ],
)
def test_probes_that_make_no_sense_are_refused(arguments, message):
    scheduler = build(LINEAR)
    model = DIAGONAL.as_model(scheduler)
    with pytest.raises(ValueError, match=message):
        posterior_variance(model, scheduler, states(), 10, **arguments)
    with pytest.raises(ValueError, match=message):
        PosteriorVarianceModel(model, scheduler, **arguments)
    with pytest.raises(ValueError, match="must have the shape of the sample"):
        posterior_variance(lambda x, t: x[:, :2], scheduler, states(), 10)


# ---- the network with two heads -------------------------------------------------------------------------------------


def channels(law_values):
    """A value per coordinate as a value per channel of images (B, 4, 2, 2)."""
    return torch.tensor(law_values, dtype=torch.float64).reshape(4, 1, 1).expand(4, 2, 2)


IMAGES = Gaussian(channels(MEANS), variance=channels(VARIANCES))


def law_of_step(scheduler, output, t, x):
    """Mean and standard deviation of a step, read off two of them whose noise is known."""
    z = [draw(*x.shape, seed=seed) for seed in (1, 2)]
    y = [scheduler.step(output, t, x, generator=seeded(seed)).prev_sample for seed in (1, 2)]
    std = (y[0] - y[1]) / (z[0] - z[1])
    return y[0] - std * z[0], std


@pytest.mark.parametrize("method", ["jvp", "finite_difference"])
@pytest.mark.parametrize("N", [1, 2, 5, 20])
@pytest.mark.parametrize("config", [LINEAR, {**COSINE, "prediction_type": "v_prediction"}, LADDER, FLOW])
def test_posterior_variance_samples_gaussian_data_of_unequal_variances_exactly_in_any_number_of_steps(
    config, N, method
):
    scheduler = build(config, variance_type="posterior", last_step_noise=True)
    model = PosteriorVarianceModel(IMAGES.as_model(scheduler), scheduler, method=method)
    scheduler.set_timesteps(timesteps=np.linspace(T - 1, 2, N).astype(int))  # the last level of a flow has no signal
    alpha, sigma = (float(c) for c in scheduler.signal_and_noise(scheduler.timesteps[0]))
    exact_mean, exact_variance = channels(MEANS), channels(VARIANCES)
    mean, variance = alpha * exact_mean, alpha**2 * exact_variance + sigma**2
    x = torch.stack([torch.zeros(4, 2, 2), torch.ones(4, 2, 2)]).double()
    for t in scheduler.timesteps:
        (offset, end), std = law_of_step(scheduler, model(x, t).sample, t, x)
        slope = end - offset
        mean, variance = offset + slope * mean, slope**2 * variance + std[0] ** 2
    torch.testing.assert_close(mean, exact_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance, exact_variance, rtol=1e-6, atol=1e-6)


def test_the_first_half_is_the_prediction_and_the_second_the_estimate():
    scheduler, x = build(LINEAR), draw(3, 4, 2, 2)
    network = IMAGES.as_model(scheduler)
    for options in ({"probes": 2}, {"generator": seeded(3)}, {"method": "finite_difference"}):
        model = PosteriorVarianceModel(network, scheduler, **options)
        if "generator" in options:
            options = {"generator": seeded(3)}
        output = model(x, torch.tensor(10))
        assert torch.equal(output.sample[:, :4], network(x, 10).sample)
        assert torch.equal(output.sample[:, 4:], posterior_variance(network, scheduler, x, 10, **options))
    assert isinstance(model(x, 10, return_dict=False), tuple)
    assert torch.equal(model(x, 10, return_dict=False)[0], output.sample)


class Recorder(torch.nn.Module):
    """A network of two heads that remembers how it was called."""

    name = "recorder"

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))
        self.calls = []

    def forward(self, sample, timestep, *args, **kwargs):
        self.calls.append((int(timestep), args, kwargs))
        return torch.cat([self.scale * sample, 7 + sample], dim=1)


def test_the_wrapper_hands_on_its_arguments_and_replaces_a_learned_variance():
    network, scheduler = Recorder(), build(LINEAR)
    model = PosteriorVarianceModel(network, scheduler)
    x = draw(2, 3, 4).bfloat16()
    output = model(x, 10, "text", class_labels="cat").sample
    assert network.calls == [(10, ("text",), {"class_labels": "cat"})]
    assert output.shape == (2, 6, 4) and output.dtype == torch.bfloat16 and not output.requires_grad
    sigma = float(scheduler.signal_and_noise(10)[1])
    torch.testing.assert_close(output[:, 3:].float(), torch.full((2, 3, 4), 1 - sigma), rtol=0.02, atol=0.01)
    posterior_variance(network, scheduler, x, 11, class_labels="dog")
    assert network.calls[-1] == (11, (), {"class_labels": "dog"})


@pytest.mark.parametrize(("method", "calls"), [("jvp", 3), ("finite_difference", 7)])
def test_three_probes_cost_the_calls_that_are_stated(method, calls):
    network = Recorder()
    PosteriorVarianceModel(network, build(LINEAR), probes=3, method=method)(draw(2, 3, 4), 10)
    assert len(network.calls) == calls


def test_other_attributes_of_the_wrapper_are_those_of_the_network():
    unet = tiny_unet()
    model = PosteriorVarianceModel(unet, build(LINEAR))
    assert model.config is unet.config and model.dtype is unet.dtype and model.model is unet
    assert {name for name, _ in model.named_parameters()} == {f"model.{n}" for n, _ in unet.named_parameters()}
    assert copy.deepcopy(model).config.in_channels == 2
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = model.nothing


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 2.5])
def test_a_pipeline_samples_with_the_posterior_variance_of_its_network(guidance_scale):
    unet = tiny_unet(num_class_embeds=3)
    scheduler = build(LINEAR, variance_type="posterior", timestep_spacing="trailing", last_step_noise=True)
    pipeline = GuidedDiffusionPipeline(unet, scheduler, null_label=2)
    pipeline.unet = PosteriorVarianceModel(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    latents = draw(2, 2, 8, 8).float()
    images = pipeline(
        class_labels=[0, 1],
        guidance_scale=guidance_scale,
        num_inference_steps=3,
        latents=latents,
        generator=seeded(1),
        output_type="latent",
    ).images

    by_hand = copy.deepcopy(scheduler)
    by_hand.set_timesteps(3)
    x, generator = latents, seeded(1)
    labels, null = torch.tensor([0, 1]), torch.tensor([2, 2])
    for t in by_hand.timesteps:
        with torch.no_grad():
            conditional = unet(x, t, class_labels=labels).sample
            unconditional = unet(x, t, class_labels=null).sample
        prediction = unconditional + guidance_scale * (conditional - unconditional)
        asked = null if guidance_scale == 0 else labels
        variance = posterior_variance(unet, by_hand, x, t, class_labels=asked)
        x = by_hand.step(torch.cat([prediction, variance], dim=1), t, x, generator=generator).prev_sample
    torch.testing.assert_close(images, x, rtol=1e-4, atol=1e-4)


def test_the_examples_of_the_docstrings_run():
    results = doctest.testmod(calibration)
    assert results.attempted > 8 and results.failed == 0
