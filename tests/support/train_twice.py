"""Runs train_ddpm several times in each process of a launched group.

Argument: a JSON list of command lines. One group serves them all, since starting one takes longer than the trainings.
"""

import json
import sys

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from annealers.training.train_ddpm import main

if __name__ == "__main__":
    # `end_training` would close the group of processes that the next run needs.
    Accelerator.end_training = lambda self: [tracker.finish() for tracker in self.trackers]
    for arguments in json.loads(sys.argv[1]):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        main(arguments)
