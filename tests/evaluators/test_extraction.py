"""The two extractions that come with the package: rows, verdicts, and templates kept apart."""

from pathlib import Path

import pytest

from evaluators.examples import extraction
from evaluators.loading import resolve, rows
from evaluators.task import Task, judge

FILE = Path(extraction.__file__)


@pytest.fixture(params=["ORDERS", "DATES"])
def task(request: pytest.FixtureRequest) -> Task:
    return resolve(f"{FILE}:{request.param}")


def test_the_files_hold_what_the_generator_makes(task: Task) -> None:
    for split, name, count in (("train", "train", 2400), ("eval", "test", 800)):
        made = {row["id"]: row for row in extraction.rows(task.name, name, count)}
        read = {row["id"]: row for row in rows(task, split)}  # type: ignore[arg-type]
        assert read == made


def test_no_template_of_the_test_rows_is_trained_on() -> None:
    for templates in (extraction.DATED, extraction.ORDERED):
        assert set(templates["train"]).isdisjoint(templates["test"])


@pytest.mark.parametrize(
    ("completion", "reward", "form"),
    [
        ('{"item": "pens", "quantity": 3, "name": "Li Wei", "city": "Oslo"}', 1.0, 1.0),
        ('{"city": "Oslo", "name": "Li Wei", "quantity": 3, "item": "pens"}\nThanks', 1.0, 1.0),
        ('{"item": "pens", "quantity": "3", "name": "Li Wei", "city": "Oslo"}', 0.0, 1.0),
        ('{"item": "pens", "quantity": 3, "name": "Li Wei"}', 0.0, 1.0),
        ("[3]", 0.0, 0.0),
        ("{" * 5000, 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_an_order_is_right_in_all_its_values(completion: str, reward: float, form: float) -> None:
    row = {"answer": {"item": "pens", "quantity": 3, "name": "Li Wei", "city": "Oslo"}}
    verdict = judge(extraction.ORDERS, completion, row)
    assert (verdict.reward, verdict.format, verdict.error) == (reward, form, None)


@pytest.mark.parametrize(
    ("completion", "reward", "form"),
    [("2001-02-03", 1.0, 1.0), ("From 1999-01-01 to 2001-02-03.", 1.0, 1.0),
     ("2001-2-3", 0.0, 0.0), ("2001-03-02", 0.0, 1.0), ("", 0.0, 0.0)],
)  # fmt: skip
def test_a_date_is_right_in_iso_form(completion: str, reward: float, form: float) -> None:
    verdict = judge(extraction.DATES, completion, {"answer": "2001-02-03"})
    assert (verdict.reward, verdict.format, verdict.error) == (reward, form, None)
