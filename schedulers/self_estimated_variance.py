r"""The variance of an ancestral step, measured by two network calls that are made anyway.

In the coordinates y = x / alpha with noise level s, the exact covariance of the step to level s' is beta~ I +
k^2 s^2 L, k = 1 - s'^2 / s^2, where L = d x̂_0 / d y has its eigenvalues in 0 .. 1 but between modes (Tweedie's
formula of second order). Between two calls the state moves by u, of which w z is isotropic noise, and x̂_0 by D = L u:

    within a level     u is a corrector's step, w^2 = 2 delta / alpha^2
    between levels     u is what an ancestral step went beside its mean, w z its own noise

so xi = D / w ~ L z measures L along a random vector. Its mean slope is l_1 = D.z / (w |z|^2), which Stein's identity
makes right on average, with a relative error of about d^(-1/2) for one sample; `secant` has the form of it that does
not suffer from what u holds besides. Then the covariance is

    self_estimated_isotropic   k^2 s^2 l_1 I
    self_estimated             k^2 s^2 (xi xi^T + (l_1 - |xi|^2 / d)_+ I)

The second has the same trace. As E[xi xi^T] = L^2, it is exact where each direction is wholly known or unknown (L is
0 or 1) and where all are alike, and in between it errs in a direction of slope l by l (1 - l) minus the mean of that
over all directions, which is at most 1/4. This is the mixing weight: none is left to choose. xi gets a random sign, so
that it is uncorrelated with the state that it was measured at.

What the isotropic kind cannot know is which directions are uncertain: it gives too much noise to the others. See
`secant` for a step that uses the same measurement for its mean.

Sources: Stein 1981, "Estimation of the Mean of a Multivariate Normal Distribution", Ann. Statist. 9; Efron 2011,
"Tweedie's Formula and Selection Bias", J. Amer. Statist. Assoc. 106; Hutchinson 1990, "A stochastic estimator of the
trace of the influence matrix", Commun. Statist. Simul. 19.
"""

import torch

from annealers.schedulers.secant import Innovation, channel_inner, measured_slopes, sample_inner

SELF_ESTIMATED = ("self_estimated", "self_estimated_isotropic")


def spread_of_original(
    x_0: torch.Tensor, y: torch.Tensor, past: Innovation, is_isotropic: bool, per_channel: bool = False
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """A vector a and a variance b such that a a^T + b I estimates L, the covariance of x_0 in units of s^2.

    Args:
        x_0: x̂_0 at y, (B, *).
        y: The state, (B, *).
        past: The call before.
        is_isotropic: Whether all of it goes into b.
        per_channel: Whether each channel is measured by itself.

    Returns:
        a, (B, *), or None, and b, (B, 1, ..) or per channel (B, C, 1, ..), float64.
    """
    change = x_0 - past.original
    slope = measured_slopes(change, y - past.expected, past, per_channel).average
    if is_isotropic:
        return None, slope
    # the variance of all that the state was moved by, per coordinate, which is more than the isotropic noise
    scale = past.moved**-0.5
    inner = channel_inner if per_channel else sample_inner
    square = scale**2 * inner(change, change) / (change.numel() // slope.numel())
    kept = (slope / square.clamp(min=torch.finfo(square.dtype).tiny)).clamp(max=1)  # never more than the trace
    return (kept.sqrt() * scale).to(change.dtype) * change, (slope - kept * square).clamp(min=0)
