"""The platform files name things that exist, and open nothing the design keeps closed."""

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from agent.config import load

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFESTS = sorted((DEPLOY / "k8s").glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in MANIFESTS:
        for document in documents(path):
            if "template" in document.get("spec", {}):
                yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def the(name: str) -> dict[str, Any]:
    return next(c for _, pod in pods() for c in containers(pod) if c["name"] == name)


def test_every_mount_has_its_volume_and_every_claim_exists() -> None:
    claims = {
        d["metadata"]["name"]
        for path in MANIFESTS
        for d in documents(path)
        if d["kind"] == "PersistentVolumeClaim"
    }
    for name, pod in pods():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in containers(pod):
            for mount in container.get("volumeMounts", []):
                assert mount["name"] in volumes, (name, container["name"])
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims


@pytest.mark.parametrize("version", ["1.30", None])
def test_every_manifest_is_one_that_kubernetes_takes(version: str | None) -> None:
    """By the schemas of an old and of the newest version; unknown keys are faults."""
    import kubernetes_validate

    version = version or kubernetes_validate.latest_version()
    for path in MANIFESTS:
        for document in documents(path):
            kubernetes_validate.validate(document, version, strict=True)
            wrong = document | {"spek": {}}
            with pytest.raises(kubernetes_validate.ValidationError):
                kubernetes_validate.validate(wrong, version, strict=True)


def test_every_container_runs_a_module_that_exists() -> None:
    for _, pod in pods():
        for container in containers(pod):
            python, flag, module, *_rest = container["command"]
            assert (python, flag) == ("python", "-m")
            assert importlib.util.find_spec(module) is not None, module


def test_only_the_gateway_has_a_port_in_the_engines_pod() -> None:
    pod = dict(pods())["anchorage"]
    assert [c["name"] for c in containers(pod) if c.get("ports")] == ["gateway"]
    for container in containers(pod):
        hosts = [arg for arg in container["command"] if arg.startswith("--host")]
        assert hosts in ([], ["--host=127.0.0.1"])


def test_the_engine_and_the_watchdog_share_processes_and_sockets() -> None:
    """Without both the watchdog could not end an engine that hangs."""
    pod = dict(pods())["anchorage"]
    assert pod["shareProcessNamespace"] is True
    for name in ("engine", "watchdog", "gateway", "flows"):
        paths = {m["name"]: m["mountPath"] for m in the(name)["volumeMounts"]}
        assert paths["sockets"] == f"{paths['home']}/sockets"


def test_nobody_in_a_pod_is_root() -> None:
    for _, pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in containers(pod):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_the_settings_of_the_cluster_are_settings(tmp_path: Path) -> None:
    config = next(
        d for d in documents(DEPLOY / "k8s" / "anchorage.yaml") if d["kind"] == "ConfigMap"
    )
    path = tmp_path / "anchorage.toml"
    path.write_text(config["data"]["anchorage.toml"])
    assert load(path).gateway.port == the("gateway")["ports"][0]["containerPort"]


def test_compose_listens_on_loopback_with_settings_that_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = documents(DEPLOY / "compose" / "compose.yaml")[0]["services"]["anchorage"]
    assert "ports" not in service
    for name, value in service["environment"].items():
        monkeypatch.setenv(name, value)
    settings = load()
    assert settings.gateway.host == "127.0.0.1"
    ports = (
        settings.gateway.port,
        settings.projection.mlflow_port,
        settings.projection.prefect_port,
    )
    assert ports == (8000, 5000, 4200)
    assert (DEPLOY.parent / service["build"]["dockerfile"]).is_file()


def test_prefect_deploys_flows_that_exist_with_parameters_they_take() -> None:
    told = documents(DEPLOY / "prefect.yaml")[0]
    for deployment in told["deployments"]:
        path, _, name = deployment["entrypoint"].partition(":")
        tree = ast.parse((DEPLOY.parent / path).read_text())
        flow = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
        taken = {argument.arg for argument in flow.args.args}
        assert set(deployment["parameters"]) <= taken
        assert deployment["work_pool"]["name"] == told["name"]
    scheduled = [d for d in told["deployments"] if d.get("schedules")]
    alone = {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert all(deployment["concurrency_limit"] == alone for deployment in scheduled)
    assert {d["name"] for d in scheduled} == {"loop", "reconcile", "bake"}


def test_the_ray_cluster_is_one_that_ray_takes() -> None:
    """Keys by Ray's own schema; usage reports off; no dashboard beyond the node."""
    import jsonschema
    import ray.autoscaler

    schema = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    cluster = documents(DEPLOY / "ray" / "cluster.yaml")[0]
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    for command in cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]:
        assert "ray stop" in command or "RAY_USAGE_STATS_ENABLED=0" in command
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


def excluded(path: str) -> bool:
    """Whether .dockerignore keeps a path out of the build context, by Docker's rules for globs.

    A pattern names a path from the root of the context; ``**`` is any number of folders; what it
    names is left out with all below it.
    """
    lines = (DEPLOY.parent / ".dockerignore").read_text().splitlines()
    for line in lines:
        if line and not line.startswith("#"):
            glob = re.escape(line).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
            if re.fullmatch(f"{glob}(?:/.*)?", path):
                return True
    return False


def test_no_secret_and_no_environment_is_in_the_build_context() -> None:
    for path in (
        ".anchorage/password",
        "demo/.anchorage/first.key",
        ".venv/bin/python",
        ".git/config",
        "agent/__pycache__/home.pyc",
        ".pytest_cache/README.md",
        "build/gpu.json",
    ):
        assert excluded(path), path
    dockerfile = (DEPLOY / "compose" / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?:--\S+ )?(\S+) \S+$", dockerfile, re.MULTILINE)
    assert {"requirements-${EXTRA}.lock", "deploy/compose/entrypoint.sh", "."} == set(copied)
    for path in (
        "requirements-cuda.lock",
        "requirements-cpu.lock",
        "deploy/compose/entrypoint.sh",
        "deploy/embedded/model/model.safetensors",
        "agent/home.py",
        "pyproject.toml",
        "README.md",
    ):
        assert not excluded(path), path
        assert (DEPLOY.parent / path).is_file(), path


def test_a_gpu_is_a_profile_of_compose_with_the_cuda_image() -> None:
    services = documents(DEPLOY / "compose" / "compose.yaml")[0]["services"]
    gpu = services["anchorage-gpu"]
    assert (gpu["profiles"], gpu["extends"]) == (["gpu"], {"service": "anchorage"})
    (extra,) = gpu["build"]["args"].values()
    assert (DEPLOY.parent / f"requirements-{extra}.lock").is_file()
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_postgresql_is_a_profile_of_compose_with_a_url_that_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    services = documents(DEPLOY / "compose" / "compose.yaml")[0]["services"]
    service, server = services["anchorage-postgresql"], services["postgresql"]
    assert (service["profiles"], server["profiles"]) == (["postgresql"], ["postgresql"])
    assert (service["extends"], *service["depends_on"]) == ({"service": "anchorage"}, "postgresql")
    monkeypatch.setenv("ANCHORAGE_STATE__URL", service["environment"]["ANCHORAGE_STATE__URL"])
    url = urlsplit(str(load().state.url))
    (port,) = server["ports"]
    assert f"{url.hostname}:{url.port}:5432" == port
    assert (url.username, url.path[1:]) == (
        server["environment"]["POSTGRES_USER"],
        server["environment"]["POSTGRES_DB"],
    )
    assert url.password is None  # PGPASSWORD, which no file of the home gets
    assert service["environment"]["PGPASSWORD"] == server["environment"]["POSTGRES_PASSWORD"]


def test_servers_by_url_are_a_profile_of_compose_that_the_service_uses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Our image, so that client and server are of one version; passwords from one variable each."""
    document = documents(DEPLOY / "compose" / "compose.yaml")[0]
    services = document["services"]
    service, names = services["anchorage-by-url"], ("mlflow", "prefect")
    assert service["extends"] == {"service": "anchorage"}
    assert tuple(service["depends_on"]) == names
    for name, value in service["environment"].items():
        monkeypatch.setenv(name, value)
    plan = load().projection
    assert plan.consoles == ()
    for name, url in zip(names, (plan.mlflow_url, plan.prefect_api_url), strict=True):
        server = services[name]
        assert (server["image"], server["profiles"]) == ("anchorage", service["profiles"])
        (port,), address = server["ports"], urlsplit(url)
        assert port.startswith(f"{address.hostname}:{address.port}:")
        assert f"--port={port.rpartition(':')[2]}" in server["entrypoint"]
        assert server["volumes"][0].partition(":")[0] in document["volumes"]
    mlflow, prefect = (services[name]["environment"] for name in names)
    given = service["environment"]
    assert mlflow["MLFLOW_AUTH_ADMIN_PASSWORD"] == given["MLFLOW_TRACKING_PASSWORD"]
    assert prefect["PREFECT_SERVER_API_AUTH_STRING"] == given["PREFECT_API_AUTH_STRING"]


def test_the_cluster_uses_its_own_prefect_server_by_url(tmp_path: Path) -> None:
    config, server = DEPLOY / "k8s" / "anchorage.yaml", DEPLOY / "k8s" / "prefect.yaml"
    (tmp_path / "anchorage.toml").write_text(documents(config)[0]["data"]["anchorage.toml"])
    plan = load(tmp_path / "anchorage.toml").projection
    service = next(each for each in documents(server) if each["kind"] == "Service")
    (port,) = service["spec"]["ports"]
    name = service["metadata"]["name"]
    assert plan.prefect_api_url == f"http://{name}:{port['port']}/api"
    assert plan.consoles == ("mlflow",)  # a container of the pod
    assert "PREFECT_API_AUTH_STRING" in {each["name"] for each in the("flows")["env"]}


def test_a_fresh_volume_of_compose_belongs_to_the_images_user() -> None:
    dockerfile = (DEPLOY / "compose" / "Dockerfile").read_text()
    home = re.search(r"ANCHORAGE_HOME=(\S+)", dockerfile)
    assert home is not None
    assert f"install --directory --owner=anchorage --mode=0700 {home.group(1)}" in dockerfile
    service = documents(DEPLOY / "compose" / "compose.yaml")[0]["services"]["anchorage"]
    assert service["volumes"] == [f"home:{home.group(1)}"]
