"""A model of a few numbers, and candidates of it: enough to be preflighted and told apart."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from agent.learner.noise import Address
from agent.store.weights import Anchor, Parameters, export
from flows.service import Service


def tiny_anchor(folder: Path) -> Anchor:
    """Two tensors with a configuration; no engine can load it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{i}.w": torch.randn(4, 3, generator=generator) for i in range(2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return Anchor.open(folder)


def candidate_of(anchor: Anchor, number: int, weights: Path) -> str:
    """The digest of a candidate of that anchor, as a round exports it."""
    moved = Parameters.zeros(anchor)
    for name, tensor in moved.rendered(Address(number, 0, 0), 0.1):
        moved.delta[name][:] = (tensor - anchor.tensor(name)).reshape(-1).numpy()
    return export(moved, weights).name


def made_by_a_round(service: Service, digest: str, number: int) -> None:
    """A finished round on GSM8K, from the original model, that made the digest."""
    run, anchor = f"{number:04d}-gsm8k", service.origin.digest
    service.journal.open_run(
        run, anchor_digest=anchor, parent_digest=anchor, target="gsm8k", run_seed=number, plan={},
        now=1.0,
    )  # fmt: skip
    service.journal.finish(run, digest, "a test", 2.0)
