"""Folders, wildcard patterns, single files and lists of paths."""

from __future__ import annotations

import io
import os
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_helpers import codes, digest, ids, listed, write_files

from mmcli.core.errors import ConfigError
from mmcli.core.extensions import guess_modality, looks_like_media
from mmcli.sources import folder as folder_module
from mmcli.sources.names import compile_glob, compile_pattern


def test_order_is_that_of_the_path_bytes(tmp_path: Path) -> None:
    names = ["a/b.jpg", "a-b.jpg", "a.jpg", "B.jpg", "ä.jpg", "a/b/c.jpg", "a0.jpg", "z/1.jpg", "10.jpg", "9.jpg"]
    write_files(tmp_path / "in", *names)
    _, records = listed(tmp_path, tmp_path / "in")
    assert ids(records) == sorted(names, key=os.fsencode)
    assert records[0].path == f"{tmp_path}/in/10.jpg" == records[0].media[0].file
    assert records[0].media[0].size == len("10.jpg")


SEGMENT = st.text("ab-. é\n*[\\\u0301", min_size=1, max_size=3).filter(
    lambda s: not s.startswith(".") and s.strip(".")
)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.lists(SEGMENT, min_size=1, max_size=4).map("/".join), max_size=12))
def test_any_tree(names: set[str]) -> None:
    files = {f"{name}.jpg" for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "in"
        root.mkdir()
        write_files(root, *files)
        snapshot, records = listed(Path(scratch), root)
        assert ids(records) == sorted(files, key=os.fsencode)
        assert snapshot.modalities == ({"image": len(files)} if files else {})
        for record in records:
            assert Path(record.media[0].file).read_bytes() == os.fsencode(record.id)


def test_large_folders_are_merged_from_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{i:03}.jpg" for i in range(500)] + [f"{i:03}/x.jpg" for i in range(0, 500, 50)]
    random.Random(1).shuffle(names)
    write_files(tmp_path / "in", *names)
    whole = digest(tmp_path, tmp_path / "in")
    monkeypatch.setattr(folder_module, "RUN_NAMES", 37)
    monkeypatch.setattr(folder_module, "_READ", 100)
    snapshot, records = listed(tmp_path, tmp_path / "in")
    assert ids(records) == sorted(names)
    assert snapshot.digest == whole


def test_names_that_are_not_utf8_or_hold_newlines(tmp_path: Path) -> None:
    write_files(tmp_path / "in", b"caf\xe9.jpg", "line\nbreak.jpg", "caf\u00e9.jpg", "cafe\u0301.jpg")
    _, records = listed(tmp_path, tmp_path / "in")
    assert ids(records) == ["cafe\u0301.jpg", "caf\u00e9.jpg", r"caf\xe9.jpg", "line\nbreak.jpg"]
    raw = records[2]
    assert raw.path == rf"{tmp_path}/in/caf\xe9.jpg"
    assert os.fsencode(raw.media[0].file) == os.fsencode(tmp_path) + b"/in/caf\xe9.jpg"
    assert Path(raw.media[0].file).read_bytes() == b"caf\xe9.jpg"


def test_what_is_no_medium_is_counted(tmp_path: Path) -> None:
    write_files(
        tmp_path / "in", "a.JPG", "b.json", "c.json", "README.md", "d.py", "notes.txt", "LICENSE", ".hidden.jpg"
    )
    (tmp_path / "in" / "scan").write_bytes(b"\x89PNG\r\n\x1a\n....")
    (tmp_path / "in" / "clip.xyz").write_bytes(b"RIFF....WAVEfmt ")
    snapshot, records = listed(tmp_path, tmp_path / "in")
    assert ids(records) == ["a.JPG", "clip.xyz", "notes.txt", "scan"]
    assert snapshot.modalities == {"image": 1, "text": 1, None: 2}
    what, kinds = snapshot.notes[0].split(": ")
    assert what == "skipped 5 files that are not media"
    assert sorted(kinds.split(", ")) == ["1 .md", "1 .py", "1 without an extension", "2 .json"]
    assert ".hidden.jpg" in ids(listed(tmp_path, tmp_path / "in", hidden=True)[1])


def test_a_manifest_in_a_folder_is_pointed_at(tmp_path: Path) -> None:
    write_files(tmp_path / "in", "a.parquet")
    snapshot, records = listed(tmp_path, tmp_path / "in")
    assert not records
    assert any("*.parquet" in note for note in snapshot.notes)


def test_globs_of_a_folder(tmp_path: Path) -> None:
    write_files(tmp_path / "in", "a.jpg", "b.png", "x/c.jpg", "x/y/d.jpg", "x/e.dat", "x/f.json")

    def found(*glob: str) -> list[str]:
        return ids(listed(tmp_path, tmp_path / "in", glob=glob)[1])

    assert found("*.jpg") == ["a.jpg", "x/c.jpg", "x/y/d.jpg"]
    assert found("x/*.jpg") == ["x/c.jpg"]
    assert found("x/**") == ["x/c.jpg", "x/y/d.jpg"]
    assert found("*.dat") == ["x/e.dat"]
    assert found("*.png", "*/y/*") == ["b.png", "x/y/d.jpg"]
    assert listed(tmp_path, tmp_path / "in", glob=("*.png",))[0].notes == [
        "skipped 5 files that are not matched by --glob"
    ]


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("*.jpg", ["a.jpg", "x/b.jpg"], ["a.png", "a.jpg/c"]),
        ("a/*.jpg", ["a/b.jpg"], ["a/b/c.jpg", "b/a/c.jpg"]),
        ("a/**/*.jpg", ["a/b.jpg", "a/b/c/d.jpg"], ["b.jpg"]),
        ("[!a]?.jpg", ["bc.jpg"], ["ac.jpg", "b.jpg"]),
        ("[]]x", ["]x"], ["[x"]),
        ("[x", ["[x"], ["x"]),
        (r"a\*.jpg", ["a\\b.jpg"], ["a*.jpg"]),
        ("a.b\n*", ["a.b\nc"], ["axb\nc"]),
    ],
)
def test_glob_patterns(pattern: str, matches: list[str], others: list[str]) -> None:
    compiled = compile_glob(pattern)
    assert all(compiled.fullmatch(m) for m in matches)
    assert not any(compiled.fullmatch(o) for o in others)
    assert compile_pattern("**").fullmatch("any/thing")


def test_quoted_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "in", "a.jpg", "b.jpg", "b.png", "x/c.jpg", "[1].jpg", "d.json")
    _, records = listed(tmp_path, f"{tmp_path}/in/*.jpg")
    assert ids(records) == [f"{tmp_path}/in/{n}" for n in ("[1].jpg", "a.jpg", "b.jpg")]
    assert ids(listed(tmp_path, f"{tmp_path}/in/[1].jpg")[1]) == [f"{tmp_path}/in/[1].jpg"], (
        "an existing name is one"
    )
    assert len(listed(tmp_path, f"{tmp_path}/**/*.jpg")[1]) == 4
    monkeypatch.chdir(tmp_path / "in")
    assert ids(listed(tmp_path, "*.json")[1]) == ["d.json"]
    with pytest.raises(ConfigError, match="no file matches"):
        listed(tmp_path, "*.gif")
    with pytest.raises(ConfigError, match="did you mean"):
        listed(tmp_path, f"{tmp_path}/inn/*.gif")


def test_symbolic_links(tmp_path: Path) -> None:
    write_files(tmp_path / "in", "a/b.jpg")
    (tmp_path / "in" / "a" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "self").symlink_to("self")
    (tmp_path / "in" / "again").symlink_to("a")
    (tmp_path / "in" / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "in" / "link.jpg").symlink_to("a/b.jpg")
    snapshot, records = listed(tmp_path, tmp_path / "in")
    assert ids(records) == ["a/b.jpg", "again/b.jpg", "gone.jpg", "link.jpg"]
    assert records[2].media[0].size is None
    assert "skipped 2 symbolic links that lead back to a folder above them" in snapshot.notes
    snapshot, records = listed(tmp_path, tmp_path / "in", follow_symlinks=False)
    assert ids(records) == ["a/b.jpg"]
    assert "skipped 5 symbolic links" in snapshot.notes


def test_deep_trees(tmp_path: Path) -> None:
    deep = "/".join(["d"] * 400)
    (tmp_path / "in").mkdir()
    for depth in range(100, 401, 100):
        os.makedirs(f"{tmp_path}/in/" + deep[: 2 * depth], exist_ok=True)
    write_files(tmp_path / "in", f"{deep}/x.jpg")
    assert ids(listed(tmp_path, tmp_path / "in")[1]) == [f"{deep}/x.jpg"]


def test_a_folder_that_cannot_be_read_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "in", "a.jpg", "b/secret.jpg", "c.jpg")
    scandir = os.scandir

    def refusing(path: bytes) -> object:
        if os.fsencode(path).endswith(b"/b/"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    # Tests may run as root, whom no mode stops.
    monkeypatch.setattr(os, "scandir", refusing)
    snapshot, records = listed(tmp_path, tmp_path / "in")
    assert ids(records) == ["a.jpg", "b/", "c.jpg"]
    assert codes(records) == [None, "permission", None]
    assert snapshot.rows == 3


def test_special_files_and_staging_folders_are_no_rows(tmp_path: Path) -> None:
    write_files(tmp_path / "in", "a.jpg", "out.parquet.mmcli/x.jpg")
    os.mkfifo(tmp_path / "in" / "pipe.jpg")
    os.mkfifo(tmp_path / "in" / "pipe")
    snapshot, records = listed(tmp_path, tmp_path / "in")
    assert ids(records) == ["a.jpg"]
    assert "skipped 1 file that is not regular (pipes, sockets, devices)" in snapshot.notes


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    snapshot, records = listed(tmp_path, tmp_path / "in")
    assert (snapshot.rows, records, snapshot.modalities) == (0, [], {})


def test_several_folders_and_files(tmp_path: Path) -> None:
    write_files(tmp_path, "one/a.jpg", "two/a.jpg", "c.bin")
    _, records = listed(tmp_path, f"{tmp_path}/one/", tmp_path / "c.bin", tmp_path / "two", tmp_path / "c.bin")
    assert ids(records) == ["a.jpg", f"{tmp_path}/c.bin", "a.jpg", f"{tmp_path}/c.bin"]
    assert records[0].path == f"{tmp_path}/one/a.jpg"


def test_digest_of_a_folder(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_files(root, "a.jpg", "b.jpg")
    first = digest(tmp_path, root)
    (root / "b.jpg").rename(root / "c.jpg")
    renamed = digest(tmp_path, root)
    (root / "c.jpg").rename(root / "b.jpg")
    assert digest(tmp_path, root) == first != renamed
    write_files(root, "x.json")
    assert digest(tmp_path, root) == first, "files that are no rows do not count"
    write_files(root, "0.jpg")
    assert digest(tmp_path, root) != first


def test_paths_on_stdin(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg", "b\nc.jpg", b"\xff.jpg")
    base = os.fsencode(tmp_path)
    lines = b"\n".join([base + b"/a.jpg", b"", base + b"/a.jpg\r", base + b"/gone.jpg", base, b"s3://x/y", b"n\0l"])
    _, records = listed(tmp_path, "-", stdin=io.BytesIO(lines))
    assert codes(records) == [None, None, None, "bad_row", "policy_denied", "bad_row"]
    assert [r.media[0].size for r in records[:3]] == [5, 5, None]
    _, records = listed(
        tmp_path, "-", stdin=io.BytesIO(base + b"/b\nc.jpg\0" + base + b"/\xff.jpg"), null_separated=True
    )
    assert ids(records) == [f"{tmp_path}/b\nc.jpg", rf"{tmp_path}/\xff.jpg"]
    assert [Path(r.media[0].file).read_bytes() for r in records] == [b"b\nc.jpg", b"\xff.jpg"]


def test_real_photos(shared_data: Path, tmp_path: Path) -> None:
    snapshot, records = listed(tmp_path, shared_data / "images")
    on_disk = [p for p in (shared_data / "images").rglob("*") if p.is_file()]
    skipped = (
        sum(int(part.split()[0]) for part in snapshot.notes[0].split(": ")[1].split(", ")) if snapshot.notes else 0
    )
    assert len(records) + skipped == len(on_disk)
    assert all(r.media[0].size == os.path.getsize(r.media[0].file) for r in records)


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("x.jpg", "image"), ("a.b/X.TIFF", "image"), ("x.opus", "audio"), ("x.MP4", "video"), ("x.txt", "text"),
        ("jpg", None), (".jpg", None), ("x.jpg/", None), ("x.json", None), ("x.jpg ", None), ("", None),
    ],
)  # fmt: skip
def test_modality_by_name(name: str, modality: str | None) -> None:
    assert guess_modality(name) == modality


def test_media_by_magic() -> None:
    for head in (b"\xff\xd8\xff\xe0", b"GIF89a", b"\0\0\0 ftypisom", b"RIFF1234WEBP", b"OggS", b"fLaC"):
        assert looks_like_media(head)
    for head in (b"", b"BM", b"RIFF1234CDXA", b"#!/bin/sh", b"PK\3\4"):
        assert not looks_like_media(head)


def test_a_time_beyond_64_bits(tmp_path: Path) -> None:
    write_files(tmp_path, "in/a.jpg")
    os.utime(tmp_path / "in" / "a.jpg", (13_569_465_600, 13_569_465_600))  # the year 2400
    _, (record,) = listed(tmp_path, tmp_path / "in")
    assert record.media[0].mtime_ns in (os.stat(tmp_path / "in" / "a.jpg").st_mtime_ns, 2**63 - 1)
