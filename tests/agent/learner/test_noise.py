"""Addressed noise: published vectors, the table's exact moments, slices, independence."""

from itertools import combinations
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri

from agent.learner.kernels_cpu import noise_into
from agent.learner.noise import (
    GROUP,
    Address,
    NoiseKind,
    normal,
    normal_table,
    philox,
    rademacher,
    stream,
)

KINDS: tuple[NoiseKind, ...] = ("normal", "rademacher")
DEFINITION = {"normal": normal, "rademacher": rademacher}
HERE = Address(7, 11, 13)

PINNED_STREAM = (819084593, 2507348126, 1135838232, 844802525)
PINNED_NORMAL = [
    1.1322776079177856,
    0.13008573651313782,
    0.303327739238739,
    0.14947527647018433,
    1.2897015810012817,
    -1.675878882408142,
]
PINNED_SIGNS = [-1.0, 1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0]


def drawn(address: Address, name: str, count: int, kind: NoiseKind = "normal") -> np.ndarray:
    out = np.empty(count, np.float32)
    noise_into(out, address, name, 0, kind)
    return out


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_gives_the_published_vectors(counter: str, key: str, words: str) -> None:
    def hexes(text: str) -> list[int]:
        return [int(word, 16) for word in text.split()]

    k0, k1 = hexes(key)
    out = philox(np.array([hexes(counter)], dtype=np.uint32).T, (k0, k1))
    assert out[:, 0].tolist() == hexes(words)


def test_the_noise_of_one_address_never_changes() -> None:
    """Journals written yesterday must replay tomorrow: these bits are the format."""
    address = Address(2**63 - 1, 2**31 - 1, 5)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert stream(address, name) == PINNED_STREAM
    assert normal(address, name, 1000, 6).tolist() == PINNED_NORMAL
    assert rademacher(address, name, 5000, 12).tolist() == PINNED_SIGNS


def test_table_has_mean_zero_and_variance_one_exactly() -> None:
    scaled = np.ldexp(normal_table().astype(np.float64), 40)  # whole numbers, each exact in float64
    levels = [int(level) for level in scaled]
    assert levels == scaled.tolist()
    assert len(set(levels)) == 65_536
    assert sum(levels) == 0
    assert sum(level * level for level in levels) == 65_536 << 80


def test_table_is_the_inverse_cdf_of_midpoints() -> None:
    """Within 4 units in the last place of c * ndtri(midpoint), 1.5 but for the first three."""
    midpoints = ndtri((np.arange(65_536) + 0.5) / 65_536)
    wanted = np.sort(midpoints / np.sqrt(np.mean(midpoints**2)))
    table = np.sort(normal_table().astype(np.float64))
    ulps = np.abs(table - wanted) / np.spacing(np.abs(table).astype(np.float32))
    assert ulps.max() < 4
    assert np.count_nonzero(ulps > 0.5001) <= 64


def test_table_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        normal_table()[0] = 1


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    start=st.integers(0, 3 * GROUP["rademacher"]),
    count=st.integers(0, 2 * GROUP["rademacher"] + 3),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_slice_is_part_of_the_whole(kind: NoiseKind, start: int, count: int, seed: int) -> None:
    """Definition and compiled kernel, any start and length, against the tensor from element 0."""
    address = Address(seed, 3, 1)
    whole = DEFINITION[kind](address, "w", 0, start + count)
    out = np.empty(count, np.float32)
    noise_into(out, address, "w", start, kind)
    assert np.array_equal(out, whole[start:])
    assert np.array_equal(DEFINITION[kind](address, "w", start, count), whole[start:])


@pytest.mark.parametrize("kind", KINDS)
def test_elements_beyond_32_bits_of_blocks_have_their_own_noise(kind: NoiseKind) -> None:
    far = (2**32) * (GROUP[kind] // 32) - 100  # the block number passes 2^32 inside this slice
    near, across = np.empty(200, np.float32), np.empty(200, np.float32)
    noise_into(across, HERE, "w", far, kind)
    noise_into(near, HERE, "w", 0, kind)
    assert np.array_equal(across, DEFINITION[kind](HERE, "w", far, 200))
    assert not np.array_equal(across[100:], near[:100])  # no wrap to block 0


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_a_bit(kind: NoiseKind) -> None:
    count = (1 << 22) + 777
    outs = [np.empty(count, np.float32) for _ in range(3)]
    for threads, out in zip((1, 2, 5), outs, strict=True):
        noise_into(out, HERE, "w", 129, kind, threads)
    assert np.array_equal(outs[0], outs[1])
    assert np.array_equal(outs[0], outs[2])


def test_normal_moments() -> None:
    """Mean, variance, skewness, kurtosis of 1e7 numbers, within 4.5 standard errors."""
    n = 10_000_000
    x, levels = drawn(HERE, "w", n).astype(np.float64), normal_table().astype(np.float64)
    found, exact = x.copy(), levels.copy()
    for power in (1, 2, 3, 4):
        assert abs(found.mean() - exact.mean()) < 4.5 * exact.std() / sqrt(n), power
        if power < 4:
            found *= x
            exact *= levels
    assert abs(exact.mean() - 3) < 1e-3


def test_every_level_is_drawn_equally_often() -> None:
    n = 40 * 65_536
    counts = np.unique(drawn(HERE, "w", n), return_counts=True)[1]
    expected = n / 65_536
    chi2 = float(np.sum((counts - expected) ** 2) / expected)
    assert counts.size == 65_536
    assert abs(chi2 - 65_535) < 4.5 * sqrt(2 * 65_535)


def test_signs_are_fair_and_one_bit_each() -> None:
    n = 10_000_000
    x = drawn(HERE, "w", n, "rademacher")
    assert np.array_equal(np.abs(x), np.ones(n))
    assert abs(x.mean(dtype=np.float64)) < 4.5 / sqrt(n)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_in_every_direction_are_uncorrelated(kind: NoiseKind) -> None:
    """1e7 numbers each: tensors, pairs, generations, neighbouring seeds, elements 1 .. 4096 apart.

    28 correlations within 4.8 standard errors: a false alarm once in 22,000 choices of seeds.
    """
    n = 10_000_000
    streams = [
        drawn(Address(7, 11, 13), "a", n, kind),
        drawn(Address(7, 11, 13), "b", n, kind),
        drawn(Address(7, 11, 14), "a", n, kind),
        drawn(Address(7, 12, 13), "a", n, kind),
        drawn(Address(8, 11, 13), "a", n, kind),
        drawn(Address(11, 7, 13), "a", n, kind),  # the same numbers in other places
        drawn(Address(7, 13, 11), "a", n, kind),
    ]
    bound = 4.8 / sqrt(n)
    for x, y in combinations(streams, 2):
        assert abs(np.dot(x, y)) / n < bound
    for lag in (1, 31, 32, 33, 128, 256, 4096):
        assert abs(np.dot(streams[0][lag:], streams[0][:-lag])) / n < bound


def test_neighbouring_seeds_share_no_word_of_their_streams() -> None:
    words = [stream(Address(seed, g, p), "w") for seed in range(30) for g in (0, 1) for p in (0, 1)]
    flat = [word for four in words for word in four]
    assert len(set(flat)) == len(flat)


@pytest.mark.parametrize(
    ("field", "value"),
    [("run_seed", 2**63), ("run_seed", -1), ("generation", 2**31), ("pair", -1)],
)
def test_an_address_out_of_range_is_refused(field: str, value: int) -> None:
    where = {"run_seed": 0, "generation": 0, "pair": 0} | {field: value}
    with pytest.raises(ValueError, match=f"{field} {value} must lie in 0 .. "):
        Address(**where)


def test_a_negative_slice_and_an_unknown_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="start -1, count 4"):
        normal(HERE, "w", -1, 4)
    with pytest.raises(ValueError, match="start -1"):
        noise_into(np.empty(4, np.float32), HERE, "w", -1, "normal")
    with pytest.raises(ValueError, match="'uniform' must be one of normal, rademacher"):
        noise_into(np.empty(4, np.float32), HERE, "w", 0, "uniform")  # type: ignore[arg-type]
