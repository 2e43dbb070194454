"""Texts beside the files that they are of: captions (a.jpg, a.txt) and subtitles (a.wav, a.srt, a.vtt).

Written when all rows of an output are there, from these rows; writing them again changes nothing. A file that is
there already is replaced only when that is asked for, and never deleted.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmcli.core.durable import fsync_folder, output_error
from mmcli.core.errors import OutputError
from mmcli.core.records import Record
from mmcli.sinks.outputs import finished_output
from mmcli.sinks.parquet import batches
from mmcli.sinks.parts import read_parts
from mmcli.sinks.place import Place
from mmcli.sinks.rows import read_rows

Row = Mapping[str, Any]
Cue = tuple[int, int, str]


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A kind of them. `columns`: what `text` needs of a row."""

    columns: tuple[str, ...]
    text: Callable[[Row], str]


@dataclass(slots=True)
class Tally:
    """What became of the sidecars; with each count goes the first name.

    written   new ones, or replaced
    same      they were there
    kept      they were there, say something else, and are left
    shared    not written, since another input has the same (a.jpg and a.png: a.txt), or is that file itself
    homeless  inputs that are no file, or several
    stale     of error rows; they were there, and are left
    failed    the operating system refused
    """

    written: int = 0
    same: int = 0
    kept: int = 0
    shared: int = 0
    homeless: int = 0
    stale: int = 0
    failed: int = 0
    first_kept: str = ""
    first_shared: str = ""
    first_stale: str = ""
    failure: OutputError | None = None

    def count(self, what: str, path: str) -> None:
        """One more of `what`."""
        setattr(self, what, getattr(self, what) + 1)
        first = f"first_{what}"
        if hasattr(self, first) and not getattr(self, first):
            setattr(self, first, _shown(path))

    def line(self) -> str:
        """For the user, on one line."""
        told = [f"{self.written:,} written"]
        if self.same:
            told.append(f"{self.same:,} were there")
        if self.kept:
            told.append(f"{self.kept:,} that say something else are left ({self.first_kept})")
            told.append("--replace-sidecars replaces them")
        if self.shared:
            told.append(f"{self.shared:,} not written, since another input has that name ({self.first_shared})")
        if self.homeless:
            told.append(f"{self.homeless:,} inputs are no file")
        if self.stale:
            told.append(f"{self.stale:,} of inputs that failed now are left ({self.first_stale})")
        if self.failed:
            told.append(f"{self.failed:,} failed")
        return f"sidecars: {'; '.join(told)}"


def write_sidecars(
    records: Callable[[], Iterator[Record]], rows: Iterable[pa.RecordBatch], kinds: Sequence[str], replace: bool
) -> Tally:
    """Write those of all rows of an output.

    records  the inputs, in the order of the rows; called twice
    rows     `status` and the columns of `kinds`, from `output_rows`
    kinds    some of SIDECARS
    replace  also files that are there and say something else

    Failures of single files are counted, and the first is kept. 2.2 ms each, for the disk.
    """
    tally, synced = Tally(), ""
    with _claims() as claim:
        for record in records():
            path = _file(record)
            if path and os.path.splitext(path)[1][1:] in kinds:
                claim(path)
        for record, row in zip(records(), _dicts(rows), strict=True):
            path = _file(record)
            if path is None:
                tally.homeless += row["status"] == "ok"
                continue
            folder = os.path.dirname(path) or "."
            if folder != synced:
                _sync(synced, tally)
                synced = folder
            for kind in kinds:
                target = f"{os.path.splitext(path)[0]}.{kind}"
                if row["status"] != "ok":
                    if target != path and os.path.lexists(target):
                        tally.count("stale", target)
                elif not claim(target):
                    tally.count("shared", path)
                else:
                    _write(target, SIDECARS[kind].text(row).encode("utf-8", "backslashreplace"), replace, tally)
        _sync(synced, tally)
    return tally


def output_rows(place: Place, complete: bool, kinds: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """`status` and what `kinds` need of all rows: of a finished output, else of the committed parts."""
    columns = list(dict.fromkeys(["status", *(name for kind in kinds for name in SIDECARS[kind].columns)]))
    final = finished_output(place) if complete else None
    if final is not None:
        return read_rows(final, columns)
    return batches([part.path for part in read_parts(place.staging)], columns)


def _shown(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _dicts(rows: Iterable[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
    for batch in rows:
        yield from batch.to_pylist()


def _file(record: Record) -> str | None:
    """The file that a record is of; None when there is none, or several."""
    files = [media.file for media in record.media if media.file is not None]
    return files[0] if len(files) == 1 else None


@contextmanager
def _claims() -> Iterator[Callable[[str], bool]]:
    """Says whether a path is asked for for the first time. On disk: memory does not grow with the rows."""
    with (
        tempfile.TemporaryDirectory(prefix="mmcli-") as folder,
        closing(sqlite3.connect(Path(folder) / "claims.sqlite", isolation_level=None)) as database,
    ):
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.execute("PRAGMA cache_size = -8000")
        database.execute("CREATE TABLE claims (path BLOB PRIMARY KEY) WITHOUT ROWID")
        # Never committed: nobody else reads it.
        database.execute("BEGIN")

        def claim(path: str) -> bool:
            key = blake2b(os.fsencode(os.path.abspath(path)), digest_size=16).digest()
            return database.execute("INSERT OR IGNORE INTO claims VALUES (?)", (key,)).rowcount == 1

        yield claim


def _write(target: str, content: bytes, replace: bool, tally: Tally) -> None:
    try:
        if os.path.lexists(target):
            if _content(target, len(content)) == content:
                tally.same += 1
                return
            if not replace:
                tally.count("kept", target)
                return
        _put(target, content)
    except OSError as error:
        tally.failed += 1
        tally.failure = tally.failure or output_error(error, _shown(target))
    else:
        tally.written += 1


def _content(path: str, size: int) -> bytes | None:
    """The first `size` + 1 bytes of a file; None for what cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(size + 1)
    except OSError:
        return None


def _put(target: str, content: bytes) -> None:
    """Whole or not at all. The name of the temporary file is short: the target's may be as long as names can be."""
    folder, name = os.path.split(target)
    mark = blake2b(os.fsencode(name), digest_size=8).hexdigest()
    temporary = os.path.join(folder, f".{mark}.mmcli.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _sync(folder: str, tally: Tally) -> None:
    """Once for all files of a folder that follow one another."""
    if not folder or not tally.written:
        return
    try:
        fsync_folder(Path(folder))
    except OSError as error:
        tally.failure = tally.failure or output_error(error, folder)


# ------------------------------------------------------------------------------------------ what they say


def caption_text(row: Row) -> str:
    """On one line: kohya-ss reads the first of a file."""
    return f"{_one_line(row['caption'])}\n"


def srt_text(row: Row) -> str:
    """SubRip, as openai/whisper writes it."""
    cues = enumerate(subtitles(row["segments"]), 1)
    return "".join(
        f"{number}\n{_time(start, ',')} --> {_time(end, ',')}\n{text.replace('-->', '->')}\n\n"
        for number, (start, end, text) in cues
    )


def vtt_text(row: Row) -> str:
    """WebVTT (https://www.w3.org/TR/webvtt1): texts are escaped, since tags could be in them."""
    escaped = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    cues = "".join(
        f"{_time(start, '.')} --> {_time(end, '.')}\n{text.translate(escaped)}\n\n"
        for start, end, text in subtitles(row["segments"])
    )
    return f"WEBVTT\n\n{cues}"


def subtitles(segments: Sequence[Row]) -> Iterator[Cue]:
    """(start, end, text) in milliseconds: starts do not go back, ends are behind them, as players want."""
    last = 0
    for segment in segments:
        if text := _one_line(segment["text"]):
            last = max(last, round(1000 * segment["start"]))
            yield last, max(last + 1, round(1000 * segment["end"])), text


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _time(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{rest:03}"


# suffix -> what stands in it
SIDECARS = {
    "txt": Sidecar(("caption",), caption_text),
    "srt": Sidecar(("segments",), srt_text),
    "vtt": Sidecar(("segments",), vtt_text),
}
