"""JSON Lines manifests (.jsonl, .ndjson, also gzipped): one object a line.

Blank lines are no rows: they count neither in `name#row` nor in the output. Any other line is a row; one that
is not a JSON object is an error row (bad_row). A key that a row lacks is null. NaN counts as null.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from mmcli.core.errors import ConfigError, RowError
from mmcli.sources import rows
from mmcli.sources.columns import Column, Selection
from mmcli.sources.lines import open_binary
from mmcli.sources.manifest import Block, bad_row
from mmcli.sources.names import shown

# How much is read to learn the columns before a run: a misspelt name is found then.
SAMPLE_ROWS, SAMPLE_BYTES = 1000, 4 * 1024 * 1024
# Of lines that are looked at together; more of them where one is longer.
CHUNK_BYTES = 256 * 1024
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
        for numbers, lines in self._chunks():
            yield from zip(numbers, lines, strict=True)

    def _chunks(self) -> Iterator[tuple[Sequence[int], list[bytes]]]:
        """Lines that are not blank, some at a time, with their numbers from 1 on."""
        number = 1
        with open_binary(self.path, self.name) as file:
            while read := file.readlines(CHUNK_BYTES):
                if number == 1:
                    read[0] = read[0].removeprefix(_BOM)
                numbers: Sequence[int] = range(number, number + len(read))
                lines = list(map(bytes.strip, read))
                if not all(lines):
                    numbers = [n for n, line in zip(numbers, lines, strict=True) if line]
                    lines = list(filter(None, lines))
                yield numbers, lines
                number += len(read)

    def count(self) -> int:
        """Rows: lines that are not blank."""
        return sum(len(lines) for _, lines in self._chunks())

    def holds_paths(self, selection: Selection) -> bool:
        """Whether any row may refer to a file."""
        return any(m.kind == "path" for m in selection.media)

    def blocks(self, selection: Selection, start: int = 0) -> Iterator[Block]:
        """Rows from `start` on; lines before it are read but not parsed."""
        return rows.blocks(self._getters(start), selection, 0)

    def _getters(self, start: int) -> Iterator[rows.Getter | RowError]:
        row = 0
        for numbers, lines in self._chunks():
            skip = max(0, start - row)
            row += len(lines)
            if skip < len(lines):
                yield from _parsed(numbers[skip:], lines[skip:])


def _parsed(numbers: Sequence[int], lines: list[bytes]) -> list[rows.Getter | RowError]:
    """Each line; together, where nothing is special about any: a third of the time."""
    if _HUGE_INTEGER not in b" ".join(lines).translate(_DIGITS):
        try:
            found = list(map(orjson.loads, lines))
        except (ValueError, RecursionError):
            found = []
        if {type(row) for row in found} == {dict}:
            return [row.get for row in found]
    parsed = map(parse, lines, numbers)
    return [row if isinstance(row, RowError) else row.get for row in parsed]


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
