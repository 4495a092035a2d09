"""A loop that is due more often than its rounds end, and one that comes back after a pause."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.consoles import USER
from evaluators import examples

pytestmark = pytest.mark.integration

EXAMPLES = Path(examples.__file__).parent
PLANNED = 7  # runs that lie ahead, of which five fall into a pause of two minutes
CALM = """
[learner]
generations = 1
population = 2
prompts = 8

[tasks]
target = "json_answer"
files = ["{own}/json_answer.py:TASK"]
rows = 16
curve_every = 0
kl_rows = 0
priors = ["refusal"]

[gate]
confirm = false

[projection]
loop_minutes = 0.25
"""


def command(*words: str, home: Path) -> Any:
    """What a command prints with --json."""
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *words, "--json", "--home", str(home)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def loops(status: dict[str, Any], home: Path, state: str = "not_any_") -> list[dict[str, Any]]:
    """Prefect's runs of the loop whose time has come, in the order they were planned.

    state: "any_" for those whose time has not come yet.
    """
    url, owner = status["prefect"], (USER, (home / "password").read_text())
    body = {
        "sort": "EXPECTED_START_TIME_ASC",
        "flows": {"name": {"any_": ["loop"]}},
        "flow_runs": {"state": {"type": {state: ["SCHEDULED"]}}},
    }
    reply = httpx.post(f"{url}/api/flow_runs/filter", json=body, auth=owner, timeout=30)
    found: list[dict[str, Any]] = reply.raise_for_status().json()
    return found


@pytest.mark.timeout(1800)
def test_rounds_every_quarter_of_a_minute_and_one_after_a_pause(
    tmp_path: Path, scale: Callable[[int, int], int]
) -> None:
    """Ten minutes of rounds that take longer than their interval; then down for two minutes."""
    if scale(0, 1) == 0:
        pytest.skip("a quarter of an hour: in the soak")
    config, home = tmp_path / "anchorage.toml", tmp_path / "home"
    for name in ("json_answer.py", "json_answer.jsonl"):
        shutil.copy(EXAMPLES / name, tmp_path)
    config.write_text(CALM.format(own=tmp_path), encoding="utf-8")
    status = command("up", "--config", str(config), home=home)
    try:
        time.sleep(600)
        before = loops(status, home)
        # Prefect plans once a minute, and a round's end takes back what was planned: the pause
        # begins when runs are planned for it.
        until = time.monotonic() + 180
        while len(loops(status, home, "any_")) < PLANNED:
            assert time.monotonic() < until
            time.sleep(1)
        command("down", home=home)
        downed = datetime.now(UTC).isoformat()
        time.sleep(120)
        back = datetime.now(UTC).isoformat()
        status = command("up", home=home)
        runs, until = before, time.monotonic() + 400
        while not rounds(runs, downed, ended=True) and time.monotonic() < until:
            time.sleep(2)
            with suppress(httpx.TransportError):  # `up` does not wait for Prefect
                runs = loops(status, home)
    finally:
        command("down", home=home)
    names = Counter(run["state_name"] for run in before)
    assert set(names) <= {
        "Held",
        "Rejected",
        "Unchanged",
        "Completed",
        "Promoted",
        "Skipped",
        "Running",
    }
    assert len(rounds(before, "", ended=True)) >= 3, names
    # Of all that were due meanwhile exactly one round was started, and the others say why not.
    late = [run for run in runs if downed < run["expected_start_time"] < back]
    assert len(late) >= 5
    skipped = [run for run in late if "catches up" in run["state"]["message"]]
    (first,) = rounds(runs, downed, ended=True)
    begun = [run for run in rounds(runs, downed) if run["start_time"] < first["end_time"]]
    assert begun == [first]
    assert [run for run in late if run not in skipped] in ([], [first])
    cut_off = [run["state_name"] for run in runs if run["expected_start_time"] < downed]
    assert "Running" not in cut_off  # what `down` ended is shown so


def rounds(runs: list[dict[str, Any]], since: str, ended: bool = False) -> list[dict[str, Any]]:
    """Runs planned after a moment that did a round, not only said why not."""
    did = [run for run in runs if run["state_name"] not in ("Skipped", "Pending")]
    done = [run for run in did if run["end_time"] or not ended]
    return [run for run in done if run["expected_start_time"] > since]
