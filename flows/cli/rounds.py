"""Commands for rounds and versions: collect, improve, evaluate, promote, roll back, review."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from agent.errors import UserError
from flows.cli.options import AsJson, Config, Digest, Home, KnownHome, Name, Reason, Target
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
study_app = typer.Typer(invoke_without_command=True)
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

    settings = _changes(changes or [])
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
        _plan(home, target, _changes(changes or []), price, as_json)
        return
    from flows.learn.accelerators import Fleet, GpuRates, plan_model, with_stated, work_of

    fleet = Fleet(gpu, gpus, ranks, host)
    rates = with_stated(GpuRates(), rate or [])
    planned = plan_model(model, fleet, work_of(_changes(changes or [])), rates)
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


@study_app.callback()
def study(
    context: typer.Context,
    rounds: Annotated[
        int, typer.Option(min=1, help="Number of rounds, including finished ones.")
    ] = 20,
    targets: Annotated[
        str, typer.Option(help="Tasks to train on in turn, separated by commas.")
    ] = "gsm8k,proofwriter",
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Learner setting for this round, for instance alpha=0.02; repeatable."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG file for the curves. Default: study.png in the home.")
    ] = None,
    config: Config = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Run many rounds in one home, targets in turn; or, by its own command, the paper's study.

    A study that was interrupted goes on.

    Without --config the embedded model is trained in small rounds. Exit code 1 if at the end a
    task is not within its margin of the anchor.
    """
    if context.invoked_subcommand is not None:
        return
    from flows.lab.study import StudyPlan, study_now
    from flows.show.report import study_tables

    plan = StudyPlan(rounds, tuple(filter(None, targets.split(","))), _changes(changes or []))
    with reporter() as bars:
        document = study_now(home, config, plan, plot, bars)
    show(document, as_json, *study_tables(document))
    raise typer.Exit(0 if document["within"] else 1)


@study_app.command("paper")
def study_paper_command(
    model: Annotated[str, typer.Option(help="embedded, smollm2 or a directory.")] = "embedded",
    targets: Annotated[
        str, typer.Option(help="Tasks to train on, each in trials of its own, by commas.")
    ] = "gsm8k",
    systems: Annotated[
        str | None,
        typer.Option(help="Systems by commas, 'awd-l2@5' for another lambda. Default: all."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Paired seeds, from 1.")] = 3,
    generations: Annotated[int, typer.Option(min=1, help="Of a trial.")] = 60,
    every: Annotated[int, typer.Option(min=1, help="Generations between measurements.")] = 10,
    rows: Annotated[int, typer.Option(min=1, help="Evaluation rows of a task.")] = 200,
    config: Config = None,
    work: Annotated[
        Path, typer.Option(help="Folder of unfinished trials; needed to go on after a kill.")
    ] = Path(".anchorage/paper"),
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = Path("paper"),
    only_report: Annotated[
        bool, typer.Option("--report", help="Draw from the files that are there; run nothing.")
    ] = False,
    mlflow: Annotated[
        str | None, typer.Option(help="Tracking URI of an MLflow that gets curves and figures.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare ES, anchored ES, GRPO and fine-tuning as arXiv 2605.30148 does; goes on after a kill.

    Several processes may share one study.
    """
    from flows.lab.paper.figures import draw
    from flows.lab.paper.study import KEYS, PaperStudy, study_paper
    from flows.lab.paper.systems import SYSTEMS
    from flows.lab.paper.tracking import track
    from flows.lab.trials import results

    chosen = tuple(filter(None, (systems or ",".join(SYSTEMS)).split(",")))
    if not only_report:
        wanted = tuple(filter(None, targets.split(",")))
        plan = PaperStudy(model, wanted, chosen, seeds, generations, every, rows)
        with reporter() as bars:
            study_paper(plan, config, work, out, bars)
    found = results(out, model, KEYS)
    if not found:
        raise UserError(f"--out {str(out)!r}: has no result of {model!r}")
    document = draw(found, out / "report")
    if mlflow is not None:
        document["mlflow_run"] = track(found, out / "report", mlflow)
    show(document, as_json, (out / "report" / "study.md").read_text(encoding="utf-8"))


@app.command("importance")
def importance_command(
    tasks: Annotated[str, typer.Option(help="Tasks that are to be kept, by commas.")],
    method: Annotated[
        str, typer.Option(help="fisher, path (needs --run) or members (forward passes only).")
    ] = "fisher",
    into: Annotated[Path, typer.Option("--out", help="The safetensors file.")] = Path(
        "importance.safetensors"
    ),
    rows: Annotated[int, typer.Option(min=1, help="Evaluation rows of a task.")] = 32,
    run: Annotated[str | None, typer.Option(help="Round whose way 'path' measures.")] = None,
    largest: Annotated[float, typer.Option(min=1, help="Largest weight; their mean is 1.")] = 10.0,
    home: KnownHome = None,
    as_json: AsJson = False,
) -> None:
    """Estimate how much each parameter matters to tasks: the file that learner.importance reads."""
    from flows.commands.importance import METHODS, importance_now

    if method not in METHODS:
        raise UserError(f"--method {method!r}: allowed: {', '.join(METHODS)}")
    names = tuple(filter(None, tasks.split(",")))
    with reporter() as bars:
        document = importance_now(
            home, METHODS[method], names, into, bars, rows=rows, run=run, largest=largest
        )
    show(document, as_json, pairs(f"weights in {into}", document))


def _changes(texts: list[str]) -> dict[str, Any]:
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
