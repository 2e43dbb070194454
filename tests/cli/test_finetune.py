"""`mmcli finetune` as a user meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders
from cli_runs import Cli
from PIL import Image

COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


def pictures(folder: Path, count: int, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    for number in range(count):
        label = list(COLOURS)[number % 3]
        (folder / label).mkdir(parents=True, exist_ok=True)
        pixels = np.array(COLOURS[label]) + generator.integers(-40, 40, (40, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Training rows, validation rows, a base."""
    folder = tmp_path_factory.mktemp("data")
    base = tiny_encoders.IMAGES["vit"](folder / "base")
    return pictures(folder / "train", 30, 0), pictures(folder / "val", 12, 1), base


def command(data: tuple[Path, Path, Path], run: Path, *more: object) -> tuple[object, ...]:
    train, val, base = data
    return (
        "finetune",
        train,
        "--val",
        val,
        "-m",
        base,
        "-o",
        run,
        "--batch-size",
        6,
        "--learning-rate",
        "2e-3",
        *more,
    )


def rows(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def finished(data: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mmcli.cli.boundary import run as mmcli

    run = tmp_path_factory.mktemp("finished") / "run"
    assert mmcli([str(one) for one in command(data, run, "--num-workers", 0, "--quiet")]) == 0
    return run


def test_the_model_classifies_as_it_was_measured(cli: Cli, data: tuple[Path, Path, Path], finished: Path) -> None:
    """Accuracy and loss of the best step are those of `mmcli classify -m run/best` on the same rows."""
    done = cli("classify", data[1], "-m", finished / "best", "--top-k", 3)
    assert done.code == 0, done.err
    found = rows(done.out)
    told = json.loads((finished / "run.json").read_text())
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    measured = next(line for line in lines if line["step"] == told["best_step"] and "val_loss" in line)
    truth = [row["id"].split("/")[0] for row in found]
    right = np.mean([row["label"] == label for row, label in zip(found, truth, strict=True)])
    assert right == pytest.approx(told["best"]) == pytest.approx(measured["val_accuracy"])
    chosen = [
        next(k["score"] for k in row["top_k"] if k["label"] == t) for row, t in zip(found, truth, strict=True)
    ]
    assert -np.mean(np.log(chosen)) == pytest.approx(measured["val_loss"], rel=1e-4)
    assert {k["label"] for k in found[0]["top_k"]} == set(COLOURS)


def test_what_a_run_leaves(cli: Cli, data: tuple[Path, Path, Path], finished: Path) -> None:
    there = {one.name for one in finished.iterdir()}
    assert {"best", "last", "run.json", "config.toml", "metrics.jsonl"} <= there
    assert "checkpoint" not in there
    config = tomllib.loads((finished / "config.toml").read_text())
    assert config["learning-rate"] == "2e-3"
    again = cli(*command(data, finished))
    assert again.code == 0
    assert "is complete already: accuracy" in again.err
    other = cli(*command(data, finished, "--epochs", 9))
    assert other.code == 6
    assert "options.epochs: was 3, is 9" in other.err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "it is a list, not an object"),
        ("{", "it is not JSON"),
        ('{"complete": true}', "job is missing"),
        ('{"complete": false, "job": {"task": "finetune"}}', "job.model is missing"),
    ],
)
def test_a_run_json_that_was_damaged(
    cli: Cli, data: tuple[Path, Path, Path], tmp_path: Path, text: str, told: str
) -> None:
    """It is told, and nothing of the run is lost."""
    run = tmp_path / "run"
    (run / "checkpoint").mkdir(parents=True)
    (run / "run.json").write_text(text)
    done = cli(*command(data, run, "--max-steps", 1))
    assert done.code == 6, done.err
    assert f"{run}/run.json is damaged: {told}" in done.err
    assert "try: give another -o, or --overwrite" in done.err
    assert (run / "checkpoint").exists()


def test_its_own_config_gives_the_same_run(cli: Cli, data: tuple[Path, Path, Path], finished: Path) -> None:
    again = cli("finetune", data[0], "--config", finished / "config.toml")
    assert again.code == 0, again.err
    assert "is complete already" in again.err


def test_manifests_with_a_label_column(cli: Cli, data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    train, val, base = data
    for name, folder in (("train", train), ("val", val)):
        lines = [{"picture": str(f), "colour": f.parent.name} for f in sorted(folder.rglob("*.png"))]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = cli("finetune", tmp_path / "train.jsonl", "--val", tmp_path / "val.jsonl", "--image-column", "picture",
               "--label-column", "colour", "-m", base, "-o", tmp_path / "run", "--max-steps", 2)  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "best" / "config.json").read_text())["id2label"] == {
        "0": "blue", "1": "green", "2": "red"
    }  # fmt: skip


def test_rows_that_cannot_be_read(cli: Cli, data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    train = pictures(tmp_path / "train", 9, 0)
    (train / "red" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n bad")
    common = ("finetune", train, "--val", data[1], "-m", data[2], "-o", tmp_path / "run", "--max-steps", 1)
    done = cli(*common)
    assert done.code == 2
    assert "INPUT: red/bad.png (truncated" in done.err
    done = cli(*common, "--missing-policy", "drop")
    assert done.code == 0, done.err
    assert "INPUT: left out 1 row that cannot be read: red/bad.png" in done.err


def test_rows_in_both_are_told(cli: Cli, data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    val = pictures(tmp_path / "val", 3, 0)
    done = cli("finetune", data[0], "--val", val, "-m", data[2], "-o", tmp_path / "run", "--max-steps", 1)
    assert done.code == 0, done.err
    assert "3 validation rows are training rows, too, byte for byte: blue/0.png" in done.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--epochs", "0"], "--epochs '0' is not a number from 1 up"),
        (["--schedule", "cos"], "--schedule 'cos' is not one of cosine, linear, constant; did you mean cosine?"),
        (["--gradient-accumulation-steps", "64"], "--gradient-accumulation-steps 64: a batch has 6 rows"),
        (["--freeze", "visual"], "--freeze visual: the model has no such part; it has image, vit, classifier"),
        (["--freeze", "vit,classifier"], "--freeze vit,classifier: nothing is left to learn"),
        (["--metric", "f1"], "--metric 'f1' is not one of accuracy, mean_per_class"),
        (["--dtype", "bfloat16"], "weights are float32 here: --precision bf16"),
        (["--precision", "fp16", "--device", "cpu"], "--precision fp16 is for GPUs"),
        (["--modality", "text"], "a vit learns image; the rows are text"),
        (["--unimodal-loss", "0.5"], "--unimodal-loss is of rows with several media, and --encoder"),
        (["--modality-dropout", "0.5"], "--modality-dropout is of rows with several media, and --encoder"),
        (["--missing-policy", "mask"], "mask is for models that bear rows without one of their media"),
        (["--val", "sample_data/images.jsonl"], "give folders or manifests, not both"),
        (["--objective", "learn"], "--objective 'learn' is not one of"),
    ],
)  # fmt: skip
def test_mistakes(cli: Cli, data: tuple[Path, Path, Path], tmp_path: Path, more: list[str], said: str) -> None:
    done = cli(*command(data, tmp_path / "run", *more))
    assert done.code == 2
    assert said in done.err


def test_mistakes_of_rows(cli: Cli, data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    train, val, base = data
    one = pictures(tmp_path / "one", 1, 0)
    common = ("-m", base, "-o", tmp_path / "run")
    assert "all rows have the label 'blue'" in cli("finetune", one, "--val", val, *common).err
    (val.parent / "more" / "pink").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(val.parent / "more" / "pink" / "1.png")
    done = cli("finetune", train, "--val", val.parent / "more", *common)
    assert "--val: no training row has the label 'pink'; nothing can be learned about it" in done.err
    assert "no validation rows given" in cli("finetune", train, *common).err
    assert f"-o {train}: it holds other things" in cli("finetune", train, "--val", val, "-m", base, "-o", train).err
    assert (
        "a vit" in cli("finetune", train, "--val", val, "-m", base, "-o", tmp_path / "x", "--modality", "audio").err
    )


def test_another_column_to_learn_is_another_run(cli: Cli, sample_data: Path, tmp_path: Path) -> None:
    rows = sample_data / "images.jsonl"
    common = ("finetune", rows, "--val", rows, "--image-column", "image", "--objective", "caption", "-m",
              sample_data / "models" / "captioner", "-o", tmp_path / "run", "--max-steps", 1, "--batch-size", 4,
              "--no-preflight", "--metric", "neg_loss")  # fmt: skip
    assert cli(*common, "--target-column", "caption").code == 0
    done = cli(*common, "--target-column", "label")
    assert done.code == 6, done.err
    assert "is of another run" in done.err
    assert "was ['caption'], is ['label']" in done.err


def test_a_run_killed_when_all_steps_are_done_is_not_begun_anew(
    cli: Cli, data: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last step and the end stands what may take long: diagnostics, pictures."""
    from mmcli.cli import training

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(training, "_diagnose", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli(*command(data, run)).code == 130
    before = (run / "metrics.jsonl").read_text()
    done = cli(*command(data, run))
    assert done.code == 0, done.err
    assert f"going on with the run in {run}" in done.err
    assert (run / "metrics.jsonl").read_text() == before
    assert not (run / "checkpoint").exists()


def test_tensorboard_shows_what_metrics_jsonl_says(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "lr", "rows_per_s", "val_accuracy"):
        wanted = [(line["step"], pytest.approx(line[name], rel=1e-5)) for line in lines if name in line]
        assert wanted
        assert scalars(finished, name) == wanted


def test_tensorboard_forgets_steps_that_are_done_again(tmp_path: Path) -> None:
    """As metrics.jsonl does, when a run goes on from a checkpoint before them."""
    from mmcli.training.log import MetricsLog

    log = MetricsLog(tmp_path, 0)
    for step in range(1, 7):
        log.write(step=step, epoch=0, loss=float(step))
    log.close()
    log = MetricsLog(tmp_path, 3)
    log.write(step=4, epoch=0, loss=0.5)
    log.close()
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 0.5)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_a_terminal_shows_how_far_it_is(data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A bar with loss, rate and the time to go; evaluations stay above it."""
    screen, terminal = os.openpty()
    arguments = map(str, command(data, tmp_path / "run", "--num-workers", 0))
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    with subprocess.Popen([sys.executable, "-m", "mmcli", *arguments], stderr=terminal, env=environment) as process:
        os.close(terminal)
        seen = b""
        while block := _read(screen):
            seen += block
    os.close(screen)
    assert process.returncode == 0, seen.decode()
    shown = seen.decode()
    assert re.search(r"step 1[0-5] of 15 · loss [\d.]+ · lr [\d.e-]+ · rows/s [\d.]+ · ETA \d", shown)
    assert "val accuracy" in shown


def _read(screen: int) -> bytes:
    try:
        return os.read(screen, 65536)
    except OSError:  # Nobody writes any more.
        return b""
