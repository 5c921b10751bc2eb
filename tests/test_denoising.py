r"""Properties of denoising by a diffusion model, of denoising again and again, and of the linear denoiser.

Oracles: autograd of the exact log-densities, the closed forms of two stored points on a line, where the denoiser is
a tanh(a x / varsigma^2), and ridge regression and principal components as numpy and scikit-learn compute them.
"""

import doctest
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging
from sklearn.decomposition import PCA

from annealers import AnnealedLangevinScheduler, DDPMAncestralScheduler, attractors, denoising
from annealers.denoising import (
    DenoisingAutoencoder,
    LinearDenoisingAutoencoder,
    attraction_rate,
    denoise,
    iterative_denoising,
)
from annealers.exact import ConditionalExactModel, FiniteData, Gaussian, GaussianMixture, path_point

F64 = torch.float64
LADDER = {"beta_schedule": "geometric", "sigma_min": 0.02, "sigma_max": 40.0}
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction", "score", "flow_prediction"]
MIXTURE = GaussianMixture(
    [0.5, 0.2, 0.3],
    torch.tensor([[-1.0, 0.5], [0.7, 0.7], [0.2, -1.2]], dtype=F64),
    torch.tensor([[[0.05, 0.02], [0.02, 0.1]], [[0.2, 0.0], [0.0, 0.02]], [[0.1, -0.05], [-0.05, 0.1]]], dtype=F64),
)


@pytest.fixture(autouse=True)
def without_progress_bars():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def tweedie(law, x, alpha, sigma):
    """(x + sigma^2 grad log p) / alpha, with the gradient by autograd."""
    state = x.detach().clone().requires_grad_()
    (score,) = torch.autograd.grad(law.log_prob(state, alpha, sigma).sum(), state)
    return (x + sigma**2 * score) / alpha


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- the denoiser in a diffusion model ------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("path", [{}, LADDER], ids=["linear betas", "ladder"])
def test_denoise_is_tweedies_formula_for_each_prediction_type_and_path(prediction_type, path):
    scheduler = DDPMAncestralScheduler(**path, prediction_type=prediction_type)
    x = randn(6, 2, seed=1)
    for t in (1, 300, 700):
        alpha, sigma = (float(c) for c in scheduler.signal_and_noise(torch.tensor(t)))
        close(denoise(MIXTURE.as_model(scheduler), scheduler, x, t), tweedie(MIXTURE, x, alpha, sigma))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_denoise_works_for_schedulers_of_diffusers(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    x = randn(4, 2, seed=2)
    for t in (10, 500, 990):
        alpha_bar = float(scheduler.alphas_cumprod[t])
        expected = tweedie(MIXTURE, x, alpha_bar**0.5, (1 - alpha_bar) ** 0.5)
        close(denoise(MIXTURE.as_model(scheduler), scheduler, x, t), expected)


def test_a_scheduler_that_steps_in_exploding_coordinates_is_given_what_the_network_sees():
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    t, varsigma = scheduler.timesteps[4], float(scheduler.sigmas[4])
    y = randn(3, 2, seed=3) * varsigma
    seen = scheduler.scale_model_input(y, t)
    # its sigmas are interpolated in float32
    close(denoise(MIXTURE.as_model(scheduler), scheduler, seen, t), tweedie(MIXTURE, y, 1.0, varsigma), 1e-4)


def test_a_flow_scheduler_of_diffusers_has_the_data_at_the_end_of_the_straight_line():
    scheduler = FlowMatchEulerDiscreteScheduler()
    x = randn(3, 2, seed=4)
    close(denoise(MIXTURE.as_model(scheduler), scheduler, x, 250.5), tweedie(MIXTURE, x, 0.7495, 0.2505))


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_each_sample_may_have_a_timestep_of_its_own(prediction_type):
    scheduler = DDPMAncestralScheduler(prediction_type=prediction_type)
    model, x, timesteps = MIXTURE.as_model(scheduler), randn(3, 2, seed=5), torch.tensor([3, 400, 800])
    together = denoise(model, scheduler, x, timesteps)
    for i, t in enumerate(timesteps):
        close(together[i : i + 1], denoise(model, scheduler, x[i : i + 1], int(t)))


def test_each_prediction_is_solved_on_paths_on_which_nothing_is_preserved():
    """Neither alpha^2 + sigma^2 nor alpha + sigma is 1."""
    alpha, sigma = torch.tensor([[0.7]], dtype=F64), torch.tensor([[0.5]], dtype=F64)
    x = randn(3, 2, seed=6)
    for prediction_type in PREDICTION_TYPES:
        output = MIXTURE.prediction(prediction_type, x, 0.7, 0.5)
        close(denoising._original(prediction_type, output, x, alpha, sigma), tweedie(MIXTURE, x, 0.7, 0.5))


def test_the_output_may_be_a_tensor_a_tuple_or_an_object_and_have_a_second_half():
    scheduler = DDPMAncestralScheduler()
    law, x = Gaussian(torch.zeros(3, 4, 4, dtype=F64), variance=0.5), randn(2, 3, 4, 4)
    model = law.as_model(scheduler)
    expected = law.denoise(x, *path_point(scheduler, 500))

    def two_headed(sample, timestep):
        return torch.cat([model(sample, timestep).sample, 100 * torch.ones_like(sample)], dim=1)

    outputs = [
        model,
        lambda sample, timestep: model(sample, timestep).sample,
        lambda sample, timestep: model(sample, timestep, return_dict=False),
        two_headed,
    ]
    for network in outputs:
        close(denoise(network, scheduler, x, 500), expected)


def test_what_the_network_needs_besides_is_passed_on():
    scheduler = DDPMAncestralScheduler()
    laws = [Gaussian(-1.0, variance=0.3), Gaussian(2.0, variance=0.1)]
    network, labels, x = ConditionalExactModel(laws, scheduler), torch.tensor([1, 0]), randn(2)
    expected = torch.stack([laws[1].denoise(x[0], 1.0, 0.5), laws[0].denoise(x[1], 1.0, 0.5)])
    autoencoder = DenoisingAutoencoder(network, scheduler, 0.5, class_labels=labels)
    close(autoencoder(x), expected, 0.01)  # the nearest level of the table
    alpha = float(path_point(scheduler, autoencoder.timestep)[0])
    close(denoise(network, scheduler, alpha * x, autoencoder.timestep, class_labels=labels), autoencoder(x))


def test_gradients_reach_the_sample():
    scheduler = DDPMAncestralScheduler()
    x = randn(3, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(denoise(MIXTURE.as_model(scheduler), scheduler, x, 300).sum(), x)
    alpha, sigma = (float(c) for c in path_point(scheduler, 300))
    for row, point in zip(gradient, x.detach(), strict=True):
        slope = torch.autograd.functional.jacobian(lambda y: MIXTURE.denoise(y, alpha, sigma), point)
        close(row, slope.sum(dim=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_returned_in_half(dtype):
    scheduler = DDPMAncestralScheduler(prediction_type="v_prediction")
    x, output = randn(2, 3, 4, 4, seed=7).to(dtype), randn(2, 3, 4, 4, seed=8).to(dtype)
    result = denoise(lambda sample, timestep: output, scheduler, x, 950)
    assert result.dtype == dtype
    alpha, sigma = (float(c) for c in path_point(scheduler, 950))
    assert torch.equal(result, (alpha * x.float() - sigma * output.float()).to(dtype))


def test_what_does_not_fit_is_refused():
    scheduler = DDPMAncestralScheduler()
    model, x = MIXTURE.as_model(scheduler), randn(3, 2)
    with pytest.raises(ValueError, match="one per sample, 3, got 2"):
        denoise(model, scheduler, x, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"shape of the sample, \(3, 2\), or twice its channels, got \(3, 3\)"):
        denoise(lambda sample, timestep: randn(3, 3), scheduler, x, 5)
    with pytest.raises(ValueError, match="timesteps must lie in 0 .. 999, got 1000"):
        denoise(model, scheduler, x, 1000)
    with pytest.raises(ValueError, match="floating-point"):
        denoise(model, scheduler, torch.zeros(3, 2, dtype=torch.long), 5)
    discrete = DDPMScheduler(prediction_type="logits")
    with pytest.raises(ValueError, match="prediction_type must be one of .*, got 'logits'"):
        denoise(lambda sample, timestep: sample, discrete, x, 5)


def test_without_signal_only_some_predictions_tell_the_data():
    for prediction_type, tells in [("epsilon", False), ("score", False), ("sample", True), ("v_prediction", True)]:
        scheduler = DDPMAncestralScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type)
        model, x = MIXTURE.as_model(scheduler), randn(3, 2)
        if tells:
            close(denoise(model, scheduler, x, 999), MIXTURE.denoise(x, 0.0, 1.0))
        else:
            with pytest.raises(ValueError, match="without signal .* does not determine x_0"):
                denoise(model, scheduler, x, 999)


# ---- the denoising autoencoder of a noise level ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMAncestralScheduler(),
        AnnealedLangevinScheduler(50, **LADDER, prediction_type="score"),
        DDPMAncestralScheduler(prediction_type="flow_prediction"),
        DDPMScheduler(prediction_type="v_prediction"),
        FlowMatchEulerDiscreteScheduler(),
    ],
    ids=["linear betas", "ladder", "flow", "of Diffusers", "flow of Diffusers"],
)
def test_the_autoencoder_denoises_in_the_coordinates_of_the_data(scheduler):
    autoencoder = DenoisingAutoencoder(MIXTURE.as_model(scheduler), scheduler, 0.6)
    x = randn(5, 2, seed=9)
    close(autoencoder(x), tweedie(MIXTURE, x, 1.0, autoencoder.noise_level))
    assert autoencoder.noise_level == pytest.approx(0.6, rel=0.1)


def test_the_nearest_level_is_that_in_the_logarithm():
    scheduler = AnnealedLangevinScheduler(3, beta_schedule="geometric", sigma_min=0.01, sigma_max=1.0)
    model = MIXTURE.as_model(scheduler)
    # 0.1 and 1 meet at 0.316, half way between them would be 0.55
    for noise_level, timestep in [(0.01, 0), (0.0316, 0), (0.0317, 1), (0.31, 1), (0.33, 2), (1.0, 2)]:
        assert DenoisingAutoencoder(model, scheduler, noise_level).timestep == timestep
    assert DenoisingAutoencoder(model, scheduler, 0.08).noise_level == pytest.approx(0.1)


def test_a_flow_path_meets_the_noise_level_exactly():
    for scheduler in (FlowMatchEulerDiscreteScheduler(), DDPMAncestralScheduler(prediction_type="flow_prediction")):
        autoencoder = DenoisingAutoencoder(MIXTURE.as_model(scheduler), scheduler, 0.123)
        assert autoencoder.timestep == pytest.approx(1000 * 0.123 / 1.123)
        assert autoencoder.noise_level == pytest.approx(0.123, rel=1e-6)  # the timestep may be told in float32


def test_a_noise_level_off_the_path_is_refused():
    scheduler = DDPMAncestralScheduler(rescale_betas_zero_snr=True, prediction_type="sample")
    model = MIXTURE.as_model(scheduler)
    for noise_level in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="must be positive and finite"):
            DenoisingAutoencoder(model, scheduler, noise_level)
    with pytest.raises(ValueError, match=r"must lie on the path, 0.01 \.\. 1.541e\+04, got 0.005"):
        DenoisingAutoencoder(model, scheduler, 0.005)
    ladder = AnnealedLangevinScheduler(10, **LADDER)
    with pytest.raises(ValueError, match=r"must lie on the path, 0.02 \.\. 40, got 41"):
        DenoisingAutoencoder(MIXTURE.as_model(ladder), ladder, 41.0)


# ---- denoising again and again --------------------------------------------------------------------------------------


def test_a_step_is_gradient_ascent_on_the_log_density_of_the_noisy_data():
    noise_level, step_size, x = 0.4, 0.3, randn(6, 2, seed=11)
    state = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(MIXTURE.log_prob(state, 1.0, noise_level).sum(), state)
    stepped = iterative_denoising(lambda y: MIXTURE.denoise(y, 1.0, noise_level), x, step_size, 1)
    close(stepped, x + step_size * noise_level**2 * score)


def test_each_step_of_an_ideal_denoiser_climbs():
    """A full step too: it maximises a lower bound that touches log p at x, as a step of mean shift does."""
    x = 2 * randn(50, 2, seed=12)
    for step_size in (0.2, 1.0):
        states = iterative_denoising(lambda y: MIXTURE.denoise(y, 1.0, 0.4), x, step_size, 30, return_trajectory=True)
        climbs = MIXTURE.log_prob(states, 1.0, 0.4).diff(dim=0)
        assert (climbs > -1e-12).all() and (climbs[0] > 1e-4).all()


def test_a_step_of_one_puts_the_denoised_in_the_place_of_the_noisy():
    def denoiser(y):
        return MIXTURE.denoise(y, 1.0, 0.4)

    x = randn(4, 2)
    assert torch.equal(iterative_denoising(denoiser, x, 1.0, 3), denoiser(denoiser(denoiser(x))))
    assert torch.equal(iterative_denoising(denoiser, x, 0.3, 0), x)


def test_the_trajectory_has_all_states_the_first_among_them():
    def denoiser(y):
        return MIXTURE.denoise(y, 1.0, 0.4)

    x = randn(4, 2)
    states = iterative_denoising(denoiser, x, 0.25, 5, return_trajectory=True)
    assert states.shape == (6, 4, 2) and torch.equal(states[0], x)
    for before, after in zip(states, states[1:], strict=False):
        close(after, 0.75 * before + 0.25 * denoiser(before))
    assert torch.equal(iterative_denoising(denoiser, x, 0.25, 5), states[-1])


def test_small_steps_add_up_in_half_precision():
    """Each is below the resolution of the state, but together they are the way."""
    x = torch.full((2, 3), 3.0, dtype=torch.bfloat16)
    result = iterative_denoising(torch.zeros_like, x, 1 / 512, 512)
    assert result.dtype == torch.bfloat16
    close(result, torch.full_like(x, 3 * (1 - 1 / 512) ** 512), 0.01)


def test_the_iteration_keeps_no_graph():
    x = randn(2, 2).requires_grad_()
    assert not iterative_denoising(lambda y: MIXTURE.denoise(y, 1.0, 0.4), x, 0.5, 2).requires_grad


def test_settings_of_the_iteration_out_of_range_are_refused():
    for step_size in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"step_size must be in \(0, 1\]"):
            iterative_denoising(torch.zeros_like, randn(2), step_size, 1)
        with pytest.raises(ValueError, match=r"step_size must be in \(0, 1\]"):
            attraction_rate(torch.zeros_like, randn(2), step_size)
    for num_steps in (-1, 2.0, True):
        with pytest.raises(ValueError, match="num_steps must be an integer >= 0"):
            iterative_denoising(torch.zeros_like, randn(2), 0.5, num_steps)
    with pytest.raises(ValueError, match=r"keep the shape \(3, 2\), got \(3,\)"):
        iterative_denoising(lambda x: x.sum(dim=1), randn(3, 2), 0.5, 1)


# ---- attractors of stored data --------------------------------------------------------------------------------------

POINTS = torch.tensor([[0.0, 2.0], [2.0, 1.0], [-1.5, -0.5], [1.0, -2.0], [-2.5, 1.5]], dtype=F64)
STORED = FiniteData(POINTS)


def stored_denoiser(noise_level, law=STORED):
    return lambda x: law.denoise(x, 1.0, noise_level)


def test_with_little_noise_the_nearest_stored_point_is_restored():
    x = 3 * randn(200, 2, seed=13)
    distance = torch.cdist(x, POINTS).sort(dim=1).values
    x = x[distance[:, 1] - distance[:, 0] > 0.2]  # on the borders nothing is near
    end = iterative_denoising(stored_denoiser(0.1), x, 0.5, 60)
    close(end, POINTS[torch.cdist(x, POINTS).argmin(dim=1)], 1e-6)
    assert len(end.round(decimals=3).unique(dim=0)) == len(POINTS)


def test_with_much_noise_the_mean_of_the_data_is_the_only_attractor():
    x = 3 * randn(200, 2, seed=14)
    for noise_level, tolerance in [(30.0, 1e-2), (300.0, 1e-4)]:
        end = iterative_denoising(stored_denoiser(noise_level), x, 1.0, 20)
        assert (end - end[0]).abs().max() < 1e-9
        assert (end - POINTS.mean(dim=0)).abs().max() < tolerance


@pytest.mark.parametrize("step_size", [1.0, 0.4])
@pytest.mark.parametrize("noise_level", [0.45, 0.9])
def test_errors_near_an_attractor_die_out_at_the_closed_form_rate(noise_level, step_size):
    """Of points -1 and 1, DAE(x) = tanh(x / varsigma^2); at its fixed points the slope is (1 - x^2) / varsigma^2."""
    two = FiniteData(torch.tensor([[-1.0], [1.0]], dtype=F64))
    fixed = 1.0
    for _ in range(2000):
        fixed = math.tanh(fixed / noise_level**2)
    rate = 1 - step_size + step_size * (1 - fixed**2) / noise_level**2
    denoiser = stored_denoiser(noise_level, two)
    close(attraction_rate(denoiser, torch.tensor([[fixed]], dtype=F64), step_size), torch.tensor([rate], dtype=F64))
    states = iterative_denoising(denoiser, torch.tensor([[fixed + 1e-5]], dtype=F64), step_size, 3, True)
    errors = (states - fixed).squeeze()
    close(errors[1:] / errors[:-1], torch.full((3,), rate, dtype=F64), 1e-3)


def test_stored_points_become_attractors_where_the_noise_falls_below_their_distance_from_the_middle():
    two = FiniteData(torch.tensor([[-1.0], [1.0]], dtype=F64))
    middle = torch.zeros(1, 1, dtype=F64)
    for noise_level in (0.8, 0.99, 1.01, 1.5):
        rate = float(attraction_rate(stored_denoiser(noise_level, two), middle))
        assert rate == pytest.approx(1 / noise_level**2)  # the middle repels below 1, attracts above
        end = iterative_denoising(stored_denoiser(noise_level, two), torch.tensor([[0.01]], dtype=F64), 1.0, 600)
        assert (float(end) > 0.1) == (noise_level < 1)


def test_the_rate_is_that_of_the_covariance_of_the_stored_points_given_the_state():
    """dDAE/dx = Cov[x_0 | x] / varsigma^2, computed here point by point."""
    x, noise_level, step_size = randn(4, 2, seed=15), 1.3, 0.7
    weights = torch.softmax(-(torch.cdist(x, POINTS) ** 2) / (2 * noise_level**2), dim=1)
    mean = weights @ POINTS
    covariance = torch.einsum("bn,ni,nj->bij", weights, POINTS, POINTS) - torch.einsum("bi,bj->bij", mean, mean)
    largest = torch.linalg.eigvalsh(covariance).amax(dim=1) / noise_level**2
    close(attraction_rate(stored_denoiser(noise_level), x, step_size), 1 - step_size + step_size * largest)


def test_the_rate_is_found_through_a_network_and_events_of_any_shape():
    scheduler = DDPMAncestralScheduler()
    law = Gaussian(torch.zeros(2, 1, 2, dtype=F64), variance=torch.tensor([[[1.0, 0.2]], [[3.0, 0.5]]], dtype=F64))
    autoencoder = DenoisingAutoencoder(law.as_model(scheduler), scheduler, 0.7)
    expected = 3 / (3 + autoencoder.noise_level**2)
    close(attraction_rate(autoencoder, randn(3, 2, 1, 2)), torch.full((3,), expected, dtype=F64))


def test_a_denoiser_that_is_cut_off_from_autograd_has_no_rate_rather_than_zero():
    with pytest.raises(RuntimeError, match="strict mode"):
        attraction_rate(lambda x: x.detach(), randn(2, 2))


# ---- the linear case ------------------------------------------------------------------------------------------------

IMAGES = randn(12, 2, 3, seed=20) * torch.tensor([3.0, 2.0, 1.0], dtype=F64) + 0.5  # (12, 2, 3)
NOISY = 3 * randn(7, 2, 3, seed=21)


def flat(x):
    return x.reshape(len(x), -1)


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 2.0])
def test_the_linear_denoiser_is_the_regression_of_the_data_on_its_noisy_copies(noise_level):
    """The mean over all noise of the squared error is a ridge penalty of N varsigma^2, here as N more rows."""
    centre = flat(IMAGES).mean(dim=0)
    rows = (flat(IMAGES) - centre).numpy()
    penalty = math.sqrt(len(rows)) * noise_level * np.eye(6)
    weights = np.linalg.lstsq(np.concatenate([rows, penalty]), np.concatenate([rows, np.zeros((6, 6))]))[0]
    expected = centre + (flat(NOISY) - centre) @ torch.from_numpy(weights)
    close(flat(LinearDenoisingAutoencoder.from_data(IMAGES, noise_level=noise_level)(NOISY)), expected)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_without_noise_it_is_the_projection_on_the_principal_components(rank):
    linear = LinearDenoisingAutoencoder.from_data(IMAGES, rank=rank)
    principal = PCA(n_components=rank).fit(flat(IMAGES).numpy())
    expected = principal.inverse_transform(principal.transform(flat(NOISY).numpy()))
    close(flat(linear(NOISY)), torch.from_numpy(expected))
    close(linear(linear(NOISY)), linear(NOISY))
    close(linear.directions.T @ linear.directions, torch.eye(rank, dtype=F64))


def test_with_noise_and_few_directions_it_is_the_best_of_that_rank():
    """Its mean squared error over data and noise, in closed form, is below that of perturbed maps of the same rank."""
    noise_level, rank = 0.8, 2
    centred = flat(IMAGES) - flat(IMAGES).mean(dim=0)
    covariance = centred.T @ centred / len(centred)

    def error(weights):
        kept = torch.eye(6, dtype=F64) - weights
        return float((kept @ covariance @ kept.T).trace() + noise_level**2 * (weights @ weights.T).trace())

    linear = LinearDenoisingAutoencoder.from_data(IMAGES, rank, noise_level)
    encode, decode = linear.directions.T, linear.directions * linear.gains
    best = error(decode @ encode)
    for seed in range(20):
        moved = (decode + 0.01 * randn(6, rank, seed=seed)) @ (encode + 0.01 * randn(rank, 6, seed=seed + 100))
        assert error(moved) > best
    swapped = LinearDenoisingAutoencoder.from_data(IMAGES, 3, noise_level)
    columns = swapped.directions[:, [0, 2]]  # a stationary point that is not the best
    assert error(columns * swapped.gains[[0, 2]] @ columns.T) > best


def test_for_a_gaussian_law_it_is_the_exact_denoiser():
    factor = randn(6, 6, seed=22)
    mean, covariance = randn(2, 3, seed=23), factor @ factor.T
    law = Gaussian(mean, covariance=covariance)
    linear = LinearDenoisingAutoencoder.from_covariance(mean, covariance, noise_level=0.9)
    close(linear(NOISY), law.denoise(NOISY, 1.0, 0.9))
    close(linear(NOISY[0]), law.denoise(NOISY[0], 1.0, 0.9))  # without a batch


def test_data_and_their_moments_give_the_same_denoiser():
    centred = flat(IMAGES) - flat(IMAGES).mean(dim=0)
    covariance = centred.T @ centred / len(IMAGES)
    for rank in (None, 2):
        of_moments = LinearDenoisingAutoencoder.from_covariance(IMAGES.mean(dim=0), covariance, rank, 0.4)
        close(LinearDenoisingAutoencoder.from_data(IMAGES, rank, 0.4)(NOISY), of_moments(NOISY))


def test_no_stored_point_attracts_and_their_subspace_stays_where_it_is():
    linear = LinearDenoisingAutoencoder.from_data(IMAGES, rank=3)
    for step_size in (0.3, 1.0):
        rates = attraction_rate(linear, IMAGES, step_size)
        close(rates, torch.ones(12, dtype=F64))
    assert (linear(IMAGES) - IMAGES).flatten(1).norm(dim=1).min() > 0.1  # nor is any of them a fixed point
    along = (randn(5, 3, seed=24) @ linear.directions.T).reshape(5, 2, 3)
    on_subspace = IMAGES.mean(dim=0) + along
    close(iterative_denoising(linear, on_subspace, 0.5, 10), on_subspace)
    # from anywhere else it ends on the subspace, at the nearest point of it and not at a stored one
    close(iterative_denoising(linear, NOISY, 0.5, 60), linear(NOISY))


def test_with_noise_the_mean_is_the_only_attractor_of_a_linear_denoiser():
    linear = LinearDenoisingAutoencoder.from_data(IMAGES, noise_level=0.5)
    variances = torch.linalg.eigvalsh(torch.cov(flat(IMAGES).T, correction=0))
    rate = float(variances.max() / (variances.max() + 0.25))
    close(attraction_rate(linear, NOISY), torch.full((7,), rate, dtype=F64))
    end = iterative_denoising(linear, NOISY, 1.0, 2000)
    close(end, IMAGES.mean(dim=0).expand(7, 2, 3), 1e-6)


def test_directions_that_the_data_do_not_have_are_projected_away():
    flat_data = torch.cat([randn(9, 2, seed=25), torch.full((9, 1), 4.0, dtype=F64)], dim=1)
    x = randn(3, 3, seed=26)
    expected = torch.cat([x[:, :2], torch.full((3, 1), 4.0, dtype=F64)], dim=1)
    close(LinearDenoisingAutoencoder.from_data(flat_data)(x), expected)
    covariance = torch.cov(flat_data.T)
    for seed in range(10):  # turned, so that the zero eigenvalue is one only up to rounding, of either sign
        rotation = torch.linalg.qr(randn(3, 3, seed=seed)).Q
        mean, turned = flat_data.mean(dim=0) @ rotation, rotation.T @ covariance @ rotation
        close(LinearDenoisingAutoencoder.from_covariance(mean, turned)(x @ rotation), expected @ rotation)
    few = LinearDenoisingAutoencoder.from_data(IMAGES[:3])  # three points span a plane
    assert int((few.gains > 0).sum()) == 2
    close(few(IMAGES[:3]), IMAGES[:3])


def test_the_linear_denoiser_keeps_the_dtype_and_takes_any_batch():
    linear = LinearDenoisingAutoencoder.from_data(IMAGES.float(), rank=2, noise_level=0.2)
    for batch in [(), (4,), (2, 3)]:
        x = randn(*batch, 2, 3).half()
        result = linear(x)
        assert result.dtype == torch.float16 and result.shape == x.shape
        close(result.double(), linear(x.double()), 2e-3)
    empty = linear(torch.zeros(0, 2, 3))
    assert empty.shape == (0, 2, 3)


def test_what_does_not_fit_the_linear_denoiser_is_refused():
    mean, directions, variances = torch.zeros(3), torch.eye(3)[:, :2], torch.ones(2)
    with pytest.raises(ValueError, match=r"\(D, k\) and variances \(k,\) with D = 3"):
        LinearDenoisingAutoencoder(mean, torch.eye(2), variances)
    with pytest.raises(ValueError, match="orthonormal"):
        LinearDenoisingAutoencoder(mean, 2 * directions, variances)
    with pytest.raises(ValueError, match="noise_level must not be negative"):
        LinearDenoisingAutoencoder(mean, directions, variances, noise_level=-0.1)
    with pytest.raises(ValueError, match="variances must not be negative, got -1"):
        LinearDenoisingAutoencoder(mean, directions, -variances)
    with pytest.raises(ValueError, match="floating-point"):
        LinearDenoisingAutoencoder(torch.zeros(3, dtype=torch.long), directions, variances)
    with pytest.raises(ValueError, match=r"shape \(\*batch, \*\(3,\)\), got \(3, 4\)"):
        LinearDenoisingAutoencoder(mean, directions, variances)(torch.zeros(3, 4))
    for rank in (-1, 7, 1.0):
        with pytest.raises(ValueError, match="rank must be an integer in 0 .. 6"):
            LinearDenoisingAutoencoder.from_data(IMAGES, rank=rank)
    with pytest.raises(ValueError, match="rank must be an integer in 0 .. 3"):
        LinearDenoisingAutoencoder.from_covariance(mean, torch.eye(3), rank=4)
    with pytest.raises(ValueError, match="floating-point"):
        LinearDenoisingAutoencoder.from_data(torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"covariance must have shape \(3, 3\)"):
        LinearDenoisingAutoencoder.from_covariance(mean, torch.eye(2))


def test_the_examples_in_the_docstrings_are_true():
    for module in (denoising, attractors):
        assert doctest.testmod(module).failed == 0
