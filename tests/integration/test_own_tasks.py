"""Rounds of the embedded model on tasks that are not ours, on a real engine."""

import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import exchange
import pytest

from agent.config import load
from agent.home import Home
from agent.population.pool import Population
from agent.population.process import EngineLauncher
from evaluators.environments import taskset_rows
from flows.lab.demo import HARMFUL
from flows.learn.improve import run_round
from flows.learn.weigh import weigh
from flows.service import Service
from flows.session import Session, engine_options
from flows.show.report import RoundReport
from flows.show.terminal import Silent

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]
TASKS_PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"
LEARNER = {"generations": 4, "population": 16, "selection": 0, "prompts": 48}


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineLauncher]:
    started = EngineLauncher(tmp_path_factory.mktemp("log") / "launcher.log")
    yield started
    started.close()


def learnt(service: Service, launcher: EngineLauncher) -> list[float]:
    """A round on the target; its mean reward by generation."""
    [options] = engine_options(service)
    population = Population([lambda: launcher.engine(options)])
    try:
        made = run_round(service, population, service.settings.tasks.target, Silent())
    finally:
        population.close()
    generations = service.journal.generations(made.run_id)
    return [float(each.rewards.mean()) for each in generations]


def test_an_agents_exchange_is_learnt_from(
    launcher: EngineLauncher, tmp_path: Path, scale: Callable[[int, int], int]
) -> None:
    """Tool call, result, answer: the last answer's reward moves the weights that gave all turns."""
    if scale(0, 1) == 0:
        pytest.skip("four generations of conversations: in the soak")
    rows = exchange.questions(200)
    service = exchange.desk(tmp_path, rows[48:], learner=LEARNER)
    exchange.converse(service, rows[:48])
    rewards = learnt(service, launcher)
    [run] = service.journal.runs()
    assert run.plan["rows"]["from_traffic"] == 48
    assert rewards[-1] > rewards[0] + 0.1, rewards


def test_a_taskset_of_several_turns_is_learnt_from(
    launcher: EngineLauncher,
    tmp_path: Path,
    scale: Callable[[int, int], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same exchange, judged over its turns by rewards of the real library."""
    if scale(0, 1) == 0:
        pytest.skip("four generations of conversations: in the soak")
    pytest.importorskip("verifiers.v1")
    monkeypatch.syspath_prepend(str(tmp_path))
    service = exchange.taskset_desk(tmp_path, exchange.questions(200), 48, learner=LEARNER)
    rewards = learnt(service, launcher)
    [run] = service.journal.runs()
    assert run.plan["rows"]["from_traffic"] == 48
    assert rewards[-1] > rewards[0] + 0.1, rewards


NEAR = """
import re
from evaluators.environments import from_trl
{more}
NUMBER = re.compile(r"#### (-?[0-9]+)")

def near(completions, solution, **_):
    # As TRL's documentation writes reward functions: 1 for the right number, less the further off.
    found = [NUMBER.search(each[0]["content"]) for each in completions]
    pairs = zip(found, solution)
    return [1 / (1 + abs(int(one[1][:6]) - int(right))) if one else 0.0 for one, right in pairs]

TASK = from_trl(
    [near{function}], "near.jsonl", name="near", gold=lambda row: "#### " + row["solution"],
    max_tokens=96,
)
"""
TASKSET = """
import json
from pathlib import Path
import verifiers.v1 as vf

class Sum(vf.TaskData):
    answer: str

class Counted(vf.Task[Sum, vf.State, vf.TaskConfig]):
    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply.rpartition("####")[2].strip() == self.data.answer)

class CountedSet(vf.Taskset[Counted, vf.TasksetConfig]):
    def load(self):
        for line in Path(__file__).with_name("sums.jsonl").read_text().splitlines():
            yield Counted(Sum(**json.loads(line)))

__all__ = ["CountedSet"]
"""
COUNTED = """
from evaluators.environments import from_verifiers
TASK = from_verifiers(
    "counted_set", "counted.jsonl", name="counted", gold=lambda row: "#### " + row["answer"],
    max_tokens=96,
)
"""


def written(path: Path, rows: list[Mapping[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def home(root: Path, target: str, learner: dict[str, Any], **tasks: Any) -> Service:
    """A home of the embedded model with an own task beside it."""
    own = {"target": target, "files": [f"{root / target}.py:TASK"], "curve_every": 0, "kl_rows": 0}
    settings = load(None, tasks=own | tasks, learner=learner)
    place = Home.at(root / "home")
    place.settings_json.write_text(settings.model_dump_json())
    (place.root / "salt").write_text("a salt of tests")
    return Service(place, settings)


def judged(
    service: Service, launcher: EngineLauncher, target: str, **changes: Any
) -> tuple[list[float], RoundReport]:
    """A round on a real engine, learnt and weighed; its mean rewards by generation."""
    [options] = engine_options(service)
    session = Session(service, Silent(), Population([lambda: launcher.engine(options)]))
    try:
        made = run_round(service, session.population, target, Silent(), changes)
        report = weigh(session, made.run_id).report
    finally:
        session.close()
    generations = service.journal.generations(made.run_id)
    return [float(each.rewards.mean()) for each in generations], report


def test_a_graded_task_of_trl_is_promoted_and_a_candidate_that_harms_it_rejected(
    launcher: EngineLauncher, tmp_path: Path, scale: Callable[[int, int], int]
) -> None:
    """A reward function in TRL's form, beside one of TRL's own where that is installed."""
    if scale(0, 1) == 0:
        pytest.skip("two rounds, judged: in the soak")
    try:
        importlib.import_module("trl.rewards")
        more, function = "from trl.rewards import think_format_reward", ", think_format_reward"
    except ImportError:
        more = function = ""
    rows = [
        {"prompt": [{"role": "user", "content": exchange.told(row)}], "solution": _number(row)}
        for row in exchange.questions(1200)
    ]
    (tmp_path / "near.py").write_text(NEAR.format(more=more, function=function))
    written(tmp_path / "near.jsonl", rows)
    learner = {"generations": 4, "population": 16, "prompts": 32, "selection": 0}
    service = home(tmp_path, "near", learner, priors=["piqa", "near"], rows=200)
    rewards, report = judged(service, launcher, "near")
    assert rewards[-1] > rewards[0] + 0.05, rewards
    assert report.verdict == "promote", report
    _, report = judged(service, launcher, "gsm8k", **HARMFUL, prompts=16)
    assert report.verdict == "reject", report
    assert "near" in {str(each.get("task")) for each in report.reasons}, report.reasons


def test_a_taskset_of_verifiers_trains(
    launcher: EngineLauncher,
    tmp_path: Path,
    scale: Callable[[int, int], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if scale(0, 1) == 0:
        pytest.skip("a round with the library's verdicts: in the soak")
    pytest.importorskip("verifiers.v1")
    sums = [
        {"prompt": exchange.told(row), "answer": _number(row)} for row in exchange.questions(120)
    ]
    written(tmp_path / "sums.jsonl", sums)
    (tmp_path / "counted_set.py").write_text(TASKSET)
    (tmp_path / "counted.py").write_text(COUNTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    written(tmp_path / "counted.jsonl", list(taskset_rows("counted_set")))
    learner = {"generations": 3, "population": 12, "prompts": 24, "selection": 0}
    rewards = learnt(home(tmp_path, "counted", learner, priors=["piqa"], rows=40), launcher)
    assert rewards[-1] > rewards[0] + 0.05, rewards


def test_a_task_without_gold_trains(
    launcher: EngineLauncher, tmp_path: Path, scale: Callable[[int, int], int]
) -> None:
    """The one of docs/tasks.md, whose rows are questions alone."""
    if scale(0, 1) == 0:
        pytest.skip("a round: in the soak; its verifier and its traffic have unit tests")
    blocks = re.findall(r"```python\n(.*?)```", TASKS_PAGE.read_text("utf-8"), re.DOTALL)
    (text,) = (block for block in blocks if 'name="steps"' in block)
    (tmp_path / "steps.py").write_text(text)
    written(
        tmp_path / "steps.jsonl",
        [{"question": row["question"]} for row in exchange.questions(240)],
    )
    learner = {"generations": 4, "population": 16, "prompts": 48, "selection": 0}
    rewards = learnt(home(tmp_path, "steps", learner, priors=["piqa"], rows=40), launcher)
    assert rewards[-1] > rewards[0] + 0.1, rewards


def _number(row: Mapping[str, Any]) -> str:
    """The final number of a row's solution."""
    return str(row["answer"]).rpartition("#### ")[2]
