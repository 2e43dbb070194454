"""The decoding loop writes what `model.generate` writes for each row alone; its steps cost the rows that live."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import tiny_captioners
import torch
import transformers as hf
from packaging.version import Version
from rare import rarely
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from mmcli.models.decoding import Decoding, Written, choose, score_choices, scored, unpacked

ROWS, LIMIT = 16, 16
SIDE = 32
# A text ends where the sum of a token and its number can be divided by it: texts of 1 to LIMIT tokens, loops too.
END = 11
# With its cache GIT writes other texts on 5.17 than without; from 5.23 on the same.
GIT_CACHE = Version(hf.__version__) >= Version("5.23")

Inputs = dict[str, torch.Tensor]


class Ends(StoppingCriteria):
    """For one call of `generate`."""

    def __init__(self) -> None:
        self._given: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self._given is None:
            self._given = input_ids.shape[1] - 1
        return (input_ids[:, -1] + input_ids.shape[1] - self._given) % END == 0


@dataclass
class Case:
    """A model and the inputs of ROWS rows, each as it is alone.

    fill     with what tokens are padded
    teacher  (a row's inputs, tokens [1, T]) -> logits of a forward pass that come before each of them: [1, T, V]
    kwargs   of every `generate`
    left     whether they are padded on the left; else on the right: encoders with learned positions
    """

    model: Any
    rows: list[Inputs]
    fill: dict[str, int]
    teacher: Callable[[Inputs, torch.Tensor], torch.Tensor]
    kwargs: dict[str, Any] = field(default_factory=dict)
    left: bool = True

    def batch(self, rows: Sequence[int]) -> Inputs:
        found = {}
        for name in self.rows[0]:
            tensors = [self.rows[row][name] for row in rows]
            if name in self.fill:
                longest = max(t.shape[1] for t in tensors)
                pads = [longest - t.shape[1] for t in tensors]
                tensors = [
                    torch.nn.functional.pad(t, (p, 0) if self.left else (0, p), value=self.fill[name])
                    for t, p in zip(tensors, pads, strict=True)
                ]
            found[name] = torch.cat(tensors)
        return found

    def generate(self, rows: Sequence[int], **more: Any) -> Any:
        options = {
            "max_new_tokens": LIMIT, "do_sample": False, "num_beams": 1,
            "stopping_criteria": StoppingCriteriaList([Ends()]), **self.kwargs,
        }  # fmt: skip
        with torch.inference_mode():
            return self.model.generate(**self.batch(rows), **{**options, **more})


# ------------------------------------------------------------------------------------------ models

_TEXT = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_MASKED = {"input_ids": 0, "attention_mask": 0}


def _prompt(row: int, before: Sequence[int] = (), vocabulary: int = 60) -> Inputs:
    """Of 2 to 6 tokens, after `before`."""
    generator = torch.Generator().manual_seed(row)
    ids = torch.randint(10, vocabulary, (1, 2 + row % 5), generator=generator)
    ids = torch.cat([torch.tensor([list(before)], dtype=torch.long), ids], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pixels(row: int) -> Inputs:
    return {"pixel_values": torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(100 + row))}


def _writes_on(model: Any) -> Callable[[Inputs, torch.Tensor], torch.Tensor]:
    """A decoder: its logits before each of the tokens that follow the prompt."""

    def teacher(inputs: Inputs, tokens: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([inputs["input_ids"], tokens[:, :-1]], dim=1)
        more = {n: v for n, v in inputs.items() if n not in _MASKED}
        if "mm_token_type_ids" in more:
            more["mm_token_type_ids"] = torch.nn.functional.pad(more["mm_token_type_ids"], (0, tokens.shape[1] - 1))
        return model(input_ids=ids, **more).logits[:, -tokens.shape[1] :]

    return teacher


def _answers(model: Any, start: int) -> Callable[[Inputs, torch.Tensor], torch.Tensor]:
    """An encoder-decoder."""

    def teacher(inputs: Inputs, tokens: torch.Tensor) -> torch.Tensor:
        decoder = torch.cat([torch.tensor([[start]]), tokens[:, :-1]], dim=1)
        return model(**inputs, decoder_input_ids=decoder).logits

    return teacher


def _decoder(config: Any) -> Case:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    _louder(model)
    return Case(model, [_prompt(row) for row in range(ROWS)], _MASKED, _writes_on(model))


def _encoder_decoder(config: Any) -> Case:
    torch.manual_seed(0)
    model = hf.AutoModelForSeq2SeqLM.from_config(config).eval()
    _louder(model, 10 if config.model_type == "bart" else 4)
    teacher = _answers(model, config.decoder_start_token_id)
    left = config.model_type != "bart"
    return Case(model, [_prompt(row) for row in range(ROWS)], _MASKED, teacher, left=left)


def _louder(model: Any, scale: float = 6) -> None:
    """Random weights of the usual size say the same for every prompt."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
                weight *= scale


def llama() -> Case:
    return _decoder(hf.LlamaConfig(**_TEXT))


def gpt2() -> Case:
    return _decoder(
        hf.GPT2Config(
            vocab_size=200,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def sliding() -> Case:
    """Its cache forgets all but four tokens."""
    return _decoder(hf.MistralConfig(**_TEXT, sliding_window=4, num_key_value_heads=2))


def t5() -> Case:
    return _encoder_decoder(
        hf.T5Config(
            vocab_size=200, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0
        )
    )


def bart() -> Case:
    return _encoder_decoder(
        hf.BartConfig(
            vocab_size=200, d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
            encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=128,
            decoder_start_token_id=2, pad_token_id=0, eos_token_id=2, forced_eos_token_id=None,
        )
    )  # fmt: skip


def qwen2_5_vl() -> Case:
    """A picture before each prompt: positions have three axes, and are behind the tokens' numbers."""
    torch.manual_seed(0)
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "fullatt_block_indexes": [0],
        "window_size": 16,
    }
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = hf.Qwen2_5_VLConfig(
        text_config={**_TEXT, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=190,
        video_token_id=191,
        vision_start_token_id=192,
        vision_end_token_id=193,
    )
    model = hf.Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = 0
    _louder(model.model.language_model)
    rows = []
    for row in range(ROWS):
        height, width = 4, 4 + 2 * (row % 3)
        inputs = _prompt(row, [192, *[190] * (height * width // 4), 193])
        generator = torch.Generator().manual_seed(row)
        inputs["pixel_values"] = torch.randn(height * width, 3 * 2 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, height, width]])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == 190).long()
        rows.append(inputs)
    return Case(model, rows, {**_MASKED, "mm_token_type_ids": 0}, _writes_on(model))


def _captioner(name: str, prompted: bool) -> Case:
    model_class, before, after, start = {
        "blip": (hf.BlipForConditionalGeneration, [], [3], None),
        "git": (hf.GitForCausalLM, [2], [], None),
        "vit_gpt2": (hf.VisionEncoderDecoderModel, [], [], 0),
        "blip_2": (hf.Blip2ForConditionalGeneration, "image", [], None),
        "blip_2_t5": (hf.Blip2ForConditionalGeneration, "image", [], 1),
        "florence2": (hf.Florence2ForConditionalGeneration, "image", [2], 2),
    }[name]
    model = model_class.from_pretrained(_folder(name)).eval()
    if name == "blip":
        # Its generate puts it first itself: before the padding.
        before = [model.config.text_config.bos_token_id]
    if before == "image":
        before = [model.config.image_token_id] * (17 if name == "florence2" else 4)
    rows = []
    for row in range(ROWS):
        inputs = _pixels(row)
        if prompted:
            inputs = _prompt(row, before) | inputs
            end = torch.tensor([after], dtype=torch.long)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], end], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        rows.append(inputs)
    teacher = _writes_on(model) if start is None else _answers(model, start)
    if name == "blip":

        def teacher(inputs: Inputs, tokens: torch.Tensor) -> torch.Tensor:
            # As its generate: the start token, and not the prompt's end token.
            prompt = inputs.get("input_ids", torch.tensor([[0, 0]]))[:, :-1].clone()
            prompt[:, 0] = model.config.text_config.bos_token_id
            ids = torch.cat([prompt, tokens[:, :-1]], dim=1)
            seen = model.vision_model(pixel_values=inputs["pixel_values"])[0]
            return model.text_decoder(input_ids=ids, encoder_hidden_states=seen).logits[:, -tokens.shape[1] :]

    kwargs = {} if name != "git" or GIT_CACHE else {"use_cache": False}
    return Case(model, rows, _MASKED if prompted else {}, teacher, kwargs, left=name != "florence2")


_FOLDERS: dict[str, Path] = {}


def _folder(name: str) -> Path:
    return _FOLDERS[name]


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @cache
    def build(name: str) -> Case:
        kind, _, prompted = name.partition("+")
        if kind in TEXT_MODELS:
            return TEXT_MODELS[kind]()
        if kind not in _FOLDERS:
            _FOLDERS[kind] = tiny_captioners.BUILDERS[kind](tmp_path_factory.mktemp("tiny") / kind)
        return _captioner(kind, prompted == "prompt")

    return build


TEXT_MODELS = {function.__name__: function for function in (llama, gpt2, sliding, t5, bart, qwen2_5_vl)}
CAPTIONERS = ["blip", "git", "vit_gpt2", "blip_2_t5"]
PROMPTED = ["blip+prompt", "git+prompt", "blip_2+prompt", "blip_2_t5+prompt", "florence2+prompt"]
NAMES = [*TEXT_MODELS, *CAPTIONERS, *PROMPTED]
# A kind of each; all of them write as their references do in the tests of their families, through the same loop.
OFTEN = {"llama", "sliding", "t5", "qwen2_5_vl", "blip", "git", "florence2+prompt"}


@dataclass
class Alone:
    """What a row writes alone: tokens, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


@pytest.fixture(scope="session")
def alone(case: Callable[[str], Case]) -> Callable[[str], list[Alone]]:
    """By transformers' own loop, row by row."""

    @cache
    def compute(name: str) -> list[Alone]:
        found = []
        for row in range(ROWS):
            output = case(name).generate([row], return_dict_in_generate=True, output_scores=True)
            count = len(output.scores)
            tokens = output.sequences[0, -count:]
            logprobs = torch.cat(output.scores).log_softmax(dim=-1)[range(count), tokens]
            found.append(Alone(tokens.tolist(), logprobs.tolist()))
        return found

    return compute


def batches(size: int) -> list[range]:
    return [range(start, min(start + size, ROWS)) for start in range(0, ROWS, size)]


def texts(written: Written) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(written.tokens, written.lengths, strict=True)]


class Steps:
    """Rows that go through the model's output layer, at each step."""

    def __init__(self, model: Any) -> None:
        inner = getattr(model, "text_decoder", getattr(model, "language_model", model))
        self.rows: list[int] = []
        self._hook = inner.get_output_embeddings().register_forward_hook(
            lambda _m, args, _o: self.rows.append(len(args[0]))
        )

    def __enter__(self) -> list[int]:
        return self.rows

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


# ------------------------------------------------------------------------------------------ greedy


@pytest.mark.parametrize("size", rarely([1, 5, 16], lambda n: n == 5))
@pytest.mark.parametrize("name", rarely(NAMES, OFTEN.__contains__))
def test_greedy(case: Callable[[str], Case], alone: Callable[[str], list[Alone]], name: str, size: int) -> None:
    wanted = alone(name)
    assert len({tuple(one.tokens) for one in wanted}) > 3, "the texts do not tell the rows apart"
    for rows in batches(size):
        written = case(name).generate(rows, custom_generate=Decoding())
        assert texts(written) == [wanted[row].tokens for row in rows]
        for row, found in zip(rows, written.logprobs, strict=True):
            one = wanted[row].logprobs
            assert found[: len(one)].tolist() == pytest.approx(one, abs=2e-4)
            assert not found[len(one) :].any()


@pytest.mark.parametrize("name", rarely(NAMES, OFTEN.__contains__))
def test_steps_cost_the_rows_that_live(
    case: Callable[[str], Case], alone: Callable[[str], list[Alone]], name: str
) -> None:
    if name.startswith("git") and not GIT_CACHE:
        pytest.skip("without a cache no row leaves")
    lengths = sorted(len(one.tokens) for one in alone(name))
    with Steps(case(name).model) as rows:
        case(name).generate(range(ROWS), custom_generate=Decoding())
    assert len(rows) == lengths[-1]
    # At every step at most a quarter of the rows is over.
    living = [sum(length > step for length in lengths) for step in range(lengths[-1])]
    assert all(live <= row <= live / 0.75 for live, row in zip(living, rows, strict=True))
    assert rows[-1] < ROWS, "no row has left: the texts are all of one length"


def test_ends_of_the_checkpoint(case: Callable[[str], Case]) -> None:
    """By an end token and the limit instead of a criterion."""
    options: dict[str, Any] = {"stopping_criteria": None, "eos_token_id": list(range(0, 200, 9)), "pad_token_id": 0}
    written = case("llama").generate(range(ROWS), custom_generate=Decoding(), **options)
    alone = [case("llama").generate([row], **options) for row in range(ROWS)]
    given = [case("llama").rows[row]["input_ids"].shape[1] for row in range(ROWS)]
    assert texts(written) == [a[0, g:].tolist() for a, g in zip(alone, given, strict=True)]
    assert len({len(text) for text in texts(written)}) > 3
    assert all(text[-1] % 9 == 0 for text in texts(written) if len(text) < LIMIT)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5, "suppress_tokens": [0]},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 3, "eos_token_id": 5},
        {"bad_words_ids": [[11], [12, 13]], "begin_suppress_tokens": [20, 21], "forced_eos_token_id": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", *rarely(["t5"])])
def test_settings_of_the_checkpoint(case: Callable[[str], Case], name: str, options: dict[str, Any]) -> None:
    """What generation_config.json forbids, it forbids for the rows that stay, too."""
    one = case(name)
    alone = [
        one.generate([row], **options, return_dict_in_generate=True, output_scores=True) for row in range(ROWS)
    ]
    with Steps(one.model) as rows:
        written = one.generate(range(ROWS), **options, custom_generate=Decoding())
    assert texts(written) == [a.sequences[0, -len(a.scores) :].tolist() for a in alone]
    assert rows[-1] < ROWS


# ------------------------------------------------------------------------------------------ what may not leave


class Nudge(LogitsProcessor):
    """Knows its rows by their place: nothing may leave a batch that it works on."""

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows = torch.tensor(rows)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[torch.arange(len(scores)), 10 + self._rows] += 3.0
        return scores


@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"use_cache": False}, {"logits_processor": Nudge}], ids=str
)
@pytest.mark.parametrize("name", ["llama", "t5", *rarely(["vit_gpt2", "git", "qwen2_5_vl"])])
def test_models_whose_rows_cannot_leave(case: Callable[[str], Case], name: str, options: dict[str, Any]) -> None:
    if name in ("git", "vit_gpt2", "qwen2_5_vl") and "cache_implementation" in options:
        pytest.skip("has no static cache")

    def given(rows: Sequence[int]) -> dict[str, Any]:
        return (
            {**options, "logits_processor": LogitsProcessorList([Nudge(rows)])}
            if "logits_processor" in options
            else options
        )

    rows = range(5)
    alone = [
        case(name).generate([row], **given([row]), return_dict_in_generate=True, output_scores=True) for row in rows
    ]
    written = case(name).generate(rows, **given(rows), custom_generate=Decoding())
    assert texts(written) == [one.sequences[0, -len(one.scores) :].tolist() for one in alone]


# ------------------------------------------------------------------------------------------ drawn


@pytest.mark.parametrize("name", ["llama", "t5", "blip", *rarely(["qwen2_5_vl", "git", "florence2+prompt"])])
def test_draws_do_not_depend_on_neighbours(case: Callable[[str], Case], name: str) -> None:
    found = {}
    for size in (1, 5, 16):
        found[size] = []
        for rows in batches(size):
            decoding = Decoding(temperature=0.8, seeds=[1000 + row for row in rows])
            found[size] += texts(case(name).generate(rows, custom_generate=decoding))
    assert found[1] == found[5] == found[16]
    assert len({len(text) for text in found[1]}) > 3
    others = case(name).generate(range(ROWS), custom_generate=Decoding(temperature=0.8, seeds=range(ROWS)))
    assert texts(others) != found[1]


def test_nearly_cold_draws_are_the_likeliest(
    case: Callable[[str], Case], alone: Callable[[str], list[Alone]]
) -> None:
    decoding = Decoding(temperature=1e-5, seeds=range(ROWS))
    written = case("llama").generate(range(ROWS), custom_generate=decoding)
    assert texts(written) == [one.tokens for one in alone("llama")]


def test_draws_are_distributed_as_they_should() -> None:
    logits = torch.tensor([1.0, 0.0, -math.inf, -1.0, 2.0, -math.inf])
    count = 20_000
    points = torch.rand(count, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points[:2, 0] = torch.tensor([0.0, 1 - 2**-53])
    chosen, logprobs = choose(logits.repeat(count, 1), 0.7, points)
    shares = torch.bincount(chosen, minlength=6) / count
    torch.testing.assert_close(shares, (logits / 0.7).softmax(-1), atol=0.01, rtol=0)
    # What is forbidden is never drawn.
    assert not shares[2]
    assert not shares[5]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[chosen])


def test_broken_scores_give_no_number() -> None:
    for points in (None, torch.tensor([[0.5]])):
        tokens, logprobs = choose(torch.full((1, 4), math.nan), 1.0, points)
        assert 0 <= int(tokens) < 4
        assert logprobs.isnan().all()


# ------------------------------------------------------------------------------------------ constrained


class Grammar:
    """Row r writes r % 6 tokens, each of them r + 10 more than a multiple of 20; then it is complete."""

    def __init__(self, packed: bool, vocabulary: int) -> None:
        self._packed, self._vocabulary = packed, vocabulary
        self.written: dict[int, list[int]] = {row: [] for row in range(ROWS)}

    def mask(self, rows: Sequence[int]) -> torch.Tensor:
        allowed = torch.zeros(len(rows), self._vocabulary, dtype=torch.bool)
        for place, row in enumerate(rows):
            if len(self.written[row]) < row % 6:
                allowed[place, (row + 10) % 20 :: 20] = True
        if not self._packed:
            return allowed
        padded = torch.nn.functional.pad(allowed, (0, -self._vocabulary % 32)).view(len(rows), -1, 32)
        return (padded.long() << torch.arange(32)).sum(dim=-1).to(torch.int32)

    def accept(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        for row, token in zip(rows, tokens, strict=True):
            self.written[row].append(token)


class Follow(LogitsProcessor):
    """The same, as a logits processor of transformers, for one row alone."""

    def __init__(self, row: int, vocabulary: int) -> None:
        self._row, self._vocabulary = row, vocabulary

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        allowed[:, (self._row + 10) % 20 : self._vocabulary : 20] = True
        return scores.masked_fill(~allowed, -math.inf)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["llama", "t5", "blip"])
def test_constraint(case: Callable[[str], Case], name: str, packed: bool) -> None:
    vocabulary = 90 if name == "blip" else 170
    constraint = Grammar(packed, vocabulary)
    options = {"stopping_criteria": None, "eos_token_id": 99999} if name != "blip" else {"stopping_criteria": None}
    written = case(name).generate(range(ROWS), custom_generate=Decoding(constraint=constraint), **options)
    assert texts(written) == list(constraint.written.values())
    assert written.lengths.tolist() == [row % 6 for row in range(ROWS)]
    for row in range(ROWS):
        if not row % 6:
            continue
        options["logits_processor"] = LogitsProcessorList([Follow(row, vocabulary)])
        options["max_new_tokens"] = row % 6
        alone = case(name).generate([row], **options, return_dict_in_generate=True, output_scores=True)
        tokens = alone.sequences[0, -(row % 6) :]
        assert texts(written)[row] == tokens.tolist()
        wanted = torch.cat(alone.scores).log_softmax(dim=-1)[range(row % 6), tokens]
        torch.testing.assert_close(written.logprobs[row, : row % 6], wanted, atol=2e-4, rtol=0)


def test_constraint_and_end(case: Callable[[str], Case]) -> None:
    """An end token ends a row whatever its grammar still allows; it is told of it, and not asked again."""
    constraint = Grammar(False, 200)
    ends = [token for token in range(200) if token // 20 % 2]
    written = case("llama").generate(
        range(ROWS),
        custom_generate=Decoding(constraint=constraint),
        stopping_criteria=None,
        eos_token_id=ends,
        pad_token_id=0,
    )
    assert texts(written) == list(constraint.written.values())
    cut = [row for row, text in enumerate(texts(written)) if len(text) < row % 6]
    assert cut
    assert all(texts(written)[row][-1] in ends for row in cut)
    assert not any(token in ends for text in texts(written) for token in text[:-1])


def test_all_complete_at_once(case: Callable[[str], Case]) -> None:
    written = case("llama").generate([0], custom_generate=Decoding(constraint=Grammar(False, 200)))
    assert written.tokens.shape == written.logprobs.shape == (1, 0)
    assert written.lengths.tolist() == [0]


def test_bits_of_a_mask() -> None:
    mask = torch.tensor([[1 | 1 << 5, -(2**31)], [0, -1]], dtype=torch.int32)
    found = unpacked(mask, 70)
    assert [row.nonzero()[:, 0].tolist() for row in found] == [[0, 5, 63], list(range(32, 64))]
    assert unpacked(mask, 40).shape == (2, 40)


# ------------------------------------------------------------------------------------------ answers that are given

CHOICES = [[5, 6, 7, 2], [5, 6, 2], [8], [8, 2], [5, 6, 7, 8, 9, 2], [40, 41, 2]]


@pytest.fixture(scope="session")
def taught(case: Callable[[str], Case]) -> Callable[[str], list[list[float]]]:
    """Log-likelihoods of CHOICES, row by row, by a forward pass over prompt and choice."""

    @cache
    @torch.inference_mode()
    def compute(name: str) -> list[list[float]]:
        one = case(name)
        found = []
        for row in range(ROWS):
            logits = [one.teacher(dict(one.rows[row]), torch.tensor([choice]))[0] for choice in CHOICES]
            chosen = [
                given.double().log_softmax(-1)[range(len(choice)), choice].sum()
                for given, choice in zip(logits, CHOICES, strict=True)
            ]
            found.append([float(one) for one in chosen])
        return found

    return compute


@pytest.mark.parametrize("size", rarely([1, 5, 16], lambda n: n == 5))
@pytest.mark.parametrize(
    "name",
    rarely([*TEXT_MODELS, "blip", "vit_gpt2", *PROMPTED], {"llama", "t5", "blip", "blip_2+prompt"}.__contains__),
)
def test_choices(
    case: Callable[[str], Case], taught: Callable[[str], list[list[float]]], name: str, size: int
) -> None:
    for rows in batches(size):
        found = score_choices(partial(case(name).generate, rows, stopping_criteria=None), CHOICES)
        for row, scores in zip(rows, found, strict=True):
            assert scores.tolist() == pytest.approx(taught(name)[row], abs=1e-4, rel=1e-5)


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_choices_of_models_whose_rows_cannot_be_copied(
    case: Callable[[str], Case], name: str, options: dict[str, Any]
) -> None:
    generate = partial(case(name).generate, range(5), stopping_criteria=None)
    torch.testing.assert_close(
        score_choices(partial(generate, **options), CHOICES), score_choices(generate, CHOICES), atol=1e-4, rtol=1e-5
    )


def test_many_choices_in_pieces(case: Callable[[str], Case]) -> None:
    generate = partial(case("llama").generate, range(9), stopping_criteria=None)
    many = [[token, token + 1, 2] for token in range(3, 90)]
    found = score_choices(generate, many)
    assert found.shape == (9, len(many))
    torch.testing.assert_close(found[:, 40:42], score_choices(generate, many[40:42]), atol=1e-4, rtol=0)


def test_the_prompt_is_read_once(case: Callable[[str], Case]) -> None:
    one = case("llama")
    with Steps(one.model) as rows:
        score_choices(partial(one.generate, range(4), stopping_criteria=None), CHOICES)
    # The prompts, and then the five choices of more than a token, of each.
    assert rows == [4, 20]


def test_scores_are_shares_of_what_is_given() -> None:
    logprobs = torch.tensor([[0.1, 0.6, 0.2], [1e-9, 1e-12, 3e-9]]).log()
    first, second = scored(logprobs, ["yes", "no", "unclear"])
    assert first.answer == "no"
    assert first.score == pytest.approx(0.6 / 0.9)
    assert [name for name, _ in first.top_k] == ["no", "unclear", "yes"]
    assert sum(share for _, share in second.top_k) == pytest.approx(1)
    assert second.answer == "unclear"
    (broken,) = scored(torch.tensor([[0.0, math.nan]]), ["yes", "no"])
    assert math.isnan(broken.score)
