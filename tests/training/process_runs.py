"""Trainings in the processes of torchrun: what tests/training/test_devices.py starts.

    torchrun --nproc-per-node 2 process_runs.py FOLDER

FOLDER/runs.json: name -> arguments of mmcli, or ["fusion", ...], or ["fsdp", arguments of mmcli ...]; each process
leaves FOLDER/RANK.json: name -> (exit code, what it said).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "models"))


def train_fusion(run: str, *bases: str) -> int:
    """Of rows that lack one medium or the other; no option takes a fusion's dropout away."""
    from test_fusion_training import network_of, rows_of
    from training_runs import trainer_of

    from mmcli.training.classify import Classify
    from mmcli.training.devices import open_devices
    from mmcli.training.options import TrainOptions

    devices = open_devices("cpu")
    folder = Path(run)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    rows = devices.first(lambda: rows_of(folder / "images", 17))
    options = TrainOptions(
        epochs=2, batch_size=4, learning_rate=0.1, optimizer="sgd", accumulation=2, average_best=2
    )
    network = network_of(dict(zip(("text", "image"), map(Path, bases), strict=True)))
    objective: Any = Classify(replace(network, unimodal_heads=True), unimodal_loss=0.5)
    trainer_of(folder, objective, rows[:13], rows[11:], options, devices=devices).train()
    return 0


def run(arguments: list[str]) -> tuple[int, str]:
    """Exit code, and what was said."""
    from mmcli.cli.boundary import run as mmcli

    said = io.StringIO()
    # As accelerate launch --use_fsdp says it.
    sharded = arguments[0] == "fsdp"
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        os.environ[name] = "true" if sharded else "false"
    arguments = arguments[1:] if sharded else arguments
    with contextlib.redirect_stderr(said):
        code = train_fusion(*arguments[1:]) if arguments[0] == "fusion" else mmcli(arguments)
    return code, said.getvalue()


def main(folder: Path) -> None:
    found = {}
    for name, arguments in json.loads((folder / "runs.json").read_text()).items():
        found[name] = run(arguments)
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
