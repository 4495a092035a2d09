"""The first hour of a new user, as a script on real parts, ends in a promoted version."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).with_name("first_hour.sh")


def test_the_first_hour_ends_in_a_promoted_version_of_an_own_task(
    tmp_path: Path, scale: Callable[[int, int], int]
) -> None:
    if scale(0, 1) == 0:
        pytest.skip("a stack and a whole round: in the soak; test_docs.py compares the texts")
    environment = {name: value for name, value in os.environ.items() if "ANCHORAGE_" not in name}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", str(SCRIPT)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answered = re.findall(r"^(\d+) of 96 right, answered by version (\w+)$", done.stdout, re.M)
    (before, old), (after, new) = ((int(right), version) for right, version in answered)
    assert old != new
    assert after > before + 10
