"""A real PostgreSQL server of a test's own, which can be killed and started again."""

import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

BINARIES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)

needs_server = pytest.mark.skipif(
    BINARIES is None and "CI" not in os.environ,
    reason="no PostgreSQL server on this machine (CI installs Debian's)",
)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class PostgresProcess:
    """A server of its own in a folder of its own, run by the postgres user where we are root."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
        self._prefix = []
        if os.geteuid() == 0:
            self._prefix = ["runuser", "-u", "postgres", "--"]
            shutil.chown(self._folder, "postgres")
        self.port = free_port()
        self.kills = 0
        self._run("initdb", "-D", self._data, "-U", "postgres", "--no-sync", "--encoding=UTF8")
        self.start()

    @property
    def _data(self) -> str:
        return str(self._folder / "data")

    def _run(self, program: str, *arguments: str) -> None:
        assert BINARIES is not None
        command = [*self._prefix, str(BINARIES / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=self._folder, timeout=60)

    def start(self) -> None:
        options = (
            f"-c listen_addresses=127.0.0.1 -c unix_socket_directories={self._folder} -c fsync=off"
        )
        log = str(self._folder / "log")
        self._run(
            "pg_ctl", "-D", self._data, "-w", "-l", log, "-o", f"-p {self.port} {options}", "start"
        )

    def kill(self) -> None:
        """End it as a crash does: no connection is told, nothing is flushed."""
        self.kills += 1
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "stop")

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres:a-secret@127.0.0.1:{self.port}/{database}"

    def database(self, name: str) -> str:
        """The URL of a new, empty database."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    @contextmanager
    def disturbed(self, databases: int, up_s: float, away_s: float) -> Iterator[str]:
        """Its URL, with databases trial0, ...; killed and started again until the block ends."""
        for number in range(databases):
            self.database(f"trial{number}")
        over = threading.Event()

        def disturb() -> None:
            while not over.wait(up_s):
                self.kill()
                over.wait(away_s)
                self.start()

        disturber = threading.Thread(target=disturb)
        disturber.start()
        try:
            yield self.url("").rstrip("/")
        finally:
            over.set()
            disturber.join()

    def remove(self) -> None:
        with suppress(subprocess.CalledProcessError):  # killed by a test
            self.kill()
        shutil.rmtree(self._folder)


class LossyProxy:
    """Forwards to a server; once, the answer to a statement is lost together with the connection.

    ``reaches``: whether the statement itself still comes to the server. ``meanwhile`` happens
    before anybody can connect again.
    """

    def __init__(
        self, port: int, statement: bytes, reaches: bool, meanwhile: Callable[[], object]
    ) -> None:
        self._to, self._statement, self._reaches = port, statement, reaches
        self._meanwhile = meanwhile
        self._passing = threading.Lock()
        self.lost = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with self._passing:
                    server = socket.create_connection(("127.0.0.1", self._to))
                threading.Thread(target=self._up, args=(client, server), daemon=True).start()
                threading.Thread(target=self._down, args=(server, client), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while content := client.recv(65536):
                if self._statement in content and not self.lost:
                    self.lost += 1
                    with self._passing:
                        client.shutdown(socket.SHUT_RDWR)  # before the server can answer
                        if self._reaches:
                            server.sendall(content)
                        self._meanwhile()
                    break
                server.sendall(content)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while content := server.recv(65536):
                client.sendall(content)
        for each in (client, server):
            each.close()

    def close(self) -> None:
        self._listener.close()
