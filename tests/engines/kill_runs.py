"""Real processes that get real signals, again and again until one is left to finish."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

# What a process ends with when the signal comes: by its own handler, or before Python has one.
ENDS = {
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {143, -signal.SIGTERM},
    # 1: while Python imports its own start-up modules.
    signal.SIGINT: {130, -signal.SIGINT, 1},
}
FINISHED = 3  # there are error rows


def make_inputs(folder: Path) -> None:
    """400 rows of a manifest, 14 of them bad, then 23 files, two of them damaged; and six solved examples."""
    lines = []
    for i in range(400):
        text = json.dumps({"text": f"text number {i} " + "x" * (i * 37 % 50)})
        lines.append('{"text": ' if i % 97 == 5 else '{"text": null}' if i % 89 == 7 else text)
    (folder / "texts.jsonl").write_text("\n".join(lines))
    media = folder / "media"
    media.mkdir()
    for i in range(20):
        Image.new("RGB", (4 + i, 5), (i, 2 * i, 3)).save(media / f"p{i:02d}.png")
    (media / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnot")
    (media / "empty.jpg").touch()
    (media / "t.txt").write_text("a text")
    for label in ("cat", "dog"):
        (folder / "solved" / label).mkdir(parents=True)
        for i in range(3):
            (folder / "solved" / label / f"{i}.txt").write_text(f"{label} number {i}")


@dataclass
class Tally:
    """What the signals met."""

    kills: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    tracebacks: list[str] = field(default_factory=list)


class Trial:
    """One command, killed at random moments of its life, then left to finish."""

    def __init__(
        self, folder: Path, inputs: Path, name: str, seed: int, workers: int, task: tuple[str, ...]
    ) -> None:
        self.folder, self.name = folder, name
        self.rng = random.Random(seed)
        folder.mkdir()
        # In every second trial batches are computed beside one another.
        model = f"fake:8,ms=10,both={1 + 2 * (seed % 2)}"
        self.command = [
            *[sys.executable, "-m", "mmcli", *task, "texts.jsonl", "media", "-m", model],
            *["-o", str(folder / name), "--batch-size", "8", "--part-rows", str(self.rng.choice([9, 23, 50]))],
            *["--num-workers", str(workers)],
        ]
        self.inputs = inputs
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command, cwd=self.inputs, env=self.environment, stderr=subprocess.PIPE, text=True
        )

    def finish(self) -> float:
        """Run to the end; returns the seconds that it took."""
        start = time.perf_counter()
        process = self.start()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == FINISHED, errors
        return time.perf_counter() - start

    def kill(self, life_s: float, tally: Tally, complete: dict[str, bytes]) -> bool:
        """One signal at a random moment; returns whether the process was still there."""
        process = self.start()
        number = self.rng.choice(list(ENDS))
        try:
            process.wait(self.rng.uniform(0, life_s))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        if process.returncode == FINISHED:
            self.check(complete)
            return False
        assert process.returncode in ENDS[number], (process.returncode, errors)
        assert process.returncode != 1 or errors.rstrip().endswith("KeyboardInterrupt"), errors
        if "Traceback" in errors and "/mmcli/" in errors:
            tally.tracebacks.append(errors)
        tally.kills[number.name] += 1
        tally.found[self.state()] += 1
        if (self.folder / self.name).exists():
            # The name appears when the output is complete, and not before.
            assert self.content()[self.name] == complete[self.name]
        return True

    def state(self) -> str:
        """What the killed process has left."""
        staging = self.folder / f"{self.name}.mmcli"
        if (self.folder / self.name).exists():
            return "complete"
        if (staging / "final").exists():
            return "finalising"
        if list(staging.glob("part-*")):
            return "parts"
        return "staging" if staging.exists() else "nothing"

    def check(self, complete: dict[str, bytes]) -> None:
        """Every file is that of an undisturbed run, and nothing else is left."""
        content = self.content()
        assert content.keys() == complete.keys(), (self.command, sorted(content), sorted(complete))
        assert [p.name for p in self.folder.iterdir() if p.is_dir()] == []
        for name, data in content.items():
            assert data == complete[name], f"{self.command}: {name} differs:\n{differences(data, complete[name])}"

    def content(self) -> dict[str, bytes]:
        """Every file of the output's folder, byte for byte; without staging."""
        return {p.name: p.read_bytes() for p in self.folder.iterdir() if p.is_file()}


def differences(found: bytes, wanted: bytes) -> str:
    """Rows that differ, of Parquet or JSON lines."""
    if found.startswith(b"PAR1"):
        pairs = [pq.read_table(io.BytesIO(data)).to_pylist() for data in (found, wanted)]
    else:
        pairs = [data.splitlines() for data in (found, wanted)]
    return "\n".join(f"{a}\n{b}" for a, b in zip_longest(*pairs) if a != b)


def torture(
    folder: Path,
    names: list[str],
    kills: int,
    seed: int,
    workers_of: tuple[int, ...] = (0,),
    task: tuple[str, ...] = ("embed",),
) -> Tally:
    """At least `kills` signals to runs of all `names`; each output must be that of an undisturbed run.

    `workers_of`: numbers of decode workers that trials take in turn; `task`: the command and its own options.
    """
    rng = random.Random(seed)
    inputs = folder / "inputs"
    inputs.mkdir()
    make_inputs(inputs)
    complete, life = {}, {}
    for name in names:
        for workers in set(workers_of):
            reference = Trial(folder / f"{name}-{workers}", inputs, name, seed, workers, task)
            life[name, workers] = reference.finish()
            complete.setdefault(name, reference.content())
            assert reference.content() == complete[name]
    tally = Tally()
    trial = 0
    while tally.kills.total() < kills:
        name, workers = names[trial % len(names)], workers_of[trial // len(names) % len(workers_of)]
        run = Trial(folder / f"trial{trial}", inputs, name, seed + trial, workers, task)
        for _ in range(rng.randint(1, 3)):
            if not run.kill(life[name, workers], tally, complete[name]):
                break
        run.finish()
        run.check(complete[name])
        trial += 1
    return tally
