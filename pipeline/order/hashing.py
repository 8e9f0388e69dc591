"""Counter-based randomness: 64-bit keys and permutations that are pure functions of integers.

NumPy promises no stable stream for its Generators across versions (NEP 19); a run of months needs one, so the mixing
function is fixed here. It is splitmix64's finaliser (Steele et al. 2014, doi:10.1145/2660193.2660195).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]

_ROUNDS = 6
_STEP = 0x9E3779B97F4A7C15


def mixed(values: UInt64s) -> UInt64s:
    """Scramble each value on its own; a bijection on 64-bit integers."""
    values = values + np.uint64(_STEP)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key(*parts: int) -> int:
    """One 64-bit key for a tuple of integers; (1, 2) and (2, 1) differ."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = mixed(state ^ np.uint64(part % 2**64))
    return int(state[0])


def uniforms(stream: int, counters: npt.NDArray[np.int64], draws: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), `draws` for each counter.

    Args:
        stream: A key().
        counters: (n,) integers, for example sample ids.
        draws: How many numbers each counter gets.

    Returns:
        (n, draws); a row depends on its counter and the stream alone.
    """
    rows = mixed(counters.astype(np.uint64) ^ np.uint64(stream))
    bits = mixed(rows[:, None] + np.arange(draws, dtype=np.uint64)[None, :] * np.uint64(_STEP))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permuted(stream: int, size: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The places to which a keyed permutation of range(size) sends `positions`, without building the permutation.

    A Feistel network on the next even number of bits; values outside the range walk along their cycle (Black and
    Rogaway 2002, doi:10.1007/3-540-45760-7_9), fewer than four steps on average.

    Args:
        stream: A key().
        size: Length of the permuted range.
        positions: Any shape, each in [0, size).
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    round_keys = mixed(np.uint64(stream) + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(_STEP))
    values = positions.astype(np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, round_keys)
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _feistel(values: UInt64s, half_bits: np.uint64, round_keys: UInt64s) -> UInt64s:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (mixed(right ^ round_key) & mask)
    return (left << half_bits) | right
