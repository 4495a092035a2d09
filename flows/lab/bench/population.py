"""``anchorage bench population``: a member's evaluation against plain ``vllm.LLM.generate``.

Two processes on the same cores take turns with the same prompts: an engine of ours evaluates a
member (its weights are put in first), and vLLM with its own defaults, which knows nothing of
members, generates with the model as it is. With N members a generation:

    seconds of ours = render + generate + update / N
    ratio           = plain seconds / seconds of ours      medians over turns
    weight share    = (render + update / N) / seconds of ours

The member's noise is drawn and added at a scale that rounds away, so that both sides give the same
answers but for rounding (``vllm_kernels``): a perturbed member's may be longer, and their longest
decides how many steps a batch takes. ``busy`` other processes may want the same cores.

``read`` is the same for a worked answer that is read and not generated (``learner.fitness``).
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
from rich.table import Table

from agent.config import keep, load
from agent.errors import UserError
from agent.home import Home
from agent.learner.es import members, step
from agent.learner.noise import Address
from agent.learner.penalty import Penalty
from agent.population.placement import EngineOptions, environment, on_cpu, own_cores
from agent.population.pool import Population
from evaluators.task import Message, Row, Task
from flows.lab.bench.learning import EXTRACTION
from flows.session import Session, engine_options, session
from flows.show.terminal import Reporter

BOUND = 0.95  # of plain vLLM's completions a second
SIGMA = 0.001  # of the update that is timed
LOST_IN_ROUNDING = 1e-30  # scale of the member's noise
Prompts = Sequence[Sequence[Message]]


@dataclass(frozen=True, slots=True)
class PopulationBench:
    """What is asked: rows of the target with so many worked examples, in turns."""

    target: str
    prompts: int = 32
    turns: int = 5
    members: int = 16  # of a generation, which share one update
    shots: tuple[int, ...] = (0, 2)
    compiled: bool = False  # plain vLLM as it is by default: it compiles the model as it starts
    busy: int = 0  # processes that compute without end beside both


def bench_population(
    bench: PopulationBench, model: str, config: Path | None, progress: Reporter
) -> dict[str, Any]:
    """The figures of a model in a home of its own.

    Args:
        bench: What is asked.
        model: As of ``model.path``.
        config: Settings beside it, such as ``tasks.data_dir``.
        progress: Receives the turns done.
    """
    files = [EXTRACTION[bench.target]] if bench.target in EXTRACTION else []
    tasks: dict[str, Any] = {"target": bench.target} | ({"files": files} if files else {})
    with TemporaryDirectory(prefix="anchorage-bench-") as root:
        place = Home.at(Path(root))
        keep(place, load(config, model={"path": model}, tasks=tasks))
        with session(place.root, progress) as opened:
            return measured(bench, opened, progress)


def measured(bench: PopulationBench, opened: Session, progress: Reporter) -> dict[str, Any]:
    """Every number of worked examples as a row of {"cases": [...], "within": bool}."""
    service, population = opened.service, opened.population
    task = service.target(bench.target)
    population.open(service.anchor.directory, service.anchor.digest)
    rows = service.rows(task.name, "train", bench.prompts + max(bench.shots))
    examples, asked = rows[: max(bench.shots)], rows[max(bench.shots) :]
    advance = progress.track("turns", bench.turns * len(bench.shots))
    cases = []
    options = engine_options(service)[0]
    with _plain(options, task.max_tokens, bench.compiled) as plain, _company(bench.busy):
        for case, shots in enumerate(bench.shots):
            prompts = [task.messages(row, examples[:shots]) for row in asked]
            turns = []
            for turn in range(bench.turns + 1):  # the first also pays what is paid once
                turns.append(one_turn(bench, task, population, plain, (asked, prompts)))
                advance(case * bench.turns + turn)
            cases.append({"shots": shots, **medians(turns[1:])})
    return {
        "target": task.name,
        "prompts": bench.prompts,
        "members": bench.members,
        "busy": bench.busy,
        "cases": cases,
        "within": all(case["ratio"] >= BOUND for case in cases),
    }


def one_turn(
    bench: PopulationBench,
    task: Task,
    population: Population,
    plain: Connection,
    questions: tuple[Sequence[Row], Prompts],
) -> dict[str, float]:
    """Seconds of one member by part, of plain vLLM, and of the worked answers read."""
    rows, prompts = questions
    job = [(0, Address(0, 0, 0), LOST_IN_ROUNDING)]
    before, begun = population.spent(), perf_counter()
    (answered,) = population.members(job, prompts, task.max_tokens)
    member_s, after = perf_counter() - begun, population.spent()
    begun = perf_counter()
    list(population.likelihoods(job, prompts, [task.worked(row) for row in rows]))
    read_s = perf_counter() - begun
    update_s = _update_s(population, bench.members)
    plain.send(list(prompts))
    plain_s, plain_tokens = plain.recv()
    return {
        "render": after["render"] - before["render"],
        "update": update_s / bench.members,
        "member": member_s + update_s / bench.members,
        "read": read_s + update_s / bench.members,
        "plain": plain_s,
        "tokens": sum(answer.tokens for answer in answered.values),
        "plain_tokens": plain_tokens,
    }


def _update_s(population: Population, count: int) -> float:
    """Seconds of one update of so many members; delta is zero again afterwards."""
    begun = perf_counter()
    population.apply(
        step(
            np.arange(count, dtype=np.float64),
            members(count, False),
            run_seed=0,
            generation=0,
            sigma=SIGMA,
            alpha=SIGMA,
            penalty=Penalty("l2", 1.0),
        )
    )
    spent = perf_counter() - begun
    population.restore(None, [])
    return spent


def medians(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Medians of seconds and, turn by turn, of the ratios."""
    counts = ("tokens", "plain_tokens")
    made = {
        part if part in counts else f"{part}_s": median(turn[part] for turn in turns)
        for part in turns[0]
    }
    weights = [(turn["render"] + turn["update"]) / turn["member"] for turn in turns]
    return made | {
        "ratio": median(turn["plain"] / turn["member"] for turn in turns),
        "read_ratio": median(turn["plain"] / turn["read"] for turn in turns),
        "weight_share": median(weights),
    }


@contextmanager
def _company(count: int) -> Iterator[None]:
    """So many processes that never wait, on whatever cores they get."""
    endless = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(endless) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@contextmanager
def _plain(options: EngineOptions, max_tokens: int, compiled: bool) -> Iterator[Connection]:
    """vLLM in a process of its own on the engine's cores: prompts in; seconds, tokens out."""
    near, far = get_context("spawn").Pipe()
    # On the CPU a cache as large as the engine's: vLLM's own default is nearly all of the memory.
    kv_cache = options.kv_cache_mib << 20 if on_cpu() else None
    model = str(options.model), options.dtype, options.max_model_len, kv_cache
    arguments = far, *model, max_tokens, compiled
    process = get_context("spawn").Process(target=_answer, args=arguments)
    before = dict(os.environ)
    os.environ.update(environment(options, own_cores(options)))  # read as torch is imported
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    far.close()
    try:
        try:
            near.recv()  # it is ready
        except EOFError:
            raise UserError(
                "bench population: plain vLLM did not start; it said why above"
            ) from None
        yield near
    finally:
        near.close()
        process.join(20)
        process.kill()


def _answer(
    pipe: Connection,
    model: str,
    dtype: Any,
    max_model_len: int | None,
    kv_cache: int | None,
    max_tokens: int,
    compiled: bool,
) -> None:
    """Generate for every list of chats that comes, until the pipe ends."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        model=model,
        dtype=dtype,
        max_model_len=max_model_len,
        enforce_eager=not compiled,
        kv_cache_memory_bytes=kv_cache,
    )
    write = llm.get_tokenizer().apply_chat_template
    settings = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    pipe.send(None)
    while True:
        try:
            chats = pipe.recv()
        except EOFError:
            return
        rows = [write(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
        prompts = [TokensPrompt(prompt_token_ids=row) for row in rows]
        llm.reset_prefix_cache()  # what it kept would be of the last turn's prompts
        begun = perf_counter()
        answers = llm.generate(prompts, settings, use_tqdm=False)
        seconds = perf_counter() - begun
        pipe.send((seconds, sum(len(each.outputs[0].token_ids) for each in answers)))


def population_table(document: Mapping[str, Any]) -> Table:
    """A line for each number of worked examples."""
    title = (
        f"{document['target']}: {document['prompts']} prompts a member, seconds; "
        f"{document['members']} members share an update"
    ) + (f"; beside {document['busy']} busy processes" if document["busy"] else "")
    drawn = Table(title=title, title_justify="left")
    columns = ("examples", "render", "update", "member", "plain vLLM", "plain / ours", "weights")
    for column in (*columns, "tokens", "plain tokens", "answers read", "plain / read"):
        drawn.add_column(column, justify="right")
    for case in document["cases"]:
        parts = [f"{case[f'{part}_s']:.2f}" for part in ("render", "update", "member", "plain")]
        drawn.add_row(
            str(case["shots"]),
            *parts,
            f"{case['ratio']:.2f}",
            f"{case['weight_share']:.1%}",
            f"{case['tokens']:g}",
            f"{case['plain_tokens']:g}",
            f"{case['read_s']:.2f}",
            f"{case['read_ratio']:.2f}",
        )
    return drawn
