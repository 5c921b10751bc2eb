"""The restoring network's script: its loss, what it measures, and that a run is a function of its options and seed."""

import json
from functools import cache

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image, ImageChops
from safetensors.torch import load_file
from two_processes import train_on_two_processes

from annealers import ColdDiffusionScheduler, GuidedDiffusionPipeline
from annealers.data import load_data, validation_batches
from annealers.randomness import PositionalRandomness
from annealers.training.train_cold import ColdConfig, ColdTask, main

TINY = [
    *("--block_out_channels", "32", "--attention_levels", "0", "--batch_size", "16", "--validation_samples", "20"),
    *("--num_train_timesteps", "6", "--num_inference_steps", "3", "--sample_columns", "3", "--report_to", "none"),
    # With Adam's usual epsilon the first steps are the gradient's signs, which turn rounding into steps of full size.
    *("--adam_epsilon", "0.01", "--learning_rate", "0.01", "--lr_scheduler", "constant", "--log_every", "2"),
]


def arguments(folder, *more):
    return [*TINY, "--output_dir", str(folder), "--max_steps", "4", "--checkpoint_every", "2", *map(str, more)]


def weights(folder):
    return load_file(folder / "checkpoints" / "checkpoint-00000004" / "model.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@cache
def digits():
    return load_data(ColdConfig())


def task(**options):
    config = ColdConfig(**{"block_out_channels": [32], "attention_levels": [0], **options})
    return ColdTask(config, digits(), PositionalRandomness(0))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    main(arguments(folder))
    return folder


# ---- exactness ------------------------------------------------------------------------------------------------------


def test_two_processes_train_measure_and_picture_as_one_does(one_process, tmp_path):
    train_on_two_processes("train_cold", [arguments(tmp_path)])
    assert largest_difference(weights(one_process), weights(tmp_path)) < 1e-5
    for ours, theirs in zip(metrics(one_process), metrics(tmp_path), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    pictures = [Image.open(folder / "samples.png") for folder in (one_process, tmp_path)]
    assert ImageChops.difference(*pictures).getextrema()[1] <= 2


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(one_process, tmp_path):
    main(arguments(tmp_path, "--resume", one_process / "checkpoints" / "checkpoint-00000002"))
    assert largest_difference(weights(one_process), weights(tmp_path)) == 0


def test_the_comparison_of_runs_can_fail(one_process, tmp_path):
    main(arguments(tmp_path, "--seed", 1))
    assert largest_difference(weights(one_process), weights(tmp_path)) > 1e-3


# ---- what a run leaves ----------------------------------------------------------------------------------------------


def test_the_saved_pipeline_restores_and_draws(one_process):
    pipeline = GuidedDiffusionPipeline.from_pretrained(one_process / "pipeline")
    scheduler = pipeline.scheduler
    assert type(scheduler) is ColdDiffusionScheduler and scheduler.config.sampler == "improved"
    assert (scheduler.config.blur_sigma_max, len(scheduler)) == (8.0, 6)
    latents = scheduler.terminal_sample((2, 1, 8, 8), torch.Generator().manual_seed(0))
    assert len(pipeline(latents=latents, num_inference_steps=3).images) == 2
    card = (one_process / "pipeline" / "README.md").read_text()
    assert "improved_error_quarter_4" in card
    (example,) = [line for line in card.splitlines() if line.startswith("images = ")]
    exec(example, names := {"pipeline": pipeline})
    assert len(names["images"]) == 4


def test_a_picture_has_a_row_for_the_degraded_images_each_way_and_the_truth(one_process):
    size = 8 * 6  # enlarged to be seen
    assert Image.open(one_process / "samples.png").size == (3 * size + 2 * 2, 5 * size + 4 * 2)


@pytest.mark.parametrize("degradation", ["downsample", "mask"])
def test_every_degradation_trains_with_labels_and_squared_error(degradation, tmp_path):
    options = ["--degradation", degradation, "--loss", "l2", "--class_conditional", "--max_steps", 1]
    main(arguments(tmp_path, *options))
    pipeline = GuidedDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline.scheduler.config.degradation == degradation
    latents = pipeline.scheduler.terminal_sample((2, 1, 8, 8), torch.Generator().manual_seed(0))
    assert len(pipeline(latents=latents, class_labels=["1", "2"], num_inference_steps=2).images) == 2


def test_images_of_two_channels_and_no_held_out_split_train_and_are_pictured(tmp_path):
    generator, folder = np.random.default_rng(0), tmp_path / "data"
    arrays = list(generator.integers(0, 256, (20, 8, 8, 2), dtype=np.uint8))
    features = datasets.Features({"image": datasets.Array3D((8, 8, 2), "uint8")})
    folder.mkdir()
    datasets.Dataset.from_dict({"image": arrays}, features=features).to_parquet(
        folder / "train-00000-of-00001.parquet"
    )
    options = ["--dataset", folder, "--holdout", 0, "--class_conditional", "--max_steps", 1]
    main(arguments(tmp_path / "run", *options))
    size = 8 * 6
    picture = Image.open(tmp_path / "run" / "samples.png")
    assert picture.size == (3 * 2 * size + 2 * 2, 5 * size + 4 * 2)  # the channels beside each other
    assert not [entry for entry in metrics(tmp_path / "run") if "validation/images" in entry]


def test_a_network_learns_to_restore(tmp_path):
    """In 30 steps, from an error of about that of the degraded images themselves."""
    options = ["--max_steps", 30, "--checkpoint_every", 0, "--ema_decay", 0]
    main(arguments(tmp_path, *options, "--adam_epsilon", 1e-8, "--learning_rate", 3e-3))
    losses = [entry["loss"] for entry in metrics(tmp_path) if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


# ---- the objective and what is measured -----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_the_loss_is_the_weighted_error_of_the_restored_image(loss, monkeypatch):
    objective = task(degradation="downsample", downsample_factor=4, loss=loss).build()
    seen = []

    def answer(x, t, class_labels):
        seen.append((x, t))
        return UNet2DOutput(torch.full_like(x, 0.25))

    monkeypatch.setattr(objective.network, "forward", answer)
    images, timesteps = torch.rand(3, 1, 8, 8) * 2 - 1, torch.tensor([0, 20, 49])
    terms = objective(images, timesteps, torch.tensor([1.0, 2.0, 0.5]))
    error = (images - 0.25).abs() if loss == "l1" else (images - 0.25) ** 2
    torch.testing.assert_close(terms["loss"], error.mean((1, 2, 3)) * torch.tensor([1.0, 2.0, 0.5]))
    ((x_t, t),) = seen
    assert torch.equal(t, timesteps)
    torch.testing.assert_close(x_t[2, 0, :4, 4:], images[2, 0, :4, 4:].mean().expand(4, 4))


def test_timesteps_are_drawn_from_all_of_them():
    cold = task(num_train_timesteps=5)
    draws = cold.draws({"images": torch.zeros(1000, 1, 1, 1), "first_position": 0})
    assert draws["timesteps"].unique().tolist() == [0, 1, 2, 3, 4]
    assert draws.keys() == {"images", "timesteps", "timestep_weights"}


def test_unset_sizes_are_those_of_the_images():
    config = task().build().scheduler.config
    assert (config.blur_sigma_max, config.downsample_factor, config.mask_sigma_max) == (8.0, 8, 4.0)


@pytest.mark.parametrize(
    ("degradation", "name", "value"),
    [("blur", "blur_sigma_max", 3.0), ("downsample", "downsample_factor", 2), ("mask", "mask_sigma_max", 1.0)],
)
def test_sizes_that_are_set_are_those_of_the_degradation(degradation, name, value):
    assert task(degradation=degradation, **{name: value}).build().scheduler.config[name] == value


@pytest.mark.parametrize(("T", "starts"), [(50, [12, 24, 37, 49]), (4, [0, 1, 2, 3]), (3, [0, 1, 2, 2])])
def test_restoration_starts_from_the_end_of_each_quarter(T, starts):
    assert [task(num_train_timesteps=T).start(quarter) for quarter in (1, 2, 3, 4)] == starts


def test_a_shorter_restoration_takes_its_share_of_the_steps(monkeypatch):
    cold = task(num_train_timesteps=20, num_inference_steps=10)
    objective, called = cold.build(), []

    def answer(x, t, class_labels, return_dict=True):
        called.append(int(t))
        return UNet2DOutput(x) if return_dict else (x,)

    monkeypatch.setattr(objective.network, "forward", answer)
    cold.restorations(objective, torch.zeros(1, 1, 8, 8), None, start=9)
    assert called == [9] + 2 * [9, 7, 5, 3, 1]  # directly, and with two samplers


def test_validation_is_the_error_of_each_way_from_each_quarter(monkeypatch):
    """A network that answers a constant c: directly the error is that of c, and the chains have closed forms.

    The naive chain ends on c too. The improved one telescopes to x_T - D(c, T - 1) + c, and a constant stays what it
    is under downsampling, so it ends on the degraded image itself.
    """
    cold = task(degradation="downsample", downsample_factor=4, num_train_timesteps=8, validation_samples=20)
    objective = cold.build()

    def answer(x, t, class_labels, return_dict=True):
        output = torch.full_like(x, 0.25)
        return UNet2DOutput(output) if return_dict else (output,)

    monkeypatch.setattr(objective.network, "forward", answer)
    values = cold.validate(objective, Accelerator())
    x_0 = torch.cat([batch["images"] for batch in validation_batches(cold.data, 64, max_samples=20)])
    for quarter, start in enumerate((1, 3, 5, 7)):
        constant = (x_0 - 0.25).abs().mean().item()
        degraded = (x_0 - objective.scheduler.add_noise(x_0, None, start)).abs().mean().item()
        assert values[f"direct_error_quarter_{quarter + 1}"] == pytest.approx(constant, rel=1e-5)
        assert values[f"naive_error_quarter_{quarter + 1}"] == pytest.approx(constant, rel=1e-5)
        assert values[f"improved_error_quarter_{quarter + 1}"] == pytest.approx(degraded, rel=1e-5)
    assert values["images"] == 20
