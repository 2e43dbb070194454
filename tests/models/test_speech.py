"""Whisper hears, for every sound and batch size, what the checkpoint's own code hears in that sound alone."""

from __future__ import annotations

import json
import math
import shutil
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_speech
import torch
import torchaudio
import transformers as hf
from model_runs import DEVICE, outputs_of
from rare import rarely
from safetensors.torch import load_file, save_file
from tiny_speech import POSITIONS, RATE, WINDOW
from transformers.pipelines.automatic_speech_recognition import chunk_iter

from mmcli.cli.boundary import run
from mmcli.core.errors import ConfigError, RowError
from mmcli.core.records import Audio, DecodeOptions, Heard, Media, Sample, Transcript
from mmcli.media.decode import decode
from mmcli.models.options import Generation, ModelOptions
from mmcli.models.plan import GenerationPlan
from mmcli.models.resolve import resolve_writer
from mmcli.models.speech import Joiner, windows
from mmcli.sinks.sidecars import srt_text

LENGTH = WINDOW * RATE
# Samples: hardly any, half a window, exactly one, one more, several windows.
LENGTHS = (100, LENGTH // 2, LENGTH, LENGTH + 1, 90_000)
BY_DEFAULT = Generation(limited=False)
GERMAN = Generation(limited=False, language="German")


@pytest.fixture(autouse=True)
def quiet() -> None:
    hf.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint, made when it is first asked for."""

    @cache
    def build(name: str) -> Path:
        return tiny_speech.BUILDERS[name](tmp_path_factory.mktemp("tiny") / name)

    return build


@cache
def sounds() -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(0)
    return tuple(_sound(generator, length) for length in LENGTHS)


def _sound(generator: np.random.Generator, length: int) -> np.ndarray:
    """Quarters of a second, each a tone with noise."""
    time, pieces = np.arange(RATE // 4) / RATE, []
    for _ in range(0, length, RATE // 4):
        tone = np.sin(2 * np.pi * generator.uniform(80, 6000) * time) * generator.uniform()
        pieces.append(tone + generator.normal(size=len(time)) * generator.uniform(0, 0.3))
    return np.concatenate(pieces)[:length].astype(np.float32)


def plan_of(folder: Path | str, generation: Generation = BY_DEFAULT, **options: Any) -> GenerationPlan:
    plan = resolve_writer(ModelOptions(str(folder), device=DEVICE, **options), generation)
    assert isinstance(plan, GenerationPlan)
    return plan


def samples_of(plan: GenerationPlan, waveform: np.ndarray) -> tuple[Sample, ...]:
    return plan.open_processor().record([("audio", Audio(waveform, RATE))], ())


def heard(plan: GenerationPlan, waveforms: Sequence[np.ndarray], batch_size: int) -> list[list[Heard]]:
    """What is heard in each sound's windows; batched as the engine batches: first windows first."""
    runner = plan.load()
    slots = [(row, s) for row, waveform in enumerate(waveforms) for s in samples_of(plan, waveform)]
    slots.sort(key=lambda slot: -slot[1].length)
    found: list[list[Heard]] = [[] for _ in waveforms]
    for start in range(0, len(slots), batch_size):
        batch = slots[start : start + batch_size]
        outputs = outputs_of(runner, [sample for _, sample in batch])
        for (row, _), output in zip(batch, outputs, strict=True):
            found[row].append(output)  # type: ignore[arg-type]
    return found


# ------------------------------------------------------------------------------------------ the reference


@dataclass
class Reference:
    """A checkpoint as its model card calls it: one window at a time, float32, eager."""

    folder: Path

    def __post_init__(self) -> None:
        model_class = hf.WhisperForConditionalGeneration
        self.model = model_class.from_pretrained(self.folder, attn_implementation="eager").eval()
        self.tokenizer = hf.AutoTokenizer.from_pretrained(self.folder)
        self.extractor = hf.AutoFeatureExtractor.from_pretrained(self.folder)
        self.first = self.tokenizer.convert_tokens_to_ids("<|0.00|>")
        self.end = self.tokenizer.eos_token_id

    def features(self, waveform: np.ndarray) -> torch.Tensor:
        found: torch.Tensor = self.extractor(waveform, sampling_rate=RATE, return_tensors="pt")["input_features"]
        return found

    def language(self, waveform: np.ndarray) -> str:
        token = self.tokenizer.decode(self.model.detect_language(self.features(waveform)))
        return str(token).strip("<|>")

    @torch.inference_mode()
    def __call__(self, waveform: np.ndarray, language: str | None, num_beams: int = 1) -> Heard:
        """What is heard in one window, and the mean log-probability of what counts of it."""
        told = {"language": language, "task": "transcribe"} if language else {}
        out = self.model.generate(
            self.features(waveform), return_timestamps=True, num_beams=num_beams, return_dict_in_generate=True,
            output_scores=True, return_segments=True, **told,
        )  # fmt: skip
        logprobs: list[float] = []
        passes = [list(found) for _, found in groupby(out["segments"][0], key=lambda s: id(s["result"]))]
        for segments in passes:
            start, stop = segments[0]["idxs"][0], segments[-1]["idxs"][1]
            written = segments[0]["result"]["sequences"][start:].tolist()
            ended = self.end in written
            text = written[: written.index(self.end)] if ended else written
            whole = self._is_whole(text)
            scores = [score.double().log_softmax(-1) for score in segments[0]["result"]["scores"]]
            kept = stop - start + (whole and ended)
            logprobs += [float(score[token]) for score, token in zip(scores[:kept], written, strict=False)]
        return Heard(
            tokens=tuple(out["sequences"][0].tolist()),
            window=(0, 0, 0),
            language=language,
            finish_reason="length" if whole and not ended else "stop",
            n_tokens=len(logprobs),
            mean_logprob=float(np.mean(logprobs)),
            repetition=False,
        )

    def _is_whole(self, text: list[int]) -> bool:
        """Whether nothing of what was written last is read once more."""
        stamps = "".join("T" if token >= self.first else "-" for token in text)
        return "TT" not in stamps or stamps.endswith("-T")


@pytest.fixture(scope="session")
def reference(tiny: Callable[[str], Path]) -> Callable[[str], Reference]:
    return cache(lambda name: Reference(tiny(name)))


@pytest.fixture(scope="session")
def wanted(reference: Callable[[str], Reference]) -> Callable[..., list[list[Heard]]]:
    """What the reference hears in the windows of `sounds()`; in each sound the language of its first window."""

    @cache
    def compute(name: str, num_beams: int = 1) -> list[list[Heard]]:
        model, found = reference(name), []
        for waveform in sounds() if num_beams == 1 else sounds()[:4]:
            own = model.language(waveform[:LENGTH]) if name == "multilingual" else None
            pieces = [waveform[start:stop] for start, stop, _, _ in windows(len(waveform), LENGTH)]
            found.append([model(piece, own, num_beams) for piece in pieces])
        return found

    return compute


def assert_same(found: list[list[Heard]], wanted: list[list[Heard]]) -> None:
    for one, other in zip(chain(*found), chain(*wanted), strict=True):
        assert (one.tokens, one.language) == (other.tokens, other.language)
        assert (one.finish_reason, one.n_tokens) == (other.finish_reason, other.n_tokens)
        assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=2e-4)


# ------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("length", [12, 100, LENGTH])
def test_windows_are_those_of_the_pipeline(length: int) -> None:
    extractor = type("Extractor", (), {"sampling_rate": 1, "__call__": lambda self, chunk, **_: {"chunk": chunk}})()
    overlap = round(length / 6)
    for samples in (1, 5, length - 1, length, length + 1, 2 * length, 7 * length + 3):
        signal = np.arange(samples)
        chunks = list(chunk_iter(signal, extractor, length, overlap, overlap))
        found = list(windows(samples, length))
        assert [(stop - start, before, behind) for start, stop, before, behind in found] == [
            chunk["stride"] for chunk in chunks
        ]
        for (start, stop, _, _), chunk in zip(found, chunks, strict=True):
            assert np.array_equal(signal[start:stop], chunk["chunk"])


def test_speech_is_heard_at_the_models_rate(tiny: Callable[[str], Path], shared_data: Path) -> None:
    """Resampling and features of a real recording of 11 s, 44.1 kHz, stereo."""
    plan = plan_of(tiny("thirty"))
    modality, audio = decode(Media(file=str(shared_data / "audio/jfk.flac")), plan.decode)
    assert (modality, audio.sampling_rate) == ("audio", RATE)
    (sample,) = samples_of(plan, audio.waveform)
    _, own = decode(Media(file=str(shared_data / "audio/jfk.flac")), DecodeOptions(plan.decode.modalities))
    assert own.sampling_rate == 44_100
    whole = torchaudio.functional.resample(torch.from_numpy(own.waveform), own.sampling_rate, RATE).numpy()
    # By a resampler of another make, whose filter is another: where both let through, they agree.
    share = len(whole) / len(own.waveform)
    other = np.fft.irfft(np.fft.rfft(own.waveform)[: len(whole) // 2 + 1], len(whole)) * share
    low = slice(0, 7000 * len(whole) // RATE)
    assert np.abs(audio.waveform - whole).max() < 1e-5
    spectra = [np.fft.rfft(signal)[low] for signal in (whole, other)]
    assert np.linalg.norm(spectra[0] - spectra[1]) < 0.01 * np.linalg.norm(spectra[1])
    features = hf.WhisperFeatureExtractor()(whole, sampling_rate=RATE, return_tensors="np")["input_features"][0]
    assert sample.arrays["input_features"].shape == features.shape == (80, 3000)
    assert np.abs(sample.arrays["input_features"] - features).max() < 1e-4


# ------------------------------------------------------------------------------------------ what is heard


@pytest.mark.parametrize("batch_size", rarely([1, 5, 16], lambda n: n == 5))
@pytest.mark.parametrize("name", ["multilingual", "english"])
def test_greedy(
    tiny: Callable[[str], Path], wanted: Callable[..., list[list[Heard]]], name: str, batch_size: int
) -> None:
    expected = wanted(name)
    assert len({one.tokens for one in chain(*expected)}) > 4, "what is heard does not tell the sounds apart"
    assert_same(heard(plan_of(tiny(name)), sounds(), batch_size), expected)


def test_all_kinds_of_ends_are_among_them(wanted: Callable[..., list[list[Heard]]]) -> None:
    found = [one for name in ("multilingual", "english") for one in chain(*wanted(name))]
    assert {one.finish_reason for one in found} == {"stop", "length"}
    # Longer than any text is at once: read on within the window.
    assert any(len(one.tokens) > POSITIONS for one in found)


def test_the_language_is_that_of_the_first_window(
    reference: Callable[[str], Reference], wanted: Callable[..., list[list[Heard]]]
) -> None:
    """Else what windows of one sound say would be of several languages: this checkpoint hears some in each."""
    model, differ = reference("multilingual"), 0
    for waveform, expected in zip(sounds(), wanted("multilingual"), strict=True):
        own = [model.language(waveform[start:stop]) for start, stop, _, _ in windows(len(waveform), LENGTH)]
        assert {one.language for one in expected} == {own[0]}
        differ += len(set(own)) > 1
    assert differ, "all windows of a sound are of one language anyway"


def test_beams(tiny: Callable[[str], Path], wanted: Callable[..., list[list[Heard]]]) -> None:
    generation = Generation(limited=False, num_beams=3)
    assert_same(heard(plan_of(tiny("english"), generation), sounds()[:4], 5), wanted("english", 3))


def test_draws_do_not_depend_on_neighbours(tiny: Callable[[str], Path]) -> None:
    drawn = {}
    for seed in (0, 1):
        plan = plan_of(tiny("english"), Generation(limited=False, temperature=1.0, seed=seed))
        one, five = (heard(plan, sounds()[1:4:2], size) for size in (1, 5))
        assert [[h.tokens for h in row] for row in one] == [[h.tokens for h in row] for row in five]
        drawn[seed] = one
    assert drawn[0] != drawn[1]


# ------------------------------------------------------------------------------------------ transcripts


@pytest.mark.parametrize(("name", "language"), [("multilingual", "de"), ("english", None)])
def test_transcripts_are_those_of_the_pipeline(
    tiny: Callable[[str], Path], name: str, language: str | None
) -> None:
    plan = plan_of(tiny(name), GERMAN if language else BY_DEFAULT)
    told = {"language": language, "task": "transcribe"} if language else {}
    pipeline = hf.pipeline("automatic-speech-recognition", model=str(tiny(name)), device="cpu")
    chosen = [sounds()[row] for row in (1, 3, 4)]
    for waveform, outputs in zip(chosen, heard(plan, chosen, 16), strict=True):
        expected = pipeline(
            waveform.copy(),
            chunk_length_s=WINDOW,
            return_timestamps=True,
            generate_kwargs={**told, "num_beams": 1, "max_new_tokens": POSITIONS - plan.detail.begin},
        )
        found = Joiner(plan)(outputs)
        assert found.text == expected["text"].strip()
        chunks = [chunk for chunk in expected["chunks"] if chunk["text"].strip()]
        assert [text for _, _, text in found.segments] == [chunk["text"].strip() for chunk in chunks]
        for (start, end, _), chunk in zip(found.segments, chunks, strict=True):
            if chunk["timestamp"][0] is not None:
                assert start == chunk["timestamp"][0]
            if chunk["timestamp"][1] is None:
                assert end == max(start, round(len(waveform) / RATE, 3))
            else:
                assert end == chunk["timestamp"][1]
        assert (found.n_windows, found.language) == (len(outputs), language)
        assert found.n_tokens == sum(one.n_tokens for one in outputs)
        assert found.mean_logprob == pytest.approx(
            sum(one.mean_logprob * one.n_tokens for one in outputs) / found.n_tokens
        )


def test_translations_are_asked_for(tiny: Callable[[str], Path], reference: Callable[[str], Reference]) -> None:
    plan = plan_of(tiny("multilingual"), Generation(limited=False, language="fr", translate=True))
    (outputs,) = heard(plan, sounds()[1:2], 1)
    model = reference("multilingual")
    features = model.features(sounds()[1])
    written = model.model.generate(features, return_timestamps=True, language="fr", task="translate", num_beams=1)
    other = model.model.generate(features, return_timestamps=True, language="fr", task="transcribe", num_beams=1)
    assert outputs[0].tokens == tuple(written[0].tolist()) != tuple(other[0].tolist())
    assert plan.describe()["generation"]["translate"] is True


def test_windows_that_cannot_be_joined_cost_their_row(tiny: Callable[[str], Path]) -> None:
    broken = Heard((-1,), (1.0, 0.0, 0.0), None, "stop", 1, -1.0, False)
    with pytest.raises(RowError, match="cannot be joined"):
        Joiner(plan_of(tiny("english")))([broken])


# ------------------------------------------------------------------------------------------ the command


def write_wave(path: Path, waveform: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((waveform * 8000).round().astype("<i2").tobytes())


def test_command(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for row, waveform in enumerate(sounds()):
        write_wave(tmp_path / "in" / f"{row}.wav", waveform)
    (tmp_path / "in" / "broken.wav").write_bytes(b"RIFF\0\0\0\0WAVE")
    write_wave(tmp_path / "in" / "empty.wav", sounds()[0][:0])
    arguments = ["caption", str(tmp_path / "in"), "-m", str(tiny("multilingual")), "--batch-size", "16"]
    arguments += ["--num-workers", "0", "--device", DEVICE, "-o", str(tmp_path / "o.jsonl"), "--srt", "--vtt"]
    assert run(arguments) == 3
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [(row["id"], row["error_code"]) for row in rows[-2:]] == [
        ("broken.wav", "corrupt"),
        ("empty.wav", "corrupt"),
    ]
    plan = plan_of(tiny("multilingual"))
    files = [str(tmp_path / "in" / f"{row}.wav") for row in range(len(LENGTHS))]
    decoded = [decode(Media(file=file), plan.decode)[1].waveform for file in files]
    for row, outputs in zip(rows, heard(plan, decoded, 5), strict=False):
        one: Transcript = Joiner(plan)(outputs)
        if not one.text:
            assert (row["error_code"], row["caption"]) == ("empty_output", None)
            assert row["error_message"] == "no speech was found in 1 window of sound"
            continue
        segments = [{"start": start, "end": end, "text": text} for start, end, text in one.segments]
        names = ("caption", "language", "segments", "n_windows", "finish_reason", "n_tokens", "repetition")
        values = (one.text, one.language, segments, one.n_windows, one.finish_reason, one.n_tokens, one.repetition)
        assert tuple(row[name] for name in names) == values
        assert row["mean_logprob"] == pytest.approx(one.mean_logprob, abs=2e-4)
    good = {row["id"].removesuffix(".wav"): row for row in rows if row["status"] == "ok"}
    assert len(good) > 2
    assert {path.stem: path.read_text() for path in (tmp_path / "in").glob("*.srt")} == {
        name: srt_text(row) for name, row in good.items()
    }
    assert {path.stem for path in (tmp_path / "in").glob("*.vtt")} == good.keys()


# ------------------------------------------------------------------------------------------ other checkpoints


def test_broken_weights_give_no_score(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("english"), tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["model.encoder.conv1.weight"][:] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    ((one,),) = heard(plan_of(folder), sounds()[1:2], 1)
    assert math.isnan(one.mean_logprob)


def changed(folder: Path, target: Path, **settings: Any) -> Path:
    """A copy whose generation_config.json has these settings; None: not there."""
    shutil.copytree(folder, target)
    path = target / "generation_config.json"
    content = {**json.loads(path.read_text()), **settings}
    if settings:
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return target


def test_what_an_old_checkpoint_lacks_is_in_its_tokenizer(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    old = changed(tiny("english"), tmp_path / "old", no_timestamps_token_id=None, is_multilingual=None)
    one, other = (heard(plan_of(folder), sounds()[1:2], 1) for folder in (old, tiny("english")))
    assert one == other


@pytest.mark.parametrize(
    ("settings", "language", "task"),
    [
        ({}, None, "transcribe"),
        ({"language": "french"}, "<|fr|>", "transcribe"),
        ({"task": "translate"}, None, "translate"),
        ({"forced_decoder_ids": "fr translate"}, "<|fr|>", "translate"),
    ],
)
def test_what_a_checkpoint_is_set_to(
    tiny: Callable[[str], Path], tmp_path: Path, settings: dict[str, Any], language: str | None, task: str
) -> None:
    folder = tiny("multilingual")
    if "forced_decoder_ids" in settings:
        content = json.loads((folder / "generation_config.json").read_text())
        pair = content["lang_to_id"]["<|fr|>"], content["task_to_id"]["translate"]
        settings = {"forced_decoder_ids": [[1, pair[0]], [2, pair[1]]]}
    plan = plan_of(changed(folder, tmp_path / "set", **settings))
    assert (plan.detail.language, plan.detail.task) == (language, task)
    # An output of other settings is another one.
    assert (plan.describe()["config"] == plan_of(folder).describe()["config"]) == (not settings)


@pytest.mark.parametrize(
    ("name", "generation", "options", "said"),
    [
        ("english", Generation("a prompt"), {}, "--prompt"),
        ("english", Generation(language="de"), {}, "--language de: -m"),
        ("english", Generation(translate=True), {}, "--translate: -m"),
        ("multilingual", Generation(language="klingon"), {}, "knows de, en, fr, ja"),
        ("multilingual", Generation(language="es"), {}, "knows de, en, fr, ja"),
        ("multilingual", Generation(max_new_tokens=22), {}, "has room for 21 in a window"),
        ("multilingual", Generation(system="Be kind."), {}, "--system"),
        ("english", Generation(), {"compile": True}, "--compile is not for speech"),
    ],
)
def test_refused(
    tiny: Callable[[str], Path], name: str, generation: Generation, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(tiny(name), generation, **options)
    assert said in str(caught.value)


def test_limits(tiny: Callable[[str], Path]) -> None:
    """By itself as many as the model has places for: a caption's 50 would cut speech."""
    assert plan_of(tiny("multilingual")).generation.max_new_tokens == POSITIONS - 3
    assert plan_of(tiny("english")).generation.max_new_tokens == POSITIONS - 1
    assert plan_of(tiny("english"), Generation(max_new_tokens=5)).generation.max_new_tokens == 5
