"""Records from the rows of a manifest, whatever its format."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from mmcli.core.errors import ConfigError, RowError, StateMismatch
from mmcli.core.extensions import guess_modality
from mmcli.core.records import Media, Modality, Record
from mmcli.core.texts import TextRecords, rows_of
from mmcli.sources.columns import Column, MediaColumn, Selection
from mmcli.sources.names import is_url, shown
from mmcli.sources.paths import URLS_ARE_OFF
from mmcli.sources.snapshot import (
    NOT_A_FILE,
    ResolvedInputs,
    SnapshotWriter,
    add_counts,
    combine,
    file_identity,
    read_rows,
    stat_file,
)


@dataclass(slots=True)
class Block:
    """Consecutive rows of a manifest, by column.

    media   one list of cells for each medium of the selection; a cell is None when it is null, else
            str for a "path", bytes for "bytes", (bytes or None, path or None) for "struct", str or bytes for "text"
    ids     cells of the id column: str, int or None; None without an id column
    keep    one list for each passthrough column
    variables  one list for each column that prompts name: see Record.variables
    errors  rows (from 0 in the block) that could not be read; their cells are None
    """

    rows: int
    media: list[Sequence[Any]]
    ids: Sequence[Any] | None = None
    keep: list[Sequence[Any]] = field(default_factory=list)
    errors: dict[int, RowError] = field(default_factory=dict)
    variables: list[Sequence[Any]] = field(default_factory=list)


class Manifest(Protocol):
    """A format: opens the file when constructed with (path, name as given), raising ConfigError.

    columns  what its rows hold
    empty    it has no row and does not tell its columns
    """

    path: str
    name: str
    columns: list[Column]
    empty: bool

    def count(self) -> int:
        """Rows. Raises ConfigError when the file ends too early."""
        ...

    def holds_paths(self, selection: Selection) -> bool:
        """Whether any row may refer to a file."""
        ...

    def blocks(self, selection: Selection, start: int = 0) -> Iterator[Block]:
        """Rows from `start` on. A row that cannot be read is an error, never missing."""
        ...


class ManifestSource:
    """Records of a manifest's rows.

    Paths in it are relative to its folder. Ids are those of the id column, or `name#row`, name as given on
    the command line and row counted from 0. A null or empty media cell is an error row (bad_row); with `missing`
    only where the row has no other.
    """

    def __init__(self, manifest: Manifest, selection: Selection, missing: bool = False) -> None:
        self.manifest = manifest
        self._bears_missing = missing and len(selection.media) > 1
        self.selection = selection
        self.slots = selection.slots
        self.keep = pa.schema([pa.field(k.output, k.type) for k in selection.keep])
        self._prefix = _folder_prefix(manifest.path)
        self._label = shown(manifest.name)
        self._rows = 0
        self._identity: str | None = None
        self._stats: Path | None = None

    def snapshot(self, folder: Path) -> ResolvedInputs:
        """Count the rows and note size and time of every file that they name. Raises ConfigError."""
        self._identity = self._file_identity()
        described = repr((self.manifest.name, self.selection.media, self.selection.id))
        if self.manifest.holds_paths(self.selection):
            counts, digest, notes = self._list_files(folder)
            self._stats = folder
        else:
            self._rows, digest, self._stats, notes = self.manifest.count(), "", None, []
            counts = {m.modality: self._rows for m in self.selection.media} or {"text": self._rows}
        return ResolvedInputs(self._rows, combine([self._identity, described, digest]), counts, notes)

    def _file_identity(self) -> str:
        try:
            return file_identity(self.manifest.path)
        except OSError as failure:
            raise ConfigError(f"cannot read {self._label}: {failure.strerror}") from failure

    def _list_files(self, folder: Path) -> tuple[dict[Modality | None, int], str, list[str]]:
        """Stat every file that is named; returns counts by modality, the digest and notes."""
        media = self.selection.media
        only_media = Selection(media)
        names = [f"{what}_{i}" for i in range(len(media)) for what in ("size", "mtime_ns")]
        schema = pa.schema([(name, pa.int64()) for name in names])
        counts: Counter[Modality | None] = Counter()
        missing = 0
        with SnapshotWriter(folder, schema) as writer:
            for block in self.manifest.blocks(only_media):
                per_slot = [self._stat_cells(m, cells) for m, cells in zip(media, block.media, strict=True)]
                for row in zip(*per_slot, strict=True):
                    writer.add(tuple(chain.from_iterable(row)))
                for column, cells, stats in zip(media, block.media, per_slot, strict=True):
                    add_counts(counts, _modalities(column, cells))
                    missing += _missing(column, cells, stats)
            digest = writer.close()
        self._rows = writer.rows
        where = shown(self._prefix) or "the current folder"
        notes = [f"{self._label}: {missing} files that it names are not found; its paths are relative to {where}"]
        return dict(counts), digest, notes if missing else []

    def _stat_cells(self, column: MediaColumn, cells: Sequence[Any]) -> list[tuple[int | None, int | None]]:
        paths = _cell_paths(column, cells)
        return [stat_file(self._resolve(p)) if p and not is_url(p) else (None, None) for p in paths]

    def _resolve(self, path: str) -> str:
        return path if path.startswith("/") else self._prefix + path

    def records(self, start: int = 0) -> Iterator[Record]:
        """Records from row `start` on. Raises StateMismatch when the manifest is not the one of the snapshot."""
        return chain.from_iterable(self.blocks(start))

    def blocks(self, start: int = 0) -> Iterator[Sequence[Record]]:
        """As `records`, some at a time; texts as columns (TextRecords)."""
        if self._identity is None:
            raise RuntimeError("call snapshot() before records()")
        seen = self._status()
        self._check_identity()
        stats = self._file_stats(start)
        row = start
        for block in self.manifest.blocks(self.selection, start):
            # A row that was read before the change is right; one that came with it must not be taken for another.
            now = self._status()
            if now != seen and now[0] == seen[0]:
                self._check_identity()
                seen = now
            sizes = list(islice(stats, block.rows)) if self._stats else []
            yield self._records(block, row, sizes)
            row += block.rows
        if row < self._rows:
            raise StateMismatch(f"{self._label} has {row} rows; there were {self._rows} when it was listed")

    def _check_identity(self) -> None:
        if self._file_identity() != self._identity:
            raise StateMismatch(
                f"{self._label} changed after it was listed",
                hint="run the same command again; add --update when rows of it are already committed",
            )

    def _status(self) -> tuple[int, int, int]:
        """(inode, size, mtime). With another inode the file was replaced: what is open is still the old one."""
        try:
            status = os.stat(self.manifest.path)
        except OSError:
            return 0, 0, 0
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _file_stats(self, start: int) -> Iterator[tuple[int | None, ...]]:
        if self._stats is None:
            return
        for columns in read_rows(self._stats, start):
            yield from zip(*(c.to_pylist() for c in columns.values()), strict=True)

    def _records(self, block: Block, first: int, stats: list[tuple[int | None, ...]]) -> Sequence[Record]:
        """One block as records: whole columns at a time; rows with errors are mended afterwards."""
        if not block.errors and (texts := self._texts(block)) is not None:
            bad_ids: dict[int, RowError] = {}
            ids = self._ids(block, first, bad_ids)
            if not bad_ids:
                return TextRecords(first, ids, texts, self.selection.media[0].modality, block.keep, block.variables)
        errors = dict(block.errors)
        slots: list[Sequence[Media | None]] = []
        paths: Sequence[str | None] | None = None
        for i, (column, cells) in enumerate(zip(self.selection.media, block.media, strict=True)):
            here = [s[2 * i : 2 * i + 2] for s in stats]
            media, names = self._media(column, cells, here, errors)
            slots.append(media)
            paths = paths if paths is not None else names
        if not slots:
            slots = [[Media("text", text="")] * block.rows]
        if self._bears_missing:
            self._check_any(slots, errors)
        ids = self._ids(block, first, errors)
        keep, variables = (rows_of(one) or repeat(()) for one in (block.keep, block.variables))
        rows = range(first, first + block.rows)
        records = list(map(Record, rows, ids, paths or repeat(None), zip(*slots, strict=True), keep, variables))
        for i, error in errors.items():
            records[i].media, records[i].error = (), error
        return records

    def _texts(self, block: Block) -> Sequence[str] | None:
        """The texts of a block where each of its rows is one and nothing else, or None."""
        if [column.kind for column in self.selection.media] != ["text"]:
            return None
        cells = block.media[0]
        return cells if all(cells) and {type(cell) for cell in cells} == {str} else None

    def _check_any(self, slots: list[Sequence[Media | None]], errors: dict[int, RowError]) -> None:
        """Add rows that lack all of their media to `errors`."""
        names = ", ".join(repr(column.name) for column in self.selection.media)
        for i, row in enumerate(zip(*slots, strict=True)):
            if i not in errors and all(medium is not None and medium.missing for medium in row):
                errors[i] = bad_row(f"columns {names} are all empty")

    def _ids(self, block: Block, first: int, errors: dict[int, RowError]) -> Sequence[str]:
        label = self._label
        if block.ids is None:
            return [f"{label}#{row}" for row in range(first, first + block.rows)]
        ids = []
        for i, value in enumerate(block.ids):
            if value is None or value == "":
                errors.setdefault(i, bad_row(f"column {self.selection.id!r} (the id) is empty"))
                ids.append(f"{label}#{first + i}")
            else:
                ids.append(shown(value) if isinstance(value, (str, bytes)) else str(value))
        return ids

    def _media(
        self,
        column: MediaColumn,
        cells: Sequence[Any],
        stats: Sequence[tuple[int | None, ...]],
        errors: dict[int, RowError],
    ) -> tuple[Sequence[Media | None], Sequence[str | None] | None]:
        """The media of one column, and the paths to show; cells that cannot be media are added to `errors`."""
        nothing = repeat(None)
        if column.kind in ("bytes", "text") and all(cells) and not errors:
            # A third of the time of the loop below: 1 million rows of tiny bytes in 1.2 s.
            if column.kind == "bytes":
                return list(map(Media, repeat(column.modality), nothing, cells)), None
            if all(type(c) is str for c in cells):
                return list(map(Media, repeat(column.modality), nothing, nothing, cells)), None
        media: list[Media | None] = []
        paths: list[str | None] = []
        for i, cell in enumerate(cells):
            medium, path = None, None
            try:
                if i not in errors:
                    medium, path = self._medium(column, cell, stats[i] if stats else (None, None))
            except RowError as error:
                errors[i] = error
                path = _shown_cell(column, cell)
            media.append(medium)
            paths.append(path)
        return media, paths if any(paths) else None

    def _medium(self, column: MediaColumn, cell: Any, stats: tuple[int | None, ...]) -> tuple[Media, str | None]:
        if cell is None or cell == "" or cell == b"" or (column.kind == "struct" and not any(cell)):
            if self._bears_missing:
                return Media(column.modality), None
            what = "has neither bytes nor a path" if cell else "is empty"
            raise bad_row(f"column {column.name!r} {what}")
        if column.kind == "bytes":
            return Media(column.modality, data=cell), None
        if column.kind == "text":
            return Media(column.modality, text=_text(column.name, cell)), None
        if column.kind == "struct":
            data, cell = cell
            if data:
                return Media(column.modality, data=data), shown(cell) if cell else None
        return self._file(column, cell, stats)

    def _file(self, column: MediaColumn, path: str, stats: tuple[int | None, ...]) -> tuple[Media, str]:
        if is_url(path):
            raise RowError("policy_denied", URLS_ARE_OFF, "source")
        if "\0" in path:
            raise bad_row(f"column {column.name!r}: a path cannot hold a NUL")
        file = self._resolve(path)
        size, mtime_ns = stats
        if size == NOT_A_FILE:
            raise bad_row(f"column {column.name!r}: not a regular file: {shown(file)}")
        return Media(column.modality, file, None, None, size, mtime_ns), shown(file)


def bad_row(message: str) -> RowError:
    """A row that is not as it should be."""
    return RowError("bad_row", message, "source")


def _text(column: str, cell: str | bytes) -> str:
    try:
        if isinstance(cell, str):
            # Bytes that were not UTF-8 are lone surrogates here: neither tokenizers nor Arrow take them.
            cell.encode()
            return cell
        return cell.decode()
    except UnicodeError as failure:
        raise bad_row(f"column {column!r} is not UTF-8") from failure


def _folder_prefix(path: str) -> str:
    folder = os.path.dirname(path)
    return folder if folder.endswith("/") or not folder else folder + "/"


def _cell_paths(column: MediaColumn, cells: Sequence[Any]) -> Sequence[str | None]:
    """The path that each cell refers to; None for one that holds its content."""
    if column.kind == "path":
        return cells
    if column.kind == "struct":
        return [c[1] if c is not None and not c[0] else None for c in cells]
    return [None] * len(cells)


def _missing(column: MediaColumn, cells: Sequence[Any], stats: Sequence[tuple[int | None, int | None]]) -> int:
    paths = _cell_paths(column, cells)
    return sum(1 for p, (size, _) in zip(paths, stats, strict=True) if size is None and p and not is_url(p))


def _modalities(column: MediaColumn, cells: Sequence[Any]) -> Counter[Modality | None]:
    if column.modality is not None or column.kind in ("bytes", "text"):
        return Counter({column.modality: len(cells)})
    names = cells if column.kind == "path" else [c and c[1] for c in cells]
    return Counter(guess_modality(n) if n else None for n in names)


def _shown_cell(column: MediaColumn, cell: Any) -> str | None:
    """What to show as the path of a row whose path is refused."""
    path = cell if column.kind == "path" else cell[1] if column.kind == "struct" and cell else None
    return shown(path) if path else None
