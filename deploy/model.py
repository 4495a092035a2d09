"""Where the anchor lies on disk: the embedded model, a directory, or the Hugging Face hub."""

from pathlib import Path

from agent.errors import UserError
from agent.sections import EMBEDDED, ModelSettings

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
