"""Noise, render and update on the CPU: compiled, parallel, the bits of noise.py and penalty.prox.

One pass each, every operation rounded to float32 in this order (no fused multiply-add):

    render   t = scale * eps;  s = delta + t;  out = anchor + s, and anchor itself where s is 0
    update   acc = 0;  acc = acc + c_p * eps_p for each pair in order;  d = delta + acc;
             delta = the penalty step of d

A tensor is cut into tasks at fixed element indices and every element is a pure function of its
own index, so neither the slice nor the number of threads can change a bit. Kernels release the
GIL; threads live for one call only, so there is no pool to break in a forked process.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from math import fsum
from typing import Final, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numba import config
from numpy.typing import NDArray

from agent.learner import compiled
from agent.learner.es import Step
from agent.learner.noise import GROUP, Address, NoiseKind, Runs, normal_table, streams
from agent.learner.penalty import PENALTIES, Penalty, check, check_weights

Floats: TypeAlias = NDArray[np.float32]
Stored: TypeAlias = NDArray[np.float32] | NDArray[np.uint16]  # uint16: the bits of bfloat16
Span: TypeAlias = tuple[int, int]
Task = TypeVar("Task")
Result = TypeVar("Result")

CORES: Final[int] = config.NUMBA_NUM_THREADS  # default number of threads: the cores of this process
_UPDATE_TASK: Final = 1 << 16  # elements; part of the definition of the norms' partial sums
_RENDER_TASK: Final = 1 << 19  # elements
_LEAVES_TASK: Final = 16 * compiled.LEAF  # elements
_WORTH_THREADS: Final = 1 << 19  # numbers to draw below which starting threads costs more
_BATCHES: Final = 16  # of tasks, per thread
_NO_TABLE: Final = np.empty(0, np.float32)
_NO_WEIGHTS: Final = np.empty(0, np.float32)
_RENDERERS: Final = {"<f4": compiled.render_runs, "<u2": compiled.render_bf16_runs}


class Squares(NamedTuple):
    """What an update did to one slice."""

    delta: float  # sum of delta^2 afterwards
    step: float  # sum of (delta after - delta before)^2


class Render(NamedTuple):
    """One slice to render; all arrays of one size."""

    name: str
    out: Stored
    anchor: Stored  # same type as out
    delta: Floats
    runs: Runs = Runs()  # its place in the whole tensor


class Update(NamedTuple):
    """One slice of delta to update in place."""

    name: str
    delta: Floats
    weights: Floats | None = None  # importance of each parameter
    runs: Runs = Runs()  # its place in the whole tensor


def noise_into(
    out: Floats,
    address: Address,
    tensor_name: str,
    start: int,
    kind: NoiseKind,
    threads: int | None = None,
) -> None:
    """Fill out (n,) with elements [start, start + n) of the noise at an address."""
    _check_arrays(tensor_name, out, out)
    words, table = streams([address], [tensor_name])[0, 0], _table(kind)

    def fill(span: Span) -> None:
        compiled.noise(out[slice(*span)], start + span[0], words, table)

    _spread(fill, _cuts(Runs(start), out.size, _RENDER_TASK), out.size, threads)


def render_into(
    out: Stored,
    anchor_f32: Stored,
    delta: Floats,
    address: Address,
    tensor_name: str,
    start: int,
    scale: float,
    kind: NoiseKind,
    threads: int | None = None,
) -> None:
    """Write out = anchor + (delta + scale * eps) for one slice; see `render_many`."""
    part = Render(tensor_name, out, anchor_f32, delta, Runs(start))
    render_many([part], address, scale, kind, threads)


def render_many(
    parts: Sequence[Render],
    address: Address | None,
    scale: float,
    kind: NoiseKind,
    threads: int | None = None,
) -> None:
    """Render many slices in one go; without an address, or at scale 0, plain anchor + delta.

    Arrays are flat and contiguous. out and anchor are both float32, or both the bits of bfloat16
    as uint16; then the float32 sum is rounded to nearest, ties to even.
    """
    table, factor = _table(kind), np.float32(scale)
    noisy = [address] if address is not None and factor != 0 else []
    words = streams(noisy, [part.name for part in parts]).reshape(len(parts), 4 * len(noisy))
    # All parts are cut into one list of tasks, so that many small tensors fill the threads as well
    # as one large tensor does.
    tasks = []
    for n, part in enumerate(parts):
        _check_arrays(part.name, part.delta, part.out, part.anchor)
        tasks += [(n, span) for span in _cuts(part.runs, part.delta.size, _RENDER_TASK)]

    def draw(task: tuple[int, Span]) -> None:
        n, span = task
        part, at = parts[n], slice(*span)
        out, anchor, delta = part.out[at], part.anchor[at], part.delta[at]
        kernel = _RENDERERS[out.dtype.str]
        kernel(out, anchor, delta, *_runs_of(part.runs, span), factor, words[n], table)

    _spread(draw, tasks, sum(part.delta.size for part in parts), threads)


def update_inplace(
    delta: Floats,
    tensor_name: str,
    start: int,
    step: Step,
    weights: Floats | None = None,
    threads: int | None = None,
) -> Squares:
    """Apply a step to one slice of delta; see `update_many`."""
    return update_many([Update(tensor_name, delta, weights, Runs(start))], step, threads)[0]


def update_many(parts: Sequence[Update], step: Step, threads: int | None = None) -> list[Squares]:
    """Apply a step to many slices of delta in one go: all pairs and the penalty in one pass.

    A no-op step changes nothing. Everything is checked before anything is written. The sums of
    squares are taken in float64 over fixed blocks, the same whatever the number of threads.
    """
    for part in parts:
        _check_arrays(part.name, part.delta)
        largest = 1.0 if part.weights is None else check_weights(part.weights, part.delta.size)
        check(step.penalty, step.alpha, largest)
    tasks = [
        (n, span)
        for n, part in enumerate(parts)
        for span in _cuts(part.runs, part.delta.size, _UPDATE_TASK)
    ]
    work = _measured(parts) if step.no_op is not None else _updated(parts, step)
    drawn = sum(part.delta.size for part in parts) * (1 + len(step.pairs))
    sums = _spread(work, tasks, drawn, threads)
    squares: list[list[Squares]] = [[] for _ in parts]
    for (n, _), partial in zip(tasks, sums, strict=True):
        squares[n].append(partial)
    return [Squares(fsum(s.delta for s in f), fsum(s.step for s in f)) for f in squares]


def tree_leaves(
    values: Floats, threads: int | None = None, runs: Runs | None = None, whole: int | None = None
) -> NDArray[np.uint32]:
    """(leaves, 2) sums over the bits of float32 (n,): what a tree hash is made of.

    Of a slice of a tensor of ``whole`` elements: what it adds to the sums of the tensor's leaves.
    """
    _check_arrays("values", values)
    words, runs = values.view(np.uint32), runs or Runs()
    out = np.zeros((-(-(values.size if whole is None else whole) // compiled.LEAF), 2), np.uint32)

    def add(span: Span) -> tuple[int, NDArray[np.uint32]]:
        start, width, stride = _runs_of(runs, span)
        last = start + ((span[1] - span[0]) // width - 1) * stride + width - 1
        part = np.zeros((last // compiled.LEAF - start // compiled.LEAF + 1, 2), np.uint32)
        compiled.leaves(part, words[slice(*span)], start, width, stride)
        return start // compiled.LEAF, part

    for first, part in _spread(add, _cuts(runs, values.size, _LEAVES_TASK), values.size, threads):
        out[first : first + len(part)] += part
    return out


def _updated(parts: Sequence[Update], step: Step) -> Callable[[tuple[int, Span]], Squares]:
    """The work of one task of a step."""
    words = streams(step.addresses(), [part.name for part in parts])
    coefficients = np.array(step.coefficients, dtype=np.float32)
    table, penalty = _table(step.noise), _penalty_arguments(step.penalty, step.alpha)

    def work(task: tuple[int, Span]) -> Squares:
        n, span = task
        at, part = slice(*span), parts[n]
        weights = _NO_WEIGHTS if part.weights is None else part.weights[at]
        place = _runs_of(part.runs, span)
        squares = compiled.update_runs(
            part.delta[at], *place, coefficients, words[n], table, *penalty, weights
        )
        return Squares(*squares)

    return work


def _measured(parts: Sequence[Update]) -> Callable[[tuple[int, Span]], Squares]:
    """The work of one task of a no-op: read, write nothing."""
    return lambda task: Squares(compiled.sum_squares(parts[task[0]].delta[slice(*task[1])]), 0.0)


def _penalty_arguments(
    penalty: Penalty, alpha: float
) -> tuple[int, np.float32, np.float32, np.float32]:
    """(place in PENALTIES, s, a, tau) as the compiled update takes them."""
    s, share = np.float32(alpha * penalty.lam), np.float32(penalty.l1_share)
    return PENALTIES.index(penalty.kind), s, share, np.float32(penalty.threshold)


def _table(kind: NoiseKind) -> Floats:
    """The normal table, or the empty one that asks the kernels for signs."""
    if kind not in GROUP:
        raise ValueError(f"noise {kind!r} must be one of {', '.join(GROUP)}")
    return normal_table() if kind == "normal" else _NO_TABLE


def _cuts(runs: Runs, count: int, task: int) -> list[Span]:
    """Cut [0, count): where start + index is a multiple of `task`, or between runs."""
    if runs.start < 0:
        raise ValueError(f"slice start {runs.start} must be 0 or more")
    first, each = task - runs.start % task, task
    if 0 < runs.width < count:
        if count % runs.width:
            raise ValueError(f"{count} elements are not whole runs of {runs.width}")
        first = each = runs.width * max(1, task // runs.width)
    edges = [0, *range(first, count, each), count]
    return [(a, b) for a, b in pairwise(edges) if a < b]


def _runs_of(runs: Runs, span: Span) -> Runs:
    """The runs of a cut of a slice."""
    size = span[1] - span[0]
    if not runs.width:
        return Runs(runs.start + span[0], size)
    run, within = divmod(span[0], runs.width)
    return Runs(runs.start + run * runs.stride + within, min(runs.width, size), runs.stride)


def _spread(
    work: Callable[[Task], Result], tasks: Sequence[Task], drawn: int, threads: int | None
) -> list[Result]:
    """Do every task, on several threads where that pays; results in the order of the tasks."""
    many = min(len(tasks), threads or CORES)
    if many < 2 or drawn < _WORTH_THREADS:
        return [work(task) for task in tasks]
    # Several batches a thread: fewer would leave threads idle at the end, one per task would spend
    # its time in the pool.
    batches = min(len(tasks), _BATCHES * many)
    with ThreadPoolExecutor(many) as pool:
        done = pool.map(lambda n: [work(task) for task in tasks[n::batches]], range(batches))
        results = dict(enumerate(done))
    return [results[n % batches][n // batches] for n in range(len(tasks))]


def _check_arrays(name: str, delta: Floats, *stored: Stored) -> None:
    """Refuse what the compiled loops would misread; they do not check bounds."""
    if delta.dtype != np.float32:
        raise ValueError(f"{name}: delta is {delta.dtype}, float32 wanted")
    for array in (delta, *stored):
        if array.ndim != 1 or not array.flags.c_contiguous or array.size != delta.size:
            raise ValueError(
                f"{name}: array of shape {array.shape} beside delta of {delta.size}; "
                "flat, contiguous arrays of one size wanted"
            )
    kinds = {array.dtype.str for array in stored}
    if len(kinds) > 1 or not kinds <= set(_RENDERERS):
        raise ValueError(f"{name}: out and anchor are {kinds}; both float32 or both uint16 wanted")
