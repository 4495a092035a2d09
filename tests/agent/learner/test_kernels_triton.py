"""The Triton kernels give the bits of the CPU kernels (interpreted where there is no GPU)."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from agent.learner.penalty import PENALTIES

pytestmark = pytest.mark.proof

ROOT = Path(__file__).parents[3]


def told_by(script: str, environment: dict[str, str], *arguments: str) -> dict[str, int]:
    """What a script beside this one prints; a fresh process, for Triton reads its mode once."""
    driver = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    assert driver.returncode == 0, driver.stderr[-2000:]
    counts: dict[str, int] = json.loads(driver.stdout)
    return counts


@pytest.fixture(scope="module")
def mode(scale: Callable[[int, int], int]) -> str:
    """All cases in a soak, a choice that touches every branch otherwise."""
    return ("small", "full")[scale(0, 1)]


@pytest.fixture(scope="module")
def differences(mode: str) -> dict[str, int]:
    """{case: differing elements}."""
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    return told_by("triton_driver.py", interpret, mode)


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
@pytest.mark.parametrize(("what", "dtypes"), [("noise", 1), ("render", 3), ("plain", 1)])
def test_slices_have_the_bits_of_the_cpu(
    differences: dict[str, int], what: str, dtypes: int, kind: str, mode: str
) -> None:
    found = {name: n for name, n in differences.items() if name.startswith(f"{what} {kind} ")}
    found = {name: n for name, n in found.items() if " of " not in name}
    assert len(found) == dtypes * (5 if mode == "full" else 3)
    assert {name: n for name, n in found.items() if n} == {}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_updates_have_the_bits_of_the_cpu(
    differences: dict[str, int], penalty: str, mode: str
) -> None:
    """With and without weights; signs with every penalty in a soak, with l1 always."""
    found = {name: n for name, n in differences.items() if f" {penalty} " in name}
    assert len(found) == (4 if mode == "full" or penalty == "l1" else 2)
    assert {name: n for name, n in found.items() if n} == {}


def test_leaves_and_sums_of_squares_are_those_of_the_cpu(differences: dict[str, int]) -> None:
    found = {name: n for name, n in differences.items() if name.startswith(("leaves", "squares"))}
    assert len(found) >= 8
    assert {name: n for name, n in found.items() if n} == {}


def test_windows_of_columns_have_the_bits_of_the_whole(
    differences: dict[str, int], mode: str
) -> None:
    found = {name: n for name, n in differences.items() if " of " in name and ":" in name}
    assert len(found) == (10 if mode == "full" else 6)
    assert {name: n for name, n in found.items() if n} == {}


def test_ties_go_to_even_wrong_arguments_are_refused_and_a_no_op_changes_nothing(
    differences: dict[str, int],
) -> None:
    rest = {
        name: differences[name]
        for name in differences
        if name.startswith(("refuse", "no-op", "ties"))
    }
    assert rest == {"refuse dtype": 0, "refuse size": 0, "refuse strides": 0, "no-op": 0, "ties": 0}


def test_kernels_compile_for_a_gpu_without_one_fused_multiply_add(
    tmp_path: Path, mode: str
) -> None:
    """Fusing would round once where the CPU rounds twice; the last count shows it would happen."""
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    counts = told_by("triton_compile.py", environment, mode)
    assert counts.pop("with fusion on") > 0
    assert len(counts) == (20 if mode == "full" else 4)
    assert {name: n for name, n in counts.items() if n} == {}
