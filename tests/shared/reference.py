"""The literal definition of an engine: plain transformers, one prompt at a time, no cache of ours.

Slow and short. It says what every other engine has to answer, drives a loop where no vLLM can be
started, and comes with random checkpoints small enough to check one against the other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from agent.learner.es import Applied, Step
from agent.learner.noise import Address, NoiseKind
from agent.population.schedule import Completion, Logprobs, Messages
from agent.store.weights import Anchor, Parameters

Family = Literal["qwen2", "llama"]

END = "<|im_end|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", END)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ReferenceEngine:
    """The ``Engine`` protocol on ``transformers``, in the dtype of the directory it is given."""

    def __init__(self, model: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        self._theta = Parameters.zeros(Anchor.open(model))
        self._loaded: Anchor | None = self._theta.anchor

    def open(self, anchor: Path) -> str:
        """See ``Engine``."""
        self._theta, self._loaded = Parameters.zeros(Anchor.open(anchor)), None
        return self._theta.anchor.digest

    def restore(self, snapshot: Path | None, steps: Sequence[Step]) -> str:
        """See ``Engine``."""
        anchor, self._loaded = self._theta.anchor, None
        self._theta = Parameters.load(anchor, snapshot) if snapshot else Parameters.zeros(anchor)
        for step in steps:
            self._theta.apply(step)
        return self._theta.delta_hash()

    def apply(self, step: Step) -> Applied:
        """See ``Engine``."""
        self._loaded = None
        return self._theta.apply(step)

    def save(self, path: Path) -> str:
        """See ``Engine``."""
        self._theta.save(path)
        return self._theta.delta_hash()

    def load(self, directory: Path) -> str:
        """See ``Engine``."""
        self._loaded = Anchor.open(directory)
        return self._loaded.digest

    def generate(
        self,
        prompts: Sequence[Messages],
        max_tokens: int | Sequence[int],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[Completion]:
        """See ``Engine``."""
        self._hold(member, noise)
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        rows = [
            self._decode(self._tokens(messages), limit)
            for messages, limit in zip(prompts, limits, strict=True)
        ]
        ends = [bool(ids) and ids[-1] == self._tokenizer.eos_token_id for ids in rows]
        return [
            Completion(
                self._tokenizer.decode(ids, skip_special_tokens=True),
                len(ids),
                "stop" if end else "length",
            )
            for ids, end in zip(rows, ends, strict=True)
        ]

    def sample(self, prompts: Sequence[Messages], max_tokens: int, seed: int) -> list[list[int]]:
        """See ``Engine``."""
        self._hold(None, "normal")
        chance = torch.Generator().manual_seed(seed)
        return [self._decode(self._tokens(p), max_tokens, chance) for p in prompts]

    def top_logprobs(
        self,
        prompts: Sequence[Messages],
        k: int,
        positions: int = 1,
        member: tuple[Address, float] | None = None,
    ) -> list[list[Logprobs]]:
        """See ``Engine``."""
        self._hold(member, "normal")
        return [self._likeliest(self._tokens(messages), k, positions) for messages in prompts]

    def prompt_logprobs(
        self, prompts: Sequence[Messages], continuations: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """See ``Engine``."""
        self._hold(None, "normal")
        rows = []
        for messages, tail in zip(prompts, continuations, strict=True):
            ids = self._tokens(messages)
            table = self._logprobs(ids + list(tail))[len(ids) - 1 :]
            rows.append([float(table[place, token]) for place, token in enumerate(tail)])
        return rows

    def answer_logprobs(
        self,
        prompts: Sequence[Messages],
        answers: Sequence[str],
        member: tuple[Address, float] | None = None,
        noise: NoiseKind = "normal",
    ) -> list[list[float]]:
        self._hold(member, noise)
        rows = []
        for messages, answer in zip(prompts, answers, strict=True):
            start = self._tokens(messages)
            tail = self._tokenizer.encode(answer, add_special_tokens=False)
            tail.append(self._tokenizer.eos_token_id)
            table = self._logprobs(start + tail)[len(start) - 1 :]
            rows.append([float(table[place, token]) for place, token in enumerate(tail)])
        return rows

    def state(self) -> dict[str, str | None]:
        """See ``Engine``."""
        return {
            "served": self._loaded.digest if self._loaded else "theta",
            "way": "long",
            "anchor": self._theta.anchor.digest,
            "delta_hash": self._theta.delta_hash(),
        }

    def spent(self) -> dict[str, float]:
        """See ``Engine``; it keeps no count."""
        return {"render": 0.0, "update": 0.0, "generate": 0.0}

    def close(self) -> None:
        """See ``Engine``; it holds nothing but memory."""

    @torch.no_grad()
    def _hold(self, member: tuple[Address, float] | None, noise: NoiseKind) -> None:
        """Write the wanted weights into the model, every time."""
        address, scale = member or (None, 0.0)
        plain = self._loaded if member is None else None
        tensors = plain.tensors() if plain else self._theta.rendered(address, scale, noise)
        own = self._model.state_dict()
        for name, tensor in tensors:
            own[name].copy_(tensor)

    def _tokens(self, messages: Messages) -> list[int]:
        """The conversation in the chat template."""
        going_on = bool(messages) and messages[-1]["role"] == "assistant"
        ids = self._tokenizer.apply_chat_template(
            list(messages),
            return_dict=False,
            add_generation_prompt=not going_on,
            continue_final_message=going_on,
        )
        return list(ids)

    @torch.no_grad()
    def _logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """(tokens, vocabulary) log p of what follows each prefix."""
        logits = self._model(torch.tensor([ids])).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)

    def _decode(
        self, ids: Sequence[int], limit: int, chance: torch.Generator | None = None
    ) -> list[int]:
        """Up to ``limit`` tokens after ids, the likeliest each time, or drawn; an end ends it."""
        new: list[int] = []
        while len(new) < limit and (not new or new[-1] != self._tokenizer.eos_token_id):
            row = self._logprobs([*ids, *new])[-1]
            drawn = row.argmax() if chance is None else row.exp().multinomial(1, generator=chance)
            new.append(int(drawn))
        return new

    def _likeliest(self, ids: Sequence[int], k: int, positions: int) -> list[Logprobs]:
        """The k best tokens of each greedy position."""
        new: list[int] = []
        rows = []
        for _ in range(positions):
            best = self._logprobs([*ids, *new])[-1].topk(k)
            values = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            rows.append(dict(values))
            new.append(int(best.indices[0]))
        return rows


def random_checkpoint(
    directory: Path,
    *,
    family: Family = "qwen2",
    tied: bool = True,
    seed: int = 0,
    spread: float = 0.3,
) -> Path:
    """Write a random model of some 70,000 parameters over letters; returns the directory.

    ``spread`` is the standard deviation of the weights: large, so that answers tell models apart.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    tokenizer = letter_tokenizer()
    tokenizer.save_pretrained(directory)
    kinds: dict[Family, Any] = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }
    config_class, model_class = kinds[family]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=spread,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model_class(config).save_pretrained(directory)
    return directory


def letter_tokenizer() -> Any:
    """One token a printable ASCII character, three special ones and a chat template.

    No part of a character is a token, so that any two engines spell the same tokens the same way.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = [*map(chr, range(ord("!"), ord("~") + 1)), "\u0120", "\u010a"]  # ..., space, new line
    vocabulary = {sign: index for index, sign in enumerate([*signs, *SPECIAL])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(sign, special=True) for sign in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=SPECIAL[0])
    tokenizer.chat_template = TEMPLATE
    return tokenizer
