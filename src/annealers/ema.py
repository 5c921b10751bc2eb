"""Exponential moving average of a module's parameters, with its buffers copied.

After update n = 1, 2, ... the shadow of each parameter theta is

    shadow <- shadow + (1 - d_n) (theta - shadow),        d_n = min(decay, (1 + n) / (10 + n)).

Source: Polyak & Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging", doi:10.1137/0330046, for
averaging; the warm-up of d_n is that of `num_updates` in TensorFlow's `tf.train.ExponentialMovingAverage`. Without it
a decay of 0.9999 still holds a third of the random initial weights after 10,000 updates.
"""

# pyright: reportPrivateImportUsage=false
# torch's operations on lists of tensors have names with an underscore

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import torch
from accelerate.utils import extract_model_from_parallel
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


class EMAState(TypedDict):
    """What an `EMA` saves: the number of updates, and whole tensors on the CPU under the module's own names."""

    updates: int
    tensors: dict[str, torch.Tensor]


class EMA:
    """A shadow copy of a module whose parameters are averaged over the updates and whose buffers are the latest ones.

    Parameters are averaged in float32 (float64 if they are float64), so that the small increments are not rounded away
    next to a bfloat16 weight. All buffers, floating point (BatchNorm statistics, codebooks) or integer (counters), are
    copied at each update: they are statistics of the latest weights, and some are averages already. A parameter under
    two names is averaged once.

    Build it after `accelerator.prepare`, with the prepared module or the bare one. Under FSDP2 each process averages
    its own shard; `state_dict` and `load_state_dict` then communicate, so every process must call them.

    Args:
        module: The module that is trained.
        decay: Largest d_n, 0 <= decay < 1.
        warmup: Whether d_n starts low, as above; if not, d_n = decay.

    Raises:
        ValueError: If the decay is outside [0, 1), or a parameter is empty on this process (DeepSpeed ZeRO-3 keeps it
            elsewhere, where it cannot be averaged).
    """

    def __init__(self, module: torch.nn.Module, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"need 0 <= decay < 1, got decay={decay}")
        self.module = extract_model_from_parallel(module, keep_torch_compile=False)
        self.max_decay, self.warmup, self.updates = decay, warmup, 0
        _reshard(self.module)
        self._parameters = dict(self.module.named_parameters())
        empty = [name for name, parameter in self._parameters.items() if parameter.numel() == 0]
        if empty:
            raise ValueError(f"cannot average parameters that are empty on this process (DeepSpeed ZeRO-3?): {empty}")
        self._averages = [
            _local(p).detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for p in self._parameters.values()
        ]
        self._buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        paths = [name.rpartition(".") for name in self._buffers]
        self._buffer_owners = [(self.module.get_submodule(path), leaf) for path, _, leaf in paths]

    def decay(self, n: int) -> float:
        """d_n, the weight that the past keeps in update n = 1, 2, ..."""
        return min(self.max_decay, (1 + n) / (10 + n)) if self.warmup else self.max_decay

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the parameters and copies the buffers; call once after each optimizer step."""
        self.updates += 1
        live, count = self._live(), len(self._averages)
        parameters = [p.to(average.dtype) for p, average in zip(live[:count], self._averages, strict=True)]
        torch._foreach_lerp_(self._averages, parameters, 1.0 - self.decay(self.updates))
        if self._buffers:
            torch._foreach_copy_(list(self._buffers.values()), live[count:])

    @contextmanager
    def swapped_in(self) -> Iterator[torch.nn.Module]:
        """The live module holding the averages and the copied buffers; its own values return bit by bit at the end."""
        with torch.no_grad():
            kept = [tensor.clone() for tensor in self._live()]
        self._write(self._averages + list(self._buffers.values()))
        try:
            yield self.module
        finally:
            self._write(kept)

    def state_dict(self) -> EMAState:
        """The number of updates and a copy of the averages and buffers; every process must call it."""
        tensors = {n: _full(s, p) for (n, p), s in zip(self._parameters.items(), self._averages, strict=True)}
        tensors.update(self._buffers)
        copies = {n: t.to("cpu", copy=True, memory_format=torch.contiguous_format) for n, t in tensors.items()}
        return {"updates": self.updates, "tensors": copies}

    def load_state_dict(self, state: EMAState) -> None:
        """Continues from a `state_dict`, on any number of processes.

        Raises:
            ValueError: If the names or shapes are not those of the module.
        """
        tensors = state["tensors"]
        own = {name: t.shape for name, t in [*self._parameters.items(), *self._buffers.items()]}
        given = {name: t.shape for name, t in tensors.items()}
        if given != own:
            wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
            raise ValueError(
                f"this EMA state is of another module; first of {len(wrong)} differences: {wrong[0]} has shape "
                f"{given.get(wrong[0], 'none')} in the state and {own.get(wrong[0], 'none')} in the module"
            )
        self.updates = state["updates"]
        for (name, parameter), average in zip(self._parameters.items(), self._averages, strict=True):
            average.copy_(_shard(tensors[name].to(average), parameter))
        for name, buffer in self._buffers.items():
            buffer.copy_(tensors[name])

    def _live(self) -> list[torch.Tensor]:
        """The module's own tensors, in the order of the averages and then the buffers.

        Buffers are looked up each time, because a module may assign a new tensor to one.
        """
        buffers = [getattr(owner, name) for owner, name in self._buffer_owners]
        return [_local(p) for p in self._parameters.values()] + buffers

    @torch.no_grad()
    def _write(self, values: list[torch.Tensor]) -> None:
        """Writes values, in the order of `_live`, into the module."""
        _reshard(self.module)
        torch._foreach_copy_(self._live(), values)


def _reshard(module: torch.nn.Module) -> None:
    """Drops the gathered parameters that FSDP2 keeps after a forward pass: it would go on using them."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter: its shard under FSDP2 (sharing memory), else all of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _full(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The whole tensor of which `local` is this process's part, laid out as `parameter`."""
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements, shape = parameter.device_mesh, parameter.placements, parameter.shape
    return DTensor.from_local(local, mesh, placements, shape=shape, stride=parameter.stride()).full_tensor()


def _shard(full: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of `full`, laid out as `parameter`."""
    if not isinstance(parameter, DTensor):
        return full
    return distribute_tensor(full, parameter.device_mesh, parameter.placements).to_local()
