"""Properties of blind degradations: each stage beside an independent computation, and what they do together."""

import doctest
import io

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

from annealers import image_degradations
from annealers.data import load_digits_split, to_model_space
from annealers.image_degradations import DegradationParameters, DegradationRanges, blur, degrade, jpeg, resize


def random_images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(sigma=0.0, r=1.0, delta=0.0, q=95, count=1):
    return DegradationParameters(*(torch.full((count,), value) for value in (sigma, r, delta, q)))


def psnr(a, b):
    return 10 * torch.log10(4 / ((a - b) ** 2).mean((1, 2, 3)))


# ---- blur -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [2.0, 4.0])
def test_blur_is_a_convolution_with_a_gaussian_at_reflecting_borders(sigma):
    """The kernel of scipy is sampled, which is the same but for exp(-pi^2 sigma^2 / 2), 3e-9 at a width of 2."""
    images = random_images(2, 3, 16, 11).double()
    filtered = scipy.ndimage.gaussian_filter(images.numpy(), (0, 0, sigma, sigma), mode="reflect", truncate=10)
    blurred = blur(images, torch.full((2,), sigma))
    torch.testing.assert_close(blurred, torch.from_numpy(filtered), rtol=0, atol=1e-8)


def test_blurs_after_each_other_are_one_blur_and_none_of_them_moves_the_mean():
    images = random_images(2, 1, 9, 12).double()
    first, second = torch.tensor([0.3, 2.0]), torch.tensor([0.4, 1.5])
    twice = blur(blur(images, first), second)
    torch.testing.assert_close(twice, blur(images, torch.tensor([0.5, 2.5])), rtol=0, atol=1e-7)
    torch.testing.assert_close(twice.mean((2, 3)), images.mean((2, 3)), rtol=0, atol=1e-12)


def test_each_image_is_blurred_by_its_own_width_and_zero_leaves_it():
    images = random_images(3, 1, 8, 8).double()
    together = blur(images, torch.tensor([0.0, 1.0, 3.0]))
    for i, sigma in enumerate((0.0, 1.0, 3.0)):
        torch.testing.assert_close(together[i : i + 1], blur(images[i : i + 1], torch.tensor([sigma])))
    torch.testing.assert_close(together[0], images[0], rtol=0, atol=1e-14)
    assert together.flatten(1).std(1).diff().max() < 0


# ---- resizing -------------------------------------------------------------------------------------------------------


def test_an_image_of_the_same_size_is_returned_as_it_is():
    images = random_images(1, 1, 8, 8)
    assert resize(images, (8, 8)) is images


def test_half_the_size_is_the_triangle_of_twice_the_width():
    """Weights 1, 3, 3, 1 over eight around each coarse pixel, which at the border are scaled to sum to one."""
    image = random_images(1, 1, 1, 8).double()
    small = resize(image, (1, 4)).flatten()
    x = image.flatten()
    torch.testing.assert_close(small[1], (x[1] + 3 * x[2] + 3 * x[3] + x[4]) / 8)
    torch.testing.assert_close(small[0], (3 * x[0] + 3 * x[1] + x[2]) / 7)


def test_resizing_is_that_of_pillow():
    image = random_images(1, 1, 24, 17)
    expected = Image.fromarray(image[0, 0].numpy()).resize((5, 7), Image.Resampling.BILINEAR)
    torch.testing.assert_close(resize(image, (7, 5))[0, 0], torch.from_numpy(np.array(expected)), rtol=0, atol=1e-5)


# ---- compression ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("quality", [30, 90])
def test_compression_is_that_of_a_file(channels, mode, quality):
    levels = np.random.default_rng(0).integers(0, 256, (13, 10, channels), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels.squeeze(), mode=mode).save(file, "JPEG", quality=quality)
    expected = np.atleast_3d(np.asarray(Image.open(file))).astype(np.float64) * 2 / 255 - 1
    images = torch.from_numpy(levels.transpose(2, 0, 1)[None].astype(np.float64)) * 2 / 255 - 1
    torch.testing.assert_close(jpeg(images, quality)[0], torch.from_numpy(expected.transpose(2, 0, 1).copy()))


def test_each_channel_of_an_image_without_colours_is_compressed_on_its_own():
    images = random_images(2, 2, 8, 8)
    alone = torch.cat([jpeg(images[:, i : i + 1], 40) for i in range(2)], dim=1)
    assert torch.equal(jpeg(images, 40), alone)


def test_values_that_no_file_can_hold_are_clipped():
    image = torch.full((1, 1, 8, 8), 3.0)
    assert torch.equal(jpeg(image, 90), torch.ones(1, 1, 8, 8))
    assert torch.equal(jpeg(-image, 90), -torch.ones(1, 1, 8, 8))


def test_a_lower_quality_is_further_from_the_image():
    images = digits(32)
    assert psnr(jpeg(images, 20), images).mean() + 2 < psnr(jpeg(images, 60), images).mean()
    assert psnr(jpeg(images, 60), images).mean() + 2 < psnr(jpeg(images, 95), images).mean()


def digits(count):
    return to_model_space(load_digits_split().test_images[:count])


# ---- all of them ----------------------------------------------------------------------------------------------------


def test_an_image_goes_through_all_stages_in_the_order_of_the_paper():
    images, noise = random_images(1, 3, 16, 12).double(), normal(1, 3, 16, 12)
    image = scipy.ndimage.gaussian_filter(images[0].numpy(), (0, 2.0, 2.0), mode="reflect", truncate=10)
    planes = [Image.fromarray(plane.astype(np.float32)).resize((5, 6), Image.Resampling.BILINEAR) for plane in image]
    small = np.stack([np.array(plane) for plane in planes]) + 20 / 127.5 * noise[0, :, :6, :5].numpy()
    levels = ((small.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels.transpose(1, 2, 0).copy()).save(file, "JPEG", quality=50)
    planes = np.asarray(Image.open(file)).transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
    planes = [Image.fromarray(plane).resize((12, 16), Image.Resampling.BILINEAR) for plane in planes]
    expected = torch.from_numpy(np.stack([np.array(plane) for plane in planes]))[None]

    degraded = degrade(images, parameters(sigma=2.0, r=2.5, delta=20.0, q=50), noise)
    # one level before the compression is more after it
    assert (degraded - expected).abs().max() < 0.03 and (degraded - expected).abs().mean() < 2e-3
    assert degraded.dtype == torch.float64


def test_with_nothing_to_lose_only_the_rounding_of_a_fine_file_is_left():
    images = digits(16)
    degraded = degrade(images, parameters(q=100, count=16), normal(16, 1, 8, 8))
    assert (degraded - images).abs().max() < 4 / 127.5


@pytest.mark.parametrize(
    ("worse", "better"),
    [({"sigma": 1.0}, {"sigma": 0.5}), ({"r": 4.0}, {"r": 2.0}), ({"delta": 60.0}, {"delta": 20.0}), ({"q": 10}, {})],
)
def test_more_of_each_degradation_leaves_less_of_the_image(worse, better):
    images, noise = digits(32), normal(32, 1, 8, 8)
    more, less, none = (
        psnr(degrade(images, parameters(count=32, **options), noise), images).mean() for options in (worse, better, {})
    )
    assert more + 1 < less <= none


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    images, noise = random_images(5, 3, 8, 8), normal(5, 3, 8, 8)
    chosen = DegradationRanges((0.0, 1.0), (1.0, 3.0)).parameters(torch.rand(5, 4, generator=torch.manual_seed(0)))
    together = degrade(images, chosen, noise)
    alone = [
        degrade(images[i : i + 1], DegradationParameters(*(values[i : i + 1] for values in chosen)), noise[i : i + 1])
        for i in range(5)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, degrade(images, chosen, noise))  # nothing is drawn


def test_the_smallest_image_has_one_pixel():
    images = random_images(1, 1, 6, 4)
    degraded = degrade(images, parameters(r=100.0, q=90), normal(1, 1, 6, 4))
    assert degraded.shape == images.shape and degraded.unique().numel() == 1


# ---- parameters -----------------------------------------------------------------------------------------------------


def test_parameters_are_spread_evenly_over_their_ranges():
    ranges = DegradationRanges()
    shares = ((torch.arange(6100, dtype=torch.float64) + 0.5) / 6100)[:, None].expand(-1, 4)
    drawn = ranges.parameters(shares)
    for values, (low, high) in zip(drawn[:3], ((1, 15), (1, 30), (0, 20)), strict=True):
        assert values.min() == pytest.approx(low, abs=1e-2) and values.max() == pytest.approx(high, abs=1e-2)
        assert values.mean() == pytest.approx((low + high) / 2)
    assert drawn.jpeg_quality.bincount().tolist() == [0] * 30 + [100] * 61  # 30 .. 90, all as often
    assert ranges.parameters(torch.zeros(1, 4)).jpeg_quality.dtype == torch.int64


def test_each_parameter_has_a_share_of_its_own():
    drawn = DegradationRanges().parameters(torch.tensor([[0.0, 0.5, 0.25, 0.999]], dtype=torch.float64))
    assert [values.item() for values in drawn] == [1.0, 15.5, 5.0, 90]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blur_sigma": (2.0, 1.0)}, r"blur_sigma must be a range \(low, high\) inside 0 .. inf, got \(2.0, 1.0\)"),
        ({"blur_sigma": (-1.0, 1.0)}, "blur_sigma"),
        ({"blur_sigma": (0.0, float("inf"))}, "blur_sigma"),
        ({"downsampling": (0.5, 2.0)}, "downsampling must be a range .* inside 1"),
        ({"noise_level": (0.0, float("nan"))}, "noise_level"),
        ({"noise_level": (0.0, 1.0, 2.0)}, "noise_level"),
        ({"jpeg_quality": (0, 90)}, "jpeg_quality must be a range .* 1 .. 100"),
        ({"jpeg_quality": (30, 101)}, "jpeg_quality"),
        ({"jpeg_quality": (30.5, 90)}, "jpeg_quality must be integers, got"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DegradationRanges(**options)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"shares must be \(B, 4\), got \(4,\)"):
        DegradationRanges().parameters(torch.rand(4))
    images = random_images(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 8\), .* got \(2, 1, 4, 4\) and \[2, 2, 2, 2\]"):
        degrade(images, parameters(count=2), normal(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"got \(2, 1, 8, 8\) and \[1, 1, 1, 1\]"):
        degrade(images, parameters(count=1), normal(2, 1, 8, 8))


def test_the_example_in_the_docstring_runs():
    tests = doctest.DocTestFinder().find(image_degradations, "image_degradations")
    results = [doctest.DocTestRunner().run(test) for test in tests]
    assert sum(result.failed for result in results) == 0 and sum(result.attempted for result in results) > 3
