"""`bench learner`: the document it returns, at a size that takes a second."""

import json
from collections.abc import Callable
from io import StringIO

import pytest
import torch
from rich.console import Console

from agent.errors import UserError
from flows.lab.bench.learner import bench_learner, tables

pytestmark = pytest.mark.proof


@pytest.fixture(scope="module")
def document() -> dict[str, object]:
    return bench_learner(("1M",), threads=1, repeats=1, parameters=20_000, generations=60)


def test_the_document_has_what_the_issue_names_and_is_json(document: dict[str, dict]) -> None:
    json.dumps(document, allow_nan=False)
    assert set(document["ratio"]) == {"1M"}
    assert document["differing_weights"]["ours"] == 0
    for dtype in ("float32", "float16", "bfloat16"):
        assert document["differing_weights"][f"baseline_{dtype}"] > 0
    assert {(row["penalty"], row["arithmetic"]) for row in document["norms"]} == {
        (penalty, arithmetic)
        for penalty in ("none", "l2", "l1", "huber", "elastic_net")
        for arithmetic in ("exact", "in_place_float16", "in_place_bfloat16")
    }


def test_ratios_are_those_of_the_rates(document: dict[str, dict]) -> None:
    """One repeat: the median of ratios is the ratio of medians; a generation is the sum."""
    speed = document["speed"]["1M"]
    rates = speed["parameters_x_members_per_s"]
    for phase, ratio in speed["ratio"].items():
        assert ratio == pytest.approx(rates["ours"][phase] / rates["baseline"][phase])
        assert ratio > 0
    for who in ("ours", "baseline"):
        parts = [1 / rates[who][phase] for phase in ("render", "restore", "update")]
        assert 1 / rates[who]["generation"] == pytest.approx(sum(parts))
    assert document["ratio"]["1M"] == speed["ratio"]["noise_and_update"]
    for who in ("ours", "baseline"):
        parts = [1 / rates[who][phase] for phase in ("render", "update")]
        assert 1 / rates[who]["noise_and_update"] == pytest.approx(sum(parts))


def test_norms_in_exact_arithmetic_follow_the_prediction(document: dict[str, list]) -> None:
    exact = [row for row in document["norms"] if row["arithmetic"] == "exact"]
    assert len(exact) == 5
    for row in exact:
        assert row["measured"] == pytest.approx(row["closed_form"], rel=0.02)
    assert [row["prediction"] for row in exact] == ["closed form"] * 2 + ["density recursion"] * 3


def test_an_unknown_size_is_refused_and_torch_keeps_its_threads(
    document: dict[str, object],
) -> None:
    before = torch.get_num_threads()
    with pytest.raises(UserError, match="sizes 2M: some of 1M, 50M, 500M wanted"):
        bench_learner(("1M", "2M"))
    assert torch.get_num_threads() == before


class Told:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.total = 0
        self.done: list[int] = []

    def track(self, what: str, total: int) -> Callable[[int], None]:
        self.total = total
        return self.done.append

    def say(self, text: str) -> None:
        pass


def test_progress_is_told_and_reaches_its_end() -> None:
    told = Told()
    bench_learner(
        ("1M",), threads=1, repeats=2, parameters=2_000, generations=2, progress=told
    )  # fmt: skip
    assert told.total == 4
    assert told.done == [1, 2, 3, 4]


def test_the_tables_show_every_number_of_the_document(document: dict[str, dict]) -> None:
    console = Console(width=200, file=StringIO())
    for table in tables(document):
        console.print(table)
    shown = console.file.getvalue()
    for row in document["norms"]:
        assert f"{row['measured']:.4f}" in shown
    for who, count in document["differing_weights"].items():
        assert f"{count:,}" in shown, who
    assert f"noise + update (render and update): 1M {document['ratio']['1M']:.1f}x" in shown
