"""How a version behaves, told by a cold engine: what a swap is verified against."""

from dataclasses import replace

from agent.errors import UserError
from deploy.serving.controller import connect
from deploy.serving.probes import Probes, read_probes, write_probes
from deploy.serving.served import read_served
from flows.service import Service
from flows.session import Session, engine_options

PROMPTS_A_TASK, TOKENS, POSITIONS = 1, 5, 3  # answered while a swap holds everybody
START_S = 300.0  # a first answer compiles kernels, on a busy machine slowly


def ensure_probes(session: Session, digest: str) -> None:
    """Have a cold engine's answers to the fixed probes; starts one where there are none yet."""
    service = session.service
    if _known(service, digest):
        return
    session.progress.say(f"a cold engine answers the probes of {digest[:12]}")
    options = engine_options(service)[0]
    cold = session.engine(replace(options, model=service.directory(digest)))
    try:
        prompts = probe_prompts(service)
        expected = cold.top_logprobs(prompts, TOKENS, POSITIONS)
    finally:
        cold.close()
    write_probes(service.home, digest, Probes.of(prompts, expected))


def probe_served(service: Service) -> None:
    """Ask the serving engine, which has just been started cold on the champion."""
    served = read_served(service.home)
    if _known(service, served.digest):
        return
    prompts = probe_prompts(service)
    with connect(service.home, served.slot) as engine:
        ids = [engine.tokens(prompt) for prompt in prompts]
        expected = engine.top_logprobs(engine.model(), ids, TOKENS, POSITIONS, timeout_s=START_S)
    write_probes(service.home, served.digest, Probes.of(prompts, expected))


def probe_prompts(service: Service) -> list[list[dict[str, str]]]:
    """A few fixed questions of every task."""
    return [
        task.messages(row, service.shots(name)(row))
        for name, task in service.tasks.items()
        for row in service.rows(name, "eval", PROMPTS_A_TASK)
    ]


def _known(service: Service, digest: str) -> bool:
    try:
        read_probes(service.home, digest)
    except UserError:
        return False
    return True
