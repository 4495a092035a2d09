"""The compiled kernels against literal numpy, bit for bit, for any slice and thread count."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.learner.compiled import LEAF
from agent.learner.es import Step, members, step
from agent.learner.kernels_cpu import (
    Render,
    Update,
    render_into,
    render_many,
    tree_leaves,
    update_inplace,
    update_many,
)
from agent.learner.noise import Address, NoiseKind, Runs, normal, rademacher
from agent.learner.penalty import PENALTIES, Penalty, PenaltyKind, prox

pytestmark = pytest.mark.proof  # the loops are compiled first

KINDS: tuple[NoiseKind, ...] = ("normal", "rademacher")
DEFINITION = {"normal": normal, "rademacher": rademacher}
HERE = Address(3, 1, 4)
F32 = np.float32


def arrays(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """anchor, delta with some exact zeros, importance weights; all float32 (count,)."""
    rng = np.random.default_rng(seed)
    anchor = rng.standard_normal(count).astype(F32)
    delta = (0.01 * rng.standard_normal(count) * (rng.random(count) < 0.8)).astype(F32)
    return anchor, delta, rng.random(count).astype(F32)


def a_step(kind: PenaltyKind, noise: NoiseKind = "normal", population: int = 6) -> Step:
    penalty = Penalty(kind, lam=30.0, threshold=0.004, l1_share=0.3)
    if kind == "l1":
        penalty = replace(penalty, lam=0.5)
    rewards = np.random.default_rng(1).random(population)
    return step(
        rewards, members(population, False), run_seed=3, generation=1, sigma=0.01, alpha=0.01,
        penalty=penalty, noise=noise,
    )  # fmt: skip


def literal_update(
    delta: np.ndarray, name: str, start: int, taken: Step, weights: np.ndarray | None
) -> np.ndarray:
    """delta + ((0 + c_0 eps_0) + c_1 eps_1) + ..., then prox, each operation in float32."""
    acc = np.zeros_like(delta)
    for address, c in zip(taken.addresses(), taken.coefficients, strict=True):
        acc = acc + F32(c) * DEFINITION[taken.noise](address, name, start, delta.size)
    return prox(delta + acc, taken.penalty, taken.alpha, weights)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("kind", PENALTIES)
def test_update_is_its_definition(kind: PenaltyKind, noise: NoiseKind, weighted: bool) -> None:
    _, delta, weights = arrays(9001)
    taken, importance = a_step(kind, noise), weights if weighted else None
    wanted = literal_update(delta, "w", 123, taken, importance)
    before = delta.copy()
    squares = update_inplace(delta, "w", 123, taken, importance)
    assert delta.tobytes() == wanted.tobytes()
    moved = (wanted - before).astype(np.float64)
    assert squares.delta == pytest.approx(np.sum(wanted.astype(np.float64) ** 2), rel=1e-12)
    assert squares.step == pytest.approx(np.sum(moved**2), rel=1e-12)
    if kind == "l1":
        assert np.count_nonzero(delta == 0) > 100


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 20_000), max_size=6), st.sampled_from(KINDS))
def test_shards_equal_the_whole_tensor(edges: list[int], noise: NoiseKind) -> None:
    """Any cut of a tensor, as tensor parallelism makes it, renders and updates the same bits."""
    anchor, delta, weights = arrays(20_000)
    taken, edges = a_step("elastic_net", noise), sorted({0, 20_000, *edges})
    whole_out, whole, out, parts = np.empty_like(anchor), delta.copy(), np.empty_like(anchor), delta
    render_into(whole_out, anchor, whole, HERE, "w", 0, 0.01, noise)
    update_inplace(whole, "w", 0, taken, weights)
    for a, b in itertools.pairwise(edges):
        at = slice(a, b)
        render_into(out[at], anchor[at], parts[at], HERE, "w", a, 0.01, noise)
        update_inplace(parts[at], "w", a, taken, weights[at])
    assert out.tobytes() == whole_out.tobytes()
    assert parts.tobytes() == whole.tobytes()


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 5_000), st.lists(st.integers(0, 5_000), max_size=3), st.sampled_from(KINDS),
    st.sampled_from([1, 3]),
)  # fmt: skip
def test_windows_of_columns_equal_those_of_the_whole_tensor(
    wide: int, edges: list[int], noise: NoiseKind, threads: int
) -> None:
    """Render, update and the leaves of the tree hash: cut anywhere, side by side the whole's."""
    count = -(-70_000 // wide) * wide
    anchor, delta, weights = arrays(count)
    taken, edges = a_step("elastic_net", noise), sorted({0, wide, *(e % wide for e in edges)})
    whole_out, whole = np.empty_like(anchor), delta.copy()
    leaves = tree_leaves(delta)
    render_into(whole_out, anchor, whole, HERE, "w", 0, 0.01, noise)
    update_inplace(whole, "w", 0, taken, weights)
    summed = np.zeros_like(leaves)
    for a, b in itertools.pairwise(edges):
        runs, window = Runs(a, b - a, wide), np.s_[:, a:b]
        cut = [
            part.reshape(-1, wide)[window].copy().reshape(-1) for part in (anchor, delta, weights)
        ]
        summed += tree_leaves(cut[1], threads, runs, count)
        out = np.empty_like(cut[0])
        render_many([Render("w", out, cut[0], cut[1], runs)], HERE, 0.01, noise, threads)
        update_many([Update("w", cut[1], cut[2], runs)], taken, threads)
        assert out.tobytes() == whole_out.reshape(-1, wide)[window].tobytes()
        assert cut[1].tobytes() == whole.reshape(-1, wide)[window].tobytes()
    assert summed.tolist() == leaves.tolist()


def test_leaves_of_rows_add_up_to_the_whole_tensors() -> None:
    delta = arrays(3 * LEAF + 17)[1]
    parts = [
        tree_leaves(delta[a:b], None, Runs(a), delta.size)
        for a, b in itertools.pairwise([0, 5, LEAF + 9, delta.size])
    ]
    assert sum(parts).tolist() == tree_leaves(delta).tolist()
    with pytest.raises(ValueError, match="not whole runs of 10"):
        tree_leaves(delta, None, Runs(0, 10, 20), 2 * delta.size)


@pytest.mark.parametrize("noise", KINDS)
def test_threads_change_neither_weights_nor_norms(noise: NoiseKind) -> None:
    count = (1 << 20) + 4321
    anchor, delta, _ = arrays(count)
    results = set()
    for threads in (1, 2, 3):
        out, moved = np.empty_like(anchor), delta.copy()
        render_into(out, anchor, delta, HERE, "w", 99, 0.01, noise, threads)
        squares = update_inplace(moved, "w", 99, a_step("l2", noise), None, threads)
        results.add((out.tobytes(), moved.tobytes(), squares))
    assert len(results) == 1


@pytest.mark.parametrize("noise", KINDS)
def test_every_task_of_a_large_tensor_knows_its_place(noise: NoiseKind) -> None:
    """Slices across all borders between tasks, against the literal definition."""
    count, taken = (1 << 20) + 4321, a_step("l2", noise)
    anchor, delta, _ = arrays(count)
    out, moved = np.empty_like(anchor), delta.copy()
    render_into(out, anchor, delta, HERE, "w", 99, 0.01, noise)
    update_inplace(moved, "w", 99, taken)
    for border in range((1 << 16) - 99, count, 1 << 16):
        at = slice(border - 3, border + 3)
        eps = DEFINITION[noise](HERE, "w", 99 + at.start, 6)
        assert np.array_equal(out[at], anchor[at] + (delta[at] + F32(0.01) * eps))
        wanted = literal_update(delta[at], "w", 99 + at.start, taken, None)
        assert np.array_equal(moved[at], wanted)


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("scale", [0.01, -0.01])
def test_render_is_its_definition(noise: NoiseKind, scale: float) -> None:
    anchor, delta, _ = arrays(9001)
    out = np.empty_like(anchor)
    render_into(out, anchor, delta, HERE, "w", 123, scale, noise)
    eps = DEFINITION[noise](HERE, "w", 123, 9001)
    assert out.tobytes() == (anchor + (delta + F32(scale) * eps)).tobytes()


@pytest.mark.parametrize("noise", KINDS)
def test_bfloat16_render_is_the_rounded_float32_render(noise: NoiseKind) -> None:
    """Against torch's own cast, over the whole range of exponents, infinities and NaN."""
    rng = np.random.default_rng(0)
    _, delta, _ = arrays(70_000)
    bits = rng.permutation(np.arange(70_000) % 65_536).astype(np.uint16)  # every bfloat16
    anchor = torch.from_numpy(bits).view(torch.bfloat16)
    wide, out = np.empty(70_000, F32), np.empty(70_000, np.uint16)
    render_into(wide, anchor.float().numpy(), delta, HERE, "w", 5, 0.01, noise)
    render_into(out, bits, delta, HERE, "w", 5, 0.01, noise)
    wanted = torch.from_numpy(wide).bfloat16()
    found = torch.from_numpy(out).view(torch.bfloat16)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    numbers = ~torch.isnan(wanted)
    assert torch.equal(found[numbers].view(torch.int16), wanted[numbers].view(torch.int16))


@pytest.mark.parametrize("bits16", [False, True])
def test_a_zero_delta_renders_the_anchor_itself_even_its_minus_zeros(bits16: bool) -> None:
    anchor = np.array([0.0, -0.0, 1.5, -2.0, np.inf], F32)
    if bits16:
        anchor = (anchor.view(np.uint32) >> 16).astype(np.uint16)
    for delta in (np.zeros(5, F32), -np.zeros(5, F32)):
        for address, scale in ((None, 0.5), (HERE, 0.0)):
            out = np.full_like(anchor, 7)
            render_many([Render("w", out, anchor, delta)], address, scale, "normal")
            assert out.tobytes() == anchor.tobytes()


def test_rendering_again_restores_exactly_after_400_cycles() -> None:
    """Perturb and restore in place of one buffer: a render leaves no trace in the next."""
    anchor, delta, _ = arrays(10_000)
    buffer, plain = np.empty_like(anchor), np.empty_like(anchor)
    render_many([Render("w", plain, anchor, delta)], None, 0.0, "normal")
    for cycle in range(400):
        render_into(buffer, anchor, delta, Address(3, cycle, 0), "w", 0, 0.1, "normal")
        assert not np.array_equal(buffer, plain)
        render_many([Render("w", buffer, anchor, delta)], None, 0.0, "normal")
        assert np.array_equal(buffer, plain)


def test_many_tensors_at_once_equal_one_by_one() -> None:
    """Empty ones too; results in the order given."""
    sizes, taken = (5, 0, 300_000, 1, 70_000), a_step("huber")
    anchors, deltas, weights = zip(*(arrays(n, n) for n in sizes), strict=True)
    single, outs = [d.copy() for d in deltas], [np.empty_like(a) for a in anchors]
    render_many(
        [
            Render(f"t{n}", o, a, d)
            for n, (o, a, d) in enumerate(zip(outs, anchors, deltas, strict=True))
        ],
        HERE, 0.01, "normal", threads=2,
    )  # fmt: skip
    for n, out in enumerate(outs):
        alone = np.empty_like(out)
        render_into(alone, anchors[n], deltas[n], HERE, f"t{n}", 0, 0.01, "normal")
        assert alone.tobytes() == out.tobytes()
    many = update_many(
        [Update(f"t{n}", d, weights[n]) for n, d in enumerate(deltas)], taken, threads=2
    )
    for n, delta in enumerate(single):
        assert update_inplace(delta, f"t{n}", 0, taken, weights[n]) == many[n]
        assert delta.tobytes() == deltas[n].tobytes()
    assert many[1] == (0.0, 0.0)
    assert update_many([], taken) == []
    render_many([], HERE, 0.01, "normal")


def test_mirrored_members_straddle_theta_exactly() -> None:
    """fl(+sigma eps) = -fl(-sigma eps): at delta 0 the two renders of a pair are opposite."""
    zero, plus, minus = np.zeros(5000, F32), np.empty(5000, F32), np.empty(5000, F32)
    render_into(plus, zero, zero, HERE, "w", 0, 0.01, "normal")
    render_into(minus, zero, zero, HERE, "w", 0, -0.01, "normal")
    assert np.array_equal(plus, -minus)


def test_arrays_the_kernels_would_misread_are_refused() -> None:
    anchor, delta, weights = arrays(100)
    with pytest.raises(ValueError, match="w: delta is float64, float32 wanted"):
        update_inplace(delta.astype(np.float64), "w", 0, a_step("l2"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"w: array of shape \(50,\) beside delta of 100"):
        render_into(anchor[:50], anchor, delta, HERE, "w", 0, 0.1, "normal")
    with pytest.raises(ValueError, match="flat, contiguous"):
        update_inplace(delta[::2], "w", 0, a_step("l2"))
    with pytest.raises(ValueError, match="both float32 or both uint16 wanted"):
        render_into(anchor.astype(np.uint16), anchor, delta, HERE, "w", 0, 0.1, "normal")
    with pytest.raises(ValueError, match="importance weights: 50 for 100 parameters"):
        update_inplace(delta, "w", 0, a_step("l2"), weights[:50])


def test_nothing_is_written_when_one_tensor_of_many_is_refused() -> None:
    _, delta, weights = arrays(100)
    before = delta.tobytes()
    with pytest.raises(ValueError, match="importance weights span"):
        update_many([Update("a", delta), Update("b", delta.copy(), -weights)], a_step("l2"))
    assert delta.tobytes() == before


def test_leaves_are_their_definition_and_see_every_change() -> None:
    """Sums modulo 2^32 of mixed words, in a NumPy that is written out, on any number of threads."""
    values = np.random.default_rng(3).standard_normal(3 * LEAF + 17).astype(np.float32)

    def mixed(word: np.ndarray) -> np.ndarray:
        word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
        word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
        return word ^ (word >> 16)

    wanted = []
    for first in range(0, values.size, LEAF):
        words = values[first : first + LEAF].view(np.uint32)
        odd = 2 * np.arange(words.size, dtype=np.uint32) + 1
        sums = (
            mixed(words + odd * np.uint32(0x9E3779B9)),
            mixed(words ^ odd * np.uint32(0xBB67AE85)),
        )
        wanted.append([int(each.astype(np.uint64).sum()) % 2**32 for each in sums])
    for threads in (1, 2, 3):
        assert tree_leaves(values, threads).tolist() == wanted
    assert tree_leaves(values[:0]).shape == (0, 2)
    swapped, flipped = values.copy(), values.copy()
    swapped[[5, 70_000]] = swapped[[70_000, 5]]
    flipped[LEAF] = -flipped[LEAF]
    assert (tree_leaves(swapped) != wanted).all(axis=1).tolist() == [True, True, False, False]
    assert (tree_leaves(flipped) != wanted).all(axis=1).tolist() == [False, True, False, False]
