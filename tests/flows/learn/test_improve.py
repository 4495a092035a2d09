"""A round on the embedded model, its engines replaced by a rule: what it keeps and refuses."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from agent.config import load
from agent.errors import UserError
from agent.home import Home
from agent.learner.es import Applied, Step
from agent.learner.noise import Address, NoiseKind
from agent.population.pool import Population
from agent.population.schedule import Completion, Messages
from agent.store.experience import Answer, Interaction, Judgement
from agent.store.replay import replay, snapshot_path
from agent.store.weights import Anchor, Parameters
from flows.learn.collect import collect_rows
from flows.learn.curve import learner_share
from flows.learn.improve import Round, run_round, unweighed
from flows.learn.plan import tuned_lambda
from flows.round_files import RoundFiles
from flows.serve.outlook import overview
from flows.service import Service
from flows.show.catch_up import show_run
from flows.show.report import RoundReport
from flows.show.review import markdown
from flows.show.terminal import Reporter, Silent

pytestmark = pytest.mark.proof

TINY = {"generations": 5, "population": 4, "prompts": 6}
Changes = Mapping[str, Any]


class Recorder:
    """Where MLflow would be: keeps what it is told."""

    def __init__(self) -> None:
        self.metrics: dict[int, Mapping[str, float]] = {}

    def start_round(self, round_id: str, params: Changes, rows: object = None) -> str:
        return round_id

    def log_generation(self, run: str, generation: int, metrics: Changes, tags: Changes) -> None:
        self.metrics[generation] = metrics


class Ruled:
    """An engine with the true theta; a rule says how many of a member's answers are right."""

    def __init__(self, home: Path, gold: Mapping[str, str], log: list[Address]):
        self._importance, self._gold, self._log = home / "importance", gold, log
        self._theta: Parameters
        self.stop_after: int | None = None
        self.short = False
        self.asked: list[Messages] = []
        self._seconds = 0.0

    def open(self, anchor: Path) -> str:
        self._theta = Parameters.zeros(Anchor.open(anchor), self._importance)
        return self._theta.anchor.digest

    def restore(self, snapshot: Path | None, steps: Sequence[Step]) -> str:
        if snapshot is None:
            self._theta = Parameters.zeros(self._theta.anchor, self._importance)
        else:
            self._theta = Parameters.load(self._theta.anchor, snapshot, self._importance)
        for step in steps:
            self._theta.apply(step)
        return self._theta.delta_hash()

    def apply(self, step: Step) -> Applied:
        return self._theta.apply(step)

    def save(self, path: Path) -> str:
        self._theta.save(path)
        return self._theta.delta_hash()

    def load(self, directory: Path) -> str:
        raise AssertionError("not asked for here")

    def generate(
        self,
        prompts: Sequence[Messages],
        max_tokens: int | Sequence[int],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[Completion]:
        assert member is not None
        if self.stop_after is not None and len(self._log) >= self.stop_after:
            raise UserError("stopped")
        self._log.append(member[0])
        self.asked = list(prompts)
        self._seconds += 1e-6
        texts = [messages[-1]["content"] for messages in prompts]
        return [
            Completion(
                self._gold.get(text, "#### 7") if self._right(member, text) else "no idea",
                3,
                "stop",
            )
            for text in texts[: len(texts) - self.short]
        ]

    def answer_logprobs(
        self,
        prompts: Sequence[Messages],
        answers: Sequence[str],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[list[float]]:
        assert member is not None
        self._log.append(member[0])
        self.asked = list(prompts)
        pairs = zip(prompts, answers, strict=True)
        return [[-1.0 - self._right(member, p[-1]["content"]), float(-len(a))] for p, a in pairs]

    def _right(self, member: tuple[Address, float], text: str) -> bool:
        drawn = hashlib.sha256(f"{member} {self._theta.delta_hash()} {text}".encode()).digest()
        return drawn[0] < 128

    def spent(self) -> dict[str, float]:
        return {"render": self._seconds, "update": self._seconds, "generate": 0.0}

    def close(self) -> None:
        pass


class Bench:
    """A home, its service and one ruled engine."""

    def __init__(self, root: Path):
        self.service = Service(
            Home.at(root), load(tasks={"curve_every": 0}, gateway={"principal_cap": 0.2})
        )
        self.recorder = Recorder()
        self.service.registry = self.recorder  # type: ignore[assignment]
        task = self.service.task("gsm8k")
        rows = self.service.training_rows("gsm8k").values()
        gold = {task.messages(row)[-1]["content"]: task.gold(row) for row in rows}
        self.log: list[Address] = []
        self.engine = Ruled(root, gold, self.log)

    def learn(self, progress: Reporter | None = None, **changes: Any) -> Round:
        population, told = Population([lambda: self.engine]), progress or Silent()
        try:
            return run_round(self.service, population, "gsm8k", told, TINY | changes)
        finally:
            population.close()

    def files(self) -> list[str]:
        """Everything the home holds of rounds."""
        folders = ("runs", "weights", "snapshots", "importance")
        root = self.service.home.root
        return [str(path) for name in folders for path in (root / name).glob("*")]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Bench]]:
    monkeypatch.chdir(tmp_path)
    made = []

    def bench(name: str = "home") -> Bench:
        made.append(Bench(tmp_path / name))
        return made[-1]

    yield bench
    for each in made:
        each.service.journal.close()


@pytest.fixture
def bench(make: Callable[[str], Bench]) -> Bench:
    return make("home")


def weights(anchor: Anchor, path: Path, top: float) -> Path:
    tensors = {
        name: torch.linspace(0, top, torch.Size(shape).numel()).view(shape)
        for name, (shape, _) in anchor.specs.items()
    }
    save_file(tensors, path)
    return path


def test_a_round_leaves_its_weights_and_one_snapshot_where_the_next_begins(bench: Bench) -> None:
    service, made = bench.service, bench.learn()
    hashes = [each.delta_hash for each in service.journal.generations(made.run_id)]
    assert list(service.home.snapshots.iterdir()) == [
        snapshot_path(service.home.snapshots, hashes[-1])
    ]
    assert service.kept() == [service.anchor.digest, made.digest]
    second = bench.learn(alpha=0.02)
    assert second.digest != made.digest
    last = service.journal.generations(second.run_id)[-1].delta_hash
    assert [path.stem for path in service.home.snapshots.iterdir()] == [last]


def test_a_candidate_that_was_never_judged_comes_before_a_new_round(bench: Bench) -> None:
    service = bench.service
    assert unweighed(service, "gsm8k", TINY) is None
    made = bench.learn()
    assert unweighed(service, "gsm8k", TINY) == made
    assert unweighed(service, "gsm8k", TINY | {"alpha": 0.02}) is None
    assert unweighed(service, "countdown", TINY) is None
    service.record(made.digest, "EVALUATED", "judged")
    service.record(made.digest, "REJECT", "judged")
    assert unweighed(service, "gsm8k", TINY) is None


def test_a_round_in_progress_keeps_two_snapshots_and_goes_on_without_any(
    make: Callable[[str], Bench],
) -> None:
    whole = make("whole")
    digest = whole.learn(snapshot_every=1).digest
    for drop in (False, True):
        cut = make(f"cut {drop}")
        cut.engine.stop_after = 3 * TINY["population"] + 2
        with pytest.raises(UserError, match="stopped"):
            cut.learn(snapshot_every=1)
        service = cut.service
        done = [each.delta_hash for each in service.journal.generations("0001-gsm8k")]
        kept = {path.stem for path in service.home.snapshots.iterdir()}
        assert (len(done), kept) == (3, set(done[-2:]))
        if drop:
            for path in service.home.snapshots.iterdir():
                path.unlink()
        cut.engine.stop_after = None
        assert cut.learn(snapshot_every=1).digest == digest
        assert cut.log == whole.log  # each member once, whatever was lost


def test_the_learners_share_is_told_every_generation_and_over_the_round(bench: Bench) -> None:
    made = bench.learn()
    assert bench.recorder.metrics == {}, "learning itself shows nothing"
    show_run(bench.service, made.run_id)
    told = [bench.recorder.metrics[generation] for generation in range(TINY["generations"])]
    for row in told:
        assert row["seconds.render"] == row["seconds.update"] == pytest.approx(4e-6)
        assert row["share.learner"] == pytest.approx(8e-6 / row["seconds.generation"])
    shares = sorted(row["share.learner"] for row in told)
    assert learner_share(bench.service, made.run_id) == shares[2]


def test_a_round_of_one_member_ends_after_three_recorded_no_ops(bench: Bench) -> None:
    made = bench.learn(population=1)
    rows = bench.service.journal.generations(made.run_id)
    assert [row.step.no_op is not None for row in rows] == [True] * 3
    assert made.digest == bench.service.anchor.digest


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"alpha": 0.5, "lam": 2.0}, "alpha .* lambda = 0.5 .* 2.0 gives a l2 shrink of 1"),
        ({"mirrored": True, "population": 3}, "population 3"),
        ({"alpha": -1}, "learner.alpha = -1"),
        ({"alfa": 1}, "unknown key 'learner.alfa' .* allowed: sigma, alpha, "),
        ({"penalty": "l1", "target_norm_ratio": 0.5}, "target_norm_ratio = 0.5 .* allowed: l2"),
        ({"tune_lambda": True, "target_norm_ratio": 0.5}, "target_norm_ratio = 0.5 .* not tuned"),
        ({"importance": "none.safetensors"}, "none.safetensors': no such file"),
    ],
)
def test_an_impossible_round_is_one_line_and_leaves_nothing(
    bench: Bench, changes: Changes, told: str
) -> None:
    with pytest.raises(UserError, match=told) as error:
        bench.learn(**changes)
    assert "\n" not in str(error.value)
    assert bench.files() == []
    assert bench.service.journal.runs() == []
    assert bench.log == []


def test_missing_rewards_end_the_round_in_one_line_and_it_goes_on_later(
    make: Callable[[str], Bench],
) -> None:
    bench = make("short")
    bench.engine.short = True
    with pytest.raises(UserError, match="an engine gave 5 answers, allowed: 6"):
        bench.learn()
    assert bench.service.journal.members_done("0001-gsm8k", 0) == {}
    bench.engine.short = False
    assert bench.learn().digest == make("whole").learn().digest


def test_other_rows_than_it_was_opened_with_are_refused(bench: Bench) -> None:
    bench.engine.stop_after = 1
    with pytest.raises(UserError, match="stopped"):
        bench.learn()
    path = bench.service.home.runs / "0001-gsm8k" / "rows.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(rows[::-1]), encoding="utf-8")
    with pytest.raises(UserError, match="not the rows that round 0001-gsm8k was opened with"):
        bench.learn()


def steps_of(service: Service, run_id: str) -> list[Step]:
    return [generation.step for generation in service.journal.generations(run_id)]


CHAT = [
    {"role": "system", "content": "One word,  please."},
    {"role": "user", "content": "2 pens?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And 5 more — “how many”?"},
]
LONG = [{"role": "user", "content": "How many? " * 60}]


def send(
    service: Service, principal: str, messages: list[dict[str, str]], tokens: int, number: int = 0
) -> None:
    """One verified request."""
    ident = f"of-{principal}-{number}"
    example = {"question": f"{principal} asks {number}", "answer": "#### 7"}
    row = Interaction(
        inference_id=ident, created=time.time() - 1, endpoint="chat.completions", model="m",
        version="v", principal=principal, status="ok", latency_s=0.1, prompt_tokens=tokens,
        completion_tokens=1, task="gsm8k", source="submitted", example=json.dumps(example),
        prompt=json.dumps(messages), prompt_hash=ident, row_hash=ident, group_hash=ident,
        answers=(Answer(0, "7", "stop"),),
    )  # fmt: skip
    service.experience.record([row])
    service.experience.judge([Judgement(ident, 0, judged=1.0, reward=1.0)])


class Listener(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_a_rounds_prompts_are_what_was_sent_and_its_file_keeps_them(bench: Bench) -> None:
    send(bench.service, "ann", CHAT, 40)
    made = bench.learn(generations=1)
    assert [asked for asked in bench.engine.asked if len(asked) > 1] == [CHAT]
    path = bench.service.home.run(made.run_id) / "rows.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert [each["messages"] for each in kept] == bench.engine.asked
    assert [each["sent"] for each in kept] == [len(asked) > 1 for asked in bench.engine.asked]
    assert len(bench.service.training_rows("gsm8k")) > 6


def test_worked_answers_are_read_and_their_mean_log_probability_is_the_fitness(
    bench: Bench,
) -> None:
    made = bench.learn(generations=2, fitness="likelihood")
    task = bench.service.task("gsm8k")
    path = bench.service.home.run(made.run_id) / "rows.json"
    rows = [each["row"] for each in json.loads(path.read_text(encoding="utf-8"))]
    for generation in bench.service.journal.generations(made.run_id):
        assert generation.step.no_op is None
        for column, row in zip(generation.rewards.T, rows, strict=True):
            length = len(task.worked(row))
            assert set(column) <= {(-1.0 - length) / 2, (-2.0 - length) / 2}
    pace = RoundFiles(bench.service.home, made.run_id).pace()
    assert [row["tokens"] for row in pace] == [4 * 6 * 2.0] * 2  # members, rows, tokens of each


def test_a_row_whose_worked_answer_is_wrong_is_left_out_where_answers_are_read(
    bench: Bench,
) -> None:
    task = bench.service.task("gsm8k")
    first = next(iter(bench.service.training_rows("gsm8k").values()))
    bad = replace(task, demonstrate=lambda row: "none" if row == first else task.gold(row))
    bench.service.target = lambda name: bad  # type: ignore[method-assign]
    listener = Listener()
    made = bench.learn(listener, generations=1, fitness="likelihood", prompts=400)
    told = [line for line in listener.said if "worked answer" in line]
    assert len(told) == 1
    place = int(told[0].split("row ")[1].split()[0])
    (generation,) = bench.service.journal.generations(made.run_id)
    assert not generation.rewards[:, place].any()
    assert np.count_nonzero(generation.rewards.any(axis=0)) == generation.rewards.shape[1] - 1
    hopeless = replace(task, demonstrate=lambda row: "none")
    bench.service.target = lambda name: hopeless  # type: ignore[method-assign]
    with pytest.raises(UserError, match="fitness: 'likelihood', allowed for gsm8k: 'reward'"):
        bench.learn(generations=2, fitness="likelihood")


def test_what_was_set_aside_is_said_when_a_round_begins_and_stands_in_its_plan(
    bench: Bench,
) -> None:
    send(bench.service, "ann", [*CHAT, {"role": "assistant", "content": "7"}], 40)
    listener = Listener()
    made = bench.learn(listener, generations=1)
    assert "set aside: 1 of ann: not_as_sent: it ends with an answer" in listener.said
    told = bench.service.journal.run(made.run_id).plan["rows"]
    assert told["set_aside"] == {"not_as_sent": 1, "unverified": 0}
    assert "ann" not in json.dumps(told)


def test_a_row_over_the_cap_is_counted_by_collect_at_the_rounds_start_and_in_its_report(
    bench: Bench,
) -> None:
    for principal, number in product(("ann", "bob"), range(8)):
        send(bench.service, principal, CHAT, 40, number)
    capped = collect_rows(bench.service, "gsm8k", TINY["prompts"]).counts()["over_cap"]
    assert capped > 4
    listener = Listener()
    made = bench.learn(listener, generations=1)
    said = [re.search(r"set aside: (\d+) of \w+: over_cap", line) for line in listener.said]
    assert sum(int(each[1]) for each in said if each) == capped
    rows = bench.service.journal.run(made.run_id).plan["rows"]
    figures = ("anchor", "champion", "candidate", "difference", "low", "high")
    tasks = {"gsm8k": {"n": 6, "role": "target", **dict.fromkeys(figures)}}
    report = RoundReport(
        made.run_id, "gsm8k", 1, "ended", made.digest, "hold", (), tasks, rows=rows
    )
    assert f" {capped} over_cap" in markdown(report, [], "")
    assert overview(bench.service)["traffic"]["set_aside"]["over_cap"] == capped


def test_an_open_round_leaves_out_a_row_that_cannot_be_asked_and_says_whose(bench: Bench) -> None:
    """Opened where prompts could be longer; its other rows are asked, and the row earns nothing."""
    send(bench.service, "eve", LONG, 200)
    bench.engine.stop_after = 4
    with pytest.raises(UserError, match="stopped"):
        bench.learn()
    run = bench.service.journal.run("0001-gsm8k")
    assert LONG in bench.engine.asked
    place = bench.engine.asked.index(LONG)
    small = load(tasks={"curve_every": 0}, model={"max_model_len": 150})
    bench.service = Service(bench.service.home, small)
    bench.service.registry = bench.recorder  # type: ignore[assignment]
    bench.engine.stop_after, listener = None, Listener()
    made = bench.learn(listener)
    assert made.run_id == run.run_id
    assert LONG not in bench.engine.asked
    assert len(bench.engine.asked) == 5
    assert [line.partition(" is left out: ")[0] for line in listener.said] == [
        "round 0001-gsm8k: resumed at generation 1",
        f"round 0001-gsm8k: row {place} of eve",
    ]
    for number, each in enumerate(bench.service.journal.generations(run.run_id)):
        assert each.rewards.shape == (4, 6)
        assert (each.rewards[:, place] == 0).all() == (number > 0)


def test_a_round_opened_by_an_older_home_has_its_rows_asked_and_bad_ones_left_out(
    bench: Bench,
) -> None:
    """Its file holds rows alone, one of them with no question."""
    bench.engine.stop_after = 1
    with pytest.raises(UserError, match="stopped"):
        bench.learn()
    service, journal = bench.service, bench.service.journal
    folder = service.home.run("0002-gsm8k")
    folder.mkdir()
    rows = [{"answer": "#### 7"}, *list(service.training_rows("gsm8k").values())[:5]]
    text = json.dumps(rows)
    (folder / "rows.json").write_text(text)
    (service.home.run("0001-gsm8k") / "given_up").touch()
    plan = journal.run("0001-gsm8k").plan
    digest = {"rows_sha256": hashlib.sha256(text.encode()).hexdigest()}
    journal.open_run(
        "0002-gsm8k", anchor_digest=service.anchor.digest, parent_digest=service.champion(),
        target="gsm8k", run_seed=3, plan={**plan, **digest}, now=0.0,
    )  # fmt: skip
    bench.engine.stop_after, listener = None, Listener()
    assert bench.learn(listener).run_id == "0002-gsm8k"
    assert "row 0 of the data set is left out" in listener.said[-1]
    task = service.task("gsm8k")
    assert bench.engine.asked == [task.messages(row) for row in rows[1:]]


def test_importance_and_shapes_of_a_penalty_reach_every_step(bench: Bench, tmp_path: Path) -> None:
    service = bench.service
    file = weights(service.anchor, tmp_path / "weights.safetensors", 2.0)
    made = bench.learn(penalty="huber", huber_threshold=0.25, importance=str(file))
    steps = steps_of(service, made.run_id)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert {(s.penalty.threshold, s.penalty.importance) for s in steps} == {(0.25, digest)}
    file.unlink()
    again = replay(service.journal, service.anchor, made.digest, importance=service.home.importance)
    assert again.digest() == made.digest
    net = bench.learn(penalty="elastic_net", l1_share=0.125)
    assert {s.penalty.l1_share for s in steps_of(service, net.run_id)} == {0.125}
    strong = weights(service.anchor, file, 50.0)
    with pytest.raises(UserError, match=r"alpha \* lambda \* weight 50.0"):
        bench.learn(importance=str(strong))


def evaluated(service: Service, made: Round, before: float, after: float) -> None:
    """What judging writes."""
    figures = {"gsm8k": {"champion": before, "candidate": after}}
    service.record(
        made.digest, "EVALUATED", "a test", statistics={"round": made.run_id, "tasks": figures}
    )


def test_a_tuned_lambda_falls_until_the_target_does_not_suffer(bench: Bench) -> None:
    service, short = bench.service, {"generations": 1, "tune_lambda": True, "lam": 8.0}

    def told(made: Round) -> float:
        lams = {step.penalty.lam for step in steps_of(service, made.run_id)}
        assert lams == {service.journal.run(made.run_id).plan["lambda"]}
        return lams.pop()

    first = bench.learn(**short)
    assert told(first) == 8.0
    evaluated(service, first, 0.5, 0.5)  # no gain: it suffers
    second = bench.learn(**short)
    assert told(second) == 4.0
    evaluated(service, second, 0.5, 0.6)
    third = bench.learn(**short)
    assert told(third) == 4.0  # it was not judged: the round before counts
    free = bench.learn(generations=1, penalty="none")
    evaluated(service, free, 0.5, 0.7)  # without a penalty it gains twice as much
    learner = service.settings.learner.model_copy(update={"tune_lambda": True, "lam": 8.0})
    assert tuned_lambda(service, "gsm8k", learner) == 2.0
    other = learner.model_copy(update={"alpha": 0.02})
    assert tuned_lambda(service, "gsm8k", other) == 8.0
