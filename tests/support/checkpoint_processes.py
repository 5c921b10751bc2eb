"""Saves with one number of processes and loads with another, and averages sharded weights; on CPU, with gloo.

usage: checkpoint_processes.py FOLDER
"""

import os
import socket
import sys
import traceback
from pathlib import Path

import torch
import torch._dynamo  # what optimizers import late: once here, not in every process
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from annealers.checkpoint import Checkpoints
from annealers.ema import EMA


def run(processes, function, *arguments):
    """Runs a function on several processes, forked before torch started any thread."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ.update(address, ACCELERATE_USE_CPU="true")
            if processes > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
            try:
                function(*arguments)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    assert statuses == [0] * processes, f"{function.__name__} on {processes} processes: {statuses}"


class Training:
    """A small model with BatchNorm, Adam, a schedule and an EMA, the same batch on all processes."""

    def __init__(self, folder, accumulation=1):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=accumulation, step_scheduler_with_optimizer=False, cpu=True
        )
        module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        self.module, self.optimizer, self.schedule = self.accelerator.prepare(module, optimizer, schedule)
        self.ema = EMA(self.module, decay=0.9)
        self.checkpoints = Checkpoints(folder, self.accelerator)

    def train(self, first, last):
        for step in range(first, last):
            batch = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            self.accelerator.backward(self.module(batch).square().mean())
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.ema.update()

    def state(self):
        """Weights, averages, Adam's moments and the learning rate, as one list of tensors."""
        moments = [tensor for state in self.optimizer.state_dict()["state"].values() for tensor in state.values()]
        averages = self.ema.state_dict()["tensors"].values()
        return [*self.ema.module.state_dict().values(), *averages, *moments, torch.tensor(self.schedule.get_last_lr())]


def save(folder, processes):
    training = Training(folder)
    assert training.accelerator.num_processes == processes
    training.train(0, 3)
    training.checkpoints.save(3, {"step": 3}, training.ema)


def load_and_go_on(folder, processes):
    """The resumed run is the uninterrupted one, to the rounding of the mean of gradients over processes."""
    straight, resumed = Training(folder / "unused"), Training(folder)
    straight.train(0, 3)
    with torch.no_grad():
        for tensor in resumed.module.parameters():
            tensor.fill_(7.0)
    resumed.accelerator.step = 5
    assert resumed.checkpoints.load("latest", resumed.ema) == {"step": 3}
    assert resumed.accelerator.step == 0 and resumed.accelerator.num_processes == processes
    for _ in range(2):
        for a, b in zip(straight.state(), resumed.state(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        straight.train(3, 6)
        resumed.train(3, 6)


def average_sharded_weights(folder):
    """The EMA of weights sharded by FSDP2 equals that of whole weights."""
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))

    def module():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))  # 7 and 3 rows: uneven shards

    whole, sharded = module(), fully_shard(module(), mesh=mesh)
    emas = [EMA(whole, decay=0.8), EMA(sharded, decay=0.8)]
    batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    for ema in emas:
        optimizer = torch.optim.SGD(ema.module.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            ema.module(batch).square().mean().backward()
            optimizer.step()
            ema.update()
    assert emas[1]._averages[0].numel() < emas[0]._averages[0].numel()
    states = [ema.state_dict() for ema in emas]
    torch.testing.assert_close(states[0], states[1])
    with torch.no_grad():
        live = sharded(batch)  # leaves gathered parameters behind
        with emas[0].swapped_in(), emas[1].swapped_in():
            torch.testing.assert_close(whole(batch), sharded(batch))
            assert not torch.allclose(sharded(batch), live)
        assert torch.equal(sharded(batch), live)
    loaded = EMA(sharded)
    loaded.load_state_dict(states[0])
    torch.testing.assert_close(loaded.state_dict(), states[0], rtol=0, atol=0)
    torch.distributed.destroy_process_group()


def main(folder):
    for before, after in ((1, 2), (2, 1)):
        run(before, save, folder / f"{before}", before)
        run(after, load_and_go_on, folder / f"{before}", after)
    run(2, average_sharded_weights, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
