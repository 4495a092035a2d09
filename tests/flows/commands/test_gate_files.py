"""The gate on files: both formats, what is held, and what is told in one line."""

import json
import math

import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from agent.errors import UserError
from agent.sections import GateSettings
from evaluators.gate import GateRules
from flows.cli import app
from flows.commands.gate_files import gate_files, read_samples

ROWS = 400


def rows(countdown=0.45, gsm8k=1.0, prefix="r", **more):
    """JSON rows: the first share of each task is right."""
    shares = {"countdown": countdown, "gsm8k": gsm8k, "piqa": 1.0}
    return [
        {"task": task, "example_id": f"{prefix}{i}", "reward": float(i < share * ROWS)} | more
        for task, share in shares.items()
        for i in range(ROWS)
    ]


def write(path, content):
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(content), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.fixture(params=[".parquet", ".jsonl"])
def files(request, tmp_path):
    def make(candidate, prefix="r"):
        names = {
            "anchor": rows(prefix=prefix),
            "champion": rows(prefix=prefix),
            "candidate": candidate,
        }
        return {
            name: write(tmp_path / f"{prefix}-{name}{request.param}", content)
            for name, content in names.items()
        }

    return make


def test_a_gain_is_promoted_and_the_document_is_plain(files):
    document = gate_files(**files(rows(countdown=0.65)), target="countdown")
    assert document["verdict"] == "promote"
    assert "first stage alone" in document["reasons"][-1]["text"]
    assert document["tasks"]["countdown"]["candidate"] == pytest.approx(0.65)
    assert document["tasks"]["gsm8k"]["role"] == "prior"
    json.dumps(document, allow_nan=False)


def test_harm_is_rejected_naming_the_task(files):
    document = gate_files(**files(rows(countdown=0.65, gsm8k=0.9)), target="countdown")
    assert document["verdict"] == "reject"
    (reason,) = [
        r for r in document["reasons"] if r["outcome"] == "reject" and r["step"] == "prior"
    ]
    assert (reason["task"], reason["b"], reason["c"], reason["n"]) == ("gsm8k", 40, 0, ROWS)


def test_settings_reach_the_gate(files):
    given = files(rows(countdown=0.65, gsm8k=0.99))
    assert gate_files(**given, target="countdown")["verdict"] == "promote"
    strict = GateRules.of(GateSettings(), zero_tolerance=frozenset({"gsm8k"}))
    assert gate_files(**given, target="countdown", settings=strict)["verdict"] == "hold"


def test_rows_of_a_template_count_as_one(files, tmp_path):
    """Six of 400 rows lost: nothing, unless the 400 come from ten templates."""
    single = files(rows(countdown=0.65, gsm8k=0.985))
    assert gate_files(**single, target="countdown")["verdict"] == "promote"
    few = {}
    for name, path in single.items():
        table = [s | {"cluster": f"t{int(s['example_id'][1:]) // 40}"} for s in read_rows(path)]
        few[name] = write(tmp_path / f"few-{path.name}", table)
    document = gate_files(**few, target="countdown")
    assert document["verdict"] == "hold"
    assert {r["method"] for r in document["reasons"] if r["n"]} == {"betting"}


def read_rows(path):
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("sequential", [False, True])
def test_the_command_prints_the_document_and_nothing_else(files, sequential):
    given = files(rows(countdown=0.65))
    words = [word for name, path in given.items() for word in (f"--{name}", str(path))]
    asked = ["gate", *words, "--target", "countdown", "--json"]
    told = CliRunner().invoke(app, [*asked, "--sequential"] if sequential else asked)
    document = json.loads(told.stdout)
    assert set(document) == {"verdict", "reasons", "tasks"}
    assert document["verdict"] == "promote"
    judged = {reason["method"] for reason in document["reasons"] if reason["n"]}
    assert judged == ({"betting"} if sequential else {"score"})


def test_sealed_files_confirm(files):
    first = files(rows(countdown=0.65))
    bad = files(rows(gsm8k=0.8, prefix="s"), prefix="s")
    sealed = {"confirm_anchor": bad["anchor"], "confirm_candidate": bad["candidate"]}
    document = gate_files(**first, target="countdown", **sealed)
    assert document["verdict"] == "reject"
    assert {r["stage"] for r in document["reasons"] if r["outcome"] == "reject"} == {"sealed"}
    good = sealed | {"confirm_candidate": bad["anchor"], "confirm_champion": bad["champion"]}
    assert gate_files(**first, target="countdown", **good)["verdict"] == "promote"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reward": math.nan}, "r0 = nan"),
        ({"reward": None}, "r0 = nan"),
        ({"reward": 0.0, "error": "verifier timed out"}, "r0 = nan"),
        ({"example_id": "r1"}, "rows more than once: r1"),
        ({"harness_hash": "other"}, "different harness hashes"),
        ({"digest": "other"}, "several digests"),
        ({"task": "stranger"}, "stranger: anchor: no rows"),
    ],
)
def test_rows_that_are_not_whole_are_held(files, change, words):
    candidate = rows(countdown=0.65)
    candidate[0] |= change
    document = gate_files(**files(candidate), target="countdown")
    assert document["verdict"] == "hold"
    assert words in "\n".join(r["text"] for r in document["reasons"])


def test_a_reward_that_is_no_number_is_never_a_number(tmp_path):
    odd = [
        {"task": "t", "example_id": i, "reward": r} for i, r in enumerate(["1", [1], {}, 10**400])
    ]
    samples = read_samples(write(tmp_path / "odd.jsonl", odd))
    assert all(math.isnan(sample.reward) for sample in samples)
    truth = write(tmp_path / "true.jsonl", [{"task": "t", "example_id": 7, "reward": True}])
    (sample,) = read_samples(truth)
    assert (sample.example_id, sample.reward) == ("7", 1.0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, "none.jsonl: no such file"),
        ("table.csv", b"task,reward", "a .parquet or .jsonl file"),
        ("broken.jsonl", b'{"task": "t"\n', "line 1: not JSON"),
        ("deep.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("list.jsonl", b"[1, 2]\n", "line 1: a JSON object"),
        ("short.jsonl", b'\n{"task": "t", "reward": 1}\n', "row 1: no example_id"),
        ("null.jsonl", b'{"task": null, "example_id": 1, "reward": 1}', "row 1: no task"),
        ("fake.parquet", b"PAR1 and nothing else", "not parquet"),
    ],
)
def test_what_is_no_table_is_told_in_one_line(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as refused:
        gate_files(path, path, path, "t")
    assert "\n" not in str(refused.value)
    assert name in str(refused.value)


def test_half_a_sealed_draw_is_refused(files):
    given = files(rows())
    with pytest.raises(UserError, match="confirm files"):
        gate_files(**given, target="countdown", confirm_candidate=given["candidate"])
