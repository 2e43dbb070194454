"""Answers that keep to a JSON Schema by the grammar: at each step only tokens that lead to one are allowed.

The grammar is llguidance's (https://github.com/guidance-ai/llguidance), and narrower than the schema:

- one way of writing: `{"name": "Ann", "tags": ["a", "b"]}`, fields in the schema's order, no other space
- integers and numbers without limits of their own are within +-(2^53 - 1), written without an exponent: so far JSON
  readers agree on them (RFC 7493)
- an object that does not say anything of additional fields has none

It does not bound texts and lists: a model may write one without end. So as --max-new-tokens comes near, a row is
brought to its end: the text or list that it is writing is closed while there still is room for all that must
follow, and the model goes on with the next value. Values behind are the model's own, since each is kept some room
(`Grammar.room` tokens); `Answers.cut` says which rows were closed.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from transformers import LogitsProcessor

from mmcli.core.errors import ConfigError
from mmcli.core.schema import subschemas

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Tokens that are kept for each value which is still to be written, where --max-new-tokens allows; an integer has 17
# characters at most. And the fewest: less than this, and the run is refused.
ROOM, LEAST_ROOM = 24, 4
# A token that opens nothing may put off the end by so many: a backslash, a minus, the first byte of a character, or
# the name of a field that the schema does not name.
SLACK = 6
# No shortest answer has more tokens: an object that must hold itself has none.
LONGEST = 2000
SAFE = 2**53 - 1
STYLE: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}
STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
# What brings a value to its end, or begins the shortest, outside of a string; then digits.
CLOSERS = (b"]", b"}", b",", b'"')


class Ending(NamedTuple):
    """A short way from where a row is to a whole answer.

    tokens  that it takes, the end token not counted
    first   so many of them come before the next value
    values  that begin on the way: each could be the model's own if it had the room
    forced  the first token is of a text that is the only way on
    """

    tokens: list[int]
    first: int
    values: int
    forced: bool


class Grammar:
    """A schema for the tokens of one tokenizer. Takes up to a second to make, for 150 000 tokens.

    ends        tokens that end an answer
    limit       --max-new-tokens, the end token included
    known       tokens of the tokenizer; `vocab_size`: of the model's logits
    room        tokens that are kept for each value
    margin      tokens by which one token at most puts off the end; `puts_off`: the same for each token
    """

    def __init__(
        self,
        tokenizer: Any,
        schema: dict[str, Any],
        *,
        ends: Sequence[int],
        max_new_tokens: int,
        vocab_size: int | None = None,
    ) -> None:
        """For a model with logits of `vocab_size`; needs no weights: make one to check the options.

        Raises ConfigError for a tokenizer whose tokens are not pieces of text, a schema that llguidance does not
        take, or too few tokens.
        """
        self.ends, self.limit = list(ends), max_new_tokens
        count = max(tokenizer.get_vocab().values()) + 1
        self._tokenizer = known = _tokenizer(tokenizer, self.ends, max(count, vocab_size or 0))
        self.known, self.vocab_size = known.vocab_size, vocab_size or count
        self._bytes = [
            b"" if known.is_special_token(token) or token in self.ends else known.decode_bytes([token])
            for token in range(min(count, self.vocab_size))
        ]
        self._ids = {text: token for token, text in enumerate(self._bytes) if text}
        self._longest = max(map(len, self._ids))
        self._sizes = np.array([len(text) for text in self._bytes])
        self._openers = np.array([text[:1] in (b"[", b"{", b'"') for text in self._bytes])
        self._quote = [token for text, token in self._ids.items() if text == b'"']
        self._closers = [self._ids[text] for text in CLOSERS if text in self._ids]
        self._digits = [self._ids[text] for text in map(b"%d".__mod__, range(10)) if text in self._ids]
        self.executor = LLExecutor()
        narrow = _narrowed(schema)
        self._matcher = self._compile(narrow)
        self._keep_room(narrow)

    def start(self, count: int) -> Answers:
        """The answers of a batch of `count` rows, none of them begun."""
        return Answers(self, [self._matcher.deep_copy() for _ in range(count)])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer, as the grammar read it; a tokenizer's own decoding may drop or add spaces."""
        return self.decode_bytes(tokens).decode(errors="replace")

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """The same, where the last character may be incomplete."""
        return b"".join(self._bytes[token] for token in tokens)

    def ending(self, matcher: LLMatcher, written: bytes) -> Ending | None:
        """A short way to the end for a row that has `written` so far; None where none was found."""
        matcher = matcher.deep_copy()
        tokens: list[int] = []
        begins: list[int] = []
        inside, forced_first = True, False
        while not matcher.is_accepting():
            forced = matcher.compute_ff_bytes()
            if not tokens:
                forced_first = bool(forced)
            if not forced and not inside:
                begins.append(len(tokens))
            inside = not forced
            step = self._split(forced) if forced else self._close(matcher, written, len(tokens))
            if not step or matcher.try_consume_tokens(step) < len(step) or len(tokens) > LONGEST:
                return None
            tokens += step
            written += self.decode_bytes(step)
        return Ending(tokens, begins[0] if begins else len(tokens), len(begins), forced_first)

    def _compile(self, schema: dict[str, Any]) -> LLMatcher:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=STYLE)
        wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        if wrong:
            reason = messages[0].strip().split("\n")[0]
            raise ConfigError(f"--schema: answers cannot be held to this schema: {reason}")
        return LLMatcher(self._tokenizer, grammar, log_level=0)

    def _keep_room(self, schema: dict[str, Any]) -> None:
        whole = self.ending(self._matcher, b"")
        if whole is None:
            raise ConfigError(
                f"--schema: no answer of up to {LONGEST} tokens was found that this model's tokenizer can write",
                hint="give a schema with shorter answers, or another model",
            )
        parts = list(self._parts(schema, whole))

        def margin(room: int, literal: bool = False) -> int:
            opened = (
                len(e.tokens) + room * max(e.values - 1, 0) for e, is_literal in parts if is_literal >= literal
            )
            return SLACK + max(opened, default=0)

        def needed(room: int) -> int:
            return len(whole.tokens) + 1 + room * whole.values + margin(room)

        fitting = (room for room in range(ROOM, LEAST_ROOM - 1, -1) if needed(room) <= self.limit)
        self.room = next(fitting, 0)
        if not self.room:
            raise ConfigError(
                f"--max-new-tokens {self.limit} is too few for the schema: its shortest answer has "
                f"{len(whole.tokens) + 1} tokens, and its values want some room",
                hint=f"give --max-new-tokens {needed(ROOM)}",
            )
        self.margin = margin(self.room)
        opens = np.array([re.search(rb'["\[{,:\\]', text) is not None for text in self._bytes])
        self.puts_off = np.where(opens, self.margin, margin(self.room, literal=True))

    def _parts(self, schema: dict[str, Any], whole: Ending) -> Iterator[tuple[Ending, bool]]:
        """What one token may open, and whether that is a literal: a word of an enumeration, a date."""
        recursive = any("$ref" in part for part in subschemas(schema))
        # One token such as [{" opens several: so each part is taken with all that it may hold. Of a schema that may
        # hold itself, that has no end.
        full = schema if recursive else _filled(schema)
        shared: dict[str, Any] = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
        for part, literal in _openings(schema, full):
            try:
                ending = self.ending(self._compile({**shared, **part}), b"")
            except ConfigError:
                # It cannot stand alone (a $ref to another part).
                ending = whole
            if ending is not None:
                yield ending._replace(tokens=ending.tokens * (1 + recursive)), literal

    def _split(self, text: bytes) -> list[int]:
        """The tokens of a text, the longest first; [] where there are none."""
        tokens = []
        while text:
            sizes = range(min(len(text), self._longest), 0, -1)
            size = next((size for size in sizes if text[:size] in self._ids), 0)
            if not size:
                return []
            tokens.append(self._ids[text[:size]])
            text = text[size:]
        return tokens

    def _close(self, matcher: LLMatcher, written: bytes, step: int) -> list[int]:
        """A token that comes closer to the end where there is a choice."""
        in_string = b'"' in STRING.sub(b"", written)
        # Another digit each time: -0. has no end with zeros alone, nor a multiple of 7 with ones.
        turn = (step + 1) % 10
        digits = self._digits[turn:] + self._digits[:turn]
        for token in self._quote if in_string else self._closers + digits:
            if matcher.validate_tokens([token]):
                return [token]
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=len(self._bytes), bitorder="little").view(bool)
        sizes = self._sizes * allowed
        if in_string:
            # What a pattern wants: ^a+b$ has no end with a long token of a.
            for token in np.flatnonzero(sizes == 1).tolist():
                if matcher.validate_tokens([token, *self._quote]) == 2:
                    return [token]
        elif (plain := sizes * ~self._openers).any():
            # Rather null than another object.
            sizes = plain
        # A literal takes few long tokens.
        return [int(sizes.argmax())] if sizes.any() else []


class Answers:
    """The answers of one batch, as the decoding loop wants them (mmcli.models.decoding.Constraint).

    cut  bool [n]: the row was brought to its end, or could not end, because of --max-new-tokens
    """

    def __init__(self, grammar: Grammar, matchers: list[LLMatcher]) -> None:
        self._grammar, self._matchers = grammar, matchers
        self._written: list[list[int]] = [[] for _ in matchers]
        self._over = np.zeros(len(matchers), bool)
        # How many tokens too many there are at least; a row is looked at again when there may be none.
        self._spare = np.zeros(len(matchers))
        # What a row that has to end is to be written next.
        self._path: list[list[int]] = [[] for _ in matchers]
        self.cut = np.zeros(len(matchers), bool)

    def mask(self, rows: Sequence[int]) -> torch.Tensor:
        """The tokens that may come next: bool [len(rows), V], on the host; the end alone for a whole answer."""
        grammar = self._grammar
        left = {place: self._left(row) for place, row in enumerate(rows)}
        bits = allocate_token_bitmask(len(rows), grammar.known)
        free = [(self._matchers[row], place) for place, row in enumerate(rows) if left[place] is None]
        if free:
            fill_next_token_bitmask_par(grammar.executor, free, bits)
        mask = np.unpackbits(bits.view(np.uint8), axis=1, count=grammar.vocab_size, bitorder="little").view(bool)
        for place, tokens in left.items():
            if tokens is not None:
                mask[place] = False
                mask[place, tokens] = True
        return torch.from_numpy(mask)

    def accept(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """These tokens were chosen, one for each of these rows."""
        taken = []
        for row, token in zip(rows, tokens, strict=True):
            if self._over[row]:
                continue
            if token in self._grammar.ends:
                self._over[row] = True
            else:
                self._written[row].append(token)
                self._spare[row] -= 1 + self._grammar.puts_off[token]
                self._path[row] = self._path[row][1:]
                taken.append((self._matchers[row], token))
        if taken:
            self._grammar.executor.consume_token_par(taken)

    def _left(self, row: int) -> list[int] | None:
        """The tokens that are left to a row that has to end; None for one that is free."""
        grammar, matcher, written = self._grammar, self._matchers[row], self._written[row]
        if self._over[row]:
            return grammar.ends
        if self._path[row]:
            return self._path[row][:1]
        if self._spare[row] > 0:
            return None
        ending = grammar.ending(matcher, grammar.decode_bytes(written))
        if ending is None:
            self._spare[row] = np.inf
            return None
        needed = len(ending.tokens) + 1 + grammar.room * ending.values + grammar.margin
        self._spare[row] = grammar.limit - len(written) - needed
        if self._spare[row] > 0:
            return None
        self.cut[row] |= not ending.forced if ending.tokens else not matcher.is_stopped()
        self._path[row] = ending.tokens[: ending.first]
        return ending.tokens[:1] or grammar.ends


class AnswerProcessor(LogitsProcessor):  # type: ignore[misc]
    """For transformers' own `generate` without beams: a new one for each call, of Answers as many as its rows."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._begun = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = range(len(input_ids))
        if self._begun:
            self._answers.accept(rows, input_ids[:, -1].tolist())
        self._begun = True
        return scores.masked_fill(~self._answers.mask(rows).to(scores.device), -torch.inf)


def _tokenizer(tokenizer: Any, ends: list[int], count: int) -> LLTokenizer:
    try:
        return from_tokenizer(tokenizer, n_vocab=count, eos_token=ends)
    except ValueError as error:
        raise ConfigError(
            f"--schema: the tokens of the tokenizer {type(tokenizer).__name__} are not known as pieces of "
            f"text, so its answers cannot be held to a schema: {str(error)[:120]}",
            hint="give --choices instead, or a model with a byte-level or sentencepiece BPE tokenizer",
        ) from error


def _narrowed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with the limits of the module's text."""
    schema = copy.deepcopy(schema)
    parts = list(subschemas(schema))
    # An object that is put together from several (allOf, anyOf beside properties) has the fields of all of them.
    joined = any(
        "allOf" in part or ("properties" in part and part.keys() & {"anyOf", "oneOf", "$ref", "if"})
        for part in parts
    )
    for part in parts:
        kinds = part.get("type", ())
        kinds = {kinds} if isinstance(kinds, str) else set(kinds)
        if kinds & {"integer", "number"} and not part.keys() & {"enum", "const"}:
            low, high = (
                part.get("minimum", part.get("exclusiveMinimum")),
                part.get("maximum", part.get("exclusiveMaximum")),
            )
            if low is None and (high is None or high > -SAFE):
                part["minimum"] = -SAFE
            if high is None and (low is None or low < SAFE):
                part["maximum"] = SAFE
        if "properties" in part and not joined and not part.keys() & {"patternProperties", "unevaluatedProperties"}:
            part.setdefault("additionalProperties", False)
    return schema


def _filled(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema where every field is there, and an item in every list."""
    schema = copy.deepcopy(schema)
    for part in subschemas(schema):
        if "properties" in part:
            part["required"] = list(part["properties"])
        if "items" in part and part.get("maxItems") != 0:
            part["minItems"] = max(part.get("minItems", 0), 1)
    return schema


def _openings(schema: dict[str, Any], full: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bool]]:
    """The parts of `full` that a model may begin or leave out by the schema, and whether each is a literal."""
    for plain, part in zip(subschemas(schema), subschemas(full), strict=True):
        if "enum" in part:
            yield {"const": max(part["enum"], key=lambda option: len(json.dumps(option)))}, True
        elif part.keys() & {"pattern", "format"}:
            yield part, True
        for name in part.get("properties", {}).keys() - plain.get("required", ()):
            yield {"type": "object", "properties": {name: part["properties"][name]}, "required": [name]}, False
        several = [part.get(name, ()) for name in ("anyOf", "oneOf", "prefixItems")]
        for option in [part.get("items"), part.get("additionalProperties"), *itertools.chain(*several)]:
            if isinstance(option, dict):
                yield option, False
