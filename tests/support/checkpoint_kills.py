"""Forks writers that save checkpoints in a loop, kills each with SIGKILL at a random moment, and reads what is left.

usage: checkpoint_kills.py FOLDER SEED KILLS; prints a line per kill, and fails at the first newest one it cannot read
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._dynamo  # what Adam imports late: once here, not in every writer
from accelerate import Accelerator
from safetensors.torch import load_file

from annealers.checkpoint import Checkpoints
from annealers.ema import EMA


def write_forever(folder):
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    module = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(4)])
    module, optimizer = accelerator.prepare(module, torch.optim.Adam(module.parameters()))
    checkpoints, ema = Checkpoints(folder, accelerator, keep=2), EMA(module)
    record = checkpoints.load("latest", ema) or {"step": 0}
    while True:
        accelerator.backward(module(torch.ones(1, 512)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        record["step"] += 1
        checkpoints.save(record["step"], record, ema)


def read(checkpoint):
    """Opens every file of a checkpoint; returns its step."""
    record = json.loads((checkpoint / "record.json").read_text())
    assert len(load_file(checkpoint / "model.safetensors")) == len(load_file(checkpoint / "ema.safetensors")) == 8
    steps = [s["step"].item() for s in torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"].values()]
    assert steps == [record["step"]] * 8 and int(checkpoint.name[-8:]) == record["step"]
    return record["step"]


def main(folder, seed, kills):
    rng = random.Random(seed)
    last = 0
    for kill in range(kills):
        writer = os.fork()
        if writer == 0:
            write_forever(folder)
        while not any(int(path.name[-8:]) > last for path in folder.glob("checkpoint-*")):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))  # about three saves
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        left = sorted(path.name for path in folder.iterdir())
        checkpoints = Checkpoints(folder, SimpleNamespace(is_main_process=True))  # cleans what was left
        step = read(checkpoints.newest())
        assert step >= last and not list(folder.glob(".tmp-*"))
        print(f"kill {kill}: newest complete step {step}, found {left}", flush=True)
        last = step


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
