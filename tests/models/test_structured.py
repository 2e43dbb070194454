"""Answers that keep to a schema: 200 of 200 from random models, by the grammar and not by luck."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rare import rarely
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, PreTrainedTokenizerFast

from mmcli.core.errors import ConfigError, RowError
from mmcli.core.schema import parse_schema, validate
from mmcli.models.decoding import Decoding
from mmcli.models.structured import SAFE, AnswerProcessor, Answers, Grammar

VOCABULARY, END, PROMPT = 450, 2, 4
TEXTS = ['{"name": "a red circle", "age": 12, "tags": ["red", "blue"]}', "a photo of a dog", 'the "quick" fox'] * 20

TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "word": {"type": "string"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
            },
            "required": ["word", "children", "next"],
        }
    },
}
BOXES = {
    "type": "object",
    "properties": {
        "boxes": {"type": "array", "items": parse_schema("label, box list[float], score float"), "minItems": 1},
        "note": {"type": "string", "maxLength": 5},
    },
    "required": ["boxes", "note"],
}
PATTERNS = {
    "type": "object",
    "properties": {
        "day": {"type": "string", "format": "date"},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        "ab": {"type": "string", "pattern": "^a+b$"},
        "seven": {"type": "integer", "multipleOf": 7, "minimum": 100, "maximum": 10**6},
        "long": {"type": "string", "minLength": 3, "maxLength": 9},
    },
    "required": ["day", "ab", "long"],
}
SCHEMAS: dict[str, tuple[dict[str, Any], int]] = {
    "short": (parse_schema("name, age int, tags list"), 120),
    "tight": (parse_schema("name, age int, tags list"), 64),
    "choices": (parse_schema("mood happy|very sad, ok bool, ratio? float, sizes list[int]"), 150),
    "boxes": (BOXES, 130),
    "tree": (TREE, 150),
    "patterns": (PATTERNS, 130),
    "texts": ({"type": "array", "items": {"type": "string"}}, 60),
    "number": ({"type": "number"}, 40),
}


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's, Qwen's, SmolVLM's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=True,
    )  # fmt: skip


@cache
def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama's and Gemma's: pieces with spaces before them, and single bytes for what they lack."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<pad>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    special = ["<pad>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=special))
    # Bytes are tokens like others.
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = described["added_tokens"][:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {"bytes": byte_level, "pieces": sentencepiece}


@cache
def random_model() -> LlamaForCausalLM:
    """Decided enough that greedy texts differ between prompts; more logits than the tokenizers have tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= 8
    return model


def grammar(name: str, tokenizer: str = "bytes") -> Grammar:
    schema, limit = SCHEMAS[name]
    return of(schema, limit, tokenizer)


def of(schema: dict[str, Any], limit: int, tokenizer: str = "bytes") -> Grammar:
    made: PreTrainedTokenizerFast = TOKENIZERS[tokenizer]()
    assert len(made) < VOCABULARY - 10
    return Grammar(made, schema, ends=[END], max_new_tokens=limit, vocab_size=VOCABULARY)


def prompts(rows: int, seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 200, (rows, PROMPT), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def written(
    compiled: Grammar, rows: int = 100, seed: int = 0, *, temperature: float = 0.0
) -> tuple[list[str], Answers]:
    """What the random model answers, by mmcli's decoding loop."""
    answers = compiled.start(rows)
    decoding = Decoding(temperature, [seed * rows + row for row in range(rows)], constraint=answers)
    found = random_model().generate(
        **prompts(rows, seed), max_new_tokens=compiled.limit, custom_generate=decoding, do_sample=False
    )
    texts = []
    for tokens, length in zip(found.tokens.tolist(), found.lengths.tolist(), strict=True):
        assert tokens[length - 1] == END
        texts.append(compiled.decode(tokens[: length - 1]))
    return texts, answers


def valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        validate(text, schema)
    except RowError:
        return False
    return True


@pytest.mark.parametrize("count", [25, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "tokenizer"),
    rarely(
        [*((name, "bytes") for name in SCHEMAS), ("short", "pieces"), ("choices", "pieces")],
        {("short", "bytes"), ("patterns", "bytes"), ("tree", "bytes"), ("choices", "pieces")}.__contains__,
    ),
)
def test_all_of_all(name: str, tokenizer: str, count: int) -> None:
    """So many greedy and as many drawn answers, each ended by the model within its tokens."""
    compiled = grammar(name, tokenizer)
    schema, _ = SCHEMAS[name]
    texts = [text for t in (0.0, 1.0) for text in written(compiled, count, temperature=t)[0]]
    assert [text for text in texts if not valid(text, schema)] == []
    assert len(texts) == 2 * count
    # The model's own words, not one answer that the grammar forces.
    assert len(set(texts)) > 0.6 * count


def test_without_the_grammar_no_answer_parses() -> None:
    schema, _ = SCHEMAS["short"]
    ids = random_model().generate(**prompts(200, 0), max_new_tokens=64, do_sample=False)[:, PROMPT:]
    assert not any(valid(text, schema) for text in byte_level().batch_decode(ids, skip_special_tokens=True))


def test_as_a_logits_processor_of_generate() -> None:
    compiled = grammar("short")
    texts, _ = written(compiled, 40, seed=3)
    processor = AnswerProcessor(compiled.start(40))
    found = random_model().generate(
        **prompts(40, 3), max_new_tokens=compiled.limit, do_sample=False,
        logits_processor=LogitsProcessorList([processor]),
    )  # fmt: skip
    rows = [row[: row.index(END)] for row in found[:, PROMPT:].tolist()]
    assert [compiled.decode(row) for row in rows] == texts


def test_a_row_that_ends_by_itself_is_not_touched() -> None:
    """The answers that were not cut are those of twice the limit; those that were begin like them."""
    schema, _ = SCHEMAS["short"]
    texts, answers = written(of(schema, 130), temperature=1.0)
    longer, _ = written(of(schema, 260), temperature=1.0)
    assert 20 < answers.cut.sum() < 80
    for text, long, cut in zip(texts, longer, answers.cut, strict=True):
        assert cut or text == long
        assert text[:10] == long[:10]
    assert [text for text, long, cut in zip(texts, longer, answers.cut, strict=True) if cut and text != long]


def test_values_behind_a_text_that_is_cut_are_the_models() -> None:
    schema = parse_schema("text, age int, mood happy|sad, ok bool")
    texts, answers = written(of(schema, 160), temperature=2.0)
    values = [validate(text, schema) for text, cut in zip(texts, answers.cut, strict=True) if cut]
    assert len(values) > 20
    assert len({value["age"] for value in values}) > 10
    assert {value["mood"] for value in values} == {"happy", "sad"}
    assert {value["ok"] for value in values} == {True, False}


def allowed(answers: Answers, row: int) -> list[int]:
    return torch.nonzero(answers.mask([row])[0])[:, 0].tolist()


def takes(compiled: Grammar, text: str, answers: Answers | None = None, row: int = 0) -> bool:
    """Whether the row may be written `text`, in the tokenizer's own tokens."""
    answers = answers or compiled.start(1)
    for token in byte_level().encode(text, add_special_tokens=False):
        if token not in allowed(answers, row):
            return False
        answers.accept([row], [token])
    return True


def test_a_whole_answer_takes_the_end_alone() -> None:
    compiled = of(parse_schema("ok bool"), 200)
    answers = compiled.start(2)
    assert takes(compiled, '{"ok": true}', answers)
    assert allowed(answers, 0) == [END]
    answers.accept([0], [END])
    assert allowed(answers, 0) == [END]
    answers.accept([0], [0])
    assert not answers.cut.any()
    # The other row has not begun.
    assert END not in allowed(answers, 1)
    assert answers.mask([1, 0]).shape == (2, VOCABULARY)
    assert answers.mask([1, 0]).sum(dim=1)[1] == 1


def test_several_end_tokens() -> None:
    compiled = Grammar(byte_level(), {"type": "integer"}, ends=[END, 1], max_new_tokens=40)
    answers = compiled.start(1)
    assert not {1, END} & set(allowed(answers, 0))
    assert takes(compiled, "7", answers)
    assert {1, END} < set(allowed(answers, 0))
    answers.accept([0], [1])
    assert allowed(answers, 0) == [1, END]


def test_no_token_is_allowed_that_the_tokenizer_lacks() -> None:
    compiled = of(SCHEMAS["short"][0], 300)
    answers = compiled.start(1)
    assert takes(compiled, '{"name": "a', answers)
    tokens = allowed(answers, 0)
    assert len(tokens) > 100
    assert max(tokens) < len(byte_level())
    assert not {0, 1, END} & set(tokens)


def test_fewer_logits_than_tokens() -> None:
    compiled = Grammar(byte_level(), {"type": "string"}, ends=[END], max_new_tokens=40, vocab_size=280)
    assert compiled.start(1).mask([0]).shape == (1, 280)


def test_one_way_of_writing() -> None:
    compiled = of(SCHEMAS["short"][0], 300)
    for text in ('{"name":"', '{"name" ', '{ "name"', ' {"', '\n{"', '{"age'):
        assert not takes(compiled, text)
    assert takes(compiled, '{"name": "é", "age": -3, "tags": ["a", ""]}')


@pytest.mark.parametrize(
    ("schema", "taken", "refused"),
    [
        ({"type": "integer"}, [str(SAFE), str(-SAFE)], [str(SAFE + 1), "1.0", "1e3", "01"]),
        ({"type": "number"}, ["0.25", "-1.5", str(SAFE)], ["1e3", str(SAFE + 1)]),
        ({"type": "integer", "minimum": 10**16}, [str(10**16), "9" * 18], ["5,"]),
        ({"type": "integer", "minimum": 3, "maximum": 12}, ["3", "12"], ["13", "-"]),
        ({"enum": [1, 10**17]}, ["1", str(10**17)], ["2"]),
        ({"type": ["integer", "null"]}, ["null", "5"], [str(SAFE + 1)]),
    ],
)
def test_numbers(schema: dict[str, Any], taken: list[str], refused: list[str]) -> None:
    compiled = of(schema, 200)
    for text in taken:
        answers = compiled.start(1)
        assert takes(compiled, text, answers)
        assert END in allowed(answers, 0)
    for text in refused:
        assert not takes(compiled, text)


def test_an_object_has_no_fields_that_were_not_asked_for() -> None:
    opened = {"type": "object", "properties": {"a": {"type": "string"}}}
    compiled = of(opened, 200)
    assert takes(compiled, '{"a": ""}')
    assert not takes(compiled, '{"b": ""}')
    joined = {"allOf": [opened, {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]}]}
    compiled = of(joined, 200)
    assert takes(compiled, '{"a": "", "b": ""}')


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_text_is_what_the_grammar_read(tokenizer: str) -> None:
    """Tokenizers drop a space before a full stop, or the first space."""
    compiled = of({"enum": [" a .b é 😀"]}, 60, tokenizer)
    (text,), _ = written(compiled, 1)
    assert json.loads(text) == " a .b é 😀"


def test_too_few_tokens() -> None:
    schema = parse_schema("name, age int, tags list")
    with pytest.raises(ConfigError, match="--max-new-tokens 20 is too few for the schema: its shortest") as caught:
        of(schema, 20)
    assert caught.value.hint is not None
    enough = int(caught.value.hint.split()[-1])
    assert of(schema, enough).room == 24
    texts, _ = written(of(schema, enough), 50, temperature=1.0)
    assert all(valid(text, schema) for text in texts)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (
            {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]},
            "oneOf constraints are not supported",
        ),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "colour"}, "Unknown format: colour"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no answer of up to"),
        ({"type": "string", "minLength": 500}, "its shortest answer has"),
    ],
)
def test_schemas_that_no_answer_can_be_held_to(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match="schema") as caught:
        of(schema, 100)
    assert said in caught.value.message


def word_pieces() -> PreTrainedTokenizerFast:
    """As BERT's, which BLIP and GIT write with."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(special_tokens=["[UNK]", "[PAD]", "[SEP]"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", sep_token="[SEP]")


def unigram() -> PreTrainedTokenizerFast:
    """As T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("made", [word_pieces, unigram])
def test_tokenizers_without_pieces_of_text(made: Callable[[], PreTrainedTokenizerFast]) -> None:
    with pytest.raises(ConfigError, match="are not known as pieces of text") as caught:
        Grammar(made(), parse_schema("name"), ends=[END], max_new_tokens=100)
    assert "--choices" in (caught.value.hint or "")


def test_a_tokenizer_that_has_no_braces() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer.train_from_iterator(
        ["a photo of a dog"] * 9, trainers.BpeTrainer(special_tokens=["<s>", "</s>", "<e>"])
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")
    with pytest.raises(ConfigError, match="that this model's tokenizer can write"):
        Grammar(made, parse_schema("name"), ends=[END], max_new_tokens=100)


def test_a_token_that_was_forbidden_ends_its_row_alone() -> None:
    """A generation_config.json may forbid what the grammar wants."""
    compiled = of(SCHEMAS["short"][0], 300)
    answers = compiled.start(2)
    answers.accept([0], [compiled._ids[b"x"]])
    answers.mask([0, 1])
    assert takes(compiled, '{"name": "', answers, row=1)


NAMES = st.from_regex(r"[a-z]{1,6}", fullmatch=True)
LEAVES = st.sampled_from(
    [
        {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"},
        {"type": ["string", "null"]}, {"enum": ["red", "blue", "a .b", 'a "b"', None]}, {"const": "é\n"},
        {"type": "string", "minLength": 2, "maxLength": 6}, {"type": "integer", "minimum": 5, "maximum": 17},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, {"type": "string", "format": "time"},
    ]
)  # fmt: skip


def _larger(parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    objects = st.dictionaries(NAMES, parts, min_size=1, max_size=4).flatmap(
        lambda fields: st.sets(st.sampled_from(sorted(fields))).map(
            lambda required: {"type": "object", "properties": fields, "required": sorted(required)}
        )
    )
    arrays = st.builds(
        lambda part, most: {"type": "array", "items": part, "maxItems": most}, parts, st.integers(1, 9)
    )
    options = st.lists(parts, min_size=2, max_size=3).map(lambda found: {"anyOf": found})
    return objects | arrays | arrays.map(lambda a: {"type": "array", "items": a["items"]}) | options


def choice(mask: np.ndarray, compiled: Grammar, random: np.random.Generator, greed: bool) -> int:
    """Any token that is allowed; greedy: one that opens as much as can be."""
    tokens = np.flatnonzero(mask)
    if greed:
        openings = [
            sum(map(compiled.decode_bytes([t]).count, (b"[", b"{", b",", b"\\"))) for t in tokens if t != END
        ]
        if openings and max(openings):
            return int(tokens[tokens != END][int(np.argmax(openings))])
    return int(random.choice(tokens))


@settings(max_examples=25, deadline=None)
@given(st.recursive(LEAVES, _larger, max_leaves=8), st.integers(0, 2**32), st.booleans(), st.integers(0, 150))
def test_any_walk_through_any_grammar_ends_in_an_answer(
    schema: dict[str, Any], seed: int, greed: bool, more: int
) -> None:
    """At any limit that is taken: drawn evenly from what is allowed, or what puts off the end most."""
    limit = 10 + more
    try:
        compiled = of(schema, limit)
    except ConfigError as error:
        limit = int(error.hint.split()[-1]) if error.hint else 400
        compiled = of(schema, limit)
    random, answers = np.random.default_rng(seed), compiled.start(3)
    rows: Sequence[int] = [2, 0]
    texts: dict[int, list[int]] = {0: [], 2: []}
    for _ in range(limit):
        masks = answers.mask(rows).numpy()
        tokens = [choice(mask, compiled, random, greed) for mask in masks]
        answers.accept(rows, tokens)
        for row, token in zip(rows, tokens, strict=True):
            texts[row].append(token)
        rows = [row for row in rows if texts[row][-1] != END]
        if not rows:
            break
    assert not rows
    for found in texts.values():
        validate(compiled.decode(found[:-1]), schema)
