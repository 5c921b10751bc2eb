"""A run that trains an autoencoder: it does not depend on the processes, learns to denoise, and shows what it has."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageChops
from safetensors.torch import load_file
from two_processes import train_on_two_processes

from annealers import AutoencoderModel, DenoisingAutoencoderPipeline
from annealers.data import load_data, validation_batches
from annealers.randomness import PositionalRandomness
from annealers.training.train_autoencoder import AutoencoderConfig, AutoencoderTask, main

TINY = [
    *("--block_out_channels", "8", "8", "--norm_groups", "4", "--latent_channels", "6", "--attention", "false"),
    *("--batch_size", "16", "--validation_samples", "20", "--num_inference_steps", "4", "--sample_columns", "3"),
    *("--report_to", "none", "--log_every", "2", "--max_steps", "4", "--checkpoint_every", "2"),
    # With Adam's usual epsilon the first steps are the gradient's signs, which turn rounding into steps of full size.
    *("--adam_epsilon", "0.01", "--learning_rate", "0.01", "--lr_scheduler", "constant"),
]


def arguments(folder, *more):
    return [*TINY, "--output_dir", str(folder), *map(str, more)]


def weights(folder, kind="pipeline"):
    if kind == "pipeline":
        return load_file(folder / "pipeline" / "autoencoder" / "diffusion_pytorch_model.safetensors")
    return load_file(folder / "checkpoints" / "checkpoint-00000004" / "model.safetensors")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    main(arguments(folder))
    return folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    train_on_two_processes("train_autoencoder", [arguments(folder, "--gradient_accumulation_steps", 2)])
    return folder


def task_of(**options):
    """The task of a run, with the options of its command line."""
    config = AutoencoderConfig(**options)
    return AutoencoderTask(config, load_data(config), PositionalRandomness(0))


# ---- the run --------------------------------------------------------------------------------------------------------


def test_two_processes_with_accumulation_train_the_weights_of_one(one_process, two_processes):
    assert largest_difference(weights(one_process, "live"), weights(two_processes, "live")) < 1e-5
    assert largest_difference(weights(one_process), weights(two_processes)) < 1e-5


def test_losses_and_validation_are_the_same_on_two_processes(one_process, two_processes):
    for ours, theirs in zip(metrics(one_process), metrics(two_processes), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds", "grad_norm"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_the_picture_is_the_same_on_two_processes(one_process, two_processes):
    pictures = [Image.open(folder / "samples.png") for folder in (one_process, two_processes)]
    assert ImageChops.difference(*pictures).getextrema()[1] <= 2


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(one_process, tmp_path):
    main(arguments(tmp_path, "--resume", one_process / "checkpoints" / "checkpoint-00000002"))
    assert largest_difference(weights(one_process, "live"), weights(tmp_path, "live")) == 0
    assert largest_difference(weights(one_process), weights(tmp_path)) == 0


def test_what_is_saved_is_the_walk_of_the_averaged_autoencoder(one_process):
    pipeline = DenoisingAutoencoderPipeline.from_pretrained(one_process / "pipeline")
    assert type(pipeline.autoencoder) is AutoencoderModel and pipeline.autoencoder.config.noise_std == 0.5
    averaged = load_file(one_process / "checkpoints" / "checkpoint-00000004" / "ema.safetensors")
    assert all(torch.equal(value, averaged[f"network.{name}"]) for name, value in weights(one_process).items())
    assert [image.size for image in pipeline(batch_size=2, num_inference_steps=2).images] == [(8, 8), (8, 8)]


def test_the_card_says_how_to_walk_and_what_was_measured(one_process):
    card = (one_process / "pipeline" / "README.md").read_text()
    assert "pipeline(batch_size=4, num_inference_steps=4, step_size=0.25)" in card
    assert "mean_squared_error_without_noise" in card and "autoencoder" in card


def test_it_learns_to_take_noise_away(tmp_path):
    """Left as they are, noisy images are 0.25 off in the mean square, and the mean of the digits is 0.29 off."""
    options = ["--max_steps", 60, "--learning_rate", 0.005, "--adam_epsilon", 1e-8, "--batch_size", 32]
    main(arguments(tmp_path, *options, "--ema_decay", 0, "--validation_samples", 100, "--latent_channels", 16))
    last = metrics(tmp_path)[-1]
    assert last["validation/mean_squared_error"] < 0.18
    assert last["validation/loss"] == pytest.approx(64 * last["validation/mean_squared_error"], rel=1e-4)
    assert last["validation/mean_squared_error_without_noise"] < last["validation/mean_squared_error"]


# ---- the task -------------------------------------------------------------------------------------------------------


def batch_of(count, first=0):
    return {"images": torch.zeros(count, 1, 8, 8), "first_position": first}


def test_the_noise_of_an_image_depends_on_its_position_alone():
    task = task_of()
    noise = task.draws(batch_of(4000))["noise"]
    assert torch.equal(task.draws(batch_of(10, first=7))["noise"], noise[7:17])
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
    assert (task.noise_of(batch_of(10), "validation")["noise"] != noise[:10]).any()


def test_a_plain_autoencoder_is_trained_without_noise_and_pictured_without_a_walk(tmp_path):
    assert task_of(noise_std=0.0).draws(batch_of(3)).keys() == {"images"}
    main(arguments(tmp_path, "--noise_std", 0, "--max_steps", 1))
    assert Image.open(tmp_path / "samples.png").size == (3 * 50 - 2, 2 * 50 - 2)  # images and reconstructions
    last = metrics(tmp_path)[-1]
    assert last["validation/mean_squared_error"] == pytest.approx(last["validation/mean_squared_error_without_noise"])


def test_the_picture_shows_images_noisy_images_what_is_made_of_them_and_a_walk(one_process):
    picture = np.asarray(Image.open(one_process / "samples.png")).astype(float) / 127.5 - 1
    assert picture.shape == (7 * 50 - 2, 3 * 50 - 2)
    rows = np.stack(
        [[picture[50 * r : 50 * r + 48 : 6, 50 * c : 50 * c + 48 : 6] for c in range(3)] for r in range(7)]
    )
    task = task_of()
    (batch,) = validation_batches(task.data, 3, max_samples=3)
    images = batch["images"][:, 0].numpy()
    assert np.abs(rows[0] - images).max() < 1 / 127
    noisy = images + 0.5 * task.noise_of(batch, "picture")["noise"][:, 0].numpy()
    assert np.abs(rows[1] - noisy.clip(-1, 1)).max() < 1 / 127
    pipeline = DenoisingAutoencoderPipeline.from_pretrained(one_process / "pipeline")
    with torch.no_grad():
        denoised = pipeline.autoencoder.denoise(torch.from_numpy(noisy)[:, None].float())[:, 0].numpy()
    assert np.abs(rows[2] - denoised.clip(-1, 1)).max() < 0.02
    walked = pipeline(
        generator=[torch.Generator().manual_seed(task.randomness.step_seed(i, 0)) for i in range(3)],
        num_inference_steps=4,
        step_size=0.25,
        output_type="latent",
        return_trajectory=True,
    ).trajectory.samples[[0, 0, 1, 4], :, 0]
    assert np.abs(rows[3:] - walked.clamp(-1, 1).numpy()).max() < 0.02


def test_validation_counts_every_image_once(monkeypatch):
    task = task_of(validation_samples=37, batch_size=16, block_out_channels=[8], norm_groups=4)
    seen = []
    forward = AutoencoderModel.forward

    def remembering(self, sample, noise=None, **options):
        seen.append((sample, noise))
        return forward(self, sample, noise, **options)

    monkeypatch.setattr(AutoencoderModel, "forward", remembering)
    objective = task.build().eval()
    with torch.no_grad():
        values = task.validate(objective, Accelerator())
    images, noise = (torch.cat(column) for column in zip(*seen, strict=True))
    assert values["images"] == len(images) == 37
    held_out = torch.cat([batch["images"] for batch in validation_batches(task.data, 16, max_samples=37)])
    assert torch.equal(images, held_out)
    assert not torch.isin(noise, task.draws(batch_of(37))["noise"]).all()  # not that of the first training images
    with torch.no_grad():
        errors = objective.network.denoise(images + 0.5 * noise) - images
        clean = objective.network.denoise(images) - images
    assert values["mean_squared_error"] == pytest.approx(errors.square().mean().item(), rel=1e-4)
    assert values["loss"] == pytest.approx(errors.square().sum(dim=(1, 2, 3)).mean().item(), rel=1e-4)
    assert values["mean_squared_error_without_noise"] == pytest.approx(clean.square().mean().item(), rel=1e-4)


def test_the_options_describe_the_network():
    config = (
        task_of(
            block_out_channels=[8, 16, 24],
            layers_per_block=2,
            norm_groups=4,
            attention=False,
            latent_channels=5,
            flat_latent=False,
            noise_std=0.2,
        )
        .build()
        .network.config
    )
    assert tuple(config.block_out_channels) == (8, 16, 24)
    assert (config.layers_per_block, config.norm_num_groups, config.mid_block_add_attention) == (2, 4, False)
    assert (config.latent_channels, config.flat_latent, config.noise_std) == (5, False, 0.2)
    assert (config.in_channels, config.out_channels, config.sample_size) == (1, 1, 8)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--block_out_channels", "8", "10"], r"multiples of norm_groups, got \[8, 10\] and 4"),
        (["--norm_groups", "0"], "multiples of norm_groups"),
        (["--sample_columns", "0"], "sample_columns must be at least 1, got 0"),
    ],
)
def test_an_option_out_of_range_ends_with_a_usage_message(tmp_path, options, named, capsys):
    with pytest.raises(SystemExit):
        main(arguments(tmp_path, *options))
    assert named.replace("\\", "") in capsys.readouterr().err


def test_images_that_the_levels_cannot_halve_are_refused(tmp_path):
    with pytest.raises(ValueError, match="8 x 8 pixels do not allow"):
        main(arguments(tmp_path, "--block_out_channels", 8, 8, 8, 8, 8))
