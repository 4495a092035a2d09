"""What a service does now and will do next, and what a person may do: for `up` and `status`."""

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any

import httpx

from agent.config import Settings
from agent.home import is_locked
from agent.store import feedback
from agent.store.journal import Run
from agent.store.weights import short
from deploy import stack
from flows.round_files import RoundFiles
from flows.service import Service
from flows.show.prefect import signed

PREFECT_S = 2.0  # longest wait for its answer; without one the next round is estimated
DAY_S = 86_400.0
NEWEST = 5  # candidates that wait, and are shown


def outlook(settings: Settings, priors: Sequence[str], due: str) -> dict[str, str]:
    """What a service will do by itself, in words: target, schedule, review, traffic.

    Args:
        settings: The settings in force.
        priors: The prior tasks of the target.
        due: When the next scheduled round begins.
    """
    plan, target = settings.projection, settings.tasks.target
    starts = [f"{plan.loop_minutes:g} minutes after the last round ended"] * (plan.loop_minutes > 0)
    starts += [f"after {plan.loop_rows} new verified rows of {target}"] * (plan.loop_rows > 0)
    by_hand = "none: `anchorage improve` starts a round, projection.loop_minutes schedules them"
    review = {
        "auto": "auto: a candidate that passes the gate is served",
        "manual": "manual: a candidate waits for `anchorage review approve`",
    }
    cap = settings.gateway.principal_cap
    share = f", at most {100 * cap:g} % of a round from one of several clients" if cap else ""
    return {
        "target": f"{target}; prior tasks: {', '.join(priors) or 'none'}",
        "schedule": "a round " + " or ".join(starts) if starts else by_hand,
        "next round": due,
        "review": review[settings.review.mode],
        "traffic": f"requests that name the task {target} and are rewarded by its verifier are "
        f"trained on as sent{share}; text is kept for {settings.gateway.retention_days} days, "
        "without a task or `store: true` not at all",
    }


def next_round(service: Service) -> str:
    """When the next scheduled round begins, ISO 8601 in UTC: Prefect's plan, else an estimate."""
    minutes = service.settings.projection.loop_minutes
    if not minutes:
        return "none is scheduled"
    if (planned := _planned(service)) is not None:
        return planned
    ended = [run.finished for run in service.journal.runs() if run.finished is not None]
    now = datetime.now(UTC)
    last = datetime.fromtimestamp(ended[-1], UTC) if ended else now
    at = last + timedelta(minutes=minutes)
    return f"about {at:%Y-%m-%dT%H:%MZ}" if at > now else "at once: it was due before now"


def deployment_name(settings: Settings, flow: str) -> str:
    """The name of a flow's deployment: on a server that others use, too, the model's name."""
    return settings.model.name if settings.projection.prefect_api_url else flow


def _planned(service: Service) -> str | None:
    """The start of the next planned run of the loop by Prefect's server; None without an answer."""
    environment = stack.environment_of(service.home)
    url, name = environment.get("PREFECT_API_URL"), deployment_name(service.settings, "loop")
    if url is None:
        return None
    wanted = {
        "flows": {"name": {"any_": ["loop"]}},
        "deployments": {"name": {"any_": [name]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
        "sort": "NEXT_SCHEDULED_START_TIME_ASC",
        "limit": 1,
    }
    headers = signed({**os.environ, **environment})
    try:
        reply = httpx.post(
            f"{url}/flow_runs/filter", json=wanted, headers=headers, timeout=PREFECT_S
        )
        runs = reply.raise_for_status().json()
    except (httpx.HTTPError, ValueError):
        return None
    return f"{runs[0]['next_scheduled_start_time'][:16]}Z" if runs else None  # UTC, to the minute


def new_rows(service: Service, target: str) -> int:
    """Verified answers of the target that came after its last round was opened."""
    opened = [run.created for run in service.journal.runs() if run.target == target]
    return service.experience.verified(target, max(opened, default=0.0))


def overview(service: Service) -> dict[str, Any]:
    """The running round, the next one, candidates that wait, traffic and feedback."""
    target, runs = service.settings.tasks.target, service.journal.runs()
    own = [run for run in runs if run.target == target and "rows" in run.plan]
    since = datetime.now(UTC).timestamp() - service.settings.gateway.retention_days * DAY_S
    return {
        "target": target,
        "review": service.settings.review.mode,
        "round": _running(service, runs[-1]) if runs else None,
        "next_round": next_round(service),
        "waiting": waiting(service),
        "traffic": {
            "new_rows": new_rows(service, target),
            "waiting_for_their_row": service.experience.waiting(target, since),
            "unverified": sum(n for _, _, n in service.experience.errors(target, since)),
            "set_aside": own[-1].plan["rows"]["set_aside"] if own else {},
        },
        "feedback": feedback.counts(service.experience),
    }


def _running(service: Service, run: Run) -> dict[str, Any] | None:
    """The newest round while it is not judged: how far it is, and the minutes it will take yet."""
    state = service.ledger.state(run.digest) if run.digest else None
    if run.digest is not None and state not in ("PROPOSED", "EVALUATED"):
        return None
    locked = is_locked(service.home.round_lock)
    learning = "learning" if locked else "interrupted: `anchorage improve` goes on with it"
    done, files = service.journal.generations(run.run_id), RoundFiles(service.home, run.run_id)
    total = int(run.plan.get("generations", len(done)))
    took = [row["seconds.generation"] for row in files.pace()]
    left = median(took) * (total - len(done)) / 60 if took and locked else None
    return {
        "round": run.run_id,
        "state": learning if run.digest is None else "learnt, its verdict is missing",
        "generation": len(done),
        "generations": total,
        "reward": done[-1].drift["reward_mean"] if done else None,
        "minutes_left": left,
    }


def waiting(service: Service) -> list[dict[str, Any]]:
    """Candidates that wait for a person, newest first: digest, state, gain, what to do."""
    states = service.ledger.states()
    found = []
    for digest, state in reversed(states.items()):
        if state in ("PASSED", "AWAIT_REVIEW", "APPROVED"):
            gains = [_gain(entry.statistics) for entry in service.ledger.of(digest)]
            gain = next((each for each in reversed(gains) if each is not None), None)
            steps = next_step(digest, state)
            found.append({"digest": digest, "state": state, "gain": gain, "next": steps})
    return found[:NEWEST]


def _gain(statistics: Mapping[str, Any]) -> float | None:
    """Difference on the target, a share, of a row that has the round's figures."""
    figures = statistics.get("tasks", {}).get(statistics.get("target"), {})
    gain: float | None = figures.get("difference")
    return gain


def next_step(digest: str, state: str, why: str = "") -> str:
    """What became of a candidate, and the one command that is next.

    Args:
        digest: The candidate.
        state: What the ledger says of it, or "unchanged" for a round without a step.
        why: The reason of a verdict that is no promotion.
    """
    name = short(digest)[:8]
    reject = f"`anchorage review reject {name} --reason ...`"
    return {
        "PASSED": f"passed, not served: `anchorage promote {name}`",
        "APPROVED": f"approved, served next: `anchorage status`, or `anchorage promote {name}`",
        "AWAIT_REVIEW": "waits for review: look at it in MLflow, then `anchorage review approve "
        f"{name} --reason ...` or {reject}",
        "CANARY": "on trial, a share of live traffic decides: `anchorage status --watch`",
        "HOLD": f"held, not served: {why}; `anchorage plan` says how many rows the gate needs",
        "REJECT": f"rejected, the champion stays: {why}",
        "unchanged": why,
    }.get(state, f"is {state}: `anchorage history`")
