"""The exception tree and its exit codes.

    MmcliError                 exit 1   anything below; on its own, an internal error
    ├── ConfigError            exit 2   usage or configuration; carries every problem found
    ├── ErrorBudgetExceeded    exit 4   more error rows than --max-errors
    ├── NothingToDo            exit 5   no inputs, with --fail-on-empty
    ├── StateMismatch          exit 6   an earlier run's state does not belong to this command
    ├── ModelError             exit 7   the model is unusable, or (DeviceLost) its device
    ├── OutputError            exit 8   the output cannot be written
    ├── TryAgain               exit 75  locked, time limit, network
    └── Stopped                exit 130, 143 or 141: a signal or a closed pipe
    RowError                   not fatal: becomes the error columns of one output row

Exit 0 (all rows ok) and 3 (finished, some rows are errors) are not exceptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Literal


class ExitCode(IntEnum):
    """Every exit code of mmcli; `mmcli.cli.boundary` is the only place that exits with one."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    ROW_ERRORS = 3
    ERROR_BUDGET = 4
    NOTHING_TO_DO = 5
    STATE_MISMATCH = 6
    MODEL = 7
    OUTPUT = 8
    TRY_AGAIN = 75
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143


class MmcliError(Exception):
    """Base of all errors that end a run. `hint` says what to type next.

    shared  all processes of the run raise it: the first one says it
    """

    exit_code: ExitCode = ExitCode.INTERNAL
    shared: bool = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(MmcliError):
    """Usage or configuration error. `problems` holds one line per problem, all of them at once."""

    exit_code = ExitCode.USAGE

    def __init__(self, problems: str | Sequence[str], *, hint: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems), hint=hint)


class ErrorBudgetExceeded(MmcliError):
    exit_code = ExitCode.ERROR_BUDGET


class NothingToDo(MmcliError):
    exit_code = ExitCode.NOTHING_TO_DO


class StateMismatch(MmcliError):
    exit_code = ExitCode.STATE_MISMATCH


class ModelError(MmcliError):
    exit_code = ExitCode.MODEL


class DeviceLost(ModelError):
    """A device has failed, and fails from now on whatever it is asked: only another process can use it again."""


class OutputError(MmcliError):
    exit_code = ExitCode.OUTPUT


class TryAgain(MmcliError):
    exit_code = ExitCode.TRY_AGAIN


class Stopped(MmcliError):
    """The run was stopped from outside; what was complete is committed."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code


ErrorCode = Literal[
    "not_found", "permission", "too_large", "unsupported_format", "corrupt", "truncated", "bomb",
    "input_changed", "bad_row", "policy_denied", "timeout", "io", "worker_crash", "oom", "nonfinite",
    "empty_output", "invalid_output",
]  # fmt: skip
ErrorStage = Literal["source", "decode", "model", "post"]


class RowError(Exception):
    """One input failed: becomes `error_code`, `error_stage` and `error_message` of its row.

    Picklable, since decode workers send it back. The message is one line; control characters are escaped.
    """

    def __init__(self, code: ErrorCode, message: str, stage: ErrorStage = "decode") -> None:
        super().__init__(code, message, stage)
        self.code: ErrorCode = code
        self.message = one_line(message)
        self.stage: ErrorStage = stage

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str, str]]:
        return RowError, (self.code, self.message, self.stage)


def device_lost(error: BaseException) -> DeviceLost | None:
    """The error that ends the run, where `error` says that a device has failed for good (torch.AcceleratorError).

    Memory that ran out is none of these.
    """
    if type(error).__name__ != "AcceleratorError" or "out of memory" in str(error):
        return None
    return DeviceLost(
        f"the device failed: {one_line(str(error).splitlines()[0])}",
        hint="the same command again, which goes on; with --device cpu it names what the model cannot take",
    )


def one_line(text: str, limit: int = 500) -> str:
    """`text` on one line, control characters and lone surrogates escaped, at most `limit` characters."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"
