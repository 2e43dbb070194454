"""Killed at every step of the commit protocol, a run is recovered by the next one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sink_rows import OUTPUTS, Rows, expected, is_error, leftovers, read_rows, signature_of, spec, write

from mmcli.core.errors import ConfigError
from mmcli.sinks.commit import Mode
from mmcli.sinks.outputs import read_output
from mmcli.sinks.place import Place

# Every call that changes or secures a name on disk is a point to be killed at.
SYNC_POINTS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir")


def killed(work: Callable[[], object], at: int) -> bool:
    """Run `work` in a child that gets SIGKILL after its `at`-th sync point. False: it ended before that."""
    child = os.fork()
    if child == 0:
        left = at

        def wrap(call: Callable[..., object]) -> Callable[..., object]:
            def counted(*args: object, **options: object) -> object:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return call(*args, **options)

            return counted

        for name in SYNC_POINTS:
            setattr(os, name, wrap(getattr(os, name)))
        try:
            work()
        except BaseException:  # noqa: BLE001 - the child must not return into pytest
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def fresh_folder(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


CUTS = [5, 12, 13]
# The commit protocol is one for every format; npy has the most files, and takes 75 s here.
KINDS = [pytest.param(one, marks=pytest.mark.slow) if one[1] == "npy" else one for one in OUTPUTS]
# Each kind of output is killed at other points, a fifth of them; the long tests take them all.
STRIDES = pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])


def first_point(out: str, stride: int) -> int:
    kind = next(n for n, (name, _) in enumerate(OUTPUTS) if out.endswith(f"/{name}"))
    return kind % stride


@pytest.fixture(params=KINDS, ids=["parquet-file", "jsonl-file", "parquet-folder", "npy-folder"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """(output, format)"""
    out, format_name = request.param
    (tmp_path / "run").mkdir()
    return f"{tmp_path}/run/{out}", format_name


@STRIDES
def test_first_run_killed_anywhere(target: tuple[str, str], stride: int) -> None:
    out, format_name = target
    folder = Path(out).parent
    at = first_point(out, stride)
    while True:
        fresh_folder(folder)
        was_killed = killed(lambda: write(out, spec(format_name), CUTS), at)
        if was_killed and any(folder.iterdir()):
            check_readable(out, format_name, [expected(13)])
        write(out, spec(format_name), CUTS)
        assert read_rows(out, format_name) == expected(13)
        check_signatures(out, format_name, 13)
        assert leftovers(folder) == []
        if not was_killed:
            break
        at += stride
    assert at > 30


@STRIDES
@pytest.mark.parametrize("mode", ["update", "overwrite"])
def test_replacing_run_killed_anywhere(target: tuple[str, str], mode: Mode, stride: int, tmp_path: Path) -> None:
    """Until it is replaced, the old output is whole; afterwards the new one is."""
    out, format_name = target
    write(out, spec(format_name), CUTS)
    folder, saved = Path(out).parent, tmp_path / "saved"
    shutil.copytree(folder, saved)
    at = first_point(out, stride)
    while True:
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)
        run = spec(format_name, inputs="b")
        was_killed = killed(lambda run=run: write(out, run, [6, 14], mode, value=100), at)  # type: ignore[misc]
        check_readable(out, format_name, [expected(13), expected(14, 100)])
        write(out, run, [6, 14], mode, value=100)
        assert read_rows(out, format_name) == expected(14, 100)
        check_signatures(out, format_name, 14)
        assert leftovers(folder) == []
        if not was_killed:
            break
        at += stride
    assert at > 30


def check_readable(out: str, format_name: str, runs: list[Rows]) -> None:
    """What looks finished to other programs holds the rows of one run; mmcli says the same."""
    finished = os.path.exists(f"{out}_SUCCESS.json" if out.endswith("/") else out)
    if finished:
        assert read_rows(out, format_name) in runs
    try:
        info = read_output(out)
    except ConfigError:
        assert not finished
        return
    assert finished or not info.complete


def check_signatures(out: str, format_name: str, rows: int) -> None:
    found = pq.read_table(Place.of(out, format_name).signatures).column("signature").to_pylist()
    assert found == [None if is_error(row) else signature_of(row) for row in range(rows)]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    output=st.sampled_from(OUTPUTS),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    kills=st.lists(st.integers(0, 60), max_size=3),
)
def test_killed_again_and_again(
    tmp_path: Path, output: tuple[str, str], sizes: list[int], kills: list[int]
) -> None:
    """Any parts, any number of kills: acknowledged rows stay, and the end is the same."""
    folder = fresh_folder(tmp_path / "run")
    out, format_name = f"{folder}/{output[0]}", output[1]
    cuts = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    for at in kills:
        acknowledged = folder.parent / "acknowledged"
        acknowledged.unlink(missing_ok=True)

        def run_and_tell(to: Path = acknowledged) -> None:
            for stop in cuts:
                write(out, spec(format_name), [c for c in cuts if c <= stop], finalise=False)
                to.write_text(str(stop))
            write(out, spec(format_name), cuts)

        killed(run_and_tell, at)
        if acknowledged.exists():
            assert read_output(out).rows >= int(acknowledged.read_text())
    write(out, spec(format_name), cuts)
    assert read_rows(out, format_name) == expected(cuts[-1])
    assert leftovers(folder) == []
