"""The table of families: rows from trials, kept where a family was not tried again."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from agent.errors import UserError
from agent.population.certify import Certificate, WayCheck
from agent.store.anchor import Anchor
from flows.lab.families import (
    END_MARK,
    FAMILIES,
    START_MARK,
    Trial,
    certify_tiny,
    make_tiny,
    row,
    update_table,
)
from flows.show.terminal import Silent, show

WHATS = ("member", "theta", "load", "reload")
SOUND = tuple(WayCheck(what, 0.0, 12, 12) for what in WHATS)


def trial(checks: tuple[WayCheck, ...] = SOUND, way: str = "short") -> Trial:
    return Trial(True, "float32", Certificate("X", way, 0.0, checks))  # type: ignore[arg-type]


def test_a_row_counts_what_equals_a_cold_start() -> None:
    stale = (WayCheck("member", 0.2, 12, 12), WayCheck("theta", 0.0, 11, 12), *SOUND[2:])
    refused = Trial(True, "bfloat16", None, "engine: a|b")
    assert row("gemma2", [trial(), trial()]).split(" | ")[2:8] == [
        "yes", "yes", "2 of 2", "2 of 2", "2 of 2", "short",
    ]  # fmt: skip
    assert row("gemma2", [trial(), trial(stale, "fresh")]).split(" | ")[3:8] == [
        "1 of 2", "1 of 2", "2 of 2", "2 of 2", "fresh, short",
    ]  # fmt: skip
    assert "0 of 1 | 0 of 1 | 0 of 1 | 0 of 1 | tied bfloat16: engine: a/b" in row(
        "gemma2", [refused]
    )


def test_rows_of_other_families_stay(tmp_path: Path) -> None:
    document = tmp_path / "models.md"
    document.write_text(f"Before.\n{START_MARK}\n{END_MARK}\nAfter.\n")
    update_table(document, {"qwen3_moe": [trial(way="long")], "llama": [trial()]})
    update_table(document, {"llama": [trial(), trial()]})
    lines = document.read_text().splitlines()
    names = [line.split(" | ")[0] for line in lines if line.startswith("| ")]
    assert names == ["| Family", "| llama", "| qwen3_moe"]
    assert row("llama", [trial(), trial()]) in lines
    assert row("qwen3_moe", [trial(way="long")]) in lines
    assert (lines[0], lines[-1]) == ("Before.", "After.")
    document.write_text("nothing")
    with pytest.raises(UserError, match=r"models\.md: <!-- families --> .* is missing"):
        update_table(document, {})


def test_what_is_not_listed_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="family 'lama': allowed: llama"):
        list(certify_tiny(["lama"], Silent()))
    with pytest.raises(UserError, match="'gemma2': tied False, allowed: True"):
        make_tiny(tmp_path, "gemma2", tied=False)


def test_trials_of_an_engine_that_broke_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    broken = trial((WayCheck("member", math.inf, 0, 12, "broken"), *SOUND[1:]), "fresh")
    show({"gpt_oss": [asdict(broken)]}, True)
    document = json.loads(capsys.readouterr().out)
    assert document["gpt_oss"][0]["certificate"]["checks"][0]["difference"] is None


@pytest.mark.proof
@pytest.mark.parametrize("name", FAMILIES)
def test_anchors_of_every_family_open(name: str, tmp_path: Path) -> None:
    """As transformers saves them: tied or not, and the text part of those that see."""
    for tied in FAMILIES[name].ties:
        anchor = Anchor.open(make_tiny(tmp_path / str(tied), name, tied=tied, dtype=torch.bfloat16))
        assert bool(anchor.tied) == tied
        assert bool(anchor.fixed) == bool(FAMILIES[name].text)
        assert 50_000 < anchor.learnable < 600_000
