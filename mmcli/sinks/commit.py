"""The commit protocol: rows become durable in parts, and the output appears when it is complete.

    OUT.mmcli/ (or DIR/.mmcli/ for a folder)
        lock                   held while a run is alive
        run.json               the run's fingerprint and readable Job
        part-000000.parquet    rows, with their own row numbers: the only record of progress
        inputs-000000.parquet  their signatures, committed before the part
        previous/              parts of an interrupted run over other inputs, which --update reuses
        .final.tmp             the finished Parquet file, as far as there are parts of it; may be lost
        final/                 the finished output, before it is moved to its name
        swap.json              the list of moves; from here on the output is complete, whatever happens

Every step can be the last one of a process: the next run finds either the old or the new state.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import pyarrow as pa

from mmcli.core.durable import (
    TEMPORARY_SUFFIX,
    fsync_folder,
    make_folder,
    output_errors,
    remove,
    temporary_name,
    write_durably,
    write_json,
)
from mmcli.core.errors import MmcliError, StateMismatch
from mmcli.core.job import differences
from mmcli.sinks.ahead import Ahead
from mmcli.sinks.finalise import FINAL_FOLDER, apply_swap, discard_staging, finalise
from mmcli.sinks.formats import load_format
from mmcli.sinks.lock import Lock
from mmcli.sinks.outputs import (
    RUN_FILE,
    SWAP_FILE,
    OutputInfo,
    RunSpec,
    decode_schema,
    encode_schema,
    finished_output,
    read_run,
    without_inputs,
)
from mmcli.sinks.parquet import ParquetFormat
from mmcli.sinks.parts import (
    Part,
    errors_by_code,
    part_files,
    part_name,
    read_parts,
    signature_table,
    signatures_path,
    total_errors,
    write_part,
)
from mmcli.sinks.place import Place
from mmcli.sinks.previous import PREVIOUS_FOLDER, PreviousRows

Mode = Literal["new", "overwrite", "update"]


class Staging:
    """The unfinished state of one output, under its lock. A context manager:

        with Staging(out, format) as staging:
            snapshot = source.snapshot(staging.folder)
            staging.open(spec, mode)
            if not staging.complete:
                run(output=staging, start_row=staging.next_row, previous=staging.previous(columns))
                staging.finalise(rows_expected)

    Entering raises TryAgain when another run holds the lock, ConfigError or OutputError when there is no place.
    """

    immediate = False

    def __init__(self, out: str, format_name: str = "parquet") -> None:
        self.place = Place.of(out, format_name)
        self.folder = self.place.staging
        self.complete = False
        self._lock = Lock([self.place.out, self.folder] if self.place.folder else [self.folder])
        self._new_folder = False
        self._parts: list[Part] = []
        self._spec: RunSpec | None = None
        self._final: OutputInfo | None = None
        self._mode: Mode = "new"
        self._previous: PreviousRows | None = None
        self._ahead: Ahead | None = None

    def __enter__(self) -> Self:
        self.place.check_parent()
        self._new_folder = self.place.folder and not self.place.out.exists()
        self._lock.acquire()
        try:
            with output_errors(self.folder):
                if apply_swap(self.place):
                    # That has removed the folder, and the lock with it.
                    self._lock.release()
                    self._lock.acquire()
                for pattern in (f"*{TEMPORARY_SUFFIX}", FINAL_FOLDER, "index.*"):
                    for path in self.folder.glob(pattern):
                        remove(path)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            self._previous.close()
        if self._ahead is not None:
            self._ahead.discard()
        if self._lock.held:
            self._tidy()
        self._lock.release()

    @property
    def committed(self) -> list[tuple[int, int]]:
        """Row ranges (start, stop) that are safe on disk, in order."""
        return [(part.start, part.stop) for part in self._parts]

    @property
    def next_row(self) -> int:
        """The first row that is not committed."""
        return self._parts[-1].stop if self._parts else 0

    @property
    def errors(self) -> Counter[str]:
        """Committed error rows by code; of the finished output when it is complete."""
        if self.complete and self._final is not None:
            return Counter(self._final.errors)
        return total_errors(self._parts)

    def open(self, spec: RunSpec, mode: Mode = "new") -> None:
        """Find out what earlier runs have left, and get ready to commit rows from `next_row` on.

        new        start, or resume; a finished output of the same job is `complete`
        overwrite  start anew, whatever is there; resumes only an interrupted overwrite
        update     as new, but a finished output over other inputs is to be replaced, and its rows are reused

        Raises StateMismatch for another job's output or parts (with the differences), and for damaged ones;
        ConfigError when the format cannot hold the schema.
        """
        made = load_format(spec.format)
        made.check(spec.schema)
        self._spec, self._mode = spec, mode
        with output_errors(self.folder):
            self._final = self._open_final(spec, mode)
            if self.complete:
                return
            self._parts = self._open_parts(spec, mode)
            if not (self.folder / RUN_FILE).exists():
                write_json(self.folder / RUN_FILE, self._run_json(spec, mode))
        if isinstance(made, ParquetFormat) and not self.place.folder:
            self._ahead = Ahead(made, temporary_name(self.folder / FINAL_FOLDER), spec.schema)
            for part in self._parts:
                self._ahead.add(part.path)

    def previous(self, columns: Sequence[str]) -> PreviousRows | None:
        """The rows that --update can reuse: `modality` and `columns` of them. None when there are none."""
        assert self._spec is not None
        if self._mode != "update":
            return None
        with output_errors(self.folder):
            self._previous = PreviousRows.open(self._spec, self._final, self.folder, columns)
        return self._previous

    def commit(self, table: pa.Table, start_row: int, signatures: Sequence[bytes | None]) -> None:
        """Make `table` durable as rows `start_row` on, with one signature per row. All or none.

        Raises OutputError; what was committed before stays.
        """
        assert self._spec is not None
        if start_row != self.next_row or len(signatures) != len(table):
            raise MmcliError(
                f"internal error: {len(table)} rows from {start_row} with {len(signatures)} signatures were to be "
                f"committed after row {self.next_row}"
            )
        if not table.schema.equals(self._spec.schema):
            raise MmcliError(f"internal error: the rows have columns {table.schema}, not {self._spec.schema}")
        number = 1 + max((int(p.path.stem.partition("-")[2]) for p in self._parts), default=-1)
        part = Part(
            self.folder / part_name(number),
            start_row,
            start_row + len(table),
            self._spec.job.fingerprint(),
            errors_by_code(table),
        )
        known = signature_table(table, signatures)
        with output_errors(self.folder):
            try:
                self._write(part, table, known)
            except OSError:
                # What is written ahead may have taken the last space.
                if self._ahead is None or not self._ahead.discard():
                    raise
                self._write(part, table, known)
        self._parts.append(part)
        if self._ahead is not None:
            self._ahead.add(part.path)

    def _write(self, part: Part, table: pa.Table, signatures: pa.Table) -> None:
        """First the signatures, so that a part that exists has them."""
        assert self._spec is not None
        metadata = self._spec.stored_metadata()
        write_durably(part.signatures, lambda target: write_part(signatures, part, metadata, target))
        write_durably(part.path, lambda target: write_part(table, part, metadata, target))

    def finalise(self, rows_expected: int | None, notes: Sequence[str] = ()) -> None:
        """Make the committed parts the output, under its name, and remove the staging folder.

        Raises MmcliError when rows are missing, StateMismatch for a damaged part, OutputError.
        """
        assert self._spec is not None
        if rows_expected is not None and rows_expected != self.next_row:
            raise MmcliError(f"internal error: {self.next_row} of {rows_expected} rows were committed")
        if not self._parts:
            # An output without rows still has columns.
            self.commit(self._spec.schema.empty_table(), 0, [])
        if self._previous is not None:
            self._previous.close()
        with output_errors(self.place.out):
            old_files = self._final.files if self._final is not None else []
            finalise(self.place, self._spec, self._parts, [*notes], old_files, self._ahead)
        # The lock file went with the staging folder: another run may already have a new one.
        self._lock.release()
        self.complete = True

    # -- what earlier runs have left -----------------------------------------------------------------------

    def _open_final(self, spec: RunSpec, mode: Mode) -> OutputInfo | None:
        try:
            final = finished_output(self.place, whole=mode != "overwrite")
        except StateMismatch:
            if mode != "overwrite":
                raise
            return None
        if final is None or mode == "overwrite":
            return final
        same_format = final.format == spec.format
        changed = differences(final.job, spec.job.to_dict())
        if not same_format:
            changed.append(f"format: was {final.format}, is {spec.format}")
        if not changed and (mode == "new" or not final.errors):
            self.complete = True
        elif mode == "new" or without_inputs(final.job) != spec.job.without_inputs().to_dict():
            raise _mismatch(f"{self.place.out} is complete, but from another command", changed, mode)
        return final

    def _open_parts(self, spec: RunSpec, mode: Mode) -> list[Part]:
        try:
            parts = read_parts(self.folder)
            # One that has committed nothing binds nobody.
            run = read_run(self.folder) if parts else None
            columns = decode_schema(run, str(self.folder / RUN_FILE)) if run is not None else spec.schema
        except StateMismatch:
            if mode != "overwrite":
                raise
            return self._discard()
        if not parts and mode == "new" and (aside := read_run(self.folder / PREVIOUS_FOLDER)):
            changed = differences(aside["job"], spec.job.to_dict())
            raise _mismatch(f"{self.folder} holds an interrupted --update", changed, mode)
        if run is None:
            return self._set_aside() if mode == "update" and parts else self._discard()
        changed = differences(run["job"], spec.job.to_dict()) + columns_differ(columns, spec.schema)
        if mode == "new" and changed:
            raise _mismatch(f"{self.folder} holds an interrupted run of another command", changed, mode)
        if mode == "update" and without_inputs(run["job"]) != spec.job.without_inputs().to_dict():
            raise _mismatch(f"{self.folder} holds an interrupted run of another command", changed, mode)
        fingerprint = spec.job.fingerprint()
        if any(part.fingerprint != fingerprint for part in parts) and not changed:
            raise StateMismatch(
                f"{self.folder} holds parts of different runs", hint="add --overwrite to start anew"
            )
        resumable = {
            "new": True,
            "overwrite": run["mode"] == "overwrite" and not changed,
            # An interrupted plain run may hold error rows, which --update is to compute again.
            "update": not changed and (run["mode"] == "update" or not total_errors(parts)),
        }[mode]
        if resumable:
            return parts
        return self._set_aside() if mode == "update" else self._discard()

    def _discard(self) -> list[Part]:
        """Forget an interrupted run. First run.json, so that parts without it are known to be leftovers."""
        remove(self.folder / RUN_FILE)
        if self._mode != "update":
            remove(self.folder / PREVIOUS_FOLDER)
        for path in [*self.folder.glob("part-*.parquet"), *self.folder.glob("inputs-*.parquet")]:
            remove(path)
        fsync_folder(self.folder)
        return []

    def _set_aside(self) -> list[Part]:
        """Keep an interrupted run's parts for reuse; of two such runs the one with more rows."""
        aside = self.folder / PREVIOUS_FOLDER
        moving = not (self.folder / RUN_FILE).exists()
        if not moving:
            if _rows(aside) > _rows(self.folder):
                return self._discard()
            remove(aside)
            make_folder(aside)
            os.replace(self.folder / RUN_FILE, aside / RUN_FILE)
        elif not (aside / RUN_FILE).exists():
            return self._discard()
        for path in part_files(self.folder):
            if signatures_path(path).exists():
                os.replace(signatures_path(path), aside / signatures_path(path).name)
            os.replace(path, aside / path.name)
        fsync_folder(aside)
        return self._discard()

    def _run_json(self, spec: RunSpec, mode: Mode) -> dict[str, Any]:
        return {
            "fingerprint": spec.job.fingerprint(),
            "job": spec.job.to_dict(),
            "mode": mode,
            "format": spec.format,
            "metadata": spec.stored_metadata(),
            "arrow_schema": encode_schema(spec.schema),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        }

    def _tidy(self) -> None:
        """Remove the staging folder when it holds nothing worth keeping. Never raises: the run's error matters."""
        keeps = self._parts or part_files(self.folder) or (self.folder / PREVIOUS_FOLDER).exists()
        if (keeps and not self.complete) or (self.folder / SWAP_FILE).exists():
            return
        try:
            discard_staging(self.place)
            if self._new_folder and not self.complete:
                self.place.out.rmdir()
        except OSError:
            return


def _rows(folder: Path) -> int:
    try:
        parts = read_parts(folder)
    except (StateMismatch, OSError):
        return 0
    return parts[-1].stop if parts else 0


def columns_differ(old: pa.Schema, new: pa.Schema) -> list[str]:
    """Lines as `differences` gives them. The same command has other columns in another version of mmcli."""
    if old.equals(new):
        return []

    def told(schema: pa.Schema, name: str) -> str:
        if name not in schema.names:
            return "missing"
        field = schema.field(name)
        return f"{field.type}{'' if field.nullable else ' not null'}"

    names = dict.fromkeys([*old.names, *new.names])
    pairs = {name: (told(old, name), told(new, name)) for name in names}
    lines = [f"column {name}: was {a}, is {b}" for name, (a, b) in pairs.items() if a != b]
    return lines or [f"columns: were {', '.join(old.names)}, are {', '.join(new.names)}"]


def _mismatch(what: str, changed: list[str], mode: Mode) -> StateMismatch:
    only_inputs = all(line.startswith("inputs.") for line in changed)
    if only_inputs:
        what = what.replace("another command", "other inputs")
    hint = "add --update to bring it up to date, or --overwrite to start anew"
    if mode == "update" or not only_inputs:
        hint = "give the options of that command, or add --overwrite to start anew"
    return StateMismatch("\n".join([f"{what}:", *(f"  {line}" for line in changed)]), hint=hint)
