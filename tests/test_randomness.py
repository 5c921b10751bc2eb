"""Positional randomness: values depend on (seed, stream, position) alone, and have the laws they claim."""

import numpy as np
import pytest
import scipy.stats
import torch

from annealers.randomness import PositionalRandomness

SHAPES = [(), (1,), (3,), (7,), (8,), (9,), (3, 8, 8), (2, 3, 5, 7)]


def draw(randomness, kind, first_position, count, shape=()):
    if kind == "uniform":
        return randomness.uniform("stream", first_position, count, shape)
    if kind == "normal":
        return randomness.normal("stream", first_position, count, shape)
    return randomness.integers("stream", first_position, count, high=10**6)


def assert_uncorrelated(a, b):
    """|correlation| below 4.5 of its standard errors 1/sqrt(n): 7e-6 of independent pairs would fail."""
    a, b = np.ravel(a), np.ravel(b)
    assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / np.sqrt(len(a))


@pytest.mark.parametrize("kind", ["uniform", "normal", "integers"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_block_of_positions_is_the_same_however_it_is_split(kind, shape):
    whole = draw(PositionalRandomness(5), kind, 0, 64, shape)
    for cuts in ([0, 64], [0, 1, 64], [0, 13, 14, 31, 64], range(65)):
        ends = zip(cuts[:-1], cuts[1:], strict=True)
        parts = [draw(PositionalRandomness(5), kind, first, last - first, shape) for first, last in ends]
        assert torch.equal(torch.cat(parts), whole)


def test_reading_order_does_not_matter():
    randomness = PositionalRandomness(5)
    late = randomness.normal("noise", 900, 4, (3,))
    randomness.uniform("other", 0, 10)
    assert torch.equal(randomness.normal("noise", 896, 8, (3,))[4:], late)


@pytest.mark.parametrize("first_position", [2**40, 2**63])
def test_positions_of_any_size_are_distinct(first_position):
    blocks = [PositionalRandomness(5).normal("noise", first, 2, (6,)) for first in (0, first_position)]
    assert not torch.equal(*blocks)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_types_are_those_promised(shape):
    randomness = PositionalRandomness(0)
    for count in (0, 1, 5):
        uniform, normal = randomness.uniform("s", 3, count, shape), randomness.normal("s", 3, count, shape)
        integers = randomness.integers("s", 3, count, 7)
        assert uniform.shape == normal.shape == (count, *shape) and integers.shape == (count,)
        assert (uniform.dtype, normal.dtype, integers.dtype) == (torch.float64, torch.float32, torch.int64)


def test_no_number_is_used_twice_within_a_stream():
    for shape in SHAPES:
        numbers = PositionalRandomness(1).uniform("s", 0, 200, shape).ravel()
        assert numbers.unique().numel() == numbers.numel()


def test_normals_within_a_stream_are_uncorrelated_between_neighbours():
    normals = PositionalRandomness(1).normal("noise", 0, 2000, (32,)).double().numpy()
    for lag in (1, 2, 8):
        assert_uncorrelated(normals[:, lag:], normals[:, :-lag])  # along the shape: lag 1 has pairs of one radius
        assert_uncorrelated(normals[lag:], normals[:-lag])  # along the positions
        assert_uncorrelated(normals[:, lag:] ** 2, normals[:, :-lag] ** 2)


def test_the_correlation_test_can_fail():
    normals = PositionalRandomness(1).normal("noise", 0, 2000, (32,)).double().numpy()
    with pytest.raises(AssertionError):
        assert_uncorrelated(normals, 0.03 * normals + PositionalRandomness(2).normal("noise", 0, 2000, (32,)).numpy())


@pytest.mark.parametrize(
    "change",
    [{"seed": 4}, {"seed": 2**63}, {"stream": "b"}, {"shape": (31,)}, {"shape": (32, 1)}, {"first_position": 1}],
    ids=str,
)
def test_another_seed_stream_shape_or_position_gives_independent_normals(change):
    def normals(seed=3, stream="a", first_position=0, shape=(32,)):
        return PositionalRandomness(seed).normal(stream, first_position, 2000, shape).double().flatten(1)[:, :31]

    a, b = normals(), normals(**change)
    assert not (a == b).any(dim=1).any()
    assert_uncorrelated(a, b)


def test_shapes_of_any_sequence_type_are_the_same_shape():
    draw = PositionalRandomness(3).normal
    assert torch.equal(draw("noise", 0, 2, torch.Size([3, 2])), draw("noise", 0, 2, (3, 2)))


def test_uniforms_and_integers_of_one_name_are_independent():
    randomness = PositionalRandomness(3)
    assert_uncorrelated(randomness.uniform("t", 0, 50_000), randomness.integers("t", 0, 50_000, 1000))


def test_normals_follow_the_normal_law():
    normals = PositionalRandomness(8).normal("noise", 10, 100, (2001,)).numpy()
    for part in (normals, normals[:, ::2], normals[:, 1::2]):  # the cosine and sine halves too
        assert scipy.stats.kstest(np.ravel(part), "norm").pvalue > 1e-3
    assert scipy.stats.kstest(np.ravel(normals) * 1.03, "norm").pvalue < 1e-3  # the test can fail


def test_normals_reach_the_tails_and_stay_finite():
    normals = PositionalRandomness(8).normal("noise", 0, 2000, (1000,))
    beyond = (normals.abs() > 4).sum().item()
    expected = 2e6 * 2 * scipy.stats.norm.sf(4)  # 127 +- 11
    assert normals.isfinite().all() and abs(beyond - expected) < 4.5 * expected**0.5
    assert normals.abs().max() <= np.sqrt(2 * 32 * np.log(2))


@pytest.mark.parametrize("word", [0, 2**64 - 1])
def test_the_extreme_words_give_finite_normals(word, monkeypatch):
    monkeypatch.setattr(PositionalRandomness, "_words", lambda *_: np.full((1, 1), word, dtype=np.uint64))
    normals = PositionalRandomness(0).normal("noise", 0, 1, (2,))
    assert normals.isfinite().all() and normals.abs().max() <= 6.67


def test_uniforms_fill_the_unit_interval():
    uniforms = PositionalRandomness(8).uniform("t", 0, 100_000).numpy()
    assert uniforms.min() >= 0 and uniforms.max() < 1
    assert scipy.stats.kstest(uniforms, "uniform").pvalue > 1e-3


def test_uniforms_have_53_random_bits():
    bits = (PositionalRandomness(8).uniform("t", 0, 4096) * 2**53).long()  # exact: the uniforms are multiples of 2^-53
    ones = torch.stack([(bits >> k) & 1 for k in range(53)]).double().mean(dim=1)
    assert ((ones - 0.5).abs() < 4.5 * 0.5 / 4096**0.5).all()


@pytest.mark.parametrize("high", [1, 7, 1000])
def test_integers_are_uniform_below_high(high):
    integers = PositionalRandomness(8).integers("t", 0, 50_000, high)
    counts = np.bincount(integers.numpy(), minlength=high)
    assert len(counts) == high
    if high > 1:
        assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_permutations_are_permutations_and_differ_between_indices():
    randomness = PositionalRandomness(8)
    first, second = (randomness.permutation("epoch", index, 1000) for index in (0, 1))
    assert torch.equal(first.sort().values, torch.arange(1000)) and first.dtype == torch.int64
    assert_uncorrelated(first, second)
    assert_uncorrelated(first, torch.arange(1000))
    assert torch.equal(first, PositionalRandomness(8).permutation("epoch", 0, 1000))
    assert not torch.equal(first, PositionalRandomness(9).permutation("epoch", 0, 1000))
    assert not torch.equal(first, randomness.permutation("other", 0, 1000))


def test_every_permutation_of_three_is_equally_likely():
    randomness = PositionalRandomness(8)
    codes = [randomness.permutation("epoch", index, 3) @ torch.tensor([9, 3, 1]) for index in range(3000)]
    counts = np.unique(torch.stack(codes).numpy(), return_counts=True)[1]
    assert len(counts) == 6 and scipy.stats.chisquare(counts).pvalue > 1e-3


def test_step_seeds_differ_between_steps_processes_and_seeds():
    seeds = [PositionalRandomness(s).step_seed(step, p) for s in range(3) for step in range(20) for p in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))
    assert PositionalRandomness(1).step_seed(5, 2) == PositionalRandomness(1).step_seed(5, 2)


def test_the_sequence_of_this_release_is_kept():
    """Resuming a run with another version of this file, or of NumPy, must continue the same numbers."""
    randomness = PositionalRandomness(1234)
    assert randomness.uniform("timestep", 7, 2).tolist() == [0.8514995955584931, 0.869899050550305]
    first_row = torch.tensor([0.29257679, 0.70227426, -0.1492255, 0.90429801])
    torch.testing.assert_close(randomness.normal("noise", 7, 1, (4, 4))[0, 0], first_row, rtol=1e-6, atol=0)
    assert randomness.permutation("epoch", 1, 5).tolist() == [0, 4, 3, 1, 2]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=str(seed)):
        PositionalRandomness(seed)


def test_arguments_out_of_range_are_refused():
    randomness = PositionalRandomness(0)
    with pytest.raises(ValueError, match="-3"):
        randomness.uniform("t", -3, 1)
    with pytest.raises(ValueError, match="high=0"):
        randomness.integers("t", 0, 1, 0)
    with pytest.raises(ValueError, match="-1"):
        randomness.step_seed(-1, 0)
