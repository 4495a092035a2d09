"""Settings: the order of authority, and mistakes told in one line."""

from pathlib import Path

import pytest

from agent import config
from agent.errors import UserError
from agent.home import Home


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
    assert (real.learner.sigma, real.learner.alpha, real.learner.population) == ("auto", "auto", 30)
    assert (real.learner.lam, real.learner.prompts) == (5.0, 200)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[learner]\nsgima = 0.1\n", ["learner.sgima", "0.1", "sigma"]),
        ("lerner = 3\n", ["'lerner'", "3", "learner"]),
        ("[learner]\nsigma = -1\n", ["learner.sigma", "-1", "above 0"]),
        ("[learner]\npenalty = 'l3'\nsigma = 0\n", ["'l3'", "'l2'", "learner.sigma"]),
        ("[gate]\nmin_gain = 0\n", ["gate.min_gain", "greater than 0"]),
        ("[gate.margins]\narc = 5\n", ["gate.margins.arc", "5", "between 0 and 1"]),
        ("[learner\n", ["not TOML"]),
        ("model = 3\n", ["model = 3"]),
        ("[gateway]\nrate = 'lots'\n", ["gateway.rate", "'lots'", "600/minute"]),
        ("[gateway]\ntoken_quota = '5'\n", ["gateway.token_quota", "'5'", "600/minute"]),
        ("[gate.margins]\ncountdown = 8\n", ["gate.margins.countdown = 8", "0.08 is 8 points"]),
        ("[tasks]\nfiles = 'x.py:TASK'\n", ["tasks.files = 'x.py:TASK'", '["x.py:TASK"]']),
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


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "ANCHORAGE_LEARNR__SIGMA",
            "0.1",
            ["ANCHORAGE_LEARNR__SIGMA='0.1'", "ANCHORAGE_LEARNER__"],
        ),
        ("ANCHORAGE_LEARNER_SIGMA", "0.1", ["ANCHORAGE_LEARNER_SIGMA='0.1'", "LEARNER__KEY"]),
        ("anchorage_learnr__sigma", "0.1", ["anchorage_learnr__sigma='0.1'"]),
        ("ANCHORAGE_LEARNER__SGIMA", "0.1", ["learner.sgima", "'0.1'", "sigma"]),
        ("ANCHORAGE_TASKS__FILES", "x.py:TASK", ["tasks.files = 'x.py:TASK'", "a list"]),
        ("ANCHORAGE_MODEL", '{"path":', ["model = "]),
    ],
)
def test_no_variable_is_ignored(
    name: str, value: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as told:
        config.load()
    assert "\n" not in str(told.value)
    assert [word for word in words if word not in str(told.value)] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ANCHORAGE_HOME", "/elsewhere"),
        ("ANCHORAGE_SERVICE_HOST", "10.0.0.1"),
        ("ANCHORAGE_PORT", "tcp://10.0.0.1:80"),
        ("ANCHORAGE_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("ANCHORAGE_LEARNER", '{"sigma": 0.5}'),
    ],
)
def test_variables_that_are_no_mistake_are_taken(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert config.load().learner.sigma == (0.5 if "LEARNER" in name else 0.01)


def test_nothing_is_scheduled_or_served_unasked_but_for_the_embedded_model() -> None:
    own = config.load()
    assert (own.projection.loop_minutes, own.review.mode) == (60.0, "auto")
    for path in ("Qwen/Qwen2.5-3B-Instruct", "smollm2"):
        real = config.load(model={"path": path})
        assert (real.projection.loop_minutes, real.projection.loop_rows) == (0.0, 0)
        assert real.review.mode == "manual"


def test_a_running_home_names_what_it_was_not_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    home = Home.at(tmp_path / "home")
    config.keep(home, config.load())
    assert config.unheeded(home, config.kept(home)) == []
    write(tmp_path, "[learner]\nsigma = 0.01\nalpha = 0.5\n")
    monkeypatch.setenv("ANCHORAGE_TASKS__ROWS", "7")
    lines = config.unheeded(home, config.kept(home))
    assert sorted(line.split(" counts from")[0] for line in lines) == [
        "learner.alpha = 0.5",
        "tasks.rows = 7",
    ]
    assert all("started with" in line and "anchorage up" in line for line in lines)
    write(tmp_path, "[learner]\nsgima = 1\n")
    (line,) = config.unheeded(home, config.kept(home))
    assert "sgima" in line


def test_a_model_is_named_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert config.load(model={"path": "mine"}).model.path == str(tmp_path / "mine")
    assert config.load(model={"path": "not/here"}).model.path == "not/here"


@pytest.mark.parametrize("value", [0, -1, "lots", float("inf"), None])
def test_a_size_is_a_number_above_0_or_auto(value: object) -> None:
    with pytest.raises(UserError, match=r"learner.sigma = .* allowed: a number above 0, or 'auto'"):
        config.load(None, learner={"sigma": value})
    assert config.load(None, learner={"sigma": "auto"}).learner.sigma == "auto"
    assert config.load(None, learner={"sigma": "0.25"}).learner.sigma == 0.25


def test_a_profile_may_be_named_for_a_model_of_ones_own(tmp_path: Path) -> None:
    text = "[model]\npath = '/models/mine'\nprofile = 'instruct'\n[learner]\nbatch = 48\n"
    settings = config.load(write(tmp_path, text))
    assert (settings.learner.batch, settings.learner.prompts) == (48, 2048)
    assert (settings.learner.sigma, settings.review.mode) == ("auto", "manual")
    with pytest.raises(UserError, match=r"model\.profile = 'large'"):
        config.load(None, model={"profile": "large"})
    assert set(config.PROFILES) == {"embedded", "smollm2", "instruct"}


@pytest.mark.parametrize("url", ["postgres://me:secret@db/x", "mysql://me:secret@db/x", "x"])
def test_a_state_url_of_another_kind_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(UserError, match=r"state\.url = .*allowed: postgresql://") as error:
        config.load(state={"url": url})
    assert "secret" not in str(error.value)


def test_traffic_is_where_the_state_is_unless_it_is_named(tmp_path: Path) -> None:
    home, url = Home.at(tmp_path), "postgresql://me@db/x"
    assert config.load().state_at(home) == home.state_db
    assert config.load().experience_at(home) == home.experience_db
    both = config.load(state={"url": url})
    assert (both.state_at(home), both.experience_at(home)) == (url, url)
    apart = config.load(state={"url": url}, gateway={"experience_url": "sqlite:///e.db"})
    assert apart.experience_at(home) == "sqlite:///e.db"


def test_what_changed_is_shown_without_passwords() -> None:
    [change] = config.changes(
        config.load(), config.load(state={"url": "postgresql://me:p@ss@db/x?password=other"})
    )
    assert change.shown()["after"] == "postgresql://me:***@db/x?password=***"
    assert change.after == "postgresql://me:p@ss@db/x?password=other"
