from __future__ import annotations

import time

import pytest

from mmcli.core.report import Report


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which only moves when it is told to."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    return now


def ended(clock: list[float], **seconds: float) -> Report:
    """A run of two workers, whose lanes were busy for so long in the 10 s after the first result."""
    report = Report(num_workers=2, cores=4, started=clock[0])
    report.begin()
    clock[0] += 5
    # Until the first result the model is loaded and waited for.
    report.add("load", 4)
    report.add("wait", 5)
    report.add("decode", 3)
    report.first_result()
    for stage, value in seconds.items():
        report.add(stage, value)
    report.workers_cpu_s += 10
    report.done += 50
    clock[0] += 10
    report.end()
    clock[0] += 2  # finalising
    return report


def test_shares_are_of_the_time_after_the_first_result(clock: list[float]) -> None:
    report = ended(clock, decode=12, process=4, forward=5, transfer=1, wait=4)
    shares = report.shares()
    assert shares["decode"] == {"decode": pytest.approx(0.6), "process": pytest.approx(0.2)}
    assert shares["model"] == {"forward": pytest.approx(0.5), "transfer": pytest.approx(0.1)}
    assert (shares["post"], shares["write"]) == ({"post": 0}, {"write": 0})
    assert report.cores_busy() == pytest.approx(10 / 40)
    assert report.steady() == (50, 10)
    found = report.to_dict()
    assert found["busy"]["decode"] == {"decode": 0.6, "process": 0.2}
    assert found["steady_rows_per_s"] == 5
    assert found["seconds"] == {"load": 4, "decode": 15, "process": 4, "transfer": 1, "forward": 5}
    assert found["waited"] == {"input": 9, "writer": 0}


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("model", {"forward": 9, "wait": 1, "decode": 19}),
        ("model", {"transfer": 5, "forward": 1, "wait": 4}),
        ("decode", {"forward": 2, "wait": 8, "decode": 4, "process": 14, "read": 5}),
        ("read", {"forward": 2, "wait": 8, "decode": 4, "process": 4, "read": 9}),
        ("collate", {"forward": 2, "wait": 8, "decode": 4, "collate": 9}),
        ("transport", {"forward": 2, "wait": 8, "decode": 4, "process": 4, "read": 3}),
        ("write", {"forward": 3, "write_wait": 6, "write": 9, "post": 8, "wait": 1}),
        ("post", {"forward": 3, "write_wait": 6, "write": 2, "post": 8, "wait": 1}),
        (None, {}),
    ],
)
def test_what_limits_is_what_the_model_waits_for(
    clock: list[float], limit: str | None, seconds: dict[str, float]
) -> None:
    assert ended(clock, **seconds).limited_by() == limit


def test_a_short_run_tells_nothing(clock: list[float]) -> None:
    report = Report(started=clock[0])
    report.begin()
    clock[0] += 2
    report.first_result()
    report.add("forward", 0.5)
    clock[0] += 0.5
    report.end()
    assert report.limited_by() is None
    assert report.steady() is None
    assert report.shares()["model"]["forward"] == pytest.approx(0.2)
