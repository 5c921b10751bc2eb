r"""Score matching against closed forms, exact laws, and quadrature that leaves no noise.

Expectations over the data are sums over its points, those over eps and over Gaussian directions are Gauss-Hermite
sums, and those over random signs are sums over all of them.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from annealers import DDPMAncestralScheduler
from annealers.exact import FiniteData, Gaussian
from annealers.losses import min_snr_weight, simple_loss, variational_bound_term
from annealers.score_matching import (
    denoising_score_matching,
    implicit_score_matching,
    prediction_weight,
    score_weight,
    sliced_score_matching,
)

F64 = torch.float64
ALPHA, SIGMA = 0.8, 0.6


def gauss_hermite(nodes, d=1):
    """Points (nodes^d, d) and weights of the standard normal law in d dimensions."""
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    points = torch.tensor(list(itertools.product(z, repeat=d)), dtype=F64)
    weights = torch.tensor(list(itertools.product(w / w.sum(), repeat=d)), dtype=F64).prod(dim=1)
    return points, weights


def all_signs(x):
    """Every Rademacher direction, (2^d, B, *): their mean is the expectation."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=x[0].numel())), dtype=x.dtype)
    return signs.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)


def noisy_points(points, probabilities, nodes):
    """x_t, eps and weights of x_t = alpha x_0 + sigma eps, for x_0 on (N, d) points; all flattened to (N M, ...)."""
    eps, weights = gauss_hermite(nodes, points.shape[1])
    x_t = ALPHA * points[:, None] + SIGMA * eps
    weights = torch.as_tensor(probabilities, dtype=F64)[:, None] * weights
    return x_t.flatten(0, 1), eps.expand_as(x_t).flatten(0, 1), weights.flatten()


def small_network(d, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, 5), nn.Tanh(), nn.Linear(5, d)).double()


POINTS, PROBABILITIES = torch.tensor([[-0.5, 0.3], [0.4, 0.8], [0.1, -0.6]], dtype=F64), [0.2, 0.5, 0.3]
X_T, EPS, WEIGHTS = noisy_points(POINTS, PROBABILITIES, nodes=40)


def mean(losses, weights=WEIGHTS):
    return (weights * losses).sum()


IMPLICIT = {
    "implicit": lambda s, x: implicit_score_matching(s, x),
    "implicit, probes": lambda s, x: implicit_score_matching(s, x, all_signs(x)),
    "sliced": lambda s, x: sliced_score_matching(s, x, all_signs(x), variance_reduced=False),
    "sliced, VR": lambda s, x: sliced_score_matching(s, x, all_signs(x)),
}


# ---- the losses are one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMPLICIT)
@pytest.mark.parametrize("field", ["network", "linear", "exact"])
def test_denoising_is_twice_the_implicit_loss_and_d_over_sigma_squared(name, field):
    s = {
        "network": small_network(2),
        "linear": lambda x: x @ torch.tensor([[-1.0, 0.4], [0.7, -2.0]], dtype=F64) + 0.3,
        "exact": lambda x: FiniteData(POINTS, PROBABILITIES).score(x, ALPHA, SIGMA),
    }[field]
    denoising = mean(denoising_score_matching(s(X_T), EPS, SIGMA))
    implicit = mean(IMPLICIT[name](s, X_T))
    # per dimension: (d / sigma^2) / d
    assert denoising.item() == pytest.approx((2 * implicit + 1 / SIGMA**2).item(), rel=1e-8)


@pytest.mark.parametrize("name", IMPLICIT)
def test_all_losses_have_the_same_gradient_so_they_train_the_same_network(name):
    network = small_network(2)
    losses = [mean(denoising_score_matching(network(X_T), EPS, SIGMA)), 2 * mean(IMPLICIT[name](network, X_T))]
    gradients = [torch.autograd.grad(loss, network.parameters()) for loss in losses]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
        assert (a != 0).any()


@pytest.mark.parametrize("name", IMPLICIT)
def test_gradients_of_parameters_are_those_of_finite_differences(name):
    network, x = small_network(2), X_T[::97]
    IMPLICIT[name](network, x).sum().backward()
    h = 1e-6
    for parameter in network.parameters():
        for i in range(parameter.numel()):
            with torch.no_grad():
                values = []
                for shift in (h, -2 * h, h):
                    parameter.view(-1)[i] += shift
                    values.append(IMPLICIT[name](network, x).sum().item())
            slope = (values[0] - values[1]) / (2 * h)
            assert parameter.grad.view(-1)[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


# ---- minimisers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["denoising", *IMPLICIT])
@pytest.mark.parametrize("d", [1, 2])
def test_the_linear_score_of_a_normal_law_is_learnt_in_closed_form(name, d):
    """For x ~ N(0, v I) and s = a x: E = v a^2 / 2 + a per dimension, smallest at a = -1 / v."""
    v_0 = 0.5
    v = ALPHA**2 * v_0 + SIGMA**2
    z, weights = gauss_hermite(3, 2 * d)  # exact to degree 5
    eps = z[:, d:]
    x = ALPHA * math.sqrt(v_0) * z[:, :d] + SIGMA * eps

    def loss(a):
        if name == "denoising":
            return mean(denoising_score_matching(a * x, eps, SIGMA), weights)
        return mean(IMPLICIT[name](lambda x: a * x, x), weights)

    for a in (-3.0, -1 / v, -0.2, 0.7):
        expected = a**2 * v / 2 + a
        expected = 2 * expected + 1 / SIGMA**2 if name == "denoising" else expected
        assert loss(torch.tensor(a)).item() == pytest.approx(expected, rel=1e-6)
    best = torch.tensor(-1 / v, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(best), best)
    assert abs(slope.item()) < 1e-9


@pytest.mark.parametrize("name", ["denoising", *IMPLICIT])
def test_least_squares_in_a_basis_that_has_the_score_of_a_mixture_finds_it(name):
    """The loss is a quadratic in the coefficients, solved exactly; the basis holds the score among others."""
    points = torch.tensor([[-0.5], [0.8]], dtype=F64)
    law = FiniteData(points, [0.7, 0.3])
    x_t, eps, weights = noisy_points(points, [0.7, 0.3], nodes=80)

    def field(c):
        others = (torch.ones_like, lambda x: x, lambda x: x**3, torch.tanh)
        return lambda x: c[0] * law.score(x, ALPHA, SIGMA) + sum(k * f(x) for k, f in zip(c[1:], others, strict=True))

    def loss(c):
        if name == "denoising":
            return mean(denoising_score_matching(field(c)(x_t), eps, SIGMA), weights)
        return mean(IMPLICIT[name](field(c), x_t), weights)

    def gradient(c):
        c = c.clone().requires_grad_()
        return torch.autograd.grad(loss(c), c)[0]

    at_zero = gradient(torch.zeros(5, dtype=F64))
    hessian = torch.stack([gradient(unit) - at_zero for unit in torch.eye(5, dtype=F64)])
    found = torch.linalg.solve(hessian, -at_zero)
    torch.testing.assert_close(found, torch.tensor([1.0, 0, 0, 0, 0], dtype=F64), rtol=0, atol=1e-7)


# ---- random directions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance_reduced", [True, False])
def test_sliced_losses_have_the_mean_of_the_implicit_one_over_gaussian_directions(variance_reduced):
    """And at each x: E[(v^T s)^2] = |s|^2, E[v^T J v] = tr J."""
    network, x = small_network(2), X_T[::97]
    exact = implicit_score_matching(network, x)
    directions, weights = gauss_hermite(3, 2)  # quadratics in v
    losses = [
        sliced_score_matching(network, x, v.expand_as(x)[None], variance_reduced=variance_reduced) for v in directions
    ]
    torch.testing.assert_close((weights[:, None] * torch.stack(losses)).sum(dim=0), exact)


def test_several_directions_are_averaged():
    network, x = small_network(2), X_T[::97]
    directions = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    for variance_reduced in (True, False):
        alone = [sliced_score_matching(network, x, v[None], variance_reduced) for v in directions]
        together = sliced_score_matching(network, x, directions, variance_reduced)
        torch.testing.assert_close(together, torch.stack(alone).mean(dim=0))


def test_random_signs_have_no_variance_where_the_jacobian_is_diagonal():
    x = X_T[::97]
    exact = implicit_score_matching(lambda x: torch.sin(3 * x), x)
    for v in all_signs(x):
        torch.testing.assert_close(implicit_score_matching(lambda x: torch.sin(3 * x), x, v[None]), exact)
        torch.testing.assert_close(sliced_score_matching(lambda x: torch.sin(3 * x), x, v[None]), exact)


def test_gaussian_directions_have_the_known_variance_and_the_reduced_form_less():
    """Of s = A x: Var[v^T A v] = 2 |sym A|_F^2, to which the plain form adds (v^T s)^2 / 2."""
    A = torch.tensor([[-1.0, 0.4], [0.7, -2.0]], dtype=F64)
    x = torch.tensor([[0.5, -0.3], [1.0, 2.0]], dtype=F64)
    directions, weights = gauss_hermite(5, 2)  # quartics in v

    def variance(variance_reduced):
        losses = torch.stack(
            [sliced_score_matching(lambda x: x @ A.T, x, v.expand_as(x)[None], variance_reduced) for v in directions]
        )
        average = (weights[:, None] * losses).sum(dim=0)
        return (weights[:, None] * (losses - average) ** 2).sum(dim=0)

    symmetric = (A + A.T) / 2
    torch.testing.assert_close(variance(True), (2 * (symmetric**2).sum() / 2**2).expand(2))
    s = x @ A.T
    plain = symmetric + 0.5 * s[:, :, None] * s[:, None, :]
    torch.testing.assert_close(variance(False), 2 * (plain**2).sum((1, 2)) / 2**2)


# ---- shapes and precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3, 3)], ids=str)
def test_losses_are_means_over_the_values_of_each_sample(shape):
    generator = torch.Generator().manual_seed(0)
    score, noise, sigma = (torch.randn(s, generator=generator, dtype=F64) for s in (shape, shape, (4,)))
    sigma = sigma.abs() + 0.1
    expected = [((score[i] + noise[i] / sigma[i]) ** 2).mean().item() for i in range(4)]
    assert denoising_score_matching(score, noise, sigma).tolist() == pytest.approx(expected)
    one = denoising_score_matching(score, noise, 0.5)
    assert one.tolist() == pytest.approx([((score[i] + 2 * noise[i]) ** 2).mean().item() for i in range(4)])

    x = score
    expected = [(0.5 * x[i].sin() ** 2 + x[i].cos()).mean().item() for i in range(4)]
    directions = torch.where(torch.randn(3, *shape, generator=generator, dtype=F64) < 0, -1.0, 1.0)
    assert implicit_score_matching(torch.sin, x).tolist() == pytest.approx(expected)
    assert sliced_score_matching(torch.sin, x, directions).tolist() == pytest.approx(expected)
    plain = sliced_score_matching(torch.sin, x, directions, variance_reduced=False)
    d = x[0].numel()
    projections = [(directions[:, i] * x[i].sin()).reshape(3, -1).sum(dim=1) for i in range(4)]
    expected = [x[i].cos().mean().item() + 0.5 * (projections[i] ** 2).mean().item() / d for i in range(4)]
    assert plain.tolist() == pytest.approx(expected)


def test_half_precision_is_compared_in_float32():
    score, noise = torch.full((1, 4096), 300.0, dtype=torch.float16), torch.zeros(1, 4096, dtype=torch.float16)
    loss = denoising_score_matching(score, noise, 0.01)
    assert loss.dtype == torch.float32 and loss.item() == 90_000  # beyond the range of float16
    x = torch.full((1, 8192), 200.0, dtype=torch.bfloat16)
    directions = torch.ones(1, *x.shape, dtype=torch.bfloat16)
    plain = sliced_score_matching(lambda x: x, x, directions, variance_reduced=False)
    assert plain.dtype == torch.float32
    assert plain.item() == pytest.approx(0.5 * (8192 * 200.0) ** 2 / 8192 + 1, rel=1e-5)
    assert sliced_score_matching(lambda x: x, x, directions).item() == pytest.approx(20_001, rel=1e-6)


def test_losses_are_measured_without_gradients_too():
    network, x = small_network(2), X_T[::97]
    with torch.no_grad():
        for loss in IMPLICIT.values():
            assert not loss(network, x).requires_grad


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(6, 1\) and \(6, 3\)"):
        denoising_score_matching(torch.zeros(6, 1), torch.zeros(6, 3), 1.0)
    with pytest.raises(ValueError, match=r"one per sample, 6, got \(3,\)"):
        denoising_score_matching(torch.zeros(6, 3), torch.zeros(6, 3), torch.ones(3))


# ---- weights --------------------------------------------------------------------------------------------------------


CHAINS = {
    "linear": {"beta_schedule": "linear", "beta_end": 0.3, "num_train_timesteps": 50},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
    "geometric": {"beta_schedule": "geometric", "sigma_min": 0.02, "sigma_max": 40.0, "num_train_timesteps": 50},
    "sub-VP": {"beta_schedule": "sub_vp", "beta_end": 0.3, "num_train_timesteps": 50},
}
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction", "score"]
KINDS = {"simple": None, "sigma_squared": None, "min_snr": 5.0, "likelihood": None}


def chain(name, prediction_type="epsilon", **options):
    """A scheduler and its timesteps that have signal."""
    if name == "flow":
        scheduler = DDPMAncestralScheduler(prediction_type="flow_prediction", num_train_timesteps=50, **options)
        return scheduler, torch.arange(1, 50)
    scheduler = DDPMAncestralScheduler(prediction_type=prediction_type, **CHAINS[name], **options)
    return scheduler, torch.arange(50)


EVERY = [*itertools.product(CHAINS, PREDICTION_TYPES), ("flow", "flow_prediction")]


def situation(scheduler, timesteps, seed=0):
    """x_0, eps, an arbitrary model output, x_t, and the score that the output stands for."""
    generator = torch.Generator().manual_seed(seed)
    x_0, noise, output = torch.randn(3, len(timesteps), 2, 3, generator=generator, dtype=F64)
    x_0 = (x_0.clamp(-2, 2) * 63).round() / 127.5
    x_t = scheduler.add_noise(x_0, noise, timesteps)
    alpha, sigma = (c[:, None, None] for c in scheduler.signal_and_noise(timesteps))
    score = (alpha * scheduler.original_sample(output, x_t, timesteps) - x_t) / sigma**2  # Tweedie
    return x_0, noise, output, x_t, score


@pytest.mark.parametrize(("name", "prediction_type"), EVERY)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weighted_prediction_is_the_weighted_score(name, prediction_type, kind):
    scheduler, timesteps = chain(name, prediction_type)
    x_0, noise, output, x_t, score = situation(scheduler, timesteps)
    _, sigma = scheduler.signal_and_noise(timesteps)
    on_score = denoising_score_matching(score, noise, sigma)
    on_prediction = simple_loss(output, scheduler.training_target(x_0, noise, timesteps))
    gamma = KINDS[kind]
    torch.testing.assert_close(
        prediction_weight(kind, scheduler, timesteps, gamma, dtype=F64) * on_prediction,
        score_weight(kind, scheduler, timesteps, gamma, dtype=F64) * on_score,
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize(("name", "prediction_type"), EVERY)
def test_sigma_squared_is_the_simple_loss_of_the_noise_and_simple_that_of_the_prediction(name, prediction_type):
    scheduler, timesteps = chain(name, prediction_type)
    x_0, noise, output, _, score = situation(scheduler, timesteps)
    _, sigma = scheduler.signal_and_noise(timesteps)
    error = denoising_score_matching(score, noise, sigma)
    on_noise = simple_loss(-sigma[:, None, None] * score, noise)
    on_prediction = simple_loss(output, scheduler.training_target(x_0, noise, timesteps))
    for kind, expected in {"sigma_squared": on_noise, "simple": on_prediction}.items():
        weight = score_weight(kind, scheduler, timesteps, dtype=F64)
        torch.testing.assert_close(weight * error, expected, rtol=1e-6, atol=0)
    assert (prediction_weight("simple", scheduler, timesteps) == 1).all()


@pytest.mark.parametrize(("name", "prediction_type"), EVERY[:-1])
def test_min_snr_is_that_of_the_losses(name, prediction_type):
    scheduler, timesteps = chain(name, prediction_type)
    alpha, sigma = scheduler.signal_and_noise(timesteps)
    for gamma in (0.5, 5.0):
        found = prediction_weight("min_snr", scheduler, timesteps, gamma, dtype=F64)
        torch.testing.assert_close(found, min_snr_weight((alpha / sigma) ** 2, gamma, prediction_type))


@pytest.mark.parametrize(("name", "prediction_type"), EVERY)
def test_half_the_likelihood_weighted_error_is_the_divergence_of_each_step(name, prediction_type):
    """Of the chain with the posterior's variance, per sample, whatever the network says."""
    scheduler, timesteps = chain(name, prediction_type, clip_sample=False)
    x_0, noise, output, x_t, score = situation(scheduler, timesteps)
    _, sigma = scheduler.signal_and_noise(timesteps)
    weight = score_weight("likelihood", scheduler, timesteps, dtype=F64)
    nats = 0.5 * weight * denoising_score_matching(score, noise, sigma)
    terms = variational_bound_term(scheduler, output, x_0, x_t, timesteps)
    torch.testing.assert_close(nats[1:] / math.log(2), terms[1:], rtol=1e-6, atol=1e-12)

    # the first term is the decoder's: that Gaussian's log-density, below the one of a perfect prediction
    mean, log_variance, _ = scheduler.reverse_law(output[:1], x_t[:1], timesteps[:1])
    density = torch.distributions.Normal(mean, (0.5 * log_variance).exp()).log_prob
    loss = (density(mean) - density(x_0[:1])).mean()
    assert nats[0].item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("name", CHAINS)
def test_the_likelihood_weighted_loss_of_an_exact_model_is_its_variational_bound(name):
    """Gaussian data N(m, S): T E_t[1/2 lambda_t DSM_t] = sum of the divergences, in expectation over x_0 and eps.

    The two-point rule is exact for quadratics.
    """
    m, S = 0.3, 0.25
    scheduler, timesteps = chain(name, "epsilon", clip_sample=False)
    network = Gaussian(m, variance=S).as_model(scheduler)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)), dtype=F64)
    weighted, bound = 0.0, 0.0
    for t in timesteps[1:]:
        t = t.expand(4)
        x_0, noise = m + math.sqrt(S) * signs[:, :1], signs[:, 1:]
        x_t = scheduler.add_noise(x_0, noise, t)
        output = network(x_t, t).sample
        _, sigma = scheduler.signal_and_noise(t)
        loss = denoising_score_matching(-output / sigma[:, None], noise, sigma)
        weighted += (0.5 * score_weight("likelihood", scheduler, t, dtype=F64) * loss).mean().item()
        bound += variational_bound_term(scheduler, output, x_0, x_t, t).mean().item()
    assert weighted == pytest.approx(bound * math.log(2), rel=1e-6)

    # per step 1/2 (SNR' - SNR) Var[x_0 | x_t], which is above what x_{t-1} tells of x_0 more than x_t does
    alpha, sigma = scheduler.signal_and_noise(timesteps)
    snr = (alpha / sigma) ** 2
    closed = (0.5 * (snr[:-1] - snr[1:]) / (1 / S + snr[1:])).sum().item()
    assert weighted == pytest.approx(closed, rel=1e-6)
    assert weighted > 0.5 * math.log((1 + S * snr[0]) / (1 + S * snr[-1]))


def test_the_likelihood_weight_is_g_squared_as_steps_shrink():
    """Of a VP chain beta_t sigma_t^2 / ((1 - beta_t) sigma_{t-1}^2), and T times it tends to g(t)^2 = beta(t)."""
    ratios = []
    for T in (100, 1000):
        betas = np.linspace(0.1, 20.0, T) / T
        scheduler = DDPMAncestralScheduler(num_train_timesteps=T, trained_betas=betas)
        found = score_weight("likelihood", scheduler, torch.arange(1, T), dtype=F64).numpy()
        variance = 1 - (1 - betas).cumprod()
        expected = betas[1:] * variance[1:] / ((1 - betas[1:]) * variance[:-1])
        np.testing.assert_allclose(found, expected, rtol=1e-3)  # 1 - beta is kept in float32
        ratios.append(found[T // 4 :: T // 4] / betas[1:][T // 4 :: T // 4])
    assert (np.abs(ratios[1] - 1) < 0.025).all() and (np.abs(ratios[1] - 1) < np.abs(ratios[0] - 1) / 8).all()


def test_weights_are_the_same_in_the_coordinates_of_a_variance_exploding_process():
    scheduler, timesteps = chain("geometric")
    s = np.geomspace(0.02, 40.0, 50)
    to_own = torch.from_numpy(1 + s**2)  # |score of x_t|^2 is this times |score of y_t|^2
    found = score_weight("sigma_squared", scheduler, timesteps, dtype=F64) * to_own
    torch.testing.assert_close(found, torch.from_numpy(s**2))
    found = score_weight("likelihood", scheduler, timesteps, dtype=F64)[1:] * to_own[1:]
    torch.testing.assert_close(found, torch.from_numpy(s[1:] ** 2 * (s[1:] ** 2 / s[:-1] ** 2 - 1)))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_without_signal_weights_take_their_limits(prediction_type):
    scheduler = DDPMAncestralScheduler(
        prediction_type=prediction_type, rescale_betas_zero_snr=True, num_train_timesteps=50
    )
    last = torch.tensor([49])
    for kind, gamma in (("sigma_squared", None), ("min_snr", 5.0)):
        assert score_weight(kind, scheduler, last, gamma).tolist() == [1]
        assert prediction_weight(kind, scheduler, last, gamma).tolist() == [0]
    assert score_weight("likelihood", scheduler, last).tolist() == [math.inf]
    alpha, sigma = scheduler.signal_and_noise(torch.tensor(48))
    snr_before = ((alpha / sigma) ** 2).item()
    assert prediction_weight("likelihood", scheduler, last).tolist() == pytest.approx([snr_before])
    assert prediction_weight("simple", scheduler, last).tolist() == [1]


def test_a_chain_of_one_level_is_all_decoder():
    scheduler = DDPMAncestralScheduler(num_train_timesteps=1, beta_start=0.2, beta_end=0.2)
    weight = score_weight("likelihood", scheduler, torch.tensor([0]))  # sigma^4 / alpha^2 / v with v = sigma^2
    assert weight.tolist() == pytest.approx([0.2 / 0.8])


def test_weights_are_float32_unless_asked_and_keep_the_shape():
    scheduler, timesteps = chain("linear")
    for weight in (score_weight, prediction_weight):
        for kind, gamma in KINDS.items():
            found = weight(kind, scheduler, timesteps, gamma)
            assert found.dtype == torch.float32 and found.shape == (50,) and (found > 0).all()


@pytest.mark.parametrize(
    ("kind", "gamma", "named"),
    [
        ("vlb", None, "'vlb'"),
        ("min_snr", None, "gamma=None for 'min_snr'"),
        ("min_snr", 0.0, "gamma=0.0 for 'min_snr'"),
        ("likelihood", 5.0, "gamma=5.0 for 'likelihood'"),
    ],
)
def test_a_wrong_weighting_is_named(kind, gamma, named):
    scheduler, timesteps = chain("linear")
    for weight in (score_weight, prediction_weight):
        with pytest.raises(ValueError, match=named):
            weight(kind, scheduler, timesteps, gamma)
