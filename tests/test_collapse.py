"""Diagnostics of posterior collapse on posteriors made by hand, whose numbers are known."""

import doctest
import math
import pickle

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.distributions import Normal, kl_divergence

from annealers.collapse import LatentUse, kl_of_units, mutual_information, shift_from_prior


def law(mean, std):
    """Of tensors (B, C, h, w)."""
    mean, std = torch.broadcast_tensors(torch.as_tensor(mean), torch.as_tensor(std))
    return DiagonalGaussianDistribution(torch.cat([mean, 2 * std.log()], dim=1).double())


def posterior(count=50, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, channels, 2, 1, generator=generator, dtype=torch.float64)
    return law(mean, 0.1 + torch.rand(mean.shape, generator=generator, dtype=torch.float64))


def use_of(*batches):
    use = LatentUse()
    for batch in batches:
        use.update(*batch)
    return use


# ---- units ----


@pytest.mark.parametrize("of_prior", [False, True])
def test_the_divergence_of_a_unit_is_that_of_its_two_laws(of_prior):
    q, p = posterior(), posterior(seed=1) if of_prior else None
    reference = Normal(p.mean, p.std) if of_prior else Normal(torch.zeros_like(q.mean), torch.ones_like(q.std))
    torch.testing.assert_close(kl_of_units(q, p), kl_divergence(Normal(q.mean, q.std), reference))


def test_means_are_counted_from_the_prior_in_its_standard_deviations():
    q, p = law(torch.tensor([[[[1.0]], [[-4.0]]]]), 1.0), law(torch.tensor([[[[3.0]], [[-1.0]]]]), 2.0)
    assert shift_from_prior(q, p).flatten().tolist() == pytest.approx([-1.0, -1.5])
    assert shift_from_prior(q).flatten().tolist() == [1.0, -4.0]


def test_a_unit_is_active_if_its_mean_varies_over_the_images_by_more_than_the_threshold():
    """Means +-d over two halves of the images have the variance d^2, whatever the offset."""
    signs = torch.tensor([1.0, -1.0]).repeat(10)[:, None, None, None]
    deviations = torch.tensor([0.0, 0.09, 0.11, 2.0]).reshape(1, 4, 1, 1)
    offsets = torch.tensor([5.0, 0.0, -3.0, 1.0]).reshape(1, 4, 1, 1)
    (layer,) = use_of((law(offsets + signs * deviations, 0.5),)).layers()
    torch.testing.assert_close(layer.variance_per_unit.flatten(), deviations.flatten().double() ** 2)
    assert (layer.active_units, layer.units) == (2, 4)  # 0.11^2 > 0.01 > 0.09^2
    assert use_of((law(offsets + signs * deviations, 0.5),)).layers(threshold=1.0)[0].active_units == 1


def test_a_posterior_that_follows_its_prior_is_collapsed_however_much_the_prior_moves():
    p = posterior()
    (layer,) = use_of((p, p)).layers()
    assert layer.active_units == 0 and layer.kl == 0 and layer.kl_per_unit.abs().max() == 0
    assert use_of((p,)).layers()[0].active_units == layer.units == 6  # from where a fixed prior is, all move


# ---- layers and batches ----


def test_the_divergence_of_a_layer_is_the_mean_over_images_of_the_sum_over_units():
    q, p = posterior(), posterior(seed=1)
    (layer,) = use_of((q, p)).layers()
    assert layer.kl == pytest.approx(q.kl(p).mean().item(), rel=1e-12)
    torch.testing.assert_close(layer.kl_per_unit, kl_of_units(q, p).mean(dim=0))
    torch.testing.assert_close(layer.variance_per_unit, shift_from_prior(q, p).var(dim=0, correction=0))


def test_batches_and_processes_of_any_size_add_up_to_the_whole():
    q, p = posterior(), posterior(seed=1)
    part = lambda law, rows: DiagonalGaussianDistribution(law.parameters[rows])  # noqa: E731
    batches = [(part(q, rows), part(p, rows)) for rows in (slice(0, 7), slice(7, 8), slice(8, 50))]
    whole = use_of((q, p))
    processes = [use_of(batches[0], batches[1]), LatentUse(), use_of(batches[2])]
    added = sum(pickle.loads(pickle.dumps(processes)), start=LatentUse())
    for use in (use_of(*batches), added):
        assert use.images == whole.images == 50
        (layer,), (expected,) = use.layers(), whole.layers()
        assert layer.kl == pytest.approx(expected.kl, rel=1e-12)
        torch.testing.assert_close(layer.variance_per_unit, expected.variance_per_unit)
        assert layer.active_units == expected.active_units
    assert processes[0].images == 8  # adding changes neither side


def test_layers_of_different_sizes_are_told_apart():
    q, p = (posterior(), posterior(channels=1)), (posterior(seed=1), posterior(channels=1, seed=1))
    layers = use_of((q, p)).layers()
    assert [layer.units for layer in layers] == [6, 2]
    assert [layer.kl for layer in layers] == [use_of((q[i], p[i])).layers()[0].kl for i in range(2)]


def test_the_use_of_half_precision_posteriors_is_gathered_in_double_precision():
    q = posterior()
    (layer,) = use_of((DiagonalGaussianDistribution(q.parameters.bfloat16()),)).layers()
    assert layer.kl_per_unit.dtype == layer.variance_per_unit.dtype == torch.float64
    assert layer.kl == pytest.approx(q.kl().mean().item(), rel=0.02)
    silent = DiagonalGaussianDistribution(torch.full((5, 2, 1, 1), -0.02).bfloat16())  # mean and log-variance
    exact = kl_of_units(DiagonalGaussianDistribution(silent.parameters.double())).mean().item()
    assert use_of((silent,)).layers()[0].kl == pytest.approx(exact, rel=1e-3)  # no difference of rounded numbers
    assert use_of((silent, silent)).layers()[0].kl == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LatentUse().layers(), "no images"),
        (lambda: use_of(((posterior(), posterior()), (posterior(),))), "each of 2 posteriors, got 1"),
        (lambda: use_of((posterior(),), (posterior(channels=2),)), r"\(3, 2, 1\).* and .*\(2, 2, 1\)"),
        (lambda: use_of((posterior(),), ((posterior(), posterior()),)), r"\[\(3, 2, 1\)\] and \[\(3"),
        (
            lambda: mutual_information(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 1)),
            r"\(3, 2\) and \(3, 1\)",
        ),
        (
            lambda: mutual_information(torch.zeros(3, 2), torch.zeros(2, 2), torch.zeros(3, 2)),
            r"\(2, 2\) and \(3, 2\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- mutual information ----


def test_images_with_latents_far_apart_share_all_they_have_with_them():
    mean = 100.0 * torch.arange(37.0)[:, None].expand(37, 2)
    assert mutual_information(mean, torch.zeros(37, 2), mean, 10).item() == pytest.approx(math.log(37), rel=1e-12)


def test_pairs_of_images_with_the_same_latent_share_one_bit_less():
    mean = 100.0 * torch.arange(20.0).repeat(2)[:, None]
    shared = mutual_information(mean, torch.zeros(40, 1), mean + 1.0, 7)
    assert shared.item() == pytest.approx(math.log(20), rel=1e-12)


def test_a_posterior_that_is_the_same_for_all_images_shares_nothing():
    z = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    shared = mutual_information(torch.full((30, 4), 0.7), torch.full((30, 4), -1.0), z, 8)
    assert abs(shared.item()) < 1e-12


def test_posteriors_of_different_widths_are_compared_by_their_densities():
    q = posterior(count=12)
    z = q.mean + q.std * torch.randn(q.mean.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    log_q = Normal(q.mean, q.std).log_prob(z.unsqueeze(1)).flatten(2).sum(dim=2)  # of z_i given x_j
    exact = (log_q.diagonal() - log_q.exp().mean(dim=1).log()).mean()
    torch.testing.assert_close(mutual_information(q.mean, q.logvar, z, 5), exact)


def test_the_information_is_that_of_a_normal_channel():
    """mu ~ N(0, 1 - s^2), z ~ N(mu, s^2): I = -log s, all of the divergence, since E_x q(z | x) is the prior."""
    generator, n, s = torch.Generator().manual_seed(0), 4000, 0.5
    draw = lambda: torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64)  # noqa: E731
    mean = math.sqrt(1 - s**2) * draw()
    z = mean + s * draw()
    logvar = torch.full_like(mean, 2 * math.log(s))
    shared = mutual_information(mean, logvar, z, 500).item()
    divergence = use_of((law(mean, s),)).layers()[0].kl
    assert shared == pytest.approx(-math.log(s), abs=4 * 0.8 / math.sqrt(n))  # the log ratio deviates by 0.7
    assert shared == pytest.approx(divergence, abs=0.05)


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(LatentUse.__doc__, {"torch": torch}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
