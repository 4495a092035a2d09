"""Documents say what is there: links, anchors and files exist, and every page is in the site."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from flows.cli import app
from flows.commands.settings import command_reference

ROOT = Path(__file__).parent.parent
SITE = ROOT / "docs" / "mkdocs.yml"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
ANCHOR = re.compile(r"\]\(([^)#\s]*)#([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HOUR = ROOT / "tests" / "integration" / "first_hour.sh"
NAMED = re.compile(r"`((?:agent|evaluators|deploy|flows|tests|docs)/[\w./-]*)`")
TRIPS = {"A generation": 14, "A streamed request": 18, "A promotion": 20}


def broken(document: Path, text: str) -> list[str]:
    """Links to files that are not there, and paths of the tree that are named and not there."""
    links = [each for each in LINK.findall(text) if "://" not in each]
    missing = [each for each in links if not (document.parent / each).exists()]
    return missing + [each for each in NAMED.findall(text) if not (ROOT / each).exists()]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts and the site make them."""
    plain = (
        re.sub(r"[^\w\- ]", "", each.lower()) for each in HEADING.findall(FENCED.sub("", text))
    )
    return {each.strip().replace(" ", "-") for each in plain}


def unanchored(document: Path, text: str) -> list[str]:
    """Links to headings that are not there."""
    return [
        f"{name}#{anchor}"
        for name, anchor in ANCHOR.findall(text)
        if "://" not in name
        and anchor not in anchors((document.parent / name).read_text("utf-8") if name else text)
    ]


def navigation(entries: list[Any]) -> Iterator[str]:
    """Pages of mkdocs' navigation, in its order."""
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from navigation(value) if isinstance(value, list) else [value]


def trips(text: str) -> dict[str, list[str]]:
    """The files of each trip of docs/architecture.md, in order."""
    section = text.split("## Three trips")[1].split("\n## ")[0]
    parts = section.split("### ")[1:]
    return {part.splitlines()[0]: LINK.findall(part) for part in parts}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert broken(document, text) == []
    assert unanchored(document, text) == []


def test_every_page_is_in_the_navigation_once() -> None:
    pages = list(navigation(yaml.safe_load(SITE.read_text("utf-8"))["nav"]))
    own = {path.relative_to(ROOT).as_posix() for path in (*DOCUMENTS, ROOT / "CHANGELOG.md")}
    assert sorted(pages) == sorted(own)


def test_the_reference_of_commands_is_current() -> None:
    written = (ROOT / "docs" / "commands.md").read_text("utf-8")
    program = typer.main.get_command(app)
    assert written == command_reference(program), "run: anchorage commands > docs/commands.md"


def test_the_quickstart_shows_the_commands_of_the_first_hours_script() -> None:
    """The pages' bash blocks, put together, are the script below its line."""
    shown = re.findall(
        r"^```bash\n(.*?)^```$", (ROOT / "docs/quickstart.md").read_text("utf-8"), re.M | re.S
    )
    script = HOUR.read_text("utf-8").split("-----\n", 1)[1]
    assert "".join(shown) == script


@pytest.mark.proof
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"):
        (tmp_path / "tree").mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree")
    for name in ("docs", "agent", "evaluators", "deploy", "flows"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name)
    shutil.copy(SITE, tmp_path)
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", "site"]
    subprocess.run(argv, cwd=tmp_path, check=True)
    assert (tmp_path / "site" / "docs" / "quickstart" / "index.html").is_file()


def test_a_broken_anchor_is_found() -> None:
    text = "# One: two\n\n```\n# no heading\n```\n[a](#one-two), [b](#no-heading)"
    assert unanchored(ROOT / "README.md", text) == ["#no-heading"]


def test_a_broken_link_and_a_missing_file_are_found() -> None:
    text = "[a](nowhere.md), `agent/nothing.py`, [b](README.md#x), `flows/learn/`"
    assert broken(ROOT / "README.md", text) == ["nowhere.md", "agent/nothing.py"]


def test_the_trips_are_short_and_no_file_is_passed_twice() -> None:
    found = trips((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    assert found.keys() == TRIPS.keys()
    for name, files in found.items():
        assert len(set(files)) == len(files) <= TRIPS[name], name
