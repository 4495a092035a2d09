"""theta = anchor + delta, by its definition, bit for bit, for every dtype and block."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from agent.errors import UserError
from agent.learner import es
from agent.learner.noise import Address, NoiseKind, normal, rademacher
from agent.learner.penalty import Penalty, prox
from agent.store import theta as module
from agent.store.anchor import Anchor, keep_importance
from agent.store.tensorfile import raw
from agent.store.theta import Parameters, layer_of

MakeModel = Callable[..., Path]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FILE = "model.safetensors"
EPS = {"normal": normal, "rademacher": rademacher}


@pytest.fixture(params=DTYPES, ids=str)
def anchor(make_model: MakeModel, request: pytest.FixtureRequest) -> Anchor:
    return Anchor.open(make_model(dtype=request.param))


def a_step(
    generation: int = 0, penalty: Penalty | None = None, noise: NoiseKind = "normal"
) -> es.Step:
    rewards = np.random.default_rng(generation).normal(size=6)
    return es.step(
        rewards, es.members(6, True), run_seed=5, generation=generation, sigma=0.01, alpha=0.02,
        penalty=penalty or Penalty("l2", 3.0), noise=noise,
    )  # fmt: skip


def moved(anchor: Anchor) -> Parameters:
    parameters = Parameters.zeros(anchor)
    parameters.apply(a_step())
    return parameters


def literal(
    parameters: Parameters, name: str, address: Address | None, scale: float, noise: NoiseKind
) -> torch.Tensor:
    """cast(theta_0 + (delta + scale * eps)), in float32, one operation after another."""
    base = parameters.anchor.tensor(name)
    delta = parameters.delta[name]
    if address is not None:
        eps = EPS[noise](address, name, 0, delta.size)
        delta = delta + np.float32(scale) * eps
    return (base.float() + torch.from_numpy(delta).view(base.shape)).to(base.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_other_senses_are_never_perturbed_or_moved(
    make_model: MakeModel, dtype: torch.dtype
) -> None:
    """No answer to a text depends on them: steps would be a random walk of theirs alone."""
    seen = {"model.visual.patch_embed.proj.weight": torch.randn(4, 8).to(dtype)}
    held = {
        name: t.clone() for name, t in load_file(make_model("text", dtype=dtype) / FILE).items()
    }
    folder = make_model("both", tensors=held | seen, config={"vision_config": {}})
    text, both = Anchor.open(folder.parent / "text"), Anchor.open(folder)
    assert both.fixed == frozenset(seen)
    assert both.learnable == text.learnable == text.parameters == both.parameters - 32
    one, other = Parameters.zeros(text), Parameters.zeros(both)
    assert one.apply(a_step()).norm == other.apply(a_step()).norm > 0
    member = dict(other.rendered(Address(5, 1, 0), 0.1))
    for name, tensor in one.rendered(Address(5, 1, 0), 0.1):
        assert torch.equal(member.pop(name), tensor)
    assert all(torch.equal(member.pop(name), tensor) for name, tensor in seen.items())
    assert not member


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
def test_a_member_is_the_definition(anchor: Anchor, noise: NoiseKind) -> None:
    parameters, address = moved(anchor), Address(7, 3, 1)
    rendered = dict(parameters.rendered(address, -0.01, noise))
    assert tuple(rendered) == anchor.names
    for name, tensor in rendered.items():
        expected = literal(parameters, name, address, -0.01, noise)
        assert bytes(raw(tensor)) == bytes(raw(expected))
        assert tensor.dtype == anchor.specs[name][1]


def test_plain_weights_are_the_definition(anchor: Anchor) -> None:
    parameters = moved(anchor)
    for name, tensor in parameters.rendered():
        expected = literal(parameters, name, None, 0.0, "normal")
        assert bytes(raw(tensor)) == bytes(raw(expected))


def test_nothing_moved_is_the_anchor_to_the_bit(make_model: MakeModel) -> None:
    tensors = {"model.x.weight": torch.tensor([-0.0, 0.0, 1e-40, -3.0])}
    for dtype in DTYPES:
        held = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        folder = make_model(str(dtype), tensors=held, config={"tie_word_embeddings": None})
        anchor = Anchor.open(folder)
        parameters = Parameters.zeros(anchor)
        assert parameters.digest() == anchor.digest
        (_, rendered), *_ = parameters.rendered()
        assert bytes(raw(rendered)) == bytes(raw(held["model.x.weight"]))


def test_rendering_changes_nothing(anchor: Anchor) -> None:
    parameters = moved(anchor)
    before, digest = parameters.delta_hash(), parameters.digest()
    for sign in (1, -1) * 5:
        list(parameters.rendered(Address(1, 2, 3), sign * 0.5))
    assert (parameters.delta_hash(), parameters.digest()) == (before, digest)


def test_a_reader_may_keep_and_change_what_it_got(anchor: Anchor) -> None:
    parameters = moved(anchor)
    digest = parameters.digest()
    kept = dict(parameters.rendered())
    for tensor in kept.values():
        tensor.zero_()
    assert parameters.digest() == digest
    assert len({tensor.data_ptr() for tensor in kept.values()}) == len(kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_and_blocks_do_not_show(
    make_model: MakeModel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchor = Anchor.open(make_model(dtype=dtype))
    parameters, address = moved(anchor), Address(7, 3, 1)
    whole = [bytes(raw(tensor)) for _, tensor in parameters.rendered(address, 0.3)]
    monkeypatch.setattr(module, "GROUP", 37)
    small = [bytes(raw(tensor)) for _, tensor in parameters.rendered(address, 0.3)]
    assert whole == small


PENALTIES = (
    Penalty("none"), Penalty("l2", 3.0), Penalty("l1", 0.5),
    Penalty("huber", 3.0, threshold=0.004), Penalty("elastic_net", 2.0),
)  # fmt: skip


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: str(penalty.kind))
def test_a_step_is_the_definition(anchor: Anchor, penalty: Penalty) -> None:
    parameters = Parameters.zeros(anchor)
    expected = {name: delta.copy() for name, delta in parameters.delta.items()}
    for generation in range(3):
        step = a_step(generation, penalty)
        before = {name: delta.copy() for name, delta in expected.items()}
        applied = parameters.apply(step)
        for name, delta in expected.items():
            total = np.zeros_like(delta)
            for address, c in zip(step.addresses(), step.coefficients, strict=True):
                total += np.float32(c) * normal(address, name, 0, delta.size)
            expected[name] = prox(delta + total, penalty, step.alpha)
            assert parameters.delta[name].tobytes() == expected[name].tobytes()
        assert_norms(applied, expected, before)


def assert_norms(
    applied: es.Applied, now: dict[str, np.ndarray], before: dict[str, np.ndarray]
) -> None:
    """The three norms against numpy in float64."""
    wide = {name: delta.astype(np.float64) for name, delta in now.items()}
    layers: dict[str, float] = {}
    for name, delta in wide.items():
        layers[layer_of(name)] = layers.get(layer_of(name), 0.0) + float((delta**2).sum())
    moves = [((now[name] - before[name]).astype(np.float64) ** 2).sum() for name in now]
    assert applied.norm == pytest.approx(np.sqrt(sum(layers.values())), rel=1e-12)
    assert applied.step_norm == pytest.approx(np.sqrt(sum(moves)), rel=1e-12)
    assert set(applied.layer_norms) == set(layers)
    for layer, square in layers.items():
        assert applied.layer_norms[layer] == pytest.approx(np.sqrt(square), rel=1e-12)


def test_a_no_op_moves_nothing_and_still_reports(anchor: Anchor) -> None:
    parameters = moved(anchor)
    digest, hashed = parameters.digest(), parameters.delta_hash()
    still = es.step(
        np.ones(6), es.members(6, True), run_seed=5, generation=1, sigma=0.01, alpha=0.02,
        penalty=Penalty("l2", 3.0),
    )  # fmt: skip
    assert still.no_op is not None
    applied = parameters.apply(still)
    assert (applied.delta_hash, applied.step_norm) == (hashed, 0.0)
    assert applied.norm > 0
    assert parameters.digest() == digest


def test_importance_weighs_the_penalty_of_each_parameter(anchor: Anchor, tmp_path: Path) -> None:
    importance = {
        name: np.linspace(0, 2, delta.size, dtype=np.float32)
        for name, delta in Parameters.zeros(anchor).delta.items()
    }
    file, kept = tmp_path / "importance.safetensors", tmp_path / "kept"
    shaped = {n: torch.from_numpy(held).view(anchor.specs[n][0]) for n, held in importance.items()}
    save_file(shaped, file)
    digest, largest = keep_importance(anchor, file, kept)
    assert largest == 2
    penalty = Penalty("l2", 3.0, importance=digest)
    free, weighted = Parameters.zeros(anchor), Parameters.zeros(anchor, kept)
    free.apply(a_step(0, Penalty("none")))
    weighted.apply(a_step(0, penalty))
    for name, delta in free.delta.items():
        expected = prox(delta, penalty, 0.02, importance[name])
        assert weighted.delta[name].tobytes() == expected.tobytes()


def test_the_hash_of_delta_follows_every_bit(anchor: Anchor) -> None:
    parameters = moved(anchor)
    hashes = {parameters.delta_hash()}
    for name in anchor.names:
        bits = parameters.delta[name].view(np.uint32)
        bits[-1] ^= 1
        hashes.add(parameters.delta_hash())
    assert len(hashes) == 1 + len(anchor.names)


def test_layers_by_name() -> None:
    assert layer_of("model.layers.11.self_attn.q_proj.weight") == "model.layers.11"
    assert layer_of("model.layers.3.mlp.experts.7.up_proj.weight") == "model.layers.3"
    assert layer_of("model.embed_tokens.weight") == "model.embed_tokens"
    assert layer_of("scale") == "scale"


def test_a_snapshot_is_the_same_delta(anchor: Anchor, tmp_path: Path) -> None:
    parameters, path = moved(anchor), tmp_path / "snapshots" / "one.safetensors"
    parameters.save(path)
    again = Parameters.load(anchor, path)
    assert again.delta_hash() == parameters.delta_hash()
    parameters.apply(a_step(1))
    again.apply(a_step(1))
    assert again.delta_hash() == parameters.delta_hash()
    assert Parameters.load(anchor, path).delta_hash() != again.delta_hash()
    assert list(path.parent.iterdir()) == [path]


def test_a_snapshot_that_fails_leaves_the_old_one(
    anchor: Anchor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters, path = moved(anchor), tmp_path / "one.safetensors"
    parameters.save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("agent.store.tensorfile.flush", full)
    parameters.apply(a_step(1))
    with pytest.raises(OSError, match="disk full"):
        parameters.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir() if "partial" in file.name] == []


def spoiled(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    held = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(held)
    save_file(held, path)


NORM = "model.norm.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "is not a whole safetensors"),
    "absent": (lambda p: p.unlink(), "is not a whole safetensors"),
    "a name missing": (lambda p: spoiled(p, lambda t: t.pop(NORM)), f"tensors differ: {NORM}"),
    "a name more": (
        lambda p: spoiled(p, lambda t: t.update(x=torch.ones(1))), "tensors differ: x"),
    "another shape": (
        lambda p: spoiled(p, lambda t: t.update({NORM: torch.ones(9)})),
        rf"{NORM} is torch.float32 \[9\], allowed"),
    "another dtype": (
        lambda p: spoiled(p, lambda t: t.update({NORM: torch.ones(8).half()})),
        f"{NORM} is torch.float16"),
    "another anchor": (
        lambda p: save_file(load_file(p), p, {"anchor": "f" * 64}), "belongs to another anchor"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_damaged_snapshot_is_refused(make_model: MakeModel, tmp_path: Path, kind: str) -> None:
    anchor, path = Anchor.open(make_model()), tmp_path / "one.safetensors"
    moved(anchor).save(path)
    spoil, message = BAD[kind]
    spoil(path)
    with pytest.raises(UserError, match=message):
        Parameters.load(anchor, path)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    [line] = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon:")
    ]
    return int(line.split()[1]) * 1024


def test_the_host_holds_four_bytes_a_parameter_beside_the_mapped_anchor(
    make_model: MakeModel,
) -> None:
    """Measured: delta is all that a moved theta adds; the anchor's 2 bytes are the file's pages."""
    shape = (4096, 1024)
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
    tensors = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name in names}
    anchor = Anchor.open(make_model(tensors=tensors))
    small = Parameters.zeros(Anchor.open(make_model("small")))
    small.apply(a_step())  # what the first call loads stays
    assert anchor.digest
    before = anonymous_bytes()
    parameters = Parameters.zeros(anchor)
    parameters.apply(a_step())
    grown = (anonymous_bytes() - before) / anchor.parameters
    assert grown < 4.4  # less where memory that was given back is taken again
    assert sum(delta.nbytes for delta in parameters.delta.values()) == 4 * anchor.parameters
