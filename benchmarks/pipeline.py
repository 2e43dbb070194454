"""What the pipeline itself costs: a million tiny inputs through a model without weights.

    python benchmarks/pipeline.py --kind png --rows 1000000
    python benchmarks/pipeline.py --kind text --rows 10000000
    python benchmarks/pipeline.py --cost [--kind text]

Prints rows per second, the split by stage, and the memory of the main process and of the decode workers as the
run goes on. Pictures are PNGs of 8x8 and 16x16 pixels, inline in a Parquet manifest; texts have 10 to 60 letters.

--cost prints what a row costs at 1,000, 100,000 and 1,000,000 rows: processor time of all processes since all is
imported, less that of a run of one row (late imports, finalising), less what the row's work takes by itself, in a
bare loop in a process for each core: Pillow's decoding, and the null model's arithmetic. What remains is mmcli's
own. The start is told apart.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmcli.models.fake import FakeProcessor

GROUP_ROWS = 50_000
PART_ROWS = 50_000


def texts(count: int, start: int) -> pa.Table:
    words = ["a", "red", "blue", "green", "circle", "square", "photo", "of", "the", "small", "large", "left"]
    rng = np.random.default_rng(start)
    picks = rng.integers(0, len(words), (count, 8))
    lengths = rng.integers(1, 9, count)
    lines = [f"{start + i} " + " ".join(words[w] for w in picks[i, : lengths[i]]) for i in range(count)]
    return pa.table({"text": lines})


def pictures(count: int, start: int) -> pa.Table:
    """`count` different PNGs: encoding is the slow part, so a few thousand are made and then varied in a chunk."""
    rng = np.random.default_rng(0)
    base = []
    for i in range(2000):
        side = 8 if i % 2 else 16
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "png")
        base.append(file.getvalue())
    return pa.table({"image": pa.array([base[(start + i) % len(base)] for i in range(count)], pa.binary())})


KINDS = {"text": texts, "png": pictures}


def make_manifest(path: Path, kind: str, rows: int) -> None:
    """A Parquet manifest of `rows` rows."""
    writer = None
    for start in range(0, rows, GROUP_ROWS):
        table = KINDS[kind](min(GROUP_ROWS, rows - start), start)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def pure_decode_s(rows: int = 20_000) -> float:
    """Seconds that Pillow alone takes for a picture of the benchmark, on one core."""
    data = pictures(2000, 0).column("image").to_pylist()
    start = time.perf_counter()
    for i in range(rows):
        np.asarray(Image.open(io.BytesIO(data[i % 2000])).convert("RGB"))
    return (time.perf_counter() - start) / rows


def bare_s(kind: str) -> float:
    """Processor seconds of one row's work alone, in a loop, in as many processes as a run has workers."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(len(os.sched_getaffinity(0))) as pool:
        return statistics.mean(pool.map(_bare_s, [kind] * len(os.sched_getaffinity(0)), chunksize=1))


def _bare_s(kind: str) -> float:
    process = FakeProcessor(8, obey=False)
    rows = KINDS[kind](2000, 0).column(0).to_pylist()
    best = 1e9
    for _ in range(8):
        start = time.process_time()
        for value in rows:
            if kind == "png":
                process("image", np.asarray(Image.open(io.BytesIO(value)).convert("RGB")))
            else:
                process("text", value)
        best = min(best, time.process_time() - start)
    return best / len(rows)


class Spent(NamedTuple):
    """Of one run. Processor seconds of the main process until the first row is read, and from then on, and of the
    workers; wall seconds of all, and until the first row was decoded."""

    start: float
    main: float
    workers: float
    wall: float
    until_first: float


def spent(manifest: Path, scratch: Path) -> Spent:
    out = scratch / f"out-{time.monotonic_ns()}.parquet"
    report, _, _ = run(manifest, out, ["--part-rows", str(PART_ROWS)])
    out.unlink()
    cpu = report["cpu_s"]
    return Spent(
        cpu["start"], cpu["main"] - cpu["start"], cpu["workers"], report["wall_s"], report["first_decoded_s"]
    )


def cost(kind: str, folder: Path, sizes: list[int], repeats: int) -> None:
    """Print the table: the least of several runs of each size, since whatever else the machine does only adds."""
    print(f"{kind}, load {os.getloadavg()[0]:.1f}")
    alone = bare_s(kind) * 1e6
    manifests = {rows: folder / f"{kind}-{rows}.parquet" for rows in (1, *sizes)}
    for rows, path in manifests.items():
        if not path.exists():
            make_manifest(path, kind, rows)
    one = least([spent(manifests[1], folder) for _ in range(repeats)])
    print(f"start: {one.start:.2f} s of processor time, first row after {one.until_first:.2f} s")
    print(f"a row's work alone: {alone:.1f} us")
    for rows in sizes:
        found = least([spent(manifests[rows], folder) for _ in range(repeats if rows < 1_000_000 else 1)])
        main, workers = (
            (x - y) / (rows - 1) * 1e6 for x, y in ((found.main, one.main), (found.workers, one.workers))
        )
        per_s = rows / (found.wall - found.until_first)
        print(
            f"{rows:>9,} rows: main {main:.1f} us + workers {workers:.1f} us a row; "
            f"mmcli's own {main + workers - alone:.1f} us; {per_s:,.0f} rows/s"
        )


def least(runs: list[Spent]) -> Spent:
    return Spent(*map(min, zip(*runs, strict=True)))


@dataclass
class Memory:
    """Resident MB, sampled: (rows committed, main process, decode processes); their processor seconds."""

    samples: list[tuple[int, float, float]] = field(default_factory=list)
    main_cpu_s: float = 0.0
    workers_cpu_s: float = 0.0

    def near(self, rows: int) -> tuple[int, float, float] | None:
        """The largest of the samples around this many rows: one part more or less."""
        around = [s for s in self.samples if abs(s[0] - rows) <= PART_ROWS]
        return max(around, key=lambda s: s[1]) if around else None


def resident_mb(pid: int) -> float:
    """Proportional set size: pages that processes share count once in all."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def cpu_s(pid: int) -> float:
    """Processor seconds of a process: what the run costs, whatever else the machine is doing."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> Iterator[int]:
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            for child in file.read().split():
                yield int(child)
                yield from descendants(int(child))


def run(manifest: Path, out: Path, options: list[str]) -> tuple[dict, Memory, float]:
    """Run mmcli; returns its JSON report, the memory over time, and wall seconds."""
    command = [sys.executable, "-m", "mmcli", "embed", str(manifest), "-m", "fake:8", "-o", str(out), "--json"]
    start = time.perf_counter()
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    memory = Memory()
    staging = out.with_name(out.name + ".mmcli")
    while process.poll() is None:
        time.sleep(0.2)
        try:
            parts = len(list(staging.glob("part-*.parquet")))
            workers = sum(resident_mb(child) for child in descendants(process.pid))
            memory.samples.append((parts * PART_ROWS, resident_mb(process.pid), workers))
            memory.main_cpu_s = cpu_s(process.pid)
            memory.workers_cpu_s = max(memory.workers_cpu_s, sum(cpu_s(c) for c in descendants(process.pid)))
        except OSError:
            continue
    assert process.stderr is not None
    errors = process.stderr.read()
    wall = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"mmcli ended with {process.returncode}:\n{errors}")
    return json.loads(errors.strip().splitlines()[-1]), memory, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="text")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--cost", action="store_true", help="what a row costs, at several sizes")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1000, 100_000, 1_000_000], help="of --cost")
    parser.add_argument("--repeats", type=int, default=5, help="of --cost; a million rows run once")
    parser.add_argument("--folder", type=Path, help="keep the manifest here, for the next time")
    parser.add_argument("options", nargs="*", help="of mmcli embed, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        if arguments.cost:
            cost(arguments.kind, folder, arguments.sizes, arguments.repeats)
            return
        manifest = folder / f"{arguments.kind}-{arguments.rows}.parquet"
        if not manifest.exists():
            make_manifest(manifest, arguments.kind, arguments.rows)
        options = [*arguments.options, "--part-rows", str(PART_ROWS)]
        report, memory, wall = run(manifest, Path(scratch) / "out.parquet", options)
    print(f"{arguments.kind}: {report['rows']:,} rows in {wall:.1f} s: {report['rows'] / wall:,.0f} rows/s")
    costs = [seconds / report["rows"] * 1e6 for seconds in (memory.main_cpu_s, memory.workers_cpu_s)]
    print("processor time a row: main process {:.1f} us, decode processes {:.1f} us".format(*costs))
    print("seconds by stage:", ", ".join(f"{k} {v:.1f}" for k, v in report["seconds"].items()))
    steps = [r for r in (100_000, 500_000, *range(1_000_000, 100_000_000, 1_000_000)) if r < arguments.rows]
    for rows in steps:
        if near := memory.near(rows):
            print(f"memory at {rows:>10,} rows: main {near[1]:.0f} MB, decode processes {near[2]:.0f} MB")
    last = [s for s in memory.samples if s[0] >= arguments.rows - PART_ROWS]
    print(f"memory at the end, finalising: main {max((s[1] for s in last), default=0):.0f} MB")
    if arguments.kind == "png":
        pure = pure_decode_s()
        print(f"Pillow alone: {pure * 1e6:.0f} us a picture, {1 / pure:,.0f} rows/s on one core")


if __name__ == "__main__":
    main()
