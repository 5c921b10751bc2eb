"""Runs a training script several times in each process of a launched group.

Arguments: a JSON list of command lines, and the name of the script, train_ddpm if there is none. One group serves them
all, since starting one takes longer than the trainings.
"""

import json
import sys
from importlib import import_module

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

if __name__ == "__main__":
    # `end_training` would close the group of processes that the next run needs.
    Accelerator.end_training = lambda self: [tracker.finish() for tracker in self.trackers]
    script = import_module(f"annealers.training.{sys.argv[2] if len(sys.argv) > 2 else 'train_ddpm'}")
    for arguments in json.loads(sys.argv[1]):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        script.main(arguments)
