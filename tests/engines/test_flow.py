"""The stages together: overlap, bounded memory, stops, budgets, live streams, rows of an earlier output."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from engine_runs import (
    Collected,
    D,
    ErrorBudget,
    ListSource,
    PartLimits,
    TextSource,
    expected_row,
    plan,
    run_engine,
    text_record,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rare import rarely

from mmcli.core.errors import (
    ErrorBudgetExceeded,
    ExitCode,
    MmcliError,
    ModelError,
    OutputError,
    RowError,
    Stopped,
    TryAgain,
)
from mmcli.core.records import Record, Sample
from mmcli.core.report import Report
from mmcli.core.signature import signature
from mmcli.engines.batching import Arrived, BatchSize
from mmcli.engines.ceilings import RepeatedSource, RepeatedTexts, formed_batches, measure_decoding
from mmcli.engines.forward import Forward
from mmcli.engines.intake import BLOCK_BYTES, BLOCK_ROWS, MAX_BYTES, TEXT_BLOCK_ROWS, Intake
from mmcli.engines.local import StopFlag
from mmcli.media.packing import pack
from mmcli.media.pool import InlineDecoder
from mmcli.models.fake import FakePlan, FakeProcessor, FakeRunner


def texts(count: int) -> list[Record]:
    return [text_record(i, f"text {i}") for i in range(count)]


def expected(records: Sequence[Record]):
    return [expected_row(r) for r in records]


@dataclass(frozen=True)
class Slow(FakePlan):
    """The fake model with a processor that takes `row_ms` a row, or pretends to give `nbytes` of model inputs."""

    row_ms: float = 0.0
    nbytes: int = 0

    def open_processor(self):
        return self.process

    def process(self, modality, payload) -> Sample:
        time.sleep(self.row_ms / 1000)
        sample = FakeProcessor(self.embedding_size, True)(modality, payload)
        if self.nbytes:
            sample.arrays["pixels"] = np.broadcast_to(np.uint8(0), (self.nbytes,))
        return sample


def slow(row_ms: float = 0.0, nbytes: int = 0, ms: float = 0.0) -> Slow:
    return Slow(D, plan().decode, ms=ms, row_ms=row_ms, nbytes=nbytes)


# -- overlap ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decode_ms", "device_ms", "workers"), [(2, 20, 0), (2.5, 10, 0), (1, 20, 0), (2, 20, 1), (4, 20, 2)]
)
def test_decoding_and_the_device_overlap_when_a_window_is_one_batch(decode_ms, device_ms, workers):
    hidden = []
    # On a busy machine a sleep may take any time: the best of three.
    while len(hidden) < 3 and max(hidden, default=0) < 0.6:
        report = Report()
        model = slow(decode_ms, ms=device_ms)
        run_engine(
            ListSource(texts(320)), Collected(), model, batch_size=8, window=8, report=report, workers=workers
        )
        device, decode = report.seconds["forward"], report.seconds["process"] / max(1, workers)
        start = (report.first_result_s or 0) if workers else 0
        # The part of the shorter one that took no time of its own; 0 when one waits for the other.
        hidden.append((device + decode - (report.wall_s - start)) / min(device, decode))
    assert max(hidden) >= 0.6


# -- memory ----------------------------------------------------------------------------------------------------


class SlowOutput(Collected):
    """Takes its time; notes how far the source was ahead of the rows that are safe."""

    def __init__(self, source: ListSource, seconds: float) -> None:
        super().__init__()
        self.source, self.seconds, self.ahead = source, seconds, 0

    def commit(self, table, start_row, signatures):
        time.sleep(self.seconds)
        self.ahead = max(self.ahead, self.source.read - self.committed)
        super().commit(table, start_row, signatures)


@pytest.mark.parametrize(("window", "workers"), [(8, 2), (32, 0), *rarely([(8, 0), (32, 2)])])
def test_the_source_is_not_read_far_ahead_of_a_slow_output(window, workers):
    source = ListSource(texts(3000))
    output = SlowOutput(source, 0.01)
    run_engine(source, output, batch_size=8, window=window, workers=workers, parts=PartLimits(rows=window))
    assert output.rows() == expected(texts(3000))
    # In front of the model, waiting for the writer, and one part being written.
    in_flight = max(2 * window + 12 * 8, (workers + 1) * 128)
    assert output.ahead <= in_flight + 64 + 6 * window


def test_large_model_inputs_are_bounded_by_their_size():
    """60 rows of 32 MB: windows are cut early, and rows wait outside although none is large when read."""
    records = texts(60)
    source = ListSource(records)

    output = Collected()
    nbytes, done, ahead = 32 * 1024 * 1024, [0], []

    class Runner(FakeRunner):
        def forward(self, batch):
            ahead.append(source.read - done[0])
            done[0] += len(batch)
            time.sleep(0.005)
            return batch

    class Model(Slow):
        def load(self):
            return Runner(self)

    model = Model(D, plan().decode, nbytes=nbytes)
    report = Report(rows_total=4)
    run_engine(source, output, model, batch_size=64, window=512, report=report)
    assert output.rows() == expected(records)
    # 256 MB in the model, 512 MB on their way, and one block of the decoder.
    assert max(ahead) <= MAX_BYTES / nbytes * 1.5 + 2
    assert report.batches == 8


# -- stops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_commits_what_is_done_and_the_next_run_goes_on(workers):
    records, output, stop, report = texts(20_000), Collected(), StopFlag(), Report()

    def ask():
        while report.done < 64:
            time.sleep(0.01)
        stop.request(ExitCode.TERMINATED)

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(Stopped) as caught:
        run_engine(ListSource(records), output, plan(ms=10), stop=stop, workers=workers, report=report)
    assert caught.value.exit_code == ExitCode.TERMINATED
    # All of them would take six seconds.
    assert 0 < output.committed < 20_000
    assert output.rows() == expected(records[: output.committed])
    run_engine(ListSource(records), output)
    assert output.rows() == expected(records)


def test_a_stop_while_a_decoder_hangs_does_not_wait_for_it():
    records = [text_record(0, "hang"), *texts(50)[1:]]
    stop = StopFlag()
    threading.Timer(0.5, stop.request, [ExitCode.INTERRUPTED]).start()
    # The decoder sleeps for days, and --sample-timeout is a minute.
    start = time.perf_counter()
    with pytest.raises(Stopped):
        run_engine(ListSource(records), Collected(), stop=stop, workers=2)
    assert time.perf_counter() - start < 30


def test_a_decoder_that_hangs_or_dies_costs_its_row():
    orders = {3: "hang", 20: "abort", 30: "segfault", 31: "exit"}
    records = [text_record(i, orders.get(i, f"text {i}")) for i in range(60)]
    output = Collected()
    run_engine(ListSource(records), output, workers=2, timeout_s=2.0)
    codes = {i: code for i, (_, code, _) in enumerate(output.rows()) if code}
    assert codes == {3: "timeout", 20: "worker_crash", 30: "worker_crash", 31: "worker_crash"}
    assert output.signatures == [signature(record) for record in records]


def test_the_time_limit_commits_what_is_done():
    records, output = texts(2000), Collected()
    with pytest.raises(TryAgain, match=r"--time-limit of 0.3 s reached"):
        run_engine(ListSource(records), output, plan(ms=10), time_limit_s=0.3)
    assert 0 < output.committed < 2000
    assert output.rows() == expected(records[: output.committed])


def test_a_run_resumed_again_and_again_computes_no_batch_of_committed_rows():
    records, output = texts(64), Collected(fail_at=0)
    batches = 0
    for _ in range(100):
        report = Report()
        try:
            run_engine(
                ListSource(records), output, batch_size=4, window=32, parts=PartLimits(rows=4), report=report
            )
            break
        except OSError:
            batches = report.batches
            output.fail_at = (output.fail_at or 0) + 1
    assert output.rows() == expected(records)
    # 64 rows are 16 batches; the last run had 4 rows to compute. Sorted by length: those of its window that share
    # a batch with them.
    assert batches < 16
    assert report.batches <= 2


# -- errors ----------------------------------------------------------------------------------------------------


@given(
    bad=st.sets(st.integers(0, 99), max_size=20), allowed=st.integers(0, 20), percent=st.none() | st.floats(0, 20)
)
@settings(max_examples=60, deadline=None)
def test_more_error_rows_than_the_budget_end_the_run(bad, allowed, percent):
    records = [text_record(i, ["raise", "nan", "fail"][i % 3] if i in bad else f"{i}") for i in range(100)]
    output = Collected()
    budget = ErrorBudget(count=allowed) if percent is None else ErrorBudget(percent=percent)
    limit = allowed if percent is None else percent
    report = Report(rows_total=100)
    if len(bad) > limit:
        with pytest.raises(ErrorBudgetExceeded, match="more than --max-errors allows"):
            run_engine(ListSource(records), output, budget=budget, report=report)
        assert report.error_rows > limit
        assert output.rows() == expected(records[: output.committed])
    else:
        run_engine(ListSource(records), output, budget=budget, report=report)
        assert output.rows() == expected(records)


def test_the_budget_ends_a_long_run_early():
    source = ListSource([text_record(i, "raise") for i in range(100_000)])
    with pytest.raises(ErrorBudgetExceeded, match=r"\d+ corrupt"):
        run_engine(source, Collected(), budget=ErrorBudget(count=10))
    assert source.read < 5000


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fail_at", [0, 3])
def test_a_failing_output_ends_the_run_and_leaves_what_is_committed(fail_at, workers):
    source = ListSource(texts(5000))
    output = Collected(fail_at=fail_at, error=OutputError("no space left"))
    with pytest.raises(OutputError, match="no space left"):
        run_engine(source, output, workers=workers, parts=PartLimits(rows=40))
    assert output.committed == 40 * fail_at
    assert source.read < 2000
    assert not [thread.name for thread in threading.enumerate() if thread.name in ("mmcli-decode", "mmcli-writer")]


def test_a_failing_output_is_told_before_the_next_part_is_full():
    source, output = ListSource(texts(6000)), Collected(fail_at=0, error=OutputError("no space left"))
    with pytest.raises(OutputError, match="no space left"):
        run_engine(source, output, plan(ms=1), parts=PartLimits(rows=2000))
    assert source.read < 3200


def test_a_part_is_committed_while_the_model_goes_on():
    """A commit takes as long as the rows of a part: together they take as long as one of them."""

    class Slow(Collected):
        def commit(self, table, start_row, signatures):
            time.sleep(0.3)
            super().commit(table, start_row, signatures)

    shares = []
    for _ in range(3):
        output, report, parts = Slow(), Report(), PartLimits(rows=240)
        run_engine(ListSource(texts(960)), output, plan(ms=3), batch_size=8, parts=parts, report=report)
        assert output.rows() == expected(texts(960))
        shares.append(report.seconds["write_wait"] / report.seconds["write"])
    assert min(shares) < 0.3


def test_a_source_that_fails_ends_the_run_and_what_came_before_is_committed():
    class Failing(ListSource):
        def records(self, start=0):
            for record in super().records(start):
                if record.row == 500:
                    raise MmcliError("the manifest is damaged at row 500")
                yield record

    output = Collected()
    with pytest.raises(MmcliError, match="damaged at row 500"):
        run_engine(Failing(texts(1000)), output)
    assert output.rows() == expected(texts(1000)[: output.committed])


# -- live streams ----------------------------------------------------------------------------------------------


class LiveSource:
    """Rows that a test feeds one by one; None is the end."""

    slots: tuple[str, ...] = ("",)
    keep = pa.schema([pa.field("number", pa.int64())])

    def __init__(self) -> None:
        self.queue: queue.Queue[Record | None] = queue.Queue()

    def records(self, start: int = 0) -> Iterator[Record]:
        while (record := self.queue.get()) is not None:
            yield record


@pytest.mark.parametrize("workers", [0, 1])
def test_each_row_of_a_live_stream_comes_out_before_the_next_goes_in(workers):
    source, output = LiveSource(), Collected(immediate=True)
    orders = ["first", "raise", "x", "fail", "nan", "last"]
    records = [text_record(i, order) for i, order in enumerate(orders)]
    runner = threading.Thread(
        target=run_engine, args=(source, output), kwargs={"workers": workers, "batch_size": 64}, daemon=True
    )
    runner.start()
    for row, record in enumerate(records):
        source.queue.put(record)
        deadline = time.monotonic() + 60
        while output.committed <= row and time.monotonic() < deadline:
            time.sleep(0.005)
        assert output.committed == row + 1, f"row {row} did not come out"
    source.queue.put(None)
    runner.join(60)
    assert not runner.is_alive()
    assert output.rows() == expected(records)


def test_a_live_stream_that_is_fast_is_batched():
    source, output = LiveSource(), Collected(immediate=True)
    records = texts(2000)
    for record in [*records, None]:
        source.queue.put(record)
    report = run_engine(source, output, batch_size=32, window=32)
    assert output.rows() == expected(records)
    assert report.batches < 90


def test_a_stop_does_not_wait_for_a_live_source():
    source, stop = LiveSource(), StopFlag()
    threading.Timer(0.2, stop.request, [ExitCode.INTERRUPTED]).start()
    late = threading.Timer(30, source.queue.put, [None])
    late.start()
    with pytest.raises(Stopped):
        run_engine(source, Collected(immediate=True), stop=stop, workers=1)
    assert late.is_alive(), "waited for the source to end"
    late.cancel()


def test_other_outputs_do_not_depend_on_when_rows_come():
    class Stalling(ListSource):
        def records(self, start=0):
            for record in super().records(start):
                time.sleep(0.12 if record.row % 7 == 3 else 0)
                yield record

    records = texts(30)
    report = run_engine(Stalling(records), Collected(), batch_size=8, window=8)
    assert report.batches == 4


# -- rows of an earlier output ---------------------------------------------------------------------------------


class Earlier:
    """Finished rows by signature, as a sink gives them."""

    def __init__(self, output: Collected) -> None:
        self._table = pa.concat_tables(output.tables)
        status = self._table.column("status").to_pylist()
        self._rows = {s: i for i, s in enumerate(output.signatures) if s and status[i] == "ok"}

    def take(self, signatures):
        found = [(i, self._rows[s]) for i, s in enumerate(signatures) if s in self._rows]
        if not found:
            return [], None
        return [i for i, _ in found], self._table.take([row for _, row in found])


ORDERS = st.lists(st.sampled_from(["a", "bb", "ccc", "raise", "nan", "fail", "d", "ok"]), max_size=40)


@given(before=ORDERS, after=ORDERS, window=st.integers(1, 30), batch_size=st.integers(1, 5), stop=st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_rows_of_an_earlier_output_are_taken_over_and_the_others_computed(before, after, window, batch_size, stop):
    def renumbered(orders):
        """Ids by content and count, so that equal inputs are recognised wherever they are."""
        seen: dict[str, int] = {}
        records = []
        for row, order in enumerate([*orders, "ok"]):
            seen[order] = seen.get(order, 0) + 1
            record = text_record(row, order)
            records.append(Record(row, f"{order}{seen[order]}", None, record.media, (1,)))
        return records

    first, output = Collected(), Collected()
    run_engine(ListSource(renumbered(before)), first)
    good = {r[0] for r in first.rows() if r[1] is None}
    records = renumbered(after)
    # Interrupted at some commit first.
    output.fail_at = stop
    for _ in range(2):
        report = Report()
        start = output.committed
        try:
            run_engine(
                ListSource(records),
                output,
                batch_size=batch_size,
                window=window,
                previous=Earlier(first),
                parts=PartLimits(rows=5),
                report=report,
            )
            break
        except OSError:
            output.fail_at = None
    assert output.rows() == expected(records)
    assert report.reused == sum(r.id in good for r in records[start:])
    assert report.done == len(records) - start


@pytest.mark.parametrize("workers", [0, 1])
def test_a_long_run_of_reused_rows_stays_bounded_and_never_locks_up(workers):
    """Every other row is reused, and windows are far smaller than what is looked up at a time."""
    count = 6000
    old = [text_record(i, f"text {i}") for i in range(count)]
    first = Collected()
    run_engine(ListSource(old), first, batch_size=64)
    records = [text_record(i, f"text {i}" if i % 2 else f"new {i}") for i in range(count)]
    source = ListSource(records)
    output = SlowOutput(source, 0.001)
    report = run_engine(
        source, output, batch_size=4, window=4, workers=workers, previous=Earlier(first), parts=PartLimits(rows=64)
    )
    assert output.rows() == expected(records)
    assert report.reused == count // 2
    assert output.ahead <= 1024 + 2 * 256 + 64


def test_rows_that_the_source_could_not_read_stay_in_their_places():
    bad = RowError("bad_row", "no", stage="source")
    records = [text_record(i, bad if i % 3 == 0 else f"text {i}") for i in range(1000)]
    output = Collected()
    run_engine(ListSource(records), output, workers=2)
    assert output.rows() == expected(records)


# Measuring (mmcli bench)


def test_a_few_inputs_again_and_again_are_decoded_in_blocks_as_large_as_those_of_many():
    sizes = []

    class Noting(InlineDecoder):
        def run(self, blocks, may_read):
            return super().run((sizes.append(len(block)) or block for block in blocks), may_read)

    model = plan()
    source = RepeatedSource(ListSource(texts(3)), rows=2000)
    found = measure_decoding(source, Noting(model, model.decode), Report(rows_total=3), keep=5)
    assert (found.rows, len(found.kept)) == (2000, 5)
    assert sum(sizes) == 2000
    # Small ones until the first have come, and the last.
    assert sizes.count(BLOCK_ROWS) * BLOCK_ROWS > 1500


@pytest.mark.parametrize(("letters", "most"), [(10, TEXT_BLOCK_ROWS), (100_000, BLOCK_BYTES // 100_000)])
def test_a_block_holds_many_short_texts_or_few_long_ones(letters, most):
    sizes = []

    class Noting(InlineDecoder):
        def run(self, blocks, may_read):
            return super().run((sizes.append(len(block)) or block for block in blocks), may_read)

    model = plan()
    source = ListSource([text_record(row, str(row).zfill(letters)) for row in range(600)])
    report = Report(rows_total=100_000)
    decoder = Noting(model, model.decode)
    intake = Intake(source, decoder, report, 0, max_rows=10**9, block_rows=TEXT_BLOCK_ROWS)
    intake.start()
    rows = []
    while (arrived := intake.get(timeout=60)) is not None:
        rows += [record.row for block in arrived for record in block.records]
    intake.close()
    assert rows == list(range(600))
    assert max(sizes) == most
    assert sum(sizes) == 600


@pytest.mark.parametrize("size", [2, 100, 1000])
@pytest.mark.parametrize(("rows", "start"), [(0, 0), (1, 0), (299, 7), (1500, 0), (1500, 700)])
def test_texts_come_over_and_over_as_columns(size, rows, start):
    """A few blocks that are kept, or more that are read anew each time."""
    records = texts(300)
    found = list(itertools.chain.from_iterable(RepeatedTexts(TextSource(records, size), rows).blocks(start)))
    assert [record.row for record in found] == list(range(start, rows))
    assert [record.id for record in found] == [f"id{row % 300}" for row in range(start, rows)]
    assert [record.media for record in found] == [records[row % 300].media for row in range(start, rows)]


def test_texts_end_when_their_time_is_over():
    found = RepeatedTexts(TextSource(texts(10), 5), seconds=0.2).blocks()
    start = time.monotonic()
    assert sum(map(len, found)) > 10
    assert time.monotonic() - start > 0.1


def test_decoding_keeps_the_first_rows_that_work_for_the_model():
    records = [text_record(i, "raise" if i % 10 in (3, 4) else f"text {i}") for i in range(200)]
    source, model = RepeatedSource(ListSource(records), rows=200), plan()
    done = measure_decoding(source, InlineDecoder(model, model.decode), Report(), keep=50, block_rows=7)
    assert done.rows == 200
    assert done.errors == {"corrupt": 40}
    kept = [
        (record.row, *outcomes)
        for block in done.kept
        for record, outcomes in zip(block.records, block.outcomes, strict=True)
    ]
    good = [i for i in range(200) if i % 10 not in (3, 4)][:50]
    assert [row for row, _ in kept] == good
    assert all(sample.length == len(records[row].media[0].text) for row, sample in kept)


def test_a_few_batches_that_are_measured_stand_for_all():
    """A run begins with the longest ones."""
    records = [text_record(i, "x") for i in range(512)]
    samples = [(Sample("text", {"input_ids": np.zeros(i + 1)}, length=i + 1),) for i in range(512)]
    starts = range(0, 512, 64)
    blocks = [one for at in starts for one in Arrived.of(records[at : at + 64], pack(samples[at : at + 64]))]
    formed = formed_batches(blocks, Forward(FakeRunner(plan()), Report(), BatchSize(8)), window=256)
    lengths = [[sample.length for sample in batch.samples] for batch in formed]
    assert sorted(itertools.chain.from_iterable(lengths)) == list(range(1, 513))
    assert all(batch[0] - batch[-1] == 7 for batch in lengths)
    # Five windows of 100 rows, and one of 12.
    cut = formed_batches(blocks, Forward(FakeRunner(plan()), Report(), BatchSize(8)), window=100)
    lengths_cut = [[sample.length for sample in batch.samples] for batch in cut]
    assert sorted(itertools.chain.from_iterable(lengths_cut)) == list(range(1, 513))
    assert sorted(map(len, lengths_cut)) == [4] * 6 + [8] * 61
    assert all({(n - 1) // 100 for n in batch} == {(batch[0] - 1) // 100} for batch in lengths_cut)
    for start in range(0, 64, 16):
        few = list(itertools.chain.from_iterable(lengths[start : start + 16]))
        assert 170 < np.mean(few) < 340


# -- batches beside one another --------------------------------------------------------------------------------


def test_batches_are_computed_beside_one_another_and_come_out_in_order():
    """Each waits for another one, and the first of all for the longest."""
    together, begun = threading.Barrier(2), itertools.count()

    class Runner(FakeRunner):
        def forward(self, batch):
            first = next(begun) == 0
            together.wait(30)
            time.sleep(0.2 if first else 0)
            return super().forward(batch)

    class Model(FakePlan):
        def load(self):
            return Runner(self)

    model, output, records = Model(D, plan().decode, both=2), Collected(), texts(64)
    report = run_engine(ListSource(records), output, model, batch_size=4, window=8)
    assert output.rows() == expected(records)
    assert report.batches == 16


@pytest.mark.parametrize("both", [1, 3])
def test_a_stop_does_not_wait_for_batches_that_have_not_begun(both):
    done = []

    class Runner(FakeRunner):
        def forward(self, batch):
            time.sleep(0.3)
            done.append(len(batch))
            return super().forward(batch)

    class Model(FakePlan):
        def load(self):
            return Runner(self)

    stop, model = StopFlag(), Model(D, plan().decode, both=both)
    threading.Timer(0.1, stop.request, [ExitCode.INTERRUPTED]).start()
    with pytest.raises(Stopped):
        run_engine(ListSource(texts(400)), Collected(), model, batch_size=4, window=8, stop=stop)
    assert len(done) <= both


def test_a_model_that_stops_working_beside_others_ends_the_run():
    """From one batch on, in the order in which they are made: threads may begin with another one first."""
    records, made = texts(200), []

    class Runner(FakeRunner):
        def collate(self, samples):
            made.append(super().collate(samples))
            return made[-1]

        def forward(self, batch):
            if not any(batch is early for early in made[:9]):
                raise RuntimeError("CUDA error")
            return super().forward(batch)

    class Model(FakePlan):
        def load(self):
            return Runner(self)

    output = Collected()
    with pytest.raises(ModelError, match="stopped working"):
        run_engine(ListSource(records), output, Model(D, plan().decode, both=3), batch_size=4, window=8)
    assert 0 < output.committed < 200
    assert output.rows() == expected(records[: output.committed])


@pytest.mark.parametrize("both", [1, 4])
def test_batches_that_share_memory_cost_no_row(both):
    """Memory for three inputs: two batches of two run out of it, and none alone."""
    lock, taken = threading.Lock(), [0]

    class Runner(FakeRunner):
        def forward(self, batch):
            with lock:
                if taken[0] + len(batch) > 3:
                    raise MemoryError
                taken[0] += len(batch)
            time.sleep(0.005)
            with lock:
                taken[0] -= len(batch)
            return super().forward(batch)

    class Model(FakePlan):
        def load(self):
            return Runner(self)

    records, output = texts(64), Collected()
    run_engine(ListSource(records), output, Model(D, plan().decode, both=both), batch_size=2, window=8)
    assert output.rows() == expected(records)
