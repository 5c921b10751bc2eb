"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder `checkpoint-00000123` with what `Accelerator.save_state` writes, the EMA and, last, the run's
`record.json`. It is written under another name, flushed to disk, and only then renamed, which POSIX file systems do
atomically: under a good name there is a complete checkpoint or nothing. Old ones leave the same way, renamed before
they are deleted.

    .tmp-checkpoint-00000123/   being written           -> rename ->  checkpoint-00000123/
    checkpoint-00000100/        no longer wanted        -> rename ->  .tmp-old-checkpoint-00000100/  -> delete
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file

from annealers.ema import EMA

_UNFINISHED = ".tmp-"
_NAME = re.compile(r"checkpoint-\d{8,}")
_RECORD = "record.json"
_EMA = "ema.safetensors"


class Checkpoints:
    """The checkpoints of one run.

    Weights and EMA are safetensors. Optimizer, learning-rate and random states are PyTorch files, which Accelerate
    opens with `weights_only=True`, so that loading executes nothing (DeepSpeed reads its own files by its own rules:
    resume from folders you trust). The number of processes may change between saving and loading; one that finds no
    random state keeps its own, so a run that draws from torch's generators must reseed them (`step_seed`).

    Args:
        folder: Where the checkpoints are; made if needed. All processes must see it.
        accelerator: Whose prepared modules, optimizers and schedules are saved.
        keep: How many of the newest checkpoints to keep, >= 1.

    Raises:
        ValueError: If `keep` is below 1.
    """

    def __init__(self, folder: str | Path, accelerator: Accelerator, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"need keep >= 1 checkpoints, got keep={keep}")
        self.folder, self.accelerator, self.keep = Path(folder), accelerator, keep
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(leftover)

    # ---- writing ----------------------------------------------------------------------------------------------------

    def save(self, step: int, record: dict, ema: EMA | None = None) -> Path:
        """Saves the run after `step` optimizer steps; every process calls it.

        Args:
            step: Optimizer steps done. A complete checkpoint of this step is left alone.
            record: What else the run needs to continue, as JSON.
            ema: The moving average to save along.
        """
        accelerator, final = self.accelerator, self.folder / f"checkpoint-{step:08d}"
        text = json.dumps(record, indent=2) + "\n"
        (exists,) = broadcast_object_list([_is_complete(final)])  # decided on one process, or the others might wait
        if exists:
            return final
        unfinished = self.folder / f"{_UNFINISHED}{final.name}"
        accelerator.save_state(str(unfinished))
        state = ema.state_dict() if ema is not None else None  # every process: it may gather shards
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if state is not None:
                save_file(state["tensors"], unfinished / _EMA, metadata={"updates": str(state["updates"])})
            (unfinished / _RECORD).write_text(text)
            _put_in_place(unfinished, final)  # what may be there is damaged, for it is not complete
            for old in _complete(self.folder)[: -self.keep]:
                if old != final:  # after resuming from an older one, the newest is not that of the largest step
                    _discard(old)
        accelerator.wait_for_everyone()
        return final

    # ---- reading ----------------------------------------------------------------------------------------------------

    def newest(self) -> Path | None:
        """The complete checkpoint of the largest step, or None."""
        complete = _complete(self.folder)
        return complete[-1] if complete else None

    def load(self, checkpoint: str | Path = "latest", ema: EMA | None = None) -> dict | None:
        """Puts a checkpoint into the prepared modules, optimizers and schedules; every process calls it.

        Args:
            checkpoint: A checkpoint folder, or "latest" for the newest complete one of this run.
            ema: The moving average to continue.

        Returns:
            The record given to `save`, or None if "latest" finds no checkpoint.

        Raises:
            FileNotFoundError: If the checkpoint does not exist, is not complete, or has no EMA although one is given.
        """
        path = self.newest() if checkpoint == "latest" else Path(checkpoint)
        if path is None:
            return None
        if not _is_complete(path):
            known = ", ".join(c.name for c in _complete(path.parent)) or "none"
            what = f"is not complete: it has no {_RECORD}" if path.exists() else "does not exist"
            raise FileNotFoundError(f"checkpoint {path} {what}; complete checkpoints beside it: {known}")
        if ema is not None:
            if not (path / _EMA).is_file():
                raise FileNotFoundError(f"checkpoint {path} has no {_EMA}: it was saved by a run without an EMA")
            with safe_open(path / _EMA, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                ema.load_state_dict({"updates": int(file.metadata()["updates"]), "tensors": tensors})
        self.accelerator.load_state(str(path))
        # The micro-step counter of gradient accumulation: Accelerate restores it, but only on processes that find a
        # random state. A checkpoint lies between optimizer steps, so it starts anew on all of them.
        self.accelerator.step = 0
        return json.loads((path / _RECORD).read_text())


def _is_complete(path: Path) -> bool:
    """Whether the file that is written last is there."""
    return (path / _RECORD).is_file()


def _complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, by increasing step."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and _is_complete(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` when it is whole and on disk; one process uses it."""
    unfinished = folder.with_name(f"{_UNFINISHED}{folder.name}")
    for leftover in (unfinished, _doomed(folder)):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir()
    yield unfinished
    _put_in_place(unfinished, folder)


def _put_in_place(unfinished: Path, final: Path) -> None:
    """Gives a folder its good name once all of it is on disk."""
    _flush_tree(unfinished)
    if final.exists():
        _discard(final)
    unfinished.rename(final)
    _flush(final.parent)


def _discard(folder: Path) -> None:
    """Deletes a folder, after giving it a name that says so."""
    shutil.rmtree(folder.rename(_doomed(folder)))


def _doomed(folder: Path) -> Path:
    return folder.with_name(f"{_UNFINISHED}old-{folder.name}")


def _flush(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on disk."""
    if os.name == "nt":
        return  # Windows can flush neither folders nor what is open for reading
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(folder: Path) -> None:
    """Waits until everything under a folder is on disk, contents before the names that lead to them."""
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            _flush(Path(path, name))
        _flush(Path(path))
