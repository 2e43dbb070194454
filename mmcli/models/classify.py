"""-m MODEL -> how it classifies: by its own head, by labels as texts, by a head on its vectors, by writing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmcli.core.errors import ConfigError
from mmcli.core.protocols import ClassifierPlan, EmbeddingModelPlan, Runner, WriterPlan
from mmcli.core.records import Classified, DecodeOptions, Modality, Scored
from mmcli.core.template import Template
from mmcli.models import dual_encoder, endpoint
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.fake import PREFIX as FAKE
from mmcli.models.few_shot import FewShot
from mmcli.models.head import Head, is_head, read_head
from mmcli.models.options import Classification, Generation, ModelOptions, Ranking, Task
from mmcli.models.vectors import VectorPlan, VectorsAlone

# What a model that writes is asked, unless --question says it.
QUESTION = "Which of these is it: {labels}? Answer with one of them and nothing else."
_NO_LABELS = "add --labels cat,dog, --labels-file FILE, or --examples with a folder for each label"


@dataclass(frozen=True, slots=True)
class Solved:
    """Solved examples, before they are looked at.

    labels  names, of the examples of which there is at least one
    digest  of all examples and their labels
    """

    labels: tuple[str, ...]
    digest: str
    how: FewShot


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """See mmcli.core.protocols.ClassifierPlan; of a model that writes, and is asked to choose a label."""

    writer: WriterPlan
    labels: tuple[str, ...]
    ranking: Ranking

    @property
    def modalities(self) -> frozenset[Modality]:
        return self.writer.modalities

    @property
    def decode(self) -> DecodeOptions:
        return self.writer.decode

    @property
    def batch_size(self) -> int | None:
        """What a server is asked at once; None: as many as the device takes."""
        return getattr(self.writer, "batch_size", None)

    def describe(self) -> dict[str, Any]:
        """What identifies the scores."""
        return {**self.writer.describe(), "labels": list(self.labels), "ranking": self.ranking.describe()}

    def open_processor(self) -> Any:
        return self.writer.open_processor()

    def open_joiner(self) -> Callable[[Sequence[Any]], Any] | None:
        """A Scored of all labels -> Classified."""
        return _Join(len(self.labels), self.ranking)

    def load(self) -> Runner:
        """Load the weights. Raises ModelError."""
        return self.writer.load()


@dataclass(frozen=True, slots=True)
class _Join:
    labels: int
    ranking: Ranking

    def __call__(self, outputs: Sequence[Any]) -> Classified:
        scored: Scored = outputs[0]
        ranked = scored.top_k
        if len(ranked) < self.labels:
            # A server tells the score of what it chose, or none.
            return Classified(((scored.answer, scored.score),), None, None)
        entropy = -sum(score * math.log(score) for _, score in ranked if score > 0)
        return Classified(ranked[: self.ranking.top_k], ranked[0][1] - ranked[1][1], entropy)


def resolve_classifier(
    options: ModelOptions, wanted: Classification, solved: Solved | None = None, given: bool = False
) -> ClassifierPlan:
    """How a model classifies, before weights are loaded.

    solved  examples that its head will be made of
    given   inputs are vectors of this model
    Raises ConfigError for what does not go together, TryAgain for the hub.
    """
    if is_head(options.model):
        return _saved_head(options, wanted, solved, given)
    if options.model.startswith(FAKE):
        from mmcli.models.fake import resolve_fake

        return on_vectors(resolve_fake(options), options, wanted, solved, given)
    if options.model.startswith(endpoint.PREFIX):
        if solved is not None or given:
            raise ConfigError(f"-m {options.model}: a server gives no vectors to compare; choose another model")
        return _choosing(endpoint.resolve_endpoint(options, _asked(options.model, wanted)), wanted)
    return _checkpoint(options, wanted, solved, given)


def _checkpoint(
    options: ModelOptions, wanted: Classification, solved: Solved | None, given: bool
) -> ClassifierPlan:
    from mmcli.models import classifier, entailment, families, fusion_family

    checkpoint, dtype = families.open_with_dtype(options, [])
    if solved is None and not given and wanted.kept is None:
        if wanted.labels and (pairs := entailment.find(checkpoint)) is not None:
            return entailment.plan(checkpoint, options, dtype, pairs, wanted)
        if fusion_family.find(checkpoint):
            return fusion_family.plan(checkpoint, options, dtype, wanted)
        if (own := classifier.find(checkpoint)) is not None:
            return classifier.plan(checkpoint, options, dtype, own, wanted)
        if _writes(checkpoint, "ask"):
            generation = _asked(options.model, wanted)
            return _choosing(families.plan_writer(options, generation), wanted)
    _check_gives_vectors(checkpoint, solved)
    return on_vectors(families.plan_vectors(checkpoint, options, dtype), options, wanted, solved, given)


def _check_gives_vectors(checkpoint: Checkpoint, solved: Solved | None) -> None:
    """Raise ConfigError for a model that writes: its weights are not those that vectors need."""
    if _writes(checkpoint, "ask"):
        way = "mmcli ask --choices shows examples to such a model" if solved else "give it the inputs themselves"
        raise ConfigError(f"-m {checkpoint.id}: it writes, and gives no vectors to compare; {way}")
    if _writes(checkpoint, "caption"):
        raise ConfigError(
            f"-m {checkpoint.id}: it writes captions (mmcli caption) and compares nothing with labels; "
            "take a model such as CLIP, or one that answers questions"
        )


def _writes(checkpoint: Checkpoint, task: Task) -> bool:
    """Whether it was saved as what writes captions or answers, and not for its vectors."""
    from mmcli.models import families

    content = checkpoint.json("config.json")
    kind, architectures = str(content.get("model_type")), tuple(content.get("architectures") or ())
    if any(name in dual_encoder.BY_ARCHITECTURE for name in architectures):
        return False
    return any(family.find(kind, architectures, task) is not None for family in families.WRITERS)


# ------------------------------------------------------------------------------------- by its vectors


def on_vectors(
    base: EmbeddingModelPlan, options: ModelOptions, wanted: Classification, solved: Solved | None, given: bool
) -> VectorPlan:
    from mmcli.models import zero_shot

    problems = _vector_problems(base, options, wanted, solved, given)
    if problems:
        raise ConfigError(problems)
    if wanted.kept is not None:
        head, identity = wanted.kept
        told = {**identity, "size": head.embedding_size}
        check_same_model(base, options.model, told, "--labels-file: its vectors")
        made = {**head.method, "weights": head_identity(head)}
        return VectorPlan(base, head.labels, wanted.ranking, made, head=head, given=given)
    templates = wanted.templates or (zero_shot.default_template(base.modalities),)
    if solved is None:
        prompts = zero_shot.fill(wanted.labels, templates)
        zero_shot.check_distinct(base, wanted.names, prompts)
        made = {"name": "zero-shot", "templates": list(templates)}
        return VectorPlan(base, wanted.names, wanted.ranking, made, prompts, given=given)
    prompts = ()
    made = {**solved.how.describe(), "examples": solved.digest}
    if solved.how.method == "tip-adapter":
        texts = {label.name: label for label in wanted.labels} or {}
        labels = [texts.get(name) or zero_shot.named(name) for name in solved.labels]
        prompts = zero_shot.fill(labels, templates)
        made["templates"] = list(templates)
    return VectorPlan(base, solved.labels, wanted.ranking, made, prompts, given=given)


def _vector_problems(
    base: EmbeddingModelPlan, options: ModelOptions, wanted: Classification, solved: Solved | None, given: bool
) -> list[str]:
    if wanted.kept is not None:
        return _kept_problems(options, wanted, solved)
    activation = getattr(base, "activation", None)
    problems = []
    if solved is None and not wanted.labels:
        problems.append(f"-m {options.model}: it has no labels of its own; {_NO_LABELS}")
    needs_texts = solved is None or solved.how.method == "tip-adapter"
    if needs_texts and activation is None:
        takes = ", ".join(sorted(base.modalities))
        problems.append(
            f"-m {options.model}: it gives vectors of {takes} alone, which labels cannot be compared with; "
            "take a model such as CLIP, or solved --examples with --method mean or probe"
        )
    elif wanted.ranking.threshold is not None and (solved is not None or activation != "sigmoid"):
        problems.append(_compete("a head of examples" if solved is not None else "this model"))
    if needs_texts and (given or solved is not None) and is_conditioned(base):
        what = "--method tip-adapter" if solved is not None else "INPUT"
        problems.append(
            f"{what}: the vectors of labels depend on each clip with -m {options.model}; "
            f"{'take --method mean or probe' if solved is not None else 'give it the clips, not their vectors'}"
        )
    if not needs_texts and wanted.templates is not None:
        problems.append("--template: heads of examples compare no texts (but --method tip-adapter); leave it out")
    if wanted.question is not None:
        problems.append(f"--question: -m {options.model} is asked nothing; leave it out (see --template)")
    if "text" not in base.modalities and needs_texts and activation is not None:
        problems.append(f"-m {options.model}: it has no tokenizer for the labels")
    return problems


def _kept_problems(options: ModelOptions, wanted: Classification, solved: Solved | None) -> list[str]:
    assert wanted.kept is not None
    problems = []
    if solved is not None:
        problems.append("--labels-file: vectors that --save-labels kept are a head; leave it or --examples out")
    if wanted.ranking.threshold is not None and wanted.kept[0].activation != "sigmoid":
        problems.append(_compete("this file"))
    if wanted.question is not None:
        problems.append(f"--question: -m {options.model} is asked nothing; leave it out")
    return problems


def _compete(of: str) -> str:
    return (
        f"--multi-label: the labels of {of} compete for one input (softmax); SigLIP scores each alone, "
        "and so do text models of entailment"
    )


def is_conditioned(base: EmbeddingModelPlan) -> bool:
    """Whether the vectors of its labels depend on each input, as X-CLIP's do."""
    return bool(getattr(getattr(base, "detail", None), "conditioned", False))


def check_same_model(base: EmbeddingModelPlan, model: str, identity: dict[str, Any], whose: str) -> None:
    """Raise ConfigError unless vectors that `identity` describes are of the same model."""
    here = base.describe()
    if identity.get("center") != here.get("center"):
        raise ConfigError(
            f"{whose} are centred (mmcli embed --center), those of -m {model} are not"
            if "center" in identity
            else f"{whose} are not centred, those of -m {model} are"
        )
    for name in ("family", "weights", "revision", "pooling", "embedding_size"):
        if name in identity and identity[name] != here.get(name, identity[name]):
            raise ConfigError(
                f"{whose} are of another model ({identity.get('id')}, {name} {identity[name]}) than -m {model} "
                f"({here[name]})"
            )
    if base.embedding_size != identity.get("size", base.embedding_size):
        raise ConfigError(
            f"{whose} have {identity['size']} numbers, those of -m {model} {base.embedding_size}: another model's"
        )


def check_normalized(plan: VectorPlan, solved: Solved | None, identity: dict[str, Any], whose: str) -> None:
    """Raise ConfigError for vectors of length 1 where a head reads lengths too, and the model's have others."""
    if plan.head is not None:
        by_direction = plan.head.normalize
    else:
        is_probe = solved is not None and solved.how.method == "probe"
        by_direction = not is_probe or bool(getattr(plan.base, "normalize", False))
    if identity.get("normalized") and not by_direction:
        raise ConfigError(
            f"{whose} were divided by their length (embed --normalize), those that they meet here were not; "
            "embed all of them alike"
        )


def _saved_head(options: ModelOptions, wanted: Classification, solved: Solved | None, given: bool) -> VectorPlan:
    """`given`: its vectors are there, so that their model is not needed."""
    asked = (wanted.labels, wanted.kept, solved, wanted.templates, wanted.question)
    if any(one for one in asked):
        raise ConfigError(
            f"-m {options.model}: this head has its labels; leave --labels, --template, --question and "
            "--examples out"
        )
    head, told = read_head(Path(options.model))
    if wanted.ranking.threshold is not None and head.activation != "sigmoid":
        raise ConfigError(f"--multi-label: the labels of {options.model} compete for one input (softmax)")
    made = {**head.method, "weights": head_identity(head)}
    if given:
        alone = VectorsAlone(head.embedding_size, told["identity"])
        return VectorPlan(alone, head.labels, wanted.ranking, made, head=head, given=True)
    base = _base_of_head(options, head, told)
    return VectorPlan(base, head.labels, wanted.ranking, made, head=head)


def _base_of_head(options: ModelOptions, head: Head, told: dict[str, Any]) -> EmbeddingModelPlan:
    from mmcli.models.resolve import resolve

    if not told["model"]:
        raise ConfigError(
            f"-m {options.model}: this head was made of vectors, without their model; "
            "give it vectors: an output of mmcli embed, or --vector-column"
        )
    named = replace(
        options,
        model=str(told["model"]),
        revision=told.get("revision"),
        pooling=told.get("pooling"),
        normalize=told.get("normalize"),
    )
    try:
        base = resolve(named)
    except ConfigError as error:
        raise ConfigError([f"the model of this head: {problem}" for problem in error.problems]) from error
    check_same_model(base, options.model, {**told["identity"], "size": head.embedding_size}, "the head's vectors")
    return base


# ----------------------------------------------------------------------------------------- by writing


def _asked(model: str, wanted: Classification) -> Generation:
    """The question that has labels for an answer. Raises ConfigError."""
    if not wanted.labels:
        raise ConfigError(f"-m {model}: it has no labels of its own; add --labels cat,dog or --labels-file FILE")
    problems = []
    if wanted.ranking.threshold is not None:
        problems.append(
            f"--multi-label: -m {model} chooses one label; ask about each: mmcli ask -q ... --choices yes,no"
        )
    if wanted.templates is not None:
        problems.append(f"--template: -m {model} is asked a question; say it with --question")
    if problems:
        raise ConfigError(problems)
    names = ", ".join(wanted.names).replace("{", "{{").replace("}", "}}")
    question = (wanted.question or QUESTION).replace("{labels}", names)
    if others := Template.parse(question).columns:
        raise ConfigError(
            f"--question: {{{others[0]}}} is no variable of it, only {{labels}} is; a brace itself is written twice"
        )
    return Generation(questions=(question,), choices=wanted.names, max_new_tokens=20, task="ask")


def _choosing(writer: WriterPlan, wanted: Classification) -> ChoicePlan:
    return ChoicePlan(writer, wanted.names, wanted.ranking)


def head_base(options: ModelOptions, plan: VectorPlan) -> dict[str, Any]:
    """What a saved head needs to know of the model of its vectors."""
    from os.path import abspath, isdir

    model = abspath(options.model) if isdir(options.model) else options.model
    identity = plan.base.describe()
    normalize = getattr(plan.base, "normalize", None)
    told = {"model": model, "revision": options.revision, "pooling": options.pooling, "normalize": normalize}
    assert plan.head is not None
    return {**told, "identity": identity}


def head_identity(head: Head) -> str:
    """A digest of its numbers and settings."""
    from hashlib import blake2b

    settings = (head.normalize, head.activation, head.cache and (head.cache.alpha, head.cache.beta))
    digest = blake2b(repr(settings).encode(), digest_size=16)
    for tensor in (head.weight, head.bias, *((head.cache.keys, head.cache.classes) if head.cache else ())):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
