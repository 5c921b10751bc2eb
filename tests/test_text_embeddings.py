"""Properties of the embedding of a prompt: whose it is, and what happens to a prompt that is too long."""

import doctest
import warnings

import open_clip
import pytest
import torch
from tiny_pipelines import text_config, tokenizer
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from annealers import OpenCLIPTextModel, OpenCLIPTokenizer
from annealers.pipelines.text_embeddings import pooled_text

PROMPTS = ["a dog", "the cat of my aunt", "a dog"]


def encoder_of(kind=CLIPTextModel, **options):
    torch.manual_seed(0)
    return kind(text_config(), **options).eval()


def ids_of(prompts):
    """Start, letters and end, then ends up to the 77 tokens of CLIP."""
    letters = {letter: 2 * i + 2 for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    rows = []
    for prompt in prompts:
        ids = [letters[letter] + (i == len(word) - 1) for word in prompt.split() for i, letter in enumerate(word)]
        rows.append([0, *ids, *[1] * (76 - len(ids))])
    return torch.tensor(rows)


def test_a_prompt_is_what_the_encoder_pools_of_its_tokens():
    encoder = encoder_of()
    pooled = pooled_text(tokenizer(), encoder, PROMPTS)
    assert torch.equal(pooled, encoder(ids_of(PROMPTS)).pooler_output) and not pooled.requires_grad
    assert torch.equal(pooled[0], pooled[2]) and not torch.allclose(pooled[0], pooled[1], atol=1e-3)


def test_of_an_encoder_that_projects_it_is_the_projection():
    encoder = encoder_of(CLIPTextModelWithProjection)
    torch.nn.init.normal_(encoder.text_projection.weight)
    pooled = pooled_text(tokenizer(), encoder, PROMPTS)
    output = encoder(ids_of(PROMPTS))
    assert torch.equal(pooled, output.text_embeds)
    assert torch.equal(pooled, encoder.text_projection(encoder.text_model(ids_of(PROMPTS)).pooler_output))


def test_a_tower_of_open_clip_does_as_well():
    torch.manual_seed(0)
    encoder = OpenCLIPTextModel(projection_dim=6, hidden_size=16, num_attention_heads=2, num_hidden_layers=1).eval()
    pooled = pooled_text(OpenCLIPTokenizer(), encoder, PROMPTS)
    ids = open_clip.tokenize(PROMPTS)
    assert torch.equal(pooled, encoder(ids).text_embeds) and pooled.shape == (3, 6)


@pytest.mark.parametrize("masked", [False, True])
def test_the_mask_of_the_padding_is_for_an_encoder_that_uses_it(masked):
    encoder, seen = encoder_of(), []
    encoder.config.use_attention_mask = masked
    encoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    pooled_text(tokenizer(), encoder, PROMPTS)
    if masked:
        assert seen[0].sum(dim=1).tolist() == [6, 16, 6]
    else:
        assert seen == [None]


def test_what_is_cut_off_a_long_prompt_is_said_once_and_the_rest_is_read():
    long = " ".join(["ab"] * 37 + ["xy", "z"])  # 74 + 3 letters, of which 75 have a place
    encoder = encoder_of()
    with pytest.warns(UserWarning, match="a prompt has 79 tokens, 77 are read; cut off: 'y z'") as caught:
        pooled = pooled_text(tokenizer(), encoder, [long, "a dog", long])
    assert len(caught) == 1 and caught[0].filename == __file__
    kept = ids_of([" ".join(["ab"] * 37)])
    kept[0, 75] = 2 * 23 + 2  # an x that ends no word
    assert torch.equal(pooled[[0, 2]], encoder(torch.cat([kept, ids_of(["a"]), kept])).pooler_output[[0, 2]])


def test_a_prompt_that_fits_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pooled_text(tokenizer(), encoder_of(), ["a" * 75, ""])


@pytest.mark.parametrize("prompts", ["a dog", [], ["a dog", 3], None])
def test_prompts_are_a_list_of_texts(prompts):
    with pytest.raises(ValueError, match="must be a list of at least one text, got"):
        pooled_text(tokenizer(), encoder_of(), prompts)


def test_a_tokenizer_without_a_longest_sequence_is_refused():
    endless = tokenizer()
    endless.model_max_length = int(1e30)  # as transformers has it if nothing is said
    with pytest.raises(ValueError, match="set its model_max_length"):
        pooled_text(endless, encoder_of(), PROMPTS)


def test_an_encoder_that_pools_nothing_is_refused():
    encoder = T5EncoderModel(T5Config(vocab_size=54, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="a T5EncoderModel returns last_hidden_state"):
        pooled_text(tokenizer(), encoder, PROMPTS)


def test_it_computes_where_it_is_told_or_where_the_encoder_is():
    for device in (None, "cpu", torch.device("cpu")):
        assert pooled_text(tokenizer(), encoder_of(), ["a"], device).device.type == "cpu"
    meta = encoder_of().to("meta")
    assert pooled_text(tokenizer(), meta, ["a"]).device.type == "meta"


def test_the_example_in_the_docstring_runs():
    globals_ = {"pooled_text": pooled_text}
    example = doctest.DocTestParser().get_doctest(pooled_text.__doc__, globals_, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
