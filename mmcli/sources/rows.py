"""Blocks from formats that are read row by row."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from mmcli.core.errors import RowError
from mmcli.sources.columns import Selection
from mmcli.sources.lines import BLOCK_ROWS, CONVERTERS, variable
from mmcli.sources.manifest import Block, bad_row

# The value of a row's column by name, None when it has none.
Getter = Callable[[str], Any]


def blocks(rows: Iterable[Getter | RowError], selection: Selection, start: int) -> Iterator[Block]:
    """`rows` from `start` on as blocks; an error is a row too."""
    wanted = islice(rows, start, None)
    while chunk := list(islice(wanted, BLOCK_ROWS)):
        yield _block(chunk, selection)


def _block(rows: list[Getter | RowError], selection: Selection) -> Block:
    errors: dict[int, RowError] = {}
    media: list[Sequence[Any]] = []
    keep: list[Sequence[Any]] = []
    for column in selection.media:
        media.append(_column(rows, column.name, _path if column.kind == "path" else _string, errors))
    for kept in selection.keep:
        keep.append(_column(rows, kept.name, CONVERTERS[kept.convert or "string"], errors))
    variables: list[Sequence[Any]] = [_column(rows, name, variable, errors) for name in selection.variables]
    ids = _column(rows, selection.id, _id, errors) if selection.id else None
    errors.update((i, row) for i, row in enumerate(rows) if isinstance(row, RowError))
    return Block(len(rows), media, ids, keep, errors, variables)


def _column(
    rows: list[Getter | RowError], name: str, convert: Callable[[Any], Any], errors: dict[int, RowError]
) -> list[Any]:
    """One column's cells. Those that `convert` refuses (ValueError) are None and their rows errors."""
    cells: list[Any]
    if convert is _string:
        cells = [None if isinstance(row, RowError) else row(name) for row in rows]
        if {type(cell) for cell in cells} == {str}:
            # A third of the time of the loop below.
            return cells
    cells = []
    for i, row in enumerate(rows):
        value = cell = None
        if not isinstance(row, RowError):
            try:
                value = row(name)
                cell = convert(value)
            except UnicodeError:
                errors.setdefault(i, bad_row(f"column {name!r} is not UTF-8"))
            except (ValueError, TypeError, OverflowError) as failure:
                errors.setdefault(i, bad_row(f"column {name!r}: {str(value)[:80]!r} is not {failure}"))
        cells.append(cell)
    return cells


def _string(value: Any) -> str | None:
    # NaN is how pandas writes that there is none.
    if value is None or value != value:
        return None
    if not isinstance(value, str):
        raise ValueError(f"a string but {kind_of(value)}")
    return value


def _path(value: Any) -> str | None:
    path = _string(value)
    if path is not None and not path.isascii():
        # Bytes that are not UTF-8 are as os.fsdecode gives them; other lone surrogates are no file's name.
        os.fsencode(path)
    return path


def _id(value: Any) -> str | int | None:
    return value if type(value) is int else _path(value)


def kind_of(value: Any) -> str:
    """The JSON type of a value, in words."""
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")
