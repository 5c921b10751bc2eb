r"""Losses and bounds against closed forms: torch.distributions, high-precision quadrature and Gaussian algebra.

Expectations over noise are exact, not sampled: what is averaged is a quadratic in eps, and the two-point rule
eps = -1, +1 integrates quadratics of a standard normal exactly; other integrands get Gauss-Hermite nodes.
"""

import math

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from annealers import DDPMAncestralScheduler
from annealers.exact import FiniteData, Gaussian
from annealers.losses import (
    discretized_gaussian_log_likelihood,
    hybrid_loss,
    mean_flat,
    min_snr_weight,
    normal_kl,
    prior_bound_term,
    simple_loss,
    variational_bound_term,
)

PREDICTION_TYPES = ["epsilon", "sample", "v_prediction", "score"]
PATHS = [
    {"beta_schedule": "linear", "beta_end": 0.3, "num_train_timesteps": 50},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
    {"beta_schedule": "geometric", "sigma_min": 0.02, "sigma_max": 40.0, "num_train_timesteps": 50},
]
SHAPES = [(6,), (6, 3), (6, 2, 4, 4)]  # the first axis is the batch
CHAIN = {"num_train_timesteps": 7, "beta_start": 0.05, "beta_end": 0.6}
M, S = 0.3, 0.25  # mean and variance of the Gaussian data


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def eight_bit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator).double() / 127.5 - 1


def bits(nats):
    return nats / math.log(2)


# ---- the simple loss and its weight ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_simple_loss_is_the_mean_squared_error_of_each_sample(shape):
    a, b = draw(*shape, seed=1), draw(*shape, seed=2)
    expected = [np.mean((a[i].numpy() - b[i].numpy()) ** 2) for i in range(6)]
    assert simple_loss(a, b).tolist() == pytest.approx(expected)
    assert mean_flat(a).tolist() == pytest.approx([a[i].mean().item() for i in range(6)])
    assert mean_flat(a[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_and_averaged_in_float32(dtype):
    a, b = torch.full((2, 4096), 300.0, dtype=dtype), torch.zeros(2, 4096)
    loss = simple_loss(a, b.to(dtype))
    assert loss.dtype == torch.float32 and loss.tolist() == [90_000.0, 90_000.0]  # beyond the range of float16
    assert mean_flat(torch.full((1, 4096), 0.1, dtype=dtype)).dtype == torch.float32


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"\(6, 1\) and \(6, 3\)"):
        simple_loss(torch.zeros(6, 1), torch.zeros(6, 3))


def snr(scheduler, timesteps):
    alpha, sigma = scheduler.signal_and_noise(timesteps)
    return (alpha / sigma) ** 2


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path["beta_schedule"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("gamma", [0.1, 5.0])
def test_min_snr_weights_make_every_prediction_the_same_loss_on_the_data(path, prediction_type, gamma):
    scheduler = DDPMAncestralScheduler(prediction_type=prediction_type, **path)
    timesteps = torch.arange(50)
    x_0, noise, prediction = draw(50, 3, 4, seed=1), draw(50, 3, 4, seed=2), draw(50, 3, 4, seed=3)
    x_t = scheduler.add_noise(x_0, noise, timesteps)
    ratio = snr(scheduler, timesteps)
    assert (ratio < gamma).any() and (ratio > gamma).any()

    weighted = min_snr_weight(ratio, gamma, prediction_type) * simple_loss(
        prediction, scheduler.training_target(x_0, noise, timesteps)
    )
    on_data = simple_loss(scheduler.original_sample(prediction, x_t, timesteps), x_0)
    torch.testing.assert_close(weighted, torch.where(ratio < gamma, ratio, gamma) * on_data, rtol=1e-8, atol=1e-10)


def test_min_snr_weights_at_the_values_of_the_paper():
    """gamma = 5: epsilon min(snr, 5) / snr, v min(snr, 5) / (snr + 1), x_0 min(snr, 5); Hang et al. 2023, Sec. 3.4."""
    ratio = torch.tensor([0.5, 5.0, 20.0])
    assert min_snr_weight(ratio, 5.0, "epsilon").tolist() == pytest.approx([1, 1, 0.25])
    assert min_snr_weight(ratio, 5.0, "v_prediction").tolist() == pytest.approx([1 / 3, 5 / 6, 5 / 21])
    assert min_snr_weight(ratio, 5.0, "sample").tolist() == pytest.approx([0.5, 5, 5])
    assert min_snr_weight(ratio, 5.0, "score").tolist() == pytest.approx([2 / 3, 1 / 6, 0.25 / 21])


@pytest.mark.parametrize(
    ("prediction_type", "weight"), [("epsilon", 1), ("sample", 0), ("v_prediction", 0), ("score", 1)]
)
def test_min_snr_weights_have_their_limits_where_there_is_no_signal_and_no_noise(prediction_type, weight):
    assert min_snr_weight(torch.tensor([0.0]), 5.0, prediction_type).item() == weight
    assert min_snr_weight(torch.tensor([torch.inf]), 5.0, prediction_type).isfinite().all()


def test_min_snr_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="gamma > 0, got 0"):
        min_snr_weight(torch.ones(1), 0, "epsilon")
    with pytest.raises(ValueError, match="'flow'"):
        min_snr_weight(torch.ones(1), 5.0, "flow")


# ---- the parts of the bound -----------------------------------------------------------------------------------------


def test_normal_kl_is_that_of_torch_distributions():
    mean_1, mean_2, log_variance_1, log_variance_2 = (3 * draw(1000, seed=seed) for seed in range(4))
    p, q = Normal(mean_1, (log_variance_1 / 2).exp()), Normal(mean_2, (log_variance_2 / 2).exp())
    torch.testing.assert_close(normal_kl(mean_1, log_variance_1, mean_2, log_variance_2), kl_divergence(p, q))
    assert (normal_kl(mean_1, log_variance_1, mean_1, log_variance_1) == 0).all()


GRID = torch.arange(256, dtype=torch.float64) / 127.5 - 1


@pytest.mark.parametrize("bins", [2, 16, 256])
@pytest.mark.parametrize("mean", [-40.0, -3.0, -1.0, -0.4, 0.0, 0.123, 1.0, 2.5, 40.0])
@pytest.mark.parametrize("log_scale", [-8.0, -5.0, -2.0, 0.0, 3.0])
def test_the_bins_share_a_total_probability_of_one(bins, mean, log_scale):
    grid = torch.linspace(-1, 1, bins, dtype=torch.float64)
    log_scale = torch.tensor(log_scale, dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        logs = discretized_gaussian_log_likelihood(grid.to(dtype), torch.tensor(mean, dtype=dtype), log_scale, bins)
        assert logs.isfinite().all() and (logs <= tolerance).all()
        assert logs.double().logsumexp(0).item() == pytest.approx(0, abs=tolerance)


def high_precision_bin(level, mean, scale):
    """log P(bin) and its derivatives by mean and log scale, in 200 digits."""
    with mpmath.workdps(200):
        x, mean, scale = (mpmath.mpf(value) for value in (level, mean, scale))
        half = mpmath.mpf(1) / 255
        upper, lower = (x - mean + half) / scale, (x - mean - half) / scale
        if level == 1.0:
            upper = mpmath.inf
        if level == -1.0:
            lower = -mpmath.inf
        # in the lower tail, where the difference keeps its digits
        tails = (upper, lower) if upper + lower < 0 else (-lower, -upper)
        probability = mpmath.ncdf(tails[0]) - mpmath.ncdf(tails[1])
        density = [mpmath.npdf(end) for end in (upper, lower)]
        moment = [end * mpmath.npdf(end) if mpmath.isfinite(end) else mpmath.mpf(0) for end in (upper, lower)]
        by_mean = -(density[0] - density[1]) / scale / probability
        by_log_scale = -(moment[0] - moment[1]) / probability
        return float(mpmath.log(probability)), float(by_mean), float(by_log_scale)


@pytest.mark.parametrize("level", [0, 1, 60, 127, 200, 254, 255])
@pytest.mark.parametrize("mean", [-1.0, -0.3, 0.0041, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01, 0.03])
def test_a_bin_and_its_gradient_are_exact_in_the_tails(level, mean, scale):
    x = GRID[level]
    expected = high_precision_bin(x.item(), mean, scale)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        mean_ = torch.tensor(mean, dtype=dtype, requires_grad=True)
        log_scale = torch.tensor(math.log(scale), dtype=dtype, requires_grad=True)
        value = discretized_gaussian_log_likelihood(x.to(dtype), mean_, log_scale)
        value.backward()
        found = (value.item(), mean_.grad.item(), log_scale.grad.item())
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_likelihood_and_its_gradient_stay_finite_for_absurd_networks(dtype):
    means = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4], dtype=dtype)
    log_scales = torch.tensor([-12.0, -4.0, 0.0, 10.0, 50.0], dtype=dtype)
    mean, log_scale, x = (t.clone() for t in torch.broadcast_tensors(means[:, None, None], log_scales[:, None], GRID))
    mean.requires_grad_(), log_scale.requires_grad_()
    values = discretized_gaussian_log_likelihood(x.to(dtype), mean, log_scale)
    values.sum().backward()
    assert values.isfinite().all() and mean.grad.isfinite().all() and log_scale.grad.isfinite().all()


def test_half_precision_networks_are_judged_in_float32():
    x, mean, log_scale = torch.tensor([[-1.0, 0.5, 1.0], [0.1, 0.2, 0.3], [-3.0, -2.0, -1.0]]).bfloat16()
    value = discretized_gaussian_log_likelihood(x, mean, log_scale)
    assert torch.equal(value, discretized_gaussian_log_likelihood(x.float(), mean.float(), log_scale.float()))


# ---- the bound ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_model_that_knows_the_data_pays_nothing_above_the_last_step(shape):
    """With x̂_0 = x_0 and the posterior's variance, p is q."""
    scheduler = DDPMAncestralScheduler(prediction_type="sample", num_train_timesteps=50, clip_sample=False)
    x_0, timesteps = eight_bit(*shape), torch.tensor([1, 2, 10, 20, 30, 49])
    x_t = scheduler.add_noise(x_0, draw(*shape), timesteps)
    terms = variational_bound_term(scheduler, x_0, x_0, x_t, timesteps)
    assert terms.shape == (6,)
    torch.testing.assert_close(terms, torch.zeros_like(terms), rtol=0, atol=1e-9)


def test_the_larger_variance_costs_its_divergence_from_the_posteriors():
    """KL(N(mu, b~) || N(mu, b)) = (r - 1 - ln r) / 2 with r = b~ / b = (1 - abar_{t-1}) / (1 - abar_t)."""
    scheduler = DDPMAncestralScheduler(prediction_type="sample", variance_type="fixed_large", **CHAIN)
    abar = (1 - np.linspace(0.05, 0.6, 7)).cumprod()
    r = (1 - abar[:-1]) / (1 - abar[1:])
    x_0 = eight_bit(6, 3)
    terms = variational_bound_term(scheduler, x_0, x_0, draw(6, 3), torch.arange(1, 7))
    torch.testing.assert_close(terms, torch.from_numpy(bits((r - 1 - np.log(r)) / 2)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_last_step_is_the_probability_of_the_bin_around_the_prediction(prediction_type):
    """L_0 = -log P(bin of x_0) under N(x̂_0, b~_2), the variance that Nichol & Dhariwal 2021 put for b~_1 = 0."""
    scheduler = DDPMAncestralScheduler(prediction_type=prediction_type, **CHAIN)
    betas = np.linspace(0.05, 0.6, 7)
    scale = math.sqrt(betas[1] * betas[0] / (1 - (1 - betas[0]) * (1 - betas[1])))
    x_0, output = eight_bit(6, 40), draw(6, 40, seed=3)
    timesteps = torch.zeros(6, dtype=torch.long)
    x_t = scheduler.add_noise(x_0, draw(6, 40, seed=4), timesteps)
    terms = variational_bound_term(scheduler, output, x_0, x_t, timesteps)

    alpha, sigma = math.sqrt(1 - betas[0]), math.sqrt(betas[0])
    prediction = {
        "epsilon": (x_t - sigma * output) / alpha,
        "sample": output,
        "v_prediction": alpha * x_t - sigma * output,
        "score": (x_t + sigma**2 * output) / alpha,
    }[prediction_type].numpy()
    low = np.where(x_0 == -1, -np.inf, x_0 - 1 / 255)
    high = np.where(x_0 == 1, np.inf, x_0 + 1 / 255)
    law = scipy.stats.norm(prediction, scale)
    # of P(low, high), the difference on the side of the mean where nothing cancels
    probability = np.where(x_0.numpy() > prediction, law.sf(low) - law.sf(high), law.cdf(high) - law.cdf(low))
    expected = -np.log2(probability).mean(axis=1)
    np.testing.assert_allclose(terms.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_the_terms_above_the_last_step_add_up_to_the_divergence_of_two_whole_chains(variance_type):
    """L_T + sum_{t >= 2} L_{t-1} = KL(q(x_1 .. x_T | x_0) || p(x_1 .. x_T)), two normal laws on T coordinates.

    The chains are built from the betas alone: q by its covariances, p by walking an affine reverse chain down from
    N(0, 1). The network's x̂_0 is the exact one of N(M, S), and that of another law, for the sum is right for any.
    """
    T, betas = 7, torch.linspace(0.05, 0.6, 7, dtype=torch.float64)
    scheduler = DDPMAncestralScheduler(prediction_type="sample", variance_type=variance_type, **CHAIN)
    abar = (1 - betas).cumprod(0)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    log_variances = torch.linspace(-3, 0.5, T, dtype=torch.float64)  # what "learned" says at each t
    fractions = torch.linspace(0.1, 0.9, T, dtype=torch.float64)

    for variance_of_law in (S, 4 * S):
        gain = alpha * variance_of_law / (alpha**2 * variance_of_law + sigma**2)
        offset = M - gain * alpha * M  # x̂_0 = gain x_t + offset

        # p, from the top: x_{t-1} = A x_t + b + N(0, v). Coordinates 0 .. T - 1 stand for t = 1 .. T.
        mean, covariance = torch.zeros(T, dtype=torch.float64), torch.zeros(T, T, dtype=torch.float64)
        covariance[T - 1, T - 1] = 1
        values = torch.zeros(T, dtype=torch.float64)
        for t in range(T - 1, 0, -1):
            small = betas[t] * (1 - abar[t - 1]) / (1 - abar[t])
            v, values[t] = {
                "fixed_small": (small, 0),
                "fixed_large": (betas[t], 0),
                "learned": (log_variances[t].exp(), log_variances[t]),
                "learned_range": (betas[t] ** fractions[t] * small ** (1 - fractions[t]), 2 * fractions[t] - 1),
            }[variance_type]
            on_x_0 = abar[t - 1].sqrt() * betas[t] / (1 - abar[t])
            on_x_t = (1 - betas[t]).sqrt() * (1 - abar[t - 1]) / (1 - abar[t])
            A, b = on_x_t + on_x_0 * gain[t], on_x_0 * offset[t]
            mean[t - 1] = A * mean[t] + b
            covariance[t - 1, t:] = A * covariance[t, t:]
            covariance[t:, t - 1] = covariance[t - 1, t:]
            covariance[t - 1, t - 1] = A**2 * covariance[t, t] + v
        p = MultivariateNormal(mean, covariance)

        for x_0 in (-0.8, 0.1, 0.9):
            later = torch.maximum(torch.arange(T)[:, None], torch.arange(T))
            earlier = torch.minimum(torch.arange(T)[:, None], torch.arange(T))
            q = MultivariateNormal(alpha * x_0, alpha[later] / alpha[earlier] * sigma[earlier] ** 2)

            data = torch.full((2 * (T - 1), 1), x_0, dtype=torch.float64)
            timesteps, eps = torch.arange(1, T).repeat(2), torch.tensor([-1.0, 1.0]).repeat_interleave(T - 1).double()
            x_t = scheduler.add_noise(data, eps[:, None], timesteps)
            output = gain[timesteps][:, None] * x_t + offset[timesteps][:, None]
            if variance_type.startswith("learned"):
                output = torch.cat([output, values[timesteps][:, None]], dim=1)
            terms = variational_bound_term(scheduler, output, data, x_t, timesteps)
            total = terms.sum() / 2 + prior_bound_term(scheduler, data[:1]).sum()
            assert total.item() == pytest.approx(bits(kl_divergence(q, p).item()), rel=2e-6)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_the_bound_lies_above_the_entropy_of_the_data_and_close_to_it(beta_schedule):
    """Four equally likely grey levels have 2 bits; the ideal denoiser pays little more than the decoder's width."""
    levels = GRID[[10, 60, 61, 240]]
    scheduler = DDPMAncestralScheduler(beta_schedule=beta_schedule, prediction_type="sample", num_train_timesteps=400)
    nodes, weights = np.polynomial.hermite_e.hermegauss(48)
    eps, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    x_0, timesteps, noise = torch.meshgrid(levels, torch.arange(400.0).double(), eps, indexing="ij")
    x_0, timesteps, noise = x_0.reshape(-1, 1), timesteps.reshape(-1).long(), noise.reshape(-1, 1)
    x_t = scheduler.add_noise(x_0, noise, timesteps)
    alpha, sigma = scheduler.signal_and_noise(timesteps)
    ideal = FiniteData(levels[:, None]).denoise(x_t, alpha, sigma)

    def bound(prediction):
        terms = variational_bound_term(scheduler, prediction, x_0, x_t, timesteps).reshape(4, 400, 48) @ weights
        return (terms.sum(dim=1) + prior_bound_term(scheduler, levels[:, None])).mean().item()

    tight = bound(ideal)
    assert 2 < tight < 3.1
    assert bound(ideal + 0.01) > tight + 0.01 and bound(0.99 * ideal) > tight  # the ideal denoiser is the best


def test_the_prior_term_is_the_divergence_of_the_last_level_from_unit_noise():
    scheduler = DDPMAncestralScheduler(**CHAIN)
    abar = np.prod(1 - np.linspace(0.05, 0.6, 7))
    x_0 = eight_bit(5, 2, 3)
    nats = 0.5 * (abar * x_0**2 + (1 - abar) - 1 - np.log(1 - abar)).reshape(5, -1).mean(dim=1)
    torch.testing.assert_close(prior_bound_term(scheduler, x_0), bits(nats), rtol=1e-5, atol=0)
    half = x_0.bfloat16()
    assert torch.equal(prior_bound_term(scheduler, half), prior_bound_term(scheduler, half.float()))


def test_nothing_is_left_of_the_data_at_zero_terminal_snr():
    scheduler = DDPMAncestralScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert prior_bound_term(scheduler, eight_bit(3, 4)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_the_ends_of_a_learned_range_are_the_fixed_variances(value):
    fixed = DDPMAncestralScheduler(variance_type={-1.0: "fixed_small", 1.0: "fixed_large"}[value], **CHAIN)
    learned = DDPMAncestralScheduler(variance_type="learned_range", **CHAIN)
    x_0, prediction, timesteps = eight_bit(7, 2, 3), draw(7, 2, 3, seed=1), torch.arange(7)
    x_t = fixed.add_noise(x_0, draw(7, 2, 3, seed=2), timesteps)
    output = torch.cat([prediction, torch.full_like(prediction, value)], dim=1)
    torch.testing.assert_close(
        variational_bound_term(learned, output, x_0, x_t, timesteps),
        variational_bound_term(fixed, prediction, x_0, x_t, timesteps),
    )


def test_the_term_of_a_sample_does_not_depend_on_its_neighbours():
    scheduler = DDPMAncestralScheduler(**CHAIN)
    inputs = draw(7, 2, 3, seed=2), eight_bit(7, 2, 3), draw(7, 2, 3, seed=1), torch.arange(7)
    together = variational_bound_term(scheduler, *inputs)
    alone = [variational_bound_term(scheduler, *(tensor[i : i + 1] for tensor in inputs)) for i in range(7)]
    assert torch.equal(together, torch.cat(alone))


# ---- the hybrid loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_hybrid_loss_trains_the_variance_and_not_the_mean(variance_type, dtype):
    scheduler = DDPMAncestralScheduler(variance_type=variance_type, num_train_timesteps=50)
    x_0, timesteps = eight_bit(50, 3, 4).to(dtype), torch.arange(50)
    x_t = scheduler.add_noise(x_0, draw(50, 3, 4).to(dtype), timesteps)
    output = (0.1 * draw(50, 6, 4, seed=5)).to(dtype).requires_grad_()
    loss = hybrid_loss(scheduler, output, x_0, x_t, timesteps)
    assert loss.shape == (50,) and loss.isfinite().all()
    loss.sum().backward()
    assert (output.grad[:, :3] == 0).all() and (output.grad[:, 3:] != 0).all() and output.grad.isfinite().all()
    bound = variational_bound_term(scheduler, output, x_0, x_t, timesteps)
    torch.testing.assert_close(loss, 50 * bound)  # one uniform t stands for all T terms


def test_the_bound_alone_trains_the_mean_too():
    scheduler = DDPMAncestralScheduler(variance_type="learned_range", **CHAIN)
    output = draw(7, 2).requires_grad_()
    variational_bound_term(scheduler, output, eight_bit(7, 1), draw(7, 1), torch.arange(7)).sum().backward()
    assert (output.grad != 0).all()


def test_the_variance_that_minimises_the_hybrid_loss_is_the_optimal_one():
    """b~ + w^2 E|x_0 - x̂_0|^2, with w the weight of x_0 in the posterior's mean; for data N(M, S) and its ideal x̂_0.

    The expectation over x_0 and eps is exact: the term is a quadratic in both.
    """
    scheduler = DDPMAncestralScheduler(variance_type="learned", prediction_type="sample", **CHAIN)
    betas = torch.linspace(0.05, 0.6, 7, dtype=torch.float64)
    abar, law = (1 - betas).cumprod(0), Gaussian(M, variance=S)
    for t in range(1, 7):
        small = betas[t] * (1 - abar[t - 1]) / (1 - abar[t])
        weight = abar[t - 1].sqrt() * betas[t] / (1 - abar[t])
        remaining = S * (1 - abar[t]) / (abar[t] * S + 1 - abar[t])  # Var[x_0 | x_t]
        optimal = (small + weight**2 * remaining).log()

        signs = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
        x_0, eps, timesteps = M + math.sqrt(S) * signs[:, :1], signs[:, 1:], torch.full((4,), t)
        x_t = scheduler.add_noise(x_0, eps, timesteps)
        ideal = law.denoise(x_t, abar[t].sqrt().item(), (1 - abar[t]).sqrt().item())

        def loss(log_variance):
            output = torch.cat([ideal, log_variance.expand(4, 1)], dim=1)  # noqa: B023 (called in this turn)
            return hybrid_loss(scheduler, output, x_0, x_t, timesteps).mean()  # noqa: B023

        grid = optimal + torch.linspace(-0.5, 0.5, 21, dtype=torch.float64)
        assert torch.stack([loss(value) for value in grid]).argmin() == 10
        parameter = optimal.clone().requires_grad_()
        loss(parameter).backward()
        assert abs(parameter.grad.item()) < 1e-5


def test_a_network_without_variance_channels_is_refused():
    scheduler = DDPMAncestralScheduler(variance_type="learned_range", **CHAIN)
    with pytest.raises(ValueError, match="learned_range"):
        variational_bound_term(scheduler, draw(7, 2), eight_bit(7, 2), draw(7, 2), torch.arange(7))
