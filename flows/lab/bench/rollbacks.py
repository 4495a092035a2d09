"""Times of rollbacks on a running service: by a call in this process, and by the command.

    served    from the call until the earlier version is verified and chosen (serving.json)
    whole     from the call until everything is written (MLflow follows by itself)

The act is `flows.serve.swaps.rollback`, as flows and baking call it; the command is
`anchorage rollback`, so its times hold the start of a Python process too.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from agent.errors import UserError
from deploy.serving.served import Served, read_served
from flows.serve import promote, swaps
from flows.service import Service
from flows.session import Session
from flows.show.progress import Reporter, Silent

ROLLBACK_S = 2.0  # longest rollback by call


def rollbacks(
    service: Service, other: Served, count: int, progress: Reporter
) -> dict[str, dict[str, float]]:
    """Promote ``other`` and roll back ``count`` times by call and by command; seconds."""
    _known(service, other)
    session, root = Session(service, Silent()), str(service.home.root)
    if read_served(service.home).digest != service.champion():
        swaps.serve_champion(session)

    def act() -> None:
        swaps.rollback(session, service.anchor.digest, "a bench")

    def command() -> None:
        argv = [sys.executable, "-m", "flows.cli", "rollback", "previous", "--home", root, "--json"]
        finished = subprocess.run(argv, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise UserError(f"anchorage rollback: {finished.stderr.strip()}")

    timings = {}
    for name, back in (("act", act), ("command", command)):
        advance = progress.track(f"rollbacks, {name}", count)
        timings[name] = _timed(session, other, count, back, advance)
    return {"setup": {"count": count}, **timings}


def within(timings: Mapping[str, Any]) -> bool:
    """Whether every rollback by call was fast enough."""
    return bool(timings["act"]["whole_max_s"] <= ROLLBACK_S)


def _timed(
    session: Session,
    other: Served,
    count: int,
    back: Callable[[], None],
    advance: Callable[[int], None],
) -> dict[str, float]:
    service, served, whole = session.service, [], []
    chosen = service.home.serving_json
    for done in range(count):
        promote.promote(session, other.digest, "a bench")
        began = time.time()  # as files tell it
        back()
        whole.append(time.time() - began)
        if read_served(service.home).digest != service.anchor.digest:
            raise UserError(f"rollback: {read_served(service.home).digest} is served")
        served.append(chosen.stat().st_mtime - began)
        advance(done + 1)
    return {
        "served_p50_s": median(served),
        "served_max_s": max(served),
        "whole_p50_s": median(whole),
        "whole_max_s": max(whole),
    }


def _known(service: Service, other: Served) -> None:
    """Journal and ledger as after a round that made ``other`` and passed the gate."""
    anchor, run = service.anchor.digest, "0001-bench"
    service.journal.open_run(
        run,
        anchor_digest=anchor,
        parent_digest=anchor,
        target=service.target().name,
        run_seed=0,
        plan={},
        now=time.time(),
    )
    service.journal.finish(run, other.digest, "a bench", time.time())
    for state in ("PROPOSED", "EVALUATED", "PROMOTE"):
        service.record(other.digest, state, "a bench")
