"""A run whose rows go to a file or a folder: list, find out what is there, compute the rest, finalise."""

from __future__ import annotations

from mmcli import __version__
from mmcli.cli.compose import Prepared
from mmcli.cli.retry import check_inputs
from mmcli.cli.run import Target, announce, check_budget, keep_beside, list_inputs, run_engine
from mmcli.core.errors import ErrorBudgetExceeded, ExitCode, OutputError, Stopped, TryAgain
from mmcli.core.protocols import Snapshot
from mmcli.engines.table import Layout
from mmcli.sinks.commit import Mode, Staging
from mmcli.sinks.formats import RESULTS, format_for
from mmcli.sinks.outputs import RunSpec

GO_ON = "run the same command again to go on"


def run_to_output(prepared: Prepared) -> int:
    """Bring the output of a checked command to completion. Returns OK or ROW_ERRORS; raises MmcliError."""
    output = prepared.arguments.output
    format_name = format_for(output.output, output.format)
    with Staging(output.output, format_name) as staging:
        snapshot = list_inputs(prepared, staging.folder)
        announce(prepared, snapshot)
        layout = Layout.of(prepared.planned.task, prepared.source)
        spec = RunSpec(prepared.job(snapshot), layout.schema, format_name, {"mmcli_version": __version__})
        if output.retry_errors:
            check_inputs(staging.place, spec, prepared.source)
        staging.open(spec, _mode(prepared))
        _resume(prepared, staging)
        if staging.complete:
            prepared.messages.note(f"{output.output} is complete already; nothing to compute")
            keep_beside(prepared)
            failure = _write_sidecars(prepared, staging) or _place_files(prepared, staging, layout.schema.names)
        else:
            failure = _compute(prepared, snapshot, staging, layout)
    if format_name in RESULTS and prepared.report.error_rows:
        errors = prepared.report.error_rows
        are = "error row is" if errors == 1 else "error rows are"
        prepared.messages.note(
            f"{errors:,} {are} not in {output.output}: {format_name} holds results only, -o NAME.parquet all rows"
        )
    if failure is not None:
        raise failure
    return ExitCode.ROW_ERRORS if prepared.report.error_rows else ExitCode.OK


def _mode(prepared: Prepared) -> Mode:
    output = prepared.arguments.output
    if output.overwrite:
        return "overwrite"
    return "update" if output.update or output.retry_errors else "new"


def _resume(prepared: Prepared, staging: Staging) -> None:
    """Count what earlier runs have committed, its errors included."""
    report = prepared.report
    report.errors.update(staging.errors)
    report.resumed = report.committed = (report.rows_total or 0) if staging.complete else staging.next_row
    if staging.next_row:
        prepared.messages.note(f"{staging.next_row:,} rows are there from an interrupted run; going on")
    check_budget(prepared)


def _compute(prepared: Prepared, snapshot: Snapshot, staging: Staging, layout: Layout) -> OutputError | None:
    """Compute what is missing, and finish. Gives why files beside the output could not be written."""
    previous = staging.previous([f.name for f in layout.task_fields])
    target = Target(staging, staging.next_row, previous, want_signatures=True)
    out = prepared.arguments.output.output
    try:
        run_engine(prepared, snapshot, target)
        # While the listing of the inputs is still there.
        failure = _write_sidecars(prepared, staging) or _place_files(prepared, staging, layout.schema.names)
        with prepared.signals.heard(), prepared.report.timed("finalise"):
            staging.finalise(snapshot.rows, snapshot.notes)
    except (Stopped, TryAgain) as stop:
        stop.message = f"{stop.message}; {staging.next_row:,} of {snapshot.rows:,} rows are safe"
        stop.hint = GO_ON
        raise
    except ErrorBudgetExceeded as error:
        error.hint = f"mmcli inspect {out} --errors 10, to see why; the same command that allows more goes on"
        raise
    return failure


def _write_sidecars(prepared: Prepared, staging: Staging) -> OutputError | None:
    """Those that are asked for, now that all rows are there. Gives why some could not be written."""
    wanted = prepared.arguments.sidecars
    if wanted is None or not wanted.kinds:
        return None
    from mmcli.sinks.sidecars import output_rows, write_sidecars

    with prepared.signals.heard(), prepared.report.timed("finalise"):
        rows = output_rows(staging.place, staging.complete, wanted.kinds)
        tally = write_sidecars(prepared.source.records, rows, wanted.kinds, wanted.replace_sidecars)
    prepared.messages.note(tally.line())
    if tally.failure is not None:
        tally.failure.hint = "the output itself is complete; the same command writes those that are missing"
    return tally.failure


def _place_files(prepared: Prepared, staging: Staging, columns: list[str]) -> OutputError | None:
    """Those of --into, now that all rows are there. Gives why some could not be put there."""
    wanted = prepared.arguments.into
    if wanted is None or wanted.into is None:
        return None
    from mmcli.sinks.class_folders import label_slots, labelled_rows, place_files
    from mmcli.sinks.class_notes import Into

    if wanted.copy:
        prepared.messages.note(f"copying files into {wanted.into}")
    slots = label_slots(columns, prepared.source.slots)
    with prepared.signals.heard(), prepared.report.timed("finalise"):
        rows = labelled_rows(staging.place, staging.complete, columns, slots)
        into = Into(wanted.into, staging.place.out, wanted.copy)
        tally = place_files(prepared.source.records(), rows, slots, into)
    prepared.messages.note(tally.line(wanted.into))
    if tally.failure is not None:
        hint = "the output itself is complete; the same command puts those there that are missing"
        tally.failure.hint = tally.failure.hint or hint
    return tally.failure
