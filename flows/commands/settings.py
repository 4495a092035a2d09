"""Settings and commands in words: those of a home as TOML, the references of all as Markdown."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from agent.config import PROFILES, Settings
from agent.errors import masked
from agent.sections import PromptSettings
from flows.service import Service

BOUNDS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}

HEAD = """\
# Settings

Made by `anchorage settings --markdown > docs/settings.md`; a test checks that it is current.

Settings are read once per process. Order of authority: options of a command, environment
variables, `anchorage.toml` in the working directory (or the file that `--config` names), the
profile of the model, the defaults below. An unknown key, an unknown `ANCHORAGE_` variable, a task
that does not exist or a value out of range ends a command with one line.

A home keeps what it was started with; `anchorage settings` prints it, and a command names what file
and environment say differently. `anchorage up` reads all again: the file that the last `up` read
(or `--config`, or `anchorage.toml`), the environment, and the options of earlier `up`s where
nothing else is said. It shows what changed and takes it; another model than the home began with is
refused.

A key `key` of the section `section` is written

    [section]
    key = value

in the file and `ANCHORAGE_SECTION__KEY=value` in the environment, for instance
`ANCHORAGE_LEARNER__SIGMA=0.002`; lists and tables are written as JSON there. Names that end in `_s`
are seconds.
"""


def effective(root: Path | None, config: Path | None) -> dict[str, Any]:
    """The settings that hold in a home, as plain values; a password in a URL is masked."""
    settings = Service.at(root, config).settings.model_dump(mode="json")
    for section, key in (("gateway", "experience_url"), ("state", "url")):
        settings[section][key] = settings[section][key] and masked(settings[section][key])
    return settings


def to_toml(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Plain values as a settings file that reads back as the same; unset keys are comments."""
    lines = []
    for section, values in settings.items():
        lines.append(f"[{section}]")
        lines += [
            f"# {key} is not set" if value is None else f"{key} = {literal(value)}"
            for key, value in values.items()
        ]
        lines.append("")
    return "\n".join(lines).rstrip()


def literal(value: Any) -> str:
    """A plain value as TOML writes it; keys of a table that are None are left out."""
    if isinstance(value, Mapping):
        pairs = [f"{json.dumps(k)} = {literal(v)}" for k, v in value.items() if v is not None]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(literal(each) for each in value) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def reference() -> str:
    """Every setting in Markdown: key, type, default, allowed values and what it is for."""
    sections: list[str] = [HEAD]
    for name, field in Settings.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        sections.append(f"## {name}\n\n{section.__doc__}\n\n{_table(section)}")
        if name == "tasks":
            prompts = f"{PromptSettings.__doc__}\n\n{_table(PromptSettings)}"
            sections.append(f"### tasks.prompts.TASK\n\n{prompts}")
    return "\n".join([*sections, _profiles()])


COMMANDS_HEAD = """\
# Commands

Made by `anchorage commands > docs/commands.md`; a test checks that it is current.

`anchorage --verbose COMMAND` shows tracebacks of errors. Exit codes: 0 done, 1 not done or a check
that found something, 2 an error of the input (one line on stderr), 130 and 143 interrupted.
Progress goes to stderr; `--json` leaves stdout to one JSON document.
"""


def command_reference(program: Any) -> str:
    """Every command in Markdown, from typer's own tree: what it does, arguments, options.

    Args:
        program: The root command: ``name``, ``commands``, and of each ``help`` and ``params``.
    """
    sections = (
        f"## {name}\n\n{_paragraphs(command.help)}\n\n{_parameters(command.params)}".rstrip()
        for name, command in _leaves(program, "anchorage")
    )
    return "\n\n".join([COMMANDS_HEAD.rstrip(), *sections]) + "\n"


def _leaves(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Commands that do something and are not hidden, with their whole name, in the help's order."""
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            if command.invoke_without_command:  # a group that is a command of its own, too
                yield f"{name} {word}", command
            yield from _leaves(command, f"{name} {word}")
        elif not command.hidden:
            yield f"{name} {word}", command


def _paragraphs(text: str) -> str:
    """A docstring's paragraphs, each on one line."""
    return "\n\n".join(" ".join(each.split()) for each in text.split("\n\n")).replace("<", r"\<")


def _parameters(parameters: Iterable[Any]) -> str:
    rows = []
    for each in parameters:
        value = "" if getattr(each, "is_flag", False) else f" {each.name.upper()}"
        names = [f"`{name}{value}`" for name in (*each.opts, *each.secondary_opts)]
        shown = ", ".join(names) if each.opts[0].startswith("-") else f"`{each.name.upper()}`"
        default = "" if each.default in (None, False) else f"`{each.default}`"
        rows.append((shown, "required" if each.required else default, each.help or ""))
    return _markdown(("argument or option", "default", "what it is for"), rows) if rows else ""


def _table(section: type[BaseModel]) -> str:
    rows = (
        (f"`{key}`", _type(field.annotation), _default(field), _allowed(field), field.description)
        for key, field in section.model_fields.items()
    )
    return _markdown(("key", "type", "default", "allowed", "what it is for"), rows)


def _profiles() -> str:
    """What the profiles of small models put in place of the defaults."""
    keys = list(
        dict.fromkeys(
            (section, key)
            for profile in PROFILES.values()
            for section, values in profile.items()
            for key in values
        )
    )

    def value(profile: Mapping[str, Any], section: str, key: str) -> str:
        values = profile.get(section, {})
        return f"`{literal(values[key])}`" if key in values else ""

    rows = (
        (f"`{section}.{key}`", *(value(each, section, key) for each in PROFILES.values()))
        for section, key in keys
    )
    names = [f"`{name}`" for name in PROFILES]
    text = "A model that `model.path` calls by one of these names has other defaults:"
    return f"## Profiles\n\n{text}\n\n{_markdown(('key', *names), rows)}"


def _markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table; what would end a cell or begin a tag is escaped."""
    marks = str.maketrans({"|": r"\|", "<": r"\<"})
    cells = [list(head), *([str(cell).translate(marks) for cell in row] for row in rows)]
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in cells) + "\n"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "not set" if value is None else f"`{literal(value)}`"


def _type(annotation: Any) -> str:
    """A type in words: float, list of str, table of float; None is left out."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if origin in (Union, UnionType):
        return " or ".join(_type(each) for each in inner if each is not NoneType)
    if origin is Literal:
        return "str"
    if origin is tuple:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"table of {_type(inner[1])}"
    words = {Path: "path", PromptSettings: "table"}
    return str(words.get(annotation) or annotation.__name__)


def _allowed(field: FieldInfo) -> str:
    """The values of a choice, else the bounds of a number, also of the numbers in a table."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{literal(each)}`" for each in get_args(field.annotation))
    return ", ".join(_bounds([*field.metadata, *_inner(field.annotation)]))


def _inner(annotation: Any) -> Iterator[Any]:
    for each in get_args(annotation):
        if get_origin(each) is Annotated:
            for note in get_args(each)[1:]:
                yield from note.metadata if isinstance(note, FieldInfo) else [note]


def _bounds(notes: Iterable[Any]) -> Iterator[str]:
    for note in notes:
        if type(note) in BOUNDS:
            attribute, words = BOUNDS[type(note)]
            yield f"{words} {getattr(note, attribute)}"
