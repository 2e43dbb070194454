"""Chat models write, for every row and batch size, what the checkpoint's own code writes for that row alone."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_chats
import torch
import transformers as hf
from model_runs import DEVICE, outputs_of
from PIL import Image
from rare import rarely

from mmcli.cli.boundary import run
from mmcli.core.errors import ConfigError, ModelError, RowError
from mmcli.core.records import Audio, DecodeOptions, Generated, Media, Modality, Payload, Sample, Video
from mmcli.core.schema import canonical, parse_schema
from mmcli.media.decode import decode
from mmcli.models.options import Example, Generation, ModelOptions
from mmcli.models.plan import GenerationPlan
from mmcli.models.resolve import resolve_writer

LIMIT = 10
RATE = 16_000
FRAMES = 4
QUESTIONS = ("What is it?", "Is there a cat in it, and if so, which colour?")
# Heights and widths: small, tall, wide, larger, exactly right.
SHAPES = [(9, 12), (90, 20), (18, 130), (120, 160), (32, 32)]
PICTURES = tuple(name for name in tiny_chats.BUILDERS if name not in ("qwen2_audio",))
CLIPS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "llava_onevision")

Record = list[tuple[Modality, Payload]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint, made when it is first asked for."""

    @cache
    def build(name: str) -> Path:
        return {**tiny_chats.BUILDERS, **tiny_chats.OTHERS}[name](tmp_path_factory.mktemp("tiny") / name)

    return build


@cache
def pictures() -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(1)
    return tuple(generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES)


def png(pixels: np.ndarray) -> Media:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return Media(data=file.getvalue())


@cache
def clips() -> tuple[Video, ...]:
    """Of different sizes, lengths and times."""
    generator = np.random.default_rng(2)
    found = []
    for shape, duration in zip([(24, 40), (50, 20), (32, 32)], [1.5, 9.0, 70.25], strict=True):
        times = (np.arange(FRAMES) + 0.5) / FRAMES * duration
        found.append(Video(generator.integers(0, 256, (FRAMES, *shape, 3), dtype=np.uint8), times, duration))
    return tuple(found)


@cache
def sounds() -> tuple[Audio, ...]:
    generator = np.random.default_rng(3)
    return tuple(
        Audio(generator.uniform(-1, 1, n).astype(np.float32) * 0.5, RATE) for n in (2000, 9000, 15999, 16000)
    )


def records(name: str) -> list[Record]:
    if name == "qwen2_audio":
        return [[("audio", sound)] for sound in sounds()]
    return [[("image", pixels)] for pixels in pictures()]


def plan_of(folder: Path | str, generation: Generation, **options: Any) -> GenerationPlan:
    plan = resolve_writer(ModelOptions(str(folder), device=DEVICE, frames=FRAMES, **options), generation)
    assert isinstance(plan, GenerationPlan)
    return plan


class Run:
    """A loaded checkpoint and the processor of its workers."""

    def __init__(self, folder: Path, generation: Generation) -> None:
        self.plan = plan_of(folder, generation)
        self.processor: Any = self.plan.open_processor()
        self.processor.show(lambda media: decode(media, DecodeOptions(num_frames=FRAMES)))
        self.runner: Any = self.plan.load()
        self.count = len(generation.prompts)

    def samples(self, given: Sequence[Record]) -> list[tuple[Sample, ...]]:
        return [self.processor.record(record, ()) for record in given]

    def answers(self, samples: Sequence[tuple[Sample, ...]], batch_size: int, rows: int) -> list[list[Generated]]:
        """Those of row i's samples, samples[i % len(samples)], batched as the engine does."""
        groups: dict[tuple[Modality, Hashable], list[tuple[int, int, Sample]]] = {}
        for row in range(rows):
            for number, sample in enumerate(samples[row % len(samples)]):
                groups.setdefault((sample.modality, sample.group), []).append((row, number, sample))
        found: dict[tuple[int, int], Generated] = {}
        for members in groups.values():
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                written = outputs_of(self.runner, [sample for _, _, sample in batch])
                found.update({(row, n): one for (row, n, _), one in zip(batch, written, strict=True)})
        return [[found[row, number] for number in range(self.count)] for row in range(rows)]


def answers(
    folder: Path, generation: Generation, given: Sequence[Record], batch_size: int
) -> list[list[Generated]]:
    """One row for each record."""
    run = Run(folder, generation)
    return run.answers(run.samples(given), batch_size, len(given))


def asking(*questions: str, **others: Any) -> Generation:
    return Generation(questions=questions, task="ask", max_new_tokens=LIMIT, **others)


# ------------------------------------------------------------------------------------------ the reference


class Reference:
    """A checkpoint as its model card calls it: one record at a time, float32, eager."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        config = hf.AutoConfig.from_pretrained(folder)
        model_class = getattr(hf, config.architectures[0])
        self.model = model_class.from_pretrained(folder, attn_implementation="eager").eval()
        self.processor = hf.AutoProcessor.from_pretrained(folder)

    def __call__(
        self, messages: list[dict[str, Any]], clips: dict[str, Any] | None = None, num_beams: int = 1
    ) -> Generated:
        """What follows these messages."""
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        inputs = self.processor.apply_chat_template(messages, processor_kwargs=clips, **options)
        return self.generate(inputs, num_beams)

    def about(self, payload: Payload, question: str) -> Generated:
        """The answer to a question about one medium."""
        if self.name == "paligemma":
            return self.paligemma(payload, f"answer en {question}")
        if self.name == "idefics":
            return self.idefics("User:", payload, f"{question}<end_of_utterance>\nAssistant:")
        return self([user(payload, text=question)])

    def paligemma(self, pixels: np.ndarray, prompt: str) -> Generated:
        return self.generate(
            self.processor(images=Image.fromarray(pixels), text="<image>" + prompt, return_tensors="pt")
        )

    def idefics(self, *parts: str | np.ndarray) -> Generated:
        prompt = [part if isinstance(part, str) else Image.fromarray(part) for part in parts]
        return self.generate(self.processor(text=[prompt], add_end_of_utterance_token=False, return_tensors="pt"))

    @torch.inference_mode()
    def likelihood(self, messages: list[dict[str, Any]], answer: str) -> float:
        """How likely it writes this and no more, by one pass over all of it."""
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        inputs = dict(self.processor.apply_chat_template(messages, **options))
        tokenizer, ends = self.processor.tokenizer, self.model.generation_config.eos_token_id
        end = ends[0] if isinstance(ends, list) else ends
        ids = torch.tensor([[*tokenizer(answer, add_special_tokens=False).input_ids, end]])
        for name, values in (("input_ids", ids), ("attention_mask", ids * 0 + 1), ("mm_token_type_ids", ids * 0)):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], values], dim=1)
        logits = self.model(**inputs).logits[0, -1 - ids.shape[1] : -1].double().log_softmax(-1)
        return float(logits[torch.arange(ids.shape[1]), ids[0]].sum().exp())

    @torch.inference_mode()
    def generate(self, inputs: Any, num_beams: int = 1) -> Generated:
        """Of beams without their scores."""
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        output = self.model.generate(
            **inputs, max_new_tokens=LIMIT, do_sample=False, num_beams=num_beams, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        written = output.sequences[0, inputs["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        stopped = written[-1].item() in (ends if isinstance(ends, list) else [ends])
        text = self.processor.tokenizer.decode(written, skip_special_tokens=True).strip()
        mean = math.nan
        if num_beams == 1:
            steps = zip(output.scores, written, strict=True)
            mean = float(torch.stack([step[0].double().log_softmax(-1)[token] for step, token in steps]).mean())
        return Generated(text, "stop" if stopped else "length", len(written), mean, False)


def user(*parts: Any, text: str) -> dict[str, Any]:
    """A message with media and a text below."""
    content = []
    for part in parts:
        if isinstance(part, Audio):
            content.append({"type": "audio", "audio": part.waveform})
        elif isinstance(part, Video):
            content.append({"type": "video", "video": part.frames})
        else:
            content.append({"type": "image", "image": Image.fromarray(part)})
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def says(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


@pytest.fixture(scope="session")
def reference(tiny: Callable[[str], Path]) -> Callable[[str], Reference]:
    return cache(lambda name: Reference(tiny(name), name))


@pytest.fixture(scope="session")
def wanted(reference: Callable[[str], Reference]) -> Callable[[str], list[list[Generated]]]:
    """The reference's answers to QUESTIONS about `records(name)`."""

    @cache
    def compute(name: str) -> list[list[Generated]]:
        return [
            [reference(name).about(payload, question) for question in QUESTIONS]
            for ((_, payload),) in records(name)
        ]

    return compute


def assert_same(found: Sequence[Sequence[Generated]], wanted: Sequence[Sequence[Generated]]) -> None:
    for row, texts in enumerate(found):
        for one, other in zip(texts, wanted[row % len(wanted)], strict=True):
            assert (one.text, one.finish_reason, one.n_tokens) == (other.text, other.finish_reason, other.n_tokens)
            assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=2e-4)


# ------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize("name", list(tiny_chats.BUILDERS))
def test_greedy(tiny: Callable[[str], Path], wanted: Callable[[str], list[list[Generated]]], name: str) -> None:
    """At batch 1, 5 and 16, of pictures and questions of different sizes."""
    expected = wanted(name)
    assert len({(one.text, one.mean_logprob) for texts in expected for one in texts}) > len(expected) + 2
    run = Run(tiny(name), asking(*QUESTIONS))
    samples = run.samples(records(name))
    for batch_size, rows in ((1, len(samples)), (5, len(samples)), (16, 8)):
        assert_same(run.answers(samples, batch_size, rows), expected)


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision", "idefics2"])
def test_beams(tiny: Callable[[str], Path], reference: Callable[[str], Reference], name: str) -> None:
    """Of several pictures, too."""
    generation = asking(QUESTIONS[0], num_beams=3, examples=(Example((png(pictures()[4]),), "Red?", "Yes."),))
    found = answers(tiny(name), generation, records(name)[:3], 3)
    for one, ((_, pixels),) in zip(found, records(name), strict=False):
        messages = [user(pictures()[4], text="Red?"), says("assistant", "Yes."), user(pixels, text=QUESTIONS[0])]
        text = reference(name)(messages, num_beams=3).text
        assert one[0].text == text


@pytest.mark.parametrize("name", ["qwen2_vl", "smolvlm", "llava_onevision", "qwen2_audio"])
def test_choices(tiny: Callable[[str], Path], reference: Callable[[str], Reference], name: str) -> None:
    """As likely as the reference would write them, with or without a space before them, and then end."""
    choices = ("yes", "a cat")
    generation = Generation(questions=QUESTIONS, task="ask", choices=choices)
    given, asked = records(name)[:2], reference(name)
    run = Run(tiny(name), generation)
    for found, ((_, payload),) in zip(run.answers(run.samples(given), 4, len(given)), given, strict=True):
        for one, question in zip(found, QUESTIONS, strict=True):
            both = [
                sum(
                    asked.likelihood([user(payload, text=question)], spelling)
                    for spelling in (choice, f" {choice}")
                )
                for choice in choices
            ]
            wanted = {choice: likely / sum(both) for choice, likely in zip(choices, both, strict=True)}
            assert dict(one.top_k) == pytest.approx(wanted, abs=1e-5)
            assert one.answer == max(choices, key=wanted.__getitem__)


@pytest.mark.parametrize("name", ["qwen2_vl", "smolvlm"])
def test_answers_by_a_schema(tiny: Callable[[str], Path], name: str) -> None:
    schema = parse_schema("colour red|blue, count int")
    generation = Generation(questions=QUESTIONS, task="ask", max_new_tokens=80, schema=canonical(schema))
    for answers_of_row in answers(tiny(name), generation, records(name)[:3], 4):
        for one in answers_of_row:
            content = json.loads(one.text)
            assert content["colour"] in ("red", "blue")
            assert isinstance(content["count"], int)


def test_both_ends_are_among_the_texts(wanted: Callable[[str], list[list[Generated]]]) -> None:
    found = [one.finish_reason for name in tiny_chats.BUILDERS for texts in wanted(name) for one in texts]
    assert found.count("stop") > 10
    assert found.count("length") > 10


@pytest.mark.parametrize("name", CLIPS)
def test_clips(tiny: Callable[[str], Path], reference: Callable[[str], Reference], name: str) -> None:
    """As the reference answers for the same frames and times, given to it by another clock."""

    def about(clip: Video, question: str) -> Generated:
        times = {
            "total_num_frames": 2 * FRAMES,
            "fps": 2 * FRAMES / clip.duration,
            "duration": clip.duration,
            "frames_indices": [2 * i + 1 for i in range(FRAMES)],
        }
        settings = {"do_sample_frames": False, "video_metadata": [times]}
        return reference(name)([user(clip, text=question)], clips=settings)

    expected = [[about(clip, question) for question in QUESTIONS] for clip in clips()]
    run = Run(tiny(name), asking(*QUESTIONS))
    samples = run.samples([[("video", clip)] for clip in clips()])
    for batch_size in (1, 5):
        assert_same(run.answers(samples, batch_size, len(samples)), expected)


@pytest.mark.parametrize("name", ["llava", "idefics", *rarely(["llava_next", "idefics2", "idefics3"])])
def test_clips_as_pictures(tiny: Callable[[str], Path], reference: Callable[[str], Reference], name: str) -> None:
    """And in one batch with pictures, where a row has one."""
    question = QUESTIONS[0]

    def about(payload: Video | np.ndarray) -> Generated:
        shown = payload.frames if isinstance(payload, Video) else [payload]
        if name == "idefics":
            return reference(name).idefics("User:", *shown, f"{question}<end_of_utterance>\nAssistant:")
        return reference(name)([user(*shown, text=question)])

    given: list[Record] = [[("video", clip)] for clip in clips()] + [[("image", pixels)] for pixels in pictures()]
    assert plan_of(tiny(name), asking(question)).modalities == {"text", "image", "video"}
    assert_same(answers(tiny(name), asking(question), given, 5), [[about(record[0][1])] for record in given])


@pytest.mark.parametrize(
    "name", ["qwen2_vl", "llava", "idefics", *rarely(["smolvlm", "idefics2", "llava_onevision"])]
)
def test_system_and_examples(tiny: Callable[[str], Path], reference: Callable[[str], Reference], name: str) -> None:
    """Solved examples are earlier turns; one without a question was asked the same."""
    first, second, *others = pictures()
    examples = (
        Example((png(first),), "What colour?", "Blue."),
        Example((png(second),), None, "A cat."),
        Example((Media(text="Cats sleep."),), "Do cats sleep?", "Yes."),
    )

    def about(pixels: np.ndarray, question: str) -> Generated:
        end = "<end_of_utterance>"
        if name == "idefics":
            return reference(name).idefics(
                "Be short.\n",
                "User:", first, f"What colour?{end}\nAssistant: Blue.{end}\n",
                "User:", second, f"{question}{end}\nAssistant: A cat.{end}\n",
                "User:", f"Cats sleep.\n\nDo cats sleep?{end}\nAssistant: Yes.{end}\n",
                "User:", pixels, f"{question}{end}\nAssistant:",
            )  # fmt: skip
        return reference(name)(
            [
                says("system", "Be short."),
                user(first, text="What colour?"), says("assistant", "Blue."),
                user(second, text=question), says("assistant", "A cat."),
                user(text="Cats sleep.\n\nDo cats sleep?"), says("assistant", "Yes."),
                user(pixels, text=question),
            ]
        )  # fmt: skip

    generation = asking(*QUESTIONS, system="Be short.", examples=examples)
    given: list[Record] = [[("image", pixels)] for pixels in others[:3]]
    found = answers(tiny(name), generation, given, 4)
    assert_same(found, [[about(pixels, question) for question in QUESTIONS] for pixels in others[:3]])


@pytest.mark.parametrize("name", ["qwen2_vl", "smolvlm", "llava_onevision", "idefics", "qwen2_audio"])
def test_texts_without_media(tiny: Callable[[str], Path], reference: Callable[[str], Reference], name: str) -> None:
    """Records of another kind in the same run."""
    texts = ("Cats sleep a lot.", "Dogs bark at cats.")

    def about(text: str) -> Generated:
        asked = f"{text}\n\n{QUESTIONS[0]}"
        if name == "idefics":
            return reference(name).idefics("User:", f"{asked}<end_of_utterance>\nAssistant:")
        return reference(name)([user(text=asked)])

    given: list[Record] = [*records(name)[:2], *([("text", text)] for text in texts)]
    expected = [reference(name).about(record[0][1], QUESTIONS[0]) for record in given[:2]]
    assert_same(
        answers(tiny(name), asking(QUESTIONS[0]), given, 4), [[one] for one in [*expected, *map(about, texts)]]
    )


def test_unknown_type(tiny: Callable[[str], Path], reference: Callable[[str], Reference]) -> None:
    """By its own template; how its rows are batched was tried. Clips as pictures, and examples."""
    given: list[Record] = [*records("gemma3"), [("video", clips()[0])]]
    example = Example((png(pictures()[0]),), None, "A cat.")

    def about(payload: Video | np.ndarray) -> Generated:
        shown = payload.frames if isinstance(payload, Video) else [payload]
        shots = [user(pictures()[0], text=QUESTIONS[0]), says("assistant", "A cat.")]
        return reference("gemma3")([*shots, user(*shown, text=QUESTIONS[0])])

    found = answers(tiny("gemma3"), asking(QUESTIONS[0], examples=(example,)), given, 5)
    assert_same(found, [[about(record[0][1])] for record in given])


def test_model_of_texts(tiny: Callable[[str], Path], reference: Callable[[str], Reference]) -> None:
    texts = ("Cats sleep a lot.", "Dogs bark.", "Nothing.")
    hf_tokenizer = hf.AutoTokenizer.from_pretrained(tiny("llama"))
    asked = reference("llama")
    asked.processor = type("Texts", (), {"tokenizer": hf_tokenizer})

    def about(text: str, question: str) -> Generated:
        messages = [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": f"Is it red?\n\n{question}"},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": f"{text}\n\n{question}"},
        ]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        return asked.generate(hf_tokenizer.apply_chat_template(messages, **options))

    shots = (Example((Media(text="Is it red?"),), None, "No."),)
    generation = asking(*QUESTIONS, system="Be short.", examples=shots)
    assert plan_of(tiny("llama"), generation).modalities == {"text"}
    found = answers(tiny("llama"), generation, [[("text", text)] for text in texts], 4)
    assert_same(found, [[about(text, question) for question in QUESTIONS] for text in texts])


@pytest.mark.parametrize(
    ("name", "payload", "said"),
    [
        ("qwen2_vl", ("image", 3), "Describe this image in one sentence."),
        ("qwen2_audio", ("audio", 1), "Describe this sound in one sentence."),
        ("qwen2_vl", ("text", "Cats sleep."), "Cats sleep.\n\nSummarize this text in one sentence."),
        ("paligemma", ("image", 3), "caption en"),
    ],
)
def test_captions(
    tiny: Callable[[str], Path], reference: Callable[[str], Reference], name: str, payload: Any, said: str
) -> None:
    """What a model is told without --prompt."""
    modality, chosen = payload
    media = {"image": pictures, "audio": sounds}[modality]()[chosen] if modality != "text" else chosen
    asked = reference(name)
    expected = (
        asked.paligemma(media, said)
        if name == "paligemma"
        else asked([user(*([] if modality == "text" else [media]), text=said)])
    )
    assert_same(answers(tiny(name), Generation(max_new_tokens=LIMIT), [[(modality, media)]], 1), [[expected]])


def test_picture_with_a_text(tiny: Callable[[str], Path], reference: Callable[[str], Reference]) -> None:
    """A row of several media: its texts stand between its pictures and the question."""
    pixels = pictures()[2]
    found = answers(tiny("smolvlm"), asking("Is that so?"), [[("text", "It is red."), ("image", pixels)]], 1)
    assert_same(found, [[reference("smolvlm")([user(pixels, text="It is red.\n\nIs that so?")])]])


# ------------------------------------------------------------------------------------------ conversations

TALKING = asking(messages="talk", variables=("talk",))
# The simplest form.
PLAIN = [("user", "What is it?"), ("assistant", "A cat."), ("user", "Why?")]
TALK = [{"role": role, "content": text} for role, text in PLAIN]
TEMPLATE = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}


def told(medium: dict[str, Any], system: bool) -> list[dict[str, Any]]:
    """With a medium, or a place for it, between two texts."""
    asked = [{"type": "text", "text": "See:"}, medium, {"type": "text", "text": " a cat?"}]
    answered = [{"type": "text", "text": "Yes,"}, {"type": "text", "text": " a cat."}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}, says("user", "Why?")]
    return [says("system", "Be short."), *turns] if system else turns


@pytest.mark.parametrize("name", ["qwen2_vl", "smolvlm", "llava", "gemma3", "qwen2_audio"])
def test_conversations(tiny: Callable[[str], Path], reference: Callable[[str], Reference], name: str) -> None:
    """The prompt is that of the template of the whole conversation, the answer what `generate` writes then."""
    first, second, *_ = records(name)
    ((kind, shown),), ((_, other),) = first, second
    # Gemma's takes none.
    system = name != "gemma3"
    run, asked = Run(tiny(name), TALKING), reference(name)
    cells = [(first, told({"type": kind}, system)), (second, TALK)]
    samples = [run.processor.record(record, (cell,)) for record, cell in cells]
    whole = [told(user(shown, text="")["content"][0], system), [says(*one) for one in PLAIN]]
    whole[1][0] = user(other, text="What is it?")
    inputs = [asked.processor.apply_chat_template(messages, **TEMPLATE) for messages in whole]
    for (sample,), one in zip(samples, inputs, strict=True):
        assert sample.arrays["input_ids"].tolist() == one["input_ids"][0].tolist()
    assert_same(run.answers(samples, 2, 2), [[asked.generate(one)] for one in inputs])


def test_conversations_of_other_forms(tiny: Callable[[str], Path], reference: Callable[[str], Reference]) -> None:
    """A text model's template takes no parts; Idefics has none; a clip is several pictures for LLaVA."""
    asked, run = reference("idefics"), Run(tiny("idefics"), TALKING)
    end, pixels = "<end_of_utterance>", pictures()[0]
    parts = ["User:", pixels, f"What is it?{end}\nAssistant: A cat.{end}\n", "User:", f"Why?{end}\nAssistant:"]
    samples = [run.processor.record([("image", pixels)], (TALK,))]
    assert_same(run.answers(samples, 1, 1), [[asked.idefics(*parts)]])
    processor = plan_of(tiny("llama"), TALKING).open_processor()
    (sample,) = processor.record([("text", "Cats sleep.")], (TALK,))
    # A row without media.
    (bare,) = processor.record([("text", "")], (TALK,))
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny("llama"))
    wanted = tokenizer.apply_chat_template(TALK, **TEMPLATE)["input_ids"]
    assert bare.arrays["input_ids"].tolist() == wanted[0].tolist()
    plain = [{**TALK[0], "content": "Cats sleep.\n\nWhat is it?"}, *TALK[1:]]
    wanted = tokenizer.apply_chat_template(plain, **TEMPLATE)["input_ids"]
    assert sample.arrays["input_ids"].tolist() == wanted[0].tolist()
    processor = plan_of(tiny("llava"), TALKING).open_processor()
    (sample,) = processor.record([("video", clips()[0])], (TALK,))
    frames = user(*clips()[0].frames, text="What is it?")
    wanted = reference("llava").processor.apply_chat_template(
        [frames, *(says(*one) for one in PLAIN[1:])], **TEMPLATE
    )["input_ids"]
    assert sample.arrays["input_ids"].tolist() == wanted[0].tolist()


def test_conversations_that_will_not_do(tiny: Callable[[str], Path]) -> None:
    """A place without its medium, own tokens, too (put together of parts), what a template refuses."""
    picture: Record = [("image", pictures()[0])]
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    processor = plan_of(tiny("qwen2_vl"), TALKING).open_processor()
    for cell, said in (
        (told({"type": "audio"}, True), "a place for audio; the row has image alone"),
        ([{"role": "user", "content": parts}], "'<|im_end|>'"),
        (TALK[:2], "it ends with the role assistant; the last message must be one of the user"),
        (None, "column 'talk': it is empty"),
    ):
        error = error_of(processor, picture, (cell,))
        assert error.code == "bad_row"
        assert said in error.message
    processor = plan_of(tiny("gemma3"), TALKING).open_processor()
    error = error_of(processor, picture, (told({"type": "image"}, True),))
    assert "the system message: the chat template of" in error.message
    assert "System role not supported" in error.message
    error = error_of(plan_of(tiny("idefics"), TALKING).open_processor(), picture, (told({"type": "image"}, True),))
    assert "the text stands before the picture" in error.message


# ------------------------------------------------------------------------------------------ refusals


def error_of(run: Any, record: Record, variables: tuple[Any, ...] = ()) -> RowError:
    with pytest.raises(RowError) as caught:
        run.record(record, variables)
    return caught.value


def test_own_tokens_are_no_text(tiny: Callable[[str], Path]) -> None:
    """Of a row: its error. Of the command: an error before anything is read."""
    generation = asking("Is it {kind}?", variables=("kind",))
    processor = plan_of(tiny("qwen2_vl"), generation).open_processor()
    picture: Record = [("image", pictures()[0])]
    assert len(processor.record(picture, ("<b>red</b>",))) == 1
    for value, record in (
        ("<|image_pad|>", picture),
        ("red<|im_end|>", picture),
        ("red", [("text", "a<|im_start|>b")]),
    ):
        error = error_of(processor, record, (value,))
        assert error.code == "bad_row"
        assert "<|i" in error.message
    example = Example((Media(text="a"),), None, "Yes.<|im_end|>")
    for wrong in (
        asking("Is <|video_pad|> red?"),
        asking("Why?", system="<|im_end|>"),
        asking("Why?", examples=(example,)),
    ):
        with pytest.raises(ConfigError, match="one of the model's own tokens"):
            plan_of(tiny("qwen2_vl"), wrong)


def test_too_long(tiny: Callable[[str], Path]) -> None:
    processor = plan_of(tiny("smolvlm"), asking("Why?")).open_processor()
    error = error_of(processor, [("text", "x" * 1010)])
    assert (error.code, error.stage) == ("too_large", "decode")
    assert "has 1035 tokens; with --max-new-tokens 10 they are more than the 1024" in error.message
    # As many as fit.
    assert processor.record([("text", "x" * (1010 - 21))], ())[0].length == 1014


def test_pictures_that_cannot_be_resized(tiny: Callable[[str], Path]) -> None:
    def error(name: str, height: int, width: int, *shown: Media) -> str:
        examples = tuple(Example((one,), None, "Yes.") for one in shown)
        processor: Any = plan_of(tiny(name), asking("Why?", examples=examples)).open_processor()
        processor.show(lambda media: decode(media, DecodeOptions()))
        return error_of(processor, [("image", np.zeros((height, width, 3), np.uint8))]).code

    assert error("qwen2_vl", 1, 300) == "unsupported_format"
    assert error("llava", 1, 100_000) == "too_large"
    # Several pictures are made squares.
    assert error("llava_onevision", 1, 100_000, png(pictures()[0])) == "too_large"


def test_sounds_are_not_cut(tiny: Callable[[str], Path]) -> None:
    """Its extractor would take the first second of them alone."""
    decoding = plan_of(tiny("qwen2_audio"), asking("Why?")).decode
    assert (decoding.max_seconds, decoding.sampling_rate) == (1.0, RATE)


def test_examples_that_cannot_be_decoded(tiny: Callable[[str], Path]) -> None:
    examples = (Example((png(pictures()[0]),), None, "Yes."), Example((Media(data=b"\x89PNG\r\n"),), None, "No."))
    for chosen in (False, True):
        generation = asking("Why?", examples=examples, chosen=chosen)
        processor: Any = plan_of(tiny("qwen2_vl"), generation).open_processor()
        if not chosen:
            with pytest.raises(ModelError, match="--examples: row 2: "):
                processor.show(lambda media: decode(media, DecodeOptions()))
            continue
        processor.show(lambda media: decode(media, DecodeOptions()))
        picture: Record = [("image", pictures()[1])]
        assert processor.record(picture, ((0, 0),))[0].arrays["image_grid_thw"].shape == (3, 3)
        error = error_of(processor, picture, ((1,),))
        assert error.code == "unsupported_format"
        assert "--examples: row 2: " in error.message


def edited(folder: Path, target: Path, name: str, **values: Any) -> Path:
    """A copy with other values in one of its JSON files."""
    shutil.copytree(folder, target)
    content = json.loads((target / name).read_text())
    (target / name).write_text(json.dumps({**content, **values}))
    return target


@pytest.mark.parametrize(
    ("name", "generation", "options", "said"),
    [
        ("paligemma", asking("Why?", system="Be short."), {}, "--system: a paligemma has no turns"),
        (
            "paligemma",
            asking("Why?", examples=(Example((), None, "Yes."),)),
            {},
            "--examples: a paligemma takes one",
        ),
        ("paligemma", TALKING, {}, "--messages-column: a paligemma has no turns"),
        ("gemma3", asking("Why?", system="Be short."), {}, "takes none: System role not supported"),
        ("llava", Generation(max_new_tokens=1024), {}, "--max-new-tokens 1024 leaves none for the prompt"),
        ("llava", asking("Why?"), {"compile": True}, "--compile is not for answers"),
    ],
)
def test_refused(
    tiny: Callable[[str], Path], name: str, generation: Generation, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(tiny(name), generation, **options)
    assert said in str(caught.value)


def test_templates_that_will_not_do(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    deaf = shutil.copytree(tiny("llama"), tmp_path / "deaf")
    before = plan_of(deaf, asking("Why?")).describe()
    (deaf / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    assert plan_of(deaf, asking("Why?")).describe() != before
    with pytest.raises(ConfigError, match=r"--system: the chat template of .* leaves them out"):
        plan_of(deaf, asking("Why?", system="Be short."))
    with pytest.raises(ConfigError, match=r"--examples: the chat template of .* leaves them out"):
        plan_of(deaf, asking("Why?", examples=(Example((Media(text="a"),), None, "Yes."),)))
    with pytest.raises(
        ConfigError, match=r"--messages-column, earlier answers: the chat template of .* leaves them"
    ):
        plan_of(deaf, TALKING)
    (deaf / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="it has no chat template"):
        plan_of(deaf, asking("Why?"))


def test_types_that_will_not_do(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    retriever = edited(tiny("qwen2_vl"), tmp_path / "other", "config.json", architectures=["ColQwen2ForRetrieval"])
    with pytest.raises(ConfigError, match="need one saved as Qwen2VLForConditionalGeneration"):
        plan_of(retriever, asking("Why?"))
    with pytest.raises(ConfigError, match="it is not known how cross_attention_mask of several rows"):
        plan_of(tiny_chats.mllama(tmp_path / "mllama"), asking("Why?"))


# ------------------------------------------------------------------------------------------ the command


def test_command(tiny: Callable[[str], Path], reference: Callable[[str], Reference], tmp_path: Path) -> None:
    """Two questions, with solved examples, through decode workers."""
    (tmp_path / "in").mkdir()
    for row, pixels in enumerate(pictures()[:3]):
        Image.fromarray(pixels).save(tmp_path / "in" / f"{row}.png")
    Image.fromarray(pictures()[3]).save(tmp_path / "shot.png")
    shots = tmp_path / "shots.jsonl"
    shots.write_text(json.dumps({"image": "shot.png", "answer": "A cat."}) + "\n")
    arguments = [
        "ask",
        str(tmp_path / "in"),
        "-m",
        str(tiny("smolvlm")),
        "-q",
        "what=What is it?",
        "-q",
        "why=Why?",
    ]
    arguments += ["--examples", str(shots), "--system", "Be short.", "--max-new-tokens", str(LIMIT)]
    arguments += ["--num-workers", "1", "--batch-size", "4", "--device", DEVICE, "-o", str(tmp_path / "o.jsonl")]
    assert run(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    for row, pixels in zip(rows, pictures(), strict=False):
        for name, question in (("what", "What is it?"), ("why", "Why?")):
            messages = [
                says("system", "Be short."),
                user(pictures()[3], text=question),
                says("assistant", "A cat."),
            ]
            one = reference("smolvlm")([*messages, user(pixels, text=question)])
            assert (row[f"{name}_answer"], row[f"{name}_n_tokens"]) == (one.text, one.n_tokens)
