"""Properties of CodeFormerPipeline: which images it takes, that it says what the model says, and what folders hold."""

import doctest
import json
import sys

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from torch.nn.functional import interpolate

import annealers
from annealers import CodeFormerModel, CodeFormerPipeline, VQVAEModel
from annealers.hub import export
from annealers.pipelines import AnnealersPipeline


def pipeline_of(channels=1, size=8):
    torch.manual_seed(0)
    vqvae = VQVAEModel(
        in_channels=channels,
        sample_size=size,
        block_out_channels=(8, 16),
        latent_channels=8,
        norm_num_groups=4,
        num_vq_embeddings=12,
    )
    model = CodeFormerModel(vqvae_config=vqvae.config, hidden_size=16, num_layers=1, num_heads=2)
    for parameter in model.fusions.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # as trained ones, they do something
    return CodeFormerPipeline(model.eval())


@pytest.fixture(scope="module")
def pipeline():
    return pipeline_of()


def images_of(*shape, seed=2):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pictures_of(*sizes, mode="L"):
    generator, bands = np.random.default_rng(0), () if mode == "L" else (3,)
    return [
        PIL.Image.fromarray(generator.integers(0, 256, (height, width, *bands), dtype=np.uint8))
        for height, width in sizes
    ]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_image_is_that_of_the_model(pipeline, weight):
    x = images_of(3, 1, 8, 8)
    expected = pipeline.code_former(x, fidelity_weight=weight).sample
    assert torch.equal(pipeline(x, fidelity_weight=weight, output_type="latent").images, expected)
    assert pipeline(x, fidelity_weight=weight, output_type="latent").images.requires_grad is False


def test_the_weight_is_a_half_unless_another_is_asked_for(pipeline):
    x = images_of(2, 1, 8, 8)
    half = pipeline(x, fidelity_weight=0.5, output_type="latent").images
    assert torch.equal(pipeline(x, output_type="latent").images, half)
    assert (pipeline(x, fidelity_weight=0.0, output_type="latent").images != half).any()


def test_pictures_arrays_and_tensors_are_the_same_images(pipeline):
    pictures = pictures_of((8, 8), (8, 8))
    levels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))[:, None].float()
    x = levels / 127.5 - 1
    expected = pipeline(x, output_type="latent").images
    array = (levels / 255).movedim(1, -1).numpy()
    for given in (pictures, array):
        torch.testing.assert_close(pipeline(given, output_type="latent").images, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(pipeline(pictures[1], output_type="latent").images, expected[1:], rtol=0, atol=1e-4)


def test_every_output_type_is_the_same_image(pipeline):
    x = images_of(2, 1, 8, 8)
    raw = pipeline(x, output_type="latent").images
    pt = pipeline(x, output_type="pt").images
    torch.testing.assert_close(pt, (raw / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(pipeline(x, output_type="np").images, pt.movedim(1, -1).numpy())
    pictures = pipeline(x).images
    assert [picture.mode for picture in pictures] == ["L", "L"]
    assert np.abs(np.asarray(pictures[0]) / 255 - pt[0, 0].numpy()).max() < 0.51 / 255
    (as_tuple,) = pipeline(x, output_type="pt", return_dict=False)
    assert torch.equal(as_tuple, pt)


def test_images_of_any_size_are_brought_to_the_models(pipeline):
    for x in (images_of(2, 1, 24, 24), images_of(2, 1, 4, 4).sign()):  # the second overshoots
        fitted = interpolate(x, (8, 8), mode="bicubic", antialias=True).clamp(-1, 1)
        expected = pipeline.code_former(fitted, fidelity_weight=0.5).sample
        assert torch.equal(pipeline(x, output_type="latent").images, expected)
    pictures = pictures_of((8, 8), (16, 16), (5, 5))
    assert [picture.size for picture in pipeline(pictures).images] == [(8, 8)] * 3
    wide = pipeline_of(size=(8, 12))
    assert wide(images_of(1, 1, 16, 24), output_type="latent").images.shape == (1, 1, 8, 12)


def test_colour_follows_the_model():
    colourful = pipeline_of(channels=3)
    (picture,) = colourful(pictures_of((8, 8))).images  # from grey
    assert picture.mode == "RGB"
    (picture,) = pipeline_of()(pictures_of((8, 8), mode="RGB")).images
    assert picture.mode == "L"


def test_images_of_two_channels_are_restored_as_tensors():
    pipeline = pipeline_of(channels=2)
    assert pipeline(images_of(2, 2, 8, 8), output_type="pt").images.shape == (2, 2, 8, 8)
    with pytest.raises(ValueError, match="a PIL image has 1 or 3 channels, this model has 2: use output_type='pt'"):
        pipeline(images_of(2, 2, 8, 8))


def test_a_model_in_half_precision_restores():
    pipeline = pipeline_of().to(torch.bfloat16)
    x = images_of(2, 1, 8, 8)
    images = pipeline(x, output_type="latent").images
    assert images.dtype == torch.bfloat16 and images.isfinite().all()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 3, 8, 8), r"need \(B, 1, H, W\), got \(1, 3, 8, 8\)"),
        (torch.zeros(1, 1, 8, 9), "restores images of 8 x 8 pixels .*, and 8 x 9 have another shape: crop them first"),
        (torch.full((1, 1, 8, 8), 255.0), r"must lie in \[-1, 1\], got 255 .. 255"),
        ([], "need at least one image, got none"),
    ],
)
def test_images_that_do_not_fit_are_refused(pipeline, image, message):
    with pytest.raises(ValueError, match=message):
        pipeline(image)


def test_other_arguments_that_do_not_fit_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"fidelity_weight must lie in \[0, 1\], got 1.5"):
        pipeline(images_of(1, 1, 8, 8), fidelity_weight=1.5)
    with pytest.raises(ValueError, match="fidelity_weight must lie in .* got None"):
        pipeline(images_of(1, 1, 8, 8), fidelity_weight=None)
    with pytest.raises(ValueError, match="output_type must be one of .*, got 'jpg'"):
        pipeline(images_of(1, 1, 8, 8), output_type="jpg")


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [CodeFormerPipeline, AnnealersPipeline])
def test_a_saved_pipeline_restores_the_same(pipeline, loader, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is CodeFormerPipeline and not loaded.code_former.training
    x = images_of(2, 1, 8, 8)
    assert torch.equal(loaded(x, output_type="latent").images, pipeline(x, output_type="latent").images)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["code_former"] == ["annealers", "CodeFormerModel"]


def test_an_exported_pipeline_loads_with_its_code(pipeline, tmp_path, monkeypatch):
    modules = tmp_path / "modules"
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    export(pipeline, tmp_path / "export")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "export", trust_remote_code=True)
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]
    assert len(list(modules.rglob("annealers_code_former_*.py"))) == 2  # of the pipeline and of the model
    x = images_of(2, 1, 8, 8)
    assert torch.equal(loaded(x, output_type="latent").images, pipeline(x, output_type="latent").images)


def test_it_is_named_by_the_package_alone():
    assert CodeFormerPipeline.__module__ == "annealers" and "CodeFormerPipeline" in annealers.__all__


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(CodeFormerPipeline.__doc__, {}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
