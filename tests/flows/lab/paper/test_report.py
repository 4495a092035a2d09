"""The study's words follow from planted results, and every figure is drawn from them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.lab.paper.figures import draw
from flows.lab.paper.report import claims, lambda_rule, rows, spread, stopped

Result = dict[str, Any]


def planted(system: str, seed: int, aim: tuple[float, ...], prior: tuple[float, ...]) -> Result:
    """A trial with these accuracies at generations 0, 10, ..., and norms of a random walk."""
    curve = [
        {
            "generation": 10 * place,
            "tokens": 1000 * place,
            "accuracy": {"t": one, "p": two, "q": two},
            "kl": {"t": 0.1 * place, "p": 0.02 * place, "q": 0.04 * place},
            "selection": one,
        }
        for place, (one, two) in enumerate(zip(aim, prior, strict=True))
    ]
    last = 10 * (len(aim) - 1)
    return {
        "trial": {"model": "m", "target": "t", "system": system, "seed": seed},
        "settings": {"sizes": {"lam": 3.0}},
        "curve": curve,
        "norms": [[g, 1.01 * g**0.5, g**0.5, 0.9 * g**0.5, 0.5] for g in range(last + 1)],
        "tokens": curve[-1]["tokens"],
        "minutes": 1.0,
    }


def three(system: str, aim: tuple[float, ...], prior: tuple[float, ...]) -> list[Result]:
    return [planted(system, seed, tuple(a + 0.01 * seed for a in aim), prior) for seed in (1, 2, 3)]


ES = three("es", (0.4, 0.7, 0.6), (0.9, 0.7, 0.8))
ANCHORED = three("awd-l2", (0.4, 0.6, 0.69), (0.9, 0.88, 0.89))


def words(results: list[Result]) -> Mapping[str, str]:
    return {claim.claim: claim.word for claim in claims(results)}


def word(results: list[Result], part: str) -> str:
    (found,) = (said for claim, said in words(results).items() if part in claim)
    return found


def test_a_claim_is_seen_on_three_seeds_that_agree() -> None:
    assert word([*ES, *ANCHORED], "AWD (L2) keeps") == "seen"
    assert word([*ES, *ANCHORED], "the target does not suffer") == "seen"
    assert word([*ES, *ANCHORED], "rises again") == "seen"
    assert word([*ES, *ANCHORED], "stopped at the target's peak") == "not seen"


def test_one_seed_that_disagrees_is_enough_against_a_claim() -> None:
    worse = [*ANCHORED[:2], planted("awd-l2", 3, (0.4, 0.6, 0.5), (0.9, 0.7, 0.7))]
    assert word([*ES, *worse], "AWD (L2) keeps") == "not seen"
    assert word([*ES, *worse], "the target does not suffer") == "not seen"


def test_two_seeds_or_no_run_cannot_tell() -> None:
    assert word([*ES[:2], *ANCHORED], "AWD (L2) keeps") == "cannot tell"
    assert word(ES, "GRPO loses") == "cannot tell"


def test_a_closed_form_needs_one_seed() -> None:
    assert word(ES[:1], "Eq. 2") == "seen"
    assert word(ANCHORED[:1], "closed form") == "not seen"  # 1.01 / 0.9


def test_a_row_has_means_intervals_and_both_budgets() -> None:
    grpo = planted("grpo", 1, (0.4, 0.5, 0.6), (0.9, 0.9, 0.9))
    for place, point in enumerate(grpo["curve"]):
        point["tokens"] = 500 * place
    grpo["tokens"] = 1000
    by_system = {row["system"]: row for row in rows([*ES, grpo])}
    es = by_system["es"]
    assert es["on_target"]["mean"] == pytest.approx(0.62)
    assert es["on_target"]["low"] < 0.62 < es["on_target"]["high"]
    assert es["priors"]["mean"] == pytest.approx(0.8)
    assert es["walk"] == pytest.approx(1.01)
    assert es["at_tokens"] == {
        "tokens": 1000, "on_target": pytest.approx(0.72), "priors": pytest.approx(0.7),
    }  # fmt: skip
    assert by_system["grpo"]["on_target"]["low"] is None
    assert by_system["es-stopped"]["generations"] == [10, 10, 10]


def test_the_stop_is_the_first_best_of_the_rows_kept_apart() -> None:
    trial = planted("es", 1, (0.4, 0.7, 0.7), (0.9, 0.8, 0.7))
    assert stopped(trial)["generation"] == 10


def test_an_interval_of_two_seeds_is_none() -> None:
    assert spread([0.4, 0.6]).low is None
    three = spread([0.4, 0.5, 0.6])
    half = 4.30265 * 0.1 / 3**0.5  # t of two degrees of freedom, the standard error
    assert three.high == pytest.approx(0.5 + half, rel=1e-4)


def test_the_lambda_rule_takes_the_highest_that_keeps_the_target() -> None:
    high = three("awd-l2@9", (0.4, 0.5, 0.5), (0.9, 0.9, 0.9))
    assert lambda_rule([*ES, *ANCHORED, *high], "t") == (3.0, True)
    higher = three("awd-l2@27", (0.4, 0.4, 0.4), (0.9, 0.9, 0.9))
    assert lambda_rule([*ES, *high, *higher], "t") == (9.0, False)
    assert lambda_rule([*ES, *high], "t") is None
    assert lambda_rule(ES, "t") is None


def test_every_figure_and_table_is_written(tmp_path: Path) -> None:
    high = three("awd-l2@9", (0.4, 0.5, 0.5), (0.9, 0.9, 0.9))
    document = draw([*ES, *ANCHORED, *high], tmp_path)
    wanted = {f"t-{name}.png" for name in ("training", "priors", "kl", "norms", "lambda")}
    assert {*wanted, "study.md", "study.json", "measurements.parquet"} == set(document["files"])
    table = pq.read_table(tmp_path / "measurements.parquet")
    assert table.num_rows == 9 * 3 * 3  # trials, measurements, tasks
    assert "| awd-l2 | 1 2 3 | 71.0 (" in (tmp_path / "study.md").read_text()
