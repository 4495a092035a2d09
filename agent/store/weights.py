"""Weights directories: ``weights/<digest>/``, written whole and checked before an engine loads one.

A directory is a plain folder: model.safetensors, the anchor's own config and tokenizer files, and
manifest.json {"format", "digest", "anchor", "files": {name: {"sha256", "bytes"}}, "sha256": of the
manifest itself}. transformers loads it and vLLM serves it. It is a cache of a journal: written
beside its place, flushed and renamed, so that one that carries a digest is whole. Nothing else may
lie in it, because an engine reads whatever it finds; nobody may write in it.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from agent.errors import UserError
from agent.home import flush_folder, read_sealed, remove_tree
from agent.learner.es import Applied
from agent.learner.noise import Address, NoiseKind
from agent.store.anchor import SINGLE, Anchor, open_tensors, read_json
from agent.store.companions import MANIFEST, companions, copy_companions, differing, finish
from agent.store.tensorfile import (
    CODES,
    beside,
    combined,
    dtype_name,
    file_order,
    sha256_of,
    tensor_hash,
    write_tensors,
)
from agent.store.theta import Parameters, Theta, layer_of

if TYPE_CHECKING:  # most commands need no tensor, and torch takes seconds
    import torch

__all__ = [
    "Anchor",
    "Applied",
    "Parameters",
    "Theta",
    "digest_of",
    "export",
    "identity",
    "layer_of",
    "preflight",
    "require",
    "short",
    "verify",
]

FORMAT = 1


def short(digest: str) -> str:
    """The first 12 hex characters, what people and headers see."""
    return digest[:12]


def digest_of(directory: Path) -> str:
    """Digest of the weights in a Hugging Face directory."""
    return Anchor.open(directory).digest


def identity(directory: Path) -> frozenset[tuple[str, int, int, int]]:
    """Name, inode, size and time of change of every file: other ones after any write."""
    files = [(file.name, file.stat()) for file in directory.iterdir()]
    return frozenset((name, at.st_ino, at.st_size, at.st_ctime_ns) for name, at in files)


def require(directory: Path, digest: str) -> None:
    """Check that a directory holds a version: its weights, and its other files by the manifest.

    Raises:
        UserError: The weights have another digest, or a file another sha256; says which.
    """
    found = digest_of(directory)
    if found != digest:
        raise UserError(f"{directory}: the weights are {short(found)}, wanted {short(digest)}")
    if (directory / MANIFEST).exists():  # the anchor has none: see store.companions
        said = read_sealed(directory / MANIFEST)
        files = {name: each["sha256"] for name, each in dict(said.get("files", {})).items()}
        here = {file.name for file in directory.iterdir()} - {MANIFEST}
        if said.get("digest") != digest or here != set(files):
            other = ", ".join(sorted(here ^ set(files))) or "the digest"
            raise UserError(f"{directory}: {MANIFEST} does not agree on {other}")
        if wrong := differing(directory, files.keys() - {SINGLE}, files):
            raise UserError(f"{directory}: {', '.join(wrong)} is not what {MANIFEST} says")


def export(
    parameters: Theta,
    weights_root: Path,
    member: tuple[Address, float] | None = None,
    noise: NoiseKind = "normal",
) -> Path:
    """Write ``weights_root/<digest>/`` and return it; a whole one that is there already is kept.

    With a member (address, scale) its weights are written instead of theta's.

    model.safetensors (one tensor in memory at a time), the anchor's config, tokenizer and
    template files byte for byte, manifest.json last, all flushed, then one rename.
    """
    with beside(weights_root / "weights") as folder:
        made = folder / "weights"
        made.mkdir()
        target = weights_root / _write_model(parameters, made, member, noise)
        _publish(made, target, parameters.anchor)
    flush_folder(weights_root)
    return target


def _publish(made: Path, target: Path, anchor: Anchor) -> None:
    """Rename a finished directory to its place, unless a whole one has it already.

    Nobody may write in it from then on; before, because a folder that is moved to another one has
    to be writable.
    """
    try:
        made.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _is_whole(target, anchor):
            remove_tree(target)
            made.rename(target)
    target.chmod(0o555)


def _write_model(
    parameters: Theta,
    folder: Path,
    member: tuple[Address, float] | None,
    noise: NoiseKind,
) -> str:
    """Fill a new folder; returns the digest of the weights in it."""
    specs = parameters.anchor.specs
    address, scale = member or (None, 0.0)
    tensors = parameters.rendered(address, scale, noise, order=file_order(specs))
    hashes = write_tensors(folder / SINGLE, specs, tensors, {"format": "pt"})
    digest = combined(specs, hashes)
    copy_companions(parameters.anchor.companions, folder)
    finish(folder, {"format": FORMAT, "digest": digest, "anchor": parameters.anchor.digest})
    return digest


def _is_whole(target: Path, anchor: Anchor) -> bool:
    """Whether a directory of this digest passes its preflight."""
    try:
        preflight(target, anchor)
    except UserError:
        return False
    return True


# -- checking ---------------------------------------------------------------------------------


def preflight(directory: Path, anchor: Anchor) -> None:
    """Raise one UserError that lists every mismatch; return when the directory may be loaded."""
    if directory.is_symlink() or not directory.is_dir():
        raise UserError(f"{directory}: is not a weights directory")
    problems = list(_problems(directory, anchor))
    if problems:
        raise UserError(f"{directory}: refused: " + "; ".join(problems))


def _problems(directory: Path, anchor: Anchor) -> Iterator[str]:
    """Every reason to refuse a directory, in the order of files, manifest, configs, tensors."""
    names = {entry.name for entry in directory.iterdir()}
    plain = {name for name in names if _is_plain(directory / name)}
    yield from (f"{name} is not a regular file" for name in sorted(names - plain))
    same = companions(anchor.companions)
    allowed = {SINGLE, MANIFEST, *same}
    yield from (f"{name} may not be there" for name in sorted(names - allowed))
    yield from (f"{name} is missing" for name in sorted(allowed - names))
    manifest: dict[str, Any] = {}
    if MANIFEST in plain:
        try:
            manifest = read_json(directory / MANIFEST)
        except UserError as error:
            yield str(error)
        else:
            yield from _manifest_problems(directory, manifest, anchor, plain & allowed)
    for name in sorted(plain & set(same)):
        yield from _companion_problems(directory / name, same[name])
    if SINGLE in plain:
        yield from _tensor_problems(directory / SINGLE, anchor, manifest.get("digest"))


def _is_plain(path: Path) -> bool:
    """A regular file of its own, not a link, folder, pipe or device."""
    return path.is_file() and not path.is_symlink()


def _manifest_problems(
    directory: Path, manifest: dict[str, Any], anchor: Anchor, present: set[str]
) -> Iterator[str]:
    """What the manifest says against the anchor, the folder's name and the files' bytes."""
    if manifest.get("format") != FORMAT:
        yield f"{MANIFEST} has format {manifest.get('format')!r}, allowed: {FORMAT}"
    if manifest.get("anchor") != anchor.digest:
        yield f"{MANIFEST} names anchor {manifest.get('anchor')!r}, allowed: {anchor.digest}"
    digest = manifest.get("digest")
    if len(directory.name) == len(anchor.digest) and directory.name != digest:
        yield f"{MANIFEST} names digest {digest!r}, the folder is {directory.name}"
    files = manifest.get("files")
    if not isinstance(files, dict):
        yield f"{MANIFEST} has no list of files"
        return
    listed = present - {MANIFEST}
    yield from (f"{name} is not in {MANIFEST}" for name in sorted(listed - set(files)))
    yield from (f"{MANIFEST} lists {name}" for name in sorted(set(files) - listed))
    for name in sorted(listed & set(files)):
        path = directory / name
        if files[name] != {"sha256": sha256_of(path), "bytes": path.stat().st_size}:
            yield f"{name} differs from {MANIFEST}"


def _companion_problems(file: Path, original: Path) -> Iterator[str]:
    """A config or tokenizer file must have the anchor's bytes and name no code."""
    content = file.read_bytes()
    if content != original.read_bytes():
        yield f"{file.name} differs from the anchor's"
    if file.suffix != ".json":
        return
    try:
        value = json.loads(content)
    except ValueError:
        yield f"{file.name} is not JSON"
        return
    if isinstance(value, dict) and "auto_map" in value:
        yield f"{file.name} has auto_map, which names code"


def _tensor_problems(path: Path, anchor: Anchor, digest: object) -> Iterator[str]:
    """Names, shapes, dtypes, finite values, and the digest of the bytes."""
    try:
        handle = open_tensors(path)
        names = set(handle.keys())
        expected = set(anchor.names)
        yield from (f"tensor {name} is missing" for name in sorted(expected - names))
        yield from (f"tensor {name} is not the anchor's" for name in sorted(names - expected))
        hashes: dict[str, bytes] = {}
        for name in sorted(names & expected):
            wrong = list(_spec_problems(name, handle.get_slice(name), anchor))
            yield from wrong
            if not wrong:
                tensor = handle.get_tensor(name)
                yield from _value_problems(name, tensor)
                hashes[name] = tensor_hash(tensor)
    except (UserError, SafetensorError) as error:
        yield f"{path.name}: {error}"
        return
    if set(hashes) == names == expected:
        actual = combined(anchor.specs, hashes)
        if actual != digest:
            yield f"the weights are {actual}, {MANIFEST} says {digest!r}"


def _spec_problems(name: str, stored: Any, anchor: Anchor) -> Iterator[str]:
    """One tensor's shape and dtype against the anchor's."""
    shape, dtype = anchor.specs[name]
    if stored.get_shape() != list(shape):
        yield f"tensor {name} has shape {stored.get_shape()}, allowed: {list(shape)}"
    if stored.get_dtype() != CODES[dtype_name(dtype)]:
        yield f"tensor {name} is {stored.get_dtype()}, allowed: {CODES[dtype_name(dtype)]}"


def _value_problems(name: str, tensor: torch.Tensor) -> Iterator[str]:
    """Values no weight may have."""
    import torch

    bad = int(tensor.numel() - torch.isfinite(tensor).sum())
    if bad:
        yield f"tensor {name} holds {bad} values that are not finite"


def verify(directory: Path) -> str:
    """Recompute the digest of a weights directory; UserError when its manifest says another."""
    recorded = read_json(directory / MANIFEST).get("digest")
    actual = Anchor.open(directory).digest
    if recorded != actual:
        raise UserError(f"{directory}: the weights are {actual}, {MANIFEST} says {recorded!r}")
    return actual
