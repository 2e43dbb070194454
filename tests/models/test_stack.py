"""Samples as one tensor: each in its place, whatever their shapes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcli.models.runner import stack


def arrays_of(dimensions: int) -> st.SearchStrategy[list[tuple[int, ...]]]:
    return st.lists(st.tuples(*[st.integers(0, 4)] * dimensions), min_size=1, max_size=5)


@given(shapes=st.integers(0, 3).flatmap(arrays_of), left=st.booleans(), fill=st.integers(-2, 2))
def test_every_array_lies_in_its_row_and_the_rest_is_filled(
    shapes: list[tuple[int, ...]], left: bool, fill: int
) -> None:
    arrays = [np.arange(7 * i, 7 * i + np.prod(shape, dtype=int)).reshape(shape) for i, shape in enumerate(shapes)]
    found = stack(arrays, fill, pinned=False, left=left)
    largest = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    assert tuple(found.shape) == (len(arrays), *largest)
    for row, array in zip(found.numpy(), arrays, strict=True):
        wanted = np.full(largest, fill)
        if array.ndim:
            start = largest[0] - len(array) if left else 0
            wanted[(slice(start, start + len(array)), *(slice(size) for size in array.shape[1:]))] = array
        else:
            wanted[...] = array
        assert np.array_equal(row, wanted)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64, np.bool_])
def test_it_keeps_the_type(dtype: type) -> None:
    assert stack([np.ones(2, dtype), np.ones(3, dtype)], 0, pinned=False).numpy().dtype == dtype
