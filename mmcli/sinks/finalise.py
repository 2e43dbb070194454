"""From committed parts to the output under its name: prepare everything, note the moves, make them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmcli.core.durable import fsync_file, fsync_folder, make_folder, remove, write_json
from mmcli.core.errors import MmcliError
from mmcli.sinks.ahead import Ahead
from mmcli.sinks.formats import load_format
from mmcli.sinks.outputs import SWAP_FILE, RunSpec, encode_schema, read_swap
from mmcli.sinks.parquet import ParquetFormat, parquet_writer
from mmcli.sinks.parts import FINGERPRINT_KEY, JOB_KEY, SIGNATURES, Part, part_name, part_signatures, total_errors
from mmcli.sinks.place import Place

FINAL_FOLDER = "final"


Moves = list[tuple[Path, Path]]


def finalise(
    place: Place,
    spec: RunSpec,
    parts: Sequence[Part],
    notes: list[str],
    old_files: list[str],
    ahead: Ahead | None = None,
) -> None:
    """Write the finished output beside its parts, then move it to its name.

    old_files  what a finished folder that is replaced consists of
    ahead      what is written already

    Needs the space of the parts once more, save for a folder of Parquet. Raises OSError, StateMismatch for a
    damaged part, MmcliError when the format did not write every row; then the parts are as they were.
    """
    final = place.staging / FINAL_FOLDER
    remove(final)
    final.mkdir()
    metadata = {
        **spec.stored_metadata(),
        "format": spec.format,
        "rows": sum(part.stop - part.start for part in parts),
        "errors": dict(sorted(total_errors(parts).items())),
        "notes": notes,
        "complete": True,
    }
    try:
        moves = _prepare(place, spec, parts, metadata, ahead)
        _sync(final)
    except BaseException:
        shutil.rmtree(final, ignore_errors=True)
        raise
    targets = {target for _, target in moves}
    old = [place.metadata, *(place.root / name for name in old_files)]
    if place.folder:
        old += sorted(place.out.glob("part-*.parquet"))
    write_json(
        place.staging / SWAP_FILE,
        {
            "delete": [os.path.relpath(path, place.root) for path in old if path not in targets],
            "moves": [[os.path.relpath(a, place.staging), os.path.relpath(b, place.root)] for a, b in moves],
            "metadata": {**metadata, "arrow_schema": encode_schema(spec.schema)},
        },
    )
    apply_swap(place)


def _prepare(
    place: Place, spec: RunSpec, parts: Sequence[Part], metadata: dict[str, Any], ahead: Ahead | None
) -> Moves:
    """Write everything that belongs to the output; returns (where it is, where it goes).

    Last comes what makes the output a finished one: a folder's _SUCCESS.json, else the file itself.
    """
    final = place.staging / FINAL_FOLDER
    signatures = final / place.signatures.name
    _write_signatures(parts, metadata["fingerprint"], signatures)
    product = _write_product(place, spec, parts, metadata, ahead)
    moves = [(signatures, place.signatures), *product]
    described = {**metadata, "arrow_schema": encode_schema(spec.schema)}
    if place.folder:
        described["files"] = [os.path.relpath(target, place.root) for _, target in product]
        moves.append((final / place.metadata.name, place.metadata))
    elif not isinstance(load_format(spec.format), ParquetFormat):
        described["bytes"] = product[0][0].stat().st_size
        moves.insert(0, (final / place.metadata.name, place.metadata))
    else:
        return moves
    write_json(final / place.metadata.name, described)
    return moves


def _write_product(
    place: Place, spec: RunSpec, parts: Sequence[Part], metadata: dict[str, Any], ahead: Ahead | None
) -> Moves:
    """The output's own files."""
    made = load_format(spec.format)
    if place.folder and isinstance(made, ParquetFormat):
        return [(part.path, place.out / part_name(n)) for n, part in enumerate(parts)]
    target = place.staging / FINAL_FOLDER / f"out-{place.out.name}"
    paths, schema = [part.path for part in parts], spec.schema.with_metadata(_keys(metadata))
    rows = None if ahead is None else ahead.take(paths, schema, target)
    if rows is None:
        rows = made.write(paths, schema, target)
    if rows != metadata["rows"]:
        raise MmcliError(f"internal error: {rows} of {metadata['rows']} rows were written as {spec.format}")
    if not place.folder:
        return [(target, place.out)]
    return [(path, place.out / path.relative_to(target)) for path in sorted(target.rglob("*")) if path.is_file()]


def _keys(metadata: dict[str, Any]) -> dict[bytes, str]:
    return {JOB_KEY: json.dumps(metadata), FINGERPRINT_KEY: metadata["fingerprint"]}


def _write_signatures(parts: Sequence[Part], fingerprint: str, target: Path) -> None:
    schema = SIGNATURES.with_metadata({FINGERPRINT_KEY: fingerprint})
    with parquet_writer(target, schema) as writer:
        for part in parts:
            for batch in part_signatures(part).to_batches():
                writer.write(pa.record_batch(batch.columns, schema=schema))


def _sync(folder: Path) -> None:
    """Make everything in a folder durable."""
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync_folder(path)
        else:
            fsync_file(path)
    fsync_folder(folder)


def apply_swap(place: Place) -> bool:
    """Make the moves that `finalise` has noted, or the rest of them, and remove the staging folder.

    Returns whether there were any. Interrupted at any point, doing it again gives the same end. Raises OSError,
    StateMismatch when the list was damaged.
    """
    swap = read_swap(place)
    if swap is None:
        return False
    moves = [(place.staging / a, place.root / b) for a, b in swap["moves"]]
    last_source, last_target = moves[-1]
    if last_source.exists():
        if place.folder:
            # While files change, the folder does not claim to be complete.
            remove(last_target)
            fsync_folder(place.root)
        for name in swap["delete"]:
            remove(place.root / name)
            if place.folder and "/" in name:
                with suppress(OSError):
                    (place.root / name).parent.rmdir()
        for source, target in moves[:-1]:
            if source.exists():
                _move(source, target, place)
        fsync_folder(place.root)
        _move(last_source, last_target, place)
    fsync_folder(place.root)
    discard_staging(place)
    return True


def _move(source: Path, target: Path, place: Place) -> None:
    if target.parent != place.root:
        make_folder(target.parent)
    if target.is_dir() and not target.is_symlink():
        # Only --overwrite of something that is not ours comes here.
        shutil.rmtree(target)
    os.replace(source, target)
    if target.parent != place.root:
        fsync_folder(target.parent)


def discard_staging(place: Place) -> None:
    """Remove the staging folder, at once: it is renamed before its files are deleted.

    Else a run that waits for the lock could start in a folder that is still being emptied.
    """
    trash = place.staging.with_name(f".{place.staging.name}.{os.getpid()}.trash")
    remove(trash)
    with suppress(FileNotFoundError):
        os.rename(place.staging, trash)
        fsync_folder(trash.parent)
    for leftover in trash.parent.glob(f".{escape(place.staging.name)}.*.trash"):
        shutil.rmtree(leftover, ignore_errors=True)
