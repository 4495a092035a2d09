"""Fixtures every test may use: how long a proof runs, and where the real rows lie."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

Scale = Callable[[int, int], int]
WHOLE_FILE = re.compile(r"^pytestmark = .*pytest\.mark\.(proof|integration)\b", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file whose every test is left out by ``-m "not ..."`` is not imported either."""
    if collection_path.suffix != ".py" or "not " not in config.option.markexpr:
        return None
    mark = WHOLE_FILE.search(collection_path.read_text(encoding="utf-8"))
    return (mark is not None and f"not {mark[1]}" in config.option.markexpr) or None


@pytest.fixture(scope="session")
def scale() -> Scale:
    """``scale(small, full)``: the small count in ``make test``, the full one in ``make soak``."""
    soak = os.environ.get("ANCHORAGE_SOAK") == "1"
    return lambda small, full: full if soak else small


@pytest.fixture(scope="session")
def real_rows() -> Path | None:
    """The folder of real rows (``ANCHORAGE_TEST_DATA``), or None where a machine has none."""
    folder = os.environ.get("ANCHORAGE_TEST_DATA")
    return Path(folder) if folder and Path(folder).is_dir() else None
