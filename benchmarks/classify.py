"""mmcli classify on given vectors beside a script that does the same, in alternating whole processes.

    python benchmarks/classify.py [--rows 100000,1000000] [--labels 1000] [--size 512] [--rounds 3]

Random float32 vectors in a Parquet file, random unit vectors for the labels, the best five labels of each row with
margin and entropy into Parquet. The peer is what one writes by hand: batches of 8,192 rows by pyarrow, one matrix
product, softmax and topk by torch, Arrow arrays of the results, one Parquet file; it has no resuming, no error
rows and no fsync. Each side is timed from its start to its exit; peak memory is that of its process. Labels and
scores of both are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

GROUP_ROWS = 20_000
BATCH_ROWS = 8192
TOP = 5


@dataclass
class Timing:
    """Of a whole process: wall and processor seconds, peak memory in MB; seconds before its first row."""

    wall: float
    cpu: float
    peak: float
    start: float


def make_vectors(path: Path, rows: int, size: int) -> None:
    schema = pa.schema([("id", pa.string()), ("embedding", pa.list_(pa.float32(), size))])
    with pq.ParquetWriter(path, schema, use_dictionary=False, write_statistics=False, compression="none") as writer:
        for start in range(0, rows, GROUP_ROWS):
            count = min(GROUP_ROWS, rows - start)
            numbers = np.random.default_rng(start).standard_normal((count, size), dtype=np.float32)
            names = pa.array([f"images/{row:08d}.jpg" for row in range(start, start + count)])
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), size)
            writer.write_table(pa.table([names, vectors], schema=schema))


def make_labels(folder: Path, count: int, size: int) -> Path:
    """What --save-labels keeps, of a model whose vectors are random."""
    names, tiny, kept = folder / "names.txt", folder / "tiny.parquet", folder / "labels.parquet"
    names.write_text("".join(f"label {number}\n" for number in range(count)))
    make_vectors(tiny, 1, size)
    run([
        sys.executable, "-m", "mmcli", "classify", str(tiny), "--vector-column", "embedding", "-m", f"fake:{size}",
        "--labels-file", str(names), "--save-labels", str(kept), "-o", str(folder / "tiny.out.parquet"),
    ])  # fmt: skip
    return kept


# -------------------------------------------------------------------------------------------- the peer


def peer(vectors: str, labels: str, out: str) -> None:
    import torch

    kept = pq.read_table(labels)
    size = kept.schema.field("embedding").type.list_size
    weight = torch.from_numpy(kept["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, size).copy())
    scale = json.loads(kept.schema.metadata[b"mmcli.labels"])["scale"]
    names = kept["label"].combine_chunks()
    writer = None
    for batch in pq.ParquetFile(vectors).iter_batches(BATCH_ROWS):
        numbers = batch.column("embedding").flatten().to_numpy().reshape(-1, size)
        with torch.inference_mode():
            unit = torch.nn.functional.normalize(torch.from_numpy(numbers), dim=-1)
            logits = unit @ weight.T * scale
            logprobs = logits.log_softmax(dim=-1)
            entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
            best, indices = logprobs.topk(TOP, dim=-1)
            scores = best.exp()
        top = pa.StructArray.from_arrays(
            [names.take(pa.array(indices.numpy().reshape(-1))), pa.array(scores.numpy().reshape(-1))],
            ["label", "score"],
        )
        rows = pa.table({
            "id": batch.column("id"),
            "label": names.take(pa.array(indices[:, 0].numpy())),
            "score": pa.array(scores[:, 0].numpy()),
            "top_k": pa.ListArray.from_arrays(pa.array(np.arange(0, len(top) + 1, TOP, dtype=np.int32)), top),
            "margin": pa.array((scores[:, 0] - scores[:, 1]).numpy()),
            "entropy": pa.array(entropy.numpy()),
        })  # fmt: skip
        writer = writer or pq.ParquetWriter(out, rows.schema)
        writer.write_table(rows)
    if writer is not None:
        writer.close()


# ----------------------------------------------------------------------------------------- side by side


def run(command: list[str]) -> Timing:
    import time

    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        said.seek(0)
        text = said.read().decode()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} failed with {process.returncode}:\n{text[-2000:]}")
    report = json.loads(text.splitlines()[-1]) if "--json" in command else {"wall_s": wall, "first_result_s": 0.0}
    begun = wall - report["wall_s"] + report["first_result_s"]
    return Timing(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, begun)


def ours(vectors: Path, labels: Path, out: Path) -> Timing:
    command = [sys.executable, "-m", "mmcli", "classify", str(vectors), "--vector-column", "embedding", "--quiet"]
    return run([*command, "--labels-file", str(labels), "-o", str(out), "--overwrite", "--json"])


def theirs(vectors: Path, labels: Path, out: Path) -> Timing:
    return run([sys.executable, __file__, "--peer", str(vectors), str(labels), str(out)])


def compare(vectors: Path, labels: Path, rows: int, rounds: int, work: Path) -> None:
    sides = {"mmcli": ours, "script": theirs}
    timings: dict[str, list[Timing]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            timings[name].append(sides[name](vectors, labels, work / f"{name}.parquet"))
    found = {name: pq.read_table(work / f"{name}.parquet", columns=["label", "score"]) for name in sides}
    same = np.mean(found["mmcli"]["label"].to_numpy() == found["script"]["label"].to_numpy())
    off = np.abs(found["mmcli"]["score"].to_numpy() - found["script"]["score"].to_numpy()).max()
    print(f"{rows:,} rows; {same:.4%} of the labels are the same, scores differ by {off:.1e} at most")
    for name, of_side in timings.items():
        rates = sorted(rows / t.wall for t in of_side)
        steady = statistics.median((rows - rows // 50) / (t.wall - t.start) for t in of_side)
        cpu = statistics.median(t.cpu for t in of_side)
        peak = max(t.peak for t in of_side)
        more = f", {steady:,.0f} after the first" if name == "mmcli" else ""
        print(
            f"  {name:6} rows/s {statistics.median(rates):,.0f} ({rates[0]:,.0f} to {rates[-1]:,.0f}){more}; "
            f"{cpu:.1f} s of processors; peak {peak:.0f} MB",
            flush=True,
        )


def main() -> None:
    if sys.argv[1:2] == ["--peer"]:
        return peer(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="100000,1000000")
    parser.add_argument("--labels", type=int, default=1000)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        labels = make_labels(work, options.labels, options.size)
        load = os.getloadavg()[0]
        print(f"{options.labels:,} labels, {options.size} numbers, {os.cpu_count()} cores, load {load:.1f}")
        for rows in map(int, options.rows.split(",")):
            make_vectors(work / "vectors.parquet", rows, options.size)
            compare(work / "vectors.parquet", labels, rows, options.rounds, work)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
