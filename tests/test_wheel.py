"""A wheel holds every file that the packages read, so that a service runs without the checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.proof

ROOT = Path(__file__).parent.parent
PACKAGES = ("agent", "evaluators", "deploy", "flows")
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


def shipped(root: Path) -> set[str]:
    """Files of the packages by their path, without pictures of the README and byte code."""
    found = (path for package in PACKAGES for path in (root / package).rglob("*"))
    names = {path.relative_to(root).as_posix() for path in found if path.is_file()}
    return {n for n in names if "__pycache__" not in n and not n.startswith("deploy/pictures/")}


def built(into: Path) -> set[str]:
    """Names in a wheel of a copy of the tree; built by setuptools alone, without a network."""
    tree = into / "tree"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    subprocess.run([sys.executable, "-c", BUILD, str(into)], cwd=tree, check=True, timeout=300)
    (wheel,) = into.glob("*.whl")
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_a_wheel_has_every_file_of_the_packages(tmp_path: Path) -> None:
    names = built(tmp_path)
    assert names == shipped(ROOT)
    data = ("deploy/embedded/model/model.safetensors", "evaluators/examples/orders-train.jsonl.gz")
    assert names.issuperset({*data, "deploy/prefect.yaml", "agent/learner/normal_table.npy"})
