"""The commit protocol: what is written, what is resumed, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sink_rows import (
    OUTPUTS,
    SCHEMA,
    D,
    expected,
    leftovers,
    read_rows,
    signature_of,
    spec,
    table,
    wait_until,
    write,
)

from mmcli.core.errors import ConfigError, MmcliError, OutputError, StateMismatch
from mmcli.sinks.commit import Staging
from mmcli.sinks.outputs import read_output
from mmcli.sinks.parquet import COPIED_ROWS
from mmcli.sinks.parts import ERRORS_KEY, FINGERPRINT_KEY, JOB_KEY
from mmcli.sinks.place import Place
from mmcli.sinks.rows import known_rows

Target = tuple[str, str]


def staging_of(target: Target) -> Path:
    return Place.of(*target).staging


def test_one_row_in_one_row_out(target: Target) -> None:
    out, format_name = target
    write(out, spec(format_name), [4, 5, 20])
    assert read_rows(out, format_name) == expected(20)
    assert leftovers(Path(out).parent) == []


def test_metadata_of_the_output(target: Target) -> None:
    out, format_name = target
    run = spec(format_name)
    write(out, run, [20])
    info = read_output(out)
    assert (info.complete, info.rows, info.format) == (True, 20, format_name)
    assert info.errors == {"corrupt": 3}
    assert info.job == run.job.to_dict()
    assert info.fingerprint == run.job.fingerprint()
    assert info.schema == SCHEMA
    assert info.metadata["mmcli_version"] == "0.1"


def test_an_unfinished_output_is_described(target: Target) -> None:
    out, format_name = target
    write(out, spec(format_name), [4, 12], finalise=False)
    info = read_output(out)
    assert (info.complete, info.rows, info.errors, info.format) == (False, 12, {"corrupt": 2}, format_name)
    assert info.schema == SCHEMA


def test_no_rows_still_have_columns(target: Target) -> None:
    out, format_name = target
    write(out, spec(format_name), [])
    assert read_rows(out, format_name) == []
    assert read_output(out).schema == SCHEMA


def test_signatures_are_beside_the_output(target: Target) -> None:
    out, format_name = target
    run = spec(format_name)
    write(out, run, [4, 20])
    sidecar = pq.read_table(Place.of(out, format_name).signatures)
    wanted = [None if status == "error" else signature_of(row) for row, (_, status, _) in enumerate(expected(20))]
    assert sidecar.column("signature").to_pylist() == wanted
    assert sidecar.schema.metadata[FINGERPRINT_KEY].decode() == run.job.fingerprint()


def test_a_complete_output_is_not_touched(target: Target) -> None:
    out, format_name = target
    write(out, spec(format_name), [20])
    before = {p: p.stat().st_mtime_ns for p in Path(out).parent.rglob("*") if p.is_file()}
    again = write(out, spec(format_name), [20])
    assert again.complete
    assert again.errors == {"corrupt": 3}
    assert {p: p.stat().st_mtime_ns for p in Path(out).parent.rglob("*") if p.is_file()} == before


def test_resume_skips_what_is_committed(target: Target) -> None:
    out, format_name = target
    write(out, spec(format_name), [4, 12], finalise=False)
    with Staging(out, format_name) as staging:
        staging.open(spec(format_name))
        assert staging.committed == [(0, 4), (4, 12)]
        assert staging.next_row == 12
        assert staging.errors == {"corrupt": 2}
    write(out, spec(format_name), [20])
    assert read_rows(out, format_name) == expected(20)


def test_another_command_is_refused_with_the_difference(target: Target) -> None:
    out, format_name = target
    for finalise in (False, True):
        write(out, spec(format_name), [4], finalise=finalise)
        with pytest.raises(StateMismatch, match=r"model\.id: was clip, is siglip") as refused:
            write(out, spec(format_name, model="siglip"), [4])
        assert "--overwrite" in str(refused.value.hint)
        assert "--update" not in str(refused.value.hint)
        with pytest.raises(StateMismatch, match=r"inputs\.digest: was a, is b") as refused:
            write(out, spec(format_name, inputs="b"), [4])
        assert "--update" in str(refused.value.hint)
    assert read_rows(out, format_name) == expected(4)


def test_another_model_cannot_update(target: Target) -> None:
    out, format_name = target
    for finalise in (False, True):
        write(out, spec(format_name), [4], finalise=finalise)
        with pytest.raises(StateMismatch, match=r"model\.id: was clip, is siglip"):
            write(out, spec(format_name, model="siglip"), [4], "update")


def test_a_run_that_committed_nothing_binds_nobody(target: Target) -> None:
    out, format_name = target
    write(out, spec(format_name), [], finalise=False)
    assert list(Path(out).parent.iterdir()) == []
    write(out, spec(format_name, model="siglip"), [4])
    assert read_rows(out, format_name) == expected(4)


def test_overwrite_replaces_everything(target: Target) -> None:
    out, format_name = target
    write(out, spec(format_name), [3, 6, 9, 40])
    write(out, spec(format_name, model="siglip"), [5], "overwrite", value=1)
    assert read_rows(out, format_name) == expected(5, 1)
    assert read_output(out).job["model"] == {"id": "siglip"}


def test_overwrite_forgets_an_interrupted_run_but_resumes_itself(target: Target) -> None:
    out, format_name = target
    write(out, spec(format_name), [6], finalise=False)
    assert write(out, spec(format_name), [3], "overwrite", value=1, finalise=False).next_row == 3
    assert write(out, spec(format_name), [9], "overwrite", value=1).complete
    assert read_rows(out, format_name) == expected(9, 1)


def test_update_without_changes_and_errors_is_complete(target: Target) -> None:
    out, format_name = target
    write(out, spec(format_name), [3])
    assert read_output(out).errors == {}
    assert write(out, spec(format_name), [3], "update", value=9).complete
    assert read_rows(out, format_name) == expected(3)


def test_update_with_errors_runs_again(target: Target) -> None:
    out, format_name = target
    write(out, spec(format_name), [5])
    write(out, spec(format_name), [5], "update", value=1)
    assert read_rows(out, format_name) == expected(5, 1)


def test_a_foreign_output_is_refused(target: Target) -> None:
    out, format_name = target
    if out.endswith("/"):
        Path(out).mkdir()
        foreign = Path(out) / "part-000007.parquet"
        pq.write_table(pa.table({"a": [1]}), foreign)
    else:
        foreign = Path(out)
        foreign.write_text("mine")
    content = foreign.read_bytes()
    for mode in ("new", "update"):
        with pytest.raises(StateMismatch, match="not written by mmcli"):
            write(out, spec(format_name), [4], mode)  # type: ignore[arg-type]
    assert foreign.read_bytes() == content
    with pytest.raises(StateMismatch):
        read_output(out)
    write(out, spec(format_name), [4], "overwrite")
    assert read_rows(out, format_name) == expected(4)


def test_overwrite_of_a_folder_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"picture")
    with pytest.raises(StateMismatch):
        write(f"{tmp_path}/", spec("parquet"), [4])
    write(f"{tmp_path}/", spec("parquet"), [4], "overwrite")
    assert (tmp_path / "holiday.jpg").read_bytes() == b"picture"


def test_a_changed_jsonl_output_is_not_trusted(tmp_path: Path) -> None:
    out = f"{tmp_path}/out.jsonl"
    write(out, spec("jsonl"), [4])
    with open(out, "a") as file:
        file.write("{}\n")
    with pytest.raises(StateMismatch, match="changed since"):
        write(out, spec("jsonl"), [4])


@pytest.mark.parametrize("damage", ["empty", "half", "no_metadata", "rows", "errors"])
def test_a_damaged_part_is_named(target: Target, damage: str) -> None:
    out, format_name = target
    write(out, spec(format_name), [4, 12], finalise=False)
    part = staging_of(target) / "part-000001.parquet"
    content = part.read_bytes()
    if damage == "empty":
        part.write_bytes(b"")
    elif damage == "half":
        part.write_bytes(content[: len(content) // 2])
    elif damage == "no_metadata":
        pq.write_table(table(4, 12), part)
    elif damage == "errors":
        rows = pq.read_table(part)
        said = {**rows.schema.metadata, ERRORS_KEY: '{"corrupt": "one"}'}
        pq.write_table(rows.replace_schema_metadata(said), part)
    else:
        part.write_bytes(content.replace(b"4:12", b"4:13"))
        # The Arrow schema in the footer repeats the metadata in base64; the plain copy counts.
    with pytest.raises(StateMismatch, match=r"part-000001\.parquet"):
        write(out, spec(format_name), [20])
    write(out, spec(format_name), [20], "overwrite")
    assert read_rows(out, format_name) == expected(20)


# By what a value in a state file is replaced, and what is said of it.
DAMAGES = {
    "not-json": (lambda _: "{", "it is not JSON"),
    "list": (lambda _: [], "it is a list, not an object"),
    "no-job": (lambda run: {k: v for k, v in run.items() if k != "job"}, "job is missing"),
    "job": (lambda run: {**run, "job": "embed"}, "job is a text, not an object"),
    "no-inputs": (lambda run: {**run, "job": {**run["job"], "inputs": None}}, "job.inputs is null, not an object"),
    "no-mode": (lambda run: {**run, "mode": 3}, "mode is a whole number, not a text"),
    "format": (lambda run: {**run, "format": "xls"}, "format is 'xls'"),
    "schema": (lambda run: {**run, "arrow_schema": "AAAA"}, "arrow_schema is none"),
}


def damage_json(path: Path, damage: Callable[[Any], Any]) -> None:
    damaged = damage(json.loads(path.read_bytes()))
    path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))


def readers_of(target: Target) -> list[Callable[[], object]]:
    """All that looks at what a run has left, before it does anything."""
    out, format_name = target
    return [
        lambda: write(out, spec(format_name), [20]),
        lambda: write(out, spec(format_name), [20], "update"),
        lambda: read_output(out),
        lambda: known_rows(Place.of(*target)),
    ]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_json_is_named(target: Target, name: str) -> None:
    out, format_name = target
    damage, told = DAMAGES[name]
    write(out, spec(format_name), [4, 12], finalise=False)
    damage_json(staging_of(target) / "run.json", damage)
    before = {p: p.read_bytes() for p in staging_of(target).iterdir() if p.name != "lock"}
    for read in readers_of(target):
        with pytest.raises(StateMismatch, match=rf"run\.json is damaged: {re.escape(told)}") as refused:
            read()
        assert "--overwrite" in str(refused.value.hint)
    # What was committed is still there, for who mends the file.
    assert {p: p.read_bytes() for p in staging_of(target).iterdir() if p.name != "lock"} == before
    write(out, spec(format_name), [20], "overwrite")
    assert read_rows(out, format_name) == expected(20)


def test_a_damaged_run_json_of_an_interrupted_update(target: Target) -> None:
    """Its rows are computed again, as those of a damaged part are."""
    out, format_name = target
    write(out, spec(format_name), [12], finalise=False)
    write(out, spec(format_name, inputs="b"), [], "update", finalise=False)
    damage_json(staging_of(target) / "previous" / "run.json", lambda _: {"job": {}})
    with pytest.raises(StateMismatch, match=r"previous/run\.json is damaged"):
        write(out, spec(format_name, inputs="b"), [20])
    write(out, spec(format_name, inputs="b"), [20], "update", value=1)
    assert read_rows(out, format_name) == expected(20, 1)


FINISHED = {
    "rows": ("many", "rows is a text, not a whole number"),
    "job": (None, "model is missing"),
    "options": ([1], "options is a list, not an object"),
    "errors": ({"corrupt": "3"}, "errors.corrupt is a text, not a whole number"),
    "notes": ([{}], "notes[0] is an object, not a text"),
    "files": ("part", "files is a text, not a list"),
    "format": ("xls", "format is 'xls'"),
}


@pytest.mark.parametrize("name", FINISHED)
def test_damaged_metadata_of_a_finished_output_are_named(target: Target, name: str) -> None:
    out, format_name = target
    value, told = FINISHED[name]

    def damage(metadata: dict[str, Any]) -> dict[str, Any]:
        if name != "job":
            return {**metadata, name: value}
        del metadata["model"]
        return metadata

    write(out, spec(format_name), [20])
    if (beside := Place.of(*target).metadata).exists():
        damage_json(beside, damage)
    else:
        found = pq.read_table(out)
        metadata = {
            **found.schema.metadata,
            JOB_KEY: json.dumps(damage(json.loads(found.schema.metadata[JOB_KEY]))),
        }
        pq.write_table(found.replace_schema_metadata(metadata), out)
    for read in readers_of(target):
        with pytest.raises(StateMismatch, match=re.escape(f"is damaged: {told}")) as refused:
            read()
        assert "--overwrite" in str(refused.value.hint)
    write(out, spec(format_name), [20], "overwrite")
    assert read_rows(out, format_name) == expected(20)


@pytest.mark.parametrize("damaged", ["", "{", "[" * 100_000, "[]"])
def test_metadata_beside_a_finished_output_that_are_no_object_are_named(target: Target, damaged: str) -> None:
    out, format_name = target
    write(out, spec(format_name), [20])
    if not (beside := Place.of(*target).metadata).exists():
        return
    beside.write_text(damaged)
    for read in readers_of(target):
        with pytest.raises(StateMismatch, match=re.escape(f"{beside} is damaged: it is ")) as refused:
            read()
        assert "--overwrite" in str(refused.value.hint)
    write(out, spec(format_name), [20], "overwrite")
    assert read_rows(out, format_name) == expected(20)


@pytest.mark.parametrize(
    "damaged", ["{", [], {"delete": [], "metadata": {}}, {"moves": [["a"]], "delete": [], "metadata": {}}]
)
def test_a_damaged_list_of_moves_is_named(target: Target, damaged: object) -> None:
    """Nothing may be taken for done, or deleted, while it is unknown how far the moves came."""
    out, format_name = target
    write(out, spec(format_name), [12], finalise=False)
    (staging_of(target) / "swap.json").write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    for read in (lambda: write(out, spec(format_name), [20], "overwrite"), lambda: read_output(out)):
        with pytest.raises(StateMismatch, match=r"swap\.json is damaged") as refused:
            read()
        assert f"rm -r '{staging_of(target)}'" in str(refused.value.hint)
    shutil.rmtree(staging_of(target))
    write(out, spec(format_name), [20], "overwrite")
    assert read_rows(out, format_name) == expected(20)


@pytest.mark.parametrize("rows", [200, 300])
def test_a_flipped_bit_in_a_part_is_found_when_it_is_read(tmp_path: Path, rows: int) -> None:
    """Whether or not there are parts behind it."""
    out = f"{tmp_path}/out.parquet"
    write(out, spec("parquet"), [4, 200], finalise=False)
    part = tmp_path / "out.parquet.mmcli" / "part-000001.parquet"
    flip_a_vector(part)
    with pytest.raises(StateMismatch, match=r"part-000001\.parquet is damaged"):
        write(out, spec("parquet"), [200, rows])
    assert not os.path.exists(out)


@pytest.mark.parametrize("resumed", [False, True])
def test_the_finished_file_is_written_while_parts_are_committed(tmp_path: Path, resumed: bool) -> None:
    """Shown by a part that is damaged after it was copied, and by one that is damaged before."""
    out, size = f"{tmp_path}/out.parquet", COPIED_ROWS
    folder = tmp_path / "out.parquet.mmcli"
    if resumed:
        write(out, spec("parquet"), [size], finalise=False)
        assert {p.name for p in folder.iterdir()} == {
            "lock",
            "run.json",
            "part-000000.parquet",
            "inputs-000000.parquet",
        }
    with Staging(out, "parquet") as staging:
        staging.open(spec("parquet"))
        for stop in [size, 2 * size, 2 * size + 10][resumed:]:
            start = staging.next_row
            staging.commit(table(start, stop), start, [signature_of(row) for row in range(start, stop)])
        ahead, parts = folder / ".final.tmp", sorted(folder.glob("part-*.parquet"))
        copied = sum(part.stat().st_size for part in parts[:2]) - 100_000
        wait_until(lambda: ahead.exists() and ahead.stat().st_size >= copied)
        flip_a_vector(parts[0])
        staging.finalise(2 * size + 10)
    assert read_rows(out, "parquet") == expected(2 * size + 10)
    assert not folder.exists()


def flip_a_vector(part: Path) -> None:
    content = bytearray(part.read_bytes())
    vector = content.find(bytes(table(100, 101).column("embedding").combine_chunks().values.buffers()[1])[: 4 * D])
    content[vector] ^= 1
    part.write_bytes(content)


@pytest.mark.parametrize("rows", [8, COPIED_ROWS])
def test_parts_with_the_columns_of_another_version(target: Target, rows: int) -> None:
    """Refused before anything is computed, whatever their size, and whatever is left to do."""
    out, format_name = target
    other = SCHEMA.remove(SCHEMA.get_field_index("error_stage"))
    old = spec(format_name, schema=other)
    with Staging(out, format_name) as staging:
        staging.open(old)
        staging.commit(table(0, rows).select(other.names), 0, [signature_of(row) for row in range(rows)])
    for stop in (rows, rows + 4):
        with pytest.raises(StateMismatch, match="column error_stage: was missing, is string") as caught:
            write(out, spec(format_name), [stop])
        assert "--overwrite" in str(caught.value.hint)
    # The version that has written them goes on.
    with Staging(out, format_name) as staging:
        staging.open(old)
        assert staging.next_row == rows
    write(out, spec(format_name), [20], "overwrite")
    assert read_rows(out, format_name) == expected(20)


@pytest.mark.parametrize(("change", "said"), [
    (lambda schema: schema.set(1, schema.field(1).with_nullable(False)), "path: was string not null, is string"),
    (lambda schema: pa.schema([schema.field(n) for n in reversed(schema.names)]), "columns: were error_message, "),
])  # fmt: skip
def test_columns_that_differ_a_little(tmp_path: Path, change: Callable[[pa.Schema], pa.Schema], said: str) -> None:
    out, other = f"{tmp_path}/out.parquet", change(SCHEMA)
    with Staging(out, "parquet") as staging:
        staging.open(spec("parquet", schema=other))
        rows = table(0, 8).select(other.names).cast(other)
        staging.commit(rows, 0, [signature_of(row) for row in range(8)])
    with pytest.raises(StateMismatch, match=said):
        write(out, spec("parquet"), [8])
    # Other columns are not reused; all rows are computed.
    write(out, spec("parquet"), [20], "update")
    assert read_rows(out, "parquet") == expected(20)


def test_overlapping_and_missing_parts_are_refused(target: Target) -> None:
    out, format_name = target
    write(out, spec(format_name), [4, 8, 12], finalise=False)
    staging = staging_of(target)
    shutil.copy(staging / "part-000001.parquet", staging / "part-000009.parquet")
    with pytest.raises(StateMismatch, match="both hold row 4"):
        write(out, spec(format_name), [20])
    (staging / "part-000009.parquet").unlink()
    (staging / "part-000001.parquet").unlink()
    with pytest.raises(StateMismatch, match="rows 4 to 8 are missing"):
        write(out, spec(format_name), [20])


def test_a_part_of_another_run_is_refused(tmp_path: Path) -> None:
    for name, inputs in (("a.parquet", "a"), ("b.parquet", "b")):
        write(f"{tmp_path}/{name}", spec("parquet", inputs), [4, 8], finalise=False)
    shutil.copy(tmp_path / "b.parquet.mmcli/part-000001.parquet", tmp_path / "a.parquet.mmcli/part-000001.parquet")
    with pytest.raises(StateMismatch, match="parts of different runs"):
        write(f"{tmp_path}/a.parquet", spec("parquet"), [20])


def test_temporaries_are_deleted(target: Target) -> None:
    out, format_name = target
    write(out, spec(format_name), [4], finalise=False)
    (staging_of(target) / ".part-000001.parquet.tmp").write_bytes(b"half")
    (staging_of(target) / "inputs-000001.parquet").write_bytes(b"orphan")
    write(out, spec(format_name), [20])
    assert read_rows(out, format_name) == expected(20)


def test_rows_are_committed_once_and_in_order(tmp_path: Path) -> None:
    with Staging(f"{tmp_path}/out.parquet") as staging:
        staging.open(spec("parquet"))
        signatures = [signature_of(row) for row in range(4)]
        staging.commit(table(0, 4), 0, signatures)
        for start in (0, 3, 5):
            with pytest.raises(MmcliError, match="internal error"):
                staging.commit(table(0, 4), start, signatures)
        with pytest.raises(MmcliError, match="internal error"):
            staging.commit(table(0, 4), 4, signatures[:3])
        with pytest.raises(MmcliError, match="internal error"):
            staging.commit(table(0, 4).drop_columns("path"), 4, signatures)
        with pytest.raises(MmcliError, match="4 of 8 rows"):
            staging.finalise(8)
        assert staging.committed == [(0, 4)]


def test_missing_parent_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist") as refused:
        write(f"{tmp_path}/no/out.parquet", spec("parquet"), [4])
    assert str(refused.value.hint).startswith("mkdir -p")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out.parquet.mmcli").write_text("in the way")
    with pytest.raises(OutputError):
        write(f"{tmp_path}/out.parquet", spec("parquet"), [4])


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out.parquet").symlink_to(tmp_path / "disk" / "real.parquet")
    write(f"{tmp_path}/out.parquet", spec("parquet"), [4])
    assert (tmp_path / "out.parquet").is_symlink()
    assert read_rows(f"{tmp_path}/disk/real.parquet", "parquet") == expected(4)


def test_another_format_of_the_same_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    out = f"{tmp_path}/out/"
    write(out, spec("npy"), [20])
    write(out, spec("parquet"), [5, 20], "overwrite")
    assert sorted(p.name for p in Path(out).iterdir()) == [
        ".inputs", "_SUCCESS.json", "part-000000.parquet", "part-000001.parquet"
    ]  # fmt: skip
    write(out, spec("npy"), [20], "overwrite")
    assert not list(Path(out).glob("part-*"))


def test_success_file_lists_the_parts(tmp_path: Path) -> None:
    write(f"{tmp_path}/out/", spec("parquet"), [5, 20])
    success = json.loads((tmp_path / "out" / "_SUCCESS.json").read_text())
    assert success["files"] == ["part-000000.parquet", "part-000001.parquet"]
    assert success["complete"] is True


def test_every_name_is_given_to_synced_files_only(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power cuts: a file is synced before it gets its name, and the folder before the next step relies on it."""
    out, format_name = target
    synced: set[str] = set()
    unsynced_folders: set[str] = set()
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        fsync(descriptor)
        synced.add(path)
        unsynced_folders.discard(path)

    def watched_replace(source: str | Path, to: str | Path) -> None:
        assert os.fspath(source) in synced, f"{source} was renamed before it was synced"
        replace(source, to)
        synced.add(os.fspath(to))
        unsynced_folders.add(os.path.dirname(to))

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    with Staging(out, format_name) as staging:
        staging.open(spec(format_name))
        for start, stop in ((0, 4), (4, 20)):
            staging.commit(table(start, stop), start, [signature_of(row) for row in range(start, stop)])
            assert not unsynced_folders
        staging.finalise(20)
        assert not unsynced_folders


@pytest.mark.parametrize(("out", "format_name"), [o for o in OUTPUTS if o[0].endswith("/")])
def test_a_finished_folder_without_one_of_its_files(tmp_path: Path, out: str, format_name: str) -> None:
    out = f"{tmp_path}/{out}"
    write(out, spec(format_name), [5, 9])
    lost = next(p for p in Path(out).rglob("*.parquet") if not p.name.startswith("."))
    lost.unlink()
    for mode in ("new", "update"):
        with pytest.raises(StateMismatch, match=lost.name):
            write(out, spec(format_name), [5, 9], mode)  # type: ignore[arg-type]
    with pytest.raises(StateMismatch, match=lost.name):
        read_output(out)
    write(out, spec(format_name), [5, 9], "overwrite")
    assert read_rows(out, format_name) == expected(9)
