"""Record, Sample and Result: what one row is on its way through the pipeline.

Source -> Record -> (decode) -> Sample -> (batch) -> Runner -> Result -> Sink
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmcli.core.errors import RowError

if TYPE_CHECKING:
    import numpy as np

Modality = Literal["text", "image", "audio", "video"]
MODALITIES: tuple[Modality, ...] = ("text", "image", "audio", "video")
_INT64 = 2**63


def mtime_ns(status: os.stat_result) -> int:
    """Modification time in ns, kept within 64 bits: file systems know years after 2262, int64 does not."""
    return max(-_INT64, min(_INT64 - 1, status.st_mtime_ns))


@dataclass(slots=True)
class Media:
    """Where one medium of a record is: one of `file`, `data` and `text` is set, or none (`missing`).

    modality  what the manifest says it is; None means: decided by content
    file      path to open (str; non-UTF-8 names carry surrogate escapes, as from `os.fsdecode`)
    data      the encoded bytes, inline
    text      the text itself, inline
    size      bytes on disk when the inputs were listed; None when not known
    mtime_ns  modification time then; a file that differs when it is opened is `input_changed`
    """

    modality: Modality | None = None
    file: str | None = None
    data: bytes | None = None
    text: str | None = None
    size: int | None = None
    mtime_ns: int | None = None

    @property
    def missing(self) -> bool:
        """The record has none; only for models that bear that."""
        return self.file is None and self.data is None and self.text is None

    def __reduce__(self) -> tuple[type[Media], tuple[Any, ...]]:
        # Each one crosses to a worker: 0.8 us for both sides, where the pickle of a slotted class takes 1.7.
        return Media, (self.modality, self.file, self.data, self.text, self.size, self.mtime_ns)


@dataclass(slots=True)
class Record:
    """One input, not opened.

    row    ordinal in the run, from 0: the output row it becomes
    id     from the input (relative path, id column or `manifest#row`)
    path   shown in the output (escaped when it is not UTF-8), or None
    media  one per slot of its source: one for `embedding`, several for `image_embedding`, `text_embedding`
    keep   values of the passthrough columns, in the order of the source's `keep` schema
    variables  values of the columns that prompts name, in the order of the source's `variables`; None for null; a
           column of numbers is a float32 array
    error  set when the source could not read the row; then `media` is empty
    signature  digest of all of the input that determines the row (mmcli.core.signature); set by the engine
    """

    row: int
    id: str
    path: str | None
    media: tuple[Media, ...]
    keep: tuple[Any, ...] = ()
    variables: tuple[Any, ...] = ()
    error: RowError | None = None
    signature: bytes | None = None


@dataclass(slots=True)
class Audio:
    """Decoded sound. `waveform`: float32 [T], mono, in [-1, 1]; `sampling_rate`: Hz."""

    waveform: np.ndarray
    sampling_rate: int


@dataclass(slots=True)
class Video:
    """Decoded clip. `frames`: uint8 [F, H, W, 3] RGB; `timestamps`: float64 [F], seconds; `duration`: seconds."""

    frames: np.ndarray
    timestamps: np.ndarray
    duration: float


# What a decoder gives: text is a str, an image is uint8 [H, W, 3] RGB.
Payload = Any


@dataclass(slots=True)
class Sample:
    """A decoded and processed medium: its existence proves that decoding worked.

    arrays  model inputs by name, without a batch axis (e.g. `pixel_values`: uint8 [3, H, W])
    length  sort key for length bucketing (tokens, audio samples); 0 where shapes are fixed
    group   only samples with equal (modality, group) may share a batch (e.g. the exact length of a
            wav2vec2 input, or a picture's shape)
    cost    size relative to a plain input; a batch of size B takes B // cost samples (a clip of 8 frames: 8)
    """

    modality: Modality
    arrays: dict[str, np.ndarray]
    length: int = 0
    group: Hashable = ()
    cost: int = 1


@dataclass(frozen=True, slots=True)
class Generated:
    """A text that a model has written, and what tells whether to trust it. None: a server does not say.

    text           without the prompt and special tokens
    finish_reason  "stop": the model ended it; "length": it was cut at the limit
    n_tokens       tokens that were generated, the end token included
    mean_logprob   mean log-probability of those tokens, 0 at most; NaN where the scores are not finite
    repetition     the tokens hold a loop: a block of 1 to 8 tokens three times or more in a row, over four tokens
                   at least
    """

    text: str
    finish_reason: Literal["stop", "length"]
    n_tokens: int | None
    mean_logprob: float | None
    repetition: bool


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer out of a known set.

    score  its probability; NaN where the scores are not finite; None: a server does not say
    top_k  the likeliest answers with theirs, the best first: the first is `answer`
    """

    answer: str
    score: float | None
    top_k: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Classified:
    """Where an input belongs among a set of labels.

    top_k    the likeliest labels with their scores, the best first; NaN where the model's scores are not finite;
             None: a server does not say
    margin   the best score less the second best; None of a single label
    entropy  in nats: of the distribution over all labels; where labels are scored one by one (sigmoid), the mean of
             their binary entropies; None: a server does not say
    labels   those whose scores reach the threshold, the best first; None: one label alone is asked for
    """

    top_k: tuple[tuple[str, float | None], ...]
    margin: float | None
    entropy: float | None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Heard:
    """What a model has heard in one window of a sound.

    tokens    what was written, timestamps among it, without beginning and end
    window    seconds: of the window, and of it what the windows before and behind it hold, too
    language  of the sound, a code such as "de"; None: a model of one language
    The others are as those of Generated.
    """

    tokens: tuple[int, ...]
    window: tuple[float, float, float]
    language: str | None
    finish_reason: Literal["stop", "length"]
    n_tokens: int
    mean_logprob: float
    repetition: bool


@dataclass(frozen=True, slots=True)
class Transcript:
    """What is said in a sound.

    language       as of Heard
    segments       (start, end, text) of each, in seconds
    n_windows      windows that the sound was cut into
    finish_reason  "length" when any window was cut at the limit
    n_tokens       of all windows; mean_logprob: over these
    repetition     in any window
    """

    text: str
    language: str | None
    segments: tuple[tuple[float, float, str], ...]
    n_windows: int
    finish_reason: Literal["stop", "length"]
    n_tokens: int
    mean_logprob: float
    repetition: bool


@dataclass(slots=True)
class Decoded:
    """What decode workers give: for each record one outcome per Sample, and the seconds that it took.

    decode_s, process_s  wall seconds; cpu_s: processor seconds, the messages included, of a process of its own

    A record has a Sample for each of its media; or, of a RecordProcessor (mmcli.core.protocols), as many as that
    makes of all of them.
    """

    records: Sequence[Record]
    outcomes: Sequence[tuple[Sample | RowError, ...]]
    decode_s: float = 0.0
    process_s: float = 0.0
    cpu_s: float = 0.0


@dataclass(slots=True)
class Result:
    """One output row: `values` (one entry per task column) or `error`, never both.

    modality  what the medium turned out to be; "image+text" when a record has several
    """

    record: Record
    modality: str | None
    values: tuple[Any, ...] | None = None
    error: RowError | None = None


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """What the decoder has to produce for a model; picklable, sent once to every worker.

    modalities      what the model takes; another modality is `unsupported_format`
    min_image_size  the shortest side in pixels that the processor needs of a picture, or None; a JPEG whose
                    sides are larger than twice that may be decoded at reduced scale, never below twice
    exact_decode    decode every picture at full size
    sampling_rate   Hz that the processor expects, or None for the file's own
    num_frames      frames sampled uniformly by time from a clip
    max_pixels      more is `bomb`; Pillow's own error threshold by default
    max_bytes       larger files are `too_large`
    max_whole_bytes of pictures and texts, which are read into memory whole
    max_seconds     longer sound is `too_large` (decoded float32 mono at 16 kHz: 230 MB an hour)
    """

    modalities: frozenset[Modality] = frozenset(MODALITIES)
    min_image_size: int | None = None
    exact_decode: bool = False
    sampling_rate: int | None = None
    num_frames: int = 8
    max_pixels: int = 178_956_970
    max_bytes: int = 4 * 1024**3
    max_whole_bytes: int = 512 * 1024**2
    max_seconds: float = 4 * 3600.0
