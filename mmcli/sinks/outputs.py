"""What an output on disk is: finished or not, of which job, how many rows."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmcli.core.errors import ConfigError, StateMismatch
from mmcli.core.job import Job
from mmcli.core.state import JOB_SHAPE, DamagedState, Shape, check_state, read_state
from mmcli.sinks.formats import FORMATS
from mmcli.sinks.parts import JOB_KEY, read_parts, total_errors
from mmcli.sinks.place import Place

JOB_FIELDS = ("task", "model", "options", "inputs")
RUN_FILE, SWAP_FILE = "run.json", "swap.json"
ANEW = "add --overwrite to start anew"
_RUN: Shape = {
    "fingerprint": str, "job": JOB_SHAPE, "mode": str, "format": str, "metadata": dict, "arrow_schema": str,
}  # fmt: skip
_FINISHED: Shape = {**JOB_SHAPE, "fingerprint": str, "format": str, "rows": int, "errors": dict, "notes": list}


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

    Raises ConfigError when there is nothing or it cannot be read, StateMismatch when it was not written by mmcli,
    DamagedState when it was and is damaged.
    """
    try:
        return _read_output(Path(path))
    except DamagedState as error:
        if error.hint == ANEW:
            # To who reads it: only who writes has the command at hand.
            error.hint = "the command that wrote it again, with --overwrite"
        raise
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error


def _read_output(path: Path) -> OutputInfo:
    place = Place.of(path)
    swap = read_swap(place)
    if swap is not None:
        # Killed or still busy between the moves: the next run completes them.
        return replace(_described(place, swap["metadata"], place.staging / SWAP_FILE), complete=False)
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
    metadata = read_state(place.metadata, {}, ANEW)
    if metadata is not None and metadata.get("bytes") == place.out.stat().st_size:
        return _described(place, metadata, place.metadata)
    return _finished_parquet(place)


def _finished_folder(place: Place, whole: bool) -> OutputInfo | None:
    metadata = read_state(place.metadata, {}, ANEW)
    if metadata is not None and "fingerprint" in metadata:
        info = _described(place, metadata, place.metadata)
        lost = [name for name in info.files if not (place.out / name).is_file()]
        if whole and lost:
            raise StateMismatch(
                f"{place.out} was complete, but of its {len(info.files)} files {len(lost)} are gone: {lost[0]}",
                hint=f"bring it back, or {ANEW}",
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
    return _info(place, metadata, schema, f"{place.out} (its metadata, key mmcli)")


def _foreign(place: Place) -> StateMismatch:
    return StateMismatch(
        f"{place.out} exists and was not written by mmcli, or was changed since",
        hint="choose another name, or add --overwrite to replace it",
    )


def _described(place: Place, metadata: Any, file: Path) -> OutputInfo:
    """The finished output that `metadata`, from `file`, is of."""
    known = check_state(metadata, {"arrow_schema": str}, str(file), ANEW)
    return _info(place, known, decode_schema(known, str(file)), str(file))


def _info(place: Place, metadata: Any, schema: pa.Schema, where: str) -> OutputInfo:
    known = check_state(metadata, _FINISHED, where, ANEW)
    _check_values(known, where)
    return OutputInfo(
        path=place.out,
        format=known["format"],
        complete=True,
        rows=known["rows"],
        schema=schema.remove_metadata(),
        metadata=known,
        files=list(known.get("files") or []),
    )


def _check_values(metadata: dict[str, Any], where: str) -> None:
    """Raise StateMismatch for lists and counts that hold something else, and for a format that there is none of."""
    if metadata["format"] not in FORMATS:
        raise DamagedState(f"{where} is damaged: format is {metadata['format']!r}", hint=ANEW)
    lists = {name: metadata.get(name) or [] for name in ("files", "notes")}
    check_state(lists, dict.fromkeys(lists, list), where, ANEW)
    for name, values in lists.items():
        numbered = {f"{name}[{index}]": value for index, value in enumerate(values)}
        check_state(numbered, dict.fromkeys(numbered, str), where, ANEW)
    errors = metadata.get("errors") or {}
    check_state({"errors": errors}, {"errors": dict.fromkeys(errors, int)}, where, ANEW)


def read_run(folder: Path) -> dict[str, Any] | None:
    """What run.json says of the unfinished output in `folder`; None when there is none.

    Raises StateMismatch for a damaged one, OSError.
    """
    run = read_state(folder / RUN_FILE, _RUN, ANEW)
    if run is not None:
        where = str(folder / RUN_FILE)
        _check_values({**run["metadata"], "format": run["format"]}, where)
        decode_schema(run, where)
    return run


def read_swap(place: Place) -> dict[str, Any] | None:
    """The moves that make an output a finished one, when these have begun. Raises StateMismatch, OSError."""
    path = place.staging / SWAP_FILE
    hint = f"rm -r '{place.staging}', then the same command with --overwrite: its rows are computed again"
    swap = read_state(path, {"moves": list, "delete": list, "metadata": dict}, hint)
    if swap is not None:
        names = {f"delete[{index}]": name for index, name in enumerate(swap["delete"])}
        check_state(names, dict.fromkeys(names, str), str(path), hint)
        if not swap["moves"] or not all(_is_move(move) for move in swap["moves"]):
            raise DamagedState(f"{path} is damaged: moves are not all pairs of names", hint=hint)
    return swap


def _is_move(value: Any) -> bool:
    return isinstance(value, list) and [type(end) for end in value] == [str, str]


def _unfinished_output(place: Place) -> OutputInfo | None:
    run = read_run(place.staging)
    if run is None:
        return None
    parts = [p for p in read_parts(place.staging) if p.fingerprint == run["fingerprint"]]
    rows = parts[-1].stop if parts else 0
    told = {"fingerprint": run["fingerprint"], "errors": dict(sorted(total_errors(parts).items())), "rows": rows}
    schema = decode_schema(run, str(place.staging / RUN_FILE))
    return OutputInfo(place.out, run["format"], False, rows, schema, {**run["metadata"], **run["job"], **told})


def encode_schema(schema: pa.Schema) -> str:
    """An Arrow schema as text, for JSON."""
    return base64.b64encode(schema.remove_metadata().serialize()).decode()


def decode_schema(value: dict[str, Any], where: str) -> pa.Schema:
    """The schema in a JSON object, of `where`, that holds one under `arrow_schema`. Raises StateMismatch."""
    try:
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(value["arrow_schema"])))
    except (ValueError, OSError, EOFError, pa.ArrowException) as error:
        raise DamagedState(f"{where} is damaged: arrow_schema is none", hint=ANEW) from error


def without_inputs(job: dict[str, Any]) -> dict[str, Any]:
    """A Job (as from `Job.to_dict`) over any inputs."""
    return {**job, "inputs": {}}
