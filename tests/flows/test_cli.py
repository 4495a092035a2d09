"""The command line as a process: how it ends."""

import signal
import subprocess
import sys

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
