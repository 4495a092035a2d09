"""The command line: parses arguments, calls flows, prints tables or one JSON document."""

import os
import signal
import sys
import traceback
from typing import Annotated

import typer

from agent.errors import UserError
from flows.cli import offline, records, rounds, stack, studies
from flows.show.terminal import quiet_libraries, visible

app = typer.Typer(
    name="anchorage",
    help="Serve a language model and train it further by evolution strategies. A new version is "
    "promoted only if it is better on its target and no worse on prior tasks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for commands in (stack.app, rounds.app, studies.app, records.app, offline.app):
    app.add_typer(commands)
app.add_typer(offline.bench_app, name="bench")
app.add_typer(studies.study_app, name="study")
app.add_typer(rounds.review_app, name="review")
app.add_typer(rounds.anchor_app, name="anchor")
app.add_typer(offline.task_app, name="task")
app.add_typer(offline.embedded_app, name="embedded")
app.add_typer(records.key_app, name="key")
app.add_typer(stack.service_app, name="service")


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show tracebacks of errors.")] = False,
) -> None:
    """Options of every command."""
    os.environ["ANCHORAGE_VERBOSE"] = "1" if verbose else ""


def main() -> None:
    """Run a command. An error of the user's prints one line on stderr and exits with code 2.

    SIGTERM raises SystemExit in the command, so that what it started is stopped first.
    """
    quiet_libraries()
    signal.signal(signal.SIGTERM, _ended)
    try:
        code = app(standalone_mode=False)  # a command's typer.Exit comes back as its code
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        print("anchorage: interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except Exception as error:
        if os.environ.get("ANCHORAGE_VERBOSE"):
            traceback.print_exc()
        known = isinstance(error, UserError) or hasattr(error, "exit_code")
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        kind = "" if known else f"{type(error).__name__}: "
        hint = "" if known else " (--verbose shows where)"
        line = " ".join(f"{kind}{text}".split())
        print(visible(f"anchorage: {line}{hint}"), file=sys.stderr)  # noqa: T201
        sys.exit(2 if known else 1)


def _ended(*_: object) -> None:
    """Exit with 143; a second SIGTERM is ignored while the command stops what it started."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)
