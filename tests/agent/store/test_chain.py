"""A changed column is named, whichever it is."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.store.database import Value, canonical, fault, seal

FIELDS: dict[str, Value] = {"text": "abc", "count": 3, "time": 1.5, "blob": b"xyz", "none": None}
TIP = "0" * 64


def changed(value: Value) -> Value:
    """The value with its lowest bit turned."""
    if isinstance(value, bytes):
        return bytes([value[0] ^ 1]) + value[1:]
    if isinstance(value, str):
        return chr(ord(value[0]) ^ 1) + value[1:]
    return 1 if value is None else math.nextafter(value, 9.0) if value == 1.5 else value + 1


@pytest.mark.parametrize("column", FIELDS)
def test_a_changed_field_is_named(column: str) -> None:
    row = seal(TIP, FIELDS)
    assert fault(TIP, row) is None
    assert fault(TIP, {**row, column: changed(row[column])}) == column


@pytest.mark.parametrize("column", ["prev_hash", "hash", "digests"])
def test_a_changed_link_is_named(column: str) -> None:
    row = seal(TIP, FIELDS)
    assert fault(TIP, {**row, column: changed(row[column])}) == column


@given(st.data())
def test_any_flipped_character_is_found(data: st.DataObject) -> None:
    row = seal(TIP, FIELDS)
    column = data.draw(st.sampled_from(["text", "digests", "hash", "prev_hash"]))
    text = str(row[column])
    place = data.draw(st.integers(0, len(text) - 1))
    bit = data.draw(st.integers(0, 6))
    bad = text[:place] + chr(ord(text[place]) ^ (1 << bit)) + text[place + 1 :]
    assert fault(TIP, {**row, column: bad}) == column


def test_a_row_rewritten_whole_breaks_the_next() -> None:
    first, second = seal(TIP, FIELDS), None
    second = seal(str(first["hash"]), FIELDS)
    forged = seal(TIP, {**FIELDS, "count": 4})
    assert fault(TIP, forged) is None
    assert fault(str(forged["hash"]), second) == "hash chain"


def test_canonical_is_one_spelling_and_undefined_is_null() -> None:
    assert canonical({"b": (1, 2.0), "a": math.nan}) == '{"a":null,"b":[1,2.0]}'
    assert canonical({"a": -math.inf, "b": [1, 2.0]}) == '{"a":null,"b":[1,2.0]}'


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_canonical_keeps_every_bit_of_a_float(value: float) -> None:
    assert json.loads(canonical(value)) == value
