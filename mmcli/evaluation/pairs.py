"""Answers beside what is right: one pair for each row that has a truth, and counts of all others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Protocol

from mmcli.core.errors import ConfigError
from mmcli.evaluation.classification import TopK
from mmcli.evaluation.kinds import CAPTION, CLASSIFICATION, SPEECH, Columns
from mmcli.evaluation.tables import Batch, Table, values

# Of wrong rows so many are named.
SHOWN = 3
_TEXT_KEYS = ("answer", "caption", "label", "text", "raw", "sentence")


@dataclass(slots=True)
class Counts:
    """Where the rows went. rows = evaluated + without_truth + merged; evaluated = answered + the three after it.

    rejected       the model declined, by its score
    no_answer      null without an error
    without_truth  rows of the predictions that have none
    unused_truth   ids of the truth file that no row has
    repeated_ids   ids that several rows have
    merged         rows that only bring one more reference for an earlier row's answer
    """

    rows: int = 0
    evaluated: int = 0
    answered: int = 0
    errors: int = 0
    rejected: int = 0
    no_answer: int = 0
    without_truth: int = 0
    unused_truth: int = 0
    repeated_ids: int = 0
    merged: int = 0


@dataclass(slots=True)
class Pairs:
    """Aligned lists, one entry for each evaluated row.

    answers     str, or list of str with several classes a row; None: no answer
    lost        why there is none: "errors", "rejected" or "no_answer", as Counts has them; else None
    references  what is right: at least one text, or any number of classes
    """

    ids: list[str] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    lost: list[str | None] = field(default_factory=list)
    references: list[list[str]] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    top_k: list[TopK | None] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    notes: list[str] = field(default_factory=list)


class Truth(Protocol):
    """Where it is known what is right.

    name     for the report
    columns  of the predictions that it reads
    """

    @property
    def name(self) -> str: ...

    @property
    def columns(self) -> list[str]: ...

    def of(self, batch: Batch, ids: Sequence[str]) -> list[list[str] | None]:
        """For each row what is right; None where nothing is known."""
        ...

    def unused(self) -> int:
        """How many of its ids no row had."""
        ...


@dataclass(slots=True)
class ColumnTruth:
    """A column of the predictions, passed through. `empty`: whether an empty text is one, as that of silence."""

    column: str
    empty: bool = False

    @property
    def name(self) -> str:
        return f"column {self.column}"

    @property
    def columns(self) -> list[str]:
        return [self.column]

    def of(self, batch: Batch, ids: Sequence[str]) -> list[list[str] | None]:
        return [references(value, self.empty) for value in values(batch[self.column])]

    def unused(self) -> int:
        return 0


@dataclass(slots=True)
class FolderTruth:
    """The name of the folder that holds a file: `train/cat/1.jpg` is a cat. `column`: of paths."""

    column: str
    name: str = "names of folders"

    @property
    def columns(self) -> list[str]:
        return [self.column]

    def of(self, batch: Batch, ids: Sequence[str]) -> list[list[str] | None]:
        # A backslash is no separator here: it begins the escape of a byte that is not UTF-8.
        parents = [PurePosixPath(str(p or "")).parent.name for p in values(batch[self.column])]
        return [[parent] if parent else None for parent in parents]

    def unused(self) -> int:
        return 0


class FileTruth:
    """A file of truths by id. Several rows of one id are several references, or classes."""

    def __init__(
        self, table: Table, id_column: str, column: str, empty: bool, same_id: Callable[[str], Any] = str
    ) -> None:
        """`same_id` maps ids of both sides to what they are compared by. Reads the file; raises ConfigError."""
        self.name = f"{table.name}, column {column}"
        self._same_id = same_id
        self._truths: dict[Any, list[str]] = {}
        self._seen: set[Any] = set()
        for batch in table.read([id_column, column]):
            for name, value in zip(values(batch[id_column]), values(batch[column]), strict=True):
                if name is not None and (found := references(value, empty)) is not None:
                    self._truths.setdefault(same_id(text_of(name)), []).extend(found)
        if not self._truths:
            raise ConfigError(f"{table.name} has no row with both {id_column} and {column}")

    @property
    def columns(self) -> list[str]:
        return []

    def of(self, batch: Batch, ids: Sequence[str]) -> list[list[str] | None]:
        keys = [self._same_id(name) for name in ids]
        self._seen.update(keys)
        return [self._truths.get(key) for key in keys]

    def unused(self) -> int:
        return sum(key not in self._seen for key in self._truths)

    def example(self) -> str:
        return str(next(iter(self._truths)))


def text_of(value: Any) -> str:
    """A cell as text: 3 and 3.0 are "3", as a CSV has it; true is "true"."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def references(value: Any, empty: bool = False) -> list[str] | None:
    """A cell of truth -> its texts; None for null, NaN, and unless `empty` an empty text.

    A list is several, also as JSON text (a CSV has no lists); of objects, as VQA's annotations have them, it is
    their `answer`, `caption`, `label` or `text`.
    """
    if value is None or value != value:
        return None
    if isinstance(value, str):
        if value.startswith("[") and isinstance(parsed := _json(value), list):
            return references(parsed, empty)
        return [value] if empty or value.strip() else None
    if isinstance(value, list):
        found = [references(_inner(v), empty) for v in value]
        return [text for one in found if one is not None for text in one]
    return [text_of(_inner(value))]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _inner(value: Any) -> Any:
    if isinstance(value, dict):
        return next((value[key] for key in _TEXT_KEYS if key in value), value)
    return value


def collect(table: Table, columns: Columns, truth: Truth, kind: str) -> Pairs:
    """Read the answers and pair them with what is right. Raises ConfigError where that cannot be done."""
    pairs = Pairs()
    names: Counter[str] = Counter()
    paths: set[Any] = set()
    several = table.columns[columns.answer] == "list"
    for batch in table.read(list(dict.fromkeys([*columns.names(), *truth.columns]))):
        _add(batch, columns, truth, pairs, names, several)
        if kind == CAPTION and columns.path is not None:
            paths.update(values(batch[columns.path]))
    pairs.counts.repeated_ids = sum(n > 1 for n in names.values()) if columns.id is not None else 0
    pairs.counts.unused_truth = truth.unused()
    if not pairs.ids:
        raise ConfigError(_nothing(table, truth, pairs, names))
    if kind != SPEECH:
        _blank_is_none(pairs)
    if kind in (CLASSIFICATION, SPEECH) and not several:
        _check_single(pairs, kind)
    if kind == CAPTION and isinstance(truth, ColumnTruth):
        _merge(pairs, columns, len(paths - {None}))
    _count(pairs)
    return pairs


def _add(batch: Batch, columns: Columns, truth: Truth, pairs: Pairs, names: Counter[str], several: bool) -> None:
    """The pairs of one batch. `several`: a row may have any number of classes, none too."""
    answers = values(batch[columns.answer])
    rows = len(answers)
    start = pairs.counts.rows
    ids = (
        [text_of(v) for v in values(batch[columns.id])] if columns.id else [f"row {start + i}" for i in range(rows)]
    )
    scores = values(batch[columns.score]) if columns.score else [None] * rows
    top_k = values(batch[columns.top_k]) if columns.top_k else [None] * rows
    status = values(batch[columns.status]) if columns.status else [None] * rows
    rejected = values(batch[columns.rejected]) if columns.rejected else [None] * rows
    known = truth.of(batch, ids)
    pairs.counts.rows += rows
    names.update(ids)
    for i, right in enumerate(known):
        if right is None or not (right or several):
            pairs.counts.without_truth += 1
            continue
        lost = _lost(answers[i], status[i], rejected[i])
        pairs.ids.append(ids[i])
        pairs.references.append(right)
        pairs.lost.append(lost)
        pairs.answers.append(None if lost else _answer(answers[i]))
        pairs.scores.append(_score(scores[i], columns.score))
        pairs.top_k.append(_top_k(top_k[i], columns.top_k))


def _lost(answer: Any, status: Any, rejected: Any) -> str | None:
    """Why a row has no answer; None when it has one."""
    if status == "error":
        return "errors"
    if rejected in (True, "true", "True", "1"):
        return "rejected"
    return "no_answer" if answer is None or answer != answer else None


def _answer(value: Any) -> Any:
    return [text_of(_inner(v)) for v in value] if isinstance(value, list) else text_of(value)


def _score(value: Any, column: str | None) -> float | None:
    try:
        return None if value is None or value == "" else float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"column {column} holds {str(value)[:40]!r}, which is no number") from None


def _top_k(value: Any, column: str | None) -> TopK | None:
    if isinstance(value, str):
        value = _json(value)
    if value is None:
        return None
    try:
        return [(text_of(one.get("label", one.get("answer"))), float(one["score"])) for one in value]
    except (TypeError, ValueError, KeyError, AttributeError):
        raise ConfigError(
            f"column {column} holds {str(value)[:60]!r}; a list of objects with label and score was expected"
        ) from None


def _nothing(table: Table, truth: Truth, pairs: Pairs, names: Counter[str]) -> str:
    if not pairs.counts.rows:
        return f"{table.name} has no rows"
    if isinstance(truth, FileTruth):
        return (
            f"no id of {table.name} is in {truth.name}: ids are e.g. {next(iter(names))!r}, there "
            f"{truth.example()!r}; choose others with --id-column and --truth-id-column"
        )
    return f"no row of {table.name} has a truth: {truth.name} is empty everywhere"


def _blank_is_none(pairs: Pairs) -> None:
    """An empty cell, as a CSV has for null, is no answer; as a transcript it says that nothing was heard."""
    for i, answer in enumerate(pairs.answers):
        if isinstance(answer, str) and not answer.strip():
            pairs.answers[i], pairs.lost[i] = None, "no_answer"


def _check_single(pairs: Pairs, kind: str) -> None:
    """Every row has one true class, or one transcript."""
    wrong = []
    for i, right in enumerate(pairs.references):
        if len(distinct := list(dict.fromkeys(right))) > 1:
            wrong.append(f"{pairs.ids[i]!r} has {' and '.join(map(repr, distinct[:SHOWN]))}")
        pairs.references[i] = distinct[:1]
    if wrong := list(dict.fromkeys(wrong)):
        what = "true class" if kind == CLASSIFICATION else "transcript"
        more = f"; and {len(wrong) - SHOWN:,} more" if len(wrong) > SHOWN else ""
        raise ConfigError(f"each row needs one {what}, but {'; '.join(wrong[:SHOWN])}{more}")


def _merge(pairs: Pairs, columns: Columns, paths: int) -> None:
    """Rows with the same id and the same caption are one picture with several references."""
    places: dict[tuple[str, Any], int] = {}
    keep = []
    for i, key in enumerate(zip(pairs.ids, pairs.answers, strict=True)):
        first = places.setdefault(key, i) if columns.id is not None else i
        if first == i:
            keep.append(i)
        else:
            pairs.references[first] = pairs.references[first] + pairs.references[i]
    pairs.counts.merged = len(pairs.ids) - len(keep)
    for name in ("ids", "answers", "lost", "references", "scores", "top_k"):
        whole = getattr(pairs, name)
        setattr(pairs, name, [whole[i] for i in keep])
    if columns.id != columns.path and not pairs.counts.merged and 0 < paths < len(keep):
        pairs.notes.append(
            f"{len(keep):,} rows are of {paths:,} files; if these are several references of one picture, "
            "add --id-column path"
        )


def _count(pairs: Pairs) -> None:
    counts, lost = pairs.counts, Counter(pairs.lost)
    counts.evaluated, counts.answered = len(pairs.ids), lost[None]
    counts.errors, counts.rejected, counts.no_answer = lost["errors"], lost["rejected"], lost["no_answer"]
