"""The sections of the settings: every field with its default, its bounds and what it is for.

Defaults are written here and nowhere else. They are for real models; `agent.config` reads them and
puts the profile of a small model over them.
"""

from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

EMBEDDED = "embedded"
SMOLLM2 = "smollm2"  # SmolLM2-135M-Instruct, from the hub or an installed package
INSTRUCT = "instruct"  # the profile of instruct models of 0.5 to 3 B
PLAIN = "plain"
PLAIN_TEMPLATE = (  # of models without one: turns as text, each answer closed by the model's eos
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] }}{{ eos_token }}{{ '\\n\\n' }}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TAKEN = frozenset(  # parameters of apply_chat_template, which are no variables of a template
    {"conversation", "messages", "tools", "documents", "chat_template", "tokenize", "padding"}
    | {"add_generation_prompt", "continue_final_message", "truncation", "max_length"}
    | {"return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}
)
AUTO: Literal["auto"] = "auto"
Auto = Literal["auto"]


def _size(value: object) -> object:
    """A number above 0, or 'auto'; one refusal for both."""
    if value == AUTO:
        return value
    with suppress(TypeError, ValueError):
        if 0 < (number := float(value)) < inf:  # type: ignore[arg-type]
            return number
    raise ValueError("allowed: a number above 0, or 'auto'")


Size = Annotated[float | Auto, BeforeValidator(_size)]


class Section(BaseModel):
    """A section of the settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(Section):
    """The anchor: what is served first and what every round is tied to."""

    path: str = Field(
        EMBEDDED,
        description="'embedded', 'smollm2', a directory, a .gguf file, or a Hugging Face id.",
    )
    profile: Literal["embedded", "smollm2", "instruct"] | None = Field(
        None,
        description="Whose defaults count; not set: those of `path`. 'instruct' suits instruct "
        "models of 0.5 to 3 B.",
    )
    revision: str | None = Field(None, description="Commit of a Hugging Face id, to pin it.")
    name: str = Field("anchorage", description="The name clients ask for and MLflow registers.")
    dtype: str = Field("auto", description="vLLM's --dtype.")
    max_model_len: int = Field(4096, gt=0, description="vLLM's --max-model-len, in tokens.")
    chat_template: str | None = Field(
        None, description="A Jinja file, or 'plain' (User: / Assistant:); not set: the model's own."
    )
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(
        {},
        description="Variables of the chat template in training, evaluation and serving, such as "
        "{enable_thinking = false}; a client's own come first.",
    )
    reasoning_parser: str | None = Field(
        None, description="vLLM's --reasoning-parser, such as 'qwen3'; not set: none."
    )
    tool_parser: str = Field("hermes", description="vLLM's --tool-call-parser.")

    @field_validator("path")
    @classmethod
    def _path_from_anywhere(cls, path: str) -> str:
        """A home is used from many folders: a model's files are named by their whole path."""
        place = Path(path).expanduser()
        return str(place.resolve()) if path not in (EMBEDDED, SMOLLM2) and place.exists() else path

    @field_validator("chat_template")
    @classmethod
    def _template_as_text(cls, value: str | None) -> str | None:
        """The file's text: a service keeps the template it was started with."""
        if value is None or value == PLAIN or "{" in value:
            return value
        path = Path(value).expanduser()
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if "{" not in text:
            raise ValueError("is neither 'plain' nor a file with a Jinja template")
        return text

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables_only(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Names that transformers' apply_chat_template takes for itself are none."""
        if taken := sorted(TAKEN & value.keys()):
            raise ValueError(f"{', '.join(taken)}: not a variable of a chat template")
        return value

    @property
    def template(self) -> str | None:
        """The chat template's text; None: the model's own."""
        return PLAIN_TEMPLATE if self.chat_template == PLAIN else self.chat_template


class LearnerSettings(Section):
    """One round of Evolution Strategies with anchored weight decay."""

    sigma: Size = Field(
        AUTO,
        description="Standard deviation of a member's perturbation; 'auto': the largest of a few "
        "that members bear, tried before the round.",
    )
    alpha: Size = Field(AUTO, description="Step size of the update; 'auto': as large as sigma.")
    population: int = Field(30, ge=1, description="Members evaluated in a generation.")
    generations: int = Field(100, ge=1, description="Generations of a round.")
    prompts: int = Field(200, ge=1, description="Training rows of a round.")
    batch: int = Field(
        0, ge=0, description="Rows a generation asks every member, in turn; 0: all of the round."
    )
    selection: int = Field(
        128,
        ge=0,
        description="Rows that are kept apart to choose the candidate among generations and on the "
        "line from the anchor: of several clients' traffic, then of the training rows, at most a "
        "fifth of them; 0: the last one.",
    )
    selection_every: int = Field(
        4, ge=1, description="Generations between two measurements on those rows."
    )
    patience: int = Field(
        3, ge=0, description="Such measurements without a better one that end a round; 0: never."
    )
    seed: int = Field(0, ge=0, description="Another one: other noise and other rows in turn.")
    mirrored: bool = Field(False, description="Evaluate perturbations in +/- pairs.")
    shaping: Literal["zscore", "ranks"] = Field("zscore", description="Fitness shaping.")
    fitness: Literal["reward", "likelihood"] = Field(
        "reward",
        description="What members are compared by: the verifier's reward of their answers, or the "
        "log-probability they give to the task's worked answers, which are read and not generated; "
        "candidates are chosen and judged by reward either way.",
    )
    noise: Literal["normal", "rademacher"] = Field(
        "rademacher",
        description="Kind of perturbation: normals, or signs, which are drawn in half of the time.",
    )
    penalty: Literal["none", "l2", "l1", "huber", "elastic_net"] = Field(
        "l2", description="Decay toward the anchor."
    )
    lam: float = Field(5.0, ge=0, description="Strength lambda of the penalty.")
    tune_lambda: bool = Field(
        False, description="Start at lam; halve it from round to round while the target suffers."
    )
    huber_threshold: float = Field(0.01, gt=0, description="|delta| where L2 turns to L1.")
    l1_share: float = Field(0.5, ge=0, le=1, description="Share of L1 in elastic_net; rest: L2.")
    importance: Path | None = Field(
        None,
        description="A .safetensors file: a weight of the penalty (0 or more) a parameter.",
    )
    target_norm_ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Choose lambda for this share of the ||delta|| expected without decay.",
    )
    budget_minutes: float = Field(
        240.0,
        ge=0,
        description="Longest round, evaluation included: a longer one is refused before it starts, "
        "and one that meets it in between stops and is judged; 0: no limit.",
    )
    too_large: Literal["ignore", "alarm", "halve"] = Field(
        "alarm",
        description="What follows when members earn clearly less than their parent, which answers "
        "the same rows every selection_every generations: nothing (and it is not asked), a line in "
        "progress and report, or also half of sigma from then on.",
    )
    early_stop: bool = Field(True, description="End a round when norm grows and reward is flat.")
    snapshot_every: int = Field(10, ge=1, description="Generations between snapshots of delta.")

    @property
    def sizes(self) -> tuple[float, float]:
        """Sigma and alpha as numbers.

        Raises:
            ValueError: One is still 'auto': `flows.learn.calibrate` makes it a number.
        """
        if isinstance(self.sigma, str) or isinstance(self.alpha, str):
            raise ValueError(f"sigma {self.sigma}, alpha {self.alpha}: not calibrated yet")
        return self.sigma, self.alpha


class PromptSettings(Section):
    """How a task is asked; a key that is left out keeps the task's own value."""

    template: str | None = Field(None, description="The question, with the task's {fields}.")
    system: str | None = Field(None, description="A system message before it.")
    prefill: str | None = Field(None, description="First words of the assistant, given.")
    shots: int | None = Field(None, ge=0, description="Worked examples, for tasks that have any.")


class TaskSettings(Section):
    """The target task, the prior tasks, and the rows on which they are measured."""

    target: str = Field("gsm8k", description="The task a round trains on.")
    priors: tuple[str, ...] | None = Field(
        None, description="Prior tasks, [] for none; not set: every known task but the target."
    )
    files: tuple[str, ...] = Field((), description="Own tasks, each 'path/to/file.py:TASK'.")
    data_dir: Path | None = Field(None, description="Local rows: <data_dir>/<task>/<split>.jsonl.")
    rows: int = Field(500, ge=1, description="Evaluation rows of each task.")
    max_tokens: int | None = Field(None, gt=0, description="Longest answer; not set: the task's.")
    generation_config: Literal["model", "none"] = Field(
        "model",
        description="'model': the penalties of the model's generation_config.json hold in "
        "training, at the gate and at the endpoint; 'none': nowhere.",
    )
    curve_every: int = Field(
        0, ge=0, description="Measure all tasks every so many generations of a round; 0: never."
    )
    curve_rows: int = Field(64, ge=1, description="Rows of each task in such a measurement.")
    kl_rows: int = Field(
        16,
        ge=0,
        description="Continuations a task on which KL(anchor || candidate) is taken; 0: off.",
    )
    prompts: dict[str, str | PromptSettings] = Field(
        {}, description="Own prompts by task: a template, or a table of the keys below."
    )
    revisions: dict[str, str] = Field({}, description="Commit of a task's data set, to pin it.")

    @field_validator("files")
    @classmethod
    def _files_from_anywhere(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        """A home is used from many folders: files are named by their whole path."""
        return tuple(_whole(each) for each in files)

    @field_validator("data_dir")
    @classmethod
    def _rows_from_anywhere(cls, data_dir: Path | None) -> Path | None:
        return data_dir and data_dir.expanduser().resolve()


class GateSettings(Section):
    """Levels and margins of the gate (evaluators/gate.py states the tests)."""

    alpha: float = Field(0.025, gt=0, lt=0.5, description="Level of non-inferiority on priors.")
    target_alpha: float = Field(0.01, gt=0, lt=0.5, description="Level of McNemar on the target.")
    min_gain: float = Field(0.005, gt=0, lt=1, description="Least gain on the target, as a share.")
    confirm: bool = Field(True, description="Confirm on sealed rows before a promotion.")
    margins: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(
        {},
        description="Margin of a prior task, a share; else its number of rows gives one.",
    )
    sequential: bool = Field(
        False,
        description="Judge by betting, which stays valid when rows are added later.",
    )
    extend: int = Field(
        0,
        ge=0,
        description="Times that rows are added while a prior task is undecided; needs sequential.",
    )

    @model_validator(mode="after")
    def _looks_again_only_by_betting(self) -> "GateSettings":
        """A fixed-sample test looked at again would err more often than it says."""
        if self.extend and not self.sequential:
            raise ValueError(f"extend = {self.extend} needs sequential = true")
        return self


class ReviewSettings(Section):
    """Whether a person approves what is served."""

    mode: Literal["auto", "manual"] = Field(
        "manual",
        description="'manual': a passed candidate waits for a person; 'auto': it is served.",
    )
    allow_anchor_move: bool = Field(
        False, description="Whether `anchorage anchor move` may tie later rounds to the champion."
    )


class BakingSettings(Section):
    """The watch over a newly promoted version (evaluators/live.py states the tests)."""

    rows: int = Field(40, ge=1, description="Live rewards after which the watch ends.")
    minutes: float = Field(60.0, ge=0, description="Longest watch; then the data so far decides.")
    alpha: float = Field(
        0.01, gt=0, lt=0.5, description="Largest chance to roll back a version that is not worse."
    )
    window: int = Field(200, ge=1, description="Newest answers of the old version to compare with.")
    error_margin: float = Field(
        0.05, gt=0, lt=0.5, description="Tolerated rise of the failure rate (0.05 is 5 points)."
    )
    latency_factor: float = Field(
        3.0,
        gt=1,
        description="Slow: more than this many median latencies of the old version.",
    )


def _whole(spec: str) -> str:
    """'a/b.py:TASK' with the whole path; 'package.module:TASK' as it is."""
    place, _, name = spec.rpartition(":")
    return f"{Path(place).expanduser().resolve()}:{name}" if place.endswith(".py") else spec
