"""Engines in containers: who listens is known by the kernel, who is killed is started again."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from agent.home import Home
from deploy.serving.control import ControlError, listener_of
from deploy.serving.engines import ContainerEngines, engines_of
from deploy.serving.served import BLUE
from deploy.supervise import end, with_children

pytestmark = pytest.mark.proof

# A platform that starts its container again, and a container that answers after a moment.
SERVER = """
import os, socketserver, sys, time
from http.server import BaseHTTPRequestHandler
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
    def log_message(self, *_): pass
    def address_string(self): return "unix"
if os.path.exists(sys.argv[1]): os.unlink(sys.argv[1])
time.sleep(0.2)
socketserver.ThreadingUnixStreamServer(sys.argv[1], Handler).serve_forever()
"""
PLATFORM = 'while true; do "$0" -c "$1" "$2"; done'


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home.at(tmp_path / "h")
    home.sockets.mkdir()
    argv = ["bash", "-c", PLATFORM, sys.executable, SERVER, str(home.engine_socket(BLUE))]
    with subprocess.Popen(argv) as platform:
        yield home
        found = psutil.Process(platform.pid)
        found.suspend()  # it starts no other while its children are counted
        end(with_children([found]), grace_s=0.0)


def test_a_killed_engine_is_another_process_when_it_answers_again(home: Home) -> None:
    engines = ContainerEngines(home, start_s=30.0)
    engines.start(BLUE)
    first = engines.pid(BLUE)
    assert first is not None
    assert SERVER in psutil.Process(first).cmdline()
    engines.restart(BLUE, instead_of=first)
    second = engines.pid(BLUE)
    assert second not in (None, first)
    assert not psutil.pid_exists(first)
    engines.restart(BLUE, instead_of=first)  # it is another one already
    assert engines.pid(BLUE) == second


def test_what_the_platform_owns_is_not_stopped(home: Home) -> None:
    with pytest.raises(ControlError, match="in-place"):
        ContainerEngines(home).stop(BLUE)


def test_without_a_supervisor_the_platform_is_in_charge(home: Home) -> None:
    assert isinstance(engines_of(home), ContainerEngines)


def test_nobody_listens_on_a_file_or_a_dead_socket(tmp_path: Path) -> None:
    assert listener_of(tmp_path / "none.sock") is None
    engines = ContainerEngines(Home.at(tmp_path), start_s=0.2)
    began = time.monotonic()
    with pytest.raises(ControlError, match="does not start"):
        engines.start(BLUE)
    assert time.monotonic() - began >= 0.2
