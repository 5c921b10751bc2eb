"""The importance-weighted bound of a likelihood: Burda, Grosse & Salakhutdinov 2016, arXiv:1509.00519, Eq. 8.

    log p(x) >= E log 1/k sum_{i=1}^k w_i,        w_i = p(x, z^i) / q(z^i | x),     z^i ~ q(z | x)

It is the tighter the larger k is, and with k = 1 the bound that a variational autoencoder is trained with.
"""

import math
from collections.abc import Callable

import torch


def importance_weighted_bound(
    log_weights: Callable[[int], torch.Tensor], num_samples: int, chunk_size: int
) -> torch.Tensor:
    """log 1/k sum_i w_i of each image, (B,).

    Args:
        log_weights: Draws c times for each image; c to log w, (c, B).
        num_samples: k.
        chunk_size: The largest c.

    Raises:
        ValueError: If a number is below one.
    """
    if num_samples < 1 or chunk_size < 1:
        raise ValueError(f"need num_samples and chunk_size >= 1, got {num_samples} and {chunk_size}")
    chunks = [log_weights(min(chunk_size, num_samples - start)) for start in range(0, num_samples, chunk_size)]
    return torch.cat(chunks).logsumexp(dim=0) - math.log(num_samples)
