"""Start, stop and look at the stack of a home; it serves the ledger's champion."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.config import (
    Change,
    Settings,
    Started,
    changes,
    given,
    kept,
    load,
    remember,
    settings_file,
    started,
)
from agent.errors import UserError
from agent.home import Home, write_atomically
from agent.population.decoding import decoding
from deploy import stack
from deploy.consoles import CONSOLES
from deploy.serving.served import Served, read_served
from deploy.supervise import Probe, answers
from flows.show.terminal import Reporter

if TYPE_CHECKING:  # `status` and `down` do without it
    from flows.service import Service

LOG = logging.getLogger("anchorage.stack")
STATUS_S = 2.0  # longest wait of `status` for a server that does not answer
ROOT = Path(__file__).parents[2]  # where the packages lie, installed or not


def start(
    home: Path | None,
    config: Path | None,
    model: str | None,
    port: int | None,
    progress: Reporter,
    **sections: Any,
) -> dict[str, Any]:
    """Start the stack of a home and return its status once the endpoint answers.

    Settings are read again (``read_settings``), with ``model``, ``port`` and ``sections``
    on top; the status has them under "settings".

    Raises:
        UserError: Bad settings, another model than the home began with, or nothing came up.
    """
    from agent.store.anchor import require_finite

    # Here: `status` and `down` do not import torch.
    from flows.serve.outlook import next_round, outlook
    from flows.serve.swaps import probe_prompts, probe_served
    from flows.service import Service

    place = Home.at(home)
    options = {name: dict(section) for name, section in sections.items()}
    if model is not None:
        options.setdefault("model", {})["path"] = model
    if port is not None:
        options.setdefault("gateway", {})["port"] = port
    settings, last, changed = read_settings(place, config, options)
    _refuse_lost_state(changed)
    service = Service(place, settings)
    _refuse_other_model(service)
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
    remember(place, last)
    target = settings.tasks.target
    document = {"file": last.file, "changed": [change.shown() for change in changed]}
    document |= outlook(settings, service.priors(target), next_round(service))
    return status | {"settings": document, "away": away(place)}


def _refuse_other_model(service: "Service") -> None:
    """A home's ledger and weights belong to the model that it began with."""
    began = next(iter(service.ledger.states()))
    if began != service.origin.digest:
        raise UserError(
            f"model.path = {service.settings.model.path!r} is {service.origin.digest[:12]}, the "
            f"home began with {began[:12]}; allowed: that model, or another --home"
        )


def _refuse_lost_state(changed: Sequence[Change]) -> None:
    """Without the URL a home whose state is on a server would begin anew, with the original."""
    for each in changed:
        if each.key == "state.url" and each.before and not each.after:
            raise UserError(
                f"state.url is not set; the home's state is on {each.shown()['before']}: "
                "allowed: that one, or another --home"
            )


def stop(home: Path | None) -> dict[str, Any]:
    """Stop the stack of a home."""
    return {"processes": stack.down(Home.at(home))}


def state(home: Path | None) -> dict[str, Any]:
    """What runs in a home, how it decodes, what it learns; None before it was ever started."""
    place = Home.at(home)
    how = None
    with suppress(UserError, FileNotFoundError):  # `doctor` names a file that is damaged
        how = decoding(kept(place), Path(read_served(place).directory))
    more = {"decoding": how, "learning": learning(place), "away": away(place)}
    return stack.status(place) | more


def away(home: Home) -> list[str]:
    """The servers by URL that do not answer now, by the page that was asked for.

    Those of this home are among the services: they may be starting.
    """
    pages, ours = stack.health_pages(home), CONSOLES
    with suppress(UserError, FileNotFoundError):  # `doctor` names a file that is damaged
        ours = kept(home).projection.consoles
    theirs = [pages[name] for name in CONSOLES if pages and name not in ours]
    return [page for page in theirs if not answers(Probe(page), STATUS_S)]


def learning(home: Home) -> dict[str, Any] | None:
    """The running round, the next one, what waits; None where there is no ledger to read."""
    from flows.serve.outlook import overview
    from flows.service import Service

    if not home.settings_json.is_file():
        return None
    try:
        with closing(Service.at(home.root)) as service:
            service.wait_s = STATUS_S
            return overview(service) if service.has_state() else None  # opening would make it
    except Exception as error:  # the processes are shown all the same; `doctor` names the fault
        LOG.warning("what is learnt cannot be read: %s", " ".join(str(error).split()))
        return None


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


def read_settings(
    home: Home, config: Path | None, options: Mapping[str, Mapping[str, Any]]
) -> tuple[Settings, Started, list[Change]]:
    """The settings of this `up`, what it was given, and what differs from the home's.

    Read again each time: options, environment, settings file (``config``, else the one read last,
    else anchorage.toml here). Options of an earlier `up` hold on where file and environment say
    nothing else. A home that was made without `up` keeps its values where nothing is said.

    Raises:
        UserError: Bad settings; a file that is gone, or two of them.
    """
    last, before = started(home), None
    if home.settings_json.is_file():
        # a damaged file is replaced by what --config names, as `doctor` says
        with suppress(*([UserError] if config else [])):
            before = kept(home)
    file = settings_file(_chosen_file(last, config))
    said = given(file)
    known = last.options if last else _own_values(before, file) if before and not config else {}
    earlier = {
        section: {key: v for key, v in values.items() if f"{section}.{key}" not in said}
        for section, values in known.items()
    }
    chosen = _over(earlier, options)
    settings = load(file, **chosen)
    now = Started(str(file) if file else None, chosen)
    return settings, now, changes(before, settings) if before else []


def _own_values(before: Settings, file: Path | None) -> dict[str, dict[str, Any]]:
    """What a home that was made without `up` has and the defaults of its model do not say."""
    model = {"path": before.model.path}
    own: dict[str, dict[str, Any]] = {"model": dict(model)}
    for change in changes(load(file, model=model), before):
        section, _, key = change.key.partition(".")
        own.setdefault(section, {})[key] = change.after
    return own


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values by section and key, those above in place of those below."""
    return {name: {**below.get(name, {}), **above.get(name, {})} for name in {**below, **above}}


def _chosen_file(last: Started | None, config: Path | None) -> Path | None:
    """The settings file to read; None: anchorage.toml here, if there."""
    here = settings_file()
    if config is not None or last is None or last.file is None:
        return config
    read = Path(last.file)
    if not read.is_file():
        raise UserError(f"settings file {last.file!r}, read by the last `up`, is gone; --config?")
    if here is not None and here != read:
        raise UserError(
            f"settings files {last.file!r} (of the last `up`) and {str(here)!r}: "
            "allowed: one of them, by --config"
        )
    return read


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
