"""Paired trials: every system on every target with the same seeds, one small result file each.

A trial whose file is there is not run again; one that was killed goes on in its own folder, so that
a comparison grows over many calls. Processes that share the folders share the trials.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.errors import UserError
from agent.home import locked, read_sealed, write_sealed
from flows.show.terminal import Reporter

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PairedRun:
    """One trial of one system."""

    model: str
    target: str
    system: str
    seed: int

    @property
    def name(self) -> str:
        """The stem of its file."""
        return f"{Path(self.model).name}-{self.target}-{self.system}-{self.seed}"


def paired(
    model: str, targets: Sequence[str], systems: Sequence[str], seeds: int
) -> list[PairedRun]:
    """Seed by seed, so that pairs are complete early."""
    return [
        PairedRun(model, target, system, seed)
        for seed in range(1, seeds + 1)
        for target in targets
        for system in systems
    ]


def run_missing(
    trials: Sequence[PairedRun],
    out: Path,
    work: Path,
    keys: Collection[str],
    progress: Reporter,
    run: Callable[[PairedRun, Path], Result],
) -> list[PairedRun]:
    """Run every trial that has no sound result file.

    Args:
        trials: In the order wanted.
        out: Folder of the result files.
        work: Folder of the trials' own folders, with their locks.
        keys: What a result has at least.
        progress: Receives the number done, and every damaged file, whose trial runs again.
        run: Makes the result of a trial in its folder.

    Returns:
        The trials that another process is at.
    """
    out.mkdir(parents=True, exist_ok=True)
    advance, elsewhere = progress.track("trials", len(trials)), []
    for done, trial in enumerate(trials, start=1):
        path, place = out / f"{trial.name}.json", work / trial.name
        if not _sound(path, keys, progress):
            place.mkdir(parents=True, exist_ok=True)
            with ExitStack() as held:
                try:
                    held.enter_context(locked(place / "trial.lock", taken="", wait_s=0))
                except UserError:
                    elsewhere.append(trial)
                    continue
                # Looked at again under the lock: the process that held it may have just finished.
                if not _sound(path, keys, progress):
                    write_sealed(path, run(trial, place))
        advance(done)
    return elsewhere


def results(out: Path, model: str, keys: Collection[str]) -> list[Result]:
    """Every result of a model, by file name.

    Raises:
        UserError: A damaged file.
    """
    return [read(path, keys) for path in sorted(out.glob(f"{Path(model).name}-*.json"))]


def read(path: Path, keys: Collection[str]) -> Result:
    """One result.

    Raises:
        UserError: A damaged file, or one that lacks a key; its trial runs again with the others.
    """
    result = read_sealed(path)
    if missing := sorted(set(keys) - result.keys()):
        raise UserError(f"{path}: is no result of a trial: has no {', '.join(missing)}")
    return result


def _sound(path: Path, keys: Collection[str], progress: Reporter) -> bool:
    """Whether a result is there; a damaged one is named."""
    if not path.is_file():
        return False
    try:
        read(path, keys)
    except UserError as damage:
        progress.say(f"{damage}; computed again")
        return False
    return True
