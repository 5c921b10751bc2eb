r"""Between two latents: on the line, or on the arc.

    line    (1 - w) a + w b
    arc     ((1 - w) |a| + w |b|) (sin((1 - w) Omega) a / |a| + sin(w Omega) b / |b|) / sin Omega

Omega is the angle between a and b. On the arc the direction turns at one rate and the length changes at one rate; for
a and b of one length it is the formula of the sources. What lies between two draws of a standard normal law is on the
arc as long as a draw, and on the line shorter. Both return a and b themselves at w = 0 and 1.

Sources: Shoemake 1985, "Animating Rotation with Quaternion Curves", doi:10.1145/325165.325242, Sec. 3.3; White 2016,
"Sampling Generative Networks", arXiv:1609.04468, Sec. 2.1.
"""

import math

import torch

INTERPOLATIONS = ("linear", "spherical")
NO_ARC = 1e-3  # radians, from parallel or from opposite


def between(a: torch.Tensor, b: torch.Tensor, steps: int, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents at equal steps from a to b, both included, in at least float32.

    Args:
        a, b: Latents, (B, *).
        steps: N >= 2.
        method: "linear" or "spherical".

    Returns:
        The latents, (B, N, *), and the weights w of b, (N,).

    Raises:
        ValueError: If the method is unknown, there are fewer than two steps, or there is no arc; see `on_the_arc`.
    """
    if steps < 2:
        raise ValueError(f"need steps >= 2, the two ends, got {steps}")
    if method not in INTERPOLATIONS:
        raise ValueError(f"method must be one of {INTERPOLATIONS}, got {method!r}")
    dtype = torch.promote_types(a.dtype, torch.float32)
    weights = torch.linspace(0, 1, steps, device=a.device, dtype=dtype)
    walk = on_the_line if method == "linear" else on_the_arc
    return walk(a.to(dtype), b.to(dtype), weights), weights


def on_the_line(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The line, of (B, *) and (N,): (B, N, *)."""
    w = weights.reshape(1, -1, *[1] * (a.ndim - 1))
    return (1 - w) * a.unsqueeze(1) + w * b.unsqueeze(1)


def on_the_arc(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The arc, of (B, *) and (N,): (B, N, *). Where a and b are parallel it is the line.

    Raises:
        ValueError: If a and b are opposite, or one is zero, which has no direction.
    """
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    norm_a, norm_b = flat_a.norm(dim=1, keepdim=True), flat_b.norm(dim=1, keepdim=True)  # (B, 1)
    if min(norm_a.min(), norm_b.min()) == 0:
        raise ValueError("there is no arc from or to a latent of zeros: take method='linear'")
    unit_a, unit_b = flat_a / norm_a, flat_b / norm_b
    # of the triangle with sides of length 1; accurate for small angles, where the arccosine is not
    angle = 2 * torch.atan2((unit_a - unit_b).norm(dim=1), (unit_a + unit_b).norm(dim=1)).unsqueeze(1)  # (B, 1)
    if (angle > math.pi - NO_ARC).any():
        raise ValueError("there is no shortest arc between opposite latents: take method='linear'")

    w = weights.unsqueeze(0)  # (1, N)
    length = (1 - w) * norm_a + w * norm_b  # (B, N)
    of_a = ((1 - w) * angle).sin() / angle.sin() * (length / norm_a)  # exactly 1 at w = 0
    of_b = (w * angle).sin() / angle.sin() * (length / norm_b)
    of_a, of_b, angle = (x.reshape(*x.shape, *[1] * (a.ndim - 1)) for x in (of_a, of_b, angle))
    arc = of_a * a.unsqueeze(1) + of_b * b.unsqueeze(1)
    return torch.where(angle < NO_ARC, on_the_line(a, b, weights), arc)
