"""Properties of PixelCNNPipeline: it shows what the model draws, completes images, and is saved whole."""

import doctest
import re
import sys

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline

import annealers
from annealers import PixelCNNModel, PixelCNNPipeline
from annealers.hub import export
from annealers.pipelines import AnnealersPipeline

NAMES = {0: "cat", 1: "dog", 2: "emu"}
UPPER_HALF = torch.arange(4).unsqueeze(1).expand(4, 6) < 2


def model_of(K=5, C=1, seed=0, **options):
    torch.manual_seed(seed)
    small = {"sample_size": (4, 6), "channels": 6, "num_layers": 2, "kernel_size": 3, "first_kernel_size": 3}
    model = PixelCNNModel(num_embeddings=K, in_channels=C, **{**small, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def pipeline_of(id2label=None, **options):
    pipeline = PixelCNNPipeline(model_of(**options), id2label)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def classes(**options):
    return pipeline_of(NAMES, num_class_embeds=3, **options)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def grey(levels, K=5):
    return 2 * levels.float() / (K - 1) - 1


# ---- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("K", "C"), [(2, 1), (5, 1), (4, 3)])
@pytest.mark.parametrize("output", ["categorical", "mix_logistic"])
def test_the_images_are_those_of_the_model_from_black_to_white(K, C, output):
    pipeline = pipeline_of(K=K, C=C, output=output)
    levels = pipeline.pixel_cnn.generate(3, generator=seeded())
    latent = pipeline(3, generator=seeded(), output_type="latent").images
    assert torch.equal(latent, grey(levels, K)) and latent.dtype == torch.float32
    pt = pipeline(3, generator=seeded(), output_type="pt").images
    torch.testing.assert_close(pt, levels / (K - 1))
    array = pipeline(3, generator=seeded(), output_type="np").images
    assert array.shape == (3, 4, 6, C) and np.allclose(array, pt.permute(0, 2, 3, 1).numpy())
    pictures = pipeline(3, generator=seeded()).images
    assert [picture.size for picture in pictures] == [(6, 4)] * 3
    assert np.allclose(np.array(pictures[0]).reshape(4, 6, C), 255 * array[0], atol=0.51)


def test_options_of_sampling_reach_the_model():
    pipeline = pipeline_of(condition_channels=2)
    options = {"temperature": 0.7, "top_k": 2, "condition": torch.randn(2, 2, 4, 6, generator=seeded(1))}
    levels = pipeline.pixel_cnn.generate(2, generator=seeded(), **options)
    assert torch.equal(pipeline(generator=seeded(), output_type="latent", **options).images, grey(levels))
    for changed in ({"temperature": 5.0}, {"top_k": 4}, {"condition": -options["condition"]}):
        other = pipeline(generator=seeded(), output_type="latent", **{**options, **changed}).images
        assert not torch.equal(other, grey(levels))


def test_a_tuple_holds_the_same_images():
    pipeline = pipeline_of()
    (images,) = pipeline(2, generator=seeded(), output_type="pt", return_dict=False)
    assert torch.equal(images, pipeline(2, generator=seeded(), output_type="pt").images)


def test_with_a_list_of_generators_an_image_is_its_own():
    pipeline = classes()
    together = pipeline(class_labels=[2, 0], generator=[seeded(1), seeded(2)], output_type="pt").images
    alone = pipeline(class_labels=0, generator=[seeded(2)], output_type="pt").images
    assert torch.equal(together[1:], alone)


@pytest.mark.parametrize(("disable", "shown"), [(True, False), (False, True)])
def test_the_progress_bar_counts_rows(capsys, disable, shown):
    pipeline = pipeline_of()
    pipeline.set_progress_bar_config(disable=disable)
    pipeline()
    assert ("4/4" in capsys.readouterr().err) == shown


# ---- classes --------------------------------------------------------------------------------------------------------


def test_classes_have_ids_and_names_and_one_is_for_all():
    pipeline = classes()
    expected = pipeline.pixel_cnn.generate(3, class_labels=torch.tensor([1, 0, 1]), generator=seeded())
    for labels in (["dog", "cat", "dog"], [1, 0, "dog"], torch.tensor([1, 0, 1]), np.array([1, 0, 1])):
        images = pipeline(class_labels=labels, generator=seeded(), output_type="latent").images
        assert torch.equal(images, grey(expected))
    expected = pipeline.pixel_cnn.generate(2, class_labels=torch.tensor([2, 2]), generator=seeded())
    assert torch.equal(pipeline(2, "emu", generator=seeded(), output_type="latent").images, grey(expected))


@pytest.mark.parametrize(
    ("pipeline", "arguments", "message"),
    [
        (classes, {}, "the network has 3 classes: say which to draw"),
        (classes, {"class_labels": "fox"}, "class label 'fox' is not one of ['cat', 'dog', 'emu']"),
        (classes, {"class_labels": 3}, "class label 3 is not one of the 3 classes"),
        (pipeline_of, {"class_labels": 0}, "the network has no classes (num_class_embeds=None)"),
        (classes, {"class_labels": [0, 1], "batch_size": 3}, "need one positive batch size"),
        (classes, {"class_labels": [0, 1], "generator": [seeded()]}, "need one positive batch size"),
        (pipeline_of, {"batch_size": 0}, "need one positive batch size, got {'batch_size': 0}"),
        (pipeline_of, {"batch_size": 1, "known": torch.ones(3, 1, 4, 6) > 0}, "need one positive batch size"),
        (pipeline_of, {"output_type": "jpg"}, "output_type must be one of ('pil', 'np', 'pt', 'latent'), got 'jpg'"),
        (pipeline_of, {"temperature": -1.0}, "temperature > 0, got -1.0"),
        (pipeline_of, {"top_k": 9}, "top_k in 1 .. 5"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(pipeline, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline()(**arguments)


def test_a_name_is_of_a_class_of_the_model():
    with pytest.raises(ValueError, match=re.escape("id2label names the classes [0, 1, 2], but the network has 2")):
        pipeline_of(NAMES, num_class_embeds=2)


def test_there_are_no_pictures_of_two_channels():
    with pytest.raises(ValueError, match="a PIL image has 1 or 3 channels, this model has 2"):
        pipeline_of(C=2)()
    assert pipeline_of(C=2)(output_type="pt").images.shape == (1, 2, 4, 6)


# ---- completion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [1, 3])
def test_a_completion_of_any_kind_of_image_keeps_what_is_given(C):
    pipeline = pipeline_of(K=256, C=C)
    levels = torch.randint(0, 256, (2, C, 4, 6), generator=seeded(3))
    prompt = {"prompt": levels, "known": UPPER_HALF}
    expected = grey(pipeline.pixel_cnn.generate(2, generator=seeded(), **prompt), 256)
    assert torch.equal(expected[:, :, :2], grey(levels, 256)[:, :, :2])

    array = levels.permute(0, 2, 3, 1).numpy()
    pictures = [PIL.Image.fromarray(picture.astype(np.uint8).squeeze()) for picture in array]
    for image in (grey(levels, 256), array / 255, pictures):
        completed = pipeline(image=image, known=UPPER_HALF, generator=seeded(), output_type="latent").images
        assert torch.equal(completed, expected)
    if C == 1:  # a picture in colours, of greys
        colours = [picture.convert("RGB") for picture in pictures]
        completed = pipeline(image=colours, known=UPPER_HALF, generator=seeded(), output_type="latent").images
        assert torch.equal(completed, expected)


def test_one_image_has_as_many_completions_as_are_asked_for():
    pipeline, image = classes(), grey(torch.randint(0, 5, (1, 1, 4, 6), generator=seeded(1)))
    completed = pipeline(
        8, "dog", image=image, known=UPPER_HALF.numpy(), generator=seeded(), output_type="latent"
    ).images
    assert torch.equal(completed[:, :, :2], image[:, :, :2].expand(8, -1, -1, -1))
    assert len(completed.unique(dim=0)) > 1
    for mask in (PIL.Image.fromarray(UPPER_HALF.numpy()), UPPER_HALF.tolist()):
        again = pipeline(8, "dog", image=image, known=mask, generator=seeded(), output_type="latent").images
        assert torch.equal(again, completed)
    masks = torch.zeros(3, 1, 4, 6, dtype=torch.bool)
    masks[1] = True
    completed = pipeline(class_labels=0, image=image, known=masks, output_type="latent").images
    assert len(completed) == 3 and torch.equal(completed[1:2], image)


def test_a_grey_value_between_two_levels_is_given_as_the_nearest():
    image = torch.tensor([-1.0, -0.9, -0.7, 0.2, 0.3, 0.9]).expand(1, 1, 4, 6)
    known = torch.ones(4, 6, dtype=torch.bool)
    images = pipeline_of(K=5)(image=image, known=known, output_type="latent").images
    assert images[0, 0, 0].tolist() == [-1.0, -1.0, -0.5, 0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("image", "known", "message"),
    [
        (torch.zeros(1, 1, 4, 6), None, "known is missing"),
        (None, UPPER_HALF, "prompt is missing"),
        (torch.zeros(1, 3, 4, 6), UPPER_HALF, "need (B, 1, H, W), got (1, 3, 4, 6)"),
        (torch.zeros(1, 1, 6, 4), UPPER_HALF, "the model's images are 4 x 6 pixels (height x width), got 6 x 4"),
        (torch.full((1, 1, 4, 6), 1.5), UPPER_HALF, "a tensor must lie in [-1, 1], got 1.5 .. 1.5"),
        (torch.zeros(1, 1, 4, 6), UPPER_HALF.float(), "known must be a bool mask"),
        (torch.zeros(1, 1, 4, 6), UPPER_HALF.T, "known must be a bool mask"),
    ],
)
def test_what_cannot_be_completed_is_refused(image, known, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline_of()(image=image, known=known)


# ---- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [PixelCNNPipeline, AnnealersPipeline])
def test_a_saved_pipeline_draws_the_same_images(tmp_path, loader):
    pipeline = classes(C=3)
    pipeline.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is PixelCNNPipeline and type(loaded.pixel_cnn) is PixelCNNModel and loaded.id2label == NAMES
    images = [p(class_labels=["emu", "cat"], generator=seeded(), output_type="pt").images for p in (pipeline, loaded)]
    assert torch.equal(*images)


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """The place where Diffusers puts the code that it runs, empty and ours."""
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]


def test_an_exported_pipeline_loads_by_its_own_code(tmp_path, modules_cache):
    pipeline = classes()
    export(pipeline, tmp_path / "export")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "export", trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    images = [p(class_labels=["emu"], generator=seeded(), output_type="pt").images for p in (pipeline, loaded)]
    assert torch.equal(*images)


def test_it_is_named_by_the_package_alone():
    assert PixelCNNPipeline.__module__ == "annealers" and "PixelCNNPipeline" in annealers.__all__


def test_the_example_runs():
    example = doctest.DocTestParser().get_doctest(PixelCNNPipeline.__doc__, {}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
