"""Strings -> Source, plan, Task, Job, Output: the only place that knows every room."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from mmcli.cli import parse
from mmcli.cli.messages import Messages
from mmcli.cli.options import (
    EmbeddingArguments,
    EndpointArguments,
    GenerationArguments,
    InputArguments,
    MessageArguments,
    ModelArguments,
    OutputArguments,
    RunArguments,
    SidecarArguments,
)
from mmcli.cli.parse import Problems
from mmcli.cli.signals import Signals
from mmcli.cli.trio import check_torch_trio
from mmcli.core.errors import ConfigError
from mmcli.core.job import Job
from mmcli.core.protocols import ModelPlan, Snapshot, Source, Task
from mmcli.core.report import Report

if TYPE_CHECKING:
    from mmcli.cli.prompting import Asked
    from mmcli.media.pool import Nursery
    from mmcli.models.options import Batch, Endpoint, Generation, ModelOptions
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


@dataclass(frozen=True, slots=True)
class Columns:
    """What a command wants of a manifest's rows beside their media.

    names  columns that prompts name
    said   how the command line names each of them
    alone  whether rows need no media: then `text` is the column that stands for them, unless one is named as media
    """

    names: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    alone: bool = False
    text: str | None = None


@dataclass(slots=True)
class Planned:
    """What a task needs to run: the model's plan, the task, and its options that change output bytes."""

    plan: ModelPlan
    task: Task
    options: dict[str, Any]


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
    """The parsed options of a run."""

    seed: int
    part_rows: int
    part_seconds: float
    batch_size: int | None
    num_workers: int | None
    timeout_s: float
    time_limit_s: float | None
    max_errors: tuple[int | None, float | None]


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


class EmbedPlanner:
    """Of `mmcli embed`."""

    def __init__(self, arguments: Arguments, embedding: EmbeddingArguments) -> None:
        self._arguments, self._embedding = arguments, embedding

    def columns(self, problems: Problems) -> Columns:
        """None: vectors have no prompt."""
        return Columns()

    def plan(self, problems: Problems) -> Planned | None:
        """Resolve the model and say what its vectors are."""
        from mmcli.models.resolve import resolve
        from mmcli.tasks.embed import Embed

        wanted = self._embedding
        dtype = problems.collect(parse.choice, "--embedding-dtype", wanted.embedding_dtype, ("float32", "float16"))
        options = _model_options(self._arguments, problems, "openai/clip-vit-base-patch32")
        if options is None:
            return None
        options = replace(options, pooling=wanted.pooling, normalize=wanted.normalize)
        plan = problems.collect(resolve, options)
        if plan is None or dtype is None:
            return None
        task = Embed(plan.embedding_size, dtype)
        return Planned(plan, task, {"embedding_dtype": dtype, "exact_decode": options.exact_decode})

    def source(self, source: Source) -> Source:
        """As it is."""
        return source


class WritePlanner:
    """Of `mmcli caption` and `mmcli ask`: `read` gives what is asked."""

    def __init__(
        self,
        arguments: Arguments,
        generation: GenerationArguments,
        endpoint: EndpointArguments,
        read: Callable[[int, Problems], Asked | None],
    ) -> None:
        self._arguments, self._generation, self._read = arguments, generation, read
        self._endpoint = endpoint
        self._asked: Asked | None = None
        self._told: dict[str, Any] = {}

    def columns(self, problems: Problems) -> Columns:
        """Read what is asked: the columns that it names."""
        seed = problems.collect(parse.number, "--seed", self._arguments.run.seed, 0) or 0
        self._asked = self._read(seed, problems)
        return self._asked.columns if self._asked is not None else Columns()

    def plan(self, problems: Problems) -> Planned | None:
        """Resolve the model and say how it writes."""
        from mmcli.models.options import Generation
        from mmcli.models.plan import GenerationPlan
        from mmcli.models.resolve import resolve_writer
        from mmcli.tasks.write import Write

        options = _model_options(self._arguments, problems, "Salesforce/blip-image-captioning-base")
        if options is None:
            return None
        server = _endpoint(self._endpoint, options.model, self._arguments.output.format, problems)
        options = replace(options, endpoint=server, extra_body=self._endpoint.extra_body)
        asked = self._asked
        plan = problems.collect(resolve_writer, options, Generation() if asked is None else asked.generation)
        if plan is None or asked is None:
            return None
        task = asked.generation.task
        column = "caption" if task == "caption" else "answer"
        if plan.output != "speech":
            _reject_speech(asked.generation, self._arguments, problems)
        join = plan.open_joiner() if isinstance(plan, GenerationPlan) else None
        write: Task
        if plan.output == "requests":
            from mmcli.tasks.requests import Requests

            write = Requests(task, asked.names)
        else:
            write = Write(task, column, plan.output, asked.names, asked.schema, join)
        self._told |= {"exact_decode": options.exact_decode, "questions": ",".join(asked.names)}
        return Planned(plan, write, self._told)

    def source(self, source: Source) -> Source:
        """With the examples that each record is shown."""
        if self._asked is None or not self._asked.generation.chosen:
            return source
        from mmcli.cli.examples import choose_examples

        chosen = choose_examples(source, self._asked.generation, self._generation)
        self._told["examples"] = chosen.choice.identity
        return chosen


def _reject_speech(generation: Generation, arguments: Arguments, problems: Problems) -> None:
    """Add what only a model that hears can do."""
    sidecars = arguments.sidecars
    given = {
        "--language": generation.language,
        "--translate": generation.translate,
        "--srt": sidecars is not None and sidecars.srt,
        "--vtt": sidecars is not None and sidecars.vtt,
    }
    if flags := " and ".join(flag for flag, value in given.items() if value):
        problems.add(f"{flags}: -m {arguments.model.model} does not hear speech; a Whisper does")


def _endpoint(
    endpoint: EndpointArguments, model: str, format_name: str | None, problems: Problems
) -> Endpoint | Batch | None:
    """What runs the model; None when nothing is named."""
    from mmcli.models.endpoint import PREFIX
    from mmcli.models.options import Batch, Endpoint

    concurrency = problems.collect(parse.number, "--concurrency", endpoint.concurrency, 1)
    retry_s = problems.collect(parse.duration, "--retry-time", endpoint.retry_time)
    timeout_s = problems.collect(parse.duration, "--request-timeout", endpoint.request_timeout)
    given: dict[str, object] = {
        "--endpoint": endpoint.endpoint,
        "--batch-results": endpoint.batch_results,
        "--format openai-batch": format_name == "openai-batch",
        "--extra-body": endpoint.extra_body,
    }
    flags = [flag for flag, value in given.items() if value]
    if flags and not model.startswith(PREFIX):
        problems.add(f"{flags[0]}: -m {model} runs here; a model of a server is -m {PREFIX}{model}")
    if len(flags := [flag for flag in flags if flag != "--extra-body"]) > 1:
        problems.add(f"{flags[0]} and {flags[1]} exclude one another; give one of them")
    if endpoint.endpoint is None:
        return Batch(tuple(map(str, endpoint.batch_results or ()))) if flags else None
    return Endpoint(endpoint.endpoint, concurrency or 1, retry_s or 0.0, timeout_s or 1.0)


def _model_options(arguments: Arguments, problems: Problems, example: str) -> ModelOptions | None:
    """What every task says about its model; None when none is given, e.g. `example`."""
    from mmcli.models.device import check_device, choose_dtype
    from mmcli.models.options import ModelOptions

    model = arguments.model
    frames = problems.collect(parse.number, "--frames", model.frames, 1)
    problems.collect(check_device, model.device)
    problems.collect(choose_dtype, model.dtype)
    if not model.model:
        problems.add(f"no model given; add -m MODEL, a local directory or a hub id ({example})")
        return None
    if not model.model.startswith(("fake:", "openai:")):
        check_torch_trio()
    return ModelOptions(
        model=model.model,
        revision=model.revision,
        device=model.device,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        compile=model.compile,
        offline=model.offline,
        trust_remote_code=model.trust_remote_code,
        allow_pickle=model.allow_pickle,
        frames=frames or 1,
        exact_decode=arguments.inputs.exact_decode,
    )


def prepare(
    arguments: Arguments, planner: Planner, messages: Messages, report: Report, signals: Signals
) -> Prepared:
    """Check everything, all problems together. Raises ConfigError, or OutputError for a place that is no good."""
    problems = Problems()
    limits = _limits(arguments.run, problems)
    _check_output(arguments.output, problems)
    _check_sidecars(arguments, problems)
    columns = planner.columns(problems)
    source = _source(arguments, columns, messages, problems)
    _check_not_an_input(arguments, problems)
    planned = planner.plan(problems)
    if source is not None and planned is not None:
        source = problems.collect(planner.source, source)
    if source is not None and planned is not None:
        _check_modalities(source, planned.plan, str(arguments.model.model), problems)
        _check_keep(source, planned.task, problems)
    problems.check()
    assert source is not None
    assert planned is not None
    _check_place(arguments.output)
    return Prepared(arguments, source, planned, messages, report, limits, signals, columns.names)


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


def _source(arguments: Arguments, columns: Columns, messages: Messages, problems: Problems) -> Source | None:
    from mmcli.sources.open import open_source

    if "-" in (arguments.inputs.inputs or ()):
        if sys.stdin is None:
            problems.add("input -: stdin is closed")
            return None
        if sys.stdin.isatty():
            messages.note("reading paths from the terminal, one a line; Ctrl-D ends the list")
    stdin = sys.stdin.buffer if sys.stdin is not None else None
    options = _source_options(arguments, columns.names, columns.said)
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
    how = "rename it in the manifest"
    if task.name == "ask":
        how = (
            "name the question (-q model='...', --question-column model=COLUMN): its columns are model_answer, ..."
        )
    for name in source.keep.names:
        if name in own:
            problems.add(f"--keep {name}: the output has a column {name} of its own; {how}")


def _check_modalities(source: Source, plan: ModelPlan, model: str, problems: Problems) -> None:
    takes = ", ".join(sorted(plan.modalities))
    for slot in source.slots:
        if slot and slot not in plan.modalities:
            problems.add(f"--{slot}-column: the model {model} does not take {slot}; it takes {takes}")
