"""Everything once on a machine with a GPU: ceilings, whole runs, and peers, for all cases in some minutes.

    python benchmarks/gpu.py [--cases vit-b-32 ...] [--rounds 2] [--scale 10] [--dtype bfloat16] [--time 8s]

For each case `mmcli bench` says how fast decoding alone, the model alone and a whole run are; then whole processes
are compared as peers.py does it. SCALE times the inputs of a case: what two cores take a minute for, a GPU does in
seconds. On a CPU it runs too, which is how it is tried out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from peer_data import CASES
from peers import compare, sides

# Those that are at hand wherever mmcli is.
PEERS = {"images": ["loop", "pipeline"], "texts": ["loop", "pipeline"], "audio": ["loop"], "video": ["loop"]}


def machine() -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{device}, {os.cpu_count()} cores, torch {torch.__version__}"


def ceilings(data: Path, model: Path, dtype: str, time: str) -> dict[str, object]:
    """What `mmcli bench --json` says."""
    command = [sys.executable, "-m", "mmcli", "bench", str(data), "-m", str(model), "--dtype", dtype]
    done = subprocess.run([*command, "--time", time, "--json"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, object] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--scale", type=float, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--time", default="8s")
    options = parser.parse_args()
    options.python, options.options = sys.executable, []
    print(machine(), flush=True)
    for name in options.cases:
        case = CASES[name]
        count = max(64, int(case.count * options.scale))
        with tempfile.TemporaryDirectory() as folder:
            data, model = case.write(Path(folder), count)
            print(f"\n{name}: {count} rows, {options.dtype}", flush=True)
            print(json.dumps(ceilings(data, model, options.dtype, options.time)), flush=True)
            for peer in PEERS[case.kind]:
                compare(sides(peer, case.kind, data, str(model), Path(folder), options), count, options.rounds)


if __name__ == "__main__":
    main()
