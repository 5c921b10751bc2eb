"""Properties of GANGenerator: what follows what in each architecture, conditions, batch mates, what a folder holds."""

import doctest
import math
import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, conv2d, group_norm, interpolate, relu

import annealers
from annealers import GANGenerator
from annealers.models.gan_blocks import ConditionalNorm, UpResidualBlock
from annealers.single_file import single_file

ARCHITECTURES = ("dcgan", "resnet")
NORMS = ("batch", "group", "none")
BOTH = {"num_class_embeds": 4, "text_embed_dim": 5}
SIZES = {8: 2, 16: 2, 28: 2, 32: 3, 48: 3, 64: 4, 96: 4, 128: 5}  # side of the image -> how often it is doubled


def model_of(seed=0, **options):
    torch.manual_seed(seed)
    small = {"sample_size": 8, "out_channels": 1, "latent_dim": 6, "block_out_channels": (8, 16), "norm_num_groups": 4}
    return GANGenerator(**small | options).eval()


def conditioned(seed=0, **options):
    """A generator to which classes and texts matter: at first they do not."""
    model = model_of(seed, **BOTH | options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".of_" in name:
                parameter.normal_(std=0.3)
    return model


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_and_texts(batch_size, dtype=torch.float32):
    texts = noise(batch_size, 5, seed=2).to(dtype)
    return {"class_labels": torch.arange(batch_size) % 4, "encoder_hidden_states": texts}


def layers_of(model, *kinds):
    return [layer for layer in model.modules() if isinstance(layer, kinds)]


# ---- the architectures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("size", SIZES)
def test_noise_becomes_images_of_any_usual_size(arch, size):
    levels = SIZES[size] + (arch == "resnet")
    for channels in (1, 3):
        model = model_of(arch=arch, sample_size=size, out_channels=channels, block_out_channels=(8,) * levels)
        sample = model(noise(2, 6)).sample
        assert sample.shape == (2, channels, size, size) and sample.isfinite().all()
        assert torch.equal(model(noise(2, 6), return_dict=False)[0], sample)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pixels_are_the_tanh_of_the_last_layer(arch):
    model, last = model_of(arch=arch), []
    model.trunk.conv_out.register_forward_hook(lambda _, __, output: last.append(output))
    with torch.no_grad():
        model.trunk.conv_out.weight.mul_(1e5)
    sample = model(noise(64, 6)).sample
    assert torch.equal(sample, last[0].tanh())
    assert sample.max() > 0.9 and sample.min() < -0.9 and sample.abs().max() <= 1


def test_a_dcgan_has_nothing_but_fractionally_strided_convolutions_and_norms():
    model = model_of(sample_size=32, block_out_channels=(8, 16, 24))
    assert layers_of(model, nn.Linear, nn.Conv2d, nn.Upsample, nn.AvgPool2d, nn.MaxPool2d) == []
    convolutions = layers_of(model, nn.ConvTranspose2d)
    assert [(layer.in_channels, layer.out_channels) for layer in convolutions] == [(6, 24), (24, 16), (16, 8), (8, 1)]
    assert [layer.kernel_size for layer in convolutions] == [(4, 4)] * 4
    assert [layer.stride for layer in convolutions[1:]] == [(2, 2)] * 3


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_layer_but_the_first_sees_what_was_cut_off_at_0_after_a_norm(arch, norm):
    """In execution: the tensor that a norm gives is, cut off at 0 and maybe enlarged, what the next layer is given."""
    model, events = model_of(arch=arch, norm=norm), []
    for layer in layers_of(model, nn.ConvTranspose2d, nn.Conv2d, ConditionalNorm):
        if getattr(layer, "kernel_size", None) != (1, 1):  # but for shortcuts
            layer.register_forward_hook(lambda layer, given, made: events.append((layer, given[0], made)))
    model(noise(4, 6))
    convolutions = [event for event in events if not isinstance(event[0], ConditionalNorm)]
    norms = [event for event in events if isinstance(event[0], ConditionalNorm)]
    if arch == "dcgan":
        convolutions = convolutions[1:]  # that of the noise
    assert len(convolutions) == len(norms)
    for (_, given, _), (_, _, normalized) in zip(convolutions, norms, strict=True):
        factor = given.shape[-1] // normalized.shape[-1]
        assert torch.equal(given, interpolate(relu(normalized), scale_factor=factor)) and (given == 0).any()


def test_the_norm_is_the_one_asked_for_everywhere_but_at_the_end():
    for arch, number in (("dcgan", 2), ("resnet", 3)):
        kinds = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm}
        for norm in NORMS:
            model = model_of(arch=arch, norm=norm)
            counts = {name: len(layers_of(model, kind)) for name, kind in kinds.items()}
            assert counts == {name: number if name == norm else 0 for name in kinds}
            assert all(
                (layer.weight == 1).all() and (layer.bias == 0).all() for layer in layers_of(model, *kinds.values())
            )
        assert all(layer.num_groups == 4 for layer in layers_of(model_of(arch=arch, norm="group"), nn.GroupNorm))


def test_a_resnet_goes_through_a_linear_layer_to_a_map_and_through_a_block_for_each_doubling():
    model = model_of(arch="resnet", sample_size=16, block_out_channels=(8, 16, 24))
    assert [(layer.in_features, layer.out_features) for layer in layers_of(model, nn.Linear)] == [(6, 24 * 4 * 4)]
    blocks = layers_of(model, UpResidualBlock)
    assert [(block.conv1.in_channels, block.conv2.out_channels) for block in blocks] == [(24, 16), (16, 8)]
    assert model.trunk.conv_out.in_channels == 8


def test_a_residual_block_is_that_of_miyato_et_al():
    """Theirs enlarges before the shortcut's convolution, which is the same; here by hand with torch's functions."""
    torch.manual_seed(0)
    block = UpResidualBlock(
        4, 6, lambda channels: ConditionalNorm("group", channels, 2, num_class_embeds=None, text_embed_dim=None), True
    ).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    x = noise(2, 4, 3, 3).double()
    by_name = dict(block.named_parameters())

    def norm_of(h, name):
        return group_norm(h, 2, by_name[f"{name}.norm.weight"], by_name[f"{name}.norm.bias"])

    def convolved(h, name, padding=1):
        return conv2d(h, by_name[f"{name}.weight"], by_name[f"{name}.bias"], padding=padding)

    h = convolved(relu(norm_of(x, "norm1")).repeat_interleave(2, 2).repeat_interleave(2, 3), "conv1")
    h = convolved(relu(norm_of(h, "norm2")), "conv2")
    shortcut = convolved(x.repeat_interleave(2, 2).repeat_interleave(2, 3), "shortcut", padding=0)
    torch.testing.assert_close(block(x, None, None), h + shortcut, rtol=1e-10, atol=1e-10)


def test_weights_of_a_dcgan_start_normal_with_deviation_0_02():
    for layer in layers_of(model_of(block_out_channels=(64, 64), latent_dim=64), nn.ConvTranspose2d)[:2]:
        n = layer.weight.numel()
        assert layer.weight.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * n))
        assert abs(layer.weight.mean().item()) < 5 * 0.02 / math.sqrt(n)
        fourth = (layer.weight / layer.weight.std()).pow(4).mean().item()
        assert fourth == pytest.approx(3, abs=5 * math.sqrt(96 / n))  # of a uniform law 1.8


def test_weights_of_a_resnet_start_uniform_within_the_bounds_of_glorot():
    model = model_of(arch="resnet", block_out_channels=(32, 64))
    block = model.trunk.blocks[0]
    for layer, gain in ((block.conv1, math.sqrt(2)), (block.conv2, math.sqrt(2)), (block.shortcut, 1)):
        pixels = layer.kernel_size[0] ** 2
        bound = gain * math.sqrt(6 / (pixels * (layer.in_channels + layer.out_channels)))
        assert 0.98 * bound < layer.weight.abs().max().item() <= bound


# ---- conditions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_at_first_a_conditional_generator_is_the_unconditional_one(arch, norm):
    without, with_both = model_of(arch=arch, norm=norm), model_of(seed=1, arch=arch, norm=norm, **BOTH)
    assert with_both.load_state_dict(without.state_dict(), strict=False).unexpected_keys == []
    for training in (False, True):
        expected = without.train(training)(noise(3, 6)).sample
        assert torch.equal(with_both.train(training)(noise(3, 6), **labels_and_texts(3)).sample, expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("known", [("class",), ("text",), ("class", "text")])
def test_a_conditional_norm_scales_and_shifts_by_the_sum_of_what_class_and_text_say(known, norm):
    classes, texts = (4 if "class" in known else None), (5 if "text" in known else None)
    layer = ConditionalNorm(norm, 6, 2, num_class_embeds=classes, text_embed_dim=texts).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x, y, t = noise(3, 6, 4, 4).double(), torch.tensor([3, 0, 3]), noise(3, 5, seed=2).double()
    said = torch.zeros(3, 12, dtype=torch.float64)
    if "class" in known:
        said = said + layer.of_class.weight[y]
    if "text" in known:
        said = said + t @ layer.of_text.weight.T
    affine = {} if norm == "none" else {"weight": layer.norm.weight, "bias": layer.norm.bias}
    normalized = {
        "batch": lambda: batch_norm(x, None, None, training=True, **affine),
        "group": lambda: group_norm(x, 2, **affine),
        "none": lambda: x,
    }[norm]()
    expected = torch.stack(
        [(1 + said[b, c]) * normalized[b, c] + said[b, 6 + c] for b in range(3) for c in range(6)]
    ).view_as(x)
    torch.testing.assert_close(layer(x, y, t), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_norm_hears_class_and_text(arch):
    model = conditioned(arch=arch)
    first = model(noise(4, 6), **labels_and_texts(4)).sample
    heard = [parameter for name, parameter in model.named_parameters() if ".of_" in name]
    assert len(heard) == 2 * len(layers_of(model, ConditionalNorm)) > 0
    for parameter in heard:
        kept = parameter.data.clone()
        parameter.data += 0.1
        assert (model(noise(4, 6), **labels_and_texts(4)).sample != first).flatten(1).any(dim=1).all()
        parameter.data = kept


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_image_is_of_its_own_class_and_text(arch):
    model, given = conditioned(arch=arch).double(), labels_and_texts(3, torch.float64)
    z = noise(1, 6).double().expand(3, 6)
    together = model(z, **given).sample
    assert min((together[i] - together[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3
    alone = [model(z[i : i + 1], **{name: value[i : i + 1] for name, value in given.items()}).sample for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-10)


def test_of_a_text_given_by_tokens_the_mean_counts():
    model, z, y = conditioned(), noise(2, 6), torch.tensor([1, 2])
    tokens = noise(2, 7, 5, seed=3)
    by_tokens, by_mean = model(z, y, tokens).sample, model(z, y, tokens.sum(dim=1) / 7).sample
    torch.testing.assert_close(by_tokens, by_mean)
    assert (model(z, y, tokens[:, :3]).sample - by_tokens).abs().max() > 1e-3


# ---- batch mates, gradients, precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("norm", "training", "by_itself"),
    [("group", True, True), ("none", True, True), ("batch", False, True), ("batch", True, False)],
)
def test_a_picture_depends_on_the_others_in_training_with_a_norm_of_the_batch_alone(arch, norm, training, by_itself):
    def pictures(z):
        return model_of(arch=arch, norm=norm).double().train(training)(z).sample

    z = noise(3, 6).double()
    other_mates = torch.cat([z[:1], 2 * z[1:]])
    difference = (pictures(z)[0] - pictures(other_mates)[0]).abs().max().item()
    assert difference < 1e-10 if by_itself else difference > 1e-3


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_statistics_of_the_batch_move_in_training_and_rest_in_evaluation(arch):
    model = model_of(arch=arch)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    first = model(noise(4, 6)).sample
    assert torch.equal(model(noise(4, 6)).sample, first)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    model.train()(noise(4, 6))
    assert all((value != buffers[name]).any() for name, value in model.named_buffers())


def test_norms_of_the_batch_can_be_made_those_of_all_processes():
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model_of(arch="resnet", **BOTH))
    assert len(layers_of(converted, nn.SyncBatchNorm)) == 3 and layers_of(converted, nn.BatchNorm2d) == []


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("known", [{}, BOTH])
def test_every_weight_learns(known, arch, norm):
    model = (conditioned if known else model_of)(arch=arch, norm=norm).double().train()
    given = labels_and_texts(8, torch.float64) if known else {}
    sample = model(noise(8, 6).double(), **given).sample
    (sample * noise(8, 1, 8, 8, seed=5)).sum().backward()
    gradients = {name: 0 if p.grad is None else p.grad.abs().max().item() for name, p in model.named_parameters()}
    largest = max(gradients.values())
    assert [name for name, gradient in gradients.items() if gradient < 1e-9 * largest] == []


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_first_and_second_derivatives_are_exact_in_double_precision(arch, norm):
    model = model_of(arch=arch, norm=norm, block_out_channels=(4, 4), latent_dim=2, norm_num_groups=2).double()
    z = noise(2, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: model(z).sample, (z,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda z: model(z).sample, (z,), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_half_precision_gives_the_pictures_of_single_precision_up_to_rounding(tmp_path, arch, dtype):
    model, z, given = conditioned(arch=arch, norm="group"), noise(4, 6), labels_and_texts(4)
    with torch.no_grad():
        model.trunk.conv_out.weight.mul_(5 if arch == "dcgan" else 1)
    model.save_pretrained(tmp_path)
    loaded = GANGenerator.from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.dtype == dtype
    sample = loaded(z.to(dtype), **labels_and_texts(4, dtype)).sample
    assert sample.dtype == dtype and sample.float().std() > 0.3
    torch.testing.assert_close(sample.float(), model(z, **given).sample, rtol=0, atol=0.05)


# ---- folders, names, errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_saved_generator_comes_back_whole_with_its_statistics(tmp_path, arch, norm, low_cpu_mem_usage):
    model = conditioned(arch=arch, norm=norm).train()
    model(noise(4, 6), **labels_and_texts(4))
    model.eval().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = GANGenerator.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    given = {"latents": noise(2, 6), **labels_and_texts(2)}
    # a copy, since where in memory the weights of a file lie has an effect on the last digit of matrix products
    assert torch.equal(deepcopy(loaded)(**given).sample, model(**given).sample)


def test_it_is_named_by_the_package_alone_and_fits_into_one_file():
    assert GANGenerator.__module__ == "annealers" and "GANGenerator" in annealers.__all__
    names = {"__name__": "merged"}
    exec(compile(single_file("GANGenerator").split("# Where annealers is installed")[0], "merged", "exec"), names)
    assert names["GANGenerator"] is not GANGenerator
    model = conditioned(arch="resnet")
    alone = names["GANGenerator"].from_config(model.config).eval()
    alone.load_state_dict(model.state_dict())
    given = {"latents": noise(2, 6), **labels_and_texts(2)}
    assert torch.equal(alone(**given).sample, model(**given).sample)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "style"}, r"arch must be one of \('dcgan', 'resnet'\), got 'style'"),
        ({"norm": "spectral"}, r"norm must be one of \('batch', 'group', 'none'\), got 'spectral'"),
        ({"norm": "group", "block_out_channels": (8, 18)}, r"norm_num_groups must divide .* got 4 for \(8, 18\)"),
        ({"norm": "group", "norm_num_groups": 0}, r"got 0 for \(8, 16\)"),
        ({"block_out_channels": ()}, r"at least 1 of block_out_channels, got \(\)"),
        (
            {"arch": "resnet", "block_out_channels": (8,)},
            r"a resnet needs at least 2 of block_out_channels, got \(8,\)",
        ),
        (
            {"sample_size": 10},
            r"is doubled or halved 2 times, which sample_size=10 does not allow: need one of 8, 12, 16 \.\.",
        ),
        ({"sample_size": 4}, r"sample_size=4 does not allow: need one of 8, 12, 16"),
        ({"arch": "resnet", "sample_size": 7}, r"1 times, which sample_size=7 does not allow: need one of 4, 6, 8"),
        ({"sample_size": (8, 8)}, r"side of square images, an int, got \(8, 8\)"),
        ({"num_class_embeds": 0}, "num_class_embeds >= 1, or None for no such condition, got 0"),
        ({"text_embed_dim": 0}, "text_embed_dim >= 1, or None for no such condition, got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model_of(**options)


@pytest.mark.parametrize(
    ("known", "given", "message"),
    [
        ({}, {"latents": noise(2, 7)}, r"latents must be \(B, 6\), got \(2, 7\)"),
        ({}, {"latents": noise(2, 6, 1, 1)}, r"latents must be \(B, 6\), got \(2, 6, 1, 1\)"),
        ({}, {"class_labels": torch.tensor([0, 1])}, r"no classes \(num_class_embeds=None\)"),
        ({}, {"encoder_hidden_states": noise(2, 5)}, r"encoder_hidden_states, .* no texts \(text_embed_dim=None\)"),
        ({"num_class_embeds": 4}, {}, r"has 4 classes and needs class_labels \(2,\), got None"),
        ({"num_class_embeds": 4}, {"class_labels": torch.tensor([0, 4])}, r"0 \.\. 3, got 0 \.\. 4"),
        ({"num_class_embeds": 4}, {"class_labels": torch.tensor([0])}, r"\(2,\), got \(1,\)"),
        ({"text_embed_dim": 5}, {}, r"needs encoder_hidden_states \(2, 5\), got None"),
        ({"text_embed_dim": 5}, {"encoder_hidden_states": noise(2, 4)}, r"\(2, 5\), got \(2, 4\)"),
        ({"text_embed_dim": 5}, {"encoder_hidden_states": noise(1, 3, 5)}, r"\(2, 5\), got \(1, 5\)"),
        ({"text_embed_dim": 5}, {"encoder_hidden_states": noise(5)}, r"\(2, 5\), got \(5,\)"),
    ],
)
def test_shapes_and_conditions_that_do_not_fit_are_refused(known, given, message):
    with pytest.raises(ValueError, match=message):
        model_of(**known)(**{"latents": noise(2, 6)} | given)


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(GANGenerator.__doc__, {"torch": torch}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
