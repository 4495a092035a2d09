"""Which cores and GPUs engines get, on machines of every size."""

import pytest

from agent.errors import UserError
from agent.population.placement import (
    by_rank,
    cpus_each,
    first_threads,
    gpu_places,
    serving_cores,
    share,
)

SIZES = [1, 2, 3, 4, 8, 48]


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("engines", [1, 2, 3, 8])
@pytest.mark.parametrize("serving", [False, True])
def test_engines_use_all_cores_but_those_that_serve(
    count: int, engines: int, serving: bool
) -> None:
    cores = list(range(10, 10 + count))
    kept = serving_cores(count) if serving else 0
    shares = [share(cores, place, engines, kept) for place in range(engines)]
    spare = cores[kept:] or cores[-1:]
    flat = [core for each in shares for core in each]
    assert sorted(set(flat)) == spare
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert max(map(flat.count, spare)) == -(-engines // len(spare))  # engines on one core


def test_the_laptop_of_two_cores() -> None:
    assert share([0, 1], 0, 1) == (0, 1)  # the stack is down: both
    assert share([0, 1], 0, 1, kept=serving_cores(2)) == (1,)  # up: what serving leaves
    assert [share([0, 1], place, 2) for place in range(2)] == [(0,), (1,)]
    assert [share([0, 1], place, 2, kept=1) for place in range(2)] == [(1,), (1,)]
    assert share([5], 0, 1, kept=serving_cores(1)) == (5,)


def test_a_core_counts_once_however_many_threads_it_has() -> None:
    assert first_threads([0, 1, 2, 3], lambda cpu: f"{cpu % 2},{cpu % 2 + 2}") == [0, 1]
    assert first_threads([2, 3], lambda cpu: f"{cpu % 2},{cpu % 2 + 2}") == [2, 3]


def test_ranks_split_the_cores_of_their_engine() -> None:
    assert by_rank((4, 5, 6, 7), 2) == [(4, 5), (6, 7)]
    assert by_rank((4,), 2) == [(4,), (4,)]


def test_cpus_of_an_engine_on_a_cluster() -> None:
    assert cpus_each([1.0], 1) == 1
    assert cpus_each([8.0, 8.0], 2) == 8
    assert cpus_each([8.0, 8.0], 3) == 4
    assert cpus_each([8.0, 2.0], 5) == 2
    assert cpus_each([2.0], 8) == 1
    assert cpus_each([], 1) == 1


def test_engines_have_gpus_of_their_own_where_there_are_enough() -> None:
    alone = gpu_places(8, 8, 1)
    assert sorted(alone) == [((gpu,), 0.9) for gpu in range(8)]
    beside = gpu_places(8, 7, 1, serving_gpus=1, serving_memory=0.45)
    assert sorted(beside) == [((gpu,), 0.9) for gpu in range(1, 8)]
    pairs = gpu_places(8, 3, 2, serving_gpus=2, serving_memory=0.9)
    assert sorted(pairs) == [((gpu, gpu + 1), 0.9) for gpu in (2, 4, 6)]


def test_an_engine_shares_the_only_gpu_with_serving() -> None:
    assert gpu_places(1, 1, 1, serving_gpus=1, serving_memory=0.45) == [((0,), 0.45)]
    mixed = gpu_places(2, 2, 1, serving_gpus=1, serving_memory=0.45)
    assert sorted(mixed) == [((0,), 0.45), ((1,), 0.45)]


def test_a_stated_share_of_memory_is_never_divided() -> None:
    assert gpu_places(1, 2, 1, memory=0.4) == [((0,), 0.4), ((0,), 0.4)]
    assert {memory for _, memory in gpu_places(8, 8, 1, memory=0.3)} == {0.3}


@pytest.mark.parametrize(
    ("gpus", "engines", "ranks", "memory", "allowed"),
    [(1, 3, 1, 0.4, 2), (1, 1, 2, None, 0), (2, 2, 2, 0.9, 1), (0, 1, 1, None, 0)],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    gpus: int, engines: int, ranks: int, memory: float | None, allowed: int
) -> None:
    with pytest.raises(UserError, match=f"population: {engines}, allowed here: {allowed} "):
        gpu_places(gpus, engines, ranks, memory)


def test_the_serving_engines_memory_counts() -> None:
    with pytest.raises(UserError, match=r"the serving engine holds 0\.9 of 1"):
        gpu_places(1, 1, 1, serving_gpus=1, serving_memory=0.9)
