"""Properties of VQVAEPriorPipeline: what the prior draws is what the decoder shows, with and without a first stage."""

import doctest

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import annealers
from annealers import AnnealersPipeline, CodeTransformerModel, PixelCNNModel, VQVAEModel, VQVAEPriorPipeline
from annealers.hub import export

NAMES = {0: "cat", 1: "dog", 2: "emu"}


def vqvae_of(**options):
    torch.manual_seed(0)
    small = {"in_channels": 1, "sample_size": 8, "block_out_channels": (8, 8), "latent_channels": 4, "sigma": 0.3}
    model = VQVAEModel(**{**small, "num_vq_embeddings": 5, **options})
    nn.init.normal_(model.quantize.embedding.weight)  # so that the codes look different
    return model.eval()


def prior_of(kind="transformer", classes=3, **options):
    torch.manual_seed(1)
    shared = {"num_embeddings": 5, "sample_size": 4, "num_class_embeds": classes, "num_layers": 2, **options}
    if kind == "transformer":
        model = CodeTransformerModel(hidden_size=16, num_heads=2, **shared)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        if classes:
            nn.init.normal_(model.start.weight, std=3.0)
    else:
        model = PixelCNNModel(**{"in_channels": 1, "channels": 8, "kernel_size": 3, "first_kernel_size": 3, **shared})
    return model.eval()


def pipeline_of(kind="transformer", classes=3, **options):
    names = NAMES if classes else None
    pipeline = VQVAEPriorPipeline(vqvae_of(**options), prior_of(kind, classes), names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def images_of(pipeline, **arguments):
    arguments = {"class_labels": ["emu", "cat"], "output_type": "latent", "generator": generators(2)} | arguments
    return pipeline(**arguments)[0]


# ---- drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["transformer", "pixel_cnn"])
def test_images_are_the_decoder_s_of_the_codes_that_the_prior_draws(kind):
    pipeline = pipeline_of(kind)
    sampling = {"temperature": 0.7, "top_k": 3}
    codes = pipeline.prior.generate(2, class_labels=torch.tensor([2, 0]), generator=generators(2), **sampling)
    expected = pipeline.vqvae.decode_indices(codes[:, 0]).sample
    assert torch.equal(images_of(pipeline, **sampling), expected)
    assert not torch.equal(images_of(pipeline), expected)


def test_labels_are_names_or_ids_one_for_all_or_one_each():
    pipeline = pipeline_of()
    by_name = images_of(pipeline)
    assert torch.equal(by_name, images_of(pipeline, class_labels=[2, 0]))
    assert torch.equal(by_name, images_of(pipeline, class_labels=torch.tensor([2, 0])))
    assert torch.equal(by_name, images_of(pipeline, class_labels=np.array([2, 0])))
    assert torch.equal(images_of(pipeline, class_labels="dog"), images_of(pipeline, class_labels=[1, 1]))
    assert torch.equal(images_of(pipeline, class_labels=np.int64(1)), images_of(pipeline, class_labels=[1, 1]))
    assert not torch.equal(by_name, images_of(pipeline, class_labels=[0, 2]))


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({"batch_size": 3}, 3),
        ({"class_labels": [0, 1]}, 2),
        ({"generator": 2}, 2),
        ({"generator": 1, "class_labels": 0, "batch_size": 1}, 1),
        ({}, 1),
    ],
)
def test_the_batch_size_is_that_of_whatever_has_one(arguments, size):
    if isinstance(arguments.get("generator"), int):
        arguments = arguments | {"generator": generators(arguments["generator"])}
    arguments = {"class_labels": 0} | arguments
    assert pipeline_of()(**arguments, output_type="pt").images.shape == (size, 1, 8, 8)


def test_a_prior_without_classes_takes_no_labels():
    pipeline = pipeline_of(classes=None)
    assert len(pipeline(2).images) == 2
    with pytest.raises(ValueError, match="has no classes"):
        pipeline(class_labels=1)


def test_an_image_depends_on_its_own_generator_and_label_alone():
    pipeline = pipeline_of()
    together = images_of(pipeline)
    second = images_of(pipeline, class_labels="cat", generator=generators(2)[1:])
    torch.testing.assert_close(together[1:], second, rtol=0, atol=1e-5)


def test_every_output_type_shows_the_same_images():
    pipeline = pipeline_of(sigma=0.3)
    state = images_of(pipeline)
    tensor, array, pictures = (images_of(pipeline, output_type=kind) for kind in ("pt", "np", "pil"))
    torch.testing.assert_close(tensor, (state / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    np.testing.assert_allclose(np.array(pictures[0]) / 255, array[0, :, :, 0], atol=0.003)
    assert torch.equal(images_of(pipeline, return_dict=False), state)


def test_progress_is_shown_unless_it_is_not_wanted(capsys):
    pipeline = pipeline_of()
    pipeline(class_labels=0)
    assert capsys.readouterr().err == ""
    pipeline.set_progress_bar_config(disable=False)
    pipeline(class_labels=0)
    assert "4/4" in capsys.readouterr().err


# ---- the first stage ------------------------------------------------------------------------------------------------


def test_a_reconstruction_is_the_decoder_s_of_the_encoder_s_codes():
    pipeline = VQVAEPriorPipeline(vqvae_of())
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = pipeline.reconstruct(x, output_type="latent").images
    assert torch.equal(images, pipeline.vqvae(x).sample) and not images.requires_grad
    assert pipeline.reconstruct(x)[0][0].size == (8, 8)
    assert torch.equal(pipeline.reconstruct(x, output_type="latent", return_dict=False)[0], images)


def test_pictures_and_arrays_are_reconstructed_as_the_tensor_is():
    pipeline = VQVAEPriorPipeline(vqvae_of())
    levels = torch.randint(0, 256, (2, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = pipeline.reconstruct(levels[:, None].float() / 127.5 - 1, output_type="pt").images
    pictures = [PIL.Image.fromarray(picture.numpy()) for picture in levels]
    for given in (pictures, (levels[..., None] / 255).numpy()):
        torch.testing.assert_close(pipeline.reconstruct(given, output_type="pt").images, expected)
    with pytest.raises(ValueError, match=r"need \(B, 1, H, W\), got \(1, 3, 8, 8\)"):
        pipeline.reconstruct(torch.zeros(1, 3, 8, 8))


def test_without_a_prior_it_says_what_is_missing_and_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"has no prior .*train_prior.py --vqvae FOLDER`"):
        VQVAEPriorPipeline(vqvae_of())(2)
    VQVAEPriorPipeline(vqvae_of()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"train_prior.py --vqvae {tmp_path}`"):
        VQVAEPriorPipeline.from_pretrained(tmp_path)(2)


def test_a_prior_that_is_set_later_is_used_and_saved(tmp_path):
    pipeline = VQVAEPriorPipeline(vqvae_of(), id2label=NAMES)
    pipeline.prior = prior_of()
    pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(images_of(pipeline), images_of(pipeline_of()))
    pipeline.save_pretrained(tmp_path)
    loaded = VQVAEPriorPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(images_of(loaded), images_of(pipeline_of()))
    VQVAEPriorPipeline(vqvae_of(), id2label=NAMES).save_pretrained(tmp_path / "first stage")
    loaded = VQVAEPriorPipeline.from_pretrained(tmp_path / "first stage")  # whose names came as JSON
    loaded.set_progress_bar_config(disable=True)
    loaded.prior = prior_of()
    assert torch.equal(images_of(loaded), images_of(pipeline_of()))
    with pytest.raises(ValueError, match="num_embeddings 5, those of the prior 6"):
        VQVAEPriorPipeline(vqvae_of()).prior = prior_of(num_embeddings=6)
    with pytest.raises(ValueError, match="num_embeddings 5, those of the prior 6"):
        pipeline.prior = prior_of(num_embeddings=6)


# ---- what fits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (lambda: prior_of(num_embeddings=6), "num_embeddings 5, those of the prior 6"),
        (lambda: prior_of(sample_size=5), r"size \(4, 4\), those of the prior \(5, 5\)"),
        (lambda: prior_of(sample_size=(4, 8)), r"size \(4, 4\), those of the prior \(4, 8\)"),
        (lambda: prior_of(in_channels=2), "in_channels 1, those of the prior 2"),
        (lambda: prior_of(classes=None, causal=False, feature_channels=3), "bidirectional"),
        (lambda: prior_of(feature_channels=3), "conditioned on 3 channels of features, of which a VQ-VAE makes none"),
        (lambda: prior_of("pixel_cnn", condition_channels=2), "conditioned on 2 channels of features"),
        (lambda: prior_of("pixel_cnn", output="mix_logistic"), "output='mix_logistic' is no law"),
    ],
)
def test_a_prior_of_other_codes_is_refused(prior, message):
    with pytest.raises(ValueError, match=message):
        VQVAEPriorPipeline(vqvae_of(), prior())


def test_codes_need_not_be_square():
    vqvae = vqvae_of(sample_size=(8, 16))
    pipeline = VQVAEPriorPipeline(vqvae, prior_of(sample_size=(4, 8), classes=None))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(output_type="pt").images.shape == (1, 1, 8, 16)


def test_images_of_other_channels_than_one_or_three_are_no_pictures():
    pipeline = pipeline_of(in_channels=2)
    with pytest.raises(ValueError, match="this model has 2"):
        pipeline(class_labels=0)
    assert images_of(pipeline, output_type="pt").shape == (2, 2, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "has 3 classes: say which"),
        ({"class_labels": "cow"}, r"'cow' is not one of \['cat', 'dog', 'emu'\]"),
        ({"class_labels": 3}, "label 3 is not one of the 3 classes"),
        ({"class_labels": -1}, "label -1 is not one of the 3 classes"),
        ({"class_labels": 0.5}, "an integer or a name, got 0.5"),
        (
            {"class_labels": [0, 1], "batch_size": 3},
            "one positive batch size, got .*'batch_size': 3, 'class_labels': 2",
        ),
        ({"class_labels": 0, "batch_size": 0}, "one positive batch size"),
        ({"class_labels": 0, "output_type": "jpeg"}, r"\('pil', 'np', 'pt', 'latent'\), got 'jpeg'"),
        ({"class_labels": 0, "temperature": -1}, "temperature > 0, got -1"),
        ({"class_labels": 0, "top_k": 6}, "got 6"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline_of()(**arguments)


def test_names_are_of_classes_that_the_prior_has():
    with pytest.raises(ValueError, match=r"names the classes \[0, 3\], but the network has 3"):
        VQVAEPriorPipeline(vqvae_of(), prior_of(), {0: "cat", "3": "fox"})
    with pytest.raises(ValueError, match="but the network has 0"):
        VQVAEPriorPipeline(vqvae_of(), prior_of(classes=None), {0: "cat"})
    twice = VQVAEPriorPipeline(vqvae_of(), prior_of(), {0: "cat", 1: "cat"})
    with pytest.raises(ValueError, match=r"'cat' stands for the classes \[0, 1\]"):
        twice(class_labels="cat")


# ---- saving ---------------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_draws_the_same_images(tmp_path):
    pipeline = pipeline_of()
    pipeline.save_pretrained(tmp_path)
    loaded = AnnealersPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(images_of(loaded), images_of(pipeline))
    assert type(loaded) is VQVAEPriorPipeline and loaded.id2label == NAMES
    assert "VQVAEPriorPipeline" in annealers.__all__ and VQVAEPriorPipeline.__module__ == "annealers"


def test_an_export_with_its_code_loads_and_draws_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    export(pipeline_of(), tmp_path / "exported")
    assert len(list((tmp_path / "exported").rglob("annealers_*.py"))) == 3
    loaded = VQVAEPriorPipeline.from_pretrained(tmp_path / "exported")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(images_of(loaded), images_of(pipeline_of()))
    trusted = DiffusionPipeline.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    trusted.set_progress_bar_config(disable=True)
    assert torch.equal(images_of(trusted), images_of(pipeline_of()))


def test_half_precision_draws_too():
    pipeline = pipeline_of().to(torch.bfloat16)
    assert images_of(pipeline, output_type="pt").isfinite().all()
    assert pipeline.reconstruct(torch.zeros(1, 1, 8, 8), output_type="pt").images.shape == (1, 1, 8, 8)


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(VQVAEPriorPipeline.__doc__, {"torch": torch}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
