"""Running mmcli: in this process where that is the same, as a process of its own where it is not."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

COMMAND = [sys.executable, "-m", "mmcli"]


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


class Cli(Protocol):
    def __call__(self, *arguments: object) -> Ended: ...


def process(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """Start a command of its own."""
    return subprocess.Popen([*COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, **options)


def finished(*arguments: object, **options: Any) -> Ended:
    """Run a command of its own."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, timeout=60, **options)
    return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())


def manifest(path: Path, rows: int, **special: str) -> Path:
    """A CSV of texts; `special`: r7="nan" is the text of row 7."""
    lines = [special.get(f"r{row}", f"text number {row}") for row in range(rows)]
    path.write_text("\n".join(["text", *lines, ""]))
    return path


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_parts(folder: Path) -> None:
    wait_until(lambda: len(list(folder.glob("part-*.parquet"))) >= 2)
