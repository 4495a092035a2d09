"""The fields a request may have: an allow-list, checked before anything reaches the engine.

The engine accepts far more (templates, media addresses, engine-internal switches); what is not
written here is refused. Values are checked, then passed on as the client wrote them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

INT64 = 2**63
MAX_EXAMPLE_CHARACTERS = 16_384  # of a row as JSON
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
IGNORED = frozenset(  # accepted because clients send them, never passed on
    {"metadata", "model", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
)


class Strict(BaseModel):
    """No unknown key, no conversion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    """A piece of text; other kinds of content would make the engine fetch addresses."""

    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    """A function the model asked for: arguments are JSON in a string."""

    name: Annotated[str, Field(max_length=64)]
    arguments: str


class ToolCall(Strict):
    """One tool call of an assistant message."""

    id: Annotated[str, Field(max_length=128)]
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Strict):
    """One turn; an assistant's answer can be sent back as it was received."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Annotated[str, Field(max_length=128)] | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    annotations: None = None
    audio: None = None
    function_call: None = None


class Function(Strict):
    """A tool's function; ``parameters`` is a JSON schema."""

    name: Name
    description: Annotated[str, Field(max_length=8192)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The function of a forced choice."""

    name: Name


class NamedTool(Strict):
    """A forced choice of one tool."""

    type: Literal["function"]
    function: NamedFunction


class PlainFormat(Strict):
    """Text, or any JSON object."""

    type: Literal["text", "json_object"]


class JsonSchema(Strict):
    """A schema the answer must follow."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class StreamOptions(Strict):
    """What else a stream carries."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64)],
        Annotated[str, StringConstraints(max_length=MAX_EXAMPLE_CHARACTERS)],
    ],
    Field(max_length=16),
]


class Sampling(Strict):
    """What both kinds of completion share."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | list[Stop] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")], Bias],
            Field(max_length=300),
        ]
        | None
    ) = None
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None


TemplateVariables = Annotated[
    dict[Name, bool | int | float | Annotated[str, StringConstraints(max_length=64)]],
    Field(max_length=16),
]


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None


class FeedbackRequest(Strict):
    """POST /v1/feedback."""

    inference_id: Annotated[str, Field(min_length=1, max_length=128)]
    metric_name: Name
    value: bool | float
    tags: (
        Annotated[
            dict[
                Annotated[str, StringConstraints(min_length=1, max_length=64)],
                Annotated[str, StringConstraints(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    id: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")] | None = None
    supersedes: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    rationale: Annotated[str, Field(max_length=8192)] | None = None


class RewardRequest(Strict):
    """POST /v1/rewards: the row that judges an answer given before, its gold answer included.

    For an answer to a request with ``store: true`` or with a task and no row. The task's verifier
    gives the reward, as it would have done with the row in ``metadata.example``; GET /v1/rewards
    has it a moment later. However late it comes, the row counts in every round from then on while
    the request is kept.
    """

    inference_id: Annotated[str, Field(min_length=1, max_length=128)]
    task: Annotated[str, Field(min_length=1, max_length=64)]
    example: dict[str, Any]
