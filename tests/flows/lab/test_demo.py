"""The demo by model: the embedded profile is the demo, another model learns an extraction."""

from pathlib import Path

import pytest

from agent.config import load
from agent.sections import SMOLLM2
from evaluators.plugins import load as load_task
from flows.lab.demo import HARMFUL, REAL_HARMFUL, sections
from flows.learn.plan import chosen


def test_another_model_learns_an_extraction_and_promotes_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sections("embedded") == {}
    settings = load(None, model={"path": SMOLLM2}, **sections(SMOLLM2))
    assert settings.review.mode == "auto"
    assert settings.tasks.priors == ("dates", "refusal")
    assert {load_task(spec).name for spec in settings.tasks.files} == {"orders", "dates"}
    assert settings.tasks.target == "orders"
    (tmp_path / "anchorage.toml").write_text(f'[tasks]\ndata_dir = "{tmp_path}"\n')
    settings = load(None, model={"path": SMOLLM2}, **sections(SMOLLM2))
    assert settings.tasks.priors == ("dates", "refusal", "arc_challenge", "piqa")
    assert settings.tasks.data_dir == tmp_path


@pytest.mark.parametrize(("model", "changes"), [("embedded", HARMFUL), (SMOLLM2, REAL_HARMFUL)])
def test_a_harmful_round_is_allowed_and_proposes_its_last_generation(
    model: str, changes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    learner = chosen(load(None, model={"path": model}).learner, changes)
    assert (learner.selection, learner.penalty) == (0, "none")
