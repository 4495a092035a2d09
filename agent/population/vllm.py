"""A vLLM engine in this process.

The engine core and its one worker run in this process, too: vLLM is imported once instead of three
times, and the requests of a call come in the same order and the same batches every time. The
environment and the cores have to be set before torch is imported: ``process.py`` starts a fresh
process for each engine and does that.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

from agent.errors import UserError
from agent.home import flush_folder
from agent.learner.es import Applied, Step
from agent.learner.noise import Address, NoiseKind
from agent.population.capacity import share_of
from agent.population.decoding import PENALTIES, Chat, ToolReader, generation_config, offered
from agent.population.placement import EngineOptions, on_cpu
from agent.population.schedule import UNASKED, Completion, Logprobs, Messages, Prompt
from agent.population.vllm_arguments import (
    cpu_arguments,
    extension,
    model_arguments,
    torchvision_for_import,
)
from agent.store.anchor import Anchor
from agent.store.tensorfile import beside
from agent.store.theta import applied
from agent.store.windows import Ranks

# Of a request whose log-probabilities are compared with another engine's: computed in full, since a
# prompt read in two parts rounds differently.
UNCACHED: dict[str, Any] = {"skip_reading_prefix_cache": True}


def import_for_cpu(model: Path) -> None:
    """Import our kernels, which an engine's arguments name, and the model's class in this process:
    vLLM would start another one to look at the class.
    """
    import_module("agent.population.vllm_kernels")
    from vllm.model_executor.models.registry import ModelRegistry

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    for name in config.get("architectures", ()):
        if name in ModelRegistry.models:
            with torchvision_for_import():
                found = ModelRegistry.models[name].load_model_cls()
            ModelRegistry.register_model(name, found)


def replaceable() -> tuple[Any, Any]:
    """vLLM's operations and its layer of an MLP's gate, with its compiled kernels loaded."""
    from vllm import ir
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return ir.ops, SiluAndMul


def preload() -> None:
    """Import what an engine on the CPU imports; on a GPU nothing, as CUDA does not survive a fork.

    Not ours and not numba: vLLM's search for kernels, in its worker's start, trips over llvmlite.
    """
    if on_cpu():
        for module in ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"):
            import_module(module)


class VllmEngine:
    """The ``Engine`` protocol on ``vllm.LLM``. One to a process."""

    def __init__(self, options: EngineOptions):
        self._llm = _start(options)
        self._rpc("anchorage_check")
        self._options = options
        tokenizer = self._llm.get_tokenizer()
        self._limit_tokens = int(self._llm.model_config.max_model_len)
        served = self._llm.model_config.get_diff_sampling_param()  # what vLLM's server applies
        self._defaults = {name: served[name] for name in PENALTIES if name in served}
        reader, self._defaults["skip_special_tokens"] = _reader(options, tokenizer)
        written = options.chat_template, options.chat_template_kwargs
        self._chat = Chat(tokenizer, *written, reader, _caller(options, tokenizer))
        self._theta = Ranks({}, [])
        self._base: Path | None = options.model  # None: theta
        self._member: tuple[object, NoiseKind] | None = None  # whose weights it holds, if one's
        self._current = True  # whether the engine holds the base
        self._spent = {"render": 0.0, "update": 0.0, "generate": 0.0}

    def open(self, anchor: Path) -> str:
        """See ``Engine``."""
        kept = self._options.importance
        where = self._options.master_device, str(kept) if kept else None
        opened = self._ranks("anchorage_open", str(anchor), *where, self._options.way)
        if len({each["sure"] for each in opened}) > 1:  # every rank has to put weights the same way
            opened = self._ranks("anchorage_open", str(anchor), *where, "long")
        shapes = {name: shape for name, (shape, _) in Anchor.open(anchor).specs.items()}
        self._theta = Ranks(shapes, [each["windows"] for each in opened])
        self._base, self._member, self._current = None, None, False
        return str(opened[0]["digest"])

    def restore(self, snapshot: Path | None, steps: Sequence[Step]) -> str:
        """See ``Engine``."""
        rows = [step.to_json() for step in steps]
        self._ranks("anchorage_restore", snapshot and str(snapshot), rows)
        self._base, self._member, self._current = None, None, False
        return self._delta_hash()

    def apply(self, step: Step) -> Applied:
        """See ``Engine``."""
        with self._timed("update"):
            moves = self._theta.moves(self._ranks("anchorage_apply", step.to_json()))
            done = applied(moves, self._delta_hash())
        self._base, self._member, self._current = None, None, False
        return done

    def save(self, path: Path) -> str:
        """See ``Engine``; ranks write their windows into one file."""
        with beside(path) as folder:
            self._ranks("anchorage_save", str(folder / path.name))
            (folder / path.name).replace(path)
        flush_folder(path.parent)
        return self._delta_hash()

    def load(self, directory: Path, repack_head: bool = True) -> str:
        """See ``Engine``; ``repack_head`` as in the worker."""
        digest = str(self._rpc("anchorage_load", str(directory), repack_head)["digest"])
        self._base, self._member, self._current = directory, None, True
        return digest

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int | Sequence[int],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[Completion]:
        """See ``Engine``. A last message of the assistant is continued."""
        self._hold(member, noise)
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        asked = {at: ids for at, each in enumerate(prompts) if (ids := self._ids(each)) is not None}
        rows = [self._row(prompts[at]) | {"max_tokens": limits[at]} for at in asked]
        answers = [Completion("", 0, UNASKED)] * len(prompts)
        for at, output in zip(asked, self._run(list(asked.values()), rows), strict=True):
            answers[at] = self._completion(prompts[at], output.outputs[0])
        return answers

    def sample(self, prompts: Sequence[Messages], max_tokens: int, seed: int) -> list[list[int]]:
        """See ``Engine``."""
        self._hold(None, "normal")
        rows = [
            UNCACHED | {"max_tokens": max_tokens, "temperature": 1.0, "seed": seed + index}
            for index in range(len(prompts))
        ]
        room = [self._limit_tokens - 1 - len(self._chat.tokens(messages)) for messages in prompts]
        outputs = self._answers(prompts, rows)
        return [  # cut to what fits, so that it can be a prompt later
            list(output.outputs[0].token_ids)[: max(0, most)]
            for output, most in zip(outputs, room, strict=True)
        ]

    def top_logprobs(
        self,
        prompts: Sequence[Messages],
        k: int,
        positions: int = 1,
        member: tuple[Address, float] | None = None,
    ) -> list[list[Logprobs]]:
        """See ``Engine``."""
        if not 1 <= k <= self._options.max_logprobs:
            raise UserError(f"k: {k}, allowed: 1 to {self._options.max_logprobs}")
        self._hold(member, "normal")
        row = UNCACHED | {"max_tokens": positions, "logprobs": k, "ignore_eos": True}
        row["detokenize"] = False
        answers = [each.outputs[0] for each in self._answers(prompts, [row] * len(prompts))]
        return [
            [{token: entry.logprob for token, entry in place.items()} for place in answer.logprobs]
            for answer in answers
        ]

    def prompt_logprobs(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """See ``Engine``."""
        self._hold(None, "normal")
        starts = [self._chat.tokens(messages) for messages in prompts]
        return self._scored(starts, continuations, UNCACHED)

    def answer_logprobs(
        self,
        prompts: Sequence[Messages],
        answers: Sequence[str],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[list[float]]:
        """See ``Engine``; prompts with a common start share it, as in ``generate``."""
        self._hold(member, noise)
        pairs = [self._chat.given(p, a) for p, a in zip(prompts, answers, strict=True)]
        starts, tails = [start for start, _ in pairs], [tail for _, tail in pairs]
        return self._scored(starts, tails, {"skip_reading_prefix_cache": False})

    def _scored(
        self, starts: Sequence[list[int]], tails: Sequence[Sequence[int]], cache: dict[str, Any]
    ) -> list[list[float]]:
        """log p of the tokens of each tail after its start.

        vLLM leaves the log-probabilities of tokens that it took from its cache unset. A start that
        is cached to its last token would cost the first token of its tail: that one is read anew.
        """
        wholes = [start + list(tail) for start, tail in zip(starts, tails, strict=True)]
        row = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        outputs = self._run(wholes, [row | cache] * len(wholes))
        cut = [
            n for n, each in enumerate(outputs) if (each.num_cached_tokens or 0) >= len(starts[n])
        ]
        if cut:
            again = self._run([wholes[n] for n in cut], [row | UNCACHED] * len(cut))
            for n, output in zip(cut, again, strict=True):
                outputs[n] = output
        return [
            [
                place[token].logprob
                for place, token in zip(output.prompt_logprobs[len(start) :], tail, strict=True)
            ]
            for output, start, tail in zip(outputs, starts, tails, strict=True)
        ]

    def state(self) -> dict[str, str | None]:
        """See ``Engine``."""
        state = dict(self._rpc("anchorage_state"))
        if state["anchor"] is None:
            return state | {"delta_hash": None}
        held = ", ".join(map(str, self._theta.held()))
        return state | {"delta_hash": self._delta_hash(), "held": held}

    def spent(self) -> dict[str, float]:
        """See ``Engine``."""
        return dict(self._spent)

    def close(self) -> None:
        """See ``Engine``."""
        if self._llm is not None:
            with suppress(AttributeError):  # an engine core in this process has nothing to stop
                self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def _ranks(self, method: str, *args: Any) -> list[Any]:
        """Call a worker method on every rank; what each one says."""
        return list(self._llm.collective_rpc(method, args=args))

    def _rpc(self, method: str, *args: Any) -> Any:
        """Call a worker method on every rank; what the first one says."""
        return self._ranks(method, *args)[0]

    def _delta_hash(self) -> str:
        """The hash of delta, put together of what the ranks hold."""
        return self._theta.delta_hash(self._ranks("anchorage_hash"))

    def _hold(self, member: tuple[Address, float] | None, noise: NoiseKind) -> None:
        """Put the member into the engine, or theta or the loaded directory again.

        A member that is there already, for the turn before of its conversations, stays.
        """
        if self._current if member is None else self._member == (member, noise):
            return
        with self._timed("render"):
            if member is not None:
                address, scale = member
                at = (address.run_seed, address.generation, address.pair)
                self._rpc("anchorage_render", *at, scale, noise)
            elif self._base is None:
                self._rpc("anchorage_render", 0, 0, 0, 0.0)
            else:
                self._rpc("anchorage_load", str(self._base))
            self._member, self._current = member and (member, noise), member is None

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Add what the body takes, in seconds, to ``spent``."""
        begun = perf_counter()
        yield
        self._spent[what] += perf_counter() - begun

    def _ids(self, prompt: Prompt) -> list[int] | None:
        """Token ids of a prompt; None for a conversation that has become too long, or whose turns
        its template does not write.
        """
        from jinja2 import TemplateError

        try:
            ids = self._chat.tokens(prompt)
        except (TemplateError, TypeError, ValueError):  # of a template's own code, too
            if not isinstance(prompt, Mapping):
                raise
            return None
        alone = not isinstance(prompt, Mapping)  # one that is too long is refused by its number
        return ids if alone or len(ids) < self._limit_tokens else None

    def _row(self, prompt: Prompt) -> dict[str, Any]:
        """Sampling settings of one prompt; the marks of tool calls may be special tokens."""
        return self._defaults | ({"skip_special_tokens": False} if offered(prompt) else {})

    def _completion(self, prompt: Prompt, output: Any) -> Completion:
        text, calls = self._chat.answer(output.text, offered(prompt))
        return Completion(text, len(output.token_ids), output.finish_reason or "unknown", calls)

    def _answers(self, prompts: Sequence[Messages], rows: Sequence[dict[str, Any]]) -> list[Any]:
        """Run conversations with these sampling settings."""
        return self._run([self._chat.tokens(messages) for messages in prompts], rows)

    def _run(self, prompts: Sequence[list[int]], rows: Sequence[dict[str, Any]]) -> list[Any]:
        """Run token ids, greedy unless a row says otherwise; outputs in the order of prompts."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.exceptions import VLLMClientError

        limit = self._limit_tokens
        for index, ids in enumerate(prompts):
            if len(ids) >= limit:
                raise UserError(f"prompt {index}: {len(ids)} tokens, allowed: under {limit}")
        try:
            settings = [SamplingParams(**({"temperature": 0.0} | row)) for row in rows]
        except (ValueError, VLLMClientError) as error:
            raise UserError(f"sampling: {error}") from error
        inputs = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        if not inputs:
            return []
        # Cached keys and values are those of the weights that computed them: nothing may be left
        # over from another member, and a caller need not know which call changed the weights.
        self._llm.reset_prefix_cache()
        with self._timed("generate"):
            return list(self._llm.generate(inputs, settings, use_tqdm=False))


def _reader(options: EngineOptions, tokenizer: Any) -> tuple[Callable[[], Any] | None, bool]:
    """A maker of readers for ``Chat``, and whether answers leave out special tokens.

    As in vLLM's server; a parser whose marks are special tokens wants them.
    """
    if options.reasoning_parser is None:
        return None, True
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.reasoning import ReasoningParserManager

    name, variables = options.reasoning_parser, options.chat_template_kwargs
    try:
        parser = ReasoningParserManager.get_reasoning_parser(name)
    except KeyError as error:
        raise UserError(f"model.reasoning_parser: {name!r}; {error.args[0]}") from None
    make = partial(parser, tokenizer, chat_template_kwargs=variables)
    asked = ChatCompletionRequest(model="", messages=[{"role": "user", "content": ""}])
    request = make().adjust_request(asked)

    def reader() -> Callable[[str], str | None]:
        made = make()
        return lambda text: made.extract_reasoning(text, request)[1]

    return reader, bool(request.skip_special_tokens)


def _caller(options: EngineOptions, tokenizer: Any) -> ToolReader | None:
    """What reads tool calls as vLLM's server does; a parser keeps state: one an answer."""
    if options.tool_parser is None:
        return None
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    name, message = options.tool_parser, {"role": "user", "content": ""}

    def read(text: str, tools: Any) -> tuple[str, Any]:
        request = ChatCompletionRequest(model="", messages=[message], tools=list(tools))
        parser = ToolParserManager.get_tool_parser(name)(tokenizer, request.tools)
        found = parser.extract_tool_calls(text, request)
        named = [each.function for each in found.tool_calls]
        calls = tuple({"name": each.name, "arguments": each.arguments} for each in named)
        return found.content or "", calls

    return read


def _start(options: EngineOptions) -> Any:
    """``vllm.LLM`` for a population: one process unless ranks need their own."""
    from vllm import LLM

    cpu = on_cpu()
    if cpu:
        import_for_cpu(options.model)
    return LLM(
        model=str(options.model),
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        **(cpu_arguments(options.max_model_len) if cpu else {}),
        tensor_parallel_size=options.tensor_parallel,
        distributed_executor_backend="mp" if options.tensor_parallel > 1 else "uni",
        gpu_memory_utilization=share_of(options),
        kv_cache_memory_bytes=options.kv_cache_mib << 20 if cpu else None,
        enforce_eager=cpu if options.enforce_eager is None else options.enforce_eager,
        **({"enable_prefix_caching": options.prefix_caching} | model_arguments(options.model)),
        max_logprobs=options.max_logprobs,
        **generation_config(options.generation_config),
        seed=options.seed,
        worker_extension_cls=extension(cpu=cpu),
    )
