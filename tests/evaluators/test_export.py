"""The files of lm-evaluation-harness: every sample, and aggregates that follow from them."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from evaluators.loading import rows
from evaluators.runner import export, question
from evaluators.summary import SampleRow, scored, summaries
from evaluators.tasks import TASKS

ROWS = Path(__file__).parent / "rows"


@pytest.fixture
def samples() -> list[SampleRow]:
    """Two tasks; gold on even rows, a wrong answer on odd ones."""
    found = []
    for name in ("gsm8k", "piqa"):
        task = TASKS[name]
        for number, row in enumerate(rows(task, "eval", data_dir=ROWS)):
            asked = question(task, row)
            sample = {
                "task": name,
                "example_id": asked.example_id,
                "digest": "0123456789abcdef",
                "completion": task.wrong(row) if number % 2 else task.gold(row),
                "tokens": 3,
                "finish": "stop",
                "example": json.dumps(row),
                "prompt": json.dumps(asked.messages),
            }
            found.append(scored(sample, task, row))
    return found


def test_every_sample_is_logged_with_its_hashes(samples: list[SampleRow], tmp_path: Path) -> None:
    paths = export(samples, TASKS, tmp_path)
    assert [path.name for path in paths] == [
        "samples_gsm8k_0123456789ab.jsonl",
        "samples_piqa_0123456789ab.jsonl",
        "results_0123456789ab.json",
    ]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    records = [json.loads(line) for path in paths[:2] for line in path.read_text().splitlines()]
    assert len(records) == len(samples)
    for record, sample in zip(records, samples, strict=True):
        assert record["doc"] == json.loads(sample["example"])
        assert record["resps"] == [[sample["completion"]]]
        assert record["filtered_resps"] == [sample["extracted"]]
        assert record["exact_match"] == sample["reward"]
        assert record["target"] == TASKS[sample["task"]].gold(record["doc"])
        [prompt] = record["arguments"]["gen_args_0"]["arg_0"]
        assert record["prompt_hash"] == sha256(prompt.encode()).hexdigest()
        assert set(record["metrics"]) <= set(record)


def test_the_aggregates_follow_from_the_samples(samples: list[SampleRow], tmp_path: Path) -> None:
    told = json.loads(export(samples, TASKS, tmp_path)[-1].read_text())
    for name, summary in summaries(samples).items():
        metrics = told["results"][name]
        assert metrics["exact_match,none"] == summary.accuracy
        assert metrics["format,none"] == summary.format_rate == 1.0
        variance = summary.accuracy * (1 - summary.accuracy) / (summary.n - 1)
        assert metrics["exact_match_stderr,none"] == pytest.approx(variance**0.5)
        assert told["n-samples"][name]["effective"] == summary.n


def test_a_single_row_has_no_standard_error(samples: list[SampleRow], tmp_path: Path) -> None:
    told = json.loads(export(samples[:1], TASKS, tmp_path)[-1].read_text())
    assert told["results"]["gsm8k"]["exact_match_stderr,none"] == "N/A"
