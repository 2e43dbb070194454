"""mmcli beside what people write by hand, on the same files, model and machine, in alternating whole processes.

    python benchmarks/peers.py images --model DIR [--count 2000] [--rounds 3]
    python benchmarks/peers.py texts  --model DIR [--count 5000] [--rounds 3]

Each side is timed from its start to its exit, with its imports, and writes its vectors to disk. Vectors of both
sides are compared. Peers:

    transformers           the checkpoint's own processor and model, in a torch DataLoader with a worker per core
    sentence-transformers  SentenceTransformer(DIR).encode, for directories that it can load
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
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

TEXT = "a small red circle above two large blue stars on the left of a grey wall near water at night"
HERE = Path(__file__).resolve().parent

OURS = [sys.executable, "-m", "mmcli", "embed"]


def make_images(folder: Path, count: int, size: tuple[int, int]) -> None:
    """JPEGs of smooth coloured noise: about the bytes and the decoding time of photos of that size."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        small = generator.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:06d}.jpg", quality=88)


def make_texts(path: Path, count: int) -> None:
    """Texts of 1 to 120 words, most of them short, as JSONL."""
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(count):
            words = generator.choice(TEXT.split(), min(120, 1 + int(generator.exponential(18))))
            file.write(json.dumps({"text": " ".join(words)}) + "\n")


def timed(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


def commands(kind: str, peer: str, data: Path, model: str, work: Path) -> dict[str, tuple[list[str], Path]]:
    """Name -> (command, what it writes), of both sides."""
    ours = work / "mmcli.parquet"
    theirs = work / f"{peer}.npy"
    script = HERE / "peer_scripts.py"
    return {
        "mmcli": (
            [*OURS, str(data), "-m", model, "-o", str(ours), "--overwrite", "--quiet"],
            ours,
        ),
        peer: ([sys.executable, str(script), peer, kind, str(data), model, str(theirs)], theirs),
    }


def vectors(path: Path) -> np.ndarray:
    """[n, D], each of unit length."""
    if path.suffix == ".npy":
        found = np.load(path)
    else:
        column = pq.read_table(path, columns=["embedding"]).column(0).combine_chunks()
        found = column.flatten().to_numpy().reshape(len(column), -1)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def compare(kind: str, peer: str, data: Path, model: str, count: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sides = commands(kind, peer, data, model, Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            # The order alternates, so that a machine that gets slower favours nobody.
            for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
                seconds[name].append(timed(sides[name][0]))
        ours, theirs = (vectors(path) for _, path in sides.values())
        cosine = float((ours * theirs).sum(axis=1).min())
    for name, times in seconds.items():
        rates = sorted(count / t for t in times)
        print(f"{name:24} {statistics.median(rates):8.1f} rows/s   ({rates[0]:.1f} to {rates[-1]:.1f})")
    ratio = statistics.median(seconds[peer]) / statistics.median(seconds["mmcli"])
    print(f"{'ratio':24} {ratio:8.2f}          least cosine between the two: {cosine:.6f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["images", "texts"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--peer", choices=["transformers", "sentence-transformers"], default="transformers")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--size", default="640x480", help="of pictures")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    width, _, height = options.size.partition("x")
    with tempfile.TemporaryDirectory() as folder:
        if options.kind == "images":
            data = Path(folder) / "images"
            make_images(data, options.count, (int(width), int(height)))
        else:
            data = Path(folder) / "texts.jsonl"
            make_texts(data, options.count)
        print(f"{options.count} {options.kind}, {options.model}, {os.cpu_count()} cores, {options.rounds} rounds")
        compare(options.kind, options.peer, data, options.model, options.count, options.rounds)


if __name__ == "__main__":
    main()
