"""Answers of a known shape: `--schema` as a JSON Schema, what it says of a column, and whether a text keeps it.

The short form "name, age int, mood happy|sad, tags list" stands for an object of those fields, all required:

    name                a string; the type may be left out
    age int             str, int, float or bool (also by JSON Schema's names)
    mood happy|sad      one of these strings
    tags list           any number of strings; list[int], list[happy|sad]: of those
    year? int           an int, or null
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from mmcli.core.errors import ConfigError, RowError

if TYPE_CHECKING:
    import pyarrow as pa

# What the short form calls the types of JSON Schema.
TYPES = {
    "str": "string", "string": "string", "int": "integer", "integer": "integer",
    "float": "number", "number": "number", "bool": "boolean", "boolean": "boolean",
}  # fmt: skip
JSON_TYPES = ("string", "integer", "number", "boolean", "object", "array", "null")
FIELD = re.compile(r"(?P<name>[^\W\d][\w-]*)(?P<optional>\?)?(?:\s*:\s*|\s+|$)(?P<type>.*)", re.DOTALL)
LIST = re.compile(r"list\s*(?:\[(?P<item>.*)\])?", re.DOTALL)
FORMS = 'give a JSON Schema as FILE.json, or fields as "name, age int, mood happy|sad, tags list"'
# Keywords that say nothing about a value, beside those that jsonschema validates.
ANNOTATIONS = {
    "$schema", "$id", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "$recursiveRef", "$comment", "$defs",
    "$vocabulary", "definitions", "title", "description", "default", "examples", "deprecated", "readOnly",
    "writeOnly", "contentEncoding", "contentMediaType", "contentSchema", "then", "else", "additionalItems",
    "dependencies", "minContains", "maxContains", "id",
}  # fmt: skip
INT64 = 2**63


def parse_schema(text: str) -> dict[str, Any]:
    """A file with a JSON Schema, a JSON Schema itself, or the short form -> the schema; see the module.

    Raises ConfigError with every problem.
    """
    text = text.strip()
    if text.startswith("{"):
        return _checked(text, "--schema")
    lower = text.lower()
    if lower.endswith((".json", ".jsonschema")) or (re.search(r"[/.]", text) and os.path.isfile(text)):
        return _checked(_read(text), text)
    return _short(text)


def canonical(schema: dict[str, Any]) -> str:
    """The schema as one JSON text, in its own order: answers have their fields in that order."""
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def arrow_type(schema: dict[str, Any]) -> pa.DataType | None:
    """The Arrow type whose values are the schema's, or None where no type fits exactly.

    string, and enumerations of strings: string; integer: int64; number: float64; boolean: bool; arrays: list;
    objects without other fields than theirs, all required: struct. With "null" beside the type, a null.
    """
    import pyarrow as pa

    if set(schema) & {"$ref", "$dynamicRef", "anyOf", "oneOf", "allOf", "not", "if", "patternProperties"}:
        return None
    options = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if options is not None:
        return pa.string() if str in map(type, options) and set(map(type, options)) <= {str, type(None)} else None
    kind = _kind(schema)
    if kind == "array":
        items = schema.get("items")
        item = arrow_type(items) if isinstance(items, dict) and "prefixItems" not in schema else None
        return pa.list_(item) if item is not None else None
    if kind == "object":
        fields = schema.get("properties", {})
        closed = schema.get("additionalProperties") is False and set(fields) == set(schema.get("required", ()))
        if not fields or not closed:
            return None
        types = {name: arrow_type(field) if isinstance(field, dict) else None for name, field in fields.items()}
        return pa.struct(list(types.items())) if None not in types.values() else None
    scalars = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}
    return scalars.get(kind)


def validate(text: str, schema: dict[str, Any], *, cut: bool = False) -> Any:
    """A text that a model has written -> its JSON value, as the schema wants it (a float for a number, ...).

    `cut`: the text ended at --max-new-tokens; the message says so. Raises RowError("invalid_output") for a text
    that is not JSON (RFC 8259; neither NaN nor half a surrogate pair), has a name twice in an object, has an
    integer beyond 64 bits, or that the schema does not allow.
    """
    from jsonschema.exceptions import best_match

    try:
        value = _parse(text)
    except ValueError as error:
        what = "was cut at --max-new-tokens: give more" if cut else f"is no JSON: {error}"
        raise RowError("invalid_output", f"the answer {what}; it is {_shown(text)}", stage="post") from error
    try:
        wrong = best_match(_validator(schema).iter_errors(value))
        if wrong is None:
            return _typed(value, schema)
        problem = f"{wrong.json_path}: {wrong.message}"
    except RecursionError:
        problem = "it is nested too deeply"
    raise RowError("invalid_output", f"the answer does not keep to the schema: {problem}", stage="post")


# The short form -------------------------------------------------------------------------------------------------


def _short(text: str) -> dict[str, Any]:
    problems: list[str] = []
    fields: dict[str, Any] = {}
    for part in re.split(r",(?![^\[]*\])", text):
        found = FIELD.fullmatch(part.strip())
        if found is None:
            shown = f"{part.strip()!r} is no field" if part.strip() else "a field is empty"
            problems.append(f"--schema: {shown}; {_forms(text)}")
        elif (name := found["name"]) in fields:
            problems.append(f"--schema: the field {name!r} is there twice")
        else:
            field = _field(name, found["type"].strip(), problems)
            fields[name] = _or_null(field) if found["optional"] else field
    if problems:
        raise ConfigError(problems)
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def _forms(text: str) -> str:
    return f"no file has that name; {FORMS}" if re.search(r"[/.]", text) else FORMS


def _field(name: str, kind: str, problems: list[str]) -> dict[str, Any]:
    if listed := LIST.fullmatch(kind):
        return {"type": "array", "items": _field(name, (listed["item"] or "").strip(), problems)}
    if "|" in kind:
        options = [option.strip() for option in kind.split("|")]
        if not all(options) or len(set(options)) < len(options):
            problems.append(f"--schema: {name} {kind!r}: a value of an enumeration is empty or there twice")
        return {"type": "string", "enum": options}
    if kind and kind not in TYPES:
        close = get_close_matches(kind.lower(), [*TYPES, "list"], 1)
        known = f"did you mean {close[0]}? Known are" if close else "known are"
        problems.append(
            f"--schema: {name} has the unknown type {kind!r}; {known} str, int, float, bool, list, list[int] and "
            "enumerations as happy|sad"
        )
    return {"type": TYPES.get(kind, "string")}


def _or_null(field: dict[str, Any]) -> dict[str, Any]:
    if "enum" in field:
        return {"enum": [*field["enum"], None]}
    return {**field, "type": [field["type"], "null"]}


# JSON Schema ----------------------------------------------------------------------------------------------------


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise ConfigError(f"--schema {path}: no such file; {FORMS}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is no UTF-8 text: {error}"
        raise ConfigError(f"--schema {path}: cannot be read: {reason}") from error


def _checked(text: str, where: str) -> dict[str, Any]:
    try:
        schema = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: no JSON: {error}; {FORMS}") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"{where}: a JSON Schema is an object, this is {_shown(schema)}; {FORMS}")
    try:
        problems = _schema_problems(schema)
    except RecursionError:
        problems = ["it is nested too deeply, or refers to itself without end"]
    if problems:
        raise ConfigError([f"{where}: {problem}" for problem in problems])
    return schema


def _schema_problems(schema: dict[str, Any]) -> list[str]:
    """All that is wrong with a JSON Schema."""
    kind = type(_validator(schema))
    problems = [_metaschema_problem(error) for error in kind(kind.META_SCHEMA).iter_errors(schema)]
    if problems:
        return problems
    known = {*kind.VALIDATORS, *ANNOTATIONS}
    if not known & set(schema):
        names = ", ".join(map(repr, schema)) or "nothing at all"
        return [f"no JSON Schema: it has {names} and no keyword such as 'type' and 'properties'"]
    for part in subschemas(schema):
        problems += _part_problems(part, schema, known)
    if not problems:
        # Raises RecursionError for a schema that is its own condition, such as {"$ref": "#"}.
        _validator(schema).is_valid(None)
    return problems


def _metaschema_problem(error: Any) -> str:
    close = (
        get_close_matches(str(TYPES.get(error.instance, error.instance)), JSON_TYPES, 1) if _is_type(error) else []
    )
    guess = f"; did you mean {close[0]!r}?" if close else ""
    return f"no JSON Schema: {error.json_path}: {error.message}{guess}"


def _is_type(error: Any) -> bool:
    return isinstance(error.instance, str) and list(error.absolute_path)[-1:] == ["type"]


def _part_problems(part: dict[str, Any], root: dict[str, Any], known: set[str]) -> list[str]:
    from referencing.exceptions import Unresolvable

    problems = []
    for name in part:
        if name not in known and (close := get_close_matches(name, known, 1, 0.8)):
            problems.append(f"unknown keyword {name!r}; did you mean {close[0]!r}?")
    for pattern in [*filter(None, [part.get("pattern")]), *part.get("patternProperties", ())]:
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"the pattern {pattern!r} is no regular expression of Python: {error}")
    if isinstance(ref := part.get("$ref"), str):
        try:
            _registry(root).resolver("").lookup(ref)
        except Unresolvable:
            problems.append(
                f"$ref {ref!r} leads nowhere; only places of the schema itself (#/$defs/name) are looked up"
            )
    return problems


def subschemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema and all schemas within it, each once, itself first."""
    from referencing import Resource
    from referencing.jsonschema import DRAFT202012

    waiting = [Resource.from_contents(schema, default_specification=DRAFT202012)]
    while waiting:
        part = waiting.pop()
        if isinstance(part.contents, dict):
            yield part.contents
            waiting += part.subresources()


def _registry(schema: dict[str, Any]) -> Any:
    """Knows the schema alone. Without one, jsonschema would fetch what a $ref names from the network."""
    from referencing import Registry, Resource
    from referencing.jsonschema import DRAFT202012

    return Registry().with_resource("", Resource.from_contents(schema, default_specification=DRAFT202012))


def _validator(schema: dict[str, Any]) -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for
    from referencing import Registry

    kind = validator_for(schema, default=Draft202012Validator)
    return kind(schema, registry=Registry())


# Answers --------------------------------------------------------------------------------------------------------


def _parse(text: str) -> Any:
    """Raises ValueError."""
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_float, parse_int=_int64
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it has half a surrogate pair") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} is there twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _int64(text: str) -> int:
    # The length first: Python refuses to read integers of over 4300 digits, with a message of its own.
    if len(text) > 20 or not -INT64 <= int(text) < INT64:
        raise ValueError(f"the integer {text[:40]} does not fit into 64 bits")
    return int(text)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return repr(text if len(text) <= 80 else text[:79] + "…")


def _kind(schema: dict[str, Any]) -> str:
    """The type that is not null; "" where there is not one such type."""
    kind = schema.get("type")
    kinds = [k for k in kind if k != "null"] if isinstance(kind, list) else [kind]
    return kinds[0] if len(kinds) == 1 and isinstance(kinds[0], str) else ""


def _typed(value: Any, schema: Any) -> Any:
    """JSON has one kind of number: 3 as 3.0 for a number, 3.0 as 3 for an integer, as the column holds them."""
    kind = _kind(schema) if isinstance(schema, dict) else ""
    if kind == "number" and type(value) is int:
        return float(value)
    if kind == "integer" and type(value) is float:
        if not -INT64 <= value < INT64:
            raise RowError("invalid_output", f"the integer {value} does not fit into 64 bits", stage="post")
        return int(value)
    if kind == "array" and isinstance(value, list):
        return [_typed(item, schema.get("items")) for item in value]
    if kind == "object" and isinstance(value, dict):
        fields = schema.get("properties", {})
        return {name: _typed(item, fields.get(name)) for name, item in value.items()}
    return value
