"""VAEModel: its bounds against exact laws, its laws of pixels, labels, and what it shares with AutoencoderKL."""

import math

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from annealers import VAEModel
from annealers.models import VAEOutput
from annealers.models.vae import blended_tiles

SIGMA = 0.5
LIKELIHOODS = ["bernoulli", "gaussian", "discretized_logistic", "discretized_mix_logistic"]


def model_of(**options):
    torch.manual_seed(0)
    defaults = {"in_channels": 1, "sample_size": 8, "latent_channels": 2, "block_out_channels": (8, 16)}
    return VAEModel(**(defaults | options)).eval()


def black_and_white(*shape, seed=0):
    return torch.where(torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5, -1.0, 1.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Function(nn.Module):
    """A function in the place of an encoder or a decoder."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


# ---- a linear model, of which everything is known -------------------------------------------------------------------


class Linear:
    """x = W z + b + sigma eps in four dimensions; the columns of W are orthogonal, so that q can be exact."""

    W = torch.tensor(
        [[0.5, 0.5, 0.5, 0.5], [0.9, -0.9, 0.9, -0.9], [0.2, 0.2, -0.2, -0.2]], dtype=torch.float64
    ).T  # (4, 3)
    b = torch.tensor([0.1, -0.2, 0.3, 0.0], dtype=torch.float64)

    def __init__(self):
        torch.manual_seed(0)
        eye = torch.eye(3, dtype=torch.float64)
        self.law = MultivariateNormal(self.b, self.W @ self.W.T + SIGMA**2 * torch.eye(4, dtype=torch.float64))
        self.covariance = torch.linalg.inv(eye + self.W.T @ self.W / SIGMA**2)
        self.x = self.law.sample((7,))

    def posterior_mean(self, x):
        return (x - self.b) @ self.W @ self.covariance / SIGMA**2

    def model(self, shift=0.0, stretch=1.0):
        """With an encoder whose mean is off by `shift`, and its standard deviation by a factor."""
        model = model_of(
            sample_size=2,
            latent_channels=3,
            block_out_channels=(8,),
            flat_latent=True,
            likelihood="gaussian",
            sigma=SIGMA,
            learn_sigma=False,
        )

        def encode(x):
            mean = self.posterior_mean(x.flatten(1)) + shift
            logvar = (self.covariance.diagonal() * stretch**2).log().expand_as(mean)
            return torch.cat([mean, logvar], dim=1)[:, :, None, None]

        model.encoder = Function(encode)
        model.decoder = Function(lambda z: (z.flatten(1) @ self.W.T + self.b).unflatten(1, (1, 2, 2)))
        return model.double()

    def expected_bound(self, model):
        """E[nll] + KL: nll is quadratic in z, so its mean over the points +-sqrt(n) e_i is that over all z."""
        points = math.sqrt(3) * torch.cat([torch.eye(3), -torch.eye(3)]).double()  # (6, 3)
        x = self.x.reshape(-1, 1, 2, 2)
        outputs = [model(x, noise=point.expand(len(x), 3)[:, :, None, None]) for point in points]
        return torch.stack([output.nll for output in outputs]).mean(dim=0) + outputs[0].kl


def test_with_the_exact_posterior_the_bounds_are_the_likelihood_without_variance():
    linear = Linear()
    model, exact = linear.model(), linear.law.log_prob(linear.x)
    assert torch.allclose(torch.diag(linear.covariance.diagonal()), linear.covariance)
    torch.testing.assert_close(-linear.expected_bound(model), exact)
    for seed in range(3):  # whatever z is drawn
        torch.testing.assert_close(model.log_prob(linear.x.reshape(-1, 1, 2, 2), 1, generator=generator(seed)), exact)
        torch.testing.assert_close(model.log_prob(linear.x.reshape(-1, 1, 2, 2), 7, generator=generator(seed)), exact)


@pytest.mark.parametrize(("shift", "stretch"), [(0.3, 1.0), (0.0, 0.6), (-0.2, 1.5)])
def test_a_wrong_encoder_costs_its_divergence_from_the_posterior(shift, stretch):
    linear = Linear()
    std = linear.covariance.diagonal().sqrt()
    gap = kl_divergence(Normal(std * 0 + shift, std * stretch), Normal(std * 0, std)).sum()
    bound = linear.expected_bound(linear.model(shift, stretch))
    torch.testing.assert_close(bound, gap - linear.law.log_prob(linear.x))


def test_more_importance_samples_lead_from_the_bound_to_the_likelihood():
    linear, n = Linear(), 2000
    model = linear.model(shift=0.3, stretch=1.3)
    x = linear.x[:1].expand(n, 4).reshape(n, 1, 2, 2)
    exact = linear.law.log_prob(linear.x[0]).item()
    means, errors = [], []
    for k in (1, 4, 16, 256):
        values = model.log_prob(x, k, generator=generator(k))
        means.append(values.mean().item())
        errors.append(values.std().item() / n**0.5)
    bound = -linear.expected_bound(model)[0].item()
    assert abs(means[0] - bound) < 4 * errors[0] and bound < exact - 20 * errors[0]
    for low, high, e_low, e_high in zip(means, means[1:], errors, errors[1:], strict=False):
        assert high - low > 4 * math.hypot(e_low, e_high)
    assert exact - 0.03 < means[-1] < exact + 4 * errors[-1]


# ---- the two terms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [True, False])
def test_the_divergence_is_that_of_torch_summed_over_the_latent(flat):
    model = model_of(flat_latent=flat)
    output = model(torch.rand(3, 1, 8, 8) * 2 - 1)
    q = output.latent_dist
    expected = kl_divergence(Normal(q.mean, q.std), Normal(0.0, 1.0)).flatten(1).sum(dim=1)
    torch.testing.assert_close(output.kl, expected)
    assert output.latents.shape == (3, *model.latent_shape) == (3, 2, *((1, 1) if flat else (4, 4)))


def stacked(height):
    """A model whose decoder repeats z, a picture of 2 x 2, as often as it fits below each other."""
    model = model_of(
        sample_size=(height, 2), latent_channels=4, block_out_channels=(8,), flat_latent=True, sigma=SIGMA
    )
    model.encoder = Function(
        lambda x: torch.cat([x[:, :, :2].flatten(1), x[:, :, :2].flatten(1) - 1], 1)[..., None, None]
    )
    model.decoder = Function(lambda z: z.reshape(-1, 1, 2, 2).repeat(1, 1, height // 2, 1))
    return model


def test_twice_the_image_costs_twice_the_likelihood_and_the_same_divergence():
    """No weight is hidden in a mean over pixels or over the latent."""
    x, eps = torch.rand(5, 1, 2, 2), torch.randn(5, 4, 1, 1)
    once, twice = stacked(2)(x, noise=eps), stacked(4)(x.repeat(1, 1, 2, 1), noise=eps)
    torch.testing.assert_close(twice.nll, 2 * once.nll)
    torch.testing.assert_close(twice.kl, once.kl)
    std = (0.5 * (x.flatten(1) - 1)).exp()
    q, z = Normal(x.flatten(1), std), x.flatten(1) + std * eps.flatten(1)
    nll = -Normal(z, SIGMA).log_prob(x.flatten(1)).sum(dim=1)
    kl = kl_divergence(q, Normal(0.0, 1.0)).sum(dim=1)
    torch.testing.assert_close(once.nll + once.kl, nll + kl, rtol=1e-5, atol=1e-5)


def test_the_best_sigma_is_the_root_of_the_mean_squared_error():
    model = model_of(likelihood="gaussian", sigma=1.0, learn_sigma=True, sample_size=8, block_out_channels=(8,))
    model.encoder = Function(lambda x: x.new_zeros(len(x), 4, 8, 8))
    model.decoder = Function(lambda z: torch.full((len(z), 1, 8, 8), 0.2))
    x = 0.2 + 0.13 * torch.randn(64, 1, 8, 8)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        model(x, noise=torch.zeros(64, *model.noise_shape)).nll.mean().backward()
        optimizer.step()
    assert model.likelihood.log_sigma.exp().item() ** 2 == pytest.approx((x - 0.2).square().mean().item(), rel=0.05)


def test_a_fixed_sigma_is_no_parameter():
    names = {name for name, _ in model_of(learn_sigma=False).named_parameters()}
    assert {name for name, _ in model_of(learn_sigma=True).named_parameters()} - names == {
        "pixel_likelihood.log_sigma"
    }


@pytest.mark.parametrize("likelihood", ["discretized_logistic", "discretized_mix_logistic"])
def test_the_probabilities_of_all_values_of_a_pixel_sum_to_one(likelihood):
    model = model_of(sample_size=1, block_out_channels=(8,), likelihood=likelihood, num_mixtures=3).double()
    model.encoder = Function(lambda x: x.new_zeros(len(x), 4, 1, 1))
    x = (2 * torch.arange(256).double() / 255 - 1).reshape(256, 1, 1, 1)
    eps = torch.randn(1, 2, 1, 1).double().expand(256, 2, 1, 1)
    assert (-model(x, noise=eps).nll).exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_grey_levels_are_refused_by_black_and_white():
    model, grey = model_of(likelihood="bernoulli"), torch.full((2, 1, 8, 8), 0.25)
    with pytest.raises(ValueError, match="values -1 and 1 only, got 0.25"):
        model(grey)
    with pytest.raises(ValueError, match="values -1 and 1 only, got 0.25"):
        model.log_prob(grey, 2)


def test_the_cost_of_black_and_white_is_positive_and_its_log_probability_negative():
    model, x = model_of(likelihood="bernoulli"), black_and_white(6, 1, 8, 8)
    assert (model(x).nll > 0).all() and (model(x).kl > 0).all()
    assert (model.log_prob(x, 5) < 0).all()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("flat", [True, False])
def test_each_likelihood_and_latent_trains_every_parameter(likelihood, flat):
    model = model_of(in_channels=3, likelihood=likelihood, flat_latent=flat, num_class_embeds=4, num_mixtures=2)
    x = black_and_white(4, 3, 8, 8)
    output = model(x, torch.arange(4))
    assert isinstance(output, VAEOutput) and output.sample.shape == x.shape
    assert output.nll.shape == output.kl.shape == (4,)
    (output.nll + output.kl).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.likelihood.log_prob(model.decoder_parameters(output.latents, torch.arange(4)), x).tolist() == (
        pytest.approx((-output.nll).tolist(), rel=1e-5)
    )
    again = model.decode(output.latents, torch.arange(4), return_dict=False)[0]
    torch.testing.assert_close(again, output.sample)


def test_a_tuple_holds_the_same():
    model, x, eps = model_of(), torch.rand(2, 1, 8, 8), torch.randn(2, 2, 4, 4)
    sample, q, z, nll, kl = model(x, noise=eps, return_dict=False)
    output = model(x, noise=eps)
    assert torch.equal(sample, output.sample) and torch.equal(z, output.latents)
    assert torch.equal(nll, output.nll) and torch.equal(kl, output.kl)
    assert torch.equal(model.encode(x, return_dict=False)[0].mean, q.mean)


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_a_generator_repeats_the_draw_and_leaves_the_global_one_alone():
    model, x = model_of(), torch.rand(3, 1, 8, 8)
    torch.manual_seed(5)
    untouched = torch.rand(1)
    torch.manual_seed(5)
    first, second = model(x, generator=generator(1)), model(x, generator=generator(1))
    model.log_prob(x, 3, generator=generator(1))
    model.prior_sample(3, generator(1))
    assert torch.rand(1) == untouched
    assert torch.equal(first.latents, second.latents)
    assert not torch.equal(first.latents, model(x, generator=generator(2)).latents)


def test_a_sample_does_not_depend_on_its_neighbours_in_the_batch():
    model, x = model_of(), torch.rand(3, 1, 8, 8)
    together = model(x, generator=[generator(i) for i in range(3)])
    alone = model(x[2:], generator=[generator(2)])
    torch.testing.assert_close(together.latents[2:], alone.latents)
    torch.testing.assert_close(together.nll[2:], alone.nll)
    bounds = model.log_prob(x, 4, generator=[generator(i) for i in range(3)])
    torch.testing.assert_close(bounds[2:], model.log_prob(x[2:], 4, generator=[generator(2)]))
    z = model.prior_sample(3, [generator(i) for i in range(3)])
    assert torch.equal(z[2:], model.prior_sample(1, [generator(2)])) and z.shape == (3, *model.latent_shape)


def test_without_sampling_the_latent_is_the_mean():
    model, x = model_of(), torch.rand(3, 1, 8, 8)
    output = model(x, sample_posterior=False)
    assert torch.equal(output.latents, output.latent_dist.mean)
    assert torch.equal(output.nll, model(x, sample_posterior=False).nll)
    drawn = model(x, noise=torch.ones(3, 2, 4, 4))
    torch.testing.assert_close(drawn.latents, drawn.latent_dist.mean + drawn.latent_dist.std)


def test_the_bound_sees_k_latents_of_each_image_whatever_the_chunks():
    model, x = model_of(likelihood="bernoulli"), black_and_white(3, 1, 8, 8)
    decoded = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(len(inputs[0])))
    bounds = [model.log_prob(x, 7, chunk_size=c, generator=generator()) for c in (1, 3, 7, 50)]
    assert decoded == [3] * 7 + [9, 9, 3] + [21] + [21]
    for bound in bounds[1:]:
        torch.testing.assert_close(bound, bounds[0])
    assert not bounds[0].requires_grad
    one = model(x, noise=torch.stack([torch.randn(2, 4, 4, generator=generator(i)) for i in range(3)]))
    q = one.latent_dist
    log_ratio = Normal(0.0, 1.0).log_prob(one.latents) - Normal(q.mean, q.std).log_prob(one.latents)
    single = model.log_prob(x, 1, generator=[generator(i) for i in range(3)])
    torch.testing.assert_close(single, -one.nll + log_ratio.flatten(1).sum(dim=1))


# ---- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [True, False])
def test_encoder_and_decoder_see_the_label(flat):
    model, x = model_of(num_class_embeds=3, flat_latent=flat), torch.rand(3, 1, 8, 8)
    y, shuffled = torch.arange(3), torch.tensor([1, 2, 0])
    eps = torch.randn(3, *model.noise_shape)
    a, b = model(x, y, noise=eps), model(x, shuffled, noise=eps)
    assert ((a.nll + a.kl - b.nll - b.kl).abs() > 1e-4).all()
    assert ((a.latent_dist.mean - b.latent_dist.mean).flatten(1).abs().amax(dim=1) > 1e-4).all()
    z = model.prior_sample(3, generator())
    difference = model.decode(z, y).sample - model.decode(z, shuffled).sample
    assert (difference.flatten(1).abs().amax(dim=1) > 1e-4).all()
    bounds = [model.log_prob(x, 2, class_labels=labels, generator=generator()) for labels in (y, shuffled)]
    assert ((bounds[0] - bounds[1]).abs() > 1e-4).all()
    of_one = model.log_prob(x[1:2], 2, class_labels=y[1:2], generator=[generator(1)])
    of_all = model.log_prob(x, 2, class_labels=y, generator=[generator(i) for i in range(3)])
    torch.testing.assert_close(of_one, of_all[1:2])


def test_samples_of_a_class_are_of_that_class():
    """Two classes of images, dark and bright: after a few steps the mean of a sample says which it is."""
    model = model_of(likelihood="bernoulli", num_class_embeds=2, flat_latent=True, block_out_channels=(8,)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(20):
        y = torch.arange(16) % 2
        u = torch.rand(16, 1, 8, 8, generator=generator(step))
        x = torch.where(u < torch.tensor([0.1, 0.9])[y].view(-1, 1, 1, 1), 1.0, -1.0)
        output = model(x, y, generator=generator(step))
        optimizer.zero_grad()
        (output.nll + output.kl).mean().backward()
        optimizer.step()
    z = model.eval().prior_sample(20, generator())
    brightness = model.decode(z, torch.arange(20) % 2).sample.mean(dim=(1, 2, 3))
    assert (brightness[0::2] < -0.3).all() and (brightness[1::2] > 0.3).all()


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (None, torch.tensor([0, 1]), "the model has no classes"),
        (3, None, r"3 classes and needs class_labels \(2,\), got None"),
        (3, torch.tensor([2, 3]), r"class_labels must be 0 \.\. 2, got 2 \.\. 3"),
        (3, torch.tensor([-1, 0]), r"class_labels must be 0 \.\. 2, got -1 \.\. 0"),
        (3, torch.tensor([0]), r"class_labels must be \(2,\), got \(1,\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(classes, labels, message):
    model = model_of(num_class_embeds=classes)
    for call in (
        lambda: model(torch.zeros(2, 1, 8, 8), labels),
        lambda: model.encode(torch.zeros(2, 1, 8, 8), labels),
        lambda: model.decode(torch.zeros(2, 2, 4, 4), labels),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ---- slices and tiles, as AutoencoderKL -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twins():
    """A VAEModel and an AutoencoderKL with its weights."""
    ours = model_of(in_channels=3, sample_size=16, latent_channels=4)
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    weights = {name.replace(".trunk.", "."): value for name, value in ours.state_dict().items()}
    del weights["pixel_likelihood.log_sigma"]
    theirs.load_state_dict(weights)
    return ours, theirs


@pytest.mark.parametrize(("width", "columns"), [(40, 18), (46, 23)])
def test_it_encodes_and_decodes_in_one_or_in_tiles_as_autoencoder_kl(twins, width, columns):
    """Of tiles, but for the edges, where theirs has one more, a thin one, and for where four meet."""
    x = torch.rand(1, 3, 16, width)
    for tiling in (False, True):
        rows, columns_here = (6, columns) if tiling else (8, width // 2)
        for model in twins:
            (model.enable_tiling if tiling else model.disable_tiling)()
        ours, theirs = (model.encode(x).latent_dist.parameters for model in twins)
        torch.testing.assert_close(ours[..., :rows, :columns_here], theirs[..., :rows, :columns_here])
        images = [model.decode(theirs.chunk(2, dim=1)[0], return_dict=False)[0] for model in twins]
        assert images[0].shape == x.shape
        torch.testing.assert_close(*(image[..., : 2 * rows, : 2 * columns_here] for image in images))
    twins[0].disable_tiling()


def test_an_image_of_one_tile_is_not_divided(twins):
    model, x = twins[0], torch.rand(1, 3, 16, 16)
    whole = model.encode(x).latent_dist.parameters
    model.enable_tiling()
    assert torch.equal(model.encode(x).latent_dist.parameters, whole)
    model.disable_tiling()


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 13), (8, 8), (20, 9), (7, 1)])
@pytest.mark.parametrize(("scale_in", "scale_out"), [(1, 1), (2, 1), (1, 2)])
def test_tiles_of_a_local_function_make_up_the_whole(height, width, scale_in, scale_out):
    x = torch.rand(2, 3, height * scale_in, width * scale_in)
    sizes = []

    def function(tile):
        sizes.append(max(tile.shape[2:]) // scale_in)
        return torch.nn.functional.interpolate(tile, scale_factor=scale_out / scale_in, mode="nearest")

    whole = function(x)
    sizes.clear()
    torch.testing.assert_close(blended_tiles(function, x, (4, 4), scale_in, scale_out), whole)
    assert max(sizes) <= 4


def test_tiles_have_the_size_of_the_training_images_and_their_labels():
    model, x = model_of(num_class_embeds=3, sample_size=(8, 16)), torch.rand(2, 1, 24, 24)
    model.enable_tiling()
    seen = {"encoder": set(), "decoder": set()}
    for name, sizes in seen.items():
        getattr(model, name).register_forward_pre_hook(lambda _, i, sizes=sizes: sizes.add(tuple(i[0].shape[2:])))
    y = torch.tensor([0, 2])
    z = model.encode(x, y).latent_dist.mean
    images = model.decode(z, y).sample
    assert z.shape == (2, 2, 12, 12) and images.shape == x.shape
    assert all(h <= 8 and w <= 16 for h, w in seen["encoder"]) and (8, 16) in seen["encoder"]
    assert all(h <= 4 and w <= 8 for h, w in seen["decoder"]) and (4, 8) in seen["decoder"]


def test_slices_are_the_batch_one_by_one():
    model, x, y = model_of(num_class_embeds=3), torch.rand(3, 1, 8, 8), torch.arange(3)
    whole = model.encode(x, y).latent_dist.parameters
    image = model.decode(whole.chunk(2, dim=1)[0], y).sample
    model.enable_slicing()
    sizes = []
    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    torch.testing.assert_close(model.encode(x, y).latent_dist.parameters, whole)
    torch.testing.assert_close(model.decode(whole.chunk(2, dim=1)[0], y).sample, image)
    assert sizes == [1] * 6


def test_a_flat_latent_has_no_tiles():
    with pytest.raises(ValueError, match="flat_latent=True cannot encode tiles"):
        model_of(flat_latent=True).enable_tiling()


# ---- precision, compilation, files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_with_half_precision_weights_the_laws_are_in_float32(likelihood):
    model = model_of(likelihood=likelihood, num_class_embeds=2)
    x, y, eps = black_and_white(3, 1, 8, 8), torch.tensor([0, 1, 0]), torch.randn(3, 2, 4, 4)
    exact, bound = model(x, y, noise=eps), model.log_prob(x, 3, class_labels=y, generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, y, noise=eps)
    half = model.to(torch.bfloat16)
    outputs = [mixed, half(x, y, noise=eps)]
    for output in outputs:
        assert output.nll.dtype == output.kl.dtype == output.latents.dtype == torch.float32
        torch.testing.assert_close(output.nll, exact.nll, rtol=0.03, atol=0.5)
        torch.testing.assert_close(output.kl, exact.kl, rtol=0.05, atol=0.1)
    assert outputs[1].sample.dtype == torch.bfloat16
    coarse = half.log_prob(x, 3, class_labels=y, generator=generator())
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, bound, rtol=0.03, atol=0.5)
    assert half.prior_sample(2).dtype == half.encode(x.bfloat16(), y).latent_dist.mean.dtype == torch.bfloat16


def test_a_reloaded_model_is_the_same_and_keeps_sigma_in_float32(tmp_path):
    model = model_of(sigma=0.3, num_class_embeds=2, scaling_factor=0.7, latents_mean=(0.1, 0.2))
    model.save_pretrained(tmp_path)
    loaded = VAEModel.from_pretrained(tmp_path)
    assert loaded.config.scaling_factor == 0.7 and tuple(loaded.config.latents_mean) == (0.1, 0.2)
    x, y, eps = torch.rand(2, 1, 8, 8), torch.arange(2), torch.randn(2, 2, 4, 4)
    assert torch.equal(loaded(x, y, noise=eps).nll, model(x, y, noise=eps).nll)
    half = VAEModel.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert half.dtype == torch.float16 and half.likelihood.log_sigma.dtype == torch.float32
    assert half.likelihood.log_sigma.item() == pytest.approx(math.log(0.3))


def test_forward_compiles_into_one_graph():
    model = model_of(likelihood="bernoulli", num_class_embeds=2, block_out_channels=(8,))
    x, y, eps = black_and_white(2, 1, 8, 8), torch.arange(2), torch.randn(2, *model.noise_shape)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y, noise=eps).nll, model(x, y, noise=eps).nll)


def test_gradient_checkpointing_changes_no_gradient():
    model, x, eps = model_of(), torch.rand(2, 1, 8, 8), torch.randn(2, 2, 4, 4)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.is_gradient_checkpointing
        output = model.train()(x, noise=eps)
        (output.nll + output.kl).mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sample_size": 28, "block_out_channels": (8, 8, 8, 8)},
            "28 x 28 pixels do not allow: need .* multiples of 8",
        ),
        ({"sample_size": (8, 6), "block_out_channels": (8, 8, 8)}, "8 x 6 pixels do not allow"),
        ({"likelihood": "poisson"}, "likelihood must be one of .*got 'poisson'"),
        ({"latent_channels": 0}, "need latent_channels >= 1"),
        ({"num_class_embeds": 0}, "num_class_embeds >= 1 or None, got 2 and 0"),
        ({"sigma": 0.0}, "need sigma > 0, got 0.0"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model_of(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(torch.zeros(2, 3, 8, 8)), r"images must be \(B, 1, H, W\), got \(2, 3, 8, 8\)"),
        (lambda model: model.encode(torch.zeros(1, 8, 8)), r"images must be \(B, 1, H, W\), got \(1, 8, 8\)"),
        (lambda model: model(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), r"real numbers in .*got torch.uint8"),
        (lambda model: model(torch.zeros(2, 1, 9, 8)), "9 x 8 pixels do not allow"),
        (lambda model: model.decode(torch.zeros(2, 3, 4, 4)), r"latents must be \(B, 2, h, w\), got \(2, 3, 4, 4\)"),
        (lambda model: model(torch.zeros(2, 1, 8, 8), noise=torch.zeros(2, 2, 1, 1)), r"noise must be \(2, 2, 4, 4\)"),
        (lambda model: model.log_prob(torch.zeros(2, 1, 8, 8), 0), "need num_samples and chunk_size >= 1, got 0"),
        (
            lambda model: model.log_prob(torch.zeros(2, 1, 8, 8), 2, 0),
            "need num_samples and chunk_size >= 1, got 2 and 0",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(model_of())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_list_of_generators_has_one_for_each_image(count):
    model, x, generators = model_of(), torch.zeros(3, 1, 8, 8), [generator(i) for i in range(count)]
    for call in (
        lambda: model(x, generator=generators),
        lambda: model.log_prob(x, 2, generator=generators),
        lambda: model.prior_sample(3, generators),
        lambda: model.likelihood.draw(x, generators),
    ):
        with pytest.raises(ValueError, match=f"one generator for each of 3 samples, got {count}"):
            call()


def test_a_flat_latent_takes_images_and_latents_of_one_size():
    model = model_of(flat_latent=True)
    with pytest.raises(ValueError, match=r"images must be \(B, 1, 8, 8\), got \(1, 1, 16, 16\)"):
        model.encode(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"latents must be \(B, 2, 1, 1\), got \(1, 2, 4, 4\)"):
        model.decode(torch.zeros(1, 2, 4, 4))


def test_a_spatial_latent_takes_images_of_other_sizes():
    model = model_of()
    output = model(torch.rand(2, 1, 12, 20))
    assert output.latents.shape == (2, 2, 6, 10) and output.sample.shape == (2, 1, 12, 20)
