"""What a round of a model would take on GPUs that need not be here, from stated or measured rates.

With d parameters of w bytes in t tensors, d_T of them on each of an engine's T ranks
(``capacity``), N members of P prompts in A pairs, E engines of T GPUs, everything in seconds, bytes
and bytes a second, and delta on the accelerator:

    step       = max((W + B c k) / T / (share bandwidth), 2 d B / (T flops share)) + step_s
    generate   = P answer / B * step + 2 d P prompt / (T flops share)
    render     = max(d_T / draws_s, (2 w + 4) d_T / (share bandwidth), t launch_s)
    update     = max(A d_T / draws_s, 8 d_T / (share bandwidth), 2 t launch_s)
    hash       = max(4 d_T / (share bandwidth), t launch_s)
    generation = ceil(N / E) (generate + render) + update + hash

W are the bytes of the weights, B the sequences of a batch, c their mean length and k the cache of a
token; draws_s is normals_s or signs_s, by the kind of noise (``learner.noise``). The host launches
the kernels of a pass without waiting for any of them (an update also sums its squares), so that the
slowest of the three counts. Where a rank does not know its windows (d_T = d) a member is put in by
vLLM's reload: + t reload_s + 2 W / T / (share bandwidth). With delta on the host render, update and
hash run on its cores, and W crosses the link for every member. Every engine draws the noise of all
A pairs in an update, so that part is not divided by E.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import ceil
from pathlib import Path
from typing import Any

from agent.errors import UserError
from agent.learner.noise import NoiseKind
from agent.population.capacity import (
    GIB,
    Device,
    ModelSize,
    gib,
    gpu_bytes,
    host_bytes,
    size_of,
    size_of_config,
    vllm_share,
)
from agent.population.placement import ALONE
from agent.sections import LearnerSettings, ModelSettings
from agent.sections_running import EngineSettings
from agent.store.anchor import Anchor
from deploy.model import resolve
from flows.learn.plan import chosen

PUBLISHED: Mapping[str, Mapping[str, Any]] = {  # numbers of their config.json
    "Qwen/Qwen2.5-3B-Instruct": {
        "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008,
        "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "vocab_size": 151936,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "tie_word_embeddings": False, "vocab_size": 152064,
    },
    "meta-llama/Llama-3.1-70B-Instruct": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
        "tie_word_embeddings": False, "vocab_size": 128256,
    },
}  # fmt: skip
LEAF = 1 << 16  # elements of a leaf of delta's hash, 8 bytes of which cross the bus
HALF = 0.5  # an engine pays while all of them do at least this share of their own rate


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU by its data sheet."""

    memory: int  # bytes that the driver reports
    bandwidth: float  # bytes/s
    flops: float  # dense bfloat16


GPUS = {
    "h100": Gpu(81_559 << 20, 3.35e12, 989e12),
    "h200": Gpu(143_771 << 20, 4.8e12, 989e12),
}


@dataclass(frozen=True, slots=True)
class GpuRates:
    """What seconds follow from. Nothing of a GPU was measured: these are assumed until stated."""

    normals_s: float = 1e11  # normals drawn by the Triton kernels of one GPU
    signs_s: float = 2e11  # of Rademacher noise: twice the normals, as measured on one CPU core
    share: float = 0.6  # of a GPU's bandwidth and FLOPs that is reached
    step_s: float = 0.004  # of one engine step beside its reads: Python, launches, sampling
    launch_s: float = 1e-4  # host seconds a tensor and kernel
    reload_s: float = 8e-4  # host seconds a tensor of vLLM's reload: measured on a CPU
    link: float = 25e9  # bytes/s between host and GPU
    cores: float = 16.0  # of the host, for each GPU
    core_render: float = 0.8e9  # parameters/s: measured on one core, as are the next two
    core_normals_s: float = 0.65e9
    core_signs_s: float = 1.3e9
    core_sha256: float = 1.7e9  # bytes/s
    prompt_tokens: float = 200.0
    answer_tokens: float = 512.0

    def draws(self, noise: NoiseKind) -> tuple[float, float]:
        """Numbers a second of one GPU and of one core of the host."""
        normals, signs = (self.normals_s, self.core_normals_s), (self.signs_s, self.core_signs_s)
        return normals if noise == "normal" else signs


@dataclass(frozen=True, slots=True)
class Fleet:
    """The GPUs of a plan and how engines share them."""

    gpu: str = "h100"
    gpus: int = 1  # of one node
    ranks: int = 1  # of each engine
    host_gib: float = 2048.0  # memory of the node
    share: float = ALONE  # of each GPU, for its engine

    @property
    def engines(self) -> int:
        """Engines with GPUs of their own."""
        return self.gpus // self.ranks


@dataclass(frozen=True, slots=True)
class Work:
    """What a generation asks of the engines."""

    members: int
    prompts: int
    generations: int
    max_num_seqs: int
    max_model_len: int
    mirrored: bool = False  # two members to a pair
    noise: NoiseKind = "normal"

    @property
    def pairs(self) -> int:
        """Noise addresses of a generation."""
        return self.members // 2 if self.mirrored else self.members


def work_of(changes: Mapping[str, Any]) -> Work:
    """The work of a generation by the defaults for real models, with these of the learner's."""
    learner, engines = chosen(LearnerSettings(), changes), EngineSettings()
    prompts = min(learner.batch or learner.prompts, learner.prompts)
    length = ModelSettings().max_model_len
    rounds = learner.generations, engines.max_num_seqs, length
    return Work(learner.population, prompts, *rounds, learner.mirrored, learner.noise)


def known_size(model: str) -> ModelSize:
    """The size of a published model by name, a config.json, or a model directory.

    Raises:
        UserError: Neither.
    """
    for name, config in PUBLISHED.items():
        if model.lower() in (name.lower(), name.split("/")[1].lower()):
            return size_of_config(config)
    if model.endswith(".json"):
        try:
            return size_of_config(json.loads(Path(model).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"{model}: {error}") from None
    return size_of(Anchor.open(resolve(ModelSettings(path=model), Path(".anchorage/models"))))


def with_stated(rates: GpuRates, stated: Sequence[str]) -> GpuRates:
    """GpuRates with 'name=value' or a JSON file of measured ones put over them.

    Raises:
        UserError: An unknown name, or no number above 0.
    """
    known = {field.name for field in fields(GpuRates)}
    values: dict[str, float] = {}
    for each in stated:
        if each.endswith(".json"):
            measured = json.loads(Path(each).read_text(encoding="utf-8")).get("rates", {})
            values |= {name: value for name, value in measured.items() if name in known}
            continue
        name, _, text = each.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if name not in known or not value > 0:
            raise UserError(f"--rate {each!r}: allowed: {', '.join(sorted(known))} = above 0")
        values[name] = value
    return replace(rates, **values)


def bus_bytes(size: ModelSize, device: Device) -> dict[str, int]:
    """Bytes that cross between the host and one GPU: a member, and a generation's update and hash.

    With delta on the accelerator a generation brings back two sums of 8 bytes a tensor and the
    leaves of the hash (an upper bound: each tensor ends in a leaf of its own).
    """
    if device == "cpu":
        return {"member": size.weight_bytes, "generation": 0}
    leaves = size.tensors + size.parameters // LEAF
    return {"member": 0, "generation": 16 * size.tensors + 8 * leaves}


def fits(size: ModelSize, fleet: Fleet, tokens: int) -> tuple[Device | None, dict[str, Any]]:
    """Where delta lies (None: the model is refused), and the bytes by part of every way tried."""
    memory, tried = GPUS[fleet.gpu].memory, {}
    for device in ("cuda", "cpu"):
        on_gpu = gpu_bytes(size, fleet.ranks, device, tokens)
        on_host = host_bytes(size, fleet.engines, fleet.ranks, device, on_gpu=True)
        room = {"gpu": fleet.share * memory, "host": fleet.host_gib * GIB}
        tried[device] = {"gpu": on_gpu, "host": on_host, "room": room}
        enough = sum(on_gpu.values()) <= room["gpu"] and sum(on_host.values()) <= room["host"]
        if enough and fleet.engines:
            return device, tried
    return None, tried


@dataclass(frozen=True, slots=True)
class Seconds:
    """Parts of a generation on one engine."""

    generate: float  # a member's answers
    render: float  # a member's weights
    update: float  # a generation's
    hash: float

    def generation(self, members: int, engines: int) -> float:
        """All of a generation."""
        turns = ceil(members / engines)
        return turns * (self.generate + self.render) + self.update + self.hash

    def weight_share(self, members: int, engines: int) -> float:
        """The share of it that is spent on weights."""
        spent = ceil(members / engines) * self.render + self.update + self.hash
        return spent / self.generation(members, engines)


def seconds_of(
    size: ModelSize, fleet: Fleet, work: Work, rates: GpuRates, device: Device
) -> tuple[Seconds, list[str]]:
    """The parts of a generation, and each part's arithmetic as a line."""
    gpu, ranks = GPUS[fleet.gpu], fleet.ranks
    read, compute = rates.share * gpu.bandwidth, rates.share * gpu.flops * ranks
    d, t, weights = size.parameters, size.tensors, size.weight_bytes
    width = weights / d
    batch = _batch(size, fleet, work, rates, device)
    context = rates.prompt_tokens + rates.answer_tokens / 2
    moved = (weights + batch * context * size.kv_bytes) / ranks / read
    step = max(moved, 2 * d * batch / compute) + rates.step_s
    prefill = 2 * d * work.prompts * rates.prompt_tokens / compute
    steps = work.prompts * rates.answer_tokens / batch
    generate = steps * step + prefill
    lines = [
        f"batch = {batch} sequences; step = {moved:.4f} s of reads + {rates.step_s:g} s",
        f"generate = {steps:.0f} steps * {step:.4f} s + {prefill:.2f} s of prompts = "
        f"{generate:.2f} s",
    ]
    launches = t * rates.launch_s
    held = size.on_rank(ranks)
    whole = ranks > 1 and not size.split
    gpu_draws, core_draws = rates.draws(work.noise)
    if device == "cuda":
        drawn, passed = held / gpu_draws, (2 * width + 4) * held / read
        reload = t * rates.reload_s + 2 * weights / ranks / read if whole else 0.0
        render = max(drawn, passed, launches) + reload
        drawing, moving = work.pairs * drawn, 8 * held / read
        updated = max(drawing, moving, 2 * launches)
        hashed = max(4 * held / read, launches)
        lines += [
            f"parameters of theta on a rank = {held:,} of {d:,}",
            f"render = max({drawn:.3f} s drawing, {passed:.3f} s memory, {launches:.3f} s launches)"
            f" + {reload:.3f} s vLLM's reload = {render:.3f} s",
            f"update = max({work.pairs} * {drawn:.3f}, {moving:.3f}, {2 * launches:.3f}) = "
            f"{updated:.2f} s on every engine",
            f"hash = max({4 * held / read:.3f}, {launches:.3f}) = {hashed:.3f} s",
        ]
    else:
        cores = rates.cores * ranks
        drawn, crossed = ranks * held / (rates.core_render * cores), weights / rates.link
        render = drawn + crossed + t * rates.reload_s
        updated = ranks * work.pairs * held / (core_draws * cores)
        hashed = ranks * 4 * held / (rates.core_sha256 * cores)
        lines += [
            f"render = {drawn:.2f} s on {cores:g} cores + {crossed:.2f} s over the link + "
            f"{t * rates.reload_s:.2f} s vLLM's reload = {render:.2f} s",
            f"update = {updated:.2f} s and hash = {hashed:.2f} s on {cores:g} cores",
        ]
    return Seconds(generate, render, updated, hashed), lines


def _batch(size: ModelSize, fleet: Fleet, work: Work, rates: GpuRates, device: Device) -> int:
    """Sequences that run at once: the setting, the prompts, or what vLLM's cache has room for."""
    memory = GPUS[fleet.gpu].memory
    share = vllm_share(fleet.share, size, fleet.ranks, memory) if device == "cuda" else fleet.share
    own = gpu_bytes(size, fleet.ranks, "cpu", 0)
    ranks = min(fleet.ranks, size.kv_heads)
    length = rates.prompt_tokens + rates.answer_tokens
    room = (share * memory - sum(own.values())) / (length * size.kv_bytes / ranks)
    return max(1, min(work.max_num_seqs, work.prompts, int(room)))


def engines_that_pay(seconds: Seconds, members: int) -> int:
    """The most engines that still shorten a generation and do at least half of their own rate."""
    one = seconds.generation(members, 1)
    paying = 1
    for engines in range(2, members + 1):
        took = seconds.generation(members, engines)
        shorter = took < seconds.generation(members, paying)
        if shorter and one / took >= HALF * engines:
            paying = engines
    return paying


def plan_model(model: str, fleet: Fleet, work: Work, rates: GpuRates) -> dict[str, Any]:
    """The whole plan as plain values.

    Raises:
        UserError: An unknown model or GPU, or fewer GPUs than an engine's ranks.
    """
    if fleet.gpu not in GPUS:
        raise UserError(f"--gpu {fleet.gpu!r}: allowed: {', '.join(GPUS)}")
    if not fleet.engines:
        raise UserError(f"--gpus {fleet.gpus}: allowed: {fleet.ranks} or more, an engine's ranks")
    size = known_size(model)
    device, bytes_tried = fits(size, fleet, work.max_model_len)
    document: dict[str, Any] = {
        "model": model,
        "size": asdict(size),
        "fleet": asdict(fleet) | {"engines": fleet.engines},
        "work": asdict(work),
        "rates": asdict(rates),
        "bytes": bytes_tried,
        "device": device,
    }
    if device is None:
        return document | {"refused": _refusal(model, fleet, bytes_tried)}
    seconds, arithmetic = seconds_of(size, fleet, work, rates, device)
    mirrored, _ = seconds_of(size, fleet, replace(work, mirrored=True), rates, device)
    generation = seconds.generation(work.members, fleet.engines)
    return document | {
        "bus": bus_bytes(size, device),
        "seconds": asdict(seconds)
        | {"generation": generation, "round": generation * work.generations},
        "weight_share": seconds.weight_share(work.members, fleet.engines),
        "weight_share_mirrored": mirrored.weight_share(work.members, fleet.engines),
        "engines_that_pay": engines_that_pay(seconds, work.members),
        "arithmetic": arithmetic,
    }


def _refusal(model: str, fleet: Fleet, tried: Mapping[str, Any]) -> str:
    """One line with the numbers of both places."""
    ways = []
    for device, need in tried.items():
        at = "on the GPU" if device == "cuda" else "on the host"
        each = [
            f"{where} {gib(sum(need[where].values()))} of {gib(need['room'][where])}"
            for where in ("gpu", "host")
        ]
        ways.append(f"delta {at}: {', '.join(each)}")
    return (
        f"{model}: does not fit {fleet.gpus} x {fleet.gpu}, {fleet.ranks} to an engine "
        f"({'; '.join(ways)})"
    )
