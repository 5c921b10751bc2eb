"""The Fréchet distance against scipy's matrix square root and closed forms."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from annealers.metrics import frechet_distance, mean_and_standard_error, psnr


def features(count, dimensions, seed, dtype=torch.float64):
    """Correlated features whose scales spread over two orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-1, 1, dimensions, dtype=torch.float64)
    draws = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    return (draws @ (mixing * scales) + torch.randn(dimensions, generator=generator)).to(dtype)


def by_matrix_root(a, b):
    """Heusel et al. 2017, Eq. 6, as written."""
    a, b = a.numpy(), b.numpy()
    covariance_a, covariance_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariance_a + covariance_b - 2 * root)


def with_moments(mean, covariance):
    """2 D + 2 rows with exactly this mean and covariance: the mean twice and the mean +- the rows of a scaled root."""
    root = torch.linalg.cholesky(covariance).T  # rows r_i with sum r_i r_i^T = covariance
    count = 2 * len(root) + 2
    steps = root * math.sqrt((count - 1) / 2)
    return torch.cat([mean + steps, mean - steps, mean.expand(2, -1)])


@pytest.mark.parametrize(("count_a", "count_b", "dimensions"), [(300, 200, 1), (300, 200, 7), (100, 400, 40)])
def test_the_distance_is_that_of_the_published_formula(count_a, count_b, dimensions):
    a, b = features(count_a, dimensions, 1), features(count_b, dimensions, 2)
    assert frechet_distance(a, b) == pytest.approx(by_matrix_root(a, b), rel=1e-9)


def test_laws_with_common_axes_have_the_closed_form_of_their_scales():
    """For covariances with the same eigenvectors, d^2 = |m_a - m_b|^2 + sum (s_a - s_b)^2 over their scales s."""
    axes = torch.linalg.qr(features(5, 5, 0)).Q
    scales_a, scales_b = torch.tensor([3.0, 2, 1, 0.5, 0.1]).double(), torch.tensor([0.2, 4, 1, 0.1, 2]).double()
    shift = torch.tensor([1.0, -2, 0, 0.5, 3]).double()
    a = with_moments(torch.zeros(5).double(), axes @ torch.diag(scales_a**2) @ axes.T)
    b = with_moments(shift, axes @ torch.diag(scales_b**2) @ axes.T)
    expected = (shift**2).sum() + ((scales_a - scales_b) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-12)


def test_sets_without_a_common_axis_and_singular_covariances_are_exact():
    """Data on two orthogonal lines: C_a C_b = 0, so d^2 is the sum of the variances and of the squared shift."""
    line = torch.linspace(-1, 1, 11, dtype=torch.float64)[:, None]
    along_first, along_second = line * torch.eye(600)[0], 2 * line * torch.eye(600)[1] + torch.eye(600)[2]
    variance = line.var().item()
    assert frechet_distance(along_first, along_second) == pytest.approx(variance + 4 * variance + 1, rel=1e-12)


@pytest.mark.parametrize(("count", "dimensions"), [(500, 20), (20, 500)])
def test_a_set_is_at_distance_zero_from_itself_and_from_its_reordering(count, dimensions):
    a = features(count, dimensions, 3)
    scale = a.var(dim=0).sum().item()
    assert 0 <= frechet_distance(a, a) < 1e-11 * scale
    assert 0 <= frechet_distance(a, a.flip(0)) < 1e-11 * scale


def test_the_distance_is_symmetric_and_indifferent_to_rotations():
    a, b = features(60, 9, 1), features(50, 9, 2)
    rotation = torch.linalg.qr(features(9, 9, 3)).Q
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-11)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b), rel=1e-11)


def test_a_shift_adds_its_square_and_a_scale_multiplies_by_its_square():
    a, b = features(60, 9, 1), features(60, 9, 1) + 2.0
    assert frechet_distance(a, b) == pytest.approx(36.0, rel=1e-9)
    c = features(50, 9, 2)
    assert frechet_distance(3 * a, 3 * c) == pytest.approx(9 * frechet_distance(a, c), rel=1e-11)


def test_single_precision_features_are_compared_in_double():
    a, b = features(200, 8, 1, torch.float32) + 1000, features(200, 8, 2, torch.float32) + 1000
    assert frechet_distance(a, b) == pytest.approx(by_matrix_root(a.double(), b.double()), rel=1e-8)


def test_features_that_do_not_fit_are_refused():
    good = features(10, 3, 1)
    with pytest.raises(ValueError, match=r"features_b must have shape \(N, D\) with N >= 2, got \(1, 3\)"):
        frechet_distance(good, good[:1])
    with pytest.raises(ValueError, match=r"features_a must have shape .* got \(10, 3, 1\)"):
        frechet_distance(good[:, :, None], good)
    with pytest.raises(ValueError, match="3 and 2 features"):
        frechet_distance(good, good[:, :2])
    for value in (math.nan, math.inf):
        bad = good.clone()
        bad[4, 1] = bad[6, 0] = value
        with pytest.raises(ValueError, match="features_b has values that are not finite, in 2 rows, first row 4"):
            frechet_distance(good, bad)


def test_the_mean_has_the_standard_error_of_its_sample():
    mean, error = mean_and_standard_error(torch.tensor([1.0, 2.0, 6.0]))
    assert mean == pytest.approx(3) and error == pytest.approx(math.sqrt(7 / 3))
    with pytest.raises(ValueError, match=r"\(1,\)"):
        mean_and_standard_error(torch.ones(1))
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        mean_and_standard_error(torch.ones(2, 2))


def test_the_psnr_is_of_images_as_they_are_shown():
    """A Gaussian's mean may lie beyond what a picture can hold."""
    images, truth = torch.tensor([3.0, 0.5]).view(2, 1, 1, 1).expand(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    torch.testing.assert_close(psnr(images, truth), 20 * torch.tensor([2.0, 4.0]).log10())
    assert psnr(truth, truth).isinf().all()
