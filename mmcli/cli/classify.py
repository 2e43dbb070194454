"""`mmcli classify`: which label every input has."""

from __future__ import annotations

from mmcli.cli.options import (
    EndpointArguments,
    FewShotArguments,
    InputArguments,
    IntoArguments,
    LabelArguments,
    MessageArguments,
    ModelArguments,
    OutputArguments,
    RunArguments,
    with_options,
)


@with_options
def classify(
    inputs: InputArguments,
    model: ModelArguments,
    labels: LabelArguments,
    few_shot: FewShotArguments,
    endpoint: EndpointArguments,
    output: OutputArguments,
    into: IntoArguments,
    run: RunArguments,
    messages: MessageArguments,
) -> int:
    """Give every input a label: one row per input, in order, with its score and the runners-up.

    mmcli classify photos/ -m openai/clip-vit-base-patch32 --labels cat,dog,bird -o labels.parquet

    mmcli classify photos/ -m google/mobilenet_v2_1.0_224 -o labels.parquet

    mmcli classify photos/ -m facebook/dinov2-small --examples solved/ -o labels.parquet

    mmcli classify embeddings.parquet -m openai/clip-vit-base-patch32 --labels-file names.txt -o labels.parquet

    A model with a head gives labels of its own; CLIP and its kin take any labels; chat models choose among them;
    with solved examples, any model that gives vectors learns yours.

    An interrupted run goes on when the same command is given again.
    """
    from mmcli.cli.classification import ClassifyPlanner
    from mmcli.cli.compose import Arguments
    from mmcli.cli.run import execute

    arguments = Arguments(inputs, model, output, run, messages, into=into)
    return execute(arguments, ClassifyPlanner(arguments, labels, few_shot, endpoint))
