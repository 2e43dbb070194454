"""What is known about a checkpoint before its weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from mmcli.core.protocols import Processor, RecordProcessor, Runner
from mmcli.core.records import DecodeOptions, Modality
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.options import Generation, Ranking

if TYPE_CHECKING:
    from mmcli.models.center import Center
    from mmcli.models.fusion_inputs import Part

# What the outputs of a model that writes are: see GenerationPlan.
Output = Literal["text", "json", "scores", "speech"]


@dataclass(frozen=True, slots=True)
class TextSpec:
    """How texts become input_ids.

    max_length  longer texts are cut there, as the checkpoint's processor does
    padding     "longest": to the longest of a batch; "max_length": always to max_length (SigLIP was trained so)
    prefix      put before every text (a sentence-transformers prompt)
    lower_case  texts are lower-cased first (an option of sentence-transformers)
    exact       only texts of equally many tokens share a batch, since padding changes the output
    """

    max_length: int | None
    padding: Literal["longest", "max_length"] = "longest"
    prefix: str = ""
    lower_case: bool = False
    exact: bool = False


@dataclass(frozen=True, slots=True)
class AudioSpec:
    """How sounds become model inputs.

    batching  "fixed": the extractor gives every sound one shape; "masked": shorter sounds are padded and masked;
              "exact": only sounds of equal length share a batch, since padding changes the output (wav2vec2 with
              group norm: 5e-3)
    min_samples  shorter sounds give no output frame
    """

    batching: Literal["fixed", "masked", "exact"]
    sampling_rate: int
    min_samples: int = 1


@dataclass(frozen=True, slots=True)
class VideoSpec:
    """How clips become model inputs. `native`: the model takes clips; else an image tower takes each frame."""

    num_frames: int
    native: bool


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model takes, by modality; None: not at all."""

    text: TextSpec | None = None
    image: bool = False
    audio: AudioSpec | None = None
    video: VideoSpec | None = None

    @property
    def modalities(self) -> frozenset[Modality]:
        given: dict[Modality, object] = {
            "text": self.text, "image": self.image, "audio": self.audio, "video": self.video
        }  # fmt: skip
        return frozenset(m for m, spec in given.items() if spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPlan:
    """What the plans of all checkpoints share.

    loader  "module:function" that loads the weights: (plan, device) -> what the plan's runner calls
    detail  what the family needs to know beside (its table's row)
    learns  whether the weights are to change once they are loaded
    """

    checkpoint: Checkpoint
    family: str
    loader: str
    detail: Any
    inputs: Inputs
    decode: DecodeOptions
    dtype: str
    device: str
    attn_implementation: str | None
    compile: bool
    learns: bool = False

    @property
    def modalities(self) -> frozenset[Modality]:
        return self.inputs.modalities

    def processor_of(self, modality: Modality) -> Checkpoint:
        """The checkpoint whose tokenizer or processor makes inputs of a modality."""
        return self.checkpoint

    def inputs_of(self, modality: Modality) -> Inputs:
        """What that checkpoint takes."""
        return self.inputs

    def describe_model(self) -> dict[str, Any]:
        """The checkpoint, and every setting that changes what any model gives."""
        return {
            **self.checkpoint.describe(),
            "family": self.family,
            "dtype": self.dtype,
            "frames": self.inputs.video.num_frames if self.inputs.video else None,
            "attn_implementation": self.attn_implementation,
            "compile": self.compile,
        }

    def load_weights(self, device: Any) -> Any:
        """What the loader gives: a model's parts on a torch.device."""
        return _imported(self.loader)(self, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingPlan(CheckpointPlan):
    """See mmcli.core.protocols.EmbeddingModelPlan; its loader gives Towers by modality (mmcli.models.runner).

    normalize   divide vectors by their L2 norm
    activation  of the logits that cosines of its vectors make; None: its vectors are of no shared space
    center      what is subtracted from unit vectors, before they are normalised again; None: nothing
    parts       whose processor makes inputs of which modalities, where they are of several checkpoints
    """

    embedding_size: int
    pooling: str | None
    normalize: bool
    activation: Literal["softmax", "sigmoid"] | None = None
    center: Center | None = None
    parts: tuple[Part, ...] = ()

    @property
    def modalities(self) -> frozenset[Modality]:
        """Of centred vectors those that have a mean."""
        taken = self.inputs.modalities
        return taken if self.center is None else taken & self.center.means.keys()

    def describe(self) -> dict[str, Any]:
        """What identifies the vectors."""
        described = {**self.describe_model(), "pooling": self.pooling, "normalized": self.normalize}
        return described if self.center is None else {**described, "center": self.center.digest}

    def processor_of(self, modality: Modality) -> Checkpoint:
        """See CheckpointPlan."""
        return next((p.checkpoint for p in self.parts if modality in p.inputs.modalities), self.checkpoint)

    def inputs_of(self, modality: Modality) -> Inputs:
        """See CheckpointPlan."""
        return next((p.inputs for p in self.parts if modality in p.inputs.modalities), self.inputs)

    def open_processor(self) -> Processor:
        from mmcli.models.inputs import InputProcessor, PartsProcessor

        return PartsProcessor(self.parts) if self.parts else InputProcessor(self.checkpoint, self.inputs)

    def load(self) -> Runner:
        """Load the weights. Raises ModelError."""
        from mmcli.models.runner import EmbeddingRunner

        return EmbeddingRunner(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan(CheckpointPlan):
    """See mmcli.core.protocols.ModelPlan; of models that write.

    processor  "module:function" that opens what runs in the decode workers: plan -> RecordProcessor
    runner     "module:class" of its Runner, made with the plan; its loader gives what that runner wants
    output     what a Sample's output is: "text": mmcli.core.records.Generated; "json": likewise, a text that the
               schema allows; "scores": Scored; "speech": Heard
    joiner     "module:function": plan -> what makes one output of all outputs of a record (speech: a Transcript)
    """

    generation: Generation
    processor: str
    runner: str = "mmcli.models.generate:GenerationRunner"
    output: Output = "text"
    joiner: str | None = None

    def describe(self) -> dict[str, Any]:
        """What identifies the texts: how they are generated, too."""
        return {**self.describe_model(), "generation": self.generation.describe()}

    def open_processor(self) -> RecordProcessor:
        opened: RecordProcessor = _imported(self.processor)(self)
        return opened

    def open_joiner(self) -> Callable[[Sequence[Any]], Any] | None:
        """What makes one output of all those of a record; None where each stands for itself."""
        if self.joiner is None:
            return None
        opened: Callable[[Sequence[Any]], Any] = _imported(self.joiner)(self)
        return opened

    def load(self) -> Runner:
        """Load the weights. Raises ModelError."""
        loaded: Runner = _imported(self.runner)(self)
        return loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationPlan(CheckpointPlan):
    """See mmcli.core.protocols.ClassifierPlan; of checkpoints with a classification head.

    labels      in the order of the logits, all different
    activation  of the logits
    prompts     texts of each label, where the model reads them
    processor   "module:function" that opens what runs in the decode workers; None: what its inputs usually need
    runner      "module:class" of its Runner, made with the plan
    joiner      "module:function": plan -> what makes a Classified of all outputs of a record; None: they are such
    missing     a record may lack some of its media: its processor gets None for them
    """

    labels: tuple[str, ...]
    ranking: Ranking
    activation: Literal["softmax", "sigmoid"] = "softmax"
    prompts: tuple[tuple[str, ...], ...] = ()
    processor: str | None = None
    runner: str = "mmcli.models.classifier_runner:ClassifierRunner"
    joiner: str | None = None
    missing: bool = False

    def describe(self) -> dict[str, Any]:
        """What identifies the scores."""
        described = {**self.describe_model(), "labels": list(self.labels), "activation": self.activation}
        if self.prompts:
            described["prompts"] = blake2b(repr(self.prompts).encode(), digest_size=16).hexdigest()
        return {**described, "ranking": self.ranking.describe()}

    def open_processor(self) -> Processor | RecordProcessor:
        from mmcli.models.inputs import InputProcessor

        if self.processor is None:
            return InputProcessor(self.checkpoint, self.inputs)
        opened: RecordProcessor = _imported(self.processor)(self)
        return opened

    def open_joiner(self) -> Callable[[Sequence[Any]], Any] | None:
        """What makes a Classified of all outputs of a record."""
        if self.joiner is None:
            return None
        opened: Callable[[Sequence[Any]], Any] = _imported(self.joiner)(self)
        return opened

    def load(self) -> Runner:
        """Load the weights. Raises ModelError."""
        loaded: Runner = _imported(self.runner)(self)
        return loaded


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
