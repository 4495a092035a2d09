"""The Triton kernels behind kernels_triton: the arithmetic of compiled.py, tile by tile.

A program draws BLOCKS Philox blocks and lays them out as a tile (BLOCKS, 8) of normals or
(BLOCKS, 128) of signs; in one column neighbouring rows are neighbouring elements, so memory is
touched in runs of 32 floats. Arguments without a type are pointers, numbers or tiles: Triton reads
annotations as code of its own.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from agent.learner.noise import LANES as LANES_OF_A_GROUP

LANES = tl.constexpr(LANES_OF_A_GROUP)
M0, M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
W0, W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


@triton.jit
def _philox(block, words):
    """noise.philox of 64-bit block numbers (B,) under the four words at a pointer."""
    zero = tl.zeros_like(block).to(tl.uint32)
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    k0 = zero + tl.load(words).to(tl.uint32, bitcast=True)
    k1 = zero + tl.load(words + 1).to(tl.uint32, bitcast=True)
    c2 = zero + tl.load(words + 2).to(tl.uint32, bitcast=True)
    c3 = zero + tl.load(words + 3).to(tl.uint32, bitcast=True)
    m0, m1, w0, w1 = zero + M0, zero + M1, zero + W0, zero + W1
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(m0, c0), tl.umulhi(m1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, m1 * c2, high0 ^ c3 ^ k1, m0 * c0
        k0, k1 = k0 + w0, k1 + w1
    return c0, c1, c2, c3


@triton.jit
def _eps(block, words, table, NORMAL: tl.constexpr):
    """Noise of blocks (B,): (B, 8) normals or (B, 128) signs, columns j as in noise.py."""
    c0, c1, c2, c3 = _philox(block, words)
    four = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), [block.shape[0], 4])
    if NORMAL:
        index = tl.join(four & 0xFFFF, four >> 16)  # (B, 4, 2)
        eps = tl.load(table + tl.reshape(index, [block.shape[0], 8]).to(tl.int32))
    else:
        shifts = tl.arange(0, 32).to(tl.uint32)[None, None, :]
        sign = ((four[:, :, None] >> shifts) & 1) << 31 | 0x3F800000  # the bits of +1 or -1
        eps = tl.reshape(sign, [block.shape[0], 128]).to(tl.float32, bitcast=True)
    return eps


@triton.jit
def _tile(start, width, stride, per_run, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's block numbers (B,), and places in the slice with their mask (B, C).

    start, width, stride: `noise.Runs`; each run has per_run programs, from its first group on.
    """
    program = tl.program_id(0).to(tl.int64)
    run = program // per_run
    begin = start + run * stride
    first = begin // (COLUMNS * LANES) * LANES + program % per_run * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    group, lane = block // LANES, block % LANES
    column = tl.arange(0, COLUMNS).to(tl.int64)
    at = (group * (COLUMNS * LANES) + lane)[:, None] + (column * LANES)[None, :] - begin
    return block, at + run * width, (at >= 0) & (at < width)


@triton.jit
def _store(out, value, mask, BF16: tl.constexpr):
    """float32 values into out, whose pointer is int16 for bfloat16 bits."""
    if BF16:
        b = value.to(tl.uint32, bitcast=True)
        even = b + 0x7FFF + ((b >> 16) & 1)
        bits = tl.where((b & 0x7FFFFFFF) > 0x7F800000, b | 0x400000, even) >> 16
        tl.store(out, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask)
    else:
        tl.store(out, value.to(out.dtype.element_ty), mask)


@triton.jit
def _load(at, mask, BF16: tl.constexpr):
    """The stored numbers as float32, exactly."""
    if BF16:
        bits = tl.load(at, mask, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
        value = (bits << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(at, mask, other=0).to(tl.float32)
    return value


@triton.jit
def noise(
    out,
    words,
    table,
    start,
    width,
    stride,
    per_run,
    NORMAL: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out (n,) = eps of the slice's runs."""
    block, at, mask = _tile(start, width, stride, per_run, BLOCKS, COLUMNS)
    tl.store(out + at, _eps(block, words, table, NORMAL), mask)


@triton.jit
def render(
    out,
    anchor,
    delta,
    scale,
    words,
    table,
    start,
    width,
    stride,
    per_run,
    NOISY: tl.constexpr,
    BF16: tl.constexpr,
    NORMAL: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out = anchor + (delta + scale * eps), and anchor itself where the sum in brackets is 0."""
    block, at, mask = _tile(start, width, stride, per_run, BLOCKS, COLUMNS)
    s = tl.load(delta + at, mask, other=0)
    if NOISY:
        s = s + tl.load(scale) * _eps(block, words, table, NORMAL)
    base = _load(anchor + at, mask, BF16)
    _store(out + at, tl.where(s == 0, base, base + s), mask, BF16)


@triton.jit
def update(
    delta,
    coefficients,
    words,
    table,
    strength,
    weights,
    squares,
    start,
    width,
    stride,
    per_run,
    pairs,
    PENALTY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    NORMAL: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """delta = penalised(delta + ((0 + c_0 eps_0) + c_1 eps_1) + ...); words (P, 4).

    squares (programs, 2) float64: this program's sums of delta^2 and of its move^2. Summed here,
    because a copy of delta in float64 would be three times as large as delta itself.
    """
    block, at, mask = _tile(start, width, stride, per_run, BLOCKS, COLUMNS)
    # Pairs are added in order, as on the CPU: another order would round to other bits.
    acc = tl.zeros([BLOCKS, COLUMNS], tl.float32)
    for p in range(pairs):
        acc = acc + tl.load(coefficients + p) * _eps(block, words + 4 * p, table, NORMAL)
    t = tl.load(strength)
    if WEIGHTED:
        t = t * tl.load(weights + at, mask, other=0)
    before = tl.load(delta + at, mask, other=0)
    after = _penalised(before + acc, t, strength, PENALTY)
    tl.store(delta + at, after, mask)
    now = tl.where(mask, after, 0.0).to(tl.float64)
    move = tl.where(mask, after - before, 0.0).to(tl.float64)
    place = squares + 2 * tl.program_id(0)
    tl.store(place, tl.sum(tl.sum(now * now, 1), 0))
    tl.store(place + 1, tl.sum(tl.sum(move * move, 1), 0))


@triton.jit
def _penalised(d, t, strength, PENALTY: tl.constexpr):
    """penalty.prox of d with s w = t; strength points at (s, share, 1 - share, tau)."""
    if PENALTY == "l2":
        d = d - t * d
    elif PENALTY == "l1":
        d = _soft(d, t)
    elif PENALTY == "huber":
        tau = tl.load(strength + 3)
        d = d - t * tl.minimum(tl.maximum(d, -tau), tau)
    elif PENALTY == "elastic_net":
        d = _soft(d, t * tl.load(strength + 1))
        d = d - t * tl.load(strength + 2) * d
    return d


@triton.jit
def _soft(d, threshold):
    """sign(d) max(|d| - threshold, 0), +0 inside."""
    m = tl.abs(d) - threshold
    return tl.where(m > 0, tl.where(d > 0, m, -m), 0.0)


@triton.jit
def leaves(
    out,
    words,
    start,
    width,
    stride,
    count,
    LEAF: tl.constexpr,
    TILE: tl.constexpr,
    RUNS: tl.constexpr,
):
    """out (leaves, 2) int32: the sums of `compiled.leaves` over words (count,) int32, a slice.

    A program goes over the places of one leaf, from that of the slice's first element on.
    """
    leaf = tl.program_id(0).to(tl.int64) + start // LEAF
    first = leaf * LEAF - start
    one = tl.zeros([TILE], tl.uint64)
    other = tl.zeros([TILE], tl.uint64)
    for chunk in range(LEAF // TILE):
        place = chunk * TILE + tl.arange(0, TILE)
        at = first + place
        mask = at >= 0
        if RUNS:  # of several runs: a division for each element, which one run does without
            run = at // stride
            mask = mask & (at - run * stride < width)
            at = at - run * (stride - width)
        mask = mask & (at < count)
        word = tl.load(words + at, mask, other=0).to(tl.uint32, bitcast=True)
        odd = place.to(tl.uint32) * 2 + 1
        one += tl.where(mask, _mixed(word + odd * W0), 0).to(tl.uint64)
        other += tl.where(mask, _mixed(word ^ odd * W1), 0).to(tl.uint64)
    # Summed in 64 bits, of which 32 are kept: the order of additions cannot matter.
    to = out + 2 * leaf
    tl.store(to, tl.sum(one, 0).to(tl.uint32).to(tl.int32, bitcast=True))
    tl.store(to + 1, tl.sum(other, 0).to(tl.uint32).to(tl.int32, bitcast=True))


@triton.jit
def _mixed(word):
    """`compiled._mixed` of uint32 words."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B
    word = (word ^ (word >> 13)) * 0xC2B2AE35
    return word ^ (word >> 16)
