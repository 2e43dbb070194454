"""Vectors as inputs: whatever row groups, files and start row, the rows are those of the files read whole."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcli.core.errors import ConfigError, StateMismatch
from mmcli.core.records import Media, Record, Sample
from mmcli.sources.chain import ChainedSource
from mmcli.sources.vectors import VectorColumns, VectorDecoder, VectorSource, vector_columns

D = 3
NUMBERS = st.floats(-8, 8, width=16)
VECTORS = st.one_of(st.none(), st.lists(NUMBERS, min_size=D, max_size=D))
ROWS = st.tuples(
    VECTORS, st.sampled_from([None, "", "a", "ü"]), st.sampled_from(["ok", "error"]), st.integers(0, 9)
)
TYPES = {
    "fixed": pa.list_(pa.float32(), D),
    "half": pa.list_(pa.float16(), D),
    "list": pa.list_(pa.float64()),
    "large": pa.large_list(pa.float32()),
}


def table(rows: list[tuple[Any, ...]], kind: pa.DataType) -> pa.Table:
    """As embed writes it: an error has no vector."""
    failed = [status == "error" for _, _, status, _ in rows]
    vectors = [None if error else vector for (vector, *_), error in zip(rows, failed, strict=True)]
    if kind.value_type == pa.float16():
        vectors = [None if v is None else [np.float16(x) for x in v] for v in vectors]
    return pa.table({
        "id": pa.array([name for _, name, _, _ in rows], pa.string()),
        "v": pa.array(vectors, kind),
        "year": pa.array([year for *_, year in rows], pa.int64()),
        "status": pa.array([status for _, _, status, _ in rows], pa.string()),
        "error_code": pa.array(["corrupt" if error else None for error in failed], pa.string()),
        "error_stage": pa.array(["decode" if error else None for error in failed], pa.string()),
        "error_message": pa.array(["broken" if error else None for error in failed], pa.string()),
    })  # fmt: skip


def told(record: Record) -> tuple[Any, ...]:
    """All that a record says."""
    vector = tuple(record.variables[-1].tolist()) if record.variables else None
    error = record.error and (record.error.code, record.error.stage, record.error.message)
    return record.row, record.id, record.keep, vector, error


@given(st.lists(st.lists(ROWS, max_size=7), min_size=1, max_size=3), st.integers(1, 4), st.data())
@settings(max_examples=60, deadline=None)
def test_rows_from_anywhere(files: list[list[Any]], group: int, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(TYPES)))
    rows = [row for rows in files for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for number, of_file in enumerate(files):
            names.append(f"{folder}/{number}.parquet")
            pq.write_table(table(of_file, TYPES[kind]), names[-1], row_group_size=group)
        if kind in ("list", "large") and all(vector is None or s == "error" for vector, _, s, _ in rows):
            with pytest.raises(ConfigError, match="holds no vector"):
                VectorSource("v", names, VectorColumns("v"))
            return
        source = VectorSource("v", names, VectorColumns("v", "id", ("year", "name=id")))
        assert source.embedding_size == D
        assert source.snapshot(Path(folder)).rows == len(rows)
        start = data.draw(st.integers(0, len(rows)))
        found = [told(record) for record in source.records(start)]
    wanted = []
    for row, (vector, name, status, year) in enumerate(rows):
        error = ("corrupt", "decode", "broken") if status == "error" else None
        if error is None and vector is None:
            error = ("bad_row", "source", "column 'v' is empty")
        values = None if error is not None else tuple(vector)
        wanted.append((row, name or f"v#{row}", (year, name), values, error))
    assert found == wanted[start:]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.data())
@settings(max_examples=20, deadline=None)
def test_several_inputs_are_one_after_the_other(lengths: list[int], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sources = []
        for number, length in enumerate(lengths):
            path = f"{folder}/{number}.parquet"
            vectors = [[number, row, 0] for row in range(length)]
            pq.write_table(pa.table({"v": pa.array(vectors, TYPES["fixed"])}), path)
            sources.append(VectorSource(str(number), [path], VectorColumns("v")))
        source = ChainedSource(sources)
        assert source.snapshot(Path(folder)).rows == sum(lengths)
        start = data.draw(st.integers(0, sum(lengths)))
        found = [(record.row, record.id) for record in source.records(start)]
    names = [f"{number}#{row}" for number, length in enumerate(lengths) for row in range(length)]
    assert found == list(enumerate(names))[start:]


def test_vectors_of_another_size_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "v.parquet"
    pq.write_table(
        pa.table({"v": pa.array([[1.0, 2.0], [1.0], None, [3.0, None], []], pa.list_(pa.float32()))}), path
    )
    source = VectorSource("v", [str(path)], VectorColumns("v"))
    source.snapshot(tmp_path)
    records = list(source.records())
    messages = [record.error and record.error.message for record in records]
    assert messages == [
        None, "column 'v' has 1 numbers, not 2", "column 'v' is empty", None, "column 'v' has 0 numbers, not 2",
    ]  # fmt: skip
    # A number that is not there is none: the row becomes `nonfinite` behind the model.
    assert np.isnan(records[3].variables[-1]).tolist() == [False, True]


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "v.parquet"
    pq.write_table(pa.table({"v": pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2))}), path)
    source = VectorSource("v", [str(path)], VectorColumns("v"))
    before = source.snapshot(tmp_path).digest
    pq.write_table(pa.table({"v": pa.array([[1.0, 3.0]], pa.list_(pa.float32(), 2))}), path)
    with pytest.raises(StateMismatch, match="changed after it was listed"):
        next(source.records())
    assert VectorSource("v", [str(path)], VectorColumns("v")).snapshot(tmp_path).digest != before


def test_another_column_is_another_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "v.parquet"
    one = pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2))
    pq.write_table(pa.table({"v": one, "w": one, "n": [1]}), path)
    assert vector_columns(pq.read_schema(path)) == ["v", "w"]
    digests = {VectorSource("v", [str(path)], VectorColumns(c, k)).snapshot(tmp_path).digest
               for c, k in (("v", None), ("w", None), ("v", "n"))}  # fmt: skip
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (VectorColumns("n"), "'n' is no column of vectors; such are: v"),
        (VectorColumns("v", "x", ("y", "label=n", "path=n")), "--id-column x: v has no such column"),
        (VectorColumns("v", None, ("path=n",)), "--keep path: every output has its own column"),
    ],
)
def test_columns_that_do_not_go(tmp_path: Path, columns: VectorColumns, said: str) -> None:
    path = tmp_path / "v.parquet"
    pq.write_table(pa.table({"v": pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2)), "n": [1]}), path)
    with pytest.raises(ConfigError) as caught:
        VectorSource("v", [str(path)], columns)
    assert said in "\n".join(caught.value.problems)


def test_the_decoder_waits_while_it_may_not_read() -> None:
    record = Record(0, "a", None, (Media("image"),), (), (np.ones(2, np.float32),))
    allowed = iter([False, True, True])
    answers = list(VectorDecoder().run(iter([[record]]), lambda: next(allowed)))
    assert [len(answer.records) for answer in answers] == [0, 1]
    (sample,) = answers[1].outcomes[0]
    assert isinstance(sample, Sample)
    assert (sample.modality, sample.arrays["embedding"].tolist()) == ("image", [1, 1])


@pytest.mark.parametrize("other", [{"w": [[1.0, 2.0]]}, {"v": [[1.0, 2.0, 3.0]]}, {"v": [7]}])
def test_files_of_other_columns(tmp_path: Path, other: dict[str, Any]) -> None:
    names = [str(tmp_path / "0.parquet"), str(tmp_path / "1.parquet")]
    pq.write_table(pa.table({"v": pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2))}), names[0])
    ((name, values),) = other.items()
    kind = pa.int64() if values == [7] else pa.list_(pa.float32(), len(values[0]))
    pq.write_table(pa.table({name: pa.array(values, kind)}), names[1])
    with pytest.raises(ConfigError, match=r"1\.parquet: column 'v' is "):
        VectorSource("v", names, VectorColumns("v"))
