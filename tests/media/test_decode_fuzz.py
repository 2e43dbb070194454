"""Broken files of every format: a right answer or an error row, and the process lives."""

from __future__ import annotations

import random

import numpy as np
import pytest
from decode_plans import Echo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media_helpers import clip, code, encoded, encoded_sound, noisy, numbered, tone

from mmcli.core.errors import RowError
from mmcli.core.records import DecodeOptions, Media, Record, Sample
from mmcli.media.pool import DecodePool

PICTURES = [
    encoded(noisy(24, 32), kind, **options)
    for kind, options in (
        ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("WEBP", {}), ("BMP", {}),
        ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "jpeg"}), ("JPEG2000", {}),
        ("AVIF", {}), ("PPM", {}), ("ICO", {"sizes": [(16, 16)]}), ("QOI", {}),
    )
]  # fmt: skip
SMALL = DecodeOptions(max_pixels=1_000_000, max_seconds=60, sampling_rate=16000, num_frames=4)
ROW_ERRORS = {"truncated", "corrupt", "unsupported_format", "bomb", "too_large"}


def damage(data, seed):
    """Flip, overwrite, cut out, repeat or cut off some bytes."""
    rng = random.Random(seed)
    broken = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = int(len(broken) * rng.random() ** rng.choice([1, 3]))  # half of the time near the header
        length = rng.choice([1, 1, 2, 4, 30])
        match rng.randrange(5):
            case 0 if at < len(broken):
                broken[at] ^= 1 << rng.randrange(8)
            case 1:
                broken[at : at + length] = rng.choice([b"\xff", b"\0", b"\x7f", rng.randbytes(1)]) * length
            case 2:
                del broken[at : at + length]
            case 3:
                broken[at:at] = broken[at : at + length]
            case _:
                if rng.random() < 0.3:
                    del broken[at:]
    return bytes(broken)


@pytest.mark.parametrize("data", PICTURES, ids=range(len(PICTURES)))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_broken_pictures(data, seed):
    assert code(damage(data, seed), SMALL, "image") in ROW_ERRORS | {"image"}


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_as_anything(data):
    assert code(data, SMALL, "image") in ROW_ERRORS
    assert code(data, SMALL, "text") in ROW_ERRORS | {"text"}
    assert code(data, SMALL) in ROW_ERRORS | {"text", "audio"}


def sounds_and_clips():
    whole = (tone(0.4, 44100) * 32767).astype(np.int16)
    real = tone(0.4, 44100).astype(np.float32)
    wide = (tone(0.4, 48000) * 32767).astype(np.int16)
    moving = [np.roll(noisy(), n, 1) for n in range(8)]
    return [
        encoded_sound(whole, 44100),
        encoded_sound(whole, 44100, "flac", "flac"),
        encoded_sound(whole, 44100, "mp3", "libmp3lame", sample_format="s16p"),
        encoded_sound(wide, 48000, "ogg", "libopus"),
        encoded_sound(real, 44100, "mp4", "aac", sample_format="fltp"),
        encoded_sound(whole, 44100, "aiff", "pcm_s16be"),
        encoded_sound(real, 44100, "asf", "wmav2", sample_format="fltp"),
        clip(moving),
        clip(moving, "matroska", "libx264"),
        clip(moving, "webm", "libvpx-vp9"),
        clip(moving, "avi", "mpeg4"),
        clip(moving, "mpegts", "mpeg2video"),
        clip(moving, "mp4", "libx265"),
        clip(moving, "flv", "flv"),
    ]


def through_the_pool(inputs, timeout_s=20.0):
    """Outcomes of encoded bytes, in order."""
    plan = Echo(decode=SMALL)
    pool = DecodePool(plan, plan.decode, 2, timeout_s)
    todo = [Record(n, str(n), None, (Media(data=data),)) for n, data in enumerate(inputs)]
    outcomes = {}
    try:
        for done in pool.run(iter([todo[i : i + 16] for i in range(0, len(todo), 16)]), lambda: True):
            for record, (outcome,) in zip(done.records, done.outcomes, strict=True):
                outcomes[record.row] = outcome
    finally:
        pool.close()
    return [outcomes[n] for n in range(len(inputs))]


def check_broken_media(rounds, seed):
    originals = sounds_and_clips()
    broken = [damage(data, seed + 1000 * n + r) for n, data in enumerate(originals) for r in range(rounds)]
    outcomes = through_the_pool(originals + broken)
    assert all(isinstance(outcome, Sample) for outcome in outcomes[: len(originals)])
    codes = [o.code if isinstance(o, RowError) else "ok" for o in outcomes[len(originals) :]]
    # FFmpeg may crash or hang: that costs the row, and must be rare.
    assert set(codes) <= ROW_ERRORS | {"ok", "worker_crash", "timeout", "oom"}
    assert codes.count("worker_crash") + codes.count("timeout") + codes.count("oom") <= len(codes) // 50
    assert codes.count("ok") < len(codes) * 0.7
    return codes


def test_broken_sounds_and_clips():
    check_broken_media(15, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_broken_sounds_and_clips(seed):
    check_broken_media(150, (seed + 1) * 10**6)


def test_decoded_media_come_through_the_workers_unharmed():
    inputs = [
        clip(numbered(6)),
        encoded(noisy(), "PNG"),
        "naïve".encode(),
        encoded_sound(np.zeros(900, np.int16), 16000),
    ]
    video, image, text, audio = through_the_pool(inputs)
    assert (video.modality, image.modality, text.modality, audio.modality) == ("video", "image", "text", "audio")
    assert video.arrays["payload"].shape == (4, 48, 64, 3)
    assert np.array_equal(image.arrays["payload"], noisy())
    assert bytes(text.arrays["payload"]).decode() == "naïve"
    assert audio.arrays["payload"].shape == (900,)
