"""INPUT arguments -> Source. Imports nothing heavy until a source is opened."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO, cast

from mmcli.core.errors import ConfigError
from mmcli.core.protocols import Source
from mmcli.sources.names import has_wildcard, is_url, shown, split_pattern

if TYPE_CHECKING:
    from mmcli.sources.folder import FolderRules
    from mmcli.sources.manifest import Manifest
    from mmcli.sources.paths import Listing

# How each format is read: `--input-format` name -> module:attr, called with (path, name as given).
FORMATS = {
    "parquet": "mmcli.sources.parquet:ParquetManifest",
    "jsonl": "mmcli.sources.jsonl:JsonlManifest",
    "csv": "mmcli.sources.csv:CsvManifest",
    "tsv": "mmcli.sources.csv:TsvManifest",
}
# A list of paths, one a line, is no manifest: it has no columns.
PATHS_FORMAT = "paths"

SUFFIXES = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
}
# Those of SUFFIXES that may end in .gz.
TEXT_FORMATS = ("jsonl", "csv", "tsv")

# What cannot be read yet, and what to do instead.
UNSUPPORTED = {
    ".tar": "tar archives are not read yet; unpack it and give the folder",
    ".tgz": "tar archives are not read yet; unpack it and give the folder",
    ".tar.gz": "tar archives are not read yet; unpack it and give the folder",
    ".zip": "archives are not read; unpack it and give the folder",
    ".7z": "archives are not read; unpack it and give the folder",
    ".rar": "archives are not read; unpack it and give the folder",
    ".json": "a manifest is JSON Lines, one object a line; convert an array with: jq -c '.[]' x.json > x.jsonl",
    ".arrow": "Arrow files are not read; write it as Parquet",
    ".feather": "Feather files are not read; write it as Parquet",
    ".xlsx": "Excel files are not read; save it as CSV",
    ".xls": "Excel files are not read; save it as CSV",
}

# Of Hugging Face imagefolder and audiofolder, in the order of preference.
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class SourceOptions:
    """What the command line says about the inputs.

    inputs          folders, files, quoted patterns, manifests, or "-" for a list of paths on stdin
    glob            of a folder only files matching one of these: by name, or by relative path with a slash
    null_separated  the list on stdin is separated by NUL instead of newlines
    *_column        which columns of a manifest are media; several make a record of several media
    id_column       the column of a manifest that holds the ids
    keep            passthrough columns of a manifest; for JSONL and CSV with a type: `name:int`
    variables       columns of a manifest that prompts name
    variables_said  how the command line names each of them, for messages
    hidden          also files and folders whose names begin with a dot
    input_format    read the inputs as parquet, jsonl, csv, tsv or paths, whatever their names
    live            make records from stdin as lines arrive, without a snapshot (rows are not known)
    missing         a row of a manifest may lack some of its media (Media.missing), not all
    bare            a manifest's rows may be without media; a column of texts is a medium only where it is named
    leave           extensions of files of folders that are no rows: what the run itself writes beside them
    """

    inputs: tuple[str, ...]
    glob: tuple[str, ...] = ()
    null_separated: bool = False
    image_column: str | None = None
    audio_column: str | None = None
    video_column: str | None = None
    text_column: str | None = None
    path_column: str | None = None
    id_column: str | None = None
    keep: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    variables_said: tuple[str, ...] = ()
    hidden: bool = False
    follow_symlinks: bool = True
    input_format: str | None = None
    live: bool = False
    missing: bool = False
    bare: bool = False
    leave: tuple[str, ...] = ()

    @property
    def said(self) -> dict[str, str]:
        """How the command line names each of the variables."""
        said = self.variables_said or [f"the prompt's {{{name}}}" for name in self.variables]
        return dict(zip(self.variables, said, strict=True))

    @property
    def column_flags(self) -> list[str]:
        """The flags given that only a manifest can answer."""
        flags = {
            "--image-column": self.image_column,
            "--audio-column": self.audio_column,
            "--video-column": self.video_column,
            "--text-column": self.text_column,
            "--path-column": self.path_column,
            "--id-column": self.id_column,
        }
        return [name for name, value in flags.items() if value is not None]

    @property
    def column_flags_of_media(self) -> list[str]:
        """Those of them that say which columns are media."""
        return [name for name in self.column_flags if name != "--id-column"]


def open_source(options: SourceOptions, stdin: BinaryIO | None = None) -> Source:
    """The source of all inputs, checked. `stdin`: where "-" reads from.

    Raises ConfigError with every problem found: missing files, unknown columns, inputs that do not go
    together. Nothing but the heads of manifests is read.
    """
    problems: list[str] = []
    _check_options(options, problems)
    opened: list[_Listings | Source] = []
    for name in options.inputs:
        try:
            _open_input(name, options, stdin, opened)
        except ConfigError as problem:
            problems += problem.problems
    if not problems:
        _check_together(options, opened, problems)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    live = options.live and options.inputs == ("-",)
    sources = [one.source(live) if isinstance(one, _Listings) else one for one in opened]
    if len(sources) == 1:
        return sources[0]
    from mmcli.sources.chain import ChainedSource

    return ChainedSource(sources)


class _Listings:
    """Neighbouring inputs that name files; together one source, so that 100,000 arguments stay cheap."""

    def __init__(self) -> None:
        self.listings: list[Listing] = []
        self.files: list[str] | None = None

    def add(self, listing: Listing) -> None:
        self.listings.append(listing)
        self.files = None

    def add_file(self, path: str) -> None:
        if self.files is None:
            from mmcli.sources.paths import FileListing

            listing = FileListing([])
            self.listings.append(listing)
            self.files = listing.paths
        self.files.append(path)

    def source(self, live: bool) -> Source:
        from mmcli.sources.paths import PathSource

        return PathSource(self.listings, live)


def _check_options(options: SourceOptions, problems: list[str]) -> None:
    if not options.inputs:
        problems.append("no INPUT given: a folder, files, a manifest, or - for a list of paths on stdin")
    if options.inputs.count("-") > 1:
        problems.append("stdin (-) can be read only once; give - once")
    known = (*FORMATS, PATHS_FORMAT)
    if options.input_format is not None and options.input_format not in known:
        problems.append(f"--input-format {options.input_format}: no such format; one of {', '.join(known)}")


def _open_input(
    name: str, options: SourceOptions, stdin: BinaryIO | None, opened: list[_Listings | Source]
) -> None:
    """Open one INPUT and add it to `opened`."""
    if name == "-":
        from mmcli.sources.paths import ListFile

        if options.input_format not in (None, PATHS_FORMAT):
            raise ConfigError(f"stdin (-) is a list of paths, not {options.input_format}; save it to a file first")
        _listings(opened).add(ListFile(stdin or sys.stdin.buffer, options.null_separated))
        return
    try:
        mode = os.stat(name).st_mode
    except (OSError, ValueError) as failure:
        _open_missing(name, options, stdin, opened, failure)
        return
    if stat.S_ISDIR(mode):
        _open_folder(name, options, opened)
    elif not stat.S_ISREG(mode) and options.input_format != PATHS_FORMAT:
        raise ConfigError(f"{shown(name)} is neither a file nor a folder")
    else:
        _open_file(name, options, opened)


def _listings(opened: list[_Listings | Source]) -> _Listings:
    if not opened or not isinstance(opened[-1], _Listings):
        opened.append(_Listings())
    return cast(_Listings, opened[-1])


def _open_missing(
    name: str,
    options: SourceOptions,
    stdin: BinaryIO | None,
    opened: list[_Listings | Source],
    failure: OSError | ValueError,
) -> None:
    if is_url(name):
        raise ConfigError(f"{shown(name)}: URLs are not read as inputs; download it first")
    if isinstance(failure, PermissionError):
        raise ConfigError(f"cannot read {shown(name)}: {failure.strerror}")
    if not has_wildcard(name):
        raise ConfigError(_not_found(name))
    if format_of(name):
        # 'shards/*.parquet' in quotes: as if the shell had expanded it.
        from glob import glob

        found = sorted(glob(name, recursive=True, include_hidden=options.hidden), key=os.fsencode)
        for one in found:
            _open_input(one, options, stdin, opened)
    else:
        found = _open_pattern(name, options, opened)
    if not found:
        raise ConfigError(f"no file matches {shown(name)}; for all files of the folders below, end it with /**")


def _open_pattern(name: str, options: SourceOptions, opened: list[_Listings | Source]) -> list[str]:
    from mmcli.sources.folder import FolderListing

    folder, pattern = split_pattern(name)
    if not os.path.isdir(folder or "."):
        raise ConfigError(_not_found(folder))
    prefix = "" if not folder else folder if folder.endswith("/") else folder + "/"
    listing = FolderListing(folder, replace(_rules(options), glob=(), pattern=pattern), shown(prefix))
    _listings(opened).add(listing)
    return [name] if listing.any() else []


def _rules(options: SourceOptions) -> FolderRules:
    from mmcli.sources.folder import FolderRules

    return FolderRules(options.glob, None, options.hidden, options.follow_symlinks, frozenset(options.leave))


def _not_found(name: str) -> str:
    if not name:
        return "an INPUT is empty (''); is a variable of the shell not set?"
    folder = os.path.dirname(name)
    try:
        with os.scandir(folder or ".") as entries:
            siblings = [e.name for e in islice(entries, 10_000)]
    except OSError:
        return f"{shown(name)}: no such file or folder"
    close = get_close_matches(os.path.basename(name.rstrip("/")), siblings, n=3)
    hint = f"; did you mean {', '.join(shown(os.path.join(folder, c)) for c in close)}?" if close else ""
    return f"{shown(name)}: no such file or folder{hint}"


def _open_folder(name: str, options: SourceOptions, opened: list[_Listings | Source]) -> None:
    from mmcli.sources.folder import FolderListing

    try:
        os.scandir(name).close()
    except OSError as failure:
        raise ConfigError(f"cannot read the folder {shown(name)}: {failure.strerror}") from failure
    metadata = None if options.glob else _metadata(name)
    if metadata is None:
        _listings(opened).add(FolderListing(name, _rules(options)))
        return
    opened.append(_manifest_source(metadata, _folder_options(options)))


def _metadata(folder: str) -> Manifest | None:
    """The manifest of a Hugging Face imagefolder or audiofolder: one with a `file_name` column."""
    for name in METADATA_NAMES:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            manifest = _manifest(path, SUFFIXES[os.path.splitext(name)[1]])
            if any(c.name == "file_name" for c in manifest.columns):
                return manifest
    return None


def _folder_options(options: SourceOptions) -> SourceOptions:
    return replace(
        options,
        path_column=options.path_column if options.column_flags_of_media else "file_name",
        id_column=options.id_column or "file_name",
    )


def format_of(name: str) -> str | None:
    """The format of a manifest by its name; None for a name that is no manifest's."""
    stem, suffix = os.path.splitext(name.lower())
    if suffix == ".gz":
        found = SUFFIXES.get(os.path.splitext(stem)[1])
        return found if found in TEXT_FORMATS else None
    return SUFFIXES.get(suffix)


def _open_file(name: str, options: SourceOptions, opened: list[_Listings | Source]) -> None:
    kind = options.input_format or format_of(name)
    if kind == PATHS_FORMAT:
        from mmcli.sources.paths import ListFile

        _listings(opened).add(ListFile(name, options.null_separated))
    elif kind is not None and kind in FORMATS:
        opened.append(_manifest_source(_manifest(name, kind), options))
    elif kind is None:
        for suffix, what in UNSUPPORTED.items():
            if name.lower().endswith(suffix):
                raise ConfigError(f"{shown(name)}: {what}")
        _listings(opened).add_file(name)


def _manifest(path: str, kind: str) -> Manifest:
    module, _, attribute = FORMATS[kind].partition(":")
    constructor = cast("Callable[[str, str], Manifest]", getattr(import_module(module), attribute))
    return constructor(path, path)


def _manifest_source(manifest: Manifest, options: SourceOptions) -> Source:
    from mmcli.sources.columns import select
    from mmcli.sources.manifest import ManifestSource

    selection = select(options, manifest.columns, shown(manifest.name), manifest.empty)
    return ManifestSource(manifest, selection, options.missing)


def _check_together(options: SourceOptions, opened: Sequence[_Listings | Source], problems: list[str]) -> None:
    """Inputs whose records would differ in kind cannot be one table."""
    manifests = [one for one in opened if not isinstance(one, _Listings)]
    with_files = len(manifests) < len(opened)
    if with_files and options.keep:
        problems.append(
            f"--keep {','.join(options.keep)}: only manifests have columns, not folders and files; leave it out"
        )
    if with_files and options.variables:
        said = options.said.values()
        braces = "; a brace itself is written twice: {{ or }}" if any("{" in one for one in said) else ""
        problems.append(f"{', '.join(said)}: only manifests have columns, not folders and files{braces}")
    if not manifests and options.column_flags:
        flags = ", ".join(options.column_flags)
        problems.append(
            f"{flags}: only manifests have columns; leave it out, or give a .parquet, .jsonl, .csv or .tsv file"
        )
    slots = {one.slots for one in manifests} | ({("",)} if with_files else set())
    if len(slots) > 1:
        kinds = " and ".join(sorted("+".join(s) if s != ("",) else "one medium" for s in slots))
        problems.append(f"the inputs have different media in a row: {kinds}; run them one by one")
    for one in manifests[1:]:
        if not one.keep.equals(manifests[0].keep):
            problems.append(
                f"--keep: the inputs have columns of different types: {_types(manifests[0])} and {_types(one)}"
            )
            break


def _types(source: Source) -> str:
    return ", ".join(f"{f.name} ({f.type})" for f in source.keep)
