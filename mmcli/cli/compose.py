"""Strings -> Source, plan, Task, Job, Output: the only place that knows every room."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from mmcli.cli import parse
from mmcli.cli.into import check_into
from mmcli.cli.messages import Messages
from mmcli.cli.options import (
    InputArguments,
    IntoArguments,
    MessageArguments,
    ModelArguments,
    OutputArguments,
    RunArguments,
    SidecarArguments,
)
from mmcli.cli.parse import Problems
from mmcli.cli.signals import Signals
from mmcli.core.errors import ConfigError
from mmcli.core.job import Job
from mmcli.core.protocols import Decoder, ModelPlan, Snapshot, Source, Task
from mmcli.core.report import Report

if TYPE_CHECKING:
    from mmcli.media.pool import Nursery
    from mmcli.sources.open import SourceOptions


@dataclass(frozen=True, slots=True)
class Arguments:
    """The options that every task shares."""

    inputs: InputArguments
    model: ModelArguments
    output: OutputArguments
    run: RunArguments
    messages: MessageArguments
    sidecars: SidecarArguments | None = None
    into: IntoArguments | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """What a command wants of a manifest's rows beside their media.

    names  columns that prompts name
    said   how the command line names each of them
    bare   whether rows may be without media
    alone  whether rows need no media: then `text` is the column that stands for them, unless one is named as media
    """

    names: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    bare: bool = False
    alone: bool = False
    text: str | None = None


@dataclass(slots=True)
class Planned:
    """What a task needs to run: the model's plan, the task, and its options that change output bytes.

    ready  makes the plan that runs, before the first row: the head of solved examples is made here
    keeps  `ready` also writes files of its own, so that it is called where no row is missing, too
    """

    plan: ModelPlan
    task: Task
    options: dict[str, Any]
    ready: Callable[[Prepared], ModelPlan] | None = None
    keeps: bool = False


@dataclass(slots=True)
class Prepared:
    """A checked command: nothing was read from the media and no weight loaded yet."""

    arguments: Arguments
    source: Source
    planned: Planned
    messages: Messages
    report: Report
    limits: RunLimits
    signals: Signals
    variables: tuple[str, ...] = ()
    decoder: Callable[[], Decoder] | None = None
    nursery: Nursery | None = None

    def job(self, snapshot: Snapshot) -> Job:
        """Everything that can change an output byte."""
        inputs = self.arguments.inputs
        options = {
            **self.planned.options,
            "seed": self.limits.seed,
            "columns": {
                "slots": ",".join(self.source.slots),
                "keep": ",".join(f"{f.name}:{f.type}" for f in self.source.keep),
                "id": inputs.id_column,
            },
        }
        listed = {"digest": snapshot.digest, "rows": snapshot.rows}
        return Job(self.planned.task.name, self.planned.plan.describe(), options, listed)


@dataclass(frozen=True, slots=True)
class RunLimits:
    """The parsed options of a run.

    concurrency  batches at once, of `mmcli bench`; None: as the number of rows is
    """

    seed: int
    part_rows: int
    part_seconds: float
    batch_size: int | None
    num_workers: int | None
    timeout_s: float
    time_limit_s: float | None
    max_errors: tuple[int | None, float | None]
    concurrency: int | None = None


@dataclass(frozen=True, slots=True)
class GivenSource:
    """Inputs that need no decoding."""

    source: Source
    decoder: Callable[[], Decoder]


class Planner(Protocol):
    """What a command wants of a run; asked in this order."""

    def columns(self, problems: Problems) -> Columns:
        """The columns of the manifest that are wanted."""
        ...

    def plan(self, problems: Problems) -> Planned | None:
        """The model and the task; None after a problem."""
        ...

    def source(self, source: Source) -> Source:
        """The source as the run reads it. Raises ConfigError."""
        ...

    def given(self, problems: Problems) -> GivenSource | None:
        """The source when inputs are no media, and what stands for their decoder; None: media, as usual."""
        ...


class PlannerDefaults:
    """What planners have that want nothing special."""

    def columns(self, problems: Problems) -> Columns:
        """No columns of manifests."""
        return Columns()

    def source(self, source: Source) -> Source:
        """As it is."""
        return source

    def given(self, problems: Problems) -> GivenSource | None:
        """Media."""
        return None


def prepare(
    arguments: Arguments, planner: Planner, messages: Messages, report: Report, signals: Signals
) -> Prepared:
    """Check everything, all problems together. Raises ConfigError, or OutputError for a place that is no good."""
    problems = Problems()
    limits = _limits(arguments.run, problems)
    _check_output(arguments.output, problems)
    _check_sidecars(arguments, problems)
    check_into(arguments, problems)
    columns = planner.columns(problems)
    before = len(problems.lines)
    given = planner.given(problems)
    source = None if given is None else given.source
    if given is None and len(problems.lines) == before:
        source = _source(arguments, columns, messages, problems)
    _check_not_an_input(arguments, problems)
    planned = planner.plan(problems)
    if source is not None and planned is not None:
        if len(source.slots) > 1 and getattr(planned.plan, "missing", False):
            # Opened again, for a model that bears it: that reads no more than the head of the manifest.
            source = _source(arguments, columns, messages, problems, missing=True) or source
        source = problems.collect(planner.source, source)
    if source is not None and planned is not None:
        _check_modalities(source, planned.plan, str(arguments.model.model), problems)
        _check_keep(source, planned.task, problems)
    problems.check()
    assert source is not None
    assert planned is not None
    _check_place(arguments.output)
    decoder = None if given is None else given.decoder
    return Prepared(arguments, source, planned, messages, report, limits, signals, columns.names, decoder)


def _check_not_an_input(arguments: Arguments, problems: Problems) -> None:
    """With --overwrite, OUT would replace what is to be read."""
    try:
        out = os.stat(arguments.output.output)
    except OSError:
        return
    for name in arguments.inputs.inputs or ():
        with suppress(OSError, ValueError):
            if os.path.samestat(os.stat(name), out):
                problems.add(f"-o {arguments.output.output} is also an input; choose another name")
                return


def _source(
    arguments: Arguments, columns: Columns, messages: Messages, problems: Problems, missing: bool = False
) -> Source | None:
    from mmcli.sources.open import open_source

    if "-" in (arguments.inputs.inputs or ()):
        if sys.stdin is None:
            problems.add("input -: stdin is closed")
            return None
        if sys.stdin.isatty():
            messages.note("reading paths from the terminal, one a line; Ctrl-D ends the list")
    stdin = sys.stdin.buffer if sys.stdin is not None else None
    options = _source_options(arguments, columns.names, columns.said)
    options = replace(options, missing=missing, bare=columns.bare)
    if columns.alone and not options.column_flags_of_media:
        if columns.text is None:
            problems.add(
                "--features-column: rows are known by a text: add --question-column, or a --text-column of any"
            )
            return None
        options = replace(options, text_column=columns.text)
    return problems.collect(open_source, options, stdin)


def _source_options(arguments: Arguments, variables: tuple[str, ...], said: tuple[str, ...]) -> SourceOptions:
    from mmcli.sources.open import SourceOptions

    inputs = arguments.inputs
    return SourceOptions(
        inputs=tuple(inputs.inputs or ()),
        glob=tuple(inputs.glob or ()),
        null_separated=inputs.null,
        image_column=inputs.image_column,
        audio_column=inputs.audio_column,
        video_column=inputs.video_column,
        text_column=inputs.text_column,
        path_column=inputs.path_column,
        id_column=inputs.id_column,
        keep=parse.split_names(inputs.keep),
        variables=variables,
        variables_said=said,
        hidden=inputs.hidden,
        follow_symlinks=inputs.follow_symlinks,
        input_format=inputs.input_format,
        # A list from a pipe may never end: its rows are answered as they come.
        live=arguments.output.output == "-",
        # Else a second run would find those of the first among its inputs.
        leave=("txt",) if arguments.sidecars is not None and arguments.sidecars.txt else (),
    )


def _limits(run: RunArguments, problems: Problems) -> RunLimits:
    problems.collect(parse.choice, "--on-error", run.on_error, ("record", "fail"))
    budget = problems.collect(parse.max_errors, "--max-errors", run.max_errors) or (None, None)
    if run.on_error == "fail" and run.max_errors is not None:
        problems.add("--on-error fail allows no error row, --max-errors some; give one of them")
    time_limit = problems.collect(parse.duration, "--time-limit", run.time_limit) if run.time_limit else None
    return RunLimits(
        seed=problems.collect(parse.number, "--seed", run.seed, 0) or 0,
        part_rows=problems.collect(parse.number, "--part-rows", run.part_rows, 1) or 0,
        part_seconds=problems.collect(parse.duration, "--part-seconds", run.part_seconds) or 0.0,
        batch_size=problems.collect(parse.count_or_auto, "--batch-size", run.batch_size, 1),
        num_workers=problems.collect(parse.count_or_auto, "--num-workers", run.num_workers, 0),
        timeout_s=problems.collect(parse.duration, "--timeout", run.timeout) or 0.0,
        time_limit_s=time_limit,
        max_errors=(0, None) if run.on_error == "fail" else budget,
    )


def _check_output(output: OutputArguments, problems: Problems) -> None:
    modes = [n for n in ("overwrite", "update", "retry_errors") if getattr(output, n)]
    if len(modes) > 1:
        flags = " and ".join("--" + m.replace("_", "-") for m in modes)
        problems.add(f"{flags} exclude one another; give one of them")
    if output.output == "-":
        if modes:
            problems.add(f"--{modes[0].replace('_', '-')} needs an output file; add e.g. -o out.parquet")
        if output.format not in (None, "jsonl"):
            problems.add(f"--format {output.format} cannot go to stdout, only jsonl; add e.g. -o out.parquet")
        return
    from mmcli.sinks.formats import RESULTS, format_for

    format_name = problems.collect(format_for, output.output, output.format)
    if format_name in RESULTS and (output.update or output.retry_errors):
        flag = "--update" if output.update else "--retry-errors"
        problems.add(
            f"{flag}: --format {format_name} holds no rows to go on from; keep a Parquet output, "
            f"and make the {format_name} file anew with --overwrite"
        )
    if output.retry_errors and format_name is not None:
        problems.collect(_check_exists, output.output, format_name)


def _check_sidecars(arguments: Arguments, problems: Problems) -> None:
    """Can they be written? As far as that can be told before anything is computed."""
    wanted = arguments.sidecars
    if wanted is None or not wanted.kinds:
        if wanted is not None and wanted.replace_sidecars:
            problems.add("--replace-sidecars: there are none; add --txt, --srt or --vtt")
        return
    from mmcli.sinks.formats import RESULTS

    flags = " and ".join(f"--{kind}" for kind in wanted.kinds)
    if arguments.output.output == "-":
        problems.add(f"{flags}: written when all rows are there, from an output; add e.g. -o out.parquet")
    if arguments.output.format in RESULTS:
        problems.add(f"{flags}: made from the rows of an output, which --format {arguments.output.format} has not")
    for name in arguments.inputs.inputs or ():
        if os.path.isdir(name) and not os.access(name, os.W_OK):
            problems.add(f"{flags}: the folder {name} cannot be written")


def _check_exists(out: str, format_name: str) -> None:
    from mmcli.sinks.place import Place

    place = Place.of(out, format_name)
    if not (place.metadata if place.folder else place.out).exists() and not place.staging.exists():
        raise ConfigError(f"--retry-errors: there is no {out} yet; the first time, run without it")


def _check_place(output: OutputArguments) -> None:
    """Before a model is loaded: can the output be written? Raises ConfigError or OutputError."""
    if output.output == "-":
        return
    from mmcli.sinks.formats import format_for
    from mmcli.sinks.place import check_writable

    check_writable(output.output, format_for(output.output, output.format))


def _check_keep(source: Source, task: Task, problems: Problems) -> None:
    """A column that passes through must not have the name of one of the task's."""
    own = {field.name for field in task.fields(source.slots)}
    for name in source.keep.names:
        if name in own:
            problems.add(
                f"--keep {name}: the output has a column {name} of its own; "
                f"call it otherwise: --keep true_{name}={name}"
            )


def _check_modalities(source: Source, plan: ModelPlan, model: str, problems: Problems) -> None:
    takes = ", ".join(sorted(plan.modalities))
    for slot in source.slots:
        if slot and slot not in plan.modalities:
            problems.add(f"--{slot}-column: the model {model} does not take {slot}; it takes {takes}")
