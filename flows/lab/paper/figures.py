"""The study's figures, as the paper has them, from its result files."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib import colormaps
from matplotlib.figure import Figure

from flows.lab.paper.report import claims, grouped, markdown, on_target, priors, rows
from flows.lab.paper.systems import SYSTEMS
from flows.show.plots import GRID, INK

COLOURS = [colormaps["tab20"](place) for place in range(20)]

Result = Mapping[str, Any]
Trials = Mapping[str, Sequence[Result]]  # system -> its trials


def figures(results: Sequence[Result]) -> dict[str, Figure]:
    """Every figure these results can fill, by file name without its ending."""
    drawn: dict[str, Figure] = {}
    groups = grouped(results)
    for target in sorted({name for name, _ in groups}):
        own = {
            system: list(trials.values())
            for (name, system), trials in groups.items()
            if name == target and system != "es-stopped"
        }
        plain = {system: trials for system, trials in own.items() if "@" not in system}
        drawn[f"{target}-training"] = training(plain, target)
        drawn[f"{target}-priors"] = each_prior(plain, target)
        drawn[f"{target}-kl"] = divergence(plain, target)
        drawn[f"{target}-norms"] = norms(plain, target)
        if any("@" in system for system in own):
            drawn[f"{target}-lambda"] = ablation(own, target)
    return drawn


def measurements(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each measurement and task of every trial."""
    return [
        {
            **each["trial"],
            "generation": point["generation"],
            "tokens": point["tokens"],
            "task": name,
            "accuracy": accuracy,
            "kl": point["kl"].get(name),
        }
        for each in results
        for point in each["curve"]
        for name, accuracy in point["accuracy"].items()
    ]


def draw(results: Sequence[Result], folder: Path) -> dict[str, Any]:
    """Write figures (PNG), tables (markdown, JSON) and all measurements (parquet) into a folder.

    Returns:
        rows and claims as in ``report``, files: the names written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(results).items():
        figure.savefig(folder / f"{name}.png")
    document = {"rows": rows(results), "claims": [asdict(claim) for claim in claims(results)]}
    (folder / "study.md").write_text(markdown(results), encoding="utf-8")
    (folder / "study.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(measurements(results)), folder / "measurements.parquet")
    return document | {"files": sorted(path.name for path in folder.iterdir())}


def training(own: Trials, target: str) -> Figure:
    """Target and mean prior accuracy over generations (Fig. 1 and 2)."""
    figure, panes = _panes(2, f"Accuracy over training, target {target}")
    _curves(panes[0], own, lambda each, point: 100 * on_target(each, point), f"{target}, %")
    _curves(panes[1], own, lambda each, point: 100 * priors(each, point), "mean of priors, %")
    _legend(figure, panes[0])
    return figure


def each_prior(own: Trials, target: str) -> Figure:
    """Every prior task over generations (Fig. 3, 8 to 10)."""
    some = next(iter(own.values()))[0]
    names = [name for name in some["curve"][0]["accuracy"] if name != target]
    figure, panes = _panes(len(names), f"Prior tasks over training, target {target}")
    for pane, name in zip(panes, names, strict=False):

        def accuracy(_each: Result, point: Mapping[str, Any], name: str = name) -> float:
            return float(100 * point["accuracy"][name])

        _curves(pane, own, accuracy, f"{name}, %")
    _legend(figure, panes[0])
    return figure


def divergence(own: Trials, target: str) -> Figure:
    """KL(anchor || theta) on target and priors over generations (Fig. 7 and 11)."""
    figure, panes = _panes(2, f"KL to the anchor, target {target}")
    _curves(panes[0], own, lambda e, point: on_target(e, point, "kl"), f"{target}, nats a token")
    _curves(panes[1], own, lambda e, point: priors(e, point, "kl"), "priors, nats a token")
    _legend(figure, panes[0])
    return figure


def norms(own: Trials, target: str) -> Figure:
    """||delta||^2 against Eq. 2 and the closed form of L2, dashed (Fig. 6)."""
    figure, panes = _panes(1, f"Squared norm of delta, target {target}; dashed: predicted")
    for colour, (system, trials) in zip(_colours(own), sorted(own.items()), strict=True):
        rows = min((each["norms"] for each in trials), key=len)  # some may have ended early
        x = [row[0] for row in rows]
        mean = [fmean(each["norms"][n][1] ** 2 for each in trials) for n in range(len(rows))]
        panes[0].plot(x, mean, color=colour, label=system)
        known = [(row[0], row[3] if row[3] is not None else row[2]) for row in rows]
        line = [(at, value**2) for at, value in known if value is not None]
        if line:
            panes[0].plot(*zip(*line, strict=True), color=colour, linestyle="--", linewidth=0.8)
    panes[0].set_ylabel("squared norm")
    _legend(figure, panes[0])
    return figure


def ablation(own: Trials, target: str) -> Figure:
    """Target and priors by lambda (Fig. 5)."""
    figure, panes = _panes(1, f"Lambda of L2, target {target}")
    points = sorted(
        (
            float(system.partition("@")[2] or trials[0]["settings"]["sizes"]["lam"]),
            fmean(100 * on_target(each, each["curve"][-1]) for each in trials),
            fmean(100 * priors(each, each["curve"][-1]) for each in trials),
        )
        for system, trials in own.items()
        if system.startswith("awd-l2")
    )
    lams = [lam for lam, _, _ in points]
    panes[0].plot(lams, [aim for _, aim, _ in points], marker="o", label=target)
    panes[0].plot(lams, [kept for _, _, kept in points], marker="o", label="mean of priors")
    panes[0].set_xscale("log")
    panes[0].set_xlabel("lambda")
    panes[0].set_ylabel("accuracy, %")
    _legend(figure, panes[0])
    return figure


def _curves(
    pane: Any, own: Trials, value: Callable[[Result, Mapping[str, Any]], float], label: str
) -> None:
    """One line a system: the mean over its seeds, and each seed thin."""
    for colour, (system, trials) in zip(_colours(own), sorted(own.items()), strict=True):
        lines = [[value(each, point) for point in each["curve"]] for each in trials]
        shortest = min((each["curve"] for each in trials), key=len)  # some may have ended early
        x = [point["generation"] for point in shortest]
        for line in lines if len(lines) > 1 else []:
            pane.plot(x, line[: len(x)], color=colour, linewidth=0.5, alpha=0.5)
        mean = [fmean(values) for values in zip(*lines, strict=False)]
        pane.plot(x, mean, color=colour, linewidth=1.8, marker=".", label=system)
    pane.set_ylabel(label)
    pane.set_xlabel("generation")


def _panes(count: int, title: str) -> tuple[Figure, list[Any]]:
    """A figure with panes in rows of up to four."""
    across = min(count, 4)
    down = -(-count // across)
    figure = Figure(figsize=(2.2 + 3.4 * across, 0.8 + 2.9 * down), dpi=90, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11)
    panes = list(figure.subplots(down, across, squeeze=False).flat)
    for pane in panes:
        pane.grid(color=GRID, linewidth=0.7)
        pane.set_axisbelow(True)
        pane.spines[["top", "right"]].set_visible(False)
    for pane in panes[count:]:
        pane.set_visible(False)
    return figure, panes


def _legend(figure: Figure, pane: Any) -> None:
    figure.legend(
        *pane.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper"
    )


def _colours(own: Trials) -> list[Any]:
    # By the place in the list of all systems: a system has one colour in every figure.
    known = [*SYSTEMS, *sorted(own)]
    return [COLOURS[known.index(system) % len(COLOURS)] for system in sorted(own)]
