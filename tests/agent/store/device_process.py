"""Run beside test_device in a process of its own: a few steps on the device and on the host.

Prints one JSON object {what: same on both}. With a GPU delta lies on it; without one the kernels
run in Triton's interpreter (TRITON_INTERPRET=1, set by the caller before this starts).
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from agent.learner import es
from agent.learner.noise import Address
from agent.learner.penalty import Penalty
from agent.population.capacity import size_of
from agent.store.anchor import keep_importance
from agent.store.device import Bus, DeviceParameters
from agent.store.tensorfile import raw
from agent.store.theta import Theta
from agent.store.weights import Anchor, Parameters, export, verify
from flows.learn.accelerators import bus_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def steps(importance: str) -> list[es.Step]:
    draw = np.random.default_rng(0)
    rewards = [draw.normal(size=4), np.ones(4)]
    return [
        es.step(
            each, es.members(4, True), run_seed=3, generation=number, sigma=0.1, alpha=0.1,
            penalty=Penalty("l2", 2.0, importance=importance),
        )
        for number, each in enumerate(rewards)
    ]  # fmt: skip


def same_norms(one: es.Applied, other: es.Applied) -> bool:
    norms = [
        np.array([each.norm, each.step_norm, *each.layer_norms.values()]) for each in (one, other)
    ]
    return bool(np.allclose(*norms, rtol=1e-12))


def same_tensors(one: Theta, other: Theta, scale: float) -> bool:
    where = Address(1, 2, 3)
    pairs = zip(one.rendered(where, scale), other.rendered(where, scale), strict=True)
    return all(a == b and bytes(raw(x)) == bytes(raw(y)) for (a, x), (b, y) in pairs)


def compare(anchor: Anchor, folder: Path) -> dict[str, bool]:
    weights = {
        name: torch.linspace(0, 2, torch.Size(shape).numel()).view(shape)
        for name, (shape, _) in anchor.specs.items()
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "weights.safetensors")
    kept = folder / "importance"
    digest, _ = keep_importance(anchor, folder / "weights.safetensors", kept)
    host = Parameters.zeros(anchor, kept)
    device = DeviceParameters(anchor, DEVICE, None, kept)
    found = {"zeros": device.digest() == anchor.digest}
    for step in steps(digest):
        other = device.apply(step)
        one = host.apply(step, other.delta_hash)
        found[f"delta {step.generation}"] = one.delta_hash == other.delta_hash
        found[f"norms {step.generation}"] = same_norms(one, other)
    found["member"] = same_tensors(host, device, -0.1)
    found["plain"] = same_tensors(host, device, 0.0)
    device.save(folder / "snapshot.safetensors")
    for again in (
        Parameters.load(anchor, folder / "snapshot.safetensors"),
        DeviceParameters.load(anchor, DEVICE, folder / "snapshot.safetensors"),
    ):
        tree = host.delta_hash("tree-")
        loaded = again.delta_hash(tree) == tree and again.delta_hash("") == host.delta_hash()
        found[f"loaded {type(again).__name__}"] = loaded
        again.reset(None)
        again.reset(folder / "snapshot.safetensors")
        found[f"reset {type(again).__name__}"] = again.delta_hash(tree) == tree
    found |= crossings(anchor, kept, digest) | places(anchor)
    found["export"] = verify(export(device, folder / "weights")) == host.digest()
    return found


def crossings(anchor: Anchor, kept: Path, digest: str) -> dict[str, bool]:
    """What crosses the bus, counted: everything once, then nothing that grows with the model."""
    bus = Bus(DEVICE)
    weights = sum(tensor.nbytes for _, tensor in anchor.tensors())
    theta = DeviceParameters(anchor, bus, None, kept)
    found = {"bus: the anchor, once": (bus.to_device, bus.to_host) == (weights, 0)}
    for member in range(3):
        list(theta.rendered(Address(1, 0, member), 0.1))
    found["bus: nothing for members"] = (bus.to_device, bus.to_host) == (weights, 0)
    for step in steps(digest):
        theta.apply(step)
    floats, names = 4 * anchor.parameters, len(anchor.names)
    found["bus: importance, once"] = bus.to_device == weights + floats
    planned = bus_bytes(size_of(anchor), "cuda")  # what `anchorage plan MODEL` prints
    found["bus: as planned"] = planned["member"] == 0 and bus.to_host == 2 * planned["generation"]
    found["bus: sums and leaves"] = bus.to_host == 2 * names * (2 * 8 + 8)
    theta.reset(None)
    theta.delta_hash("")
    found["bus: all of delta for a sha256"] = bus.to_host == 2 * names * 24 + floats
    return found


def places(anchor: Anchor) -> dict[str, bool]:
    """Members are rendered into memory that an engine names, to the bit."""
    theta, where = DeviceParameters(anchor, DEVICE), (Address(1, 2, 3), 0.1)
    slots = {name: torch.zeros_like(tensor).reshape(-1) for name, tensor in anchor.tensors()}
    slots = {name: slot.to(DEVICE) for name, slot in slots.items()}
    wanted = dict(theta.rendered(*where))
    put = theta.rendered(*where, into=lambda name: None if "norm" in name else slots[name])
    same = all(bytes(raw(tensor)) == bytes(raw(wanted[name])) for name, tensor in put)
    filled = all(
        bytes(raw(slot)) == bytes(raw(wanted[name])) for name, slot in slots.items()
        if "norm" not in name
    )  # fmt: skip
    return {"into slots": same and filled}


if __name__ == "__main__":
    folder, *anchors = map(Path, sys.argv[1:])
    found = {}
    for number, directory in enumerate(anchors):
        compared = compare(Anchor.open(directory), folder / str(number))
        found |= {f"{directory.name} {what}": same for what, same in compared.items()}
    sys.stdout.write(json.dumps(found))
