"""The gate's operating characteristics: kept bounds, and a simulation of the real decision."""

import json
from dataclasses import replace

import numpy as np
import pytest

from evaluators.gate import GateRules, Sample, Tables, decide
from flows.lab.bench.gate import (
    SETTINGS,
    GateBench,
    bench_gate,
    lost_and_won,
    plot_gate,
    priors_pass,
    priors_reject,
    target_passes,
)

pytestmark = pytest.mark.proof

SMALL = GateBench(draws=400, rows=(500,), rounds=20, chains=5)


def test_the_gate_keeps_what_it_promises(scale):
    """20,000 draws and 300 rounds in full; false promotion, false rejection, drift."""
    sizes = (500, 1000, 2000)[:: scale(2, 1)]
    bench = GateBench(draws=scale(4000, 20000), chains=scale(20, 200), rows=sizes)
    result = bench_gate(bench)
    broken = [figure for figure in result["figures"] if figure["within"] is False]
    assert broken == []
    promised = [figure for figure in result["figures"] if figure["bound"] is not None]
    assert {figure["bound"] for figure in promised} == {0.025, 0.002, 0.01, 1.1}
    final = {
        (line["n"], line["against"], line["confirmed"]): line["points"][-1]
        for line in result["drift"]
    }
    for n in bench.rows:
        assert final[n, "champion", True] > 3 * final[n, "anchor", True]
        assert final[n, "anchor", True] <= final[n, "anchor", False]
    rates = {figure["name"]: figure["rate"] for figure in result["figures"] if figure["n"] == 2000}
    assert rates["target: gain of 5 points found"] > 0.95
    assert rates["unchanged candidate, 2 % discordant: priors pass, confirmed"] > 0.99


def test_the_simulated_decision_is_the_gates_own():
    rng = np.random.default_rng(2)
    n, tasks, seen = 150, ("one", "two", "three"), set()
    for loss in np.repeat([0.0, 0.03, 0.06, 0.12], 12):
        b, c = lost_and_won(rng, n, np.full(3, loss), 0.06)
        target = lost_and_won(rng, n, -0.12, 0.15)
        tables = tables_of(
            n, {task: (int(b[i]), int(c[i])) for i, task in enumerate(tasks)}, target
        )
        decision = decide(tables, "target", GateRules.of(SETTINGS))
        passes = priors_pass(n, b, c, SETTINGS.alpha) & target_passes(n, *target)
        assert bool(passes) == (decision.verdict == "promote")
        judged = [r.outcome for r in decision.reasons if r.step in ("prior", "pooled")]
        assert bool(priors_reject(n, b, c, SETTINGS.alpha)) == ("reject" in judged)
        seen.add(decision.verdict)
    assert seen == {"promote", "hold", "reject"}


def tables_of(n, changes, target):
    """Tables in which every task has exactly these counts of lost and won rows."""
    old, new = [], []
    for task, (lost, won) in {**changes, "target": tuple(int(x) for x in target)}.items():
        for i in range(n):
            sample = Sample(task, str(i), float(i < n // 2))
            old.append(sample)
            flipped = i < lost or i >= n - won
            new.append(replace(sample, reward=1 - sample.reward) if flipped else sample)
    return Tables(tuple(old), tuple(old), tuple(new))


def test_counts_follow_the_loss_asked_for():
    rng = np.random.default_rng(4)
    b, c = lost_and_won(rng, 500, np.full(20000, 0.04), 0.06)
    assert (b - c).mean() / 500 == pytest.approx(0.04, abs=4e-4)
    assert (b + c).mean() / 500 == pytest.approx(0.06, abs=4e-4)
    assert np.corrcoef(b, c)[0, 1] == pytest.approx(-0.025, abs=0.02)


def test_a_seed_names_its_figures(tmp_path):
    first, again, other = (bench_gate(replace(SMALL, seed=seed)) for seed in (1, 1, 2))
    assert json.dumps(first) == json.dumps(again)
    assert first["figures"] != other["figures"]
    path = plot_gate(first, tmp_path / "gate.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [{"draws": 0}, {"rows": ()}, {"rows": (0,)}, {"discordant": 0.0}])
def test_a_bench_of_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="GateBench"):
        GateBench(**wrong)
