"""Real vLLM engines of many families: members, loads and swaps answer like cold engines."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from agent.home import Home
from agent.learner.noise import Address
from agent.population.certify import ANSWER, PROMPTS, ProbeReply
from agent.population.fresh import FreshEngine
from agent.population.process import EngineLauncher
from agent.population.vllm import EngineOptions
from deploy.model import EMBEDDED_CERTIFICATES
from deploy.serving.controller import connect
from deploy.serving.intact import TOLERANCE, difference, read_probes
from deploy.serving.served import read_served
from flows.commands.runs import review_now
from flows.lab.families import DTYPES, FAMILIES, certify_model, certify_tiny, make_tiny, row
from flows.learn.evaluate import against_cold, first_stage, tables
from flows.serve.swaps import cold_engine
from flows.service import Service
from flows.session import session
from flows.show.terminal import Silent

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3600)]
Scale = Callable[[int, int], int]
HEAD = "a head that is not the embedding"
TIES = (False, True)
REFUSED = {  # vLLM's build for the CPU has no kernel; vLLM does not tie what is tied
    **{(n, t, "float32"): "requires BF16" for n in ("qwen3_5_text", "qwen3_5") for t in TIES},
    **{(n, True, each): HEAD for n in ("olmoe", "gpt_oss") for each in ("float32", "bfloat16")},
}
SLOW = {"gpt_oss"}  # vLLM's reload does not pack its experts: an engine for every member
FEW = ["gpt2", "qwen3_moe"]  # other names, experts; Gemma 2 has a test of its own
PARTS = 4
TABLE = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8").splitlines()


@pytest.mark.parametrize("part", range(PARTS))
def test_every_family_answers_like_cold_engines(part: int, scale: Scale) -> None:
    """In parts, of a quarter of an hour each; `pytest -s` prints each row of docs/models.md."""
    few = scale(0, 1) == 0
    if few and part > 0:
        pytest.skip("all families: in the soak")
    names, dtypes = (FEW, DTYPES[1:]) if few else (list(FAMILIES)[part::PARTS], DTYPES)
    for name, trials in certify_tiny(names, Silent(), dtypes):
        line = row(name, trials)
        sys.stdout.write(f"{line}\n")
        assert few or line in TABLE
        for trial in trials:
            if (name, trial.tied, trial.dtype) in REFUSED:
                assert REFUSED[name, trial.tied, trial.dtype] in trial.error
                continue
            assert trial.certificate is not None, (name, trial.error)
            assert (trial.certificate.way == "fresh") == (name in SLOW), (name, trial)
            if name in SLOW:
                continue
            assert {check.difference for check in trial.certificate.checks} == {0.0}, (name, trial)


def test_the_embedded_models_certificate_is_what_is_measured(scale: Scale) -> None:
    if scale(0, 1) == 0:
        pytest.skip("changes with vLLM alone: in the soak")
    key, measured = certify_model("embedded", Silent())
    shipped = json.loads(EMBEDDED_CERTIFICATES.read_text(encoding="utf-8"))
    assert shipped == {key: json.loads(json.dumps(measured.to_json()))}  # lists for tuples


@pytest.fixture(scope="module")
def launcher() -> Iterator[EngineLauncher]:
    launcher = EngineLauncher()
    yield launcher
    launcher.close()


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_every_member_of_a_model_whose_head_is_its_embedding_is_its_own(
    family: str, launcher: EngineLauncher, tmp_path: Path, scale: Scale
) -> None:
    """Twelve questions of each member, against an engine that was started on the member."""
    model = make_tiny(tmp_path / "model", family, tied=True)

    def start(directory: Path) -> Any:
        return launcher.engine(
            EngineOptions(
                directory, dtype="bfloat16", max_model_len=256, max_num_seqs=16, kv_cache_mib=64
            )
        )

    fresh, put = FreshEngine(start, tmp_path / "members", model), start(model)
    members = [(Address(3, 0, pair), 0.05) for pair in range(scale(2, 12))]
    fresh.open(model)
    put.open(model)
    told = [(ProbeReply.of(fresh, member), ProbeReply.of(put, member)) for member in members]
    fresh.close()
    put.close()
    assert sum(one.equal(other) for one, other in told) == len(PROMPTS) * len(members)
    assert all(one.difference(other) == 0.0 for one, other in told)
    assert len({one.texts for one, _ in told}) == len(members)
    assert ANSWER >= 8  # a text tells members apart


PARITY = """
from evaluators.task import Source, Task, Verdict

TASK = Task(
    name="parity",
    source=Source("", eval_split="train", file="parity.jsonl"),
    key=lambda row: str(row["id"]),
    fields=lambda row: {"word": row["word"]},
    template="{word}",
    verify=lambda text, row: Verdict(float(sum(map(ord, text)) % 2 == row["bit"]), 1.0, text),
    gold=lambda row: "ba"[row["bit"]],
    wrong=lambda row: "ab"[row["bit"]],
    target=True,
    max_tokens=16,
)
"""
SETTINGS = """
[model]
path = "{model}"
dtype = "bfloat16"
max_model_len = 512

[engines]
swap = "{swap}"

[learner]
generations = 2
population = 4
prompts = 8
sigma = 0.02
alpha = 0.05

[tasks]
target = "parity"
files = ["{own}/parity.py:TASK"]
rows = 24
curve_every = 0
kl_rows = 0
priors = ["refusal"]

[review]
mode = "manual"
"""


def anchorage(*arguments: str, home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments, "--home", str(home)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("swap", ["in_place", "blue_green"])
def test_a_round_of_experts_ends_in_what_cold_engines_say(
    swap: str, tmp_path: Path, scale: Scale
) -> None:
    """Tables, gate and endpoint of a mixture of experts, by both ways of swapping.

    A random model is rewarded for the parity of its answer: members differ, so weights move.
    """
    if scale(0, 1) == 0:
        pytest.skip("a stack of its own for each way: in the soak")
    model = make_tiny(tmp_path / "model", "qwen3_moe", tied=False, dtype=torch.bfloat16)
    rows = [{"id": n, "word": f"word {n * n} of {n}", "bit": n % 3 % 2} for n in range(160)]
    (tmp_path / "parity.py").write_text(PARITY, encoding="utf-8")
    (tmp_path / "parity.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config, home = tmp_path / "anchorage.toml", tmp_path / "home"
    config.write_text(SETTINGS.format(model=model, own=tmp_path, swap=swap), encoding="utf-8")
    anchorage("up", "--config", str(config), home=home)
    try:
        anchorage("improve", home=home)
        service = Service.at(home)
        (run,) = service.journal.runs()
        candidate = str(run.digest)
        with session(home) as opened:
            digests = {"candidate": candidate, "anchor": run.anchor_digest}
            names = [run.target, *service.priors(run.target)]
            questions = first_stage(service, names)
            paths = tables(service, opened.population, digests, questions, Silent())
            cold = partial(cold_engine, opened)
            assert against_cold(service, opened.population, cold, digests, questions, paths) == []
        assert candidate != run.anchor_digest
        assert service.ledger.state(candidate) == "AWAIT_REVIEW"
        told = review_now(home, candidate, "approve", "a test", Silent())
        assert (told["served"], told["state"]) == (candidate, "SWAPPED"), told
        with connect(Home.at(home), read_served(Home.at(home)).slot) as engine:
            probes = read_probes(Home.at(home), candidate)  # a cold engine's
            ids = [engine.tokens(prompt) for prompt in probes.prompts]
            assert difference(engine, engine.model(), ids, probes) <= TOLERANCE
    finally:
        anchorage("down", home=home)
