"""Exactly once: however often a run is killed, the output is byte for byte that of an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest
from kill_runs import torture

NAMES = ["out.parquet", "out.jsonl"]
ASK = ("ask", "-q", "what is it?", "-q", "why=and why?", "--system", "be short", "--temperature", "0.5")
# The head is made of the examples anew whenever a run goes on.
CLASSIFY = ("classify", "--examples", "solved", "--method", "tip-adapter", "--min-score", "0.6")


def test_a_few_signals(tmp_path: Path) -> None:
    tally = torture(tmp_path, NAMES, kills=4, seed=1)
    assert tally.kills.total() >= 4


@pytest.mark.slow
def test_a_few_signals_to_answers(tmp_path: Path) -> None:
    tally = torture(tmp_path, NAMES, kills=4, seed=2, task=ASK)
    assert tally.kills.total() >= 4


@pytest.mark.slow
def test_a_few_signals_to_labels(tmp_path: Path) -> None:
    tally = torture(tmp_path, NAMES[:1], kills=3, seed=3, task=CLASSIFY)
    assert tally.kills.total() >= 3


@pytest.mark.slow
def test_sixty_signals_to_labels(tmp_path: Path) -> None:
    tally = torture(tmp_path, NAMES, kills=60, seed=3000, workers_of=(0, 0, 0, 1), task=CLASSIFY)
    print(dict(tally.kills), dict(tally.found), *tally.tracebacks)
    assert tally.kills.total() >= 60


@pytest.mark.slow
def test_sixty_signals_to_answers(tmp_path: Path) -> None:
    tally = torture(tmp_path, NAMES, kills=60, seed=2000, workers_of=(0, 0, 0, 1), task=ASK)
    print(dict(tally.kills), dict(tally.found), *tally.tracebacks)
    assert tally.kills.total() >= 60


@pytest.mark.slow
def test_two_hundred_signals(tmp_path: Path) -> None:
    tally = torture(tmp_path, NAMES, kills=200, seed=1000, workers_of=(0, 0, 0, 1))
    print(dict(tally.kills), dict(tally.found), *tally.tracebacks)
    assert tally.kills.total() >= 200
    # Signals have met runs before, in and after their listing (and some while they finalised: too rare to ask for).
    assert tally.found.keys() >= {"nothing", "staging", "parts"}
