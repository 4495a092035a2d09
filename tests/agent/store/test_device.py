"""delta on a device has the bits of delta on the host (interpreted where there is no GPU)."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.proof


def test_a_device_gives_the_bits_of_the_host(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    dtypes = (torch.bfloat16, torch.float16)
    tensors = {
        "model.embed_tokens.weight": torch.linspace(-2, 2, 9 * 8).view(9, 8),
        "model.layers.0.mlp.up_proj.weight": torch.linspace(1, -1, 300).view(60, 5),
        "model.norm.weight": torch.ones(8),
    }
    folders = [
        make_model(
            str(dtype).removeprefix("torch."),
            tensors={name: tensor.to(dtype) for name, tensor in tensors.items()},
        )
        for dtype in dtypes
    ]
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    script = Path(__file__).with_name("device_process.py")
    ran = subprocess.run(
        [sys.executable, script, tmp_path / "out", *folders],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | interpret,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert len(found) == 2 * 19
    assert [what for what, same in found.items() if not same] == []
