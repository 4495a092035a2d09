"""`task check`: rows by use, what the gate can do with them, and the base model on them."""

from dataclasses import replace
from pathlib import Path

import pytest

from agent.errors import UserError
from agent.sections import GateSettings
from evaluators.gate import GateRules
from evaluators.tasks import TASKS
from flows.commands.task_check import (
    RowCounts,
    check_task,
    gain_shows,
    gate_lines,
    least_rows,
    means,
    passes,
)
from flows.show.terminal import Silent, check_lines

RULES = GateRules.of(GateSettings())
OWN = """
from dataclasses import replace
from evaluators.examples.json_answer import TASK
TASK = replace(TASK, name="mine", source=replace(TASK.source, file="rows.jsonl"){more})
"""


def test_thirty_one_rows_hold_a_candidate_that_loses_nothing_and_it_is_said() -> None:
    text = "\n".join(gate_lines(TASKS["gsm8k"], RowCounts(238, 31, 31), RULES))
    assert "rows: 238 train, 31 judge, 31 are sealed" in text
    assert "HOLDS EVERY CANDIDATE" in text
    least = least_rows(lambda n: passes("gsm8k", n, 0, RULES))
    assert f"{least} to judge and {least} sealed are needed" in text
    assert passes("gsm8k", least, 0, RULES)
    assert not passes("gsm8k", least - 1, 0, RULES)
    assert least > 31


def test_with_enough_rows_it_says_how_many_may_be_lost() -> None:
    (_, prior, target) = gate_lines(TASKS["gsm8k"], RowCounts(1000, 400, 800), RULES)
    lost = int(prior.split("at most ")[1].split(" of 400")[0])
    assert passes("gsm8k", 400, lost, RULES)
    assert not passes("gsm8k", 400, lost + 1, RULES)
    assert 0 < lost < 40
    assert "a gain can be shown" in target


def test_a_target_with_too_few_rows_shows_no_gain() -> None:
    text = "\n".join(gate_lines(TASKS["gsm8k"], RowCounts(9, 5, 4), RULES))
    assert "NO GAIN CAN BE SHOWN on 5 rows" in text
    assert not gain_shows("gsm8k", 5, RULES)
    assert gain_shows("gsm8k", least_rows(lambda n: gain_shows("gsm8k", n, RULES)), RULES)


def test_a_prior_task_only_has_no_line_as_a_target() -> None:
    assert len(gate_lines(TASKS["piqa"], RowCounts(0, 400, 800), RULES)) == 2


def test_zero_tolerance_and_graded_tasks_are_judged_by_their_own_rules() -> None:
    strict = replace(RULES, zero_tolerance=frozenset({"refusal"}))
    assert passes("refusal", 25, 0, strict)
    assert not passes("refusal", 25, 1, strict)
    graded = replace(RULES, graded=frozenset({"essay"}))
    wanted = least_rows(lambda n: passes("essay", n, 0, graded))
    assert wanted >= least_rows(lambda n: passes("essay", n, 0, RULES))


@pytest.mark.parametrize(
    ("rewards", "words"),
    [([0.0, 0.0], "nothing to select"), ([1.0, 1.0], "nothing to gain"), ([0.0, 1.0], "can learn")],
)
def test_what_the_base_model_says_about_learning(rewards: list[float], words: str) -> None:
    assert words in means(rewards)


def test_an_own_file_is_checked_without_making_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANCHORAGE_HOME", raising=False)
    source = Path(__file__).parents[3] / "evaluators" / "examples" / "json_answer.jsonl"
    (tmp_path / "rows.jsonl").write_text("\n".join(source.read_text().splitlines()[:150]))
    (tmp_path / "mine.py").write_text(OWN.replace("{more}", ""))
    document = check_task(f"{tmp_path}/mine.py:TASK", 100, None, False, Silent())
    # On a machine that is busy a verdict may take longer than is allowed.
    assert [each for each in document["problems"] if " takes " not in each] == []
    counts = document["counts"]
    assert counts["training"] + counts["gate"] + counts["sealed"] == 150
    assert counts["gate"] - counts["sealed"] in (0, 1)
    assert "HOLDS EVERY CANDIDATE" in "\n".join(check_lines(document))
    assert sorted(each.name for each in tmp_path.iterdir() if each.name[0] == ".") == []


def test_the_same_mistake_on_every_row_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = Path(__file__).parents[3] / "evaluators" / "examples" / "json_answer.jsonl"
    (tmp_path / "rows.jsonl").write_text("\n".join(source.read_text().splitlines()[:150]))
    more = ', gold=lambda row: "nothing"'
    (tmp_path / "mine.py").write_text(OWN.replace("{more}", more))
    document = check_task(f"{tmp_path}/mine.py:TASK", 100, None, False, Silent())
    (line,) = document["problems"]
    assert "more like this" in line


def test_a_task_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task 'nosuch' is not known; allowed: countdown"):
        check_task("nosuch", 10, tmp_path, False, Silent())
