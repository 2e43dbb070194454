"""What `mmcli bench` does: measure decoding, the model and a run, and say which of them limits."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmcli.cli import parse
from mmcli.cli.advice import Setting, advise
from mmcli.cli.bench import BenchMessageArguments, BenchRunArguments, BenchTaskArguments
from mmcli.cli.boundary import guard
from mmcli.cli.compose import Arguments, Planner, Prepared, prepare
from mmcli.cli.environment import prepare_environment
from mmcli.cli.messages import LIMITS, Messages, split, written_rate
from mmcli.cli.options import (
    CaptionArguments,
    EmbeddingArguments,
    EndpointArguments,
    FewShotArguments,
    GenerationArguments,
    InputArguments,
    LabelArguments,
    MessageArguments,
    ModelArguments,
    OutputArguments,
    QuestionArguments,
    RunArguments,
    SpeechArguments,
)
from mmcli.cli.parse import Problems
from mmcli.cli.run import (
    announce,
    auto_batch_size,
    block_rows_of,
    concurrency_of,
    list_inputs,
    open_decoder,
    open_nursery,
    reads_texts,
    sized,
    windows_of,
)
from mmcli.cli.signals import Signals
from mmcli.core.errors import ConfigError, ExitCode
from mmcli.core.protocols import ModelPlan, Runner, Snapshot
from mmcli.core.report import Report

if TYPE_CHECKING:
    from mmcli.engines.batching import BatchSize
    from mmcli.engines.ceilings import Ceilings, Decoding, Rate, RepeatedSource
    from mmcli.engines.local import LocalOptions

    Repeat = type[RepeatedSource]

TASKS = ("embed", "caption", "ask", "classify")
# A run that reaches less than this of its ceiling has another limit, too.
NEAR = 0.85
# What others may use of the cores before it is worth a word.
QUIET_LOAD = 0.25
FROM_REPORT = ("steady_rows_per_s", "seconds", "busy", "cores_busy", "waited", "limited_by")


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long each measurement is: so many seconds, or rows where they are given."""

    seconds: float
    rows: int | None


@dataclass(frozen=True, slots=True)
class LoadedPlan:
    """Stands for a plan whose model is loaded already."""

    runner: Runner

    def load(self) -> Runner:
        return self.runner


@dataclass(slots=True)
class Measured:
    """All of what was measured. `whole`: the run, with its report; `load`: of the machine before."""

    setting: Setting
    decoding: Decoding
    ceilings: Ceilings
    options: LocalOptions
    whole: Rate
    report: Report
    load: float

    @property
    def ratio(self) -> float:
        """Of the run's rate to what it can reach."""
        return self.whole.per_s / max(self.ceilings.highest, 1e-9)

    @property
    def ratio_to_slower(self) -> float:
        """Of the run's rate to that of the slower of decoding and the model, each with all cores to itself."""
        return self.whole.per_s / max(self.ceilings.slower, 1e-9)

    @property
    def steady_per_s(self) -> float | None:
        """Rows a second of the run from its first result on; None when that was too short.

        As the ceilings are: they are measured without a start, in which nothing overlaps yet, and without an end,
        in which the file is finished. These take some tenths of a second, however many rows there are.
        """
        steady = self.report.steady()
        return None if steady is None else steady[0] / steady[1]

    @property
    def steady_ratio(self) -> float | None:
        """Of `steady_per_s` to what a run can reach."""
        steady = self.steady_per_s
        return None if steady is None else steady / max(self.ceilings.highest, 1e-9)

    @property
    def advice(self) -> str | None:
        return advise(self.ceilings.limit, self.setting)


def measure(
    inputs: InputArguments,
    model: ModelArguments,
    task: BenchTaskArguments,
    run: BenchRunArguments,
    messages: BenchMessageArguments,
) -> int:
    """Measure and print. Returns OK or ROW_ERRORS; raises MmcliError."""
    prepare_environment(offline=model.offline, debug=messages.debug, log_file=None)
    signals = Signals()
    bench = _Bench(inputs, model, task, run, Messages(quiet=messages.quiet), signals, messages.json)
    with signals.catching():
        return guard(bench.run, debug=messages.debug).exit_code


@dataclass(slots=True)
class _Bench:
    inputs: InputArguments
    model: ModelArguments
    task: BenchTaskArguments
    options: BenchRunArguments
    messages: Messages
    signals: Signals
    as_json: bool

    def run(self) -> int:
        load = os.getloadavg()[0]
        with self.signals.heard(), tempfile.TemporaryDirectory(prefix="mmcli-bench-") as folder:
            arguments = self._arguments(Path(folder))
            found = self._measure(arguments, Path(folder), load)
        lines = [json.dumps(to_dict(found, self.model.model, self.task.task))] if self.as_json else table(found)
        sys.stdout.write("\n".join([*lines, ""]))
        return ExitCode.ROW_ERRORS if found.report.error_rows else ExitCode.OK

    def _arguments(self, folder: Path) -> Arguments:
        run = RunArguments(
            batch_size=self.options.batch_size,
            num_workers=self.options.num_workers,
            timeout=self.options.timeout,
        )
        return Arguments(
            self.inputs,
            self.model,
            OutputArguments(output=str(folder / "out.parquet")),
            run,
            MessageArguments(quiet=True),
        )

    def _measure(self, arguments: Arguments, folder: Path, load: float) -> Measured:
        from mmcli.engines.ceilings import Ceilings
        from mmcli.engines.local import LocalOptions, device_of

        problems = Problems()
        bounds, planner = self._bounds(problems), self._planner(arguments, problems)
        report = Report(cores=parse.available_cores())
        with open_nursery(arguments) as nursery:
            prepared = problems.collect(prepare, arguments, planner, self.messages, report, self.signals)
            problems.check()
            assert prepared is not None
            prepared.nursery = nursery
            if nursery is not None and prepared.decoder is not None:
                nursery.close()
            snapshot = list_inputs(prepared, folder)
            announce(prepared, snapshot)
            if not snapshot.rows:
                raise ConfigError("there is nothing to measure")
            batch_size = prepared.limits.batch_size or auto_batch_size(prepared)
            windows = windows_of(batch_size, snapshot, prepared)
            size = _heeded(sized(batch_size, prepared), snapshot)
            # By the clock it is a part of a long job.
            limits = replace(prepared.limits, concurrency=concurrency_of(bounds.rows, batch_size))
            prepared = replace(prepared, limits=limits)
            repeat = _repeat(prepared, snapshot)
            decoding = self._decode(prepared, snapshot, bounds, windows.size, repeat)
        runner = self._load(prepared)
        options = LocalOptions(size, windows, limits.concurrency or 1)
        model = self._forward(runner, decoding, options, bounds)
        greedy = device_of(runner) == "cpu" and decoding.report.num_workers >= report.cores
        ceilings = Ceilings(decoding.rate, model, report.cores, greedy)
        ran, whole = self._whole(prepared, runner, bounds, ceilings, windows.size, repeat)
        setting = Setting.of(ran, arguments, prepared.planned.plan)
        return Measured(setting, decoding, ceilings, options, whole, ran, load)

    def _bounds(self, problems: Problems) -> Bounds:
        """Problems of bench's own options are added."""
        seconds = problems.collect(parse.duration, "--time", self.options.time)
        rows = None
        if self.options.rows is not None:
            rows = problems.collect(parse.number, "--rows", self.options.rows, 1)
        if (self.model.model or "").startswith("openai:"):
            problems.add(f"-m {self.model.model}: bench measures models that run here, not a server")
        return Bounds(seconds or 0.0, rows)

    def _planner(self, arguments: Arguments, problems: Problems) -> Planner:
        """Of the task; problems with it are added."""
        from mmcli.cli.classification import ClassifyPlanner
        from mmcli.cli.planners import EmbedPlanner, WritePlanner
        from mmcli.cli.prompting import read_caption, read_questions

        task = self.task
        problems.collect(parse.choice, "--task", task.task, TASKS)
        given = {"--labels": (task.labels, "classify"), "--question": (task.question, "ask")}
        given |= {"--prompt": (task.prompt, "caption")}
        for flag, (value, of) in given.items():
            if value and of != task.task:
                problems.add(f"{flag} is for --task {of}")
        how = GenerationArguments(max_new_tokens=task.max_new_tokens)
        match task.task:
            case "caption":
                told, speech = CaptionArguments(task.prompt), SpeechArguments()
                return WritePlanner(
                    arguments, how, EndpointArguments(), lambda seed, p: read_caption(told, speech, how, seed, p)
                )
            case "ask":
                asked = QuestionArguments(task.question)
                return WritePlanner(
                    arguments, how, EndpointArguments(), lambda seed, p: read_questions(asked, how, seed, p)
                )
            case "classify":
                labels = LabelArguments(labels=task.labels)
                return ClassifyPlanner(arguments, labels, FewShotArguments(), EndpointArguments())
        return EmbedPlanner(arguments, EmbeddingArguments())

    def _decode(
        self, prepared: Prepared, snapshot: Snapshot, bounds: Bounds, window: int, repeat: Repeat
    ) -> Decoding:
        from mmcli.engines.ceilings import KEPT_WINDOWS, measure_decoding
        from mmcli.engines.local import tuned

        self.messages.note(f"decoding alone: {_extent(bounds)}")
        source = repeat(prepared.source, bounds.rows, None if bounds.rows else bounds.seconds)
        decoder = open_decoder(prepared, snapshot)
        with tuned():
            rows = block_rows_of(snapshot, prepared)
            found = measure_decoding(source, decoder, prepared.report, KEPT_WINDOWS * window, rows)
        if not found.kept:
            codes = ", ".join(f"{n:,} {code}" for code, n in found.errors.most_common())
            raise ConfigError(f"none of the inputs can be read ({codes}): there is nothing to measure")
        return found

    def _load(self, prepared: Prepared) -> Runner:
        plan, ready = prepared.planned.plan, prepared.planned.ready
        return (plan if ready is None else ready(prepared)).load()

    def _forward(self, runner: Runner, decoding: Decoding, options: LocalOptions, bounds: Bounds) -> Rate:
        from mmcli.engines.ceilings import measure_model

        self.messages.note(f"the model alone: {_extent(bounds)}, {_at_once(options)}")
        several = getattr(runner, "concurrent", None)
        together: Any = runner if several is None else several(options.concurrency)
        try:
            return measure_model(together, decoding.kept, options, bounds.seconds)
        finally:
            if together is not runner:
                together.close()

    def _whole(
        self, prepared: Prepared, runner: Runner, bounds: Bounds, ceilings: Ceilings, window: int, repeat: Repeat
    ) -> tuple[Report, Rate]:
        """A whole run, and its rate from the first input on that is decoded until the file has its name."""
        from mmcli.cli.outputs import run_to_output
        from mmcli.engines.ceilings import Rate

        # Two windows at least: with one alone, nothing overlaps.
        rows = bounds.rows or window * max(2, math.ceil(ceilings.highest * bounds.seconds / window))
        self.messages.note(f"a whole run: {rows:,} rows, about {rows / ceilings.highest:.0f} s")
        report, used = Report(cores=prepared.report.cores), time.process_time()
        planned = replace(prepared.planned, ready=lambda _: _as_plan(LoadedPlan(runner)), keeps=False)
        source = repeat(prepared.source, rows)
        messages = Messages(quiet=True)
        run_to_output(
            replace(prepared, source=source, planned=planned, messages=messages, report=report, nursery=None)
        )
        seconds = report.wall_s - (report.first_decoded_s or 0.0)
        return report, Rate(report.done, seconds, time.process_time() - used + report.workers_cpu_s)


def _as_plan(loaded: LoadedPlan) -> ModelPlan:
    # The engine loads it, and asks nothing else.
    return cast(ModelPlan, loaded)


def _repeat(prepared: Prepared, snapshot: Snapshot) -> Repeat:
    """How its rows are read over and over: as a run reads them."""
    from mmcli.engines.ceilings import RepeatedSource, RepeatedTexts

    together = hasattr(prepared.source, "blocks") and reads_texts(snapshot, prepared)
    return RepeatedTexts if together else RepeatedSource


def _extent(bounds: Bounds) -> str:
    return f"{bounds.rows:,} rows" if bounds.rows else f"{bounds.seconds:g} s"


def table(found: Measured) -> list[str]:
    """Lines for a person: the ceilings, the run beside them, and what to change."""
    decode, model, setting = found.ceilings.decode, found.ceilings.model, found.setting
    shares = found.ceilings.shared < found.ceilings.slower
    cores = f"{setting.cores} core{'' if setting.cores == 1 else 's'}"
    both = f"together on {cores}" + (": the ceiling here" if shares else "")
    rows = [
        ("decoding alone", decode, _decoding(found)),
        ("the model alone", model, _model(found)),
        ("both at once", None, both),
        ("a whole run", found.whole, f"{found.ratio:.2f} of the ceiling"),
    ]
    lines = [f"{'':16} {'rows/s':>10}"]
    for name, rate, said in rows:
        lines.append(f"{name:16} {written_rate(rate.per_s if rate else found.ceilings.shared):>10}  {said}")
    if shares:
        lines[-1] += f", {found.ratio_to_slower:.2f} of the slower of both alone"
    steady = found.steady_ratio
    if steady is not None:
        per_s = written_rate(found.steady_per_s or 0.0)
        lines.append(f"{'once it runs':16} {per_s:>10}  {steady:.2f} of the ceiling")
    lines += ["", f"limited by {LIMITS[found.ceilings.limit]}" + (f": {found.advice}" if found.advice else "")]
    if found.ratio < NEAR <= (steady or 0.0):
        lines.append("what is missing are the run's start and end, which count less in a longer one (--time)")
    elif found.ratio < NEAR:
        lane = found.report.limited_by()
        waits = f"; what it waited for most: {LIMITS[lane]}" if lane is not None else ""
        lines.append(f"the run stays behind the ceiling{waits}")
    lines.append(split(found.report))
    if found.report.error_rows:
        codes = ", ".join(f"{n:,} {code}" for code, n in found.report.errors.most_common())
        lines.append(f"{found.report.error_rows:,} of {found.report.done:,} rows are errors ({codes})")
    if found.load > QUIET_LOAD * setting.cores:
        lines.append(f"this machine had other work (load {found.load:.1f}): rates are lower than on a quiet one")
    return lines


def _decoding(found: Measured) -> str:
    decoding, workers = found.decoding, found.setting.num_workers
    rows = max(1, decoding.rows)
    decode, process = (1000 * decoding.report.seconds[stage] / rows for stage in ("decode", "process"))
    by = "in this process" if workers == 0 else f"{workers} worker{'' if workers == 1 else 's'}"
    return f"{by}; a row takes {decode:.2g} ms to decode, {process:.2g} ms in the model's processor"


def _model(found: Measured) -> str:
    setting = found.setting
    where = f" on {setting.device}" if setting.device else ""
    return f"{setting.dtype or 'no weights'}{where}, {_at_once(found.options)}"


def _heeded(size: BatchSize, snapshot: Snapshot) -> BatchSize:
    """Without what is of other modalities than the inputs'."""
    there = {modality for modality, count in snapshot.modalities.items() if count}
    tokens = size.tokens if there & {"text", None} else None
    return replace(size, tokens=tokens, audio=size.audio if there & {"audio", None} else None)


def _at_once(options: LocalOptions) -> str:
    size, others = options.batch_size, []
    if size.tokens is not None:
        others.append(f"texts of {size.tokens:,} tokens")
    if size.audio is not None:
        others.append(f"sounds of {size.audio / 2**20:g} MB")
    return f"{size.samples} at once" + (f" ({', '.join(others)})" if others else "")


def to_dict(found: Measured, model: str | None, task: str) -> dict[str, Any]:
    """What was measured, as JSON values."""
    ceilings, setting, report = found.ceilings, found.setting, found.report
    return {
        "model": model,
        "task": task,
        "device": setting.device,
        "dtype": setting.dtype,
        "batch_size": found.options.batch_size.samples,
        "batch_tokens": found.options.batch_size.tokens,
        "batch_audio_bytes": found.options.batch_size.audio,
        "num_workers": setting.num_workers,
        "cores": setting.cores,
        "load_average": round(found.load, 2),
        "decode": _rate(ceilings.decode),
        "model_only": _rate(ceilings.model),
        "both_at_once": {"rows_per_s": round(ceilings.shared, 2)},
        "end_to_end": {
            **_rate(found.whole),
            **{key: report.to_dict()[key] for key in FROM_REPORT},
        },
        "ceiling": round(ceilings.highest, 2),
        "ratio": round(found.ratio, 3),
        "steady_ratio": None if found.steady_ratio is None else round(found.steady_ratio, 3),
        "ratio_to_slower": round(found.ratio_to_slower, 3),
        "limited_by": ceilings.limit,
        "advice": found.advice,
        "rows": report.done,
        "errors": report.error_rows,
        "errors_by_code": dict(sorted(report.errors.items())),
    }


def _rate(rate: Rate) -> dict[str, float]:
    return {
        "rows": round(rate.rows, 1),
        "seconds": round(rate.seconds, 3),
        "rows_per_s": round(rate.per_s, 2),
        "cpu_ms_per_row": round(1000 * rate.cpu_per_row, 4),
    }
