"""Training in the latents of an autoencoder: what is trained on, what is saved, and what is refused."""

import json

import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from annealers import GuidedDiffusionPipeline, VAEModel, VAEPipeline, VQVAEModel, VQVAEPriorPipeline
from annealers.configuration import parse_config
from annealers.data import DataConfig, load_data
from annealers.pipelines.latent_space import latents_of_images
from annealers.randomness import PositionalRandomness
from annealers.training.first_stage import FirstStage
from annealers.training.train_classifier import check_match
from annealers.training.train_ddpm import DDPMConfig, DDPMTask, main

SMALL = {"in_channels": 1, "sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4}
TINY = [
    *("--block_out_channels", "32", "32", "--attention_levels", "1", "--batch_size", "16"),
    *("--validation_samples", "20", "--num_inference_steps", "2", "--sample_columns", "1", "--report_to", "none"),
    *("--adam_epsilon", "0.01", "--learning_rate", "0.01", "--lr_scheduler", "constant", "--max_steps", "4"),
]
NAMES = {digit: str(digit) for digit in range(10)}


def vae_of(**options):
    torch.manual_seed(0)
    return VAEModel(**{**SMALL, "latent_channels": 3, "scaling_factor": 0.7, **options}).eval()


def saved(folder, model, id2label=None):
    VAEPipeline(model, id2label).save_pretrained(folder)
    return str(folder)


def unet_of(channels, size):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    return UNet2DModel(size, channels, channels, **blocks)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("conditional"), vae_of(num_class_embeds=10), NAMES)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("plain"), vae_of())


@pytest.fixture(scope="module")
def one_process(conditional, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    main([*TINY, "--vae", conditional, "--output_dir", str(folder)])
    return folder


def task_of(*options):
    config = parse_config(DDPMConfig, [*TINY, *options], "")
    return DDPMTask(config, load_data(config), PositionalRandomness(config.seed))


def batch(count=6, first=0):
    images = torch.randint(256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(3)) / 127.5 - 1
    positions = torch.arange(first, first + count)
    return {"images": images, "first_position": first, "positions": positions, "labels": positions % 10}


# ---- what is trained on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", ["0", "1"])
def test_the_network_sees_scaled_draws_of_the_posterior_of_the_images_own_classes(conditional, dropout):
    task = task_of("--vae", conditional, "--condition_dropout", dropout)
    objective, seen = task.build(), []
    objective.scheduler.add_noise = lambda x, *_: seen.append(x) or x
    draws = task.draws(batch())
    assert draws["noise"].shape == draws["posterior_noise"].shape == (6, 3, 4, 4)
    assert not torch.equal(draws["noise"], draws["posterior_noise"])
    objective(**draws)
    vae = VAEPipeline.from_pretrained(conditional).vae
    with torch.no_grad():
        posterior = vae.encode(batch()["images"], batch()["labels"]).latent_dist
    torch.testing.assert_close(seen[0], 0.7 * (posterior.mean + posterior.std * draws["posterior_noise"]))


def test_an_image_is_drawn_anew_at_each_position_and_the_same_again_at_the_same(plain):
    task = task_of("--vae", plain)
    first, again, later = (task.draws(batch(first=first))["posterior_noise"] for first in (0, 0, 6))
    assert torch.equal(first, again) and not torch.equal(first, later)


def test_codes_of_a_codebook_have_no_posterior_to_draw_from(tmp_path):
    torch.manual_seed(0)
    vqvae = VQVAEModel(**SMALL, latent_channels=3, num_vq_embeddings=16, scaling_factor=0.5).eval()
    VQVAEPriorPipeline(vqvae).save_pretrained(tmp_path)
    task = task_of("--vae", str(tmp_path))
    images, draws = batch()["images"], task.draws(batch())
    latents = task.first_stage.latents(images, None, draws["posterior_noise"])
    with torch.no_grad():
        torch.testing.assert_close(latents, 0.5 * vqvae.encode(images).latents)


def test_the_autoencoder_learns_nothing_and_is_no_part_of_the_checkpoint(plain, one_process):
    objective = task_of("--vae", plain).build()
    assert not any("first_stage" in name or "vae" in name for name in objective.state_dict())
    before = {name: value.clone() for name, value in objective.first_stage.vae.state_dict().items()}
    objective(**task_of("--vae", plain).draws(batch()))["loss"].sum().backward()
    assert all(parameter.grad is None for parameter in objective.first_stage.vae.parameters())
    assert all(torch.equal(value, before[name]) for name, value in objective.first_stage.vae.state_dict().items())


def test_a_flat_latent_is_a_pixel_of_many_channels(tmp_path):
    name = saved(tmp_path, vae_of(flat_latent=True, latent_channels=5))
    with pytest.raises(ValueError, match="latents of 1 x 1 do not allow"):
        task_of("--vae", name).build()
    network = task_of("--vae", name, "--block_out_channels", "32", "--attention_levels", "0").build().network
    assert (network.config.in_channels, network.config.sample_size) == (5, 1)


# ---- what comes of it -----------------------------------------------------------------------------------------------


def test_the_pipeline_of_a_run_draws_images_of_classes(one_process, conditional):
    pipeline = GuidedDiffusionPipeline.from_pretrained(one_process / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config.in_channels == 3 and pipeline.unet.config.sample_size == 4
    assert pipeline.scheduler.config.clip_sample is False
    expected = VAEPipeline.from_pretrained(conditional).vae.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in pipeline.vae.state_dict().items())
    images = pipeline(class_labels=["3", "8"], guidance_scale=2.0, num_inference_steps=2).images
    assert [image.size for image in images] == [(8, 8), (8, 8)]


def test_validation_has_losses_and_no_bound_of_images(one_process):
    lines = [json.loads(line) for line in (one_process / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if any("quarter" in name for name in line)]
    assert validated and not any("vlb" in name for line in validated for name in line)


def test_the_pictures_of_a_run_are_of_decoded_images(one_process):
    with PIL.Image.open(one_process / "samples.png") as picture:
        assert (picture.mode, picture.size) == ("L", (48, 10 * 48 + 9 * 2))  # a grey image of 8 x 8 for each class


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"learned_variance": True}, {"loss": "vlb"}])
def test_a_bound_of_images_is_not_one_of_latents(options):
    with pytest.raises(ValueError, match="cannot be trained on latents, --vae"):
        DDPMConfig(vae="anything", **options)


def test_a_pipeline_without_an_autoencoder_is_refused(tmp_path):
    unet = UNet2DModel(
        8, 1, 1, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    GuidedDiffusionPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a pipeline with an autoencoder, vae or vqvae; .* has .*scheduler, unet"):
        FirstStage(str(tmp_path), load_data(DataConfig()), class_conditional=True)


@pytest.mark.parametrize(
    ("model", "names", "class_conditional", "message"),
    [
        ({"in_channels": 3}, None, True, "of images of 3 channels, those of digits 1"),
        ({"num_class_embeds": 4}, None, True, "has the classes 4, training has {0: '0'"),
        ({"num_class_embeds": 10}, NAMES | {0: "null"}, True, "has the classes {0: 'null'"),
        ({"num_class_embeds": 10}, NAMES, False, "training has None"),
    ],
)
def test_an_autoencoder_of_other_images_or_classes_is_refused(tmp_path, model, names, class_conditional, message):
    name = saved(tmp_path, vae_of(**model), names)
    with pytest.raises(ValueError, match=message):
        FirstStage(name, load_data(DataConfig()), class_conditional)


def test_no_classifier_is_trained_on_images_for_a_model_of_latents(plain):
    pipeline = GuidedDiffusionPipeline(
        UNet2DModel(
            4, 3, 3, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
        ),
        DDIMScheduler(),
        vae=VAEPipeline.from_pretrained(plain).vae,
    )
    with pytest.raises(ValueError, match="draws latents, of which this script trains no classifier"):
        check_match(load_data(DataConfig()), pipeline)


def test_latents_of_half_precision_images_are_computed_in_single_precision(plain):
    stage, images = FirstStage(plain, load_data(DataConfig()), class_conditional=False), batch()["images"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = stage.latents(images, None, None)
    expected = latents_of_images(stage.vae, images.float())
    assert latents.dtype == torch.bfloat16 and torch.equal(latents, expected.bfloat16())
