"""Fusion joins what neither modality tells alone, says which one it leans on, and bears what is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dual
import tiny_encoders
import torch
from PIL import Image
from test_fusion_training import network_of
from training_runs import trainer_of

from mmcli.core.records import Media
from mmcli.evaluation.bootstrap import Resampling
from mmcli.evaluation.diagnostics import Diagnosis, DiagnosticOptions, diagnose
from mmcli.evaluation.diagnostics import Rows as Asked
from mmcli.training.classify import Classify
from mmcli.training.data import Row, Rows
from mmcli.training.fusion import recombined
from mmcli.training.log import read_metrics
from mmcli.training.options import TrainOptions

pytestmark = pytest.mark.slow

COLOURS = ((200, 40, 40), (40, 40, 200))
WORDS = ("red circle", "dog")
# (random generator) -> (bit of the picture, bit of the text, label)
Draw = Callable[[np.random.Generator], tuple[int, int, int]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "image": tiny_dual.BUILDERS["clip"](folder / "image"),
        "text": tiny_encoders.TEXTS["bert"](folder / "text"),
    }


def exclusive(generator: np.random.Generator) -> tuple[int, int, int]:
    shown, said = generator.integers(0, 2, 2)
    return int(shown), int(said), int(shown != said)


def leaning(generator: np.random.Generator) -> tuple[int, int, int]:
    """The text is right, the picture in 7 of 10."""
    label = int(generator.integers(0, 2))
    return label if generator.random() < 0.7 else 1 - label, label, label


def redundant(generator: np.random.Generator) -> tuple[int, int, int]:
    """Both are right in 9 of 10."""
    label = int(generator.integers(0, 2))
    shown, said = (label if generator.random() < 0.9 else 1 - label for _ in range(2))
    return shown, said, label


def rows_of(folder: Path, count: int, draw: Draw, seed: int, missing: float = 0.0) -> list[Row]:
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        shown, said, label = draw(generator)
        pixels = np.array(COLOURS[shown]) + generator.integers(-40, 40, (34, 34, 3))
        file = folder / f"{seed}-{number}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
        words = " ".join([*["the"] * int(generator.integers(1, 4)), WORDS[said]])
        media = [Media("image", file=str(file)), Media("text", text=words)]
        if generator.random() < 2 * missing:
            # One of two: 2 p of the rows lack one, so that p of all media are missing.
            lost = int(generator.integers(0, 2))
            media[lost] = Media(media[lost].modality)
        rows.append(Row(str(number), tuple(media), label))
    return rows


def learned(run: Path, bases: dict[str, Path], train: list[Row], val: list[Row], **options: Any) -> Any:
    """A trained model's run: (trainer, progress)."""
    settings = TrainOptions(**{"epochs": 12, "batch_size": 16, "learning_rate": 3e-4, **options})
    network = network_of(bases, hidden_size=32, num_hidden_layers=2, intermediate_size=64)
    network = replace(network, unimodal_heads=settings.unimodal_loss > 0)
    objective = Classify(network, unimodal_loss=settings.unimodal_loss)
    trainer = trainer_of(run, objective, train, val, settings)
    trainer.data.train = Rows(train, objective.plan, settings.seed, None, settings.modality_dropout)
    return trainer, trainer.train()


def diagnosed(run: Path, bases: dict[str, Path], draw: Draw, folder: Path, **options: Any) -> Diagnosis:
    train, val = rows_of(folder, 300, draw, 0), rows_of(folder, 150, draw, 1)
    trainer, _ = learned(run, bases, train, val, **options)
    model = recombined(run / "best", trainer.objective, trainer.validation_batches(), torch.device("cpu"))
    asked = Asked(("image", "text"), model.targets, model.present)
    return diagnose(model, asked, DiagnosticOptions(Resampling(300), additive_rows=100))


def test_exclusive_or_of_two_modalities(tmp_path: Path, bases: dict[str, Path]) -> None:
    found = diagnosed(
        tmp_path / "run", bases, exclusive, tmp_path / "images", epochs=25, head_lr=3.0, learning_rate=1e-3
    )
    assert found.accuracy.value is not None
    assert found.accuracy.value >= 0.95
    for one in found.modalities:
        assert one.alone.value is not None
        assert abs(one.alone.value - 0.5) < 0.12
    assert found.additive.projected.value is not None
    assert found.additive.projected.value < 0.7
    assert found.leans_on is None


def test_the_modality_that_is_leaned_on_is_named(tmp_path: Path, bases: dict[str, Path]) -> None:
    found = diagnosed(tmp_path / "run", bases, leaning, tmp_path / "images", modality_dropout=0.2)
    assert found.leans_on == "text"


def test_heads_of_one_modality_tell_what_it_is_worth(tmp_path: Path, bases: dict[str, Path]) -> None:
    """With --unimodal-loss the picture is learned too, where the text alone would explain everything."""
    train, val = (rows_of(tmp_path / "images", count, leaning, seed) for seed, count in enumerate((300, 150)))
    learned(tmp_path / "run", bases, train, val, unimodal_loss=0.5)
    lines = [line for line in read_metrics(tmp_path / "run") if "val_accuracy_image" in line]
    assert lines[-1]["val_accuracy_text"] >= 0.95
    limit = np.mean([row.target == _shown(row) for row in val])
    assert lines[-1]["val_accuracy_image"] == pytest.approx(limit, abs=0.06)


def _shown(row: Row) -> int:
    """The label that a picture of `leaning` speaks for."""
    assert row.media[0].file is not None
    red, _, blue = np.asarray(Image.open(row.media[0].file)).mean(axis=(0, 1))
    return int(blue > red)


def test_modality_dropout_bears_what_is_missing(tmp_path: Path, bases: dict[str, Path]) -> None:
    """Five seeds, 30 % of the media of validation rows missing: better with it than without, in the mean."""
    accuracies: dict[float, list[float]] = {0.0: [], 0.3: []}
    for seed in range(5):
        train = rows_of(tmp_path / "images", 200, redundant, 2 * seed)
        val = rows_of(tmp_path / "images", 150, redundant, 2 * seed + 1, missing=0.3)
        for dropout, found in accuracies.items():
            run = tmp_path / f"{seed}-{dropout}"
            _, progress = learned(run, bases, train, val, epochs=8, seed=seed, modality_dropout=dropout)
            found.append(progress.best)
    means = {dropout: (np.mean(found), np.std(found)) for dropout, found in accuracies.items()}
    print(means)
    assert means[0.3][0] > means[0.0][0]
