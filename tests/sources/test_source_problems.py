"""Every mistake in the inputs is found before a run, all of them together, and says what to type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from source_helpers import STRUCT, ids, listed, write_files, write_parquet

from mmcli.core.errors import ConfigError
from mmcli.sources.open import SourceOptions, format_of, open_source


def problems(*inputs: str | Path, **options: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        open_source(SourceOptions(tuple(map(str, inputs)), **options))  # type: ignore[arg-type]
    assert all("\n" not in p for p in caught.value.problems)
    return caught.value.problems


def problem(*inputs: str | Path, **options: object) -> str:
    (only,) = problems(*inputs, **options)
    return only


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    columns = {"image": ["a.jpg"], "caption": ["x"], "n": [1], "id": ["i"], "when": [[1]]}
    return write_parquet(tmp_path / "m.parquet", columns)


def test_all_at_once(tmp_path: Path, manifest: Path) -> None:
    (tmp_path / "x.tar").touch()
    found = problems(tmp_path / "none", tmp_path / "x.tar", manifest, image_column="imgae", keep=("captoin", "id"))
    assert len(found) == 5
    assert found[0].endswith("none: no such file or folder")
    assert "unpack it" in found[1]
    assert "did you mean image? Its columns: image (string), caption (string), n (int64)" in found[2]
    assert "did you mean caption?" in found[3]
    assert "--id-column id" in found[4]


def test_missing_files(tmp_path: Path) -> None:
    write_files(tmp_path, "photos/a.jpg")
    assert f"did you mean {tmp_path}/photos?" in problem(tmp_path / "photo")
    assert f"did you mean {tmp_path}/photos/a.jpg?" in problem(tmp_path / "photos" / "a.jpeg")
    assert "download" in problem("https://example.org/a.jpg")
    assert "no INPUT" in problem()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image_column": "n"}, "--image-column n: .* has int64 there, not file paths"),
        ({"text_column": "when"}, "not strings"),
        ({"path_column": "image", "text_column": "caption"}, "--path-column cannot go with --text-column"),
        ({"id_column": "when"}, "not strings or integers"),
        ({"id_column": "key"}, "no such column"),
        ({"keep": ("n:int",)}, "types of its own"),
        ({"keep": ("n", "n")}, "given twice"),
        ({"input_format": "xml"}, "no such format; one of parquet, jsonl, csv, tsv, paths"),
    ],
)
def test_columns(options: dict[str, object], match: str, manifest: Path) -> None:
    import re

    assert re.search(match, problem(manifest, **options))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"image": ["a"], "caption": ["b"]}, "image"),
        ({"file_name": ["a"], "text": ["b"]}, "file_name"),
        ({"caption": ["a"], "label": ["b"], "n": [1]}, "caption"),
        ({"whatever": ["a"]}, "whatever"),
        ({"file": ["a"], "audio": pa.array([{"bytes": b"x", "path": "p"}], STRUCT)}, "audio"),
        ({"x": [b"a"], "text": ["b"]}, "x"),
        ({"image": [b"a"], "hash": [b"b"]}, "image"),
        ({"image": ["a"], "audio": ["b"]}, "choose with --image-column image or --audio-column audio"),
        ({"image": ["a"], "path": ["b"]}, "choose with --image-column image or --path-column path"),
        ({"caption": ["a"], "text": ["b"]}, "choose with --text-column caption or --text-column text"),
        ({"url": ["a"], "caption": ["b"]}, "--text-column caption"),
        ({"url": ["a"], "n": [1]}, "only as URLs"),
        ({"a": ["a"], "b": ["b"]}, "cannot tell which column"),
        ({"n": [1]}, "cannot tell which column"),
    ],
)
def test_guessing(columns: dict[str, object], expected: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "m.parquet", columns)
    if " " in expected:
        assert expected in problem(path)
    else:
        source = open_source(SourceOptions((str(path),)))
        assert source.selection.media[0].name == expected  # type: ignore[attr-defined]


def test_jsonl_columns(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"image": "a.jpg", "n": 1}\n{"n": "x", "late": true}\n')
    found = problem(tmp_path / "m.jsonl", image_column="img")
    assert "image (string), n (integer or string), late (boolean)" in found
    assert "has boolean there" in problem(tmp_path / "m.jsonl", image_column="late")
    assert "no such type 'int8'; one of string, int, float, bool, json" in problem(
        tmp_path / "m.jsonl", keep=("n:int8",)
    )


def test_names_of_the_output_are_taken(tmp_path: Path) -> None:
    names = ("path", "modality", "embedding", "status", "error_code", "image_embedding")
    path = write_parquet(tmp_path / "m.parquet", {"image": ["a"], **{n: ["x"] for n in names}})
    found = problems(path, keep=names, image_column="image")
    assert len(found) == len(names)
    assert all(f"call it otherwise: --keep true_{n}={n}" in p for n, p in zip(names, found, strict=True))


def test_a_column_is_renamed_on_the_way(tmp_path: Path) -> None:
    """`new=old`, with a type behind where the format has none; a column whose name holds `=` is itself."""
    cells = {"image": ["a"], "label": ["x"], "a=b": ["y"], "b": ["z"]}
    path = write_parquet(tmp_path / "m.parquet", cells)
    source = open_source(SourceOptions((str(path),), image_column="image", keep=("truth=label", "a=b", "c=b")))
    assert source.keep.names == ["truth", "a=b", "c"]
    source.snapshot(tmp_path / "snapshot")
    assert next(source.records()).keep == ("x", "y", "z")
    lines = tmp_path / "m.csv"
    lines.write_text("image,label\na,7\n")
    source = open_source(SourceOptions((str(lines),), image_column="image", keep=("truth=label:int",)))
    assert (source.keep.names, str(source.keep.types[0])) == (["truth"], "int64")
    source.snapshot(tmp_path / "snapshot")
    assert next(source.records()).keep == (7,)
    twice = problems(path, keep=("t=label", "t=b"), image_column="image")
    assert twice == ["--keep t=b: t is given twice"]


def test_inputs_that_do_not_go_together(tmp_path: Path, manifest: Path) -> None:
    write_files(tmp_path, "in/a.jpg")
    other = write_parquet(tmp_path / "o.parquet", {"image": ["a.jpg"], "caption": ["x"], "n": ["text"]})
    assert "different media in a row: image+text and one medium" in problem(
        manifest, tmp_path / "in", image_column="image", text_column="caption"
    )
    assert "n (int64) and n (string)" in problem(manifest, other, keep=("n",))
    assert "only manifests have columns" in problem(tmp_path / "in", keep=("n",))
    assert "only manifests have columns" in problem(tmp_path / "in", image_column="n")
    assert len(listed(tmp_path, manifest, tmp_path / "in", other)[1]) == 3


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip", "a.json", "a.xlsx", "a.arrow"])
def test_formats_that_are_not_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert name in problem(tmp_path / name)


def test_formats_by_name() -> None:
    assert [format_of(n) for n in ("a.PARQUET", "a.ndjson.gz", "a.tsv", "a.parquet.gz", "a.jpg.gz", "a.jpg")] == [
        "parquet", "jsonl", "tsv", None, None, None,
    ]  # fmt: skip


def test_a_quoted_pattern_of_manifests_is_expanded(tmp_path: Path) -> None:
    for i in range(3):
        write_parquet(tmp_path / f"{2 - i}.parquet", {"image": [b"%d" % (2 - i)]})
    _, records = listed(tmp_path, f"{tmp_path}/*.parquet")
    assert ids(records) == [f"{tmp_path}/{i}.parquet#0" for i in range(3)]
    assert [r.row for r in records] == [0, 1, 2]


def test_input_format_overrides_the_name(tmp_path: Path) -> None:
    (tmp_path / "m.dat").write_text("image\na.jpg\n")
    assert len(listed(tmp_path, tmp_path / "m.dat", input_format="csv")[1]) == 1
    write_files(tmp_path, "readme.csv")
    assert "no such file" in problem(tmp_path / "gone", input_format="csv")


def test_opening_module_is_light() -> None:
    code = (
        "import sys, mmcli.sources.open, mmcli.core.signature, mmcli.core.extensions;"
        "print([m for m in ('pyarrow', 'numpy', 'orjson', 'torch', 'PIL') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
