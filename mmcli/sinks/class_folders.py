"""Files in folders of their labels, FOLDER/cat/a.jpg, and a metadata.csv as Hugging Face's imagefolder reads it.

Written when all rows of an output are there, from these rows; doing it again changes nothing. FOLDER/.mmcli notes
what was put there, before it is put: so an interrupted run is completed by the next, and what belongs elsewhere now
is told from what others have put there, which is never replaced nor deleted.
"""

from __future__ import annotations

import csv
import errno
import os
import shutil
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from mmcli.core.durable import fsync_file, fsync_folder, output_error, write_json
from mmcli.core.errors import ConfigError, MmcliError, OutputError
from mmcli.core.records import Record, mtime_ns
from mmcli.sinks.class_names import LabelFolders, file_name, folder_name, shown
from mmcli.sinks.class_notes import (
    METADATA,
    NEW,
    NOTES,
    OWNER,
    PLACED,
    Entry,
    Into,
    Notes,
    digest_of,
    notes_error,
    read_owner,
    take,
)
from mmcli.sinks.outputs import finished_output
from mmcli.sinks.parquet import batches
from mmcli.sinks.parts import read_parts
from mmcli.sinks.place import Place
from mmcli.sinks.rows import read_rows

COLUMNS = ("file_name", "label", "score", "id")
# After one of these no further file can be put there either.
_HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Slot:
    """A label of a row: the prefix of its columns, and which medium it is of; None: the only one that is a file."""

    prefix: str = ""
    medium: int | None = None


@dataclass(slots=True)
class Tally:
    """What became of the files; with some counts goes the first name.

    placed      new ones, or replaced
    same        they were there
    removed     of an earlier run: they belong elsewhere now
    unlabelled  rows without a label
    errors      error rows
    homeless    labels of inputs that are no file of their own
    inside      labels of inputs that are in FOLDER itself
    changed     they were there, were changed since, and are left
    left        of an earlier run: they belong elsewhere, but were changed, or are the last copy
    failed      could not be read or written
    """

    copy: bool = False
    placed: int = 0
    same: int = 0
    removed: int = 0
    unlabelled: int = 0
    errors: int = 0
    homeless: int = 0
    inside: int = 0
    changed: int = 0
    left: int = 0
    failed: int = 0
    first_homeless: str = ""
    first_changed: str = ""
    first_left: str = ""
    failure: OutputError | None = None

    def count(self, what: str, name: str) -> None:
        """One more of `what`."""
        setattr(self, what, getattr(self, what) + 1)
        if not getattr(self, f"first_{what}"):
            setattr(self, f"first_{what}", shown(name))

    def fail(self, failure: OutputError, count: int = 1) -> None:
        """So many more that could not be read or written."""
        self.failed += count
        self.failure = self.failure or failure

    def line(self, folder: Path) -> str:
        """For the user, on one line."""
        told = [f"{self.placed:,} {'copied' if self.copy else 'linked'}"]
        told += [f"{self.same:,} were there"] * (self.same > 0)
        told += [f"{self.removed:,} that belong elsewhere now removed"] * (self.removed > 0)
        told += [f"{self.unlabelled:,} without a label left out"] * (self.unlabelled > 0)
        told += [f"{self.errors:,} error rows left out"] * (self.errors > 0)
        told += [f"{self.homeless:,} are no file of their own ({self.first_homeless})"] * (self.homeless > 0)
        told += [f"{self.inside:,} lie in it themselves and are left alone"] * (self.inside > 0)
        if self.changed:
            told.append(f"{self.changed:,} changed since they were put there are left ({self.first_changed})")
        if self.left:
            why = "since they were changed or their source is gone"
            told.append(f"{self.left:,} that belong elsewhere now are left, {why} ({self.first_left})")
        told += [f"{self.failed:,} failed"] * (self.failed > 0)
        return f"{shown(folder)}: {'; '.join(told)}"


def label_slots(columns: Sequence[str], slots: Sequence[str]) -> list[Slot]:
    """The labels in rows with these columns, of a source with these slots."""
    if "label" in columns:
        return [Slot()]
    return [Slot(f"{slot}_", i) for i, slot in enumerate(slots) if f"{slot}_label" in columns]


def labelled_rows(
    place: Place, complete: bool, columns: Sequence[str], slots: Sequence[Slot]
) -> Iterator[pa.RecordBatch]:
    """What is needed of all rows: of a finished output, else of the committed parts. `columns`: all there are."""
    mine = [slot.prefix + name for slot in slots for name in ("label", "score", "labels", "top_k")]
    wanted = ["id", "status", *(name for name in mine if name in columns)]
    final = finished_output(place) if complete else None
    if final is not None:
        return read_rows(final, wanted)
    return batches([part.path for part in read_parts(place.staging)], wanted)


def place_files(
    records: Iterator[Record], rows: Iterable[pa.RecordBatch], slots: Sequence[Slot], into: Into
) -> Tally:
    """Put the file of every row that has a label into the folder of that label; with several labels, of each.

    records  the inputs, in the order of the rows
    rows     from `labelled_rows`

    Failures are counted, and the first is kept; it is also in `Tally.failure` when nothing can be put there at all.
    About 100 us a link, for the file system and the notes; a copy is synced to disk.
    """
    tally = Tally(into.copy)
    try:
        take(into)
        with closing(Notes(into.folder / NOTES / PLACED)) as notes:
            placing = _Placing(into, notes, tally)
            placing.plan(records, rows, slots)
            if placing.put():
                placing.write_metadata()
                placing.remove_others()
    except MmcliError as error:
        if not isinstance(error, OutputError | ConfigError):
            raise
        tally.failure = tally.failure or OutputError(error.message, hint=error.hint)
    except sqlite3.Error as error:
        tally.failure = tally.failure or notes_error(error, into.folder / NOTES / PLACED)
    except OSError as error:
        tally.failure = tally.failure or output_error(error, shown(error.filename or into.folder))
    return tally


# -------------------------------------------------------------------------------------------------- the placing


class _Placing:
    """The steps, in this order: `plan`, `put`, `write_metadata`, `remove_others`."""

    def __init__(self, into: Into, notes: Notes, tally: Tally) -> None:
        self._root, self._copy = os.path.abspath(into.folder), into.copy
        self._real = os.path.join(os.path.realpath(into.folder), "")
        self._notes, self._tally = notes, tally
        self._labels = LabelFolders(self._root)
        self._folder_of = lru_cache(64)(_folder_of)

    def plan(self, records: Iterator[Record], rows: Iterable[pa.RecordBatch], slots: Sequence[Slot]) -> None:
        """Give every file its name, and note that before any is put there."""
        self._notes.begin()
        for record, row in zip(records, _dicts(rows), strict=True):
            if row["status"] != "ok":
                self._tally.errors += 1
                continue
            for slot in slots:
                labels = _labels(row, slot.prefix)
                self._tally.unlabelled += not labels
                file = _file(record, slot.medium) if labels else None
                if labels and file is None:
                    self._tally.count("homeless", _why_homeless(record))
                elif file is not None and self._is_inside(file):
                    self._tally.inside += 1
                elif file is not None:
                    self._add(file, labels, row["id"])
        self._notes.note_plan()
        self._notes.commit()

    def _is_inside(self, file: str) -> bool:
        """Whether a file lies in FOLDER."""
        return os.path.join(self._folder_of(os.path.dirname(file))[1], "").startswith(self._real)

    def _add(self, file: str, labels: Mapping[str, float | None], id: str) -> None:
        source = os.path.join(self._folder_of(os.path.dirname(file))[0], os.path.basename(file))
        try:
            status = os.stat(source)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
        except OSError as error:
            self._tally.fail(_cannot_read(error, source), len(labels))
            return
        entry = Entry(os.fsencode(source), False)
        if self._copy:
            entry = Entry(entry.source, True, status.st_size, mtime_ns(status))
        for label, score in labels.items():
            folder = self._labels.name(label)
            if isinstance(folder, OSError):
                self._fail(folder, folder_name(label))
                continue
            try:
                name = self._name(f"{folder}/{file_name(file)}", entry)
            except OSError as error:
                self._fail(error, folder)
            else:
                self._notes.add(name, entry, label, score, id)

    def _fail(self, error: OSError, name: str) -> None:
        self._tally.fail(output_error(error, shown(os.path.join(self._root, name))))

    def _name(self, wanted: str, entry: Entry) -> str:
        """The first of `a.jpg`, `a-2.jpg`, ... that is neither of another row nor of somebody else."""
        names = self._notes.claims.names(wanted)
        return next(name for name in names if self._state(name, entry) != "foreign")

    def _state(self, name: str, wanted: Entry) -> Literal["same", "new", "old", "changed", "foreign"]:
        """What lies at a name: nothing (new), what is wanted, what may be replaced (old), or what must be left."""
        path = os.path.join(self._root, name)
        try:
            there = os.lstat(path)
        except FileNotFoundError:
            return "new"
        if wanted.holds(path, there):
            return "same"
        known = self._notes.known(name)
        mine = any(entry.source == wanted.source for entry in known)
        if any(e.holds(path, there) and (e.source == wanted.source or e.disposable()) for e in known):
            return "old"
        return "changed" if mine else "foreign"

    def put(self) -> bool:
        """Put there what is not there. Whether it went to the end."""
        touched = set()
        for row, name, entry in self._notes.planned():
            try:
                state = self._state(name, entry)
                if state == "foreign":
                    raise FileExistsError(errno.EEXIST, "")
                if state in ("new", "old"):
                    self._put(name, entry, replace=state == "old")
                    touched.add(os.path.dirname(name))
            except OSError as error:
                if entry.copied and _is_of_source(error, entry):
                    self._tally.fail(_cannot_read(error, os.fsdecode(entry.source)))
                else:
                    self._fail(error, name)
                if error.errno in _HOPELESS:
                    return False
                self._notes.miss(row)
            else:
                self._tally.placed += state in ("new", "old")
                self._tally.same += state == "same"
                if state == "changed":
                    self._tally.count("changed", os.path.join(self._root, name))
        for folder in touched:
            fsync_folder(Path(self._root, folder))
        fsync_folder(Path(self._root))
        return True

    def _put(self, name: str, entry: Entry, replace: bool) -> None:
        """Whole or not at all."""
        path, temporary = os.path.join(self._root, name), os.path.join(self._root, NOTES, NEW)
        if not entry.copied and not replace:
            os.symlink(entry.source, os.fsencode(path))
            return
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        try:
            if entry.copied:
                _copy(entry, temporary)
            else:
                os.symlink(entry.source, os.fsencode(temporary))
            if not replace and os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, "")
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def write_metadata(self) -> None:
        """What imagefolder reads; replaced only when it says something else."""
        notes, final = Path(self._root, NOTES), Path(self._root, METADATA)
        new = notes / NEW
        with open(new, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(self._notes.metadata())
        digest, before = digest_of(new), digest_of(final)
        if digest == before:
            new.unlink()
            return
        fsync_file(new)
        owner = read_owner(Path(self._root)) or {}
        # Both, for the moment in which it is not known which of them is there.
        write_json(notes / OWNER, {**owner, "metadata": [d for d in (before, digest) if d]})
        os.replace(new, final)
        fsync_folder(Path(self._root))

    def remove_others(self) -> None:
        """What an earlier run has put there and belongs elsewhere now, unless something would be lost with it."""
        emptied: dict[str, None] = {}
        for name, group in groupby(self._notes.others(), itemgetter(0)):
            path = os.path.join(self._root, name)
            try:
                there = os.lstat(path)
                if not any(entry.holds(path, there) and entry.disposable() for _, entry in group):
                    self._tally.count("left", path)
                    continue
                os.unlink(path)
                self._tally.removed += 1
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:
                self._fail(error, name)
                continue
            emptied[os.path.dirname(name)] = None
            self._notes.gone(name)
        self._notes.begin()
        self._notes.forget()
        self._notes.commit()
        for folder in emptied:
            # It has other files.
            with suppress(OSError):
                os.rmdir(os.path.join(self._root, folder))


def _cannot_read(error: OSError, source: str) -> OutputError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return OutputError(f"cannot read {shown(source)}: {reason}")


def _is_of_source(error: OSError, entry: Entry) -> bool:
    """Of the source alone: what fails between two files names both."""
    return error.filename is not None and error.filename2 is None and os.fsencode(error.filename) == entry.source


def _copy(entry: Entry, temporary: str) -> None:
    """With its time. Raises OSError, also when the source is no longer what was noted."""
    shutil.copyfile(os.fsdecode(entry.source), temporary)
    status = os.stat(entry.source)
    if (status.st_size, mtime_ns(status)) != (entry.size, entry.mtime):
        raise OSError("its source was changed in the meantime")
    os.utime(temporary, ns=(status.st_atime_ns, entry.mtime))
    fsync_file(Path(temporary))


# ------------------------------------------------------------------------------------------- what rows say


def _dicts(rows: Iterable[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
    for batch in rows:
        yield from batch.to_pylist()


def _labels(row: Row, prefix: str) -> dict[str, float | None]:
    """The labels of a row and their scores, where the row has these; none of a row that is rejected."""
    best = row[f"{prefix}label"]
    if best is None:
        return {}
    if f"{prefix}labels" not in row:
        return {best: row[f"{prefix}score"]}
    scores = {one["label"]: one["score"] for one in row[f"{prefix}top_k"] or ()}
    return {label: scores.get(label) for label in row[f"{prefix}labels"] or ()}


def _file(record: Record, medium: int | None) -> str | None:
    """The file that a label is of; None when there is none, or several.

    Of vectors that is the column `path`, when it is absolute: a relative one is relative to the folder in which
    they were made, where another file may be now; in an escaped one the name itself is lost.
    """
    media = record.media if medium is None else record.media[medium : medium + 1]
    files = [one.file for one in media if one.file is not None]
    if len(files) == 1:
        return files[0]
    path = record.path
    if not _is_vector(record) or path is None or not os.path.isabs(path) or "\\" in path:
        return None
    return path if os.path.isfile(path) else None


def _is_vector(record: Record) -> bool:
    return len(record.media) == 1 and all(
        m.file is None and m.data is None and m.text is None for m in record.media
    )


def _why_homeless(record: Record) -> str:
    if not _is_vector(record):
        return record.id
    if record.path is None:
        return f"{record.id}: a vector without a path"
    if os.path.isabs(record.path):
        return f"{record.path}: there is no such file"
    return f"{record.path}: not known where; mmcli embed notes absolute paths when INPUT is absolute"


def _folder_of(folder: str) -> tuple[str, str]:
    """A folder's absolute path, and that without symbolic links. Cached by `_Placing`."""
    real = os.path.realpath(folder)
    # `a/../b` is not `b` when a is a symbolic link.
    return (real if ".." in folder.split("/") else os.path.abspath(folder)), real
