"""The committed results are those of the page, and draw again in seconds."""

from pathlib import Path

from flows.lab.paper.figures import draw
from flows.lab.paper.report import markdown
from flows.lab.paper.study import KEYS
from flows.lab.trials import results

ROOT = Path(__file__).parents[4]
RESULTS = ROOT / "docs" / "results" / "paper"


def test_the_page_has_the_tables_and_claims_of_the_committed_results(tmp_path: Path) -> None:
    found = results(RESULTS, "embedded", KEYS)
    assert found
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    for line in markdown(found).splitlines():
        assert line.lstrip("# ") in page
    assert draw(found, tmp_path)["files"]


def test_the_committed_results_are_small() -> None:
    for path in RESULTS.glob("*.json"):
        assert path.stat().st_size < 200_000
