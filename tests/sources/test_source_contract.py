"""What every source promises: one record per input, in order, from any start."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from source_helpers import STRUCT, write_files, write_parquet

from mmcli.core.protocols import Source
from mmcli.core.signature import signature
from mmcli.sources.open import SourceOptions, open_source

NAMES = [f"{'ab'[i % 2]}/{i:02}.jpg" for i in range(23)]


def folder(root: Path) -> SourceOptions:
    return SourceOptions((str(root / "media"),))


def files(root: Path) -> SourceOptions:
    return SourceOptions(tuple(str(root / "media" / n) for n in NAMES))


def wildcard(root: Path) -> SourceOptions:
    return SourceOptions((str(root / "media" / "**" / "*.jpg"),))


def list_file(root: Path) -> SourceOptions:
    (root / "list.txt").write_text("".join(f"{root}/media/{n}\n" for n in NAMES))
    return SourceOptions((str(root / "list.txt"),), input_format="paths")


def parquet_paths(root: Path) -> SourceOptions:
    write_parquet(root / "m.parquet", {"image": [f"media/{n}" for n in NAMES]}, row_group_size=5)
    return SourceOptions((str(root / "m.parquet"),))


def parquet_bytes(root: Path) -> SourceOptions:
    data = [b"%d" % i if i % 7 else None for i in range(23)]
    write_parquet(root / "m.parquet", {"image": data, "label": range(23)}, row_group_size=5)
    return SourceOptions((str(root / "m.parquet"),), keep=("label",))


def parquet_struct(root: Path) -> SourceOptions:
    cells = [{"bytes": b"x" if i % 3 else None, "path": f"media/{n}"} for i, n in enumerate(NAMES)]
    write_parquet(root / "m.parquet", {"image": pa.array(cells, STRUCT)}, row_group_size=5)
    return SourceOptions((str(root / "m.parquet"),))


def jsonl(root: Path) -> SourceOptions:
    lines = [f'{{"image": "media/{n}", "caption": "c{i}"}}' for i, n in enumerate(NAMES)]
    lines[4], lines[9] = "{", ""
    (root / "m.jsonl").write_text("\n".join([*lines, '{"image": 5}']))
    return SourceOptions((str(root / "m.jsonl"),), image_column="image", text_column="caption")


def csv(root: Path) -> SourceOptions:
    (root / "m.csv").write_text("image,n\n" + "".join(f"media/{n},{i}\n" for i, n in enumerate(NAMES[1:])) + "x\n")
    return SourceOptions((str(root / "m.csv"),), keep=("n:int",))


def imagefolder(root: Path) -> SourceOptions:
    (root / "media" / "metadata.csv").write_text("file_name,label\n" + "".join(f"{n},l\n" for n in NAMES))
    return SourceOptions((str(root / "media"),), keep=("label",))


def chain(root: Path) -> SourceOptions:
    (root / "m.csv").write_text("image\n" + "".join(f"media/{n}\n" for n in NAMES[:7]))
    first = [str(root / "media" / n) for n in NAMES[7:15]]
    write_files(root / "other", *NAMES[15:])
    return SourceOptions((*first, str(root / "m.csv"), str(root / "other")))


MAKERS = [folder, files, wildcard, list_file, parquet_paths, parquet_bytes, parquet_struct, jsonl, csv]
MAKERS += [imagefolder, chain]


@pytest.fixture(params=MAKERS, ids=lambda m: m.__name__)
def options(request: Any, tmp_path: Path) -> SourceOptions:
    write_files(tmp_path / "media", *NAMES)
    made: SourceOptions = request.param(tmp_path)
    return made


@pytest.fixture
def source(options: SourceOptions, tmp_path: Path) -> Source:
    return open_source(options)


def test_one_record_per_input_in_order(source: Source, tmp_path: Path) -> None:
    snapshot = source.snapshot(tmp_path / "s")
    records = list(source.records())
    assert len(records) == snapshot.rows == 23
    assert [r.row for r in records] == list(range(23))
    for record in records:
        assert len(record.keep) == len(source.keep)
        assert (record.error is None) == (len(record.media) == len(source.slots))
        assert record.error is None or record.error.stage == "source"


def test_from_any_start(source: Source, tmp_path: Path) -> None:
    source.snapshot(tmp_path / "s")
    records = [repr(r) for r in source.records()]
    for start in range(len(records) + 1):
        assert [repr(r) for r in source.records(start)] == records[start:]


def test_digest_and_signatures_are_stable(options: SourceOptions, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two", "one"):
        source = open_source(options)
        digest = source.snapshot(tmp_path / name).digest
        found.append((digest, [signature(r) for r in source.records()]))
    assert found[0] == found[1] == found[2]
    assert all((s is None) == (r.error is not None) for s, r in zip(found[0][1], source.records(), strict=True))


def test_snapshot_in_one_folder_twice(source: Source, tmp_path: Path) -> None:
    first = source.snapshot(tmp_path / "s")
    assert source.snapshot(tmp_path / "s") == first
    assert len(list(source.records())) == first.rows


def test_records_before_a_snapshot(source: Source) -> None:
    with pytest.raises(RuntimeError, match="snapshot"):
        next(source.records())


def _touch(path: Path) -> None:
    os.utime(path, ns=(5, path.stat().st_mtime_ns + 1))


def _grow(path: Path) -> None:
    mtime_ns = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"!")
    os.utime(path, ns=(5, mtime_ns))


@pytest.mark.parametrize("make", [m for m in MAKERS if m is not parquet_bytes])
@pytest.mark.parametrize("change", [_touch, _grow, Path.unlink])
def test_digest_changes_with_a_file(make: Any, change: Any, tmp_path: Path) -> None:
    write_files(tmp_path / "media", *NAMES)
    options = make(tmp_path)
    source = open_source(options)
    before = source.snapshot(tmp_path / "s").digest
    path = tmp_path / ("other" if make is chain else "media") / NAMES[18]
    os.utime(path, ns=(5, path.stat().st_mtime_ns))
    assert source.snapshot(tmp_path / "s").digest == before, "the time of access does not count"
    change(path)
    assert source.snapshot(tmp_path / "s").digest != before


def test_a_live_stream(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg", "b.jpg")
    stdin = io.BytesIO(f"{tmp_path}/a.jpg\n{tmp_path}/b.jpg\nhttp://x/y.jpg\n".encode())
    source = open_source(SourceOptions(("-",), live=True), stdin)
    assert source.snapshot(tmp_path / "s").rows is None
    records = source.records()
    assert next(records).id == f"{tmp_path}/a.jpg"
    # Only as much was read as was asked for.
    assert stdin.tell() < len(stdin.getvalue())
    assert [r.error.code if r.error else None for r in records] == [None, "policy_denied"]
