"""From answers and truths to a report: which kind of metrics calls which module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmcli.evaluation import captions, classification, multilabel, retrieval, shared_space, speech, vqa
from mmcli.evaluation.bootstrap import Resampling, Score
from mmcli.evaluation.kinds import CAPTION, CLASSIFICATION, SPEECH, VQA
from mmcli.evaluation.pairs import Pairs
from mmcli.evaluation.tokens import TOKENIZERS
from mmcli.evaluation.vectors import Sides

Found = tuple[list[Score], dict[str, Any], list[str]]


@dataclass(frozen=True, slots=True)
class Settings:
    """tokenize: one of TOKENIZERS, for captions. normalize: one of speech.NORMALIZERS."""

    resampling: Resampling
    tokenize: str = "coco"
    normalize: str = "basic"

    def to_dict(self, kind: str) -> dict[str, Any]:
        """What the numbers of this kind depend on."""
        common: dict[str, Any] = {
            "bootstrap": self.resampling.replicates,
            "seed": self.resampling.seed,
            "confidence": 0.95,
        }
        return {
            **common,
            **({"tokenize": self.tokenize} if kind == CAPTION else {}),
            **({"normalize": self.normalize} if kind == SPEECH else {}),
        }


def measure(kind: str, pairs: Pairs, several: bool, settings: Settings) -> Found:
    """Scores, details and notes. `several`: answers are lists, of any number of classes a row."""
    if kind == CLASSIFICATION:
        return _several_classes(pairs, settings) if several else _classes(pairs, settings)
    scores, notes = _TEXTS[kind](pairs, settings)
    return scores, {}, notes


def measure_retrieval(sides: Sides, settings: Settings) -> Found:
    """Scores, details (`recall_at`: what share of each way's queries has which rank at most) and notes."""
    given = sides.names, sides.left, sides.right, sides.answered, settings.resampling
    scores, notes, found = retrieval.evaluate(*given)
    if centred := shared_space.evaluate(*given):
        scores += centred
        notes.append("centred_: after each side's mean vector is subtracted, which closes the modality gap")
    ways = [f"{sides.names[0]}_to_{sides.names[1]}", f"{sides.names[1]}_to_{sides.names[0]}"]
    cutoffs = [k for power in range(9) for k in (10**power, 2 * 10**power, 5 * 10**power)]
    details = {
        way: {str(k): float((ranks <= k).mean()) for k in cutoffs if k <= max(10, len(ranks))}
        for way, ranks in zip(ways, found, strict=True)
    }
    return scores, {"recall_at": details}, notes


def _classes(pairs: Pairs, settings: Settings) -> Found:
    rows = classification.Predictions(
        labels=pairs.answers,
        truth=[right[0] for right in pairs.references],
        scores=pairs.scores if any(s is not None for s in pairs.scores) else None,
        top_k=pairs.top_k if any(pairs.top_k) else None,
    )
    return classification.evaluate(rows, settings.resampling)


def _several_classes(pairs: Pairs, settings: Settings) -> Found:
    top_k = pairs.top_k if any(pairs.top_k) else None
    return multilabel.evaluate(pairs.answers, pairs.references, top_k, settings.resampling)


def _captions(pairs: Pairs, settings: Settings) -> tuple[list[Score], list[str]]:
    return captions.evaluate(pairs.answers, pairs.references, TOKENIZERS[settings.tokenize], settings.resampling)


def _vqa(pairs: Pairs, settings: Settings) -> tuple[list[Score], list[str]]:
    return vqa.evaluate(pairs.answers, pairs.references, settings.resampling)


def _speech(pairs: Pairs, settings: Settings) -> tuple[list[Score], list[str]]:
    spoken = [right[0] for right in pairs.references]
    return speech.evaluate(pairs.answers, spoken, settings.normalize, settings.resampling)


_TEXTS: dict[str, Callable[[Pairs, Settings], tuple[list[Score], list[str]]]] = {
    CAPTION: _captions,
    VQA: _vqa,
    SPEECH: _speech,
}
