"""Sixty ways to spoil a weights directory, each with the words that refuse it."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
WEIGHTS, MANIFEST = "model.safetensors", "manifest.json"
SQUARE, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


def rehash(folder: Path, **said: object) -> None:
    """Let the manifest agree with the files, as whoever spoils on purpose would."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    others = [file for file in folder.iterdir() if file.is_file() and file.name != MANIFEST]
    manifest["files"] = {
        file.name: {
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "bytes": file.stat().st_size,
        }
        for file in others
    }
    path.write_text(json.dumps({**manifest, **said}))


def tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Other tensors in a whole file, with a manifest that agrees on the file."""
    held = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(held)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / WEIGHTS)
    rehash(folder)


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Another companion file, with a manifest that agrees."""
    (folder / name).write_bytes(content)
    rehash(folder)


def manifest(folder: Path, **said: object) -> None:
    held = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**held, **said}))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def link(path: Path) -> None:
    """The same bytes, elsewhere."""
    moved = path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(moved)


def linked_folder(folder: Path) -> None:
    moved = folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(moved)


def duplicate_header(folder: Path) -> None:
    """A header whose offsets overlap: two tensors on the same bytes."""
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[NORM]["data_offsets"] = header[f"{SQUARE[:-6]}bias"]["data_offsets"]
    text = json.dumps(header).encode()
    data = content[8 + length :]
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)
    rehash(folder)


def setitem(name: str, value: float) -> Callable[[Tensors], object]:
    return lambda held: held[name].view(-1).__setitem__(3, value)


Spoil = Callable[[Path], object]
KINDS: dict[str, tuple[Spoil, str]] = {
    # files
    "no directory": (shutil.rmtree, "is not a weights directory"),
    "directory is a link": (linked_folder, "is not a weights directory"),
    "weights are a link": (lambda f: link(f / WEIGHTS), f"{WEIGHTS} is not a regular file"),
    "config is a link": (lambda f: link(f / "config.json"), "config.json is not a regular file"),
    "weights are a folder": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
        f"{WEIGHTS} is not a regular file"),
    "a pipe": (lambda f: os.mkfifo(f / "notes.txt"), "notes.txt is not a regular file"),
    "a subfolder": (lambda f: (f / "extra").mkdir(), "extra may not be there"),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "template missing": (
        lambda f: (f / "chat_template.jinja").unlink(), "chat_template.jinja is missing"),
    "a pickle beside": (
        lambda f: rewrite(f, "pytorch_model.bin", pickle.dumps([1])),
        "pytorch_model.bin may not be there"),
    "code beside": (lambda f: rewrite(f, "modeling.py", b"x = 1"), "modeling.py may not be there"),
    "an adapter config": (
        lambda f: rewrite(f, "adapter_config.json", b"{}"), "adapter_config.json may not be there"),
    "a generation config the anchor lacks": (
        lambda f: rewrite(f, "generation_config.json", b"{}"),
        "generation_config.json may not be there"),
    "a hidden file": (lambda f: rewrite(f, ".hidden.json", b"{}"), ".hidden.json may not be there"),
    "a stale shard": (
        lambda f: (shutil.copy(f / WEIGHTS, f / "model-00001-of-00002.safetensors"), rehash(f)),
        "model-00001-of-00002.safetensors may not be there"),
    "a stale index": (
        lambda f: rewrite(f, f"{WEIGHTS}.index.json", b'{"weight_map": {}}'),
        f"{WEIGHTS}.index.json may not be there"),
    # manifest
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing"),
    "manifest not JSON": (
        lambda f: (f / MANIFEST).write_text("{"), "manifest.json: is not JSON"),
    "manifest of another format": (lambda f: manifest(f, format=2), "has format 2, allowed: 1"),
    "manifest of another anchor": (
        lambda f: manifest(f, anchor="f" * 64), "manifest.json names anchor 'f"),
    "manifest of another digest": (
        lambda f: manifest(f, digest="f" * 64), "manifest.json names digest 'f"),
    "manifest without files": (lambda f: manifest(f, files=[]), "has no list of files"),
    "manifest omits the weights": (
        lambda f: manifest(f, files={}), f"{WEIGHTS} is not in manifest.json"),
    "manifest lists more": (
        lambda f: manifest(f, files={"more.json": {}}), "manifest.json lists more.json"),
    "folder of another digest": (
        lambda f: f.rename(f.parent / ("e" * 64)), "the folder is eeee"),
    # companions
    "another config": (
        lambda f: rewrite(f, "config.json", b'{"model_type": "qwen2"}'),
        "config.json differs from the anchor's"),
    "config with a space": (
        lambda f: rewrite(f, "config.json", (f / "config.json").read_bytes() + b" "),
        "config.json differs from the anchor's"),
    "auto_map": (
        lambda f: rewrite(f, "config.json", b'{"auto_map": {"AutoModel": "x.Y"}}'),
        "config.json has auto_map, which names code"),
    "auto_map of the tokenizer": (
        lambda f: rewrite(f, "tokenizer_config.json", b'{"auto_map": {}}'),
        "tokenizer_config.json has auto_map"),
    "config not JSON": (
        lambda f: rewrite(f, "config.json", b"\xff"), "config.json is not JSON"),
    "another template": (
        lambda f: rewrite(f, "chat_template.jinja", b"{{ x }}"), "chat_template.jinja differs"),
    "another tokenizer": (
        lambda f: rewrite(f, "tokenizer.json", b"{}"), "tokenizer.json differs from the anchor's"),
    # weights
    "truncated": (lambda f: cut(f / WEIGHTS, 5), f"{WEIGHTS} differs from manifest.json"),
    "truncated on purpose": (
        lambda f: (cut(f / WEIGHTS, 5), rehash(f)), "is not a whole safetensors file"),
    "grown": (
        lambda f: rewrite(f, WEIGHTS, (f / WEIGHTS).read_bytes() + b"\0" * 8),
        "is not a whole safetensors file"),
    "empty": (lambda f: rewrite(f, WEIGHTS, b""), "is not a whole safetensors file"),
    "pickle renamed": (
        lambda f: rewrite(f, WEIGHTS, pickle.dumps({"a": list(range(100))})),
        "is not a whole safetensors file"),
    "a huge header": (
        lambda f: rewrite(f, WEIGHTS, b"\xff" * 8 + b"{}"), "is not a whole safetensors file"),
    "overlapping tensors": (duplicate_header, "is not a whole safetensors file"),
    "flipped bit": (lambda f: flip(f / WEIGHTS, -3), f"{WEIGHTS} differs from manifest.json"),
    "flipped bit, rehashed": (
        lambda f: (flip(f / WEIGHTS, -3), rehash(f)), "the weights are [0-9a-f]{64}, manifest"),
    "other weights": (
        lambda f: tensors(f, lambda t: t.update({NORM: t[NORM] + 1})), "the weights are"),
    "missing tensor": (
        lambda f: tensors(f, lambda t: t.pop(NORM)), f"tensor {NORM} is missing"),
    "extra tensor": (
        lambda f: tensors(f, lambda t: t.update({"model.x": torch.ones(2)})),
        "tensor model.x is not the anchor's"),
    "tied head stored": (
        lambda f: tensors(f, lambda t: t.update({"lm_head.weight": torch.ones(32, 8)})),
        "tensor lm_head.weight is not the anchor's"),
    "fused name": (
        lambda f: tensors(f, lambda t: t.update({"model.qkv.weight": t.pop(SQUARE)})),
        "tensor model.qkv.weight is not the anchor's"),
    "transposed square": (
        lambda f: tensors(f, lambda t: t.update({SQUARE: t[SQUARE].T})), "the weights are"),
    "transposed": (
        lambda f: tensors(
            f, lambda t: t.update({n: x.T for n, x in t.items() if n.endswith("up_proj.weight")})),
        r"tensor model.layers.1.mlp.up_proj.weight has shape \[8, 16\], allowed: \[16, 8\]"),
    "flattened": (
        lambda f: tensors(f, lambda t: t.update({SQUARE: t[SQUARE].view(-1)})),
        r"has shape \[64\], allowed: \[8, 8\]"),
    "wrong dtype": (
        lambda f: tensors(f, lambda t: t.update({NORM: t[NORM].float()})),
        f"tensor {NORM} is F32, allowed: BF16"),
    "half for bfloat16": (
        lambda f: tensors(f, lambda t: t.update({NORM: t[NORM].half()})),
        f"tensor {NORM} is F16, allowed: BF16"),
    "integers": (
        lambda f: tensors(f, lambda t: t.update({NORM: t[NORM].to(torch.int32)})),
        f"tensor {NORM} is I32, allowed: BF16"),
    "eight bits": (
        lambda f: tensors(f, lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)})),
        f"tensor {NORM} is F8_E4M3, allowed: BF16"),
    "NaN": (lambda f: tensors(f, setitem(NORM, float("nan"))), f"tensor {NORM} holds 1 value"),
    "infinite": (lambda f: tensors(f, setitem(NORM, float("-inf"))), "values that are not finite"),
    "empty tensor": (
        lambda f: tensors(f, lambda t: t.update({NORM: torch.empty(0, dtype=torch.bfloat16)})),
        r"has shape \[0\], allowed: \[8\]"),
}  # fmt: skip
