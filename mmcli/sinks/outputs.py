"""What an output on disk is: finished or not, of which job, how many rows."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmcli.core.durable import read_json
from mmcli.core.errors import ConfigError, StateMismatch
from mmcli.core.job import Job
from mmcli.sinks.parts import JOB_KEY, read_parts, total_errors
from mmcli.sinks.place import Place

JOB_FIELDS = ("task", "model", "options", "inputs")
RUN_FILE, SWAP_FILE = "run.json", "swap.json"


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What a run writes.

    schema    columns of the output, known before the first row
    format    "parquet", "jsonl" or "npy"
    metadata  more for the output's file-level metadata; the Job and its fingerprint are added to it
    """

    job: Job
    schema: pa.Schema
    format: str
    metadata: dict[str, Any]

    def stored_metadata(self) -> dict[str, Any]:
        return {**self.metadata, **self.job.to_dict(), "fingerprint": self.job.fingerprint()}


@dataclass(frozen=True, slots=True)
class OutputInfo:
    """An output, or what an unfinished run has committed of it.

    format    "parquet", "jsonl" or "npy"; what an unfinished run will become
    complete  whether all rows are there
    rows      how many are
    metadata  as the run was given it, with `fingerprint`, `rows`, `errors`, `notes`
    files     the files of a finished folder, relative to it
    """

    path: Path
    format: str
    complete: bool
    rows: int
    schema: pa.Schema
    metadata: dict[str, Any]
    files: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        return str(self.metadata.get("fingerprint"))

    @property
    def job(self) -> dict[str, Any]:
        """The Job, as `Job.to_dict` gives it."""
        return {name: self.metadata.get(name) for name in JOB_FIELDS}

    @property
    def errors(self) -> dict[str, int]:
        """Error rows by code."""
        return dict(self.metadata.get("errors") or {})

    @property
    def notes(self) -> list[str]:
        return list(self.metadata.get("notes") or [])


def read_output(path: str | Path) -> OutputInfo:
    """Read what is known about an output, finished or not, without reading its rows.

    Raises ConfigError when there is nothing or it cannot be read, StateMismatch when it was not written by mmcli
    or is damaged.
    """
    try:
        return _read_output(Path(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error


def _read_output(path: Path) -> OutputInfo:
    place = Place.of(path)
    swap = read_json(place.staging / SWAP_FILE)
    if swap is not None:
        # Killed or still busy between the moves: the next run completes them.
        return replace(_info(place, swap["metadata"], decode_schema(swap["metadata"])), complete=False)
    info = finished_output(place) or _unfinished_output(place)
    if info is None:
        raise ConfigError(f"there is no output at {path}; give what a run was given as -o")
    return info


def finished_output(place: Place, whole: bool = True) -> OutputInfo | None:
    """The finished output at a place; None when there is none. `whole`: a folder has to hold all of its files.

    Raises StateMismatch for a file that mmcli did not write, or that was changed since; OSError when it cannot
    be read.
    """
    if not place.out.exists():
        return None
    if place.folder:
        return _finished_folder(place, whole)
    metadata = read_json(place.metadata)
    if metadata is not None and metadata.get("bytes") == place.out.stat().st_size:
        return _info(place, metadata, decode_schema(metadata))
    return _finished_parquet(place)


def _finished_folder(place: Place, whole: bool) -> OutputInfo | None:
    metadata = read_json(place.metadata)
    if metadata is not None and "fingerprint" in metadata:
        info = _info(place, metadata, decode_schema(metadata))
        lost = [name for name in info.files if not (place.out / name).is_file()]
        if whole and lost:
            raise StateMismatch(
                f"{place.out} was complete, but of its {len(info.files)} files {len(lost)} are gone: {lost[0]}",
                hint="bring it back, or add --overwrite to start anew",
            )
        return info
    if any(not entry.name.startswith(".") for entry in place.out.iterdir()):
        raise _foreign(place)
    return None


def _finished_parquet(place: Place) -> OutputInfo:
    try:
        schema = pq.read_schema(place.out)
        metadata = json.loads((schema.metadata or {})[JOB_KEY])
        metadata["rows"], metadata["fingerprint"]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise _foreign(place) from error
    return _info(place, metadata, schema)


def _foreign(place: Place) -> StateMismatch:
    return StateMismatch(
        f"{place.out} exists and was not written by mmcli, or was changed since",
        hint="choose another name, or add --overwrite to replace it",
    )


def _info(place: Place, metadata: dict[str, Any], schema: pa.Schema) -> OutputInfo:
    return OutputInfo(
        path=place.out,
        format=str(metadata.get("format")),
        complete=True,
        rows=int(metadata["rows"]),
        schema=schema.remove_metadata(),
        metadata=metadata,
        files=list(metadata.get("files") or []),
    )


def _unfinished_output(place: Place) -> OutputInfo | None:
    run = read_json(place.staging / RUN_FILE)
    if run is None:
        return None
    parts = [p for p in read_parts(place.staging) if p.fingerprint == run["fingerprint"]]
    rows = parts[-1].stop if parts else 0
    metadata = {**run["job"], **run["metadata"], "errors": dict(sorted(total_errors(parts).items())), "rows": rows}
    return OutputInfo(place.out, run["format"], False, rows, decode_schema(run), metadata)


def encode_schema(schema: pa.Schema) -> str:
    """An Arrow schema as text, for JSON."""
    return base64.b64encode(schema.remove_metadata().serialize()).decode()


def decode_schema(value: dict[str, Any]) -> pa.Schema:
    """The schema in a JSON object that holds one under `arrow_schema`."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(value["arrow_schema"])))


def without_inputs(job: dict[str, Any]) -> dict[str, Any]:
    """A Job (as from `Job.to_dict`) over any inputs."""
    return {**job, "inputs": {}}
