"""Properties of GANDiscriminator: patches, logits without bounds, no batch mates, spectral norms."""

import doctest
import warnings

import pytest
import torch

import annealers
from annealers import GANDiscriminator

NORMS = ("none", "group", "spectral")


def model_of(seed=0, **options):
    torch.manual_seed(seed)
    return GANDiscriminator(**{"in_channels": 1, "block_out_channels": (16, 32), "norm": "group", **options}).eval()


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("shape", "channels", "patches"),
    [((1, 8, 8), (8, 16), (2, 2)), ((3, 32, 32), (8, 16, 16), (4, 4)), ((2, 4, 11), (8,), (2, 5))],
)
def test_each_level_halves_the_image_and_each_pixel_that_is_left_has_a_logit(norm, shape, channels, patches):
    model = model_of(in_channels=shape[0], block_out_channels=channels, norm=norm)
    output = model(images(3, *shape))
    assert output.logits.shape == (3, 1, *patches) and output.features.shape == (3, channels[-1], *patches)
    assert torch.equal(model(images(3, *shape), return_dict=False)[0], output.logits)


@pytest.mark.parametrize("norm", ["none", "spectral"])
def test_a_logit_is_of_a_patch_and_not_of_what_is_far_from_it(norm):
    model = model_of(norm=norm, block_out_channels=(8, 8, 8))
    x = images(1, 1, 64, 64).requires_grad_()
    model(x).logits[0, 0, 4, 4].backward()
    seen = (x.grad[0, 0] != 0).nonzero()
    extents = seen.max(0).values - seen.min(0).values + 1
    # back from a pixel: 3 x 3, then three times 2 r + 2
    assert extents.tolist() == [38, 38]


@pytest.mark.parametrize("norm", NORMS)
def test_an_image_is_judged_by_itself_also_in_training(norm):
    x = images(4, 1, 8, 8).double()
    for training in (False, True):
        together = model_of(norm=norm).double().train(training)(x).logits
        alone = torch.cat([model_of(norm=norm).double().train(training)(x[i : i + 1]).logits for i in range(4)])
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_logits_have_no_bounds():
    model = model_of(norm="none")
    with torch.no_grad():
        model.head.weight.mul_(1e4)
    logits = model(images(4, 1, 8, 8)).logits
    assert logits.max() > 1 and logits.min() < -1


def test_spectral_norms_become_one_in_training_and_stay_in_evaluation():
    model = model_of(norm="spectral").train()
    for _ in range(30):
        model(images(1, 1, 8, 8))
    model.eval()
    first = model(images(2, 1, 8, 8)).logits
    assert torch.equal(model(images(2, 1, 8, 8)).logits, first)
    for layer in (model.trunk[0], model.trunk[2], model.head):
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item() == pytest.approx(1, rel=0.02)


def test_group_norms_follow_each_convolution_but_the_first():
    kinds = [type(layer).__name__ for layer in model_of(block_out_channels=(16, 32, 64)).trunk]
    block = ["Conv2d", "GroupNorm", "LeakyReLU"]
    assert kinds == ["Conv2d", "LeakyReLU", *block, *block]
    assert not any("GroupNorm" in type(layer).__name__ for layer in model_of(norm="none").trunk)


@pytest.mark.parametrize("norm", NORMS)
def test_every_weight_learns(norm):
    model = model_of(norm=norm).train()
    model(images(4, 1, 8, 8)).logits.square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []


@pytest.mark.parametrize("norm", NORMS)
def test_a_saved_discriminator_comes_back_whole(tmp_path, norm):
    model = model_of(norm=norm).train()
    model(images(1, 1, 8, 8))
    model.eval().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = GANDiscriminator.from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(loaded(images(2, 1, 8, 8)).logits, model(images(2, 1, 8, 8)).logits)


def test_weights_start_small():
    weights = torch.cat([p.flatten() for p in model_of(block_out_channels=(64, 64)).trunk[2].parameters()])
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)


def test_it_is_named_by_the_package_alone():
    assert GANDiscriminator.__module__ == "annealers" and "GANDiscriminator" in annealers.__all__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "style"}, r"arch must be one of \('patch',\), got 'style'"),
        ({"norm": "batch"}, "got 'batch'"),
        ({"block_out_channels": ()}, "at least one level"),
        ({"block_out_channels": (16, 20)}, r"got 8 for \(16, 20\)"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model_of(**options)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 3, 8), (2, 1, 8, 2), (1, 8, 8)])
def test_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\) with H and W >= 4, got"):
        model_of()(torch.zeros(shape))


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(GANDiscriminator.__doc__, {"torch": torch}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
