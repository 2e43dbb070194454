"""A loaded model that hears: windows of sounds -> their tokens, by the model's own `generate`."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from mmcli.core.records import Heard, Sample
from mmcli.models.decoding import Decoding, Written
from mmcli.models.loops import has_loop
from mmcli.models.plan import GenerationPlan
from mmcli.models.runner import Batch, TorchRunner, load_model, stack
from mmcli.models.speech import SPEECH, Tongue

# Sounds whose language is remembered, for their windows in later batches. An engine's window holds 2,048 rows.
REMEMBERED = 65_536


@dataclass(slots=True)
class SpeechBatch(Batch):
    """Windows. For each: whose it is, where it begins, in seconds, and its length and overlaps (see Heard)."""

    sounds: list[bytes]
    starts: list[float]
    windows: list[tuple[float, float, float]]


@dataclass(slots=True)
class Hearing:
    """What is known of a window so far.

    tokens    that count
    logprobs  of these, and of the ends
    frame     where the model reads on
    cut       whether the limit has cut what counts
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    frame: int = 0
    cut: bool = False


class SpeechRunner(TorchRunner):
    """See mmcli.core.protocols.Runner: windows -> Heard.

    As Whisper's `generate` (transformers): where a window ends in the middle of a segment, that is dropped, and
    the rest of the window is read once more, from the end of the last whole segment on (Radford et al. 2022,
    section 3.8). What was written before is not shown again. A sound's language is that of its first window.
    """

    def __init__(self, plan: GenerationPlan) -> None:
        super().__init__(plan)
        self._model: Any = self.loaded
        self._generation = plan.generation
        self._tongue: Tongue = plan.detail
        self._languages: OrderedDict[bytes, str] = OrderedDict()
        self._end: int = self._model.generation_config.eos_token_id
        self._stride = self._model.model.encoder.conv1.stride[0] * self._model.model.encoder.conv2.stride[0]

    def collate(self, samples: Sequence[Sample]) -> SpeechBatch:
        """Windows -> a Batch; all have one shape."""
        features = [s.arrays["input_features"] for s in samples]
        times = [s.arrays["window"].tolist() for s in samples]
        return SpeechBatch(
            samples[0].modality,
            {"input_features": stack(features, 0, pinned=self.device.type == "cuda")},
            [s.arrays["sound"].tobytes() for s in samples],
            [start for start, *_ in times],
            [(length, before, behind) for _, length, before, behind in times],
        )

    @torch.inference_mode()
    def forward(self, batch: SpeechBatch) -> list[Heard]:
        """One output per window. Raises torch.OutOfMemoryError."""
        features = self.to_device(batch)["input_features"]
        frames = features.shape[-1]
        encoded = self._encode(features)
        languages = self._spoken(batch, encoded)
        found = [Hearing() for _ in batch.windows]
        rows = list(range(len(found)))
        while rows:
            drawn = rows if self._generation.temperature else []
            seeds = [self._seed(batch, row, found[row].frame) for row in drawn]
            written = self._write(encoded, [languages[row] for row in rows], seeds)
            pieces = zip(rows, written.tokens, written.logprobs, written.lengths.tolist(), strict=True)
            for row, tokens, logprobs, length in pieces:
                self._take(found[row], tokens[:length].tolist(), logprobs[:length].tolist(), frames)
            rows = [row for row in rows if found[row].frame < frames]
            if rows:
                encoded = self._encode(_from_frames(features, rows, [found[row].frame for row in rows]))
        ends = zip(found, languages, batch.windows, strict=True)
        return [self._heard(one, language, window) for one, language, window in ends]

    def _encode(self, features: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self._model.get_encoder()(features).last_hidden_state
        return hidden

    def _spoken(self, batch: SpeechBatch, encoded: torch.Tensor) -> list[str | None]:
        """The token of each window's language; None: a model of one language."""
        told = self._tongue.language
        if told is not None or not self._tongue.languages:
            return [told] * len(batch.sounds)
        # The engine brings a sound's first window first. If that has failed, so has the row, whatever follows.
        first = [row for row, start in enumerate(batch.starts) if start == 0]
        known = self._languages.keys() | {batch.sounds[row] for row in first}
        asked = [row for row, sound in enumerate(batch.sounds) if sound not in known] + first
        if asked:
            names = {number: name for name, number in self._tongue.languages.items()}
            hidden = BaseModelOutput(last_hidden_state=encoded[asked])
            numbers = self._model.detect_language(encoder_outputs=hidden).tolist()
            for row, number in zip(asked, numbers, strict=True):
                self._languages[batch.sounds[row]] = names[number]
        found: list[str | None] = [self._languages[sound] for sound in batch.sounds]
        while len(self._languages) > REMEMBERED:
            self._languages.popitem(last=False)
        return found

    def _seed(self, batch: SpeechBatch, row: int, frame: int) -> int:
        """Of the draws of a window from `frame` on: of --seed and what is heard, whatever its neighbours."""
        place = f"{self._generation.seed} {batch.starts[row]} {frame}".encode()
        return int.from_bytes(blake2b(place, key=batch.sounds[row], digest_size=8).digest(), "big") >> 1

    def _write(self, encoded: torch.Tensor, languages: Sequence[str | None], seeds: Sequence[int]) -> Written:
        """What the model writes of these windows, once."""
        generation = self._generation
        write = BeamSearch() if generation.num_beams > 1 else Decoding(generation.temperature, seeds)
        pen = Pen(write, self._end)
        self._model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            return_timestamps=True,
            language=None if languages[0] is None else list(languages),
            task=self._tongue.task,
            max_new_tokens=generation.max_new_tokens,
            num_beams=generation.num_beams,
            # It would read on by itself, but from the same encoder outputs.
            force_unique_generate_call=True,
            custom_generate=pen,
        )
        assert pen.written is not None
        return pen.written

    def _take(self, one: Hearing, tokens: list[int], logprobs: list[float], frames: int) -> None:
        """Add what was written of a window from `one.frame` on, the end token included."""
        ended = tokens[-1] == self._end
        tokens = tokens[:-1] if ended else tokens
        kept, steps = whole_segments(tokens, self._tongue.first)
        one.tokens += tokens[:kept]
        if steps is None:
            one.logprobs += logprobs
            one.cut |= not ended
            one.frame = frames
        else:
            one.logprobs += logprobs[:kept]
            one.frame += max(1, steps * self._stride)

    def _heard(self, one: Hearing, language: str | None, window: tuple[float, float, float]) -> Heard:
        mean = float(np.mean(one.logprobs))
        return Heard(
            tokens=tuple(one.tokens),
            window=window,
            language=language and language[2:-2],
            finish_reason="length" if one.cut else "stop",
            n_tokens=len(one.logprobs),
            mean_logprob=mean if math.isfinite(mean) else math.nan,
            repetition=has_loop([token for token in one.tokens if token < self._tongue.first]),
        )


def whole_segments(tokens: Sequence[int], first: int) -> tuple[int, int | None]:
    """How many of a window's tokens count, and after how many steps of 0.02 s to read on; None: all is read.

    Two timestamps in a row end a segment and begin the next. `first`: id of the timestamp 0.00 s.
    """
    stamps = [token >= first for token in tokens]
    pairs = [place for place in range(len(tokens) - 1) if stamps[place] and stamps[place + 1]]
    if not pairs or stamps[-2:] == [False, True]:
        return len(tokens), None
    return pairs[-1] + 2, tokens[pairs[-1]] - first


class Pen:
    """As a `custom_generate`: lets `write` write and keeps what Whisper's `generate` has no place for."""

    def __init__(self, write: Any, end: int) -> None:
        self._write, self._end = write, end
        self.written: Written | None = None

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> torch.Tensor:
        self.written = written = self._write(
            model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs
        )
        # Of what comes behind, it wants tokens that end.
        ids = input_ids[:: len(input_ids) // len(written.lengths)]
        return torch.nn.functional.pad(ids, (0, 1), value=self._end)


class BeamSearch:
    """As a `custom_generate`: transformers' beam search, as a Written."""

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Written:
        generation_config.return_dict_in_generate = True
        likeliest = Likeliest(2 * generation_config.num_beams)
        processors = LogitsProcessorList([*logits_processor, likeliest])
        found = model._beam_search(input_ids, processors, stopping_criteria, generation_config, **inputs)
        indices = found.beam_indices
        tokens = found.sequences[:, input_ids.shape[1] :][:, : indices.shape[1]]
        lengths = (indices >= 0).sum(dim=1)
        return Written(tokens.cpu(), likeliest.of(tokens, indices).cpu(), lengths.cpu())


class Likeliest(LogitsProcessor):  # type: ignore[misc]
    """Notes the likeliest tokens of each step and beam: of those `_beam_search` takes its own, whichever it takes.

    All logits of a text of 100 tokens would be 1.7 GB for 16 windows with 5 beams.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        values, tokens = scores.float().topk(self._count)
        self._steps.append((values - scores.float().logsumexp(dim=-1, keepdim=True), tokens))
        return scores

    def of(self, tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Log-probability of each of `tokens` [n, T], chosen in the beams `indices` [n, T]; 0 where that is -1."""
        columns = []
        for (values, known), token, beam in zip(self._steps, tokens.T, indices.T, strict=False):
            beam = beam.long()
            here = (known[beam.clamp_min(0)] == token[:, None]) & (beam >= 0)[:, None]
            columns.append(values[beam.clamp_min(0)].masked_fill(~here, 0.0).sum(dim=1))
        return torch.stack(columns, dim=1)


def _from_frames(features: torch.Tensor, rows: Sequence[int], starts: Sequence[int]) -> torch.Tensor:
    """These rows of `features` [n, mel, frames], each from its start on, zeros behind."""
    cut = features.new_zeros(len(rows), *features.shape[1:])
    for out, row, start in zip(cut, rows, starts, strict=True):
        out[:, : features.shape[-1] - start] = features[row, :, start:]
    return cut


def load(plan: GenerationPlan, device: torch.device) -> Any:
    """The model. Raises ModelError."""
    import transformers

    tongue: Tongue = plan.detail
    row = SPEECH[plan.checkpoint.config.model_type]
    model = load_model(getattr(transformers, row.model_class), plan, device, makes="transcripts")
    settings = model.generation_config
    # What an old checkpoint lacks.
    settings.no_timestamps_token_id = tongue.first - 1
    settings.is_multilingual = bool(tongue.languages)
    if tongue.languages:
        settings.lang_to_id, settings.task_to_id = dict(tongue.languages), dict(tongue.tasks)
    # A window that looks bad is not written again, by chance.
    for name in ("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold"):
        setattr(settings, name, None)
    settings.condition_on_prev_tokens = False
    # The plan has it in max_new_tokens.
    settings.max_length = None
    return model
