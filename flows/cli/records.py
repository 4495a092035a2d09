"""What a home holds: settings, ledger, journal, keys, and deletion by principal."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import AsJson, Config, Home, KnownHome
from flows.show.terminal import pairs, reporter, show

app = typer.Typer()
key_app = typer.Typer(help="API keys of the endpoint.", no_args_is_help=True)


@app.command()
def history(
    limit: Annotated[int, typer.Option(help="Number of rows.")] = 50,
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """Show the ledger, newest rows first: each decision, who made it and why."""
    from flows.service import Service
    from flows.show.report import history_table

    entries = Service.at(home).ledger.history(limit)
    show([asdict(entry) for entry in entries], as_json, history_table(entries))


@app.command()
def settings(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the reference of all settings instead.")
    ] = False,
    config: Config = None,
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """Print the settings in force in a home as TOML."""
    from flows.commands.settings import effective, reference, to_toml

    if markdown:
        print(reference(), end="")  # noqa: T201
        return
    values = effective(home, config)
    if as_json:
        show(values, as_json)
    else:
        print(to_toml(values))  # noqa: T201  to be read by people and by `--config`


@app.command(hidden=True)
def commands(context: typer.Context) -> None:
    """Print the reference of all commands as Markdown."""
    from flows.commands.settings import command_reference

    print(command_reference(context.find_root().command), end="")  # noqa: T201


@app.command()
def replay(
    candidate: Annotated[str, typer.Argument(help="Digest of a candidate, or id of a round.")],
    snapshots: Annotated[bool, typer.Option(help="Start from the newest valid snapshot.")] = False,
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """Rebuild weights from anchor and journal; checks the hash after every generation."""
    from flows.commands.runs import replay_now

    document = replay_now(home, candidate, snapshots)
    show(document, as_json, pairs("replayed", document))


@app.command()
def export(
    candidate: Annotated[str, typer.Argument(help="Digest of a candidate, or id of a round.")],
    into: Annotated[Path, typer.Argument(help="Folder in which <digest>/ is made.")],
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """Write a candidate as a Hugging Face directory, for transformers or vLLM."""
    from flows.commands.runs import export_now

    document = export_now(home, candidate, into)
    show(document, as_json, pairs("exported", document))


@app.command()
def forget(
    principal: Annotated[
        str, typer.Argument(help="Principal (owner of keys) whose data is deleted.")
    ],
    replay: Annotated[
        bool,
        typer.Option("--replay", help="Train the rounds that used its rows again without them."),
    ] = False,
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """Delete a principal's text, rows and keys; list the versions that were trained on them."""
    from flows.commands.forget import forget_now
    from flows.commands.runs import weigh_now

    with reporter() as bars:
        document = forget_now(home, principal, replay, bars)
        if replay:
            document["verdicts"] = weigh_now(home, [*document["replayed"].values()], bars)
    show(document, as_json, pairs("forgotten", document))


@key_app.command("create")
def create_key(
    owner: Annotated[str, typer.Argument(help="Principal that owns the key.")],
    scope: Annotated[
        list[str],
        typer.Option(
            help="Scope: infer, submit_task, feedback, review or admin; repeat for several."
        ),
    ],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Create a key. Its token is printed once; only a hash is stored."""
    from agent.gateway.keys import KeyStore
    from flows.service import Service

    made = asdict(KeyStore(Service.at(home).experience).create_key(owner, scope))
    show(made, as_json, pairs("key (the token is shown only now)", made))


@key_app.command("list")
def list_keys(home: KnownHome = None, as_json: AsJson = False) -> None:
    """List all keys (without tokens)."""
    from agent.gateway.keys import KeyStore
    from flows.service import Service

    known = [_dated(key) for key in KeyStore(Service.at(home).experience).list_keys()]
    if known or as_json:
        show(known, as_json, *(pairs(str(each["key_id"]), each) for each in known))
    else:
        show(known, as_json, "no keys: the endpoint answers this machine only")


def _dated(key: Mapping[str, object]) -> dict[str, object]:
    """A key with its times as ISO 8601 in UTC."""
    times = ("created", "expires", "revoked")
    return {
        name: datetime.fromtimestamp(value, UTC).isoformat(timespec="seconds")
        if name in times and isinstance(value, float)
        else value
        for name, value in key.items()
    }


@key_app.command("revoke")
def revoke_key(key_id: str, home: KnownHome = None, as_json: AsJson = False) -> None:
    """Revoke a key."""
    from agent.gateway.keys import KeyStore
    from flows.service import Service

    KeyStore(Service.at(home).experience).revoke(key_id)
    show({"revoked": key_id}, as_json, f"revoked: {key_id}; `anchorage key list` shows the others")
