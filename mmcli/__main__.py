"""`python -m mmcli` and the `mmcli` script."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command line and exit with its code.

    `os._exit`, once all is flushed: daemon threads that wait in a read, and the tear-down of CUDA and
    OpenMP, cannot delay or change the exit code of work that is already safe on disk.
    """
    _open_standard_streams()
    # Where it is ignored (a job in the background of a script), it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    from mmcli.cli.boundary import run
    from mmcli.core.temporary import remove_temporary

    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            code = code or 141
    remove_temporary()
    os._exit(code)


def _interrupted(number: int, frame: object) -> None:
    """Ctrl-C while nothing is under way yet: a traceback through the imports would help nobody."""
    try:
        os.write(2, b"mmcli: interrupted\n")
    finally:
        os._exit(130)


def _open_standard_streams() -> None:
    """A file that we open must not get the number of a closed stdin, stdout or stderr: libraries write there."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


if __name__ == "__main__":
    main()
