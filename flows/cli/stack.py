"""Commands that start, stop and inspect the service."""

import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import AsJson, Config, Home
from flows.show.terminal import pairs, reporter, settings_tables, show, status_tables

if TYPE_CHECKING:  # a command imports what it needs
    from flows.service import Service

app = typer.Typer()
service_app = typer.Typer(help="The service under systemd.", no_args_is_help=True)


@app.command()
def demo(
    home: Home = None,
    model: Annotated[
        str, typer.Option(help="Another model than the embedded one, such as smollm2: 20 minutes.")
    ] = "embedded",
    as_json: AsJson = False,
) -> None:
    """Run the whole loop once: serve, train, judge, promote, reject, roll back. Takes minutes."""
    from flows.lab.demo import run_demo
    from flows.show.report import demo_tables

    with reporter() as bars:
        document = run_demo(home, bars, model)
    show(document, as_json, *demo_tables(document))


@app.command()
def up(
    home: Home = None,
    config: Config = None,
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id of the model to start from.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the endpoint; 0 chooses a free one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start the service; returns when the endpoint answers."""
    from flows.serve.stack import start

    with reporter() as bars:
        document = start(home, config, model, port, bars)
    tables = status_tables(document), settings_tables(document["settings"])
    show(document, as_json, *tables[0], *tables[1])


@app.command()
def down(home: Home = None, as_json: AsJson = False) -> None:
    """Stop all processes that `up` started."""
    from flows.serve.stack import stop

    document = stop(home)
    show(document, as_json, pairs("stopped", document))


@app.command()
def status(
    home: Home = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Live view of requests, latency, rewards, queue and swaps."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the processes, their addresses and the served version."""
    from flows.serve.stack import state

    if not watch:
        document = state(home)
        show(document, as_json, *status_tables(document))
        return
    from rich.live import Live

    from flows.show.terminal import console
    from flows.show.watch import views

    looks = views(home)
    with Live(next(looks), console=console(), screen=False) as live:
        for look in looks:
            live.update(look)


@app.command()
def doctor(home: Home = None, as_json: AsJson = False) -> None:
    """Check the machine, and every file and process of the home; exit code 1 for any fault."""
    from flows.commands.doctor import examine

    document = examine(home)
    rows = {
        each["check"]: f"ok: {each['found']}"
        if each["ok"]
        else f"WRONG: {each['found']}\nrepair: {each['repair']}"
        for each in document
    }
    show({"checks": document}, as_json, pairs("doctor", rows))
    raise typer.Exit(0 if all(each["ok"] for each in document) else 1)


@app.command()
def repair(home: Home = None, as_json: AsJson = False) -> None:
    """Repair what `doctor` finds, as far as what is left allows; exit code 1 for what remains."""
    from flows.commands.doctor import repair as repaired

    document = repaired(home)
    rows = {each["check"]: f"{each['done']}: {each['found']}" for each in document}
    show({"repairs": document}, as_json, pairs("repair", rows or {"nothing": "is wrong"}))
    raise typer.Exit(0 if all(each["ok"] for each in document) else 1)


@service_app.command("install")
def install_service(
    home: Home = None,
    system: Annotated[bool, typer.Option("--system", help="For all users; as root.")] = False,
    only_print: Annotated[bool, typer.Option("--print", help="Print the unit only.")] = False,
) -> None:
    """Write a systemd unit that keeps the service up, over crashes and restarts of the machine."""
    from flows.serve.stack import install, unit

    if only_print:
        print(unit(home, system), end="")  # noqa: T201
        return
    document = install(home, system)
    show(document, False, pairs("systemd", document))


@service_app.command("gateway", hidden=True)
def gateway_service(port: Annotated[int, typer.Option()], home: Home = None) -> None:
    """The gateway's process."""
    from flows.serve.gateway_process import run
    from flows.service import Service

    run(Service.at(home), port)


@service_app.command("flows", hidden=True)
def flows_service(home: Home = None) -> None:
    """The process that runs scheduled flows."""
    from flows.service import Service

    service = Service.at(home)
    _sign_in(service)
    from flows.deployments import serve_flows

    logging.getLogger("anchorage").setLevel(logging.INFO)  # Prefect's handler prints it
    serve_flows(service)


@service_app.command("run", hidden=True)
def run_service(name: str, run_id: str, home: Home = None) -> None:
    """The process of one scheduled run; its parameters are a JSON object on stdin."""
    from flows.service import Service

    _sign_in(Service.at(home))
    from flows.deployments import run_one

    run_one(name, run_id, json.load(sys.stdin))


def _sign_in(service: "Service") -> None:
    """Let Prefect's client sign in; it reads the variables when Prefect is imported.

    A URL of the settings counts also where `up` did not start this process, as in a container.
    """
    from deploy.consoles import credentials

    plan = service.settings.projection
    os.environ.update(credentials(service.home, plan.consoles))
    if plan.prefect_api_url:
        os.environ["PREFECT_API_URL"] = plan.prefect_api_url
