"""The tiny chat model and the tiny Whisper answer rightly about sample files, by plain transformers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

LARGEST = 6e6  # bytes of a checkpoint, all files together


def rows_of(path: Path) -> list[dict[str, str]]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def upright(path: Path) -> Image.Image:
    """Open a picture as a viewer shows it: upright, and transparency on white."""
    with Image.open(path) as picture:
        turned = ImageOps.exif_transpose(picture)
        if turned.mode == "RGBA":
            turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned)
        return turned.convert("RGB")


def samples(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        parts = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    return np.concatenate(parts).astype(np.float32) / 32768


@pytest.mark.parametrize("name", ["chat", "sounds"])
def test_checkpoints_are_small_and_in_full_precision(sample_data: Path, name: str) -> None:
    from safetensors import safe_open

    folder = sample_data / "models" / name
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= LARGEST
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F32"}  # noqa: SIM118


# ------------------------------------------------------------------------------------------------- chat


@pytest.fixture(scope="module")
def chat(sample_data: Path) -> tuple:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = sample_data / "models" / "chat"
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def answers(chat: tuple, talks: list[list[dict]]) -> list[str]:
    """Let the model go on with conversations whose pictures are in their messages."""
    import torch

    model, processor = chat
    inputs = processor.apply_chat_template(
        talks, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def user(text: str, picture: Image.Image | None = None) -> dict:
    content = [{"type": "text", "text": text}]
    return {"role": "user", "content": [{"type": "image", "image": picture}, *content] if picture else content}


def said(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def test_chat_answers_the_sample_questions(sample_data: Path, chat: tuple) -> None:
    rows = rows_of(sample_data / "questions.jsonl")
    assert len(rows) == 144
    got = answers(chat, [[user(row["question"], upright(sample_data / row["image"]))] for row in rows])
    assert np.mean([text == row["answer"] for text, row in zip(got, rows, strict=True)]) >= 0.8


def test_chat_describes_the_sample_pictures(sample_data: Path, chat: tuple) -> None:
    rows = rows_of(sample_data / "images.jsonl")
    talks = [[user("Describe the picture.", upright(sample_data / row["image"]))] for row in rows]
    got = answers(chat, talks)
    assert np.mean([text == row["caption"] for text, row in zip(got, rows, strict=True)]) >= 0.8


def test_chat_goes_on_with_a_conversation(sample_data: Path, chat: tuple) -> None:
    rows = rows_of(sample_data / "images.jsonl")
    pictures = [upright(sample_data / row["image"]) for row in rows]
    later = [
        [user("how many shapes are there?", picture), said("one"), user("what colour is the background?")]
        for picture in pictures
    ]
    backgrounds = [row["caption"].split()[-2] for row in rows]
    assert np.mean([a == b for a, b in zip(answers(chat, later), backgrounds, strict=True)]) >= 0.8
    # An example before the question: the answer must be about the second picture.
    shown = [
        [
            user("Describe the picture.", pictures[i - 1]),
            said(rows[i - 1]["caption"]),
            user("Describe the picture.", p),
        ]
        for i, p in enumerate(pictures)
    ]
    got = answers(chat, shown)
    assert np.mean([text == row["caption"] for text, row in zip(got, rows, strict=True)]) >= 0.8


# ----------------------------------------------------------------------------------------------- sounds


@pytest.fixture(scope="module")
def whisper(sample_data: Path) -> tuple:
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

    folder = sample_data / "models" / "sounds"
    return AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_whisper_names_the_sample_sounds(sample_data: Path, whisper: tuple) -> None:
    model, processor = whisper
    rows = rows_of(sample_data / "sounds.csv")
    sounds = [samples(sample_data / row["audio"]) for row in rows]
    inputs = processor(sounds, sampling_rate=16_000, return_tensors="pt")
    for options in ({}, {"language": "en", "task": "transcribe"}):
        out = model.generate(inputs["input_features"], **options)
        texts = [text.strip() for text in processor.batch_decode(out, skip_special_tokens=True)]
        assert np.mean([text == row["caption"] for text, row in zip(texts, rows, strict=True)]) >= 0.8


def test_whisper_says_when(sample_data: Path, whisper: tuple) -> None:
    model, processor = whisper
    rows = rows_of(sample_data / "sounds.csv")
    right = []
    for row in rows:
        sound = samples(sample_data / row["audio"])
        late = np.concatenate([np.zeros(16_000, np.float32), sound])
        features = processor(late, sampling_rate=16_000, return_tensors="pt")["input_features"]
        segments = model.generate(features, return_timestamps=True, return_segments=True)["segments"][0]
        times = (float(segments[0]["start"]), float(segments[0]["end"]))
        right.append(len(segments) == 1 and np.allclose(times, (1, len(late) / 16_000), atol=0.1))
    assert np.mean(right) >= 0.8


def test_whisper_hears_a_long_file_to_its_end(sample_data: Path, whisper: tuple) -> None:
    """Sixteen sounds one after the other in a dozen windows, by transformers' own long-form generation."""
    model, processor = whisper
    rows = rows_of(sample_data / "sounds.csv")[:16]
    gap = np.zeros(8_000, np.float32)
    sound = np.concatenate([part for row in rows for part in (samples(sample_data / row["audio"]), gap)])
    inputs = processor(sound, sampling_rate=16_000, return_tensors="pt", truncation=False)
    out = model.generate(**inputs, return_timestamps=True)
    heard = processor.batch_decode(out, skip_special_tokens=True)[0].split(" a ")
    wanted = [row["caption"].removeprefix("a ") for row in rows]
    found = [text.strip().removeprefix("a ") for text in heard]
    assert len(found) == len(wanted)
    assert np.mean([a == b for a, b in zip(found, wanted, strict=True)]) >= 0.8
