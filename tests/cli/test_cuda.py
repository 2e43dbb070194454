"""The commands on a CUDA device, beside the same on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_encoders
import torch
from cli_runs import Cli, finished
from test_finetune import command, pictures

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


def column(path: Path, name: str) -> list[Any]:
    found: list[Any] = pq.read_table(path, columns=[name]).column(0).to_pylist()
    return found


def both(cli: Cli, tmp_path: Path, *arguments: object) -> tuple[Path, Path]:
    """What a command writes on the CPU and on the device."""
    outs = []
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.parquet"
        done = cli(*arguments, "--device", device, "-o", out, "--json")
        assert done.code == 0, done.err
        outs.append(out)
    return outs[0], outs[1]


def cosines(a: Path, b: Path) -> np.ndarray:
    vectors = [np.array(column(path, "embedding"), dtype=np.float64) for path in (a, b)]
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors]
    found: np.ndarray = (unit[0] * unit[1]).sum(axis=1)
    return found


@pytest.mark.parametrize("inputs", ["images", "texts.csv", "videos", "sounds"])
def test_vectors(inputs: str, cli: Cli, sample_data: Path, tmp_path: Path) -> None:
    model = sample_data / "models" / "clip"
    if inputs == "sounds":
        model = tiny_encoders.SOUNDS["wav2vec2-group"](tmp_path / "base")
    wanted, found = both(cli, tmp_path, "embed", sample_data / inputs, "-m", model)
    assert column(found, "id") == column(wanted, "id")
    assert cosines(wanted, found).min() >= 0.99999


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_vectors_of_half_the_bits(dtype: str, cli: Cli, sample_data: Path, tmp_path: Path) -> None:
    given = ("embed", sample_data / "images", "-m", sample_data / "models" / "clip")
    assert cli(*given, "--device", "cpu", "-o", tmp_path / "a.parquet").code == 0
    done = cli(*given, "--device", "cuda", "--dtype", dtype, "-o", tmp_path / "b.parquet")
    assert done.code == 0, done.err
    assert cosines(tmp_path / "a.parquet", tmp_path / "b.parquet").min() >= 0.999


def test_compiled(cli: Cli, sample_data: Path, tmp_path: Path) -> None:
    given = ("embed", sample_data / "images", "-m", sample_data / "models" / "clip")
    assert cli(*given, "--device", "cpu", "-o", tmp_path / "a.parquet").code == 0
    done = cli(*given, "--device", "cuda", "--compile", "-o", tmp_path / "b.parquet")
    assert done.code == 0, done.err
    assert cosines(tmp_path / "a.parquet", tmp_path / "b.parquet").min() >= 0.99999


@pytest.mark.parametrize(("inputs", "model"), [("images", "captioner"), ("sounds", "sounds"), ("images", "chat")])
def test_captions(inputs: str, model: str, cli: Cli, sample_data: Path, tmp_path: Path) -> None:
    given = ("caption", sample_data / inputs, "-m", sample_data / "models" / model)
    wanted, found = both(cli, tmp_path, *given)
    assert column(found, "caption") == column(wanted, "caption")
    difference = np.subtract(column(found, "mean_logprob"), column(wanted, "mean_logprob"))
    assert np.abs(difference).max() <= 1e-4


@pytest.mark.parametrize("model", ["vqa", "chat"])
def test_answers(model: str, cli: Cli, sample_data: Path, tmp_path: Path) -> None:
    given = ("ask", sample_data / "questions.jsonl", "-m", sample_data / "models" / model)
    wanted, found = both(cli, tmp_path, *given, "--question-column", "question")
    assert column(found, "answer") == column(wanted, "answer")


def test_labels(cli: Cli, sample_data: Path, tmp_path: Path) -> None:
    given = ("classify", sample_data / "images", "-m", sample_data / "models" / "clip")
    wanted, found = both(cli, tmp_path, *given, "--labels-file", sample_data / "labels.txt")
    assert column(found, "label") == column(wanted, "label")
    assert np.abs(np.subtract(column(found, "score"), column(wanted, "score"))).max() <= 1e-4


def test_a_batch_that_does_not_fit(cli: Cli, sample_data: Path, tmp_path: Path) -> None:
    """256 MB of the device: a batch of 4,096 is halved until it fits; the vectors stay the same."""
    files = sorted((sample_data / "images").glob("*.png"))
    (tmp_path / "in.csv").write_text("\n".join(["path", *(str(files[n % len(files)]) for n in range(4096)), ""]))
    given = ("embed", tmp_path / "in.csv", "-m", sample_data / "models" / "clip", "--device", "cuda", "--json")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (256 << 20)) / total)
        done = cli(*given, "--batch-size", 4096, "-o", tmp_path / "a.parquet")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert done.code == 0, done.err
    report = json.loads(done.err.splitlines()[-1])
    assert report["oom_halvings"] > 0
    assert cli(*given, "-o", tmp_path / "b.parquet").code == 0
    assert len(column(tmp_path / "a.parquet", "id")) == 4096
    assert cosines(tmp_path / "a.parquet", tmp_path / "b.parquet").min() >= 0.99999


def test_a_device_that_fails_ends_the_run(tmp_path: Path) -> None:
    """A token that the model has no vector for: from then on the device fails whatever it is asked.

    No row becomes an error row for that, and the rows before it are kept.
    """
    base = tiny_encoders.TEXTS["bert"](tmp_path / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    size = json.loads((base / "config.json").read_text())["vocab_size"]
    tokenizer["model"]["vocab"]["z"] = size + 1000
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    lines = ["z" if row == 2000 else f"text {row}" for row in range(3000)]
    (tmp_path / "in.csv").write_text("\n".join(["text", *lines, ""]))
    given = ("embed", tmp_path / "in.csv", "-m", base, "--device", "cuda", "--batch-size", 32)
    given += ("-o", tmp_path / "out.parquet")
    done = finished(*given, "--json")
    assert done.code == 7, done.err
    assert "mmcli: error: the device failed: CUDA error: device-side assert triggered" in done.err
    report = json.loads(done.err.splitlines()[-1])
    assert 0 < report["committed"] <= 2000
    assert report["errors"] == 0
    done = finished(*[{"cuda": "cpu"}.get(str(one), one) for one in given])
    assert done.code == 3, done.err
    assert f"{report['committed']:,} rows are there" in done.err
    failed = [row for row, status in enumerate(column(tmp_path / "out.parquet", "status")) if status != "ok"]
    assert failed == [2000]


def test_a_device_that_is_not_there(cli: Cli, sample_data: Path) -> None:
    done = cli("embed", sample_data / "images", "-m", sample_data / "models" / "clip", "--device", "cuda:99")
    assert done.code != 0
    assert "cuda:99: there are" in done.err


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_finetune_learns_what_it_does_on_a_cpu(precision: str, cli: Cli, tmp_path: Path) -> None:
    base = tiny_encoders.IMAGES["vit"](tmp_path / "base")
    data = pictures(tmp_path / "train", 30, 0), pictures(tmp_path / "val", 12, 1), base
    losses = {}
    for device in ("cpu", "cuda"):
        run = tmp_path / device
        more = ("--device", device, "--precision", precision if device == "cuda" else "fp32")
        done = cli(*command(data, run, *more, "--epochs", 3, "--quiet"))
        assert done.code == 0, done.err
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[device] = [line["val_loss"] for line in lines if "val_loss" in line]
    if precision == "fp16":
        # Behind by the first steps, which only find out by how much gradients can be scaled.
        assert losses["cpu"][1] < losses["cuda"][1] < losses["cpu"][0]
    else:
        assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3 if precision == "fp32" else 0.05)
