"""Benchmarks of the learner, the gate and the endpoint."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import AsJson
from flows.show.terminal import reporter, show

app = typer.Typer(
    help="Benchmarks of the learner, the gate and the endpoint.", no_args_is_help=True
)


@app.command()
def learner(
    size: Annotated[
        list[str] | None,
        typer.Option(help="Parameters: 1M, 50M or 500M (needs 6 GB). Default: all three."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the learner with the published recipe: speed, exactness, drift under pure noise."""
    from flows.lab.bench.learner import SIZES, bench_learner, tables

    with reporter(as_json) as bars:
        document = bench_learner(size or tuple(SIZES), progress=bars)
    show(document, as_json, *tables(document))


@app.command()
def gate(
    draws: Annotated[
        int, typer.Option(min=100, help="Simulated candidates for each rate.")
    ] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the simulation.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the curves.")] = None,
    as_json: AsJson = False,
) -> None:
    """Simulate the gate: error rates and 300 rounds of drift. Exit code 1 over a bound."""
    from flows.lab.bench.gate import GateBench, bench_gate, plot_gate, table

    with reporter(as_json) as bars:
        document = bench_gate(GateBench(draws=draws, seed=seed), bars)
    if plot is not None:
        document["plot"] = str(plot_gate(document, plot))
    show(document, as_json, table(document))
    raise typer.Exit(0 if document["within"] else 1)


@app.command()
def endpoint(
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

    with reporter(as_json) as bars:
        plan = EndpointBench(turns=turns, requests=requests, swaps=swaps, rollbacks=rollbacks)
        document = bench_endpoint(plan, bars)
    show(document, as_json, table(document))
    raise typer.Exit(0 if document["within"] else 1)
