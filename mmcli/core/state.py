"""JSON that an earlier run has left, and what to say when it was damaged since."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmcli.core.errors import StateMismatch

# name -> what its value has to be, as JSON values are in Python; a mapping: an object with these names.
Shape = Mapping[str, "type | Shape"]

_WORDS: dict[type, str] = {
    dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number",
    bool: "true or false", type(None): "null",
}  # fmt: skip
JOB_SHAPE: Shape = {"task": str, "model": dict, "options": dict, "inputs": dict}


class DamagedState(StateMismatch):
    """What an earlier run has left was changed since, and makes no sense any more."""


def read_state(path: Path, shape: Shape, hint: str) -> dict[str, Any] | None:
    """The JSON object in a file; None when there is no file. `hint`: what to type when it is damaged.

    Raises DamagedState when it is no JSON, or not of that shape; OSError when it cannot be read.
    """
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        raise DamagedState(f"{path} is damaged: it is not JSON", hint=hint) from None
    return check_state(value, shape, str(path), hint)


def check_state(value: Any, shape: Shape, where: str, hint: str) -> dict[str, Any]:
    """`value`, when it is of that shape. Raises DamagedState, which says what of `where` is not."""
    if problem := _problem(value, shape, ""):
        raise DamagedState(f"{where} is damaged: {problem}", hint=hint)
    return value  # type: ignore[no-any-return]


def _problem(value: Any, wanted: type | Shape, name: str) -> str | None:
    kind = wanted if isinstance(wanted, type) else dict
    if type(value) is not kind and (kind, type(value)) != (float, int):
        return f"{name or 'it'} is {_WORDS[type(value)]}, not {_WORDS[kind]}"
    if isinstance(wanted, type):
        return None
    for key, inner in wanted.items():
        full = f"{name}.{key}" if name else key
        if key not in value:
            return f"{full} is missing"
        if problem := _problem(value[key], inner, full):
            return problem
    return None
