"""Decoded media and a question -> the model inputs of a chat model, in a decode worker."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from mmcli.core.errors import ConfigError, ModelError, RowError, one_line
from mmcli.core.records import Media, Modality, Payload, Sample, Video
from mmcli.core.template import Template
from mmcli.models.chat import TOKEN_FILL, Chat
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.conversation import Conversation, Texts
from mmcli.models.facts import max_positions
from mmcli.models.inputs import MAX_RESIZED_PIXELS, open_tokenizer
from mmcli.models.options import Example
from mmcli.models.plan import GenerationPlan
from mmcli.models.prompts import Prompts, default_prompt, joint_modality

if TYPE_CHECKING:
    import numpy as np

Decoded = tuple[Modality, Payload]
# The prompts that PaliGemma was trained with; other questions are asked as "answer en QUESTION".
PALIGEMMA_CAPTION = "caption en"
_PALIGEMMA_TASKS = ("caption ", "cap ", "describe ", "answer ", "question ", "detect ", "segment ", "ocr")
# Solved examples that are kept decoded, where each record has its own.
_KEPT_EXAMPLES = 64
# A clip's frames are numbered by this clock, so that its times are exact whatever its frame rate.
_CLOCK_HZ = 1000
# What no processor counts as input of the model.
_UNUSED = frozenset(["labels"])


@dataclass(frozen=True, slots=True)
class Turn:
    """One question with its media, and its answer; None for that which is wanted.

    question, answer  a text, or several parts of one
    places            before which part of the question each medium stands; all before the first where none is said
    """

    media: Sequence[Decoded]
    question: str | Texts
    answer: str | Texts | None = None
    places: Sequence[int] = ()


class ChatProcessor:
    """See mmcli.core.protocols.RecordProcessor: one Sample for each question."""

    def __init__(self, plan: GenerationPlan) -> None:
        row: Chat = plan.detail
        self._checkpoint, self._row, self._generation = plan.checkpoint, row, plan.generation
        self._kind: str = plan.checkpoint.config.model_type
        self._prompts = Prompts(plan.generation)
        self._positions = max_positions(plan.checkpoint.config.get_text_config())
        self._native = "video" in row.takes
        self.processor: Any = (
            open_tokenizer(plan.checkpoint) if row.form == "text" else open_chat_processor(plan.checkpoint)
        )
        self.tokenizer: Any = getattr(self.processor, "tokenizer", self.processor)
        self._control = control_tokens(self.processor)
        if len(plan.generation.prompts) > 1:
            for part in ("image_processor", "video_processor", "feature_extractor"):
                if hasattr(self.processor, part):
                    setattr(self.processor, part, _Once(getattr(self.processor, part)))
        self._shortest = _shortest_edge(getattr(self.processor, "image_processor", None))
        self._shots: Callable[[Example], Sequence[Decoded]] = lambda example: ()

    def show(self, decode: Callable[[Media], Decoded]) -> None:
        """How the media of solved examples are decoded; those that all records are shown are decoded at once.

        Raises ModelError for an example that cannot be decoded.
        """

        def decoded(number: int) -> tuple[Decoded, ...]:
            try:
                return tuple(decode(one) for one in self._generation.examples[number].media)
            except RowError as error:
                raise RowError(error.code, f"--examples: row {number + 1}: {error.message}") from error

        numbers = {id(example): number for number, example in enumerate(self._generation.examples)}
        kept = lru_cache(_KEPT_EXAMPLES if self._generation.chosen else None)(decoded)
        self._shots = lambda example: kept(numbers[id(example)])
        if not self._generation.chosen:
            try:
                for example in self._generation.examples:
                    self._shots(example)
            except RowError as error:
                raise ModelError(error.message) from error

    def record(self, media: Sequence[Decoded], variables: Sequence[Any]) -> tuple[Sample, ...]:
        """One Sample for each question, or for a conversation. Raises RowError."""
        conversation = self._prompts.conversation(variables)
        if conversation is not None:
            arrays = self.arrays(conversation.system, self._turns(conversation, media))
            return (self._sample(joint_modality(media), arrays),)
        prompts = self._prompts.render(variables)
        system = self._prompts.system(variables)
        examples = self._prompts.examples(variables)
        shots = [(self.ready(self._shots(example)), example) for example in examples]
        ready = self.ready(media)
        samples = []
        for prompt in prompts:
            question = self._question(prompt, media)
            turns = [Turn(shown, one.question or question, one.answer) for shown, one in shots]
            arrays = self.arrays(system, [*turns, Turn(ready, question)])
            samples.append(self._sample(joint_modality(media), arrays))
        return tuple(samples)

    # -------------------------------------------------------------------------------------- what is asked

    def _turns(self, conversation: Conversation, media: Sequence[Decoded]) -> list[Turn]:
        """The conversation with the media, which belong to its first question. Raises RowError."""
        self._check_system(conversation.system)
        ready: list[Decoded] = []
        places: list[int] = []
        for one, place in conversation.placed(media):
            # A clip may be several pictures.
            shown = self.ready([one])
            ready += shown
            places += [place] * len(shown)
        self._check_sizes(ready)
        first, *others = conversation.questions
        answers: list[Texts | None] = [*conversation.answers, None]
        return [
            Turn(ready, first, answers[0], places),
            *(Turn((), asked, answer) for asked, answer in zip(others, answers[1:], strict=True)),
        ]

    def _check_system(self, system: Texts | None) -> None:
        if system is not None and self._row.form in ("chat", "text") and (why := self._without_system) is not None:
            raise RowError("bad_row", why)

    @cached_property
    def _without_system(self) -> str | None:
        """Why the chat template takes no system message; None: it takes one."""
        try:
            self._check_template("the system message", "mmclisystem", [Turn((), "mmcliquestion")], "mmclisystem")
        except ConfigError as error:
            return error.problems[0]
        return None

    def _question(self, prompt: str | None, media: Sequence[Decoded]) -> str:
        if self._row.form == "paligemma":
            if prompt is None:
                return PALIGEMMA_CAPTION
            known = self._generation.task == "caption" or prompt.lower().startswith(_PALIGEMMA_TASKS)
            return prompt if known else f"answer en {prompt}"
        return prompt or default_prompt(media)

    def _plain(self, text: str) -> str:
        """`text` itself. Raises RowError for one that holds a token which means something to the model."""
        found = self._control.search(text)
        if found:
            raise RowError(
                "bad_row", f"the text holds {found[0]!r}, which is no text for this model but one of its own tokens"
            )
        return text

    def ready(self, media: Sequence[Decoded]) -> list[Decoded]:
        """Pictures as PIL's, whose axes are never mistaken; clips as pictures for models without clips."""
        from PIL import Image

        ready: list[Decoded] = []
        for modality, payload in media:
            if modality == "image":
                ready.append((modality, Image.fromarray(payload)))
            elif modality == "video" and not self._native:
                ready += [("image", Image.fromarray(frame)) for frame in payload.frames]
            else:
                ready.append((modality, payload))
        self._check_sizes(ready)
        return ready

    def _check_sizes(self, media: Sequence[Decoded]) -> None:
        pictures = [payload for modality, payload in media if modality == "image"]
        several = len(pictures) > 1 or bool(self._generation.examples)
        for picture in pictures:
            width, height = picture.size
            resized = self._shortest**2 * max(height, width) / min(height, width)
            squared = max(height, width) ** 2 if self._row.square and several else 0
            if max(resized, squared) > MAX_RESIZED_PIXELS:
                raise RowError("too_large", f"{width} x {height} pixels: too narrow to be made a square")

    # -------------------------------------------------------------------------------------- model inputs

    def arrays(self, system: str | Texts | None, turns: Sequence[Turn]) -> dict[str, np.ndarray]:
        """Model inputs by name, with a batch axis of one."""
        from jinja2 import TemplateError

        form = {
            "chat": self._by_template,
            "text": self._by_template,
            "paligemma": self._task,
            "idefics": self._cards,
        }
        try:
            found = form[self._row.form](system, turns)
        except TemplateError as error:
            raise RowError("bad_row", f"the model's chat template does not take this: {error}") from error
        except (ValueError, TypeError, IndexError) as error:
            raise RowError("unsupported_format", f"the model's processor does not take this: {error}") from error
        return {n: v.numpy() for n, v in found.items() if hasattr(v, "numpy") and n not in _UNUSED}

    def _by_template(self, system: str | Texts | None, turns: Sequence[Turn]) -> Mapping[str, Any]:
        messages = self.messages(system, turns)
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        if self._row.form == "text":
            return dict(self.processor.apply_chat_template(messages, **options))
        videos = [payload for turn in turns for modality, payload in turn.media if modality == "video"]
        settings = _clip_settings(videos) if videos else {}
        return dict(self.processor.apply_chat_template(messages, processor_kwargs=settings, **options))

    def messages(self, system: str | Texts | None, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """The turns as chat templates take them. Raises RowError."""
        messages = [] if system is None else [self._message("system", system)]
        for turn in turns:
            places = turn.places or [0] * len(turn.media)
            shown = [one for one in zip(turn.media, places, strict=True) if one[0][0] != "text"]
            messages.append(self._message("user", _asked(turn), shown))
            if turn.answer is not None:
                messages.append(self._message("assistant", turn.answer))
        return messages

    def _message(self, role: str, text: str | Texts, media: Sequence[tuple[Decoded, int]] = ()) -> dict[str, Any]:
        """`media`: with the part of the text that each stands before."""
        texts = (text,) if isinstance(text, str) else text
        # Of parts that are tokens together, too.
        self._plain("".join(texts))
        if self._row.form == "text":
            return {"role": role, "content": _lines(texts)}
        content: list[dict[str, Any]] = []
        for number, part in enumerate(texts):
            content += [_part(*one) for one, place in media if place == number]
            content.append({"type": "text", "text": part})
        content += [_part(*one) for one, place in media if place >= len(texts)]
        return {"role": role, "content": content}

    def _task(self, system: str | Texts | None, turns: Sequence[Turn]) -> Mapping[str, Any]:
        """PaliGemma: a picture and a task."""
        (turn,) = turns
        image = self.processor.image_token
        picture = next(payload for _, payload in turn.media)
        found: Mapping[str, Any] = self.processor(
            images=picture, text=image + self._plain(_lines(turn.question)), return_tensors="pt"
        )
        return found

    def _cards(self, system: str | Texts | None, turns: Sequence[Turn]) -> Mapping[str, Any]:
        """Idefics: texts and pictures in turns, as its model cards have them (the instructed one with ends)."""
        end = "<end_of_utterance>" if "<end_of_utterance>" in self.tokenizer.get_vocab() else ""
        parts: list[Any] = [] if system is None else [self._plain(_lines(system)) + "\n"]
        for turn in turns:
            if any(turn.places):
                raise RowError("bad_row", "the text stands before the picture; this model takes it behind")
            pictures = [payload for modality, payload in turn.media if modality == "image"]
            answer = "" if turn.answer is None else f" {self._plain(_lines(turn.answer))}{end}\n"
            parts += ["User:", *pictures, f"{self._plain(_lines(_asked(turn)))}{end}\nAssistant:{answer}"]
            if "://" in parts[-1] and " " not in parts[-1]:
                raise RowError("bad_row", "a URL is all of the question: the model's processor would fetch it")
        found: Mapping[str, Any] = self.processor(
            text=[parts], add_end_of_utterance_token=False, return_tensors="pt"
        )
        return found

    def _sample(self, modality: Modality, arrays: dict[str, np.ndarray]) -> Sample:
        tokens = arrays["input_ids"].shape[1]
        if self._positions is not None and tokens + self._generation.max_new_tokens > self._positions:
            raise RowError(
                "too_large",
                f"the prompt has {tokens} tokens; with --max-new-tokens {self._generation.max_new_tokens} "
                f"they are more than the {self._positions} that the model has room for",
            )
        padded = self._row.padded
        shapes = [
            (name, () if name in padded or name in TOKEN_FILL else array.shape[1:])
            for name, array in sorted(arrays.items())
        ]
        # Rows of a batch stand one behind the other; each token array is that of one row.
        rows = {name: array[0] if name in TOKEN_FILL else array for name, array in arrays.items()}
        return Sample(modality, rows, length=tokens, group=tuple(shapes))

    # -------------------------------------------------------------------------------------- at plan time

    def check(self) -> None:
        """Raise ConfigError for what every row would fail by: the template, and texts that no column changes."""
        self._check_texts()
        if self._row.form not in ("chat", "text"):
            return
        if not self.processor.chat_template:
            raise ConfigError(
                f"-m {self._checkpoint.id}: it has no chat template (chat_template.jinja), and model type "
                f"{self._kind!r} is not known by name"
            )
        probes = [Turn((), "mmcliquestion")]
        if self._generation.examples or self._generation.messages is not None:
            probes.insert(0, Turn((), "mmcliquestion", "mmclianswer"))
            flag = "--examples" if self._generation.examples else "--messages-column, earlier answers"
            self._check_template(flag, None, probes, "mmclianswer")
        if self._generation.system is not None:
            self._check_template("--system", "mmclisystem", probes, "mmclisystem")
        self._check_template("questions", None, probes, "mmcliquestion")

    def _check_template(self, option: str, system: str | None, turns: Sequence[Turn], probe: str) -> None:
        try:
            text = self.processor.apply_chat_template(
                self.messages(system, turns), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            reason = one_line(str(error))
            raise ConfigError(
                f"{option}: the chat template of {self._checkpoint.id} takes none: {reason}"
            ) from error
        if probe not in text:
            raise ConfigError(f"{option}: the chat template of {self._checkpoint.id} leaves them out")

    def _check_texts(self) -> None:
        asked = [*self._generation.prompts, self._generation.system]
        fixed = [text for text in asked if text is not None and not Template.parse(text).columns]
        shown = [text for one in self._generation.examples for text in (one.question, one.answer) if text]
        for text in [*(Template.parse(text).render({}) for text in fixed), *shown]:
            if found := self._control.search(text):
                raise ConfigError(
                    f"{one_line(text, 80)!r} holds {found[0]!r}, one of the model's own tokens; "
                    "media and turns are put into the prompt for you"
                )


class _Once:
    """A part of a processor that gives its last output again for the same media: several questions, one picture.

    Of 3 questions about 640 x 480 pixels, Qwen2-VL's inputs take 16 instead of 33 ms.
    """

    def __init__(self, part: Any) -> None:
        self._part = part
        self._seen: tuple[Any, str] | None = None
        self._found: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def __call__(self, media: Any, *others: Any, **options: Any) -> Any:
        said = repr((others, options))
        if self._seen is None or not _same_objects(self._seen[0], media) or self._seen[1] != said:
            self._seen, self._found = (media, said), self._part(media, *others, **options)
        # Processors take out of it what the model does not want.
        return copy.copy(self._found)


def _same_objects(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same_objects, one, other))
    return one is other


def open_processor(plan: GenerationPlan) -> ChatProcessor:
    """What runs in the decode workers."""
    import torch

    torch.set_num_threads(1)
    return ChatProcessor(plan)


def open_chat_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's processor. Raises ModelError."""
    from transformers import AutoProcessor

    try:
        found = AutoProcessor.from_pretrained(checkpoint.directory, trust_remote_code=checkpoint.trust_remote_code)
    except Exception as error:
        # Damaged files, unknown classes, or a library that is not installed.
        reason = one_line(" ".join(str(error).split()))
        raise ModelError(f"-m {checkpoint.id}: cannot open its processor: {reason}") from error
    if not hasattr(found, "tokenizer"):
        raise ModelError(
            f"-m {checkpoint.id}: its processor is a {type(found).__name__} alone; "
            "are preprocessor_config.json and the tokenizer there?"
        )
    return found


def control_tokens(processor: Any) -> re.Pattern[str]:
    """What in a text would not be read as text: special tokens, and the places of media."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= {str(getattr(processor, f"{kind}_token", None) or "") for kind in ("image", "video", "audio")}
    # The longest first: <|im_start|> before anything that begins it.
    known = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, known)) or r"(?!)")


def _part(modality: Modality, payload: Payload) -> dict[str, Any]:
    if modality == "video":
        return {"type": modality, modality: payload.frames}
    return {"type": modality, modality: payload.waveform if modality == "audio" else payload}


def _asked(turn: Turn) -> Texts:
    """The record's texts, and the question below."""
    first, *others = (turn.question,) if isinstance(turn.question, str) else turn.question
    told = [payload for modality, payload in turn.media if modality == "text"]
    return ("\n\n".join([*told, first]), *others)


def _lines(text: str | Texts) -> str:
    """For models that take no parts."""
    return text if isinstance(text, str) else "\n".join(text)


def _clip_settings(videos: Iterable[Video]) -> dict[str, Any]:
    """What processors need to know of clips that are sampled already: when their frames are shown."""
    metadata = [
        {
            "total_num_frames": max(1, round(video.duration * _CLOCK_HZ)),
            "fps": float(_CLOCK_HZ),
            "duration": video.duration,
            "frames_indices": [round(float(time) * _CLOCK_HZ) for time in video.timestamps],
            "height": video.frames.shape[1],
            "width": video.frames.shape[2],
        }
        for video in videos
    ]
    return {
        "do_sample_frames": False,
        "video_metadata": metadata,
        "videos_kwargs": {"input_data_format": "channels_last"},
    }


def _shortest_edge(image_processor: Any) -> int:
    """To what the shorter side of a picture is resized, the other following; 0 where that is not so."""
    size = getattr(image_processor, "size", None) or {}
    if not getattr(image_processor, "do_resize", False) or size.get("longest_edge"):
        return 0
    return int(size.get("shortest_edge") or 0)
