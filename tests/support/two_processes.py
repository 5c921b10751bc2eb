"""Launches training scripts on two processes of the CPU, as a test's user would."""

import json
import os
import subprocess
import sys
from pathlib import Path

TRAIN_TWICE = Path(__file__).with_name("train_twice.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
LAUNCHED = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def launch(*command):
    """Runs Python with that command line, and returns the finished process once it has succeeded."""
    done = subprocess.run([sys.executable, *map(str, command)], env=LAUNCHED, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def train_on_two_processes(script, runs, launcher=()):
    """Runs `training/SCRIPT.py` with each of the command lines in `runs`, one after the other, on two processes.

    They are forked by one that has imported everything, which saves seconds, or started by `launcher`, a `TORCHRUN`
    with its number of processes.
    """
    launch(*launcher, TRAIN_TWICE, json.dumps(runs), script)
