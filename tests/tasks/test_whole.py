"""Columns made of the outputs of many rows at once are those made row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmcli.core.classified import ClassifiedRows
from mmcli.core.errors import RowError
from mmcli.core.records import Record, Result
from mmcli.models.options import Ranking
from mmcli.models.scores import classified, rank
from mmcli.tasks.classify import Classify
from mmcli.tasks.embed import Embed

LABELS = ["red", "green", "blue", "a label of several words"]
# Of logits with many ties; some rows are not finite.
NUMBERS = st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0, 7.0])


def row_by_row(task: Any, outputs: Sequence[Any], failed: set[int]) -> list[pa.Array]:
    results = []
    for i, output in enumerate(outputs):
        record = Record(i, str(i), None, ())
        error = Result(record, None, error=RowError("corrupt", "broken"))
        results.append(error if i in failed else task.result(record, ["text"], [output]))
    columns: list[pa.Array] = task.columns(results, task.fields(("",)))
    return columns


def same(found: list[pa.Array] | None, wanted: list[pa.Array], task: Any) -> None:
    assert found is not None
    assert [column.type for column in found] == [field.type for field in task.fields(("",))]
    for column, other in zip(found, wanted, strict=True):
        column.validate(full=True)
        assert column.null_count == other.null_count
        assert column.equals(other) or column.to_pylist() == other.to_pylist()


@given(
    data=st.data(),
    count=st.integers(1, 9),
    labels=st.integers(1, 4),
    top_k=st.integers(1, 5),
    threshold=st.none() | st.sampled_from([0.1, 0.5, 0.9]),
    min_score=st.none() | st.sampled_from([0.25, 0.5, 0.9]),
)
@settings(deadline=None)
def test_classes(
    data: st.DataObject, count: int, labels: int, top_k: int, threshold: float | None, min_score: float | None
) -> None:
    failed = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    there = data.draw(st.permutations([i for i in range(count) if i not in failed]))
    logits = data.draw(arrays(np.float32, (count, labels), elements=NUMBERS))
    ranking = Ranking(top_k, threshold)
    activation: Any = "softmax" if threshold is None else "sigmoid"
    cut = data.draw(st.integers(1, len(there)))
    pieces = []
    for rows in filter(len, (there[:cut], there[cut:])):
        ranked = rank(torch.from_numpy(logits[rows]), activation, ranking)
        pieces.append((np.array(rows), classified(ranked, LABELS[:labels], ranking)))
    outputs = ClassifiedRows.scatter(pieces, count)
    task = Classify(threshold is not None, min_score)
    single: list[Any] = [None] * count
    for rows, piece in pieces:
        for row, one in zip(rows, piece, strict=True):
            single[row] = one
            assert outputs[int(row)] == one
    wanted = row_by_row(task, single, failed)
    same(task.whole(outputs, failed, task.fields(("",))), wanted, task)
    start = data.draw(st.integers(0, count - 1))
    later = {i - start for i in failed if i >= start}
    same(task.whole(outputs[start:], later, task.fields(("",))), [c.slice(start) for c in wanted], task)


def test_classes_that_are_not_finite_are_looked_at_one_by_one() -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    outputs = classified(rank(logits, "softmax", Ranking()), LABELS[:2], Ranking())
    task = Classify()
    assert task.whole(outputs, (), task.fields(("",))) is None
    assert task.whole(outputs[:1], (), task.fields(("",))) is not None


@given(data=st.data(), count=st.integers(1, 6), dtype=st.sampled_from(["float32", "float16"]))
@settings(deadline=None)
def test_vectors(data: st.DataObject, count: int, dtype: str) -> None:
    task = Embed(3, dtype)
    vectors = data.draw(arrays(np.float32, (count, 3), elements=NUMBERS))
    failed = data.draw(st.sets(st.integers(0, count - 1)))
    same(task.whole(vectors, failed, task.fields(("",))), row_by_row(task, list(vectors), failed), task)
    bad = data.draw(st.sampled_from([np.nan, np.inf, -np.inf] + [1e6] * (dtype == "float16")))
    vectors[data.draw(st.integers(0, count - 1)), 1] = bad
    assert task.whole(vectors, failed, task.fields(("",))) is None
