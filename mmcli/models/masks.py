"""What keeps attention off a text's padding, made without a question to the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Inputs = dict[str, torch.Tensor]

# model_type of config.json: encoders of texts that hand a mask of four dimensions on to torch's attention.
TAKES_WHOLE = frozenset({"albert", "bert", "camembert", "distilbert", "electra", "ernie", "roberta", "xlm-roberta"})


def for_attention(model: Any, device: torch.device) -> Callable[[Inputs], Inputs]:
    """Inputs of a padded batch -> what `model` is called with.

    transformers asks the device whether anything is masked at all, and so waits for the batch before, while the
    device then waits for the operations of this one. On a CUDA device a model of TAKES_WHOLE therefore gets its
    mask as attention takes it, which is not looked at: [n, 1, 1, T], True for tokens, of any dtype's attention.
    80,000 texts of 1 to 120 words through a BERT of base size in bfloat16, H200: 26,400 rows/s instead of 16,500.
    """
    config = model.config if device.type == "cuda" else None
    whole = (
        config is not None
        and config.model_type in TAKES_WHOLE
        and config._attn_implementation == "sdpa"
        and not getattr(config, "is_decoder", False)
    )
    if not whole:
        return lambda inputs: inputs

    def with_whole_mask(inputs: Inputs) -> Inputs:
        mask = inputs.get("attention_mask")
        return inputs if mask is None else {**inputs, "attention_mask": mask[:, None, None, :].bool()}

    return with_whole_mask
