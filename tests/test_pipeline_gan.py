"""Properties of GANPipeline: which latents it makes images of, given which class or text, and what comes back."""

import doctest
import json
import math
import sys

import diffusers
import numpy as np
import PIL.Image
import pytest
import scipy.stats
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from one_file import copies_from_one_file
from tiny_pipelines import text_config, tokenizer
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from annealers import GANGenerator, GANPipeline, OpenCLIPTextModel, OpenCLIPTokenizer
from annealers.hub import export
from annealers.pipelines import AnnealersPipeline
from annealers.pipelines.pipeline_gan import truncated
from annealers.pipelines.text_embeddings import pooled_text

Z = 16
NAMES = {0: "cat", 1: "dog", 2: "emu"}
WIDTH = text_config().hidden_size


class LinearGenerator(ModelMixin, ConfigMixin):
    """Images that are sums when their latents are."""

    @register_to_config
    def __init__(self, latent_dim=Z, sample_size=4, out_channels=1, num_class_embeds=None, text_embed_dim=None):
        super().__init__()
        self.linear = torch.nn.Linear(latent_dim, out_channels * sample_size**2, bias=False)

    def forward(self, latents, class_labels=None, encoder_hidden_states=None, return_dict=True):
        size = self.config.sample_size
        return (self.linear(latents).unflatten(1, (self.config.out_channels, size, size)),)


def network_of(norm="group", **options):
    """Random weights, large enough that images differ."""
    torch.manual_seed(0)
    small = {"sample_size": 8, "out_channels": 1, "latent_dim": Z, "block_out_channels": (8, 8)}
    network = GANGenerator(**small | {"norm": norm, "norm_num_groups": 4} | options).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter[0].numel()))
    return network


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_of(id2label=None, **options):
    return quiet(GANPipeline(network_of(**options), id2label=id2label))


def text_pipeline(kind=CLIPTextModel, **options):
    torch.manual_seed(0)
    encoder = kind(text_config()).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return quiet(GANPipeline(network_of(text_embed_dim=WIDTH, **options), encoder, tokenizer()))


@pytest.fixture
def plain():
    return pipeline_of()


@pytest.fixture
def conditional():
    return pipeline_of(NAMES, num_class_embeds=3)


@pytest.fixture
def texts():
    return text_pipeline()


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return quiet(GANPipeline(LinearGenerator()))


def seed(number=0):
    return torch.Generator().manual_seed(number)


def normal(*shape, number=1):
    return torch.randn(*shape, generator=seed(number))


def close(a, b, atol=3e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)  # batches of other sizes round otherwise


# ---- images of noise ------------------------------------------------------------------------------------------------


def test_an_image_is_what_the_network_makes_of_normal_noise(plain):
    output = plain(batch_size=3, generator=seed(), output_type="latent")
    assert torch.equal(output.latents, torch.randn(3, Z, generator=seed()))
    assert torch.equal(output.images, plain.generator(output.latents).sample)
    assert output.images.shape == (3, 1, 8, 8) and output.images.std(dim=0).mean() > 0.01


def test_the_latents_that_come_back_make_the_same_images_again(plain):
    first = plain(batch_size=3, truncation=0.7, generator=seed(), output_type="pt")
    again = plain(latents=first.latents, output_type="pt")
    assert torch.equal(again.images, first.images) and torch.equal(again.latents, first.latents)


@pytest.mark.parametrize("truncation", [None, 0.5])
def test_with_a_generator_each_an_image_does_not_depend_on_its_neighbours(plain, truncation):
    arguments = {"truncation": truncation, "output_type": "latent"}
    many = plain(generator=[seed(i) for i in range(3)], **arguments)
    alone = [plain(generator=seed(i), **arguments) for i in range(3)]
    assert torch.equal(many.latents, torch.cat([one.latents for one in alone]))
    close(many.images, torch.cat([one.images for one in alone]))


def test_a_seed_stands_for_what_its_generator_draws(plain):
    drawn = plain(generator=[seed(5), seed(3)], output_type="latent")
    assert torch.equal(plain(latents=[5, 3], output_type="latent").images, drawn.images)
    for three in (3, np.int64(3)):
        assert torch.equal(plain(latents=three, output_type="latent").latents, drawn.latents[1:])


def test_latents_are_taken_as_tensors_of_one_or_several_and_lists_of_them(plain):
    z = normal(4, Z)
    for given in (z, z.double(), [z[0], z[1:3], z[3]], list(z), z.clone().requires_grad_()):
        output = plain(latents=given, output_type="latent")
        assert torch.equal(output.latents, z) and output.latents.dtype == torch.float32
    assert torch.equal(plain(latents=z[2], output_type="latent").latents, z[2:3])


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_network_in_training_is_evaluated_and_left_as_it_was(norm):
    pipeline = pipeline_of(norm=norm)
    expected = pipeline(latents=normal(3, Z), output_type="latent").images
    pipeline.generator.train()
    frozen = pipeline.generator.trunk.conv_out.eval()  # a part that was not in training
    before = {name: tensor.clone() for name, tensor in pipeline.generator.state_dict().items()}
    assert torch.equal(pipeline(latents=normal(3, Z), output_type="latent").images, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.generator.state_dict().items())
    assert pipeline.generator.training and not frozen.training
    pipeline.generator.forward = None
    with pytest.raises(TypeError):
        pipeline()
    assert pipeline.generator.training


@pytest.mark.parametrize(("labels", "ids"), [("emu", [2, 2]), (["dog", 0], [1, 0]), (torch.tensor([2, 1]), [2, 1])])
def test_a_conditional_network_draws_the_classes_that_are_asked_for(labels, ids):
    pipeline = conditional_images()
    drawn = pipeline(batch_size=2, class_labels=labels, generator=seed(), output_type="latent")
    assert torch.equal(drawn.images, pipeline.generator(drawn.latents, torch.tensor(ids)).sample)
    others = pipeline.generator(drawn.latents, (torch.tensor(ids) + 1) % 3).sample
    assert not torch.allclose(drawn.images, others, atol=1e-3)


def conditional_images():
    return pipeline_of(NAMES, num_class_embeds=3)


def test_one_latent_may_serve_all_classes(conditional):
    output = conditional(class_labels=list(NAMES.values()), latents=normal(Z), output_type="latent")
    assert torch.equal(output.latents, normal(1, Z).expand(3, Z))
    close(output.images, conditional.generator(output.latents, torch.arange(3)).sample)


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({}, 1),
        ({"batch_size": 3}, 3),
        ({"generator": [seed(0), seed(1)]}, 2),
        ({"latents": normal(4, Z)}, 4),
        ({"latents": normal(1, Z), "batch_size": 2}, 2),
    ],
)
def test_the_batch_size_follows_from_what_has_a_length(plain, arguments, size):
    output = plain(**arguments)
    assert len(output.images) == len(output.latents) == size


def test_hundreds_of_images_are_made_a_few_at_a_time_to_the_same_and_show_their_progress(conditional):
    sizes, shown = [], []
    conditional.generator.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    conditional.progress_bar = lambda parts: shown.append(len(parts)) or parts
    labels = torch.arange(150) % 3
    output = conditional(class_labels=labels, generator=seed(), output_type="latent")
    assert sizes == [64, 64, 22] and shown == [3]
    close(output.images, conditional.generator(output.latents, labels).sample)
    conditional(batch_size=64, class_labels="dog")
    assert shown == [3]


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_as_pictures_arrays_and_tensors(channels):
    pipeline, z = pipeline_of(out_channels=channels), normal(2, Z)
    raw = pipeline(latents=z, output_type="latent").images
    close(pipeline(latents=z, output_type="pt").images, (raw + 1) / 2)
    array = pipeline(latents=z, output_type="np").images
    np.testing.assert_allclose(array, (raw.permute(0, 2, 3, 1).numpy() + 1) / 2, atol=1e-6)
    pictures = pipeline(latents=z).images
    assert [picture.mode for picture in pictures] == [{1: "L", 3: "RGB"}[channels]] * 2
    np.testing.assert_array_equal(np.asarray(pictures[1]), (array[1] * 255).round().astype("uint8").squeeze())
    images, latents = pipeline(latents=z, output_type="pt", return_dict=False)
    close(images, (raw + 1) / 2)
    assert torch.equal(latents, z)


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (pipeline_of, {"class_labels": 1}, "class_labels=1, but the network has no classes"),
        (pipeline_of, {"prompt": "a dog"}, "the generator has no texts"),
        (pipeline_of, {"prompt_embeds": normal(1, 4)}, "the generator has no texts"),
        (pipeline_of, {"truncation": 0.0}, "finite and positive, or None for no limit, got 0.0"),
        (pipeline_of, {"truncation": math.nan}, "None for no limit, got nan"),
        (pipeline_of, {"truncation": math.inf}, "None for no limit, got inf"),
        (pipeline_of, {"latents": 1, "truncation": 1.0}, "latents are taken as they are"),
        (pipeline_of, {"latents": 1, "generator": seed()}, "latents are taken as they are"),
        (pipeline_of, {"latents": normal(2, 5)}, r"\(n, 16\) or \(16,\) floating-point numbers, got \(2, 5\) of"),
        (pipeline_of, {"latents": normal(2, 1, Z)}, r"got \(2, 1, 16\)"),
        (pipeline_of, {"latents": torch.ones(2, Z, dtype=torch.long)}, "got .* of torch.int64"),
        (pipeline_of, {"latents": normal(0, Z)}, "at least one latent, got none"),
        (pipeline_of, {"latents": []}, "at least one latent, got none"),
        (pipeline_of, {"latents": ["a"]}, "integers, got a str"),
        (pipeline_of, {"latents": torch.full((1, Z), math.nan)}, "not finite"),
        (pipeline_of, {"latents": normal(2, Z), "batch_size": 3}, "{'batch_size': 3, 'latents': 2}"),
        (pipeline_of, {"batch_size": 0}, "{'batch_size': 0}"),
        (pipeline_of, {"batch_size": 2, "generator": [seed()]}, "{'batch_size': 2, 'generator': 1}"),
        (pipeline_of, {"output_type": "jpeg"}, "got 'jpeg'"),
        (lambda: pipeline_of(out_channels=2), {}, "1 or 3 channels, this model has 2"),
        (conditional_images, {}, "the network has 3 classes: say which"),
        (conditional_images, {"class_labels": 3}, "3 is not one of the 3 classes"),
        (conditional_images, {"class_labels": "owl"}, "'owl' is not one of"),
        (text_pipeline, {}, "the generator makes images of texts: say which, prompt="),
        (text_pipeline, {"prompt": "a", "prompt_embeds": normal(1, WIDTH)}, "not both"),
        (text_pipeline, {"prompt": ["a", "b"], "batch_size": 3}, "{'batch_size': 3, 'prompt': 2}"),
        (text_pipeline, {"prompt": []}, "{'prompt': 0}"),
        (text_pipeline, {"prompt_embeds": normal(2, 5)}, rf"embeddings \(2, {WIDTH}\) of texts, got \(2, 5\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build()(**arguments)


def test_names_of_classes_that_the_network_lacks_are_refused():
    with pytest.raises(ValueError, match=r"names the classes \[0, 1, 2\], but the network has 2"):
        pipeline_of(NAMES, num_class_embeds=2)


# ---- truncation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.04, 0.5, 1.0, 2.5])
def test_a_truncated_number_is_that_of_the_truncated_law_at_the_quantile_of_the_noise(threshold):
    noise = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    numbers = truncated(noise, threshold)
    # from the nearer end, where quantiles keep their digits
    lower = scipy.stats.truncnorm.ppf(scipy.stats.norm.cdf(-noise.abs().numpy()), -threshold, threshold)
    np.testing.assert_allclose(-numbers.abs().numpy(), lower, rtol=0, atol=1e-9)
    assert (numbers.sign() == noise.sign()).all() and (numbers.diff() >= 0).all() and numbers.abs().max() <= threshold


def test_a_truncated_pipeline_draws_from_that_law(plain):
    latents = plain(batch_size=600, truncation=0.8, generator=seed(), output_type="latent").latents
    law = scipy.stats.truncnorm(-0.8, 0.8)
    assert scipy.stats.kstest(latents.flatten().numpy(), law.cdf).pvalue > 0.001
    assert scipy.stats.kstest(latents.flatten().numpy() * 0.95, law.cdf).pvalue < 0.001
    noise = plain(batch_size=600, generator=seed(), output_type="latent").latents
    assert torch.equal(latents.argsort(dim=1), noise.argsort(dim=1))


def test_a_wide_truncation_changes_nothing_and_a_narrow_one_leaves_one_image():
    pipeline, arguments = pipeline_of(norm="none"), {"batch_size": 3, "output_type": "latent"}
    free = pipeline(generator=seed(), **arguments).images
    close(pipeline(generator=seed(), truncation=9.0, **arguments).images, free)
    narrow = pipeline(generator=seed(), truncation=1e-6, **arguments).images
    close(narrow, pipeline(latents=torch.zeros(1, Z), **arguments).images, atol=1e-5)
    assert not torch.allclose(free[0], free[1], atol=1e-2)


def test_noise_at_the_end_of_what_a_number_can_be_stays_within_the_threshold():
    noise = torch.tensor([-40.0, -9.0, 9.0, 40.0])
    assert truncated(noise, 0.5).tolist() == [-0.5, -0.5, 0.5, 0.5]
    assert truncated(noise, 30.0).isfinite().all()
    assert truncated(noise.half(), 0.5).dtype == torch.float16


# ---- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_a_prompt_becomes_the_embedding_that_the_network_is_given(kind):
    pipeline, prompts = text_pipeline(kind), ["a dog", "the cat"]
    output = pipeline(prompt=prompts, generator=seed(), output_type="latent")
    embeds = pooled_text(pipeline.tokenizer, pipeline.text_encoder, prompts)
    assert torch.equal(output.images, pipeline.generator(output.latents, encoder_hidden_states=embeds).sample)
    swapped = pipeline.generator(output.latents, encoder_hidden_states=embeds.flip(0)).sample
    assert not torch.allclose(output.images, swapped, atol=1e-2)
    given = pipeline(prompt_embeds=embeds, latents=output.latents, output_type="latent").images
    assert torch.equal(given, output.images)


def test_one_prompt_or_one_embedding_serves_all_images(texts):
    z, embeds = normal(3, Z), pooled_text(texts.tokenizer, texts.text_encoder, ["a dog"])
    expected = texts.generator(z, encoder_hidden_states=embeds.expand(3, -1)).sample
    assert torch.equal(texts(prompt="a dog", latents=z, output_type="latent").images, expected)
    assert torch.equal(texts(prompt_embeds=embeds, latents=z, output_type="latent").images, expected)


def test_a_network_may_have_classes_and_texts():
    pipeline, z = text_pipeline(num_class_embeds=3), normal(2, Z)
    embeds = pooled_text(pipeline.tokenizer, pipeline.text_encoder, ["a", "b"])
    drawn = pipeline(class_labels=[2, 0], prompt=["a", "b"], latents=z, output_type="latent").images
    assert torch.equal(drawn, pipeline.generator(z, torch.tensor([2, 0]), embeds).sample)


def test_without_an_encoder_a_prompt_is_refused_and_an_embedding_is_not():
    pipeline = pipeline_of(text_embed_dim=5)
    with pytest.raises(ValueError, match="needs a text_encoder and a tokenizer; without, give prompt_embeds"):
        pipeline(prompt="a dog")
    assert len(pipeline(prompt_embeds=normal(2, 5)).images) == 2


def test_a_tower_of_open_clip_reads_prompts_and_is_saved_with_the_rest(tmp_path):
    torch.manual_seed(0)
    tower = OpenCLIPTextModel(projection_dim=6, hidden_size=16, num_attention_heads=2, num_hidden_layers=1).eval()
    pipeline = quiet(GANPipeline(network_of(text_embed_dim=6), tower, OpenCLIPTokenizer()))
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(GANPipeline.from_pretrained(tmp_path))
    arguments = {"prompt": ["a dog", "the cat"], "latents": normal(2, Z), "output_type": "pt"}
    images = pipeline(**arguments).images
    assert torch.equal(loaded(**arguments).images, images) and not torch.allclose(images[0], images[1], atol=1e-3)


# ---- interpolations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "spherical"])
def test_a_walk_begins_and_ends_at_the_given_latents(plain, method):
    a, b = normal(2, Z, number=1), normal(2, Z, number=2)
    output = plain.interpolate(a, b, steps=5, method=method, output_type="latent")
    rows = output.latents.unflatten(0, (2, 5))
    assert torch.equal(rows[:, 0], a) and torch.equal(rows[:, -1], b)
    close(output.images, plain.generator(output.latents).sample)
    assert output.columns == 5 and output.column_names == ("0", "0.25", "0.5", "0.75", "1")


def test_a_walk_is_by_default_on_the_arc(plain):
    a, b = torch.eye(Z)[:1] * 3, torch.eye(Z)[1:2] * 3
    arc = plain.interpolate(a, b, steps=3, output_type="latent").latents
    close(arc[1], (a + b)[0] / math.sqrt(2))
    line = plain.interpolate(a, b, steps=3, method="linear", output_type="latent").latents
    close(line[1], (a + b)[0] / 2)


def test_a_walk_between_seeds_is_one_between_what_they_draw(plain):
    a, b = (plain(generator=seed(i), output_type="latent").latents for i in (3, 4))
    expected = plain.interpolate(a, b, steps=4, output_type="pt").images
    assert torch.equal(plain.interpolate(3, 4, steps=4, output_type="pt").images, expected)
    assert len(plain.interpolate([3, 5], [4, 6], steps=4).images) == 8


def test_each_row_of_a_walk_has_its_class(conditional):
    a, b, ids = normal(2, Z, number=1), normal(2, Z, number=2), torch.tensor([2, 0]).repeat_interleave(3)
    output = conditional.interpolate(a, b, steps=3, class_labels=["emu", "cat"], output_type="latent")
    close(output.images, conditional.generator(output.latents, ids).sample)
    one = conditional.interpolate(a, b, steps=3, class_labels="dog", output_type="latent")
    close(one.images, conditional.generator(one.latents, torch.ones(6, dtype=torch.long)).sample)


def test_between_two_classes_there_is_nothing(conditional):
    with pytest.raises(ValueError, match=r"each of 1 rows, got \['cat', 'dog'\]: a class is an index"):
        conditional.interpolate(1, 2, class_labels=["cat", "dog"])


def test_between_two_texts_are_the_weighted_means_of_their_embeddings(texts):
    a, b = normal(2, Z, number=1), normal(2, Z, number=2)
    ends = {"prompt": ["a dog", "the cat"], "second_prompt": "an owl"}
    output = texts.interpolate(a, b, steps=5, **ends, output_type="latent")
    first = pooled_text(texts.tokenizer, texts.text_encoder, ends["prompt"])
    last = pooled_text(texts.tokenizer, texts.text_encoder, ["an owl"])
    w = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).reshape(5, 1)
    embeds = torch.cat([(1 - w) * first[:1] + w * last, (1 - w) * first[1:] + w * last])
    close(output.images, texts.generator(output.latents, encoder_hidden_states=embeds).sample, atol=2e-5)
    for end, prompt, z in ((0, "a dog", a[:1]), (4, "an owl", b[:1])):
        close(output.images[end], texts(prompt=prompt, latents=z, output_type="latent").images[0], atol=2e-5)


def test_a_walk_may_go_from_one_text_to_another_with_one_latent_or_keep_its_text(texts):
    between = texts.interpolate(3, 3, steps=3, prompt="a dog", second_prompt="an owl", output_type="latent")
    close(between.latents, between.latents[:1].expand(3, -1))
    assert not torch.allclose(between.images[0], between.images[2], atol=1e-2)
    kept = texts.interpolate([3, 5], [4, 6], steps=3, prompt=["a dog", "an owl"], output_type="latent")
    prompts = ["a dog"] * 3 + ["an owl"] * 3
    close(kept.images, texts(prompt=prompts, latents=kept.latents, output_type="latent").images, atol=2e-5)


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (pipeline_of, {"second": [1, 2]}, "as many first as second latents, got 1 and 2"),
        (pipeline_of, {"steps": 1}, "steps >= 2, the two ends, got 1"),
        (pipeline_of, {"method": "cubic"}, "'spherical'.*, got 'cubic'"),
        (pipeline_of, {"first": normal(Z), "second": -normal(Z)}, "no shortest arc between opposite latents"),
        (pipeline_of, {"output_type": "jpeg"}, "got 'jpeg'"),
        (pipeline_of, {"second_prompt": "a"}, "the generator has no texts"),
        (text_pipeline, {"second_prompt": "a"}, "say which, prompt="),
        (text_pipeline, {"prompt": ["a", "b"]}, "need one prompt, or one for each of 1, got 2"),
        (conditional_images, {}, "say which"),
    ],
)
def test_a_walk_that_is_none_is_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build().interpolate(**{"first": 0, "second": 1, **arguments})


def test_a_figure_has_a_row_for_each_pair_and_names_above(plain):
    output = plain.interpolate([0, 1], [2, 3], steps=5)
    figure = output.figure(scale=3, padding=1)
    assert figure.size == (5 * 25 - 1, 2 * 25 - 1)
    cell = np.asarray(figure)[25:49, 50:74]  # second row, third column
    np.testing.assert_array_equal(cell[::3, ::3], np.asarray(output.images[7]))
    named = output.figure(scale=3, padding=1, labels=True)
    assert named.height > figure.height and named.width == figure.width
    assert np.asarray(plain(batch_size=9).figure(padding=2)).shape == (18, 78)  # eight and one
    with pytest.raises(ValueError, match="output_type='pil', got a Tensor"):
        plain(output_type="pt").figure()


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def test_of_a_linear_network_sums_of_concepts_are_sums_of_images(linear):
    a, b, c = normal(3, Z, number=1), normal(5, Z, number=2), normal(Z, number=3)
    output = linear.arithmetic(positive=[a, list(b)], negative=[c], output_type="latent")
    close(output.latents[0], a.mean(dim=0) + b.mean(dim=0) - c)
    of = [linear.generator(z.reshape(-1, Z))[0].mean(dim=0) for z in (a, b, c)]
    close(output.images[0], of[0] + of[1] - of[2])
    assert output.images.shape == (1, 1, 4, 4)


def test_a_concept_is_the_mean_of_its_seeds_or_one_of_them(linear):
    z = torch.cat([linear(latents=i, output_type="latent").latents for i in range(4)])
    output = linear.arithmetic(positive=[[0, 1], 2], negative=[[3]], output_type="latent")
    close(output.latents[0], (z[0] + z[1]) / 2 + z[2] - z[3])
    assert torch.equal(linear.arithmetic(positive=[2], output_type="latent").latents, z[2:3])


def test_a_sum_of_three_concepts_of_three_draws_is_as_long_as_a_draw():
    pipeline = quiet(GANPipeline(LinearGenerator(latent_dim=4096)))
    usual = math.sqrt(4096)  # a squared length has a standard deviation of 2.2 % of its mean

    def length(draws, **options):
        concepts = [list(range(start, start + draws)) for start in (0, 100, 200)]
        sums = {"positive": concepts[:2], "negative": concepts[2:], "output_type": "latent"}
        return (pipeline.arithmetic(**sums, **options).latents.norm() / usual).item()

    assert abs(length(3) - 1) < 0.05 and abs(length(12) - 0.5) < 0.05
    assert length(12, rescale=True) == pytest.approx(1, abs=1e-5)


def test_rescaling_keeps_the_direction(linear):
    sums = {"positive": [[0, 1, 2], [3, 4]], "negative": [[5, 6]], "output_type": "latent"}
    plain, rescaled = linear.arithmetic(**sums).latents, linear.arithmetic(**sums, rescale=True).latents
    close(rescaled, plain / plain.norm() * math.sqrt(Z))
    with pytest.raises(ValueError, match="cancel: a sum of zero has no direction"):
        linear.arithmetic(positive=[[0, 1]], negative=[[0, 1]], rescale=True)
    assert not linear.arithmetic(positive=[[0, 1]], negative=[[0, 1]], output_type="latent").images.any()


def test_a_sum_is_of_the_class_or_text_that_is_asked_for(conditional, texts):
    output = conditional.arithmetic(positive=[0, 1], negative=[2], class_labels="emu", output_type="latent")
    assert torch.equal(output.images, conditional.generator(output.latents, torch.tensor([2])).sample)
    output = texts.arithmetic(positive=[0, 1], negative=[2], prompt="an owl", output_type="latent")
    assert torch.equal(output.images, texts(prompt="an owl", latents=output.latents, output_type="latent").images)
    assert isinstance(texts.arithmetic(positive=[0], prompt=["an owl"]).images[0], PIL.Image.Image)


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (
            pipeline_of,
            {"positive": normal(3, Z)},
            r"positive must be a list of concepts, positive=.concept., got T",
        ),
        (pipeline_of, {"negative": normal(3, Z)}, "negative must be a list of concepts"),
        (pipeline_of, {"negative": 2}, "negative must be a list of concepts, .* got int"),
        (pipeline_of, {"positive": []}, "at least one positive concept, got none"),
        (pipeline_of, {"positive": [[]]}, "at least one latent, got none"),
        (pipeline_of, {"negative": [normal(2, 3)]}, r"got \(2, 3\)"),
        (pipeline_of, {"output_type": "jpeg"}, "got 'jpeg'"),
        (conditional_images, {}, "say which"),
        (conditional_images, {"class_labels": ["cat", "dog"]}, "{'class_labels': 2, 'image': 1}"),
        (text_pipeline, {"prompt": ["a", "b"]}, "need one prompt, or one for each of 1, got 2"),
    ],
)
def test_a_sum_that_is_none_is_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build().arithmetic(**{"positive": [0], **arguments})


# ---- precision, folders, code ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_half_precision_pipeline_draws_nearly_the_same_from_the_same_latents(dtype, norm):
    pipeline = text_pipeline(norm=norm)
    arguments = {"prompt": "a dog", "truncation": 0.8, "batch_size": 2, "output_type": "latent"}
    full = pipeline(generator=seed(), **arguments)
    half = pipeline.to(dtype)(generator=seed(), **arguments)
    assert half.images.dtype == dtype and torch.equal(half.latents, full.latents)
    torch.testing.assert_close(half.images.float(), full.images, rtol=0, atol=0.1)
    assert pipeline(prompt_embeds=normal(1, WIDTH), output_type="latent").images.dtype == dtype
    walk = pipeline.interpolate(0, 1, prompt="a dog", second_prompt="an owl", output_type="latent")
    assert walk.images.dtype == dtype and walk.latents.dtype == torch.float32


@pytest.mark.parametrize("loader", [GANPipeline, AnnealersPipeline])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_saved_pipeline_comes_back_whole_and_draws_the_same_images(loader, norm, tmp_path):
    pipeline = pipeline_of(NAMES, num_class_embeds=3, norm=norm)
    pipeline.generator.train()(normal(8, Z), torch.arange(8) % 3)  # statistics of a batch norm
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(loader.from_pretrained(tmp_path))
    assert type(loaded) is GANPipeline and loaded.id2label == NAMES and loaded.text_encoder is None
    arguments = {"class_labels": ["emu", "cat"], "output_type": "pt"}
    assert torch.equal(loaded(generator=seed(), **arguments).images, pipeline(generator=seed(), **arguments).images)


def test_a_text_encoder_is_saved_also_if_it_is_set_later(texts, tmp_path):
    pipeline = quiet(GANPipeline(texts.generator))
    pipeline.text_encoder, pipeline.tokenizer = texts.text_encoder, texts.tokenizer
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(GANPipeline.from_pretrained(tmp_path))
    arguments = {"prompt": ["a dog", "the cat"], "latents": normal(2, Z), "output_type": "pt"}
    assert torch.equal(loaded(**arguments).images, texts(**arguments).images)
    without = GANPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert without.text_encoder is None and without.tokenizer is None


def test_the_index_of_a_saved_pipeline_names_annealers_and_transformers(texts, tmp_path):
    texts.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["generator"] == ["annealers", "GANGenerator"] and index["id2label"] is None
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"] and index["_class_name"] == "GANPipeline"


def test_offloading_goes_through_the_networks_in_the_order_of_their_calls(texts):
    called = []
    for name in ("text_encoder", "generator"):
        texts.components[name].register_forward_pre_hook(lambda *_, name=name: called.append(name))
    texts(prompt="a dog")
    assert "->".join(called) == texts.model_cpu_offload_seq


def test_an_export_loads_in_diffusers_with_its_code(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    loaded = quiet(DiffusionPipeline.from_pretrained(export(texts, tmp_path / "out"), trust_remote_code=True))
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    arguments = {"prompt": ["a dog", "the cat"], "latents": normal(2, Z), "output_type": "pt"}
    assert torch.equal(loaded(**arguments).images, texts(**arguments).images)


def test_its_code_works_in_one_file_without_annealers(tmp_path, monkeypatch):
    expected = text_pipeline()
    network_class, pipeline_class = copies_from_one_file(("GANGenerator", "GANPipeline"), tmp_path, monkeypatch)
    network = network_class.from_config(expected.generator.config)
    network.load_state_dict(expected.generator.state_dict())
    pipeline = quiet(pipeline_class(network.eval(), expected.text_encoder, expected.tokenizer))
    assert not isinstance(pipeline, GANPipeline) and not isinstance(network, GANGenerator)
    walk = {"first": 0, "second": 1, "prompt": "a dog", "second_prompt": "an owl", "output_type": "pt"}
    assert torch.equal(pipeline.interpolate(**walk).images, expected.interpolate(**walk).images)
    assert len(pipeline(batch_size=2, prompt="a", truncation=0.5).images) == 2
    assert len(pipeline.arithmetic(positive=[0, 1], negative=[2], prompt="a").images) == 1


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(GANPipeline.__doc__, {}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
