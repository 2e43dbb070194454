"""A plan whose processor hands the decoded medium back; imported by the decode workers too."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mmcli.core.records import MODALITIES, DecodeOptions, Sample


@dataclass(frozen=True)
class Echo:
    modalities: frozenset[str] = frozenset(MODALITIES)
    embedding_size: int = 2
    decode: DecodeOptions = field(default_factory=DecodeOptions)

    def open_processor(self):
        return self.process

    def process(self, modality, payload):
        if modality == "text":
            payload = np.frombuffer(payload.encode(), np.uint8)
        elif modality == "audio":
            payload = payload.waveform
        elif modality == "video":
            payload = payload.frames
        return Sample(modality, {"payload": payload})
