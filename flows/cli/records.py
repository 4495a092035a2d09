"""What a home holds: settings, ledger, journal, keys, and deletion by principal."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import AsJson, Config, Home, KnownHome
from flows.show.terminal import pairs, reporter, show

app = typer.Typer()
key_app = typer.Typer(help="API keys of the endpoint.", no_args_is_help=True)


@app.command()
def history(
    limit: Annotated[int, typer.Option(help="Newest rows.")] = 50,
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """The ledger, newest first: who, what, why, before and after."""
    from flows.service import Service
    from flows.show.report import history_table

    entries = Service.at(home).ledger.history(limit)
    show([asdict(entry) for entry in entries], as_json, history_table(entries))


@app.command()
def settings(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The reference of all settings instead.")
    ] = False,
    config: Config = None,
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """The settings that hold in a home, as TOML."""
    from flows.commands.settings import effective, reference, to_toml

    if markdown:
        print(reference(), end="")  # noqa: T201
        return
    values = effective(home, config)
    if as_json:
        show(values, as_json)
    else:
        print(to_toml(values))  # noqa: T201  to be read by people and by `--config`


@app.command()
def replay(
    candidate: Annotated[str, typer.Argument(help="A candidate's digest or a round's id.")],
    snapshots: Annotated[bool, typer.Option(help="Start from the newest sound snapshot.")] = False,
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """Rebuild weights from anchor and journal, checking the hash after every generation."""
    from flows.commands.replays import replay_now

    document = replay_now(home, candidate, snapshots)
    show(document, as_json, pairs("replayed", document))


@app.command()
def export(
    candidate: Annotated[str, typer.Argument(help="A candidate's digest or a round's id.")],
    into: Annotated[Path, typer.Argument(help="Folder for <digest>/.")],
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """Write a candidate as a Hugging Face directory that transformers and vLLM load."""
    from flows.commands.replays import export_now

    document = export_now(home, candidate, into)
    show(document, as_json, pairs("exported", document))


@app.command()
def forget(
    principal: Annotated[str, typer.Argument(help="Owner of the keys whose rows go.")],
    replay: Annotated[
        bool, typer.Option("--replay", help="Learn those rounds again without its rewards.")
    ] = False,
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """Delete a principal's text, rows and keys; lists the versions that learnt from them."""
    from flows.commands.forget import forget_now
    from flows.commands.runs import weigh_now

    with reporter(as_json) as bars:
        document = forget_now(home, principal, replay, bars)
        if replay:
            document["verdicts"] = weigh_now(home, [*document["replayed"].values()], bars)
    show(document, as_json, pairs("forgotten", document))


@key_app.command("create")
def create_key(
    owner: Annotated[str, typer.Argument(help="Whose key: the principal.")],
    scope: Annotated[list[str], typer.Option(help="infer, submit_task, feedback, review, admin.")],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make a key; its token is shown once and only its hash is kept."""
    from agent.gateway.keys import KeyStore
    from flows.service import Service

    made = asdict(KeyStore(Service.at(home).experience).create_key(owner, scope))
    show(made, as_json, pairs("key (the token is shown only now)", made))


@key_app.command("list")
def list_keys(home: KnownHome = None, as_json: AsJson = False) -> None:
    """Every key, without its token."""
    from agent.gateway.keys import KeyStore
    from flows.service import Service

    known = KeyStore(Service.at(home).experience).list_keys()
    show(known, as_json, *(pairs(str(each["key_id"]), each) for each in known))


@key_app.command("revoke")
def revoke_key(key_id: str, home: KnownHome = None) -> None:
    """End a key."""
    from agent.gateway.keys import KeyStore
    from flows.service import Service

    KeyStore(Service.at(home).experience).revoke(key_id)
