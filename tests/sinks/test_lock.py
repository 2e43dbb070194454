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
from sink_rows import expected, read_rows, signature_of, spec, table, write

from mmcli.core.errors import TryAgain
from mmcli.sinks.commit import Staging
from mmcli.sinks.lock import Lock

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
        with pytest.raises(TryAgain, match=rf"process {holder.pid} on .+, since \d{{4}}-") as refused:
            write(target[0], spec(target[1]), [4])
        assert holder.poll() is None, "waited for the other run to end"
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


def test_a_slowly_emptied_folder_is_not_shared(target: tuple[str, str]) -> None:
    """The next run starts while the finished one still deletes its parts."""
    out, format_name = target
    child = os.fork()
    if child == 0:
        unlink = os.unlink

        def slow_unlink(*args: object, **options: object) -> None:
            time.sleep(0.02)
            unlink(*args, **options)  # type: ignore[arg-type]

        os.unlink = slow_unlink  # type: ignore[assignment]
        try:
            write(out, spec(format_name), [3, 6, 9, 20])
        finally:
            os._exit(0)
    finished = Path(f"{out}_SUCCESS.json" if out.endswith("/") else out)
    while not finished.exists():
        time.sleep(0.001)
    while True:
        try:
            write(out, spec(format_name), [2, 4, 6, 8, 10], "overwrite", value=1)
            break
        except TryAgain:
            continue
    os.waitpid(child, 0)
    assert read_rows(out, format_name) == expected(10, 1)


def test_a_finished_run_leaves_the_next_one_alone(target: tuple[str, str]) -> None:
    out, format_name = target
    with Staging(out, format_name) as first:
        first.open(spec(format_name))
        first.commit(table(0, 4), 0, [signature_of(row) for row in range(4)])
        first.finalise(4)
        second = Staging(out, format_name).__enter__()
        second.open(spec(format_name), "overwrite")
    second.commit(table(0, 4, 1), 0, [signature_of(row) for row in range(4)])
    second.finalise(4)
    assert read_rows(out, format_name) == expected(4, 1)


def test_a_signal_while_it_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the very end of a run: the lock is given back once more on the way out."""
    close = os.close

    def interrupted(descriptor: int) -> None:
        close(descriptor)
        raise KeyboardInterrupt

    lock = Lock([tmp_path / "out.parquet.mmcli"])
    lock.acquire()
    monkeypatch.setattr(os, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lock.release()
    lock.release()
    assert not lock.held
