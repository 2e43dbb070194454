"""Which of a run's processes this one is, as torchrun and `accelerate launch` say it in variables."""

from __future__ import annotations

from collections.abc import Mapping


def launched(environment: Mapping[str, str]) -> tuple[int, int]:
    """(rank, number of processes); (0, 1) for a process on its own."""
    if "RANK" not in environment or "LOCAL_RANK" not in environment:
        return 0, 1
    return int(environment["RANK"]), int(environment.get("WORLD_SIZE", "1"))
