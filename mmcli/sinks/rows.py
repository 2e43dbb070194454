"""Rows of an output read back, finished or not: for looking at them, and for telling whether inputs changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmcli.core.errors import StateMismatch
from mmcli.sinks.formats import load_format
from mmcli.sinks.npy import ROW_COLUMN
from mmcli.sinks.outputs import OutputInfo, finished_output, read_run
from mmcli.sinks.parquet import READ_ROWS, batches, open_parquet
from mmcli.sinks.parts import FINGERPRINT_KEY, SIGNATURES, Part, part_signatures, read_parts
from mmcli.sinks.place import Place
from mmcli.sinks.previous import PREVIOUS_FOLDER


def read_rows(info: OutputInfo, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """`columns` (no vectors) of every row of an output, in row order; of an unfinished one the committed rows.

    Raises StateMismatch for a damaged output, OSError when it cannot be read.
    """
    if not info.complete:
        return batches([part.path for part in read_parts(Place.of(info.path, info.format).staging)], columns)
    if info.format == "npy":
        return _npy_rows(info.path, columns)
    if info.format == "parquet":
        return batches([info.path / name for name in info.files] or [info.path], columns)
    return load_format(info.format).read(info.path, pa.schema([info.schema.field(name) for name in columns]))


def error_rows(info: OutputInfo, limit: int) -> list[dict[str, Any]]:
    """The first `limit` error rows: id, error_code, error_stage, error_message."""
    columns = ["id", "error_code", "error_stage", "error_message"]
    found: list[dict[str, Any]] = []
    for batch in read_rows(info, columns):
        if len(found) >= limit:
            break
        failed = batch.filter(batch.column("error_code").is_valid())
        found += failed.slice(0, limit - len(found)).to_pylist()
    return found


@dataclass(frozen=True, slots=True)
class KnownRows:
    """What is there of an earlier run: its Job (as from `Job.to_dict`), and who its rows are.

    complete  whether these are all of its rows
    """

    job: dict[str, Any]
    complete: bool
    rows: int
    _batches: Iterator[pa.RecordBatch]
    _signatures: Iterator[pa.Array]

    def __iter__(self) -> Iterator[tuple[str, bool, bytes | None]]:
        """(id, whether its status is ok, signature where it is known) of each row."""
        signatures = (s for array in self._signatures for s in array.to_pylist())
        for batch in self._batches:
            status = batch.column("status").to_pylist()
            for name, state in zip(batch.column("id").to_pylist(), status, strict=True):
                yield name, state == "ok", next(signatures, None)


def known_rows(place: Place) -> KnownRows | None:
    """The rows that --retry-errors or --update start from; None when there are none."""
    final = finished_output(place)
    if final is not None:
        return KnownRows(final.job, True, final.rows, read_rows(final, ["id", "status"]), _sidecar(place, final))
    folders = [place.staging, place.staging / PREVIOUS_FOLDER]
    found = [(run, read_parts(folder)) for folder in folders if (run := read_run(folder))]
    if not found:
        return None
    run, parts = max(found, key=lambda pair: _stop(pair[1]))
    signatures = (part_signatures(part).column(0).combine_chunks() for part in parts)
    rows = batches([part.path for part in parts], ["id", "status"])
    return KnownRows(run["job"], False, _stop(parts), rows, signatures)


def _stop(parts: Sequence[Part]) -> int:
    return parts[-1].stop if parts else 0


def _sidecar(place: Place, final: OutputInfo) -> Iterator[pa.Array]:
    """The signatures of a finished output; none when they belong to another one."""
    try:
        footer = pq.read_metadata(place.signatures)
    except (OSError, pa.ArrowException):
        return
    if (footer.metadata or {}).get(FINGERPRINT_KEY) != final.fingerprint.encode():
        return
    with open_parquet(place.signatures) as file:
        for batch in file.iter_batches(columns=SIGNATURES.names):
            yield batch.column(0)


def _npy_rows(out: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Good rows are in metadata/, the others in errors/: merge them by the row they come from."""
    schema = pq.read_schema(out / "errors" / "errors_0.parquet")
    wanted = pa.schema([schema.field(name) for name in (*columns, ROW_COLUMN)])
    waiting = [_shards(out, "metadata", wanted), _shards(out, "errors", wanted)]
    heads: list[pa.Table | None] = [next(stream, None) for stream in waiting]
    while any(head is not None for head in heads):
        # Rows up to the end of the table that ends first are all here.
        last = min(head[ROW_COLUMN][-1].as_py() for head in heads if head is not None)
        ready = []
        for index, head in enumerate(heads):
            if head is None:
                continue
            count = int((head[ROW_COLUMN].to_numpy() <= last).sum())
            ready.append(head.slice(0, count))
            rest = head.slice(count)
            heads[index] = rest if len(rest) else next(waiting[index], None)
        table = pa.concat_tables(ready).sort_by(ROW_COLUMN)
        yield from table.select(list(columns)).combine_chunks().to_batches()


def _shards(out: Path, folder: str, wanted: pa.Schema) -> Iterator[pa.Table]:
    """Tables with the columns `wanted`; `status` of metadata is ok, the error columns are null."""
    for path in sorted((out / folder).glob(f"{folder}_*.parquet")):
        try:
            with open_parquet(path) as file:
                here = [name for name in wanted.names if name in file.schema_arrow.names]
                for batch in file.iter_batches(READ_ROWS, columns=here):
                    rows = batch.num_rows
                    missing = {"status": pa.array(["ok"] * rows, pa.string())}
                    arrays = [
                        batch.column(f.name) if f.name in here else missing.get(f.name, pa.nulls(rows, f.type))
                        for f in wanted
                    ]
                    if rows:
                        yield pa.table(arrays, schema=wanted)
        except (pa.ArrowException, KeyError) as error:
            raise StateMismatch(f"{path} is damaged: {str(error).splitlines()[0]}") from error
