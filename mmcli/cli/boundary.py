"""The one place where exceptions become messages and exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmcli.core.errors import (
    ConfigError,
    DeviceLost,
    ExitCode,
    MmcliError,
    Stopped,
    TryAgain,
    device_lost,
    one_line,
)

REPORT_IT = "run again with --debug for the traceback, and please report it"
# Errors of a device that has failed: their frames keep its tensors. To free one of these ends the process at once
# (the destructor throws), before anything is said.
_LOST: list[BaseException] = []


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended: its exit code and, unless it finished, why."""

    exit_code: int
    reason: str | None = None


def is_set(name: str) -> bool:
    """Whether the variable of a flag says so, as its option reads it."""
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "f", "no", "n", "off")


def run(arguments: Sequence[str]) -> int:
    """Run mmcli with `arguments` (without the program's name); returns the exit code, never raises."""

    def invoke() -> int:
        from mmcli.cli.app import invoke

        return invoke(arguments)

    debug = "--debug" in arguments or is_set("MMCLI_DEBUG")
    return guard(invoke, debug=debug).exit_code


def guard(function: Callable[[], int], *, debug: bool = False) -> Outcome:
    """Call `function`, print what it raises, and say with which code to exit."""
    try:
        return Outcome(int(function()))
    except BaseException as error:  # noqa: BLE001 - the boundary: whatever comes becomes an exit code
        known = _known(error)
        if isinstance(known, DeviceLost):
            _LOST.append(error)
        if debug:
            traceback.print_exception(error)
        elif known.exit_code == ExitCode.INTERNAL:
            known.hint = known.hint or REPORT_IT
        report(known)
        return Outcome(int(known.exit_code), one_line(known.message, 2000))


def _known(error: BaseException) -> MmcliError:
    """An MmcliError for any exception."""
    match error:
        case MmcliError():
            return error
        case KeyboardInterrupt():
            return Stopped("interrupted", ExitCode.INTERRUPTED)
        case BrokenPipeError():
            return Stopped("the reader of stdout has gone", ExitCode.BROKEN_PIPE)
        case MemoryError():
            return HostMemoryError(
                "not enough memory on this machine", hint="a smaller --batch-size or --num-workers"
            )
    return device_lost(error) or MmcliError(f"internal error: {type(error).__name__}: {error}")


class HostMemoryError(MmcliError):
    exit_code = ExitCode.MODEL


def report(error: MmcliError) -> None:
    """Print an error: every problem on a line of its own, then what to type next."""
    if error.exit_code == ExitCode.BROKEN_PIPE:
        return
    # Being asked to stop is not an error.
    prefix = "mmcli: " if isinstance(error, Stopped | TryAgain) else "mmcli: error: "
    problems = error.problems if isinstance(error, ConfigError) else [error.message]
    for problem in problems:
        say(prefix + _printable(problem))
    if error.hint:
        say("  try: " + _printable(error.hint))


def say(text: str) -> None:
    """A line on stderr; a closed stderr is nobody's loss."""
    if sys.stderr is None:
        return
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return


def _printable(text: str) -> str:
    """File names are untrusted: no control character reaches the terminal."""
    return "\n  ".join(one_line(line, 2000) for line in text.split("\n"))
