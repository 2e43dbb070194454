"""How models that write learn a text: token by token, from the inputs and the prompt that inference gives them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmcli.core.errors import ConfigError, ModelError, one_line
from mmcli.core.records import Sample
from mmcli.models import captioner, chat, speech
from mmcli.models.chat import TOKEN_FILL
from mmcli.models.chat_inputs import control_tokens
from mmcli.models.inputs import open_tokenizer
from mmcli.models.plan import GenerationPlan
from mmcli.training.classify import copy_processor
from mmcli.training.timed import has_times, split_times, without_times
from mmcli.training.write import GENERATION_FILE, Sums, commonest

# Of targets: what counts for nothing.
IGNORED = -100
Inputs = dict[str, torch.Tensor]
# Chat models that are trained here: their masks and positions are known.
CHATS = (
    "gemma3", "idefics2", "idefics3", "llava", "llava_next", "llava_onevision", "paligemma", "qwen2_5_vl",
    "qwen2_audio", "qwen2_vl", "qwen3_vl", "smolvlm",
)  # fmt: skip
CAPTIONERS = {
    "caption": ("blip", "blip-2", "git", "instructblip", "vision-encoder-decoder"),
    "ask": ("blip", "blip-2", "git", "instructblip"),
}


@dataclass
class Tokens:
    """See mmcli.training.write.Form; of models that write.

    logits  (model, inputs, targets) -> float [n, T, V]: what the model gives for each target [n, T] that has read
            the prompt and the targets before it
    """

    plan: GenerationPlan
    logits: Callable[[Any, Inputs, torch.Tensor], torch.Tensor]
    accuracy: str | None = "token_accuracy"
    ends: tuple[int, ...] = field(default=(), init=False)

    @property
    def settings(self) -> dict[str, Any]:
        """As they were."""
        return {}

    def load(
        self, plan: GenerationPlan, device: torch.device, from_config: bool
    ) -> tuple[Any, nn.Module, frozenset[str]]:
        """As inference loads it."""
        wanted = replace(plan, device=str(device), learns=True)
        if from_config:
            with tempfile.TemporaryDirectory(prefix="mmcli-") as folder:
                return self._loaded(_untrained(wanted, Path(folder)))
        return self._loaded(wanted)

    def _loaded(self, plan: GenerationPlan) -> tuple[Any, nn.Module, frozenset[str]]:
        runner: Any = plan.load()
        self.ends = tuple(self._ends(runner.loaded))
        if not self.ends:
            raise ModelError(f"-m {plan.checkpoint.id}: it does not say which token ends a text (eos_token_id)")
        generate = getattr(runner.loaded, "generate", None)
        bound = getattr(generate, "func", generate)
        return runner, getattr(bound, "__self__", runner.loaded), frozenset()

    def _ends(self, loaded: Any) -> Sequence[int]:
        ends: Sequence[int] = loaded.ends
        return ends

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's."""
        return open_tokenizer(self.plan.checkpoint)

    def tokens(self, text: str) -> list[int]:
        """Of a text and its end."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.ends[0]]

    def target(self, sample: Sample, text: str) -> list[int]:
        """What is to follow the prompt; cut where inference would cut it."""
        return self.tokens(text)[: self.plan.generation.max_new_tokens]

    def targets(self, samples: Sequence[Sample], references: Sequence[tuple[str, ...]]) -> torch.Tensor:
        """int64 [n, T], IGNORED behind the end."""
        rows = [
            torch.tensor(self.target(sample, commonest(texts)))
            for sample, texts in zip(samples, references, strict=True)
        ]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)

    def count(self, targets: torch.Tensor) -> int:
        """Tokens."""
        return int((targets != IGNORED).sum())

    def sums(self, model: nn.Module, inputs: Inputs, targets: torch.Tensor, smoothing: float) -> Sums:
        """Cross-entropy of all tokens; how many would be written, given those before."""
        logits = self.logits(model, inputs, targets)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=smoothing,
        )
        right = int((logits.detach().argmax(dim=-1) == targets).sum()) if not model.training else 0
        return Sums(loss, right, self.count(targets))

    def text(self, output: Any) -> str:
        """Of what the runner gives."""
        return str(output.text)


def form_of(plan: GenerationPlan) -> Tokens:
    """How the plan's model learns to write. Raises ConfigError for one that is not trained here."""
    kind, task = str(plan.checkpoint.config.model_type), plan.generation.task
    if plan.family == captioner.FAMILY and kind in CAPTIONERS[task]:
        question = task == "ask" and kind == "blip"
        made = DecoderTokens if kind == "vision-encoder-decoder" else Tokens
        return made(plan, _blip_answer if question else _LOGITS[kind])
    if plan.family == chat.FAMILY and kind in CHATS:
        return ChatTokens(plan, _chat)
    if plan.family == speech.FAMILY:
        plan = _one_window(plan)
        return SpeechTokens(plan, SpeechLogits(plan))
    known = sorted({*CAPTIONERS[task], *CHATS, *(("whisper",) if task == "caption" else ("vilt",))})
    raise ConfigError(f"-m {plan.checkpoint.id}: a {kind} is not trained here yet; these are: {', '.join(known)}")


def check_texts(plan: GenerationPlan, references: Sequence[tuple[str, ...]]) -> int:
    """How many texts are longer than inference writes. Raises ConfigError for the model's own tokens in a text."""
    tokenizer = open_tokenizer(plan.checkpoint)
    control, cut = control_tokens(tokenizer), 0
    for texts in references:
        text, times = commonest(texts), 0
        if has_times(text):
            times = len(_checked_times(plan, text))
            text = without_times(text)
        if found := control.search(text):
            raise ConfigError(f"{one_line(text, 80)!r} holds {found[0]!r}, one of the model's own tokens")
        # The end is one more.
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"]) + times
        cut += tokens >= plan.generation.max_new_tokens
    return cut


def _checked_times(plan: GenerationPlan, text: str) -> list[tuple[float, str]]:
    """A text's times and words. Raises ConfigError for what the model cannot write."""
    if plan.family != speech.FAMILY:
        raise ConfigError(
            f"{one_line(text, 80)!r} has times, and -m {plan.checkpoint.id} writes none; Whisper does"
        )
    try:
        found = split_times(text)
    except ValueError as error:
        raise ConfigError(f"{one_line(text, 80)!r}: {error}; as in '<|0.00|> words<|1.20|>'") from error
    if found[-1][0] > (window := _window_seconds(plan)):
        raise ConfigError(f"{one_line(text, 80)!r}: -m {plan.checkpoint.id} hears windows of {window:g} seconds")
    return found


# ------------------------------------------------------------------------------------------ captioners


def _known(targets: torch.Tensor, padding: int) -> torch.Tensor:
    """Targets as inputs, but for the last."""
    return targets[:, :-1].masked_fill(targets[:, :-1] == IGNORED, padding)


def _after(prompt: torch.Tensor, targets: torch.Tensor, padding: int) -> Inputs:
    """`input_ids` and `attention_mask` of prompts int64 [n, P], of one length, and targets behind."""
    mask = torch.cat([torch.ones_like(prompt), (targets[:, :-1] != IGNORED).long()], dim=1)
    return {"input_ids": torch.cat([prompt, _known(targets, padding)], dim=1), "attention_mask": mask}


def _begin(inputs: Inputs, start: int) -> torch.Tensor:
    """int64 [n, 1]"""
    return torch.full((len(inputs["pixel_values"]), 1), start, device=inputs["pixel_values"].device)


def _blip(model: Any, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
    """The decoder's own start token; the prompt without its end, as `generate` has it."""
    config = model.config.text_config
    prompt = _begin(inputs, config.bos_token_id)
    if "input_ids" in inputs:
        prompt = torch.cat([prompt, inputs["input_ids"][:, 1:-1]], dim=1)
    text = _after(prompt, targets, config.pad_token_id)
    logits: torch.Tensor = model(
        pixel_values=inputs["pixel_values"], **text, logits_to_keep=targets.shape[1]
    ).logits
    return logits


def _blip_answer(model: Any, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
    """As `generate` of BlipForQuestionAnswering: its `forward` gives no logits."""
    config = model.config.text_config
    seen = model.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state
    asked = model.text_encoder(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        encoder_hidden_states=seen,
    ).last_hidden_state
    text = _after(_begin(inputs, config.bos_token_id), targets, config.pad_token_id)
    logits: torch.Tensor = model.text_decoder(**text, encoder_hidden_states=asked).logits
    return logits


def _git(model: Any, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
    prompt = inputs.get("input_ids", _begin(inputs, model.config.bos_token_id))
    text = _after(prompt, targets, model.config.pad_token_id)
    # Places of the picture come first.
    logits: torch.Tensor = model(pixel_values=inputs["pixel_values"], **text).logits[:, -targets.shape[1] :]
    return logits


def _encoder_decoder(model: Any, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
    settings = model.generation_config
    start, padding = settings.decoder_start_token_id, settings.pad_token_id
    start = settings.bos_token_id if start is None else start
    ids = torch.cat([_begin(inputs, start), _known(targets, start if padding is None else padding)], dim=1)
    logits: torch.Tensor = model(pixel_values=inputs["pixel_values"], decoder_input_ids=ids).logits
    return logits


def _blip_2(model: Any, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
    """Places for the picture, and the start token, where no prompt brings them."""
    config = model.config
    prompt = inputs.get("input_ids")
    if prompt is None:
        places = _begin(inputs, config.image_token_index).expand(-1, config.num_query_tokens)
        prompt = torch.cat([places, _begin(inputs, config.text_config.bos_token_id)], dim=1)
    padding = config.text_config.pad_token_id
    # InstructBLIP's Q-Former reads the prompt, too.
    seen = {name: tensor for name, tensor in inputs.items() if name.startswith(("pixel_", "qformer_"))}
    if config.use_decoder_only_language_model:
        logits: torch.Tensor = model(**seen, **_after(prompt, targets, padding)).logits
        return logits[:, -targets.shape[1] :]
    start = model.language_model.generation_config.decoder_start_token_id
    ids = torch.cat([_begin(inputs, start), _known(targets, padding)], dim=1)
    found: torch.Tensor = model(
        **seen, input_ids=prompt, attention_mask=torch.ones_like(prompt), decoder_input_ids=ids
    ).logits
    return found


_LOGITS = {
    "blip": _blip,
    "blip-2": _blip_2,
    "git": _git,
    "instructblip": _blip_2,
    "vision-encoder-decoder": _encoder_decoder,
}


class DecoderTokens(Tokens):
    """Of VisionEncoderDecoder: with what its tokenizer puts before a text (TrOCR was trained so)."""

    def tokens(self, text: str) -> list[int]:
        """Without the decoder's start, which is there already."""
        found: list[int] = self.tokenizer(text)["input_ids"]
        start = self.plan.checkpoint.config.decoder_start_token_id
        found = found[1:] if found[:1] == [start] else found
        return found if found[-1:] == [self.ends[0]] else [*found, self.ends[0]]


# ------------------------------------------------------------------------------------------ chat models


class ChatTokens(Tokens):
    """Of chat models: the assistant's turn, as the checkpoint's chat template writes it, to its end."""

    @cached_property
    def _processor(self) -> Any:
        from mmcli.models.chat_inputs import ChatProcessor

        return ChatProcessor(self.plan)

    def tokens(self, text: str) -> list[int]:
        """As they follow a prompt. Raises ModelError for a template that does not just go on from it."""
        from mmcli.models.chat_inputs import Turn

        if self.plan.detail.form == "paligemma":
            return super().tokens(text)
        processor = self._processor
        template = processor.processor.apply_chat_template
        asked = template(processor.messages(None, [Turn((), "a")]), tokenize=False, add_generation_prompt=True)
        turns = processor.messages(None, [Turn((), "a", text)])
        answered = template(turns, tokenize=False, add_generation_prompt=False)
        if not answered.startswith(asked):
            raise ModelError(f"-m {self.plan.checkpoint.id}: its chat template writes no answer behind a prompt")
        for whole in (answered, answered.rstrip()):
            found = self._behind(asked, whole)
            if (end := next((i for i, token in enumerate(found) if token in self.ends), None)) is not None:
                # What the template has behind the end is not written.
                return found[: end + 1]
        return [*found, self.ends[0]]

    def _behind(self, asked: str, whole: str) -> list[int]:
        """Tokens of what `whole` has behind `asked`: told apart together, since a token may hold a space before."""
        tokenizer = self._processor.tokenizer
        before: list[int] = tokenizer(asked, add_special_tokens=False)["input_ids"]
        found: list[int] = tokenizer(whole, add_special_tokens=False)["input_ids"]
        if found[: len(before)] == before:
            return found[len(before) :]
        return list(tokenizer(whole[len(asked) :], add_special_tokens=False)["input_ids"])


def _chat(model: Any, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
    """Prompts are padded on the left, as `generate` has them: so all targets begin at one place."""
    count, more = targets.shape
    counted = targets[:, :-1] != IGNORED
    kind = model.config.model_type
    tail = {"input_ids": _known(targets, 0), "attention_mask": counted.long()}
    if kind == "paligemma":
        # What is written sees what is before it, the prompt sees all of itself.
        tail["token_type_ids"] = torch.ones_like(counted, dtype=torch.long)
    inputs = dict(inputs)
    for name in TOKEN_FILL:
        if name in inputs:
            zeros = inputs[name].new_zeros((count, more - 1, *inputs[name].shape[2:]))
            inputs[name] = torch.cat([inputs[name], tail.get(name, zeros)], dim=1)
    if "_vl" not in kind:
        # Qwen-VL finds out its own positions; PaliGemma's begin at 1.
        first = int(kind == "paligemma")
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp_min(0) + first
    # Qwen2-Audio gives all logits, whatever it is asked for.
    logits: torch.Tensor = model(**inputs, logits_to_keep=more, use_cache=False).logits[:, -more:]
    return logits


# ------------------------------------------------------------------------------------------ speech


def _one_window(plan: GenerationPlan) -> GenerationPlan:
    """Longer sounds are errors: which words are in which window is not known. Raises ConfigError."""
    tongue: speech.Tongue = plan.detail
    if tongue.languages and tongue.language is None:
        raise ConfigError(
            f"-m {plan.checkpoint.id}: it knows {len(tongue.languages)} languages; say which one the texts are in, "
            "such as --language de"
        )
    return replace(plan, decode=replace(plan.decode, max_seconds=_window_seconds(plan)))


def _window_seconds(plan: GenerationPlan) -> float:
    return float(plan.checkpoint.processor_json("feature_extractor").get("chunk_length", 30))


class SpeechTokens(Tokens):
    """Of Whisper: the text with its times, or between those of begin and end, as inference makes it write."""

    def _ends(self, loaded: Any) -> Sequence[int]:
        return [int(loaded.generation_config.eos_token_id)]

    @property
    def settings(self) -> dict[str, Any]:
        """Language and task: else the language would be found out, by weights that have not learned it."""
        tongue: speech.Tongue = self.plan.detail
        if not tongue.languages:
            return {}
        return {"language": tongue.language, "task": tongue.task, "forced_decoder_ids": None}

    def target(self, sample: Sample, text: str) -> list[int]:
        """Of a sound of one window."""
        length = float(sample.arrays["window"][1])
        parts = split_times(text) if has_times(text) else [(0.0, text.strip()), (length, "")]
        found: list[int] = []
        for time, words in parts:
            found.append(self._timestamp(time))
            if words:
                found += self.tokenizer(" " + words, add_special_tokens=False)["input_ids"]
        return [*found, self.ends[0]][: self.plan.generation.max_new_tokens]

    def _timestamp(self, seconds: float) -> int:
        """Its token."""
        tongue: speech.Tongue = self.plan.detail
        last: int = self.plan.checkpoint.config.max_source_positions
        return tongue.first + min(round(seconds / self._precision), last)

    @cached_property
    def _precision(self) -> float:
        """Seconds between two timestamps."""
        return _window_seconds(self.plan) / float(self.plan.checkpoint.config.max_source_positions)

    @cached_property
    def _joiner(self) -> Any:
        return self.plan.open_joiner()

    def text(self, output: Any) -> str:
        """Without timestamps."""
        return str(self._joiner([output]).text)


@dataclass(frozen=True, slots=True)
class SpeechLogits:
    """Behind the tokens of start, language and task, which are not learned."""

    plan: GenerationPlan

    def __call__(self, model: Any, inputs: Inputs, targets: torch.Tensor) -> torch.Tensor:
        """See Tokens."""
        tongue: speech.Tongue = self.plan.detail
        begin = [model.generation_config.decoder_start_token_id]
        if tongue.languages:
            begin += [tongue.languages[tongue.language or ""], tongue.tasks[tongue.task or "transcribe"]]
        prompt = torch.tensor([begin], device=targets.device).expand(len(targets), -1)
        ids = torch.cat([prompt, _known(targets, model.config.pad_token_id)], dim=1)
        logits: torch.Tensor = model(input_features=inputs["input_features"], decoder_input_ids=ids).logits
        return logits[:, -targets.shape[1] :]


# ------------------------------------------------------------------------------------------ --from-config


def _untrained(plan: GenerationPlan, folder: Path) -> GenerationPlan:
    """The plan of a checkpoint in `folder` that is as the plan's own, with random weights. Raises ModelError."""
    import transformers

    checkpoint = plan.checkpoint
    row = speech.SPEECH[checkpoint.config.model_type] if plan.family == speech.FAMILY else plan.detail
    try:
        model = getattr(transformers, row.model_class)._from_config(checkpoint.config)
        settings = checkpoint.directory / GENERATION_FILE
        model.save_pretrained(folder)
        if settings.is_file():
            shutil.copyfile(settings, folder / GENERATION_FILE)
    except Exception as error:
        raise ModelError(f"-m {checkpoint.id}: cannot make it anew: {one_line(str(error))}") from error
    copy_processor(checkpoint, folder)
    return replace(plan, checkpoint=replace(checkpoint, directory=folder, revision=None, folders=(), adapter=None))
