"""Sounds played faster or slower."""

from __future__ import annotations

import numpy as np

from mmcli.core.records import Audio
from mmcli.training.augment import speed


def test_speed_moves_the_pitch_as_it_changes_the_length() -> None:
    rate = 16_000
    tone = Audio(np.sin(2 * np.pi * 1000 * np.arange(rate) / rate).astype(np.float32), rate)
    pitches = []
    for seed in range(20):
        changed = speed("audio", tone, np.random.default_rng(seed))
        again = speed("audio", tone, np.random.default_rng(seed))
        assert changed.waveform.dtype == np.float32
        np.testing.assert_array_equal(changed.waveform, again.waveform)
        heard = np.flatnonzero(np.abs(changed.waveform) > 0.5 * np.abs(changed.waveform).max())
        played = heard[-1] - heard[0]
        pitch = np.abs(np.fft.rfft(changed.waveform, 8 * rate)).argmax() / 8
        # The shorter by as much as it is higher.
        np.testing.assert_allclose(pitch * played / rate, 1000, rtol=0.01)
        pitches.append(pitch)
    assert 840 < min(pitches) < 950
    assert 1080 < max(pitches) < 1210


def test_speed_leaves_pictures_alone() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    assert speed("image", pixels, np.random.default_rng(0)) is pixels
