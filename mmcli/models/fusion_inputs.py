"""Inputs of a MultimodalTransformer: which encoders it can have, records -> samples, samples -> batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from mmcli.core.errors import ConfigError, RowError
from mmcli.core.records import Audio, DecodeOptions, Modality, Payload, Sample, Video
from mmcli.models.checkpoint import PROCESSOR_FILES, Checkpoint
from mmcli.models.encoder import ENCODERS, audio_spec
from mmcli.models.facts import TOKENIZER_FILES, available, max_tokens, min_image_size, setting
from mmcli.models.options import ModelOptions
from mmcli.models.plan import Inputs, TextSpec, VideoSpec

MODEL_TYPE = "mmcli_multimodal"
# Of a picture or clip that stands for none: its shape tells whether all have one.
_BLANK_SIDES = (160, 224)
# Samples of a frame of speech, for the order of rows by length.
_FRAME = 320


@dataclass(frozen=True, slots=True)
class DualTower:
    """One side of a dual encoder. `kind`: its own model type; `padding`: of texts, as the type was trained."""

    model_class: str
    kind: str
    config: str
    padding: str = "longest"


# model_type of a dual encoder -> its towers that can serve as an encoder
TOWERS: dict[str, dict[Modality, DualTower]] = {
    "clip": {
        "text": DualTower("CLIPTextModel", "clip_text_model", "text_config"),
        "image": DualTower("CLIPVisionModel", "clip_vision_model", "vision_config"),
    },
    "siglip": {
        "text": DualTower("SiglipTextModel", "siglip_text_model", "text_config", "max_length"),
        "image": DualTower("SiglipVisionModel", "siglip_vision_model", "vision_config"),
    },
}


@dataclass(frozen=True, slots=True)
class Part:
    """An encoder's inputs. `checkpoint`: with its config.json, and its processor or tokenizer."""

    modality: Modality
    checkpoint: Checkpoint
    inputs: Inputs


def tower_config(checkpoint: Checkpoint, modality: Modality) -> Any:
    """The settings of a checkpoint's encoder of a modality. Raises ConfigError when it has none."""
    config = checkpoint.config
    kind = config.model_type
    towers = TOWERS.get(kind, {})
    if modality in towers:
        return getattr(config, towers[modality].config)
    row = ENCODERS.get(kind)
    if row is not None and row.modality == modality:
        return config
    known = sorted(name for name, one in ENCODERS.items() if one.modality == modality)
    known += sorted(name for name, sides in TOWERS.items() if modality in sides)
    raise ConfigError(
        f"--encoder {modality}={checkpoint.id}: a {kind} encodes no {modality} here; known are {', '.join(known)}"
    )


def part_of(checkpoint: Checkpoint, modality: Modality) -> Part:
    """How an encoder takes its modality. Raises ConfigError."""
    config = tower_config(checkpoint, modality)
    if not available(checkpoint, modality):
        what = "tokenizer" if modality == "text" else "preprocessor_config.json"
        raise ConfigError(
            f"--encoder {modality}={checkpoint.id}: it has no {what}, so nothing tells how it takes {modality}"
        )
    return Part(modality, checkpoint, _inputs(checkpoint, modality, config))


def _inputs(checkpoint: Checkpoint, modality: Modality, config: Any) -> Inputs:
    kind = checkpoint.config.model_type
    match modality:
        case "text":
            padded = modality in TOWERS.get(kind, {}) and TOWERS[kind][modality].padding == "max_length"
            return Inputs(text=TextSpec(max_tokens(checkpoint, config), "max_length" if padded else "longest"))
        case "image":
            return Inputs(image=True)
        case "audio":
            return Inputs(audio=audio_spec(checkpoint, ENCODERS[kind].exact))
        case "video":
            return Inputs(video=VideoSpec(int(setting(config, ENCODERS[kind].num_frames or "")), native=True))


def parts_of(encoders: Mapping[Modality, Checkpoint]) -> tuple[Part, ...]:
    """Those of all encoders, in this order. Raises ConfigError with every problem."""
    problems: list[str] = []
    found = []
    for modality, checkpoint in encoders.items():
        try:
            found.append(part_of(checkpoint, modality))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return tuple(found)


def all_inputs(parts: Sequence[Part]) -> Inputs:
    """What all encoders take together."""
    of = {part.modality: part.inputs for part in parts}
    return Inputs(
        text=of["text"].text if "text" in of else None,
        image="image" in of,
        audio=of["audio"].audio if "audio" in of else None,
        video=of["video"].video if "video" in of else None,
    )


def decode_options(parts: Sequence[Part], options: ModelOptions) -> DecodeOptions:
    """What all encoders need from the decoder."""
    inputs = all_inputs(parts)
    pictures = next((part.checkpoint for part in parts if part.modality == "image"), None)
    return DecodeOptions(
        modalities=inputs.modalities,
        min_image_size=None if pictures is None else min_image_size(pictures),
        exact_decode=options.exact_decode,
        sampling_rate=inputs.audio.sampling_rate if inputs.audio else None,
        num_frames=inputs.video.num_frames if inputs.video else options.frames,
    )


class FusionProcessor:
    """All media of a record -> one Sample (see mmcli.core.protocols.RecordProcessor).

    Its arrays are `present` bool [M], in the order of the parts, and `image.pixel_values` and so on of the media
    that the record has. Its modality is that of all of them ("image+text"); its group the shapes of pictures and
    clips where these are not the usual ones.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        from mmcli.models.inputs import InputProcessor

        self._processors = {part.modality: InputProcessor(part.checkpoint, part.inputs) for part in parts}
        pictures = [part for part in parts if part.modality in ("image", "video")]
        self._usual = {part.modality: _shapes(self._made(part.modality, blank_payload(part))) for part in pictures}

    def record(self, media: Sequence[tuple[Modality, Payload]], variables: Sequence[Any]) -> tuple[Sample, ...]:
        """One Sample. A payload of None: the record has none. Raises RowError."""
        made = {modality: self._made(modality, payload) for modality, payload in media if payload is not None}
        if not made:
            raise RowError("bad_row", "this row has no media", "source")
        arrays: dict[str, np.ndarray] = {"present": np.array([m in made for m in self._processors])}
        length, cost, unusual = 0, 1, []
        for modality, sample in made.items():
            arrays |= {f"{modality}.{name}": array for name, array in sample.arrays.items()}
            length += sample.length // _FRAME if modality == "audio" else sample.length
            cost += sample.cost - 1
            if modality in self._usual and _shapes(sample) != self._usual[modality]:
                unusual.append((modality, _shapes(sample)))
        # The row's modality in the output, and what shares a batch.
        kind = cast(Modality, "+".join(made))
        return (Sample(kind, arrays, length, tuple(unusual), cost),)

    def blank(self, part: Part) -> dict[str, np.ndarray]:
        """Model inputs of nothing: for an encoder that runs although no row has its modality."""
        made = self._made(part.modality, blank_payload(part))
        return {f"{part.modality}.{name}": array for name, array in made.arrays.items()}

    def _made(self, modality: Modality, payload: Payload) -> Sample:
        sample = self._processors[modality](modality, payload)
        wave = sample.arrays.get("input_values")
        if wave is not None and wave.ndim == 1 and "attention_mask" not in sample.arrays:
            # Where it ends: batches are padded. What cannot be masked is cut there (mmcli.models.fusion).
            sample.arrays["attention_mask"] = np.ones(len(wave), dtype=np.int64)
        return sample


def blank_payload(part: Part) -> Payload:
    """A medium of nothing: a black picture, silence."""
    height, width = _BLANK_SIDES
    if part.modality == "text":
        return "a"
    if part.modality == "image":
        return np.zeros((height, width, 3), dtype=np.uint8)
    if part.inputs.audio is not None:
        rate = part.inputs.audio.sampling_rate
        return Audio(np.zeros(max(rate // 4, part.inputs.audio.min_samples), dtype=np.float32), rate)
    assert part.inputs.video is not None
    frames = part.inputs.video.num_frames
    return Video(np.zeros((frames, height, width, 3), dtype=np.uint8), np.arange(frames) / 25, frames / 25)


def _shapes(sample: Sample) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape for array in sample.arrays.values())


def encoder_files(checkpoint: Checkpoint) -> list[str]:
    """Names of a checkpoint's files that say how it takes inputs."""
    names = dict.fromkeys(["config.json", *PROCESSOR_FILES, *TOKENIZER_FILES])
    return [name for name in names if "/" not in name and (checkpoint.directory / name).is_file()]
