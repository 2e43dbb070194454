"""The tiny chat model and the tiny Whisper are right about pictures and sounds that they were not trained on."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest

LARGEST = 6e6  # bytes of a checkpoint, all files together


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mmcli(*arguments: object) -> list[dict]:
    """Run a command, as a user does; give its rows."""
    command = [sys.executable, "-m", "mmcli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def share(found: list[str], wanted: list[str]) -> float:
    return float(np.mean([a == b for a, b in zip(found, wanted, strict=True)]))


@pytest.mark.parametrize("name", ["chat", "sounds"])
def test_checkpoints_are_small_and_in_full_precision(sample_data: Path, name: str) -> None:
    from safetensors import safe_open

    folder = sample_data / "models" / name
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= LARGEST
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F32"}  # noqa: SIM118


# ------------------------------------------------------------------------------------------------- chat


@pytest.fixture
def chat(sample_data: Path) -> tuple[str, Path]:
    return "-m", sample_data / "models" / "chat"


def test_chat_answers_the_sample_questions(sample_data: Path, chat: tuple[str, Path]) -> None:
    asked = ("--question-column", "model=question", "--keep", "question,answer")
    rows = mmcli("ask", sample_data / "questions.jsonl", *chat, *asked)
    assert len(rows) == 144
    assert share([row["model_answer"] for row in rows], [row["answer"] for row in rows]) >= 0.8
    # Whether something is there is the hardest to learn, and right by chance in half.
    doubts = [row for row in rows if row["question"].startswith("is there")]
    assert share([row["model_answer"] for row in doubts], [row["answer"] for row in doubts]) >= 0.8


@pytest.mark.slow
def test_chat_answers_one_question_about_all_pictures(sample_data: Path, chat: tuple[str, Path]) -> None:
    asked = ("-q", "colour=What colour is the shape?", "-q", "shape=What shape is it?")
    rows = mmcli("ask", sample_data / "images", *chat, *asked)
    named = [row["id"].split(".")[0].split("-") for row in rows]
    assert share([row["colour_answer"] for row in rows], [name[1] for name in named]) >= 0.8
    assert share([row["shape_answer"] for row in rows], [name[2] for name in named]) >= 0.8


@pytest.mark.slow
def test_chat_describes_the_sample_pictures(sample_data: Path, chat: tuple[str, Path]) -> None:
    """By what mmcli asks of itself."""
    wanted = {row["file_name"]: row["caption"] for row in rows_of(sample_data / "images" / "metadata.jsonl")}
    rows = mmcli("caption", sample_data / "images", *chat)
    assert len(rows) == len(wanted)
    assert share([row["caption"] for row in rows], [wanted[row["id"]] for row in rows]) >= 0.8
    assert {row["finish_reason"] for row in rows} == {"stop"}


@pytest.mark.slow
def test_chat_goes_on_with_a_conversation(sample_data: Path, chat: tuple[str, Path], tmp_path: Path) -> None:
    """Two questions about one picture."""
    said = [
        ("user", "how many shapes are there?"),
        ("assistant", "one"),
        ("user", "what colour is the background?"),
    ]
    rows = rows_of(sample_data / "images.jsonl")
    talk = {"messages": [{"role": role, "content": text} for role, text in said]}
    lines = [json.dumps({**row, "image": str(sample_data / row["image"]), **talk}) for row in rows]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    answered = mmcli("ask", tmp_path / "talks.jsonl", *chat, "--messages-column", "messages")
    assert share([row["answer"] for row in answered], [row["caption"].split()[-2] for row in rows]) >= 0.8


# ----------------------------------------------------------------------------------------------- sounds


@pytest.fixture
def sounds(sample_data: Path) -> tuple[str, Path]:
    return "-m", sample_data / "models" / "sounds"


def truth(sample_data: Path) -> dict[str, str]:
    """What each file of `sounds/` is."""
    with (sample_data / "sounds.csv").open(encoding="utf-8", newline="") as file:
        return {Path(row["audio"]).name: row["caption"] for row in csv.DictReader(file)}


def samples(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        parts = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    return np.concatenate(parts)


def write_wav(path: Path, parts: list[np.ndarray]) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.concatenate(parts).astype("<i2").tobytes())


@pytest.mark.slow
def test_whisper_names_the_sample_sounds(sample_data: Path, sounds: tuple[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(sample_data / "sounds", tmp_path / "sounds")
    wanted = truth(sample_data)
    mmcli("caption", copy, *sounds, "-o", tmp_path / "out.jsonl", "--srt")
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == sorted(wanted)
    assert share([row["caption"] for row in rows], [wanted[row["id"]] for row in rows]) >= 0.8
    # Each subtitle says the same, from the sound's start to its end.
    for row in rows:
        times, text = (copy / row["id"]).with_suffix(".srt").read_text(encoding="utf-8").splitlines()[1:3]
        assert times.startswith("00:00:00,0")
        assert row["caption"].startswith(text)


@pytest.mark.slow
def test_whisper_says_when(sample_data: Path, sounds: tuple[str, Path], tmp_path: Path) -> None:
    """A second of silence before each sound."""
    lengths = {}
    for name in truth(sample_data):
        sound = samples(sample_data / "sounds" / name)
        write_wav(tmp_path / f"{Path(name).stem}.wav", [np.zeros(16_000, np.int16), sound])
        lengths[Path(name).stem] = len(sound) / 16_000
    rows = mmcli("caption", tmp_path, *sounds)
    assert len(rows) == len(lengths)
    right = []
    for row in rows:
        found = [(part["start"], part["end"]) for part in row["segments"]]
        wanted = [(1, 1 + lengths[Path(row["id"]).stem])]
        right.append(len(found) == 1 and np.allclose(found, wanted, atol=0.1))
    assert np.mean(right) >= 0.8
