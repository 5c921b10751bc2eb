"""Properties of HierarchicalVAEModel: one layer is the flat model, two linear ones are an exact law, the ladder."""

import doctest
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import annealers
from annealers import HierarchicalVAEModel, VAEModel
from annealers.models.hierarchical_vae import free_bits

SMALL = {"in_channels": 1, "sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4}


def model_of(seed=0, **options):
    torch.manual_seed(seed)
    layers = {"latent_channels": (5, 3, 2), "latent_levels": (1, 1, 0)}
    return HierarchicalVAEModel(**{**SMALL, **layers, **options}).eval()


def livened(model, scale=0.3):
    """With weights that are not those of the start, where priors are standard normal laws."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in model.layers:
            for parameter in layer.parameters():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def images(count=3, channels=1, size=8):
    u = torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1))
    return torch.where(u < 0.4, -1.0, 1.0)


def noise_for(model, count=3, seed=2):
    return torch.randn(count, *model.noise_shape, generator=torch.Generator().manual_seed(seed))


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


# ---- one layer is the flat model ----


@pytest.mark.parametrize(
    "options",
    [
        {"flat_latent": True},
        {"flat_latent": False},
        {"flat_latent": True, "num_class_embeds": 4},
        {"flat_latent": False, "likelihood": "gaussian", "sigma": 0.3, "learn_sigma": True},
        {"flat_latent": True, "likelihood": "discretized_mix_logistic", "num_mixtures": 3, "num_levels": 16},
    ],
)
def test_one_layer_is_the_flat_model_bit_for_bit(options):
    options = {"likelihood": "bernoulli", **SMALL, **options}
    torch.manual_seed(0)
    flat = VAEModel(latent_channels=5, **options).eval()
    ladder = HierarchicalVAEModel(latent_channels=(5,), latent_levels=(1,), **options).eval()
    ladder.load_state_dict(flat.state_dict())  # the same names
    x, y = images(), torch.tensor([0, 3, 1]) if "num_class_embeds" in options else None
    noise = torch.randn(3, *flat.noise_shape, generator=generator_of(2))
    expected, output = flat(x, y, noise=noise), ladder(x, y, noise=noise.flatten(1))
    for name in ("nll", "kl", "sample"):
        assert torch.equal(output[name], expected[name]), name
    assert torch.equal(output.latents[0], expected.latents)
    assert torch.equal(output.kl_per_layer, expected.kl[None])
    drawn, of_flat = ladder(x, y, generator=generator_of(3)), flat(x, y, generator=generator_of(3))
    assert torch.equal(drawn.nll, of_flat.nll)
    z = flat.prior_sample(3, generator_of(5))
    assert torch.equal(ladder.generate(3, y, generator_of(5)), flat.decode(z, y).sample)
    bounds = [model.log_prob(x, 4, 3, y, generator_of(6)) for model in (ladder, flat)]
    torch.testing.assert_close(*bounds, rtol=1e-5, atol=1e-4)


def test_one_layer_and_the_flat_model_are_built_alike():
    torch.manual_seed(0)
    flat = VAEModel(latent_channels=5, flat_latent=True, likelihood="bernoulli", num_class_embeds=3, **SMALL)
    ladder = model_of(latent_channels=(5,), latent_levels=(1,), num_class_embeds=3)
    built = dict(ladder.named_parameters())
    assert built.keys() == dict(flat.named_parameters()).keys()
    assert all(torch.equal(built[name], parameter) for name, parameter in flat.named_parameters())


# ---- two linear layers are an exact law ----


class Through(nn.Module):
    """In the place of a residual block."""

    def forward(self, x, temb=None):
        return x


def pointwise(matrix, offset):
    convolution = nn.Conv2d(*reversed(matrix.shape), kernel_size=1)
    convolution.weight = nn.Parameter(matrix[:, :, None, None].float())
    convolution.bias = nn.Parameter(offset.float())
    return convolution


class LinearLadder:
    """z_1 ~ N(0, I), z_2 ~ N(A z_1 + a, S), x ~ N(V z_1 + W z_2 + b, sigma^2 I), with factorising posteriors.

    W'W is diagonal, and so is what x says of z_2. With Sigma the covariance of x given z_1 and M = V + W A, the choice
    M = Sigma^1/2 U c, the columns of U orthonormal, makes the precision of z_1 given x diagonal, I + M' Sigma^-1 M =
    I + c^2.
    """

    def __init__(self):
        rng = np.random.default_rng(0)
        self.sigma = 0.4
        W = np.linalg.qr(rng.normal(size=(3, 2)))[0] * [1.5, 0.7]
        A, a, b = rng.normal(size=(2, 2)), rng.normal(size=2), rng.normal(size=3)
        S = np.array([0.3, 0.8])
        Sigma = W @ np.diag(S) @ W.T + self.sigma**2 * np.eye(3)
        c = np.array([1.3, 0.6])
        M = np.linalg.cholesky(Sigma) @ np.linalg.qr(rng.normal(size=(3, 2)))[0] @ np.diag(c)
        V = M - W @ A
        WW = np.diag(W.T @ W)
        self.W, self.A, self.a, self.b, self.S, self.V = W, A, a, b, S, V
        self.mean, self.covariance = W @ a + b, M @ M.T + Sigma
        # posteriors: what x says of z_1, and of z_2 given z_1
        self.variance_1 = 1 / (1 + c**2)
        self.gain_1 = np.diag(self.variance_1) @ M.T @ np.linalg.inv(Sigma)
        self.gain_2, self.variance_2 = W.T / WW[:, None], self.sigma**2 / WW

    def law(self):
        return MultivariateNormal(torch.tensor(self.mean), torch.tensor(self.covariance))

    def model(self, posterior_off=0.0):
        """States and features have 8 channels: x in 0-2, z_1 in 3-4, z_2 in 5-6."""
        model = HierarchicalVAEModel(
            in_channels=3, sample_size=1, latent_channels=(2, 2), latent_levels=(0, 0), block_out_channels=(8,),
            norm_num_groups=1, mid_block_add_attention=False, flat_latent=False, likelihood="gaussian",
            sigma=self.sigma,
        )  # fmt: skip
        up, down, layer = model.encoder.trunk, model.decoder.trunk, model.layers[0]
        for trunk in (up, down):
            trunk.mid_block, trunk.conv_norm_out, trunk.conv_act = Through(), Through(), Through()
        for block in (*up.down_blocks, *down.up_blocks):
            block.resnets = nn.ModuleList([Through()])
        layer.prior_block, layer.correction_block = Through(), Through()
        eye, none = torch.eye(8), torch.zeros(8)
        mat = lambda *columns: torch.cat([torch.as_tensor(c, dtype=torch.float64) for c in columns], dim=1)  # noqa: E731
        zeros = lambda *shape: np.zeros(shape)  # noqa: E731
        up.conv_in = pointwise(eye[:, :3], none)
        up.conv_out = pointwise(
            mat(np.concatenate([self.gain_1, zeros(2, 3)]), zeros(4, 5)),
            torch.tensor(np.concatenate([-self.gain_1 @ self.mean, np.log(self.variance_1)])),
        )
        down.conv_in = pointwise(eye[:, 3:5], none)
        layer.prior_head = pointwise(
            mat(zeros(4, 3), np.concatenate([self.A, zeros(2, 2)]), zeros(4, 3)),
            torch.tensor(np.concatenate([self.a, np.log(self.S)])),
        )
        # 1 / S + 1 / variance_2 is the precision of z_2 given x and z_1; its mean is linear in them
        variance = 1 / (1 / self.S + 1 / self.variance_2)
        by_x = (variance / self.variance_2 / np.sqrt(self.S))[:, None] * self.gain_2
        by_prior = ((variance / self.S - 1) / np.sqrt(self.S))[:, None]
        by_z = by_prior * self.A - by_x @ self.V
        offset = by_prior[:, 0] * self.a - by_x @ self.b
        layer.correction_head = pointwise(
            mat(zeros(4, 3), np.concatenate([by_z, zeros(2, 2)]), zeros(4, 3),
                np.concatenate([by_x, zeros(2, 3)]), zeros(4, 5)),
            torch.tensor(np.concatenate([offset + posterior_off, np.log(variance / self.S)])),
        )  # fmt: skip
        layer.from_latents = pointwise(eye[:, 5:7], none)
        down.conv_out = pointwise(mat(zeros(3, 3), self.V, self.W, zeros(3, 1)), torch.tensor(self.b))
        return model.double()


def quadrature(dimensions):
    """Nodes (n, d) and weights (n,) that give the mean of any polynomial of degree 5 under a standard normal law."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    grid = torch.tensor(list(itertools.product(nodes, repeat=dimensions)))
    return grid, torch.tensor(list(itertools.product(weights / weights.sum(), repeat=dimensions))).prod(dim=1)


POINTS = torch.tensor([[0.3, -0.8, 0.5], [1.5, 0.2, -2.0], [-0.4, 0.9, 0.1]], dtype=torch.float64)


def expected_bound(model, x):
    """E[nll + kl] of one image over the noise, by quadrature: both terms are of degree two in it."""
    nodes, weights = quadrature(4)
    output = model(x.expand(len(nodes), 3, 1, 1), noise=nodes)
    return (weights * (output.nll + output.kl)).sum()


def test_the_bound_of_two_linear_layers_with_their_posterior_is_the_exact_likelihood():
    ladder = LinearLadder()
    model, exact = ladder.model(), ladder.law().log_prob(POINTS)
    bounds = torch.stack([-expected_bound(model, x[None, :, None, None]) for x in POINTS])
    torch.testing.assert_close(bounds, exact, rtol=0, atol=1e-5)  # matrices of the model were rounded to float32


def test_the_weights_of_the_exact_posterior_have_no_variance():
    ladder = LinearLadder()
    model, exact = ladder.model(), ladder.law().log_prob(POINTS)
    for seed, k in itertools.product(range(3), (1, 7)):
        bound = model.log_prob(POINTS[:, :, None, None], k, generator=generator_of(seed))
        torch.testing.assert_close(bound, exact, rtol=0, atol=1e-5)


def test_a_wrong_posterior_gives_a_bound_that_more_samples_lift_to_the_likelihood():
    ladder = LinearLadder()
    model, exact = ladder.model(posterior_off=0.3), ladder.law().log_prob(POINTS[0])
    x = POINTS[:1, :, None, None]
    assert -expected_bound(model, x) < exact - 0.1
    means, errors = [], []
    for k in (1, 5, 50):
        bounds = model.log_prob(x.expand(1000, 3, 1, 1), k, 50, generator=generator_of(k))
        means.append(bounds.mean().item())
        errors.append(bounds.std().item() / math.sqrt(len(bounds)))
    assert abs(means[0] + expected_bound(model, x).item()) < 4 * errors[0]
    assert means[0] + 4 * errors[0] < means[1] - 4 * errors[1] < means[2] - 4 * errors[2]
    assert exact - 0.1 < means[2] < exact + 4 * errors[2]


def test_the_prior_path_draws_from_the_law_of_the_model():
    ladder = LinearLadder()
    nodes, weights = quadrature(4)
    parameters, _ = ladder.model().go_down(nodes)
    x = parameters.flatten(1)
    mean = weights @ x
    covariance = (weights[:, None] * (x - mean)).mT @ (x - mean) + ladder.sigma**2 * torch.eye(3)
    torch.testing.assert_close(mean, ladder.law().mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(covariance, ladder.law().covariance_matrix, rtol=0, atol=1e-5)


# ---- the terms ----


def test_the_divergences_of_the_layers_are_those_of_their_laws_and_sum_to_the_whole():
    model = livened(model_of())
    output = model(images(), noise=noise_for(model))
    assert output.kl_per_layer.shape == (3, 3)
    torch.testing.assert_close(output.kl_per_layer.sum(dim=0), output.kl)
    for of_layer, q, p in zip(output.kl_per_layer, output.latent_dist, output.prior_dist, strict=True):
        exact = kl_divergence(Normal(q.mean, q.std), Normal(p.mean, p.std)).flatten(1).sum(dim=1)
        torch.testing.assert_close(of_layer, exact, rtol=1e-4, atol=1e-4)
    assert (output.prior_dist[0].mean == 0).all() and (output.prior_dist[0].std == 1).all()
    assert all((p.std != 1).any() for p in output.prior_dist[1:])


def test_the_likelihood_term_is_that_of_what_the_way_down_says():
    model = livened(model_of())
    x, noise = images(), noise_for(model)
    output = model(x, noise=noise)
    parameters, _ = model.go_down(noise, *model.go_up(x))
    exact = torch.distributions.Bernoulli(logits=parameters).log_prob((x + 1) / 2).flatten(1).sum(dim=1)
    torch.testing.assert_close(output.nll, -exact)
    torch.testing.assert_close(output.sample, 2 * parameters.sigmoid() - 1)
    assert (output.nll > 0).all()


def test_the_posterior_is_the_prior_moved_and_widened_in_units_of_the_prior():
    """So the divergence of a layer is a function of the correction alone."""
    model = livened(model_of())
    layer, corrections = model.layers[0], []
    layer.correction_head.register_forward_hook(lambda _, __, output: corrections.append(output))
    output = model(images(), noise=noise_for(model))
    (m_c, log_s_c_squared), q, p = corrections[0].chunk(2, dim=1), output.latent_dist[1], output.prior_dist[1]
    torch.testing.assert_close((q.mean - p.mean) / p.std, m_c, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(q.std / p.std, (0.5 * log_s_c_squared).exp())
    divergence = 0.5 * (m_c**2 + log_s_c_squared.exp() - 1 - log_s_c_squared).flatten(1).sum(dim=1)
    torch.testing.assert_close(output.kl_per_layer[1], divergence, rtol=1e-4, atol=1e-4)


def test_no_correction_costs_nothing():
    model = livened(model_of())
    for layer in model.layers:
        nn.init.zeros_(layer.correction_head[-1].weight)
        nn.init.zeros_(layer.correction_head[-1].bias)
    output = model(images(), noise=noise_for(model))
    assert (output.kl_per_layer[0] > 0).all() and output.kl_per_layer[1:].abs().max() < 1e-4
    assert (output.prior_dist[1].std != 1).any()


def test_a_layer_is_drawn_given_those_above_and_not_those_below():
    model = livened(model_of())
    x, noise = images(), noise_for(model)
    before = model(x, noise=noise)
    sizes = [math.prod(shape) for shape in model.latent_shapes]
    for changed in range(3):
        other = noise.clone()
        other[:, sum(sizes[:changed]) : sum(sizes[: changed + 1])] += 1.0
        after = model(x, noise=other)
        moved = [bool((a != b).any()) for a, b in zip(before.latents, after.latents, strict=True)]
        assert moved == [layer >= changed for layer in range(3)]
        assert (before.nll != after.nll).all()
        step = after.latents[changed] - before.latents[changed]
        torch.testing.assert_close(step, before.latent_dist[changed].std, rtol=1e-3, atol=1e-5)


def test_a_layer_hears_of_the_image_at_its_own_resolution():
    model = livened(model_of())
    posterior, features = model.go_up(images())
    assert [tuple(of_level.shape[1:]) for of_level in features] == [(8, 8, 8), (16, 4, 4)]
    noise = noise_for(model)
    _, before = model.go_down(noise, posterior, features)
    for level, moved in ((0, [False, False, True]), (1, [False, True, True])):
        other = [of_level + (i == level) for i, of_level in enumerate(features)]
        _, after = model.go_down(noise, posterior, other)
        assert [bool((a.latents != b.latents).any()) for a, b in zip(before, after, strict=True)] == moved


def test_the_mean_of_the_posterior_is_taken_where_nothing_is_drawn():
    model = livened(model_of())
    output = model(images(), sample_posterior=False)
    assert all(torch.equal(z, q.mean) for z, q in zip(output.latents, output.latent_dist, strict=True))
    assert torch.equal(output.nll, model(images(), sample_posterior=False).nll)


# ---- free bits ----


def test_free_bits_have_no_gradient_below_the_minimum_and_the_whole_above():
    kl = torch.tensor([[0.2, 3.0], [5.0, 0.1]], requires_grad=True)
    loss = free_bits(kl, 0.5)
    assert torch.equal(loss, torch.tensor([5.5, 3.5]))
    loss.sum().backward()
    assert torch.equal(kl.grad, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_the_bound_that_is_reported_knows_of_no_free_bits():
    model = livened(model_of())
    output = model(images(), noise=noise_for(model))
    assert (free_bits(output.kl_per_layer, 1000.0) == 3000.0).all()
    torch.testing.assert_close(output.kl, output.kl_per_layer.sum(dim=0))
    torch.testing.assert_close(free_bits(output.kl_per_layer, 0.0), output.kl)


def test_free_bits_do_not_depend_on_how_a_batch_is_split():
    kl = torch.rand(3, 8, generator=generator_of(0))
    parts = [free_bits(part, 0.5) for part in kl.split([1, 5, 2], dim=1)]
    assert torch.equal(torch.cat(parts), free_bits(kl, 0.5))


# ---- sampling ----


def test_sampling_never_calls_what_is_the_posterior_s():
    model, called = livened(model_of()), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, ___, name=name: called.append(name))
    model.generate(2, generator=generator_of(0))
    assert any(name.startswith("decoder") for name in called)
    assert any(name.startswith("layers.1.prior_block") for name in called)
    assert not [name for name in called if name.startswith("encoder") or "correction" in name]
    called.clear()
    model(images())
    assert {"layers.0.correction_head", "layers.1.correction_head"} <= set(called)


def test_a_generator_reproduces_and_one_for_each_sample_makes_it_independent_of_the_others():
    model = livened(model_of())
    assert torch.equal(model.generate(3, generator=generator_of(0)), model.generate(3, generator=generator_of(0)))
    assert (model.generate(3, generator=generator_of(0)) != model.generate(3, generator=generator_of(1))).any()
    together = model.generate(3, generator=[generator_of(seed) for seed in (7, 8, 9)])
    alone = torch.cat([model.generate(1, generator=generator_of(seed)) for seed in (7, 8, 9)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flat", [True, False])
def test_the_terms_of_an_image_do_not_depend_on_its_batch_mates(flat):
    model = livened(model_of(flat_latent=flat)).double()
    x, noise = images().double(), noise_for(model).double()
    together = model(x, noise=noise)
    for i in range(3):
        alone = model(x[i : i + 1], noise=noise[i : i + 1])
        torch.testing.assert_close(alone.nll, together.nll[i : i + 1], rtol=1e-10, atol=0)
        torch.testing.assert_close(alone.kl_per_layer, together.kl_per_layer[:, i : i + 1], rtol=1e-10, atol=0)


def test_the_temperature_is_a_factor_of_every_standard_deviation_of_the_prior():
    model = livened(model_of())
    noise = noise_for(model)
    _, cold = model.go_down(0.0 * noise)
    _, warm = model.go_down(0.5 * noise)
    assert all(torch.equal(layer.latents, layer.prior.mean) for layer in cold)
    z, p = warm[1].latents, warm[1].prior
    eps = noise[:, 5 : 5 + 3 * 16].unflatten(1, (3, 4, 4))
    torch.testing.assert_close(z, p.mean + 0.5 * p.std * eps)
    expected = model.likelihood.mean(
        model.go_down(0.5 * torch.randn(3, *model.noise_shape, generator=generator_of(2)))[0]
    )
    torch.testing.assert_close(model.generate(3, generator=generator_of(2), temperature=0.5), expected)


def test_the_importance_weighted_bound_does_not_depend_on_the_size_of_the_chunks():
    model = livened(model_of())
    x = images()
    bounds = [model.log_prob(x, 6, chunk, generator=generator_of(1)) for chunk in (1, 4, 6)]
    torch.testing.assert_close(bounds[0], bounds[1], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(bounds[0], bounds[2], rtol=1e-5, atol=1e-3)
    decoded = []
    model.decoder.trunk.conv_out.register_forward_hook(lambda _, __, out: decoded.append(len(out)))
    model.log_prob(x, 7, 3)
    assert decoded == [9, 9, 3]  # three images, k = 7


def test_one_sample_of_the_weighted_bound_is_the_bound_with_the_ratio_at_its_latents():
    model = livened(model_of())
    x, noise = images(), torch.randn(3, *model.noise_shape, generator=generator_of(3))
    output = model(x, noise=noise)
    log_ratio = sum(
        (Normal(p.mean, p.std).log_prob(z) - Normal(q.mean, q.std).log_prob(z)).flatten(1).sum(dim=1)
        for z, q, p in zip(output.latents, output.latent_dist, output.prior_dist, strict=True)
    )
    torch.testing.assert_close(
        model.log_prob(x, 1, generator=generator_of(3)), log_ratio - output.nll, rtol=1e-5, atol=1e-3
    )


# ---- labels ----


def test_a_conditional_model_hears_the_class_on_both_ways():
    model = livened(model_of(num_class_embeds=4))
    x, noise, y = images(), noise_for(model), torch.tensor([0, 1, 2])
    output, other = model(x, y, noise=noise), model(x, y.flip(0), noise=noise)
    changed = torch.tensor([True, False, True])
    assert torch.equal(output.nll != other.nll, changed)
    assert torch.equal(output.latent_dist[0].mean.flatten(1).ne(other.latent_dist[0].mean.flatten(1)).any(1), changed)
    drawn = [model.generate(3, labels, generator_of(0)) for labels in (y, y.flip(0))]
    assert torch.equal((drawn[0] != drawn[1]).flatten(1).any(dim=1), changed)
    assert model.log_prob(x, 3, 2, y, generator_of(0)).shape == (3,)


# ---- networks ----


def test_every_weight_learns():
    model = livened(model_of(num_class_embeds=3)).train()
    output = model(images(), torch.tensor([0, 1, 2]), noise=noise_for(model))
    (output.nll + output.kl).mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert [name for name in silent if not name.endswith("to_k.bias")] == []  # softmax ignores a shift of all keys


def test_a_layer_says_and_costs_nothing_at_first_and_its_branches_are_the_smaller_the_more_layers():
    output = model_of()(images())
    for law in (*output.prior_dist, *output.latent_dist[1:]):
        assert (law.mean == 0).all() and (law.std == 1).all()
    assert (output.kl_per_layer[1:] == 0).all()
    torch.manual_seed(0)
    sizes = []
    for layers in (2, 8):
        model = model_of(latent_channels=(5,) + (4,) * (layers - 1), latent_levels=(1,) * layers)
        weights = [torch.cat([layer.prior_block.conv2.weight.flatten() for layer in model.layers]),
                   torch.cat([layer.from_latents.weight.flatten() for layer in model.layers])]  # fmt: skip
        sizes.append([w.abs().max() * math.sqrt(layers) for w in weights])
    bounds = [1 / math.sqrt(16 * 9), 1 / math.sqrt(4)]  # of torch's uniform law, fan-in 16 x 3 x 3 and 4
    for size in sizes:
        assert all(0.9 * bound < s <= bound * 1.0001 for s, bound in zip(size, bounds, strict=True))


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = livened(model_of()).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing == checkpointing
        calls = []
        model.layers[0].prior_head.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.encoder.trunk.down_blocks[0].resnets[0].conv1.register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        output = model(images(), noise=noise_for(model))
        (output.nll + output.kl).mean().backward()
        assert len(calls) == (4 if checkpointing else 2)  # once more on the way back
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_it_compiles_as_one_graph():
    model = livened(
        model_of(latent_channels=(3, 2), latent_levels=(0, 0), block_out_channels=(4,), mid_block_add_attention=False)
    )
    x, noise = images(), noise_for(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    output, expected = compiled(x, noise=noise), model(x, noise=noise)
    torch.testing.assert_close(output.nll, expected.nll)
    torch.testing.assert_close(output.kl_per_layer, expected.kl_per_layer)
    torch.testing.assert_close(output.latents, expected.latents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_keep_the_precision_that_their_law_wants_whatever_that_of_the_weights(dtype):
    """Those of 256 values are no longer on the grid in half precision."""
    model = livened(model_of(likelihood="discretized_logistic"), scale=0.05).to(dtype)
    x = 2 * torch.randint(256, (3, 1, 8, 8), generator=generator_of(0)).float() / 255 - 1
    output = model(x, noise=noise_for(model))
    parameters, _ = model.go_down(noise_for(model), *model.go_up(x))
    torch.testing.assert_close(output.nll, -model.likelihood.log_prob(parameters, x))
    assert model.log_prob(x, 2).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_terms_and_laws_in_single_precision(dtype):
    model = livened(model_of(likelihood="gaussian", learn_sigma=True), scale=0.05)
    x, noise = images(), noise_for(model)
    expected = model(x, noise=noise)
    output = model.to(dtype)(x.to(dtype), noise=noise.to(dtype))
    for name in ("nll", "kl", "kl_per_layer"):
        assert output[name].dtype == torch.float32
        torch.testing.assert_close(output[name], expected[name], rtol=0.03, atol=0.3)
    assert all(law.mean.dtype == torch.float32 for law in (*output.latent_dist, *output.prior_dist))
    assert model.generate(2, generator=generator_of(0)).dtype == dtype
    assert model.log_prob(x.to(dtype), 2).isfinite().all()


def test_a_saved_model_comes_back_whole(tmp_path):
    model = livened(model_of(num_class_embeds=3, flat_latent=False, layers_per_block=2))
    model.save_pretrained(tmp_path)
    loaded = HierarchicalVAEModel.from_pretrained(tmp_path)
    y = torch.tensor([0, 1, 2])
    assert torch.equal(loaded(images(), y, noise=noise_for(model)).nll, model(images(), y, noise=noise_for(model)).nll)
    assert loaded.latent_shapes == model.latent_shapes == [(5, 4, 4), (3, 4, 4), (2, 8, 8)]
    assert loaded.noise_shape == (80 + 48 + 128,)


def test_building_and_loading_warn_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model_of().save_pretrained(tmp_path)
        HierarchicalVAEModel.from_pretrained(tmp_path)(images())


def test_images_that_are_not_square_have_layers_that_are_not():
    model = model_of(sample_size=(8, 12), in_channels=2)
    assert model.latent_shapes == [(5, 1, 1), (3, 4, 6), (2, 8, 12)]
    x = torch.where(torch.rand(2, 2, 8, 12, generator=generator_of(0)) < 0.5, -1.0, 1.0)
    assert model(x).sample.shape == model.generate(2).shape == (2, 2, 8, 12)


def test_it_is_named_by_the_package_alone():
    assert HierarchicalVAEModel.__module__ == "annealers" and "HierarchicalVAEModel" in annealers.__all__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_levels": (1, 1)}, r"one of latent_levels for each of them.*\(5, 3, 2\) and \(1, 1\)"),
        ({"latent_channels": (), "latent_levels": ()}, "at least one"),
        ({"latent_channels": (5, 0, 2)}, r"latent_channels >= 1.*\(5, 0, 2\)"),
        ({"latent_levels": (0, 0, 0)}, r"begin with the last of 2 levels, 1.*got \(0, 0, 0\)"),
        ({"latent_levels": (1, 0, 1)}, r"got \(1, 0, 1\)"),
        ({"latent_levels": (1, 0, -1)}, r"no less than 0, got \(1, 0, -1\)"),
        ({"sample_size": 7}, "multiples of 2"),
        ({"likelihood": "laplace"}, "got 'laplace'"),
        ({"num_class_embeds": 0}, "num_class_embeds >= 1 or None, got 0"),
    ],
)
def test_an_architecture_that_does_not_fit_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model_of(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(images(size=16)), r"\(B, 1, 8, 8\), got \(3, 1, 16, 16\)"),
        (lambda m: m(images(), noise=torch.zeros(3, 9)), r"noise must be \(B, 181\), got \(3, 9\)"),
        (lambda m: m(images(), noise=torch.zeros(2, 181)), "each of 3 images, got 2"),
        (lambda m: m.go_down(noise_for(m), m.go_up(images())[0]), "both the posterior and the features"),
        (lambda m: m(0.5 * images()), "binarise"),
        (lambda m: m(images(), torch.tensor([0, 1, 2])), "the model has no classes"),
        (lambda m: m.log_prob(images(), 0), "num_samples and chunk_size >= 1, got 0 and 10"),
        (lambda m: m.log_prob(images(), 1, 0), "got 1 and 0"),
        (lambda m: m.generate(2, temperature=-1.0), "temperature >= 0, got -1.0"),
        (lambda m: free_bits(torch.zeros(2, 2), -0.1), "got -0.1"),
        (lambda m: m(images(), generator=[generator_of(0)]), "one generator for each of 3 samples, got 1"),
        (lambda m: m(images().byte()), "real numbers in .*got torch.uint8"),
        (lambda m: model_of(num_class_embeds=3)(images(), torch.arange(1, 4)), r"must be 0 \.\. 2, got 1 \.\. 3"),
        (lambda m: model_of(num_class_embeds=3)(images()), r"3 classes and needs class_labels \(3,\), got None"),
        (lambda m: model_of(num_class_embeds=3).generate(2, torch.tensor([0])), r"\(2,\), got \(1,\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(model_of())


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(HierarchicalVAEModel.__doc__, {"torch": torch}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
