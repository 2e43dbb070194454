"""What `mmcli classify` wants of a run: labels, solved examples, the head that is made of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcli.cli import parse
from mmcli.cli.compose import Arguments, GivenSource, Planned, PlannerDefaults, Prepared
from mmcli.cli.given import GivenVectors, open_given
from mmcli.cli.labels import min_score, read_labels, write_kept
from mmcli.cli.options import EndpointArguments, FewShotArguments, InputArguments, LabelArguments
from mmcli.cli.parse import Problems
from mmcli.cli.planners import endpoint_options, model_options
from mmcli.cli.support import Examples, list_examples, look_at
from mmcli.core.protocols import ClassifierPlan, ModelPlan

if TYPE_CHECKING:
    from mmcli.models.classify import Solved
    from mmcli.models.few_shot import FewShot
    from mmcli.models.options import Classification, ModelOptions
    from mmcli.models.vectors import VectorPlan


class ClassifyPlanner(PlannerDefaults):
    """Of `mmcli classify`; asked in the order of mmcli.cli.compose.Planner."""

    def __init__(
        self, arguments: Arguments, labels: LabelArguments, few_shot: FewShotArguments, endpoint: EndpointArguments
    ) -> None:
        self._arguments, self._labels, self._few_shot, self._endpoint = arguments, labels, few_shot, endpoint
        self._given: list[GivenVectors] = []
        self._options: ModelOptions | None = None
        self._examples: Examples | None = None
        self._how: FewShot | None = None
        self._why: str | None = None

    def given(self, problems: Problems) -> GivenSource | None:
        """The inputs as vectors, when all of them are such."""
        inputs = self._arguments.inputs
        wanted = inputs.inputs or []
        keep = parse.split_names(inputs.keep)
        if flags := _media_flags(inputs):
            if self._labels.vector_column is not None:
                problems.add(f"--vector-column and {flags[0]} exclude one another; give one of them")
            return None
        for name in wanted:
            found = problems.collect(open_given, name, self._labels.vector_column, inputs.id_column, keep)
            if found is not None:
                self._given.append(found)
        if not self._given or problems.lines:
            return None
        problems.lines += _flags_of_media(inputs)
        if len(self._given) < len(wanted):
            problems.add("some inputs are vectors and others media; classify them in two runs")
        sizes = {one.source.embedding_size for one in self._given}
        if len(sizes) > 1:
            problems.add(f"the inputs' vectors have different sizes: {', '.join(map(str, sorted(sizes)))}")
        if len({str(one.source.keep) for one in self._given}) > 1:
            problems.add("--keep: the inputs have these columns with different types")
        from mmcli.sources.chain import ChainedSource
        from mmcli.sources.vectors import VectorDecoder

        sources = [one.source for one in self._given]
        return GivenSource(sources[0] if len(sources) == 1 else ChainedSource(sources), VectorDecoder)

    def plan(self, problems: Problems) -> Planned | None:
        """Resolve the model, list the examples, and say what scores become."""
        from mmcli.tasks.classify import Classify

        before = len(problems.lines)
        wanted = read_labels(self._labels, problems)
        least = min_score(self._labels, problems)
        solved = self._solved(wanted, problems)
        self._check_saving(problems)
        self._check_idle(problems)
        options = self._model_options(problems)
        if wanted is None or options is None or len(problems.lines) > before:
            return None
        plan = problems.collect(self._resolve, options, wanted, solved)
        if plan is None:
            return None
        self._check_keepable(plan, problems)
        self._options = options
        told: dict[str, Any] = {"min_score": least, "exact_decode": options.exact_decode}
        task = Classify(wanted.ranking.threshold is not None, least, plan.open_joiner())
        late = self._examples is not None or self._saves
        return Planned(plan, task, told, self._ready if late else None, keeps=self._saves)

    @property
    def _saves(self) -> bool:
        return self._labels.save_labels is not None or self._few_shot.save_head is not None

    # ------------------------------------------------------------------------------------- the model

    def _model_options(self, problems: Problems) -> ModelOptions | None:
        if not self._arguments.model.model:
            return self._options_of_vectors(problems)
        options = model_options(self._arguments, problems, "openai/clip-vit-base-patch32")
        if options is None:
            return None
        server = endpoint_options(self._endpoint, options.model, self._arguments.output.format, problems)
        if self._arguments.output.format == "openai-batch" or self._endpoint.batch_results:
            problems.add("-f openai-batch is of mmcli ask: mmcli ask -q ... --choices A,B -f openai-batch")
        return replace(options, endpoint=server, extra_body=self._endpoint.extra_body)

    def _options_of_vectors(self, problems: Problems) -> ModelOptions | None:
        """Without -m: the hub's model that the inputs' vectors name; `vectors` when no model is needed."""
        from mmcli.models.options import ModelOptions

        if not self._given:
            return model_options(self._arguments, problems, "openai/clip-vit-base-patch32")
        examples, how = self._examples, self._how
        if examples is not None and examples.vectors and how is not None and how.method != "tip-adapter":
            return ModelOptions("")
        if self._labels.labels_file is not None and self._labels.labels_file.suffix in (".parquet", ".pq"):
            return ModelOptions("")
        model = self._given[0].model or {}
        if model.get("revision"):
            named = replace(self._arguments.model, model=str(model["id"]), revision=str(model["revision"]))
            return model_options(replace(self._arguments, model=named), problems, "")
        of = f", the one of these vectors: {model['id']}" if model.get("id") else ""
        problems.add(f"no model given; add -m MODEL{of}")
        return None

    def _resolve(self, options: ModelOptions, wanted: Classification, solved: Solved | None) -> ClassifierPlan:
        from mmcli.models.classify import check_normalized, check_same_model, on_vectors, resolve_classifier
        from mmcli.models.vectors import VectorPlan, VectorsAlone

        given = self._given[0] if self._given else None
        if options.model:
            plan = resolve_classifier(options, wanted, solved, given is not None)
        else:
            assert given is not None
            alone = VectorsAlone(given.source.embedding_size, given.model or {})
            plan = on_vectors(alone, options, wanted, solved, given=True)
        vectors: list[tuple[Any, Any, str]] = [(one.model, one.source, "INPUT: its vectors") for one in self._given]
        if self._examples is not None and self._examples.vectors:
            vectors.append((self._examples.model, self._examples.source, "--examples: their vectors"))
        for model, source, whose in vectors:
            assert isinstance(plan, VectorPlan)
            size = source.embedding_size
            check_same_model(plan.base, options.model, {**(model or {}), "size": size}, whose)
            check_normalized(plan, solved, model or {}, whose)
        return plan

    # ---------------------------------------------------------------------------------- the examples

    def _solved(self, wanted: Classification | None, problems: Problems) -> Solved | None:
        from mmcli.models.classify import Solved
        from mmcli.models.few_shot import METHODS, FewShot, choose_method

        asked = self._few_shot
        method = problems.collect(parse.choice, "--method", asked.method, METHODS)
        alpha = problems.collect(parse.decimal, "--tip-alpha", asked.tip_alpha)
        beta = problems.collect(parse.decimal, "--tip-beta", asked.tip_beta)
        if asked.examples is None:
            if asked.method != "auto":
                problems.add(f"--method {asked.method}: there are no --examples to make a head of")
            if asked.label_column != "label":
                problems.add(f"--label-column {asked.label_column}: there are no --examples that could have one")
            return None
        names = wanted.names if wanted is not None else ()
        column = self._labels.vector_column
        examples = problems.collect(list_examples, asked.examples, asked.label_column, column, names)
        if examples is None or method is None or alpha is None or beta is None:
            return None
        seed = problems.collect(parse.number, "--seed", self._arguments.run.seed, 0) or 0
        self._how, why = choose_method(FewShot(method, alpha, beta, seed), examples.counts)
        self._examples, self._why = examples, why
        return Solved(examples.labels, examples.digest, self._how)

    def _check_idle(self, problems: Problems) -> None:
        """Options that nothing would heed."""
        asked = self._few_shot
        if self._how is None or self._how.method != "tip-adapter":
            for flag, value, default in (("alpha", asked.tip_alpha, "1"), ("beta", asked.tip_beta, "5.5")):
                if value != default:
                    problems.add(f"--tip-{flag} goes with --examples and --method tip-adapter")

    def _check_keepable(self, plan: ClassifierPlan, problems: Problems) -> None:
        """What is to be kept must be made by this command."""
        from mmcli.models.classify import is_conditioned
        from mmcli.models.head import is_head
        from mmcli.models.vectors import VectorPlan

        if not self._saves:
            return
        said, model = self._saving, self._arguments.model.model
        if not isinstance(plan, VectorPlan):
            problems.add(f"{said}: -m {model} compares no vectors that could be kept")
        elif is_head(str(model)):
            problems.add(f"{said}: -m {model} is a head that is kept already")
        elif self._labels.save_labels is not None and not plan.prompts:
            problems.add(f"{said}: there are no texts of labels that could be kept; give --labels")
        elif self._examples is None and is_conditioned(plan.base):
            problems.add(f"{said}: the vectors of labels depend on each clip with -m {model}")

    def _check_saving(self, problems: Problems) -> None:
        """What is kept must not replace what is something else."""
        from mmcli.models.head import is_head

        head, labels = self._few_shot.save_head, self._labels.save_labels
        if head is not None and head.exists() and not is_head(str(head)) and not _is_empty(head):
            problems.add(f"--save-head {head}: there is something else already; choose another name")
        if head is not None and not head.absolute().parent.is_dir():
            problems.add(f"--save-head {head}: there is no folder {head.absolute().parent}")
        if labels is None:
            return
        if labels.suffix not in (".parquet", ".pq"):
            problems.add(f"--save-labels {labels}: it is a Parquet file; name it {labels.with_suffix('.parquet')}")
        if not labels.absolute().parent.is_dir():
            problems.add(f"--save-labels {labels}: there is no folder {labels.absolute().parent}")
        if self._few_shot.examples is not None:
            problems.add("--save-labels keeps labels as texts; what --examples make is kept by --save-head")

    # -------------------------------------------------------------------------------------- the head

    def _ready(self, prepared: Prepared) -> ModelPlan:
        """The plan with its head, which is kept where that is asked for. Raises ConfigError, ModelError."""
        from mmcli.models.vectors import VectorPlan, VectorRunner, with_head

        plan = prepared.planned.plan
        assert isinstance(plan, VectorPlan)
        if self._examples is not None:
            return self._fitted(prepared, plan)
        runner = VectorRunner(plan)
        assert runner.head is not None
        if self._labels.save_labels is not None:
            write_kept(runner.head, list(plan.prompts), plan.base.describe(), self._labels.save_labels)
        made = with_head(plan, runner.head, runner.base)
        self._save_head(made)
        return made

    @property
    def _saving(self) -> str:
        return "--save-labels" if self._labels.save_labels is not None else "--save-head"

    def _fitted(self, prepared: Prepared, plan: VectorPlan) -> VectorPlan:
        from mmcli.models.few_shot import fit
        from mmcli.models.vectors import VectorRunner, with_head

        assert self._examples is not None
        assert self._how is not None
        if self._why:
            prepared.messages.note(f"--method auto: {self._why}")
        tip = self._how.method == "tip-adapter"
        runner = None if self._examples.vectors and self._given and not tip else plan.base.load()
        support = look_at(prepared, self._examples, plan, runner)
        zero_shot = VectorRunner(replace(plan, loaded=runner)).head if tip else None
        made = with_head(plan, fit(support, self._how, zero_shot), runner)
        self._save_head(made)
        return made

    def _save_head(self, plan: VectorPlan) -> None:
        if self._few_shot.save_head is None:
            return
        from mmcli.core.durable import output_errors, swap_folder
        from mmcli.models.classify import head_base
        from mmcli.models.head import write_head

        assert self._options is not None
        assert plan.head is not None
        head, base = plan.head, head_base(self._options, plan)
        with output_errors(self._few_shot.save_head):
            swap_folder(self._few_shot.save_head, lambda folder: write_head(head, base, folder))


def _media_flags(inputs: InputArguments) -> list[str]:
    """Options that say which columns of the inputs are media."""
    kinds = ("image", "audio", "video", "text", "path")
    return [f"--{kind}-column" for kind in kinds if getattr(inputs, f"{kind}_column") is not None]


def _flags_of_media(inputs: InputArguments) -> list[str]:
    """What is asked of the inputs that vectors have no use for."""
    found = []
    if inputs.glob:
        found.append(
            f"--glob {' '.join(inputs.glob)} chooses media in a folder; these inputs are vectors, all rows of "
            "which are classified; leave it out (in a --config file it can be under [embed])"
        )
    if inputs.input_format not in (None, "parquet"):
        found.append(
            f"--input-format {inputs.input_format}: these inputs are vectors, which are read from Parquet; leave "
            "it out, or name a column of media, e.g. --path-column path, to read those"
        )
    return found


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not os.listdir(folder)
