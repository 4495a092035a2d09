"""Settings of one service, read once per process.

Order of authority: arguments, environment (``ANCHORAGE_LEARNER__SIGMA=0.002``), the TOML file,
the profile of the model (``PROFILES``), the defaults of `agent.sections`. An unknown key is
refused: a misspelt one would otherwise be ignored in silence.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from agent.errors import UserError
from agent.home import Home, read_sealed, write_sealed
from agent.sections import (
    EMBEDDED,
    SMOLLM2,
    BakingSettings,
    EngineSettings,
    GateSettings,
    GatewaySettings,
    LearnerSettings,
    ModelSettings,
    ProjectionSettings,
    ReviewSettings,
    Section,
    TaskSettings,
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
            "budget_minutes": 0.0,
        },
        "tasks": {"max_tokens": 48, "rows": 400, "curve_every": 5},
        # At 45 % right, one row in five flips whatever is learnt: 400 rows carry 8 points.
        "gate": {"margins": {"countdown": 0.08}},
        "gateway": {"principal_cap": 0.0},
        "engines": {"prefix_caching": False},  # its prompts share too little to gain by it
    },
    # What a hand-made round on two cores learnt with; priors that are at their floor for a model
    # of this size (Countdown, MMLU-Pro) tell nothing and cost as much as the others.
    SMOLLM2: {
        "model": {"max_model_len": 1024, "dtype": "bfloat16"},
        "learner": {
            "sigma": 0.001,
            "alpha": 0.001,
            "population": 16,
            "prompts": 32,
            "generations": 14,
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
}

S = TypeVar("S", bound=Section)


class ProfileSource(InitSettingsSource):
    """Defaults of the chosen model: the source of lowest authority."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls, {})

    def __call__(self) -> dict[str, Any]:
        """The profile that belongs to the model chosen by the sources above."""
        model = self.current_state.get("model") or {}
        return PROFILES.get(model.get("path", EMBEDDED), {})


class Settings(BaseSettings):
    """All settings of a service, by section; `agent.sections` describes each field."""

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
        else:
            mismatches.append(f"{key} = {item['input']!r}: {item['msg']}")
    return "settings: " + "; ".join(mismatches)


def _known(location: tuple[int | str, ...]) -> str:
    """The keys allowed beside an unknown one."""
    fields = Settings.model_fields
    if len(location) > 1 and str(location[0]) in fields:
        section = fields[str(location[0])].annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            fields = section.model_fields
    return "allowed: " + ", ".join(fields)
