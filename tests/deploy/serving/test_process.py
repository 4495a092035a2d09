"""How the engine's process is told what to serve, and that nobody else can reach it."""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from agent.config import keep, load
from agent.errors import UserError
from agent.home import Home, write_atomically
from agent.sections import PLAIN_TEMPLATE
from deploy.serving import process
from deploy.serving.served import (
    BLUE,
    GREEN,
    Served,
    read_served,
    read_slot,
    write_served,
    write_slot,
)
from deploy.serving.starts import starts


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.at(tmp_path)


def test_an_engine_listens_nowhere_but_on_its_socket(home: Home) -> None:
    """No host or port among the flags, and the model comes from serving.json alone."""
    argv = process.command(home, load())
    assert not [part for part in argv if part.startswith(("--host", "--port", "--model=", "--uds"))]
    assert argv[3:5] == (str(home.root), BLUE)
    assert "--worker-extension-cls=agent.population.vllm_kernels.WeightsExtension" in argv


def test_settings_become_vllms_own_flags() -> None:
    settings = load(engines={"max_num_seqs": 7, "tensor_parallel_size": 2}, model={"name": "x"})
    gpu, cpu = (set(process.flags(settings, cpu=cpu)) for cpu in (False, True))
    assert {"--max-num-seqs=7", "--tensor-parallel-size=2", "--served-model-name=x"} <= gpu & cpu
    assert {"--enforce-eager", "--no-enable-chunked-prefill"} <= cpu - gpu
    assert "--distributed-executor-backend=uni" not in cpu  # two workers need processes
    assert any(flag.startswith("--gpu-memory-utilization=") for flag in gpu - cpu)


def test_an_engine_decodes_as_the_population_does() -> None:
    own = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_parser": "qwen3"}
    flags = set(process.flags(load(model=own), cpu=True))
    assert {
        "--generation-config=auto",
        '--override-generation-config={"temperature": 0.0}',
        '--default-chat-template-kwargs={"enable_thinking": false}',
        "--reasoning-parser=qwen3",
        "--tool-call-parser=hermes",
    } <= flags
    plain = process.flags(load(tasks={"generation_config": "none"}), cpu=True)
    assert "--generation-config=vllm" in plain
    assert not [flag for flag in plain if flag.startswith("--reasoning-parser")]


def test_a_chat_template_that_is_set_becomes_a_file(home: Home) -> None:
    assert process._template(home) == []
    keep(home, load(model={"chat_template": "plain"}))
    assert process._template(home) == [f"--chat-template={home.chat_template}"]
    assert home.chat_template.read_text() == PLAIN_TEMPLATE
    keep(home, load())
    assert process._template(home) == []


def test_the_engine_reports_to_nobody(home: Home) -> None:
    environment = process.environment(home, cpu=True)
    assert environment["VLLM_NO_USAGE_STATS"] == environment["VLLM_DO_NOT_TRACK"] == "1"
    assert environment["HF_HUB_OFFLINE"] == "1"
    for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"):
        assert environment[name].startswith(str(home.root))


def test_a_socket_gets_a_private_folder_and_no_old_file(home: Home) -> None:
    path = home.engine_socket(BLUE)
    path.parent.mkdir(mode=0o755)
    path.write_text("left by a killed engine")
    assert process.private_socket(path) == path
    assert not path.exists()
    assert path.parent.stat().st_mode & 0o777 == 0o700


AS_USER_1000 = """
import os, sys
from pathlib import Path
from agent.errors import UserError
from deploy.serving.process import private_socket
os.setgroups([]), os.setgid(1000), os.setuid(1000)
for folder in sys.argv[1:]:
    try:
        print(private_socket(Path(folder) / "engine.sock").name)
    except UserError as error:
        print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user, which root alone can")
def test_a_mounted_folder_of_roots_is_taken_and_another_users_is_not(tmp_path: Path) -> None:
    """A pod's volume belongs to root and is the group's to write: it cannot be made 0700."""
    root, mounted, foreign = (Path(tempfile.mkdtemp()) for _ in range(3))
    root.chmod(0o777)
    for folder, owner in ((mounted, 0), (foreign, 1001)):
        os.chown(folder, owner, 1000)
        folder.chmod(0o2777)
    command = [sys.executable, "-c", AS_USER_1000, mounted, foreign, root / "own"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    told = ran.stdout.splitlines()
    assert told[0] == told[2] == "engine.sock"
    assert told[1] == f"{foreign}: belongs to user 1001; allowed: 1000, or root"
    assert (root / "own").stat().st_mode & 0o777 == 0o700
    for folder in (root, mounted, foreign):
        shutil.rmtree(folder)


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 100) / "engine.sock"
    with pytest.raises(UserError, match="allowed: 107"):
        process.private_socket(path)
    assert not path.parent.exists()


def test_serving_json_is_replaced_whole(home: Home) -> None:
    with pytest.raises(UserError, match=r"serving\.json"):
        read_served(home)
    for served in (Served("a" * 64, "/a"), Served("b" * 64, "/b", GREEN)):
        write_served(home, served)
        assert read_served(home) == served
    assert [path.name for path in home.root.iterdir()] == ["serving.json"]


def test_each_slot_loads_its_own(home: Home) -> None:
    """The active slot follows serving.json, the other one its own file."""
    blue, green = Served("a" * 64, "/a"), Served("b" * 64, "/b", GREEN)
    write_served(home, blue)
    assert read_slot(home, BLUE) == blue
    with pytest.raises(UserError):
        read_slot(home, GREEN)
    write_slot(home, green)
    assert read_slot(home, GREEN) == green
    write_slot(home, blue)
    write_served(home, green)
    assert read_slot(home, BLUE) == blue


def test_a_damaged_file_is_named(home: Home) -> None:
    for text in ("{", '{"digest": "a"}', '{"digest": "a", "directory": "b", "c": 1}'):
        write_atomically(home.serving_json, text)
        with pytest.raises(UserError, match=r"is damaged|not a served version"):
            read_served(home)


class BegunAgainError(Exception):
    """Instead of another program in this process."""


def test_it_begins_again_under_the_cpu_runtime(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library can be loaded before all others at a program's start only."""
    words = [str(home.root), BLUE, "--a-flag"]

    def execv(path: str, argv: list[str]) -> None:
        raise BegunAgainError(path, argv[1:], os.environ["LD_PRELOAD"])

    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("KMP_BLOCKTIME", "")
    monkeypatch.setattr(process, "cpu_runtime", lambda: {"LD_PRELOAD": "/lib/libiomp5.so"})
    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(BegunAgainError) as begun:
        process.main(words)
    module = ["-m", "deploy.serving.process"]
    assert begun.value.args == (sys.executable, [*module, *words], "/lib/libiomp5.so")
    assert starts(home, BLUE) is None


def test_a_start_that_fails_at_its_settings_is_counted(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "cpu_runtime", dict)
    keep(home, load())
    home.settings_json.write_text(home.settings_json.read_text().replace('"model"', '"mod%l"'))
    with pytest.raises(UserError, match="damaged"):
        process.main([str(home.root), BLUE, "--a-flag"])
    count = starts(home, BLUE)
    assert count is not None
    assert count.begun == 1


def test_an_engine_is_ready_at_its_first_answer_and_while_it_serves() -> None:
    statuses, calls = [503, 503, 200, 200], list[int]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 {statuses.pop(0)} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        writer.write(head.encode())
        await writer.drain()
        writer.close()

    async def served(path: Path) -> None:
        asked = asyncio.create_task(process._at_first_answer(path, lambda: calls.append(1)))
        await asyncio.sleep(2 * process.ASK_S)  # nobody listens yet
        assert not asked.done()
        async with await asyncio.start_unix_server(answer, path):
            await asked

    with tempfile.TemporaryDirectory() as short_name:
        asyncio.run(served(Path(short_name) / "s"))
    assert (calls, statuses) == ([1], [200])
