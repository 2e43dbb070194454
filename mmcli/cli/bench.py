"""`mmcli bench`: how fast a model goes over inputs on this machine, and what limits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mmcli.cli.options import (
    MESSAGES,
    OUTPUT,
    RUN,
    ConfigOption,
    InputArguments,
    ModelArguments,
    _option,
    with_options,
)

TASK = "Task"


@dataclass(frozen=True)
class BenchTaskArguments:
    """What is measured."""

    task: Annotated[str, _option(TASK, "--task", "NAME", "embed, caption, ask or classify.")] = "embed"
    labels: Annotated[
        str | None,
        _option(TASK, "--labels", "A,B,C", "Of classify: what an input may be [the model's own labels]."),
    ] = None
    question: Annotated[
        list[str] | None, _option(TASK, "-q --question", "TEXT", "Of ask: a question. Repeatable.")
    ] = None
    prompt: Annotated[
        str | None, _option(TASK, "--prompt", "TEXT", "Of caption: what captions go on from, or the model is told.")
    ] = None
    max_new_tokens: Annotated[
        str, _option(TASK, "--max-new-tokens", "N", "Of caption and ask: longer texts are cut.")
    ] = "auto"


@dataclass(frozen=True)
class BenchRunArguments:
    """How it is measured."""

    time: Annotated[
        str, _option(RUN, "--time", "TIME", "Of each of the three measurements; a slow model takes longer.")
    ] = "10s"
    rows: Annotated[
        str | None,
        _option(RUN, "--rows", "N", "Rows of each measurement [as many as its time allows; inputs come again]."),
    ] = None
    batch_size: Annotated[
        str, _option(RUN, "--batch-size", "N", "Inputs per forward pass; auto: texts by tokens.")
    ] = "auto"
    num_workers: Annotated[
        str, _option(RUN, "--num-workers", "N", "Decode processes; 0: none, and no protection from crashes.")
    ] = "auto"
    timeout: Annotated[
        str, _option(RUN, "--timeout", "TIME", "An input that takes longer to decode is an error row.")
    ] = "120s"


@dataclass(frozen=True)
class BenchMessageArguments:
    """What is said."""

    json: Annotated[bool, _option(OUTPUT, "--json", None, "One JSON object on stdout instead of a table.")] = False
    quiet: Annotated[bool, _option(MESSAGES, "--quiet", None, "The table and errors only.")] = False
    debug: Annotated[bool, _option(MESSAGES, "--debug", None, "Show tracebacks, and what libraries say.")] = False
    config: ConfigOption = None


@with_options
def bench(
    inputs: InputArguments,
    model: ModelArguments,
    task: BenchTaskArguments,
    run: BenchRunArguments,
    messages: BenchMessageArguments,
) -> int:
    """Measure rows a second: decoding alone, the model alone, and a whole run into a temporary Parquet file.

    mmcli bench photos/ -m openai/clip-vit-base-patch32

    mmcli bench photos/ -m Salesforce/blip-image-captioning-base --task caption --time 30s

    No run can be faster than the slower of decoding and the model; where both compute on the same cores, it cannot
    be faster than these allow for both. The table says which of these ceilings holds here, how near the whole run
    comes to it, with its start and end and once it runs, and what to change. The start of processes and the model's
    loading are not counted.
    """
    from mmcli.cli.measure import measure

    return measure(inputs, model, task, run, messages)
