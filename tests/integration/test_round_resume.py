"""kill -9 of a real round, on a real engine: it goes on at member grain and ends the same."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from postgres_server import PostgresProcess, needs_server

pytestmark = pytest.mark.integration


def test_a_real_round_killed_anywhere_ends_where_the_undisturbed_one_does(
    tmp_path: Path, scale: Callable[[int, int], int]
) -> None:
    compare(tmp_path, scale(1, 10))


@needs_server
def test_so_it_does_on_a_server_that_is_killed_as_well(
    tmp_path: Path, scale: Callable[[int, int], int]
) -> None:
    """The undisturbed round is on SQLite: a digest does not depend on where the journal is."""
    if scale(0, 1) == 0:
        pytest.skip("rounds on a server that is killed: in the soak")
    server = PostgresProcess()
    try:
        with server.disturbed(3, up_s=7.0, away_s=2.0) as url:
            said = compare(tmp_path, 3, url)
    finally:
        server.remove()
    assert "does not answer" in said
    assert "a-secret" not in said


def compare(tmp_path: Path, trials: int, *more: str) -> str:
    """Rounds that are killed and go on against an undisturbed one; what they said."""
    script = Path(__file__).with_name("real_rounds.py")
    ran = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "rounds"), str(trials), "3", *more],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        timeout=880,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    whole, *others = json.loads(ran.stdout)
    assert whole["no_ops"] < 3  # it learnt something: equal digests say more than "nothing moved"
    assert len(whole["log"]) == 2 * 12
    assert len(others) == trials
    assert sum(found["kills"] for found in others) >= trials
    for found in others:
        for same in ("rewards", "deltas", "digest", "replayed", "kept"):
            assert found[same] == whole[same], same
        known = [line for line in found["log"] if line.startswith("known")]
        assert len(known) == len(set(known))  # nothing the journal knew was evaluated again
        assert len(found["log"]) - len(known) <= 12 + found["kills"]
    return ran.stderr
