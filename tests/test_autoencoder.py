"""Properties of AutoencoderModel: what it encodes, what it is to return, and what it learns where that is known.

Oracles: principal components as scikit-learn computes them, the best linear denoiser, autograd of a mixture density of
torch.distributions, and the ideal denoiser of stored points.
"""

import doctest
import warnings

import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import annealers
from annealers import AutoencoderModel
from annealers.denoising import LinearDenoisingAutoencoder, attraction_rate, iterative_denoising
from annealers.exact import FiniteData

F64 = torch.float64
SMALL = {"in_channels": 1, "out_channels": 1, "sample_size": 8, "latent_channels": 3, "block_out_channels": (8, 16)}


def model_of(seed=0, **options):
    torch.manual_seed(seed)
    return AutoencoderModel(**{**SMALL, **options}).eval()


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---- the two halves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True], ids=["spatial", "flat"])
@pytest.mark.parametrize(
    ("size", "channels", "blocks"),
    [(8, 1, (8, 16)), ((8, 12), 3, (8, 8, 16)), ([12, 8], 2, [8, 8]), ((28, 28), 1, (8, 8, 8)), (5, 1, (8,))],
)
def test_latents_have_the_shape_that_is_announced_and_decode_to_the_size_of_the_image(size, channels, blocks, flat):
    model = model_of(
        sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=blocks, flat_latent=flat
    )
    height, width = (size, size) if isinstance(size, int) else size
    images = randn(2, channels, height, width)
    latents = model.encode(images)
    factor = 2 ** (len(blocks) - 1)
    assert latents.shape == (2, 3, *((1, 1) if flat else (height // factor, width // factor)))
    assert model.latent_shape == latents.shape[1:] and model.image_size == (height, width)
    assert model.decode(latents).shape == images.shape == model(images).sample.shape


def test_a_spatial_latent_is_of_images_of_any_size_that_can_be_halved():
    model = model_of()
    assert model.encode(randn(1, 1, 6, 20)).shape == (1, 3, 3, 10)
    with pytest.raises(ValueError, match="7 x 8 pixels do not allow"):
        model.encode(randn(1, 1, 7, 8))


def test_the_output_is_the_decoded_code_of_what_is_seen_and_a_tuple_if_asked():
    model, images = model_of(), randn(2, 1, 8, 8)
    output = model(images)
    assert torch.equal(output.latents, model.encode(images))
    assert torch.equal(output.sample, model.decode(output.latents))
    assert torch.equal(output.sample, model.denoise(images))
    assert all(torch.equal(a, b) for a, b in zip(model(images, return_dict=False), output.to_tuple(), strict=True))


@pytest.mark.parametrize("flat", [False, True], ids=["spatial", "flat"])
def test_an_image_is_encoded_and_decoded_by_itself(flat):
    model, images = model_of(flat_latent=flat, noise_std=0.5).double(), randn(3, 1, 8, 8, dtype=F64)
    noise = randn(3, 1, 8, 8, seed=1, dtype=F64)
    together = model.train()(images, noise)
    for i in range(3):
        alone = model(images[i : i + 1], noise[i : i + 1])
        for name in ("sample", "latents", "loss"):
            torch.testing.assert_close(alone[name], together[name][i : i + 1], rtol=1e-10, atol=1e-10)


def test_the_options_reach_both_halves():
    settings = {"layers_per_block": 2, "mid_block_add_attention": False, "block_out_channels": (8, 16)}
    for groups in (4, 8):
        model = model_of(norm_num_groups=groups, **settings)
        for half in (model.encoder, model.decoder):
            assert {m.num_groups for m in half.modules() if isinstance(m, nn.GroupNorm)} == {groups}
            assert half.trunk.mid_block.attentions[0] is None
        assert [len(block.resnets) for block in model.encoder.trunk.down_blocks] == [2, 2]
        assert [len(block.resnets) for block in model.decoder.trunk.up_blocks] == [3, 3]
    assert model_of().encoder.trunk.mid_block.attentions[0] is not None


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_the_loss_of_an_image_is_the_sum_of_its_squared_errors():
    model, images = model_of(), randn(3, 1, 8, 8)
    output = model(images)
    for i in range(3):
        expected = nn.functional.mse_loss(output.sample[i], images[i], reduction="sum")
        torch.testing.assert_close(output.loss[i], expected)


def seeing(model):
    """An autoencoder that returns what it sees."""
    model.encoder = model.decoder = nn.Identity()
    return model


IDENTITY = {"latent_channels": 1, "block_out_channels": (8,), "noise_std": 0.7}


def test_the_encoder_sees_the_noisy_image_and_the_target_is_the_clean_one():
    """Of the noisy one the identity would have no loss at all."""
    model, images, noise = seeing(model_of(**IDENTITY)), randn(3, 1, 8, 8), randn(3, 1, 8, 8, seed=1)
    output = model(images, noise)
    torch.testing.assert_close(output.sample, images + 0.7 * noise)
    torch.testing.assert_close(output.loss, 0.49 * (noise**2).flatten(1).sum(dim=1))


def test_noise_that_is_not_given_is_standard_normal_and_is_reproduced_by_a_generator():
    model, images = seeing(model_of(**IDENTITY)), torch.zeros(500, 1, 8, 8)
    drawn = model(images, generator=torch.Generator().manual_seed(3)).sample / 0.7
    again = model(images, generator=torch.Generator().manual_seed(3)).sample / 0.7
    assert torch.equal(drawn, again) and (drawn != model(images).sample / 0.7).any()
    values = drawn.flatten()
    assert abs(values.mean()) < 4 / len(values) ** 0.5
    assert abs(values.var() - 1) < 4 * (2 / len(values)) ** 0.5


def test_with_a_generator_for_each_image_none_hears_of_the_others():
    model, images = seeing(model_of(**IDENTITY)), randn(3, 1, 8, 8)
    together = model(images, generator=generators(5, 6, 7)).sample
    assert torch.equal(model(images[1:2], generator=generators(6)).sample[0], together[1])


def test_generators_that_are_not_one_for_each_image_are_refused():
    model, images = seeing(model_of(**IDENTITY)), randn(3, 1, 8, 8)
    with pytest.raises(ValueError, match="3.*2|2.*3"):
        model(images, generator=generators(5, 6))


def test_a_plain_autoencoder_adds_no_noise_and_takes_none():
    model, images = seeing(model_of(**{**IDENTITY, "noise_std": 0})), randn(2, 1, 8, 8)
    assert torch.equal(model.train()(images).sample, images)
    with pytest.raises(ValueError, match="plain autoencoder, noise_std=0"):
        model(images, torch.zeros_like(images))


def test_another_target_may_have_other_channels_and_is_what_the_loss_compares_to():
    model, images, colours = model_of(out_channels=3), randn(2, 1, 8, 8), randn(2, 3, 8, 8, seed=1)
    output = model(images, target=colours)
    expected = nn.functional.mse_loss(output.sample, colours, reduction="none").flatten(1).sum(dim=1)
    torch.testing.assert_close(output.loss, expected)
    with pytest.raises(ValueError, match=r"what is returned, \(2, 3, 8, 8\), got \(2, 1, 8, 8\)"):
        model(images)


@pytest.mark.parametrize("options", [{}, {"flat_latent": True}, {"flat_latent": True, "block_out_channels": ()}])
def test_every_weight_learns_by_the_loss(options):
    model = model_of(noise_std=0.5, **options).train()
    model(randn(4, 1, 8, 8)).loss.mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert [name for name in silent if not name.endswith("to_k.bias")] == []  # softmax ignores a shift of all keys


# ---- the linear autoencoder -----------------------------------------------------------------------------------------

LINEAR = {"sample_size": 4, "block_out_channels": (), "flat_latent": True}


def gaussian_data(count):
    """Draws of a Gaussian of 16 coordinates with distinct variances in a random basis, (count, 1, 4, 4)."""
    basis = torch.linalg.qr(randn(16, 16, seed=2, dtype=F64)).Q
    deviations = 2.0 * 0.8 ** torch.arange(16, dtype=F64)
    return (randn(count, 16, seed=3, dtype=F64) * deviations @ basis.T + basis[0]).reshape(-1, 1, 4, 4)


def minimised(model, images, noise=None):
    """The linear autoencoder where its own loss is least."""
    model = model.double().train()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=400, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = model(images, noise).loss.mean()
        value.backward()
        return value

    optimizer.step(loss)
    return model.eval()


def slope_of(model):
    """The matrix of the affine map that a linear autoencoder is."""
    zero, unit = torch.zeros(1, 1, 4, 4, dtype=F64), torch.eye(16, dtype=F64).reshape(16, 1, 4, 4)
    with torch.no_grad():
        return (model.denoise(unit) - model.denoise(zero)).flatten(1).T


def test_the_linear_autoencoder_of_gaussian_data_is_the_projection_on_its_principal_components():
    images = gaussian_data(100)
    model = minimised(model_of(latent_channels=4, **LINEAR), images)
    components = PCA(4).fit(images.flatten(1).numpy())
    V = torch.from_numpy(components.components_)
    torch.testing.assert_close(slope_of(model), V.T @ V, rtol=0, atol=1e-4)
    mean = torch.from_numpy(components.mean_).reshape(1, 1, 4, 4)
    torch.testing.assert_close(model.denoise(mean), mean, rtol=0, atol=1e-4)
    least = 100 * 16 * images.flatten(1).sub(mean.flatten()).matmul(torch.eye(16, dtype=F64) - V.T @ V).square().mean()
    assert float(model(images).loss.sum().detach()) == pytest.approx(float(least), rel=1e-6)


def test_with_noise_it_shrinks_each_component_by_its_share_of_the_variance():
    """Noise of mean 0 and covariance I exactly, 32 draws of it to each image."""
    images, axes = gaussian_data(60), 4.0 * torch.eye(16, dtype=F64).reshape(16, 1, 4, 4)
    noise = torch.cat([axes, -axes]).repeat(len(images), 1, 1, 1)
    model = minimised(model_of(latent_channels=4, noise_std=0.6, **LINEAR), images.repeat_interleave(32, dim=0), noise)
    best = LinearDenoisingAutoencoder.from_data(images, rank=4, noise_level=0.6)
    points = randn(20, 1, 4, 4, seed=4, dtype=F64)
    torch.testing.assert_close(model.denoise(points), best(points), rtol=0, atol=1e-4)


# ---- stored points --------------------------------------------------------------------------------------------------

POINTS = torch.tensor(
    [
        [[1, 1, -1, -1], [1, 1, -1, -1], [-1, -1, -1, -1], [-1, -1, -1, -1]],
        [[-1, -1, 1, 1], [-1, -1, 1, 1], [-1, -1, 1, 1], [-1, -1, 1, 1]],
        [[-1, -1, -1, -1], [1, 1, 1, 1], [1, 1, 1, 1], [-1, -1, -1, -1]],
        [[1, -1, 1, -1], [-1, 1, -1, 1], [1, -1, 1, -1], [-1, 1, -1, 1]],
    ],
    dtype=torch.float32,
)[:, None]
STORED = FiniteData(POINTS)
LITTLE, MUCH = 1.2, 30.0


def test_the_ideal_denoiser_of_stored_points_is_tweedies_formula_for_their_blurred_density():
    sigma, y = LITTLE, randn(50, 16, seed=5, dtype=F64).mul(2).requires_grad_()
    components = Independent(Normal(POINTS.flatten(1).double(), sigma), 1)
    log_density = MixtureSameFamily(Categorical(torch.ones(4, dtype=F64)), components).log_prob(y)
    (score,) = torch.autograd.grad(log_density.sum(), y)
    denoised = STORED.denoise(y.detach().reshape(-1, 1, 4, 4), sigma=sigma).flatten(1)
    torch.testing.assert_close(denoised, y.detach() + sigma**2 * score, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def learnt():
    """Denoising autoencoders of the four points, by the noise that they were trained on."""
    return {sigma: trained_on_points(sigma) for sigma in (LITTLE, MUCH)}


def trained_on_points(sigma):
    architecture = {"sample_size": 4, "latent_channels": 8, "block_out_channels": (16,), "flat_latent": True}
    model = model_of(noise_std=sigma, mid_block_add_attention=False, **architecture)
    optimizer = torch.optim.Adam(model.train().parameters(), lr=3e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=200)
    generator = torch.Generator().manual_seed(6)
    for _ in range(200):
        model(POINTS.repeat(8, 1, 1, 1), generator=generator).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def noisy_points(sigma, seed=7):
    return POINTS.repeat(100, 1, 1, 1) + sigma * randn(400, 1, 4, 4, seed=seed)


def test_trained_on_stored_points_it_comes_near_the_ideal_denoiser(learnt):
    """The bottom of the loss is the variance that the ideal one leaves; above it is the distance from it."""
    y = noisy_points(LITTLE)
    with torch.no_grad():
        denoised, ideal = learnt[LITTLE].denoise(y), STORED.denoise(y, sigma=LITTLE)
    distance = (denoised - ideal).square().mean()
    assert distance < 0.1 * (ideal - POINTS.mean(dim=0)).square().mean()
    assert distance < 0.1 * (y - ideal).square().mean()  # the identity and the mean are far


def test_with_little_noise_it_restores_the_nearest_point_and_each_point_attracts(learnt):
    starts = POINTS.repeat(10, 1, 1, 1) + 0.5 * randn(40, 1, 4, 4, seed=8)
    ends = iterative_denoising(learnt[LITTLE].denoise, starts, 0.5, 30)
    nearest = torch.cdist(ends.flatten(1), POINTS.flatten(1))
    assert torch.equal(nearest.argmin(dim=1), torch.arange(40) % 4)
    assert nearest.amin(dim=1).max() < 0.5  # of 16 coordinates, and the points are 5 apart and more
    assert (attraction_rate(learnt[LITTLE].denoise, ends[:4]) < 0.8).all()


def test_with_much_noise_it_restores_the_mean_wherever_it_is(learnt):
    ends = iterative_denoising(learnt[MUCH].denoise, POINTS, 0.5, 30)
    assert (ends - POINTS.mean(dim=0)).square().sum(dim=(1, 2, 3)).sqrt().max() < 0.8
    assert (STORED.denoise(POINTS, sigma=MUCH) - POINTS.mean(dim=0)).abs().max() < 0.05


# ---- precision, memory, folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True], ids=["spatial", "flat"])
def test_half_precision_gives_the_images_of_single_precision_up_to_rounding_and_sums_the_loss_in_it(dtype, flat):
    model, images = model_of(flat_latent=flat, noise_std=0.5), randn(4, 1, 8, 8).to(dtype)
    noise = randn(4, 1, 8, 8, seed=1).to(dtype)
    expected = model(images.float(), noise.float())
    output = model.to(dtype)(images, noise)
    assert output.sample.dtype == output.latents.dtype == dtype and output.loss.dtype == torch.float32
    torch.testing.assert_close(output.sample.float(), expected.sample, rtol=0, atol=0.05)
    exact = (output.sample.double() - images.double()).square().flatten(1).sum(dim=1)
    torch.testing.assert_close(output.loss.double(), exact, rtol=1e-5, atol=0)


def test_the_loss_is_in_single_precision_under_autocast():
    model, images = model_of(), randn(2, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
    assert output.sample.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    exact = (output.sample.double() - images.double()).square().flatten(1).sum(dim=1)
    torch.testing.assert_close(output.loss.double(), exact, rtol=1e-5, atol=0)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = model_of().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.encoder.trunk.gradient_checkpointing and model.decoder.trunk.gradient_checkpointing
        model(randn(2, 1, 8, 8)).loss.mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_it_compiles_without_a_break():
    model, images = model_of(noise_std=0.5), randn(2, 1, 8, 8)
    noise = randn(2, 1, 8, 8, seed=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, noise).loss, model(images, noise).loss)


@pytest.mark.parametrize(
    "options",
    [
        {"flat_latent": True, "noise_std": 0.3},
        {"sample_size": (8, 12)},
        {"block_out_channels": (), "flat_latent": True},
    ],
    ids=["flat", "spatial", "linear"],
)
def test_a_saved_autoencoder_comes_back_whole(tmp_path, options):
    model = model_of(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
        loaded = AutoencoderModel.from_pretrained(tmp_path)
    images = randn(2, 1, *model.image_size)
    assert torch.equal(loaded.denoise(images), model.denoise(images)) and loaded.latent_shape == model.latent_shape
    assert loaded.config.noise_std == model.config.noise_std


def test_it_is_named_by_the_package_alone():
    assert AutoencoderModel.__module__ == "annealers" and "AutoencoderModel" in annealers.__all__


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_std": -0.1}, "not negative, got -0.1"),
        ({"noise_std": float("inf")}, "finite and not negative, got inf"),
        ({"latent_channels": 0}, ">= 1, got 1, 1, 0 and 1"),
        ({"layers_per_block": 0}, ">= 1, got 1, 1, 3 and 0"),
        ({"block_out_channels": ()}, "linear autoencoder, which needs flat_latent=True"),
        ({"sample_size": 28, "block_out_channels": (8, 8, 8, 8)}, "28 x 28 pixels do not allow"),
    ],
)
def test_an_architecture_that_does_not_fit_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model_of(**options)


@pytest.mark.parametrize(
    ("flat", "shape", "message"),
    [
        (False, (2, 3, 8, 8), r"\(B, 1, H, W\), got \(2, 3, 8, 8\)"),
        (False, (1, 8, 8), r"\(B, 1, H, W\), got \(1, 8, 8\)"),
        (True, (2, 1, 8, 16), r"images of one size, 8 x 8, got a sample of shape \(2, 1, 8, 16\)"),
    ],
)
def test_images_of_another_shape_are_refused(flat, shape, message):
    with pytest.raises(ValueError, match=message):
        model_of(flat_latent=flat)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("flat", "shape", "message"),
    [
        (False, (2, 4, 4, 4), r"\(B, 3, h, w\), got \(2, 4, 4, 4\)"),
        (False, (3, 4, 4), r"\(B, 3, h, w\), got \(3, 4, 4\)"),
        (True, (2, 3), r"\(B, 3, 1, 1\), got \(2, 3\)"),
        (True, (2, 3, 1, 2), r"\(B, 3, 1, 1\), got \(2, 3, 1, 2\)"),
    ],
)
def test_latents_of_another_shape_are_refused(flat, shape, message):
    with pytest.raises(ValueError, match=message):
        model_of(flat_latent=flat).decode(torch.zeros(shape))


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"the shape \(2, 1, 8, 8\) of sample, got \(1, 1, 8, 8\)"):
        model_of(noise_std=0.5)(torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 8, 8))


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(AutoencoderModel.__doc__, {"torch": torch}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
