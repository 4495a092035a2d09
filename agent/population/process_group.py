"""The end of an engine's process group, with everything that its processes leave behind."""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  the system's own, names are vLLM's


def end_others(leader: int) -> None:
    """Kill every process of a group but its leader and multiprocessing's resource trackers.

    A tracker ends by itself when all others are gone, and removes the shared memory they left in
    /dev/shm; killed with them it could not. The leader's number is the group's: while it lives, or
    is a zombie, no other group is meant. Looks again until nothing is left, as a process may fork
    meanwhile.
    """
    while members := [pid for pid in _group(leader) if pid != leader]:
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    _remove_unused(SHARED_MEMORY.glob("vllm_dist_*"))


def _group(leader: int) -> Iterator[int]:
    """Live processes of a group that are no resource trackers."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            stat = (process / "stat").read_text().rpartition(") ")[2]
            state, _parent, group, *_ = stat.split()
            if int(group) == leader and state not in "ZX":
                command = (process / "cmdline").read_bytes()
                if b"multiprocessing.resource_tracker" not in command:
                    yield int(process.name)


def _remove_unused(files: Iterable[Path]) -> None:
    """Delete shared memory that no process maps any more.

    Tensor-parallel ranks on the CPU speak through such files, which vLLM never deletes (those of
    an engine that runs are mapped by its ranks from the moment they are made).
    """
    if not (unused := {str(file) for file in files}):
        return
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it ended meanwhile, or is another user's, as its files are
            mapped = {line.split()[-1] for line in maps.read_text().splitlines() if line}
            unused -= mapped
    for name in unused:
        with suppress(OSError):
            Path(name).unlink()
