"""Every container of the Kubernetes pods, as user 1000, in folders laid as they mount them.

No container engine is needed: the process has the user, the groups and none of root's rights but
to read, since a developer's Python may lie in root's own folder.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.serving.control import EngineControl

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
    ),
]
ROOT = Path(__file__).parents[2]
READS = "=-all,+dac_read_search"
USER = ["setpriv", "--reuid=1000", "--regid=1000", "--groups=1000"]
USER += [f"--{kind}{READS}" for kind in ("inh-caps", "ambient-caps", "bounding-set")]


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def containers() -> dict[str, dict[str, Any]]:
    """By name: those of both pods."""
    found = {}
    for path in sorted((ROOT / "deploy" / "k8s").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            pod = (document or {}).get("spec", {}).get("template", {}).get("spec", {})
            for each in [*pod.get("initContainers", []), *pod.get("containers", [])]:
                found[each["name"]] = each
    return found


class Pod:
    """The folders of the mounts and the commands of the containers, on this machine's paths."""

    def __init__(self, root: Path):
        self.root, self.ports = root, {port: free_port() for port in (8000, 5000, 4200)}
        config = ROOT / "deploy" / "k8s" / "anchorage.yaml"
        settings = next(yaml.safe_load_all(config.read_text()))["data"]["anchorage.toml"]
        for name, mode in (("service", 0o2775), ("service/sockets", 0o2777), ("prefect", 0o2777)):
            self.folder(name, mode)  # as fsGroup leaves a volume: root's, and the group's to write
        (root / "settings").mkdir(mode=0o755)
        (root / "settings" / "anchorage.toml").write_text(self.reached(settings))

    def folder(self, name: str, mode: int) -> None:
        """One mounted volume."""
        (self.root / name).mkdir()
        os.chown(self.root / name, 0, 1000)
        (self.root / name).chmod(mode)

    def reached(self, text: str) -> str:
        """A text with this machine's ports, where Prefect's host is this machine."""
        for port, free in self.ports.items():
            text = text.replace(str(port), str(free))
        return text.replace("anchorage-prefect:", "127.0.0.1:")

    def here(self, text: str) -> str:
        """A word of a manifest with this machine's paths and ports, open to this machine alone."""
        text = self.reached(text)
        for name in ("service", "settings", "prefect"):
            if text == f"/{name}" or text.startswith(f"/{name}/"):
                text = f"{self.root}{text}"
        return text.replace("0.0.0.0", "127.0.0.1")

    def command(self, name: str) -> list[str]:
        """What a container runs, as user 1000."""
        python, *rest = containers()[name]["command"]
        assert python == "python"
        return [*USER, sys.executable, *map(self.here, rest)]

    def environment(self, name: str) -> dict[str, str]:
        """What the manifest gives it; secrets are made up."""
        secrets = {
            "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{self.root}/prefect/p.db"
        }
        given = {
            each["name"]: self.here(each["value"]) if "value" in each
            else secrets.get(each["name"], "anchorage:secret")
            for each in containers()[name].get("env", [])
        }  # fmt: skip
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        return {"PATH": path, "HOME": "/nonexistent", "PYTHONPATH": str(ROOT)} | given

    @contextmanager
    def running(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """The container's process; its group ends with the block."""
        with (self.root / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                self.command(name), env=self.environment(name), cwd="/", stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            try:
                yield process
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def until(self, name: str, process: subprocess.Popen[bytes], well: Callable[[], bool]) -> None:
        """Wait until it answers; what it logged where it ends instead."""
        ends = time.monotonic() + 300
        while True:
            with suppress(httpx.HTTPError):
                if well():
                    return
            log = (self.root / f"{name}.log").read_text(errors="replace")[-1500:]
            assert process.poll() is None, (name, log)
            assert time.monotonic() < ends, (name, log)
            time.sleep(0.5)


def prepared(root: Path) -> Pod:
    """A pod whose init container has ended well."""
    pod = Pod(root)
    ran = subprocess.run(
        pod.command("prepare"), env=pod.environment("prepare"), cwd="/", capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return pod


def engine_answers(path: Path) -> bool:
    """Whether the engine behind a socket is well."""
    with EngineControl.at(path) as engine:
        return engine.healthy()


@pytest.fixture
def volumes() -> Iterator[Path]:
    """A folder that user 1000 may look into, as it may into the root of a container."""
    with tempfile.TemporaryDirectory(prefix="anchorage-pod-", ignore_cleanup_errors=True) as root:
        Path(root).chmod(0o755)
        yield Path(root)


def test_every_container_starts_as_user_1000_and_answers(
    volumes: Path, scale: Callable[[int, int], int]
) -> None:
    if scale(0, 1) == 0:
        pytest.skip("an engine, MLflow and Prefect: in the soak")
    pod = prepared(volumes)
    service, url = pod.root / "service", "http://127.0.0.1:{}{}"
    checks: dict[str, Callable[[], bool]] = {
        "prefect": lambda: (
            httpx.get(
                url.format(pod.ports[4200], "/api/health"), auth=("anchorage", "secret")
            ).is_success
        ),
        "engine": lambda: engine_answers(service / "sockets/engine.sock"),
        "gateway": lambda: httpx.get(url.format(pod.ports[8000], "/healthz")).is_success,
        "mlflow": lambda: httpx.get(url.format(pod.ports[5000], "/health")).is_success,
    }
    with ExitStack() as together:  # the gateway is well when the engine is
        for name, well in checks.items():
            pod.until(name, together.enter_context(pod.running(name)), well)
        others = {n: together.enter_context(pod.running(n)) for n in ("watchdog", "flows")}
        time.sleep(20)  # these two answer nobody; they go on
        for name, process in others.items():
            assert process.poll() is None, (pod.root / f"{name}.log").read_text()[-1500:]
    names = {"prepare", *checks, "watchdog", "flows"}
    assert names == set(containers())
    token = (service / "first.key").read_text().strip()
    assert (service / "first.key").stat().st_mode & 0o777 == 0o600
    assert token.startswith("ank-")
    assert (service / "first.key").stat().st_uid == 1000
