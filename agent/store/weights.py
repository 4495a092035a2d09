"""Models on disk: ``weights/<digest>/``, a Hugging Face directory and a manifest; the room's face.

A directory is a cache of a journal: it is written beside its place, flushed and renamed, so that
one that carries a digest is whole. transformers loads it and vLLM serves it.
"""

import errno
import json
import shutil
from pathlib import Path

from agent.errors import UserError
from agent.home import flush_folder
from agent.learner.es import Applied
from agent.learner.noise import Address
from agent.store.anchor import SINGLE, Anchor
from agent.store.parameters import Parameters
from agent.store.preflight import FORMAT, MANIFEST, companions, preflight, verify
from agent.store.tensorfile import (
    beside,
    combined,
    file_order,
    sha256_of,
    write_bytes,
    write_tensors,
)
from agent.store.theta import Theta, layer_of

__all__ = [
    "Anchor",
    "Applied",
    "Parameters",
    "Theta",
    "digest_of",
    "export",
    "layer_of",
    "preflight",
    "short",
    "verify",
]


def short(digest: str) -> str:
    """The first 12 hex characters, what people and headers see."""
    return digest[:12]


def digest_of(directory: Path) -> str:
    """Digest of the weights in a Hugging Face directory."""
    return Anchor.open(directory).digest


def export(
    parameters: Theta,
    weights_root: Path,
    anchor_dir: Path | None = None,
    member: tuple[Address, float] | None = None,
) -> Path:
    """Write ``weights_root/<digest>/`` and return it; a whole one that is there already is kept.

    With a member (address, scale) its weights are written instead of theta's.

    model.safetensors (one tensor in memory at a time), the anchor's config, tokenizer and
    template files byte for byte, manifest.json last, all flushed, then one rename.
    """
    source = anchor_dir or parameters.anchor.directory
    with beside(weights_root / "weights") as folder:
        made = folder / "weights"
        made.mkdir()
        target = weights_root / _write_model(parameters, made, source, member)
        _publish(made, target, parameters.anchor)
    flush_folder(weights_root)
    return target


def _publish(made: Path, target: Path, anchor: Anchor) -> None:
    """Rename a finished directory to its place, unless a whole one has it already."""
    try:
        made.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _is_whole(target, anchor):
            shutil.rmtree(target)
            made.rename(target)


def _write_model(
    parameters: Theta, folder: Path, source: Path, member: tuple[Address, float] | None
) -> str:
    """Fill a new folder; returns the digest of the weights in it."""
    specs = parameters.anchor.specs
    tensors = parameters.rendered(*(member or ()), order=file_order(specs))
    hashes = write_tensors(folder / SINGLE, specs, tensors, {"format": "pt"})
    digest = combined(specs, hashes)
    for name, original in companions(source).items():
        write_bytes(folder / name, original.read_bytes())
    files = {
        file.name: {"sha256": sha256_of(file), "bytes": file.stat().st_size}
        for file in sorted(folder.iterdir())
    }
    manifest = {
        "format": FORMAT,
        "digest": digest,
        "anchor": parameters.anchor.digest,
        "files": files,
    }
    write_bytes(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    flush_folder(folder)
    return digest


def _is_whole(target: Path, anchor: Anchor) -> bool:
    """Whether a directory of this digest is there and passes its preflight."""
    try:
        preflight(target, anchor)
    except UserError:
        return False
    return True
