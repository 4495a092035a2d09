"""Addressed noise: eps is a pure function of where it is used, never of what was drawn before.

    eps[i] = T[u(i)]        standard normal: u a 16-bit number, T a table of 65,536 levels
    eps[i] = 1 - 2 b(i)     Rademacher: b one bit

where u and b are read from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3") under a key of (run seed, generation, pair, tensor name) and a counter of the element
index. No state is carried, so a slice, a shard, a thread or another device gets the same bits.

This module is the literal definition in numpy. kernels_cpu and kernels_triton compute the same
bits faster and are tested against it.

Stream   SHA-256 of (tag, run_seed, generation, pair, first 8 bytes of SHA-256(name)) gives four
         words (k0, k1, t0, t1): the key is (k0, k1), the counter of block m is
         (m mod 2^32, m div 2^32, t0, t1). Neighbouring seeds therefore share nothing.
Layout   32 consecutive blocks (lanes) form a group. A normal block gives 8 numbers of 16 bits, so
         a group covers 256 elements: element e lies in group e div 256, half-word
         j = (e mod 256) div 32 (word j div 2; low half first), lane e mod 32. A Rademacher block
         gives 128 bits, a group 4096 elements: bit j = (e mod 4096) div 32 (word j div 32).
Table    T = (H, -H): H[i] = c Phi^-1(1/2 + (i + 1/2)/65536), i < 32768, rounded to float32, where
         c = 1.0000101 restores the variance that midpoints lose; 32 entries are then moved by a
         few units in the last place so that the mean is 0 and the mean square is 1 exactly, as
         rational numbers. The fourth moment is 2.99925, the largest level 4.325.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

NoiseKind: TypeAlias = Literal["normal", "rademacher"]
Stream: TypeAlias = tuple[int, int, int, int]  # k0, k1, t0, t1: 32-bit words

LANES: Final = 32  # blocks computed side by side; part of the definition, not a tuning knob
GROUP: Final[dict[NoiseKind, int]] = {"normal": 8 * LANES, "rademacher": 128 * LANES}
TABLE_SHA256: Final = "3405b9c23b7eaf280f35e50e1cf7eb9eb654b9faca8afab1118d53534015398b"

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_TAG = b"anchorage noise 1"
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Address:
    """Where a perturbation belongs: the run, the generation in it, the pair in that."""

    run_seed: int  # 0 .. 2^63 - 1
    generation: int  # 0 .. 2^31 - 1
    pair: int  # 0 .. 2^31 - 1

    def __post_init__(self) -> None:
        for name, limit in (("run_seed", 2**63), ("generation", 2**31), ("pair", 2**31)):
            value = getattr(self, name)
            if not 0 <= value < limit:
                raise ValueError(f"{name} {value} must lie in 0 .. {limit - 1}")


class Runs(NamedTuple):
    """Where a slice lies in its tensor: run r of it is elements [start + r stride, + width).

    The rows of a matrix are one run, a window of its columns has one run a row. Run after run is
    contiguous in memory.
    """

    start: int = 0
    width: int = 0  # 0: all of the slice is one run
    stride: int = 0


def stream(address: Address, tensor_name: str) -> Stream:
    """The four words that make one tensor's noise at one address independent of all other."""
    k0, k1, t0, t1 = streams([address], [tensor_name])[0, 0].tolist()
    return k0, k1, t0, t1


def streams(addresses: Sequence[Address], tensor_names: Sequence[str]) -> NDArray[np.uint32]:
    """The streams of P addresses and T tensors, (T, P, 4)."""
    names = [sha256(name.encode()).digest()[:8] for name in tensor_names]
    places = [_TAG + struct.pack("<QQQ", a.run_seed, a.generation, a.pair) for a in addresses]
    words = b"".join([sha256(place + name).digest()[:16] for name in names for place in places])
    return np.frombuffer(words, "<u4").astype(np.uint32).reshape(len(names), len(places), 4)


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10: (4, B) counters and one key of two words -> (4, B) random words.

    A round maps (c0, c1, c2, c3) to (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1,
    lo(M0 c0)); after it, each key word advances by its Weyl constant, modulo 2^32.
    """
    c0, c1, c2, c3 = (word.astype(np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c2 = (p1 >> 32) ^ c1 ^ np.uint64(k0), (p0 >> 32) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & _WORD, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


@cache
def normal_table() -> NDArray[np.float32]:
    """The 65,536 levels T = (H, -H), read-only; H ships with the package and is pinned."""
    half = np.load(Path(__file__).with_name("normal_table.npy"), allow_pickle=False)
    found = sha256(half.astype("<f4").tobytes()).hexdigest()
    if found != TABLE_SHA256:
        raise ValueError(f"normal_table.npy has sha256 {found}, it must be {TABLE_SHA256}")
    table: NDArray[np.float32] = np.concatenate([half, -half]).astype(np.float32)
    table.flags.writeable = False
    return table


def normal(address: Address, tensor_name: str, start: int, count: int) -> NDArray[np.float32]:
    """Elements [start, start + count) of the standard normal noise of one tensor, (count,)."""
    words, first = _words(address, tensor_name, start, count, GROUP["normal"])
    halves = np.stack([words & 0xFFFF, words >> 16], axis=2)  # (groups, 4, 2, lanes)
    return normal_table()[halves.reshape(-1)[first : first + count]]


def rademacher(address: Address, tensor_name: str, start: int, count: int) -> NDArray[np.float32]:
    """Elements [start, start + count) of the +1 / -1 noise of one tensor, (count,)."""
    words, first = _words(address, tensor_name, start, count, GROUP["rademacher"])
    shifts = np.arange(32, dtype=np.uint32)[:, None]
    bits = (words[:, :, None, :] >> shifts) & 1  # (groups, 4, 32, lanes)
    signs = np.float32(1) - np.float32(2) * bits.astype(np.float32)
    return signs.reshape(-1)[first : first + count]


def _words(
    address: Address, tensor_name: str, start: int, count: int, group: int
) -> tuple[NDArray[np.uint32], int]:
    """The random words (groups, 4, lanes) that cover a slice, and where in them it begins."""
    if start < 0 or count < 0:
        raise ValueError(f"slice start {start}, count {count}: both must be 0 or more")
    k0, k1, t0, t1 = stream(address, tensor_name)
    groups = np.arange(start // group, -(-(start + count) // group), dtype=np.uint64)
    block = (groups[:, None] * LANES + np.arange(LANES, dtype=np.uint64)).reshape(-1)
    tail = (np.full(block.size, t0, np.uint32), np.full(block.size, t1, np.uint32))
    low, high = (block & _WORD).astype(np.uint32), (block >> 32).astype(np.uint32)
    words = philox(np.stack([low, high, *tail]), (k0, k1))
    return words.reshape(4, groups.size, LANES).transpose(1, 0, 2), start % group
