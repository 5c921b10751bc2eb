"""Properties of CodeTransformerModel: it is a law of codes, drawn as it says, or a reading of codes from features."""

import doctest
import itertools
import math
import warnings

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model

import annealers
from annealers import CodeTransformerModel
from annealers.models import code_transformer

TINY = {"num_embeddings": 3, "sample_size": (2, 3), "hidden_size": 16, "num_layers": 2, "num_heads": 2}


def model_of(seed=0, std=0.3, **options):
    """A tiny one in double precision, whose weights are large enough for all to matter."""
    torch.manual_seed(seed)
    model = CodeTransformerModel(**{**TINY, **options}).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def reading_of(**options):
    return model_of(causal=False, feature_channels=5, **options)


def codes_of(model, count=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.num_embeddings, (count, *model.code_shape), generator=generator)


def all_codes(K, shape):
    return torch.tensor(list(itertools.product(range(K), repeat=math.prod(shape)))).view(-1, *shape)


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def in_order(values, model):
    """(B, K, C, h, w) as (B, N, K): rows, columns, channels."""
    return values.permute(0, 3, 4, 2, 1).flatten(1, 3)


# ---- the law --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("K", "shape", "options"),
    [
        (2, (1, 3, 3), {}),
        (3, (1, 2, 3), {"num_class_embeds": 4}),
        (2, (3, 1, 3), {"feature_channels": 2}),
        (2, (2, 2, 2), {"num_layers": 1, "num_heads": 1}),
    ],
)
def test_the_probabilities_of_all_images_sum_to_one(K, shape, options):
    model = model_of(num_embeddings=K, in_channels=shape[0], sample_size=shape[1:], **options)
    codes = all_codes(K, shape)
    labels = torch.full((len(codes),), 2) if model.config.num_class_embeds else None
    channels = model.config.feature_channels
    condition = (
        None if channels is None else torch.randn(1, channels, *shape[1:]).double().expand(len(codes), -1, -1, -1)
    )
    nll = model(codes, labels, condition).nll
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert nll.std() > 0.5  # and are not all the same


def test_nll_is_the_sum_of_the_logits_at_the_codes():
    model = model_of(in_channels=2)
    codes = codes_of(model)
    output = model(codes)
    assert output.logits.shape == (4, 3, 2, 2, 3) and output.logits.dtype == output.nll.dtype == torch.float64
    law = torch.distributions.Categorical(logits=output.logits.movedim(1, -1))
    torch.testing.assert_close(-law.log_prob(codes).flatten(1).sum(1), output.nll)
    assert torch.equal(model(codes.to(torch.uint8)).nll, output.nll)
    logits, nll = model(codes, return_dict=False)
    assert torch.equal(logits, output.logits) and torch.equal(nll, output.nll)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
def test_each_code_hears_all_those_before_it_and_none_after(training, channels):
    model = model_of(in_channels=channels, dropout=0.3 if training else 0.0).train(training)
    embedded = []

    def keep(_, __, output):
        output.retain_grad()
        embedded.append(output)

    model.code_embedding.register_forward_hook(keep)
    torch.manual_seed(3)
    logits = in_order(model(codes_of(model, 2)).logits, model)
    places = logits.shape[1]
    for i in range(places):
        embedded[0].grad = None
        logits[:, i].square().sum().backward(retain_graph=True)
        heard = embedded[0].grad.abs().sum(dim=(0, 2)) > 0  # by the code at each place but the last
        assert heard.tolist() == [j < i for j in range(places - 1)]


def test_the_order_is_by_rows_in_a_row_by_columns_in_a_place_by_channels():
    model = model_of(in_channels=2)
    codes = codes_of(model, 1)
    before = model(codes).logits
    for place in itertools.product(range(2), range(3), range(2)):
        row, column, channel = place
        changed = codes.clone()
        changed[0, channel, row, column] = (codes[0, channel, row, column] + 1) % 3
        differs = (model(changed).logits != before).any(dim=1)[0]  # (C, h, w)
        for other in itertools.product(range(2), range(3), range(2)):
            assert differs[other[2], other[0], other[1]] == (other > place)


def test_every_place_has_a_position_of_its_own():
    """Without positions, the logits after equal codes would depend on their number alone, and after one code on it."""
    model = model_of(in_channels=2)
    nn.init.zeros_(model.code_embedding.weight)
    nn.init.zeros_(model.start.weight)
    for block in model.blocks:
        nn.init.zeros_(block.attention_out.weight)  # so that a place hears no other
    logits = in_order(model(codes_of(model, 1)).logits, model)[0]
    distances = torch.cdist(logits, logits) + torch.eye(len(logits))
    assert distances.min() > 1e-3


def test_no_image_depends_on_its_batch_mates():
    model = model_of(num_class_embeds=3).train()
    codes, labels = codes_of(model), torch.tensor([0, 1, 2, 0])
    together = model(codes, labels).nll
    alone = torch.cat([model(codes[i : i + 1], labels[i : i + 1]).nll for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    assert not any("BatchNorm" in type(module).__name__ for module in model.modules())


def test_labels_matter_and_only_the_own_one():
    model = model_of(num_class_embeds=3)
    codes = codes_of(model, 3)
    losses = torch.stack([model(codes, torch.full((3,), label)).nll for label in range(3)])
    assert (losses[0] - losses[1]).abs().min() > 1e-3 and (losses[1] - losses[2]).abs().min() > 1e-3
    model(codes, torch.ones(3, dtype=torch.long)).nll.sum().backward()
    assert (model.start.weight.grad.abs().sum(1) > 0).tolist() == [False, True, False]


def test_a_condition_is_heard_by_its_own_place_and_those_after_it():
    model = model_of(feature_channels=4, in_channels=2)
    condition = torch.randn(2, 4, 2, 3).double().requires_grad_()
    logits = model(codes_of(model, 2), condition=condition).logits
    for row, column in itertools.product(range(2), range(3)):
        (gradient,) = torch.autograd.grad(logits[..., row, column].square().sum(), condition, retain_graph=True)
        heard = gradient.abs().sum(dim=(0, 1)) > 0
        assert all(heard[other] == (other <= (row, column)) for other in itertools.product(range(2), range(3)))


def test_codes_are_names_and_no_numbers():
    """Renaming the codes, and their embeddings and logits with them, leaves the law as it was."""
    model = model_of()
    codes, renamed = codes_of(model), torch.tensor([2, 0, 1])
    before = model(codes).nll
    back = renamed.argsort()
    with torch.no_grad():
        model.code_embedding.weight.copy_(model.code_embedding.weight[back])
        model.head.weight.copy_(model.head.weight[back])
    torch.testing.assert_close(model(renamed[codes]).nll, before)


def test_the_blocks_are_those_of_gpt_2():
    model = model_of()
    config = GPT2Config(vocab_size=3, n_positions=6, n_embd=16, n_layer=2, n_head=2, use_cache=False)
    gpt2 = GPT2Model(config).double().eval()
    nn.init.zeros_(gpt2.wpe.weight)
    pairs = [(gpt2.ln_f, model.norm_out)]
    for theirs, ours in zip(gpt2.h, model.blocks, strict=True):
        pairs += [(theirs.ln_1, ours.norm_attention), (theirs.ln_2, ours.norm_mlp)]
        pairs += [(theirs.attn.c_attn, ours.queries_keys_values), (theirs.attn.c_proj, ours.attention_out)]
        pairs += [(theirs.mlp.c_fc, ours.mlp_in), (theirs.mlp.c_proj, ours.mlp_out)]
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.weight.copy_(ours.weight.T if ours.weight.ndim == 2 else ours.weight)  # theirs are (in, out)
            theirs.bias.copy_(ours.bias)
    codes = codes_of(model)
    start = model.start.weight.expand(4, 1, -1)
    tokens = torch.cat([start, model.code_embedding(codes.flatten(1)[:, :-1])], dim=1)
    rows = model.row_embedding.weight.repeat_interleave(3, dim=0)
    columns = model.column_embedding.weight.repeat(2, 1)
    hidden = gpt2(inputs_embeds=tokens + rows + columns).last_hidden_state
    expected = hidden @ model.head.weight.T
    torch.testing.assert_close(in_order(model(codes).logits, model), expected, rtol=1e-12, atol=1e-12)


# ---- training -------------------------------------------------------------------------------------------------------


def train(model, batch, steps, learning_rate=0.01):
    """The mean nll of the last steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    generator, last = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        loss = model(batch(generator)).nll.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last.append(loss.item())
    return sum(last[-10:]) / 10


def fresh(**options):
    torch.manual_seed(0)
    return CodeTransformerModel(**{**TINY, "num_embeddings": 2, "sample_size": (2, 4), **options})


def test_coin_flips_cannot_be_foretold():
    nll = train(fresh(), lambda g: torch.randint(2, (128, 1, 2, 4), generator=g), steps=60)
    entropy = 8 * math.log(2)
    assert entropy * 0.99 < nll < entropy * 1.05  # of 1280 images; one of a thousand sees less than 0.98


def test_a_second_row_that_repeats_the_first_is_learnt():
    def batch(generator):
        row = torch.randint(2, (64, 1, 1, 4), generator=generator)
        return torch.cat([row, row], dim=2)

    nll = train(fresh(), batch, steps=150)
    assert 4 * math.log(2) * 0.97 < nll < 4 * math.log(2) * 1.3


def test_an_untrained_model_knows_nothing():
    model = fresh(num_embeddings=512, sample_size=8, hidden_size=64, num_layers=4)
    nll = model(codes_of(model)).nll / 64
    torch.testing.assert_close(nll, torch.full((4,), math.log(512)), rtol=0.01, atol=0)


def test_the_ends_of_residual_branches_begin_smaller_the_deeper_the_network():
    model = fresh(num_layers=8, hidden_size=128)
    for block in model.blocks:
        assert block.mlp_in.weight.std().item() == pytest.approx(0.02, rel=0.03)
        for last in (block.attention_out, block.mlp_out):
            assert last.weight.std().item() == pytest.approx(0.02 / 16**0.5, rel=0.03)
            assert (last.bias == 0).all()


@pytest.mark.parametrize("options", [{"num_class_embeds": 2, "feature_channels": 2, "in_channels": 2}, {}])
def test_every_weight_learns(options):
    model = model_of(**options)
    labels = torch.tensor([0, 1, 0, 1]) if options else None
    condition = torch.randn(4, 2, 2, 3).double() if options else None
    model(codes_of(model), labels, condition).nll.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []
    reading = reading_of()
    reading.forward_features(torch.randn(2, 5, 2, 3).double()).square().sum().backward()
    assert [name for name, p in reading.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_gradient_checkpointing_changes_no_gradient():
    model = model_of().train()
    codes = codes_of(model)
    model(codes).nll.sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.enable_gradient_checkpointing()
    model.zero_grad()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model(codes).nll.sum().backward()
    assert len(calls) == 2  # forward, and again for the gradient
    for p, before in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, before)


def test_weights_may_be_stored_in_eight_bits():
    """Those of the positions are read where they lie, and have to stay what they are."""
    model = model_of(in_channels=3).float()
    codes = codes_of(model)
    expected = model(codes).nll
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[0].mlp_in.weight.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(model(codes).nll, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_dropout_acts_in_training_alone(causal):
    model = model_of(dropout=0.4, causal=causal, feature_channels=None if causal else 5)
    codes, features = codes_of(model), torch.randn(4, 5, 2, 3).double()

    def output():
        return model(codes).nll if causal else model.forward_features(features)

    assert torch.equal(output(), output())
    model.train()
    assert not torch.equal(output(), output())


@pytest.mark.parametrize("place", ["embeddings", "attention weights", "attention", "mlp"])
def test_dropout_acts_in_each_of_its_places(place):
    model = model_of(num_layers=1).train()
    (block,) = model.blocks
    if place == "embeddings":
        model.embedding_dropout.p = 0.4
    elif place == "attention weights":
        block.dropout_share = 0.4
    else:
        block.dropout.p = 0.4
        for silent in (block.mlp_out,) if place == "attention" else (block.attention_out,):
            nn.init.zeros_(silent.weight), nn.init.zeros_(silent.bias)
    codes = codes_of(model)
    assert not torch.equal(model(codes).nll, model(codes).nll)


# ---- drawing --------------------------------------------------------------------------------------------------------

SETTINGS = [
    {},
    {"num_class_embeds": 4},
    {"in_channels": 2, "feature_channels": 3},
    {"sample_size": (3, 2), "num_layers": 3, "num_heads": 4},
]


def arguments_of(model, count):
    arguments = {}
    if model.config.num_class_embeds:
        arguments["class_labels"] = torch.arange(count) % model.config.num_class_embeds
    if model.config.feature_channels:
        arguments["condition"] = torch.randn(count, model.config.feature_channels, *model.code_shape[1:]).double()
    return arguments


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.5, "top_k": 2}])
def test_with_and_without_cache_the_same_codes_are_drawn(options, sampling):
    model = model_of(**options)
    arguments = {**arguments_of(model, 6), **sampling}
    known = torch.tensor([True, False, False, True, False, True]).view(model.code_shape[1:])
    arguments |= {"prompt": codes_of(model, 6), "known": known}
    cached, naive = (model.generate(6, generator=generators(6), use_cache=c, **arguments) for c in (True, False))
    assert torch.equal(cached, naive) and cached.dtype == torch.long and cached.shape == (6, *model.code_shape)
    assert len(cached.unique(dim=0)) > 3


def test_the_cached_sampler_asks_for_one_place_at_a_time():
    model, asked = model_of(), []
    model.blocks[1].register_forward_hook(lambda _, inputs, __: asked.append(inputs[0].shape[1]))
    model.generate(2)
    assert asked == [1] * 6
    asked.clear()
    model.generate(2, use_cache=False)
    assert asked == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("options", SETTINGS)
def test_the_logits_that_codes_are_drawn_from_are_those_of_the_likelihood(options, monkeypatch):
    model, log_prob = model_of(**options), 0
    real = code_transformer.categorical_quantile

    def watched(logits, uniform):
        nonlocal log_prob
        drawn = real(logits, uniform)
        log_prob = log_prob + logits.log_softmax(1).gather(1, drawn[:, None])[:, 0]
        return drawn

    monkeypatch.setattr(code_transformer, "categorical_quantile", watched)
    arguments = arguments_of(model, 5)
    codes = model.generate(5, generator=generators(5), **arguments)
    torch.testing.assert_close(model(codes, **arguments).nll, -log_prob, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 2), (1.0, 1)])
def test_a_code_is_drawn_with_its_probability_sharpened_and_cut(temperature, top_k, monkeypatch):
    """Evenly spaced numbers in the place of random ones leave no noise."""
    model, n = model_of(num_embeddings=4, sample_size=1), 1000
    grid = ((torch.arange(n) + 0.5) / n).double().view(n, 1, 1, 1)
    monkeypatch.setattr(code_transformer, "image_uniforms", lambda *_: grid)
    drawn = model.generate(n, temperature=temperature, top_k=top_k).flatten()
    p = model(torch.zeros(1, 1, 1, 1, dtype=torch.long)).logits.flatten().softmax(0) ** (1 / temperature)
    if top_k is not None:
        p[p.argsort()[: 4 - top_k]] = 0
    counts = torch.bincount(drawn, minlength=4).double() / n
    torch.testing.assert_close(counts, p / p.sum(), rtol=0, atol=1.1 / n)


def test_images_are_drawn_with_their_probabilities(monkeypatch):
    """Again of evenly spaced numbers, in the square of both places; each probability is an area of few corners."""
    model, n = model_of(sample_size=(1, 2)), 60
    line = (torch.arange(n) + 0.5) / n
    grid = torch.cartesian_prod(line, line).double().view(n * n, 1, 1, 2)
    monkeypatch.setattr(code_transformer, "image_uniforms", lambda *_: grid)
    drawn = model.generate(n * n)
    counts = torch.bincount(3 * drawn[:, 0, 0, 0] + drawn[:, 0, 0, 1], minlength=9).double() / n**2
    exact = (-model(all_codes(3, (1, 1, 2))).nll).exp()
    torch.testing.assert_close(counts, exact.detach(), rtol=0, atol=2 / n)
    assert (counts - exact).abs().sum() < 0.05


def test_known_codes_stay_and_those_before_them_are_as_without():
    model = model_of()
    prompt, known = codes_of(model, 8), torch.zeros(2, 3, dtype=torch.bool)
    known[0, 2] = known[1, 1] = True
    free = model.generate(8, generator=generators(8))
    completed = model.generate(8, generator=generators(8), prompt=prompt, known=known)
    assert torch.equal(completed[..., known], prompt[..., known])
    assert torch.equal(completed[..., 0, :2], free[..., 0, :2])
    other = model.generate(8, generator=generators(8), prompt=(prompt + 1) % 3, known=known)
    changed = (completed != other).any(dim=0)[0]
    assert changed[1, 0] or changed[1, 2]  # what comes after hears them


def test_an_image_has_its_own_generator_and_no_batch_mates():
    model = model_of(num_class_embeds=3)
    labels = torch.tensor([0, 1, 2])
    together = model.generate(3, labels, generator=generators(3))
    alone = [model.generate(1, labels[i : i + 1], generator=generators(1, seed=i)) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    one = [model.generate(3, labels, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*one)


def test_progress_is_told_row_by_row():
    told, model = [], model_of(in_channels=2, sample_size=(3, 2))

    def bar(rows):
        for row in rows:
            yield row
            told.append(row)

    codes = model.generate(4, generator=generators(4), progress_bar=bar)
    assert told == [0, 1, 2] and torch.equal(codes, model.generate(4, generator=generators(4)))


def test_drawing_is_without_dropout_and_training_goes_on():
    model = model_of(dropout=0.5)
    expected = model.generate(4, generator=generators(4))
    assert torch.equal(model.train().generate(4, generator=generators(4)), expected)
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError):
        model.generate(4, generator=generators(3))
    assert model.training


def test_drawing_leaves_no_gradient_and_no_trace():
    model = model_of()
    before = model(codes_of(model)).nll
    prompt, known = codes_of(model, 2), torch.ones(2, 3, dtype=torch.bool)
    kept = prompt.clone()
    assert torch.equal(model.generate(2, prompt=prompt, known=known), prompt) and torch.equal(prompt, kept)
    assert not model.generate(2, prompt=prompt, known=~known).requires_grad and torch.equal(prompt, kept)
    assert torch.equal(model(codes_of(model)).nll, before)


# ---- reading codes from features ------------------------------------------------------------------------------------


def test_a_reading_hears_every_place_from_every_place():
    model = reading_of()
    features = torch.randn(2, 5, 2, 3).double().requires_grad_()
    logits = model.forward_features(features)
    assert logits.shape == (2, 3, 2, 3) and logits.dtype == torch.float64
    for row, column in itertools.product(range(2), range(3)):
        (gradient,) = torch.autograd.grad(logits[0, :, row, column].square().sum(), features, retain_graph=True)
        assert (gradient[0].abs().amax(dim=0) > 0).all() and (gradient[1] == 0).all()


def test_a_reading_is_at_the_place_of_its_features():
    """Without attention each place is read on its own, with its own position."""
    model = reading_of()
    for block in model.blocks:
        nn.init.zeros_(block.attention_out.weight)
    features = torch.randn(1, 5, 2, 3).double().requires_grad_()
    logits = model.forward_features(features)
    for row, column in itertools.product(range(2), range(3)):
        (gradient,) = torch.autograd.grad(logits[..., row, column].square().sum(), features, retain_graph=True)
        heard = gradient[0].abs().sum(dim=0) > 0
        assert heard.nonzero().tolist() == [[row, column]]


def test_a_law_and_a_reading_do_not_stand_for_each_other():
    with pytest.raises(ValueError, match="only one with causal=False reads features"):
        model_of().forward_features(torch.zeros(1, 5, 2, 3))
    for call in (lambda: reading_of()(torch.zeros(1, 1, 2, 3).long()), lambda: reading_of().generate(1)):
        with pytest.raises(ValueError, match="this is no law of codes"):
            call()


# ---- what there is to a model of Diffusers --------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_a_saved_model_comes_back_whole_and_without_a_warning(tmp_path, causal):
    options = {"sample_size": 2, "mlp_ratio": 2.0} | ({"num_class_embeds": 3} if causal else {"feature_channels": 5})
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = CodeTransformerModel(**{**TINY, **options}, causal=causal).eval()
        model.save_pretrained(tmp_path)
        loaded = CodeTransformerModel.from_pretrained(tmp_path)
    if causal:
        codes, labels = codes_of(model, 3), torch.tensor([0, 1, 2])
        assert torch.equal(loaded(codes, labels).nll, model(codes, labels).nll)
    else:
        features = torch.randn(2, 5, 2, 2)
        assert torch.equal(loaded.forward_features(features), model.forward_features(features))
    assert all(loaded.config[name] == value for name, value in model.config.items() if name[0] != "_")
    assert CodeTransformerModel.__module__ == "annealers" and "CodeTransformerModel" in annealers.__all__


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_a_likelihood_in_single_precision(dtype):
    model = fresh(num_embeddings=64, num_class_embeds=2).eval()
    codes, labels = codes_of(model), torch.tensor([0, 1, 0, 1])
    expected = model(codes, labels).nll
    output = model.to(dtype)(codes, labels)
    assert output.nll.dtype == output.logits.dtype == torch.float32
    torch.testing.assert_close(output.nll, expected, rtol=1e-3, atol=0)
    assert model.generate(2, torch.tensor([0, 1]), generator=generators(2)).shape == (2, 1, 2, 4)


def test_it_compiles_as_one_graph():
    model = model_of(num_class_embeds=2)
    codes, labels = codes_of(model), torch.tensor([0, 1, 0, 1])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(codes, labels).nll, model(codes, labels).nll)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_embeddings": 1}, "num_embeddings >= 2 .*got 1, 1, 2, 2"),
        ({"in_channels": 0}, "got 3, 0, 2, 2"),
        ({"num_layers": 0}, "got 3, 1, 0, 2"),
        ({"num_heads": 0}, "got 3, 1, 2, 0"),
        ({"num_heads": 3}, "divide hidden_size, got 3 and 16"),
        ({"hidden_size": 0}, "divide hidden_size, got 2 and 0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio > 0, got 0"),
        ({"causal": False}, "got feature_channels=None"),
        ({"causal": False, "feature_channels": 5, "num_class_embeds": 2}, "num_class_embeds=2"),
        ({"causal": False, "feature_channels": 5, "in_channels": 2}, "in_channels=2"),
    ],
)
def test_an_architecture_that_does_not_fit_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CodeTransformerModel(**{**TINY, **options})


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, lambda m: m(torch.zeros(2, 1, 3, 2).long()), r"\(B, 1, 2, 3\), got \(2, 1, 3, 2\)"),
        ({}, lambda m: m(torch.zeros(2, 1, 2, 3)), "integers"),
        ({}, lambda m: m(torch.full((2, 1, 2, 3), 3)), r"0 \.\. 2, got 3 \.\. 3"),
        ({}, lambda m: m(codes_of(m, 2), torch.zeros(2).long()), "has no classes"),
        ({"num_class_embeds": 2}, lambda m: m(codes_of(m, 2)), "needs class_labels"),
        ({"num_class_embeds": 2}, lambda m: m.generate(2), "needs class_labels"),
        ({}, lambda m: m(codes_of(m, 2), condition=torch.zeros(2, 5, 2, 3)), "feature_channels=None got features"),
        ({"feature_channels": 5}, lambda m: m(codes_of(m, 2)), "feature_channels=5 got features None"),
        (
            {"feature_channels": 5},
            lambda m: m.generate(2, condition=torch.zeros(1, 5, 2, 3)),
            r"\(2, 5, 2, 3\), got \(1, 5, 2, 3\)",
        ),
        ({}, lambda m: m.generate(2, temperature=0.0), "temperature > 0, got 0"),
        ({}, lambda m: m.generate(2, top_k=4), r"1 \.\. 3.*got 4"),
        ({}, lambda m: m.generate(2, generator=generators(3)), "for each of 2 samples, got 3"),
        ({}, lambda m: m.generate(2, prompt=codes_of(m, 2)), "known .* is missing"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, call, message):
    with pytest.raises(ValueError, match=message):
        call(model_of(**options))


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(CodeTransformerModel.__doc__, {"torch": torch}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
