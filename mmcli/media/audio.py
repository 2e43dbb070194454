"""Sound: a container -> float32 mono at the rate that the model's processor expects."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from mmcli.core.errors import RowError
from mmcli.core.records import Audio, DecodeOptions
from mmcli.media.complete import mp3_samples
from mmcli.media.container import best_stream, decoded, prepare

# Formats whose header counts the samples.
_COUNTED = ("flac", "wav", "w64", "aiff", "caf", "au", "tta", "wv", "ape")
# torchaudio keeps a filter of (rate / gcd) * (target / gcd) taps: 70,560 for 44.1 -> 16 kHz, but 89 million (a
# third of a GiB) for 22,254 -> 16,000 Hz. Above this the ratio is approximated, to better than one part in 10^5.
_MAX_TAPS = 2_000_000
_LOWPASS_FILTER_WIDTH, _ROLLOFF = 6, 0.99  # torchaudio's defaults
_BLOCK_SAMPLES = 1 << 22


def decode_audio(container: Any, file: io.FileIO | io.BytesIO, options: DecodeOptions) -> Audio:
    """The best audio stream (FFmpeg's choice) as mono, at `options.sampling_rate` or its own rate.

    `container`: of `file`, newly opened.

    Channels are averaged, as `librosa.to_mono` and `datasets` do (not FFmpeg's downmix, which weighs them).
    Integers are divided by 2^(bits-1); floats are taken as they are, so that loud ones pass 1, as in any
    reference. Resampled by torchaudio.functional.resample (Hann-windowed sinc), block by block. A stream that
    changes its rate midway is resampled part by part.

    Raises RowError: `too_large` (longer than `options.max_seconds`, by the header or as it decodes), `truncated`,
    `corrupt` (also samples that are not finite, or none at all), `unsupported_format` (no sound).
    """
    stream = best_stream(container, "audio")
    if stream is None:
        raise RowError("unsupported_format", "the file has no sound")
    prepare(stream)
    promised = _promised_samples(container, stream, file)
    if promised is not None and promised > options.max_seconds * stream.codec_context.sample_rate:
        # Known at once, where to decode as far as the limit takes minutes. Fewer would be `truncated`.
        raise _too_long(options)
    target, parts, seconds, samples = options.sampling_rate, [], 0.0, 0
    resampler: _Resampler | None = None
    for rate, block in _blocks(container, stream):
        seconds += len(block) / rate
        samples += len(block)
        if seconds > options.max_seconds:
            raise _too_long(options)
        if not np.isfinite(block).all():
            raise RowError("corrupt", f"samples that are not finite, before {seconds:.2f} s")
        target = target or rate
        if resampler is None or resampler.rate != rate:
            parts += [] if resampler is None else resampler.finish()
            resampler = _Resampler(rate, target)
        parts += resampler.push(block)
    if resampler is None or target is None:
        raise RowError("corrupt", "the sound has no samples")
    if promised is not None and samples < promised:
        own = stream.codec_context.sample_rate
        raise RowError("truncated", f"the sound ends after {samples / own:.2f} of {promised / own:.2f} s")
    parts += resampler.finish()
    return Audio(parts[0] if len(parts) == 1 else np.concatenate(parts), target)


def _blocks(container: Any, stream: Any) -> Iterator[tuple[int, np.ndarray]]:
    """(rate, float32 [n] mono) of the stream: frames (often 20 ms) gathered to blocks, none of them empty."""
    gathered: list[np.ndarray] = []
    size = rate = 0
    for frame in decoded(container, stream):
        if frame.samples == 0:
            continue
        if gathered and (frame.sample_rate != rate or size >= _BLOCK_SAMPLES):
            yield rate, np.concatenate(gathered)
            gathered, size = [], 0
        rate = frame.sample_rate
        if rate <= 0:
            raise RowError("corrupt", "the sound has no sampling rate")
        gathered.append(_mono(frame))
        size += frame.samples
    if gathered:
        yield rate, np.concatenate(gathered)


def _mono(frame: Any) -> np.ndarray:
    """One frame -> float32 [n]: the mean of its channels, scaled to [-1, 1]."""
    samples = frame.to_ndarray()  # [channels, n] or, interleaved, [1, n * channels]
    if not frame.format.is_planar:
        samples = samples.reshape(-1, len(frame.layout.channels)).T
    kind = samples.dtype
    # float64 where the sum of 32-bit values needs it; for the others float32 is exact, or the codec's own.
    wide = np.float64 if kind.itemsize > 2 and kind != np.float32 else np.float32
    mono = samples[0].astype(wide) if len(samples) == 1 else samples.mean(axis=0, dtype=wide)
    if kind == np.uint8:
        mono = (mono - 128) / 128
    elif kind.kind == "i":
        mono = mono / float(1 << 8 * kind.itemsize - 1)
    return mono.astype(np.float32)  # type: ignore[no-any-return]


def _promised_samples(container: Any, stream: Any, file: io.FileIO | io.BytesIO) -> int | None:
    """As many as the header counts, which FFmpeg does not ask for: it plays what is there. None: it counts none."""
    form, rate = container.format.name.split(",")[0], stream.codec_context.sample_rate
    if form == "mp3":
        # Less the encoder's delay and padding, which the decoder cuts off. FFmpeg's duration is a guess for files
        # that were joined.
        position = file.tell()
        counted = mp3_samples(file)
        file.seek(position)
        return None if counted is None else counted - 3 * 1152
    if stream.duration is None or form not in _COUNTED:
        return None
    return int(stream.duration * stream.time_base * rate)


def _too_long(options: DecodeOptions) -> RowError:
    return RowError("too_large", f"the sound is longer than the limit of {options.max_seconds:g} s")


class _Resampler:
    """torchaudio.functional.resample over a stream: what it gives for the whole, from block to block.

    The filter repeats after `orig` input and `new` output samples, so that blocks of a multiple of `orig`
    samples, with enough context on both sides, give the very samples of one call. An hour of 44.1 kHz peaks at
    0.57 GB so, its 0.22 GB of result included; one call takes 1.05 GB beside the 0.64 GB that it is given.
    """

    def __init__(self, rate: int, target: int) -> None:
        self.rate = rate
        ratio = _ratio(rate, target)
        self._orig, self._new = ratio.numerator, ratio.denominator
        width = math.ceil(_LOWPASS_FILTER_WIDTH * self._orig / (min(self._orig, self._new) * _ROLLOFF))
        self._context = math.ceil((width + self._orig) / self._orig) * self._orig
        self._pending = np.empty(0, np.float32)
        self._before = 0  # samples at the start of `_pending` that are context, already given

    def push(self, block: np.ndarray) -> list[np.ndarray]:
        """Take samples; gives those that are ready."""
        if self._orig == self._new:
            return [block]
        self._pending = np.concatenate([self._pending, block])
        ready = (len(self._pending) - self._before - self._context) // self._orig * self._orig
        if ready < _BLOCK_SAMPLES:
            return []
        resampled = self._resample(self._pending[: self._before + ready + self._context])
        start = self._before // self._orig * self._new
        given = resampled[start : start + ready // self._orig * self._new]
        drop = max(0, self._before + ready - self._context)
        self._pending, self._before = self._pending[drop:], self._before + ready - drop
        return [given]

    def finish(self) -> list[np.ndarray]:
        """What is left, when no more comes."""
        if not len(self._pending):
            return []
        return [self._resample(self._pending)[self._before // self._orig * self._new :]]

    def _resample(self, samples: np.ndarray) -> np.ndarray:
        import torch
        from torchaudio.functional import resample

        wave = torch.from_numpy(samples)
        return resample(  # type: ignore[no-any-return]
            wave, self._orig, self._new, lowpass_filter_width=_LOWPASS_FILTER_WIDTH, rolloff=_ROLLOFF
        ).numpy()


def _ratio(rate: int, target: int) -> Fraction:
    ratio = Fraction(rate, target)
    if ratio.numerator * ratio.denominator <= _MAX_TAPS:
        return ratio
    large = max(ratio, 1 / ratio)
    small = large.limit_denominator(max(1, math.isqrt(int(_MAX_TAPS / large))))
    return small if ratio > 1 else 1 / small
