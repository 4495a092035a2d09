"""An engine whose answers are planted: rounds that learn in seconds, on all other real parts."""

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import pytest

from agent.config import load
from agent.home import Home
from agent.learner.es import Applied, Step
from agent.learner.noise import Address, NoiseKind
from agent.population.placement import EngineOptions
from agent.population.pool import Population
from agent.population.schedule import Completion, Logprobs, Messages
from agent.registry import Registry
from agent.store.weights import Anchor, Parameters
from flows.service import Service
from flows.session import Session
from flows.show.terminal import Reporter, Silent

TASKS = {"gsm8k": 0, "countdown": 1, "piqa": 2}  # task -> the tensor its answers hang on
SETTINGS = {
    "learner": {
        "generations": 3,
        "population": 8,
        "prompts": 24,
        "penalty": "none",
        "too_large": "alarm",
    },
    "tasks": {"rows": 60, "curve_every": 0, "priors": tuple(TASKS)},
    "gate": {"margins": dict.fromkeys(TASKS, 0.3)},
}
RENDER_S, UPDATE_S, ANSWER_S = 0.5, 0.25, 0.01  # what a planted engine says it spends
SHIFT = 0.003  # of a tensor's mean, at which every row of its task is right


class PlantedEngine:
    """The ``Engine`` protocol without a model: a row is right once its tensor has moved enough.

    Half of the rows are right from the start and whatever happens; the others fall, in an order
    of their own, while the mean of the task's norm tensor rises by ``SHIFT``. So each task can be
    learnt, and learning one leaves the others alone.
    """

    def __init__(self, service: Service) -> None:
        self._theta = Parameters.zeros(service.anchor)
        norms = [name for name in service.anchor.names if name.endswith("norm.weight")]
        self._tensor = {task: norms[place] for task, place in TASKS.items()}
        self._loaded: Anchor | None = None
        self._spent = {"render": 0.0, "update": 0.0, "generate": 0.0}
        self._answers: dict[str, tuple[str, float, str, str]] = {}
        for task in map(service.task, TASKS):
            for split in ("train", "eval"):
                for row in service.rows(task.name, split, 240):
                    asked = json.dumps(task.messages(row, service.shots(task.name)(row)))
                    self._answers[asked] = (
                        task.name,
                        _wanted(task.key(row)),
                        task.gold(row),
                        task.wrong(row),
                    )

    def open(self, anchor: Path) -> str:
        self._theta, self._loaded = Parameters.zeros(Anchor.open(anchor)), None
        return self._theta.anchor.digest

    def restore(self, snapshot: Path | None, steps: Sequence[Step]) -> str:
        anchor, self._loaded = self._theta.anchor, None
        self._theta = Parameters.load(anchor, snapshot) if snapshot else Parameters.zeros(anchor)
        for step in steps:
            self._theta.apply(step)
        return self._theta.delta_hash()

    def apply(self, step: Step) -> Applied:
        self._loaded = None
        self._spent["update"] += UPDATE_S
        return self._theta.apply(step)

    def save(self, path: Path) -> str:
        self._theta.save(path)
        return self._theta.delta_hash()

    def load(self, directory: Path) -> str:
        self._loaded = Anchor.open(directory)
        return self._loaded.digest

    def generate(
        self,
        prompts: Sequence[Messages],
        max_tokens: int | Sequence[int],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[Completion]:
        moved = self._moved(member, noise)
        self._spent["render"] += RENDER_S if member else 0.0
        self._spent["generate"] += ANSWER_S * len(prompts)
        told = []
        for prompt in prompts:
            task, wanted, gold, wrong = self._answers[json.dumps(prompt)]
            told.append(Completion(gold if moved[task] >= wanted else wrong, 3, "stop"))
        return told

    def sample(self, prompts: Sequence[Messages], max_tokens: int, seed: int) -> list[list[int]]:
        return [[0, 1] for _ in prompts]

    def prompt_logprobs(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """The less likely, the further the tensor of the prompt's task has moved."""
        moved = self._moved(None, "normal")
        tasks = [self._answers[json.dumps(prompt)][0] for prompt in prompts]
        return [
            [-1.0 - abs(moved[task]) for _ in ids]
            for task, ids in zip(tasks, continuations, strict=True)
        ]

    def answer_logprobs(
        self,
        prompts: Sequence[Messages],
        answers: Sequence[str],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[list[float]]:
        """A right answer is the likelier, the further the tensor of its task has moved."""
        moved = self._moved(member, noise)
        self._spent["render"] += RENDER_S if member else 0.0
        self._spent["generate"] += ANSWER_S * len(prompts) / 2
        rows = [self._answers[json.dumps(prompt)] for prompt in prompts]
        return [
            [moved[task] - wanted] * len(answer)
            for (task, wanted, _, _), answer in zip(rows, answers, strict=True)
        ]

    def top_logprobs(
        self,
        prompts: Sequence[Messages],
        k: int,
        positions: int = 1,
        member: tuple[Address, float] | None = None,
    ) -> list[list[Logprobs]]:
        """One token, the less likely, the further the tensor of the prompt's task has moved."""
        told = self.prompt_logprobs(prompts, [[0]] * len(prompts))
        return [[{0: row[0]}] * positions for row in told]

    def _moved(self, member: tuple[Address, float] | None, noise: NoiseKind) -> dict[str, float]:
        """How far the mean of each task's tensor is from the anchor's."""
        address, scale = member or (None, 0.0)
        plain = self._loaded if member is None else None
        now = dict(plain.tensors() if plain else self._theta.rendered(address, scale, noise))
        before = dict(self._theta.anchor.tensors())
        return {
            task: float((now[name].double() - before[name].double()).mean())
            for task, name in self._tensor.items()
        }

    def spent(self) -> dict[str, float]:
        return dict(self._spent)

    def close(self) -> None:
        """It holds nothing."""


def _wanted(key: str) -> float:
    """The shift at which a row turns right; never wrong for half of the rows."""
    share = int(sha256(key.encode()).hexdigest()[:8], 16) / 2**32
    return -1.0 if share < 0.5 else SHIFT * (0.1 + 1.8 * (share - 0.5))


class Unshown(Service):
    """A home whose MLflow is down for good: nothing else may notice."""

    @property
    def registry(self) -> Registry:  # type: ignore[override]
        raise ConnectionError("MLflow is down")


Opened = Callable[..., Session]


@pytest.fixture(scope="session")
def planted_in() -> Opened:
    """A session of a home whose engines are planted.

    MLflow is down, unless the home is ``shown``, or its service of a ``kind`` that says otherwise.
    """

    def opened(
        root: Path,
        progress: Reporter | None = None,
        shown: bool = False,
        kind: type[Service] = Unshown,
        **changes: dict[str, object],
    ) -> Session:
        place = Home.at(root)
        if not place.settings_json.is_file():
            sections = {name: dict(section) for name, section in SETTINGS.items()}
            for name, section in changes.items():
                sections.setdefault(name, {}).update(section)
            place.settings_json.write_text(load(None, **sections).model_dump_json())
            (place.root / "salt").write_text("a salt of tests")
        service = (Service if shown else kind).at(place.root)
        population = Population([lambda: PlantedEngine(service)])  # type: ignore[list-item]

        def start(options: EngineOptions) -> PlantedEngine:
            engine = PlantedEngine(service)
            engine.load(options.model)
            return engine

        return Session(service, progress or Silent(), population, start)  # type: ignore[arg-type]

    return opened


@pytest.fixture
def planted(planted_in: Opened, tmp_path: Path) -> Opened:
    """The same by the home's name, in the test's own folder."""
    return lambda home="home", *arguments, **more: planted_in(tmp_path / home, *arguments, **more)
