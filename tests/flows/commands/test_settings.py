"""`anchorage settings`: prints what holds, and a reference that is current."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent.config import Settings, load
from flows.commands.settings import effective, literal, reference, to_toml

ROOT = Path(__file__).parents[3]


def test_the_reference_is_current() -> None:
    written = (ROOT / "docs" / "settings.md").read_text("utf-8")
    assert written == reference(), "run: anchorage settings --markdown > docs/settings.md"


def test_the_reference_has_every_key_with_its_description() -> None:
    text = reference()
    for name, section in Settings.model_fields.items():
        assert f"\n## {name}\n" in text
        assert section.annotation is not None
        for key, field in section.annotation.model_fields.items():
            (line,) = {
                each for each in text.split(f"\n## {name}\n")[1].split("\n## ")[0].split("\n")
                if each.startswith(f"| `{key}` |")
            }  # fmt: skip
            assert str(field.description) in line.replace("\\", "")


def test_bounds_and_choices_are_told() -> None:
    text = reference()
    assert '| `sigma` | float or str | `"auto"` |' in text
    assert "| `huber_threshold` | float | `0.01` | above 0 |" in text
    assert '| `mode` | str | `"manual"` | `"auto"`, `"manual"` |' in text
    assert "| `margins` | table of float | `{}` | above 0, below 1 |" in text
    assert "| `port` | int | `0` | at least 0, at most 65535 |" in text
    assert "| `priors` | list of str | not set |  |" in text


def test_what_is_printed_reads_back_as_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = load(
        tasks={"prompts": {"gsm8k": {"system": 'Say "yes" \\ no\nthen', "shots": 2}}, "rows": 7},
        gate={"margins": {"a-b": 0.02}},
        learner={"alpha": 1e-5},
    )
    file = tmp_path / "printed.toml"
    file.write_text(to_toml(chosen.model_dump(mode="json")), encoding="utf-8")
    assert load(file) == chosen


def test_the_settings_of_a_home_are_those_it_was_started_with(tmp_path: Path) -> None:
    chosen = load(gateway={"port": 4711, "experience_url": "postgresql://me:secret@db:5432/x"})
    (tmp_path / "settings.json").write_text(chosen.model_dump_json())
    values = effective(tmp_path, None)
    assert values["gateway"]["port"] == 4711
    assert values["gateway"]["experience_url"] == "postgresql://me:***@db:5432/x"


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (3, "3"), (1e-05, "1e-05"), ("a\nb", '"a\\nb"'), ((1, 2), "[1, 2]")],
)
def test_values_are_written_as_toml(value: object, text: str) -> None:
    assert literal(value) == text


@pytest.mark.proof
def test_the_command_prints_one_json_document(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "flows.cli", "settings", "--json", "--home", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout)["model"]["path"] == "embedded"
