"""Chat models of a type that mmcli does not know by name: how their inputs are batched, found out by trying."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmcli.core.errors import ConfigError, RowError, one_line
from mmcli.models.chat import TOKEN_FILL
from mmcli.models.chat_inputs import ChatProcessor, Turn
from mmcli.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch


def padded_arrays(processor: ChatProcessor, checkpoint: Checkpoint) -> frozenset[str]:
    """Names of the arrays that its own processor pads when it makes a batch of two rows.

    Two rows with pictures and questions of different sizes, alone and together: put one behind the other, as
    mmcli.models.generate does it, the two must be what the processor makes of both. Raises ConfigError where they
    are not.
    """
    try:
        turns = [Turn(processor.ready([("image", picture)]), text) for picture, text in _rows()]
        alone = [processor.arrays(None, [turn]) for turn in turns]
        both = processor.processor.apply_chat_template(
            [processor.messages(None, [turn]) for turn in turns],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
    except RowError as error:
        raise ConfigError(_unknown(checkpoint, error.message)) from error
    except Exception as error:
        # A processor of its own kind may fail in any way.
        raise ConfigError(_unknown(checkpoint, one_line(str(error)))) from error
    padding = processor.tokenizer.pad_token_id or 0
    padded = set()
    for name in {*alone[0], *alone[1]}:
        arrays = [one.get(name) for one in alone]
        if any(array is None for array in arrays) or not _same(name, arrays, both.get(name), padding):
            raise ConfigError(_unknown(checkpoint, f"it is not known how {name} of several rows are put together"))
        if name not in TOKEN_FILL and len({array.shape[1:] for array in arrays if array is not None}) > 1:
            padded.add(name)
    return frozenset(padded)


def _rows() -> list[tuple[np.ndarray, str]]:
    generator = np.random.default_rng(0)
    sizes = [(301, 517), (97, 61)]
    pictures = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return list(zip(pictures, ("What is it?", "Is there anything that is red in this picture?"), strict=True))


def _same(name: str, arrays: Any, both: torch.Tensor | None, padding: int) -> bool:
    import torch

    from mmcli.models.runner import join, stack

    if both is None:
        return False
    if name in TOKEN_FILL:
        fill = padding if name == "input_ids" else TOKEN_FILL[name]
        found = stack([array[0] for array in arrays], fill, pinned=False, left=True)
    else:
        found = join(arrays)
    return found.shape == both.shape and torch.allclose(found.float(), both.float(), atol=1e-5, rtol=0)


def _unknown(checkpoint: Checkpoint, why: str) -> str:
    kind = checkpoint.config.model_type
    return f"-m {checkpoint.id}: model type {kind!r} is not known by name, and its processor cannot be used: {why}"
