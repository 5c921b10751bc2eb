"""Properties of VAEPipeline: which latents it decodes, in which order, and what the figures show."""

import doctest
import math

import numpy as np
import PIL.Image
import pytest
import scipy.stats
import torch
from one_file import copies_from_one_file

from annealers import HierarchicalVAEModel, VAEModel, VAEPipeline
from annealers.hub import export
from annealers.pipelines import AnnealersPipeline

SMALL = {"in_channels": 1, "sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4}
NAMES = {0: "cat", 1: "dog", 2: "emu"}


def model_of(number=0, **options):
    """Random weights, with a decoder that is not flat, so that pictures differ."""
    torch.manual_seed(number)
    model = VAEModel(**{**SMALL, "latent_channels": 2, "flat_latent": True, **options}).eval()
    with torch.no_grad():
        model.decoder.trunk.conv_out.weight.mul_(8)
    return model


def pipeline_of(id2label=None, **options):
    pipeline = VAEPipeline(model_of(**options), id2label)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def plain():
    return pipeline_of()


@pytest.fixture
def conditional():
    return pipeline_of(NAMES, num_class_embeds=3)


@pytest.fixture
def hierarchical():
    return hierarchical_pipeline()


def hierarchical_pipeline(**options):
    torch.manual_seed(0)
    layers = {"latent_channels": (3, 2), "latent_levels": (1, 1)}
    pipeline = VAEPipeline(HierarchicalVAEModel(**SMALL, **layers, **options).eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seed(number=0):
    return torch.Generator().manual_seed(number)


def normal(*shape, number=1):
    return torch.randn(*shape, generator=seed(number))


def images(count=3, number=5):
    """In [-1, 1], on the grid of eight bits."""
    levels = torch.randint(256, (count, 1, 8, 8), generator=seed(number))
    return levels.float() / 255 * 2 - 1


def pictures(x):
    """The same as PIL images."""
    return [PIL.Image.fromarray(((image[0] + 1) / 2 * 255).round().byte().numpy()) for image in x]


def decoded(output):
    """Images in [-1, 1] of an output in [0, 1]."""
    return 2 * output.images - 1


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=3e-5)  # batches of other sizes round otherwise


# ---- images of the prior --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_a_draw_is_the_mean_of_the_decoder_at_normal_noise_times_the_temperature(plain, temperature):
    output = plain(batch_size=3, temperature=temperature, generator=seed(), output_type="latent")
    noise = torch.randn(3, 2, 1, 1, generator=seed())
    assert torch.equal(output.latents, temperature * noise)
    assert torch.equal(output.images, plain.vae.decode(temperature * noise).sample)


@pytest.mark.parametrize("sample_pixels", [False, True])
@pytest.mark.parametrize("build", [pipeline_of, hierarchical_pipeline])
def test_with_a_generator_each_an_image_does_not_depend_on_its_neighbours(build, sample_pixels):
    pipeline, arguments = build(), {"sample_pixels": sample_pixels, "output_type": "latent"}
    many = pipeline(generator=[seed(i) for i in range(3)], **arguments).images
    alone = torch.cat([pipeline(generator=[seed(i)], **arguments).images for i in range(3)])
    close(many, alone)
    again = pipeline(batch_size=3, generator=seed(), **arguments).images
    assert torch.equal(again, pipeline(batch_size=3, generator=seed(), **arguments).images)
    assert not torch.equal(again, many)


def test_sampled_pixels_have_the_law_of_the_likelihood_around_the_same_latent():
    pipeline = pipeline_of(likelihood="gaussian", sigma=0.3, learn_sigma=False)
    arguments = {"batch_size": 40, "temperature": 0.0, "output_type": "latent"}
    mean = pipeline(**arguments).images
    drawn = pipeline(sample_pixels=True, generator=seed(), **arguments).images
    standardised = (drawn - mean).flatten() / 0.3
    assert scipy.stats.kstest(standardised.numpy(), "norm").pvalue > 0.001
    ends = pipeline_of(likelihood="bernoulli")(sample_pixels=True, generator=seed(), **arguments).images
    assert set(ends.unique().tolist()) == {-1.0, 1.0}


def test_sampled_pixels_come_of_the_latents_of_the_same_generator_and_are_not_that_noise_again():
    pipeline = pipeline_of(likelihood="gaussian", sigma=1e-4, latent_channels=64)
    arguments = {"batch_size": 2, "output_type": "latent"}
    close(
        pipeline(sample_pixels=True, generator=seed(), **arguments).images / 100,
        pipeline(generator=seed(), **arguments).images / 100,
    )
    pipeline = pipeline_of(likelihood="gaussian", sigma=1.0, latent_channels=64)
    output = pipeline(sample_pixels=True, generator=seed(), **arguments)
    residual = output.images - pipeline.vae.decode(output.latents).sample
    assert not torch.allclose(residual.flatten(), output.latents.flatten(), atol=1e-3)


@pytest.mark.parametrize(("labels", "ids"), [("emu", [2, 2]), (["dog", 0], [1, 0]), (torch.tensor([2, 1]), [2, 1])])
def test_a_conditional_model_draws_the_classes_that_are_asked_for(conditional, labels, ids):
    noise = torch.randn(2, 2, 1, 1, generator=seed())
    drawn = conditional(batch_size=2, class_labels=labels, generator=seed(), output_type="latent").images
    assert torch.equal(drawn, conditional.vae.decode(noise, torch.tensor(ids)).sample)
    others = conditional.vae.decode(noise, (torch.tensor(ids) + 1) % 3).sample
    assert not torch.allclose(drawn, others, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "size"), [({}, 1), ({"batch_size": 3}, 3), ({"generator": [seed(0), seed(1)]}, 2)]
)
def test_the_batch_size_follows_from_what_has_a_length(plain, arguments, size):
    assert len(plain(**arguments).images) == size


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (pipeline_of, {"class_labels": 1}, "class_labels=1, but the network has no classes"),
        (pipeline_of, {"temperature": -1.0}, "finite and not negative, got -1.0"),
        (pipeline_of, {"temperature": math.nan}, "finite and not negative, got nan"),
        (hierarchical_pipeline, {"temperature": math.inf}, "finite and not negative, got inf"),
        (pipeline_of, {"batch_size": 0}, "{'batch_size': 0}"),
        (pipeline_of, {"batch_size": 2, "generator": [seed()]}, "{'batch_size': 2, 'generator': 1}"),
        (pipeline_of, {"output_type": "jpeg"}, "got 'jpeg'"),
        (lambda: pipeline_of(num_class_embeds=3), {}, "the network has 3 classes: say which"),
        (lambda: pipeline_of(num_class_embeds=3), {"class_labels": 3}, "3 is not one of the 3 classes"),
        (lambda: pipeline_of(NAMES, num_class_embeds=3), {"class_labels": "owl"}, "'owl' is not one of"),
        (lambda: pipeline_of(in_channels=2), {}, "1 or 3 channels, this model has 2"),
    ],
)
def test_what_cannot_be_drawn_is_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build()(**arguments)


def test_names_of_classes_that_the_model_lacks_are_refused():
    with pytest.raises(ValueError, match=r"names the classes \[0, 1, 2\], but the network has 2"):
        pipeline_of(NAMES, num_class_embeds=2)


# ---- reconstructions ------------------------------------------------------------------------------------------------


def test_a_reconstruction_is_decoded_from_the_mean_of_the_posterior(plain):
    x = images()
    output = plain.reconstruct(x, output_type="latent")
    mean = plain.vae.encode(x).latent_dist.mean
    assert torch.equal(output.latents, mean)
    assert torch.equal(output.images, plain.vae.decode(mean).sample) and torch.equal(output.originals, x)


def test_images_are_taken_as_pictures_arrays_and_tensors(plain):
    x = images()
    expected = plain.reconstruct(x, output_type="pt").images
    array = (x.permute(0, 2, 3, 1).numpy() + 1) / 2
    colour = [picture.convert("RGB") for picture in pictures(x)]
    for given in (pictures(x), array, colour):
        close(plain.reconstruct(given, output_type="pt").images, expected)
    for given in (pictures(x)[0], x[0], x[:1]):
        close(plain.reconstruct(given, output_type="pt").images, expected[:1])


def test_a_conditional_model_reconstructs_each_image_by_its_own_label(conditional):
    x, ids = images(), torch.tensor([2, 0, 1])
    output = conditional.reconstruct(x, ["emu", "cat", "dog"], output_type="latent")
    mean = conditional.vae.encode(x, ids).latent_dist.mean
    assert torch.equal(output.images, conditional.vae.decode(mean, ids).sample)
    with pytest.raises(ValueError, match="{'class_labels': 2, 'images': 3}"):
        conditional.reconstruct(x, ["emu", "cat"])


def test_images_of_another_size_are_refused(plain):
    with pytest.raises(ValueError, match=r"images must be \(B, 1, 8, 8\), got \(1, 1, 12, 12\)"):
        plain.reconstruct(PIL.Image.new("L", (12, 12)))


def test_hundreds_of_images_are_decoded_a_few_at_a_time_to_the_same(plain, monkeypatch):
    x, sizes = images(150), []
    decode = plain.vae.decode
    monkeypatch.setattr(plain.vae, "decode", lambda z, labels: sizes.append(len(z)) or decode(z, labels))
    output = plain.reconstruct(x, output_type="latent")
    assert sizes == [64, 64, 22]
    close(output.images, decode(plain.vae.encode(x).latent_dist.mean).sample)


# ---- interpolations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "spherical"])
@pytest.mark.parametrize("options", [{}, {"flat_latent": False}])
def test_an_interpolation_ends_on_the_reconstructions(method, options):
    pipeline, a, b = pipeline_of(**options), images(2, number=1), images(2, number=2)
    output = pipeline.interpolate(a, b, steps=5, method=method, output_type="latent")
    rows = output.images.unflatten(0, (2, 5))
    for end, of in ((0, a), (4, b)):
        close(rows[:, end], pipeline.reconstruct(of, output_type="latent").images)
    assert output.columns == 5 and output.column_names == ("0", "0.25", "0.5", "0.75", "1")


def test_a_linear_interpolation_is_one_of_latents(plain):
    a, b = images(1, number=1), images(1, number=2)
    output = plain.interpolate(a, b, steps=5, output_type="latent")
    z_a, z_b = (plain.vae.encode(x).latent_dist.mean for x in (a, b))
    close(output.latents[1:2], 0.75 * z_a + 0.25 * z_b)
    close(output.images[1:2], plain.vae.decode(0.75 * z_a + 0.25 * z_b).sample)


def test_an_interpolation_is_one_of_one_class(conditional):
    a, b, ids = images(2, number=1), images(2, number=2), torch.tensor([1, 2])
    output = conditional.interpolate(a, b, steps=3, class_labels=["dog", "emu"], output_type="latent")
    z = (conditional.vae.encode(a, ids).latent_dist.mean + conditional.vae.encode(b, ids).latent_dist.mean) / 2
    close(output.images[[1, 4]], conditional.vae.decode(z, ids).sample)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1}, "steps >= 2, the two ends, got 1"),
        ({"method": "cubic"}, "'spherical'.*, got 'cubic'"),
        ({"image_b": images(2)}, r"got \(3, 1, 8, 8\) and \(2, 1, 8, 8\)"),
    ],
)
def test_an_interpolation_that_is_none_is_refused(plain, arguments, message):
    with pytest.raises(ValueError, match=message):
        plain.interpolate(**{"image_a": images(3), "image_b": images(3), **arguments})


# ---- the manifold ---------------------------------------------------------------------------------------------------


def test_the_manifold_covers_the_prior_in_equal_shares_from_left_to_right_and_upwards(plain):
    n = 5
    output = plain.manifold(n, output_type="latent")
    shares = scipy.stats.norm.cdf(output.latents.reshape(n, n, 2).numpy())
    columns, rows = np.meshgrid((np.arange(n) + 0.5) / n, (np.arange(n)[::-1] + 0.5) / n)
    np.testing.assert_allclose(shares, np.stack([columns, rows], axis=-1), atol=1e-6)
    close(output.images, plain.vae.decode(output.latents).sample)
    assert output.columns == n and output.column_names == ("-1.28", "-0.52", "0.00", "0.52", "1.28")
    assert output.row_names == output.column_names[::-1]


def test_the_manifold_of_one_image_is_the_mean_of_the_prior(plain):
    close(plain.manifold(1, output_type="latent").images, plain.vae.decode(torch.zeros(1, 2, 1, 1)).sample)


def test_a_class_has_its_own_manifold(conditional):
    output = conditional.manifold(3, class_labels="dog", output_type="latent")
    close(output.images, conditional.vae.decode(output.latents, torch.ones(9, dtype=torch.long)).sample)
    with pytest.raises(ValueError, match="a figure is of one class, got 2"):
        conditional.manifold(3, class_labels=["dog", "cat"])
    with pytest.raises(ValueError, match="say which"):
        conditional.manifold(3)


@pytest.mark.parametrize("options", [{"latent_channels": 3}, {"latent_channels": 2, "flat_latent": False}])
def test_a_latent_that_is_not_of_two_numbers_has_no_manifold(options):
    size = 3 if options["latent_channels"] == 3 else 32
    with pytest.raises(ValueError, match=f"of two numbers, this one has {size}, .*traverse"):
        pipeline_of(**options).manifold()
    with pytest.raises(ValueError, match="n >= 1, got 0"):
        pipeline_of().manifold(0)


# ---- traversals -----------------------------------------------------------------------------------------------------


def test_a_traversal_varies_the_numbers_that_are_asked_for_and_no_other():
    pipeline = pipeline_of(latent_channels=4)
    z = normal(4, 1, 1)
    output = pipeline.traverse([2, 0], latents=z, span=2.0, steps=5, output_type="latent")
    rows = output.latents.reshape(2, 5, 4)
    for row, dim in zip(rows, [2, 0], strict=True):
        expected = z.flatten().repeat(5, 1)
        expected[:, dim] = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
        torch.testing.assert_close(row, expected)
    close(output.images, pipeline.vae.decode(output.latents).sample)
    assert output.row_names == ("z_2", "z_0") and output.column_names == ("-2", "-1", "0", "1", "2")


def test_a_traversal_begins_at_the_posterior_of_an_image_or_at_the_mean_of_the_prior(plain):
    x = images(1)
    of_image = plain.traverse(1, image=x, output_type="latent").latents
    close(of_image[:, 0], plain.vae.encode(x).latent_dist.mean[:, 0].expand(9, 1, 1))
    assert (plain.traverse(1, output_type="latent").latents[:, 0] == 0).all()


def test_a_map_is_counted_through_its_channels_rows_and_columns():
    pipeline = pipeline_of(flat_latent=False)  # (2, 4, 4)
    z = pipeline.traverse(16 + 2 * 4 + 3, span=1.0, steps=2, output_type="latent").latents
    assert z.nonzero().tolist() == [[0, 1, 2, 3], [1, 1, 2, 3]]


def test_a_class_is_traversed_in_its_own_images(conditional):
    output = conditional.traverse(0, image=images(1), class_labels="emu", output_type="latent")
    ids = torch.full((9,), 2)
    close(output.latents[0, 1], conditional.vae.encode(images(1), ids[:1]).latent_dist.mean[0, 1])
    close(output.images, conditional.vae.decode(output.latents, ids).sample)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 2}, "among 0 .. 1, the numbers of the latent, got 2"),
        ({"dim": -1}, "got -1"),
        ({"dim": []}, r"got \[\]"),
        ({"dim": [0, 5]}, r"got \[0, 5\]"),
        ({"span": 0.0}, "span > 0 and steps >= 1, got 0.0 and 9"),
        ({"steps": 0}, "got 3.0 and 0"),
        ({"image": images(1), "latents": torch.zeros(2, 1, 1)}, "not both"),
        ({"image": images(2)}, "one image is varied at a time, got 2"),
        ({"latents": torch.zeros(2)}, r"one latent of shape \(2, 1, 1\), got \(2,\)"),
        ({"latents": torch.zeros(2, 2, 1, 1)}, r"got \(2, 2, 1, 1\)"),
    ],
)
def test_a_traversal_that_is_none_is_refused(plain, arguments, message):
    with pytest.raises(ValueError, match=message):
        plain.traverse(**{"dim": 0, **arguments})


# ---- several layers of latents --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_a_hierarchical_model_draws_what_it_generates(hierarchical, temperature):
    drawn = hierarchical(batch_size=3, temperature=temperature, generator=seed(), output_type="latent")
    assert torch.equal(drawn.images, hierarchical.vae.generate(3, generator=seed(), temperature=temperature))
    assert drawn.latents is None


def test_a_hierarchical_model_reconstructs_from_the_means_of_all_its_layers(hierarchical):
    x = images().sign()
    expected = hierarchical.vae(x, sample_posterior=False).sample
    close(hierarchical.reconstruct(x, output_type="latent").images, expected)


def test_grey_images_are_reconstructed_by_a_model_of_black_and_white_ones(hierarchical):
    for pipeline in (hierarchical, pipeline_of(likelihood="bernoulli")):
        assert len(pipeline.reconstruct(pictures(images())).images) == 3


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("manifold", (5,)), ("interpolate", (images(1), images(1))), ("traverse", (0,))],
)
def test_a_hierarchical_model_has_no_single_latent_to_walk_through(hierarchical, method, arguments):
    message = f"{method} needs a model with a single latent, .*a HierarchicalVAEModel has one in each"
    with pytest.raises(ValueError, match=message):
        getattr(hierarchical, method)(*arguments)


def test_a_conditional_hierarchical_model_draws_and_reconstructs_classes():
    pipeline, ids = hierarchical_pipeline(num_class_embeds=3), torch.tensor([1, 2])
    drawn = pipeline(class_labels=ids, generator=seed(), output_type="latent").images
    assert torch.equal(drawn, pipeline.vae.generate(2, class_labels=ids, generator=seed()))
    x = images(2).sign()
    expected = pipeline.vae(x, ids, sample_posterior=False).sample
    close(pipeline.reconstruct(x, ids, output_type="latent").images, expected)


# ---- output and figures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_the_output_types_are_one_image(channels):
    pipeline = pipeline_of(in_channels=channels)
    pil, array, tensor, raw = (
        pipeline(batch_size=2, generator=seed(), output_type=kind).images for kind in ("pil", "np", "pt", "latent")
    )
    torch.testing.assert_close(tensor, (raw / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert [image.mode for image in pil] == [{1: "L", 3: "RGB"}[channels]] * 2
    np.testing.assert_allclose(np.asarray(pil[1]).reshape(8, 8, channels) / 255, array[1], atol=0.5 / 255 + 1e-6)
    assert len(pipeline(return_dict=False)) == len(pipeline.manifold(2, return_dict=False)) == 1


def test_a_figure_shows_the_images_row_by_row(plain):
    output = plain.manifold(3)
    figure = np.asarray(output.figure(scale=2, padding=1))
    assert figure.shape == (3 * 16 + 2, 3 * 16 + 2)
    for i, image in enumerate(output.images):
        top, left = i // 3 * 17, i % 3 * 17
        np.testing.assert_array_equal(figure[top : top + 16 : 2, left : left + 16 : 2], np.asarray(image))


def test_reconstructions_stand_below_what_they_are_of(plain):
    x = images(10)  # in rows of eight
    output = plain.reconstruct(pictures(x))
    figure = np.asarray(output.figure(padding=0))
    assert figure.shape == (4 * 8, 8 * 8)
    for i in range(10):
        top, left = i // 8 * 16, i % 8 * 8
        cell = figure[top : top + 16, left : left + 8]
        np.testing.assert_array_equal(cell[:8], np.asarray(pictures(x)[i]))
        np.testing.assert_array_equal(cell[8:], np.asarray(output.images[i]))


def test_names_stand_outside_of_the_images(plain):
    output = plain.traverse([0, 1], steps=4)
    bare, named = output.figure(scale=4), output.figure(scale=4, labels=True)
    assert named.width > bare.width and named.height > bare.height
    left, top = named.width - bare.width, named.height - bare.height
    np.testing.assert_array_equal(np.asarray(named)[top:, left:], np.asarray(bare))
    margin = np.asarray(named)[:, :left]
    assert (margin[:top] == 255).all() and all((half < 128).any() for half in np.array_split(margin[top:], 2))
    assert all((name < 128).any() for name in np.array_split(np.asarray(named)[:top, left:], 4, axis=1))


def test_a_figure_of_few_reconstructions_is_as_wide_as_they_are(plain):
    assert plain.reconstruct(images(3)).figure(padding=0).size == (24, 16)


def test_a_figure_needs_pictures(plain):
    with pytest.raises(ValueError, match="output_type='pil', got a Tensor"):
        plain.manifold(2, output_type="pt").figure()


def test_long_work_shows_its_progress(plain):
    totals = []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            totals.append("tick")

    plain.progress_bar = lambda total: totals.append(total) or Bar()
    plain.manifold(10)
    assert totals == [2, "tick", "tick"]


# ---- precision, folders, code ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", [pipeline_of, hierarchical_pipeline])
def test_a_half_precision_model_draws_nearly_the_same_from_the_same_noise(build, dtype):
    pipeline, arguments = build(), {"batch_size": 2, "generator": seed(), "output_type": "latent"}
    full = pipeline(**arguments).images
    pipeline.vae.to(dtype)
    half = pipeline(**arguments | {"generator": seed()}).images
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.1)
    assert pipeline.reconstruct(images().sign(), output_type="latent").images.dtype == dtype


@pytest.mark.parametrize("loader", [VAEPipeline, AnnealersPipeline])
def test_a_saved_pipeline_comes_back_whole(conditional, loader, tmp_path):
    conditional.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is VAEPipeline and loaded.id2label == NAMES
    arguments = {"class_labels": ["emu", "cat"], "output_type": "pt"}
    assert torch.equal(loaded(generator=seed(), **arguments).images, conditional(generator=seed(), **arguments).images)


def test_an_exported_pipeline_loads(conditional, hierarchical, tmp_path):
    for name, pipeline, arguments in (("one", conditional, {"class_labels": "dog"}), ("many", hierarchical, {})):
        folder = export(pipeline, tmp_path / name)
        loaded = VAEPipeline.from_pretrained(folder)
        drawn = loaded(generator=seed(), output_type="pt", **arguments).images
        assert torch.equal(drawn, pipeline(generator=seed(), output_type="pt", **arguments).images)


def test_its_code_works_in_one_file_without_annealers(tmp_path, monkeypatch):
    expected = pipeline_of()
    model_class, pipeline_class = copies_from_one_file(("VAEModel", "VAEPipeline"), tmp_path, monkeypatch)
    model = model_class.from_config(expected.vae.config)
    model.load_state_dict(expected.vae.state_dict())
    pipeline = pipeline_class(model.eval())
    pipeline.set_progress_bar_config(disable=True)
    assert not isinstance(pipeline, VAEPipeline) and not isinstance(model, VAEModel)
    arguments = {"image_a": images(1, number=1), "image_b": images(1, number=2), "output_type": "pt"}
    assert torch.equal(pipeline.interpolate(**arguments).images, expected.interpolate(**arguments).images)
    assert len(pipeline.manifold(2).images) == 4 and len(pipeline(sample_pixels=True).images) == 1


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(VAEPipeline.__doc__, {}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
