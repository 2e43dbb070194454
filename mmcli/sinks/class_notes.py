"""Whose a class folder is, and what was put there: FOLDER/.mmcli."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmcli.core.durable import check_can_create, make_folder, read_json, write_json
from mmcli.core.errors import ConfigError, OutputError
from mmcli.core.state import DamagedState, check_state
from mmcli.sinks.class_names import Claims, shown
from mmcli.sinks.outputs import RUN_FILE

METADATA = "metadata.csv"
NOTES, OWNER, PLACED, NEW = ".mmcli", "owner.json", "placed.sqlite", "new"
# Modification times are kept in steps of so many ns: ext4 and XFS, NTFS, most network file systems, ext3, FAT.
_STEPS = (1, 100, 1_000, 1_000_000, 1_000_000_000, 2_000_000_000)


@dataclass(frozen=True, slots=True)
class Into:
    """Where files go. `out`: the output whose rows say where, symbolic links resolved."""

    folder: Path
    out: Path
    copy: bool = False


def check_folder(into: Into) -> None:
    """Can files be put there? Raises ConfigError, which says what else is there."""
    said = f"--into {shown(into.folder)}"
    try:
        problem = _problem(into)
    except OSError as error:
        raise ConfigError(f"{said}: it cannot be read: {error.strerror or error}") from error
    if problem is not None:
        raise ConfigError(f"{said}: {problem}")


# ------------------------------------------------------------------------------------------ whose the folder is


def _problem(into: Into) -> str | None:
    folder = into.folder
    if not os.path.lexists(folder):
        parent = folder.absolute().parent
        if not parent.is_dir():
            return f"there is no folder {shown(parent)}; mkdir -p '{shown(parent)}'"
        return _unwritable(parent, into.copy)
    if not folder.is_dir():
        return "this is a file; give a folder that is new or empty"
    owner = read_owner(folder)
    others = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if owner is None and others:
        return f"there is something else in it already ({shown(others[0])}); give a folder that is new or empty"
    if owner is None and (folder / NOTES / RUN_FILE).exists():
        return "there are rows of an unfinished output in it; give a folder that is new or empty"
    if owner is not None and others and owner["output"] != _relative(into):
        other = os.path.normpath(folder.resolve() / owner["output"])
        return f"its files are of another output, {shown(other)}; give another folder, or delete this one first"
    if owner is not None and digest_of(folder / METADATA) not in (None, *owner["metadata"]):
        return f"{METADATA} was changed since mmcli wrote it, and would be replaced; move it to another place first"
    return _unwritable(folder, into.copy)


def _unwritable(folder: Path, copy: bool) -> str | None:
    """Why no links, or copies, can be made there. By trying: permissions tell only half of it."""
    probe = folder / f".{os.getpid()}.mmcli-check.tmp"
    try:
        check_can_create(folder, probe.name)
    except OSError as error:
        return f"nothing can be written in {shown(folder)}: {error.strerror or error}"
    if copy:
        return None
    try:
        os.symlink("nowhere", probe)
        os.unlink(probe)
    except OSError as error:
        return f"no symbolic links can be made there ({error.strerror or error}); add --copy"
    return None


def _relative(into: Into) -> str:
    """The output as seen from FOLDER: so both may move together."""
    return os.path.relpath(into.out, into.folder.resolve())


def take(into: Into) -> None:
    """Make FOLDER ours. Raises ConfigError when it is another's, OSError."""
    if problem := _problem(into):
        raise ConfigError(f"{shown(into.folder)}: {problem}")
    make_folder(into.folder)
    make_folder(into.folder / NOTES)
    owner = read_owner(into.folder)
    if owner is None or owner["output"] != _relative(into):
        write_json(into.folder / NOTES / OWNER, {"output": _relative(into), "metadata": []})


def read_owner(folder: Path) -> dict[str, Any] | None:
    """Whose FOLDER is (`output`), and digests of the lists that mmcli wrote (`metadata`). None: it does not say."""
    owner = read_json(folder / NOTES / OWNER)
    with suppress(DamagedState):
        return check_state(owner, {"output": str, "metadata": list}, OWNER, "")
    return None


def digest_of(path: Path) -> str | None:
    """Of a file's content; None when there is none."""
    digest = blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        return None
    return digest.hexdigest()


def notes_error(error: sqlite3.Error, path: Path) -> OutputError:
    hint = None
    if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        hint = f"rm '{shown(path)}', then the same command: files that are right already are recognised"
    return OutputError(f"cannot write {shown(path)}: {error}", hint=hint)


# ----------------------------------------------------------------------------------------------- what is there


class Entry(NamedTuple):
    """How a name in FOLDER came about. `size`, `mtime`: of the source when it was copied; -1 of links."""

    source: bytes
    copied: bool
    size: int = -1
    mtime: int = -1

    def holds(self, path: str, there: os.stat_result) -> bool:
        """Whether what lies at `path` is this, unchanged. `there`: its lstat."""
        if not self.copied:
            return stat.S_ISLNK(there.st_mode) and os.fsencode(os.readlink(path)) == self.source
        same_time = any(there.st_mtime_ns == self.mtime - self.mtime % step for step in _STEPS)
        return stat.S_ISREG(there.st_mode) and there.st_size == self.size and same_time

    def disposable(self) -> bool:
        """Whether nothing is lost with it: a copy whose source is gone may be the last one."""
        return not self.copied or os.path.isfile(self.source)


class Notes:
    """What was put into FOLDER (`placed`, on disk), and what belongs there now (`plan`, of this run).

    Whoever holds the lock of the output is alone here: SQLite needs no locks, which some file systems lack.
    """

    def __init__(self, path: Path) -> None:
        uri = f"{Path(os.path.abspath(path)).as_uri()}?nolock=1"
        self.database = sqlite3.connect(uri, isolation_level=None, uri=True)
        self._run = self.database.execute
        self._run("PRAGMA cache_size = -8000")
        entry = "name TEXT, source BLOB, copied INT, size INT, mtime INT"
        self._run(
            f"CREATE TABLE IF NOT EXISTS placed ({entry}, PRIMARY KEY (name, source, copied, size, mtime))"
            " WITHOUT ROWID"
        )
        self._run(
            f"CREATE TEMP TABLE plan (row INTEGER PRIMARY KEY, {entry}, label, score, id, missing, UNIQUE (name))"
        )
        self._run("CREATE TEMP TABLE gone (name TEXT)")
        self.claims = Claims(self.database)

    def close(self) -> None:
        self.database.close()

    def known(self, name: str) -> list[Entry]:
        """All that may lie there."""
        found = self._run("SELECT source, copied, size, mtime FROM placed WHERE name = ?", (name,))
        return [Entry(*row) for row in found]

    def add(self, name: str, entry: Entry, label: str, score: float | None, id: str) -> None:
        """To the plan."""
        told = None if score is None else str(np.float32(score))
        self._run("INSERT INTO plan VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, 0)", (name, *entry, label, told, id))

    def planned(self) -> Iterator[tuple[int, str, Entry]]:
        """(row, name, what belongs there)."""
        for row, name, *entry in self._run("SELECT row, name, source, copied, size, mtime FROM plan ORDER BY row"):
            yield row, name, Entry(*entry)

    def miss(self, row: int) -> None:
        """What is planned there is not there."""
        self._run("UPDATE plan SET missing = 1 WHERE row = ?", (row,))

    def metadata(self) -> Iterator[tuple[str, str, str | None, str]]:
        """COLUMNS of all that is there."""
        return self._run("SELECT name, label, score, id FROM plan WHERE NOT missing ORDER BY row")

    def begin(self) -> None:
        self._run("BEGIN")

    def commit(self) -> None:
        self._run("COMMIT")

    def note_plan(self) -> None:
        """Before anything is put there."""
        self._run("INSERT OR IGNORE INTO placed SELECT name, source, copied, size, mtime FROM plan")

    def others(self) -> Iterator[tuple[str, Entry]]:
        """What was put there and is not in the plan; that of one name follows one another."""
        found = self._run(
            "SELECT name, source, copied, size, mtime FROM placed"
            " WHERE NOT EXISTS (SELECT 1 FROM plan WHERE plan.name = placed.name) ORDER BY name"
        )
        for name, *entry in found:
            yield name, Entry(*entry)

    def gone(self, name: str) -> None:
        """Nothing of ours is there any more."""
        self._run("INSERT INTO gone VALUES (?)", (name,))

    def forget(self) -> None:
        """What is gone; and of the names in the plan all but what belongs there."""
        self._run("DELETE FROM placed WHERE name IN gone")
        self._run(
            "DELETE FROM placed WHERE EXISTS (SELECT 1 FROM plan WHERE plan.name = placed.name AND NOT missing)"
            " AND NOT EXISTS (SELECT 1 FROM plan WHERE plan.name = placed.name AND plan.source = placed.source"
            " AND plan.copied = placed.copied AND plan.size = placed.size AND plan.mtime = placed.mtime)"
        )
