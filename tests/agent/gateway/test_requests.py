"""What a request may say: the allow-list, its caps, and what is passed on."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.gateway.errors import ApiError
from agent.gateway.requests import ServedModel, read_chat, read_completion
from agent.gateway.schema import SchemaError, check_schema
from agent.sections_running import GatewaySettings

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
HELLO = [{"role": "user", "content": "hello"}]
SETTINGS = GatewaySettings()
TINY = ServedModel("tiny", 4096, frozenset({"gsm8k", "countdown"}))


def chat(**fields: Any) -> Any:
    return read_chat(
        json.dumps({"model": "tiny", "messages": HELLO} | fields).encode(), SETTINGS, TINY
    )


def completion(**fields: Any) -> Any:
    body = {"model": "tiny", "prompt": "hello"} | fields
    return read_completion(json.dumps(body).encode(), SETTINGS, TINY)


def refused(body: Any, read: Any = read_chat) -> dict[str, Any]:
    with pytest.raises(ApiError) as caught:
        read(body if isinstance(body, bytes) else json.dumps(body).encode(), SETTINGS, TINY)
    assert caught.value.status == 400
    error: dict[str, Any] = orjson.loads(caught.value.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (b"{", None, "not JSON"),
        (b"[1]", None, "allowed: an object"),
        (b'{"model":"tiny"}', "messages", "Missing required parameter: messages"),
        ({"messages": []}, "messages", "at least 1"),
        ({"chat_template": "{{1}}"}, "chat_template", "Unrecognized request argument"),
        ({"cache_salt": "x"}, "cache_salt", "Unrecognized request argument"),
        ({"priority": -5}, "priority", "Unrecognized request argument"),
        ({"prompt_logprobs": 3}, "prompt_logprobs", "Unrecognized request argument"),
        ({"structured_outputs": {"regex": "a*"}}, "structured_outputs", "Unrecognized"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"n": 9}, "n", "allowed: at most 8"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"max_tokens": 10**6}, "max_tokens", "allowed: at most 4096"),
        ({"max_completion_tokens": 10**6}, "max_completion_tokens", "at most 4096"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "allowed: at most 4"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"metadata": {"task": "nope", "example_id": "1"}}, "metadata.task", "countdown, gsm8k"),
        (
            {"metadata": {"task": "gsm8k", "example_id": "1", "example": "{}"}},
            "metadata.example_id",
            "one of them, or neither for a row that comes",
        ),
        ({"metadata": {"task": "gsm8k", "example": "{"}}, "metadata.example", "not JSON at"),
        (
            {"metadata": {"task": "gsm8k", "example": "[1]"}},
            "metadata.example",
            "a JSON list; allowed: an object",
        ),
        ({"metadata": {"note": "x" * 513}}, "metadata.note", "at most 512"),
        (
            b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
            None,
            "not JSON",
        ),
        (
            b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"seed":99999999999999999999}',
            "seed",
            "seed",
        ),
    ],
)
def test_what_is_not_allowed_is_named(body: Any, param: str | None, says: str) -> None:
    if isinstance(body, dict):
        body = {"model": "tiny", "messages": HELLO} | body
    error = refused(body)
    assert error["param"] == param
    assert says in error["message"]


def test_a_picture_would_make_the_engine_fetch_an_address() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]
    refused({"model": "tiny", "messages": [{"role": "user", "content": parts}]})


def test_schemas_are_bounded_in_depth_and_size() -> None:
    deep: dict[str, Any] = {}
    for _ in range(300):
        deep = {"x": deep}
    for schema, says in ((deep, "nested deeper"), ({"enum": ["x" * 70_000]}, "at most 65536")):
        tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        assert says in refused({"model": "tiny", "messages": HELLO, "tools": tools})["message"]
        form = {"type": "json_schema", "json_schema": {"name": "f", "schema": schema}}
        body = {"model": "tiny", "messages": HELLO, "response_format": form}
        assert says in refused(body)["message"]


DEEP = b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"%s":' + b"[" * 1000
CASES = json.loads(Path(__file__).with_name("schemas.json").read_text("utf-8"))
PLACES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "response_format": lambda schema: {
        "type": "json_schema",
        "json_schema": {"name": "f", "schema": schema},
    },
    "tools": lambda schema: [  # type: ignore[dict-item, return-value]
        {"type": "function", "function": {"name": "f", "parameters": schema}}
    ],
}


@pytest.mark.parametrize("read", [read_chat, read_completion])
@pytest.mark.parametrize(
    "field",
    ["temperature", "tools", "response_format", "messages", "metadata", "logit_bias", "nothing",
     "chat_template_kwargs", "stop"],
)  # fmt: skip
def test_deep_nesting_is_refused_wherever_it_is(field: str, read: Any) -> None:
    body = DEEP % field.encode() + b"]" * 1000 + b"}"
    assert "nested deeper than 64" in refused(body, read)["message"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES["refused"], ids=lambda case: case["name"])
def test_a_schema_the_engine_cannot_follow_is_refused_with_its_reason(
    case: dict[str, Any], place: str
) -> None:
    error = refused({"model": "tiny", "messages": HELLO, place: PLACES[place](case["schema"])})
    assert error["param"] == place
    assert error["message"].startswith(f"{place}: ")
    assert case["says"] in error["message"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", CASES["accepted"], ids=lambda case: case["name"])
def test_a_schema_that_can_be_followed_is_passed_on(case: dict[str, Any], place: str) -> None:
    body = PLACES[place](case["schema"])
    assert chat(**{place: body}).payload[place] == body


def test_a_completions_schema_is_checked_alike() -> None:
    body = {
        "model": "tiny",
        "prompt": "x",
        "response_format": PLACES["response_format"]({"$ref": "#"}),
    }
    assert "no finite value" in refused(body, read_completion)["message"]


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"properties": {f"p{i}": {} for i in range(600)}}, "600 properties; allowed: at most 500"),
        ({"anyOf": [{"type": "string"} for _ in range(1100)]}, "more than 1000 schemas"),
    ],
    ids=["properties", "schemas"],
)
def test_a_schema_has_a_bounded_number_of_parts(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(SchemaError, match=says):
        check_schema(schema)


def test_the_longest_chain_of_references_is_checked_in_bounded_steps() -> None:
    names = [f"a{number * 7919 % 900}" for number in range(900)]
    chain = {name: {"$ref": f"#/$defs/{after}"} for name, after in pairwise(names)}
    schema = {"$ref": f"#/$defs/{names[0]}", "$defs": chain | {names[-1]: {"$ref": "#"}}}
    with pytest.raises(SchemaError, match=r"no finite value|depend on each other"):
        check_schema(schema)


def test_variables_of_the_chat_template_are_those_the_settings_name() -> None:
    variables = {"enable_thinking": False}
    assert chat(chat_template_kwargs=variables).payload["chat_template_kwargs"] == variables
    for name in ("chat_template", "tools", "add_generation_prompt", "tokenize"):
        error = refused({"model": "tiny", "messages": HELLO, "chat_template_kwargs": {name: True}})
        assert (
            error["message"] == f"chat_template_kwargs: {name}; allowed: enable_thinking, thinking"
        )
        assert error["param"] == f"chat_template_kwargs.{name}"
    for value in ({"x": 1}, [1], None, "x" * 65):
        body = {"model": "tiny", "messages": HELLO, "chat_template_kwargs": {"thinking": value}}
        assert "chat_template_kwargs.thinking" in refused(body)["message"]
    body = json.dumps({"model": "tiny", "messages": HELLO, "chat_template_kwargs": {"style": "x"}})
    assert read_chat(body.encode(), GatewaySettings(chat_template_kwargs=("style",)), TINY)


def test_the_payload_is_what_the_client_wrote_less_what_is_ours() -> None:
    fields = {
        "temperature": 0,
        "seed": 7,
        "stop": ["\n"],
        "logit_bias": {"5": -100},
        "response_format": {"type": "json_object"},
    }
    call = chat(**fields, user="u", store=True, metadata={"k": "v"}, service_tier="auto")
    assert call.payload == {"messages": HELLO} | fields
    assert call.captures_text


def test_a_stream_is_counted_whether_or_not_the_client_asked() -> None:
    call = chat(stream=True)
    assert call.payload["stream_options"] == {"include_usage": True}
    assert not call.wants_usage
    assert chat(stream=True, stream_options={"include_usage": True}).wants_usage


def test_a_batch_of_prompts_counts_as_choices() -> None:
    assert completion(prompt=["a"] * 8).payload["prompt"] == ["a"] * 8
    assert completion(prompt=[1, 2, 3] * 8).prompt == [1, 2, 3] * 8
    body = {"model": "tiny", "prompt": ["a"] * 5, "n": 2}
    assert "allowed: at most 8" in refused(body, read_completion)["message"]


def test_a_task_is_asked_for_by_id_or_by_row() -> None:
    by_id = chat(metadata={"task": "gsm8k", "example_id": "7", "session_id": "s"})
    assert (by_id.task.task, by_id.task.example_id, by_id.session_id) == ("gsm8k", "7", "s")
    assert chat(metadata={"task": "gsm8k", "example": '{"q": 1}'}).task.example == '{"q": 1}'
    assert not chat(metadata={"session_id": "s"}).captures_text


def outcome(body: bytes) -> int:
    try:
        call = read_chat(body, SETTINGS, TINY)
    except ApiError as error:
        return error.status
    assert orjson.dumps(dict(call.payload))
    return 200


@patient
@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_read_or_refused(body: bytes) -> None:
    assert outcome(body) == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["messages", "tools", "stop", "n", "metadata", "stream_options", "response_format", "seed", "x"]
)


@patient
@given(st.dictionaries(FIELDS, JSON, max_size=4))
def test_values_of_any_kind_are_read_or_refused(fields: dict[str, Any]) -> None:
    body = {"model": "tiny", "messages": HELLO} | fields
    assert outcome(json.dumps(body).encode()) in (200, 400)
