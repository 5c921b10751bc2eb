"""Laws of the plane as data sets: what they are, and that training reads them like images but leaves them as drawn."""

import math

import numpy as np
import pytest
import torch

from annealers import exact
from annealers.data import (
    TOYS,
    DataConfig,
    DataError,
    PointRows,
    load_data,
    to_model_space,
    toy_law,
    train_batches,
    validation_batches,
)
from annealers.data.batches import _batch


def load(name, **options):
    return load_data(DataConfig(dataset=f"toy:{name}", **options))


def batches(data, config, steps=2, **options):
    return list(train_batches(data, config, seed=1, batch_size=6, last_step=steps, **options))


def components(law):
    """Weights, means (K, 2) and standard deviations (K, 2) of a mixture."""
    means = torch.stack([c._mean for c in law._components])
    deviations = torch.stack([c._eigenvalues for c in law._components]).sqrt()
    return law._log_weights.exp(), means, deviations


# ---- the laws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_is_a_law_of_one_pixel_with_two_channels_and_isotropic_components(name):
    law = TOYS[name]()
    assert isinstance(law, exact.GaussianMixture)
    assert law.event_shape == (2, 1, 1) and law.dtype is torch.float32
    weights, means, deviations = components(law)
    assert weights.sum().item() == pytest.approx(1)
    assert torch.equal(deviations[:, 0], deviations[:, 1]) and len(deviations.unique()) == 1
    x = law.sample(5)
    assert law.score(x, 0.8, 0.6).shape == (5, 2, 1, 1)


def test_two_modes_are_those_of_song_and_ermon():
    weights, means, deviations = components(TOYS["two_modes"]())
    torch.testing.assert_close(weights, torch.tensor([0.8, 0.2], dtype=torch.float64))
    assert means.tolist() == [[5, 5], [-5, -5]]
    assert (deviations == 1).all()


def test_the_ring_is_eight_even_directions_on_a_circle():
    weights, means, deviations = components(TOYS["ring"]())
    torch.testing.assert_close(weights, torch.full((8,), 1 / 8, dtype=torch.float64))
    angles = torch.atan2(means[:, 1], means[:, 0]) % (2 * math.pi)
    torch.testing.assert_close(angles.sort().values.diff(), torch.full((7,), math.pi / 4, dtype=torch.float64))
    torch.testing.assert_close(means.norm(dim=1), torch.full((8,), math.sqrt(2), dtype=torch.float64))
    assert deviations.unique().item() == pytest.approx(0.1)


def test_the_grid_is_every_pair_of_five_even_marks():
    weights, means, deviations = components(TOYS["grid"]())
    assert len(means) == 25 and len({tuple(mean) for mean in means.tolist()}) == 25
    for coordinate in means.T:
        torch.testing.assert_close(coordinate.unique(), 0.7 * torch.arange(-2.0, 3).float().double())
    torch.testing.assert_close(weights, torch.full((25,), 1 / 25, dtype=torch.float64))
    assert deviations.unique().item() == pytest.approx(0.05)


def test_the_moons_are_two_half_circles_that_mirror_each_other_in_the_centre():
    _, means, deviations = components(TOYS["moons"]())
    upper, lower = means[:32], means[32:]
    assert torch.allclose(upper, -lower, atol=1e-6)
    # x = 1.5 cos + a, y = 1.5 sin + b, in the proportions of scikit-learn: the second centre at (1, 0.5) radii
    centre = torch.tensor([-0.75, -0.375], dtype=torch.float64)
    torch.testing.assert_close((upper - centre).norm(dim=1), torch.full((32,), 1.5, dtype=torch.float64))
    assert ((upper - centre)[:, 1] >= -1e-6).all()
    assert deviations.unique().item() == pytest.approx(0.08)


def test_the_spiral_winds_one_and_a_half_turns_outwards_with_the_angle():
    _, means, deviations = components(TOYS["spiral"]())
    radius, angle = means.norm(dim=1), torch.from_numpy(np.unwrap(np.arctan2(means[:, 1], means[:, 0])))
    assert (radius.diff() > 0).all()
    torch.testing.assert_close(radius / angle, torch.full((64,), 2 / (3 * math.pi), dtype=torch.float64))
    assert angle[-1] == pytest.approx(3 * math.pi, abs=1e-6)
    assert deviations.unique().item() == pytest.approx(0.08)


@pytest.mark.parametrize(("name", "curves"), [("moons", 2), ("spiral", 1)])
def test_centres_on_a_curve_lie_less_than_two_deviations_apart(name, curves):
    _, means, deviations = components(TOYS[name]())
    for curve in means.chunk(curves):
        assert curve.diff(dim=0).norm(dim=1).max() < 2 * deviations.max()


@pytest.mark.parametrize("name", [name for name in TOYS if name != "two_modes"])
def test_coordinates_have_mean_near_zero_and_variance_near_one(name):
    weights, means, deviations = components(TOYS[name]())
    mean = weights @ means
    variance = weights @ (means - mean) ** 2 + deviations[0] ** 2
    assert mean.abs().max() < 0.5
    assert variance.min() > 0.5 and variance.max() < 2


# ---- as data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_is_loaded_by_its_name(name):
    data = load(name)
    assert (data.name, data.hub_id, data.channels, data.resolution) == (f"toy:{name}", None, 2, 1)
    assert data.id2label is None
    assert isinstance(data.train, PointRows) and isinstance(data.validation, PointRows)
    assert (len(data.train), len(data.validation)) == (20_000, 2_000)
    points = torch.cat([data.train.points, data.validation.points])
    assert points.dtype is torch.float32 and points.shape == (22_000, 2, 1, 1)
    assert len(points.flatten(1).unique(dim=0)) == 22_000  # nothing is rounded, and none is in both


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_points_are_of_the_law(name, split):
    law, rows = TOYS[name](), getattr(load(name), split)
    log_density = law.log_prob(rows.points.double())
    other = law.sample(20_000, generator=torch.Generator().manual_seed(7))
    reference = law.log_prob(other.double())
    error = (log_density.var() / len(rows) + reference.var() / 20_000).sqrt()
    assert abs(log_density.mean() - reference.mean()) < 4 * error  # minus the entropy
    deviation = (rows.points.var(dim=0) / len(rows) + other.var(dim=0) / 20_000).sqrt()
    assert ((rows.points.mean(dim=0) - other.mean(dim=0)).abs() < 4 * deviation).all()


def test_the_points_are_the_same_every_time_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    one, other = load("ring"), load("ring")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.train.points, other.train.points)
    assert torch.equal(one.validation.points, other.validation.points)


def test_the_law_of_a_data_set_is_found_by_its_name():
    for name, law in TOYS.items():
        x = law().sample(3)
        assert torch.equal(toy_law(f"toy:{name}").log_prob(x), law().log_prob(x))
    assert toy_law("digits") is None and toy_law("user/toy:ring") is None


def test_batches_hold_the_points_as_they_were_drawn():
    config = DataConfig(dataset="toy:spiral")
    data = load_data(config)
    for batch in batches(data, config):
        assert batch["images"].shape == (6, 2, 1, 1) and batch["images"].dtype is torch.float32
        assert torch.equal(batch["images"], data.train.points[batch["rows"]])
        assert set(batch) == {"images", "positions", "first_position", "rows"}
    assert len({row for batch in batches(data, config) for row in batch["rows"].tolist()}) == 12


def test_processes_and_micro_batches_split_the_batch_of_one_process():
    config = DataConfig(dataset="toy:ring")
    data = load_data(config)
    whole = torch.cat([batch["images"] for batch in batches(data, config)])
    shares = [batches(data, config, process_index=r, num_processes=2, accumulation=3) for r in range(2)]
    parts = {int(p): x for share in shares for b in share for p, x in zip(b["positions"], b["images"], strict=True)}
    assert torch.equal(torch.stack([parts[p] for p in sorted(parts)]), whole)


def test_workers_and_a_resumed_run_see_the_same_points():
    config = DataConfig(dataset="toy:moons", num_workers=1)
    data = load_data(config)
    whole = batches(data, DataConfig(dataset="toy:moons"))
    for one, other in zip(whole, batches(data, config), strict=True):
        assert torch.equal(one["images"], other["images"])
    (rest,) = list(
        train_batches(data, DataConfig(dataset="toy:moons"), seed=1, batch_size=6, first_step=1, last_step=2)
    )
    assert torch.equal(rest["images"], whole[1]["images"])


def test_validation_shows_every_point_once_or_a_fixed_choice():
    data = load("grid")
    points = torch.cat([batch["images"] for batch in validation_batches(data, 300)])
    assert torch.equal(points, data.validation.points)
    some = list(validation_batches(data, 30, max_samples=50))
    rows = torch.cat([batch["rows"] for batch in some])
    assert len(rows.unique()) == 50
    assert torch.equal(torch.cat([batch["images"] for batch in some]), data.validation.points[rows])


def test_fewer_training_points_are_a_fixed_choice():
    data = load("two_modes", max_train_samples=100)
    assert len(data.train) == 100 and len(data.validation) == 2_000
    assert torch.equal(data.train[3]["image"], data.train.points[data.train.row_numbers[3]])
    assert np.array_equal(data.train.row_numbers, load("two_modes", max_train_samples=100).train.row_numbers)
    assert data.train[3]["row"] == data.train.row_numbers[3]
    again = data.train.chosen(np.array([5, 3]))
    assert again[1]["row"] == data.train[3]["row"] and torch.equal(again[1]["image"], data.train[3]["image"])


def test_images_still_go_to_model_space_and_points_do_not():
    levels = torch.randint(256, (3, 2, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    flips = torch.tensor([False, True, False])
    for values, expected in ((levels, to_model_space(levels)), (levels.float(), levels.float())):
        items = [{"image": value, "row": i} for i, value in enumerate(values)]
        images = _batch(items, range(3), flips)["images"]
        assert torch.equal(images[::2], expected[::2]) and torch.equal(images[1], expected[1].flip(-1))


def test_an_unknown_toy_is_refused_with_those_there_are():
    for ask in (load, lambda name: toy_law(f"toy:{name}")):
        with pytest.raises(DataError, match="no toy 'rings'; there are toy:two_modes, toy:ring, toy:grid, toy:moons"):
            ask("rings")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("streaming", True),
        ("flip", True),
        ("crop", "random"),
        ("resolution", 1),
        ("channels", 2),
        ("image_column", "image"),
        ("label_column", "label"),
        ("caption_column", "text"),
        ("train_split", "test"),
        ("validation_split", "test"),
        ("dataset_config", "small"),
    ],
)
def test_options_of_images_and_tables_are_refused(option, value):
    with pytest.raises(DataError, match=f"toy:ring is drawn and not stored: leave --{option} out, got {value!r}"):
        load("ring", **{option: value})


def test_asking_for_no_labels_is_fine():
    assert load("ring", label_column="none").id2label is None
