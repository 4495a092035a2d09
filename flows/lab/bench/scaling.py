"""How far engines scale: the product's own schedule, driven by simulated engines that also break.

`agent.population.schedule.plan` decides; here its events come from a queue of simulated times:

    member     generate * (1 + spread * normal)     seconds, the same member on every engine
    an engine breaks at rate 1 / mtbf while it works; its member goes back to the queue, the engine
    comes back after ``mend_s``
    driver     sends a member's prompts, reads its answers and rewards them, one member at a time

    efficiency = members * mean member seconds / (engines * seconds of the generation)

Three of them: of the schedule alone; with the driver's own work, which is serial; and with the
update as well, in which every engine draws the noise of all members.
"""

import heapq
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from agent.population.schedule import Event, Failed, Finished, Joined, plan, told
from flows.show.terminal import Reporter, Silent

ENGINES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

CURVES = {"efficiency": "-", "with_driver": "--", "with_update": ":"}


@dataclass(frozen=True, slots=True)
class ScalingBench:
    """What is simulated. The seconds are those of Qwen2.5-3B in `anchorage plan`, assumed rates."""

    members: tuple[int, ...] = (30, 1024)
    generations: int = 100
    member_s: float = 7.0
    spread: float = 0.01  # of one member's seconds
    mtbf_hours: float = 168.0  # of an engine
    mend_s: float = 120.0  # until a broken engine is back
    # Of the driver, measured on one core with 200 prompts of 800 and answers of 2,000 characters.
    dispatch_s: float = 0.002
    collect_s: float = 0.015  # GSM8K's verifier is most of it
    update_s: float = 0.015  # of every engine, for each member
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SimulatedGeneration:
    """One simulated generation."""

    seconds: float
    useful_s: float  # what its members take, each counted once
    failures: int


def simulate(members: int, engines: int, bench: ScalingBench, seed: int) -> SimulatedGeneration:
    """Run one generation, which begins with every engine whole.

    Raises:
        NoEngineError: One member broke three engines: as in a round.
    """
    chance = np.random.default_rng([bench.seed, members, engines, seed])
    noise = chance.standard_normal(members)
    took = np.maximum(0.1, 1 + bench.spread * noise) * bench.member_s
    decisions = plan(range(members), range(engines))
    queue: list[tuple[float, int, Event]] = []
    now, driver, order, failures = 0.0, 0.0, 0, 0
    starts = next(decisions, None)
    while starts is not None:
        for assign in starts:
            driver = max(driver, now) + bench.dispatch_s
            ends, breaks = took[assign.member], chance.exponential(bench.mtbf_hours * 3600)
            order += 1
            event: Event = Finished(assign.engine)
            if breaks < ends:
                event = Failed(assign.engine, "simulated", mending=True)
                back = driver + breaks + bench.mend_s
                heapq.heappush(queue, (back, order + members * engines, Joined(assign.engine)))
                failures += 1
            heapq.heappush(queue, (driver + min(ends, breaks), order, event))
        now, _, event = heapq.heappop(queue)
        if isinstance(event, Finished):  # rewarded before the next decision, as a round does
            driver = now = max(driver, now) + bench.collect_s
        starts = told(decisions, event)
    return SimulatedGeneration(now, float(took.sum()), failures)


def bench_scaling(bench: ScalingBench, progress: Reporter | None = None) -> dict[str, Any]:
    """Efficiency and speed-up for every number of engines and members."""
    advance = (progress or Silent()).track("simulate", len(bench.members) * len(ENGINES))
    points = []
    for members in bench.members:
        for engines in ENGINES:
            points.append(_point(members, engines, bench))
            advance(len(points))
    return {"bench": asdict(bench), "points": points}


def _point(members: int, engines: int, bench: ScalingBench) -> dict[str, Any]:
    """Means over the generations."""
    seeds = range(bench.generations)
    idle = replace(bench, dispatch_s=0.0, collect_s=0.0)
    alone = [simulate(members, engines, idle, seed) for seed in seeds]
    driven = [simulate(members, engines, bench, seed) for seed in seeds]
    useful = sum(each.useful_s for each in alone)
    took, with_driver = (sum(each.seconds for each in runs) for runs in (alone, driven))
    all_of_it = with_driver + len(driven) * members * bench.update_s
    return {
        "members": members,
        "engines": engines,
        "seconds": all_of_it / len(driven),
        "efficiency": useful / took / engines,
        "with_driver": useful / with_driver / engines,
        "with_update": useful / all_of_it / engines,
        "failures": sum(each.failures for each in alone),
    }


def scaling_table(result: dict[str, Any]) -> Table:
    """One row a point."""
    title = "efficiency in %: the schedule, with the driver's work, with the update"
    names = ("members", "engines", "schedule", "driver", "update", "seconds", "broken")
    drawn = Table(*names, title=title, title_justify="left")
    for each in result["points"]:
        shares = (f"{100 * each[name]:.1f}" for name in CURVES)
        counts = (str(each["members"]), str(each["engines"]))
        drawn.add_row(*counts, *shares, f"{each['seconds']:.1f}", str(each["failures"]))
    return drawn


def plot_scaling(points: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw efficiency over engines, one line for each number of members, into a PNG at ``path``."""
    from matplotlib.figure import Figure  # heavy: only where something is drawn

    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, members in enumerate(sorted({each["members"] for each in points})):
        mine = [each for each in points if each["members"] == members]
        engines = [each["engines"] for each in mine]
        for name, style in CURVES.items():
            label = f"{members} members, {name.replace('_', ' ')}"
            shares = [100 * each[name] for each in mine]
            axes.plot(engines, shares, style, color=f"C{number}", marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="engines", ylabel="efficiency, %", ylim=(0, 102))
    axes.set_title("The schedule with simulated engines that break", loc="left", fontsize=11)
    axes.grid(linewidth=0.4)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return path
