"""How long a client's text stays: in the experience store, and in the files of rounds.

A round keeps the rows it asks beside itself, so that it can be taken up after a crash. Rows that
came from traffic are taken out of that file once the store has forgotten them.
"""

import json
import time
from collections.abc import Collection

from agent.store.forget import expire, gone
from agent.store.records import Run
from deploy.serving.served import write_atomically
from flows.service import Service

DAY_S = 86_400.0
GIVEN_UP = "given_up"  # a file beside a round's rows


def sweep(service: Service) -> int:
    """Delete what is older than the settings allow; how many interactions went."""
    before = time.time() - service.settings.gateway.retention_days * DAY_S
    removed = expire(service.experience, before)
    for round_id, positions in gone(service.experience).items():
        blank(service, round_id, positions)
    return removed


def blank(service: Service, round_id: str, positions: Collection[int]) -> None:
    """Take rows out of a round's file; the others keep their places.

    A round that is not finished cannot be taken up any more: it is marked, and a new one begins.
    """
    folder = service.home.runs / round_id
    path = folder / "rows.json"
    if not path.is_file():
        return
    rows = json.loads(path.read_text(encoding="utf-8"))
    left = [None if place in positions else row for place, row in enumerate(rows)]
    if left != rows:
        if service.journal.run(round_id).digest is None:
            (folder / GIVEN_UP).touch()
        write_atomically(path, json.dumps(left))


def given_up(service: Service, run: Run) -> bool:
    """Whether an open round lost rows that somebody wanted forgotten."""
    return (service.home.runs / run.run_id / GIVEN_UP).exists()
