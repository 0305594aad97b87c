"""Uniform random numbers that are a pure function of their key: no state, any batch, fast."""

from __future__ import annotations

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)  # the constants of SplitMix64 (Steele et al., 2014)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: a bijection of uint64 whose bits look random."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


class Uniforms:
    """Hands out columns of uniform numbers, one row a face, in a fixed order.

    Column k of a face is the k-th output of a SplitMix64 generator that starts at a hash of
    (seed, stream, index).
    """

    def __init__(self, seed: int, stream: int, indices: np.ndarray) -> None:
        """Start the generators of all faces.

        Args:
            seed: of all faces.
            stream: another one gives other numbers.
            indices: of the faces, integers `(b,)`.
        """
        words = np.array([seed, stream], dtype=np.int64).astype(np.uint64)
        key = _mix(words[:1] + _STEP)
        key = _mix((key ^ words[1:]) + _STEP)
        self._state = _mix((key ^ indices.astype(np.int64).astype(np.uint64)) + _STEP)

    def _next(self) -> np.ndarray:
        self._state = self._state + _STEP
        return (_mix(self._state) >> np.uint64(11)) * 2.0**-53

    def uniform(self, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """Numbers in [low, high), `(b,)`."""
        return low + (high - low) * self._next()

    def flag(self, probability: float | np.ndarray) -> np.ndarray:
        """1 with a probability, else 0, `(b,)`."""
        return (self._next() < probability).astype(float)

    def choice(self, *probabilities: float | np.ndarray) -> np.ndarray:
        """Index sampled with the given probabilities, `(b,)`; the last takes what is left."""
        u = self._next()
        total = 0.0
        index = np.zeros(len(u))
        for p in probabilities[:-1]:
            total = total + p
            index = index + (u >= total)
        return index

    def colour(self, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """Three numbers in [low, high), `(b, 3)`."""
        return np.stack([self.uniform(low, high) for _ in range(3)], -1)
