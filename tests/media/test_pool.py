"""The supervisor: a decoder that crashes or hangs costs one row, never the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from pool_plans import Misbehaving

from mmcli.core.errors import ModelError, RowError
from mmcli.core.records import Media, Record, Sample
from mmcli.core.signature import signature
from mmcli.core.texts import TextRecords
from mmcli.media.pool import DecodePool, InlineDecoder
from mmcli.media.worker import Cell


def records(texts):
    return [Record(row, f"r{row}", None, (Media("text", text=t),)) for row, t in enumerate(texts)]


def decode(texts, block=4, workers=2, timeout_s=20.0, plan=None, columns=False):
    """Outcome of each row, in row order. `columns`: of records that are columns."""
    plan = plan or Misbehaving()
    pool = DecodePool(plan, plan.decode, workers, timeout_s)
    todo = TextRecords(0, [f"r{n}" for n in range(len(texts))], texts, "text") if columns else records(texts)
    blocks = iter([todo[i : i + block] for i in range(0, len(todo), block)])
    outcomes = {}
    try:
        for decoded in pool.run(blocks, lambda: True):
            for record, (outcome,) in zip(decoded.records, decoded.outcomes, strict=True):
                assert record.row not in outcomes
                outcomes[record.row] = outcome
    finally:
        pool.close()
    assert sorted(outcomes) == list(range(len(texts)))
    return [outcomes[row] for row in range(len(texts))]


def test_every_record_is_answered_with_its_own_sample():
    texts = [f"t:{n}" for n in range(1, 200)]
    for text, outcome in zip(texts, decode(texts), strict=True):
        assert isinstance(outcome, Sample)
        assert outcome.length == int(text.split(":")[1])
        assert set(outcome.arrays["x"]) == {len(text)}


def test_workers_compute_the_signatures_of_records():
    """Of all that a signature is of, whatever the records beside them are."""
    text, named = Media("text", text="t:3"), Media(None, text="t:4")
    todo = [
        Record(0, "a", None, (text,)),
        Record(1, "b", None, (named,)),
        Record(2, "c", "a/path.txt", (text,)),
        Record(3, "d", None, (text,), keep=(3, "x")),
        Record(4, "e", None, (text,), variables=("asked", np.arange(3, dtype=np.float32))),
        Record(5, "lone \udce9", None, (Media("text", text="\udce9"),)),
        Record(6, "f", None, (text, named)),
    ]
    wanted = [signature(record) for record in todo]
    for size in (1, 2, 7):
        plan = Misbehaving()
        pool = DecodePool(plan, plan.decode, 1, 20.0)
        pool.signs = True
        blocks = [todo[i : i + size] for i in range(0, len(todo), size)]
        for record in todo:
            record.signature = None
        try:
            assert sum(len(decoded.records) for decoded in pool.run(iter(blocks), lambda: True)) == len(todo)
        finally:
            pool.close()
        assert [record.signature for record in todo] == wanted


def test_workers_compute_the_signatures_of_texts():
    plan, todo = Misbehaving(), TextRecords(0, ["a", "b", "c"], ["t:1", "t:2", "t:3"], "text", [[1, 2, 3]])
    wanted = [signature(record) for record in todo]
    pool = DecodePool(plan, plan.decode, 1, 20.0)
    pool.signs = True
    try:
        found = [record.signature for decoded in pool.run(iter([todo]), lambda: True) for record in decoded.records]
    finally:
        pool.close()
    assert found == wanted


def test_large_arrays_come_through_shared_memory_unharmed_and_writable():
    outcomes = decode([f"x:{n}" for n in (5_000_000, 10, 0, 300_001)], block=4)
    assert [o.arrays["x"].size for o in outcomes] == [5_000_000, 10, 0, 300_001]
    outcomes[0].arrays["x"][0] = 1
    assert np.all(outcomes[3].arrays["x"] == len("x:300001"))


@pytest.mark.parametrize(
    ("crash", "columns"), [("abort", False), ("abort", True), ("segfault", False), ("exit", False)]
)
def test_a_crash_costs_one_row(crash, columns):
    texts = ["a", crash, "b", "c", "d", crash, "e"]
    outcomes = decode(texts, columns=columns)
    for text, outcome in zip(texts, outcomes, strict=True):
        if text == crash:
            assert isinstance(outcome, RowError)
            assert outcome.code == "worker_crash"
            assert outcome.stage == "decode"
        else:
            assert isinstance(outcome, Sample)
    name = {"abort": "SIGABRT", "segfault": "SIGSEGV", "exit": "exit code 7"}[crash]
    assert name in outcomes[1].message


def test_a_hang_costs_one_row():
    start = time.monotonic()
    outcomes = decode(["a", "sleep", "b", "sleep", "c"], timeout_s=2.0)
    codes = [o.code if isinstance(o, RowError) else "ok" for o in outcomes]
    assert codes == ["ok", "timeout", "ok", "timeout", "ok"]
    assert time.monotonic() - start < 120


def test_a_crash_that_does_not_repeat_costs_nothing(tmp_path):
    plan = Misbehaving(crash_once_file=str(tmp_path / "crashed"))
    outcomes = decode(["a", "once", "b"], plan=plan)
    assert all(isinstance(o, Sample) for o in outcomes)
    assert (tmp_path / "crashed").exists()


def test_exceptions_are_rows_with_one_line():
    raised, memory, fine = decode(["raise", "memory", "x"])
    assert raised.code == "corrupt"
    assert raised.message == "ZeroDivisionError: boom\\nsecond line"
    assert memory.code == "oom"
    assert isinstance(fine, Sample)


def test_every_row_may_crash_without_ending_the_run():
    outcomes = decode(["abort"] * 30, block=8)
    assert [o.code for o in outcomes] == ["worker_crash"] * 30


def test_what_a_library_prints_does_not_reach_stdout(capfd):
    decode(["print"])
    assert capfd.readouterr().out == ""


def test_a_processor_that_cannot_be_opened_is_a_model_error():
    with pytest.raises(ModelError, match="no tokenizer in this directory"):
        decode(["a"], plan=Misbehaving(broken=True))


def test_no_reading_ahead_while_the_gate_is_closed():
    plan = Misbehaving()
    pool = DecodePool(plan, plan.decode, 1, 20.0)
    read = []

    def blocks():
        for record in records(["a"] * 50):
            read.append(record.row)
            yield [record]

    try:
        finished = []
        for decoded in pool.run(blocks(), lambda: len(read) - len(finished) < 3):
            finished.append(decoded)
            assert len(read) - len(finished) < 5
    finally:
        pool.close()
    assert len(finished) == 50


def test_workers_die_with_a_killed_parent(tmp_path):
    """Even when a decoder hangs at that moment."""
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pool_plans import Misbehaving\nfrom test_pool import records\n"
        "from mmcli.media.pool import DecodePool\n"
        "plan = Misbehaving(); pool = DecodePool(plan, plan.decode, 2, 600.0)\n"
        "run = pool.run(iter([[r] for r in records(['a', 'sleep', 'a'])]), lambda: True)\n"
        "next(run); next(run)\n"
        "print(*[w.pid for w in pool._workers], pool._nursery.pid, flush=True); time.sleep(60)\n"
    )
    folder = os.path.dirname(__file__)
    child = subprocess.Popen([sys.executable, "-c", script, folder], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    pids = [int(p) for p in child.stdout.readline().split()]
    assert len(pids) == 3
    child.send_signal(signal.SIGKILL)
    child.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_a_worker_whose_parent_was_killed_before_it_began_ends():
    script = (
        "import os, time\nfrom mmcli.media.worker import die_with_parent\nparent = os.getpid()\n"
        "if os.fork():\n    os._exit(0)\n"
        "while os.getppid() == parent:\n    time.sleep(0.01)\n"
        "die_with_parent(parent); print('still there')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_inline_decoding_gives_the_same_outcomes():
    plan = Misbehaving()
    decoder = InlineDecoder(plan, plan.decode)
    todo = records(["a", "raise", "b:3"])
    (decoded,) = decoder.run(iter([todo]), lambda: True)
    kinds = [type(o).__name__ for (o,) in decoded.outcomes]
    assert kinds == ["Sample", "RowError", "Sample"]


def test_a_busy_worker_never_looks_hung() -> None:
    """What a worker is busy with is read at any moment, also while it is being written."""
    cell, descriptor = Cell.create()
    child = os.fork()
    if child == 0:
        theirs = Cell(descriptor)
        while True:
            for index in range(64):
                theirs.begin(index)
            theirs.idle()
    try:
        begun, oldest = time.monotonic(), 0.0
        while time.monotonic() < begun + 1:
            now = time.monotonic()
            index, started = cell.read()
            if index >= 0:
                oldest = max(oldest, now - started)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    # A moment that was half written would be years, one of a task before is not told apart from a busy machine.
    assert oldest < 30


def test_more_workers_than_deaths_are_suffered_may_crash_at_once():
    texts = [*["abort"] * 90, "fine"]
    outcomes = decode(texts, block=2, workers=24)
    assert [getattr(o, "code", "ok") for o in outcomes] == ["worker_crash"] * 90 + ["ok"]


def test_a_killed_nursery_is_told_as_what_it_is():
    plan = Misbehaving()
    pool = DecodePool(plan, plan.decode, 2, 20.0)
    run = pool.run(iter([[r] for r in records(["a"] * 100_000)]), lambda: True)
    next(run)
    os.kill(pool._nursery.pid, signal.SIGKILL)
    try:
        with pytest.raises(ModelError, match="out of memory"):
            list(run)
    finally:
        pool.close()
