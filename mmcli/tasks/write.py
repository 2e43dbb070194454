"""The tasks caption and ask: what a model writes of a record, and what tells whether to trust it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmcli.core.errors import RowError
from mmcli.core.records import Generated, Modality, Record, Result, Scored


@dataclass(frozen=True, slots=True)
class Kind:
    """What outputs of one kind become.

    columns  behind the column of the text itself: name -> Arrow type
    values   an output -> the text and those columns; raises RowError
    """

    columns: dict[str, pa.DataType]
    values: Callable[[Any], tuple[Any, ...]]


def _of_generated(one: Generated) -> tuple[Any, ...]:
    if one.mean_logprob is not None and math.isnan(one.mean_logprob):
        raise RowError("nonfinite", "the model gave NaN or infinite scores", stage="model")
    if not one.text.strip():
        among = "" if one.n_tokens is None else f" among {one.n_tokens} tokens"
        raise RowError("empty_output", f"no text{among}", stage="post")
    return one.text, one.finish_reason, one.n_tokens, one.mean_logprob, one.repetition


def _of_scored(one: Scored) -> tuple[Any, ...]:
    if one.score is not None and not math.isfinite(one.score):
        raise RowError("nonfinite", "the model gave NaN or infinite scores", stage="model")
    return one.answer, one.score, [{"answer": answer, "score": score} for answer, score in one.top_k]


# What a plan's `output` says -> what becomes of it.
KINDS = {
    "text": Kind(
        {
            "finish_reason": pa.string(),
            "n_tokens": pa.int32(),
            "mean_logprob": pa.float32(),
            "repetition": pa.bool_(),
        },
        _of_generated,
    ),
    "scores": Kind(
        {
            "score": pa.float32(),
            "top_k": pa.list_(pa.struct([pa.field("answer", pa.string()), pa.field("score", pa.float32())])),
        },
        _of_scored,
    ),
}


@dataclass(frozen=True, slots=True)
class Write:
    """One text for each question.

    name       "caption" or "ask"
    column     of the text: "caption" or "answer"
    kind       one of KINDS
    questions  names that begin the columns of each, `colour_answer`; ("",) for one question: `answer`
    type       Arrow type of the text's column; other than a string: its text is JSON of that
    """

    name: str
    column: str
    kind: str = "text"
    questions: tuple[str, ...] = ("",)
    type: pa.DataType | None = None

    def fields(self, slots: Sequence[str]) -> list[pa.Field]:
        """The columns of every question; the media of a record are read together, so slots have none."""
        columns = {self.column: self.type or pa.string(), **KINDS[self.kind].columns}
        return [
            pa.field(f"{question}_{name}" if question else name, kind)
            for question in self.questions
            for name, kind in columns.items()
        ]

    def result(
        self, record: Record, modalities: Sequence[Modality], outputs: Sequence[Generated | Scored]
    ) -> Result:
        """A record's outputs, one for each question -> its row; a bad one becomes an error of the row."""
        values: list[Any] = []
        try:
            for output in outputs:
                text, *others = KINDS[self.kind].values(output)
                values += [text if self.type is None else json.loads(text), *others]
        except RowError as error:
            return Result(record, modalities[0], error=error)
        return Result(record, modalities[0], values=tuple(values))

    def columns(self, results: Sequence[Result], fields: Sequence[pa.Field]) -> list[pa.Array]:
        """One array per column; null where the result is an error."""
        values = [r.values for r in results]
        return [pa.array([v and v[i] for v in values], f.type) for i, f in enumerate(fields)]

    def restore(self, table: pa.Table, fields: Sequence[pa.Field]) -> list[tuple[Any, ...]]:
        """The values of finished rows, read back from an earlier output."""
        return list(zip(*(table.column(f.name).to_pylist() for f in fields), strict=True))
