"""The family *speech*: a sound in, what is said in it out (Whisper, Distil-Whisper).

A sound is cut into windows of the length that the model was trained with (30 s), which overlap by a sixth on both
sides; windows of many sounds share a batch. What is written of a sound's windows is joined by the tokenizer's own
rules. So does transformers' `pipeline("automatic-speech-recognition", chunk_length_s=30)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np

from mmcli.core.errors import ConfigError, RowError
from mmcli.core.records import DecodeOptions, Heard, Modality, Payload, Sample, Transcript
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.facts import available, sampling_rate
from mmcli.models.inputs import AUDIO_SEED, open_feature_extractor, open_tokenizer
from mmcli.models.options import Generation, ModelOptions, Task
from mmcli.models.plan import AudioSpec, GenerationPlan, Inputs

FAMILY = "speech"
# A window is as much work as so many pictures: 1,500 places in the encoder against the 197 to 577 of a ViT.
COST = 4
# Of a window that its neighbour holds, too, on each side: transformers' `stride_length_s`.
OVERLAP = 1 / 6


@dataclass(frozen=True, slots=True)
class Speech:
    """How a model type hears. `model_class`: the transformers class."""

    model_class: str


# model_type of config.json -> how it is called
SPEECH = {"whisper": Speech("WhisperForConditionalGeneration")}


@dataclass(frozen=True, slots=True)
class Tongue:
    """What a checkpoint is told of language and task.

    language   the token of all sounds' language, "<|de|>"; None: found out for each sound, or never told
    task       "transcribe" or "translate"; None: never told
    languages  token of each language that it knows -> id; none: a model of one language
    tasks      name -> id of its token
    first      id of the first timestamp, 0.00 s
    """

    language: str | None
    task: str | None
    first: int
    languages: Mapping[str, int] = field(default_factory=dict)
    tasks: Mapping[str, int] = field(default_factory=dict)

    @property
    def begin(self) -> int:
        """Tokens before what is written: the start, and language and task where they are told."""
        return 3 if self.languages else 1


def find(kind: str, architectures: Sequence[str], task: Task) -> Speech | None:
    """The row of a model type that hears speech."""
    row = SPEECH.get(kind) if task == "caption" else None
    return row if row is not None and (not architectures or row.model_class in architectures) else None


def names(task: Task) -> Sequence[str]:
    """The model types that hear speech."""
    return tuple(SPEECH) if task == "caption" else ()


def plan(
    checkpoint: Checkpoint, options: ModelOptions, dtype: str, row: Speech, generation: Generation
) -> GenerationPlan:
    """What `row` says about this checkpoint. Raises ConfigError."""
    if not available(checkpoint, "audio") or not available(checkpoint, "text"):
        raise ConfigError(f"-m {checkpoint.id}: speech needs its preprocessor_config.json and its tokenizer")
    if options.compile:
        raise ConfigError("--compile is not for speech: the length of what is written changes at every step")
    given = {
        "--prompt": generation.prompt is not None,
        "--system": generation.system is not None,
        "--examples": bool(generation.examples),
    }
    for flag in (name for name, value in given.items() if value):
        raise ConfigError(f"{flag}: -m {checkpoint.id} hears speech and takes none; leave it out")
    tongue = _tongue(checkpoint, generation)
    rate = sampling_rate(checkpoint)
    inputs = Inputs(audio=AudioSpec("fixed", rate))
    return GenerationPlan(
        checkpoint=checkpoint,
        family=FAMILY,
        processor="mmcli.models.speech:SpeechProcessor",
        loader="mmcli.models.speech_runner:load",
        runner="mmcli.models.speech_runner:SpeechRunner",
        joiner="mmcli.models.speech:Joiner",
        output="speech",
        detail=tongue,
        inputs=inputs,
        decode=DecodeOptions(modalities=inputs.modalities, sampling_rate=rate),
        dtype=dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        compile=False,
        generation=replace(
            generation,
            max_new_tokens=_limit(checkpoint, tongue, generation),
            language=tongue.language and tongue.language[2:-2],
            translate=tongue.task == "translate",
        ),
    )


def _limit(checkpoint: Checkpoint, tongue: Tongue, generation: Generation) -> int:
    """Tokens of a window at most. Raises ConfigError when more are asked for than the model has places for."""
    most = checkpoint.config.max_target_positions - tongue.begin
    if not generation.limited:
        return int(min(most, checkpoint.json("generation_config.json").get("max_length") or most))
    if generation.max_new_tokens > most:
        raise ConfigError(
            f"--max-new-tokens {generation.max_new_tokens}: -m {checkpoint.id} has room for {most} in a window"
        )
    return generation.max_new_tokens


# ------------------------------------------------------------------------------------------ language and task


def _tongue(checkpoint: Checkpoint, generation: Generation) -> Tongue:
    """What the command says, else generation_config.json, else the tokenizer. Raises ConfigError."""
    settings = checkpoint.json("generation_config.json")
    lacks_languages = settings.get("is_multilingual") and "lang_to_id" not in settings
    if lacks_languages or "no_timestamps_token_id" not in settings:
        settings = {**settings, **_told_by_tokenizer(checkpoint)}
    multilingual = settings.get("is_multilingual", True) and bool(settings.get("lang_to_id"))
    first = int(settings["no_timestamps_token_id"]) + 1
    if not multilingual:
        given = {f"--language {generation.language}": generation.language, "--translate": generation.translate}
        for flag in (name for name, value in given.items() if value):
            raise ConfigError(f"{flag}: -m {checkpoint.id} knows one language only; leave it out")
        return Tongue(None, None, first)
    languages, tasks = settings["lang_to_id"], settings["task_to_id"]
    forced = _forced(settings, checkpoint)
    language = generation.language or settings.get("language")
    if language is not None:
        language = _language_token(language, languages, checkpoint)
    else:
        language = next((token for token, number in languages.items() if number in forced), None)
    task = settings.get("task") or next((name for name, number in tasks.items() if number in forced), "transcribe")
    return Tongue(language, "translate" if generation.translate else task, first, languages, tasks)


def _forced(settings: Mapping[str, Any], checkpoint: Checkpoint) -> list[int]:
    """Ids of tokens that an older checkpoint forces behind the start, unless language or task are set."""
    if settings.get("language") or settings.get("task"):
        return []
    pairs = settings.get("forced_decoder_ids") or checkpoint.json("config.json").get("forced_decoder_ids") or ()
    return [number for _, number in pairs if number is not None]


def _told_by_tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    """What an old generation_config.json lacks. Raises ConfigError for a tokenizer without timestamps."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    vocabulary = open_tokenizer(checkpoint).get_vocab()
    if "<|notimestamps|>" not in vocabulary:
        raise ConfigError(f"-m {checkpoint.id}: its tokenizer has no timestamps, by which windows are joined")
    # As openai/whisper tells them apart: the tokens of languages are there in any case, but not learnt.
    languages = checkpoint.config.vocab_size >= 51865
    names = {f"<|{code}|>" for code in LANGUAGES} if languages else set()
    tasks = ("transcribe", "translate") if languages else ()
    return {
        "no_timestamps_token_id": vocabulary["<|notimestamps|>"],
        "lang_to_id": {name: vocabulary[name] for name in sorted(names & vocabulary.keys())},
        "task_to_id": {task: vocabulary[f"<|{task}|>"] for task in tasks},
    }


def _language_token(language: str, languages: Mapping[str, int], checkpoint: Checkpoint) -> str:
    """`de`, `german` or `<|de|>` -> `<|de|>`. Raises ConfigError for one that the checkpoint does not know."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    name = language.lower()
    for token in (name, f"<|{TO_LANGUAGE_CODE.get(name, name)}|>"):
        if token in languages:
            return token
    known = ", ".join(sorted(token[2:-2] for token in languages))
    raise ConfigError(f"--language {language!r}: -m {checkpoint.id} knows {known}")


# ------------------------------------------------------------------------------------------ sound -> windows


class SpeechProcessor:
    """A sound -> `input_features` of each of its windows (see RecordProcessor).

    Also `sound` int64 [2], a digest that tells whose window it is, and `window` float64 [4], seconds: where it
    begins, and those of Heard.
    """

    def __init__(self, plan: GenerationPlan) -> None:
        import torch

        torch.set_num_threads(1)
        self._extractor = open_feature_extractor(plan.checkpoint)

    def record(self, media: Sequence[tuple[Modality, Payload]], variables: Sequence[Any]) -> tuple[Sample, ...]:
        """One Sample for each window, in order."""
        waveform, rate = np.ascontiguousarray(media[0][1].waveform), self._extractor.sampling_rate
        sound = np.frombuffer(blake2b(waveform.data, digest_size=16).digest(), np.int64)
        samples = []
        for start, stop, before, behind in windows(len(waveform), self._extractor.n_samples):
            arrays = {
                "input_features": self._features(waveform[start:stop]),
                "sound": sound,
                "window": np.array([start, stop - start, before, behind]) / rate,
            }
            # The first windows go first, since they tell the language of the others.
            samples.append(Sample("audio", arrays, length=int(start == 0), cost=COST))
        return tuple(samples)

    def _features(self, window: np.ndarray) -> np.ndarray:
        """float32 [mel, frames]. One window at a time: the spectrum of an hour would take 0.9 GB."""
        import torch

        # What dithering draws, of the few that dither, depends on no other window; and what else draws in this
        # process goes on as if nothing had been read (dropout in training).
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(AUDIO_SEED)
            found = self._extractor(window, sampling_rate=self._extractor.sampling_rate, return_tensors="np")
        features: np.ndarray = found["input_features"][0]
        return features


def windows(samples: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, stop, overlap with the window before, with the one behind), in samples; at least one.

    As `chunk_iter` of transformers' pipeline with its default strides.
    """
    overlap = round(length * OVERLAP)
    step = length - 2 * overlap
    for start in range(0, max(1, samples), step):
        stop = min(start + length, samples)
        yield start, stop, overlap if start else 0, overlap if stop < samples else 0
        if stop == samples:
            return


# ------------------------------------------------------------------------------------------ windows -> transcript


class Joiner:
    """What was heard in the windows of a sound -> its Transcript."""

    def __init__(self, plan: GenerationPlan) -> None:
        self._checkpoint = plan.checkpoint

    def __call__(self, outputs: Sequence[Heard]) -> Transcript:
        """Raises RowError for windows that cannot be joined."""
        given = [{"tokens": np.array([one.tokens], np.int64), "stride": one.window} for one in outputs]
        try:
            # What the pipeline itself calls; nothing public joins windows.
            text, more = self._tokenizer._decode_asr(
                given, return_timestamps=True, return_language=None, time_precision=self._precision
            )
        except Exception as error:
            raise RowError("invalid_output", f"its windows cannot be joined: {error}", stage="post") from error
        seconds = sum(length - before - behind for length, before, behind in (one.window for one in outputs))
        tokens = sum(one.n_tokens for one in outputs)
        return Transcript(
            text=text.strip(),
            language=outputs[0].language,
            segments=tuple(segments(more["chunks"], round(seconds, 3))),
            n_windows=len(outputs),
            finish_reason="length" if any(one.finish_reason == "length" for one in outputs) else "stop",
            n_tokens=tokens,
            mean_logprob=sum(one.mean_logprob * one.n_tokens for one in outputs) / tokens,
            repetition=any(one.repetition for one in outputs),
        )

    @cached_property
    def _tokenizer(self) -> Any:
        return open_tokenizer(self._checkpoint)

    @cached_property
    def _precision(self) -> float:
        """Seconds between two timestamps."""
        extractor = open_feature_extractor(self._checkpoint)
        return float(extractor.chunk_length / self._checkpoint.config.max_source_positions)


def segments(chunks: Sequence[Mapping[str, Any]], seconds: float) -> Iterator[tuple[float, float, str]]:
    """(start, end, text) of what the tokenizer has told apart, without what has no text.

    Where no time was written, a segment begins where the one before ends, and ends with the sound.
    """
    last = 0.0
    for chunk in chunks:
        start, end = chunk["timestamp"]
        start = last if start is None else float(start)
        last = max(start, seconds) if end is None else float(end)
        if text := chunk["text"].strip():
            yield start, last, text
