"""Run a checked command: list the inputs, compute, say how it ended."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcli.cli import parse
from mmcli.cli.advice import Setting, advise
from mmcli.cli.boundary import guard
from mmcli.cli.compose import Arguments, Planner, Prepared, prepare
from mmcli.cli.environment import prepare_environment
from mmcli.cli.messages import Messages
from mmcli.cli.signals import Signals
from mmcli.core.errors import ErrorBudgetExceeded, ExitCode, NothingToDo, OutputError, TryAgain
from mmcli.core.protocols import Decoder, ModelPlan, Snapshot
from mmcli.core.report import Report

if TYPE_CHECKING:
    from mmcli.engines.batching import BatchSize, WindowSizes
    from mmcli.media.pool import Nursery

# What a forward pass takes when --batch-size is auto. On two CPU cores 8 to 64 are equally fast; a GPU wants more.
AUTO_BATCH_CPU, AUTO_BATCH_GPU = 32, 256
# Captioners read all their weights for each token of a batch: 16, 32, 64 and 160 pictures at once give 7.2, 11, 14
# and 15 rows/s on two cores (BLIP of 6 layers of 384). Not chat models: tiles and long caches take memory.
AUTO_BATCH_CPU_CAPTIONS = 64
# Of texts as many as have so many tokens with their padding: few long ones, many short ones. On a CPU for each core
# of one of four batches that run at once: layers of so many tokens stay in its cache. Seconds of the model,
# two cores, three runs in turn, 1,500 texts of 1 to 120 words through a BERT of MiniLM's size: 32 texts 6.7, 512
# tokens 4.7, 1,024 5.2, 2,048 5.8; 6,000 of 1 to 12 words 8.5, 7.8, 8.3, 8.3. On an H200, rows/s of
# 1 to 120 words: 8,192 tokens 15,500, 32,768 18,900, 131,072 18,000.
AUTO_TOKENS_CPU, AUTO_TOKENS_GPU = 512, 32_768
# Of sounds as many as have so many bytes of model inputs, on a CPU for each of its cores: 16 s of 16 kHz. The first
# convolutions make 120 times as much of them. 60 sounds of 1 to 15 s through a small Wav2Vec2 on two cores, seconds
# of the model, three runs in turn: 32 sounds at once 8.0, 8 3.5, 4 3.3, 2 4.0, 1 4.4. A GPU's are not measured.
AUTO_AUDIO_CPU, AUTO_AUDIO_GPU = 2**20, 2**25
MOST_AUDIO_CORES = 16
MAX_AUTO_WORKERS = 32
# Tasks whose models read, and do not write.
READING = ("embed", "classify")
# Batches at once, each of which needs memory; and how many each thread is to have.
MAX_CONCURRENCY, BATCHES_EACH = 4, 4


def execute(arguments: Arguments, planner: Planner) -> int:
    """Check the whole command, then run it. Says how it ended, and returns the exit code."""
    options = arguments.messages
    prepare_environment(offline=arguments.model.offline, debug=options.debug, log_file=options.log_file)
    messages = Messages(quiet=options.quiet, log_file=options.log_file)
    report = Report(cores=parse.available_cores())
    signals = Signals()
    plans: list[ModelPlan] = []
    with signals.catching():
        outcome = guard(lambda: _execute(arguments, planner, messages, report, signals, plans), debug=options.debug)
    advice = advise(report.limited_by(), Setting.of(report, arguments, plans[0])) if plans else None
    messages.summary(report, arguments.output.output, as_json=options.json, outcome=outcome, advice=advice)
    return outcome.exit_code


def _execute(
    arguments: Arguments,
    planner: Planner,
    messages: Messages,
    report: Report,
    signals: Signals,
    plans: list[ModelPlan],
) -> int:
    """`plans`: gets the model's plan, once it is known."""
    with signals.heard(), open_nursery(arguments) as nursery:
        prepared = prepare(arguments, planner, messages, report, signals)
        plans.append(prepared.planned.plan)
        prepared.nursery = nursery
        if nursery is not None and prepared.decoder is not None:
            # Nothing is decoded; what it still imports would keep a core busy for seconds.
            nursery.close()
        if arguments.output.output == "-":
            return _run_to_stdout(prepared)
        from mmcli.cli.outputs import run_to_output

        return run_to_output(prepared)


@contextmanager
def open_nursery(arguments: Arguments) -> Iterator[Nursery | None]:
    """The decode workers' nursery, started before anything else: it imports while this process does."""
    from mmcli.media.pool import Nursery
    from mmcli.models.resolve import processor_imports

    imports = processor_imports(arguments.model.model or "")
    nursery = Nursery(imports) if imports and arguments.run.num_workers != "0" else None
    try:
        yield nursery
    finally:
        if nursery is not None:
            nursery.close()


def _run_to_stdout(prepared: Prepared) -> int:
    from mmcli.sinks.stream import StreamOutput

    if sys.stdout is None:
        raise OutputError("stdout is closed", hint="give a file instead: -o out.parquet")
    with tempfile.TemporaryDirectory(prefix="mmcli-") as folder:
        snapshot = list_inputs(prepared, Path(folder))
        announce(prepared, snapshot)
        try:
            run_engine(prepared, snapshot, Target(StreamOutput(sys.stdout.buffer)))
        except (ErrorBudgetExceeded, TryAgain) as error:
            # A stream cannot be resumed.
            error.hint = None
            raise
    return ExitCode.ROW_ERRORS if prepared.report.error_rows else ExitCode.OK


@dataclass(slots=True)
class Target:
    """Where the engine's rows go, and what an earlier run has left: see engines.local.Work."""

    output: Any
    start_row: int = 0
    previous: Any = None
    want_signatures: bool = False


def list_inputs(prepared: Prepared, folder: Path) -> Snapshot:
    """The snapshot of the inputs, in `folder`."""
    with prepared.report.timed("list"):
        snapshot = prepared.source.snapshot(folder)
    prepared.report.rows_total = snapshot.rows
    return snapshot


def announce(prepared: Prepared, snapshot: Snapshot) -> None:
    """Say what the listing found; raises NothingToDo with --fail-on-empty."""
    for note in snapshot.notes:
        prepared.messages.note(note)
    prepared.report.notes += snapshot.notes
    _note_modalities(prepared, snapshot)
    if snapshot.rows == 0:
        text = "no inputs found in " + " ".join(prepared.arguments.inputs.inputs or ())
        if prepared.arguments.run.fail_on_empty:
            raise NothingToDo(text)
        prepared.messages.note(text)


def _note_modalities(prepared: Prepared, snapshot: Snapshot) -> None:
    """Inputs that the model cannot take become error rows: say so before it is loaded."""
    plan = prepared.planned.plan
    for modality, count in snapshot.modalities.items():
        if modality is not None and count and modality not in plan.modalities:
            takes = ", ".join(sorted(plan.modalities))
            prepared.messages.note(f"{count:,} inputs are {modality} by name; this model takes {takes}")


def check_budget(prepared: Prepared) -> None:
    """Raise ErrorBudgetExceeded when what is there already holds too many error rows."""
    from mmcli.engines.local import ErrorBudget

    try:
        ErrorBudget(*prepared.limits.max_errors).check(prepared.report)
    except ErrorBudgetExceeded as error:
        raise _over_budget(prepared) from error


def _over_budget(prepared: Prepared) -> ErrorBudgetExceeded:
    report, run = prepared.report, prepared.arguments.run
    codes = ", ".join(f"{n:,} {code}" for code, n in report.errors.most_common())
    allowed = "--on-error fail allows none" if run.on_error == "fail" else f"--max-errors allows {run.max_errors}"
    return ErrorBudgetExceeded(f"{report.error_rows:,} error rows ({codes}); {allowed}")


def run_engine(prepared: Prepared, snapshot: Snapshot, target: Target) -> None:
    """Compute the rows that are missing. Raises MmcliError."""
    if snapshot.rows is not None and target.start_row >= snapshot.rows:
        keep_beside(prepared)
        return
    from mmcli.engines.local import ErrorBudget, LocalOptions, StopFlag, Work, run
    from mmcli.engines.writer import PartLimits

    limits = prepared.limits
    batch_size = limits.batch_size or auto_batch_size(prepared)
    options = LocalOptions(
        batch_size=sized(batch_size, prepared),
        windows=windows_of(batch_size, snapshot, prepared),
        concurrency=limits.concurrency or concurrency_of(snapshot.rows, batch_size, target.output.immediate),
        block_rows=block_rows_of(snapshot, prepared),
        time_limit_s=limits.time_limit_s,
        budget=ErrorBudget(*limits.max_errors),
        parts=PartLimits(rows=limits.part_rows, seconds=limits.part_seconds),
    )
    stop = StopFlag()
    ready = prepared.planned.ready
    plan = prepared.planned.plan if ready is None else ready(prepared)
    work = Work(
        source=prepared.source,
        decoder=open_decoder(prepared, snapshot),
        plan=plan,
        task=prepared.planned.task,
        report=prepared.report,
        stop=stop,
        output=target.output,
        start_row=target.start_row,
        previous=target.previous,
        want_signatures=target.want_signatures,
    )
    try:
        with prepared.signals.asking(stop.request), prepared.messages.progress(prepared.report):
            run(work, options)
    except ErrorBudgetExceeded as error:
        raise _over_budget(prepared) from error


def keep_beside(prepared: Prepared) -> None:
    """Write what the command keeps beside its rows, where none of these is missing."""
    if prepared.planned.keeps and prepared.planned.ready is not None:
        prepared.planned.ready(prepared)


def auto_batch_size(prepared: Prepared) -> int:
    """Of --batch-size auto."""
    if (wanted := getattr(prepared.planned.plan, "batch_size", None)) is not None:
        return int(wanted)
    if _on_gpu(prepared):
        return AUTO_BATCH_GPU
    captions = getattr(prepared.planned.plan, "family", None) == "captioner"
    return AUTO_BATCH_CPU_CAPTIONS if captions else AUTO_BATCH_CPU


def sized(batch_size: int, prepared: Prepared) -> BatchSize:
    """So many samples; texts and sounds by their lengths, where no number was asked for and no model writes."""
    from mmcli.engines.batching import BatchSize

    plan = prepared.planned.plan
    if (
        prepared.limits.batch_size is not None
        or not reads(prepared)
        or getattr(plan, "batch_size", None) is not None
    ):
        return BatchSize(batch_size)
    if _on_gpu(prepared):
        return BatchSize(batch_size, AUTO_TOKENS_GPU, AUTO_AUDIO_GPU)
    cores = parse.available_cores()
    tokens = AUTO_TOKENS_CPU * max(1, cores // MAX_CONCURRENCY)
    return BatchSize(batch_size, tokens, AUTO_AUDIO_CPU * min(cores, MOST_AUDIO_CORES))


def _on_gpu(prepared: Prepared) -> bool:
    device = prepared.arguments.model.device
    if (prepared.arguments.model.model or "").startswith("fake:"):
        return False
    if device == "auto":
        from mmcli.models.device import choose_device

        device = choose_device(device)[0]
    return device.startswith("cuda")


def concurrency_of(rows: int | None, batch_size: int, immediate: bool = False) -> int:
    """Batches that a model on a CPU may compute at once.

    One where a row is waited for, or where the last batches, with a part of the cores each, would be most of the
    run. By all rows of the inputs and not by those that are left: the same in a run that goes on.
    """
    few = rows is not None and rows < BATCHES_EACH * MAX_CONCURRENCY * batch_size
    return 1 if immediate or few else MAX_CONCURRENCY


def windows_of(batch_size: int, snapshot: Snapshot, prepared: Prepared) -> WindowSizes:
    """Rows that are batched together in a run."""
    from mmcli.engines.batching import WindowSizes, window_sizes

    # Prompts vary with the columns that they name, and so do the questions of a row, and the shapes of a ViLT's
    # pictures; to a server lengths do not matter.
    if getattr(prepared.planned.plan, "batch_size", None) is not None:
        return WindowSizes(batch_size)
    there = {m for m, count in snapshot.modalities.items() if count}
    asked = prepared.planned.task.name == "ask"
    if there == {"video"} and reads(prepared):
        # All have the same frames, and a batch is of so many of these: to wait for more clips gains nothing.
        return WindowSizes(max(1, batch_size // (prepared.planned.plan.decode.num_frames or 1)))
    fixed = there <= {"image"} and not prepared.variables
    texts = reads_texts(snapshot, prepared)
    return window_sizes(batch_size, lengths_vary=not fixed or asked, texts=texts)


def block_rows_of(snapshot: Snapshot, prepared: Prepared) -> int:
    """Rows that a decode worker is given at a time."""
    from mmcli.engines.intake import BLOCK_ROWS, TEXT_BLOCK_ROWS

    return TEXT_BLOCK_ROWS if reads_texts(snapshot, prepared) else BLOCK_ROWS


def reads_texts(snapshot: Snapshot, prepared: Prepared) -> bool:
    """Whether all inputs are texts. Where a model writes, a row takes long, and its prompt is not what takes it."""
    there = {m for m, count in snapshot.modalities.items() if count}
    return there == {"text"} and prepared.planned.task.name in READING


def reads(prepared: Prepared) -> bool:
    """Whether a model looks at its inputs once, and writes nothing."""
    return prepared.planned.task.name in READING and not hasattr(prepared.planned.plan, "writer")


def open_decoder(prepared: Prepared, snapshot: Snapshot) -> Decoder:
    """What decodes the inputs of a run."""
    if prepared.decoder is not None:
        return prepared.decoder()
    from mmcli.media.pool import DecodePool, InlineDecoder

    plan = prepared.planned.plan
    wanted = prepared.limits.num_workers
    if wanted is None:
        wanted = max(1, min(MAX_AUTO_WORKERS, parse.available_cores(), snapshot.rows or MAX_AUTO_WORKERS))
    if wanted == 0:
        return InlineDecoder(plan, plan.decode)
    named = {m for m, count in snapshot.modalities.items() if count}
    expected = frozenset(m for m in named if m is not None) if named and None not in named else None
    return DecodePool(plan, plan.decode, wanted, prepared.limits.timeout_s, prepared.nursery, expected)
