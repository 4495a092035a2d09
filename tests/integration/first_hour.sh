#!/usr/bin/env bash
# From an empty folder to a promoted version on an own task with own prompts, through the openai
# client. docs/quickstart.md shows the commands below the line; a test compares the two.
set -euo pipefail
trap 'anchorage down > /dev/null' EXIT
# ------------------------------------------------------------------------------------------
mkdir my_tasks
cat > my_tasks/stock.py <<'PYTHON'
"""Stock questions; the answer is the number after the last ####."""

import re

from evaluators.task import Row, Source, Task, Verdict


def verify(completion: str, row: Row) -> Verdict:
    """Reward 1 for the right number, format 1 for any number."""
    numbers = re.findall(r"#### (\d+)", completion)
    last = numbers[-1] if numbers else None
    return Verdict(float(last == str(row["answer"])), float(last is not None), last)


TASK = Task(
    name="stock",
    source=Source("", train_split="train", eval_split="test", file="stock-{split}.jsonl"),
    key=lambda row: row["id"],
    fields=lambda row: {"question": row["question"]},
    system="You count stock.",
    template='{question}\nThink step by step, then end with "#### number".',
    verify=verify,
    gold=lambda row: f"#### {row['answer']}",
    wrong=lambda row: f"#### {row['answer'] + 1}",
    target=True,
    max_tokens=48,
)
PYTHON
cat > rows.py <<'PYTHON'
"""Rows in the words that the embedded model knows: training, evaluation, and what a client asks."""

import json
from pathlib import Path

from deploy.embedded.rows import rows

for name, split, count, seed in (
    ("my_tasks/stock-train.jsonl", "train", 200, 1),
    ("my_tasks/stock-test.jsonl", "validation", 400, 1),
    ("client.jsonl", "train", 96, 2),
):
    lines = []
    for number, row in enumerate(rows("gsm8k", split, count, seed)):
        answer = int(row["answer"].rpartition("####")[2])
        own = {"id": f"{name}-{number}", "question": row["question"], "answer": answer}
        lines.append(json.dumps(own))
    Path(name).write_text("\n".join(lines), encoding="utf-8")
PYTHON
python rows.py
cat > anchorage.toml <<'TOML'
[tasks]
target = "stock"
files = ["my_tasks/stock.py:TASK"]
priors = ["arc_challenge", "piqa", "proofwriter"]
rows = 200

[learner]
generations = 6

[projection]
loop_minutes = 0    # rounds begin by command only
TOML
anchorage task check my_tasks/stock.py:TASK
anchorage up
cat > client.py <<'PYTHON'
"""Ask as the own service asks, with a task and its row, so that answers are verified and kept."""

import json
import os
from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url=os.environ["ENDPOINT"] + "/v1", api_key="local", max_retries=5)
rows = [json.loads(line) for line in Path("client.jsonl").read_text("utf-8").splitlines()]
right = 0
for row in rows:
    question = row["question"] + '\nThink step by step, then end with "#### number".'
    answer = client.chat.completions.create(
        model="anchorage",
        messages=[
            {"role": "system", "content": "You count stock."},
            {"role": "user", "content": question},
        ],
        max_tokens=48,
        metadata={"task": "stock", "example": json.dumps(row)},
    )
    right += (answer.choices[0].message.content or "").endswith(f"#### {row['answer']}")
print(f"{right} of {len(rows)} right, answered by version {answer.system_fingerprint}")
PYTHON
ENDPOINT=$(anchorage status --json | python -c 'import json, sys; print(json.load(sys.stdin)["endpoint"])')
export ENDPOINT
python client.py
anchorage collect
anchorage improve
DIGEST=$(anchorage review list --json | python -c 'import json, sys; print(json.load(sys.stdin)[0]["digest"])')
anchorage promote "$DIGEST"
python client.py
anchorage down
