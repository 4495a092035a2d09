"""`anchorage bench gate`: the gate's error rates, by seeded simulation of paired counts.

One task with n rows, true loss L (the anchor's accuracy less the candidate's, a share) and share
k of discordant rows gives   (b, c, rest) ~ Multinomial(n; (k + L)/2, (k - L)/2, 1 - k),
k >= |L|. The decision is the gate's own steps 2-4 over arrays of such counts; the confirmation is
a second, independent draw judged at the level of the first use of a sealed pool.

A graded task has the mean loss L; k of its rows differ, each by 1/4, 2/4, 3/4 or 1 with equal
chances (mean 0.625), so that the share (k + L/0.625)/2 is lost and (k - L/0.625)/2 won.

Drift: rounds whose candidates each lose the same small step on every prior task and whose target
always gains, the worst a training loop can do. Judged against the anchor the loss adds up until
the gate refuses; judged against the last champion every step looks harmless.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.table import Table
from scipy.stats import norm

from agent.sections import GateSettings
from evaluators.comparison import pooled_margin, task_margin
from evaluators.gate import spent_alpha
from evaluators.stats import log_e_counts, log_e_levels, mcnemar_exact, tango_p, tango_z
from flows.show.terminal import Reporter, Silent

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

ONE_STAGE, CONFIRMED, DRIFT_POINTS = 0.025, 0.002, 1.1  # what the gate promises
SETTINGS = GateSettings()
SEALED_ALPHA = spent_alpha(SETTINGS.alpha, 1)
LOSSES = np.linspace(0.0, 0.10, 21)
LOOKS = 10
GAINS = np.linspace(0.0, 0.10, 21)
PARTS = np.array([0.25, 0.5, 0.75, 1.0])  # sizes of a graded difference, equally likely
LEVELS = np.concatenate([-PARTS[::-1], [0.0], PARTS])


@dataclass(frozen=True, slots=True)
class GateBench:
    """What is simulated; the same values give the same figures."""

    draws: int = 20_000
    """Candidates for every rate."""
    seed: int = 0
    rows: tuple[int, ...] = (500, 1000, 2000)
    """Sizes of a task, one set of figures each."""
    priors: int = 6
    """Prior tasks."""
    discordant: float = 0.06
    """Share of rows on which even an unchanged candidate differs."""
    rounds: int = 300
    """Length of the drift."""
    chains: int = 200
    """Independent histories of the drift, averaged."""
    step: float = 0.0003
    """Loss of each round's candidate on every prior task, a share."""

    def __post_init__(self) -> None:
        counts = (self.draws, self.priors, self.rounds, self.chains, *self.rows)
        if not self.rows or min(counts) < 1:
            raise ValueError(f"{self}: counts >= 1")
        if not (0 < self.discordant <= 0.9 and 0 <= self.step < 1):
            raise ValueError(f"{self}: discordant in (0, 0.9], step in [0, 1)")


def bench_gate(bench: GateBench | None = None, progress: Reporter | None = None) -> dict[str, Any]:
    """Operating characteristics of the gate as plain values; about a minute as it stands.

    Returns:
        setup: the fields of ``bench``.
        figures: [{name, n, rate, se, bound, within}]: a rate with its standard error and, where
            the gate promises one, a bound and whether rate <= bound + 3 se (drift: in points).
        curves: [{n, losses, one_stage, confirmed, gains, power}], shares.
        drift: [{n, against, confirmed, points}], mean loss of a prior task after each round.
        within: every bound is kept.
    """
    bench = bench or GateBench()
    advance = (progress or Silent()).track("bench gate", len(bench.rows))
    figures: list[dict[str, Any]] = []
    curves, drifts = [], []
    for done, n in enumerate(bench.rows, 1):
        # The gate's own rule (anchor, confirmed) beside two that it does not use.
        figures += _rates(bench, n)
        curves.append(_curves(bench, n))
        for against, confirmed in (("anchor", True), ("anchor", False), ("champion", True)):
            points = _drift(bench, n, against, confirmed)
            drifts.append({"n": n, "against": against, "confirmed": confirmed, "points": points})
            figures.append(_drift_figure(bench, n, against, confirmed, points[-1]))
        advance(done)
    within = all(figure["within"] is not False for figure in figures)
    results = {"figures": figures, "curves": curves, "drift": drifts, "within": within}
    return {"setup": asdict(bench), **results}


def lost_and_won(
    rng: np.random.Generator, n: int, loss: ArrayLike, discordant: float
) -> tuple[Ints, Ints]:
    """Counts (b, c) of one draw for every entry of ``loss``."""
    loss = np.asarray(loss, float)
    share = np.maximum(discordant, np.abs(loss))
    lost, won = (share + loss) / 2, (share - loss) / 2
    b = np.asarray(rng.binomial(n, lost))
    return b, np.asarray(rng.binomial(n - b, won / (1 - lost)))


def graded_counts(
    rng: np.random.Generator, n: int, loss: ArrayLike, discordant: float
) -> NDArray[np.int64]:
    """Rows (..., 9) of one draw by the size of their difference, one of LEVELS, for every loss."""
    toward = np.asarray(loss, float)[..., None] / PARTS.mean()  # chance lost - chance won
    share = np.maximum(discordant, np.abs(toward))
    lost, won = ((share + sign * toward) / 2 / PARTS.size for sign in (1, -1))
    each = np.ones(PARTS.size)
    return np.asarray(rng.multinomial(n, np.concatenate([lost * each, 1 - share, won * each], -1)))


def graded_passes(counts: Ints, null: float, alpha: float) -> Flags:
    """Whether H0: mean difference <= ``null`` is refuted, for counts (..., 9) of LEVELS."""
    return np.asarray(log_e_levels(LEVELS, counts, null) > -np.log(alpha))


def prior_passes(n: int, b: Ints, c: Ints, alpha: float) -> Flags:
    """Step 2: each prior task alone against its margin."""
    return np.asarray(tango_p(n, b, c, task_margin(n)) < alpha)


def priors_pass(n: int, b: Ints, c: Ints, alpha: float) -> Flags:
    """Steps 2 and 3 for counts (..., priors): every task, and all of them pooled."""
    return prior_passes(n, b, c, alpha).all(-1) & _pooled_passes(n, b, c, alpha)


def priors_reject(n: int, b: Ints, c: Ints, alpha: float) -> Flags:
    """Steps 2 and 3 end in reject: a loss is shown where a margin is not kept."""
    critical = norm.isf(alpha / (b.shape[-1] + 1))
    lost = tango_z(n, b, c, 0.0) < -critical
    lost_pooled = tango_z(n * b.shape[-1], b.sum(-1), c.sum(-1), 0.0) < -critical
    alone = (lost & ~prior_passes(n, b, c, alpha)).any(-1)
    return np.asarray(alone | (lost_pooled & ~_pooled_passes(n, b, c, alpha)))


def target_passes(n: int, b: Ints, c: Ints) -> Flags:
    """Step 4: exact McNemar and the least gain."""
    sure = mcnemar_exact(b, c) < SETTINGS.target_alpha
    return np.asarray(sure & ((c - b) / n >= SETTINGS.min_gain))


def _pooled_passes(n: int, b: Ints, c: Ints, alpha: float) -> Flags:
    rows = n * b.shape[-1]
    return np.asarray(tango_p(rows, b.sum(-1), c.sum(-1), pooled_margin(rows)) < alpha)


def _rates(bench: GateBench, n: int) -> list[dict[str, Any]]:
    """Every named rate for tasks of n rows."""
    # One stream for all rates of a size: the figures depend on their order, which is fixed here.
    rng = np.random.default_rng([bench.seed, n, 1])
    all_priors = (bench.draws, bench.priors)
    at_margin = np.full(bench.draws, task_margin(n))
    at_pooled = np.full(all_priors, pooled_margin(n * bench.priors))
    figures = []

    def twice(name: str, loss: ArrayLike, k: float, rule: Callable[..., Flags], *to: float) -> None:
        first = rule(n, *lost_and_won(rng, n, loss, k), SETTINGS.alpha)
        sealed = rule(n, *lost_and_won(rng, n, loss, k), SEALED_ALPHA)
        one, two = to or (None, None)
        figures.append(_figure(f"{name}, one stage", n, first, one))
        figures.append(_figure(f"{name}, confirmed", n, first & sealed, two))

    few, promised = bench.discordant / 3, (ONE_STAGE, CONFIRMED)
    false = "false promotion:"
    twice(f"{false} one prior at its margin", at_margin, bench.discordant, prior_passes, *promised)
    twice(
        f"{false} priors at the pooled margin", at_pooled, bench.discordant, priors_pass, *promised
    )
    for k in (bench.discordant, few):
        name = f"unchanged candidate, {100 * k:g} % discordant"
        twice(f"{name}: priors pass", np.zeros(all_priors), k, priors_pass)
        counts = lost_and_won(rng, n, np.zeros(all_priors), k)
        rejected = priors_reject(n, *counts, SETTINGS.alpha)
        figures.append(_figure(f"{name}: rejected as harmful", n, rejected, SETTINGS.alpha))
    for gain, bound in ((0.0, SETTINGS.target_alpha), (0.03, None), (0.05, None)):
        loss, k = np.full(bench.draws, -gain), bench.discordant + gain
        passes = target_passes(n, *lost_and_won(rng, n, loss, k))
        figures.append(_figure(f"target: gain of {100 * gain:g} points found", n, passes, bound))
    name = f"false promotion: one prior at its margin, {LOOKS} looks while rows are added, betting"
    looked = _looked_at(rng, bench, n)
    return [*figures, _figure(name, n, looked, ONE_STAGE), *_graded_rates(rng, bench, n)]


def _graded_rates(rng: np.random.Generator, bench: GateBench, n: int) -> list[dict[str, Any]]:
    """Error rates and power of steps 2 and 4 for a graded task of n rows."""
    margin, pooled, figures = task_margin(n), n * bench.priors, []

    def counts(loss: float, rows: int = n, more: float = 0.0) -> Ints:
        return graded_counts(rng, rows, np.full(bench.draws, loss), bench.discordant + more)

    bounds: tuple[float | None, float | None]
    for name, loss, bounds in (
        ("graded, false promotion: a prior at its margin", margin, (ONE_STAGE, CONFIRMED)),
        ("graded, unchanged candidate: a prior passes", 0.0, (None, None)),
    ):
        first = graded_passes(counts(loss), -margin, SETTINGS.alpha)
        both = first & graded_passes(counts(loss), -margin, SEALED_ALPHA)
        figures.append(_figure(f"{name}, one stage", n, first, bounds[0]))
        figures.append(_figure(f"{name}, confirmed", n, both, bounds[1]))
    unchanged = graded_passes(counts(0.0, pooled), -pooled_margin(pooled), SETTINGS.alpha)
    name = f"graded, unchanged candidate: {bench.priors} pooled priors pass, one stage"
    figures.append(_figure(name, n, unchanged))
    for gain, bound in ((0.0, SETTINGS.target_alpha), (0.03, None), (0.05, None)):
        drawn = counts(-gain, more=gain)
        worth = drawn @ LEVELS / n >= SETTINGS.min_gain
        found = graded_passes(drawn, 0.0, SETTINGS.target_alpha) & worth
        name = f"graded target: gain of {100 * gain:g} points found"
        figures.append(_figure(name, n, found, bound))
    return figures


def _looked_at(rng: np.random.Generator, bench: GateBench, n: int) -> Flags:
    """A sequential gate that stops at the first of its looks that lets a harmful prior pass."""
    loss = np.full((bench.draws, LOOKS), task_margin(n))
    b, c = lost_and_won(rng, max(n // LOOKS, 1), loss, bench.discordant)
    rows = max(n // LOOKS, 1) * np.arange(1, LOOKS + 1)
    evidence = log_e_counts(rows, b.cumsum(1), c.cumsum(1), -task_margin(n))
    return np.asarray((evidence >= -np.log(SETTINGS.alpha)).any(1))


def _figure(name: str, n: int, flags: Flags, bound: float | None = None) -> dict[str, Any]:
    rate = float(flags.mean())
    # at a rate of 0 or 1 the plain standard error would be 0, which is no certainty
    smoothed = (flags.sum() + 1) / (flags.size + 2)
    se = float(np.sqrt(smoothed * (1 - smoothed) / flags.size))
    within = None if bound is None else rate <= bound + 3 * se
    return {"name": name, "n": n, "rate": rate, "se": se, "bound": bound, "within": within}


def _curves(bench: GateBench, n: int) -> dict[str, Any]:
    """Chance to pass over the true loss of one prior task, and over the target's true gain."""
    rng = np.random.default_rng([bench.seed, n, 2])
    losses = np.broadcast_to(LOSSES, (bench.draws, LOSSES.size))
    one = prior_passes(n, *lost_and_won(rng, n, losses, bench.discordant), SETTINGS.alpha)
    two = one & prior_passes(n, *lost_and_won(rng, n, losses, bench.discordant), SEALED_ALPHA)
    gains = np.broadcast_to(GAINS, (bench.draws, GAINS.size))
    power = target_passes(n, *lost_and_won(rng, n, -gains, bench.discordant + GAINS[-1]))
    return {
        "n": n,
        "losses": LOSSES.tolist(),
        "one_stage": one.mean(0).tolist(),
        "confirmed": two.mean(0).tolist(),
        "gains": GAINS.tolist(),
        "power": power.mean(0).tolist(),
    }


def _drift(bench: GateBench, n: int, against: str, confirmed: bool) -> list[float]:
    """Mean loss of a prior task after every round, in points."""
    rng = np.random.default_rng([bench.seed, n, 3])
    lost = np.zeros((bench.chains, bench.priors))
    path = []
    for _ in range(bench.rounds):
        candidate = lost + bench.step
        seen = candidate if against == "anchor" else np.full_like(lost, bench.step)
        passed = np.ones(bench.chains, bool)
        for alpha in (SETTINGS.alpha, SEALED_ALPHA)[: 1 + confirmed]:
            passed &= priors_pass(n, *lost_and_won(rng, n, seen, bench.discordant), alpha)
        lost = np.where(passed[:, None], candidate, lost)
        path.append(100 * float(lost.mean()))
    return path


def _drift_figure(
    bench: GateBench, n: int, against: str, confirmed: bool, points: float
) -> dict[str, Any]:
    """Points lost a prior task at the end; promised for the whole gate against the anchor."""
    stages = "confirmed" if confirmed else "one stage"
    name = f"points lost a prior task in {bench.rounds} rounds against the {against}, {stages}"
    bound = DRIFT_POINTS if against == "anchor" and confirmed else None
    within = None if bound is None else points <= bound
    return {"name": name, "n": n, "rate": points, "se": None, "bound": bound, "within": within}


def table(result: dict[str, Any]) -> Table:
    """The figures of :func:`bench_gate` for people: one line a rate, one column a size."""
    sizes = result["setup"]["rows"]
    drawn = Table(title="the gate by simulation, %; drift in points", title_justify="left")
    drawn.add_column("figure")
    for n in sizes:
        drawn.add_column(f"{n} rows", justify="right")
    drawn.add_column("bound", justify="right")
    drawn.add_column("kept")
    by_name: dict[str, list[dict[str, Any]]] = {}
    for figure in result["figures"]:
        by_name.setdefault(figure["name"], []).append(figure)
    for name, figures in by_name.items():
        drift, bound = figures[0]["se"] is None, figures[0]["bound"]
        scale = 1 if drift else 100
        kept = "-" if bound is None else "no" if any(not f["within"] for f in figures) else "yes"
        shown = "-" if bound is None else f"{scale * bound:g}"
        drawn.add_row(name, *(f"{scale * f['rate']:.2f}" for f in figures), shown, kept)
    drawn.caption = (
        "A bound is kept within three standard errors. The drift is promised for the gate as it is "
        "set, with confirmation on sealed rows (gate.confirm); one stage alone loses more."
    )
    drawn.caption_justify = "left"
    return drawn


def plot_gate(result: dict[str, Any], path: Path) -> Path:
    """Draw the curves and the drift of :func:`bench_gate` into a PNG at ``path``."""
    from matplotlib.figure import Figure  # heavy: only where something is drawn

    figure = Figure(figsize=(13, 4), layout="constrained")
    harm, gain, drift = figure.subplots(1, 3)
    for number, curve in enumerate(result["curves"]):
        colour, n = f"C{number}", curve["n"]
        losses, gains = 100 * np.array(curve["losses"]), 100 * np.array(curve["gains"])
        harm.plot(losses, curve["one_stage"], color=colour, label=f"{n} rows")
        harm.plot(losses, curve["confirmed"], color=colour, linestyle="--")
        harm.axvline(100 * task_margin(n), color=colour, linewidth=0.5)
        gain.plot(gains, curve["power"], color=colour, label=f"{n} rows")
    for number, line in enumerate(result["drift"]):
        label = (
            f"{line['against']}, {'confirmed' if line['confirmed'] else 'one stage'}, {line['n']}"
        )
        drift.plot(line["points"], color=f"C{number % 10}", label=label)
    harm.axhline(ONE_STAGE, color="black", linewidth=0.5)
    drift.axhline(DRIFT_POINTS, color="black", linewidth=0.5)
    harm.set(title="a prior task passes (dashed: confirmed)", xlabel="true loss, points")
    gain.set(title="the target's gain is found", xlabel="true gain, points")
    drift.set(title="points lost a prior task, baseline and rows", xlabel="round")
    for axes in (harm, gain, drift):
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    return path
