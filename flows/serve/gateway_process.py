"""The gateway's process, put together from the parts of one home."""

import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from agent.errors import UserError
from agent.gateway.admin import create_admin
from agent.gateway.app import create_app
from agent.gateway.serve import serve
from agent.gateway.settings import GatewayOptions
from deploy.serving.served import read_served
from deploy.serving.watchdog import settled
from evaluators.task import Verdict, judge
from evaluators.tasks import TASKS
from flows.service import Service


def run(service: Service, port: int) -> None:
    """Serve the endpoint until a signal ends it."""
    served = read_served(service.home)
    public = create_app(
        gateway_settings(service),
        upstream=service.home.engine_socket(served.slot),
        verify=lambda task, example, completion: verify(service, task, example, completion),
        experience=service.experience,
        version=served.digest,
        recover=lambda _before: settled(service.home),
        kept=lambda: tuple(service.kept()),
    )
    threading.Thread(target=warm, args=[service], name="warm", daemon=True).start()
    admin_socket = service.home.admin_socket
    host = service.settings.gateway.host
    serve(public, create_admin(public), host=host, port=port, admin_socket=admin_socket)


def gateway_settings(service: Service) -> GatewayOptions:
    """What the service's settings say to its gateway."""
    chosen = service.settings.gateway
    return GatewayOptions(
        model=service.settings.model.name,
        tasks=frozenset(service.tasks),
        max_tokens=service.settings.model.max_model_len,
        host=chosen.host,
        retention_days=chosen.retention_days,
        rate=chosen.rate,
        token_quota=chosen.token_quota,
        quota_storage=chosen.quota_storage,
        max_body_bytes=chosen.max_body_bytes,
        max_in_flight=chosen.max_in_flight,
        max_queued=chosen.max_queued,
        queue_timeout_s=chosen.queue_timeout_s,
        answer_timeout_s=chosen.answer_timeout_s,
    )


def verify(
    service: Service, task: str, example: Mapping[str, Any] | str, completion: str
) -> Verdict:
    """The verdict of a task on a row a client sent, or on a known one by its id.

    A verifier's failure is raised, so that it is recorded as an error and never as a reward.
    """
    chosen = service.task(task)
    row = known_row(service, task, example) if isinstance(example, str) else example
    verdict = judge(chosen, completion, row)
    if verdict.error is not None:
        raise ValueError(verdict.error)
    return verdict


def warm(service: Service) -> None:
    """Do now what a first verification would wait for: rows are read, own verifiers started.

    Only of the target and of own tasks; what is not to be had now is told to whoever asks for it.
    """
    target = service.settings.tasks.target
    for name, task in service.tasks.items():
        if name == target or (task.target and name not in TASKS):
            with suppress(UserError):
                rows = service.training_rows(name)
                judge(task, "", next(iter(rows.values()), {}))


def known_row(service: Service, task: str, example_id: str) -> Mapping[str, Any]:
    """The training row of this id; gate rows are not for sale.

    Raises:
        LookupError: There is none.
    """
    known = service.training_rows(task)
    if example_id not in known:
        raise LookupError(f"example_id {example_id!r}: task {task} has no such training row")
    return known[example_id]
