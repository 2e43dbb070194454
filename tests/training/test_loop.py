"""Training gives the same weights in pieces, stopped and gone on with, and what it measures is what users get."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders
import torch
from rare import rarely
from safetensors.torch import load_file
from training_runs import image_files, image_rows, objective_of, sound_rows, still, text_rows, trainer_of

from mmcli.cli.boundary import run as mmcli
from mmcli.core.errors import ConfigError, ExitCode, ModelError, Stopped
from mmcli.core.records import Audio
from mmcli.training.augment import AUGMENTS, crop, flip, noise
from mmcli.training.data import Batches, Rows, class_weights, load
from mmcli.training.optimizer import MovingAverage, groups, not_decayed, rate
from mmcli.training.options import TrainOptions
from mmcli.training.towers import freeze


def rows_of(kind: str, folder: Path, count: int) -> list[Any]:
    if kind in tiny_encoders.SOUNDS:
        return sound_rows(folder / "sounds", count)
    if kind in tiny_encoders.TEXTS:
        return text_rows(count)
    return image_rows(image_files(folder / "images", count))


BUILDERS = {**tiny_encoders.TEXTS, **tiny_encoders.IMAGES, **tiny_encoders.SOUNDS}
KINDS = ["bert", "distilbert", "modernbert", "roberta", "vit", "dinov2", "swin", "convnext", "beit",
         "audio-spectrogram-transformer", "hubert-layer", "wav2vec2-layer"]  # fmt: skip


def gradients(objective: Any, rows: list[Any], pieces: int) -> tuple[dict[str, torch.Tensor], float]:
    """Of all rows as one batch; in float64, where another order of sums does not show."""
    torch.manual_seed(0)
    objective.network = replace(objective.network, plan=replace(objective.plan, dtype="float64"))
    model = objective.build(torch.device("cpu")).double().train()

    def collate(items: Any) -> Any:
        return objective.collate(items, pieces)

    batches = Batches(len(rows), len(rows), 0)
    found = next(iter(load(Rows(rows, objective.plan, 0), batches, collate, 0)))
    loss = objective.step(model, found, objective.count(found), lambda loss: loss.backward())
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, loss


@pytest.mark.parametrize(
    "kind", rarely(KINDS, {"bert", "vit", "swin", "audio-spectrogram-transformer", "wav2vec2-layer"}.__contains__)
)
def test_a_batch_in_pieces_has_the_gradients_of_the_whole(tmp_path: Path, kind: str) -> None:
    """Of seven rows in 1, 3 and 4 pieces, which are not equally long: to 1e-6 of the largest gradient."""
    folder = still(BUILDERS[kind](tmp_path / "base"))
    rows = rows_of(kind, tmp_path, 7)
    objective = objective_of(folder)
    whole, loss = gradients(objective, rows, 1)
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    assert largest > 0
    for pieces in (3, 4):
        found, other = gradients(objective, rows, pieces)
        assert other == pytest.approx(loss, rel=1e-6)
        assert found.keys() == whole.keys()
        worst = max(float((found[name] - whole[name]).abs().max()) for name in whole)
        assert worst <= 1e-6 * largest, f"{worst / largest:.1e}"


def test_the_loss_is_the_mean_cross_entropy_of_rows(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = still(BUILDERS["bert"](tmp_path / "base"))
    objective = objective_of(folder)
    rows = text_rows(5)
    _, loss = gradients(objective, rows, 2)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer([row.media[0].text for row in rows], padding=True, return_tensors="pt")
    wanted = model(**inputs, labels=torch.tensor([row.target for row in rows])).loss
    assert loss == pytest.approx(float(wanted), rel=1e-5)


# ------------------------------------------------------------------------------------------- going on

OPTIONS = TrainOptions(epochs=3, batch_size=5, learning_rate=2e-3, eval_steps=4, ema=0.9, accumulation=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with dropout, and pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    base = tiny_encoders.IMAGES["vit"](folder / "base")
    config = json.loads((base / "config.json").read_text())
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    (base / "config.json").write_text(json.dumps({**config, **dropout}))
    return base, image_files(folder / "images", 33)


def run_of(
    run: Path, pictures: tuple[Path, Path], stop: Any = None, options: TrainOptions = OPTIONS, **limits: Any
) -> Any:
    base, images = pictures
    rows = image_rows(images)
    return trainer_of(
        run, objective_of(base), rows[:24], rows[24:], options, stop, augment=AUGMENTS["crop"], **limits
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    found, wanted = weights(one), weights(other)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, pictures: tuple[Path, Path]) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_of(run, pictures).train()
    return run


@pytest.mark.parametrize("runs", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_stopped_anywhere_ends_with_the_same_weights(
    tmp_path: Path, pictures: tuple[Path, Path], uninterrupted: Path, runs: int
) -> None:
    """Each stopped twice at random, with dropout, augmentation and a moving average: bit for bit."""
    generator, stops = random.Random(5), 0
    for number in range(runs):
        run = tmp_path / str(number)
        for _ in range(2):
            try:
                run_of(run, pictures, stop_after(generator.randrange(8))).train()
            except Stopped:
                stops += 1
        run_of(run, pictures).train()
        for name in ("best", "last"):
            assert_same_weights(run / name, uninterrupted / name)
    assert stops >= 1.5 * runs


def stop_after(steps: int) -> Callable[[], ExitCode | None]:
    asked = iter(range(1000))
    return lambda: ExitCode.INTERRUPTED if next(asked) >= steps else None


def test_workers_change_no_weight(tmp_path: Path, pictures: tuple[Path, Path], uninterrupted: Path) -> None:
    run_of(tmp_path / "run", pictures, num_workers=2).train()
    assert_same_weights(tmp_path / "run" / "last", uninterrupted / "last")


def test_another_seed_gives_other_weights(tmp_path: Path, pictures: tuple[Path, Path], uninterrupted: Path) -> None:
    run_of(tmp_path / "run", pictures, options=replace(OPTIONS, seed=1)).train()
    name = "classifier.weight"
    assert not torch.equal(weights(tmp_path / "run" / "last")[name], weights(uninterrupted / "last")[name])


@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_killed_process_loses_nothing(tmp_path: Path, pictures: tuple[Path, Path], times: int) -> None:
    """SIGKILL at random moments of a real run, workers and all; the same command goes on each time."""
    base, images = pictures
    run, whole = tmp_path / "run", tmp_path / "whole"
    common = ["finetune", str(images), "--val", str(images), "-m", str(base),
              "--epochs", "4", "--batch-size", "5", "--learning-rate", "2e-3", "--augment", "crop",
              "--eval-steps", "5", "--num-workers", "1", "--no-preflight",
              "--checkpoint-time", "0.05s"]  # fmt: skip
    assert mmcli([*common, "-o", str(whole)]) == 0
    generator, kills = random.Random(1), 0
    for _ in range(times):
        command = [sys.executable, "-m", "mmcli", *common, "-o", str(run)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 60
        while not (run / "checkpoint").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(generator.random() * 0.5)
        kills += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert mmcli([*common, "-o", str(run)]) == 0
    assert kills
    assert_same_weights(run / "last", whole / "last")
    assert_same_weights(run / "best", whole / "best")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert Counter(line["step"] for line in lines if "val_accuracy" in line).most_common(1)[0][1] == 1


# ------------------------------------------------------------------------------------- what comes of it


def test_it_learns_and_keeps_the_best(pictures: tuple[Path, Path], uninterrupted: Path) -> None:
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["val_accuracy"] for line in lines if "val_accuracy" in line}
    assert max(measured.values()) == 1.0
    assert list(measured) == [4, 8, 12, 15]


def test_the_last_model_is_the_best_where_the_last_evaluation_was(
    tmp_path: Path, pictures: tuple[Path, Path]
) -> None:
    """It is not written twice, nor does what becomes of the one change the other."""
    run = tmp_path / "run"
    run_of(run, pictures, options=replace(OPTIONS, max_steps=4)).train()
    assert_same_weights(run / "last", run / "best")
    assert {one.name for one in (run / "last").iterdir()} == {one.name for one in (run / "best").iterdir()}
    assert (run / "last" / "model.safetensors").samefile(run / "best" / "model.safetensors")
    before = weights(run / "last")
    run_of(run, pictures, options=replace(OPTIONS, max_steps=8)).train()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(run / "last").items())


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_rows(
    tmp_path: Path, pictures: tuple[Path, Path]
) -> None:
    options = replace(OPTIONS, learning_rate=1e30, max_grad_norm=None, ema=None, warmup=0.0)
    with pytest.raises(
        ModelError, match=r"the loss or its gradients are (nan|inf) at step \d+, rows \d+\.png"
    ) as raised:
        run_of(tmp_path / "run", pictures, options=options).train()
    assert "learning-rate" in str(raised.value.hint)


def test_early_stopping(tmp_path: Path, pictures: tuple[Path, Path]) -> None:
    options = replace(OPTIONS, epochs=50, patience=2, learning_rate=1e-12, ema=None)
    progress = run_of(tmp_path / "run", pictures, options=options).train()
    assert (progress.step, progress.best_step) == (12, 4)


# ------------------------------------------------------------------------------------------ the parts


def test_batches_are_permutations_that_depend_on_seed_and_epoch_alone() -> None:
    batches = Batches(10, 4, seed=3)
    assert len(batches) == 3
    rows = [row for keys in batches for _, row in keys]
    assert sorted(rows) == list(range(10))
    assert rows == [row for keys in Batches(10, 4, seed=3) for _, row in keys]
    batches.epoch = 1
    assert rows != [row for keys in batches for _, row in keys]
    batches.epoch, batches.start = 0, 2
    assert [row for keys in batches for _, row in keys] == rows[8:]
    assert batches.batch(1) == rows[4:8]


def test_processes_share_a_batch() -> None:
    """As many batches as of one process; the last has one row, and so none for the second process."""
    parts = [list(Batches(9, 4, 0, rank=rank, world=2)) for rank in range(2)]
    assert [[len(keys) for keys in part] for part in parts] == [[2, 2, 1], [2, 2, 0]]
    together = [sorted(row for part in parts for _, row in part[step]) for step in range(3)]
    assert together == [sorted(Batches(9, 4, 0).batch(step)) for step in range(3)]


def test_balanced_rows_come_equally_often() -> None:
    targets = [0] * 90 + [1] * 10
    batches = Batches(100, 100, 0, class_weights(targets))
    counts: Counter[int] = Counter()
    for epoch in range(20):
        batches.epoch = epoch
        counts.update(targets[row] for row in batches.order())
    assert counts[1] / 2000 == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_and_falls(schedule: str) -> None:
    options = TrainOptions(schedule=schedule, warmup=0.1)
    rates = [rate(step, 100, options) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    wanted = {"cosine": 0.5 * (1 + math.cos(math.pi * 0.5)), "linear": 0.5, "constant": 1.0}[schedule]
    assert rates[55] == pytest.approx(wanted)


def test_what_is_decayed_and_what_learns_faster(tmp_path: Path) -> None:
    objective = objective_of(BUILDERS["bert"](tmp_path / "base"))
    model = objective.build(torch.device("cpu"))
    alone = not_decayed(model)
    for name, parameter in model.named_parameters():
        decayed = name not in alone
        assert decayed == (parameter.ndim == 2 and "embeddings" not in name), name
    new = objective.new_weights()
    assert {"classifier.weight", "classifier.bias"} <= new
    assert not any(name.startswith("bert.encoder") for name in new)
    found = groups(model, TrainOptions(learning_rate=1e-3, head_lr=7, weight_decay=0.3), new)
    assert sum(len(group["params"]) for group in found) == len(list(model.parameters()))
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in found for p in group["params"]}
    named = dict(model.named_parameters())
    assert rates[id(named["classifier.weight"])] == (pytest.approx(7e-3), 0.3)
    assert rates[id(named["bert.encoder.layer.0.output.LayerNorm.weight"])] == (1e-3, 0.0)


def test_frozen_parts_stay(tmp_path: Path, pictures: tuple[Path, Path]) -> None:
    base, _ = pictures
    run_of(tmp_path / "run", pictures, options=replace(OPTIONS, freeze=("vit",), ema=None)).train()
    before, after = weights(base), weights(tmp_path / "run" / "last")
    for name, tensor in before.items():
        if f"vit.{name}" in after:
            assert torch.equal(after[f"vit.{name}"], tensor), name
    model = objective_of(base).build(torch.device("cpu"))
    with pytest.raises(
        ConfigError, match="--freeze text: the model has no such part; it has image, vit, classifier"
    ):
        freeze(model, ["text"])


@pytest.mark.parametrize("kind", ["bert", "convnext", *rarely(["vit", "wav2vec2-layer"])])
def test_merged_differences_of_low_rank_equal_those_beside(tmp_path: Path, kind: str) -> None:
    """After some steps, and nothing but the differences and the head has changed."""
    base = BUILDERS[kind](tmp_path / "base")
    rows = rows_of(kind, tmp_path, 9)
    options = TrainOptions(epochs=2, batch_size=3, learning_rate=1e-2, lora_rank=3, warmup=0.0)
    objective = objective_of(base)
    trainer = trainer_of(tmp_path / "run", objective, rows, rows, options)
    trainer.train()
    beside = trainer._parts.model.eval().cpu()
    # Wherever it learned, it is compared on the CPU.
    objective = objective_of(tmp_path / "run" / "last")
    merged = objective.build(torch.device("cpu")).eval()
    items = [Rows(rows, objective.plan, 0)[(0, row)] for row in range(9)]
    (piece,) = objective.collate(items, 1)
    with torch.inference_mode():
        for part in piece:
            found, wanted = objective.logits(merged, part), objective.logits(beside, part)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    before, after = weights(base), weights(tmp_path / "run" / "last")
    prefix = {"wav2vec2-layer": "wav2vec2"}.get(kind, kind)
    shared = {name for name in before if f"{prefix}.{name}" in after}
    same = {name for name in shared if torch.equal(after[f"{prefix}.{name}"], before[name])}
    assert len(shared) > 10
    changed = shared - same
    assert changed
    assert all(before[name].ndim == 2 for name in changed)


def test_a_run_of_low_rank_goes_on_exactly(tmp_path: Path, pictures: tuple[Path, Path]) -> None:
    options = replace(OPTIONS, lora_rank=2)
    run_of(tmp_path / "whole", pictures, options=options).train()
    with pytest.raises(Stopped):
        run_of(tmp_path / "run", pictures, stop_after(6), options).train()
    run_of(tmp_path / "run", pictures, options=options).train()
    assert_same_weights(tmp_path / "run" / "best", tmp_path / "whole" / "best")


def test_weights_between_base_and_learned(tmp_path: Path, pictures: tuple[Path, Path], uninterrupted: Path) -> None:
    run_of(tmp_path / "run", pictures, options=replace(OPTIONS, wise_ft=0.25)).train()
    base, learned, found = weights(pictures[0]), weights(uninterrupted / "last"), weights(tmp_path / "run" / "last")
    shared = [name for name in learned if name.removeprefix("vit.") in base]
    assert len(shared) > 10
    for name in shared:
        wanted = 0.75 * base[name.removeprefix("vit.")] + 0.25 * learned[name]
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6)


def test_the_moving_average() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 0.0)
    average, wanted = MovingAverage(model, 0.5), 0.0
    for step in range(1, 30):
        torch.nn.init.constant_(model.weight, float(step))
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * step
    assert float(average.state["weight"]) == pytest.approx(wanted, rel=1e-5)


def test_augmentation_follows_from_its_generator() -> None:
    pixels = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    for augment in (flip, crop):
        one, two = (augment("image", pixels, np.random.default_rng(4)) for _ in range(2))
        assert np.array_equal(one, two)
    shapes = {crop("image", pixels, np.random.default_rng(n)).shape for n in range(30)}
    assert all(12 <= height <= 20 and 18 <= width <= 30 for height, width, _ in shapes)
    assert len(shapes) > 10
    flipped = [np.array_equal(flip("image", pixels, np.random.default_rng(n)), pixels[:, ::-1]) for n in range(200)]
    assert 70 < sum(flipped) < 130
    assert flip("text", "as it is", np.random.default_rng(0)) == "as it is"
    sound = Audio(np.sin(np.arange(1000) / 5).astype(np.float32) * 0.5, 16_000)
    changed = noise("audio", sound, np.random.default_rng(1))
    assert changed.waveform.dtype == np.float32
    assert np.abs(changed.waveform).max() <= 1
    assert len(changed.waveform) >= 1000
