"""Measures of sample quality."""

import torch


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features.

        d^2 = ||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a^(1/2) C_b C_a^(1/2))^(1/2))

    Source: Dowson & Landau 1982, "The Fréchet Distance between Multivariate Normal Distributions"; as a measure of
    image quality Heusel et al. 2017, arXiv:1706.08500, Eq. 6. The root is taken of a symmetric matrix, so singular
    covariances do no harm. The value depends on the number of samples: report both.

    Args:
        features_a, features_b: (N_a, D) and (N_b, D), at least two rows each.

    Raises:
        ValueError: If the shapes do not fit, a set has fewer than two rows, or a feature is not finite.
    """
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name} must have shape (N, D) with N >= 2, got {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(f"the sets have {features_a.shape[1]} and {features_b.shape[1]} features")

    a, b = features_a.double(), features_b.double()
    covariance_a, covariance_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(covariance_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp(min=0).sqrt().sum()
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return float((means + covariance_a.trace() + covariance_b.trace() - 2 * cross).clamp(min=0))
