"""Noise that hardly adds noise to a measurement: array-RQMC for samplers on the line.

A sampler of random steps moves n particles x by x + .. + s z, and its result depends on which z each of them drew. In
one dimension the particles can be put in order, and then the pairs (rank of x, z) should fill the unit square evenly,
as the points (i / n, frac(i g + u)) do, with g the golden ratio and one random shift u per draw. The law of each z is
exact, and the error of an average over particles falls nearly like 1 / n rather than 1 / sqrt(n).

Source: L'Ecuyer, Lecot, Tuffin 2008, "A Randomized Quasi-Monte Carlo Simulation Method for Markov Chains", Operations
Research 56.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from scipy.special import ndtri

# One per draw of the same step, so that two draws fill a cube evenly, and not its diagonal.
IRRATIONALS = ((5**0.5 - 1) / 2, 2**0.5 - 1, 3**0.5 - 1, 7**0.5 - 2)


class OrderedNoise:
    """Draws standard normal noise for particles on the line, evenly over their order.

    Args:
        seed: Of the random shifts.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._rank: torch.Tensor  # (n,)
        self._draws = 0

    def particles_are_at(self, x: torch.Tensor) -> None:
        """To be told before each step: x, (n, 1)."""
        order = x[:, 0].argsort()
        self._rank = torch.empty(len(x), dtype=torch.float64)
        self._rank[order] = torch.arange(len(x), dtype=torch.float64)
        self._draws = 0

    def randn_tensor(
        self, shape: Any, generator: Any = None, device: Any = None, dtype: torch.dtype | None = None, **_: Any
    ) -> torch.Tensor:
        """Takes the place of `diffusers.utils.torch_utils.randn_tensor`."""
        if tuple(shape) != (len(self._rank), 1):
            raise ValueError(f"ordered noise is for {len(self._rank)} particles on the line, got the shape {shape}")
        shift = torch.rand((), generator=self._generator, dtype=torch.float64)
        points = (self._rank * IRRATIONALS[self._draws] + shift).frac().clamp(1e-12, 1 - 1e-12)
        self._draws += 1
        return torch.from_numpy(ndtri(points.numpy())).to(dtype)[:, None]

    @contextmanager
    def in_schedulers(self) -> Iterator[None]:
        """While it lasts, every scheduler that is loaded draws its noise here."""
        modules = [
            module
            for name, module in list(sys.modules.items())
            if name.startswith(("diffusers.schedulers.", "annealers.schedulers.")) and "randn_tensor" in vars(module)
        ]
        patches = [patch.object(module, "randn_tensor", self.randn_tensor) for module in modules]
        for each in patches:
            each.start()
        try:
            yield
        finally:
            for each in patches:
                each.stop()
