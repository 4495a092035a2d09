"""Gradient training of a study's trial, in a process of its own: GRPO by TRL, and fine-tuning.

    python -m flows.lab.paper.gradient JOB.json

GRPO is TRL's GRPOTrainer unchanged: groups of sampled answers to the trial's training rows, the
same rewards, KL to the anchor in the loss. Fine-tuning minimises the cross-entropy of the rows' own
answers. Each leaves snapshots of delta in the trial's folder, as ES does, and a line for each in
``trail.jsonl``; a process that was killed goes on from TRL's last checkpoint.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agent.errors import UserError
from agent.home import locked
from agent.store.weights import Anchor, Parameters
from evaluators.runner import questions_of
from evaluators.task import Row, Task, judge, training_reward
from flows.lab.paper.evolve import Trail
from flows.lab.paper.systems import Sizes
from flows.learn.evaluate import shots_of
from flows.learn.prompts import askable
from flows.service import Service


@dataclass(frozen=True, slots=True)
class GradientJob:
    """One trial of a gradient system."""

    kind: str  # grpo or sft
    home: str
    target: str
    seed: int
    generations: int
    every: int  # generations between snapshots
    sizes: Sizes
    folder: str  # of the trial

    def measured(self, generation: int) -> bool:
        """Whether a snapshot is wanted after this generation."""
        return generation % self.every == 0 or generation == self.generations

    def to_json(self) -> str:
        """A document that ``from_json`` reads."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "GradientJob":
        """The inverse of ``to_json``."""
        data = json.loads(text)
        return GradientJob(**data | {"sizes": Sizes(**data["sizes"])})


class Kept:
    """Snapshots of a model under training, as deltas to the anchor."""

    def __init__(self, anchor: Anchor, model: Any, folder: Path) -> None:
        self._anchor, self._model, self._folder = anchor, model, folder
        self._trail = Trail(folder / "trail.jsonl")
        self._tokens = {row["generation"]: int(row["tokens"]) for row in self._trail.rows()}
        self.done = max(self._tokens, default=-1)
        self.tokens = 0

    def go_on(self, generation: int) -> None:
        """Training goes on from here: a checkpoint may be older than the last snapshot."""
        self.tokens = self._tokens[generation]

    def keep(self, generation: int, reward: float | None) -> None:
        """Write the delta of now, then its line; nothing where the line is there already."""
        if generation <= self.done:
            return
        own = self._model.state_dict()
        moved = {
            name: (own[name].detach().float().cpu() - self._anchor.tensor(name).float()).numpy()
            for name in self._anchor.names
        }
        name = f"delta-{generation:05d}.safetensors"
        Parameters(self._anchor, moved).save(self._folder / name)
        row = {"generation": generation, "tokens": self.tokens, "reward": reward, "state": name}
        self._trail.add(row)
        self.done = generation


def rewarded(
    task: Task, rows: Sequence[Row], completions: Sequence[Any], row: Sequence[int], **_more: Any
) -> list[float]:
    """Training rewards of sampled answers: TRL's form of a reward function."""
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    return [
        training_reward(task, judge(task, text, rows[place]))
        for text, place in zip(texts, row, strict=True)
    ]


def grpo(job: GradientJob, model: Any, tokenizer: Any, kept: Kept, data: Mapping[str, Any]) -> None:
    """Train with TRL; a snapshot every ``job.every`` generations (``minibatches`` updates each)."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
    from trl import GRPOConfig, GRPOTrainer

    sizes, rewards = job.sizes, list[float]()
    a_generation = sizes.grpo_prompts * sizes.rollouts
    checkpoints = Path(job.folder) / "checkpoints"
    settings = GRPOConfig(
        output_dir=str(checkpoints), per_device_train_batch_size=a_generation // sizes.minibatches,
        steps_per_generation=sizes.minibatches, num_generations=sizes.rollouts,
        max_completion_length=data["task"].max_tokens, learning_rate=sizes.grpo_rate,
        lr_scheduler_type="constant", beta=sizes.kl, temperature=1.0,
        max_steps=job.generations * sizes.minibatches, save_steps=job.every * sizes.minibatches,
        save_total_limit=1, seed=job.seed, use_cpu=not torch.cuda.is_available(), bf16=False,
        gradient_checkpointing=False, report_to=[], disable_tqdm=True, logging_steps=1,
    )  # fmt: skip

    def score(
        completions: Sequence[Any], completion_ids: Sequence[Any], **more: Any
    ) -> list[float]:
        kept.tokens += sum(map(len, completion_ids))
        rewards.extend(rewarded(data["task"], data["rows"], completions, **more))
        return rewards[-len(completions) :]

    class Snapshots(TrainerCallback):  # type: ignore[misc]
        """Keeps delta when a generation that is measured has been learnt."""

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_more: Any) -> None:
            generation, rest = divmod(state.global_step, sizes.minibatches)
            if not rest and job.measured(generation):
                last = rewards[-a_generation:]
                kept.keep(generation, sum(last) / len(last) if last else None)

    examples = [{"prompt": chat, "row": place} for place, chat in enumerate(data["chats"])]
    trainer = GRPOTrainer(
        model=model, reward_funcs=score, args=settings, processing_class=tokenizer,
        train_dataset=Dataset.from_list(examples), callbacks=[Snapshots()],
    )  # fmt: skip
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if last is not None:
        kept.go_on(int(last.rpartition("-")[2]) // sizes.minibatches)
    trainer.train(resume_from_checkpoint=last)


def fine_tune(
    job: GradientJob, model: Any, tokenizer: Any, kept: Kept, data: Mapping[str, Any]
) -> None:
    """All training rows in every generation: one AdamW step on their answers' cross-entropy.

    It takes seconds for a small model and begins anew after a kill; no answer is generated.

    Raises:
        UserError: The task knows no gold answers.
    """
    gold = data["task"].gold
    if gold is None:
        raise UserError(f"task {data['task'].name!r}: fine-tuning needs its gold answers")
    optimiser = torch.optim.AdamW(model.parameters(), lr=job.sizes.sft_rate, weight_decay=0.0)
    pairs = []
    for chat, row in zip(data["chats"], data["rows"], strict=True):
        whole = [*chat, {"role": "assistant", "content": gold(row)}]
        ask = partial(tokenizer.apply_chat_template, return_dict=False)
        begun, ids = ask(chat, add_generation_prompt=True), ask(whole)
        pairs.append((ids, len(begun)))
    width = max(len(ids) for ids, _ in pairs)
    tokens = torch.zeros(len(pairs), width, dtype=torch.long)
    labels = torch.full((len(pairs), width), -100)  # what cross-entropy leaves out
    for place, (ids, begun) in enumerate(pairs):
        tokens[place, : len(ids)] = torch.tensor(ids)
        labels[place, begun : len(ids)] = torch.tensor(ids[begun:])
    mask = (torch.arange(width) < torch.tensor([len(ids) for ids, _ in pairs])[:, None]).long()
    for generation in range(1, job.generations + 1):
        optimiser.zero_grad()
        model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        optimiser.step()
        if job.measured(generation):
            kept.keep(generation, None)


def main(path: Path) -> None:
    """Train one job to its end."""
    job = GradientJob.from_json(path.read_text(encoding="utf-8"))
    # A study that was killed may have left its training process at work on the same trial.
    with locked(Path(job.folder) / "training.lock", taken=job.folder):
        _train(job)


def _train(job: GradientJob) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    service, folder = Service.at(Path(job.home)), Path(job.folder)
    torch.manual_seed(job.seed)
    model = AutoModelForCausalLM.from_pretrained(service.origin.directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(service.origin.directory)
    kept = Kept(service.origin, model, folder)
    kept.keep(0, None)
    task = service.task(job.target)
    found = service.rows(job.target, "train", job.sizes.prompts)
    rows = list(askable(service, task, found))
    asked = [(task, rows)]
    chats = [each.messages for each in questions_of(asked, shots_of(service, asked))]
    run = {"grpo": grpo, "sft": fine_tune}[job.kind]
    run(job, model, tokenizer, kept, {"task": task, "rows": rows, "chats": chats})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
