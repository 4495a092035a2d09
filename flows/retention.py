"""How long a client's text stays: in the experience store, and in the files of rounds.

A round keeps the rows it asks beside itself, so that it can be taken up after a crash. Rows that
came from traffic are taken out of that file once the store has forgotten them.
"""

import json
import time
from collections.abc import Collection

from agent.store.forget import expire, gone
from deploy.serving.served import write_atomically
from flows.service import Service

DAY_S = 86_400.0


def sweep(service: Service) -> int:
    """Delete what is older than the settings allow; how many interactions went."""
    before = time.time() - service.settings.gateway.retention_days * DAY_S
    removed = expire(service.experience, before)
    for round_id, positions in gone(service.experience).items():
        blank(service, round_id, positions)
    return removed


def blank(service: Service, round_id: str, positions: Collection[int]) -> None:
    """Take rows out of a round's file, where they stand; an interrupted round goes on without.

    Columns keep their places: a finished round has nothing there, an open one asks another of its
    rows instead.
    """
    path = service.home.runs / round_id / "rows.json"
    if not path.is_file():
        return
    rows = json.loads(path.read_text(encoding="utf-8"))
    open_round = service.journal.run(round_id).digest is None
    others = [row for place, row in enumerate(rows) if place not in positions]
    found = list(rows)
    for place in positions:
        found[place] = others[place % len(others)] if open_round and others else None
    if found != rows:
        write_atomically(path, json.dumps(found))
