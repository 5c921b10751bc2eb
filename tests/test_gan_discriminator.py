"""Properties of GANDiscriminator: what each architecture sees, logits without bounds, projection, batch mates."""

import doctest
import json
import warnings
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, group_norm, leaky_relu, relu

import annealers
from annealers import GANDiscriminator
from annealers.models.gan_blocks import DownResidualBlock
from annealers.single_file import single_file

ARCHITECTURES = ("patch", "dcgan", "resnet")
NORMS = ("none", "batch", "group", "spectral")
BOTH = {"num_class_embeds": 4, "text_embed_dim": 5}
SIZES = {8: 2, 16: 2, 28: 2, 32: 3, 48: 3, 64: 4, 96: 4, 128: 5}  # side of the image -> how often it is halved
WEIGHTED = (nn.Conv2d, nn.Linear, nn.Embedding)


def model_of(seed=0, **options):
    torch.manual_seed(seed)
    small = {"in_channels": 1, "sample_size": 8, "block_out_channels": (8, 16), "norm": "group", "norm_num_groups": 4}
    return GANDiscriminator(**small | options).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_and_texts(batch_size, dtype=torch.float32):
    texts = images(batch_size, 5, seed=2).to(dtype)
    return {"class_labels": torch.arange(batch_size) % 4, "text_embeds": texts}


def layers_of(model, *kinds):
    return [layer for layer in model.modules() if isinstance(layer, kinds)]


# ---- the architectures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("shape", "channels", "patches"),
    [((1, 8, 8), (8, 16), (2, 2)), ((3, 32, 32), (8, 16, 16), (4, 4)), ((2, 4, 11), (8,), (2, 5))],
)
def test_each_level_halves_the_image_and_each_pixel_that_is_left_has_a_logit(norm, shape, channels, patches):
    model = model_of(in_channels=shape[0], block_out_channels=channels, norm=norm, sample_size=None)
    output = model(images(3, *shape))
    assert output.logits.shape == (3, 1, *patches) and output.features.shape == (3, channels[-1], *patches)
    assert torch.equal(model(images(3, *shape), return_dict=False)[0], output.logits)


@pytest.mark.parametrize("arch", ["dcgan", "resnet"])
@pytest.mark.parametrize("size", SIZES)
def test_images_of_any_usual_size_have_one_logit(arch, size):
    halvings = SIZES[size]
    levels, side = halvings + (arch == "resnet"), size // 2**halvings
    for channels in (1, 3):
        model = model_of(arch=arch, sample_size=size, in_channels=channels, block_out_channels=(8,) * levels)
        output = model(images(2, channels, size, size))
        assert output.logits.shape == (2, 1) and output.logits.isfinite().all()
        assert output.features.shape == (2, 8, side, side)
        assert torch.equal(model(images(2, channels, size, size), return_dict=False)[1], output.features)


@pytest.mark.parametrize("norm", ["none", "spectral"])
def test_a_logit_is_of_a_patch_and_not_of_what_is_far_from_it(norm):
    model = model_of(norm=norm, block_out_channels=(8, 8, 8))
    x = images(1, 1, 64, 64).requires_grad_()
    model(x).logits[0, 0, 4, 4].backward()
    seen = (x.grad[0, 0] != 0).nonzero()
    extents = seen.max(0).values - seen.min(0).values + 1
    # back from a pixel: 3 x 3, then three times 2 r + 2
    assert extents.tolist() == [38, 38]


def test_a_patch_discriminator_is_the_same_function_of_its_saved_weights_as_ever(tmp_path):
    """A folder from before there were other architectures: its names, and what was computed with them, by hand."""
    model = model_of(seed=3)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for later in ("sample_size", "num_class_embeds", "text_embed_dim"):
        del config[later]
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = GANDiscriminator.from_pretrained(tmp_path).double().state_dict()
    names = ["trunk.0", "trunk.2", "trunk.3", "head"]
    assert list(weights) == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    x = images(2, 1, 16, 8).double()
    h = leaky_relu(conv2d(x, weights["trunk.0.weight"], weights["trunk.0.bias"], stride=2, padding=1), 0.2)
    h = conv2d(h, weights["trunk.2.weight"], weights["trunk.2.bias"], stride=2, padding=1)
    h = leaky_relu(group_norm(h, 4, weights["trunk.3.weight"], weights["trunk.3.bias"]), 0.2)
    expected = conv2d(h, weights["head.weight"], weights["head.bias"], padding=1)
    logits = GANDiscriminator.from_pretrained(tmp_path).double()(x).logits
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("arch", ["patch", "dcgan"])
def test_norms_of_features_follow_each_strided_convolution_but_the_first_and_then_comes_a_leaky_relu(arch):
    for norm, kind in (("batch", "BatchNorm2d"), ("group", "GroupNorm")):
        trunk = model_of(arch=arch, norm=norm, block_out_channels=(8, 16, 24), sample_size=32).trunk
        block = ["Conv2d", kind, "LeakyReLU"]
        assert [type(layer).__name__ for layer in trunk] == ["Conv2d", "LeakyReLU", *block, *block]
    for norm in ("none", "spectral"):
        trunk = model_of(arch=arch, norm=norm).trunk
        assert [layer for layer in trunk if "Norm" in type(layer).__name__] == []
        assert [layer.negative_slope for layer in layers_of(trunk, nn.LeakyReLU)] == [0.2, 0.2]


def test_a_dcgan_has_strided_convolutions_and_neither_pooling_nor_linear_layers():
    model = model_of(arch="dcgan", sample_size=32, block_out_channels=(8, 16, 24), in_channels=3)
    assert layers_of(model, nn.Linear, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d) == []
    *strided, last = layers_of(model, nn.Conv2d)
    assert [(layer.in_channels, layer.out_channels) for layer in strided] == [(3, 8), (8, 16), (16, 24)]
    assert {(layer.kernel_size, layer.stride) for layer in strided} == {((4, 4), (2, 2))}
    assert (last.in_channels, last.out_channels, last.kernel_size, last.padding) == (24, 1, (4, 4), (0, 0))
    x = images(1, 3, 32, 32).requires_grad_()
    model(x).logits.backward()
    assert (x.grad != 0).all()  # one logit sees the image as a whole


def test_a_resnet_halves_in_each_block_but_the_last_and_sums_over_the_pixels_for_a_linear_layer():
    model, inputs = model_of(arch="resnet", sample_size=16, block_out_channels=(8, 16, 24)), []
    blocks = layers_of(model, DownResidualBlock)
    for block in blocks:
        block.register_forward_hook(lambda _, given, made: inputs.append((given[0].shape[1:], made.shape[1:])))
    output = model(images(2, 1, 16, 16))
    assert inputs == [((1, 16, 16), (8, 8, 8)), ((8, 8, 8), (16, 4, 4)), ((16, 4, 4), (24, 4, 4))]
    expected = output.features.sum(dim=(2, 3)) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(output.logits, expected)
    assert output.features.min() == 0  # after ReLU


@pytest.mark.parametrize("channels", [(4, 6), (4, 4)])
@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("of_pixels", [True, False])
def test_a_residual_block_is_that_of_miyato_et_al(channels, down, of_pixels):
    """Theirs halves after the shortcut's convolution, which is the same; here by hand with torch's functions."""
    torch.manual_seed(0)
    block = DownResidualBlock(*channels, "group", 2, down=down, of_pixels=of_pixels).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    x, by_name = images(2, 4, 6, 6).double(), dict(block.named_parameters())

    def norm_of(h, name):
        return h if of_pixels else group_norm(h, 2, by_name[f"{name}.weight"], by_name[f"{name}.bias"])

    def convolved(h, name, padding=1):
        return conv2d(h, by_name[f"{name}.weight"], by_name[f"{name}.bias"], padding=padding)

    h = convolved(x if of_pixels else relu(norm_of(x, "norm1")), "conv1")
    h = convolved(relu(norm_of(h, "norm2")), "conv2")
    shortcut = convolved(x, "shortcut", padding=0) if down or channels == (4, 6) else x
    expected = avg_pool2d(h + shortcut, 2) if down else h + shortcut
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)
    assert (block.shortcut is None) == (not down and channels == (4, 4))
    names_of_norms = [name for name in by_name if name.startswith("norm")]
    assert len(names_of_norms) == (0 if of_pixels else 4)


def test_a_resnet_gives_its_norm_to_every_block_and_its_images_to_the_first_as_they_are():
    for norm, kind in (("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)):
        model = model_of(arch="resnet", norm=norm, sample_size=16, block_out_channels=(8, 16, 24))
        assert [len(layers_of(block, kind)) for block in layers_of(model, DownResidualBlock)] == [0, 2, 2]
        assert len(layers_of(model, nn.BatchNorm2d, nn.GroupNorm)) == 4
    assert [block.of_pixels for block in layers_of(model, DownResidualBlock)] == [True, False, False]


# ---- logits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_have_no_bounds(arch):
    model = model_of(arch=arch, norm="none")
    with torch.no_grad():
        model.head.weight.mul_(2**17)
        model.head.bias.zero_()
    x = images(32, 1, 8, 8)
    logits = model(x).logits
    assert logits.abs().max() > 1
    with torch.no_grad():
        model.head.weight.mul_(-8)
    torch.testing.assert_close(model(x).logits, -8 * logits)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_another_class_changes_the_logit_by_the_difference_of_the_projections(arch, norm):
    model = model_of(arch=arch, norm=norm, num_class_embeds=4).double()
    x, y, other = images(3, 1, 8, 8).double(), torch.tensor([0, 1, 3]), torch.tensor([2, 1, 0])
    output, swapped = model(x, y), model(x, other)
    v = model.of_class.weight  # divided by its norm if that is spectral
    h = output.features if arch == "patch" else output.features.sum(dim=(2, 3))
    expected = torch.einsum("bn,bn...->b...", v[y] - v[other], h).unsqueeze(1)
    torch.testing.assert_close(output.logits - swapped.logits, expected, rtol=1e-8, atol=1e-12)
    assert (expected[0] != 0).all() and (expected[1] == 0).all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("known", [{"num_class_embeds": 4}, {"text_embed_dim": 5}, BOTH])
def test_a_logit_is_that_without_conditions_and_the_projections_of_class_and_text(known, arch):
    without, model = model_of(arch=arch).double(), model_of(seed=1, arch=arch, **known).double()
    assert model.load_state_dict(without.state_dict(), strict=False).unexpected_keys == []
    x, given = images(3, 1, 8, 8).double(), labels_and_texts(3, torch.float64)
    v = torch.zeros(3, 16, dtype=torch.float64)
    if "num_class_embeds" in known:
        v = v + model.of_class.weight[given["class_labels"]]
    else:
        del given["class_labels"]
    if "text_embed_dim" in known:
        v = v + given["text_embeds"] @ model.of_text.weight.T
    else:
        del given["text_embeds"]
    output, plain = model(x, **given), without(x)
    h = output.features if arch == "patch" else output.features.sum(dim=(2, 3))
    expected = plain.logits + torch.einsum("bn,bn...->b...", v, h).unsqueeze(1)
    torch.testing.assert_close(output.logits, expected, rtol=1e-10, atol=1e-12)
    assert (output.logits != plain.logits).all()


# ---- batch mates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_with_a_norm_of_the_batch_alone_an_image_is_judged_by_those_beside_it(arch, norm):
    def judged(x, training):
        return model_of(arch=arch, norm=norm).double().train(training)(x).logits

    x = images(3, 1, 8, 8).double()
    with_other_mates = torch.cat([x[:1], 2 * x[1:]])
    difference = (judged(x, True)[0] - judged(with_other_mates, True)[0]).abs().max()
    assert difference > 1e-4 if norm == "batch" else difference < 1e-12
    torch.testing.assert_close(judged(x, False)[:1], judged(x[:1], False), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_in_evaluation_mode_nothing_changes(arch):
    for norm in ("batch", "spectral"):
        model, x = model_of(arch=arch, norm=norm, **BOTH), images(2, 1, 8, 8)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert torch.equal(model(x, **labels_and_texts(2)).logits, model(x, **labels_and_texts(2)).logits)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_spectral_norms_of_all_weights_become_one_in_training(arch):
    model = model_of(arch=arch, norm="spectral", **BOTH).train()
    with torch.no_grad():
        for layer in layers_of(model, *WEIGHTED):
            layer.parametrizations.weight.original.normal_()  # far from what the first iterations followed
    for _ in range(50):
        model(images(2, 1, 8, 8), **labels_and_texts(2))
    model.eval()
    layers = layers_of(model, *WEIGHTED)
    assert len(layers) == {"patch": 5, "dcgan": 5, "resnet": 9}[arch]
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item() == pytest.approx(1, rel=0.02)


def test_other_norms_leave_the_weights_alone():
    for norm in ("none", "batch", "group"):
        assert not any(torch.nn.utils.parametrize.is_parametrized(m) for m in model_of(norm=norm, **BOTH).modules())


def test_weights_start_with_deviation_0_02_and_those_of_residual_blocks_within_the_bounds_of_glorot():
    model = model_of(block_out_channels=(64, 64), arch="dcgan", num_class_embeds=64, text_embed_dim=64)
    for weight in (model.trunk[2].weight, model.of_class.weight, model.of_text.weight, model.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=5 / (2 * weight.numel()) ** 0.5)
        assert abs(weight.mean().item()) < 5 * 0.02 / weight.numel() ** 0.5
    assert all((layer.bias == 0).all() for layer in layers_of(model, nn.Conv2d))
    block = model_of(block_out_channels=(32, 64), arch="resnet").trunk[1]
    for layer, gain in ((block.conv1, 2**0.5), (block.conv2, 2**0.5), (block.shortcut, 1)):
        pixels = layer.kernel_size[0] ** 2
        bound = gain * (6 / (pixels * (layer.in_channels + layer.out_channels))) ** 0.5
        assert 0.98 * bound < layer.weight.abs().max().item() <= bound


@pytest.mark.parametrize("known", [{}, BOTH])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_weight_learns(arch, norm, known):
    model = model_of(arch=arch, norm=norm, **known).double().train()
    given = labels_and_texts(8, torch.float64) if known else {}
    model(images(8, 1, 8, 8).double(), **given).logits.square().sum().backward()
    gradients = {name: 0 if p.grad is None else p.grad.abs().max().item() for name, p in model.named_parameters()}
    largest = max(gradients.values())
    assert [name for name, gradient in gradients.items() if gradient < 1e-9 * largest] == []


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_first_and_second_derivatives_by_the_image_are_exact_in_double_precision(arch, norm):
    options = {"block_out_channels": (4, 4), "norm_num_groups": 2, "num_class_embeds": 4}
    model, y = model_of(arch=arch, norm=norm, **options).double(), torch.tensor([0, 3])
    x = images(2, 1, 8, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x, y).logits, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: model(x, y).logits, (x,), fast_mode=True)


@pytest.mark.parametrize("norm", ["none", "group", "spectral"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_size_of_the_gradient_by_the_image_has_a_gradient_by_each_weight(arch, norm):
    """What a penalty on the gradient needs; biases have no part in it but by where a ReLU cuts off."""
    model = model_of(arch=arch, norm=norm).train()
    x = images(4, 1, 8, 8).requires_grad_()
    gradient = torch.autograd.grad(model(x).logits.sum(), x, create_graph=True)[0]
    gradient.square().sum().backward()
    weights = {name: p.grad for name, p in model.named_parameters() if p.ndim > 1}
    assert [name for name, grad in weights.items() if grad is None or grad.abs().max() == 0] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_half_precision_gives_the_logits_of_single_precision_up_to_rounding(arch, norm, dtype):
    model, x = model_of(arch=arch, norm=norm, **BOTH), images(4, 1, 8, 8)
    expected = model(x, **labels_and_texts(4)).logits
    logits = model.to(dtype)(x.to(dtype), **labels_and_texts(4, dtype)).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


# ---- folders, names, errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "norm", "low_cpu_mem_usage"),
    [(arch, norm, norm != "spectral") for arch in ARCHITECTURES for norm in NORMS] + [("resnet", "spectral", True)],
)
def test_a_saved_discriminator_comes_back_whole(tmp_path, arch, norm, low_cpu_mem_usage):
    model = model_of(arch=arch, norm=norm, **BOTH).train()
    model(images(2, 1, 8, 8), **labels_and_texts(2))
    model.eval().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = GANDiscriminator.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    x, given = images(2, 1, 8, 8), labels_and_texts(2)
    # a copy, since where in memory the weights of a file lie has an effect on the last digit of matrix products
    assert torch.equal(deepcopy(loaded)(x, **given).logits, model(x, **given).logits)


def test_a_discriminator_loads_in_half_precision(tmp_path):
    model = model_of(arch="dcgan", norm="spectral", **BOTH)
    model.save_pretrained(tmp_path)
    loaded = GANDiscriminator.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, low_cpu_mem_usage=False)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.bfloat16}
    x, given = images(2, 1, 8, 8).bfloat16(), labels_and_texts(2, torch.bfloat16)
    torch.testing.assert_close(loaded(x, **given).logits, model.bfloat16()(x, **given).logits)


def test_it_is_named_by_the_package_alone_and_fits_into_one_file():
    assert GANDiscriminator.__module__ == "annealers" and "GANDiscriminator" in annealers.__all__
    names = {"__name__": "merged"}
    exec(compile(single_file("GANDiscriminator").split("# Where annealers is installed")[0], "merged", "exec"), names)
    assert names["GANDiscriminator"] is not GANDiscriminator
    model = model_of(arch="resnet", **BOTH)
    alone = names["GANDiscriminator"].from_config(model.config).eval()
    alone.load_state_dict(model.state_dict())
    x, given = images(2, 1, 8, 8), labels_and_texts(2)
    assert torch.equal(alone(x, **given).logits, model(x, **given).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "style"}, r"arch must be one of \('patch', 'dcgan', 'resnet'\), got 'style'"),
        ({"norm": "layer"}, r"norm must be one of \('none', 'batch', 'group', 'spectral'\), got 'layer'"),
        ({"block_out_channels": ()}, r"a patch needs at least 1 of block_out_channels, got \(\)"),
        ({"arch": "dcgan", "block_out_channels": ()}, r"a dcgan needs at least 1 of block_out_channels, got \(\)"),
        (
            {"arch": "resnet", "block_out_channels": (8,)},
            r"a resnet needs at least 2 of block_out_channels, got \(8,\)",
        ),
        ({"block_out_channels": (16, 18)}, r"got 4 for \(16, 18\)"),
        ({"arch": "resnet", "block_out_channels": (18, 16)}, r"got 4 for \(18, 16\)"),
        ({"norm_num_groups": 0}, r"got 0 for \(8, 16\)"),
        ({"arch": "dcgan", "sample_size": None}, "a dcgan needs sample_size, the side of its images, got None"),
        ({"arch": "resnet", "sample_size": None}, "a resnet needs sample_size, the side of its images, got None"),
        ({"arch": "dcgan", "sample_size": 10}, r"sample_size=10 does not allow: need one of 8, 12, 16 \.\."),
        ({"arch": "resnet", "sample_size": 7}, r"1 times, which sample_size=7 does not allow: need one of 4, 6, 8"),
        ({"num_class_embeds": 0}, "num_class_embeds >= 1, or None for no such condition, got 0"),
        ({"text_embed_dim": 0}, "text_embed_dim >= 1, or None for no such condition, got 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model_of(**options)


def test_groups_need_not_divide_channels_that_have_no_norm():
    model_of(block_out_channels=(6, 16)), model_of(arch="resnet", norm="none", block_out_channels=(6, 6))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 3, 8), (2, 1, 8, 2), (1, 8, 8), (8,)])
def test_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\) with H and W >= 4, got"):
        model_of()(torch.zeros(shape))


@pytest.mark.parametrize("arch", ["dcgan", "resnet"])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 16, 16), (2, 1, 8, 4), (1, 8, 8)])
def test_sizes_other_than_their_own_are_refused(arch, shape):
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\), got"):
        model_of(arch=arch)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("known", "given", "message"),
    [
        ({}, {"class_labels": torch.tensor([0, 1])}, r"no classes \(num_class_embeds=None\)"),
        ({}, {"text_embeds": images(2, 5)}, r"text_embeds, .* no texts \(text_embed_dim=None\)"),
        ({"num_class_embeds": 4}, {}, r"has 4 classes and needs class_labels \(2,\), got None"),
        ({"num_class_embeds": 4}, {"class_labels": torch.tensor([0, 4])}, r"0 \.\. 3, got 0 \.\. 4"),
        ({"text_embed_dim": 5}, {}, r"needs text_embeds \(2, 5\), got None"),
        ({"text_embed_dim": 5}, {"text_embeds": images(2, 4)}, r"\(2, 5\), got \(2, 4\)"),
        ({"text_embed_dim": 5}, {"text_embeds": images(2, 3, 5)}, r"\(2, 5\), got \(2, 3, 5\)"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(known, given, message):
    for arch in ARCHITECTURES:
        with pytest.raises(ValueError, match=message):
            model_of(arch=arch, **known)(images(2, 1, 8, 8), **given)


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(GANDiscriminator.__doc__, {"torch": torch}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
