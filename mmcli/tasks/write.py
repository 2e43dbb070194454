"""The tasks caption and ask: what a model writes of a record, and what tells whether to trust it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmcli.core.errors import RowError
from mmcli.core.records import Generated, Modality, Record, Result, Scored, Transcript
from mmcli.core.refusal import is_refusal
from mmcli.core.schema import arrow_type, validate


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
    refusal = is_refusal(one.text)
    return one.text, one.finish_reason, one.n_tokens, one.mean_logprob, one.repetition, refusal


def _of_scored(one: Scored) -> tuple[Any, ...]:
    if one.score is not None and not math.isfinite(one.score):
        raise RowError("nonfinite", "the model gave NaN or infinite scores", stage="model")
    return one.answer, one.score, [{"answer": answer, "score": score} for answer, score in one.top_k]


def _of_transcript(one: Transcript) -> tuple[Any, ...]:
    if math.isnan(one.mean_logprob):
        raise RowError("nonfinite", "the model gave NaN or infinite scores", stage="model")
    if not one.text:
        windows = "1 window" if one.n_windows == 1 else f"{one.n_windows} windows"
        raise RowError("empty_output", f"no speech was found in {windows} of sound", stage="post")
    segments = [{"start": start, "end": end, "text": text} for start, end, text in one.segments]
    trust = one.finish_reason, one.n_tokens, one.mean_logprob, one.repetition
    return one.text, one.language, segments, one.n_windows, *trust


_TRUST = {
    "finish_reason": pa.string(),
    "n_tokens": pa.int32(),
    "mean_logprob": pa.float32(),
    "repetition": pa.bool_(),
}
_WRITTEN = {**_TRUST, "refusal": pa.bool_()}
_SEGMENT = pa.struct([("start", pa.float64()), ("end", pa.float64()), ("text", pa.string())])

# What a plan's `output` says -> what becomes of it.
KINDS = {
    "text": Kind(_WRITTEN, _of_generated),
    "json": Kind(_WRITTEN, _of_generated),
    "speech": Kind(
        {"language": pa.string(), "segments": pa.list_(_SEGMENT), "n_windows": pa.int32(), **_TRUST}, _of_transcript
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
    schema     the JSON Schema of every text; the column is of the Arrow type that fits it, or its JSON text
    join       makes one output of all that a record has (of the windows of a sound); None: one for each question
    """

    name: str
    column: str
    kind: str = "text"
    questions: tuple[str, ...] = ("",)
    schema: dict[str, Any] | None = None
    join: Callable[[Sequence[Any]], Any] | None = None

    @property
    def _type(self) -> pa.DataType | None:
        return None if self.schema is None else arrow_type(self.schema)

    def fields(self, slots: Sequence[str]) -> list[pa.Field]:
        """The columns of every question; the media of a record are read together, so slots have none."""
        columns = {self.column: self._type or pa.string(), **KINDS[self.kind].columns}
        return [
            pa.field(f"{question}_{name}" if question else name, kind)
            for question in self.questions
            for name, kind in columns.items()
        ]

    def result(self, record: Record, modalities: Sequence[Modality], outputs: Sequence[Any]) -> Result:
        """A record's outputs, one for each question -> its row; a bad one becomes an error of the row."""
        values: list[Any] = []
        try:
            if self.join is not None:
                outputs = [self.join(outputs)]
            for output in outputs:
                text, *others = KINDS[self.kind].values(output)
                values += [self._value(text, output), *others]
        except RowError as error:
            return Result(record, modalities[0], error=error)
        return Result(record, modalities[0], values=tuple(values))

    def _value(self, text: str, output: Generated | Scored) -> Any:
        """What the text's column holds: a text, or what the schema says. Raises RowError `invalid_output`."""
        if self.schema is None:
            return text
        value = validate(text, self.schema, cut=getattr(output, "finish_reason", None) == "length")
        return json.dumps(value, ensure_ascii=False) if self._type is None else value

    def columns(self, results: Sequence[Result], fields: Sequence[pa.Field]) -> list[pa.Array]:
        """One array per column; null where the result is an error."""
        values = [r.values for r in results]
        return [pa.array([v and v[i] for v in values], f.type) for i, f in enumerate(fields)]

    def restore(self, table: pa.Table, fields: Sequence[pa.Field]) -> list[tuple[Any, ...]]:
        """The values of finished rows, read back from an earlier output."""
        return list(zip(*(table.column(f.name).to_pylist() for f in fields), strict=True))
