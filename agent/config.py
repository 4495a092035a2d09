"""Settings of one service and the places it owns, read once per process.

Order of authority: arguments, environment (``ANCHORAGE_LEARNER__SIGMA=0.002``), the TOML file,
the profile of the model (the embedded one has its own), the defaults below, which are for real
models. An unknown key is refused, so that a misspelt one cannot be believed.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from agent.errors import UserError

EMBEDDED = "embedded"
PROFILES: dict[str, dict[str, Any]] = {
    EMBEDDED: {
        "model": {"max_model_len": 1024, "dtype": "float32"},
        "learner": {
            "sigma": 0.01,
            "alpha": 0.01,
            "population": 16,
            "prompts": 96,
            "generations": 15,
            "lam": 3.0,
        },
        "tasks": {"max_tokens": 48, "rows": 400, "curve_every": 5},
        # At 45 % right, one row in five flips whatever is learnt: 400 rows carry 8 points.
        "gate": {"margins": {"countdown": 0.08}},
        "gateway": {"principal_cap": 0.0},
    }
}


class Section(BaseModel):
    """A group of settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Section)


class ModelSettings(Section):
    """The anchor: what is served first and what every round is tied to."""

    path: str = Field(EMBEDDED, description="'embedded', a directory, or a Hugging Face id.")
    revision: str | None = Field(None, description="Commit of a Hugging Face id, to pin it.")
    name: str = Field("anchorage", description="The name clients ask for and MLflow registers.")
    dtype: str = Field("auto", description="vLLM's --dtype.")
    max_model_len: int = Field(4096, gt=0, description="vLLM's --max-model-len, in tokens.")


class LearnerSettings(Section):
    """One round of ES with anchored weight decay (DESIGN: the learner)."""

    sigma: float = Field(0.001, gt=0, description="Standard deviation of a member's perturbation.")
    alpha: float = Field(0.0005, gt=0, description="Step size of the update.")
    population: int = Field(30, ge=1, description="Members evaluated in a generation.")
    generations: int = Field(100, ge=1, description="Generations of a round.")
    prompts: int = Field(200, ge=1, description="Training rows every member answers.")
    mirrored: bool = Field(False, description="Evaluate perturbations in +/- pairs.")
    shaping: Literal["zscore", "ranks"] = Field("zscore", description="Fitness shaping.")
    noise: Literal["normal", "rademacher"] = Field("normal", description="Kind of perturbation.")
    penalty: Literal["none", "l2", "l1", "huber", "elastic_net"] = Field(
        "l2", description="Decay toward the anchor."
    )
    lam: float = Field(5.0, ge=0, description="Strength lambda of the penalty.")
    tune_lambda: bool = Field(
        False, description="Start at lam; halve it from round to round while the target suffers."
    )
    huber_threshold: float = Field(0.01, gt=0, description="Where huber turns from L2 into L1.")
    l1_share: float = Field(0.5, ge=0, le=1, description="Share of L1 in elastic_net; L2's rest.")
    importance: Path | None = Field(
        None, description="Safetensors with a weight of the penalty, 0 or more, per parameter."
    )
    target_norm_ratio: float | None = Field(
        None, gt=0, lt=1, description="Set lambda so that ||delta|| is this share of no decay's."
    )
    early_stop: bool = Field(True, description="End a round when norm grows and reward is flat.")
    snapshot_every: int = Field(10, ge=1, description="Generations between snapshots of delta.")


class PromptSettings(Section):
    """How a task is asked; what is left out stays as the task has it."""

    template: str | None = Field(None, description="The question, with the task's {fields}.")
    system: str | None = Field(None, description="A system message before it.")
    prefill: str | None = Field(None, description="The assistant's first words, given.")
    shots: int | None = Field(None, ge=0, description="Worked examples, for tasks that have any.")


class TaskSettings(Section):
    """What is learnt, what must not be forgotten, and on which rows both are measured."""

    target: str = Field("gsm8k", description="The task a round trains on.")
    priors: tuple[str, ...] | None = Field(
        None, description="Prior tasks; None means every known task that is not the target."
    )
    files: tuple[str, ...] = Field((), description="Own tasks, each 'path/to/file.py:TASK'.")
    data_dir: Path | None = Field(None, description="Local rows: <data_dir>/<task>/<split>.jsonl.")
    rows: int = Field(500, ge=1, description="Evaluation rows of each task.")
    max_tokens: int | None = Field(None, gt=0, description="Longest answer; None: the task's own.")
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
        {}, description="Own prompts by task: a template, or a table of what is to be different."
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
    """How sure a promotion has to be (evaluators/gate.py states the tests)."""

    alpha: float = Field(0.025, gt=0, lt=0.5, description="Level of non-inferiority on priors.")
    target_alpha: float = Field(0.01, gt=0, lt=0.5, description="Level of McNemar on the target.")
    min_gain: float = Field(0.005, ge=0, lt=1, description="Least gain on the target, as a share.")
    confirm: bool = Field(True, description="Confirm on sealed rows before a promotion.")
    margins: dict[str, float] = Field(
        {}, description="Own margin of a prior task, a share, instead of the one its rows carry."
    )
    sequential: bool = Field(
        False, description="Judge by betting, which allows more rows after an undecided look."
    )
    extend: int = Field(
        0,
        ge=0,
        description="Times that rows are added while a prior is undecided; sequential only.",
    )

    @model_validator(mode="after")
    def _looks_again_only_by_betting(self) -> "GateSettings":
        """A fixed-sample test looked at again would err more often than it says."""
        if self.extend and not self.sequential:
            raise ValueError(f"extend = {self.extend} needs sequential = true")
        return self


class ReviewSettings(Section):
    """Who has the last word."""

    mode: Literal["auto", "manual"] = Field(
        "auto", description="'manual': a passed candidate waits for a person."
    )
    allow_anchor_move: bool = Field(
        False, description="Whether `anchorage anchor move` may tie later rounds to the champion."
    )


class BakingSettings(Section):
    """The watch over a freshly promoted version (evaluators/baking.py states the tests)."""

    rows: int = Field(40, ge=1, description="Live rewards of the new version that settle it.")
    minutes: float = Field(60.0, ge=0, description="Longest watch; then what was seen settles it.")
    alpha: float = Field(
        0.01, gt=0, lt=0.5, description="Largest chance to roll back a version that is not worse."
    )
    window: int = Field(200, ge=1, description="Newest answers of the old version to compare with.")
    error_margin: float = Field(
        0.05, gt=0, lt=0.5, description="Failed answers more than before that are borne, a share."
    )
    latency_factor: float = Field(
        3.0, gt=1, description="An answer slower than this many old medians is slow."
    )


class GatewaySettings(Section):
    """The endpoint."""

    host: str = Field("127.0.0.1", description="Address to listen on; elsewhere keys are required.")
    port: int = Field(0, ge=0, le=65535, description="Port; 0 takes a free one.")
    principal_cap: float = Field(
        0.01, ge=0, le=1, description="Largest share of a round's rows from one principal; 0: off."
    )
    retention_days: int = Field(30, ge=1, description="Days that captured text is kept.")
    experience_url: str | None = Field(None, description="SQLAlchemy URL; None: SQLite in home.")
    rate: str = Field(
        "", description="Requests of one principal, such as '600/minute'; empty: no limit."
    )
    token_quota: str = Field(
        "", description="Tokens of one principal, such as '1000000/day'; empty: no limit."
    )
    quota_storage: str = Field(
        "async+memory://", description="Where rates and quotas are counted, a URL of `limits`."
    )
    max_body_bytes: int = Field(1 << 20, gt=0, description="Largest body of a request.")
    max_in_flight: int = Field(64, gt=0, description="Requests inside the engine at once.")
    max_queued: int = Field(256, gt=0, description="Requests that may wait for such a place.")
    queue_timeout_s: float = Field(30.0, gt=0, description="Longest wait for such a place.")
    answer_timeout_s: float = Field(600.0, gt=0, description="Longest time for a whole answer.")


class EngineSettings(Section):
    """The vLLM engines: one serves, the others evaluate members."""

    population: int = Field(1, ge=1, description="Engines that evaluate members.")
    placement: Literal["local", "ray"] = Field("local", description="Where those engines run.")
    ray_address: str | None = Field(None, description="Ray cluster; None: one of this machine.")
    gpu_memory_utilization: float = Field(0.45, gt=0, le=1, description="Share of the GPU each.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share one engine.")
    max_num_seqs: int = Field(128, ge=1, description="Sequences in a batch; fixed for pairing.")
    master_device: Literal["cpu", "cuda"] = Field(
        "cpu", description="Where delta lies: on the host, or 4 bytes a parameter on the GPU."
    )
    swap: Literal["in_place", "blue_green"] = Field(
        "in_place", description="Reload the one engine, or start a second one and flip to it."
    )
    swap_deadline_s: float = Field(60.0, gt=0, description="Longest a swap may take.")


class ProjectionSettings(Section):
    """MLflow and Prefect, which show what happens and own nothing of it."""

    mlflow_port: int = Field(0, ge=0, le=65535, description="Port; 0 takes a free one.")
    prefect_port: int = Field(0, ge=0, le=65535, description="Port; 0 takes a free one.")
    loop_minutes: float = Field(60.0, gt=0, description="Minutes between scheduled rounds.")
    reconcile_seconds: float = Field(30.0, gt=0, description="Seconds between reconciliations.")


class ProfileSource(InitSettingsSource):
    """Defaults of the chosen model, below everything a person wrote."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls, {})

    def __call__(self) -> dict[str, Any]:
        """The profile that belongs to the model chosen by the sources above."""
        model = self.current_state.get("model") or {}
        return PROFILES.get(model.get("path", EMBEDDED), {})


class Settings(BaseSettings):
    """Everything a service can be told. Every field says what it is for."""

    model_config = SettingsConfigDict(
        env_prefix="ANCHORAGE_", env_nested_delimiter="__", extra="forbid", frozen=True
    )
    toml_file: ClassVar[Path | None] = None

    model: ModelSettings = ModelSettings()
    learner: LearnerSettings = LearnerSettings()
    tasks: TaskSettings = TaskSettings()
    gate: GateSettings = GateSettings()
    review: ReviewSettings = ReviewSettings()
    baking: BakingSettings = BakingSettings()
    gateway: GatewaySettings = GatewaySettings()
    engines: EngineSettings = EngineSettings()
    projection: ProjectionSettings = ProjectionSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources as the module's docstring says."""
        toml = TomlConfigSettingsSource(settings_cls, cls.toml_file)
        return init_settings, env_settings, toml, ProfileSource(settings_cls)


def load(toml: Path | None = None, **overrides: Any) -> Settings:
    """Read the settings: arguments, environment, ``toml`` (default ``anchorage.toml``, if there).

    Raises:
        UserError: A missing file, an unknown key or a value out of range; all of them in one line.
    """
    if toml is not None and not toml.is_file():
        raise UserError(f"settings file {str(toml)!r} does not exist; give a TOML file")
    path = toml or (Path("anchorage.toml") if Path("anchorage.toml").is_file() else None)
    reader = type("Settings", (Settings,), {"toml_file": path, "__module__": __name__})
    try:
        return Settings.model_construct(**dict(reader(**overrides)))
    except ValidationError as error:
        raise UserError(_one_line(error)) from None
    except ValueError as error:  # TOML that does not parse
        raise UserError(f"settings file {str(path)!r} is not TOML: {error}") from None


def replaced(section: S, name: str, changes: Mapping[str, Any]) -> S:
    """A section with some values changed, checked as if it had been read so.

    Raises:
        UserError: An unknown key or a value out of range; all of them in one line.
    """
    try:
        return type(section).model_validate(section.model_dump() | dict(changes))
    except ValidationError as error:
        raise UserError(_one_line(error, name)) from None


def _whole(spec: str) -> str:
    """'a/b.py:TASK' with the whole path; 'package.module:TASK' as it is."""
    place, _, name = spec.rpartition(":")
    return f"{Path(place).expanduser().resolve()}:{name}" if place.endswith(".py") else spec


def _one_line(error: ValidationError, *within: str) -> str:
    """All mismatches of a validation, each with its key, its value and what was allowed."""
    told = []
    for item in error.errors():
        place = (*within, *item["loc"])
        key = ".".join(str(part) for part in place)
        if item["type"] == "extra_forbidden":
            told.append(f"unknown key {key!r} (value {item['input']!r}); {_known(place)}")
        else:
            told.append(f"{key} = {item['input']!r}: {item['msg']}")
    return "settings: " + "; ".join(told)


def _known(location: tuple[int | str, ...]) -> str:
    """The keys allowed beside an unknown one."""
    fields = Settings.model_fields
    if len(location) > 1 and str(location[0]) in fields:
        section = fields[str(location[0])].annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            fields = section.model_fields
    return "allowed: " + ", ".join(fields)


@dataclass(frozen=True)
class Home:
    """The one folder a service owns, and the name of everything in it."""

    root: Path

    @classmethod
    def at(cls, root: Path | None = None) -> "Home":
        """The given folder, else ``ANCHORAGE_HOME``, else ``.anchorage`` here; made private."""
        chosen = root or Path(os.environ.get("ANCHORAGE_HOME", ".anchorage"))
        home = cls(chosen.expanduser().resolve())
        try:
            home.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"home {str(home.root)!r} is a file; give a folder") from None
        return home

    @property
    def state_db(self) -> Path:
        """Journal, ledger, leases."""
        return self.root / "state.db"

    @property
    def experience_db(self) -> Path:
        """Interactions, rewards, feedback, keys."""
        return self.root / "experience.db"

    @property
    def weights(self) -> Path:
        """One Hugging Face directory per kept digest."""
        return self.root / "weights"

    @property
    def evaluations(self) -> Path:
        """Per-sample tables, one folder per digest."""
        return self.root / "evaluations"

    @property
    def snapshots(self) -> Path:
        """Caches of delta; deleting them changes nothing."""
        return self.root / "snapshots"

    @property
    def importance(self) -> Path:
        """Weights of penalties, by sha256: what a replay of the rounds that used them needs."""
        return self.root / "importance"

    @property
    def runs(self) -> Path:
        """One folder per round: its rows and its curve."""
        return self.root / "runs"

    @property
    def sockets(self) -> Path:
        """Unix sockets, mode 0700."""
        return self.root / "sockets"

    @property
    def logs(self) -> Path:
        """One log per process of the stack."""
        return self.root / "logs"

    @property
    def mlflow(self) -> Path:
        """MLflow's database and artifacts."""
        return self.root / "mlflow"

    @property
    def prefect(self) -> Path:
        """Prefect's home."""
        return self.root / "prefect"

    @property
    def settings_json(self) -> Path:
        """The settings the running service was started with."""
        return self.root / "settings.json"
