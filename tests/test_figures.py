"""What the pictures show, pixel by pixel: images whose grey values say which image, time and row they are."""

import numpy as np
import PIL.Image
import pytest
import torch

from annealers.figures import (
    enlarge,
    image_grid,
    sample_grid,
    save_grid,
    save_trajectory_gif,
    to_pil,
    trajectory_strip,
)
from annealers.pipelines import Trajectory

H, W = 2, 3


def flat(value, mode="L"):
    return PIL.Image.new(mode, (W, H), value)


def cells(picture, columns, height=H, width=W):
    """The grey value of each cell, row by row; each cell must be of one colour."""
    pixels = np.asarray(picture.convert("L")).astype(int)
    rows = pixels.shape[0] // height
    blocks = pixels.reshape(rows, height, columns, width).swapaxes(1, 2).reshape(rows * columns, -1)
    assert (blocks.min(axis=1) == blocks.max(axis=1)).all()
    return blocks[:, 0].reshape(rows, columns).tolist()


def grey(sample_value):
    """The pixel of a value in [-1, 1]."""
    return round((np.clip(sample_value, -1, 1) / 2 + 0.5) * 255)


@pytest.fixture
def trajectory():
    """Two images and four steps: x_t of image b after i steps is (i - 2) / 4 + b / 20, its prediction 0.9 - i / 10."""
    i, b = torch.arange(5.0).view(5, 1, 1, 1, 1), torch.arange(2.0).view(1, 2, 1, 1, 1)
    samples = ((i - 2) / 4 + b / 20).expand(5, 2, 1, H, W)
    predictions = (0.9 - i[:4] / 10).expand(4, 2, 1, H, W)
    return Trajectory(samples, predictions, timesteps=torch.tensor([900, 600, 300, 0]))


# ---- grids ----------------------------------------------------------------------------------------------------------


def test_a_grid_is_filled_row_by_row_and_ends_in_white():
    assert cells(image_grid([flat(10), flat(20), flat(30), flat(40), flat(50)], columns=3), 3) == [
        [10, 20, 30],
        [40, 50, 255],
    ]


def test_a_grid_is_no_wider_than_its_images():
    assert image_grid([flat(1), flat(2)], columns=8).size == (2 * W, H)


def test_samples_are_shown_row_by_row_large_enough_to_be_seen_and_apart():
    samples = torch.tensor([-1.0, 0.2, 7.0]).view(3, 1, 1, 1).expand(3, 1, 5, 7)
    pixels = np.asarray(sample_grid(samples, columns=2))
    height, width = 50, 70  # ten times as large, the least that makes 48 pixels
    assert pixels.shape == (2 * height + 2, 2 * width + 2)
    assert (pixels[:height, :width] == 0).all() and (pixels[height + 2 :, :width] == 255).all()
    assert (pixels[:height, width + 2 :] == grey(0.2)).all()
    assert (pixels[height : height + 2] == 255).all() and (pixels[:, width : width + 2] == 255).all()
    assert sample_grid(torch.zeros(1, 3, 49, 60), columns=2).size == (60, 49)


def test_channels_that_are_no_colours_stand_beside_each_other():
    samples = torch.tensor([[-1.0, 0.0], [0.5, 1.0]]).view(2, 2, 1, 1).expand(2, 2, 48, 50)
    pixels = np.asarray(sample_grid(samples, columns=1))
    assert pixels.shape == (98, 100)
    corners = [[pixels[0, 0], pixels[0, 99]], [pixels[97, 0], pixels[97, 99]]]
    assert corners == [[0, grey(0.0)], [grey(0.5), 255]]


def test_padding_lies_between_images_and_not_around_them():
    pixels = np.asarray(image_grid([flat(0)] * 4, columns=2, padding=1))
    assert pixels.shape == (2 * H + 1, 2 * W + 1)
    assert (pixels[H] == 255).all() and (pixels[:, W] == 255).all()
    assert (np.delete(np.delete(pixels, H, axis=0), W, axis=1) == 0).all()


def test_a_grid_keeps_colours():
    assert image_grid([flat("red", "RGB")], columns=1).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("images", [[], [flat(1), PIL.Image.new("L", (9, 9))], [flat(1), flat("red", "RGB")]])
def test_images_that_make_no_grid_are_refused(images):
    with pytest.raises(ValueError, match="need images of one size and mode"):
        image_grid(images, columns=2)


def test_a_grid_needs_a_column():
    with pytest.raises(ValueError, match="need columns >= 1, got 0"):
        image_grid([flat(1)], columns=0)


def test_enlarging_repeats_pixels_without_mixing_them():
    image = PIL.Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8))
    np.testing.assert_array_equal(enlarge(image, 3), np.kron([[0, 255], [255, 0]], np.ones((3, 3))))


def test_a_saved_grid_is_the_grid_of_the_enlarged_images(tmp_path):
    save_grid([flat(10), flat(20)], tmp_path / "grid.png", columns=1, scale=4)
    assert cells(PIL.Image.open(tmp_path / "grid.png"), 1, 4 * H, 4 * W) == [[10], [20]]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_samples_become_images_with_minus_one_black_and_one_white(channels, mode):
    values = torch.tensor([-3.0, -1.0, 0.2, 1.0, 3.0]).view(5, 1, 1, 1).expand(5, channels, H, W)
    images = to_pil(values)
    assert [image.mode for image in images] == [mode] * 5
    assert [cells(image, 1)[0][0] for image in images] == [0, 0, grey(0.2), 255, 255]


def test_samples_with_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"1 or 3 channels, got samples of shape \(1, 4, 2, 3\)"):
        to_pil(torch.zeros(1, 4, H, W))


# ---- trajectories ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_a_strip_shows_the_states_above_their_predictions_from_noise_to_image(trajectory, index):
    offset = index / 20
    assert cells(trajectory_strip(trajectory, count=5, index=index), 5) == [
        [grey(value + offset) for value in (-0.5, -0.25, 0, 0.25, 0.5)],
        [*(grey(value) for value in (0.9, 0.8, 0.7, 0.6)), grey(0.5 + offset)],
    ]


def test_a_strip_picks_evenly_and_keeps_both_ends(trajectory):
    assert cells(trajectory_strip(trajectory, count=3), 3)[0] == [grey(-0.5), grey(0), grey(0.5)]
    assert trajectory_strip(trajectory, count=99).width == 5 * W


def test_a_strip_without_predictions_is_one_row(trajectory):
    trajectory.predictions = None
    assert trajectory_strip(trajectory, count=2, scale=3).size == (2 * 3 * W, 3 * H)
    assert trajectory_strip(trajectory, count=2, scale=3, padding=1).size == (2 * 3 * W + 1, 3 * H)


def test_labels_stand_above_the_strip(trajectory):
    plain, labelled = (trajectory_strip(trajectory, scale=16, labels=labels) for labels in (False, True))
    margin = labelled.height - plain.height
    assert margin > 0 and labelled.width == plain.width
    assert labelled.crop((0, margin, *labelled.size)).tobytes() == plain.tobytes()
    above = np.asarray(labelled)[:margin].reshape(margin, 5, -1)
    assert (above.min(axis=(0, 2)) < 128).all()  # something is written in each column


def test_a_strip_needs_noise_and_image(trajectory):
    with pytest.raises(ValueError, match="need count >= 2.*got 1"):
        trajectory_strip(trajectory, count=1)


def test_an_animation_goes_from_noise_to_image_and_holds_it(trajectory, tmp_path):
    save_trajectory_gif(trajectory, tmp_path / "t.gif", columns=2, scale=2, count=3, seconds=0.3, hold=0.5)
    with PIL.Image.open(tmp_path / "t.gif") as animation:
        assert animation.n_frames == 3 and animation.info["loop"] == 0
        shown, durations = [], []
        for frame in range(3):
            animation.seek(frame)
            shown.append(cells(animation, 2, 2 * H, 2 * W)[0])
            durations.append(animation.info["duration"])
    expected = [[grey(value), grey(value + 0.05)] for value in (-0.5, 0, 0.5)]
    np.testing.assert_allclose(shown, expected, atol=1)
    assert durations == [100, 100, 600]
