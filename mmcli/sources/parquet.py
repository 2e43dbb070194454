"""Parquet manifests: inline bytes, file paths or text, and Hugging Face's typed media columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmcli.core.errors import ConfigError, RowError, one_line
from mmcli.core.records import Modality
from mmcli.sources.columns import Column, Holds, KeepColumn, MediaColumn, Selection
from mmcli.sources.lines import variable
from mmcli.sources.manifest import Block, bad_row
from mmcli.sources.names import shown

# A batch of inline media is about this many bytes; of anything else, at most MAX_ROWS rows. Large batches are
# no faster and keep the memory of the largest.
BATCH_BYTES = 4 * 1024 * 1024
MAX_ROWS = 4096
# Column chunks are read through a buffer, page by page, not whole: a row group may be gigabytes.
BUFFER_BYTES = 256 * 1024

_FEATURES: dict[str, Modality] = {"Image": "image", "Audio": "audio", "Video": "video"}
# What Arrow raises on broken pages; OSError is most common.
_UNREADABLE = (OSError, pa.ArrowException, UnicodeDecodeError, EOFError)


class ParquetManifest:
    """A Parquet file. Rows of a row group that cannot be read are error rows (corrupt).

    Raises ConfigError when the file or its footer cannot be read.
    """

    empty = False

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name = path, name
        with self._open() as file:
            schema = file.schema_arrow
            self._group_rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        features = _features(schema)
        self.columns = [_column(field, features.get(field.name)) for field in schema]

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path, pre_buffer=False, buffer_size=BUFFER_BYTES)
        except PermissionError as failure:
            raise ConfigError(f"cannot read {shown(self.name)}: {failure.strerror}") from failure
        except _UNREADABLE as failure:
            raise ConfigError(f"{shown(self.name)} is not a readable Parquet file: {_reason(failure)}") from failure

    def count(self) -> int:
        """Rows, from the footer."""
        return sum(self._group_rows)

    def holds_paths(self, selection: Selection) -> bool:
        """Whether any row may refer to a file; the footer says whether a struct's bytes are ever null."""
        kinds = {m.kind for m in selection.media}
        if "path" in kinds:
            return True
        structs = [m.name for m in selection.media if m.kind == "struct"]
        if not structs:
            return False
        with self._open() as file:
            return any(_has_nulls(file.metadata, f"{name}.bytes") for name in structs)

    def blocks(self, selection: Selection, start: int = 0) -> Iterator[Block]:
        """Rows from `start` on; row groups before it are not read."""
        with self._open() as file:
            first = 0
            for group, rows in enumerate(self._group_rows):
                if first + rows > start:
                    yield from self._group(file, group, selection, max(0, start - first))
                first += rows

    def _group(self, file: pq.ParquetFile, group: int, selection: Selection, skip: int) -> Iterator[Block]:
        rows, done = self._group_rows[group], 0
        # Always from the group's beginning, so that where a broken one fails does not depend on `skip`.
        batches = file.iter_batches(
            _batch_rows(file.metadata.row_group(group), selection),
            row_groups=[group],
            columns=selection.names,
            use_threads=False,
        )
        reason = f"it has fewer rows than its {rows}"
        while done < rows:
            try:
                batch = next(batches, None)
            except _UNREADABLE as failure:
                reason = _reason(failure)
                break
            if batch is None:
                break
            batch = batch.slice(0, rows - done)
            done += len(batch)
            if done > skip:
                yield _block(batch.slice(max(0, skip - (done - len(batch)))), selection)
        lost = rows - max(done, skip)
        error = RowError("corrupt", f"row group {group} of {shown(self.name)} cannot be read: {reason}", "source")
        for at in range(0, lost, MAX_ROWS):
            yield _error_block(min(MAX_ROWS, lost - at), selection, error)


def _reason(failure: BaseException) -> str:
    return one_line((str(failure).strip() or type(failure).__name__).splitlines()[0], 200)


def _features(schema: pa.Schema) -> dict[str, Modality]:
    """Modalities of media columns by the schema metadata that Hugging Face `datasets` writes."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: _FEATURES[feature["_type"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") in _FEATURES
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _column(field: pa.Field, feature: Modality | None) -> Column:
    return Column(field.name, str(field.type), _holds(field.type), feature, field.type)


def _holds(kind: pa.DataType) -> Holds:
    types = pa.types
    if types.is_dictionary(kind):
        return _holds(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "string"
    if _is_binary(kind):
        return "bytes"
    if types.is_struct(kind):
        fields = {f.name: _holds(f.type) for f in kind}
        if fields.get("bytes") == "bytes" and fields.get("path", "string") == "string":
            return "struct"
    return "other"


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def _has_nulls(metadata: pq.FileMetaData, leaf: str) -> bool:
    """Whether a leaf column may hold nulls, by the statistics of its chunks."""
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            chunk = row_group.column(index)
            if chunk.path_in_schema != leaf:
                continue
            statistics = chunk.statistics
            if statistics is None or not statistics.has_null_count or statistics.null_count:
                return True
    return False


def _batch_rows(group: pq.RowGroupMetaData, selection: Selection) -> int:
    wanted = set(selection.names)
    size = 0
    for index in range(group.num_columns):
        chunk = group.column(index)
        if chunk.path_in_schema in wanted or chunk.path_in_schema.partition(".")[0] in wanted:
            size += chunk.total_uncompressed_size
    fitting: int = BATCH_BYTES * group.num_rows // max(1, size)
    return max(1, min(MAX_ROWS, fitting))


def _block(batch: pa.RecordBatch, selection: Selection) -> Block:
    errors: dict[int, RowError] = {}
    return Block(
        rows=len(batch),
        media=[_cells(batch.column(m.name), m, errors) for m in selection.media],
        ids=_values(batch.column(selection.id), selection.id, errors) if selection.id else None,
        keep=[_keep_values(batch.column(k.name), k, errors) for k in selection.keep],
        errors=errors,
        variables=[_variables(batch.column(name), name, errors) for name in selection.variables],
    )


def _error_block(rows: int, selection: Selection, error: RowError) -> Block:
    nulls = [None] * rows
    # The id column is lost too; `name#row` stands in for it.
    errors = dict.fromkeys(range(rows), error)
    keep: list[Sequence[Any]] = [nulls] * len(selection.keep)
    variables: list[Sequence[Any]] = [nulls] * len(selection.variables)
    return Block(rows, [nulls] * len(selection.media), None, keep, errors, variables)


def _cells(array: pa.Array, column: MediaColumn, errors: dict[int, RowError]) -> Sequence[Any]:
    array = _decoded(array)
    if column.kind != "struct":
        return _values(array, column.name, errors)
    # Unlike field(), flatten() makes the children of a null struct null.
    children = dict(zip([f.name for f in array.type], array.flatten(), strict=True))
    data = children["bytes"].to_pylist()
    paths = _values(children["path"], column.name, errors) if "path" in children else [None] * len(data)
    return list(zip(data, paths, strict=True))


def _decoded(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _values(array: pa.Array, column: str, errors: dict[int, RowError]) -> list[Any]:
    """Cells as Python objects; a string that is not UTF-8 is an error of its row alone."""
    array = _decoded(array)
    try:
        return array.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [_value(array, i, column, errors) for i in range(len(array))]


def _value(array: pa.Array, row: int, column: str, errors: dict[int, RowError]) -> Any:
    try:
        return array[row].as_py()
    except UnicodeDecodeError:
        errors[row] = bad_row(f"column {column!r} is not UTF-8")
        return None


def _variables(array: pa.Array, column: str, errors: dict[int, RowError]) -> list[Any]:
    if _holds_numbers(array.type):
        return [_numbers(scalar) for scalar in array]
    return [variable(value) for value in _values(array, column, errors)]


def _holds_numbers(kind: pa.DataType) -> bool:
    """Whether it is a list of numbers, or of such lists."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    inner = kind.value_type
    return bool(pa.types.is_integer(inner) or pa.types.is_floating(inner)) or _holds_numbers(inner)


def _numbers(scalar: pa.Scalar) -> Any:
    """As mmcli.sources.lines.variable, without a Python object for each number.

    6 ms a row instead of 33, the reading included, for a detector's 36 x 2048.
    """
    if not scalar.is_valid:
        return None
    values, shape = scalar.values, [len(scalar.values)]
    while _holds_numbers(values.type):
        lengths = values.value_lengths()
        if values.null_count or len(lengths.unique()) != 1:
            return variable(scalar.as_py())
        shape.append(lengths[0].as_py())
        values = values.flatten()
    if values.null_count or not len(values):
        return variable(scalar.as_py())
    return values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(shape)


def _keep_values(array: pa.Array, column: KeepColumn, errors: dict[int, RowError]) -> list[Any]:
    """Passthrough values from which `pa.array(values, column.type)` makes the same array again.

    Times and dates are their integers: datetime knows neither nanoseconds nor every year, and is slow.
    """
    kind, plain = column.type, _plain(column.type)
    for wanted in (kind, plain):
        array = array if array.type.equals(wanted) else array.cast(wanted)
    return _values(array, column.name, errors)


def _plain(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_temporal(kind):
        return pa.int32() if kind.bit_width == 32 else pa.int64()
    if types.is_struct(kind):
        return pa.struct([f.with_type(_plain(f.type)) for f in kind])
    if types.is_fixed_size_list(kind):
        return pa.list_(_plain(kind.value_type), kind.list_size)
    if types.is_large_list(kind):
        return pa.large_list(_plain(kind.value_type))
    if types.is_list(kind):
        return pa.list_(_plain(kind.value_type))
    return kind
