"""The files beside a round: kept whole, read back, and refused where they are not the round's."""

import json
from pathlib import Path

import pytest

from agent.errors import UserError
from agent.home import Home
from flows.round_files import RoundFiles

ROWS = [{"row": {"question": text}, "messages": [], "sent": True} for text in "abc"]


@pytest.fixture
def files(tmp_path: Path) -> RoundFiles:
    return RoundFiles(Home.at(tmp_path), "0001-gsm8k")


def test_a_round_without_files_reads_as_empty(files: RoundFiles) -> None:
    assert (files.rows(), files.curve(), files.pace(), files.judged()) == ([], (), (), None)
    assert files.shown() == {"generations": 0, "report": None}
    assert files.judged_at() is None
    assert not files.given_up()


def test_rows_are_read_back_only_as_they_were_written(files: RoundFiles, tmp_path: Path) -> None:
    sha256 = files.write_rows(ROWS)
    assert files.original_rows(sha256) == ROWS
    path = tmp_path / "runs" / "0001-gsm8k" / "rows.json"
    path.write_text(json.dumps(ROWS[::-1]))
    with pytest.raises(UserError, match="not the rows that round 0001-gsm8k was opened with"):
        files.original_rows(sha256)
    path.unlink()
    with pytest.raises(UserError, match=r"rows\.json"):
        files.original_rows(sha256)


@pytest.mark.parametrize("finished", [True, False])
def test_deleted_rows_leave_the_others_in_their_places(files: RoundFiles, finished: bool) -> None:
    files.write_rows(ROWS)
    files.blank_rows([], finished=finished)
    assert not files.given_up()
    files.blank_rows([1], finished=finished)
    assert files.rows() == [ROWS[0], None, ROWS[2]]
    assert files.given_up() is not finished


def test_a_generation_that_is_timed_again_replaces_its_row(files: RoundFiles) -> None:
    for generation, seconds in ((0, 1.0), (1, 2.0), (1, 3.0)):
        files.add_to_pace({"generation": generation, "seconds.generation": seconds})
    assert [row["seconds.generation"] for row in files.pace()] == [1.0, 3.0]
    files.add_to_curve([{"generation": 0, "task": "gsm8k", "accuracy": 0.5, "n": 2}])
    files.add_to_curve([{"generation": 1, "task": "gsm8k", "accuracy": 1.0, "n": 2}])
    assert [point["accuracy"] for point in files.curve()] == [0.5, 1.0]


def test_a_verdict_that_is_written_again_is_to_be_shown_again(files: RoundFiles) -> None:
    files.write_judged({"verdict": "hold"}, {"anchor": ["a.parquet"]})
    assert files.judged() == {"report": {"verdict": "hold"}, "tables": {"anchor": ["a.parquet"]}}
    files.write_shown(3, files.judged_at())
    assert files.shown() == {"generations": 3, "report": files.judged_at()}
    files.write_judged({"verdict": "hold"}, {"anchor": ["a.parquet"]})
    assert files.shown()["report"] != files.judged_at()
    files.forget_shown()
    assert files.shown()["generations"] == 0
