"""CSV and TSV manifests (also gzipped): the first line names the columns.

As Python's csv module reads them: quoted cells may hold separators and newlines. Blank lines are no rows. A row
with more or fewer cells than the header is an error row (bad_row). Bytes that are not UTF-8 are kept in a path
and are an error in any other cell that is used.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from functools import partial
from typing import Any

from mmcli.core.errors import ConfigError, RowError
from mmcli.sources import rows
from mmcli.sources.columns import Column, Selection
from mmcli.sources.lines import open_binary
from mmcli.sources.manifest import Block, bad_row
from mmcli.sources.names import shown

# The default of 128 KiB is too small for a long text; without any limit, one stray quote takes the memory.
FIELD_LIMIT = 256 * 1024 * 1024


class CsvManifest:
    """A file with a header. Raises ConfigError when it has none, or names a column twice."""

    delimiter = ","
    empty = False

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name = path, name
        header = next(self._rows(), None)
        if isinstance(header, RowError):
            raise ConfigError(f"{shown(name)}: the header cannot be read: {header.message}")
        if header is None:
            raise ConfigError(f"{shown(name)} is empty; its first line must name the columns")
        twice = sorted({shown(h) for h in header if header.count(h) > 1})
        if twice:
            raise ConfigError(f"{shown(name)} has more than one column named {', '.join(map(repr, twice))}")
        self._index = {name: i for i, name in enumerate(header)}
        self.columns = [Column(h, "string", "string") for h in header]

    def count(self) -> int:
        """Rows after the header."""
        return sum(1 for _ in self._rows()) - 1

    def holds_paths(self, selection: Selection) -> bool:
        """Whether any row may refer to a file."""
        return any(m.kind == "path" for m in selection.media)

    def blocks(self, selection: Selection, start: int = 0) -> Iterator[Block]:
        """Rows from `start` on."""
        return rows.blocks(self._getters(), selection, start)

    def _getters(self) -> Iterator[rows.Getter | RowError]:
        found = self._rows()
        next(found, None)
        width = len(self._index)
        for number, cells in enumerate(found):
            if isinstance(cells, RowError):
                yield cells
            elif len(cells) != width:
                yield bad_row(f"row {number} has {len(cells)} cells, the header {width}")
            else:
                yield partial(self._cell, cells)

    def _cell(self, cells: list[str], name: str) -> Any:
        return cells[self._index[name]]

    def _rows(self) -> Iterator[list[str] | RowError]:
        """Every row, the header too; one that cannot be read is an error."""
        csv.field_size_limit(FIELD_LIMIT)
        with open_binary(self.path, self.name) as file:
            text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
            lines = _Lines(text)
            reader = csv.reader(lines, delimiter=self.delimiter)
            while True:
                try:
                    cells = next(reader, None)
                except csv.Error as failure:
                    yield bad_row(f"line {reader.line_num}: {failure}")
                    continue
                if cells is None:
                    return
                if lines.exhausted:
                    # The reader asks for another line within a row only when a quote is open.
                    yield bad_row(f"line {reader.line_num}: a quote was opened and never closed")
                elif cells:
                    yield cells


class TsvManifest(CsvManifest):
    """The same, separated by tabs."""

    delimiter = "\t"


class _Lines:
    """The lines of a text, and whether someone has asked for one past the end."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.exhausted = False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._text.readline()
        if not line:
            self.exhausted = True
            raise StopIteration
        return line
