"""Opening one medium: a regular file that is still the one that was listed, or bytes that came inline."""

from __future__ import annotations

import io
import os
import stat

from mmcli.core.errors import ErrorCode, RowError
from mmcli.core.records import Media, mtime_ns

_CODES: dict[type[OSError], ErrorCode] = {
    FileNotFoundError: "not_found",
    NotADirectoryError: "not_found",
    PermissionError: "permission",
}


class MediaFile(io.FileIO):
    """An open regular file. It hides its name: FFmpeg would take the extension for a hint, we go by content."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "rb")
        self.name = ""


def open_media(media: Media, max_bytes: int) -> io.FileIO | io.BytesIO:
    """The encoded bytes of `media` as an unbuffered, seekable binary file; the caller closes it.

    Raises RowError: `not_found`, `permission`, `io`, `bad_row` (not a regular file), `input_changed` (size or
    mtime differ from the listing), `too_large` (more than `max_bytes`).
    """
    if media.data is not None:
        _check_size(len(media.data), max_bytes)
        return io.BytesIO(media.data)
    if media.file is None:
        raise RowError("bad_row", "this row has neither a file nor bytes")
    try:
        return _open_file(media, media.file, max_bytes)
    except OSError as error:
        code: ErrorCode = next((c for kind, c in _CODES.items() if isinstance(error, kind)), "io")
        raise RowError(code, f"cannot open the file: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise RowError("bad_row", f"not a file name: {error}") from error


def _open_file(media: Media, path: str, max_bytes: int) -> MediaFile:
    # Looked at before it is opened: opening a pipe waits for its writer, opening a device may do anything.
    _check_regular(os.stat(path).st_mode)
    file = MediaFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY))
    try:
        found = os.fstat(file.fileno())
        _check_regular(found.st_mode)
        if media.size is not None and found.st_size != media.size:
            raise RowError("input_changed", f"the file had {media.size} bytes when listed, now {found.st_size}")
        if media.mtime_ns is not None and mtime_ns(found) != media.mtime_ns:
            raise RowError("input_changed", "the file was modified after it was listed")
        _check_size(found.st_size, max_bytes)
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise RowError("bad_row", f"this is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a regular file")


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise RowError("too_large", f"the file has {size} bytes, more than the limit of {max_bytes}")
