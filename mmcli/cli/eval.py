"""`mmcli eval`: how right predictions are."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmcli.cli import parse
from mmcli.cli.options import MESSAGES, OUTPUT, ConfigOption, _option, with_options
from mmcli.core.errors import ConfigError, ExitCode, OutputError, StateMismatch
from mmcli.core.state import DamagedState

if TYPE_CHECKING:
    from mmcli.evaluation.kinds import Columns
    from mmcli.evaluation.measure import Settings
    from mmcli.evaluation.pairs import Truth
    from mmcli.evaluation.report import Report
    from mmcli.evaluation.tables import Table
    from mmcli.evaluation.vectors import Side, Sides
    from mmcli.sinks.outputs import OutputInfo

METRICS = ("classification", "caption", "vqa", "speech", "retrieval")
TOKENIZE, NORMALIZE = ("coco", "whitespace"), ("basic", "none")
TRUTH, HOW = "Truth", "Metrics"


@dataclass(frozen=True)
class TruthArguments:
    """What is right."""

    predictions: Annotated[
        str | None,
        typer.Argument(
            metavar="PREDICTIONS",
            help="An output of mmcli, or another Parquet, JSONL, CSV, TSV or JSON file with such columns.",
            show_default=False,
        ),
    ] = None
    truth: Annotated[
        str | None,
        _option(
            TRUTH,
            "--truth",
            "COLUMN or FILE",
            "What is right: a column of PREDICTIONS (--keep passes it through), or a file that is joined by id.",
        ),
    ] = None
    truth_folder: Annotated[
        bool,
        _option(TRUTH, "--truth-folder", None, "The name of the folder that holds a file is its class: cat/1.jpg."),
    ] = False
    truth_column: Annotated[
        str | None, _option(TRUTH, "--truth-column", "COLUMN", "Of the truth file, what is right [by its name].")
    ] = None
    id_column: Annotated[
        str | None,
        _option(
            TRUTH, "--id-column", "COLUMN", "Of PREDICTIONS, what joins them with the truth [id; pairs: path, id]."
        ),
    ] = None
    truth_id_column: Annotated[
        str | None, _option(TRUTH, "--truth-id-column", "COLUMN", "Of the truth file, its ids [as --id-column].")
    ] = None


@dataclass(frozen=True)
class MetricArguments:
    """How it is measured."""

    metrics: Annotated[
        str | None,
        _option(
            HOW,
            "--metrics",
            "KIND",
            "classification, caption, vqa, speech or retrieval [by the task or the columns].",
        ),
    ] = None
    column: Annotated[
        list[str] | None,
        _option(HOW, "--column", "COLUMN", "The answers [by the kind]; for retrieval the vectors: A,B."),
    ] = None
    tokenize: Annotated[
        str, _option(HOW, "--tokenize", "HOW", "Captions to words: coco (as its evaluation does) or whitespace.")
    ] = "coco"
    normalize: Annotated[
        str,
        _option(
            HOW, "--normalize", "HOW", "Speech, before it is compared: basic (no case, no punctuation) or none."
        ),
    ] = "basic"
    bootstrap: Annotated[
        str, _option(HOW, "--bootstrap", "N", "Samples for the 95 % intervals; 0: no intervals.")
    ] = "1000"
    seed: Annotated[str, _option(HOW, "--seed", "N", "Seed of these samples.")] = "0"


@dataclass(frozen=True)
class ReportArguments:
    """What is written."""

    json: Annotated[bool, _option(OUTPUT, "--json", None, "One JSON object on stdout instead of a table.")] = False
    output: Annotated[
        Path | None, _option(OUTPUT, "-o --output", "FILE.json", "Write that JSON object to a file, too.")
    ] = None
    plot: Annotated[
        Path | None,
        _option(OUTPUT, "--plot", "FILE.png", "Draw it: reliability and confusions; recall at k; intervals."),
    ] = None
    save_center: Annotated[
        Path | None,
        _option(
            OUTPUT,
            "--save-center",
            "FILE.json",
            "Of retrieval: keep each modality's mean vector, for mmcli embed --center.",
        ),
    ] = None
    debug: Annotated[bool, _option(MESSAGES, "--debug", None, "Show tracebacks.")] = False
    config: ConfigOption = None


@with_options
def evaluate(truth: TruthArguments, how: MetricArguments, output: ReportArguments) -> int:
    """Measure how right predictions are, with 95 % intervals: classes, captions, answers, speech, retrieval.

    mmcli eval classes.parquet --truth label --plot classes.png

    mmcli eval captions.parquet --truth captions_val2014.json

    Rows that failed, and rows without an answer, count against the model.
    """
    plan = _Planner(truth, how, output).plan()
    report = plan()
    if output.save_center is not None:
        assert isinstance(plan, _Retrieval)
        plan.save_center(output.save_center)
    if output.output is not None:
        _write_json(report, output.output)
    if output.plot is not None:
        from mmcli.evaluation.plot import write_plot

        write_plot(report, output.plot)
    # A locale without UTF-8 must not end in an error.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    text = json.dumps(report.to_dict()) if output.json else "\n".join(report.lines())
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return int(ExitCode.OK)


class _Planner:
    """Options to what is measured. All problems are collected before a row is read."""

    def __init__(self, truth: TruthArguments, how: MetricArguments, output: ReportArguments) -> None:
        self._truth, self._how, self._output = truth, how, output
        self._problems = parse.Problems()

    def plan(self) -> _Pairing | _Retrieval:
        """Raises ConfigError with every problem."""
        if self._truth.predictions is None:
            raise ConfigError("no PREDICTIONS given; type mmcli eval, the file that a run has written, and --truth")
        collect, how = self._problems.collect, self._how
        settings = self._settings()
        metrics = None if how.metrics is None else collect(parse.choice, "--metrics", how.metrics, METRICS)
        self._check_outputs()
        table = collect(_open, self._truth.predictions)
        plan = None if table is None else self._measured(table, metrics, settings)
        self._problems.check()
        assert plan is not None
        return plan

    def _settings(self) -> Settings:
        from mmcli.evaluation.bootstrap import Resampling
        from mmcli.evaluation.measure import Settings

        collect, how = self._problems.collect, self._how
        replicates = collect(parse.number, "--bootstrap", how.bootstrap, 0)
        seed = collect(parse.number, "--seed", how.seed, 0)
        collect(parse.choice, "--tokenize", how.tokenize, TOKENIZE)
        collect(parse.choice, "--normalize", how.normalize, NORMALIZE)
        return Settings(Resampling(replicates or 0, seed or 0), how.tokenize, how.normalize)

    def _check_outputs(self) -> None:
        output = self._output.output
        if output is not None:
            self._check_json("-o", output)
            if self._truth.predictions is not None and _same_file(output, Path(self._truth.predictions)):
                self._problems.add(f"-o {output} is PREDICTIONS itself; choose another name")
        if self._output.save_center is not None:
            self._check_json("--save-center", self._output.save_center)
        if self._output.plot is not None:
            from mmcli.evaluation.plot import check_plot

            self._problems.collect(check_plot, self._output.plot)

    def _check_json(self, option: str, path: Path) -> None:
        if path.suffix != ".json":
            what = "the report is" if option == "-o" else "the means are"
            self._problems.add(f"{option} {path}: {what} JSON; give e.g. {option} {path.with_suffix('.json')}")
        if path.is_dir() or not path.parent.is_dir():
            what = "is a folder" if path.is_dir() else f"is in a folder that does not exist: {path.parent}"
            self._problems.add(f"{option} {path} {what}")

    def _measured(self, table: Table, metrics: str | None, settings: Settings) -> _Pairing | _Retrieval | None:
        from mmcli.evaluation.kinds import RETRIEVAL, choose_kind, missing

        names = parse.split_names(self._how.column)
        own_truth = self._truth.truth if self._truth.truth in table.columns else None
        kind = None
        if self._truth.truth is not None and self._truth.truth_folder:
            self._problems.add("--truth and --truth-folder: give one of them")
        if own_truth is not None and own_truth in names:
            self._problems.add(
                f"--column and --truth are both {own_truth}: that would compare the truth with itself"
            )
            return None
        if unknown := [p for name in names for p in missing(table, "--column", name)]:
            self._problems.lines += unknown
        elif self._how.metrics is None or metrics is not None:
            kind = self._problems.collect(choose_kind, table, metrics, names[0] if names else None, own_truth)
        if kind is None:
            self._other_truth(table, needed=False)
            return None
        if kind == RETRIEVAL:
            return self._retrieval(table, names, settings)
        if self._output.save_center is not None:
            self._problems.add(f"--save-center is of vectors, and this is {kind}; give an output of mmcli embed")
        return self._pairing(table, kind, names, own_truth, settings)

    def _retrieval(self, table: Table, names: tuple[str, ...], settings: Settings) -> _Retrieval | None:
        from mmcli.cli.center import modalities_of
        from mmcli.evaluation.vectors import choose_sides

        other = self._other_truth(table, needed=False)
        if self._truth.truth is not None and other is None:
            if self._truth.truth in table.columns:
                self._problems.add(
                    f"--truth {self._truth.truth}: retrieval takes no column of truth; rows are pairs, or give the "
                    "file with the other vectors"
                )
            return None
        ids = self._truth.id_column, self._truth.truth_id_column
        sides = self._problems.collect(choose_sides, table, other, names, self._truth.truth_column, ids)
        if sides is None:
            return None
        if self._output.save_center is not None and self._problems.collect(modalities_of, *sides) is None:
            return None
        return _Retrieval(*sides, settings)

    def _pairing(
        self, table: Table, kind: str, names: tuple[str, ...], own_truth: str | None, settings: Settings
    ) -> _Pairing | None:
        from mmcli.evaluation.kinds import choose_columns

        if len(names) > 1:
            self._problems.add(f"--column {','.join(names)}: {kind} is measured of one column at a time")
        column = names[0] if names else None
        columns = self._problems.collect(choose_columns, table, kind, column, own_truth, self._truth.id_column)
        other = None if own_truth is not None else self._other_truth(table, needed=True)
        joined = self._joined(table, other, kind) if other is not None else None
        if columns is None or self._problems.lines:
            return None
        return _Pairing(table, columns, kind, self._truth, other, joined, settings)

    def _joined(self, table: Table, other: Table, kind: str) -> tuple[str, str] | None:
        """The id and the truth column of a truth file."""
        from mmcli.evaluation.kinds import id_of, missing, truth_column

        named, column = self._truth.truth_id_column, self._truth.truth_column
        wrong = missing(other, "--truth-id-column", named) if named is not None else []
        wrong += missing(other, "--truth-column", column) if column is not None else []
        if wrong:
            self._problems.lines += wrong
            return None
        own = self._truth.id_column
        ids = named or (own if own in other.columns else None) or id_of(other)
        if ids is None:
            self._problems.add(
                f"which column of {other.name} has the ids? Add --truth-id-column, one of "
                f"{', '.join(other.columns)}"
            )
            return None
        if own is None and id_of(table) is None:
            self._problems.add(
                f"which column of {table.name} has the ids? Add --id-column, one of {', '.join(table.columns)}"
            )
        column = column or self._problems.collect(truth_column, other, kind, ids)
        return None if column is None else (ids, column)

    def _other_truth(self, table: Table, *, needed: bool) -> Table | None:
        """The truth file, if it is one."""
        truth = self._truth
        if truth.truth is None:
            if needed and not truth.truth_folder:
                self._problems.add(
                    f"what is right? Add --truth with a column of {table.name} ({', '.join(table.columns)}) or a "
                    "file, or --truth-folder"
                )
            for option, value in (
                ("--truth-column", truth.truth_column),
                ("--truth-id-column", truth.truth_id_column),
            ):
                if value is not None:
                    self._problems.add(f"{option} {value} is of a truth file; add --truth FILE")
            return None
        if truth.truth in table.columns:
            return None
        if not os.path.exists(truth.truth) and not Path(truth.truth).suffix:
            from mmcli.evaluation.kinds import missing

            self._problems.lines += [
                f"{p}; and there is no such file" for p in missing(table, "--truth", truth.truth)
            ]
            return None
        return self._problems.collect(_open_truth, truth.truth)


@dataclass(frozen=True, slots=True)
class _Pairing:
    """Answers against truths. `joined`: the id and the truth column of `other`, the truth file."""

    table: Table
    columns: Columns
    kind: str
    arguments: TruthArguments
    other: Table | None
    joined: tuple[str, str] | None
    settings: Settings

    def __call__(self) -> Report:
        from mmcli.evaluation.measure import measure
        from mmcli.evaluation.pairs import collect
        from mmcli.evaluation.report import Report

        truth = self._truth()
        pairs = collect(self.table, self.columns, truth, self.kind)
        several = self.table.columns[self.columns.answer] == "list"
        scores, details, notes = measure(self.kind, pairs, several, self.settings)
        return Report(
            predictions=self.table.name,
            truth=truth.name,
            kind=self.kind,
            column=self.columns.answer,
            job=self.table.job,
            counts=pairs.counts,
            settings=self.settings.to_dict(self.kind),
            scores=scores,
            details=details,
            notes=[*self.table.notes, *pairs.notes, *notes],
        )

    def _truth(self) -> Truth:
        from mmcli.evaluation.kinds import SPEECH
        from mmcli.evaluation.pairs import ColumnTruth, FileTruth, FolderTruth
        from mmcli.sinks.exports import result_id

        # Silence has an empty transcript; an empty class or caption is a missing one.
        empty = self.kind == SPEECH
        if self.other is not None and self.joined is not None:
            same_id = result_id if self.other.annotations else str
            return FileTruth(self.other, *self.joined, empty, same_id)
        if self.arguments.truth_folder:
            return FolderTruth(self.columns.path or self.columns.id or "id")
        return ColumnTruth(str(self.arguments.truth), empty)


@dataclass(slots=True)
class _Retrieval:
    """Vectors against vectors. `sides`: once they are read."""

    left: Side
    right: Side
    settings: Settings
    sides: Sides | None = field(default=None, init=False)

    def save_center(self, path: Path) -> None:
        """Write the means of what was measured. Raises OutputError, ConfigError for a side without vectors."""
        from mmcli.cli.center import modalities_of, write_center
        from mmcli.evaluation.shared_space import mean

        assert self.sides is not None
        items = dict(zip(modalities_of(self.left, self.right), (self.sides.left, self.sides.right), strict=True))
        if empty := [name for name, side in items.items() if not len(side.keys)]:
            raise ConfigError(f"--save-center: there is no vector of {empty[0]}")
        means = {name: mean(side) for name, side in items.items()}
        counts = {name: len(side.keys) for name, side in items.items()}
        write_center(path, means, counts, self.left.table.job["model"])

    def __call__(self) -> Report:
        from mmcli.evaluation.kinds import RETRIEVAL
        from mmcli.evaluation.measure import measure_retrieval
        from mmcli.evaluation.report import Report
        from mmcli.evaluation.vectors import collect_sides

        left, right = self.left, self.right
        self.sides = sides = collect_sides(left, right)
        scores, details, notes = measure_retrieval(sides, self.settings)
        pairs = f"rows with the same {left.key}" if left.key else "each row is a pair"
        return Report(
            predictions=left.table.name,
            truth=pairs if left.table is right.table else f"{right.table.name}, by {left.key} and {right.key}",
            kind=RETRIEVAL,
            column=f"{left.column} and {right.column}",
            job=left.table.job,
            counts=sides.counts,
            settings=self.settings.to_dict(RETRIEVAL),
            scores=scores,
            details=details,
            notes=[*left.table.notes, *notes],
        )


def _open(path: str) -> Table:
    """An output of mmcli, finished or not, or any other table. Raises ConfigError."""
    from mmcli.evaluation.tables import open_table
    from mmcli.sinks.outputs import read_output

    if not os.path.exists(path) and not os.path.exists(f"{path}.mmcli"):
        raise ConfigError(f"there is no {path}; give what a run was given as -o, or another table")
    if path.lower().removesuffix(".gz").endswith((".json", ".csv", ".tsv")):
        return open_table(path)
    try:
        return _of_run(path, read_output(path))
    except DamagedState:
        raise
    except (StateMismatch, ConfigError):
        if os.path.exists(os.path.join(path, "_SUCCESS.json")):
            raise
    return open_table(path)


def _of_run(path: str, info: OutputInfo) -> Table:
    from mmcli.evaluation.tables import Batch, Table, arrow_columns
    from mmcli.sinks.formats import load_format
    from mmcli.sinks.rows import read_rows

    kinds = arrow_columns(info.schema)
    # In clip-retrieval's layout vectors are not among the rows, but in arrays beside them.
    apart = {name for name, kind in kinds.items() if kind == "vector"} if info.format == "npy" else set()

    def read(columns: Sequence[str]) -> Iterator[Batch]:
        if info.complete and apart & set(columns):
            schema = info.schema.empty_table().select(list(columns)).schema
            batches = load_format(info.format).read(info.path, schema)
        else:
            batches = read_rows(info, columns)
        for batch in batches:
            yield {name: batch.column(name) for name in columns}

    expected = (info.job["inputs"] or {}).get("rows")
    total = f" of {expected:,}" if isinstance(expected, int) else ""
    notes = [] if info.complete else [f"the run is not finished: {info.rows:,}{total} rows are there"]
    return Table(path, kinds, read, job=info.job, notes=notes)


def _open_truth(path: str) -> Table:
    try:
        return _open(path)
    except ConfigError as error:
        raise ConfigError([f"--truth: {problem}" for problem in error.problems]) from error


def _same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _write_json(report: Report, path: Path) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write -o {path}: {error.strerror or error}") from error
