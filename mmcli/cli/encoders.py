"""`--encoder MODALITY=MODEL`: which encoders a new model joins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmcli.cli.parse import Problems
from mmcli.core.records import MODALITIES, Modality

if TYPE_CHECKING:
    from mmcli.models.checkpoint import Checkpoint
    from mmcli.models.options import ModelOptions


def open_encoders(
    given: Sequence[str], model: ModelOptions, slots: Sequence[str], problems: Problems
) -> dict[Modality, Checkpoint]:
    """The checkpoint of each modality that rows have (`slots`); problems of others, and of what is no model."""
    from mmcli.models.checkpoint import open_checkpoint

    encoders: dict[Any, Any] = {}
    for text in given:
        modality, _, name = text.partition("=")
        if modality not in MODALITIES or not name:
            problems.add(
                f"--encoder {text!r}: give a modality and a model, such as image=google/vit-base-patch16-224"
            )
        elif modality in encoders:
            problems.add(f"--encoder {text!r}: there is one of {modality} already")
        else:
            encoders[modality] = problems.collect(open_checkpoint, replace(model, model=name))
    for slot in slots:
        if slot not in encoders:
            problems.add(f"INPUT: rows have {slot or 'media of unknown kind'}, for which there is no --encoder")
    for modality in encoders:
        if modality not in slots:
            problems.add(f"--encoder {modality}=...: rows have no {modality}; name its --{modality}-column")
    return encoders
