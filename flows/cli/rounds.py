"""Commands for rounds and versions: collect, improve, evaluate, promote, roll back, review."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.options import (
    AsJson,
    Digest,
    Home,
    KnownHome,
    Name,
    Reason,
    Target,
    learner_changes,
)
from flows.show.terminal import (
    collected_tables,
    forecast_tables,
    model_plan_tables,
    pairs,
    reporter,
    show,
)

app = typer.Typer()
anchor_app = typer.Typer(help="The model that rounds are tied to.", no_args_is_help=True)
review_app = typer.Typer(help="Candidates that wait for approval.", no_args_is_help=True)


@app.command()
def collect(target: Target = None, home: Home = None, as_json: AsJson = False) -> None:
    """Show which rows the next round would train on and which were set aside."""
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
    generations: Annotated[
        int | None, typer.Option(help="Number of generations. Default: learner.generations.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Learner setting for this round, for instance alpha=0.02; repeatable."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what it would cost: `plan`.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Learn: one round from the champion to a candidate. An interrupted round goes on."""
    from flows.commands.runs import improve_now

    settings = learner_changes(changes or [])
    if generations is not None:
        settings["generations"] = generations
    if dry_run:
        _plan(home, target, settings, None, as_json)
        return
    from flows.show.report import round_table

    with reporter() as bars:
        document = improve_now(home, target, settings, bars)
    show(document, as_json, round_table(document), document["next"])


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A published model's name, config.json, directory or hub id to plan for GPUs. "
            "Default: the home's model on this machine, measured."
        ),
    ] = None,
    target: Target = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Learner setting for this round, for instance population=8; repeatable."
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(
            min=0, help="Price of an hour of this machine, to print the price of the round."
        ),
    ] = None,
    gpu: Annotated[str, typer.Option(help="Kind of GPU of a MODEL's plan: h100 or h200.")] = "h100",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of that node.")] = 1,
    ranks: Annotated[
        int, typer.Option("--tensor-parallel", min=1, help="GPUs of each engine.")
    ] = 1,
    host: Annotated[float, typer.Option("--host-memory", help="GiB of that node.")] = 2048.0,
    rate: Annotated[
        list[str] | None,
        typer.Option(help="A rate, such as normals_s=2e11, or the JSON of `make gpu`; repeatable."),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Forecast a round's cost and what its gate can decide, measured on a few rows.

    With MODEL: whether it fits GPUs that need not be here, what crosses their bus, and seconds of
    a member, a generation and a round, from rates that are assumed until they are stated.
    """
    if model is None:
        _plan(home, target, learner_changes(changes or []), price, as_json)
        return
    from flows.learn.accelerators import Fleet, GpuRates, plan_model, with_stated, work_of

    fleet = Fleet(gpu, gpus, ranks, host)
    rates = with_stated(GpuRates(), rate or [])
    planned = plan_model(model, fleet, work_of(learner_changes(changes or [])), rates)
    show(planned, as_json, *model_plan_tables(planned))
    raise typer.Exit(1 if "refused" in planned else 0)


def _plan(
    home: Path | None,
    target: str | None,
    changes: Mapping[str, Any],
    price: float | None,
    as_json: bool,
) -> None:
    from flows.commands.runs import plan_now

    with reporter() as bars:
        planned = plan_now(home, target, changes, bars)
    if price is not None:
        planned["price"] = round(planned["minutes"] / 60 * price, 2)
    show(planned, as_json, *forecast_tables(planned))


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Option(help="anchor, champion, first characters of a digest, a directory, or a URL."),
    ] = "champion",
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", help="Tasks, separated by commas or repeated. Default: all."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows per task at most.")] = None,
    twice: Annotated[
        bool, typer.Option(help="Evaluate twice and report how many verdicts differ.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option(help="Folder for samples in lm-evaluation-harness's format.")
    ] = None,
    control: Annotated[
        int | None,
        typer.Option(help="Seed: also measure a walk of as many equal steps that no reward chose."),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="Model name for requests to a URL. Default: model.name.")
    ] = None,
    key_env: Annotated[
        str, typer.Option(help="Environment variable with the API key for a URL.")
    ] = "OPENAI_API_KEY",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model's accuracy on tasks. Stored answers of the same weights are reused."""
    from flows.commands.measure import RemoteModel, evaluate_model
    from flows.show.report import measured_lines, summary_table

    names = [name for each in tasks or [] for name in each.split(",") if name]
    endpoint = RemoteModel(model_name, key_env)
    with reporter() as bars:
        document = evaluate_model(
            home,
            model,
            names,
            limit,
            bars,
            endpoint=endpoint,
            twice=twice,
            into=export,
            control=control,
        )
    beside = [summary_table(document["control"])] if control is not None else []
    show(document, as_json, summary_table(document), *beside, *measured_lines(document))


@app.command()
def rescore(
    table: Annotated[Path, typer.Argument(help="Parquet file written by evaluate.")],
    out: Annotated[Path | None, typer.Option(help="File for the rescored table.")] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Score stored answers with the current extraction, without a model; list what changed."""
    from flows.commands.measure import rescore_table
    from flows.show.report import summary_table

    document = rescore_table(home, table, out)
    shown = summary_table(
        document | {"model": f"{table.name}, {len(document['changed'])} rows changed"}
    )
    show(document, as_json, shown)


@app.command()
def promote(digest: Digest, home: KnownHome = None, as_json: AsJson = False) -> None:
    """Serve a version: a candidate that passed the gate or was approved, or one served before."""
    from flows.commands.runs import promote_now

    with reporter() as bars:
        document = promote_now(home, digest, bars)
    _end(document, "promoted", as_json)


@app.command()
def rollback(
    digest: Annotated[
        str, typer.Argument(help="First characters of a kept digest, or anchor or previous.")
    ] = "previous",
    reason: Annotated[str, typer.Option(help="Reason, recorded in the ledger.")] = "by hand",
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """Serve an earlier version again."""
    from flows.commands.runs import rollback_now

    with reporter() as bars:
        document = rollback_now(home, digest, reason, bars)
    _end(document, "rolled back", as_json)


@review_app.command("list")
def waiting(home: KnownHome = None, as_json: AsJson = False) -> None:
    """List candidates that wait for a person, each with its gain and what to do."""
    from flows.commands.runs import waiting_now
    from flows.show.terminal import waiting_table

    document = waiting_now(home)
    show(document, as_json, waiting_table(document) if document else "no candidate waits")


@review_app.command("approve")
def approve(
    digest: Digest,
    reason: Reason,
    name: Name = None,
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """Approve a waiting candidate; it is promoted next."""
    _review(home, digest, "approve", reason, name, as_json)


@review_app.command("reject")
def refuse(
    digest: Digest,
    reason: Reason,
    name: Name = None,
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """Reject a waiting candidate."""
    _review(home, digest, "reject", reason, name, as_json)


@anchor_app.command("move")
def move(digest: Digest, reason: Reason, home: KnownHome = None, as_json: AsJson = False) -> None:
    """Make the champion the anchor of later rounds (needs review.allow_anchor_move)."""
    from flows.commands.runs import move_anchor_now

    with reporter() as bars:
        document = move_anchor_now(home, digest, reason, bars)
    show(document, as_json, pairs("anchor moved", document))


def _review(
    home: Path | None, digest: str, word: str, reason: str, name: str | None, as_json: bool
) -> None:
    from flows.commands.runs import review_now

    with reporter() as bars:
        document = review_now(home, digest, word, reason, bars, name)
    _end(document, {"approve": "approved", "reject": "rejected"}[word], as_json)


def _end(outcome: Mapping[str, Any], act: str, as_json: bool) -> None:
    """Show what became of a version; exit code 1 where it is not what was asked for."""
    title = act if outcome["done"] else f"NOT {act}: {outcome['reason']}"
    show(outcome, as_json, pairs(title, outcome))
    raise typer.Exit(0 if outcome["done"] else 1)
