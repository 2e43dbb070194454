from __future__ import annotations

import pickle

import numpy as np
import pytest

from mmcli.core.errors import RowError
from mmcli.core.records import Sample
from mmcli.core.samples import Packed
from mmcli.media.packing import Outcomes, pack


def tokens(length: int, **more: object) -> tuple[Sample]:
    arrays = {"input_ids": np.arange(length), "attention_mask": np.ones(length, np.int8)}
    return (Sample("text", arrays, length=length, group="x", **more),)  # type: ignore[arg-type]


def picture(*shape: int) -> tuple[Sample]:
    return (Sample("image", {"pixel_values": np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)}, cost=2),)


def same(found: Outcomes, wanted: Outcomes) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert len(one) == len(other)
        for sample, model in zip(one, other, strict=True):
            if isinstance(model, RowError):
                assert (sample.code, sample.message) == (model.code, model.message)  # type: ignore[union-attr]
                continue
            assert isinstance(sample, Sample)
            for name in ("modality", "length", "group", "cost"):
                assert getattr(sample, name) == getattr(model, name)
            assert list(sample.arrays) == list(model.arrays)
            for name, array in model.arrays.items():
                assert isinstance(sample.arrays[name], np.ndarray)
                assert sample.arrays[name].dtype == array.dtype
                assert sample.arrays[name].shape == array.shape
                assert sample.arrays[name].tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "outcomes",
    [
        [tokens(n) for n in (3, 1, 0, 7)],
        [tokens(4)] * 3,
        [tokens(0), tokens(0)],
        [picture(3, 4, 5), picture(3, 4, 5)],
        [(Sample("text", {"score": np.array(n, np.float32)}),) for n in range(3)],
        [(Sample("text", {"types": np.zeros(n, int), "mask": np.ones(m, int)}),) for n, m in ((2, 3), (4, 1))],
        [(Sample("text", {"signs": np.array(signs)}),) for signs in ([0.0], [-0.0, 0.0])],
    ],
    ids=["lengths", "equal", "empty", "pictures", "numbers", "one value", "zeros"],
)
def test_what_is_packed_comes_out_as_it_was(outcomes: Outcomes) -> None:
    packed = pack(outcomes)
    assert isinstance(packed, Packed)
    same(pickle.loads(pickle.dumps(packed)), outcomes)


@pytest.mark.parametrize(
    "outcomes",
    [
        [],
        [tokens(3)],
        [tokens(3), (RowError("corrupt", "broken"),)],
        [tokens(3), (*tokens(2), *tokens(4))],
        [tokens(3), picture(2)],
        [picture(3, 4), (Sample("image", {"pixel_values": np.zeros((3, 4), np.float32)}),)],
        [picture(3, 64, 64), picture(3, 64, 64)],
        [picture(3, 4, 5), picture(3, 2, 5)],
        [(Sample("text", {"mask": np.ones(shape, int)}),) for shape in (2, (2, 2))],
    ],
    ids=["none", "one", "error", "several", "modalities", "dtypes", "large", "sizes", "dimensions"],
)
def test_what_is_not_alike_stays_as_it_is(outcomes: Outcomes) -> None:
    assert pack(outcomes) is outcomes
