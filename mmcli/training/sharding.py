"""Weights, gradients and the optimizer's state of a model's blocks, shared out among processes: PyTorch's FSDP.

`accelerate launch --use_fsdp` asks for it, its flags say how (FullyShardedDataParallelPlugin). It is `fully_shard`
(FSDP2) of each block, and of nothing around them: models here are called by their towers, by `generate` or by
functions of their own, and a block gathers its weights whichever way it is reached, where a root would do so in its
own forward alone. (accelerate's `prepare` shards a root, and fails for ViT.) What is outside of blocks, embeddings
and heads, stays whole in every process.

In files all is whole, so that models load everywhere, and runs go on with any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mmcli.core.errors import ConfigError
from mmcli.training.options import TrainOptions


def check_shardable(options: TrainOptions, joint: bool) -> None:
    """Raises ConfigError for what cannot be shared out, all of it."""
    problems = [
        f"FSDP and {option} exclude one another"
        for option, given in (
            ("--objective contrastive", joint),
            ("--lora-rank", options.lora_rank is not None),
            ("--ema", options.ema is not None),
            ("--wise-ft", options.wise_ft is not None),
            ("--average-best", options.average_best is not None),
            ("--precision fp16", options.precision == "fp16"),
        )
        if given
    ]
    if problems:
        raise ConfigError(problems, hint="--multi_gpu in place of --use_fsdp: every process has the whole model")


def shard(model: nn.Module, device: torch.device, world: int) -> None:
    """Share out the blocks of a model that is on its device. Raises ConfigError for a model without blocks."""
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ConfigError("accelerate launch: --fsdp_offload_params is not for mmcli finetune")
    blocks = blocks_of(model, plugin.transformer_cls_names_to_wrap)
    if not blocks:
        named = ", ".join(plugin.transformer_cls_names_to_wrap or ()) or "what transformers does not split"
        raise ConfigError(
            f"FSDP: this model has no list of {named}",
            hint="--fsdp_transformer_layer_cls_to_wrap NAME, or --multi_gpu in place of --use_fsdp",
        )
    mesh = init_device_mesh(device.type, (world,))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
    for module in model.modules():
        if not hasattr(module, "generate"):
            # So transformers calls layers that one process leaves out at random (HuBERT), and forgets the result.
            module._is_fsdp_managed_module = True  # type: ignore[assignment]


def blocks_of(model: nn.Module, names: Sequence[str] | None = None) -> list[nn.Module]:
    """Modules in lists of modules, of classes of these names; None: those that transformers does not split.

    The outermost ones, and none with a parameter that is used elsewhere, too: it would be two.
    """
    known = set(names or ())
    if names is None:
        for module in model.modules():
            known |= set(getattr(module, "_no_split_modules", None) or ())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = [block for one in lists for block in one if type(block).__name__ in known]
    inner = {id(module) for block in found for module in block.modules() if module is not block}
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return [
        block for block in found if id(block) not in inner and all(uses[id(p)] == 1 for p in block.parameters())
    ]


def whole(state: Any) -> Any:
    """A state with whole tensors; to be called in all processes."""
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, Mapping):
        return {name: whole(value) for name, value in state.items()}
    return [whole(value) for value in state] if isinstance(state, list) else state


def shared_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, shared out as another one is."""
    if not isinstance(other, DTensor) or isinstance(tensor, DTensor) or tensor.shape != other.shape:
        return tensor
    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def load_whole(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put whole states of a model and its optimizer where those are, in part."""
    own = model.state_dict()
    model.load_state_dict(
        {name: shared_like(tensor, own[name]) if name in own else tensor for name, tensor in state["model"].items()}
    )
    found = state["optimizer"]
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    moments = {
        index: {
            name: shared_like(value, parameters[index]) if isinstance(value, torch.Tensor) else value
            for name, value in values.items()
        }
        for index, values in found["state"].items()
    }
    optimizer.load_state_dict({**found, "state": moments})


@contextmanager
def saving_whole(model: Any, state: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """Within the block `model.save_pretrained` writes this state; None: its own."""
    if state is None:
        yield
        return
    model.save_pretrained = partial(model.save_pretrained, state_dict=dict(state))
    try:
        yield
    finally:
        del model.save_pretrained


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """As nn.utils.clip_grad_norm_; parts of tensors and whole ones, which it does not take together."""
    kinds: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        kinds[isinstance(parameter, DTensor)].append(parameter)
    norms = []
    for some in filter(None, kinds):
        norm = nn.utils.get_total_norm([p.grad for p in some if p.grad is not None])
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
    total = math.hypot(*norms)
    for some in filter(None, kinds):
        nn.utils.clip_grads_with_norm_(some, limit, torch.tensor(total, device=some[0].device))
    return total
