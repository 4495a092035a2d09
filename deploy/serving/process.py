"""The serving engine as a process: vLLM's OpenAI server on a unix socket of mode 0600.

    python -m deploy.serving.process HOME SLOT [vLLM's own flags; else those of HOME/settings.json]

It serves what serving.json names when it starts (crash-only: a restart needs no arguments of its
own) and listens nowhere but on HOME/sockets/SLOT.sock: vLLM's control routes ask for no key.

Starting is mostly importing. On the CPU the worker runs inside the engine core and the model class
is looked at here instead of in a process of its own; with one OpenMP thread the engine core is
forked from this process instead of importing everything again.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from agent.config import Settings, kept
from agent.errors import UserError
from agent.home import Home, write_atomically
from agent.population.decoding import generation_config
from agent.population.placement import (
    OFFLINE,
    available_cores,
    cpu_runtime,
    on_cpu,
    serving_cores,
)
from agent.population.vllm import import_for_cpu
from agent.population.vllm_arguments import cpu_arguments, extension, model_arguments
from agent.store.weights import identity
from deploy.serving.intact import intact, require_version
from deploy.serving.served import BLUE, Served
from deploy.serving.starts import begin, forget_starts
from deploy.supervise import end_leaderless

LOOPBACK = "127.0.0.1"
UNIX_PATH_BYTES = 107  # longest sun_path, without its ending zero
KV_CACHE_GIB = 1  # of main memory, on the CPU
ASK_S = 0.2  # between two looks whether the server answers


def command(home: Home, settings: Settings, slot: str = BLUE) -> tuple[str, ...]:
    """The argument list that starts a slot's engine."""
    launcher = (sys.executable, "-m", "deploy.serving.process", str(home.root), slot)
    return launcher + flags(settings, cpu=on_cpu())


def flags(settings: Settings, *, cpu: bool) -> tuple[str, ...]:
    """vLLM's own flags, under vLLM's own names."""
    engines, model = settings.engines, settings.model
    device: tuple[str, ...]
    if cpu:
        own = cpu_arguments(model.max_model_len)
        device = ("--enforce-eager", *(_flag(name, value) for name, value in own.items()))
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
        f"--worker-extension-cls={extension(cpu=cpu)}",
        "--enable-prefix-caching",
        "--enable-auto-tool-choice",
        f"--tool-call-parser={model.tool_parser}",
        *((f"--reasoning-parser={model.reasoning_parser}",) if model.reasoning_parser else ()),
        f"--default-chat-template-kwargs={json.dumps(model.chat_template_kwargs)}",
        *_decoding(settings),
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


def _flag(name: str, value: object) -> str:
    """An engine argument as vLLM's command line has it; a truth value is a switch."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    return f"--{dashed}={json.dumps(value) if isinstance(value, dict) else value}"


def _decoding(settings: Settings) -> Iterator[str]:
    """Flags with which this server decodes as the population's engines do."""
    same = generation_config(settings.tasks.generation_config == "model")
    for name, value in same.items():
        yield _flag(name, value)


def _template(home: Home) -> list[str]:
    """The flag of a chat template that is set; its file is written again at every start."""
    if not home.settings_json.is_file() or (text := _settings(home).model.template) is None:
        return []
    write_atomically(home.chat_template, text)
    return [f"--chat-template={home.chat_template}"]


def environment(home: Home, *, cpu: bool) -> dict[str, str]:
    """What the engine's process needs to know beyond its flags."""
    shared = OFFLINE | {
        "VLLM_SERVER_DEV_MODE": "1",  # pause, resume, collective_rpc
        "VLLM_DISABLE_LOG_LOGO": "1",
        "VLLM_LOGGING_COLOR": "0",
        "VLLM_CACHE_ROOT": str(home.vllm_cache),
        # torch runs what it finds there; its default is a folder that any user could have made.
        "TORCHINDUCTOR_CACHE_DIR": str(home.vllm_cache / "torch"),
        "VLLM_HOST_IP": LOOPBACK,  # its processes speak with each other on this machine only
        "GLOO_SOCKET_IFNAME": "lo",
    }
    on_the_cpu = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # lets the worker live inside the engine core
        # vLLM compiles small helpers with g++ when first asked for log-probabilities: seconds in
        # which no request is answered, once per shape, and g++ may not be there.
        "TORCH_COMPILE_DISABLE": "1",
        # Not bound to cores: vLLM would bind two serving engines (blue/green) to the same ones. The
        # population binds its engines to the other half.
        "OMP_NUM_THREADS": str(serving_cores(len(available_cores()))),
    } | cpu_runtime()
    return shared | (on_the_cpu if cpu else {})


def private_socket(path: Path) -> Path:
    """Make the socket's folder 0700 and remove what a killed engine left; the path again."""
    if len(os.fsencode(path)) > UNIX_PATH_BYTES:
        raise UserError(
            f"home: socket path {str(path)!r} has {len(os.fsencode(path))} bytes; "
            f"allowed: {UNIX_PATH_BYTES}, choose a home with a shorter path"
        )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        path.parent.chmod(0o700)
    except PermissionError:
        # A volume that a container mounts belongs to root. The socket itself is born 0600.
        if owner := path.parent.stat().st_uid:
            allowed = f"allowed: {os.getuid()}, or root"
            raise UserError(f"{path.parent}: belongs to user {owner}; {allowed}") from None
    path.unlink(missing_ok=True)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until a signal ends it."""
    parser = argparse.ArgumentParser(prog="deploy.serving.process")
    parser.add_argument("home", type=Path)
    parser.add_argument("slot")
    words = sys.argv[1:] if argv is None else argv
    given, foreign = parser.parse_known_args(words)
    if runtime := cpu_runtime():  # read when a program starts
        os.environ.update(runtime)
        _begin_again(words)
    home = Home.at(given.home)
    if "SUPERVISOR_ENABLED" in os.environ:
        end_leaderless()  # a killed engine's core still holds the accelerator's memory
    begin(home, given.slot)  # before anything is read that may be damaged
    foreign = [*(foreign or flags(_settings(home), cpu=on_cpu())), *_template(home)]
    for name, value in environment(home, cpu=on_cpu()).items():
        os.environ.setdefault(name, value)  # before torch is imported
    fresh = "numba" not in sys.modules
    served = intact(home, given.slot)
    if fresh and "numba" in sys.modules:
        # Weights were rebuilt, with Numba, whose modules vLLM's CPU build fails on when it looks
        # for its kernels in everything imported. All is whole now.
        _begin_again(words)
    path = private_socket(home.engine_socket(given.slot))
    own = [_flag(name, value) for name, value in model_arguments(Path(served.directory)).items()]
    # The model's own last: of a flag that is given twice vLLM takes the last.
    _run(home, [f"--model={served.directory}", f"--uds={path}", *foreign, *own], served)


def _begin_again(words: Sequence[str]) -> None:
    """Start this program anew in the same process; does not return."""
    os.execv(sys.executable, [sys.executable, "-m", "deploy.serving.process", *words])  # noqa: S606


def _settings(home: Home) -> Settings:
    """The settings the service was started with."""
    try:
        return kept(home)
    except FileNotFoundError:
        raise UserError(f"{home.settings_json}: is not there; give vLLM's flags") from None


def _run(home: Home, foreign: Sequence[str], served: Served) -> None:
    """vLLM's api_server, with a private socket and the quick start described above."""
    import uvloop
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    model, before = Path(served.directory), identity(Path(served.directory))
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(list(foreign))
    validate_parsed_serve_args(args)
    if on_cpu():
        import_for_cpu(model)
    usual = os.umask(0o177)  # the socket is born 0600
    address, listener = setup_server(args, reuse_port=False)
    os.umask(usual)
    signal.signal(signal.SIGTERM, _interrupted)  # until uvicorn installs its own

    def check() -> None:
        """The files are those that were hashed before vLLM read them, and still what they were."""
        require_version(home, served)
        if identity(model) != before:
            raise UserError(f"{model}: was changed while the engine loaded it")

    uvloop.run(_serve(args, address, listener, check, lambda: forget_starts(home, served.slot)))


async def _serve(
    args: Any,
    address: str,
    listener: socket.socket,
    check: Callable[[], None],
    ready: Callable[[], None],
) -> None:
    """Start the engine core, check what it loaded, and answer until a signal.

    ``ready`` is called at the first answer, as a client sees it: vLLM's server returns at its end.
    """
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
        check()  # before anybody is answered
        first = asyncio.create_task(_at_first_answer(Path(args.uds), ready))
        await (await build_and_serve(engine, address, listener, args))
        first.cancel()
    finally:
        engine.shutdown()
        listener.close()


async def _at_first_answer(path: Path, ready: Callable[[], None]) -> None:
    """Call ``ready`` once the server on a socket says that it is well."""
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        while True:
            with suppress(httpx.TransportError):
                if (await client.get("/health")).is_success:
                    return ready()
            await asyncio.sleep(ASK_S)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt("terminated")


if __name__ == "__main__":
    main()
