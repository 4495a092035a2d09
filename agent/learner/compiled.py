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

_compiled = njit(nogil=True, cache=True, error_model="numpy")
_inlined = njit(inline="always")


@_inlined  # type: ignore[untyped-decorator]
def _philox(block: Any, words: Any) -> Any:
    """noise.philox of one 64-bit block number; only the low 32 bits of each result count.

    State stays in 64-bit lanes and is masked where it is multiplied: one instruction a product.
    """
    c0, c1 = block, block >> _S32
    c2, c3 = np.uint64(words[2]), np.uint64(words[3])
    k0, k1 = np.uint64(words[0]), np.uint64(words[1])
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
    for lane in range(LANES):
        c0, c1, c2, c3 = _philox(first + np.uint64(lane), words)
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
    for lane in range(LANES):
        c0, c1, c2, c3 = _philox(first + np.uint64(lane), words)
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
    end = start + out.size
    for group in range(start // group_size, (end + group_size - 1) // group_size):
        at = group * group_size
        low, high = max(start, at), min(end, at + group_size)
        if table.size:
            _draw(index, group, words)
            for i in range(high - low):
                out[low - start + i] = table[index[low - at + i]]
        else:
            _signs(eps, bits, group, words)
            out[low - start : high - start] = eps[low - at : high - at]


@_compiled  # type: ignore[untyped-decorator]
def render(
    out: Any, anchor: Any, delta: Any, start: int, scale: Any, words: Any, table: Any
) -> None:
    """float32 out (n,) = anchor + (delta + scale * eps); no words: no noise."""
    noisy = words.size > 0
    group_size = 8 * LANES if table.size else 128 * LANES
    eps, index = np.zeros(group_size, np.float32), np.empty(8 * LANES, np.uint16)
    bits = np.empty((4, LANES), np.uint32)
    end = start + out.size
    for group in range(start // group_size, (end + group_size - 1) // group_size):
        at = group * group_size
        low, high = max(start, at), min(end, at + group_size)
        here = slice(low - start, high - start)
        if noisy and table.size:
            _draw(index, group, words)
            _add_drawn(
                out[here], anchor[here], delta[here], scale, table, index[low - at : high - at]
            )
            continue
        if noisy:
            _signs(eps, bits, group, words)
        _add(out[here], anchor[here], delta[here], scale, eps[low - at : high - at])


@_inlined  # type: ignore[untyped-decorator]
def _add(out: Any, anchor: Any, delta: Any, scale: Any, eps: Any) -> None:
    """out = anchor + (delta + scale * eps), elementwise."""
    for i in range(out.size):
        s = delta[i] + scale * eps[i]
        out[i] = anchor[i] if s == np.float32(0) else anchor[i] + s


@_inlined  # type: ignore[untyped-decorator]
def _add_drawn(out: Any, anchor: Any, delta: Any, scale: Any, table: Any, index: Any) -> None:
    """`_add` of the normals at these places of the table."""
    for i in range(out.size):
        s = delta[i] + scale * table[index[i]]
        out[i] = anchor[i] if s == np.float32(0) else anchor[i] + s


@_compiled  # type: ignore[untyped-decorator]
def render_bf16(
    out: Any, anchor: Any, delta: Any, start: int, scale: Any, words: Any, table: Any
) -> None:
    """`render` where out and anchor (n,) hold bfloat16 bits; the sum is rounded to even."""
    noisy = words.size > 0
    group_size = 8 * LANES if table.size else 128 * LANES
    eps, index = np.zeros(group_size, np.float32), np.empty(8 * LANES, np.uint16)
    bits, wide = np.empty((4, LANES), np.uint32), np.empty(group_size, np.float32)
    end = start + out.size
    for group in range(start // group_size, (end + group_size - 1) // group_size):
        at = group * group_size
        low, high = max(start, at), min(end, at + group_size)
        here, sums = slice(low - start, high - start), wide[: high - low]
        _widen(sums.view(np.uint32), anchor[here])
        if noisy and table.size:
            _draw(index, group, words)
            _add_drawn(sums, sums, delta[here], scale, table, index[low - at : high - at])
        else:
            if noisy:
                _signs(eps, bits, group, words)
            _add(sums, sums, delta[here], scale, eps[low - at : high - at])
        _narrow(out[here], sums.view(np.uint32))


@_inlined  # type: ignore[untyped-decorator]
def _widen(bits32: Any, bits16: Any) -> None:
    """bfloat16 -> float32, exactly."""
    for i in range(bits16.size):
        bits32[i] = np.uint32(bits16[i]) << np.uint32(16)


@_inlined  # type: ignore[untyped-decorator]
def _narrow(bits16: Any, bits32: Any) -> None:
    """float32 -> bfloat16, to nearest, ties to even; a NaN stays a (quiet) NaN."""
    for i in range(bits16.size):
        b = bits32[i]
        rounded = np.uint32(b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & _ONE32))
        nan = np.uint32(b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        bits16[i] = np.uint32(b | np.uint32(0x400000) if nan else rounded) >> np.uint32(16)


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
    squares, moves = np.zeros(LANES, np.float64), np.zeros(LANES, np.float64)
    end = start + delta.size
    for group in range(start // group_size, (end + group_size - 1) // group_size):
        acc[:] = np.float32(0)
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
        at = group * group_size
        low, high = max(start, at), min(end, at + group_size)
        here = delta[low - start : high - start]
        w = weights[low - start : high - start] if weights.size else weights
        _finish(here, acc[low - at : high - at], penalty, s, share, tau, w)
        _tally(squares, moves, here, acc[low - at : high - at])
    return squares.sum(), moves.sum()


@_compiled  # type: ignore[untyped-decorator]
def _finish(delta: Any, acc: Any, penalty: int, s: Any, share: Any, tau: Any, weights: Any) -> None:
    """delta = prox(delta + acc) in place; acc becomes delta before. A loop a penalty: each fast."""
    rest = np.float32(1) - share
    weighted = weights.size > 0
    for i in range(delta.size):
        before = delta[i]
        delta[i] = before + acc[i]
        acc[i] = before
    if penalty == 1:
        for i in range(delta.size):
            t = s * weights[i] if weighted else s
            delta[i] = delta[i] - t * delta[i]
    elif penalty == 2:
        for i in range(delta.size):
            t = s * weights[i] if weighted else s
            delta[i] = _soft(delta[i], t)
    elif penalty == 3:
        for i in range(delta.size):
            t = s * weights[i] if weighted else s
            delta[i] = delta[i] - t * min(max(delta[i], -tau), tau)
    elif penalty == 4:
        for i in range(delta.size):
            t = s * weights[i] if weighted else s
            m = _soft(delta[i], t * share)
            delta[i] = m - t * rest * m


@_inlined  # type: ignore[untyped-decorator]
def _soft(d: Any, t: Any) -> Any:
    """sign(d) max(|d| - t, 0), +0 inside."""
    m = abs(d) - t
    return (m if d > np.float32(0) else -m) if m > np.float32(0) else np.float32(0)


@_compiled  # type: ignore[untyped-decorator]
def _tally(squares: Any, moves: Any, delta: Any, before: Any) -> None:
    """Add the squares of delta and of its move, in float64, element i into lane i mod 32."""
    whole = delta.size - delta.size % LANES
    for at in range(0, whole, LANES):
        for lane in range(LANES):
            now, moved = delta[at + lane], delta[at + lane] - before[at + lane]
            squares[lane] += np.float64(now) * np.float64(now)
            moves[lane] += np.float64(moved) * np.float64(moved)
    for i in range(whole, delta.size):
        now, moved = delta[i], delta[i] - before[i]
        squares[i - whole] += np.float64(now) * np.float64(now)
        moves[i - whole] += np.float64(moved) * np.float64(moved)


@_compiled  # type: ignore[untyped-decorator]
def sum_squares(values: Any) -> Any:
    """sum values^2 of (n,) float32, in float64, with the additions of `update` in its order."""
    squares, moves = np.zeros(LANES, np.float64), np.zeros(LANES, np.float64)
    _tally(squares, moves, values, values)
    return squares.sum()
