"""Evaluations as files in lm-evaluation-harness's sample format.

For each task one ``samples_<task>_<digest>.jsonl`` with the fields of its ``--log_samples``
(doc_id, doc, target, arguments, resps, filtered_resps, filter, metrics, hashes, and a column a
metric) and one ``results_<digest>.json`` with ``<metric>,<filter>`` and standard errors. Accuracy
is called ``exact_match`` there.
"""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from evaluators.summary import SampleRow, Summary, summaries
from evaluators.task import Task

METRICS = ("exact_match", "format")
FILTER = "none"


def export(samples: Sequence[SampleRow], tasks: Mapping[str, Task], folder: Path) -> list[Path]:
    """Write the files of every task among the samples; returns their paths, the results last."""
    folder.mkdir(parents=True, exist_ok=True)
    by_task = summaries(samples)
    stamp = samples[0]["digest"][:12] if samples else "empty"
    written = []
    for name in by_task:
        own = [sample for sample in samples if sample["task"] == name]
        lines = [json.dumps(record(i, sample, tasks[name])) for i, sample in enumerate(own)]
        written.append(_publish(folder / f"samples_{name}_{stamp}.jsonl", "\n".join(lines) + "\n"))
    whole = json.dumps(results(by_task, tasks), indent=2, sort_keys=True)
    return [*written, _publish(folder / f"results_{stamp}.json", whole + "\n")]


def record(doc_id: int, sample: SampleRow, task: Task) -> dict[str, Any]:
    """One sample as lm-evaluation-harness logs it; ``target`` is the gold answer as text."""
    doc = json.loads(sample["example"])
    target = task.gold(doc)
    generation = {"until": [], "do_sample": False, "max_gen_toks": task.max_tokens}
    return {
        "doc_id": doc_id,
        "doc": doc,
        "target": target,
        "arguments": {"gen_args_0": {"arg_0": [sample["prompt"]], "arg_1": generation}},
        "resps": [[sample["completion"]]],
        "filtered_resps": [sample["extracted"] or ""],
        "filter": FILTER,
        "metrics": list(METRICS),
        "doc_hash": _hash(sample["example"]),
        "prompt_hash": _hash(sample["prompt"]),
        "target_hash": _hash(target),
        "exact_match": sample["reward"],
        "format": sample["format"],
    }


def results(by_task: Mapping[str, Summary], tasks: Mapping[str, Task]) -> dict[str, Any]:
    """The aggregate file: metrics by task, and how many rows and worked examples they stand on."""
    return {
        "results": {name: _metrics(name, summary) for name, summary in by_task.items()},
        "n-shot": {name: tasks[name].shots for name in by_task},
        "n-samples": {name: {"original": s.n, "effective": s.n} for name, s in by_task.items()},
        "versions": {name: tasks[name].version for name in by_task},
        "higher_is_better": {name: dict.fromkeys(METRICS, True) for name in by_task},
    }


def _metrics(name: str, summary: Summary) -> dict[str, Any]:
    """Shares and their standard errors, sqrt(p (1 - p) / (n - 1)); "N/A" for a single row."""
    metrics: dict[str, Any] = {"alias": name}
    for metric, share in zip(METRICS, (summary.accuracy, summary.format_rate), strict=True):
        spread = share * (1 - share) / (summary.n - 1) if summary.n > 1 else None
        metrics[f"{metric},{FILTER}"] = share
        metrics[f"{metric}_stderr,{FILTER}"] = "N/A" if spread is None else spread**0.5
    return metrics


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _publish(path: Path, text: str) -> Path:
    """Written whole beside its place, then renamed."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path
