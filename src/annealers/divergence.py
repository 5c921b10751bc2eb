r"""The divergence of a vector field, exact or estimated by random probes.

With the Jacobian J of f at x, each product v^T J v costs one backward pass:

    exact         div f = sum_i e_i^T J e_i                              one pass per coordinate
    estimated     div f = E[v^T J v],   E[v v^T] = I                     Hutchinson 1989; Skilling 1989

A Rademacher probe (random signs) has the variance sum_{i != j} (J_ij + J_ji)^2 / 2, none at all where J is diagonal; a
Gaussian probe adds 2 sum_i J_ii^2 to it.

Sources: Hutchinson 1989, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
splines", Communications in Statistics 18; Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud 2018, "FFJORD",
arXiv:1810.01367 (one probe for a whole integration).
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from annealers.schedulers.gaussian_path import standard_normal, working_dtype

PROBE_KINDS = ("rademacher", "gaussian")

Generators = torch.Generator | list[torch.Generator]
VectorField = Callable[[torch.Tensor], torch.Tensor]


def divergence(
    function: VectorField, x: torch.Tensor, probes: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes f(x) and div f(x), one number per sample.

    Where gradients are enabled the results carry a graph, so that a loss of the divergence trains the parameters of f.

    Args:
        function: f, (B, *) -> (B, *), in which no sample depends on another.
        x: Where, (B, *).
        probes: v, (K, B, *), to average over, see `draw_probes`; None for the exact divergence.

    Returns:
        f(x), (B, *), and div f, (B,).

    Raises:
        ValueError: If a shape does not fit, or the output of f is cut off from x for autograd.
        RuntimeError: Inside `torch.inference_mode`, where there is no autograd; `torch.no_grad` is fine.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("a divergence needs autograd, which torch.inference_mode takes away: use torch.no_grad")
    if probes is not None and (probes.ndim != x.ndim + 1 or probes.shape[1:] != x.shape or len(probes) == 0):
        raise ValueError(f"probes must have the shape (K, *{tuple(x.shape)}) with K >= 1, got {tuple(probes.shape)}")
    trains = torch.is_grad_enabled()
    # Of the kernels of attention, the plain one can be differentiated twice.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        x = x if trains and x.requires_grad else x.detach().requires_grad_()
        value = function(x)
        if value.shape != x.shape:
            raise ValueError(f"the function must keep the shape {tuple(x.shape)}, got {tuple(value.shape)}")
        total = torch.zeros(len(x), dtype=working_dtype(x), device=x.device)
        for v in _unit_vectors(x) if probes is None else probes:
            product = _vector_jacobian_product(value, x, v, trains).to(total.dtype) * v
            total = total + product.reshape(len(x), math.prod(x.shape[1:])).sum(dim=1)
    total = total if probes is None else total / len(probes)
    return (value, total) if trains else (value.detach(), total.detach())


def draw_probes(
    x: torch.Tensor, count: int = 1, kind: str = "rademacher", generator: Generators | None = None
) -> torch.Tensor:
    """Draws probes for the divergence at x.

    Args:
        x: (B, *), of which shape, dtype and device are taken.
        count: Number of probes per sample, K.
        kind: "rademacher", random signs, or "gaussian".
        generator: Source of the randomness; a list gives each sample its own.

    Returns:
        Probes, (K, B, *).

    Raises:
        ValueError: If the count is not positive or the kind is unknown.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"the number of probes must be a positive integer, got {count!r}")
    if kind not in PROBE_KINDS:
        raise ValueError(f"probes must be one of {PROBE_KINDS}, got {kind!r}")
    normal = torch.stack([standard_normal(x, generator, working_dtype(x)) for _ in range(count)])
    return (normal if kind == "gaussian" else torch.where(normal < 0, -1.0, 1.0)).to(x.dtype)


def _vector_jacobian_product(value: torch.Tensor, x: torch.Tensor, v: torch.Tensor, trains: bool) -> torch.Tensor:
    """v^T J, (B, *)."""
    product = None
    if value.requires_grad:
        (product,) = torch.autograd.grad(value, x, v, retain_graph=True, create_graph=trains, allow_unused=True)
    if product is None:
        raise ValueError("the output of the function does not depend on x for autograd: it has no divergence")
    return product


def _unit_vectors(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """e_i for each coordinate i of a sample, expanded over the batch: (B, *) each."""
    size = x[0].numel() if len(x) else 0
    for i in range(size):
        unit = torch.zeros(size, dtype=x.dtype, device=x.device)
        unit[i] = 1
        yield unit.reshape(1, *x.shape[1:]).expand_as(x)
