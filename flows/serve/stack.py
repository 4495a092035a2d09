"""Start, stop and look at the stack of a home; it serves the ledger's champion."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent.config import Settings, kept, load
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
    from agent.store.anchor import require_finite
    from flows.serve.swaps import probe_served  # here: `status` and `down` do not import torch
    from flows.service import Service

    place = Home.at(home)
    settings = _settings(place, config, model, port, changes)
    service = Service(place, settings)
    require_finite(service.origin)
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
        stack.down(place)  # a stack whose engine does not answer is not left running
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
    """Point this process's clients (Prefect's) at the running stack; False where none runs."""
    environment = stack.environment_of(home)
    before = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    try:
        yield bool(environment)
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _settings(
    home: Home, config: Path | None, model: str | None, port: int | None, changes: dict[str, Any]
) -> Settings:
    """The home's settings with changes, or those of ``config`` (else the defaults) with them."""
    sections: dict[str, Any] = {name: dict(section) for name, section in changes.items()}
    if model is not None:
        sections.setdefault("model", {})["path"] = model
    if port is not None:
        sections.setdefault("gateway", {})["port"] = port
    if config is None and model is None and home.settings_json.is_file():
        merged = kept(home).model_dump()
        for name, section in sections.items():
            merged[name] |= section
        return Settings.model_validate(merged)
    return load(config, **sections)
