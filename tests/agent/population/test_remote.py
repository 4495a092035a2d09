"""An engine at the other end of a socket answers as it does here."""

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.errors import UserError
from agent.learner.es import Applied, Step
from agent.learner.noise import Address, NoiseKind
from agent.learner.penalty import Penalty
from agent.population.process import (
    Channel,
    EngineLostError,
    EngineProcess,
    compile_cache,
    serve,
)
from agent.population.schedule import Completion, Logprobs, Messages

PROMPTS = [
    [{"role": "user", "content": "naïve “quotes” \n and 🙂"}],
    [{"role": "user", "content": ""}],
]
STEP = Step(3, 9, (0, 4), (0.25, -0.5), 0.1, 0.01, Penalty("l1", 0.3), "rademacher", None)


class Kept:
    """An engine that remembers its last call and answers with values that are hard to carry."""

    def __init__(self) -> None:
        self.call: tuple[Any, ...] = ()

    def open(self, anchor: Path) -> str:
        self.call = ("open", anchor)
        return "digest"

    def restore(self, snapshot: Path | None, steps: Sequence[Step]) -> str:
        self.call = ("restore", snapshot, tuple(steps))
        return "hash"

    def apply(self, step: Step) -> Applied:
        self.call = ("apply", step)
        return Applied("hash", 1 / 3, 1e-300, {"model.layers.0": 0.1 + 0.2})

    def save(self, path: Path) -> str:
        self.call = ("save", path)
        return "hash"

    def load(self, directory: Path) -> str:
        self.call = ("load", directory)
        if not directory.name:
            raise UserError("directory: none, allowed: one")
        return directory.name

    def generate(
        self,
        prompts: Sequence[Messages],
        max_tokens: int | Sequence[int],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[Completion]:
        self.call = ("generate", prompts, max_tokens, member, noise)
        return [Completion("line\nend\u2028“é”\x00", 3, "stop"), Completion("", 0, "length")]

    def sample(self, prompts: Sequence[Messages], max_tokens: int, seed: int) -> list[list[int]]:
        self.call = ("sample", prompts, max_tokens, seed)
        return [[1, 2], []]

    def top_logprobs(
        self,
        prompts: Sequence[Messages],
        k: int,
        positions: int = 1,
        member: tuple[Address, float] | None = None,
    ) -> list[list[Logprobs]]:
        self.call = ("top_logprobs", prompts, k, positions, member)
        return [[{151643: -0.1000000014901161, 7: float("-inf")}], [{}]]

    def prompt_logprobs(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        self.call = ("prompt_logprobs", prompts, continuations)
        raise RuntimeError("the engine broke")

    def answer_logprobs(
        self,
        prompts: Sequence[Messages],
        answers: Sequence[str],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[list[float]]:
        self.call = ("answer_logprobs", prompts, answers, member, noise)
        return [[-0.1000000014901161, float("-inf")], []]

    def state(self) -> dict[str, str | None]:
        return {"served": "theta", "anchor": None}

    def spent(self) -> dict[str, float]:
        return {"render": 0.5}

    def close(self) -> None:
        self.call = ("close",)


@pytest.fixture
def ends() -> Iterator[tuple[EngineProcess, Kept]]:
    """The caller's end and, served by a thread in another process's name, the engine."""
    near, far = socket.socketpair()
    kept, channel = Kept(), Channel(far)
    with subprocess.Popen(["sleep", "60"]) as process:

        def serving() -> None:
            channel.send({"result": process.pid})
            channel.send({"result": None})
            with pytest.raises((EOFError, OSError)):
                serve(channel, kept)

        thread = threading.Thread(target=serving)
        thread.start()
        remote = EngineProcess(near, limit_s=20)
        remote.ready()
        yield remote, kept
        remote.close()
        thread.join(20)
        channel.close()
        assert not thread.is_alive()
        assert process.wait(20) == -signal.SIGKILL  # what was closed does not run on


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("open", (Path("/models/a b"),)),
        ("restore", (None, [])),
        ("restore", (Path("s.safetensors"), [STEP, STEP])),
        ("apply", (STEP,)),
        ("save", (Path("/snapshots/0123.safetensors"),)),
        ("load", (Path("/weights/0123"),)),
        ("generate", (PROMPTS, 5)),
        ("generate", (PROMPTS, [5, 6], (Address(2**62, 7, 1), -0.1), "rademacher")),
        ("sample", (PROMPTS, 4, 9)),
        ("top_logprobs", (PROMPTS, 3, 2, None)),
        ("top_logprobs", (PROMPTS, 3, 2, (Address(2**62, 7, 1), -0.1))),
        ("answer_logprobs", (PROMPTS, ["a", ""], (Address(2**62, 7, 1), -0.1), "rademacher")),
        ("state", ()),
        ("spent", ()),
    ],
)
def test_calls_and_results_arrive_unchanged(
    ends: tuple[EngineProcess, Kept], method: str, arguments: tuple[Any, ...]
) -> None:
    remote, kept = ends
    result = getattr(remote, method)(*arguments)
    arrived = kept.call
    assert result == getattr(Kept(), method)(*arguments)
    direct = Kept()
    getattr(direct, method)(*arguments)
    assert arrived == direct.call


def test_errors_arrive_by_kind_and_leave_the_engine_usable(
    ends: tuple[EngineProcess, Kept],
) -> None:
    remote, _ = ends
    with pytest.raises(UserError, match="directory: none, allowed: one"):
        remote.load(Path())
    with pytest.raises(EngineLostError, match="RuntimeError: the engine broke"):
        remote.prompt_logprobs(PROMPTS, [[1], [2]])
    with pytest.raises(UserError, match="'__class__', allowed: open, restore"):
        remote.call("__class__", {})
    assert remote.spent() == {"render": 0.5}


def test_a_lost_engine_is_told_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("starting\nout of memory\n\n")
    near, far = socket.socketpair()
    remote = EngineProcess(near, [None, tmp_path / "missing", log])
    far.sendall(b'{"result": ')  # it dies in the middle of a line
    far.close()
    with pytest.raises(EngineLostError, match=r"engine\.log: out of memory"):
        remote.ready()
    remote.close()


def test_a_hanging_engine_is_lost_after_the_limit() -> None:
    near, far = socket.socketpair()
    remote = EngineProcess(near, limit_s=0.05)
    with pytest.raises(EngineLostError, match="timed out"):
        remote.generate(PROMPTS, 4)
    remote.close()
    far.close()


@pytest.mark.parametrize("taken", ["nothing", "ours", "a link", "open to all", "another's"])
def test_what_torch_compiled_lies_where_nobody_else_can_write(tmp_path: Path, taken: str) -> None:
    """Everybody may make a folder of the usual name in the machine's temporary one first."""
    usual = tmp_path / f"torchinductor_{os.getuid()}"
    if taken == "a link":
        (tmp_path / "elsewhere").mkdir()
        usual.symlink_to(tmp_path / "elsewhere")
    elif taken != "nothing":
        usual.mkdir(mode=0o755)
        usual.chmod(0o777 if taken == "open to all" else 0o755)
    if taken == "another's":
        if os.getuid() != 0:
            pytest.skip("root alone can give a folder away")
        os.chown(usual, 65534, 65534)
    folder = compile_cache(str(tmp_path))
    assert (folder == usual) is (taken in ("nothing", "ours"))
    assert folder.owner() == Path(tmp_path).owner()
    assert folder.stat().st_mode & 0o022 == 0
