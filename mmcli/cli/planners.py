"""What each command wants of a run: its model, its task, and what it reads of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmcli.cli import parse
from mmcli.cli.compose import Arguments, Columns, Planned, PlannerDefaults
from mmcli.cli.options import EmbeddingArguments, EndpointArguments, GenerationArguments
from mmcli.cli.parse import Problems
from mmcli.cli.trio import check_torch_trio
from mmcli.core.errors import ConfigError
from mmcli.core.protocols import EmbeddingModelPlan, Source, Task

if TYPE_CHECKING:
    from mmcli.cli.prompting import Asked
    from mmcli.models.options import Batch, Endpoint, Generation, ModelOptions


class EmbedPlanner(PlannerDefaults):
    """Of `mmcli embed`."""

    def __init__(self, arguments: Arguments, embedding: EmbeddingArguments) -> None:
        self._arguments, self._embedding = arguments, embedding

    def plan(self, problems: Problems) -> Planned | None:
        """Resolve the model and say what its vectors are."""
        from mmcli.models.resolve import resolve
        from mmcli.tasks.embed import Embed

        wanted = self._embedding
        dtype = problems.collect(parse.choice, "--embedding-dtype", wanted.embedding_dtype, ("float32", "float16"))
        options = model_options(self._arguments, problems, "openai/clip-vit-base-patch32")
        if options is None:
            return None
        options = replace(options, pooling=wanted.pooling, normalize=wanted.normalize)
        plan = problems.collect(resolve, options)
        if plan is not None and wanted.center is not None:
            plan = problems.collect(_centred, plan, options.model, wanted)
        if plan is None or dtype is None:
            return None
        task = Embed(plan.embedding_size, dtype)
        return Planned(plan, task, {"embedding_dtype": dtype, "exact_decode": options.exact_decode})


def _centred(plan: EmbeddingModelPlan, model: str, wanted: EmbeddingArguments) -> EmbeddingModelPlan:
    """As --center says. Raises ConfigError."""
    from mmcli.cli.center import read_center
    from mmcli.models.center import center_plan

    assert wanted.center is not None
    if wanted.normalize is False:
        raise ConfigError("--center is of unit vectors; leave out --no-normalize")
    return center_plan(plan, model, *read_center(wanted.center))


class WritePlanner(PlannerDefaults):
    """Of `mmcli caption` and `mmcli ask`: `read` gives what is asked."""

    def __init__(
        self,
        arguments: Arguments,
        generation: GenerationArguments,
        endpoint: EndpointArguments,
        read: Callable[[int, Problems], Asked | None],
    ) -> None:
        self._arguments, self._generation, self._read = arguments, generation, read
        self._endpoint = endpoint
        self._asked: Asked | None = None
        self._told: dict[str, Any] = {}

    def columns(self, problems: Problems) -> Columns:
        """Read what is asked: the columns that it names."""
        seed = problems.collect(parse.number, "--seed", self._arguments.run.seed, 0) or 0
        self._asked = self._read(seed, problems)
        return self._asked.columns if self._asked is not None else Columns()

    def plan(self, problems: Problems) -> Planned | None:
        """Resolve the model and say how it writes."""
        from mmcli.models.options import Generation
        from mmcli.models.plan import GenerationPlan
        from mmcli.models.resolve import resolve_writer
        from mmcli.tasks.write import Write

        options = model_options(self._arguments, problems, "Salesforce/blip-image-captioning-base")
        if options is None:
            return None
        server = endpoint_options(self._endpoint, options.model, self._arguments.output.format, problems)
        options = replace(options, endpoint=server, extra_body=self._endpoint.extra_body)
        asked = self._asked
        plan = problems.collect(resolve_writer, options, Generation() if asked is None else asked.generation)
        if plan is None or asked is None:
            return None
        task = asked.generation.task
        column = "caption" if task == "caption" else "answer"
        if plan.output != "speech":
            _reject_speech(asked.generation, self._arguments, problems)
        join = plan.open_joiner() if isinstance(plan, GenerationPlan) else None
        write: Task
        if plan.output == "requests":
            from mmcli.tasks.requests import Requests

            write = Requests(task, asked.names)
        else:
            write = Write(task, column, plan.output, asked.names, asked.schema, join)
        self._told |= {"exact_decode": options.exact_decode, "questions": ",".join(asked.names)}
        return Planned(plan, write, self._told)

    def source(self, source: Source) -> Source:
        """With the examples that each record is shown."""
        if self._asked is None or not self._asked.generation.chosen:
            return source
        from mmcli.cli.examples import choose_examples

        chosen = choose_examples(source, self._asked.generation, self._generation)
        self._told["examples"] = chosen.choice.identity
        return chosen


def _reject_speech(generation: Generation, arguments: Arguments, problems: Problems) -> None:
    """Add what only a model that hears can do."""
    sidecars = arguments.sidecars
    given = {
        "--language": generation.language,
        "--translate": generation.translate,
        "--srt": sidecars is not None and sidecars.srt,
        "--vtt": sidecars is not None and sidecars.vtt,
    }
    if flags := " and ".join(flag for flag, value in given.items() if value):
        problems.add(f"{flags}: -m {arguments.model.model} does not hear speech; a Whisper does")


def endpoint_options(
    endpoint: EndpointArguments, model: str, format_name: str | None, problems: Problems
) -> Endpoint | Batch | None:
    """What runs the model; None when nothing is named."""
    from mmcli.models.endpoint import PREFIX
    from mmcli.models.options import Batch, Endpoint

    concurrency = problems.collect(parse.number, "--concurrency", endpoint.concurrency, 1)
    retry_s = problems.collect(parse.duration, "--retry-time", endpoint.retry_time)
    timeout_s = problems.collect(parse.duration, "--request-timeout", endpoint.request_timeout)
    given: dict[str, object] = {
        "--endpoint": endpoint.endpoint,
        "--batch-results": endpoint.batch_results,
        "--format openai-batch": format_name == "openai-batch",
        "--extra-body": endpoint.extra_body,
    }
    flags = [flag for flag, value in given.items() if value]
    if flags and not model.startswith(PREFIX):
        problems.add(f"{flags[0]}: -m {model} runs here; a model of a server is -m {PREFIX}{model}")
    if len(flags := [flag for flag in flags if flag != "--extra-body"]) > 1:
        problems.add(f"{flags[0]} and {flags[1]} exclude one another; give one of them")
    if endpoint.endpoint is None:
        return Batch(tuple(map(str, endpoint.batch_results or ()))) if flags else None
    return Endpoint(endpoint.endpoint, concurrency or 1, retry_s or 0.0, timeout_s or 1.0)


def model_options(arguments: Arguments, problems: Problems, example: str) -> ModelOptions | None:
    """What every task says about its model; None when none is given, e.g. `example`."""
    from mmcli.models.device import check_device, choose_dtype
    from mmcli.models.options import ModelOptions

    model = arguments.model
    frames = problems.collect(parse.number, "--frames", model.frames, 1)
    problems.collect(check_device, model.device)
    problems.collect(choose_dtype, model.dtype)
    if not model.model:
        problems.add(f"no model given; add -m MODEL, a local directory or a hub id ({example})")
        return None
    if not model.model.startswith(("fake:", "openai:")):
        check_torch_trio()
    return ModelOptions(
        model=model.model,
        revision=model.revision,
        device=model.device,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        compile=model.compile,
        offline=model.offline,
        trust_remote_code=model.trust_remote_code,
        allow_pickle=model.allow_pickle,
        frames=frames or 1,
        exact_decode=arguments.inputs.exact_decode,
        base_model=model.base_model,
    )
