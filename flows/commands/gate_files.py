"""The gate on files: tables of samples in parquet or JSONL, judged without a model or a service.

Columns: ``task``, ``example_id``, ``reward`` (a number in 0..1, or true/false); optional
``harness_hash``, ``digest``, ``cluster`` (rows made from one template) and ``error``; others are
ignored. A reward that is no number, or stands beside an error, becomes NaN, which the gate holds:
it is never read as 0.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agent.errors import UserError
from agent.sections import GateSettings
from evaluators.gate import GateRules, Sample, Tables, decide
from evaluators.samples import COLUMNS, OPTIONAL, sample_from


def gate_files(
    anchor: Path,
    champion: Path,
    candidate: Path,
    target: str,
    *,
    settings: GateRules | None = None,
    confirm_anchor: Path | None = None,
    confirm_champion: Path | None = None,
    confirm_candidate: Path | None = None,
) -> dict[str, Any]:
    """Judge ``candidate``; returns {"verdict", "reasons", "tasks"} of plain values.

    The confirm files are the sealed draw: anchor and candidate together, or none; the champion's
    is needed for retained tasks only. Every task in the files but ``target`` is a prior task.
    Without ``settings`` the defaults of the settings' section `gate` hold.

    Raises:
        UserError: a file that is not there or not a table, or half a sealed draw.
    """
    tables = Tables(read_samples(anchor), read_samples(champion), read_samples(candidate))
    sealed = _sealed(confirm_anchor, confirm_champion, confirm_candidate)
    rules = settings or GateRules.of(GateSettings())
    return decide(tables, target, rules, sealed).to_json()


def read_samples(path: Path) -> tuple[Sample, ...]:
    """All rows of one table; the file's name says which format it has."""
    readers = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows}
    reader = readers.get(path.suffix)
    if reader is None:
        raise UserError(f"table {path}: a .parquet or .jsonl file")
    if not path.is_file():
        raise UserError(f"table {path}: no such file")
    return tuple(_sample(path, number, row) for number, row in enumerate(reader(path), start=1))


def _sealed(anchor: Path | None, champion: Path | None, candidate: Path | None) -> Tables | None:
    if anchor is None and champion is None and candidate is None:
        return None
    if anchor is None or candidate is None:
        raise UserError("confirm files: those of the anchor and of the candidate, or none")
    old = None if champion is None else read_samples(champion)
    return Tables(read_samples(anchor), old, read_samples(candidate))


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    from pyarrow import ArrowException, parquet  # heavy: only where a parquet file is read

    try:
        with parquet.ParquetFile(path) as file:
            present = [name for name in (*COLUMNS, *OPTIONAL) if name in file.schema_arrow.names]
            table = file.read(columns=present)
    except ArrowException as error:
        raise UserError(f"table {path}: not parquet ({str(error).splitlines()[0]})") from error
    yield from table.to_pylist()


def _jsonl_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"table {path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"table {path}, line {number}: a JSON object with {COLUMNS}")
            yield row


def _sample(path: Path, number: int, row: Mapping[str, Any]) -> Sample:
    try:
        return sample_from(row)
    except ValueError as error:
        raise UserError(f"table {path}, row {number}: {error}") from error
