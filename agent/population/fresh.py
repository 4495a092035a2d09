"""An engine started anew for every member, where a running one cannot be given other weights."""

from collections.abc import Callable, Sequence
from pathlib import Path

from agent.home import remove_tree
from agent.learner.es import Applied, Step
from agent.learner.noise import Address, NoiseKind
from agent.population.schedule import Completion, Engine, Logprobs, Messages, Prompt
from agent.store.weights import Anchor, Parameters, Theta, export


class FreshEngine:
    """The ``Engine`` protocol where a running engine cannot be given other weights.

    Theta lies in this process; every member and every directory is answered by an engine that is
    started on it. Exact for every family that starts, at the price of one start a member.
    """

    def __init__(
        self,
        start: Callable[[Path], Engine],
        scratch: Path,
        directory: Path,
        importance: Path | None = None,
    ):
        self._start, self._scratch, self._importance = start, scratch, importance
        self._engine: Engine | None = None
        self._on: Path | None = None
        self._theta: Theta = Parameters.zeros(Anchor.open(directory), importance)
        self._directory: Path | None = directory  # None: theta

    def open(self, anchor: Path) -> str:
        """See ``Engine``."""
        held, self._directory = Anchor.open(anchor), None
        self._theta = Parameters.zeros(held, self._importance)
        return held.digest

    def restore(self, snapshot: Path | None, steps: Sequence[Step]) -> str:
        """See ``Engine``."""
        anchor, self._directory = self._theta.anchor, None
        kept = self._importance
        self._theta = (
            Parameters.load(anchor, snapshot, kept) if snapshot else Parameters.zeros(anchor, kept)
        )
        for step in steps:
            self._theta.apply(step)
        return self._theta.delta_hash()

    def apply(self, step: Step) -> Applied:
        """See ``Engine``."""
        self._directory = None
        return self._theta.apply(step)

    def save(self, path: Path) -> str:
        """See ``Engine``."""
        self._theta.save(path)
        return self._theta.delta_hash()

    def load(self, directory: Path) -> str:
        """See ``Engine``."""
        self._directory = directory
        return Anchor.open(directory).digest

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int | Sequence[int],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[Completion]:
        """See ``Engine``."""
        return self._started(member, noise).generate(prompts, max_tokens)

    def sample(self, prompts: Sequence[Messages], max_tokens: int, seed: int) -> list[list[int]]:
        """See ``Engine``."""
        return self._started().sample(prompts, max_tokens, seed)

    def top_logprobs(
        self,
        prompts: Sequence[Messages],
        k: int,
        positions: int = 1,
        member: tuple[Address, float] | None = None,
    ) -> list[list[Logprobs]]:
        """See ``Engine``."""
        return self._started(member).top_logprobs(prompts, k, positions)

    def prompt_logprobs(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """See ``Engine``."""
        return self._started().prompt_logprobs(prompts, continuations)

    def answer_logprobs(
        self,
        prompts: Sequence[Messages],
        answers: Sequence[str],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[list[float]]:
        """See ``Engine``."""
        return self._started(member, noise).answer_logprobs(prompts, answers)

    def state(self) -> dict[str, str | None]:
        """See ``Engine``."""
        return {
            "served": self._on.name if self._on else "start",
            "way": "fresh",
            "anchor": self._theta.anchor.digest,
            "delta_hash": self._theta.delta_hash(),
        }

    def spent(self) -> dict[str, float]:
        """See ``Engine``; of the engine of the moment."""
        return self._engine.spent() if self._engine else {}

    def close(self) -> None:
        """See ``Engine``."""
        if self._engine is not None:
            self._engine.close()
        self._engine, self._on = None, None
        remove_tree(self._scratch, ignore_errors=True)

    def _started(
        self, member: tuple[Address, float] | None = None, noise: NoiseKind = "normal"
    ) -> Engine:
        """The engine of a member, of the directory, or of theta; the one before it ends first."""
        if member is None and self._directory is not None:
            wanted = self._directory
        else:
            wanted = export(self._theta, self._scratch, member=member, noise=noise)
        if self._engine is None or self._on != wanted:
            if self._engine is not None:
                self._engine.close()
            self._engine, self._on = self._start(wanted), wanted
        for left in self._scratch.glob("*"):  # one model's weights at a time
            if left != wanted:
                remove_tree(left, ignore_errors=True)
        return self._engine
