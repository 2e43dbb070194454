"""What an evaluation found: as JSON, and as a table to read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mmcli.core.errors import one_line
from mmcli.evaluation.bootstrap import Score
from mmcli.evaluation.pairs import Counts

# A person reads so many classes and mistakes; --json has all.
CLASSES, MISTAKES, MATRIX = 60, 10, 12
_NOT_ANSWERED = {"errors": "failed", "rejected": "rejected", "no_answer": "without an answer"}


@dataclass(slots=True)
class Report:
    """One evaluation.

    column    of the answers
    settings  what the numbers depend on: seed, replicates, tokenizer, ...
    details   `classes`, `confusion`, `calibration` or `ranks`: more than single numbers
    """

    predictions: str
    truth: str
    kind: str
    column: str
    job: dict[str, Any]
    counts: Counts
    settings: dict[str, Any]
    scores: list[Score] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "predictions": self.predictions,
            "truth": self.truth,
            "metrics": self.kind,
            "column": self.column,
            "task": self.job.get("task"),
            "model": self.job.get("model"),
            "rows": asdict(self.counts),
            "settings": self.settings,
            "scores": {s.name: s.to_dict() for s in self.scores},
            **self.details,
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """The report for a person; what comes from files is escaped."""
        lines = [*self._head(), "", *self._scores()]
        if classes := self.details.get("classes"):
            lines += ["", *_classes(classes)]
        if confusion := _confusion(self.details.get("confusion")):
            lines += ["", *confusion]
        return lines + [""] * bool(self.notes) + [f"note: {one_line(note, 2000)}" for note in self.notes]

    def _head(self) -> Iterable[str]:
        model = (self.job.get("model") or {}).get("id") if isinstance(self.job.get("model"), dict) else None
        yield f"{'predictions':12} {one_line(self.predictions)}, {one_line(self.column)}" + (
            f", of {one_line(str(model))}" if model else ""
        )
        yield f"{'truth':12} {one_line(self.truth)}"
        yield f"{'rows':12} {self._rows()}"

    def _rows(self) -> str:
        counts = self.counts
        what = "pairs" if self.kind == "retrieval" else "rows"
        parts = [f"{counts.evaluated:,} {what} evaluated, of {counts.rows:,}"]
        lost = [f"{n:,} {text}" for name, text in _NOT_ANSWERED.items() if (n := getattr(counts, name))]
        if lost:
            parts.append(f"{', '.join(lost)}: these count against the model")
        if counts.merged:
            parts.append(f"{counts.merged:,} are more references of others")
        if counts.without_truth:
            parts.append(f"{counts.without_truth:,} without a truth left out")
        if counts.unused_truth:
            parts.append(f"ids of the truth without a row: {counts.unused_truth:,}")
        if counts.repeated_ids and not counts.merged:
            parts.append(f"ids that several rows have: {counts.repeated_ids:,}, and every row counts")
        return "; ".join(parts)

    def _scores(self) -> list[str]:
        answered = self.counts.answered < self.counts.evaluated
        rows = [["", "value", "95 % interval", *(["answered only"] if answered else [])]]
        for score in self.scores:
            shown = _rank if score.name.endswith("_rank") else _shown
            interval = "-" if score.low is None else f"{shown(score.low)} to {shown(score.high)}"
            rows.append([score.name, shown(score.value), interval, *([shown(score.answered)] if answered else [])])
        return table(rows)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _rank(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _classes(classes: Sequence[dict[str, Any]]) -> list[str]:
    shown, heading = classes, "class"
    if len(classes) > CLASSES:
        worst = sorted(classes, key=lambda c: (c["f1"] is None, c["f1"]))[:CLASSES]
        shown, heading = worst, f"worst {CLASSES} of {len(classes):,} classes"
    rows = [[heading, "rows", "answered", "precision", "recall", "F1"]]
    for one in shown:
        numbers = [_shown(one[name]) for name in ("precision", "recall", "f1")]
        rows.append([one_line(one["class"], 60), f"{one['support']:,}", f"{one['answered']:,}", *numbers])
    return table(rows)


def _confusion(confusion: dict[str, Any] | None) -> list[str]:
    """The matrix where it is small, else the commonest mistakes."""
    if confusion is None:
        return []
    classes, matrix = confusion["classes"], confusion["matrix"]
    if matrix is not None and len(classes) <= MATRIX:
        answers = [one_line(name, 12) for name in classes]
        none = any(row[-1] for row in matrix)
        rows = [["true \\ answered", *answers, *(["no answer"] if none else [])]]
        rows += [
            [one_line(name, 30), *map(str, row if none else row[:-1])]
            for name, row in zip(classes, matrix, strict=True)
        ]
        return table(rows)
    mistakes = confusion["mistakes"][:MISTAKES]
    rows = [["commonest mistakes: true", "answered", "rows"]]
    for one in mistakes:
        answer = "(no answer)" if one["answered"] is None else one_line(one["answered"], 40)
        rows.append([one_line(one["class"], 40), answer, f"{one['rows']:,}"])
    return table(rows, left=2) if mistakes else []


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Columns under one another: the first `left` to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
