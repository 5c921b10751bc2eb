"""Samplers of timesteps: what they draw is checked against exact sums and bounds that hold for every draw."""

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from annealers.randomness import PositionalRandomness
from annealers.run import in_order_of_positions
from annealers.timestep_sampling import (
    LossSecondMomentSampler,
    StratifiedTimestepSampler,
    make_timestep_sampler,
)

KINDS = ["uniform", "stratified", "loss_second_moment"]
RANDOMNESS = PositionalRandomness(7)


def curve(T):
    """A loss that is large at small t, as the terms of the bound are."""
    return 3.0 / (1 + torch.arange(T, dtype=torch.float64)) + 0.01


def warm(T, losses, repeats=10, **options):
    """A sampler that has seen each t `repeats` times, with the loss losses[t]."""
    sampler = LossSecondMomentSampler(T, RANDOMNESS, **options)
    sampler.observe(torch.arange(T).repeat(repeats), losses.repeat(repeats))
    return sampler


def samplers(T):
    by_name = {kind: make_timestep_sampler(kind, T, RANDOMNESS) for kind in KINDS}
    return by_name | {"warm": warm(T, curve(T)), "warm, in bins": warm(T, curve(T), num_bins=max(1, T // 3))}


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_uniform_timesteps_are_the_positional_integers_of_every_run_so_far():
    timesteps, weights = make_timestep_sampler("uniform", 1000, PositionalRandomness(0)).draw(5, 6, batch_size=4)
    assert torch.equal(timesteps, PositionalRandomness(0).integers("timestep", 5, 6, high=1000))
    assert timesteps.tolist() == [315, 658, 605, 135, 364, 416]  # whatever draws them
    assert weights.tolist() == [1] * 6


@pytest.mark.parametrize("T", [1, 7, 50])
def test_every_weighted_estimate_is_unbiased(T):
    """G strata fix the share of each t within 2 / G of p_t, and so the estimate within that of its expectation."""
    G, f = 100_000, torch.linspace(-1, 2, T, dtype=torch.float64) ** 3
    for name, sampler in samplers(T).items():
        if name == "uniform":
            continue
        timesteps, weights = sampler.draw(3 * G, G, batch_size=G)
        share = torch.bincount(timesteps, minlength=T) / G
        w = torch.zeros(T, dtype=torch.float64)
        w[timesteps] = weights.double()
        assert (w > 0).all(), name  # each t is drawn
        torch.testing.assert_close(share.double() * w * T, torch.ones_like(w), rtol=0, atol=2 * T * w.max() / G)
        estimate = (weights * f[timesteps]).mean().item()
        assert estimate == pytest.approx(f.mean().item(), abs=(2 / G * w * f.abs()).sum().item() + 1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_and_weights_belong_together(kind):
    T, f = 40, torch.linspace(-1, 2, 40, dtype=torch.float64)
    sampler = (
        warm(T, curve(T), num_bins=13) if kind == "loss_second_moment" else make_timestep_sampler(kind, T, RANDOMNESS)
    )
    timesteps, weights = sampler.draw(0, 5000, batch_size=5000)
    w = torch.full((T,), float("nan"), dtype=torch.float64).index_put((timesteps,), weights.double())
    p = sampler.probabilities() if kind == "loss_second_moment" else torch.full((T,), 1 / T, dtype=torch.float64)
    assert p.sum().item() == pytest.approx(1)
    assert (p * w * f).sum().item() == pytest.approx(f.mean().item(), abs=1e-6)  # float32 weights


@pytest.mark.parametrize(("T", "G"), [(64, 16), (1000, 8), (12, 12), (60, 1)])
def test_an_optimizer_step_has_one_timestep_in_each_stratum(T, G):
    sampler, order = make_timestep_sampler("stratified", T, RANDOMNESS), []
    for step in range(20):
        timesteps, weights = sampler.draw(step * G, G, batch_size=G)
        strata = timesteps * G // T
        assert strata.sort().values.tolist() == list(range(G)) and (weights == 1).all()
        order.append(tuple(strata.tolist()))
    assert G == 1 or len(set(order)) > 10  # which position has which changes from step to step


def test_strata_are_equal_shares_of_any_density():
    T, G = 90, 16
    sampler = warm(T, curve(T))
    F = sampler.probabilities().cumsum(0)
    for step in range(20):
        t = sampler.draw(step * G, G, batch_size=G)[0].sort().values
        k = torch.arange(G)
        before = torch.where(t > 0, F[(t - 1).clamp(min=0)], 0.0)
        assert (before < (k + 1) / G + 1e-12).all() and (F[t] > k / G - 1e-12).all()


def test_a_position_alone_is_uniform():
    """Were stratum g always at position g, data that is read in order would meet the same t in each epoch."""
    T, G, steps = 1000, 4, 4000
    timesteps, _ = make_timestep_sampler("stratified", T, RANDOMNESS).draw(0, steps * G, batch_size=G)
    share = torch.stack([torch.bincount(column * 8 // T, minlength=8) for column in timesteps.reshape(steps, G).T])
    standard_error = (steps * (1 / 8) * (7 / 8)) ** 0.5
    assert ((share - steps / 8).abs() < 4 * standard_error).all()


@pytest.mark.parametrize("name", [*KINDS, "warm", "warm, in bins"])
def test_a_draw_depends_on_the_position_and_not_on_the_split(name):
    sampler, G = samplers(30)[name], 12
    whole = torch.stack([part.double() for part in sampler.draw(0, 5 * G, batch_size=G)])
    for size in (1, 3, 4, 6, 7, 12, 30):
        starts = range(0, 5 * G, size)
        parts = [sampler.draw(start, min(size, 5 * G - start), batch_size=G) for start in starts]
        assert torch.equal(torch.cat([t for t, _ in parts]).double(), whole[0])
        assert torch.equal(torch.cat([w for _, w in parts]).double(), whole[1])
    assert all(part.shape == (0,) for start in (0, 5) for part in sampler.draw(start, 0, batch_size=G))


@pytest.mark.parametrize("name", [*KINDS, "warm"])
def test_another_seed_draws_other_timesteps(name):
    sampler = samplers(1000)[name]
    before = sampler.draw(0, 32, batch_size=32)[0]
    sampler.randomness = PositionalRandomness(8)
    assert (sampler.draw(0, 32, batch_size=32)[0] != before).float().mean() > 0.5
    assert before.dtype == torch.int64


def test_the_largest_uniform_number_stays_below_the_last_timestep(monkeypatch):
    largest = 1 - 2.0**-53
    monkeypatch.setattr(
        PositionalRandomness, "uniform", lambda self, name, first, n: torch.full((n,), largest).double()
    )
    for name, sampler in samplers(5).items():
        if name != "uniform":
            assert sampler.draw(0, 2, batch_size=2)[0].max() == 4, name


# ---- what is learnt -------------------------------------------------------------------------------------------------


def test_the_history_is_the_last_ten_losses_of_each_bin_in_order_of_position():
    T, bins, generator = 23, 5, np.random.default_rng(0)
    sampler = LossSecondMomentSampler(T, RANDOMNESS, num_bins=bins)
    histories = [deque(maxlen=10) for _ in range(bins)]
    for G in (1, 3, 200, 40, 40, 7):
        timesteps, losses = generator.integers(0, T, G), generator.exponential(size=G)
        sampler.observe(torch.from_numpy(timesteps), torch.from_numpy(losses))
        for t, loss in zip(timesteps, losses, strict=True):
            histories[t * bins // T].append(loss)
    for history, row in zip(histories, sampler.losses, strict=True):
        assert sorted(row.tolist()) == pytest.approx(sorted(history))


def test_probabilities_are_those_of_the_paper():
    """Sec. 3.3: uniform until there are ten losses for each t, then in proportion to sqrt(E[L_t^2])."""
    T, rng = 6, np.random.default_rng(1)
    losses = rng.exponential(size=(T, 10))
    sampler = LossSecondMomentSampler(T, RANDOMNESS, num_bins=T)
    timesteps, values = torch.arange(T).repeat_interleave(10), torch.from_numpy(losses).flatten()
    sampler.observe(timesteps[:-1], values[:-1])
    assert sampler.probabilities().tolist() == pytest.approx([1 / T] * T)
    assert sampler.draw(0, 12, batch_size=12)[1].tolist() == pytest.approx([1] * 12)
    sampler.observe(timesteps[-1:], values[-1:])
    rms = np.sqrt((losses**2).mean(axis=1))
    expected = 0.999 * rms / rms.sum() + 0.001 / T
    assert sampler.probabilities().tolist() == pytest.approx(expected.tolist())
    drawn, weights = sampler.draw(0, 12, batch_size=12)
    assert weights.tolist() == pytest.approx((1 / (T * expected[drawn])).tolist())


def test_bins_share_their_losses_evenly_among_their_timesteps():
    sampler = LossSecondMomentSampler(1000, RANDOMNESS)
    assert sampler.num_bins == 100 and LossSecondMomentSampler(30, RANDOMNESS).num_bins == 30
    sampler = LossSecondMomentSampler(5, RANDOMNESS, num_bins=2, history=1, uniform_share=0.2)
    sampler.observe(torch.tensor([1, 4]), torch.tensor([3.0, -1.0]))  # bins 0 1 2 | 3 4
    p = 0.8 * np.array([3, 3, 3, 1, 1]) / 11 + 0.2 / 5
    assert sampler.probabilities().tolist() == pytest.approx(p.tolist())


def test_it_finds_the_density_of_a_known_loss_by_its_own_draws():
    """Losses L_t = f_t (1 +- 1/2), in random order; sqrt(E[L_t^2]) = f_t sqrt(5 / 4)."""
    T, G, history = 12, 64, 400
    sampler, f = LossSecondMomentSampler(T, RANDOMNESS, history=history), curve(T)
    for step in range(450):
        timesteps, weights = sampler.draw(step * G, G, batch_size=G)
        signs = RANDOMNESS.integers("sign", step * G, G, high=2)
        sampler.observe_step(step * G, f[timesteps] * (0.5 + signs) * weights)
    assert (sampler.observed > history).all()
    expected = 0.999 * f / f.sum() + 0.001 / T
    # E[L^2] = f^2 (1/4 + 9/4) / 2 has the relative standard error 0.8 / sqrt(history), its root half of that
    tolerance = 4 * 0.4 / history**0.5
    torch.testing.assert_close(sampler.probabilities(), expected, rtol=tolerance, atol=0)


def variance_of_one_draw(p, f):
    """Var[f_t / (T p_t)] for t drawn from p, exactly."""
    return ((f / len(f)) ** 2 / p).sum() - f.mean() ** 2


def test_the_variance_is_lower_than_uniform_and_as_low_as_it_can_be():
    T = 400
    f, uniform = curve(T), torch.full((T,), 1 / T, dtype=torch.float64)
    by_timestep, binned = (warm(T, f, num_bins=bins).probabilities() for bins in (T, 100))
    variances = [variance_of_one_draw(p, f).item() for p in (uniform, binned, by_timestep)]
    assert variances[1] < variances[0] / 20 and variances[2] < variances[1]
    assert 0 <= variances[2] < 0.002 * f.mean() ** 2  # Cauchy & Schwarz: 0 for p prop. to f, but for the uniform share


def test_the_estimate_of_a_stratified_step_is_within_one_stratum_of_the_mean():
    """For a monotone f the error is below (f_0 - f_T) / G in every step, which independent draws do not keep to."""
    T, G = 256, 16
    f = curve(T)

    def errors(kind):
        sampler = make_timestep_sampler(kind, T, RANDOMNESS)
        drawn = torch.stack([sampler.draw(step * G, G, batch_size=G)[0] for step in range(200)])
        return (f[drawn].mean(dim=1) - f.mean()).abs()

    bound = (f[0] - f[-1]) / G
    assert (errors("stratified") < bound).all()
    assert (errors("uniform") > bound).any()


def test_weighted_losses_are_observed_without_their_weights():
    T, G = 8, 16
    a, b = warm(T, curve(T)), warm(T, curve(T))
    timesteps, weights = a.draw(5 * G, G, batch_size=G)
    losses = torch.rand(G, generator=torch.Generator().manual_seed(0))
    a.observe(timesteps, losses)
    b.observe_step(5 * G, (losses * weights).requires_grad_())
    torch.testing.assert_close(a.losses, b.losses)
    assert not b.losses.requires_grad and torch.equal(a.observed, b.observed)
    assert (weights != 1).any()


def test_the_state_travels_in_the_state_dict():
    a, b = warm(20, curve(20)), make_timestep_sampler("loss_second_moment", 20, RANDOMNESS)
    assert not torch.equal(a.draw(0, 20, 20)[0], b.draw(0, 20, 20)[0])
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.draw(0, 20, 20)[0], b.draw(0, 20, 20)[0])
    a.observe(torch.tensor([0, 3]), torch.tensor([9.0, 8.0]))
    b.observe(torch.tensor([0, 3]), torch.tensor([9.0, 8.0]))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    for kind in ("uniform", "stratified"):  # checkpoints of runs without one stay as they were
        sampler = make_timestep_sampler(kind, 20, RANDOMNESS)
        assert not sampler.learns and not sampler.state_dict()
    assert a.learns


def test_losses_of_zero_draw_uniformly():
    sampler = warm(6, torch.zeros(6))
    assert sampler.probabilities().tolist() == pytest.approx([1 / 6] * 6)


def test_a_loss_that_is_not_finite_still_draws_timesteps_that_exist():
    """The run stops at its next check and names the rows; until then nothing else must fail."""
    for value in (float("nan"), float("inf")):
        timesteps, _ = warm(6, torch.tensor([1.0, value, 1.0, 1.0, 1.0, 1.0])).draw(0, 32, batch_size=32)
        assert timesteps.min() >= 0 and timesteps.max() < 6


# ---- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 3), (2, 1), (2, 3), (4, 2)])
def test_terms_of_all_processes_come_in_order_of_position(processes, accumulation):
    G = 24
    size = G // (processes * accumulation)
    micro_batches = torch.arange(G).reshape(accumulation, processes, size)  # as `PositionBatches` deals them
    mine = [list(micro_batches[:, rank]) for rank in range(processes)]
    everyone = SimpleNamespace(gather=lambda local: torch.cat([torch.stack(terms) for terms in mine]))
    for rank in range(processes):
        assert in_order_of_positions(mine[rank], everyone).tolist() == list(range(G))


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: make_timestep_sampler("random", 10, RANDOMNESS), "'random'"),
        (lambda: make_timestep_sampler("uniform", 0, RANDOMNESS), "num_timesteps >= 1, got 0"),
        (lambda: LossSecondMomentSampler(10, RANDOMNESS, num_bins=11), "1 .. 10 .*got 11"),
        (lambda: LossSecondMomentSampler(10, RANDOMNESS, num_bins=0), "got 0"),
        (lambda: LossSecondMomentSampler(10, RANDOMNESS, history=0), "at least 1 loss, got 0"),
        (lambda: LossSecondMomentSampler(10, RANDOMNESS, uniform_share=0.0), r"\(0, 1\], got 0.0"),
        (lambda: LossSecondMomentSampler(10, RANDOMNESS, uniform_share=1.5), r"\(0, 1\], got 1.5"),
        (lambda: StratifiedTimestepSampler(10, RANDOMNESS).draw(0, 4, batch_size=0), "batch_size >= 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
