"""mmcli beside what people use today, on the same files, model and machine, in alternating whole processes.

    python benchmarks/peers.py CASE PEER [--count N] [--rounds 5] [--dtype bfloat16] [--model DIR] [--python PYTHON]

CASE    small-jpeg, camera-jpeg: a cheap CLIP, reading limits; vit-b-32: CLIP of that size, the model limits;
        short-texts, mixed-texts: a BERT of MiniLM's size; speech: a small Wav2Vec2; video: a small VideoMAE.
        All inputs are generated, and all models, with random weights, unless --model names another.
PEER    loop: the checkpoint's own processor and model in a torch DataLoader with a worker per core
        pipeline: transformers' pipeline, as its documentation has it
        sentence-transformers: SentenceTransformer(DIR).encode
        open_clip: its model and preprocessing in such a DataLoader (vit-b-32)
        clip-retrieval: its inference command (--python of an environment that has it, with transformers 5)

Each side is timed from its start to its exit with its imports, and from its first batch on; both write their
vectors to disk, and these are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from peer_data import CASES

HERE = Path(__file__).resolve().parent


@dataclass
class Timing:
    """Seconds of a whole process, and rows a second after its first batch."""

    whole: float
    steady: float


@dataclass
class Side:
    """One of both: its name, its command, what it writes."""

    name: str
    command: list[str]
    out: Path

    def run(self, count: int) -> Timing:
        """Once, from start to exit."""
        start = time.perf_counter()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
        done = subprocess.run(self.command, capture_output=True, text=True, env=environment)
        whole = time.perf_counter() - start
        if done.returncode != 0:
            sys.exit(f"{' '.join(self.command)} failed with {done.returncode}:\n{done.stderr[-2000:]}")
        if self.name != "mmcli":
            told = [line for line in done.stdout.splitlines() if line.startswith("steady ")]
            return Timing(whole, float(told[0].split()[1]))
        report = json.loads(done.stderr.splitlines()[-1])
        batch = -(-count // report["batches"])
        return Timing(whole, (count - batch) / (report["wall_s"] - report["first_result_s"]))


def sides(
    peers: list[str], kind: str, data: Path, model: str, work: Path, options: argparse.Namespace
) -> list[Side]:
    """mmcli, and each of the peers."""
    ours = work / "mmcli.parquet"
    command = [sys.executable, "-m", "mmcli", "embed", str(data), "-m", model, "-o", str(ours), "--overwrite"]
    command += ["--json", "--quiet", "--dtype", options.dtype, *options.options]
    script = str(HERE / "peer_scripts.py")
    found = [Side("mmcli", command, ours)]
    for peer in peers:
        theirs = work / f"{peer}.npy"
        other = [options.python, script, peer, kind, str(data), model, str(theirs), options.dtype]
        found.append(Side(peer, other, theirs))
    return found


def vectors(path: Path) -> np.ndarray:
    """[n, D], each of unit length."""
    if path.suffix == ".npy":
        found = np.load(path)
    else:
        column = pq.read_table(path, columns=["embedding"]).column(0).combine_chunks()
        found = column.flatten().to_numpy().reshape(len(column), -1)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def compare(every: list[Side], count: int, rounds: int) -> None:
    """All sides in turn, the first of which is ours; prints rates, ratios, and how near the outputs are."""
    timings: dict[str, list[Timing]] = {side.name: [] for side in every}
    for number in range(rounds):
        # The order alternates, so that a machine that gets slower favours nobody.
        for side in every[:: 1 if number % 2 == 0 else -1]:
            timings[side.name].append(side.run(count))
    for name, found in timings.items():
        whole, steady = sorted(count / t.whole for t in found), sorted(t.steady for t in found)
        print(f"{name:22} rows/s: whole {_rates(whole)}, steady {_rates(steady)}")
    ours = every[0]
    for theirs in every[1:]:
        pairs = list(zip(timings[ours.name], timings[theirs.name], strict=True))
        whole = sorted(t.whole / o.whole for o, t in pairs)
        steady = sorted(o.steady / t.steady for o, t in pairs if t.steady)
        of_steady = _rates(steady) if steady else "not measured"
        print(f"to {theirs.name:19} whole {_rates(whole)}, steady {of_steady}, {_agreement(ours.out, theirs.out)}")
    sys.stdout.flush()


def _agreement(ours: Path, theirs: Path) -> str:
    a, b = vectors(ours), vectors(theirs)
    return f"least cosine {(a * b).sum(axis=1).min():.6f}" if a.shape == b.shape else f"{a.shape} and {b.shape}"


def _rates(rates: list[float]) -> str:
    return f"{statistics.median(rates):.2f} ({rates[0]:.2f} to {rates[-1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("peer", nargs="+")
    parser.add_argument("--model")
    parser.add_argument("--count", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--python", default=sys.executable, help="of the peer")
    parser.add_argument("--options", nargs="*", default=[], help="more of mmcli embed")
    options = parser.parse_args()
    case = CASES[options.case]
    count = options.count or case.count
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data, made = case.write(work, count)
        model = options.model or str(made)
        print(f"{options.case}: {count} rows, {options.dtype}, {os.cpu_count()} cores, {options.rounds} rounds")
        compare(sides(options.peer, case.kind, data, model, work, options), count, options.rounds)


if __name__ == "__main__":
    main()
