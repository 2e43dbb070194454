"""Packed layers: the same numbers as torch's own, in any shape; never where weights may still change."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_encoders
import torch
from model_runs import plan_of
from rare import rarely
from torch import nn
from transformers.pytorch_utils import Conv1D

from mmcli.models import packed
from mmcli.models.packed import PackedConv1D, PackedLinear, pack

pytestmark = pytest.mark.skipif(not packed._available(), reason="torch packs no layers on this machine")

INPUTS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "one row": lambda dtype: torch.randn(1, 96, dtype=dtype),
    "no batch": lambda dtype: torch.randn(96, dtype=dtype),
    "tokens": lambda dtype: torch.randn(3, 17, 96, dtype=dtype),
    "tokens of clips": lambda dtype: torch.randn(2, 3, 5, 96, dtype=dtype),
    "no rows": lambda dtype: torch.randn(0, 96, dtype=dtype),
    "no tokens": lambda dtype: torch.randn(4, 0, 96, dtype=dtype),
    "first tokens": lambda dtype: torch.randn(3, 17, 96, dtype=dtype)[:, 0],
    "transposed": lambda dtype: torch.randn(3, 96, 17, dtype=dtype).transpose(1, 2),
    "expanded": lambda dtype: torch.randn(3, 1, 96, dtype=dtype).expand(3, 7, 96),
}


def layer_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "Conv1D":
        layer = Conv1D(160, 96)
        nn.init.normal_(layer.bias)
        return layer
    return nn.Linear(96, 160, bias=kind == "Linear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Linear", "Linear without bias", "Conv1D"])
@pytest.mark.parametrize("shape", INPUTS)
def test_the_numbers_are_those_of_torch(shape: str, kind: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(layer_of(kind)).to(dtype).eval()
    inputs = INPUTS[shape](dtype)
    weight = model[0].weight.T if kind == "Conv1D" else model[0].weight
    bias = 0 if model[0].bias is None else model[0].bias.double()
    wanted = inputs.double() @ weight.double().T + bias
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # A processor without AVX-512: the layer stays torch's own.
        assert pack(model) == 0
        assert type(model[0]) in (nn.Linear, Conv1D)
        return
    with torch.inference_mode():
        assert pack(model) == 1
        found = model(inputs)
    assert found.dtype == dtype
    # bfloat16 has 8 bits.
    exact = dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5 if exact else 2**-8, atol=1e-5 if exact else 1e-3)


PATCHES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "pictures": (nn.Conv2d(3, 24, 4, 4), (2, 3, 12, 20)),
    "wide patches": (nn.Conv2d(3, 24, (4, 8), (4, 8)), (2, 3, 12, 16)),
    "without bias": (nn.Conv2d(3, 24, 4, 4, bias=False), (2, 3, 12, 20)),
    "pixels left over": (nn.Conv2d(3, 24, 4, 4), (2, 3, 15, 22)),
    "spectrograms": (nn.Conv2d(1, 24, 4, 4, padding="valid"), (2, 1, 12, 20)),
    "no pictures": (nn.Conv2d(3, 24, 4, 4), (0, 3, 12, 20)),
    "clips": (nn.Conv3d(3, 24, (2, 4, 4), (2, 4, 4)), (2, 3, 4, 8, 12)),
    "a frame left over": (nn.Conv3d(3, 24, (2, 4, 4), (2, 4, 4)), (2, 3, 5, 8, 12)),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, "channels last"], ids=str)
@pytest.mark.parametrize("kind", PATCHES)
def test_patches_are_those_of_torch(kind: str, layout: torch.memory_format | str) -> None:
    layer, shape = PATCHES[kind]
    model = nn.Sequential(copy.deepcopy(layer)).eval()
    pixels = torch.randn(shape)
    if layout == "channels last":
        pixels = pixels.movedim(1, -1).contiguous().movedim(-1, 1)
    with torch.inference_mode():
        wanted = layer(pixels)
        assert pack(model) == 1
        found = model(pixels)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    # As models go on: their tokens, without a copy.
    assert found.flatten(2).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(3, 3, 12), (2, 4, 12, 12), (3, 12, 12, 12, 1)])
def test_pixels_that_torch_refuses_are_refused_in_its_words(shape: tuple[int, ...]) -> None:
    layer = nn.Conv2d(3, 24, 4, 4)
    model = nn.Sequential(copy.deepcopy(layer))
    pack(model)
    with torch.inference_mode():
        with pytest.raises(RuntimeError) as wanted:
            layer(torch.randn(shape))
        with pytest.raises(RuntimeError) as found:
            model(torch.randn(shape))
        assert str(found.value) == str(wanted.value)
        # One without a batch it takes.
        torch.testing.assert_close(model(torch.ones(3, 8, 8)), layer(torch.ones(3, 8, 8)))


def test_convolutions_that_read_a_pixel_twice_or_never_are_left_as_they_are() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 24, 4, 2),
        nn.Conv2d(3, 24, 4, 5),
        nn.Conv2d(3, 24, 4, 4, padding=1),
        nn.Conv2d(3, 24, 4, 4, dilation=2),
        nn.Conv2d(4, 24, 4, 4, groups=2),
        nn.Conv2d(3, 24, 1, 1),
        nn.Conv2d(3, 24, 4, 4, dtype=torch.bfloat16),
        nn.Conv1d(3, 24, 16, 16),
    )
    assert pack(model) == 0


def test_a_row_does_not_depend_on_the_others() -> None:
    model = nn.Sequential(nn.Linear(384, 384), nn.GELU(), nn.Linear(384, 1536)).eval()
    pack(model)
    rows = torch.randn(700, 384)
    with torch.inference_mode():
        together = model(rows)
        alone = torch.cat([model(row[None]) for row in rows[::50]])
    torch.testing.assert_close(together[::50], alone, rtol=1e-5, atol=1e-5)


def test_what_is_packed_does_not_learn() -> None:
    model = nn.Sequential(nn.Linear(96, 96))
    pack(model)
    with pytest.raises(RuntimeError, match="do not learn"):
        model(torch.randn(2, 96))


def test_weights_that_memory_does_not_hold_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(96, 96))
    monkeypatch.setattr(packed, "_memory", lambda: 4 * 96 * 96 * 4 - 1)
    assert pack(model) == 0
    monkeypatch.setattr(packed, "_memory", lambda: 4 * 96 * 96 * 4)
    assert pack(model) == 1


def test_the_limit_of_a_group_of_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of its own and of those above it the least; version 2 and 1, and no limit at all."""
    everything = packed._memory()
    (tmp_path / "cgroup").write_text("7:cpu,cpuacct:/x\n5:memory:/jobs/7\n0::/user.slice/run\n")
    monkeypatch.setattr(packed, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(packed, "_CGROUPS", tmp_path)
    for name, text in (("user.slice/run/memory.max", "max"), ("user.slice/memory.max", "5000000"),
                       ("memory/jobs/7/memory.limit_in_bytes", "9223372036854771712"),
                       ("memory/memory.limit_in_bytes", "4000000")):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert packed._memory() == 4_000_000
    (tmp_path / "memory" / "memory.limit_in_bytes").unlink()
    assert packed._memory() == 5_000_000
    (tmp_path / "cgroup").unlink()
    assert packed._memory() >= everything


@pytest.mark.parametrize("isa", ["AVX2", *rarely(["SSE41"])])
def test_processors_that_do_not_know_bfloat16(isa: str) -> None:
    """What cannot be packed there is computed as it is."""
    script = """
import torch
from mmcli.models.packed import pack
for dtype in (torch.float32, torch.bfloat16):
    model = torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.Linear(400, 400)).to(dtype).eval()
    inputs = torch.randn(3, 400).to(dtype)
    with torch.inference_mode():
        wanted = model(inputs)
        pack(model)
        assert torch.allclose(model(inputs).float(), wanted.float(), atol=1e-2 if dtype == torch.bfloat16 else 1e-5)
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_are_made_for_each_call_are_left_as_they_are() -> None:
    model = nn.Sequential(
        nn.utils.weight_norm(nn.Linear(96, 96)), nn.utils.parametrizations.weight_norm(nn.Linear(96, 96))
    )
    assert pack(model) == 0


def test_small_layers_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST_WEIGHTS", 97 * 96)
    model = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 97))
    assert pack(model) == 1
    assert [type(layer) for layer in model] == [nn.Linear, PackedLinear]


def test_other_kinds_of_layers_are_left_as_they_are() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Scaled(96, 96), Conv1D(96, 96), nn.MultiheadAttention(96, 2))
    assert pack(model) == 1
    assert isinstance(model[1], PackedConv1D)


@pytest.mark.parametrize(("options", "count"), [({}, True), ({"compile": True}, False), ({"learns": True}, False)])
def test_models_that_only_compute_are_packed(options: dict[str, bool], count: bool, tmp_path: Path) -> None:
    from dataclasses import replace

    from transformers import AutoModel

    from mmcli.models.runner import load_model

    plan = plan_of(tiny_encoders.TEXTS["bert"](tmp_path / "bert"), device="cpu")
    model = load_model(AutoModel, replace(plan, **options), torch.device("cpu"))
    assert any(isinstance(layer, PackedLinear) for layer in model.modules()) == count
