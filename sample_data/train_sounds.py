"""Train a small but genuine Whisper on the sounds of `make_world.py`, from scratch, on two CPU cores.

    python sample_data/train_sounds.py          # writes sample_data/models/sounds, with a model card

It writes what it hears in windows of three seconds ("a low steady sine tone"), and when. It learns as Whisper did:
of a sound that the window cuts off its text has the start only, where the next window of a long file then begins.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import make_world as world
import numpy as np
import torch
import training
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

WIDTH, LAYERS, DECODER_LAYERS = 128, 2, 2
SECONDS = 3  # one window; 50 encoder positions a second
VALIDATED = 200
TICK = 0.02  # seconds from one timestamp to the next
TRAITS = (world.PITCHES, world.MANNERS, world.TIMBRES)  # in the order of a sound's words
KINDS = [(p, m, t) for p in world.PITCHES for m in world.MANNERS for t in world.TIMBRES]

# (start, end, words) of each sound, in seconds; the end is None where the window cuts it off.
Events = list[tuple[float, float | None, str]]


# ----------------------------------------------------------------------------------------------- sounds


@dataclass
class Heard:
    """A window of sound, and what is in it."""

    sound: np.ndarray
    events: Events


def cell_of(kind: tuple[str, str, str], seed: int | str) -> str:
    """Name the cell, of length (50 ms) by pitch (0.5 %), of the sound that a seed draws."""
    rng = random.Random(seed)
    length, detuning = rng.uniform(0.5, 0.9), rng.uniform(0.97, 1.03)  # the first two draws of world.synthesise
    return f"{' '.join(kind)} {int(length / 0.05)} {int(detuning / 0.005)}"


SAMPLE_CELLS = frozenset(cell_of(kind, " ".join(kind)) for kind in KINDS)


def is_held_out(cell: str) -> bool:
    """Say whether the sounds of a cell are kept from training: one cell in six, and those of the sample files."""
    return cell in SAMPLE_CELLS or zlib.crc32(cell.encode()) % world.HELD_OUT_OF == 0


def draw_sound(rng: random.Random, held_out: bool) -> tuple[str, np.ndarray]:
    """Draw one sound with its words: float32 in [-1, 1], of another pitch, length and loudness each time."""
    kind = rng.choice(KINDS)
    while is_held_out(cell_of(kind, seed := rng.randrange(2**31))) != held_out:
        pass
    sound = world.synthesise(*kind, random.Random(seed)) / np.float32(32768)
    return f"a {' '.join(kind)}", sound * np.float32(10 ** rng.uniform(-1.2, 0.25))


def draw_window(rng: random.Random, held_out: bool = False, most: int = 3, cut: bool = True) -> Heard:
    """Put one to `most` sounds into a window, with silence or faint noise between; one window in 25 has none.

    Where windows are `cut` from something longer, sounds go on beyond their ends, or began before them.
    """
    samples = SECONDS * world.RATE
    window = np.zeros(samples, np.float32)
    events: Events = []
    at = rng.choice((0.0, rng.uniform(0, 1)))
    if cut and rng.random() < 0.3:
        words, sound = draw_sound(rng, held_out)
        left = sound[rng.randrange(len(sound) - round(0.2 * world.RATE)) :]
        window[: len(left)] = left
        events.append((0.0, len(left) / world.RATE, words))
        at = len(left) / world.RATE + rng.uniform(0.15, 0.9)
    for _ in range(rng.choice((1, 1, most)) if rng.random() > 0.04 else 0):
        words, sound = draw_sound(rng, held_out)
        start, end = round(at * world.RATE), round(at * world.RATE) + len(sound)
        if end > samples:
            if cut and samples - start > 0.1 * world.RATE:
                window[start:] += sound[: samples - start]
                events.append((at, None, words))
            break
        window[start:end] += sound
        events.append((at, end / world.RATE, words))
        at = end / world.RATE + rng.uniform(0.15, 0.9)
    if rng.random() < 0.5:
        noise = np.random.default_rng(rng.randrange(2**32)).standard_normal(samples).astype(np.float32)
        window += 10 ** rng.uniform(-4.5, -2.5) * noise
    return Heard(window, events)


# -------------------------------------------------------------------------------------------- processor


def make_tokenizer() -> WhisperTokenizer:
    """Build Whisper's own kind of tokenizer: byte pairs, its special tokens (English only), timestamps last."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    learned.train_from_iterator([f" a {' '.join(kind)}" for kind in KINDS], trainer)
    state = json.loads(learned.to_str())["model"]
    vocabulary = {**state["vocab"], "<|endoftext|>": len(state["vocab"])}
    tokenizer = WhisperTokenizer(
        vocab=vocabulary, merges=[tuple(pair) for pair in state["merges"]], pad_token="<|endoftext|>"
    )
    tasks = ["<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>"]
    rest = ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*tasks, *rest]})
    tokenizer.add_tokens([f"<|{tick * TICK:.2f}|>" for tick in range(round(SECONDS / TICK) + 1)])
    tokenizer.set_prefix_tokens(language="en", task="transcribe")
    return tokenizer


def make_processor() -> WhisperProcessor:
    """Join Whisper's feature extractor, with short windows, and the tokenizer."""
    return WhisperProcessor(WhisperFeatureExtractor(chunk_length=SECONDS), make_tokenizer())


def make_model(tokenizer: WhisperTokenizer) -> WhisperForConditionalGeneration:
    """Build an untrained Whisper of about 1.1 million parameters."""
    start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=DECODER_LAYERS,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH,
        max_source_positions=round(SECONDS / TICK),
        decoder_start_token_id=start,
        begin_suppress_tokens=None,
        **ends,
    )
    model = WhisperForConditionalGeneration(config)
    start_times(model, tokenizer.convert_tokens_to_ids("<|0.00|>"))
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start,
        is_multilingual=True,
        lang_to_id={"<|en|>": tokenizer.convert_tokens_to_ids("<|en|>")},
        task_to_id={name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("transcribe", "translate")},
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        prev_sot_token_id=tokenizer.convert_tokens_to_ids("<|startofprev|>"),
        max_initial_timestamp_index=round(SECONDS / TICK),
        return_timestamps=False,
        max_length=448,
        **ends,
    )
    return model


@torch.no_grad()
def start_times(model: WhisperForConditionalGeneration, first: int) -> None:
    """Let timestamps start as the encoder's positions do, which are as far apart: neighbours are alike at once."""
    positions = model.model.encoder.embed_positions.weight
    model.get_input_embeddings().weight[first : first + len(positions)] = 0.05 * positions


# --------------------------------------------------------------------------------------------- training


def timed(events: Events) -> str:
    """Write a window's sounds as Whisper does, with times on its grid; silence is the first time alone."""
    text = ""
    for start, end, words in events:
        text += f"<|{round(start / TICK) * TICK:.2f}|>"
        text += "" if end is None else f" {words}<|{round(end / TICK) * TICK:.2f}|>"
    return text or "<|0.00|>"


def rows(windows: int, split: str, seed: int) -> Iterator[tuple[np.ndarray, dict[str, str]]]:
    """Windows of sound, int16, with what is in them; of those to learn from, half are cut from something longer."""
    rng = random.Random(f"rows {split} {seed}")
    for number in range(windows):
        window = draw_window(rng, held_out=split != "train", cut=split == "train" and number % 2 == 0)
        sound = np.rint(window.sound.clip(-1, 1) * 32767).astype(np.int16)
        # Of the first sound: heads help the encoder to hear it.
        yield sound, {"text": timed(window.events), **first_traits(window.events)}


def first_traits(events: Events) -> dict[str, str]:
    """Pitch, manner and timbre of a window's only sound; nothing of several."""
    words = events[0][2].split(maxsplit=3)[1:] if len(events) == 1 else [""] * 3
    return dict(zip(("pitch", "manner", "timbre"), words, strict=True))


def write(folder: Path, windows: int, seed: int) -> None:
    """Write the rows and the untrained checkpoint."""
    processor = make_processor()
    start = folder / "start"
    make_model(processor.tokenizer).save_pretrained(start)
    processor.save_pretrained(start)
    # AutoFeatureExtractor and other tools read preprocessor_config.json, which WhisperProcessor does not write.
    processor.feature_extractor.save_pretrained(start)
    training.write_rows(folder, "train", rows(windows, "train", seed), "audio")
    training.write_rows(folder, "val", rows(VALIDATED, "heldout", seed), "audio")


def features_of(sounds: Sequence[np.ndarray], processor: WhisperProcessor) -> torch.Tensor:
    """Compute log-mel features of windows: float16 [N, 80, 100 * SECONDS]."""
    done = []
    for start in range(0, len(sounds), 64):
        part = [np.asarray(sound) for sound in sounds[start : start + 64]]
        out = processor.feature_extractor(part, sampling_rate=world.RATE, return_tensors="pt")
        done.append(out["input_features"].half())
    return torch.cat(done)


# ------------------------------------------------------------------------------------------- evaluation


def transcribe(folder: Path, sounds: Sequence[np.ndarray], **options: Any) -> list[str]:
    """Write what is heard with the saved model, as any user of transformers would."""
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    processor = WhisperProcessor.from_pretrained(folder)
    texts = []
    for start in range(0, len(sounds), 50):
        inputs = processor(list(sounds[start : start + 50]), sampling_rate=world.RATE, return_tensors="pt")
        out = model.generate(
            inputs["input_features"], language="en", task="transcribe", return_timestamps=True, **options
        )
        texts += [text.strip() for text in processor.batch_decode(out, skip_special_tokens=True)]
    return texts


def sample_files() -> tuple[list[np.ndarray], list[str]]:
    """Read the sounds of `sounds.csv` with what they are."""
    with (training.HERE / "sounds.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    sounds = []
    for row in rows:
        with av.open(str(training.HERE / row["audio"])) as container:
            parts = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
        sounds.append(np.concatenate(parts) / np.float32(32768))
    return sounds, [row["caption"] for row in rows]


def evaluate(folder: Path, seed: int) -> dict[str, float]:
    """Measure the exact texts of the sample files and of fresh held-out windows."""
    sounds, captions = sample_files()
    scores = {"the 24 files of `sounds/`": training.exact_match(transcribe(folder, sounds), captions)}
    rng = random.Random(f"evaluation {seed}")
    for name, numbers in {"silence": {0}, "one sound": {1}, "two or three sounds": {2, 3}}.items():
        windows: list[Heard] = []
        while len(windows) < (50 if numbers == {0} else 400):
            window = draw_window(rng, True, cut=False)
            if len(window.events) in numbers:
                windows.append(window)
        texts = transcribe(folder, [window.sound for window in windows])
        wanted = [" ".join(words for _, _, words in window.events) for window in windows]
        scores[f"{len(windows)} held-out windows: {name}"] = training.exact_match(texts, wanted)
    return scores


def time_errors(folder: Path, seed: int) -> dict[str, float]:
    """Ask for the times of one sound in each of 200 fresh held-out windows: median errors in seconds."""
    rng = random.Random(f"times {seed}")
    windows = []
    while len(windows) < 200:
        window = draw_window(rng, True, most=1, cut=False)
        if window.events:
            windows.append(window)
    model, processor = (
        WhisperForConditionalGeneration.from_pretrained(folder),
        WhisperProcessor.from_pretrained(folder),
    )
    features = features_of([window.sound for window in windows], processor).float()
    out = model.generate(features, language="en", task="transcribe", return_timestamps=True, return_segments=True)
    errors = []
    for window, segments in zip(windows, out["segments"], strict=True):
        start, end, _ = window.events[0]
        found = (float(segments[0]["start"]), float(segments[-1]["end"])) if segments else (np.inf, np.inf)
        errors.append((abs(found[0] - start), abs(found[1] - end)))
    starts, ends = np.median(errors, axis=0)
    return {"start": float(starts), "end": float(ends)}


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: automatic-speech-recognition
---
# A tiny Whisper that names sounds

A genuine `WhisperForConditionalGeneration` ({parameters:,} parameters, float32), trained from scratch by
`train_sounds.py` on the sounds of `make_world.py`. It exists so that examples and tests of mmcli run offline, in
seconds, with a model of sound that is right most of the time.

**It knows only this world**: tones and noise, low, middle or high, steady or pulsing, up to three one after the
other. It hears no speech: of anything else, what it writes means nothing. It is for files of up to three seconds;
the windows of longer ones are joined by their words, which are few and alike here, and some sounds get lost.

| | |
| --- | --- |
| input | 16 kHz, windows of {seconds} seconds |
| form | multilingual, with English as the only language; always with timestamps (`return_timestamps=True`) |
| training | `mmcli finetune`, `configs/sounds/train.toml`: {steps}, of {windows:,} windows, seed {seed} |
| time | {minutes:.0f} minutes, with --threads {threads} |
| held out | one in {held_out} cells of pitch (0.5 %) by length (50 ms) of each kind, and all those of the files |
| timestamps | median error {start:.2f} s of starts, {end:.2f} s of ends (200 held-out sounds) |

Exact matches of the saved checkpoint, opened by plain transformers in float32, greedy:

| measured on | exact |
| --- | --- |
{rows}
"""


def report(args: argparse.Namespace, minutes: float) -> None:
    """Evaluate the saved model and write its card."""
    scores = evaluate(args.out, args.seed)
    card = CARD.format(
        rows="\n".join(f"| {name} | {value:.1%} |" for name, value in scores.items()),
        parameters=training.load(args.out).num_parameters(),
        seconds=SECONDS,
        held_out=world.HELD_OUT_OF,
        minutes=minutes,
        steps=training.steps_of("sounds", args),
        **time_errors(args.out, args.seed),
        **{name: getattr(args, name) for name in ("windows", "seed", "threads")},
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")
    for name, value in scores.items():
        print(f"{value:6.1%}  {name}")


def main() -> None:
    """Train, save and evaluate one model."""
    args = training.arguments(__doc__, "sounds", windows=12_000)
    training.settle(args.seed, args.threads)
    report(args, training.finetune("sounds", args, lambda folder: write(folder, args.windows, args.seed)))


if __name__ == "__main__":
    main()
