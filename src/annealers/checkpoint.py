"""Checkpoints that survive a kill at any moment.

A checkpoint is written beside its place and then renamed, which a file system does at once or not at all:

    .tmp-checkpoint-00000500  ->  every file written and synced  ->  checkpoint-00000500

So a folder called `checkpoint-...` is a whole one, and the newest of them is where a run can go on.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from annealers.ema import EMA

CHECKPOINT = re.compile(r"checkpoint-(\d{8,})")
UNFINISHED = ".tmp-"
RECORD = "record.json"
EMA_WEIGHTS = "ema.safetensors"


class Checkpoints:
    """The checkpoints of a run, newest kept.

    Args:
        folder: Where they are; created if need be.
        accelerator: Writes and reads model and optimizer, however they are distributed.
        keep: Number of newest checkpoints to keep.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder, self.accelerator, self.keep = Path(folder), accelerator, keep
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"{UNFINISHED}*"):
                shutil.rmtree(leftover)
        accelerator.wait_for_everyone()

    def save(self, step: int, record: dict[str, Any], ema: EMA) -> Path:
        """Writes the checkpoint of a step, then drops the oldest; every process calls it.

        Args:
            step: Optimizer steps done.
            record: What else to keep, JSON-able.
            ema: The averaged weights.
        """
        accelerator = self.accelerator
        final = self.folder / f"checkpoint-{step:08d}"
        if final.is_dir():  # a resumed run has come by here before, with the same weights
            return final
        unfinished = final.with_name(UNFINISHED + final.name)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        state = ema.state_dict()
        if accelerator.is_main_process:
            save_file(state["tensors"], unfinished / EMA_WEIGHTS)
            record = {**record, "ema_updates": state["updates"]}
            (unfinished / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            finish(unfinished, final)
            for old in self.all()[: -self.keep]:
                remove(old)
        accelerator.wait_for_everyone()
        return final

    def all(self) -> list[Path]:
        """The whole checkpoints, oldest first."""
        found = [path for path in self.folder.iterdir() if CHECKPOINT.fullmatch(path.name) and is_whole(path)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))

    def newest(self) -> Path | None:
        return self.all()[-1] if self.all() else None

    def load(self, checkpoint: str | Path, ema: EMA) -> dict[str, Any] | None:
        """Loads model, optimizer and averages; every process calls it.

        Args:
            checkpoint: A folder, or "latest".
            ema: Receives the averaged weights.

        Returns:
            The record that was saved, or None if there is no checkpoint and "latest" was asked for.

        Raises:
            FileNotFoundError: If the folder is no whole checkpoint.
        """
        path = self.newest() if str(checkpoint) == "latest" else Path(checkpoint)
        if path is None:
            return None
        if not is_whole(path):
            raise FileNotFoundError(
                f"{path} is not a checkpoint; this run has {[p.name for p in self.all()] or 'none'}"
            )
        record = json.loads((path / RECORD).read_text())
        self.accelerator.load_state(str(path))
        # The count of micro-batches belongs to the accumulation of the run that saved it, not to this one's.
        self.accelerator.step = 0
        ema.load_state_dict({"updates": record["ema_updates"], "tensors": load_file(path / EMA_WEIGHTS)})
        return record


def is_whole(path: Path) -> bool:
    return (path / RECORD).is_file() and (path / EMA_WEIGHTS).is_file()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` at the end, and never half of it."""
    unfinished = folder.with_name(UNFINISHED + folder.name)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    yield unfinished
    if folder.exists():
        remove(folder)
    finish(unfinished, folder)


def finish(unfinished: Path, final: Path) -> None:
    """Syncs everything below `unfinished` to the disk, then renames it."""
    for directory, _, files in os.walk(unfinished):
        for name in files:
            sync(os.path.join(directory, name))
        sync(directory)
    unfinished.rename(final)
    sync(final.parent)


def sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Deletes a folder so that a kill on the way leaves no half of it under its name."""
    doomed = folder.with_name(f"{UNFINISHED}old-{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)
