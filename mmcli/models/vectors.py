"""Classification by a head on the vectors of `mmcli embed`: zero-shot, few-shot, or a saved head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from mmcli.core.errors import ModelError
from mmcli.core.protocols import EmbeddingModelPlan, Processor, RecordProcessor, Runner
from mmcli.core.records import MODALITIES, DecodeOptions, Modality, Sample
from mmcli.models.device import keep_freed_memory
from mmcli.models.options import Ranking

if TYPE_CHECKING:
    import torch

    from mmcli.core.classified import ClassifiedRows
    from mmcli.models.head import Head
    from mmcli.models.scores import PendingClassified

# The name of the model input that is a vector already.
VECTOR = "embedding"
_BATCH = 2048


@dataclass(frozen=True, slots=True)
class VectorPlan:
    """See mmcli.core.protocols.ClassifierPlan.

    base     the model of the vectors
    labels   of the head, all different
    made     how it is made, for the fingerprint
    prompts  texts of each label, of which the base's text tower makes the head; () when there is another way
    head     when it is there already
    given    inputs are vectors: the base sees no media
    loaded   the base's runner, when it is loaded already; stays in this process
    """

    base: EmbeddingModelPlan
    labels: tuple[str, ...]
    ranking: Ranking
    made: dict[str, Any]
    prompts: tuple[tuple[str, ...], ...] = ()
    head: Head | None = None
    given: bool = False
    loaded: Any = field(default=None, compare=False)

    @property
    def batch_size(self) -> int | None:
        """What is best where inputs are vectors: 100,000 against 1,000 labels take BATCH."""
        return _BATCH if self.given else None

    @property
    def modalities(self) -> frozenset[Modality]:
        return self.base.modalities

    @property
    def decode(self) -> DecodeOptions:
        return self.base.decode

    def describe(self) -> dict[str, Any]:
        """What identifies the scores."""
        described = {**self.base.describe(), "labels": list(self.labels), "head": self.made}
        if self.prompts:
            described["prompts"] = blake2b(repr(self.prompts).encode(), digest_size=16).hexdigest()
        return {**described, "ranking": self.ranking.describe()}

    def open_processor(self) -> Processor | RecordProcessor:
        return self.base.open_processor()

    def open_joiner(self) -> Callable[[Sequence[Any]], Any] | None:
        """None: each medium has a Classified of its own."""
        return None

    def load(self) -> Runner:
        """Load what is needed of the base. Raises ModelError, ConfigError for labels that the model cannot tell."""
        return VectorRunner(self)

    def __reduce__(self) -> Any:
        # To the decode workers, which need neither weights nor head.
        return VectorPlan, (self.base, self.labels, self.ranking, self.made)


class VectorRunner:
    """Batches -> Classified of each sample."""

    def __init__(self, plan: VectorPlan) -> None:
        import torch

        self._plan = plan
        self._head = plan.head
        self._prompts: tuple[torch.Tensor, torch.Tensor] | None = None
        needs_base = not plan.given or plan.head is None
        self._base: Any = plan.loaded
        if self._base is None and needs_base:
            self._base = plan.base.load()
        self.device: torch.device = torch.device("cpu") if self._base is None else self._base.device
        if self.device.type == "cpu":
            # Scores of 2,048 rows against 1,000 labels are 8 MB: half of all page faults were for their memory.
            keep_freed_memory()
        with torch.inference_mode():
            if self._head is None:
                self._make_head()
            else:
                self._head = self._head.to(self.device)
        size = self._head.embedding_size if self._head is not None else plan.base.embedding_size
        if size != plan.base.embedding_size:
            raise ModelError(
                f"the head is for vectors of {size} numbers; the model's have {plan.base.embedding_size}"
            )

    @property
    def base(self) -> Any:
        """The runner of the base; None where it is not needed."""
        return self._base

    @property
    def head(self) -> Head | None:
        """None where the labels' vectors depend on the input."""
        return self._head

    def _make_head(self) -> None:
        from mmcli.models import zero_shot

        prompts = self._plan.prompts
        texts = [text for of_label in prompts for text in of_label]
        features = zero_shot.text_features(self._base, zero_shot.text_processor(self._plan.base), texts)
        owners = zero_shot.owners_of(prompts).to(self.device)
        if self._base.conditioned is not None:
            self._prompts = features, owners
            return
        # On the host, which adds in one order: on a GPU a run that goes on would have other last bits.
        vectors = zero_shot.label_vectors(features.cpu(), owners.cpu(), len(prompts)).to(self.device)
        self._head = zero_shot.zero_shot_head(self._plan.labels, vectors, self._base.similarity)

    def concurrent(self, most: int) -> Any:
        """See mmcli.core.protocols.Runner; as the base does it."""
        several = getattr(self._base, "concurrent", None)
        return self if several is None else several(most, self)

    def collate(self, samples: Sequence[Sample]) -> Any:
        """As the base does; vectors are stacked."""
        if VECTOR not in samples[0].arrays:
            return self._base.collate(samples)
        from mmcli.core.samples import Samples
        from mmcli.models.runner import Batch, padded, stack

        pinned = self.device.type == "cuda"
        if isinstance(samples, Samples):
            return Batch(samples.modality, {VECTOR: padded(samples.columns[VECTOR], 0, pinned)})
        return Batch(samples[0].modality, {VECTOR: stack([s.arrays[VECTOR] for s in samples], 0, pinned)})

    def forward(self, batch: Any) -> ClassifiedRows | PendingClassified:
        """One Classified for each sample of the batch. Raises as the base does."""
        import torch

        from mmcli.models.scores import classify

        with torch.inference_mode():
            logits, activation = self._logits(batch)
            return classify(logits, activation, self._plan.labels, self._plan.ranking)

    def _logits(self, batch: Any) -> tuple[torch.Tensor, Any]:
        if self._head is None:
            return self._conditioned_logits(batch)
        given = getattr(batch, "tensors", {}).get(VECTOR)
        vectors = self._base.vectors(batch) if given is None else given.to(self.device, non_blocking=True)
        return self._head.logits(vectors), self._head.activation

    def _conditioned_logits(self, batch: Any) -> tuple[torch.Tensor, Any]:
        import torch

        from mmcli.models.zero_shot import label_vectors

        assert self._prompts is not None
        features, owners = self._prompts
        similarity = self._base.similarity
        vectors, texts = self._base.conditioned(self._base.to_device(batch), features)
        vectors = torch.nn.functional.normalize(vectors.float(), dim=-1)
        labels = label_vectors(texts, owners, len(self._plan.labels))
        cosines = torch.einsum("nd,nld->nl", vectors, labels)
        return cosines * similarity.scale + similarity.bias, similarity.activation


def with_head(plan: VectorPlan, head: Head, loaded: Any) -> VectorPlan:
    """The plan once its head is made; `loaded`: the base's runner, so that weights are loaded once."""
    return replace(plan, head=head, prompts=(), loaded=loaded)


@dataclass(slots=True)
class Loaded:
    """The plan of a model that is loaded already in this process; decode workers get the plan alone."""

    plan: EmbeddingModelPlan
    runner: Any

    @property
    def modalities(self) -> frozenset[Modality]:
        return self.plan.modalities

    @property
    def decode(self) -> DecodeOptions:
        return self.plan.decode

    def describe(self) -> dict[str, Any]:
        """As the plan."""
        return self.plan.describe()

    def open_processor(self) -> Processor | RecordProcessor:
        return self.plan.open_processor()

    def load(self) -> Runner:
        """The runner that is there."""
        loaded: Runner = self.runner
        return loaded

    def __reduce__(self) -> Any:
        return Loaded, (self.plan, None)


@dataclass(frozen=True, slots=True)
class VectorsAlone:
    """What stands for the model when all vectors are there: see mmcli.core.protocols.EmbeddingModelPlan.

    identity  of the model that made them, as far as their file says
    """

    embedding_size: int
    identity: dict[str, Any]

    @property
    def modalities(self) -> frozenset[Modality]:
        return frozenset(MODALITIES)

    @property
    def decode(self) -> DecodeOptions:
        return DecodeOptions()

    @property
    def normalize(self) -> bool:
        return bool(self.identity.get("normalized", False))

    def describe(self) -> dict[str, Any]:
        """What identifies the vectors."""
        return {**self.identity, "embedding_size": self.embedding_size}

    def open_processor(self) -> Processor | RecordProcessor:
        raise ModelError("there is no model to look at media with")

    def load(self) -> Runner:
        """Raises ModelError: there is none."""
        raise ModelError("there is no model to look at media with")
