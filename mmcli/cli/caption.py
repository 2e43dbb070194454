"""`mmcli caption`: one text per picture, sound or clip."""

from __future__ import annotations

from mmcli.cli.options import (
    CaptionArguments,
    EndpointArguments,
    GenerationArguments,
    InputArguments,
    MessageArguments,
    ModelArguments,
    OutputArguments,
    RunArguments,
    SidecarArguments,
    SpeechArguments,
    with_options,
)


@with_options
def caption(
    inputs: InputArguments,
    model: ModelArguments,
    endpoint: EndpointArguments,
    captions: CaptionArguments,
    speech: SpeechArguments,
    generation: GenerationArguments,
    output: OutputArguments,
    sidecars: SidecarArguments,
    run: RunArguments,
    messages: MessageArguments,
) -> int:
    """Write a caption for every picture, or what is said in every sound: one row per input, in order.

    mmcli caption photos/ -m Salesforce/blip-image-captioning-base -o captions.parquet

    mmcli caption talks/ -m openai/whisper-small -o talks.parquet --srt

    Sounds of any length are heard in windows; the column segments has the times. Beside each text stands what tells
    whether to trust it: why it ended (stop, or length: cut), its tokens and their mean log-probability, whether it
    runs in a loop.

    An interrupted run goes on when the same command is given again.
    """
    from mmcli.cli.compose import Arguments
    from mmcli.cli.planners import WritePlanner
    from mmcli.cli.prompting import read_caption
    from mmcli.cli.run import execute

    arguments = Arguments(inputs, model, output, run, messages, sidecars)
    planner = WritePlanner(
        arguments,
        generation,
        endpoint,
        lambda seed, problems: read_caption(captions, speech, generation, seed, problems),
    )
    return execute(arguments, planner)
