r"""Rules for the noise ladder, against brute force, simulation-free chi laws, and the published ladders and steps.

Song & Ermon 2020, Appendix B, and the configs of their code: (sigma_max, levels, pixels a side, K, step size) with
sigma_min = 0.01; the step size is e sigma_min^2, published with two digits.
"""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.spatial.distance import pdist

from annealers.noise_ladder import level_overlap, level_ratio, suggest_num_levels, suggest_sigma_max, suggest_step_size
from annealers.schedulers.gaussian_path import Level
from annealers.schedulers.langevin import end_variance

PUBLISHED = [
    (50, 232, 32, 5, 6.2e-6),
    (90, 500, 64, 5, 3.3e-6),
    (190, 1086, 128, 3, 1.8e-6),
    (348, 2311, 256, 3, 9.0e-7),
]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- the largest level ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [2, 3, 499, 500, 501, 1203])  # on either side of the blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_level_is_the_largest_distance(N, dtype):
    images = draw(N, 1, 2, 3, dtype=dtype) + 1e5  # far from the origin, where squares would cancel
    expected = pdist(images.double().reshape(N, -1).numpy()).max()
    assert suggest_sigma_max(images) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("i", "j"), [(0, 1), (0, 1400), (700, 1400), (1399, 1400), (3, 650)])
def test_the_largest_distance_is_found_wherever_the_two_rows_are(i, j):
    images = 0.1 * draw(1401, 4)
    images[i], images[j] = 3.0, -3.0
    assert suggest_sigma_max(images) == pytest.approx(12.0)


def test_of_more_rows_a_fixed_choice_gives_a_lower_bound():
    images = draw(900, 5)
    whole = suggest_sigma_max(images)
    choices = {suggest_sigma_max(images, max_samples=60, seed=seed) for seed in range(8)}
    assert suggest_sigma_max(images, max_samples=60) in choices
    assert suggest_sigma_max(images, max_samples=60, seed=3) == suggest_sigma_max(images, max_samples=60, seed=3)
    assert len(choices) > 4 and 0.6 * whole < min(choices) <= max(choices) <= whole
    assert suggest_sigma_max(images, max_samples=900) == whole
    two = {suggest_sigma_max(torch.arange(50.0)[:, None], max_samples=2, seed=seed) for seed in range(20)}
    assert len(two) > 5 and two <= set(range(1, 50))  # a single pair each


def test_choosing_rows_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    suggest_sigma_max(draw(30, 2), max_samples=5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.uint8), {}, "floating-point values.*got torch.uint8"),
        (torch.zeros(1, 2), {}, "two images to compare, got 1 with max_samples=2000"),
        (torch.zeros(9, 2), {"max_samples": 1}, "two images to compare, got 9 with max_samples=1"),
        (torch.tensor([[0.0], [math.nan]]), {}, "finite"),
    ],
)
def test_images_that_cannot_be_compared_are_refused(images, options, message):
    with pytest.raises(ValueError, match=message):
        suggest_sigma_max(images, **options)


# ---- the number of levels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma_max", "levels", "side", "K", "step"), PUBLISHED)
def test_the_published_ladders_are_those_of_an_overlap_of_5667_and_of_half_but_for_six_per_cent(
    sigma_max, levels, side, K, step
):
    assert suggest_num_levels(0.01, sigma_max, 3 * side**2, overlap=0.5667) == levels
    assert suggest_num_levels(0.01, sigma_max, 3 * side**2) == pytest.approx(levels / 1.059, rel=2e-3)


@pytest.mark.parametrize("D", [300, 3072])
@pytest.mark.parametrize("ratio", [1.001, 1.03, 1.1])
def test_the_overlap_is_the_share_of_noise_norms_within_three_deviations_of_the_next_level(D, ratio):
    # the law of |noise| at deviation `ratio` is chi; within sqrt(D) +- 3 / sqrt(2) of the level of deviation 1 to
    # which the rule, with its 3 gamma, adds the width of the wider level
    within = np.sqrt(D) + 3 * ratio / np.sqrt(2) * np.array([-1, 1])
    share = np.diff(scipy.stats.norm(np.sqrt(D) * ratio, 1 / np.sqrt(2)).cdf(within)).item()
    assert level_overlap(ratio, D) == pytest.approx(share, abs=1e-12)
    exact = np.diff(scipy.stats.chi(D, scale=ratio).cdf(within)).item()
    assert level_overlap(ratio, D) == pytest.approx(exact, abs=0.08)


@pytest.mark.parametrize("D", [5, 8, 64, 3072, 3 * 1024**2])
@pytest.mark.parametrize("overlap", [0.1, 0.5, 0.95])
def test_the_ratio_has_the_overlap_that_was_asked_for(D, overlap):
    ratio = level_ratio(D, overlap)
    assert ratio > 1
    assert level_overlap(ratio, D) == pytest.approx(overlap, abs=1e-6)


@pytest.mark.parametrize("D", [64, 3072])
def test_the_number_of_levels_is_that_whose_ratio_is_nearest(D):
    for sigma_max in (0.011, 0.02, 3.0, 50.0):
        L, wanted = suggest_num_levels(0.01, sigma_max, D), math.log(level_ratio(D))
        steps = {n: abs(math.log(sigma_max / 0.01) / wanted - n) for n in range(1, L + 3)}
        assert min(steps, key=steps.get) == L - 1
        assert L >= 2


def test_a_longer_ladder_and_a_larger_overlap_need_more_levels_and_units_do_not_matter():
    base = suggest_num_levels(0.01, 50.0, 3072)
    assert suggest_num_levels(0.01, 90.0, 3072) > base
    assert suggest_num_levels(0.01, 50.0, 3072, overlap=0.8) > base
    assert suggest_num_levels(0.02, 100.0, 3072) == base


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1.0, 100), r"0 < sigma_min < sigma_max, got 0\.0 and 1\.0"),
        ((1.0, 1.0, 100), r"0 < sigma_min < sigma_max, got 1\.0 and 1\.0"),
        ((1.0, math.inf, 100), "got 1.0 and inf"),
        ((0.01, 1.0, 4), "fewer than 5 dimensions.*got dimension=4"),
        ((0.01, 1.0, 100, 0.0), r"overlap must lie in 0 \.\. 0.9973.*got 0\.0"),
        ((0.01, 1.0, 100, 0.998), r"overlap must lie in 0 \.\. 0.9973.*got 0\.998"),
    ],
)
def test_a_ladder_that_cannot_be_laid_out_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        suggest_num_levels(*arguments)


def test_in_four_dimensions_all_levels_overlap():
    for D in (1, 2, 3, 4):
        assert min(level_overlap(ratio, D) for ratio in np.geomspace(1, 1e4, 100)) > 0.99
    assert level_overlap(1e4, 5) < 1e-12


# ---- the step size --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma_max", "levels", "side", "K", "step"), PUBLISHED)
def test_the_published_step_sizes_are_those_of_the_rule(sigma_max, levels, side, K, step):
    ratio = (sigma_max / 0.01) ** (1 / (levels - 1))
    assert suggest_step_size(ratio, K) * 0.01**2 == pytest.approx(step, rel=0.02)  # two digits: 9.0 is 8.93


def variance_after_one_level(ratio, K, e):
    """What the recursion of annealed Langevin makes of noise of the level before, by simulating its moments."""
    variance = ratio**2
    for _ in range(K):
        variance = (1 - e) ** 2 * variance + 2 * e
    return variance


@pytest.mark.parametrize("ratio", [1.001, 1.04, 1.5, 10.0])
@pytest.mark.parametrize("K", [1, 3, 100])
def test_no_other_step_leaves_a_variance_nearer_to_one(ratio, K):
    best = variance_after_one_level(ratio, K, suggest_step_size(ratio, K))
    others = [variance_after_one_level(ratio, K, e) for e in np.geomspace(1e-7, 1, 2000)]
    assert 1 < best <= min(others) + 1e-9


@pytest.mark.parametrize("ratio", [1.02, 1.04, 1.5])
@pytest.mark.parametrize("K", [1, 5, 20])
def test_down_a_whole_ladder_no_other_step_ends_nearer_to_the_right_variance(ratio, K):
    levels = []
    for s in 0.01 * ratio ** np.arange(round(20 / math.log(ratio)))[::-1]:
        levels.append(Level(0, 1 / math.sqrt(1 + s**2), s / math.sqrt(1 + s**2)))
    best = end_variance(levels, suggest_step_size(ratio, K, whole_ladder=True), K)
    others = [end_variance(levels, e, K) for e in np.geomspace(0.003, 1, 60)]
    assert 1 < best <= min(others) + 1e-6
    assert best < end_variance(levels, suggest_step_size(ratio, K), K)


def test_the_ladder_of_the_paper_ends_with_the_variance_that_is_told():
    levels = [Level(0, 1 / math.sqrt(1 + s**2), s / math.sqrt(1 + s**2)) for s in np.geomspace(50, 0.01, 232)]
    step = suggest_step_size(5000 ** (1 / 231), 5, whole_ladder=True)
    assert step == pytest.approx(0.11, abs=0.005)
    assert end_variance(levels, 0.062, 5) == pytest.approx(1.13, abs=0.005)
    assert end_variance(levels, step, 5) == pytest.approx(1.10, abs=0.005)


@pytest.mark.parametrize(
    ("ratio", "K", "message"),
    [
        (1.0, 5, "ratio must be above 1, got 1.0"),
        (math.inf, 5, "ratio must be above 1, got inf"),
        (1.1, 0, "steps_per_level must be a positive integer, got 0"),
        (1.1, True, "steps_per_level must be a positive integer, got True"),
        (1.1, 2.0, "steps_per_level must be a positive integer, got 2.0"),
    ],
)
def test_a_level_without_steps_or_distance_is_refused(ratio, K, message):
    with pytest.raises(ValueError, match=message):
        suggest_step_size(ratio, K)
