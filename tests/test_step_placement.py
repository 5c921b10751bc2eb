r"""The timesteps that cost least on the variational bound.

Oracles: every one of the few schedules that a short chain has, and the Kullback-Leibler divergence between the true
posterior and the model's step, both Gaussian of one variance, averaged over data in closed form:

    KL = c^2 |x_0 - x̂_0|^2 / (2 beta~),        c the weight of x_0 in the mean of the posterior
"""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal, kl_divergence

from annealers import DDPMAncestralScheduler
from annealers.exact import Gaussian
from annealers.schedulers.step_placement import optimal_timesteps, step_costs

T = 9
LADDER = {"beta_schedule": "geometric", "sigma_min": 0.02, "sigma_max": 40.0}
FLOW = {"prediction_type": "flow_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
BETAS = {"trained_betas": np.linspace(0.01, 0.6, T).tolist()}
PATHS = [BETAS, {"beta_schedule": "squaredcos_cap_v2"}, LADDER, BETAS | ZERO_SNR, FLOW]
ERRORS = {
    "Gaussian data": lambda alpha, sigma: sigma**2 * 0.3 / (alpha**2 * 0.3 + sigma**2),
    "any": lambda alpha, sigma: np.random.default_rng(0).uniform(0.1, 1.0, len(alpha)),
}


def build(path, **config):
    return DDPMAncestralScheduler(**{"num_train_timesteps": T, "clip_sample": False} | path | config)


def table(scheduler):
    return scheduler.signal_and_noise(torch.from_numpy(scheduler.train_timesteps))


@pytest.mark.parametrize("path", PATHS)
def test_the_cost_of_a_step_is_the_divergence_of_its_law_from_the_true_posterior(path):
    scheduler, generator = build(path), torch.Generator().manual_seed(0)
    alpha, sigma = table(scheduler)
    x_0, x_t, errors = (torch.randn(T, generator=generator, dtype=torch.float64) for _ in range(3))
    costs = step_costs(alpha, sigma, (errors**2).numpy())
    first = int(scheduler.train_timesteps[0])
    for t, s in itertools.combinations(reversed(range(T)), 2):
        levels = torch.tensor([t + first]), torch.tensor([s + first])
        laws = []
        for data in (x_0[t], x_0[t] + errors[t]):  # the data, and what the network takes for it
            mean, variance = scheduler.posterior(data.reshape(1), x_t[t].reshape(1), *levels)
            laws.append(Normal(mean, variance.sqrt()))
        torch.testing.assert_close(torch.tensor([costs[t, s]]), kl_divergence(*laws), rtol=1e-8, atol=1e-12)


def test_a_step_that_does_not_lead_to_the_data_has_no_price():
    costs = step_costs(*table(build(BETAS)), np.ones(T))
    assert np.isinf(costs[np.triu_indices(T)]).all()
    assert np.isfinite(costs[np.tril_indices(T, -1)]).all()


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("path", PATHS)
def test_no_schedule_is_cheaper(path, error):
    alpha, sigma = table(build(path))
    denoising_error = ERRORS[error](alpha.numpy(), sigma.numpy())
    snr = (alpha / sigma).numpy() ** 2

    def price(schedule):
        return sum(0.5 * (snr[s] - snr[t]) * denoising_error[t] for t, s in itertools.pairwise(schedule))

    for N in range(2, T + 1):
        schedules = [(T - 1, *middle[::-1], 0) for middle in itertools.combinations(range(1, T - 1), N - 2)]
        timesteps = optimal_timesteps(alpha, sigma, denoising_error, N)
        assert tuple(timesteps) in schedules
        assert price(timesteps) == pytest.approx(min(price(schedule) for schedule in schedules), rel=1e-12)


def test_a_single_step_starts_at_the_noise_and_a_chain_of_one_level_has_one():
    alpha, sigma = table(build(BETAS))
    assert optimal_timesteps(alpha, sigma, np.ones(T), 1).tolist() == [T - 1]
    assert optimal_timesteps(alpha[:1], sigma[:1], np.ones(1), 1).tolist() == [0]


def test_steps_go_where_the_network_errs():
    # an error in one place only: the jump leaves it at once, with a step to the next level
    alpha, sigma = table(build(BETAS))
    error = np.full(T, 1e-9)
    error[5] = 1.0
    assert 5 not in optimal_timesteps(alpha, sigma, error, 4)
    forced = optimal_timesteps(alpha[:6], sigma[:6], error[:6], 3)  # where the chain starts in that place
    assert forced.tolist() == [5, 4, 0]


# ---- in a scheduler -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_optimal_spacing_visits_these_timesteps(path):
    alpha, sigma = table(build(path))
    error = ERRORS["any"](alpha, sigma)
    scheduler = build(path, timestep_spacing="optimal", denoising_error=error.tolist())
    first = 1 if path is FLOW else 0
    for N in (1, 2, 4, T):
        scheduler.set_timesteps(N)
        assert scheduler.timesteps.tolist() == (optimal_timesteps(alpha, sigma, error, N) + first).tolist()
    assert scheduler.timesteps.tolist() == list(range(T))[::-1] if path is not FLOW else list(range(1, T + 1))[::-1]


def test_optimal_spacing_survives_saving_and_other_schedulers(tmp_path):
    error = np.linspace(0.02, 0.9, T).tolist()
    scheduler = build(BETAS, timestep_spacing="optimal", denoising_error=error)
    scheduler.set_timesteps(4)
    scheduler.save_pretrained(tmp_path)
    loaded = DDPMAncestralScheduler.from_pretrained(tmp_path)
    copies = [
        loaded,
        DDPMAncestralScheduler.from_config(scheduler.config),
        DDPMAncestralScheduler.from_config(loaded.config),
        DDPMAncestralScheduler.from_config(
            DDIMScheduler.from_config(scheduler.config, timestep_spacing="leading").config, timestep_spacing="optimal"
        ),
        DDPMAncestralScheduler.from_config(
            build(BETAS).config, timestep_spacing="optimal", denoising_error=np.array(error)
        ),
    ]
    for each in copies:
        assert np.asarray(each.config.denoising_error).tolist() == error
        each.set_timesteps(4)
        assert each.timesteps.tolist() == scheduler.timesteps.tolist()


def test_optimal_spacing_without_an_error_says_how_to_get_one():
    scheduler = build(BETAS, timestep_spacing="optimal")
    with pytest.raises(ValueError, match="needs the measured denoising error .*: call .*calibrate_spacing first"):
        scheduler.set_timesteps(4)
    scheduler.set_timesteps(timesteps=[8, 3, 0])  # explicit ones need none
    assert scheduler.timesteps.tolist() == [8, 3, 0]


@pytest.mark.parametrize("path", [BETAS, FLOW])
def test_an_error_of_another_length_is_refused(path):
    with pytest.raises(ValueError, match="denoising_error needs one value per train timestep, 9, got 8"):
        build(path, denoising_error=[0.5] * (T - 1))


def test_the_bound_of_the_optimal_schedule_is_the_lowest_with_the_exact_model():
    # end to end: the bound of a schedule from the laws of the scheduler's own steps, for Gaussian data
    law = Gaussian(0.0, variance=0.3)
    config = {"num_train_timesteps": 40, "beta_schedule": "squaredcos_cap_v2"}
    probe = build({}, **config)
    alpha, sigma = (c.numpy() for c in table(probe))
    error = ERRORS["Gaussian data"](alpha, sigma)

    def bound(spacing):
        scheduler = build({}, **config, timestep_spacing=spacing, denoising_error=error.tolist())
        scheduler.set_timesteps(6)
        total = 0.0
        for t, s in itertools.pairwise(scheduler.timesteps):
            a, b = (float(c) for c in scheduler.signal_and_noise(t))
            # x_0 - x̂_0 is affine in x_0 and the noise, so its mean square is that of x_0, noise = +-1 sigma
            squared = []
            for data, noise in itertools.product((-(0.3**0.5), 0.3**0.5), (-1.0, 1.0)):
                x_t = torch.tensor([[a * data + b * noise]], dtype=torch.float64)
                output = law.as_model(scheduler)(x_t, t).sample
                mean, log_variance, _ = scheduler.reverse_law(output, x_t, t.reshape(1), s.reshape(1))
                true_mean, variance = scheduler.posterior(torch.full_like(x_t, data), x_t, t.reshape(1), s.reshape(1))
                torch.testing.assert_close(log_variance.exp(), variance)
                squared.append(float((mean - true_mean) ** 2 / (2 * variance)))
            total += np.mean(squared)
        return total

    best = bound("optimal")
    assert all(best < bound(spacing) for spacing in ("linspace", "karras", "geometric"))
