"""``anchorage study paper``: every system on the same rows, prompts, reward, evaluation and seeds.

A trial is one system on one target with one seed. It trains for a number of generations and is
measured every few of them (``meter``). It leaves one small result file; see ``flows.lab.trials``.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from agent.config import keep, load
from agent.errors import UserError
from agent.home import Home, is_locked, locked
from agent.learner.es import members, step
from agent.learner.improve import Evaluate
from agent.store.anchor import Floats, keep_importance
from flows.commands.importance import AnsweringModel, keep_weights, questions, ways
from flows.lab.paper.evolve import Place, Trail, asked, drawn, evolve, published, snapshots
from flows.lab.paper.gradient import GradientJob
from flows.lab.paper.meter import Meter
from flows.lab.paper.systems import Sizes, Weights, plan_for, sizes_of, system_of
from flows.lab.trials import PairedRun, Result, paired, read, results, run_missing
from flows.session import Session, session
from flows.show.terminal import Reporter

ROWS, LARGEST, STEPS = 8, 10.0, 10  # of importance weights: rows a task, cap, steps of a walk
KEYS = ("trial", "settings", "curve", "norms")  # of a result


@dataclass(frozen=True, slots=True)
class PaperStudy:
    """What is compared, and how long and how often it is measured."""

    model: str
    targets: tuple[str, ...]
    systems: tuple[str, ...]
    seeds: int = 3
    generations: int = 30
    every: int = 10  # generations between measurements
    rows: int = 200  # evaluation rows of a task
    kl_rows: int = 16  # continuations of a task

    def settings(self) -> dict[str, Any]:
        """What two results must share to be compared."""
        own = ("generations", "every", "rows", "kl_rows")
        return {name: getattr(self, name) for name in own} | {"sizes": asdict(sizes_of(self.model))}


Opened = Callable[[Path, Reporter], AbstractContextManager[Session]]


def study_paper(
    study: PaperStudy,
    config: Path | None,
    work: Path,
    out: Path,
    progress: Reporter,
    opened: Opened = session,
) -> list[Result]:
    """Run the trials whose files are missing; every result that is there then.

    Args:
        study: The trials.
        config: Settings beside the study's: local rows, prompts, priors.
        work: Folder of homes and trials; needed to go on after a kill.
        out: Folder of the result files.
        progress: Receives what happens.
        opened: Makes the session of a home.

    Raises:
        UserError: An unknown system or target, or results of other settings in ``out``.
    """
    for name in study.systems:
        system_of(name)
    alike(results_there(out, study.model), study.settings(), out)
    with _home(study, config, work) as home, opened(home.root, progress) as trying:
        for target in study.targets:
            trying.service.target(target)
        lab = Lab(study, trying, work, progress)
        trials = paired(study.model, study.targets, study.systems, study.seeds)

        def run(trial: PairedRun, place: Path) -> Result:
            left = time_left(trials, results_there(out, study.model))
            progress.say(f"trial {trial.name}{left}")
            return lab.run(trial, place)

        for busy in run_missing(trials, out, work, KEYS, progress, run):
            progress.say(f"trial {busy.name}: another process is at it")
    return results(out, study.model, KEYS)


def results_there(out: Path, model: str) -> list[Result]:
    """The sound results; a damaged one is named where its trial runs again."""
    sound = []
    for path in out.glob(f"{Path(model).name}-*.json"):
        with suppress(UserError):
            sound.append(read(path, KEYS))
    return sound


def alike(found: list[Result], settings: dict[str, Any], out: Path) -> None:
    """Refuse results that were made with other settings than these."""
    for each in found:
        other = {key: each["settings"].get(key) for key in settings}
        if wrong := [key for key in settings if other[key] != settings[key]]:
            text = ", ".join(f"{key} {other[key]} (now {settings[key]})" for key in wrong)
            raise UserError(f"--out {str(out)!r}: has results of {text}; give another folder")


def time_left(trials: list[PairedRun], found: list[Result]) -> str:
    """', about 12 minutes left in all', from the trials of the same system, or of any."""
    minutes: dict[str, list[float]] = {}
    for each in found:
        minutes.setdefault(each["trial"]["system"], []).append(each["minutes"])
    if not minutes:
        return ""
    done = {tuple(each["trial"].values()) for each in found}
    every = [value for own in minutes.values() for value in own]
    left = sum(
        median(minutes.get(trial.system, every))
        for trial in trials
        if (Path(trial.model).name, trial.target, trial.system, trial.seed) not in done
    )
    return f", about {left:.0f} minutes left in all"


@contextmanager
def _home(study: PaperStudy, config: Path | None, work: Path) -> Iterator[Home]:
    """A home of this process alone: the engines of two processes share no files."""
    number = 0
    while is_locked(work / f"engines-{number}.lock") if work.is_dir() else False:
        number += 1
    work.mkdir(parents=True, exist_ok=True)
    taken = f"{work}: another process took its home; start again"
    with locked(work / f"engines-{number}.lock", taken=taken, wait_s=0):
        home = Home.at(work / f"engines-{number}")
        tasks = {"rows": study.rows, "curve_every": 0}
        settings = load(config, model={"path": study.model}, tasks=tasks)
        keep(home, settings)
        yield home


class Lab:
    """One process's engines, and the meter of each target."""

    def __init__(self, study: PaperStudy, opened: Session, work: Path, progress: Reporter) -> None:
        self._study, self._opened, self._work = study, opened, work
        self._sizes: Sizes = sizes_of(study.model)
        self._progress = progress
        self._meters: dict[str, Meter] = {}

    def meter(self, target: str) -> Meter:
        """The meter of a target, its anchor's reading taken."""
        if target not in self._meters:
            study = self._study
            sizes = {"rows": study.rows, "kl_rows": study.kl_rows, "prompts": self._sizes.prompts}
            population = self._opened.population
            self._meters[target] = Meter(self._opened.service, population, target, sizes)
        self._meters[target].base()
        return self._meters[target]

    def run(self, trial: PairedRun, folder: Path) -> Result:
        """Train and measure one trial, going on where it was."""
        study, meter, measured = (
            self._study,
            self.meter(trial.target),
            Trail(folder / "curve.jsonl"),
        )
        curve = measured.rows()
        known = {row["generation"] for row in curve}
        advance = self._progress.track(trial.name, study.generations)
        norms: list[list[float | None]] = []
        place, begun = None, time.monotonic()

        def measure(now: Place) -> None:
            nonlocal begun
            reading = meter.read() if now.generation else self._first(trial, meter)
            row = {"generation": now.generation, "tokens": now.tokens, **reading}
            row["minutes"] = (time.monotonic() - begun) / 60
            measured.add(row)
            curve.append(row)
            begun = time.monotonic()

        for place in self._places(trial, meter, folder):
            norms.append([place.generation, place.norm, place.walk, place.closed, place.reward])
            if place.generation % study.every == 0 and place.generation not in known:
                measure(place)
            advance(place.generation)
        assert place is not None
        if place.generation != curve[-1]["generation"]:  # one that ended early, too
            measure(place)
        return {
            "trial": asdict(trial) | {"model": Path(trial.model).name},
            "settings": study.settings(),
            "parameters": self._opened.service.origin.learnable,
            "population": self._sizes.population * system_of(trial.system).times,
            "curve": curve,
            "norms": norms,
            "delta": place.delta,
            "tokens": place.tokens,
            "minutes": sum(row["minutes"] for row in curve),
        }

    def _first(self, trial: PairedRun, meter: Meter) -> dict[str, Any]:
        """The reading before any generation: the anchor's, but for weights that are rounded."""
        return meter.read() if system_of(trial.system).kind == "in_place" else meter.base()

    def _places(self, trial: PairedRun, meter: Meter, folder: Path) -> Iterator[Place]:
        """The generations of a trial."""
        system, service = system_of(trial.system), self._opened.service
        population, anchor = self._opened.population, service.origin
        if system.kind in ("grpo", "sft"):
            self._train(trial, system.kind, folder)
            yield from snapshots(population, anchor, folder)
            return
        digest = self._importance(trial.target, system.importance) if system.importance else None
        plan = plan_for(
            system, self._sizes, trial.seed, self._study.generations, anchor.learnable, digest
        )
        if system.kind == "in_place":
            yield from published(population, meter, anchor, plan, folder)
            return
        rewards = drawn(plan) if system.kind == "random" else asked(population, meter, plan)
        yield from evolve(population, anchor, plan, Trail(folder / "trail.jsonl"), rewards)

    def _importance(self, target: str, method: Weights) -> str:
        """The sha256 of weights estimated on the prior tasks, made once for all seeds.

        The way that ``path`` measures is a random walk: what leaving the anchor by chance costs.
        """
        service = self._opened.service
        source = self._work / f"importance-{method}-{target}.safetensors"
        taken = f"{source}: another process is at it"
        with locked(source.with_suffix(".lock"), taken=taken):
            if not source.exists():
                asked = questions(service, service.priors(target), ROWS)
                model = AnsweringModel(service.origin, asked, self._progress)
                weights = model.fisher() if method == "fisher" else model.path(self._walk())
                keep_weights(service.origin, weights, source, LARGEST)
        return keep_importance(service.origin, source, service.home.importance)[0]

    def _walk(self) -> Iterator[Mapping[str, Floats]]:
        """Deltas of the random walk of seed 0, which is no trial's."""
        anchor = self._opened.service.origin
        plan = plan_for(system_of("random"), self._sizes, 0, STEPS, anchor.learnable)
        crew = members(plan.population, plan.mirrored)
        decisions = drawn(plan)
        steps = (
            step(
                decisions(Evaluate(generation, crew, plan.sigma))[0], crew, run_seed=0,
                generation=generation, sigma=plan.sigma, alpha=plan.alpha, penalty=plan.penalty,
            )
            for generation in range(STEPS)
        )  # fmt: skip
        return ways(anchor, steps)

    def _train(self, trial: PairedRun, kind: str, folder: Path) -> None:
        """Gradient training in a process of its own: TRL's imports stay out of this one."""
        study = self._study
        job = GradientJob(
            kind, str(self._opened.service.home.root), trial.target, trial.seed, study.generations,
            study.every, self._sizes, str(folder),
        )  # fmt: skip
        trail = Trail(folder / "trail.jsonl").rows()
        if trail and trail[-1]["generation"] == study.generations:
            return
        path, log = folder / "job.json", folder / "training.log"
        path.write_text(job.to_json(), encoding="utf-8")
        command = [sys.executable, "-m", "flows.lab.paper.gradient", str(path)]
        with log.open("ab") as output:
            done = subprocess.run(command, check=False, stdout=output, stderr=output)
        if done.returncode:
            raise UserError(f"trial {trial.name}: training ended with {done.returncode}; see {log}")
