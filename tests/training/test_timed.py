"""Texts with times: what a Whisper learns of them, and what is said where they make no sense."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tiny_captioners
import tiny_speech
import torch
import transformers as hf
from training_runs import sound_rows, still

from mmcli.cli.boundary import run as mmcli
from mmcli.cli.writing import measure_speech, references
from mmcli.models.options import Generation, ModelOptions
from mmcli.models.resolve import resolve_writer
from mmcli.training.data import Rows
from mmcli.training.timed import split_times
from mmcli.training.write_tokens import form_of

TIMED = "<|0.00|> the sea<|0.42|><|0.50|> blue and wide<|0.98|><|1.00|>"


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return still(tiny_speech.multilingual(tmp_path_factory.mktemp("whisper") / "base"))


def finetune(base: Path, rows: Path, run: Path, *more: object) -> int:
    told = ("--objective", "caption", "-m", base, "--num-workers", 0, "--max-steps", 1, "--quiet", *more)
    return mmcli([str(one) for one in ("finetune", rows, "--val", rows, "-o", run, *told)])


def test_tokens_are_those_of_whispers_notation(tmp_path: Path, whisper: Path) -> None:
    plan = resolve_writer(ModelOptions(str(whisper), device="cpu"), Generation(language="de", max_new_tokens=21))
    form = form_of(plan)  # type: ignore[arg-type]
    form.load(form.plan, torch.device("cpu"), False)
    rows = sound_rows(tmp_path, 1)
    (sample,) = Rows(rows, form.plan, 0)[(0, 0)].samples  # type: ignore[union-attr]
    tokenizer = hf.WhisperTokenizer.from_pretrained(whisper)
    for text in (TIMED, "<|0.00|>"):
        found = form.target(sample, text)
        assert tokenizer.decode(found, decode_with_timestamps=True) == f"{text}<|endoftext|>"


@pytest.mark.slow
def test_segments_go_out_and_come_back(tmp_path: Path, whisper: Path) -> None:
    """What `mmcli caption` wrote is learned as it is; words are measured, not times."""
    rows = [{"audio": row.media[0].file} for row in sound_rows(tmp_path / "sounds", 3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("-m", whisper, "--language", "de", "--audio-column", "audio")
    written = ("caption", tmp_path / "rows.jsonl", *asked, "-o", tmp_path / "out.parquet", "--keep", "audio")
    # Of weights by chance some say nothing.
    assert mmcli([str(one) for one in written]) in (0, 3)
    table = pq.read_table(tmp_path / "out.parquet")
    heard = table.filter(pc.greater(pc.list_value_length(table["segments"]), 0))
    assert len(heard)
    pq.write_table(heard, tmp_path / "train.parquet")
    more = ("--language", "de", "--audio-column", "audio", "--target-column", "segments", "--learning-rate", 0)
    assert finetune(whisper, tmp_path / "train.parquet", tmp_path / "run", *more) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["best"] == 1.0


def test_cells() -> None:
    segments = [{"start": 0, "end": 0.421, "text": " the sea "}, {"start": 0.5, "end": 0.98, "text": "blue"}]
    assert references(segments) == ("<|0.00|> the sea<|0.42|><|0.50|> blue<|0.98|>",)
    assert references([{"answer": "yes"}, {"answer": "no"}]) == ("yes", "no")
    assert measure_speech(["The sea blue and wide!"], [(TIMED,)])["wer"] == 0
    assert split_times(TIMED)[2:] == [(0.5, "blue and wide"), (0.98, ""), (1.0, "")]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("the sea<|0.40|>", "words stand before the first time; as in '<|0.00|> words<|1.20|>'"),
        ("<|0.40|> the sea<|0.20|>", "a time is earlier than the one before"),
        ("<|0.40|> the sea", "words have no time behind"),
        ("<|0.40|> the sea<|90.00|>", "hears windows of"),
        ("<|0.40|> the <|endoftext|> sea<|0.60|>", "holds '<|endoftext|>', one of the model's own tokens"),
    ],
)
def test_mistakes(tmp_path: Path, whisper: Path, capsys: pytest.CaptureFixture[str], text: str, why: str) -> None:
    row = {"audio": sound_rows(tmp_path / "sounds", 1)[0].media[0].file, "caption": text}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert finetune(whisper, tmp_path / "rows.jsonl", tmp_path / "run", "--language", "de",
                    "--audio-column", "audio") == 2  # fmt: skip
    assert why in capsys.readouterr().err


def test_only_whisper_writes_times(tmp_path: Path, sample_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"image": str(next((sample_data / "images").glob("*.png"))), "caption": TIMED}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    base = tiny_captioners.blip(tmp_path / "base")
    assert finetune(base, tmp_path / "rows.jsonl", tmp_path / "run", "--image-column", "image") == 2
    assert "writes none; Whisper does" in capsys.readouterr().err
