"""Finished rows of an earlier output, found by their signature (--update, --retry-errors)."""

from __future__ import annotations

import os
import sqlite3
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmcli.core.durable import output_errors
from mmcli.core.errors import MmcliError, OutputError, StateMismatch
from mmcli.core.signature import SIGNATURE_BYTES
from mmcli.sinks.formats import load_format
from mmcli.sinks.outputs import OutputInfo, RunSpec, decode_schema, read_run, without_inputs
from mmcli.sinks.parquet import damaged_part, is_vector, open_parquet, parquet_writer
from mmcli.sinks.parts import FINGERPRINT_KEY, SIGNATURES, part_signatures, read_parts, to_bytes
from mmcli.sinks.place import Place

PREVIOUS_FOLDER = "previous"
# Three row groups of at most 32 MB: a run that goes through both outputs in order needs one or two.
CACHED_GROUPS = 3
# When row groups have been read this many times over, rows come in no order: 850 rows/s of 300,000, and less of
# more. A copy that any row can be read from, made once, gives 65,000.
REREADS = 3
# Signatures that are sorted in memory at a time when the index is built (10 s for 10 million).
INDEX_BUCKET = 500_000
_UNKNOWN = bytes(SIGNATURE_BYTES)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Parquet files that hold consecutive rows, and the signatures of these rows as raw bytes, in pieces."""

    files: list[Path]
    signatures: Iterator[bytes]
    rows: int


class PreviousRows:
    """Rows with status ok of a finished output, and of an interrupted run over other inputs.

    Rows are looked for where the last one was found, which is all it takes when inputs come in the same order:
    230,000 rows/s (512 x float32). Only signatures that are not there go to an index, which is built on disk
    when the first one does. Memory does not grow with the number of rows.
    """

    def __init__(self, pieces: Sequence[_Piece], folder: Path, columns: Sequence[str]) -> None:
        self._columns = ["modality", *columns]
        self._signatures = _SignatureFile(folder / "index.signatures", pieces)
        self._groups: list[tuple[Path, int]] = []
        starts = [0]
        for piece in pieces:
            for path in piece.files:
                footer = pq.read_metadata(path)
                for index in range(footer.num_row_groups):
                    self._groups.append((path, index))
                    starts.append(starts[-1] + footer.row_group(index).num_rows)
        self._starts = np.array(starts)
        self._index = _Index(self._signatures, folder / "index.sqlite")
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._copy: pa.ipc.RecordBatchFileReader | None = None
        self._copy_path = folder / "index.rows.arrow"
        self._reads = 0
        self._next = 0

    @classmethod
    def open(
        cls, spec: RunSpec, final: OutputInfo | None, staging: Path, columns: Sequence[str]
    ) -> PreviousRows | None:
        """The rows that a run of `spec` can reuse; None when there are none.

        Nothing is reusable from an output whose columns have other types, whose sidecar of signatures belongs to
        another run, or whose format has rounded the values.
        """
        wanted = pa.schema([spec.schema.field(name) for name in ["modality", *columns]])
        pieces = [
            piece
            for piece in (_finished_piece(spec, final, staging, wanted), _interrupted_piece(spec, staging, wanted))
            if piece is not None and piece.rows
        ]
        return cls(pieces, staging, columns) if pieces else None

    def take(self, signatures: Sequence[bytes | None]) -> tuple[list[int], pa.Table | None]:
        """Which of `signatures` have a finished row, and those rows.

        Returns the positions in `signatures`, ascending, and a table (`modality` and the columns asked for) with
        one row per position; no table when none was found. Raises StateMismatch for a damaged output.
        """
        window = self._signatures.rows_by_signature(self._next, 2 * len(signatures) + 64)
        positions: list[int] = []
        rows: list[int] = []
        for position, wanted in enumerate(signatures):
            if wanted is None or wanted == _UNKNOWN:
                continue
            row = window.get(wanted)
            if row is None:
                row = self._index.find(wanted)
            if row is not None:
                positions.append(position)
                rows.append(row)
        if not rows:
            return [], None
        self._next = rows[-1] + 1
        return positions, self._read(np.array(rows))

    def close(self) -> None:
        """Close the index; its files go with the staging folder."""
        self._index.close()
        self._signatures.close()
        self._cache.clear()
        self._copy = None

    def _read(self, rows: np.ndarray) -> pa.Table:
        """The rows of these numbers, in this order."""
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(groups, kind="stable")
        cuts = np.flatnonzero(np.diff(groups[order])) + 1
        tables = []
        for chosen in np.split(order, cuts):
            group = int(groups[chosen[0]])
            local = rows[chosen] - self._starts[group]
            table = self._group(group)
            if local[-1] - local[0] == len(local) - 1 and (np.diff(local) == 1).all():
                tables.append(table.slice(int(local[0]), len(local)))
            else:
                tables.append(table.take(pa.array(local)))
        found = pa.concat_tables(tables)
        if (np.diff(order) == 1).all():
            return found
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return found.take(pa.array(back))

    def _group(self, group: int) -> pa.Table:
        if self._copy is not None:
            return pa.Table.from_batches([self._copy.get_batch(group)])
        table = self._cache.get(group)
        if table is None:
            table = _read_group(*self._groups[group], self._columns)
            self._cache[group] = table
            if len(self._cache) > CACHED_GROUPS:
                self._cache.popitem(last=False)
            self._reads += 1
            if self._reads == REREADS * len(self._groups) + 10:
                self._copy = self._make_copy(table.schema)
        self._cache.move_to_end(group)
        return table

    def _make_copy(self, schema: pa.Schema) -> pa.ipc.RecordBatchFileReader | None:
        """All row groups as a file that is mapped into memory, a record batch each; None when there is no room."""
        try:
            with pa.OSFile(str(self._copy_path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
                for path, index in self._groups:
                    table = _read_group(path, index, self._columns).combine_chunks()
                    writer.write_table(table, max_chunksize=len(table))
            return pa.ipc.open_file(pa.memory_map(str(self._copy_path)))
        except OSError:
            self._copy_path.unlink(missing_ok=True)
            return None


def _read_group(path: Path, index: int, columns: list[str]) -> pa.Table:
    with output_errors(path), damaged_part(path), open_parquet(path) as file:
        return file.read_row_group(index, columns=columns)


def _finished_piece(spec: RunSpec, final: OutputInfo | None, staging: Path, wanted: pa.Schema) -> _Piece | None:
    if final is None or not _same_types(final.schema, wanted):
        return None
    if without_inputs(final.job) != spec.job.without_inputs().to_dict():
        return None
    old = load_format(final.format)
    half = all(f.type.value_type == pa.float16() for f in wanted if is_vector(f.type))
    if not (old.lossless or half or final.format == spec.format):
        return None
    sidecar = Place.of(final.path, final.format).signatures
    try:
        footer = pq.read_metadata(sidecar)
    except (OSError, pa.ArrowException):
        return None
    keys = footer.metadata or {}
    if keys.get(FINGERPRINT_KEY) != final.fingerprint.encode() or footer.num_rows != final.rows:
        return None
    if final.format == "parquet":
        files = [final.path / name for name in final.files] if final.files else [final.path]
    else:
        files = [staging / "index.rows.parquet"]
        with parquet_writer(files[0], wanted) as writer:
            for batch in old.read(final.path, wanted):
                writer.write(batch)
    return _Piece(files, _sidecar_bytes(sidecar), final.rows)


def _interrupted_piece(spec: RunSpec, staging: Path, wanted: pa.Schema) -> _Piece | None:
    folder = staging / PREVIOUS_FOLDER
    try:
        run, parts = read_run(folder), read_parts(folder)
    except StateMismatch:
        return None
    if run is None or without_inputs(run["job"]) != spec.job.without_inputs().to_dict():
        return None
    if not _same_types(decode_schema(run, str(folder)), wanted):
        return None
    raw = (to_bytes(part_signatures(part).column(0)) for part in parts)
    return _Piece([part.path for part in parts], raw, parts[-1].stop if parts else 0)


def _same_types(schema: pa.Schema, wanted: pa.Schema) -> bool:
    return all(f.name in schema.names and schema.field(f.name).type == f.type for f in wanted)


def _sidecar_bytes(sidecar: Path) -> Iterator[bytes]:
    with open_parquet(sidecar) as file:
        for batch in file.iter_batches(columns=SIGNATURES.names):
            yield to_bytes(batch.column(0))


class _SignatureFile:
    """Signatures of all previous rows, one after the other in a file; zeros where there is none."""

    def __init__(self, path: Path, pieces: Sequence[_Piece]) -> None:
        self.rows = 0
        with path.open("wb") as file:
            for piece in pieces:
                self._append(file, piece)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _append(self, file: BinaryIO, piece: _Piece) -> None:
        written = 0
        for raw in piece.signatures:
            written += file.write(raw) // SIGNATURE_BYTES
        if written != piece.rows:
            raise MmcliError(f"internal error: {written} signatures for {piece.rows} rows")
        self.rows += written

    def read(self, row: int, count: int) -> bytes:
        return os.pread(self._descriptor, count * SIGNATURE_BYTES, row * SIGNATURE_BYTES)

    def rows_by_signature(self, row: int, count: int) -> dict[bytes, int]:
        raw = self.read(row, count)
        size = SIGNATURE_BYTES
        return {raw[at : at + size]: row + at // size for at in range(0, len(raw), size)}

    def prefixes(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, int64 prefix of each signature), in blocks; 0 where there is none."""
        for row in range(0, self.rows, INDEX_BUCKET):
            raw = self.read(row, min(INDEX_BUCKET, self.rows - row))
            yield row, np.frombuffer(raw, ">i8")[::2].astype(np.int64)

    def close(self) -> None:
        # As Lock.release.
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class _Index:
    """signature -> row, on disk. Built at the first question.

    Keyed by the first 8 bytes, which takes half the space; the signature file tells equal prefixes apart.
    """

    def __init__(self, signatures: _SignatureFile, path: Path) -> None:
        self._signatures, self._path = signatures, path
        self._database: sqlite3.Connection | None = None

    def find(self, wanted: bytes) -> int | None:
        prefix = int.from_bytes(wanted[:8], "big", signed=True)
        try:
            if self._database is None:
                self._database = self._build()
            found = self._database.execute("SELECT row FROM rows WHERE prefix = ?", (prefix,)).fetchall()
        except sqlite3.Error as error:
            raise OutputError(f"cannot write {self._path}: {error}") from error
        for (row,) in found:
            if self._signatures.read(row, 1) == wanted:
                return int(row)
        return None

    def _build(self) -> sqlite3.Connection:
        # Asked from the thread that reads the inputs, closed by the main thread.
        database = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.execute("PRAGMA cache_size = -16000")
        database.execute("CREATE TABLE rows (prefix INTEGER, row INTEGER, PRIMARY KEY (prefix, row)) WITHOUT ROWID")
        database.execute("BEGIN")
        # In the order of the key, bucket by bucket: appending to a b-tree is 10 times as fast as random inserts.
        buckets = self._signatures.rows // INDEX_BUCKET + 1
        bounds = np.linspace(-(2.0**63), 2.0**63, buckets + 1)
        bounds[-1] = np.inf  # the largest int64 is 2**63 as a float
        for low, high in pairwise(bounds):
            prefixes, rows = self._bucket(low, high)
            entries = zip(prefixes.tolist(), rows.tolist(), strict=True)
            database.executemany("INSERT INTO rows VALUES (?, ?)", entries)
        database.execute("COMMIT")
        return database

    def _bucket(self, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
        chosen_prefixes, chosen_rows = [], []
        for start, prefixes in self._signatures.prefixes():
            inside = np.flatnonzero((prefixes >= low) & (prefixes < high) & (prefixes != 0))
            chosen_prefixes.append(prefixes[inside])
            chosen_rows.append(inside + start)
        prefix, row = np.concatenate(chosen_prefixes), np.concatenate(chosen_rows)
        order = np.lexsort((row, prefix))
        return prefix[order], row[order]

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None
