"""Random orders that are computed place by place, so that none is ever held in memory."""

from collections.abc import Sequence

import numpy as np

_ROUNDS = 6  # 4 make a network of random functions a random permutation (Luby & Rackoff 1988)


def permuted(places: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """What stands at these places [n] int64 of a random permutation of 0 to size - 1: [n] int64.

    key: numbers from 0 that choose the permutation, such as (seed, epoch).

    A Feistel network permutes the smallest power of four that holds `size`; from a value outside it is
    walked on until one lies inside (Black & Rogaway 2002), fewer than four times on average.
    """
    half = max(((size - 1).bit_length() + 1) // 2, 1)
    keys = np.random.SeedSequence(list(key)).generate_state(_ROUNDS, np.uint64)
    values = places.astype(np.uint64)
    outside = np.arange(len(values))
    while outside.size:
        values[outside] = _feistel(values[outside], half, keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """Values [n] of 2 * half bits, each as another of them."""
    mask = np.uint64((1 << half) - 1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return left << half | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """Values [n] of 64 bits, every bit of which depends on all of the given one's (splitmix64)."""
    values = (values ^ values >> 30) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> 27) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> 31
