r"""Likelihoods against closed forms.

Flow. For Gaussian data and V_i = alpha_i^2 l + sigma_i^2 along an eigenvector of the covariance, the flow from level 0
to level 1 is affine, x_1 - alpha_1 m = sqrt(V_1 / V_0) (x_0 - alpha_0 m). So the density that N(0, I) at level 1 gives
to data is normal, whatever the last level leaves of the data,

    x_0 / alpha_0 ~ N(m - alpha_1 / alpha_0 sqrt(V_0 / V_1) m, V_0 / (alpha_0^2 V_1)).

Bound. Expectations over data and noise are exact: what is averaged is a quadratic, and the two-point rule +-1
integrates quadratics of a standard normal exactly; other integrands get the quantiles of the noise. For data N(M, S),

    E KL of a step = 1/2 (log(v / w) + w / v - 1 + c^2 E|x_0 - x̂_0|^2 / v),    E|x_0 - x̂_0|^2 = sigma^2 S / V,

with the variance w and the weight c of x_0 in q(x_s | x_t, x_0), the product of two normal densities, and the variance
v of the model.
"""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    ScoreSdeVeScheduler,
    UNet2DModel,
)
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence

from annealers import ColdDiffusionScheduler, DDPMAncestralScheduler, likelihood
from annealers.calibration import bound_of_schedule
from annealers.data import to_images
from annealers.divergence import draw_probes
from annealers.exact import FiniteData, Gaussian, GaussianMixture
from annealers.likelihood import (
    BitsPerDim,
    NetworkNoise,
    chain_scheduler,
    dequantised,
    discrete_bits,
    probability_flow_bits,
    probability_flow_log_prob,
    variational_bound,
    variational_bounds,
)
from annealers.losses import decoder_term, divergence_term, variational_bound_term

LINEAR = {"num_train_timesteps": 1000}
COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
LADDER = {"num_train_timesteps": 100, "beta_schedule": "geometric", "sigma_min": 0.01, "sigma_max": 500.0}
SUB_VP = {"num_train_timesteps": 1000, "beta_schedule": "sub_vp"}
FLOW = {"num_train_timesteps": 1000, "prediction_type": "flow_prediction"}
PATHS = {"linear": LINEAR, "cosine": COSINE, "geometric": LADDER, "sub_vp": SUB_VP, "flow": FLOW}
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction", "score"]
SHORT = {"num_train_timesteps": 40, "beta_end": 0.2}
SHORT_PATHS = {
    "linear": SHORT,
    "cosine": {"num_train_timesteps": 40, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "geometric": {**LADDER, "num_train_timesteps": 40, "prediction_type": "sample"},
    "flow": {**FLOW, "num_train_timesteps": 40},
    "zero_snr": {**SHORT, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}
M, S = 0.3, 0.25  # mean and variance of the Gaussian data
MEANS = torch.tensor([0.3, -0.5, 0.1, 0.0], dtype=torch.float64)
VARIANCES = torch.tensor([0.25, 0.6, 0.01, 0.05], dtype=torch.float64)
FACTOR = torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
COVARIANCE = 0.1 * FACTOR @ FACTOR.T + 0.02 * torch.eye(4, dtype=torch.float64)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def build(config, **more):
    return DDPMAncestralScheduler(**{"clip_sample": False, **config, **more})


def ends(scheduler):
    """The first and the last noise ratio with signal."""
    alpha, sigma = scheduler.signal_and_noise(torch.as_tensor(scheduler.train_timesteps))
    ratio = (sigma / alpha)[alpha > 0]
    return ratio[0].item(), ratio[-1].item()


def variance_preserving(ratio):
    return 1 / math.sqrt(1 + ratio**2), ratio / math.sqrt(1 + ratio**2)


def exact_noise(law):
    def noise_prediction(x, ratio, rows):
        alpha = 1 / (1 + ratio**2).sqrt()
        return law.noise(x, alpha, alpha * ratio)

    return noise_prediction


def flow_density(x, mean, covariance, smallest, largest):
    """log p of the flow's normal density, see above; x is (B, d)."""
    (alpha_0, sigma_0), (alpha_1, sigma_1) = variance_preserving(smallest), variance_preserving(largest)
    values, vectors = torch.linalg.eigh(covariance)
    V_0, V_1 = alpha_0**2 * values + sigma_0**2, alpha_1**2 * values + sigma_1**2
    root = vectors @ torch.diag((V_0 / V_1).sqrt()) @ vectors.T
    density = MultivariateNormal(mean - alpha_1 / alpha_0 * root @ mean, root @ root / alpha_0**2)
    return density.log_prob(x)


def bits(nats, d=1):
    return nats / (d * math.log(2))


# ---- the probability flow -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("covariance", [torch.diag(VARIANCES), COVARIANCE], ids=["diagonal", "full"])
def test_the_flow_of_gaussian_data_has_the_true_likelihood(name, covariance):
    law, (smallest, largest) = Gaussian(MEANS, covariance=covariance), ends(build(PATHS[name]))
    x = law.sample(5, generator=seeded(1))
    found = probability_flow_log_prob(exact_noise(law), x, smallest, largest)
    truth = flow_density(x, MEANS, covariance, smallest, largest)
    assert bits(found.log_prob - truth, 4).abs().max() < 1e-4
    data = MultivariateNormal(MEANS, covariance + smallest**2 * torch.eye(4, dtype=torch.float64)).log_prob(x)
    assert bits(truth - data, 4).abs().max() < 1e-2  # what the last level leaves of the data is little
    assert (found.calls > 12).all() and found.calls.dtype == torch.int64


def test_data_with_much_noise_have_the_density_of_their_own_units():
    """It is not that of the variance-preserving coordinates, which are smaller by sqrt(1 + ς^2)."""
    law = Gaussian(MEANS, covariance=COVARIANCE)
    x = law.sample(5, sigma=2.0, generator=seeded(1))
    found = probability_flow_log_prob(exact_noise(law), x, 2.0, 500.0)
    assert bits(found.log_prob - flow_density(x, MEANS, COVARIANCE, 2.0, 500.0), 4).abs().max() < 1e-4


def test_the_flow_of_a_mixture_on_a_line_has_the_true_likelihood():
    weights, means, variances = torch.tensor([0.3, 0.7]), torch.tensor([-0.6, 0.4]), torch.tensor([0.01, 0.09])
    law = GaussianMixture(weights, means, variances)
    x = torch.tensor([-0.8, -0.6, -0.1, 0.2, 0.9], dtype=torch.float64)
    found = probability_flow_log_prob(exact_noise(law), x, 0.01, 5e4, None, 1e-6, 1e-6)
    parts = Normal(means.double(), (variances.double() + 0.01**2).sqrt())
    truth = MixtureSameFamily(Categorical(weights.double()), parts).log_prob(x)
    assert bits(found.log_prob - truth).abs().max() < 1e-4


def test_the_flow_of_a_mixture_in_the_plane_has_the_true_likelihood():
    means, variances = torch.tensor([[0.5, 0.5], [-0.5, 0.2], [0.0, -0.6]]), torch.tensor([0.02, 0.05, 0.01])
    law = GaussianMixture([0.2, 0.5, 0.3], means, variances)
    x = law.sample(6, generator=seeded(2)).double()
    found = probability_flow_log_prob(exact_noise(law), x, 0.01, 5e4, None, 1e-6, 1e-6)
    covariances = (variances + 0.01**2)[:, None, None] * torch.eye(2)
    parts = MultivariateNormal(means, covariances)
    truth = MixtureSameFamily(Categorical(torch.tensor([0.2, 0.5, 0.3])), parts).log_prob(x)
    assert bits(found.log_prob - truth, 2).abs().max() < 1e-4


def test_the_latent_is_where_the_flow_leads():
    law = Gaussian(MEANS, covariance=COVARIANCE)
    x = law.sample(5, generator=seeded(1))
    found = probability_flow_log_prob(exact_noise(law), x, 0.01, 200.0)
    (alpha_0, sigma_0), (alpha_1, sigma_1) = variance_preserving(0.01), variance_preserving(200.0)
    values, vectors = torch.linalg.eigh(COVARIANCE)
    gain = ((alpha_1**2 * values + sigma_1**2) / (alpha_0**2 * values + sigma_0**2)).sqrt()
    expected = alpha_1 * MEANS + alpha_0 * (x - MEANS) @ vectors * gain @ vectors.T
    torch.testing.assert_close(found.latent, expected, rtol=1e-3, atol=1e-3)


def test_one_rademacher_probe_is_exact_where_coordinates_are_independent():
    law = Gaussian(MEANS, variance=VARIANCES)
    x = law.sample(5, generator=seeded(1))
    exact = probability_flow_log_prob(exact_noise(law), x, 0.01, 200.0)
    probed = probability_flow_log_prob(exact_noise(law), x, 0.01, 200.0, draw_probes(x, 1, generator=seeded(2)))
    torch.testing.assert_close(probed.log_prob, exact.log_prob, rtol=0, atol=1e-9)


def test_probes_have_no_bias_and_the_variance_of_a_symmetric_jacobian():
    """For Gaussian data the Jacobian does not depend on x: its integral J has tr J = log det and the variance of
    v^T J v over all signs is the sum of 2 J_ij^2 over i != j.
    """
    law = Gaussian(MEANS, covariance=COVARIANCE)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)  # (16, 4)
    x = law.sample(1, generator=seeded(1)).expand(16, 4)
    found = probability_flow_log_prob(exact_noise(law), x, 0.01, 200.0, signs[None]).log_prob
    assert bits(found.mean() - flow_density(x[0], MEANS, COVARIANCE, 0.01, 200.0), 4).abs() < 1e-4

    (alpha_0, sigma_0), (alpha_1, sigma_1) = variance_preserving(0.01), variance_preserving(200.0)
    values, vectors = torch.linalg.eigh(COVARIANCE)
    logarithm = 0.5 * ((alpha_1**2 * values + sigma_1**2) / (alpha_0**2 * values + sigma_0**2)).log()
    J = vectors @ torch.diag(logarithm) @ vectors.T
    variance = 2 * ((J**2).sum() - (J.diagonal() ** 2).sum())
    assert found.var(correction=0).item() == pytest.approx(variance.item(), rel=1e-3)


def test_a_density_does_not_depend_on_the_batch_though_each_sample_has_steps_of_its_own():
    law = GaussianMixture([0.5, 0.5], [[-0.5, 0.1], [0.5, 0.0]], [0.01, 0.02])
    x = torch.tensor([[0.0, 0.0], [-0.5, 0.1], [0.3, 3.0], [-20.0, 5.0]], dtype=torch.float64)
    probes = draw_probes(x, 2, "gaussian", seeded(3))
    together = probability_flow_log_prob(exact_noise(law), x, 0.01, 200.0, probes)
    assert len(together.calls.unique()) > 2
    for i in range(len(x)):
        alone = probability_flow_log_prob(exact_noise(law), x[i : i + 1], 0.01, 200.0, probes[:, i : i + 1])
        torch.testing.assert_close(alone.log_prob[0], together.log_prob[i], rtol=1e-12, atol=1e-12)
        assert alone.calls[0] == together.calls[i]


@pytest.mark.parametrize(("smallest", "largest"), [(0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (0.1, math.inf)])
def test_noise_ratios_that_make_no_flow_are_refused(smallest, largest):
    with pytest.raises(ValueError, match=f"got {smallest} and {largest}"):
        probability_flow_log_prob(exact_noise(Gaussian(0.0, variance=1.0)), torch.zeros(2), smallest, largest)


# ---- a network along the flow ---------------------------------------------------------------------------------------

RATIOS = np.geomspace(0.02, 400.0, 40)
STRAIGHT = {  # a table of betas on which log ς is linear in t, so that fractional timesteps have a closed form
    "num_train_timesteps": 40,
    "trained_betas": (1 - np.divide(*np.stack([1 / (1 + RATIOS**2), [1, *1 / (1 + RATIOS[:-1] ** 2)]]))).tolist(),
}


def exact_network(law, prediction_type):
    """A network that is exact at fractional timesteps too, on the straight table or on the flow path of T = 40."""

    def network(sample, timestep):
        t = timestep.double()
        if prediction_type == "flow_prediction":
            alpha, sigma = 1 - t / 40, t / 40
        else:
            ratio = 0.02 * (400.0 / 0.02) ** (t / 39)
            alpha = 1 / (1 + ratio**2).sqrt()
            sigma = alpha * ratio
        return law.prediction(prediction_type, sample, alpha, sigma)

    return network


@pytest.mark.parametrize("prediction_type", [*PREDICTION_TYPES, "flow_prediction"])
def test_a_network_of_any_prediction_type_gives_the_noise_between_its_timesteps(prediction_type):
    law = GaussianMixture([0.3, 0.7], [[-0.6, 0.2], [0.4, 0.0]], [0.01, 0.09])
    scheduler = build(STRAIGHT, prediction_type=prediction_type)
    noise = NetworkNoise(exact_network(law, prediction_type), scheduler)
    assert (noise.smallest_ratio, noise.largest_ratio) == pytest.approx(ends(scheduler))
    ratio = torch.linspace(math.log(noise.smallest_ratio), math.log(noise.largest_ratio), 7, dtype=torch.float64).exp()
    assert not torch.equal(noise.timesteps(ratio), noise.timesteps(ratio).round())
    x, alpha = draw(7, 2), 1 / (1 + ratio**2).sqrt()
    torch.testing.assert_close(
        noise(x, ratio, torch.arange(7)), law.noise(x, alpha, alpha * ratio), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", PATHS)
def test_timesteps_of_the_table_are_met_exactly_and_others_lie_between_in_order(name):
    scheduler = build(PATHS[name])
    noise = NetworkNoise(None, scheduler)
    timesteps = torch.as_tensor(scheduler.train_timesteps)
    alpha, sigma = scheduler.signal_and_noise(timesteps)
    known = (sigma / alpha)[alpha > 0]
    torch.testing.assert_close(noise.timesteps(known), timesteps[: len(known)].double(), rtol=0, atol=1e-8)
    between = noise.timesteps((known[1:] * known[:-1]).sqrt())
    assert ((between > timesteps[: len(known) - 1]) & (between < timesteps[1 : len(known)])).all()
    beyond = noise.timesteps(torch.tensor([known[0] * (1 - 1e-12), known[-1] * (1 + 1e-12)], dtype=torch.float64))
    assert (
        timesteps[0] <= beyond[0] + 1e-9 and beyond[1] <= timesteps[len(known) - 1] + 1e-9
    )  # networks may have no timestep there


@pytest.mark.parametrize("config", [STRAIGHT, {**FLOW, "num_train_timesteps": 40}], ids=["table", "flow"])
def test_bits_of_a_network_are_those_of_the_closed_form_on_the_same_dequantised_images(config):
    scheduler = build(config)
    law = Gaussian(MEANS.reshape(1, 2, 2), covariance=COVARIANCE)
    images = to_images(law.sample(4, generator=seeded(1))).double() / 127.5 - 1
    network = exact_network(law, scheduler.config.prediction_type)
    found = probability_flow_bits(network, scheduler, images, probes=None, generator=seeded(2))
    x = dequantised(images, seeded(2)).reshape(4, 4)
    truth = -flow_density(x, MEANS, COVARIANCE, *ends(scheduler)) / (4 * math.log(2)) + math.log2(255 / 2)
    assert (found.values - truth).abs().max() < 1e-4
    assert found.kind == "probability flow, exact divergence, uniform dequantisation"
    assert found.calls.shape == (4,)


def test_bits_follow_the_generators_of_each_image_and_not_its_neighbours():
    scheduler, law = build(STRAIGHT), Gaussian(MEANS.reshape(1, 2, 2), covariance=COVARIANCE)
    images = to_images(law.sample(3, generator=seeded(1))).double() / 127.5 - 1
    network = exact_network(law, "epsilon")
    together = probability_flow_bits(network, scheduler, images, 2, generator=[seeded(i) for i in range(3)])
    alone = probability_flow_bits(network, scheduler, images[2:], 2, generator=[seeded(2)])
    torch.testing.assert_close(alone.values[0], together.values[2], rtol=1e-12, atol=1e-12)
    assert together.kind == "probability flow, 2 rademacher probes, uniform dequantisation"


def test_conditions_follow_their_samples_when_others_have_arrived():
    laws = [Gaussian(0.3, variance=0.01), Gaussian(-0.2, variance=0.3)]
    scheduler = build(STRAIGHT)

    def network(sample, timestep, class_labels, strength):
        assert strength == 1.0 and len(class_labels) == len(sample)
        outputs = [exact_network(law, "epsilon")(sample, timestep) for law in laws]
        return torch.where(class_labels[:, None] == 0, *outputs)

    images, labels = torch.zeros(4, 1, dtype=torch.float64), torch.tensor([1, 0, 0, 1])
    generators = [seeded(0) for _ in range(4)]
    together = probability_flow_bits(
        network, scheduler, images, generator=generators, class_labels=labels, strength=1.0
    )
    assert len(together.calls.unique()) == 2
    assert together.values[0] == together.values[3] and together.values[1] == together.values[2]
    apart = [
        probability_flow_bits(exact_network(law, "epsilon"), scheduler, images[:1], generator=seeded(0))
        for law in laws
    ]
    torch.testing.assert_close(together.values[:2], torch.cat([apart[1].values, apart[0].values]))


def test_a_uniform_density_over_the_bins_has_eight_bits():
    for d in (1, 3, 3072):
        log_density = torch.tensor([-d * math.log(512 / 255)], dtype=torch.float64)  # on [-1 - 1/255, 1 + 1/255]^d
        assert discrete_bits(log_density, d).item() == pytest.approx(8, abs=1e-12)


def test_the_flow_of_uniform_levels_has_eight_bits():
    """All 256 levels with the noise of one level: between them the density is flat but for 1e-8."""
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None]
    scheduler = build({**LADDER, "num_train_timesteps": 200, "sigma_min": 2 / 255})

    def network(sample, timestep):
        ratio = 2 / 255 * (500.0 * 255 / 2) ** (timestep.double() / 199)
        alpha = 1 / (1 + ratio**2).sqrt()
        return FiniteData(levels).noise(sample, alpha, alpha * ratio)

    found = probability_flow_bits(network, scheduler, levels[20:236:27], relative_tolerance=1e-6, generator=seeded(0))
    assert (found.values - 8).abs().max() < 1e-4


def test_dequantised_images_are_uniform_on_their_bins():
    images = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).repeat(200)
    offset = (dequantised(images, seeded(0)) - images) * 255 / 2  # in units of a level
    assert 0.499 < offset.abs().max() <= 0.5
    assert scipy.stats.kstest(offset + 0.5, "uniform").pvalue > 1e-3
    assert abs(offset.mean()) < 4 * math.sqrt(1 / 12 / len(images))  # the mean is that of the image


def test_dequantisation_follows_the_generator_of_each_image_and_is_not_lost_in_half_precision():
    images = LEVELS.reshape(32, 8).float()
    together = dequantised(images, [seeded(i) for i in range(32)])
    assert torch.equal(together[3:4], dequantised(images[3:4], [seeded(3)]))
    assert together.dtype == dequantised(images.bfloat16()).dtype == torch.float32


# ---- the variational bound ------------------------------------------------------------------------------------------

CORNERS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)  # of data and noise


@pytest.fixture
def corners(monkeypatch):
    """Four samples of data N(M, S), returned, and noise: the mean of a quadratic over them is its expectation."""
    monkeypatch.setattr(likelihood, "standard_normal", lambda x, generator, dtype: CORNERS[:, 1:].to(dtype))
    return M + math.sqrt(S) * CORNERS[:, :1]


def two_headed(law, scheduler, values):
    """A network with a second half of channels, `values(t)` (B,)."""

    def network(sample, timestep):
        prediction = law.as_model(scheduler)(sample, timestep).sample
        return torch.cat([prediction, values(timestep).reshape(-1, 1).to(sample)], dim=1)

    return network


def step_laws(scheduler, timesteps):
    """(alpha_t, sigma_t, w, c, v_forward) of each step of a schedule, data included, from products of densities."""
    alpha, sigma = (c.numpy() for c in scheduler.signal_and_noise(torch.as_tensor(timesteps)))
    result = []
    for i in range(len(timesteps)):
        alpha_s, sigma_s = (alpha[i + 1], sigma[i + 1]) if i + 1 < len(timesteps) else (1.0, 0.0)
        forward = sigma[i] ** 2 - (alpha[i] / alpha_s) ** 2 * sigma_s**2
        if sigma_s == 0:
            result.append((alpha[i], sigma[i], 0.0, 1.0, forward))
            continue
        w = 1 / (1 / sigma_s**2 + (alpha[i] / alpha_s) ** 2 / forward)  # N(alpha_s x_0, sigma_s^2) N(x_t; a x_s, v)
        result.append((alpha[i], sigma[i], w, w * alpha_s / sigma_s**2, forward))
    return result


def expected_steps(scheduler, timesteps, variance):
    """The sum of E KL over the steps but the last, in bits; variance(w, c, forward, alpha, sigma, t)."""
    total = 0.0
    for t, (alpha, sigma, w, c, forward) in list(zip(timesteps, step_laws(scheduler, timesteps), strict=True))[:-1]:
        v = variance(w, c, forward, alpha, sigma, t)
        error = sigma**2 * S / (alpha**2 * S + sigma**2)
        total += 0.5 * (math.log(v / w) + w / v - 1 + c**2 * error / v)
    return bits(total)


def remaining_variance(alpha, sigma):
    return sigma**2 * S / (alpha**2 * S + sigma**2)


HEAD = {"learned": lambda t: -2 - 0.03 * t.double(), "learned_range": lambda t: 0.9 - 0.05 * t.double()}
VARIANCES_OF_STEPS = {
    "fixed_small": lambda w, c, forward, alpha, sigma, t: w,
    "fixed_large": lambda w, c, forward, alpha, sigma, t: forward,
    "optimal": lambda w, c, forward, alpha, sigma, t: w + c**2 * remaining_variance(alpha, sigma),
    "posterior": lambda w, c, forward, alpha, sigma, t: w + (alpha > 0) * c**2 * remaining_variance(alpha, sigma),
    "learned": lambda w, c, forward, alpha, sigma, t: math.exp(-2 - 0.03 * t),
    "learned_range": lambda w, c, forward, alpha, sigma, t: (
        forward ** ((1.9 - 0.05 * t) / 2) * w ** (1 - (1.9 - 0.05 * t) / 2)
    ),
}


def network_for(scheduler, variance_type):
    law = Gaussian(torch.tensor([M], dtype=torch.float64), variance=S)
    if variance_type == "posterior":

        def values(timestep):
            alpha, sigma = scheduler.signal_and_noise(timestep)
            return alpha**2 * S / (alpha**2 * S + sigma**2)

        return two_headed(law, scheduler, values)
    return two_headed(law, scheduler, HEAD[variance_type]) if variance_type in HEAD else law.as_model(scheduler)


def calibrated(config, **more):
    """A scheduler that knows the statistics of the exact network."""
    scheduler = build(config, **more)
    alpha, sigma = scheduler.signal_and_noise(torch.as_tensor(scheduler.train_timesteps))
    return build(
        config,
        mean_squared_noise=(sigma**2 / (alpha**2 * S + sigma**2)).tolist(),
        denoising_error=remaining_variance(alpha, sigma).tolist(),
        **more,
    )


@pytest.mark.parametrize("path", SHORT_PATHS)
@pytest.mark.parametrize("variance_type", VARIANCES_OF_STEPS)
def test_the_steps_of_gaussian_data_cost_what_the_closed_form_says(path, variance_type, corners):
    scheduler = calibrated(SHORT_PATHS[path])
    network = network_for(scheduler, variance_type)
    first = scheduler.train_timesteps[0]
    for arguments in (
        {},
        {"num_inference_steps": 7, "timestep_spacing": "linspace"},
        {"timesteps": [int(first) + k for k in (39, 30, 29, 11, 2, 0)]},
        {"timesteps": [int(first) + 35]},
    ):
        bound = variational_bound(network, scheduler, corners, variance_type=variance_type, **arguments)
        chain = chain_scheduler(scheduler, timestep_spacing=arguments.get("timestep_spacing"))
        if arguments:
            chain.set_timesteps(arguments.get("num_inference_steps"), timesteps=arguments.get("timesteps"))
        visited = chain.timesteps.tolist()
        expected = expected_steps(scheduler, visited, VARIANCES_OF_STEPS[variance_type])
        assert bound.steps.mean().item() == pytest.approx(expected, rel=1e-8, abs=1e-10)
        assert len(visited) == (bound.kind.count(f"{variance_type}, {len(visited)} steps") and len(visited))
        torch.testing.assert_close(bound.values, bound.prior + bound.steps + bound.decoder)

        alpha, sigma = scheduler.signal_and_noise(torch.tensor(visited[0]))
        prior = kl_divergence(Normal(alpha * corners, sigma), Normal(0.0, 1.0))[:, 0]
        torch.testing.assert_close(bound.prior, bits(prior), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_the_last_step_is_the_probability_of_the_bins(variance_type, corners):
    """Its variance is sigma_t^2, or with the small one that of the step before; x̂_0 is the mean."""
    scheduler = calibrated(SHORT)
    visited = [30, 10, 4]
    bound = variational_bound(
        network_for(scheduler, variance_type), scheduler, corners, timesteps=visited, variance_type=variance_type
    )
    alpha, sigma, _, _, large = step_laws(scheduler, visited)[-1]
    small = step_laws(scheduler, visited)[-2][2]
    fraction = {"fixed_small": 0.0, "fixed_large": 1.0, "learned_range": (1.9 - 0.05 * 4) / 2}[variance_type]
    deviation = math.sqrt(large**fraction * small ** (1 - fraction))
    x_t = alpha * corners + sigma * CORNERS[:, 1:]
    mean = M + alpha * S / (alpha**2 * S + sigma**2) * (x_t - alpha * M)
    normal = scipy.stats.norm(mean.numpy(), deviation)
    probability = normal.cdf((corners + 1 / 255).numpy()) - normal.cdf((corners - 1 / 255).numpy())
    assert bound.decoder.tolist() == pytest.approx((-np.log2(probability))[:, 0].tolist(), rel=1e-6)


@pytest.mark.parametrize("path", ["linear", "cosine", "geometric"])
def test_placed_schedules_cost_what_their_placement_promised(path, corners):
    scheduler = calibrated(SHORT_PATHS[path])
    network = network_for(scheduler, "fixed_small")
    costs = {}
    for spacing in ("linspace", "optimal"):
        bound = variational_bound(network, scheduler, corners, 6, timestep_spacing=spacing)
        placed = chain_scheduler(scheduler, timestep_spacing=spacing)
        placed.set_timesteps(6)
        costs[spacing] = bound.steps.mean().item()
        assert costs[spacing] == pytest.approx(bound_of_schedule(placed), rel=1e-8)
    assert costs["optimal"] < costs["linspace"]


def test_levels_of_a_flow_path_below_the_first_train_timestep_are_not_the_data(corners):
    scheduler = build({**FLOW, "num_train_timesteps": 40})
    visited = [30.0, 4.0, 0.5, 0.25]
    bound = variational_bound(network_for(scheduler, "fixed_small"), scheduler, corners, timesteps=visited)
    expected = expected_steps(scheduler, visited, VARIANCES_OF_STEPS["fixed_small"])
    assert bound.steps.mean().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("path", ["linear", "flow"])
def test_a_term_of_mixed_steps_is_for_each_sample_that_of_its_kind(path):
    scheduler = build(SHORT_PATHS[path], variance_type="fixed_large")
    data = int(scheduler.train_timesteps[0]) - 1
    t = torch.tensor([9.0, 9.0, 1.0, 1.0]).to(scheduler.timesteps.dtype)
    s = torch.tensor([4.0, data, data, 0.5 if path == "flow" else 0.0]).to(scheduler.timesteps.dtype)
    arguments = scheduler, draw(4, 2, seed=1), LEVELS[:8].reshape(4, 2), draw(4, 2, seed=2), t, s
    mixed = variational_bound_term(*arguments)
    to_the_data = torch.tensor([False, True, True, False])
    expected = torch.where(to_the_data, decoder_term(*arguments), divergence_term(*arguments))
    assert torch.equal(mixed, expected) and mixed.isfinite().all()


# ---- a bound, and a tight one ---------------------------------------------------------------------------------------

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


TWO_BUMPS = torch.exp(-((LEVELS + 0.4) ** 2) / 0.0005) + 0.5 * torch.exp(-((LEVELS - 0.5) ** 2) / 0.0001)


@pytest.mark.parametrize(("weights", "T"), [(torch.ones(256), 40), (TWO_BUMPS, 400)], ids=["uniform", "two bumps"])
def test_the_bound_of_an_exact_model_is_above_the_entropy_and_comes_down_to_it_with_more_steps(
    weights, T, monkeypatch
):
    """The expectation over the levels is their sum, that over the noise has 16 Gauss-Hermite nodes."""
    weights = torch.where(weights > 1e-3, weights, 0.0).double()
    probabilities, levels = (weights / weights.sum())[weights > 0], LEVELS[weights > 0]
    entropy = -(probabilities * probabilities.log2()).sum().item()
    nodes, node_weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(16))
    monkeypatch.setattr(likelihood, "standard_normal", lambda *_: nodes.repeat(len(levels))[:, None])
    law = FiniteData(levels[:, None], probabilities)
    scheduler = build({"num_train_timesteps": T, "beta_schedule": "squaredcos_cap_v2"})
    data = levels[torch.multinomial(probabilities, 512, replacement=True, generator=seeded(1))][:, None]
    scheduler.calibrate_variance(law.as_model(scheduler), data, np.linspace(0, T - 1, 30).astype(int), seeded(0))

    settings = [(kind, N) for kind in ("fixed_small", "fixed_large", "optimal") for N in (8, 20, T)]
    chains = [chain_scheduler(scheduler, kind, "linspace") for kind, _ in settings]
    for chain, (_, N) in zip(chains, settings, strict=True):
        chain.set_timesteps(N)
    bounds = variational_bounds(law.as_model(scheduler), chains, levels.repeat_interleave(16)[:, None])
    value = {}
    for setting, bound in zip(settings, bounds, strict=True):
        of_level = (bound.values.reshape(-1, 16) * node_weights).sum(1) / node_weights.sum()
        value[setting] = (of_level * probabilities).sum().item()
    for kind in ("fixed_small", "fixed_large", "optimal"):
        assert value[kind, 8] > value[kind, 20] > value[kind, T] > entropy
    for N in (8, 20, T):
        assert value["optimal", N] < min(value["fixed_small", N], value["fixed_large", N])
    assert value["optimal", T] < entropy + 0.1


# ---- several chains, some of the steps ------------------------------------------------------------------------------


def test_chains_share_the_states_and_network_calls_of_the_levels_they_share(corners):
    scheduler, called = calibrated(SHORT), []
    inner = network_for(scheduler, "learned_range")

    def network(sample, timestep):
        called.append(timestep[0].item())
        return inner(sample, timestep)

    chains = []
    for variance_type, timesteps in [
        ("fixed_small", [39, 20, 3]),
        ("learned_range", [39, 20, 3]),
        ("optimal", [39, 30, 3, 0]),
    ]:
        chains.append(chain_scheduler(scheduler, variance_type))
        chains[-1].set_timesteps(timesteps=timesteps)
    together = variational_bounds(network, chains, corners)
    assert called == [39, 30, 20, 3, 0]
    for chain, bound in zip(chains, together, strict=True):
        alone = variational_bound(
            inner, scheduler, corners, timesteps=chain.timesteps, variance_type=chain.config.variance_type
        )
        torch.testing.assert_close(bound.values, alone.values, rtol=1e-12, atol=1e-12)
        assert bound.kind == alone.kind


@pytest.mark.parametrize("path", ["linear", "flow"])
@pytest.mark.parametrize("evaluated", [1, 3, 8])
def test_some_of_the_steps_estimate_all_of_them_without_bias(path, evaluated, monkeypatch):
    """A copy of the image for each of all choices: their mean is the whole sum, exactly."""
    scheduler = calibrated(SHORT_PATHS[path])
    first = int(scheduler.train_timesteps[0])
    timesteps = [first + k for k in range(39, -1, -3)]
    chain = chain_scheduler(scheduler)
    chain.set_timesteps(timesteps=timesteps)
    parts = likelihood._parts(chain, evaluated)
    assert parts[0][0] == 0 and parts[-1][1] == 13 and 1 <= len(parts) <= evaluated
    assert all(stop == start for (_, stop), (start, _) in zip(parts, parts[1:], strict=False))
    copies = math.lcm(*[stop - start for start, stop in parts])
    monkeypatch.setattr(likelihood, "standard_normal", lambda x, generator, dtype: torch.full_like(x, 0.7))
    monkeypatch.setattr(likelihood, "_uniform", lambda x, generator: (torch.arange(len(x)) + 0.5) / len(x))
    network, calls = network_for(scheduler, "fixed_small"), []

    def counting(sample, timestep):
        calls.append(timestep)
        return network(sample, timestep)

    image = torch.full((copies, 1), 0.2, dtype=torch.float64)
    estimate = variational_bound(counting, scheduler, image, timesteps=timesteps, evaluated_steps=evaluated)
    whole = variational_bound(network, scheduler, image[:1], timesteps=timesteps)
    assert estimate.steps.mean().item() == pytest.approx(whole.steps.item(), rel=1e-6)
    torch.testing.assert_close(estimate.decoder, whole.decoder.expand(copies))
    torch.testing.assert_close(estimate.prior, whole.prior.expand(copies))
    assert len(calls) == len(parts) + 1
    assert estimate.kind == f"variational bound, fixed_small, 14 steps, estimated by {len(parts)} of them and the last"


def test_steps_near_the_data_are_computed_each():
    """Near the data each step changes log(1 + SNR) most."""
    scheduler = build({"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"})
    lengths = [stop - start for start, stop in likelihood._parts(chain_scheduler(scheduler), 100)]
    assert lengths[-5:] == [1] * 5 and max(lengths) > 20 and sum(lengths) == 999


def test_nothing_is_estimated_where_as_many_steps_may_be_computed_as_there_are():
    scheduler, images = calibrated(SHORT), LEVELS[:3, None]
    network = network_for(scheduler, "fixed_small")
    kinds = [
        variational_bound(network, scheduler, images, 5, evaluated_steps=count, generator=seeded(0)).kind
        for count in (9, 4, 3)
    ]
    assert kinds[0] == kinds[1] == "variational bound, fixed_small, 5 steps"
    assert "estimated by" in kinds[2]


@pytest.mark.parametrize("evaluated", [None, 3])
def test_a_bound_does_not_depend_on_the_batch(evaluated):
    scheduler = calibrated(SHORT)
    network, images = network_for(scheduler, "fixed_small"), LEVELS[10:250:60][:, None]
    together = variational_bound(
        network, scheduler, images, evaluated_steps=evaluated, generator=[seeded(i) for i in range(4)]
    )
    alone = variational_bound(network, scheduler, images[2:3], evaluated_steps=evaluated, generator=[seeded(2)])
    torch.testing.assert_close(alone.values[0], together.values[2], rtol=1e-12, atol=1e-12)
    assert len(together.values.unique()) == 4


def test_choices_of_steps_are_uniform():
    uniform = likelihood._uniform(torch.zeros(20_000, 2), seeded(0))
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert uniform.min() >= 0 and uniform.max() < 1


# ---- networks and schedulers of Diffusers ---------------------------------------------------------------------------


def unet(out_channels=1, **more):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=out_channels,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **more,
    ).requires_grad_(False)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
def test_schedulers_of_diffusers_are_chains_of_the_same_path(scheduler_class, corners):
    config = {"num_train_timesteps": 40, "beta_end": 0.2, "prediction_type": "v_prediction"}
    theirs, ours = scheduler_class(**config), build(config)
    network = network_for(ours, "fixed_small")
    for steps in (None, 7):
        expected = variational_bound(network, ours, corners, steps, timestep_spacing="linspace")
        found = variational_bound(network, theirs, corners, steps, timestep_spacing="linspace")
        torch.testing.assert_close(found.values, expected.values)
        assert found.kind == expected.kind == f"variational bound, fixed_small, {steps or 40} steps"


def test_flow_matching_schedulers_are_chains_of_the_flow_path(corners):
    ours = build({**FLOW, "num_train_timesteps": 40})
    network = network_for(ours, "fixed_large")
    found = variational_bound(
        network, FlowMatchEulerDiscreteScheduler(num_train_timesteps=40), corners, variance_type="fixed_large"
    )
    expected = expected_steps(ours, list(range(40, 0, -1)), VARIANCES_OF_STEPS["fixed_large"])
    assert found.steps.mean().item() == pytest.approx(expected, rel=1e-6)


def test_settings_given_by_position_and_those_that_clip_are_seen_through():
    chain = chain_scheduler(DDPMScheduler(40, 0.001, 0.2, "scaled_linear", thresholding=True), "fixed_large")
    assert len(chain) == 40 and chain.config.beta_schedule == "scaled_linear" and chain.config.beta_end == 0.2
    assert not chain.config.clip_sample and not chain.config.thresholding
    assert len(chain_scheduler(DDPMAncestralScheduler(40))) == 40
    assert chain_scheduler(DDIMScheduler()).config.variance_type == "fixed_small"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unet_is_called_in_the_precision_of_the_images(dtype):
    network, scheduler = unet(2).to(dtype), DDPMScheduler(num_train_timesteps=20)
    images = (torch.randint(256, (3, 1, 8, 8), generator=seeded(0)) / 127.5 - 1).to(dtype)
    bound = variational_bound(network, scheduler, images, 3, variance_type="learned_range", generator=seeded(1))
    flow = probability_flow_bits(
        network, scheduler, images, relative_tolerance=0.1, absolute_tolerance=0.1, generator=seeded(1)
    )
    for result in (bound, flow):
        assert result.values.shape == (3,) and result.values.isfinite().all()
        assert result.values.dtype != torch.bfloat16


def test_a_learned_variance_is_dropped_where_it_is_not_used(corners):
    scheduler = calibrated(SHORT)
    two, one = network_for(scheduler, "learned"), network_for(scheduler, "fixed_large")
    found = variational_bound(two, scheduler, corners, variance_type="fixed_large")
    torch.testing.assert_close(
        found.values, variational_bound(one, scheduler, corners, variance_type="fixed_large").values
    )

    exact = exact_network(Gaussian(torch.tensor([M], dtype=torch.float64), variance=S), "epsilon")
    straight = build(STRAIGHT, variance_type="learned_range")
    found = probability_flow_bits(
        lambda x, t: torch.cat([exact(x, t), 9 * x], dim=1), straight, corners, generator=seeded(0)
    )
    expected = probability_flow_bits(exact, build(STRAIGHT), corners, generator=seeded(0))
    assert torch.equal(found.values, expected.values)


# ---- reports and errors ---------------------------------------------------------------------------------------------


def test_a_result_says_its_mean_its_standard_error_and_what_it_is():
    result = BitsPerDim(torch.tensor([3.0, 4.0, 5.0]), "a bound")
    assert (result.mean, result.standard_error) == (4.0, pytest.approx(1 / math.sqrt(3)))
    assert str(result) == "4.000 ± 0.577 bits/dim (a bound, n = 3)"
    assert str(BitsPerDim(torch.tensor([3.0]), "a bound")) == "3.000 bits/dim (a bound, n = 1)"


def test_arguments_that_do_not_fit_are_refused(corners):
    scheduler = calibrated(SHORT)
    network = network_for(scheduler, "fixed_small")
    for count in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"evaluated_steps must be a positive integer, got {count}"):
            variational_bound(network, scheduler, corners, evaluated_steps=count)
    with pytest.raises(ValueError, match="exactly one of"):
        variational_bound(network, scheduler, corners, 5, timesteps=[3, 2])
    with pytest.raises(ValueError, match="learned_range"):
        variational_bound(network, scheduler, corners, 5, variance_type="learned_range")
    with pytest.raises(ValueError, match="call calibrate_variance first"):
        variational_bound(network, build(SHORT), corners, 5, variance_type="optimal")
    with pytest.raises(ValueError, match="no signal"):
        variational_bound(network, build(SHORT, rescale_betas_zero_snr=True), corners)
    with pytest.raises(ValueError, match="got 'signs'"):
        probability_flow_bits(network, scheduler, corners, probe_kind="signs")
    with pytest.raises(ValueError, match="two train timesteps"):
        NetworkNoise(network, build({"num_train_timesteps": 1}))


@pytest.mark.parametrize(
    "scheduler",
    [ScoreSdeVeScheduler(), EDMEulerScheduler(), CMStochasticIterativeScheduler(), IPNDMScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_that_names_no_path_is_not_taken_for_the_default_one(scheduler):
    with pytest.raises(ValueError, match=f"'beta_schedule'.*got {type(scheduler).__name__}"):
        chain_scheduler(scheduler)


def test_a_degradation_without_noise_has_no_likelihood():
    assert len(chain_scheduler(ColdDiffusionScheduler(num_train_timesteps=7, degradation="noise"))) == 7
    with pytest.raises(ValueError, match="got degradation='blur'"):
        chain_scheduler(ColdDiffusionScheduler(num_train_timesteps=7, degradation="blur"))


def test_chains_on_different_paths_are_refused(corners):
    scheduler = calibrated(SHORT)
    network = network_for(scheduler, "fixed_small")
    with pytest.raises(ValueError, match="at least one chain"):
        variational_bounds(network, [], corners)
    for other in (
        {**SHORT, "beta_end": 0.1},
        {**SHORT, "num_train_timesteps": 20},
        {**SHORT, "prediction_type": "sample"},
    ):
        with pytest.raises(ValueError, match="on one path"):
            variational_bounds(network, [chain_scheduler(scheduler), chain_scheduler(build(other))], corners)


@pytest.mark.parametrize("bits", [variational_bound, probability_flow_bits])
def test_images_that_are_not_scaled_are_refused(bits):
    scheduler = DDPMAncestralScheduler(clip_sample=False)
    model = Gaussian(0.0, variance=1.0).as_model(scheduler)
    with pytest.raises(ValueError, match=r"scaled to \[-1, 1\], got values of magnitude 255"):
        bits(model, scheduler, torch.full((2, 1, 4, 4), 255.0))
