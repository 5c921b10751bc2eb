"""A run that trains a VAE: nothing depends on the processes, and what is reported is a bound."""

import json
import math
import runpy
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image, ImageChops
from safetensors.torch import load_file
from torch import nn
from torch.distributions import Normal
from two_processes import train_on_two_processes

from annealers import HierarchicalVAEModel, VAEModel, VAEPipeline
from annealers.collapse import LatentUse
from annealers.data import load_data, train_batches, validation_batches
from annealers.randomness import PositionalRandomness
from annealers.training import train_vae
from annealers.training.train_vae import VAEConfig, VAETask, main

ROOT = Path(__file__).parents[1]
TINY = [
    *("--block_out_channels", "8", "8", "--norm_groups", "4", "--attention", "false", "--latent_channels", "3"),
    *("--batch_size", "16", "--validation_samples", "20", "--importance_images", "6", "--importance_samples", "3"),
    *("--sample_columns", "2", "--report_to", "none", "--log_every", "2", "--max_train_samples", "160"),
    *("--kl_warmup_steps", "3"),
    # With Adam's usual epsilon the first steps are the gradient's signs, which turn rounding into steps of full size.
    *("--adam_epsilon", "0.01", "--learning_rate", "0.01", "--lr_scheduler", "constant"),
]
LADDER = [*("--model", "hierarchical", "--latent_channels", "3", "2", "--free_bits", "0.5")]
GAUSSIAN = [*("--likelihood", "gaussian", "--flat_latent", "false", "--max_steps", "4", "--checkpoint_every", "2")]
ALL_DIGITS = ("--max_train_samples", "1442")
RUNS = ("vae", "ladder")


def arguments(folder, *more):
    return [*TINY, "--output_dir", str(folder), *map(str, more)]


def live(folder, step=4):
    return load_file(folder / "checkpoints" / f"checkpoint-{step:08d}" / "model.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    main(arguments(folder / "vae", *GAUSSIAN))
    main(arguments(folder / "ladder", *LADDER, "--max_steps", 2))
    return folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The same on two processes, with accumulation."""
    folder = tmp_path_factory.mktemp("two")
    split = ("--gradient_accumulation_steps", 2)
    runs = [
        arguments(folder / "vae", *GAUSSIAN, *split),
        arguments(folder / "ladder", *LADDER, *split, "--max_steps", 2),
    ]
    train_on_two_processes("train_vae", runs)
    return folder


def task_of(**options):
    tiny = {
        "block_out_channels": [8, 8],
        "norm_groups": 4,
        "attention": False,
        "latent_channels": [3],
        "batch_size": 16,
        "max_train_samples": 70,
        "validation_samples": 20,
        "importance_images": 6,
    }
    config = VAEConfig(**(tiny | options))
    torch.manual_seed(0)
    return VAETask(config, data_of(config.dataset, config.max_train_samples), PositionalRandomness(0))


@cache
def data_of(dataset, max_train_samples):
    return load_data(VAEConfig(dataset=dataset, max_train_samples=max_train_samples))


def first_batch(task, size=16):
    return next(iter(train_batches(task.data, task.config, seed=0, batch_size=size)))


# ---- the run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("run", "steps"), [("vae", 4), ("ladder", 2)])
def test_two_processes_with_accumulation_train_the_weights_of_one(one_process, two_processes, run, steps):
    assert largest_difference(live(one_process / run, steps), live(two_processes / run, steps)) < 1e-5


@pytest.mark.parametrize("run", ["vae", "ladder"])
def test_losses_and_validation_are_the_same_on_two_processes(one_process, two_processes, run):
    for ours, theirs in zip(metrics(one_process / run), metrics(two_processes / run), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds", "grad_norm"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-3), name


def test_pictures_are_the_same_on_two_processes(one_process, two_processes):
    for run in ("vae", "ladder"):
        pictures = [Image.open(folder / run / "samples.png") for folder in (one_process, two_processes)]
        assert ImageChops.difference(*pictures).getextrema()[1] <= 2
        assert pictures[0].size == (2 * 50 - 2, 13 * 50 - 2)  # two rows of images, a white one, one of each class


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(one_process, tmp_path):
    main(arguments(tmp_path, *GAUSSIAN, "--resume", one_process / "vae" / "checkpoints" / "checkpoint-00000002"))
    assert largest_difference(live(one_process / "vae"), live(tmp_path)) == 0


def test_the_latents_have_variance_one_after_scaling_and_the_scale_is_saved(one_process, two_processes):
    """Of posterior samples of all the training images, here with noise of our own."""
    vae = VAEPipeline.from_pretrained(one_process / "vae" / "pipeline").vae
    task = task_of(max_train_samples=160)
    batch = first_batch(task, size=len(task.data.train))
    assert len(batch["rows"].unique()) == 160
    with torch.no_grad():
        z = vae.encode(batch["images"], batch["labels"]).latent_dist.sample(torch.Generator().manual_seed(0))
    assert (z * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.02)
    assert abs(z.std().item() - 1) > 0.03  # or nothing would be seen of it
    theirs = VAEPipeline.from_pretrained(two_processes / "vae" / "pipeline").vae.config.scaling_factor
    assert theirs == pytest.approx(vae.config.scaling_factor, rel=1e-5)


def test_what_is_saved_is_a_pipeline_with_the_averaged_model(one_process):
    for run, model_class, step in (("vae", VAEModel, 4), ("ladder", HierarchicalVAEModel, 2)):
        pipeline = VAEPipeline.from_pretrained(one_process / run / "pipeline")
        assert type(pipeline.vae) is model_class and pipeline.id2label == {i: str(i) for i in range(10)}
        averaged = load_file(one_process / run / "checkpoints" / f"checkpoint-{step:08d}" / "ema.safetensors")
        assert all(
            torch.equal(value, averaged[f"network.{name}"]) for name, value in pipeline.vae.state_dict().items()
        )
        images = pipeline(class_labels=["3", "7"]).images
        assert [image.size for image in images] == [(8, 8), (8, 8)]
    card = (one_process / "vae" / "pipeline" / "README.md").read_text()
    assert "class_labels=['0', '1', '2', '3']" in card and "elbo_bits_per_dim" in card and "iw_3_nats" in card


def test_the_tables_of_likelihoods_and_of_latents_have_the_numbers_of_the_validation(
    one_process, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as if they were run there
    models = [f"{run}={one_process / run / 'pipeline'}" for run in RUNS]
    shared = ["--dataset", "digits", "--name", "digits", "--out", str(tmp_path)]
    validated = {run: [line for line in metrics(one_process / run) if "validation/kl" in line][-1] for run in RUNS}

    runpy.run_path(str(ROOT / "benchmarks" / "latent_use.py"))["main"]([*models, *shared, "--images", "20"])
    used = json.loads((tmp_path / "digits_latents.json").read_text())["models"]
    of_top = validated["ladder"]["validation/kl_0"]  # which no draw moves
    assert used["ladder"]["kl_per_layer"][0] == pytest.approx(of_top, rel=1e-4)
    assert sum(used["vae"]["kl_per_layer"]) == pytest.approx(validated["vae"]["validation/kl"], rel=0.05)
    assert used["vae"]["images"] == 20 and "| ladder | 20 |" in (tmp_path / "digits_latents.md").read_text()

    options = ["--images", "20", "--iw-samples", "3", "--iw-images", "6"]
    runpy.run_path(str(ROOT / "benchmarks" / "image_likelihood.py"))["main"]([*models, *shared, *options])
    rows = json.loads((tmp_path / "digits_likelihood.json").read_text())["rows"]
    assert [(row["model"], row["kind"], row["images"]) for row in rows] == [
        (run, *kind) for run in RUNS for kind in (("ELBO", 20), ("IW-3", 6))
    ]
    for row in rows:  # other draws of the latents and of what a density is spread with
        name = {"ELBO": "validation/elbo_bits_per_dim", "IW-3": "validation/iw_3_bits_per_dim"}[row["kind"]]
        assert row["bits_per_dim"] == pytest.approx(validated[row["model"]][name], rel=0.02)


def test_it_uses_its_latents_after_a_few_steps(tmp_path):
    """A weight hidden in a mean over pixels would leave nearly all of them unused."""
    options = ["--likelihood", "bernoulli", "--binarize", "dynamic", "--class_conditional", "false", "--sigma", "0.5"]
    training = ["--max_steps", 60, "--adam_epsilon", 1e-8, "--learning_rate", 0.005, "--ema_decay", 0]
    main(arguments(tmp_path, *options, *training, "--kl_warmup_steps", 0, "--batch_size", 32, *ALL_DIGITS))
    last = metrics(tmp_path)[-1]
    assert last["validation/active_units"] > 1.5  # of three
    assert last["validation/elbo_nats"] < 64 * math.log(2) - 3  # of fair coins
    assert last["validation/elbo_bits_per_dim"] == pytest.approx(last["validation/elbo_nats"] / 64 / math.log(2))
    assert last["validation/kl"] > 0.5


# ---- the loss and what is reported ----------------------------------------------------------------------------------


def test_the_loss_is_the_bound_with_weights_and_the_bound_without():
    task = task_of(beta=0.3, kl_warmup_steps=4)
    objective, batch = task.build(), first_batch(task)
    draws = task.draws(batch)
    assert draws["kl_weight"].tolist() == pytest.approx([0.3 / 4] * 16)
    terms = objective(**draws)
    output = objective.network(draws["images"], draws["labels"], noise=draws["noise"])
    torch.testing.assert_close(terms["nll"], output.nll)
    torch.testing.assert_close(terms["kl"], output.kl)
    torch.testing.assert_close(terms["loss"], output.nll + 0.3 / 4 * output.kl)
    torch.testing.assert_close(terms["elbo_nats"], output.nll + output.kl)
    torch.testing.assert_close(terms["elbo_bits_per_dim"], (output.nll + output.kl) / 64 / math.log(2))


def test_the_weight_grows_over_the_steps_and_then_stays():
    task = task_of(beta=2.0, kl_warmup_steps=4, latent_channels=[2])
    positions = torch.tensor([0, 15, 16, 47, 48, 63, 64, 1000])
    batch = {"images": torch.zeros(8, 1, 8, 8), "labels": torch.zeros(8, dtype=torch.long), "positions": positions}
    weights = task.draws(batch | {"first_position": 0, "rows": positions})["kl_weight"]
    assert weights.tolist() == [0.5, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    assert set(task_of(kl_warmup_steps=0).draws(first_batch(task))["kl_weight"].tolist()) == {1.0}


def test_free_bits_are_free_and_not_reported():
    task = task_of(model="hierarchical", latent_channels=[3, 2], free_bits=1e6, kl_warmup_steps=0)
    objective = task.build()
    terms = objective(**task.draws(first_batch(task)))
    torch.testing.assert_close(terms["loss"] - terms["nll"], torch.full((16,), 2e6))
    torch.testing.assert_close(terms["kl_0"] + terms["kl_1"], terms["kl"])
    torch.testing.assert_close(terms["elbo_nats"], terms["nll"] + terms["kl"])


class Constant(nn.Module):
    """Knows nothing of its input: an encoder of one posterior, (2 C_z,), or a decoder of one image, (1, H, W)."""

    def __init__(self, value):
        super().__init__()
        self.value = value if value.ndim == 3 else value[:, None, None]

    def forward(self, x):
        return self.value.expand(len(x), -1, -1, -1)


def test_of_a_density_the_bound_is_that_of_the_levels():
    """A Gaussian as wide as the interval of a level around zero gives log2 of 1 / (density of x times its width)."""
    task = task_of(likelihood="gaussian", sigma=0.7, num_levels=17)
    objective = task.build().eval()
    objective.network.encoder = Constant(torch.zeros(6))
    objective.network.decoder = Constant(torch.zeros(1, 8, 8))
    values = task.validate(objective, Accelerator())
    bits = []
    for count in (6, 20):
        batches = list(validation_batches(task.data, 16, max_samples=count))
        images = torch.cat([task.seen(batch, "validation")["images"] for batch in batches]).double()
        bits.append(-(Normal(0.0, 0.7).log_prob(images).mean() + math.log(2 / 16)).item() / math.log(2))
    few, expected = bits
    assert values["iw_20_images"] == 6 and values["iw_20_bits_per_dim"] == pytest.approx(few, rel=1e-5)
    assert values["elbo_bits_per_dim"] == pytest.approx(expected, rel=1e-5)
    assert values["elbo_nats"] == pytest.approx(expected * 64 * math.log(2), rel=1e-5)
    assert values["kl"] == 0 and values["active_units"] == 0 and values["images"] == 20
    assert values["sigma"] == pytest.approx(0.7)
    grey = torch.cat([batch["images"] for batch in batches])
    offset = images - (2 * ((grey + 1) / 2 * 16).round() / 16 - 1)
    assert offset.abs().max() <= 1 / 16 and offset.abs().max() > 0.9 / 16  # spread over the width of a level, 2 / 16


def test_active_units_are_those_that_follow_the_image():
    task = task_of()
    objective = task.build().eval()

    class OneOfThree(nn.Module):
        def forward(self, x):
            mean = torch.zeros(len(x), 3)
            mean[:, 1] = torch.where(torch.arange(len(x)) % 2 == 0, 0.15, -0.15)  # variance 0.0225
            mean[:, 2] = torch.where(torch.arange(len(x)) % 2 == 0, 0.05, -0.05)  # variance 0.0025
            return torch.cat([mean, torch.zeros(len(x), 3)], dim=1)[:, :, None, None]

    objective.network.encoder = OneOfThree()
    assert task.validate(objective, Accelerator())["active_units"] == 1


def test_active_units_are_counted_over_the_images_of_all_processes(monkeypatch):
    """Each process sees a constant of its own, so that only both together see a unit move."""
    task = task_of(importance_samples=0, importance_images=100)
    objective = task.build().eval()
    objective.network.encoder = Constant(torch.zeros(6))
    theirs = LatentUse()
    theirs.update(DiagonalGaussianDistribution(torch.ones(20, 6, 1, 1)))
    monkeypatch.setattr(train_vae, "gather_object", lambda uses: [*uses, theirs])
    assert task.validate(objective, Accelerator())["active_units"] == 3


def test_the_scale_is_that_of_the_latents_around_their_mean():
    task = task_of(max_train_samples=None, latent_channels=[20])
    objective = task.build().eval()
    objective.network.encoder = Constant(torch.cat([torch.full((20,), 3.0), torch.full((20,), math.log(4.0))]))
    task.before_saving(objective, Accelerator())
    assert task.scaling_factor == pytest.approx(0.5, rel=0.015)  # of 28,840 values: three standard errors
    assert task.pipeline(objective).vae.config.scaling_factor == task.scaling_factor


def test_validation_leaves_out_beta_and_free_bits():
    values = []
    for options in ({"free_bits": 0.0, "beta": 1.0}, {"free_bits": 50.0, "beta": 7.0}):
        task = task_of(model="hierarchical", latent_channels=[3, 2], importance_samples=2, **options)
        torch.manual_seed(1)
        values.append(task.validate(task.build().eval(), Accelerator()))
    assert values[0] == values[1]
    assert values[0]["kl_0"] + values[0]["kl_1"] == pytest.approx(values[0]["kl"])
    assert values[0]["elbo_nats"] == pytest.approx(values[0]["nll"] + values[0]["kl"])


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_static_images_are_the_same_in_each_epoch_and_dynamic_ones_are_not():
    for kind in ("static", "dynamic"):
        task = task_of(likelihood="bernoulli", binarize=kind)
        batches = train_batches(task.data, task.config, seed=0, batch_size=70, last_step=2)  # an epoch each
        first, second = ({int(r): x for r, x in zip(b["rows"], task.draws(b)["images"], strict=True)} for b in batches)
        assert first.keys() == second.keys() and set(torch.stack([*first.values()]).unique().tolist()) == {-1.0, 1.0}
        assert all(torch.equal(first[row], second[row]) for row in first) == (kind == "static")


def test_grey_images_have_the_levels_of_the_data():
    images = task_of().draws(first_batch(task_of()))["images"]
    levels = (images + 1) / 2 * 16
    torch.testing.assert_close(levels, levels.round())
    assert task_of(num_levels=4).draws(first_batch(task_of()))["images"].unique().numel() <= 4
    assert task_of(num_levels=4).build().network.config.num_levels == 4


@pytest.mark.parametrize(
    "options", [{}, {"likelihood": "gaussian"}, {"model": "hierarchical", "latent_channels": [3, 2]}]
)
def test_every_parameter_is_in_exactly_one_group_of_the_optimizer(options):
    task = task_of(**options)
    objective = task.build()
    grouped = [id(p) for group in task.parameter_groups(objective) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in objective.parameters() if p.requires_grad)
    assert ("network.pixel_likelihood.log_sigma" in dict(objective.named_parameters())) == ("likelihood" in options)


def test_the_options_describe_the_network():
    config = {"latent_channels": [5], "flat_latent": False, "attention": True, "layers_per_block": 2}
    network = task_of(**config, likelihood="discretized_mix_logistic", num_mixtures=4).build().network.config
    assert (network.latent_channels, network.flat_latent, network.layers_per_block) == (5, False, 2)
    assert (network.likelihood, network.num_mixtures, network.num_levels) == ("discretized_mix_logistic", 4, 17)
    assert network.mid_block_add_attention and network.num_class_embeds == 10
    assert task_of(class_conditional=False).build().network.config.num_class_embeds is None
    fixed = task_of(likelihood="gaussian", sigma=0.2, learn_sigma=False).build().network.config
    assert (fixed.sigma, fixed.learn_sigma) == (0.2, False)
    ladder = task_of(model="hierarchical", latent_channels=[4, 3, 2]).build().network.config
    assert tuple(ladder.latent_levels) == (1, 0, 0) and tuple(ladder.latent_channels) == (4, 3, 2)
    ladder = task_of(model="hierarchical", latent_channels=[4, 3], latent_levels=[1, 1]).build().network.config
    assert tuple(ladder.latent_levels) == (1, 1)


def test_a_latent_of_two_numbers_is_drawn_whole(tmp_path):
    options = ["--latent_channels", 2, "--class_conditional", "false", "--max_steps", 1, "--sample_columns", 3]
    main(arguments(tmp_path, *options))
    assert Image.open(tmp_path / "samples.png").size == (3 * 50 - 2, (2 + 1 + 3 + 1 + 3) * 50 - 2)
    pipeline = VAEPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline.id2label is None and len(pipeline(batch_size=4).images) == 4


class Labelled:
    """A pipeline that paints what it is asked for: the label of a sample, and images as they are."""

    def __call__(self, batch_size, class_labels, generator, output_type):
        assert len(class_labels) == len(generator) == batch_size and output_type == "latent"
        return SimpleNamespace(images=torch.tensor(class_labels).view(-1, 1, 1, 1) * torch.ones(1, 8, 8))

    def reconstruct(self, images, class_labels, output_type):
        assert len(class_labels) == len(images) and output_type == "latent"
        return SimpleNamespace(images=-images)


def test_pictures_have_a_row_for_each_class_and_images_above_what_becomes_of_them():
    task = task_of(sample_columns=3)
    samples = task.samples(Labelled(), Accelerator())
    assert samples[:, 0, 0, 0].tolist() == [label for label in range(10) for _ in range(3)]
    rows = task.reconstructions(Labelled(), Accelerator())
    (batch,) = validation_batches(task.data, 3, max_samples=3)
    torch.testing.assert_close(rows[:3], task.seen(batch, "validation")["images"])
    assert torch.equal(rows[3:], -rows[:3])
    wider = task_of(sample_columns=360).reconstructions(Labelled(), Accelerator())  # there are 355 held-out digits
    assert wider.shape[0] == 720 and torch.equal(wider[360:715], -wider[:355])
    assert (wider[355:360] == 1).all() and (wider[715:] == 1).all()


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_grey_images_for_a_law_of_black_and_white_are_refused_before_the_network_sees_them():
    """A compiled one would not look."""
    task = task_of(likelihood="bernoulli")
    with pytest.raises(ValueError, match="--binarize dynamic"):
        task.draws(first_batch(task))


def test_points_are_refused():
    with pytest.raises(ValueError, match="an autoencoder is of images, got the points of 'toy:ring'"):
        task_of(dataset="toy:ring", max_train_samples=None)


def test_a_size_that_the_levels_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="8 x 8 pixels do not allow: need sides that are multiples of 16"):
        task_of(block_out_channels=[8] * 5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--binarize", "static"], "binarised images have the likelihood 'bernoulli'"),
        (["--beta", "-1"], "beta must not be negative, got -1.0"),
        (["--free_bits", "1"], "free_bits are of model='hierarchical'"),
        (["--latent_channels", "4", "2"], "got [4, 2], [] and 0.0 with 'vae'"),
        (["--importance_images", "0"], "importance_images must be at least 1"),
        (["--sample_columns", "0"], "sample_columns must be at least 1"),
        (["--num_levels", "1"], "num_levels must be at least 2, got 1"),
    ],
)
def test_an_option_out_of_range_ends_with_a_usage_message(tmp_path, options, named, capsys):
    with pytest.raises(SystemExit):
        main(arguments(tmp_path, *options))
    assert named in capsys.readouterr().err
