"""Certification on plain transformers: engines with planted faults are caught, sound ones pass."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from reference import ReferenceEngine
from safetensors.torch import save_file

from agent.errors import UserError
from agent.learner.es import members, step
from agent.learner.noise import Address
from agent.learner.penalty import Penalty
from agent.population.certify import (
    MEMBER,
    PROMPTS,
    Certificate,
    ProbeReply,
    WayCheck,
    certify,
    key_of,
    typical,
)
from agent.population.fresh import FreshEngine
from agent.store.weights import Anchor, Parameters
from flows.lab.families import make_tiny

pytestmark = pytest.mark.proof
PROBES = PROMPTS[:3]
Tensors = Mapping[str, torch.Tensor]
ASKED = [[{"role": "user", "content": f"{n} and {n + 1}?"}] for n in range(2)]


class Broken(ReferenceEngine):
    """Leaves some of its tensors as they were, or changes them, when weights are put into it."""

    def __init__(
        self, model: Path, way: str, spoil: Callable[[str, torch.Tensor, Tensors], object]
    ):
        super().__init__(model)
        self._way, self._spoil, self._cold = way, spoil, True
        self._first = {name: t.clone() for name, t in self._model.state_dict().items()}

    def _hold(self, member, noise):
        if self._cold and self._loaded is not None:
            return  # as it was started
        self._cold = False
        super()._hold(member, noise)
        with torch.no_grad():
            for name, tensor in self._model.state_dict().items():
                self._spoil(name, tensor, self._first)

    def open(self, anchor: Path) -> str:
        self._cold = False
        return super().open(anchor)

    def load(self, directory: Path) -> str:
        self._cold = False
        return super().load(directory)

    def state(self) -> dict[str, str | None]:
        return super().state() | {"way": self._way}


def stale(part: str) -> Callable[[str, torch.Tensor, Tensors], object]:
    """Tensors of this name keep what the engine was started with."""
    return lambda name, tensor, first: tensor.copy_(first[name]) if part in name else None


def stale_rows(part: str, rows: slice) -> Callable[[str, torch.Tensor, Tensors], object]:
    """A part of a tensor does: one expert, one shard."""
    return lambda name, t, first: t[rows].copy_(first[name][rows]) if part in name else None


def scaled(part: str) -> Callable[[str, torch.Tensor, Tensors], object]:
    """Tensors of this name come out a hundredth too large."""
    return lambda name, tensor, _: tensor.mul_(1.01) if part in name else None


FAULTS = {
    "a stale head": ("gpt_oss", stale("lm_head")),
    "stale experts": ("gpt_oss", stale("experts.down_proj")),
    "one stale expert": ("gpt_oss", stale_rows("layers.1.mlp.experts.down_proj", slice(2, 3))),
    "one stale shard": ("llama", stale_rows("layers.0.mlp.down_proj", slice(32, 64))),
    "a stale norm": ("llama", stale("layers.1.input_layernorm")),
    "a scale": ("llama", scaled("layers.0.self_attn.o_proj")),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: make_tiny(root / name, name, tied=False, dtype=torch.float32)
        for name in ("llama", "gpt_oss")
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, models: dict[str, Path], tmp_path: Path) -> None:
    """In the way it is in: the next one is taken."""
    family, spoil = FAULTS[fault]

    def start(directory: Path, way: str) -> ReferenceEngine:
        return Broken(directory, way, spoil if way == "short" else sound)

    told = certify(start, models[family], tmp_path / "one", PROBES)
    assert told.way == "long"
    assert told.refused
    assert all(refused.startswith("short way, ") for refused in told.refused)


def sound(name: str, tensor: torch.Tensor, first: Tensors) -> None:
    """Every tensor is what was put there."""


def test_an_engine_that_breaks_is_asked_nothing_more(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Each check that is left fails: vLLM's engine may never answer after an error of its own."""
    asked: list[str] = []

    class Breaking(Broken):
        def generate(self, prompts, max_tokens, member=None, noise="normal"):
            asked.append("member" if member else "base")
            if member:
                raise AssertionError
            return super().generate(prompts, max_tokens, member, noise)

    certificate = certify(
        lambda directory, way: Breaking(directory, way, sound), models["llama"], tmp_path, PROBES
    )
    assert certificate.way == "fresh"
    assert [check.error for check in certificate.checks] == ["AssertionError:"] * 4
    assert asked == ["base", "base", "base", "member", "base", "base", "member"]


def test_a_model_whose_cold_engine_answers_no_numbers_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    class Blind(ReferenceEngine):
        def _logprobs(self, ids):
            return super()._logprobs(ids) * float("nan")

    with pytest.raises(UserError, match="LlamaForCausalLM: a cold engine's log p are not all"):
        certify(lambda directory, way: Blind(directory), models["llama"], tmp_path, PROBES)


def test_a_sound_engine_passes_by_the_first_way(models: dict[str, Path], tmp_path: Path) -> None:
    told = certify(lambda d, way: Broken(d, way, sound), models["llama"], tmp_path, PROBES)
    assert (told.way, told.family, told.refused) == ("short", "LlamaForCausalLM", ())
    assert {check.what for check in told.checks} == {"member", "theta", "load", "reload"}
    assert all(check.passed(told.allowed) for check in told.checks)
    assert Certificate.from_json(told.to_json()) == told


def test_an_infinite_difference_is_null_in_json() -> None:
    """JSON has no infinity, and other programs read certificates and `certify --json`."""
    checks = (WayCheck("member", math.inf, 0, 12, "broken"), WayCheck("theta", 0.0, 12, 12))
    certificate = Certificate("X", "fresh", 0.0, checks)
    text = json.dumps(certificate.to_json(), allow_nan=False)
    assert json.loads(text)["checks"][0]["difference"] is None
    assert Certificate.from_json(json.loads(text)) == certificate


def test_an_engine_that_breaks_fails_and_one_that_refuses_ends_it(
    models: dict[str, Path], tmp_path: Path
) -> None:
    def breaks(name: str, tensor: torch.Tensor, first: Tensors) -> None:
        raise RuntimeError("the kernel is gone")

    def refuses(name: str, tensor: torch.Tensor, first: Tensors) -> None:
        raise UserError("tensor x is unknown")

    told = certify(lambda d, way: Broken(d, way, breaks), models["llama"], tmp_path / "one", PROBES)
    assert told.way == "fresh"
    assert told.refused[0] == "short way, member: RuntimeError: the kernel is gone"
    with pytest.raises(UserError, match="x is unknown"):
        certify(lambda d, way: Broken(d, way, refuses), models["llama"], tmp_path / "two", PROBES)


def test_a_model_that_no_engine_answers_is_one_line(
    models: dict[str, Path], tmp_path: Path
) -> None:
    class Mute(ReferenceEngine):
        def generate(self, *arguments, **more):
            raise RuntimeError("attention requires\nBF16")

    with pytest.raises(
        UserError, match=r"^LlamaForCausalLM: .* not answer: attention requires BF16$"
    ):
        certify(lambda d, way: Mute(d), models["llama"], tmp_path, PROBES)


def test_engines_started_afresh_answer_as_the_literal_definition(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Theta, members and directories, without a put; nothing is left behind."""
    started: list[Path] = []

    def start(directory: Path) -> ReferenceEngine:
        started.append(directory)
        return Cold(directory)

    fresh, plain = (
        FreshEngine(start, tmp_path / "s", models["llama"]),
        ReferenceEngine(models["llama"]),
    )
    member = (Address(1, 2, 3), 0.05)
    for engine in (fresh, plain):
        engine.open(models["llama"])
    moved = step(
        torch.linspace(0, 1, 8, dtype=torch.float64).numpy() ** 2,
        members(8, mirrored=True),
        run_seed=7,
        generation=0,
        sigma=0.05,
        alpha=0.5,
        penalty=Penalty("l2", 0.1),
    )
    assert ProbeReply.of(fresh, member, ASKED) == ProbeReply.of(plain, member, ASKED)
    assert fresh.apply(moved) == plain.apply(moved)
    assert ProbeReply.of(fresh, None, ASKED) == ProbeReply.of(plain, None, ASKED)
    assert fresh.state()["delta_hash"] == plain.state()["delta_hash"]
    assert fresh.load(models["llama"]) == plain.load(models["llama"])
    assert ProbeReply.of(fresh, None, ASKED) == ProbeReply.of(plain, None, ASKED)
    assert fresh.restore(None, [moved]) == plain.restore(None, [moved])
    assert fresh.generate(ASKED, 4) == plain.generate(ASKED, 4)
    assert len(started) == 4  # one engine for each model, asked as often as it is wanted
    fresh.close()
    assert not (tmp_path / "s").exists()


class Cold(ReferenceEngine):
    """Refuses to be given other weights than it was started on."""

    def load(self, directory: Path) -> str:
        raise AssertionError("an engine was loaded")

    def open(self, anchor: Path) -> str:
        raise AssertionError("an engine was opened")


def test_a_certificate_is_for_a_configuration_not_for_weights(
    models: dict[str, Path], tmp_path: Path
) -> None:
    anchor = Anchor.open(models["llama"])
    key = key_of(anchor, "0.32.0", {"dtype": "float32"})
    other = tmp_path / "other"
    shutil.copytree(models["llama"], other)
    tensors = {n: t + 1 for n, t in Parameters.zeros(anchor).rendered(MEMBER, typical(anchor))}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert key_of(Anchor.open(other), "0.32.0", {"dtype": "float32"}) == key
    assert key_of(anchor, "0.32.1", {"dtype": "float32"}) != key
    assert key_of(anchor, "0.32.0", {"dtype": "bfloat16"}) != key
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    assert key_of(Anchor.open(other), "0.32.0", {"dtype": "float32"}) != key
