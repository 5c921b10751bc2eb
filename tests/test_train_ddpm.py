"""A run is a function of its options and seed: not of processes, accumulation, interruptions or what came before."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.models.unets.unet_2d import UNet2DOutput
from fake_hub import FakeHub
from PIL import Image, ImageChops
from safetensors.torch import load_file
from two_processes import TORCHRUN, train_on_two_processes

from annealers import GuidedDiffusionPipeline, VAEModel, VAEPipeline
from annealers.configuration import check_same_run, config_to_dict, parse_config
from annealers.data import load_data, validation_batches
from annealers.losses import variational_bound_term
from annealers.randomness import PositionalRandomness
from annealers.run import NonFiniteLossError
from annealers.score_matching import denoising_score_matching, score_weight
from annealers.timestep_sampling import make_timestep_sampler
from annealers.training.train_ddpm import DDPMConfig, DDPMTask, DenoisingObjective, main

ROOT = Path(__file__).parents[1]
TINY = [
    *(
        "--block_out_channels",
        "32",
        "32",
        "--attention_levels",
        "1",
        "--batch_size",
        "16",
        "--validation_samples",
        "20",
    ),
    *("--num_inference_steps", "2", "--sample_columns", "1", "--report_to", "none", "--log_every", "2"),
    # With Adam's usual epsilon the first steps are the gradient's signs, which turn rounding into steps of full size.
    *("--adam_epsilon", "0.01", "--learning_rate", "0.01", "--lr_scheduler", "constant"),
]
# Four timesteps, so that the sampler has its ten losses of each after three of the six steps.
SAMPLED = {
    "stratified": ["--timestep_sampling", "stratified", "--learned_variance", "--weighting", "likelihood"],
    "by loss": ["--timestep_sampling", "loss_second_moment", "--loss", "vlb", "--learned_variance"],
}
SAMPLED["by loss"] += ["--num_train_timesteps", "4"]


def arguments(folder, *more):
    return [*TINY, "--output_dir", str(folder), "--max_steps", "6", "--checkpoint_every", "3", *map(str, more)]


def weights(folder, kind="pipeline"):
    if kind == "pipeline":
        return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    return load_file(folder / "checkpoints" / "checkpoint-00000006" / "model.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    main(arguments(folder))
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """The folder of an autoencoder with classes."""
    torch.manual_seed(0)
    size = {"in_channels": 1, "sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4}
    folder = tmp_path_factory.mktemp("autoencoder")
    VAEPipeline(VAEModel(**size, num_class_embeds=10, scaling_factor=0.7)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, autoencoder):
    """Runs on two processes: whole, with accumulation, resumed at step 3 of the first, sampled timesteps, latents."""
    root = tmp_path_factory.mktemp("two")
    resumed_from = str(root / "whole" / "checkpoints" / "checkpoint-00000003")
    runs = [
        arguments(root / "whole"),
        arguments(root / "accumulated", "--gradient_accumulation_steps", 2),
        arguments(root / "resumed", "--resume", resumed_from),
        *(arguments(root / name, *more, "--gradient_accumulation_steps", 2) for name, more in SAMPLED.items()),
        arguments(root / "latent", "--vae", autoencoder),
    ]
    train_on_two_processes("train_ddpm", runs, launcher=(*TORCHRUN, 2))
    return root


# ---- exactness ------------------------------------------------------------------------------------------------------


def test_two_processes_train_the_weights_of_one(one_process, two_processes):
    assert largest_difference(weights(one_process, "live"), weights(two_processes / "whole", "live")) < 1e-5
    assert largest_difference(weights(one_process), weights(two_processes / "whole")) < 1e-5


def test_two_processes_train_on_the_latents_of_one(two_processes, autoencoder, tmp_path):
    main(arguments(tmp_path, "--vae", autoencoder))
    assert largest_difference(weights(tmp_path, "live"), weights(two_processes / "latent", "live")) < 1e-5
    assert largest_difference(weights(tmp_path), weights(two_processes / "latent")) < 1e-5


def test_the_comparison_of_processes_can_fail(one_process, tmp_path):
    main(arguments(tmp_path, "--seed", 1))
    assert largest_difference(weights(one_process, "live"), weights(tmp_path, "live")) > 1e-3


def test_accumulation_trains_the_weights_of_whole_batches(one_process, two_processes, tmp_path):
    for accumulation in (1, 4):  # without clipping, which would hide a gradient of the wrong size
        options = ["--max_grad_norm", 0, "--gradient_accumulation_steps", accumulation]
        main(arguments(tmp_path / str(accumulation), *options))
    assert largest_difference(weights(tmp_path / "1", "live"), weights(tmp_path / "4", "live")) < 1e-5
    assert largest_difference(weights(one_process, "live"), weights(two_processes / "accumulated", "live")) < 1e-5


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(one_process, tmp_path):
    checkpoint = one_process / "checkpoints" / "checkpoint-00000003"
    main(arguments(tmp_path, "--resume", checkpoint))
    assert largest_difference(weights(one_process, "live"), weights(tmp_path, "live")) == 0
    assert largest_difference(weights(one_process), weights(tmp_path)) == 0


def test_a_resumed_run_goes_on_in_the_schedule_of_the_learning_rate(tmp_path):
    whole, resumed, cosine = tmp_path / "whole", tmp_path / "resumed", ["--lr_scheduler", "cosine"]
    main(arguments(whole, *cosine))
    main(arguments(resumed, *cosine, "--resume", whole / "checkpoints" / "checkpoint-00000003"))
    assert largest_difference(weights(whole, "live"), weights(resumed, "live")) == 0
    assert metrics(resumed)[-2]["learning_rate"] == metrics(whole)[-2]["learning_rate"]


def test_resuming_on_two_processes_is_bit_for_bit_too(two_processes):
    whole, resumed = two_processes / "whole", two_processes / "resumed"
    assert largest_difference(weights(whole, "live"), weights(resumed, "live")) == 0
    assert largest_difference(weights(whole), weights(resumed)) == 0


def test_one_process_can_resume_what_two_began(one_process, two_processes, tmp_path):
    main(arguments(tmp_path, "--resume", two_processes / "whole" / "checkpoints" / "checkpoint-00000003"))
    assert largest_difference(weights(one_process, "live"), weights(tmp_path, "live")) < 1e-5


@pytest.fixture(scope="module", params=SAMPLED)
def sampled(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled") / request.param
    main(arguments(folder, *SAMPLED[request.param]))
    return folder


def test_sampled_timesteps_train_the_same_weights_on_two_processes_with_accumulation(sampled, two_processes):
    ours, theirs = weights(sampled, "live"), weights(two_processes / sampled.name, "live")
    if sampled.name == "by loss":
        name = "timestep_sampler.losses"
        torch.testing.assert_close(ours.pop(name), theirs.pop(name), rtol=1e-5, atol=0)
    assert largest_difference(ours, theirs) < 1e-5
    assert largest_difference(weights(sampled), weights(two_processes / sampled.name)) < 1e-5


def test_a_resumed_run_draws_the_timesteps_of_the_uninterrupted_one(sampled, tmp_path):
    checkpoint = sampled / "checkpoints" / "checkpoint-00000003"
    main(arguments(tmp_path, *SAMPLED[sampled.name], "--resume", checkpoint))
    assert largest_difference(weights(sampled, "live"), weights(tmp_path, "live")) == 0
    assert largest_difference(weights(sampled), weights(tmp_path)) == 0


def test_what_the_sampler_has_learnt_is_in_the_checkpoint_and_not_in_the_pipeline(sampled):
    folder = sampled / "checkpoints" / "checkpoint-00000006"
    averaged = load_file(folder / "ema.safetensors")
    learnt = {name: value for name, value in weights(sampled, "live").items() if not name.startswith("network.")}
    assert not [name for name in weights(sampled) if "timestep" in name]
    if sampled.name == "stratified":
        assert not learnt
        return
    assert {name: value.shape for name, value in learnt.items()} == {
        "timestep_sampler.losses": (4, 10),
        "timestep_sampler.observed": (4,),
    }
    assert all(torch.equal(value, averaged[name]) for name, value in learnt.items())
    observed = learnt["timestep_sampler.observed"]
    assert observed.sum() == 6 * 16 and observed.min() > 12  # 4 x 4 of each in three steps without preference
    assert (observed - observed.min()).max() > 2  # and then with one
    assert (learnt["timestep_sampler.losses"] != 0).all()


def test_validation_and_losses_are_the_same_on_two_processes(one_process, two_processes):
    for ours, theirs in zip(metrics(one_process), metrics(two_processes / "whole"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_samples_are_the_same_picture_on_two_processes(one_process, two_processes):
    pictures = [Image.open(folder / "samples.png") for folder in (one_process, two_processes / "whole")]
    assert ImageChops.difference(*pictures).getextrema()[1] <= 2


# ---- what a run leaves ----------------------------------------------------------------------------------------------


def test_the_saved_pipeline_draws_the_averaged_weights(one_process):
    averaged = load_file(one_process / "checkpoints" / "checkpoint-00000006" / "ema.safetensors")
    saved = weights(one_process)
    assert all(torch.equal(saved[name], averaged[f"network.{name}"]) for name in saved)
    assert (
        largest_difference(saved, {k.removeprefix("network."): v for k, v in weights(one_process, "live").items()}) > 0
    )


def test_without_memory_the_average_is_the_last_step(tmp_path):
    main(arguments(tmp_path, "--ema_decay", 0))
    live = {name.removeprefix("network."): value for name, value in weights(tmp_path, "live").items()}
    assert largest_difference(weights(tmp_path), live) == 0


def test_the_pipeline_of_a_run_draws_classes_by_name(one_process):
    pipeline = GuidedDiffusionPipeline.from_pretrained(one_process / "pipeline")
    images = pipeline(class_labels=["3", "7"], num_inference_steps=2, guidance_scale=2.0).images
    assert [image.size for image in images] == [(8, 8), (8, 8)]


def test_a_run_records_its_options_command_and_metrics(one_process):
    record = json.loads((one_process / "run.json").read_text())
    assert record["config"]["batch_size"] == 16
    (bound,) = [metric for metric in record["metrics"] if metric["name"] == "vlb_bits_per_dim"]
    assert bound["value"] > 0 and bound["n"] == 20
    assert json.loads((one_process / "config.json").read_text()) == record["config"]


def test_a_token_on_the_command_line_is_written_nowhere(tmp_path):
    secret = "hf_never_write_me"
    main(arguments(tmp_path, "--max_steps", 1, "--hub_token", secret))
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_a_run_pushes_exactly_its_pipeline_with_its_card_and_token(tmp_path):
    with FakeHub() as hub:
        options = ["--push_to_hub", "--hub_model_id", "me/digits", "--hub-private", "--hub_token", hub.token]
        command = [sys.executable, ROOT / "training" / "train_ddpm.py", *arguments(tmp_path / "run", *options)]
        done = subprocess.run(command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if hub.token.encode() in path.read_bytes()]
    assert hub.repositories["me/digits"].private
    assert {request.token for request in hub.requests} == {hub.token}
    pushed = {name for name in hub.files("me/digits") if name != ".gitattributes"}
    saved = {
        str(path.relative_to(tmp_path / "run" / "pipeline")) for path in (tmp_path / "run" / "pipeline").rglob("*.*")
    }
    assert (
        pushed
        == saved
        == {
            "README.md",
            "model_index.json",
            "samples.png",
            "scheduler/scheduler_config.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
        }
    )
    card = hub.files("me/digits")["README.md"].decode()
    assert "me/digits" in card and "--max_steps 6" in card and "vlb_bits_per_dim" in card and hub.token not in card


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("annealers.run.is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match="wandb.*not installed"):
        main(arguments(tmp_path, "--report_to", "wandb"))


def test_options_come_from_a_file_and_the_command_line_wins(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("max-steps: 7\nblock_out_channels: [32, 64]\nflip: true\nlearning_rate: 3e-4\n")
    config = parse_config(DDPMConfig, ["--config", str(file), "--max-steps", "9"])
    assert (config.max_steps, config.block_out_channels, config.flip, config.learning_rate) == (
        9,
        [32, 64],
        True,
        3e-4,
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [("no_such_option: 1", "no_such_option"), ("max_steps: many", "many"), ("just words", "must hold")],
)
def test_a_wrong_option_in_the_file_ends_with_a_usage_message(tmp_path, text, named, capsys):
    (tmp_path / "options.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parse_config(DDPMConfig, ["--config", str(tmp_path / "options.yaml")])
    assert named in capsys.readouterr().err


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_rows(tmp_path, monkeypatch):
    forward = DenoisingObjective.forward
    calls = []

    def broken(self, images, **draws):
        terms = forward(self, images, **draws)
        calls.append(1)
        if len(calls) == 3:
            terms["loss"][5] = float("nan")
        return terms

    rows = []
    draws = DDPMTask.draws
    monkeypatch.setattr(DDPMTask, "draws", lambda self, batch: rows.append(batch["rows"]) or draws(self, batch))
    monkeypatch.setattr(DenoisingObjective, "forward", broken)
    with pytest.raises(NonFiniteLossError) as error:
        main(arguments(tmp_path))
    assert f"step 2 for the data rows [{rows[2][5].item()}]" in str(error.value)
    assert not list((tmp_path / "checkpoints").glob("checkpoint-*"))


def test_a_resolution_that_the_network_cannot_halve_is_refused(tmp_path):
    with pytest.raises(ValueError, match="halve the image 2 times, which 10 pixels do not allow"):
        main(arguments(tmp_path, "--resolution", 10, "--block_out_channels", 32, 32, 32))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--block_out_channels", "32", "44"], "multiples of norm_groups"),
        (["--num_train_timesteps", "10", "--num_inference_steps", "11"], "num_inference_steps must lie in 1 .. 10"),
        (["--attention_levels", "2"], "attention_levels must lie in 0 .. 1"),
        (["--condition_dropout", "1.5"], "condition_dropout must lie in"),
        (["--sample_columns", "0"], "sample_columns must be at least 1"),
        (["--max_steps", "0"], "max_steps must be at least 1"),
        (["--loss", "vlb", "--min_snr_gamma", "5"], "one weight, got --min-snr-gamma 5.0 and --loss vlb"),
        (["--weighting", "likelihood", "--min_snr_gamma", "5"], "got --weighting likelihood and --min-snr-gamma 5.0"),
        (["--timestep_sampling", "random"], "random"),
        (["--no_such_option", "1"], "no_such_option"),
    ],
)
def test_an_option_out_of_range_ends_with_a_usage_message(tmp_path, options, named, capsys):
    with pytest.raises(SystemExit):
        main(arguments(tmp_path, *options))
    assert named in capsys.readouterr().err


def test_a_batch_that_does_not_split_evenly_is_refused(tmp_path):
    with pytest.raises(ValueError, match="16"):
        main(arguments(tmp_path, "--gradient_accumulation_steps", 3))


def test_resuming_with_other_options_names_them(one_process, tmp_path):
    with pytest.raises(ValueError, match="learning_rate: 0.01 in the checkpoint, 0.5 now"):
        main(
            arguments(
                tmp_path, "--resume", one_process / "checkpoints" / "checkpoint-00000003", "--learning_rate", 0.5
            )
        )


def test_an_option_that_is_newer_than_the_checkpoint_counts_as_its_default():
    config = DDPMConfig(learning_rate=0.5)
    recorded = config_to_dict(config)
    del recorded["weight_decay"], recorded["block_out_channels"]
    check_same_run(config, recorded)
    with pytest.raises(ValueError, match=r"weight_decay: 0.0 in the checkpoint, 0.1 now"):
        check_same_run(replace(config, weight_decay=0.1), recorded)


def test_resuming_from_nothing_names_the_path(tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        main(arguments(tmp_path, "--resume", tmp_path / "nowhere"))


# ---- the objective --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [[], ["--min_snr_gamma", "5"], ["--learned_variance"], ["--loss", "vlb"]],
    ids=["simple", "snr", "hybrid", "vlb"],
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_every_objective_trains(tmp_path, options, prediction_type):
    main(arguments(tmp_path, "--max_steps", 1, "--prediction_type", prediction_type, *options))
    assert metrics(tmp_path)[-1]["step"] == 1


@pytest.mark.parametrize(("options", "hears"), [([], True), (["--norm_groups", "32"], False)])
def test_a_block_hears_the_timestep_unless_its_channels_are_normalised_one_by_one(tmp_path, options, hears):
    config = parse_config(DDPMConfig, [*arguments(tmp_path), *options])
    network = DDPMTask(config, load_data(config), PositionalRandomness(0)).build().network.eval()
    outputs = []
    network.down_blocks[0].resnets[0].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    for t in (10, 900):
        network(torch.zeros(1, 1, 8, 8), t, class_labels=torch.tensor([3]))
    assert torch.allclose(*outputs, atol=1e-5) != hears


def test_labels_are_dropped_at_the_rate_of_the_option(one_process):
    config = DDPMConfig(condition_dropout=0.25)
    task = DDPMTask(config, load_data(config), PositionalRandomness(0))
    n = 40_000
    batch = {"images": torch.zeros(n, 1, 1, 1), "labels": torch.zeros(n, dtype=torch.long), "first_position": 0}
    rate = (task.draws(batch)["class_labels"] == task.null_label).float().mean().item()
    standard_error = (0.25 * 0.75 / n) ** 0.5
    assert abs(rate - 0.25) < 4 * standard_error


def test_the_learning_rate_counts_optimizer_steps_whatever_the_accumulation(tmp_path):
    rates = []
    for accumulation in (1, 4):
        folder = tmp_path / str(accumulation)
        more = ["--gradient_accumulation_steps", accumulation, "--lr_scheduler", "cosine", "--lr_warmup_steps", 2]
        main(arguments(folder, *more, "--log_every", 1))
        rates.append([entry["learning_rate"] for entry in metrics(folder) if "learning_rate" in entry])
    cosine = [0.5 * (1 + torch.tensor(torch.pi * k / 4).cos().item()) for k in range(5)]
    assert rates[0] == rates[1] == pytest.approx([0.01 * factor for factor in [0.5, *cosine]], abs=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_with_min_snr_the_loss_is_the_capped_error_of_x_0_whatever_is_predicted(prediction_type):
    config = DDPMConfig(prediction_type=prediction_type, min_snr_gamma=5.0)
    objective = DDPMTask(config, load_data(config), PositionalRandomness(0)).build()
    images, noise = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 1, 8, 8)
    timesteps, labels = torch.tensor([0, 200, 600, 998]), torch.tensor([1, 2, 3, 10])
    with torch.no_grad():
        loss = objective(images, noise, timesteps, labels)["loss"]
        x_t = objective.scheduler.add_noise(images, noise, timesteps)
        output = objective.network(x_t, timesteps, class_labels=labels).sample
    x_0 = objective.scheduler.original_sample(output, x_t, timesteps)
    alphas_cumprod = objective.scheduler.alphas_cumprod[timesteps]
    error = (x_0 - images).square().mean((1, 2, 3))
    torch.testing.assert_close(
        loss, (alphas_cumprod / (1 - alphas_cumprod)).clamp(max=5) * error, rtol=1e-3, atol=1e-5
    )


def test_the_hybrid_loss_is_the_simple_one_plus_the_weighted_bound():
    config = DDPMConfig(learned_variance=True, vlb_weight=0.25)
    objective = DDPMTask(config, load_data(config), PositionalRandomness(0)).build()
    images, noise, timesteps = torch.rand(3, 1, 8, 8) * 2 - 1, torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 900])
    terms = objective(images, noise, timesteps, torch.tensor([0, 1, 2]))
    assert terms["loss"].shape == (3,)
    torch.testing.assert_close(terms["loss"], terms["simple"] + 0.25 * terms["bound"])


def built(**options):
    config = DDPMConfig(**options)
    task = DDPMTask(config, load_data(config), PositionalRandomness(0))
    generator = torch.Generator().manual_seed(0)
    images = (torch.randint(256, (3, 1, 8, 8), generator=generator) / 127.5 - 1).float()
    noise = torch.randn(3, 1, 8, 8, generator=generator)
    return task, (images, noise, torch.tensor([0, 5, 900]), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("learned_variance", [False, True])
def test_the_bound_alone_trains_mean_and_variance(learned_variance):
    task, draws = built(loss="vlb", learned_variance=learned_variance)
    objective = task.build()
    images, noise, timesteps, labels = draws
    x_t = objective.scheduler.add_noise(images, noise, timesteps)
    output = objective.network(x_t, timesteps, class_labels=labels).sample.detach().requires_grad_()
    objective.network.forward = lambda *args, **kwargs: UNet2DOutput(output)
    loss = objective(*draws)["loss"]
    bound = variational_bound_term(objective.scheduler, output, images, x_t, timesteps)
    torch.testing.assert_close(loss, 1000 * bound)
    loss.sum().backward()
    assert output.grad.shape[1] == 1 + learned_variance and (output.grad != 0).all()


@pytest.mark.parametrize("weighting", ["simple", "sigma_squared", "likelihood"])
def test_a_weighting_is_that_of_the_score(weighting):
    task, draws = built(weighting=weighting)
    objective = task.build()
    images, noise, timesteps, labels = draws
    with torch.no_grad():
        loss = objective(*draws)["loss"]
        x_t = objective.scheduler.add_noise(images, noise, timesteps)
        output = objective.network(x_t, timesteps, class_labels=labels).sample
    x_0 = objective.scheduler.original_sample(output, x_t, timesteps)
    alpha, sigma = (c.reshape(3, 1, 1, 1) for c in objective.scheduler.signal_and_noise(timesteps))
    error = denoising_score_matching((alpha * x_0 - x_t) / sigma**2, noise, sigma.flatten())
    expected = score_weight(weighting, objective.scheduler, timesteps) * error
    torch.testing.assert_close(loss, expected.float(), rtol=1e-3, atol=1e-5)


def test_every_term_is_multiplied_by_the_weight_of_its_timestep():
    task, draws = built(learned_variance=True)
    objective, weights = task.build(), torch.tensor([0.5, 1.0, 3.0])
    plain, weighted = objective(*draws), objective(*draws, timestep_weights=weights)
    assert plain.keys() == weighted.keys() == {"loss", "simple", "bound"}
    for name in plain:
        torch.testing.assert_close(weighted[name], weights * plain[name])


@pytest.mark.parametrize("kind", ["uniform", "stratified", "loss_second_moment"])
def test_timesteps_and_weights_are_those_of_the_sampler(kind):
    task, _ = built(timestep_sampling=kind, num_train_timesteps=4, num_inference_steps=4, batch_size=8)
    task.build()
    expected = make_timestep_sampler(kind, 4, PositionalRandomness(0))
    losses = torch.arange(1.0, 9.0)
    if kind == "loss_second_moment":
        for step in range(8):
            task.after_step(step, [{"loss": losses[:4]}, {"loss": losses[4:]}], Accelerator())
            timesteps, weights = expected.draw(step * 8, 8, batch_size=8)
            expected.observe(timesteps, losses / weights)
        for ours, theirs in zip(task.timestep_sampler.buffers(), expected.buffers(), strict=True):
            assert torch.equal(ours, theirs)
    else:
        task.after_step(0, [{"loss": losses}], None)  # nothing to learn: no communication
    batch = {"images": torch.zeros(3, 1, 8, 8), "labels": torch.zeros(3, dtype=torch.long), "first_position": 42}
    draws = task.draws(batch)
    timesteps, weights = expected.draw(42, 3, batch_size=8)
    assert torch.equal(draws["timesteps"], timesteps) and torch.equal(draws["timestep_weights"], weights)
    assert (weights == 1).all() == (kind != "loss_second_moment")


def test_validation_sums_the_bound_over_all_timesteps_and_splits_the_loss_by_quarter(monkeypatch):
    """Without noise x_t = alpha_t x_0, and a network that answers v = 0 predicts x_0 = alpha_t x_t: all is known."""
    T = 17
    # 17 small betas leave much signal at the last level, so that the prior's term counts as well
    config = DDPMConfig(num_train_timesteps=T, num_inference_steps=2, validation_samples=3, beta_schedule="linear")
    data = load_data(config)
    task = DDPMTask(config, data, PositionalRandomness(0))
    objective = task.build()
    monkeypatch.setattr(PositionalRandomness, "normal", lambda self, name, first, n, shape: torch.zeros(n, *shape))
    monkeypatch.setattr(PositionalRandomness, "uniform", lambda self, name, first, n: torch.full((n,), 0.5))
    monkeypatch.setattr(objective.network, "forward", lambda x, t, class_labels: UNet2DOutput(torch.zeros_like(x)))
    values = task.validate(objective, Accelerator())

    x_0 = torch.stack([row["images"] for row in validation_batches(data, 3, max_samples=3)])[0].double()
    alphas_cumprod = objective.scheduler.alphas_cumprod.double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod])[:T]
    beta = 1 - alphas_cumprod / before

    def step(t, prediction):
        weight = before[t].sqrt() * beta[t] / (1 - alphas_cumprod[t])
        keep = (alphas_cumprod[t] / before[t]).sqrt() * (1 - before[t]) / (1 - alphas_cumprod[t])
        return weight * prediction + keep * alphas_cumprod[t].sqrt() * x_0

    def variance(t):
        return beta[t] * (1 - before[t]) / (1 - alphas_cumprod[t])

    last = alphas_cumprod[-1]
    nats = 0.5 * (last * x_0**2 + (1 - last) - 1 - (1 - last).log())
    decoder = torch.distributions.Normal(step(0, alphas_cumprod[0] * x_0), variance(1).sqrt())
    upper = torch.where(x_0 > 0.999, torch.ones_like(x_0), decoder.cdf(x_0 + 1 / 255))
    lower = torch.where(x_0 < -0.999, torch.zeros_like(x_0), decoder.cdf(x_0 - 1 / 255))
    nats = nats - (upper - lower).log()
    quarters = [[], [], [], []]
    for t in range(2, T, 2):  # the middles of eight strata of two timesteps
        nats = nats + 2 * (step(t, x_0) - step(t, alphas_cumprod[t] * x_0)) ** 2 / (2 * variance(t))
        quarters[t * 4 // T].append(((1 - alphas_cumprod[t]) * x_0**2).mean())
    assert values["vlb_bits_per_dim"] == pytest.approx(nats.mean().item() / math.log(2), rel=1e-3)
    for i, losses in enumerate(quarters):
        assert values[f"loss_quarter_{i + 1}"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert values["images"] == 3


# ---- other data -----------------------------------------------------------------------------------------------------


def folder_of_images(folder, channels, labels=True):
    """A data set of 24 images of 8 x 8, saved in `datasets` format with a split for validation."""
    import datasets

    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 6)):
        images = generator.integers(0, 256, (count, 8, 8, channels), dtype=np.uint8)
        columns = {"image": list(images)} | ({"label": [i % 3 for i in range(count)]} if labels else {})
        features = {"image": datasets.Array3D((8, 8, channels), "uint8")}
        features |= {"label": datasets.ClassLabel(names=["ant", "bee", "cat"])} if labels else {}
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        folder.mkdir(exist_ok=True)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_images_of_five_channels_train_and_are_pictured_channel_by_channel(tmp_path):
    data = folder_of_images(tmp_path / "data", channels=5)
    main(arguments(tmp_path / "run", "--dataset", data, "--max_steps", 1))
    assert Image.open(tmp_path / "run" / "samples.png").width > 5 * 8
    pipeline = GuidedDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline(class_labels="bee", num_inference_steps=1, output_type="pt").images.shape == (1, 5, 8, 8)


def test_data_without_labels_trains_an_unconditional_model(tmp_path):
    data = folder_of_images(tmp_path / "data", channels=3, labels=False)
    main(arguments(tmp_path / "run", "--dataset", data, "--max_steps", 1))
    pipeline = GuidedDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.unet.config.num_class_embeds is None
    assert len(pipeline(batch_size=2, num_inference_steps=1).images) == 2


def test_an_unshuffled_stream_trains_on_its_rows_in_order(tmp_path, monkeypatch):
    data = folder_of_images(tmp_path / "data", channels=1)
    rows, draws = [], DDPMTask.draws

    def see(self, batch):
        rows.extend(batch["rows"].tolist())
        return draws(self, batch)

    monkeypatch.setattr(DDPMTask, "draws", see)
    main(arguments(tmp_path / "run", "--dataset", data, "--streaming", "--shuffle_buffer", 1, "--max_steps", 2))
    assert rows == [i % 24 for i in range(32)]


@pytest.mark.parametrize("option", ["--channels_last", "--compile"])
def test_memory_format_and_compilation_change_nothing_but_rounding(one_process, tmp_path, option):
    if option == "--compile":
        torch.compiler.set_stance("force_eager")  # the option's path without minutes of compiling
    try:
        main(arguments(tmp_path, option))
    finally:
        torch.compiler.set_stance("default")
    assert largest_difference(weights(one_process, "live"), weights(tmp_path, "live")) < 1e-5


def test_bfloat16_trains_and_saves_float32_weights(tmp_path):
    AcceleratorState._reset_state()
    main(arguments(tmp_path, "--mixed_precision", "bf16", "--max_steps", 2))
    AcceleratorState._reset_state()
    assert json.loads((tmp_path / "run.json").read_text())["mixed_precision"] == "bf16"
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32}
