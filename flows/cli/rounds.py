"""The loop step by step: collect, improve, evaluate, promote, roll back, review."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from agent.errors import UserError
from flows.cli.options import AsJson, Config, Digest, Home, KnownHome, Target
from flows.show.terminal import collected_tables, forecast_tables, pairs, reporter, show

app = typer.Typer()
anchor_app = typer.Typer(help="What rounds are tied to.", no_args_is_help=True)
review_app = typer.Typer(help="Candidates that wait for a person.", no_args_is_help=True)


@app.command()
def collect(target: Target = None, home: Home = None, as_json: AsJson = False) -> None:
    """Which rows the next round would train on, and what was set aside."""
    from flows.learn.collect import collect_rows
    from flows.service import Service

    service = Service.at(home)
    name = service.target(target).name
    collected = collect_rows(service, name, service.settings.learner.prompts)
    preview = collected.preview()
    show(preview, as_json, *collected_tables(preview))


@app.command()
def improve(
    target: Target = None,
    generations: Annotated[int | None, typer.Option(help="Generations of this round.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="A learner setting: alpha=0.02")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what it would cost: `plan`.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Learn: one round from the champion to a candidate. An interrupted round goes on."""
    from flows.commands.runs import improve_now

    settings = _changes(changes or [])
    if generations is not None:
        settings["generations"] = generations
    if dry_run:
        _plan(home, target, settings, None, as_json)
        return
    with reporter(as_json) as bars:
        document = improve_now(home, target, settings, bars)
    show(document, as_json, pairs("candidate", document))


@app.command()
def plan(
    target: Target = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="A learner setting: population=8")
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="Price of an hour of this machine.")
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """What a round would cost and what its gate could decide, measured on a few rows."""
    _plan(home, target, _changes(changes or []), price, as_json)


def _plan(
    home: Path | None,
    target: str | None,
    changes: Mapping[str, Any],
    price: float | None,
    as_json: bool,
) -> None:
    from flows.commands.runs import plan_now

    with reporter(as_json) as bars:
        planned = plan_now(home, target, changes, bars)
    if price is not None:
        planned["price"] = round(planned["minutes"] / 60 * price, 2)
    show(planned, as_json, *forecast_tables(planned))


@app.command()
def study(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in all, those done included.")] = 20,
    targets: Annotated[
        str, typer.Option(help="Tasks to train on in turn, with commas between.")
    ] = "gsm8k,proofwriter",
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="A learner setting: alpha=0.02")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture; default: study.png in the home.")
    ] = None,
    config: Config = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Many rounds in a home of its own, targets in turn; a killed study goes on.

    Without --config the embedded model learns in small rounds. Exit code 1 when at the end a task
    does not keep its margin against the anchor.
    """
    from flows.lab.study import StudyPlan, study_now
    from flows.show.report import study_tables

    plan = StudyPlan(rounds, tuple(filter(None, targets.split(","))), _changes(changes or []))
    with reporter(as_json) as bars:
        document = study_now(home, config, plan, plot, bars)
    show(document, as_json, *study_tables(document))
    raise typer.Exit(0 if document["within"] else 1)


def _changes(texts: list[str]) -> dict[str, Any]:
    """["alpha=0.02", "penalty=none"] as a mapping; values as JSON where they are JSON."""
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


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Option(help="anchor, champion, a digest's beginning, a directory, or a URL.")
    ] = "champion",
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", help="Tasks, by commas or repeated; all if none.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task.")] = None,
    twice: Annotated[bool, typer.Option(help="Ask twice; keep and print A/A discordance.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Folder for the samples as lm-evaluation-harness logs them.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="The name a URL knows the model by; else model.name.")
    ] = None,
    key_env: Annotated[
        str, typer.Option(help="The environment variable that holds a URL's key.")
    ] = "OPENAI_API_KEY",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy of any model on any tasks; rows that weights have answered are not asked again."""
    from flows.commands.measure import RemoteModel, evaluate_model
    from flows.show.report import summary_table

    names = [name for each in tasks or [] for name in each.split(",") if name]
    endpoint = RemoteModel(model_name, key_env)
    with reporter(as_json) as bars:
        document = evaluate_model(
            home, model, names, limit, bars, endpoint=endpoint, twice=twice, into=export
        )
    show(document, as_json, summary_table(document))


@app.command()
def rescore(
    table: Annotated[Path, typer.Argument(help="Samples, a parquet file of evaluate.")],
    out: Annotated[Path | None, typer.Option(help="Where the rescored table is written.")] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Judge old answers by the extraction of today, without a model; lists what changed."""
    from flows.commands.measure import rescore_table
    from flows.show.report import summary_table

    document = rescore_table(home, table, out)
    shown = summary_table(document | {"model": f"{table.name}, {len(document['changed'])} rows changed"})
    show(document, as_json, shown)


@app.command()
def promote(digest: Digest, home: KnownHome = None, as_json: AsJson = False) -> None:
    """Serve a candidate that passed the gate (or was approved, or served before)."""
    from flows.commands.runs import promote_now

    with reporter(as_json) as bars:
        document = promote_now(home, digest, bars)
    show(document, as_json, pairs("promoted", document))


@app.command()
def rollback(
    digest: Annotated[str, typer.Argument(help="A kept digest, or anchor, previous.")] = "previous",
    reason: Annotated[str, typer.Option(help="Why, for the ledger.")] = "by hand",
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """Serve an earlier version again."""
    from flows.commands.runs import rollback_now

    with reporter(as_json) as bars:
        document = rollback_now(home, digest, reason, bars)
    show(document, as_json, pairs("rolled back", document))


@review_app.command("approve")
def approve(
    digest: Digest,
    reason: Annotated[str, typer.Option(help="Why, for the ledger.")],
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """Approve exactly this digest; it is promoted next."""
    _review(home, digest, "approve", reason, as_json)


@review_app.command("reject")
def refuse(
    digest: Digest,
    reason: Annotated[str, typer.Option(help="Why, for the ledger.")],
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """Reject exactly this digest."""
    _review(home, digest, "reject", reason, as_json)


@anchor_app.command("move")
def move(
    digest: Digest,
    reason: Annotated[str, typer.Option(help="Why, for the ledger.")],
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """Tie later rounds to the champion (off unless review.allow_anchor_move is set)."""
    from flows.commands.runs import move_anchor_now

    with reporter(as_json) as bars:
        document = move_anchor_now(home, digest, reason, bars)
    show(document, as_json, pairs("anchor moved", document))


def _review(home: Path | None, digest: str, word: str, reason: str, as_json: bool) -> None:
    from flows.commands.runs import review_now

    with reporter(as_json) as bars:
        document = review_now(home, digest, word, reason, bars)
    show(document, as_json, pairs("review", document))
