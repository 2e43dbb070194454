"""Plans whose processors misbehave on demand; imported by the decode workers too."""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass, field

import numpy as np

from mmcli.core.records import DecodeOptions, Sample


@dataclass(frozen=True)
class Misbehaving:
    """Texts tell the processor what to do: `abort`, `segfault`, `sleep`, `exit`, `raise`, `memory`, or a size."""

    modalities: frozenset[str] = frozenset({"text"})
    embedding_size: int = 2
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    broken: bool = False
    crash_once_file: str | None = None

    def open_processor(self):
        if self.broken:
            raise OSError("no tokenizer in this directory")
        return self.process

    def process(self, modality, text):
        match text.split(":")[0]:
            case "abort":
                os.abort()
            case "segfault":
                ctypes.string_at(0)
            case "sleep":
                time.sleep(3600)
            case "exit":
                os._exit(7)
            case "raise":
                raise ZeroDivisionError("boom\nsecond line")
            case "memory":
                raise MemoryError
            case "print":
                print("a library that prints")
            case "once":
                if not os.path.exists(self.crash_once_file):
                    open(self.crash_once_file, "w").close()
                    os.abort()
        size = int(text.split(":")[1]) if ":" in text else 1
        return Sample(modality, {"x": np.full(size, len(text), dtype=np.uint8)}, length=size)
