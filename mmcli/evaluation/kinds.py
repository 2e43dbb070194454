"""Which kind of metrics a table asks for, and in which of its columns the answers are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mmcli.core.errors import ConfigError
from mmcli.evaluation.tables import Table

CLASSIFICATION, CAPTION, VQA, SPEECH, RETRIEVAL = "classification", "caption", "vqa", "speech", "retrieval"


@dataclass(frozen=True, slots=True)
class Kind:
    """answers, truths: usual names of those columns, the likeliest first."""

    answers: tuple[str, ...]
    truths: tuple[str, ...]


KINDS = {
    CLASSIFICATION: Kind(
        ("labels", "label", "prediction", "predicted", "answer"),
        ("label", "labels", "class", "category", "target", "truth", "answer"),
    ),
    CAPTION: Kind(
        ("caption", "prediction", "text"),
        ("captions", "caption", "references", "reference", "sentences", "text", "truth"),
    ),
    VQA: Kind(("answer", "prediction"), ("answers", "answer", "multiple_choice_answer", "truth")),
    SPEECH: Kind(
        ("caption", "transcript", "transcription", "prediction", "text", "answer"),
        ("transcript", "transcription", "text", "sentence", "reference", "caption", "truth"),
    ),
    RETRIEVAL: Kind((), ()),
}
_TASKS = {"embed": RETRIEVAL, "caption": CAPTION, "ask": VQA, "classify": CLASSIFICATION}
IDS = ("id", "question_id", "image_id", "file_name", "file", "path", "filename", "key", "name")


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a table has what.

    score, top_k, rejected, status, path   None where there is none, or where it does not matter
    id                                     None: rows have no names
    """

    answer: str
    id: str | None
    score: str | None
    top_k: str | None
    rejected: str | None
    status: str | None
    path: str | None

    def names(self) -> list[str]:
        there = [self.answer, self.id, self.score, self.top_k, self.rejected, self.status, self.path]
        return list(dict.fromkeys(name for name in there if name is not None))


def choose_kind(table: Table, metrics: str | None, column: str | None, truth: str | None) -> str:
    """One of KINDS: as --metrics says, else by the task that made the table, else by its columns.

    `truth`: a column of the table that holds what is right, and so no answers. Raises ConfigError.
    """
    if metrics is not None:
        return metrics
    if column is not None and (kinds := _by_columns([column])):
        return kinds[0]
    if (kind := _TASKS.get(str(table.job.get("task")))) is not None:
        return SPEECH if kind == CAPTION and "segments" in table.columns else kind
    names = [name for name in table.columns if name != truth]
    kinds = [] if column is not None else _by_columns(names)
    if not kinds and column is None and table.vectors():
        kinds = [RETRIEVAL]
    if len(kinds) == 1:
        return kinds[0]
    known = ", ".join(KINDS)
    if column is not None:
        raise ConfigError(f"--column {column} does not tell what is to be measured; add --metrics, one of {known}")
    if not kinds and truth is not None and _by_columns([truth]):
        raise ConfigError(
            f"--truth {truth}: {table.name} has no other column of answers ({_list(names)}); name it with --column "
            "and --metrics, or give what is right as a file"
        )
    what = f"could mean {' or '.join(kinds)}" if kinds else "do not tell what is to be measured"
    raise ConfigError(f"the columns of {table.name} ({_list(names)}) {what}; add --metrics, one of {known}")


def _by_columns(names: Sequence[str]) -> list[str]:
    found = []
    if {"label", "labels"} & set(names):
        found.append(CLASSIFICATION)
    if "caption" in names:
        found.append(SPEECH if "segments" in names else CAPTION)
    if any(_is_answer(name) for name in names):
        found.append(VQA)
    return found


def _is_answer(name: str) -> bool:
    return name == "answer" or name.endswith("_answer")


def choose_columns(
    table: Table, kind: str, column: str | None, truth: str | None, id_column: str | None
) -> Columns:
    """Where the answers of a table are. Raises ConfigError with every problem."""
    problems: list[str] = []
    answer = _answer_column(table, kind, column, truth, problems)
    if id_column is not None:
        problems += missing(table, "--id-column", id_column)
    if problems:
        raise ConfigError(problems)
    assert answer is not None
    prefix = next((answer.removesuffix(base) for base in ("answer", "label") if answer.endswith(base)), "")
    return Columns(
        answer=answer,
        id=id_column or id_of(table),
        score=_there(table, f"{prefix}score") if kind == CLASSIFICATION else None,
        top_k=_there(table, f"{prefix}top_k") if kind == CLASSIFICATION else None,
        rejected=_there(table, "rejected"),
        status=_there(table, "status"),
        path=_there(table, "path"),
    )


def _answer_column(
    table: Table, kind: str, column: str | None, truth: str | None, problems: list[str]
) -> str | None:
    if column is not None:
        problems += missing(table, "--column", column)
        return column
    found = [name for name in KINDS[kind].answers if name in table.columns and name != truth]
    if not found or found == ["answer"]:
        found += [n for n in table.columns if n.endswith("_answer") and n != truth]
    several = [name for name in found if _is_answer(name)]
    if len(several) > 1 and several == found:
        problems.append(f"{table.name} has several answers: {_list(several)}; choose one with --column")
    if not found and truth in KINDS[kind].answers:
        problems.append(
            f"--truth {truth}: those are the answers; what is right has to be another column, or a file"
        )
    elif not found:
        others = [name for name in table.columns if name != truth]
        problems.append(
            f"{table.name} has no column {' or '.join(KINDS[kind].answers[:3])} to measure {kind} by; "
            f"choose with --column, one of {_list(others)}"
        )
    return found[0] if found else None


def truth_column(table: Table, kind: str, ids: str) -> str:
    """The column of a truth file that holds what is right. Raises ConfigError when its name does not tell."""
    usual = [c for c in KINDS[kind].truths if c in table.columns and c != ids]
    others = [c for c in table.columns if c != ids]
    found = usual or (others if len(others) == 1 else [])
    if not found:
        raise ConfigError(f"which column of {table.name} is right? Add --truth-column, one of {_list(others)}")
    return found[0]


def id_of(table: Table) -> str | None:
    """The usual column with the names of rows. In annotations, `id` numbers the annotations themselves."""
    names = [name for name in IDS if name != "id"] if table.annotations else list(IDS)
    return next((name for name in names if name in table.columns), None)


def missing(table: Table, option: str, name: str) -> list[str]:
    """What to say when `name` is no column of the table."""
    if name in table.columns:
        return []
    near = difflib.get_close_matches(name, table.columns, 1)
    meant = f"did you mean {near[0]}? " if near else ""
    return [f"{option} {name}: {table.name} has no such column; {meant}it has {_list(table.columns)}"]


def _there(table: Table, name: str) -> str | None:
    return name if name in table.columns else None


def _list(names: Iterable[str], limit: int = 20) -> str:
    found = list(names)
    return ", ".join(found[:limit]) + (f" and {len(found) - limit} more" if len(found) > limit else "")
