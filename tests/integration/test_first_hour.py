"""The first hour of a new user, as a script on real parts, and what docs/quickstart.md shows of it.

The page has the script's commands in pieces, below each piece what it prints. The script is run
piece by piece; what was printed is the page's text but for numbers, times, digests and paths.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("first_hour.sh")
PAGE = ROOT / "docs" / "quickstart.md"
PIECE = re.compile(r"^```bash\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
MARK = "piece of the page:"
# What may differ between two runs, in this order, each as a pattern and what stands for it.
MASKS = (
    (r"(?<![\w:/.#<])(?:/[\w.-]+)+", "PATH"),
    (r"\b[0-9a-f]{8,64}\b", "#"),  # digests
    (r"[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?", "#"),
    (r"# (?:s|min|h)\b", "TIME"),
)
FRAME = re.compile(r"[│┃]|[─━┏┓┗┛┡┩┌┐└┘├┤┬┴┼┳┻╇╈]+")
PROGRESS = re.compile(r": #/# after TIME")  # as many lines as the machine is slow


def pieces() -> list[tuple[str, str]]:
    """Commands of the page, and what it says they print."""
    return PIECE.findall(PAGE.read_text(encoding="utf-8"))


def normal(text: str) -> str:
    """Lines without what may differ; tables without frames, which are as wide as a path in them.

    A cell that goes on in the next line is joined to it, since where it breaks depends on width;
    of a head of several lines the words are sorted.
    """
    lines, head = list[str](), list[str]()
    for line in text.splitlines():
        for pattern, mask in MASKS:
            line = re.sub(pattern, mask, line)
        words = FRAME.sub(" ", line).split()
        if line.startswith("┃"):
            head += words
        elif head:
            lines.append(" ".join(sorted(head)))
            head = []
        elif words and re.match(r"│\s+│", line):
            lines[-1] = " ".join((lines[-1], *words))
        elif words:
            lines.append(" ".join(words))
    return "\n".join(lines)


def steady(text: str) -> str:
    """The normal form without the lines that tell how far a piece of work is."""
    return "\n".join(line for line in normal(text).splitlines() if not PROGRESS.search(line))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("endpoint http://127.0.0.1:35993", "endpoint http://127.0.0.1:41001", True),
        ("│ served │ 3db1122b │", "│ served   │ eeebec26   │", True),
        ("┏━━━┓\n│ in /a/b.toml │", "┏━━━━━┓\n│ in /home/ann/c.toml │", True),
        ("  engine: ready after 46 s", "  engine: ready after 2 min", True),
        ("│ a │ one two │\n│   │ three │", "│ a │ one two three │", True),
        ("┃ a ┃ b ┃\n┃   ┃ c ┃\n┡━━━╇━━━┩", "┃ a ┃ b c ┃\n┡━━━╇━━━━━┩", True),
        ("│ 21.0 │ +73.5 (+66.7 .. +79.2) │", "│ 0.5 │ -3.5 (-6.7 .. +0.2) │", True),
        ("│ 2.18e-05 │ pass │", "│ 0.0144 │ pass │", True),
        ("│ stock │ pass │", "│ stock │ hold │", False),
        ("verdict: promote", "verdict: reject", False),
        ("passed, not served: `anchorage promote 3d1a`", "held, not served: few rows", False),
        ("│ mlflow │ running │", "│ mlflow │ starting │", False),
        ("│ faded │", "│ added │", False),
    ],
)
def test_the_normal_form_hides_numbers_times_digests_and_paths_alone(
    one: str, other: str, same: bool
) -> None:
    assert (normal(one) == normal(other)) is same


def test_every_command_of_the_page_that_prints_has_its_output() -> None:
    said = {commands: shown for commands, shown in pieces() if "anchorage " in commands}
    assert len(said) >= 5
    assert [commands for commands, shown in said.items() if not shown.strip()] == []
    for commands, shown in said.items():
        assert "\n...\n" not in f"\n{shown}", commands
    progress = [line for text in said.values() for line in normal(text).splitlines()]
    assert any(map(PROGRESS.search, progress))


def marked() -> Iterator[str]:
    """The script, with a line before the output of each piece."""
    yield SCRIPT.read_text(encoding="utf-8").split("-----\n", 1)[0] + "-----\n"
    for number, (commands, _) in enumerate(pieces()):
        yield f"echo '{MARK} {number}'\n{commands}"


@pytest.mark.integration
def test_the_first_hour_ends_in_a_promoted_version_of_an_own_task(
    tmp_path: Path, scale: Callable[[int, int], int]
) -> None:
    if scale(0, 1) == 0:
        pytest.skip("a stack and a whole round: in the soak; test_docs.py compares the commands")
    environment = {name: value for name, value in os.environ.items() if "ANCHORAGE_" not in name}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    transcript = tmp_path / "transcript.txt"
    place = tmp_path / "hour"
    place.mkdir()
    with transcript.open("w") as log:
        script = "".join(marked())
        done = subprocess.run(
            ["bash", "-c", script], cwd=place, env=environment, stdout=log, stderr=log
        )
    printed = transcript.read_text(encoding="utf-8")
    assert done.returncode == 0, printed[-2000:]
    answered = re.findall(r"^(\d+) of 96 right, answered by version (\w+)$", printed, re.M)
    (before, old), (after, new) = ((int(right), version) for right, version in answered)
    assert old != new
    assert after > before + 10
    outputs = re.split(rf"^{MARK} \d+\n", printed, flags=re.MULTILINE)[1:]
    for (commands, shown), output in zip(pieces(), outputs, strict=True):
        assert steady(output) == steady(shown), commands
