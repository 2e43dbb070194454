"""The objective *probe*: scikit-learn's logistic regression on what embed gives, as classify loads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_dual
import tiny_encoders
from rare import rarely
from sklearn.linear_model import LogisticRegression
from training_runs import LABELS, image_files, sound_rows, text_rows

from mmcli.cli.boundary import run as mmcli

COMMON = ["--objective", "probe", "--num-workers", "0"]


def manifest(path: Path, rows: list[Any]) -> Path:
    lines = [
        {rows[0].media[0].modality: r.media[0].file or r.media[0].text, "label": LABELS[r.target]} for r in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def embedded(rows: Path, model: Path, out: Path, *more: str) -> np.ndarray:
    assert mmcli(["embed", str(rows), "-m", str(model), "-o", str(out), "--num-workers", "0", *more]) == 0
    found: np.ndarray = np.stack(pq.read_table(out).column("embedding").to_numpy())
    return found


@pytest.mark.parametrize("kind", ["clip", "hubert", *rarely(["vit", "bert"])])
def test_it_is_logistic_regression_on_vectors(tmp_path: Path, kind: str) -> None:
    """Each penalty's metrics are scikit-learn's; classify -m run/best gives those of the best."""
    builders = {
        "vit": tiny_encoders.IMAGES["vit"],
        "clip": tiny_dual.BUILDERS["clip"],
        "bert": tiny_encoders.TEXTS["bert"],
        "hubert": tiny_encoders.SOUNDS["hubert-layer"],
    }
    base, columns = builders[kind](tmp_path / "base"), []
    if kind in ("vit", "clip"):
        train, val = (image_files(tmp_path / name, n, n) for name, n in (("train", 30), ("val", 15)))
        targets = [[LABELS.index(f.parent.name) for f in sorted(one.rglob("*.png"))] for one in (train, val)]
    else:
        made = [
            text_rows(n, n) if kind == "bert" else sound_rows(tmp_path / name, n, n)
            for name, n in (("train", 30), ("val", 15))
        ]
        train, val = (
            manifest(tmp_path / f"{n}.jsonl", rows) for n, rows in zip(("train", "val"), made, strict=True)
        )
        targets = [[row.target for row in rows] for rows in made]
        columns = [f"--{made[0][0].media[0].modality}-column", made[0][0].media[0].modality]
    run = tmp_path / "run"
    command = ["finetune", str(train), "--val", str(val), "-m", str(base), "-o", str(run), *COMMON, *columns]
    assert mmcli(command) == 0
    known, unknown = (embedded(rows, base, tmp_path / f"{rows.stem}.parquet", *columns) for rows in (train, val))
    known, unknown = (side.astype(np.float64) for side in (known, unknown))
    mean, spread = known.mean(axis=0), known.std(axis=0)
    for line in lines_of(run)[:6]:
        model = LogisticRegression(C=line["C"], max_iter=5000, tol=1e-8).fit((known - mean) / spread, targets[0])
        given = model.predict_proba((unknown - mean) / spread)
        log_loss = -np.log(given[np.arange(15), targets[1]]).mean()
        assert line["val_log_loss"] == pytest.approx(log_loss, rel=0.02, abs=2e-3)
    told = json.loads((run / "run.json").read_text())
    best = max(lines_of(run), key=lambda line: (line["val_accuracy"], -line["val_log_loss"]))
    assert (told["best_step"], told["best"], told["C"]) == (best["step"], best["val_accuracy"], best["C"])
    assert not (run / "features").exists()
    out = tmp_path / "labels.jsonl"
    classify = ["classify", str(val), "-m", str(run / "best"), "-o", str(out), "--top-k", "3", *columns]
    assert mmcli([*classify, "--num-workers", "0"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert np.mean([row["label"] == LABELS[t] for row, t in zip(rows, targets[1], strict=True)]) == told["best"]
    scores = [
        next(one["score"] for one in row["top_k"] if one["label"] == LABELS[t])
        for row, t in zip(rows, targets[1], strict=True)
    ]
    assert -np.log(scores).mean() == pytest.approx(best["val_log_loss"], rel=1e-3, abs=1e-5)
    assert told["best"] > 0.6


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Training rows, validation rows, a base."""
    base = tiny_encoders.IMAGES["vit"](tmp_path / "base")
    return image_files(tmp_path / "train", 18), image_files(tmp_path / "val", 9, 1), base


def command(pictures: tuple[Path, Path, Path], run: Path, *more: str) -> list[str]:
    train, val, base = pictures
    return ["finetune", str(train), "--val", str(val), "-m", str(base), "-o", str(run), *COMMON, *more]


def test_vectors_are_computed_once(
    tmp_path: Path, pictures: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that ends over a row of --val goes on with the vectors of the training rows that it has."""
    (pictures[1] / "cat" / "broken.png").write_bytes(b"\x89PNG nothing")
    assert mmcli(command(pictures, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert "--val: 1 row cannot be read (cat/broken.png: unsupported_format" in said
    assert "vectors of 18 rows" in said
    assert mmcli(command(pictures, tmp_path / "run", "--missing-policy", "drop")) == 0
    said = capsys.readouterr().err
    assert "vectors of" not in said
    assert "--val: left out 1 row that cannot be read: cat/broken.png" in said
    assert mmcli(command(pictures, tmp_path / "run", "--missing-policy", "drop")) == 0
    assert "is complete already" in capsys.readouterr().err
    assert mmcli(command(pictures, tmp_path / "run", "--missing-policy", "drop", "--metric", "log_loss")) == 6


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, pictures: tuple[Path, Path, Path]) -> None:
    assert mmcli(command(pictures, tmp_path / "whole")) == 0
    assert mmcli(command(pictures, tmp_path / "run", "--time-limit", "0.001s")) == 75
    assert not (tmp_path / "run" / "best").exists()
    assert mmcli(command(pictures, tmp_path / "run")) == 0
    for name in ("metrics.jsonl", "best/head.safetensors", "best/head.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_penalty_is_chosen_by_the_named_metric(tmp_path: Path, pictures: tuple[Path, Path, Path]) -> None:
    """Classes are uneven, so that --balance makes another head."""
    for file in list((pictures[0] / "cat").glob("*.png"))[2:]:
        file.unlink()
    assert mmcli(command(pictures, tmp_path / "run", "--metric", "log_loss")) == 0
    assert mmcli(command(pictures, tmp_path / "even", "--metric", "log_loss", "--balance")) == 0
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    losses = [line["val_log_loss"] for line in lines_of(tmp_path / "run")]
    assert told["metric"] == "log_loss"
    assert told["best"] == min(losses)
    assert told["best_step"] == 1 + int(np.argmin(losses))
    assert lines_of(tmp_path / "even")[0]["val_log_loss"] != losses[0]


def test_problems_are_told_together(
    tmp_path: Path, pictures: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*more: str, base: Path = pictures[2]) -> str:
        assert mmcli(command((*pictures[:2], base), tmp_path / "run", *more)) == 2
        return capsys.readouterr().err

    found = told("--learning-rate", "1e-3", "--from-config", "--freeze", "image")
    for flag in ("--learning-rate", "--from-config", "--freeze"):
        assert f"{flag}: a probe is solved, not trained by steps" in found
    text = tiny_encoders.TEXTS["bert"](tmp_path / "bert")
    assert f"INPUT: rows have image; -m {text} takes text" in told(base=text)
    assert "--metric" in told("--metric", "r_at_1")
    shutil.copytree(pictures[1] / "cat", pictures[1] / "bird")
    assert "no training row has the label 'bird'" in told()
    shutil.rmtree(pictures[1] / "bird")
    captioner = tiny_dual.BUILDERS["blip_2"](tmp_path / "blip_2")
    assert "is not supported for embeddings" in told(base=captioner)
    for file in (pictures[0] / "dog").glob("*.png"):
        file.write_bytes(b"nothing")
    assert "INPUT: no readable row of 'dog'" in told("--missing-policy", "drop")
    rows = [{"image": str(pictures[1] / "cat" / "0.png"), "text": "a", "label": one} for one in ("x", "y")]
    both = tmp_path / "both.jsonl"
    both.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["--image-column", "image", "--text-column", "text"]
    clip = tiny_dual.BUILDERS["clip"](tmp_path / "clip")
    assert mmcli(["finetune", str(both), "--val", str(both), "-m", str(clip), *COMMON, *columns,
                  "-o", str(tmp_path / "both")]) == 2  # fmt: skip
    assert "INPUT: rows have image and text, and a probe reads the vector of one" in capsys.readouterr().err
