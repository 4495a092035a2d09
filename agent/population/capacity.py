"""What engines need of a machine: bytes on each GPU and on the host, and the line for what cannot.

For d parameters of w bytes, T tensor-parallel ranks, and delta on the accelerator, a GPU holds

    weights   w d / T     vLLM's
    anchor    w d_T       of the windows that the rank renders
    delta     4 d_T
    cache     tokens * kv / min(T, heads)      of one sequence at least
    working   WORKING     context, graphs and activations of vLLM: assumed, not measured

    d_T = vectors + keys / min(T, heads) + (d - vectors - keys) / T

vectors are the tensors of one dimension, counted whole, keys the projections to keys and values,
whose heads several ranks share where there are fewer of them. A model whose layers ``layout`` does
not know to split is rendered whole on every rank: d_T = d. With delta on the host the GPU holds
neither anchor nor delta, and each rank holds 4 d_T there.
"""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import TYPE_CHECKING, Any, Literal

import psutil

from agent.errors import UserError
from agent.population.placement import EngineOptions, available_cores, gpu_count, on_cpu

if TYPE_CHECKING:  # the caller's side of an engine imports no torch
    from agent.store.anchor import Anchor

GIB = 2**30
WORKING = 2 * GIB
PROCESS = GIB // 2  # of an engine's process on the host, beyond what it shares with the launcher
CACHE = GIB // 2  # of an engine on the CPU (`EngineOptions.kv_cache_mib`)
KEYS = ("k_proj.weight", "v_proj.weight")
SPLIT = frozenset(  # modules of dense Llama-like models, whose windows ``layout`` knows
    f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
) | {"embed_tokens", "lm_head"}
SMI = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")  # MiB a line

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The numbers of a model that bytes and seconds follow from."""

    parameters: int
    tensors: int
    weight_bytes: int  # all parameters in the published dtype
    kv_bytes: int  # keys and values of one token, all layers, on one rank alone
    kv_heads: int
    vectors: int = 0  # parameters in tensors of one dimension, which every rank holds
    keys: int = 0  # parameters of the projections to keys and values
    split: bool = True  # whether a rank holds its windows alone

    def on_rank(self, ranks: int) -> int:
        """Parameters of theta that each of so many ranks renders and moves."""
        if ranks == 1 or not self.split:
            return self.parameters
        rest = self.parameters - self.vectors - self.keys
        return self.vectors + ceil(self.keys / min(ranks, self.kv_heads)) + ceil(rest / ranks)


@dataclass(frozen=True, slots=True)
class Machine:
    """What engines find where they are to run."""

    on_cpu: bool  # whether vLLM's CPU build is installed
    cores: int
    memory: int  # bytes of the host
    gpus: int = 0
    gpu_memory: int | None = None  # bytes of the smallest of them, if known

    @classmethod
    def here(cls) -> "Machine":
        """This machine."""
        memory, cores = psutil.virtual_memory().total, len(available_cores())
        return cls(on_cpu(), cores, memory, gpu_count(), gpu_memory())


def size_of(anchor: "Anchor") -> ModelSize:
    """The size of a model directory, from its config and the headers of its files."""
    config = json.loads((anchor.directory / "config.json").read_text(encoding="utf-8"))
    stored = sum(tensor.nbytes for _, tensor in anchor.tensors())
    shapes = {name: shape for name, (shape, _) in anchor.specs.items()}
    matrices = {name.split(".")[-2]: prod(s) for name, s in shapes.items() if len(s) > 1}
    return replace(
        _sized(config, anchor.parameters, len(anchor.names), stored),
        vectors=sum(prod(shape) for shape in shapes.values() if len(shape) < 2),
        keys=sum(prod(s) for n, s in shapes.items() if n.endswith(KEYS)),
        split=matrices.keys() <= SPLIT,
    )


def size_of_config(config: Mapping[str, Any]) -> ModelSize:
    """The size of a dense Llama-like model (Llama, Qwen2, Qwen3, Mistral) from its config alone.

    hidden h, intermediate i, layers L, vocabulary V, a query and k key-value heads of size c:

        d = V h (twice if untied) + L (h c (2 a + 2 k) + 3 h i + 2 h + biases + head norms) + h

    Raises:
        UserError: The config lacks one of these numbers, or has experts.
    """
    if missing := [name for name in _NUMBERS if name not in config]:
        raise UserError(f"config.json: {', '.join(missing)} missing, allowed: a dense Llama-like")
    if any("experts" in name for name in config):
        raise UserError("config.json: has experts; allowed without its weights: a dense model")
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    heads, kv = int(config["num_attention_heads"]), _kv_heads(config)
    size, inner = _head_size(config), int(config["intermediate_size"])
    kind = config.get("model_type")
    bias = size * (heads + 2 * kv) if kind == "qwen2" or config.get("attention_bias") else 0
    normed = 2 * size if kind == "qwen3" else 0  # norms of the queries' and keys' heads
    layer = 2 * hidden * size * (heads + kv) + 3 * hidden * inner + 2 * hidden + bias + normed
    tables = 1 if config.get("tie_word_embeddings") else 2
    parameters = tables * int(config["vocab_size"]) * hidden + layers * layer + hidden
    tensors = tables + layers * (9 + 3 * bool(bias) + 2 * bool(normed)) + 1
    return replace(
        _sized(config, parameters, tensors, 2 * parameters),
        vectors=layers * (2 * hidden + bias + normed) + hidden,
        keys=layers * 2 * hidden * size * kv,
    )


_NUMBERS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)


def _sized(config: Mapping[str, Any], parameters: int, tensors: int, stored: int) -> ModelSize:
    """A size, with the cache of a token in two bytes a number."""
    text = config.get("text_config") or config
    layers, kv = int(text.get("num_hidden_layers", 0)), _kv_heads(text)
    return ModelSize(parameters, tensors, stored, 2 * 2 * layers * kv * _head_size(text), kv)


def _kv_heads(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config.get("num_attention_heads") or 1)


def _head_size(config: Mapping[str, Any]) -> int:
    heads = int(config.get("num_attention_heads") or 1)
    return int(config.get("head_dim") or int(config.get("hidden_size", 0)) // heads)


def gpu_bytes(
    size: ModelSize, ranks: int, device: Device, tokens: int, weighted: bool = False
) -> dict[str, int]:
    """What one population engine needs of each of its GPUs, by part, in bytes.

    Args:
        device: Where delta lies.
        tokens: Of the longest sequence, whose cache must fit.
        weighted: Whether a penalty has importance weights.
    """
    need = {
        "weights": size.weight_bytes // ranks,
        "cache of one sequence": tokens * size.kv_bytes // min(ranks, size.kv_heads),
        "working": WORKING,
    }
    return need | (master_bytes(size, ranks, weighted) if device == "cuda" else {})


def master_bytes(size: ModelSize, ranks: int, weighted: bool = False) -> dict[str, int]:
    """What theta takes beside vLLM's weights on each rank of an engine, by part, in bytes."""
    held = size.on_rank(ranks)
    anchor, floats = size.weight_bytes * held // size.parameters, 4 * held
    return {"anchor": anchor, "delta": floats} | ({"importance": floats} if weighted else {})


def host_bytes(
    size: ModelSize, engines: int, ranks: int, device: Device, on_gpu: bool
) -> dict[str, int]:
    """What population engines of one node need of its memory together, by part, in bytes.

    The mapped anchor is one copy for all, in pages that the system may drop; it is not counted.
    """
    need = {"processes": engines * PROCESS}
    if device == "cpu":
        need["delta"] = engines * ranks * 4 * size.on_rank(ranks)
    if not on_gpu:
        need |= {"weights": engines * size.weight_bytes, "cache": engines * CACHE}
    return need


def refuse_small(what: str, need: Mapping[str, int], room: float, has: str) -> None:
    """One line where the parts of a need are more than there is room for.

    Args:
        what: The setting and its value.
        room: Bytes.
        has: What the room is.

    Raises:
        UserError: They are; it says every part.
    """
    if (total := sum(need.values())) > room:
        parts = ", ".join(f"{name} {gib(size)}" for name, size in need.items())
        raise UserError(f"{what}: needs {gib(total)} ({parts}), allowed here: {gib(room)} ({has})")


def gib(size: float) -> str:
    """Bytes for a reader."""
    return f"{size / GIB:.1f} GiB"


def gpu_memory() -> int | None:
    """Bytes of the smallest GPU of this machine; None where nothing says so.

    Asked of the driver's own tool: to ask CUDA would take hold of a GPU in this process.
    """
    try:
        told = subprocess.run(SMI, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return min((int(line) << 20 for line in told.split() if line.isdecimal()), default=None)


def vllm_share(
    share: float, size: ModelSize, ranks: int, memory: int, weighted: bool = False
) -> float:
    """vLLM's part of an engine's share of a GPU, theta's own bytes taken off.

    vLLM takes all of the share that it is given for weights and cache, so that what it is not told
    of would not fit afterwards.
    """
    return share - sum(master_bytes(size, ranks, weighted).values()) / memory


def share_of(options: EngineOptions) -> float:
    """vLLM's part of the engine's share of a GPU: what theta takes is not vLLM's to fill."""
    from agent.store.anchor import Anchor

    memory = gpu_memory()
    if options.master_device == "cpu" or memory is None:
        return options.gpu_memory_utilization
    size, weighted = size_of(Anchor.open(options.model)), options.weighted
    size = replace(size, split=size.split and options.way == "short")
    ranks = options.tensor_parallel
    need = gpu_bytes(size, ranks, "cuda", 1, weighted)
    room = options.gpu_memory_utilization * memory
    refuse_small("engines.master_device: 'cuda': a GPU", need, room, f"of {gib(memory)}")
    return vllm_share(options.gpu_memory_utilization, size, ranks, memory, weighted)
