"""The simulated schedule against closed forms, with faults, and its picture."""

from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest

from flows.lab.bench.scaling import ENGINES, ScalingBench, bench_scaling, plot_scaling, simulate

STILL = ScalingBench(spread=0.0, mtbf_hours=1e12, dispatch_s=0.0, collect_s=0.0, generations=2)


@pytest.mark.parametrize("engines", [1, 7, 8, 30, 64])
def test_equal_members_on_whole_engines_take_whole_turns(engines: int) -> None:
    run = simulate(30, engines, STILL, 0)
    assert run.seconds == pytest.approx(ceil(30 / engines) * STILL.member_s)
    assert (run.useful_s, run.failures) == (pytest.approx(30 * STILL.member_s), 0)


def test_the_driver_rewards_one_member_after_another() -> None:
    run = simulate(64, 64, replace(STILL, collect_s=0.5), 0)
    assert run.seconds == pytest.approx(STILL.member_s + 64 * 0.5)


def test_a_broken_engine_costs_its_member_not_the_generation() -> None:
    fragile = replace(STILL, mtbf_hours=0.5)  # of 3,584 engine seconds some break
    runs = [simulate(512, 64, fragile, seed) for seed in range(8)]
    assert sum(run.failures for run in runs) > 5
    for run in runs:
        # Each of a failure's costs: one more turn of a member; never the mending of its engine.
        assert run.seconds <= 8 * STILL.member_s + (1 + run.failures) * STILL.member_s
        assert run.seconds < 8 * STILL.member_s + fragile.mend_s


def test_1024_engines_are_used_at_1024_members_and_30_members_use_30(tmp_path: Path) -> None:
    result = bench_scaling(ScalingBench(generations=20))
    points = {(each["members"], each["engines"]): each for each in result["points"]}
    assert points[1024, 1024]["efficiency"] >= 0.9
    assert points[30, 1024]["efficiency"] == pytest.approx(30 / 1024, rel=0.05)
    for each in points.values():
        assert each["efficiency"] >= each["with_driver"] >= each["with_update"]
    assert len(points) == 2 * len(ENGINES)
    assert plot_scaling(result["points"], tmp_path / "curve.png").stat().st_size > 10_000
