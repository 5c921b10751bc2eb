"""Properties of what autoregressive models share: how values are drawn, whose random numbers they are, completion."""

import re

import pytest
import torch

from annealers import CodeTransformerModel, PixelCNNModel
from annealers.models.autoregressive import (
    categorical_quantile,
    check_class_labels,
    check_codes,
    check_network,
    check_sampling,
    given_pixels,
    image_uniforms,
    sharpened,
)

CPU = torch.device("cpu")


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---- drawing --------------------------------------------------------------------------------------------------------


def test_evenly_spread_numbers_give_each_value_its_share():
    p = torch.tensor([0.1, 0.25, 0.0, 0.4, 0.25, 0.0], dtype=torch.float64)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = categorical_quantile(p.log().expand(1000, 6), u)
    assert torch.equal(torch.bincount(drawn, minlength=6), (1000 * p).round().long())
    assert torch.equal(drawn, drawn.sort().values)  # the quantile function does not decrease


def test_a_number_at_the_edge_of_two_values_gives_the_upper_one_that_has_a_chance():
    assert categorical_quantile(torch.tensor([[0.0, -torch.inf, 0.0]]), torch.tensor([0.5])).item() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_unit_interval_never_give_a_value_of_probability_zero(dtype):
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    logits = 3 * torch.randn(400, 9, dtype=dtype, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 4, 8]] = -torch.inf
    for u in (tiny, 1 - eps / 2):
        drawn = categorical_quantile(logits, torch.full((400,), u, dtype=dtype))
        assert torch.equal(drawn, torch.full((400,), 1 if u < 0.5 else 7))


def test_numbers_of_another_precision_than_the_logits_are_no_obstacle():
    logits = torch.zeros(3, 4, dtype=torch.float16)
    u = torch.tensor([0.1, 0.6, 0.99], dtype=torch.float64)
    assert categorical_quantile(sharpened(logits), u).tolist() == [0, 2, 3]


def test_a_number_next_to_one_is_not_rounded_to_it_and_half_a_precision_of_many_values_is_enough():
    almost = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert categorical_quantile(torch.zeros(1, 4), almost).item() == 3
    u = torch.tensor([1e-6, 0.5, 0.9999])
    assert categorical_quantile(torch.zeros(3, 300, dtype=torch.bfloat16), u).tolist() == [0, 150, 299]


def test_sums_that_are_not_in_order_to_the_last_digit_draw_nothing_of_probability_zero(monkeypatch):
    """As they may be where many are added in parallel: here the sums at values without a chance are too large."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(40, 5)
    excess = torch.tensor([0.1, 0.0, 0.1, 0.0, 0.1])
    cumsum = torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda p, dim: cumsum(p, dim) + excess)
    drawn = categorical_quantile(logits, (torch.arange(40) + 0.5) / 40)
    assert drawn.tolist() == [1] * 20 + [3] * 20


@pytest.mark.parametrize("row", [[0.0, torch.nan], [0.0, torch.inf], [-torch.inf, -torch.inf]])
def test_logits_without_probabilities_are_refused_and_not_drawn_from(row):
    with pytest.raises(ValueError, match="no probabilities: its logits are NaN, inf, or all -inf"):
        categorical_quantile(torch.tensor([[1.0, 2.0], row]), torch.tensor([0.5, 0.5]))


def test_temperature_raises_probabilities_to_its_inverse():
    p = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    sharp = sharpened(p.log() + 7, temperature=0.5).softmax(dim=1)
    torch.testing.assert_close(sharp, p**2 / (p**2).sum())


def test_the_likeliest_values_keep_their_ratios_and_the_others_have_no_chance():
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0], [9.0, 0.0, 8.0, 7.0]])
    p, cut = logits.softmax(dim=1), sharpened(logits, top_k=2).softmax(dim=1)
    kept = torch.tensor([[False, True, False, True], [True, False, True, False]])
    assert torch.equal(cut > 0, kept)
    kept_p = p[kept].view(2, 2)
    torch.testing.assert_close(cut[kept].view(2, 2), kept_p / kept_p.sum(dim=1, keepdim=True))


def test_one_likeliest_value_is_the_argmax_and_all_of_them_are_no_cut():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    u = torch.rand(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(categorical_quantile(sharpened(logits, top_k=1), u), logits.argmax(dim=1))
    assert torch.equal(sharpened(logits, top_k=7), logits)


def test_half_precision_logits_are_compared_in_single_precision():
    assert sharpened(torch.zeros(1, 2, dtype=torch.bfloat16), temperature=3.0).dtype == torch.float32


# ---- random numbers -------------------------------------------------------------------------------------------------


def test_with_a_list_of_generators_the_numbers_of_an_image_are_its_own():
    together = image_uniforms(3, (2, 4, 5), generators(1, 2, 3), CPU, torch.float32)
    alone = image_uniforms(1, (2, 4, 5), generators(2), CPU, torch.float32)
    assert together.shape == (3, 2, 4, 5) and torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])


def test_numbers_are_inside_the_unit_interval_and_in_at_least_single_precision():
    u = image_uniforms(50, (1, 20, 20), torch.Generator().manual_seed(0), CPU, torch.bfloat16)
    assert u.dtype == torch.float32 and u.min() > 0 and u.max() < 1
    assert image_uniforms(1, (1,), None, CPU, torch.float64).dtype == torch.float64


def test_a_list_of_generators_has_one_for_each_image():
    with pytest.raises(ValueError, match="one generator for each of 3 samples, got 2"):
        image_uniforms(3, (1, 2, 2), generators(1, 2), CPU, torch.float32)


# ---- completion -----------------------------------------------------------------------------------------------------


def test_nothing_given_is_codes_of_zero_none_of_them_known():
    codes, known = given_pixels(None, None, 2, (3, 4, 5), 7, CPU)
    assert codes.shape == (2, 3, 4, 5) and codes.dtype == torch.long and not codes.any()
    assert known.shape == (2, 1, 4, 5) and known.dtype == torch.bool and not known.any()


@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (1, 1, 3, 4), (3, 4)])
def test_given_pixels_are_kept_and_the_others_forgotten(shape):
    prompt = torch.randint(1, 6, (2, 3, 3, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    codes, known = given_pixels(prompt.int(), mask, 2, (3, 3, 4), 6, CPU)
    assert torch.equal(known, mask.expand(2, 1, 3, 4)) and codes.dtype == torch.long
    assert torch.equal(codes, prompt * known)


def test_what_stands_at_pixels_that_are_not_given_is_not_even_checked():
    prompt = torch.tensor([[[[1, 99]]]])
    assert given_pixels(prompt, torch.tensor([[True, False]]), 1, (1, 1, 2), 2, CPU)[0].tolist() == [[[[1, 0]]]]


PROMPT, MASK = torch.zeros(2, 1, 3, 3, dtype=torch.long), torch.ones(3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("prompt", "known", "message"),
    [
        (PROMPT, None, "known is missing"),
        (None, MASK, "prompt is missing"),
        (PROMPT[:1], MASK, "prompt must be (2, 1, 3, 3), got (1, 1, 3, 3)"),
        (PROMPT, MASK.long(), "known must be a bool mask"),
        (PROMPT, MASK[:2], "(3, 3)], got torch.bool torch.Size([2, 3])"),
        (PROMPT + 4, MASK, "prompt must hold integers 0 .. 3, got 4 .. 4"),
        (PROMPT.float(), MASK, "prompt must hold integers 0 .. 3, got torch.float32"),
    ],
)
def test_what_cannot_be_completed_is_refused(prompt, known, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        given_pixels(prompt, known, 2, (1, 3, 3), 4, CPU)


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, 3, 3, dtype=torch.long), "sample must be (B, 1, H, W), got (2, 3, 3)"),
        (torch.zeros(2, 2, 3, 3, dtype=torch.long), "sample must be (B, 1, H, W), got (2, 2, 3, 3)"),
        (torch.zeros(2, 1, 3, 3), "sample must hold integers 0 .. 4, got torch.float32"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.bool), "sample must hold integers 0 .. 4, got torch.bool"),
        (torch.arange(9).view(1, 1, 3, 3) - 1, "sample must hold integers 0 .. 4, got -1 .. 7"),
        (torch.full((1, 1, 1, 1), 5), "sample must hold integers 0 .. 4, got 5 .. 5"),
    ],
)
def test_what_is_no_image_of_codes_is_refused(codes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_codes(codes, num_embeddings=5, channels=1)


def test_codes_at_both_ends_and_of_any_integer_type_are_taken():
    for dtype in (torch.uint8, torch.int32, torch.long):
        check_codes(torch.tensor([[[[0, 4]]]], dtype=dtype), num_embeddings=5, channels=1)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (torch.tensor([0, 1]), None, "the model has no classes (num_class_embeds=None)"),
        (None, 3, "the model has 3 classes and needs class_labels (2,), got None"),
        (torch.tensor([0]), 3, "class_labels must be (2,), got (1,)"),
        ([0, 1], 3, "class_labels must be a tensor of integers (2,), got list"),
        (torch.tensor([0.0, 1.0]), 3, "class_labels must be a tensor of integers (2,), got torch.float32"),
        (torch.tensor([0, 3]), 3, "class_labels must be 0 .. 2, got 0 .. 3"),
        (torch.tensor([-1, 0]), 3, "class_labels must be 0 .. 2, got -1 .. 0"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, classes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_class_labels(labels, classes, batch_size=2)


def test_labels_that_fit_are_taken():
    check_class_labels(None, None, 2)
    check_class_labels(torch.tensor([0, 2]), 3, 2)


def test_the_values_of_labels_on_a_device_are_not_waited_for():
    check_class_labels(torch.zeros(2, dtype=torch.long, device="meta"), 3, 2)  # there are none to be had


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_class_embeds": 0}, "num_class_embeds >= 1, or None for no classes, got 0"),
        ({"sample_size": 0}, "sample_size must be a positive number or (height, width), got 0"),
        ({"sample_size": (4, 0)}, "got (4, 0)"),
        ({"sample_size": (1, 4, 4)}, "got (1, 4, 4)"),
        ({"dropout": 1.0}, "dropout must lie in [0, 1), got 1.0"),
        ({"dropout": -0.1}, "got -0.1"),
    ],
)
def test_a_network_that_cannot_be_is_refused(options, message):
    check_network(1, [4, 1], 0.9)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_network(**{"num_class_embeds": None, "sample_size": 4, "dropout": 0.0, **options})


@pytest.mark.parametrize("model", [PixelCNNModel, CodeTransformerModel])
def test_models_check_their_options_and_take_labels_of_any_integer_type(model):
    for name, value in {"num_class_embeds": 0, "sample_size": 0, "dropout": 1.0}.items():
        with pytest.raises(ValueError, match=f"{name}.*{value}"):
            model(**{"num_embeddings": 4, "sample_size": 2, name: value})
    network = model(num_embeddings=4, sample_size=2, num_layers=2, num_class_embeds=3)
    codes, labels = torch.zeros(2, 1, 2, 2, dtype=torch.long), torch.tensor([0, 2])
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(network(codes, labels.to(dtype)).nll, network(codes, labels).nll)
    assert model(num_embeddings=4, sample_size=2, num_layers=2).double()(codes).nll.dtype == torch.float64


def test_a_condition_has_channels():
    with pytest.raises(ValueError, match="condition_channels >= 1, or None for no condition, got 0"):
        PixelCNNModel(4, sample_size=2, condition_channels=0)
    with pytest.raises(ValueError, match="feature_channels >= 1, or None for no features, got 0"):
        CodeTransformerModel(4, sample_size=2, feature_channels=0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_is_positive_and_finite(temperature):
    with pytest.raises(ValueError, match="temperature > 0, got"):
        check_sampling(temperature, None, 5)


@pytest.mark.parametrize("top_k", [0, -2, 6])
def test_as_many_values_are_cut_to_as_there_are(top_k):
    check_sampling(0.1, 1, 5), check_sampling(9.0, 5, 5)
    with pytest.raises(ValueError, match=f"top_k in 1 .. 5, or None for all, got {top_k}"):
        check_sampling(1.0, top_k, 5)
