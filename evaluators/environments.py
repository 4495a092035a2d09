"""Environments written for other libraries as tasks: `verifiers`, and reward functions of TRL.

A file that the settings name (``tasks.files = ["my_env.py:TASK"]``) holds one call:

    TASK = from_trl(rewards=[accuracy, length], file="rows.jsonl", name="mine")
    TASK = from_verifiers("my_taskset", file="rows.jsonl", gold=lambda row: row["answer"])

and rows lie beside it, for a taskset of `verifiers` written once by

    python -m evaluators.environments my_taskset > rows.jsonl

Both are graded tasks of one answer a row; of a taskset, conversations that clients had are judged
as a whole as well. ``gold``, if known, gives an answer that earns more than
``wrong`` (an empty one by default); training does not use it, the check of a row does.
"""

import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from selectors import SelectSelector
from typing import Any

from agent.errors import UserError
from evaluators.task import Message, Row, Source, Task, Verdict, content_key

RewardFunction = Callable[..., Sequence[float | None]]  # prompts, completions, **columns
Answer = Callable[[Row], str]


def from_trl(
    rewards: Sequence[RewardFunction],
    file: str,
    *,
    name: str,
    gold: Answer | None = None,
    wrong: Answer | None = None,
    weights: Sequence[float] | None = None,
    low: float = 0.0,
    high: float = 1.0,
    prompt: str = "prompt",
    **options: Any,
) -> Task:
    """A task whose reward is that of TRL's GRPO trainer, brought to [0, 1].

        reward = min(max((sum_i weight_i r_i - low) / (high - low), 0), 1)

    A function is called as TRL calls it, with lists of one row: ``prompts``, ``completions`` and
    every other column by name; where the prompt is a list of messages the completion is one, too.
    A function that returns None does not judge this row.

    Args:
        rewards: Reward functions.
        file: Rows (JSONL or parquet) with the columns that the functions take.
        name: Of the task.
        gold: An answer that earns more than ``wrong``, if there is one to every row.
        wrong: A wrong answer; an empty one if None.
        weights: One a function; 1 each if None.
        low: Sum that is reward 0.
        high: Sum that is reward 1.
        prompt: Column of the prompt, a text or a list of messages.
        options: Further fields of ``Task``, such as max_tokens.
    """
    shares = [1.0] * len(rewards) if weights is None else list(weights)
    if not rewards or len(shares) != len(rewards) or not low < high:
        raise UserError(
            f"task {name!r}: {len(rewards)} reward functions, {len(shares)} weights, low {low:g}, "
            f"high {high:g}; at least one function, a weight each, low < high"
        )

    def verify(completion: str, row: Row) -> Verdict:
        chat = not isinstance(row[prompt], str)
        said = [{"role": "assistant", "content": completion}] if chat else completion
        columns = {key: [value] for key, value in row.items() if key not in (prompt, "completion")}
        scores = {
            function.__name__: function(prompts=[row[prompt]], completions=[said], **columns)[0]
            for function in rewards
        }
        total = sum(w * s for w, s in zip(shares, scores.values(), strict=True) if s is not None)
        return _verdict((total - low) / (high - low), scores)

    return _task(name, file, prompt, verify, gold, wrong, options)


def from_verifiers(
    taskset: str,
    file: str,
    *,
    gold: Answer | None = None,
    wrong: Answer | None = None,
    name: str | None = None,
    scale: float = 1.0,
    **options: Any,
) -> Task:
    """A task of a taskset of `verifiers` (1.0's interface, `verifiers.v1`), scored by its rewards.

        reward = min(max(sum_i weight_i r_i / scale, 0), 1)

    Rewards are those that need no runtime: of the task's data and the messages. Rows are asked one
    answer each; sessions of clients (``Task.converse``) are judged whole, each of their answers a
    turn of the model's. Tool servers, simulated users and judges that ask a model are not run.

    Args:
        taskset: Its id, as `verifiers` finds it: a module, or an installed package.
        file: Rows as ``taskset_rows`` gives them.
        gold: An answer that earns more than ``wrong``, if there is one to every row.
        wrong: A wrong answer; an empty one if None.
        name: Of the task; the taskset's if None.
        scale: Sum of rewards that is reward 1.
        options: Further fields of ``Task``, such as max_tokens.
    """
    import verifiers.v1 as vf
    from verifiers.v1.configs.agent import AgentConfig

    kind = _taskset(taskset).task_type()
    data = kind.data_type()

    def scored(task: Any, turns: Sequence[Any], given: int) -> Verdict:
        nodes = [
            vf.MessageNode(
                parent=at - 1 if at else None,
                message=message,
                sampled=at >= given and message.role == "assistant",
            )
            for at, message in enumerate(turns)
        ]
        about = vf.TraceTask(type=kind.__name__, data=task.data, key=task.key, hash=task.hash)
        trace = vf.Trace(task=about, agent=vf.AgentInfo(config=AgentConfig()), nodes=nodes)
        with closing(_Loop(SelectSelector())) as loop:
            loop.run_until_complete(task.score(trace))
        scores = {key: reward and reward.score for key, reward in trace.rewards.items()}
        return _verdict(trace.reward / scale, scores)

    def verify(completion: str, row: Row) -> Verdict:
        task = kind(data.model_validate(row["data"]))
        before = _vf_prompt(task.data)
        return scored(task, [*before, vf.AssistantMessage(content=completion)], len(before))

    def converse(messages: Sequence[Message], row: Row) -> Verdict:
        task = kind(data.model_validate(row["data"]))
        return scored(task, list(map(_vf_message, messages)), len(_vf_prompt(task.data)))

    def nested(answer: Answer | None) -> Answer | None:
        return answer and (lambda row: answer(row["data"]))

    short = name or taskset.rpartition(".")[2].replace("-", "_")
    options = {"converse": converse, **options}
    return _task(short, file, "prompt", verify, nested(gold), nested(wrong), options)


def taskset_rows(taskset: str) -> Iterator[dict[str, Any]]:
    """Rows of a taskset: {"prompt": messages, "data": the task's data as JSON}."""
    for task in _taskset(taskset):
        messages = [{"role": m.role, "content": m.content} for m in _vf_prompt(task.data)]
        yield {"prompt": messages, "data": task.data.model_dump(mode="json", exclude_none=True)}


def _taskset(name: str) -> Any:
    from verifiers.v1.utils.loaders import load_taskset, taskset_config_type

    return load_taskset(taskset_config_type(name)(id=name))


def _vf_prompt(data: Any) -> list[Any]:
    """The messages before the answer, as objects of `verifiers`."""
    import verifiers.v1 as vf

    system = [vf.SystemMessage(content=data.system_prompt)] if data.system_prompt else []
    own = data.prompt
    return [*system, *([vf.UserMessage(content=own)] if isinstance(own, str) else own or [])]


def _vf_message(message: Message) -> Any:
    """A message of the chat completions API as an object of `verifiers`."""
    import verifiers.v1 as vf

    kinds = {"system": vf.SystemMessage, "user": vf.UserMessage, "tool": vf.ToolMessage}
    calls = [{"id": each["id"], **each["function"]} for each in message.get("tool_calls") or ()]
    kind = kinds.get(message["role"], vf.AssistantMessage)
    return kind.model_validate({**message, "tool_calls": calls or None})


class _Loop(asyncio.SelectorEventLoop):
    """An event loop without a socket, which the process of a sandboxed verdict may not open.

    The socket is there to wake the loop from signals and other threads; scoring uses neither. The
    selector is one that holds no file descriptor, since those of before a fork are closed.
    """

    def _make_self_pipe(self) -> None:
        self._internal_fds = 0

    def _close_self_pipe(self) -> None:
        """There is none."""


def _task(
    name: str,
    file: str,
    prompt: str,
    verify: Callable[[str, Row], Verdict],
    gold: Answer | None,
    wrong: Answer | None,
    options: Mapping[str, Any],
) -> Task:
    """A graded target whose rows hold their own messages under ``prompt``."""

    def chat(row: Row) -> list[Message]:
        own = row[prompt]
        return [{"role": "user", "content": own}] if isinstance(own, str) else list(own)

    return Task(
        name=name,
        source=Source("", eval_split="train", file=file),  # one file, split by hash
        key=lambda row: content_key(json.dumps(row, sort_keys=True)),
        fields=lambda row: {prompt: "\n".join(m["content"] for m in chat(row))},
        template=f"{{{prompt}}}",
        chat=chat,
        verify=verify,
        gold=gold,
        wrong=wrong,
        **{"target": True, "graded": True, **options},
    )


def _verdict(reward: float, scores: Mapping[str, float | None]) -> Verdict:
    """The reward in [0, 1]; what is shown as extracted are the single scores."""
    shown = ", ".join(f"{k}={'-' if v is None else f'{v:g}'}" for k, v in scores.items())
    return Verdict(min(max(float(reward), 0.0), 1.0), 0.0, shown)


if __name__ == "__main__":
    for each in taskset_rows(sys.argv[1]):
        sys.stdout.write(json.dumps(each) + "\n")
