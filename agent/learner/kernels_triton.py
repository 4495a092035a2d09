"""Noise, render and update as Triton kernels on torch tensors: the bits of kernels_cpu.

The same operations in the same order, each rounded to float32 by itself: kernels are launched with
floating-point fusion off, and bfloat16 is rounded by integer arithmetic.

TRITON_INTERPRET=1, set before this module is imported, runs them on the CPU.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from agent.learner import compiled_triton as compiled
from agent.learner.es import Step
from agent.learner.noise import GROUP, LANES, Address, NoiseKind, Runs, normal_table, streams
from agent.learner.penalty import check, check_weights

_BLOCKS: Final[dict[NoiseKind, int]] = {"normal": 4 * LANES, "rademacher": LANES}  # a program's
_TILE: Final = 1024
LEAF: Final = 1 << 16  # as in compiled
_STORED: Final = {torch.float32, torch.bfloat16, torch.float16}


def noise_into(
    out: torch.Tensor, address: Address, tensor_name: str, start: int, kind: NoiseKind
) -> None:
    """Fill float32 out (n,) with elements [start, start + n) of the noise at an address."""
    _check(tensor_name, out, {torch.float32}, out)
    words = words_of([address], [tensor_name], out.device)[0]
    _launch(compiled.noise, kind, Runs(start), out, words, _table(out.device))


def render_into(
    out: torch.Tensor,
    anchor: torch.Tensor,
    delta: torch.Tensor,
    address: Address | None,
    tensor_name: str,
    runs: Runs,
    scale: float,
    kind: NoiseKind,
    words: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
) -> None:
    """Write out = anchor + (delta + scale * eps); out and anchor float32, bfloat16 or float16.

    ``words`` (1, 4), the tensor's of `words_of`, and ``factor`` (1,), the scale, where they are on
    the device already: a copy for each tensor would wait for the kernel before it.
    """
    _check(tensor_name, delta, {anchor.dtype} & _STORED, out, anchor)
    noisy = address is not None and scale != 0
    if words is None:
        words = words_of([address] if address else [], [tensor_name], delta.device)[0]
    if factor is None:
        factor = torch.tensor([scale], dtype=torch.float32, device=delta.device)
    bf16 = anchor.dtype == torch.bfloat16
    stored = [t.view(torch.int16) if bf16 else t for t in (out, anchor)]
    _launch(
        compiled.render, kind, runs, *stored, delta, factor, words, _table(delta.device),
        NOISY=noisy, BF16=bf16,
    )  # fmt: skip


def update_inplace(
    delta: torch.Tensor,
    tensor_name: str,
    runs: Runs,
    step: Step,
    weights: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
    numbers: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply a step to one slice of float32 delta (n,); a no-op step changes nothing.

    Returns (2,) float64 on the device: sum delta^2 afterwards, sum (delta after - before)^2.
    ``words`` (P, 4) as in `render_into`, ``numbers`` those of `numbers_of` the step.
    """
    _check(tensor_name, delta, {torch.float32}, delta, *([] if weights is None else [weights]))
    largest = 1.0 if weights is None else check_weights(_ends(weights), 2)
    check(step.penalty, step.alpha, largest)
    if step.no_op is not None or not delta.numel():
        square = torch.linalg.vector_norm(delta, dtype=torch.float64) ** 2
        return torch.stack([square, torch.zeros_like(square)])
    if numbers is None:
        numbers = numbers_of(step, delta.device)
    pairs = len(step.pairs)
    if words is None:
        words = words_of(step.addresses(), [tensor_name], delta.device)[0]
    programs = _programs(step.noise, runs, delta.numel())[0]
    squares = torch.empty((programs, 2), dtype=torch.float64, device=delta.device)
    _launch(
        compiled.update, step.noise, runs, delta, numbers[:pairs], words, _table(delta.device),
        numbers[pairs:], delta if weights is None else weights, squares,
        pairs=pairs, PENALTY=step.penalty.kind, WEIGHTED=weights is not None,
    )  # fmt: skip
    return squares.sum(0)


def numbers_of(step: Step, device: torch.device) -> torch.Tensor:
    """The coefficients of a step and the strengths of its penalty, on the device."""
    s, share = np.float32(step.alpha * step.penalty.lam), np.float32(step.penalty.l1_share)
    strengths = [s, share, np.float32(1) - share, step.penalty.threshold]
    floats = np.array([*step.coefficients, *strengths], np.float32)
    return torch.from_numpy(floats).to(device)


def tree_leaves(
    values: torch.Tensor, runs: Runs | None = None, whole: int | None = None
) -> torch.Tensor:
    """(leaves, 2) int32 on the device: the bits of kernels_cpu.tree_leaves of float32 (n,)."""
    _check("values", values, {torch.float32}, values)
    count = values.numel()
    leaves = -(-(count if whole is None else whole) // LEAF)
    out = torch.zeros((leaves, 2), dtype=torch.int32, device=values.device)
    if count:
        start, width, stride = _filled(runs or Runs(), count)
        last = start + (count // width - 1) * stride + width - 1
        words, programs = values.view(torch.int32), last // LEAF - start // LEAF + 1
        compiled.leaves[(programs,)](
            out, words, start, width, stride, count, LEAF=LEAF, TILE=_TILE, RUNS=width < count
        )
    return out


def _launch(kernel: Any, kind: NoiseKind, runs: Runs, *arguments: Any, **named: Any) -> None:
    """Run a kernel over the blocks that cover the runs of its first argument (n,)."""
    count = arguments[0].numel()
    programs, per_run = _programs(kind, runs, count)
    if count == 0:
        return
    start, width, stride = _filled(runs, count)
    kernel[(programs,)](
        *arguments, start=start, width=width, stride=stride, per_run=per_run,
        NORMAL=kind == "normal", BLOCKS=_BLOCKS[kind], COLUMNS=GROUP[kind] // LANES,
        enable_fp_fusion=False, **named,
    )  # fmt: skip


def _filled(runs: Runs, count: int) -> Runs:
    """The runs of a slice of ``count`` elements with their width."""
    if runs.start < 0:
        raise ValueError(f"slice start {runs.start} must be 0 or more")
    width = runs.width or count
    if width and count % width:
        raise ValueError(f"{count} elements are not whole runs of {width}")
    return Runs(runs.start, width, runs.stride)


def _programs(kind: NoiseKind, runs: Runs, count: int) -> tuple[int, int]:
    """How many programs cover a slice, and how many of them each of its runs."""
    start, width, stride = _filled(runs, count)
    if not count:
        return 0, 0
    group, many = GROUP[kind], count // width
    groups = -(-(start + width) // group) - start // group
    if many > 1 and (start % group or stride % group):  # runs begin anywhere in a group
        groups = -(-(width - 1) // group) + 1
    per_run = -(-groups * LANES // _BLOCKS[kind])
    return many * per_run, per_run


def _ends(weights: torch.Tensor) -> NDArray[np.float32]:
    """(2,) the smallest and the largest weight: two numbers cross to the host, not all."""
    ends: NDArray[np.float32] = torch.stack(torch.aminmax(weights)).cpu().numpy()
    return ends


@cache
def _table(device: torch.device) -> torch.Tensor:
    """The normal table on a device: 256 KiB, once."""
    return torch.from_numpy(normal_table().copy()).to(device)


def words_of(
    addresses: Sequence[Address], tensor_names: Sequence[str], device: torch.device
) -> torch.Tensor:
    """(T, P, 4) stream words as int32 bits, of all tensors in one copy to the device."""
    return torch.from_numpy(streams(addresses, tensor_names).view(np.int32)).to(device)


def _check(
    name: str, delta: torch.Tensor, allowed: set[torch.dtype], *stored: torch.Tensor
) -> None:
    """Refuse what the kernels would misread: they see pointers only."""
    if delta.dtype != torch.float32:
        raise ValueError(f"{name}: delta is {delta.dtype}, torch.float32 wanted")
    for tensor in (delta, *stored):
        flat = tensor.ndim == 1 and tensor.is_contiguous() and tensor.numel() == delta.numel()
        if not flat or tensor.device != delta.device:
            raise ValueError(
                f"{name}: tensor of shape {tuple(tensor.shape)} on {tensor.device} beside delta of "
                f"{delta.numel()} on {delta.device}; flat, contiguous and of one size wanted"
            )
    found = {tensor.dtype for tensor in stored}
    if not found <= allowed:
        raise ValueError(f"{name}: {found} beside float32 delta; {allowed or _STORED} wanted")
