"""OpenAI's Responses API at the endpoint: its client, the engine's requests, the rows kept."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from agent.gateway.answers import ResponsesAnswer
from agent.gateway.keys import KeyStore
from agent.gateway.requests import ServedModel, read_responses
from agent.sections_running import GatewaySettings

SHORT = "a" * 12
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False}
ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}
TASK = {"task": "gsm8k", "example": '{"answer": "A"}', "session_id": "s"}


def sent(running: Any) -> dict[str, Any]:
    """The last request that reached the engine, less the cache's salt."""
    path, body = running.engine.seen[-1]
    assert path == "/v1/chat/completions"
    return {name: value for name, value in body.items() if name != "cache_salt"}


def test_a_plain_response_is_the_engines_text_with_the_version(running: Any) -> None:
    with running.openai() as client:
        raw = client.responses.with_raw_response.create(
            model="tiny",
            input="hello",
            instructions="Be short.",
            max_output_tokens=7,
            temperature=0.5,
            top_p=0.9,
            metadata={"k": "v"},
        )
    assert raw.headers["x-model-version"] == SHORT
    response = raw.parse()
    assert (response.output_text, response.status) == ("AAAAA", "completed")
    assert response.id == f"resp_{raw.headers['x-request-id']}"
    assert response.usage.model_dump(exclude_none=True) == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 8,
    }
    assert response.metadata == {"k": "v", "model_version": SHORT}
    assert response.model_extra["system_fingerprint"] == SHORT
    assert (response.instructions, response.max_output_tokens) == ("Be short.", 7)
    assert sent(running) == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "hello"},
        ],
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
    }


def test_an_answer_that_was_cut_off_is_incomplete(running: Any) -> None:
    running.engine.finish = "length"
    with running.openai() as client:
        response = client.responses.create(model="tiny", input="hello")
        *_, last = client.responses.create(model="tiny", input="hello", stream=True)
    for each in (response, last.response):
        assert each.status == "incomplete"
        assert each.incomplete_details.reason == "max_output_tokens"
    assert last.type == "response.incomplete"


def test_a_streamed_response_has_openais_events_in_order(running: Any) -> None:
    with running.openai() as client:
        events = list(client.responses.create(model="tiny", input="hello", stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 5,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1].response
    assert (last.output_text, last.usage.output_tokens) == ("AAAAA", 5)
    assert last.metadata["model_version"] == SHORT
    assert events[0].response.status == "in_progress"
    assert events[-2].item == last.output[0]


def test_the_clients_stream_helper_puts_the_same_response_together(running: Any) -> None:
    with running.openai() as client, client.responses.stream(model="tiny", input="hello") as stream:
        deltas = [e.delta for e in stream if e.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert ("".join(deltas), final.output_text) == ("AAAAA", "AAAAA")


@pytest.mark.parametrize("stream", [True, False])
def test_function_calls_and_an_agents_next_turn(running: Any, stream: bool) -> None:
    """The whole output goes back with the results, as agent frameworks send it."""
    running.engine.tokens = 8
    with running.openai() as client:
        answer = client.responses.create(
            model="tiny", input="what?", tools=[LOOK, ADD], tool_choice="auto", stream=stream
        )
        response = list(answer)[-1].response if stream else answer
        calls = [item for item in response.output if item.type == "function_call"]
        names = ["look", "add"] if stream else ["look"]
        assert [(call.name, json.loads(call.arguments)) for call in calls] == [
            (name, {"x": 1}) for name in names
        ]
        history: list[Any] = [{"role": "user", "content": "what?"}]
        history += [item.model_dump(exclude_none=True) for item in response.output]
        history += [
            {"type": "function_call_output", "call_id": call.call_id, "output": "4"}
            for call in calls
        ]
        assert client.responses.create(model="tiny", input=history).output_text
    first, second = (body for _, body in running.engine.seen)
    assert first["tools"][0] == {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object"}, "strict": False},
    }
    assert first["tool_choice"] == "auto"
    assistant = second["messages"][1]
    assert assistant["content"] == ("so" if stream else None)
    assert [call["function"]["name"] for call in assistant["tool_calls"]] == names
    assert [message["role"] for message in second["messages"][2:]] == ["tool"] * len(names)
    assert second["messages"][2]["tool_call_id"] == assistant["tool_calls"][0]["id"]


@pytest.mark.proof  # seconds to import it
@pytest.mark.parametrize("stream", [True, False])
def test_the_agents_sdk_calls_a_function_and_gets_an_answer(running: Any, stream: bool) -> None:
    """An agent as its documents show it: two requests, the function's result between them."""
    agents = pytest.importorskip("agents")
    results: list[int] = []

    @agents.function_tool
    def look(x: int) -> int:
        results.append(3 + x)
        return results[-1]

    async def exchange() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
            model = agents.OpenAIResponsesModel("tiny", client)
            agent = agents.Agent("helper", instructions="Be short.", model=model, tools=[look])
            untraced = agents.RunConfig(tracing_disabled=True)
            if not stream:
                return await agents.Runner.run(agent, "what?", run_config=untraced)
            result = agents.Runner.run_streamed(agent, "what?", run_config=untraced)
            assert [event async for event in result.stream_events()]
            return result

    result = asyncio.run(exchange())
    assert (result.final_output, results) == ("AAAAA", [4])
    assert [response.usage.requests for response in result.raw_responses] == [1, 1]
    messages = sent(running)["messages"]
    assert [each["role"] for each in messages] == ["system", "user", "assistant", "tool"]
    assert messages[-1] == {
        "role": "tool",
        "tool_call_id": messages[-2]["tool_calls"][0]["id"],
        "content": "4",
    }


def test_streamed_arguments_have_their_events(running: Any) -> None:
    running.engine.tokens = 4
    with running.openai() as client:
        events = list(
            client.responses.create(model="tiny", input="what?", tools=[LOOK], stream=True)
        )
    calls = [event for event in events if "function_call" in event.type]
    assert [event.type.removeprefix("response.function_call_arguments.") for event in calls] == [
        "delta", "delta", "done",
    ]  # fmt: skip
    assert (calls[-1].arguments, calls[-1].output_index) == ('{"x": 1}', 1)
    added = [event.item for event in events if event.type == "response.output_item.added"]
    assert [item.type for item in added] == ["message", "function_call"]
    assert calls[0].item_id == added[1].id


def test_a_schema_and_other_options_reach_the_engine_in_its_words(running: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    with running.openai() as client:
        response = client.responses.create(
            model="tiny",
            input=[
                {"role": "developer", "content": "Count."},
                {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
            ],
            text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
            tools=[LOOK],
            tool_choice={"type": "function", "name": "look"},
            parallel_tool_calls=False,
            reasoning={"effort": "low"},
            extra_body={"chat_template_kwargs": {"enable_thinking": False}},
        )
    assert response.text.format.name == "n"
    body = sent(running)
    assert body["messages"] == [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "one"},
    ]
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": schema, "strict": True},
    }
    assert body["tool_choice"] == {"type": "function", "function": {"name": "look"}}
    assert body["reasoning_effort"] == "low"
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["parallel_tool_calls"] is False


@pytest.mark.parametrize("stream", [True, False])
def test_a_task_is_verified_and_the_conversation_kept_as_a_chats(
    running: Any, stream: bool
) -> None:
    with running.openai() as client, running.http() as http:
        answer = client.responses.create(
            model="tiny", input="hello", instructions="Be short.", metadata=TASK, stream=stream
        )
        response = list(answer)[-1].response if stream else answer
        opinion = {"inference_id": response.id, "metric_name": "m", "value": 1}
        assert http.post("/v1/feedback", json=opinion).status_code == 201
        running.settled()
        (reward,) = http.get("/v1/rewards").json()["data"]
    assert (reward["reward"], reward["session_id"]) == (1.0, "s")
    (row,) = running.store.rows("gsm8k")
    assert json.loads(row.prompt) == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "hello"},
    ]


def test_nothing_of_the_text_is_kept_unasked(running: Any) -> None:
    with running.openai() as client:
        assert client.responses.create(model="tiny", input="hello").model_extra["store"] is False
        assert client.responses.create(model="tiny", input="again", store=True)
    running.settled()
    with running.store.engine.connect() as connection:
        prompts = connection.exec_driver_sql("SELECT prompt FROM interactions ORDER BY id").all()
    assert [prompt for (prompt,) in prompts] == [None, '[{"role":"user","content":"again"}]']


def test_quotas_count_responses(start: Any) -> None:
    running = start(rate="2/hour")
    with running.openai() as client:
        client.responses.create(model="tiny", input="hello")
        list(client.responses.create(model="tiny", input="hello", stream=True))
        with pytest.raises(openai.RateLimitError):
            client.responses.create(model="tiny", input="hello")


@pytest.mark.parametrize("fault", ["cut", "error_event", "abort"])
def test_a_stream_that_breaks_off_raises_in_the_client(running: Any, fault: str) -> None:
    running.engine.fault = fault
    with running.openai() as client, pytest.raises(openai.APIError, match="broke off"):
        list(client.responses.create(model="tiny", input="hello", stream=True))


def test_an_engines_failure_is_the_chats_error(running: Any) -> None:
    running.engine.fault = "down"
    with running.openai() as client, pytest.raises(openai.InternalServerError) as caught:
        client.responses.create(model="tiny", input="hello")
    assert caught.value.status_code == 503


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "no message"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input",
            "input_text",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "item_reference"),
        ({"tools": [{"type": "web_search"}]}, "tools", "function"),
        ({"background": True}, "background", "Unrecognized"),
        ({"conversation": "c"}, "conversation", "Unrecognized"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"include": ["message.output_text.logprobs"]}, "include", "reasoning.encrypted_content"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "at most 4096"),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"$ref": "#"}}}},
            "text.format",
            "no finite value",
        ),
        ({"tools": [LOOK | {"parameters": {"$ref": "#"}}]}, "tools", "no finite value"),
        ({"metadata": {"task": "nope"}}, "metadata.task", "countdown, gsm8k"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x", "allowed: enable_thinking"),
    ],
)
def test_what_is_not_supported_is_refused_in_a_line(
    running: Any, fields: dict[str, Any], param: str, says: str
) -> None:
    with running.http() as client:
        reply = client.post("/v1/responses", json={"model": "tiny", "input": "hello"} | fields)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"].startswith(param)
    assert says in error["message"]
    assert running.engine.seen == []


def test_reasoning_is_an_item_before_the_message() -> None:
    """With a reasoning parser the engine's pieces are labelled."""
    body = json.dumps({"model": "tiny", "input": "hello", "stream": True}).encode()
    call = read_responses(body, GatewaySettings(), ServedModel("tiny", 4096))
    assert call.responses is not None
    form = ResponsesAnswer(call.responses, "1", SHORT)
    pieces = [{"reasoning_content": "hm"}, {"reasoning_content": "m"}, {"content": "yes"}]
    chunks = [{"choices": [{"index": 0, "delta": piece}]} for piece in pieces]
    stream = b"".join(form.event(b"data: " + json.dumps(chunk).encode()) for chunk in chunks)
    events = (stream + form.end()).decode().split("\n\n")[:-1]
    last = json.loads(events[-1].partition("data: ")[2])["response"]
    assert [item["type"] for item in last["output"]] == ["reasoning", "message"]
    assert last["output"][0]["content"] == [{"type": "reasoning_text", "text": "hmm"}]
    assert "event: response.reasoning_text.done" in [each.partition("\n")[0] for each in events]


def test_an_answer_without_a_word_is_a_response_too(running: Any) -> None:
    running.engine.tokens = 0
    with running.openai() as client:
        events = list(client.responses.create(model="tiny", input="hello", stream=True))
    assert [event.type for event in events] == [
        "response.created", "response.in_progress", "response.completed",
    ]  # fmt: skip
    assert events[-1].response.output_text == ""


def test_keys_have_the_same_scopes(start: Any, store: Any) -> None:
    keys = KeyStore(store, fresh_s=0)
    token = keys.create_key("ann", {"infer"}).token
    running = start(keys=keys, host="0.0.0.0")
    body = {"model": "tiny", "input": "hello"}
    with running.http() as client:
        assert client.post("/v1/responses", json=body).status_code == 401
    with running.http(authorization=f"Bearer {token}") as client:
        assert client.post("/v1/responses", json=body).status_code == httpx.codes.OK
        task = body | {"metadata": TASK}
        assert client.post("/v1/responses", json=task).status_code == 403
