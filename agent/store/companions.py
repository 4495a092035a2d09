"""The files beside a model's weights: config, tokenizer, chat template, generation config.

They decide what a model is asked and answers as much as its weights do. A kept version has copies
of the anchor's, with their hashes in its manifest. An original model has no manifest: a home copies
its files when it first opens it, and the model's own are compared with the copies.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from agent.errors import UserError
from agent.home import flush_folder, read_sealed, remove_tree, sealed
from agent.store.anchor import INDEX
from agent.store.tensorfile import beside, sha256_of, write_bytes

MANIFEST = "manifest.json"
COPIED = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
NOTICES = ("LICENSE", "LICENCE", "NOTICE")


def companions(directory: Path) -> dict[str, Path]:
    """The files beside the weights that every model made from this anchor carries, by name."""
    return {
        file.name: file
        for file in sorted(directory.iterdir())
        if file.is_file()
        and file.name not in (INDEX, MANIFEST)
        and not file.name.startswith(".")
        and (file.suffix in COPIED or file.name.upper().startswith(NOTICES))
    }


def copy_companions(source: Path, folder: Path) -> None:
    """Copy them into a new folder, down to the disk."""
    for name, original in companions(source).items():
        write_bytes(folder / name, original.read_bytes())


def finish(folder: Path, document: Mapping[str, object]) -> None:
    """Write the manifest of all files in a folder, last; they are read-only from then on."""
    files = {
        file.name: {"sha256": sha256_of(file), "bytes": file.stat().st_size}
        for file in sorted(folder.iterdir())
    }
    manifest = sealed({**document, "files": files})
    write_bytes(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    for file in folder.iterdir():
        file.chmod(0o444)
    flush_folder(folder)


def differing(directory: Path, names: Iterable[str], hashes: Mapping[str, str]) -> list[str]:
    """Which of the files are missing or have another sha256."""
    return [
        name
        for name in sorted(names)
        if not (directory / name).is_file() or sha256_of(directory / name) != hashes[name]
    ]


class CompanionRecord:
    """Copies of an original model's files, made when a home first opened it.

    Args:
        directory: The model's.
        folder: Where the copies are, with a manifest of their hashes.
    """

    def __init__(self, directory: Path, folder: Path) -> None:
        self.directory, self.folder = directory, folder

    def keep(self) -> None:
        """Make the copies where there are none; mend damaged ones from the model's own files.

        Raises:
            UserError: The manifest is damaged, and copies and model differ.
        """
        if not (self.folder / MANIFEST).is_file():
            self._make()
            return
        try:
            hashes = self._hashes()
        except UserError:  # what both hold is what was recorded
            if not self._agree():
                raise
            self._make()
        else:
            self._restore(self.folder, self.directory, hashes)

    def problems(self) -> list[str]:
        """Which of the model's own files differ from what was recorded, and which are new."""
        hashes = self._hashes()
        added = sorted(companions(self.directory).keys() - hashes.keys())
        return [*differing(self.directory, hashes, hashes), *(f"{name} (new)" for name in added)]

    def require(self) -> None:
        """Raise one UserError that names every file which is not as it was recorded.

        A model that was never recorded is recorded as it is.
        """
        self.keep()
        if wrong := self.problems():
            raise UserError(
                f"{self.directory}: not as when this home first opened it: {', '.join(wrong)}; "
                f"`anchorage repair` puts back what was changed; delete {self.folder} to take the "
                "model as it is now"
            )

    def restore(self) -> None:
        """Put the recorded files back into the model's directory."""
        self._restore(self.directory, self.folder, self._hashes())

    def _make(self) -> None:
        """Copy; of two processes that do so the first one's copies stay."""
        if self.folder.exists():
            remove_tree(self.folder)
        with beside(self.folder) as place:
            made = place / "files"
            made.mkdir()
            copy_companions(self.directory, made)
            finish(made, {"model": str(self.directory)})
            with suppress(OSError):
                made.rename(self.folder)
        self.folder.chmod(0o555)
        flush_folder(self.folder.parent)

    def _agree(self) -> bool:
        """Whether the copies are the model's files, byte for byte."""
        one, other = companions(self.directory), companions(self.folder)
        same = (path.read_bytes() == other[name].read_bytes() for name, path in one.items())
        return one.keys() == other.keys() and all(same)

    def _restore(self, target: Path, source: Path, hashes: Mapping[str, str]) -> None:
        lost = differing(target, hashes, hashes)
        for name in set(lost) - set(differing(source, lost, hashes)):
            _replace(target / name, (source / name).read_bytes())

    def _hashes(self) -> dict[str, str]:
        """Name -> sha256, as recorded."""
        files = read_sealed(self.folder / MANIFEST).get("files", {})
        return {name: str(each["sha256"]) for name, each in dict(files).items()}


def _replace(path: Path, content: bytes) -> None:
    """Give a file other content under its old mode; its folder may be read-only."""
    mode, own = path.parent.stat().st_mode, path.stat().st_mode if path.exists() else 0o644
    path.parent.chmod(mode | 0o200)
    try:
        with beside(path) as place:
            write_bytes(place / path.name, content)
            (place / path.name).chmod(own)
            (place / path.name).replace(path)
    finally:
        path.parent.chmod(mode)
