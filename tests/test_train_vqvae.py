"""A run that trains a VQ-VAE or a VQ-GAN: nothing depends on the processes, and what is measured is what it says."""

import dataclasses
import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageChops
from safetensors.torch import load_file
from torch import nn
from two_processes import train_on_two_processes

from annealers import GANDiscriminator, NoisyClassifierModel, VQVAEModel, VQVAEPriorPipeline
from annealers.data import load_data, validation_batches
from annealers.models.pixel_likelihood import values_to_levels
from annealers.randomness import PositionalRandomness
from annealers.training.train_vqvae import VQVAEConfig, VQVAETask, kmeans_centres, main, usage_chart

TINY = [
    *("--block_out_channels", "8", "8", "--latent_channels", "4", "--num_vq_embeddings", "24", "--batch_size", "16"),
    *("--kmeans_vectors", "512", "--max_steps", "4", "--checkpoint_every", "2"),
    *("--validation_samples", "20", "--sample_columns", "3", "--report_to", "none", "--log_every", "2"),
    # With Adam's usual epsilon the first steps are the gradient's signs, which turn rounding into steps of full size.
    *("--adam_epsilon", "0.01", "--learning_rate", "0.01", "--lr_scheduler", "constant", "--lr_warmup_steps", "0"),
]
AVERAGE = ["--codebook_decay", "0.5", "--restart_threshold", "0.3"]
GAN = [
    *("--adversarial_weight", "0.5", "--adversarial_start", "2", "--discriminator_channels", "8", "16"),
    *("--discriminator_learning_rate", "0.01"),
]
KINDS = {"VQ-VAE": ["--codebook", "gradient"], "VQ-GAN": [*AVERAGE, *GAN, "--kmeans_vectors", "0"]}


def arguments(folder, *more):
    return [*TINY, "--output_dir", str(folder), *map(str, more)]


def live(folder, step=4):
    return load_file(folder / "checkpoints" / f"checkpoint-{step:08d}" / "model.safetensors")


def saved(folder):
    return load_file(folder / "pipeline" / "vqvae" / "diffusion_pytorch_model.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    for kind, options in KINDS.items():
        main(arguments(folder / kind, *options))
    return folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The same on two processes, with accumulation."""
    folder = tmp_path_factory.mktemp("two")
    runs = [arguments(folder / kind, *o, "--gradient_accumulation_steps", 2) for kind, o in KINDS.items()]
    train_on_two_processes("train_vqvae", runs)
    return folder


@cache
def digits():
    return load_data(VQVAEConfig())


def task_of(**options):
    """The task of a run, with the options of its command line, and its objective."""
    config = VQVAEConfig(**{"block_out_channels": [8, 8], "num_vq_embeddings": 24, "kmeans_vectors": 512, **options})
    data = load_data(config) if "dataset" in options else digits()
    task = VQVAETask(config, data, PositionalRandomness(0))
    torch.manual_seed(0)
    return task, task.build()


def batch_of(task, first=0, count=8):
    return {
        "images": torch.rand(count, 1, 8, 8) * 2 - 1,
        "first_position": first,
        "positions": torch.arange(first, first + count),
        "rows": torch.arange(count),
    }


# ---- the run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_with_accumulation_train_the_weights_of_one(one_process, two_processes, kind):
    assert largest_difference(live(one_process / kind), live(two_processes / kind)) < 2e-4
    assert largest_difference(saved(one_process / kind), saved(two_processes / kind)) < 2e-4


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_validation_are_the_same_on_two_processes(one_process, two_processes, kind):
    for ours, theirs in zip(metrics(one_process / kind), metrics(two_processes / kind), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-4), name


def test_the_picture_is_the_same_on_two_processes(one_process, two_processes):
    pictures = [Image.open(folder / "VQ-VAE" / "samples.png") for folder in (one_process, two_processes)]
    assert max(high for _, high in ImageChops.difference(*pictures).getextrema()) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(one_process, tmp_path, kind):
    checkpoint = one_process / kind / "checkpoints" / "checkpoint-00000002"
    main(arguments(tmp_path, *KINDS[kind], "--resume", checkpoint))
    assert largest_difference(live(one_process / kind), live(tmp_path)) == 0
    assert largest_difference(saved(one_process / kind), saved(tmp_path)) == 0


def test_codes_were_restarted_and_the_adversary_began_in_that_run(one_process):
    """Halved four times, the counts of codes that were not restarted are sixteenths."""
    sixteenths = 16 * live(one_process / "VQ-GAN")["network.quantize.counts"]
    assert ((sixteenths - sixteenths.round()).abs() > 0.1).any()
    first, second = (live(one_process / "VQ-GAN", step) for step in (2, 4))
    discriminator = [name for name in first if name.startswith("discriminator.")]
    assert any((first[name] != second[name]).any() for name in discriminator)
    assert second["adaptive_weight.value"] > 0


def test_what_is_saved_is_a_pipeline_without_a_prior_that_holds_the_averaged_model(one_process):
    folder = one_process / "VQ-GAN"
    pipeline = VQVAEPriorPipeline.from_pretrained(folder / "pipeline")
    assert type(pipeline.vqvae) is VQVAEModel and pipeline.prior is None
    averaged = load_file(folder / "checkpoints" / "checkpoint-00000004" / "ema.safetensors")
    assert all(torch.equal(value, averaged[f"network.{name}"]) for name, value in saved(folder).items())
    codebook = live(folder)["network.quantize.embedding.weight"]  # averaged already
    assert torch.equal(pipeline.vqvae.quantize.embedding.weight, codebook)
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    images = pipeline.reconstruct(x, output_type="latent").images
    assert torch.equal(images, pipeline.vqvae.decode_indices(pipeline.vqvae.encode(x).indices).sample)


def test_the_card_has_the_numbers_and_its_example_runs(one_process):
    card = (one_process / "VQ-VAE" / "pipeline" / "README.md").read_text()
    assert "perplexity" in card and "pipeline.reconstruct(batch)" in card and "vq-vae" in card
    task, objective = task_of()
    names = {"pipeline": task.pipeline(objective.eval()), "torch": torch}
    exec(task.example(), names)
    assert len(names["images"]) == 1 and names["codes"].shape == (1, 4, 4)


def test_the_discriminator_is_kept_beside_the_pipeline(one_process):
    discriminator = GANDiscriminator.from_pretrained(one_process / "VQ-GAN" / "discriminator")
    assert discriminator.config.norm == "group"
    assert not (one_process / "VQ-VAE" / "discriminator").exists()
    assert not any("discriminator" in str(path) for path in (one_process / "VQ-GAN" / "pipeline").rglob("*"))


def test_it_learns_to_reconstruct_held_out_digits_with_most_of_its_codes(tmp_path):
    options = ["--max_steps", 45, "--adam_epsilon", 1e-8, "--batch_size", 32, "--validation_samples", 100]
    main(arguments(tmp_path, *options, "--ema_decay", 0, "--validate_every", 15, "--checkpoint_every", 0))
    values = [entry for entry in metrics(tmp_path) if "validation/psnr" in entry]
    first, last = values[0], values[-1]
    assert last["validation/psnr"] > first["validation/psnr"] + 3
    assert last["validation/used_codes"] > 18 and last["validation/perplexity"] > 10
    assert last["validation/bits_per_dim_given_codes"] < math.log2(17) < first["validation/bits_per_dim_given_codes"]


# ---- the codebook ---------------------------------------------------------------------------------------------------


def test_the_codebook_starts_with_the_centres_of_the_latents():
    task, objective = task_of()
    latents = task.first_latents(objective.network, torch.device("cpu"))
    assert latents.shape == (512, 16)

    def error(codebook):
        return torch.cdist(latents, codebook).min(dim=1).values.square().mean()

    choice = latents[torch.randperm(512)[:24]]
    task.before_first_step(objective, Accelerator())
    codebook = objective.network.quantize.embedding.weight
    assert error(codebook) < 0.8 * error(choice)
    assert torch.equal(objective.network.quantize.sums, codebook)
    nearest = torch.cdist(latents, codebook).argmin(dim=1)
    for k in nearest.unique():  # each is the mean of those that are nearest to it
        torch.testing.assert_close(codebook[k], latents[nearest == k].mean(0), atol=2e-2, rtol=0)


def test_without_kmeans_the_codebook_starts_at_random():
    task, objective = task_of(kmeans_vectors=0)
    before = objective.network.quantize.embedding.weight.clone()
    task.before_first_step(objective, Accelerator())
    assert torch.equal(objective.network.quantize.embedding.weight, before)


def test_kmeans_finds_clusters_that_are_apart():
    centres = 10 * torch.eye(4)
    vectors = (centres[:, None] + 0.1 * torch.randn(4, 30, 4, generator=torch.Generator().manual_seed(0))).flatten(
        0, 1
    )
    found = kmeans_centres(vectors, 4, seed=2**40)
    torch.testing.assert_close(found[found.argmax(dim=1).argsort()], centres, atol=0.1, rtol=0)


def test_a_codebook_by_gradient_learns_by_its_loss():
    task, objective = task_of(codebook="gradient", beta=0.5)
    assert isinstance(objective.network.quantize.embedding.weight, nn.Parameter)
    terms = objective.train()(**task.draws(batch_of(task)))
    torch.testing.assert_close(terms["loss"], terms["nll"] / 64 + terms["codebook"] + 0.5 * terms["commitment"])
    terms["loss"].mean().backward()
    assert objective.network.quantize.embedding.weight.grad.abs().max() > 0
    task.after_step(0, [terms], Accelerator())


def test_under_a_moving_average_the_loss_has_no_codebook_term():
    task, objective = task_of(beta=0.5)
    terms = objective.train()(**task.draws(batch_of(task)))
    torch.testing.assert_close(terms["loss"], terms["nll"] / 64 + 0.5 * terms["commitment"])
    assert "codebook" not in terms


def test_after_each_step_the_codebook_that_is_trained_moves_also_when_another_was_built():
    task, objective = task_of(codebook_decay=0.5)
    task.build()
    before = objective.network.quantize.embedding.weight.clone()
    objective.train()(**task.draws(batch_of(task)))["loss"].mean().backward()
    task.after_step(0, [{}], Accelerator())
    assert (objective.network.quantize.embedding.weight != before).any()


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_a_density_sees_images_spread_within_their_levels_and_the_rest_does_not():
    task, _ = task_of()
    drawn = task.draws(batch_of(task))
    levels = torch.linspace(-1, 1, 17)
    assert torch.cdist(drawn["images"].reshape(-1, 1), levels[:, None]).min(dim=1).values.max() < 1e-6
    moved = drawn["seen"] - drawn["images"]
    assert moved.abs().max() <= 1 / 16 and moved.std().item() == pytest.approx(1 / 8 / math.sqrt(12), rel=0.1)
    assert torch.equal(values_to_levels(drawn["seen"], 17), values_to_levels(drawn["images"], 17))
    logistic, _ = task_of(likelihood="discretized_logistic")
    drawn = logistic.draws(batch_of(logistic))
    assert torch.equal(drawn["seen"], drawn["images"])


def test_what_is_drawn_for_a_position_does_not_depend_on_the_batch_it_is_in():
    task, _ = task_of()
    whole, part = batch_of(task, 0, 8), batch_of(task, 5, 3)
    part["images"] = whole["images"][5:]
    ours, theirs = task.draws(whole), task.draws(part)
    assert all(torch.equal(ours[name][5:], theirs[name]) for name in theirs)
    assert theirs["restart_priority"].shape == (3, 4, 4)


def test_the_adversary_waits_for_its_first_step():
    task, _ = task_of(adversarial_weight=0.3, adversarial_start=2, batch_size=8)
    assert [task.draws(batch_of(task, first))["adversarial_weight"] for first in (0, 15, 16, 24)] == [0, 0, 0.3, 0.3]


def test_each_player_is_a_group_of_its_own():
    task, objective = task_of(adversarial_weight=0.3, discriminator_learning_rate=0.5)
    groups = {group["name"]: group for group in task.parameter_groups(objective)}
    assert groups.keys() == {"autoencoder", "discriminator"} and groups["discriminator"]["lr"] == 0.5
    assert {id(p) for p in groups["discriminator"]["params"]} == {id(p) for p in objective.discriminator.parameters()}
    assert {id(p) for p in groups["autoencoder"]["params"]} == {id(p) for p in objective.network.parameters()}
    task, objective = task_of()
    (group,) = task.parameter_groups(objective)
    assert "name" not in group and len(group["params"]) == len(list(objective.parameters()))


# ---- validation -----------------------------------------------------------------------------------------------------


def test_validation_is_over_every_held_out_image():
    task, objective = task_of(validation_samples=37, batch_size=16, likelihood="discretized_logistic")
    network = objective.eval().network
    values = task.validate(objective, Accelerator())
    images = torch.cat([batch["images"] for batch in validation_batches(task.data, 16, max_samples=37)])
    images = ((images + 1) * 8).round() / 8 - 1  # 17 levels, which bytes hold only nearly
    output = network(images)
    counts = torch.bincount(output.indices.flatten(), minlength=24).double()
    p = counts[counts > 0] / counts.sum()
    bits = output.nll.mean().item() / 64 / math.log(2)
    errors = (output.sample.clamp(-1, 1) - images).square().flatten(1).mean(dim=1)
    expected = {
        "bits_per_dim_given_codes": bits,
        "bits_per_dim_uniform_prior": bits + 16 * math.log2(24) / 64,
        "commitment": output.commitment.mean().item(),
        "psnr": np.mean([10 * math.log10(4 / e) for e in errors.tolist()]),
        "perplexity": math.exp(-(p * p.log()).sum()),
        "used_codes": len(p),
        "images": 37,
    }
    assert values == pytest.approx(expected, rel=1e-4)


def test_the_bits_of_a_density_are_those_of_its_levels():
    task, objective = task_of(validation_samples=20, sigma=0.25)
    values = task.validate(objective.eval(), Accelerator())
    nats, count = 0.0, 0
    for batch in validation_batches(task.data, task.config.batch_size, max_samples=20):
        uniform = task.randomness.uniform("dequantisation of validation", count, len(batch["images"]), (1, 8, 8))
        x = ((batch["images"] + 1) * 8).round() / 8 - 1 + (uniform.float() - 0.5) / 8
        mean = objective.network(x).sample
        nats -= torch.distributions.Normal(mean, 0.25).log_prob(x).sum().item()
        count += len(x)
    assert values["bits_per_dim_given_codes"] == pytest.approx(
        (nats / count / 64 + math.log(8)) / math.log(2), rel=1e-4
    )
    assert values["sigma"] == pytest.approx(0.25)


def test_the_picture_shows_images_reconstructions_and_the_use_of_codes():
    task, objective = task_of(sample_columns=6)
    with torch.no_grad():
        picture = task.picture(objective.eval(), Accelerator())
    assert picture.width == 6 * 48 + 5 * 2 and picture.height == 2 * 48 + 2 + 160
    (batch,) = validation_batches(task.data, 6, max_samples=6)
    first = np.asarray(picture.crop((0, 0, 48, 48)).convert("L").resize((8, 8), Image.Resampling.NEAREST))
    np.testing.assert_allclose(first, (batch["images"][0, 0].numpy() + 1) * 127.5, atol=1.5)
    chart = usage_chart(torch.tensor([5, 0, 3]), 300)
    assert chart.size == (300, 160) and chart.mode == "RGB"


def test_without_held_out_images_the_picture_is_of_training_images():
    task, objective = task_of(sample_columns=3, validation_samples=20)
    task.data = dataclasses.replace(task.data, validation=None)
    with torch.no_grad():
        picture = task.picture(objective.eval(), Accelerator())
    (batch,) = validation_batches(dataclasses.replace(task.data, validation=task.data.train), 3, max_samples=3)
    first = np.asarray(picture.crop((0, 0, 48, 48)).convert("L").resize((8, 8), Image.Resampling.NEAREST))
    np.testing.assert_allclose(first, (batch["images"][0, 0].numpy() + 1) * 127.5, atol=1.5)


# ---- options --------------------------------------------------------------------------------------------------------


def test_the_options_describe_the_networks():
    task, objective = task_of(
        block_out_channels=[8, 16, 16],
        layers_per_block=2,
        latent_channels=6,
        attention=True,
        num_vq_embeddings=40,
        codebook_decay=0.8,
        restart_threshold=0.4,
        beta=0.1,
        likelihood="discretized_mix_logistic",
        num_mixtures=3,
        adversarial_weight=1.0,
        discriminator_channels=[8, 8],
        discriminator_norm="spectral",
    )
    network, discriminator = objective.network.config, objective.discriminator.config
    assert tuple(network.block_out_channels) == (8, 16, 16) and network.layers_per_block == 2
    assert (network.latent_channels, network.mid_block_add_attention, network.num_vq_embeddings) == (6, True, 40)
    assert (network.decay, network.restart_threshold, network.beta, network.num_mixtures) == (0.8, 0.4, 0.1, 3)
    assert (network.likelihood, network.num_levels, network.sample_size) == ("discretized_mix_logistic", 17, 8)
    assert tuple(discriminator.block_out_channels) == (8, 8) and discriminator.norm == "spectral"


def test_binary_images_have_a_bernoulli_law():
    task, objective = task_of(likelihood="bernoulli", binarize="dynamic")
    drawn = task.draws(batch_of(task))
    assert set(drawn["images"].unique().tolist()) == {-1.0, 1.0}
    assert objective(**drawn)["loss"].isfinite().all()
    grey, _ = task_of(likelihood="bernoulli")
    with pytest.raises(ValueError, match="binarise"):
        grey.draws(batch_of(grey))


def test_features_are_compared_in_the_classifier_of_a_pipeline(tmp_path):
    torch.manual_seed(0)
    NoisyClassifierModel(sample_size=8, in_channels=1).save_pretrained(tmp_path / "classifier")
    task, objective = task_of(feature_network=str(tmp_path), feature_weight=2.0)
    terms = objective.train()(**task.draws(batch_of(task)))
    expected = terms["nll"] / 64 + 0.25 * terms["commitment"] + 2 * terms["features"]
    torch.testing.assert_close(terms["loss"], expected)
    groups = task.parameter_groups(objective)
    assert len(groups[0]["params"]) == len(list(objective.network.parameters()))
    NoisyClassifierModel(sample_size=8, in_channels=3).save_pretrained(tmp_path / "colours" / "classifier")
    with pytest.raises(ValueError, match="the images have 1 channels, those of the classifier .* 3"):
        task_of(feature_network=str(tmp_path / "colours"))
    with pytest.raises(OSError, match="found no classifier in .*elsewhere': name the pipeline of a run"):
        task_of(feature_network=str(tmp_path / "elsewhere"))


def test_points_are_refused():
    with pytest.raises(ValueError, match="an autoencoder is of images, got the points of 'toy:ring'"):
        task_of(dataset="toy:ring")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--kmeans_vectors", "10"], "need kmeans_vectors >= num_vq_embeddings = 24, or 0, got 10"),
        (["--beta", "-1"], "beta must not be negative, got -1.0"),
        (["--adversarial_weight", "1", "--compile", "true"], "no --compile with an adversary"),
        (["--binarize", "static"], "binarised images have the likelihood 'bernoulli'"),
        (["--num_levels", "1"], "num_levels must be at least 2, got 1"),
        (["--sample_columns", "0"], "sample_columns must be at least 1"),
    ],
)
def test_an_option_out_of_range_ends_with_a_usage_message(tmp_path, options, named, capsys):
    with pytest.raises(SystemExit):
        main(arguments(tmp_path, *options))
    assert named in " ".join(capsys.readouterr().err.split())
