"""config.json -> family -> plan: the one place that decides how a checkpoint is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from mmcli.core.errors import ConfigError
from mmcli.models import captioner, chat, dual_encoder, encoder, joined_family, speech, vqa
from mmcli.models.checkpoint import Checkpoint, open_checkpoint
from mmcli.models.device import check_device, choose_dtype
from mmcli.models.facts import OUTPUTS, POOLINGS
from mmcli.models.options import Generation, ModelOptions, Task
from mmcli.models.plan import EmbeddingPlan, GenerationPlan

T = TypeVar("T")


class WriterFamily(Protocol):
    """What a module of models that write has.

    find   the row of its table for a model_type and config.json's architectures (none: whatever they are), None
           when it is not for it
    names  the model types that it knows for a task
    plan   what the row says about a checkpoint; raises ConfigError
    """

    def find(self, kind: str, architectures: Sequence[str], task: Task) -> Any: ...

    def names(self, task: Task) -> Sequence[str]: ...

    def plan(
        self, checkpoint: Checkpoint, options: ModelOptions, dtype: str, row: Any, generation: Generation
    ) -> GenerationPlan: ...


# In the order in which they are asked.
WRITERS: tuple[WriterFamily, ...] = (captioner, vqa, chat, speech)


def plan_checkpoint(options: ModelOptions) -> EmbeddingPlan:
    """The plan of a checkpoint that gives vectors. Raises ConfigError with every problem, TryAgain for the hub."""
    problems: list[str] = []
    if options.pooling is not None and options.pooling not in POOLINGS:
        problems.append(f"--pooling {options.pooling!r} is not one of {', '.join(POOLINGS)}")
    checkpoint, dtype = open_with_dtype(options, problems)
    return plan_vectors(checkpoint, options, dtype)


def plan_writer(options: ModelOptions, generation: Generation) -> GenerationPlan:
    """The plan of a checkpoint that writes. Raises ConfigError with every problem, TryAgain."""
    checkpoint, dtype = open_with_dtype(options, [])
    content = checkpoint.json("config.json")
    kind, architectures = str(content.get("model_type")), tuple(content.get("architectures") or ())
    for family in WRITERS:
        row = family.find(kind, architectures, generation.task)
        if row is not None:
            if family is not vqa:
                _reject_regions(generation)
            if family is not chat and generation.messages is not None:
                raise ConfigError(
                    f"--messages-column is for chat models; -m {checkpoint.id} is a {kind}, which has no turns: "
                    "ask it with -q or --question-column"
                )
            return _constrained(family.plan(checkpoint, options, dtype, row, generation))
    raise _no_writer(checkpoint, kind, architectures, generation.task)


def _constrained(plan: GenerationPlan) -> GenerationPlan:
    """With the output that --choices and --schema make of what would be free texts.

    Raises ConfigError for those that the checkpoint's tokenizer cannot do, before weights are loaded.
    """
    generation = plan.generation
    if plan.output != "text" or not (generation.choices or generation.schema):
        return plan
    from mmcli.models.generate import open_choices, open_grammar
    from mmcli.models.inputs import open_tokenizer

    # Whichever token ends a text: what is checked does not depend on it.
    end = open_tokenizer(plan.checkpoint).eos_token_id or 0
    if generation.choices:
        open_choices(plan, [end])
        return replace(plan, output="scores")
    open_grammar(plan, [end])
    return replace(plan, output="json")


def _reject_regions(generation: Generation) -> None:
    """Raise ConfigError when what only models of the family *VQA* take is asked of another."""
    problems = [
        f"{flag} is for models that see no pictures ({', '.join(vqa.seeing_features())}); leave it out"
        for flag, given in (("--features-column", generation.features), ("--boxes-column", generation.boxes))
        if given is not None
    ]
    if generation.answers:
        problems.append("--answers is for models that choose among known answers; this one writes them: --choices")
    if problems:
        raise ConfigError(problems)


def _no_writer(checkpoint: Checkpoint, kind: str, architectures: tuple[str, ...], task: Task) -> ConfigError:
    """Why no family writes with a model type, and what it is for."""
    other: Task = "ask" if task == "caption" else "caption"
    what, hint = OUTPUTS[task], None
    if _row(kind, architectures, other) is not None:
        hint = f"it gives {OUTPUTS[other]}: mmcli {other}"
    elif kind in dual_encoder.DUAL_ENCODERS or kind in encoder.ENCODERS:
        hint = "it gives vectors: mmcli embed"
    saved = f" saved as {', '.join(architectures)}" if architectures else ""
    said = f"-m {checkpoint.id}: model type {kind!r}{saved} is not supported for {what}"
    near = getattr(_row(kind, (), task), "model_class", None)
    if near is not None:
        return ConfigError(f"{said}; they need one saved as {near}", hint=hint)
    known = sorted({name for family in WRITERS for name in family.names(task)})
    return ConfigError(f"{said}. Supported are {', '.join(known)}", hint=hint)


def _row(kind: str, architectures: tuple[str, ...], task: Task) -> Any:
    found = (family.find(kind, architectures, task) for family in WRITERS)
    return next((row for row in found if row is not None), None)


def open_with_dtype(options: ModelOptions, problems: list[str]) -> tuple[Checkpoint, str]:
    """The checkpoint and its dtype. Raises ConfigError with these problems and its own."""
    _collect(problems, check_device, options.device)
    chosen = _collect(problems, choose_dtype, options.dtype)
    checkpoint = _collect(problems, open_checkpoint, options)
    if checkpoint is None or chosen is None or problems:
        raise ConfigError(problems)
    return checkpoint, chosen[0]


def _collect(problems: list[str], function: Callable[..., T], *arguments: object) -> T | None:
    try:
        return function(*arguments)
    except ConfigError as error:
        problems += error.problems
        return None


def plan_vectors(checkpoint: Checkpoint, options: ModelOptions, dtype: str) -> EmbeddingPlan:
    """What gives the vectors of a checkpoint. Raises ConfigError."""
    if (checkpoint.directory / "modules.json").is_file():
        from mmcli.models import sentence

        return sentence.plan(checkpoint, options, dtype)
    if joined_family.find(checkpoint):
        return joined_family.plan(checkpoint, options, dtype)
    content = checkpoint.json("config.json")
    kind = str(content.get("model_type"))
    for architecture in content.get("architectures") or ():
        if row := dual_encoder.BY_ARCHITECTURE.get(architecture):
            return dual_encoder.plan(checkpoint, options, dtype, row)
    if row := dual_encoder.DUAL_ENCODERS.get(kind):
        return dual_encoder.plan(checkpoint, options, dtype, row)
    if encoder_row := encoder.ENCODERS.get(kind):
        return encoder.plan(checkpoint, options, dtype, encoder_row)
    if "auto_map" in content and not checkpoint.trust_remote_code:
        raise ConfigError(_unsupported(checkpoint, f"{kind!r} is code that comes with the checkpoint"))
    if row := dual_encoder.generic_row(checkpoint):
        return dual_encoder.plan(checkpoint, options, dtype, row)
    raise ConfigError(_unsupported(checkpoint, f"model type {kind!r} is not supported for embeddings"))


def _unsupported(checkpoint: Checkpoint, why: str) -> str:
    known = f"dual encoders: {', '.join(dual_encoder.DUAL_ENCODERS)}; encoders: {', '.join(encoder.ENCODERS)}"
    return f"-m {checkpoint.id}: {why}. Supported are {known}; sentence-transformers directories"
