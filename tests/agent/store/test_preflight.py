"""Every way to spoil a weights directory is refused and named, the sound one let through."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from spoilt import KINDS, NORM, manifest

from agent.errors import UserError
from agent.store.weights import Anchor, Parameters, export, preflight


@pytest.fixture
def anchor(make_model: Callable[..., Path]) -> Anchor:
    return Anchor.open(make_model())


@pytest.fixture
def sound(anchor: Anchor, tmp_path: Path) -> Path:
    parameters = Parameters.zeros(anchor)
    for delta in parameters.delta.values():
        delta += np.float32(0.5)
    return export(parameters, tmp_path / "weights")


def test_the_sound_one_is_let_through(anchor: Anchor, sound: Path) -> None:
    preflight(sound, anchor)
    preflight(export(Parameters.zeros(anchor), sound.parent), anchor)


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoiled_one_is_refused(anchor: Anchor, sound: Path, kind: str) -> None:
    spoil, message = KINDS[kind]
    spoil(sound)
    left = [folder for folder in sound.parent.iterdir() if folder.name != "elsewhere"]
    with pytest.raises(UserError, match=message) as error:
        preflight(left[0] if left else sound, anchor)
    assert "\n" not in str(error.value)


def test_everything_wrong_is_said_at_once(anchor: Anchor, sound: Path) -> None:
    for kind in ("a pickle beside", "auto_map", "another tokenizer", "missing tensor"):
        KINDS[kind][0](sound)
    KINDS["extra tensor"][0](sound)
    manifest(sound, anchor="f" * 64)
    with pytest.raises(UserError) as error:
        preflight(sound, anchor)
    for said in (
        "pytorch_model.bin may not be there",
        "config.json has auto_map",
        "tokenizer.json differs from the anchor's",
        f"tensor {NORM} is missing",
        "tensor model.x is not the anchor's",
        "names anchor",
    ):
        assert said in str(error.value)


def test_weights_of_another_anchor_are_refused(
    anchor: Anchor, sound: Path, make_model: Callable[..., Path]
) -> None:
    other = Anchor.open(make_model("other", config={"rope_theta": 1.0}))
    assert other.digest == anchor.digest
    with pytest.raises(UserError, match=r"config\.json differs from the anchor's"):
        preflight(sound, other)
