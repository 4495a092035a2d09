"""Options that several commands share."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from agent.errors import UserError

Home = Annotated[
    Path | None,
    typer.Option("--home", help="Folder of the service. Default: ANCHORAGE_HOME, else .anchorage."),
]
KnownHome = Annotated[  # for commands that need an existing home
    Path | None,
    typer.Option(
        "--home",
        exists=True,
        file_okay=False,
        help="Folder of the service. Default: ANCHORAGE_HOME, else .anchorage.",
    ),
]
Config = Annotated[Path | None, typer.Option("--config", help="TOML file with settings.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
]
Target = Annotated[
    str | None,
    typer.Option("--target", help="Task to train on. Default: tasks.target of the settings."),
]
Digest = Annotated[
    str,
    typer.Argument(
        help="First characters of a digest, or one of anchor, champion, previous, origin."
    ),
]
Reason = Annotated[str, typer.Option("--reason", help="Reason, recorded in the ledger.")]
Name = Annotated[
    str | None,
    typer.Option("--as", help="Who decides, for the ledger. Default: this machine's user@host."),
]


def learner_changes(texts: list[str]) -> dict[str, Any]:
    """["alpha=0.02", "penalty=none"] as a mapping; a value that is JSON is parsed."""
    values: dict[str, Any] = {}
    for each in texts:
        key, equals, value = each.partition("=")
        if not equals:
            raise UserError(f"--set {each!r}: wanted name=value, such as alpha=0.02")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    return values
