"""A candidate is a journal: rebuilt bit for bit elsewhere, whatever was killed or deleted."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from postgres_server import PostgresProcess, needs_server
from replaying import leave_snapshots, replay_without

from agent.errors import UserError
from agent.learner import es
from agent.learner.penalty import Penalty
from agent.store.journal import DamagedError, Journal
from agent.store.replay import is_sound, reached, replay, route, snapshot_path
from agent.store.weights import Anchor, Parameters
from agent.store.windows import TREE

pytestmark = pytest.mark.proof

MakeModel = Callable[..., Path]
Process = Callable[..., Any]
PROCESS = Path(__file__).with_name("round_process.py")
SHARED = Path(__file__).parents[2] / "shared"


@contextmanager
def started(**environment: str) -> Iterator[Process]:
    """A process that has seen nothing of this one: arguments in, what came of them out."""
    with subprocess.Popen(
        [sys.executable, PROCESS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join([str(SHARED), *sys.path])},
    ) as fresh:
        assert fresh.stdin is not None
        assert fresh.stdout is not None
        asked, told = fresh.stdin, fresh.stdout

        def ask(*arguments: object) -> Any:
            asked.write(json.dumps([str(each) for each in arguments]) + "\n")
            asked.flush()
            return json.loads(told.readline())

        yield ask
        asked.close()


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    """One such process for all tests here."""
    with started() as ask:
        yield ask


def record(
    journal: Journal,
    parameters: Parameters,
    run_id: str,
    generations: int,
    *,
    parent: str,
    population: int = 6,
) -> str:
    """A round of random rewards; returns the digest it ends with."""
    anchor = parameters.anchor
    seed = sum(run_id.encode())
    journal.open_run(
        run_id, anchor_digest=anchor.digest, parent_digest=parent, target="t", run_seed=seed,
        plan={}, now=0.0,
    )  # fmt: skip
    draw = np.random.default_rng(seed)
    for generation in range(generations):
        rewards = draw.normal(size=(population, 3))
        if generation == 1:
            rewards[2, 1] = np.nan
        step = es.step(
            rewards.mean(axis=1), es.members(population, False), run_seed=seed, sigma=0.01,
            generation=generation, alpha=0.02, penalty=Penalty("l2", 1.0),
        )  # fmt: skip
        applied = parameters.apply(step)
        journal.commit(run_id, step, rewards, applied.delta_hash, {"norm": applied.norm})
    journal.finish(run_id, parameters.digest(), "completed", now=1.0)
    return parameters.digest()


@pytest.fixture
def anchor(make_model: MakeModel) -> Anchor:
    return Anchor.open(make_model())


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    journal = Journal(tmp_path / "state.db")
    yield journal
    journal.close()


def test_engines_of_another_kind_of_hash_are_compared_on_this_machine(
    anchor: Anchor, journal: Journal, tmp_path: Path
) -> None:
    """A round begun on the CPU (sha256) goes on where delta lies on a GPU (tree hash)."""
    parameters = Parameters.zeros(anchor)
    record(journal, parameters, "one", 3, parent=anchor.digest)
    way = route(journal, anchor, "one")
    wanted = way.generations[-1].delta_hash
    tree = parameters.delta_hash(TREE)
    assert tree.startswith(TREE) != wanted.startswith(TREE)
    assert reached(anchor, way, wanted, parameters.delta_hash(), None)
    assert reached(anchor, way, wanted, tree, None)
    name = anchor.names[0]
    parameters.delta[name][0] = np.nextafter(parameters.delta[name][0], np.float32(1))
    assert not reached(anchor, way, wanted, parameters.delta_hash(TREE), None)
    assert not reached(anchor, way, wanted, parameters.delta_hash(), None)


def test_a_snapshot_named_by_its_tree_hash_is_sound(anchor: Anchor, tmp_path: Path) -> None:
    parameters = Parameters.zeros(anchor)
    path = snapshot_path(tmp_path, parameters.delta_hash(TREE))
    parameters.save(path)
    assert is_sound(anchor, path, path.stem)
    assert not is_sound(anchor, path, TREE + "0" * 64)


def test_any_core_count_and_any_snapshots_give_the_same_bits(
    make_model: MakeModel,
    journal: Journal,
    tmp_path: Path,
    process: Process,
    scale: Callable[[int, int], int],
) -> None:
    from_hidden = {"tie_word_embeddings": True}
    big = {name: tensor.repeat(8, 8) if tensor.ndim == 2 else tensor.repeat(8)
           for name, tensor in Anchor.open(make_model("seed")).tensors()}  # fmt: skip
    anchor = Anchor.open(make_model("big", tensors=big, config=from_hidden))
    digest = record(
        journal, Parameters.zeros(anchor), "long", scale(10, 200), parent=anchor.digest,
        population=40,
    )  # fmt: skip
    database = tmp_path / "state.db"
    found = process("replay", anchor.directory, database, tmp_path / "any")
    for threads in ("1", "2")[: scale(0, 2)]:
        with started(NUMBA_NUM_THREADS=threads) as ask:
            found += ask("replay", anchor.directory, database, tmp_path / threads)
    for each in found:
        assert each["digests"] == [digest] * 3
        assert each["left"] == scale(10, 200) // 7


def test_a_lineage_of_rounds_is_replayed_from_the_anchor(anchor: Anchor, journal: Journal) -> None:
    parameters, parent = Parameters.zeros(anchor), anchor.digest
    ends = []
    for name in ("one", "two", "three"):
        parent = record(journal, parameters, name, 3, parent=parent)
        ends.append(parent)
    assert journal.lineage(ends[2]) == ["one", "two", "three"]
    assert journal.lineage(ends[0]) == ["one"]
    assert journal.lineage(anchor.digest) == []
    for name, digest in zip(("one", "two", "three"), ends, strict=True):
        assert replay(journal, anchor, digest).digest() == digest
        assert replay(journal, anchor, digest[:10]).digest() == digest
        assert replay(journal, anchor, name).digest() == digest
    assert replay(journal, anchor, anchor.digest).digest() == anchor.digest


def test_an_open_run_is_replayed_as_far_as_it_is(anchor: Anchor, journal: Journal) -> None:
    parameters = Parameters.zeros(anchor)
    journal.open_run(
        "open", anchor_digest=anchor.digest, parent_digest=anchor.digest, target="t", run_seed=1,
        plan={}, now=0.0,
    )  # fmt: skip
    assert replay(journal, anchor, "open").digest() == anchor.digest
    rewards = np.arange(4.0)[:, None]
    step = es.step(
        rewards[:, 0], es.members(4, True), run_seed=1, generation=0, sigma=1.0, alpha=0.1,
        penalty=Penalty(),
    )  # fmt: skip
    journal.commit("open", step, rewards, parameters.apply(step).delta_hash, {})
    assert replay(journal, anchor, "open").delta_hash() == parameters.delta_hash()


def test_a_damaged_snapshot_is_not_used(anchor: Anchor, journal: Journal, tmp_path: Path) -> None:
    digest = record(journal, Parameters.zeros(anchor), "one", 6, parent=anchor.digest)
    folder = tmp_path / "snapshots"
    assert leave_snapshots(journal, anchor, "one", folder, every=2) == digest
    rows = journal.generations("one")
    kept = [snapshot_path(folder, row.delta_hash) for row in rows[1::2]]
    assert sorted(folder.iterdir()) == sorted(kept)
    assert route(journal, anchor, digest, folder).snapshot == kept[2]
    content = bytearray(kept[2].read_bytes())
    content[-1] ^= 1
    kept[2].write_bytes(bytes(content))
    kept[1].write_bytes(kept[0].read_bytes())
    taken = route(journal, anchor, digest, folder)
    assert taken.snapshot == kept[0]
    assert [row.generation for row in taken.generations] == [2, 3, 4, 5]
    assert replay(journal, anchor, digest, folder).digest() == digest
    kept[0].unlink()
    assert route(journal, anchor, digest, folder).snapshot is None
    assert replay(journal, anchor, digest, folder).digest() == digest


def test_another_anchor_is_refused(anchor: Anchor, journal: Journal, make_model: MakeModel) -> None:
    digest = record(journal, Parameters.zeros(anchor), "one", 2, parent=anchor.digest)
    other = dict(anchor.tensors()) | {"model.norm.weight": anchor.tensor("model.norm.weight") + 1}
    with pytest.raises(UserError, match=f"starts from anchor {anchor.digest}"):
        replay(journal, Anchor.open(make_model("other", tensors=other)), digest)


def test_a_chain_forged_throughout_is_caught_by_the_weights(
    anchor: Anchor, journal: Journal
) -> None:
    """Rows whose hashes are all right, but whose coefficients never gave that delta."""
    parameters = Parameters.zeros(anchor)
    journal.open_run(
        "forged", anchor_digest=anchor.digest, parent_digest=anchor.digest, target="t", run_seed=1,
        plan={}, now=0.0,
    )  # fmt: skip
    for generation in range(3):
        rewards = np.random.default_rng(generation).normal(size=(4, 1))
        step = es.step(
            rewards[:, 0], es.members(4, True), run_seed=1, generation=generation, sigma=1.0,
            alpha=0.1, penalty=Penalty(),
        )  # fmt: skip
        applied = parameters.apply(step)
        hashed = applied.delta_hash if generation != 1 else "0" * 64
        journal.commit("forged", step, rewards, hashed, {})
    assert journal.verify("forged") == 3
    with pytest.raises(DamagedError) as error:
        replay(journal, anchor, "forged")
    assert (error.value.generation, error.value.field) == (1, "delta_hash")


def test_a_run_must_end_at_its_digest(anchor: Anchor, journal: Journal) -> None:
    journal.open_run(
        "wrong", anchor_digest=anchor.digest, parent_digest=anchor.digest, target="t", run_seed=1,
        plan={}, now=0.0,
    )  # fmt: skip
    journal.finish("wrong", "0" * 64, "completed", now=1.0)
    with pytest.raises(DamagedError) as error:
        replay(journal, anchor, "wrong")
    assert (error.value.generation, error.value.field) == ("outcome", "digest")


def test_a_run_without_some_examples_is_the_run_of_the_others(
    anchor: Anchor, journal: Journal
) -> None:
    start = record(journal, Parameters.zeros(anchor), "before", 2, parent=anchor.digest)
    parameters = replay(journal, anchor, start)
    digest = record(journal, parameters, "all", 4, parent=start)
    others = replay(journal, anchor, start)
    for row in journal.generations("all"):
        others.apply(
            es.step(
                row.rewards[:, [0, 2]], es.members(6, False), run_seed=row.step.run_seed,
                generation=row.generation, sigma=0.01, alpha=0.02, penalty=Penalty("l2", 1.0),
            )
        )  # fmt: skip

    def without(*positions: int) -> str:
        made = replay_without(journal, anchor, "all", positions, mirrored=False, shaping="zscore")
        return made.digest()

    assert without() == digest
    assert without(1) == others.digest() != digest
    assert without(0, 1, 2) == start


def test_a_round_killed_anywhere_ends_where_the_whole_one_does(
    make_model: MakeModel, tmp_path: Path, process: Process, scale: Callable[[int, int], int]
) -> None:
    trials = scale(5, 50)
    compare(process("round", make_model(), tmp_path / "rounds", trials, 1), trials)


@pytest.mark.integration
@needs_server
def test_so_it_does_on_a_server_that_is_killed_as_well(
    make_model: MakeModel,
    tmp_path: Path,
    process: Process,
    server: PostgresProcess,
    scale: Callable[[int, int], int],
) -> None:
    """The whole round is on SQLite: rows and hashes do not depend on where the journal is."""
    trials = scale(2, 20)
    with server.disturbed(trials, up_s=0.7, away_s=0.3) as url:
        compare(process("round", make_model(), tmp_path / "rounds", trials, 1, url), trials)


def compare(rounds: list[dict[str, Any]], trials: int) -> None:
    whole, *others = rounds
    assert len(whole["evaluated"]) == len(set(whole["evaluated"])) == 36
    assert len(others) == trials
    assert sum(found["kills"] for found in others) >= trials
    for found in others:
        for same in ("digest", "rows", "verified", "replayed", "left"):
            assert found[same] == whole[same]
        assert set(found["evaluated"]) == set(whole["evaluated"])
        assert len(found["evaluated"]) <= 36 + found["kills"]
