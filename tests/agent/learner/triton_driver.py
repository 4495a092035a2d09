"""Run beside test_kernels_triton in a process of its own: every case, Triton against the CPU.

Prints one JSON object {case: number of differing elements}. With a GPU the kernels run on it,
otherwise in Triton's interpreter (TRITON_INTERPRET=1, set by the caller before this starts).
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from agent.learner import kernels_cpu, kernels_triton
from agent.learner.es import members, step
from agent.learner.noise import Address, NoiseKind, Runs
from agent.learner.penalty import PENALTIES, Penalty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = sys.argv[1:] == ["full"]
SLICES = ((3637, 900), (32 * 2**32 - 300, 700), (0, 0))
if FULL:
    SLICES = (*SLICES, (0, 5000), (8191, 1))
KINDS: tuple[NoiseKind, ...] = ("normal", "rademacher")
WINDOWS = ((512, 1024, 1024), (1_000, 1_777, 3_333))  # columns from, to, of so many
HERE = Address(2**63 - 1, 17, 4)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def differing(found: torch.Tensor, wanted: np.ndarray | torch.Tensor) -> int:
    other = wanted if isinstance(wanted, torch.Tensor) else torch.from_numpy(wanted)
    return int((bits(found) != bits(other)).sum())


def device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).to(DEVICE)


def numbers(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count)
    anchor = rng.standard_normal(count).astype(np.float32)
    delta = (0.01 * rng.standard_normal(count) * (rng.random(count) < 0.8)).astype(np.float32)
    return anchor, delta, rng.random(count).astype(np.float32)


def noise_cases() -> Iterator[tuple[str, int]]:
    for kind in KINDS:
        for start, count in SLICES:
            wanted, found = np.empty(count, np.float32), torch.empty(count, device=DEVICE)
            kernels_cpu.noise_into(wanted, HERE, "w", start, kind)
            kernels_triton.noise_into(found, HERE, "w", start, kind)
            yield f"noise {kind} {start} {count}", differing(found, wanted)


def render_cases() -> Iterator[tuple[str, int]]:
    for kind in KINDS:
        for (start, count), scale in zip(SLICES, (0.01, -0.01, 0.01, 0.01, 0.0), strict=False):
            anchor, delta, _ = numbers(count)
            anchor[: count // 50] = -0.0
            wanted = np.empty_like(anchor)
            kernels_cpu.render_into(wanted, anchor, delta, HERE, "w", start, scale, kind)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                base = device(anchor).to(dtype)
                exact = np.empty_like(anchor)
                lifted = base.float().cpu().numpy()
                kernels_cpu.render_into(exact, lifted, delta, HERE, "w", start, scale, kind)
                found = torch.empty_like(base)
                kernels_triton.render_into(
                    found, base, device(delta), HERE, "w", Runs(start), scale, kind
                )
                cast = torch.from_numpy(exact).to(dtype)
                yield f"render {kind} {start} {count} {dtype}", differing(found, cast)
            found = torch.empty(count, device=DEVICE)
            kernels_triton.render_into(
                found, device(anchor), device(delta), None, "w", Runs(start), scale, kind
            )
            kernels_cpu.render_many(
                [kernels_cpu.Render("w", wanted, anchor, delta, Runs(start))], None, scale, kind
            )
            yield f"plain {kind} {start} {count}", differing(found, wanted)


def tie_cases() -> Iterator[tuple[str, int]]:
    """Sums halfway between two bfloat16 numbers go to the even one."""
    anchor = torch.arange(1, 2, 2**-7).bfloat16()  # one unit in the last place apart
    delta = np.full(anchor.numel(), 2**-8, np.float32)
    wanted = (anchor.float() + torch.from_numpy(delta)).bfloat16()
    found = torch.empty_like(anchor, device=DEVICE)
    kernels_triton.render_into(
        found, anchor.to(DEVICE), device(delta), None, "w", Runs(), 0.0, "normal"
    )
    yield "ties", differing(found, wanted)


def update_cases() -> Iterator[tuple[str, int]]:
    for kind in KINDS:
        for penalty_kind in PENALTIES if FULL or kind == "normal" else ("l1",):
            for weighted, (start, count) in zip((False, True), SLICES, strict=False):
                _, delta, weights = numbers(count)
                lam = 0.5 if penalty_kind == "l1" else 30.0
                now = step(
                    np.random.default_rng(1).random(3), members(3, False), run_seed=3,
                    generation=1, sigma=0.01, alpha=0.01, noise=kind,
                    penalty=Penalty(penalty_kind, lam, 0.004, 0.3),
                )  # fmt: skip
                found = device(delta)
                sums = kernels_triton.update_inplace(
                    found, "w", Runs(start), now, device(weights) if weighted else None
                )
                wanted = kernels_cpu.update_inplace(
                    delta, "w", start, now, weights if weighted else None
                )
                yield f"update {kind} {penalty_kind} {weighted}", differing(found, delta)
                near = np.allclose(sums.cpu().numpy(), wanted, rtol=1e-12, atol=0)
                yield f"squares {kind} {weighted} of {penalty_kind}", int(not near)


def leaf_cases() -> Iterator[tuple[str, int]]:
    """The bits of tree hashes, of whole and broken leaves."""
    for count in (0, 1, 65_536, 65_537):
        values = numbers(count)[1]
        found = kernels_triton.tree_leaves(device(values)).cpu().numpy().view(np.uint32)
        yield f"leaves {count}", int((found != kernels_cpu.tree_leaves(values)).sum())


def window_cases() -> Iterator[tuple[str, int]]:
    """Windows of columns, which may begin anywhere in a group and in a leaf."""
    for a, b, wide in WINDOWS:
        name, runs = f"{a}:{b} of {wide}", Runs(a, b - a, wide)

        def cut(values: np.ndarray, a: int = a, b: int = b, wide: int = wide) -> np.ndarray:
            return values.reshape(-1, wide)[:, a:b].copy().reshape(-1)

        count = -(-66_000 // wide) * wide
        held = cut(numbers(count)[1])
        leaves = kernels_triton.tree_leaves(device(held), runs, count).cpu().numpy()
        wanted = kernels_cpu.tree_leaves(held, None, runs, count)
        yield f"leaves {name}", int((leaves.view(np.uint32) != wanted).sum())
        anchor, delta, weights = numbers(4 * wide)
        now = step(
            np.random.default_rng(1).random(2), members(2, False), run_seed=3, generation=1,
            sigma=0.01, alpha=0.01, penalty=Penalty("l1", 0.5),
        )  # fmt: skip
        for kind in KINDS if FULL else KINDS[:1]:
            whole = np.empty_like(anchor)
            kernels_cpu.render_into(whole, anchor, delta, HERE, "w", 0, 0.01, kind)
            found, there = device(cut(whole)), device(cut(delta))
            found.zero_()
            kernels_triton.render_into(
                found, device(cut(anchor)), there, HERE, "w", runs, 0.01, kind
            )
            yield f"render {kind} {name}", differing(found, cut(whole))
            moved, drawn = delta.copy(), replace(now, noise=kind)
            kernels_cpu.update_inplace(moved, "w", 0, drawn, weights)
            kernels_triton.update_inplace(there, "w", runs, drawn, device(cut(weights)))
            yield f"update {kind} {name}", differing(there, cut(moved))


def refusal_cases() -> Iterator[tuple[str, int]]:
    """A wrong argument is a one-line ValueError, counted as 0; anything else as 1."""
    good = torch.zeros(10, device=DEVICE)
    for name, bad in (("dtype", good.double()), ("size", good[:5]), ("strides", good[::2])):
        try:
            kernels_triton.render_into(bad, good, good, HERE, "w", Runs(), 0.1, "normal")
        except ValueError as refused:
            yield f"refuse {name}", int("\n" in str(refused))
        else:
            yield f"refuse {name}", 1
    no_op = step(
        np.ones(3), members(3, False), run_seed=3, generation=1, sigma=0.01, alpha=0.01,
        penalty=Penalty("l2", 1.0),
    )  # fmt: skip
    before = numbers(100)[1]
    delta = device(before)
    kernels_triton.update_inplace(delta, "w", Runs(), no_op)
    yield "no-op", differing(delta, before)


if __name__ == "__main__":
    groups = (
        noise_cases(),
        render_cases(),
        update_cases(),
        tie_cases(),
        leaf_cases(),
        window_cases(),
        refusal_cases(),
    )
    json.dump({name: count for group in groups for name, count in group}, sys.stdout)
