"""`make gpu`: the kernels and theta on the CUDA device of this machine, a piece at a time.

    python -m flows.lab.bench.gpu bits|speed|place|memory|demo|table [--out build/gpu.json]

Each piece takes less than ten minutes and adds its figures to one JSON file; `table` prints them as
Markdown. All but `demo` need numpy, numba, torch, triton and safetensors alone. The file is also
one that `anchorage plan MODEL --rate build/gpu.json` takes its rates from.

    bits     elements that differ from the CPU's kernels, which are the definition: 0 is right
    speed    normals/s and bytes/s of every kernel, beside torch's copy and torch.randn + add
    place    members rendered into a layer's own rows under a CUDA graph: what replays is the member
    memory   peak of the device and bytes over the bus, beside what `anchorage plan` says
    demo     the whole loop, where vLLM's CUDA build is installed
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from agent.errors import UserError
from agent.learner.es import Step, members, step
from agent.learner.noise import Address, NoiseKind, Runs
from agent.learner.penalty import PENALTIES, Penalty

HERE = Address(11, 3, 2)
PAIRS = 30  # of a step, as the paper's
DEMO_S = 540
REPEATS = 5


class Device:
    """The device that is measured, how large tensors are on it, and how to wait for it."""

    def __init__(self, name: str, elements: int):
        self.name, self.elements = name, elements
        self.cuda = name == "cuda"

    def wait(self) -> None:
        """Until everything launched is done."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """The shortest of some runs, after one that compiles."""
        work()
        self.wait()
        took = []
        for _ in range(REPEATS if self.cuda else 1):
            begun = perf_counter()
            work()
            self.wait()
            took.append(perf_counter() - begun)
        return min(took)

    def peak(self, work: Callable[[], object]) -> int:
        """Bytes that the device held at most while this ran; 0 where nobody counts them."""
        if not self.cuda:
            work()
            return 0
        torch.cuda.reset_peak_memory_stats()
        work()
        return int(torch.cuda.max_memory_allocated())


def a_step(noise: NoiseKind = "normal", penalty: Penalty | None = None) -> Step:
    """A step of ``PAIRS`` members with different rewards."""
    return step(
        np.random.default_rng(1).random(PAIRS), members(PAIRS, False), run_seed=3, generation=1,
        sigma=0.01, alpha=0.01, noise=noise, penalty=penalty or Penalty("l2", 5.0),
    )  # fmt: skip


def arrays(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(anchor, delta), float32 (count,); a fifth of delta is 0."""
    chance = np.random.default_rng(count)
    delta = 0.01 * chance.standard_normal(count) * (chance.random(count) < 0.8)
    return chance.standard_normal(count).astype(np.float32), delta.astype(np.float32)


def bits(device: Device) -> dict[str, Any]:
    """Elements of every kernel's result that differ from the CPU's, by case; and their sum."""
    from agent.learner import kernels_cpu, kernels_triton

    anchor, delta = arrays(device.elements)
    differing = {}
    for kind in ("normal", "rademacher"):
        wanted = np.empty_like(delta)
        kernels_cpu.noise_into(wanted, HERE, "w", 5, kind)
        found = torch.empty(len(delta), device=device.name)
        kernels_triton.noise_into(found, HERE, "w", 5, kind)
        differing[f"noise {kind}"] = _differing(found, torch.from_numpy(wanted))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            base = torch.from_numpy(anchor).to(dtype)
            lifted = base.float().numpy()
            kernels_cpu.render_into(wanted, lifted, delta, HERE, "w", 5, 0.01, kind)
            out = torch.empty_like(base, device=device.name)
            there = (base.to(device.name), torch.from_numpy(delta).to(device.name))
            kernels_triton.render_into(out, *there, HERE, "w", Runs(5), 0.01, kind)
            case = f"render {kind} {str(dtype).removeprefix('torch.')}"
            differing[case] = _differing(out, torch.from_numpy(wanted).to(dtype))
        for penalty in PENALTIES:
            made = a_step(kind, Penalty(penalty, 0.5 if penalty == "l1" else 5.0, 0.004, 0.3))
            moved, there_delta = delta.copy(), torch.from_numpy(delta.copy()).to(device.name)
            kernels_cpu.update_inplace(moved, "w", 5, made)
            kernels_triton.update_inplace(there_delta, "w", Runs(5), made)
            differing[f"update {kind} {penalty}"] = _differing(there_delta, torch.from_numpy(moved))
    leaves = kernels_triton.tree_leaves(torch.from_numpy(delta).to(device.name)).cpu().numpy()
    differing["leaves"] = int((leaves.view(np.uint32) != kernels_cpu.tree_leaves(delta)).sum())
    return {"elements": device.elements, "differing": differing, "sum": sum(differing.values())}


def _differing(found: torch.Tensor, wanted: torch.Tensor) -> int:
    """Elements whose bits differ."""
    kind = {2: torch.int16, 4: torch.int32}[wanted.element_size()]
    return int((found.cpu().view(kind) != wanted.view(kind)).sum())


def speed(device: Device) -> dict[str, Any]:
    """Rates of every kernel over one large tensor, and the host's seconds of a launch."""
    from agent.learner import kernels_triton as kernels

    count = device.elements
    delta = torch.zeros(count, device=device.name)
    anchor = torch.randn(count, device=device.name).bfloat16()
    out, plain = torch.empty_like(anchor), torch.empty_like(delta)
    made = a_step()
    seconds = {
        "copy": device.seconds(lambda: plain.copy_(delta)),
        "randn + add": device.seconds(lambda: plain.add_(torch.randn_like(plain))),
        "noise": device.seconds(lambda: kernels.noise_into(plain, HERE, "w", 0, "normal")),
        "render": device.seconds(
            lambda: kernels.render_into(out, anchor, delta, HERE, "w", Runs(), 0.01, "normal")
        ),
        "update": device.seconds(lambda: kernels.update_inplace(delta, "w", Runs(), made)),
        "update of signs": device.seconds(
            lambda: kernels.update_inplace(delta, "w", Runs(), a_step("rademacher"))
        ),
        "hash": device.seconds(lambda: kernels.tree_leaves(delta)),
    }
    moved = {"copy": 8, "randn + add": 16, "noise": 4, "render": 8, "hash": 4}
    drawn = {"randn + add": 1, "noise": 1, "render": 1, "update": PAIRS, "update of signs": PAIRS}
    bandwidth = 8 * count / seconds["copy"]
    rows = {
        name: {
            "seconds": took,
            "draws_s": drawn.get(name, 0) * count / took,
            "bytes_s": moved.get(name, 8) * count / took,
            "of_copy": moved.get(name, 8) * count / took / bandwidth,
        }
        for name, took in seconds.items()
    }
    return {"elements": count, "kernels": rows, "launch_s": _launch(device)}


def _launch(device: Device) -> float:
    """Host seconds of one render of a tensor that costs the device nothing."""
    from agent.learner import kernels_triton as kernels

    many = 200 if device.cuda else 2
    delta = torch.zeros(256, device=device.name)
    out, words = torch.empty_like(delta), kernels.words_of([HERE], ["w"], delta.device)[0]

    factor = torch.full((1,), 0.01, device=device.name)

    def launches() -> None:
        for _ in range(many):
            kernels.render_into(out, delta, delta, HERE, "w", Runs(), 0.01, "normal", words, factor)

    return device.seconds(launches) / many


def place(device: Device) -> dict[str, Any]:
    """Members rendered into rows of a fused layer; on CUDA its product is a captured graph."""
    from agent.learner import kernels_triton as kernels

    wide = max(16, int(device.elements**0.5) // 16 * 16)
    fused = torch.zeros(2 * wide, wide, device=device.name, dtype=torch.bfloat16)
    anchor = torch.randn(wide * wide, device=device.name).bfloat16()
    delta = torch.zeros(wide * wide, device=device.name)
    given = torch.randn(4, wide, device=device.name).bfloat16()
    rows, storage = fused[wide:].view(-1), fused.data_ptr()
    asked = _captured(device, lambda: given @ fused.T)
    wrong = 0
    for pair in range(3):
        at = Address(1, 0, pair)
        kernels.render_into(rows, anchor, delta, at, "w", Runs(), 0.01, "normal")
        alone = torch.empty_like(anchor)
        kernels.render_into(alone, anchor, delta, at, "w", Runs(), 0.01, "normal")
        answer = asked().clone()
        wrong += int((fused[wide:].reshape(-1) != alone).sum()) + int(fused[:wide].count_nonzero())
        wrong += int((answer != given @ fused.T).sum())
    same = fused.data_ptr() == storage
    return {"members": 3, "graph": device.cuda, "wrong": wrong, "storage_kept": same}


def _captured(device: Device, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The same work as a CUDA graph that was captured once; without CUDA the work itself."""
    if not device.cuda:
        return work
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(beside):  # PyTorch wants the work warmed up on another stream
        work()
    device.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()

    def replayed() -> torch.Tensor:
        graph.replay()
        return out

    return replayed


def memory(device: Device) -> dict[str, Any]:
    """What theta takes of the device and the bus, over a model of ``elements`` parameters."""
    from safetensors.torch import save_file

    from agent.store.anchor import Anchor
    from agent.store.device import Bus, DeviceParameters

    with tempfile.TemporaryDirectory() as folder:
        each = device.elements // 8
        tensors = {f"model.layers.{n}.w.weight": torch.randn(each).bfloat16() for n in range(8)}
        save_file(tensors, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text("{}")
        anchor, bus = Anchor.open(Path(folder)), Bus(device.name)
        held: list[DeviceParameters] = []
        opened = device.peak(lambda: held.append(DeviceParameters(anchor, bus)))
        theta = held[0]
        crossed = bus.to_device, bus.to_host

        def member() -> None:
            for _ in theta.rendered(HERE, 0.01):
                pass

        rendered, members_crossed = device.peak(member), (bus.to_device, bus.to_host)
        applied = device.peak(lambda: theta.apply(a_step()))
        reset = device.peak(lambda: theta.reset(None))
    return {
        "parameters": anchor.parameters,
        "planned_bytes": 6 * anchor.parameters,
        "peak_bytes": {"open": opened, "member": rendered, "step": applied, "restore": reset},
        "bus": {
            "open": crossed[0],
            "member": sum(members_crossed) - sum(crossed),
            "generation": bus.to_device + bus.to_host - sum(members_crossed),
        },
    }


def demo(_device: Device) -> dict[str, Any]:
    """The whole loop, where vLLM is installed for CUDA; what was missing where it is not."""
    if find_spec("vllm") is None or torch.version.cuda is None:
        return {"ran": False, "why": "vLLM's CUDA build is not installed"}
    begun = perf_counter()
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "flows.cli", "demo", "--home", f"{home}/demo"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEMO_S)
    last = (ran.stdout or ran.stderr).strip().splitlines()[-5:]
    return {"ran": True, "code": ran.returncode, "seconds": perf_counter() - begun, "last": last}


PIECES = {"bits": bits, "speed": speed, "place": place, "memory": memory, "demo": demo}


def add_piece(name: str, device: Device, out: Path) -> dict[str, Any]:
    """Run one piece and put its figures, and the rates that follow, into the file."""
    document: dict[str, Any] = json.loads(out.read_text("utf-8")) if out.exists() else {}
    named = torch.cuda.get_device_name(0) if device.cuda else "no GPU: Triton's interpreter"
    document |= {"device": named, "torch": torch.__version__}
    document[name] = PIECES[name](device)
    if name == "speed":
        kernels = document["speed"]["kernels"]
        document["rates"] = {
            "normals_s": kernels["update"]["draws_s"],
            "signs_s": kernels["update of signs"]["draws_s"],
            "launch_s": document["speed"]["launch_s"],
        }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def sound(document: Mapping[str, Any]) -> bool:
    """Whether nothing that was measured contradicts what is promised."""
    wrong = document.get("bits", {}).get("sum", 0) + document.get("place", {}).get("wrong", 0)
    kept = document.get("place", {}).get("storage_kept", True)
    crossed = document.get("memory", {}).get("bus", {}).get("member", 0)
    return bool(not wrong and kept and not crossed and not document.get("demo", {}).get("code", 0))


def table(document: Mapping[str, Any]) -> str:
    """The figures as a Markdown table, one row a figure."""
    rows = [("device", str(document.get("device")))]
    if found := document.get("bits"):
        cases = f"{found['sum']} of {len(found['differing'])} cases' {found['elements']:,} elements"
        rows.append(("elements that differ from the CPU's", cases))
    for name, each in document.get("speed", {}).get("kernels", {}).items():
        drawn = f"{each['draws_s']:.3g} draws/s, " if each["draws_s"] else ""
        share = f"{100 * each['of_copy']:.0f} % of a copy's"
        rows.append((name, f"{drawn}{each['bytes_s'] / 1e9:.1f} GB/s, {share}"))
    if found := document.get("place"):
        by = "under a CUDA graph" if found["graph"] else "without a graph"
        rows.append(("members rendered in place, elements wrong", f"{found['wrong']} {by}"))
    if found := document.get("memory"):
        peak, planned = max(found["peak_bytes"].values()), found["planned_bytes"]
        rows.append(("peak of theta, MB", f"{peak / 1e6:.0f}, planned {planned / 1e6:.0f}"))
        bus = found["bus"]
        rows.append(("bytes over the bus", f"{bus['member']} a member, {bus['generation']} a step"))
    if found := document.get("demo"):
        text = f"code {found['code']}, {found['seconds']:.0f} s" if found["ran"] else found["why"]
        rows.append(("the demo", text))
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["| what | measured |", "| --- | --- |", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """One piece, or the table of all; 0 where nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m flows.lab.bench.gpu", description=__doc__)
    parser.add_argument("piece", choices=[*PIECES, "table"])
    parser.add_argument("--out", type=Path, default=Path("build/gpu.json"))
    parser.add_argument("--elements", type=int, default=1 << 28)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.piece == "table":
            if not chosen.out.is_file():
                raise UserError(f"{chosen.out}: is not there; allowed: the file of `make gpu`")
            document = json.loads(chosen.out.read_text("utf-8"))
            sys.stdout.write(table(document) + "\n")
        else:
            if chosen.device == "cuda" and not torch.cuda.is_available():
                raise UserError("gpu: no CUDA device is here; allowed: a machine with one")
            if chosen.device == "cpu":
                chosen.elements = min(chosen.elements, 1 << 17)
            device = Device(chosen.device, chosen.elements)
            document = add_piece(chosen.piece, device, chosen.out)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0 if sound(document) else 1


if __name__ == "__main__":
    sys.exit(main())
