"""What the tests of the metrics share."""

from __future__ import annotations

from collections.abc import Sequence

from mmcli.evaluation.bootstrap import Resampling, Score

NO_INTERVALS = Resampling(replicates=0)


def by_name(scores: Sequence[Score]) -> dict[str, float | None]:
    return {one.name: one.value for one in scores}


def of_answered(scores: Sequence[Score]) -> dict[str, float | None]:
    return {one.name: one.answered for one in scores}
