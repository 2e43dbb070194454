"""`mmcli embed`: one vector per picture, sound, clip or text."""

from __future__ import annotations

from mmcli.cli.options import (
    EmbeddingArguments,
    InputArguments,
    MessageArguments,
    ModelArguments,
    OutputArguments,
    RunArguments,
    with_options,
)


@with_options
def embed(
    inputs: InputArguments,
    model: ModelArguments,
    embedding: EmbeddingArguments,
    output: OutputArguments,
    run: RunArguments,
    messages: MessageArguments,
) -> int:
    """Turn images, audio, video and text into vectors: one row per input, in order.

    mmcli embed photos/ -m openai/clip-vit-base-patch32 -o photos.parquet

    An interrupted run goes on when the same command is given again.
    """
    from mmcli.cli.compose import Arguments
    from mmcli.cli.planners import EmbedPlanner
    from mmcli.cli.run import execute

    arguments = Arguments(inputs, model, output, run, messages)
    return execute(arguments, EmbedPlanner(arguments, embedding))
