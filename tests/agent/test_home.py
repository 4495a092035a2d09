"""The home: private, every name in it once, files whole at any moment, locks that say who waits."""

import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent.errors import UserError
from agent.home import Home, create_once, is_locked, locked, write_atomically

HOLDER = """
import sys
from pathlib import Path
from agent.home import locked
with locked(Path(sys.argv[1]), taken="taken"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_home_is_private_and_a_file_is_refused(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "home")
    assert home.root.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        Home.at(tmp_path / "file")


def test_no_two_names_are_one_place_and_all_lie_inside(tmp_path: Path) -> None:
    home = Home(tmp_path)
    named = [getattr(home, name) for name in vars(Home) if not name.startswith("_")]
    places = [each for each in named if isinstance(each, Path)]
    places += [home.slot_json("engine"), home.engine_socket("engine"), home.log("x")]
    assert len(places) > 30
    assert [place for place, count in Counter(places).items() if count > 1] == []
    assert all(place.is_relative_to(tmp_path) and place != tmp_path for place in places)


def test_a_replaced_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    texts = [letter * 100_000 for letter in "abcd"]
    write_atomically(path, texts[0])
    with ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(write_atomically, path, text, durably=False) for text in texts * 5]
        while not all(each.done() for each in writing):
            assert path.read_text("utf-8") in texts
    assert [each.exception() for each in writing] == [None] * 20
    assert [each.name for each in tmp_path.iterdir()] == ["record.json"]


def test_the_first_to_create_a_file_decides_its_content(tmp_path: Path) -> None:
    path = tmp_path / "salt"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda text: create_once(path, text), "abcdefgh"))
    kept = path.read_text("utf-8")
    assert kept in tuple("abcdefgh")
    create_once(path, "later")
    assert path.read_text("utf-8") == kept
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["salt"]


def test_a_held_lock_is_refused_with_one_line_and_free_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "round.lock"
    with locked(path, taken="a round runs; allowed: one at a time"):
        assert is_locked(path)
        with (
            pytest.raises(UserError, match=r"^a round runs; allowed: one at a time$"),
            locked(path, taken="a round runs; allowed: one at a time", wait_s=0),
        ):
            pass
    assert not is_locked(path)
    with locked(path, taken="still held", wait_s=0):
        pass


def test_a_killed_holder_frees_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "round.lock"
    argv = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert is_locked(path)
        holder.kill()
        holder.wait()
    assert not is_locked(path)


@pytest.mark.skipif(os.getuid() != 0, reason="root alone can give a folder away")
@pytest.mark.parametrize(("mode", "refused"), [(0o1777, True), (0o755, False)])
def test_a_home_that_somebody_else_made_where_all_may_write_is_refused(
    tmp_path: Path, mode: int, refused: bool
) -> None:
    home = tmp_path / "shared" / "home"
    home.mkdir(parents=True)
    home.parent.chmod(mode)
    assert Home.at(home).root == home  # our own
    os.chown(home, 65534, 65534)
    if refused:
        with pytest.raises(UserError, match="was made by user 65534; allowed: one of your own"):
            Home.at(home)
    else:
        assert Home.at(home).root == home
