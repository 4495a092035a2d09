"""Restricting a process that runs foreign code, with the kernel's means.

Each step returns what is active afterwards, for the report:

    isolate       before a fork: user, PID, network, IPC and mount namespaces
    restrict      in the process that imports the code: no privileges, a view of files by
                  Landlock, a seccomp filter, limits of memory and files
    apply_filter  in the process of one verdict: after the second filter no process can be started

Everything is inherited by children and none of it can be taken back. Sources: the manual pages
user_namespaces(7), landlock(7), seccomp(2), prctl(2).
"""

import ctypes
import errno
import os
import resource
import signal
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

MAX_OPEN_FILES = 64
MAX_PROCESSES = 64  # threads count; counted in the user namespace alone

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
_CLONE = {"mount": 0x20000, "ipc": 0x8000000, "user": 0x10000000, "pid": 0x20000000}
_CLONE |= {"network": 0x40000000}
_CLONE_THREAD = 0x10000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_CAPABILITY_VERSION = 0x20080522
_LANDLOCK = {"create": 444, "add": 445, "restrict": 446}  # the same on every architecture
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILE_RIGHTS_BY_ABI = ((1, 13), (2, 14), (3, 15), (5, 16))  # how many bits each version knows
_WRITING = (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND)

SYSTEM_FILES = (
    *("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types"),
    *("/dev/null", "/dev/zero", "/dev/urandom", "/sys/devices/system/cpu", "/proc/cpuinfo"),
)
# System calls that reach other processes, the network or the file system's contents.
REFUSED = (
    *("socket", "connect", "bind", "listen", "accept", "accept4", "sendto", "sendmsg"),
    *("execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd"),
    *("mount", "umount2", "pivot_root", "chroot", "unshare", "setns", "fsopen", "fsmount"),
    *("move_mount", "open_tree", "mount_setattr", "unlink", "unlinkat", "rmdir", "rename"),
    *("renameat", "renameat2", "mkdir", "mkdirat", "mknod", "mknodat", "link", "linkat"),
    *("symlink", "symlinkat", "truncate", "ftruncate", "creat", "chmod", "fchmod", "fchmodat"),
    *("fchmodat2", "chown", "fchown", "lchown", "fchownat", "setxattr", "lsetxattr", "fsetxattr"),
    *("utime", "utimes", "utimensat", "shmget", "shmat", "semget", "msgget", "mq_open", "bpf"),
    *("perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key", "reboot", "kexec_load"),
)
UNKNOWN = ("clone3", "openat2", "io_uring_setup")  # "no such call": their arguments cannot be seen
STARTING = ("fork", "vfork", "kill", "tkill", "tgkill", "rt_sigqueueinfo", "pidfd_send_signal")


def isolate(hidden: Iterable[Path]) -> set[str]:
    """Enter new namespaces as far as the machine allows; a child forked after this is in them.

    The mount namespace hides the directories ``hidden`` behind empty ones.

    Returns:
        names of the namespaces entered: user, pid, network, ipc, mount.
    """
    uid, gid = os.getuid(), os.getgid()
    entered = {"user"} if _unshare("user") else set()
    if entered:  # without a map every file would belong to nobody
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with suppress(OSError):
                Path(f"/proc/self/{name}").write_text(text, encoding="ascii")
    entered |= {name for name in ("pid", "network", "ipc", "mount") if _unshare(name)}
    return entered if "mount" in entered and _covered(hidden) else entered - {"mount"}


def _unshare(name: str) -> bool:
    return bool(_LIBC.unshare(_CLONE[name]) == 0)


def _covered(hidden: Iterable[Path]) -> bool:
    """Whether each of these directories is behind an empty one, for this namespace alone."""
    if _LIBC.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None):
        return False
    folders = [os.fsencode(folder) for folder in hidden if folder.is_dir()]
    return all(_LIBC.mount(b"none", folder, b"tmpfs", 0, b"size=4k") == 0 for folder in folders)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that all can be ended."""
    _LIBC.prctl(_PR_SET_SUBREAPER, 1, 0, 0, 0)


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def restrict(
    readable: Mapping[Path, bool], memory_bytes: int, filters: Sequence[bytes]
) -> set[str]:
    """Give up everything but reading ``readable``, computing, and forking; for good.

    Args:
        readable: paths whose files may be read, or (False) whose names alone may be listed.
        memory_bytes: address space on top of what the process holds.
        filters: of ``compiled_filters``; the first is applied here, () without seccomp.

    Returns:
        names of what took hold: landlock, seccomp, processes; limits always do.
    """
    # The size is read first, because Landlock hides /proc; no_new_privs has to precede Landlock
    # and seccomp, which the kernel gives to an unprivileged process on that condition only.
    held_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    taken = {"landlock"} if _landlock(readable) else set()
    _drop_capabilities()
    limits = {
        resource.RLIMIT_AS: held_bytes + memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))
    return taken | ({"seccomp"} if filters and apply_filter(filters[0]) else set())


def limit_processes() -> None:
    """At most MAX_PROCESSES in this user namespace; outside one, other programs would count."""
    resource.setrlimit(resource.RLIMIT_NPROC, (MAX_PROCESSES, MAX_PROCESSES))


def _drop_capabilities() -> None:
    """Even those within the user namespace: a mount could be undone with them."""
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    _LIBC.capset(header, struct.pack("6I", *[0] * 6))


def _landlock(readable: Mapping[Path, bool]) -> bool:
    """Deny every access to files, TCP and processes outside, but reading what is listed."""
    abi = _LIBC.syscall(_LANDLOCK["create"], None, 0, 1)
    if abi < 1:
        return False
    rights = max(bits for version, bits in _FILE_RIGHTS_BY_ABI if abi >= version)
    network, scope = (3 if abi >= 4 else 0), (3 if abi >= 6 else 0)
    attributes = struct.pack("QQQ", (1 << rights) - 1, network, scope)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8  # an older kernel refuses a longer structure
    ruleset = _LIBC.syscall(_LANDLOCK["create"], attributes[:size], size, 0)
    if ruleset < 0:
        return False
    for path, files_too in readable.items():
        _allow(ruleset, path, files_too)
    done = _LIBC.syscall(_LANDLOCK["restrict"], ruleset, 0)
    os.close(ruleset)
    return bool(done == 0)


def _allow(ruleset: int, path: Path, files_too: bool) -> None:
    """Reading beneath a directory (or its names alone), or of one file; a missing path is none."""
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    rights = (_READ_FILE if files_too else 0) | (_READ_DIR if path.is_dir() else 0)
    if rights:
        _LIBC.syscall(_LANDLOCK["add"], ruleset, 1, struct.pack("=Qi", rights, handle), 0)
    os.close(handle)


Rules = list[tuple[object, str, Sequence[object]]]  # action, system call, conditions


def compiled_filters() -> list[bytes]:
    """Two BPF programs, for ``restrict`` and for the process of one verdict.

    [] where libseccomp is missing.
    """
    try:
        import pyseccomp as seccomp
    except (ImportError, OSError, RuntimeError):
        return []
    denied, unknown = seccomp.ERRNO(errno.EPERM), seccomp.ERRNO(errno.ENOSYS)

    def program(rules: Rules) -> bytes:
        chosen = seccomp.SyscallFilter(seccomp.ALLOW)
        for action, name, arguments in rules:
            with suppress(OSError):  # a call that this architecture or library does not have
                chosen.add_rule(action, name, *arguments)
        with open(os.memfd_create("filter"), "w+b") as file:  # noqa: PTH123
            chosen.export_bpf(file)
            file.seek(0)
            return file.read()

    def bits(place: int, mask: int, value: int) -> list[object]:
        return [seccomp.Arg(place, seccomp.MASKED_EQ, mask, value)]

    outer: Rules = [(denied, name, ()) for name in REFUSED]
    outer += [(unknown, name, ()) for name in UNKNOWN]
    outer += [(denied, "prlimit64", [seccomp.Arg(0, seccomp.NE, 0)])]  # of another process
    outer += [(denied, "open", bits(1, bit, bit)) for bit in _WRITING]
    outer += [(denied, "openat", bits(2, bit, bit)) for bit in _WRITING]
    inner: Rules = [(denied, name, ()) for name in STARTING]
    inner += [(denied, "clone", bits(0, _CLONE_THREAD, 0))]
    return [program(outer), program(inner)]


def apply_filter(program: bytes) -> bool:
    """Install a BPF program (8 bytes an instruction) for this process and its children."""
    code = ctypes.create_string_buffer(program)
    pointer = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    return bool(_LIBC.prctl(_PR_SET_SECCOMP, 2, pointer, 0, 0) == 0)


def cpu_s(pid: int) -> float:
    """CPU seconds a process has used, by the kernel's clock for it (clock_getcpuclockid(3)).

    A timer in the process itself could be set back by the code that runs there.
    """
    return time.clock_gettime((~pid << 3) | 2)
