r"""The best timesteps for a given number of steps, by dynamic programming on the variational bound.

A reverse step t -> s with the posterior variance costs, in nats per coordinate,

    L(t, s) = 1/2 (SNR_s - SNR_t) MSE_t,        SNR = alpha^2 / sigma^2,    MSE_t = E|x_0 - x̂_0(x_t)|^2 / d,

the Kullback-Leibler divergence of the model's step from the true posterior (Kingma et al. 2021, Eq. 14). So one number
per train timestep, the network's denoising error, decides all T^2 costs, and the cheapest way down in N - 1 steps from
the last train timestep to the first is

    C_0[t] = 0 at t = T - 1,        C_k[s] = min_{t > s} C_{k-1}[t] + L(t, s)

This is the optimum of the bound. Sample quality is another matter: Watson et al. report no better pictures from it.

Sources: Watson, Ho, Norouzi, Chan 2021, "Learning to Efficiently Sample from Diffusion Probabilistic Models",
arXiv:2106.03802, Algorithm 1; Kingma, Salimans, Poole, Ho 2021, "Variational Diffusion Models", arXiv:2107.00630.
"""

import numpy as np
import torch


def step_costs(alphas: torch.Tensor, sigmas: torch.Tensor, denoising_error: np.ndarray) -> np.ndarray:
    """L(t, s) in nats per coordinate, (T, T); infinite where s >= t, which is no step towards the data."""
    snr = (alphas.double() ** 2 / sigmas.double() ** 2).numpy()
    costs = 0.5 * (snr[None, :] - snr[:, None]) * np.asarray(denoising_error, dtype=np.float64)[:, None]
    costs[np.triu_indices(len(snr))] = np.inf
    return costs


def optimal_timesteps(alphas: torch.Tensor, sigmas: torch.Tensor, denoising_error: np.ndarray, N: int) -> np.ndarray:
    """The N train timesteps, decreasing from T - 1 to 0, whose steps cost least in total.

    Args:
        alphas, sigmas: The table of the path, (T,).
        denoising_error: MSE_t of the network at each train timestep, (T,), in units of the data squared.
        N: Number of timesteps, 1 .. T; a single one is T - 1.
    """
    T = len(alphas)
    if N == 1:
        return np.array([T - 1])
    costs = step_costs(alphas, sigmas, denoising_error)
    total = np.full(T, np.inf)
    total[T - 1] = 0.0
    came_from = []
    for _ in range(N - 1):
        through = total[:, None] + costs  # (t, s)
        came_from.append(through.argmin(axis=0))
        total = through.min(axis=0)
    timesteps = [0]
    for best in reversed(came_from):
        timesteps.append(int(best[timesteps[-1]]))
    return np.array(timesteps[::-1])
