r"""Which timesteps are trained on: samplers of t as functions of (seed, position), with the weights that undo them.

A sampler draws t with probability p_t and weighs its loss by w_t = 1 / (T p_t), so that E[w_t L_t] is the mean of L_t
over t = 0 .. T - 1 whatever p is; what p changes is the variance of that estimate.

    uniform             p_t = 1 / T, each position for itself
    stratified          p_t = 1 / T, with the G positions of an optimizer step in G equal strata: position g of step k
                        takes u_g = (pi_k(g) + v_g) / G for a random permutation pi_k and v_g uniform on [0, 1)
    loss_second_moment  p_t prop. to sqrt(E[L_t^2]), which makes the variance smallest, by the last 10 losses; mixed
                        with 0.001 of uniform; drawn from the same u_g through the inverse distribution function
                                                                                  Nichol & Dhariwal 2021, Sec. 3.3

The permutation matters: without it a data set that is read in order would show its rows at the same t in each epoch.

The paper keeps ten losses for each t and stays uniform until all have them, which takes tens of thousands of draws.
Here the timesteps fall into bins with one history each, at most 100 of them, and p_t is constant in a bin; the weights
are those of the p that was drawn from, so the estimate is as unbiased. As many bins as timesteps is the rule of the
paper.

The losses of all processes enter in order of position, so that one process, several and accumulation draw the same
timesteps (but for a t at the very edge of a stratum, which rounding may move by one).

    symbol  code                 meaning
    T       num_timesteps        number of timesteps
    G       batch_size           positions of one optimizer step, over all processes and accumulation
    w_t     weights              1 / (T p_t)

Sources: Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", arXiv:2102.09672; evenly spread
timesteps, for the same end, in Kingma, Salimans, Poole, Ho 2021, "Variational Diffusion Models", arXiv:2107.00630.
"""

from typing import Literal, get_args

import torch
from torch import nn

from annealers.randomness import PositionalRandomness

TimestepSampling = Literal["uniform", "stratified", "loss_second_moment"]

STREAM = "timestep"


class TimestepSampler(nn.Module):
    """Uniform timesteps, each position for itself; the base of the others.

    Make it a submodule of the objective that is trained, so that what it learns is part of the checkpoint.

    Args:
        num_timesteps: T; timesteps are 0 .. T - 1.
        randomness: Of the run.

    Attributes:
        learns: Whether `observe` has an effect; if not, nothing needs to be gathered for it.
    """

    learns = False

    def __init__(self, num_timesteps: int, randomness: PositionalRandomness) -> None:
        super().__init__()
        if num_timesteps < 1:
            raise ValueError(f"need num_timesteps >= 1, got {num_timesteps}")
        self.num_timesteps, self.randomness = num_timesteps, randomness

    def draw(self, first_position: int, count: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws the timesteps of `count` positions.

        Args:
            first_position: In the run, k G for the first of optimizer step k.
            count: Number of positions.
            batch_size: G, positions per optimizer step over all processes and accumulation.

        Returns:
            Timesteps, int64 (count,), and weights w_t, float32 (count,), on the CPU.
        """
        timesteps = self.randomness.integers(STREAM, first_position, count, high=self.num_timesteps)
        return timesteps, torch.ones(count)

    def observe(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Learns from the unweighted losses of a whole optimizer step, (G,), in order of position on every process."""

    def observe_step(self, first_position: int, weighted_losses: torch.Tensor) -> None:
        """`observe` for losses that were multiplied by their weights, (G,), by the step's first position."""
        count = len(weighted_losses)
        timesteps, weights = self.draw(first_position, count, batch_size=count)
        self.observe(timesteps, weighted_losses.detach().cpu() / weights)


class StratifiedTimestepSampler(TimestepSampler):
    """Uniform timesteps, of which an optimizer step has one in each of G equal strata."""

    def draw(self, first_position: int, count: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        u = self._stratified_uniform(first_position, count, batch_size)
        return (u * self.num_timesteps).long(), torch.ones(count)

    def _stratified_uniform(self, first_position: int, count: int, batch_size: int) -> torch.Tensor:
        """u_g of each position, float64 (count,) on [0, 1): uniform, and one in each 1 / G of a step."""
        if batch_size < 1:
            raise ValueError(f"need batch_size >= 1, got {batch_size}")
        steps = range(first_position // batch_size, -(-(first_position + count) // batch_size))
        strata = [self.randomness.permutation(STREAM, step, batch_size) for step in steps]
        start = first_position % batch_size
        stratum = torch.cat([*strata, torch.zeros(0, dtype=torch.long)])[start : start + count]
        u = (stratum + self.randomness.uniform(STREAM, first_position, count)) / batch_size
        return u.clamp(max=1 - 2**-53)  # the sum may have been rounded up


class LossSecondMomentSampler(StratifiedTimestepSampler):
    """Timesteps in proportion to the root mean square of their recent losses, stratified.

    Uniform until every bin has a full history. The history is a buffer, so checkpoints keep it.

    Args:
        num_timesteps: T.
        randomness: Of the run.
        num_bins: Bins of timesteps with a history each; None for min(T, 100), T for the rule of the paper.
        history: Losses remembered for each bin.
        uniform_share: Share of uniform draws, in (0, 1], which bounds the weights by its inverse.

    Raises:
        ValueError: If an argument is out of range.
    """

    learns = True
    losses: torch.Tensor  # (bins, history), a ring per bin
    observed: torch.Tensor  # (bins,), losses seen so far

    def __init__(
        self,
        num_timesteps: int,
        randomness: PositionalRandomness,
        num_bins: int | None = None,
        history: int = 10,
        uniform_share: float = 0.001,
    ) -> None:
        super().__init__(num_timesteps, randomness)
        num_bins = min(num_timesteps, 100) if num_bins is None else num_bins
        if not 1 <= num_bins <= num_timesteps:
            raise ValueError(f"num_bins must lie in 1 .. {num_timesteps} (the timesteps), got {num_bins}")
        if history < 1:
            raise ValueError(f"need a history of at least 1 loss, got {history}")
        if not 0 < uniform_share <= 1:
            raise ValueError(f"uniform_share must lie in (0, 1], got {uniform_share}")
        self.num_bins, self.history, self.uniform_share = num_bins, history, uniform_share
        self.register_buffer("losses", torch.zeros(num_bins, history))
        self.register_buffer("observed", torch.zeros(num_bins, dtype=torch.long))

    def bins(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The bin of each timestep, 0 .. num_bins - 1."""
        return timesteps * self.num_bins // self.num_timesteps

    def probabilities(self) -> torch.Tensor:
        """p_t of every timestep, float64 (T,), on the CPU."""
        T = self.num_timesteps
        uniform = torch.full((T,), 1 / T, dtype=torch.float64)
        if (self.observed < self.history).any():
            return uniform
        root_mean_square = self.losses.cpu().double().square().mean(dim=1).sqrt()[self.bins(torch.arange(T))]
        if not root_mean_square.any():
            return uniform
        share = self.uniform_share
        return (1 - share) * root_mean_square / root_mean_square.sum() + share * uniform

    def draw(self, first_position: int, count: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        u = self._stratified_uniform(first_position, count, batch_size)
        p = self.probabilities()
        cumulative = p.cumsum(0)
        timesteps = torch.searchsorted(cumulative / cumulative[-1], u, right=True).clamp(max=self.num_timesteps - 1)
        return timesteps, (1 / (self.num_timesteps * p[timesteps])).float()

    def observe(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        bins, order = self.bins(timesteps.cpu()).sort(stable=True)  # by bin, and there by position
        new = torch.bincount(bins, minlength=self.num_bins)
        rank = torch.arange(len(bins)) - (new.cumsum(0) - new)[bins]  # 0, 1, .. within a bin
        observed, history = self.observed.cpu(), self.losses.cpu().clone()
        kept = rank >= new[bins] - self.history
        slot = (observed[bins] + rank) % self.history
        history[bins[kept], slot[kept]] = losses.detach().cpu()[order][kept].to(history)
        self.losses.copy_(history)
        self.observed.copy_(observed + new)


def make_timestep_sampler(
    kind: TimestepSampling, num_timesteps: int, randomness: PositionalRandomness
) -> TimestepSampler:
    """A sampler by the name of its rule.

    Raises:
        ValueError: If the name is unknown or there are no timesteps.
    """
    if kind == "uniform":
        return TimestepSampler(num_timesteps, randomness)
    if kind == "stratified":
        return StratifiedTimestepSampler(num_timesteps, randomness)
    if kind == "loss_second_moment":
        return LossSecondMomentSampler(num_timesteps, randomness)
    raise ValueError(f"timestep sampling must be one of {get_args(TimestepSampling)}, got {kind!r}")
