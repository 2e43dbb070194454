"""Linear layers on a CPU by oneDNN, with weights in the order that it reads them in.

torch hands a float32 layer to MKL, and a bfloat16 one to oneDNN, which brings the weights into its order again for
each batch. With that done once, two cores of an AMD EPYC (Zen 4), 384 to 1,536 and 768 to 3,072 features, times as
fast: float32 1.4 to 1.5 with 800 rows and more, 1.5 to 4.3 with 1 to 64, as texts that are written have them;
bfloat16 1.1 and 1.2 to 2.4. Sums are of the same products in another order: 1e-5 of the largest number and less.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# The call itself takes 12 us longer: 256 to 256 features are as fast either way.
LEAST_WEIGHTS = 100_000
# Weights are there twice: those of the file, which the kernel can forget when they were not converted, stay.
_SHARE_OF_MEMORY = 0.25
# What this process may use, where it is limited: cgroups.
_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


class PackedLinear(nn.Linear):
    """A layer that does not learn any more; see `pack`."""

    _packed: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Features [..., in] -> [..., out]. Raises RuntimeError where gradients are wanted."""
        return _linear(input, self._packed, self.bias)


class PackedConv1D(Conv1D):  # type: ignore[misc]
    """GPT-2's layer: a linear one whose weights are [in, out]."""

    _packed: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As PackedLinear."""
        return _linear(x, self._packed, self.bias)


_KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: PackedLinear, Conv1D: PackedConv1D}


def pack(model: nn.Module) -> int:
    """Pack all linear layers of a model on a CPU that is to learn nothing; how many. None where that is no gain.

    Weights that are changed afterwards change nothing.
    """
    layers = [m for m in model.modules() if type(m) in _KINDS and _fits(m)]
    total = sum(m.weight.nbytes for m in layers)  # type: ignore[misc]
    if not _available() or total > _SHARE_OF_MEMORY * _memory():
        return 0
    done = 0
    for layer in layers:
        weight: Any = layer.weight
        weight = weight.detach().T.contiguous() if isinstance(layer, Conv1D) else weight.detach()
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        except RuntimeError:
            # A processor that oneDNN does not know this dtype on; no memory. The layer works as it is.
            break
        layer.__class__ = _KINDS[type(layer)]
        layer._packed = packed
        done += 1
    return done


def _linear(input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if torch.is_grad_enabled():
        raise RuntimeError("packed layers do not learn")
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(input, packed, bias, "none", [], "")
    return found


def _fits(layer: nn.Module) -> bool:
    """Not where the weight is made anew for each call (weight_norm), or is of a kind of its own (quantized)."""
    weight: Any = layer.weight
    plain = type(weight) is nn.Parameter and type(weight.data) is torch.Tensor and not layer._forward_pre_hooks
    known = weight.dtype in (torch.float32, torch.bfloat16) and weight.device.type == "cpu"
    return plain and known and weight.numel() >= LEAST_WEIGHTS


def _available() -> bool:
    """Measured on x86 alone. torch has these operations for its compiler; some builds may lack them."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def _memory() -> int:
    """Bytes that this process may have. Not those that are free: the same command is to give the same."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    for path in _limits():
        try:
            found.append(int(path.read_text()))
        except (OSError, ValueError):
            # No such limit, or "max".
            continue
    return min(found, default=0)


def _limits() -> Iterator[Path]:
    """Files with the limits of this process's cgroup and those above it, version 1 or 2."""
    try:
        lines = _CGROUP.read_text().splitlines()
    except OSError:
        return
    for number, controllers, path in (line.split(":", 2) for line in lines):
        if number != "0" and "memory" not in controllers.split(","):
            continue
        root, name = (_CGROUPS, "memory.max") if number == "0" else (_CGROUPS / "memory", "memory.limit_in_bytes")
        group = root / path.lstrip("/")
        # A container may see its group as the root, and be told the path from outside.
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                yield folder / name
