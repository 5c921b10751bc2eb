"""Properties of the kernel distance, of diversity and of features, on laws and sums that are known exactly."""

import doctest
import itertools
import math

import numpy as np
import pytest
import torch
from diffusers.utils.logging import enable_progress_bar
from torch import nn

from annealers import NoisyClassifierModel, feature_metrics
from annealers.feature_metrics import (
    COLLAPSED,
    class_diversity,
    classifier_features,
    diversity,
    features_of,
    kernel_distance,
    pixel_features,
)

LAW_P = ([[0.0, 1.0], [2.0, -1.0], [-1.0, 0.5]], [0.5, 0.2, 0.3])  # points and their probabilities
LAW_Q = ([[1.0, 1.0], [-0.5, 0.25]], [0.6, 0.4])


def rows(count, dimensions, seed=0, dtype=torch.float64):
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def brute_force(a, b):
    """Lemma 6 of Gretton et al. 2012, pair by pair."""
    a, b = a.double().numpy(), b.double().numpy()

    def k(x, y):
        return (sum(x[i] * y[i] for i in range(len(x))) / len(x) + 1) ** 3

    m, n = len(a), len(b)
    return (
        sum(k(a[i], a[j]) for i, j in itertools.permutations(range(m), 2)) / (m * (m - 1))
        + sum(k(b[i], b[j]) for i, j in itertools.permutations(range(n), 2)) / (n * (n - 1))
        - 2 * sum(k(x, y) for x in a for y in b) / (m * n)
    )


def discrepancy(law_a, law_b):
    """MMD^2 of two laws on finitely many points: w^T K w, with the difference of their probabilities as w."""
    points = np.array(law_a[0] + law_b[0])
    w = np.array(law_a[1] + [-p for p in law_b[1]])
    return w @ (points @ points.T / points.shape[1] + 1) ** 3 @ w


def classifier(**options):
    torch.manual_seed(0)
    small = {"sample_size": 8, "in_channels": 1, "num_classes": 3, "block_out_channels": (8, 16)}
    return NoisyClassifierModel(**{**small, "norm_num_groups": 4, "attention_head_dim": 4, **options})


# ---- the kernel distance --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "dimensions"), [(2, 2, 1), (7, 4, 3), (5, 9, 12)])
def test_the_kernel_distance_is_the_sum_over_pairs(m, n, dimensions):
    a, b = rows(m, dimensions, 1), 1.5 * rows(n, dimensions, 2) + 0.3
    assert kernel_distance(a, b) == pytest.approx(brute_force(a, b), rel=1e-12)


def test_blocks_change_nothing(monkeypatch):
    a, b = rows(23, 5, 1), rows(17, 5, 2) + 1
    whole = kernel_distance(a, b)
    for block in (1, 4, 17):
        monkeypatch.setattr(feature_metrics, "BLOCK", block)
        assert kernel_distance(a, b) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(("law_a", "law_b"), [(LAW_P, LAW_Q), (LAW_P, LAW_P)])
@pytest.mark.parametrize(("m", "n"), [(2, 3), (3, 2)])
def test_its_mean_is_the_discrepancy_of_the_laws_at_any_number_of_samples(law_a, law_b, m, n):
    """The mean over every possible pair of sets, each with its probability; of a law and itself, it is zero."""
    mean = 0.0
    for choice in itertools.product(*[range(len(law_a[0]))] * m, *[range(len(law_b[0]))] * n):
        probabilities = [law_a[1][i] for i in choice[:m]] + [law_b[1][i] for i in choice[m:]]
        a = torch.tensor([law_a[0][i] for i in choice[:m]])
        b = torch.tensor([law_b[0][i] for i in choice[m:]])
        mean += math.prod(probabilities) * kernel_distance(a, b)
    assert mean == pytest.approx(discrepancy(law_a, law_b), abs=1e-12)


def test_normal_laws_on_the_line_have_their_closed_form_within_the_error():
    """k(x, y) = sum_j binom(3, j) (x y)^j in one dimension, so MMD^2 = sum_j binom(3, j) (E x^j - E y^j)^2."""
    mean, scale, count, repetitions = 0.4, 1.3, 200, 60

    def moments(m, s):
        return m, m * m + s * s, m**3 + 3 * m * s * s

    expected = sum(
        math.comb(3, j + 1) * (p - q) ** 2
        for j, (p, q) in enumerate(zip(moments(0, 1), moments(mean, scale), strict=True))
    )
    draws = rows(2 * repetitions, count, 7)
    distances = torch.tensor(
        [
            kernel_distance(x[:, None], mean + scale * y[:, None])
            for x, y in zip(draws[:repetitions], draws[repetitions:], strict=True)
        ]
    )
    error = distances.std().item() / repetitions**0.5
    assert error < 0.2 * expected  # so that a wrong power or coefficient is seen
    assert abs(distances.mean().item() - expected) < 3 * error


def test_it_is_symmetric_indifferent_to_order_and_to_rotations_and_of_either_sign():
    a, b = rows(40, 6, 1), rows(30, 6, 2)
    rotation = torch.linalg.qr(rows(6, 6, 3)).Q
    distance = kernel_distance(a, b)
    for other in (kernel_distance(b, a), kernel_distance(a.flip(0), b), kernel_distance(a @ rotation, b @ rotation)):
        assert other == pytest.approx(distance, rel=1e-10)
    signs = {kernel_distance(rows(20, 6, seed), rows(20, 6, seed + 100)) > 0 for seed in range(10)}
    assert signs == {True, False}


def test_single_precision_features_lose_nothing_in_the_sums():
    """A large common mean leaves a small difference of large sums."""
    a, b = (rows(100, 8, seed, torch.float32) + 30 for seed in (1, 2))
    assert kernel_distance(a, b) == kernel_distance(a.double(), b.double())
    assert kernel_distance(a, b) == pytest.approx(brute_force(a, b), rel=1e-6)


@pytest.mark.parametrize("measure", [kernel_distance, diversity])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(3), rows(3, 1), r"N >= 2, got \(3,\)"),
        (rows(3, 2), rows(1, 2), r"N >= 2, got \(1, 2\)"),
        (rows(3, 2), rows(3, 4), "2 and 4 features"),
        (rows(3, 2), torch.full((3, 2), math.nan), "not finite"),
        (torch.full((3, 2), math.inf), rows(3, 2), "not finite"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(measure, a, b, message):
    with pytest.raises(ValueError, match=message):
        measure(a, b)


# ---- diversity ------------------------------------------------------------------------------------------------------


def mean_squared_distance(features):
    """Over all pairs of different rows."""
    pairs = list(itertools.combinations(features.double(), 2))
    return sum((x - y).square().sum().item() for x, y in pairs) / len(pairs)


def test_diversity_is_the_ratio_of_the_mean_squared_distances_of_pairs():
    samples, real = 0.7 * rows(9, 4, 1) + 5, rows(13, 4, 2)
    expected = mean_squared_distance(samples) / mean_squared_distance(real)
    assert diversity(samples, real) == pytest.approx(expected, rel=1e-12)


def test_it_is_one_for_the_real_images_falls_with_the_square_of_the_scale_and_ignores_the_place():
    real = rows(50, 6, 1)
    assert diversity(real, real) == 1
    assert diversity(0.5 * real + 3, real) == pytest.approx(0.25, rel=1e-12)
    assert diversity(real[:1].expand(7, -1), real) == 0


def test_single_precision_features_far_from_zero_keep_their_spread():
    real = rows(50, 6, 1, torch.float32) + 1000
    assert diversity(real, real.double() - 1000) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("distinct", [2, 3])
def test_copies_of_m_real_images_have_an_expected_diversity_of_1_minus_1_over_m(distinct):
    """The mean over every choice of m of the real images with repetition, each copied equally often."""
    points = rows(5, 2, 1)
    real = torch.cat([points] * 1000)
    values = []
    for choice in itertools.product(range(len(points)), repeat=distinct):
        copies = points[list(choice)].repeat(1000, 1)
        values.append(diversity(copies, real))
    assert np.mean(values) == pytest.approx(1 - 1 / distinct, rel=1e-3)
    assert COLLAPSED == 1 - 1 / 2


def test_ten_samples_of_the_real_law_are_above_the_threshold_by_three_standard_errors():
    real = rows(5000, 10, 0)
    values = torch.tensor([diversity(rows(10, 10, seed), real) for seed in range(1, 401)])
    assert values.mean().item() == pytest.approx(1, abs=4 * values.std().item() / 20)
    assert values.std().item() == pytest.approx(math.sqrt(2 / (9 * 10)), rel=0.15)
    assert 1 - 3 * values.std().item() > COLLAPSED and values.min() > COLLAPSED


def test_within_classes_each_is_measured_by_itself():
    real, samples = rows(60, 3, 1), rows(40, 3, 2)
    real_labels, labels = torch.arange(60) % 3, torch.arange(40) % 4  # no real image of class 3
    samples[labels == 1] = samples[1].clone()
    samples[labels == 2] *= 2
    real, samples = real + 100 * real_labels[:, None], samples - 100 * labels[:, None]  # far apart: it does not matter
    result = class_diversity(samples, labels, real, real_labels)
    assert result.keys() == {0, 1, 2} and result[1] == 0
    for label in (0, 2):
        expected = mean_squared_distance(samples[labels == label]) / mean_squared_distance(real[real_labels == label])
        assert result[label] == pytest.approx(expected, rel=1e-12)


def test_a_class_with_one_row_has_no_diversity():
    samples, real = rows(5, 2, 1), rows(6, 2, 2)
    assert class_diversity(samples, torch.tensor([0, 0, 0, 1, 2]), real, torch.tensor([0, 0, 1, 1, 2, 2])).keys() == {
        0
    }
    assert class_diversity(real, torch.tensor([0, 0, 1, 1, 2, 2]), samples, torch.tensor([0, 0, 0, 1, 2])).keys() == {
        0
    }
    with pytest.raises(ValueError, match="no class has two rows in both sets, of 5 samples and 6 real images"):
        class_diversity(samples, torch.arange(5), real, torch.arange(6))


def test_real_images_that_are_all_the_same_and_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the 4 real images are all the same"):
        diversity(rows(3, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"real_labels must be \(4,\), got \(3,\)"):
        class_diversity(rows(3, 2), torch.zeros(3), rows(4, 2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"^labels must be \(3,\), got \(3, 1\)"):
        class_diversity(rows(3, 2), torch.zeros(3, 1), rows(4, 2), torch.zeros(4))


# ---- features -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["attention", "average"])
def test_features_of_a_classifier_are_what_its_head_reads_of_a_clean_image(pooling):
    network = classifier(pooling=pooling, dropout=0.5)
    features = classifier_features(network)
    assert not network.training and not any(weight.requires_grad for weight in network.parameters())
    images = rows(4, 64, 1, torch.float32).view(4, 1, 8, 8).clamp(-1, 1)
    seen = features(images)
    assert seen.shape == (4, 16) and seen.dtype == torch.float32
    assert torch.equal(network.head(seen), network(images, 0).logits)
    assert (network.head(seen) - network(images, 1).logits).abs().max() > 1e-6


def test_features_do_not_depend_on_autocast_nor_on_the_rest_of_the_batch():
    network = classifier()
    features, images = classifier_features(network), rows(5, 64, 1, torch.float32).view(5, 1, 8, 8)
    exact = features(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features(images), exact)
    torch.testing.assert_close(torch.cat([features(image[None]) for image in images]), exact, rtol=1e-5, atol=1e-6)


def test_a_classifier_in_half_precision_gives_features_in_single():
    network = classifier().to(torch.bfloat16)
    images = rows(5, 64, 1, torch.float32).view(5, 1, 8, 8)
    seen = classifier_features(network)(images)
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen, classifier_features(classifier())(images), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_any_function_gives_features_and_batches_change_nothing(batch_size):
    images, asked = rows(7, 12, 1, torch.float32).view(7, 3, 2, 2), []
    network = nn.Linear(12, 5)

    def features(batch):
        asked.append(len(batch))
        return network(batch.flatten(1))

    seen = features_of(images, features, batch_size)
    assert seen.shape == (7, 5) and not seen.requires_grad
    torch.testing.assert_close(seen, network(images.flatten(1)).detach(), rtol=1e-6, atol=1e-6)
    assert asked == [min(batch_size, 7 - first) for first in range(0, 7, batch_size)]


def test_pixels_are_features_and_those_in_half_precision_come_back_in_single():
    images = rows(4, 12, 1, torch.float32).view(4, 3, 2, 2)
    assert torch.equal(features_of(images, pixel_features), images.flatten(1))
    assert features_of(images.half(), pixel_features).dtype == torch.float32


def test_a_bar_is_shown_on_request_only(capfd):
    images = torch.zeros(4, 1, 2, 2)
    features_of(images, pixel_features, 2)
    assert capfd.readouterr().err == ""
    enable_progress_bar()  # which another test may have switched off
    features_of(images, pixel_features, 2, progress=True)
    assert "features: 100%" in capfd.readouterr().err


def test_features_that_are_no_row_for_each_image_are_refused():
    images = torch.zeros(4, 1, 2, 2)
    with pytest.raises(ValueError, match=r"features must be \(4, D\) for 4 images, got \(4, 1, 2, 2\)"):
        features_of(images, lambda batch: batch)
    with pytest.raises(ValueError, match=r"features must be \(4, D\) for 4 images, got \(1, 4\)"):
        features_of(images, lambda batch: batch.flatten()[None, :4])
    with pytest.raises(ValueError, match="got 0 images and batch_size 256"):
        features_of(images[:0], pixel_features)
    with pytest.raises(ValueError, match="got 4 images and batch_size 0"):
        features_of(images, pixel_features, 0)


def test_the_examples_run():
    assert doctest.testmod(feature_metrics).failed == 0
    assert doctest.testmod(feature_metrics).attempted > 5
