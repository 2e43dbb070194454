"""Folders, files, wildcard patterns and lists of paths on stdin: records that are files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import BinaryIO, Protocol

import pyarrow as pa

from mmcli.core.errors import ConfigError, RowError
from mmcli.core.extensions import guess_modality
from mmcli.core.records import Media, Modality, Record
from mmcli.sources.folder import Entry
from mmcli.sources.names import is_url, shown
from mmcli.sources.snapshot import (
    NOT_A_FILE,
    ResolvedInputs,
    SnapshotWriter,
    read_rows,
    stat_file,
)

URLS_ARE_OFF = "URL columns are off: this is a URL, not a file"

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.binary()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
    ]
)


class Listing(Protocol):
    """Something that names files."""

    def entries(self, scratch: Path) -> Iterator[Entry]: ...

    def notes(self) -> list[str]:
        """Lines for the user, once `entries` is exhausted."""
        ...


class FileListing:
    """Files named on the command line: each is a row, whatever its name."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)

    def entries(self, scratch: Path) -> Iterator[Entry]:
        return map(file_entry, map(os.fsencode, self.paths))

    def notes(self) -> list[str]:
        return []


class ListFile:
    r"""Paths read from a stream (stdin) or a file, one a line, or separated by NUL.

    Empty lines are no rows. In lines a carriage return at the end is dropped (lists made on Windows).
    """

    def __init__(self, origin: BinaryIO | str, null_separated: bool) -> None:
        self._origin = origin
        self._null_separated = null_separated
        self._read = False

    def entries(self, scratch: Path) -> Iterator[Entry]:
        """The rows; those of a stream only once. Raises ConfigError the second time."""
        if isinstance(self._origin, str):
            with open(self._origin, "rb") as file:
                yield from map(file_entry, self._paths(file))
            return
        if self._read:
            raise ConfigError("the list on stdin can be read only once")
        self._read = True
        yield from map(file_entry, self._paths(self._origin))

    def notes(self) -> list[str]:
        return []

    def _paths(self, stream: BinaryIO) -> Iterator[bytes]:
        if self._null_separated:
            return filter(None, _split(stream, b"\0"))
        # Line by line, so that a live stream is answered as it arrives.
        lines = iter(stream.readline, b"")
        return filter(None, (line.removesuffix(b"\n").removesuffix(b"\r") for line in lines))


def _split(stream: BinaryIO, separator: bytes) -> Iterator[bytes]:
    rest = b""
    # read1 gives what has arrived, without waiting for a full block.
    read = getattr(stream, "read1", stream.read)
    while block := read(1 << 16):
        *parts, rest = (rest + block).split(separator)
        yield from parts
    yield rest


def file_entry(path: bytes) -> Entry:
    """The row of a path as given: an error where it cannot be a file."""
    name = shown(path)
    if is_url(name):
        return Entry(name, path, code="policy_denied", message=URLS_ARE_OFF)
    if b"\0" in path:
        return Entry(name, path, code="bad_row", message="a path cannot hold a NUL; for lists with NUL use -0")
    size, mtime_ns = stat_file(path)
    if size == NOT_A_FILE:
        return Entry(name, path, code="bad_row", message="not a regular file")
    return Entry(name, path, size, mtime_ns)


class PathSource:
    """Records that are files, listed by one or more listings, in their order.

    live  no snapshot: records are made as the listings name them, and their number is not known
    """

    slots: tuple[str, ...] = ("",)

    def __init__(self, listings: Sequence[Listing], live: bool = False) -> None:
        self.listings = list(listings)
        self.keep = pa.schema([])
        self.live = live
        self._folder: Path | None = None

    def snapshot(self, folder: Path) -> ResolvedInputs:
        """List every file. Raises ConfigError when a root folder cannot be read."""
        self._folder = folder
        if self.live:
            return ResolvedInputs(None, "live")
        counts: Counter[Modality | None] = Counter()
        with SnapshotWriter(folder, _SCHEMA) as writer:
            for entry in self._entries(folder):
                writer.add((entry.id, entry.path, entry.size, entry.mtime_ns, entry.code, entry.message))
                counts[guess_modality(entry.id)] += 1
            digest = writer.close()
        notes = [note for listing in self.listings for note in listing.notes()]
        return ResolvedInputs(writer.rows, digest, dict(counts), notes)

    def _entries(self, scratch: Path) -> Iterator[Entry]:
        for listing in self.listings:
            try:
                yield from listing.entries(scratch)
            except OSError as failure:
                where = shown(failure.filename) if failure.filename else "an input"
                raise ConfigError(f"cannot list {where}: {failure.strerror}") from failure

    def records(self, start: int = 0) -> Iterator[Record]:
        """Records from the snapshot. Raises RuntimeError when there is none."""
        if self._folder is None:
            raise RuntimeError("call snapshot() before records()")
        if self.live:
            yield from _live_records(self._entries(self._folder), start)
            return
        row = start
        for columns in read_rows(self._folder, start):
            size = len(columns["id"])
            yield from _records(columns, row)
            row += size


def _live_records(entries: Iterable[Entry], start: int) -> Iterator[Record]:
    for row, entry in enumerate(entries):
        if row < start:
            continue
        path = shown(entry.path)
        if entry.code is not None:
            error = RowError(entry.code, entry.message or "", "source")
            yield Record(row, entry.id, path, (), error=error)
        else:
            media = Media(None, os.fsdecode(entry.path), None, None, entry.size, entry.mtime_ns)
            yield Record(row, entry.id, path, (media,))


def _records(columns: dict[str, pa.Array], first: int) -> Iterator[Record]:
    """A batch of the snapshot as records; whole columns at a time, 1.1 us a record."""
    paths = columns["path"].to_pylist()
    try:
        files = names = columns["path"].cast(pa.string()).to_pylist()
    except pa.ArrowInvalid:
        files, names = [os.fsdecode(p) for p in paths], [shown(p) for p in paths]
    nothing = repeat(None)
    media = map(
        Media, nothing, files, nothing, nothing, columns["size"].to_pylist(), columns["mtime_ns"].to_pylist()
    )
    rows = range(first, first + len(paths))
    records = map(Record, rows, columns["id"].to_pylist(), names, zip(media))
    if columns["error_code"].null_count == len(paths):
        yield from records
        return
    codes, messages = columns["error_code"].to_pylist(), columns["error_message"].to_pylist()
    for record, code, message in zip(records, codes, messages, strict=True):
        if code is not None:
            record.media, record.error = (), RowError(code, message, "source")
        yield record
