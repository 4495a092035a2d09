"""An engine starts on the version it names, on a rebuilt one, on the anchor, or not at all."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.config import Settings, keep
from agent.errors import UserError
from agent.home import Home, remove_tree
from agent.learner import es
from agent.learner.penalty import Penalty
from agent.store.journal import Journal
from agent.store.ledger import Ledger
from agent.store.weights import Anchor, Parameters, export, identity, require
from deploy.serving.intact import intact
from deploy.serving.lease import Leases
from deploy.serving.served import GREEN, Served, read_served, write_served, write_slot


class House:
    """A home that serves a candidate of one generation, as its journal says."""

    def __init__(self, root: Path, anchor_dir: Path) -> None:
        self.home = Home.at(root / "h")
        self.anchor = Anchor.open(Path(shutil.copytree(anchor_dir, root / "anchor")))
        keep(self.home, Settings.model_validate({"model": {"path": str(self.anchor.directory)}}))
        journal, ledger = Journal(self.home.state_db), Ledger(self.home.state_db)
        digest = self.anchor.digest
        ledger.append(
            digest, "ANCHOR", epoch=ledger.acquire("a test", 0.0), actor="a test", why="", now=0.0
        )
        ledger.close()
        journal.open_run(
            "0001-t", anchor_digest=digest, parent_digest=digest, target="t", run_seed=1, plan={},
            now=0.0,
        )  # fmt: skip
        parameters = Parameters.zeros(self.anchor)
        rewards = np.random.default_rng(0).random((4, 5))
        step = es.step(
            rewards.mean(axis=1), es.members(4, False), run_seed=1, sigma=0.1, generation=0,
            alpha=0.1, penalty=Penalty("l2", 1.0),
        )  # fmt: skip
        moved = parameters.apply(step)
        journal.commit("0001-t", step, rewards, moved.delta_hash, {"norm": moved.norm})
        self.directory = export(parameters, self.home.weights)
        journal.finish("0001-t", self.directory.name, "a test", now=2.0)
        journal.close()
        self.served = Served(self.directory.name, str(self.directory))
        write_served(self.home, self.served)

    def damage(self, directory: Path, name: str = "model.safetensors") -> None:
        """Flip one bit in the middle of a file's second half."""
        path = directory / name
        content = bytearray(path.read_bytes())
        content[len(content) * 3 // 4] ^= 0x80
        path.chmod(0o644)
        path.write_bytes(content)


@pytest.fixture
def house(tmp_path: Path, anchor_dir: Path) -> House:
    return House(tmp_path, anchor_dir)


def test_what_is_whole_is_served_and_kept_files_are_read_only(house: House) -> None:
    assert intact(house.home, "engine") == house.served
    assert {file.stat().st_mode & 0o777 for file in house.directory.iterdir()} == {0o444}
    assert house.directory.stat().st_mode & 0o777 == 0o555


def test_whoever_is_not_root_can_remove_a_kept_version_only_as_a_whole(house: House) -> None:
    """By a process without the rights of the administrator, as services run."""
    script = (
        "import os, pathlib, sys\nfrom agent.home import remove_tree\n"
        "if os.getuid() == 0: os.setgid(65534), os.setuid(65534)\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "try: next(folder.glob('*.safetensors')).unlink()\n"
        "except PermissionError: print('refused')\n"
        "remove_tree(folder)\n"
        "print(folder.exists())"
    )
    root = house.home.root.parent
    for path in (root, *root.rglob("*")) if os.getuid() == 0 else ():
        os.chown(path, 65534, 65534)
    for folder in root.parents:  # pytest's own folders are private
        if os.getuid() == 0 and folder.owner() == "root" and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    told = subprocess.run(
        [sys.executable, "-c", script, str(house.directory)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["refused", "False"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_a_flipped_bit_is_mended_from_anchor_and_journal(house: House, name: str) -> None:
    whole = {file.name: file.read_bytes() for file in house.directory.iterdir()}
    house.damage(house.directory, name)
    assert intact(house.home, "engine") == house.served
    require(house.directory, house.served.digest)
    assert {file.name: file.read_bytes() for file in house.directory.iterdir()} == whole


def test_a_missing_file_and_a_missing_folder_are_made_again(house: House) -> None:
    house.directory.chmod(0o755)
    (house.directory / "model.safetensors").unlink()
    assert intact(house.home, "engine") == house.served
    remove_tree(house.directory)
    assert intact(house.home, "engine") == house.served
    require(house.directory, house.served.digest)


def test_without_a_journal_the_anchor_is_served(house: House) -> None:
    house.damage(house.directory)
    house.home.state_db.unlink()
    Ledger(house.home.state_db).close()
    wanted = Served(house.anchor.digest, str(house.anchor.directory))
    assert intact(house.home, "engine") == wanted
    assert read_served(house.home) == wanted


def test_a_damaged_anchor_is_refused(house: House) -> None:
    write_served(house.home, Served(house.anchor.digest, str(house.anchor.directory)))
    house.damage(house.anchor.directory)
    with pytest.raises(UserError, match="the weights are"):
        intact(house.home, "engine")


def test_both_damaged_are_refused_and_nothing_else_is_chosen(house: House) -> None:
    house.damage(house.anchor.directory)
    house.damage(house.directory)
    with pytest.raises(UserError):
        intact(house.home, "engine")
    assert read_served(house.home).digest == house.served.digest


def test_while_somebody_swaps_and_beside_the_champion_nothing_else_is_chosen(
    house: House,
) -> None:
    house.home.state_db.unlink()
    Ledger(house.home.state_db).close()
    house.damage(house.directory)
    write_slot(house.home, Served(house.served.digest, house.served.directory, GREEN))
    with pytest.raises(UserError, match="the weights are"):
        intact(house.home, GREEN)
    leases = Leases(house.home)
    lease = leases.begin(house.served, house.served, lease_s=60.0, now=time.time())
    with pytest.raises(UserError, match="the weights are"):
        intact(house.home, "engine")
    leases.end(lease)
    assert read_served(house.home) == house.served


def test_a_bad_digest_in_serving_json_is_damage(house: House) -> None:
    document: dict[str, Any] = json.loads(house.home.serving_json.read_text())
    document["digest"] = "0" * 64
    house.home.serving_json.write_text(json.dumps(document))
    with pytest.raises(UserError, match="is damaged"):
        intact(house.home, "engine")


def test_any_write_changes_a_directorys_identity(house: House) -> None:
    path = house.directory / "model.safetensors"
    before, at = identity(house.directory), path.stat()
    house.damage(house.directory)
    os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))
    assert identity(house.directory) != before
