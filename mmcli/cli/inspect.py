"""`mmcli inspect`: what an output holds."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmcli.cli import parse
from mmcli.core.errors import ConfigError, ExitCode, StateMismatch, one_line

if TYPE_CHECKING:
    import pyarrow as pa

    from mmcli.sinks.outputs import OutputInfo

ERROR_COLUMNS = ("id", "error_code", "error_stage", "error_message")


def inspect(
    output: Annotated[
        str | None,
        typer.Argument(
            metavar="OUT", help="An output of mmcli: a file or a folder, finished or not.", show_default=False
        ),
    ] = None,
    errors: Annotated[
        str,
        typer.Option(
            "--errors",
            metavar="N",
            help="Show the first N error rows too.",
            envvar="MMCLI_ERRORS",
            show_envvar=False,
        ),
    ] = "0",
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object instead of a table.", envvar="MMCLI_JSON", show_envvar=False),
    ] = False,
) -> int:
    """Show what an output holds: rows, errors, model, options, columns.

    mmcli inspect photos.parquet --errors 10
    """
    if output is None:
        raise ConfigError("no OUT given; type mmcli inspect and the file or folder that a run has written")
    wanted = parse.number("--errors", errors, 0)
    from mmcli.sinks.rows import error_rows

    info = _read(output)
    failed = error_rows(info, wanted) if wanted else []
    # A locale without UTF-8 must not end in an error.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if as_json:
        sys.stdout.write(json.dumps({**facts(info), "error_rows": failed}) + "\n")
    else:
        _show(_lines(info), failed)
    sys.stdout.flush()
    return int(ExitCode.OK)


def facts(info: OutputInfo) -> dict[str, Any]:
    """Everything that is known about an output without reading its rows, as JSON values."""
    return {
        "output": str(info.path),
        "format": info.format,
        "complete": info.complete,
        "rows": info.rows,
        "rows_expected": (info.job["inputs"] or {}).get("rows"),
        "ok": info.rows - sum(info.errors.values()),
        "errors": info.errors,
        **info.job,
        "fingerprint": info.fingerprint,
        "mmcli_version": info.metadata.get("mmcli_version"),
        "schema": {f.name: _type(f.type) for f in info.schema},
        "files": info.files,
        "notes": info.notes,
    }


def _type(kind: pa.DataType) -> str:
    """`list<float>[512]` rather than `fixed_size_list<element: float>[512]`"""
    size = getattr(kind, "list_size", None)
    return str(kind) if size is None else f"list<{kind.value_type}>[{size}]"


def _read(output: str) -> OutputInfo:
    from mmcli.sinks.outputs import read_output

    try:
        return read_output(output)
    except StateMismatch as error:
        if "exists and was not written" in error.message:
            # What is said to who wants to write there does not help who looks.
            error.hint = "mmcli inspect with what a run was given as -o"
            error.message = error.message.replace("exists and was not written", "was not written")
        raise


def _show(lines: list[tuple[str, Any]], failed: list[dict[str, Any]]) -> None:
    """Tables on a terminal, else plain text: one fact a line, and error rows with tabs."""
    facts = [(name, _cell(value)) for name, value in lines]
    errors = [[_cell(row[column]) for column in ERROR_COLUMNS] for row in failed]
    if sys.stdout.isatty():
        _show_tables(facts, errors)
        return
    width = max(len(name) for name, _ in facts)
    text = [f"{name:{width}}  {value}" for name, value in facts]
    if errors:
        text += ["", *("\t".join(row) for row in (ERROR_COLUMNS, *errors))]
    sys.stdout.write("\n".join(text) + "\n")


def _show_tables(facts: list[tuple[str, str]], errors: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, emoji=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    for fact in facts:
        table.add_row(*fact)
    console.print(table)
    if errors:
        rows = Table(box=None, pad_edge=False)
        for heading in ERROR_COLUMNS:
            rows.add_column(heading, overflow="fold")
        for row in errors:
            rows.add_row(*row)
        console.print()
        console.print(rows)


def _cell(value: Any) -> str:
    """Names in an output are untrusted: control characters are escaped. (Markup is off in the console.)"""
    return one_line(str(value), 2000)


def _lines(info: OutputInfo) -> list[tuple[str, Any]]:
    errors = sum(info.errors.values())
    codes = ", ".join(f"{n:,} {code}" for code, n in sorted(info.errors.items(), key=lambda e: -e[1]))
    lines: list[tuple[str, Any]] = [
        ("output", info.path),
        ("format", info.format + (" (folder)" if Path(info.path).is_dir() else "")),
        ("state", _state(info)),
        ("rows", f"{info.rows:,}"),
        ("ok", f"{info.rows - errors:,}"),
        ("errors", f"{errors:,} ({codes})" if errors else "0"),
        ("task", info.job["task"]),
    ]
    lines += _flat("model", info.job["model"] or {})
    lines += _flat("options", info.job["options"] or {})
    columns = ", ".join(f"{f.name} {_type(f.type)}" for f in info.schema)
    lines += [("columns", columns), ("fingerprint", info.fingerprint)]
    lines += [("mmcli", info.metadata["mmcli_version"])] if info.metadata.get("mmcli_version") else []
    return lines + [("note", note) for note in info.notes]


def _state(info: OutputInfo) -> str:
    if info.complete:
        return "complete"
    expected = (info.job["inputs"] or {}).get("rows")
    total = f" of {expected:,}" if isinstance(expected, int) else ""
    return f"interrupted: {info.rows:,}{total} rows are committed; run the same command again to go on"


def _flat(name: str, values: dict[str, Any]) -> list[tuple[str, Any]]:
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += _flat(f"{name}.{key}", value)
        elif value not in (None, ""):
            lines.append((f"{name}.{key}", value))
    return lines
