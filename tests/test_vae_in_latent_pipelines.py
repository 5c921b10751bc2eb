"""Autoencoders as the `vae` of latent diffusion: in the pipelines of Diffusers, and in GuidedDiffusionPipeline.

What a pipeline returns is compared with the decoder at the latents that it draws with the same generator.
"""

import copy

import PIL.Image
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.deprecated.latent_diffusion_uncond import LDMPipeline
from tiny_pipelines import stable_diffusion

from annealers import (
    DDPMAncestralScheduler,
    GuidedDiffusionPipeline,
    RestorationPipeline,
    VAEModel,
    VQVAEModel,
)
from annealers.hub import export
from annealers.measurements import Identity
from annealers.pipelines import AnnealersPipeline
from annealers.pipelines.latent_space import images_of_latents, latents_of_images

SMALL = {"in_channels": 3, "sample_size": 16, "block_out_channels": (8, 8), "norm_num_groups": 4}
BLOCKS = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def seed(number=0):
    return torch.Generator().manual_seed(number)


def normal(*shape, number=1):
    return torch.randn(*shape, generator=seed(number))


def vae_of(**options):
    torch.manual_seed(0)
    return VAEModel(**{**SMALL, "latent_channels": 4, "scaling_factor": 0.7, **options}).eval()


def diffusers_vae(**options):
    torch.manual_seed(0)
    return AutoencoderKL(latent_channels=4, sample_size=16, **BLOCKS, **options).eval()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# ---- in the pipelines of Diffusers ----------------------------------------------------------------------------------


def text_pipeline(pipeline_class=StableDiffusionPipeline, **options):
    """Stable Diffusion of tiny parts, around our model."""
    parts = stable_diffusion(pipeline_class).components
    pipeline = pipeline_class(**{**parts, "vae": vae_of(**options)}, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def from_text(pipeline, **arguments):
    """Images in [0, 1], or latents."""
    arguments = {"prompt": "a cat", "guidance_scale": 3.0, "num_inference_steps": 3, "output_type": "pt", **arguments}
    return pipeline(height=32, width=32, generator=seed(), **arguments).images


def in_unit_range(x):
    return (x / 2 + 0.5).clamp(0, 1)


def test_stable_diffusion_decodes_what_our_model_would():
    pipeline = text_pipeline()
    latents = from_text(pipeline, output_type="latent")
    assert latents.shape == (1, 4, 16, 16)  # of an image that our model halves once
    close(from_text(pipeline), in_unit_range(pipeline.vae.decode(latents / 0.7).sample))


def test_stable_diffusion_with_our_model_is_saved_and_loaded(tmp_path):
    pipeline = text_pipeline()
    pipeline.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.vae) is VAEModel and loaded.vae.config.scaling_factor == 0.7
    assert torch.equal(from_text(loaded), from_text(pipeline))


def test_stable_diffusion_starts_from_a_draw_of_the_posterior_of_an_image(monkeypatch):
    pipeline, image = text_pipeline(StableDiffusionImg2ImgPipeline), normal(1, 3, 32, 32).clamp(-1, 1)
    seen = []
    add_noise = pipeline.scheduler.add_noise
    monkeypatch.setattr(pipeline.scheduler, "add_noise", lambda x, *more: seen.append(x) or add_noise(x, *more))
    arguments = {"prompt": "a cat", "image": in_unit_range(image), "strength": 0.5, "num_inference_steps": 4}
    images = pipeline(**arguments, generator=seed(), output_type="pt").images
    assert images.shape == (1, 3, 32, 32)
    posterior = pipeline.vae.encode(image).latent_dist
    close(seen[0], 0.7 * posterior.sample(seed()))
    assert (seen[0] - 0.7 * posterior.mean).abs().max() > 0.1


def test_slicing_and_tiling_are_switched_on_from_the_pipeline():
    pipeline = text_pipeline()
    whole = from_text(pipeline, num_images_per_prompt=2)
    pipeline.vae.enable_slicing()
    close(from_text(pipeline, num_images_per_prompt=2), whole)
    pipeline.vae.disable_slicing()
    pipeline.vae.enable_tiling()
    tiled = from_text(pipeline, num_images_per_prompt=2)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    pipeline.vae.disable_tiling()
    assert torch.equal(from_text(pipeline, num_images_per_prompt=2), whole)


def test_the_unconditional_pipeline_of_latent_diffusion_decodes_with_our_model():
    network, vae = latent_unet(), vae_of()
    pipeline = LDMPipeline(vqvae=vae, unet=network, scheduler=DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    ours = GuidedDiffusionPipeline(network, DDIMScheduler(clip_sample=False), vae=vae)
    ours.set_progress_bar_config(disable=True)
    expected = ours(generator=seed(), num_inference_steps=3, output_type="np").images
    got = pipeline(generator=seed(), num_inference_steps=3, output_type="np").images
    close(torch.from_numpy(got), torch.from_numpy(expected))


# ---- in ours --------------------------------------------------------------------------------------------------------


def latent_unet(channels=4, sample_size=8, classes=None):
    torch.manual_seed(1)
    levels = 2 if sample_size > 1 else 1
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8)[:levels],
        norm_num_groups=4,
        layers_per_block=1,
        add_attention=False,
        num_class_embeds=classes,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
    ).eval()


def pipeline_of(vae, scheduler=None, id2label=None, null_label=None, **network):
    scheduler = scheduler or DDPMAncestralScheduler(clip_sample=False)
    pipeline = GuidedDiffusionPipeline(latent_unet(**network), scheduler, id2label, null_label, vae=vae)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, output_type="pt", **arguments):
    arguments = {"batch_size": 2, "num_inference_steps": 3, "generator": seed(), **arguments}
    return pipeline(output_type=output_type, **arguments).images


MEAN, STD = (0.5, -1.0, 0.0, 2.0), (1.0, 0.5, 2.0, 4.0)


def per_channel(values):
    return torch.tensor(values).view(4, 1, 1)


def vq_model(**options):
    torch.manual_seed(0)
    codebook = {"latent_channels": 4, "num_vq_embeddings": 16, "scaling_factor": 0.5, **options}
    return VQModel(sample_size=16, **codebook, **BLOCKS).eval()


def vqvae_model(**options):
    torch.manual_seed(0)
    return VQVAEModel(**SMALL, latent_channels=4, num_vq_embeddings=16, scaling_factor=0.5, **options).eval()


AUTOENCODERS = {  # with what latents are before they are scaled, as a function of the data of the diffusion model
    "ours": (vae_of, lambda x: x / 0.7),
    "ours, shifted": (lambda: vae_of(shift_factor=0.3), lambda x: x / 0.7 + 0.3),
    "ours, flat": (lambda: vae_of(flat_latent=True), lambda x: x / 0.7),
    "ours, each channel": (
        lambda: vae_of(latents_mean=MEAN, latents_std=STD, shift_factor=0.3),
        lambda x: x * per_channel(STD) / 0.7 + per_channel(MEAN),
    ),
    "ours, quantised": (vqvae_model, lambda x: x / 0.5),
    "Diffusers'": (lambda: diffusers_vae(scaling_factor=0.18215), lambda x: x / 0.18215),
    "Diffusers', shifted": (lambda: diffusers_vae(scaling_factor=0.36, shift_factor=0.12), lambda x: x / 0.36 + 0.12),
    "Diffusers', quantised": (vq_model, lambda x: x / 0.5),
}
every_autoencoder = pytest.mark.parametrize(("build", "unscaled"), AUTOENCODERS.values(), ids=list(AUTOENCODERS))


def pipeline_around(build):
    vae = build()
    return pipeline_of(vae, sample_size=1 if vae.config.get("flat_latent") else 8)


@every_autoencoder
def test_an_image_is_decoded_from_the_latents_that_are_drawn(build, unscaled):
    pipeline = pipeline_around(build)
    latents = draw(pipeline, "latent")
    assert latents.shape[:2] == (2, 4)
    with torch.no_grad():
        expected = pipeline.vae.decode(unscaled(latents)).sample
    assert expected.shape == (2, 3, 16, 16)
    close(draw(pipeline), in_unit_range(expected))


@every_autoencoder
def test_latents_are_drawn_as_if_there_were_no_vae(build, unscaled):
    pipeline = pipeline_around(build)
    without = GuidedDiffusionPipeline(pipeline.unet, pipeline.scheduler)
    without.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipeline, "latent"), draw(without, "latent"))


@every_autoencoder
@torch.no_grad()
def test_what_images_are_encoded_to_is_what_is_drawn_and_decodes_to_their_reconstructions(build, unscaled):
    vae, x = build(), normal(2, 3, 16, 16).clamp(-1, 1)
    latents, encoded = latents_of_images(vae, x), vae.encode(x)
    z = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latents
    close(unscaled(latents), z)
    close(images_of_latents(vae, latents), vae.decode(z).sample)


@torch.no_grad()
def test_noise_draws_latents_from_the_posterior():
    vae, x, noise = vae_of(), normal(2, 3, 16, 16), normal(2, 4, 8, 8, number=2)
    posterior = vae.encode(x).latent_dist
    close(latents_of_images(vae, x, noise=noise), 0.7 * (posterior.mean + posterior.std * noise))


@pytest.mark.parametrize("build", [vq_model, vqvae_model])
def test_a_codebook_rounds_what_is_decoded(build):
    pipeline = pipeline_of(build())
    latents = draw(pipeline, "latent")
    nearby = latents + 1e-5 * normal(*latents.shape)
    close(pipeline.decode_latents(latents), pipeline.decode_latents(nearby))
    with torch.no_grad():
        unrounded = pipeline.vae.decode(latents / 0.5, force_not_quantize=True).sample
    assert (pipeline.decode_latents(latents) - unrounded).abs().max() > 1e-3


@pytest.mark.parametrize("embedded", [vqvae_model, vq_model])
def test_the_latents_of_a_codebook_have_the_size_of_its_vectors(embedded):
    pipeline = pipeline_of(embedded(vq_embed_dim=2), channels=2)
    latents = draw(pipeline, "latent")
    with torch.no_grad():
        close(draw(pipeline), in_unit_range(pipeline.vae.decode(latents / 0.5).sample))


def test_the_trajectory_stays_in_latents_and_can_be_decoded():
    pipeline = pipeline_of(vae_of())
    arguments = {"batch_size": 2, "num_inference_steps": 3, "generator": seed(), "output_type": "pt"}
    images, trajectory = pipeline(**arguments, return_trajectory=True, return_dict=False)
    assert trajectory.samples.shape == (4, 2, 4, 8, 8) and trajectory.predictions.shape == (3, 2, 4, 8, 8)
    assert torch.equal(trajectory.samples[-1], draw(pipeline, "latent"))
    close(in_unit_range(pipeline.decode_latents(trajectory.samples[-1])), images)


def test_pictures_have_the_channels_of_the_vae():
    assert [image.mode for image in draw(pipeline_of(vae_of()), "pil")] == ["RGB", "RGB"]  # latents have four
    with pytest.raises(ValueError, match="1 or 3 channels, this vae has 2"):
        draw(pipeline_of(vae_of(in_channels=2)), "pil")


# ---- classes --------------------------------------------------------------------------------------------------------

NAMES = {0: "cat", 1: "dog", 2: "emu"}


def latents_and_image(pipeline, **arguments):
    return draw(pipeline, "latent", **arguments), draw(pipeline, **arguments)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.0])
def test_a_conditional_vae_is_told_the_classes_that_are_drawn(w):
    pipeline = pipeline_of(vae_of(num_class_embeds=3), id2label=NAMES, null_label=3, classes=4)
    latents, image = latents_and_image(pipeline, class_labels=["dog", "emu"], guidance_scale=w)
    with torch.no_grad():
        expected, other = (
            in_unit_range(pipeline.vae.decode(latents / 0.7, torch.tensor(ids)).sample) for ids in ([1, 2], [2, 1])
        )
    close(image, expected)
    assert (image - other).abs().max() > 1e-3
    close(in_unit_range(pipeline.decode_latents(latents, ["dog", "emu"])), expected)


def test_an_unconditional_network_may_draw_the_latents_of_a_conditional_vae():
    """Its latents are those of all classes together."""
    pipeline = pipeline_of(vae_of(num_class_embeds=3), id2label=NAMES)
    latents, image = latents_and_image(pipeline, class_labels="emu")
    with torch.no_grad():
        close(image, in_unit_range(pipeline.vae.decode(latents / 0.7, torch.tensor([2, 2])).sample))


def test_a_vae_without_classes_is_told_none():
    pipeline = pipeline_of(vae_of(), id2label=NAMES, null_label=3, classes=4)
    for labels in ("dog", None):
        latents, image = latents_and_image(pipeline, class_labels=labels)
        with torch.no_grad():
            close(image, in_unit_range(pipeline.vae.decode(latents / 0.7).sample))


def test_classes_that_the_vae_needs_or_lacks_are_refused_before_sampling():
    pipeline = pipeline_of(vae_of(num_class_embeds=2), id2label=NAMES, null_label=3, classes=4)
    pipeline.unet.forward = None
    with pytest.raises(ValueError, match="the vae has 2 classes: it needs class_labels, or output_type='latent'"):
        draw(pipeline)
    with pytest.raises(ValueError, match="class label 2 is not one of the 2 classes of the vae"):
        draw(pipeline, class_labels="emu")
    with pytest.raises(ValueError, match=r"id2label names \[0, 1, 2\], but vae.config.num_class_embeds=2"):
        pipeline_of(vae_of(num_class_embeds=2), id2label=NAMES)


def test_latents_of_a_conditional_vae_need_no_class():
    pipeline = pipeline_of(vae_of(num_class_embeds=3), null_label=3, classes=4)
    assert draw(pipeline, "latent").shape == (2, 4, 8, 8)


# ---- what does not fit ----------------------------------------------------------------------------------------------


def test_latents_of_other_channels_than_the_vae_decodes_are_refused():
    with pytest.raises(ValueError, match="draws latents of 2 channels, and the vae decodes those of 4"):
        draw(pipeline_of(vae_of(), channels=2))


@pytest.mark.parametrize("scheduler", [DDPMAncestralScheduler(), DDIMScheduler()])
def test_a_scheduler_that_clips_to_the_range_of_images_is_refused(scheduler):
    with pytest.raises(ValueError, match=f"the {type(scheduler).__name__} clips x̂_0 .* clip_sample=False"):
        draw(pipeline_of(vae_of(), scheduler))


def test_a_pipeline_of_images_has_no_latents_to_decode():
    with pytest.raises(ValueError, match="it has no vae to decode latents with"):
        pipeline_of(None).decode_latents(torch.zeros(1, 4, 8, 8))


def test_restoration_with_a_vae_is_refused():
    pipeline = pipeline_of(vae_of())
    restoration = RestorationPipeline(**pipeline.components)
    with pytest.raises(ValueError, match="with a vae these are latents, .*set pipeline.vae = None"):
        restoration(torch.zeros(1, 4, 8, 8), Identity(), noise_level=0.1, output_type="pt")
    restoration.vae = None
    restoration.set_progress_bar_config(disable=True)
    measurement = torch.zeros(1, 4, 8, 8)
    assert restoration(measurement, Identity(), 0.1, num_inference_steps=2, output_type="latent").images.shape[1] == 4


# ---- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [vae_of, diffusers_vae])
@torch.no_grad()
def test_a_half_precision_vae_decodes_latents_of_single_precision(build):
    pipeline = pipeline_of(build())
    full = pipeline.decode_latents(draw(pipeline, "latent"))
    pipeline.vae.to(torch.bfloat16)
    half = pipeline.decode_latents(draw(pipeline, "latent"))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0, atol=0.05)


@pytest.mark.parametrize("force_upcast", [True, False])
@torch.no_grad()
def test_a_vae_that_would_overflow_in_float16_works_in_float32_for_a_while(force_upcast):
    vae = diffusers_vae(force_upcast=force_upcast).to(torch.float16)
    before, seen = copy.deepcopy(vae.state_dict()), []
    for part in (vae.encoder, vae.decoder):
        part.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].dtype))
    images_of_latents(vae, normal(1, 4, 8, 8)), latents_of_images(vae, normal(1, 3, 16, 16))
    assert set(seen) == {torch.float32 if force_upcast else torch.float16} and len(seen) == 2
    after = vae.state_dict()
    assert all(after[name].dtype == torch.float16 and torch.equal(after[name], before[name]) for name in before)


@torch.no_grad()
def test_weights_return_to_float16_even_if_decoding_fails():
    vae = diffusers_vae(force_upcast=True).to(torch.float16)
    with pytest.raises(RuntimeError):
        images_of_latents(vae, normal(1, 3, 8, 8))
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float16}


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [vae_of, vqvae_model, diffusers_vae, vq_model])
@pytest.mark.parametrize("loader", [GuidedDiffusionPipeline, AnnealersPipeline])
def test_a_saved_pipeline_comes_back_with_its_vae(build, loader, tmp_path):
    pipeline = pipeline_of(build())
    pipeline.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is GuidedDiffusionPipeline and type(loaded.vae) is type(pipeline.vae)
    assert torch.equal(draw(loaded), draw(pipeline))


def test_a_vae_that_is_set_later_is_saved_and_one_that_is_removed_is_not(tmp_path):
    pipeline = pipeline_of(None)
    pipeline.vae = vae_of()
    pipeline.save_pretrained(tmp_path / "with")
    assert torch.equal(draw(GuidedDiffusionPipeline.from_pretrained(tmp_path / "with")), draw(pipeline_of(vae_of())))
    pipeline.vae = None
    pipeline.save_pretrained(tmp_path / "without")
    assert GuidedDiffusionPipeline.from_pretrained(tmp_path / "without").vae is None


@pytest.mark.parametrize("build", [vae_of, diffusers_vae])
def test_an_export_holds_the_code_of_our_vae(build, tmp_path):
    pipeline = pipeline_of(build())
    export(pipeline, tmp_path)
    assert len(list((tmp_path / "vae").glob("*.py"))) == (build is vae_of)
    loaded = GuidedDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded), draw(pipeline))


def test_pictures_of_a_whole_run_are_pil_images():
    assert isinstance(draw(pipeline_of(vae_of()), "pil")[0], PIL.Image.Image)
