"""Settings of one service, read once per process.

Order of authority: arguments, environment (``ANCHORAGE_LEARNER__SIGMA=0.002``), the TOML file,
the profile of the model (``PROFILES``), the defaults of `agent.sections`. An unknown key is
refused: a misspelt one would otherwise be ignored in silence. So is an unknown ``ANCHORAGE_``
variable.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from agent.errors import UserError, masked
from agent.home import Home, read_sealed, write_sealed
from agent.sections import (
    EMBEDDED,
    INSTRUCT,
    SMOLLM2,
    BakingSettings,
    GateSettings,
    LearnerSettings,
    ModelSettings,
    ReviewSettings,
    Section,
    TaskSettings,
)
from agent.sections_running import (
    EngineSettings,
    GatewaySettings,
    ProjectionSettings,
    StateSettings,
)

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
            "selection": 0,
            "budget_minutes": 0.0,
            "too_large": "ignore",  # its sigma is known to be small enough
            "noise": "normal",
        },
        "tasks": {"max_tokens": 48, "rows": 400, "curve_every": 5},
        # At 45 % right, one row in five flips whatever is learnt: 400 rows carry 8 points.
        "gate": {"margins": {"countdown": 0.08}},
        "review": {"mode": "auto"},
        "gateway": {"principal_cap": 0.0},
        "projection": {"loop_minutes": 60.0},
    },
    # For any other model nothing is scheduled and nothing is served without a person.
    # Sizes by the rounds of docs/learning.md; priors that are at their floor for a model
    # of this size (Countdown, MMLU-Pro) tell nothing and cost as much as the others.
    SMOLLM2: {
        "model": {"max_model_len": 1024, "dtype": "bfloat16"},
        "learner": {
            "fitness": "likelihood",
            "noise": "normal",  # as it was measured
            "sigma": 0.001,
            "alpha": 0.003,
            "population": 32,
            "prompts": 512,
            "batch": 16,
            "generations": 16,
            "lam": 3.0,
        },
        "tasks": {
            "max_tokens": 64,
            "rows": 400,
            "kl_rows": 8,
            "priors": ["arc_challenge", "piqa", "proofwriter", "refusal"],
        },
        "gateway": {"principal_cap": 0.0},
    },
    # For instruct models of 0.5 to 3 B, by name (`model.profile`). Not measured here: 16 members
    # did as well as 64 at 1.5 to 3 B (arXiv 2608.27351), the rest is SmolLM2's, prompts longer.
    INSTRUCT: {
        "model": {"max_model_len": 2048, "dtype": "bfloat16"},
        "learner": {
            "population": 16,
            "prompts": 2048,
            "batch": 64,
            "generations": 32,
            "lam": 3.0,
        },
        "tasks": {"max_tokens": 256, "rows": 400, "kl_rows": 8},
    },
}

S = TypeVar("S", bound=Section)
PREFIX = "ANCHORAGE_"
# Variables that are no settings: the home, --verbose, a mark on a stack's processes, where
# deploy/prefect.yaml finds the packages, and two of the tests.
OTHERS = frozenset({"HOME", "VERBOSE", "STACK", "SOURCE", "TEST_DATA", "SOAK"})
LINKS = ("SERVICE_", "PORT_")  # what Kubernetes tells of a service that is called anchorage


class ProfileSource(InitSettingsSource):
    """Defaults of the chosen model: the source of lowest authority."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls, {})

    def __call__(self) -> dict[str, Any]:
        """The profile that belongs to the model chosen by the sources above."""
        model = self.current_state.get("model") or {}
        if not isinstance(model, dict):  # refused by the validation
            return {}
        named = model.get("profile")
        if named is not None and named not in PROFILES:
            return {}  # refused by the validation
        return PROFILES.get(named or model.get("path", EMBEDDED), {})


class Variables(EnvSettingsSource):
    """The environment; a value that is not the JSON it should be is refused with its key."""

    def decode_complex_value(self, field_name: str, field: Any, value: Any) -> Any:
        """The JSON of a list or table; the text itself where it is none, for the validation."""
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


class Settings(BaseSettings):
    """All settings of a service, by section; `agent.sections` describes each field."""

    model_config = SettingsConfigDict(
        env_prefix="ANCHORAGE_", env_nested_delimiter="__", extra="forbid", frozen=True
    )
    toml_file: ClassVar[Path | None] = None
    profiled: ClassVar[bool] = True  # whether the profile of the model counts

    model: ModelSettings = ModelSettings()
    learner: LearnerSettings = LearnerSettings()
    tasks: TaskSettings = TaskSettings()
    gate: GateSettings = GateSettings()
    review: ReviewSettings = ReviewSettings()
    baking: BakingSettings = BakingSettings()
    state: StateSettings = StateSettings()
    gateway: GatewaySettings = GatewaySettings()
    engines: EngineSettings = EngineSettings()
    projection: ProjectionSettings = ProjectionSettings()

    def state_at(self, home: Home) -> str | Path:
        """Where journal and ledger of a home are: a file, or a URL with its password."""
        return self.state.url or home.state_db

    def experience_at(self, home: Home) -> str | Path:
        """Where the traffic of a home is, as ``state_at``."""
        return self.gateway.experience_url or self.state.url or home.experience_db

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
        given = (init_settings, Variables(settings_cls), toml)
        return (*given, ProfileSource(settings_cls)) if cls.profiled else given


def load(toml: Path | None = None, **overrides: Any) -> Settings:
    """Read the settings: arguments, environment, ``toml`` (default ``anchorage.toml``, if there).

    Raises:
        UserError: A missing file, an unknown key or variable, or a value out of range; all of them
            in one line.
    """
    return Settings.model_construct(**dict(_read(toml, True, overrides)))


def given(toml: Path | None = None) -> dict[str, Any]:
    """What environment and settings file say, plain values by ``section.key``; no defaults.

    Raises:
        UserError: As ``load``.
    """
    sections = _read(toml, False, {}).model_dump(mode="json", exclude_unset=True)
    return {f"{name}.{key}": v for name, values in sections.items() for key, v in values.items()}


def settings_file(toml: Path | None = None) -> Path | None:
    """The whole path of the file that is read: the given one, else ``anchorage.toml`` if there."""
    path = toml or Path("anchorage.toml")
    return path.resolve() if toml is not None or path.is_file() else None


def _read(toml: Path | None, profiled: bool, overrides: Mapping[str, Any]) -> Settings:
    _refuse_unknown_variables()
    path = settings_file(toml)
    if path is not None and not path.is_file():
        raise UserError(f"settings file {str(path)!r} does not exist; give a TOML file")
    values = {"toml_file": path, "profiled": profiled, "__module__": __name__}
    reader: type[Settings] = type("Settings", (Settings,), values)
    try:
        return reader(**overrides)
    except ValidationError as error:
        raise UserError(_one_line(error)) from None
    except ValueError as error:  # TOML that does not parse
        raise UserError(f"settings file {str(path)!r} is not TOML: {error}") from None


def _refuse_unknown_variables() -> None:
    """Refuse ``ANCHORAGE_`` variables that name no section, which nothing would ever read."""
    sections = {name.upper() for name in Settings.model_fields}
    names = {name: name.upper().removeprefix(PREFIX) for name in os.environ}
    unknown = [
        f"{name}={os.environ[name]!r}"
        for name, rest in sorted(names.items())
        if name.upper().startswith(PREFIX)
        and rest.partition("__")[0] not in sections
        and rest not in OTHERS
        and not (rest.startswith(LINKS) or os.environ[name].startswith("tcp://"))
    ]
    if unknown:
        allowed = ", ".join(f"{PREFIX}{name}__KEY" for name in sorted(sections))
        raise UserError(f"environment: {'; '.join(unknown)}: no setting; allowed: {allowed}")


@dataclass(frozen=True, slots=True)
class Change:
    """One setting before and after, as plain values."""

    key: str
    before: Any
    after: Any

    def shown(self) -> dict[str, Any]:
        """The same for a person: passwords in URLs are masked."""
        return {"key": self.key, "before": _shown(self.before), "after": _shown(self.after)}


def changes(before: Settings, after: Settings) -> list[Change]:
    """The settings that differ, in the order of the reference."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return [
        Change(f"{section}.{key}", old[section][key], value)
        for section, values in new.items()
        for key, value in values.items()
        if old[section][key] != value
    ]


def _shown(value: Any) -> Any:
    """A plain value as a person may see it."""
    return masked(value) if isinstance(value, str) else value


def keep(home: Home, settings: Settings) -> None:
    """Write what the processes of a home are started with."""
    write_sealed(home.settings_json, settings.model_dump(mode="json"))


def kept(home: Home) -> Settings:
    """What the processes of a home were started with.

    Raises:
        FileNotFoundError: A home that was never started.
        UserError: settings.json is damaged, or has a key or value that is not allowed.
    """
    document = read_sealed(home.settings_json)
    try:
        return Settings.model_validate_json(json.dumps(document))
    except ValidationError as error:
        raise UserError(f"{home.settings_json}: {_one_line(error)}") from None


@dataclass(frozen=True, slots=True)
class Started:
    """What `up` was given last in a home: its settings file and options, by section and key."""

    file: str | None
    options: Mapping[str, Mapping[str, Any]]


def started(home: Home) -> Started | None:
    """What `up` was given last; None before it ever came up."""
    try:
        return Started(**read_sealed(home.started_json))
    except FileNotFoundError:
        return None


def remember(home: Home, given: Started) -> None:
    """Keep what `up` was given, so that the next one reads the same file again."""
    plain = json.loads(json.dumps(asdict(given), default=str))  # paths as text
    write_sealed(home.started_json, plain)


def unheeded(home: Home, settings: Settings) -> list[str]:
    """What environment and settings file say and the home was not started with, a line each.

    A running service keeps what it was started with; `up` reads all again.
    """
    last = started(home)
    file = settings_file() or (Path(last.file) if last and last.file else None)
    try:
        said = given(file if file is not None and file.is_file() else None)
    except UserError as error:
        return [f"not read until the next `anchorage up`: {error}"]
    values = settings.model_dump(mode="json")
    return [
        f"{key} = {_shown(value)!r} counts from the next `anchorage up`; the home was started with "
        f"{_shown(values[section][name])!r}"
        for key, value in said.items()
        for section, _, name in [key.partition(".")]
        if value != values[section][name]
    ]


def replaced(section: S, name: str, changes: Mapping[str, Any]) -> S:
    """A section with some values changed, checked as if it had been read so.

    Raises:
        UserError: An unknown key or a value out of range; all of them in one line.
    """
    try:
        return type(section).model_validate(section.model_dump() | dict(changes))
    except ValidationError as error:
        raise UserError(_one_line(error, name)) from None


def _one_line(error: ValidationError, *within: str) -> str:
    """All mismatches of a validation, each with its key, its value and what was allowed."""
    mismatches = []
    for item in error.errors():
        place = (*within, *item["loc"])
        key = ".".join(str(part) for part in place)
        if item["type"] == "extra_forbidden":
            mismatches.append(f"unknown key {key!r} (value {item['input']!r}); {_known(place)}")
        elif item["type"] == "tuple_type":
            example = json.dumps([item["input"]], default=str)
            mismatches.append(f"{key} = {item['input']!r}; allowed: a list, such as {example}")
        elif place[:2] == ("gate", "margins") and item["type"] in ("less_than", "greater_than"):
            allowed = "allowed: a share between 0 and 1 (0.08 is 8 points)"
            mismatches.append(f"{key} = {item['input']!r}; {allowed}")
        else:
            mismatches.append(f"{key} = {item['input']!r}: {item['msg']}")
    return masked("settings: " + "; ".join(mismatches))


def _known(location: tuple[int | str, ...]) -> str:
    """The keys allowed beside an unknown one."""
    fields = Settings.model_fields
    if len(location) > 1 and str(location[0]) in fields:
        section = fields[str(location[0])].annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            fields = section.model_fields
    return "allowed: " + ", ".join(fields)
