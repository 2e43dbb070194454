"""The typer application: one row per command. Command modules import heavy libraries inside functions only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

import typer

from mmcli import __version__
from mmcli.cli.ask import ask
from mmcli.cli.bench import bench
from mmcli.cli.caption import caption
from mmcli.cli.classify import classify
from mmcli.cli.command import Command
from mmcli.cli.embed import embed
from mmcli.cli.eval import evaluate
from mmcli.cli.finetune import finetune
from mmcli.cli.inspect import inspect
from mmcli.core.errors import ConfigError, ExitCode, Stopped, one_line

app = typer.Typer(
    name="mmcli",
    help="Batch work with multimodal transformer models: folders and manifests in, tables out.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

VARIABLES = "Every option is also a variable: --batch-size is MMCLI_BATCH_SIZE. The command line wins."

# name -> (function, one line of help)
COMMANDS = {
    "embed": (embed, "One vector per image, sound, clip or text."),
    "caption": (caption, "One text per picture, sound or clip."),
    "ask": (ask, "Answers to questions about every input."),
    "classify": (classify, "The label of every input."),
    "eval": (evaluate, "How right predictions are."),
    "finetune": (finetune, "A model that learns from solved rows."),
    "bench": (bench, "How fast a model goes over inputs here, and what limits it."),
    "inspect": (inspect, "What an output holds."),
}
for _name, (_function, _line) in COMMANDS.items():
    app.command(_name, cls=Command, short_help=_line, epilog=VARIABLES)(_function)


def _version(value: bool) -> None:
    if value:
        print(f"mmcli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Batch work with multimodal transformer models: folders and manifests in, tables out."""


def invoke(arguments: Sequence[str]) -> int:
    """Parse and run. Raises MmcliError; usage errors become ConfigError."""
    command = typer.main.get_command(app)
    try:
        code = command.main(list(arguments), prog_name="mmcli", standalone_mode=False)
    except typer.Abort as stop:
        raise Stopped("interrupted", ExitCode.INTERRUPTED) from stop
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        raise _usage_error(error) from error
    return int(code or 0)


def _usage_error(error: Exception) -> ConfigError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "mmcli"
    message = one_line(error.format_message(), 2000)  # type: ignore[attr-defined]
    if message == "Missing command.":
        message = f"no command given; it is one of {', '.join(sorted(COMMANDS))}"
    near = re.search(r" \(Possible options: (.*)\)|\. Did you mean '(.*)'\?", message)
    if near is not None:
        message = f"{message[: near.start()]}; did you mean {near[1] or near[2]}?"
    return ConfigError(message[:1].lower() + message[1:].removesuffix("."), hint=f"{path} --help")
