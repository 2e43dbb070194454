"""Everything once on a machine with a GPU: ceilings, whole runs, and peers, for all cases in some minutes.

    python benchmarks/gpu.py [--cases vit-b-32 ...] [--rounds 2] [--dtypes float32 bfloat16] [--peers loop ...]

For each case `mmcli bench` says how fast decoding alone, the model alone and a whole run are; then whole processes
are compared as peers.py does it, in each dtype. There are more inputs than peers.py has: what two cores take a
minute for, a GPU does in seconds. --scale 0.01 is how it is tried out on a CPU. What `mmcli bench` measured is in
--json FILE too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peer_data import CASES
from peers import compare, sides

# Of each kind of inputs, those of --peers that can do it.
PEERS = {
    "images": ["loop", "pipeline", "open_clip", "clip-retrieval"],
    "texts": ["loop", "pipeline", "sentence-transformers"],
    "audio": ["loop"],
    "video": ["loop"],
}
COUNTS = {
    "small-jpeg": 20_000,
    "camera-jpeg": 2_000,
    "vit-b-32": 20_000,
    "short-texts": 100_000,
    "mixed-texts": 50_000,
    "speech": 4_000,
    "video": 1_500,
}


def machine() -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{device}, {os.cpu_count()} cores, torch {torch.__version__}"


def ceilings(data: Path, model: Path, dtype: str, time: str) -> dict[str, Any]:
    """What `mmcli bench --json` says."""
    command = [sys.executable, "-m", "mmcli", "bench", str(data), "-m", str(model), "--dtype", dtype]
    done = subprocess.run([*command, "--time", time, "--json"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def in_short(found: dict[str, Any]) -> str:
    """Rows a second, and what share of the slower of decoding and the model a run reaches."""
    run = found["end_to_end"]
    decode, model = (found[name]["rows_per_s"] for name in ("decode", "model_only"))
    rates = f"decode {decode:.0f}, model {model:.0f}, run {run['rows_per_s']:.0f} rows/s"
    steady = run["steady_rows_per_s"] or 0.0
    shares = f"{found['ratio_to_slower']:.2f} of the slower, {found['ratio']:.2f} of the ceiling"
    return f"{'ceilings':22} {rates}: {shares}; once it runs {steady:.0f}: {steady / min(decode, model):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--time", default="4s", help="of mmcli bench; 0: none")
    parser.add_argument("--peers", nargs="*", default=["loop"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.python, options.options = sys.executable, []
    print(machine(), flush=True)
    for name in options.cases:
        case = CASES[name]
        count = max(64, int(COUNTS[name] * options.scale))
        with tempfile.TemporaryDirectory() as folder:
            data, model = case.write(Path(folder), count)
            for dtype in options.dtypes:
                options.dtype = dtype
                print(f"\n{name}: {count} rows, {dtype}", flush=True)
                if options.time != "0":
                    found = ceilings(data, model, dtype, options.time)
                    print(in_short(found), flush=True)
                    if options.json is not None:
                        with options.json.open("a") as file:
                            file.write(json.dumps({"case": name, **found}) + "\n")
                peers = [peer for peer in options.peers if peer in PEERS[case.kind]]
                if peers:
                    compare(sides(peers, case.kind, data, str(model), Path(folder), options), count, options.rounds)


if __name__ == "__main__":
    main()
