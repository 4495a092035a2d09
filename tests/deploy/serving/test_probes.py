"""Recorded answers: what was kept comes back, and only equal behaviour passes."""

import json
from pathlib import Path

import httpx
import pytest

from agent.errors import UserError
from agent.home import Home
from deploy.serving.control import ControlError, EngineControl
from deploy.serving.intact import (
    TOLERANCE,
    Probes,
    difference,
    read_probes,
    require_equal,
    write_probes,
)

PROMPTS = [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]
TABLE = [[{5: -0.1, 7: -2.5}, {1: -0.5, 2: -1.0}], [{5: -0.2, 9: -2.0}, {3: -0.3, 4: -1.5}]]


def test_what_was_kept_is_read(tmp_path: Path) -> None:
    home = Home.at(tmp_path)
    probes = Probes.of(PROMPTS, TABLE)
    write_probes(home, "a" * 64, probes)
    assert read_probes(home, "a" * 64) == probes
    assert (probes.k, probes.positions) == (2, 2)
    with pytest.raises(UserError, match="bbbbbbbbbbbb"):
        read_probes(home, "b" * 64)


@pytest.mark.parametrize("shift", [0.0, 1e-4, 5e-3])
def test_the_largest_difference_is_found_wherever_it_is(shift: float) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        table = [[dict(place) for place in row] for row in TABLE]
        table[1][1][4] += shift
        rows = [table[number] for (number,) in json.loads(request.content)["prompt"]]
        choices = [
            {
                "index": i,
                "logprobs": {
                    "top_logprobs": [{f"token_id:{k}": v for k, v in p.items()} for p in row]
                },
            }
            for i, row in enumerate(rows)
        ]
        return httpx.Response(200, json={"choices": choices})

    with EngineControl(httpx.MockTransport(answer)) as engine:
        found = difference(engine, "m", [[0], [1]], Probes.of(PROMPTS, TABLE))
    assert found == pytest.approx(shift)
    if shift <= TOLERANCE:
        require_equal(found, "a" * 64)
    else:
        with pytest.raises(ControlError, match=r"0\.005"):
            require_equal(found, "a" * 64)


@pytest.mark.parametrize(("wrong", "passes"), [(0.0, True), (5e-3, False)])
def test_log_p_that_changes_with_its_batch_is_compared_prompt_by_prompt(
    wrong: float, passes: bool
) -> None:
    """In bfloat16 a batch moved SmolLM2's by 0.13 nats; a wrong tensor is told apart anyway."""
    salts = set[str]()

    def answer(request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        salts.add(asked["cache_salt"])
        batch = 0.13 if len(asked["prompt"]) > 1 else 0.0
        choices = []
        for index, (number,) in enumerate(asked["prompt"]):
            rows = [{f"token_id:{k}": v + batch for k, v in p.items()} for p in TABLE[number]]
            rows[0] = {k: v + wrong * (number == 1) for k, v in rows[0].items()}
            choices.append({"index": index, "logprobs": {"top_logprobs": rows}})
        return httpx.Response(200, json={"choices": choices})

    with EngineControl(httpx.MockTransport(answer)) as engine:
        found = difference(engine, "m", [[0], [1]], Probes.of(PROMPTS, TABLE))
    assert found == pytest.approx(wrong)
    assert (found <= TOLERANCE) is passes
    assert len(salts) == 3  # one for both together, and one for each alone


def test_an_undefined_difference_does_not_pass() -> None:
    for undefined in (float("nan"), float("inf")):
        with pytest.raises(ControlError):
            require_equal(undefined, "a" * 64)
