"""Checkpoints are complete or absent whatever the moment of death, rotate, and continue a run exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from annealers.checkpoint import Checkpoints
from annealers.ema import EMA

SUPPORT = Path(__file__).parent / "support"


class Training:
    """A module with BatchNorm, and with tied weights if asked, Adam, a schedule and an EMA."""

    def __init__(self, folder, keep=2, tied=False, **accelerator):
        torch.manual_seed(0)
        self.accelerator = Accelerator(step_scheduler_with_optimizer=False, cpu=True, **accelerator)
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        if tied:
            module[2].weight = module[0].weight
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        self.module, self.optimizer, self.schedule = self.accelerator.prepare(module, optimizer, schedule)
        self.ema = EMA(self.module, decay=0.9)
        self.checkpoints = Checkpoints(folder, self.accelerator, keep)

    def train(self, first, last):
        for step in range(first, last):
            batch = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            self.accelerator.backward(self.module(batch).square().mean())
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.ema.update()

    def save(self, step, **record):
        return self.checkpoints.save(step, {"step": step, **record}, self.ema)

    def state(self):
        moments = [tensor for state in self.optimizer.state_dict()["state"].values() for tensor in state.values()]
        averages = self.ema.state_dict()["tensors"].values()
        return [*self.module.state_dict().values(), *averages, *moments, torch.tensor(self.schedule.get_last_lr())]


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("tied", [False, True])
def test_a_loaded_run_continues_bit_for_bit(tmp_path, tied):
    straight = Training(tmp_path, tied=tied)
    straight.train(0, 3)
    straight.save(3, best=0.25)
    straight.train(3, 6)

    resumed = Training(tmp_path, tied=tied)
    resumed.train(70, 72)  # so that nothing is right by chance
    assert resumed.checkpoints.load("latest", resumed.ema) == {"step": 3, "best": 0.25}
    resumed.train(3, 6)
    assert resumed.ema.updates == straight.ema.updates == 6
    for a, b in zip(straight.state(), resumed.state(), strict=True):
        assert torch.equal(a, b)


def test_loading_starts_a_new_round_of_gradient_accumulation(tmp_path):
    training = Training(tmp_path, gradient_accumulation_steps=4)
    training.accelerator.step = 3
    training.save(1)
    training.accelerator.step = 2
    training.checkpoints.load()
    assert training.accelerator.step == 0


def test_a_checkpoint_holds_what_is_needed_under_its_step(tmp_path):
    path = Training(tmp_path).save(123)
    assert path == tmp_path / "checkpoint-00000123" and names(tmp_path) == [path.name]
    weights, states = {"model.safetensors", "ema.safetensors"}, {"optimizer.bin", "scheduler.bin"}
    assert weights | states | {"record.json"} <= set(names(path))
    assert json.loads((path / "record.json").read_text()) == {"step": 123}


def test_a_run_without_an_ema_saves_none_and_loads(tmp_path):
    training = Training(tmp_path)
    path = training.checkpoints.save(1, {"step": 1})
    assert "ema.safetensors" not in names(path)
    assert training.checkpoints.load() == {"step": 1}
    with pytest.raises(FileNotFoundError, match=r"checkpoint-00000001 has no ema\.safetensors"):
        training.checkpoints.load("latest", training.ema)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept_by_step_and_not_by_name(tmp_path, keep):
    training = Training(tmp_path, keep)
    steps = [9, 99_999_998, 99_999_999, 100_000_000, 100_000_001]  # the last two names have a digit more
    for step in steps:
        training.save(step)
        assert training.checkpoints.newest() == tmp_path / f"checkpoint-{step:08d}"
    assert names(tmp_path) == sorted(f"checkpoint-{step:08d}" for step in steps[-keep:])


def test_a_complete_checkpoint_of_the_same_step_is_left_alone(tmp_path):
    training = Training(tmp_path)
    training.save(5, note="first")
    before = load_file(tmp_path / "checkpoint-00000005/model.safetensors")
    training.train(0, 2)
    assert training.save(5, note="second") == tmp_path / "checkpoint-00000005"
    assert training.checkpoints.load() == {"step": 5, "note": "first"}
    after = load_file(tmp_path / "checkpoint-00000005/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_incomplete_newest_one_is_passed_over_and_can_be_written_again(tmp_path):
    training = Training(tmp_path)
    training.save(1)
    broken = training.save(2)
    (broken / "record.json").unlink()
    assert training.checkpoints.newest() == tmp_path / "checkpoint-00000001"
    assert training.checkpoints.load() == {"step": 1}
    training.save(2)
    assert training.checkpoints.newest() == broken
    assert names(tmp_path) == ["checkpoint-00000001", "checkpoint-00000002"]


def test_other_folders_are_neither_checkpoints_nor_deleted(tmp_path):
    for name in ("checkpoint-best", "checkpoint-12", "old-checkpoint-00000009", "samples"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text("{}")
    training = Training(tmp_path, keep=1)
    assert training.checkpoints.newest() is None and training.checkpoints.load() is None
    others = names(tmp_path)
    training.save(1)
    training.save(2)
    assert names(tmp_path) == sorted([*others, "checkpoint-00000002"])


def test_leftovers_of_a_killed_run_are_removed_at_the_start(tmp_path):
    for name in (".tmp-checkpoint-00000007", ".tmp-old-checkpoint-00000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text("{}")
    assert Training(tmp_path).checkpoints.newest() is None
    assert names(tmp_path) == []


def test_the_checkpoint_just_saved_is_kept_after_resuming_from_an_older_one(tmp_path):
    training = Training(tmp_path, keep=2)
    for step in (1000, 1100):
        training.save(step)
    assert training.save(600).exists()
    training.save(700)
    assert names(tmp_path) == [f"checkpoint-{step:08d}" for step in (700, 1000, 1100)]


def test_a_missing_or_incomplete_checkpoint_is_named_with_those_that_exist(tmp_path):
    training = Training(tmp_path)
    training.save(1)
    training.save(2)
    with pytest.raises(FileNotFoundError, match="03 does not exist; .*: checkpoint-00000001, checkpoint-00000002$"):
        training.checkpoints.load(tmp_path / "checkpoint-00000003")
    (tmp_path / "checkpoint-00000002/record.json").unlink()
    with pytest.raises(FileNotFoundError, match="00000002 is not complete: .*: checkpoint-00000001$"):
        training.checkpoints.load(str(tmp_path / "checkpoint-00000002"))
    with pytest.raises(FileNotFoundError, match="nowhere/x does not exist; .*: none"):
        training.checkpoints.load("nowhere/x")


def test_an_older_checkpoint_loads_by_its_path(tmp_path):
    training = Training(tmp_path)
    path = training.save(1)
    training.save(2)
    assert training.checkpoints.load(str(path), training.ema) == {"step": 1}


def test_a_record_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    training = Training(tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        training.checkpoints.save(1, {"loss": torch.tensor(1.0)})
    assert names(tmp_path) == []


def test_keeping_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        Training(tmp_path, keep=0)


class Command:
    """A pickle that runs a command when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl"])
def test_loading_never_executes_a_pickle(tmp_path, name):
    training = Training(tmp_path / "run")
    path = training.save(1)
    torch.save(Command(tmp_path / "executed"), path / name)
    try:
        training.checkpoints.load("latest", training.ema)
    except Exception as error:  # Accelerate passes over random states that it cannot read
        assert "Weights only load failed" in str(error)
    assert not (tmp_path / "executed").exists()
    torch.load(path / name, weights_only=False)  # the command itself works
    assert (tmp_path / "executed").exists()


# ---- death at every moment ------------------------------------------------------------------------------------------


class Death(BaseException):
    """Raised where the process is taken to die; nothing it does afterwards reaches the disk."""


class Mortal:
    """Dies at the n-th file operation under a folder; Python announces each operation before it happens."""

    operations = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")

    def __init__(self):
        self.folder, self.remaining = None, 0
        sys.addaudithook(self.on_event)  # there is no way to remove it, so one serves all tests

    def on_event(self, event, arguments):
        if self.folder is None or event not in self.operations:
            return
        self.remaining -= 1
        if self.remaining < 0:
            raise Death(f"at {event} {arguments[0]}")

    def lives_through(self, folder, operations, function):
        self.folder, self.remaining = folder, operations
        try:
            function()
        except Death:
            return False
        finally:
            self.folder = None
        return True


mortal = Mortal()


def content(checkpoint):
    """A checkpoint's step, after opening each of its files."""
    step = json.loads((checkpoint / "record.json").read_text())["step"]
    assert load_file(checkpoint / "ema.safetensors").keys() == load_file(checkpoint / "model.safetensors").keys()
    for name in ("optimizer.bin", "scheduler.bin"):
        torch.load(checkpoint / name, weights_only=True)
    return step


def test_death_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(tmp_path):
    found = []
    for operations in range(1000):
        folder = tmp_path / str(operations)
        training = Training(folder, keep=2)
        training.save(1)
        training.save(2)
        survived = mortal.lives_through(folder, operations, lambda training=training: training.save(3))
        complete = [path for path in folder.glob("checkpoint-*") if content(path)]  # all that bear a good name open
        found.append(content(Training(folder).checkpoints.newest()))
        assert found[-1] in (2, 3) and len(complete) >= 2 and not list(folder.glob(".tmp-*"))
        if survived:
            break
    assert survived and found == sorted(found) and found.count(2) >= 5 and found.count(3) >= 5


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to see what is flushed")
def test_everything_is_on_disk_before_the_name_that_promises_it(tmp_path, monkeypatch):
    log, rename = [], os.rename
    monkeypatch.setattr("os.fsync", lambda number: log.append(("flush", os.readlink(f"/proc/self/fd/{number}"))))
    monkeypatch.setattr("os.rename", lambda a, b: log.append(("rename", str(a))) or rename(a, b))
    training = Training(tmp_path)
    path = training.save(1)
    unfinished = f"{tmp_path}/.tmp-checkpoint-00000001"
    renamed = log.index(("rename", unfinished))
    flushed = [name for _, name in log[:renamed]]
    assert set(flushed) == {unfinished, *(f"{unfinished}/{name}" for name in names(path))}
    assert flushed[-1] == unfinished and log[renamed + 1 :] == [("flush", str(tmp_path))]


def run_script(name, *arguments):
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    command = [sys.executable, str(SUPPORT / name), *map(str, arguments)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return finished.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_run_killed_at_random_moments_always_leaves_a_readable_newest_checkpoint(tmp_path):
    lines = run_script("checkpoint_kills.py", tmp_path, 0, 6).splitlines()
    assert len(lines) == 6
    print("\n".join(lines))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_the_number_of_processes_may_change_and_sharded_weights_are_averaged_as_whole_ones(tmp_path):
    run_script("checkpoint_processes.py", tmp_path)
