"""Does a media file hold all bytes that its own headers promise?

FFmpeg plays what is there and says nothing. The answer is in the structure of the common containers, exactly
and for a few small reads, without decoding. Formats without such a promise (ADTS, MPEG-TS, MPEG-PS) pass.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator

from mmcli.core.errors import RowError

File = io.FileIO | io.BytesIO

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_ASF = bytes.fromhex("3026b2758e66cf11")
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
# A writer that cannot go back leaves one of these as the size of what it streams (arecord 0x7FFFFF00).
_STREAMED = {0, 0x7FFFFFFF, 0x7FFFFF00, 0x7FFFF000, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE}
_MAX_OGG_PAGE = 27 + 255 + 255 * 255
_MAX_ELEMENTS = 100_000


def check_complete(file: File) -> None:
    """Raise RowError `truncated` when the file is shorter than its headers say. Leaves the position anywhere."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(4096)
    missing = _missing(file, head, size)
    if missing > 0:
        raise RowError("truncated", f"the file ends too early: at least {missing} of its bytes are missing")


def known_magic(head: bytes) -> bool:
    """Whether these first bytes are those of a common container, so that a failure means damage."""
    starts = (b"RIFF", b"RF64", b"FORM", b"OggS", b"fLaC", b"ID3", b"FLV", b".snd", b"caff", _EBML, _ASF)
    return head.startswith(starts) or head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")


def _missing(file: File, head: bytes, size: int) -> int:
    """How many bytes are missing, as far as it can be told; 0 for none."""
    if head[:4] in (b"RIFF", b"FORM"):
        order = "<" if head[:4] == b"RIFF" else ">"
        return max((end - size for end in _chunk_ends(file, size, order)), default=0)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        return _missing_of_mp4(file, size)
    if head.startswith(_EBML):
        return _segment_end(head) - size
    if head.startswith(b"OggS"):
        return _missing_of_ogg(file, size)
    if head[:3] == b"ID3" or head[:2] in (b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"\xff\xfa"):
        start, promised = mp3_length(file)
        # Some encoders count the tag before the first frame too: with one, only what exceeds the whole is sure.
        return promised - (size - start) if start == 0 or promised > size else 0
    if head.startswith(_ASF) and (at := head.find(_ASF_FILE_PROPERTIES)) >= 0 and len(head) >= at + 48:
        return int(struct.unpack_from("<Q", head, at + 40)[0]) - size
    if head.startswith(b"FLV") and (at := head.find(b"filesize\0")) >= 0 and len(head) >= at + 17:
        filesize = float(struct.unpack_from(">d", head, at + 9)[0])
        return int(filesize) - size if 0 < filesize < 1e15 else 0
    return 0


def _chunk_ends(file: File, size: int, order: str) -> Iterator[int]:
    """Where each chunk of a RIFF (WAV, AVI) or IFF (AIFF) file ends."""
    at = 12
    for _ in range(_MAX_ELEMENTS):
        file.seek(at)
        header = file.read(8)
        if len(header) < 8:
            return
        length = struct.unpack(order + "I", header[4:])[0]
        if length in _STREAMED or not header[:4].isascii():
            return
        yield at + 8 + length
        at += 8 + length + length % 2
        if at >= size:
            return


def _missing_of_mp4(file: File, size: int) -> int:
    """ISO 14496-12: top-level boxes, one of which is `moov`."""
    at, moov = 0, False
    for _ in range(_MAX_ELEMENTS):
        file.seek(at)
        header = file.read(16)
        if len(header) < 8:
            break
        length: int
        length, kind = struct.unpack(">I4s", header[:8])
        moov |= kind == b"moov"
        if length == 1 and len(header) == 16:
            length = struct.unpack(">Q", header[8:])[0]
        if length < 8:  # 0: up to the end of the file; else padding or damage, which the demuxer judges
            break
        at += length
        if at > size:
            return at - size
    return 0 if moov else 1


def _segment_end(head: bytes) -> int:
    """RFC 8794: the end of the Matroska segment; 0 when it was streamed and has no size."""
    header_size, width = _vint(head, 4)
    at = 4 + width + header_size
    if head[at : at + 4] != _SEGMENT:
        return 0
    length, width = _vint(head, at + 4)
    return 0 if length == (1 << 7 * width) - 1 else at + 4 + width + length


def _vint(data: bytes, at: int) -> tuple[int, int]:
    """An EBML variable-size integer and its width in bytes; (0, 1) when it is not one."""
    if at >= len(data) or data[at] == 0:
        return 0, 1
    width = 9 - data[at].bit_length()
    return int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1), width


def mp3_length(file: File) -> tuple[int, int]:
    """Where an MP3's first frame starts, and how many bytes its Xing or LAME header counts; 0 without one."""
    start, _, counts = _xing(file)
    return start, counts[1] or 0


def mp3_samples(file: File) -> int | None:
    """As many as the frames that an MP3's Xing or LAME header counts hold; None without one."""
    _, frame, counts = _xing(file)
    # MPEG 1 has 1,152 in a frame, MPEG 2 and 2.5 have half of that.
    return None if counts[0] is None else counts[0] * (1152 if frame[1] & 0x08 else 576)


def _xing(file: File) -> tuple[int, bytes, tuple[int | None, int | None]]:
    """Where the first frame starts, its first bytes, and what its header counts: frames and bytes."""
    file.seek(0)
    head = file.read(10)
    start = 0
    if head[:3] == b"ID3" and len(head) == 10:
        start = 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
    file.seek(start)
    frame = file.read(256)
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    if at < 0 or len(frame) < at + 16:
        return start, frame, (None, None)
    flags, frames, count = struct.unpack_from(">III", frame, at + 4)
    return start, frame, (frames if flags & 1 else None, count if flags & 3 == 3 else None)


def _missing_of_ogg(file: File, size: int) -> int:
    """RFC 3533: the last page is whole, and ends its logical stream."""
    file.seek(max(0, size - _MAX_OGG_PAGE))
    tail = file.read(_MAX_OGG_PAGE)
    at = tail.rfind(b"OggS\0")
    if at < 0 or len(tail) < at + 27:
        return 1
    segments = tail[at + 27 : at + 27 + tail[at + 26]]
    missing = at + 27 + tail[at + 26] + sum(segments) - len(tail)
    ends_stream = bool(tail[at + 5] & 4)
    return missing if missing > 0 else int(not ends_stream)
