"""Settings: the order of authority, and mistakes told in one line."""

from pathlib import Path

import pytest

from agent import config
from agent.errors import UserError


def write(folder: Path, text: str) -> Path:
    path = folder / "anchorage.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_arguments_beat_environment_beats_file_beats_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "[learner]\nsigma = 0.2\nalpha = 0.2\npopulation = 4\n")
    monkeypatch.setenv("ANCHORAGE_LEARNER__ALPHA", "0.3")
    settings = config.load(path, learner={"population": 6})
    assert settings.learner.population == 6
    assert settings.learner.alpha == 0.3
    assert settings.learner.sigma == 0.2
    assert settings.learner.lam == config.PROFILES["embedded"]["learner"]["lam"]


def test_the_profile_belongs_to_the_embedded_model_only(tmp_path: Path) -> None:
    real = config.load(write(tmp_path, "[model]\npath = 'Qwen/Qwen2.5-3B-Instruct'\n"))
    assert (real.learner.sigma, real.learner.alpha, real.learner.population) == (0.001, 0.0005, 30)
    assert (real.learner.lam, real.learner.prompts) == (5.0, 200)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[learner]\nsgima = 0.1\n", ["learner.sgima", "0.1", "sigma"]),
        ("lerner = 3\n", ["'lerner'", "3", "learner"]),
        ("[learner]\nsigma = -1\n", ["learner.sigma", "-1", "greater than 0"]),
        ("[learner]\npenalty = 'l3'\nsigma = 0\n", ["'l3'", "'l2'", "learner.sigma"]),
        ("[gate]\nmin_gain = 0\n", ["gate.min_gain", "greater than 0"]),
        ("[gate.margins]\narc = 5\n", ["gate.margins.arc", "less than 1"]),
        ("[learner\n", ["not TOML"]),
    ],
)
def test_a_mistake_is_one_line_with_value_and_what_was_allowed(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as told:
        config.load(write(tmp_path, text))
    assert "\n" not in str(told.value)
    assert [word for word in words if word not in str(told.value)] == []


def test_a_missing_settings_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        config.load(tmp_path / "none.toml")
