"""Where the anchor comes from, and what is said when it is not there."""

from pathlib import Path

import pytest

from agent.errors import UserError
from agent.sections import ModelSettings
from deploy.model import resolve


def test_a_directory_with_weights_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model.safetensors").touch()
    assert resolve(ModelSettings(path=str(tmp_path))) == tmp_path.resolve()


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_directory_without_a_part_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    for name in {"config.json", "model.safetensors"} - {missing}:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=missing.split(".")[-1]):
        resolve(ModelSettings(path=str(tmp_path)))


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as told:
        resolve(ModelSettings(path="anchorage-tests/no-such-model"))
    assert "anchorage-tests/no-such-model" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_name_that_is_no_id_is_refused() -> None:
    with pytest.raises(UserError, match="a/b/c"):
        resolve(ModelSettings(path="a/b/c"))
