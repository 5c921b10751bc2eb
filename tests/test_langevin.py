r"""Properties of Langevin dynamics on one level and of what annealing makes of its discretisation.

Oracles: for Gaussian data a step is affine, read off x = 0, 1 with the noise known, so its law is a recursion of a
mean and a variance; and the closed forms of Song & Ermon 2020, Prop. 4, and of the fixed point of an autoregression.
"""

import math
from itertools import product

import pytest
import torch

from annealers.exact import Gaussian, GaussianMixture
from annealers.schedulers.gaussian_path import Level
from annealers.schedulers.langevin import end_variance, langevin_step, sufficient_settings

LEVELS = [Level(0, 0.9, 0.3), Level(0, 0.1, 2.0), Level(0, 0.0, 1.0), Level(0, 1.0, 0.01)]
# smallest and largest level, number of levels L, steps per level K, and step size over the variance of the noise, of
# the configs of NCSN and NCSNv2
NCSN = (0.01, 1.0, 10, 100, 2e-5 / 0.01**2)
NCSNV2 = (0.01, 50.0, 232, 5, 6.2e-6 / 0.01**2)
CELEBA = (0.01, 90.0, 500, 5, 3.3e-6 / 0.01**2)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ladder(smallest, largest, L, variance_preserving=True):
    ratios = [largest * (smallest / largest) ** (i / max(L - 1, 1)) for i in range(L)]
    if not variance_preserving:
        return [Level(0, 1.0, ratio) for ratio in ratios]
    return [Level(0, 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)) for ratio in ratios]


def step_as_recursion(law, level, step_size):
    """Offset, slope and variance of a step with the exact score of a Gaussian law."""
    x = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    z = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    eps = law.noise(x, level.alpha, level.sigma)
    offset, end, noisy = langevin_step(x, eps, level.sigma, step_size, z).tolist()
    return offset, end - offset, (noisy - offset) ** 2


# ---- one level ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_a_step_follows_the_score_and_adds_noise_of_twice_its_size(level):
    law, x, z = GaussianMixture([0.3, 0.7], [-1.0, 0.8], [0.04, 0.09]), draw(7), draw(7, seed=1)
    delta = 0.3 * level.sigma**2
    expected = x + delta * law.score(x, level.alpha, level.sigma) + math.sqrt(2 * delta) * z
    step = langevin_step(x, law.noise(x, level.alpha, level.sigma), level.sigma, delta, z)
    torch.testing.assert_close(step, expected, rtol=1e-12, atol=1e-12)


def test_each_sample_may_have_its_own_step_size():
    x, eps, z = (draw(3, 2, 4, seed=seed) for seed in range(3))
    sizes = torch.tensor([0.01, 0.2, 0.0], dtype=torch.float64)
    together = langevin_step(x, eps, 0.5, sizes.reshape(3, 1, 1), z)
    for i, size in enumerate(sizes.tolist()):
        assert torch.equal(together[i], langevin_step(x[i], eps[i], 0.5, size, z[i]))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("data_variance", [0.0, 0.04, 1.0, 9.0])
@pytest.mark.parametrize("relative_size", [0.01, 0.3, 1.0])
def test_the_stationary_variance_is_too_large_by_half_the_step_size(relative_size, data_variance, level):
    law, delta = Gaussian(0.7, variance=data_variance), relative_size * level.sigma**2
    v = level.alpha**2 * data_variance + level.sigma**2
    offset, slope, noise = step_as_recursion(law, level, delta)
    assert -1e-12 <= slope < 1  # a step of up to sigma^2 contracts without overshooting, whatever the data
    assert offset / (1 - slope) == pytest.approx(level.alpha * 0.7)  # the mean is right
    stationary = v / (1 - delta / (2 * v))
    assert noise / (1 - slope**2) == pytest.approx(stationary, rel=1e-8)  # 1 - slope may be 1e-7
    assert delta / 2 <= stationary - v <= delta


def test_many_steps_converge_to_the_stationary_law_from_anywhere():
    law, level, delta = Gaussian(0.7, variance=0.04), LEVELS[0], 0.3 * LEVELS[0].sigma ** 2
    v = level.alpha**2 * 0.04 + level.sigma**2
    offset, slope, noise = step_as_recursion(law, level, delta)
    mean, variance = 5.0, 30.0
    for K in range(1, 200):
        mean, variance = offset + slope * mean, slope**2 * variance + noise
        gap = (1 - delta / v) ** (2 * K) * (30.0 - v / (1 - delta / (2 * v)))
        assert variance - v / (1 - delta / (2 * v)) == pytest.approx(gap, abs=1e-12)
    assert mean == pytest.approx(level.alpha * 0.7, rel=1e-12)


# ---- annealing on pure noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "published"), [(NCSN, 1.111), (NCSNV2, 1.0555), (CELEBA, 1.031)])
def test_one_level_of_the_published_settings_has_the_variance_of_proposition_4(settings, published):
    smallest, largest, L, K, e = settings
    g = (largest / smallest) ** (1 / (L - 1))  # between neighbouring levels
    stationary = 2 * e / (1 - (1 - e) ** 2)
    expected = (1 - e) ** (2 * K) * (g**2 - stationary) + stationary
    # what was right on the level before, sigma = 1, starts on this one, sigma = 1 / g
    assert end_variance([Level(0, 0.5, 1 / g)], e, K) == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize("variance_preserving", [True, False])
@pytest.mark.parametrize(
    ("smallest", "largest", "L", "K", "e"), [NCSN, NCSNV2, (0.02, 20.0, 9, 3, 0.2), (0.1, 0.1, 1, 4, 1.0)]
)
def test_the_end_variance_is_that_of_the_recursion_of_the_steps(smallest, largest, L, K, e, variance_preserving):
    levels = ladder(smallest, largest, L, variance_preserving)
    noise_only, variance, alpha_before = Gaussian(0.0, variance=0.0), 1.0, None
    for level in levels:
        if alpha_before is not None:
            variance *= (level.alpha / alpha_before) ** 2  # the state keeps its signal
        for _ in range(K):
            _, slope, noise = step_as_recursion(noise_only, level, e * level.sigma**2)
            variance = slope**2 * variance + noise
        alpha_before = level.alpha
    assert end_variance(levels, e, K) == pytest.approx(variance / levels[-1].sigma ** 2, rel=1e-10)


@pytest.mark.parametrize("e", [0.01, 0.2, 0.9])
def test_many_steps_on_a_level_forget_the_levels_before(e):
    stationary = 1 / (1 - e / 2)
    assert end_variance(ladder(0.01, 50.0, 5), e, 5000) == pytest.approx(stationary, rel=1e-12)
    one_step = 2 * e + (1 - e) ** 2 * stationary * 25.0
    levels = [Level(0, 1.0, stationary**-0.5), Level(0, 1.0, stationary**-0.5 / 5)]  # starts out stationary
    assert end_variance(levels, e, 1) == pytest.approx(one_step, rel=1e-12)


def test_with_ever_closer_levels_the_end_variance_is_right_up_to_the_step():
    variances = [end_variance(ladder(0.01, 50.0, L), 0.05, 5) for L in (20, 100, 500, 5000)]
    assert variances == sorted(variances, reverse=True)
    assert variances[-1] == pytest.approx(1 / (1 - 0.05 / 2), rel=0.02)
    assert variances[0] > 100


def test_leaving_a_level_without_signal_leaves_the_noise_as_it_is():
    without_signal, flow = Level(1.0, 0.0, 1.0), [Level(0.8, 0.2, 0.8), Level(0.2, 0.8, 0.2)]
    e, K = 0.1, 3
    kept, stationary = 0.9**6, 1 / 0.95
    variance = kept * (1 - stationary) + stationary
    variance = kept * (variance - stationary) + stationary
    variance = kept * (variance * (4 / 0.25) ** 2 - stationary) + stationary
    assert end_variance([without_signal, *flow], e, K) == pytest.approx(variance, rel=1e-12)


# ---- settings that are enough ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("L", [2, 5, 14, 15, 50, 232])
@pytest.mark.parametrize("limit", [1.2, 1.05])
def test_the_sufficient_settings_stay_below_the_limit_with_as_few_steps_as_any(limit, L):
    levels = ladder(0.01, 50.0, L)
    e, K = sufficient_settings(levels, limit)
    assert end_variance(levels, e, K) <= limit
    assert end_variance(levels, float(f"{e:.3g}"), K) <= limit  # as it is printed
    fewer = [end_variance(levels, e, K - 1) for e in torch.linspace(0.01, 0.3, 30).tolist()]
    assert min(fewer, default=math.inf) > limit * 0.99  # which another grid of step sizes may just reach


@pytest.mark.parametrize("limit", [1.2, 1.05])
def test_one_step_fewer_than_the_sufficient_number_is_too_few(limit):
    for L in range(2, 60):
        levels = ladder(0.01, 50.0, L)
        e, K = sufficient_settings(levels, limit)
        assert K == 1 or end_variance(levels, e, K - 1) > limit


@pytest.mark.parametrize("e", [0.02, 0.1, 0.3])
def test_more_steps_never_hurt(e):
    levels = ladder(0.01, 50.0, 10)
    variances = [end_variance(levels, e, K) for K in range(1, 400)]
    assert all(after <= before * (1 + 1e-12) for before, after in zip(variances, variances[1:], strict=False))


def test_one_level_that_is_nearly_noise_needs_one_step():
    assert sufficient_settings([Level(0, 0.1, 0.995)], 1.2)[1] == 1


def test_a_step_size_whose_stationary_variance_is_above_the_limit_is_not_proposed():
    for L, limit in product((1, 3, 40), (1.01, 1.1, 1.2)):
        e, _ = sufficient_settings(ladder(0.01, 5.0, L), limit)
        assert 1 / (1 - e / 2) <= limit
