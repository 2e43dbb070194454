"""What is known about a checkpoint before its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from mmcli.core.protocols import Processor, Runner
from mmcli.core.records import DecodeOptions, Modality
from mmcli.models.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class TextSpec:
    """How texts become input_ids.

    max_length  longer texts are cut there, as the checkpoint's processor does
    padding     "longest": to the longest of a batch; "max_length": always to max_length (SigLIP was trained so)
    prefix      put before every text (a sentence-transformers prompt)
    lower_case  texts are lower-cased first (an option of sentence-transformers)
    """

    max_length: int | None
    padding: Literal["longest", "max_length"] = "longest"
    prefix: str = ""
    lower_case: bool = False


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


@dataclass(frozen=True, slots=True)
class EmbeddingPlan:
    """See mmcli.core.protocols.ModelPlan.

    loader     "module:function" that loads the towers: (plan, device) -> mmcli.models.runner.Towers
    detail     what the family needs to know beside (its table's row)
    normalize  divide vectors by their L2 norm
    """

    checkpoint: Checkpoint
    family: str
    loader: str
    detail: Any
    inputs: Inputs
    embedding_size: int
    decode: DecodeOptions
    pooling: str | None
    normalize: bool
    dtype: str
    device: str
    attn_implementation: str | None
    compile: bool

    @property
    def modalities(self) -> frozenset[Modality]:
        return self.inputs.modalities

    def describe(self) -> dict[str, Any]:
        """What identifies the vectors: the checkpoint, and every setting that changes them."""
        return {
            **self.checkpoint.describe(),
            "family": self.family,
            "dtype": self.dtype,
            "pooling": self.pooling,
            "normalized": self.normalize,
            "frames": self.inputs.video.num_frames if self.inputs.video else None,
            "attn_implementation": self.attn_implementation,
            "compile": self.compile,
        }

    def open_processor(self) -> Processor:
        from mmcli.models.inputs import InputProcessor

        return InputProcessor(self.checkpoint, self.inputs)

    def load(self) -> Runner:
        """Load the weights. Raises ModelError."""
        from mmcli.models.runner import TorchRunner

        module, _, function = self.loader.partition(":")
        return TorchRunner(self, getattr(import_module(module), function))
