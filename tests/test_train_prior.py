"""A run that trains an autoregressive model: of pixels, whose likelihood is exact, or of codes, which give a bound."""

import itertools
import json
import math
import runpy
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageChops
from safetensors.torch import load_file
from torch import nn
from two_processes import train_on_two_processes

from annealers import CodeTransformerModel, PixelCNNModel, PixelCNNPipeline, VQVAEModel, VQVAEPriorPipeline
from annealers.data import load_data, load_digits_split, validation_batches
from annealers.models.autoregressive import AutoregressiveOutput
from annealers.randomness import PositionalRandomness
from annealers.training.train_prior import CodeObjective, CodeTask, PixelObjective, PixelTask, PriorConfig, main

ROOT = Path(__file__).parents[1]
TINY = [
    *("--hidden_size", "8", "--num_layers", "2", "--sample_columns", "2"),
    *("--batch_size", "16", "--validation_samples", "20"),
    *("--report_to", "none", "--log_every", "2", "--dropout", "0", "--max_steps", "4", "--checkpoint_every", "2"),
    # With Adam's usual epsilon the first steps are the gradient's signs, which turn rounding into steps of full size.
    *("--adam_epsilon", "0.01", "--learning_rate", "0.01", "--lr_scheduler", "constant"),
]
NAMES = {i: str(i) for i in range(10)}
KINDS = ("pixels", "codes")
SMALL_WINDOWS = ["--kernel_size", "3", "--first_kernel_size", "3"]


def vqvae_of(**options):
    torch.manual_seed(0)
    small = {"in_channels": 1, "sample_size": 8, "block_out_channels": (8, 8), "latent_channels": 4, "num_levels": 17}
    model = VQVAEModel(**{**small, "num_vq_embeddings": 6, **options})
    nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def vqvae_folder(tmp_path_factory):
    """Folder of a first stage of digits, untrained."""
    folder = tmp_path_factory.mktemp("vqvae")
    VQVAEPriorPipeline(vqvae_of()).save_pretrained(folder)
    return folder


def arguments(kind, folder, vqvae_folder, *more):
    of_codes = ["--vqvae", str(vqvae_folder), "--model", "code_transformer"]
    return [
        *TINY,
        "--output_dir",
        str(folder / kind),
        *(of_codes if kind == "codes" else SMALL_WINDOWS),
        *map(str, more),
    ]


def weights(folder, kind, which="pipeline"):
    if which == "live":
        return load_file(folder / kind / "checkpoints" / "checkpoint-00000004" / "model.safetensors")
    component = "prior" if kind == "codes" else "pixel_cnn"
    return load_file(folder / kind / "pipeline" / component / "diffusion_pytorch_model.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def metrics(folder, kind):
    return [json.loads(line) for line in (folder / kind / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, vqvae_folder):
    folder = tmp_path_factory.mktemp("one")
    for kind in KINDS:
        main(arguments(kind, folder, vqvae_folder))
    return folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, vqvae_folder):
    """The same on two processes, with accumulation."""
    folder = tmp_path_factory.mktemp("two")
    runs = [arguments(kind, folder, vqvae_folder, "--gradient_accumulation_steps", 2) for kind in KINDS]
    train_on_two_processes("train_prior", runs)
    return folder


@cache
def digits():
    return load_data(PriorConfig())


def task_of(kind="pixels", **options):
    """The task of a run, with the options of its command line."""
    config = PriorConfig(hidden_size=8, num_layers=2, **options)
    return (CodeTask if kind == "codes" else PixelTask)(config, digits(), PositionalRandomness(config.seed))


def batch_of(task, count=8):
    return next(iter(validation_batches(task.data, count, max_samples=count)))


# ---- the run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_with_accumulation_train_the_weights_of_one(one_process, two_processes, kind):
    for which in ("live", "pipeline"):
        assert largest_difference(weights(one_process, kind, which), weights(two_processes, kind, which)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_validation_are_the_same_on_two_processes(one_process, two_processes, kind):
    for ours, theirs in zip(metrics(one_process, kind), metrics(two_processes, kind), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds", "grad_norm"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_the_same_picture_on_two_processes(one_process, two_processes, kind):
    """Up to values that rounding decides, of which there are few."""
    pictures = [Image.open(folder / kind / "samples.png") for folder in (one_process, two_processes)]
    changed = ImageChops.difference(*pictures).point(lambda v: 255 * (v > 8)).resize((20, 20), Image.Resampling.BOX)
    assert changed.histogram()[0] >= 390


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(one_process, vqvae_folder, tmp_path, kind):
    resume = ["--resume", one_process / kind / "checkpoints" / "checkpoint-00000002"]
    main(arguments(kind, tmp_path, vqvae_folder, *resume))
    for which in ("live", "pipeline"):
        assert largest_difference(weights(one_process, kind, which), weights(tmp_path, kind, which)) == 0


def test_pixels_are_saved_as_a_pipeline_that_draws_and_names_its_classes(one_process):
    pipeline = PixelCNNPipeline.from_pretrained(one_process / "pixels" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.pixel_cnn) is PixelCNNModel and pipeline.id2label == NAMES
    assert [image.size for image in pipeline(class_labels=["3", "7"]).images] == [(8, 8), (8, 8)]
    averaged = load_file(one_process / "pixels" / "checkpoints" / "checkpoint-00000004" / "ema.safetensors")
    assert all(
        torch.equal(value, averaged[f"network.{name}"]) for name, value in weights(one_process, "pixels").items()
    )


def test_codes_are_saved_with_the_vqvae_as_it_was(one_process, vqvae_folder):
    pipeline = VQVAEPriorPipeline.from_pretrained(one_process / "codes" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.prior) is CodeTransformerModel and pipeline.id2label == NAMES
    given = VQVAEPriorPipeline.from_pretrained(vqvae_folder).vqvae
    assert all(
        torch.equal(a, b)
        for a, b in zip(pipeline.vqvae.state_dict().values(), given.state_dict().values(), strict=True)
    )
    assert [image.size for image in pipeline(class_labels=["3", "7"]).images] == [(8, 8), (8, 8)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_tells_the_bits_and_how_to_draw(one_process, kind):
    card = (one_process / kind / "pipeline" / "README.md").read_text()
    assert (
        "pipeline(class_labels=['0', '1', '2', '3'])" in card and "bits_per_dim" in card and "autoregressive" in card
    )
    assert ("bits_per_dim_uniform_prior" in card) == ("vq-vae" in card) == (kind == "codes")


def test_the_picture_has_a_row_for_each_class_and_held_out_images_below(one_process):
    for kind, below in (("pixels", 3), ("codes", 2)):
        columns, rows = 2, 10 + below
        assert Image.open(one_process / kind / "samples.png").size == (columns * 50 - 2, rows * 50 - 2)


def test_it_learns_what_uniform_values_would_not_know(vqvae_folder, tmp_path):
    options = [
        "--max_steps",
        30,
        "--learning_rate",
        0.01,
        "--adam_epsilon",
        1e-8,
        "--ema_decay",
        0,
        "--sample_columns",
        1,
    ]
    main(arguments("codes", tmp_path, vqvae_folder, *options, "--lr_warmup_steps", 0))
    last = metrics(tmp_path, "codes")[-1]
    assert last["validation/bits_per_dim"] < last["validation/bits_per_dim_uniform_prior"] - 0.1
    main(arguments("pixels", tmp_path, vqvae_folder, *options, "--lr_warmup_steps", 0))
    assert metrics(tmp_path, "pixels")[-1]["validation/bits_per_dim"] < math.log2(17) - 0.5


# ---- pixels ---------------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """Answers with nats that tell the images apart and keeps what it was asked."""

    def forward(self, sample, class_labels=None):
        self.sample, self.class_labels = sample, class_labels
        return AutoregressiveOutput(logits=sample, nll=sample.flatten(1).sum(1).float())


def test_the_loss_is_nats_per_value_and_the_levels_of_the_digits_are_their_own():
    task = task_of()
    batch, network = batch_of(task), Watched()
    objective = PixelObjective(network, task.num_levels)
    terms = objective(**task.draws(batch))
    stored = load_digits_split().test_images
    assert task.num_levels == 17 and network.sample.dtype == torch.long
    assert torch.equal(network.sample, (stored[batch["rows"]].float() / 255 * 16).round().long())
    nats = network.sample.flatten(1).sum(1).float()
    torch.testing.assert_close(terms["nats"], nats)
    torch.testing.assert_close(terms["loss"], nats / 64)
    torch.testing.assert_close(terms["bits_per_dim"], nats / 64 / math.log(2))
    assert torch.equal(network.class_labels, batch["labels"])


@pytest.mark.parametrize(
    ("options", "levels"),
    [({}, 17), ({"num_levels": 4}, 4), ({"binarize": "dynamic"}, 2), ({"binarize": "static"}, 2)],
)
def test_the_number_of_levels_is_that_of_the_images(options, levels):
    task = task_of(**options)
    images = task.draws(batch_of(task))["images"]
    assert task.num_levels == levels == task.build().network.config.num_embeddings
    assert (images.unique().tolist() == [-1, 1]) == (levels == 2)


def test_binarisation_is_fixed_if_static_and_new_each_time_if_dynamic():
    for kind, same in (("static", True), ("dynamic", False)):
        task = task_of(binarize=kind)
        batch = batch_of(task)
        again = batch | {"first_position": 1000, "positions": batch["positions"] + 1000}
        images, later = (task.draws(b)["images"] for b in (batch, again))
        assert torch.equal(images, later) == same
        assert not torch.equal(images, task.seen(batch, torch.device("cpu"))[0])  # a draw of its own for each split


@pytest.mark.parametrize("kind", KINDS)
def test_without_classes_there_are_no_labels(kind, vqvae_folder):
    task = task_of(kind, class_conditional=False, vqvae=str(vqvae_folder) if kind == "codes" else None)
    assert task.draws(batch_of(task))["class_labels"] is None
    assert task.build().network.config.num_class_embeds is None
    assert task.example() == "images = pipeline(batch_size=4).images"
    objective = task.build().eval()
    assert task.samples(objective, Accelerator()).shape == (100, 1, 8, 8)
    assert task.pipeline(objective).id2label is None


def test_completions_keep_the_upper_half():
    task = task_of(sample_columns=3)
    originals, halves, completed = task.completions(task.build().eval(), Accelerator())
    assert originals.shape == halves.shape == completed.shape == (3, 1, 8, 8)
    torch.testing.assert_close(completed[:, :, :4], originals[:, :, :4], rtol=0, atol=0.01)
    assert torch.equal(halves[:, :, :4], originals[:, :, :4]) and (halves[:, :, 4:] == -1).all()
    assert (completed[:, :, 4:] - originals[:, :, 4:]).abs().max() > 0.5


def test_validation_is_the_mean_over_every_held_out_image():
    task = task_of(validation_samples=37, batch_size=16)
    objective = task.build().eval()
    with torch.no_grad():
        values = task.validate(objective, Accelerator())
        images, labels = task.seen(batch_of(task, 37), torch.device("cpu"))
        nll = objective.network((images + 1).mul(8).round().long(), labels).nll
    assert values["images"] == 37 and values.keys() == {"images", "nats", "bits_per_dim"}
    assert values["nats"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert values["bits_per_dim"] == pytest.approx(nll.mean().item() / 64 / math.log(2), rel=1e-5)


def test_the_options_describe_the_network(vqvae_folder):
    options = {"layer_type": "masked", "kernel_size": 3, "first_kernel_size": 5, "output": "mix_logistic"}
    network = task_of(num_mixtures=4, dropout=0.2, **options).build().network.config
    assert {name: network[name] for name in options} == options
    assert (network.num_mixtures, network.dropout, network.channels, network.num_layers) == (4, 0.2, 8, 2)
    assert (network.in_channels, network.sample_size, network.num_class_embeds) == (1, 8, 10)
    options = {"num_heads": 2, "mlp_ratio": 3.0, "dropout": 0.2}
    network = task_of("codes", vqvae=str(vqvae_folder), model="code_transformer", **options).build().network.config
    assert {name: network[name] for name in options} == options
    assert (network.hidden_size, network.num_layers, network.num_class_embeds) == (8, 2, 10)
    assert (network.in_channels, tuple(network.sample_size), network.num_embeddings) == (1, (4, 4), 6)
    assert type(task_of("codes", vqvae=str(vqvae_folder)).build().network) is PixelCNNModel


# ---- codes ----------------------------------------------------------------------------------------------------------


def test_the_prior_sees_the_codes_of_the_encoder_and_its_loss_is_nats_per_code(vqvae_folder):
    task = task_of("codes", vqvae=str(vqvae_folder))
    draws, network = task.draws(batch_of(task)), Watched()
    terms = CodeObjective(network, task.vqvae)(**draws)
    assert torch.equal(network.sample[:, 0], task.vqvae.encode(draws["images"]).indices)
    nats = network.sample.flatten(1).sum(1).float()
    assert terms.keys() == {"loss", "code_nats"}
    torch.testing.assert_close(terms["code_nats"], nats)
    torch.testing.assert_close(terms["loss"], nats / 16)


def test_codes_are_of_full_precision_whatever_the_prior_is_trained_in(vqvae_folder):
    task, network = task_of("codes", vqvae=str(vqvae_folder)), Watched()
    draws = task.draws(batch_of(task, 64))
    expected = task.vqvae.encode(draws["images"]).indices
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(task.vqvae.encode(draws["images"]).indices, expected)
        CodeObjective(network, task.vqvae)(**draws)
    assert torch.equal(network.sample[:, 0], expected)


def test_the_vqvae_stays_in_evaluation_mode_and_gets_no_gradient(vqvae_folder):
    task = task_of("codes", vqvae=str(vqvae_folder))
    objective = task.build().train()
    before = {name: value.clone() for name, value in objective.vqvae.state_dict().items()}
    objective(**task.draws(batch_of(task)))["loss"].sum().backward()
    objective.vqvae.update_codebook()
    assert objective.network.training and not any(module.training for module in objective.vqvae.modules())
    assert all(p.grad is None and not p.requires_grad for p in objective.vqvae.parameters())
    assert all(torch.equal(value, before[name]) for name, value in objective.vqvae.state_dict().items())
    (group,) = task.parameter_groups(objective)
    assert {id(p) for p in group["params"]} == {id(p) for p in objective.network.parameters()}


@pytest.mark.parametrize("likelihood", ["gaussian", "discretized_logistic"])
def test_the_two_stage_bound_is_above_the_likelihood_and_tight_if_codes_are_certain(likelihood):
    """Of 16 images of codes the sum over all is the likelihood; codes that the image tells for sure leave no gap."""
    vqvae = vqvae_of(sample_size=4, num_vq_embeddings=2, likelihood=likelihood, sigma=0.2)
    torch.manual_seed(2)
    prior = CodeTransformerModel(num_embeddings=2, sample_size=2, hidden_size=8, num_layers=1, num_heads=1).eval()
    x = (torch.randint(17, (5, 1, 4, 4)) / 8 - 1).float()
    codes = torch.tensor(list(itertools.product(range(2), repeat=4))).view(16, 1, 2, 2)
    with torch.no_grad():
        terms = CodeObjective(prior, vqvae).two_stage(x)
        parameters = vqvae.decoder_parameters(vqvae.quantize.lookup(codes[:, 0]))
        of_images = torch.stack([vqvae.likelihood.log_prob(p.expand(5, -1, -1, -1), x) for p in parameters.split(1)])
        joint = of_images - prior(codes).nll[:, None]  # (16, 5)
        density = 16 * math.log(8) if likelihood == "gaussian" else 0.0  # 17 levels are 1 / 8 apart
        exact = -joint.logsumexp(dim=0) + density
        chosen = (vqvae.encode(x).indices.flatten(1) * torch.tensor([8, 4, 2, 1])).sum(1)
    torch.testing.assert_close(terms["nats"], density - joint[chosen, torch.arange(5)], rtol=1e-5, atol=1e-4)
    assert (terms["nats"] >= exact - 1e-4).all()
    torch.testing.assert_close(terms["nats"], terms["image_nats"] + terms["code_nats"])
    torch.testing.assert_close(terms["bits_per_dim"], terms["nats"] / 16 / math.log(2))
    uniform = (terms["image_nats"] + 4 * math.log(2)) / 16 / math.log(2)
    torch.testing.assert_close(terms["bits_per_dim_uniform_prior"], uniform)


def test_validation_gives_the_mean_of_the_bound_and_its_parts(vqvae_folder):
    task = task_of("codes", vqvae=str(vqvae_folder), validation_samples=37, batch_size=16)
    objective = task.build().eval()
    with torch.no_grad():
        values = task.validate(objective, Accelerator())
        expected = objective.two_stage(*task.seen(batch_of(task, 37), torch.device("cpu")))
    assert values["images"] == 37 and values.keys() == expected.keys() | {"images"}
    for name, term in expected.items():
        assert values[name] == pytest.approx(term.mean().item(), rel=1e-5), name


def test_a_density_sees_each_value_somewhere_in_its_interval(vqvae_folder):
    task = task_of("codes", vqvae=str(vqvae_folder))
    batch = batch_of(task, 64)
    images, again = (task.images(batch, "train") for _ in range(2))
    levels = ((batch["images"] + 1) * 8).round() / 8 - 1
    shift = (images - levels) * 16  # in (-1, 1)
    assert torch.equal(images, again) and shift.abs().max() < 1.0001
    assert abs(shift.mean().item()) < 4 / (3 * shift.numel()) ** 0.5
    assert shift.var().item() == pytest.approx(1 / 3, abs=0.03)
    later = task.images(batch | {"first_position": 64}, "train")
    assert not torch.equal(later, images) and not torch.equal(task.images(batch, "validation"), images)


def test_a_law_of_levels_sees_the_levels_themselves(tmp_path):
    VQVAEPriorPipeline(vqvae_of(likelihood="discretized_logistic")).save_pretrained(tmp_path)
    task = task_of("codes", vqvae=str(tmp_path))
    batch = batch_of(task)
    assert torch.equal(task.images(batch, "train"), ((batch["images"] + 1) * 8).round() / 8 - 1)


def test_a_bernoulli_vqvae_needs_binarised_images(tmp_path):
    VQVAEPriorPipeline(vqvae_of(likelihood="bernoulli")).save_pretrained(tmp_path)
    task = task_of("codes", vqvae=str(tmp_path), binarize="static")
    assert task.draws(batch_of(task))["images"].unique().tolist() == [-1, 1]
    grey = task_of("codes", vqvae=str(tmp_path))
    with pytest.raises(ValueError, match="values -1 and 1 only"):
        grey.draws(batch_of(grey))
    VQVAEPriorPipeline(vqvae_of()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="binarised images have the likelihood 'bernoulli', got 'gaussian'"):
        task_of("codes", vqvae=str(tmp_path), binarize="static")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sample_size": 16}, "resolution 8, those of the VQ-VAE .16"), ({"in_channels": 3}, "channels 1, .*VQ-VAE .3")],
)
def test_a_vqvae_of_other_images_is_refused(tmp_path, options, message):
    VQVAEPriorPipeline(vqvae_of(**options)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        task_of("codes", vqvae=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_levels", "1"], "num_levels must be at least 2, got 1"),
        (["--num_levels", "3", "--binarize", "static"], "binarised images have 2 levels, got num_levels=3"),
        (["--model", "code_transformer"], "model='code_transformer' is of codes"),
        (["--vqvae", "somewhere", "--num_levels", "4"], "num_levels=4 is of pixels"),
        (["--vqvae", "somewhere", "--output", "mix_logistic"], "output='mix_logistic' is of levels"),
        (["--temperature", "0"], "temperature > 0, got 0"),
        (["--sample_columns", "0"], "sample_columns must be at least 1, got 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        main(options)
    assert message in capsys.readouterr().err


def test_the_table_of_likelihoods_has_the_number_of_the_validation_and_that_of_equal_codes(one_process, tmp_path):
    script = runpy.run_path(str(ROOT / "benchmarks" / "image_likelihood.py"))
    models = [f"{kind}={one_process / kind / 'pipeline'}" for kind in KINDS]
    script["main"]([*models, "--name", "digits", "--dataset", "digits", "--images", "20", "--out", str(tmp_path)])
    rows = {row["kind"]: row for row in json.loads((tmp_path / "digits_likelihood.json").read_text())["rows"]}
    assert rows.keys() == {"exact", "two-stage", "two-stage, uniform codes"}
    validated = {kind: metrics(one_process, kind)[-1] for kind in KINDS}
    assert rows["exact"]["nats"] == pytest.approx(validated["pixels"]["validation/nats"], rel=1e-5)
    assert rows["exact"]["bits_per_dim"] == pytest.approx(validated["pixels"]["validation/bits_per_dim"], rel=1e-5)
    saved_by_the_prior = rows["two-stage, uniform codes"]["nats"] - rows["two-stage"]["nats"]
    expected = 16 * math.log(6) - validated["codes"]["validation/code_nats"]  # but for draws of the dequantisation
    assert saved_by_the_prior == pytest.approx(expected, abs=0.5)
    page = (tmp_path / "digits_likelihood.md").read_text()
    assert "of 17 levels" in page and "two-stage, given the class" in page
