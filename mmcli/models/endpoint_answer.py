"""The JSON of a chat completion -> what the model wrote, and what tells whether to trust it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmcli.core.errors import RowError, one_line
from mmcli.core.records import Generated, Scored
from mmcli.models.endpoint_request import CHOICE_FIELD
from mmcli.models.loops import has_loop
from mmcli.models.options import Generation

# Where a server does not give tokens: words and signs.
_WORDS = re.compile(r"\w+|[^\w\s]")
# Models that are not held to JSON like to set it in a block of code.
_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)
_CUT = ("length", "max_tokens")


@dataclass(frozen=True, slots=True)
class _Answer:
    """A completion. `tokens`: (text, log-probability) of each, () when the server does not say."""

    text: str
    finish_reason: Literal["stop", "length"]
    n_tokens: int | None
    tokens: tuple[tuple[str, float], ...]


class AnswerReader:
    """Reads the answers to the requests of a Generation."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._schema = None if generation.schema is None else json.loads(generation.schema)

    def __call__(self, content: bytes) -> Generated | Scored | RowError:
        """The JSON of a chat completion -> its output; RowError for an answer that is none of what was asked for.

        Raises ValueError for what is no chat completion.
        """
        try:
            return self.of(json.loads(content))
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error

    def of(self, found: Any) -> Generated | Scored | RowError:
        """Likewise, of a chat completion that is read already."""
        answer = _read(found, self._generation.max_new_tokens)
        if isinstance(answer, RowError):
            return answer
        if self._generation.choices:
            return _scored(answer, self._generation.choices)
        text = answer.text
        if self._schema is not None:
            from mmcli.core.schema import validate

            fenced = _FENCE.fullmatch(text)
            try:
                value = validate(fenced[1] if fenced else text, self._schema, cut=answer.finish_reason == "length")
            except RowError as error:
                return error
            text = json.dumps(value, ensure_ascii=False)
        return Generated(
            text=text,
            finish_reason=answer.finish_reason,
            n_tokens=answer.n_tokens,
            mean_logprob=_mean(answer.tokens),
            repetition=_repeats(answer),
        )


def _read(found: Any, limit: int) -> _Answer | RowError:
    try:
        choice = found["choices"][0]
        message = choice["message"]
        # A refusal is an answer too: what was asked for is not there, but a text is.
        text = message.get("content") or message.get("refusal") or ""
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"it has no choices[0].message ({type(error).__name__})") from error
    if isinstance(text, list):
        text = "".join(part.get("text") or "" for part in text if isinstance(part, dict))
    if not isinstance(text, str):
        raise ValueError("its message is no text")
    reason = choice.get("finish_reason")
    if reason == "content_filter":
        return RowError("policy_denied", "the server's content filter has stopped this answer", stage="model")
    tokens = _tokens(choice.get("logprobs"))
    usage = found.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    count = count if isinstance(count, int) else len(tokens) or None
    cut = reason in _CUT or (reason is None and count is not None and count >= limit)
    return _Answer(text.strip(), "length" if cut else "stop", count, tokens)


def _tokens(logprobs: Any) -> tuple[tuple[str, float], ...]:
    listed = logprobs.get("content") if isinstance(logprobs, dict) else None
    try:
        return tuple((str(token["token"]), float(token["logprob"])) for token in listed or ())
    except (KeyError, TypeError, ValueError):
        return ()


def _mean(tokens: Sequence[tuple[str, float]]) -> float | None:
    """None when not known, NaN where the scores are not finite."""
    if not tokens:
        return None
    mean = sum(logprob for _, logprob in tokens) / len(tokens)
    return mean if math.isfinite(mean) else math.nan


def _repeats(answer: _Answer) -> bool:
    tokens = [token for token, _ in answer.tokens] or _WORDS.findall(answer.text)
    numbers = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return has_loop([numbers[token] for token in tokens])


def _scored(answer: _Answer, choices: Sequence[str]) -> Scored | RowError:
    chosen = _chosen(answer.text, choices)
    if chosen is None:
        return _invalid("none of --choices", answer.text)
    score = _probability(chosen, answer.tokens)
    return Scored(chosen, score, () if score is None else ((chosen, score),))


def _chosen(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a text is: {"answer": "yes"}, or yes; case, quotes and a full stop do not matter."""
    fenced = _FENCE.fullmatch(text)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        found = text
    if isinstance(found, dict):
        found = found.get(CHOICE_FIELD)
    plain = str(found).strip().strip("\"'`*.").strip()
    if plain in choices:
        return plain
    alike = [choice for choice in choices if choice.casefold() == plain.casefold()]
    return alike[0] if len(alike) == 1 else None


def _probability(chosen: str, tokens: Sequence[tuple[str, float]]) -> float | None:
    """That of the tokens in which the choice is written; None when the server does not say."""
    written = "".join(token for token, _ in tokens)
    found = [match.span() for match in re.finditer(re.escape(chosen), written, re.IGNORECASE)]
    if not found:
        return None
    (start, end), total, place = found[-1], 0.0, 0
    for token, logprob in tokens:
        if place < end and place + len(token) > start:
            total += logprob
        place += len(token)
    return math.exp(min(total, 0.0)) if math.isfinite(total) else math.nan


def _invalid(problem: str, text: str) -> RowError:
    return RowError("invalid_output", f"{problem}: {one_line(text, 200)}", stage="post")
