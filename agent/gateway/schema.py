"""JSON schemas that clients send: bounded, and such that a finite value can satisfy them.

The engine turns a schema into a grammar. What is refused here are the schemas for which that fails
after the request was accepted, takes seconds of a core, or never ends (tried with xgrammar 0.2.8
and llguidance 1.7.6): the client would get a server error for its own mistake.
"""

import re
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

MAX_SUBSCHEMAS = 1000
MAX_PROPERTIES = 500  # of all objects; 2,000 take 3.5 s of a core
MAX_ITEMS = 10_000  # minItems, maxItems and their like: one rule of the grammar each
MAX_LENGTH = 1_000_000  # minLength, maxLength
MAX_REPEAT = 128  # of a pattern's {m,n}: above it the grammar of a character class is not built
MAX_REPEATS = 1000  # of all {m,n} of a pattern together
MAX_PATTERN = 1000  # characters
MAX_PASSES = 64  # of the search for schemas that require themselves, over all of them

ONE = (
    "additionalItems", "additionalProperties", "contains", "else", "if", "items", "not",
    "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
MAPS = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
ITEM_COUNTS = (
    "maxContains", "maxItems", "maxProperties", "minContains", "minItems", "minProperties",
)  # fmt: skip
LENGTHS = ("maxLength", "minLength")
NOT_SUPPORTED = ("$anchor", "$dynamicRef", "$recursiveRef")
PATTERN_TOKEN = re.compile(
    r"\\(?P<escape>.)|\[(?:\\.|[^\]\\])*\]|(?P<group>\(\?(?:[=!]|<[=!]))"
    r"|\{(?P<low>\d+)(?:,(?P<high>\d*))?\}",
    re.DOTALL,
)


class SchemaError(ValueError):
    """A schema that is refused; the message says where and why."""


def check_schema(schema: Schema) -> None:
    """Refuse a schema that the engine cannot follow.

    Raises:
        SchemaError: The first mismatch, or that no finite value satisfies a part of it.
    """
    reached = list(_subschemas(schema))
    properties = 0
    for subschema in reached:
        properties += len(_map(subschema, "properties"))
        _check_counts(subschema)
        for pattern in (subschema.get("pattern"), *_map(subschema, "patternProperties")):
            if isinstance(pattern, str):
                _check_pattern(pattern)
    if properties > MAX_PROPERTIES:
        raise SchemaError(f"{properties} properties; allowed: at most {MAX_PROPERTIES}")
    _check_satisfiable(schema, reached)


def _subschemas(root: Schema) -> Iterator[Schema]:
    """The root and every schema below it or behind a ``$ref``, each once; no recursion."""
    seen, stack = {id(root)}, [root]
    while stack:
        schema = stack.pop()
        yield schema
        for below in _below(root, schema):
            if isinstance(below, dict) and id(below) not in seen:
                seen.add(id(below))
                stack.append(below)
        if len(seen) > MAX_SUBSCHEMAS:
            raise SchemaError(f"more than {MAX_SUBSCHEMAS} schemas within one")


def _below(root: Schema, schema: Schema) -> Iterator[Any]:
    for name in NOT_SUPPORTED:
        if name in schema:
            raise SchemaError(f"{name} is not supported; allowed: $ref to '#' or '#/a/path'")
    if "$ref" in schema:
        yield _target(root, schema["$ref"])
    yield from (schema[name] for name in ONE if name in schema)
    for name in LISTS:
        yield from schema[name] if isinstance(schema.get(name), list) else ()
    for name in MAPS:
        yield from _map(schema, name).values()


def _target(root: Schema, reference: object) -> Any:
    """What a ``$ref`` points at: a JSON pointer (RFC 6901) within the same schema."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise SchemaError(f"$ref {reference!r:.80}; allowed: '#' or '#/a/path' of the same schema")
    target: Any = root
    for step in reference.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(target, dict) and name in target:
            target = target[name]
        elif isinstance(target, list) and name.isdecimal() and int(name) < len(target):
            target = target[int(name)]
        else:
            raise SchemaError(f"$ref {reference!r:.80}: there is no {name!r:.80}")
    if not isinstance(target, dict | bool):
        raise SchemaError(f"$ref {reference!r:.80}: is no schema")
    return target


def _check_counts(schema: Schema) -> None:
    for names, most in ((ITEM_COUNTS, MAX_ITEMS), (LENGTHS, MAX_LENGTH)):
        for name in names:
            value = schema.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise SchemaError(f"{name}: {value!r:.80}; allowed: an integer from 0 to {most}")


def _check_pattern(pattern: str) -> None:
    """Refuse counts that are too large, and what no grammar has (look-around, back-references)."""
    if len(pattern) > MAX_PATTERN:
        raise SchemaError(f"pattern: {len(pattern)} characters; allowed: at most {MAX_PATTERN}")
    total = 0
    for token in PATTERN_TOKEN.finditer(pattern):
        escape = token["escape"] or "-"
        if token["group"] or escape in "123456789k":
            raise SchemaError(f"pattern {pattern!r:.80}: {token[0]} is not supported")
        if token["low"]:
            count = int((token["high"] or token["low"])[:9])
            total += count
            if count > MAX_REPEAT or total > MAX_REPEATS:
                allowed = f"at most {MAX_REPEAT} times, {MAX_REPEATS} in all"
                raise SchemaError(f"pattern {pattern!r:.80}: {token[0]:.40}; allowed: {allowed}")


def _check_satisfiable(root: Schema, reached: list[Schema]) -> None:
    """Refuse schemas that only an infinite value could satisfy, such as ``{"$ref": "#"}``.

    The smallest set S of schemas such that a schema is in S if all that it requires is in S: each
    pass adds those whose requirements were added before, so a schema that requires itself never is.
    The grammar of what is left out is empty, and the engine fails in the middle of an answer.
    """
    satisfiable: set[int] = set()
    rest = reached
    for _ in range(MAX_PASSES):
        # Each pass turns round: a chain of references in either order takes two.
        left = [schema for schema in reversed(rest) if not _finite(root, schema, satisfiable)]
        if not left:
            return
        if len(left) == len(rest):
            reference = next((each["$ref"] for each in left if "$ref" in each), None)
            where = f"$ref {reference!r:.80}" if reference else "a part of it"
            raise SchemaError(f"{where}: no finite value can satisfy it")
        rest = left
    raise SchemaError("$ref: too many schemas depend on each other")


def _finite(root: Schema, schema: Schema, satisfiable: set[int]) -> bool:
    """Whether what a schema requires is known to be satisfiable; if so it is added."""

    def known(other: Any) -> bool:
        return id(other) in satisfiable if isinstance(other, dict) else other is not False

    required = [_target(root, schema["$ref"])] if "$ref" in schema else []
    required += schema["allOf"] if isinstance(schema.get("allOf"), list) else []
    if schema.get("type") == "object" and isinstance(schema.get("required"), list):
        properties = _map(schema, "properties")
        required += [properties.get(name) for name in schema["required"] if isinstance(name, str)]
    if schema.get("type") == "array" and schema.get("minItems", 0) > 0:
        required += schema["prefixItems"] if isinstance(schema.get("prefixItems"), list) else []
        required.append(schema.get("items"))
    choices = [schema[name] for name in ("anyOf", "oneOf") if isinstance(schema.get(name), list)]
    if all(map(known, required)) and all(any(map(known, choice)) for choice in choices):
        satisfiable.add(id(schema))
        return True
    return False


def _map(schema: Schema, name: str) -> dict[str, Any]:
    value = schema.get(name)
    return value if isinstance(value, dict) else {}
