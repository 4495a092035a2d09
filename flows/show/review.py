"""The page of a version in MLflow: what its reviewer can do, what was learnt and lost, answers.

The text is Markdown made from values. What to do changes with the ledger and is the head of the
page; the report of the round below it stays.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.review import REVIEW
from agent.store.weights import short
from flows.show.report import RoundReport, difference, divergence, percent, target_first

Sample = Mapping[str, Any]  # a row of a per-sample table (evaluators.runner.SCHEMA)
SHOWN = 10  # rows of each list of answers
TRACED = 5  # fixed rows, and broken rows, in MLflow's evaluation views
SHOWN_CHARS = 800  # of a question and of an answer

DONE = {  # ledger state -> what is so, where there is nothing to do
    None: "Nothing yet: it is not judged.",
    "PROPOSED": "Nothing yet: it is being judged.",
    "EVALUATED": "Nothing yet: it is being judged.",
    "REJECT": "Nothing: it was rejected and is never served.",
    "APPROVED": "Nothing: it is approved and is promoted next.",
    "SWAP_INTENT": "Nothing: a swap to it is under way.",
}
HELD = (
    "Nothing: it is not served, since the gate could not tell whether it is better without harm; "
    "the next round begins from the champion. More rows decide more (`tasks.rows`, `gate.extend`); "
    'with `review.mode = "manual"` a person decides on such versions.'
)


@dataclass(frozen=True)
class Standing:
    """Where a version stands: what its reviewer can do depends on nothing else."""

    digest: str
    state: str | None  # of the ledger
    verdict: str  # of the gate
    served: bool
    manual: bool  # review mode
    home: str  # folder of the service
    signs: bool = True  # MLflow is the home's own, which knows who signed in


def what_to_do(standing: Standing) -> str:
    """The head of a version's page: each act with its tag and its command, and what it does."""
    why, acts = _acts(standing)
    lines = ["## What to do", "", why]
    if acts and not standing.signs:
        lines += ["", "| to | run | effect |", "|---|---|---|"]
        lines += [f"| {to} | {command} | {effect} |" for to, _, command, effect in acts]
    elif acts:
        lines += ["", "| to | in MLflow, signed in | or run | effect |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(act)} |" for act in acts]
        lines += [
            "",
            "An alias is set with the pencil beside *Aliases* above and is checked as the command "
            "is; MLflow's button *Promote model* only copies a version into another registered "
            "model: nothing is served by it.",
        ]
    return "\n".join(lines)


def _acts(standing: Standing) -> tuple[str, list[tuple[str, str, str, str]]]:
    """What is so, and (to, in MLflow, command, effect) of each act that the ledger allows."""
    state, passed = standing.state, standing.verdict == "promote"
    serve = "set the alias `champion` to this version"
    effect = "served by a hot swap, watched on live traffic, rolled back if it is worse"
    if state == "AWAIT_REVIEW":
        found = "passed the gate" if passed else "did not pass the gate, which could not tell"
        tag = f"set the tag `{REVIEW}` to `approve`" + (f", or {serve}" if passed else "")
        approve, reject = (
            _command(standing, f"review {word}", ' --reason "..."')
            for word in ("approve", "reject")
        )
        kept = "never served; the champion stays"
        return f"It waits for a review: it {found}.", [
            ("approve", tag, approve, effect),
            ("reject", f"set the tag `{REVIEW}` to `reject`", reject, kept),
        ]
    if state == "CANARY":
        return "It is on trial: a share of live traffic decides whether it is served.", []
    if standing.served:
        kind = "is served and watched" if state in ("SWAPPED", "BAKING") else "is served"
        undo = "set the alias `champion` to the version with the alias `previous`"
        back = "the version served before is served again"
        command = f"`anchorage rollback{_home(standing)}`"
        return f"It {kind}.", [("undo", undo, command, back)]
    if state == "PASSED" and not standing.manual:
        command = _command(standing, "promote")
        return "It passed the gate and is not served.", [("serve it", serve, command, effect)]
    if state == "PASSED":
        return "Nothing yet: it passed the gate and is about to be put up for review.", []
    if state in ("CHAMPION", "ANCHOR", "ROLLED_BACK"):
        was = "It was rolled back" if state == "ROLLED_BACK" else "It was served before"
        again = _command(standing, "promote")
        return f"{was} and is not served now.", [("serve it again", serve, again, effect)]
    return HELD if state == "HOLD" else DONE.get(state, "Nothing."), []


def _command(standing: Standing, words: str, more: str = "") -> str:
    return f"`anchorage {words} {short(standing.digest)}{more}{_home(standing)}`"


def _home(standing: Standing) -> str:
    return f" --home {standing.home}"


def markdown(report: RoundReport, drift: Sequence[Mapping[str, Any]], answers: str) -> str:
    """The report a reviewer reads: what was learnt, what was lost, every task, answers.

    Args:
        report: The round.
        drift: One record a generation, as the journal keeps it.
        answers: Markdown of rows fixed and broken (``examples``).
    """
    row = report.tasks[report.target]
    idle = sum(1 for record in drift if record.get("no_op"))
    lines = [
        f"# Round {report.round_id}: {report.verdict}",
        "",
        f"**Did it learn?** {_learnt(row)} {report.target}: {percent(row['champion'])} % -> "
        f"{percent(row['candidate'])} %, {difference(row)} points on {row['n']} rows.",
        "",
        f"**What did it lose?** {_lost(report)}",
        "",
        f"{report.generations} generations ({idle} without a step); ended: {report.stopped}.",
        *(f"Alarm in {alarm}." for alarm in report.alarms),
        f"The learner took {percent(report.learner_share)} % of a generation's wall time (median).",
        *_rows_lines(report),
        *gain_lines(report.gain),
        "",
        "| task | n | anchor | champion | candidate | difference | gate |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in target_first(report):
        figures = " | ".join(percent(each[who]) for who in ("anchor", "champion", "candidate"))
        outcome = each.get("outcome") or "-"
        lines.append(f"| {name} | {each['n']} | {figures} | {difference(each)} | {outcome} |")
    lines += ["", "## Reasons", "", *(f"- {reason['text']}" for reason in report.decisive())]
    if report.shift:
        lines += ["", *_shift_lines(report)]
    return "\n".join([*lines, "", answers])


def _rows_lines(report: RoundReport) -> list[str]:
    """Where the training prompts came from, and how much traffic was set aside for which reason."""
    if not report.rows:
        return []
    kinds = [f"{count} {why}" for why, count in report.rows["set_aside"].items() if count]
    line = (
        f"{report.rows['rows']} training prompts, {report.rows['from_traffic']} sent by clients; "
    )
    line += f"requests set aside: {', '.join(kinds) or 'none'}."
    found = [f"{count} of {task}" for task, count in report.rows.get("leaks", {}).items()]
    return [line + (f" Prompts that hold rows that judge: {', '.join(found)}." if found else "")]


def gain_lines(gain: Mapping[str, Any]) -> list[str]:
    """What the target's gain over the champion is made of, and what it cost."""
    if not gain:
        return []

    def pair(name: str, form: str) -> str:
        return " -> ".join(form.format(value) for value in gain[name])

    lines = [
        f"Rows fixed: {gain['fixed']}, broken: {gain['broken']}. Answers of a right format: "
        f"{pair('format', '{:.1%}')}, cut at the limit: {pair('truncated', '{:.1%}')}"
        + (f", mean length: {pair('tokens', '{:.1f}')} tokens." if gain["tokens"] else "."),
    ]
    if gain["alike_accuracy"]:
        lines.append(
            f"Among the {gain['alike']} rows whose answers kept format and length: "
            f"{pair('alike_accuracy', '{:.1%}')}."
        )
    if gain.get("tokens_spent"):
        points = 100 * (gain["accuracy"][1] - gain["accuracy"][0])
        millions = gain["tokens_spent"] / 1e6
        lines.append(
            f"The round generated {gain['tokens_spent']:,} tokens: {points / millions:+.1f} points "
            "a million."
        )
    return lines


def _shift_lines(report: RoundReport) -> list[str]:
    """KL to the anchor by task, a column a version."""
    lines = [
        "## Distribution shift",
        "",
        "KL(anchor || version), nats a token on the anchor's own continuations (95 %).",
        "",
        f"| task | {' | '.join(report.shift)} |",
        "|---" * (1 + len(report.shift)) + "|",
    ]
    for name, _ in target_first(report):
        cells = " | ".join(divergence(tasks.get(name)) for tasks in report.shift.values())
        lines.append(f"| {name} | {cells} |")
    return lines


@dataclass(frozen=True)
class Moved:
    """A row whose reward changed: its question, its gold answer, and both models' samples."""

    question: str
    gold: str  # "" where no right answer is known
    before: Sample
    after: Sample

    @property
    def fixed(self) -> bool:
        """Whether the candidate is better."""
        return _reward(self.after) > _reward(self.before)


def moved_rows(
    before: Sequence[Sample], after: Sequence[Sample], gold: Callable[[Sample], str]
) -> list[Moved]:
    """The rows that both tables hold with different rewards, in the order of ``after``."""
    old = {(row["task"], row["example_id"]): row for row in before}
    pairs = ((old.get((row["task"], row["example_id"])), row) for row in after)
    return [
        Moved(_question(now), gold(now), was, now)
        for was, now in pairs
        if was is not None and _reward(was) != _reward(now)
    ]


def examples(target: Sequence[Moved], priors: Sequence[Moved], most: int = SHOWN) -> str:
    """Rows of the target that were fixed and broken, and rows of prior tasks that were broken.

    Args:
        target: Moved rows against the champion.
        priors: Moved rows of the prior tasks against the anchor.
        most: Rows shown of each of the three.
    """
    lists = (
        ("Fixed", "champion", [row for row in target if row.fixed]),
        ("Broken", "champion", [row for row in target if not row.fixed]),
        ("Broken in prior tasks", "anchor", [row for row in priors if not row.fixed]),
    )
    lines = []
    for title, baseline, rows in lists:
        lines += [f"## {title}: {len(rows)}", ""]
        lines += [line for row in rows[:most] for line in _answers(row, baseline)]
    return "\n".join(lines)


def _answers(row: Moved, baseline: str) -> Iterator[str]:
    """One row. Texts are indented as code, so that Markdown in them is not rendered."""
    yield f"**{row.after['task']}, row {row.after['example_id']}**"
    yield ""
    yield _quoted("question", row.question)
    if row.gold:
        yield _quoted("gold", row.gold)
    for name, sample in ((baseline, row.before), ("candidate", row.after)):
        yield _quoted(f"{name}, reward {_reward(sample):g}", sample["completion"])


def _reward(sample: Sample) -> float:
    """The reward; 0 where the verifier failed."""
    return float(sample["reward"] or 0)


def _question(sample: Sample) -> str:
    """What the user said last in a sample's prompt."""
    messages = json.loads(sample["prompt"])
    return str(next((m["content"] for m in reversed(messages) if m["role"] == "user"), ""))


def _quoted(label: str, text: str | None) -> str:
    text = text or ""
    cut = f"... ({len(text)} characters)" if len(text) > SHOWN_CHARS else ""
    lines = (text[:SHOWN_CHARS] + cut).splitlines() or [""]
    return "\n".join([f"{label}:", "", *(f"    {line}" for line in lines), ""])


def _lost(report: RoundReport) -> str:
    """The prior tasks whose mean fell, with the gate's outcome; or that none did."""
    fell = [
        f"{name} {difference(row)} points ({row['b']} rows lost, {row['c']} won): {row['outcome']}"
        for name, row in target_first(report)
        if row["role"] != "target" and (row.get("difference") or 0) < 0
    ]
    return f"{'; '.join(fell)}." if fell else "No prior task fell against the anchor."


def _learnt(row: Mapping[str, Any]) -> str:
    """Yes, no or unknown, by the interval of the target's difference."""
    if row.get("difference") is None:
        return "Nothing was compared."
    if row["low"] > 0:
        return "Yes."
    return "No, it lost." if row["high"] < 0 else "Not shown."
