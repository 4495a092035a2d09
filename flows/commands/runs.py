"""Commands that act on the loop: as Prefect flows where the stack is up, else directly.

Each imports what it needs: a rollback does not wait for what a round is learnt and shown with.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.home import Home
from flows.serve.stack import connected
from flows.session import session
from flows.show.progress import Reporter


def improve_now(
    home: Path | None, target: str | None, changes: Mapping[str, Any], progress: Reporter
) -> dict[str, Any]:
    """Learn one round, or go on with an interrupted one, and weigh its candidate; serve nothing."""
    from flows.learn import loop
    from flows.serve import promote
    from flows.show import mlflow

    place = Home.at(home)
    with connected(place) as is_up, session(place.root, progress) as opened:
        name = opened.service.target(target).name
        if is_up:
            from flows.deployments import run_flow

            made = run_flow("improve", str(place.root), name, dict(changes))
            told: dict[str, Any] = run_flow("evaluate", str(place.root), made["round"])
        else:
            service = opened.service
            mlflow.attempt("anchor", lambda: mlflow.show_anchor(service))
            learnt = loop.learn(opened, name, changes)
            told = loop.weigh(opened, learnt.run_id).report.to_json()
        promote.act(opened, told["digest"])
        return told | {"state": opened.service.ledger.state(told["digest"])}


def weigh_now(home: Path | None, digests: Sequence[str], progress: Reporter) -> dict[str, str]:
    """Have the gate judge candidates that were proposed without a round: digest -> its state."""
    from flows.learn import loop
    from flows.serve import promote

    place = Home.at(home)
    told: dict[str, str] = {}
    with connected(place), session(place.root, progress) as opened:
        ledger = opened.service.ledger
        for digest in digests:
            if ledger.state(digest) == "PROPOSED":
                loop.weigh(opened, opened.service.journal.candidate(digest).run_id)
                promote.act(opened, digest)
            told[digest] = str(ledger.state(digest))
    return told


def promote_now(home: Path | None, digest: str, progress: Reporter) -> dict[str, Any]:
    """Serve a digest."""
    from flows.serve import promote

    place = Home.at(home)
    with connected(place), session(place.root, progress) as opened:
        return promote.promote(opened, opened.service.find(digest), "by hand").to_json()


def rollback_now(home: Path | None, digest: str, reason: str, progress: Reporter) -> dict[str, Any]:
    """Serve an earlier digest again; a stack that is up shows it in MLflow at its next look."""
    from flows.serve import swaps

    place = Home.at(home)
    with connected(place) as is_up, session(place.root, progress) as opened:
        chosen = opened.service.find(digest)
        return swaps.rollback(opened, chosen, reason, show=not is_up).to_json()


def move_anchor_now(
    home: Path | None, digest: str, reason: str, progress: Reporter
) -> dict[str, Any]:
    """Tie later rounds to the champion."""
    from flows.serve import promote

    place = Home.at(home)
    with connected(place), session(place.root, progress) as opened:
        return promote.move_anchor(opened, opened.service.find(digest), reason).to_json()


def review_now(
    home: Path | None, digest: str, word: str, reason: str, progress: Reporter
) -> dict[str, Any]:
    """Approve or reject a waiting digest."""
    from flows.serve import promote

    place = Home.at(home)
    with connected(place), session(place.root, progress) as opened:
        return promote.review(opened, opened.service.find(digest), word, reason).to_json()
