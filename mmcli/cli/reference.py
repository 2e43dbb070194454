"""docs/cli.md, from the application itself: `python -m mmcli.cli.reference > docs/cli.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, get_args

import typer

from mmcli.cli.app import COMMANDS, app
from mmcli.cli.command import OTHER
from mmcli.core.errors import ErrorCode, ErrorStage, ExitCode

EXIT_CODES = {
    ExitCode.OK: "all rows are ok",
    ExitCode.INTERNAL: "internal error: please report it",
    ExitCode.USAGE: "usage or configuration; nothing was computed",
    ExitCode.ROW_ERRORS: "finished, some rows are errors",
    ExitCode.ERROR_BUDGET: "stopped: more error rows than `--max-errors` or `--on-error fail` allow",
    ExitCode.NOTHING_TO_DO: "no inputs, with `--fail-on-empty`",
    ExitCode.STATE_MISMATCH: "what an earlier run has left does not belong to this command, or is damaged",
    ExitCode.MODEL: "the model or the device cannot be used, or memory ran out",
    ExitCode.OUTPUT: "the output cannot be written",
    ExitCode.TRY_AGAIN: "try again later: another run writes this output, `--time-limit`, or the network",
    ExitCode.INTERRUPTED: "interrupted (Ctrl-C, SIGINT)",
    ExitCode.BROKEN_PIPE: "the reader of stdout has gone, as `head` does",
    ExitCode.TERMINATED: "terminated (SIGTERM)",
}
ERROR_CODES: dict[ErrorCode, str] = {
    "not_found": "there is no such file",
    "permission": "the file may not be read",
    "too_large": "larger or longer than is decoded",
    "unsupported_format": "of a format that is not read, or a modality that the model does not take",
    "corrupt": "cannot be decoded",
    "truncated": "ends too early, or is empty",
    "bomb": "a picture with more pixels than is decoded",
    "input_changed": "the file is not the one that was listed: size or time differ",
    "bad_row": "a manifest's row that is not as it should be: an empty cell, text that is not UTF-8",
    "policy_denied": "not allowed: a URL where only files are read",
    "timeout": "decoding took longer than `--timeout`",
    "io": "reading failed",
    "worker_crash": "the decoder crashed on it, twice",
    "oom": "not enough memory for it, even alone",
    "nonfinite": "the model gave NaN or infinite values",
    "empty_output": "the model gave nothing",
    "invalid_output": "the model failed on it, or gave what cannot be used",
}


def reference() -> str:
    """The whole page, Markdown."""
    lines = [
        "# mmcli on the command line",
        "",
        "Made by `python -m mmcli.cli.reference > docs/cli.md`; a test checks that it is current.",
        "",
        "Every option is also an environment variable, `MMCLI_` and its name (`--batch-size`: `MMCLI_BATCH_SIZE`),",
        "and a key of the file that `--config` names (`batch-size = 64`; a table `[embed]` for one command only).",
        "Flags are 1 or 0 there (`MMCLI_NORMALIZE=0`), true or false in the file (`normalize = false`); several",
        "patterns of `--glob` are separated by spaces, or a list in the file.",
        "The command line wins over variables, variables over the file. A variable `MMCLI_…` that is none is told.",
        "`python -m mmcli` is the same as `mmcli`.",
        "",
    ]
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="mmcli")
    for name in COMMANDS:
        lines += _command(name, group.commands[name], context)  # type: ignore[attr-defined]
    lines += ["## Exit codes", "", "| code | means |", "| --- | --- |"]
    lines += [f"| {int(code)} | {EXIT_CODES[code]} |" for code in ExitCode]
    stages = ", ".join(f"`{stage}`" for stage in get_args(ErrorStage))
    lines += ["", "## Error codes of rows", ""]
    lines += [f"In the column `error_code`; `error_stage` is where it happened: {stages}.", ""]
    lines += ["| error_code | means |", "| --- | --- |"]
    lines += [f"| `{code}` | {ERROR_CODES[code]} |" for code in get_args(ErrorCode)]
    return "\n".join([*lines, ""])


def _command(name: str, command: Any, parent: Any) -> Iterator[str]:
    context = typer.Context(command, info_name=name, parent=parent)
    paragraphs = [" ".join(p.split()) for p in command.help.split("\n\n")]
    yield from (f"## mmcli {name}", "")
    for paragraph in paragraphs:
        yield from (f"    {paragraph}" if paragraph.startswith("mmcli ") else paragraph, "")
    panels: dict[str, list[str]] = {}
    for parameter in command.params:
        argument = parameter.param_type_name == "argument"
        panel = "Arguments" if argument else parameter.rich_help_panel or OTHER
        panels.setdefault(panel, []).append(_row(parameter, context))
    for panel, rows in panels.items():
        yield from (f"### {panel}", "", "| | |", "| --- | --- |", *rows, "")


def _row(parameter: Any, context: Any) -> str:
    if parameter.param_type_name == "argument":
        names, text = f"`{parameter.metavar}`", parameter.help
    else:
        written, text = parameter.get_help_record(context)
        names = f"`{written}`"
    return f"| {names} | {' '.join(text.split()).replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    sys.stdout.write(reference())
