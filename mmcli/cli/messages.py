"""What is said on stderr while a run goes on: notes, progress, summary. stdout belongs to the data."""

from __future__ import annotations

import json
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from mmcli.cli.boundary import Outcome, say
from mmcli.core.errors import OutputError, one_line
from mmcli.core.report import Report

# On a terminal the line is redrawn; in a log file or under cron a line each 30 s is enough.
TERMINAL_S, PLAIN_S = 0.25, 30.0
# What limits a run, by the lane of its report.
LIMITS = {
    "read": "reading the list of inputs",
    "decode": "decoding",
    "collate": "collating batches",
    "model": "the model",
    "post": "making rows of what the model gives",
    "write": "writing",
    "transport": "passing rows between processes",
}
# Shares of lanes that are hardly ever busy are told from here on.
WORTH_SAYING = 0.2


class Messages:
    """Lines for a person on stderr, and in --log-file with the time."""

    def __init__(self, *, quiet: bool = False, log_file: Path | None = None) -> None:
        self._quiet = quiet
        try:
            self._log = open(log_file, "a", encoding="utf-8") if log_file else None  # noqa: SIM115
        except OSError as error:
            raise OutputError(f"--log-file {log_file}: {error.strerror}") from error

    def note(self, text: str) -> None:
        """A line that --quiet silences."""
        line = one_line(text, 2000)
        if not self._quiet:
            say(line)
        self.log(line)

    def log(self, line: str) -> None:
        if self._log is not None:
            print(datetime.now().astimezone().isoformat(timespec="seconds"), line, file=self._log, flush=True)

    def summary(
        self, report: Report, output: str, *, as_json: bool, outcome: Outcome, advice: str | None = None
    ) -> None:
        """The last words: a few lines for a person, and one JSON line with --json."""
        if report.done or report.resumed or outcome.reason is None:
            for line in summary_lines(report, output, advice):
                self.note(line)
        data: dict[str, Any] = {"output": output, "exit_code": outcome.exit_code, "error": outcome.reason}
        data["advice"] = advice
        text = json.dumps({**data, **report.to_dict()})
        if as_json:
            say(text)
        self.log(text)

    def progress(self, report: Report) -> Progress:
        return Progress(report, self, enabled=not self._quiet)

    def training_progress(self) -> TrainingProgress:
        return TrainingProgress(self, enabled=not self._quiet)


class Progress:
    """A thread that shows how far a Report is, while the `with` block runs."""

    def __init__(self, report: Report, messages: Messages, *, enabled: bool) -> None:
        self._report, self._messages, self._enabled = report, messages, enabled
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, name="mmcli-progress", daemon=True)

    def __enter__(self) -> Progress:
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._enabled:
            self._thread.join()

    def _show(self) -> None:
        if self._terminal:
            self._show_bar()
            return
        while not self._stop.wait(PLAIN_S):
            self._messages.note(progress_line(self._report))

    def _show_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bar

        # The text comes from numbers only, but markup stays off: nothing here may be read as such.
        columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}", markup=False))
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("loading the model", total=self._report.rows_total)
            while not self._stop.wait(TERMINAL_S):
                done = self._report.done + self._report.resumed
                text = progress_line(self._report) if done else "loading the model"
                bar.update(task, completed=done, description=text)


class TrainingProgress:
    """How far a training run is, while the `with` block runs: a bar on a terminal; else a line now and then.

    Each evaluation has a line of its own, that stays.
    """

    def __init__(self, messages: Messages, *, enabled: bool) -> None:
        self._messages = messages
        self._bar: Any = None
        self._task: Any = None
        self._shown = enabled and sys.stderr is not None and sys.stderr.isatty()
        self._first: tuple[int, float] | None = None
        self._last, self._loss = time.monotonic(), ""

    def __enter__(self) -> TrainingProgress:
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("loading the model", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def told(self, line: dict[str, Any]) -> None:
        """A line of the log."""
        text = ", ".join(
            f"{name.replace('_', ' ').replace('rows per s', 'rows/s')} {value:.4g}"
            for name, value in line.items()
            if name not in ("step", "epoch", "grad_norm")
        )
        if "loss" in line:
            self._loss = text
            if self._bar is not None or time.monotonic() - self._last < PLAIN_S:
                return
            self._last = time.monotonic()
        self._messages.note(f"step {line['step']}, epoch {line['epoch']:.2f}: {text}")

    def stepped(self, step: int, steps: int) -> None:
        """After each step."""
        if self._bar is None:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        before, began = self._first
        parts = [f"step {step:,} of {steps:,}", self._loss.replace(", ", " · ")]
        if step > before:
            parts.append(f"ETA {_duration((steps - step) * (now - began) / (step - before))}")
        self._bar.update(self._task, completed=step, total=steps, description=" · ".join(filter(None, parts)))


def progress_line(report: Report) -> str:
    """`1,200 of 10,000 rows · 240/s · 3 errors · ETA 0:36 · busy: decode 40 + processor 12 %, ...`"""
    done = report.done + report.resumed
    total = report.rows_total
    rate = _recent_rate(report)
    parts = [f"{done:,} of {total:,} rows" if total is not None else f"{done:,} rows", f"{written_rate(rate)}/s"]
    if report.error_rows:
        parts.append(_errors(report))
    if total is not None and rate > 0:
        parts.append(f"ETA {_duration((total - done) / rate)}")
    return " · ".join([*parts, split(report)])


def _recent_rate(report: Report) -> float:
    """Rows a second, once it runs without the time that loading the model took."""
    running = report.wall_s - (report.first_result_s or 0.0)
    return report.done / max(running if running > 5 else report.wall_s, 1e-9)


def summary_lines(report: Report, output: str, advice: str | None = None) -> list[str]:
    """A few lines: what was done, how fast, what limited it and what would change that, which errors."""
    rows = report.done + report.resumed
    facts = [f"{rows:,} row{'' if rows == 1 else 's'}", f"{rows - report.error_rows:,} ok"]
    if report.error_rows:
        codes = ", ".join(f"{n:,} {code}" for code, n in report.errors.most_common())
        facts.append(f"{_errors(report)} ({codes})")
    if report.resumed:
        facts.append(f"{report.resumed:,} of them from before")
    if report.reused:
        facts.append(f"{report.reused:,} reused")
    lines = [f"{'stdout' if output == '-' else output}: {', '.join(facts)}"]
    if not report.done:
        return lines
    rate = report.done / max(report.wall_s, 1e-9)
    steady = report.steady()
    running = f" ({written_rate(steady[0] / steady[1])} once running)" if steady is not None else ""
    lines.append(f"{_duration(report.wall_s)}, {written_rate(rate)} rows/s{running} · {split(report)}")
    if limit := report.limited_by():
        lines.append(f"limited by {LIMITS[limit]}" + (f": {advice}" if advice else ""))
    return lines


# What stages are called, where it is not their name.
SAID = {"process": "processor", "post": "results"}


def split(report: Report) -> str:
    """How long each lane was busy, in shares of the wall time: they work at the same time, so these add up to more.

    `busy: decode 61 + processor 30 % of 2 workers, model 97 %, write 2 %; cores 98 %`
    """
    shares = report.shares()
    decode = " + ".join(f"{SAID.get(s, s)} {_percent(v)}" for s, v in shares["decode"].items())
    workers = report.num_workers
    said = [f"{decode} %" + (f" of {workers} workers" if workers > 1 else "")]
    for lane in ("read", "collate", "model", "post", "write"):
        share = sum(shares[lane].values())
        if lane in ("model", "write") or share >= WORTH_SAYING:
            said.append(f"{SAID.get(lane, lane)} {_percent(share)} %")
    return f"busy: {', '.join(said)}; cores {_percent(report.cores_busy())} %"


def _percent(share: float) -> int:
    return min(100, round(100 * share))


def _errors(report: Report) -> str:
    return f"{report.error_rows:,} error{'' if report.error_rows == 1 else 's'}"


def written_rate(rate: float) -> str:
    """Rows a second."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
