"""Parts: committed pieces of an output, each consecutive rows in one Parquet file that says which."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmcli.core.errors import StateMismatch
from mmcli.core.signature import SIGNATURE_BYTES
from mmcli.core.state import DamagedState, check_state
from mmcli.sinks.parquet import damaged_part, write_table

# Keys of a Parquet file's key-value metadata.
JOB_KEY, ROWS_KEY, FINGERPRINT_KEY, ERRORS_KEY = b"mmcli", b"mmcli.rows", b"mmcli.fingerprint", b"mmcli.errors"
SIGNATURES = pa.schema([pa.field("signature", pa.binary(SIGNATURE_BYTES))])


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `start` to `stop` (exclusive) of run `fingerprint`; `errors` counts its error rows by code."""

    path: Path
    start: int
    stop: int
    fingerprint: str
    errors: dict[str, int]

    @property
    def signatures(self) -> Path:
        return signatures_path(self.path)


def part_name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def signatures_path(part: Path) -> Path:
    return part.with_name(part.name.replace("part-", "inputs-", 1))


def part_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def write_part(table: pa.Table, part: Part, metadata: dict[str, Any], target: Path) -> None:
    """Write `table` as the file of `part`, under the name `target`."""
    own = {
        JOB_KEY: json.dumps(metadata),
        ROWS_KEY: f"{part.start}:{part.stop}",
        FINGERPRINT_KEY: part.fingerprint,
        ERRORS_KEY: json.dumps(part.errors),
    }
    write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **own}), target)


def read_part(path: Path) -> Part:
    """What a part says about itself. Raises StateMismatch when it cannot be read or was not written by mmcli."""
    with damaged_part(path):
        footer = pq.read_metadata(path)
    keys = footer.metadata or {}
    try:
        start, stop = (int(n) for n in keys[ROWS_KEY].split(b":"))
        errors = json.loads(keys[ERRORS_KEY])
        check_state(errors, dict.fromkeys(errors, int), "errors", "")
        part = Part(path, start, stop, keys[FINGERPRINT_KEY].decode(), errors)
    except (KeyError, ValueError, TypeError, DamagedState) as error:
        raise StateMismatch(
            f"{path} was not written by mmcli: it does not say which rows it holds",
            hint="move it away, or add --overwrite to start anew",
        ) from error
    if footer.num_rows != stop - start:
        raise StateMismatch(
            f"{path} is damaged: it says rows {start} to {stop} and holds {footer.num_rows}",
            hint="add --overwrite to start anew",
        )
    return part


def read_parts(folder: Path) -> list[Part]:
    """All parts of a folder, in row order. Raises StateMismatch for overlaps, gaps and damaged parts.

    10 million rows in 100 parts: 0.05 s, since only footers are read.
    """
    parts = sorted((read_part(path) for path in part_files(folder)), key=lambda p: (p.start, p.stop))
    row = 0
    for index, part in enumerate(parts):
        if part.start < row:
            raise StateMismatch(
                f"{part.path} and {parts[index - 1].path.name} both hold row {part.start}",
                hint="add --overwrite to start anew",
            )
        if part.start > row:
            raise StateMismatch(
                f"rows {row} to {part.start} are missing before {part.path}", hint="add --overwrite to start anew"
            )
        row = part.stop
    return parts


def errors_by_code(table: pa.Table) -> dict[str, int]:
    """How many rows have each error_code."""
    if "error_code" not in table.schema.names:
        return {}
    counts = pc.value_counts(table.column("error_code").drop_null())
    return dict(sorted((c["values"].as_py(), c["counts"].as_py()) for c in counts))


def total_errors(parts: Sequence[Part]) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part.errors)
    return total


def signature_table(table: pa.Table, signatures: Sequence[bytes | None]) -> pa.Table:
    """One signature per row; null where it is unknown and for error rows, which nothing may reuse."""
    column = pa.array(signatures, SIGNATURES.field(0).type)
    if "status" in table.schema.names:
        ok = pc.equal(table.column("status").combine_chunks(), "ok")
        column = pc.if_else(ok, column, pa.nulls(len(column), column.type))
    return pa.table([column], schema=SIGNATURES)


def part_signatures(part: Part) -> pa.Table:
    """The signatures of a part's rows; nulls, so that they are computed again, when their file is unusable."""
    rows = part.stop - part.start
    try:
        table = pq.read_table(part.signatures, schema=SIGNATURES)
    except (OSError, pa.ArrowException):
        table = SIGNATURES.empty_table()
    if len(table) != rows:
        return pa.table([pa.nulls(rows, SIGNATURES.field(0).type)], schema=SIGNATURES)
    return table


def to_bytes(signatures: pa.Array) -> bytes:
    """Signatures one after the other, 16 bytes each; zeros for null."""
    filled = pc.fill_null(signatures, bytes(SIGNATURE_BYTES))
    if isinstance(filled, pa.ChunkedArray):
        filled = filled.combine_chunks()
    buffer = np.frombuffer(filled.buffers()[1], np.uint8) if len(filled) else np.empty(0, np.uint8)
    start = filled.offset * SIGNATURE_BYTES
    return buffer[start : start + len(filled) * SIGNATURE_BYTES].tobytes()
