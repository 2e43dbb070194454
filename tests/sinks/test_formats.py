"""What each format looks like to other programs, and how formats are chosen."""

from __future__ import annotations

import datetime
import decimal
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sink_rows import SCHEMA, D, expected, is_error, read_rows, signature_of, spec, table, write

from mmcli.core.errors import ConfigError, OutputError
from mmcli.sinks import npy
from mmcli.sinks.commit import Staging
from mmcli.sinks.formats import FORMATS, SUFFIXES, format_for, load_format
from mmcli.sinks.jsonl import json_lines
from mmcli.sinks.outputs import RunSpec


def write_table(out: str, rows: pa.Table, format_name: str) -> None:
    run = spec(format_name, schema=rows.schema)
    with Staging(out, format_name) as staging:
        staging.open(run)
        for start in range(0, len(rows), 40):
            piece = rows.slice(start, 40)
            staging.commit(piece, start, [signature_of(start + n) for n in range(len(piece))])
        staging.finalise(len(rows))


# -- choosing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "name", "chosen"),
    [
        ("a.parquet", None, "parquet"), ("a.PQ", None, "parquet"), ("a.jsonl", None, "jsonl"),
        ("a.ndjson", "jsonl", "jsonl"), ("a/", None, "parquet"), ("a/", "npy", "npy"), ("a", "npy", "npy"),
        ("a.tmp", "jsonl", "jsonl"), ("-", None, "jsonl"), ("-", "jsonl", "jsonl"), ("v1.2/", None, "parquet"),
    ],
)  # fmt: skip
def test_format_for(out: str, name: str | None, chosen: str) -> None:
    assert format_for(out, name) == chosen


@pytest.mark.parametrize(
    ("out", "name", "problem"),
    [
        ("a.parquet", "parqet", "did you mean parquet"),
        ("a.parquet", "xyz", "one of parquet, jsonl, npy"),
        ("a.jsonl", "parquet", "which means jsonl"),
        ("a.parqet", None, r"did you mean a\.parquet"),
        ("a", None, "cannot tell the format"),
        ("a.npy", None, "-o a/ --format npy"),
        ("a/", "jsonl", r"give e\.g\. -o a\.jsonl"),
        ("-", "parquet", "cannot go to stdout"),
        ("", None, "empty"),
        ("/dev/null", None, "device or a pipe"),
        ("/dev/null", "jsonl", "device or a pipe"),
        (os.fsdecode(b"\xff.parquet"), None, "not a UTF-8 name"),
    ],
)
def test_format_for_refuses(out: str, name: str | None, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        format_for(out, name)


def test_format_for_existing_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ConfigError, match="is a file"):
        format_for(f"{tmp_path}/file/")
    with pytest.raises(ConfigError, match="is a file"):
        format_for(f"{tmp_path}/file", "npy")
    assert format_for(f"{tmp_path}/folder.jsonl") == "parquet"


def test_the_tables_agree() -> None:
    for name in FORMATS:
        made = load_format(name)
        assert made.name == name
        assert set(made.suffixes) == {suffix for suffix, of in SUFFIXES.items() if of == name}


# -- Parquet -------------------------------------------------------------------------------------------------


def test_parquet_is_what_readers_expect(tmp_path: Path) -> None:
    for out in (f"{tmp_path}/out.parquet", f"{tmp_path}/out/"):
        write(out, spec("parquet"), [40, 100])
        found = pq.read_table(out.rstrip("/"))
        assert found.schema.remove_metadata() == SCHEMA
        assert found.replace_schema_metadata() == table(0, 100)
        # `datasets` and DuckDB take every visible Parquet file of a folder.
        assert pyarrow.dataset.dataset(out).count_rows() == 100
        if out.endswith("/"):
            assert sum(pq.read_metadata(p).num_rows for p in Path(out).glob("*.parquet")) == 100


def test_parquet_encodings(tmp_path: Path) -> None:
    write(f"{tmp_path}/out.parquet", spec("parquet"), [100])
    group = pq.read_metadata(tmp_path / "out.parquet").row_group(0)
    columns = {group.column(n).path_in_schema.partition(".")[0]: group.column(n) for n in range(group.num_columns)}
    assert columns["id"].statistics.min == "0.jpg"
    assert columns["status"].statistics.max == "ok"
    assert columns["embedding"].statistics is None
    assert not columns["embedding"].has_dictionary_page
    assert columns["embedding"].compression == "UNCOMPRESSED"
    assert columns["id"].compression == "ZSTD"


def test_small_parts_become_large_row_groups(tmp_path: Path) -> None:
    write(f"{tmp_path}/out.parquet", spec("parquet"), list(range(1, 60)))
    assert pq.read_metadata(tmp_path / "out.parquet").num_row_groups == 1


# -- JSONL ---------------------------------------------------------------------------------------------------


def test_jsonl_keys_and_nulls(tmp_path: Path) -> None:
    write(f"{tmp_path}/out.jsonl", spec("jsonl"), [4])
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [SCHEMA.names] * 4
    assert '"embedding":null' in lines[3]
    assert '"error_message":"it is \\"broken\\"\\n"' in lines[3]
    assert '"error_code":null' in lines[0]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.sampled_from([np.float32, np.float16]).flatmap(
        lambda dtype: arrays(dtype, (3, D), elements={"allow_nan": False, "allow_infinity": False})
    )
)
def test_jsonl_vectors_come_back_exactly(values: np.ndarray) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), D)
    lines = json_lines(pa.record_batch([column], ["embedding"])).splitlines()
    found = np.array([json.loads(line)["embedding"] for line in lines], dtype=values.dtype)
    assert (found == values).all()


def test_jsonl_vectors_are_short() -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.float32([0.1, 0.3])), 2)
    assert json_lines(pa.record_batch([column], ["e"])) == b'{"e":[0.1,0.3]}\n'


def test_jsonl_of_a_slice_with_nulls() -> None:
    batch = table(0, 20).combine_chunks().to_batches()[0].slice(2, 5)
    rows = [json.loads(line) for line in json_lines(batch).splitlines()]
    assert [(r["id"], r["status"], r["embedding"]) for r in rows] == expected(20)[2:7]


def test_jsonl_holds_whatever_a_manifest_has() -> None:
    when = datetime.datetime(2024, 5, 6, 7, 8, 9, 123456)
    invalid = pa.StringArray.from_buffers(1, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff"))
    columns: dict[str, tuple[pa.Array, Any]] = {
        "bytes": (pa.array([b"\xff\x00"]), "/wA="),
        "us": (pa.array([when], pa.timestamp("us")), "2024-05-06T07:08:09.123456"),
        "ns": (pa.array([1], pa.timestamp("ns", "Europe/Vienna")), "1970-01-01T00:00:00.000000001Z"),
        "s": (pa.array([0], pa.timestamp("s", "UTC")), "1970-01-01T00:00:00Z"),
        "date": (pa.array([when.date()]), "2024-05-06"),
        "decimal": (pa.array([decimal.Decimal("1.50")]), "1.50"),
        "nan": (pa.array([float("nan")]), None),
        "int": (pa.array([2**63 - 1]), 2**63 - 1),
        "list": (pa.array([["a", None]]), ["a", None]),
        "struct": (pa.array([{"a": 1, "b": None}]), {"a": 1, "b": None}),
        "map": (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8())), [["k", 1]]),
        "null": (pa.nulls(1), None),
        "bool": (pa.array([True]), True),
        "invalid": (invalid, "a\\xff"),
        "dictionary": (pa.array(["x"]).dictionary_encode(), "x"),
        "inner_bytes": (pa.array([[b"\x00"]]), ["AA=="]),
        "inner_time": (pa.array([[1]], pa.list_(pa.timestamp("ns"))), ["1970-01-01 00:00:00.000000001"]),
        "inner_invalid": (pa.StructArray.from_arrays([invalid], ["a"]), {"a": "a\\xff"}),
        "duration": (pa.array([5], pa.duration("s")), None),
        "time": (pa.array([datetime.time(1, 2)]), "01:02:00.000000"),
    }  # fmt: skip
    batch = pa.record_batch([array for array, _ in columns.values()], list(columns))
    row = json.loads(json_lines(batch))
    for name, (_, wanted) in columns.items():
        if wanted is not None or name in ("nan", "null"):
            assert row[name] == wanted, name
        else:
            assert row[name] is not None


# -- npy -----------------------------------------------------------------------------------------------------


def mixed(modalities: list[str]) -> pa.Table:
    rows = table(0, len(modalities))
    return rows.set_column(2, SCHEMA.field(2), pa.array(modalities))


def test_npy_is_clip_retrievals_layout(tmp_path: Path) -> None:
    write(f"{tmp_path}/out/", spec("npy"), [40, 100])
    vectors = np.load(tmp_path / "out/img_emb/img_emb_0.npy")
    metadata = pq.read_table(tmp_path / "out/metadata/metadata_0.parquet")
    good = [row for row in range(100) if not is_error(row)]
    assert vectors.dtype == np.float16
    assert vectors.shape == (len(good), D)
    assert metadata.column("input_row").to_pylist() == good
    assert metadata.column("image_path").to_pylist() == [f"photos/{row}.jpg" for row in good]
    assert (vectors[:, 0] == np.array(good)).all()
    errors = pq.read_table(tmp_path / "out/errors/errors_0.parquet")
    assert errors.column("input_row").to_pylist() == [row for row in range(100) if is_error(row)]
    assert set(errors.column("error_code").to_pylist()) == {"corrupt"}


@pytest.mark.parametrize(
    ("modalities", "folder"),
    [("text", "text_emb"), ("image", "img_emb"), ("audio", "audio_emb"), ("image text", "emb"), ("", "img_emb")],
)
def test_npy_folder_of_a_single_column(tmp_path: Path, modalities: str, folder: str) -> None:
    """One array, aligned with one metadata table, whatever is mixed."""
    kinds = modalities.split()
    rows = mixed([kinds[n % len(kinds)] for n in range(50)]) if kinds else table(0, 0)
    write_table(f"{tmp_path}/out/", rows, "npy")
    assert [p.name for p in (tmp_path / "out").glob("*emb")] == [folder]
    assert read_rows(f"{tmp_path}/out/", "npy") == expected(len(rows))


def test_npy_with_two_vectors_per_row(tmp_path: Path) -> None:
    rows = table(0, 50).rename_columns(["id", "path", "modality", "image_embedding", *SCHEMA.names[4:]])
    rows = rows.add_column(4, "text_embedding", rows.column("image_embedding"))
    write_table(f"{tmp_path}/out/", rows, "npy")
    text, image = (np.load(tmp_path / f"out/{kind}_emb/{kind}_emb_0.npy") for kind in ("text", "img"))
    assert (text == image).all()


@pytest.mark.parametrize("rows", [4, 9, 10, 11, 130])
def test_npy_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(npy, "SHARD_ROWS", 3)
    out = f"{tmp_path}/out/"
    write_table(out, table(0, rows), "npy")
    assert read_rows(out, "npy") == expected(rows)
    names = sorted(os.listdir(tmp_path / "out/img_emb"))
    assert len(names) == -(-sum(not is_error(row) for row in range(rows)) // 3)
    # Readers sort names as text.
    assert names == [f"img_emb_{n:0{len(str(len(names) - 1))}d}.npy" for n in range(len(names))]
    wanted = pa.schema([SCHEMA.field("modality"), SCHEMA.field("embedding")])
    found = list(load_format("npy").read(tmp_path / "out", wanted))
    assert pa.Table.from_batches(found).column("embedding").to_pylist() == [e for _, _, e in expected(rows)]


def test_npy_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    def opened(run: RunSpec) -> None:
        with Staging(f"{tmp_path}/out/", "npy") as staging:
            staging.open(run)

    with pytest.raises(ConfigError, match="this task has none"):
        opened(spec("npy", schema=SCHEMA.remove(3)))
    with pytest.raises(ConfigError, match="input_row"):
        opened(spec("npy", schema=SCHEMA.append(pa.field("input_row", pa.int64()))))
    assert list(tmp_path.iterdir()) == []


def test_npy_never_turns_values_into_infinity(tmp_path: Path) -> None:
    out = f"{tmp_path}/out/"
    with pytest.raises(OutputError, match="beyond 65504") as refused:
        write(out, spec("npy"), [3], value=1e6)
    assert "--format parquet" in str(refused.value.hint)
    write(out, spec("parquet"), [3])
    assert read_rows(out, "parquet") == expected(3, 1e6)
