"""JSON Lines: one object per row, keys in the order of the schema, null columns present."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from mmcli.sinks.parquet import READ_ROWS, batches, is_vector

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS


@dataclass(frozen=True, slots=True)
class JsonlFormat:
    """One JSONL file. Its metadata is in OUT.meta.json, since JSONL has no place for any.

    Vectors are lists of the shortest decimals that give the same float32 back. NaN does not occur: it would be
    null. Binary values are base64; times, decimals and whatever else JSON lacks are strings.
    """

    name: str = "jsonl"
    suffixes: tuple[str, ...] = (".jsonl", ".ndjson")
    lossless: bool = True

    def check(self, schema: pa.Schema) -> None:
        """JSONL holds any columns."""

    def write(self, parts: Sequence[Path], schema: pa.Schema, target: Path) -> int:
        """Stream the parts into one file; returns its rows."""
        rows = 0
        with target.open("wb") as file:
            for batch in batches(parts):
                file.write(json_lines(batch))
                rows += batch.num_rows
        return rows

    def read(self, out: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The columns of `schema` of a finished output, READ_ROWS rows at a time."""
        with out.open("rb") as file:
            while lines := [line for _, line in zip(range(READ_ROWS), file, strict=False)]:
                rows = [orjson.loads(line) for line in lines]
                columns = [pa.array([row[f.name] for row in rows], f.type) for f in schema]
                yield pa.record_batch(columns, schema=schema)


def json_lines(batch: pa.RecordBatch) -> bytes:
    """A record batch as JSONL."""
    columns = [_values(batch.column(i)) for i in range(batch.num_columns)]
    names = batch.schema.names
    dumps = orjson.dumps
    return b"".join(
        [dumps(dict(zip(names, row, strict=True)), _fallback, _OPTIONS) for row in zip(*columns, strict=True)]
    )


def _values(column: pa.Array) -> list[Any]:
    """One Python value per row, that orjson can write."""
    kind = column.type
    if is_vector(kind):
        return _vectors(column)
    if pa.types.is_timestamp(kind):
        # As integers first: zones need a database that small machines lack, and Arrow's times are UTC anyhow.
        text = column.cast(pa.int64()).cast(pa.timestamp(kind.unit)).cast(pa.string())
        suffix = "Z" if kind.tz else ""
        return [None if t is None else t.replace(" ", "T") + suffix for t in text.to_pylist()]
    if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        column = _as_text(column)
    try:
        return list(column.to_pylist())
    except (ValueError, pa.ArrowException):
        return [_plain(value) for value in column]


def _plain(value: pa.Scalar) -> Any:
    """A value some part of which Python cannot hold: text that is not UTF-8, times in nanoseconds."""
    try:
        return value.as_py()
    except (ValueError, pa.ArrowException):
        pass
    if isinstance(value, pa.StructScalar):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, pa.ListScalar):
        return [_plain(inner) for inner in value.values]
    if isinstance(value, pa.StringScalar):
        return value.as_buffer().to_pybytes().decode("utf-8", "backslashreplace")
    return value.cast(pa.string()).as_py()


def _as_text(column: pa.Array) -> pa.Array:
    try:
        return column.cast(pa.string())
    except pa.ArrowException:
        return column


def _vectors(column: pa.FixedSizeListArray) -> list[Any]:
    size = column.type.list_size
    # `values`, unlike `flatten`, keeps the place of null rows.
    flat = column.values[column.offset * size : (column.offset + len(column)) * size]
    rows = flat.to_numpy(zero_copy_only=False).reshape(len(column), size)
    if not column.null_count:
        return list(rows)
    valid = pc.is_valid(column).to_pylist()
    return [row if ok else None for row, ok in zip(rows, valid, strict=True)]


def _fallback(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return str(value)
