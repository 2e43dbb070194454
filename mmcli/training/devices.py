"""The processes of a run: one, or several that torchrun or `accelerate launch` started, each with its own device.

accelerate makes the process group and chooses devices, PyTorch's DistributedDataParallel (DDP) adds gradients up
while they are still being computed. Whatever else processes tell one another (the numbers of a step, errors, what
was measured) goes through a second group, of gloo, on the host: there they wait for the first process as long as it
takes to read all rows or to measure a model, where NCCL would end the run after ten minutes; and it is one code for
CPUs and GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from mmcli.core.errors import ConfigError, MmcliError, ModelError, one_line
from mmcli.core.ranks import launched

T = TypeVar("T")
# Longer than any evaluation.
_PATIENCE = timedelta(days=30)


class ProcessLost(ModelError):
    """Another process of the run ended, and did not say why to the others."""

    def __init__(self) -> None:
        super().__init__("another process of the run ended; what it said is the reason")
        self.shared = True


@dataclass(frozen=True, slots=True)
class Devices:
    """Processes and their devices. As it is by default: one, on a device that someone else chooses.

    sharded  no process has the whole model: see mmcli.training.sharding

    Functions that are given to `each` and `first` must not talk to other processes themselves.
    """

    rank: int = 0
    world: int = 1
    device: torch.device | None = None
    sharded: bool = False
    _group: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the first process: it alone writes files and says what goes on."""
        return self.rank == 0

    def numbers(self, *values: float) -> list[tuple[float, ...]]:
        """Those of all processes, in order of rank. 0.4 ms between two processes of one machine."""
        if self.world == 1:
            return [values]
        own = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.world)]
        with _in_touch():
            dist.all_gather(found, own, group=self._group)
        return [tuple(one.tolist()) for one in found]

    def gather(self, value: T) -> list[T]:
        """Those of all processes, in order of rank, in every process; picklable."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with _in_touch():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def collect(self, value: T) -> list[T]:
        """As `gather`, but in the first process alone; the others get an empty list."""
        if self.world == 1:
            return [value]
        found: list[Any] | None = [None] * self.world if self.main else None
        with _in_touch():
            dist.gather_object(value, found, group=self._group)
        return found or []

    def each(self, function: Callable[[], T]) -> T:
        """What it gives in this process; it is called in all, and where it raises in one it raises in all."""
        if self.world == 1:
            return function()
        value, error = _tried(function)
        if any(failed for (failed,) in self.numbers(error is not None)):
            raise self._common(error)
        return value  # type: ignore[return-value]

    def first(self, function: Callable[[], T]) -> T:
        """What it gives in the first process, which alone calls it, while the others wait; picklable."""
        if self.world == 1:
            return function()
        value, error = _tried(function) if self.main else (None, None)
        said = [(value, _Said.of(error))]
        with _in_touch():
            dist.broadcast_object_list(said, group=self._group)
        if said[0][1] is not None:
            raise said[0][1].error(error)
        return said[0][0]  # type: ignore[return-value]

    def _common(self, error: BaseException | None) -> BaseException:
        """The error of the first process that has one."""
        said = self.gather(_Said.of(error))
        rank = next(rank for rank, one in enumerate(said) if one is not None)
        found: _Said = said[rank]  # type: ignore[assignment]
        return found.error(error if rank == self.rank else None)

    def common(self, error: MmcliError) -> MmcliError:
        """For an error that every process raises at the same place: the first one says it."""
        error.shared = self.world > 1
        return error

    def shard(self, model: nn.Module) -> None:
        """Share the model out, if that is asked for. Raises ConfigError."""
        if self.sharded and self.device is not None:
            from mmcli.training.sharding import shard

            try:
                shard(model, self.device, self.world)
            except ConfigError as error:
                raise self.common(error) from None

    def reducer(self, model: nn.Module) -> nn.Module | None:
        """A module that gives a loss through, whose backward pass then adds up the model's gradients: see `_Loss`.

        None where there is one process, or where blocks add up their own. Weights become the first process's.
        """
        if self.world == 1 or self.sharded:
            return None
        from accelerate import Accelerator, DistributedDataParallelKwargs

        settings = DistributedDataParallelKwargs(
            # Checkpoints have weights that their loss does not need, and rows of a chat may have no picture.
            find_unused_parameters=True,
            # They would be written to between forward and backward pass; see `average_statistics`.
            broadcast_buffers=False,
        )
        accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[settings])
        made: nn.Module = accelerator.prepare_model(_Loss(model))
        return made

    @torch.no_grad()
    def average_statistics(self, model: nn.Module) -> None:
        """Let BatchNorm's running statistics be the mean of all processes', whose rows are different ones."""
        if self.world == 1:
            return
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                for buffer in (module.running_mean, module.running_var):
                    if buffer is not None:
                        dist.all_reduce(buffer)
                        buffer /= self.world

    @torch.no_grad()
    def same_weights(self, model: nn.Module) -> None:
        """Those of the first process in all."""
        if self.world > 1 and not self.sharded:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)


class _Loss(nn.Module):
    """What DDP wraps: a forward pass of it tells DDP that the backward pass of this loss comes next.

    DDP expects that all is computed in the wrapped model's forward; here models are called by their towers, or by
    functions of their own, and the loop sees the loss alone. DDP needs no more than that: it looks at the loss's
    graph for the parameters that it will have gradients of.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: torch.Tensor) -> torch.Tensor:
        return loss


def open_devices(name: str, environment: Mapping[str, str] = os.environ) -> Devices:
    """Join the run's other processes, if there are any. `name`: --device. Raises ConfigError."""
    rank, world = launched(environment)
    if world == 1:
        return Devices()
    on_host = _on_host(name, int(environment.get("LOCAL_WORLD_SIZE", str(world))), environment)
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ConfigError(
            "several processes need the library accelerate", hint="pip install 'mmcli[finetune]'"
        ) from error
    try:
        state = PartialState(cpu=on_host)
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"process {rank} of {world} finds no other one: {one_line(str(error))}",
            hint=f"torchrun --nproc-per-node {world} -m mmcli finetune ...",
        ) from error
    # accelerate counts CPUs, too.
    device = torch.device("cpu") if on_host else state.device
    sharded = _asked("FSDP", environment)
    if sharded:
        # Else transformers reads weights in the first process alone, for accelerate to hand them out.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return Devices(state.process_index, state.num_processes, device, sharded, group)


def _on_host(name: str, local: int, environment: Mapping[str, str]) -> bool:
    """Whether the run is on CPUs. Raises ConfigError."""
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if _asked(engine, environment):
            raise ConfigError(
                f"accelerate launch: {engine} is not for mmcli finetune; --multi_gpu or --use_fsdp is"
            )
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {name}: of several processes each gets its own; --device auto, cuda or cpu")
    if name == "cpu" or _asked("CPU", environment):
        return True
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there == 0 and name == "cuda":
        raise ConfigError("--device cuda: no CUDA device can be used here")
    if 0 < there < local:
        raise ConfigError(f"{local} processes for {there} GPUs; --nproc-per-node {there}, or --device cpu")
    return there == 0


def _asked(what: str, environment: Mapping[str, str]) -> bool:
    """Of accelerate launch."""
    return environment.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


@dataclass(frozen=True, slots=True)
class _Said:
    """An error, as it reaches other processes."""

    kind: type[MmcliError]
    arguments: tuple[Any, ...]
    state: dict[str, Any]

    @classmethod
    def of(cls, error: BaseException | None) -> _Said | None:
        if error is None:
            return None
        if not isinstance(error, MmcliError):
            error = MmcliError(f"internal error: {type(error).__name__}: {error}")
        return cls(type(error), error.args, dict(vars(error)))

    def error(self, own: BaseException | None) -> BaseException:
        """That of this process, where it is its own."""
        if own is not None:
            if isinstance(own, MmcliError):
                own.shared = True
            return own
        made = self.kind.__new__(self.kind, *self.arguments)
        made.args = self.arguments
        vars(made).update(self.state, shared=True)
        return made


def _tried(function: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return function(), None
    except BaseException as error:  # noqa: BLE001 - it is raised once all processes know
        return None, error


@contextmanager
def _in_touch() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost from error


@contextmanager
def in_touch() -> Iterator[None]:
    """Raises ProcessLost when gradients cannot be added up because another process has ended."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "by peer" in str(error):
            raise ProcessLost from error
        raise


def interleaved(parts: Sequence[Sequence[T]]) -> list[T]:
    """One of each part in turn: the batches of all processes, in order."""
    longest = max(map(len, parts))
    return [part[n] for n in range(longest) for part in parts if n < len(part)]
