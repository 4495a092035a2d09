"""An engine elsewhere: its calls as JSON values, over a pipe, a socket or a Ray actor.

``RemoteEngine`` is the near end (the ``Engine`` protocol, arguments to JSON), ``answer`` the far
end (JSON to arguments, one engine call, the result to JSON). Only scalars, texts and token ids
travel; weights never do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from agent.errors import UserError
from agent.learner.es import Applied, Step
from agent.learner.noise import Address, NoiseKind
from agent.population.schedule import Completion, Engine, Logprobs, Messages, Prompt

Json = dict[str, Any]
Call = Callable[[str, Json], Any]


class RemoteEngine:
    """The ``Engine`` protocol over ``call(method, arguments) -> result``, all JSON values."""

    def __init__(self, call: Call):
        self.call = call

    def open(self, anchor: Path) -> str:
        """See ``Engine``."""
        return str(self.call("open", {"anchor": str(anchor)}))

    def restore(self, snapshot: Path | None, steps: Sequence[Step]) -> str:
        """See ``Engine``."""
        rows = [step.to_json() for step in steps]
        path = str(snapshot) if snapshot else None
        return str(self.call("restore", {"snapshot": path, "steps": rows}))

    def apply(self, step: Step) -> Applied:
        """See ``Engine``."""
        return Applied(**self.call("apply", {"step": step.to_json()}))

    def save(self, path: Path) -> str:
        """See ``Engine``."""
        return str(self.call("save", {"path": str(path)}))

    def load(self, directory: Path) -> str:
        """See ``Engine``."""
        return str(self.call("load", {"directory": str(directory)}))

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int | Sequence[int],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[Completion]:
        """See ``Engine``."""
        asked = [dict(each) if isinstance(each, Mapping) else list(each) for each in prompts]
        arguments: Json = {"prompts": asked, "noise": noise}
        arguments["max_tokens"] = max_tokens if isinstance(max_tokens, int) else list(max_tokens)
        arguments["member"] = _to_json(member)
        rows = self.call("generate", arguments)
        return [
            Completion(text, tokens, finish, tuple(calls)) for text, tokens, finish, calls in rows
        ]

    def sample(self, prompts: Sequence[Messages], max_tokens: int, seed: int) -> list[list[int]]:
        """See ``Engine``."""
        arguments = {"prompts": [list(p) for p in prompts], "max_tokens": max_tokens, "seed": seed}
        return list(self.call("sample", arguments))

    def top_logprobs(
        self,
        prompts: Sequence[Messages],
        k: int,
        positions: int = 1,
        member: tuple[Address, float] | None = None,
    ) -> list[list[Logprobs]]:
        """See ``Engine``."""
        arguments: Json = {"prompts": [list(p) for p in prompts], "k": k, "positions": positions}
        arguments["member"] = _to_json(member)
        rows = self.call("top_logprobs", arguments)
        return [[dict(place) for place in row] for row in rows]

    def prompt_logprobs(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """See ``Engine``."""
        arguments = {
            "prompts": [list(messages) for messages in prompts],
            "continuations": [list(ids) for ids in continuations],
        }
        return list(self.call("prompt_logprobs", arguments))

    def answer_logprobs(
        self,
        prompts: Sequence[Messages],
        answers: Sequence[str],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[list[float]]:
        """See ``Engine``."""
        arguments: Json = {"prompts": [list(messages) for messages in prompts], "noise": noise}
        arguments |= {"answers": list(answers), "member": _to_json(member)}
        return list(self.call("answer_logprobs", arguments))

    def state(self) -> dict[str, str | None]:
        """See ``Engine``."""
        return dict(self.call("state", {}))

    def spent(self) -> dict[str, float]:
        """See ``Engine``."""
        return dict(self.call("spent", {}))

    def close(self) -> None:
        """See ``Engine``."""
        self.call("close", {})


def answer(engine: Engine, method: str, arguments: Json) -> Any:
    """Make one call on the engine; its result as a JSON value. Unknown methods are refused."""
    if method not in METHODS:
        raise UserError(f"method: {method!r}, allowed: {', '.join(METHODS)}")
    return METHODS[method](engine, arguments)


def _restore(engine: Engine, arguments: Json) -> str:
    snapshot = Path(arguments["snapshot"]) if arguments["snapshot"] else None
    return engine.restore(snapshot, [Step.from_json(row) for row in arguments["steps"]])


def _to_json(member: tuple[Address, float] | None) -> list[float] | None:
    """[run seed, generation, pair, scale]; ``_member`` reads it back."""
    return [*astuple(member[0]), member[1]] if member else None


def _member(arguments: Json) -> tuple[Address, float] | None:
    at = arguments.pop("member", None)
    return (Address(*at[:3]), at[3]) if at else None


def _generate(engine: Engine, arguments: Json) -> list[Any]:
    member = _member(arguments)
    answers = engine.generate(**arguments, member=member)
    return [(each.text, each.tokens, each.finish, list(each.calls)) for each in answers]


def _top_logprobs(engine: Engine, arguments: Json) -> list[Any]:
    member = _member(arguments)
    rows = engine.top_logprobs(**arguments, member=member)
    return [[list(place.items()) for place in row] for row in rows]


def _answer_logprobs(engine: Engine, arguments: Json) -> list[list[float]]:
    member = _member(arguments)
    return engine.answer_logprobs(**arguments, member=member)


METHODS: dict[str, Callable[[Engine, Json], Any]] = {
    "open": lambda engine, arguments: engine.open(Path(arguments["anchor"])),
    "restore": _restore,
    "apply": lambda engine, arguments: asdict(engine.apply(Step.from_json(arguments["step"]))),
    "save": lambda engine, arguments: engine.save(Path(arguments["path"])),
    "load": lambda engine, arguments: engine.load(Path(arguments.pop("directory")), **arguments),
    "generate": _generate,
    "sample": lambda engine, arguments: engine.sample(**arguments),
    "top_logprobs": _top_logprobs,
    "prompt_logprobs": lambda engine, arguments: engine.prompt_logprobs(**arguments),
    "answer_logprobs": _answer_logprobs,
    "state": lambda engine, arguments: engine.state(),
    "spent": lambda engine, arguments: engine.spent(),
    "close": lambda engine, arguments: engine.close(),
}
