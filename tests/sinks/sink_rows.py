"""Rows with known values, runs that write them, and ways to read any output back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmcli.core.job import Job
from mmcli.sinks.commit import Mode, Staging
from mmcli.sinks.outputs import RunSpec

D = 4
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("path", pa.string()),
        pa.field("modality", pa.string()),
        pa.field("embedding", pa.list_(pa.float32(), D)),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error_code", pa.string()),
        pa.field("error_stage", pa.string()),
        pa.field("error_message", pa.string()),
    ]
)
# (output, format) of every kind of output; contract tests run over all of them.
OUTPUTS = [("out.parquet", "parquet"), ("out.jsonl", "jsonl"), ("parts/", "parquet"), ("arrays/", "npy")]


def is_error(row: int) -> bool:
    return row % 7 == 3


def table(start: int, stop: int, value: float = 0.0, modality: str = "image") -> pa.Table:
    """Rows start to stop; every 7th is an error. Vectors hold row + value + 0, 1, 2, 3 over 8."""
    rows = range(start, stop)
    bad = [is_error(row) for row in rows]
    flat = (np.arange(start, stop)[:, None] + value + np.arange(D) / 8).astype(np.float32).reshape(-1)
    mask = pa.array(bad, pa.bool_())
    columns = [
        [f"{row}.jpg" for row in rows],
        [f"photos/{row}.jpg" for row in rows],
        [modality] * len(rows),
        pa.FixedSizeListArray.from_arrays(pa.array(flat), type=SCHEMA.field("embedding").type, mask=mask),
        ["error" if b else "ok" for b in bad],
        pa.array(["corrupt" if b else None for b in bad], pa.string()),
        pa.array(["decode" if b else None for b in bad], pa.string()),
        pa.array(['it is "broken"\n' if b else None for b in bad], pa.string()),
    ]
    return pa.table(columns, schema=SCHEMA)


def signature_of(row: int) -> bytes:
    return b"%016d" % row


def spec(format_name: str, inputs: str = "a", model: str = "clip", schema: pa.Schema = SCHEMA) -> RunSpec:
    job = Job("embed", {"id": model}, {"normalize": True}, {"digest": inputs})
    return RunSpec(job, schema, format_name, {"mmcli_version": "0.1"})


def write(
    out: str, run: RunSpec, cuts: list[int], mode: Mode = "new", value: float = 0.0, finalise: bool = True
) -> Staging:
    """A run as the engine does it: parts end at `cuts`, whatever is committed already is skipped."""
    with Staging(out, run.format) as staging:
        staging.open(run, mode)
        if staging.complete:
            return staging
        if mode == "update":
            staging.previous(["embedding"])
        for stop in cuts:
            start = staging.next_row
            if start < stop:
                signatures = [signature_of(row) for row in range(start, stop)]
                staging.commit(table(start, stop, value), start, signatures)
        if finalise:
            staging.finalise(cuts[-1] if cuts else 0)
    return staging


Rows = list[tuple[str, str, Any]]


def expected(count: int, value: float = 0.0) -> Rows:
    return [
        (f"{r}.jpg", "error", None) if is_error(r) else (f"{r}.jpg", "ok", [r + value + d / 8 for d in range(D)])
        for r in range(count)
    ]


def read_rows(out: str, format_name: str) -> Rows:
    """(id, status, vector) of each row of a finished output, read without mmcli."""
    if format_name == "parquet":
        found = pq.read_table(out.rstrip("/")).to_pylist()
    elif format_name == "jsonl":
        with open(out, "rb") as file:
            content = file.read()
        assert content == b"" or content.endswith(b"\n")
        found = [json.loads(line) for line in content.splitlines()]
    else:
        found = _read_npy(Path(out))
    return [(row["id"], row["status"], row["embedding"]) for row in found]


def _read_npy(out: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted((out / "metadata").glob("*.parquet")):
        number = path.stem.partition("_")[2]
        metadata = pq.read_table(path).to_pylist()
        (array,) = [np.load(p) for p in out.glob(f"*emb/*_{number}.npy")]
        assert array.dtype == np.float16
        assert len(array) == len(metadata)
        found += [
            {**row, "status": "ok", "embedding": vector.tolist()}
            for row, vector in zip(metadata, array.astype(float), strict=True)
        ]
    for row in pq.read_table(out / "errors" / "errors_0.parquet").to_pylist():
        found.append({**row, "embedding": None})
    return sorted(found, key=lambda row: row["input_row"])


def leftovers(folder: Path) -> list[str]:
    """Names of unfinished business anywhere in a folder."""
    return [p.name for p in folder.rglob("*") if p.name.endswith((".mmcli", ".tmp", ".trash", ".part"))]


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
