"""Settings are read again at every `up`; what a service does by itself is said in words."""

from pathlib import Path
from typing import Any

import pytest

from agent import config
from agent.config import Settings, load
from agent.errors import UserError
from agent.home import Home
from flows.serve.outlook import outlook
from flows.serve.stack import read_settings
from flows.service import Service
from flows.show.terminal import console, settings_tables

Options = dict[str, dict[str, Any]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home beside the folder that commands are given in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Home.at(tmp_path / "home")


def up(home: Home, file: Path | None = None, **options: dict[str, Any]) -> dict[str, Any]:
    """The settings of an `up`, kept as it keeps them; what changed, by key."""
    settings, last, changed = read_settings(home, file, options)
    config.keep(home, settings)
    config.remember(home, last)
    return {each.key: (each.before, each.after) for each in changed}


def now(home: Home) -> Settings:
    return config.kept(home)


def test_a_changed_file_and_variable_count_at_the_next_up(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path("anchorage.toml")
    file.write_text("[review]\nmode = 'manual'\n")
    assert up(home) == {}
    file.write_text("[review]\nmode = 'auto'\n[tasks]\nrows = 9\n")
    monkeypatch.setenv("ANCHORAGE_LEARNER__SIGMA", "0.5")
    assert up(home) == {
        "review.mode": ("manual", "auto"),
        "tasks.rows": (400, 9),
        "learner.sigma": (0.01, 0.5),
    }
    file.write_text("")
    monkeypatch.delenv("ANCHORAGE_LEARNER__SIGMA")
    assert up(home) == {"tasks.rows": (9, 400), "learner.sigma": (0.5, 0.01)}
    assert up(home) == {}


def test_the_file_of_the_last_up_is_read_again_from_anywhere(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[tasks]\nrows = 9\n")
    up(home, file)
    monkeypatch.chdir(tmp_path)
    file.write_text("[tasks]\nrows = 8\n")
    assert up(home) == {"tasks.rows": (9, 8)}
    Path("anchorage.toml").write_text("[tasks]\nrows = 7\n")
    with pytest.raises(UserError, match=r"mine.toml.*anchorage.toml.*--config"):
        up(home)
    file.unlink()
    with pytest.raises(UserError, match=r"mine.toml.*gone"):
        up(home)
    assert up(home, Path("anchorage.toml")) == {"tasks.rows": (8, 7)}


def test_options_hold_until_something_else_is_said(home: Home) -> None:
    up(home, gateway={"port": 8000}, model={"path": "some/model"})
    assert up(home) == {}
    assert (now(home).gateway.port, now(home).model.path) == (8000, "some/model")
    Path("anchorage.toml").write_text("[gateway]\nport = 9000\n")
    assert up(home) == {"gateway.port": (8000, 9000)}
    assert up(home, gateway={"port": 7000}) == {"gateway.port": (9000, 7000)}


def test_a_home_that_was_made_without_up_keeps_its_values(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.keep(home, load(learner={"population": 4}, tasks={"rows": 24}))
    monkeypatch.setenv("ANCHORAGE_TASKS__ROWS", "25")
    assert up(home) == {"tasks.rows": (24, 25)}
    assert up(home) == {}, "nor at the next one"
    assert now(home).learner.population == 4
    monkeypatch.delenv("ANCHORAGE_TASKS__ROWS")
    Path("anchorage.toml").write_text("[learner]\npopulation = 6\n")
    assert up(home)["learner.population"] == (4, 6)


def test_damaged_settings_are_replaced_by_a_named_file_only(home: Home, tmp_path: Path) -> None:
    home.settings_json.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        up(home)
    file = tmp_path / "mine.toml"
    file.write_text("[tasks]\nrows = 9\n")
    assert up(home, file) == {}
    assert now(home).tasks.rows == 9


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"tasks": {"priors": ["nosuch"]}}, "tasks.priors names 'nosuch'; allowed: arc_challenge"),
        ({"tasks": {"target": "gsm9k"}}, "tasks.target names 'gsm9k'"),
        ({"tasks": {"target": "piqa"}}, "tasks.target names 'piqa', a prior task only; allowed: "),
        ({"gate": {"margins": {"nosuch": 0.1}}}, "gate.margins names 'nosuch'"),
        ({"tasks": {"prompts": {"nosuch": "x"}}}, "prompt for task 'nosuch'"),
        ({"tasks": {"revisions": {"nosuch": "x"}}}, "revision for task 'nosuch'"),
    ],
)
def test_a_task_that_does_not_exist_is_refused(home: Home, sections: Options, words: str) -> None:
    with pytest.raises(UserError) as told:
        _ = Service(home, load(**sections)).tasks
    assert words in str(told.value)
    assert "\n" not in str(told.value)


def drawn(settings: Settings, changed: list[dict[str, Any]] | None = None) -> str:
    words = outlook(settings, ["piqa"], "none is scheduled")
    shown = console()
    shown.width = 200
    with shown.capture() as captured:
        for table in settings_tables({"file": None, "changed": changed or [], **words}):
            shown.print(table)
    return captured.get()


def test_up_says_what_will_happen_by_itself() -> None:
    text = drawn(load())
    assert "gsm8k; prior tasks: piqa" in text
    assert "60 minutes after the last round ended" in text
    assert "auto: a candidate that passes the gate is served" in text
    text = drawn(load(model={"path": "some/model"}, gateway={"principal_cap": 0.02}))
    assert "none: `anchorage improve` starts a round" in text
    assert "manual: a candidate waits for `anchorage review approve`" in text
    assert "at most 2 % of a round" in text
    assert "kept for 30 days" in text
    text = drawn(load(model={"path": "some/model"}, projection={"loop_rows": 50}))
    assert "a round after 50 new verified rows of gsm8k" in text


def test_changed_settings_are_shown_before_and_now() -> None:
    text = drawn(load(), [{"key": "tasks.rows", "before": 400, "after": 9}])
    assert [word for word in ("tasks.rows", "400", "9") if word not in text] == []
