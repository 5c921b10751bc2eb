"""Properties of PixelCNNModel: its probabilities sum to one, what sees what, and samplers that agree with the law."""

import doctest
import itertools
import math
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

import annealers
from annealers import PixelCNNModel
from annealers.models import pixel_cnn
from annealers.models.masked_convolution import MaskedConv2d
from annealers.models.pixel_cnn import mixture_quantile
from annealers.models.pixel_cnn_trunks import RowLSTMLayer
from annealers.models.pixel_likelihood import DiscretizedMixLogisticLikelihood, levels_to_values

LAYER_TYPES = ("gated", "masked", "row_lstm")
OUTPUTS = ("categorical", "mix_logistic")
EACH = pytest.mark.parametrize(("layer_type", "output"), list(itertools.product(LAYER_TYPES, OUTPUTS)))
EACH_TYPE = pytest.mark.parametrize("layer_type", LAYER_TYPES)
SMALL = {"channels": 12, "num_layers": 3, "kernel_size": 3, "first_kernel_size": 3, "num_mixtures": 2}


def model_of(layer_type="gated", output="categorical", K=3, C=1, size=(3, 3), seed=0, gain=2.0, **options):
    """A model far from a uniform law: near that, wrong ones look almost right."""
    torch.manual_seed(seed)
    options = {**SMALL, "layer_type": layer_type, "output": output, **options}
    model = PixelCNNModel(num_embeddings=K, in_channels=C, sample_size=size, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(gain)
    return model


def all_images(K, C, height, width):
    return torch.tensor(list(itertools.product(range(K), repeat=C * height * width))).view(-1, C, height, width)


def some_images(count, K, C, height, width, seed=0):
    return torch.randint(0, K, (count, C, height, width), generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def conditions(model, count, height, width):
    """Labels and a condition map, if the model has them."""
    arguments = {}
    if model.config.num_class_embeds is not None:
        arguments["class_labels"] = torch.arange(count) % model.config.num_class_embeds
    if model.config.condition_channels is not None:
        shape = (count, model.config.condition_channels, height, width)
        arguments["condition"] = torch.randn(shape, dtype=torch.float64, generator=seeded(5))
    return arguments


def places_of(logits, model):
    """What the network says at each place in order, (places, B, numbers); of a mixture a place is a pixel."""
    if model.likelihood is not None:
        return logits.flatten(2).permute(2, 0, 1)
    return logits.permute(3, 4, 2, 0, 1).flatten(0, 2)


def embedded_places(values, model):
    """Gradients of the embedded codes (B, E, H, W) by place in order, (places, B, numbers)."""
    parts = model.config.in_channels if model.likelihood is None else 1
    return values.unflatten(1, (parts, -1)).permute(3, 4, 1, 0, 2).flatten(0, 2)


def sensitivities(model, images):
    """Largest gradient of what is said of place i in the first image by the code at place j of each, (i, B, j)."""
    seen = []

    def as_leaf(_, inputs):
        seen.append(inputs[0].detach().requires_grad_())
        return seen[-1], inputs[1]

    handle = model.trunk.register_forward_pre_hook(as_leaf)
    logits = model(images).logits
    handle.remove()
    rows = []
    for numbers in places_of(logits, model):
        weights = torch.linspace(-1, 2, numbers.shape[1], dtype=numbers.dtype)
        (gradient,) = torch.autograd.grad((numbers[0] * weights).sum(), seen[0], retain_graph=True)
        rows.append(embedded_places(gradient, model).abs().amax(dim=2).T)
    return torch.stack(rows)


def seen_pixels(model, height, width):
    """Which pixel reaches the law of which, (H, W, H, W), over a few images."""
    reached = 0
    for seed in range(4):
        images = some_images(1, model.config.num_embeddings, 1, height, width, seed)
        reached = reached + sensitivities(model, images)[:, 0]
    return (reached > 0).view(height, width, height, width)


# ---- probabilities --------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize(("K", "C", "size"), [(2, 1, (3, 3)), (3, 1, (2, 3)), (3, 3, (1, 2)), (3, 2, (3, 1))])
def test_the_probabilities_of_all_images_sum_to_one(layer_type, output, K, C, size):
    model = model_of(layer_type, output, K, C, size)
    p = (-model(all_images(K, C, *size)).nll).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    assert p.max() / p.min() > 2  # not a uniform law, of which anything is true


@EACH
def test_the_probabilities_given_a_class_and_a_condition_sum_to_one(layer_type, output):
    model = model_of(layer_type, output, K=2, C=2, size=(2, 2), num_class_embeds=3, condition_channels=2)
    images = all_images(2, 2, 2, 2)
    given = conditions(model, 1, 2, 2)
    given = {name: value.expand(len(images), *value.shape[1:]) for name, value in given.items()}
    assert (-model(images, **given).nll).exp().sum().item() == pytest.approx(1, abs=1e-12)


@EACH_TYPE
def test_training_on_coin_flips_comes_to_their_entropy_and_not_below(layer_type):
    """A network that sees the pixel it predicts has no trouble to get below."""
    model, images = model_of(layer_type, K=2, gain=1.0).train(), all_images(2, 1, 3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        losses.append(model(images).nll.mean())  # of all images, each as likely as the other
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    entropy = 6 * math.log(2)
    assert min(losses) > entropy - 1e-9 and losses[-1] < entropy + 0.02 < losses[0]


# ---- what sees what -------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize(("C", "size"), [(1, (4, 4)), (3, (2, 3))])
@pytest.mark.parametrize("training", [True, False])
def test_a_value_is_told_nothing_of_itself_of_later_ones_or_of_other_images(layer_type, output, C, size, training):
    model = model_of(layer_type, output, C=C, size=size, dropout=0.2).train(training)
    reached = sensitivities(model, some_images(3, 3, C, *size))  # (i, B, j)
    assert not reached[:, 1:].any()
    assert not reached[:, 0].triu().any()


@EACH
def test_changing_a_value_and_all_after_it_changes_nothing_that_was_said_until_there(layer_type, output):
    """From codes to logits, in the order of the channels, on a picture that is not square."""
    C, size = 3, (2, 3)
    model, images = model_of(layer_type, output, C=C, size=size, first_kernel_size=5), some_images(4, 3, C, *size)
    said = places_of(model(images).logits, model)
    per_pixel = 1 if model.likelihood is None else C
    for place in range(0, C * 6, per_pixel):
        sequences = images.permute(0, 2, 3, 1).flatten(1).clone()
        sequences[:, place:] = (sequences[:, place:] + 1) % 3
        changed = sequences.view(4, *size, C).permute(0, 3, 1, 2)
        now, last = places_of(model(changed).logits, model), place // per_pixel
        torch.testing.assert_close(now[: last + 1], said[: last + 1], rtol=0, atol=1e-13)
        assert last == len(said) - 1 or (now[last + 1] - said[last + 1]).abs().max() > 1e-6


def seen_values(layer_type, size):
    """Which value of a coloured image reaches the law of which, in some of a few networks."""
    count = 3 * size[0] * size[1]
    reached = torch.zeros(count, count, dtype=torch.bool)
    for seed in range(4):
        model = model_of(layer_type, C=3, size=size, seed=seed)
        reached |= sensitivities(model, some_images(1, 3, 3, *size, seed))[:, 0] > 0
    return reached


@EACH_TYPE
def test_a_colour_sees_the_colours_before_it_in_the_same_pixel_and_not_itself(layer_type):
    expected = [[False, False, False], [True, False, False], [True, True, False]]
    assert seen_values(layer_type, (1, 1)).tolist() == expected


@EACH_TYPE
def test_all_colours_of_the_pixels_before_reach_every_colour(layer_type):
    assert torch.equal(seen_values(layer_type, (1, 2)), torch.ones(6, 6).tril(-1).bool())


def test_the_gated_network_sees_every_pixel_before():
    H, W = 5, 6
    past = torch.ones(H * W, H * W).tril(-1).bool().view(H, W, H, W)
    assert torch.equal(seen_pixels(model_of(size=(H, W), num_layers=6), H, W), past)


@pytest.mark.parametrize(("layer_type", "layers"), [("masked", 5), ("masked", 9), ("row_lstm", 5)])
def test_masked_and_recurrent_networks_see_a_cone_that_widens_upwards_and_to_its_right_nothing(layer_type, layers):
    """Depth closes it no further: to the right a path moves only as it goes up, one column a row for k = 3."""
    H, W = 5, 5
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    up = rows[:, :, None, None] - rows
    right = columns - columns[:, :, None, None]
    cone = ((up > 0) & (right <= up)) | ((up == 0) & (right < 0))
    assert torch.equal(seen_pixels(model_of(layer_type, size=(H, W), num_layers=layers), H, W), cone)


def test_one_recurrent_layer_sees_up_to_the_first_row():
    """Where two convolutional layers of width 3 end two rows above."""
    H, W = 7, 3
    recurrent = seen_pixels(model_of("row_lstm", size=(H, W), num_layers=2), H, W)[6, 1]
    masked = seen_pixels(model_of("masked", size=(H, W), num_layers=2), H, W)[6, 1]
    assert recurrent[:6].all() and not masked[:4].any() and masked[4:6].all()


@EACH
@pytest.mark.parametrize("training", [True, False])
def test_the_likelihood_of_an_image_is_its_own(layer_type, output, training):
    model, images = model_of(layer_type, output, C=2, num_class_embeds=2).train(training), some_images(3, 3, 2, 3, 3)
    labels = torch.tensor([0, 1, 0])
    alone = torch.cat([model(images[i : i + 1], labels[i : i + 1]).nll for i in range(3)])
    torch.testing.assert_close(model(images, labels).nll, alone, rtol=1e-12, atol=1e-12)


@EACH
def test_there_is_no_normalisation_over_the_batch(layer_type, output):
    model = model_of(layer_type, output, num_class_embeds=2, condition_channels=1)
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


@EACH
def test_a_class_and_every_pixel_of_the_condition_reach_every_pixel_near_them(layer_type, output):
    size = (3, 3)
    model = model_of(layer_type, output, size=size, num_class_embeds=2, condition_channels=2)
    images, given = some_images(2, 3, 1, *size), conditions(model, 2, *size)
    other = {**given, "class_labels": given["class_labels"].flip(0)}
    difference = (model(images, **given).logits - model(images, **other).logits).abs()
    assert (places_of(difference, model).amax(dim=2) > 1e-6).all()

    condition = given["condition"].requires_grad_()
    for place in places_of(model(images, **given).logits, model):
        (gradient,) = torch.autograd.grad(place[0].pow(2).sum(), condition, retain_graph=True)
        assert gradient[1].abs().max() == 0  # of the other image
    assert (gradient[0].abs() > 0)[:, 1:, 1:].all()  # around the last pixel


def test_codes_of_a_codebook_have_no_order():
    """Renamed codes, with the rows of the table renamed too, are the same to the network."""
    model = model_of(K=512, C=1, size=4)
    codes, names = some_images(2, 512, 1, 4, 4), torch.randperm(512, generator=seeded(1))
    embedded = model.embed(codes)
    with torch.no_grad():
        model.embedding.weight.copy_(model.embedding.weight[names.argsort()])
    assert torch.equal(model.embed(names[codes]), embedded)
    assert embedded.shape[1] == SMALL["channels"]  # and no more numbers than there are channels


def test_each_channel_has_a_table_of_its_own_beside_those_of_the_others():
    embedded = model_of(K=3, C=2).embed(torch.ones(1, 2, 1, 1, dtype=torch.long)).flatten()
    table = model_of(K=3, C=2).embedding.weight
    assert torch.equal(embedded, torch.cat([table[1], table[4]])) and not torch.equal(table[1], table[4])


def test_levels_enter_a_mixture_as_numbers_beside_ones_that_the_padding_has_not():
    model = model_of(output="mix_logistic", K=5, C=2)
    codes = some_images(2, 5, 2, 3, 3)
    assert torch.equal(model.embed(codes)[:, :2], (codes - 2) / 2)
    assert torch.equal(model.embed(codes)[:, 2], torch.ones(2, 3, 3))


# ---- the parts, against others' -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "own"), [("A", lambda g, h: h < g), ("B", lambda g, h: h <= g)])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_masked_convolution_is_a_whole_one_whose_kernel_is_zero_ahead(mask, own, groups):
    torch.manual_seed(0)
    layer = MaskedConv2d(4, 8, above=2, side=2, mask=mask, groups=groups, parts=2).double()
    whole = torch.zeros(8, 4, 5, 5, dtype=torch.float64)
    whole[:, :, :3] = layer.conv.weight.detach()
    whole[:, :, 2, 3:] = 0
    for o, i in itertools.product(range(8), range(4)):
        if not own(o % 4 // (4 // groups), i // (4 // groups)):
            whole[o, i, 2, 2] = 0
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv2d(x, whole, layer.conv.bias, padding=2))


def test_a_row_lstm_on_images_one_pixel_wide_is_an_lstm_down_the_rows():
    torch.manual_seed(0)
    layer, oracle = RowLSTMLayer(4, 1, 1, 0.0, conditional=False).double(), nn.LSTM(4, 4).double()
    order = [2, 1, 3, 0]  # torch has i, f, g, o

    def in_its_order(values):
        return torch.cat([values.chunk(4)[part] for part in order])

    with torch.no_grad():
        oracle.weight_ih_l0.copy_(in_its_order(layer.input_to_state.conv.weight[:, :, 0, -1]))
        oracle.weight_hh_l0.copy_(in_its_order(layer.state_to_state.weight[:, :, 1]))
        oracle.bias_ih_l0.copy_(in_its_order(layer.input_to_state.conv.bias))
        oracle.bias_hh_l0.zero_()
    x = torch.randn(2, 4, 6, 1, dtype=torch.float64)
    hidden, _ = oracle(x[..., 0].permute(2, 0, 1))  # (H, B, C)
    expected = x + conv2d(hidden.permute(1, 2, 0)[..., None], layer.out.conv.weight, layer.out.conv.bias)
    torch.testing.assert_close(layer(x, None), expected)


def test_a_gated_layer_is_tanh_times_sigmoid_with_a_residual_except_at_the_image():
    """On one pixel nothing comes from above, and the windows shrink to their last weights."""
    model, x = model_of(size=(1, 1)), torch.randn(1, 12, 1, 1, dtype=torch.float64)
    first, second = model.trunk.layers[:2]
    pre = second.horizontal.conv.weight[:, :, 0, -1] @ x[0, :, 0, 0] + second.horizontal.conv.bias
    gated = pre[:12].tanh() * pre[12:].sigmoid()
    out = second.out.conv.weight[:, :, 0, 0] @ gated + second.out.conv.bias
    _, horizontal, skip = second(x, x, None)
    torch.testing.assert_close(horizontal[0, :, 0, 0], x[0, :, 0, 0] + out[:12])
    torch.testing.assert_close(skip[0, :, 0, 0], out[12:])

    codes = model.embed(some_images(1, 3, 1, 1, 1))
    other = model.embed((some_images(1, 3, 1, 1, 1) + 1) % 3)
    assert torch.equal(first(codes, codes, None)[1], first(other, other, None)[1])


def test_the_vertical_stack_reads_a_row_and_those_above_it_and_the_horizontal_one_is_told_of_the_row_above():
    """On images one pixel wide, of which the windows keep the middle column, and the left one its last weights."""
    layer = model_of(size=(5, 1)).trunk.layers[1]
    v, h = torch.randn(2, 1, 12, 5, 1, dtype=torch.float64, generator=seeded())
    rows = [torch.zeros(12, dtype=torch.float64), *v[0, :, :, 0].T]  # what is above the first row, and the rows
    upper, lower = layer.vertical.weight[:, :, :, 1].unbind(dim=2)
    P = [upper @ rows[r] + lower @ rows[r + 1] + layer.vertical.bias for r in range(5)]
    told = [torch.zeros(24, dtype=torch.float64), *(layer.from_vertical.weight[:, :, 0, 0] @ p for p in P[:-1])]
    left = layer.horizontal.conv
    Q = [left.weight[:, :, 0, -1] @ h[0, :, r, 0] + left.bias + told[r] for r in range(5)]
    G = torch.stack([q[:12].tanh() * q[12:].sigmoid() for q in Q], dim=1)  # (C, H)

    vertical, _, skip = layer(v, h, None)
    torch.testing.assert_close(vertical[0, :, :, 0], torch.stack([p[:12].tanh() * p[12:].sigmoid() for p in P], 1))
    expected = layer.out.conv.weight[12:, :, 0, 0] @ G + layer.out.conv.bias[12:, None]
    torch.testing.assert_close(skip[0, :, :, 0], expected)


# ---- sampling -------------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize(
    ("C", "K", "options"),
    [(1, 2, {}), (3, 4, {"num_class_embeds": 2, "condition_channels": 2}), (2, 3, {"num_class_embeds": 2})],
)
def test_the_sampler_that_keeps_what_it_knows_draws_the_images_of_the_naive_one(layer_type, output, C, K, options):
    size = (5, 4)
    model = model_of(layer_type, output, K, C, size, kernel_size=5, dropout=0.5, **options)
    arguments = {"temperature": 0.9, "top_k": None if output == "mix_logistic" else 2, **conditions(model, 4, *size)}
    cached, naive = (
        model.generate(4, generator=seeded(), use_cache=use_cache, **arguments) for use_cache in (True, False)
    )
    assert cached.shape == (4, C, *size) and cached.dtype == torch.long
    assert torch.equal(cached, naive)
    assert len(cached.unique(dim=0)) == 4 and len(cached.unique()) > 1


@EACH_TYPE
def test_both_samplers_agree_in_single_precision(layer_type):
    torch.manual_seed(0)
    model = PixelCNNModel(2, sample_size=8, channels=8, num_layers=4, layer_type=layer_type)
    cached, naive = (model.generate(8, generator=seeded(), use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, naive)


@EACH
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_probability_with_which_an_image_was_drawn_is_that_of_the_likelihood(
    monkeypatch, layer_type, output, use_cache
):
    model, log_p = model_of(layer_type, output, K=3, C=2, size=(2, 3)), []

    def noted(law, *arguments):
        values = quantile(law, *arguments)
        if output == "categorical":
            log_p.append(law.log_softmax(dim=1).gather(1, values.unsqueeze(1)).squeeze(1))
        else:
            parameters, pixel = arguments[0][..., None, None], values[..., None, None]
            log_p.append(law.log_prob(parameters, levels_to_values(pixel, 3, torch.float64)))
        return values

    name = "categorical_quantile" if output == "categorical" else "mixture_quantile"
    quantile = getattr(pixel_cnn, name)
    monkeypatch.setattr(pixel_cnn, name, noted)
    images = model.generate(5, generator=seeded(), use_cache=use_cache)
    assert len(log_p) == (12 if output == "categorical" else 6)
    torch.testing.assert_close(sum(log_p), -model(images).nll, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("output", OUTPUTS)
def test_images_are_drawn_as_often_as_they_are_likely(output):
    """Each frequency within 4.5 standard errors, of 81 kinds of images."""
    model, n = model_of("masked", output, K=3, C=2, size=(1, 2)), 20_000
    p = (-model(all_images(3, 2, 1, 2)).nll).exp()
    drawn = model.generate(n, generator=seeded()).flatten(1) @ torch.tensor([27, 9, 3, 1])
    deviation = torch.bincount(drawn, minlength=81) - n * p
    assert (deviation.abs() < 4.5 * (n * p * (1 - p)).sqrt() + 1).all()


def test_a_pixel_of_a_mixture_is_drawn_by_the_inverse_of_its_law():
    """One channel and one component: evenly spread numbers give each level its share, to one."""
    likelihood = DiscretizedMixLogisticLikelihood(channels=1, num_levels=7, num_mixtures=1)
    parameters = torch.tensor([[0.3, 0.2, -1.0]], dtype=torch.float64)
    levels = torch.arange(7).view(7, 1, 1, 1)
    p = likelihood.log_prob(parameters.view(1, 3, 1, 1).expand(7, 3, 1, 1), levels_to_values(levels, 7)).exp()
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = mixture_quantile(likelihood, parameters.expand(10_000, 3), u.unsqueeze(1).expand(-1, 2), 1.0)
    assert ((torch.bincount(drawn[:, 0], minlength=7) - 10_000 * p).abs() <= 1).all()


def test_the_temperature_of_a_mixture_widens_its_components_and_evens_their_weights():
    likelihood, T = DiscretizedMixLogisticLikelihood(channels=2, num_levels=256, num_mixtures=3), 1.7
    parameters = torch.randn(500, likelihood.parameter_channels, dtype=torch.float64, generator=seeded())
    u = torch.rand(500, 3, dtype=torch.float64, generator=seeded(1))
    hot = parameters.clone()
    hot[:, :3] /= T
    hot[:, 9:15] += math.log(T)
    assert torch.equal(mixture_quantile(likelihood, parameters, u, T), mixture_quantile(likelihood, hot, u, 1.0))
    assert not torch.equal(mixture_quantile(likelihood, parameters, u, 1.0), mixture_quantile(likelihood, hot, u, 1.0))


@EACH_TYPE
@pytest.mark.parametrize("options", [{"temperature": 1e-4}, {"top_k": 1}])
def test_without_chance_each_value_is_the_likeliest_given_those_before(layer_type, options):
    model = model_of(layer_type, K=4, C=2, size=(3, 3))
    images = model.generate(3, generator=seeded(), **options)
    assert torch.equal(model(images).logits.argmax(dim=1), images)
    assert torch.equal(images, images[:1].expand_as(images))


@EACH
def test_an_image_completed_from_any_of_its_pixels_by_its_own_numbers_is_itself(layer_type, output):
    model = model_of(layer_type, output, K=4, C=2, size=(4, 3), num_class_embeds=2)
    labels = torch.tensor([0, 1, 1, 0])
    image = model.generate(4, class_labels=labels, generator=seeded())
    known = torch.rand(4, 1, 4, 3, generator=seeded(1)) < 0.5
    noise = (image + torch.randint(1, 4, image.shape, generator=seeded(2))) % 4
    prompt = torch.where(known, image, noise)
    for use_cache in (True, False):
        completed = model.generate(
            4, class_labels=labels, generator=seeded(), prompt=prompt, known=known, use_cache=use_cache
        )
        assert torch.equal(completed, image)


@EACH
@pytest.mark.parametrize("use_cache", [True, False])
def test_completion_keeps_what_is_given_and_draws_the_rest_by_it(layer_type, output, use_cache):
    model = model_of(layer_type, output, K=4, C=2, size=(4, 3))
    prompt, upper_half = some_images(40, 4, 2, 4, 3), torch.arange(4).unsqueeze(1).expand(4, 3) < 2
    arguments = {"known": upper_half, "use_cache": use_cache}
    completed = model.generate(40, generator=seeded(), prompt=prompt, **arguments)
    assert torch.equal(completed[:, :, :2], prompt[:, :, :2])
    other = model.generate(40, generator=seeded(), prompt=(prompt + 1) % 4, **arguments)
    assert not torch.equal(other[:, :, 2:], completed[:, :, 2:])
    free = model.generate(40, generator=seeded(), use_cache=use_cache)
    assert not torch.equal(free[:, :, 2:], completed[:, :, 2:])


@pytest.mark.parametrize("output", OUTPUTS)
def test_with_a_list_of_generators_an_image_does_not_depend_on_its_neighbours_or_on_what_they_are_given(output):
    model = model_of(output=output, K=4, C=2, num_class_embeds=3)
    labels, prompt = torch.tensor([0, 1, 2]), some_images(3, 4, 2, 3, 3)
    known = torch.rand(3, 1, 3, 3, generator=seeded(1)) < torch.tensor([0.0, 0.4, 1.0]).view(3, 1, 1, 1)
    together = model.generate(
        3, class_labels=labels, generator=[seeded(i) for i in range(3)], prompt=prompt, known=known
    )
    alone = [
        model.generate(
            1,
            class_labels=labels[i : i + 1],
            generator=[seeded(i)],
            prompt=prompt[i : i + 1],
            known=known[i : i + 1],
        )
        for i in range(3)
    ]
    assert torch.equal(together, torch.cat(alone)) and torch.equal(together[2], prompt[2])


def test_a_generator_reproduces_and_another_does_not():
    model = model_of(size=(5, 5))
    first, again, other = (model.generate(2, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first[0], first[1])


def test_the_sampler_is_that_of_evaluation_and_leaves_the_mode_and_the_graph_alone():
    model = model_of(dropout=0.9, size=(5, 5))
    expected = model.generate(3, generator=seeded())
    drawn = [model.train().generate(3, generator=seeded(), use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(drawn[0], expected) and torch.equal(drawn[1], expected) and model.training
    assert not model.eval().generate(1).requires_grad and not model.training


def test_the_sampler_reports_rows():
    reported = []

    def bar(rows):
        for row in rows:
            reported.append(row)
            yield row

    model_of(size=(4, 2)).generate(1, progress_bar=bar)
    assert reported == [0, 1, 2, 3]


# ---- as a module ----------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize(("size", "shape"), [(6, (6, 6)), ((2, 5), (2, 5))])
def test_images_have_the_size_of_the_model_and_those_of_any_other_have_a_likelihood(layer_type, output, size, shape):
    model = model_of(layer_type, output, C=2, size=size)
    assert model.generate(2).shape == (2, 2, *shape)
    for other in (shape, (1, 1), (7, 3)):
        out = model(some_images(2, 3, 2, *other))
        assert out.nll.shape == (2,) and (out.nll > 0).all()
        channels = (3, 2) if output == "categorical" else (2 * (1 + 2 * 2 + 1),)
        assert out.logits.shape == (2, *channels, *other)
        logits, nll = model(some_images(2, 3, 2, *other), return_dict=False)
        assert torch.equal(nll, out.nll) and torch.equal(logits, out.logits)


def test_the_likelihood_is_that_of_the_logits():
    model, images = model_of(K=5, C=2), some_images(3, 5, 2, 3, 3)
    out = model(images)
    each = torch.distributions.Categorical(logits=out.logits.movedim(1, -1)).log_prob(images)
    torch.testing.assert_close(out.nll, -each.flatten(1).sum(dim=1))


@EACH
@pytest.mark.parametrize("conditional", [True, False])
def test_every_weight_learns(layer_type, output, conditional):
    options = {"num_class_embeds": 2, "condition_channels": 1} if conditional else {}
    model = model_of(layer_type, output, C=2, size=(5, 5), gain=1.0, **options).train()
    model(some_images(4, 3, 2, 5, 5), **conditions(model, 4, 5, 5)).nll.mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []


@pytest.mark.parametrize(("dropout", "differ"), [(0.0, False), (0.5, True)])
@EACH_TYPE
def test_dropout_acts_in_training_alone(layer_type, dropout, differ):
    model, images = model_of(layer_type, dropout=dropout), some_images(3, 3, 1, 3, 3)
    assert torch.equal(model(images).nll, model(images).nll)
    model.train()
    assert torch.equal(model(images).nll, model(images).nll) != differ


@EACH
def test_checkpointed_gradients_are_the_gradients(layer_type, output):
    gradients = []
    for checkpointing in (False, True):
        model = model_of(layer_type, output, num_class_embeds=2).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.trunk.gradient_checkpointing
        model(some_images(3, 3, 1, 3, 3), torch.tensor([0, 1, 1])).nll.sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer_type", "output"), [("gated", "categorical"), ("masked", "mix_logistic"), ("row_lstm", "categorical")]
)
def test_the_forward_pass_compiles_to_one_graph(layer_type, output):
    model = model_of(layer_type, output, C=2, num_layers=2, num_class_embeds=2, condition_channels=1)
    images, given = some_images(3, 3, 2, 3, 3), conditions(model, 3, 3, 3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, **given).nll, model(images, **given).nll, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EACH
def test_half_precision_gives_the_likelihood_of_single_precision_up_to_rounding(layer_type, output, dtype):
    model = model_of(layer_type, output, gain=1.0).float()
    images = some_images(3, 3, 1, 3, 3)
    expected = model(images).nll
    with torch.autocast("cpu", dtype):
        mixed = model(images)
    half = model.to(dtype)(images)
    for out in (mixed, half):
        assert out.nll.dtype == out.logits.dtype == torch.float32
        torch.testing.assert_close(out.nll, expected, rtol=0, atol=0.15)
    assert model.generate(2, generator=seeded()).max() <= 2


@EACH
def test_autocast_leaves_the_last_layer_and_the_sampler_in_single_precision(layer_type, output):
    model = model_of(layer_type, output, C=2).float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(some_images(3, 3, 2, 3, 3)).logits
        cached, naive = (model.generate(2, generator=seeded(), use_cache=use_cache) for use_cache in (True, False))
    assert (logits != logits.bfloat16().float()).any()
    assert cached.max() <= 2 and cached.shape == naive.shape


@EACH_TYPE
def test_storing_the_weights_in_eight_bits_spares_those_that_are_masked(layer_type):
    model = model_of(layer_type, num_class_embeds=2).float()
    labels = torch.tensor([0, 1])
    expected = model.generate(2, labels, generator=seeded())
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert torch.equal(model.generate(2, labels, generator=seeded()), expected)
    with pytest.raises(ValueError, match="does not support group offloading"):
        model.enable_group_offload(torch.device("cpu"))


@EACH
def test_a_saved_model_comes_back_whole(tmp_path, layer_type, output):
    model = model_of(layer_type, output, C=3, num_class_embeds=2, condition_channels=1, dropout=0.1)
    model.save_pretrained(tmp_path)
    loaded = PixelCNNModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    images, given = some_images(2, 3, 3, 3, 3), conditions(model, 2, 3, 3)
    assert torch.equal(loaded(images, **given).nll, model(images, **given).nll)
    assert torch.equal(loaded.generate(2, generator=seeded(), **given), model.generate(2, generator=seeded(), **given))
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in model.config.items() if k[0] != "_"
    }
    assert not [key for key in model.state_dict() if "visible" in key]


def test_building_and_loading_warn_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model_of().save_pretrained(tmp_path)
        PixelCNNModel.from_pretrained(tmp_path)


def test_it_is_named_by_the_package_alone():
    assert PixelCNNModel.__module__ == "annealers" and "PixelCNNModel" in annealers.__all__


def test_the_example_runs():
    example = doctest.DocTestParser().get_doctest(PixelCNNModel.__doc__, {"torch": torch}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"K": 1}, "num_embeddings >= 2, in_channels >= 1 and num_layers >= 1, got 1, 1 and 3"),
        ({"num_layers": 0}, "got 3, 1 and 0"),
        ({"kernel_size": 4}, "must be odd and >= 3, got 4 and 3"),
        ({"first_kernel_size": 1}, "must be odd and >= 3, got 3 and 1"),
        ({"layer_type": "lstm"}, "('gated', 'masked', 'row_lstm'), got 'lstm'"),
        ({"output": "normal"}, "('categorical', 'mix_logistic'), got 'normal'"),
        ({"C": 5}, "channels must be a multiple of in_channels=5, got 12"),
        ({"output": "mix_logistic", "num_mixtures": 0}, "num_mixtures >= 1, got 0"),
    ],
)
def test_networks_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model_of(**options)


def test_a_mixture_knows_nothing_of_groups_of_channels():
    assert model_of(output="mix_logistic", C=5).generate(1).shape == (1, 5, 3, 3)


IMAGES, LABELS = torch.zeros(2, 1, 3, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"sample": IMAGES.float()}, "sample must hold integers 0 .. 2, got torch.float32"),
        ({}, {"sample": IMAGES + 3}, "sample must hold integers 0 .. 2, got 3 .. 3"),
        ({}, {"sample": IMAGES[0]}, "sample must be (B, 1, H, W), got (1, 3, 3)"),
        ({}, {"sample": IMAGES, "class_labels": LABELS}, "the model has no classes"),
        ({"num_class_embeds": 2}, {"sample": IMAGES}, "the model has 2 classes and needs class_labels (2,), got None"),
        ({}, {"sample": IMAGES, "condition": torch.zeros(2, 1, 3, 3)}, "condition must be None, got (2, 1, 3, 3)"),
        ({"condition_channels": 1}, {"sample": IMAGES}, "condition must be (2, 1, 3, 3), got None"),
        (
            {"condition_channels": 1},
            {"sample": IMAGES, "condition": torch.zeros(2, 1, 3, 2)},
            "condition must be (2, 1, 3, 3), got (2, 1, 3, 2)",
        ),
    ],
)
def test_images_and_conditions_that_do_not_fit_are_refused(options, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model_of(**options)(**arguments)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"temperature": 0.0}, "temperature > 0, got 0.0"),
        ({}, {"top_k": 4}, "top_k in 1 .. 3, or None for all, got 4"),
        ({"output": "mix_logistic"}, {"top_k": 2}, "top_k is of categorical models"),
        ({}, {"prompt": IMAGES}, "known is missing"),
        ({"num_class_embeds": 2}, {}, "needs class_labels (2,), got None"),
        ({}, {"generator": [torch.Generator()]}, "one generator for each of 2 samples, got 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model_of(**options).generate(2, **arguments)
