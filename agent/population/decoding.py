"""One decoding for all: how prompts are written and answers read, in every engine of a home.

The population's engines and the serving engine take the same chat template, its variables, the
penalties of the model's generation_config.json and the same reasoning parser. Answers are greedy
unless a client gives a temperature.

``largest_difference`` and ``kl_per_token`` compare two models by the log-probabilities of their
answers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from agent.config import Settings
from agent.errors import UserError
from agent.home import read_sealed
from agent.population.schedule import Logprobs, Message, Messages, Prompt

PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")  # change greedy answers
CACHED_PROMPTS = 20_000
MESSAGE_TOKENS = 8  # a chat template's own, for each message; measured ones add 4 to 6

Tools = Sequence[Mapping[str, Any]]  # as the chat completions API has them
Calls = Sequence[Mapping[str, Any]]  # {"name", "arguments"} each
ToolReader = Callable[[str, Tools], tuple[str, Calls]]  # an answer without its calls, and these


def decoding(settings: Settings, directory: Path) -> dict[str, Any]:
    """How prompts are written and answered, in training, at the gate and at the endpoint alike.

    ``penalties`` and ``eos_token_id`` are those in force of the generation_config.json in the
    model's ``directory``; a chat template is given by its sha256. A client's own values come
    first; the longest answer is the task's.

    Raises:
        UserError: The model has no chat template and none is set, or a file of it is damaged.
    """
    path = directory / "generation_config.json"
    model = read_sealed(path) if path.is_file() else {}
    used = settings.tasks.generation_config == "model"
    return {
        "temperature": 0.0,
        "stop": [],
        "seed": None,
        "generation_config": settings.tasks.generation_config,
        "penalties": {each: model[each] for each in PENALTIES if used and model.get(each)},
        "eos_token_id": model.get("eos_token_id"),
        "max_tokens": settings.tasks.max_tokens,
        "chat_template": sha256(_template(settings, directory)).hexdigest()[:12],
        "chat_template_kwargs": settings.model.chat_template_kwargs,
        "reasoning_parser": settings.model.reasoning_parser,
    }


def _template(settings: Settings, directory: Path) -> bytes:
    """The chat template in force; of a model's own, whatever its files hold."""
    if settings.model.template is not None:
        return settings.model.template.encode()
    found = [path.read_bytes() for path in sorted(directory.glob("chat_template.*"))]
    path = directory / "tokenizer_config.json"
    config = read_sealed(path) if path.is_file() else {}
    if inside := config.get("chat_template"):
        found.append(json.dumps(inside).encode())
    if not found:
        raise UserError(
            f"model {settings.model.path!r} has no chat template; set model.chat_template to a "
            "Jinja file, or to 'plain' for a built-in one"
        )
    return b"".join(found)


def generation_config(used: bool) -> dict[str, Any]:
    """vLLM's arguments with which a request that names no temperature is answered greedily.

    ``used``: the other fields of the model's generation_config.json are defaults of a request,
    too. Its end-of-sequence ids end an answer either way.
    """
    source = "auto" if used else "vllm"
    return {"generation_config": source, "override_generation_config": {"temperature": 0.0}}


class Chat:
    """Conversations as token ids, and answers without their thinking and their tool calls.

    Args:
        tokenizer: transformers' own.
        template: The chat template's text; None: the tokenizer's.
        variables: Of the template.
        reader: Makes a function from an answer's text to what follows the thinking, or to None
            where the thinking never ends; None: answers are left as they are.
        caller: From an answer's text and the tools it was offered to its text without calls, and
            the calls; None: none are read.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None,
        variables: Mapping[str, Any],
        reader: Callable[[], Callable[[str], str | None]] | None,
        caller: ToolReader | None = None,
    ) -> None:
        self._tokenizer, self._reader, self._caller = tokenizer, reader, caller
        self._variables = dict(variables) | ({"chat_template": template} if template else {})
        self._ids: dict[str, list[int]] = {}  # by the conversation as JSON
        self._given: dict[str, list[int]] = {}  # by a conversation and an answer to it

    def tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of a conversation; equal ones are kept.

        Raises:
            jinja2.TemplateError: The template does not write such a turn.
        """
        key = json.dumps(prompt if isinstance(prompt, Mapping) else list(prompt))
        if key not in self._ids:
            if len(self._ids) >= CACHED_PROMPTS:
                self._ids.clear()
            self._ids[key] = self._encoded(prompt)
        return self._ids[key]

    def _encoded(self, prompt: Prompt) -> list[int]:
        tools = offered(prompt)
        messages = templated(prompt["messages"]) if isinstance(prompt, Mapping) else list(prompt)
        going_on = bool(messages) and messages[-1]["role"] == "assistant"
        ids: list[int] = self._tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=False,
            add_generation_prompt=not going_on,
            continue_final_message=going_on,
            **({"tools": list(tools)} if tools else {}),
            **self._variables,
        )
        return ids

    def given(self, messages: Messages, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a conversation, and of this answer to it with the end of its turn.

        The template writes both. Where it does not write an answer behind the conversation as it
        is (one that drops or adds thinking), the answer ends with the end-of-sequence token.
        """
        key = json.dumps([list(messages), answer])
        if key not in self._given:
            if len(self._given) >= CACHED_PROMPTS:
                self._given.clear()
            self._given[key] = self._answered(messages, answer)
        return self.tokens(messages), self._given[key]

    def _answered(self, messages: Messages, answer: str) -> list[int]:
        start, given = self.tokens(messages), [*messages]
        if given and given[-1]["role"] == "assistant":  # the first words of the answer
            answer = given.pop()["content"] + answer
        whole: list[int] = self._tokenizer.apply_chat_template(
            [*given, {"role": "assistant", "content": answer}],
            tokenize=True,
            return_dict=False,
            **self._variables,
        )
        if whole[: len(start)] != start:
            ids: list[int] = self._tokenizer.encode(answer, add_special_tokens=False)
            return [*ids, self._tokenizer.eos_token_id]
        special, tail = set(self._tokenizer.all_special_ids), whole[len(start) :]
        end = next((at for at, token in enumerate(tail) if token in special), len(tail) - 1)
        return tail[: end + 1]

    def answer(self, text: str, tools: Tools = ()) -> tuple[str, Calls]:
        """What the endpoint gives as an answer's content, and the offered tools that it calls."""
        if self._reader is not None:
            text = self._reader()(text) or ""  # a reader keeps state: one an answer
        return self._caller(text, tools) if self._caller and tools else (text, ())


def offered(prompt: Prompt) -> Tools:
    """The tools that a prompt offers."""
    return (prompt["tools"] or ()) if isinstance(prompt, Mapping) else ()


def templated(messages: Messages) -> list[Message]:
    """Messages of the API as a chat template gets them from vLLM's server.

    Text in the place of none, and the arguments of calls as objects instead of JSON.
    """
    made = []
    for message in messages:
        calls = [
            {**call, "function": {**call["function"], "arguments": _object(call["function"])}}
            for call in message.get("tool_calls") or ()
        ]
        written = {**message, "content": message.get("content") or ""}
        written.pop("tool_calls", None)
        made.append(written | ({"tool_calls": calls} if calls else {}))
    return made


def _object(call: Mapping[str, Any]) -> Any:
    """A call's arguments as a value; text that a model wrote and that is no JSON stays text."""
    try:
        return json.loads(call.get("arguments") or "{}")
    except (ValueError, RecursionError):
        return call["arguments"]


def largest_difference(
    one: Sequence[Sequence[Logprobs]], other: Sequence[Sequence[Logprobs]]
) -> float:
    """max |log p - log q| over the token ids both list, infinite where their top ids differ.

    one, other: (prompt, position) -> {token id: log p} of the same prompts, k likeliest each.
    Ids at the edge of the top k may differ by a tie; the likeliest may not, nor may fewer than
    half be common.
    """
    if [len(row) for row in one] != [len(row) for row in other]:
        return float("inf")
    pairs = [pair for rows in zip(one, other, strict=True) for pair in zip(*rows, strict=True)]
    return max((_difference(first, second) for first, second in pairs), default=float("inf"))


def _difference(one: Logprobs, other: Logprobs) -> float:
    """The largest difference at one position."""
    common = one.keys() & other.keys()
    if not common or 2 * len(common) < max(len(one), len(other)):
        return float("inf")
    return max(abs(one[token] - other[token]) for token in common)


def kl_per_token(anchor: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> float:
    """Estimate KL(anchor || candidate) per token, in nats.

        KL ~ mean_t ( log p(x_t | x_<t) - log q(x_t | x_<t) ),   x ~ p

    p the anchor, q the candidate, x the continuations drawn from the anchor (``Engine.sample``),
    given as log-probabilities of the same tokens under both. Unbiased; may be below 0 by chance.
    NaN for no tokens: undefined is not zero.
    """
    tokens = sum(map(len, anchor))
    return sum(kl_sums(anchor, candidate)) / tokens if tokens else float("nan")


def kl_sums(anchor: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> list[float]:
    """The sum of log p - log q over each continuation's tokens: what a bootstrap resamples."""
    return [
        sum(p - q for p, q in zip(*rows, strict=True))
        for rows in zip(anchor, candidate, strict=True)
    ]


def count_tokens(model: Path, messages: Sequence[Message], exact_from: int = 0) -> int:
    """Tokens of a chat in the model's tokenizer, its template's allowed for; 0 where it is not
    a ``tokenizer.json``: then the engine alone can tell.

    A chat with fewer UTF-8 bytes than ``exact_from`` is not tokenised, and its bytes are given: no
    text has more tokens than bytes.
    """
    path = model / "tokenizer.json"
    if not path.is_file():
        return 0
    texts, frame = [str(m["content"] or "") for m in messages], MESSAGE_TOKENS * len(messages)
    if (most := frame + sum(len(text.encode()) for text in texts)) < exact_from:
        return most
    encode = _tokenizer(path).encode
    return frame + sum(len(encode(text).ids) for text in texts)


@cache
def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer  # the light part of transformers, which takes seconds

    return Tokenizer.from_file(str(path))
