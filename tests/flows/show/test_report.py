"""report.md: did it learn, for which rows, and nothing a completion says is rendered."""

import pytest

from agent.store.ledger import Entry
from flows.show.report import RoundReport, examples, gain_lines, history_table, markdown
from flows.show.terminal import show

ROW = {"n": 100, "anchor": 0.4, "champion": 0.4, "candidate": 0.6, "outcome": "pass"}


def sample(name, reward, text):
    return {"example_id": name, "reward": reward, "completion": text}


@pytest.mark.parametrize(
    ("figures", "answer"),
    [
        ({"difference": 0.2, "low": 0.1, "high": 0.3}, "Yes."),
        ({"difference": 0.02, "low": -0.1, "high": 0.1}, "Not shown."),
        ({"difference": -0.2, "low": -0.3, "high": -0.1}, "No, it lost."),
        ({"difference": None, "low": None, "high": None}, "Nothing was compared."),
    ],
)
def test_it_says_whether_it_learnt_with_effect_and_idle_generations(figures, answer):
    tasks = {"gsm8k": ROW | figures | {"role": "target"}}
    told = RoundReport("0001-gsm8k", "gsm8k", 3, "completed", "d" * 64, "hold", (), tasks)
    text = markdown(told, [{"no_op": None}, {"no_op": "no spread"}, {"no_op": None}], "")
    assert f"**Did it learn?** {answer} gsm8k: 40.0 % -> 60.0 %" in text
    assert "3 generations (1 without a step)" in text
    if figures["low"] is not None:
        assert f"({100 * figures['low']:+.1f} .. {100 * figures['high']:+.1f})" in text


def test_it_says_how_much_traffic_was_used_and_set_aside():
    tasks = {"gsm8k": ROW | {"difference": 0.2, "low": 0.1, "high": 0.3, "role": "target"}}
    rows = {"rows": 24, "from_traffic": 2, "set_aside": {"over_cap": 25, "gate": 0, "refused": 1}}
    rows["leaks"] = {"piqa": 3}
    report = RoundReport("0001-gsm8k", "gsm8k", 3, "ended", "d" * 64, "hold", (), tasks, rows=rows)
    line = "24 training prompts, 2 sent by clients; requests set aside: 25 over_cap, 1 refused."
    line += " Prompts that hold rows that judge: 3 of piqa."
    assert line in markdown(report, [], "")
    assert report.to_json()["rows"] == rows


def test_it_says_what_the_gain_is_made_of_and_what_it_cost():
    gain = {
        "n": 100, "accuracy": (0.4, 0.6), "alike": 80, "alike_accuracy": (0.45, 0.475),
        "format": (0.7, 0.99), "truncated": (0.2, 0.0), "tokens": (30.0, 12.0),
        "fixed": 25, "broken": 5, "tokens_spent": 2_000_000,
    }  # fmt: skip
    lines = "\n".join(gain_lines(gain))
    assert "Rows fixed: 25, broken: 5." in lines
    assert "right format: 70.0% -> 99.0%, cut at the limit: 20.0% -> 0.0%" in lines
    assert "mean length: 30.0 -> 12.0 tokens" in lines
    assert "Among the 80 rows whose answers kept format and length: 45.0% -> 47.5%." in lines
    assert "2,000,000 tokens: +10.0 points a million." in lines
    assert gain_lines({}) == []
    assert len(gain_lines({**gain, "alike_accuracy": None, "tokens": None, "tokens_spent": 0})) == 1


def test_fixed_and_broken_rows_stand_side_by_side_as_data():
    before = [sample("a", 0, "# shout"), sample("b", 1, "fine"), sample("c", 1, "same")]
    after = [sample("a", 1, "| good |"), sample("b", 0, "<b>bad"), sample("c", 1, "same")]
    text = examples(before, after)
    assert "## Fixed: 1" in text
    assert "## Broken: 1" in text
    assert text.index("    # shout") < text.index("    | good |") < text.index("    <b>bad")
    assert "same" not in text
    assert not [line for line in text.splitlines() if line.startswith(("# ", "|", "<"))]


def test_the_ledger_fits_80_columns_and_shows_a_reason_as_it_was_given(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    why = "worse: [bold]see[/nothing] :warning: " + "and so on " * 30
    entry = Entry(
        7, 0.0, 3, "host:1", "a" * 64, "ROLLED_BACK", why, {"p": 0.01}, "b" * 64, "c" * 64, "h"
    )
    show({}, False, history_table([entry]))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(line.strip("│┃").split("│")[-1] for line in lines).split())
    assert "worse: [bold]see[/nothing] :warning: and so on" in text
    assert "p=0.01" in text
    assert f"host:1; {'b' * 12} -> {'c' * 12}" in text
    assert "ROLLED_BACK aaaaaaaaaaaa" in "".join(lines)
