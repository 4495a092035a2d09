"""Documents say what is there: links and files exist, the trips through the code stay short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
NAMED = re.compile(r"`((?:agent|evaluators|deploy|flows|tests|docs)/[\w./-]*)`")
TRIPS = {"A generation": 14, "A streamed request": 18, "A promotion": 20}


def broken(document: Path, text: str) -> list[str]:
    """Links to files that are not there, and paths of the tree that are named and not there."""
    links = [each for each in LINK.findall(text) if "://" not in each]
    missing = [each for each in links if not (document.parent / each).exists()]
    return missing + [each for each in NAMED.findall(text) if not (ROOT / each).exists()]


def trips(text: str) -> dict[str, list[str]]:
    """The files of each trip of docs/architecture.md, in order."""
    section = text.split("## Three trips")[1].split("\n## ")[0]
    parts = section.split("### ")[1:]
    return {part.splitlines()[0]: LINK.findall(part) for part in parts}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_exists(document: Path) -> None:
    assert broken(document, document.read_text(encoding="utf-8")) == []


def test_a_broken_link_and_a_missing_file_are_found() -> None:
    text = "[a](nowhere.md), `agent/nothing.py`, [b](README.md#x), `flows/learn/`"
    assert broken(ROOT / "README.md", text) == ["nowhere.md", "agent/nothing.py"]


def test_the_trips_are_short_and_no_file_is_passed_twice() -> None:
    found = trips((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    assert found.keys() == TRIPS.keys()
    for name, files in found.items():
        assert len(set(files)) == len(files) <= TRIPS[name], name
