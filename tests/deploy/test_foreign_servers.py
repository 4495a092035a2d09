"""MLflow and Prefect by URL: no console, no port, and no secret that goes to another server."""

import socket
from pathlib import Path

import pytest

from agent.config import load
from agent.errors import UserError, masked
from agent.home import Home
from deploy.consoles import credentials
from deploy.stack import Ports, choose_ports, client_environment, services

MLFLOW, PREFECT = "https://mlflow.example.org/team", "http://prefect.example.org:4200/api"
PORTS = Ports(1, 2, 3)
BY_URL = [({}, ()), ({"mlflow_url": MLFLOW}, ("mlflow",))]
BY_URL += [({"prefect_api_url": PREFECT}, ("prefect",))]
BY_URL += [({"mlflow_url": MLFLOW, "prefect_api_url": PREFECT}, ("mlflow", "prefect"))]


@pytest.mark.parametrize(("plan", "theirs"), BY_URL)
def test_a_server_by_url_is_named_to_clients_and_not_started(
    tmp_path: Path, plan: dict[str, str], theirs: tuple[str, ...]
) -> None:
    home, settings = Home.at(tmp_path), load(projection=plan)
    made = {each.name: each for each in services(home, settings, PORTS)}
    assert {"mlflow", "prefect"} - made.keys() == set(theirs)
    environment = client_environment(home, settings, PORTS)
    own = {"mlflow_url": "http://127.0.0.1:2", "prefect_api_url": "http://127.0.0.1:3/api"}
    wanted = own | plan
    assert environment["MLFLOW_TRACKING_URI"] == wanted["mlflow_url"]
    assert environment["PREFECT_API_URL"] == wanted["prefect_api_url"]
    assert made["flows"].env == environment


def test_the_port_of_a_console_that_is_not_started_may_be_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        taken = theirs.getsockname()[1]
        with pytest.raises(UserError, match=f"mlflow port {taken}"):
            choose_ports(load(projection={"mlflow_port": taken}))
        by_url = load(projection={"mlflow_port": taken, "mlflow_url": MLFLOW})
        assert choose_ports(by_url, {"mlflow": 4711}).mlflow == 4711  # taken up again later


def test_a_url_ends_without_a_slash() -> None:
    plan = load(projection={"mlflow_url": "http://127.0.0.1:5000/"}).projection
    assert (plan.mlflow_url, plan.consoles) == ("http://127.0.0.1:5000", ("prefect",))


@pytest.mark.parametrize("key", ["mlflow_url", "prefect_api_url"])
@pytest.mark.parametrize(
    "url",
    [
        "https://me:hidden@mlflow.example.org",
        "https://hidden@mlflow.example.org",
        "https://me:hid/hidden@mlflow.example.org",
        "https://mlflow.example.org?token=hidden",
        "https://mlflow.example.org/#page",
        "mlflow.example.org",
        "sqlite:///mlflow.db",
        "databricks",
        "http://",
        "http://two words",
        "http://host:port",
        "http://host:99999",
        'http://host/";exit',
        "http://host/\nEVIL=1",
    ],
)
def test_another_url_is_refused_in_one_line_without_what_is_secret(key: str, url: str) -> None:
    with pytest.raises(UserError, match=rf"projection\.{key} = .*allowed: http://") as error:
        load(projection={key: url})
    assert "hidden" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:p@h/x and https://t@h", "http://***@h/x and https://***@h"),
        ("postgresql://me:p@h/x", "postgresql://me:***@h/x"),
        ("postgresql://me@h/x?password=p&a=b", "postgresql://me@h/x?password=***&a=b"),
        ("http://h/x?api_key=p", "http://h/x?api_key=***"),
        ("http://h/x, not by me@h", "http://h/x, not by me@h"),
    ],
)
def test_what_is_secret_in_a_url_is_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_no_server_gets_anothers_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours are ours whatever the environment has; a team's are theirs, but never our password."""
    home = Home.at(tmp_path)
    ours = credentials(home)
    password = home.password.read_text()
    assert ours["MLFLOW_TRACKING_PASSWORD"] == password
    theirs = {
        "MLFLOW_TRACKING_USERNAME": "ann",
        "MLFLOW_TRACKING_PASSWORD": "a-team's",
        "MLFLOW_TRACKING_TOKEN": "t",
        "PREFECT_API_AUTH_STRING": "ann:a-team's",
        "PREFECT_API_KEY": "k",
    }
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    blank = {"MLFLOW_TRACKING_TOKEN": "", "PREFECT_API_KEY": ""}
    assert credentials(home) == ours | blank
    assert credentials(home, ()) == {}  # the environment's
    only = credentials(home, ("prefect",))
    assert only == {"PREFECT_API_AUTH_STRING": f"anchorage:{password}", "PREFECT_API_KEY": ""}
    for name, value in ours.items():  # as docs/operations.md says to export it
        monkeypatch.setenv(name, value)
    left = {"MLFLOW_TRACKING_PASSWORD": "", "PREFECT_API_AUTH_STRING": ""}
    assert credentials(home, ()) == left
