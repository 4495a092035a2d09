"""``anchorage bench learning``: recipes of a round compared at equal answers, with paired seeds.

A trial is one round of one system (learner settings that differ from the model's profile) on one
target with one seed, from the anchor, in a home of its own; its candidate is compared with the
anchor on the target's and the priors' evaluation rows. Trials of one seed have the same noise and
begin at the same training row. Each leaves one small JSON file; a trial whose file is there is not
run again, and one that was killed goes on where it was, so the whole grows over many calls.

    efficiency = points gained on the target / million generated tokens of the round
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from agent.config import keep, load
from agent.errors import UserError
from agent.home import Home
from agent.learner.drift import reliability
from agent.sections import LearnerSettings
from agent.store.journal import Generation
from evaluators import examples
from evaluators.runner import read_samples
from evaluators.stats import mcnemar_exact
from evaluators.summary import gain
from flows.lab.trials import PairedRun, Result, paired, results, run_missing
from flows.learn.evaluate import first_stage, table
from flows.learn.improve import run_round, unweighed
from flows.round_files import RoundFiles
from flows.session import Session, session
from flows.show.terminal import Reporter

PUBLISHED = {  # arXiv 2605.30148, its settings at 3B, in our exact arithmetic
    "sigma": 0.001,
    "alpha": 0.0005,
    "population": 30,
    "prompts": 200,
    "batch": 0,
    "lam": 5.0,
    "selection": 0,
    "shaping": "zscore",
    "mirrored": False,
    "noise": "normal",
    "fitness": "reward",
}
_EXAMPLES = Path(examples.__file__).parent / "extraction.py"
KEYS = ("trial", "tokens", "tasks")  # of a result
EXTRACTION = {"orders": f"{_EXAMPLES}:ORDERS", "dates": f"{_EXAMPLES}:DATES"}
SYSTEMS: dict[str, dict[str, Any]] = {
    "ours": {},
    "published": PUBLISHED,
    "auto": {"sigma": "auto", "alpha": "auto"},
    "fixed-rows": {"batch": 0},
    "last-generation": {"selection": 0},
    "mirrored": {"mirrored": True},
    "ranks": {"shaping": "ranks"},
    "likelihood": {"fitness": "likelihood"},
    "rewards": {"fitness": "reward", "population": 16, "batch": 32, "alpha": 0.002},
    "rademacher": {"noise": "rademacher"},
    "population-8": {"population": 8},
    "population-32": {"population": 32},
}


@dataclass(frozen=True, slots=True)
class LearningBench:
    """What is compared: every system on every target with every seed, ``answers`` a trial."""

    model: str
    targets: tuple[str, ...]
    systems: tuple[str, ...] = ("ours", "published")
    seeds: int = 3
    answers: int = 8192  # of members; a trial ends with the generation that reaches it
    rows: int = 400  # evaluation rows of a task

    def trials(self) -> list[PairedRun]:
        """Seed by seed, so that pairs are complete early."""
        return paired(self.model, self.targets, self.systems, self.seeds)


Opened = Callable[[Path, Reporter], AbstractContextManager[Session]]


def bench_learning(
    bench: LearningBench,
    config: Path | None,
    work: Path,
    out: Path,
    progress: Reporter,
    opened: Opened = session,
) -> dict[str, Any]:
    """Run the trials whose files are missing, then compare all that are there.

    Args:
        bench: The trials.
        config: Settings beside the systems' own: files of tasks, local rows, priors.
        work: Folder for the homes of trials; may be deleted afterwards.
        out: Folder of the result files.
        progress: Receives what happens.
        opened: Makes the session of a trial's home.

    Raises:
        UserError: An unknown system or target.
    """
    for name in bench.systems:
        if name not in SYSTEMS:
            raise UserError(f"system {name!r} is not known; allowed: {', '.join(SYSTEMS)}")

    def run(trial: PairedRun, _place: Path) -> Result:
        return _run(bench, trial, config, work, progress, opened)

    for busy in run_missing(bench.trials(), out, work, KEYS, progress, run):
        progress.say(f"trial {busy.name}: another process is at it")
    return report(out, bench.model)


def report(out: Path, model: str) -> dict[str, Any]:
    """The comparison of every result file of a model: {"trials": [...], "systems": [...]}."""
    trials = results(out, model, KEYS)
    return {"trials": trials, "systems": _compared(trials)}


def _run(
    bench: LearningBench,
    trial: PairedRun,
    config: Path | None,
    work: Path,
    progress: Reporter,
    opened: Opened,
) -> dict[str, Any]:
    """One trial in its home."""
    settings = load(config, **_settings(bench, trial))
    place = Home.at(work / trial.name)
    if not place.settings_json.is_file():
        keep(place, settings)
    _share(work, place)
    with opened(place.root, progress) as trying:
        service = trying.service
        learner = changes(service.settings.learner, trial, bench.answers)
        progress.say(f"trial {trial.name}: {learner['generations']} generations")
        # A trial that was killed after its round, or whose file was damaged, has the round already.
        made = unweighed(service, trial.target, learner) or run_round(
            service, trying.population, trial.target, progress, learner
        )
        return _measured(trying, trial, made.run_id, made.digest)


def _settings(bench: LearningBench, trial: PairedRun) -> dict[str, Any]:
    tasks = {"target": trial.target, "rows": bench.rows, "curve_every": 0, "kl_rows": 0}
    files = [EXTRACTION[name] for name in bench.targets if name in EXTRACTION]
    return {"model": {"path": trial.model}, "tasks": tasks | ({"files": files} if files else {})}


def changes(learner: LearnerSettings, trial: PairedRun, answers: int) -> dict[str, Any]:
    """Learner settings of a trial: its system's, its seed, and the generations of its answers."""
    made: dict[str, Any] = SYSTEMS[trial.system] | {"seed": trial.seed, "budget_minutes": 0}
    if trial.system == "fixed-rows":
        made["prompts"] = learner.batch or learner.prompts
    chosen = learner.model_copy(update=made)
    batch = min(chosen.batch or chosen.prompts, chosen.prompts)
    return made | {"generations": max(1, -(-answers // (chosen.population * batch)))}


def _share(work: Path, place: Home) -> None:
    """What every trial of a model would make again, from one that has it: hard links, no copies.

    The converted model, the certificate of its engines, and the anchor's answers, whose names hold
    the hash of all that decides them.
    """
    for name in ("models", "certificates", "evaluations"):
        for other in work.glob(f"*/{name}"):
            if other.parent != place.root:
                for file in (each for each in other.rglob("*") if each.is_file()):
                    target = place.root / name / file.relative_to(other)
                    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    if not target.exists():
                        os.link(file, target)


def _measured(opened: Session, trial: PairedRun, run_id: str, digest: str) -> dict[str, Any]:
    """The result of a finished round: cost, choice, and every task against the anchor."""
    service = opened.service
    names = [trial.target, *service.priors(trial.target)]
    questions = first_stage(service, names)
    tables = {
        who: _by_task(table(service, opened.population, each, questions, opened.progress))
        for who, each in (("candidate", digest), ("anchor", service.anchor.digest))
    }
    pace = RoundFiles(service.home, run_id).pace()
    generations = service.journal.generations(run_id)
    chosen = service.journal.chosen(run_id)
    run = service.journal.run(run_id)
    return {
        "trial": asdict(trial) | {"model": Path(trial.model).name},
        "settings": _plain(run.plan),
        "generations": len(generations),
        "ended": run.reason,
        "chosen": None if chosen is None else asdict(chosen),
        "answers": sum(each.rewards.size for each in generations),
        "tokens": round(sum(row.get("tokens", 0.0) for row in pace)),
        "minutes": sum(row["seconds.generation"] for row in pace) / 60,
        "norm": float(service.journal.kept(run_id)[-1].drift["norm"]),
        "rewards": [each.drift["reward_mean"] for each in generations],
        "reliability": reliability_of(generations),
        "digest": digest,
        "tasks": {name: _task(tables["anchor"][name], tables["candidate"][name]) for name in names},
    }


def reliability_of(generations: Sequence[Generation]) -> float | None:
    """The median of a round's generations: what share of a step's length is not chance."""
    shares = [share for each in generations if (share := reliability(each.rewards)) is not None]
    return median(shares) if shares else None


def _plain(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The learner's part of a plan."""
    keys = (*LearnerSettings.model_fields, "lambda", "calibration")
    return {key: plan[key] for key in keys if key in plan}


def _by_task(path: Path) -> dict[str, list[dict[str, Any]]]:
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in read_samples(path):
        by_task.setdefault(str(row["task"]), []).append(row)
    return by_task


def _task(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One task: the gain in all its parts, and exact McNemar's p on the target's side."""
    figures = gain(before, after)
    return asdict(figures) | {"p": float(mcnemar_exact(figures.broken, figures.fixed))}


def points(result: Mapping[str, Any]) -> float:
    """Points gained on the target."""
    before, after = result["tasks"][result["trial"]["target"]]["accuracy"]
    return float(100 * (after - before))


def _points_alike(result: Mapping[str, Any]) -> float | None:
    """The same among rows whose answers kept their format and length; None without such a row."""
    pair = result["tasks"][result["trial"]["target"]]["alike_accuracy"]
    return None if pair is None else float(100 * (pair[1] - pair[0]))


def _compared(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each target and system: medians over seeds, and the ratio to the published one."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["trial"]["target"], result["trial"]["system"]), []).append(result)
    rows = []
    for (target, system), own in sorted(groups.items()):
        paired = {each["trial"]["seed"]: each for each in groups.get((target, "published"), [])}
        ratios = [
            _efficiency(each) / _efficiency(other)
            for each in own
            if (other := paired.get(each["trial"]["seed"])) and _efficiency(other) > 0
        ]
        rows.append(
            {
                "target": target,
                "system": system,
                "seeds": len(own),
                "points": [points(each) for each in own],
                "points_alike": [_points_alike(each) for each in own],
                "largest_p": max(each["tasks"][target]["p"] for each in own),
                "points_per_million_tokens": median(map(_efficiency, own)),
                "ratio_to_published": median(ratios) if ratios else None,
                "tokens": median(each["tokens"] for each in own),
                "priors": median(_priors(each) for each in own),
            }
        )
    return rows


def _efficiency(result: Mapping[str, Any]) -> float:
    return points(result) / (result["tokens"] / 1e6) if result["tokens"] else 0.0


def _priors(result: Mapping[str, Any]) -> float:
    """Mean change of the prior tasks, points."""
    target = result["trial"]["target"]
    pairs = [row["accuracy"] for name, row in result["tasks"].items() if name != target]
    return 100 * sum(after - before for before, after in pairs) / len(pairs) if pairs else 0.0


def learning_table(document: Mapping[str, Any]) -> Table:
    """A line for each target and system."""
    drawn = Table(
        title="points gained on held-out rows, by seed; a million tokens; ratio to published",
        title_justify="left",
    )
    drawn.add_column("target", no_wrap=True)
    drawn.add_column("system", no_wrap=True)
    columns = (
        "points",
        "same form",
        "p",
        "tokens",
        "/ 1M",
        "ratio",
        "priors",
    )
    for column in columns:
        drawn.add_column(column, justify="right")
    for row in document["systems"]:
        ratio = row["ratio_to_published"]
        drawn.add_row(
            row["target"],
            row["system"],
            " ".join(f"{each:+.1f}" for each in row["points"]),
            " ".join("-" if each is None else f"{each:+.1f}" for each in row["points_alike"]),
            f"{row['largest_p']:.0e}",
            f"{row['tokens'] / 1000:,.0f} k",
            f"{row['points_per_million_tokens']:.0f}",
            "-" if ratio is None else f"{ratio:.1f}",
            f"{row['priors']:+.1f}",
        )
    return drawn


def plot_learning(document: Mapping[str, Any], path: Path) -> Path:
    """Every trial's target and priors, before and after, as a PNG."""
    from flows.show.plots import before_and_after  # matplotlib: only where something is drawn

    lines = []
    for each in sorted(document["trials"], key=lambda each: tuple(each["trial"].values())):
        trial = each["trial"]
        for name, row in sorted(each["tasks"].items(), key=lambda item: item[0] != trial["target"]):
            own = name == trial["target"]
            label = f"{trial['target']}, {trial['system']}, seed {trial['seed']}"
            lines.append((label if own else name, *row["accuracy"], own))
    figure = before_and_after(lines, f"{document['trials'][0]['trial']['model']}, held-out rows")
    figure.savefig(path, dpi=110)
    return path
