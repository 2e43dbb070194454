"""clip-retrieval's layout: arrays of vectors, and their metadata beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmcli.core.errors import ConfigError, OutputError
from mmcli.sinks.parquet import READ_ROWS, GroupWriter, batches, is_vector, open_parquet, parquet_writer

SHARD_ROWS = 1_000_000
ROW_COLUMN = "input_row"
# Modality -> folder of its arrays, as clip-retrieval names them; vectors of several modalities are in "emb".
FOLDERS = {"image": "img_emb", "text": "text_emb", "audio": "audio_emb", "video": "video_emb"}
MIXED_FOLDER = "emb"
_ERROR_COLUMNS = ("status", "error_code", "error_stage", "error_message")


@dataclass(frozen=True, slots=True)
class NpyFormat:
    """A folder that clip-retrieval, autofaiss and embedding-reader open.

        img_emb/img_emb_0.npy        float16 [n, D]; text_emb, audio_emb, video_emb likewise
        metadata/metadata_0.parquet  n rows: row i of it and of every array belong to the same input
        errors/errors_0.parquet      the inputs without vectors: error rows are in no array
        _SUCCESS.json                the job, counts, and the list of these files

    No row is lost: n, and the rows of errors, add up to the inputs, and `input_row` in both is the row's place
    among them. Arrays hold at most 1,000,000 rows each (img_emb_0, img_emb_1, ...), numbered with leading
    zeros from ten on, so that their names sort. A single `embedding` column goes to the folder of its modality
    when all rows have the same one, else to `emb/`: `modality` in the metadata then tells them apart, and rows
    stay aligned. `image_path` is a copy of `path`, by which clip-retrieval shows pictures.
    """

    name: str = "npy"
    suffixes: tuple[str, ...] = ()
    lossless: bool = False

    def check(self, schema: pa.Schema) -> None:
        """Raise ConfigError for columns that the layout cannot hold."""
        if not any(is_vector(f.type) for f in schema):
            raise ConfigError("--format npy holds vectors, and this task has none; choose parquet or jsonl")
        if ROW_COLUMN in schema.names:
            raise ConfigError(f"--format npy has a column {ROW_COLUMN} of its own; --keep cannot have one, too")

    def write(self, parts: Sequence[Path], schema: pa.Schema, target: Path) -> int:
        """Stream the parts into the new folder `target`; returns the rows, error rows included.

        Raises OutputError for values beyond float16.
        """
        good, modalities = _count(parts)
        layout = _Layout.of(schema, modalities)
        for name in ("metadata", "errors", *layout.folders.values()):
            (target / name).mkdir(parents=True, exist_ok=True)
        done = row = 0
        shard: _Shard | None = None
        with ExitStack() as stack, parquet_writer(target / "errors" / "errors_0.parquet", layout.errors) as errors:
            for batch in batches(parts):
                numbered = batch.append_column(ROW_COLUMN, pa.array(np.arange(row, row + batch.num_rows)))
                row += batch.num_rows
                ok = pc.equal(batch.column("status"), "ok")
                failed = numbered.filter(pc.invert(ok))
                errors.write(pa.record_batch([failed.column(n) for n in layout.errors.names], schema=layout.errors))
                rest = numbered.filter(ok)
                while rest.num_rows:
                    if shard is None or not shard.room:
                        stack.close()
                        shard = stack.enter_context(_open_shard(target, layout, done, good))
                    piece = rest.slice(0, shard.room)
                    shard.write(piece)
                    done += piece.num_rows
                    rest = rest.slice(piece.num_rows)
            if not good:
                stack.enter_context(_open_shard(target, layout, 0, 0))
        return row

    def read(self, out: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The columns of `schema` in row order; error rows are null."""
        row = total = 0
        for shard in sorted((out / "metadata").glob("metadata_*.parquet")):
            number = shard.stem.partition("_")[2]
            vectors = [f.name for f in schema if is_vector(f.type)]
            scalars = [f.name for f in schema if not is_vector(f.type)]
            arrays = {name: np.load(_array_file(out, name, number), mmap_mode="r") for name in vectors}
            at = 0
            with open_parquet(shard) as file:
                for batch in file.iter_batches(READ_ROWS, columns=[*scalars, ROW_COLUMN]):
                    rows = batch.column(ROW_COLUMN).to_numpy()
                    stop = at + len(rows)
                    columns = {name: batch.column(name) for name in scalars}
                    for name in vectors:
                        columns[name] = _vector_column(arrays[name][at:stop], schema.field(name).type)
                    yield _spread([columns[f.name] for f in schema], rows, row, schema)
                    row, at = int(rows[-1]) + 1, stop
            total += at
        total += sum(pq.read_metadata(path).num_rows for path in (out / "errors").glob("*.parquet"))
        if total > row:
            yield pa.record_batch([pa.nulls(total - row, f.type) for f in schema], schema=schema)


@dataclass(frozen=True, slots=True)
class _Layout:
    """folders, sizes: array folder and D by vector column; metadata, errors: schemas of their tables."""

    folders: dict[str, str]
    sizes: dict[str, int]
    metadata: pa.Schema
    errors: pa.Schema

    @classmethod
    def of(cls, schema: pa.Schema, modalities: set[str]) -> _Layout:
        vectors = [f.name for f in schema if is_vector(f.type)]
        folders = {name: _folder(name, modalities) for name in vectors}
        number = pa.field(ROW_COLUMN, pa.int64())
        plain = [f for f in schema if f.name not in vectors]
        described = [f for f in plain if f.name not in _ERROR_COLUMNS]
        if FOLDERS["image"] in folders.values() and "path" in schema.names and "image_path" not in schema.names:
            described.append(pa.field("image_path", pa.string()))
        sizes = {name: schema.field(name).type.list_size for name in vectors}
        return cls(folders, sizes, pa.schema([*described, number]), pa.schema([*plain, number]))


def _folder(column: str, modalities: set[str]) -> str:
    slot = column.removesuffix("_embedding")
    if slot in FOLDERS:
        return FOLDERS[slot]
    if slot != "embedding":
        return f"{slot}_emb"
    if len(modalities) > 1:
        return MIXED_FOLDER
    return FOLDERS.get(next(iter(modalities), "image"), MIXED_FOLDER)


def _count(parts: Sequence[Path]) -> tuple[int, set[str]]:
    """How many rows are good, and of which modalities they are."""
    good = 0
    modalities: set[str] = set()
    for batch in batches(parts, ["status", "modality"]):
        ok = batch.filter(pc.equal(batch.column("status"), "ok"))
        good += ok.num_rows
        modalities.update(m for m in ok.column("modality").unique().to_pylist() if m)
    return good, modalities


class _Shard:
    """One file per array, and one of metadata, of the same number."""

    def __init__(self, layout: _Layout, rows: int, arrays: dict[str, BinaryIO], metadata: GroupWriter) -> None:
        self._layout, self._arrays, self._metadata = layout, arrays, metadata
        self.room = rows

    def write(self, batch: pa.RecordBatch) -> None:
        for name, file in self._arrays.items():
            file.write(_half(batch.column(name), name).tobytes())
        here = set(batch.schema.names)
        columns = [batch.column(name if name in here else "path") for name in self._layout.metadata.names]
        self._metadata.write(pa.record_batch(columns, schema=self._layout.metadata))
        self.room -= batch.num_rows


@contextmanager
def _open_shard(target: Path, layout: _Layout, done: int, good: int) -> Iterator[_Shard]:
    """The shard that begins after `done` of `good` rows."""
    rows = min(SHARD_ROWS, good - done)
    width = len(str(max(1, -(-good // SHARD_ROWS)) - 1))
    number = f"{done // SHARD_ROWS:0{width}d}"
    with ExitStack() as stack:
        arrays: dict[str, BinaryIO] = {}
        for name, folder in layout.folders.items():
            file = stack.enter_context((target / folder / f"{folder}_{number}.npy").open("wb"))
            header = {"descr": "<f2", "fortran_order": False, "shape": (rows, layout.sizes[name])}
            np.lib.format.write_array_header_1_0(file, header)
            arrays[name] = file
        path = target / "metadata" / f"metadata_{number}.parquet"
        yield _Shard(layout, rows, arrays, stack.enter_context(parquet_writer(path, layout.metadata)))


def _half(column: pa.FixedSizeListArray, name: str) -> np.ndarray:
    """Vectors [n, D], none of them null, as little-endian float16."""
    values: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    try:
        with np.errstate(over="raise"):
            return values.astype("<f2")
    except FloatingPointError as error:
        raise OutputError(
            f"--format npy holds float16, and {name} has values beyond 65504",
            hint="give the same command with --format parquet: the committed rows are kept",
        ) from error


def _array_file(out: Path, column: str, number: str) -> Path:
    slot = column.removesuffix("_embedding")
    folders = [*FOLDERS.values(), MIXED_FOLDER] if slot == "embedding" else [FOLDERS.get(slot, f"{slot}_emb")]
    names = [out / folder / f"{folder}_{number}.npy" for folder in folders]
    return next((path for path in names if path.exists()), names[0])


def _vector_column(values: np.ndarray, kind: pa.DataType) -> pa.FixedSizeListArray:
    flat = np.ascontiguousarray(values, dtype=kind.value_type.to_pandas_dtype()).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=kind)


def _spread(values: list[pa.Array], rows: np.ndarray, start: int, schema: pa.Schema) -> pa.RecordBatch:
    """Values of `rows` (ascending, all >= start) as rows `start` to the last one, with nulls between them."""
    places = np.full(int(rows[-1]) + 1 - start, -1)
    places[rows - start] = np.arange(len(rows))
    indices = pa.array(places, mask=places < 0)
    return pa.record_batch([column.take(indices) for column in values], schema=schema)
