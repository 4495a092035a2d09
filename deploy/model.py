"""Where the anchor lies on disk: the embedded model, a directory, or the Hugging Face hub.

Write what the processes of a home read when they start, and start nothing.

    python -m deploy.model HOME [SETTINGS.toml]

For platforms that start the processes themselves; on one machine `up` does the same.
"""

import argparse
from pathlib import Path

from agent.config import Settings, load
from agent.errors import UserError
from agent.home import Home, write_atomically
from agent.sections import EMBEDDED, ModelSettings
from agent.store.ledger import Ledger
from agent.store.weights import Anchor
from deploy.serving.served import Served, write_served


def prepare(home: Home, settings: Settings) -> Served:
    """settings.json and serving.json: the ledger's champion, the anchor where it has none."""
    anchor = Anchor.open(resolve(settings.model))
    ledger = Ledger(home.state_db)
    try:
        champion = ledger.champion() or anchor.digest
    finally:
        ledger.close()
    directory = anchor.directory if champion == anchor.digest else home.weights / champion
    if not directory.is_dir():
        raise UserError(f"champion {champion[:12]}: {directory} is not there")
    served = Served(champion, str(directory))
    write_atomically(home.settings_json, settings.model_dump_json(indent=1))
    write_served(home, served)
    return served


_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]


def resolve(model: ModelSettings) -> Path:
    """The directory of the anchor's Hugging Face files; a hub id is downloaded and cached.

    Raises:
        UserError: A path that is no model directory, or an id the hub does not give.
    """
    if model.path == EMBEDDED:
        return Path(__file__).parent / "embedded" / "model"
    path = Path(model.path).expanduser()
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
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_FILES))
    except HFValidationError as error:
        raise UserError(f"model {repo!r} is neither a directory nor a hub id: {error}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"model {repo!r} (revision {revision or 'main'}) cannot be had from the hub: {reason}; "
            "give a local directory, or an id the hub knows"
        ) from None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="deploy.model")
    parser.add_argument("home", type=Path)
    parser.add_argument("settings", type=Path, nargs="?")
    told = parser.parse_args()
    prepare(Home.at(told.home), load(told.settings))
