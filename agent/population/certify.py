"""Does an engine answer like a cold engine of the same weights, however they were put into it?

vLLM turns weights into other layouts when it loads them, and not every layer does so again when
they are changed: a head or an expert then goes on answering with the old ones, without an error.
A certificate says what was measured for one model configuration, vLLM version and set of engine
options. Two models are compared, the anchor A and a perturbed member B of it:

    member   B rendered into an engine that was started on A
    theta    A rendered again after the member
    load     the directory of B, loaded into the running engine
    reload   the directory of A, loaded after B

each with the answers of an engine that was started on exactly these weights. The first way in the
order short, long (``worker``) that passes all four is taken; where none does,
``fresh.FreshEngine``.
"""

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from agent.errors import UserError
from agent.learner.noise import Address
from agent.population.decoding import largest_difference
from agent.population.schedule import Engine, Logprobs, Messages, Way
from agent.store.anchor import read_json, require_finite
from agent.store.database import finite
from agent.store.weights import Anchor, Parameters, export

TOLERANCE = 1e-3  # nats; on the CPU every sound way differs from a cold start by 0.0
SPREADS = 4.0  # times the difference between two askings of one cold engine, where that is larger
TOKENS, POSITIONS, ANSWER = 5, 6, 16
PERTURBED = 0.5  # scale of the member in units of a typical weight: a tensor left behind shows
MEMBER = Address(run_seed=13, generation=0, pair=1)
WORDS = (
    "What is 17 plus 25?",
    "Write the word river backwards.",
    "Name three colours, then one number!",
    "Q: if every bird can fly & a wren is a bird?",
    "{'key': [1, 2, 3], 'other': null}",
    "The quick brown fox; the lazy dog.",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "0123456789 9876543210 (3 * 4) - 5 / 6 = ?",
    "JUMP? Vex, quiz & wolf: $7.50 #hymn @noon",
    "def double(x):\n    return 2 * x\n",
    "[ENTER] ~ ^ | \\ ` < > = + _ % *",
    "Once upon a time there was a small house by the sea, and in it lived",
)
PROMPTS: tuple[Messages, ...] = tuple(({"role": "user", "content": text},) for text in WORDS)

Member = tuple[Address, float]
Start = Callable[[Path, Way], Engine]  # a cold engine on a directory
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ProbeReply:
    """What one engine answered to some prompts: greedy texts and top log-probabilities."""

    texts: tuple[str, ...]
    logprobs: tuple[tuple[Logprobs, ...], ...]

    @classmethod
    def of(
        cls,
        engine: Engine,
        member: Member | None = None,
        prompts: Sequence[Messages] = PROMPTS,
        max_tokens: int | Sequence[int] = ANSWER,
        positions: int = POSITIONS,
    ) -> "ProbeReply":
        """Ask theta, the loaded directory, or a member."""
        texts = [answer.text for answer in engine.generate(prompts, max_tokens, member)]
        rows = engine.top_logprobs(prompts, TOKENS, positions, member)
        return cls(tuple(texts), tuple(map(tuple, rows)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ProbeReply":
        """Read what ``dataclasses.asdict`` and JSON made of one: token ids became texts."""
        rows = (
            tuple({int(token): value for token, value in place.items()} for place in row)
            for row in data["logprobs"]
        )
        return cls(tuple(data["texts"]), tuple(rows))

    def reversed(self) -> "ProbeReply":
        """The same with its prompts in the other order."""
        return ProbeReply(self.texts[::-1], self.logprobs[::-1])

    def is_finite(self) -> bool:
        """Whether every log p is a finite number."""
        places = (place for row in self.logprobs for place in row)
        return all(math.isfinite(value) for place in places for value in place.values())

    def difference(self, other: "ProbeReply") -> float:
        """max |log p - log q| in nats; infinite where the likeliest tokens differ."""
        return largest_difference(other.logprobs, self.logprobs)

    def equal(self, other: "ProbeReply") -> int:
        """How many greedy texts are the same."""
        return sum(a == b for a, b in zip(self.texts, other.texts, strict=True))


@dataclass(frozen=True, slots=True)
class WayCheck:
    """One way of putting weights against a cold start of the same weights."""

    what: str  # member, theta, load, reload
    difference: float  # max |log p - log q| in nats
    equal: int  # greedy answers
    of: int
    error: str = ""  # what the engine said instead of answering

    def passed(self, allowed: float) -> bool:
        """Whether all greedy answers are equal and no log p differs by more than allowed."""
        return self.difference <= allowed and self.equal == self.of

    def text(self) -> str:
        """For one line of a report."""
        if self.error:
            return f"{self.what}: {self.error}"
        return (
            f"{self.what}: {self.equal} of {self.of} answers equal a cold start's, "
            f"log p differs by {self.difference:.3g}"
        )


@dataclass(frozen=True, slots=True)
class Certificate:
    """How weights may be put into engines of one kind, and what was measured."""

    family: str  # the architecture's name
    way: Way
    spread: float  # max |log p - log q| of two askings of one cold engine, nats
    checks: tuple[WayCheck, ...]  # of the way; of the last one tried where all failed
    refused: tuple[str, ...] = ()  # what failed on the way there

    @property
    def allowed(self) -> float:
        """The largest |log p - log q| between engines of the same weights, nats."""
        return allowed(self.spread)

    def to_json(self) -> dict[str, Any]:
        """A plain dict, an infinite difference as None; ``from_json`` reads it back."""
        document: dict[str, Any] = finite(asdict(self))
        return document

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Certificate":
        """Read what ``to_json`` wrote."""
        checks = tuple(
            WayCheck(**check | ({"difference": math.inf} if check["difference"] is None else {}))
            for check in data["checks"]
        )
        return cls(**{**data, "checks": checks, "refused": tuple(data["refused"])})


def allowed(spread: float) -> float:
    """The bound on |log p - log q| from what two askings of one cold engine differ by."""
    return max(TOLERANCE, SPREADS * spread)


def certify(
    start: Start, directory: Path, scratch: Path, prompts: Sequence[Messages] = PROMPTS
) -> Certificate:
    """Measure the ways in order of speed and keep the first that is exact.

    One engine at a time: two of a large model need not fit. Weights of the size of the model are
    written to ``scratch`` once.

    Raises:
        UserError: The model cannot be started or asked at all, or is not what an anchor may be.
    """
    anchor = Anchor.open(directory)
    require_finite(anchor)
    member = MEMBER, PERTURBED * typical(anchor)
    other = export(Parameters.zeros(anchor), scratch, member=member)
    engine = start(other, "long")
    try:
        on_member = _cold(engine, directory, prompts)
    finally:
        engine.close()
    refused: list[str] = []
    way: Way = "short"
    # The fast way first, with an engine of its own for each: what one way left in an engine must
    # not be seen by the next. An engine that does not know the fast way takes the long one itself.
    while True:
        engine = start(directory, way)
        try:
            on_anchor = _cold(engine, directory, prompts)
            spread = _cold(engine, directory, prompts).difference(on_anchor)
            pair = (directory, on_anchor), (other, on_member)
            checks = tuple(_checks(engine, *pair, member, prompts))
            way = _taken(engine)
        finally:
            engine.close()
        bad = [check.text() for check in checks if not check.passed(allowed(spread))]
        refused += [f"{way} way, {text}" for text in bad]
        if not bad or way == "long":
            break
        way = "long"
    way = "fresh" if bad else way
    return Certificate(family_of(directory), way, spread, checks, tuple(refused))


def _cold(engine: Engine, directory: Path, prompts: Sequence[Messages]) -> ProbeReply:
    """The reply of an engine that was given nothing; one that cannot answer refuses the model."""
    try:
        reply = ProbeReply.of(engine, prompts=prompts)
    except UserError:
        raise
    except Exception as error:  # the boundary of an engine
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{family_of(directory)}: an engine does not answer: {why}") from error
    if not reply.is_finite():  # nothing can be compared with it, in whatever way it was put
        raise UserError(f"{family_of(directory)}: a cold engine's log p are not all finite numbers")
    return reply


def _checks(
    engine: Engine,
    anchor: tuple[Path, ProbeReply],
    other: tuple[Path, ProbeReply],
    member: Member,
    prompts: Sequence[Messages],
) -> Iterator[WayCheck]:
    """Each check of the module's table, in its order; an engine that breaks fails what is left.

    anchor, other: a directory and what a cold engine on it answered.
    """
    steps: list[tuple[str, Callable[[], object], Member | None, ProbeReply]] = [
        ("member", lambda: engine.open(anchor[0]), member, other[1]),
        ("theta", lambda: None, None, anchor[1]),
        ("load", lambda: engine.load(other[0]), None, other[1]),
        ("reload", lambda: engine.load(anchor[0]), None, anchor[1]),
    ]
    for at, (what, put, who, cold) in enumerate(steps):
        try:
            put()
            reply = ProbeReply.of(engine, who, prompts)
        except UserError:
            raise
        except Exception as error:  # the boundary of an engine: recorded against the way
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            # Nothing more is asked of it: after an error within vLLM an answer may never end.
            yield from (WayCheck(left[0], math.inf, 0, len(prompts), why) for left in steps[at:])
            return
        else:
            yield WayCheck(what, reply.difference(cold), reply.equal(cold), len(prompts))


def _taken(engine: Engine) -> Way:
    """The way members really got in; short is only taken where the layout is sure."""
    try:
        return "short" if engine.state()["way"] == "short" else "long"
    except Exception:  # the boundary of an engine: one that broke has its checks
        return "long"


def typical(anchor: Anchor) -> float:
    """The median over matrices of the root mean square of their elements."""
    sizes = [
        float(torch.linalg.vector_norm(tensor.float())) / math.sqrt(tensor.numel())
        for _, tensor in anchor.tensors()
        if tensor.ndim > 1
    ]
    return median(sizes) if sizes else 1.0


def family_of(directory: Path) -> str:
    """The architecture's name in config.json."""
    names: Sequence[str] = read_json(directory / "config.json").get("architectures") or ["unknown"]
    return str(names[0])


def key_of(anchor: Anchor, version: str, options: Mapping[str, Any]) -> str:
    """Hex sha256 of what a certificate holds for: the model's configuration, not its weights.

    config.json, the tensors' names, shapes and dtypes, vLLM's version, the kind of machine, and
    the engine options that decide how weights are laid out.
    """
    config = hashlib.sha256((anchor.directory / "config.json").read_bytes()).hexdigest()
    specs = {name: [list(shape), str(dtype)] for name, (shape, dtype) in anchor.specs.items()}
    whole = [config, specs, version, platform.machine(), PROMPTS, dict(options)]
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()
