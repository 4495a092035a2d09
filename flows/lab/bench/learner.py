"""`anchorage bench learner`: the exact learner against the published recipe.

Speed     per phase, (parameter, member) pairs per second, medians over interleaved repeats:
          render and restore of each member, then one update with l2 decay. The headline `ratio` is
          HEADLINE, the two phases that draw noise here (the recipe draws it in all three)
Exactness weights that differ after 400 cycles of perturb and restore
Norms     ||delta|| after 500 generations of pure noise under each penalty, against its prediction
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import pi, sqrt
from statistics import median
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from agent.errors import UserError
from agent.learner.es import members, step
from agent.learner.kernels_cpu import CORES, Render, Update, noise_into, render_many, update_many
from agent.learner.noise import Address
from agent.learner.penalty import Penalty, expected_norm, prox
from flows.lab import recipe
from flows.show.terminal import Advance, Reporter, Silent

Phases: TypeAlias = dict[str, float]  # seconds per (parameter, member)

SIZES: Final = {"1M": 1_000_000, "50M": 50_000_000, "500M": 500_000_000}
REPEATS: Final = {"1M": 15, "50M": 5, "500M": 3}
TENSORS: Final = 48  # of equal size
MEMBERS: Final = 4
SEED: Final = 20260530
PENALTIES: Final = (
    Penalty("none"),
    Penalty("l2", 10.0),  # the paper's
    Penalty("l1", 0.01),  # the paper's
    Penalty("huber", 10.0, threshold=5e-4),
    Penalty("elastic_net", 5.0, l1_share=0.001),
)
HEADLINE: Final = "noise_and_update"  # render and update, without the recipe's costly restore
SILENT: Final = Silent()
ARITHMETICS: Final = {"in_place_float16": torch.float16, "in_place_bfloat16": torch.bfloat16}
# read and written per parameter and member: ours fused, the recipe's operation by operation
BYTES: Final = {
    "ours": {"render": 12.0, "restore": 12.0, "update": 8.0 / MEMBERS},
    "baseline": {"render": 16.0, "restore": 16.0, "update": 16.0 + 24.0 / MEMBERS},
}


def bench_learner(
    sizes: Sequence[str] = tuple(SIZES),
    *,
    threads: int | None = None,
    repeats: int | None = None,
    parameters: int = 100_000,
    generations: int = 500,
    progress: Reporter = SILENT,
) -> dict[str, Any]:
    """Run everything and return the document of `--json`; about 3 minutes on two cores.

    `parameters` is how many weights the exactness and norm parts use; each size is repeated
    REPEATS times by default. 500M needs 6 GB of memory.
    """
    unknown = sorted(set(sizes) - set(SIZES))
    if unknown or not sizes:
        raise UserError(f"sizes {', '.join(unknown) or 'none'}: some of {', '.join(SIZES)} wanted")
    many, before = threads or CORES, torch.get_num_threads()
    rounds = {size: repeats or REPEATS[size] for size in sizes}
    advance = progress.track("bench learner", sum(rounds.values()) + 2)
    torch.set_num_threads(many)
    try:
        list(_race(100_000, many))  # compiles
        speed = {}
        for n, size in enumerate(sizes):
            done = sum(list(rounds.values())[:n])
            speed[size] = _speed(size, rounds[size], many, partial(_more, advance, done))
        differing = differing_weights(parameters)
        advance(sum(rounds.values()) + 1)
        measured = norms(parameters, generations)
        advance(sum(rounds.values()) + 2)
    finally:
        torch.set_num_threads(before)
    return {
        "ratio": {size: speed[size]["ratio"][HEADLINE] for size in sizes},
        "ratio_of": HEADLINE,
        "speed": speed,
        "differing_weights": differing,
        "norms": measured,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": many},
    }


def tables(document: Mapping[str, Any]) -> list[Table]:
    """The document for people: speed, exactness, norms."""
    return [_speed_table(document), _exactness_table(document), _norms_table(document)]


def differing_weights(parameters: int, cycles: int = 400) -> dict[str, int]:
    """Weights of `parameters` that differ after the cycles: ours, and in place in three types."""
    setting: dict[str, Any] = {"parameters": parameters, "cycles": cycles, "seed": SEED}
    differing = {"ours": recipe.differing_after_renders(sigma=0.001, **setting)}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = f"baseline_{str(dtype).removeprefix('torch.')}"
        differing[name] = recipe.differing_after_cycles(dtype, sigma=0.001, **setting)
    return differing | {"of": parameters, "cycles": cycles}


def norms(parameters: int, generations: int) -> list[dict[str, Any]]:
    """Rows {penalty, arithmetic, measured, closed_form, ...}, with the paper's alpha and N."""
    walk: dict[str, Any] = {"alpha": 0.0005, "population": 30, "parameters": parameters}
    walks = recipe.pure_noise_norms(
        PENALTIES, tuple(ARITHMETICS.values()), generations=generations, seed=SEED, **walk
    )
    rows = []
    for penalty, (exact, in_place) in zip(PENALTIES, walks, strict=True):
        closed = expected_norm(penalty, generations=generations, **walk)
        predicted = closed or norm_by_density(penalty, generations=generations, **walk)
        for arithmetic, norm in zip(("exact", *ARITHMETICS), (exact, *in_place), strict=True):
            rows.append(
                {
                    "penalty": penalty.kind,
                    "arithmetic": arithmetic,
                    "measured": norm,
                    "closed_form": predicted,
                    "prediction": "closed form" if closed else "density recursion",
                    "lambda": penalty.lam,
                }
            )
    return rows


def _more(advance: Advance, before: int, done: int) -> None:
    """Progress within a part that begins after `before` steps."""
    advance(before + done)


def _speed(size: str, repeats: int, threads: int, advance: Advance) -> dict[str, Any]:
    """Rates, ratios and bytes of each phase at one size, medians over repeats."""
    races = []
    for race in _race(SIZES[size], threads, repeats):
        races.append(race)
        advance(len(races))
    ratio = {
        phase: median(theirs[phase] / ours[phase] for ours, theirs in races)
        for phase in races[0][0]
    }
    rates = {
        who: {phase: 1 / median(race[n][phase] for race in races) for phase in races[0][0]}
        for n, who in enumerate(("ours", "baseline"))
    }
    return {
        "parameters": SIZES[size],
        "members": MEMBERS,
        "repeats": repeats,
        "ratio": ratio,
        "parameters_x_members_per_s": rates,
        "bytes_per_parameter_and_member": {who: _with_sums(moved) for who, moved in BYTES.items()},
    }


def _race(parameters: int, threads: int, repeats: int = 1) -> Iterator[tuple[Phases, Phases]]:
    """Seconds per (parameter, member) of ours and the baseline, in turn, on the same arrays.

    12 bytes a parameter: float32 anchor, delta and weights, TENSORS tensors of equal size.
    """
    size, names = parameters // TENSORS, [f"layers.{n}.weight" for n in range(TENSORS)]
    anchors = [np.empty(size, np.float32) for _ in names]
    for name, anchor in zip(names, anchors, strict=True):
        noise_into(anchor, Address(SEED, 0, 0), name, 0, "normal", threads)
        anchor *= np.float32(0.02)
    deltas = [np.zeros(size, np.float32) for _ in names]
    weights = [anchor.copy() for anchor in anchors]
    parts = [Render(*each) for each in zip(names, weights, anchors, deltas, strict=True)]
    for repeat in range(repeats):
        ours = _ours(parts, repeat, threads)
        for anchor, weight in zip(anchors, weights, strict=True):
            weight[:] = anchor
        theirs = _theirs([*map(torch.from_numpy, weights)], [*map(torch.from_numpy, anchors)])
        yield _per_pair(ours, size * TENSORS), _per_pair(theirs, size * TENSORS)


def _ours(parts: Sequence[Render], generation: int, threads: int) -> Phases:
    """Seconds of one render, one restore and one update of MEMBERS pairs with l2."""
    now = step(
        np.random.default_rng(generation).random(MEMBERS), members(MEMBERS, mirrored=False),
        run_seed=SEED, generation=generation, sigma=0.001, alpha=0.0005, penalty=Penalty("l2", 5.0),
    )  # fmt: skip
    address = Address(SEED, generation, 0)
    updates = [Update(part.name, part.delta) for part in parts]
    return {
        "render": _timed(lambda: render_many(parts, address, 0.001, "normal", threads)),
        "restore": _timed(lambda: render_many(parts, None, 0.0, "normal", threads)),
        "update": _timed(lambda: update_many(updates, now, threads)),
    }


def _theirs(weights: recipe.Weights, anchors: recipe.Weights) -> Phases:
    """Seconds of the same three by the recipe."""

    def update() -> None:
        recipe.update(weights, range(MEMBERS), [1e-4] * MEMBERS)
        recipe.decay_l2(weights, anchors, 0.0025)

    return {
        "render": _timed(lambda: recipe.perturb(weights, SEED, 0.001)),
        "restore": _timed(lambda: recipe.restore(weights, SEED, 0.001)),
        "update": _timed(update),
    }


def _per_pair(seconds: Phases, parameters: int) -> Phases:
    """Seconds per (parameter, member), from seconds of one pass over all parameters."""
    phases = {phase: spent / parameters for phase, spent in seconds.items()}
    return _with_sums(phases | {"update": phases["update"] / MEMBERS})


def _with_sums(phases: Phases) -> Phases:
    """The phases and the two sums that people compare."""
    noise_and_update = phases["render"] + phases["update"]
    generation = noise_and_update + phases["restore"]
    return phases | {"noise_and_update": noise_and_update, "generation": generation}


def _timed(work: Callable[[], object]) -> float:
    """Seconds of wall time."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _speed_table(document: Mapping[str, Any]) -> Table:
    headline = ", ".join(f"{size} {ratio:.1f}x" for size, ratio in document["ratio"].items())
    title = f"noise + update (render and update): {headline}"
    drawn = Table(
        title=f"{title}; speed, 1e6 parameters x members per second", title_justify="left"
    )
    for column in ("parameters", "phase", "ours", "recipe", "ratio", "bytes ours", "bytes recipe"):
        drawn.add_column(column, justify="left" if column == "phase" else "right")
    for size, speed in document["speed"].items():
        rates, moved = speed["parameters_x_members_per_s"], speed["bytes_per_parameter_and_member"]
        for phase, ratio in speed["ratio"].items():
            numbers = [f"{rates[who][phase] / 1e6:,.0f}" for who in ("ours", "baseline")]
            touched = [f"{moved[who][phase]:.0f}" for who in ("ours", "baseline")]
            drawn.add_row(size, phase, *numbers, f"{ratio:.1f}", *touched)
    return drawn


def _exactness_table(document: Mapping[str, Any]) -> Table:
    differing = dict(document["differing_weights"])
    of, cycles = differing.pop("of"), differing.pop("cycles")
    drawn = Table(
        title=f"weights of {of:,} that differ after {cycles} cycles", title_justify="left"
    )
    drawn.add_column("arithmetic")
    drawn.add_column("differing", justify="right")
    for who, count in differing.items():
        drawn.add_row(who, f"{count:,}")
    return drawn


def _norms_table(document: Mapping[str, Any]) -> Table:
    drawn = Table(title="||delta|| after generations of pure noise", title_justify="left")
    for column in ("penalty", "lambda", "arithmetic", "measured", "predicted", "off by", "from"):
        numeric = column in ("lambda", "measured", "predicted", "off by")
        drawn.add_column(column, justify="right" if numeric else "left")
    for row in document["norms"]:
        off = row["measured"] / row["closed_form"] - 1
        numbers = (f"{row['measured']:.4f}", f"{row['closed_form']:.4f}", f"{off:+.1%}")
        lam, arithmetic = f"{row['lambda']:g}", row["arithmetic"]
        drawn.add_row(row["penalty"], lam, arithmetic, *numbers, row["prediction"])
    return drawn


def norm_by_density(
    penalty: Penalty, *, alpha: float, population: int, parameters: int, generations: int
) -> float:
    """sqrt(E ||delta_T||^2) from delta_0 = 0 after T generations of pure noise, numerically.

    Under rewards of pure noise each coordinate follows x <- P(x + g xi), xi ~ N(0, 1), with
    g = alpha / sqrt(N) and P the penalty step. The value before P, u = P(u') + g xi, has the
    density, with phi_g that of g xi,

        f_{t+1}(u) = integral f_t(v) phi_g(u - P(v)) dv,     f_1 = phi_g

    solved on an even grid (spacing g / 4, out to 7 standard deviations of the free walk) by the
    trapezoidal rule. Then E ||delta_T||^2 = d integral f_T(v) P(v)^2 dv. With penalty none and l2
    the result equals penalty.expected_norm to 1e-4.
    """
    if generations < 1:
        return 0.0
    g = alpha / sqrt(population)
    # Wide enough that what leaves the grid is below the accuracy that is promised.
    half = int(np.ceil(4 * 7 * sqrt(generations)))
    grid = np.arange(-half, half + 1, dtype=np.float64) * (g / 4)
    moved = prox(grid, penalty, alpha)
    kernel = _gaussian(grid[:, None] - moved[None, :], g) * (g / 4)
    density = _gaussian(grid, g)
    for _ in range(generations - 1):
        density = kernel @ density
    return sqrt(parameters * float(np.sum(density * moved**2)) * (g / 4))


def _gaussian(x: NDArray[Any], deviation: float) -> NDArray[np.float64]:
    """The density of N(0, deviation^2) at x."""
    density: NDArray[np.float64] = np.exp(-((x / deviation) ** 2) / 2) / (deviation * sqrt(2 * pi))
    return density
