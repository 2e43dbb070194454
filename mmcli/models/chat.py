"""The family *chat*: pictures, clips, sounds and texts in, a text out, by the checkpoint's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from mmcli.core.errors import ConfigError
from mmcli.core.records import DecodeOptions, Modality
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.facts import max_positions, min_image_size, sampling_rate
from mmcli.models.options import Generation, ModelOptions, Task
from mmcli.models.plan import AudioSpec, GenerationPlan, Inputs, TextSpec, VideoSpec

if TYPE_CHECKING:
    import torch

    from mmcli.models.generate import Writer

FAMILY = "chat"
# With what arrays that have an entry for each token are padded; input_ids with the tokenizer's padding.
TOKEN_FILL = {
    "input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0, "image_attention_mask": 0,
}  # fmt: skip
# Models that transformers knows as image-text-to-text, and that have no turns.
_NO_CHAT = frozenset(
    [
        "blip", "blip-2", "git", "florence2", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5",
        "pix2struct", "vision-encoder-decoder", "udop", "got_ocr2",
    ]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chat:
    """How a model type is talked to.

    model_class  the transformers class
    takes        modalities that its processor takes; clips are native where "video" is among them
    form         "chat": by the template of its processor; "text": by that of its tokenizer; "paligemma": a picture
                 and one of its tasks; "idefics": turns as the model card writes them
    several      whether a prompt may hold several media: solved examples, clips as pictures
    fixed        pictures are resized to one size, whatever theirs
    square       several pictures are each padded to a square first
    padded       arrays that are padded with zeros where those of a batch differ
    tried        nothing is known about this type: how its arrays are batched is found out by trying
    """

    model_class: str
    takes: tuple[Modality, ...]
    form: Literal["chat", "text", "paligemma", "idefics"] = "chat"
    several: bool = True
    fixed: bool = False
    square: bool = False
    padded: frozenset[str] = frozenset()
    tried: bool = False

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What records may hold; a model of several pictures sees those of a clip."""
        by_frames = "image" in self.takes and "video" not in self.takes and self.several
        return (*self.takes, "video") if by_frames else self.takes


_PICTURES: tuple[Modality, ...] = ("text", "image")
_CLIPS: tuple[Modality, ...] = ("text", "image", "video")
# Tiles of pictures (LLaVA-NeXT: [n, tiles, 3, H, W]), or pictures of a row (Idefics: [1, n, 3, H, W]).
_TILES = frozenset(["pixel_values", "pixel_attention_mask"])

# model_type of config.json -> how it is talked to
CHATS = {
    "idefics": Chat("IdeficsForVisionText2Text", _PICTURES, "idefics", fixed=True, padded=_TILES),
    "idefics2": Chat("Idefics2ForConditionalGeneration", _PICTURES, padded=_TILES),
    "idefics3": Chat("Idefics3ForConditionalGeneration", _PICTURES, padded=_TILES),
    "llava": Chat("LlavaForConditionalGeneration", _PICTURES, fixed=True, padded=_TILES),
    "llava_next": Chat("LlavaNextForConditionalGeneration", _PICTURES, padded=_TILES),
    "llava_onevision": Chat("LlavaOnevisionForConditionalGeneration", _CLIPS, square=True, padded=_TILES),
    "paligemma": Chat("PaliGemmaForConditionalGeneration", ("image",), "paligemma", several=False, fixed=True),
    "qwen2_5_vl": Chat("Qwen2_5_VLForConditionalGeneration", _CLIPS),
    "qwen2_audio": Chat("Qwen2AudioForConditionalGeneration", ("text", "audio")),
    "qwen2_vl": Chat("Qwen2VLForConditionalGeneration", _CLIPS),
    "qwen3_vl": Chat("Qwen3VLForConditionalGeneration", _CLIPS),
    "smolvlm": Chat("SmolVLMForConditionalGeneration", _CLIPS, padded=_TILES),
}
_TEXT = Chat("AutoModelForCausalLM", ("text",), "text")
_UNKNOWN = Chat("AutoModelForImageTextToText", _PICTURES, tried=True)


def find(kind: str, architectures: Sequence[str], task: Task) -> Chat | None:
    """The row of a model type that can be talked to; one for all others that transformers knows as such."""
    if row := CHATS.get(kind):
        return row if not architectures or row.model_class in architectures else None
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    if kind in _NO_CHAT:
        return None
    for row, known in (
        (_UNKNOWN, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        (_TEXT, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ):
        if known.get(kind) in architectures:
            return row
    return None


def names(task: Task) -> Sequence[str]:
    """The model types that are known by name."""
    return tuple(CHATS)


def plan(
    checkpoint: Checkpoint, options: ModelOptions, dtype: str, row: Chat, generation: Generation
) -> GenerationPlan:
    """What `row` says about this checkpoint. Raises ConfigError, ModelError for a processor that does not open."""
    _check(checkpoint, options, row, generation)
    inputs = _inputs(checkpoint, options, row)
    decode = DecodeOptions(
        modalities=inputs.modalities,
        # Types that cut pictures into tiles, or keep their size, look at the size of the picture itself.
        min_image_size=min_image_size(checkpoint) if row.fixed else None,
        exact_decode=options.exact_decode,
        num_frames=options.frames,
    )
    if inputs.audio is not None:
        # Its extractor would leave out the rest without a word.
        longest = checkpoint.processor_json("feature_extractor").get("chunk_length", 30)
        decode = replace(decode, sampling_rate=inputs.audio.sampling_rate, max_seconds=float(longest))
    wanted = GenerationPlan(
        checkpoint=checkpoint,
        family=FAMILY,
        processor="mmcli.models.chat_inputs:open_processor",
        loader="mmcli.models.chat:load",
        detail=row,
        inputs=inputs,
        decode=decode,
        dtype=dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        compile=False,
        generation=generation,
    )
    from mmcli.models.chat_inputs import ChatProcessor

    processor = ChatProcessor(wanted)
    processor.check()
    if row.tried:
        from mmcli.models.chat_unknown import padded_arrays

        wanted = replace(wanted, detail=replace(row, padded=padded_arrays(processor, checkpoint)))
    return wanted


def _check(checkpoint: Checkpoint, options: ModelOptions, row: Chat, generation: Generation) -> None:
    """Raise ConfigError for what can be seen without opening the processor."""
    kind = checkpoint.config.model_type
    problems = []
    if options.compile:
        problems.append("--compile is not for answers: the length of what is generated changes at every step")
    if generation.system is not None and row.form == "paligemma":
        problems.append(f"--system: a {kind} has no turns, and takes no system message; leave it out")
    if generation.messages is not None and row.form == "paligemma":
        problems.append(f"--messages-column: a {kind} has no turns; ask with -q or --question-column")
    if generation.examples and not row.several:
        problems.append(f"--examples: a {kind} takes one picture and no other turns; leave them out")
    positions = max_positions(checkpoint.config.get_text_config())
    if positions is not None and generation.max_new_tokens >= positions:
        problems.append(
            f"-m {checkpoint.id} has room for {positions} tokens, prompt and answer together; "
            f"--max-new-tokens {generation.max_new_tokens} leaves none for the prompt"
        )
    if problems:
        raise ConfigError(problems)


def _inputs(checkpoint: Checkpoint, options: ModelOptions, row: Chat) -> Inputs:
    audio = AudioSpec("fixed", sampling_rate(checkpoint)) if "audio" in row.takes else None
    return Inputs(
        text=TextSpec(None) if "text" in row.takes else None,
        image="image" in row.takes,
        audio=audio,
        video=VideoSpec(options.frames, "video" in row.takes) if "video" in row.modalities else None,
    )


class _Others:
    """The names of all arrays but those that have an entry for each token."""

    def __contains__(self, name: object) -> bool:
        return name not in TOKEN_FILL


def load(plan: GenerationPlan, device: torch.device) -> Writer:
    """The loaded model and what its texts end with."""
    import transformers

    from mmcli.models.generate import Writer
    from mmcli.models.inputs import open_tokenizer
    from mmcli.models.runner import load_model

    row: Chat = plan.detail
    model = load_model(getattr(transformers, row.model_class), plan, device, makes="answers")
    tokenizer = open_tokenizer(plan.checkpoint)
    settings = model.generation_config
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    ends = settings.eos_token_id
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    padding = next((i for i in (tokenizer.pad_token_id, settings.pad_token_id, *known) if i is not None), 0)
    return Writer(
        generate=model.generate,
        ends=tuple(known),
        forced=False,
        decode=lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)).strip(),
        fill={**TOKEN_FILL, "input_ids": padding},
        joined=_Others(),
    )
