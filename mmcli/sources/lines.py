"""What the text formats (JSONL, CSV) share: opening, gzip, and the conversion of passthrough values."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

import orjson

from mmcli.core.errors import ConfigError
from mmcli.sources.names import shown

# Rows of a Block.
BLOCK_ROWS = 1024
_GZIP = b"\x1f\x8b"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@contextmanager
def open_binary(path: str, name: str) -> Iterator[IO[bytes]]:
    """The (decompressed) bytes of a text manifest.

    Failures while it is read become ConfigError: a gzip file that ends too early would silently lose rows.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4)
            file.seek(0)
            if head.startswith(_UTF16):
                raise ConfigError(f"{shown(name)} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
            if head.startswith(_GZIP):
                with gzip.open(file, "rb") as unpacked:
                    yield cast("IO[bytes]", unpacked)
            else:
                yield file
    except EOFError as failure:
        raise ConfigError(f"{shown(name)} is truncated: the gzip data ends too early") from failure
    except (zlib.error, gzip.BadGzipFile) as failure:
        raise ConfigError(f"{shown(name)} is corrupt: {failure}") from failure
    except OSError as failure:
        raise ConfigError(f"cannot read {shown(name)}: {failure.strerror or failure}") from failure


def json_text(value: Any) -> str:
    """A value as JSON in one line. Raises UnicodeError for lone surrogates."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        # Integers over 64 bits, or lone surrogates.
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        text.encode()
        return text


def _is_null(value: Any) -> bool:
    return value is None or value != value


def _to_string(value: Any) -> str | None:
    if isinstance(value, str):
        value.encode()
        return value
    return _to_json(value)


def _to_json(value: Any) -> str | None:
    return None if _is_null(value) else json_text(value)


def _to_int(value: Any) -> int | None:
    if value == "" or _is_null(value):
        return None
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = int(value)
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise ValueError("a 64-bit integer")
    return value


def _to_float(value: Any) -> float | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        raise ValueError("a number")
    try:
        return float(value)
    except (ValueError, TypeError) as failure:
        raise ValueError("a number") from failure


def _to_bool(value: Any) -> bool | None:
    if value == "" or _is_null(value):
        return None
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and (known := _BOOLS.get(value.strip().lower())) is not None:
        return known
    raise ValueError("true or false")


_NUMBER = re.compile(r"\s*[+-]?[0-9]{1,20}\s*")
_BOOLS = {"true": True, "1": True, "false": False, "0": False}


# `--keep name:type`. Each raises ValueError, saying what is wanted, for a value that is not of the type.
CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "string": _to_string,
    "json": _to_json,
    "int": _to_int,
    "float": _to_float,
    "bool": _to_bool,
}


def variable(value: Any) -> Any:
    """A cell as a prompt or a model gets it (see Record.variables). Raises UnicodeError for what is not UTF-8."""
    if isinstance(value, str):
        value.encode()
        return value
    if isinstance(value, list):
        return _numbers(value)
    if isinstance(value, dict):
        return json_text(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return None if _is_null(value) else value


def _numbers(value: list[Any]) -> Any:
    """float32 [...] of numbers, nested evenly; else the list."""
    import numpy as np

    try:
        array = np.asarray(value)
    except ValueError:
        return value
    return array.astype(np.float32) if array.dtype.kind in "iuf" and array.size else value
