"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[
    Path | None, typer.Option("--home", help="The service's folder; else ANCHORAGE_HOME.")
]
KnownHome = Annotated[  # of a command that only makes sense where something is
    Path | None,
    typer.Option(
        "--home", exists=True, file_okay=False, help="The service's folder; else ANCHORAGE_HOME."
    ),
]
Config = Annotated[Path | None, typer.Option("--config", help="Settings, a TOML file.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
Target = Annotated[str | None, typer.Option("--target", help="Task to train on.")]
Digest = Annotated[str, typer.Argument(help="A digest's beginning, or anchor, champion, previous.")]
