"""What commands say at their end, pure: the round's table, one next step, progress, key times."""

import io
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
import typer
from rich.console import Console

from agent.store.ledger import Entry
from flows.cli.records import _dated
from flows.cli.rounds import _end
from flows.learn.curve import members_note
from flows.serve.outlook import next_step
from flows.serve.swaps import ServeOutcome
from flows.show import terminal
from flows.show.report import RoundReport, history_table, measured_lines, round_table, table
from flows.show.terminal import Bars, Left, learning_lines, pairs, reporter, show, waiting_table

DIGEST = "d5688b74" + "0" * 56
FIGURES = {"n": 400, "anchor": 0.44, "champion": 0.44, "candidate": 0.96, "outcome": "pass"}
GAIN = {"difference": 0.52, "low": 0.47, "high": 0.57}


def text_of(*drawn: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    for each in drawn:
        console.print(each)
    return console.export_text()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("PASSED", "passed, not served: `anchorage promote d5688b74`"),
        ("AWAIT_REVIEW", "`anchorage review approve d5688b74 --reason ...`"),
        ("CANARY", "on trial, a share of live traffic decides"),
        ("HOLD", "held, not served: few rows"),
        ("REJECT", "rejected, the champion stays: few rows"),
        ("unchanged", "few rows"),
    ],
)
def test_a_round_ends_with_one_next_step(state: str, words: str) -> None:
    assert words in next_step(DIGEST, state, "few rows")


def report(verdict: str) -> RoundReport:
    prior = FIGURES | {"role": "prior", "candidate": 0.44} | dict.fromkeys(GAIN, 0.0)
    reasons = [
        {"task": "piqa", "outcome": "pass", "text": "piqa: no harm"},
        {"task": "gsm8k", "outcome": "pass", "text": "gsm8k: +52.0 points"},
    ]
    if verdict != "promote":
        reasons.append({"task": "piqa", "outcome": verdict, "text": "piqa: more rows needed"})
    tasks = {"gsm8k": FIGURES | GAIN | {"role": "target"}, "piqa": prior}
    return RoundReport("0001-gsm8k", "gsm8k", 3, "completed", DIGEST, verdict, reasons, tasks)


def test_improve_ends_with_the_table_of_the_demo_and_never_a_printed_dict() -> None:
    text = text_of(round_table(report("promote").to_json()), width=120)
    assert "gsm8k (target)" in text
    assert "+52.0 (+47.0 .. +57.0)" in text
    assert "promote" in text
    assert "{" not in text
    assert "piqa: more rows needed" in text_of(round_table(report("hold").to_json()), width=120)


def test_the_table_of_a_round_is_whole_on_80_characters() -> None:
    made = report("promote")
    names = ("gsm8k", "arc_challenge", "proofwriter", "hellaswag")
    tasks = {name: made.tasks["gsm8k" if name == "gsm8k" else "piqa"] for name in names}
    moved = {name: {"kl": 0.0123, "low": 0.0102, "high": 0.0151} for name in names}
    text = text_of(table(replace(made, tasks=tasks, shift={"candidate": moved})))
    assert "…" not in text
    for word in (*names, "(target)", "candidate", "difference", "+57.0)", "0.0151)", "pass"):
        assert word in text


def test_into_a_pipe_a_table_is_wider_than_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    show({}, False, pairs("t", {"k": "x" * 100}))
    assert "x" * 100 in capsys.readouterr().out


def test_a_promotion_is_explained_by_its_target_first() -> None:
    first, *_ = report("promote").decisive()
    assert first["text"] == "gsm8k: +52.0 points"
    why = "; ".join(str(each["text"]) for each in report("promote").decisive())
    row = Entry(2, 0.0, 1, "ann@host", DIGEST, "PASSED", why, {}, "a" * 64, "a" * 64, "")
    text = text_of(history_table([row]))
    assert "gsm8k: +52.0 points" in text
    assert "ann@host" in text
    assert "PASSED" in text


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (ServeOutcome("a", "a", "SWAPPED"), 0),
        (ServeOutcome("a", "b", "ROLLED_BACK", "probes differ"), 1),
        (ServeOutcome("a", "b", "REJECT"), 0),
        (ServeOutcome("a", "b", "APPROVED", "another version bakes"), 0),
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_a_swap_that_ends_in_the_old_version_is_no_success(
    outcome: ServeOutcome, code: int, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as end:
        _end(outcome.to_json(), "promoted", as_json)
    assert end.value.exit_code == code
    assert not code or "probes differ" in capsys.readouterr().out


def test_progress_beside_json_goes_to_stderr_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with reporter() as bars:
        bars.say("a round begins")
        bars.track("round", 8)(3)
    show({"done": True}, True)
    out, err = capsys.readouterr()
    assert out == '{\n "done": true\n}\n'
    assert "a round begins" in err
    assert "round (8)" in err


def test_a_round_tells_reward_spread_speed_and_time_left_from_its_first_member_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rewards = {0: np.array([1.0, 0.0]), 1: np.array([1.0, 1.0])}
    assert members_note(rewards, 300, 2.0) == "reward 0.750 +- 0.250, 150 tokens/s"
    with Bars() as bars:
        advance = bars.track("round", 240)
        advance(30)
        advance(31, "reward 0.750 +- 0.250")
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("  round: 31/240 after ")
    assert "left, reward 0.750" in line


def test_time_left_is_at_the_speed_since_the_work_went_on() -> None:
    left = Left(240)
    assert left.after(30, 100.0) == ""  # resumed here: what came before was not timed
    assert left.after(31, 110.0) == "35 min left"
    assert left.after(239, 310.0) == "1 s left"
    assert left.after(240, 320.0) == ""


def test_digests_and_paths_are_never_cut() -> None:
    long = "/" + "z" * 200
    text = text_of(pairs("exported", {"digest": DIGEST, "directory": long}), width=60)
    assert "…" not in text
    assert text.count("z") == 200


def test_an_evaluation_names_its_table_and_what_is_next(capsys: pytest.CaptureFixture[str]) -> None:
    path = f"/home/{'x' * 120}.parquet"
    show({}, False, *measured_lines({"table": path}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"answers: {path}"
    assert f"`anchorage rescore {path}`" in lines[1]


def test_times_of_keys_are_dates() -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    shown = _dated({"key_id": "k", "created": at.timestamp(), "expires": None, "revoked": None})
    assert shown["created"] == "2026-01-02T03:04:05+00:00"
    assert shown["expires"] is None


LEARNING: dict[str, Any] = {
    "target": "gsm8k",
    "review": "manual",
    "round": {
        "round": "0003-gsm8k", "state": "learning", "generation": 4, "generations": 15,
        "reward": 0.52, "minutes_left": 3.2,
    },
    "next_round": "none is scheduled",
    "waiting": [{"digest": DIGEST, "state": "AWAIT_REVIEW", "gain": 0.52, "next": "approve it"}],
    "traffic": {
        "new_rows": 12, "waiting_for_their_row": 3, "unverified": 1,
        "set_aside": {"over_cap": 25, "gate": 0},
    },
    "feedback": [{"metric": "thumbs", "n": 4, "mean": 0.75}],
}  # fmt: skip


def test_status_shows_round_candidates_traffic_and_feedback() -> None:
    lines = learning_lines(LEARNING)
    learning = "0003-gsm8k: learning, generation 4 of 15, mean reward 0.52, 3 min left"
    assert lines["round"] == f"{learning}, then the evaluation"
    assert lines["set aside"] == "25 over cap, 1 unverified: `anchorage collect` says why"
    assert lines["new verified rows"] == "12 of gsm8k"
    assert lines["candidate d5688b740000"] == "+52.0 points, approve it"
    assert lines["feedback thumbs"] == "4, mean 0.75"
    assert "d5688b740000" in text_of(waiting_table(LEARNING["waiting"]))
    idle = learning_lines(LEARNING | {"round": None, "waiting": [], "feedback": []})
    assert idle["round"] == "none runs"


def test_where_no_bar_is_drawn_the_first_member_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY", 3600.0)
    with Bars() as bars:
        advance = bars.track("round", 240)
        for done in range(1, 4):
            advance(done, "reward 0.1 +- 0.0")
    _, *lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("  round: 1/240")
