"""One run at a time per output."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sink_rows import expected, read_rows, spec, write

from mmcli.core.errors import TryAgain
from mmcli.sinks.commit import Staging

HOLD = """
import sys, time
from mmcli.sinks.commit import Staging
with Staging(sys.argv[1], sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_loser_is_told_at_once_who_holds_it(target: tuple[str, str]) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, *target], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        start = time.monotonic()
        with pytest.raises(TryAgain, match=rf"process {holder.pid} on .+, since \d{{4}}-") as refused:
            write(target[0], spec(target[1]), [4])
        assert time.monotonic() - start < 1
        assert refused.value.exit_code == 75
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        # The system gave the lock back.
        write(target[0], spec(target[1]), [4])
        assert read_rows(*target) == expected(4)
    finally:
        holder.kill()
        holder.wait()


def test_many_runs_at_once_give_one_output(target: tuple[str, str]) -> None:
    """Winners finish, remove the folder and its lock, while losers are waiting for it."""
    out, format_name = target
    children = []
    for _ in range(12):
        child = os.fork()
        if child == 0:
            code = 0
            try:
                write(out, spec(format_name), [3, 6, 20])
            except TryAgain:
                code = 75
            except BaseException as error:  # noqa: BLE001 - told by its exit code
                print(repr(error), file=sys.stderr)
                code = 1
            os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, 75}
    assert 0 in codes
    assert read_rows(out, format_name) == expected(20)


def test_an_unsigned_lock_is_still_a_lock(tmp_path: Path) -> None:
    out = f"{tmp_path}/out.parquet"
    with Staging(out):
        (tmp_path / "out.parquet.mmcli" / "lock").write_text("")
        with pytest.raises(TryAgain, match=re.escape("does not say who")):
            write(out, spec("parquet"), [4])
