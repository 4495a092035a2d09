"""The compiled loops behind kernels_cpu: one thread, one contiguous slice each.

Every float32 operation is rounded by itself: numba without fastmath neither fuses nor reorders.
Loops run over groups of noise.py, the innermost over 32 lanes, so that they vectorise; a slice that
begins or ends inside a group computes the group and uses its part. Drawing from the table takes
longer than Philox, so a normal is used in the loop that draws it and is never stored.
"""

from typing import Any, Final

import numpy as np
from numba import njit

from agent.learner.noise import LANES

_M0: Final = np.uint64(0xD2511F53)
_M1: Final = np.uint64(0xCD9E8D57)
_W0: Final = np.uint64(0x9E3779B9)
_W1: Final = np.uint64(0xBB67AE85)
_WORD: Final = np.uint64(0xFFFFFFFF)
_HALF: Final = np.uint64(0xFFFF)
_S32: Final = np.uint64(32)
_S16: Final = np.uint64(16)
_ONE32: Final = np.uint32(1)
_EXPONENT_OF_ONE: Final = np.uint32(0x3F800000)
LEAF: Final = 1 << 16  # words of one leaf of a tree hash
_G: Final = np.uint32(0x9E3779B9)
_H: Final = np.uint32(0xBB67AE85)

_compiled = njit(nogil=True, cache=True, error_model="numpy")
_inlined = njit(inline="always")


@_inlined  # type: ignore[untyped-decorator]
def _philox(block: Any, k0: Any, k1: Any, t0: Any, t1: Any) -> Any:
    """noise.philox of one 64-bit block number; only the low 32 bits of each result count.

    State stays in 64-bit lanes and is masked where it is multiplied: one instruction a product.
    """
    c0, c1 = block, block >> _S32
    c2, c3 = t0, t1
    for _ in range(10):
        p0, p1 = _M0 * (c0 & _WORD), _M1 * (c2 & _WORD)
        c0, c1 = (p1 >> _S32) ^ c1 ^ k0, p1
        c2, c3 = (p0 >> _S32) ^ c3 ^ k1, p0
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


@_inlined  # type: ignore[untyped-decorator]
def _draw(index: Any, group: int, words: Any) -> None:
    """One group of places in the normal table into index (256,) of 16 bits."""
    first = np.uint64(group) * np.uint64(LANES)
    k0, k1 = np.uint64(words[0]), np.uint64(words[1])
    t0, t1 = np.uint64(words[2]), np.uint64(words[3])
    for lane in range(LANES):
        c0, c1, c2, c3 = _philox(first + np.uint64(lane), k0, k1, t0, t1)
        index[lane] = c0 & _HALF
        index[LANES + lane] = (c0 >> _S16) & _HALF
        index[2 * LANES + lane] = c1 & _HALF
        index[3 * LANES + lane] = (c1 >> _S16) & _HALF
        index[4 * LANES + lane] = c2 & _HALF
        index[5 * LANES + lane] = (c2 >> _S16) & _HALF
        index[6 * LANES + lane] = c3 & _HALF
        index[7 * LANES + lane] = (c3 >> _S16) & _HALF


@_compiled  # type: ignore[untyped-decorator]
def _signs(eps: Any, bits: Any, group: int, words: Any) -> None:
    """One group of +1 / -1 into eps (4096,); bits (4, 32) is scratch."""
    first = np.uint64(group) * np.uint64(LANES)
    k0, k1 = np.uint64(words[0]), np.uint64(words[1])
    t0, t1 = np.uint64(words[2]), np.uint64(words[3])
    for lane in range(LANES):
        c0, c1, c2, c3 = _philox(first + np.uint64(lane), k0, k1, t0, t1)
        bits[0, lane], bits[1, lane] = c0 & _WORD, c1 & _WORD
        bits[2, lane], bits[3, lane] = c2 & _WORD, c3 & _WORD
    raw = eps.view(np.uint32)
    for word in range(4):
        for bit in range(32):
            at = (word * 32 + bit) * LANES
            for lane in range(LANES):
                sign = np.uint32((bits[word, lane] >> np.uint32(bit)) & _ONE32)
                raw[at + lane] = np.uint32(sign << np.uint32(31)) | _EXPONENT_OF_ONE


@_compiled  # type: ignore[untyped-decorator]
def noise(out: Any, start: int, words: Any, table: Any) -> None:
    """out (n,) = eps[start : start + n]; an empty table asks for signs instead of normals."""
    group_size = 8 * LANES if table.size else 128 * LANES
    eps, index = np.empty(group_size, np.float32), np.empty(8 * LANES, np.uint16)
    bits = np.empty((4, LANES), np.uint32)
    for group in range(start // group_size, (start + out.size + group_size - 1) // group_size):
        at = group * group_size - start
        low, high = max(0, -at), min(group_size, out.size - at)
        if table.size:
            _draw(index, group, words)
            for i in range(low, high):
                out[_place(at + i)] = table[index[_place(i)]]
        else:
            _signs(eps, bits, group, words)
            for i in range(low, high):
                out[_place(at + i)] = eps[_place(i)]


@_compiled  # type: ignore[untyped-decorator]
def render(
    out: Any, anchor: Any, delta: Any, start: int, scale: Any, words: Any, table: Any
) -> None:
    """float32 out (n,) = anchor + (delta + scale * eps); no words: no noise."""
    noisy = words.size > 0
    group_size = 8 * LANES if table.size else 128 * LANES
    eps, index = np.zeros(group_size, np.float32), np.empty(8 * LANES, np.uint16)
    bits = np.empty((4, LANES), np.uint32)
    for group in range(start // group_size, (start + out.size + group_size - 1) // group_size):
        at = group * group_size - start
        low, high = max(0, -at), min(group_size, out.size - at)
        if noisy and table.size:
            _draw(index, group, words)
            for i in range(low, high):
                k = _place(at + i)
                out[k] = _sum(anchor[k], delta[k], scale, table[index[_place(i)]])
            continue
        if noisy:
            _signs(eps, bits, group, words)
        for i in range(low, high):
            k = _place(at + i)
            out[k] = _sum(anchor[k], delta[k], scale, eps[_place(i)])


@_inlined  # type: ignore[untyped-decorator]
def _place(i: Any) -> Any:
    """An index that is never negative, so that no loop asks whether it counts from the end."""
    return np.uint64(i)


@_inlined  # type: ignore[untyped-decorator]
def _sum(anchor: Any, delta: Any, scale: Any, eps: Any) -> Any:
    """anchor + (delta + scale * eps), and the anchor itself where that adds 0."""
    s = delta + scale * eps
    return anchor if s == np.float32(0) else anchor + s


@_compiled  # type: ignore[untyped-decorator]
def render_bf16(
    out: Any, anchor: Any, delta: Any, start: int, scale: Any, words: Any, table: Any
) -> None:
    """`render` where out and anchor (n,) hold bfloat16 bits; the sum is rounded to even."""
    noisy = words.size > 0
    group_size = 8 * LANES if table.size else 128 * LANES
    eps, index = np.zeros(group_size, np.float32), np.empty(8 * LANES, np.uint16)
    bits, sums = np.empty((4, LANES), np.uint32), np.empty(group_size, np.float32)
    raw = sums.view(np.uint32)  # the same memory: bfloat16 is the upper half of a float32
    for group in range(start // group_size, (start + out.size + group_size - 1) // group_size):
        at = group * group_size - start
        low, high = max(0, -at), min(group_size, out.size - at)
        for i in range(low, high):
            raw[_place(i)] = np.uint32(anchor[_place(at + i)]) << np.uint32(16)
        if noisy and table.size:
            _draw(index, group, words)
            for i in range(low, high):
                j = _place(i)
                sums[j] = _sum(sums[j], delta[_place(at + i)], scale, table[index[j]])
        else:
            if noisy:
                _signs(eps, bits, group, words)
            for i in range(low, high):
                j = _place(i)
                sums[j] = _sum(sums[j], delta[_place(at + i)], scale, eps[j])
        for i in range(low, high):
            out[_place(at + i)] = _narrow(raw[_place(i)])


@_inlined  # type: ignore[untyped-decorator]
def _narrow(b: Any) -> Any:
    """float32 bits -> bfloat16 bits, to nearest, ties to even; a NaN stays a (quiet) NaN."""
    rounded = np.uint32(b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & _ONE32))
    nan = np.uint32(b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint32(b | np.uint32(0x400000) if nan else rounded) >> np.uint32(16)


@_compiled  # type: ignore[untyped-decorator]
def update(
    delta: Any,
    start: int,
    coefficients: Any,
    words: Any,
    table: Any,
    penalty: int,
    s: Any,
    share: Any,
    tau: Any,
    weights: Any,
) -> Any:
    """delta (n,) += sum_p c_p eps_p, then the penalty; returns (sum delta^2, sum step^2).

    coefficients (P,) float32, words (P, 4); penalty is the place in penalty.PENALTIES, s its
    alpha * lambda, weights (n,) or empty.
    """
    group_size = 8 * LANES if table.size else 128 * LANES
    eps, index = np.empty(group_size, np.float32), np.empty(8 * LANES, np.uint16)
    bits = np.empty((4, LANES), np.uint32)
    acc = np.empty(group_size, np.float32)
    # One partial sum a lane: the innermost loop stays free of a dependency and vectorises, and the
    # order of additions is fixed by the element's index.
    squares, moves = np.zeros(LANES, np.float64), np.zeros(LANES, np.float64)
    for group in range(start // group_size, (start + delta.size + group_size - 1) // group_size):
        for i in range(group_size):
            acc[_place(i)] = np.float32(0)
        for p in range(coefficients.size):
            c = coefficients[p]
            if table.size:
                _draw(index, group, words[p])
                for i in range(8 * LANES):
                    acc[i] += c * table[index[i]]
            else:
                _signs(eps, bits, group, words[p])
                for i in range(group_size):
                    acc[i] += c * eps[i]
        at = group * group_size - start
        low, high = max(0, -at), min(group_size, delta.size - at)
        _finish(delta, acc, at, low, high, penalty, s, share, tau, weights)
        _tally(squares, moves, delta, acc, at, low, high)
    return squares.sum(), moves.sum()


@_compiled  # type: ignore[untyped-decorator]
def render_runs(
    out: Any,
    anchor: Any,
    delta: Any,
    start: int,
    width: int,
    stride: int,
    scale: Any,
    words: Any,
    table: Any,
) -> None:
    """`render` of runs of width elements that lie stride elements apart in the tensor."""
    for run in range(out.size // width):
        a, b = run * width, (run + 1) * width
        at = start + run * stride
        render(out[a:b], anchor[a:b], delta[a:b], at, scale, words, table)


@_compiled  # type: ignore[untyped-decorator]
def render_bf16_runs(
    out: Any,
    anchor: Any,
    delta: Any,
    start: int,
    width: int,
    stride: int,
    scale: Any,
    words: Any,
    table: Any,
) -> None:
    """`render_bf16` of runs, as in `render_runs`."""
    for run in range(out.size // width):
        a, b = run * width, (run + 1) * width
        at = start + run * stride
        render_bf16(out[a:b], anchor[a:b], delta[a:b], at, scale, words, table)


@_compiled  # type: ignore[untyped-decorator]
def update_runs(
    delta: Any,
    start: int,
    width: int,
    stride: int,
    coefficients: Any,
    words: Any,
    table: Any,
    penalty: int,
    s: Any,
    share: Any,
    tau: Any,
    weights: Any,
) -> Any:
    """`update` of runs, as in `render_runs`."""
    square, move = 0.0, 0.0
    for run in range(delta.size // width):
        a, b = run * width, (run + 1) * width
        held = weights[a:b] if weights.size else weights
        part = update(
            delta[a:b],
            start + run * stride,
            coefficients,
            words,
            table,
            penalty,
            s,
            share,
            tau,
            held,
        )
        square, move = square + part[0], move + part[1]
    return square, move


@_compiled  # type: ignore[untyped-decorator]
def _finish(
    delta: Any,
    acc: Any,
    at: int,
    low: int,
    high: int,
    penalty: int,
    s: Any,
    share: Any,
    tau: Any,
    weights: Any,
) -> None:
    """delta = prox(delta + acc) in place; acc becomes delta before.

    Element i of acc, low <= i < high, belongs to element at + i of delta and weights.
    """
    # A loop for each penalty: a branch inside one loop would keep it from vectorising.
    rest = np.float32(1) - share
    weighted = weights.size > 0
    for i in range(low, high):
        j, k = _place(i), _place(at + i)
        before = delta[k]
        delta[k] = before + acc[j]
        acc[j] = before
    if penalty == 1:
        for i in range(low, high):
            k = _place(at + i)
            t = s * weights[k] if weighted else s
            delta[k] = delta[k] - t * delta[k]
    elif penalty == 2:
        for i in range(low, high):
            k = _place(at + i)
            t = s * weights[k] if weighted else s
            delta[k] = _soft(delta[k], t)
    elif penalty == 3:
        for i in range(low, high):
            k = _place(at + i)
            t = s * weights[k] if weighted else s
            delta[k] = delta[k] - t * min(max(delta[k], -tau), tau)
    elif penalty == 4:
        for i in range(low, high):
            k = _place(at + i)
            t = s * weights[k] if weighted else s
            m = _soft(delta[k], t * share)
            delta[k] = m - t * rest * m


@_inlined  # type: ignore[untyped-decorator]
def _soft(d: Any, t: Any) -> Any:
    """sign(d) max(|d| - t, 0), +0 inside."""
    m = abs(d) - t
    return (m if d > np.float32(0) else -m) if m > np.float32(0) else np.float32(0)


@_compiled  # type: ignore[untyped-decorator]
def _tally(squares: Any, moves: Any, delta: Any, before: Any, at: int, low: int, high: int) -> None:
    """Add the squares of delta and of its move, in float64, element low + i into lane i mod 32.

    Elements low <= i < high of before, at + i of delta.
    """
    whole = high - (high - low) % (8 * LANES)
    for first in range(low, whole, 8 * LANES):
        for lane in range(LANES):
            square, move = squares[lane], moves[lane]
            for block in range(8):
                i = first + block * LANES + lane
                now = delta[_place(at + i)]
                moved = now - before[_place(i)]
                square += np.float64(now) * np.float64(now)
                move += np.float64(moved) * np.float64(moved)
            squares[lane], moves[lane] = square, move
    for i in range(whole, high):
        now = delta[_place(at + i)]
        moved = now - before[_place(i)]
        squares[(i - whole) % LANES] += np.float64(now) * np.float64(now)
        moves[(i - whole) % LANES] += np.float64(moved) * np.float64(moved)


@_compiled  # type: ignore[untyped-decorator]
def sum_squares(values: Any) -> Any:
    """sum values^2 of (n,) float32, in float64, with the additions of `update` in its order."""
    squares, moves = np.zeros(LANES, np.float64), np.zeros(LANES, np.float64)
    _tally(squares, moves, values, values, 0, 0, values.size)
    return squares.sum()


@_compiled  # type: ignore[untyped-decorator]
def leaves(out: Any, words: Any, start: int, width: int, stride: int) -> None:
    """Add to out (leaves, 2) uint32 two sums, modulo 2^32, over the LEAF words of each leaf:

        sum_i mixed(w_i + (2 i + 1) G)    and    sum_i mixed(w_i xor (2 i + 1) H)

    words (n,) uint32 are runs as in `render_runs`, of which out's first leaf holds the first. i
    counts from 0 in each leaf, G and H are Philox's Weyl constants, mixed is the finaliser of
    MurmurHash3 (public domain). A changed word always changes both sums; sums do not depend on
    the order in which they are taken, so that any number of threads gives the same, and the sums
    of a tensor's parts add up to the tensor's.
    """
    first = start // LEAF
    for run in range(words.size // width):
        at, end, place = run * width, (run + 1) * width, start + run * stride
        while at < end:
            within = place % LEAF
            count = min(end - at, LEAF - within)
            one, other = np.uint32(0), np.uint32(0)
            for i in range(count):
                odd = np.uint32(2 * (within + i) + 1)
                word = words[_place(at + i)]
                one = np.uint32(one + _mixed(np.uint32(word + np.uint32(odd * _G))))
                other = np.uint32(other + _mixed(np.uint32(word ^ np.uint32(odd * _H))))
            leaf = place // LEAF - first
            out[leaf, 0], out[leaf, 1] = out[leaf, 0] + one, out[leaf, 1] + other
            at, place = at + count, place + count


@_inlined  # type: ignore[untyped-decorator]
def _mixed(word: Any) -> Any:
    """A bijection of 32-bit words under which every bit of the input moves half of the output."""
    word = np.uint32((word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    word = np.uint32((word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(word ^ (word >> np.uint32(16)))
