"""What keeps attention off a text's padding, made without a question to the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Inputs = dict[str, torch.Tensor]

# model_type of config.json: encoders of texts that hand a mask of four dimensions on to torch's attention.
TAKES_BIAS = frozenset({"albert", "bert", "camembert", "distilbert", "electra", "ernie", "roberta", "xlm-roberta"})


def for_attention(model: Any, device: torch.device) -> Callable[[Inputs], Inputs]:
    """Inputs of a padded batch -> what `model` is called with.

    transformers asks the device whether anything is masked at all, and so waits for the batch before, while the
    device then waits for the operations of this one. On a CUDA device a model of TAKES_BIAS therefore gets, in
    place of its mask [n, T], what is added to the scores: [n, 1, 1, T], 0 or -inf, the same for every layer.
    """
    config = model.config
    asked = (
        device.type == "cuda"
        and config.model_type in TAKES_BIAS
        and config._attn_implementation == "sdpa"
        and not getattr(config, "is_decoder", False)
    )
    if not asked:
        return lambda inputs: inputs
    dtype = model.dtype

    def with_bias(inputs: Inputs) -> Inputs:
        mask = inputs.get("attention_mask")
        if mask is None:
            return inputs
        bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask == 0, float("-inf"))
        return {**inputs, "attention_mask": bias[:, None, None, :]}

    return with_bias
