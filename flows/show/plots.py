"""The pictures of a round: what was learnt, how far it drifted, what became of every task."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, GRID = "#1f2933", "#d9dee4"
COLOURS = ("#0b6e99", "#d1495b", "#66a182", "#edae49", "#7d5ba6", "#8d6e63", "#5c7cfa", "#2a9d8f")


def curve(points: Sequence[Mapping[str, Any]], target: str, title: str) -> Figure:
    """Accuracy of the target and of each prior task over the generations of a round.

    Args:
        points: One mapping a measurement: generation, task, accuracy (a share), n (rows).
        target: Name of the target task, drawn thick.
        title: The figure's title.
    """
    figure, axes = _figure(title, "generation", "accuracy (%)")
    names = sorted({str(p["task"]) for p in points}, key=lambda name: (name != target, name))
    for colour, name in zip(_cycle(len(names)), names, strict=True):
        mine = sorted((p for p in points if p["task"] == name), key=lambda p: p["generation"])
        axes.plot(
            [p["generation"] for p in mine],
            [100 * p["accuracy"] for p in mine],
            color=colour,
            linewidth=3.0 if name == target else 1.4,
            marker="o",
            markersize=5 if name == target else 3,
            label=f"{name} (target)" if name == target else name,
        )
    axes.set_ylim(-2, 102)
    _legend(axes)
    return figure


def drift(records: Sequence[Mapping[str, Any]]) -> Figure:
    """||delta|| beside its predictions, and the training reward, over generations.

    Args:
        records: One mapping a generation: generation, norm, predicted_norm, predicted_norm_l2
            (may be missing), reward_mean, reward_std.
    """
    figure, left = _figure("Drift and reward", "generation", "norm of delta")
    x = [r["generation"] for r in records]
    left.plot(x, [r["norm"] for r in records], color=COLOURS[0], linewidth=2.4, label="measured")
    for key, style, label in (
        ("predicted_norm", ":", "random walk, no decay"),
        ("predicted_norm_l2", "--", "random walk with this L2"),
    ):
        known = [(r["generation"], r[key]) for r in records if r.get(key) is not None]
        if known:
            left.plot(*zip(*known, strict=True), linestyle=style, color=INK, label=label)
    right = left.twinx()  # a scale of its own: rewards lie in 0..1.1, norms anywhere
    mean = [_number(r["reward_mean"]) for r in records]
    spread = [_number(r["reward_std"]) for r in records]
    right.plot(x, mean, color=COLOURS[1], linewidth=1.6, label="reward (right)")
    low = [m - s for m, s in zip(mean, spread, strict=True)]
    high = [m + s for m, s in zip(mean, spread, strict=True)]
    right.fill_between(x, low, high, color=COLOURS[1], alpha=0.15, linewidth=0)
    right.set_ylabel("mean training reward of the members")
    handles, labels = left.get_legend_handles_labels()
    more, names = right.get_legend_handles_labels()
    left.legend(handles + more, labels + names, frameon=False, fontsize=8, loc="lower right")
    return figure


def accuracies(tasks: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """Anchor, champion and candidate side by side on every task, with Wilson intervals.

    Args:
        tasks: By task: anchor, champion, candidate (shares) and ``interval`` of each as
            ``{"anchor": (low, high), ...}``.
        title: The figure's title.
    """
    figure, axes = _figure(title, "", "accuracy (%)")
    who = ("anchor", "champion", "candidate")
    for index, name in enumerate(who):
        x = [position + 0.27 * (index - 1) for position in range(len(tasks))]
        y = [100 * each[name] for each in tasks.values()]
        low = [100 * (each[name] - each["interval"][name][0]) for each in tasks.values()]
        high = [100 * (each["interval"][name][1] - each[name]) for each in tasks.values()]
        error = [[max(0.0, v) for v in low], [max(0.0, v) for v in high]]
        axes.bar(x, y, 0.25, yerr=error, color=COLOURS[index], label=name, ecolor=INK, capsize=2)
    axes.set_xticks(range(len(tasks)), list(tasks), rotation=20, ha="right")
    axes.set_ylim(0, 105)
    _legend(axes)
    return figure


def rounds(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Accuracy of what is served on every task, before the first round and after each.

    Args:
        rows: One mapping a round: target, promoted, tasks (by name: champion, candidate, shares).
            A ring marks the target of a round that was promoted, a cross one that was not.
        title: The figure's title.
    """
    figure, axes = _figure(title, "round", "accuracy (%)")
    targets = {str(each["target"]) for each in rows}
    drawn = [*sorted(targets), *sorted({name for each in rows for name in each["tasks"]} - targets)]
    for colour, name in zip(_cycle(len(drawn)), drawn, strict=True):
        # A round that was not promoted leaves the champion served: its accuracy then, not the
        # candidate's, continues the line.
        served = [100 * rows[0]["tasks"][name]["champion"]] if rows else []
        served += [
            100 * each["tasks"][name]["candidate" if each["promoted"] else "champion"]
            for each in rows
        ]
        width = 2.6 if name in targets else 1.2
        label = f"{name} (target)" if name in targets else name
        axes.plot(range(len(served)), served, color=colour, linewidth=width, label=label)
        for number, each in enumerate(rows, 1):
            if each["target"] == name:
                sign = "o" if each["promoted"] else "x"
                axes.plot(number, served[number], sign, color=colour, markersize=6)
    axes.set_ylim(-2, 102)
    axes.locator_params(axis="x", integer=True)
    _legend(axes)
    return figure


def before_and_after(lines: Sequence[tuple[str, float, float, bool]], title: str) -> Figure:
    """A line from the anchor's accuracy to the candidate's for every trial and task.

    Args:
        lines: Label, accuracy before and after (shares), and whether the task was the target.
        title: The figure's title.
    """
    figure, axes = _figure(title, "accuracy (%): the anchor's (open), the candidate's (full)", "")
    figure.set_size_inches(8, 1.2 + 0.3 * len(lines))
    for at, (_, before, after, target) in enumerate(lines):
        colour, width = (COLOURS[0], 3.0) if target else (COLOURS[5], 1.4)
        axes.plot([100 * before, 100 * after], [at, at], color=colour, linewidth=width)
        axes.plot(100 * before, at, "o", color=colour, markerfacecolor="white", markersize=6)
        axes.plot(100 * after, at, "o", color=colour, markersize=6)
    axes.set_yticks(range(len(lines)), [label for label, *_ in lines])
    axes.invert_yaxis()
    return figure


def heat_map(values: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """One row a version, one column a task, such as KL(anchor || version) in nats per token."""
    figure, axes = _figure(title, "", "")
    rows, columns = list(values), sorted({task for row in values.values() for task in row})
    grid = [[row.get(task, float("nan")) for task in columns] for row in values.values()]
    top = max((value for row in grid for value in row if value > 0), default=1.0)
    image = axes.imshow(grid, cmap="YlOrRd", vmin=0, vmax=top, aspect="auto")
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            shown = f"{value:.3g}" if isfinite(value) else "-"
            colour = "white" if value > top / 2 else INK
            axes.text(x, y, shown, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=20, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes)
    return figure


def _number(value: float | None) -> float:
    """A gap in the line where nothing finite was measured."""
    return float("nan") if value is None else value


def _figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """A figure outside pyplot's global state, safe in threads and servers."""
    figure = Figure(figsize=(8.4, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _cycle(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
