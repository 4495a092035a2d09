"""``anchorage evaluate`` and ``rescore`` from end to end, on an endpoint that answers at once."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agent.config import load
from agent.errors import UserError
from agent.home import Home
from evaluators.runner import read_samples, write_samples
from flows.commands.measure import RemoteModel, evaluate_model, rescore_table
from flows.learn.evaluate import pools, unsealed
from flows.service import Service
from flows.show.terminal import Silent

pytestmark = pytest.mark.proof


class Answers(ThreadingHTTPServer):
    """An OpenAI endpoint that says the same to everything and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.said = "so\n#### 2"
        self.asked: list[tuple[str | None, dict[str, Any]]] = []


class Handler(BaseHTTPRequestHandler):
    server: Answers

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.headers["authorization"], body))
        choice = {"message": {"content": self.server.said}, "finish_reason": "stop"}
        told = json.dumps({"choices": [choice], "usage": {"completion_tokens": 5}}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Answers]:
    with Answers() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_url_is_asked_with_its_name_and_key_and_never_taken_for_what_it_was(
    server: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THEIR_KEY", "a key")
    url = f"http://127.0.0.1:{server.server_port}/v1"

    def asked(*tasks: str, twice: bool = False) -> dict[str, Any]:
        endpoint = RemoteModel("their-model", "THEIR_KEY")
        export = tmp_path / "exported"
        return evaluate_model(
            tmp_path / "home", url, tasks, 7, Silent(), endpoint=endpoint, twice=twice, into=export
        )

    told = asked("gsm8k", "piqa", twice=True)
    assert {key for key, _ in server.asked} == {"Bearer a key"}
    assert {body["model"] for _, body in server.asked} == {"their-model"}
    assert len(server.asked) == 2 * 14
    assert {name: row["n"] for name, row in told["tasks"].items()} == {"gsm8k": 7, "piqa": 7}
    assert told["notes"] == []
    assert {name: row["rate"] for name, row in told["discordance"].items()} == {
        "gsm8k": 0.0,
        "piqa": 0.0,
    }
    kept = Path(told["table"]).with_suffix(".discordance.json")
    assert json.loads(kept.read_text()) == told["discordance"]
    names = [Path(path).name for path in told["exported"]]
    assert [name.split("_http")[0] for name in names] == [
        "samples_gsm8k",
        "samples_piqa",
        "results",
    ]

    server.said = "#### -1"
    again = asked("gsm8k", "piqa")
    assert len(server.asked) == 3 * 14
    assert again["tasks"]["gsm8k"]["accuracy"] == 0.0


def test_a_limit_above_what_there_is_is_told_and_no_sealed_row_is_asked(tmp_path: Path) -> None:
    service = Service(Home.at(tmp_path / "home"), load(tasks={"rows": 50}))
    task = service.task("countdown")
    opened, sealed = ({task.key(r) for r in part} for part in pools(service, "countdown"))
    few, many = (unsealed(service, ["countdown"], limit).rows[0][1] for limit in (20, 400))
    assert [*few] == [*many][:20]
    assert opened < {task.key(row) for row in many}
    assert len({task.key(row) for row in many}) == len(many) == 400
    assert not sealed & {task.key(row) for row in many}


def test_too_few_rows_are_a_note(server: Answers, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{server.server_port}/v1"
    told = evaluate_model(tmp_path / "home", url, ["refusal"], 70, Silent())
    [note] = told["notes"]
    assert note.startswith(f"refusal: {told['tasks']['refusal']['n']} rows, 70 asked for")


def test_rescoring_equals_scoring_and_puts_right_what_was_scored_otherwise(
    server: Answers, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    url = f"http://127.0.0.1:{server.server_port}/v1"
    table = Path(evaluate_model(home, url, ["gsm8k", "arc_challenge"], 9, Silent())["table"])
    same = rescore_table(home, table, tmp_path / "same.parquet")
    assert (same["rows"], same["changed"]) == (18, [])
    assert (tmp_path / "same.parquet").read_bytes() == table.read_bytes()

    samples = read_samples(table)
    other = [row | {"reward": 1.0 - row["reward"]} if row is samples[3] else row for row in samples]
    write_samples(tmp_path / "other.parquet", other)
    [change] = rescore_table(home, tmp_path / "other.parquet", tmp_path / "out.parquet")["changed"]
    assert change["example_id"] == samples[3]["example_id"]
    assert change["before"]["reward"] == 1.0 - change["after"]["reward"]
    assert read_samples(tmp_path / "out.parquet") == samples


def test_words_of_the_settings_reach_the_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {
        "prompts": {"gsm8k": "{question} ?", "piqa": {"system": "Be brief.", "prefill": "Number "}},
        "revisions": {"proofwriter": "0" * 40},
        "max_tokens": 32,
    }
    known = Service(Home.at(tmp_path / "home"), load(tasks=tasks)).tasks
    assert known["gsm8k"].template == "{question} ?"
    assert (known["piqa"].system, known["piqa"].prefill) == ("Be brief.", "Number ")
    assert known["proofwriter"].source.revision == "0" * 40
    assert (known["piqa"].max_tokens, known["countdown"].max_tokens) == (16, 32)
    monkeypatch.chdir(tmp_path)
    chosen = load(tasks={"files": ["own/a.py:TASK", "package.b:TASK"], "data_dir": "rows"}).tasks
    assert chosen.files == (f"{tmp_path}/own/a.py:TASK", "package.b:TASK")
    assert chosen.data_dir == tmp_path / "rows"
    with pytest.raises(UserError, match=r"tasks\.prompts\.piqa"):
        load(tasks={"prompts": {"piqa": {"temperature": 1}}})
