"""Opening audio and video containers with PyAV (FFmpeg): a list of formats, no other file, no network."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from mmcli.core.errors import RowError
from mmcli.core.records import Modality
from mmcli.media.complete import check_complete, known_magic

# Demuxers of FFmpeg that may be used. None of them opens a second file (playlists, concat, image sequences and
# scripts do), and each has a magic number or a structure that FFmpeg's probing recognises.
FORMATS = (
    "wav", "w64", "aiff", "au", "caf", "flac", "mp3", "ogg", "aac", "ac3", "eac3", "dts", "amr", "ape", "wv", "tta",
    "mov", "matroska", "avi", "mpeg", "mpegvideo", "mpegts", "flv", "asf",
)  # fmt: skip


def load_library() -> Any:
    """PyAV, silent: what FFmpeg would print about a broken file is told by its error row."""
    import av
    import av.logging

    av.logging.set_level(None)
    return av


@contextmanager
def open_container(file: io.FileIO | io.BytesIO) -> Iterator[Any]:
    """The `av.container.InputContainer` of an open file, from its beginning.

    Raises RowError: `truncated` (before FFmpeg sees it: it has crashed on such files), `unsupported_format`
    (not one of FORMATS), `corrupt`, `io`; also for what FFmpeg or PyAV raises inside of the `with` block.
    """
    av = load_library()
    check_complete(file)
    file.seek(0)
    try:
        container = _open(av, file)
    except av.error.FFmpegError as error:
        raise _row_error(av, error, file) from error
    try:
        yield container
    except av.error.FFmpegError as error:
        raise RowError("corrupt", f"broken {container.format.name} file: {error.strerror}") from error
    finally:
        container.close()


def modality(container: Any) -> Modality:
    """Whether the open container is a video (it has moving pictures) or audio. Raises RowError for neither."""
    if best_stream(container, "video") is not None:
        return "video"
    if best_stream(container, "audio") is not None:
        return "audio"
    raise RowError("unsupported_format", "the file has neither sound nor moving pictures")


def best_stream(container: Any, kind: str) -> Any | None:
    """FFmpeg's choice among the `kind` ("audio" or "video") streams; a cover picture is no video."""
    stream = container.streams.best(kind)
    if stream is not None and _is_picture(stream):
        others = [s for s in container.streams if s.type == kind and not _is_picture(s)]
        stream = others[0] if others else None
    return stream


def prepare(stream: Any, **options: str) -> None:
    """One thread (a worker per core is enough), and FFmpeg's codec `options`, before the stream is decoded."""
    if stream.codec_context is None:
        raise RowError("unsupported_format", f"FFmpeg has no decoder for this {stream.type} stream")
    stream.codec_context.thread_count = 1
    stream.codec_context.options = options


def decoded(container: Any, stream: Any, before: Callable[[Any], None] | None = None) -> Iterator[Any]:
    """The frames of a stream from where the container is; `before` sees each packet first.

    Skips what comes before the first that can be decoded, as in a broadcast recorded from its middle.

    Raises RowError: `truncated` when the very last packet cannot be decoded, `corrupt` for any before it.
    """
    from av.error import InvalidDataError

    started, failure = False, None
    for packet in container.demux(stream):
        if failure is not None and packet.size:
            raise RowError("corrupt", f"broken {stream.type}: {failure.strerror}") from failure
        if before is not None:
            before(packet)
        try:
            frames = packet.decode()
        except InvalidDataError as error:
            failure = error if started else None
            continue
        for frame in frames:
            started = True
            yield frame
    if failure is not None:
        raise RowError("truncated", f"the file ends in the middle of its {stream.type}") from failure


def _open(av: Any, file: io.FileIO | io.BytesIO) -> Any:
    return av.open(
        file,
        container_options={"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"},
        io_open=_refuse,
        buffer_size=1 << 17,
        **_lenient(av),
    )


@cache
def _lenient(av: Any) -> dict[str, str]:
    """Latin-1 tags are common, and not ours to read. PyAV 19 never fails on them, and has no such argument."""
    return {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


def _refuse(url: str, flags: int, options: dict[str, Any]) -> Any:
    raise PermissionError("media files may not open other files")


def _is_picture(stream: Any) -> bool:
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


def _row_error(av: Any, error: Any, file: io.FileIO | io.BytesIO) -> RowError:
    file.seek(0)
    head = file.read(64)
    # EINVAL: FFmpeg recognised a format that is not on the list.
    if isinstance(error, av.error.ArgumentError) or not known_magic(head):
        return RowError("unsupported_format", f"not audio or video of a known format (begins with {head[:8]!r})")
    return RowError("corrupt", f"broken audio or video file: {error.strerror}")
