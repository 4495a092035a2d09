"""``anchorage importance``: weights of the penalty, estimated on tasks that are to be kept.

The equations are in ``flows.learn.importance``. Answers are drawn from the model itself, so that no
gold answer is needed: the loss whose gradients are taken is the cross-entropy of the anchor's own
answers, KL(anchor || theta) but for a constant.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch

from agent.errors import UserError
from agent.learner.noise import Address, normal
from agent.population.pool import Population
from agent.store.replay import lineage
from agent.store.weights import Anchor, Parameters
from evaluators.runner import Question, questions_of
from evaluators.task import judge
from flows.learn.evaluate import pools, shots_of
from flows.learn.importance import Floats, answer_scores, fisher, members, path, scaled
from flows.service import Service
from flows.session import session
from flows.show.terminal import Reporter

Method = Literal["fisher", "path", "members"]
METHODS: dict[str, Method] = {"fisher": "fisher", "path": "path", "members": "members"}
BATCH = 32  # prompts that answer together
SEED = 0  # of the draw of answers and of members' noise


def importance_now(
    home: Path | None,
    method: Method,
    tasks: Sequence[str],
    into: Path,
    progress: Reporter,
    *,
    rows: int = 32,
    run: str | None = None,
    largest: float = 10.0,
    count: int = 2,
) -> dict[str, Any]:
    """Estimate weights on rows of tasks and write the file that ``learner.importance`` reads.

    Args:
        home: Folder of the service.
        method: How; see ``flows.learn.importance``.
        tasks: What is to be kept.
        into: The safetensors file.
        progress: Receives the rows or tensors done.
        rows: Evaluation rows of a task.
        run: Of ``path``: the round in the journal whose way is measured.
        largest: Weights are brought to mean 1 under this largest one.
        count: Of ``members``: members that perturb one tensor.

    Raises:
        UserError: An unknown task or run, no run for ``path``, or weights that are nearly all 0.
    """
    service = Service.at(home)
    asked = questions(service, tasks, rows)
    anchor = service.anchor
    if method == "members":
        with session(service.home.root, progress) as opened:
            sigma = float(service.settings.learner.sizes[0])
            weights = by_members(opened.population, anchor, asked, sigma, count, progress)
    else:
        model = AnsweringModel(anchor, asked, progress)
        if method == "fisher":
            weights = model.fisher()
        else:
            if run is None:
                known = ", ".join(each.run_id for each in service.journal.runs()) or "none yet"
                raise UserError(f"--run: not given; allowed with --method path: {known}")
            weights = model.path(ways(anchor, lineage(service.journal, anchor, run)))
    return keep_weights(anchor, weights, into, largest) | {"method": method, "tasks": list(tasks)}


def questions(service: Service, tasks: Sequence[str], rows: int) -> list[Question]:
    """Open evaluation rows of the tasks, as chats."""
    if not tasks:
        raise UserError(f"--tasks: none; allowed: {', '.join(service.tasks)}")
    chosen = [(service.task(name), pools(service, name)[0][:rows]) for name in tasks]
    return questions_of(chosen, shots_of(service, chosen))


def keep_weights(
    anchor: Anchor, weights: Mapping[str, Floats], into: Path, largest: float
) -> dict[str, Any]:
    """Bring weights to mean 1 and write them; what their file holds in figures."""
    try:
        made = scaled(weights, largest)
    except ValueError as error:
        raise UserError(str(error)) from None
    into.parent.mkdir(parents=True, exist_ok=True)
    Parameters(anchor, made).save(into)
    flat = np.concatenate([each.reshape(-1) for each in made.values()])
    shares = {f"share below {edge:g}": float((flat < edge).mean()) for edge in (0.01, 0.1, 1.0)}
    return {"file": str(into), "largest": float(flat.max()), **shares}


def ways(anchor: Anchor, generations: Iterable[Any]) -> Iterator[Mapping[str, Floats]]:
    """Delta before the first and after every step; one array that changes, so copy to keep."""
    parameters = Parameters.zeros(anchor)
    yield parameters.delta
    for generation in generations:
        parameters.apply(getattr(generation, "step", generation))
        yield parameters.delta


def by_members(
    population: Population,
    anchor: Anchor,
    asked: Sequence[Question],
    sigma: float,
    count: int,
    progress: Reporter,
) -> dict[str, Floats]:
    """Weights from rewards alone: each tensor perturbed by itself, ``count`` times."""
    population.open(anchor.directory, anchor.digest)
    prompts, limits = [each.messages for each in asked], [each.task.max_tokens for each in asked]

    def reward() -> float:
        answers = population.generate(prompts, limits)
        return float(
            np.mean(
                [
                    judge(each.task, answer.text, each.row).reward
                    for each, answer in zip(asked, answers, strict=True)
                ]
            )
        )

    base, names = reward(), [name for name in anchor.names if name not in anchor.fixed]
    sizes = {name: torch.Size(anchor.specs[name][0]).numel() for name in anchor.names}
    advance, earned = progress.track("tensors", len(names)), dict[str, list[float]]()
    with TemporaryDirectory() as folder:
        for done, name in enumerate(names, start=1):
            for member in range(count):
                moved = Parameters.zeros(anchor)
                moved.delta[name] += sigma * normal(Address(SEED, 0, member), name, 0, sizes[name])
                snapshot = Path(folder) / "member.safetensors"
                moved.save(snapshot)
                population.restore(snapshot, [])
                earned.setdefault(name, []).append(reward())
            advance(done)
    found = members(base, earned, sizes, sigma)
    return {name: np.full(sizes[name], found.get(name, 0.0), np.float32) for name in anchor.names}


class AnsweringModel:
    """The anchor in torch, with answers that it drew to some prompts."""

    def __init__(self, anchor: Anchor, asked: Sequence[Question], progress: Reporter) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._anchor, self._progress = anchor, progress
        directory = anchor.directory
        self._model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self._model.eval()
        tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
        torch.manual_seed(SEED)
        self._prompts: list[list[int]] = []
        self._answers: list[list[int]] = []
        advance = progress.track("answers", len(asked))
        for first in range(0, len(asked), BATCH):
            part = asked[first : first + BATCH]
            self._draw(tokenizer, part)
            advance(first + len(part))
        own = dict(self._model.named_parameters())
        self._parameters = {name: own[name] for name in anchor.names if name not in anchor.fixed}

    @torch.no_grad()
    def _draw(self, tokenizer: Any, asked: Sequence[Question]) -> None:
        """One answer to each prompt at temperature 1, its end included."""
        chats = [list(each.messages) for each in asked]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )
        longest = max(each.task.max_tokens for each in asked)
        whole = self._model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=longest
        )
        width = inputs["input_ids"].shape[1]
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        for mask, ids, row in zip(
            inputs["attention_mask"], inputs["input_ids"], whole[:, width:].tolist(), strict=True
        ):
            last = next((place for place, each in enumerate(row) if each in ends), len(row) - 1)
            self._prompts.append(ids[mask.bool()].tolist())
            self._answers.append(row[: last + 1])

    def fisher(self) -> dict[str, Floats]:
        """Diagonal Fisher information of the answers."""
        advance, total = self._progress.track("gradients", len(self._prompts)), 0

        def scores() -> Iterator[tuple[float, torch.Tensor]]:
            nonlocal total
            for score in answer_scores(self._model, self._prompts, self._answers):
                yield score
                total += 1
                advance(total)

        return self._named(fisher(scores(), self._parameters))

    def path(self, deltas: Iterable[Mapping[str, Floats]]) -> dict[str, Floats]:
        """Zenke's weights of a way from the anchor; leaves the model at its end."""
        return self._named(path(self.gradient, deltas))

    def gradient(self, delta: Mapping[str, Floats]) -> dict[str, Floats]:
        """Of the mean cross-entropy of the answers, at anchor + delta."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                moved = torch.from_numpy(delta[name]).view(parameter.shape)
                parameter.copy_(self._anchor.tensor(name).float() + moved)
        total = {name: torch.zeros_like(each) for name, each in self._parameters.items()}
        for _, score in answer_scores(self._model, self._prompts, self._answers):
            slopes = torch.autograd.grad(score, list(self._parameters.values()))
            for sum_of, slope in zip(total.values(), slopes, strict=True):
                sum_of.sub_(slope, alpha=1 / len(self._prompts))
        return {name: each.numpy().reshape(-1) for name, each in total.items()}

    def _named(self, weights: Mapping[str, Floats]) -> dict[str, Floats]:
        """By the anchor's names; 0 for what no step moves."""
        return {
            name: weights[name].reshape(-1)
            if name in weights
            else np.zeros(torch.Size(self._anchor.specs[name][0]).numel(), np.float32)
            for name in self._anchor.names
        }
