"""One row in, one row out, in order: whatever the rows, the batches, the workers and the failures."""

from __future__ import annotations

import io
import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from engine_runs import (
    Collected,
    D,
    ListSource,
    PartLimits,
    TextSource,
    expected_row,
    plan,
    run_engine,
    text_record,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmcli.core.errors import ModelError, RowError
from mmcli.core.records import Media, Record
from mmcli.core.signature import signature
from mmcli.engines.batching import Window, Windows, WindowSizes, window_sizes
from mmcli.models.fake import fake_vector
from mmcli.tasks.embed import Embed

TEXTS = st.sampled_from(["raise", "nan", "fail"]) | st.text("abcé ", min_size=1, max_size=60)
BAD = RowError("bad_row", "no such column", stage="source")


@st.composite
def record_lists(draw, max_size=60):
    """Text records of one or two slots; good ones, and all ways to fail."""
    slots = draw(st.sampled_from([1, 1, 2]))
    row = st.just((BAD,)) | st.tuples(*[TEXTS] * slots)
    return slots, [text_record(i, *texts) for i, texts in enumerate(draw(st.lists(row, max_size=max_size)))]


def expected_rows(slots: int, records: list[Record]):
    rows = [expected_row(r) for r in records]
    return [(i, code, (None,) * slots if code else vectors) for i, code, vectors in rows]


def broken_for_all(records: list[Record]) -> bool:
    """Whether the model is asked, and fails each time."""
    asked = [r for r in records if r.media and all(m.text != "raise" for m in r.media)]
    failing = [all(m.text == "fail" for m in r.media) for r in asked]
    return bool(asked) and all(failing)


SLOTS = {1: ("",), 2: ("text", "title")}
SHAPES = {
    "batch_size": st.integers(1, 9),
    "window": st.integers(1, 40),
    "first": st.none() | st.integers(1, 9),
    "part_rows": st.integers(1, 50),
    "oom": st.none() | st.integers(1, 6),
    "both": st.integers(1, 3),
    "tokens": st.none() | st.integers(1, 60),
    "block_rows": st.integers(1, 30),
}


@given(inputs=record_lists(), **SHAPES)
@settings(max_examples=80, deadline=None)
def test_rows_are_those_of_the_inputs(inputs, batch_size, window, first, part_rows, oom, both, tokens, block_rows):
    slots, records = inputs
    output = Collected()
    arguments = {"batch_size": batch_size, "window": window, "first": first, "parts": PartLimits(rows=part_rows)}
    arguments |= {"tokens": tokens, "block_rows": block_rows}
    if broken_for_all(records):
        with pytest.raises(ModelError, match=r"failed on all its inputs: .* told to fail"):
            run_engine(ListSource(records, SLOTS[slots]), output, plan(oom=oom, both=both), **arguments)
        return
    report = run_engine(ListSource(records, SLOTS[slots]), output, plan(oom=oom, both=both), **arguments)
    assert output.rows() == expected_rows(slots, records)
    assert [t.column("number").to_pylist() for t in output.tables] == [
        list(range(i, min(i + part_rows, len(records)))) for i in range(0, len(records), part_rows)
    ]
    assert report.done == report.committed == len(records)
    assert report.error_rows == sum(code is not None for _, code, _ in output.rows())


@given(inputs=record_lists(max_size=200), workers=st.integers(1, 3), together=st.integers(0, 99), **SHAPES)
@settings(max_examples=8, deadline=None)
def test_decode_processes_change_nothing(
    inputs, workers, together, batch_size, window, first, part_rows, oom, both, tokens, block_rows
):
    slots, records = inputs
    records.append(text_record(len(records), *["always one that works"] * slots))
    output = Collected()
    parts = PartLimits(rows=part_rows)
    source = ListSource(records, SLOTS[slots]) if slots > 1 or not together else TextSource(records, together)
    shape = {"batch_size": batch_size, "window": window, "first": first, "parts": parts, "tokens": tokens}
    shape["block_rows"] = block_rows
    run_engine(source, output, plan(oom=oom, both=both), workers=workers, **shape)
    assert output.rows() == expected_rows(slots, records)
    assert output.signatures == [signature(record) for record in records]


@given(inputs=record_lists(), kills=st.lists(st.integers(0, 4), max_size=6), data=st.data())
@settings(max_examples=80, deadline=None)
def test_a_run_that_is_broken_off_at_any_commit_goes_on_where_it_was(inputs, kills, data):
    slots, records = inputs
    records.insert(0, text_record(0, *["always one that works"] * slots))
    records = [Record(i, f"id{i}", None, r.media, (i,), error=r.error) for i, r in enumerate(records)]
    output = Collected()
    for kill in [*kills, None]:
        output.fail_at = None if kill is None else len(output.tables) + kill
        shape = {name: data.draw(SHAPES[name]) for name in ("batch_size", "window", "tokens", "block_rows")}
        parts = PartLimits(rows=data.draw(SHAPES["part_rows"]))
        before = output.committed
        try:
            model = plan(both=data.draw(SHAPES["both"]))
            report = run_engine(ListSource(records, SLOTS[slots]), output, model, parts=parts, **shape)
        except OSError:
            assert kill is not None
            assert output.committed >= before
        else:
            assert report.done == output.committed - before
    assert output.rows() == expected_rows(slots, records)


WORKING = st.builds("{}{}".format, st.sampled_from(["x", "yy", "zzzzzzzzzz"]), st.integers(0, 99)).map(
    lambda t: (t,)
)


# `one_of` with one strategy several times takes it once.
MOSTLY_WORKING = st.builds(
    lambda works, fails, which: fails if which == 19 else works,
    WORKING,
    st.just((BAD,)) | TEXTS.map(lambda t: (t,)),
    st.integers(0, 19),
)


@given(
    rows=st.lists(MOSTLY_WORKING, min_size=20, max_size=120),
    kills=st.lists(st.integers(0, 6), max_size=4),
    window=st.sampled_from([16, 40]),
    part_rows=st.sampled_from([1, 3, 7, 13]),
    block_rows=st.sampled_from([2, 5, 30]),
    column_rows=st.sampled_from([1, 30]),
    dtype=st.sampled_from(["float32", "float16"]),
    together=st.none() | st.integers(1, 50),
)
@settings(max_examples=40, deadline=None)
def test_windows_in_columns_may_hold_rows_that_fail_and_be_resumed_within(
    rows, kills, window, part_rows, block_rows, column_rows, dtype, together
):
    """Most rows work, so that most windows are columns; parts end within them. Records are columns, too, or not."""
    records = [text_record(i, *texts) for i, texts in enumerate([("works",), *rows])]
    output = Collected()
    shape = {"window": window, "block_rows": block_rows, "column_rows": column_rows, "task": Embed(D, dtype)}
    for kill in [*kills, None]:
        output.fail_at = None if kill is None else len(output.tables) + kill
        try:
            source = ListSource(records) if together is None else TextSource(records, together)
            run_engine(source, output, parts=PartLimits(rows=part_rows), **shape)
        except OSError:
            assert kill is not None
    assert output.rows() == expected_rows(1, records)
    assert pa.concat_tables(output.tables).column("number").to_pylist() == [r.row for r in records]
    assert output.signatures == [signature(record) for record in records]
    table = pa.concat_tables(output.tables)
    assert table.column("modality").to_pylist() == [None if r.error else "text" for r in records]
    assert table.column("error_stage").to_pylist() == [
        {None: None, "bad_row": "source", "corrupt": "decode"}.get(code, "model") for _, code, _ in output.rows()
    ]


def test_what_failed_of_the_rest_of_a_window_is_told_of_the_right_row():
    records = [text_record(0, "a"), text_record(1, "b"), text_record(2, BAD)]
    window = Window(records, 0, [("text",), ("text",), (BAD,)], [], "text")
    for first in range(3):
        assert window.failed(first) == {2 - first: (None, BAD)}


# -- modalities ------------------------------------------------------------------------------------------------


@cache
def picture(number: int) -> tuple[np.ndarray, bytes]:
    """A small picture: its pixels and its PNG."""
    shape = (1 + number % 7, 1 + number % 5, 3)
    pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return pixels, file.getvalue()


@given(
    pairs=st.lists(st.tuples(st.integers(0, 40), TEXTS), min_size=1, max_size=40),
    batch_size=st.integers(1, 9),
    missing=st.sets(st.integers(0, 39)),
)
@settings(max_examples=40, deadline=None)
def test_pictures_and_texts_of_one_record_stay_together(pairs, batch_size, missing):
    records, rows = [], []
    for row, (number, text) in enumerate([*pairs, (0, "works")]):
        pixels, png = picture(number)
        image = Media("image", file="/nowhere/at all.png") if row in missing else Media("image", data=png)
        records.append(Record(row, f"id{row}", None, (image, Media("text", text=text)), (row,)))
        code = "not_found" if row in missing else expected_row(text_record(row, text))[1]
        vectors = fake_vector("image", pixels, D), fake_vector("text", text, D)
        rows.append((f"id{row}", code, (None, None) if code else tuple(tuple(v.tolist()) for v in vectors)))
    output = Collected()
    run_engine(ListSource(records, ("image", "text")), output, batch_size=batch_size)
    assert output.rows() == rows
    assert set(output.tables[0].column("modality").to_pylist()) <= {"image+text"}


@given(numbers=st.lists(st.integers(0, 40) | TEXTS, min_size=1, max_size=60), batch_size=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_pictures_between_texts_keep_their_places(numbers, batch_size):
    records, rows = [], []
    for row, number in enumerate([*numbers, 0, "works"]):
        if isinstance(number, str):
            records.append(text_record(row, number))
            rows.append((*expected_row(records[-1]), "text"))
        else:
            pixels, png = picture(number)
            records.append(Record(row, f"id{row}", None, (Media("image", data=png),), (row,)))
            rows.append((f"id{row}", None, (tuple(fake_vector("image", pixels, D).tolist()),), "image"))
    output = Collected()
    run_engine(ListSource(records), output, batch_size=batch_size)
    modalities = [m for t in output.tables for m in t.column("modality").to_pylist()]
    assert [(*row, m) for row, m in zip(output.rows(), modalities, strict=True)] == rows


def test_files_that_are_missing_or_empty_cost_their_row(tmp_path: Path):
    (tmp_path / "good.txt").write_text("good")
    names = ["good.txt", "missing.txt", "good.txt", "missing too.png"]
    records = [Record(i, name, name, (Media(file=str(tmp_path / name)),), (i,)) for i, name in enumerate(names)]
    output = Collected()
    report = run_engine(ListSource(records), output)
    assert [code for _, code, _ in output.rows()] == [None, "not_found", None, "not_found"]
    assert output.tables[0].column("modality").to_pylist() == ["text", "text", "text", "image"]
    assert report.errors == {"not_found": 2}


# -- windows ---------------------------------------------------------------------------------------------------


@given(
    start=st.integers(0, 50),
    count=st.integers(0, 60),
    size=st.integers(1, 20),
    least=st.none() | st.integers(1, 9),
    max_bytes=st.integers(1, 100),
    weights=st.lists(st.integers(0, 40), min_size=110, max_size=110),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_windows_depend_on_rows_alone(start, count, size, least, max_bytes, weights, data):
    from mmcli.engines.batching import Arrived

    sizes = WindowSizes(size, least)
    first = sizes.around(start).start

    def rows_of(blocks):
        return [record.row for block in blocks for record in block.records]

    ends = data.draw(st.sets(st.integers(1, max(1, count - 1))))
    cuts = [first, *(first + end for end in sorted(ends) if end < count), first + count] if count else []
    blocks = [
        Arrived([text_record(i, "x") for i in range(a, b)], [()] * (b - a), weights[a:b])
        for a, b in itertools.pairwise(cuts)
    ]

    def cut(order):
        windows = Windows(first, sizes, max_bytes)
        found = [rows_of(w) for block in order for w in windows.add([block])]
        found.append(rows_of(windows.flush()))
        windows.check_empty()
        return found

    one_by_one = [block.part(i, i + 1) for block in blocks for i in range(len(block))]
    in_order = cut(one_by_one)
    assert cut(data.draw(st.permutations(blocks))) == in_order
    assert [row for window in in_order for row in window] == rows_of(blocks)
    for window in in_order:
        assert all(sizes.around(row) == sizes.around(window[0]) for row in window)
        assert sum(weights[row] for row in window[:-1]) < max_bytes


def test_windows_of_texts_leave_little_padding():
    """Lengths as of texts: most are short."""
    lengths = (np.random.default_rng(0).exponential(20, 8192).clip(1, 120)).astype(int)

    def padded(window: int) -> float:
        windows = [sorted(lengths[at : at + window]) for at in range(0, len(lengths), window)]
        batches = [one[at : at + 32] for one in windows for at in range(0, len(one), 32)]
        return sum(len(batch) * batch[-1] for batch in batches) / lengths.sum()

    assert padded(window_sizes(32, lengths_vary=True, texts=True).size) < 1.25
    assert padded(window_sizes(32, lengths_vary=True).size) > 1.3


@given(size=st.integers(1, 50), first=st.none() | st.integers(1, 60))
def test_windows_begin_where_the_ones_before_end(size, first):
    sizes, row, found = WindowSizes(size, first), 0, []
    while row < 4 * size:
        window = sizes.around(row)
        assert window.start == row
        assert all(sizes.around(other) == window for other in window)
        found.append(len(window))
        row = window.stop
    assert found[0] == min(size, first or size)
    assert max(found) <= size
    assert found[-1] == size
    assert all(later <= 2 * before or later == size for before, later in itertools.pairwise(found))
