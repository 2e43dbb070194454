"""File name extensions -> modality, for every room: sources choose a folder's rows by it, media its first guess.

A name only says what a file claims to be; the decoder decides by content.
"""

from __future__ import annotations

from mmcli.core.records import Modality


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


EXTENSIONS: dict[Modality, frozenset[str]] = {
    "image": _words(
        "jpg jpeg jpe jfif png apng gif webp bmp dib tif tiff ico avif heic heif jp2 j2k jpx jpf "
        "ppm pgm pbm pnm tga qoi jxl"
    ),
    "audio": _words("wav flac mp3 ogg oga opus m4a aac aiff aif aifc au snd amr wma mka caf w64"),
    "video": _words("mp4 m4v mov qt mkv webm avi mpg mpeg mpe ts m2ts mts flv ogv 3gp 3g2 wmv asf vob"),
    # Not md, html or json: in a folder of media those are its description (README.md), not its content.
    "text": frozenset(["txt"]),
}

_MODALITY: dict[str, Modality] = {ext: modality for modality, exts in EXTENSIONS.items() for ext in exts}

# Common files beside media. Not opened to see whether they are media after all: opening costs 10 us a file,
# and a folder of img2dataset has as many .json as .jpg.
NOT_MEDIA = _words(
    "json jsonl ndjson csv tsv parquet arrow feather npy npz md rst html htm xml xmp yaml yml toml ini cfg "
    "log py js ipynb sh c h cpp zip tar gz tgz bz2 xz zst 7z rar pdf doc docx xls xlsx ppt pptx srt vtt sha256 "
    "safetensors bin pt pth ckpt onnx pkl pickle h5 hdf5 db sqlite sqlite3 duckdb lock tmp part bak"
)


def extension(name: str) -> str:
    """The lower-case extension of a file name or path, without the dot; "" when there is none."""
    base = name.rpartition("/")[2]
    stem, dot, ext = base.rpartition(".")
    return ext.lower() if dot and stem else ""


def guess_modality(name: str) -> Modality | None:
    """What a file of this name or path claims to be; None when the name does not tell."""
    return _MODALITY.get(extension(name))


def looks_like_media(head: bytes) -> bool:
    """Whether the first bytes (64 are enough) of a file without a telling name are those of a media file."""
    return head.startswith(_MAGIC) or head[4:8] == b"ftyp" or (head[:4] == b"RIFF" and head[8:12] in _RIFF)


# No two-byte magic (BMP, MP3 frames, PPM): too many other files begin like that.
_MAGIC = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ",
    b"OggS", b"fLaC", b"ID3", b"#!AMR", b".snd", b"\x1a\x45\xdf\xa3", b"FLV\x01", b"\0\0\x01\xba",
)  # fmt: skip
_RIFF = (b"WEBP", b"WAVE", b"AVI ")
