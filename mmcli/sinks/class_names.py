"""Names for labels and files, which are untrusted text, in class folders."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import unicodedata
from collections.abc import Iterator
from hashlib import blake2b

# Longer names no usual file system takes.
MAX_BYTES = 255
# What stands beside the folders.
_RESERVED = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Control characters, lone surrogates (bytes that are not UTF-8), separators of lines and paragraphs.
_UNSAFE = ("Cc", "Cs", "Zl", "Zp")


def shown(path: str | os.PathLike[str]) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def folder_name(label: str, distinct: bool = False) -> str:
    """A name for a label, a different one for each: the label itself where that is possible.

    `/`, `%`, control characters and a leading dot are `%2F` and so on, as in URLs. What would be longer than 255
    bytes is cut, and ends with `%~` and a digest, which no other name has; also when it is to be `distinct`.
    """
    name = _escaped(label, "/%")
    if name.casefold() in _RESERVED:
        name = name.replace(".", "%2E")
    if name and not distinct and len(name.encode()) <= MAX_BYTES:
        return name
    mark = "%~" + blake2b(label.encode(), digest_size=8).hexdigest()
    return _cut(name, MAX_BYTES - len(mark)) + mark


def file_name(path: str) -> str:
    """The base name of a file, in UTF-8 and without control characters or a leading dot: as %0A and so on."""
    return _escaped(os.path.basename(path), "")


def numbered(name: str, number: int) -> str:
    """`a.jpg`, 2 -> `a-2.jpg`; 1: as it is. At most 255 bytes long."""
    stem, extension = os.path.splitext(name)
    if len(extension.encode()) > MAX_BYTES // 2:
        stem, extension = name, ""
    mark = f"-{number}" if number > 1 else ""
    return _cut(stem, MAX_BYTES - len((mark + extension).encode())) + mark + extension


def _cut(text: str, size: int) -> str:
    return text.encode()[:size].decode(errors="ignore")


def _escaped(text: str, also: str) -> str:
    """Reversible when `also` has the percent sign."""
    safe = "".join(_percent(c) if c in also or unicodedata.category(c) in _UNSAFE else c for c in text)
    return "%2E" + safe[1:] if safe.startswith(".") else safe


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in os.fsencode(character))


class LabelFolders:
    """The folders of labels, in `root`, made when they are first asked for."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._names: dict[str, str | OSError] = {}
        self._owners: dict[tuple[int, int], str] = {}

    def name(self, label: str) -> str | OSError:
        """Relative to `root`; or why it cannot be made."""
        if label not in self._names:
            try:
                self._names[label] = self._make(label)
            except OSError as error:
                self._names[label] = error
        return self._names[label]

    def _make(self, label: str) -> str:
        """Two labels never share a folder, also where `Cat` and `cat` are one name. Raises OSError."""
        name = ""
        for distinct in (False, True):
            name = folder_name(label, distinct)
            path = os.path.join(self._root, name)
            try:
                os.mkdir(path)
            except FileExistsError:
                if not os.path.isdir(path):
                    raise NotADirectoryError(errno.ENOTDIR, "") from None
            status = os.stat(path)
            assert stat.S_ISDIR(status.st_mode)
            if self._owners.setdefault((status.st_dev, status.st_ino), label) == label:
                break
        return name


class Claims:
    """Which names are in use, on disk: memory does not grow with them. Case and composition of Unicode are one."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._run = database.execute
        self._run("CREATE TEMP TABLE claims (name BLOB PRIMARY KEY, number INT) WITHOUT ROWID")

    def names(self, wanted: str) -> Iterator[str]:
        """`cat/a.jpg`, `cat/a-2.jpg`, ...: those that nobody has had yet; all that are given count as taken."""
        folder, _, name = wanted.rpartition("/")
        key = _key(f"{folder}/{numbered(name, 1)}")
        found = self._run("SELECT number FROM claims WHERE name = ?", (key,)).fetchone()
        number = 1 if found is None else found[0]
        while True:
            one = f"{folder}/{numbered(name, number)}"
            if self._run("INSERT OR IGNORE INTO claims VALUES (?, 2)", (_key(one),)).rowcount == 1:
                self._run("UPDATE claims SET number = ? WHERE name = ?", (number + 1, key))
                yield one
            number += 1


def _key(name: str) -> bytes:
    folder, _, file = name.rpartition("/")
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", file).casefold())
    return blake2b(f"{folder}/{folded}".encode(), digest_size=16).digest()
