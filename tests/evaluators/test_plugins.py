"""Own tasks: found, contained, checked; the examples that users copy keep their own contract."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from agent.errors import UserError
from evaluators import examples
from evaluators.loading import read_file, resolve, rows
from evaluators.plugins import all_tasks, check, load, tuned
from evaluators.task import Row, Task, Verdict, judge, training_reward
from evaluators.tasks import TASKS

EXAMPLES = Path(examples.__file__).parent
ROWS = Path(__file__).parent / "rows"

PLUGIN = """
from evaluators.task import Source, Task, Verdict
TASK = Task(
    name="word", source=Source("", eval_split="train", file="words.jsonl"),
    key=lambda row: row["word"], fields=lambda row: {"word": row["word"]}, template="Say {word}.",
    verify=lambda completion, row: Verdict(float(completion == row["word"]), 0.0, completion),
    gold=lambda row: row["word"], wrong=lambda row: row["word"] + "s",
)
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "word.py").write_text(PLUGIN)
    (tmp_path / "words.jsonl").write_text('{"word": "anchor"}\n{"word": "rope"}\n')
    return f"{tmp_path / 'word.py'}:TASK"


def test_an_own_task_is_loaded_with_its_rows_and_a_version_of_its_text(
    spec: str, tmp_path: Path
) -> None:
    tasks = all_tasks([spec])
    assert list(tasks) == [*TASKS, "word"]
    own = tasks["word"]
    assert own.source.file is not None
    assert [row["word"] for row in read_file(Path(own.source.file))] == ["anchor", "rope"]
    rope = {"word": "rope"}
    assert judge(own, "rope", rope).reward == 1.0
    assert (own.key(rope), own.gold(rope), own.wrong(rope)) == ("rope", "rope", "ropes")
    assert own.messages(rope) == [{"role": "user", "content": "Say rope."}]
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
    assert load(spec).graded == resolve(spec).graded
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


def test_a_graded_task_orders_its_answers_and_need_not_reach_the_ends() -> None:
    every = [dict(row) for row in rows(TASKS["gsm8k"], "eval", data_dir=ROWS)]

    def share(completion: str, row: Row) -> Verdict:
        """0.9 for the right answer, 0.2 for any other."""
        right = TASKS["gsm8k"].verify(completion, row).reward
        return Verdict(0.2 + 0.7 * right, 0.0, None)

    graded = replace(TASKS["gsm8k"], verify=share, graded=True)
    assert check(graded, every) == []
    assert "scores 0.9; 1 is wanted" in check(replace(graded, graded=False), every)[0]
    told = check(replace(graded, wrong=graded.gold), every)[0]
    assert "scores 0.9; less than the gold answer's 0.9 is wanted" in told


def test_a_mistake_met_on_every_row_is_one_line() -> None:
    every = list(rows(TASKS["gsm8k"], "eval", data_dir=ROWS))
    broken = replace(TASKS["gsm8k"], verify=lambda completion, row: Verdict(1 / 0, 0.0, None))
    problems = check(broken, every)
    assert len(problems) == 3  # of gold, of wrong, of odd answers
    assert all(problem.endswith("more like this)") for problem in problems)
    for name in ("key", "gold", "wrong", "fields"):
        missing = replace(TASKS["gsm8k"], **{name: lambda row: row["nothing"]})  # type: ignore[arg-type]
        told = check(missing, every)[0]
        assert "KeyError: 'nothing'" in told
        assert f"({len(every) - 1} more like this)" in told


def test_a_check_without_rows_is_no_pass() -> None:
    assert check(TASKS["gsm8k"], []) == ["gsm8k: no rows to check"]
