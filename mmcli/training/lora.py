"""Low-rank adaptation (LoRA, Hu et al. 2021), by the library peft."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmcli.core.errors import ConfigError
from mmcli.models.adapters import BASE_FILE, PREFIX, WEIGHTS
from mmcli.models.checkpoint import Checkpoint

SAVES = ("merged", "adapter")


class Lora:
    """Adapters in a model's linear layers; the model itself stays the object that it was.

    Its other weights are frozen, but for those that are new. Raises ConfigError without peft, and for a model
    without linear layers.
    """

    def __init__(self, model: nn.Module, rank: int, alpha: float | None, new: Collection[str]) -> None:
        try:
            import peft
        except ImportError as error:
            raise ConfigError("--lora-rank needs the library peft", hint="pip install 'mmcli[finetune]'") from error
        heads = sorted({name.rpartition(".")[0] for name in new})
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            target_modules="all-linear",
            exclude_modules=[*heads, *_tied(model)] or None,
        )
        try:
            self._adapted: Any = peft.get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(f"--lora-rank {rank}: this model has no linear layers to adapt") from error
        self._model, self._heads = model, frozenset(new)
        self.new = frozenset(name for name, p in model.named_parameters() if p.requires_grad) | frozenset(new)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.new)

    def merged(self) -> Any:
        """A copy of the model with the adapters added to its weights: what it was before, for every other tool."""
        return copy.deepcopy(self._adapted).merge_and_unload()

    def kept(self, bases: Mapping[str, Checkpoint]) -> KeptModel:
        """The model, which is saved as an adapter of `bases` (see mmcli.models.adapters.Adapter)."""
        return KeptModel(self._model, self._adapted, self._heads, bases)


def _tied(model: nn.Module) -> list[str]:
    """Linear layers whose weight is another module's, too: a difference merged into it would reach both.

    So is BLIP's last layer, whose weight is that of its words; peft finds such layers only at the top of a model.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    shared = {owner for names in owners.values() if len(set(names)) > 1 for owner in names}
    return sorted(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name in shared
    )


@dataclass(slots=True)
class KeptModel:
    """A model whose `save_pretrained` writes what its bases lack, as peft does.

    That is: the adapters, new layers, whatever else learned (logit scales), and statistics of batch norms.
    """

    model: Any
    adapted: Any
    new: frozenset[str]
    bases: Mapping[str, Checkpoint]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def save_pretrained(self, folder: Path) -> None:
        """Write adapter_config.json, adapter_model.safetensors and mmcli_adapter.json into an existing folder."""
        from peft.utils import get_peft_model_state_dict
        from safetensors.torch import save_file

        added = get_peft_model_state_dict(self.adapted, save_embedding_layers=False)
        whole = {name: tensor for name, tensor in self._whole().items() if PREFIX + name not in added}
        tensors = {**added, **{PREFIX + name: tensor for name, tensor in whole.items()}}
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        self._write_config(folder, _whole_modules(self.model, whole))
        config = copy.deepcopy(self.model.config)
        config.architectures = [type(self.model).__name__]
        bases = {name: _described(base, folder) for name, base in self.bases.items()}
        told = {"bases": bases, "config": json.loads(config.to_json_string())}
        (folder / BASE_FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)

    def _whole(self) -> dict[str, torch.Tensor]:
        parameters = dict(self.model.named_parameters())
        learned = {
            name: p
            for name, p in parameters.items()
            if (p.requires_grad or name in self.new) and ".lora_" not in name
        }
        # Heads for training alone.
        for name in self.model._keys_to_ignore_on_save or ():
            learned.pop(name, None)
        aliases = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        buffers = {name: tensor for name, tensor in self.model.state_dict().items() if name not in aliases}
        return {**learned, **buffers}

    def _write_config(self, folder: Path, modules: list[str]) -> None:
        config = copy.deepcopy(self.adapted.peft_config["default"])
        config.inference_mode, config.modules_to_save = True, modules or None
        # Sets, which have another order in every process.
        config.target_modules = sorted(set(config.target_modules) - set(config.exclude_modules or ()))
        base = self.bases.get("")
        if base is not None:
            config.base_model_name_or_path = _place(base)
            config.revision = base.revision
        made = type(self.model)
        config.save_pretrained(
            folder, auto_mapping_dict={"base_model_class": made.__name__, "parent_library": made.__module__}
        )


def _whole_modules(model: nn.Module, whole: Collection[str]) -> list[str]:
    """Layers all of whose weights are there, for peft's `modules_to_save`, none in another.

    It finds them by the ends of names; what is in none of them it takes from the file by its name, too.
    """
    names = [name for name, _ in model.named_modules()]
    found: list[str] = []
    for owner in sorted({name.rpartition(".")[0] for name in whole}):
        own = {f"{owner}.{name}" for name in model.get_submodule(owner).state_dict()}
        is_inside = owner.startswith(tuple(f"{outer}." for outer in found))
        if owner and not is_inside and own <= set(whole) and [n for n in names if n.endswith(owner)] == [owner]:
            found.append(owner)
    return found


def _place(base: Checkpoint) -> str:
    return base.id if base.revision else str(base.root.resolve())


def _described(base: Checkpoint, folder: Path) -> dict[str, Any]:
    """See BASE_FILE."""
    if base.revision:
        return {"model": base.id, "revision": base.revision}
    near = os.path.relpath(base.root.resolve(), folder.resolve())
    return {"model": _place(base), "revision": None, "near": near, "weights": base.weights_digest}


def bases_of(objective: Any) -> Mapping[str, Checkpoint]:
    """The checkpoints whose weights an objective's model has: one, or those of a fusion's encoders."""
    encoders: Mapping[str, Checkpoint] | None = getattr(getattr(objective, "network", None), "encoders", None)
    return encoders or {"": objective.plan.checkpoint}


def check_lora(objective: Any, save: str) -> None:
    """Raise ConfigError for a base without linear layers, and one that is an adapter where one is to be kept.

    The layers are made without weights (torch's meta device): some tenths of a second.
    """
    bases = bases_of(objective)
    for name, base in bases.items():
        if save == "adapter" and base.adapter is not None:
            flag = f"--encoder {name}={base.id}" if name else f"-m {base.id}"
            raise ConfigError(
                f"--lora-save adapter: {flag} is an adapter itself, and peft loads no adapters of adapters; "
                "--lora-save merged"
            )
    # Models for several modalities are transformers, whose layers are linear.
    if hasattr(objective, "network") and not any(_has_linear(base) for base in bases.values()):
        raise ConfigError(f"--lora-rank: {', '.join(b.id for b in bases.values())} has no linear layers to adapt")


def _has_linear(base: Checkpoint) -> bool:
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            model = AutoModel.from_config(base.config, trust_remote_code=base.trust_remote_code)
    except Exception:  # noqa: BLE001
        # Of a model that cannot be made so it is told once it is loaded.
        return True
    return any(isinstance(module, nn.Linear) for module in model.modules())
