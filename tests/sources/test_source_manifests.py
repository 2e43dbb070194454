"""Parquet, JSONL, CSV and imagefolder manifests."""

from __future__ import annotations

import csv as stdlib_csv
import gzip
import io
import json
import os
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_helpers import STRUCT, codes, digest, ids, listed, write_files, write_parquet

from mmcli.core.errors import ConfigError, StateMismatch
from mmcli.core.texts import TextRecords
from mmcli.sources import jsonl
from mmcli.sources.open import SourceOptions, open_source


def messages(records: list[Any]) -> list[str]:
    return [r.error.message if r.error else "" for r in records]


# -- Parquet -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary()), STRUCT], ids=str
)
def test_inline_bytes(kind: pa.DataType, tmp_path: Path) -> None:
    cells: list[Any] = [b"one", None, b"", b"two"]
    if kind == STRUCT:
        cells = [c if c is None else {"bytes": c, "path": None} for c in cells]
    write_parquet(tmp_path / "m.parquet", {"image": pa.array(cells, kind), "n": [1, 2, 3, 4]})
    snapshot, records = listed(tmp_path, tmp_path / "m.parquet", keep=("n",))
    assert [r.media[0].data if r.media else None for r in records] == [b"one", None, None, b"two"]
    assert codes(records) == [None, "bad_row", "bad_row", None]
    assert [r.keep for r in records] == [(1,), (2,), (3,), (4,)]
    assert ids(records) == [f"{tmp_path}/m.parquet#{i}" for i in range(4)]
    assert records[0].media[0].modality == "image"
    assert snapshot.modalities == {"image": 4}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_paths_are_relative_to_the_manifest(kind: pa.DataType, tmp_path: Path) -> None:
    write_files(tmp_path, "m/a.jpg", "b.jpg")
    cells = ["a.jpg", "../b.jpg", f"{tmp_path}/b.jpg", None, "", "gone.jpg", "https://x/y.jpg", "../m", "a\0b"]
    write_parquet(tmp_path / "m" / "m.parquet", {"image": pa.array(cells, kind)})
    snapshot, records = listed(tmp_path, tmp_path / "m" / "m.parquet")
    assert codes(records) == [None] * 3 + ["bad_row"] * 2 + [None, "policy_denied", "bad_row", "bad_row"]
    assert [r.media[0].size for r in records if r.media] == [7, 5, 5, None]
    assert records[0].path == f"{tmp_path}/m/a.jpg" == records[0].media[0].file
    assert records[6].path == "https://x/y.jpg"
    # gone.jpg, and the name with a NUL
    assert snapshot.notes == [
        f"{tmp_path}/m/m.parquet: 2 files that it names are not found; its paths are relative to {tmp_path}/m/"
    ]


def test_struct_with_paths_and_bytes(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg")
    cells = [
        {"bytes": None, "path": "a.jpg"},
        {"bytes": b"x", "path": "shown.png"},
        {"bytes": None, "path": None},
        None,
    ]
    write_parquet(tmp_path / "m.parquet", {"anything": pa.array(cells, STRUCT)})
    _, records = listed(tmp_path, tmp_path / "m.parquet")
    assert [r.path for r in records] == [f"{tmp_path}/a.jpg", "shown.png", None, None]
    assert codes(records) == [None, None, "bad_row", "bad_row"]
    assert (records[0].media[0].size, records[1].media[0].data) == (5, b"x")


def test_sample_of_hugging_face(sample_data: Path, tmp_path: Path) -> None:
    snapshot, records = listed(tmp_path, sample_data / "images.parquet", keep=("caption", "label"))
    assert (snapshot.rows, snapshot.modalities) == (48, {"image": 48})
    assert records[0].keep[1] == "red circle"
    assert records[0].media[0].data == (sample_data / "images" / records[0].path).read_bytes()


def test_hugging_face_features_tell_the_modality(tmp_path: Path) -> None:
    features = {"info": {"features": {"clip": {"_type": "Audio"}, "n": {"_type": "Value", "dtype": "int64"}}}}
    table = pa.table({"clip": pa.array([{"bytes": b"x", "path": None}], STRUCT), "n": [1], "text": ["t"]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, tmp_path / "m.parquet")
    assert listed(tmp_path, tmp_path / "m.parquet")[1][0].media[0].modality == "audio"


KEEP = {
    "i": pa.array([2**53 + 1, None, -(2**63)], pa.int64()),
    "u": pa.array([2**64 - 1, 0, None], pa.uint64()),
    "h": pa.array([1.5, None, 65504.0], pa.float16()),
    "f": pa.array([0.1, float("inf"), None], pa.float32()),
    "dec": pa.array([Decimal("1.10"), None, Decimal("-9.99")], pa.decimal128(10, 2)),
    "ns": pa.array([1_700_000_000_123_456_789, None, -1], pa.timestamp("ns", "Europe/Berlin")),
    "year": pa.array([2**60, -(2**60), None], pa.timestamp("us")),
    "day": pa.array([19000, -800_000, None], pa.date32()),
    "t64": pa.array([123_456_789, None, 1], pa.time64("ns")),
    "t32": pa.array([1234, None, 1], pa.time32("ms")),
    "dur": pa.array([2**62, None, 1], pa.duration("ns")),
    "dict": pa.array(["a", None, "b"]).dictionary_encode(),
    "list": pa.array([[1, None], None, []], pa.list_(pa.int64())),
    "when": pa.array([[1, 2**60], None, [None]], pa.list_(pa.timestamp("ns", "UTC"))),
    "vec": pa.array([[0.5, 1.5], None, [0.1, 0.2]], pa.list_(pa.float32(), 2)),
    "struct": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": ""}]),
    "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "bin": pa.array([b"\0\xff", b"", None]),
    "large": pa.array(["x", None, ""], pa.large_string()),
    "bool": pa.array([True, None, False]),
    "null": pa.nulls(3),
}


@pytest.mark.parametrize("name", KEEP)
def test_passthrough_columns_are_exact(name: str, tmp_path: Path) -> None:
    values = KEEP[name]
    write_parquet(tmp_path / "m.parquet", {"image": [b"x"] * 3, name: values})
    source = open_source(SourceOptions((str(tmp_path / "m.parquet"),), keep=(name,)))
    source.snapshot(tmp_path / "s")
    kind = source.keep.field(name).type
    rebuilt = pa.array([r.keep[0] for r in source.records()], kind)
    expected = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
    assert rebuilt.equals(expected)
    assert kind == expected.type


def test_ids_from_a_column(tmp_path: Path) -> None:
    write_parquet(tmp_path / "m.parquet", {"image": [b"x"] * 4, "key": ["a", "a", None, "ü"], "k": [1, 2, 3, 4]})
    _, records = listed(tmp_path, tmp_path / "m.parquet", id_column="key")
    assert ids(records) == ["a", "a", f"{tmp_path}/m.parquet#2", "ü"]
    assert codes(records) == [None, None, "bad_row", None]
    assert ids(listed(tmp_path, tmp_path / "m.parquet", id_column="k")[1]) == ["1", "2", "3", "4"]


def test_several_media_in_a_row(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg", "b.wav")
    write_parquet(tmp_path / "m.parquet", {"t": ["x", None], "i": ["a.jpg"] * 2, "s": ["b.wav"] * 2})
    source = open_source(
        SourceOptions((str(tmp_path / "m.parquet"),), text_column="t", image_column="i", audio_column="s")
    )
    snapshot = source.snapshot(tmp_path / "s")
    records = list(source.records())
    assert source.slots == ("image", "audio", "text")
    assert [(m.modality, m.size, m.text) for m in records[0].media] == [
        ("image", 5, None), ("audio", 5, None), ("text", None, "x"),
    ]  # fmt: skip
    assert codes(records) == [None, "bad_row"]
    assert snapshot.modalities == {"image": 2, "audio": 2, "text": 2}


def test_text_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"caf\xe9", None, b"also"], pa.binary())
    write_parquet(tmp_path / "b.parquet", {"caption": raw})
    _, records = listed(tmp_path, tmp_path / "b.parquet", text_column="caption")
    assert codes(records) == [None, "bad_row", "bad_row", None]
    broken = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    pq.write_table(pa.table({"caption": broken}), tmp_path / "s.parquet")
    _, records = listed(tmp_path, tmp_path / "s.parquet")
    assert codes(records) == [None, "bad_row", "bad_row", None]
    assert records[3].media[0].text == "also"
    nested = pa.ListArray.from_arrays([0, 1, 2, 3, 4], broken)
    pq.write_table(pa.table({"image": [b"x"] * 4, "c": broken, "l": nested}), tmp_path / "k.parquet")
    _, records = listed(tmp_path, tmp_path / "k.parquet", keep=("c", "l"))
    assert codes(records) == [None, "bad_row", None, None]
    assert [r.keep for r in records] == [("fine", ["fine"]), (None, None), (None, [None]), ("also", ["also"])]


def _corrupt_group(path: Path, group: int) -> None:
    """Overwrite the data of one row group."""
    chunk = pq.ParquetFile(path).metadata.row_group(group).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\xff" * chunk.total_compressed_size)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_broken_row_group_is_error_rows(compression: str, tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "m.parquet",
        {"image": [b"%d" % i for i in range(50)]},
        row_group_size=10,
        compression=compression,
    )
    _corrupt_group(path, 2)
    source = open_source(SourceOptions((str(path),)))
    assert source.snapshot(tmp_path / "s").rows == 50
    records = list(source.records())
    assert codes(records) == [None] * 20 + ["corrupt"] * 10 + [None] * 20
    assert records[29].id == f"{path}#29"
    assert records[30].media[0].data == b"30"
    assert [repr(r) for r in source.records(25)] == [repr(r) for r in records[25:]]


def test_public_broken_files(shared_data: Path, tmp_path: Path) -> None:
    bad = shared_data / "parquet" / "bad_data"
    with pytest.raises(ConfigError, match=r"PARQUET-1481.parquet is not a readable Parquet file: .*UNKNOWN"):
        listed(tmp_path, bad / "PARQUET-1481.parquet")
    snapshot, records = listed(tmp_path, bad / "ARROW-GH-41321.parquet", image_column="binary")
    assert len(records) == snapshot.rows == 5


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1", b"hello"])
def test_what_is_no_parquet(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(content)
    with pytest.raises(ConfigError, match=r"not a readable Parquet file") as caught:
        listed(tmp_path, tmp_path / "m.parquet")
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]


def test_empty_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "m.parquet", {"image": pa.array([], pa.string())})
    snapshot, records = listed(tmp_path, tmp_path / "m.parquet")
    assert (snapshot.rows, records) == (0, [])


# -- JSON Lines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_a_time", [1, 40, jsonl.CHUNK_BYTES])
def test_jsonl_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    """However many lines are looked at together: line numbers, rows and values are the same."""
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", at_a_time)
    write_files(tmp_path, "a.jpg")
    lines = [
        '\ufeff{"image": "a.jpg", "n": 1, "x": {"b": [1, null]}}',
        "",
        "  \t",
        '{"image": "a.jpg"',
        "[1]",
        '{"image": 5}',
        '{"image": null}',
        '{"n": "1"}',
        '{"image": NaN, "n": 2}',
        '{"image": "a.jpg", "n": 1.5}',
        '{"image": "a.jpg", "x": "é", "n": 123456789012345678901}',
        '{"image": "a.jpg", "x": "\\ud800"}',
        '{"image": "caf\\udce9.jpg", "x": 123456789012345678901}',
    ]
    (tmp_path / "m.jsonl").write_text("\r\n".join(lines))
    snapshot, records = listed(tmp_path, tmp_path / "m.jsonl", keep=("x",))
    assert codes(records) == [None] + ["bad_row"] * 6 + [None, None, "bad_row", None]
    assert [r.keep[0] for r in records] == ['{"b":[1,null]}'] + [None] * 7 + ["é", None, "123456789012345678901"]
    assert messages(records)[1].startswith("line 4 is not JSON")
    assert "line 5 holds array" in messages(records)[2]
    assert "integer" in messages(records)[3]
    assert ids(records)[-1] == f"{tmp_path}/m.jsonl#10"
    assert os.fsencode(records[-1].media[0].file).endswith(b"caf\xe9.jpg")
    assert records[-1].path.endswith(r"caf\xe9.jpg")
    assert snapshot.rows == 11
    for start in range(12):
        source = open_source(SourceOptions((f"{tmp_path}/m.jsonl",), keep=("x",)))
        source.snapshot(tmp_path / f"again {start}")
        assert list(map(repr, source.records(start))) == list(map(repr, records[start:]))


def test_jsonl_digits_of_neighbours_are_no_long_number(tmp_path: Path) -> None:
    """And a long one is not rounded, where all lines beside it could be read the short way."""
    numbers = [1234567890, 12345678901234567890123, 1234567890, 987654321098765432109876]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps({"text": "a", "n": n}) for n in numbers))
    _, records = listed(tmp_path, tmp_path / "m.jsonl", keep=("n",))
    assert [r.keep[0] for r in records] == list(map(str, numbers))


@pytest.mark.parametrize("at_a_time", [1, 30, 4000])
def test_jsonl_of_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", at_a_time)
    lines = ["" if n % 7 == 3 else "broken" if n % 50 == 9 else json.dumps({"text": f"t{n}"}) for n in range(3000)]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    snapshot, records = listed(tmp_path, tmp_path / "m.jsonl", text_column="text")
    there = [(n, line) for n, line in enumerate(lines) if line]
    assert snapshot.rows == len(records) == len(there)
    for record, (n, line) in zip(records, there, strict=True):
        if line == "broken":
            assert record.error is not None
            assert record.error.message.startswith(f"line {n + 1} is not JSON")
        else:
            assert record.media[0].text == f"t{n}"


def test_jsonl_passthrough_types(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "i": 5, "f": 1, "b": True, "j": "s", "s": 1.0},
        {"text": "b"},
        {"text": "c", "i": 1.5},
        {"text": "d", "b": "maybe"},
        {"text": "e", "f": "x"},
        {"text": "f", "i": "7", "f": "1e3", "b": "FALSE", "j": [1], "s": [1]},
        {"text": "g", "i": 2**63},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(
        SourceOptions((f"{tmp_path}/m.jsonl",), keep=("i:int", "f:float", "b:bool", "j:json", "s"))
    )
    source.snapshot(tmp_path / "s")
    records = list(source.records())
    assert source.keep.types == [pa.int64(), pa.float64(), pa.bool_(), pa.string(), pa.string()]
    assert records[0].keep == (5, 1.0, True, '"s"', "1.0")
    assert records[1].keep == (None,) * 5
    assert records[5].keep == (7, 1000.0, False, "[1]", "[1]")
    assert codes(records) == [None, None, "bad_row", "bad_row", "bad_row", None, "bad_row"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


ROW = st.dictionaries(st.sampled_from(["text", "k", "z"]), JSON, max_size=3)


@settings(max_examples=80, deadline=None)
@given(st.lists(ROW | JSON | st.binary(max_size=9).map(lambda b: b.replace(b"\n", b"")), max_size=8))
def test_any_jsonl_has_a_record_for_each_line(rows: list[Any]) -> None:
    rows = [{"text": "first", "k": 0}, *rows]
    rows = [r for r in rows if not isinstance(r, bytes) or r.strip()]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "m.jsonl"
        path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows))
        snapshot, records = listed(Path(scratch), path, text_column="text", keep=("k:json",))
    assert snapshot.rows == len(records) == len(rows)
    for record, row in zip(records, rows, strict=True):
        text = row.get("text") if isinstance(row, dict) else None
        if isinstance(text, str) and text:
            assert record.media[0].text == text
            assert row.get("k") == (None if record.keep[0] is None else json.loads(record.keep[0]))
        else:
            assert codes([record]) == ["bad_row"]


def test_empty_jsonl(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b"")
    snapshot, records = listed(tmp_path, tmp_path / "m.jsonl")
    assert (snapshot.rows, records) == (0, [])
    assert listed(tmp_path, tmp_path / "m.jsonl", image_column="image", keep=("x:int",))[0].rows == 0


def test_a_json_array_is_not_lines(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('[\n{"image": "a.jpg"}\n]')
    with pytest.raises(ConfigError, match="jq -c"):
        listed(tmp_path, tmp_path / "m.jsonl")


# -- CSV ---------------------------------------------------------------------------------------------------


def test_csv_rows(tmp_path: Path) -> None:
    write_files(tmp_path, "a,1.jpg", "b\nc.jpg", b"\xe9.jpg")
    text = (
        b'\xef\xbb\xbfimage,caption\r\n"a,1.jpg","says ""hi"""\r\n\r\n"b\nc.jpg",two\r\nshort\r\na,b,c\r\n'
        b",empty\r\n\xe9.jpg,path\r\nx.jpg,caf\xe9\r\nx\0.jpg,nul\r\n"
        + b"y.jpg,"
        + b"z" * 300_000
        + b'\r\n"open,1\n2,3\n'
    )
    (tmp_path / "m.csv").write_bytes(text)
    _, records = listed(tmp_path, tmp_path / "m.csv", keep=("caption",))
    bad = "bad_row"
    assert codes(records) == [None, None, bad, bad, bad, None, bad, bad, None, bad]
    assert [r.keep[0] for r in records[:2]] == ['says "hi"', "two"]
    assert [r.media[0].size for r in records if r.media] == [7, 7, 5, None]
    assert len(records[8].keep[0]) == 300_000
    assert "never closed" in messages(records)[9]
    assert "3 cells, the header 2" in messages(records)[3]


CELL = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(CELL, CELL), max_size=8), st.sampled_from([",", "\t"]), st.booleans())
def test_any_csv_that_python_writes(rows: list[tuple[str, str]], delimiter: str, packed: bool) -> None:
    out = io.StringIO(newline="")
    stdlib_csv.writer(out, delimiter=delimiter, quoting=stdlib_csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    data = out.getvalue().encode()
    suffix = ("csv" if delimiter == "," else "tsv") + (".gz" if packed else "")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / f"m.{suffix}"
        path.write_bytes(gzip.compress(data) if packed else data)
        snapshot, records = listed(Path(scratch), path, keep=("label",))
    assert snapshot.rows == len(rows)
    assert [(r.media[0].text if r.media else "", r.keep[0]) for r in records] == rows


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"", "is empty"), (b"a,a\n1,2\n", "more than one column named 'a'"), ("a,b".encode("utf-16"), "UTF-16")],
)
def test_headers_that_are_none(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=match):
        listed(tmp_path, tmp_path / "m.csv")


def test_truncated_gzip(tmp_path: Path) -> None:
    rows = "".join(f'{{"image": "{os.urandom(8).hex()}.jpg"}}\n' for _ in range(5000))
    data = gzip.compress(rows.encode())
    (tmp_path / "m.jsonl.gz").write_bytes(data)
    assert listed(tmp_path, tmp_path / "m.jsonl.gz")[0].rows == 5000
    for name, size in (("t.jsonl.gz", len(data) - 10), ("u.jsonl.gz", 20)):
        (tmp_path / name).write_bytes(data[:size])
        with pytest.raises(ConfigError, match="truncated"):
            listed(tmp_path, tmp_path / name)


# -- imagefolder, changes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_imagefolder(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "in"
    write_files(root, "b.jpg", "x/a.jpg", "unlisted.jpg")
    if kind == "csv":
        (root / "metadata.csv").write_text("file_name,label\nx/a.jpg,one\nb.jpg,two\n")
    elif kind == "jsonl":
        (root / "metadata.jsonl").write_text(
            '{"file_name": "x/a.jpg", "label": "one"}\n{"file_name": "b.jpg", "label": "two"}'
        )
    else:
        write_parquet(root / "metadata.parquet", {"file_name": ["x/a.jpg", "b.jpg"], "label": ["one", "two"]})
    snapshot, records = listed(tmp_path, root, keep=("label",))
    assert ids(records) == ["x/a.jpg", "b.jpg"]
    assert [r.keep for r in records] == [("one",), ("two",)]
    assert [r.path for r in records] == [f"{root}/x/a.jpg", f"{root}/b.jpg"]
    assert snapshot.modalities == {"image": 2}
    assert len(listed(tmp_path, root, glob=("*.jpg",))[1]) == 3, "--glob asks for files"


def test_a_metadata_file_without_file_name_is_no_manifest(tmp_path: Path) -> None:
    write_files(tmp_path / "in", "b.jpg")
    (tmp_path / "in" / "metadata.jsonl").write_text('{"x": 1}')
    assert ids(listed(tmp_path, tmp_path / "in")[1]) == ["b.jpg"]


def test_sample_folder(sample_data: Path, tmp_path: Path) -> None:
    _, records = listed(tmp_path, sample_data / "images", keep=("caption", "count:int"))
    assert len(records) == 48
    assert records[0].keep == ("a small red circle at the top of a black background", 1)
    assert all(r.media[0].size for r in records)


def test_digest_of_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"text": "a", "caption": "b"}\n')
    first = digest(tmp_path, path, text_column="text")
    os.utime(path, ns=(1, 1))
    assert digest(tmp_path, path, text_column="text") == first, "a copy of a small manifest resumes"
    assert digest(tmp_path, path, text_column="caption") != first
    path.write_text('{"text": "A", "caption": "b"}\n')
    assert digest(tmp_path, path, text_column="text") != first


def test_a_manifest_that_changes_after_it_was_listed(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "m.parquet", {"image": [b"x"]})
    source = open_source(SourceOptions((str(path),)))
    source.snapshot(tmp_path / "s")
    write_parquet(path, {"image": [b"y", b"z"]})
    with pytest.raises(StateMismatch, match="changed after it was listed"):
        list(source.records())


@pytest.mark.parametrize("column", ["text", "image"])
def test_a_manifest_that_changes_while_it_is_read(tmp_path: Path, column: str) -> None:
    """Whether it grows or is written over: no row of the new content may pass for one of the old."""
    path = tmp_path / "m.jsonl"
    old, new = f'{{"{column}": "a.jpg"}}\n' * 50_000, f'{{"{column}": "b.jpg"}}\n' * 50_000
    for change, mode in ((new, "r+"), (new[:20], "a")):
        path.write_text(old)
        os.utime(path, ns=(1, 1))
        source = open_source(SourceOptions((str(path),)))
        source.snapshot(tmp_path / "s")
        records = source.records()
        found = [next(records)]
        with path.open(mode) as file:
            file.write(change)
        with pytest.raises(StateMismatch, match="changed after it was listed"):
            found += records
        assert {r.media[0].text or os.path.basename(str(r.media[0].file)) for r in found} == {"a.jpg"}


def test_a_manifest_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    """The old one stays open; a touched one is still the same."""
    path = tmp_path / "m.jsonl"
    path.write_text('{"text": "a"}\n' * 5000)
    source = open_source(SourceOptions((str(path),)))
    source.snapshot(tmp_path / "s")
    records = source.records()
    next(records)
    os.utime(path, ns=(1, 1))
    next(records)
    (tmp_path / "new").write_text('{"text": "b"}\n')
    os.replace(tmp_path / "new", path)
    assert len(list(records)) == 4998


# -- rows that lack some of their media --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_rows_may_lack_some_media_where_the_model_bears_it(kind: str, tmp_path: Path) -> None:
    write_files(tmp_path, "a.png", "b.wav")
    cells = {"image": ["a.png", None, "a.png", "", None], "sound": ["b.wav", "b.wav", None, "", "b.wav"]}
    cells["words"] = ["hi", None, "there", None, ""]
    path = tmp_path / f"m.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(cells), path)
    elif kind == "jsonl":
        lines = [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        lines = [",".join(cell or "" for cell in row) for row in zip(*cells.values(), strict=True)]
        path.write_text("\n".join([",".join(cells), *lines, ""]))
    columns = {"image_column": "image", "audio_column": "sound", "text_column": "words"}
    _, records = listed(tmp_path, path, missing=True, **columns)
    assert codes(records) == [None, None, None, "bad_row", None]
    assert messages(records)[3] == "columns 'image', 'sound', 'words' are all empty"
    there = [[m.modality for m in record.media if not m.missing] for record in records]
    assert there == [["image", "audio", "text"], ["audio"], ["image", "text"], [], ["audio"]]
    assert all(len(record.media) == 3 for record in records if record.error is None)
    # Each in its slot, also where the first is missing.
    assert [m.modality for m in records[1].media] == ["image", "audio", "text"]
    _, strict = listed(tmp_path / "strict", path, **columns)
    assert codes(strict) == [None, *["bad_row"] * 4]


def test_one_column_alone_may_not_be_missing(tmp_path: Path) -> None:
    write_parquet(tmp_path / "m.parquet", {"image": pa.array([{"bytes": None, "path": None}, None], STRUCT)})
    _, records = listed(tmp_path, tmp_path / "m.parquet", missing=True)
    assert messages(records) == ["column 'image' has neither bytes nor a path"] * 2


def test_bytes_that_a_row_lacks(tmp_path: Path) -> None:
    table = {
        "image": pa.array([{"bytes": None, "path": None}, {"bytes": b"x", "path": None}], STRUCT),
        "words": ["a", None],
    }
    write_parquet(tmp_path / "m.parquet", table)
    _, records = listed(tmp_path, tmp_path / "m.parquet", missing=True, image_column="image", text_column="words")
    assert [[m.missing for m in record.media] for record in records] == [[True, False], [False, True]]


def test_texts_come_as_columns_and_are_the_same_records(tmp_path: Path) -> None:
    """Where each row of a block is a text and nothing is wrong with it; rows of several inputs are numbered on."""
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("".join(json.dumps({"text": f"t{n}", "id": f"g{n}", "year": n}) + "\n" for n in range(1500)))
    lines = [
        {"text": "x", "id": "b0"},
        {"text": "", "id": "b1"},
        {"text": "y", "id": None},
        {"text": "z", "id": "b3"},
    ]
    bad.write_text("".join(json.dumps({**line, "year": 7}) + "\n" for line in lines))
    inputs = str(good), str(bad), str(good)
    source = open_source(SourceOptions(inputs, text_column="text", id_column="id", keep=("year:int",)))
    source.snapshot(tmp_path / "listed")
    for start in (0, 3, 1499, 1501):
        blocks = list(source.blocks(start))
        found = [record for block in blocks for record in block]
        assert list(map(repr, found)) == list(map(repr, source.records(start)))
        assert [record.row for record in found] == list(range(start, 3004))
        lists = [block for block in blocks if not isinstance(block, TextRecords)]
        assert [[record.row for record in block] for block in lists] == [list(range(max(start, 1500), 1504))]
    everything = list(source.records())
    names = [f"g{n}" for n in range(1500)]
    assert ids(everything) == [*names, "b0", "b1", f"{bad}#2", "b3", *names]
    assert [r.keep for r in everything[1498:1506]] == [(1498,), (1499,), (7,), (7,), (7,), (7,), (0,), (1,)]
    assert codes(everything[1500:1505]) == [None, "bad_row", "bad_row", None, None]
    assert all(r.media[0].text == f"t{r.row}" for r in everything[:1500])


def test_a_column_of_bytes_that_is_text(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "b.parquet", {"text": pa.array([b"one", b"zwei \xc3\xa4", b"\xff"], pa.binary())}
    )
    _, records = listed(tmp_path, path, text_column="text")
    assert [r.media[0].text if r.media else None for r in records] == ["one", "zwei ä", None]
    assert codes(records) == [None, None, "bad_row"]
