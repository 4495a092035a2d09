"""How prompts are written and answers read: one source for training, gate and endpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
from reference import letter_tokenizer

from agent.config import keep, kept, load
from agent.errors import UserError
from agent.home import Home
from agent.population.decoding import Chat, decoding, generation_config
from agent.sections import PLAIN_TEMPLATE

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3 + 3?"},
]


def directory(root: Path, template: object = "{{ messages }}", **config: object) -> Path:
    root.mkdir(exist_ok=True)
    (root / "generation_config.json").write_text(json.dumps(config))
    (root / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return root


@pytest.mark.parametrize("template", [None, PLAIN_TEMPLATE])
@pytest.mark.parametrize("answer", ["7", "x = 7", ""])
def test_a_given_answer_is_written_as_the_template_writes_it(
    template: str | None, answer: str
) -> None:
    tokenizer = letter_tokenizer()
    chat = Chat(tokenizer, template, {}, None)
    asked = [{"role": "user", "content": "3 + 4?"}]
    start, tail = chat.given(asked, answer)
    assert start == chat.tokens(asked)
    gap = "" if template is None else " "  # PLAIN_TEMPLATE's, before an answer
    answered = tokenizer.encode(gap + answer, add_special_tokens=False)
    assert tail == [*answered, tokenizer.eos_token_id]
    begun = [*asked, {"role": "assistant", "content": "The sum is "}]
    tail = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    assert chat.given(begun, answer) == (chat.tokens(begun), tail)


def test_an_answer_that_the_template_writes_otherwise_ends_with_the_end_of_sequence() -> None:
    """A template that takes the last answer for thinking, and writes it elsewhere."""
    tokenizer = letter_tokenizer()
    template = (
        "{% for m in messages %}{{ m.content | reverse }}{% endfor %}"
        "{{ 'A' if add_generation_prompt }}"
    )
    chat = Chat(tokenizer, template, {}, None)
    asked = [{"role": "user", "content": "ab"}]
    start, tail = chat.given(asked, "cd")
    assert tokenizer.decode(start) == "baA"
    assert tail == [*tokenizer.encode("cd"), tokenizer.eos_token_id]


def test_the_models_penalties_hold_everywhere_or_nowhere(tmp_path: Path) -> None:
    model = directory(
        tmp_path, repetition_penalty=1.05, temperature=0.7, top_k=20, eos_token_id=[1]
    )
    used, unused = (
        decoding(load(tasks={"generation_config": each}), model) for each in ("model", "none")
    )
    assert (used["penalties"], unused["penalties"]) == ({"repetition_penalty": 1.05}, {})
    assert used["temperature"] == unused["temperature"] == 0.0
    assert used["eos_token_id"] == unused["eos_token_id"] == [1]
    greedy = {"override_generation_config": {"temperature": 0.0}}
    assert generation_config(True) == greedy | {"generation_config": "auto"}
    assert generation_config(False) == greedy | {"generation_config": "vllm"}


def test_what_changes_a_prompt_or_an_answer_changes_the_harness(tmp_path: Path) -> None:
    model = directory(tmp_path / "model")
    other = directory(tmp_path / "other", template="{{ messages[0] }}")
    (tmp_path / "own.jinja").write_text("{% for each in messages %}{{ each }}{% endfor %}")
    changes: list[dict[str, Any]] = [
        {},
        {"chat_template": "plain"},
        {"chat_template": str(tmp_path / "own.jinja")},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_parser": "qwen3"},
    ]
    found = [decoding(load(model=each), model) for each in changes] + [decoding(load(), other)]
    assert len({json.dumps(each) for each in found}) == len(found)


@pytest.mark.parametrize("template", [None, ""])
def test_a_model_without_a_chat_template_is_refused(tmp_path: Path, template: object) -> None:
    model = directory(tmp_path, template)
    with pytest.raises(UserError, match=r"no chat template; set model\.chat_template .* 'plain'"):
        decoding(load(), model)
    assert decoding(load(model={"chat_template": "plain"}), model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert decoding(load(), model)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_damaged_file_of_the_model_is_one_line(tmp_path: Path, name: str) -> None:
    """Such as `status` leaves to `doctor`."""
    model = directory(tmp_path)
    (model / name).write_text('{"a"; 1}')
    with pytest.raises(UserError, match=f"{name}: is damaged"):
        decoding(load(), model)


def test_a_service_keeps_the_template_it_was_started_with(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages }}")
    settings = load(model={"chat_template": str(path)})
    path.unlink()
    keep(Home.at(tmp_path / "home"), settings)
    assert kept(Home.at(tmp_path / "home")).model.template == "{{ messages }}"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"chat_template": "nowhere.jinja"}, "neither 'plain' nor a file"),
        ({"chat_template_kwargs": {"tokenize": False}}, "tokenize: not a variable"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(model=model)


def test_the_plain_template_is_turns_as_text() -> None:
    tokenizer = letter_tokenizer()
    chat = Chat(tokenizer, PLAIN_TEMPLATE, {}, None)
    asked = tokenizer.decode(chat.tokens(CHAT))
    assert asked == (
        "Be brief.\n\nUser: 2 + 2?\n\nAssistant: 4<|im_end|>\n\nUser: 3 + 3?\n\nAssistant:"
    )
    begun = [*CHAT, {"role": "assistant", "content": "It is"}]
    assert tokenizer.decode(chat.tokens(begun)) == f"{asked} It is"


def test_variables_reach_the_template() -> None:
    tokenizer = letter_tokenizer()
    template = "{{ 'no' if thinking is false else 'yes' }}"
    off, on = (Chat(tokenizer, template, each, None) for each in ({"thinking": False}, {}))
    assert [tokenizer.decode(chat.tokens(CHAT)) for chat in (off, on)] == ["no", "yes"]


def test_an_answer_whose_thinking_never_ends_is_empty() -> None:
    def reader() -> Any:
        return lambda text: text.partition("</think>")[2] or None

    chat = Chat(letter_tokenizer(), None, {}, reader)
    assert [chat.answer(text)[0] for text in ("so</think>4", "so")] == ["4", ""]
    assert Chat(letter_tokenizer(), None, {}, None).answer("so</think>4")[0] == "so</think>4"
