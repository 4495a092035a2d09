"""Imports go down only, and heavy libraries have one door each."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("agent", "evaluators", "deploy", "flows")
HEAVY = ("vllm", "ray", "mlflow", "prefect", "datasets")

# The first prefix that matches names the floor.
FLOORS: tuple[tuple[str, int], ...] = (
    ("agent.errors", 0),
    ("agent.learner", 0),
    ("agent.population.schedule", 0),
    ("agent.home", 1),
    ("agent.config", 1),
    ("agent.sections", 1),
    ("agent.sections_running", 1),
    ("agent.store", 1),
    ("agent", 2),
    ("evaluators.loading", 2),
    ("evaluators.runner", 2),
    ("evaluators.sandbox", 2),
    ("evaluators.sandbox_worker", 2),
    ("evaluators.confine", 2),
    ("evaluators.plugins", 2),
    ("evaluators.runner", 2),
    ("evaluators.openai_client", 2),
    ("evaluators.examples", 2),
    ("evaluators.environments", 2),
    ("evaluators", 0),
    ("deploy.embedded.rows", 0),
    ("deploy", 2),
    ("flows.cli", 4),
    ("flows", 3),
)
MAY_IMPORT: Mapping[str, frozenset[str]] = {
    "agent": frozenset({"agent"}),
    "evaluators": frozenset({"evaluators"}),  # and the one UserError, see SHARED
    "deploy": frozenset({"deploy", "agent"}),
    "flows": frozenset(PACKAGES),
}
# What agent and evaluators have in common: a caller catches one class, whoever raised it.
SHARED = ("agent.errors", "agent.errors.UserError")
IMPURE = ("os", "time", "logging", "socket", "subprocess", "tempfile", "shutil")


def floor(module: str) -> int:
    """The floor of a module of ours."""
    inits = {package for package in PACKAGES if module == package}
    if inits:
        return 0
    return next(level for prefix, level in FLOORS if _within(module, prefix))


def _within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def sources() -> dict[str, str]:
    """Source by module name, for every module of the four packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path.read_text(encoding="utf-8")
    return found


@cache
def imports(source: str) -> tuple[str, ...]:
    """Every absolute module a source imports, wherever the statement stands."""
    return tuple(_imports(source))


def _imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level + (node.module or "")
            else:
                yield node.module or ""
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(modules: Mapping[str, str]) -> list[str]:
    """Every import that goes up, sideways between packages, or past the one door of a library."""
    found: list[str] = []
    doors: dict[tuple[str, str], set[str]] = {}
    for name, source in modules.items():
        package = name.split(".")[0]
        for target in imports(source):
            top = target.split(".")[0]
            if target.startswith("."):
                found.append(f"{name} imports relatively ({target}); name the module in full")
            if top in HEAVY:
                doors.setdefault((package, top), set()).add(name)
                if floor(name) < 2:
                    found.append(f"{name} (floor {floor(name)}) imports {top}")
            if top in IMPURE and floor(name) == 0:
                found.append(f"{name} (floor 0) imports {top}")
            if top not in PACKAGES:
                continue
            if top not in MAY_IMPORT[package] and target not in SHARED:
                found.append(f"{name} imports {target}: {package} may not import {top}")
            known = next((m for m in (target, target.rpartition(".")[0]) if m in modules), None)
            if known and floor(known) > floor(name):
                found.append(f"{name} (floor {floor(name)}) imports {known} (floor {floor(known)})")
    for (package, library), names in doors.items():
        if len(names) > 1:
            found.append(f"{library} has {len(names)} doors in {package}: {sorted(names)}")
    return found


def cycles(modules: Mapping[str, str]) -> list[str]:
    """Modules that reach themselves through imports of ours."""
    edges = {
        name: {t for t in imports(source) if t in modules and t != name}
        for name, source in modules.items()
    }

    def reaches(start: str) -> bool:
        seen: set[str] = set()
        stack = list(edges[start])
        while stack:
            at = stack.pop()
            if at == start:
                return True
            if at not in seen:
                seen.add(at)
                stack.extend(edges[at])
        return False

    return [name for name in modules if reaches(name)]


def test_the_house_has_no_violation() -> None:
    assert violations(sources()) == []


def test_no_import_cycles() -> None:
    assert cycles(sources()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("agent.learner.es", "from agent.store.journal import Journal"),
        ("agent.store.journal", "from agent.registry import Registry"),
        ("agent.registry", "import evaluators.task"),
        ("evaluators.gate", "from agent.config import Settings"),
        ("evaluators.gate", "from agent.errors import Other"),
        ("deploy.stack", "from flows.learn.loop import learn"),
        ("flows.learn.loop", "from flows.cli import app"),
        ("agent.learner.noise", "import os"),
        ("agent.learner.noise", "import vllm"),
        ("agent.gateway.app", "import vllm"),
    ],
)
def test_an_import_that_goes_up_is_found(module: str, line: str) -> None:
    modules = sources()
    assert module in modules
    modules[module] += f"\n{line}\n"
    assert violations(modules) != []


def repeated_classes(modules: Mapping[str, str]) -> dict[str, list[str]]:
    """Public classes that more than one module defines: name -> the modules."""
    found: dict[str, list[str]] = {}
    for name, source in modules.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(name)
    return {name: where for name, where in found.items() if len(where) > 1}


def test_a_public_class_name_has_one_meaning() -> None:
    assert repeated_classes(sources()) == {}


def test_a_repeated_class_name_is_found() -> None:
    modules = {"agent.a": "class Thing: ...", "flows.b": "class Thing: ...\nclass _Own: ..."}
    assert repeated_classes(modules) == {"Thing": ["agent.a", "flows.b"]}


def test_flows_has_at_most_twelve_rooms() -> None:
    rooms = [path.name for path in (ROOT / "flows").iterdir() if path.name != "__pycache__"]
    assert len([name for name in rooms if name != "py.typed"]) <= 12, sorted(rooms)


def test_a_cycle_is_found() -> None:
    modules = sources() | {"agent.a": "import agent.b", "agent.b": "import agent.a"}
    assert sorted(cycles(modules)) == ["agent.a", "agent.b"]


@pytest.mark.proof
def test_floors_zero_and_one_load_without_heavy_libraries() -> None:
    # Migrations are scripts that alembic runs; they cannot be imported alone.
    light = [name for name in sources() if floor(name) < 2 and ".migrations." not in name]
    code = (
        "import importlib, sys\n"
        f"for name in {light!r}: importlib.import_module(name)\n"
        f"print([heavy for heavy in {HEAVY!r} if heavy in sys.modules])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert told.stdout.strip() == "[]"


def test_a_serving_engines_process_does_not_load_llvmlite() -> None:
    """vLLM's search for kernels on the CPU fails where it is; see ``agent.store.theta``."""
    code = "import sys, deploy.serving.process; print({'numba', 'llvmlite'} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.strip() == "set()"
