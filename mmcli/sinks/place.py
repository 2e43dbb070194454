"""Where an output and what belongs to it lie on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mmcli.core.durable import check_can_create, output_errors
from mmcli.core.errors import ConfigError
from mmcli.sinks.formats import is_folder


@dataclass(frozen=True, slots=True)
class Place:
    """The paths of one output.

    out        the output itself; symbolic links are resolved, so that a link stays one
    folder     whether it is a folder
    staging    the folder of an unfinished run
    root       what the names in a finished output's list of files are relative to
    signatures the sidecar with one signature per row
    metadata   JSON metadata of formats that cannot hold their own
    """

    out: Path
    folder: bool

    @classmethod
    def of(cls, out: str | Path, format_name: str = "parquet") -> Place:
        text = os.fspath(out)
        return cls(Path(os.path.realpath(text)), is_folder(text, format_name))

    @property
    def staging(self) -> Path:
        return self.out / ".mmcli" if self.folder else self.out.with_name(self.out.name + ".mmcli")

    @property
    def root(self) -> Path:
        return self.out if self.folder else self.out.parent

    @property
    def signatures(self) -> Path:
        # In a folder it is hidden: DuckDB's dir/*.parquet and `datasets` take every visible Parquet file for data.
        return self.out / ".inputs" if self.folder else self.out.with_name(self.out.name + ".inputs")

    @property
    def metadata(self) -> Path:
        return self.out / "_SUCCESS.json" if self.folder else self.out.with_name(self.out.name + ".meta.json")

    def check_parent(self) -> None:
        """Raise ConfigError when the folder that is to hold the output does not exist."""
        parent = self.out.parent
        if not parent.is_dir():
            raise ConfigError(f"the folder of the output does not exist: {parent}", hint=f"mkdir -p '{parent}'")


def check_writable(out: str, format_name: str) -> None:
    """Find out before a model is loaded whether `out` can be written.

    Raises ConfigError when its folder does not exist, OutputError when nothing can be created there.
    """
    place = Place.of(out, format_name)
    place.check_parent()
    with output_errors(place.out):
        inside = place.out if place.out.is_dir() else place.out.parent
        check_can_create(inside, f".{place.out.name}.{os.getpid()}.mmcli-check.tmp")
