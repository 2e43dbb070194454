"""Train a small but genuine Whisper on the sounds of `make_world.py`, from scratch, on two CPU cores.

    python sample_data/train_sounds.py          # writes sample_data/models/sounds, with a model card

It writes what it hears in windows of three seconds ("a low steady sine tone"), and when, if asked for timestamps.
It learns as Whisper did: half of the targets carry timestamps, and of a sound that the window cuts off they have
the start only, where the next window of a long file then begins. As with the picture models, heads train along,
here to read off the encoder what sounds at each moment, and are thrown away.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import make_world as world
import numpy as np
import torch
import training
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
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
TICK = 0.02  # seconds from one timestamp to the next
IGNORED = -100
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


def read_on(features: torch.Tensor, events: Events, rng: random.Random) -> tuple[torch.Tensor, Events]:
    """Begin at the end of one of the sounds, with zeros behind the rest, as generate() reads on in long files."""
    ends = [end for _, end, _ in events if end is not None]
    if not ends:
        return features, events
    step = round(rng.choice(ends) / TICK)
    rest = torch.zeros_like(features)
    rest[:, : features.shape[1] - 2 * step] = features[:, 2 * step :]  # a frame is half a tick
    past = step * TICK
    return rest, [(start - past, end and end - past, words) for start, end, words in events if start >= past]


def moments_of(events: Events) -> torch.Tensor:
    """Say what sounds at each of the encoder's positions: indices of TRAITS, 0 for silence, int8 [positions, 3]."""
    moments = torch.zeros(round(SECONDS / TICK), len(TRAITS), dtype=torch.int8)
    for start, end, words in events:
        _, pitch, manner, timbre = words.split(maxsplit=3)
        heard = [1 + list(t).index(word) for t, word in zip(TRAITS, (pitch, manner, timbre), strict=True)]
        moments[round(start / TICK) : round((end or SECONDS) / TICK)] = torch.tensor(heard, dtype=torch.int8)
    return moments


class MomentHeads(nn.Module):
    """Linear read-outs, from every state of the encoder, of what sounds at that moment; used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1 + len(values)) for values in TRAITS)

    def forward(self, states: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
        """Add the traits' cross-entropies; states are [N, positions, WIDTH], moments [N, positions, traits]."""
        flat = states.flatten(0, 1), moments.flatten(0, 1).T
        losses = [functional.cross_entropy(h(flat[0]), t) for h, t in zip(self.heads, flat[1], strict=True)]
        return torch.stack(losses).sum()


class Batches:
    """Seeded batches: windows drawn and their features computed once; timestamps asked for in every second one."""

    def __init__(self, processor: WhisperProcessor, windows: int, size: int, seed: int) -> None:
        self.rng = random.Random(f"batches {seed}")
        self.tokenizer, self.size = processor.tokenizer, size
        drawn = [draw_window(self.rng, cut=index % 2 == 0) for index in range(windows)]
        self.features = features_of([window.sound for window in drawn], processor)
        self.events = [window.events for window in drawn]
        for index in self.rng.sample(range(windows), windows // 5):
            self.features[index], self.events[index] = read_on(self.features[index], self.events[index], self.rng)
        self.moments = torch.stack([moments_of(events) for events in self.events])

    def target(self, index: int) -> list[int]:
        """Write the tokens to be learned for a window; those cut off at its end only with timestamps."""
        events = self.events[index]
        stamped = self.rng.random() < 0.5 or any(end is None for _, end, _ in events)
        tokenizer = self.tokenizer
        name = "<|startoftranscript|><|en|><|transcribe|>" + ("" if stamped else "<|notimestamps|>")
        for start, end, words in events:
            stamp = f"<|{round(start / TICK) * TICK:.2f}|>"
            if not stamped:
                name += f" {words}"
            elif end is None:
                name += stamp
            else:
                name += f"{stamp} {words}<|{round(end / TICK) * TICK:.2f}|>"
        if stamped and not events:
            name += "<|0.00|>"
        return tokenizer(name + "<|endoftext|>", add_special_tokens=False)["input_ids"]

    def draw(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Make one batch: features, decoder inputs and labels (the language and task are given, not learned).

        Beside it come the moments of its windows, [N, positions, traits].
        """
        chosen = self.rng.sample(range(len(self.events)), self.size)
        targets = [self.target(index) for index in chosen]
        longest = max(map(len, targets))
        ids = torch.full((self.size, longest), self.tokenizer.pad_token_id)
        labels = torch.full((self.size, longest), IGNORED)
        for row, target in enumerate(targets):
            ids[row, : len(target)] = torch.tensor(target)
            labels[row, : len(target)] = ids[row, : len(target)]
        labels[:, :3] = IGNORED
        given = labels == self.tokenizer.convert_tokens_to_ids("<|notimestamps|>")
        labels = labels.masked_fill(given, IGNORED)
        batch = {
            "input_features": self.features[chosen].float(),
            "decoder_input_ids": ids[:, :-1],
            "labels": labels[:, 1:],
        }
        return batch, self.moments[chosen].long()


def features_of(sounds: Sequence[np.ndarray], processor: WhisperProcessor) -> torch.Tensor:
    """Compute log-mel features of windows: float16 [N, 80, 100 * SECONDS]."""
    done = []
    for start in range(0, len(sounds), 64):
        part = [np.asarray(sound) for sound in sounds[start : start + 64]]
        out = processor.feature_extractor(part, sampling_rate=world.RATE, return_tensors="pt")
        done.append(out["input_features"].half())
    return torch.cat(done)


def train(model: WhisperForConditionalGeneration, batches: Batches, steps: int) -> None:
    """Train in place: the texts' loss, helped by the moments' heads."""
    heads = MomentHeads()

    def step_loss(done: float) -> torch.Tensor:
        inputs, moments = batches.draw()
        out = model(**inputs)
        return out.loss + training.help_weight(done) * heads(out.encoder_last_hidden_state, moments)

    training.fit([model, heads], step_loss, steps)


# ------------------------------------------------------------------------------------------- evaluation


def transcribe(folder: Path, sounds: Sequence[np.ndarray], **options: Any) -> list[str]:
    """Write what is heard with the saved model, as any user of transformers would."""
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    processor = WhisperProcessor.from_pretrained(folder)
    texts = []
    for start in range(0, len(sounds), 50):
        inputs = processor(list(sounds[start : start + 50]), sampling_rate=world.RATE, return_tensors="pt")
        out = model.generate(inputs["input_features"], language="en", task="transcribe", **options)
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
| form | multilingual, with English as the only language; with timestamps or without |
| training | {steps:,} steps of {batch} windows, from {windows:,} drawn, seed {seed} |
| time | {minutes:.0f} minutes of CPU time, with --threads {threads} |
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
        parameters=WhisperForConditionalGeneration.from_pretrained(args.out).num_parameters(),
        seconds=SECONDS,
        held_out=world.HELD_OUT_OF,
        minutes=minutes,
        **time_errors(args.out, args.seed),
        **{name: getattr(args, name) for name in ("steps", "batch", "windows", "seed", "threads")},
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")
    for name, value in scores.items():
        print(f"{value:6.1%}  {name}")


def main() -> None:
    """Train, save and evaluate one model."""
    args = training.arguments(__doc__, "sounds", steps=700, batch=64, windows=8000)
    training.settle(args.seed, args.threads)
    processor = make_processor()
    model = make_model(processor.tokenizer)
    batches = Batches(processor, args.windows, args.batch, args.seed)
    print(f"{model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens; drawn", flush=True)
    train(model, batches, args.steps)
    minutes = time.process_time() / 60
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    # AutoFeatureExtractor and other tools read preprocessor_config.json, which WhisperProcessor does not write.
    processor.feature_extractor.save_pretrained(args.out)
    report(args, minutes)


if __name__ == "__main__":
    main()
