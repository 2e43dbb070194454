"""What the command line says about the model."""

from __future__ import annotations

from dataclasses import dataclass


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
