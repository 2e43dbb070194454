"""--retry-errors: only when nothing but the failed inputs has changed since."""

from __future__ import annotations

from mmcli.core.errors import StateMismatch
from mmcli.core.protocols import Source
from mmcli.core.signature import signature
from mmcli.sinks.outputs import RunSpec, without_inputs
from mmcli.sinks.place import Place
from mmcli.sinks.rows import KnownRows, known_rows


def check_inputs(place: Place, spec: RunSpec, source: Source) -> None:
    """Raise StateMismatch when an input other than those that failed is new, changed or gone.

    Nothing to check: no earlier rows, equal inputs, or another command, which Staging refuses with the details.
    Otherwise 200,000 rows/s: the order of inputs is fixed, so that row N of then must be row N of now.
    """
    known = known_rows(place)
    if known is None or known.job["inputs"] == spec.job.inputs:
        return
    if without_inputs(known.job) != spec.job.without_inputs().to_dict():
        return
    problem = _first_difference(known, source)
    if problem is not None:
        hint = "replace --retry-errors by --update, which computes new, changed and failed inputs"
        raise StateMismatch(f"the inputs are not those of {place.out}: {problem}", hint=hint)


def _first_difference(known: KnownRows, source: Source) -> str | None:
    records = source.records()
    for name, ok, was in known:
        record = next(records, None)
        if record is None:
            return f"{name} is gone"
        if record.id != name:
            return f"{name} is gone, or {record.id} is new"
        if ok and (was is None or signature(record) != was):
            return f"{name} has changed"
    more = next(records, None)
    return f"{more.id} is new" if more is not None and known.complete else None
