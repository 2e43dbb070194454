"""One training step in two gloo processes: what tests/training/test_contrastive_loss.py spawns."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mmcli.training.contrastive_loss import GradCache, average_gradients, clip_loss, gather_with_grad, siglip_loss

ROWS = 7
# Rows of the first process; the second has the others.
CASES = {
    "clip": ("ddp", 4), "siglip": ("ddp", 4), "groups": ("ddp", 5), "clip in pieces": ("pieces", 4),
    "siglip in pieces": ("pieces", 2),
}  # fmt: skip


class Towers(nn.Module):
    def __init__(self, sigmoid: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.b = nn.Linear(5, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-3.0)) if sigmoid else None
        self.double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), self.b(y)

    def loss(self, a: torch.Tensor, b: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
        """Of this process's vectors, compared with everybody's."""
        a, b = gather_with_grad(a), gather_with_grad(b)
        groups = None if groups is None else gather_with_grad(groups)
        if self.logit_bias is None:
            return clip_loss(a, b, self.logit_scale.exp(), groups)
        return siglip_loss(a, b, self.logit_scale.exp(), self.logit_bias, groups)


def batch(part: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64)
    # Of one group are rows of both processes.
    return x[part], y[part], torch.tensor([0, 1, 2, 1, 3, 0, 4])[part]


def gradients(case: str, part: slice, processes: int) -> dict[str, torch.Tensor]:
    """Of the parameters by name, and the loss, of a process that has some rows of the batch."""
    model = Towers(case.startswith("siglip"))
    x, y, groups = batch(part)
    used = groups if case == "groups" else None
    if processes > 1 and CASES[case][0] == "pieces":
        # As accelerate prepares it: DDP watches the parameters, even when the bare model is called.
        watching = nn.parallel.DistributedDataParallel(model)
        cache = GradCache(model.a, model.b, lambda a, b: model.loss(a, b, used))
        loss = cache.step(x.split(2), y.split(1))
        average_gradients(watching.module)
    else:
        called = nn.parallel.DistributedDataParallel(model) if processes > 1 else model
        loss = model.loss(*called(x, y), used)
        loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def worker(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    found = {}
    for case, (_, first) in CASES.items():
        found[case] = gradients(case, slice(0, first) if rank == 0 else slice(first, None), 2)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
