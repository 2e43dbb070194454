"""Spoken digits, learned from raw audio and random weights by the configuration of sample_data.

python -m pytest -m slow -n 0 -s tests/training/test_digits.py     # four trainings of 2 to 3 minutes of a core
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmcli.cli.boundary import run as mmcli

SPEAKERS = ("george", "jackson", "nicolas")


def learned(sample_data: Path, train: Path, val: Path, folder: Path) -> float:
    """Accuracy of what the command has learned, by `mmcli classify` on the validation rows."""
    config = sample_data / "configs" / "digits"
    model, given = ("-m", config), ("--config", config / "train.toml", "--num-workers", 0)
    command = ("finetune", train, "--val", val, *model, *given, "-o", folder / "run")
    assert mmcli([str(one) for one in command]) == 0
    out, keep = folder / "labels.jsonl", ("--keep", "truth=label") if val.is_file() else ()
    assert mmcli([str(o) for o in ("classify", val, "-m", folder / "run" / "best", *keep, "-o", out)]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    right = [row["label"] == row.get("truth", row["id"].split("/")[0]) for row in rows]
    told = json.loads((folder / "run" / "run.json").read_text())
    assert told["best"] == pytest.approx(np.mean(right))
    return float(np.mean(right))


def of_speakers(digits: Path, wanted: Callable[[str], bool], path: Path) -> Path:
    """A manifest of all recordings of some speakers."""
    files = [file for file in sorted(digits.rglob("*.wav")) if wanted(file.name.split("_")[1])]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("audio", "label"), *((str(one), one.parent.name) for one in files)])
    return path


@pytest.mark.slow
def test_new_recordings_of_known_speakers(sample_data: Path, shared_data: Path, tmp_path: Path) -> None:
    digits = shared_data / "audio" / "digits"
    accuracy = learned(sample_data, digits / "train", digits / "test", tmp_path)
    print(f"\naccuracy on the test split, 90 recordings: {accuracy:.3f}")
    assert accuracy >= 0.9


@pytest.mark.slow
def test_new_speakers(sample_data: Path, shared_data: Path, tmp_path: Path) -> None:
    """Each of the three by what the other two have taught: far from what known speakers get."""
    digits, found = shared_data / "audio" / "digits", {}
    for speaker in SPEAKERS:
        folder = tmp_path / speaker
        folder.mkdir()
        others = of_speakers(digits, lambda name, one=speaker: name != one, folder / "others.csv")
        own = of_speakers(digits, lambda name, one=speaker: name == one, folder / "own.csv")
        found[speaker] = learned(sample_data, others, own, folder)
    values = list(found.values())
    print(f"\naccuracy on speakers that training lacks: {found}, mean {np.mean(values):.3f}")
    assert np.mean(values) >= 0.45
