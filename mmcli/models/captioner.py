"""The family *captioner*: a picture in, a text out (BLIP, BLIP-2, GIT, VisionEncoderDecoder, Florence-2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from mmcli.core.errors import ConfigError, ModelError, one_line
from mmcli.core.records import DecodeOptions
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.facts import available, max_positions, min_image_size, setting
from mmcli.models.options import Generation, ModelOptions
from mmcli.models.plan import CaptionPlan, Inputs

if TYPE_CHECKING:
    import torch

FAMILY = "captioner"
# Tasks of Florence-2 whose answer is a text; the others give boxes.
FLORENCE_TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>", "<OCR>")


@dataclass(frozen=True, slots=True)
class Captioner:
    """How a model type writes captions.

    model_class  the transformers class
    prompt       "prefix": the text goes on from it; "bare": likewise, without the tokenizer's end token;
                 "task": one of FLORENCE_TASKS, the first by default; None: it takes none
    generator    where in the model the part is whose `generate` runs ("" is the model itself)
    text_config  where config.json has its settings
    """

    model_class: str
    prompt: Literal["prefix", "bare", "task"] | None
    generator: str = ""
    text_config: str = "text_config"


# model_type of config.json -> how it is called
CAPTIONERS = {
    "blip": Captioner("BlipForConditionalGeneration", "prefix", generator="text_decoder"),
    "blip-2": Captioner("Blip2ForConditionalGeneration", "prefix", generator="language_model"),
    "florence2": Captioner("Florence2ForConditionalGeneration", "task"),
    "git": Captioner("GitForCausalLM", "bare", text_config=""),
    "vision-encoder-decoder": Captioner("VisionEncoderDecoderModel", None, text_config="decoder"),
}


@dataclass(frozen=True, slots=True)
class Writer:
    """A loaded captioner.

    generate  the model's own
    prompt    its text inputs, the same for every picture: int64 [1, T] by name
    ends      tokens that end a text
    forced    whether the last token allowed is made one of them: such a text did not end by itself
    decode    tokens without prompt and what follows the end -> text
    """

    generate: Callable[..., Any]
    prompt: dict[str, torch.Tensor]
    ends: frozenset[int]
    forced: bool
    decode: Callable[[Sequence[int]], str]


def plan(
    checkpoint: Checkpoint, options: ModelOptions, dtype: str, row: Captioner, generation: Generation
) -> CaptionPlan:
    """What `row` says about this checkpoint. Raises ConfigError."""
    kind = checkpoint.config.model_type
    architectures = checkpoint.config.architectures or []
    if architectures and row.model_class not in architectures:
        raise ConfigError(
            f"-m {checkpoint.id}: it was saved as {', '.join(architectures)}; "
            f"captions need a {kind} saved as {row.model_class}",
        )
    if not available(checkpoint, "image") or not available(checkpoint, "text"):
        raise ConfigError(f"-m {checkpoint.id}: captions need its preprocessor_config.json and its tokenizer")
    if options.compile:
        raise ConfigError("--compile is not for captions: the length of what is generated changes at every step")
    if row.prompt is None and generation.prompt is not None:
        raise ConfigError(f"--prompt {generation.prompt!r}: a {kind} takes no prompt; leave it out")
    if row.prompt == "task":
        generation = replace(generation, prompt=generation.prompt or FLORENCE_TASKS[0])
        if generation.prompt not in FLORENCE_TASKS:
            raise ConfigError(f"--prompt {generation.prompt!r}: a {kind} takes {', '.join(FLORENCE_TASKS)}")
    _check_length(checkpoint, row, generation)
    inputs = Inputs(image=True)
    return CaptionPlan(
        checkpoint=checkpoint,
        family=FAMILY,
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


def _check_length(checkpoint: Checkpoint, row: Captioner, generation: Generation) -> None:
    """Raise ConfigError when prompt and text are longer than the model has positions for."""
    positions = max_positions(setting(checkpoint.config, row.text_config) or checkpoint.config)
    if positions is None:
        return
    # The start token, after BLIP-2's places for the picture.
    tokens = 1 + getattr(checkpoint.config, "num_query_tokens", 0)
    if generation.prompt is not None and row.prompt != "task":
        tokens = prompt_inputs(checkpoint, row, generation.prompt)["input_ids"].shape[1]
    if tokens + generation.max_new_tokens > positions:
        most = positions - tokens
        remedy = f"give at most --max-new-tokens {most}" if most > 0 else "give a shorter --prompt"
        raise ConfigError(
            f"-m {checkpoint.id} has room for {positions} tokens; the prompt's {tokens} and "
            f"--max-new-tokens {generation.max_new_tokens} are more; {remedy}"
        )


def prompt_inputs(checkpoint: Checkpoint, row: Captioner, prompt: str | None) -> dict[str, torch.Tensor]:
    """Text inputs as the checkpoint's own processor makes them: int64 [1, T] by name; {} without a prompt.

    Raises ModelError for a processor that cannot be opened.
    """
    import numpy as np
    import torch
    from transformers import AutoProcessor

    from mmcli.models.inputs import open_tokenizer

    if prompt is None:
        return {}
    if row.prompt == "bare":
        # As GIT's model card has it: the start token and the text.
        tokenizer = open_tokenizer(checkpoint)
        ids = [tokenizer.cls_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    try:
        processor = AutoProcessor.from_pretrained(
            checkpoint.directory, trust_remote_code=checkpoint.trust_remote_code
        )
        # A picture, since placeholders for it are among the tokens (BLIP-2, Florence-2).
        found = processor(images=np.zeros((32, 32, 3), np.uint8), text=prompt, return_tensors="pt")
    except Exception as error:
        raise ModelError(f"-m {checkpoint.id}: cannot use its processor: {one_line(str(error))}") from error
    return {name: found[name] for name in ("input_ids", "attention_mask") if name in found}


def load(plan: CaptionPlan, device: torch.device) -> Writer:
    """The loaded model and what its texts begin and end with."""
    import transformers
    from packaging.version import Version

    from mmcli.models.runner import load_model

    row: Captioner = plan.detail
    model = load_model(getattr(transformers, row.model_class), plan, device, makes="captions")
    generator = setting(model, row.generator)
    settings = generator.generation_config
    # BLIP's generate names its end itself.
    ends = plan.checkpoint.config.text_config.sep_token_id if row.generator == "text_decoder" else None
    ends = settings.eos_token_id if ends is None else ends
    if ends is None:
        ends = getattr(generator.config, "eos_token_id", None)
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    prompt = prompt_inputs(plan.checkpoint, row, plan.generation.prompt)
    generate = model.generate
    if row.prompt == "bare" and Version(transformers.__version__) < Version("5.23"):
        # With its cache GIT writes other texts on 5.17 than without; from 5.23 on the same.
        generate = partial(generate, use_cache=False)
    return Writer(
        generate=generate,
        prompt={name: tensor.to(device) for name, tensor in prompt.items()},
        ends=frozenset(known),
        forced=settings.forced_eos_token_id is not None,
        decode=_decoder(plan, row),
    )


def _decoder(plan: CaptionPlan, row: Captioner) -> Callable[[Sequence[int]], str]:
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
