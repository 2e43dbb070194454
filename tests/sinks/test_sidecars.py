"""Captions and subtitles beside the files that they are of: right, whole, and never over what is another's."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmcli.cli.boundary import run
from mmcli.core.records import Media, Record
from mmcli.sinks.sidecars import SIDECARS, Tally, srt_text, vtt_text, write_sidecars

SEGMENT = pa.struct([("start", pa.float64()), ("end", pa.float64()), ("text", pa.string())])
SCHEMA = pa.schema([("status", pa.string()), ("caption", pa.string()), ("segments", pa.list_(SEGMENT))])
IMAGES = Path(__file__).parents[2] / "sample_data/images"

Write = Callable[..., Tally]


def record(row: int, *files: str | None) -> Record:
    return Record(row, str(row), None, tuple(Media(file=file) for file in files))


def write(
    files: Sequence[str | Path | None], captions: Sequence[str | None], *kinds: str, replace: bool = False
) -> Tally:
    """A caption of None is an error row; it is also its row's only segment, of one second."""
    records = [record(row, file and str(file)) for row, file in enumerate(files)]
    rows = [
        {
            "status": "ok" if text is not None else "error",
            "caption": text,
            "segments": text and [{"start": 0.0, "end": 1.0, "text": text}],
        }
        for text in captions
    ]
    batches = (pa.RecordBatch.from_pylist([row], SCHEMA) for row in rows)
    return write_sidecars(lambda: iter(records), batches, kinds or ("txt",), replace)


# ------------------------------------------------------------------------------------------ what stands in them


def segments(*given: tuple[float, float, str]) -> dict[str, Any]:
    return {"segments": [{"start": start, "end": end, "text": text} for start, end, text in given]}


def test_subtitles() -> None:
    row = segments((0.0, 2.5, "Good <b>day</b> & welcome"), (3661.042, 3670, "one --> two\n\nthree"), (90, 91, " "))
    assert srt_text(row) == (
        "1\n00:00:00,000 --> 00:00:02,500\nGood <b>day</b> & welcome\n\n"
        "2\n01:01:01,042 --> 01:01:10,000\none -> two three\n\n"
    )
    assert vtt_text(row) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nGood &lt;b&gt;day&lt;/b&gt; &amp; welcome\n\n"
        "01:01:01.042 --> 01:01:10.000\none --&gt; two three\n\n"
    )


def test_times_that_players_refuse_are_mended() -> None:
    row = segments((5.0, 5.0, "no length"), (4.0, 4.5, "back"), (99 * 3600 + 3600.0, 360_001.5, "a hundred hours"))
    assert [line for line in srt_text(row).splitlines() if "-->" in line] == [
        "00:00:05,000 --> 00:00:05,001",
        "00:00:05,000 --> 00:00:05,001",
        "100:00:00,000 --> 100:00:01,500",
    ]


def test_ffmpeg_reads_them(tmp_path: Path) -> None:
    """By a reader that is not ours."""
    import av

    row = segments((0.5, 2.0, "Grüße, 世界"), (2.0, 3.25, "a < b"))
    for kind in ("srt", "vtt"):
        (tmp_path / f"a.{kind}").write_text(SIDECARS[kind].text(row), encoding="utf-8")
        with av.open(str(tmp_path / f"a.{kind}")) as container:
            packets = [p for p in container.demux(subtitles=0) if p.size]
            times = [(float(p.pts * p.time_base), float((p.pts + p.duration) * p.time_base)) for p in packets]
            texts = [bytes(p).decode() for p in packets]
        assert times == [(0.5, 2.0), (2.0, 3.25)]
        assert texts[0] == "Grüße, 世界"


def test_captions_are_one_line(tmp_path: Path) -> None:
    """kohya-ss reads the first line of a file."""
    write([tmp_path / "a.jpg"], ["A cat.\nIt sits\n\n on  a mat. "])
    assert (tmp_path / "a.txt").read_bytes() == b"A cat. It sits on a mat.\n"


# ------------------------------------------------------------------------------------------ where they go


def test_each_kind_beside_its_file(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    tally = write([tmp_path / "a.x.wav", tmp_path / "b/no-suffix"], ["one", "two"], "txt", "srt", "vtt")
    assert tally.written == 6
    assert (tmp_path / "a.x.txt").read_text() == "one\n"
    assert (tmp_path / "b/no-suffix.srt").read_text() == "1\n00:00:00,000 --> 00:00:01,000\ntwo\n\n"
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        *(f"a.x.{kind}" for kind in SIDECARS),
        *(f"no-suffix.{kind}" for kind in SIDECARS),
    }


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    files, captions = [tmp_path / "a.jpg", tmp_path / "b.jpg"], ["one", "two"]
    write(files, captions)
    before = (tmp_path / "a.txt").stat()
    (tmp_path / "b.txt").unlink()
    tally = write(files, captions)
    assert (tally.written, tally.same) == (1, 1)
    assert (tmp_path / "a.txt").stat() == before
    assert (tmp_path / "b.txt").read_text() == "two\n"


def test_what_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("by hand")
    tally = write([tmp_path / "a.jpg", tmp_path / "b.jpg"], ["one", "two"])
    assert (tmp_path / "a.txt").read_text() == "by hand"
    assert (tally.written, tally.kept) == (1, 1)
    assert (
        f"1 that say something else are left ({tmp_path}/a.txt); --replace-sidecars replaces them" in tally.line()
    )
    tally = write([tmp_path / "a.jpg"], ["one"], replace=True)
    assert (tmp_path / "a.txt").read_text() == "one\n"
    assert (tally.written, tally.kept) == (1, 0)


def test_an_error_row_leaves_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("of an earlier run")
    tally = write([tmp_path / "a.jpg", tmp_path / "b.jpg"], [None, None], replace=True)
    assert (tmp_path / "a.txt").read_text() == "of an earlier run"
    assert not (tmp_path / "b.txt").exists()
    assert (tally.stale, tally.written) == (1, 0)
    assert f"1 of inputs that failed now are left ({tmp_path}/a.txt)" in tally.line()


@pytest.mark.parametrize("replace", [False, True])
def test_one_name_for_two_inputs_is_the_first_ones(tmp_path: Path, replace: bool) -> None:
    """Whichever is written last would else be the caption of both."""
    files = [tmp_path / "a.jpg", tmp_path / "b.jpg", tmp_path / "x/.." / "a.png"]
    (tmp_path / "x").mkdir()
    for _ in range(2):
        tally = write(files, ["one", "two", "three"], replace=replace)
        assert (tmp_path / "a.txt").read_text() == "one\n"
        assert tally.shared == 1
        assert "a.png" in tally.line()


def test_an_input_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("an input")
    files = [tmp_path / "a.jpg", tmp_path / "a.txt"]
    tally = write(files, ["one", "two"], replace=True)
    assert (tmp_path / "a.txt").read_text() == "an input"
    assert (tally.written, tally.shared) == (0, 2)


def test_inputs_that_are_no_file(tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pylist([{"status": "ok", "caption": "one"}] * 3, SCHEMA)
    several = record(1, str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg"))
    with_text = Record(2, "2", None, (Media(file=str(tmp_path / "c.jpg")), Media(text="what is it?")))
    records = [record(0, None), several, with_text]
    tally = write_sidecars(lambda: iter(records), [batch], ("txt",), False)
    assert [path.name for path in tmp_path.iterdir()] == ["c.txt"]
    assert tally.homeless == 2
    assert "2 inputs are no file" in tally.line()


def test_names_that_are_not_utf_8_and_names_as_long_as_can_be(tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.jpg")
    long = str(tmp_path / ("l" * 251 + ".jpg"))
    tally = write([odd, long], ["one", "two"])
    assert (tally.written, tally.failed) == (2, 0)
    assert Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.txt")).read_text() == "one\n"
    assert (tmp_path / ("l" * 251 + ".txt")).read_text() == "two\n"


def test_what_cannot_be_written_is_counted_and_the_rest_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    files = [tmp_path / "a.jpg", tmp_path / "gone/b.jpg", tmp_path / "c.jpg"]
    tally = write(files, ["one", "two", "three"], replace=True)
    assert (tally.failed, tally.written) == (2, 1)
    assert tally.failure is not None
    assert str(tally.failure) == f"cannot write {tmp_path}/a.txt: Is a directory"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "c.txt"]


def test_a_full_disk_leaves_no_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    tally = write([tmp_path / "a.jpg"], ["one"])
    assert tally.failure is not None
    assert "No space left" in str(tally.failure)
    assert list(tmp_path.iterdir()) == []


def test_a_row_for_each_input() -> None:
    with pytest.raises(ValueError, match="zip"):
        write(["a.jpg"], [])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Of 500,000 error rows, and as many names: a set of these would be 60 MB."""
    rows = 500_000

    def records() -> Iterator[Record]:
        return (record(row, f"{tmp_path}/{row}.txt") for row in range(rows))

    def batches() -> Iterator[pa.RecordBatch]:
        for _ in range(rows // 1000):
            yield pa.RecordBatch.from_pylist([{"status": "error"}] * 1000, SCHEMA)

    before = _resident()
    write_sidecars(records, batches(), ("txt",), False)
    assert _resident() - before < 20_000


def _resident() -> int:
    """KiB at the peak since the last call."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three pictures and one that is broken."""
    monkeypatch.setenv("MMCLI_NUM_WORKERS", "0")
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, source in zip(("a.png", "b.png", "c.png"), sorted(IMAGES.glob("*.png")), strict=False):
        shutil.copy(source, folder / name)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    return folder


def captions(out: Path) -> dict[str, str]:
    return {row["id"]: row["caption"] for row in pq.read_table(out).to_pylist() if row["status"] == "ok"}


def test_captions_beside_pictures(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a second run finds its own captions no inputs, and writes those that are missing."""
    out = photos.parent / "o.parquet"
    command = ["caption", str(photos), "-m", "fake:8", "-o", str(out), "--txt"]
    assert run(command) == 3
    assert "sidecars: 3 written" in capsys.readouterr().err
    expected = captions(out)
    assert {path.stem: path.read_text() for path in photos.glob("*.txt")} == {
        Path(name).stem: f"{text}\n" for name, text in expected.items()
    }
    (photos / "b.txt").unlink()
    (photos / "c.txt").write_text("by hand")
    assert run(command) == 3
    said = capsys.readouterr().err
    assert "is complete already" in said
    assert "sidecars: 1 written; 1 were there; 1 that say something else are left" in said
    assert (photos / "b.txt").read_text() == f"{expected['b.png']}\n"
    assert (photos / "c.txt").read_text() == "by hand"
    assert run([*command, "--replace-sidecars"]) == 3
    assert (photos / "c.txt").read_text() == f"{expected['c.png']}\n"


def test_an_update_writes_what_is_new(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = photos.parent / "o.jsonl"
    command = ["caption", str(photos), "-m", "fake:8", "-o", str(out), "--txt"]
    assert run(command) == 3
    shutil.copy(photos / "a.png", photos / "d.png")
    (photos / "broken.png").unlink()
    assert run([*command, "--update"]) == 0
    assert "sidecars: 1 written; 3 were there" in capsys.readouterr().err
    assert (photos / "d.txt").read_text() == (photos / "a.txt").read_text()


def test_a_folder_that_cannot_be_written_ends_8_and_the_output_is_there(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "a.txt").mkdir()
    out = photos.parent / "o.parquet"
    command = ["caption", str(photos), "-m", "fake:8", "-o", str(out), "--txt", "--replace-sidecars"]
    assert run(command) == 8
    said = capsys.readouterr().err
    assert f"cannot write {photos}/a.txt: Is a directory" in said
    assert "the same command writes those that are missing" in said
    assert len(captions(out)) == 3
    (photos / "a.txt").rmdir()
    assert run(command) == 3
    assert (photos / "a.txt").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--srt", "--vtt", "-o", "o.parquet"], "--srt and --vtt: -m fake:8 does not hear speech"),
        (["--language", "de", "--translate", "-o", "o.parquet"], "--language and --translate: -m fake:8 does not"),
        (["--txt"], "--txt: written when all rows are there, from an output; add e.g. -o out.parquet"),
        (["--txt", "-o", "o.json", "-f", "coco"], "--txt: made from the rows of an output"),
        (["--replace-sidecars", "-o", "o.parquet"], "there are none; add --txt, --srt or --vtt"),
    ],
)
def test_refused(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    monkeypatch.chdir(photos.parent)
    assert run(["caption", "photos", "-m", "fake:8", *options]) == 2
    assert said in capsys.readouterr().err
