"""`mmcli finetune`: a model that has learned from solved rows."""

from __future__ import annotations

from mmcli.cli.options import (
    InputArguments,
    MessageArguments,
    ModelArguments,
    OptimizationArguments,
    TrainingArguments,
    TrainingRunArguments,
    with_options,
)


@with_options
def finetune(
    inputs: InputArguments,
    model: ModelArguments,
    training: TrainingArguments,
    optimization: OptimizationArguments,
    run: TrainingRunArguments,
    messages: MessageArguments,
) -> int:
    """Train a model on rows with labels. INPUT are the training rows; RUN/best is what the other commands load.

    mmcli finetune train/ --val val/ -m google/vit-base-patch16-224-in21k -o run/

    mmcli classify photos/ -m run/best -o labels.parquet

    A folder has one folder for each label; a manifest a column `label`. An interrupted run goes on when the same
    command is given again, and ends with the same weights as if it had not been interrupted.
    """
    from mmcli.cli.training import execute_training

    return execute_training(inputs, model, training, optimization, run, messages)
