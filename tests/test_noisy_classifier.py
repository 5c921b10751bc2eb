"""Properties of NoisyClassifierModel: shapes, the gradient of its input, precision, and what a folder gives back."""

import doctest
import warnings

import pytest
import torch
from torch.nn.functional import cross_entropy

import annealers
from annealers import NoisyClassifierModel

SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}


def model_of(seed=0, **options):
    torch.manual_seed(seed)
    return NoisyClassifierModel(**{"sample_size": 8, "in_channels": 1, "num_classes": 3, **SMALL, **options}).eval()


def noisy_images(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("pooling", ["attention", "average"])
@pytest.mark.parametrize(
    ("size", "channels", "levels"), [((8, 8), 1, 2), ((28, 28), 1, 3), ((7, 12), 3, 2), ((1, 1), 2, 1)]
)
def test_images_of_any_size_get_one_row_of_logits_each(pooling, size, channels, levels):
    blocks = {"block_out_channels": (8, 16, 16)[:levels], "down_block_types": ("DownBlock2D",) * levels}
    model = model_of(sample_size=size, in_channels=channels, pooling=pooling, num_classes=5, **blocks)
    logits = model(noisy_images(2, channels, *size), torch.tensor([0, 999])).logits
    assert logits.shape == (2, 5) and logits.isfinite().all()
    assert torch.equal(logits, model(noisy_images(2, channels, *size), torch.tensor([0, 999]), return_dict=False)[0])


def test_one_timestep_stands_for_the_batch_and_a_flow_has_fractions_of_one():
    model, x = model_of(), noisy_images(3, 1, 8, 8)
    by_number, by_scalar, by_row = (
        model(x, t).logits for t in (400, torch.tensor(400), torch.tensor([400, 400, 400]))
    )
    assert torch.equal(by_number, by_scalar) and torch.equal(by_scalar, by_row)
    assert (model(x, 400.5).logits != by_number).any() and (model(x, 401).logits != model(x, 400.5).logits).any()


@pytest.mark.parametrize("pooling", ["attention", "average"])
def test_an_image_is_classified_by_itself_and_at_its_own_timestep(pooling):
    model, x, t = model_of(pooling=pooling).double(), noisy_images(3, 1, 8, 8).double(), torch.tensor([0, 500, 999])
    together = model(x, t).logits
    alone = torch.cat([model(x[i : i + 1], t[i]).logits for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pooling", ["attention", "average"])
def test_the_gradient_with_respect_to_the_image_is_exact_in_double_precision(pooling):
    model = model_of(pooling=pooling).double()
    x = noisy_images(2, 1, 8, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x, torch.tensor([3, 700])).logits.log_softmax(1), (x,))


def test_every_weight_learns():
    model = model_of().train()
    logits = model(noisy_images(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])).logits
    cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert [name for name in silent if not name.endswith("to_k.bias")] == []  # softmax ignores a shift of all keys


def test_every_level_of_the_default_network_hears_the_timestep():
    """Normalisation by itself of each channel would take away what the embedding has added to it."""
    model = NoisyClassifierModel(8, 1, 3).eval()
    x, first = noisy_images(2, 1, 8, 8), []
    model.down_blocks[0].resnets[0].register_forward_hook(lambda _, __, output: first.append(output))
    model(x, 0), model(x, 999)
    assert (first[0] - first[1]).abs().max() > 0.01


@pytest.mark.parametrize(("dropout", "differ"), [(0.0, False), (0.5, True)])
def test_dropout_acts_in_training_alone(dropout, differ):
    model, x = model_of(dropout=dropout), noisy_images(4, 1, 8, 8)
    assert torch.equal(model(x, 10).logits, model(x, 10).logits)
    model.train()
    assert torch.equal(model(x, 10).logits, model(x, 10).logits) != differ


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_logits_of_single_precision_up_to_rounding(dtype):
    model, x, t = model_of(), noisy_images(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    expected = model(x, t).logits
    logits = model.to(dtype)(x.to(dtype), t).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.03)


def test_a_saved_classifier_comes_back_whole(tmp_path):
    model = model_of(id2label={0: "cat", 1: "dog", 2: "emu"}, pooling="average", dropout=0.1)
    model.save_pretrained(tmp_path)
    loaded = NoisyClassifierModel.from_pretrained(tmp_path)
    x, t = noisy_images(2, 1, 8, 8), torch.tensor([0, 999])
    assert torch.equal(loaded(x, t).logits, model(x, t).logits)
    assert loaded.id2label == model.id2label == {0: "cat", 1: "dog", 2: "emu"} and model_of().id2label is None
    names = ("num_classes", "pooling", "dropout", "sample_size", "norm_num_groups")
    assert [loaded.config[name] for name in names] == [model.config[name] for name in names]


def test_it_is_named_by_the_package_alone():
    assert NoisyClassifierModel.__module__ == "annealers" and "NoisyClassifierModel" in annealers.__all__


def test_building_and_loading_warn_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model_of().save_pretrained(tmp_path)
        NoisyClassifierModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes >= 2, got 1"),
        ({"down_block_types": ("DownBlock2D",)}, r"got \('DownBlock2D',\) for \(8, 16\)"),
        ({"block_out_channels": (), "down_block_types": ()}, "at least one"),
        ({"pooling": "max"}, "('attention', 'average'), got 'max'"),
        ({"attention_head_dim": 0}, "attention_head_dim >= 1, got 1 and 0"),
        ({"layers_per_block": 0}, "layers_per_block and attention_head_dim >= 1, got 0 and 4"),
        ({"attention_head_dim": 5}, r"\[16, 16\], got 5"),
        ({"attention_head_dim": 16, "down_block_types": ("AttnDownBlock2D",) * 2}, r"\[8, 16, 16\], got 16"),
        ({"id2label": {3: "fox"}}, r"id2label names \[3\], but there are 3 classes"),
        ({"id2label": {"-1": "fox"}}, r"id2label names \[-1\]"),
    ],
)
def test_an_architecture_that_does_not_fit_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=message.replace("('attention', 'average')", r"\('attention', 'average'\)")):
        model_of(**options)


@pytest.mark.parametrize(
    ("shape", "timestep", "message"),
    [
        ((2, 3, 8, 8), 0, r"\(B, 1, H, W\), got \(2, 3, 8, 8\)"),
        ((2, 8, 8), 0, r"\(B, 1, H, W\), got \(2, 8, 8\)"),
        ((2, 1, 8, 8), torch.tensor([1, 2, 3]), "one per sample, 2, got 3"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape, timestep, message):
    with pytest.raises(ValueError, match=message):
        model_of()(noisy_images(*shape), timestep)


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(NoisyClassifierModel.__doc__, {"torch": torch}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
