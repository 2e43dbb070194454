"""Columns that prompts name: what records carry of them, and what tells records apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_helpers import codes, digest, listed, write_files, write_parquet

from mmcli.core.errors import ConfigError
from mmcli.core.signature import signature

TITLES = ["Emma", "", None]


def jsonl(root: Path) -> Path:
    rows = [{"text": f"t{i}", "title": title, "n": i, "ok": i > 0} for i, title in enumerate(TITLES)]
    (root / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "m.jsonl"


def parquet(root: Path) -> Path:
    columns = {"text": ["t0", "t1", "t2"], "title": TITLES, "n": [0, 1, 2], "ok": [False, True, True]}
    return write_parquet(root / "m.parquet", columns)


@pytest.mark.parametrize("make", [jsonl, parquet])
def test_values(make: object, tmp_path: Path) -> None:
    manifest = make(tmp_path)  # type: ignore[operator]
    _, records = listed(tmp_path, manifest, variables=("title", "n", "ok"), text_column="text")
    assert [r.variables for r in records] == [("Emma", 0, False), ("", 1, True), (None, 2, True)]
    assert [r.media[0].text for r in records] == ["t0", "t1", "t2"]


def test_csv_values_are_texts(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("text,n\na,1\nb,\n")
    _, records = listed(tmp_path, tmp_path / "m.csv", variables=("n",), text_column="text")
    assert [r.variables for r in records] == [("1",), ("",)]


def test_numbers_are_arrays(tmp_path: Path) -> None:
    boxes = [[[0.0, 0.5], [1.0, 0.25]], [[1.0, 1.0]], None]
    manifest = write_parquet(tmp_path / "m.parquet", {"text": ["a", "b", "c"], "boxes": boxes})
    _, records = listed(tmp_path, manifest, variables=("boxes",), text_column="text")
    first, second, third = (r.variables[0] for r in records)
    assert (first.dtype, first.tolist(), second.tolist(), third) == (np.float32, boxes[0], boxes[1], None)
    # Long arrays, which repr shortens, are told apart whole.
    signatures = set()
    for place in range(0, 4000, 500):
        array = np.zeros(4000, np.float32)
        array[place] = 1
        records[0].variables = (array,)
        signatures.add(signature(records[0]))
    assert len(signatures) == 8


@pytest.mark.parametrize("kind", ["large_list<float16>", "list<int64>", "list<double>", "fixed"])
def test_numbers_of_parquet_are_those_of_json(tmp_path: Path, kind: str) -> None:
    """Uneven and empty lists, and those with nulls, stay as they are."""
    boxes = [[[1, 2], [3, 4]], [[5, 6]], None, [[1, None], [2, 3]], [[7, 8], None], []]
    if kind != "fixed":
        boxes += [[[1, 2], [3]], [[]]]
    inner = {
        "large_list<float16>": pa.large_list(pa.float16()), "list<int64>": pa.list_(pa.int64()),
        "list<double>": pa.list_(pa.float64()), "fixed": pa.list_(pa.float32(), 2),
    }[kind]  # fmt: skip
    table = pa.table({"text": ["a"] * len(boxes), "boxes": pa.array(boxes, pa.list_(inner))})
    pq.write_table(table, tmp_path / "m.parquet")
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"text": "a", "boxes": b}) + "\n" for b in boxes))
    found, wanted = (
        [r.variables[0] for r in listed(tmp_path, tmp_path / name, variables=("boxes",), text_column="text")[1]]
        for name in ("m.parquet", "m.jsonl")
    )
    assert {type(one) for one in wanted} == {np.ndarray, type(None), list}
    for one, other in zip(found, wanted, strict=True):
        assert type(one) is type(other)
        if isinstance(other, np.ndarray):
            assert (one.dtype, one.tolist()) == (np.float32, other.tolist())
        else:
            assert one == other


def test_a_value_is_part_of_the_input(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("text,n\na,1\n")
    _, before = listed(tmp_path, tmp_path / "m.csv", variables=("n",), text_column="text")
    was = digest(tmp_path, tmp_path / "m.csv", variables=("n",), text_column="text")
    (tmp_path / "m.csv").write_text("text,n\na,2\n")
    _, after = listed(tmp_path, tmp_path / "m.csv", variables=("n",), text_column="text")
    assert signature(before[0]) != signature(after[0])
    assert was != digest(tmp_path, tmp_path / "m.csv", variables=("n",), text_column="text")


def test_a_named_column_is_not_taken_for_a_medium(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("text,question\nhello,what?\n")
    _, records = listed(tmp_path, tmp_path / "m.csv", variables=("question",))
    assert (records[0].media[0].text, records[0].variables) == ("hello", ("what?",))


def test_rows_without_media(tmp_path: Path) -> None:
    """Each is an empty text, where that is asked for; a text column is none of them, a picture's is."""
    talk = [{"role": "user", "content": "a"}]
    rows = [{"prompt": "a", "messages": talk}, {"prompt": "b", "messages": None}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    for name in ("m.jsonl", "m.parquet"):
        seen, records = listed(tmp_path, tmp_path / name, variables=("messages",), bare=True)
        assert (seen.rows, seen.modalities) == (2, {"text": 2})
        assert [(r.media[0].text, r.variables) for r in records] == [("", (talk,)), ("", (None,))]
        _, records = listed(tmp_path, tmp_path / name, variables=("messages",))
        assert [r.media[0].text for r in records] == ["a", "b"]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({**row, "image": "a.png"}) + "\n" for row in rows))
    _, records = listed(tmp_path, tmp_path / "m.jsonl", variables=("messages",), bare=True)
    assert [r.media[0].modality for r in records] == ["image", "image"]


def test_a_bad_line_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"text": "a", "n": 1}\n{broken\n{"text": "c", "n": 3}\n')
    _, records = listed(tmp_path, tmp_path / "m.jsonl", variables=("n",), text_column="text")
    assert codes(records) == [None, "bad_row", None]
    assert [r.variables for r in records if r.error is None] == [(1,), (3,)]


def test_what_has_no_such_column(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("text,title\na,b\n")
    with pytest.raises(ConfigError, match=r"the prompt's \{titel\}: .* no such column; did you mean title"):
        listed(tmp_path, tmp_path / "m.csv", variables=("titel",), text_column="text")
    write_files(tmp_path / "photos", "a.png")
    with pytest.raises(ConfigError, match="only manifests have columns, not folders"):
        listed(tmp_path, tmp_path / "photos", variables=("title",))
