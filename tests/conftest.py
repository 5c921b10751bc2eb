"""One thread to each process of the tests: pytest-xdist starts a process for each core; small tensors gain nothing."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; launched processes inherit it
