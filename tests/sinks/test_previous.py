"""Rows of an earlier output, found by signature."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sink_rows import SCHEMA, D, expected, is_error, read_rows, signature_of, spec, table, write

from mmcli.core.errors import StateMismatch
from mmcli.sinks import parquet, previous
from mmcli.sinks.commit import Staging
from mmcli.sinks.outputs import RunSpec
from mmcli.sinks.place import Place

Target = tuple[str, str]


def vectors(found: pa.Table) -> list[list[float]]:
    return found.column("embedding").to_pylist()  # type: ignore[no-any-return]


def vector(row: int, value: float = 0.0) -> list[float]:
    return [row + value + d / 8 for d in range(D)]


def take(out: str, run: RunSpec, wanted: list[bytes | None], batch: int = 1000) -> list[tuple[int, list[float]]]:
    """(position, vector) of what an --update of `run` finds."""
    pairs: list[tuple[int, list[float]]] = []
    with Staging(out, run.format) as staging:
        staging.open(run, "update")
        earlier = staging.previous(["embedding"])
        if earlier is None:
            return []
        for start in range(0, len(wanted), batch):
            positions, found = earlier.take(wanted[start : start + batch])
            assert (found is None) == (positions == [])
            if found is not None:
                assert found.column("modality").to_pylist() == ["image"] * len(positions)
                pairs += zip([start + p for p in positions], vectors(found), strict=True)
    return pairs


def test_finished_rows_are_found(target: Target) -> None:
    out, format_name = target
    write(out, spec(format_name), [4, 30])
    wanted: list[bytes | None] = [signature_of(row) for row in range(30)]
    wanted[1:1] = [None, b"something new 16", bytes(16)]
    numbers = [0, -1, -1, -1, *range(1, 30)]
    good = [(at, vector(row)) for at, row in enumerate(numbers) if row >= 0 and not is_error(row)]
    assert take(out, spec(format_name, inputs="b"), wanted) == good
    assert read_rows(out, format_name) == expected(30)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000), batch=st.sampled_from([1, 7, 64]), cuts=st.lists(st.integers(1, 99), max_size=4)
)
def test_any_order_with_duplicates(tmp_path: Path, seed: int, batch: int, cuts: list[int]) -> None:
    """The index answers as a dict does, whatever the order, and also for rows that are there twice."""
    out = f"{tmp_path}/{seed}-{batch}.parquet"
    shuffle = random.Random(seed)
    keys = [signature_of(shuffle.randrange(60)) for _ in range(100)]
    run = spec("parquet")
    with Staging(out) as staging:
        staging.open(run, "overwrite")
        for stop in sorted({*cuts, 100}):
            start = staging.next_row
            staging.commit(table(start, stop), start, keys[start:stop])
        staging.finalise(100)
    by_key: dict[bytes | None, list[list[float]]] = {}
    for row, key in enumerate(keys):
        if not is_error(row):
            by_key.setdefault(key, []).append(vector(row))
    wanted: list[bytes | None] = [signature_of(shuffle.randrange(80)) for _ in range(150)]
    found = dict(take(out, spec("parquet", inputs="b"), wanted, batch))
    for position, key in enumerate(wanted):
        assert (position in found) == (key in by_key)
        if position in found:
            assert found[position] in by_key[key]


def test_equal_prefixes_are_told_apart(tmp_path: Path) -> None:
    out = f"{tmp_path}/out.parquet"
    keys = [b"prefix--" + b"%08d" % n for n in range(3)]
    with Staging(out) as staging:
        staging.open(spec("parquet"))
        staging.commit(table(0, 3), 0, keys)
        staging.finalise(3)
    wanted: list[bytes | None] = [keys[2], b"prefix--99999999", keys[0], keys[1]]
    found = take(out, spec("parquet", inputs="b"), wanted, batch=1)
    assert found == [(0, vector(2)), (2, vector(0)), (3, vector(1))]


@pytest.mark.parametrize(
    "first", [b"\x00" * 7 + b"\x01", b"\x7f" + b"\xff" * 7, b"\x80" + b"\x00" * 7, b"\xff" * 8]
)
def test_extreme_prefixes(tmp_path: Path, first: bytes) -> None:
    out = f"{tmp_path}/out.parquet"
    with Staging(out) as staging:
        staging.open(spec("parquet"))
        staging.commit(table(0, 3), 0, [first + b"c" * 8, b"a" * 16, b"b" * 16])
        staging.finalise(3)
    # The last row first: what is before it can only be found by the index.
    found = take(out, spec("parquet", inputs="b"), [b"b" * 16, first + b"c" * 8, b"new" * 5 + b"!"], 1)
    assert found == [(0, vector(2)), (1, vector(0))]


@pytest.mark.parametrize("rereads", [0, 3, 1000])
def test_many_row_groups_and_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rereads: int) -> None:
    """In whatever order, with and without the copy that is made for rows in no order."""
    monkeypatch.setattr(previous, "REREADS", rereads)
    monkeypatch.setattr(parquet, "GROUP_ROWS", 16)
    monkeypatch.setattr(parquet, "GROUP_BYTES", 200)
    monkeypatch.setattr(previous, "INDEX_BUCKET", 37)
    out = f"{tmp_path}/out.parquet"
    random_keys = np.random.default_rng(0).bytes(16 * 300)
    keys = [random_keys[at : at + 16] for at in range(0, len(random_keys), 16)]
    with Staging(out) as staging:
        staging.open(spec("parquet"))
        staging.commit(table(0, 300), 0, keys)
        staging.finalise(300)
    assert pq.read_metadata(out).num_row_groups > 10
    order = random.Random(1).sample(range(300), 300)
    found = take(out, spec("parquet", inputs="b"), [keys[row] for row in order], 50)
    assert found == [(at, vector(row)) for at, row in enumerate(order) if not is_error(row)]


def test_a_sidecar_of_another_run_is_ignored(target: Target) -> None:
    out, format_name = target
    write(out, spec(format_name), [30])
    sidecar = Place.of(out, format_name).signatures
    write(out, spec(format_name, inputs="c"), [30], "overwrite")
    kept = sidecar.read_bytes()
    write(out, spec(format_name), [30], "overwrite")
    sidecar.write_bytes(kept)
    assert take(out, spec(format_name, inputs="b"), [signature_of(0)]) == []
    sidecar.write_bytes(b"torn")
    assert take(out, spec(format_name, inputs="b"), [signature_of(0)]) == []
    sidecar.unlink()
    assert take(out, spec(format_name, inputs="b"), [signature_of(0)]) == []


def test_other_columns_are_not_reused(target: Target) -> None:
    out, format_name = target
    write(out, spec(format_name), [30])
    other = SCHEMA.set(3, pa.field("embedding", pa.list_(pa.float16(), D)))
    assert take(out, spec(format_name, inputs="b", schema=other), [signature_of(0)]) == []


def test_rounded_values_are_not_reused_by_another_format(tmp_path: Path) -> None:
    out = f"{tmp_path}/out/"
    write(out, spec("npy"), [30])
    assert len(take(out, spec("npy", inputs="b"), [signature_of(0)])) == 1
    assert take(out, spec("parquet", inputs="b"), [signature_of(0)]) == []


def test_rows_of_an_interrupted_run_are_reused(target: Target) -> None:
    """Nothing is finished yet, and the inputs have changed."""
    out, format_name = target
    write(out, spec(format_name), [4, 30], finalise=False)
    run = spec(format_name, inputs="b")
    wanted: list[bytes | None] = [signature_of(row) for row in range(30)]
    good = [(row, vector(row)) for row in range(30) if not is_error(row)]
    assert take(out, run, wanted) == good
    # Again, after a run that was killed before it committed anything.
    assert take(out, run, wanted) == good
    with pytest.raises(StateMismatch, match="interrupted --update"):
        write(out, run, [30])
    write(out, run, [40], "update")
    assert read_rows(out, format_name) == expected(40)


def test_of_two_interrupted_runs_the_longer_is_reused(tmp_path: Path) -> None:
    out = f"{tmp_path}/out.parquet"
    write(out, spec("parquet", "a"), [20], finalise=False)
    write(out, spec("parquet", "b"), [10], "update", value=1, finalise=False)
    write(out, spec("parquet", "c"), [5], "update", value=2, finalise=False)
    assert take(out, spec("parquet", "d"), [signature_of(0)]) == [(0, vector(0))]
    write(out, spec("parquet", "d"), [30], "update", value=3, finalise=False)
    assert take(out, spec("parquet", "e"), [signature_of(0)]) == [(0, vector(0, 3))]


def test_a_damaged_previous_output_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    write(str(out), spec("parquet"), [200])
    content = bytearray(out.read_bytes())
    at = content.find(np.float32([100, 100.125]).tobytes())
    content[at] ^= 1
    out.write_bytes(content)
    with pytest.raises(StateMismatch, match=r"out\.parquet is damaged"):
        take(str(out), spec("parquet", inputs="b"), [signature_of(0)])


def test_error_rows_of_an_interrupted_run_are_computed_again(target: Target) -> None:
    """The same inputs: --update reuses what is good, and does not simply go on."""
    out, format_name = target
    write(out, spec(format_name), [20], finalise=False)
    assert take(out, spec(format_name), [signature_of(0), signature_of(3)]) == [(0, vector(0))]
    write(out, spec(format_name), [30], "update", value=1)
    assert read_rows(out, format_name) == expected(30, 1)
