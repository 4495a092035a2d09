"""The stack of a home, from its settings: what to serve is the ledger's champion."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent.config import Settings, load
from agent.home import Home
from deploy import stack
from deploy.serving.served import Served
from flows.show.progress import Reporter


def start(
    home: Path | None,
    config: Path | None,
    model: str | None,
    port: int | None,
    progress: Reporter,
    **changes: Any,
) -> dict[str, Any]:
    """Start the stack of a home and return its status once the endpoint answers.

    Settings come from ``config``, else from the home as it was last started, else the defaults;
    ``model``, ``port`` and ``changes`` (sections) come on top.
    """
    from flows.serve.swaps import probe_served  # looking and stopping need not wait for torch
    from flows.service import Service

    place = Home.at(home)
    settings = _settings(place, config, model, port, changes)
    service = Service(place, settings)
    champion = service.champion()
    served = Served(champion, str(service.directory(champion)))
    status = stack.up(
        place,
        settings,
        served,
        progress=lambda name, state: progress.say(f"  {name}: {state}"),
    )
    try:
        probe_served(service)
    except BaseException:
        stack.down(place)  # nothing half-started
        raise
    return status


def stop(home: Path | None) -> dict[str, Any]:
    """Stop the stack of a home."""
    return {"processes": stack.down(Home.at(home))}


def state(home: Path | None) -> dict[str, Any]:
    """What runs in a home."""
    return stack.status(Home.at(home))


@contextmanager
def connected(home: Home) -> Iterator[bool]:
    """Lead this process's clients to the running stack for a while; False where none runs."""
    found = stack.environment_of(home)
    before = {key: os.environ.get(key) for key in found}
    os.environ.update(found)
    try:
        yield bool(found)
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _settings(
    home: Home, config: Path | None, model: str | None, port: int | None, changes: dict[str, Any]
) -> Settings:
    """Kept settings with changes, or fresh ones."""
    asked: dict[str, Any] = {name: dict(section) for name, section in changes.items()}
    if model is not None:
        asked.setdefault("model", {})["path"] = model
    if port is not None:
        asked.setdefault("gateway", {})["port"] = port
    if config is None and model is None and home.settings_json.is_file():
        kept = Settings.model_validate_json(home.settings_json.read_text(encoding="utf-8"))
        merged = kept.model_dump()
        for name, section in asked.items():
            merged[name] |= section
        return Settings.model_validate(merged)
    return load(config, **asked)
