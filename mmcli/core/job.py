"""The Job: everything that can change an output byte, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Job:
    """What a run computes, as readable JSON values. Batch size, workers, device and logging are not in it.

    task     name of the task, e.g. "embed"
    model    id, revision or weight hash, processor hash, family, dtype, ...
    options  the task's own options (normalize, pooling, frames, ...) and the columns
    inputs   digest, row count and description of the input snapshot
    """

    task: str
    model: dict[str, Any]
    options: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The Job as JSON values."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        """Hex digest (blake2b, 128 bits) of the Job in canonical JSON."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    def without_inputs(self) -> Job:
        """The Job over any inputs: what --update compares, since new inputs are its purpose."""
        return Job(self.task, self.model, self.options)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Field by field, where two Jobs (as from `to_dict`) differ: `model.dtype: was float32, is float16`."""
    was, is_ = dict(_flat(before)), dict(_flat(now))
    lines = []
    for key in sorted(was.keys() | is_.keys()):
        if was.get(key) != is_.get(key):
            lines.append(f"{key}: was {_show(was.get(key))}, is {_show(is_.get(key))}")
    return lines


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _show(value: Any) -> str:
    return "not set" if value in (None, "") else str(value)
