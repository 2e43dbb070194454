"""How soon mmcli answers: its help, and the first row of a small job beside loading the model by hand.

    python benchmarks/startup.py [MODEL ...] [--rounds 5]

Wall seconds, from the start of a process. The reference is a process that imports torch and transformers and calls
`AutoModel.from_pretrained`, and does nothing with the model; mmcli embeds 20 pictures to stdout, and its first line
counts. Both in turn; medians, with the least and the most. MODEL: the CLIP of sample_data, when none is given.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

SAMPLE = Path(__file__).resolve().parent.parent / "sample_data" / "models" / "clip"
LOAD = """
import sys
import torch
from transformers import AutoModel
AutoModel.from_pretrained(sys.argv[1])
print("loaded", flush=True)
"""
MMCLI = [sys.executable, "-m", "mmcli"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def until_first_line(command: list[str]) -> float:
    """Seconds from the start of a process to its first line on stdout."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    seconds = time.perf_counter() - start
    _, errors = process.communicate()
    if process.returncode or not line:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{errors}")
    return seconds


def until_end(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=ENVIRONMENT)
    return time.perf_counter() - start


def said(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def in_turn(rounds: int, *sides: Callable[[], float]) -> list[list[float]]:
    """The seconds of each side; every second round begins with the last one."""
    found: list[list[float]] = [[] for _ in sides]
    for number in range(rounds):
        order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
        for side in order:
            found[side].append(sides[side]())
    return found


def pictures(folder: Path, count: int = 20) -> None:
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480)).save(folder / f"{number:02}.jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[str(SAMPLE)], metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} cores")
    python, help_ = in_turn(
        10, lambda: until_end([sys.executable, "-c", "pass"]), lambda: until_end([*MMCLI, "--help"])
    )
    print(f"mmcli --help: {said(help_)}; Python alone: {said(python)}")
    with tempfile.TemporaryDirectory() as folder:
        pictures(Path(folder))
        for model in arguments.models:
            load = partial(until_first_line, [sys.executable, "-c", LOAD, model])
            embed = partial(until_first_line, [*MMCLI, "embed", folder, "-m", model, "--quiet"])
            # Once, so that files are in the page cache for both.
            load()
            loaded, first = in_turn(arguments.rounds, load, embed)
            ratios = [ours / theirs for ours, theirs in zip(first, loaded, strict=True)]
            print(f"{model}: first row after {said(first)}; torch and the model alone {said(loaded)}")
            print(f"  ratio of a round: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
