from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.order import hashing


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 700), stream=st.integers(0, 2**64 - 1))
def test_permuted_hits_every_place_once(size: int, stream: int) -> None:
    places = hashing.permuted(stream, size, np.arange(size))

    assert np.array_equal(np.sort(places), np.arange(size))


def test_permuted_reaches_one_place_without_the_others() -> None:
    whole = hashing.permuted(7, 1000, np.arange(1000))

    assert [int(hashing.permuted(7, 1000, np.array([place]))[0]) for place in range(0, 1000, 97)] == whole[
        ::97
    ].tolist()


def test_permuted_sends_each_place_everywhere_equally_often() -> None:
    size, streams = 5, 1500
    counts = np.zeros((size, size))
    for stream in range(streams):
        counts[np.arange(size), hashing.permuted(hashing.key(stream), size, np.arange(size))] += 1

    chi_square = ((counts - streams / size) ** 2 / (streams / size)).sum()

    # 16 degrees of freedom: mean 16, standard deviation 5.7.
    assert chi_square < 16 + 5 * 5.7


def test_uniforms_depend_on_their_counter_alone() -> None:
    counters = np.arange(100)
    together = hashing.uniforms(3, counters, 8)

    assert np.array_equal(hashing.uniforms(3, counters[41:42], 8)[0], together[41])


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    draws = hashing.uniforms(hashing.key(1, 2), np.arange(20000), 6)

    assert draws.min() >= 0 and draws.max() < 1
    assert np.abs(draws.mean(0) - 0.5).max() < 5 * np.sqrt(1 / 12 / 20000)
    correlations = np.corrcoef(np.concatenate([draws[:-1], draws[1:]], axis=1).T) - np.eye(12)
    assert np.abs(correlations).max() < 5 / np.sqrt(20000)


def test_key_distinguishes_order_and_length() -> None:
    keys = [hashing.key(*parts) for parts in [(1, 2), (2, 1), (1,), (1, 2, 0), (0, 1, 2), ()]]

    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("value", [0, 1, 2**63])
def test_mixed_is_splitmix64(value: int) -> None:
    # The reference in plain integers, after https://prng.di.unimi.it/splitmix64.c
    z = (value + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64

    assert int(hashing.mixed(np.array([value], np.uint64))[0]) == z ^ (z >> 31)
