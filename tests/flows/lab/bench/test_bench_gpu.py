"""What `make gpu` does, at a tiny size in Triton's interpreter, with the packages it may need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flows.lab.bench.gpu import main, sound, table

ROOT = Path(__file__).parents[4]
# Run first in a process: what a bare CUDA machine lacks cannot be imported.
BARE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"vllm", "ray", "mlflow", "prefect", "datasets", "pydantic",
                                  "pydantic_settings", "rich", "typer", "sqlalchemy", "httpx",
                                  "transformers", "fastapi", "psutil", "matplotlib"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from flows.lab.bench.gpu import main
sys.exit(max(main([*each.split(), *sys.argv[2:]]) for each in sys.argv[1].split(",")))
"""


@pytest.mark.proof
def test_every_piece_runs_on_a_bare_machine_and_finds_nothing_wrong(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    sizes = {"bits": 300, "speed": 600, "place": 256, "memory": 2048}
    pieces = ",".join(f"{piece} --elements={size}" for piece, size in sizes.items())
    ran = subprocess.run(
        [sys.executable, "-c", BARE, pieces, "--device=cpu", f"--out={out}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    document = json.loads(out.read_text())
    assert document["bits"]["sum"] == 0
    assert len(document["bits"]["differing"]) == 2 * (1 + 3 + 5) + 1
    assert document["place"] == {"members": 3, "graph": False, "wrong": 0, "storage_kept": True}
    memory = document["memory"]
    assert memory["bus"] == {"open": 2 * 2048, "member": 0, "generation": 8 * (16 + 8)}
    assert memory["planned_bytes"] == 6 * 2048
    assert set(document["rates"]) == {"normals_s", "signs_s", "launch_s"}
    assert min(document["rates"].values()) > 0
    shown = table(document)
    assert "| elements that differ from the CPU's | 0 of 19 cases' 300 elements |" in shown
    assert "0 a member, 192 a step" in shown


@pytest.mark.parametrize(
    ("document", "well"),
    [
        ({}, True),
        ({"bits": {"sum": 0}, "place": {"wrong": 0, "storage_kept": True}}, True),
        ({"bits": {"sum": 1}}, False),
        ({"place": {"wrong": 3, "storage_kept": True}}, False),
        ({"place": {"wrong": 0, "storage_kept": False}}, False),
        ({"memory": {"bus": {"member": 64}}}, False),
        ({"demo": {"ran": True, "code": 1}}, False),
    ],
)
def test_what_contradicts_a_promise_is_a_fault(document: dict[str, object], well: bool) -> None:
    assert sound(document) is well


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bits", "--out", str(tmp_path / "gpu.json")]) == 2
    assert capsys.readouterr().err == ("gpu: no CUDA device is here; allowed: a machine with one\n")
    assert not (tmp_path / "gpu.json").exists()
    assert main(["table", "--out", str(tmp_path / "gpu.json")]) == 2
