"""Lists the files of a folder, in the order of the bytes of their relative paths."""

from __future__ import annotations

import heapq
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from mmcli.core.errors import ErrorCode
from mmcli.core.extensions import NOT_MEDIA, extension, guess_modality, looks_like_media
from mmcli.sources.names import compile_glob, compile_pattern, shown
from mmcli.sources.snapshot import NOT_A_FILE, stat_file

# Names sorted in memory at a time; a larger folder is merged from sorted runs on disk. 200,000 names: 20 MB.
RUN_NAMES = 200_000
_READ = 1 << 16


@dataclass(slots=True)
class Entry:
    """One row of a listing. `path`: to open; `size`, `mtime_ns`: None when there is no such file."""

    id: str
    path: bytes
    size: int | None = None
    mtime_ns: int | None = None
    code: ErrorCode | None = None
    message: str | None = None


@dataclass(slots=True)
class Skipped:
    """What a listing left out, by reason, and the notes that tell the user."""

    extensions: Counter[str] = field(default_factory=Counter)
    unmatched: int = 0
    links: int = 0
    loops: int = 0
    special: int = 0

    def notes(self) -> list[str]:
        lines = []
        if total := self.extensions.total():
            kinds = ", ".join(f"{n} {e}" for e, n in self.extensions.most_common(8))
            rest = len(self.extensions) - 8
            lines.append(f"skipped {_files(total)} not media: {kinds}{f', {rest} more kinds' * (rest > 0)}")
        if any(e in self.extensions for e in (".parquet", ".jsonl", ".csv", ".tsv", ".ndjson")):
            lines.append("to read a manifest, give it as an input itself, e.g. 'FOLDER/*.parquet'")
        if self.unmatched:
            lines.append(f"skipped {_files(self.unmatched)} not matched by --glob")
        if self.special:
            lines.append(f"skipped {_files(self.special)} not regular (pipes, sockets, devices)")
        if self.links:
            lines.append(f"skipped {self.links} symbolic links")
        if self.loops:
            lines.append(f"skipped {self.loops} symbolic links that lead back to a folder above them")
        return lines


def _files(count: int) -> str:
    return "1 file that is" if count == 1 else f"{count} files that are"


@dataclass(frozen=True, slots=True)
class FolderRules:
    """Which files of a folder are rows.

    glob      shell patterns, any of which a file must match; all files when empty
    pattern   set for a quoted wildcard input: its part after the folder; all that match are rows
    leave     extensions of files that are no rows: what the run itself writes beside them
    """

    glob: tuple[str, ...] = ()
    pattern: str | None = None
    hidden: bool = False
    follow_symlinks: bool = True
    leave: frozenset[str] = frozenset()


class FolderListing:
    """The rows of one folder, or of one quoted wildcard pattern.

    Order: by the bytes of the path relative to the root. Within a folder that is the order of the names,
    where a folder's name counts with its slash; so a walk gives it without sorting the whole tree.
    A file reached by two paths (symbolic links) is two rows. A folder that cannot be read is an error row.
    """

    def __init__(self, root: str, rules: FolderRules, id_prefix: str = "") -> None:
        self.root = root.rstrip("/") or root
        self.rules = rules
        self.id_prefix = id_prefix
        self.skipped = Skipped()
        self._globs = [compile_glob(g) for g in rules.glob]
        # `--glob '*.md'` asks for that kind by name; `--glob 'train/*'` only for a place.
        self._explicit = [compile_glob(g) for g in rules.glob if re.search(r"\.\w+$", g)]
        if rules.pattern is not None:
            self._explicit = self._globs = [compile_pattern(rules.pattern)]
        deep = rules.pattern is None or "**" in rules.pattern.split("/")
        self._max_depth = None if deep or rules.pattern is None else rules.pattern.count("/")

    def entries(self, scratch: Path) -> Iterator[Entry]:
        """The rows, listed now. `scratch`: folder for the sorted runs of very large folders."""
        self.skipped = Skipped()
        base = os.fsencode(self.root)
        base = base if base.endswith(b"/") or not base else base + b"/"
        for relative, failure in self._walk(base, scratch):
            if failure is not None:
                code, message = os_error(failure)
                yield Entry(self._id(relative), base + relative, None, None, code, message)
            elif self._wanted(relative, base):
                size, mtime_ns = stat_file(base + relative)
                if size == NOT_A_FILE:
                    self.skipped.special += 1
                else:
                    yield Entry(self._id(relative), base + relative, size, mtime_ns)

    def any(self) -> bool:
        """Whether there is any row."""
        with tempfile.TemporaryDirectory() as scratch:
            return next(self.entries(Path(scratch)), None) is not None

    def notes(self) -> list[str]:
        """Lines for the user on what the last listing left out."""
        return self.skipped.notes()

    def _id(self, relative: bytes) -> str:
        return self.id_prefix + shown(relative)

    def _wanted(self, relative: bytes, base: bytes) -> bool:
        name = os.fsdecode(relative)
        if self._globs and not any(g.fullmatch(name) for g in self._globs):
            self.skipped.unmatched += self.rules.pattern is None
            return False
        ext = extension(name)
        left = ext in self.rules.leave
        if not left and (guess_modality(name) is not None or any(g.fullmatch(name) for g in self._explicit)):
            return True
        if not left and ext not in NOT_MEDIA and _is_media(base + relative):
            return True
        self.skipped.extensions["." + shown(ext) if ext else "without an extension"] += 1
        return False

    def _walk(self, base: bytes, scratch: Path) -> Iterator[tuple[bytes, OSError | None]]:
        """(relative path, None) of files and (relative path with slash, why) of folders that cannot be read."""
        stack = [self._open(base, b"", scratch)]
        above = [_inode(base or b".")]
        prefixes = [b""]
        while stack:
            name = next(stack[-1], None)
            if name is None:
                stack.pop()
                above.pop()
                prefixes.pop()
                continue
            relative = prefixes[-1] + name
            if not name.endswith(b"/"):
                yield relative, None
                continue
            if self._max_depth is not None and len(stack) > self._max_depth:
                continue
            try:
                inode = _inode(base + relative)
                if inode in above:
                    self.skipped.loops += 1
                    continue
                stack.append(self._open(base, relative, scratch))
            except OSError as failure:
                yield relative, failure
                continue
            above.append(inode)
            prefixes.append(relative)

    def _open(self, base: bytes, relative: bytes, scratch: Path) -> Iterator[bytes]:
        """Sorted names of a folder, those of folders with a slash at the end."""
        runs: list[IO[bytes]] = []
        names: list[bytes] = []
        with os.scandir(base + relative or b".") as found:
            for entry in found:
                if name := self._name(entry):
                    names.append(name)
                if len(names) >= RUN_NAMES:
                    runs.append(_spill(names, scratch))
                    names = []
        names.sort()
        return heapq.merge(*map(_read_run, runs), names) if runs else iter(names)

    def _name(self, entry: os.DirEntry[bytes]) -> bytes | None:
        name = entry.name
        if name.startswith(b".") and not self.rules.hidden:
            return None
        if not self.rules.follow_symlinks and entry.is_symlink():
            self.skipped.links += 1
            return None
        if not _is_folder(entry):
            return name
        # Staging folders of mmcli itself are never inputs.
        return None if name.endswith(b".mmcli") else name + b"/"


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A symbolic link to itself.
        return False


def os_error(failure: OSError) -> tuple[ErrorCode, str]:
    """The row error code and message of a failed system call."""
    code: ErrorCode = "io"
    if isinstance(failure, PermissionError):
        code = "permission"
    elif isinstance(failure, FileNotFoundError):
        code = "not_found"
    return code, f"cannot list the folder: {failure.strerror}"


def _inode(path: bytes) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_media(path: bytes) -> bool:
    try:
        # Not blocking: a named pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return looks_like_media(os.read(descriptor, 64))
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _spill(names: list[bytes], scratch: Path) -> IO[bytes]:
    names.sort()
    run = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - closed when it has been read
    # File names hold no NUL.
    run.write(b"\0".join(names))
    run.seek(0)
    return run


def _read_run(run: IO[bytes]) -> Iterator[bytes]:
    with run:
        rest = b""
        while block := run.read(_READ):
            *names, rest = (rest + block).split(b"\0")
            yield from names
        yield rest
