"""The training configurations of sample_data start as they are, and so do architectures without weights."""

from __future__ import annotations

import json
import shutil
import tomllib
import wave
from pathlib import Path

import numpy as np
import pytest

from mmcli.cli.boundary import run as mmcli


def spoken(folder: Path, seconds: float, number: int) -> None:
    """A tone as a telephone would record it."""
    folder.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(8000 * seconds)) / 8000
    samples = (8000 * np.sin(2 * np.pi * (300 + 400 * number) * time)).astype("<i2")
    with wave.open(str(folder / f"{seconds}.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(samples.tobytes())


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Two labels of three sounds; the shortest have fewer frames than SpecAugment masks at once."""
    for number in range(2):
        for seconds in (0.12, 0.4, 0.8):
            spoken(tmp_path / "sounds" / str(number), seconds, number)
    return tmp_path / "sounds"


def start(sample_data: Path, name: str, rows: Path, run: Path, *more: object) -> int:
    config = sample_data / "configs" / name
    model = config if (config / "config.json").is_file() else sample_data / "models" / name
    told = ("--config", config / "train.toml", "-m", model, "--max-steps", 2, "--num-workers", 0, "--quiet")
    return mmcli([str(one) for one in ("finetune", rows, "--val", rows, "-o", run, *told, *more)])


def test_digits_start_from_their_configuration(sample_data: Path, sounds: Path, tmp_path: Path) -> None:
    """Without weights; with sounds shorter than a mask; and what comes out loads."""
    assert start(sample_data, "digits", sounds, tmp_path / "run") == 0
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (told["complete"], told["steps"]) == (True, 2)
    classified = tmp_path / "labels.jsonl"
    assert mmcli(["classify", str(sounds), "-m", str(tmp_path / "run" / "best"), "-o", str(classified)]) == 0
    assert {json.loads(line)["label"] for line in classified.read_text().splitlines()} <= {"0", "1"}


@pytest.mark.slow
def test_masks_do_not_depend_on_who_reads(sample_data: Path, sounds: Path, tmp_path: Path) -> None:
    """SpecAugment draws alike, whether rows are read in the same process or in another."""
    made = []
    for workers in (0, 1):
        assert start(sample_data, "digits", sounds, tmp_path / f"run{workers}", "--num-workers", workers) == 0
        made.append((tmp_path / f"run{workers}" / "best" / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_every_configuration_names_its_architecture(sample_data: Path) -> None:
    """As a user at the top of the repository runs it; what a script gives as `-m`, the script makes."""
    found = sorted((sample_data / "configs").glob("*/train.toml"))
    assert len(found) == 6
    for path in found:
        model = tomllib.loads(path.read_text(encoding="utf-8")).get("model")
        if model is None:
            assert (sample_data / f"train_{path.parent.name}.py").is_file(), path
        else:
            assert (sample_data.parent / model / "config.json").is_file(), path


def test_weights_are_missed_unless_from_config(
    sample_data: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(sample_data / "configs" / "digits", tmp_path / "copy")
    asked = ["finetune", str(sounds), "--val", str(sounds), "-m", str(copy), "-o", str(tmp_path / "run")]
    assert mmcli(asked) == 2
    assert "there are no weights" in capsys.readouterr().err
    assert mmcli([*asked, "--from-config", "--max-steps", "1", "--num-workers", "0", "--quiet"]) == 0
    # Nothing else takes it for a model.
    assert mmcli(["classify", str(sounds), "-m", str(copy)]) == 2


def test_reading_a_sound_draws_nothing_from_others(sample_data: Path) -> None:
    """What a model draws while it learns is not begun anew by each sound that is read in its process."""
    import torch

    from mmcli.core.records import Audio
    from mmcli.models.options import Generation, ModelOptions
    from mmcli.models.resolve import resolve_writer

    given = ModelOptions(str(sample_data / "models" / "sounds"), device="cpu")
    processor = resolve_writer(given, Generation(language="en")).open_processor()
    before = torch.get_rng_state()
    assert processor.record([("audio", Audio(np.ones(16_000, np.float32), 16_000))], ())
    assert torch.equal(torch.get_rng_state(), before)
