"""Properties of the walk of a denoising autoencoder: where it begins, how it goes, and what folders give back."""

import doctest
import io
import json
import sys
from contextlib import redirect_stderr

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from torch import nn

import annealers
from annealers import AutoencoderModel, DenoisingAutoencoderPipeline
from annealers.exact import FiniteData
from annealers.figures import trajectory_strip
from annealers.hub import export
from annealers.pipelines import AnnealersPipeline


def pipeline_of(seed=0, **options):
    torch.manual_seed(seed)
    settings = {"in_channels": 1, "out_channels": 1, "sample_size": 8, "block_out_channels": (8, 8), "noise_std": 0.5}
    pipeline = DenoisingAutoencoderPipeline(AutoencoderModel(**{**settings, **options}).eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


POINTS = torch.stack([torch.full((1, 8, 8), -0.5), torch.full((1, 8, 8), 0.75), torch.zeros(1, 8, 8)])
POINTS[2, :, :, 4:] = 1


class Ideal(nn.Module):
    """The encoder of the ideal denoising autoencoder of three points; the decoder has nothing left to do."""

    def __init__(self):
        super().__init__()
        self.points = nn.Parameter(POINTS, requires_grad=False)

    def forward(self, x):
        return FiniteData(self.points).denoise(x, sigma=0.5)


def ideal_pipeline():
    """A pipeline whose DAE is known in closed form."""
    pipeline = pipeline_of(latent_channels=1, block_out_channels=(8,))
    pipeline.autoencoder.encoder, pipeline.autoencoder.decoder = Ideal(), nn.Identity()
    return pipeline


# ---- the walk -------------------------------------------------------------------------------------------------------


def test_each_step_goes_a_part_of_the_way_to_what_the_autoencoder_makes_of_the_state():
    pipeline, images = pipeline_of(), randn(2, 1, 8, 8)
    output = pipeline(images, num_inference_steps=3, step_size=0.25, output_type="latent", return_trajectory=True)
    states, denoised = output.trajectory.samples, output.trajectory.predictions
    assert states.shape == (4, 2, 1, 8, 8) and denoised.shape == (3, 2, 1, 8, 8)
    assert torch.equal(states[0], images) and torch.equal(states[-1], output.images)
    assert output.trajectory.timesteps.tolist() == [0, 1, 2]
    for i in range(3):
        torch.testing.assert_close(denoised[i], pipeline.autoencoder.denoise(states[i]).detach())
        torch.testing.assert_close(states[i + 1], 0.75 * states[i] + 0.25 * denoised[i])
    without = pipeline(images, num_inference_steps=3, step_size=0.25, output_type="latent")
    assert torch.equal(without.images, output.images) and without.trajectory is None


def test_the_walk_of_the_ideal_denoiser_ends_on_the_stored_point_that_was_noised():
    starts = POINTS.repeat(5, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    walked = ideal_pipeline()(starts, noise_level=0.5, num_inference_steps=40, generator=generator, output_type="pt")
    torch.testing.assert_close(walked.images, (starts + 1) / 2, rtol=0, atol=1e-4)


def test_the_score_is_that_of_the_noisy_data():
    pipeline, x = ideal_pipeline(), randn(6, 1, 8, 8)
    exact = FiniteData(POINTS.double()).score(x.double(), sigma=0.5)
    score = pipeline.score(x)
    assert score.dtype == torch.float32 and not score.requires_grad
    torch.testing.assert_close(score.double(), exact, rtol=1e-4, atol=1e-4)


def test_without_steps_the_images_come_back():
    images = randn(2, 1, 8, 8)
    output = pipeline_of()(images, num_inference_steps=0, output_type="latent", return_trajectory=True)
    assert torch.equal(output.images, images) and output.trajectory.predictions is None


# ---- where it begins ------------------------------------------------------------------------------------------------


def test_from_noise_it_begins_at_unit_noise_and_from_images_without():
    pipeline = pipeline_of(sample_size=(8, 12))
    states = pipeline(
        batch_size=200, num_inference_steps=0, generator=torch.Generator().manual_seed(0), return_trajectory=True
    ).trajectory.samples[0]
    assert states.shape == (200, 1, 8, 12)
    assert abs(states.mean()) < 4 / states.numel() ** 0.5
    assert abs(states.var() - 1) < 4 * (2 / states.numel()) ** 0.5
    images = randn(2, 1, 8, 12)
    noisy = pipeline(images, noise_level=0.3, generator=generators(1, 2), num_inference_steps=0, output_type="latent")
    drawn = torch.cat([torch.randn(1, 1, 8, 12, generator=generator) for generator in generators(1, 2)])
    torch.testing.assert_close(noisy.images, images + 0.3 * drawn)


def test_with_a_generator_for_each_image_none_hears_of_the_others():
    pipeline = pipeline_of()
    together = pipeline(generator=generators(4, 5, 6), num_inference_steps=3, output_type="latent").images
    alone = pipeline(generator=generators(5), num_inference_steps=3, output_type="latent").images
    assert len(together) == 3
    torch.testing.assert_close(alone[0], together[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_arrays_and_tensors_begin_at_the_same_place(channels):
    pipeline = pipeline_of(in_channels=channels, out_channels=channels)
    levels = torch.randint(0, 256, (2, 8, 8, channels), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = [PIL.Image.fromarray(image.squeeze(-1).numpy()) for image in levels]
    tensor = levels.permute(0, 3, 1, 2).float() / 127.5 - 1
    for given in (pictures, levels.numpy().astype(np.float32) / 255, tensor):
        states = pipeline(given, num_inference_steps=0, output_type="latent").images
        torch.testing.assert_close(states, tensor, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        pipeline(pictures[0], num_inference_steps=0, output_type="latent").images, tensor[:1], rtol=0, atol=1e-6
    )


def test_a_picture_keeps_its_size():
    picture = PIL.Image.new("L", (14, 10), 100)
    assert pipeline_of()(picture, num_inference_steps=2).images[0].size == (14, 10)


def test_a_colour_picture_is_made_grey_for_a_grey_autoencoder_and_a_grey_one_coloured():
    grey, colour = PIL.Image.new("L", (8, 8), 100), PIL.Image.new("RGB", (8, 8), (100, 100, 100))
    for pipeline in (pipeline_of(), pipeline_of(in_channels=3, out_channels=3)):
        first, second = (pipeline(image, num_inference_steps=0, output_type="pt").images for image in (grey, colour))
        assert first.shape[1] == pipeline.autoencoder.config.in_channels
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


# ---- what comes out -------------------------------------------------------------------------------------------------


def test_each_output_type_shows_the_same_images():
    pipeline, images = pipeline_of(), randn(2, 1, 8, 8).clamp(-1, 1)
    outputs = {kind: pipeline(images, num_inference_steps=2, output_type=kind).images for kind in ("pil", "np", "pt")}
    state = pipeline(images, num_inference_steps=2, output_type="latent").images
    shown = ((state + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(outputs["pt"], shown)
    assert np.allclose(outputs["np"][..., 0], shown[:, 0].numpy(), atol=1e-6)
    for picture, expected in zip(outputs["pil"], shown, strict=True):
        assert picture.mode == "L" and np.abs(np.asarray(picture) / 255 - expected[0].numpy()).max() < 0.51 / 255
    assert torch.equal(pipeline(images, num_inference_steps=2, output_type="pt", return_dict=False)[0], outputs["pt"])


def test_channels_that_are_no_colours_come_out_as_tensors():
    pipeline = pipeline_of(in_channels=2, out_channels=2)
    assert pipeline(batch_size=2, num_inference_steps=1, output_type="pt").images.shape == (2, 2, 8, 8)
    with pytest.raises(ValueError, match="1 or 3 channels, this autoencoder has 2: use output_type='pt'"):
        pipeline(batch_size=2, num_inference_steps=1)


def test_a_walk_can_be_drawn_as_a_strip():
    trajectory = pipeline_of()(batch_size=1, num_inference_steps=6, return_trajectory=True).trajectory
    assert trajectory_strip(trajectory, count=4, scale=2, padding=2).size == (4 * 18 - 2, 2 * 18 - 2)


def test_the_progress_bar_counts_the_steps_and_can_be_disabled():
    pipeline, shown = pipeline_of(), io.StringIO()
    with redirect_stderr(shown):
        pipeline(batch_size=1, num_inference_steps=7)
    assert shown.getvalue() == ""
    pipeline.set_progress_bar_config(disable=False, desc="walking")
    with redirect_stderr(shown):
        pipeline(batch_size=1, num_inference_steps=7)
    assert "walking" in shown.getvalue() and "7/7" in shown.getvalue()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_autoencoder_walks_in_single_precision(dtype):
    """Steps that are lost in half precision add up."""
    pipeline, images = pipeline_of(), randn(2, 1, 8, 8)
    arguments = {"num_inference_steps": 40, "step_size": 1 / 512, "output_type": "latent"}
    expected = pipeline(images, **arguments).images
    walked = pipeline.to(dtype)(images, **arguments).images
    assert walked.dtype == torch.float32
    torch.testing.assert_close(walked, expected, rtol=0, atol=2e-3)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_type": "pdf"}, "output_type must be one of .* got 'pdf'"),
        ({"noise_level": -1.0}, "noise_level must be finite and not negative, got -1.0"),
        ({"noise_level": float("nan")}, "noise_level must be finite and not negative, got nan"),
        ({"step_size": 0.0}, r"step_size must be in \(0, 1\]"),
        ({"num_inference_steps": -1}, "num_steps must be an integer >= 0, got -1"),
        ({"image": torch.zeros(2, 3, 8, 8)}, r"need \(B, 1, H, W\), got \(2, 3, 8, 8\)"),
        ({"image": torch.zeros(2, 1, 7, 8)}, "7 x 8 pixels do not allow"),
        (
            {"image": torch.zeros(2, 1, 8, 8), "batch_size": 3},
            r"got \{'batch_size': 3, 'image': 2\}",
        ),
        ({"batch_size": 3, "generator": generators(1, 2)}, "'generator': 2"),
        ({"batch_size": 0}, "one positive batch size"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline_of()(**arguments)


def test_a_plain_autoencoder_walks_but_knows_no_score():
    pipeline = pipeline_of(noise_std=0)
    assert len(pipeline(batch_size=2, num_inference_steps=2).images) == 2
    with pytest.raises(ValueError, match="a plain autoencoder, noise_std=0, knows no score"):
        pipeline.score(randn(2, 1, 8, 8))


def test_an_autoencoder_that_returns_other_channels_is_refused():
    with pytest.raises(ValueError, match="returns what it takes, got channels 1 and 3"):
        pipeline_of(out_channels=3)


# ---- folders --------------------------------------------------------------------------------------------------------


def images_of(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(generator=generators(1, 2), num_inference_steps=3, output_type="pt").images


def test_a_saved_pipeline_comes_back_by_either_name_and_walks_the_same_way(tmp_path):
    pipeline = pipeline_of(flat_latent=True)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["autoencoder"] == ["annealers", "AutoencoderModel"]
    for loader in (AnnealersPipeline, DenoisingAutoencoderPipeline):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is DenoisingAutoencoderPipeline and loaded.autoencoder.config.noise_std == 0.5
        assert torch.equal(images_of(loaded), images_of(pipeline))


def test_an_export_loads_in_diffusers_with_its_code(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    pipeline = pipeline_of()
    export(pipeline, tmp_path / "exported")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    assert torch.equal(images_of(loaded), images_of(pipeline))
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]


def test_the_exported_code_walks_the_same_way_without_annealers(tmp_path, monkeypatch):
    pipeline = pipeline_of(flat_latent=True)
    export(pipeline, tmp_path)
    classes = {}
    with monkeypatch.context() as without:
        for name in [name for name in sys.modules if name.split(".")[0] == "annealers"]:
            without.setitem(sys.modules, name, None)  # it cannot be imported
        for code in tmp_path.rglob("*.py"):
            exec(compile(code.read_text(), code, "exec"), classes)
        autoencoder = classes["AutoencoderModel"].from_config(dict(pipeline.autoencoder.config))
        autoencoder.load_state_dict(pipeline.autoencoder.state_dict())
        walked = images_of(classes["DenoisingAutoencoderPipeline"](autoencoder.eval()))
    assert classes["AutoencoderModel"] is not AutoencoderModel
    assert torch.equal(walked, images_of(pipeline))


def test_a_folder_of_another_pipeline_is_refused(tmp_path):
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",))  # fmt: skip
    annealers.GuidedDiffusionPipeline(unet, annealers.DDPMAncestralScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DenoisingAutoencoderPipeline has \\['autoencoder'\\]"):
        DenoisingAutoencoderPipeline.from_pretrained(tmp_path)


def test_it_is_named_by_the_package_alone():
    assert DenoisingAutoencoderPipeline.__module__ == "annealers"
    assert "DenoisingAutoencoderPipeline" in annealers.__all__


def test_the_example_in_the_docstring_runs():
    example = doctest.DocTestParser().get_doctest(DenoisingAutoencoderPipeline.__doc__, {}, "example", None, 0)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))
    assert example.examples
