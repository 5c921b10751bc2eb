r"""Properties of the degradations, checked against SciPy's transforms and filters and the laws that they obey."""

import math

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import torch

from annealers import DDPMAncestralScheduler
from annealers.schedulers.degradations import Blurring, Downsampling, Fading, Noising, cosine_transform

T = 12
DEGRADATIONS = {
    "blur": Blurring(T, 0.4, 5.0),
    "blur to one colour": Blurring(T, 0.5, 40.0),
    "downsample": Downsampling(T, 8),
    "downsample by halving": Downsampling(3, 8),
    "mask": Fading(T, 0.3, 4.0),
    "mask in a corner": Fading(T, 0.3, 4.0, center=(0, 2)),
}
MEAN_KEEPING = [name for name in DEGRADATIONS if "mask" not in name]


@pytest.fixture(params=DEGRADATIONS)
def degradation(request):
    return DEGRADATIONS[request.param]


def images(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * 2 - 1


def all_states(degradation, x_0):
    """x_t at t = -1, 0, .. T - 1, (T + 1, B, C, H, W)."""
    return torch.stack([degradation(x_0, t) for t in range(-1, degradation.num_train_timesteps)])


# ---- laws of all ----------------------------------------------------------------------------------------------------


def test_before_the_first_timestep_an_image_is_itself(degradation):
    x_0 = images(3, 2, 8, 16)
    assert torch.equal(degradation(x_0, -1), x_0)
    assert torch.equal(degradation(x_0, torch.tensor([-1, 0, -1]))[[0, 2]], x_0[[0, 2]])


def test_each_timestep_changes_the_image_and_loses_energy(degradation):
    energy = all_states(degradation, images(4, 3, 8, 16)).square().sum((2, 3, 4))
    assert (energy.diff(dim=0) < 0).all()


def test_degradations_are_linear_and_the_same_for_each_channel(degradation):
    a, b = images(2, 3, 8, 8), images(2, 3, 8, 8, seed=1)
    for t in (0, 1, degradation.num_train_timesteps - 1):
        combined = degradation(2 * a - 3 * b, t)
        torch.testing.assert_close(combined, 2 * degradation(a, t) - 3 * degradation(b, t), rtol=0, atol=1e-12)
        torch.testing.assert_close(degradation(a[:, 1:2], t), degradation(a, t)[:, 1:2], rtol=0, atol=1e-12)


def test_timesteps_of_their_own_degrade_each_image_as_if_it_were_alone(degradation):
    last = degradation.num_train_timesteps - 1
    x_0, timesteps = images(5, 2, 8, 16), [last, -1, 0, 1, last]
    together = degradation(x_0, torch.tensor(timesteps))
    for i, t in enumerate(timesteps):
        torch.testing.assert_close(together[i : i + 1], degradation(x_0[i : i + 1], t), rtol=0, atol=1e-14)


@pytest.mark.parametrize("as_tensor", [torch.tensor, lambda t: torch.tensor([t]), np.int64], ids=["()", "(1,)", "np"])
def test_one_timestep_is_for_all_images(degradation, as_tensor):
    x_0 = images(3, 1, 8, 8)
    torch.testing.assert_close(degradation(x_0, as_tensor(1)), degradation(x_0, 1), rtol=0, atol=1e-15)


def test_noise_is_not_looked_at(degradation):
    x_0 = images(2, 1, 8, 8)
    assert torch.equal(degradation(x_0, 1, torch.full_like(x_0, float("nan"))), degradation(x_0, 1))
    assert degradation.noise(x_0, x_0, 1) is None


def test_gradients_are_those_of_the_linear_map(degradation):
    x_0, weights = images(2, 1, 8, 8).requires_grad_(), images(2, 1, 8, 8, seed=1)
    timesteps = torch.tensor([1, 2])
    (gradient,) = torch.autograd.grad((weights * degradation(x_0, timesteps)).sum(), x_0)
    direction = images(2, 1, 8, 8, seed=2)
    expected = (weights * degradation(direction, timesteps)).sum()
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_only_at_the_end(degradation, dtype):
    x_0 = images(2, 1, 8, 8, dtype=dtype)
    last = degradation.num_train_timesteps - 1
    for t in (0, torch.tensor([0, last])):
        assert torch.equal(degradation(x_0, t), degradation(x_0.float(), t).to(dtype))


def test_mixed_precision_is_for_the_network_and_not_for_the_degradation(degradation):
    x_0 = images(2, 1, 8, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = degradation(x_0, 1)
    assert mixed.dtype is torch.float32
    torch.testing.assert_close(mixed.double(), degradation(x_0.double(), 1), rtol=0, atol=1e-6)


def test_a_single_timestep_degrades_fully():
    x_0 = images(1, 1, 8, 8)
    for kind in (Blurring, Fading):
        once, often = kind(1, 0.5, 2.0), kind(7, 0.5, 2.0)
        assert once.sigmas[0] == often.sigmas[6] == 2.0
    torch.testing.assert_close(Downsampling(1, 8)(x_0, 0), x_0.mean().expand(1, 1, 8, 8), rtol=0, atol=1e-14)


def test_sizes_and_precisions_do_not_get_in_each_others_way(degradation):
    expected = degradation(images(2, 1, 8, 16), 1)
    degradation(images(2, 1, 16, 8, dtype=torch.float32), 1)
    assert torch.equal(degradation(images(2, 1, 8, 16), 1), expected)
    assert degradation(images(2, 1, 8, 16, dtype=torch.float32), 1).dtype is torch.float32


@pytest.mark.parametrize("name", MEAN_KEEPING)
def test_the_mean_colour_stays(name):
    states = all_states(DEGRADATIONS[name], images(4, 3, 8, 16)).mean((3, 4))
    torch.testing.assert_close(states, states[:1].expand_as(states), rtol=0, atol=1e-14)


# ---- blur -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_the_transform_is_the_orthonormal_one_of_scipy(size):
    expected = scipy.fft.dct(np.eye(size), axis=0, norm="ortho")
    np.testing.assert_allclose(cosine_transform(size).numpy(), expected, rtol=0, atol=1e-14)


def test_a_blur_damps_each_mode_as_heat_does():
    """(m, n) decays at the rate pi^2 (m^2 / H^2 + n^2 / W^2) for the time sigma^2 / 2; the sides differ."""
    x_0, (H, W) = images(1, 1, 6, 10), (6, 10)
    for t, sigma in ((0, 0.4), (T - 1, 5.0), (5, 0.4 * (5.0 / 0.4) ** (5 / (T - 1)))):
        rate = math.pi**2 * (np.arange(H)[:, None] ** 2 / H**2 + np.arange(W) ** 2 / W**2)
        modes = np.exp(-rate * sigma**2 / 2) * scipy.fft.dctn(x_0[0, 0].numpy(), norm="ortho")
        expected = scipy.fft.idctn(modes, norm="ortho")
        np.testing.assert_allclose(DEGRADATIONS["blur"](x_0, t)[0, 0].numpy(), expected, rtol=0, atol=1e-14)


def test_a_blur_is_a_gaussian_filter_with_reflected_borders():
    x_0 = images(1, 1, 20, 24)
    blurred = Blurring(1, 0.5, 2.5)(x_0, 0)[0, 0].numpy()
    expected = scipy.ndimage.gaussian_filter(x_0[0, 0].numpy(), 2.5, mode="reflect", truncate=12)
    # the filter samples the Gaussian, the blur has it band-limited: at this width they differ by 1e-9 or less
    np.testing.assert_allclose(blurred, expected, rtol=0, atol=1e-9)


def test_a_blur_of_a_blur_is_a_blur():
    x_0 = images(2, 1, 9, 7)
    three, four, five = (Blurring(1, 0.1, sigma) for sigma in (3.0, 4.0, 5.0))
    torch.testing.assert_close(four(three(x_0, 0), 0), five(x_0, 0), rtol=0, atol=1e-14)


def test_widths_grow_by_a_constant_factor_between_the_two_that_are_given():
    sigmas = Blurring(4, 0.5, 13.5).sigmas
    torch.testing.assert_close(sigmas, torch.tensor([0.5, 1.5, 4.5, 13.5, 0.0], dtype=torch.float64))


def test_a_wide_blur_leaves_the_mean_colour():
    x_0 = images(2, 3, 8, 8)
    expected = x_0.mean((2, 3), keepdim=True).expand_as(x_0)
    torch.testing.assert_close(DEGRADATIONS["blur to one colour"](x_0, T - 1), expected, rtol=0, atol=1e-12)


# ---- downsampling ---------------------------------------------------------------------------------------------------


def test_with_a_timestep_per_halving_blocks_become_their_means():
    x_0 = images(2, 3, 8, 16)
    for t, block in enumerate((2, 4, 8)):
        means = x_0.unfold(2, block, block).unfold(3, block, block).mean((4, 5))  # (B, C, H / block, W / block)
        expected = torch.kron(means, torch.ones(block, block, dtype=torch.float64))
        torch.testing.assert_close(DEGRADATIONS["downsample by halving"](x_0, t), expected, rtol=0, atol=1e-14)


def test_with_more_timesteps_an_image_fades_from_one_size_to_the_next():
    x_0 = images(2, 1, 8, 8)
    sizes, states = (all_states(Downsampling(steps, 8), x_0) for steps in (3, 12))
    torch.testing.assert_close(states[::4], sizes, rtol=0, atol=1e-14)
    for t in range(12):
        k, w = divmod(t + 1, 4)
        expected = sizes[k] if w == 0 else (1 - w / 4) * sizes[k] + w / 4 * sizes[k + 1]
        torch.testing.assert_close(states[t + 1], expected, rtol=0, atol=1e-14)


def test_downsampling_a_downsampled_image_changes_nothing():
    x_T = DEGRADATIONS["downsample"](images(2, 1, 16, 8), T - 1)
    for t in range(T):
        torch.testing.assert_close(DEGRADATIONS["downsample"](x_T, t), x_T, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("H", "W"), [(12, 8), (8, 12), (4, 8)])
def test_sides_that_blocks_do_not_tile_are_refused(H, W):
    with pytest.raises(ValueError, match=f"8 x 8 do not tile images of {H} x {W}"):
        DEGRADATIONS["downsample"](images(1, 1, H, W), 0)


# ---- mask -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [None, (1, 4), (2.5, 0.0)])
def test_a_mask_is_a_product_of_complements_of_gaussians(center):
    fading, (H, W) = Fading(5, 0.5, 2.5, center), (6, 7)
    row, column = (2.5, 3.0) if center is None else center
    mask = np.ones((H, W))
    for t, sigma in enumerate((0.5, 1.0, 1.5, 2.0, 2.5)):
        for i in range(H):
            for j in range(W):
                mask[i, j] *= 1 - math.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * sigma**2))
        masked = fading(torch.ones(1, 1, H, W, dtype=torch.float64), t)[0, 0]
        np.testing.assert_allclose(masked.numpy(), mask, rtol=1e-12, atol=1e-15)


def test_the_centre_of_a_mask_is_gone_at_once_and_more_goes_with_time():
    masks = all_states(DEGRADATIONS["mask in a corner"], torch.ones(1, 1, 8, 8, dtype=torch.float64))[:, 0, 0]
    assert (masks[1:, 0, 2] == 0).all() and masks[1, 7, 7] == pytest.approx(1)
    assert (masks.diff(dim=0) <= 0).all() and (masks >= 0).all()


# ---- what is left ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degradation", "coordinates"),
    [
        (Blurring(T, 0.5, 40.0), 1),  # the mean
        (Blurring(T, 0.5, 8.0), 3),  # and one wave along each axis, of which exp(-pi^2 / 2) = 1 / 139 is left
        (Downsampling(T, 8), 2),
        (Downsampling(T, 4), 8),
        (Fading(50, 0.1, 40.0), 0),
    ],
    ids=["blur", "less blur", "downsample", "less downsample", "mask"],
)
def test_a_fully_degraded_image_has_few_coordinates_and_is_known_by_them(degradation, coordinates):
    shape = (300, 2, 8, 16) if isinstance(degradation, Downsampling) else (300, 2, 8, 8)
    x_T = degradation(images(*shape), degradation.num_train_timesteps - 1)
    left = degradation.terminal_coordinates(x_T)
    assert left.shape == (300, 2 * coordinates)
    # what is dropped is less than 1/255 of a coordinate, and the rest of the image is less than half a grey level
    torch.testing.assert_close(degradation.terminal_image(left, shape), x_T, rtol=0, atol=1 / 255)
    # the singular value of a coordinate of which nothing was lost is near sqrt(300 / 3): the images are uniform noise
    assert torch.linalg.matrix_rank(x_T[:, 0].flatten(1), atol=(300 / 3) ** 0.5 / 255) == coordinates
    again = degradation.terminal_coordinates(degradation.terminal_image(left, shape))
    torch.testing.assert_close(again, left, rtol=0, atol=1e-13)


def test_a_mask_leaves_the_pixels_that_it_spares():
    fading = Fading(1, 1.0, 1.0, center=(0, 0))
    x_T = fading(torch.ones(2, 3, 4, 4, dtype=torch.float64), 0)
    left = x_T[0, 0] >= 1 / 255
    assert left.sum() == 15 and not left[0, 0]
    assert torch.equal(fading.terminal_coordinates(x_T), x_T[..., left].flatten(1))
    assert torch.equal(fading.terminal_image(fading.terminal_coordinates(x_T), (2, 3, 4, 4)), x_T * left)


# ---- noise ----------------------------------------------------------------------------------------------------------


def test_noise_is_added_along_the_path_and_found_again():
    path = DDPMAncestralScheduler(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2")
    noising, x_0, z = Noising(path), images(4, 2, 3), images(4, 2, 3, seed=1)
    timesteps = torch.tensor([0, 7, 19, -1])
    x_t = noising(x_0, timesteps, z)
    assert torch.equal(x_t, path.add_noise(x_0, z, timesteps))
    for i, t in enumerate(timesteps.tolist()):
        alone = noising(x_0[i : i + 1], t, z[i : i + 1])
        torch.testing.assert_close(alone, x_t[i : i + 1], rtol=0, atol=1e-15)
        if t >= 0:
            found = noising.noise(alone, x_0[i : i + 1], t)
            torch.testing.assert_close(found, z[i : i + 1], rtol=0, atol=1e-13)
    assert noising(x_0.half(), 5, z).dtype is torch.float16


def test_noising_without_noise_is_refused():
    with pytest.raises(ValueError, match="needs noise"):
        Noising(DDPMAncestralScheduler())(images(1, 1, 2, 2), 3)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timesteps", "named"),
    [
        (T, f"integers in -1 .. {T - 1}, got {T}"),
        (-2, "got -2"),
        (0.5, "got 0.5"),
        (True, "got True"),
        (torch.tensor([0, T]), f"-1 .. {T - 1}, got 0 .. {T}"),
        (torch.tensor([-2, 0]), "got -2 .. 0"),
        (torch.tensor([0.0, 1.0]), "integers, got torch.float32"),
        (torch.tensor([True, True]), "integers, got torch.bool"),
        (torch.tensor([0, 1, 2]), "one per sample, 2, got 3"),
    ],
)
def test_timesteps_out_of_range_are_refused(timesteps, named):
    noise = torch.zeros(2, 1, 8, 8)
    for degradation in (DEGRADATIONS["blur"], Noising(DDPMAncestralScheduler(num_train_timesteps=T))):
        with pytest.raises(ValueError, match=named):
            degradation(torch.zeros(2, 1, 8, 8), timesteps, noise)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: Blurring(0, 0.5, 2.0), "positive integer, got 0"),
        (lambda: Blurring(True, 0.5, 2.0), "positive integer, got True"),
        (lambda: Blurring(2.0, 0.5, 2.0), "positive integer, got 2.0"),
        (lambda: Blurring(T, 0.0, 2.0), "sigma_min=0.0"),
        (lambda: Blurring(T, 2.0, 2.0), "sigma_min=2.0 and sigma_max=2.0"),
        (lambda: Blurring(T, 0.5, math.inf), "sigma_max=inf"),
        (lambda: Downsampling(T, 6), "power of two, at least 2, got 6"),
        (lambda: Downsampling(T, 1), "got 1"),
        (lambda: Downsampling(T, 4.0), "got 4.0"),
        (lambda: Fading(T, 0.0, 2.0), "sigma_min=0.0"),
        (lambda: Fading(T, 3.0, 2.0), "sigma_min=3.0 and sigma_max=2.0"),
        (lambda: Fading(T, 0.1, math.inf), "sigma_max=inf"),
        (lambda: Fading(T, 0.1, 2.0, center=(1,)), r"got \(1,\)"),
        (lambda: Fading(T, 0.1, 2.0, center=(1, math.nan)), "nan"),
    ],
)
def test_settings_out_of_range_are_refused(build, named):
    with pytest.raises(ValueError, match=named):
        build()


def test_tensors_that_are_no_batch_of_images_are_refused(degradation):
    with pytest.raises(ValueError, match=r"\(B, C, H, W\), got \(8, 8\)"):
        degradation(torch.zeros(8, 8), 0)
    with pytest.raises(ValueError, match="floating-point"):
        degradation(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 0)
