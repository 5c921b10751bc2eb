"""Black-and-white images of grey ones: how often a pixel is white, and what a draw depends on."""

import pytest
import torch

from annealers.data import DataConfig, binarize, binarized_batch, load_data, train_batches, validation_batches
from annealers.randomness import PositionalRandomness


@pytest.mark.parametrize("brightness", [0.0, 0.1, 0.5, 0.73, 1.0])
def test_a_pixel_is_white_as_often_as_it_is_bright(brightness):
    n = 1000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # every share of the draws, once
    images = torch.full((n,), 2 * brightness - 1, dtype=torch.float64)
    white = binarize(images, uniform)
    assert set(white.tolist()) <= {-1.0, 1.0}
    assert ((white + 1) / 2).mean().item() == pytest.approx(brightness, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_black_and_white_stay_what_they_are_at_the_ends_of_the_uniform_numbers(dtype):
    ends = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    for value in (-1, 1):
        images = torch.full((4,), value, dtype=dtype)
        assert torch.equal(binarize(images, ends), images)


def batch_of(rows, first_position=0, size=(1, 3, 3), value=0.0):
    images = torch.full((len(rows), *size), value)
    return {"images": images, "rows": torch.tensor(rows), "first_position": first_position}


def test_images_that_are_not_binarised_are_as_they_were():
    batch = batch_of([3, 4], value=0.3)
    assert binarized_batch(batch, "none", PositionalRandomness(0)) is batch["images"]


def test_a_static_draw_is_one_of_the_row_whatever_order_position_or_seed():
    one = binarized_batch(batch_of([7, 2, 5]), "static", PositionalRandomness(0))
    other = binarized_batch(batch_of([5, 9, 7, 2], first_position=1000), "static", PositionalRandomness(99))
    assert torch.equal(one, other[[2, 3, 0]])
    assert not torch.equal(one[0], one[1])


def test_a_static_draw_of_another_split_is_another_one():
    train, validation = (
        binarized_batch(batch_of([0, 1, 2]), "static", PositionalRandomness(0), split)
        for split in ("train", "validation")
    )
    assert not torch.equal(train, validation)


def test_a_dynamic_draw_is_a_function_of_seed_and_position_and_not_of_the_row():
    def drawn(rows, position, number=0, split="train"):
        return binarized_batch(batch_of(rows, position), "dynamic", PositionalRandomness(number), split)

    first = drawn([4, 4, 4, 4], 100)
    assert torch.equal(first, drawn([1, 2, 3, 4], 100))
    assert torch.equal(first[2:], drawn([4, 4], 102))  # as another process would see it
    assert len({tuple(image.flatten().tolist()) for image in first}) == 4
    for other in (drawn([4] * 4, 104), drawn([4] * 4, 100, number=1), drawn([4] * 4, 100, split="validation")):
        assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_the_mean_of_many_draws_is_the_brightness(kind):
    brightness, rows = 0.3, list(range(400))
    white = binarized_batch(batch_of(rows, value=2 * brightness - 1, size=(1, 5, 5)), kind, PositionalRandomness(0))
    share = ((white + 1) / 2).mean().item()
    error = (brightness * (1 - brightness) / white.numel()) ** 0.5
    assert abs(share - brightness) < 4 * error < 0.02


def test_the_draws_of_different_pixels_are_different():
    white = binarized_batch(batch_of(list(range(2000)), size=(1, 2, 2)), "dynamic", PositionalRandomness(0)).flatten(1)
    correlation = torch.corrcoef(white.T)
    assert (correlation - torch.eye(4)).abs().max() < 4 / 2000**0.5


# ---- through the data -----------------------------------------------------------------------------------------------


def digits_by_row(kind, seed, epoch):
    """The binarised digits of an epoch of training, by the numbers of their rows."""
    config = DataConfig()
    data = load_data(config)
    length, size = len(data.train), 2 * 7 * 103  # 1442 = 2 * 7 * 103 rows
    assert length == size
    loader = train_batches(data, config, seed=seed, batch_size=206, first_step=7 * epoch, last_step=7 * epoch + 7)
    rows = {}
    for batch in loader:
        images = binarized_batch(batch, kind, PositionalRandomness(seed))
        rows |= dict(zip(batch["rows"].tolist(), images, strict=True))
    assert len(rows) == length
    return torch.stack([rows[row] for row in sorted(rows)])


def test_static_digits_are_the_same_in_every_epoch_and_run_and_dynamic_ones_are_not():
    static = [digits_by_row("static", seed, epoch) for seed, epoch in [(0, 0), (0, 1), (5, 2)]]
    assert torch.equal(static[0], static[1]) and torch.equal(static[0], static[2])
    dynamic = [digits_by_row("dynamic", seed, epoch) for seed, epoch in [(0, 0), (0, 0), (0, 1), (5, 0)]]
    assert torch.equal(dynamic[0], dynamic[1])
    assert not torch.equal(dynamic[0], dynamic[2]) and not torch.equal(dynamic[0], dynamic[3])


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_validation_images_are_the_same_at_every_validation_however_many_processes_share_them(kind):
    data = load_data(DataConfig())

    def drawn(**share):
        batches = validation_batches(data, batch_size=100, **share)
        return [binarized_batch(batch, kind, PositionalRandomness(3), "validation") for batch in batches]

    whole = drawn()
    shares = [drawn(process_index=r, num_processes=2) for r in range(2)]
    again = [shares[j % 2][j // 2] for j in range(len(whole))]
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
