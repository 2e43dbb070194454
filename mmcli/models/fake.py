"""A model without weights whose vectors, captions or answers identify their input: `-m fake:8`.

For trying out a pipeline, and for tests of everything around a model. Its options, after the vector's size:

    oom=N   more than N samples in a batch run out of memory
    ms=T    a batch takes T milliseconds
    load=T  loading takes T milliseconds
    both=N  N batches are computed at once
    process=T  the processor takes T milliseconds for an input
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
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmcli.core.errors import ConfigError
from mmcli.core.protocols import Processor, RecordProcessor, Runner
from mmcli.core.records import (
    MODALITIES,
    Audio,
    DecodeOptions,
    Generated,
    Modality,
    Payload,
    Sample,
    Scored,
    Video,
)
from mmcli.core.samples import Samples
from mmcli.models.options import Generation, ModelOptions
from mmcli.models.prompts import Prompts, joint_modality

if TYPE_CHECKING:
    import torch

    from mmcli.models.head import Similarity

PREFIX = "fake:"
_LARGEST = 65_536


@dataclass(frozen=True, slots=True)
class FakePlan:
    """See mmcli.core.protocols.EmbeddingModelPlan. Takes every modality."""

    embedding_size: int
    decode: DecodeOptions
    oom: int | None = None
    ms: float = 0.0
    load_ms: float = 0.0
    both: int = 1
    process_ms: float = 0.0
    obey: bool = False
    modalities: frozenset[Modality] = frozenset(MODALITIES)
    activation: Literal["softmax", "sigmoid"] | None = "softmax"

    def describe(self) -> dict[str, Any]:
        """Only what changes vectors."""
        return {"id": f"{PREFIX}{self.embedding_size}", "family": "fake", "frames": self.decode.num_frames}

    def open_processor(self) -> Processor:
        return FakeProcessor(self.embedding_size, self.obey, self.process_ms)

    def load(self) -> Runner:
        time.sleep(self.load_ms / 1000)
        return FakeRunner(self)


@dataclass(frozen=True, slots=True)
class FakeWriterPlan:
    """See mmcli.core.protocols.WriterPlan. Writes captions and answers for every modality."""

    fake: FakePlan
    generation: Generation

    @property
    def modalities(self) -> frozenset[Modality]:
        return self.fake.modalities

    @property
    def decode(self) -> DecodeOptions:
        return self.fake.decode

    @property
    def output(self) -> Literal["text", "json", "scores"]:
        return "scores" if self.generation.choices else "text"

    def describe(self) -> dict[str, Any]:
        """Only what changes texts."""
        return {**self.fake.describe(), "generation": self.generation.describe()}

    def open_processor(self) -> RecordProcessor:
        return FakeWriterProcessor(
            FakeProcessor(self.fake.embedding_size, self.fake.obey, self.fake.process_ms), Prompts(self.generation)
        )

    def load(self) -> Runner:
        time.sleep(self.fake.load_ms / 1000)
        return FakeWriter(self.fake, self.generation)


@dataclass(frozen=True, slots=True)
class FakeProcessor:
    """Payload -> its vector, already."""

    embedding_size: int
    obey: bool
    process_ms: float = 0.0

    def __call__(self, modality: Modality, payload: Payload) -> Sample:
        """`vector`: float32 [D]. Length bucketing sees the length of texts and sounds."""
        if self.process_ms:
            time.sleep(self.process_ms / 1000)
        if self.obey and isinstance(payload, str):
            _obey(payload)
        length = len(payload) if isinstance(payload, str) else 0
        vector = fake_vector(modality, payload, self.embedding_size)
        if self.obey and isinstance(payload, str) and payload in ("nan", "fail"):
            vector[0] = np.nan if payload == "nan" else np.inf
        cost = len(payload.frames) if isinstance(payload, Video) else 1
        return Sample(modality, {"vector": vector}, length=length, cost=cost)


@dataclass(frozen=True, slots=True)
class FakeWriterProcessor:
    """A record -> a vector for each prompt."""

    one: FakeProcessor
    prompts: Prompts

    def record(self, media: Sequence[tuple[Modality, Payload]], variables: Sequence[Any]) -> tuple[Sample, ...]:
        """`vector`: see `asked_vector`; that of the medium itself when it is alone, without a prompt."""
        shown = [(one.question, one.answer) for one in self.prompts.examples(variables)]
        told = repr((self.prompts.system(variables), shown)) if shown else self.prompts.system(variables)
        if (conversation := self.prompts.conversation(variables)) is not None:
            told = repr((conversation, conversation.placed(media)))
        asked = zip(self.prompts.render(variables), repeat(told))
        samples = [self.one(modality, payload) for modality, payload in media]
        length = sum(sample.length for sample in samples)
        vectors = [sample.arrays["vector"] for sample in samples]
        if self.one.obey and any(payload == "empty" for _, payload in media if isinstance(payload, str)):
            vectors = [np.full_like(vectors[0], -1)]
        return tuple(
            Sample(joint_modality(media), {"vector": asked_vector(vectors, *texts)}, length=length)
            for texts in asked
        )


class FakeRunner:
    """Stacks the vectors. In classification a label is what has the same vector: its cosines count 20-fold."""

    conditioned = None

    def __init__(self, plan: FakePlan) -> None:
        self._plan = plan

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu")

    @property
    def similarity(self) -> Similarity:
        from mmcli.models.head import Similarity

        return Similarity(20.0)

    def concurrent(self, most: int, runner: Any = None) -> Runner:
        """See mmcli.models.runner.EmbeddingRunner: as many as it is told."""
        count, made = min(most, self._plan.both), runner or self
        if count < 2:
            return made
        # Not where it is not needed: 12 ms, what 500 rows take the main process.
        from mmcli.models.concurrent import ConcurrentRunner

        return ConcurrentRunner(made, count)

    def vectors(self, batch: np.ndarray) -> torch.Tensor:
        """As `forward`."""
        import torch

        return torch.from_numpy(self.forward(batch))

    def collate(self, samples: Sequence[Sample]) -> np.ndarray:
        if isinstance(samples, Samples):
            vectors = samples.columns["vector"]
            batch = np.empty(vectors.padded_shape, np.float32)
            vectors.pad_into(batch, 0)
            return batch
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


class FakeWriter(FakeRunner):
    """Writes the vectors down."""

    def __init__(self, plan: FakePlan, generation: Generation) -> None:
        super().__init__(plan)
        self._generation = generation

    def forward(self, batch: np.ndarray) -> list[Generated | Scored]:  # type: ignore[override]
        """One text or choice per vector. Raises as FakeRunner.forward does."""
        vectors, choices = super().forward(batch), self._generation.choices
        if choices:
            return [fake_choice(vector, choices) for vector in vectors]
        return [fake_caption(vector, self._generation) for vector in vectors]


def asked_vector(vectors: Sequence[np.ndarray], prompt: str | None, system: str | None) -> np.ndarray:
    """float32 [D], of the vectors of a record's media and what is asked; a lone vector itself without a prompt."""
    if len(vectors) == 1 and prompt is None and system is None:
        return vectors[0]
    if not all(np.isfinite(v).all() and (v >= 0).all() for v in vectors):
        return next(v for v in vectors if not (np.isfinite(v).all() and (v >= 0).all()))
    return fake_vector("text", repr(([v.tolist() for v in vectors], prompt, system)), len(vectors[0]))


def fake_choice(vector: np.ndarray, choices: Sequence[str]) -> Scored:
    """Scores in the order of the vector's dimensions, repeated."""
    weights = np.resize(vector, len(choices)) + 1e-3
    order = np.argsort(-weights, kind="stable")
    ranked = tuple((choices[i], float(weights[i] / weights.sum())) for i in order)
    return Scored(*ranked[0], ranked)


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


def resolve_fake_writer(options: ModelOptions, generation: Generation) -> FakeWriterPlan:
    """The plan of `fake:8` for captions and answers. Raises ConfigError."""
    if generation.schema is not None:
        raise ConfigError(f"-m {options.model}: it writes no JSON; leave --schema out")
    if generation.features is not None or generation.boxes is not None or generation.answers:
        raise ConfigError(f"-m {options.model}: leave --features-column, --boxes-column and --answers out")
    return FakeWriterPlan(resolve_fake(options), generation)


def resolve_fake(options: ModelOptions) -> FakePlan:
    """The plan of `fake:8,oom=4`. Raises ConfigError."""
    size, *settings = options.model.removeprefix(PREFIX).split(",")
    if not (size.isascii() and size.isdigit() and 0 < int(size) <= _LARGEST):
        raise ConfigError(f"-m {options.model}: the size is a number from 1 to {_LARGEST}, e.g. fake:8")
    decode = DecodeOptions(num_frames=options.frames, exact_decode=options.exact_decode)
    plan = FakePlan(int(size), decode)
    for setting in settings:
        name, _, value = setting.partition("=")
        if name == "obey":
            plan = replace(plan, obey=True)
        elif name == "oom" and value.isascii() and value.isdigit():
            plan = replace(plan, oom=int(value))
        elif name == "ms" and value.isascii() and value.isdigit():
            plan = replace(plan, ms=float(value))
        elif name == "both" and value.isascii() and value.isdigit() and int(value):
            plan = replace(plan, both=int(value))
        elif name == "load" and value.isascii() and value.isdigit():
            plan = replace(plan, load_ms=float(value))
        elif name == "process" and value.isascii() and value.isdigit():
            plan = replace(plan, process_ms=float(value))
        else:
            raise ConfigError(
                f"-m {options.model}: {setting!r} is not one of oom=N, ms=T, load=T, both=N, process=T, obey"
            )
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
