"""Batches: running out of memory, inputs and models that fail, outputs that are still being computed."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from engine_runs import Collected, ListSource, expected_row, plan, run_engine, text_record

from mmcli.core.errors import DeviceLost, ModelError
from mmcli.core.records import Sample
from mmcli.core.report import Report
from mmcli.engines.batching import BatchSize
from mmcli.engines.forward import PROBE_AFTER, UNPROVEN_FAILURES, Forward
from mmcli.models.fake import FakePlan, FakeRunner


class Batch(np.ndarray):
    """An array that a weak reference can watch."""


@dataclass
class Log:
    """What happened to the runner, in order; `alive`: batches that nobody should keep."""

    sizes: list[int] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    batches: list[weakref.ref[Any]] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Watched:
    """The fake model with a runner of one's own around it."""

    inner: FakePlan
    runner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def load(self) -> Any:
        return self.runner


class Watching(FakeRunner):
    """Logs sizes and threads. `elements`: the device holds n x longest up to that."""

    def __init__(self, model: FakePlan, log: Log, elements: int | None = None) -> None:
        super().__init__(model)
        self.log, self.elements = log, elements

    def collate(self, samples):
        self.log.threads.add(threading.current_thread().name)
        batch = super().collate(samples).view(Batch)
        batch.longest = max(s.length for s in samples)
        return batch

    def forward(self, batch):
        self.log.sizes.append(len(batch))
        failed = [b() for b in self.log.batches]
        self.log.kept.append(sum(b is not None for b in failed))
        if self.elements is not None and len(batch) * batch.longest > self.elements:
            self.log.batches.append(weakref.ref(batch))
            raise MemoryError
        return np.asarray(super().forward(batch))


def texts(count: int, length=lambda i: 8):
    return [text_record(i, f"{i:04d}".ljust(length(i), "x")) for i in range(count)]


def run_watched(records, runner_of, batch_size=32, window=None, tokens=None, **options):
    model, log = plan(**options), Log()
    output = Collected()
    watched = Watched(model, runner_of(model, log))
    report = run_engine(ListSource(records), output, watched, batch_size=batch_size, window=window, tokens=tokens)
    assert output.rows() == [expected_row(r) for r in records]
    return log, report


# -- memory ----------------------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_batch_once_and_for_all():
    log, report = run_watched(texts(512), Watching, batch_size=64, oom=5)
    # 64 fails, then 32, 16 and 8; from then on nothing larger than 4 is tried.
    assert [s for s in log.sizes if s > 5] == [64, 32, 16, 8]
    assert report.oom_halvings == 4
    assert set(log.sizes[4:]) == {4}


def test_one_long_input_does_not_make_the_batches_of_short_ones_small():
    records = texts(256, length=lambda i: 1000 if i == 100 else 10)
    log, report = run_watched(records, lambda m, log: Watching(m, log, elements=2000), batch_size=32)
    assert report.oom_halvings == 4
    # The long one is in memory with one other; all others go on by 32.
    assert log.sizes.count(32) >= 7


def test_batches_of_texts_have_a_number_of_tokens():
    """Padded to the longest: one of 1,000 alone, and short ones many at once, whatever the batch size says."""
    records = [text_record(0, "x" * 1000)] + [text_record(i, "x" * 30) for i in range(1, 64)]
    log, report = run_watched(records, Watching, batch_size=8, window=64, tokens=300)
    assert log.sizes == [1, *[10] * 6, 3]
    assert report.oom_halvings == 0


def test_each_modality_has_its_own_batch_size():
    forward = Forward(FakeRunner(plan()), Report(), BatchSize(8, tokens=300, audio=1000))
    pixels, sound = np.zeros((3, 100), np.uint8), np.zeros(100, np.float32)
    assert forward.max_cost(Sample("text", {}, length=100)) == 3
    assert forward.max_cost(Sample("text", {"vector": sound})) == 8, "all of one shape"
    assert forward.max_cost(Sample("image", {"pixel_values": pixels})) == 8
    mask = np.ones(100, np.int64)
    assert forward.max_cost(Sample("audio", {"input_values": sound, "attention_mask": mask}, length=100)) == 2
    assert forward.max_cost(Sample("audio", {"input_values": sound.repeat(9)}, length=900)) == 1
    assert forward.max_cost(Sample("audio", {"input_features": sound})) == 8, "all of one shape"


def test_batches_of_texts_that_memory_does_not_hold():
    log, report = run_watched(texts(256), Watching, batch_size=8, window=256, tokens=100_000, oom=40)
    assert report.oom_halvings == 3
    assert max(log.sizes[3:]) <= 40


def test_an_input_too_large_for_the_device_is_a_row():
    records = texts(20, length=lambda i: 3000 if i == 7 else 10)
    output, model, log = Collected(), plan(), Log()
    runner = Watching(model, log, elements=2000)
    report = run_engine(ListSource(records), output, Watched(model, runner), batch_size=8)
    assert [code for _, code, _ in output.rows()] == [None] * 7 + ["oom"] + [None] * 12
    assert report.errors == {"oom": 1}


def test_an_input_too_large_for_the_device_is_a_row_even_alone():
    output, model = Collected(), plan()
    run_engine(ListSource(texts(1)), output, Watched(model, Watching(model, Log(), elements=1)))
    assert [code for _, code, _ in output.rows()] == ["oom"]


def test_nothing_of_a_failed_batch_stays_in_memory():
    gc.disable()
    try:
        log, _ = run_watched(texts(128), lambda m, log: Watching(m, log, elements=50), batch_size=64)
    finally:
        gc.enable()
    assert log.batches
    assert set(log.kept) == {0}


# -- failing models --------------------------------------------------------------------------------------------


def test_a_model_that_fails_on_some_inputs_costs_their_rows():
    records = [text_record(i, "fail" if i in (0, 1, 5, 63) else f"text {i}") for i in range(64)]
    log, report = run_watched(records, Watching, batch_size=16)
    assert report.errors == {"invalid_output": 4}
    assert len(log.sizes) < 64


def test_more_inputs_in_a_row_that_fail_than_it_takes_to_ask_whether_the_model_works():
    bad = 5 * PROBE_AFTER
    records = [text_record(i, "fail" if i < bad else f"{i}") for i in range(bad + 20)]
    _, report = run_watched(records, Watching, batch_size=8, window=8)
    assert report.errors == {"invalid_output": bad}
    records = [text_record(i, "fail" if i >= 20 else f"{i}") for i in range(bad + 20)]
    _, report = run_watched(records, Watching, batch_size=8, window=8)
    assert report.errors == {"invalid_output": bad}


@pytest.mark.parametrize("count", [1, 3, 40, 2 * UNPROVEN_FAILURES])
def test_a_model_that_fails_on_all_inputs_ends_the_run_and_no_row_is_committed(count):
    output = Collected()
    with pytest.raises(ModelError, match="told to fail"):
        run_engine(ListSource([text_record(i, "fail") for i in range(count)]), output, batch_size=16)
    assert output.committed == 0


def test_the_last_input_of_a_resumed_run_may_fail():
    records = [text_record(0, "good"), text_record(1, "fail")]
    output = Collected(fail_at=1)
    with pytest.raises(OSError, match="disk full"):
        run_engine(ListSource(records), output, batch_size=1, window=1, parts=parts_of(1))
    output.fail_at = None
    run_engine(ListSource(records), output, batch_size=1, window=1)
    assert output.rows() == [expected_row(r) for r in records]


def parts_of(rows: int):
    from mmcli.engines.writer import PartLimits

    return PartLimits(rows=rows)


class Breaking(Watching):
    """A device that is lost after some batches: from then on everything fails."""

    def forward(self, batch):
        if len(self.log.sizes) >= 5:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().forward(batch)


def test_a_device_that_is_lost_ends_the_run_without_an_error_row():
    records, output, model = texts(1000), Collected(), plan()
    with pytest.raises(ModelError, match=r"stopped working: .*illegal memory access") as caught:
        run_engine(ListSource(records), output, Watched(model, Breaking(model, Log())), batch_size=8, window=8)
    assert "same command" in (caught.value.hint or "")
    assert output.rows() == [expected_row(r) for r in records[: output.committed]]
    assert output.committed == 40
    run_engine(ListSource(records), output)
    assert output.rows() == [expected_row(r) for r in records]


def test_a_device_that_has_failed_for_good_is_not_asked_again():
    import torch

    log = Log()

    class Lost(Watching):
        def forward(self, batch):
            if len(self.log.sizes) >= 5:
                self.log.sizes.append(0)
                raise torch.AcceleratorError("CUDA error: device-side assert triggered\nand what else torch says")
            return super().forward(batch)

    records, output, model = texts(1000), Collected(), plan()
    with pytest.raises(DeviceLost, match=r"the device failed: CUDA error: device-side assert triggered$") as caught:
        run_engine(ListSource(records), output, Watched(model, Lost(model, log)), batch_size=8, window=8)
    assert "--device cpu" in (caught.value.hint or "")
    assert log.sizes == [8] * 5 + [0]
    assert output.rows() == [expected_row(r) for r in records[: output.committed]]
    assert output.committed == 40


@pytest.mark.parametrize("change", [lambda o: o[:-1], lambda o: np.concatenate([o, o[:1]]), lambda o: o[:0]])
def test_another_number_of_outputs_than_inputs_is_loud(change):
    class Wrong(Watching):
        def forward(self, batch):
            return change(super().forward(batch))

    model, output = plan(), Collected()
    with pytest.raises(ModelError, match=r"the model gave \d+ outputs for 8 inputs"):
        run_engine(ListSource(texts(20)), output, Watched(model, Wrong(model, Log())), batch_size=8)
    assert output.committed == 0


def test_an_error_of_the_collate_thread_is_that_of_its_row():
    class Picky(Watching):
        def collate(self, samples):
            if any(s.length == 11 for s in samples):
                raise ValueError("cannot pad 11")
            return super().collate(samples)

    model, output = plan(), Collected()
    records = texts(30, length=lambda i: 11 if i == 13 else 8)
    run_engine(ListSource(records), output, Watched(model, Picky(model, Log())), batch_size=8)
    assert [i for i, (_, code, _) in enumerate(output.rows()) if code] == [13]


def test_what_the_model_says_is_fatal_ends_the_run_from_the_collate_thread_too():
    class Fatal(Watching):
        def collate(self, samples):
            raise ModelError("no tokenizer")

    model = plan()
    with pytest.raises(ModelError, match="no tokenizer"):
        run_engine(ListSource(texts(30)), Collected(), Watched(model, Fatal(model, Log())))


# -- overlap ---------------------------------------------------------------------------------------------------


def test_collating_happens_in_a_thread_of_its_own():
    log, _ = run_watched(texts(64), Watching, batch_size=8)
    assert log.threads == {"mmcli-collate"}


class Lazy(Watching):
    """A device that computes while the host goes on: outputs are fetched later."""

    def forward(self, batch):
        self.log.events.append("start")
        outputs = super().forward(batch)
        return Later(outputs, self.log)


@dataclass
class Later:
    outputs: Any
    log: Log

    def result(self):
        self.log.events.append("wait")
        time.sleep(0.002)
        if np.isinf(self.outputs).any():
            raise RuntimeError("found out late")
        return self.outputs


def test_the_next_batch_is_started_before_one_is_waited_for():
    log, report = run_watched(texts(256), Lazy, batch_size=8)
    assert log.events.count("start") == log.events.count("wait") == report.batches == 32
    ahead = 0
    most = 0
    for event in log.events:
        ahead += 1 if event == "start" else -1
        most = max(most, ahead)
    assert most == 2
    # Once it is running the device always has its next batch (the first ones wait for the decoder).
    assert "".join(e[0] for e in log.events).count("wsws") >= 10


def test_memory_that_runs_out_with_a_batch_in_work():
    log, report = run_watched(texts(256), Lazy, batch_size=32, oom=10)
    assert report.oom_halvings == 2
    assert max(log.sizes[4:]) == 8


def test_a_failure_that_is_found_out_late_is_its_own_row():
    class Late(Lazy):
        def __init__(self, model, log):
            super().__init__(FakePlan(model.embedding_size, model.decode), log)

    records = [text_record(i, "fail" if i == 20 else f"{i}") for i in range(64)]
    run_watched(records, Late, batch_size=8)


def test_the_report_knows_the_stages():
    report = Report()
    run_engine(ListSource(texts(300)), Collected(), plan(ms=2), batch_size=16, report=report)
    seconds = report.to_dict()["seconds"]
    assert seconds["forward"] >= 19 * 0.002
    assert {"read", "process", "collate", "forward", "post", "write"} <= seconds.keys()
    assert report.batches == 19
