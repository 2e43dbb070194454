"""What the command line says about the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Generation:
    """How texts are generated.

    prompt          what the text goes on from, or a Florence-2 task; None: the model's own beginning
    max_new_tokens  a text is cut there
    num_beams       1: greedy, or sampling
    temperature     0: the likeliest token each time; else tokens are drawn from softmax(logits / temperature)
    seed            of the draws; a row's draws depend on it and on the row's own input alone
    """

    prompt: str | None = None
    max_new_tokens: int = 50
    num_beams: int = 1
    temperature: float = 0.0
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """As JSON values, for the fingerprint."""
        return {**asdict(self), "do_sample": self.temperature > 0}


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Unresolved options of one model.

    model                hub id, local directory, or `fake:...` (see mmcli.models.fake)
    revision             branch, tag or commit on the hub
    device, dtype        "auto" or a name
    pooling              how an encoder's tokens become one vector; None: as the checkpoint says
    normalize            unit vectors; None: as the checkpoint or its family does
    frames               frames per clip where the model leaves it open
    attn_implementation  transformers' name; None: its default
    compile              torch.compile the model
    offline              never ask the hub
    trust_remote_code    run Python code that comes with the checkpoint
    allow_pickle         load weights that are not safetensors
    exact_decode         decode large JPEGs at full size
    """

    model: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    pooling: str | None = None
    normalize: bool | None = None
    frames: int = 8
    attn_implementation: str | None = None
    compile: bool = False
    offline: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    exact_decode: bool = False
