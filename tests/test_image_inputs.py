"""Properties of the images that pipelines take: an image in any of its forms is one tensor, the rest is refused."""

import re

import numpy as np
import PIL.Image
import pytest
import torch

from annealers.pipelines.image_inputs import check_output_type, image_tensor, image_tensors

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def levels_of(channels, count=3, height=4, width=6):
    generator = torch.Generator().manual_seed(channels)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def pictures_of(levels):
    return [PIL.Image.fromarray(one.movedim(0, -1).squeeze(-1).numpy(), MODES[len(one)]) for one in levels]


@pytest.mark.parametrize("channels", MODES)
def test_pictures_arrays_and_tensors_of_an_image_are_one_tensor(channels):
    levels = levels_of(channels)
    expected = levels.double() / 127.5 - 1
    array = (levels / 255).movedim(1, -1).numpy()
    forms = [pictures_of(levels), tuple(pictures_of(levels)), array, list(array), expected, list(expected)]
    forms.append([pictures_of(levels)[0], array[1], expected[2:].float()])
    for form in forms:
        torch.testing.assert_close(image_tensor(form, channels).double(), expected, rtol=0, atol=1e-6)
    for one in (pictures_of(levels)[1], array[1], expected[1], array[1:2], expected[1:2]):
        torch.testing.assert_close(image_tensor(one, channels).double(), expected[1:2], rtol=0, atol=1e-6)


def test_a_tensor_keeps_its_type_and_its_values():
    x = 2 * levels_of(2).double() / 255 - 1
    assert torch.equal(image_tensor(x, 2), x) and image_tensor(x, 2).dtype == torch.float64


def test_a_picture_becomes_grey_or_coloured_as_the_models_images_are():
    grey = PIL.Image.new("L", (6, 4), 100)
    colour = PIL.Image.new("RGB", (6, 4), (100, 100, 100))
    for picture in (grey, colour, grey.convert("P"), colour.convert("RGBA")):
        for channels in (1, 3):
            expected = torch.full((1, channels, 4, 6), 100 / 127.5 - 1)
            torch.testing.assert_close(image_tensor(picture, channels), expected, rtol=0, atol=1e-6)


def test_images_of_several_sizes_are_several_tensors_and_no_batch():
    images = [PIL.Image.new("L", (6, 4)), torch.zeros(2, 1, 4, 6), np.zeros((3, 5, 1))]
    assert [tuple(x.shape) for x in image_tensors(images, 1)] == [(1, 1, 4, 6), (2, 1, 4, 6), (1, 1, 3, 5)]
    assert len(image_tensor(images[:2], 1)) == 3
    with pytest.raises(ValueError, match=re.escape("one size, got (height, width) [(3, 5), (4, 6)]")):
        image_tensor(images, 1)


def test_the_size_that_is_asked_for_is_height_and_width():
    assert image_tensor(PIL.Image.new("L", (6, 4)), 1, size=(4, 6)).shape == (1, 1, 4, 6)
    with pytest.raises(ValueError, match=re.escape("are 6 x 4 pixels (height x width), got 4 x 6")):
        image_tensor(PIL.Image.new("L", (6, 4)), 1, size=(6, 4))


def test_the_ends_of_the_range_are_in_it_and_what_is_beyond_is_taken_only_where_it_may_be():
    assert image_tensor(torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2), 1).tolist() == [[[[-1.0, 1.0]]]]
    assert image_tensor(np.array([0.0, 1.0]).reshape(1, 1, 2, 1), 1).tolist() == [[[[-1.0, 1.0]]]]
    beyond = torch.full((1, 1, 1, 1), 1.001)
    assert torch.equal(image_tensor(beyond, 1, bounded=False), beyond)
    with pytest.raises(ValueError, match=re.escape("a tensor must lie in [-1, 1], got 1.001 .. 1.001")):
        image_tensor(beyond, 1)


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one image, got none"),
        (torch.zeros(0, 1, 4, 6), "at least one image, got none"),
        (np.zeros((0, 4, 6, 1)), "at least one image, got none"),
        (torch.zeros(1, 3, 4, 6), "need (B, 1, H, W), got (1, 3, 4, 6)"),
        (torch.zeros(4, 6), "need (B, 1, H, W), got (4, 6)"),
        (torch.zeros(1, 1, 1, 4, 6), "got (1, 1, 1, 4, 6)"),
        (torch.full((1, 1, 4, 6), torch.nan), "not finite"),
        (torch.full((1, 1, 4, 6), torch.inf), "not finite"),
        (torch.zeros(1, 1, 4, 6, dtype=torch.uint8), "floating-point numbers in [-1, 1], got torch.uint8"),
        (np.zeros((4, 6)), "an array must be (B, H, W, C) of floating-point numbers in [0, 1], got (4, 6)"),
        (np.zeros((1, 4, 6, 1), dtype=np.uint8), "got (1, 4, 6, 1) of uint8"),
        (np.full((1, 4, 6, 1), 255.0), "an array must lie in [0, 1], got 255 .. 255"),
        (np.full((1, 4, 6, 1), -0.5), "an array must lie in [0, 1], got -0.5 .. -0.5"),
        (np.full((1, 4, 6, 1), np.nan), "an array must lie in [0, 1], got nan"),
        (np.zeros((1, 4, 6, 3)), "need (B, 1, H, W), got (1, 3, 4, 6)"),
        ("cat.png", "a PIL image, an array or a tensor, got a str"),
        ([[0.0]], "a PIL image, an array or a tensor, got a list"),
    ],
)
def test_what_is_no_image_is_refused(images, message, bounded):
    with pytest.raises(ValueError, match=re.escape(message)):
        image_tensor(images, 1, bounded=bounded)


def test_an_output_type_exists_and_a_picture_has_one_or_three_channels():
    for channels in (1, 3):
        check_output_type("pil", channels)
    for output_type in ("np", "pt", "latent"):
        check_output_type(output_type, 2)
    with pytest.raises(ValueError, match="a PIL image has 1 or 3 channels, this vae has 2: use output_type='pt'"):
        check_output_type("pil", 2, whose="vae")
    with pytest.raises(ValueError, match="output_type must be one of .*, got 'jpg'"):
        check_output_type("jpg", 1)
