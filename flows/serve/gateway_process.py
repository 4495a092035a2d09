"""The gateway's process: the endpoint of one home, with its settings, keys, tasks and versions."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent.errors import UserError
from agent.gateway.admin import create_admin
from agent.gateway.app import create_app
from agent.gateway.exchange import Versions
from agent.gateway.requests import ServedModel
from agent.gateway.serve import serve
from agent.gateway.verifier import RowRefusedError
from agent.store.experience import Unjudged
from deploy.serving.served import SLOTS, read_served, read_slot
from deploy.serving.watchdog import settled
from evaluators.held_out import HeldOut
from evaluators.task import Verdict, judge, judge_conversation
from evaluators.tasks import TASKS
from flows.learn.collect import admission, admit, held_out
from flows.learn.prompts import whole
from flows.service import Service

SERVER_S = 5.0  # longest wait for a database server at once; rows are written again and again
NAMES_S = 1.0  # between two readings of the names that a server's ledger gives to versions


def run(service: Service, port: int) -> None:
    """Serve the endpoint until a signal ends it."""
    service.wait_s = SERVER_S
    served = read_served(service.home)
    judging_rows: Future[HeldOut] = Future()
    public = create_app(
        service.settings.gateway,
        served_model(service),
        upstream=service.home.engine_socket(served.slot),
        verify=lambda answer, row: verify(service, answer, row, judging_rows),
        check=lambda task, row: admit(service, service.task(task), row),
        experience=service.experience,
        version=served.digest,
        recover=lambda _before: settled(service.home),
        versions=versions(service),
    )
    threading.Thread(target=warm, args=[service, judging_rows], name="warm", daemon=True).start()
    serve(
        public,
        create_admin(public),
        service.settings.gateway,
        port=port,
        admin_socket=service.home.admin_socket,
    )


def versions(service: Service) -> Versions:
    """The versions of a home beside the champion.

    Those that the ledger names are read at each request from a file, and from time to time from a
    server, which a request does not wait for.
    """

    def read() -> dict[str, str]:
        anchor = service.anchor_of(service.champion())
        return {"previous": service.ledger.previous() or anchor, "anchor": anchor}

    named = read if service.settings.state.url is None else _read_beside(read)

    def standby(socket: Path) -> str | None:
        slots = {service.home.engine_socket(slot): slot for slot in SLOTS}
        with suppress(UserError, KeyError):
            return read_slot(service.home, slots[socket]).digest
        return None

    return Versions(kept=service.kept, named=named, standby=standby)


def _read_beside(read: Callable[[], dict[str, str]]) -> Callable[[], dict[str, str]]:
    """The value of ``read``, which a thread calls every ``NAMES_S``; none before the first time."""
    known: dict[str, str] = {}

    def keep_reading() -> None:
        while True:
            with suppress(UserError):  # the server's absence is said where it is noticed
                known.update(read())
            time.sleep(NAMES_S)

    threading.Thread(target=keep_reading, name="names", daemon=True).start()
    return lambda: dict(known)


def served_model(service: Service) -> ServedModel:
    """The model's name, its context and the tasks of this installation."""
    model = service.settings.model
    return ServedModel(model.name, model.max_model_len, frozenset(service.tasks))


def verify(
    service: Service,
    answer: Unjudged,
    example: Mapping[str, Any] | str,
    judging_rows: "Future[HeldOut] | None" = None,
) -> Verdict:
    """The verdict of a task on a row a client sent, or on a known one by its id.

    A task that judges conversations judges all messages of the request, its answer included.

    A verifier's failure is raised, so that it is recorded as an error and never as a reward.
    ``judging_rows``: looked through once they are read; rows that come before are compared when
    they are collected.

    Raises:
        RowRefusedError: A client's row cannot be learnt from.
    """
    chosen = replace(service.task(answer.task), prefill=None)  # a client's prompt is its own
    row = known_row(service, answer.task, example) if isinstance(example, str) else example
    known = judging_rows.result() if judging_rows and judging_rows.done() else None
    refused = None if isinstance(example, str) else admission(service, chosen, row, known)
    if refused and refused[0] == "refused":
        raise RowRefusedError(refused[1])
    messages = whole(answer.prompt, answer.completion, answer.tool_calls)
    if chosen.converse is None or messages is None:
        verdict = judge(chosen, answer.completion, row)
    else:
        verdict = judge_conversation(chosen, messages, row)
    if verdict.error is not None:
        raise ValueError(verdict.error)
    if refused:
        raise RowRefusedError(refused[1], verdict)
    return verdict


def warm(service: Service, judging_rows: "Future[HeldOut] | None" = None) -> None:
    """Read rows and start own verifiers now, so that the first verification need not wait.

    Only of the target and of own tasks; then the rows that judge, with which clients' rows are
    compared. An error here is raised again by the first verification that needs the rows.
    """
    target = service.settings.tasks.target
    for name, task in service.tasks.items():
        if name == target or (task.target and name not in TASKS):
            with suppress(UserError):
                rows = service.training_rows(name)
                judge(task, "", next(iter(rows.values()), {}))
    if judging_rows is not None:
        with suppress(UserError):
            judging_rows.set_result(held_out(service, target))


def known_row(service: Service, task: str, example_id: str) -> Mapping[str, Any]:
    """The training row of this id; evaluation rows cannot be requested by id.

    Raises:
        LookupError: There is none.
    """
    known = service.training_rows(task)
    if example_id not in known:
        raise LookupError(f"example_id {example_id!r}: task {task} has no such training row")
    return known[example_id]
