"""Start, stop and look at the stack of a home; it serves the ledger's champion."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from agent.config import Settings, kept, load
from agent.errors import UserError
from agent.home import Home, write_atomically
from agent.population.decoding import decoding
from deploy import stack
from deploy.serving.served import Served, read_served
from flows.show.terminal import Reporter

ROOT = Path(__file__).parents[2]  # where the packages lie, installed or not


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

    # Here: `status` and `down` do not import torch.
    from flows.serve.swaps import probe_prompts, probe_served
    from flows.service import Service

    place = Home.at(home)
    settings = _settings(place, config, model, port, changes)
    service = Service(place, settings)
    require_finite(service.origin)
    # What can be refused is refused before an engine starts.
    decoding(settings, service.origin.directory)
    probe_prompts(service)
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
    """What runs in a home, and how it decodes (None before it was ever started)."""
    place = Home.at(home)
    how = None
    with suppress(UserError, FileNotFoundError):  # `doctor` names a file that is damaged
        how = decoding(kept(place), Path(read_served(place).directory))
    return stack.status(place) | {"decoding": how}


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


_UNIT = """\
[Unit]
Description=Anchorage in {home}
After=network-online.target
StartLimitIntervalSec=600
StartLimitBurst=5

[Service]
Type=forking
PIDFile={home}/supervisord.pid
WorkingDirectory={folder}
Environment=PYTHONPATH={folder}
ExecStart={python} -m flows.cli up --home {home}
ExecStop={python} -m flows.cli down --home {home}
Restart=on-failure
RestartSec=5
TimeoutStartSec=900
TimeoutStopSec=120
KillMode=control-group
UMask=0077

[Install]
WantedBy={target}
"""


def unit(home: Path | None, system: bool) -> str:
    """A systemd unit for a home: supervisord is its main process, which is started again if killed.

    Raises:
        UserError: A home whose name systemd would read otherwise.
    """
    place = Home.at(home)
    words = (str(place.root), sys.executable, str(ROOT))
    odd = [word for word in words if set(word) & set(" \t\n\"'%$\\")]
    if odd:
        raise UserError(f"path {odd[0]!r}: allowed in a unit: no spaces, quotes, %, $ or backslash")
    target = "multi-user.target" if system else "default.target"
    return _UNIT.format(home=words[0], python=words[1], folder=words[2], target=target)


def install(home: Path | None, system: bool) -> dict[str, Any]:
    """Write the unit where systemd looks; it is enabled by the command that is returned."""
    name = f"anchorage-{Home.at(home).root.name.lstrip('.') or 'home'}.service"
    folder = Path("/etc/systemd/system") if system else Path.home() / ".config/systemd/user"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / name, unit(home, system))
    scope = "" if system else "--user "
    return {
        "unit": str(folder / name),
        "next": f"systemctl {scope}daemon-reload && systemctl {scope}enable --now {name}",
    }
