r"""Vector quantisation: every latent vector becomes the nearest of K codebook vectors.

    k = argmin_i ||z_e - e_i||^2,     z_q = e_k + (z_e - sg[z_e])            sg: stop gradient, d z_q / d z_e = 1

    codebook      ||sg[z_e] - e_k||^2        averaged over the positions of an image, summed over the channels
    commitment    ||z_e - sg[e_k]||^2        likewise; weighted by beta in the loss, so that beta is on this term

The codebook is learnt by the gradient of the first term, or it is a moving average over optimizer steps. With n_i the
number and s_i the sum of the z_e that chose code i in the whole step, over all micro-batches and processes,

    N_i <- gamma N_i + (1 - gamma) n_i,     m_i <- gamma m_i + (1 - gamma) s_i,     e_i = m_i / N_i  where n_i > 0

from N_i = 1 and m_i = e_i. Where n_i = 0 both decay alike and e_i stays what it is, bit for bit; where n_i > 0, N_i is
at least 1 - gamma, so that the Laplace smoothing of published code is not needed.

A code with N_i < tau is restarted: e_i becomes a z_e of the step, N_i = 2 tau and m_i = N_i e_i. Which of them: each
z_e has a priority, a random number, and those of highest priority of the whole step go to the unused codes in turn, so
that the choice does not depend on how the step was split.

Distances, averages and losses are in float32 whatever the precision around them, and so are the codebook and its
statistics when the model is cast to half precision.

Sources: van den Oord, Vinyals & Kavukcuoglu 2017, "Neural Discrete Representation Learning", arXiv:1711.00937, Eq. 3
and App. A.1; restarts, Dhariwal et al. 2020, "Jukebox: A Generative Model for Music", arXiv:2005.00341, Sec. 3.1.

    symbol    code              shape           meaning
    z_e       latents           (B, D, h, w)    what the encoder says
    z_q       quantized         (B, D, h, w)    what the decoder sees
    k         indices           (B, h, w)       codes
    e         codebook          (K, D)
    N, m      counts, sums      (K,), (K, D)    moving averages
    tau       restart_threshold                 in counts per optimizer step
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import distributed, nn
from torch.nn.functional import embedding


class Quantization(NamedTuple):
    """What quantising a batch gives.

    Args:
        quantized: z_q, (B, D, h, w), in the dtype of the latents.
        indices: k, int64 (B, h, w).
        commitment: (B,), float32.
        codebook: (B,), float32; without gradient if the codebook is a moving average.
    """

    quantized: torch.Tensor
    indices: torch.Tensor
    commitment: torch.Tensor
    codebook: torch.Tensor


class Codebook(nn.Module):
    """K vectors under the name `weight`: a parameter, or a buffer if something else than the gradient sets them."""

    def __init__(self, num_embeddings: int, dim: int, learnt_by_gradient: bool) -> None:
        super().__init__()
        weight = torch.empty(num_embeddings, dim).uniform_(-1 / num_embeddings, 1 / num_embeddings)
        if learnt_by_gradient:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """(*,) -> (*, D)."""
        return embedding(indices, self.weight)


class VectorQuantizer(nn.Module):
    """A codebook, the nearest vector of it, and how it learns.

    Args:
        num_embeddings: K.
        dim: D.
        decay: gamma of the moving averages; None learns the codebook by gradient.
        restart_threshold: tau; 0 restarts no code.

    Raises:
        ValueError: If an option is out of range, or codes are to be restarted whose use is not averaged.
    """

    def __init__(
        self, num_embeddings: int, dim: int, decay: float | None = 0.99, restart_threshold: float = 0.1
    ) -> None:
        super().__init__()
        if num_embeddings < 2 or dim < 1:
            raise ValueError(f"need num_embeddings >= 2 and dim >= 1, got {num_embeddings} and {dim}")
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), or be None for a codebook learnt by gradient, got {decay}")
        if restart_threshold < 0:
            raise ValueError(f"restart_threshold must not be negative, got {restart_threshold}")
        if decay is None and restart_threshold > 0:
            raise ValueError(
                "a codebook learnt by gradient (decay=None) keeps no counts by which to restart its codes: need "
                f"restart_threshold=0, got {restart_threshold}"
            )
        self.num_embeddings, self.dim, self.decay, self.restart_threshold = (
            num_embeddings,
            dim,
            decay,
            restart_threshold,
        )
        self.embedding = Codebook(num_embeddings, dim, learnt_by_gradient=decay is None)
        if decay is not None:
            self.register_buffer("counts", torch.ones(num_embeddings))
            self.register_buffer("sums", self.embedding.weight.clone())
        self._forget_step()

    # ---- latents to codes and back ----------------------------------------------------------------------------------

    def forward(self, latents: torch.Tensor, restart_priority: torch.Tensor | None = None) -> Quantization:
        """Quantises latents and, where they are being trained, takes notes for `update`.

        Args:
            latents: z_e, (B, D, h, w).
            restart_priority: Numbers >= 0, (B, h, w), the highest of which restart unused codes; None draws them.

        Raises:
            ValueError: If the shape is another, or the priorities are not one for each latent.
        """
        positions = (len(latents), *latents.shape[2:])
        if restart_priority is not None and restart_priority.shape != positions:
            raise ValueError(f"restart_priority must be {positions}, got {tuple(restart_priority.shape)}")
        with torch.autocast(latents.device.type, enabled=False):
            z_e = latents.movedim(1, -1).to(self.embedding.weight.dtype)  # (B, h, w, D)
            indices = self._nearest(z_e)
            e = self.embedding(indices)
            commitment = (z_e - e.detach()).square().sum(dim=-1).mean(dim=(1, 2))
            codebook = (z_e.detach() - e).square().sum(dim=-1).mean(dim=(1, 2))
            trained = self.training and torch.is_grad_enabled() and latents.requires_grad
            if self.decay is not None and trained:  # a frozen encoder changes nothing
                self._note(z_e.detach(), indices, restart_priority)
            quantized = e.detach() + (z_e - z_e.detach())  # in this order, exactly e
        return Quantization(quantized.movedim(-1, 1).to(latents.dtype), indices, commitment, codebook)

    def indices(self, latents: torch.Tensor) -> torch.Tensor:
        """k of latents (B, D, h, w), (B, h, w).

        Raises:
            ValueError: If the shape is another.
        """
        with torch.autocast(latents.device.type, enabled=False):
            return self._nearest(latents.movedim(1, -1).to(self.embedding.weight.dtype))

    def lookup(self, indices: torch.Tensor) -> torch.Tensor:
        """The vectors of codes (B, h, w), (B, D, h, w).

        Raises:
            ValueError: If they are not integers, or outside 0 .. K - 1.
        """
        if indices.is_floating_point() or indices.dtype == torch.bool or indices.ndim != 3:
            raise ValueError(f"codes are integers of shape (B, h, w), got {indices.dtype} {tuple(indices.shape)}")
        if not torch.compiler.is_compiling() and indices.numel() > 0:
            lowest, highest = (int(k) for k in indices.aminmax())
            if lowest < 0 or highest >= self.num_embeddings:
                raise ValueError(f"codes lie in 0 .. {self.num_embeddings - 1}, got {lowest} .. {highest}")
        return self.embedding(indices.long()).movedim(-1, 1)

    @torch.no_grad()
    def _nearest(self, z_e: torch.Tensor) -> torch.Tensor:
        if z_e.ndim != 4 or z_e.shape[-1] != self.dim:
            got = tuple(z_e.movedim(-1, 1).shape)
            raise ValueError(f"latents must be (B, {self.dim}, h, w) to be quantised, got {got}")
        e = self.embedding.weight
        middle = e.mean(dim=0)  # from there, or |z|^2 - 2 z e + |e|^2, as cdist has it, cancels far from the origin
        distances = torch.cdist(z_e.flatten(0, -2) - middle, e - middle)  # (B h w, K)
        return distances.argmin(dim=1).view(z_e.shape[:-1])

    # ---- the moving average -----------------------------------------------------------------------------------------
    # The notes of a step are plain tensors, not buffers: DistributedDataParallel would overwrite those of a process
    # by the first one's before its next forward.

    @torch.no_grad()
    def set_codebook(self, vectors: torch.Tensor) -> None:
        """Starts with vectors (K, D), N = 1 and m = e.

        Raises:
            ValueError: If the shape is another.
        """
        if vectors.shape != self.embedding.weight.shape:
            raise ValueError(
                f"need a codebook of shape {tuple(self.embedding.weight.shape)}, got {tuple(vectors.shape)}"
            )
        self.embedding.weight.copy_(vectors)
        if self.decay is not None:
            self.counts.fill_(1)
            self.sums.copy_(self.embedding.weight)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages by what was noted since the last time, on all processes; all of them must call it.

        A codebook learnt by gradient has nothing to be moved.
        """
        if self.decay is None:
            return
        n, s = self._noted_counts, self._noted_sums
        n = torch.zeros_like(self.counts) if n is None else n
        s = torch.zeros_like(self.sums) if s is None else s
        everywhere_sum(n)
        everywhere_sum(s)
        gamma = torch.where(n.any(), self.decay, 1.0)  # nothing was quantised in training: nothing decays
        self.counts.mul_(gamma).add_((1 - gamma) * n)
        self.sums.mul_(gamma).add_((1 - gamma) * s)
        e = self.sums / self.counts[:, None]
        self.embedding.weight.copy_(torch.where(n[:, None] > 0, e, self.embedding.weight))
        if self.restart_threshold > 0:
            self._restart()
        self._forget_step()

    def _forget_step(self) -> None:
        self._noted_counts: torch.Tensor | None = None  # n, (K,)
        self._noted_sums: torch.Tensor | None = None  # s, (K, D)
        self._candidates: tuple[torch.Tensor, torch.Tensor] | None = None  # priorities (R,) and z_e (R, D), R <= K

    def _note(self, z_e: torch.Tensor, indices: torch.Tensor, restart_priority: torch.Tensor | None) -> None:
        k, z = indices.flatten(), z_e.flatten(0, -2)  # (B h w,), (B h w, D)
        n = torch.zeros_like(self.counts).index_add(0, k, torch.ones_like(z[:, 0]))
        s = torch.zeros_like(self.sums).index_add(0, k, z)
        self._noted_counts = n if self._noted_counts is None else self._noted_counts + n
        self._noted_sums = s if self._noted_sums is None else self._noted_sums + s
        if self.restart_threshold == 0:
            return
        if restart_priority is None:
            restart_priority = torch.rand(indices.shape, device=z.device)
        priority = restart_priority.flatten()
        if self._candidates is not None:
            priority, z = torch.cat([self._candidates[0], priority]), torch.cat([self._candidates[1], z])
        highest = priority.topk(min(self.num_embeddings, len(priority))).indices
        self._candidates = (priority[highest], z[highest])

    def _restart(self) -> None:
        unused = (self.counts < self.restart_threshold).nonzero().squeeze(1)  # the same on all processes
        if len(unused) == 0:
            return
        K, D = self.num_embeddings, self.dim
        priority, z = self.counts.new_full((K,), -1), self.sums.new_zeros(K, D)
        if self._candidates is not None:
            count = len(self._candidates[0])
            priority[:count], z[:count] = self._candidates
        priority, z = everyones(priority), everyones(z)  # (P K,), (P K, D); padded where the priority is -1
        best = priority.argsort(descending=True)[: int((priority >= 0).sum())][: len(unused)]
        unused = unused[: len(best)]
        self.embedding.weight[unused] = z[best]
        self.counts[unused] = 2 * self.restart_threshold
        self.sums[unused] = 2 * self.restart_threshold * z[best]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> VectorQuantizer:
        """As of any module, but for a cast to half precision, of which they take the device alone."""
        exact = [tensor.detach() for tensor in (*self.parameters(), *self.buffers())]
        super()._apply(fn, recurse)
        for before, after in zip(exact, (*self.parameters(), *self.buffers()), strict=True):
            if torch.finfo(after.dtype).bits < torch.finfo(before.dtype).bits:
                after.data = before.to(after.device)
        return self


def perplexity(counts: torch.Tensor) -> torch.Tensor:
    """exp(-sum p log p) of p = n / sum n, in 1 .. K: how many codes used evenly there would be; (K,) -> ().

    That of a batch is at most the number of its latents: use the counts of a whole data set.
    """
    p = counts.float() / counts.sum()
    return torch.special.entr(p).sum().exp()


def everywhere_sum(values: torch.Tensor) -> None:
    """Replaces values by their sum over the processes, if there are several."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)


def everyones(values: torch.Tensor) -> torch.Tensor:
    """The values of all processes after each other, (n, *) -> (P n, *)."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    parts = [torch.empty_like(values) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, values)
    return torch.cat(parts)
