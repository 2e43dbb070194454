"""The decoding loop: a row that has ended leaves the batch; and the likelihoods of answers that are given.

Both run as the `custom_generate` of transformers' `generate`, which prepares prompt, masks, encoder and cache, and
whose own loop (`GenerationMixin._sample`) is the reference: the tokens are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache
from transformers.utils import ModelOutput

from mmcli.core.records import Scored

# Rows that have ended leave the batch when they are a quarter of it or more. Leaving costs a copy of the cache.
LEAVE = 0.25
# So many rows at once go through the model when answers are scored: memory stays that of a batch.
SCORED_ROWS = 64

# Inputs of `forward` whose first axis is the batch's rows; the second in position ids of three axes (Qwen-VL).
_ROWS = frozenset(
    {
        "attention_mask", "decoder_attention_mask", "encoder_attention_mask", "encoder_hidden_states",
        "encoder_outputs", "token_type_ids", "mm_token_type_ids", "position_ids", "decoder_position_ids",
        "image_attention_mask", "image_hidden_states",
    }
)  # fmt: skip
# Inputs that only the first pass reads, where there is a cache.
_FIRST = frozenset(
    {
        "inputs_embeds", "pixel_values", "pixel_values_videos", "pixel_mask", "pixel_attention_mask", "image_sizes",
        "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "image_sizes_videos", "input_features",
        "input_features_mask", "feature_attention_mask", "input_values", "mm_encoder_outputs",
    }
)  # fmt: skip
# Logits processors that treat each row by its own tokens alone (RepetitionPenalty: see _Penalty).
_ROW_BY_ROW = frozenset(
    {
        "ExponentialDecayLengthPenalty", "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor", "LogitNormalization", "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor", "NoBadWordsLogitsProcessor", "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor", "SequenceBiasLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor", "WhisperTimeStampLogitsProcessor",
    }
)  # fmt: skip
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


class Constraint(Protocol):
    """What each row of a batch may be written next. `rows` are numbers in the batch as it began."""

    def mask(self, rows: Sequence[int]) -> torch.Tensor:
        """What is allowed: bool [len(rows), V], or int32 [len(rows), ceil(V / 32)], token t being bit t % 32.

        A row that is allowed nothing is complete: it ends without another token. V may be smaller than the model's
        vocabulary; the tokens above are not allowed.
        """
        ...

    def accept(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """These tokens were chosen, one for each of these rows; an end token among them."""
        ...


@dataclass(frozen=True, slots=True)
class Written:
    """What a batch wrote, on the host; T is the longest.

    tokens    int64 [n, T], 0 behind a row's end
    logprobs  float32 [n, T], the log-probability of each; 0 behind a row's end
    lengths   int64 [n], the end token included
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    lengths: torch.Tensor


class Decoding:
    """Greedy or drawn tokens: pass it as `generate(custom_generate=Decoding(...))`, which then gives a Written.

    Log-probabilities are those at temperature 1, of the scores that tokens are chosen by: after what the
    checkpoint's generation_config.json and the constraint forbid. Beams are not for it.

    temperature  0: the likeliest token each time; else tokens are drawn from softmax(scores / temperature)
    seeds        one for each row, where tokens are drawn. They alone decide a row's draws: neighbours, the device
                 and rows that leave do not matter
    constraint   what rows may be written
    """

    def __init__(
        self, temperature: float = 0.0, seeds: Sequence[int] = (), constraint: Constraint | None = None
    ) -> None:
        self._temperature, self._seeds, self._constraint = temperature, seeds, constraint

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Written:
        batch = Batch(model, input_ids, inputs)
        trail = Trail(len(input_ids), input_ids.device)
        points = self._points(generation_config.max_length - input_ids.shape[1], input_ids.device)
        logits = batch.prefill(generation_config)
        may_leave = batch.movable() and all(type(p).__name__ in _ROW_BY_ROW for p in logits_processor)
        for place, processor in enumerate(logits_processor):
            if type(processor).__name__ == "RepetitionPenaltyLogitsProcessor":
                logits_processor[place] = _Penalty(processor, batch)
        while True:
            scores = logits_processor(batch.ids, logits)
            if self._constraint is not None:
                scores = self._constrain(self._constraint, scores, trail)
                if trail.over.all():
                    break
            tokens, logprobs = choose(scores, self._temperature, trail.points(points))
            trail.append(tokens, logprobs)
            batch.ids = torch.cat([batch.ids, tokens[:, None]], dim=1)
            self._end(stopping_criteria(batch.ids, None), tokens, trail)
            if trail.over.all():
                break
            if may_leave and trail.over.mean() >= LEAVE:
                batch.keep(trail.leave())
            logits = batch.step()
        return trail.written()

    def _points(self, steps: int, device: torch.device) -> torch.Tensor | None:
        """A number in [0, 1) for each row and step: [n, steps].

        From one generator a row, on the host, all before the first step.
        """
        if not self._temperature:
            return None
        generators = [torch.Generator().manual_seed(seed) for seed in self._seeds]
        drawn = torch.stack([torch.rand(steps, generator=g, dtype=torch.float64) for g in generators])
        return drawn.to(device, _double(device))

    def _constrain(self, constraint: Constraint, scores: torch.Tensor, trail: Trail) -> torch.Tensor:
        """`scores` with -inf for what is not allowed; rows that are allowed nothing are over."""
        places = np.flatnonzero(~trail.over)
        # On a GPU the model still computes meanwhile.
        mask = unpacked(constraint.mask(trail.rows[places].tolist()), scores.shape[1])
        complete = ~mask.any(dim=1)
        if complete.any():
            trail.end(torch.from_numpy(places[complete.numpy()]))
        index = torch.from_numpy(places).to(scores.device)
        forbidden = ~(mask | complete[:, None]).to(scores.device, non_blocking=True)
        return scores.index_copy(0, index, scores[index].masked_fill(forbidden, -torch.inf))

    def _end(self, ended: torch.Tensor, tokens: torch.Tensor, trail: Trail) -> None:
        """Note which rows are over: the only place of a step where the host waits for the device."""
        if self._constraint is None:
            trail.update(ended, ended.cpu().numpy())
            return
        found, known = torch.stack([tokens, ended.long()]).cpu().numpy()
        places = np.flatnonzero(~trail.over)
        self._constraint.accept(trail.rows[places].tolist(), found[places].tolist())
        trail.update(ended, known.astype(bool))


class Batch:
    """The rows that are being written, and all that the model needs to go on.

    ids     int64 [m, L], prompt and what is written
    inputs  what `generate` gives to `prepare_inputs_for_generation`, by name
    """

    def __init__(self, model: Any, ids: torch.Tensor, inputs: dict[str, Any]) -> None:
        self._model, self.ids, self.inputs = model, ids, inputs

    def prefill(self, config: Any, ahead: int = 1) -> torch.Tensor:
        """Logits of the first token: float32 [m, V]. `ahead`: how many tokens the next step takes."""
        outputs = self._model._prefill(self.ids, config, self.inputs)
        for _ in range(ahead):
            self._advance(outputs)
        if self.inputs.get("use_cache"):
            self.inputs = {name: value for name, value in self.inputs.items() if name not in _FIRST}
        return _last(outputs)

    def step(self) -> torch.Tensor:
        """Logits of the next token, after `ids`: float32 [m, V]."""
        outputs = self._forward(1)
        self._advance(outputs)
        return _last(outputs)

    def logits(self, width: int) -> torch.Tensor:
        """Logits at each of the last `width` tokens of `ids`, which the cache does not hold: [m, width, V]."""
        if "logits_to_keep" in self.inputs:
            self.inputs["logits_to_keep"] = 0
        found: torch.Tensor = self._forward(width).logits
        return found[:, -width:]

    def text_mask(self) -> torch.Tensor | None:
        """Which of `ids` are no padding: bool [m, L]; None where nothing says."""
        name = "decoder_attention_mask" if self._model.config.is_encoder_decoder else "attention_mask"
        mask = self.inputs.get(name)
        length = self.ids.shape[1]
        if mask is None or mask.ndim != 2 or mask.shape[1] < length:
            return None
        kept: torch.Tensor = mask[:, :length].bool()
        return kept

    def movable(self) -> bool:
        """Whether it is known of all that is kept between steps where its rows are."""
        inner = getattr(self._model, "model", self._model)
        if hasattr(inner, "rope_deltas") and self.inputs.get("position_ids") is None:
            # It keeps positions in the model.
            return False
        if not self.inputs.get("use_cache"):
            return False
        return all(self._movable(name, value) for name, value in self.inputs.items())

    def keep(self, index: torch.Tensor) -> None:
        """Of these rows only, in that order; a row may be named several times."""
        self.ids = self.ids[index]
        self.inputs = {name: _selected(name, value, index) for name, value in self.inputs.items()}

    def copy(self) -> Batch:
        """Another with the same tensors: steps of one do not touch the other."""
        inputs = {n: _copied(v) if isinstance(v, Cache) else v for n, v in self.inputs.items()}
        return Batch(self._model, self.ids, inputs)

    def _forward(self, width: int) -> Any:
        prepared = self._model.prepare_inputs_for_generation(
            self.ids, next_sequence_length=width if self.inputs.get("use_cache") else None, **self.inputs
        )
        return self._model(**prepared, return_dict=True)

    def _advance(self, outputs: Any) -> None:
        self.inputs = self._model._update_model_kwargs_for_generation(
            outputs, self.inputs, is_encoder_decoder=self._model.config.is_encoder_decoder
        )

    def _movable(self, name: str, value: Any) -> bool:
        if value is None or isinstance(value, bool | int | float | str):
            return True
        if isinstance(value, EncoderDecoderCache):
            caches = value.self_attention_cache, value.cross_attention_cache
            return all(self._movable(name, cache) for cache in caches)
        if isinstance(value, Cache):
            return all(type(layer) in _LAYERS for layer in value.layers)
        if name not in _ROWS:
            return False
        if isinstance(value, ModelOutput):
            return all(isinstance(v, torch.Tensor) and len(v) == len(self.ids) for v in value.values())
        return isinstance(value, torch.Tensor) and value.shape[_axis(name, value)] == len(self.ids)


class _Penalty:
    """A RepetitionPenaltyLogitsProcessor of the rows that are in the batch now, to which padding is no text.

    transformers 5.24 knows where each row of the first batch begins, and 5.17 penalises the padding token.
    """

    def __init__(self, processor: Any, batch: Batch) -> None:
        processor.prompt_ignore_length = None
        self._processor, self._batch = processor, batch

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        mask = self._batch.text_mask()
        if mask is not None:
            # A token that is in the row anyway.
            input_ids = torch.where(mask, input_ids, input_ids[:, -1:])
        found: torch.Tensor = self._processor(input_ids, scores)
        return found


class Trail:
    """What rows have written so far, and which are over. Places are those in the batch as it is now.

    rows  int64 [m], on the host: each row's number in the batch as it began
    over  bool [m], on the host: rows that have ended, and wait to leave
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.rows, self.over = np.arange(count), np.zeros(count, bool)
        self._count, self._left = count, False
        self._rows = torch.arange(count, device=device)
        self._over = torch.zeros(count, dtype=torch.bool, device=device)
        self._columns: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def points(self, points: torch.Tensor | None) -> torch.Tensor | None:
        """The column of `points` [n, steps] for this step: [m, 1]."""
        return None if points is None else points[self._rows, len(self._columns), None]

    def append(self, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """What each place wrote, [m]; of those that are over it does not count."""
        column = tokens.masked_fill(self._over, 0), logprobs.masked_fill(self._over, 0.0), ~self._over
        if self._left:
            column = tuple(c.new_zeros(self._count).index_copy(0, self._rows, c) for c in column)  # type: ignore[assignment]
        self._columns.append(column)

    def update(self, ended: torch.Tensor, known: np.ndarray) -> None:
        """These are over, too: on the device and on the host."""
        self._over = self._over | ended
        self.over = self.over | known

    def end(self, places: torch.Tensor) -> None:
        """Those at `places` are over."""
        self.over[places.numpy()] = True
        self._over = torch.from_numpy(self.over).to(self._over.device)

    def leave(self) -> torch.Tensor:
        """Those that are over leave; gives the places of those that stay."""
        places = np.flatnonzero(~self.over)
        index = torch.from_numpy(places).to(self._rows.device)
        self.rows, self.over = self.rows[places], self.over[places]
        self._rows, self._over, self._left = self._rows[index], self._over[index], True
        return index

    def written(self) -> Written:
        if not self._columns:
            empty = torch.zeros(self._count, 0)
            return Written(empty.long(), empty, torch.zeros(self._count, dtype=torch.long))
        tokens, logprobs, counted = (torch.stack(c, dim=1).cpu() for c in zip(*self._columns, strict=True))
        return Written(tokens, logprobs, counted.sum(dim=1))


def choose(
    scores: torch.Tensor, temperature: float, points: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row, int64 [m], and its log-probability at temperature 1, float32 [m].

    The likeliest; with `points` [m, 1] in [0, 1) the one drawn from softmax(scores / temperature): the first
    whose cumulative probability is above the row's point (inversion, Devroye 1986, III.2). One number a row and
    step instead of one a token, as Gumbel-max needs: 3 ms instead of 17 a step for 16 rows of 30,522 tokens on
    two cores, where the model's last layer takes 15.
    """
    if points is None:
        chosen = scores.argmax(dim=-1, keepdim=True)
    else:
        cumulative = (scores / temperature).softmax(dim=-1).cumsum(dim=-1, dtype=_double(scores.device))
        # Below the last by more than rounding, or what is forbidden could be drawn.
        chosen = torch.searchsorted(cumulative, points.clamp_max(1 - 1e-7) * cumulative[:, -1:], right=True)
        chosen = chosen.clamp_max(scores.shape[1] - 1)
    logprobs = scores.gather(1, chosen)[:, 0] - scores.logsumexp(dim=-1)
    return chosen[:, 0], logprobs


def unpacked(mask: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """A Constraint's mask as bool [m, vocabulary]."""
    if mask.dtype != torch.bool:
        bits = torch.arange(32, dtype=mask.dtype, device=mask.device)
        mask = ((mask[:, :, None] >> bits) & 1).flatten(1).bool()
    missing = vocabulary - mask.shape[1]
    return torch.nn.functional.pad(mask, (0, missing)) if missing > 0 else mask[:, :vocabulary]


# ------------------------------------------------------------------------------------------ answers that are given


def score_choices(generate: Callable[..., Any], choices: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-likelihood of each choice after each row's prompt: float32 [n, K], on the host.

    Of the model's own probabilities: without what generation_config.json forbids or forces.

    generate  a model's `generate` with the batch's inputs already given to it (functools.partial)
    choices   tokens of each, the end token included, as they follow the prompt
    """
    options = {"max_new_tokens": max(map(len, choices)), "do_sample": False, "num_beams": 1}
    found = generate(custom_generate=_Together(choices), **options)
    if found is None:
        one_by_one = [generate(custom_generate=_Forced(choice), **options) for choice in choices]
        found = torch.stack(one_by_one, dim=1)
    scores: torch.Tensor = found.float().cpu()
    return scores


def scored(logprobs: torch.Tensor, names: Sequence[str]) -> list[Scored]:
    """One for each row of `logprobs` [n, K], the log-likelihoods of the K choices called `names`.

    A choice's probability is softmax over the choices of their log-likelihoods: given that the answer is one of
    them, how likely it is this. Long choices are less likely than short ones, as they are when the model writes.
    """
    found = []
    for row in logprobs.double().softmax(dim=-1).tolist():
        order = sorted(range(len(names)), key=lambda k: -row[k])
        top = tuple((names[k], row[k]) for k in order)
        found.append(Scored(top[0][0], top[0][1], top))
    return found


class _Together:
    """As a `custom_generate`: log-likelihoods [n, K]; the prompt is read once. None where rows cannot be copied."""

    def __init__(self, choices: Sequence[Sequence[int]]) -> None:
        self._choices = choices

    def __call__(
        self, model: Any, input_ids: torch.Tensor, generation_config: Any, **inputs: Any
    ) -> torch.Tensor | None:
        for name in ("logits_processor", "stopping_criteria"):
            inputs.pop(name)
        batch = Batch(model, input_ids, inputs)
        width = max(map(len, self._choices)) - 1
        first = batch.prefill(generation_config, ahead=max(1, width)).log_softmax(dim=-1)
        total = first[:, [choice[0] for choice in self._choices]]
        longer = [k for k, choice in enumerate(self._choices) if len(choice) > 1]
        if longer and not batch.movable():
            return None
        at_once = max(1, SCORED_ROWS // len(input_ids))
        for start in range(0, len(longer), at_once):
            some = longer[start : start + at_once]
            total[:, some] += self._rest(batch, some, width)
        return total

    def _rest(self, batch: Batch, some: Sequence[int], width: int) -> torch.Tensor:
        """Log-likelihoods of these choices' tokens after their first: [n, len(some)]."""
        count, device = len(batch.ids), batch.ids.device
        tokens = np.zeros((len(some), width + 1), np.int64)
        given = np.zeros((len(some), width), bool)
        for row, k in enumerate(some):
            tokens[row, : len(self._choices[k])] = self._choices[k]
            given[row, : len(self._choices[k]) - 1] = True
        # Rows are (prompt 0, choice 0), (prompt 0, choice 1), ...
        forced = torch.from_numpy(tokens).to(device).repeat(count, 1)
        counted = torch.from_numpy(given).to(device).repeat(count, 1)
        pairs = batch.copy()
        pairs.keep(torch.arange(count, device=device).repeat_interleave(len(some)))
        pairs.ids = torch.cat([pairs.ids, forced[:, :-1]], dim=1)
        logits = pairs.logits(width).float()
        chosen = logits.gather(2, forced[:, 1:, None])[..., 0] - logits.logsumexp(dim=-1)
        return chosen.masked_fill(~counted, 0.0).sum(dim=1).view(count, len(some))


class _Forced:
    """As a `custom_generate`: the log-likelihood [n] of one choice, a token at a time, with any cache or none."""

    def __init__(self, choice: Sequence[int]) -> None:
        self._choice = choice

    def __call__(self, model: Any, input_ids: torch.Tensor, generation_config: Any, **inputs: Any) -> torch.Tensor:
        for name in ("logits_processor", "stopping_criteria"):
            inputs.pop(name)
        batch = Batch(model, input_ids, inputs)
        total = batch.prefill(generation_config).log_softmax(dim=-1)[:, self._choice[0]]
        for last, token in zip(self._choice, self._choice[1:], strict=False):
            batch.ids = torch.cat([batch.ids, batch.ids.new_full((len(batch.ids), 1), last)], dim=1)
            total = total + batch.step().log_softmax(dim=-1)[:, token]
        return total


# ------------------------------------------------------------------------------------------ rows of tensors


def _last(outputs: Any) -> torch.Tensor:
    # A copy: processors may write into it, and the logits of a whole prompt are not kept alive.
    found: torch.Tensor = outputs.logits[:, -1].to(torch.float32, copy=True)
    return found


def _selected(name: str, value: Any, index: torch.Tensor) -> Any:
    if isinstance(value, Cache):
        # Of any length, and with rows named twice, as for beams.
        value.reorder_cache(index)
        return value
    if isinstance(value, ModelOutput):
        return type(value)(**{key: one[index] for key, one in value.items()})
    if isinstance(value, torch.Tensor):
        return value.index_select(_axis(name, value), index)
    return value


def _axis(name: str, value: torch.Tensor) -> int:
    return 1 if name.endswith("position_ids") and value.ndim == 3 else 0


def _copied(cache: Any) -> Any:
    copied = copy.copy(cache)
    if isinstance(cache, EncoderDecoderCache):
        copied.self_attention_cache = _copied(cache.self_attention_cache)
        copied.cross_attention_cache = _copied(cache.cross_attention_cache)
        copied.is_updated = dict(cache.is_updated)
    else:
        # Their tensors are not written into: steps and selections put new ones in their place.
        copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def _double(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
