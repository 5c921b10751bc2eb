"""The loop of two players: how often each steps, on what gradient, and what it does to the other."""

import json
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm

from annealers import GANDiscriminator, GANGenerator, GANPipeline
from annealers.adversarial import frozen
from annealers.data import DataConfig, load_data
from annealers.game import GameConfig, GameRun, GameTask

BATCH = 8


@pytest.fixture(autouse=True, scope="module")
def digits():
    """Reading them takes longer than any run here, so that is done once."""
    data = load_data(DataConfig())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("annealers.run.load_data", lambda config: data)
        yield


class Player(nn.Module):
    """Both have what D says for a loss: of generated images G pulls it up, and D down, and that of images up."""

    def __init__(self, network):
        super().__init__()
        self.network = network


class Generator(Player):
    def forward(self, opponent, latents):
        logits = frozen(opponent, self.network(latents).sample).logits
        return {"loss": -logits.flatten(1).mean(dim=1)}


class Discriminator(Player):
    def forward(self, opponent, images, latents):
        with torch.no_grad():
            fakes = frozen(opponent, latents).sample
        real, fake = (self.network(x).logits.flatten(1).mean(dim=1) for x in (images, fakes))
        return {"loss": fake - real, "real_logit": real.detach()}


class Task(GameTask):
    """A generator and a discriminator with one normalisation each, which tests choose."""

    generator_norm, discriminator_norm = "group", "group"
    seen: list = []

    def build(self):
        channels = {"block_out_channels": (4, 4), "norm_num_groups": 2}
        network = GANGenerator(sample_size=8, out_channels=1, latent_dim=3, norm=self.generator_norm, **channels)
        return Generator(network)

    def build_discriminator(self):
        network = GANDiscriminator(
            in_channels=1, block_out_channels=(4, 4), norm=self.discriminator_norm, norm_num_groups=2
        )
        return Discriminator(network)

    def draws(self, batch):
        self.seen.append(("generator", batch["positions"].tolist()))
        return {"latents": self.randomness.normal("z", batch["first_position"], len(batch["images"]), (3,))}

    def discriminator_draws(self, batch):
        self.seen.append(("discriminator", batch["positions"].tolist()))
        latents = self.randomness.normal("z of D", batch["first_position"], len(batch["images"]), (3,))
        return {"images": batch["images"], "latents": latents}

    def validate(self, objective, accelerator):
        return {}

    def picture(self, objective, accelerator):
        return Image.new("L", (8, 8))

    def pipeline(self, objective):
        return GANPipeline(objective.network)

    def example(self):
        return "images = pipeline().images"


class Watched(GameRun):
    """Plain descent, in which each step of each player is noted: who, on which gradients, and all weights before."""

    def _optimizer(self, groups, learning_rate):
        optimizer = torch.optim.SGD(groups, lr=learning_rate)
        optimizer.register_step_pre_hook(lambda *_: self.note(groups[0]["name"]))
        return optimizer

    def note(self, name):
        gradients = {
            player: [None if p.grad is None else p.grad.clone() for p in network.parameters()]
            for player, network in self.networks.items()
        }
        buffers = {player: dict(network.named_buffers()) for player, network in self.networks.items()}
        copies = {player: {n: b.clone() for n, b in named.items()} for player, named in buffers.items()}
        averages = [p.detach().clone() for p in self.networks["generator"].parameters()]
        self.notes = [
            *getattr(self, "notes", []),
            SimpleNamespace(player=name, gradients=gradients, buffers=copies, generator=averages),
        ]


def run(folder, task=Task, run_class=Watched, **options):
    shared = {"max_steps": 2, "batch_size": BATCH, "learning_rate": 0.01, "log_every": 1, "report_to": "none"}
    config = GameConfig(output_dir=str(folder), **{**shared, **options})
    task.seen = []
    running = run_class(config, task)
    running.train()
    return running


def weights(folder, player="generator", step=2):
    name = {"generator": "model", "discriminator": "model_1"}[player]
    return load_file(folder / "checkpoints" / f"checkpoint-{step:08d}" / f"{name}.safetensors")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("critic_steps", [1, 5])
def test_the_discriminator_steps_k_times_before_each_step_of_the_generator(tmp_path, accumulation, critic_steps):
    options = {"gradient_accumulation_steps": accumulation, "discriminator_steps": critic_steps}
    notes = run(tmp_path, **options).notes
    assert [note.player for note in notes] == (["discriminator"] * critic_steps + ["generator"]) * 2
    positions = [p for player, block in Task.seen for p in block if player == "discriminator"]
    assert positions == list(range(2 * critic_steps * BATCH))  # each step of D has a batch of its own
    blocks = [block for player, block in Task.seen if player == "generator"]
    assert all(len(block) == BATCH // accumulation for block in blocks)
    last = [range((step * critic_steps - 1) * BATCH, step * critic_steps * BATCH) for step in (1, 2)]
    assert [p for block in blocks for p in block] == [p for block in last for p in block]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_gradient_of_one_player_is_left_when_the_other_steps(tmp_path, accumulation):
    for note in run(tmp_path, gradient_accumulation_steps=accumulation, discriminator_steps=2).notes:
        other = "generator" if note.player == "discriminator" else "discriminator"
        assert all(gradient is None for gradient in note.gradients[other])
        assert all(gradient is not None for gradient in note.gradients[note.player])


def test_accumulation_changes_nothing(tmp_path):
    for folder, accumulation in (("one", 1), ("four", 4)):
        run(tmp_path / folder, gradient_accumulation_steps=accumulation, discriminator_steps=2)
    for player in ("generator", "discriminator"):
        assert largest_difference(weights(tmp_path / "one", player), weights(tmp_path / "four", player)) < 1e-6


def test_gradients_are_averaged_over_processes_in_the_last_micro_batch_only(tmp_path, monkeypatch):
    calls = []

    class Noted(Watched):
        def _prepare(self):
            prepared = super()._prepare()
            players = {id(self.objective): "generator", id(self.discriminator): "discriminator"}
            backward = self.accelerator.backward

            @contextmanager
            def no_sync(player):
                calls.append(("no_sync", players[id(player)]))
                yield
                calls.append("end")

            monkeypatch.setattr(self.accelerator, "no_sync", no_sync)
            monkeypatch.setattr(self.accelerator, "backward", lambda loss: (calls.append("backward"), backward(loss)))
            return prepared

        def note(self, name):
            calls.append(("step", name))

    run(tmp_path, run_class=Noted, max_steps=1, gradient_accumulation_steps=4)
    expected = []
    for player in ("discriminator", "generator"):
        expected += [("no_sync", player), "backward", "end"] * 3 + ["backward", ("step", player)]
    assert calls == expected


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_spectral_norm_iterates_once_in_each_step_of_its_player(tmp_path, monkeypatch, accumulation):
    class Spectral(Task):
        discriminator_norm = "spectral"

        def build(self):
            objective = super().build()
            spectral_norm(objective.network.trunk.conv_out)
            return objective

    iterations, method = [], _SpectralNorm._power_method
    monkeypatch.setattr(
        _SpectralNorm, "_power_method", lambda norm, *a: (iterations.append((norm, a[1])), method(norm, *a))[1]
    )
    options = {"gradient_accumulation_steps": accumulation, "discriminator_steps": 2, "sample_every": 1}
    running = run(tmp_path, Spectral, **options)
    for player, norms, steps in (("discriminator", 3, 4), ("generator", 1, 2)):
        found = [module for module in running.networks[player].modules() if isinstance(module, _SpectralNorm)]
        assert [iterations.count((norm, 1)) for norm in found] == [1 + steps] * norms  # one when it is built
    for before, note in zip(running.notes, running.notes[1:], strict=False):
        moved = any((before.buffers["discriminator"][n] != b).any() for n, b in note.buffers["discriminator"].items())
        assert moved == (note.player == "discriminator")


def test_statistics_of_a_batch_move_once_in_each_step_of_their_player(tmp_path):
    class Batch(Task):
        generator_norm = discriminator_norm = "batch"

    running = run(tmp_path, Batch, discriminator_steps=3)
    for player, calls in (("generator", 2), ("discriminator", 2 * 3 * 2)):  # D sees images, and then generated ones
        counts = [v for n, v in weights(tmp_path, player).items() if n.endswith("num_batches_tracked")]
        assert counts and all(count == calls for count in counts)
    for before, note in zip(running.notes, running.notes[1:], strict=False):
        for player in ("generator", "discriminator"):
            moved = any((before.buffers[player][n] != b).any() for n, b in note.buffers[player].items())
            assert moved == (note.player == player)


def test_the_average_is_of_the_generator_and_moves_with_its_steps_alone(tmp_path):
    class Batch(Task):
        generator_norm = "batch"

    running = run(tmp_path, Batch, max_steps=3, discriminator_steps=2, ema_decay=0.5, ema_warmup=False)
    path = tmp_path / "checkpoints" / "checkpoint-00000003" / "ema.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["updates"] == "3"
    names = [name for name, _ in running.networks["generator"].named_parameters()]
    steps = [note.generator for note in running.notes if note.player == "generator"]
    steps.append([p.detach() for p in running.networks["generator"].parameters()])
    averages, live = load_file(path), weights(tmp_path, step=3)
    assert set(averages) == {f"network.{name}" for name in running.networks["generator"].state_dict()}
    for i, name in enumerate(names):
        expected = steps[0][i]
        for step in steps[1:]:
            expected = 0.5 * expected + 0.5 * step[i]
        torch.testing.assert_close(averages[f"network.{name}"], expected)
    buffers = set(averages) - {f"network.{name}" for name in names}
    assert any(name.endswith("running_mean") for name in buffers)
    assert all(torch.equal(averages[name], live[name]) for name in buffers)


def test_a_resumed_game_is_the_uninterrupted_one_bit_for_bit_for_both_players(tmp_path):
    class Adam(GameRun):
        pass

    options = {"run_class": Adam, "discriminator_steps": 2, "checkpoint_every": 2}
    run(tmp_path / "whole", max_steps=4, **options)
    checkpoint = tmp_path / "whole" / "checkpoints" / "checkpoint-00000002"
    run(tmp_path / "resumed", max_steps=4, resume=str(checkpoint), **options)
    for player in ("generator", "discriminator"):
        whole, resumed = (weights(tmp_path / folder, player, step=4) for folder in ("whole", "resumed"))
        assert largest_difference(whole, resumed) == 0
        assert largest_difference(whole, weights(tmp_path / "whole", player)) > 0


def test_each_player_has_its_rate_and_its_curves(tmp_path):
    options = {"discriminator_learning_rate": 0.02, "discriminator_steps": 2, "lr_scheduler": "linear"}
    rates = []

    class Rates(GameRun):
        def _take_step(self, step, batches, optimizers, *more):
            rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
            return super()._take_step(step, batches, optimizers, *more)

    run(tmp_path, run_class=Rates, **options)
    assert rates == [[0.01, 0.02], [0.005, 0.01]]
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    curves = [entry for entry in entries if "loss" in entry]
    assert len(curves) == 2
    for entry in curves:
        names = {"loss", "discriminator_loss", "discriminator_real_logit", "grad_norm_generator"}
        assert names | {"grad_norm_discriminator"} <= entry.keys()


@pytest.mark.parametrize(("limit", "clipped"), [(0.0, False), (1e-3, True)])
def test_gradient_norms_are_clipped_for_each_player_if_that_is_asked_for(tmp_path, limit, clipped):
    for note in run(tmp_path, max_grad_norm=limit).notes:
        norm = torch.cat([g.flatten() for g in note.gradients[note.player]]).norm().item()
        assert (norm == pytest.approx(limit, rel=1e-3)) if clipped else norm > 1e-3


def test_the_discriminator_is_saved_beside_the_pipeline(tmp_path):
    run(tmp_path)
    saved = GANDiscriminator.from_pretrained(tmp_path / "discriminator")
    live = weights(tmp_path, "discriminator")
    assert largest_difference({f"network.{n}": v for n, v in saved.state_dict().items()}, live) == 0
    assert not (tmp_path / "pipeline" / "discriminator").exists()


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_a_loss_that_is_not_finite_stops_the_run_whosever_it_is(tmp_path, player):
    def diverging(objective, name):
        forward, plus = objective.forward, float("inf") if name == player else 0.0
        objective.forward = lambda *args, **draws: {"loss": forward(*args, **draws)["loss"] + plus}
        return objective

    class Diverging(Task):
        def build(self):
            return diverging(super().build(), "generator")

        def build_discriminator(self):
            return diverging(super().build_discriminator(), "discriminator")

    with pytest.raises(RuntimeError, match="not finite at step 0"):
        run(tmp_path, Diverging)


def test_a_step_that_overflows_is_skipped_of_its_player_alone_and_that_is_logged(tmp_path, monkeypatch):
    """The first gradient of D is infinite: its loss is scaled beyond what float32 holds. Then the scale is halved."""

    class Overflowing(Discriminator):
        factors = [1e38]

        def forward(self, opponent, images, latents):
            terms = super().forward(opponent, images, latents)
            return {"loss": terms["loss"] * (self.factors.pop() if self.factors else 1.0)}

    class Scaled(GameRun):
        def _prepare(self):
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
            self.steps = []
            prepared = super()._prepare()
            for name, optimizer in zip(self.networks, prepared, strict=True):
                optimizer.optimizer.register_step_post_hook(lambda *_, name=name: self.steps.append(name))
            self.accelerator.native_amp = True  # from here on as on a GPU, where alone Accelerate scales a loss
            monkeypatch.setattr(type(self.accelerator), "mixed_precision", "fp16")
            return prepared

    class Scale(Task):
        def build_discriminator(self):
            return Overflowing(super().build_discriminator().network)

    running = run(tmp_path, Scale, Scaled, max_steps=2)
    assert running.steps == ["generator", "discriminator", "generator"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if "loss" in entry]
    skipped = [[entry[f"skipped_steps_{player}"] for player in running.networks] for entry in entries]
    assert skipped == [[0, 1], [0, 0]]
    assert running.accelerator.scaler.get_scale() == 2.0**15
    assert all(0 < entry["grad_norm_generator"] < 10 for entry in entries)  # without the scale
    for player in running.networks:
        assert all(value.isfinite().all() for value in weights(tmp_path, player).values())


def test_weights_that_are_split_over_processes_are_refused(tmp_path):
    running = GameRun(GameConfig(output_dir=str(tmp_path), report_to="none"), Task)
    running.accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(ValueError, match="all weights of both players on each process, which FSDP splits"):
        running._prepare()


def test_batch_statistics_of_one_process_among_several_are_refused_without_gpus(tmp_path):
    class Batch(Task):
        generator_norm = "batch"

    running = GameRun(GameConfig(output_dir=str(tmp_path), report_to="none"), Batch)
    player = running.task.build()
    assert running._synchronized(player) is player
    running.accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="batch normalisation over 2 processes needs GPUs"):
        running._synchronized(player)
    without = Generator(GANGenerator(sample_size=8, out_channels=1, block_out_channels=(8, 8), norm="group"))
    assert running._synchronized(without) is without
    running.accelerator = SimpleNamespace(num_processes=2, device=torch.device("cuda"))
    layers = [module for module in running._synchronized(player).modules() if isinstance(module, _BatchNorm)]
    assert layers and all(type(layer) is nn.SyncBatchNorm for layer in layers)


def test_batch_statistics_of_micro_batches_are_warned_of(tmp_path):
    class Batch(Task):
        discriminator_norm = "batch"

    with pytest.warns(UserWarning, match="micro-batches of 4 images"):
        run(tmp_path / "batch", Batch, gradient_accumulation_steps=2, max_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(tmp_path / "group", gradient_accumulation_steps=2, max_steps=1)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"discriminator_steps": 0}, "discriminator_steps must be at least 1, got 0"), ({"compile": True}, "--compile")],
)
def test_options_out_of_range_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        GameConfig(**options)
