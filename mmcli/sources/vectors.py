"""Records from vectors that are computed already: an output of `mmcli embed`, or a Parquet file of others."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmcli.core.errors import ConfigError, ErrorCode, ErrorStage, RowError, StateMismatch, one_line
from mmcli.core.records import MODALITIES, Decoded, Media, Modality, Record, Sample
from mmcli.core.samples import Packed, Samples
from mmcli.sources.columns import OUTPUT_NAMES, renamed
from mmcli.sources.names import shown
from mmcli.sources.snapshot import ResolvedInputs, combine, file_identity

BATCH_ROWS = 4096
# The modality of vectors that do not say what they are of.
UNKNOWN = "vector"
# The name of the model input: as mmcli.models.vectors.VECTOR.
_INPUT = "embedding"


@dataclass(frozen=True, slots=True)
class VectorColumns:
    """Which columns of a file are what.

    vector    fixed_size_list or list of floats
    id, keep  as for manifests; id: None: `name#row`
    """

    vector: str
    id: str | None = None
    keep: tuple[str, ...] = ()


class VectorSource:
    """One record for each row; its vector float32 [D] is the last of `Record.variables`.

    A row that is an error in the file stays that error; one without a vector, or of another size, is a `bad_row`.
    """

    slots: tuple[str, ...] = ("",)

    def __init__(self, name: str, files: Sequence[str], columns: VectorColumns) -> None:
        """Raises ConfigError for a file that cannot be read, and for columns that are not there."""
        self._name, self._files, self.columns = shown(name), list(files), columns
        self._identity: str | None = None
        try:
            self._rows = [pq.read_metadata(file).num_rows for file in self._files]
            schema = pq.read_schema(self._files[0])
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"cannot read {self._name}: {one_line(str(error))}") from error
        self._names = _read_columns(schema, columns, self._name)
        _check_alike(self._files, self._names, schema)
        # Of rows with several media: `text_embedding` is of the text.
        slot = next((one for one in MODALITIES if columns.vector == f"{one}_embedding"), None)
        self._media = {one: (Media(one),) for one in MODALITIES}
        self._unnamed = (Media(slot),)
        self.keep = pa.schema([schema.field(old).with_name(new) for new, old in self._kept(schema.names)])
        self.embedding_size = self._size(schema.field(columns.vector).type)

    def _kept(self, names: Container[str]) -> list[tuple[str, str]]:
        """(name in the output, column) of each passthrough column."""
        return [renamed(text, names) for text in self.columns.keep]

    def _size(self, kind: pa.DataType) -> int:
        """D: of the type, or of the first vector."""
        if pa.types.is_fixed_size_list(kind):
            return int(kind.list_size)
        for batch in self._batches([self.columns.vector], 0):
            lengths = batch.column(0).drop_null().value_lengths()
            if len(lengths) and lengths[0].as_py():
                return int(lengths[0].as_py())
        raise ConfigError(f"{self._name}: column {self.columns.vector!r} holds no vector")

    def snapshot(self, folder: Path) -> ResolvedInputs:
        """Nothing is listed: the file itself says what there is. Raises ConfigError."""
        self._identity = self._digest()
        told = repr((self.columns, self._name))
        return ResolvedInputs(sum(self._rows), combine([self._identity, told]))

    def _digest(self) -> str:
        try:
            return combine([file_identity(file) for file in self._files])
        except OSError as error:
            raise ConfigError(f"cannot read {self._name}: {error.strerror}") from error

    def records(self, start: int = 0) -> Iterator[Record]:
        """Records from row `start` on. Raises StateMismatch when a file is not the one of the snapshot."""
        if self._identity is None:
            raise RuntimeError("call snapshot() before records()")
        if self._digest() != self._identity:
            raise StateMismatch(f"{self._name} changed after it was listed", hint="run the same command again")
        row = start
        for batch in self._batches(self._names, start):
            yield from self._records(batch, row)
            row += len(batch)

    def _batches(self, names: Sequence[str], start: int) -> Iterator[pa.RecordBatch]:
        """From row `start` on; row groups before it are not read."""
        first = 0
        for path in self._files:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    skip, first = max(0, start - first), first + rows
                    if skip >= rows:
                        continue
                    batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(names))
                    yield from _without(batches, skip, f"{self._name}, row group {group}")

    def _records(self, batch: pa.RecordBatch, first: int) -> Iterator[Record]:
        cells = {name: batch.column(name) for name in batch.schema.names}
        ids = self._ids(cells, first, len(batch))
        paths = cells["path"].to_pylist() if "path" in cells else repeat(None, len(batch))
        modalities = cells["modality"].to_pylist() if "modality" in cells else repeat(None, len(batch))
        kept = [cells[old].to_pylist() for _, old in self._kept(cells)]
        keep = zip(*kept, strict=True) if kept else repeat((), len(batch))
        vectors, errors = _vectors(cells[self.columns.vector], self.columns.vector, self.embedding_size)
        errors |= _errors(cells)
        rows = zip(ids, paths, modalities, keep, vectors, strict=True)
        for index, (name, path, modality, values, vector) in enumerate(rows):
            media = self._media.get(modality, self._unnamed)
            record = Record(first + index, name, path, media, values, (vector,))
            if index in errors:
                # Its medium stays: it says what the vector was to be of.
                record.variables, record.error = (), errors[index]
            yield record

    def _ids(self, cells: dict[str, pa.Array], first: int, count: int) -> Sequence[str]:
        if self.columns.id is None:
            return [f"{self._name}#{row}" for row in range(first, first + count)]
        found = cells[self.columns.id].to_pylist()
        return [f"{self._name}#{row}" if v in (None, "") else str(v) for row, v in enumerate(found, first)]


@dataclass(slots=True)
class VectorDecoder:
    """See mmcli.core.protocols.Decoder: the Sample of a record is its vector."""

    num_workers: int = field(default=0, init=False)

    def run(self, blocks: Iterator[Sequence[Record]], may_read: Callable[[], bool]) -> Iterator[Decoded]:
        """In order, in this process; an answer without records while it may not read."""
        while True:
            if not may_read():
                yield Decoded((), ())
                continue
            records = next(blocks, None)
            if records is None:
                return
            yield Decoded(records, _outcomes(records))

    def close(self) -> None:
        """Nothing to release."""


def _outcomes(records: Sequence[Record]) -> Sequence[tuple[Sample, ...]]:
    samples = [_sample(record) for record in records]
    columns = Samples.of(samples) if samples else None
    return [(sample,) for sample in samples] if columns is None else Packed(columns)


def _sample(record: Record) -> Sample:
    modality = record.media[0].modality or cast(Modality, UNKNOWN)
    return Sample(modality, {_INPUT: record.variables[-1]})


def vector_columns(schema: pa.Schema) -> list[str]:
    """Columns whose cells are lists of floats."""
    return [f.name for f in schema if _is_list(f.type) and pa.types.is_floating(f.type.value_type)]


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind))


def _read_columns(schema: pa.Schema, columns: VectorColumns, name: str) -> list[str]:
    """All that is read of each row. Raises ConfigError."""
    problems = []
    kept = [renamed(one, schema.names) for one in columns.keep]
    if columns.vector not in vector_columns(schema):
        there = ", ".join(vector_columns(schema)) or "none"
        problems.append(f"{name}: {columns.vector!r} is no column of vectors; such are: {there}")
    for flag, wanted in (("--id-column", columns.id), *(("--keep", one) for _, one in kept)):
        if wanted is not None and wanted not in schema.names:
            problems.append(f"{flag} {wanted}: {name} has no such column; it has {', '.join(schema.names)}")
    for new, old in kept:
        if new in OUTPUT_NAMES:
            problems.append(
                f"--keep {new}: every output has its own column; call it otherwise: --keep true_{new}={old}"
            )
    if problems:
        raise ConfigError(problems)
    own = [one for one in ("path", "modality", *_ERROR_COLUMNS) if one in schema.names and _is_text(schema, one)]
    wanted_names = chain([columns.vector], [columns.id] if columns.id else [], [old for _, old in kept], own)
    return list(dict.fromkeys(wanted_names))


def _check_alike(files: Sequence[str], names: Sequence[str], schema: pa.Schema) -> None:
    """Raise ConfigError unless all files have these columns, of the types of the first."""
    for file in files[1:]:
        try:
            found = pq.read_schema(file)
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"cannot read {shown(file)}: {one_line(str(error))}") from error
        for name in names:
            wanted = schema.field(name).type
            kind = found.field(name).type if name in found.names else "not there"
            if kind != wanted:
                raise ConfigError(f"{shown(file)}: column {name!r} is {kind}; in {shown(files[0])} it is {wanted}")


_ERROR_COLUMNS = ("status", "error_code", "error_stage", "error_message")


def _is_text(schema: pa.Schema, name: str) -> bool:
    return bool(pa.types.is_string(schema.field(name).type) or pa.types.is_large_string(schema.field(name).type))


def _without(batches: Iterator[pa.RecordBatch], skip: int, where: str) -> Iterator[pa.RecordBatch]:
    """The batches behind the first `skip` rows. Raises StateMismatch for a damaged file."""
    try:
        for batch in batches:
            if skip < len(batch):
                yield batch.slice(skip)
            skip = max(0, skip - len(batch))
    except (OSError, pa.ArrowException) as error:
        raise StateMismatch(f"{where} cannot be read: {one_line(str(error))}") from error


def _vectors(array: pa.Array, name: str, size: int) -> tuple[np.ndarray, dict[int, RowError]]:
    """float32 [n, D] of a column, and the rows that have none of that size."""
    found = np.zeros((len(array), size), dtype=np.float32)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    errors = {int(row): _bad(f"column {name!r} is empty") for row in np.flatnonzero(~valid)}
    if not pa.types.is_fixed_size_list(array.type):
        lengths = np.asarray(array.value_lengths().fill_null(size))
        for row in np.flatnonzero(lengths != size):
            errors[int(row)] = _bad(f"column {name!r} has {lengths[row]} numbers, not {size}")
            valid[row] = False
        array = array.filter(pa.array(valid))
    flat = array.flatten().to_numpy(zero_copy_only=False)
    found[valid] = flat.reshape(-1, size)
    return found, errors


def _errors(cells: dict[str, pa.Array]) -> dict[int, RowError]:
    """Rows that are errors in the file: they stay what they are."""
    if not all(name in cells for name in _ERROR_COLUMNS):
        return {}
    errors = {}
    for row, status in enumerate(cells["status"].to_pylist()):
        if status == "error":
            code, stage, message = (cells[name][row].as_py() for name in _ERROR_COLUMNS[1:])
            errors[row] = RowError(
                cast(ErrorCode, code or "bad_row"), message or "", cast(ErrorStage, stage or "source")
            )
    return errors


def _bad(message: str) -> RowError:
    return RowError("bad_row", message, "source")
