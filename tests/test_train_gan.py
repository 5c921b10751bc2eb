"""A run that trains a GAN: each player's step is that of its own loss, and nothing depends on the processes."""

import dataclasses
import json
from functools import cache
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image, ImageChops
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import softplus
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer
from two_processes import train_on_two_processes

from annealers import GANDiscriminator, GANGenerator, GANPipeline, NoisyClassifierModel
from annealers.configuration import parse_config
from annealers.data import load_data, train_batches, validation_batches
from annealers.feature_metrics import classifier_features, kernel_distance
from annealers.game import GameRun
from annealers.hub import export
from annealers.metrics import frechet_distance
from annealers.randomness import PositionalRandomness
from annealers.training.captions import Captions, load_text_encoder
from annealers.training.gan_objectives import DiscriminatorObjective, GeneratorObjective
from annealers.training.train_gan import GANConfig, GANTask, main

TINY = [
    *("--generator_channels", "8", "8", "--discriminator_channels", "8", "8", "--norm_groups", "4"),
    *("--latent_dim", "4", "--generator_norm", "group", "--discriminator_norm", "group", "--batch_size", "16"),
    *("--max_steps", "2", "--max_train_samples", "160", "--validation_samples", "40", "--sample_columns", "2"),
    *("--report_to", "none", "--log_every", "1"),
    # With Adam's usual epsilon the first steps are the gradient's signs, which turn rounding into steps of full size.
    *("--adam_epsilon", "0.01", "--learning_rate", "0.01", "--ema_decay", "0.5"),
]
KINDS = {
    "minimax": ["--loss", "minimax"],
    "non_saturating": ["--loss", "non_saturating", "--r1", "2"],
    "least_squares": ["--loss", "least_squares", "--weight_clip", "0.02"],
    "wasserstein": [
        *("--loss", "wasserstein", "--gradient_penalty", "10", "--discriminator_norm", "none"),
        *("--discriminator_steps", "2", "--checkpoint_every", "1"),
    ],
    "hinge": ["--loss", "hinge", "--arch", "resnet", "--discriminator_norm", "spectral"],
}
PLAYERS = {"generator": "model", "discriminator": "model_1"}


@cache
def digits(max_train_samples=None):
    return load_data(GANConfig(max_train_samples=max_train_samples))


def arguments(folder, *more):
    return [*TINY, "--output_dir", str(folder), *map(str, more)]


def live(folder, player, step=2):
    return load_file(folder / "checkpoints" / f"checkpoint-{step:08d}" / f"{PLAYERS[player]}.safetensors")


def saved(folder):
    return load_file(folder / "pipeline" / "generator" / "diffusion_pytorch_model.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True, scope="module")
def read_once():
    """Reading the digits takes longer than any run here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "annealers.run.load_data",
            lambda config: digits(config.max_train_samples) if config.dataset == "digits" else load_data(config),
        )
        yield


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Folder of a pipeline with a classifier, untrained."""
    folder = tmp_path_factory.mktemp("features")
    torch.manual_seed(0)
    network = NoisyClassifierModel(sample_size=8, in_channels=1, num_classes=10, block_out_channels=(8, 16))
    network.save_pretrained(folder / "classifier")
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, features):
    folder = tmp_path_factory.mktemp("one")
    for kind, options in KINDS.items():
        main(arguments(folder / kind, *options, "--feature_network", features))
    return folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, features):
    """The same on two processes, with accumulation."""
    folder = tmp_path_factory.mktemp("two")
    split = ("--gradient_accumulation_steps", 2, "--feature_network", features)
    train_on_two_processes("train_gan", [arguments(folder / kind, *o, *split) for kind, o in KINDS.items()])
    return folder


def task_of(data=None, **options):
    config = parse_config(GANConfig, arguments("unused"))
    config = dataclasses.replace(config, **options)
    torch.manual_seed(0)
    return GANTask(config, digits() if data is None else data, PositionalRandomness(0))


def batch_of(task, size=16):
    return next(iter(train_batches(task.data, task.config, seed=0, batch_size=size)))


# ---- the run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_with_accumulation_train_the_weights_of_one(one_process, two_processes, kind):
    for player in PLAYERS:
        assert largest_difference(live(one_process / kind, player), live(two_processes / kind, player)) < 1e-5
    assert largest_difference(saved(one_process / kind), saved(two_processes / kind)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_validation_are_the_same_on_two_processes(one_process, two_processes, kind):
    for ours, theirs in zip(metrics(one_process / kind), metrics(two_processes / kind), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_the_picture_is_the_same_on_two_processes(one_process, two_processes):
    pictures = [Image.open(folder / "minimax" / "samples.png") for folder in (one_process, two_processes)]
    assert ImageChops.difference(*pictures).getextrema()[1] <= 2
    assert pictures[0].size == (2 * 50 - 2, 10 * 50 - 2)  # a row of two for each class


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(one_process, features, tmp_path):
    checkpoint = one_process / "wasserstein" / "checkpoints" / "checkpoint-00000001"
    options = (*KINDS["wasserstein"], "--feature_network", features, "--resume", checkpoint)
    main(arguments(tmp_path, *options))
    for player in PLAYERS:
        assert largest_difference(live(one_process / "wasserstein", player), live(tmp_path, player)) == 0
        assert largest_difference(live(tmp_path, player), live(one_process / "wasserstein", player, step=1)) > 0
    assert largest_difference(saved(one_process / "wasserstein"), saved(tmp_path)) == 0


@torch.no_grad()
def test_what_is_saved_is_a_pipeline_that_draws_what_the_averaged_generator_drew(one_process):
    folder = one_process / "hinge"
    pipeline = GANPipeline.from_pretrained(folder / "pipeline")
    assert pipeline.id2label == {i: str(i) for i in range(10)} and pipeline.text_encoder is None
    averaged = load_file(folder / "checkpoints" / "checkpoint-00000002" / "ema.safetensors")
    network = GANGenerator.from_config(pipeline.generator.config).eval()
    network.load_state_dict({name.removeprefix("network."): value for name, value in averaged.items()})
    z, labels = torch.randn(4, 4), torch.tensor([3, 7, 0, 9])
    images = pipeline(class_labels=["3", "7", "0", "9"], latents=z, output_type="latent").images
    assert torch.equal(images, network(z, labels).sample)
    assert largest_difference(averaged, live(folder, "generator")) > 0


def test_the_discriminator_is_saved_beside_it(one_process):
    network = GANDiscriminator.from_pretrained(one_process / "hinge" / "discriminator")
    named = {f"network.{name}": value for name, value in network.state_dict().items()}
    assert largest_difference(named, live(one_process / "hinge", "discriminator")) == 0


def test_curves_show_both_players_and_probabilities_where_there_are_any(one_process):
    for kind in KINDS:
        entry = metrics(one_process / kind)[0]
        shown = {"loss", "discriminator_loss", "grad_norm_generator", "grad_norm_discriminator"}
        assert shown | {"discriminator_real_logit", "discriminator_fake_logit"} <= entry.keys()
        assert ("discriminator_real_probability" in entry) == (kind in ("minimax", "non_saturating"))
        assert ("discriminator_r1" in entry) == (kind == "non_saturating")
        assert ("discriminator_gradient_penalty" in entry) == (kind == "wasserstein")


def test_weights_are_clipped_where_that_is_asked_for(one_process):
    for kind in KINDS:
        largest = max(value.abs().max() for value in live(one_process / kind, "discriminator").values())
        assert largest == pytest.approx(0.02) if kind == "least_squares" else largest > 0.03
    assert max(value.abs().max() for value in live(one_process / "least_squares", "generator").values()) > 0.03


def test_the_card_says_what_was_measured_and_how_to_draw(one_process):
    card = (one_process / "minimax" / "pipeline" / "README.md").read_text()
    assert "class_labels=['0', '1', '2', '3']" in card and "frechet_distance_classifier_features_n40" in card


# ---- each step is that of the player's own loss ---------------------------------------------------------------------


class Watched(GameRun):
    """Notes at each step of a player its gradient, and the weights of both."""

    def _optimizer(self, groups, learning_rate):
        optimizer = super()._optimizer(groups, learning_rate)
        optimizer.register_step_pre_hook(lambda *_: self.note(groups[0]["name"]))
        return optimizer

    def note(self, player):
        gradient = [p.grad.clone() for p in self.networks[player].parameters()]
        weights = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in self.networks.items()}
        self.notes = [*getattr(self, "notes", []), (player, gradient, weights)]


def plain_loss(kind, player, d, g, batch, draws):
    """The mean loss of a player by its formula, of the whole batch at once."""
    x, y = batch["images"], batch["labels"]
    fake = g(draws["latents"], y).sample
    on_fake = d(fake, y).logits
    if player == "generator":
        return {"wasserstein": -on_fake, "non_saturating": softplus(-on_fake)}[kind].mean()
    on_real = d(x, y).logits
    if kind == "wasserstein":
        a = draws["alpha"].view(-1, 1, 1, 1)
        point = (a * x + (1 - a) * fake).detach().requires_grad_()
        (slope,) = torch.autograd.grad(d(point, y).logits.sum(), point, create_graph=True)
        return (on_fake - on_real).mean() + 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(d(point, y).logits.sum(), point, create_graph=True)
    return (softplus(on_fake) + softplus(-on_real)).mean() + 2 / 2 * slope.square().flatten(1).sum(dim=1).mean()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["wasserstein", "non_saturating"])
def test_the_gradient_of_each_step_is_that_of_the_loss_of_its_player(tmp_path, kind, accumulation):
    more = ("--discriminator_steps", 2, "--gradient_accumulation_steps", accumulation, "--validate_every", 0)
    config = parse_config(GANConfig, arguments(tmp_path, *KINDS[kind], *more))
    running = Watched(config, GANTask)
    running.train()
    task, batches = running.task, list(train_batches(running.data, config, seed=0, batch_size=16, last_step=4))
    assert [note[0] for note in running.notes] == ["discriminator", "discriminator", "generator"] * 2
    of_steps = [batches[i] for i in (0, 1, 1, 2, 3, 3)]  # the generator has the discriminator's last
    for (player, gradient, weights), batch in zip(running.notes, of_steps, strict=True):
        g, d = task.build().network, task.build_discriminator().network
        g.load_state_dict(weights["generator"])
        d.load_state_dict(weights["discriminator"])
        draws = task.draws(batch) if player == "generator" else task.discriminator_draws(batch)
        own = list((g if player == "generator" else d).parameters())
        expected = torch.autograd.grad(plain_loss(kind, player, d, g, batch, draws), own)
        for ours, theirs in zip(gradient, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_in_mixed_precision_the_penalty_alone_is_in_single(tmp_path):
    seen = []

    class Types(GameRun):
        def _prepare(self):
            prepared = super()._prepare()
            first = self.networks["discriminator"].trunk[0]
            first.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
            return prepared

    AcceleratorState._reset_state()
    more = (*KINDS["wasserstein"], "--discriminator_steps", 1, "--mixed_precision", "bf16")
    Types(parse_config(GANConfig, arguments(tmp_path, *more)), GANTask).train()
    AcceleratorState._reset_state()
    of_discriminator, of_generator = [torch.bfloat16, torch.bfloat16, torch.float32], [torch.bfloat16]
    assert seen == 2 * (of_discriminator + of_generator)  # real, fake and between; in the generator's step fake


def test_nothing_reaches_the_opponent_and_its_statistics_stay(tmp_path):
    task = task_of(generator_norm="batch", discriminator_norm="batch")
    generator, discriminator = task.build(), task.build_discriminator()
    batch = batch_of(task)
    for player, opponent, draws in (
        (discriminator, generator, task.discriminator_draws(batch)),
        (generator, discriminator, task.draws(batch)),
    ):
        before = {name: buffer.clone() for name, buffer in opponent.network.named_buffers()}
        player(opponent.network, **draws)["loss"].mean().backward()
        assert all(p.grad is not None for p in player.parameters())
        assert all(p.grad is None for p in opponent.parameters())
        assert all(torch.equal(buffer, before[name]) for name, buffer in opponent.network.named_buffers())
        player.zero_grad(set_to_none=True)


def test_an_image_and_what_is_drawn_in_its_place_have_the_same_class():
    """Of a discriminator that says the label it is given, the logits of both are the labels."""

    class SaysTheLabel(nn.Module):
        def forward(self, sample, class_labels, text_embeds):
            return SimpleNamespace(logits=class_labels[:, None].float() + 0 * sample.sum())

    task = task_of()
    batch, generator = batch_of(task), task.build()
    terms = DiscriminatorObjective(SaysTheLabel(), "hinge")(generator.network, **task.discriminator_draws(batch))
    assert torch.equal(terms["real_logit"], batch["labels"].float())
    assert torch.equal(terms["fake_logit"], batch["labels"].float())
    terms = GeneratorObjective(generator.network, "hinge")(SaysTheLabel(), **task.draws(batch))
    assert torch.equal(-terms["loss"], batch["labels"].float())


def test_noise_is_new_for_each_player_and_a_function_of_the_position():
    task = task_of(gradient_penalty=10.0)
    (batch,) = train_batches(task.data, task.config, seed=0, batch_size=16)
    _, second_half = train_batches(task.data, task.config, seed=0, batch_size=16, accumulation=2)
    whole, half = task.discriminator_draws(batch), task.discriminator_draws(second_half)
    assert all(torch.equal(whole[name][8:], half[name]) for name in whole)
    latents = task.draws(batch)["latents"]
    assert torch.equal(latents[8:], task.draws(second_half)["latents"])
    assert not torch.equal(latents, whole["latents"])
    assert whole["alpha"].shape == (16,) and whole["alpha"].unique().numel() == 16
    assert whole["alpha"].min() >= 0 and whole["alpha"].max() < 1


# ---- validation -----------------------------------------------------------------------------------------------------


class Drawing(nn.Module):
    """An objective with a generator that draws what a function of its arguments says."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    @property
    def network(self):
        return lambda latents, labels, texts: SimpleNamespace(sample=self.draw(latents, labels))


def test_samples_are_compared_with_as_many_held_out_images_of_their_classes(features):
    task = task_of(feature_network=str(features), validation_samples=60)
    objective = task.build().eval()
    with torch.no_grad():
        values = task.validate(objective, Accelerator())
        (held_out,) = validation_batches(task.data, 60, max_samples=60)
        latents = task.latents("samples of validation", 0, 60)
        images = objective.network(latents, held_out["labels"]).sample
        of = classifier_features(NoisyClassifierModel.from_pretrained(features, subfolder="classifier"))
        theirs, ours = of(held_out["images"]), of(images)
    assert values["images"] == 60
    assert values["frechet_distance_classifier_features_n60"] == pytest.approx(frechet_distance(ours, theirs), 1e-3)
    assert values["kernel_distance_classifier_features_n60"] == pytest.approx(kernel_distance(ours, theirs), 1e-3)
    spread = ours.var(dim=0).sum() / theirs.var(dim=0).sum()
    assert values["diversity_classifier_features"] == pytest.approx(spread.item(), rel=1e-3)


def test_without_a_feature_network_that_is_said_once_and_nothing_is_compared(capsys):
    task = task_of()
    for _ in range(2):
        values = task.validate(task.build().eval(), Accelerator())
    assert capsys.readouterr().out.count("no --feature_network") == 1
    assert not any("distance" in name for name in values) and "diversity_pixels" in values


def test_a_generator_that_draws_always_the_same_is_warned_of(capsys):
    task = task_of(validation_samples=355)
    same = torch.rand(1, 1, 8, 8)
    values = task.validate(Drawing(lambda z, labels: same.expand(len(z), -1, -1, -1)), Accelerator())
    assert values["diversity_pixels"] == pytest.approx(0, abs=1e-6)
    assert "warning: the generator draws nearly the same image" in capsys.readouterr().out


def test_a_generator_that_draws_one_image_of_each_class_is_warned_of(capsys):
    task = task_of(validation_samples=355)
    (held_out,) = validation_batches(task.data, 355)
    one_of_each = torch.stack([held_out["images"][held_out["labels"] == k][0] for k in range(10)])
    values = task.validate(Drawing(lambda z, labels: one_of_each[labels]), Accelerator())
    assert values["diversity_pixels"] > 0.5
    assert values["diversity_pixels_least_of_a_class"] == pytest.approx(0, abs=1e-6)
    assert "diversity_pixels_least_of_a_class is 0.000" in capsys.readouterr().out


def test_a_generator_that_draws_the_data_is_not_warned_of(capsys, features):
    task = task_of(validation_samples=355, feature_network=str(features))
    batches = iter(validation_batches(task.data, 16, max_samples=355))
    values = task.validate(Drawing(lambda z, labels: next(batches)["images"]), Accelerator())
    assert values["frechet_distance_classifier_features_n355"] == pytest.approx(0, abs=1e-6)
    assert values["diversity_classifier_features"] == pytest.approx(1)
    assert values["diversity_classifier_features_least_of_a_class"] == pytest.approx(1)
    assert "warning" not in capsys.readouterr().out


def held_out_rows(*chosen):
    """The digits with these rows held out, some of them more than once."""
    return dataclasses.replace(digits(), validation=digits().validation.chosen(np.array(chosen)))


def test_held_out_images_that_are_all_alike_give_no_diversity_and_that_is_said_once(features, capsys):
    task = task_of(held_out_rows(*[3] * 20), feature_network=str(features))
    task.before_first_step(task.build(), Accelerator())
    for _ in range(2):
        values = task.validate(task.build().eval(), Accelerator())
    compared = {"frechet_distance_classifier_features_n20", "kernel_distance_classifier_features_n20"}
    assert values.keys() == compared | {"images"} and values["frechet_distance_classifier_features_n20"] > 0
    assert capsys.readouterr().out.count("the 20 held-out images of 'digits' are all alike") == 1


@pytest.mark.parametrize("network", [False, True])
def test_a_class_whose_held_out_images_are_all_alike_is_left_out_of_the_least(features, network):
    labels = torch.cat([batch["labels"] for batch in validation_batches(digits(), 355)])
    zeros, ones = (torch.where(labels == label)[0][:12].tolist() for label in (0, 1))
    options = {"feature_network": str(features)} if network else {}
    task = task_of(held_out_rows(*[zeros[0]] * 12, *ones), validation_samples=24, **options)
    batches = iter(validation_batches(task.data, 16, max_samples=24))
    values = task.validate(Drawing(lambda z, labels: next(batches)["images"]), Accelerator())
    name = "classifier_features" if network else "pixels"
    assert values[f"diversity_{name}"] == pytest.approx(1)
    assert values[f"diversity_{name}_least_of_a_class"] == pytest.approx(1)


def test_one_held_out_image_is_refused_before_any_step(tmp_path):
    with pytest.raises(ValueError, match="at least 2 held-out images .*, got 1 of 'digits': .* or --holdout 0"):
        main(arguments(tmp_path, "--validation_samples", 1))
    assert not (tmp_path / "metrics.jsonl").exists() and not list(tmp_path.glob("checkpoints/*"))


def test_features_that_are_not_finite_are_refused_before_any_step(features, tmp_path):
    broken = NoisyClassifierModel.from_pretrained(features, subfolder="classifier")
    nn.init.constant_(next(broken.parameters()), torch.nan)
    broken.save_pretrained(tmp_path / "classifier")
    task = task_of(feature_network=str(tmp_path))
    with pytest.raises(ValueError, match="has features that are not finite"):
        task.before_first_step(task.build(), Accelerator())


def test_a_feature_network_without_held_out_images_is_refused(features):
    data = dataclasses.replace(digits(), validation=None)
    with pytest.raises(ValueError, match="of which 'digits' has none: give --validation_split or --holdout"):
        task_of(data, feature_network=str(features))
    task = task_of(data)
    task.before_first_step(task.build(), Accelerator())  # nothing is measured, nor refused


def test_classes_with_few_held_out_images_warn_of_nothing():
    values = task_of(validation_samples=30).validate(task_of().build().eval(), Accelerator())
    assert "diversity_pixels_least_of_a_class" not in values


def test_pictures_have_a_row_for_each_class_and_always_the_same_noise():
    task, asked = task_of(sample_columns=3, batch_size=8), []

    def draw(latents, labels):
        asked.append((latents, labels))
        return torch.zeros(len(latents), 1, 8, 8)

    for _ in range(2):
        task.picture(Drawing(draw), Accelerator())
    latents, labels = (torch.cat(part) for part in zip(*asked, strict=True))
    assert labels.tolist() == [label for label in range(10) for _ in range(3)] * 2
    assert torch.equal(latents[:30], latents[30:]) and len(latents[:30].unique(dim=0)) == 30
    square = task_of(sample_columns=3, class_conditional=False).picture(Drawing(draw), Accelerator())
    assert square.size == (148, 148) and asked[-1][1] is None


# ---- captions -------------------------------------------------------------------------------------------------------

CAPTIONS = ("a", "b c", "d", "e f g")


def captioned(folder, captions=CAPTIONS):
    """A data set of grey images, with labels, which captions stand in for."""
    levels = [40 * (i % len(captions)) + i for i in range(40)]
    rows = {
        "image": [Image.new("L", (8, 8), level) for level in levels],
        "text": [captions[i % len(captions)] for i in range(40)],
        "label": [i % 2 for i in range(40)],
    }
    kinds = {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(2)}
    columns = datasets.Features(kinds)
    datasets.Dataset.from_dict(rows, features=columns).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Folders of captioned images, and of a pipeline with a text encoder."""
    folder = tmp_path_factory.mktemp("text")
    letters = [letter + end for letter in "abcdefg" for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPTextConfig(vocab_size=len(vocabulary), projection_dim=6, **shape, **special)
    generator = GANGenerator(sample_size=8, out_channels=1, block_out_channels=(8, 8), text_embed_dim=6)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    GANPipeline(generator, CLIPTextModelWithProjection(config), tokenizer).save_pretrained(folder / "encoder")
    return SimpleNamespace(images=captioned(folder / "images"), encoder=folder / "encoder")


def text_task(text, **options):
    named = {"dataset": str(text.images), "caption_column": "text", "text_encoder": str(text.encoder)}
    data = load_data(GANConfig(**named, streaming=options.get("streaming", False), holdout=0.0))
    return task_of(data, **named, **options)


def test_a_run_on_captions_makes_a_pipeline_for_prompts(text, tmp_path):
    named = ("--dataset", text.images, "--caption_column", "text", "--text_encoder", text.encoder)
    main(arguments(tmp_path, *named, "--holdout", "0.2", "--sample_captions", "3"))
    pipeline = GANPipeline.from_pretrained(tmp_path / "pipeline")
    given, tokenizer = load_text_encoder(str(text.encoder))
    assert largest_difference(pipeline.text_encoder.state_dict(), given.state_dict()) == 0
    assert pipeline.generator.config.num_class_embeds is None and pipeline.id2label is None
    z = torch.randn(2, 4)
    embeds = given(tokenizer(["d", "a"], padding="max_length", return_tensors="pt").input_ids).text_embeds
    expected = pipeline.generator(z, encoder_hidden_states=embeds).sample.detach()
    images = pipeline(prompt=["d", "a"], latents=z, output_type="latent").images
    torch.testing.assert_close(images, expected)
    entry = metrics(tmp_path)[0]
    assert {"discriminator_mismatched_logit", "discriminator_mismatched_probability"} <= entry.keys()
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert "pipeline(prompt='" in card and "text-to-image" in card
    width, height = Image.open(tmp_path / "samples.png").size
    assert width > 2 * 50 - 2 and (height + 2) % 50 == 0 and height <= 148  # captions stand beside the rows


def test_the_discriminator_sees_each_image_with_a_text_that_is_not_its_own(text):
    task = text_task(text)
    batch = batch_of(task)
    draws = task.discriminator_draws(batch)
    encoder, tokenizer = load_text_encoder(str(text.encoder))
    ids = tokenizer(list(CAPTIONS), padding="max_length", return_tensors="pt").input_ids
    known = encoder(ids).text_embeds.detach()  # (4, D)
    own, other = (torch.cdist(draws[name], known).argmin(dim=1) for name in ("text_embeds", "mismatched_embeds"))
    assert [CAPTIONS[i] for i in own] == batch["captions"]
    torch.testing.assert_close(draws["mismatched_embeds"], known[other])
    assert (own != other).all() and len(other.unique()) > 1
    d, g = task.build_discriminator(), task.build()
    real, fake, wrong = (
        d.network(images, text_embeds=embeds).logits
        for images, embeds in (
            (batch["images"], draws["text_embeds"]),
            (g.network(draws["latents"], encoder_hidden_states=draws["text_embeds"]).sample, draws["text_embeds"]),
            (batch["images"], draws["mismatched_embeds"]),
        )
    )
    terms = d(g.network, **draws)
    torch.testing.assert_close(terms["loss"], (softplus(-real) + (softplus(wrong) + softplus(fake)) / 2)[:, 0])
    for name, logits in (("real", real), ("fake", fake), ("mismatched", wrong)):
        torch.testing.assert_close(terms[f"{name}_logit"], logits.detach()[:, 0])
        torch.testing.assert_close(terms[f"{name}_probability"], logits.detach().sigmoid()[:, 0])


def test_texts_of_others_are_drawn_evenly_as_functions_of_the_position(text):
    other = text_task(text).other_captions
    drawn = other.draw(["a"] * 3000, 0)
    shares = [drawn.count(caption) / 3000 for caption in CAPTIONS]
    assert shares[0] == 0 and shares[1:] == pytest.approx([1 / 3] * 3, abs=0.035)  # four standard errors
    assert drawn[100:200] == other.draw(["a"] * 100, 100)


def test_without_matching_the_discriminator_sees_no_other_texts(text):
    task = text_task(text, matching=False)
    assert "mismatched_embeds" not in task.discriminator_draws(batch_of(task))


def test_a_caption_has_one_embedding_whatever_is_beside_it(text):
    task = text_task(text)
    together = task.captions.embeddings(["a", "b c", "a"])
    alone = text_task(text).captions.embeddings(["a"])
    assert torch.equal(together[0], alone[0]) and torch.equal(together[0], together[2])
    assert not together.requires_grad and not any(p.requires_grad for p in task.captions.text_encoder.parameters())


def test_captions_that_cannot_mismatch_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match="one caption, .'a'.: none does not match"):
        text_task(SimpleNamespace(images=captioned(tmp_path / "one", ["a"]), encoder=text.encoder))
    with pytest.raises(ValueError, match="without --streaming, or leave them out, --no_matching"):
        text_task(text, streaming=True)
    assert text_task(text, streaming=True, matching=False).other_captions is None


def test_a_text_encoder_may_be_of_open_clip(tmp_path):
    from tiny_open_clip import WORDS, clip_of, config_of, write_local_dir

    config = config_of(**WORDS)
    encoder, tokenizer = load_text_encoder(write_local_dir(tmp_path, config, clip_of(config)))
    embeddings = Captions(encoder, tokenizer).embeddings(["a cat", "a dog"])
    tokens = tokenizer(["a cat", "a dog"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = clip_of(config).encode_text(tokens)  # by open_clip itself
    torch.testing.assert_close(embeddings, expected)


def test_a_text_encoder_may_be_of_an_export_with_its_code(tmp_path):
    from tiny_open_clip import WORDS, clip_of, config_of, write_local_dir

    config = config_of(**WORDS)
    encoder, tokenizer = load_text_encoder(write_local_dir(tmp_path / "clip", config, clip_of(config)))
    width = Captions(encoder, tokenizer).width
    generator = GANGenerator(sample_size=8, out_channels=1, block_out_channels=(8, 8), text_embed_dim=width)
    export(GANPipeline(generator, encoder, tokenizer), tmp_path / "exported")
    index = json.loads((tmp_path / "exported" / "model_index.json").read_text())
    assert index["text_encoder"][0].startswith("annealers_") and index["tokenizer"][0].startswith("annealers_")
    loaded, its_tokenizer = load_text_encoder(str(tmp_path / "exported"))
    assert type(loaded) is type(encoder) and type(its_tokenizer) is type(tokenizer)
    texts = ["a cat", "a dog"]
    ours, theirs = Captions(loaded, its_tokenizer).embeddings(texts), Captions(encoder, tokenizer).embeddings(texts)
    torch.testing.assert_close(ours, theirs)


def test_a_folder_without_a_text_encoder_is_refused(one_process, text, tmp_path):
    with pytest.raises(ValueError, match="need a text_encoder of annealers or transformers in .*, got None of None"):
        load_text_encoder(str(one_process / "hinge" / "pipeline"))
    with pytest.raises(OSError, match="found no pipeline in"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"text_encoder": ["os", "system"], "tokenizer": ["os", "system"]}')
    with pytest.raises(ValueError, match="got 'system' of 'os'"):
        load_text_encoder(str(tmp_path))


# ---- options --------------------------------------------------------------------------------------------------------


def test_the_options_describe_the_networks():
    task = task_of(latent_dim=5, arch="resnet", generator_channels=[8, 16, 8], discriminator_channels=[4, 8])
    g, d = task.build().network.config, task.build_discriminator().network.config
    assert (g.latent_dim, g.arch, tuple(g.block_out_channels), g.norm) == (5, "resnet", (8, 16, 8), "group")
    assert (d.arch, tuple(d.block_out_channels), d.norm, d.sample_size) == ("resnet", (4, 8), "group", 8)
    assert g.num_class_embeds == d.num_class_embeds == 10
    task = task_of(class_conditional=False, generator_norm="none", discriminator_norm="none")
    g, d = task.build().network.config, task.build_discriminator().network.config
    assert (g.num_class_embeds, d.num_class_embeds, g.norm, d.norm) == (None, None, "none", "none")
    assert task.example() == "images = pipeline(batch_size=4).images"


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(GANConfig))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--loss", "wasserstein"], "a Wasserstein critic without bounded slope"),
        (["--gradient_penalty", "10", "--discriminator_norm", "batch"], "(arXiv:1704.00028, Sec. 4)"),
        (["--r1", "1", "--discriminator_norm", "batch"], "r1=1.0 is of the gradient for each image by itself"),
        (["--gradient_penalty", "10", "--r1", "1"], "choose one of gradient_penalty and r1"),
        (["--gradient_penalty", "10", "--weight_clip", "0.1"], "choose one of gradient_penalty and weight_clip"),
        (["--weight_clip", "0.1", "--discriminator_norm", "spectral"], "weight_clip=0.1 has no effect"),
        (["--r1", "-1"], "r1 must be finite and not negative, got -1.0"),
        (["--latent_dim", "0"], "latent_dim must be at least 1, got 0"),
        (["--caption_column", "text"], "captions need both --caption_column and --text_encoder"),
        (["--text_encoder", "there"], "captions need both --caption_column and --text_encoder"),
        (["--loss", "huber"], "invalid choice: 'huber'"),
    ],
)
def test_a_contradiction_ends_with_a_usage_message(tmp_path, options, named, capsys):
    with pytest.raises(SystemExit):
        main(arguments(tmp_path, *options))
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["dcgan", "resnet"])
@pytest.mark.parametrize("penalty", ["gradient_penalty", "r1"])
def test_a_penalty_with_batch_normalisation_is_refused_from_python_too(penalty, arch):
    options = {"arch": arch, "block_out_channels": (8, 8), "sample_size": 8}
    network = GANDiscriminator(1, norm="batch", **options)
    with pytest.raises(ValueError, match=rf"{penalty}=10.0 is of the gradient .* choose group, spectral or none"):
        DiscriminatorObjective(network, "hinge", **{penalty: 10.0})
    with pytest.raises(ValueError, match=f"{penalty}=10.0 is of the gradient"):
        task_of(discriminator_norm="batch", **{penalty: 10.0})
    assert DiscriminatorObjective(network, "hinge").r1 == 0
    objective = DiscriminatorObjective(GANDiscriminator(1, norm="spectral", **options), "hinge", **{penalty: 10.0})
    assert getattr(objective, penalty) == 10


@pytest.mark.parametrize(
    "more", [["--gradient_penalty", "1"], ["--weight_clip", "1"], ["--discriminator_norm", "spectral"]]
)
def test_a_wasserstein_critic_with_bounded_slope_is_taken(more):
    assert parse_config(GANConfig, [*TINY, "--loss", "wasserstein", *more]).loss == "wasserstein"


def test_points_are_refused():
    with pytest.raises(ValueError, match="this GAN is of images, got the points of 'toy:ring'"):
        task_of(load_data(GANConfig(dataset="toy:ring")), dataset="toy:ring")
