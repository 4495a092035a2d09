"""Importance weights: kept by what they are, used by the steps that name them, refused if bad."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from agent.errors import UserError
from agent.learner import es
from agent.learner.penalty import Penalty
from agent.store.anchor import Anchor, importance_path, keep_importance
from agent.store.journal import Journal
from agent.store.replay import replay
from agent.store.theta import Parameters

Tensors = dict[str, torch.Tensor]
NORM = "model.norm.weight"


@pytest.fixture
def anchor(make_model: Callable[..., Path]) -> Anchor:
    return Anchor.open(make_model())


def ramp(anchor: Anchor, top: float = 2.0) -> Tensors:
    """0 .. top over each tensor."""
    return {
        name: torch.linspace(0, top, torch.Size(shape).numel()).view(shape)
        for name, (shape, _) in anchor.specs.items()
    }


def a_step(generation: int, importance: str | None) -> es.Step:
    return es.step(
        np.random.default_rng(generation).normal(size=4), es.members(4, True), run_seed=3,
        generation=generation, sigma=0.1, alpha=0.1,
        penalty=Penalty("l2", 4.0, importance=importance),
    )  # fmt: skip


def with_norm(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {NORM: change(tensors[NORM])}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (with_norm(lambda t: -t), f"{NORM}: importance weights span -2"),
        (with_norm(lambda t: t / 0), f"{NORM}: importance weights span nan"),
        (with_norm(lambda t: t[1:]), f"{NORM} is torch.float32 .*allowed: float32 in the anchor"),
        (with_norm(lambda t: t.double()), f"{NORM} is torch.float64"),
        (lambda t: {n: held for n, held in t.items() if n != NORM}, f"tensors differ: {NORM}"),
        (lambda t: t | {"other": t[NORM].clone()}, "tensors differ: other"),
    ],
)
def test_a_bad_file_is_one_line_and_nothing_is_kept(
    anchor: Anchor, tmp_path: Path, spoil: Callable[[Tensors], Tensors], told: str
) -> None:
    file, kept = tmp_path / "bad.safetensors", tmp_path / "kept"
    save_file(spoil(ramp(anchor)), file)
    with pytest.raises(UserError, match=told) as error:
        keep_importance(anchor, file, kept)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert not kept.exists() or list(kept.iterdir()) == []


def test_no_file_and_no_safetensors_are_one_line(anchor: Anchor, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        keep_importance(anchor, tmp_path / "none", tmp_path / "kept")
    (tmp_path / "text").write_text("weights")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        keep_importance(anchor, tmp_path / "text", tmp_path / "kept")


def test_a_replay_uses_the_weights_of_each_round_and_refuses_others(
    anchor: Anchor, tmp_path: Path
) -> None:
    kept, digests = tmp_path / "kept", list[str | None]([None])
    for top in (1.0, 2.0):
        save_file(ramp(anchor, top), tmp_path / "weights.safetensors")
        digests.append(keep_importance(anchor, tmp_path / "weights.safetensors", kept)[0])
    (tmp_path / "weights.safetensors").unlink()  # the round's own copy is what counts
    parameters, parent = Parameters.zeros(anchor, kept), anchor.digest
    journal = Journal(tmp_path / "state.db")
    for number, digest in enumerate(digests):
        run = f"run{number}"
        journal.open_run(
            run, anchor_digest=anchor.digest, parent_digest=parent, target="t", run_seed=3,
            plan={}, now=0.0,
        )  # fmt: skip
        for generation in range(2):
            taken = a_step(generation, digest)
            applied = parameters.apply(taken)
            journal.commit(run, taken, np.zeros((4, 1)), applied.delta_hash, {})
        parent = parameters.digest()
        journal.finish(run, parent, "completed", now=1.0)
    assert replay(journal, anchor, parent, importance=kept).digest() == parent
    one, other = (importance_path(kept, str(digest)) for digest in digests[1:])
    other.write_bytes(one.read_bytes())
    with pytest.raises(UserError, match=f"the round was made with {str(digests[2])[:12]}"):
        replay(journal, anchor, parent, importance=kept)
    other.unlink()
    with pytest.raises(UserError, match=f"importance {str(digests[2])[:12]}: is not kept"):
        replay(journal, anchor, parent, importance=kept)
    journal.close()
