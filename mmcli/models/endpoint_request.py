"""A record -> the JSON of a chat completion request, as OpenAI-compatible servers read it."""

from __future__ import annotations

import base64
import io
import json
import wave
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from mmcli.core.errors import RowError
from mmcli.core.records import Audio, Modality, Payload, Sample, Video
from mmcli.models.options import Generation
from mmcli.models.prompts import Prompts, joint_modality

# Pictures of at most so many pixels are sent as PNG, which changes nothing: 200 ms and 2 MB of base64 a megapixel.
# Larger ones, which models shrink, as JPEG: 12 ms and 0.5 MB. On photos, 50 dB from the original, and 54 dB (the
# same as JPEGs that are decoded at reduced scale, which is 53) once shrunk to a side of 384.
LOSSLESS_PIXELS = 1024 * 1024
JPEG_QUALITY = 95
# What captions are asked for by default.
CAPTION_PROMPTS = {
    "image": "Describe this image.",
    "video": "Describe this video.",
    "audio": "Describe this sound.",
    "text": "Describe this text.",
}
# The field that holds one of `--choices` in the JSON that a server is asked for.
CHOICE_FIELD = "answer"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a request says beside its messages."""

    fields: Mapping[str, Any]

    @classmethod
    def of(cls, model: str, generation: Generation) -> Settings:
        """All that the Generation wants to be known."""
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
        return cls(fields)

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
        return str(self.fields["model"]) in complaint and "model" in complaint.lower()


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

    def record(self, media: Sequence[tuple[Modality, Payload]], variables: Sequence[Any]) -> tuple[Sample, ...]:
        """One request for each question: the system's message, then one of the user: the media and the question."""
        modality = joint_modality(media)
        parts = [part for kind, payload in media for part in self._parts(kind, payload)]
        system = self._prompts.system(variables)
        before = [] if system is None else [{"role": "system", "content": system}]
        return tuple(
            Sample(modality, {"request": _array([*before, _user(parts, self._asked(prompt, media))])})
            for prompt in self._prompts.render(variables)
        )

    def _parts(self, modality: Modality, payload: Payload) -> Iterator[dict[str, Any]]:
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

    def _asked(self, prompt: str | None, media: Sequence[tuple[Modality, Payload]]) -> str:
        """The prompt, and how to answer: not every server tells its model of the form that it asks for."""
        text = CAPTION_PROMPTS[media[0][0]] if prompt is None else prompt
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


def _user(parts: Sequence[dict[str, Any]], prompt: str) -> dict[str, Any]:
    content: Any = [*parts, {"type": "text", "text": prompt}]
    if all(part["type"] == "text" for part in parts):
        # Servers of text models may know no parts.
        content = "\n\n".join(part["text"] for part in content)
    return {"role": "user", "content": content}


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
