"""Small things to learn, and runs that learn them."""

from __future__ import annotations

import json
import os
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmcli.core.records import Media, Modality
from mmcli.models.checkpoint import open_checkpoint
from mmcli.models.options import ModelOptions
from mmcli.training.classify import Classify, EncoderNetwork, classification_plan
from mmcli.training.data import Row, Rows
from mmcli.training.devices import Devices
from mmcli.training.loop import Data, Events, RunLimits, Trainer
from mmcli.training.options import TrainOptions

LABELS = ("cat", "dog", "red")
COLOURS = {"cat": (200, 40, 40), "dog": (40, 200, 40), "red": (40, 40, 200)}


_STILL = {
    "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout", "hidden_dropout",
    "activation_dropout", "mask_time_prob", "layerdrop", "final_dropout", "seq_classif_dropout", "dropout_rate",
    "classifier_dropout", "feat_proj_dropout", "drop_path_rate", "drop_connect_rate", "projection_dropout_prob",
    "attn_pdrop", "embd_pdrop", "resid_pdrop",
}  # fmt: skip


def still(folder: Path) -> Path:
    """A checkpoint whose training draws nothing."""

    def stilled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: 0.0 if key in _STILL else stilled(inner) for key, inner in value.items()}

    config = stilled(json.loads((folder / "config.json").read_text()))
    config |= dict.fromkeys(("mask_time_prob", "layerdrop"), 0.0) | {"apply_spec_augment": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def text_rows(count: int, seed: int = 0) -> list[Row]:
    """Texts that name their label among other words."""
    generator = np.random.default_rng(seed)
    words = ["a", "the", "photo", "of", "circle"]
    rows = []
    for number in range(count):
        target = int(generator.integers(len(LABELS)))
        said = [*generator.choice(words, int(generator.integers(1, 9))), LABELS[target]]
        generator.shuffle(said)
        rows.append(Row(f"text {number}", (Media("text", text=" ".join(said)),), target))
    return rows


def image_files(folder: Path, count: int, seed: int = 0) -> Path:
    """Noisy pictures of three colours, in a folder for each label."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        label = LABELS[number % len(LABELS)]
        (folder / label).mkdir(parents=True, exist_ok=True)
        height, width = generator.integers(30, 50, 2)
        pixels = np.array(COLOURS[label]) + generator.integers(-40, 40, (height, width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / label / f"{number}.png")
    return folder


def image_rows(folder: Path) -> list[Row]:
    files = sorted(folder.rglob("*.png"))
    return [Row(f.name, (Media("image", file=str(f)),), LABELS.index(f.parent.name)) for f in files]


def sound_rows(folder: Path, count: int, seed: int = 0) -> list[Row]:
    """Tones of three pitches and many lengths."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        target = number % len(LABELS)
        time = np.arange(int(generator.integers(2000, 6000))) / 16_000
        tone = 0.3 * np.sin(2 * np.pi * (300 + 500 * target) * time) + 0.05 * generator.standard_normal(len(time))
        file = folder / f"{number}.wav"
        with wave.open(str(file), "wb") as sound:
            sound.setparams((1, 2, 16_000, 0, "NONE", ""))
            sound.writeframes((tone * 32767).astype(np.int16).tobytes())
        rows.append(Row(file.name, (Media("audio", file=str(file)),), target))
    return rows


def objective_of(folder: Path, modality: Modality | None = None, **options: Any) -> Classify:
    given = ModelOptions(str(folder), device="cpu")
    return Classify(EncoderNetwork(classification_plan(open_checkpoint(given), given, LABELS, modality)), **options)


def trainer_of(
    run: Path,
    objective: Classify,
    train: Sequence[Row],
    val: Sequence[Row],
    options: TrainOptions,
    stop: Any = None,
    told: Any = None,
    augment: Any = None,
    devices: Devices | None = None,
    **limits: Any,
) -> Trainer:
    run.mkdir(parents=True, exist_ok=True)
    data = Data(Rows(train, objective.plan, options.seed, augment), Rows(val, objective.plan, options.seed))
    events = Events(told or (lambda line: None), stop or (lambda: None))
    settings = RunLimits(**{"num_workers": 0, **limits})
    # Of several processes each would need a GPU of its own.
    device = torch.device("cpu" if devices else os.environ.get("MMCLI_TEST_DEVICE", "cpu"))
    return Trainer(run, objective, data, options, settings, events, device, devices or Devices())
