"""Parameter groups, optimizer, learning rate, moving average."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from mmcli.core.errors import ConfigError
from mmcli.training.options import TrainOptions

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("cosine", "linear", "constant")
_NORMS = (
    nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm,
)  # fmt: skip
# Parameters that are no weights of a layer: temperatures of contrastive losses.
_SCALES = ("logit_scale", "logit_bias", "temperature")


def not_decayed(model: nn.Module) -> frozenset[str]:
    """Names of parameters that weight decay leaves alone: norms, biases, embeddings, logit scales, lone vectors."""
    names = set()
    for prefix, module in model.named_modules():
        whole = isinstance(module, (*_NORMS, nn.Embedding)) or "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if whole or parameter.ndim < 2 or "embed" in name or name in _SCALES:
                names.add(f"{prefix}.{name}" if prefix else name)
    return frozenset(names)


def groups(model: nn.Module, options: TrainOptions, new: Collection[str]) -> list[dict[str, Any]]:
    """Parameter groups: decayed or not, and at the highest rate or `head_lr` times that.

    Those that FSDP shares out are groups of their own: an optimizer computes all of a group at once.
    """
    alone = not_decayed(model)
    made: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = name not in alone, name in new, hasattr(parameter, "device_mesh")
            made.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": options.weight_decay if decayed else 0.0,
            "lr": options.learning_rate * (options.head_lr if is_new else 1.0),
        }
        for (decayed, is_new, _), parameters in sorted(made.items())
    ]


def optimizer(model: nn.Module, options: TrainOptions, new: Collection[str]) -> torch.optim.Optimizer:
    """The optimizer of the parameters that learn. Raises ConfigError when there are none."""
    found = groups(model, options, new)
    if not found:
        raise ConfigError(f"--freeze {','.join(options.freeze)}: nothing is left to learn")
    match options.optimizer:
        case "adamw":
            return torch.optim.AdamW(found, fused=_fused(model))
        case "adam":
            return torch.optim.Adam(found, fused=_fused(model))
        case _:
            return torch.optim.SGD(found, momentum=0.9)


def _fused(model: nn.Module) -> bool | None:
    """One kernel for all parameters: of 23 million, 10 ms a step on two cores, and else 37."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain = all(parameter.device.type in ("cpu", "cuda") for parameter in learning)
    # Of FSDP's parameters only some have such kernels.
    return True if plain and not any(hasattr(parameter, "device_mesh") for parameter in learning) else None


def rate(step: int, steps: int, options: TrainOptions) -> float:
    """The learning rate of step 0, 1, ... as a share of the highest."""
    rising = math.ceil(options.warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if options.schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, steps - rising)
    return 1.0 - done if options.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


class MovingAverage:
    """Exponential moving average of a model's weights; its buffers are copied.

    The decay of early steps is (1 + step) / (10 + step), so that the beginning is forgotten soon.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After an optimizer step."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.state[name].lerp_(tensor, 1 - decay)
            else:
                self.state[name].copy_(tensor)
