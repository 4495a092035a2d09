"""Commands that start, stop and look at the stack, and its processes."""

from typing import Annotated

import typer

from flows.cli.options import AsJson, Config, Home
from flows.show.terminal import pairs, reporter, show, status_table

app = typer.Typer()
service_app = typer.Typer(help="Processes of the stack (started by `up`).")


@app.command()
def demo(home: Home = None, as_json: AsJson = False) -> None:
    """The whole loop in one go: serve, learn, judge, promote, reject, roll back. Minutes."""
    from flows.lab.demo import run_demo
    from flows.show.report import demo_tables

    with reporter(as_json) as bars:
        document = run_demo(home, bars)
    show(document, as_json, *demo_tables(document))


@app.command()
def up(
    home: Home = None,
    config: Config = None,
    model: Annotated[str | None, typer.Option(help="Directory or hub id of the anchor.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the endpoint; 0: a free one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Start the service; returns when the endpoint answers."""
    from flows.serve.stack import start

    with reporter(as_json) as bars:
        document = start(home, config, model, port, bars)
    show(document, as_json, status_table(document))


@app.command()
def down(home: Home = None, as_json: AsJson = False) -> None:
    """Stop everything that `up` started; nothing is left running."""
    from flows.serve.stack import stop

    document = stop(home)
    show(document, as_json, pairs("stopped", document))


@app.command()
def status(
    home: Home = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="A live view: requests, latency, rewards, queue, swaps.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What runs, where, and which version is served."""
    from flows.serve.stack import state

    if not watch:
        document = state(home)
        show(document, as_json, status_table(document))
        return
    from rich.live import Live

    from flows.show.progress import console
    from flows.show.watch import views

    looks = views(home)
    with Live(next(looks), console=console(), screen=False) as live:
        for look in looks:
            live.update(look)


@app.command()
def doctor(home: Home = None, as_json: AsJson = False) -> None:
    """Check the machine, the home and the hash chains; exit code 1 when something is wrong."""
    from flows.commands.doctor import examine

    document = examine(home)
    rows = {
        each["check"]: ("ok: " if each["ok"] else "WRONG: ") + each["found"] for each in document
    }
    show({"checks": document}, as_json, pairs("doctor", rows))
    raise typer.Exit(0 if all(each["ok"] for each in document) else 1)


@service_app.command("gateway")
def gateway_service(port: Annotated[int, typer.Option()], home: Home = None) -> None:
    """The gateway's process."""
    from flows.serve.gateway_process import run
    from flows.service import Service

    run(Service.at(home), port)


@service_app.command("flows")
def flows_service(home: Home = None) -> None:
    """The process that runs scheduled flows."""
    from flows.deployments import serve_flows
    from flows.service import Service

    serve_flows(Service.at(home))
