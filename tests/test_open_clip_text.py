"""OpenCLIPTextModel and OpenCLIPTokenizer give what open_clip gives, in the pipelines and the folders of Diffusers."""

import doctest
import inspect
import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from open_clip.model import _build_text_tower
from tiny_open_clip import (
    END,
    TEXTS,
    TOWERS,
    WORDS,
    clip_of,
    config_of,
    drawn,
    made_up_tokens,
    open_clip_tokenizer,
    sentence_pieces,
    stable_diffusion,
    tokens_of,
    word_pieces,
    write_local_dir,
)

import annealers
from annealers import OpenCLIPTextModel, OpenCLIPTokenizer, export
from annealers.models.open_clip_text import _options
from annealers.pipelines.text_embeddings import pooled_text

LONGEST = 12
CHILD = Path(__file__).parent / "support" / "load_open_clip.py"
SEES_PADDING = ("SigLIP", "pooled at the first token", "CoCa")


@pytest.fixture(scope="module", params=TOWERS)
def pair(request):
    """A model of open_clip, its text tower as ours, and the name of its kind."""
    config = config_of(request.param)
    clip = clip_of(config)
    return clip, OpenCLIPTextModel.from_clip(clip, config), request.param


def model_of(tower="CLIP", **text_options):
    config = config_of(tower, **text_options)
    return OpenCLIPTextModel.from_clip(clip_of(config), config)


def padded(tokenizer, texts, **options):
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True, **options}
    return tokenizer(texts, return_tensors="pt", **options)


# ---- the tower ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_text_is_embedded_as_open_clip_embeds_it(pair):
    clip, model, _ = pair
    embeds, tokens = model(made_up_tokens()).text_embeds, made_up_tokens()
    torch.testing.assert_close(embeds, clip.encode_text(tokens, normalize=False), rtol=0, atol=1e-6)
    normalised = torch.nn.functional.normalize(embeds, dim=-1)
    torch.testing.assert_close(normalised, clip.encode_text(tokens, normalize=True), rtol=0, atol=1e-6)
    assert embeds.std(dim=0).min() > 0.01 and (embeds.norm(dim=1) - 1).abs().min() > 1e-3  # nothing degenerate


@torch.no_grad()
def test_the_states_of_every_layer_are_those_of_open_clip(pair):
    clip, model, kind = pair
    tower = getattr(clip, "text", model.tower)
    theirs = tower.forward_intermediates(made_up_tokens(), output_fmt="NLC")["text_intermediates"]
    ours = model(made_up_tokens(), output_hidden_states=True).hidden_states
    assert len(ours) == 4 and model(made_up_tokens()).hidden_states is None
    for our, their in zip(ours[1:], theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-6)
    embedded = tower.token_embedding(made_up_tokens()) + tower.positional_embedding[:LONGEST]
    torch.testing.assert_close(ours[0], embedded, rtol=0, atol=1e-6)


@torch.no_grad()
def test_every_token_has_the_last_state_after_the_norm(pair):
    """This is how pipelines make prompts of an earlier layer, for `clip_skip`."""
    _, model, _ = pair
    output = model(made_up_tokens(), output_hidden_states=True)
    normed = model.text_model.final_layer_norm(output.hidden_states[-1])
    torch.testing.assert_close(output.last_hidden_state, normed, rtol=0, atol=1e-6)
    assert output.last_hidden_state.shape == (5, LONGEST, 16)


@torch.no_grad()
def test_the_text_is_pooled_where_the_kind_of_tower_says(pair):
    _, model, kind = pair
    output, tokens = model(made_up_tokens()), made_up_tokens()
    place = {"SigLIP": -1, "pooled at the first token": 0}.get(kind)
    if kind == "CoCa":  # at the token that is appended
        assert not any(torch.equal(output.pooler_output, output.last_hidden_state[:, i]) for i in range(LONGEST))
    elif place is not None:
        assert torch.equal(output.pooler_output, output.last_hidden_state[:, place])
    else:
        ends = (tokens == END).int().argmax(dim=1)  # the first, also where a text spells the end token out
        assert torch.equal(output.pooler_output, output.last_hidden_state[torch.arange(5), ends])
    weight = model.tower.text_projection
    if kind == "no projection":
        projected = output.pooler_output
    elif kind == "SigLIP":
        projected = output.pooler_output @ weight.weight.T + weight.bias
    else:
        projected = output.pooler_output @ weight
    torch.testing.assert_close(output.text_embeds, projected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tower", ["CLIP", "SigLIP"])
def test_a_text_is_embedded_by_itself(tower):
    model = model_of(tower).double()
    together = model(made_up_tokens()).text_embeds
    alone = torch.cat([model(tokens[None]).text_embeds for tokens in made_up_tokens()])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


def test_the_tuple_begins_as_that_of_transformers_and_ends_with_the_layers():
    """StableDiffusionPipeline takes [0] as the states of the tokens, and [-1] as the layers where it asks for them."""
    model, tokens = model_of(), made_up_tokens()
    output, as_tuple = model(tokens, output_hidden_states=True), model(tokens, None, True, return_dict=False)
    assert torch.equal(as_tuple[0], output.last_hidden_state) and len(as_tuple[-1]) == 4
    assert torch.equal(as_tuple[1], output.pooler_output) and torch.equal(as_tuple[2], output.text_embeds)
    assert len(model(tokens, return_dict=False)) == 3
    projected = OpenCLIPTextModel.from_config(model.config, first_output="text_embeds")
    projected.load_state_dict(model.state_dict())
    first, *_, layers = projected(tokens, output_hidden_states=True, return_dict=False)
    assert torch.equal(first, output.text_embeds) and len(layers) == 4
    assert torch.equal(projected(tokens).last_hidden_state, output.last_hidden_state)


def test_a_causal_tower_needs_no_padding_and_one_that_sees_padding_insists_on_it(pair):
    _, model, kind = pair
    tokens = made_up_tokens()[[0, 3]]
    if kind in SEES_PADDING:
        with pytest.raises(ValueError, match=r"sees padding, its texts must be padded to 12 tokens, got 4"):
            model(tokens[:, :4])
        return
    short, whole = model(tokens[:, :4]), model(tokens)
    torch.testing.assert_close(short.text_embeds, whole.text_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(short.last_hidden_state, whole.last_hidden_state[:, :4], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tower", TOWERS)
def test_a_token_outside_of_the_mask_is_not_looked_at(tower):
    model, tokens = model_of(tower).double(), made_up_tokens()
    mask = (tokens != 0).long()
    everything = model(tokens, torch.ones_like(tokens)).text_embeds
    torch.testing.assert_close(everything, model(tokens).text_embeds, rtol=0, atol=1e-12)
    other, shown = tokens.masked_fill(mask == 0, 7), mask.bool()
    before, after = model(tokens, mask), model(other, mask)
    torch.testing.assert_close(before.last_hidden_state[shown], after.last_hidden_state[shown], rtol=0, atol=1e-12)
    if tower != "SigLIP":  # which pools at the last token, seen or not
        torch.testing.assert_close(before.text_embeds, after.text_embeds, rtol=0, atol=1e-12)
    if "no_causal_mask" in TOWERS[tower].get("text_cfg", {}):  # which is not so without the mask
        assert (model(tokens).last_hidden_state[shown] - model(other).last_hidden_state[shown]).abs().max() > 1e-3
    assert model(tokens, torch.zeros_like(tokens)).text_embeds.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "mask", "message"),
    [
        ((2, 13), None, r"\(B, L\) with 1 <= L <= 12, got \(2, 13\)"),
        ((2, 0), None, r"got \(2, 0\)"),
        ((12,), None, r"got \(12,\)"),
        ((2, 12), (2, 11), r"as input_ids, \(2, 12\), got \(2, 11\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape, mask, message):
    with pytest.raises(ValueError, match=message):
        model_of()(torch.zeros(shape, dtype=torch.long), None if mask is None else torch.ones(mask))


# ---- precision and training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "pure_bf16"), (torch.float16, "pure_fp16")])
@torch.no_grad()
def test_half_precision_is_that_of_open_clip(pair, dtype, precision, tmp_path):
    clip, model, kind = pair
    model.save_pretrained(tmp_path)
    loaded = OpenCLIPTextModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.dtype == dtype
    theirs = type(clip)(**{k: v for k, v in config_of(kind).items() if k != "custom_text"}).eval()
    theirs.load_state_dict(clip.state_dict())
    expected = theirs.to(dtype).encode_text(made_up_tokens(), normalize=False)
    assert torch.equal(loaded(made_up_tokens()).text_embeds, expected) and expected.dtype == dtype
    masked = loaded(made_up_tokens(), (made_up_tokens() != 0).long())
    assert masked.text_embeds.dtype == dtype and masked.last_hidden_state.isfinite().all()


def test_every_weight_learns(pair):
    _, model, _ = pair
    model.zero_grad()
    model(made_up_tokens()).text_embeds.square().sum().backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    model.zero_grad(set_to_none=True)
    assert silent == set()


@pytest.mark.parametrize("tower", ["CLIP", "blocks of another kind", "CoCa"])
def test_checkpointing_the_gradient_runs_each_block_twice_and_changes_nothing(tower):
    model, gradients, calls = model_of(tower).train(), [], []
    for block in model.tower.transformer.resblocks:
        block.ln_1.register_forward_hook(lambda *_: calls.append(1))
    for once_more, expected_calls in ((False, 3), (True, 6)):
        if once_more:
            model.enable_gradient_checkpointing()
        model.zero_grad(), calls.clear()
        model(made_up_tokens()).text_embeds.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        assert len(calls) == expected_calls
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    calls.clear()
    with torch.no_grad():
        model(made_up_tokens())
    assert len(calls) == 3


# ---- the models that open_clip knows --------------------------------------------------------------------------------


def test_every_tower_of_open_clips_own_is_built_as_open_clip_builds_it():
    """All the architectures of its list, with one layer instead of many; those of transformers are refused."""
    built, refused = set(), 0
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        config["text_cfg"] |= {"layers": 1, "vocab_size": 10}
        if "hf_model_name" in config["text_cfg"]:
            refused += 1
            with pytest.raises(ValueError, match="of transformers, whose architecture"):
                _options(config)
            continue
        options = _options(config)
        if str(options) in built:
            continue
        built.add(str(options))
        with torch.device("meta"):
            ours = OpenCLIPTextModel(**options).tower
            theirs = _build_text_tower(config["embed_dim"], config["text_cfg"], config.get("quick_gelu", False))
        assert str(ours) == str(theirs), name  # layers, sizes, activations, epsilons
        shapes = [{key: value.shape for key, value in tower.state_dict().items()} for tower in (ours, theirs)]
        assert shapes[0] == shapes[1], name
        for facts in ("pool_type", "eos_id", "pad_id", "heads", "context_length", "num_pos", "use_pad_mask"):
            assert getattr(ours, facts) == getattr(theirs, facts), name
        assert (ours.attn_mask is None) == (theirs.attn_mask is None), name
    assert len(built) > 20 and refused >= 10


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """A config of ours in open_clip's list, as "tiny", and a file of weights."""
    config = config_of("OpenAI's CLIP", **WORDS)
    clip = clip_of(config)
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.add_model_config(tmp_path / "tiny.json")
    torch.save(clip.state_dict(), tmp_path / "weights.pt")
    return clip, str(tmp_path / "weights.pt")


@torch.no_grad()
def test_a_name_and_its_weights_give_the_model_of_open_clip(registered, monkeypatch):
    clip, file = registered
    expected = clip.encode_text(made_up_tokens())
    assert torch.equal(OpenCLIPTextModel.from_open_clip("tiny", file)(made_up_tokens()).text_embeds, expected)

    asked = []
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"a_tag": {"url": "x", "quick_gelu": True}})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *a, **k: asked.append((a, k)) or file)
    by_tag = OpenCLIPTextModel.from_open_clip("tiny", "a_tag", cache_dir="there")
    assert torch.equal(by_tag(made_up_tokens()).text_embeds, expected) and not by_tag.training
    assert asked == [(({"url": "x", "quick_gelu": True},), {"cache_dir": "there"})]

    torch.manual_seed(0)
    random = OpenCLIPTextModel.from_open_clip("tiny", first_output="text_embeds")
    first = random(made_up_tokens(), return_dict=False)[0]
    assert first.shape == expected.shape and not torch.equal(first, expected)
    assert OpenCLIPTokenizer.from_open_clip("tiny").model_max_length == LONGEST


@torch.no_grad()
def test_a_folder_or_a_repository_gives_its_model_and_its_tokenizer(tmp_path, monkeypatch):
    config = config_of("SigLIP", **WORDS, tokenizer_kwargs={"clean": "canonicalize"})
    clip = clip_of(config)
    folder = write_local_dir(tmp_path / "model", config, clip)
    files = {
        "open_clip_config.json": tmp_path / "model" / "open_clip_config.json",
        None: tmp_path / "model" / "open_clip_pytorch_model.bin",
    }
    monkeypatch.setattr(
        open_clip.factory, "download_pretrained_from_hf", lambda _, filename=None, cache_dir=None: files[filename]
    )
    for name in (folder, "hf-hub:someone/something"):
        model, tokenizer = OpenCLIPTextModel.from_open_clip(name), OpenCLIPTokenizer.from_open_clip(name)
        tokens = padded(tokenizer, TEXTS).input_ids
        assert torch.equal(tokens, tokens_of(clean="canonicalize"))
        assert torch.equal(model(tokens).text_embeds, clip.encode_text(tokens))


def test_where_there_should_be_weights_nothing_random_is_taken(tmp_path, registered):
    empty = write_local_dir(tmp_path / "model", config_of())
    with pytest.raises(RuntimeError, match="could not be loaded"):
        OpenCLIPTextModel.from_open_clip(empty)
    with pytest.raises(RuntimeError, match="no_such_tag"):
        OpenCLIPTextModel.from_open_clip("tiny", "no_such_tag")
    with pytest.raises(ValueError, match="brings its own weights, pretrained must be None, got 'a_tag'"):
        OpenCLIPTextModel.from_open_clip(empty, "a_tag")


@pytest.mark.parametrize("made", [OpenCLIPTextModel, OpenCLIPTokenizer])
def test_an_unknown_name_is_refused_and_openais_names_are_known(made, monkeypatch):
    with pytest.raises(ValueError, match="open_clip knows no model 'ViT-Z-9'"):
        made.from_open_clip("ViT-Z/9")
    assert annealers.open_clip_config.open_clip_config("ViT-B/32")[0] == "ViT-B-32"
    assert OpenCLIPTokenizer.from_open_clip("coca_ViT-B-32").model_max_length == 76


def test_a_config_of_another_model_is_noticed():
    clip = clip_of(config_of())
    for other in (config_of(layers=4), config_of(width=32), config_of(context_length=13), config_of("CoCa")):
        with pytest.raises(RuntimeError, match="state_dict"):
            OpenCLIPTextModel.from_clip(clip, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_type": "none"}, r"pool_type must be one of \('argmax', .*\), got 'none'"),
        ({"proj_type": "mlp"}, "proj_type must be one of .*, got 'mlp'"),
        ({"first_output": "pooler_output"}, "first_output must be one of .*, got 'pooler_output'"),
        ({"num_attention_heads": 5}, "must divide hidden_size, got 5 and 512"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OpenCLIPTextModel(**options)


# ---- the tokenizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clean", ["lower", "canonicalize", "whitespace"])
@pytest.mark.parametrize("length", [12, 77])
def test_a_text_has_the_tokens_that_open_clip_gives_it(clean, length):
    """Unicode, emoji, entities, broken encodings, spelt out special tokens, no text at all, and too much of it."""
    tokenizer = OpenCLIPTokenizer(model_max_length=length, clean=clean)
    expected = tokens_of(TEXTS, length, clean)
    tokens = padded(tokenizer, TEXTS)
    assert torch.equal(tokens.input_ids, expected) and tokens.input_ids.dtype == expected.dtype
    ends = [len(open_clip_tokenizer(clean).encode(text)) + 2 for text in TEXTS]
    assert tokens.attention_mask.sum(dim=1).tolist() == [min(end, length) for end in ends]
    assert torch.equal(padded(tokenizer, TEXTS[0]).input_ids, expected[:1])
    assert (expected[4, -1] == 49407) == (length == 12)  # the long text ends with the end token where it is cut


def test_a_text_may_be_padded_to_the_longest_of_its_batch_or_not_at_all():
    tokenizer = OpenCLIPTokenizer(model_max_length=12)
    texts = ["a cat", TEXTS[4]]
    longest = tokenizer(texts, padding="longest", return_tensors="pt").input_ids  # not cut: pipelines ask what is
    assert longest.shape == (2, 15) and longest[1, -1] == 49407
    assert torch.equal(longest[0], torch.tensor([49406, 320, 2368, 49407] + [0] * 11))
    assert tokenizer("a cat").input_ids == [49406, 320, 2368, 49407]
    assert torch.equal(padded(tokenizer, texts, max_length=5).input_ids[1, 3:], torch.tensor([2097, 49407]))


def test_numbers_become_text_again_without_the_padding():
    tokenizer = OpenCLIPTokenizer()
    tokens = padded(tokenizer, TEXTS[:3]).input_ids
    assert tokenizer.batch_decode(tokens)[0] == "<start_of_text>a cat <end_of_text>"
    texts = [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    assert texts == ["a cat", "a cat !! ! wow ! ?!", "café ☕ 😀👩‍👩‍👧 naïve ünïcödé"]
    assert tokenizer.batch_decode(torch.zeros(2, 3, dtype=torch.long)) == ["", ""]
    assert tokenizer.decode([0, 1]) == '!"' and tokenizer.decode(320) == "a "


def test_pieces_are_asked_for_as_those_of_transformers():
    """As the loader of textual inversion does before every prompt."""
    tokenizer = OpenCLIPTokenizer()
    assert tokenizer.tokenize("A cat!") == ["a</w>", "cat</w>", "!</w>"]
    assert tokenizer.convert_tokens_to_ids(["a</w>", "cat</w>"]) == [320, 2368]
    assert tokenizer.added_tokens_encoder == {"<start_of_text>": 49406, "<end_of_text>": 49407}
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab()) == 49408
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 49406, 49407)
    with pytest.raises(ValueError, match=r"vocabulary .* is fixed, got the new tokens \['<dog>'\]"):
        tokenizer.add_tokens(["<dog>"])


@pytest.mark.parametrize(
    ("fast", "options"),
    [
        (word_pieces, {"clean": "lower"}),
        (partial(word_pieces, padding_side="left", truncation_side="left"), {}),
        (word_pieces, {"strip_sep_token": True}),
        (sentence_pieces, {"clean": "canonicalize"}),
    ],
)
def test_a_tokenizer_of_transformers_in_open_clip_is_the_same_here_and_in_one_file(fast, options, tmp_path):
    config = config_of("SigLIP", hf_tokenizer_name="here", tokenizer_kwargs=options, context_length=9)
    name = write_local_dir(tmp_path / "model", config)
    fast().save_pretrained(tmp_path / "model")
    expected = open_clip.get_tokenizer(name)(TEXTS)
    tokenizer = OpenCLIPTokenizer.from_open_clip(name)
    assert torch.equal(padded(tokenizer, TEXTS).input_ids, expected) and expected.shape == (len(TEXTS), 9)

    tokenizer.save_pretrained(tmp_path / "saved")
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert files == {"tokenizer_config.json", "open_clip_vocabulary.json"}
    loaded = OpenCLIPTokenizer.from_pretrained(tmp_path / "saved")
    assert torch.equal(padded(loaded, TEXTS).input_ids, expected)
    loaded.save_pretrained(tmp_path / "saved again")
    again = OpenCLIPTokenizer.from_pretrained(tmp_path / "saved again")
    assert torch.equal(padded(again, TEXTS).input_ids, expected)
    words = padded(again, "a cat", max_length=len(again("a cat").input_ids)).input_ids[0]
    assert again.decode(words, skip_special_tokens=True).strip() == "a cat"
    assert again.decode(words[:-1]).strip() == ("a cat" if fast is sentence_pieces else "[CLS] a cat")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer_kwargs": {"reduction_mask": "random"}}, r"made with \['reduction_mask'\]"),
        ({"tokenizer_mode": "clips", "hf_tokenizer_name": "x"}, "made with clips"),
    ],
)
def test_a_tokenizer_that_does_what_ours_does_not_is_refused(options, message, tmp_path):
    name = write_local_dir(tmp_path / "model", config_of(**options))
    with pytest.raises(ValueError, match=message):
        OpenCLIPTokenizer.from_open_clip(name)


def test_a_vocabulary_file_neither_cuts_nor_fills_up(tmp_path):
    sentence_pieces().backend_tokenizer.save(str(tmp_path / "file.json"))
    tokenizer = OpenCLIPTokenizer(9, "lower", str(tmp_path / "file.json"), [], [1], padding_number=1)
    assert tokenizer("A cat a cat").input_ids == tokenizer.convert_tokens_to_ids(["▁", "a", "▁cat"] * 2) + [1]


def test_settings_of_a_tokenizer_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="clean must be one of .*, got 'upper'"):
        OpenCLIPTokenizer(clean="upper")
    word_pieces().backend_tokenizer.save(str(tmp_path / "file.json"))
    with pytest.raises(ValueError, match="needs prefix_tokens and suffix_tokens"):
        OpenCLIPTokenizer(vocabulary_file=str(tmp_path / "file.json"))


# ---- folders --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_tower_is_the_same_and_loads_without_a_warning(pair, tmp_path):
    _, model, _ = pair
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = OpenCLIPTextModel.from_pretrained(tmp_path)
    assert type(loaded) is OpenCLIPTextModel and not loaded.training
    assert torch.equal(loaded(made_up_tokens()).text_embeds, model(made_up_tokens()).text_embeds)
    arguments = set(inspect.signature(OpenCLIPTextModel.__init__).parameters) - {"self"}
    assert {name for name in json.loads((tmp_path / "config.json").read_text()) if name[0] != "_"} == arguments


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline saved and exported, after a process with empty caches and no network has loaded both."""
    folder = tmp_path_factory.mktemp("pipelines")
    pipeline = stable_diffusion()
    pipeline.save_pretrained(folder / "saved")
    export(pipeline, folder / "exported")
    environment = os.environ | {"HF_HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "cache")}
    environment = {key: value for key, value in environment.items() if not key.startswith("HF_HUB_")}
    environment |= {"HOME": str(folder / "nobody")}
    child = subprocess.run([sys.executable, CHILD, folder], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return folder


@pytest.mark.parametrize("kind", ["saved", "exported"])
@torch.no_grad()
def test_a_fresh_process_without_caches_gives_bitwise_the_same(folders, kind):
    results, pipeline = torch.load(folders / f"{kind}.pt"), stable_diffusion()
    assert torch.equal(results["tokens"], tokens_of())
    assert torch.equal(results["text_embeds"], pipeline.text_encoder(tokens_of()).text_embeds)
    assert torch.equal(results["images"], drawn(pipeline))


def test_that_process_had_our_classes_by_import_or_by_their_code_and_cached_nothing(folders):
    report = json.loads((folders / "report.json").read_text())
    assert report == {"annealers": [], "ours": [True, True], "cached": []}
    assert not (folders / "nobody").exists() and not (folders / "cache").exists()
    index = json.loads((folders / "saved" / "model_index.json").read_text())
    assert index["text_encoder"] == ["annealers", "OpenCLIPTextModel"]
    assert index["tokenizer"] == ["annealers", "OpenCLIPTokenizer"]


# ---- pipelines ------------------------------------------------------------------------------------------------------


def test_a_prompt_makes_a_difference_and_so_does_an_earlier_layer():
    pipeline = stable_diffusion()
    image = drawn(pipeline)
    assert torch.equal(image, drawn(pipeline))
    assert not torch.equal(image, drawn(pipeline, "a dog"))
    assert not torch.equal(image, drawn(pipeline, negative_prompt="a dog"))
    assert not torch.equal(image, drawn(pipeline, clip_skip=1))
    assert torch.equal(image, drawn(pipeline, clip_skip=0))  # the last layer


@torch.no_grad()
def test_skipping_a_layer_gives_the_normed_penultimate_states():
    pipeline = stable_diffusion()
    prompts, _ = pipeline.encode_prompt("a cat", "cpu", 1, False, clip_skip=1)
    model, tokens = pipeline.text_encoder, tokens_of(["a cat"])
    expected = model.tower.ln_final(model(tokens, output_hidden_states=True).hidden_states[-2])
    assert torch.equal(prompts, expected)


def test_the_pipeline_says_what_it_cuts_off(caplog):
    from diffusers.utils import logging

    logging.enable_propagation()
    try:
        drawn(stable_diffusion(), TEXTS[4])
    finally:
        logging.disable_propagation()
    assert any("handle sequences up to 12 tokens: ['eleven twelve thirteen ']" in text for text in caplog.messages)


@torch.no_grad()
def test_it_is_the_second_encoder_of_stable_diffusion_xl():
    """Whose second encoder is a tower of open_clip, read by its projection and its penultimate layer."""
    config = config_of(**WORDS)
    encoder = OpenCLIPTextModel.from_clip(clip_of(config), config, first_output="text_embeds")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 4 * 6,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).eval(),
        text_encoder=None,
        text_encoder_2=encoder,
        tokenizer=None,
        tokenizer_2=OpenCLIPTokenizer(model_max_length=12),
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False),
        add_watermarker=False,
    )
    states, _, pooled, _ = pipeline.encode_prompt("a cat", do_classifier_free_guidance=False)
    output = encoder(tokens_of(["a cat"]), output_hidden_states=True)
    assert torch.equal(pooled, output.text_embeds) and torch.equal(states, output.hidden_states[-2])
    assert drawn(pipeline, "a cat", height=8, width=8).isfinite().all()


@torch.no_grad()
def test_a_conditional_generator_takes_its_pooled_text():
    config = config_of(**WORDS)
    clip = clip_of(config)
    embeds = pooled_text(OpenCLIPTokenizer(model_max_length=12), OpenCLIPTextModel.from_clip(clip, config), TEXTS[:2])
    torch.testing.assert_close(embeds, clip.encode_text(tokens_of(TEXTS[:2])), rtol=0, atol=1e-6)


# ---- the package ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [OpenCLIPTextModel, OpenCLIPTokenizer])
def test_it_is_named_by_the_package_alone(made):
    assert made.__module__ == "annealers" and made.__name__ in annealers.__all__


@pytest.mark.parametrize("made", [OpenCLIPTextModel, OpenCLIPTokenizer])
def test_the_example_in_the_docstring_runs(made):
    example = doctest.DocTestParser().get_doctest(made.__doc__, {"torch": torch}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
