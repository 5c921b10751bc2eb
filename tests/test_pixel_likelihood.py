"""Laws of an image: they sum to one, agree with SciPy and torch.distributions, and are what is drawn from them."""

import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from annealers.models.pixel_likelihood import (
    LIKELIHOODS,
    GaussianLikelihood,
    bits_per_dim,
    discretized_logistic_log_prob,
    levels_to_values,
    make_likelihood,
    uniform_like,
    values_to_levels,
)

ON_A_GRID = ("discretized_logistic", "discretized_mix_logistic")


def seed(number=0):
    return torch.Generator().manual_seed(number)


def normal(*shape, number=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seed(number), dtype=dtype)


def random_case(kind, channels=2, num_levels=4, batch=3, size=(2, 3), number=0, **options):
    """A likelihood, parameters and an image on its grid."""
    likelihood = make_likelihood(kind, channels, num_levels, **options)
    parameters = normal(batch, likelihood.parameter_channels, *size, number=number)
    levels = torch.randint(likelihood.num_levels, (batch, channels, *size), generator=seed(number + 1))
    return likelihood, parameters, levels_to_values(levels, likelihood.num_levels, torch.float64)


def every_image(channels, num_levels, dtype=torch.float64):
    """All images of one pixel, (num_levels ** channels, channels, 1, 1)."""
    levels = torch.tensor(list(itertools.product(range(num_levels), repeat=channels)))
    return levels_to_values(levels, num_levels, dtype)[:, :, None, None]


# ---- they sum to one ------------------------------------------------------------------------------------------------

MEANS = [-50.0, -1.0, -0.999, -0.3, 0.0, 1 / 255, 0.123456, 1.0, 1.002, 50.0]
LOG_SCALES = [-30.0, -7.0, -5.0, -3.0, 0.0, 3.0, 30.0]


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("log_scale", LOG_SCALES)
def test_a_logistic_law_of_256_values_sums_to_one_wherever_its_mean_and_however_wide(dtype, rounding, log_scale):
    x = levels_to_values(torch.arange(256), 256, dtype)
    means = torch.tensor(MEANS, dtype=dtype)[:, None]
    p = discretized_logistic_log_prob(x, means, torch.tensor(log_scale, dtype=dtype)).exp().sum(dim=1)
    # both neighbours of an edge round it, by up to 6e-8, and a law has its mass / (4 s) there at most
    rounded = 2 * 6e-8 * math.exp(-max(log_scale, -7.0)) / 4 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(p, torch.ones_like(p), rtol=0, atol=rounding + rounded)


@pytest.mark.parametrize("num_mixtures", [1, 3])
def test_the_joint_law_of_three_channels_sums_to_one_over_all_their_values(num_mixtures):
    likelihood = make_likelihood("discretized_mix_logistic", 3, num_levels=5, num_mixtures=num_mixtures)
    images = every_image(3, 5)
    assert len(images) == 5**3
    for number in range(4):
        parameters = 3 * normal(1, likelihood.parameter_channels, 1, 1, number=number)
        log_prob = likelihood.log_prob(parameters.expand(len(images), -1, -1, -1), images)
        assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in LIKELIHOODS if kind != "gaussian"])
def test_an_image_of_several_pixels_is_one_of_all_images_with_certainty(kind):
    likelihood, parameters, _ = random_case(kind, channels=1, num_levels=3, batch=1, size=(2, 2))
    pixels = every_image(4, likelihood.num_levels).reshape(-1, 1, 2, 2)
    assert len(pixels) == likelihood.num_levels**4
    log_prob = likelihood.log_prob(parameters.expand(len(pixels), -1, -1, -1), pixels)
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-12)


# ---- they are the laws of the libraries -----------------------------------------------------------------------------


def test_a_bernoulli_law_is_that_of_torch():
    likelihood, logits, x = random_case("bernoulli")
    truth = torch.distributions.Bernoulli(logits=logits)
    torch.testing.assert_close(likelihood.log_prob(logits, x), truth.log_prob((x + 1) / 2).sum((1, 2, 3)))
    torch.testing.assert_close(likelihood.mean(logits), 2 * truth.mean - 1)


@pytest.mark.parametrize("sigma", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_gaussian_law_is_that_of_torch(sigma, learn_sigma):
    likelihood, mean, x = random_case("gaussian", sigma=sigma, learn_sigma=learn_sigma)
    truth = torch.distributions.Normal(mean, sigma)
    torch.testing.assert_close(
        likelihood.double().log_prob(mean, x), truth.log_prob(x).sum((1, 2, 3)), rtol=1e-5, atol=0
    )
    assert torch.equal(likelihood.mean(mean), mean)


def scipy_log_prob(x, mean, log_scale, num_levels):
    """Of one value: the mass that SciPy's logistic law has on the interval of x, to infinity at both ends."""
    half_width, law = 1 / (num_levels - 1), scipy.stats.logistic(mean, math.exp(max(log_scale, -7.0)))
    lower = -math.inf if x < -1 + half_width else x - half_width
    upper = math.inf if x > 1 - half_width else x + half_width
    mass = law.cdf(upper) - law.cdf(lower) if x <= mean else law.sf(lower) - law.sf(upper)  # the accurate difference
    return math.log(mass)


@pytest.mark.parametrize("num_levels", [2, 5, 256])
@pytest.mark.parametrize("log_scale", [-9.0, -7.0, -4.0, -1.0, 2.0])
def test_a_logistic_law_has_the_mass_of_scipys_on_the_interval_of_each_value(num_levels, log_scale):
    x = levels_to_values(torch.arange(num_levels), num_levels, torch.float64)
    near = 100 * math.exp(max(log_scale, -7.0))  # farther away a difference of SciPy's is zero
    for mean in (-1.2, -0.3, 0.0, 0.77):
        got = discretized_logistic_log_prob(x, torch.tensor(mean), torch.tensor(log_scale), num_levels)
        for value, log_prob in zip(x.tolist(), got.tolist(), strict=True):
            if abs(value - mean) < near:
                expected = scipy_log_prob(value, float(torch.tensor(mean)), log_scale, num_levels)
                assert log_prob == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_logistic_likelihood_takes_means_and_then_logarithms_of_scales():
    likelihood, parameters, x = random_case("discretized_logistic", channels=3)
    expected = [
        sum(
            scipy_log_prob(x[b, c, i, j], parameters[b, c, i, j], parameters[b, 3 + c, i, j], 4)
            for c, i, j in itertools.product(range(3), range(2), range(3))
        )
        for b in range(3)
    ]
    assert likelihood.log_prob(parameters, x).tolist() == pytest.approx(expected, rel=1e-9)


def test_a_mixture_is_a_weighted_sum_over_components_of_products_over_channels_that_know_those_before():
    M, C, K = 3, 3, 4
    likelihood, parameters, x = random_case("discretized_mix_logistic", channels=C, num_levels=K, num_mixtures=M)

    def pixel(p, value):
        """By the layout that the class documents, with plain numbers."""
        weights = np.exp(p[:M]) / np.exp(p[:M]).sum()
        means, log_scales = p[M : M + M * C].reshape(M, C), p[M + M * C : M + 2 * M * C].reshape(M, C)
        raw = np.tanh(p[M + 2 * M * C :].reshape(M, 3))
        total = 0.0
        for j in range(M):
            shifts = [0.0, raw[j, 0] * value[0], raw[j, 1] * value[0] + raw[j, 2] * value[1]]
            logs = [scipy_log_prob(value[c], means[j, c] + shifts[c], log_scales[j, c], K) for c in range(C)]
            total += weights[j] * math.exp(sum(logs))
        return math.log(total)

    p, values = parameters.numpy(), x.numpy()
    expected = [sum(pixel(p[b, :, i, j], values[b, :, i, j]) for i in range(2) for j in range(3)) for b in range(3)]
    assert likelihood.log_prob(parameters, x).tolist() == pytest.approx(expected, rel=1e-9)


def test_the_parameters_of_a_mixture_of_one_channel_are_a_weight_a_mean_and_a_scale_each():
    counts = {
        (channels, M): make_likelihood("discretized_mix_logistic", channels, num_mixtures=M).parameter_channels
        for channels in (1, 2, 3)
        for M in (1, 10)
    }
    assert counts == {(1, 1): 3, (1, 10): 30, (2, 1): 6, (2, 10): 60, (3, 1): 10, (3, 10): 100}


# ---- a density of dequantised values bounds the probability of the image --------------------------------------------


@pytest.mark.parametrize(("sigma", "num_levels"), [(0.004, 256), (0.02, 256), (0.3, 256), (0.2, 8)])
def test_the_expected_density_of_dequantised_values_bounds_their_probability_from_above(sigma, num_levels):
    likelihood = GaussianLikelihood(1, num_levels, sigma).double()
    h, gaps = 1 / (num_levels - 1), []
    for mean, level in [(0.0, num_levels // 2), (0.1, num_levels // 2), (-0.9, 0)]:
        x = levels_to_values(torch.tensor(level), num_levels, torch.float64).item()

        def nats(u, x=x, mean=mean):
            values = torch.full((1, 1, 1, 1), x + u, dtype=torch.float64)
            return -likelihood.log_prob(torch.full_like(values, mean), values).item()

        expected = scipy.integrate.quad(nats, -h, h)[0] / (2 * h)
        sigma_of_likelihood = likelihood.log_sigma.exp().item()
        law = scipy.stats.norm(mean, sigma_of_likelihood)
        truth = -math.log(law.cdf(x + h) - law.cdf(x - h)) if x <= mean else -math.log(law.sf(x - h) - law.sf(x + h))
        gaps.append(expected + likelihood.nats_per_value - truth)
        assert gaps[-1] >= -1e-9
    assert max(gaps) > 1e-6  # else the test could not tell a bound from an equation
    if sigma >= 0.1:
        assert max(gaps) < 0.05  # and it is tight where the density is nearly constant on the interval of a value


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_bits_for_each_value_are_nats_over_their_number_and_the_logarithm_of_two(kind):
    likelihood, _, x = random_case(kind, num_levels=256)
    shape, nats = tuple(x.shape[1:]), torch.tensor([math.log(2) * 12])
    constant = math.log2(255 / 2) if kind == "gaussian" else 0.0
    assert bits_per_dim(nats, likelihood, shape).item() == pytest.approx(1 + constant)


def test_a_uniform_law_has_eight_bits_for_each_value():
    likelihood = make_likelihood("discretized_mix_logistic", 1, num_mixtures=256)
    means = levels_to_values(torch.arange(256), 256, torch.float64)  # a component on each value
    parameters = torch.cat([torch.zeros(256), means, torch.full((256,), -7.0)])[None, :, None, None].double()
    x = levels_to_values(torch.tensor([[[[0, 93, 255]]]]), 256, torch.float64)
    nats = -likelihood.log_prob(parameters.expand(1, -1, 1, 3), x)
    assert bits_per_dim(nats, likelihood, (1, 1, 3)).item() == pytest.approx(
        8, abs=0.02
    )  # the ends have a little more


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_scale", [-30.0, -7.0, -2.0, 5.0])
@pytest.mark.parametrize("x", [-1.0, -1 + 2 / 255, 1 / 255, 1.0])
def test_the_gradient_is_finite_and_leads_the_mean_to_the_value_from_however_far(dtype, log_scale, x):
    far = torch.tensor([-1000.0, -30.0, -2.0, 2.0, 30.0, 1000.0], dtype=dtype, requires_grad=True)
    scale = torch.full_like(far, log_scale).requires_grad_()
    log_prob = discretized_logistic_log_prob(torch.full_like(far, x), far, scale)
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and far.grad.isfinite().all() and scale.grad.isfinite().all()
    beyond = far * x > 0 if abs(x) == 1 else torch.zeros_like(far, dtype=torch.bool)
    assert torch.equal(far.grad.sign()[~beyond], -far.sign()[~beyond])
    assert (far.grad[beyond] * x >= 0).all()  # the outer values reach to infinity: farther is better still
    if log_scale == -2.0:
        assert (scale.grad[~beyond] > 0).all()  # a wider law reaches the value better
    if log_scale == -30.0:
        assert (scale.grad == 0).all()  # below the smallest scale


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_gradients_agree_with_differences(kind):
    likelihood, parameters, x = random_case(kind, batch=1, size=(1, 2), **{"num_mixtures": 2})
    assert torch.autograd.gradcheck(lambda p: likelihood.double().log_prob(p, x), (parameters.requires_grad_(),))


def test_the_best_sigma_of_a_gaussian_is_the_root_of_the_mean_squared_error():
    x, mean = normal(5, 3, 4, 4, number=1), normal(5, 3, 4, 4, number=2)
    error = (x - mean).pow(2).mean().sqrt().item()
    for factor, sign in [(0.9, -1), (1.0, 0), (1.1, 1)]:
        likelihood = GaussianLikelihood(3, sigma=factor * error, learn_sigma=True).double()
        (-likelihood.log_prob(mean, x).sum()).backward()
        gradient = likelihood.log_sigma.grad.item() / x.numel()
        assert gradient == pytest.approx(0, abs=1e-6) if sign == 0 else gradient * sign > 0.05


def test_a_fixed_sigma_is_no_parameter_but_is_saved():
    fixed, learnt = GaussianLikelihood(1, sigma=0.3), GaussianLikelihood(1, sigma=0.3, learn_sigma=True)
    assert list(fixed.parameters()) == [] and len(list(learnt.parameters())) == 1
    assert fixed.state_dict().keys() == learnt.state_dict().keys() == {"log_sigma"}
    assert fixed.log_sigma.exp().item() == pytest.approx(0.3)


# ---- draws and means ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bernoulli", "discretized_logistic", "discretized_mix_logistic"])
@pytest.mark.parametrize("number", [0, 1])
def test_images_are_drawn_as_often_as_they_are_likely(kind, number):
    likelihood, parameters, _ = random_case(kind, channels=2, num_levels=4, batch=1, size=(1, 1), number=number)
    images, n, parameters = every_image(2, likelihood.num_levels), 40_000, parameters / 2
    p = likelihood.log_prob(parameters.expand(len(images), -1, -1, -1), images).exp()
    drawn = likelihood.draw(parameters.expand(-1, -1, 1, n), seed(number))  # (1, 2, 1, n)
    levels = values_to_levels(drawn, likelihood.num_levels)[0, :, 0]
    assert torch.equal(levels_to_values(levels, likelihood.num_levels, torch.float64), drawn[0, :, 0])
    counts = torch.bincount(levels[0] * likelihood.num_levels + levels[1], minlength=len(images))
    expected = n * p
    assert (expected > 5).all()  # where the test is one
    assert scipy.stats.chisquare(counts.numpy(), (expected * n / expected.sum()).numpy()).pvalue > 0.001
    shifted = torch.roll(expected, 1)  # it can fail
    assert scipy.stats.chisquare(counts.numpy(), (shifted * n / shifted.sum()).numpy()).pvalue < 1e-12


def test_a_gaussian_is_drawn_with_its_sigma():
    likelihood = GaussianLikelihood(1, sigma=0.3)
    drawn = likelihood.draw(torch.full((1, 1, 200, 200), 0.5), seed())
    assert scipy.stats.kstest(drawn.flatten().numpy(), scipy.stats.norm(0.5, 0.3).cdf).pvalue > 0.001


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_the_mean_is_the_expectation_of_the_values(kind):
    """For laws well inside of -1 to 1 and wide against the grid, where rounding and the ends change nothing."""
    likelihood = make_likelihood(kind, 2, num_levels=64, num_mixtures=3, sigma=0.1)
    parameters = 0.4 * normal(1, likelihood.parameter_channels, 1, 1).clamp(-1, 1)
    if kind == "discretized_logistic":
        parameters[:, 2:] = -3.5
    if kind == "discretized_mix_logistic":
        parameters[:, 9:15] = -3.5
    mean = likelihood.mean(parameters)
    if kind == "gaussian":
        grid = torch.linspace(-2, 2, 401, dtype=torch.float64)
        images = torch.cartesian_prod(grid, grid)[:, :, None, None]
    else:
        images = every_image(2, likelihood.num_levels)
    p = likelihood.double().log_prob(parameters.expand(len(images), -1, -1, -1), images).exp()
    expectation = (p[:, None, None, None] * images).sum(0, keepdim=True) / p.sum()
    torch.testing.assert_close(mean, expectation, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ON_A_GRID)
def test_the_mean_of_values_on_a_grid_lies_on_it(kind):
    likelihood, parameters, _ = random_case(kind)
    mean = likelihood.mean(50 * parameters)
    assert mean.shape == (3, 2, 2, 3) and mean.min() >= -1 and mean.max() <= 1
    drawn = likelihood.draw(50 * parameters, seed())
    assert drawn.min() >= -1 and drawn.max() <= 1


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_with_a_generator_each_an_image_is_drawn_by_itself(kind):
    likelihood, parameters, _ = random_case(kind)
    together = likelihood.draw(parameters, [seed(1), seed(2), seed(3)])
    alone = torch.cat([likelihood.draw(parameters[i : i + 1], [seed(i + 1)]) for i in range(3)])
    assert torch.equal(together, alone) and together.shape == (3, 2, 2, 3)
    assert torch.equal(likelihood.draw(parameters, seed()), likelihood.draw(parameters, seed()))
    assert not torch.equal(likelihood.draw(parameters, seed(0)), likelihood.draw(parameters, seed(1)))


def test_another_number_of_generators_than_images_is_refused():
    with pytest.raises(ValueError, match="one generator for each of 3 samples, got 2"):
        uniform_like(torch.zeros(3, 1), [seed(), seed()])


def test_uniform_numbers_are_never_zero_or_one_and_have_at_least_single_precision():
    class Ends(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            drawn = function(*args, **(kwargs or {}))
            if function is torch.rand:
                drawn.flatten()[0], drawn.flatten()[1] = 0.0, 1.0
            return drawn

    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        with Ends():
            u = uniform_like(torch.zeros(4, dtype=dtype), seed())
        assert u.dtype == torch.promote_types(dtype, torch.float32) and u.min() > 0 and u.max() < 1
        assert (u.log() - torch.log1p(-u)).isfinite().all()  # a logistic draw
        assert (-torch.log(-torch.log(u))).isfinite().all()  # a Gumbel draw


# ---- levels and values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", [2, 3, 8, 256])
def test_levels_become_values_from_minus_one_to_one_and_back(num_levels):
    k = torch.arange(num_levels)
    x = levels_to_values(k, num_levels)
    assert x[0] == -1 and x[-1] == 1 and torch.allclose(x.diff(), torch.tensor(2 / (num_levels - 1)))
    assert torch.equal(values_to_levels(x, num_levels), k)
    nudge = 0.49 * 2 / (num_levels - 1)
    assert torch.equal(values_to_levels(x + nudge, num_levels), k)
    assert torch.equal(values_to_levels(x - nudge, num_levels), k)


def test_the_values_of_256_levels_are_those_of_eight_bit_images():
    pixels = np.arange(256, dtype=np.uint8)
    x = torch.from_numpy(pixels / np.float32(255)) * 2 - 1  # as images come from the data
    assert torch.equal(values_to_levels(x, 256), torch.arange(256))
    torch.testing.assert_close(levels_to_values(torch.arange(256), 256), x, rtol=0, atol=1e-7)


# ---- precision, compilation, errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_are_judged_in_single_precision(kind, dtype):
    likelihood, parameters, x = random_case(kind, num_levels=256, size=(16, 16))
    parameters, x = parameters.to(dtype), x.float()
    got = likelihood.log_prob(parameters, x)
    assert got.dtype == torch.float32
    assert torch.equal(got, likelihood.log_prob(parameters.float(), x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(got, likelihood.log_prob(parameters, x))
    assert likelihood.draw(parameters, seed()).dtype == likelihood.mean(parameters).dtype == dtype


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_a_law_is_compiled_in_one_piece(kind):
    likelihood, parameters, x = random_case(kind)
    compiled = torch.compile(likelihood.log_prob, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(parameters, x), likelihood.log_prob(parameters, x))


@pytest.mark.parametrize("grey", [0.0, 0.999, -2.0])
def test_grey_pixels_are_no_bernoulli_draw(grey):
    likelihood, parameters, x = random_case("bernoulli")
    x[1, 0, 1, 2] = grey
    with pytest.raises(ValueError, match=f"values -1 and 1 only, got {grey:.4g}; binarise"):
        likelihood.log_prob(parameters, x)


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_shapes_that_would_broadcast_are_refused(kind):
    likelihood, parameters, x = random_case(kind)
    P = likelihood.parameter_channels
    for wrong_parameters, wrong_x in [(parameters, x[:1]), (parameters, x[:, :1]), (parameters[:, :-1], x)]:
        with pytest.raises(ValueError, match=rf"parameters \(B, {P}, H, W\) and a sample \(B, 2, H, W\), got"):
            likelihood.log_prob(wrong_parameters, wrong_x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "laplace"}, "one of .*'bernoulli', .*, got 'laplace'"),
        ({"kind": "gaussian", "sigma": 0.0}, "sigma > 0, got 0.0"),
        ({"kind": "gaussian", "sigma": math.nan}, "sigma > 0, got nan"),
        ({"kind": "discretized_mix_logistic", "num_mixtures": 0}, "num_mixtures >= 1, got 0"),
        ({"kind": "discretized_logistic", "num_levels": 1}, "got 1 and 1"),
        ({"kind": "bernoulli", "channels": 0}, "got 0 and 2"),
    ],
)
def test_a_law_that_is_none_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_likelihood(**{"channels": 1, **arguments})
