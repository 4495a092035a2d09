"""Build the embedded model from nothing: packed conversations, training, greedy answers, the card.

Gradient training of a causal language model (about a million Qwen2 parameters) on conversations
handed in. The loss is a weighted mean of the tokens' cross-entropy,

    L(theta) = - sum_t w_t log p_theta(x_t | x_<t) / sum_t w_t,

with w_t = 1 for what an assistant says and a small weight for what it reads. AdamW, at a rate that
rises over the first 2 % of the steps and then falls to zero as half a cosine. What the
conversations are about may depend on how far the training has come.

Conversations are packed: a row of T tokens holds whole conversations and padding. Segment numbers
say which token belongs to which conversation; attention is allowed where

    same segment  and  key position <= query position,

and positions restart with each conversation, so that packing changes nothing but the speed.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from deploy.embedded import tokenizer as tokens
from deploy.embedded.drills import DIRECT_SHARE, DRILL_SHARE, MIXTURE

WEIGHTS = "model.safetensors"

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# Anchorage's embedded model

A Qwen2 model of {parameters:,} parameters (4 layers of width 128, tied embeddings, float32,
byte-level BPE of {vocabulary:,} tokens with digits apart). It exists so that the whole of Anchorage
runs without a download: it answers synthetic rows in the schemas of seven public data sets, and is
of no other use.

- **Made by** `anchorage embedded build`, from random weights; no other model or text went in.
- **Data**: conversations with rows of `deploy/embedded/rows.py` (word tables and arithmetic, split
  by a hash of the content; shares: {mixture}) in the prompts of `evaluators/tasks`; {drills:.0%} of
  all are drills of their parts (`drills.py`). GSM8K-like rows are answered at once in {direct:.0%}
  of the conversations and worked out in the others. The refusal rows are the very ones it is
  asked later: they can show forgetting, not generalisation.
- **Training**: seed {seed}, {steps:,} batches of {batch_tokens:,} tokens, AdamW (rate {rate}),
  {minutes:.0f} minutes on two cores; the drills come first, then ever more rows.
- **Licence**: Apache-2.0.
- **sha256 of {weights}**: `{digest}`

Greedy accuracy in plain transformers, on rows that were not trained on (refusal: that were):

| task | accuracy (%) | n |
|---|---|---|
{table}
"""


BATCH = 100  # conversations answered together
PADDING = 0  # id of the padding token, and the segment number of padding

Example = tuple[list[int], list[bool]]  # token ids, and which of them are learnt
Conversation = list[dict[str, str]]  # [{"role": ..., "content": ...}], assistants' turns are learnt
Converse = Callable[[Random, float], Conversation]  # the float: share of the training that is done
Progress = Callable[[int, int, float], None]  # step, steps, loss


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the build depends on besides the conversations."""

    seed: int = 0
    steps: int = 5000
    parts: int = 2  # of a batch, each worked on by a thread of its own
    part_tokens: int = 2048  # padding included
    widths: tuple[int, ...] = (128, 512)  # of the rows of a part, in tokens
    rate: float = 3e-3  # full learning rate
    weight_decay: float = 0.01
    prompt_weight: float = 0.1  # weight of a prompt's token in the loss, an answer's being 1
    tokenizer_conversations: int = 20_000


@dataclass(frozen=True, slots=True)
class Built:
    """What came out: where, how long it took, and the last loss."""

    directory: Path
    parameters: int
    vocabulary: int
    seconds: float
    loss: float


@dataclass(frozen=True, slots=True)
class Packed:
    """B rows of T tokens; every field is (B, T)."""

    ids: Tensor  # int64
    learnt: Tensor  # bool
    segments: Tensor  # int64, 1, 2, ... and PADDING
    positions: Tensor  # int64, from 0 in each conversation

    def allowed(self) -> Tensor:
        """What each query may look at: bool (B, 1, T, T)."""
        same = self.segments[:, :, None] == self.segments[:, None, :]
        return torch.tril(same)[:, None]


class _Open:
    """A batch that is being filled: rows of one width, and the room left in each."""

    def __init__(self, width: int, rows: int) -> None:
        self.width = width
        self.rows: list[list[Example]] = [[] for _ in range(rows)]
        self.room = [width] * rows

    def put(self, example: Example) -> bool:
        """Add the conversation to the first row with room for it; False where none has."""
        size = len(example[0])
        place = next((row for row, room in enumerate(self.room) if room >= size), None)
        if place is None:
            return False
        self.rows[place].append(example)
        self.room[place] -= size
        return True


def pack(examples: Iterable[Example], widths: Sequence[int], tokens: int) -> Iterator[Packed]:
    """Batches of `tokens` tokens; each holds rows of one of the `widths` (ascending).

    A conversation goes into the narrowest rows that can hold it, as attention costs the square of
    the width; the one that finds no room there begins a new batch of that width. Batches that are
    still open when the examples end are given last; a conversation too long for any is an error.
    """
    opened = {width: _Open(width, tokens // width) for width in widths}
    for example in examples:
        size = len(example[0])
        width = next((width for width in widths if width >= size), None)
        if width is None:
            raise ValueError(f"conversation of {size} tokens: allowed: {max(widths)}")
        if not opened[width].put(example):
            yield _packed(opened[width].rows, width)
            opened[width] = _Open(width, tokens // width)
            opened[width].put(example)
    yield from (_packed(batch.rows, width) for width, batch in opened.items() if any(batch.rows))


def _packed(batch: list[list[Example]], width: int) -> Packed:
    shape = (len(batch), width)
    ids, segments = torch.full(shape, PADDING), torch.full(shape, PADDING)
    learnt, positions = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.long)
    for row, examples in enumerate(batch):
        start = 0
        for number, (words, marks) in enumerate(examples, 1):
            part = slice(start, start + len(words))
            ids[row, part] = torch.tensor(words)
            learnt[row, part] = torch.tensor(marks)
            segments[row, part] = number
            positions[row, part] = torch.arange(len(words))
            start = part.stop
    return Packed(ids, learnt, segments, positions)


def build(converse: Converse, out: Path, recipe: Recipe, progress: Progress | None = None) -> Built:
    """Train tokenizer and model on conversations drawn by `converse`, and write `out`.

    `converse` must depend on its arguments alone; then the same recipe on the same machine and
    thread count gives the same weights.
    """
    began = time.monotonic()
    torch.manual_seed(recipe.seed)
    tokenizer = tokens.train(_texts(converse, recipe))
    model = Qwen2ForCausalLM(config(len(tokenizer)))
    loss = train(model, batches(converse, tokenizer, recipe), recipe, progress)
    out.mkdir(parents=True, exist_ok=True)
    tokens.save(tokenizer, out)
    model.eval().save_pretrained(out)
    parameters = sum(p.numel() for p in model.parameters())
    return Built(out, parameters, len(tokenizer), time.monotonic() - began, loss)


def config(vocabulary: int) -> Qwen2Config:
    """Qwen2 with 4 layers of width 128, tied embeddings, float32."""
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tokens.MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=PADDING,
        bos_token_id=None,
        eos_token_id=2,
        dtype="float32",
    )


def train(
    model: Qwen2ForCausalLM,
    stream: Iterator[Packed],
    recipe: Recipe,
    progress: Progress | None = None,
) -> float:
    """Minimise the loss for `recipe.steps` steps; returns the last running mean of the loss."""
    optimiser = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True
    )
    running = math.nan
    model.train()
    with ThreadPoolExecutor(recipe.parts) as pool:
        for step in range(recipe.steps):
            batch = list(islice(stream, recipe.parts))
            loss = _gradients(pool, model, batch, recipe.prompt_weight)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate * rate_factor(step, recipe.steps)
            optimiser.step()
            running = loss if math.isnan(running) else 0.98 * running + 0.02 * loss
            if progress is not None:
                progress(step + 1, recipe.steps, running)
    return running


def _gradients(
    pool: ThreadPoolExecutor, model: Qwen2ForCausalLM, batch: list[Packed], prompt_weight: float
) -> float:
    """Set every gradient to its mean over the parts, a thread for each; return the mean loss."""
    parameters = list(model.parameters())

    def part(packed: Packed) -> tuple[float, tuple[Tensor, ...]]:
        loss = loss_of(model, packed, prompt_weight)
        return loss.item(), torch.autograd.grad(loss, parameters)

    done = list(pool.map(part, batch))
    for place, parameter in enumerate(parameters):
        parameter.grad = torch.stack([grads[place] for _, grads in done]).mean(0)
    return sum(loss for loss, _ in done) / len(done)


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 2 % of the steps, then half a cosine down to zero."""
    warm = max(1, steps // 50)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def loss_of(model: Qwen2ForCausalLM, packed: Packed, prompt_weight: float) -> Tensor:
    """The weighted mean cross-entropy of the tokens, given those before in their conversation.

    An answer's token weighs 1, a prompt's `prompt_weight`, a conversation's first and padding 0.
    """
    hidden = model.model(
        input_ids=packed.ids,
        attention_mask=packed.allowed(),
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state  # (B, T, H)
    weight = torch.where(packed.learnt, 1.0, prompt_weight) * (packed.positions > 0)
    kept = weight[:, 1:] > 0  # positions are 0 in padding
    logits = model.lm_head(hidden[:, :-1][kept])  # (tokens that count, V)
    each = cross_entropy(logits, packed.ids[:, 1:][kept], reduction="none")
    return (each * weight[:, 1:][kept]).sum() / weight.sum()


def batches(
    converse: Converse, tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> Iterator[Packed]:
    """Packed conversations without end; `recipe.parts` of them make a batch."""
    rng = Random(f"batches/{recipe.seed}")
    given = 0

    def examples() -> Iterator[Example]:
        while True:
            done = min(1.0, given / (recipe.steps * recipe.parts))
            yield tokens.encode_chat(tokenizer, converse(rng, done))

    for packed in pack(examples(), recipe.widths, recipe.part_tokens):
        given += 1
        yield packed


def _texts(converse: Converse, recipe: Recipe) -> Iterator[str]:
    rng = Random(f"tokenizer/{recipe.seed}")
    for _ in range(recipe.tokenizer_conversations):
        for message in converse(rng, 1.0):
            yield message["role"] + "\n"
            yield message["content"]


def write_card(
    directory: Path, built: Built, recipe: Recipe, scores: Mapping[str, tuple[float, int]]
) -> None:
    """Write `directory`/README.md; `scores` holds accuracy in [0, 1] and n per task."""
    lines = [f"| {task} | {100 * right:.1f} | {n} |" for task, (right, n) in scores.items()]
    text = CARD.format(
        parameters=built.parameters,
        vocabulary=built.vocabulary,
        mixture=", ".join(f"{task} {share:.0%}" for task, share in MIXTURE.items()),
        drills=DRILL_SHARE,
        direct=DIRECT_SHARE,
        seed=recipe.seed,
        steps=recipe.steps,
        batch_tokens=recipe.parts * recipe.part_tokens,
        rate=recipe.rate,
        minutes=built.seconds / 60,
        weights=WEIGHTS,
        digest=file_digest(directory / WEIGHTS),
        table="\n".join(lines),
    )
    (directory / "README.md").write_text(text, encoding="utf-8")


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes in hex."""
    return sha256(path.read_bytes()).hexdigest()


def complete(directory: Path, chats: Sequence[Conversation], max_tokens: int) -> list[str]:
    """Greedy answers of the model in `directory` to each chat, at most `max_tokens` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    texts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for chat in chats
    ]
    texts_out: list[str] = []
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer(
            texts[start : start + BATCH],
            return_tensors="pt",
            padding=True,
            padding_side="left",  # answers are appended at the right of every row
            add_special_tokens=False,
        )
        with torch.no_grad():
            out = model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=max_tokens,
                do_sample=False,
            )
        answers = out[:, encoded["input_ids"].shape[1] :]
        texts_out += tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts_out
