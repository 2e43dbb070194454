"""How models that choose an answer (ViLT) learn: every answer that annotators gave, as likely as they gave it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mmcli.core.errors import ConfigError, ModelError, one_line
from mmcli.core.records import Sample
from mmcli.models import vqa
from mmcli.models.families import open_with_dtype
from mmcli.models.options import Generation, ModelOptions
from mmcli.models.plan import GenerationPlan

# What `AnswerRunner` runs: patches in their order, nothing drawn.
from mmcli.models.vqa_runner import _vilt
from mmcli.training.write import Sums

# So many annotators make an answer right (Antol et al. 2015).
AGREEING = 3


def soft_scores(references: Sequence[str]) -> dict[str, float]:
    """What each answer is worth: min(n / 3, 1) where n of several annotators gave it; 1 where there is one.

    As ViLT was trained (Kim et al. 2021, section 4.2; Teney et al. 2018, "Tips and tricks for VQA").
    """
    counts = Counter(references)
    return {text: 1.0 if len(references) == 1 else min(n / AGREEING, 1.0) for text, n in counts.items()}


def answers_plan(
    options: ModelOptions, generation: Generation, references: Iterable[tuple[str, ...]], new: bool
) -> GenerationPlan:
    """The plan of a ViLT. Raises ConfigError.

    new  with the answers of these rows in place of the base's; so, too, where the base has none with names
    """
    checkpoint, dtype = open_with_dtype(options, [])
    row, config = vqa.CLASSIFIERS["vilt"], checkpoint.config
    count = int(config.num_labels)
    unnamed = replace(generation, answers=tuple(map(str, range(count))))
    plan = vqa.plan(checkpoint, options, dtype, row, unnamed)
    names = base_answers(plan)
    if new or names is None:
        names = tuple(sorted({text for texts in references for text in texts}))
        # These identify the run; those of the base are in its config.json.
        generation = replace(generation, answers=names)
    return replace(
        plan,
        loader="mmcli.training.write_answers:load",
        generation=generation,
        detail=vqa.Answering(row, names, tuple(range(len(names)))),
    )


def base_answers(plan: GenerationPlan) -> tuple[str, ...] | None:
    """The names of the base's answers, in its order; None where it has none."""
    config = plan.checkpoint.config
    if vqa.CLASSIFIERS["vilt"].model_class not in (config.architectures or ()):
        return None
    names = tuple(str(config.id2label.get(index, "")) for index in range(config.num_labels))
    return None if "" in names or names == tuple(f"LABEL_{n}" for n in range(len(names))) else names


@dataclass
class Answers:
    """See mmcli.training.write.Form. The loss of a row is the sum of all answers' binary cross-entropies."""

    plan: GenerationPlan
    accuracy: str | None = None

    def __post_init__(self) -> None:
        # Of two answers with one name, the first.
        self.index = {name: n for n, name in reversed(list(enumerate(self.plan.detail.answers)))}

    @property
    def settings(self) -> dict[str, Any]:
        """Nothing is generated."""
        return {}

    def load(
        self, plan: GenerationPlan, device: torch.device, from_config: bool
    ) -> tuple[Any, nn.Module, frozenset[str]]:
        """With a new last layer where the answers are new."""
        loader = "mmcli.training.write_answers:load_untrained" if from_config else plan.loader
        runner: Any = replace(plan, device=str(device), loader=loader, learns=True).load()
        return runner, runner.loaded.model, runner.loaded.new

    def targets(self, samples: Sequence[Sample], references: Sequence[tuple[str, ...]]) -> torch.Tensor:
        """float32 [n, A]: what each answer is worth."""
        found = torch.zeros(len(references), len(self.plan.detail.answers))
        for row, texts in zip(found, references, strict=True):
            for text, score in soft_scores(texts).items():
                if text in self.index:
                    row[self.index[text]] = score
        return found

    def count(self, targets: torch.Tensor) -> int:
        """Rows."""
        return len(targets)

    def sums(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], targets: torch.Tensor, smoothing: float
    ) -> Sums:
        """As ViltForQuestionAnswering has it, but for the mean over rows."""
        logits = _vilt(model, inputs)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")
        return Sums(loss, 0, len(targets))

    def text(self, output: Any) -> str:
        """The likeliest."""
        return str(output.answer)


@dataclass(slots=True)
class Chooser:
    """A loaded ViLT, as `AnswerRunner` calls it. `new`: names of weights that no checkpoint had."""

    model: Any
    new: frozenset[str]

    def __call__(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits [n, A]."""
        return _vilt(self.model, inputs)


def load(plan: GenerationPlan, device: torch.device) -> Chooser:
    """The base with the plan's answers. Raises ModelError."""
    import transformers

    checkpoint, names = plan.checkpoint, plan.detail.answers
    model, info = checkpoint.load(
        transformers.ViltForQuestionAnswering,
        **_labels(names),
        ignore_mismatched_sizes=True,
        dtype=getattr(torch, plan.dtype),
        attn_implementation=plan.attn_implementation,
    )
    mismatched = (key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
    new = {*info["missing_keys"], *mismatched}
    if stray := sorted(name for name in new if not name.startswith("classifier.")):
        raise ModelError(f"-m {checkpoint.id}: it lacks weights of a ViLT ({stray[0]})")
    if names != base_answers(plan):
        # Of equally many answers, the old ones' weights would fit.
        nn.init.normal_(model.classifier[-1].weight, std=model.config.initializer_range)
        nn.init.zeros_(model.classifier[-1].bias)
        new |= {"classifier.3.weight", "classifier.3.bias"}
    return Chooser(model.to(device).eval(), frozenset(new))


def load_untrained(plan: GenerationPlan, device: torch.device) -> Chooser:
    """The base's architecture with random weights. Raises ModelError."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(plan.checkpoint.directory, **_labels(plan.detail.answers))
        model = transformers.ViltForQuestionAnswering._from_config(config)
    except Exception as error:
        raise ModelError(f"-m {plan.checkpoint.id}: cannot make it anew: {one_line(str(error))}") from error
    return Chooser(model.to(device=device, dtype=getattr(torch, plan.dtype)).eval(), frozenset())


def _labels(names: Sequence[str]) -> dict[str, Any]:
    # The last of one name would be meant, were they not in reverse.
    label2id = {name: index for index, name in reversed(list(enumerate(names)))}
    return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": label2id}


def check_answers(references: Sequence[tuple[str, ...]], known: Sequence[str]) -> list[str]:
    """The answers that the model does not know, the commonest first. Raises ConfigError when it knows none."""
    given = Counter(text for texts in references for text in texts)
    unknown = [text for text, _ in given.most_common() if text not in set(known)]
    if len(unknown) == len(given):
        raise ConfigError(
            f"the base knows none of the answers ({', '.join(map(repr, unknown[:3]))}); --new-answers learns those "
            "of the training rows"
        )
    return unknown
