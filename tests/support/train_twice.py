"""Runs a training script several times on two processes, which one process forks after importing everything once.

Arguments: a JSON list of command lines, and the name of the script, train_ddpm if there is none. One group serves them
all, since starting one takes longer than the trainings. Launched by torchrun it is one process of that group.
"""

import json
import os
import sys
from importlib import import_module

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState


def train(script, runs):
    # `end_training` would close the group of processes that the next run needs.
    Accelerator.end_training = lambda self: [tracker.finish() for tracker in self.trackers]
    for arguments in runs:
        AcceleratorState._reset_state()
        GradientState._reset_state()
        script.main(arguments)


if __name__ == "__main__":
    script = import_module(f"annealers.training.{sys.argv[2] if len(sys.argv) > 2 else 'train_ddpm'}")
    runs = json.loads(sys.argv[1])
    if "RANK" in os.environ:
        train(script, runs)
    else:
        from checkpoint_processes import run

        run(2, train, script, runs)
