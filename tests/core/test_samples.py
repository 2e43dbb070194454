"""Samples as columns are the samples themselves, however they are cut, joined, ordered and padded."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcli.core.records import Sample
from mmcli.core.samples import Packed, Samples
from mmcli.models.runner import Collator, stack


def text(length: int, number: int, mask: int = 1) -> Sample:
    arrays = {"input_ids": np.arange(number, number + length), "attention_mask": np.full(length, mask, np.int8)}
    return Sample("text", arrays, length=length)


def picture(number: int) -> Sample:
    pixels = np.arange(number, number + 24, dtype=np.uint8).reshape(2, 3, 4)
    return Sample("image", {"pixel_values": pixels}, cost=3)


def number(value: int) -> Sample:
    return Sample("text", {"score": np.array(value / 4, np.float32)})


KINDS = {
    "texts": st.builds(text, st.integers(0, 6), st.integers(0, 50)),
    "masked texts": st.builds(text, st.integers(1, 3), st.integers(0, 5), st.integers(0, 1)),
    "equal texts": st.builds(text, st.just(4), st.integers(0, 50)),
    "one number": st.builds(text, st.just(1), st.integers(0, 2)),
    "pictures": st.builds(picture, st.integers(0, 200)),
    "numbers": st.builds(number, st.integers(0, 9)),
}
GROUPS = st.sampled_from(sorted(KINDS)).flatmap(lambda kind: st.lists(KINDS[kind], min_size=1, max_size=12))


def same(found: Sample, wanted: Sample) -> None:
    for name in ("modality", "length", "group", "cost"):
        assert getattr(found, name) == getattr(wanted, name)
    assert type(found.length) is int
    assert list(found.arrays) == list(wanted.arrays)
    for name, array in wanted.arrays.items():
        assert (found.arrays[name].dtype, found.arrays[name].shape) == (array.dtype, array.shape)
        assert found.arrays[name].tobytes() == array.tobytes()


def columns(samples: Sequence[Sample], cuts: set[int]) -> Samples:
    """Of blocks that end at `cuts`, as they come from workers."""
    ends = [*sorted(cut for cut in cuts if 0 < cut < len(samples)), len(samples)]
    blocks, start = [], 0
    for end in ends:
        block = Samples.of(samples[start:end])
        assert block is not None
        blocks.append(pickle.loads(pickle.dumps(block)))
        start = end
    joined = Samples.join(blocks)
    assert joined is not None
    return joined


@given(samples=GROUPS, cuts=st.sets(st.integers(1, 11)), data=st.data())
def test_columns_hold_the_samples(samples: list[Sample], cuts: set[int], data: st.DataObject) -> None:
    joined = columns(samples, cuts)
    order = np.array(data.draw(st.permutations(range(len(samples)))))
    start = data.draw(st.integers(0, len(samples) - 1))
    for found, wanted in (
        (joined, samples),
        (joined.take(order), [samples[i] for i in order]),
        (joined.take(order)[start:], [samples[i] for i in order[start:]]),
    ):
        assert len(found) == len(wanted)
        for one, by_number, other in zip(found, range(len(found)), wanted, strict=True):
            same(one, other)
            same(found[by_number], other)
        assert found.sizes.tolist() == [sum(a.nbytes for a in s.arrays.values()) for s in wanted]
        for name, column in found.columns.items():
            arrays = [s.arrays[name] for s in wanted]
            padded = np.full(column.padded_shape, 77, arrays[0].dtype)
            column.pad_into(padded, 5)
            assert np.array_equal(padded, stack(arrays, 5, pinned=False).numpy())


@given(samples=GROUPS, cuts=st.sets(st.integers(1, 11)))
def test_longest_first_as_a_list_is_sorted(samples: list[Sample], cuts: set[int]) -> None:
    order = columns(samples, cuts).longest_first().tolist()
    assert order == sorted(range(len(samples)), key=lambda i: -samples[i].length)


def test_what_is_written_to_a_batch_does_not_reach_the_samples() -> None:
    """The model may change its inputs in place; the samples are tried again when memory runs out."""
    samples = columns([text(3, 1), text(3, 9)], set())
    column = samples.columns["input_ids"]
    padded = np.empty(column.padded_shape, np.int64)
    column.pad_into(padded, 0)
    padded[:] = -1
    assert samples[1].arrays["input_ids"].tolist() == [9, 10, 11]


@pytest.mark.parametrize(
    "others",
    [
        [picture(0)],
        [Sample("text", {"input_ids": np.arange(3)}, length=3)],
        [Sample("text", {**text(2, 0).arrays, "input_ids": np.arange(2, dtype=np.int32)}, length=2)],
        [Sample("text", text(2, 0).arrays, length=2, group="x")],
        [Sample("text", text(2, 0).arrays, length=2, cost=2)],
    ],
    ids=["modality", "names", "dtype", "group", "cost"],
)
def test_samples_of_another_kind_stay_apart(others: list[Sample]) -> None:
    assert Samples.of([text(2, 5), *others]) is None
    alone, other = Samples.of([text(2, 5)]), Samples.of(others)
    assert alone is not None
    assert other is not None
    assert Samples.join([alone, other]) is None


def test_signs_of_zero_are_kept() -> None:
    zeros = [Sample("text", {"x": np.array(values)}) for values in ([0.0], [-0.0, 0.0])]
    for found, wanted in zip(columns(zeros, set()), zeros, strict=True):
        same(found, wanted)


def test_packed_outcomes_are_those_of_records_with_one_sample() -> None:
    samples = [text(2, 5), text(4, 7), text(1, 0)]
    packed = Packed(columns(samples, {1}))
    assert len(packed) == 3
    for outcomes in (list(packed), [packed[i] for i in range(3)], [*packed[:2], *packed[2:]]):
        for (found,), wanted in zip(outcomes, samples, strict=True):
            same(found, wanted)


def test_a_mask_of_bytes_is_one_of_integers_for_the_model() -> None:
    """As models know it; until then it is an eighth of that."""
    import torch

    collator = Collator.__new__(Collator)
    collator.device, collator._dtype, collator._normalize = torch.device("cpu"), torch.bfloat16, None
    collator._fill, collator._moved_s = {}, 0.0
    moved = collator.to_device(collator.collate([text(2, 5), text(3, 1)]))
    assert moved["attention_mask"].dtype == torch.int64
    assert moved["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_a_collator_makes_the_same_batch_of_both() -> None:
    import torch

    collator = Collator.__new__(Collator)
    collator.device, collator._fill = torch.device("cpu"), {"input_ids": 9}
    samples = [text(2, 5), text(4, 7), text(1, 0)]
    one, other = collator.collate(samples), collator.collate(columns(samples, {2}))
    assert one.modality == other.modality
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(other.tensors[name], tensor)
        assert other.tensors[name].dtype == tensor.dtype
