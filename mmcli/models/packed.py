"""Linear layers, and those of patches, on a CPU by oneDNN, with weights in the order that it reads them in.

torch hands a float32 layer to MKL, and a bfloat16 one to oneDNN, which brings the weights into its order again for
each batch. With that done once, two cores of an AMD EPYC (Zen 4), 384 to 1,536 and 768 to 3,072 features, times as
fast: float32 1.4 to 1.5 with 800 rows and more, 1.5 to 4.3 with 1 to 64, as texts that are written have them;
bfloat16 1.1 and 1.2 to 2.4. Sums are of the same products in another order: 1e-5 of the largest number and less.

A convolution whose kernels do not overlap is a linear layer of patches. torch runs it as any other, at 41 GFLOPS on
two cores where packed layers reach 100 (AVX2): as one, copy of the patches included, ViT-B/16's 1.4 times as fast,
B/32's 1.5, L/14's 1.3 to 1.9, Swin's and ConvNeXt's first 1.6 to 2.0, VideoMAE's 1.6.
"""

from __future__ import annotations

import math
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
# Pixels of a patch. ConvNeXt's later layers, 2 x 2 of 96 channels and more, are 0.5 to 1.9 times as fast.
LEAST_PATCH = 16
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


class PackedConv2d(nn.Conv2d):
    """Patches of pictures: kernels as far apart as they are wide."""

    _packed: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Pixels [n, C, H, W] -> [n, D, h, w], laid out as channels_last. Raises as PackedLinear."""
        return super().forward(input) if _unlike(self, input) else _patches(self, input)


class PackedConv3d(nn.Conv3d):
    """Patches of clips."""

    _packed: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Pixels [n, C, T, H, W] -> [n, D, t, h, w], as PackedConv2d."""
        return super().forward(input) if _unlike(self, input) else _patches(self, input)


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: PackedLinear,
    Conv1D: PackedConv1D,
    nn.Conv2d: PackedConv2d,
    nn.Conv3d: PackedConv3d,
}


def pack(model: nn.Module) -> int:
    """Pack the layers of a model on a CPU that is to learn nothing; how many. None where that is no gain.

    Weights that are changed afterwards change nothing.
    """
    layers = [m for m in model.modules() if type(m) in _KINDS and _fits(m)]
    total = sum(m.weight.nbytes for m in layers)  # type: ignore[misc]
    if not _available() or total > _SHARE_OF_MEMORY * _memory():
        return 0
    done = 0
    for layer in layers:
        weight: Any = layer.weight
        weight = weight.detach().T if isinstance(layer, Conv1D) else weight.detach().flatten(1)
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
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


def _unlike(layer: Any, pixels: torch.Tensor) -> bool:
    """Inputs without a batch, or what torch refuses in its own words: other channels, sides below a patch's."""
    size: tuple[int, ...] = layer.kernel_size
    if pixels.ndim != len(size) + 2 or pixels.shape[1] != layer.in_channels:
        return True
    return any(side < width for side, width in zip(pixels.shape[2:], size, strict=True))


def _patches(layer: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[n, C, *sides] -> [n, D, *patches]; what is left over at the far ends is left out, as torch does."""
    size: tuple[int, ...] = layer.kernel_size
    for axis, width in enumerate(size, start=2):
        pixels = pixels.unfold(axis, width, width)
    # [n, C, *patches, *size] -> [n, *patches, C x size], which is what one row of the weights is for.
    rows = pixels.movedim(1, 1 + len(size)).flatten(1 + len(size))
    return _linear(rows, layer._packed, layer.bias).movedim(-1, 1)


def _fits(layer: nn.Module) -> bool:
    """Not where the weight is made anew for each call (weight_norm), or is of a kind of its own (quantized)."""
    weight: Any = layer.weight
    plain = type(weight) is nn.Parameter and type(weight.data) is torch.Tensor and not layer._forward_pre_hooks
    if not plain or weight.device.type != "cpu":
        return False
    if isinstance(layer, nn.Conv2d | nn.Conv3d):
        # bfloat16 was not measured.
        return weight.dtype == torch.float32 and _makes_patches(layer)
    return weight.dtype in (torch.float32, torch.bfloat16) and weight.numel() >= LEAST_WEIGHTS


def _makes_patches(layer: nn.Conv2d | nn.Conv3d) -> bool:
    """Whether it reads each pixel once."""
    apart = layer.stride == layer.kernel_size and math.prod(layer.kernel_size) >= LEAST_PATCH
    bare = layer.padding == "valid" or not any(layer.padding)
    return apart and bare and layer.groups == 1 and set(layer.dilation) == {1}


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
