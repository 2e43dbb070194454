"""The family *captioner*: a picture in, and a prompt or question where it takes one; a text out.

BLIP, BLIP-2, InstructBLIP, GIT, VisionEncoderDecoder and Florence-2. Models that choose among known answers are in
mmcli.models.vqa.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

from mmcli.core.errors import ConfigError, ModelError, RowError, one_line
from mmcli.core.records import DecodeOptions, Modality, Payload, Sample
from mmcli.core.template import Template
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.facts import OUTPUTS, available, max_positions, min_image_size, reject_chat, setting
from mmcli.models.options import Generation, ModelOptions, Task
from mmcli.models.plan import GenerationPlan, Inputs
from mmcli.models.prompts import Prompts

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mmcli.models.generate import Writer

FAMILY = "captioner"
# Tasks of Florence-2 whose answer is a text; the others give boxes.
FLORENCE_TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>", "<OCR>")
_TEXT_INPUTS = ("input_ids", "attention_mask", "qformer_input_ids", "qformer_attention_mask")


@dataclass(frozen=True, slots=True)
class Captioner:
    """How a model type writes captions or answers.

    model_class  the transformers class
    prompt       "prefix": the text goes on from it; "bare": likewise, without the tokenizer's end token;
                 "encoder": it is read apart, by an encoder, and has places of its own;
                 "task": one of FLORENCE_TASKS; None: it takes none
    default      the prompt where none is given
    question     what a question becomes, `Question: {} Answer:`, unless it ends in `answer:` already
    generator    where in the model the part is whose `generate` runs ("" is the model itself)
    text_config  where config.json has its settings
    """

    model_class: str
    prompt: Literal["prefix", "bare", "encoder", "task"] | None
    default: str | None = None
    question: str | None = None
    generator: str = ""
    text_config: str = "text_config"


# BLIP-2's question is worded as for OPT in its paper (Li et al. 2023, section 4.1) and in the documentation of
# transformers; InstructBLIP's caption as in LAVIS (projects/instructblip/caption_*_eval.yaml). GIT-VQA goes on from
# the question itself, as its model card has it.
_BLIP_2 = Captioner("Blip2ForConditionalGeneration", "prefix", generator="language_model")
_GIT = Captioner("GitForCausalLM", "bare", text_config="")
_INSTRUCT_BLIP = Captioner(
    "InstructBlipForConditionalGeneration", "prefix", "A short image caption.", generator="language_model"
)

# Task -> model_type of config.json -> how it is called.
CAPTIONERS: dict[Task, dict[str, Captioner]] = {
    "caption": {
        "blip": Captioner("BlipForConditionalGeneration", "prefix", generator="text_decoder"),
        "blip-2": _BLIP_2,
        "florence2": Captioner("Florence2ForConditionalGeneration", "task", FLORENCE_TASKS[0]),
        "git": _GIT,
        "instructblip": _INSTRUCT_BLIP,
        "vision-encoder-decoder": Captioner("VisionEncoderDecoderModel", None, text_config="decoder"),
    },
    "ask": {
        "blip": Captioner("BlipForQuestionAnswering", "encoder", generator="text_decoder"),
        "blip-2": replace(_BLIP_2, question="Question: {} Answer:"),
        "git": _GIT,
        "instructblip": _INSTRUCT_BLIP,
    },
}


def find(kind: str, architectures: Sequence[str], task: Task) -> Captioner | None:
    """The row of a model type that writes captions or answers, if the checkpoint was saved as its class."""
    row = CAPTIONERS[task].get(kind)
    return row if row is not None and (not architectures or row.model_class in architectures) else None


def names(task: Task) -> Sequence[str]:
    """The model types that write captions or answers."""
    return tuple(CAPTIONERS[task])


def plan(
    checkpoint: Checkpoint, options: ModelOptions, dtype: str, row: Captioner, generation: Generation
) -> GenerationPlan:
    """What `row` says about this checkpoint. Raises ConfigError."""
    what, kind = OUTPUTS[generation.task], checkpoint.config.model_type
    if not available(checkpoint, "image") or not available(checkpoint, "text"):
        raise ConfigError(f"-m {checkpoint.id}: {what} need its preprocessor_config.json and its tokenizer")
    if options.compile:
        raise ConfigError(f"--compile is not for {what}: the length of what is generated changes at every step")
    if row.prompt is None and generation.prompt is not None:
        raise ConfigError(f"--prompt {generation.prompt!r}: a {kind} takes no prompt; leave it out")
    if generation.task == "caption":
        generation = replace(generation, prompt=generation.prompt or row.default)
    if row.prompt == "task" and generation.prompt not in FLORENCE_TASKS:
        raise ConfigError(f"--prompt {generation.prompt!r}: a {kind} takes {', '.join(FLORENCE_TASKS)}")
    reject_chat(generation, kind)
    generation = _limited(checkpoint, row, generation)
    _check_length(checkpoint, row, generation)
    inputs = Inputs(image=True)
    return GenerationPlan(
        checkpoint=checkpoint,
        family=FAMILY,
        processor="mmcli.models.captioner:open_processor",
        loader="mmcli.models.captioner:load",
        detail=row,
        inputs=inputs,
        decode=DecodeOptions(
            modalities=inputs.modalities,
            min_image_size=min_image_size(checkpoint),
            exact_decode=options.exact_decode,
        ),
        dtype=dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        compile=False,
        generation=generation,
    )


def _limited(checkpoint: Checkpoint, row: Captioner, generation: Generation) -> Generation:
    """With fewer tokens where nobody asked for a number and the model has few places; half of them for a prompt."""
    positions = text_positions(checkpoint, row)
    if generation.limited or positions is None:
        return generation
    shared = row.prompt in ("prefix", "bare") and any(prompt is not None for prompt in generation.prompts)
    most = positions // 2 if shared else positions - _least_tokens(checkpoint)
    return replace(generation, max_new_tokens=max(1, min(generation.max_new_tokens, most)))


def _least_tokens(checkpoint: Checkpoint) -> int:
    """Those before a text: the start token, after BLIP-2's places for the picture."""
    return 1 + int(getattr(checkpoint.config, "num_query_tokens", 0))


def _check_length(checkpoint: Checkpoint, row: Captioner, generation: Generation) -> None:
    """Raise ConfigError when prompt and text are longer than the model has positions for, whatever the row."""
    positions, tokens = text_positions(checkpoint, row), _least_tokens(checkpoint)
    if positions is not None and tokens + generation.max_new_tokens > positions:
        raise ConfigError(_no_room(checkpoint, positions, tokens, generation))
    fixed = [text for text in generation.prompts if text is not None and not Template.parse(text).columns]
    most = prompt_limits(checkpoint, row, generation)
    if not fixed or not most:
        return
    read = prompt_reader(checkpoint, row)
    for text in fixed:
        for name, ids in read(worded(row, Template.parse(text).render({}))).items():
            if len(ids) > most.get(name, len(ids)):
                raise ConfigError(_no_room(checkpoint, positions or most[name], len(ids), generation))


def _no_room(checkpoint: Checkpoint, positions: int, tokens: int, generation: Generation) -> str:
    most = positions - tokens
    shorter = "question" if generation.task == "ask" else "--prompt"
    remedy = f"give at most --max-new-tokens {most}" if most > 0 else f"give a shorter {shorter}"
    return (
        f"-m {checkpoint.id} has room for {positions} tokens; the prompt's {tokens} and "
        f"--max-new-tokens {generation.max_new_tokens} are more; {remedy}"
    )


def prompt_limits(checkpoint: Checkpoint, row: Captioner, generation: Generation) -> dict[str, int]:
    """How many tokens a prompt may have, by the name of its array."""
    if row.prompt == "task":
        return {}
    positions = text_positions(checkpoint, row)
    if positions is not None and row.prompt != "encoder":
        positions -= generation.max_new_tokens
    limits = {
        "input_ids": positions,
        "qformer_input_ids": max_positions(getattr(checkpoint.config, "qformer_config", checkpoint.config)),
    }
    return {name: limit for name, limit in limits.items() if limit is not None}


def worded(row: Captioner, prompt: str) -> str:
    """A prompt as the model is given it."""
    if row.question is None or prompt.rstrip().lower().endswith("answer:"):
        return prompt
    return row.question.format(prompt)


def text_positions(checkpoint: Checkpoint, row: Captioner) -> int | None:
    """How many tokens prompt and text may have together; None where there is no end."""
    return max_positions(setting(checkpoint.config, row.text_config) or checkpoint.config)


def prompt_reader(checkpoint: Checkpoint, row: Captioner) -> Callable[[str], dict[str, np.ndarray]]:
    """What turns a prompt into text inputs as the checkpoint's own processor does: int64 [T] by name.

    Raises ModelError for a processor that cannot be opened.
    """
    import numpy as np
    from transformers import AutoProcessor

    from mmcli.models.inputs import open_tokenizer

    if row.prompt == "bare":
        tokenizer = open_tokenizer(checkpoint)

        def read_bare(prompt: str) -> dict[str, np.ndarray]:
            # As GIT's model card has it: the start token and the text.
            ids = [tokenizer.cls_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
            return {"input_ids": np.array(ids), "attention_mask": np.ones(len(ids), np.int64)}

        return read_bare
    # A picture, since placeholders for it are among the tokens (BLIP-2, Florence-2).
    blank = np.zeros((32, 32, 3), np.uint8)
    try:
        processor = AutoProcessor.from_pretrained(
            checkpoint.directory, trust_remote_code=checkpoint.trust_remote_code
        )
        processor(images=blank, text="a", return_tensors="np")
    except Exception as error:
        raise ModelError(f"-m {checkpoint.id}: cannot use its processor: {one_line(str(error))}") from error

    def read(prompt: str) -> dict[str, np.ndarray]:
        found = processor(images=blank, text=prompt, return_tensors="np")
        return {name: found[name][0] for name in _TEXT_INPUTS if name in found}

    return read


class CaptionProcessor:
    """A picture, and the prompts of its row -> `pixel_values` and a prompt's tokens (see RecordProcessor).

    Prompts of different lengths never share a batch: BLIP and GIT number positions from the first token of a batch,
    so that padding would shift those of the shorter; a BLIP that answers looks at the padding of questions.
    """

    def __init__(self, plan: GenerationPlan) -> None:
        import torch

        from mmcli.models.inputs import ImageProcessor, open_image_processor

        torch.set_num_threads(1)
        self._row: Captioner = plan.detail
        self._images = ImageProcessor(open_image_processor(plan.checkpoint))
        self._prompts = Prompts(plan.generation)
        self._most = prompt_limits(plan.checkpoint, self._row, plan.generation)
        self._place = getattr(plan.checkpoint.config, "image_token_index", None)
        self._places = getattr(plan.checkpoint.config, "num_query_tokens", 0)
        if any(prompt is not None for prompt in plan.generation.prompts):
            # Mostly the same prompts for every row.
            self._read = lru_cache(256)(prompt_reader(plan.checkpoint, self._row))

    def record(self, media: Sequence[tuple[Modality, Payload]], variables: Sequence[Any]) -> tuple[Sample, ...]:
        """One Sample for each prompt. Raises RowError."""
        prompts = self._prompts.render(variables)
        pixels = self._images.arrays(media[0][1])
        return tuple(self._sample(pixels, prompt) for prompt in prompts)

    def _sample(self, pixels: dict[str, np.ndarray], prompt: str | None) -> Sample:
        text = {} if prompt is None else self._read(worded(self._row, prompt))
        for name, most in self._most.items():
            if (tokens := len(text.get(name, ()))) > most:
                raise RowError("too_large", f"the prompt has {tokens} tokens; the model has room for {most}")
        if text and self._place is not None and (text["input_ids"] == self._place).sum() > self._places:
            # One place more would shift the pictures of its neighbours.
            raise RowError("bad_row", "the prompt holds the token that stands for the picture", stage="source")
        arrays = {**pixels, **text}
        return Sample("image", arrays, group=tuple(a.shape for a in arrays.values()))


def open_processor(plan: GenerationPlan) -> CaptionProcessor:
    """What runs in the decode workers."""
    return CaptionProcessor(plan)


def load(plan: GenerationPlan, device: torch.device) -> Writer:
    """The loaded model and what its texts begin and end with."""
    import transformers
    from packaging.version import Version

    from mmcli.models.generate import Writer
    from mmcli.models.runner import load_model

    row: Captioner = plan.detail
    model = load_model(getattr(transformers, row.model_class), plan, device, makes=OUTPUTS[plan.generation.task])
    generator = setting(model, row.generator)
    settings = generator.generation_config
    # BLIP's generate names its end itself.
    ends = plan.checkpoint.config.text_config.sep_token_id if row.generator == "text_decoder" else None
    ends = settings.eos_token_id if ends is None else ends
    if ends is None:
        ends = getattr(generator.config, "eos_token_id", None)
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    generate = model.generate
    if row.prompt == "bare" and Version(transformers.__version__) < Version("5.23"):
        # With its cache GIT writes other texts on 5.17 than without; from 5.23 on the same.
        generate = partial(generate, use_cache=False)
    return Writer(
        generate=generate,
        ends=tuple(known),
        forced=settings.forced_eos_token_id is not None,
        decode=_decoder(plan, row),
    )


def _decoder(plan: GenerationPlan, row: Captioner) -> Callable[[Sequence[int]], str]:
    from transformers import AutoProcessor

    from mmcli.models.inputs import open_tokenizer

    if row.prompt != "task":
        tokenizer = open_tokenizer(plan.checkpoint)
        return lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    processor = AutoProcessor.from_pretrained(plan.checkpoint.directory)
    task = plan.generation.prompt

    def decode(tokens: Sequence[int]) -> str:
        text = processor.tokenizer.decode(tokens, skip_special_tokens=False)
        # Of the size of the picture only boxes depend.
        return str(processor.post_process_generation(text, task=task, image_size=(1, 1))[task]).strip()

    return decode
