r"""Properties of the exact laws.

Oracles: automatic differentiation, torch.distributions and scipy for densities, the information form of Gaussian
conditioning (another route than the module's covariance form), Bayes' rule by quadrature, and numpy sums over points.
"""

import doctest
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from annealers import DDPMAncestralScheduler, exact
from annealers.exact import (
    ConditionalExactModel,
    ExactModel,
    ExactModelOutput,
    FiniteData,
    Gaussian,
    GaussianMixture,
    Law,
    path_point,
)

F64 = torch.float64
PATH_POINTS = [(1.0, 0.5), (0.8, 0.6), (0.1, 0.9949874371066199), (0.3, 2.0)]  # VE, VP, VP near the noise, neither


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def random_covariance(*batch, D, seed=0):
    factor = randn(*batch, D, D, seed=seed)
    return factor @ factor.mT / D + 0.05 * torch.eye(D, dtype=F64)


MEANS = torch.tensor([[-1.0, 0.5], [0.7, 0.7], [0.2, -1.2]], dtype=F64)
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=F64)
COVARIANCES = random_covariance(3, D=2, seed=1) / 4
POINTS = randn(7, 2, 2, seed=2)  # events of shape (2, 2)
POINT_WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 0.25, 1.0], dtype=F64)

LAWS = {
    "scalar Gaussian": Gaussian(0.3, variance=0.7),
    "diagonal Gaussian": Gaussian(randn(3, seed=3), variance=torch.tensor([0.2, 1.0, 2.5], dtype=F64)),
    "full Gaussian on (2, 2)": Gaussian(randn(2, 2, seed=4), covariance=random_covariance(D=4, seed=5)),
    "scalar mixture": GaussianMixture([0.3, 0.7], [-1.0, 0.8], [0.04, 0.25]),
    "full mixture": GaussianMixture(WEIGHTS, MEANS, COVARIANCES),
    "finite data": FiniteData(POINTS, POINT_WEIGHTS, block_size=3),
}
every_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
every_path_point = pytest.mark.parametrize("alpha, sigma", PATH_POINTS)


def states(law, *batch, seed=10):
    return randn(*batch, *law.event_shape, seed=seed)


# ---- identities that hold for any law ------------------------------------------------------------------------------


@every_law
@every_path_point
def test_score_is_the_gradient_of_log_prob(law, alpha, sigma):
    x = states(law, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(law.log_prob(x, alpha, sigma).sum(), x)
    torch.testing.assert_close(law.score(x, alpha, sigma).detach(), gradient, rtol=1e-10, atol=1e-10)


@every_law
@every_path_point
def test_denoise_is_tweedies_formula_of_the_density(law, alpha, sigma):
    x = states(law, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(law.log_prob(x, alpha, sigma).sum(), x)
    torch.testing.assert_close(
        law.denoise(x, alpha, sigma).detach(), (x.detach() + sigma**2 * gradient) / alpha, rtol=1e-10, atol=1e-10
    )


@every_law
@every_path_point
def test_posterior_variance_is_the_jacobian_of_denoise(law, alpha, sigma):
    x = states(law)  # one state, no batch axis
    jacobian = torch.autograd.functional.jacobian(lambda y: law.denoise(y, alpha, sigma), x)
    expected = sigma**2 / alpha * jacobian.reshape(x.numel(), x.numel()).diagonal().reshape(x.shape)
    torch.testing.assert_close(law.posterior_variance(x, alpha, sigma), expected, rtol=1e-9, atol=1e-10)


@every_law
@every_path_point
def test_signal_and_noise_predictions_add_up_to_the_state(law, alpha, sigma):
    x = states(law, 5)
    torch.testing.assert_close(alpha * law.denoise(x, alpha, sigma) + sigma * law.noise(x, alpha, sigma), x)


@every_law
@every_path_point
def test_velocity_and_state_together_give_back_signal_and_noise(law, alpha, sigma):
    x = states(law, 5)
    v, scale = law.velocity(x, alpha, sigma), alpha**2 + sigma**2
    torch.testing.assert_close((alpha * x - sigma * v) / scale, law.denoise(x, alpha, sigma))
    torch.testing.assert_close((sigma * x + alpha * v) / scale, law.noise(x, alpha, sigma))


@every_law
def test_a_state_without_signal_leaves_the_prior(law):
    x, sigma = states(law, 3), 1.5
    torch.testing.assert_close(law.denoise(x, 0.0, sigma), law.denoise(x, 1e-9, sigma), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(
        law.posterior_variance(x, 0.0, sigma), law.posterior_variance(x, 1e-9, sigma), rtol=1e-7, atol=1e-7
    )
    torch.testing.assert_close(law.score(x, 0.0, sigma), -x / sigma**2)
    torch.testing.assert_close(law.noise(x, 0.0, sigma), x / sigma)


# ---- densities and posteriors against independent routes -----------------------------------------------------------


@every_path_point
def test_gaussian_log_prob_is_that_of_torch_and_of_scipy(alpha, sigma):
    mean, covariance = randn(4, seed=4), random_covariance(D=4, seed=5)
    x = randn(6, 4)
    log_prob = Gaussian(mean, covariance=covariance).log_prob(x, alpha, sigma)
    noisy_covariance = alpha**2 * covariance + sigma**2 * torch.eye(4, dtype=F64)
    torch.testing.assert_close(
        log_prob, torch.distributions.MultivariateNormal(alpha * mean, noisy_covariance).log_prob(x)
    )
    np.testing.assert_allclose(
        log_prob, stats.multivariate_normal((alpha * mean).numpy(), noisy_covariance.numpy()).logpdf(x), rtol=1e-10
    )


@every_path_point
def test_mixture_log_prob_is_that_of_torch(alpha, sigma):
    x = randn(6, 2)
    components = torch.distributions.MultivariateNormal(
        alpha * MEANS, alpha**2 * COVARIANCES + sigma**2 * torch.eye(2, dtype=F64)
    )
    expected = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(WEIGHTS), components).log_prob(x)
    torch.testing.assert_close(LAWS["full mixture"].log_prob(x, alpha, sigma), expected)


@every_path_point
def test_gaussian_posterior_is_the_one_of_the_information_form(alpha, sigma):
    mean, covariance = randn(4, seed=4), random_covariance(D=4, seed=5)
    law, x = Gaussian(mean, covariance=covariance), randn(4)
    posterior = torch.linalg.inv(torch.linalg.inv(covariance) + alpha**2 / sigma**2 * torch.eye(4, dtype=F64))
    posterior_mean = posterior @ (torch.linalg.solve(covariance, mean) + alpha / sigma**2 * x)
    torch.testing.assert_close(law.denoise(x, alpha, sigma), posterior_mean)
    torch.testing.assert_close(law.posterior_variance(x, alpha, sigma), posterior.diagonal())


@pytest.mark.parametrize("name", ["scalar Gaussian", "scalar mixture"])
@every_path_point
def test_posterior_moments_are_those_of_bayes_rule_by_quadrature(name, alpha, sigma):
    law, x = LAWS[name], torch.tensor([-0.9, 0.1, 1.3], dtype=F64)
    x_0 = torch.linspace(-12, 12, 20_001, dtype=F64)
    log_joint = law.log_prob(x_0) - (x[:, None] - alpha * x_0) ** 2 / (2 * sigma**2)
    posterior = log_joint.softmax(
        -1
    )  # the trapezium rule is exact to rounding for a density that dies inside the grid
    mean = posterior @ x_0
    torch.testing.assert_close(law.denoise(x, alpha, sigma), mean, rtol=1e-9, atol=1e-9)
    variance = (posterior * (x_0 - mean[:, None]) ** 2).sum(-1)
    torch.testing.assert_close(law.posterior_variance(x, alpha, sigma), variance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["scalar Gaussian", "scalar mixture"])
def test_density_on_a_line_integrates_to_one(name):
    x = torch.linspace(-12, 12, 20_001, dtype=F64)
    for alpha, sigma in [(1.0, 0.0), *PATH_POINTS]:
        total = torch.trapezoid(LAWS[name].log_prob(x, alpha, sigma).exp(), x)
        assert float(total) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize(
    "law", [LAWS["full mixture"], FiniteData(MEANS, WEIGHTS), Gaussian(MEANS[0], covariance=COVARIANCES[0])]
)
def test_density_on_a_plane_integrates_to_one(law):
    axis = torch.linspace(-8, 8, 401, dtype=F64)
    x = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)  # (401, 401, 2)
    density = law.log_prob(x, 0.8, 0.6).exp()
    assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=1e-9)


def test_without_noise_the_data_is_known():
    x = randn(4, 2)
    law = LAWS["full mixture"]
    torch.testing.assert_close(law.denoise(2 * x, alpha=2.0, sigma=0.0), x)
    torch.testing.assert_close(law.posterior_variance(x), torch.zeros_like(x))


def test_without_signal_and_noise_the_state_tells_nothing():
    law, x = Gaussian(0.3, variance=0.7), randn(4)
    torch.testing.assert_close(law.denoise(x, 0.0, 0.0), torch.full_like(x, 0.3))
    torch.testing.assert_close(law.posterior_variance(x, 0.0, 0.0), torch.full_like(x, 0.7))


def test_a_gaussian_may_lack_variance_in_some_directions():
    line = Gaussian(torch.zeros(2, dtype=F64), covariance=torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=F64))
    x = torch.tensor([0.5, 0.5], dtype=F64)
    torch.testing.assert_close(line.denoise(x), x)  # on the line and free of noise
    torch.testing.assert_close(line.denoise(torch.tensor([2.0, 0.0], dtype=F64)), torch.ones(2, dtype=F64))  # off it
    torch.testing.assert_close(line.denoise(torch.tensor([1.0, -1.0], dtype=F64), 1.0, 0.5), torch.zeros(2, dtype=F64))
    torch.testing.assert_close(line.posterior_variance(x, 1.0, 0.5), torch.full((2,), 0.25 / (2 + 0.25), dtype=F64))
    with pytest.raises(ValueError, match="need sigma > 0"):
        line.log_prob(x)
    factor = randn(6, 2)  # rank 2 of 6, but for the rounding of the product and its decomposition
    plane = Gaussian(torch.zeros(6, dtype=F64), covariance=factor @ factor.T)
    with pytest.raises(ValueError, match="smallest eigenvalue of C = 0.0"):
        plane.score(factor @ randn(2))
    point = Gaussian(torch.ones(2, dtype=F64), variance=0.0)
    torch.testing.assert_close(point.denoise(x, 0.8, 0.6), torch.ones(2, dtype=F64))
    torch.testing.assert_close(point.score(x, 0.8, 0.6), (0.8 - x) / 0.36)


# ---- relations between the laws ------------------------------------------------------------------------------------


def assert_same_law(law, other, x, tolerance=1e-10, **path):
    for method in ("log_prob", "score", "denoise", "noise", "posterior_variance", "velocity", "flow"):
        torch.testing.assert_close(
            getattr(law, method)(x, **path), getattr(other, method)(x, **path), rtol=tolerance, atol=tolerance
        )


@every_path_point
def test_a_mixture_of_one_component_is_that_gaussian(alpha, sigma):
    mean, covariance = randn(2, 2, seed=4), random_covariance(D=4, seed=5)
    mixture = GaussianMixture([3.0], mean[None], covariance[None])
    assert_same_law(mixture, Gaussian(mean, covariance=covariance), randn(5, 2, 2), alpha=alpha, sigma=sigma)


def test_diagonal_and_isotropic_covariances_are_full_ones_written_short():
    variances = torch.tensor([[0.1, 0.3], [0.5, 0.2], [1.0, 2.0]], dtype=F64)
    x, path = randn(5, 2), {"alpha": 0.8, "sigma": 0.6}
    assert_same_law(
        GaussianMixture(WEIGHTS, MEANS, variances), GaussianMixture(WEIGHTS, MEANS, variances.diag_embed()), x, **path
    )
    isotropic = GaussianMixture(WEIGHTS, MEANS, variances[:, 0])
    full = GaussianMixture(WEIGHTS, MEANS, variances[:, 0, None, None] * torch.eye(2, dtype=F64))
    assert_same_law(isotropic, full, x, **path)
    assert_same_law(
        Gaussian(MEANS[0], variance=0.3), Gaussian(MEANS[0], covariance=0.3 * torch.eye(2)), x, 1e-7, **path
    )


def test_a_mixture_component_of_weight_zero_is_no_component():
    with_it = GaussianMixture([0.5, 0.0, 0.3], MEANS, COVARIANCES)
    without = GaussianMixture([0.5, 0.3], MEANS[[0, 2]], COVARIANCES[[0, 2]])
    assert_same_law(with_it, without, randn(5, 2), alpha=0.8, sigma=0.6)


@every_path_point
def test_finite_data_is_the_limit_of_ever_narrower_mixtures(alpha, sigma):
    narrow = GaussianMixture(POINT_WEIGHTS, POINTS, torch.full((7,), 1e-14))
    assert_same_law(LAWS["finite data"], narrow, randn(5, 2, 2), 1e-9, alpha=alpha, sigma=sigma)


@every_path_point
def test_finite_data_is_the_weighted_sum_over_all_points(alpha, sigma):
    x = randn(6, 2, 2).numpy()
    difference = x[:, None] - alpha * POINTS.numpy()  # (6, 7, 2, 2)
    likelihood = POINT_WEIGHTS.numpy() * np.exp(-(difference**2).sum((2, 3)) / (2 * sigma**2))
    weight = likelihood / likelihood.sum(1, keepdims=True)
    mean = np.einsum("bn,nij->bij", weight, POINTS)
    variance = np.einsum("bn,bnij->bij", weight, (POINTS.numpy() - mean[:, None]) ** 2)
    density = likelihood.sum(1) / POINT_WEIGHTS.sum().item() / (2 * np.pi * sigma**2) ** 2
    law, x = LAWS["finite data"], torch.from_numpy(x)
    np.testing.assert_allclose(law.denoise(x, alpha, sigma), mean, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(law.posterior_variance(x, alpha, sigma), variance, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(law.log_prob(x, alpha, sigma), np.log(density), rtol=1e-10)


@pytest.mark.parametrize("block_size", [1, 2, 6, 7, 100])
def test_finite_data_does_not_depend_on_the_block_size(block_size):
    # the far scale makes the running maximum move from block to block
    other, x = FiniteData(POINTS, POINT_WEIGHTS, block_size=block_size), randn(5, 2, 2)
    for sigma in (0.05, 0.6):
        assert_same_law(LAWS["finite data"], other, x, alpha=0.8, sigma=sigma)


def test_finite_data_ignores_points_of_weight_zero_even_a_block_of_them():
    weights = torch.tensor([0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.5])
    other = FiniteData(POINTS[[2, 3, 6]], [1.0, 2.0, 0.5])
    assert_same_law(FiniteData(POINTS, weights, block_size=2), other, randn(5, 2, 2), alpha=0.8, sigma=0.6)


def test_the_ideal_denoiser_falls_to_the_nearest_point_without_noise_and_to_the_mean_under_all_noise():
    x = randn(20, 2, 2)
    law = FiniteData(POINTS)
    nearest = torch.cdist(x.flatten(1), POINTS.flatten(1)).argmin(1)
    torch.testing.assert_close(law.denoise(x, 1.0, 1e-3), POINTS[nearest])
    torch.testing.assert_close(law.posterior_variance(x, 1.0, 1e-3), torch.zeros_like(x))
    mean = POINTS.mean(0).expand_as(x)
    torch.testing.assert_close(law.denoise(x, 1.0, 1e5), mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        LAWS["finite data"].denoise(x, 1.0, 1e5),
        (POINT_WEIGHTS[:, None, None] * POINTS).sum(0).expand_as(x) / POINT_WEIGHTS.sum(),
        rtol=1e-8,
        atol=1e-8,
    )


def test_finite_data_far_from_the_origin_is_as_exact_as_near_it():
    shift = 2.0**20  # a power of two, so that shifting by it rounds the points alike
    points, x = (torch.round(values * 1024) / 1024 for values in (POINTS, POINTS + 0.02 * randn(7, 2, 2)))
    near, far = FiniteData(points), FiniteData(points + shift)
    torch.testing.assert_close(far.score(x + shift, 1.0, 0.01), near.score(x, 1.0, 0.01), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(far.log_prob(x + shift, 1.0, 0.01), near.log_prob(x, 1.0, 0.01))


def test_posterior_variance_of_equal_points_is_zero_and_never_less():
    far, here = 100 * torch.ones(1, 50, dtype=F64), randn(1, 50)
    law = FiniteData(torch.cat([far, here, here, here]), [0.1, 0.2, 0.3, 0.4])
    variance = law.posterior_variance(randn(20, 50, seed=1), 0.8, 0.6)
    assert (variance >= 0).all() and variance.max() < 1e-11


def test_finite_data_tells_near_points_apart_at_small_sigma_in_float32():
    # two points 3e-4 apart, far from the origin: their squared distances to x differ by less than float32 can hold
    D, sigma = 200, 1e-3
    points = 30 + randn(50, D, seed=1)
    points[1] = points[0] + 3e-4 * randn(D, seed=2).sign()
    points = points.float()
    x = points[:2] + sigma * randn(2, D, seed=3).float()
    difference = x.double()[:, None] - points.double()
    expected = (-(difference**2).sum(-1) / (2 * sigma**2)).softmax(-1) @ points.double()
    law = FiniteData(points)
    denoised = law.denoise(x, 1.0, sigma)
    assert denoised.dtype is torch.float32
    torch.testing.assert_close(denoised, expected.float(), rtol=1e-6, atol=0)
    expected_noise = (x.double() - expected) / sigma
    torch.testing.assert_close(law.noise(x, 1.0, sigma), expected_noise.float(), rtol=1e-4, atol=1e-4)
    in_float32 = (x**2).sum(-1, keepdim=True) - 2 * x @ points.T + (points**2).sum(-1)
    naive = (-in_float32 / (2 * sigma**2)).softmax(-1) @ points
    assert not torch.allclose((x - naive) / sigma, expected_noise.float(), rtol=1e-2, atol=1e-2)  # the test can fail


# ---- sampling ------------------------------------------------------------------------------------------------------


def moments_of_the_data(law):
    """Mean and covariance of the law, written out from what it was made of."""
    if law is LAWS["finite data"]:
        points, weights = POINTS.flatten(1), POINT_WEIGHTS / POINT_WEIGHTS.sum()
        mean = weights @ points
        return mean, torch.einsum("n,ni,nj->ij", weights, points - mean, points - mean)
    if law is LAWS["full mixture"]:
        mean = WEIGHTS @ MEANS
        between = torch.einsum("k,ki,kj->ij", WEIGHTS, MEANS - mean, MEANS - mean)
        return mean, torch.einsum("k,kij->ij", WEIGHTS, COVARIANCES) + between
    if law is LAWS["scalar mixture"]:
        mean = 0.3 * -1.0 + 0.7 * 0.8
        variance = 0.3 * (0.04 + 1.0) + 0.7 * (0.25 + 0.64) - mean**2
        return torch.tensor([mean], dtype=F64), torch.tensor([[variance]], dtype=F64)
    if law is LAWS["full Gaussian on (2, 2)"]:
        return randn(2, 2, seed=4).flatten(), random_covariance(D=4, seed=5)
    if law is LAWS["diagonal Gaussian"]:
        return randn(3, seed=3), torch.tensor([0.2, 1.0, 2.5], dtype=F64).diag()
    return torch.tensor([0.3], dtype=F64), torch.tensor([[0.7]], dtype=F64)


@every_law
@pytest.mark.parametrize("alpha, sigma", [(1.0, 0.0), (0.8, 0.6)])
def test_samples_have_the_moments_of_the_law_within_four_standard_errors(law, alpha, sigma):
    n = 100_000
    x = law.sample(n, alpha, sigma, generator=torch.Generator().manual_seed(0)).double().reshape(n, -1)
    mean, covariance = moments_of_the_data(law)
    mean, covariance = alpha * mean, alpha**2 * covariance + sigma**2 * torch.eye(len(mean), dtype=F64)
    products = (x - mean)[:, :, None] * (x - mean)[:, None]  # (n, D, D)
    for observed, expected in ((x, mean), (products, covariance)):
        standard_error = observed.std(0) / math.sqrt(n)
        assert ((observed.mean(0) - expected).abs() < 4 * standard_error).all()
        assert (4 * standard_error < 0.05 * covariance.diagonal().max()).all()  # narrow enough to see a wrong moment


def test_mixture_samples_come_from_each_component_as_often_as_its_weight_says():
    n = 50_000
    law = GaussianMixture(WEIGHTS, 100 * MEANS, COVARIANCES)
    x = law.sample(n, generator=torch.Generator().manual_seed(0)).double()
    share = torch.cdist(x, 100 * MEANS).argmin(1).bincount(minlength=3) / n
    assert ((share - WEIGHTS).abs() < 4 * (WEIGHTS * (1 - WEIGHTS) / n).sqrt()).all()


@every_law
def test_the_same_seed_gives_the_same_data_and_noise_at_every_path_point(law):
    clean, again, noisy, noisier, scaled = (
        law.sample((3, 5), alpha, sigma, generator=torch.Generator().manual_seed(7)).double()
        for alpha, sigma in ((1.0, 0.0), (1.0, 0.0), (1.0, 0.5), (1.0, 1.0), (0.4, 0.5))
    )
    other = law.sample((3, 5), generator=torch.Generator().manual_seed(8)).double()
    assert torch.equal(clean, again) and not torch.equal(clean, other)
    torch.testing.assert_close(noisier - clean, 2 * (noisy - clean), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(noisy - scaled, 0.6 * clean, rtol=1e-5, atol=1e-5)


def test_samples_without_a_generator_follow_the_global_seed():
    law = LAWS["full mixture"]
    torch.manual_seed(3)
    first = law.sample(4)
    torch.manual_seed(3)
    assert torch.equal(first, law.sample(4))


@every_law
@pytest.mark.parametrize("shape", [0, 3, (), (2,), (2, 3, 4)])
def test_samples_have_the_batch_shape_asked_for(law, shape):
    batch = (shape,) if isinstance(shape, int) else shape
    assert law.sample(shape, 0.8, 0.6).shape == batch + law.event_shape


def test_samples_of_finite_data_without_noise_are_its_points():
    x = LAWS["finite data"].sample(50)
    assert (x[:, None] == POINTS).flatten(2).all(-1).any(1).all()


def test_each_sample_of_a_batch_is_drawn_at_its_own_path_point():
    sigma = torch.tensor([0.0, 1.0])
    x = Gaussian(2.0, variance=0.0).sample((2, 1000), alpha=torch.tensor([1.0, 0.0]), sigma=sigma)
    assert torch.equal(x[0], torch.full((1000,), 2.0))
    assert abs(x[1].mean()) < 4 / math.sqrt(1000) and abs(x[1].var() - 1) < 4 * math.sqrt(2 / 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_have_the_dtype_of_the_tensors_the_law_was_made_from(dtype):
    assert Gaussian(torch.zeros(2, dtype=dtype), variance=1.0).sample(1).dtype is dtype
    assert GaussianMixture([1.0], torch.zeros(1, 2, dtype=dtype), [1.0]).sample(1).dtype is dtype
    assert FiniteData(torch.zeros(3, 2, dtype=dtype)).sample(1).dtype is dtype
    assert Gaussian(0.0, variance=1.0).sample(1).dtype is torch.get_default_dtype()


# ---- shapes and dtypes ---------------------------------------------------------------------------------------------

METHODS = ("log_prob", "score", "denoise", "noise", "posterior_variance", "velocity", "flow")


@every_law
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (2, 1, 3), (0,)])
def test_any_batch_shape_gives_what_its_elements_give(law, batch):
    x = states(law, *batch)
    flat = x.reshape(-1, *law.event_shape) if x.numel() else x
    for method in METHODS:
        result = getattr(law, method)(x, 0.8, 0.6)
        assert result.shape == (batch if method == "log_prob" else x.shape)
        alone = [getattr(law, method)(one, 0.8, 0.6) for one in flat]
        if alone:
            torch.testing.assert_close(result.reshape(len(flat), *alone[0].shape), torch.stack(alone))


@every_law
def test_a_path_point_per_sample_gives_what_a_loop_gives(law):
    x, alpha, sigma = states(law, 3, 4), torch.tensor([1.0, 0.8, 0.1]), torch.tensor([0.5, 0.6, 2.0])
    for method in METHODS:
        loop = [getattr(law, method)(x[i], float(alpha[i]), float(sigma[i])) for i in range(3)]
        torch.testing.assert_close(getattr(law, method)(x, alpha, sigma), torch.stack(loop))


def test_coefficients_line_up_with_the_batch_from_the_left():
    law, x = LAWS["scalar Gaussian"], randn(2, 2, 2)
    sigma = torch.tensor([0.5, 2.0])
    torch.testing.assert_close(law.denoise(x, 1.0, sigma)[1], law.denoise(x[1], 1.0, 2.0))
    per_pair = torch.tensor([[0.5], [2.0]])  # axes of length one are shared
    torch.testing.assert_close(law.denoise(x, 1.0, per_pair), law.denoise(x, 1.0, sigma))


@every_law
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_are_the_float64_ones_rounded_to_the_dtype_of_the_state(law, dtype):
    x = states(law, 5).to(dtype)
    for method in METHODS:
        result = getattr(law, method)(x, 0.8, 0.6)
        assert result.dtype is dtype
        assert torch.equal(result, getattr(law, method)(x.double(), 0.8, 0.6).to(dtype))


def test_a_scalar_law_acts_on_every_pixel_of_an_image_of_any_shape():
    law, x = Gaussian(0.5, variance=0.04), randn(2, 3, 4, 5)
    expected = 0.5 + 0.8 * 0.04 / (0.64 * 0.04 + 0.36) * (x - 0.8 * 0.5)
    torch.testing.assert_close(law.denoise(x, 0.8, 0.6), expected)
    assert law.log_prob(x).shape == x.shape


def test_python_numbers_enter_in_double_precision():
    x = torch.zeros((), dtype=F64)
    assert float(Gaussian(0.1, variance=0.3).denoise(x, 0.0, 1.0)) == 0.1
    assert float(Gaussian(0.1, variance=0.3).posterior_variance(x, 0.0, 1.0)) == 0.3
    mixture = GaussianMixture([0.1, 0.2, 0.7], [0.1, 0.1, 0.1], [0.3, 0.3, 0.3])
    assert float(mixture.denoise(x, 0.0, 1.0)) == pytest.approx(0.1, abs=1e-16)
    assert float(mixture.posterior_variance(x, 0.0, 1.0)) == pytest.approx(0.3, abs=1e-15)


# ---- memory --------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("method", METHODS)
def test_finite_data_makes_no_tensor_larger_than_a_block(method):
    N, D, B, block = 3000, 40, 16, 100
    law, x = FiniteData(randn(N, D), block_size=block), randn(B, D)
    with LargestTensor() as largest:
        getattr(law, method)(x, 0.8, 0.6)
    assert block * D <= largest.numel <= max(block * D, B * block, N)


@pytest.mark.parametrize("method", METHODS)
def test_a_diagonal_gaussian_makes_no_matrix(method):
    with LargestTensor() as largest:
        law, x = Gaussian(torch.zeros(3, 64, 64), variance=torch.ones(64)), torch.zeros(2, 3, 64, 64)
        getattr(law, method)(x, 0.8, 0.6)
    assert largest.numel == x.numel()


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux only")
def test_60000_points_of_784_coordinates_need_little_more_memory_than_the_points():
    script = """
        import resource, torch
        from annealers.exact import FiniteData
        megabytes = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        points = torch.rand(60_000, 1, 28, 28)
        x = torch.randn(64, 1, 28, 28)
        FiniteData(points[:2000]).posterior_variance(x, 0.8, 0.6)  # libraries and buffers
        before = megabytes()
        law = FiniteData(points)
        assert law.denoise(x, 0.8, 0.6).isfinite().all()
        print(megabytes() - before)
    """
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    ).stdout
    assert float(output) < 100  # measured: 6 to 25; the points in float64 would take 376, a (64, N, D) tensor 12,000


# ---- the drop-in network -------------------------------------------------------------------------------------------

DIFFUSERS_TYPES = ("epsilon", "sample", "v_prediction")


@pytest.mark.parametrize("prediction_type", DIFFUSERS_TYPES)
def test_a_diffusers_scheduler_recovers_the_posterior_mean_from_every_prediction_type(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    law, x = LAWS["full mixture"], randn(3, 2)
    for t in (0, 10, 500, 999):
        output = law.as_model(scheduler)(x, t).sample
        alpha_bar = float(scheduler.alphas_cumprod[t])
        expected = law.denoise(x, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))
        recovered = scheduler.step(output, t, x).pred_original_sample
        torch.testing.assert_close(recovered, expected, rtol=1e-5, atol=1e-4)  # their table is float32


@pytest.mark.parametrize("prediction_type", [*DIFFUSERS_TYPES, "score"])
def test_our_scheduler_recovers_the_posterior_mean_from_every_prediction_type(prediction_type):
    scheduler = DDPMAncestralScheduler(prediction_type=prediction_type, clip_sample=False)
    law, x = LAWS["full mixture"], randn(4, 2)
    timesteps = torch.tensor([0, 10, 500, 999])
    alpha, sigma = scheduler.signal_and_noise(timesteps)
    output = law.as_model(scheduler)(x, timesteps).sample
    torch.testing.assert_close(
        scheduler.original_sample(output, x, timesteps), law.denoise(x, alpha, sigma), rtol=1e-9, atol=1e-9
    )


def test_the_prediction_types_are_the_methods_of_the_law():
    scheduler, law, x, t = DDPMScheduler(), LAWS["full mixture"], randn(3, 2), 300
    alpha = float(scheduler.alphas_cumprod[t]) ** 0.5
    sigma = (1 - alpha**2) ** 0.5
    predictions = {
        p: ExactModel(law, scheduler, p)(x, t).sample for p in (*DIFFUSERS_TYPES, "score", "flow_prediction")
    }
    torch.testing.assert_close(predictions["score"], law.score(x, alpha, sigma))
    torch.testing.assert_close(predictions["epsilon"], -sigma * predictions["score"])
    torch.testing.assert_close(predictions["sample"], law.denoise(x, alpha, sigma))
    torch.testing.assert_close(
        predictions["v_prediction"], alpha * predictions["epsilon"] - sigma * predictions["sample"]
    )
    torch.testing.assert_close(predictions["flow_prediction"], predictions["epsilon"] - predictions["sample"])


# ---- flow matching: x_t = (1 - t) x_0 + t eps -----------------------------------------------------------------------


@every_law
@pytest.mark.parametrize("sigma", [0.02, 0.5, 0.98, 1.0])
def test_the_flow_leads_from_the_state_to_the_posterior_mean_of_data_and_noise(law, sigma):
    x = states(law, 5)
    flow = law.flow(x, 1 - sigma, sigma)
    torch.testing.assert_close(x - sigma * flow, law.denoise(x, 1 - sigma, sigma), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x + (1 - sigma) * flow, law.noise(x, 1 - sigma, sigma), rtol=1e-9, atol=1e-9)


def test_the_flow_transports_the_law_of_gaussian_data():
    # the flow field of N(m, S) is d/dt of the affine map that keeps its quantiles: x_t = (1 - t) m + sqrt(V_t) q
    law, sigma, q = Gaussian(0.3, variance=0.7), torch.tensor([0.1, 0.4, 0.9], dtype=F64).requires_grad_(), 1.3
    x = (1 - sigma) * 0.3 + ((1 - sigma) ** 2 * 0.7 + sigma**2).sqrt() * q
    (speed,) = torch.autograd.grad(x.sum(), sigma)
    t = sigma.detach()
    torch.testing.assert_close(law.flow(x.detach(), 1 - t, t), speed, rtol=1e-12, atol=1e-12)


FLOW_SCHEDULERS = {
    "flow-matching Euler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "UniPC": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "ours": DDPMAncestralScheduler(prediction_type="flow_prediction", clip_sample=False, shift=3.0),
}


@pytest.mark.parametrize("scheduler", FLOW_SCHEDULERS.values(), ids=FLOW_SCHEDULERS.keys())
def test_a_flow_matching_scheduler_is_asked_for_the_flow_at_sigma_equal_to_its_timestep(scheduler):
    law, x, timesteps = LAWS["full mixture"], randn(4, 2), torch.tensor([1000.0, 700.25, 3.0, 0.5])
    alpha, sigma = path_point(scheduler, timesteps)
    assert alpha.dtype is sigma.dtype is F64
    torch.testing.assert_close(sigma, torch.tensor([1.0, 0.70025, 0.003, 0.0005], dtype=F64), rtol=1e-12, atol=0)
    torch.testing.assert_close(alpha, 1 - sigma, rtol=0, atol=0)
    expected = law.flow(x, 1 - sigma, sigma)
    assert torch.equal(law.as_model(scheduler)(x, timesteps).sample, expected)
    labels = torch.zeros(4, dtype=torch.long)
    torch.testing.assert_close(ConditionalExactModel([law], scheduler)(x, timesteps, labels).sample, expected)
    assert path_point(scheduler, 500)[0] == 0.5  # an integer is a time like any other


def test_a_number_of_train_timesteps_of_its_own_is_the_unit_of_a_flows_time():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=40)
    assert [float(c) for c in path_point(scheduler, 30)] == [0.25, 0.75]


def test_the_flow_matching_scheduler_of_diffusers_walks_to_gaussian_data_with_the_exact_model():
    # Euler steps of the flow dx = v dt: x_0 is m + sqrt(S) q up to a first-order error
    law, x, results = Gaussian(0.3, variance=0.7), torch.tensor([[-1.0], [0.5], [2.0]], dtype=F64), []
    for steps in (50, 100, 200):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
        model, state = law.as_model(scheduler), x
        for t in scheduler.timesteps:
            state = scheduler.step(model(state, t).sample, t, state).prev_sample
        results.append(float((state - 0.3 - math.sqrt(0.7) * x).abs().max()))
    assert results[-1] < 0.02
    for coarse, fine in zip(results, results[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.1)


def test_schedulers_in_variance_exploding_coordinates_hand_over_states_the_model_understands():
    scheduler = EulerDiscreteScheduler(timestep_spacing="leading")
    scheduler.set_timesteps(10)
    law = LAWS["full mixture"]
    model = law.as_model(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i])
        x = sigma * randn(3, 2, seed=i)
        output = model(scheduler.scale_model_input(x, t), t).sample
        denoised = scheduler.step(output, t, x).pred_original_sample
        torch.testing.assert_close(denoised.double(), law.denoise(x, 1.0, sigma), rtol=1e-4, atol=1e-4)


class TableScheduler:
    """The least a scheduler of ours has: its own table, here one of flow matching's."""

    config = {"prediction_type": "sample"}  # noqa: RUF012

    def signal_and_noise(self, timesteps):
        sigma = timesteps.double() / 10
        return 1 - sigma, sigma


def test_a_scheduler_with_its_own_table_is_asked_for_the_path_point():
    law, x = LAWS["full mixture"], randn(3, 2)
    output = law.as_model(TableScheduler())(x, torch.tensor([1, 5, 9])).sample
    torch.testing.assert_close(output, law.denoise(x, torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.1, 0.5, 0.9])))


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0, 7.0])])
def test_a_timestep_may_be_a_number_or_a_tensor_of_one_or_one_per_sample(timestep):
    model, x = LAWS["full Gaussian on (2, 2)"].as_model(DDPMScheduler()), randn(3, 2, 2)
    torch.testing.assert_close(model(x, timestep).sample, model(x, torch.tensor([7, 7, 7])).sample)


def test_each_sample_has_its_own_timestep():
    model, x = LAWS["scalar mixture"].as_model(DDPMScheduler()), randn(3, 1, 4, 4)
    together = model(x, torch.tensor([1, 500, 999])).sample
    for i, t in enumerate((1, 500, 999)):
        torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1], t).sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_model_returns_what_a_diffusers_network_returns(dtype):
    law, x = LAWS["scalar mixture"], randn(2, 3, 4, 4, dtype=dtype)
    conditional = ConditionalExactModel([law], DDPMScheduler())
    model, labels = law.as_model(DDPMScheduler()), torch.tensor([0, 0])
    for call in (
        lambda **how: model(x, 5, **how),
        lambda **how: model(x, 5, "encoder_hidden_states", class_labels=labels, added_cond_kwargs={}, **how),
        lambda **how: conditional(x, 5, labels, **how),
        lambda **how: conditional(x, 5, class_labels=labels, encoder_hidden_states=None, **how),
    ):
        output, as_tuple = call(), call(return_dict=False)
        assert isinstance(output, ExactModelOutput) and output.sample.dtype is dtype
        assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
        assert torch.equal(output.sample, as_tuple[0]) and torch.equal(output[0], output.sample)
        torch.testing.assert_close(output.sample, model(x, 5).sample)


def test_the_conditional_model_predicts_each_sample_under_its_own_law():
    laws = [
        Gaussian(-1.0, variance=0.1),
        Gaussian(1.0, variance=0.3),
        GaussianMixture([1, 1], [-1.0, 1.0], [0.1, 0.3]),
    ]
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    model = ConditionalExactModel(laws, scheduler)
    x, labels, timesteps = randn(5, 1, 2, 2), torch.tensor([2, 0, 1, 0, 2]), torch.tensor([3, 100, 500, 900, 999])
    output = model(x, timesteps, labels).sample
    for i in range(5):
        alone = laws[labels[i]].as_model(scheduler)(x[i : i + 1], timesteps[i : i + 1]).sample
        torch.testing.assert_close(output[i : i + 1], alone)
    as_epsilon = ConditionalExactModel(laws, scheduler, "epsilon")(x, 500, labels).sample
    torch.testing.assert_close(as_epsilon[2:3], ExactModel(laws[1], scheduler, "epsilon")(x[2:3], 500).sample)


# ---- errors name the value and what was expected -------------------------------------------------------------------


class Untyped:
    """A scheduler that says nothing about its network."""

    config = {}  # noqa: RUF012


NAN = float("nan")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Gaussian(0.0), "exactly one of variance and covariance, got neither"),
        (lambda: Gaussian(0.0, variance=1.0, covariance=torch.eye(1)), "exactly one .*, got both"),
        (lambda: Gaussian(0.0, variance=-0.5), "variance must not be negative, got -0.5"),
        (lambda: Gaussian(NAN, variance=1.0), "mean must be finite, got .*nan"),
        (lambda: Gaussian(0.0, variance=math.inf), "variance must be finite, got .*inf"),
        (lambda: Gaussian(torch.zeros(2), variance=torch.ones(3)), r"broadcast to .* \(2,\), got \(3,\)"),
        (lambda: Gaussian(0.0, variance=torch.ones(3)), r"broadcast to .* \(\), got \(3,\)"),
        (lambda: Gaussian(torch.zeros(2, 2), covariance=torch.eye(2)), r"shape \(4, 4\) .*, got \(2, 2\)"),
        (lambda: Gaussian(torch.zeros(2), covariance=[[1.0, 0.2], [0.1, 1.0]]), "symmetric, got .*0.1"),
        (lambda: Gaussian(torch.zeros(2), covariance=[[1.0, 2.0], [2.0, 1.0]]), "semi-definite, got eigenvalue -1"),
        (lambda: GaussianMixture([1.0], 0.0, [1.0]), r"means must have shape .*, got \(\)"),
        (lambda: GaussianMixture([1.0], MEANS, COVARIANCES), r"weights must have shape \(3,\), .* got \(1,\)"),
        (lambda: GaussianMixture([1.0, -0.5, 1.0], MEANS, COVARIANCES), "negative .* got smallest -0.5"),
        (lambda: GaussianMixture([0.0, 0.0, 0.0], MEANS, COVARIANCES), "positive sum, got .*sum 0.0"),
        (lambda: GaussianMixture([1.0, NAN, 1.0], MEANS, COVARIANCES), "weights must be finite"),
        (lambda: GaussianMixture(WEIGHTS, MEANS, COVARIANCES[:2]), r"\(3, 2, 2\), \(3, 2\) or \(3,\) .* \(2, 2, 2\)"),
        (lambda: GaussianMixture(WEIGHTS, MEANS, -COVARIANCES), "positive semi-definite"),
        (lambda: FiniteData(torch.zeros(3, 2, dtype=torch.uint8)), "floating-point .* got torch.uint8"),
        (lambda: FiniteData(torch.zeros(0, 2)), r"N >= 1, got \(0, 2\)"),
        (lambda: FiniteData(torch.tensor([[1.0], [NAN]])), "points must be finite, got .*nan"),
        (lambda: FiniteData(POINTS, [1.0, 2.0]), r"weights must have shape \(7,\), .* got \(2,\)"),
        (lambda: FiniteData(POINTS, -POINT_WEIGHTS), "must not be negative"),
        (lambda: FiniteData(POINTS, block_size=0), "block_size must be at least 1, got 0"),
        (lambda: ExactModel(LAWS["full mixture"], DDPMScheduler(), "flow"), "epsilon, .*, got 'flow'"),
        (lambda: ExactModel(LAWS["full mixture"], Untyped()), "epsilon, .*flow_prediction, got None"),
        (lambda: ConditionalExactModel([], DDPMScheduler()), "at least one law"),
        (lambda: ConditionalExactModel(list(LAWS.values()), DDPMScheduler()), "all of one event shape"),
    ],
)
def test_a_law_that_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_law
def test_states_and_path_points_that_do_not_fit_are_refused(law):
    x = states(law, 3)
    for method in METHODS:
        evaluate = getattr(law, method)
        with pytest.raises(ValueError, match="sigma must not be negative, got -0.1"):
            evaluate(x, 1.0, torch.tensor([0.5, -0.1, 0.2]))
        with pytest.raises(ValueError, match="alpha must be finite, got .*nan"):
            evaluate(x, NAN, 0.5)
        with pytest.raises(ValueError, match=r"sigma must line up .* \(3,\), got \(2,\)"):
            evaluate(x, 1.0, torch.tensor([0.5, 0.1]))
        with pytest.raises(ValueError, match=r"alpha must line up .* \(3,\), got \(3, 1\)"):
            evaluate(x, torch.ones(3, 1), 0.5)
        with pytest.raises(ValueError, match="floating-point tensor, got torch.int64"):
            evaluate(x.long(), 1.0, 0.5)
        if law.event_shape:
            with pytest.raises(ValueError, match="x must have shape"):
                evaluate(x[..., :-1], 1.0, 0.5)
            with pytest.raises(ValueError, match=r"x must have shape .*, got \(\)"):
                evaluate(torch.zeros(()), 1.0, 0.5)
    with pytest.raises(ValueError, match="sigma must not be negative"):
        law.sample(3, 1.0, -1.0)


@pytest.mark.parametrize("method", METHODS)
def test_finite_data_without_noise_has_no_density(method):
    with pytest.raises(ValueError, match="only at sigma > 0, got sigma = 0.0"):
        getattr(LAWS["finite data"], method)(POINTS)
    with pytest.raises(ValueError, match="only at sigma > 0, got sigma = 0.0"):
        getattr(LAWS["finite data"], method)(POINTS[:2], 1.0, torch.tensor([0.5, 0.0]))


def test_a_covariance_may_be_symmetric_and_semi_definite_up_to_its_own_rounding():
    factor = randn(20, 5).float()
    covariance = factor @ factor.T  # rank 5 of 20, eigenvalues of about -1e-6 in float32
    covariance[0, 1] *= 1 + 1e-6
    assert torch.linalg.eigvalsh(covariance).min() < 0
    Gaussian(torch.zeros(20), covariance=covariance)
    with pytest.raises(ValueError, match="symmetric"):
        Gaussian(torch.zeros(20), covariance=covariance.double())


def test_small_variances_beside_large_ones_survive():
    variance = torch.tensor([1.0] * 199 + [1e-6])
    law = Gaussian(torch.zeros(200), covariance=variance.diag())
    torch.testing.assert_close(law.posterior_variance(torch.zeros(200), 0.0, 1.0), variance, rtol=1e-5, atol=0)


def test_path_points_that_are_on_no_table_are_refused():
    with pytest.raises(ValueError, match=r"0 \.\. 999, got 1000"):
        path_point(DDPMScheduler(), 1000)
    with pytest.raises(ValueError, match=r"0 \.\. 999, got -1"):
        path_point(DDPMScheduler(), -1)
    with pytest.raises(ValueError, match="whole.*got 3.5"):
        path_point(DDPMScheduler(), 3.5)
    with pytest.raises(ValueError, match="alphas_cumprod, got EDMDPMSolverMultistepScheduler"):
        path_point(EDMDPMSolverMultistepScheduler(), 3)
    for scheduler in FLOW_SCHEDULERS.values():
        for timestep in (-0.5, 1000.5, torch.tensor([3.0, 1001.0])):
            with pytest.raises(ValueError, match=r"0 \.\. 1000, got .*(-0\.5|1000\.5|1001)"):
                path_point(scheduler, timestep)


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([0, 2]), r"0 \.\. 1, got \[0, 2\]"),
        (torch.tensor([-1, 0]), r"0 \.\. 1, got \[-1, 0\]"),
        (torch.tensor([0]), r"shape \(2,\), got .* \(1,\)"),
        (torch.tensor([0.0, 1.0]), "integers .*, got torch.float32"),
    ],
)
def test_labels_without_a_law_are_refused(labels, message):
    model = ConditionalExactModel([LAWS["scalar mixture"], LAWS["scalar Gaussian"]], DDPMScheduler())
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(2, 1, 2, 2), 5, labels)


# ---- documentation -------------------------------------------------------------------------------------------------


def test_the_examples_in_the_documentation_are_true():
    result = doctest.testmod(exact)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("law", [Gaussian, GaussianMixture, FiniteData])
def test_no_law_overrides_what_all_laws_share(law):
    shared = {name for name in vars(Law) if not name.startswith("__")} - Law.__abstractmethods__ - {"_abc_impl"}
    assert {"sample", "denoise", "prediction"} <= shared
    assert not shared & set(vars(law))


# ---- another device ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_law
def test_results_follow_the_device_of_the_state_and_samples_that_of_the_law(law):
    x, sigma = states(law, 3), torch.tensor([0.5, 1.0, 2.0])
    for method in METHODS:
        result = getattr(law, method)(x.cuda(), 0.8, sigma)
        assert result.is_cuda
        torch.testing.assert_close(result.cpu(), getattr(law, method)(x, 0.8, sigma.cuda()))
    output = ConditionalExactModel([law], DDPMScheduler())(
        x.cuda(), torch.tensor(5).cuda(), torch.zeros(3).long().cuda()
    )
    torch.testing.assert_close(output.sample.cpu(), law.as_model(DDPMScheduler())(x, 5).sample)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_law_on_a_gpu_samples_there_from_a_generator_on_either_side():
    on_gpu = (
        Gaussian(torch.zeros(2).cuda(), covariance=torch.eye(2)),
        GaussianMixture(WEIGHTS, MEANS.cuda(), COVARIANCES),
        FiniteData(POINTS.cuda(), POINT_WEIGHTS),
    )
    for law in on_gpu:
        for device in ("cpu", "cuda"):
            first, second = (
                law.sample(4, 0.8, 0.6, generator=torch.Generator(device).manual_seed(0)) for _ in range(2)
            )
            assert first.is_cuda and torch.equal(first, second)
