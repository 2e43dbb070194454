"""Random changes of decoded inputs; what is drawn follows from (seed, epoch, row)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from mmcli.core.records import Audio, Modality, Payload, Video
from mmcli.training.data import Augment

# Sides of a crop, as a share of the picture's: those of Inception (Szegedy et al. 2015) begin at sqrt(0.08).
_CROP = (0.6, 1.0)
# Of noise beside a sound, in dB below its own level.
_NOISE_DB = (20.0, 50.0)
# How fast a sound is played. Ko et al. (2015, "Audio augmentation for speech recognition") have 0.9 to 1.1.
_SPEED = (0.85, 1.2)


def flip(modality: Modality, payload: Payload, generator: np.random.Generator) -> Payload:
    """Pictures and clips, mirrored left to right half of the time."""
    if modality in ("image", "video") and generator.random() < 0.5:
        return _pixels(payload, lambda pixels: np.ascontiguousarray(pixels[..., ::-1, :]))
    return payload


def crop(modality: Modality, payload: Payload, generator: np.random.Generator) -> Payload:
    """As `flip`, and a part of the picture: each side 60 to 100 %."""
    if modality not in ("image", "video"):
        return payload
    shares, places = generator.uniform(*_CROP, 2), generator.random(2)

    def cut(pixels: np.ndarray) -> np.ndarray:
        sides = [max(1, round(side * share)) for side, share in zip(pixels.shape[-3:-1], shares, strict=True)]
        starts = [
            int((whole - side) * place)
            for whole, side, place in zip(pixels.shape[-3:-1], sides, places, strict=True)
        ]
        rows, columns = (slice(start, start + side) for start, side in zip(starts, sides, strict=True))
        return np.ascontiguousarray(pixels[..., rows, columns, :])

    return flip(modality, _pixels(payload, cut), generator)


def noise(modality: Modality, payload: Payload, generator: np.random.Generator) -> Payload:
    """Sounds, up to 6 dB louder or softer, moved by up to 50 ms, with white noise 20 to 50 dB below them."""
    if not isinstance(payload, Audio):
        return payload
    gain, depth = generator.uniform(-6.0, 6.0), generator.uniform(*_NOISE_DB)
    moved = int(generator.integers(0, payload.sampling_rate // 20 + 1))
    waveform = np.concatenate([np.zeros(moved, np.float32), payload.waveform])
    level = float(np.sqrt(np.mean(waveform**2))) * 10 ** (-depth / 20)
    waveform = (waveform + level * generator.standard_normal(len(waveform), np.float32)) * np.float32(
        10 ** (gain / 20)
    )
    return replace(payload, waveform=np.clip(waveform, -1, 1).astype(np.float32))


def speed(modality: Modality, payload: Payload, generator: np.random.Generator) -> Payload:
    """As `noise`, and played at 85 to 120 % of its speed: pitch and formants move, as if another spoke."""
    if not isinstance(payload, Audio):
        return payload
    length = len(payload.waveform)
    places = np.arange(0, length, generator.uniform(*_SPEED))
    waveform = np.interp(places, np.arange(length), payload.waveform).astype(np.float32)
    return noise(modality, replace(payload, waveform=waveform), generator)


def spare_short_sounds(model: nn.Module) -> None:
    """Leave sounds unmasked that are shorter than a mask.

    Wav2Vec2, HuBERT and their kind hide spans of `mask_time_length` frames (usually 10, of 20 ms) while they learn
    (SpecAugment: Park et al. 2019), and raise for a sound of fewer.
    """
    for module in model.modules():
        mask = getattr(module, "_mask_hidden_states", None)
        shortest = getattr(getattr(module, "config", None), "mask_time_length", None)
        if mask is not None and shortest is not None:
            module._mask_hidden_states = _sparing(mask, shortest)


def _sparing(mask: Any, shortest: int) -> Any:
    def masked(hidden_states: Any, *args: Any, **options: Any) -> Any:
        return hidden_states if hidden_states.shape[1] < shortest else mask(hidden_states, *args, **options)

    return masked


def _pixels(payload: Payload, change: Any) -> Payload:
    if isinstance(payload, Video):
        return replace(payload, frames=change(payload.frames))
    return change(payload)


# --augment NAME -> what is done; None: nothing
AUGMENTS: dict[str, Augment | None] = {"none": None, "flip": flip, "crop": crop, "noise": noise, "speed": speed}
