"""Vectors as inputs: an output of `mmcli embed`, or any Parquet file with a column of vectors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmcli.core.errors import ConfigError, MmcliError
from mmcli.core.state import DamagedState

if TYPE_CHECKING:
    from mmcli.sources.vectors import VectorSource


@dataclass(frozen=True, slots=True)
class GivenVectors:
    """A source of vectors. `model`: what identifies the model of them; None: the file does not say."""

    source: VectorSource
    model: dict[str, Any] | None


def open_given(
    name: str, vector_column: str | None, id_column: str | None, keep: tuple[str, ...]
) -> GivenVectors | None:
    """The vectors in `name`; None when it is no output of embed, and no column is named. Raises ConfigError."""
    from mmcli.sources.vectors import VectorColumns, VectorSource

    model, files = _embedded(name)
    if model is None and vector_column is None:
        return None
    files = files or _parquet_files(name)
    there = _columns(files[0], name)
    if vector_column is None:
        vector_column = _only(name, there)
    if id_column is None and "id" in there.names:
        id_column = "id"
    source = VectorSource(name, files, VectorColumns(vector_column, id_column, keep))
    return GivenVectors(source, model)


def _embedded(name: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The model of an output of embed, and its files; (None, []) for anything else."""
    from mmcli.sinks.outputs import read_output

    if name == "-" or _is_stream(name):
        return None, []
    try:
        info = read_output(name)
    except DamagedState as error:
        raise ConfigError(f"{name}: {error.message}; {error.hint}") from error
    except MmcliError:
        return None, []
    if info.metadata.get("task") != "embed":
        return None, []
    if not info.complete:
        raise ConfigError(f"{name} is not complete; finish its run first: the same mmcli embed command goes on")
    if info.format != "parquet":
        raise ConfigError(
            f"{name}: vectors are read from Parquet, this is {info.format}; embed with -o NAME.parquet"
        )
    files = [str(info.path / file) for file in info.files] or [str(info.path)]
    return dict(info.metadata.get("model") or {}), files


def _is_stream(name: str) -> bool:
    """A pipe or a device, which cannot be looked into without taking from it."""
    return os.path.exists(name) and not (os.path.isfile(name) or os.path.isdir(name))


def _parquet_files(name: str) -> list[str]:
    if name == "-":
        raise ConfigError("--vector-column: vectors are read from files, not from stdin")
    if not os.path.exists(name):
        raise ConfigError(f"cannot read {name}: there is no such file")
    if not os.path.isdir(name):
        return [name]
    files = sorted(os.path.join(name, one) for one in os.listdir(name) if one.endswith((".parquet", ".pq")))
    if not files:
        raise ConfigError(f"--vector-column: there is no Parquet file in {name}")
    return files


def _columns(file: str, name: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"--vector-column: {name} cannot be read as Parquet") from error


def _only(name: str, schema: Any) -> str:
    from mmcli.sources.vectors import vector_columns

    found = vector_columns(schema)
    if len(found) != 1:
        raise ConfigError(f"{name} has several columns of vectors; add --vector-column, one of {', '.join(found)}")
    return found[0]
