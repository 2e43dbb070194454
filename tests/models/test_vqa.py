"""Answers are, for every row and batch size, what the checkpoint's own code answers for that row alone."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_captioners
import tiny_vqa
import torch
import transformers as hf
from model_runs import DEVICE, outputs_of
from PIL import Image
from rare import rarely
from safetensors.torch import load_file, save_file
from tiny_dual import edit_json
from tiny_vqa import ANSWERS, FEATURES

from mmcli.cli.boundary import run
from mmcli.core.errors import ConfigError, RowError
from mmcli.core.records import Generated, Sample, Scored
from mmcli.models.options import Generation, ModelOptions
from mmcli.models.plan import GenerationPlan
from mmcli.models.resolve import resolve_writer

LIMIT = 12
# Heights and widths: tiny, tall, wide, larger, exactly right, a pixel off.
SHAPES = [(6, 10), (200, 60), (60, 210), (120, 160), (64, 64), (63, 65), (97, 130)]
QUESTIONS = ["what color?", "is it a cat?", "how many?", "what is on the left of it?"]
# A row of every picture, with a question of another length than its neighbours'.
ROWS = [(row % len(SHAPES), row % len(QUESTIONS)) for row in range(18)]
CLASSES = {
    "vilt": "ViltForQuestionAnswering", "visual_bert": "VisualBertForQuestionAnswering",
    "lxmert": "LxmertForQuestionAnswering", "blip_vqa": "BlipForQuestionAnswering",
    "instructblip": "InstructBlipForConditionalGeneration",
    "instructblip_t5": "InstructBlipForConditionalGeneration", "blip_2": "Blip2ForConditionalGeneration",
    "blip_2_t5": "Blip2ForConditionalGeneration", "git": "GitForCausalLM",
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint, made when it is first asked for."""
    builders = {**tiny_vqa.CHOOSING, **tiny_vqa.WRITING, "blip": tiny_captioners.blip}

    @cache
    def build(name: str) -> Path:
        return builders[name](tmp_path_factory.mktemp("tiny") / name)

    return build


@cache
def pictures() -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(1)
    return tuple(generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES)


@cache
def regions() -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Features and boxes of as many pictures, with 1 to 7 regions."""
    generator = np.random.default_rng(2)
    counts = range(1, len(SHAPES) + 1)
    return tuple(
        (generator.standard_normal((n, FEATURES)).astype(np.float32), generator.random((n, 4), np.float32))
        for n in counts
    )


def asked(name: str, **changes: Any) -> Generation:
    """The question is in a column; what a model of regions sees is, too."""
    columns = {"visual_bert": ("feats",), "lxmert": ("feats", "boxes")}.get(name, ())
    given = dict(zip(("features", "boxes"), columns, strict=False))
    known: dict[str, Any] = {"questions": ("{question}",), "variables": ("question", *columns), **given}
    return Generation(max_new_tokens=LIMIT, task="ask", **{**known, **changes})


def plan_of(folder: Path | str, generation: Generation, **options: Any) -> GenerationPlan:
    plan = resolve_writer(ModelOptions(str(folder), device=DEVICE, **options), generation)
    assert isinstance(plan, GenerationPlan)
    return plan


def samples_of(plan: GenerationPlan, rows: Sequence[tuple[int, int]]) -> list[Sample]:
    processor = plan.open_processor()
    made = []
    for picture, question in rows:
        text = QUESTIONS[question]
        seen = regions()[picture][: len(plan.generation.variables) - 1]
        media: list[Any] = [("text", text)] if seen else [("image", pictures()[picture])]
        (sample,) = processor.record(media, (text, *seen))
        made.append(sample)
    return made


def answers(plan: GenerationPlan, rows: Sequence[tuple[int, int]], batch_size: int) -> list[Any]:
    """As the engine does: batches of equal groups, the longest first."""
    samples, runner = samples_of(plan, rows), plan.load()
    groups: dict[Hashable, list[int]] = {}
    for row, sample in enumerate(samples):
        groups.setdefault((sample.modality, sample.group), []).append(row)
    found: dict[int, Any] = {}
    for members in groups.values():
        members.sort(key=lambda row: -samples[row].length)
        for start in range(0, len(members), batch_size):
            batch = members[start : start + batch_size]
            outputs = outputs_of(runner, [samples[row] for row in batch])
            found.update(zip(batch, outputs, strict=True))  # type: ignore[arg-type]
    return [found[row] for row in range(len(rows))]


# ------------------------------------------------------------------------------------------ the reference


class Reference:
    """A checkpoint as its model card calls it: one row at a time, float32, eager."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.model = getattr(hf, CLASSES[name]).from_pretrained(folder, attn_implementation="eager").eval()
        self.tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        if name not in ("visual_bert", "lxmert"):
            self.processor = hf.AutoProcessor.from_pretrained(folder)

    @torch.inference_mode()
    def logits(self, picture: int, question: int) -> torch.Tensor:
        """float32 [answers]"""
        if self.name == "vilt":
            image = Image.fromarray(pictures()[picture])
            return self.model(**self.processor(image, QUESTIONS[question], return_tensors="pt")).logits[0]
        text = self.tokenizer(QUESTIONS[question], return_tensors="pt", return_token_type_ids=True)
        features, boxes = (torch.from_numpy(a)[None] for a in regions()[picture])
        if self.name == "lxmert":
            return self.model(**text, visual_feats=features, visual_pos=boxes).question_answering_score[0]
        # As in the documentation of transformers.
        ones = torch.ones(features.shape[:-1])
        seen = {"visual_embeds": features, "visual_attention_mask": ones, "visual_token_type_ids": ones.long()}
        return self.model(**text, **seen).logits[0]

    def inputs(self, picture: int, text: str) -> dict[str, Any]:
        image = Image.fromarray(pictures()[picture])
        if self.name != "git":
            return dict(self.processor(images=image, text=text, return_tensors="pt"))
        ids = [self.tokenizer.cls_token_id, *self.tokenizer(text, add_special_tokens=False).input_ids]
        # Its cache is wrong before transformers 5.23.
        found = {**self.processor(images=image, return_tensors="pt"), "use_cache": False}
        return {**found, "input_ids": torch.tensor([ids])}

    @property
    def end(self) -> int:
        return 3 if self.name in ("git", "blip_vqa") else self.model.config.text_config.eos_token_id

    @torch.inference_mode()
    def written(self, picture: int, text: str) -> Generated:
        inputs = self.inputs(picture, text)
        given = inputs["input_ids"].shape[1] if self.name in ("git", "blip_2", "instructblip") else 1
        output = self.model.generate(
            **inputs, max_new_tokens=LIMIT, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        tokens = output.sequences[0, given:].tolist()
        steps = zip(output.logits, tokens, strict=True)
        scores = [float(logits[0].double().log_softmax(-1)[token]) for logits, token in steps]
        reason = "stop" if tokens[-1] == self.end else "length"
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return Generated(text, reason, len(tokens), float(np.mean(scores)), False)  # type: ignore[arg-type]

    @torch.inference_mode()
    def likelihood(self, picture: int, text: str, answer: str) -> float:
        """Of writing the answer, with or without a space before it, and ending there: steps are forced on it."""
        total = 0.0
        spellings = {tuple(self.tokenizer(t, add_special_tokens=False).input_ids) for t in (answer, f" {answer}")}
        for spelling in spellings:
            tokens = iter([*spelling, self.end])
            output = self.model.generate(
                **self.inputs(picture, text), max_new_tokens=len(spelling) + 1, do_sample=False,
                return_dict_in_generate=True, output_logits=True,
                prefix_allowed_tokens_fn=lambda _, ids, tokens=tokens: [next(tokens)],
            )  # fmt: skip
            steps = zip(output.logits, [*spelling, self.end], strict=True)
            total += math.exp(sum(float(logits[0].double().log_softmax(-1)[token]) for logits, token in steps))
        return total


def ranked(logits: torch.Tensor, scores: str, allowed: Sequence[int] | None = None) -> list[tuple[str, float]]:
    """The best five by their index, so that answers of one name stay apart."""
    indices = list(allowed or range(len(logits)))
    chosen = logits[indices].double()
    found = chosen.sigmoid() if scores == "sigmoid" else chosen.softmax(-1)
    order = sorted(range(len(indices)), key=lambda i: -float(found[i]))[:5]
    return [(ANSWERS[indices[i]], float(found[i])) for i in order]


def assert_scored(found: Scored, wanted: Sequence[tuple[str, float]], limit: float = 1e-5) -> None:
    assert [name for name, _ in found.top_k] == [name for name, _ in wanted]
    assert (found.answer, found.score) == found.top_k[0]
    np.testing.assert_allclose([s for _, s in found.top_k], [s for _, s in wanted], atol=limit, rtol=0)


# ------------------------------------------------------------------------------------------ models that choose


@pytest.mark.parametrize("name", tiny_vqa.CHOOSING)
def test_scores(tiny: Callable[[str], Path], name: str) -> None:
    scores = "softmax" if name == "visual_bert" else "sigmoid"
    reference = Reference(tiny(name), name)
    wanted = [ranked(reference.logits(*row), scores) for row in ROWS]
    assert len({tuple(name for name, _ in row) for row in wanted}) > 3, "the same answers everywhere"
    assert len({round(score, 6) for (_, score), *_ in wanted}) == len(wanted), "scores do not tell the rows apart"
    for batch_size in (1, 5, 16):
        for found, row in zip(answers(plan_of(tiny(name), asked(name)), ROWS, batch_size), wanted, strict=True):
            assert_scored(found, row)


def test_vilt_is_the_same_each_time_with_all_patches(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    plan = plan_of(tiny("vilt"), asked("vilt"))
    first = answers(plan, ROWS, 5)
    assert answers(plan, ROWS, 5) == first
    folder = shutil.copytree(tiny("vilt"), tmp_path / "few")
    edit_json(folder / "config.json", max_image_length=3)
    assert answers(plan_of(folder, asked("vilt")), ROWS, 5) == first


def test_choices_are_compared_among_themselves(tiny: Callable[[str], Path]) -> None:
    generation = asked("vilt", choices=("red", "yes", "blue"))
    reference = Reference(tiny("vilt"), "vilt")
    for found, row in zip(answers(plan_of(tiny("vilt"), generation), ROWS, 16), ROWS, strict=True):
        assert_scored(found, ranked(reference.logits(*row), "softmax", allowed=[0, 2, 3, 6]))
    with pytest.raises(ConfigError) as caught:
        plan_of(tiny("vilt"), asked("vilt", choices=("Yes", "unclear")))
    assert "'Yes' is none of the model's 7 answers; did you mean yes?" in caught.value.problems[0]
    assert "'unclear' is none of the model's 7 answers" in caught.value.problems[1]


def test_several_questions_give_an_output_each(tiny: Callable[[str], Path]) -> None:
    plan = plan_of(
        tiny("vilt"), Generation(questions=("how many?", "is it a {what}?"), variables=("what",), task="ask")
    )
    samples = plan.open_processor().record([("image", pictures()[0])], ("cat",))
    runner = plan.load()
    reference = Reference(tiny("vilt"), "vilt")
    outputs = outputs_of(runner, samples)
    for found, question in zip(outputs, (2, 1), strict=True):
        assert_scored(found, ranked(reference.logits(0, question), "sigmoid"))  # type: ignore[arg-type]


def test_answers_without_names(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("lxmert"), tmp_path / "nameless")
    edit_json(folder / "config.json", id2label=None, label2id=None)
    with pytest.raises(ConfigError, match="does not name its 7 answers"):
        plan_of(folder, asked("lxmert"))
    with pytest.raises(ConfigError, match=r"--answers has 2 names; .* knows 7 answers"):
        plan_of(folder, asked("lxmert", answers=("a", "b")))
    named = plan_of(folder, asked("lxmert", answers=tuple("abcdefg")))
    found = answers(named, ROWS[:3], 3)
    wanted = answers(plan_of(tiny("lxmert"), asked("lxmert")), ROWS[:3], 3)
    assert [ANSWERS["abcdefg".index(one.answer)] for one in found] == [one.answer for one in wanted]
    assert len(json.dumps(named.describe()["generation"]["answers"])) == 34


def test_broken_weights_give_no_score(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("visual_bert"), tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    # One output of many: whatever the others are, they are not to be trusted.
    weights["cls.bias"][6] = math.inf
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert all(math.isnan(one.score) for one in answers(plan_of(folder, asked("visual_bert")), ROWS[:3], 3))


@pytest.mark.parametrize(
    ("name", "cells", "said"),
    [
        ("visual_bert", (None,), "column 'feats' is empty"),
        ("visual_bert", ("a.npy",), "column 'feats' holds text; it needs a list of 12 numbers for each region"),
        ("visual_bert", ([[1.0], [1.0, 2.0]],), "column 'feats' holds uneven lists"),
        ("visual_bert", (3.0,), "column 'feats' holds no numbers"),
        ("visual_bert", (np.ones((4, 11)),), "column 'feats' holds 4 x 11 numbers; the model takes n x 12"),
        ("visual_bert", (np.ones((4, 1, 12)),), "column 'feats' holds 4 x 1 x 12 numbers"),
        ("visual_bert", (np.full((4, 12), np.nan),), "column 'feats' holds NaN"),
        ("lxmert", (np.ones((3, 12)), None), "column 'boxes' is empty"),
        ("lxmert", (np.ones((3, 12)), np.ones((2, 4))), "2 boxes in column 'boxes' for 3 regions"),
        ("lxmert", (np.ones((3, 12)), np.full((3, 4), 320.0)), "column 'boxes' holds 320; boxes are"),
        ("lxmert", (np.ones((3, 12)), np.full((3, 4), -1.0)), "column 'boxes' holds -1; boxes are"),
    ],
)  # fmt: skip
def test_regions_that_are_none(tiny: Callable[[str], Path], name: str, cells: tuple[Any, ...], said: str) -> None:
    cells = tuple(c.astype(np.float32) if isinstance(c, np.ndarray) else c for c in cells)
    with pytest.raises(RowError) as caught:
        plan_of(tiny(name), asked(name)).open_processor().record([("text", "?")], ("how many?", *cells))
    assert (caught.value.code, caught.value.stage) == ("bad_row", "source")
    assert caught.value.message.startswith(said)


def test_one_region_may_come_without_its_list(tiny: Callable[[str], Path]) -> None:
    processor = plan_of(tiny("visual_bert"), asked("visual_bert")).open_processor()
    flat, nested = (
        processor.record([("text", "?")], ("how many?", features))[0].arrays["visual_embeds"]
        for features in (np.ones(12, np.float32), np.ones((1, 12), np.float32))
    )
    np.testing.assert_array_equal(flat, nested)


# ------------------------------------------------------------------------------------------ models that write


def wording(name: str, question: str) -> str:
    return f"Question: {question} Answer:" if name.startswith("blip_2") else question


# The others are captioners, too: see test_captioners.
@pytest.mark.parametrize("name", rarely(tiny_vqa.WRITING, {"blip_vqa", "instructblip", "git"}.__contains__))
def test_greedy(tiny: Callable[[str], Path], name: str) -> None:
    reference = Reference(tiny(name), name)
    wanted = [reference.written(picture, wording(name, QUESTIONS[question])) for picture, question in ROWS]
    assert len({one.text for one in wanted}) > 6, "the texts do not tell the rows apart"
    assert len({one.text for one, row in zip(wanted, ROWS, strict=True) if row[0] == 0}) > 1, "nor the questions"
    for batch_size in (1, 5, 16):
        found = answers(plan_of(tiny(name), asked(name)), ROWS, batch_size)
        for one, other in zip(found, wanted, strict=True):
            assert (one.text, one.finish_reason, one.n_tokens) == (other.text, other.finish_reason, other.n_tokens)
            assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=2e-4)


@pytest.mark.parametrize("name", tiny_vqa.WRITING)
def test_choices_are_as_likely_as_they_are_to_be_written(tiny: Callable[[str], Path], name: str) -> None:
    reference, rows, choices = Reference(tiny(name), name), [(0, 0), (4, 0), (1, 1)], ("dog", "a cat")
    found = answers(plan_of(tiny(name), asked(name, choices=choices)), rows, 2)
    for one, (picture, question) in zip(found, rows, strict=True):
        text = wording(name, QUESTIONS[question])
        likelihoods = np.array([reference.likelihood(picture, text, choice) for choice in choices])
        wanted = likelihoods / likelihoods.sum()
        assert_scored(one, [(choices[k], wanted[k]) for k in np.argsort(-wanted)], limit=1e-4)


def test_a_question_in_its_own_words_is_left_as_it_is(tiny: Callable[[str], Path]) -> None:
    question = "Question: how many? Short answer:"
    plan = plan_of(tiny("blip_2"), asked("blip_2", questions=(question,), variables=()))
    runner = plan.load()
    samples = plan.open_processor().record([("image", pictures()[0])], ())
    (found,) = outputs_of(runner, samples)
    assert found.text == Reference(tiny("blip_2"), "blip_2").written(0, question).text  # type: ignore[union-attr]


@pytest.mark.parametrize("prompt", [None, "what is on the left of it?"])
def test_instructblip_captions(tiny: Callable[[str], Path], prompt: str | None) -> None:
    plan = plan_of(tiny("instructblip"), Generation(prompt, LIMIT))
    reference = Reference(tiny("instructblip"), "instructblip")
    processor, runner = plan.open_processor(), plan.load()
    samples = [processor.record([("image", pixels)], ())[0] for pixels in pictures()]
    for row, found in enumerate(outputs_of(runner, samples)):
        wanted = reference.written(row, prompt or "A short image caption.")
        assert (found.text, found.n_tokens) == (wanted.text, wanted.n_tokens)  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "picture", "question", "code", "said"),
    [
        ("vilt", (64, 64), "how many? " * 9, "too_large", "the question has 74 tokens; the model has room for 40"),
        ("vilt", (4, 200), "how many?", "too_large", "200 x 4 pixels: too narrow for the model"),
        ("vilt", (64, 64), " ", "bad_row", "column 'question', which the prompt names, is empty"),
        ("blip_vqa", (64, 64), "how many? " * 90, "too_large", "the model has room for"),
        ("instructblip", (64, 64), "how many? " * 9, "too_large", "the model has room for"),
        ("instructblip", (64, 64), "<image> how many?", "bad_row", "the token that stands for the picture"),
        ("blip_2", (64, 64), "is <image> red?", "bad_row", "the token that stands for the picture"),
    ],
)
def test_rows_that_cannot_be_asked(
    tiny: Callable[[str], Path], name: str, picture: tuple[int, int], question: str, code: str, said: str
) -> None:
    processor = plan_of(tiny(name), asked(name)).open_processor()
    with pytest.raises(RowError) as caught:
        processor.record([("image", np.zeros((*picture, 3), np.uint8))], (question,))
    assert caught.value.code == code
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("name", "changes", "options", "said"),
    [
        ("vilt", {"schema": "{}"}, {}, "--schema: a vilt chooses among its own answers"),
        ("vilt", {"num_beams": 2}, {}, "--num-beams: a vilt chooses an answer, nothing is generated"),
        ("vilt", {"temperature": 1.0}, {}, "--temperature: a vilt chooses an answer"),
        ("vilt", {"features": "feats"}, {}, "--features-column, --boxes-column: a vilt sees pictures"),
        ("vilt", {}, {"compile": True}, "--compile is not for a vilt"),
        ("vilt", {"system": "You are kind."}, {}, "--system is for chat models; a vilt takes none"),
        ("visual_bert", {"features": None}, {}, "give --features-column, a column with lists of 12 numbers"),
        ("visual_bert", {"boxes": "boxes"}, {}, "--boxes-column: a visual_bert takes features alone"),
        ("lxmert", {"boxes": None}, {}, "a lxmert needs --boxes-column, too"),
        ("blip_vqa", {"system": "You are kind."}, {}, "--system is for chat models; a blip takes none"),
        ("blip_vqa", {"features": "feats"}, {}, "--features-column is for models that see no pictures"),
        ("git", {"answers": ("a", "b")}, {}, "--answers is for models that choose among known answers"),
        ("git", {"questions": ("a cat " * 40,), "variables": ()}, {}, "give a shorter question"),
        ("blip_vqa", {"questions": ("a cat " * 90,), "variables": ()}, {}, "give a shorter question"),
        ("instructblip", {"questions": ("a cat " * 12,), "variables": ()}, {}, "room for"),
    ],
)  # fmt: skip
def test_refused(
    tiny: Callable[[str], Path], name: str, changes: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(tiny(name), asked(name, **changes), **options)
    assert said in str(caught.value)


@pytest.mark.parametrize(("name", "tokens"), [("blip_vqa", 89), ("git", 30), ("instructblip", 40)])
def test_a_number_that_nobody_asked_for_fits(tiny: Callable[[str], Path], name: str, tokens: int) -> None:
    generation = replace(asked(name), max_new_tokens=100)
    with pytest.raises(ConfigError, match="give at most --max-new-tokens"):
        plan_of(tiny(name), generation)
    plan = plan_of(tiny(name), replace(generation, limited=False))
    assert plan.generation.max_new_tokens == tokens
    plan.open_processor().record([("image", pictures()[0])], ("how many?",))


def test_the_other_command_is_named(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="they need one saved as BlipForQuestionAnswering") as caught:
        plan_of(tiny("blip"), asked("blip"))
    assert caught.value.hint == "it gives captions: mmcli caption"
    for name, said in (("blip_vqa", "one saved as BlipForConditionalGeneration"), ("vilt", "Supported are blip, ")):
        with pytest.raises(ConfigError, match=said) as caught:
            plan_of(tiny(name), Generation())
        assert caught.value.hint == "it gives answers: mmcli ask"


def test_a_tokenizer_is_missing(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("visual_bert"), tmp_path / "lacking")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match="it has no tokenizer"):
        plan_of(folder, asked("visual_bert"))


# ------------------------------------------------------------------------------------------ the command


def command(*arguments: object) -> int:
    fixed = ["--device", DEVICE, "--num-workers", "0", "--batch-size", "4", "--max-new-tokens", str(LIMIT)]
    return run(["ask", *map(str, arguments), *fixed])


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", ["visual_bert", "lxmert"])
def test_regions_from_a_manifest(tiny: Callable[[str], Path], tmp_path: Path, name: str, suffix: str) -> None:
    """No media column is named, and there is one that looks like it."""
    rows = [
        {
            "image": f"{picture}.jpg",
            "question": QUESTIONS[question],
            "feats": features.tolist(),
            "boxes": boxes.tolist(),
        }
        for picture, question in ROWS
        for features, boxes in [regions()[picture]]
    ]
    rows.append({**rows[0], "question": None})
    rows.append({**rows[0], "feats": None})
    rows.append({**rows[0], "feats": [[1.0] * 11]})
    rows.append({**rows[0], "feats": [[math.nan] * 12] * 2})
    manifest, out = tmp_path / f"m.{suffix}", tmp_path / f"o.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), manifest)
    else:
        manifest.write_text("\n".join(json.dumps(row) for row in rows))
    columns = ["--question-column", "question", "--features-column", "feats"]
    columns += ["--boxes-column", "boxes"] * (name == "lxmert")
    assert command(manifest, "-m", tiny(name), *columns, "--keep", "image", "-o", out) == 3
    found = pq.read_table(out).to_pylist() if suffix == "parquet" else list(map(json.loads, out.open()))
    wanted = answers(plan_of(tiny(name), asked(name)), ROWS, 4)
    for row, one in zip(found, wanted, strict=False):
        assert (row["answer"], row["modality"], row["error_code"]) == (one.answer, "text", None)
        assert row["score"] == pytest.approx(one.score, abs=1e-5)
        assert [best["answer"] for best in row["top_k"]] == [answer for answer, _ in one.top_k]
    assert [row["error_message"] for row in found[len(ROWS) :]] == [
        "column 'question' is empty", "column 'feats' is empty",
        "column 'feats' holds 1 x 11 numbers; the model takes n x 12",
        "column 'feats' holds NaN or infinite numbers",
    ]  # fmt: skip
    assert {row["error_code"] for row in found[len(ROWS) :]} == {"bad_row"}
    assert {row["answer"] for row in found[len(ROWS) :]} == {None}


def test_pictures_of_a_folder(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, pixels in enumerate(pictures()):
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number}.png")
    questions = ["-q", "colour=what color?", "-q", "how many?"]
    assert command(tmp_path / "in", "-m", tiny("vilt"), *questions, "-o", tmp_path / "o.parquet") == 0
    rows = pq.read_table(tmp_path / "o.parquet").to_pylist()
    reference = Reference(tiny("vilt"), "vilt")
    for number, row in enumerate(rows):
        for question, column in ((0, "colour"), (2, "q2")):
            (answer, score), *_ = ranked(reference.logits(number, question), "sigmoid")
            assert row[f"{column}_answer"] == answer
            assert row[f"{column}_score"] == pytest.approx(score, abs=1e-5)
