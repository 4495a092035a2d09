"""Trials that leave a file are run once, by one process, and again when their file is damaged."""

import json
from pathlib import Path

import pytest

from agent.errors import UserError
from agent.home import locked, write_sealed
from flows.lab.trials import PairedRun, Result, paired, read, results, run_missing
from flows.show.terminal import Silent

TRIALS = paired("folder/m", ("t",), ("a", "b"), 2)
KEYS = ("trial",)


class Heard(Silent):
    """A reporter that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def missing(folder: Path, heard: Heard | None = None) -> tuple[list[str], list[PairedRun]]:
    """Names of the trials that ran, and the trials that another process is at."""
    ran: list[str] = []

    def run(trial: PairedRun, place: Path) -> Result:
        assert place.is_dir()
        ran.append(trial.name)
        return {"trial": trial.name}

    out, work = folder / "out", folder / "work"
    return ran, run_missing(TRIALS, out, work, KEYS, heard or Heard(), run)


def test_seeds_come_one_after_the_other() -> None:
    assert [trial.name for trial in TRIALS] == ["m-t-a-1", "m-t-b-1", "m-t-a-2", "m-t-b-2"]


def test_a_trial_with_a_file_is_not_run_again(tmp_path: Path) -> None:
    assert missing(tmp_path) == ([trial.name for trial in TRIALS], [])
    assert missing(tmp_path) == ([], [])
    assert [each["trial"] for each in results(tmp_path / "out", "m", KEYS)] == [
        "m-t-a-1", "m-t-a-2", "m-t-b-1", "m-t-b-2",
    ]  # fmt: skip


@pytest.mark.parametrize("harm", ["cut", "changed", "other"])
def test_a_damaged_file_is_named_and_its_trial_runs_again(tmp_path: Path, harm: str) -> None:
    missing(tmp_path)
    path = tmp_path / "out" / "m-t-b-1.json"
    text = path.read_text()
    harmed = {"cut": text[:20], "changed": text.replace("m-t-b-1", "m-t-b-9"), "other": "{}"}
    path.write_text(harmed[harm])
    with pytest.raises(UserError, match=r"m-t-b-1\.json: is "):
        read(path, KEYS)
    heard = Heard()
    assert missing(tmp_path, heard)[0] == ["m-t-b-1"]
    assert [line for line in heard.lines if str(path) in line and "again" in line]
    assert path.read_text() == text


def test_a_trial_of_another_process_is_left_to_it(tmp_path: Path) -> None:
    place = tmp_path / "work" / "m-t-b-1"
    place.mkdir(parents=True)
    with locked(place / "trial.lock", taken=""):
        ran, elsewhere = missing(tmp_path)
    assert ran == ["m-t-a-1", "m-t-a-2", "m-t-b-2"]
    assert [trial.name for trial in elsewhere] == ["m-t-b-1"]


def test_a_trial_that_another_process_ends_meanwhile_is_not_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran: list[str] = []

    def run(trial: PairedRun, place: Path) -> Result:
        ran.append(trial.name)
        for other in TRIALS[1:]:
            write_sealed(out / f"{other.name}.json", {"trial": other.name})
        return {"trial": trial.name}

    assert run_missing(TRIALS, out, tmp_path / "work", KEYS, Heard(), run) == []
    assert ran == ["m-t-a-1"]
    assert len(json.loads((out / "m-t-b-2.json").read_text())) == 2  # the trial and its seal
