"""A model without weights whose vectors, or captions, identify their input: `-m fake:8`.

For trying out a pipeline, and for tests of everything around a model. Its options, after the vector's size:

    oom=N   more than N samples in a batch run out of memory
    ms=T    a batch takes T milliseconds
    load=T  loading takes T milliseconds
    obey    texts `abort`, `segfault`, `exit`, `hang`, `raise` do that to the decoder; `nan` gives NaN,
            `fail` makes the model raise; `empty` gives a caption without text
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmcli.core.errors import ConfigError
from mmcli.core.records import MODALITIES, Audio, DecodeOptions, Generated, Modality, Payload, Sample, Video
from mmcli.models.options import Generation, ModelOptions

PREFIX = "fake:"
_LARGEST = 65_536


@dataclass(frozen=True, slots=True)
class FakePlan:
    """See mmcli.core.protocols.EmbeddingModelPlan. Takes every modality; writes captions with `generation`."""

    embedding_size: int
    decode: DecodeOptions
    oom: int | None = None
    ms: float = 0.0
    load_ms: float = 0.0
    obey: bool = False
    modalities: frozenset[Modality] = frozenset(MODALITIES)
    generation: Generation | None = None

    def describe(self) -> dict[str, Any]:
        """Only what changes vectors or captions."""
        told = {"id": f"{PREFIX}{self.embedding_size}", "family": "fake", "frames": self.decode.num_frames}
        return told if self.generation is None else {**told, "generation": self.generation.describe()}

    def open_processor(self) -> FakeProcessor:
        return FakeProcessor(self.embedding_size, self.obey, self.generation is not None)

    def load(self) -> FakeRunner:
        time.sleep(self.load_ms / 1000)
        return FakeRunner(self) if self.generation is None else FakeCaptioner(self)


@dataclass(frozen=True, slots=True)
class FakeProcessor:
    """Payload -> its vector, already."""

    embedding_size: int
    obey: bool
    writes: bool = False

    def __call__(self, modality: Modality, payload: Payload) -> Sample:
        """`vector`: float32 [D]. Length bucketing sees the length of texts and sounds."""
        if self.obey and isinstance(payload, str):
            _obey(payload)
        length = len(payload) if isinstance(payload, str) else 0
        vector = fake_vector(modality, payload, self.embedding_size)
        if self.obey and isinstance(payload, str) and payload in ("nan", "fail"):
            vector[0] = np.nan if payload == "nan" else np.inf
        if self.writes and self.obey and payload == "empty":
            vector[:] = -1
        cost = len(payload.frames) if isinstance(payload, Video) else 1
        return Sample(modality, {"vector": vector}, length=length, cost=cost)


class FakeRunner:
    """Stacks the vectors."""

    def __init__(self, plan: FakePlan) -> None:
        self._plan = plan

    def collate(self, samples: Sequence[Sample]) -> np.ndarray:
        return np.stack([s.arrays["vector"] for s in samples])

    def forward(self, batch: np.ndarray) -> np.ndarray:
        """float32 [n, D]. Raises MemoryError for a batch larger than `oom`, RuntimeError for the text `fail`."""
        if self._plan.oom is not None and len(batch) > self._plan.oom:
            raise MemoryError
        if self._plan.ms:
            time.sleep(self._plan.ms / 1000)
        if self._plan.obey and np.isinf(batch).any():
            raise RuntimeError("this model was told to fail")
        return batch


class FakeCaptioner(FakeRunner):
    """Writes the vectors down."""

    def forward(self, batch: np.ndarray) -> list[Generated]:  # type: ignore[override]
        """One caption per vector: see `fake_caption`. Raises as FakeRunner.forward does."""
        assert self._plan.generation is not None
        return [fake_caption(vector, self._plan.generation) for vector in super().forward(batch)]


def fake_caption(vector: np.ndarray, generation: Generation) -> Generated:
    """A number for each dimension; cut at `max_new_tokens`. A vector of -1: no text; NaN: no score."""
    words = [f"{int(x * 2048):03x}" for x in np.nan_to_num(vector) if x >= 0 or np.isnan(x)]
    kept = words[: generation.max_new_tokens]
    logprob = -float(vector.mean())
    return Generated(" ".join(kept), "stop" if kept == words else "length", len(kept), logprob, repetition=False)


def fake_vector(modality: Modality, payload: Payload, size: int) -> np.ndarray:
    """The vector of a decoded medium: float32 [size] in [0, 1), from SHAKE-128 of its modality and content."""
    digest = hashlib.shake_128(modality.encode())
    if isinstance(payload, str):
        digest.update(payload.encode("utf-8", "surrogatepass"))
    else:
        array = payload.waveform if isinstance(payload, Audio) else payload
        array = payload.frames if isinstance(payload, Video) else array
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)
    # 11 bits each: exact in float16 too.
    return (np.frombuffer(digest.digest(2 * size), "<u2") >> 5).astype(np.float32) / 2048


def resolve_fake(options: ModelOptions, generation: Generation | None = None) -> FakePlan:
    """The plan of `fake:8,oom=4`, for captions with `generation`. Raises ConfigError."""
    size, *settings = options.model.removeprefix(PREFIX).split(",")
    if not (size.isascii() and size.isdigit() and 0 < int(size) <= _LARGEST):
        raise ConfigError(f"-m {options.model}: the size is a number from 1 to {_LARGEST}, e.g. fake:8")
    decode = DecodeOptions(num_frames=options.frames, exact_decode=options.exact_decode)
    plan = FakePlan(int(size), decode, generation=generation)
    for setting in settings:
        name, _, value = setting.partition("=")
        if name == "obey":
            plan = replace(plan, obey=True)
        elif name == "oom" and value.isascii() and value.isdigit():
            plan = replace(plan, oom=int(value))
        elif name == "ms" and value.isascii() and value.isdigit():
            plan = replace(plan, ms=float(value))
        elif name == "load" and value.isascii() and value.isdigit():
            plan = replace(plan, load_ms=float(value))
        else:
            raise ConfigError(f"-m {options.model}: {setting!r} is not one of oom=N, ms=T, load=T, obey")
    return plan


def _obey(order: str) -> None:
    match order:
        case "abort":
            os.abort()
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            os._exit(7)
        case "hang":
            time.sleep(1e6)
        case "raise":
            raise ZeroDivisionError("told to raise")
