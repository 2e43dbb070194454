"""Parquet files put together from row groups as bytes: what pyarrow reads in them, and damage that is found."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sink_rows import SCHEMA, table

from mmcli.core.errors import StateMismatch
from mmcli.sinks import compact
from mmcli.sinks.compact import read_struct, struct_bytes
from mmcli.sinks.parquet import COPIED_ROWS, GROUP_ROWS, ParquetFormat, open_parquet, write_table

METADATA = {b"mmcli": b"{}", b"other": "ä".encode()}


def written(folder: Path, rows: list[int], make: Callable[[int, int], pa.Table] = table) -> tuple[Path, pa.Table]:
    """Parts of so many rows as one file, and what they hold together."""
    tables, parts, start = [], [], 0
    for number, count in enumerate(rows):
        tables.append(make(start, start + count))
        parts.append(folder / f"part-{number}.parquet")
        write_table(tables[-1], parts[-1])
        start += count
    target = folder / "out.parquet"
    whole = pa.concat_tables(tables)
    assert ParquetFormat().write(parts, whole.schema.with_metadata(METADATA), target) == len(whole)
    return target, whole


def groups(path: Path) -> list[int]:
    footer = pq.read_metadata(path)
    return [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]


def test_large_row_groups_are_copied_and_small_ones_brought_together(tmp_path: Path) -> None:
    large = COPIED_ROWS
    out, whole = written(tmp_path, [10, 20, large, large + 5, 7, 8, 9, large, 30])
    assert groups(out) == [30, large, large + 5, 24, large, 30]
    with open_parquet(out) as file:
        assert file.read().equals(whole)
        assert file.read_row_group(3).equals(whole.slice(30 + 2 * large + 5, 24))
        assert {key: file.schema_arrow.metadata[key] for key in METADATA} == METADATA
        # As pyarrow's own, which says nothing of indexes that are not there.
        described = file.metadata.row_group(2).to_dict()
    write_table(whole.slice(30 + large, large + 5), tmp_path / "alone.parquet")
    alone = pq.read_metadata(tmp_path / "alone.parquet").row_group(0).to_dict()
    for made in (described, alone):
        for column in made["columns"]:
            for place in ("data_page_offset", "dictionary_page_offset", "file_offset"):
                column.pop(place)
    assert described == alone


def test_rows_are_found_by_statistics(tmp_path: Path) -> None:
    """Each group is said to hold what it holds: a filter finds rows of all of them."""
    out, _ = written(tmp_path, [COPIED_ROWS, 50, COPIED_ROWS], lambda a, b: pa.table({"n": range(a, b)}))
    for row in (0, COPIED_ROWS - 1, COPIED_ROWS + 3, 2 * COPIED_ROWS + 49):
        assert pq.read_table(out, filters=[("n", "==", row)]).to_pydict() == {"n": [row]}


def many_kinds(start: int, stop: int) -> pa.Table:
    rows = range(start, stop)
    return pa.table(
        {
            "text": [f"row {row}" * (row % 3) if row % 5 else None for row in rows],
            "same": ["ok"] * len(rows),
            "number": pa.array([row / 7 for row in rows], pa.float64()),
            "flag": [row % 2 == 0 for row in rows],
            "list": [[str(row)] * (row % 4) for row in rows],
            "struct": [{"a": row, "b": [row % 9]} if row % 6 else None for row in rows],
            "bytes": [b"\0\xff" * (row % 3) for row in rows],
            "nothing": pa.nulls(len(rows), pa.string()),
        }
    )


def test_all_kinds_of_columns(tmp_path: Path) -> None:
    out, whole = written(tmp_path, [COPIED_ROWS, 3, COPIED_ROWS], many_kinds)
    assert groups(out) == [COPIED_ROWS, 3, COPIED_ROWS]
    assert pq.read_table(out).equals(whole)


def wide(start: int, stop: int) -> pa.Table:
    """Of 16 kB a row."""
    numbers = np.arange(start * 4096, stop * 4096, dtype=np.float32)
    kind = pa.list_(pa.float32(), 4096)
    return pa.table({"embedding": pa.FixedSizeListArray.from_arrays(pa.array(numbers), type=kind)})


def test_wide_rows_are_copied_by_their_bytes(tmp_path: Path) -> None:
    out, whole = written(tmp_path, [1000, 600, 400], wide)
    assert groups(out) == [1000, 600, 400]
    assert pq.read_table(out).equals(whole)


def test_memory_hardly_grows_with_row_groups(tmp_path: Path) -> None:
    """10 million texts of 5 kB are 6,000 of them, and of each the footer says 11 kB."""
    part = tmp_path / "part.parquet"
    write_table(table(0, COPIED_ROWS), part)
    assembly = ParquetFormat().assembly(tmp_path / "out.parquet", SCHEMA)
    assembly.add([part])
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        assembly.add([part] * 50)
        assert tracemalloc.get_traced_memory()[0] - before < 50 * 200
    finally:
        tracemalloc.stop()
    assert assembly.finish(SCHEMA) == 51 * COPIED_ROWS
    assert groups(tmp_path / "out.parquet") == [COPIED_ROWS] * 51


def test_a_part_has_equal_row_groups(tmp_path: Path) -> None:
    """None is left over that would have to be encoded again."""
    write_table(table(0, GROUP_ROWS + 10), tmp_path / "part.parquet")
    assert groups(tmp_path / "part.parquet") == [GROUP_ROWS // 2 + 5] * 2
    # Of 64 MB.
    write_table(wide(0, 4000), tmp_path / "part.parquet")
    assert groups(tmp_path / "part.parquet") == [2000, 2000]


def test_no_rows_at_all(tmp_path: Path) -> None:
    out, _ = written(tmp_path, [0, 0])
    assert pq.read_table(out).schema.equals(SCHEMA)
    assert groups(out) == []


def test_no_flipped_bit_gets_into_the_output(tmp_path: Path) -> None:
    """Wherever it is in a part: told, or without an effect on what is read."""
    part, target = tmp_path / "part.parquet", tmp_path / "out.parquet"
    whole = table(0, COPIED_ROWS)
    write_table(whole, part)
    content, chance = part.read_bytes(), random.Random(0)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    told: dict[int, Exception] = {}
    for place in [*(chance.randrange(4, footer) for _ in range(40)), *range(footer, len(content), 11)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        part.write_bytes(damaged)
        try:
            ParquetFormat().write([part], SCHEMA, target)
            with open_parquet(target) as file:
                assert file.read().equals(whole), place
        except (StateMismatch, pa.ArrowException, OSError, ValueError) as error:
            told[place] = error
    of_pages = [str(error) for place, error in told.items() if place < footer]
    assert len(of_pages) > 30
    assert all("part.parquet is damaged" in message for message in of_pages)


@pytest.mark.parametrize(("number", "value", "said"), [
    (5, COPIED_ROWS + 1, "not as many values as its pages"),
    (9, -5, "outside of the file"),
    (7, 2**40, "outside of the file"),
])  # fmt: skip
def test_a_footer_that_says_something_else_of_a_column(tmp_path: Path, number: int, value: int, said: str) -> None:
    """parquet.thrift: 5 are its values, 9 is where its pages begin, 7 their bytes."""
    part = tmp_path / "part.parquet"
    write_table(table(0, COPIED_ROWS), part)
    content = part.read_bytes()
    begin = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer, _ = read_struct(content, begin)
    column = footer[4][1][1][0][1][1][1][0][3][1]
    column[number] = column[number][0], value
    footer_bytes = struct_bytes(footer)
    part.write_bytes(content[:begin] + footer_bytes + len(footer_bytes).to_bytes(4, "little") + content[-4:])
    with pytest.raises(StateMismatch, match=rf"part\.parquet is damaged: .*{said}"):
        ParquetFormat().write([part], SCHEMA, tmp_path / "out.parquet")


def test_a_part_that_is_cut_off(tmp_path: Path) -> None:
    part = tmp_path / "part.parquet"
    write_table(table(0, COPIED_ROWS), part)
    content = part.read_bytes()
    for length in (0, 3, 11, 100, len(content) // 2, len(content) - 1):
        part.write_bytes(content[:length])
        with pytest.raises(StateMismatch, match=r"part\.parquet is damaged"):
            ParquetFormat().write([part], SCHEMA, tmp_path / "out.parquet")
        assert not (tmp_path / "out.parquet").exists()


def test_parts_with_other_columns_are_refused(tmp_path: Path) -> None:
    write_table(pa.table({"n": range(COPIED_ROWS)}), tmp_path / "part.parquet")
    with pytest.raises(StateMismatch, match=r"part\.parquet has other columns"):
        ParquetFormat().write([tmp_path / "part.parquet"], pa.schema([("n", pa.int32())]), tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("count", [10, COPIED_ROWS])
@pytest.mark.parametrize("changed", ["missing", "moved", "not null"])
def test_a_part_with_other_columns_than_the_others(tmp_path: Path, changed: str, count: int) -> None:
    """Whatever would be read under another name, or could not be read at all."""
    other = table(10, 10 + count)
    names = other.schema.names
    match changed:
        case "missing":
            other = other.drop_columns(["error_stage"])
        case "moved":
            here, there = names.index("error_code"), names.index("error_stage")
            names[here], names[there] = names[there], names[here]
            other = other.select(names)
        case "not null":
            place = names.index("path")
            field = pa.field("path", other.schema.field("path").type, nullable=False)
            other = pa.Table.from_arrays(other.columns, schema=other.schema.set(place, field))
    write_table(table(0, 10), tmp_path / "part-0.parquet")
    write_table(other, tmp_path / "part-1.parquet")
    with pytest.raises(StateMismatch, match=r"part-1\.parquet has other columns than the output"):
        ParquetFormat().write(sorted(tmp_path.glob("part-*")), SCHEMA, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_what_is_compressed_in_another_way_is_encoded_again(tmp_path: Path) -> None:
    whole = table(0, COPIED_ROWS)
    pq.write_table(whole, tmp_path / "part.parquet", compression="gzip", store_schema=False)
    assert ParquetFormat().write([tmp_path / "part.parquet"], SCHEMA, tmp_path / "out.parquet") == COPIED_ROWS
    assert pq.read_table(tmp_path / "out.parquet").equals(whole)
    column = pq.read_metadata(tmp_path / "out.parquet").row_group(0).column(0)
    assert column.compression == "ZSTD"


INTEGERS = st.integers(-(2**63), 2**63 - 1)
SCALARS = [
    (compact.TRUE, st.none()),
    (compact.FALSE, st.none()),
    (compact.I8, st.integers(0, 255)),
    (compact.I32, INTEGERS),
    (compact.I64, INTEGERS),
    (compact.DOUBLE, st.binary(min_size=8, max_size=8)),
    (compact.BINARY, st.binary(max_size=200)),
]
FIELDS = st.one_of([st.tuples(st.just(kind), values) for kind, values in SCALARS])


def extend(fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    struct = st.dictionaries(st.integers(1, 3000), fields, max_size=20)
    numbers = st.tuples(st.just(compact.I64), st.lists(INTEGERS, max_size=40))
    structs = st.tuples(st.just(compact.STRUCT), st.lists(struct, max_size=4))
    lists = st.tuples(st.just(compact.LIST), numbers | structs)
    return fields | lists | st.tuples(st.just(compact.STRUCT), struct)


STRUCTS = st.dictionaries(st.integers(1, 3000), st.recursive(FIELDS, extend, max_leaves=12), max_size=20)


@settings(max_examples=60)
@given(STRUCTS, st.binary(max_size=5))
def test_structs_of_thrift_are_read_as_they_were_written(struct: compact.Struct, behind: bytes) -> None:
    content = struct_bytes(struct)
    assert read_struct(content + behind) == (struct, len(content))
    assert list(read_struct(content)[0]) == list(struct)
    for length in range(0, len(content), max(1, len(content) // 7)):
        with pytest.raises(ValueError, match="cut off"):
            read_struct(content[:length])


def test_footers_of_arrow_are_written_as_they_were_read(tmp_path: Path) -> None:
    write_table(many_kinds(0, 100), tmp_path / "part.parquet")
    content = (tmp_path / "part.parquet").read_bytes()
    footer = content[len(content) - 8 - int.from_bytes(content[-8:-4], "little") : -8]
    assert struct_bytes(read_struct(footer)[0]) == footer
