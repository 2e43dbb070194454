"""Which formats there are, and which one an output gets. Imports nothing heavy."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mmcli.core.errors import ConfigError
from mmcli.core.protocols import Format

if TYPE_CHECKING:
    import pyarrow as pa

# name -> "module:attribute" of what makes a mmcli.core.protocols.Format
FORMATS = {
    "parquet": "mmcli.sinks.parquet:ParquetFormat",
    "jsonl": "mmcli.sinks.jsonl:JsonlFormat",
    "npy": "mmcli.sinks.npy:NpyFormat",
    "coco": "mmcli.sinks.exports:coco",
    "vqa": "mmcli.sinks.exports:vqa",
    "openai-batch": "mmcli.sinks.openai_batch:OpenAIBatchFormat",
}
# suffix -> name
SUFFIXES = {".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
# name -> what its suffixes mean without it
_IS_ALSO = {"openai-batch": "jsonl"}
# What an output can be: a file, a folder, or both.
FILE_FORMATS = ("parquet", "jsonl", "coco", "vqa", "openai-batch")
FOLDER_FORMATS = ("parquet", "npy")
# Those that hold no rows, only the results of good ones: nothing can be read back from them.
RESULTS = ("coco", "vqa", "openai-batch")


class RereadableFormat(Format, Protocol):
    """A format whose outputs --update can take rows from.

    lossless  values read back equal those that were written, whatever their dtype
    """

    lossless: bool

    def check(self, schema: pa.Schema) -> None:
        """Raise ConfigError, before anything is computed, when the format cannot hold such rows."""
        ...

    def read(self, out: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The columns of `schema` of a finished output, in row order; rows that have no values are null."""
        ...


def format_for(out: str, name: str | None = None) -> str:
    """The format of output `out` (a path; folders end with / or exist; "-" is stdout), `name` as from --format.

    Raises ConfigError for an unknown name, and for a name that contradicts the path.
    """
    if name is not None and name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, 1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"--format {name} is not known; {meant}it is one of {', '.join(FORMATS)}")
    if out == "-":
        if name not in (None, "jsonl"):
            raise ConfigError(f"--format {name} cannot go to stdout, only jsonl can; add e.g. -o out.parquet")
        return "jsonl"
    _refuse_special(out)
    if out.endswith(os.sep) or os.path.isdir(out):
        return _folder_format(out, name)
    return _file_format(out, name)


def is_folder(out: str, format_name: str) -> bool:
    """Whether output `out` is a folder."""
    return out.endswith(os.sep) or os.path.isdir(out) or format_name not in FILE_FORMATS


def load_format(name: str) -> RereadableFormat:
    """The format of that name, ready to write. Imports pyarrow."""
    module, _, attribute = FORMATS[name].partition(":")
    made: RereadableFormat = getattr(importlib.import_module(module), attribute)()
    return made


def _refuse_special(out: str) -> None:
    if not out:
        raise ConfigError("-o is empty; give it a file (out.parquet), a folder (out/) or -")
    try:
        os.path.realpath(out).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"-o {os.fsencode(out)!r} is not a UTF-8 name, which Arrow cannot open") from None
    if os.path.exists(out) and not os.path.isfile(out) and not os.path.isdir(out):
        # The finished output is renamed into place: that would replace /dev/null or a pipe by a file.
        raise ConfigError(f"-o {out} is a device or a pipe, not a file; for JSONL on stdout give -o -")


def _folder_format(out: str, name: str | None) -> str:
    if os.path.isfile(out.rstrip(os.sep)):
        raise ConfigError(f"-o {out} ends with {os.sep}, but is a file; choose another name")
    if name is not None and name not in FOLDER_FORMATS:
        instead = f"{out.rstrip(os.sep)}.{'jsonl' if name in _IS_ALSO else 'json' if name in RESULTS else name}"
        raise ConfigError(f"--format {name} makes one file, but -o {out} is a folder; give e.g. -o {instead}")
    return name or "parquet"


def _file_format(out: str, name: str | None) -> str:
    suffix = os.path.splitext(out)[1].lower()
    by_suffix = SUFFIXES.get(suffix)
    if name is None:
        if by_suffix is None:
            raise ConfigError(_unknown_suffix(out, suffix))
        return by_suffix
    if by_suffix is not None and by_suffix not in (name, _IS_ALSO.get(name)):
        raise ConfigError(f"--format {name} contradicts -o {out}, which means {by_suffix}; change one of them")
    if name not in FILE_FORMATS and os.path.isfile(out):
        raise ConfigError(f"--format {name} makes a folder, but -o {out} is a file; choose another name")
    return name


def _unknown_suffix(out: str, suffix: str) -> str:
    if suffix in (".npy", ".npz"):
        return f"-o {out}: the npy format is a folder of arrays; give -o {out[: -len(suffix)]}/ --format npy"
    if suffix == ".json":
        return f"-o {out}: a .json is a list of results, of one of several kinds; add --format coco or --format vqa"
    close = difflib.get_close_matches(suffix, SUFFIXES, 1) if suffix else []
    meant = f"did you mean {out[: -len(suffix)]}{close[0]}? " if close else ""
    known = ", ".join(SUFFIXES)
    return f"cannot tell the format of -o {out} by its name; {meant}end it with {known} or /, or add --format"
