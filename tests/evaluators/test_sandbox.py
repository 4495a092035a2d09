"""What code of others may do in a sandbox: compute, and nothing else; each attack costs its row."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from agent.errors import UserError
from evaluators.sandbox import Protections, Sandbox, protections
from evaluators.sandbox_worker import Limits
from evaluators.task import Verdict, row_problem

pytestmark = pytest.mark.proof
LIMITS = Limits(cpu_s=0.1, wall_s=20.0, memory_bytes=2**28)

PLUGIN = """
import ctypes, json, os, signal, socket, subprocess, sys, threading, time
from evaluators.task import Source, Task, Verdict

LIBC = ctypes.CDLL(None, use_errno=True)
STATE = []

def said(value):
    return Verdict(0.0, 0.0, str(value))

def errno_of(result):
    return said(ctypes.get_errno() if result == -1 else f"allowed: {result}")

def spin(*_):
    while True:
        try:
            while True: pass
        except BaseException:
            pass

def timer(_):
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    spin()

def long_sleep(_):
    time.sleep(60)

def fork_exec(_):
    import _posixsubprocess
    pid = _posixsubprocess.fork_exec(
        [b"/bin/sleep", b"60"], [b"/bin/sleep"], True, (), None, None, -1, -1, -1, -1, -1, -1,
        *os.pipe(), False, True, False, None, None, None, -1, None, True)
    return said(f"allowed: {pid}")

def thread(_):
    got = []
    threads = [threading.Thread(target=got.append, args=(1,)) for _ in range(3)]
    [each.start() for each in threads]
    [each.join() for each in threads]
    return said(len(got))

def daemon_thread(_):
    threading.Thread(target=spin, daemon=True).start()
    return said("left")

def patched(_):
    STATE.append(1)
    json.loads = lambda text: {"patched": True}
    os.environ["PATCHED"] = "1"
    return said(len(STATE))

def state(_):
    return said((len(STATE), json.loads("[]"), os.environ.get("PATCHED")))

def to(path, *flags):
    return os.open(path, *flags)

def forge(row):
    for fd in range(1, 64):
        try: os.write(fd, b'{"number": %d, "value": {"reward": 1.0}}\\n' % row["number"])
        except OSError: pass
    return said("x")

def read_server(row):
    return said(open(f"/proc/{os.getppid()}/environ", "rb").read()[:5])

def limits(_):
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (soft * 2, hard * 2))
    return said("allowed")

ACTIONS = {
    "spin": spin, "timer": timer, "sleep": long_sleep, "fork exec": fork_exec,
    "threads": thread, "daemon thread": daemon_thread, "patch": patched, "state": state,
    "forge": forge, "server": read_server, "limits": limits,
    "power": lambda row: said(9 ** 9 ** 9 ** 9),
    "memory": lambda row: said(len(bytearray(2**31))),
    "exit": lambda row: os._exit(0),
    "leave": lambda row: sys.exit("bye"),
    "crash": lambda row: ctypes.string_at(0),
    "raise": lambda row: said([][1]),
    "long": lambda row: said("x" * 5_000_000),
    "flood": lambda row: [os.write(3, b"x" * 100_000) for _ in range(100)],
    "secret": lambda row: said(os.environ.get("ANCHORAGE_SECRET")),
    "fork": lambda row: said(f"allowed: {os.fork()}"),
    "ctypes fork": lambda row: errno_of(LIBC.fork()),
    "vfork": lambda row: errno_of(LIBC.syscall(58)) if os.uname().machine == "x86_64" else said(1),
    "clone": lambda row: errno_of(LIBC.syscall(56, 17, 0, 0, 0, 0))
        if os.uname().machine == "x86_64" else said(1),
    "clone3": lambda row: errno_of(LIBC.syscall(435, ctypes.create_string_buffer(88), 88)),
    "system": lambda row: said(f"allowed: {LIBC.system(b'true')}") if LIBC.system(b"true") == 0
        else said(1),
    "spawn": lambda row: said(f"allowed: {os.posix_spawn('/bin/true', ['true'], {})}"),
    "exec": lambda row: os.execv("/bin/true", ["true"]),
    "subprocess": lambda row: said(f"allowed: {subprocess.run(['/bin/true'])}"),
    "kill": lambda row: said(f"allowed: {os.kill(os.getppid(), 9)}"),
    "kill all": lambda row: said(f"allowed: {os.kill(-1, 9)}"),
    "ptrace": lambda row: errno_of(LIBC.ptrace(16, os.getppid(), 0, 0)),
    "read": lambda row: said(open(row["file"]).read()),
    "stat list": lambda row: said(os.listdir(row["folder"])),
    "write": lambda row: said(open(row["file"], "w").write("x")),
    "append": lambda row: said(open(row["file"], "a").write("x")),
    "update": lambda row: said(open(row["file"], "r+").write("x")),
    "create": lambda row: said(to(row["file"] + ".new", os.O_CREAT | os.O_RDONLY)),
    "truncate": lambda row: said(f"allowed: {os.truncate(row['file'], 0)}"),
    "ctypes open": lambda row: errno_of(LIBC.open(row["file"].encode(), os.O_RDWR)),
    "creat": lambda row: errno_of(LIBC.creat(row["file"].encode(), 0o600)),
    "unlink": lambda row: said(f"allowed: {os.unlink(row['file'])}"),
    "ctypes unlink": lambda row: errno_of(LIBC.unlink(row["file"].encode())),
    "rename": lambda row: said(f"allowed: {os.rename(row['file'], row['file'] + '2')}"),
    "chmod": lambda row: said(f"allowed: {os.chmod(row['file'], 0)}"),
    "mkdir": lambda row: said(f"allowed: {os.mkdir(row['folder'] + '/new')}"),
    "rmdir": lambda row: said(f"allowed: {os.rmdir(row['folder'])}"),
    "link": lambda row: said(f"allowed: {os.link(row['file'], row['file'] + '2')}"),
    "socket": lambda row: said(f"allowed: {socket.create_connection(('127.0.0.1', row['port']))}"),
    "udp": lambda row: said(f"allowed: {socket.socket(socket.AF_INET, socket.SOCK_DGRAM)}"),
    "unix": lambda row: said(f"allowed: {socket.socket(socket.AF_UNIX)}"),
    "ctypes socket": lambda row: errno_of(LIBC.socket(2, 1, 0)),
    "unshare": lambda row: errno_of(LIBC.unshare(0x10000000)),
    "mount": lambda row: errno_of(LIBC.mount(b"x", b"/", b"tmpfs", 0, None)),
    "umount": lambda row: errno_of(LIBC.umount2(row["folder"].encode(), 2)),
    "shared memory": lambda row: errno_of(LIBC.shmget(7, 100, 0o1600)),
}

def verify(completion, row):
    print("noise on stdout", flush=True)
    if completion in ACTIONS:
        return ACTIONS[completion](row)
    return Verdict(float(completion == row["word"]), 0.0, completion)

AT_IMPORT

TASK = Task(
    name="word", source=Source("", eval_split="train", file="words.jsonl"),
    key=lambda row: row["word"], fields=lambda row: {"word": row["word"]}, template="Say {word}.",
    verify=verify, gold=lambda row: row["word"],
    wrong=lambda row: spin() if row["word"] == "spin" else row["word"] + "s",
)
"""
ROW = {"word": "anchor"}


def written(folder: Path, at_import: str = "") -> str:
    (folder / "word.py").write_text(PLUGIN.replace("AT_IMPORT", at_import))
    return f"{folder / 'word.py'}:TASK"


@pytest.fixture(scope="module")
def here() -> Protections:
    return protections()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """One sandbox for all attacks that must leave it as it was."""
    folder = tmp_path_factory.mktemp("task")
    home = tmp_path_factory.mktemp("home")
    sandbox = Sandbox(written(folder), LIMITS, [home])
    yield sandbox
    assert sandbox.verify("anchor", ROW).reward == 1.0
    sandbox.close()


def test_a_verdict_comes_back_from_the_worker(shared: Sandbox) -> None:
    assert shared.verify("anchor", ROW) == Verdict(1.0, 0.0, "anchor")
    assert shared.verify("\ud800\n\x00", ROW) == Verdict(0.0, 0.0, "\ud800\n\x00")
    assert shared.verify("threads", ROW).extracted == "3"
    assert len(shared.verify("long", ROW).extracted or "") == 1000


@pytest.mark.parametrize(
    ("completion", "told"),
    [
        ("spin", "more than 0.1 s of CPU"),
        ("timer", "more than 0.1 s of CPU"),
        ("power", "more than 0.1 s of CPU"),
        ("memory", "MemoryError"),
        ("exit", "its process ended (0)"),
        ("leave", "its process ended (1)"),
        ("crash", "its process ended (-11)"),
        ("forge", "its process answered something else"),
        ("flood", "its process answered something else"),
        ("raise", "IndexError: list index out of range"),
        ("limits", "ValueError"),
    ],
)
def test_a_verifier_that_hangs_grows_or_dies_costs_its_row_only(
    shared: Sandbox, completion: str, told: str
) -> None:
    verdict = shared.verify(completion, ROW | {"number": shared._asked + 2})
    assert (verdict.reward, verdict.extracted) == (0.0, None)
    assert told in (verdict.error or "")
    assert shared.verify("anchor", ROW) == Verdict(1.0, 0.0, "anchor")


def test_a_verifier_that_sleeps_is_given_up(tmp_path: Path) -> None:
    sandbox = Sandbox(written(tmp_path), Limits(wall_s=0.3))
    assert "no verdict within 0.3 s" in (sandbox.verify("sleep", ROW).error or "")
    with pytest.raises(ValueError, match=r"wrong: no answer within 0.3 s"):
        sandbox.call("wrong", {"word": "spin"})
    assert sandbox.call("wrong", ROW) == "anchors"
    sandbox.close()


def test_what_one_verdict_changes_the_next_does_not_see(shared: Sandbox) -> None:
    assert shared.verify("patch", ROW).extracted == "1"
    assert shared.verify("patch", ROW).extracted == "1"
    assert shared.verify("state", ROW).extracted == "(0, [], None)"
    assert shared.call("key", ROW) == "anchor"


STARTS = ["fork", "ctypes fork", "fork exec", "vfork", "clone", "clone3", "system", "spawn", "exec"]
STARTS += ["subprocess", "kill", "kill all", "ptrace"]


@pytest.mark.parametrize("attack", STARTS)
def test_a_verdict_starts_and_ends_no_process(
    shared: Sandbox, here: Protections, attack: str
) -> None:
    if "seccomp" not in here.active:
        pytest.skip("this kernel gives no seccomp: the sandbox says so, and promises nothing here")
    verdict = shared.verify(attack, ROW)
    assert verdict.error or verdict.extracted in ("1", "38")  # EPERM, ENOSYS
    assert verdict.error is None or "PermissionError" in verdict.error
    assert shared.verify("anchor", ROW).reward == 1.0
    assert below(shared) <= 3  # server, and the one for functions


CHANGES = ["write", "append", "update", "create", "truncate", "ctypes open", "creat", "unlink"]
CHANGES += ["ctypes unlink", "rename", "chmod", "mkdir", "rmdir", "link"]


@pytest.mark.parametrize("attack", CHANGES)
def test_a_verdict_changes_no_file(
    shared: Sandbox, here: Protections, attack: str, tmp_path: Path
) -> None:
    if not {"landlock", "seccomp"} & here.active:
        pytest.skip("this kernel gives neither Landlock nor seccomp, and the sandbox says so")
    (folder := tmp_path / "folder").mkdir()
    (file := tmp_path / "file").write_text("kept")
    verdict = shared.verify(attack, ROW | {"file": str(file), "folder": str(folder)})
    assert verdict.error or verdict.extracted in ("1", "13")
    assert (file.read_text(), os.access(file, os.R_OK), file.stat().st_nlink) == ("kept", True, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("attack", ["socket", "udp", "unix", "ctypes socket"])
def test_a_verdict_reaches_nobody(shared: Sandbox, here: Protections, attack: str) -> None:
    if "seccomp" not in here.active:
        pytest.skip("this kernel gives no seccomp: the sandbox says so, and promises nothing here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        verdict = shared.verify(attack, ROW | {"port": server.getsockname()[1]})
    assert "PermissionError" in (verdict.error or "") or verdict.extracted == "1"


@pytest.mark.parametrize("attack", ["unshare", "mount", "umount", "shared memory", "server"])
def test_a_verdict_cannot_leave_its_view(
    shared: Sandbox, here: Protections, attack: str, tmp_path: Path
) -> None:
    if not here.complete:
        pytest.skip("this kernel lacks Landlock or seccomp, and the sandbox says so")
    verdict = shared.verify(attack, ROW | {"folder": str(tmp_path)})
    assert "PermissionError" in (verdict.error or "") or verdict.extracted == "1"


@pytest.mark.parametrize("kind", ["file", "home", "user", "etc", "environ"])
def test_a_verdict_reads_neither_homes_nor_other_files(
    here: Protections, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "landlock" not in here.active:
        pytest.skip("no Landlock here")
    (project := tmp_path / "project").mkdir()
    (home := project / ".anchorage").mkdir()
    (user := tmp_path / "user").mkdir()
    monkeypatch.setenv("HOME", str(user))
    monkeypatch.setenv("ANCHORAGE_SECRET", "key")
    files = {
        "file": tmp_path / "file", "home": home / "keys", "user": user / "id_rsa",
        "etc": Path("/etc/passwd"), "environ": Path(f"/proc/{os.getpid()}/environ"),
    }  # fmt: skip
    for file in (files["file"], files["home"], files["user"]):
        file.write_text("secret")
    sandbox = Sandbox(written(project), LIMITS, [home])
    verdict = sandbox.verify("read", ROW | {"file": str(files[kind])})
    assert verdict.extracted is None
    assert "Error" in (verdict.error or "")
    if "mount" in here.active:  # else names, which importing needs to list, but nothing in them
        assert sandbox.verify("stat list", ROW | {"folder": str(home)}).extracted in (None, "[]")
    assert sandbox.verify("secret", ROW) == Verdict(0.0, 0.0, "None")
    sandbox.close()


IMPORTS = {
    "write": "open(FILE, 'w').write('x')",
    "unlink": "os.unlink(FILE)",
    "read": "open(FILE).read()",
    "socket": "socket.socket()",
    "exec": "subprocess.run(['/bin/true'])",
    "environ": "open(f'/proc/{os.getppid()}/environ').read()",
}


@pytest.mark.parametrize("name", IMPORTS)
def test_code_that_runs_when_the_file_is_imported_is_inside_too(
    here: Protections, name: str, tmp_path: Path
) -> None:
    if not here.complete:
        pytest.skip("no Landlock or seccomp here")
    (project := tmp_path / "project").mkdir()
    (file := tmp_path / "file").write_text("kept")
    code = f"FILE = {str(file)!r}\n{IMPORTS[name]}"
    with pytest.raises(UserError, match=r"PermissionError|FileNotFoundError"):
        Sandbox(written(project, code)).task()
    assert file.read_text() == "kept"


LEFT = {
    "fork": "os.fork() or time.sleep(600)",
    "ctypes fork": "LIBC.fork() or time.sleep(600)",
    "own session": "os.fork() or (os.setsid(), time.sleep(600))",
    "orphan": "os.fork() or (os.fork() and os._exit(0)) or (os.setsid(), time.sleep(600))",
}


ADMITTED = """
import os, socket
from evaluators.task import Source, Task, Verdict
HERE = os.getpid()

def act(row):
    if row["do"] == "read": return open(row["file"]).read()
    if row["do"] == "write": return str(open(row["file"], "w").write("x"))
    if row["do"] == "connect": return str(socket.create_connection(("127.0.0.1", row["port"]), 1))
    if row["do"] == "fork": return str(os.fork())
    if row["do"] == "signal": return str(os.kill(os.getppid(), 9))
    return row["do"]

def in_(name):
    return lambda row: act(row) if row["at"] == name else name

TASK = Task(
    name="admitted", source=Source("", eval_split="train", file="rows.jsonl"), key=in_("key"),
    fields=lambda row: {"text": in_("fields")(row)}, template="{text}", gold=in_("gold"),
    wrong=in_("wrong"),
    verify=lambda text, row: Verdict(float(text == in_("gold")(row)), 0.0, text),
)
"""


@pytest.mark.parametrize("function", ["key", "fields", "gold", "wrong"])
def test_a_clients_row_is_tried_within_the_sandbox(
    tmp_path: Path, here: Protections, function: str
) -> None:
    """As the gateway admits it: each function of the row is as confined as the verifier."""
    (tmp_path / "own").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "own" / "admitted.py").write_text(ADMITTED)
    secret = tmp_path / "home" / "secret"
    secret.write_text("zylophon")
    task = Sandbox(f"{tmp_path / 'own' / 'admitted.py'}:TASK", LIMITS, [secret.parent]).task()
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        row = {"at": function, "file": str(secret), "port": port}
        assert row_problem(task, row | {"do": "other"}) is None
        told = [
            row_problem(task, row | {"do": do})
            for do in ("read", "write", "connect", "fork", "signal")
        ]
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
    assert all(here.complete is False or reason is not None for reason in told), told
    assert not any("zylophon" in (reason or "") for reason in told)
    assert secret.read_text() == "zylophon"
    assert row_problem(task, row | {"do": "other"}) is None


@pytest.mark.parametrize("name", LEFT)
def test_a_closed_sandbox_leaves_no_process(name: str, tmp_path: Path) -> None:
    sandbox = Sandbox(written(tmp_path, LEFT[name]), LIMITS)
    assert sandbox.verify("anchor", ROW).reward == 1.0
    assert sandbox.call("key", ROW) == "anchor"
    assert below(sandbox) >= 3  # the server, one for functions, and the one left over
    assert sandbox._worker is not None
    family = psutil.Process(sandbox._worker.pid)
    everyone = [family, *family.children(recursive=True)]
    sandbox.close()
    assert psutil.wait_procs(everyone, timeout=10)[1] == []


def below(sandbox: Sandbox) -> int:
    assert sandbox._worker is not None
    return len(psutil.Process(sandbox._worker.pid).children(recursive=True))


def test_a_sandbox_ends_with_the_process_that_used_it(tmp_path: Path) -> None:
    code = f"""
import os
from evaluators.sandbox import Sandbox
sandbox = Sandbox({written(tmp_path, LEFT["own session"])!r})
sandbox.verify("anchor", {ROW!r})
print(sandbox._worker.pid, flush=True)
os.kill(os.getpid(), 9)
"""

    user = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False)
    keeper = int(user.stdout)
    deadline = time.monotonic() + 30
    while psutil.pid_exists(keeper) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(keeper)
    assert [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info)] == []


def test_a_worker_that_was_killed_between_two_verdicts_is_replaced(tmp_path: Path) -> None:
    sandbox = Sandbox(written(tmp_path), LIMITS)
    assert sandbox.verify("anchor", ROW).reward == 1.0
    assert sandbox._worker is not None
    sandbox._worker.kill()
    sandbox._worker.wait()
    assert "its worker ended (-9)" in (sandbox.verify("anchor" * 100_000, ROW).error or "")
    assert sandbox.verify("anchor", ROW).reward == 1.0
    sandbox.close()
    (tmp_path / "word.py").write_text(PLUGIN.replace("AT_IMPORT", "changed = 1"))
    with pytest.raises(UserError, match="its file has changed"):
        sandbox.verify("anchor", ROW)


def test_a_task_is_loaded_from_any_folder(tmp_path: Path) -> None:
    """An editable install is on no search path, and nothing of ours lies where the user works."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "from evaluators.sandbox import protections; print(sorted(protections().active))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{sorted(protections().active)}\n"


def test_every_promise_is_told_with_its_means() -> None:
    full = Protections(frozenset({"user", "pid", "network", "ipc", "landlock", "seccomp"}))
    assert full.complete
    assert all("prevented" in line for line in full.lines())
    bare = Protections(frozenset())
    assert not bare.complete
    assert [line.partition(": ")[2] for line in bare.lines()] == [
        *["possible"] * 5, "prevented (keeper)", "use files you trust",
    ]  # fmt: skip
