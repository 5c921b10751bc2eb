"""The run loop: what it offers a task beyond one loss and one group of parameters."""

import dataclasses
import json
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Literal

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from annealers import DDPMAncestralScheduler, GuidedDiffusionPipeline, training
from annealers.configuration import RunConfig, option
from annealers.data import DataConfig, load_data
from annealers.run import Run, Task, held_out_means

STEEP, FLAT = 1000.0, 0.01  # gradients of the two players, one far above and one below the norm 1 they are clipped to


class Game(nn.Module):
    """Two numbers that are pulled down with constant gradients, and a buffer that the data sets."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(1, 1)
        self.first, self.second = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.register_buffer("starts", torch.zeros(()))

    def forward(self, images):
        loss = STEEP * self.first + FLAT * self.second + self.starts * 0
        return {"loss": loss.expand(len(images)), "brightness": images.flatten(1).mean(dim=1)}


class GameTask(Task):
    """Notes what the loop does with it."""

    calls: list = []

    def build(self):
        return Game()

    def draws(self, batch):
        return {"images": batch["images"]}

    def parameter_groups(self, objective):
        return [
            {"params": [objective.first], "name": "first"},
            {"params": [objective.second, *objective.network.parameters()], "name": "second", "lr": 1e-4},
        ]

    def before_first_step(self, objective, accelerator):
        objective.starts += 1
        self.calls.append("before_first_step")

    def before_saving(self, objective, accelerator):
        weights = (objective.first.item(), objective.second.item())
        self.calls.append(("before_saving", objective.training, torch.is_grad_enabled(), weights))

    def validate(self, objective, accelerator):
        return {}

    def picture(self, objective, accelerator):
        return Image.new("L", (8, 8))

    def pipeline(self, objective):
        self.calls.append(("pipeline", objective.starts.item(), objective.first.item()))
        from diffusers import UNet2DModel

        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(32,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        )
        return GuidedDiffusionPipeline(unet, DDPMAncestralScheduler())

    def example(self):
        return "images = pipeline().images"


def config(folder, **options):
    return RunConfig(
        output_dir=str(folder),
        max_steps=options.pop("max_steps", 4),
        batch_size=8,
        learning_rate=0.1,
        lr_scheduler="constant",
        log_every=1,
        checkpoint_every=2,
        report_to="none",
        **options,
    )


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(GameTask, "calls", [])
    return GameTask.calls


def test_each_group_of_parameters_is_clipped_on_its_own(tmp_path, calls):
    Run(config(tmp_path), GameTask).train()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    norms = [entry for entry in entries if "grad_norm_first" in entry]
    assert len(norms) == 4
    for entry in norms:
        assert entry["grad_norm_first"] == pytest.approx(STEEP)
        assert entry["grad_norm_second"] == pytest.approx(FLAT)


class PlainDescent(Run):
    """Gradient descent instead of AdamW, so that the length of a step is that of the clipped gradient."""

    def _optimizer(self, groups, learning_rate):
        return torch.optim.SGD(groups, lr=learning_rate)


def test_one_player_does_not_shorten_the_steps_of_another_and_has_a_rate_of_its_own(tmp_path, calls):
    PlainDescent(config(tmp_path, max_steps=1, ema_decay=0.0), GameTask).train()
    (saving,) = [call for call in calls if call[0] == "before_saving"]
    assert saving[3] == pytest.approx((-0.1 * 1.0, -1e-4 * FLAT))  # rate times gradient, clipped to 1 or as it is


def test_a_run_sets_up_from_the_data_once_and_not_when_it_is_resumed(tmp_path, calls):
    Run(config(tmp_path, max_steps=2), GameTask).train()
    assert calls.count("before_first_step") == 1
    calls.clear()
    Run(config(tmp_path, max_steps=4, resume="latest"), GameTask).train()
    assert "before_first_step" not in calls
    (pipeline,) = [call for call in calls if call[0] == "pipeline"]
    assert pipeline[1] == 1.0  # what was set is in the checkpoint, and in the pipeline


def test_before_saving_sees_the_averaged_weights_in_evaluation_mode_without_gradients(tmp_path, calls):
    Run(config(tmp_path), GameTask).train()
    (saving,) = [call for call in calls if call[0] == "before_saving"]
    (pipeline,) = [call for call in calls if call[0] == "pipeline"]
    assert saving[1:3] == (False, False)
    assert saving[3][0] == pipeline[2] != -0.4  # the average lags behind the last weights, 4 steps of 0.1


def test_held_out_means_are_over_images_though_batches_differ_in_size(tmp_path):
    data = load_data(DataConfig())
    run = RunConfig(output_dir=str(tmp_path), batch_size=64, validation_samples=100)
    seen = []

    def terms_of(batch):
        seen.append(batch["images"])
        return {"brightness": batch["images"].flatten(1).mean(dim=1), "one": torch.ones(len(batch["images"]))}

    means = held_out_means(data, run, Accelerator(cpu=True), terms_of)
    assert [len(images) for images in seen] == [64, 36]
    assert means["images"] == 100 and means["one"] == 1
    assert means["brightness"] == pytest.approx(torch.cat(seen).mean().item(), rel=1e-6)


@dataclass
class Menu(RunConfig):
    """Options of which some are of others."""

    dish: Literal["soup", "salad", "bread"] = option("soup", "")
    spoons: list[int] = option([1], "", of=("dish", "soup"))
    dressing: str = option("oil", "", of=("dish", "salad", "bread"))
    drink: float = option(0.0, "")
    ice: bool = option(False, "", of="drink")


@pytest.mark.parametrize(
    "options", [{}, {"spoons": [2]}, {"dish": "bread", "dressing": "none", "spoons": [1]}, {"drink": 0.5, "ice": True}]
)
def test_options_that_do_something_are_accepted(options):
    Menu(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dish": "salad", "spoons": [2]}, r"spoons=\[2\] is an option of dish=soup, and dish is salad"),
        ({"dressing": "none"}, "dressing=none is an option of dish=salad or bread, and dish is soup"),
        ({"ice": True}, r"ice=True is an option of drink, and drink is 0\.0"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Menu(**options)


@pytest.mark.parametrize(
    "script", sorted(module.name for module in iter_modules(training.__path__) if module.name.startswith("train_"))
)
def test_what_an_option_is_of_is_an_option(script):
    module = import_module(f"annealers.training.{script}")
    classes = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, RunConfig)]
    of_another = [(kind, field) for kind in classes for field in dataclasses.fields(kind) if field.metadata["help"].of]
    assert of_another
    for kind, field in of_another:
        other, *values = field.metadata["help"].of
        assert other in {option.name for option in dataclasses.fields(kind)} - {field.name}
        assert len(set(values)) == len(values)
