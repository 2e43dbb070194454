"""The two sides of a retrieval: vectors of one file's two columns, or of two files, and which belong together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmcli.core.errors import ConfigError
from mmcli.evaluation.kinds import id_of, missing
from mmcli.evaluation.pairs import Counts, text_of
from mmcli.evaluation.retrieval import Items, number_keys
from mmcli.evaluation.tables import Table, values, vectors


@dataclass(frozen=True, slots=True)
class Side:
    """A column of vectors, and the column whose values say what belongs together; None: each row is its own."""

    table: Table
    column: str
    key: str | None

    @property
    def modality(self) -> str:
        """`image` of `image_embedding`."""
        return self.column.removesuffix("embedding").rstrip("_")


@dataclass(frozen=True, slots=True)
class Sides:
    """answered: bool [keys], whether both sides have a vector."""

    names: tuple[str, str]
    left: Items
    right: Items
    answered: np.ndarray
    counts: Counts


def choose_sides(
    table: Table, other: Table | None, columns: Sequence[str], truth: str | None, ids: tuple[str | None, str | None]
) -> tuple[Side, Side]:
    """`columns`: as --column names them; `truth`: as --truth-column does; `ids`: --id-column, --truth-id-column.

    One table: its two vector columns; what belongs together has the same path, or without one the same id.
    Raises ConfigError with every problem.
    """
    problems = [p for name in columns for p in _no_vector(table, "--column", name)]
    problems += missing(table, "--id-column", ids[0]) if ids[0] else []
    if other is None:
        found = list(columns) or table.vectors()
        if len(found) != 2:
            problems.append(_not_two(table, found))
        if problems:
            raise ConfigError(problems)
        key = ids[0] or ("path" if "path" in table.columns else id_of(table))
        return Side(table, found[0], key), Side(table, found[1], key)
    problems += missing(other, "--truth-id-column", ids[1]) if ids[1] else []
    problems += _no_vector(other, "--truth-column", truth) if truth else []
    here, there = list(columns) or table.vectors(), [truth] if truth else other.vectors()
    for option, one, found in (("--column", table, here), ("--truth-column", other, there)):
        if len(found) != 1:
            which = f"several: {', '.join(found)}; choose with {option}" if found else "none"
            problems.append(f"one column of vectors is needed of {one.name}, and it has {which}")
    keys = ids[0] or id_of(table), ids[1] or _same_key(table, other, ids[0])
    for one, key, option in ((table, keys[0], "--id-column"), (other, keys[1], "--truth-id-column")):
        if key is None:
            problems.append(f"{one.name} has no column of ids; name one with {option}")
    if problems:
        raise ConfigError(problems)
    return Side(table, here[0], keys[0]), Side(other, there[0], keys[1])


def _same_key(table: Table, other: Table, key: str | None) -> str | None:
    key = key or id_of(table)
    return key if key in other.columns else id_of(other)


def _no_vector(table: Table, option: str, name: str) -> list[str]:
    if found := missing(table, option, name):
        return found
    return [] if name in table.vectors() else [f"{option} {name}: that column of {table.name} holds no vectors"]


def _not_two(table: Table, found: Sequence[str]) -> str:
    if len(found) < 2:
        return (
            f"retrieval needs two columns of vectors, as image_embedding and text_embedding, and {table.name} has "
            f"{'only ' + found[0] if found else 'none'}; give the file with the others as --truth"
        )
    return f"retrieval needs two columns of vectors; choose with --column A,B among {', '.join(found)}"


def collect_sides(left: Side, right: Side) -> Sides:
    """Read both sides. Raises ConfigError when nothing belongs together, or vectors do not fit one another."""
    counts = Counts()
    if left.table is right.table:
        found, keys = _read(left.table, [left.column, right.column], left.key)
        both, keys_of = found, [keys, keys]
        counts.rows = len(keys)
    else:
        (one,), left_keys = _read(left.table, [left.column], left.key)
        (two,), right_keys = _read(right.table, [right.column], right.key)
        counts.rows = len(left_keys)
        both, keys_of = _shared([one, two], [left_keys, right_keys], counts)
    if both[0].shape[1] != both[1].shape[1]:
        raise ConfigError(
            f"vectors of {left.column} have {both[0].shape[1]} numbers, of {right.column} {both[1].shape[1]}: they "
            "are of different models"
        )
    numbers, size = number_keys(keys_of)
    if not size:
        raise ConfigError(_nothing(left, right, counts))
    sides = [Items.of(v, k) for v, k in zip(both, numbers, strict=True)]
    answered = np.ones(size, bool)
    for side in sides:
        answered[side.missing] = False
    counts.evaluated, counts.answered = size, int(answered.sum())
    counts.errors = counts.evaluated - counts.answered
    names = (left.modality, right.modality)
    if not all(names) or names[0] == names[1]:
        names = ("predictions", "truth") if left.table is not right.table else (left.column, right.column)
    return Sides(names, sides[0], sides[1], answered, counts)


def _read(table: Table, columns: Sequence[str], key: str | None) -> tuple[list[np.ndarray], list[str]]:
    """float32 [rows, D] of each column, and the key of each row."""
    blocks: list[list[np.ndarray]] = [[] for _ in columns]
    keys: list[str] = []
    # Where a row has no path (its media are in the manifest), its id tells.
    second = id_of(table) if key == "path" else None
    wanted = [*columns, *dict.fromkeys(c for c in (key, second) if c is not None)]
    for batch in table.read(wanted):
        for block, name in zip(blocks, columns, strict=True):
            block.append(vectors(batch[name], name))
        keys += _keys(batch, key, second, len(keys), len(blocks[0][-1]))
    return [_stack(block, name) for block, name in zip(blocks, columns, strict=True)], keys


def _keys(batch: dict[str, Any], key: str | None, second: str | None, start: int, rows: int) -> Iterator[str]:
    names = values(batch[key]) if key else [None] * rows
    others = values(batch[second]) if second else [None] * rows
    for row, (name, other) in enumerate(zip(names, others, strict=True), start):
        found = name if name is not None else other
        yield f"row {row}" if found is None else text_of(found)


def _stack(blocks: list[np.ndarray], name: str) -> np.ndarray:
    sizes = {block.shape[1] for block in blocks if block.shape[1]}
    if len(sizes) > 1:
        raise ConfigError(
            f"the vectors of column {name} have several lengths: {', '.join(map(str, sorted(sizes)))}"
        )
    size = sizes.pop() if sizes else 0
    # A batch of error rows in JSONL has no vector to tell the length.
    filled = [b if b.shape[1] == size else np.full((len(b), size), np.nan, np.float32) for b in blocks]
    return np.concatenate(filled) if filled else np.zeros((0, 0), np.float32)


def _shared(
    sides: list[np.ndarray], keys: list[list[str]], counts: Counts
) -> tuple[list[np.ndarray], list[list[str]]]:
    """The rows whose key both sides have; the others are counted."""
    common = set(keys[0]) & set(keys[1])
    counts.without_truth = sum(key not in common for key in keys[0])
    counts.unused_truth = sum(key not in common for key in keys[1])
    kept = [[i for i, key in enumerate(side) if key in common] for side in keys]
    return (
        [vectors[rows] for vectors, rows in zip(sides, kept, strict=True)],
        [[side[i] for i in rows] for side, rows in zip(keys, kept, strict=True)],
    )


def _nothing(left: Side, right: Side, counts: Counts) -> str:
    if left.table is right.table or not counts.rows:
        return f"{left.table.name} has no rows"
    return (
        f"no value of {left.key} in {left.table.name} is a {right.key} of {right.table.name}; choose other columns "
        "with --id-column and --truth-id-column"
    )
