"""``anchorage demo``: the whole loop on this machine, with the real engine, gateway and flows.

In a fresh home (``<home>/demo``), with the embedded model or another: start the service; send live
requests with the OpenAI client; train, judge and promote a good round and send the same requests
again; train and reject a harmful round; roll back to the anchor and forward again; stop everything.
"""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.config import given
from agent.errors import UserError
from agent.home import Home, remove_tree
from agent.sections import EMBEDDED
from agent.store.weights import short
from deploy import stack
from evaluators.task import Message, Row, Task, judge
from flows.lab.bench.learning import EXTRACTION
from flows.round_files import RoundFiles
from flows.serve.stack import connected, start, stop
from flows.service import Service
from flows.session import Session, session
from flows.show import plots
from flows.show.catch_up import shown_within
from flows.show.terminal import Reporter

AT_ONCE = 16


@dataclass(frozen=True)
class Live:
    """Result of a batch of live requests."""

    accuracy: float
    n: int
    versions: tuple[str, ...]  # X-Model-Version of the answers, each once


def ask(
    endpoint: str,
    model: str,
    task: Task,
    requests: Sequence[tuple[Row, list[Message]]],
    progress: Reporter,
) -> Live:
    """Send every row as a chat with ``metadata.task`` and its row, greedily.

    The answers are judged here as well, independently of the service's own verifier.
    """
    from openai import OpenAI

    client = OpenAI(base_url=f"{endpoint}/v1", api_key="local", max_retries=5)
    advance = progress.track(f"live requests ({task.name})", len(requests))

    def one(row: Row, chat: list[Message]) -> tuple[float, str]:
        raw = client.chat.completions.with_raw_response.create(
            model=model,
            messages=chat,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=task.max_tokens,
            store=True,
            metadata={"task": task.name, "example": json.dumps(row, default=str)},
        )
        text = raw.parse().choices[0].message.content or ""
        return judge(task, text, row).reward, raw.headers["x-model-version"]

    answers = []
    with ThreadPoolExecutor(AT_ONCE) as workers:
        for done, result in enumerate(workers.map(lambda each: one(*each), requests), 1):
            answers.append(result)
            advance(done)
    if not answers:
        raise UserError("live requests: none to send; give at least 1 row")
    accuracy = sum(reward for reward, _ in answers) / len(answers)
    return Live(accuracy, len(answers), tuple(sorted({version for _, version in answers})))


def served_version(endpoint: str) -> str:
    """The version the endpoint reports now."""
    import httpx

    return str(httpx.get(f"{endpoint}/v1/models", timeout=30).headers["x-model-version"])


LIVE_ROWS = 96
MLFLOW_S = 60.0  # longest wait, at the end, for the flows' process to show the last round
PREFECT_S = 60.0  # its server starts in the background; flows wait this long to be seen
HARMFUL = {"penalty": "none", "lam": 0.0, "alpha": 0.08, "generations": 6, "early_stop": False}
# 135 M parameters on two cores: 20 minutes. The candidate is the last generation, so that
# the choice among points does not save the harmful round.
REAL_HARMFUL = HARMFUL | {"fitness": "reward", "alpha": 0.05, "generations": 2, "selection": 0}
REAL: dict[str, dict[str, Any]] = {
    "tasks": {
        "target": "orders",
        "files": [*EXTRACTION.values()],
        "rows": 400,
        "curve_every": 6,
        "curve_rows": 48,
    },
    "learner": {"generations": 12},
    "gate": {"confirm": False},
    "review": {"mode": "auto"},
}
DOWNLOADED = ("arc_challenge", "piqa")  # priors where their rows are at hand


def run_demo(home: Path | None, progress: Reporter, model: str = EMBEDDED) -> dict[str, Any]:
    """Run it and return the document of ``demo --json``, with addresses and pictures.

    Args:
        home: The demo lives in its folder ``demo``.
        progress: Receives what happens.
        model: Another one than the embedded learns an extraction, which takes 20 minutes.

    Raises:
        UserError: A demo is already up in this home.
    """
    began = time.monotonic()
    place = fresh_home(home)
    with stopping(place):
        progress.say("starting engine, gateway, MLflow, Prefect and the flows' process")
        status = start(place.root, None, model, None, progress, **sections(model))
        with connected(place), session(place.root, progress) as opened:
            document = _story(opened, status, progress)
            if not shown_within(opened.service, MLFLOW_S):
                progress.say("MLflow is behind; `up` in this home brings it level")
    document["seconds"] = round(time.monotonic() - began, 1)
    document["left_running"] = len(stack.status(place)["services"])
    return document


def sections(model: str) -> dict[str, Any]:
    """The demo's settings of a model: none for the embedded one, whose profile is the demo."""
    if model == EMBEDDED:
        return {}
    more = DOWNLOADED if given().get("tasks.data_dir") else ()
    return REAL | {"tasks": REAL["tasks"] | {"priors": ["dates", "refusal", *more]}}


def fresh_home(home: Path | None) -> Home:
    """``<home>/demo``, emptied."""
    root = Home.at(home).demo
    if root.exists():
        if stack.status(Home.at(root))["services"]:
            raise UserError(f"home {str(root)!r}: is up; take it down first (anchorage down)")
        remove_tree(root)
    return Home.at(root)


@contextmanager
def stopping(place: Home) -> Iterator[None]:
    """Stop the service of this home at the end, after an error too."""
    try:
        yield
    finally:
        stop(place.root)


def _story(opened: Session, status: dict[str, Any], progress: Reporter) -> dict[str, Any]:
    from flows.deployments import run_flow
    from flows.show.prefect import server_answers

    service, endpoint = opened.service, str(status["endpoint"])
    home, target = str(service.home.root), service.settings.tasks.target
    _ = opened.population  # its engine starts while the client sends requests
    served = [served_version(endpoint)]

    progress.say("a client asks live questions")
    before = live(service, endpoint, progress)

    server_answers(wait_s=PREFECT_S)

    progress.say("a good round: ES with anchored weight decay")
    good = run_flow("loop", home, target, None)
    served.append(served_version(endpoint))
    after = live(service, endpoint, progress)
    settled = run_flow("bake", home)

    progress.say("a harmful round: large steps, no anchor")
    small = service.settings.model.path == EMBEDDED
    bad = run_flow("loop", home, target, HARMFUL if small else REAL_HARMFUL)
    served.append(served_version(endpoint))

    if good["report"]["verdict"] == "promote":
        progress.say("back to the anchor, and forward again")
        run_flow("rollback", home, "anchor", "the demo shows a rollback")
        served.append(served_version(endpoint))
        run_flow("promote", home, good["report"]["digest"])
        served.append(served_version(endpoint))

    rounds = [good["report"], bad["report"]]
    return {
        "rounds": rounds,
        "served": served,
        "live": {"before": before.accuracy, "after": after.accuracy, "n": before.n},
        "baking": settled,
        "plot": str(picture(service, rounds[0])),
        "mlflow": status["model_page"],
        "home": home,
    }


def live(service: Service, endpoint: str, progress: Reporter) -> Live:
    """Send the same live requests at every call: training rows of the target."""
    task = service.target()
    rows: list[Row] = list(service.training_rows(task.name).values())[:LIVE_ROWS]
    shots = service.shots(task.name)
    requests: list[tuple[Row, list[Message]]] = [
        (row, task.messages(row, shots(row))) for row in rows
    ]
    return ask(endpoint, service.settings.model.name, task, requests, progress)


def picture(service: Service, report: dict[str, Any]) -> Path:
    """Target and prior tasks over the generations of a round, as a PNG in the home."""
    points = RoundFiles(service.home, report["round"]).curve()
    title = f"Round {report['round']}: candidate {short(report['digest'])}"
    path = service.home.picture(report["round"])
    plots.curve(points, report["target"], title).savefig(path)
    return path
