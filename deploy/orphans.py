"""Every process a stack ever started, found again even when its supervisor was killed.

Two marks: the session supervisord founded (a session's number is not given again while it has a
member), and a variable in the environment for those who founded sessions of their own. The second
is lost by a process that gives itself a title, as vLLM's do: what a stack started is therefore
listed before its supervisor, and with it the session's number, is gone.
"""

import os
from collections.abc import Callable, Sequence

import psutil

from agent.home import Home

MARKER = "ANCHORAGE_STACK"  # environment of every process of a stack: its home
GRACE_S = 5.0  # for an orphan to end by itself
SUPERVISOR_S = 20.0  # for supervisord to end its services and itself


def supervisor_of(home: Home) -> psutil.Process | None:
    """The live supervisord of a home."""
    pid = _recorded_pid(home)
    try:
        process = psutil.Process(pid) if pid else None
        ours = process and str(home.supervisor_config) in process.cmdline() and _alive(process)
    except psutil.Error:
        return None
    return process if ours else None


def shut_down(home: Home) -> int:
    """End supervisord and everything it ever started; how many processes had to be ended."""
    before = survivors(home)
    supervisor = supervisor_of(home)
    if supervisor:
        supervisor.terminate()
        psutil.wait_procs([supervisor], timeout=SUPERVISOR_S)
    end(list({process.pid: process for process in [*survivors(home), *before]}.values()))
    for leftover in [*home.sockets.glob("*"), home.supervisor_pid]:
        leftover.unlink(missing_ok=True)
    return len(before)


def end_leaderless() -> int:
    """End what killed services of this process's session left behind; how many there were.

    supervisord starts every service as the leader of a process group; a group without its leader
    is a killed service's, whose successor may need the memory or the port it still holds.
    """
    session = os.getsid(0)
    left = [
        process
        for process in psutil.process_iter()
        if _in_session(process, session) and _leaderless(process) and _alive(process)
    ]
    end(left, grace_s=0.0)
    return len(left)


def survivors(home: Home) -> list[psutil.Process]:
    """Every live process of the stack: supervisord, its services, orphans, and their children."""
    session = _session(home)
    roots = [
        process
        for process in psutil.process_iter()
        if (_in_session(process, session) or _marked(process, home)) and _alive(process)
    ]
    return with_children(roots)


def with_children(roots: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Processes and all their descendants, this process excepted."""
    found = {root.pid: root for root in roots}
    for root in roots:
        try:
            found |= {child.pid: child for child in root.children(recursive=True)}
        except psutil.Error:
            continue
    found.pop(os.getpid(), None)
    return list(found.values())


def end(processes: Sequence[psutil.Process], grace_s: float = GRACE_S) -> None:
    """Ask processes to end, then make them; returns when they are gone."""
    for process in processes if grace_s else ():
        _unless_gone(process.terminate)
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        _unless_gone(process.kill)
    psutil.wait_procs(alive, timeout=GRACE_S)


def _session(home: Home) -> int | None:
    """The session supervisord founded, unless its number has come to mean another one."""
    pid = _recorded_pid(home)
    if pid is None or home.supervisor_pid.stat().st_mtime < psutil.boot_time():
        return None
    leader = psutil.pid_exists(pid) and not _zombie(pid)
    return None if leader and supervisor_of(home) is None else pid


def _recorded_pid(home: Home) -> int | None:
    try:
        return int(home.supervisor_pid.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return None


def _in_session(process: psutil.Process, session: int | None) -> bool:
    try:
        return session is not None and os.getsid(process.pid) == session
    except OSError:
        return False


def _leaderless(process: psutil.Process) -> bool:
    try:
        leader = os.getpgid(process.pid)
    except OSError:
        return False
    return not psutil.pid_exists(leader) or _zombie(leader)


def _marked(process: psutil.Process, home: Home) -> bool:
    try:
        return process.environ().get(MARKER) == str(home.root)
    except (psutil.Error, OSError):
        return False


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _unless_gone(act: Callable[[], None]) -> None:
    try:
        act()
    except psutil.NoSuchProcess:
        return
