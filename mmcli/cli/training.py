"""Strings -> a training run: rows with labels, the objective, its options; and the run's folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mmcli import __version__
from mmcli.cli import parse
from mmcli.cli.boundary import guard, say
from mmcli.cli.environment import prepare_environment
from mmcli.cli.messages import Messages
from mmcli.cli.objectives import RECIPES, Given, Listed, Recipe, list_rows
from mmcli.cli.options import (
    InputArguments,
    MessageArguments,
    ModelArguments,
    OptimizationArguments,
    TrainingArguments,
    TrainingRunArguments,
)
from mmcli.cli.parse import Problems
from mmcli.cli.probe import FEATURES, train_probe
from mmcli.cli.signals import Signals
from mmcli.cli.writing import WRITING, auxiliary_cells, auxiliary_labels
from mmcli.core.durable import make_folder, output_errors, read_json, remove, write_durably, write_json
from mmcli.core.errors import ConfigError, ExitCode, MmcliError, StateMismatch, Stopped
from mmcli.core.job import Job, differences
from mmcli.core.ranks import launched
from mmcli.core.records import MODALITIES, Record
from mmcli.core.state import JOB_SHAPE, check_state, read_state

if TYPE_CHECKING:
    import torch

    from mmcli.models.options import ModelOptions
    from mmcli.sinks.lock import Lock
    from mmcli.training.auxiliary import AuxiliaryLabels
    from mmcli.training.checkpoints import Progress
    from mmcli.training.contrastive import Contrastive
    from mmcli.training.data import Row
    from mmcli.training.devices import Devices
    from mmcli.training.fusion import FusionNetwork
    from mmcli.training.loop import Trainer
    from mmcli.training.objective import Objective
    from mmcli.training.options import TrainOptions

T = TypeVar("T")
RUN_FILE, CONFIG_FILE, CURVES_FILE = "run.json", "config.toml", "curves.png"
ANEW = "give another -o, or --overwrite to begin anew"
MISSING_POLICIES = ("error", "drop", "mask")
# Between lines on how far the diagnostics are.
ANSWERS_S = 30.0


@dataclass(slots=True)
class Command:
    """A checked command."""

    train: Listed
    val: Listed
    objective: Objective
    options: TrainOptions
    auxiliary: AuxiliaryLabels | None
    job: Job
    run: Path
    num_workers: int
    timeout_s: float
    checkpoint_s: float
    time_limit_s: float | None


def execute_training(
    inputs: InputArguments,
    model: ModelArguments,
    training: TrainingArguments,
    optimization: OptimizationArguments,
    run: TrainingRunArguments,
    messages: MessageArguments,
) -> int:
    """Check the whole command, then run it. Says how it ended, and returns the exit code."""
    rank, _ = launched(os.environ)
    if rank > 0:
        # Of several processes the first one talks.
        messages = replace(messages, quiet=True, log_file=None)
    given = Given(inputs, model, training, optimization, run, messages)
    prepare_environment(offline=model.offline, debug=messages.debug, log_file=messages.log_file)
    told = Messages(quiet=messages.quiet, log_file=messages.log_file)
    signals = Signals()
    with signals.catching():
        outcome = guard(lambda: _said_once(lambda: _execute(given, told, signals), rank), debug=messages.debug)
    if rank > 0:
        return outcome.exit_code
    known = read_json(Path(run.output) / RUN_FILE) if run.output is not None and outcome.reason is None else None
    facts = {name: (known or {}).get(name) for name in ("metric", "best", "best_step", "steps")}
    last = json.dumps({"output": run.output, "exit_code": outcome.exit_code, "error": outcome.reason, **facts})
    if messages.json:
        say(last)
    told.log(last)
    return outcome.exit_code


def _said_once(function: Callable[[], int], rank: int) -> int:
    """Call it; what the first process says, too, ends the others without a word."""
    try:
        return function()
    except MmcliError as error:
        if rank == 0 or not (error.shared or isinstance(error, Stopped)):
            raise
        return int(error.exit_code)


def _execute(given: Given, messages: Messages, signals: Signals) -> int:
    from mmcli.sinks.lock import Lock
    from mmcli.training.devices import open_devices

    with signals.heard():
        devices = open_devices(given.model.device)
        command = devices.each(lambda: _heard(signals, lambda: _check(given, messages)))
        jobs = devices.gather(command.job.to_dict())
        devices.each(lambda: _same(jobs))
        devices.each(lambda: _shardable(devices, command))
        lock = Lock([command.run])
        devices.first(lambda: _take(lock))
        try:
            if not devices.first(lambda: _is_complete(command, given.run.overwrite, messages)):
                work = _probe if command.objective.name == "probe" else _train
                work(given, command, messages, signals, devices)
        finally:
            lock.release()
    return ExitCode.OK


def _heard(signals: Signals, function: Callable[[], T]) -> T:
    with signals.heard():
        return function()


def _take(lock: Lock) -> None:
    folder = lock.path.parent
    with output_errors(folder):
        make_folder(folder)
    lock.acquire()


def _shardable(devices: Devices, command: Command) -> None:
    """Raise ConfigError for what FSDP is not for, where it is asked for."""
    from mmcli.training.sharding import check_shardable

    if devices.sharded:
        check_shardable(command.options, command.objective.joint)


def _same(jobs: Sequence[dict[str, Any]]) -> None:
    """Raise ConfigError unless all processes are to do the same."""
    for rank, job in enumerate(jobs):
        if changed := differences(jobs[0], job):
            raise ConfigError(f"process {rank} is not of the same run as process 0: {'; '.join(changed[:8])}")


# ------------------------------------------------------------------------------------------ checking


def _check(given: Given, messages: Messages) -> Command:
    """All problems together; no weight is loaded and no row opened. Raises ConfigError."""
    problems = Problems()
    options = _options(given, problems)
    run = _run_folder(given.run, problems)
    timeout_s = problems.collect(parse.duration, "--timeout", given.run.timeout)
    checkpoint_s = problems.collect(parse.duration, "--checkpoint-time", given.run.checkpoint_time)
    limit = given.run.time_limit
    time_limit_s = problems.collect(parse.duration, "--time-limit", limit) if limit else None
    workers = problems.collect(parse.count_or_auto, "--num-workers", given.run.num_workers, 0)
    recipe = RECIPES.get(given.training.objective)
    asked = recipe or RECIPES["classify"]
    train = problems.collect(list_rows, given, tuple(given.inputs.inputs or ()), "INPUT", asked)
    val = None
    if given.training.val:
        val = problems.collect(list_rows, given, tuple(given.training.val), "--val", asked)
    else:
        problems.add("no validation rows given; add --val, a folder or manifest like INPUT")
    if recipe is not None and train is not None:
        recipe.check(train, val, messages, problems)
    metric = _metric(given, recipe, problems)
    model = _model_options(given, problems)
    objective = None
    if None not in (model, train, options, recipe) and not problems.lines:
        assert recipe is not None
        objective = problems.collect(recipe.make, given, model, train, options, metric)
    if objective is not None and options is not None and options.lora_rank is not None:
        from mmcli.training.lora import check_lora

        problems.collect(check_lora, objective, options.lora_save)
    auxiliary = None
    if objective is not None and train is not None and options is not None:
        auxiliary = auxiliary_labels(given.training, train, options.auxiliary_loss, problems)
    problems.check()
    assert train is not None
    assert val is not None
    assert options is not None
    assert objective is not None
    assert run is not None
    told = {**options.describe(), "objective": given.training.objective, "from_config": given.training.from_config}
    told["fusion"] = _described(given, objective)
    told["auxiliary"] = {} if auxiliary is None else {name: len(c) for name, c in auxiliary.classes.items()}
    told |= {"missing_policy": given.training.missing_policy, "metric": metric}
    inputs = {"train": train.digest, "val": val.digest, "rows": len(train.records), "val_rows": len(val.records)}
    inputs["labels"] = digest_of(train.labels + val.labels)
    job = Job("finetune", objective.plan.describe(), told, inputs)
    automatic = max(1, min(8, parse.available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return Command(
        train, val, objective, options, auxiliary, job, run,
        automatic if workers is None else workers, timeout_s or 0.0, checkpoint_s or 0.0, time_limit_s,
    )  # fmt: skip


def _run_folder(run: TrainingRunArguments, problems: Problems) -> Path | None:
    if run.output is None:
        problems.add("no folder for the run given; add -o run/")
        return None
    folder = Path(run.output)
    if folder.exists() and not folder.is_dir():
        problems.add(f"-o {folder}: a file is there; a run is a folder")
    elif folder.is_dir() and any(folder.iterdir()) and not (folder / RUN_FILE).exists():
        there = {one.name for one in folder.iterdir()} - {"lock"}
        if there:
            problems.add(f"-o {folder}: it holds other things ({sorted(there)[0]}); give a new folder")
    elif not folder.absolute().parent.is_dir():
        problems.add(f"-o {folder}: there is no folder {folder.absolute().parent}")
    return folder


def _options(given: Given, problems: Problems) -> TrainOptions | None:
    from mmcli.training.augment import AUGMENTS
    from mmcli.training.lora import SAVES
    from mmcli.training.optimizer import OPTIMIZERS, SCHEDULES
    from mmcli.training.options import TrainOptions

    asked, training, before = given.optimization, given.training, len(problems.lines)
    problems.collect(parse.choice, "--objective", training.objective, tuple(RECIPES))
    problems.collect(parse.choice, "--missing-policy", training.missing_policy, MISSING_POLICIES)
    if training.modality is not None:
        problems.collect(parse.choice, "--modality", training.modality, MODALITIES)
    batch_size = problems.collect(parse.number, "--batch-size", asked.batch_size, 1)
    pieces = problems.collect(parse.number, "--gradient-accumulation-steps", asked.gradient_accumulation_steps, 1)
    if asked.lora_alpha is not None and asked.lora_rank is None:
        problems.add("--lora-alpha goes with --lora-rank N")
    if asked.lora_rank is not None and asked.average_best is not None:
        problems.add("--average-best is of whole weights, not of --lora-rank; leave one of them out")
    _check_lora(given, problems)
    _check_auxiliary(given, problems)
    if asked.precision == "fp16" and given.model.device == "cpu":
        problems.add("--precision fp16 is for GPUs; on a CPU take bf16 or fp32")
    if batch_size is not None and pieces is not None and pieces > batch_size:
        problems.add(f"--gradient-accumulation-steps {pieces}: a batch has {batch_size} rows")
    limit = problems.collect(parse.decimal, "--max-grad-norm", asked.max_grad_norm)
    values: dict[str, Any] = {
        "epochs": problems.collect(parse.number, "--epochs", asked.epochs, 1),
        "max_steps": _optional(problems, parse.number, "--max-steps", asked.max_steps, 1),
        "batch_size": batch_size,
        "accumulation": pieces,
        "learning_rate": problems.collect(parse.decimal, "--learning-rate", asked.learning_rate),
        "head_lr": problems.collect(parse.decimal, "--head-lr-multiplier", asked.head_lr_multiplier),
        "warmup": problems.collect(parse.share, "--warmup", asked.warmup),
        "schedule": problems.collect(parse.choice, "--schedule", asked.schedule, SCHEDULES),
        "optimizer": problems.collect(parse.choice, "--optimizer", asked.optimizer, OPTIMIZERS),
        "weight_decay": problems.collect(parse.decimal, "--weight-decay", asked.weight_decay),
        "max_grad_norm": limit or None,
        "label_smoothing": problems.collect(parse.share, "--label-smoothing", asked.label_smoothing),
        "precision": problems.collect(parse.choice, "--precision", asked.precision, ("fp32", "bf16", "fp16")),
        "gradient_checkpointing": asked.gradient_checkpointing,
        "freeze": parse.split_names(training.freeze),
        "ema": _optional(problems, parse.share, "--ema", asked.ema),
        "modality_dropout": problems.collect(parse.share, "--modality-dropout", asked.modality_dropout),
        "auxiliary_loss": problems.collect(parse.decimal, "--auxiliary-loss", asked.auxiliary_loss),
        "unimodal_loss": problems.collect(parse.decimal, "--unimodal-loss", asked.unimodal_loss),
        "wise_ft": _optional(problems, parse.share, "--wise-ft", asked.wise_ft),
        "average_best": _optional(problems, parse.number, "--average-best", asked.average_best, 2),
        "patience": _optional(problems, parse.number, "--early-stopping", asked.early_stopping, 1),
        "eval_steps": _optional(problems, parse.number, "--eval-steps", asked.eval_steps, 1),
        "balance": training.balance,
        "lora_rank": _optional(problems, parse.number, "--lora-rank", asked.lora_rank, 1),
        "lora_alpha": _optional(problems, parse.decimal, "--lora-alpha", asked.lora_alpha),
        "lora_save": problems.collect(parse.choice, "--lora-save", asked.lora_save, SAVES),
        "augment": problems.collect(parse.choice, "--augment", training.augment, tuple(AUGMENTS)),
        "seed": problems.collect(parse.number, "--seed", given.run.seed, 0),
    }
    if training.messages_column is not None:
        _check_messages(training, problems)
    if not training.encoder or training.objective != "classify":
        _without_encoders(training.missing_policy, values, problems)
    return TrainOptions(**values) if len(problems.lines) == before else None


def _without_encoders(policy: str, values: dict[str, Any], problems: Problems) -> None:
    """Add what is asked that only a fusion of encoders has."""
    if policy == "mask":
        problems.add(
            "--missing-policy mask is for models that bear rows without one of their media: --encoder "
            "MODALITY=MODEL; drop leaves such rows out"
        )
    for name in ("modality_dropout", "unimodal_loss"):
        if values[name]:
            flag = f"--{name.replace('_', '-')}"
            problems.add(f"{flag} is of rows with several media, and --encoder MODALITY=MODEL; leave it out")


def _check_auxiliary(given: Given, problems: Problems) -> None:
    training, asked = given.training, given.training.auxiliary_column or []
    if not asked:
        return
    recipe = RECIPES.get(training.objective)
    kinds = ("contrastive", *WRITING)
    if recipe is None or training.objective not in kinds:
        problems.add(
            f"--auxiliary-column is for --objective {', '.join(kinds[:-1])} and {kinds[-1]}, not "
            f"{training.objective}; leave it out"
        )
        return
    if training.objective == "contrastive" and given.optimization.gradient_accumulation_steps != "1":
        problems.add("--auxiliary-column with --objective contrastive: --gradient-accumulation-steps 1, no more")
    own = recipe.columns(replace(training, auxiliary_column=None))
    problems.lines += [f"--auxiliary-column {name} is {own[name]}, too" for name in asked if name in own]
    if given.optimization.lora_rank is not None:
        problems.add("--auxiliary-column teaches the encoder, of which --lora-rank learns differences alone")
    if launched(os.environ)[1] > 1:
        problems.add("--auxiliary-column is for one process, not for torchrun")


def _check_messages(training: TrainingArguments, problems: Problems) -> None:
    """Add what does not go with conversations."""
    if training.objective != "vqa":
        problems.add(f"--messages-column is of --objective vqa, not {training.objective}; leave it out")
    beside = {"--question-column": training.question_column, "--target-column": training.target_column}
    if flags := " and ".join(flag for flag, column in beside.items() if column is not None):
        problems.add(
            f"--messages-column {training.messages_column}: a conversation holds what is asked and answered; "
            f"leave out {flags}"
        )


def _check_lora(given: Given, problems: Problems) -> None:
    asked = given.optimization
    if asked.lora_rank is not None and find_spec("peft") is None:
        problems.add("--lora-rank needs the library peft: pip install 'mmcli[finetune]'")
    if asked.lora_save != "adapter":
        return
    if asked.lora_rank is None:
        problems.add("--lora-save adapter goes with --lora-rank N")
    if given.training.from_config:
        problems.add("--lora-save adapter: with --from-config there is no base that has the weights")


def _described(given: Given, objective: Objective) -> dict[str, Any]:
    """What identifies encoders that are joined, and what joins them."""
    encoders = getattr(getattr(objective, "network", None), "encoders", {})
    described = {modality: checkpoint.describe() for modality, checkpoint in encoders.items()}
    asked = given.training
    sizes: tuple[str, ...] = (asked.hidden_size, asked.fusion_layers, asked.fusion_heads)
    if objective.name == "contrastive":
        sizes = (asked.projection_size or "", asked.loss or "")
    return {**described, "sizes": "-".join(sizes)} if described else {}


def _metric(given: Given, recipe: Recipe | None, problems: Problems) -> str:
    if recipe is None:
        return ""
    metric = given.optimization.metric or recipe.metrics[0]
    problems.collect(parse.choice, "--metric", metric, recipe.metrics)
    return metric


def _optional(problems: Problems, function: Any, option: str, text: str | None, *more: Any) -> Any:
    return None if text is None else problems.collect(function, option, text, *more)


def _model_options(given: Given, problems: Problems) -> ModelOptions | None:
    from mmcli.cli.compose import Arguments
    from mmcli.cli.options import OutputArguments, RunArguments
    from mmcli.cli.planners import model_options

    if given.model.dtype != "auto" or given.model.compile:
        problems.add("--dtype and --compile are of other commands; weights are float32 here: --precision bf16")
    model, encoders = given.model, given.training.encoder
    if encoders and model.model:
        problems.add("-m and --encoder exclude one another: encoders are joined by a new model")
    if encoders and given.training.objective not in ("classify", "contrastive"):
        problems.add(f"--encoder is for --objective classify and contrastive, not {given.training.objective}")
    if encoders:
        # The options of all encoders.
        model = replace(model, model=encoders[0].partition("=")[2] or ".")
    arguments = Arguments(given.inputs, model, OutputArguments(), RunArguments(), given.messages)
    options = model_options(arguments, problems, "google/vit-base-patch16-224-in21k")
    return None if options is None else replace(options, weights=not given.training.from_config)


# ------------------------------------------------------------------------------------------- running


def _is_complete(command: Command, overwrite: bool, messages: Messages) -> bool:
    """Whether there is nothing to do; else the folder is made ready.

    Raises StateMismatch for a folder of another run, or with a damaged run.json.
    """
    run = command.run
    known = None if overwrite else read_state(run / RUN_FILE, {"job": JOB_SHAPE, "complete": bool}, ANEW)
    begun = known is not None and (known["complete"] or (run / "checkpoint").exists())
    if known is not None and begun:
        if changed := differences(known["job"], command.job.to_dict()):
            raise StateMismatch(
                f"{run} is of another run: {'; '.join(changed[:8])}",
                hint=ANEW,
            )
        if known["complete"]:
            check_state(known, {"metric": str, "best": float}, str(run / RUN_FILE), ANEW)
            messages.note(f"{run} is complete already: {known['metric']} {known['best']:.4f}; nothing to do")
            return True
        messages.note(f"going on with the run in {run}")
        return False
    with output_errors(run):
        for one in run.iterdir():
            # Vectors are named by what they are of: what a failed run has computed serves another.
            if one.name != "lock" and (overwrite or one.name != FEATURES):
                remove(one)
        write_json(run / RUN_FILE, {"job": command.job.to_dict(), "mmcli_version": __version__, "complete": False})
    return False


def _train(given: Given, command: Command, messages: Messages, signals: Signals, devices: Devices) -> None:
    from mmcli.training.augment import AUGMENTS
    from mmcli.training.data import MaskedMedia, Rows
    from mmcli.training.loop import Data, Events, RunLimits, Trainer

    used = devices.first(lambda: _heard(signals, lambda: _preflight(given, command, messages)))
    train, val = (
        _rows(given, command, listed, used[what])
        for listed, what in ((command.train, "INPUT"), (command.val, "--val"))
    )
    devices.first(lambda: _write_config(given, command))
    options, plan = command.options, command.objective.plan
    augment = AUGMENTS[options.augment]
    masked = MaskedMedia(messages.note) if given.training.missing_policy == "mask" else None
    data = Data(
        Rows(train, plan, options.seed, augment, options.modality_dropout, masked),
        Rows(val, plan, options.seed, masked=masked),
    )
    stop: list[ExitCode] = []
    limits = RunLimits(command.num_workers, command.checkpoint_s, command.time_limit_s)
    progress = messages.training_progress()
    events = Events(progress.told, lambda: stop[0] if stop else None, messages.note, progress.stepped)
    device = devices.device or _device(given, messages)
    trainer = Trainer(
        command.run, command.objective, data, options, limits, events, device, devices, auxiliary=command.auxiliary
    )
    with signals.asking(stop.append), progress:
        reached = trainer.train()
    devices.first(lambda: _heard(signals, lambda: _diagnose(command, trainer, messages)))
    if masked is not None:
        for seen in devices.collect(masked.seen):
            for (row, what), why in seen.items():
                masked.add(row, what, why)
        masked.summary()
    devices.first(lambda: _finish(command, reached, messages))


def _probe(given: Given, command: Command, messages: Messages, signals: Signals, devices: Devices) -> None:
    _write_config(given, command)
    _complete(command, train_probe(given, command, messages, signals))


def _device(given: Given, messages: Messages) -> torch.device:
    """That of a run of one process. Raises ModelError."""
    import torch

    from mmcli.models.device import choose_device

    device = torch.device(choose_device(given.model.device)[0])
    if given.model.device == "auto" and device.type == "cuda" and (count := torch.cuda.device_count()) > 1:
        messages.note(f"one of {count} GPUs is used; torchrun --nproc-per-node {count} -m mmcli ... uses all")
    return device


def _diagnose(command: Command, trainer: Trainer, messages: Messages) -> None:
    """What the best model makes of each modality, or of the space that two share: diagnostics.json, .txt, .png."""
    from mmcli.training.classify import Classify
    from mmcli.training.contrastive import Contrastive
    from mmcli.training.fusion import FusionNetwork

    objective = command.objective
    fusion = objective.network if isinstance(objective, Classify) else None
    if isinstance(fusion, FusionNetwork) and len(fusion.encoders) > 1:
        _diagnose_fusion(command, trainer, fusion, messages)
    if isinstance(objective, Contrastive):
        _diagnose_space(command, trainer, objective)


def _diagnose_fusion(command: Command, trainer: Trainer, fusion: FusionNetwork, messages: Messages) -> None:
    from mmcli.evaluation.diagnostics import DRAWN_ROWS, DiagnosticOptions, Rows, answers_needed, diagnose
    from mmcli.evaluation.diagnostics_report import sentences, write_report
    from mmcli.training.data import InOrder, load
    from mmcli.training.fusion import recombined

    objective, whole = command.objective, trainer.data.val
    val, modalities = whole.drawn(DRAWN_ROWS), tuple(fusion.encoders)
    options = DiagnosticOptions.affordable(len(val))
    needed = answers_needed(len(val), len(modalities), options)
    messages.note(f"asking the best model what it makes of each modality: {needed:,} answers, of {len(val):,} rows")
    order = InOrder(len(val), command.options.batch_size)
    pieces = load(val, order, lambda items: objective.collate(items, 1), command.num_workers)
    model = recombined(command.run / "best", objective, pieces, trainer.device)
    rows = Rows(modalities, model.targets, model.present, len(whole))
    found = diagnose(model, rows, options, _Answers(messages))
    write_report(command.run, found)
    for sentence in sentences(found):
        messages.note(sentence)


class _Answers:
    """Says how many answers were given, every half minute."""

    def __init__(self, messages: Messages) -> None:
        self._messages, self._began = messages, time.monotonic()
        self._last = self._began

    def __call__(self, done: int, needed: int) -> None:
        now = time.monotonic()
        if now - self._last >= ANSWERS_S and done < needed:
            self._last = now
            left = (now - self._began) / done * (needed - done)
            self._messages.note(f"{done:,} of {needed:,} answers, about {left / 60:.1f} minutes to go")


def _diagnose_space(command: Command, trainer: Trainer, objective: Contrastive) -> None:
    import torch

    from mmcli.evaluation.bootstrap import Resampling
    from mmcli.evaluation.diagnostics_report import write_report
    from mmcli.evaluation.shared_space import diagnose_space

    best = objective.of(command.run / "best")
    model = best.build(trainer.device).eval()
    with torch.inference_mode():
        a, b, groups, _ = best.vectors(model, trainer.validation_batches())
    write_report(command.run, diagnose_space(objective.slots, a, b, groups.tolist(), Resampling()))


def _finish(command: Command, progress: Progress, messages: Messages) -> None:
    from mmcli.training.log import draw_curves, read_metrics

    values = {"best": progress.best, "best_step": progress.best_step, "steps": progress.step}
    _complete(command, {**values, "averaged_steps": progress.averaged or None})
    if not draw_curves(read_metrics(command.run), command.objective.metric, command.run / CURVES_FILE):
        messages.note("no curves.png: pip install 'mmcli[finetune]'")
    where = f"at step {progress.best_step}"
    if progress.averaged:
        where = f"by the average of steps {', '.join(map(str, sorted(progress.averaged)))}"
    messages.note(f"{command.run}/best: {command.objective.metric} {progress.best:.4f} {where} of {progress.step}")


def _complete(command: Command, values: dict[str, Any]) -> None:
    """Note what came of the run, and remove what it would have gone on from."""
    from mmcli.training.loop import CHECKPOINT, EVALUATED

    told = {
        "job": command.job.to_dict(),
        "mmcli_version": __version__,
        "complete": True,
        "metric": command.objective.metric,
        **values,
    }
    write_json(command.run / RUN_FILE, told)
    with output_errors(command.run):
        for name in (CHECKPOINT, EVALUATED, FEATURES):
            remove(command.run / name)


def _rows(given: Given, command: Command, listed: Listed, used: dict[int, Record]) -> list[Row]:
    from mmcli.training.data import Row

    targets = RECIPES[command.objective.name].targets(listed, command.objective)
    rows = [Row(record.id, record.media, targets[n], record.variables) for n, record in used.items()]
    if (labels := command.auxiliary) is not None and listed is command.train:
        for row, record in zip(rows, used.values(), strict=True):
            row.auxiliary = labels.indices(auxiliary_cells(record, given.training))
    return rows


def _preflight(given: Given, command: Command, messages: Messages) -> dict[str, dict[int, Record]]:
    from mmcli.cli.preflight import Preflight

    preflight = Preflight(command.objective.plan, command.num_workers, command.timeout_s, messages)
    return preflight.check(
        {"INPUT": command.train.records, "--val": command.val.records},
        read=given.training.preflight,
        policy=given.training.missing_policy,
    )


def _write_config(given: Given, command: Command) -> None:
    """What was asked for, as a --config file that gives the same run."""
    lines = [f"# mmcli finetune {' '.join(given.inputs.inputs or ())} --config {CONFIG_FILE}", ""]
    groups = (given.inputs, given.model, given.training, given.optimization, given.run)
    for group in groups:
        for name in group.__dataclass_fields__:
            value = getattr(group, name)
            if name not in ("inputs", "overwrite") and value not in (None, [], ()):
                lines.append(f"{name.replace('_', '-')} = {_toml(value)}")
    text = "\n".join(lines) + "\n"
    path = command.run / CONFIG_FILE
    with output_errors(path):
        write_durably(path, lambda target: target.write_text(text, encoding="utf-8"))


def digest_of(labels: Sequence[str]) -> str:
    """Of labels, in the order of their rows."""
    return blake2b(repr(labels).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _toml(value: Any) -> str:
    # Strings, lists of them and booleans are written alike in JSON and TOML.
    return json.dumps(value if isinstance(value, bool | str | list) else str(value), ensure_ascii=False)
