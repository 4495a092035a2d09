"""How each command ends, by what the installed executable calls and by the executable itself.

0: done. 1: done, and what it found or reached is not what was wanted. 2: refused, in one line on
stderr. ``ENDS`` runs in every test run; ``DECISIONS`` and ``ENGINES`` in the soak; ``ON_A_STACK``
names the tests with a running service.
"""

import ast
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import typer

from agent.config import load
from agent.gateway.keys import KeyStore
from agent.home import Home
from evaluators import examples
from evaluators.runner import write_samples
from flows.cli import app
from flows.commands.settings import command_reference
from flows.learn import loop
from flows.learn.weigh import weigh
from flows.serve.promote import act
from flows.service import Service

EXECUTABLE = Path(sys.executable).with_name("anchorage")
EXAMPLES = Path(examples.__file__).parent
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "paper"
SAMPLE = dict.fromkeys(("prompt_hash", "harness_hash", "digest", "cluster"), "") | {
    "task": "gsm8k", "example_id": "1", "completion": "#### 7", "extracted": "7", "reward": 1.0,
    "format": 1.0, "tokens": 3, "finish": "stop", "error": None,
    "example": json.dumps({"question": "?", "answer": "#### 7"}),
    "prompt": json.dumps([{"role": "user", "content": "?"}]),
}  # fmt: skip
BROKEN = """
from dataclasses import replace
from evaluators.examples.json_answer import TASK
TASK = replace(TASK, name="broken", gold=lambda row: "nothing")
"""
# Arguments and the exit code; HOME is a home with a ledger, DIR its folder, KEY the id of a key.
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
    ("bench scaling --generations 1", 0),
    ("bench scaling --generations 0", 2),
    ("bench learning --report --out DIR/learning", 0),
    ("bench learning --model embedded --system nosuch --out DIR/learning", 2),
    ("bench population --turns 0", 2),
    ("bench endpoint --turns 0", 2),
    ("demo --home DIR/t", 2),
    ("up --home DIR/t", 2),
    ("up --home HOME --config DIR/no.toml", 2),
    ("down --home HOME", 0),
    ("down --home DIR/t", 2),
    ("status --home HOME", 0),
    ("status --home DIR/t", 2),
    ("doctor --home DIR/empty", 0),
    ("doctor --home DIR/damaged", 1),
    ("repair --home DIR/empty", 0),
    ("repair --home DIR/t", 2),
    ("service install --print --home HOME", 0),
    ("service install --print --home DIR/a%b", 2),
    ("collect --home HOME", 0),
    ("collect --target nosuch --home HOME", 2),
    ("improve --set sigma --home HOME", 2),
    ("improve --set sgima=1 --home HOME", 2),
    ("improve --target piqa --home HOME", 2),
    ("plan --target nosuch --home HOME", 2),
    ("plan Qwen2.5-3B-Instruct", 0),
    ("plan Llama-3.1-70B-Instruct --host-memory 1", 1),
    ("study --rounds 0 --home HOME", 2),
    ("study paper --report --model embedded --out DIR/no", 2),
    ("importance --tasks piqa --method nosuch --home HOME", 2),
    ("evaluate --tasks nosuch --home HOME", 2),
    ("rescore DIR/t.parquet --home HOME", 0),
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
    ("forget bob --home HOME", 0),
    ("forget nobody --home HOME", 2),
    ("key create ann --scope infer --home HOME", 0),
    ("key create ann --scope all --home HOME", 2),
    ("key list --home HOME", 0),
    ("key list --home DIR/no", 2),
    ("key revoke KEY --home HOME", 0),
    ("key revoke nosuch --home HOME", 2),
    ("nosuch", 2),
]
# On a home whose stack is down, with two judged candidates that wait: PASSED and OTHER. In order.
DECISIONS = [
    ("replay PASSED --home HOME", 0),
    ("export PASSED DIR/out --home HOME", 0),
    ("review reject OTHER --reason r --home HOME", 0),
    ("promote OTHER --home HOME", 2),
    ("review approve PASSED --reason r --home HOME", 0),
    ("rollback --home HOME", 0),
    ("promote PASSED --home HOME", 0),
    ("anchor move PASSED --reason r --home HOME", 0),
]
# With engines of their own, or long. Where a bound decides, the document's `within` says the code.
ENGINES = [
    "plan --home HOME --json",
    "evaluate --tasks piqa --limit 4 --home HOME --json",
    "importance --tasks piqa --rows 4 --out DIR/weights --home HOME --json",
    "certify embedded --json",
    "embedded build --steps 3 --out DIR/model --json",
    "bench learner --size 1M --json",
    "bench gate --draws 200 --json",
    "bench population --turns 1 --prompts 4 --shots 0 --json",
    "bench endpoint --turns 1 --requests 4 --swaps 1 --rollbacks 0 --json",
    "bench learning --model embedded --target gsm8k --system ours --seeds 1 --answers 64 --rows 8 "
    "--work DIR/work --out DIR/out --json",
    "study --rounds 1 --targets gsm8k --home DIR/study --json",
    "study paper --report --model embedded --out DIR/paper --json",
    "demo --home DIR/demo --json",
]
ON_A_STACK = {  # command -> the test, or its fixture, that sees it end with 0
    "up": "test_service.py::running",
    "improve": "test_service.py::candidate",
    "promote": "test_service.py::test_review_swap_rollback_and_forward",
}

pytestmark = pytest.mark.proof  # together some ten seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a ledger, one whose ledger is damaged, an empty one, a table, and a file."""
    root = tmp_path_factory.mktemp("ends")
    for name in ("home", "damaged"):
        service = serviced(root / name)
        service.champion()
        KeyStore(service.experience).create_key("bob", ["infer"])  # a principal to forget
        service.close()
    Home.at(root / "damaged").state_db.write_bytes(b"damaged" * 1000)
    Home.at(root / "empty")
    rows = [f'{{"task": "gsm8k", "example_id": "{n}", "reward": 1.0}}\n' for n in range(50)]
    (root / "t.jsonl").write_text("".join(rows))
    write_samples(root / "t.parquet", [SAMPLE])
    (root / "t").touch()
    return root


def serviced(root: Path) -> Service:
    """A home of the embedded model with few rows."""
    home = Home.at(root)
    home.settings_json.write_text(load(tasks={"rows": 8}).model_dump_json())
    return Service.at(home.root)


def words(arguments: str, folder: Path, **names: str) -> list[str]:
    """Arguments with the places and names of a folder's home."""
    names |= {"HOME": str(folder / "home"), "DIR": str(folder)}
    if "KEY" in arguments:  # one of its own, since a key is revoked once
        service = Service.at(folder / "home")
        names["KEY"] = KeyStore(service.experience).create_key("bob", ["infer"]).key_id
        service.close()
    for name, value in names.items():
        arguments = arguments.replace(name, value)
    return arguments.split()


def executed(arguments: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    """What the installed executable does with them in a folder."""
    return subprocess.run(
        [EXECUTABLE, *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        check=False,
    )


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
        done = executed(words(arguments, folder), folder)
        assert done.returncode == code, (arguments, done.stderr)
        ended(code, done.stderr)


def test_decisions_end_with_their_codes(planted_in, tmp_path: Path, scale) -> None:
    """Two rounds of planted engines; every command is a process, which waits for MLflow."""
    if scale(0, 1) == 0:
        pytest.skip("eight commands on two rounds: in the soak")
    gate, review = {"confirm": False}, {"mode": "manual", "allow_anchor_move": True}
    opened = planted_in(tmp_path / "home", gate=gate, tasks={"rows": 30}, review=review)
    digests = []
    for target in ("gsm8k", "countdown"):
        digests.append(weigh(opened, loop.learn(opened, target).run_id).report.digest)
        act(opened, digests[-1])
    opened.close()
    names = dict(zip(("PASSED", "OTHER"), digests, strict=True))
    for arguments, code in DECISIONS:
        if arguments.startswith("anchor move"):  # only of a version that live traffic has settled
            service = Service.at(tmp_path / "home")
            service.record(digests[0], "CHAMPION", "a test")
            service.close()
        done = executed(words(arguments, tmp_path, **names), tmp_path)
        assert done.returncode == code, (arguments, done.stderr)
        ended(code, done.stderr.replace("anchorage: MLflow", ""))


@pytest.mark.integration
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arguments", ENGINES)
def test_commands_with_engines_end_with_their_codes(arguments: str, tmp_path: Path, scale) -> None:
    if scale(0, 1) == 0:
        pytest.skip("engines of its own: in the soak")
    serviced(tmp_path / "home").close()
    shutil.copytree(RESULTS, tmp_path / "paper")
    done = executed(words(arguments, tmp_path), tmp_path)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    document = json.loads(done.stdout)
    assert done.returncode == (0 if document.get("within", True) else 1), done.stderr[-2000:]


def codes() -> Mapping[str, set[int]]:
    """Command -> how it is seen to end in the tables above."""
    reference = command_reference(typer.main.get_command(app))  # hidden ones are not in it
    names = sorted(re.findall(r"^## anchorage (.+)$", reference, re.MULTILINE), key=len)
    found: dict[str, set[int]] = {name: set() for name in names}
    ends = [*ENDS, *DECISIONS, *((each, 0) for each in (*ENGINES, *ON_A_STACK))]
    for arguments, code in ends:
        named = [name for name in names if f"{arguments} ".startswith(f"{name} ")]
        if named:
            found[named[-1]].add(code)
    return found


def test_every_command_is_seen_to_end_well_and_otherwise() -> None:
    seen = codes()
    assert len(seen) > 35
    assert [name for name, each in seen.items() if 0 not in each or each == {0}] == []


@pytest.mark.parametrize("command", ON_A_STACK)
def test_what_runs_on_a_stack_is_there_and_uses_the_executable(command: str) -> None:
    file, name = ON_A_STACK[command].split("::")
    text = (ROOT / "tests" / "integration" / file).read_text(encoding="utf-8")
    functions = {
        each.name: ast.get_source_segment(text, each)
        for each in ast.walk(ast.parse(text))
        if isinstance(each, ast.FunctionDef)
    }
    assert f'"{command}"' in (functions[name] or "")
    assert '.with_name("anchorage")' in text


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
