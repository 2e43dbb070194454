"""Full, read-only and failing file systems. Small ones are mounted where that is permitted."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from sink_rows import SCHEMA, expected, read_rows, signature_of, spec, table, wait_until, write

from mmcli.core.errors import OutputError
from mmcli.sinks.ahead import Ahead
from mmcli.sinks.commit import Staging
from mmcli.sinks.outputs import read_output
from mmcli.sinks.parquet import COPIED_ROWS, ParquetFormat, write_table
from mmcli.sinks.place import check_writable


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small file system here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def rows(start: int, stop: int) -> tuple[pa.Table, int, list[bytes]]:
    """What is committed."""
    return table(start, stop), start, [signature_of(row) for row in range(start, stop)]


def fill(folder: Path, leave: int) -> Path:
    """Take all space of a small disk but `leave` bytes."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
        file.truncate(max(0, file.tell() - leave))
    return filler


@pytest.mark.parametrize("leave", range(0, 60_000, 4096))
def test_a_full_disk_keeps_what_is_committed(small_disk: Path, leave: int) -> None:
    """Whichever step runs out of space: exit 8, committed rows stay, and the run goes on when there is room."""
    out = f"{small_disk}/out.parquet"
    write(out, spec("parquet"), [4], finalise=False)
    filler = fill(small_disk, leave)
    error = None
    try:
        write(out, spec("parquet"), [8, 12, 20])
    except OutputError as refused:
        error = refused
    if error is not None:
        assert error.exit_code == 8
        assert "No space left on device" in error.message
        assert "out.parquet" in error.message
        assert "committed rows are kept" in str(error.hint)
        assert read_output(out).rows >= 4
    filler.unlink()
    write(out, spec("parquet"), [8, 12, 20])
    assert read_rows(out, "parquet") == expected(20)


def test_what_is_written_ahead_gives_way_to_parts(small_disk: Path) -> None:
    """Both parts fit on 1 MB, but not beside the finished file as far as it is written."""
    out, stops = f"{small_disk}/out.parquet", [COPIED_ROWS, 7 * COPIED_ROWS // 2]
    with Staging(out, "parquet") as staging:
        staging.open(spec("parquet"))
        staging.commit(*rows(0, stops[0]))
        ahead = staging.folder / ".final.tmp"
        wait_until(lambda: ahead.exists() and ahead.stat().st_size > 250_000)
        staging.commit(*rows(*stops))
        with pytest.raises(OutputError, match="No space left"):
            staging.finalise(stops[-1])
    assert read_output(out).rows == stops[-1]
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    write(out, spec("parquet"), stops)
    assert read_rows(out, "parquet") == expected(stops[-1])


def test_a_part_is_tried_again_when_what_was_ahead_has_gone_by_itself(tmp_path: Path) -> None:
    """On a full disk both fail at once, and the space is free again before the part's commit can ask for it."""
    part = tmp_path / "part-000000.parquet"
    write_table(table(0, 8), part)
    ahead = Ahead(ParquetFormat(), tmp_path / "gone" / ".final.tmp", SCHEMA)
    ahead.add(part)
    wait_until(lambda: bool(ahead._added))
    assert ahead.discard()
    assert not ahead.discard()
    assert not Ahead(ParquetFormat(), tmp_path / ".final.tmp", SCHEMA).discard()


def test_a_full_disk_keeps_the_old_output(small_disk: Path) -> None:
    out = f"{small_disk}/out.parquet"
    write(out, spec("parquet"), [20])
    filler = fill(small_disk, 0)
    with pytest.raises(OutputError, match="No space left"):
        write(out, spec("parquet", inputs="b"), [20], "update", value=1)
    assert read_rows(out, "parquet") == expected(20)
    filler.unlink()


def test_a_read_only_file_system(small_disk: Path) -> None:
    out = f"{small_disk}/out.parquet"
    write(out, spec("parquet"), [4], finalise=False)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OutputError, match="Read-only file system"):
        write(out, spec("parquet"), [20])
    for other in ("other.parquet", "other/"):
        with pytest.raises(OutputError, match="Read-only file system"):
            check_writable(f"{small_disk}/{other}", "parquet")
        with pytest.raises(OutputError, match="Read-only file system"):
            write(f"{small_disk}/{other}", spec("parquet"), [4])
    assert read_output(out).rows == 4
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)


@pytest.mark.parametrize("nameless", [True, False])
def test_check_writable_leaves_nothing(
    target: tuple[str, str], nameless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not nameless:
        # As on macOS.
        monkeypatch.delattr(os, "O_TMPFILE")
    check_writable(*target)
    assert list(Path(target[0]).parent.iterdir()) == []


def test_check_writable_makes_no_name_that_a_kill_could_leave(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path, os.O_WRONLY | os.O_TMPFILE))
    except (AttributeError, OSError):
        pytest.skip("this file system has no files without a name")
    before = tmp_path.stat().st_mtime_ns
    check_writable(f"{tmp_path}/out.parquet", "parquet")
    assert tmp_path.stat().st_mtime_ns == before


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File name too long"):
        check_writable(f"{tmp_path}/{'a' * 250}.parquet", "parquet")
