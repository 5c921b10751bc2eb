"""Random numbers as a pure function of (seed, stream, position), so that a run does not depend on how it is split.

A generator that consumes a sequence gives sample 7 a different noise on two processes than on one. Here nothing is
consumed: a counter-based generator encrypts the position itself,

    words(position) = Philox4x64(key = (seed, stream), counter = position),

and any process can compute any contiguous block of positions, in any order, and get the same bits.

Source: Salmon, Moraes, Dror & Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11,
doi:10.1145/2063384.2063405 (Philox); normals by Box & Muller 1958, "A Note on the Generation of Random Normal
Deviates", doi:10.1214/aoms/1177706645. Only NumPy's raw words are used: NumPy keeps their sequence between versions,
but not that of its distributions.
"""

import math
import zlib

import numpy as np
import torch

_WORDS_PER_COUNTER = 4  # one value of the Philox4x64 counter yields four 64-bit words


class PositionalRandomness:
    """Streams of random numbers addressed by position.

    A stream is named: give each purpose its own name ("noise", "timestep", ...). Numbers under different names, kinds
    (uniform, normal, ...), shapes, positions or seeds are independent. All tensors are on the CPU.

    Args:
        seed: The run's seed, 0 <= seed < 2^64.

    Raises:
        ValueError: If the seed is outside that range.

    Example:
        >>> randomness = PositionalRandomness(seed=0)
        >>> whole = randomness.normal("noise", first_position=0, count=6, shape=(3, 8, 8))
        >>> half = randomness.normal("noise", first_position=3, count=3, shape=(3, 8, 8))
        >>> torch.equal(whole[3:], half)
        True
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"need a seed with 0 <= seed < 2^64, got {seed}")
        self.seed = seed

    def uniform(self, stream: str, first_position: int, count: int, shape: tuple[int, ...] = ()) -> torch.Tensor:
        """Uniform numbers on [0, 1) of the `count` positions from `first_position` on, float64 (count, *shape)."""
        words = self._words("uniform", shape, stream, first_position, count, math.prod(shape))  # (count, size)
        return torch.from_numpy(_unit_interval(words)).reshape(count, *shape)

    def normal(self, stream: str, first_position: int, count: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal numbers of `count` positions, float32 (count, *shape).

        Each 64-bit word gives u1 in (0, 1] and u2 in [0, 1) of 32 bits, and these give r cos(2 pi u2), r sin(2 pi u2)
        with r = sqrt(-2 ln u1) <= 6.66.
        """
        size = math.prod(shape)
        words = self._words("normal", shape, stream, first_position, count, (size + 1) // 2)  # two a word
        u1 = torch.from_numpy(((words >> np.uint64(32)).astype(np.float64) + 1.0) * 2.0**-32)  # (0, 1]
        u2 = torch.from_numpy((words & np.uint64(0xFFFFFFFF)).astype(np.float64) * 2.0**-32)  # [0, 1)
        radius, angle = (-2.0 * u1.log()).sqrt(), 2.0 * math.pi * u2
        pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)  # (count, words, 2)
        return pairs.flatten(1)[:, :size].reshape(count, *shape).float()

    def integers(self, stream: str, first_position: int, count: int, high: int) -> torch.Tensor:
        """Integers uniform on 0 ... high - 1 for `count` positions, int64 (count,); relative bias below high 2^-53.

        Raises:
            ValueError: If `high` is not positive.
        """
        if high < 1:
            raise ValueError(f"need high >= 1 to draw integers in [0, high), got high={high}")
        words = self._words("integers", (), stream, first_position, count, 1)[:, 0]  # (count,)
        return torch.from_numpy((_unit_interval(words) * high).astype(np.int64))

    def permutation(self, stream: str, index: int, n: int) -> torch.Tensor:
        """The stream's `index`-th permutation of 0 ... n - 1, int64 (n,): the order that sorts n random words."""
        words = self._generator("permutation", stream, _counter(index, 0)).random_raw(n)
        return torch.from_numpy(np.argsort(words, kind="stable"))

    def step_seed(self, step: int, process_index: int) -> int:
        """A 63-bit seed for torch's own generators at this step on this process, `torch.manual_seed(...)`.

        For dropout and the like, which draw inside the network: what they draw then depends on the step and not on
        what was drawn before, so that a resumed run repeats it. It does depend on the number of processes.
        """
        return int(self._generator("seed", "torch", _counter(step, process_index)).random_raw()) >> 1

    def _words(
        self, kind: str, shape: tuple[int, ...], stream: str, first_position: int, count: int, size: int
    ) -> np.ndarray:
        """`size` words of 64 bits for each of `count` positions, uint64 (count, size); whole counters per position."""
        if first_position < 0 or count < 0:
            raise ValueError(f"need first_position >= 0 and count >= 0, got {first_position} and {count}")
        counters = -(-size // _WORDS_PER_COUNTER)
        generator = self._generator("/".join((kind, *map(str, shape))), stream, first_position * counters)
        words = generator.random_raw(count * counters * _WORDS_PER_COUNTER)
        return words.reshape(count, counters * _WORDS_PER_COUNTER)[:, :size]

    def _generator(self, kind: str, stream: str, counter: int) -> np.random.Philox:
        key = np.array([self.seed, zlib.crc32(f"{kind}/{stream}".encode())], dtype=np.uint64)
        return np.random.Philox(counter=counter, key=key)


def _unit_interval(words: np.ndarray) -> np.ndarray:
    """The top 53 bits of each word as a float64 in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _counter(major: int, minor: int) -> int:
    """A counter in the 256-bit space such that different (major, minor) are 2^64 counter values or more apart."""
    if major < 0 or minor < 0:
        raise ValueError(f"need non-negative indices, got {major} and {minor}")
    return (major << 128) + (minor << 64)
