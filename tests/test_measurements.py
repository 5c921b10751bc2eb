r"""Properties of the measurement operators, against the dense matrix that the images of the unit vectors make.

`matrix(operator)` is H, built column by column from `measure`; what `measure` itself must be comes from other
libraries: average pooling, scipy.ndimage, PIL.
"""

import math

import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
import torch

from annealers.measurements import Blur, Downsample, Grey, Identity, Mask

SYMMETRIC = [[0.1, 0.3, 0.1], [0.4, 1.0, 0.4], [0.1, 0.3, 0.1]]  # not separable
MOTION = [[0.0, 0.1, 0.5], [0.2, -0.3, 0.0], [0.0, 0.6, 0.1], [0.0, 0.0, 0.0], [0.3, 0.0, 0.0]]  # symmetric in nothing
CHECKS = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 0], [0, 1, 0, 0]])

OPERATORS = {
    "identity": (Identity(), (2, 4, 4)),
    "mask": (Mask(CHECKS), (2, 4, 4)),
    "mask of channels": (Mask(torch.stack([CHECKS, 1 - CHECKS])), (2, 4, 4)),
    "downsample 2": (Downsample(2), (2, 4, 6)),
    "downsample 3": (Downsample(3), (1, 6, 3)),
    "downsample 1": (Downsample(1), (1, 2, 3)),
    "reflect": (Blur(SYMMETRIC), (2, 4, 5)),
    "reflect, longer than the image": (Blur.gaussian(1.5, tolerance=0.01), (1, 4, 6)),
    "reflect, negative spectrum": (Blur([1.0, 0.2, 1.0]), (1, 4, 5)),
    "circular": (Blur(SYMMETRIC, "circular"), (2, 4, 5)),
    "circular, motion": (Blur(MOTION, "circular"), (1, 5, 6)),
    "circular, longer than the image": (Blur(MOTION, "circular"), (1, 4, 2)),
    "circular, with zeros": (Blur([0.5, 0.0, 0.5], "circular"), (1, 4, 4)),
    "grey": (Grey(), (3, 2, 3)),
    "grey mean": (Grey("mean"), (3, 2, 2)),
    "grey of four": (Grey([0.5, -2.0, 0.0, 1.0]), (4, 2, 2)),
    "grey of one": (Grey([-2.0]), (1, 2, 2)),
}
every_operator = pytest.mark.parametrize(("operator", "shape"), OPERATORS.values(), ids=list(OPERATORS))


def units(shape):
    """All images with one 1, (d, C, H, W)."""
    return torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)


def columns(images):
    """The matrix whose columns these images are."""
    return images.flatten(1).T


def matrix(operator, shape):
    return columns(operator.measure(units(shape)))


def images(shape, batch=3, seed=0, dtype=torch.float64):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def convolved(x, kernel, mode):
    kernel = np.asarray(kernel)[None, None]
    return torch.from_numpy(scipy.ndimage.convolve(x.numpy(), kernel, mode=mode))


# ---- what is measured -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_downsampling_is_average_pooling(factor):
    x = images((2, 6, 12))
    torch.testing.assert_close(Downsample(factor).measure(x), torch.nn.functional.avg_pool2d(x, factor))


@pytest.mark.parametrize("kernel", [SYMMETRIC, [[1.0, 0.5, 0.2, 0.5, 1.0]], np.ones((7, 3))])
def test_blur_with_reflecting_boundary_is_the_convolution_of_scipy(kernel):
    x = images((2, 4, 5))
    torch.testing.assert_close(Blur(kernel).measure(x), convolved(x, kernel, "reflect"))


@pytest.mark.parametrize("kernel", [SYMMETRIC, MOTION, [[1.0, 2.0, 4.0, 8.0, 16.0]], np.arange(49.0).reshape(7, 7)])
def test_circular_blur_is_the_wrapped_convolution_of_scipy(kernel):
    x = images((2, 4, 5))
    torch.testing.assert_close(Blur(kernel, "circular").measure(x), convolved(x, kernel, "wrap"))


def test_a_kernel_of_one_axis_blurs_both():
    k, x = [0.2, 0.5, 0.2], images((1, 4, 5))
    once = scipy.ndimage.convolve1d(x.numpy(), k, axis=2, mode="reflect")
    torch.testing.assert_close(
        Blur(k).measure(x), torch.from_numpy(scipy.ndimage.convolve1d(once, k, axis=3, mode="reflect"))
    )


@pytest.mark.parametrize(("boundary", "mode"), [("reflect", "reflect"), ("circular", "wrap")])
@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.3])
def test_gaussian_blur_is_the_filter_of_scipy(sigma, boundary, mode):
    x = images((1, 9, 7))
    expected = torch.from_numpy(scipy.ndimage.gaussian_filter(x.numpy(), sigma, axes=(2, 3), mode=mode))
    torch.testing.assert_close(Blur.gaussian(sigma, boundary).measure(x), expected)


def test_luma_is_the_grey_of_pil():
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    grey = np.asarray(PIL.Image.fromarray(picture).convert("L"), dtype=np.float64)
    x = torch.from_numpy(picture / 127.5 - 1).permute(2, 0, 1)[None]
    np.testing.assert_allclose((Grey("luma").measure(x)[0, 0].numpy() + 1) * 127.5, grey, atol=1.0)  # PIL cuts off


def test_grey_is_the_weighted_sum_of_the_channels():
    x = images((3, 2, 2))
    torch.testing.assert_close(Grey("mean").measure(x), x.mean(dim=1, keepdim=True))
    torch.testing.assert_close(Grey([1.0, -2.0, 0.5]).measure(x), x[:, :1] - 2 * x[:, 1:2] + 0.5 * x[:, 2:])


def test_a_mask_keeps_what_is_one_and_forgets_the_rest_whatever_it_is():
    x = images((2, 4, 4))
    hidden = x.masked_fill(CHECKS == 0, torch.nan)
    for seen in (Mask(CHECKS), Mask(CHECKS.bool()), Mask(CHECKS.double().numpy())):
        assert torch.equal(seen.measure(hidden), x * CHECKS)
        assert torch.equal(seen.spectral_measurement(hidden), x * CHECKS)


def test_each_image_may_have_its_own_mask():
    masks, x = torch.stack([CHECKS, 1 - CHECKS])[:, None], images((3, 4, 4), batch=2)
    both = Mask(masks)
    for i, own in enumerate([CHECKS, 1 - CHECKS]):
        assert torch.equal(both.measure(x)[i], Mask(own).measure(x)[i])
        assert torch.equal(both.pseudo_inverse(x)[i], Mask(own).pseudo_inverse(x)[i])
    assert both.singular_values(x.shape).shape == (2, 1, 4, 4)


# ---- the singular value decomposition -------------------------------------------------------------------------------


@every_operator
def test_the_change_of_coordinates_is_orthogonal(operator, shape):
    V_T, identity = columns(operator.to_spectral(units(shape))), torch.eye(math.prod(shape), dtype=torch.float64)
    torch.testing.assert_close(V_T @ V_T.T, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(columns(operator.from_spectral(units(shape))) @ V_T, identity, rtol=0, atol=1e-12)


@every_operator
def test_the_operator_is_u_s_v_transposed(operator, shape):
    V_T, H = columns(operator.to_spectral(units(shape))), matrix(operator, shape)
    y_shape = operator.measurement_shape((1, *shape))
    U_T = columns(operator.spectral_measurement(units(y_shape[1:])))
    s = operator.singular_values((1, *shape)).expand(1, *shape).flatten()
    assert (s >= 0).all() and s.dtype == torch.float64
    torch.testing.assert_close(U_T.T @ torch.diag(s) @ V_T, H, rtol=0, atol=1e-12)
    seen = s > 1e-12
    torch.testing.assert_close(U_T[seen] @ U_T[seen].T, torch.eye(int(seen.sum())).double(), rtol=0, atol=1e-12)
    theirs = np.linalg.svd(H.numpy(), compute_uv=False)
    np.testing.assert_allclose(np.sort(s.numpy())[::-1][: len(theirs)], theirs, atol=1e-7)


@every_operator
def test_the_adjoint_and_the_pseudo_inverse_are_those_of_the_matrix(operator, shape):
    H, y = matrix(operator, shape), units(operator.measurement_shape((1, *shape))[1:])
    torch.testing.assert_close(columns(operator.adjoint(y)), H.T, rtol=0, atol=1e-12)
    expected = np.linalg.pinv(H.numpy(), rcond=operator.tolerance or 1e-12)
    torch.testing.assert_close(columns(operator.pseudo_inverse(y)), torch.from_numpy(expected), rtol=0, atol=1e-9)


@every_operator
def test_shapes_go_to_measurements_and_back(operator, shape):
    x = images(shape)
    y = operator.measure(x)
    assert y.shape == operator.measurement_shape(x.shape) and operator.image_shape(y.shape) == x.shape
    assert operator.pseudo_inverse(y).shape == operator.spectral_measurement(y).shape == x.shape
    torch.broadcast_shapes(operator.singular_values(x.shape).shape, x.shape)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_map_keeps_the_dtype_and_computes_in_float32(operator, shape, dtype):
    x = images(shape, dtype=torch.float32).to(dtype)
    y = operator.measure(x)
    maps = {"measure": x, "to_spectral": x, "from_spectral": x}
    maps |= {name: y for name in ("spectral_measurement", "adjoint", "pseudo_inverse")}
    for name, argument in maps.items():
        result = getattr(operator, name)(argument)
        assert result.dtype == dtype
        assert torch.equal(result, getattr(operator, name)(argument.float()).to(dtype))


def test_singular_values_up_to_the_tolerance_are_not_inverted():
    sharp, blunt = Blur.gaussian(1.0, tolerance=0.0), Blur.gaussian(1.0, tolerance=0.1)
    shape = (1, 1, 8, 8)
    s = blunt.singular_values(shape)
    assert torch.equal(blunt.is_measured(shape), s > 0.1 * s.max()) and sharp.is_measured(shape).all()
    x = images((1, 8, 8), batch=1)
    kept = blunt.to_spectral(blunt.pseudo_inverse(blunt.measure(x)))
    torch.testing.assert_close(kept, torch.where(blunt.is_measured(shape), blunt.to_spectral(x), 0.0))
    torch.testing.assert_close(sharp.pseudo_inverse(sharp.measure(x)), x)


def test_only_masks_and_the_identity_have_the_pixels_for_coordinates():
    for operator, shape in OPERATORS.values():
        x = images(shape)
        assert operator.is_pixelwise == isinstance(operator, (Identity, Mask))
        assert not operator.is_pixelwise or torch.equal(operator.to_spectral(x), x)


# ---- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask(torch.tensor([0.0, 0.5, 1.0])), r"values 0 and 1, got \[0.0, 0.5, 1.0\]"),
        (lambda: Downsample(0), "factor must be a positive integer, got 0"),
        (lambda: Downsample(True), "factor must be a positive integer, got True"),
        (lambda: Blur([1.0, 1.0]), r"odd sides, got \(2, 2\)"),
        (lambda: Blur(np.ones((3, 2))), r"odd sides, got \(3, 2\)"),
        (lambda: Blur(np.ones((3, 3, 3))), r"got \(3, 3, 3\)"),
        (lambda: Blur(SYMMETRIC, "zero"), r"boundary must be one of .*got 'zero'"),
        (lambda: Blur([[1.0, 2.0, 3.0]]), "symmetric in each axis"),
        (lambda: Blur([[1.0], [2.0], [3.0]]), "symmetric in each axis"),
        (lambda: Blur(SYMMETRIC, tolerance=1.0), "tolerance must lie in 0 .. 1, without 1, got 1.0"),
        (lambda: Blur(SYMMETRIC, tolerance=-0.1), "tolerance must lie in 0 .. 1, without 1, got -0.1"),
        (lambda: Blur([math.nan], "circular"), "a kernel must be finite"),
        (lambda: Blur.gaussian(0.0), "sigma must be positive, got 0.0"),
        (lambda: Blur.gaussian(math.inf), "sigma must be positive, got inf"),
        (lambda: Grey("sepia"), "weights must be one of .*got 'sepia'"),
        (lambda: Grey([0.0, 0.0]), r"not all zero, got \[0.0, 0.0\]"),
        (lambda: Grey([1.0, math.nan]), "must be finite numbers"),
        (lambda: Grey([[1.0]]), r"must be finite numbers \(C,\)"),
    ],
)
def test_an_operator_that_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("operator", "shape", "message"),
    [
        (Identity(), (4, 4), r"need a shape \(B, C, H, W\), got \(4, 4\)"),
        (Blur(SYMMETRIC), (1, 4, 4), r"need a shape \(B, C, H, W\), got \(1, 4, 4\)"),
        (Mask(CHECKS), (1, 2, 4, 5), r"mask of shape \(4, 4\) does not fit images of shape \(1, 2, 4, 5\)"),
        (Mask(torch.ones(2, 1, 4, 4)), (1, 1, 4, 4), r"mask of shape \(2, 1, 4, 4\) does not fit"),
        (Downsample(3), (1, 1, 6, 4), r"factor=3 must divide .*got \(1, 1, 6, 4\)"),
        (Downsample(3), (1, 1, 4, 6), "factor=3 must divide"),
        (Grey(), (1, 4, 2, 2), r"3 weights need as many channels, got images of \(1, 4, 2, 2\)"),
    ],
)
def test_images_that_do_not_fit_are_refused_by_every_map(operator, shape, message):
    x = torch.zeros(shape)
    for call in (operator.measure, operator.to_spectral, operator.from_spectral):
        with pytest.raises(ValueError, match=message):
            call(x)
    for call in (operator.measurement_shape, operator.singular_values):
        with pytest.raises(ValueError, match=message):
            call(shape)


def test_measurements_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"a grey image has the shape \(B, 1, H, W\), got \(1, 3, 2, 2\)"):
        Grey().spectral_measurement(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="does not fit"):
        Mask(CHECKS).image_shape((1, 1, 3, 4))
    with pytest.raises(ValueError, match="floating-point"):
        Downsample(2).measure(torch.zeros(1, 1, 4, 4, dtype=torch.long))
