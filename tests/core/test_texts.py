"""Records as columns are the same records, however they are cut and joined."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcli.core.records import Media, Record
from mmcli.core.signature import signature
from mmcli.core.texts import TextRecords, blocks_of, joined, numbered, signatures_of
from mmcli.media.worker import Jobs

ROWS = st.lists(st.tuples(st.text(max_size=5), st.text(min_size=1, max_size=9), st.integers(0, 9)), max_size=30)


def both(
    rows: list[tuple[str, str, int]], first: int, keep: bool, variables: bool
) -> tuple[TextRecords, list[Record]]:
    """The same, as columns and as they are."""
    ids, texts, numbers = ([row[i] for row in rows] for i in range(3))
    made = []
    for row, (name, text, n) in enumerate(rows, first):
        values = (n, str(n)) if keep else ()
        made.append(Record(row, name, None, (Media("text", text=text),), values, (n,) if variables else ()))
    kept: list[list[Any]] = [numbers, [str(n) for n in numbers]] if keep else []
    return TextRecords(first, ids, texts, "text", kept, [numbers] if variables else []), made


@given(ROWS, st.integers(0, 99), st.booleans(), st.booleans(), st.integers(0, 30), st.integers(0, 30))
def test_the_same_records(
    rows: list[tuple[str, str, int]], first: int, keep: bool, variables: bool, start: int, stop: int
) -> None:
    columns, records = both(rows, first, keep, variables)
    assert list(columns) == records
    assert [columns[i] for i in range(-len(rows), len(rows))] == records + records
    assert list(columns[start:stop]) == records[start:stop]
    assert list(joined([columns[:start], columns[start:]])) == records
    assert list(joined([columns[:start], records[start:]])) == records
    assert list(numbered(columns, 7)) == list(numbered(records, 7))
    assert [record.row for record in numbered(columns, 7)] == list(range(7, 7 + len(rows)))
    with pytest.raises(IndexError):
        columns[len(rows)]


@given(ROWS, st.booleans(), st.booleans(), st.integers(0, 30))
def test_the_same_signatures(rows: list[tuple[str, str, int]], keep: bool, variables: bool, cut: int) -> None:
    """Computed here, or by a worker; cut and joined."""
    columns, records = both(rows, 3, keep, variables)
    wanted = [signature(record) for record in records]
    assert signatures_of(columns) == [None] * len(rows)
    for given_records in (columns, records):
        jobs = pickle.loads(pickle.dumps(Jobs.of(1, given_records, sign=True)))
        assert jobs.unpacked() == [record.media for record in records]
        assert jobs.signatures(jobs.unpacked()) == b"".join(wanted)  # type: ignore[arg-type]
    unsigned = columns[:]
    columns.sign()
    assert signatures_of(columns) == wanted
    assert [record.signature for record in columns[cut:]] == wanted[cut:]
    assert signatures_of(joined([columns[:cut], columns[cut:]])) == wanted
    if 0 < cut < len(rows):
        # Half of them are not known: none is.
        half = joined([columns[:cut], unsigned[cut:]])
        assert signatures_of(half) == [None] * len(rows)


def test_other_kinds_are_joined_one_by_one() -> None:
    columns, records = both([("a", "x", 1), ("b", "y", 2)], 0, True, False)
    sounds = TextRecords(2, ["c"], ["z"], None)
    assert joined([columns, sounds]) == [*records, *sounds]


def test_sources_without_blocks_are_read_some_at_a_time() -> None:
    _, records = both([(str(i), "x", i) for i in range(600)], 0, False, False)

    class Listed:
        def records(self, start: int = 0) -> Any:
            return iter(records[start:])

    blocks = list(blocks_of(Listed(), 5))
    assert [one for block in blocks for one in block] == records[5:]
    assert max(map(len, blocks)) == 256
