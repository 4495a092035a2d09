"""Commands that measure how learning goes: many rounds, the paper's study, importance weights."""

from pathlib import Path
from typing import Annotated

import typer

from agent.errors import UserError
from flows.cli.options import AsJson, Config, Home, KnownHome, learner_changes
from flows.show.terminal import pairs, reporter, show

app = typer.Typer()
study_app = typer.Typer(invoke_without_command=True)


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

    plan = StudyPlan(
        rounds, tuple(filter(None, targets.split(","))), learner_changes(changes or [])
    )
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
    generations: Annotated[
        int | None, typer.Option(min=1, help="Of a trial. Default: 30; of a directory 500.")
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(min=1, help="Generations between measurements. Default: 10; 25."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Evaluation rows of a task. Default: 200; 2000.")
    ] = None,
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
    from flows.lab.paper.systems import SYSTEMS, lengths_of
    from flows.lab.paper.tracking import track
    from flows.lab.trials import results

    chosen = tuple(filter(None, (systems or ",".join(SYSTEMS)).split(",")))
    if not only_report:
        wanted = tuple(filter(None, targets.split(",")))
        usual = lengths_of(model)
        plan = PaperStudy(
            model, wanted, chosen, seeds,
            generations or usual.generations, every or usual.every, rows or usual.rows,
        )  # fmt: skip
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
