"""Sound: the very samples of lossless files, the right pitch at any rate, an error for every broken file."""

from __future__ import annotations

import csv
import io
import struct
import wave

import numpy as np
import pytest
import torch
from media_helpers import code, decoded, encoded_sound, pitch, tone
from torchaudio.functional import resample

from mmcli.core.records import DecodeOptions
from mmcli.media import audio

RNG = np.random.default_rng(3)


def sound(data, **options):
    modality, heard = decoded(data, DecodeOptions(**options), "audio")
    assert modality == "audio"
    assert heard.waveform.dtype == np.float32
    assert heard.waveform.ndim == 1
    return heard


def wav(samples, rate=16000, bits=16, tag=1):
    """A WAV file by hand. `samples`: raw little-endian bytes per frame, [n, channels] of the right dtype."""
    body = np.ascontiguousarray(samples).tobytes() if bits != 24 else packed_24(samples)
    channels = samples.shape[1] if samples.ndim == 2 else 1
    block = channels * bits // 8
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, tag, channels, rate, rate * block, block, bits)
    data = struct.pack("<4sI", b"data", len(body)) + body + bytes(len(body) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(form) + len(data)) + b"WAVE" + form + data


def packed_24(samples):
    return samples.astype("<i4")[..., None].view(np.uint8)[..., :3].tobytes()


# Lossless


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_wav_16_bit_is_exact(channels):
    samples = RNG.integers(-32768, 32768, (3001, channels), dtype=np.int16)
    heard = sound(wav(samples))
    assert heard.sampling_rate == 16000
    exact = samples.astype(np.float64).mean(axis=1) / 32768
    assert np.abs(heard.waveform - exact).max() <= (0 if channels <= 2 else 1e-7)


def test_other_sample_types_are_exact():
    whole = RNG.integers(-(2**31), 2**31, 2000, dtype=np.int64).astype(np.int32)
    cases = [
        (wav(RNG.integers(0, 256, 2000, dtype=np.uint8), bits=8), lambda s: (s.astype(float) - 128) / 128, 8),
        (wav(whole >> 8, bits=24), lambda s: s / 2.0**23, 24),
        (wav(whole, bits=32), lambda s: s / 2.0**31, 32),
    ]
    for data, scaled, bits in cases:
        raw = data[44:]
        if bits == 8:
            samples = np.frombuffer(raw, np.uint8)
        elif bits == 24:
            samples = whole >> 8
        else:
            samples = np.frombuffer(raw, "<i4")
        assert np.array_equal(sound(data).waveform, scaled(samples).astype(np.float32)), bits
    floats = RNG.normal(0, 0.5, 2000).astype(np.float32)  # some beyond 1, which stay
    assert np.abs(floats).max() > 1
    assert np.array_equal(sound(wav(floats, bits=32, tag=3)).waveform, floats)
    doubles = RNG.normal(0, 0.5, 2000)
    assert np.array_equal(sound(wav(doubles, bits=64, tag=3)).waveform, doubles.astype(np.float32))


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("flac", "flac"), ("aiff", "pcm_s16be"), ("au", "pcm_s16be"), ("caf", "pcm_s16le"), ("w64", "pcm_s16le"),
        ("tta", "tta"), ("matroska", "pcm_s16le"), ("mov", "alac"),
    ],
)  # fmt: skip
def test_other_lossless_formats_are_exact(container, codec):
    samples = RNG.integers(-32768, 32768, 5000, dtype=np.int16)
    form = "s16p" if codec in ("alac", "tta") else "s16"
    try:
        data = encoded_sound(samples, 16000, container, codec, sample_format=form)
    except ValueError:
        data = encoded_sound(samples, 16000, container, codec, sample_format="s16")
    assert np.array_equal(sound(data).waveform, (samples / 32768).astype(np.float32))


def test_a_flac_of_24_bits():
    samples = (RNG.integers(-(2**23), 2**23, (2, 4000), dtype=np.int32)) << 8
    data = encoded_sound(samples, 44100, "flac", "flac", layout="stereo", sample_format="s32", strict="-2")
    exact = (samples.astype(np.float64).mean(axis=0) / 2**31).astype(np.float32)
    assert np.array_equal(sound(data).waveform, exact)


# Real and sample files


def test_real_speech(shared_data):
    heard = sound(shared_data / "audio" / "jfk.flac")
    assert heard.sampling_rate == 44100
    assert len(heard.waveform) == 485_100  # 11 s
    assert 0.01 < heard.waveform.std() < 0.3
    assert len(sound(shared_data / "audio" / "jfk.flac", sampling_rate=16000).waveform) == 176_000


def test_real_digits_are_the_samples_in_the_file(shared_data):
    paths = sorted((shared_data / "audio" / "digits").rglob("*.wav"))[:20]
    assert len(paths) == 20
    for path in paths:
        with wave.open(str(path)) as file:
            assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        heard = sound(path)
        assert heard.sampling_rate == 8000
        assert np.array_equal(heard.waveform, samples / np.float32(32768))


def test_sample_sounds_have_their_pitch(sample_data):
    means = {}
    with open(sample_data / "sounds.csv") as file:
        for row in csv.DictReader(file):
            if row["label"] == "sine tone":
                means.setdefault(row["pitch"], []).append(pitch(sound(sample_data / row["audio"])))
    assert max(means["low"]) < min(means["middle"]) < max(means["middle"]) < min(means["high"])


# Lossy


@pytest.mark.parametrize(
    ("container", "codec", "rate", "form"),
    [
        ("mp3", "libmp3lame", 44100, "s16p"), ("ogg", "libopus", 48000, "s16"),
        ("mp4", "aac", 44100, "fltp"), ("adts", "aac", 22050, "fltp"), ("webm", "libopus", 48000, "s16"),
        ("ac3", "ac3", 44100, "fltp"), ("asf", "wmav2", 44100, "fltp"), ("mpegts", "aac", 44100, "fltp"),
    ],
)  # fmt: skip
def test_lossy_formats_keep_pitch_and_length(container, codec, rate, form):
    heard_hertz = 1234.0
    samples = tone(2.0, rate, heard_hertz)
    samples = (samples * 32767).astype(np.int16) if form.startswith("s16") else samples.astype(np.float32)
    heard = sound(encoded_sound(samples, rate, container, codec, sample_format=form), sampling_rate=16000)
    assert heard.sampling_rate == 16000
    assert pitch(heard) == pytest.approx(heard_hertz, abs=1)
    assert len(heard.waveform) / 16000 == pytest.approx(2.0, abs=0.15)
    assert np.abs(heard.waveform[4000:-4000]).max() == pytest.approx(0.5, abs=0.06)


# Channels and rates


def test_channels_are_averaged():
    left, right = tone(hertz=300), tone(hertz=2000)
    stereo = (np.stack([left, right], axis=1) * 32767).astype(np.int16)
    heard = sound(wav(stereo)).waveform
    assert np.abs(heard - (left + right) / 2).max() < 1e-4
    opposite = np.stack([left, -left], axis=1).astype(np.float32)
    assert np.abs(sound(wav(opposite, bits=32, tag=3)).waveform).max() == 0


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_resampling_is_torchaudios(rate):
    samples = RNG.normal(0, 0.2, rate // 2).astype(np.float32)
    heard = sound(wav(samples, rate, 32, 3), sampling_rate=16000).waveform
    want = resample(torch.from_numpy(samples), rate, 16000).numpy()
    assert heard.shape == want.shape
    assert np.abs(heard - want).max() < 1e-6


def test_resampling_block_by_block_gives_the_same(monkeypatch):
    monkeypatch.setattr(audio, "_BLOCK_SAMPLES", 5000)
    for rate, target in ((44100, 16000), (8000, 16000), (48000, 44100)):
        samples = RNG.normal(0, 0.2, 61_234).astype(np.float32)
        heard = sound(wav(samples, rate, 32, 3), sampling_rate=target).waveform
        want = resample(torch.from_numpy(samples), rate, target).numpy()
        assert heard.shape == want.shape
        assert np.abs(heard - want).max() < 1e-6


@pytest.mark.parametrize("rate", [22254, 11127, 44056, 47999, 7919, 384_001])
def test_rates_without_a_common_divisor_take_no_gigabytes(rate):
    """The exact filter for 47,999 -> 16,000 Hz has 768 million taps."""
    samples = tone(0.5, rate, 500).astype(np.float32)
    heard = sound(wav(samples, rate, 32, 3), sampling_rate=16000)
    assert len(heard.waveform) == pytest.approx(8000, abs=2)
    assert pitch(heard) == pytest.approx(500, abs=0.5)


def test_a_stream_that_changes_its_rate():
    """Two AAC streams joined, as broadcasts do: 22,050 Hz, then 44,100 Hz."""
    first, second = (
        encoded_sound(tone(1.0, rate, 700).astype(np.float32), rate, "adts", "aac", sample_format="fltp")
        for rate in (22050, 44100)
    )
    heard = sound(first + second, sampling_rate=16000)
    assert len(heard.waveform) / 16000 == pytest.approx(2.0, abs=0.3)
    assert pitch(heard) == pytest.approx(700, abs=2)


# Limits and damage


def test_too_long_stops_early():
    data = wav(np.zeros(16000 * 20, np.int16))
    assert code(data, DecodeOptions(max_seconds=20), "audio") == "audio"
    assert code(data, DecodeOptions(max_seconds=19.9), "audio") == "too_large"


def test_a_length_that_the_header_tells_is_not_decoded(tmp_path):
    """3 GB of which nearly nothing is on disk, as in a file system's holes; its first sample would be `corrupt`."""
    size = 3 * 10**9
    head = bytearray(wav(np.array([np.nan], np.float32), bits=32, tag=3))
    head[4:8], head[40:44] = struct.pack("<I", size + 36), struct.pack("<I", size)
    path = tmp_path / "huge.wav"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(44 + size)
    assert code(path, modality="audio") == "too_large"
    assert code(path, DecodeOptions(max_seconds=1e6), "audio") == "corrupt"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite(value):
    samples = tone().astype(np.float32)
    samples[1234] = value
    assert code(wav(samples, bits=32, tag=3)) == "corrupt"


def test_no_samples():
    assert code(wav(np.zeros(0, np.int16))) == "corrupt"


COMPRESSED = {
    "wav": ("wav", "pcm_s16le", "s16"),
    "flac": ("flac", "flac", "s16"),
    "aiff": ("aiff", "pcm_s16be", "s16"),
    "mp3": ("mp3", "libmp3lame", "s16p"),
    "m4a": ("mp4", "aac", "fltp"),
    "ogg": ("ogg", "libopus", "s16"),
    "mka": ("matroska", "libopus", "s16"),
    "wma": ("asf", "wmav2", "fltp"),
    "au": ("au", "pcm_s16be", "s16"),
}


def test_joined_mp3s_are_whole():
    """The first one's header counts its own frames; what FFmpeg guesses of both is three times too long."""
    quiet, loud = np.zeros(5 * 44100, np.int16), RNG.normal(0, 8000, 5 * 44100).astype(np.int16)
    first, second = (
        encoded_sound(samples, 44100, "mp3", "libmp3lame", sample_format="s16p", bit_rate=rate)
        for samples, rate in ((quiet, 32_000), (loud, 160_000))
    )
    both = first + second[second.index(b"\xff\xfb") :]
    assert len(sound(both).waveform) == pytest.approx(10 * 44100, rel=0.02)
    assert len(sound(both, max_seconds=11).waveform) == pytest.approx(10 * 44100, rel=0.02)


@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_truncated_sound_is_an_error(kind):
    container, codec, form = COMPRESSED[kind]
    samples = tone(1.0, 48000) + RNG.normal(0, 0.01, 48000)
    samples = (samples * 32767).astype(np.int16) if form.startswith("s16") else samples.astype(np.float32)
    data = encoded_sound(samples, 48000, container, codec, sample_format=form)
    assert code(data, modality="audio") == "audio"
    ends = [*range(100, len(data), len(data) // 40), len(data) - 200]
    statuses = {end: code(data[:end], modality="audio") for end in ends}
    assert not [end for end, status in statuses.items() if status == "audio"]
    assert set(statuses.values()) <= {"truncated", "corrupt", "unsupported_format"}
    assert sum(status == "truncated" for status in statuses.values()) >= len(ends) * 0.8


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFF00], ids=["ffmpeg", "arecord"])
def test_a_wav_that_was_streamed_has_no_length_to_miss(size):
    """What `ffmpeg -f wav -` and `sox`, and what `arecord` write into a pipe."""
    samples = RNG.integers(-32768, 32768, 5000, dtype=np.int16)
    data = bytearray(wav(samples))
    data[40:44] = struct.pack("<I", size)
    data[4:8] = struct.pack("<I", min(size + 36, 0xFFFFFFFF))
    assert np.array_equal(sound(bytes(data)).waveform, samples / np.float32(32768))


def test_tags_in_an_old_encoding_do_not_matter():
    samples = RNG.integers(-32768, 32768, 5000, dtype=np.int16)
    title = b"INFOINAM" + struct.pack("<I", 4) + b"caf\xe9"
    data = wav(samples) + b"LIST" + struct.pack("<I", len(title)) + title
    data = data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    assert np.array_equal(sound(data).waveform, samples / np.float32(32768))


def test_wav_reader_of_the_standard_library_agrees():
    buffer = io.BytesIO()
    samples = RNG.integers(-32768, 32768, 1000, dtype=np.int16)
    with wave.open(buffer, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(22050)
        file.writeframes(samples.tobytes())
    heard = sound(buffer.getvalue())
    assert heard.sampling_rate == 22050
    assert np.array_equal(heard.waveform, samples.reshape(-1, 2).mean(axis=1).astype(np.float32) / 32768)
