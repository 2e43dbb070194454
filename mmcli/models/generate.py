"""A loaded model that writes: samples -> padded batch -> texts with their trust columns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmcli.core.records import Generated, Sample, Scored
from mmcli.models.choices import Choices
from mmcli.models.decoding import Constraint, Decoding, Written
from mmcli.models.inputs import open_tokenizer
from mmcli.models.loops import has_loop
from mmcli.models.plan import GenerationPlan
from mmcli.models.runner import Batch, TorchRunner, join, stack

if TYPE_CHECKING:
    from mmcli.models.structured import Grammar


@dataclass(frozen=True, slots=True)
class Writer:
    """A loaded model that writes.

    generate  the model's own
    ends      tokens that end a text; the usual one first
    forced    whether the last token allowed is made one of them: such a text did not end by itself
    decode    tokens without prompt and what follows the end -> text
    fill      with what arrays of tokens are padded, on the left, by name (input_ids, attention_mask, ...)
    joined    names of arrays that are put one behind the other, not stacked (Qwen-VL's pixel_values)
    """

    generate: Callable[..., Any]
    ends: Sequence[int]
    forced: bool
    decode: Callable[[Sequence[int]], str]
    fill: Mapping[str, int] = field(default_factory=dict)
    joined: Container[str] = frozenset()


@dataclass(slots=True)
class TextBatch(Batch):
    """Also how many samples, and the seed of each, where tokens are drawn."""

    count: int
    seeds: list[int]


class GenerationRunner(TorchRunner):
    """See mmcli.core.protocols.Runner: batches -> texts or choices, by the model's own `generate`."""

    def __init__(self, plan: GenerationPlan) -> None:
        super().__init__(plan)
        self._generation = plan.generation
        self._writer: Writer = self.loaded
        self._choices: Choices | None = None
        self._grammar: Grammar | None = None
        if plan.output == "scores":
            self._choices = open_choices(plan, self._writer.ends)
        elif plan.output == "json":
            self._grammar = open_grammar(plan, self._writer.ends)

    def collate(self, samples: Sequence[Sample]) -> TextBatch:
        """Samples of equal (modality, group) -> a Batch; tokens are padded on the left, to the longest.

        On the left, so that all texts go on from the last place. A sample's seed is made of --seed and its own
        inputs: neighbours do not matter.
        """
        sampling = self._generation.temperature > 0
        seeds = [_seed(self._generation.seed, sample) for sample in samples] if sampling else []
        pinned = self.device.type == "cuda"
        tensors = {}
        for name in samples[0].arrays:
            arrays = [s.arrays[name] for s in samples]
            if name in self._writer.joined:
                tensors[name] = join(arrays, pinned)
            else:
                fill = self._writer.fill.get(name)
                tensors[name] = stack(arrays, fill or 0, pinned, left=fill is not None)
        return TextBatch(samples[0].modality, tensors, len(samples), seeds)

    @torch.inference_mode()
    def forward(self, batch: TextBatch) -> list[Generated] | list[Scored]:
        """One text or choice per sample. Raises torch.OutOfMemoryError."""
        generate = partial(self._writer.generate, **self.to_device(batch))
        if self._choices is not None:
            return self._choices(generate)
        answers = None if self._grammar is None else self._grammar.start(batch.count)
        written = self._write(generate, batch.seeds, answers)
        rows = zip(written.tokens.tolist(), written.logprobs.double().numpy(), written.lengths, strict=True)
        found = [self._generated(tokens[:length], scores) for tokens, scores, length in rows]
        if answers is not None:
            # What had to be closed is whole, but not what the model would have written.
            found = [
                replace(g, finish_reason="length") if c else g for g, c in zip(found, answers.cut, strict=True)
            ]
        return found

    def _write(self, generate: Callable[..., Any], seeds: Sequence[int], constraint: Constraint | None) -> Written:
        generation = self._generation
        limits = {"max_new_tokens": generation.max_new_tokens, "num_beams": generation.num_beams}
        # Draws, too, are made by Decoding.
        generate = partial(generate, **limits, do_sample=False)
        if generation.num_beams > 1:
            output = generate(return_dict_in_generate=True, output_logits=True)
            logprobs = beam_logprobs(output).cpu()
            # Decoders give their prompt back, before what they wrote.
            tokens = output.sequences[:, output.sequences.shape[1] - logprobs.shape[1] :].cpu()
            return Written(tokens, logprobs, torch.full((len(tokens),), tokens.shape[1]))
        found: Written = generate(custom_generate=Decoding(generation.temperature, seeds, constraint))
        return found

    def _generated(self, tokens: list[int], logprobs: np.ndarray) -> Generated:
        writer, limit = self._writer, self._generation.max_new_tokens
        end = next((i for i, token in enumerate(tokens) if token in writer.ends), None)
        stopped = end is not None and not (writer.forced and end == limit - 1)
        written = tokens if end is None else tokens[:end]
        count = len(written) + stopped
        mean = float(logprobs[:count].mean()) if count else 0.0
        if not math.isfinite(mean):
            mean = math.nan
        text = writer.decode(written) if self._grammar is None else self._grammar.decode(written)
        return Generated(text, "stop" if stopped else "length", count, mean, has_loop(written))


def open_choices(plan: GenerationPlan, ends: Sequence[int]) -> Choices:
    """The plan's choices, for its tokenizer. Raises ConfigError."""
    return Choices(open_tokenizer(plan.checkpoint), plan.generation.choices, ends)


def open_grammar(plan: GenerationPlan, ends: Sequence[int]) -> Grammar:
    """The plan's schema, for its tokenizer. Raises ConfigError."""
    from mmcli.models.structured import Grammar

    schema, limit = json.loads(plan.generation.schema or "{}"), plan.generation.max_new_tokens
    return Grammar(open_tokenizer(plan.checkpoint), schema, ends=ends, max_new_tokens=limit)


def beam_logprobs(output: Any) -> torch.Tensor:
    """Log-probability of each token of the best beams: float32 [n, T]; 0 behind their end.

    output  of `generate` with beams and output_logits: `logits` are [n * beams, V] for each step, `beam_indices`
            [n, T] the row of each step's logits from which a sequence went on, -1 behind its end
    """
    indices = output.beam_indices
    tokens = output.sequences[:, output.sequences.shape[1] - indices.shape[1] :]
    found = []
    for step in range(indices.shape[1]):
        logits = output.logits[step].float()[indices[:, step].clamp_min(0)]
        chosen = logits.gather(1, tokens[:, step : step + 1])[:, 0]
        found.append((chosen - logits.logsumexp(dim=-1)).masked_fill(indices[:, step] < 0, 0.0))
    return torch.stack(found, dim=1)


def _seed(seed: int, sample: Sample) -> int:
    digest = blake2b(str(seed).encode(), digest_size=8)
    for name, array in sample.arrays.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).data)
    return int.from_bytes(digest.digest(), "big") >> 1
