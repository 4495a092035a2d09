"""The plan of a round: its settings, checked together, and what is decided as it opens.

Lambda is given, or follows from ``target_norm_ratio`` by the closed form, or is tuned from round to
round by the paper's rule. It stands in the plan beside the settings, with the digest of the
importance weights, so that a round that is resumed or replayed is the same round.
"""

from collections.abc import Mapping
from typing import Any

from agent.config import replaced
from agent.errors import UserError
from agent.learner.es import members
from agent.learner.improve import Plan
from agent.learner.penalty import Penalty, check, lambda_for_norm_ratio, next_lambda
from agent.sections import AUTO, LearnerSettings
from agent.store.anchor import keep_importance
from agent.store.journal import Run
from agent.store.replay import lineage
from flows.service import Service


def chosen(learner: LearnerSettings, changes: Mapping[str, Any] | None) -> LearnerSettings:
    """The learner's settings with this round's changes.

    Raises:
        UserError: A value out of range, an impossible population, a step that would not shrink, or
            settings that contradict each other.
    """
    settings = replaced(learner, "learner", changes or {})
    ratio, tuned = settings.target_norm_ratio, settings.tune_lambda
    if ratio is not None and (settings.penalty != "l2" or tuned):
        raise UserError(
            f"learner.target_norm_ratio = {ratio} with penalty {settings.penalty!r}, "
            f"tune_lambda {tuned}: allowed: l2, not tuned"
        )
    if AUTO not in (settings.sigma, settings.alpha):
        lam = settings.lam if ratio is None else 0.0  # from a ratio it is known only as it opens
        _check(settings, {"lambda": lam, "importance_sha256": None})
    return settings


def calibrated(learner: LearnerSettings, plan: Mapping[str, Any]) -> LearnerSettings:
    """The settings with what stands in a round's plan in the place of 'auto'."""
    made = plan.get("calibration") or {}
    auto = {name for name in ("sigma", "alpha") if getattr(learner, name) == AUTO}
    return learner.model_copy(update={name: made[name] for name in auto})


def settled(service: Service, target: str, learner: LearnerSettings) -> dict[str, Any]:
    """Lambda of a new round and the digest of its importance weights, checked together.

    Raises:
        UserError: Bad weights, or a step that would not shrink; no part of the round is written.
    """
    lam, digest, largest = _lambda(service, target, learner), None, 1.0
    if learner.importance is not None:
        source = learner.importance.expanduser()
        digest, largest = keep_importance(service.anchor, source, service.home.importance)
    made = {"lambda": lam, "importance_sha256": digest}
    _check(learner, made, largest)
    return made


def _check(learner: LearnerSettings, made: Mapping[str, Any], largest: float = 1.0) -> None:
    """Refuse a plan that no generation could follow; ``largest``: largest importance weight."""
    try:
        members(learner.population, learner.mirrored)
        check(_penalty(learner, made), learner.sizes[1], largest)
    except ValueError as error:
        raise UserError(f"learner: {error}") from None


def plan_of(service: Service, run: Run, learner: LearnerSettings) -> Plan:
    """The plan of an open round, which goes on after the generations in its journal."""
    anchor = service.open_anchor(run.anchor_digest)
    generations = lineage(service.journal, anchor, run.run_id)
    before = [generation for generation in generations if generation.run_id != run.run_id]
    sigma, alpha = learner.sizes
    return Plan(
        run_seed=run.run_seed,
        generations=learner.generations,
        population=learner.population,
        mirrored=learner.mirrored,
        sigma=sigma,
        alpha=alpha,
        shaping=learner.shaping,
        penalty=_penalty(learner, run.plan),
        noise=learner.noise,
        early_stop=learner.early_stop,
        parameters=anchor.learnable,
        start_generation=len(generations) - len(before),
        start_norm=float(before[-1].drift["norm"]) if before else 0.0,
        parent_every=0 if learner.too_large == "ignore" else learner.selection_every,
        halve=learner.too_large == "halve",
    )


def _penalty(learner: LearnerSettings, made: Mapping[str, Any]) -> Penalty:
    """The penalty of a round, from its settings and its plan."""
    return Penalty(
        learner.penalty,
        float(made["lambda"]),
        learner.huber_threshold,
        learner.l1_share,
        made["importance_sha256"],
    )


def _lambda(service: Service, target: str, learner: LearnerSettings) -> float:
    """Lambda of a new round."""
    if learner.penalty == "none":
        return 0.0
    if learner.target_norm_ratio is not None:
        return lambda_for_norm_ratio(
            learner.target_norm_ratio, alpha=learner.sizes[1], generations=learner.generations
        )
    return tuned_lambda(service, target, learner) if learner.tune_lambda else learner.lam


def tuned_lambda(service: Service, target: str, learner: LearnerSettings) -> float:
    """``lam`` at first; then the last tuned round's, halved if the target suffered in it.

    A round's gain is accuracy on the target, candidate minus champion, as its evaluation measured
    it. The target suffered when the gain is more than ``gate.min_gain`` below that of the newest
    round without a penalty or, without such a round, below ``gate.min_gain`` itself. Only rounds
    with this target and this alpha count and, among tuned ones, those with this penalty.
    """
    tried, free = [], []
    for run in service.journal.runs():
        gain = _gain(service, run)
        if gain is None or run.target != target or run.plan.get("alpha") != learner.alpha:
            continue
        if run.plan.get("penalty") == "none":
            free.append(gain)
        elif run.plan.get("tune_lambda") and run.plan.get("penalty") == learner.penalty:
            tried.append((float(run.plan["lambda"]), gain))
    least = service.settings.gate.min_gain
    if not tried:
        return learner.lam
    if free:
        return next_lambda(tried, free[-1], tolerance=least)
    return next_lambda(tried, least, tolerance=0.0)


def _gain(service: Service, run: Run) -> float | None:
    """Gain in accuracy on the target of a finished round; None before it was evaluated."""
    for entry in reversed(service.ledger.of(run.digest) if run.digest else []):
        statistics = entry.statistics
        if entry.state == "EVALUATED" and statistics.get("round") == run.run_id:
            figures = statistics["tasks"][run.target]
            before, after = figures["champion"], figures["candidate"]
            return None if before is None or after is None else float(after) - float(before)
    return None
