"""SIGINT and SIGTERM: the first asks the run to stop, a second one exits at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mmcli.cli.boundary import say
from mmcli.core.errors import ExitCode, Stopped

CODES = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED}
# A signal that comes while torch is imported comes again so much later.
AGAIN_S = 0.1


class Signals:
    """Handles both while `catching`. The engine is asked; all else ends at once, within `heard` by Stopped."""

    def __init__(self) -> None:
        self._asked: ExitCode | None = None
        self._ask_engine: Callable[[ExitCode], None] | None = None

    @contextmanager
    def catching(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._handle) for number in CODES}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within the block a signal raises Stopped.

        On its way there it is a KeyboardInterrupt, which no library takes for a failure of its own: transformers,
        for one, would report a config.json that cannot be read.
        """
        try:
            yield
        except KeyboardInterrupt as signal_came:
            if self._asked is None:
                raise
            raise stopped(self._asked) from signal_came

    @contextmanager
    def asking(self, request: Callable[[ExitCode], None]) -> Iterator[None]:
        """Within the block the first signal calls `request(exit code)`; raises Stopped at its end when one came."""
        self._ask_engine = request
        try:
            yield
        finally:
            self._ask_engine = None
        if self._asked is not None:
            raise stopped(self._asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        code = CODES[signal.Signals(number)]
        if _in_torch(frame):
            later = threading.Timer(AGAIN_S, os.kill, (os.getpid(), number))
            later.daemon = True
            later.start()
            return
        if self._asked is not None:
            os._exit(code)
        self._asked = code
        if self._ask_engine is None:
            raise KeyboardInterrupt
        self._ask_engine(code)
        if code == ExitCode.INTERRUPTED:
            say("\nmmcli: stopping; what is done is being kept. Ctrl-C again exits at once")


def _in_torch(frame: FrameType | None) -> bool:
    """Whether torch is being imported: its C++ calls Python there, and an exception ends the process (abort)."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "torch":
            return True
        frame = frame.f_back
    return False


def stopped(code: ExitCode) -> Stopped:
    return Stopped("interrupted" if code == ExitCode.INTERRUPTED else "terminated", code)
