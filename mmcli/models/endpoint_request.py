"""A record -> the JSON of a chat completion request, as OpenAI-compatible servers read it."""

from __future__ import annotations

import base64
import io
import json
import re
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from mmcli.core.errors import ModelError, RowError
from mmcli.core.records import Audio, Media, Modality, Payload, Sample, Video
from mmcli.models.conversation import Conversation
from mmcli.models.options import Generation
from mmcli.models.prompts import Prompts, default_prompt, joint_modality

# Pictures of at most so many pixels are sent as PNG, which changes nothing: 200 ms and 2 MB of base64 a megapixel.
# Larger ones, which models shrink, as JPEG: 12 ms and 0.5 MB. On photos, 50 dB from the original, and 54 dB (the
# same as JPEGs that are decoded at reduced scale, which is 53) once shrunk to a side of 384.
LOSSLESS_PIXELS = 1024 * 1024
JPEG_QUALITY = 95
# Media of solved examples that are kept as they are sent, where each record has its own.
_KEPT_EXAMPLES = 64
# The field that holds one of `--choices` in the JSON that a server is asked for.
CHOICE_FIELD = "answer"

Decoded = tuple[Modality, Payload]
# A part of a message: {"type": "text", ...}
Part = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a request says beside its messages."""

    fields: Mapping[str, Any]

    @classmethod
    def of(cls, model: str, generation: Generation, extra: Mapping[str, Any]) -> Settings:
        """All that the Generation wants to be known, and `extra`: None takes a field out."""
        fields: dict[str, Any] = {
            "model": model,
            "max_tokens": generation.max_new_tokens,
            "temperature": generation.temperature,
            "logprobs": True,
        }
        if generation.temperature > 0:
            fields["seed"] = generation.seed
        if (schema := answer_schema(generation)) is not None:
            form = {"name": CHOICE_FIELD, "schema": schema, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": form}
        fields |= extra
        return cls({name: value for name, value in fields.items() if value is not None})

    def body(self, messages: bytes) -> bytes:
        """The JSON of a request, of that of its messages."""
        return orjson.dumps(dict(self.fields))[:-1] + b',"messages":' + messages + b"}"

    def conceded(self, status: int, complaint: str) -> Settings | None:
        """What to ask of a server that refuses this: less of what not all servers know; None: nothing is left.

        First what the complaint names. Where it names nothing, a refusal (400, 422) may mean any of it.
        """
        steps = list(self._steps())
        low = complaint.lower()
        named = [fields for words, fields in steps if any(word in low for word in words)]
        guessed = [fields for words, fields in steps if words[0] != "max_tokens" and words[0] != "seed"]
        found = named or (guessed if status in (400, 422) else [])
        return Settings(found[0]) if found else None

    def _steps(self) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
        """(words of a complaint, what to ask then)"""
        fields = dict(self.fields)
        if "logprobs" in fields:
            yield ("logprob",), _without(fields, "logprobs")
        form = fields.get("response_format")
        if form is not None:
            words = ("response_format", "json_schema", "schema", "structured", "guided", "grammar", "strict")
            yield words, _looser(fields)
        if "max_tokens" in fields:
            yield ("max_tokens",), {**_without(fields, "max_tokens"), "max_completion_tokens": fields["max_tokens"]}
        if "seed" in fields:
            yield ("seed",), _without(fields, "seed")

    def names_model(self, complaint: str) -> bool:
        """Whether a complaint is about the model's name."""
        name = re.escape(str(self.fields["model"]))
        return "model" in complaint.lower() and re.search(rf"(?<!\w){name}(?!\w)", complaint) is not None


def answer_schema(generation: Generation) -> Any:
    """The JSON Schema of the wanted answer; None for free text."""
    if generation.schema is not None:
        return orjson.loads(generation.schema)
    if not generation.choices:
        return None
    return {
        "type": "object",
        "properties": {CHOICE_FIELD: {"type": "string", "enum": list(generation.choices)}},
        "required": [CHOICE_FIELD],
        "additionalProperties": False,
    }


class EndpointProcessor:
    """See mmcli.core.protocols.RecordProcessor: `request`: uint8 [bytes], the JSON of a request's messages."""

    def __init__(self, generation: Generation, lossless: bool) -> None:
        self._generation, self._lossless = generation, lossless
        self._prompts = Prompts(generation)
        self._shown: Callable[[int], list[Part]] = lambda number: []

    def show(self, decode: Callable[[Media], Decoded]) -> None:
        """How the media of solved examples are decoded. Raises ModelError for one that cannot be."""

        def shown(number: int) -> list[Part]:
            return self._all_parts([decode(one) for one in self._generation.examples[number].media])

        self._shown = lru_cache(_KEPT_EXAMPLES)(shown)
        if not self._generation.chosen:
            # All records are shown all: while they are few, once and for all, and errors at once.
            self._shown = [
                self._checked(shown, number) for number in range(len(self._generation.examples))
            ].__getitem__

    def record(self, media: Sequence[Decoded], variables: Sequence[Any]) -> tuple[Sample, ...]:
        """One request for each question: the system's message, solved examples, the media and the question.

        Or one for a conversation.
        """
        conversation = self._prompts.conversation(variables)
        if conversation is not None:
            said = self._said(conversation, media)
            return (Sample(joint_modality(media), {"request": _array(list(said))}),)
        modality, parts = joint_modality(media), self._all_parts(media)
        system = self._prompts.system(variables)
        before = [] if system is None else [{"role": "system", "content": system}]
        samples = []
        for prompt in self._prompts.render(variables):
            question = default_prompt(media) if prompt is None else prompt
            turns = [turn for number in self._numbers(variables) for turn in self._turns(number, question)]
            messages = [*before, *turns, _user(parts, self._told(question))]
            samples.append(Sample(modality, {"request": _array(messages)}))
        return tuple(samples)

    def _said(self, conversation: Conversation, media: Sequence[Decoded]) -> Iterator[dict[str, Any]]:
        """The messages of a conversation, with the media in the first question."""
        if conversation.system is not None:
            yield {"role": "system", "content": "\n".join(conversation.system)}
        placed = conversation.placed(media)
        for number, question in enumerate(conversation.questions):
            texts = list(question)
            if number == len(conversation.answers):
                texts[-1] = self._told(texts[-1])
            parts: list[Part] = []
            for place, text in enumerate([*texts, None]):
                shown = [one for one, before in placed if before == place and not number]
                parts += self._all_parts(shown)
                parts += [] if text is None else [{"type": "text", "text": text}]
            yield {"role": "user", "content": _content(parts)}
            if number < len(conversation.answers):
                yield {"role": "assistant", "content": "\n".join(conversation.answers[number])}

    def _checked(self, shown: Callable[[int], list[Part]], number: int) -> list[Part]:
        try:
            return shown(number)
        except RowError as error:
            raise ModelError(f"--examples: row {number + 1}: {error.code}: {error.message}") from error

    def _numbers(self, variables: Sequence[Any]) -> Sequence[int]:
        """Which of the Generation's examples a record is shown."""
        return variables[-1] if self._generation.chosen else range(len(self._generation.examples))

    def _turns(self, number: int, question: str) -> Iterator[dict[str, Any]]:
        """A solved example, as a question and its answer."""
        example = self._generation.examples[number]
        yield _user(self._shown(number), self._told(example.question or question))
        answer = json.dumps({CHOICE_FIELD: example.answer}, ensure_ascii=False)
        yield {"role": "assistant", "content": answer if self._generation.choices else example.answer}

    def _all_parts(self, media: Sequence[Decoded]) -> list[Part]:
        return [part for modality, payload in media for part in self._parts(modality, payload)]

    def _parts(self, modality: Modality, payload: Payload) -> Iterator[Part]:
        if isinstance(payload, str):
            yield {"type": "text", "text": payload}
        elif isinstance(payload, Audio):
            yield {"type": "input_audio", "input_audio": {"data": _base64(wav(payload)), "format": "wav"}}
        elif isinstance(payload, Video):
            for frame in payload.frames:
                yield from self._parts("image", frame)
        else:
            kind, data = picture(payload, self._lossless)
            yield {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{_base64(data)}"}}

    def _told(self, text: str) -> str:
        """A question, and how to answer: not every server tells its model of the form that it is asked for."""
        if self._generation.choices:
            names = ", ".join(json.dumps(choice, ensure_ascii=False) for choice in self._generation.choices)
            return f'{text}\nAnswer in JSON: {{"{CHOICE_FIELD}": ...}}, where ... is one of: {names}.'
        if self._generation.schema is not None:
            return f"{text}\nAnswer in JSON that this JSON Schema allows: {self._generation.schema}"
        return text


def picture(pixels: np.ndarray, lossless: bool) -> tuple[str, bytes]:
    """uint8 [H, W, 3] -> ("png" or "jpeg", the encoded picture)."""
    from PIL import Image

    image, file = Image.fromarray(pixels), io.BytesIO()
    if lossless or pixels.shape[0] * pixels.shape[1] <= LOSSLESS_PIXELS:
        # Level 6 saves another 5 % in three times the time.
        image.save(file, "PNG", compress_level=1)
        return "png", file.getvalue()
    # No chroma subsampling: 3 dB more on coloured edges for a quarter more bytes.
    image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "jpeg", file.getvalue()


def wav(sound: Audio) -> bytes:
    """A WAV file of 16 bits a sample, at the sound's own rate."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(sound.sampling_rate)
        # As decoded: integers were divided by 2^15.
        writer.writeframes(np.clip(np.rint(sound.waveform * 32768), -32768, 32767).astype("<i2").tobytes())
    return file.getvalue()


def _user(parts: Sequence[Part], prompt: str) -> dict[str, Any]:
    return {"role": "user", "content": _content([*parts, {"type": "text", "text": prompt}])}


def _content(parts: Sequence[Part]) -> Any:
    if all(part["type"] == "text" for part in parts):
        # Servers of text models may know no parts.
        return "\n\n".join(part["text"] for part in parts)
    return parts


def _array(messages: list[dict[str, Any]]) -> np.ndarray:
    try:
        return np.frombuffer(orjson.dumps(messages), np.uint8)
    except orjson.JSONEncodeError as error:
        # Lone surrogates: no JSON can hold them.
        raise RowError("bad_row", f"a text that is not Unicode: {error}", stage="source") from error


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


def _looser(fields: dict[str, Any]) -> dict[str, Any]:
    """A response format that more servers take; then none."""
    form = fields["response_format"]
    inner = form.get("json_schema")
    if inner is not None and inner.get("strict"):
        # OpenAI's strict mode takes but some schemas.
        loose = {**form, "json_schema": _without(inner, "strict")}
    elif inner is not None:
        loose = {"type": "json_object"}
    else:
        return _without(fields, "response_format")
    return {**fields, "response_format": loose}
