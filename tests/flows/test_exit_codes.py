"""How each command ends, by what the installed executable calls and by the executable itself.

0: done. 1: done, and what it found or reached is not what was wanted. 2: refused, in one line on
stderr. Commands that need engines are run to their end in tests/integration.
"""

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from agent.config import load
from agent.home import Home
from evaluators import examples
from flows.service import Service

EXECUTABLE = Path(sys.executable).with_name("anchorage")
EXAMPLES = Path(examples.__file__).parent
BROKEN = """
from dataclasses import replace
from evaluators.examples.json_answer import TASK
TASK = replace(TASK, name="broken", gold=lambda row: "nothing")
"""
# Arguments and the exit code; HOME is a home with a ledger, DIR its folder.
ENDS = [
    ("score gsm8k", 0),
    ("score nosuch", 2),
    ("gate --anchor DIR/t.jsonl --champion DIR/t.jsonl --candidate DIR/t.jsonl --target gsm8k", 0),
    ("gate --anchor DIR/no.jsonl --champion DIR/t.jsonl --candidate DIR/t.jsonl --target gsm8k", 2),
    ("certify", 2),
    ("task check piqa --limit 3 --home HOME", 0),
    ("task check nosuch --home HOME", 2),
    ("task check DIR/no.py:TASK", 2),
    ("embedded build --out DIR/t", 2),
    ("bench learner --size 3M", 2),
    ("bench gate --draws 1", 2),
    ("bench endpoint --turns 0", 2),
    ("demo --home DIR/t", 2),
    ("up --home DIR/t", 2),
    ("up --home HOME --config DIR/no.toml", 2),
    ("down --home HOME", 0),
    ("down --home DIR/t", 2),
    ("status --home HOME", 0),
    ("status --home DIR/t", 2),
    ("doctor --home DIR/damaged", 1),
    ("repair --home DIR/empty", 0),
    ("service install --print --home HOME", 0),
    ("service install --print --home DIR/a%b", 2),
    ("collect --home HOME", 0),
    ("collect --target nosuch --home HOME", 2),
    ("improve --set sigma --home HOME", 2),
    ("improve --set sgima=1 --home HOME", 2),
    ("improve --target piqa --home HOME", 2),
    ("plan --target nosuch --home HOME", 2),
    ("study --rounds 0 --home HOME", 2),
    ("evaluate --tasks nosuch --home HOME", 2),
    ("rescore DIR/no --home HOME", 2),
    ("promote champion --home HOME", 2),
    ("promote nosuch --home HOME", 2),
    ("promote anchor --home DIR/no", 2),
    ("rollback --home HOME", 2),
    ("review list --home HOME", 0),
    ("review list --home DIR/no", 2),
    ("review approve anchor --reason r --home HOME", 2),
    ("review reject nosuch --reason r --home HOME", 2),
    ("anchor move anchor --reason r --home HOME", 2),
    ("history --home HOME", 0),
    ("history --home DIR/no", 2),
    ("settings --home HOME", 0),
    ("settings --config DIR/no.toml", 2),
    ("replay nosuch --home HOME", 2),
    ("export nosuch DIR/out --home HOME", 2),
    ("forget nobody --home HOME", 2),
    ("key create ann --scope infer --home HOME", 0),
    ("key create ann --scope all --home HOME", 2),
    ("key list --home HOME", 0),
    ("key list --home DIR/no", 2),
    ("key revoke nosuch --home HOME", 2),
    ("nosuch", 2),
]

pytestmark = pytest.mark.proof  # together some ten seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a ledger, one whose ledger is damaged, an empty one, a table, and a file."""
    root = tmp_path_factory.mktemp("ends")
    for name in ("home", "damaged"):
        home = Home.at(root / name)
        home.settings_json.write_text(load(tasks={"rows": 8}).model_dump_json())
        service = Service.at(home.root)
        service.champion()
        service.close()
    Home.at(root / "damaged").state_db.write_bytes(b"damaged" * 1000)
    Home.at(root / "empty")
    rows = [f'{{"task": "gsm8k", "example_id": "{n}", "reward": 1.0}}\n' for n in range(50)]
    (root / "t.jsonl").write_text("".join(rows))
    (root / "t").touch()
    return root


def words(arguments: str, folder: Path) -> list[str]:
    named = arguments.replace("HOME", str(folder / "home")).replace("DIR", str(folder))
    return named.split()


def ended(code: int, error: str) -> None:
    """A refusal is one line, whatever the command."""
    assert "Traceback" not in error
    if code == 2:
        lines = [line for line in error.splitlines() if line.startswith("anchorage: ")]
        assert len(lines) == 1, error


@pytest.mark.parametrize(("arguments", "code"), ENDS)
def test_a_command_ends_with_its_code(
    arguments: str,
    code: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["anchorage", *words(arguments, folder)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    for name in ("HOME", "VERBOSE"):
        monkeypatch.delenv(f"ANCHORAGE_{name}", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    (command,) = entry_points(group="console_scripts", name="anchorage")
    try:
        with pytest.raises(SystemExit) as end:
            command.load()()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (end.value.code or 0) == code
    ended(code, capsys.readouterr().err)


def test_the_executable_ends_with_the_same_codes(folder: Path, scale) -> None:
    some = ["score gsm8k", "down --home DIR/t", "review list --home DIR/no", "nosuch"]
    for arguments, code in ENDS:
        if arguments not in some and not scale(0, 1):
            continue
        done = subprocess.run(
            [EXECUTABLE, *words(arguments, folder)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            check=False,
        )
        assert done.returncode == code, (arguments, done.stderr)
        ended(code, done.stderr)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell's background jobs ignore the interrupt signal, and so would what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_broken_task_and_an_interrupt_are_no_success(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    shutil.copy(EXAMPLES / "json_answer.jsonl", tmp_path)
    argv = [EXECUTABLE, "task", "check", f"{tmp_path}/broken.py:TASK"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    with subprocess.Popen([EXECUTABLE, "score", "gsm8k"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b'{"completion": "#### 7", "example": {"answer": "#### 7"}}\n' * 2000)
        child.stdin.flush()
        child.stdout.readline()  # it runs
        os.kill(child.pid, signal.SIGINT)
        child.communicate(timeout=60)  # reads on: a full pipe would hold the last flush
        assert child.returncode == 130
