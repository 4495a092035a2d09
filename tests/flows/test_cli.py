"""The command line as a process: how it ends."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent.config import load
from agent.home import Home
from flows.service import Service

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


STATUS = """
import sys
from flows.cli import app
try:
    app(["status", "--json", "--home", sys.argv[1]])
except SystemExit as ended:
    print({"torch", "numba", "mlflow", "prefect"} & set(sys.modules), ended.code, file=sys.stderr)
"""


def test_status_loads_none_of_the_slow_libraries(tmp_path: Path) -> None:
    """On a home that has served; torch alone takes seconds."""
    service = Service(Home.at(tmp_path), load())
    service.home.settings_json.write_text(service.settings.model_dump_json())
    service.champion()
    service.close()
    argv = [sys.executable, "-c", STATUS, str(tmp_path)]
    told = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert json.loads(told.stdout)["learning"]["target"] == "gsm8k"
    assert told.stderr.strip() == "set() 0"
