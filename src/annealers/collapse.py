r"""Posterior collapse: how many latents of a variational autoencoder say something of the image.

A unit is one value u of a latent, and a model may have layers of them. Over images x,

    active        Var_x(m_u(x)) > 0.01,  m_u = (mu_q - mu_p) / sigma_p       Burda et al. 2016, Sec. 5 for the number
    KL_u          E_x[KL(q(z_u | x) || p(z_u))], in nats; their sum is the divergence of the layer
    I(x; z)       E_x E_q[log q(z | x) - log q(z)],  q(z) = E_x[q(z | x)]      Hoffman & Johnson 2016

Burda et al. take the variance of E_q[z_u], whose prior is a standard normal law: there m_u is the mean itself. Below
the top of a hierarchy, where prior and posterior both move with the latents above, a posterior that follows its prior
would count as active; so there the mean is counted from the prior's, in its standard deviations.

Sources: Burda, Grosse & Salakhutdinov 2016, "Importance Weighted Autoencoders", arXiv:1509.00519; Hoffman & Johnson
2016, "ELBO surgery: yet another way to carve up the variational evidence lower bound", NIPS workshop on advances in
approximate Bayesian inference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from annealers.models.pixel_likelihood import at_least_float32

ACTIVE_VARIANCE = 0.01  # Burda et al. 2016: the units fall into two groups, far from it on either side

Distributions = DiagonalGaussianDistribution | tuple[DiagonalGaussianDistribution, ...]


def shift_from_prior(
    posterior: DiagonalGaussianDistribution, prior: DiagonalGaussianDistribution | None = None
) -> torch.Tensor:
    """m = (mu_q - mu_p) / sigma_p of each unit, (B, C, h, w); a prior of None is the standard normal law."""
    mean = at_least_float32(posterior.mean)
    return mean if prior is None else (mean - at_least_float32(prior.mean)) / at_least_float32(prior.std)


def kl_of_units(
    posterior: DiagonalGaussianDistribution, prior: DiagonalGaussianDistribution | None = None
) -> torch.Tensor:
    """KL(q(z_u | x) || p(z_u)) of each unit in nats, (B, C, h, w); a prior of None is the standard normal law."""
    log_ratio = at_least_float32(posterior.logvar)
    if prior is not None:
        log_ratio = log_ratio - at_least_float32(prior.logvar)
    return 0.5 * (shift_from_prior(posterior, prior) ** 2 + log_ratio.exp() - 1 - log_ratio)


@dataclass(frozen=True)
class LayerUse:
    """How the units of one layer are used.

    Args:
        kl: Mean divergence of the layer in nats, the sum of `kl_per_unit`.
        kl_per_unit: (C, h, w), float64.
        variance_per_unit: Var_x(m_u), (C, h, w), float64.
        active_units: How many have a variance above the threshold.
        units: C h w.
    """

    kl: float
    kl_per_unit: torch.Tensor
    variance_per_unit: torch.Tensor
    active_units: int
    units: int


class LatentUse:
    """Gathers, batch by batch, how the latents of a model are used.

    Those of several processes or parts of the data add up: `sum(gather_object([use]), start=LatentUse())`.

    Example:
        >>> from annealers.collapse import LatentUse
        >>> from annealers import VAEModel
        >>> model, use = VAEModel(in_channels=1, sample_size=8, latent_channels=2, flat_latent=True), LatentUse()
        >>> for _ in range(3):
        ...     use.update(model(torch.rand(5, 1, 8, 8)).latent_dist)
        >>> use.images, [layer.units for layer in use.layers()]
        (15, [2])
    """

    def __init__(self) -> None:
        self.images = 0
        self._sums: list[torch.Tensor] = []  # of m, m^2 and KL, (3, C, h, w) for each layer, float64

    @torch.no_grad()
    def update(self, latent_dist: Distributions, prior_dist: Distributions | None = None) -> None:
        """Adds a batch, of one layer or of a tuple of them; a prior of None is the standard normal law.

        Raises:
            ValueError: If there is not one prior for each posterior, or the layers are not those before.
        """
        posteriors = latent_dist if isinstance(latent_dist, tuple) else (latent_dist,)
        priors = prior_dist if isinstance(prior_dist, tuple) else (prior_dist,) * len(posteriors)
        if len(priors) != len(posteriors):
            raise ValueError(f"need one prior for each of {len(posteriors)} posteriors, got {len(priors)}")
        batch = LatentUse()
        batch.images = len(posteriors[0].mean)
        for posterior, prior in zip(posteriors, priors, strict=True):
            m, kl = shift_from_prior(posterior, prior).double(), kl_of_units(posterior, prior).double()
            batch._sums.append(torch.stack([m.sum(dim=0), (m**2).sum(dim=0), kl.sum(dim=0)]).cpu())
        whole = self + batch
        self.images, self._sums = whole.images, whole._sums

    def __add__(self, other: LatentUse) -> LatentUse:
        shapes = [[tuple(of_layer.shape[1:]) for of_layer in use._sums] for use in (self, other)]
        if self._sums and other._sums and shapes[0] != shapes[1]:
            raise ValueError(f"cannot add up layers of the shapes {shapes[0]} and {shapes[1]}")
        total = LatentUse()
        total.images = self.images + other.images
        if self._sums and other._sums:
            total._sums = [a + b for a, b in zip(self._sums, other._sums, strict=True)]
        else:
            total._sums = self._sums or other._sums
        return total

    def layers(self, threshold: float = ACTIVE_VARIANCE) -> list[LayerUse]:
        """Of each layer, from the top down; variances are those of the images themselves, divided by their number.

        Raises:
            ValueError: If no images were added.
        """
        if self.images == 0:
            raise ValueError("no images were added, so nothing is known of the use of the latents")
        return [_layer_use(sums / self.images, threshold) for sums in self._sums]


def _layer_use(means: torch.Tensor, threshold: float) -> LayerUse:
    m, m_squared, kl = means
    variance = (m_squared - m**2).clamp(min=0)
    return LayerUse(kl.sum().item(), kl, variance, int((variance > threshold).sum()), variance.numel())


@torch.no_grad()
def mutual_information(
    mean: torch.Tensor, logvar: torch.Tensor, latents: torch.Tensor, chunk_size: int = 10
) -> torch.Tensor:
    """Estimates I(x; z) in nats of one layer whose prior is the standard normal law, between images and latents.

    q(z) is the mean of q(z | x_j) over the N images themselves, so the estimate lies below log N: take N well above
    exp(KL), or read it as a lower bound. KL - I(x; z) estimates KL(q(z) || p(z)), what of the divergence is the fault
    of the whole of the latents.

    Args:
        mean, logvar: Of q(z | x_j), (N, *).
        latents: z_j ~ q(z | x_j), one for each, (N, *).
        chunk_size: How many of them are compared with all N at once.

    Returns:
        (), float64.

    Raises:
        ValueError: If the shapes differ.
    """
    if not mean.shape == logvar.shape == latents.shape:
        raise ValueError(
            f"need means, log-variances and latents of one shape (N, *), got {tuple(mean.shape)}, "
            f"{tuple(logvar.shape)} and {tuple(latents.shape)}"
        )
    mean, logvar, z = (values.flatten(1).double() for values in (mean, logvar, latents))

    def log_q(z: torch.Tensor) -> torch.Tensor:
        """log q(z_i | x_j), but for (2 pi)^(-D/2), (chunk, N)."""
        return -0.5 * ((z.unsqueeze(1) - mean) ** 2 * (-logvar).exp() + logvar).sum(dim=2)

    log_ratios = []
    for start in range(0, len(z), chunk_size):
        of_all = log_q(z[start : start + chunk_size])
        of_its_own = of_all.diagonal(start)
        log_ratios.append(of_its_own - of_all.logsumexp(dim=1) + math.log(len(z)))
    return torch.cat(log_ratios).mean()
