"""`mmcli ask`: answers to questions about every input."""

from __future__ import annotations

from mmcli.cli.options import (
    EndpointArguments,
    GenerationArguments,
    InputArguments,
    MessageArguments,
    ModelArguments,
    OutputArguments,
    QuestionArguments,
    RunArguments,
    with_options,
)


@with_options
def ask(
    inputs: InputArguments,
    model: ModelArguments,
    endpoint: EndpointArguments,
    questions: QuestionArguments,
    generation: GenerationArguments,
    output: OutputArguments,
    run: RunArguments,
    messages: MessageArguments,
) -> int:
    """Ask about every input: one row per input, in order, with an answer to each question.

    mmcli ask photos/ -m HuggingFaceTB/SmolVLM-256M-Instruct -q "What is in the picture?" -o answers.parquet

    mmcli ask receipts/ -m Qwen/Qwen2.5-VL-3B-Instruct -q "Read it." --schema "shop, total float, items list"

    Beside each answer stands what tells whether to trust it. An interrupted run goes on when the same command is
    given again.
    """
    from mmcli.cli.compose import Arguments
    from mmcli.cli.planners import WritePlanner
    from mmcli.cli.prompting import read_questions
    from mmcli.cli.run import execute

    arguments = Arguments(inputs, model, output, run, messages)
    planner = WritePlanner(
        arguments,
        generation,
        endpoint,
        lambda seed, problems: read_questions(questions, generation, seed, problems),
    )
    return execute(arguments, planner)
