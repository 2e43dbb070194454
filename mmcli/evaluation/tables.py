"""Tables of predictions or truth, in batches of columns: Parquet, JSONL, CSV, TSV, JSON lists, annotations."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from mmcli.core.errors import ConfigError

BATCH_ROWS = 8192
# How many rows of a text format are read to learn its columns.
SAMPLE_ROWS = 1000
# What a cell is as a Python value: text, a number or truth value, a list, a list of numbers, anything else.
Holds = Literal["text", "scalar", "list", "vector", "other"]
# name -> Arrow column or list of Python values, as many as the batch has rows
Batch = dict[str, Any]
Read = Callable[[Sequence[str]], Iterator[Batch]]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows that can be read several times.

    name         as the user knows it
    columns      what each holds
    read         batches of the named columns, in row order; raises ConfigError when a row cannot be read
    annotations  whether it is an annotation file of COCO or VQA, whose ids are the pictures' or questions'
    job          what mmcli says of a run that wrote it: task, model, ...
    notes        what a reader of a report should know of it
    """

    name: str
    columns: dict[str, Holds]
    read: Read
    annotations: bool = False
    job: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def vectors(self) -> list[str]:
        return [name for name, holds in self.columns.items() if holds == "vector"]


def open_table(path: str) -> Table:
    """A file, or a folder of Parquet files; its name tells the format. Raises ConfigError."""
    place = Path(path)
    if place.is_dir():
        parts = sorted(p for p in place.glob("*.parquet") if p.is_file())
        if not parts:
            raise ConfigError(f"{path} is a folder without Parquet files (*.parquet)")
        return _parquet(path, parts)
    if not place.exists():
        raise ConfigError(f"{path} does not exist")
    name = place.name.lower().removesuffix(".gz")
    for suffixes, opener in _FORMATS.items():
        if name.endswith(suffixes):
            with _readable(path):
                return opener(path)
    known = ", ".join(s for suffixes in _FORMATS for s in suffixes)
    raise ConfigError(f"cannot tell the format of {path} by its name; give a file that ends with {known}")


def arrow_columns(schema: pa.Schema) -> dict[str, Holds]:
    """What the columns of an Arrow schema hold."""
    return {f.name: _holds(f.type) for f in schema}


def values(column: Any) -> list[Any]:
    """One Python value per row."""
    found: list[Any] = column.to_pylist() if isinstance(column, pa.Array | pa.ChunkedArray) else column
    return found


def vectors(column: Any, name: str) -> np.ndarray:
    """float32 [n, D], NaN where a row has no vector. Raises ConfigError for vectors of several lengths."""
    if isinstance(column, pa.FixedSizeListArray):
        size = column.type.list_size
        flat = column.values[column.offset * size : (column.offset + len(column)) * size]
        found: np.ndarray = flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), size)
        found[~column.is_valid().to_numpy(zero_copy_only=False)] = np.nan
        return found
    rows = values(column)
    sizes = {len(row) for row in rows if row is not None}
    if len(sizes) > 1:
        raise ConfigError(
            f"the vectors of column {name} have several lengths: {', '.join(map(str, sorted(sizes)))}"
        )
    size = sizes.pop() if sizes else 0
    filled = [row if row is not None else [np.nan] * size for row in rows]
    try:
        return np.array(filled, np.float32).reshape(len(rows), size)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"column {name} holds something else than numbers: {error}") from error


def _holds(kind: pa.DataType) -> Holds:
    types = pa.types
    if types.is_dictionary(kind):
        return _holds(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return "vector" if types.is_floating(kind.value_type) else "list"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        return "scalar"
    return "other"


# Parquet --------------------------------------------------------------------------------------------------------


def _open_parquet(path: str) -> Table:
    return _parquet(path, [Path(path)])


def _parquet(name: str, parts: Sequence[Path]) -> Table:
    with _readable(str(parts[0])):
        schema = pq.read_schema(parts[0])

    def read(columns: Sequence[str]) -> Iterator[Batch]:
        for part in parts:
            with _readable(str(part)), pq.ParquetFile(part) as file:
                lacking = [c for c in columns if c not in file.schema_arrow.names]
                if lacking:
                    raise ConfigError(f"{part} has no column {', '.join(lacking)}, which {parts[0]} has")
                # Without a column there would be no rows either.
                for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
                    yield {c: batch.column(c) for c in columns}

    return Table(name, arrow_columns(schema), read)


# Text -----------------------------------------------------------------------------------------------------------


def _open_jsonl(path: str) -> Table:
    def rows() -> Iterator[dict[str, Any]]:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _object(line, f"{path} line {number}")

    return _table_of_rows(path, rows)


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            # Python's own writers give NaN, which orjson refuses.
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is no JSON object")
    return row


def _open_json(path: str) -> Table:
    """A list of objects, or an object with such a list under `annotations`, as COCO and VQA v2 have."""
    with _open(path) as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
    annotations = isinstance(content, dict) and isinstance(content.get("annotations"), list)
    found = content["annotations"] if annotations else content
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ConfigError(
            f"{path} is neither a JSON list of objects nor an object with such a list under 'annotations'"
        )
    return _table_of_rows(path, lambda: iter(found), annotations=annotations)


def _table_of_rows(name: str, rows: Callable[[], Iterator[dict[str, Any]]], annotations: bool = False) -> Table:
    columns: dict[str, Holds] = {}
    for row in islice(rows(), SAMPLE_ROWS):
        for key, value in row.items():
            if columns.get(key, "other") == "other":
                columns[key] = _holds_value(value)
    if not columns:
        raise ConfigError(f"{name} has no rows")

    def read(wanted: Sequence[str]) -> Iterator[Batch]:
        waiting = rows()
        while batch := list(islice(waiting, BATCH_ROWS)):
            yield {c: [row.get(c) for row in batch] for c in wanted}

    return Table(name, columns, read, annotations)


def _holds_value(value: Any) -> Holds:
    if isinstance(value, str):
        return "text"
    if isinstance(value, int | float):
        return "scalar"
    if isinstance(value, list):
        return "vector" if value and all(isinstance(v, float) for v in value) else "list"
    return "other"


def _open_csv(path: str, delimiter: str = ",") -> Table:
    def lines() -> Iterator[list[str]]:
        csv.field_size_limit(2**27)
        with _open(path) as file:
            text = (line.decode("utf-8-sig" if first else "utf-8") for first, line in _first(file))
            try:
                yield from (cells for cells in csv.reader(text, delimiter=delimiter) if cells)
            except csv.Error as error:
                raise ConfigError(f"{path}: {error}") from error

    header = next(lines(), None)
    if header is None:
        raise ConfigError(f"{path} is empty; its first line must name the columns")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ConfigError(f"{path} has more than one column named {', '.join(map(repr, twice))}")

    def read(wanted: Sequence[str]) -> Iterator[Batch]:
        waiting = islice(lines(), 1, None)
        places = [header.index(c) for c in wanted]
        done = 0
        while batch := list(islice(waiting, BATCH_ROWS)):
            for number, cells in enumerate(batch, done + 1):
                if len(cells) != len(header):
                    raise ConfigError(f"{path} row {number} has {len(cells)} cells, the header {len(header)}")
            done += len(batch)
            yield {c: [cells[at] for cells in batch] for c, at in zip(wanted, places, strict=True)}

    return Table(path, dict.fromkeys(header, "text"), read)


def _open_tsv(path: str) -> Table:
    return _open_csv(path, "\t")


def _first(file: IO[bytes]) -> Iterator[tuple[bool, bytes]]:
    return ((number == 0, line) for number, line in enumerate(file))


@contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    with _readable(path), open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            file.seek(0)
            with gzip.open(file, "rb") as unpacked:
                yield unpacked  # type: ignore[misc]
        else:
            file.seek(0)
            yield file


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Whatever keeps a file from being read is a ConfigError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    except (OSError, EOFError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        raise ConfigError(f"cannot read {path}: {reason}") from error


_FORMATS: dict[tuple[str, ...], Callable[[str], Table]] = {
    (".parquet", ".pq"): _open_parquet,
    (".jsonl", ".ndjson"): _open_jsonl,
    (".csv",): _open_csv,
    (".tsv",): _open_tsv,
    (".json",): _open_json,
}
