"""JSON Lines manifests (.jsonl, .ndjson, also gzipped): one object a line.

Blank lines are no rows: they count neither in `name#row` nor in the output. Any other line is a row; one that
is not a JSON object is an error row (bad_row). A key that a row lacks is null. NaN counts as null.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

import orjson

from mmcli.core.errors import ConfigError, RowError
from mmcli.sources import rows
from mmcli.sources.columns import Column, Selection
from mmcli.sources.lines import open_binary
from mmcli.sources.manifest import Block, bad_row
from mmcli.sources.names import shown

# How much is read to learn the columns before a run: a misspelt name is found then.
SAMPLE_ROWS, SAMPLE_BYTES = 1000, 4 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"
# orjson reads integers over 64 bits as floats. To look for 19 zeros, all digits made zeros, takes a third of the
# time of an expression.
_DIGITS, _HUGE_INTEGER = bytes.maketrans(b"123456789", b"000000000"), b"0" * 19


class JsonlManifest:
    """A JSON Lines file; its columns are the keys of the first 1,000 rows (4 MiB). Raises ConfigError."""

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name = path, name
        types: dict[str, list[str]] = {}
        count = size = 0
        for number, line in self._lines():
            if not count and line.startswith(b"["):
                raise ConfigError(f"{shown(name)} is a JSON array; make it lines: jq -c '.[]' {shown(name)}")
            count, size = count + 1, size + len(line)
            if not isinstance(row := parse(line, number), RowError):
                for key, value in row.items():
                    _add_type(types.setdefault(key, []), value)
            if count >= SAMPLE_ROWS or size >= SAMPLE_BYTES:
                break
        self.empty = not types
        self.columns = [_column(key, seen) for key, seen in types.items()]

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with open_binary(self.path, self.name) as file:
            yield from _numbered(file)

    def count(self) -> int:
        """Rows: lines that are not blank."""
        return sum(1 for _ in self._lines())

    def holds_paths(self, selection: Selection) -> bool:
        """Whether any row may refer to a file."""
        return any(m.kind == "path" for m in selection.media)

    def blocks(self, selection: Selection, start: int = 0) -> Iterator[Block]:
        """Rows from `start` on; lines before it are read but not parsed."""
        return rows.blocks(self._getters(start), selection, 0)

    def _getters(self, start: int) -> Iterator[rows.Getter | RowError]:
        for row, (number, line) in enumerate(self._lines()):
            if row >= start:
                parsed = parse(line, number)
                yield parsed if isinstance(parsed, RowError) else parsed.get


def _numbered(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of every line that is not blank."""
    for number, line in enumerate(file, 1):
        stripped = (line.removeprefix(_BOM) if number == 1 else line).strip()
        if stripped:
            yield number, stripped


def parse(line: bytes, number: int) -> dict[str, Any] | RowError:
    """The object of a line, or why there is none."""
    try:
        row = json.loads(line) if _HUGE_INTEGER in line.translate(_DIGITS) else orjson.loads(line)
    except ValueError:
        # Python's own writers give NaN and lone surrogates, which orjson refuses.
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as failure:
            return bad_row(f"line {number} is not JSON: {failure}")
    except RecursionError:
        return bad_row(f"line {number} is nested too deeply")
    if not isinstance(row, dict):
        return bad_row(f"line {number} holds {rows.kind_of(row)}, not an object")
    return row


def _add_type(seen: list[str], value: Any) -> None:
    kind = "null" if value is None or value != value else rows.kind_of(value)
    if kind not in seen:
        seen.append(kind)


def _column(name: str, seen: list[str]) -> Column:
    known = [kind for kind in seen if kind != "null"]
    if "string" in known:
        return Column(name, " or ".join(known), "string")
    return Column(name, " or ".join(known) or "null", "other" if known else "any")
