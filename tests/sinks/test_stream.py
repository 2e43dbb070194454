"""JSONL on stdout."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

WRITE = """
import sys
sys.path.insert(0, sys.argv[1])
from sink_rows import table
from mmcli.core.errors import MmcliError
from mmcli.sinks.stream import StreamOutput
output = StreamOutput(sys.stdout.buffer)
try:
    for start in range(0, int(sys.argv[2]), 10):
        output.commit(table(start, start + 10), start, [None] * 10)
        if sys.argv[3:]:
            sys.stdin.readline()
except MmcliError as error:
    print(error.message, file=sys.stderr)
    sys.exit(int(error.exit_code))
"""
# With it, Python would flush every write itself.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
COMMAND = [sys.executable, "-c", WRITE, str(Path(__file__).parent)]


def test_rows_in_order() -> None:
    done = subprocess.run([*COMMAND, "1000"], env=ENVIRONMENT, capture_output=True, check=True)
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [f"{row}.jpg" for row in range(1000)]
    assert done.stderr == b""


def test_each_batch_is_flushed() -> None:
    command = [*COMMAND, "20", "wait"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        readable, _, _ = select.select([child.stdout], [], [], 10)
        if not readable:
            child.kill()
        assert readable, "rows wait in a buffer"
        lines = [child.stdout.readline() for _ in range(10)]
        assert json.loads(lines[9])["id"] == "9.jpg"
        child.stdin.close()


def test_a_reader_that_goes_away_ends_the_run_quietly() -> None:
    command = [*COMMAND, "100000"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        errors = child.stderr.read()
        assert child.wait() == 141
        assert errors == b"the reader of stdout has gone\n"


def test_a_full_disk_behind_stdout() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*COMMAND, "1000"], env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 8
    assert done.stderr == b"cannot write to stdout: No space left on device\n"
