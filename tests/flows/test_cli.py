"""The command line as a process: how it ends."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import time
from flows import cli

@cli.app.command("work")
def work() -> None:
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("stopped what it started", flush=True)

cli.main()
"""


def test_a_terminated_command_stops_what_it_started() -> None:
    argv = [sys.executable, "-c", COMMAND, "work"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        child.terminate()
        assert child.stdout.read() == "stopped what it started\n"
    assert child.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("command", [["rollback"], ["promote", "previous"], ["history"]])
def test_a_home_that_is_not_there_is_named_and_not_made(command: list[str], tmp_path: Path) -> None:
    mistyped = tmp_path / "hmoe"
    argv = [sys.executable, "-m", "flows.cli", *command, "--home", str(mistyped)]
    told = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert told.stderr.startswith("anchorage: ")
    assert told.stderr.count("\n") == 1
    assert str(mistyped) in told.stderr
    assert "does not exist" in told.stderr
    assert not mistyped.exists()
