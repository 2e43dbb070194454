"""Which columns of a manifest are media, which is the id, and which pass through."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from mmcli.core.errors import ConfigError
from mmcli.core.records import MODALITIES, Modality

if TYPE_CHECKING:
    import pyarrow as pa

    from mmcli.sources.open import SourceOptions

# What a column can hold, as far as its type tells. "any": not known before the rows are read.
Holds = Literal["string", "bytes", "struct", "any", "other"]
Kind = Literal["path", "bytes", "struct", "text"]

# In the order of the slots of a record.
SLOT_ORDER: tuple[Modality, ...] = ("image", "audio", "video", "text")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


MEDIA_NAMES: dict[Modality, frozenset[str]] = {
    "image": _words(
        "image img picture photo image_path img_path image_file image_filename image_file_name jpg jpeg png"
    ),
    "audio": _words("audio sound audio_path audio_file audio_filename audio_filepath audio_file_name wav flac mp3"),
    "video": _words("video clip video_path video_file video_filename video_file_name mp4"),
}
PATH_NAMES = _words("path file file_name filename filepath file_path fname")
TEXT_NAMES = _words(
    "text caption sentence content prompt question query document description transcript transcription utterance"
)
URL_NAMES = _words("url urls uri image_url img_url audio_url video_url link href")

# Columns of every output: a passthrough column cannot have their names.
OUTPUT_NAMES = frozenset(
    ["id", "path", "modality", "embedding", "status", "error_code", "error_stage", "error_message"]
    + [f"{m}_embedding" for m in MODALITIES]
)
# `--keep name:type` for formats without types of their own. "json" is a string that holds JSON.
KEEP_TYPES = ("string", "int", "float", "bool", "json")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a manifest. `type`: as shown to the user; `arrow`: its type where the format has one."""

    name: str
    type: str
    holds: Holds
    feature: Modality | None = None
    arrow: pa.DataType | None = None


@dataclass(frozen=True, slots=True)
class MediaColumn:
    """A column that is media. `modality`: None when the content decides."""

    name: str
    kind: Kind
    modality: Modality | None


@dataclass(frozen=True, slots=True)
class KeepColumn:
    """A passthrough column.

    convert  one of KEEP_TYPES, or None where values have the Arrow type already
    output   what it is called in the output
    """

    name: str
    type: pa.DataType
    convert: str | None = None
    output: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", self.output or self.name)


def renamed(text: str, names: Container[str]) -> tuple[str, str]:
    """`truth=label` -> ("truth", "label"): the name in the output, and the column. A column `a=b` is itself."""
    new, equals, old = text.partition("=")
    return (text, text) if text in names or not equals or not new or not old else (new, old)


@dataclass(frozen=True, slots=True)
class Selection:
    """The columns that are read: one medium for each slot, in that order; () where each row is an empty text."""

    media: tuple[MediaColumn, ...]
    id: str | None = None
    keep: tuple[KeepColumn, ...] = ()
    variables: tuple[str, ...] = ()

    @property
    def slots(self) -> tuple[str, ...]:
        if len(self.media) <= 1:
            return ("",)
        return tuple(str(m.modality) for m in self.media)

    @property
    def names(self) -> list[str]:
        """Every column that is read, each once."""
        wanted = [m.name for m in self.media] + ([self.id] if self.id else []) + [k.name for k in self.keep]
        return list(dict.fromkeys([*wanted, *self.variables]))


def select(options: SourceOptions, columns: Sequence[Column], manifest: str, empty: bool = False) -> Selection:
    """The columns to read of a manifest.

    `empty`: the manifest has no rows to tell its columns; any name is accepted.
    Raises ConfigError with every problem.
    """
    problems: list[str] = []
    by_name = {c.name: c for c in columns}
    if empty:
        kept = (renamed(k, ())[1].partition(":")[0] for k in options.keep)
        given = [options.id_column, *_given(options).values(), *kept]
        given += options.variables
        by_name = {name: Column(name, "unknown", "any") for name in given if name}
    media = _chosen_media(options, by_name, manifest, problems)
    # A column that prompts name is no medium, as long as there is another.
    others = [c for c in columns if c.name not in options.variables]
    bare = options.bare and not media and not _like_media(others) and not _urls(others)
    if not media and not problems and not bare:
        media = () if empty else _guess(others or columns, manifest, problems)
    _check_id(options.id_column, by_name, manifest, problems)
    keep = _chosen_keep(options.keep, by_name, manifest, problems)
    for name in options.variables:
        if name not in by_name:
            problems.append(_missing(options.said[name], name, by_name, manifest))
    if problems:
        raise ConfigError(problems)
    if not media and not bare:
        # An empty manifest has no records whose media could be of any kind.
        media = (MediaColumn("", "path", None),)
    return Selection(media, options.id_column, keep, options.variables)


def _given(options: SourceOptions) -> dict[Modality | None, str]:
    flags: dict[Modality | None, str | None] = {
        "image": options.image_column,
        "audio": options.audio_column,
        "video": options.video_column,
        "text": options.text_column,
        None: options.path_column,
    }
    return {modality: name for modality, name in flags.items() if name is not None}


def flag(modality: Modality | None) -> str:
    return f"--{modality or 'path'}-column"


def _chosen_media(
    options: SourceOptions, by_name: dict[str, Column], manifest: str, problems: list[str]
) -> tuple[MediaColumn, ...]:
    given = _given(options)
    if None in given and len(given) > 1:
        others = " and ".join(flag(m) for m in given if m)
        problems.append(f"--path-column cannot go with {others}: say what it holds, e.g. --image-column")
    chosen = []
    for modality, name in given.items():
        column = by_name.get(name)
        if column is None:
            problems.append(_missing(f"{flag(modality)} {name}", name, by_name, manifest))
        elif (kind := _kind(column, modality)) is None:
            need = "strings" if modality == "text" else "file paths, bytes or struct<bytes, path>"
            problems.append(f"{flag(modality)} {name}: {manifest} has {column.type} there, not {need}")
        else:
            chosen.append(MediaColumn(name, kind, modality))
    return tuple(chosen)


def _kind(column: Column, modality: Modality | None) -> Kind | None:
    """How a column's cells are to be read; None when they cannot be such media."""
    if modality == "text":
        return None if column.holds in ("struct", "other") else "text"
    kinds: dict[Holds, Kind] = {"string": "path", "any": "path", "bytes": "bytes", "struct": "struct"}
    return kinds.get(column.holds)


def _missing(what: str, name: str, by_name: dict[str, Column], manifest: str) -> str:
    close = get_close_matches(name, by_name, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    listed = ", ".join(f"{c.name} ({c.type})" for c in by_name.values()) or "none"
    return f"{what}: {manifest} has no such column{hint} Its columns: {listed}"


def _guess(columns: Sequence[Column], manifest: str, problems: list[str]) -> tuple[MediaColumn, ...]:
    """The one column that is clearly media, else the one that is clearly text; else a problem is added."""
    found = _like_media(columns)
    if len(found) == 1:
        modality = found[0].feature or _named(found[0])
        kind = _kind(found[0], modality)
        assert kind is not None
        return (MediaColumn(found[0].name, kind, modality),)
    if len(found) > 1:
        names = ", ".join(f"{c.name} ({c.type})" for c in found)
        choices = " or ".join(f"{flag(c.feature or _named(c))} {c.name}" for c in found)
        problems.append(f"{manifest} has several media columns: {names}; choose with {choices}")
        return ()
    strings = [c for c in columns if c.holds in ("string", "any")]
    texts = [c for c in strings if c.name.lower() in TEXT_NAMES]
    urls = _urls(columns)
    if not texts and len(columns) == 1 and not urls:
        texts = strings
    if len(texts) == 1 and not urls:
        return (MediaColumn(texts[0].name, "text", "text"),)
    problems.append(_no_guess(columns, texts, urls, manifest))
    return ()


def _like_media(columns: Sequence[Column]) -> list[Column]:
    """Those that are clearly media, not texts."""
    # Typed media tell more than names: a data set of speech has `file` (string) beside `audio` (struct).
    found = [c for c in columns if c.holds in ("struct", "bytes") and _named(c) != "text"]
    featured = [c for c in found if c.feature or c.holds == "struct"]
    # `image` (binary) beside `thumbnail_hash` (binary) is clear.
    named = [c for c in found if _named(c)]
    return (
        featured
        or (named if len(named) == 1 else found)
        or [c for c in columns if c.holds in ("string", "any") and _is_media_name(c)]
    )


def _urls(columns: Sequence[Column]) -> list[str]:
    return [c.name for c in columns if c.name.lower() in URL_NAMES]


def _no_guess(columns: Sequence[Column], texts: list[Column], urls: list[str], manifest: str) -> str:
    listed = ", ".join(f"{c.name} ({c.type})" for c in columns)
    if urls and texts:
        return (
            f"{manifest} has media only as URLs ({', '.join(urls)}), which are off; "
            f"for its text give --text-column {texts[0].name}. Its columns: {listed}"
        )
    if urls:
        return f"{manifest} has media only as URLs ({', '.join(urls)}), which are off. Its columns: {listed}"
    if texts:
        choices = " or ".join(f"--text-column {c.name}" for c in texts)
        return f"{manifest} has several text columns; choose with {choices}. Its columns: {listed}"
    return (
        f"cannot tell which column of {manifest} is media; give --image-column, --audio-column, --video-column, "
        f"--path-column or --text-column. Its columns: {listed}"
    )


def _named(column: Column) -> Modality | None:
    name = column.name.lower()
    for modality, names in MEDIA_NAMES.items():
        if name in names:
            return modality
    return "text" if name in TEXT_NAMES else None


def _is_media_name(column: Column) -> bool:
    return column.name.lower() in PATH_NAMES or _named(column) not in (None, "text")


def _check_id(name: str | None, by_name: dict[str, Column], manifest: str, problems: list[str]) -> None:
    if name is None:
        return
    if name not in by_name:
        problems.append(_missing(f"--id-column {name}", name, by_name, manifest))
    elif by_name[name].holds in ("struct", "other") and not _is_scalar(by_name[name]):
        problems.append(f"--id-column {name}: {manifest} has {by_name[name].type} there, not strings or integers")


def _is_scalar(column: Column) -> bool:
    import pyarrow as pa

    kind = column.arrow
    if kind is None:
        return column.type in ("integer", "number", "string", "unknown")
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind))


def _chosen_keep(
    wanted: Sequence[str], by_name: dict[str, Column], manifest: str, problems: list[str]
) -> tuple[KeepColumn, ...]:
    chosen: list[KeepColumn] = []
    for text in wanted:
        try:
            column = _keep_column(text, by_name, manifest)
        except ConfigError as problem:
            problems += problem.problems
            continue
        if column.output in (c.output for c in chosen):
            problems.append(f"--keep {text}: {column.output} is given twice")
        chosen.append(column)
    return tuple(chosen)


def _keep_column(text: str, by_name: dict[str, Column], manifest: str) -> KeepColumn:
    new, old = renamed(text, by_name)
    name, colon, convert = (old, "", "") if old in by_name else old.rpartition(":")
    if not colon:
        name, convert = old, ""
    output = new if new != old else name
    column = by_name.get(name)
    if column is None:
        raise ConfigError(_missing(f"--keep {text}", name, by_name, manifest))
    if output in OUTPUT_NAMES:
        how = "give --id-column id" if name == "id" else f"call it otherwise: --keep true_{output}={name}"
        raise ConfigError(f"--keep {text}: every output has its own column {output}; {how}")
    if column.arrow is not None:
        if convert:
            raise ConfigError(f"--keep {text}: {manifest} has types of its own ({column.type}); give --keep {name}")
        return KeepColumn(name, _keep_type(column.arrow, text), None, output)
    if convert and convert not in KEEP_TYPES:
        raise ConfigError(f"--keep {text}: no such type {convert!r}; one of {', '.join(KEEP_TYPES)}")
    convert = convert or "string"
    return KeepColumn(name, untyped_keep_type(convert), convert, output)


def untyped_keep_type(convert: str) -> pa.DataType:
    """The Arrow type of `--keep name:convert`."""
    import pyarrow as pa

    types = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    return types.get(convert, pa.string())


def _keep_type(kind: Any, text: str) -> pa.DataType:
    """The type that a passthrough column has in the output: its own, without dictionaries and extensions."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return _keep_type(kind.value_type, text)
    if isinstance(kind, pa.BaseExtensionType):
        return _keep_type(kind.storage_type, text)
    if types.is_union(kind) or types.is_interval(kind) or types.is_run_end_encoded(kind):
        raise ConfigError(f"--keep {text}: columns of type {kind} cannot be passed through")
    if types.is_struct(kind):
        return pa.struct([f.with_type(_keep_type(f.type, text)).remove_metadata() for f in kind])
    if types.is_map(kind):
        return pa.map_(_keep_type(kind.key_type, text), _keep_type(kind.item_type, text))
    if types.is_fixed_size_list(kind):
        return pa.list_(_keep_type(kind.value_type, text), kind.list_size)
    if types.is_large_list(kind):
        return pa.large_list(_keep_type(kind.value_type, text))
    if types.is_list(kind):
        return pa.list_(_keep_type(kind.value_type, text))
    return kind
