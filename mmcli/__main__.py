"""`python -m mmcli` and the `mmcli` script."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and exit with its code.

    `os._exit`, once all is flushed: daemon threads that wait in a read, and the tear-down of CUDA and
    OpenMP, cannot delay or change the exit code of work that is already safe on disk.
    """
    from mmcli.cli.boundary import run

    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 141
    os._exit(code)


if __name__ == "__main__":
    main()
