"""What a new user met on the way from the README to a promoted version, and the test of each.

``FRICTIONS`` says where the right behaviour is kept; what has no better place is tested here.
"""

import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agent.config import keep, load
from agent.errors import UserError
from agent.home import Home, locked
from agent.store import feedback
from agent.store.experience import Answer, Interaction, Judgement
from agent.store.feedback import Feedback
from deploy.stack import choose_ports
from evaluators.task import judge, row_problem
from evaluators.tasks import TASKS
from flows.commands.measure import rescore_table
from flows.commands.runs import improve_now
from flows.serve.outlook import overview, waiting
from flows.serve.promote import promote
from flows.serve.stack import learning
from flows.service import Service
from flows.session import Session
from flows.show.report import round_table
from flows.show.terminal import Silent, round_line, status_tables

TESTS = Path(__file__).parents[1]
SHOW, SERVE = "flows/show/test_next_steps.py", "flows/serve/test_up_settings.py"
HERE = "flows/test_first_hour_frictions.py"

FRICTIONS = {
    "thirty rows of one client: two used, the others dropped without a word": (
        "flows/learn/test_admission.py::test_thirty_rows_of_the_only_client_are_all_used",
        "flows/learn/test_admission.py::test_with_several_clients_the_cap_holds_and_is_said_aloud",
    ),
    "a client's system message and turns were not what a round asked": (
        "flows/learn/test_admission.py::test_a_request_is_asked_as_it_was_sent_byte_for_byte",
        "flows/learn/test_improve.py::test_a_rounds_prompts_are_what_was_sent_and_its_file_keeps_them",
    ),
    "exit code 0 of a broken task, a finding, an interrupt": (
        "flows/test_exit_codes.py::test_a_command_ends_with_its_code",
        "flows/test_exit_codes.py::test_a_broken_task_and_an_interrupt_are_no_success",
    ),
    "a changed settings file was ignored by the next up": (
        f"{SERVE}::test_a_changed_file_and_variable_count_at_the_next_up",
        "agent/test_config.py::test_a_running_home_names_what_it_was_not_started_with",
    ),
    "improve ended with a printed dict and without a next step": (
        f"{SHOW}::test_improve_ends_with_the_table_of_the_demo_and_never_a_printed_dict",
        f"{SHOW}::test_a_round_ends_with_one_next_step",
        f"{HERE}::test_a_candidate_that_passed_is_not_called_promoted",
    ),
    "a round on a target without a right answer ran to its end": (
        "flows/learn/test_weigh.py::test_a_round_that_learns_nothing_says_why_and_asks_no_model",
        f"{HERE}::test_a_round_without_a_step_is_drawn_with_its_reason",
        "flows/show/test_catch_up.py::"
        "test_a_round_without_a_step_leaves_the_champions_version_as_it_was",
    ),
    "a small own task held every candidate while its check was content": (
        "flows/commands/test_task_check.py::"
        "test_thirty_one_rows_hold_a_candidate_that_loses_nothing_and_it_is_said",
    ),
    "progress without reward, speed and time left": (
        f"{SHOW}::test_a_round_tells_reward_spread_speed_and_time_left_from_its_first_member_on",
        f"{SHOW}::test_time_left_is_at_the_speed_since_the_work_went_on",
    ),
    "an hourly round on another task, promoted by itself, unannounced": (
        "agent/test_config.py::test_nothing_is_scheduled_or_served_unasked_but_for_the_embedded_model",
        f"{SERVE}::test_up_says_what_will_happen_by_itself",
        "flows/test_due.py::test_new_rows_start_one_round_and_again_as_many_the_next",
    ),
    "promote of a waiting candidate denied that it passed; nobody listed it": (
        f"{HERE}::test_promote_of_a_waiting_candidate_names_the_review",
        f"{HERE}::test_who_decided_is_a_name",
    ),
    "the tag to set stood in the source only; approved and MLflow's button did nothing": (
        "flows/show/test_review.py::test_a_waiting_version_names_tag_and_command_and_their_effects",
        "flows/serve/test_reconcile.py::test_other_words_of_approval_count",
        "flows/serve/test_reconcile.py::test_a_tag_that_decides_nothing_is_answered_on_the_version",
        "flows/serve/test_reconcile.py::"
        "test_a_held_version_is_not_approved_by_the_alias_and_its_page_says_how",
    ),
    "Prefect's runs had no names, logs, tasks or artifacts; hold and promote were both green": (
        "flows/show/test_prefect.py::test_a_run_ends_in_the_state_of_its_verdict",
        "flows/show/test_prefect.py::test_a_run_is_called_by_its_round_and_digest",
        "flows/show/test_prefect.py::test_a_run_shows_its_name_lines_tasks_and_end",
        "flows/show/test_prefect.py::test_the_page_of_a_round_has_its_table_and_its_plots",
    ),
    "MLflow's address was a welcome page; examples had no question and no gold answer": (
        "flows/show/test_review.py::test_fixed_and_broken_rows_stand_side_by_side_as_data",
        f"{HERE}::test_status_names_the_page_of_the_versions",
    ),
    "nothing read feedback": (f"{HERE}::test_status_counts_traffic_and_feedback",),
    "a long command with --json was silent": (
        f"{SHOW}::test_progress_beside_json_goes_to_stderr_alone",
    ),
    "a typo in improve --set printed a traceback": (
        "integration/test_service.py::test_review_swap_rollback_and_forward",
        f"{HERE}::test_a_second_round_is_refused_before_anything_starts",
    ),
    "status showed neither rounds nor what waits": (
        f"{HERE}::test_status_shows_the_round_that_runs_and_what_waits",
        f"{SHOW}::test_status_shows_round_candidates_traffic_and_feedback",
    ),
    "other ports after down and up": (f"{HERE}::test_ports_stay_while_they_are_free",),
    "hundreds of lines for one mistake of a task": (
        "evaluators/test_plugins.py::test_a_mistake_met_on_every_row_is_one_line",
    ),
    "wrong names, units and variables were believed": (
        "agent/test_config.py::test_a_mistake_is_one_line_with_value_and_what_was_allowed",
        "agent/test_config.py::test_no_variable_is_ignored",
        f"{SERVE}::test_a_task_that_does_not_exist_is_refused",
    ),
    "evaluate did not say where its table is": (
        f"{SHOW}::test_an_evaluation_names_its_table_and_what_is_next",
        f"{HERE}::test_rescore_names_a_table_that_is_not_there",
    ),
    "forget of nobody printed zeros; a forgotten principal's key went on": (
        "flows/commands/test_forget.py::test_an_unknown_principal_is_told_and_nothing_is_done",
        "flows/commands/test_forget.py::test_its_keys_end_and_the_endpoint_does_not_open_again",
    ),
    "the reason of a promotion began with a prior task": (
        f"{SHOW}::test_a_promotion_is_explained_by_its_target_first",
    ),
    "the README's first request was answered wrongly before and after learning": (
        f"{HERE}::test_the_readmes_request_teaches_and_its_first_answer_is_as_it_says",
    ),
    "key times were numbers, digests were cut": (
        f"{SHOW}::test_times_of_keys_are_dates",
        f"{SHOW}::test_digests_and_paths_are_never_cut",
    ),
}


@pytest.mark.parametrize("friction", FRICTIONS)
def test_every_friction_has_its_tests(friction: str) -> None:
    for name in FRICTIONS[friction]:
        file, _, function = name.partition("::")
        text = (TESTS / file).read_text("utf-8")
        assert re.search(rf"^def {function}\(", text, re.MULTILINE), name


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """A home with a ledger; nothing runs."""
    home = Home.at(tmp_path / "home")
    keep(home, load(review={"mode": "manual"}, tasks={"rows": 40}))
    service = Service.at(home.root)
    service.champion()
    return service


def candidate(service: Service, number: int, *states: str) -> str:
    """A digest that a round made, and its states."""
    digest, run, origin = f"{number:064x}", f"{number:04d}-gsm8k", service.origin.digest
    service.journal.open_run(
        run, anchor_digest=origin, parent_digest=origin, target="gsm8k", run_seed=number,
        plan={"generations": 4, "rows": {"set_aside": {"over_cap": 25}}}, now=time.time(),
    )  # fmt: skip
    if states:
        service.journal.finish(run, digest, "a test", time.time())
    figures = {"target": "gsm8k", "tasks": {"gsm8k": {"difference": 0.52}}}
    for state in states:
        more: dict[str, Any] = {"statistics": figures} if state == "EVALUATED" else {}
        service.record(digest, state, "a test", **more)
    return digest


PASSED = ("PROPOSED", "EVALUATED", "PASSED")


def test_a_candidate_that_passed_is_not_called_promoted(service: Service) -> None:
    digest = candidate(service, 1, *PASSED)
    assert service.champion() == service.origin.digest
    assert service.ledger.state(digest) == "PASSED"
    (shown,) = waiting(service)
    assert (shown["digest"], shown["gain"]) == (digest, 0.52)
    assert shown["next"] == "passed, not served: `anchorage promote 00000000`"


def test_promote_of_a_waiting_candidate_names_the_review(service: Service) -> None:
    digest = candidate(service, 1, *PASSED, "AWAIT_REVIEW")
    with pytest.raises(UserError, match="waits for review; allowed: `anchorage review approve"):
        promote(Session(service, Silent()), digest)
    with pytest.raises(UserError, match="is the champion and served already"):
        promote(Session(service, Silent()), service.champion())


def test_who_decided_is_a_name(service: Service) -> None:
    candidate(service, 1, "PROPOSED")
    actors = {entry.actor for entry in service.ledger.history()}
    assert actors == {service.actor}
    assert re.fullmatch(r"[^@:]+@[^:]+", service.actor)
    service.record(f"{1:064x}", "REJECT", "worse", actor="ann@example.org")
    assert service.ledger.history(1)[0].actor == "ann@example.org"


def test_status_shows_the_round_that_runs_and_what_waits(service: Service) -> None:
    assert learning(Home(service.home.root / "none")) is None
    assert overview(service)["round"] is None
    waits = candidate(service, 1, *PASSED, "AWAIT_REVIEW")
    candidate(service, 2)
    with locked(service.home.round_lock, taken="", wait_s=0):
        shown = learning(service.home)
    assert shown is not None
    assert round_line(shown["round"]) == "0002-gsm8k: learning, generation 0 of 4"
    assert [each["digest"] for each in shown["waiting"]] == [waits]
    assert shown["traffic"]["set_aside"] == {"over_cap": 25}
    assert "interrupted" in round_line(overview(service)["round"])
    service.journal.finish("0002-gsm8k", f"{2:064x}", "ended", time.time())
    service.record(f"{2:064x}", "PROPOSED", "a test")
    assert "its verdict is missing" in round_line(overview(service)["round"])


def traffic(service: Service, ident: str, created: float, **columns: Any) -> None:
    usual: Mapping[str, Any] = {
        "inference_id": ident, "created": created, "endpoint": "chat.completions", "model": "m",
        "version": "v", "principal": "ann", "status": "ok", "latency_s": 0.1, "prompt_tokens": 5,
        "completion_tokens": 1, "task": "gsm8k", "source": "submitted", "prompt": "[]",
        "row_hash": ident, "answers": (Answer(0, "x", "stop"),),
    }  # fmt: skip
    service.experience.record([Interaction(**usual | columns)])


def test_status_counts_traffic_and_feedback(service: Service) -> None:
    candidate(service, 1, "PROPOSED")
    now = time.time()
    traffic(service, "old", now - 1000)
    for ident in ("a", "b", "c"):
        traffic(service, ident, now + 10)
    traffic(service, "late", now + 10, row_hash=None)
    judged = [Judgement(each, 0, judged=now, reward=1.0) for each in ("old", "a", "b")]
    service.experience.judge([*judged, Judgement("c", 0, judged=now, error="timeout")])
    for number, value in enumerate((1.0, 0.0, 1.0)):
        more = {"supersedes": "f1"} if number == 2 else {}
        given = Feedback(f"f{number}", "a", "ann", "thumbs", value, {}, **more)
        feedback.add(service.experience, given, now)
    shown = overview(service)
    assert shown["traffic"] == {
        "new_rows": 2,
        "waiting_for_their_row": 1,
        "unverified": 1,
        "set_aside": {"over_cap": 25},
    }
    assert shown["feedback"] == [{"metric": "thumbs", "n": 2, "mean": 1.0}]


def test_a_second_round_is_refused_before_anything_starts(service: Service) -> None:
    with (
        locked(service.home.round_lock, taken="", wait_s=0),
        pytest.raises(UserError, match="another process is running a round"),
    ):
        improve_now(service.home.root, None, {}, Silent())
    with pytest.raises(UserError, match=r"unknown key 'learner\.sgima'"):
        improve_now(service.home.root, None, {"sgima": 1}, Silent())
    assert service.journal.runs() == []


def test_a_round_without_a_step_is_drawn_with_its_reason() -> None:
    figures = dict.fromkeys(("anchor", "champion", "candidate", "difference", "low", "high", "p"))
    report = {
        "round": "0001-gsm8k", "target": "gsm8k", "generations": 3, "stopped": "no learning",
        "digest": "d" * 64, "verdict": "unchanged", "reasons": ["no answer was right"],
        "tasks": {"gsm8k": {"n": 0, "outcome": None} | figures}, "shift": {},
    }  # fmt: skip
    assert round_table(report).caption == "no answer was right"


def test_ports_stay_while_they_are_free() -> None:
    first = choose_ports(load())
    kept = {"gateway": first.gateway, "mlflow": first.mlflow, "prefect": first.prefect}
    assert choose_ports(load(), kept) == first
    assert choose_ports(load(gateway={"port": first.gateway}), {"gateway": 1}) != first
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first.gateway))
        taken.listen()
        second = choose_ports(load(), kept)
        assert second.gateway != first.gateway
        assert (second.mlflow, second.prefect) == (first.mlflow, first.prefect)
        with pytest.raises(UserError, match=f"gateway port {first.gateway} on 127.0.0.1"):
            choose_ports(load(gateway={"port": first.gateway}), kept)


def test_rescore_names_a_table_that_is_not_there(service: Service, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.parquet"):
        rescore_table(service.home.root, tmp_path / "none.parquet", None)


@pytest.mark.proof
def test_the_readmes_request_teaches_and_its_first_answer_is_as_it_says(service: Service) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = (TESTS.parent / "README.md").read_text("utf-8")
    said = re.search(r'^question = "(.*)"$', text, re.MULTILINE)
    assert said is not None
    task = TASKS["gsm8k"]
    row = {"question": said[1], "answer": "#### 11"}
    (message,) = task.messages(row)
    assert row_problem(task, row) is None
    assert message["content"].replace("\n", "\\n").removeprefix(said[1]) in text
    model = AutoModelForCausalLM.from_pretrained(service.origin.directory)
    tokenizer = AutoTokenizer.from_pretrained(service.origin.directory)
    ids = tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**ids, max_new_tokens=task.max_tokens, do_sample=False)[0]
    words = tokenizer.decode(answer[ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert f"answered `{words}` by the embedded model" in text
    assert judge(task, words, row).reward == 0


def test_status_names_the_page_of_the_versions() -> None:
    status = {"endpoint": "http://e", "services": [], "prefect": None, "sign_in": None}
    status |= {"mlflow": "http://m", "champion": None}
    page = "http://m/#/models/mine"
    (drawn,) = status_tables(status | {"model_page": page})
    assert page in list(drawn.columns[1].cells)
    (drawn,) = status_tables(status | {"model_page": None, "mlflow": None})
    assert page not in list(drawn.columns[1].cells)
    (drawn,) = status_tables(status | {"model_page": page, "away": ["http://m/health"]})
    assert any(str(cell).startswith("http://m/health;") for cell in drawn.columns[1].cells)
