"""Files in folders of their labels: a function of the rows, and never at the cost of what is somebody else's."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_disk import fill
from test_disk import small_disk as small_disk

from mmcli.core.errors import ConfigError
from mmcli.core.records import Media, Record
from mmcli.sinks.class_folders import Slot, Tally, label_slots, place_files
from mmcli.sinks.class_notes import Into, check_folder

TOP = pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))
SCHEMA = pa.schema([("id", pa.string()), ("status", pa.string()), ("label", pa.string()), ("score", pa.float32())])
MULTI = pa.schema([*SCHEMA, ("labels", pa.list_(pa.string())), ("top_k", TOP)])

FAILED: Any = object()


def place(folder: Path, files: Mapping[Path, str | None], copy: bool = False, out: str = "o.parquet") -> Tally:
    """The files and their labels; None: no label, FAILED: an error row."""
    records = [Record(row, f.name, str(f), (Media(file=str(f)),)) for row, f in enumerate(files)]
    rows = [
        {
            "id": os.fsencode(path.name).decode("utf-8", "backslashreplace"),
            "status": "error" if label is FAILED else "ok",
            "label": None if label is FAILED else label,
            "score": 0.1,
        }
        for path, label in files.items()
    ]
    into = Into(folder, folder.resolve().parent / out, copy)
    return place_files(iter(records), [pa.RecordBatch.from_pylist(rows, SCHEMA)], [Slot()], into)


def made(folder: Path, *names: str) -> list[Path]:
    """Files, each with a content of its own."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"this is {name}", errors="replace")
    return [folder / name for name in names]


def tree(folder: Path) -> dict[str, str]:
    """What is visible in the folders of labels: names and contents."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.glob("*/*"))
        if path.parent.name != ".mmcli"
    }


def metadata(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return made(tmp_path / "in", "a.jpg", "b.jpg", "c.jpg")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sorted"


@pytest.mark.parametrize("copy", [False, True])
def test_every_file_is_in_the_folder_of_its_label(folder: Path, files: list[Path], copy: bool) -> None:
    os.utime(files[0], ns=(5, 1_234_567_890_123_456_789))
    tally = place(folder, dict(zip(files, ["cat", "dog", "cat"], strict=True)), copy)
    assert tree(folder) == {
        "cat/a.jpg": "this is a.jpg", "cat/c.jpg": "this is c.jpg", "dog/b.jpg": "this is b.jpg",
    }  # fmt: skip
    assert metadata(folder) == [
        {"file_name": "cat/a.jpg", "label": "cat", "score": "0.1", "id": "a.jpg"},
        {"file_name": "dog/b.jpg", "label": "dog", "score": "0.1", "id": "b.jpg"},
        {"file_name": "cat/c.jpg", "label": "cat", "score": "0.1", "id": "c.jpg"},
    ]
    placed = folder / "cat/a.jpg"
    assert placed.is_symlink() != copy
    assert placed.lstat().st_mtime_ns == 1_234_567_890_123_456_789 or not copy
    assert copy or os.path.isabs(os.readlink(placed))
    assert tally.line(folder) == f"{folder}: 3 {'copied' if copy else 'linked'}"
    assert tally.failure is None


def test_links_of_relative_paths_lead_to_the_files(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where `link/..` is not what it looks like."""
    made(tmp_path / "far/in", "a.jpg")
    (tmp_path / "far/in/a.jpg").write_text("the other one")
    (tmp_path / "far/deep").mkdir()
    (tmp_path / "link").symlink_to("far/deep")
    monkeypatch.chdir(tmp_path)
    place(Path("sorted"), {Path("in/a.jpg"): "cat", Path("link/../in/a.jpg"): "dog"})
    monkeypatch.chdir("/")
    assert tree(tmp_path / "sorted") == {"cat/a.jpg": "this is a.jpg", "dog/a.jpg": "the other one"}


def test_what_is_left_out_is_counted(folder: Path, files: list[Path]) -> None:
    tally = place(folder, dict(zip(files, ["cat", None, FAILED], strict=True)))
    assert tree(folder) == {"cat/a.jpg": "this is a.jpg"}
    assert tally.line(folder) == f"{folder}: 1 linked; 1 without a label left out; 1 error rows left out"


def test_inputs_that_are_no_file_are_counted(folder: Path, tmp_path: Path, files: list[Path]) -> None:
    media = [(Media(data=b"x"),), (Media(text="t"),), (Media(file="a"), Media(file="b")), (Media(),), (Media(),)]
    paths = [None, None, None, "in/a.jpg", str(files[1])]
    records = [Record(row, f"m#{row}", path, m) for row, (m, path) in enumerate(zip(media, paths, strict=True))]
    rows = [{"id": r.id, "status": "ok", "label": "cat", "score": None} for r in records]
    batch = pa.RecordBatch.from_pylist(rows, SCHEMA)
    tally = place_files(iter(records), [batch], [Slot()], Into(folder, tmp_path / "o.parquet"))
    assert tree(folder) == {"cat/b.jpg": "this is b.jpg"}  # A vector with an absolute path.
    assert (tally.homeless, tally.first_homeless) == (4, "m#0")
    assert metadata(folder)[0]["score"] == ""


def test_vectors_say_why_their_files_are_not_known(folder: Path, tmp_path: Path) -> None:
    record = Record(0, "a", "in/a.jpg", (Media(),))
    batch = pa.RecordBatch.from_pylist([{"id": "a", "status": "ok", "label": "cat", "score": None}], SCHEMA)
    tally = place_files(iter([record]), [batch], [Slot()], Into(folder, tmp_path / "o.parquet"))
    assert "in/a.jpg: not known where; mmcli embed notes absolute paths when INPUT is absolute" in tally.line(
        folder
    )


def test_several_labels(folder: Path, files: list[Path]) -> None:
    top = [{"label": "cat", "score": 0.75}, {"label": "dog", "score": 0.5}]
    records = [Record(row, f.name, None, (Media(file=str(f)),)) for row, f in enumerate(files)]
    base = {"status": "ok", "score": 0.75, "top_k": top}
    rows = [
        {**base, "id": "a", "label": "cat", "labels": ["cat", "dog", "rare"]},
        {**base, "id": "b", "label": "cat", "labels": []},
        {**base, "id": "c", "label": None, "labels": ["cat"]},
    ]
    batch = pa.RecordBatch.from_pylist(rows, MULTI)
    tally = place_files(iter(records), [batch], [Slot()], Into(folder, folder.parent / "o.parquet"))
    assert sorted(tree(folder)) == ["cat/a.jpg", "dog/a.jpg", "rare/a.jpg"]
    assert [row["score"] for row in metadata(folder)] == ["0.75", "0.5", ""]
    assert tally.unlabelled == 2


def test_each_slot_has_its_own_label(folder: Path, files: list[Path]) -> None:
    fields = [f.with_name(p + f.name) for p in ("image_", "text_") for f in list(SCHEMA)[2:]]
    schema = pa.schema([*list(SCHEMA)[:2], *fields])
    slots = label_slots(schema.names, ["image", "text"])
    assert slots == [Slot("image_", 0), Slot("text_", 1)]
    record = Record(0, "0", None, (Media(file=str(files[0])), Media(text="words")))
    row = {"id": "0", "status": "ok", "image_label": "cat", "text_label": "dog"}
    batch = pa.RecordBatch.from_pylist([row], schema)
    tally = place_files(iter([record]), [batch], slots, Into(folder, folder.parent / "o.parquet"))
    assert list(tree(folder)) == ["cat/a.jpg"]
    assert tally.homeless == 1


def test_one_name_for_several_files(folder: Path, tmp_path: Path) -> None:
    files = made(tmp_path, "x/a.jpg", "y/a.jpg", "z/A.JPG", "w/a.jpg")
    place(folder, dict(zip(files, ["cat", "cat", "cat", "dog"], strict=True)))
    assert tree(folder) == {
        "cat/A-3.JPG": "this is z/A.JPG",
        "cat/a-2.jpg": "this is y/a.jpg",
        "cat/a.jpg": "this is x/a.jpg",
        "dog/a.jpg": "this is w/a.jpg",
    }


def test_names_that_are_no_text(folder: Path, tmp_path: Path) -> None:
    """imagefolder reads file_name as UTF-8: names in FOLDER have to be that."""
    source = made(tmp_path / "in", os.fsdecode(b"caf\xe9\n.jpg"), ".dot.jpg")
    place(folder, dict(zip(source, ["../..", "."], strict=True)))
    assert sorted(tree(folder)) == ["%2E.%2F../caf%E9%0A.jpg", "%2E/%2Edot.jpg"]
    assert [(row["file_name"], row["label"]) for row in metadata(folder)] == [
        ("%2E.%2F../caf%E9%0A.jpg", "../.."), ("%2E/%2Edot.jpg", "."),
    ]  # fmt: skip
    assert (folder / "%2E.%2F../caf%E9%0A.jpg").resolve() == source[0].resolve()
    assert sorted(os.listdir(folder.parent)) == ["in", "sorted"]


# ---------------------------------------------------------------------------------------------- running again


@pytest.mark.parametrize("copy", [False, True])
def test_again_changes_nothing(folder: Path, files: list[Path], copy: bool) -> None:
    labels = dict(zip(files, ["cat", "dog", "cat"], strict=True))

    def state(path: Path) -> tuple[int, ...]:
        """Not the time of access: metadata.csv is read."""
        found = path.lstat()
        return found.st_ino, found.st_mode, found.st_nlink, found.st_size, found.st_mtime_ns

    place(folder, labels, copy)
    before = {p: state(p) for p in folder.rglob("*") if p.parent.name != ".mmcli" and not p.is_dir()}
    tally = place(folder, labels, copy)
    assert {p: state(p) for p in before} == before
    assert len(before) == 4
    assert (tally.placed, tally.same) == (0, 3)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("was_copy", [False, True])
def test_another_label_moves_a_file(folder: Path, files: list[Path], was_copy: bool, copy: bool) -> None:
    place(folder, dict(zip(files, ["cat", "dog", "cat"], strict=True)), was_copy)
    tally = place(folder, dict(zip(files, ["cat", "cat", None], strict=True)), copy)
    assert sorted(tree(folder)) == ["cat/a.jpg", "cat/b.jpg"]
    assert [row["file_name"] for row in metadata(folder)] == ["cat/a.jpg", "cat/b.jpg"]
    assert not (folder / "dog").exists()
    assert tally.removed == 2
    assert (tally.placed, tally.same) == ((1, 1) if copy == was_copy else (2, 0))
    assert all(path.is_symlink() != copy for path in folder.glob("*/*.jpg"))


@pytest.mark.parametrize("copy", [False, True])
def test_a_name_goes_to_another_file(folder: Path, tmp_path: Path, copy: bool) -> None:
    """The name that the first has left is free for the second."""
    one, two = made(tmp_path, "x/a.jpg", "y/a.jpg")
    place(folder, {one: "cat", two: "cat"}, copy)
    tally = place(folder, {one: "dog", two: "cat"}, copy)
    assert tree(folder) == {"cat/a.jpg": "this is y/a.jpg", "dog/a.jpg": "this is x/a.jpg"}
    assert tally.failure is None


def test_a_changed_source_is_copied_again(folder: Path, files: list[Path]) -> None:
    place(folder, {files[0]: "cat"}, copy=True)
    files[0].write_text("more than before")
    tally = place(folder, {files[0]: "cat"}, copy=True)
    assert tree(folder) == {"cat/a.jpg": "more than before"}
    files[0].write_text("and more than before")
    place(folder, {files[0]: "dog"}, copy=True)
    assert tree(folder) == {"dog/a.jpg": "and more than before"}
    assert tally.placed == 1


@pytest.mark.parametrize("label", ["cat", "dog"])
def test_a_copy_that_was_changed_by_hand_is_left(folder: Path, files: list[Path], label: str) -> None:
    place(folder, {files[0]: "cat"}, copy=True)
    (folder / "cat/a.jpg").write_text("cropped by hand")
    for _ in range(2):
        tally = place(folder, {files[0]: label}, copy=True)
        assert (folder / "cat/a.jpg").read_text() == "cropped by hand"
        assert sorted(tree(folder)) == sorted({"cat/a.jpg", f"{label}/a.jpg"})
        assert (tally.changed, tally.left) == ((1, 0) if label == "cat" else (0, 1))
        assert f"({folder}/cat/a.jpg)" in tally.line(folder)


def test_a_file_in_the_place_of_a_link_is_left(folder: Path, files: list[Path]) -> None:
    place(folder, {files[0]: "cat"})
    (folder / "cat/a.jpg").unlink()
    (folder / "cat/a.jpg").write_text("by hand")
    tally = place(folder, {files[0]: "dog"})
    assert tree(folder) == {"cat/a.jpg": "by hand", "dog/a.jpg": "this is a.jpg"}
    assert tally.left == 1


def test_the_last_copy_is_left(folder: Path, files: list[Path]) -> None:
    place(folder, {files[0]: "cat", files[1]: "cat"}, copy=True)
    files[0].unlink()
    tally = place(folder, {files[1]: "cat"}, copy=True)
    assert sorted(tree(folder)) == ["cat/a.jpg", "cat/b.jpg"]
    assert "1 that belong elsewhere now are left, since they were changed or their source is gone" in tally.line(
        folder
    )
    # Nor does another file of that name take its place.
    other = made(folder.parent / "other", "a.jpg")[0]
    place(folder, {files[1]: "cat", other: "cat"}, copy=True)
    assert tree(folder)["cat/a.jpg"] == "this is a.jpg"
    assert (folder / "cat/a-2.jpg").stat().st_size == other.stat().st_size
    assert len(tree(folder)) == 3


@pytest.mark.parametrize("copy", [False, True])
def test_a_foreign_file_keeps_its_name(folder: Path, files: list[Path], copy: bool) -> None:
    place(folder, {files[0]: "cat"}, copy)
    (folder / "dog").mkdir()
    (folder / "dog/b.jpg").write_text("mine")
    labels = {files[0]: "cat", files[1]: "dog"}
    for _ in range(2):
        place(folder, labels, copy)
        assert tree(folder) == {
            "cat/a.jpg": "this is a.jpg", "dog/b-2.jpg": "this is b.jpg", "dog/b.jpg": "mine",
        }  # fmt: skip
    place(folder, {files[0]: "cat"}, copy)
    assert tree(folder) == {"cat/a.jpg": "this is a.jpg", "dog/b.jpg": "mine"}
    (folder / "dog/b.jpg").unlink()
    place(folder, labels, copy)
    assert sorted(tree(folder)) == ["cat/a.jpg", "dog/b.jpg"]


def test_what_is_removed_is_forgotten(folder: Path, files: list[Path]) -> None:
    """A link of the same kind that the user makes later is the user's."""
    place(folder, {files[0]: "cat"})
    place(folder, {files[0]: "dog"})
    (folder / "cat").mkdir()
    (folder / "cat/a.jpg").symlink_to(files[0])
    tally = place(folder, {files[0]: "dog"})
    assert sorted(tree(folder)) == ["cat/a.jpg", "dog/a.jpg"]
    assert (tally.removed, tally.left) == (0, 0)


def test_its_own_files_are_not_put_into_it(folder: Path, files: list[Path]) -> None:
    """As when `find` lists FOLDER, too."""
    place(folder, {files[0]: "cat"})
    tally = place(folder, {files[0]: "cat", folder / "cat/a.jpg": "cat"})
    assert sorted(tree(folder)) == ["cat/a.jpg"]
    assert tally.inside == 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(["A", "a", "b/", None]), min_size=5, max_size=5), st.booleans()),
        min_size=1,
        max_size=4,
    )
)
def test_only_the_last_rows_matter(runs: Sequence[tuple[list[str | None], bool]]) -> None:
    """Whatever was there before, FOLDER is what one run into an empty one makes."""
    base = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        files = made(base, "x/a.jpg", "y/a.jpg", "z/a.jpg", "x/b.jpg", "y/A.jpg")
        for labels, copy in runs:
            tally = place(base / "sorted", dict(zip(files, labels, strict=True)), copy)
            assert (tally.failed, tally.left, tally.changed, tally.failure) == (0, 0, 0, None)
        place(base / "anew", dict(zip(files, runs[-1][0], strict=True)), runs[-1][1])
        found = [
            {
                str(p.relative_to(root)): (p.is_symlink(), p.read_text())
                for p in root.rglob("*")
                if p.is_file() and ".mmcli" not in p.parts
            }
            for root in (base / "sorted", base / "anew")
        ]
        assert found[0] == found[1]
        assert [p.name for p in (base / "sorted").iterdir() if p.is_dir() and not any(p.iterdir())] == []
    finally:
        shutil.rmtree(base)


# ---------------------------------------------------------------------------------------------- what goes wrong


def test_sources_that_vanished(folder: Path, files: list[Path]) -> None:
    labels = dict(zip(files, ["cat", "dog", "cat"], strict=True))
    content = files[1].read_text()
    files[1].unlink()
    tally = place(folder, labels)
    assert sorted(tree(folder)) == ["cat/a.jpg", "cat/c.jpg"]
    assert len(metadata(folder)) == 2
    assert tally.failed == 1
    assert str(tally.failure) == f"cannot read {files[1]}: No such file or directory"
    files[1].write_text(content)
    tally = place(folder, labels)
    assert (tally.placed, tally.same, tally.failure) == (1, 2, None)


def test_a_file_in_the_place_of_a_label(folder: Path, files: list[Path]) -> None:
    place(folder, {files[0]: "cat"})
    (folder / "dog").write_text("mine")
    tally = place(folder, {files[0]: "cat", files[1]: "dog"})
    assert (tally.same, tally.failed) == (1, 1)
    assert str(tally.failure) == f"cannot write {folder}/dog: Not a directory"
    assert (folder / "dog").read_text() == "mine"


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="there is no /proc")
def test_a_source_that_fails_on_the_way(folder: Path, files: list[Path]) -> None:
    tally = place(folder, {Path("/proc/self/mem"): "cat", files[0]: "cat"}, copy=True)
    assert tree(folder) == {"cat/a.jpg": "this is a.jpg"}
    assert [row["file_name"] for row in metadata(folder)] == ["cat/a.jpg"]
    assert (tally.placed, tally.failed) == (1, 1)
    assert "/mem: Input/output error" in str(tally.failure)
    assert os.listdir(folder / "cat") == ["a.jpg"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_source_that_cannot_be_read(folder: Path, files: list[Path]) -> None:
    files[0].chmod(0)
    tally = place(folder, {files[0]: "cat", files[1]: "cat"}, copy=True)
    assert sorted(tree(folder)) == ["cat/b.jpg"]
    assert str(tally.failure) == f"cannot read {files[0]}: Permission denied"


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("leave", [0, *range(4096, 80_000, 8192)])
def test_a_full_disk(small_disk: Path, tmp_path: Path, leave: int, copy: bool) -> None:
    """Whichever step runs out of space: what is there stays, and a run with room completes it."""
    files = made(tmp_path / "in", *(f"{number}.jpg" for number in range(8)))
    for file in files:
        file.write_text(file.name * 500)
    place(small_disk / "sorted", dict.fromkeys(files[:2], "cat"), copy)
    before = tree(small_disk / "sorted")
    filler = fill(small_disk, leave)
    tally = place(small_disk / "sorted", dict.fromkeys(files, "dog"), copy)
    if tally.failure is not None:
        assert "full" in str(tally.failure) or "No space left on device" in str(tally.failure)
        assert "cannot write" in str(tally.failure) or "nothing can be written" in str(tally.failure)
        assert tree(small_disk / "sorted").items() >= before.items()
        assert tally.failed <= 1
        assert len(metadata(small_disk / "sorted")) == 2
    filler.unlink()
    assert place(small_disk / "sorted", dict.fromkeys(files, "dog"), copy).failure is None
    assert tree(small_disk / "sorted") == {f"dog/{file.name}": file.name * 500 for file in files}


def test_a_folder_that_cannot_be_written(small_disk: Path, files: list[Path]) -> None:
    place(small_disk / "sorted", {files[0]: "cat"})
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    tally = place(small_disk / "sorted", {files[1]: "cat"})
    assert f"nothing can be written in {small_disk}/sorted: Read-only file system" in str(tally.failure)
    assert f"nothing can be written in {small_disk}: Read-only" in problem(small_disk / "anew")


def test_a_file_system_without_links(tmp_path: Path) -> None:
    """As FAT; this one is of the kernel itself."""
    (tmp_path / "disk").mkdir()
    made = subprocess.run(["mount", "-t", "mqueue", "none", tmp_path / "disk"], capture_output=True)
    if made.returncode:
        pytest.skip(f"cannot mount such a file system here: {made.stderr.decode().strip()}")
    try:
        assert "no symbolic links can be made there" in problem(tmp_path / "disk/sorted")
        check_folder(Into(tmp_path / "disk/sorted", tmp_path / "o.parquet", copy=True))
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


@pytest.mark.parametrize("step", [1, 100, 1000, 10**9, 2 * 10**9])
def test_file_systems_that_keep_time_in_steps(folder: Path, files: list[Path], step: int) -> None:
    os.utime(files[0], ns=(0, 1_234_567_891_123_456_789))
    place(folder, {files[0]: "cat"}, copy=True)
    os.utime(folder / "cat/a.jpg", ns=(0, 1_234_567_891_123_456_789 // step * step))
    assert place(folder, {files[0]: "cat"}, copy=True).same == 1
    os.utime(folder / "cat/a.jpg", ns=(0, 1_234_567_891_123_456_790))
    assert place(folder, {files[0]: "cat"}, copy=True).changed == 1


KILLED = """
import os, sys
sys.path[:0] = {path!r}
import mmcli.sinks.class_folders as there
from test_class_folders import place
from pathlib import Path
real, left = there.os.{call}, [{after}]
def dying(*arguments, **options):
    if any({mark!r} in os.fsdecode(a) for a in arguments if isinstance(a, (str, bytes, Path))):
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
    return real(*arguments, **options)
there.os.{call} = dying
base = Path({base!r})
place(base / "sorted", {{base / name: label for name, label in {labels!r}.items()}}, {copy})
"""


@pytest.mark.parametrize(
    ("call", "mark", "copy"),
    [("symlink", "/in/", False), ("replace", "sorted/", True), ("unlink", "sorted/", False), ("rmdir", "", False)],
)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_killed_at_any_step(tmp_path: Path, call: str, mark: str, copy: bool, after: int) -> None:
    """The next run completes it, also with other labels; nothing is left over."""
    names = [f"in/{letter}.jpg" for letter in "abcde"]
    files = made(tmp_path, *names)
    before = dict(zip(names, ["cat", "dog", "cat", "owl", "owl"], strict=True))
    then = dict(zip(names, ["dog", "dog", "owl", "cat", "emu"], strict=True))
    last = dict(zip(names, ["emu", "dog", "cat", "cat", "dog"], strict=True))
    place(tmp_path / "sorted", {tmp_path / name: label for name, label in before.items()}, copy)
    script = KILLED.format(
        path=[str(Path(__file__).parent), *sys.path],
        call=call, mark=mark, after=after, base=str(tmp_path), labels=then, copy=copy,
    )  # fmt: skip
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert ended.returncode in (9, 0), ended.stderr
    assert ended.returncode == 9 or call == "rmdir"
    check_folder(Into(tmp_path / "sorted", (tmp_path / "o.parquet").resolve()))
    tally = place(tmp_path / "sorted", {tmp_path / name: label for name, label in last.items()}, copy)
    assert (tally.failure, tally.left, tally.changed) == (None, 0, 0)
    assert tree(tmp_path / "sorted") == {
        f"{label}/{Path(name).name}": f"this is {name}" for name, label in sorted(last.items(), key=lambda i: i[1])
    }
    assert len(metadata(tmp_path / "sorted")) == 5
    assert [f.read_text() for f in files] == [f"this is {name}" for name in names]
    assert not [p for p in (tmp_path / "sorted").rglob("*") if p.name in ("new", "owl")]


# ------------------------------------------------------------------------------------------ whose the folder is


def problem(folder: Path, out: str = "o.parquet") -> str:
    with pytest.raises(ConfigError) as refused:
        check_folder(Into(folder, folder.parent.resolve() / out))
    return str(refused.value)


def test_folders_of_others_are_refused(folder: Path, files: list[Path]) -> None:
    assert "there is something else in it already (a.jpg)" in problem(files[0].parent)
    assert "this is a file" in problem(files[0])
    assert f"there is no folder {folder}; mkdir -p" in problem(folder / "deep")
    (folder.parent / "rows/.mmcli").mkdir(parents=True)
    (folder.parent / "rows/.mmcli/run.json").write_text("{}")
    assert "there are rows of an unfinished output in it" in problem(folder.parent / "rows")
    place(folder, {files[0]: "cat"})
    check_folder(Into(folder, folder.parent.resolve() / "o.parquet"))
    said = problem(folder, "p.parquet")
    assert f"its files are of another output, {folder.parent.resolve()}/o.parquet" in said
    before = tree(folder)
    tally = place(folder, {files[1]: "cat"}, out="p.parquet")
    assert tally.failure is not None
    assert tree(folder) == before


def test_metadata_that_was_changed_by_hand_is_not_replaced(folder: Path, files: list[Path]) -> None:
    place(folder, {files[0]: "cat"})
    text = (folder / "metadata.csv").read_text()
    (folder / "metadata.csv").write_text(text.replace("cat,", "a cat,"))
    assert "metadata.csv was changed since mmcli wrote it" in problem(folder)
    tally = place(folder, {files[0]: "dog"})
    assert tally.failure is not None
    assert "a cat" in (folder / "metadata.csv").read_text()
    (folder / "metadata.csv").unlink()
    assert place(folder, {files[0]: "cat"}).failure is None
    assert (folder / "metadata.csv").read_text() == text


def test_a_folder_that_was_emptied_is_free(folder: Path, files: list[Path]) -> None:
    place(folder, {files[0]: "cat"})
    shutil.rmtree(folder / "cat")
    (folder / "metadata.csv").unlink()
    tally = place(folder, {files[1]: "dog"}, out="p.parquet")
    assert (tally.placed, tally.failure) == (1, None)
    assert "another output" in problem(folder, "o.parquet")


def test_an_empty_folder_will_do(folder: Path, files: list[Path]) -> None:
    folder.mkdir()
    (folder / ".DS_Store").write_text("of the system")
    check_folder(Into(folder, folder.parent / "o.parquet"))
    assert place(folder, {files[0]: "cat"}).placed == 1


def test_a_folder_that_moved_with_its_output(folder: Path, files: list[Path], tmp_path: Path) -> None:
    place(folder, {files[0]: "cat"}, copy=True)
    (tmp_path / "new").mkdir()
    folder.rename(tmp_path / "new/sorted")
    tally = place(tmp_path / "new/sorted", {files[0]: "cat"}, copy=True)
    assert (tally.same, tally.failure) == (1, None)


def test_lost_notes(folder: Path, files: list[Path]) -> None:
    """What is right is recognised without them."""
    labels = dict(zip(files, ["cat", "dog", "cat"], strict=True))
    place(folder, labels, copy=True)
    notes = folder / ".mmcli/placed.sqlite"
    notes.write_bytes(b"no database at all, but long enough to be taken for one" * 100)
    tally = place(folder, labels, copy=True)
    assert f"cannot write {notes}: file is not a database" in str(tally.failure)
    assert tally.failure is not None
    assert tally.failure.hint is not None
    assert f"rm '{notes}'" in tally.failure.hint
    notes.unlink()
    tally = place(folder, labels, copy=True)
    assert (tally.same, tally.failure) == (3, None)
    place(folder, {}, copy=True)
    assert tree(folder) == {}
