"""Text files: UTF-8, or UTF-16 with a byte order mark."""

from __future__ import annotations

import codecs

from mmcli.core.errors import RowError

_BOM_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode_text(data: bytes) -> str:
    """The text of a file as it is, less a byte order mark and the line end of its last line.

    One final line end belongs to the file, not to the text: a caption in a file and the same caption in a
    table get the same vector. Other line ends (CRLF too) and spaces stay. An empty text is a text.
    Raises RowError: `corrupt` (not UTF-8; says where), `unsupported_format` (binary: it holds NUL).
    """
    encoding = "utf-16" if data.startswith(_BOM_16) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        kind = encoding.removesuffix("-sig").upper()
        what = f"{error.reason} at byte {error.start}: 0x{data[error.start : error.start + 1].hex()}"
        raise RowError("corrupt", f"not {kind} text: {what}; convert it with iconv -t UTF-8") from error
    if "\0" in text:
        raise RowError("unsupported_format", f"binary data, not text: NUL at character {text.index(chr(0))}")
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def looks_like_text(head: bytes) -> bool:
    """Whether `head`, the first bytes of a file, can be the beginning of a text: UTF-8 or UTF-16, without NUL."""
    encoding = "utf-16" if head.startswith(_BOM_16) else "utf-8-sig"
    try:
        # The end may cut a character in two: final=False lets that pass.
        return "\0" not in codecs.getincrementaldecoder(encoding)().decode(head, final=False)
    except UnicodeDecodeError:
        return False
