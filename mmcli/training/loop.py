"""The training loop: steps, evaluations, checkpoints, and going on exactly where a run was."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmcli.core.durable import link_files, output_errors, swap_folder
from mmcli.core.errors import ExitCode, ModelError, StateMismatch, Stopped, TryAgain
from mmcli.training.augment import spare_short_sounds
from mmcli.training.auxiliary import AuxiliaryHeads, AuxiliaryLabels
from mmcli.training.checkpoints import (
    Parts,
    Progress,
    generators,
    learned,
    load_checkpoint,
    save_checkpoint,
    seed_generators,
)
from mmcli.training.contrastive_loss import average_gradients
from mmcli.training.data import Batches, InOrder, Rows, class_weights, load
from mmcli.training.devices import Devices, in_touch, interleaved
from mmcli.training.estimate import Forecast, describe_memory, memory_before
from mmcli.training.log import MetricsLog
from mmcli.training.lora import Lora, bases_of
from mmcli.training.objective import Objective
from mmcli.training.optimizer import MovingAverage, optimizer, rate
from mmcli.training.options import TrainOptions
from mmcli.training.sharding import clip_gradients, saving_whole, whole
from mmcli.training.soup import Soup
from mmcli.training.towers import freeze, parameter_counts

CHECKPOINT, BEST, LAST, EVALUATED = "checkpoint", "best", "last", "evaluated"
# Steps between lines of the log; the first ones all stand there.
LOG_STEPS = 10
# Seeds of processes are so far apart.
_APART = 1_000_003


@dataclass(slots=True)
class Events:
    """How a run is watched and stopped.

    told     called with each line of the log
    stop     why to stop now; None: go on
    note     called with what is worth knowing before and at the beginning
    stepped  called after each step with how many there are so far, and in all
    """

    told: Callable[[dict[str, Any]], None]
    stop: Callable[[], ExitCode | None]
    note: Callable[[str], None] = lambda text: None
    stepped: Callable[[int, int], None] = lambda step, steps: None


@dataclass(slots=True)
class Data:
    """What is learned from, and what it is measured on."""

    train: Rows
    val: Rows


@dataclass(frozen=True, slots=True)
class RunLimits:
    """What changes no weight.

    num_workers         processes that read rows
    checkpoint_seconds  time between checkpoints; there is one after each evaluation, too
    time_limit_s        stop after so long, and go on the next time
    """

    num_workers: int = 2
    checkpoint_seconds: float = 600.0
    time_limit_s: float | None = None


@dataclass(slots=True)
class Pace:
    """Rows a second between two lines of the log, without evaluations and checkpoints."""

    rows: int = 0
    began: float = 0.0

    def restart(self) -> None:
        """Count from now."""
        self.rows, self.began = 0, time.monotonic()

    def lap(self) -> float:
        """The pace since the last lap or restart."""
        pace = self.rows / max(time.monotonic() - self.began, 1e-9)
        self.restart()
        return pace


@dataclass
class Trainer:
    """One run, in its folder, of one process or several: then all of them call `train`.

    auxiliary  what the encoder learns to tell beside the objective, a `Write` or a `Contrastive` with whole batches
    """

    run: Path
    objective: Objective
    data: Data
    options: TrainOptions
    limits: RunLimits
    events: Events
    device: torch.device
    devices: Devices = field(default_factory=Devices)
    progress: Progress = field(default_factory=Progress)
    auxiliary: AuxiliaryLabels | None = None
    _heads: AuxiliaryHeads | None = None
    _lora: Lora | None = None
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=LOG_STEPS))
    _pace: Pace = field(default_factory=Pace)

    def train(self) -> Progress:
        """Train to the end; returns how far it came. Raises Stopped, TryAgain, ModelError, UnreadableRow.

        The last checkpoint stays: whoever asks has more to do with the model before the run is complete.
        """
        devices = self.devices
        # Of all processes, so that new weights are the same; what dropout draws afterwards is each one's own.
        seed_generators(self.options.seed)
        model, new = devices.each(self._build)
        devices.shard(model)
        self._parts = devices.each(lambda: self._make_parts(model, new))
        if devices.rank:
            seed_generators(self.options.seed + _APART * devices.rank)
        self.progress = devices.each(self._where_it_was)
        self._agree()
        self._log = devices.each(lambda: MetricsLog(self.run, self.progress.step) if devices.main else None)
        self._began = self._saved = time.monotonic()
        weights = class_weights([row.target for row in self.data.train.rows]) if self.options.balance else None
        self._batches = Batches(
            len(self.data.train), self.options.batch_size, self.options.seed, weights, devices.rank, devices.world
        )
        self.events.note(parameter_counts(self._parts.model))
        self.events.note(describe_memory(memory_before(self._parts.model, self.options)))
        left = f", {self.steps - self.progress.step} left" if self.progress.step else ""
        self.events.note(
            f"{self.steps} steps of {self.options.batch_size} rows, {len(self._batches)} an epoch{left}"
        )
        self._forecast = Forecast(self.events.note, self.device, self.progress.step, self.steps)
        try:
            self._epochs()
        finally:
            if self._log is not None:
                self._log.close()
        return self.progress

    def _where_it_was(self) -> Progress:
        found = load_checkpoint(self.run / CHECKPOINT, self._parts, self.device, self.devices.rank)
        return found or Progress()

    def _agree(self) -> None:
        """All processes begin at the same step with the same weights. Raises StateMismatch."""
        if any(other != self.progress for other in self.devices.gather(self.progress)):
            error = StateMismatch(
                f"not all processes see the checkpoint in {self.run}: they must share that folder"
            )
            raise self.devices.common(error)
        # GradCache encodes a piece twice, and each pass would begin with a backward pass of DDP's.
        joined = self.objective.joint and self.options.accumulation > 1
        if self.devices.sharded:
            one_row = load(self.data.train, InOrder(1, 1), _Pieces(self.objective, 1), 0)
            self._spare = self.devices.each(lambda: next(one_row)[0][0])
        with in_touch():
            self._reducer = None if joined else self.devices.reducer(self._parts.model)
            if self._reducer is None:
                self.devices.same_weights(self._parts.model)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        whole = len(self._batches) * self.options.epochs
        return whole if self.options.max_steps is None else min(whole, self.options.max_steps)

    def _build(self) -> tuple[nn.Module, frozenset[str]]:
        """The model, and the names of its new weights."""
        model = self.objective.build(self.device)
        spare_short_sounds(model)
        new, options = self.objective.new_weights(), self.options
        if options.lora_rank is not None:
            self._lora = Lora(model, options.lora_rank, options.lora_alpha, new)
            new = self._lora.new
        if self.auxiliary is not None:
            self._heads = AuxiliaryHeads(model, self.auxiliary)
            new |= self._heads.names
        self._frozen = freeze(model, options.freeze)
        self.objective.adapted(model)
        if self.options.gradient_checkpointing:
            _checkpoint_gradients(model)
        return model, new

    def _make_parts(self, model: nn.Module, new: frozenset[str]) -> Parts:
        options = self.options
        if options.wise_ft is not None:
            self._base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        average = MovingAverage(model, self.options.ema) if self.options.ema is not None else None
        scaler = torch.amp.grad_scaler.GradScaler(self.device.type) if self.options.precision == "fp16" else None
        return Parts(model, optimizer(model, self.options, new), average, scaler)

    def _epochs(self) -> None:
        while self.progress.step < self.steps and not self._gives_up:
            self._batches.epoch, self._batches.start = self.progress.epoch, self.progress.epoch_step
            self._epoch()
            if self.progress.epoch_step >= len(self._batches):
                self.progress.epoch, self.progress.epoch_step = self.progress.epoch + 1, 0
                if self.options.eval_steps is None:
                    self._evaluate()
        if self.progress.evaluated != self.progress.step:
            self._evaluate()
        self._save(LAST)
        self._average_best()

    def _epoch(self) -> None:
        """The steps of an epoch that are left."""
        collate = _Pieces(self.objective, self.options.accumulation)
        self._pace.restart()
        batches = load(self.data.train, self._batches, collate, self.limits.num_workers)
        while (pieces := self.devices.each(lambda: next(batches, None))) is not None:
            self._step(pieces)
            self.events.stepped(self.progress.step, self.steps)
            every = self.options.eval_steps
            if every is not None and self.progress.step % every == 0:
                self._evaluate()
            if self.progress.step >= self.steps or self._gives_up:
                return
            self._look_up()

    def _step(self, pieces: list[Any]) -> None:
        parts, progress, options = self._parts, self.progress, self.options
        parts.model.train()
        self._frozen.eval()
        share = rate(progress.step, self.steps, options)
        for group in parts.optimizer.param_groups:
            # What it is at the highest is kept in the group itself, and in its checkpoint.
            group.setdefault("highest", group["lr"])
            group["lr"] = group["highest"] * share
        parts.optimizer.zero_grad(set_to_none=True)
        loss = self._gradients(pieces)
        if not math.isfinite(loss):
            raise self._not_finite(loss)
        norm = self._update()
        self.objective.after_step(parts.model)
        self._pace.rows += self._batches.rows_of(progress.epoch_step)
        progress.step, progress.epoch_step = progress.step + 1, progress.epoch_step + 1
        if parts.average is not None:
            parts.average.update(parts.model, progress.step)
        self._losses.append(loss)
        self._forecast.after(progress.step)
        if progress.step <= LOG_STEPS or progress.step % LOG_STEPS == 0:
            mean, highest = sum(self._losses) / len(self._losses), options.learning_rate
            beside = {} if self._heads is None else {"auxiliary_loss": self._heads.total}
            self._tell(
                loss=mean, **beside, lr=highest * share, grad_norm=norm, rows_per_s=round(self._pace.lap(), 2)
            )

    def _gradients(self, pieces: list[Any]) -> float:
        """Those of the whole batch, in every process; returns its loss.

        DDP adds them up while the backward pass of the last piece is under way: a step on 32 GPUs took up to 38 %
        less time than with sums afterwards (Li et al. 2020, "PyTorch Distributed"). It wants a backward pass in
        every process, for which the last rows of an epoch may be too few, and knows of none within GradCache: then
        `average_gradients` follows. Either takes the mean over processes.
        """
        model, objective = self._parts.model, self.objective
        if self.devices.sharded:
            # All processes must call each block equally often, and after each time back: part by part.
            pieces = [[part] for piece in pieces for part in piece]
        counts = self.devices.numbers(objective.count(pieces), len(pieces))
        total = sum(count for count, _ in counts)
        overlapped = self._reducer is not None and all(there for _, there in counts)
        self._left = len(pieces) if overlapped else -1
        if self._heads is not None:
            self._heads.begin([self.objective.auxiliary(piece) for piece in pieces])  # type: ignore[attr-defined]
        with in_touch(), self._autocast():
            loss = 0.0
            if pieces or objective.joint:
                loss = objective.step(model, pieces, float(total), self._backward)
            if self._heads is not None:
                self._heads.end()
            if self.devices.sharded:
                for _ in range(len(pieces), int(max(there for _, there in counts))):
                    objective.step(model, [[self._spare]], math.inf, self._backward)
            if not overlapped:
                average_gradients(model)
            self.devices.average_statistics(model)
        return sum(part for (part,) in self.devices.numbers(loss))

    def _update(self) -> float:
        """The optimizer's step; returns the gradients' norm before it was cut."""
        parts = self._parts
        if parts.scaler is not None:
            parts.scaler.unscale_(parts.optimizer)
        learning = [p for p in parts.model.parameters() if p.grad is not None]
        limit = self.options.max_grad_norm
        clip = clip_gradients if self.devices.sharded else nn.utils.clip_grad_norm_
        norm = float(clip(learning, math.inf if limit is None else limit))
        if parts.scaler is not None:
            parts.scaler.step(parts.optimizer)
            parts.scaler.update()
        else:
            if not math.isfinite(norm):
                raise self._not_finite(norm)
            parts.optimizer.step()
        return norm

    def _backward(self, loss: torch.Tensor) -> None:
        if self._heads is not None and (beside := self._heads.loss()) is not None:
            loss = loss + beside
        if self.devices.world > 1 and not self.objective.joint:
            # The sum over processes, of which the mean is taken.
            loss = loss * self.devices.world
        self._left -= 1
        if self._left == 0 and self._reducer is not None:
            loss = self._reducer(loss)
        with torch.autocast(self.device.type, enabled=False):
            (loss if self._parts.scaler is None else self._parts.scaler.scale(loss)).backward()

    def _autocast(self) -> AbstractContextManager[Any]:
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        if self.options.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=kinds[self.options.precision])

    def _not_finite(self, value: float) -> ModelError:
        rows = [self.data.train.rows[row].id for row in self._batches.batch(self.progress.epoch_step)]
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        error = ModelError(
            f"the loss or its gradients are {value} at step {self.progress.step + 1}, rows {shown}; the checkpoint "
            "before it and the best model are kept",
            hint="a smaller --learning-rate, or --precision fp32; look at these rows",
        )
        self.devices.common(error)
        return error

    # ------------------------------------------------------------------------------- evaluation, saving

    def _evaluate(self) -> None:
        progress, name = self.progress, self.objective.metric
        with self._averaged():
            found = self._measured()
            value = found[name]
            progress.evaluated = progress.step
            self._tell(**{f"val_{key}": number for key, number in found.items()})
            if progress.best is None or value > progress.best:
                progress.best, progress.best_step, progress.worse = value, progress.step, 0
                self._save_model(BEST)
            else:
                progress.worse += 1
            self._keep(value)
        self._checkpoint()
        if (soup := self._soup) is not None:
            self.devices.first(lambda: soup.tidy(progress.kept))

    def _measured(self) -> dict[str, float]:
        """The metrics of the model as it is, of all validation rows."""
        self._parts.model.eval()
        if self.devices.sharded:
            # Blocks are whole where all processes call them.
            predicted = [self._predict(0, 1)]
        else:
            # Batches are those of one process, and so are the numbers.
            own = self.devices.each(lambda: self._predict(self.devices.rank, self.devices.world))
            predicted = self.devices.collect(own)
        return self.devices.first(lambda: self.objective.measured(interleaved(predicted)))

    @property
    def _soup(self) -> Soup | None:
        most = self.options.average_best
        return None if most is None else Soup(self.run / EVALUATED, most)

    def _keep(self, value: float) -> None:
        """The weights that were measured, if they are among the best."""
        progress, soup = self.progress, self._soup
        if soup is not None:
            progress.kept = soup.ranked(progress.kept, value, progress.step)
            if (value, progress.step) in progress.kept:
                self.devices.first(lambda: soup.write(self._parts.model.state_dict(), progress.step))

    def _average_best(self) -> None:
        """The average of the best evaluations' weights becomes the best, if it is better."""
        progress, model, metric, soup = self.progress, self._parts.model, self.objective.metric, self._soup
        if soup is None or progress.best is None:
            return
        steps = ", ".join(str(step) for _, step in sorted(progress.kept, key=lambda one: one[1]))
        if len(progress.kept) < 2:
            self.events.note(f"--average-best: step {steps} alone was evaluated; there is nothing to average")
            return
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.devices.each(lambda: soup.average(progress.kept)))
        value = self._measured()[metric]
        better = value > progress.best
        self.events.note(
            f"the average of the weights of steps {steps}: {metric} {value:.4f}, "
            f"{'better than' if better else 'no better than'} {progress.best:.4f} of step {progress.best_step} "
            f"alone; {BEST} is {'the average' if better else 'that step'}"
        )
        if better:
            progress.best, progress.averaged = value, [step for _, step in progress.kept]
            self._save_model(BEST)
        model.load_state_dict(own)

    @torch.inference_mode()
    def _predict(self, rank: int, world: int) -> list[Any]:
        batches = self.validation_batches(rank, world)
        return [self.objective.predict(self._parts.model, pieces) for pieces in batches]

    def validation_batches(self, rank: int = 0, world: int = 1) -> Iterator[Any]:
        """All validation rows, in order, as the objective collates them; of several processes, a part of them."""
        order = InOrder(len(self.data.val), self.options.batch_size, rank, world)
        return load(self.data.val, order, _Pieces(self.objective, 1), self.limits.num_workers)

    @property
    def _gives_up(self) -> bool:
        patience = self.options.patience
        return patience is not None and self.progress.worse >= patience

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """With the weights in the model that are measured and saved: the moving average, or nearer to the base."""
        average, model, share = self._parts.average, self._parts.model, self.options.wise_ft
        if average is None and share is None:
            yield
            return
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        measured = own if average is None else average.state
        model.load_state_dict(measured if share is None else _between(self._base, measured, share))
        try:
            yield
        finally:
            model.load_state_dict(own)

    def _save(self, name: str) -> None:
        with self._averaged():
            self._save_model(name)

    def _save_model(self, name: str) -> None:
        state = whole(self._parts.model.state_dict()) if self.devices.sharded else None
        self.devices.first(lambda: self._write_model(name, state))

    def _write_model(self, name: str, state: dict[str, torch.Tensor] | None) -> None:
        progress = self.progress
        if name == LAST and progress.best_step == progress.step and self.options.average_best is None:
            # It was written a moment ago; `best` may be an average only with that option.
            with output_errors(self.run / name):
                swap_folder(self.run / name, lambda folder: link_files(self.run / BEST, folder))
            return
        model: Any = self._parts.model
        if self._lora is not None:
            is_kept = self.options.lora_save == "adapter"
            model = self._lora.kept(bases_of(self.objective)) if is_kept else self._lora.merged()
        without = nullcontext() if self._heads is None else self._heads.removed()
        with output_errors(self.run / name), saving_whole(model, state), without:
            swap_folder(self.run / name, lambda folder: self.objective.save(model, folder))

    def _checkpoint(self) -> None:
        parts, drawn = self._parts, self.devices.collect(generators(self.device))
        states = whole(learned(parts)) if self.devices.sharded else learned(parts)
        self.devices.first(lambda: save_checkpoint(self.run / CHECKPOINT, parts, states, self.progress, drawn))
        self._saved = time.monotonic()
        self._pace.restart()

    def _look_up(self) -> None:
        """Between two steps: is it time for a checkpoint, or to stop?"""
        now, limit = time.monotonic(), self.limits.time_limit_s
        late = limit is not None and now - self._began > limit
        due = now - self._saved > self.limits.checkpoint_seconds
        asked = self.devices.numbers(self.events.stop() or 0, late, due)
        # Whoever is asked to stop, all do; the time is that of the first process.
        code = next((ExitCode(int(code)) for code, _, _ in asked if code), None)
        _, late, due = map(bool, asked[0])
        if code is not None or late or due:
            self._checkpoint()
        where = f"after step {self.progress.step} of {self.steps}; the same command goes on"
        if code is not None:
            raise self.devices.common(Stopped(f"stopped {where}", code))
        if late:
            raise self.devices.common(TryAgain(f"--time-limit: stopped {where}"))

    def _tell(self, **values: Any) -> None:
        line = {"step": self.progress.step, "epoch": self._epoch_share(), **values}
        if self._log is not None:
            self._log.write(**line)
        self.events.told(line)

    def _epoch_share(self) -> float:
        return round(self.progress.step / max(1, len(self._batches)), 4)


def _between(
    base: dict[str, torch.Tensor], learned: dict[str, torch.Tensor], share: float
) -> dict[str, torch.Tensor]:
    """The weights at `share` of the way from one to the other.

    Of differences of low rank, B A, which begin at B = 0, B alone: the way of both factors would be a curve.
    """
    return {
        name: torch.lerp(base[name], tensor, share)
        if tensor.is_floating_point() and ".lora_A." not in name
        else tensor
        for name, tensor in learned.items()
    }


@dataclass(slots=True)
class _Pieces:
    """What workers make of a batch."""

    objective: Objective
    pieces: int

    def __call__(self, items: Any) -> list[Any]:
        return self.objective.collate(items, self.pieces)


def _checkpoint_gradients(model: nn.Module) -> None:
    # transformers' VisionTextDualEncoderModel does not offer it, but its encoders do.
    offered = [one for one in (model, *model.children()) if getattr(one, "supports_gradient_checkpointing", False)]
    if not offered:
        raise ModelError("--gradient-checkpointing: this model does not offer it")
    for one in offered[:1] if offered[0] is model else offered:
        one.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
