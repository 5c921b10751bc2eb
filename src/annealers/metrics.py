r"""Measures of sample quality, and of how sure they are.

The Fréchet distance between the normal laws fitted to two sets of features, with means m and covariances C,

    d^2 = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^(1/2) C_b C_a^(1/2))^(1/2)),

is the FID when the features are those of an Inception network (Heusel et al. 2017, Eq. 6). The last trace is the sum
of the singular values of C_a^(1/2) C_b^(1/2), and with the centred features X = Q R it needs no root of a matrix:

    C = X^T X / (N - 1) = R^T R / (N - 1),     tr(..)^(1/2) = |R_a R_b^T|_* / sqrt((N_a - 1) (N_b - 1)).

So covariances that are singular, as those of fewer samples than features are, lose no accuracy.

Sources: Dowson & Landau 1982, "The Fréchet Distance between Multivariate Normal Distributions", J. Multivariate
Analysis 12; Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter 2017, "GANs Trained by a Two Time-Scale Update Rule
Converge to a Local Nash Equilibrium", arXiv:1706.08500.
"""

import torch


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Squared Fréchet distance d^2 between the normal laws fitted to two sets of features, in float64.

    It is biased upwards for small sets, so report it with the numbers of samples and the features it was taken on.

    Args:
        features_a: (N_a, D), at least two rows.
        features_b: (N_b, D), at least two rows.

    Raises:
        ValueError: If a shape does not fit, a set has fewer than two rows, or a feature is not finite.
    """
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name} must have shape (N, D) with N >= 2, got {tuple(features.shape)}")
        if not features.isfinite().all():
            rows = (~features.isfinite()).any(dim=1).nonzero().flatten().tolist()
            raise ValueError(f"{name} has values that are not finite, in {len(rows)} rows, first row {rows[0]}")
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(f"the sets have {features_a.shape[1]} and {features_b.shape[1]} features")

    mean_a, trace_a, factor_a = _normal_law(features_a)
    mean_b, trace_b, factor_b = _normal_law(features_b)
    cross = torch.linalg.svdvals(factor_a @ factor_b.T).sum()
    return max(0.0, float(((mean_a - mean_b) ** 2).sum() + trace_a + trace_b - 2 * cross))  # -1e-15 is rounding


def psnr(images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio, 10 log10(4 / mean squared error), in dB.

    Args:
        images: (B, C, H, W); what lies outside of [-1, 1], which no picture can show, is clipped.
        truth: (B, C, H, W) in [-1, 1].

    Returns:
        (B,), infinite for images that are the same.
    """
    error = (images.float().clamp(-1, 1) - truth).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error)


def mean_and_standard_error(values: torch.Tensor) -> tuple[float, float]:
    """The mean of independent values, (N,), and the standard error of that mean, s / sqrt(N).

    Raises:
        ValueError: If there are fewer than two values.
    """
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"need values of shape (N,) with N >= 2, got {tuple(values.shape)}")
    values = values.double()
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def _normal_law(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean (D,), trace of the covariance () and a factor F with F^T F = covariance, (min(N, D), D)."""
    features = features.double()
    mean = features.mean(dim=0)
    centred = (features - mean) / (len(features) - 1) ** 0.5
    return mean, (centred**2).sum(), torch.linalg.qr(centred, mode="r").R
