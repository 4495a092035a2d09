"""Commands that need no running service: score, gate, task check, embedded build."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from agent.errors import UserError
from flows.cli.options import AsJson, Home
from flows.show.terminal import check_lines, pairs, reporter, show

app = typer.Typer()
bench_app = typer.Typer(
    help="Benchmarks of the learner, the population, the gate and the endpoint.",
    no_args_is_help=True,
)
task_app = typer.Typer(help="Check tasks, your own included.", no_args_is_help=True)
embedded_app = typer.Typer(
    help="The small model that comes with the package.", no_args_is_help=True
)


@app.command()
def score(
    task: Annotated[str, typer.Argument(help="Name of a task, or path/to/file.py:TASK.")],
) -> None:
    """Score answers: {completion, example} a line on stdin, {reward, format, extracted} out."""
    from evaluators.plugins import load
    from evaluators.task import score_lines
    from evaluators.tasks import TASKS

    if task not in TASKS and ":" not in task:
        raise UserError(
            f"task {task!r} is not known; allowed: {', '.join(TASKS)}, path/to/file.py:TASK"
        )
    chosen = TASKS[task] if task in TASKS else load(task)
    for verdict in score_lines(chosen, sys.stdin):
        sys.stdout.write(json.dumps(verdict) + "\n")


@app.command()
def gate(
    anchor: Annotated[Path, typer.Option(help="Table of the anchor (parquet or JSONL).")],
    champion: Annotated[Path, typer.Option(help="Table of the champion.")],
    candidate: Annotated[Path, typer.Option(help="Table of the candidate.")],
    target: Annotated[str, typer.Option(help="The task that was trained.")],
    confirm_anchor: Annotated[Path | None, typer.Option(help="Anchor on the sealed rows.")] = None,
    confirm_champion: Annotated[
        Path | None, typer.Option(help="Champion on the sealed rows.")
    ] = None,
    confirm_candidate: Annotated[
        Path | None, typer.Option(help="Candidate on the sealed rows.")
    ] = None,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential", help="Judge by betting tests, which allow rows to be added later."
        ),
    ] = False,
    graded: Annotated[
        list[str] | None, typer.Option(help="A task with rewards between 0 and 1; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Apply the gate to tables of samples; needs no model and no service."""
    from agent.sections import GateSettings
    from evaluators.gate import GateRules
    from flows.commands.gate_files import gate_files
    from flows.show.report import gate_table

    document = gate_files(
        anchor,
        champion,
        candidate,
        target,
        settings=GateRules.of(GateSettings(sequential=sequential), graded=frozenset(graded or ())),
        confirm_anchor=confirm_anchor,
        confirm_champion=confirm_champion,
        confirm_candidate=confirm_candidate,
    )
    show(document, as_json, gate_table(document, target))


@app.command("certify")
def certify_command(
    model: Annotated[
        str | None, typer.Argument(help="embedded, a directory, a GGUF file or a hub id.")
    ] = None,
    all_tiny: Annotated[
        bool, typer.Option("--all-tiny", help="Tiny random models of every known family.")
    ] = False,
    family: Annotated[
        list[str] | None, typer.Option(help="A tiny random model of this family; repeatable.")
    ] = None,
    into: Annotated[
        Path | None, typer.Option(help="A document whose table of families is brought up to date.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare engines that are given other weights with cold starts on these weights."""
    from flows.lab.families import certify_model, certify_tiny, row, update_table

    if (model is None) == (not all_tiny and not family):
        raise UserError("certify: give a model, --all-tiny or --family")
    with reporter() as bars:
        if model is not None:
            key, certificate = certify_model(model, bars)
            lines = [
                f"{certificate.family}: {certificate.way}",
                *(check.text() for check in certificate.checks),
            ]
            show({key: certificate.to_json()}, as_json, *lines, *certificate.refused)
            return
        trials = {}
        for name, each in certify_tiny(family or [], bars):
            trials[name] = each
            if into is not None:  # at once: all of them take an hour
                update_table(into, {name: each})
    document = {name: [asdict(trial) for trial in each] for name, each in trials.items()}
    show(document, as_json, *(row(name, each) for name, each in trials.items()))


@task_app.command("check")
def check_task_command(
    spec: Annotated[str, typer.Argument(help="Name of a task, or path/to/file.py:TASK.")],
    limit: Annotated[int, typer.Option(min=1, help="Rows to check at most.")] = 100,
    model: Annotated[
        bool, typer.Option("--model", help="Also ask the home's base model these rows.")
    ] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Check a task on its rows: the gold answer scores 1, wrong and empty ones 0, keys are unique.

    Also that the verifier is bounded and gives the same verdict twice, and whether the gate can
    pass anything with its rows. One line for each kind of mistake, exit code 1 if there is one.
    For an own file: what its sandbox prevents here.
    """
    from flows.commands.task_check import check_task

    with reporter() as bars:
        document = check_task(spec, limit, home, model, bars)
    show(document, as_json, *check_lines(document))
    raise typer.Exit(1 if document["problems"] else 0)


@embedded_app.command("build")
def build_embedded(
    into: Annotated[Path, typer.Option("--out", help="Folder for the model.")],
    steps: Annotated[
        int | None, typer.Option(help="Training steps. Default: those of the model's card.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the data and the weights.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train the embedded model from random weights, measure it, and write its model card."""
    if into.exists() and not into.is_dir():
        raise UserError(f"--out {str(into)!r} is a file; allowed: a folder")
    from deploy.embedded.build import Recipe
    from flows.lab.embedded_model import make_embedded

    recipe = Recipe(seed=seed) if steps is None else Recipe(seed=seed, steps=steps)
    with reporter() as bars:
        advance = bars.track("training the embedded model", recipe.steps)
        built, scores = make_embedded(into, recipe, lambda step, _steps, _loss: advance(step))
    figures = {name: f"{100 * each.accuracy:.1f} % of {each.n}" for name, each in scores.items()}
    document = {
        "directory": str(built.directory),
        "parameters": built.parameters,
        "seconds": built.seconds,
        "accuracy": {name: each.accuracy for name, each in scores.items()},
    }
    show(document, as_json, pairs(f"{built.parameters:,} parameters in {into}", figures))


@bench_app.command("learner")
def bench_learner_command(
    size: Annotated[
        list[str] | None,
        typer.Option(help="Parameters: 1M, 50M or 500M (needs 6 GB). Default: all three."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the learner with the published recipe: speed, exactness, drift under pure noise."""
    from flows.lab.bench.learner import SIZES, bench_learner, tables

    with reporter() as bars:
        document = bench_learner(size or tuple(SIZES), progress=bars)
    show(document, as_json, *tables(document))


@bench_app.command("gate")
def bench_gate_command(
    draws: Annotated[
        int, typer.Option(min=100, help="Simulated candidates for each rate.")
    ] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the simulation.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the curves.")] = None,
    as_json: AsJson = False,
) -> None:
    """Simulate the gate: error rates and 300 rounds of drift. Exit code 1 over a bound."""
    from flows.lab.bench.gate import GateBench, bench_gate, plot_gate, table

    with reporter() as bars:
        document = bench_gate(GateBench(draws=draws, seed=seed), bars)
    if plot is not None:
        document["plot"] = str(plot_gate(document, plot))
    show(document, as_json, table(document))
    raise typer.Exit(0 if document["within"] else 1)


@bench_app.command("scaling")
def bench_scaling_command(
    member: Annotated[
        float, typer.Option(min=0, help="Seconds of a member, as `plan MODEL` prints them.")
    ] = 7.0,
    update: Annotated[
        float, typer.Option(min=0, help="Seconds of an update for each member.")
    ] = 0.015,
    mtbf: Annotated[
        float, typer.Option("--mtbf-hours", min=0.01, help="Hours until an engine breaks.")
    ] = 168.0,
    generations: Annotated[int, typer.Option(min=1, help="Generations of each point.")] = 100,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the curves.")] = None,
    as_json: AsJson = False,
) -> None:
    """Simulate a generation on 1 to 1,024 engines, some of which break, by the real schedule."""
    from flows.lab.bench.scaling import ScalingBench, bench_scaling, plot_scaling, scaling_table

    bench = ScalingBench(generations=generations, member_s=member, update_s=update, mtbf_hours=mtbf)
    with reporter() as bars:
        document = bench_scaling(bench, bars)
    if plot is not None:
        document["plot"] = str(plot_scaling(document["points"], plot))
    show(document, as_json, scaling_table(document))


@bench_app.command("learning")
def bench_learning_command(
    model: Annotated[str, typer.Option(help="As of `anchorage up --model`.")] = "smollm2",
    target: Annotated[
        list[str] | None,
        typer.Option(help="Task to learn; repeatable. Default: orders and dates."),
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(help="Recipe, 'ours' or 'published' among others; repeatable."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Paired seeds.")] = 3,
    answers: Annotated[int, typer.Option(min=1, help="Members' answers of a trial.")] = 8192,
    rows: Annotated[int, typer.Option(min=1, help="Evaluation rows of a task.")] = 400,
    config: Annotated[Path | None, typer.Option(help="TOML settings beside the recipes'.")] = None,
    work: Annotated[
        Path, typer.Option(help="Folder for homes; needed to go on after a kill.")
    ] = Path(".anchorage/learning"),
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = Path("learning"),
    only_report: Annotated[
        bool, typer.Option("--report", help="Compare the files that are there; run nothing.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG file: before and after.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare recipes of a round at equal answers with paired seeds; goes on after a kill."""
    from flows.lab.bench.learning import (
        EXTRACTION,
        LearningBench,
        bench_learning,
        learning_table,
        plot_learning,
        report,
    )

    targets, systems = tuple(target or EXTRACTION), tuple(system or ("ours", "published"))
    if only_report:
        document = report(out, model)
    else:
        with reporter() as bars:
            bench = LearningBench(model, targets, systems, seeds, answers, rows)
            document = bench_learning(bench, config, work, out, bars)
    if plot is not None and document["trials"]:
        document["plot"] = str(plot_learning(document, plot))
    show(document, as_json, learning_table(document))


@bench_app.command("population")
def bench_population_command(
    model: Annotated[str, typer.Option(help="As of `anchorage up --model`.")] = "embedded",
    target: Annotated[str, typer.Option(help="Task whose rows are asked.")] = "gsm8k",
    shots: Annotated[
        list[int] | None,
        typer.Option(help="Worked examples of a prompt; repeatable. Default: 0 and 2."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts a member.")] = 32,
    turns: Annotated[int, typer.Option(min=1, help="Turns of which medians are taken.")] = 5,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Plain vLLM compiles the model; the engine does not.")
    ] = False,
    busy: Annotated[
        int, typer.Option(min=0, help="Other processes that never wait, on the same cores.")
    ] = 0,
    config: Annotated[Path | None, typer.Option(help="TOML settings beside these.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure members of a population against plain vLLM. Exit code 1 under the bound."""
    from flows.lab.bench.population import PopulationBench, bench_population, population_table

    asked = tuple(shots or (0, 2))
    bench = PopulationBench(target, prompts, turns, shots=asked, compiled=compiled, busy=busy)
    with reporter() as bars:
        document = bench_population(bench, model, config, bars)
    show(document, as_json, population_table(document))
    raise typer.Exit(0 if document["within"] else 1)


@bench_app.command("endpoint")
def bench_endpoint_command(
    turns: Annotated[
        int, typer.Option(min=1, help="Bursts of each kind, to the gateway and to the engine.")
    ] = 6,
    requests: Annotated[int, typer.Option(min=4, help="Requests of a burst.")] = 64,
    swaps: Annotated[
        int, typer.Option(min=0, help="Swaps without load, and as many under load.")
    ] = 40,
    rollbacks: Annotated[
        int, typer.Option(min=0, help="Rollbacks in a running process, and as many by command.")
    ] = 5,
    as_json: AsJson = False,
) -> None:
    """Measure gateway against bare engine, swaps and rollbacks. Exit code 1 over a bound."""
    from flows.lab.bench.endpoint import EndpointBench, bench_endpoint, table

    with reporter() as bars:
        plan = EndpointBench(turns=turns, requests=requests, swaps=swaps, rollbacks=rollbacks)
        document = bench_endpoint(plan, bars)
    show(document, as_json, table(document))
    raise typer.Exit(0 if document["within"] else 1)
