"""Loading: a task from its spec, and its rows from local files, from the package or from the hub.

Spec: ``path/to/file.py:TASK`` or ``package.module:TASK`` (``resolve``).

Rows (``rows``, ``examples``) have the Hugging Face schema. They are ranked by sha256(seed, key), so
the same seed gives the same rows to every model, in the same order, and a smaller ``limit`` gives
the first of a larger one's rows. Rows that share a key are one problem; the first is kept.
"""

import gzip
import importlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from agent.errors import UserError
from evaluators.task import Row, Source, Task


def resolve(spec: str) -> Task:
    """The task a spec names; its ``source.file`` is read relative to the file it stands in.

    Raises:
        UserError: no such file, module or name, or something that is no Task.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise UserError(f"task {spec!r}: wanted path/to/file.py:TASK or package.module:TASK")
    task = getattr(_module(spec, place), name, None)
    if not isinstance(task, Task):
        raise UserError(f"task {spec!r}: {name} is {type(task).__name__}; a Task is wanted")
    return _anchored(task, Path(place)) if place.endswith(".py") else task


def _module(spec: str, place: str) -> ModuleType:
    """Import the module; an exception of its code becomes a UserError."""
    try:
        return _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise UserError(f"task {spec!r}: {type(error).__name__}: {error}") from error


def _from_file(path: Path) -> ModuleType:
    name = f"anchorage_task_{sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    module_spec = spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None or not path.is_file():
        raise FileNotFoundError(str(path))
    module = module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses look their module up there
    module_spec.loader.exec_module(module)
    return module


def _anchored(task: Task, path: Path) -> Task:
    """Rows beside the file, and a version that changes with the file's text."""
    file = task.source.file
    source = replace(task.source, file=str((path.parent / file).resolve())) if file else task.source
    version = sha256(path.read_bytes()).hexdigest()[:12]
    return replace(task, source=source, version=version)


Split = Literal["train", "eval"]
ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
EVAL_SHARE = 0.2  # of a data set with one split
SHARED_DATA = Path(__file__).parent / "tasks"


def rows(
    task: Task,
    split: Split,
    *,
    data_dir: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Row]:
    """The task's rows of a split, ranked by the seed and cut to ``limit``.

    Raises:
        UserError: a split the task does not have, no such file, an unreachable hub, no rows.
    """
    if split not in ("train", "eval"):
        raise UserError(f"split {split!r}: allowed: train, eval")
    if split == "train" and task.source.train_split is None:
        raise UserError(f"task {task.name}: its rows are never trained on; allowed: eval")
    ranked = _ranked(task, _split_rows(task, split, data_dir), seed)
    if not ranked:
        raise UserError(f"task {task.name}: no {split} rows")
    return ranked[:limit]


def examples(task: Task, *, data_dir: Path | None = None) -> Callable[[Row], list[Row]]:
    """A function from a row to its worked examples: the first ``task.shots`` of its group.

    Groups are in the order of the data; the row itself is never its own example.
    """
    if not task.shots:
        return lambda row: []
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    group_of = task.shot_group or (lambda row: "")
    for row in _named_rows(task, task.source.shots_split or "train", data_dir):
        groups[group_of(row)].append(row)

    def shots(row: Row) -> list[Row]:
        group, key = group_of(row), task.key(row)
        # Lazy: an own task's key is a call of its process, and a group may be the whole split.
        others = (shot for shot in groups[group] if task.key(shot) != key)
        chosen = list(islice(others, task.shots))
        if len(chosen) < task.shots:
            raise UserError(
                f"task {task.name}: {len(chosen)} worked examples for {group!r}; "
                f"{task.shots} wanted (settings: tasks.prompts.{task.name}.shots)"
            )
        return chosen

    return shots


def in_eval_share(key: str) -> bool:
    """Whether a row of a data set with one split is kept for evaluation; by its key alone."""
    return _rank("split", key) < EVAL_SHARE


def _rank(seed: object, key: str) -> float:
    """A number in [0, 1) drawn by the hash of both."""
    drawn = sha256(f"{seed}\x1f{key}".encode("utf-8", "surrogatepass")).digest()[:8]
    return int.from_bytes(drawn, "big") / 2**64


def _ranked(task: Task, unranked: Iterable[Row], seed: int) -> list[Row]:
    by_key: dict[str, Row] = {}
    for row in unranked:
        by_key.setdefault(task.key(row), row)
    return [by_key[key] for key in sorted(by_key, key=lambda key: (_rank(seed, key), key))]


def _split_rows(task: Task, split: Split, data_dir: Path | None) -> list[Row]:
    """A split of its own where there is one, else its share by hash of the only split."""
    source = task.source
    single = source.train_split == source.eval_split
    if source.file is None and data_dir is not None:
        folder = data_dir / task.name
        if not single or find_file(folder, _names(source, "eval")):
            return read_file(_found(folder, _names(source, split)))
    name = source.train_split if split == "train" else source.eval_split
    everything = _named_rows(task, name or "train", data_dir)
    if not single:
        return everything
    return [row for row in everything if in_eval_share(task.key(row)) == (split == "eval")]


def _names(source: Source, split: Split) -> list[str]:
    """File stems that hold a split of its own, the data set's own name first."""
    if split == "train":
        return list(dict.fromkeys([source.train_split or "train", "train"]))
    own = [source.eval_split] if source.eval_split not in (None, source.train_split) else []
    return list(dict.fromkeys([*(name for name in own if name), "eval", "test", "validation"]))


def _named_rows(task: Task, name: str, data_dir: Path | None) -> list[Row]:
    """The rows of one published split, wherever they lie."""
    if task.source.file is not None:
        file = task.source.file.replace("{split}", name)
        return read_file(SHARED_DATA / file)  # an absolute path stays as it is
    if data_dir is None:
        return _from_hub(task, name)
    return read_file(_found(data_dir / task.name, [name]))


def find_file(folder: Path, stems: Sequence[str]) -> Path | None:
    """The first file of the folder with one of the stems and a known ending."""
    candidates = (folder / f"{stem}{ending}" for stem in stems for ending in ENDINGS)
    return next((path for path in candidates if path.is_file()), None)


def _found(folder: Path, stems: Sequence[str]) -> Path:
    if path := find_file(folder, stems):
        return path
    allowed = ", ".join(f"{stem}.jsonl" for stem in stems)
    raise UserError(f"no rows in {folder}; wanted one of {allowed} (or .jsonl.gz, .parquet)")


def read_file(path: Path) -> list[Row]:
    """The rows of a JSONL (plain or gzip) or parquet file.

    Raises:
        UserError: no such file, or a line that is no JSON object, by its number.
    """
    if not path.is_file():
        raise UserError(f"no file {path}; wanted JSONL or parquet rows")
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        table: list[Row] = pq.read_table(path).to_pylist()
        return table
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = raw.decode("utf-8").split("\n")
    return [_parsed(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _parsed(path: Path, number: int, line: str) -> Row:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}: {type(row).__name__}; an object is wanted")
    return row


def _from_hub(task: Task, split: str) -> list[Row]:
    """One split through ``datasets``, which keeps its own cache."""
    import datasets

    source = task.source
    try:
        loaded = datasets.load_dataset(
            source.hub_id, source.config, split=split, revision=source.revision
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"task {task.name}: cannot load {source.hub_id!r} at {source.revision} "
            f"({type(error).__name__}: {reason}); put rows into <data_dir>/{task.name}/"
            f"{split}.jsonl and set tasks.data_dir to use local files"
        ) from None
    return [dict(row) for row in loaded]
