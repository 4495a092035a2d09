"""Own tasks: found, contained, checked; the examples that users copy keep their own contract."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.errors import UserError
from evaluators import examples
from evaluators.loading import read_file, resolve, rows
from evaluators.plugins import all_tasks, check, load, tuned
from evaluators.sandbox import Limits, Sandbox
from evaluators.task import Row, Task, Verdict, judge, training_reward
from evaluators.tasks import TASKS

EXAMPLES = Path(examples.__file__).parent
ROWS = Path(__file__).parent / "rows"
LIMITS = Limits(cpu_s=0.1, wall_s=20.0, memory_bytes=2**28)

PLUGIN = """
import os, sys, time
from evaluators.task import Source, Task, Verdict

def verify(completion, row):
    print("noise on stdout", flush=True)
    if completion == "spin":
        while True:
            try:
                while True: pass
            except BaseException:
                pass
    if completion == "power": 9 ** 9 ** 9 ** 9
    if completion == "sleep": time.sleep(60)
    if completion == "memory": return Verdict(float(len(bytearray(2**31)) > 0), 0.0, "got it")
    if completion == "exit": os._exit(0)
    if completion == "leave": sys.exit("bye")
    if completion == "fork": os.fork()
    if completion == "shell": os.system("sleep 60")
    if completion == "forge": os.write(3, b'{"number": 0, "verdict": {"reward": 1.0}}\\n')
    if completion == "raise": raise ValueError("no such answer")
    if completion == "write": open(row["file"], "w").write("x" * 100)
    if completion == "secret": return Verdict(0.0, 0.0, os.environ.get("ANCHORAGE_SECRET"))
    if completion == "long": return Verdict(0.0, 0.0, "x" * 5_000_000)
    return Verdict(float(completion == row["word"]), 0.0, completion)

TASK = Task(
    name="word", source=Source("", eval_split="train", file="words.jsonl"),
    key=lambda row: row["word"], fields=lambda row: {"word": row["word"]}, template="Say {word}.",
    verify=verify, gold=lambda row: row["word"], wrong=lambda row: row["word"] + "s",
)
"""
ROW = {"word": "anchor"}


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "word.py").write_text(PLUGIN)
    (tmp_path / "words.jsonl").write_text('{"word": "anchor"}\n{"word": "rope"}\n')
    return f"{tmp_path / 'word.py'}:TASK"


@pytest.fixture
def sandbox(spec: str) -> Iterator[Sandbox]:
    sandbox = Sandbox(spec, LIMITS)
    yield sandbox
    sandbox.close()


@pytest.mark.proof
def test_a_verdict_comes_back_from_the_worker(sandbox: Sandbox) -> None:
    assert sandbox.verify("anchor", ROW) == Verdict(1.0, 0.0, "anchor")
    assert sandbox.verify("\ud800\n\x00", ROW) == Verdict(0.0, 0.0, "\ud800\n\x00")


@pytest.mark.proof
@pytest.mark.parametrize(
    ("completion", "told"),
    [
        ("spin", "more than 0.1 s of CPU"),
        ("power", "more than 0.1 s of CPU"),
        ("memory", "MemoryError"),
        ("exit", "its worker ended (0)"),
        ("leave", "its worker ended (1)"),
        ("fork", "os.fork: a verifier may not start a process"),
        ("shell", "os.system: a verifier may not start a process"),
        ("forge", "its worker answered something else"),
        ("raise", "ValueError: no such answer"),
    ],
)
def test_a_verifier_that_hangs_grows_or_dies_costs_its_row_only(
    sandbox: Sandbox, completion: str, told: str
) -> None:
    verdict = sandbox.verify(completion, ROW)
    assert (verdict.reward, verdict.extracted) == (0.0, None)
    assert verdict.error is not None
    assert told in verdict.error
    assert sandbox.verify("anchor", ROW).reward == 1.0


@pytest.mark.proof
def test_a_verifier_that_sleeps_is_given_up(spec: str) -> None:
    sandbox = Sandbox(spec, Limits(wall_s=0.3))
    told = sandbox.verify("sleep", ROW).error or ""
    sandbox.close()
    assert "no verdict within 0.3 s" in told


@pytest.mark.proof
def test_a_verifier_can_neither_write_files_nor_read_secrets(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANCHORAGE_SECRET", "key")
    file = tmp_path / "written"
    assert sandbox.verify("write", ROW | {"file": str(file)}).reward == 0.0
    assert file.read_bytes() == b""
    assert sandbox.verify("secret", ROW) == Verdict(0.0, 0.0, None)
    assert len(sandbox.verify("long", ROW).extracted or "") == 1000


@pytest.mark.proof
def test_a_worker_that_was_killed_between_two_verdicts_is_replaced(sandbox: Sandbox) -> None:
    assert sandbox.verify("anchor", ROW).reward == 1.0
    assert sandbox._worker is not None
    sandbox._worker.kill()
    sandbox._worker.wait()
    assert "its worker ended (-9)" in (sandbox.verify("anchor" * 100_000, ROW).error or "")
    assert sandbox.verify("anchor", ROW).reward == 1.0


@pytest.mark.proof
def test_a_closed_sandbox_leaves_no_process(spec: str) -> None:
    sandbox = Sandbox(spec, LIMITS)
    sandbox.verify("anchor", ROW)
    assert sandbox._worker is not None
    pid = sandbox._worker.pid
    sandbox.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_own_task_is_loaded_with_its_rows_and_a_version_of_its_text(
    spec: str, tmp_path: Path
) -> None:
    tasks = all_tasks([spec])
    assert list(tasks) == [*TASKS, "word"]
    own = tasks["word"]
    assert own.source.file is not None
    assert [row["word"] for row in read_file(Path(own.source.file))] == ["anchor", "rope"]
    assert judge(own, "rope", {"word": "rope"}).reward == 1.0
    before = own.version
    (tmp_path / "word.py").write_text(PLUGIN + "\n# changed\n")
    assert load(spec).version != before


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("word.py", "wanted path/to/file.py:TASK"),
        ("nowhere.py:TASK", "FileNotFoundError"),
        ("no.such.module:TASK", "ModuleNotFoundError"),
        ("evaluators.task:judge", "judge is function; a Task is wanted"),
        ("evaluators.task:nothing", "nothing is NoneType; a Task is wanted"),
        ("evaluators.tasks.gsm8k:TASK", "the name 'gsm8k' is taken"),
    ],
)
def test_a_spec_that_names_no_new_task_is_told_in_one_line(spec: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        all_tasks([spec])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_the_settings_change_prompts_and_lengths_and_nothing_else() -> None:
    found = tuned(TASKS, prompts={"piqa": {"template": "{goal}\n{solutions}\n?"}}, max_tokens=48)
    assert list(found) == list(TASKS)
    assert all(found[name].max_tokens == min(48, TASKS[name].max_tokens) for name in TASKS)
    assert [name for name in TASKS if found[name].template != TASKS[name].template] == ["piqa"]
    assert tuned(TASKS) == TASKS
    words = {"system": "Be brief.", "prefill": "The answer is (", "shots": 0}
    asked = tuned(TASKS, prompts={"mmlu_pro": words})["mmlu_pro"]
    row = rows(TASKS["mmlu_pro"], "eval", data_dir=ROWS, limit=1)[0]
    roles = [(message["role"], message["content"]) for message in asked.messages(row)]
    assert [roles[0], roles[-1]] == [("system", "Be brief."), ("assistant", "The answer is (")]
    assert roles[1] == ("user", TASKS["mmlu_pro"].messages(row)[0]["content"])
    assert judge(asked, f"{row['answer']})", row).reward == 1.0
    with pytest.raises(UserError, match="prompt for task 'pika'; allowed: arc_challenge, "):
        tuned(TASKS, prompts={"pika": {"template": "?"}})


@pytest.mark.proof
@pytest.mark.parametrize("name", [name for name in TASKS if name != "refusal"])
def test_our_tasks_keep_the_contract(name: str) -> None:
    assert check(TASKS[name], rows(TASKS[name], "eval", data_dir=ROWS)) == []


def test_the_safety_prior_keeps_the_contract() -> None:
    assert check(TASKS["refusal"], rows(TASKS["refusal"], "eval", limit=20)) == []


@pytest.mark.proof
@pytest.mark.parametrize("name", ["json_answer", "sql"])
def test_the_examples_keep_the_contract_in_process_and_in_the_sandbox(name: str) -> None:
    spec = f"{EXAMPLES / name}.py:TASK"
    found = read_file(EXAMPLES / f"{name}.jsonl")
    assert len(found) >= 8
    assert check(resolve(spec), found) == []
    assert check(load(spec), found[:3]) == []
    assert training_reward(resolve(spec), Verdict(1.0, 1.0, "")) == 1.1


def slow(completion: str, row: Row) -> Verdict:
    if completion.startswith("<answer><answer>"):
        time.sleep(0.11)
    return TASKS["gsm8k"].verify(completion, row)


def changing(completion: str, row: Row) -> Verdict:
    row["answer"] += " "  # type: ignore[index]
    return TASKS["gsm8k"].verify(completion, row)


class Moody:
    """Another verdict at every look."""

    looks = 0

    def __call__(self, completion: str, row: Row) -> Verdict:
        self.looks += 1
        return replace(TASKS["gsm8k"].verify(completion, row), extracted=str(self.looks))


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ({"gold": lambda row: "#### 0.123"}, "the gold answer '#### 0.123' scores 0; 1 is wanted"),
        ({"wrong": TASKS["gsm8k"].gold}, "scores 1; 0 is wanted"),
        ({"key": lambda row: "same"}, "key 'same' names 4 rows; one is wanted"),
        ({"verify": slow}, "at most 100 are allowed"),
        ({"verify": changing}, "its row was changed"),
        ({"verify": Moody()}, "two verdicts on two looks"),
        ({"verify": lambda c, r: Verdict(1.0, 1.0, c)}, "the empty answer '' scores 1; 0 is"),
        ({"verify": lambda c, r: Verdict(1 / len(c), 0.0, c)}, "fails: ZeroDivisionError"),
    ],
)
def test_the_check_finds_every_breach(broken: dict[str, object], told: str) -> None:
    task: Task = replace(TASKS["gsm8k"], **broken)  # type: ignore[arg-type]
    every = [dict(row) for row in rows(TASKS["gsm8k"], "eval", data_dir=ROWS)]
    problems = check(task, every)
    assert any(told in problem for problem in problems), problems


def test_a_check_without_rows_is_no_pass() -> None:
    assert check(TASKS["gsm8k"], []) == ["gsm8k: no rows to check"]
