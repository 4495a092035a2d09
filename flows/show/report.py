"""Reports for people: a round as a table, Markdown and JSON; ledger, study and demo as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from agent.store.ledger import Entry
from agent.store.weights import short

Figures = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class RoundReport:
    """One round from its target to its verdict; figures are the gate's, by task."""

    round_id: str
    target: str
    generations: int
    stopped: str
    digest: str
    verdict: str
    reasons: Sequence[Mapping[str, Any]]
    tasks: Figures
    curve: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    learner_share: float | None = None  # of a generation's wall time; median (flows.learn.curve)
    shift: Mapping[str, Figures] = field(default_factory=dict)  # KL to the anchor: who -> task
    rows: Mapping[str, Any] = field(default_factory=dict)  # prompts by origin, from the plan
    gain: Mapping[str, Any] = field(default_factory=dict)  # evaluators.summary.Gain, and its cost
    alarms: Sequence[str] = ()  # when members earned clearly less than their parent

    def to_json(self) -> dict[str, Any]:
        """The report as `improve --json`, and `demo --json` by round, print it."""
        keys = ("n", "anchor", "champion", "candidate", "difference", "low", "high", "p", "outcome")
        return {
            "round": self.round_id,
            "target": self.target,
            "generations": self.generations,
            "stopped": self.stopped,
            "learner_share": self.learner_share,
            "alarms": list(self.alarms),
            "verdict": self.verdict,
            "reasons": [reason["text"] for reason in self.decisive()],
            "tasks": {
                name: {key: row.get(key) for key in keys} for name, row in self.tasks.items()
            },
            "shift": {who: dict(tasks) for who, tasks in self.shift.items()},
            "rows": dict(self.rows),
            "gain": dict(self.gain),
            "digest": self.digest,
        }

    def decisive(self) -> list[Mapping[str, Any]]:
        """The findings that made the verdict, the target's first; for a promotion, all of them."""
        findings = [r for r in self.reasons if self.verdict in (r["outcome"], "promote")]
        return sorted(findings, key=lambda each: each.get("task") != self.target)


def table(report: RoundReport) -> Table:
    """Task, n, the three accuracies, difference with interval, and what the gate said."""
    title = f"round {report.round_id}: {report.target}, candidate {short(report.digest)}"
    # Without padding, and with headings of several lines: nothing is cut on 80 characters.
    drawn = Table(title=f"{title}, verdict: {report.verdict}", title_justify="left", padding=(0, 0))
    drawn.add_column("task", min_width=14)
    for column in ("n", "anchor\n%", "champion\n%", "candidate\n%"):
        drawn.add_column(column, justify="right", no_wrap=True)
    drawn.add_column("difference\n(interval),\npoints", justify="right", min_width=11)
    drawn.add_column("gate", no_wrap=True)
    moved = report.shift.get("candidate", {})
    if moved:
        drawn.add_column("KL to\nthe\nanchor", justify="right", min_width=9)
    for name, row in target_first(report):
        style = "bold" if row["role"] == "target" else ""
        drawn.add_row(
            f"{name} (target)" if row["role"] == "target" else name,
            str(row["n"]),
            *(percent(row[who]) for who in ("anchor", "champion", "candidate")),
            difference(row),
            row.get("outcome") or "-",
            *([divergence(moved.get(name))] if moved else []),
            style=style,
        )
    return drawn


def percent(share: float | None) -> str:
    """0.5625 -> '56.2'; '-' where nothing was measured."""
    return "-" if share is None else f"{100 * share:.1f}"


def difference(row: Mapping[str, Any]) -> str:
    """'+12.5 (+8.1 .. +16.9)' in points; '-' where nothing was compared."""
    if row.get("difference") is None:
        return "-"
    numbers = (100 * row[key] for key in ("difference", "low", "high"))
    return "{:+.1f} ({:+.1f} .. {:+.1f})".format(*numbers)


def divergence(row: Mapping[str, float] | None) -> str:
    """'0.0123 (0.0102 .. 0.0151)' nats a token; '-' where nothing was measured."""
    return "-" if row is None else "{kl:.3g} ({low:.3g} .. {high:.3g})".format(**row)


def target_first(report: RoundReport) -> list[tuple[str, Mapping[str, Any]]]:
    """Task and figures, the target before the others by name."""
    return sorted(report.tasks.items(), key=lambda item: (item[0] != report.target, item[0]))


def gate_table(document: Mapping[str, Any], target: str) -> Table:
    """The gate's document as a table, with the findings that made the verdict below."""
    report = RoundReport(
        "", target, 0, "", "", document["verdict"], document["reasons"], document["tasks"]
    )
    drawn = table(report)
    drawn.title = f"verdict: {document['verdict']}"
    drawn.caption = "\n".join(str(reason["text"]) for reason in report.decisive())
    drawn.caption_justify = "left"
    return drawn


def summary_table(document: Mapping[str, Any]) -> Table:
    """Accuracy of one model with Wilson's interval, format, length and cut answers."""
    drawn = Table(title=f"{document['model']} ({short(document['digest'])})", title_justify="left")
    for column in ("task", "n", "accuracy % (95 %)", "format %", "tokens", "cut %", "A/A"):
        drawn.add_column(column, justify="left" if column == "task" else "right")
    again = document.get("discordance", {})
    for name, row in document["tasks"].items():
        drawn.add_row(
            name,
            str(row["n"]),
            f"{percent(row['accuracy'])} ({percent(row['low'])} .. {percent(row['high'])})",
            percent(row["format_rate"]),
            "-" if row["mean_tokens"] is None else f"{row['mean_tokens']:.1f}",
            percent(row["truncation_rate"]),
            percent(again[name]["rate"]) if name in again else "-",
        )
    return drawn


def measured_lines(document: Mapping[str, Any]) -> list[str]:
    """Where the answers of an evaluation lie, and what can be done with them."""
    table = document["table"]
    return [
        f"answers: {table}",
        f"next: `anchorage rescore {table}` judges them again, without a model",
    ]


def history_table(entries: Sequence[Entry]) -> Table:
    """The ledger, newest first; as wide as a terminal of 80 columns."""
    drawn = Table(title="ledger", title_justify="left", show_lines=True)
    drawn.add_column("#", justify="right")
    drawn.add_column("time (UTC), state, digest", no_wrap=True)
    drawn.add_column("why, statistics; who, served before -> after", overflow="fold")
    for each in entries:
        when = datetime.fromtimestamp(each.time, UTC).strftime("%Y-%m-%d %H:%M:%S")
        why = each.why if len(each.why) <= 120 else each.why[:117] + "..."
        served = f"{short(each.before or '-')} -> {short(each.after)}"
        drawn.add_row(
            str(each.seq),
            f"{when}\n{each.state} {short(each.digest)}",
            "\n".join((why, figures(each.statistics), f"{each.actor}; {served}")),
        )
    return drawn


def study_tables(document: Mapping[str, Any]) -> list[Table]:
    """A study: a row a round, then the last champion against the anchor."""
    drawn = Table(title=f"{document['promoted']} of {len(document['rounds'])} rounds promoted")
    drawn.title_justify = "left"
    for column in ("round", "target", "verdict"):
        drawn.add_column(column)
    for column in ("before %", "after %", "difference (interval), points", "||delta||"):
        drawn.add_column(column, justify="right")
    for row in document["rounds"]:
        shares = (percent(row["before"]), percent(row["after"]))
        verdict = "promoted" if row["promoted"] else row["verdict"]
        norm = f"{row['norm']:.2f}"
        drawn.add_row(row["round"], row["target"], verdict, *shares, difference(row), norm)
    # By task, after all rounds: what none of them lost alone, many together may have.
    end = Table(title=f"{short(document['champion'])} against the anchor", title_justify="left")
    end.add_column("task")
    for column in ("n", "anchor %", "champion %", "difference (interval), points", "margin"):
        end.add_column(column, justify="right")
    end.add_column("within")
    for name, row in document["final"].items():
        shares = (percent(row["anchor"]), percent(row["champion"]))
        within = "yes" if row["within"] else "no"
        margin = percent(row["margin"])
        end.add_row(name, str(row["n"]), *shares, difference(row), margin, within)
    end.caption = f"picture: {document['plot']}; {document['seconds']} s"
    end.caption_justify = "left"
    return [drawn, end]


def figures(statistics: Mapping[str, Any], most: int = 4) -> str:
    """The first ``most`` plain figures of a ledger row's statistics, for one line of a table."""
    plain = [
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={short(str(value))}"
        for key, value in statistics.items()
        if isinstance(value, str | int | float)
    ]
    nested = [f"{key}: {len(value)}" for key, value in statistics.items() if _holds(value)]
    return ", ".join([*plain, *nested][:most]) or "-"


def _holds(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def round_table(document: Mapping[str, Any]) -> Table:
    """A round as ``RoundReport.to_json`` has it: its table, and below it why it was not passed."""
    target, verdict = document["target"], document["verdict"]
    tasks = {
        name: {**row, "role": "target" if name == target else "prior"}
        for name, row in document["tasks"].items()
    }
    report = RoundReport(
        document["round"],
        target,
        document["generations"],
        document["stopped"],
        document["digest"],
        verdict,
        [{"text": text, "outcome": verdict} for text in document["reasons"]],
        tasks,
        shift=document["shift"],
    )
    drawn = table(report)
    # The findings of a promotion are in the table already; those of a refusal are its reason.
    if verdict != "promote":
        drawn.caption = "\n".join(document["reasons"])
        drawn.caption_justify = "left"
    return drawn


def demo_tables(document: Mapping[str, Any]) -> list[Table]:
    """The demo's result: a table a round, then what was served in which order, and addresses."""
    drawn = [round_table(each) for each in document["rounds"]]
    live = document["live"]
    end = Table(title="the endpoint", title_justify="left", show_header=False)
    end.add_row("served, in order", " -> ".join(document["served"]))
    end.add_row(
        f"live requests ({live['n']})",
        f"{percent(live['before'])} % right before, {percent(live['after'])} % after",
    )
    end.add_row("picture", document["plot"])
    end.add_row("MLflow (while up)", document["mlflow"])
    end.add_row("look again", f"anchorage up --home {document['home']}")
    end.add_row("seconds", str(document["seconds"]))
    return [*drawn, end]
